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

    `v = uncond + w_img (img - uncond) + w (cond - img)` with image guidance, else
    `v = uncond + w (cond - uncond)`, with terms collected by branch. Branches of weight 0 are left
    out; the result is the same.
    """
    text, image = guidance.text, guidance.image
    cond, uncond = Branch(prompt.text, prompt.images), Branch(prompt.negative)
    if guidance.use_image and prompt.images:
        tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(len(prompt.images)))
        branches = [(cond, text), (uncond, 1 - image), (Branch(tags, prompt.images), image - text)]
    else:
        branches = [(cond, text), (uncond, 1 - text)]
    return [(branch, coefficient) for branch, coefficient in branches if coefficient]
