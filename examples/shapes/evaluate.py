"""Scores a model on prompts that it was not trained on.

`python -m examples.shapes.evaluate` runs them through `OmniGenPipeline` and has the checker read
the pictures. Half of the prompts show a (shape, colour) pair that no picture of the training has.
Those of `wordings` follow, which no sentence of the training is like.
`--md FILE` writes the table, `--sheet FILE` the first pictures of every task.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from omnigen_fast import OmniGenPipeline
from omnigen_fast.fewer_steps import QUALITIES
from omnigen_fast.parameters import parameter_shapes

from . import checker, wordings
from .checker import Score
from .scenes import ALL, HELD_OUT, SIDE, TRAINED, render
from .tasks import EDITS, KINDS, Task, random_task

STEPS = 25
GUIDANCE, IMAGE_GUIDANCE = 2.5, 1.6  # as in the examples of the original
_SEED = 1_000_003  # of the prompts; training draws its scenes from seeds of its own
_BATCH = 10
GROUPS = {
    "text to image": ("text",),
    "edits": tuple(EDITS),
    "composition": ("subject", "compose"),
    "mask": ("mask",),
    "in-context pair": ("pair",),
}
TARGETS = {"text to image": 0.90, "edits": 0.85, "composition": 0.85}


@dataclass(frozen=True)
class Result:
    """One prompt, its picture, and how many attributes it has right."""

    task: Task
    prompt: str
    picture: np.ndarray  # [SIDE, SIDE, 3], uint8
    score: Score
    held_out: bool  # whether it shows a pair that training never did


def prompts(kind: str, count: int, seed: int = _SEED) -> list[tuple[Task, str, bool]]:
    """Tasks with their words; every other one shows a pair of `HELD_OUT`."""
    rng = random.Random(f"{seed} {kind}")
    found = []
    while len(found) < count:
        held_out = len(found) % 2 == 0
        task = random_task(kind, rng, ALL if held_out else TRAINED)
        scenes = [*task.inputs, task.target] if kind == "mask" else [task.target]
        shown = {(thing.shape, thing.colour) for scene in scenes for thing in scene.things}
        # what "remove" leaves may be nothing; there the picture that was given counts
        shown |= {(t.shape, t.colour) for s in task.inputs for t in s.things if kind == "remove"}
        if not held_out or shown & HELD_OUT:
            found.append((task, task.words(rng), held_out))
    return found


def run(
    pipe: OmniGenPipeline,
    tasks: Sequence[tuple[Task, str, bool]],
    *,
    steps: int | None = STEPS,
    guidance: float = GUIDANCE,
    image_guidance: float | None = IMAGE_GUIDANCE,
    seed: int = 0,
    **options,
) -> list[Result]:
    """Makes the pictures and reads them.

    Args:
        pipe: the model.
        tasks: from `prompts`.
        steps: how many; None leaves them to `options`.
        guidance: of the text; 1 is none.
        image_guidance: of the images; None leaves it out.
        seed: of the noise of each batch.
        options: further arguments of the pipeline's call.
    """
    results = []
    if steps is not None:
        options["num_inference_steps"] = steps
    for first in range(0, len(tasks), _BATCH):
        some = tasks[first : first + _BATCH]
        images = pipe(
            [words for _, words, _ in some],
            [[render(scene) for scene in task.inputs] for task, _, _ in some],
            height=SIDE,
            width=SIDE,
            guidance_scale=guidance,
            use_img_guidance=image_guidance is not None,
            img_guidance_scale=image_guidance or 1.0,
            seed=seed + first,
            progress=False,
            **options,
        )
        for (task, words, held_out), image in zip(some, images):
            picture = np.asarray(image)
            score = checker.score(checker.read(picture), task.target, task.sizes_stated)
            results.append(Result(task, words, picture, score, held_out))
    return results


def fraction(scores: Iterable[Score]) -> float:
    """Attributes that are right, of those that were asked for; NaN where nothing was."""
    total = reduce(add, scores, Score(0, 0))
    return total.right / total.asked if total.asked else float("nan")


def unchanged(results: Sequence[Result]) -> float:
    """What returning the last input picture would score: how much of the task is to be done."""
    return fraction(
        checker.score(checker.read(render(r.task.inputs[-1])), r.task.target)
        for r in results
        if r.task.inputs
    )


def table(guided: dict[str, list[Result]], plain: dict[str, list[Result]]) -> list[str]:
    """Rows of Markdown: groups of tasks, and the tasks of groups that have several."""
    rows = [
        "| task | images | correct attributes | in new pairs | fully correct images "
        "| input unchanged | no guidance |",
        "|---|---|---|---|---|---|---|",
    ]

    def row(name: str, kinds: Sequence[str]) -> str:
        results = [one for kind in kinds for one in guided[kind]]
        without = [one for kind in kinds for one in plain.get(kind, ())]
        values = [
            fraction(one.score for one in results),
            fraction(one.score for one in results if one.held_out),
            sum(one.score.all_right for one in results) / len(results),
            unchanged(results),
            fraction(one.score for one in without),
        ]
        shown = ["-" if value != value else f"{100 * value:.1f} %" for value in values]
        return f"| {name} | {len(results)} | {' | '.join(shown)} |"

    for group, kinds in GROUPS.items():
        present = [kind for kind in kinds if kind in guided]
        if present:
            rows.append(row(f"**{group}**", present))
            if len(kinds) > 1:
                rows += [row(kind, [kind]) for kind in present]
    return rows


def sheet(results: dict[str, list[Result]], columns: int = 4) -> np.ndarray:
    """Inputs and picture of the first prompts of each task, one row a task."""
    rows = []
    for some in results.values():
        row = []
        for one in some[:columns]:
            row += [render(scene) for scene in one.task.inputs] + [one.picture]
            row.append(np.full((SIDE, 8, 3), 255, np.uint8))
        rows.append(np.concatenate(row, axis=1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 8), (0, width - row.shape[1]), (0, 0)), constant_values=255)
              for row in rows]  # fmt: skip
    return np.concatenate(padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--count", type=int, default=40, help="prompts of each task")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--wordings",
        type=int,
        default=wordings.SEEDS,
        metavar="SEEDS",
        help="pictures of each free wording",
    )
    parser.add_argument("--only-wordings", action="store_true", help="skip the tasks")
    parser.add_argument("--steps", type=int, help=f"{STEPS} without --quality")
    parser.add_argument("--quality", choices=QUALITIES, default=QUALITIES[0])
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--image-guidance", type=float, default=IMAGE_GUIDANCE)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compute", help="of the layers' products: int8 or fp8 (see --dtype)")
    parser.add_argument("--cache", help="of keys and values: int8 or fp8 (see --dtype)")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--weights", help="how they are stored: int8, nf4, ... (see --dtype)")
    parser.add_argument("--guided-only", action="store_true", help="skip the runs without guidance")
    parser.add_argument("--verbose", action="store_true", help="print every fault")
    parser.add_argument("--md", type=Path)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    if arguments.steps is None and arguments.quality == QUALITIES[0]:
        arguments.steps = STEPS

    pipe = OmniGenPipeline.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        weights=arguments.weights,
        compute=arguments.compute,
        cache=arguments.cache,
        vae_dtype=arguments.vae_dtype,
    )
    start = time.monotonic()
    guided, plain = {}, {}
    for kind in [] if arguments.only_wordings else arguments.kinds:
        tasks = prompts(kind, arguments.count)
        guided[kind] = run(
            pipe,
            tasks,
            steps=arguments.steps,
            guidance=arguments.guidance,
            image_guidance=arguments.image_guidance,
            quality=arguments.quality,
        )
        if not arguments.guided_only:
            plain[kind] = run(
                pipe,
                tasks,
                steps=arguments.steps,
                guidance=1,
                image_guidance=None,
                quality=arguments.quality,
            )
        print(f"{kind}: {100 * fraction(r.score for r in guided[kind]):.1f} %", file=sys.stderr)
        if arguments.verbose:
            for one in guided[kind]:
                if not one.score.all_right:
                    print(f"  {one.prompt}\n    {one.task.target}\n    {checker.read(one.picture)}")
    rows = [] if arguments.only_wordings else [*table(guided, plain), ""]
    if arguments.wordings:
        scores = wordings.run(
            pipe,
            seeds=arguments.wordings,
            guidance_scale=arguments.guidance,
            img_guidance_scale=arguments.image_guidance,
            quality=arguments.quality,
            **({} if arguments.steps is None else {"num_inference_steps": arguments.steps}),
        )
        rows += wordings.table(scores)
        if arguments.verbose:
            print("\n".join(wordings.faults(scores)))
    seconds = time.monotonic() - start
    print("\n".join(rows))
    if arguments.sheet:
        from PIL import Image

        Image.fromarray(sheet(guided)).save(arguments.sheet)
    if arguments.md:
        arguments.md.write_text(_report(arguments, rows, seconds, pipe))


def _report(
    arguments: argparse.Namespace, rows: Sequence[str], seconds: float, pipe: OmniGenPipeline
) -> str:
    import diffusers
    import torch

    command = " ".join(["python -m examples.shapes.evaluate", *sys.argv[1:]])
    shown = arguments.steps or f"the {arguments.quality} preset's"
    parameters = sum(math.prod(shape) for shape in parameter_shapes(pipe.config).values())
    return f"""# The bundled model

`OmniGenPipeline.from_pretrained("shapes")` loads a model of OmniGen's architecture with
{parameters / 1e6:.1f} million parameters, trained from scratch (see
[examples/shapes](../examples/shapes/README.md)). The table shows how many of the requested
attributes its images have, as read by `examples/shapes/checker.py`. Half of the prompts ask for a
combination of shape and colour that training never showed ("in new pairs"). "Input unchanged" is
the score of the last input image itself: only the margin above it counts.

Written by `{command}`
on {datetime.date.today().isoformat()} with Python {platform.python_version()}, torch
{torch.__version__}, diffusers {diffusers.__version__}, {arguments.dtype} on {pipe.device.type},
in {seconds:.0f} s: {shown} steps, guidance {arguments.guidance}, image guidance
{arguments.image_guidance}. "No guidance" means guidance scale 1 without image guidance.
The free wordings (`examples/shapes/wordings.py`) are written by hand; no sentence of the training
has their words in their order. What a prompt leaves out is not scored. The model's vocabulary is
fixed: a word that it does not know tells it nothing.

{chr(10).join(rows)}

The tests require at least {", ".join(f"{goal:.0%} in {name}" for name, goal in TARGETS.items())};
of free wordings {wordings.RIGHT:.0%} of the attributes and {wordings.WHOLE:.0%} of the pictures.

![Prompts, input images and outputs of the demo](demo.png)
"""


if __name__ == "__main__":
    main()
