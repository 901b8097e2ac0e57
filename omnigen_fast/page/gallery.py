"""Galleries: the settings and examples that the page starts with, for each model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import demo

_PICTURES = Path(__file__).parents[1] / "example_images"

TIPS = """
- Refer to each image in the prompt by its tag: `<img><|image_1|></img>`.
- For an edit, put the image before the instruction:
  `<img><|image_1|></img> Remove the cup.` That is also faster.
- For an edit, use the size of the input image.
- If colours are too strong, lower the guidance scale. If the picture does not follow the prompt,
  raise it or describe more.
- To edit a picture that you made here, use a different seed.
- Smaller input images (max input image size) take less time and memory.
"""


@dataclass(frozen=True)
class Example:
    """An example of a gallery: the values of the page's fields."""

    prompt: str
    images: tuple[Path, ...] = ()
    guidance_scale: float = 2.5
    use_input_image_size: bool = False

    def three_images(self) -> list[Path | None]:
        return [*self.images, None, None, None][:3]


@dataclass(frozen=True)
class Gallery:
    """A model's settings at the start, and its examples."""

    side: int  # pixels, of output and input images
    steps: int
    guidance_scale: float
    img_guidance_scale: float
    examples: tuple[Example, ...]


def gallery(model: str) -> Gallery:
    """The model's own gallery, else that of the released model."""
    return _GALLERIES.get(model, _FULL)


def _picture(name: str) -> Path:
    return _PICTURES / f"{name}.png"


_FULL = Gallery(
    side=1024,
    steps=50,
    guidance_scale=2.5,
    img_guidance_scale=1.6,
    examples=(
        Example("A curly-haired man in a red shirt is drinking tea."),
        Example("A lighthouse on a cliff above a stormy sea, oil painting.", guidance_scale=3.0),
        Example("<img><|image_1|></img> Remove the cup.", (_picture("coffee"),), 2.0, True),
        Example(
            "<img><|image_1|></img> Make the background a field of sunflowers.",
            (_picture("cat"),),
            2.0,
            True,
        ),
        Example(
            "The cat of <img><|image_1|></img> sits beside the cup of <img><|image_2|></img> on a "
            "wooden table.",
            (_picture("cat"), _picture("coffee")),
        ),
    ),
)
_SHAPES = Gallery(
    side=demo.SIDE,
    steps=demo.STEPS,
    guidance_scale=demo.GUIDANCE,
    img_guidance_scale=demo.IMAGE_GUIDANCE,
    examples=tuple(Example(one.prompt, tuple(one.paths()), demo.GUIDANCE) for one in demo.EXAMPLES),
)
_GALLERIES = {demo.MODEL: _SHAPES}  # by the value of --model
