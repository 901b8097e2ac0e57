"""The demo: what the bundled model can do, on one sheet."""

from __future__ import annotations

import itertools
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline import OmniGenPipeline

if TYPE_CHECKING:
    from PIL import Image

MODEL = "shapes"
INPUTS = Path(__file__).parents[1] / "models" / "shapes" / "inputs"
SIDE = 128  # pixels
STEPS = 25
GUIDANCE, IMAGE_GUIDANCE = 2.5, 1.6
SEED = 0
_CELL, _GAP, _TEXT_WIDTH, _FONT_SIZE = 160, 12, 380, 15  # pixels of the sheet
_INK, _FAINT = "#202020", "#707070"


@dataclass(frozen=True)
class DemoExample:
    """A request to the bundled model."""

    task: str
    prompt: str
    images: tuple[str, ...] = ()  # names of files in `INPUTS`

    def paths(self) -> list[Path]:
        return [INPUTS / f"{name}.png" for name in self.images]


_ONE, _TWO, _THREE = (f"<img><|image_{number}|></img>" for number in (1, 2, 3))
EXAMPLES = (
    DemoExample(
        "text to image",
        "A large blue triangle at the top left and a small red star at the bottom right "
        "on a meadow background.",
    ),
    DemoExample("text to image", "Please draw a big red star on black."),
    DemoExample("recolour", f"{_ONE} Make the triangle purple.", ("circle-triangle",)),
    DemoExample("remove", f"{_ONE} Remove the circle.", ("circle-triangle",)),
    DemoExample("add", f"{_ONE} Add a small blue square at the top left.", ("star",)),
    DemoExample("move", f"{_ONE} Move the star to the top right.", ("star",)),
    DemoExample("background", f"{_ONE} Change the background to striped.", ("square",)),
    DemoExample(
        "subject",
        f"Draw the object in {_ONE} at the top left and a small green circle at the bottom right, "
        "meadow background.",
        ("star",),
    ),
    DemoExample(
        "composition", f"The object of {_ONE} on the background of {_TWO}", ("star", "checkered")
    ),
    DemoExample("mask", f"Segment the triangle in {_ONE}", ("circle-triangle",)),
    DemoExample(
        "in-context pair",
        f"{_ONE} becomes {_TWO}. Do the same to {_THREE}",
        ("star", "yellow-star", "square"),
    ),
)


@dataclass(frozen=True)
class Made:
    """The picture of an example, and what it cost."""

    example: DemoExample
    picture: Image.Image
    step_seconds: float  # median
    cached_share: float  # rows from the cache, as a share of the rows of a run without one


def make(pipe: OmniGenPipeline, example: DemoExample, seed: int = SEED) -> Made:
    """Runs one example.

    Args:
        pipe: the bundled model, or another that makes pictures of `SIDE` pixels.
        example: the request.
        seed: of the noise.

    Raises:
        OmniGenError: the call fails.
    """
    ends: list[float] = []

    def clock(pipe: OmniGenPipeline, step: int, now: float, tensors: dict) -> None:
        ends.append(time.perf_counter())

    (picture,) = pipe(
        example.prompt,
        example.paths() or None,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        img_guidance_scale=IMAGE_GUIDANCE,
        seed=seed,
        callback_on_step_end=clock,
        progress=False,
    )
    report = pipe.last_report
    assert report is not None  # a call has just run
    steps = [end - begin for begin, end in itertools.pairwise(ends)]
    return Made(example, picture, statistics.median(steps), report.cached_share)


def run(pipe: OmniGenPipeline, say: Callable[[str], None], seed: int = SEED) -> list[Made]:
    """Runs all examples; reports to `say` line by line."""
    results = []
    for example in EXAMPLES:
        made = make(pipe, example, seed)
        results.append(made)
        say(
            f"{example.task:<16}{made.step_seconds:7.4f} s a step, {made.cached_share:4.0%} of the "
            f"rows cached   {example.prompt}"
        )
    say("s a step: median; rows cached: tokens that a step takes from the cache, of all it sees")
    say("summary of the last one:")
    for line in pipe.summary().splitlines():
        say("  " + line)
    return results


def sheet(results: Sequence[Made]) -> Image.Image:
    """Prompt, input images and output of each result, one row each."""
    from PIL import Image, ImageDraw, ImageFont

    inputs = max(len(made.example.images) for made in results)
    width = _GAP + _TEXT_WIDTH + (inputs + 1) * (_CELL + _GAP) + _GAP
    page = Image.new("RGB", (width, _GAP + len(results) * (_CELL + _GAP)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(_FONT_SIZE)
    columns = int(_TEXT_WIDTH / font.getlength("n"))
    output = width - _CELL - _GAP
    for row, made in enumerate(results):
        top = _GAP + row * (_CELL + _GAP)
        draw.text((_GAP, top), made.example.task, _FAINT, font)
        words = textwrap.fill(made.example.prompt, columns)
        draw.multiline_text((_GAP, top + 2 * _FONT_SIZE), words, _INK, font, spacing=5)
        for column, path in enumerate(made.example.paths()):
            with Image.open(path) as image:
                page.paste(_cell(image), (_GAP + _TEXT_WIDTH + column * (_CELL + _GAP), top))
        page.paste(_cell(made.picture), (output, top))
    return page


def _cell(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    fitted = image.convert("RGB").resize((_CELL - 2, _CELL - 2), Image.Resampling.LANCZOS)
    return ImageOps.expand(fitted, 1, "#c0c0c0")
