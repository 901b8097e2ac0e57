"""What the tables have a cell for: the original's sizes and settings, and requests for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from omnigen_fast.config import TOKEN_PIXELS
from omnigen_fast.errors import RequestError
from omnigen_fast.images import InputImage
from omnigen_fast.page.demo import INPUTS
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT, Guidance, Prompt

COLUMNS = ("text", "one image", "two images")
GUIDANCE = Guidance(text=2.5, image=1.6, use_image=True)
PROMPTS = (
    "A curly-haired man in a red shirt is drinking tea.",
    "<img><|image_1|></img> Make it a winter evening, with snow on the roofs.",
    "The cup of <img><|image_1|></img> stands beside the cat of <img><|image_2|></img>.",
)

# What the bundled model can draw: parts of prompts, and files of `demo.INPUTS`.
_COLOURS, _SHAPES = ("red", "yellow", "green", "blue", "purple"), ("circle", "square", "star")
_BACKGROUNDS = ("white", "gray", "striped", "meadow")
_KNOWN_IMAGES = ("star", "checkered")
_KNOWN_PROMPTS = (
    "A large {colour} {shape} at the top left on a {background} background.",
    "<img><|image_1|></img> Add a small {colour} {shape} at the bottom left.",
    "The object of <img><|image_1|></img> on the background of <img><|image_2|></img>",
)


@dataclass(frozen=True)
class Size:
    """Pixels a side of the picture, and of its input images."""

    output: int
    image: int

    def __str__(self) -> str:
        more = "" if self.image == self.output else f", images {self.image} px"
        return f"{self.output} px{more}"


# The rows of the original's own tables, and what two CPU cores do of them.
ORIGINAL_SIZES = (Size(1024, 1024), Size(1024, 512), Size(768, 768), Size(512, 512))
CPU_SIZES = (Size(512, 512), Size(256, 512), Size(256, 256))


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Sizes as `1024,1024/512`: OUTPUT, or OUTPUT/IMAGE where input images are of another size.

    Raises:
        RequestError: a side is no multiple of 16.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:/(\d{1,5}))?\s*", part)
        sides = [int(side) for side in match.groups() if side] if match else []
        if not sides or any(side % TOKEN_PIXELS or not side for side in sides):
            raise RequestError(
                f"--sizes: {part.strip()!r} is no size; give pixels that are multiples of 16, as "
                "in 1024,1024/512 (a picture of 1024 px from input images of 512 px)"
            )
        sizes.append(Size(sides[0], sides[-1]))
    return tuple(sizes)


SWITCHES = {
    "kv": "use_kv_cache",
    "offload-kv": "offload_kv_cache",
    "separate": "separate_cfg_infer",
    "offload-model": "offload_model",
}
# The rows of the original's second table.
ORIGINAL_SETTINGS = (
    "kv",
    "kv+offload-kv",
    "kv+offload-kv+separate",
    "kv+offload-kv+offload-model",
    "kv+offload-kv+separate+offload-model",
)


@dataclass(frozen=True)
class Setting:
    """Memory switches that are on; the others are off. `default` leaves all to each side."""

    name: str = "default"

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> dict[str, bool]:
        """Arguments of the pipeline, the original's and ours."""
        if self.name == "default":
            return {}
        on = self.name.split("+")
        return {argument: switch in on for switch, argument in SWITCHES.items()}


def parse_settings(text: str) -> tuple[Setting, ...]:
    """Settings as `kv,kv+offload-kv`, or `all` for the original's five.

    Raises:
        RequestError: an unknown switch.
    """
    if text == "all":
        return tuple(map(Setting, ORIGINAL_SETTINGS))
    settings = []
    for name in text.split(","):
        unknown = set(name.split("+")) - set(SWITCHES)
        if unknown and name != "default":
            raise RequestError(
                f"--settings: {name!r} is no setting; give default, all, or switches joined by +: "
                + ", ".join(SWITCHES)
            )
        settings.append(Setting(name))
    return tuple(settings)


@dataclass(frozen=True)
class Task:
    """One request of a cell, which every contender is given alike.

    Attributes:
        size: of the picture and its input images.
        images: how many of these there are.
        steps: of the whole picture.
        variant: requests of one cell differ by it in their prompts and in their images' content,
            so that no contender finds a condition that it has kept.
        setting: memory switches.
        known: whether to ask for what the bundled model can draw: it knows only some words.
    """

    size: Size
    images: int
    steps: int
    variant: int = 0
    setting: Setting = field(default_factory=Setting)
    known: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return (1, 4, self.size.output // 8, self.size.output // 8)

    @property
    def noise_tokens(self) -> int:
        return (self.size.output // TOKEN_PIXELS) ** 2

    def prompt(self) -> Prompt:
        """Prompt, images and negative prompt; of equal length for all variants below 26."""
        if self.known:
            return self._known()
        mark = f" {chr(ord('A') + self.variant)}."
        draw = np.random.default_rng([self.variant, self.images])
        shape = (self.size.image, self.size.image, 3)
        pixels = [draw.integers(0, 256, shape, dtype=np.uint8) for _ in range(self.images)]
        return Prompt(
            PROMPTS[self.images] + mark,
            tuple(map(InputImage, pixels)),
            DEFAULT_NEGATIVE_PROMPT + mark,
        )

    def _known(self) -> Prompt:
        i = self.variant
        words = {
            "colour": _COLOURS[i % len(_COLOURS)],
            "shape": _SHAPES[i % len(_SHAPES)],
            "background": _BACKGROUNDS[i % len(_BACKGROUNDS)],
        }
        images = []
        for name in _KNOWN_IMAGES[: self.images]:
            with Image.open(INPUTS / f"{name}.png") as image:
                side = (self.size.image, self.size.image)
                images.append(InputImage(np.array(image.convert("RGB").resize(side))))
        text = _KNOWN_PROMPTS[self.images].format(**words)
        return Prompt(text, tuple(images), DEFAULT_NEGATIVE_PROMPT)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline, but for the noise."""
        prompt = self.prompt()
        return {
            "prompt": prompt.text,
            "input_images": [image.pixels for image in prompt.images] or None,
            "negative_prompt": prompt.negative,
            "height": self.size.output,
            "width": self.size.output,
            "max_input_image_size": self.size.image,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE.text,
            "img_guidance_scale": GUIDANCE.image,
            "output_type": "latent",
            "progress": False,
            **self.setting.arguments,
        }
