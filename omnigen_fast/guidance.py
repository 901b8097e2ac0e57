"""The guidance branches of a prompt and their weights, and the steps that run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .fewer_steps import ORDER, computed_steps, reuse_threshold
from .images import InputImage
from .request import Guidance, Prompt, step_times
from .schedule import ALL_BRANCHES, StepKind, StepSchedule


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
    cond, uncond = Branch(prompt.text, prompt.images), Branch(prompt.negative)
    tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(len(prompt.images)))
    branches = cond, uncond, Branch(tags, prompt.images)
    return list(zip(branches, guidance_weights(guidance, bool(prompt.images))))


def guidance_weights(guidance: Guidance, images: bool) -> tuple[float, ...]:
    """Of the branches of a prompt with or without images, see `guidance_terms`."""
    text, image = guidance.text, guidance.image
    if guidance.use_image and images:
        return text, 1 - image, image - text
    return text, 1 - text


def guided_steps(
    steps: StepSchedule, guidance: Guidance, pictures: Sequence[bool], threshold: float = 0.0
) -> tuple[StepSchedule, list[list[int]]]:
    """The branches that each step of a call runs, and whether it is computed.

    Args:
        steps: their times and their solver.
        guidance: with its intervals.
        pictures: of each, whether it has input images.
        threshold: of reuse, see `fewer_steps.computed_steps`.

    Returns:
        The schedule; and for each picture which of its `guidance_terms` any step runs. The kinds of
        steps count the branches among those.
    """
    guidances = [guidance.at(steps.time(step)) for step in range(len(steps))]
    weights = {one: [guidance_weights(one, images) for images in pictures] for one in guidances}
    own = [guidance_weights(guidance, images) for images in pictures]
    used = [
        [place for place in range(len(one)) if any(some[i][place] for some in weights.values())]
        for i, one in enumerate(own)
    ]
    every = tuple(
        tuple(enumerate(one[place] for place in places)) for one, places in zip(own, used)
    )
    kinds = {}
    for one, some in weights.items():
        runs = tuple(
            tuple((i, each[place]) for i, place in enumerate(places) if each[place])
            for each, places in zip(some, used)
        )
        kinds[one] = ALL_BRANCHES if runs == every else StepKind(pictures=runs)
    begins_anew = [True, *(one != before for before, one in pairwise(guidances))]
    computed = computed_steps(steps.ends, begins_anew, threshold) if threshold else None
    if computed is None or all(computed):
        return replace(steps, kinds=tuple(kinds[one] for one in guidances)), used
    found = tuple(replace(kinds[one], computed=flag) for one, flag in zip(guidances, computed))
    return replace(steps, kinds=found, order=ORDER), used


def typical_schedule(preset: Mapping[str, Any], pictures: Sequence[bool]) -> StepSchedule:
    """The steps of a call with a preset's arguments and scales at which every branch runs.

    Args:
        preset: see `fewer_steps.preset`.
        pictures: see `guided_steps`.

    Raises:
        RequestError: an argument can't be used.
    """
    count = preset["num_inference_steps"]
    times = step_times(count, preset["time_shift"])
    steps = StepSchedule((ALL_BRANCHES,) * count, times, preset["solver"])
    intervals = (
        None if one is None else (one[0], one[1])
        for one in (preset["guidance_interval"], preset["image_guidance_interval"])
    )
    guidance = Guidance(2.5, 1.6, True, *intervals)
    return guided_steps(steps, guidance, pictures, reuse_threshold(preset["reuse"]))[0]
