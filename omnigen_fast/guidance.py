"""The guidance branches of a prompt and their weights."""

from __future__ import annotations

from dataclasses import dataclass

from .images import InputImage
from .request import Guidance, Prompt


@dataclass(frozen=True)
class Branch:
    """A guidance branch: the condition of one of the velocities that guidance combines."""

    text: str
    images: tuple[InputImage, ...] = ()


def guidance_branches(prompt: Prompt, guidance: Guidance) -> list[tuple[Branch, float]]:
    """The guidance branches of a prompt and their weights.

    See `guidance_terms`. Branches of weight 0 are left out; the result is the same.
    """
    return [(branch, weight) for branch, weight in guidance_terms(prompt, guidance) if weight]


def guidance_terms(prompt: Prompt, guidance: Guidance) -> list[tuple[Branch, float]]:
    """All branches that guidance may combine, with their weights, 0 included.

    `v = uncond + w_img (img - uncond) + w (cond - img)` with image guidance, else
    `v = uncond + w (cond - uncond)`, with terms collected by branch.

    A scale of 1 is no guidance, and that is what a scale is outside its interval. So with image
    guidance:

    | outside the interval of | velocity | branches that run |
    |---|---|---|
    | images | `img + w (cond - img)` | cond, img |
    | text | `cond + (w_img - 1) (img - uncond)` | cond, uncond, img |
    | both | `cond` | cond |

    Text guidance alone goes from img to cond, not from uncond: the images are in both, so `w` does
    not amplify them, as it would if uncond took the place of img.
    """
    text, image = guidance.text, guidance.image
    cond, uncond = Branch(prompt.text, prompt.images), Branch(prompt.negative)
    if guidance.use_image and prompt.images:
        tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(len(prompt.images)))
        return [(cond, text), (uncond, 1 - image), (Branch(tags, prompt.images), image - text)]
    return [(cond, text), (uncond, 1 - text)]
