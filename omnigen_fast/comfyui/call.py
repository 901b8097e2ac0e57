"""From the inputs of a node to the arguments of a call, and from its images to ComfyUI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import RequestError
from ..request import DEFAULT_NEGATIVE_PROMPT, with_placeholders


def call_arguments(
    *,
    prompt: str,
    images: Sequence[Tensor | None],
    mask: Tensor | None,
    width: int,
    height: int,
    size_of_image: bool,
    steps: int,
    strength: float,
    negative_prompt: str,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of a call of the pipeline.

    Args:
        prompt: images that it does not name come first, in their order.
        images: IMAGE inputs [pictures, height, width, channels] in [0, 1]; None where nothing is
            connected. Those of one picture are used for every picture.
        mask: [1, height, width] or [height, width]; 1 is edited. The output has the size of the
            image.
        width: of the output in pixels.
        height: likewise.
        size_of_image: the output has the size of the one input image instead.
        steps: 0 for those of the quality.
        strength: below 1, the output has the size of the image.
        negative_prompt: the built-in one by its words.
        others: arguments that the pipeline takes as they are.

    Raises:
        RequestError: inputs that the pipeline does not have and that can't be used.
    """
    pictures = _pictures(images)
    text = with_placeholders(prompt, len(pictures[0]))
    arguments = dict(others, strength=strength)
    arguments["prompt"] = text if len(pictures) == 1 else [text] * len(pictures)
    if pictures[0]:
        arguments["input_images"] = pictures[0] if len(pictures) == 1 else pictures
    if mask is not None:
        arguments["mask_image"] = _mask(mask)
    if size_of_image or mask is not None or strength < 1:
        arguments["use_input_image_size_as_output"] = True
    else:
        arguments |= {"width": width, "height": height}
    if steps:
        arguments["num_inference_steps"] = steps
    if negative_prompt.strip() != DEFAULT_NEGATIVE_PROMPT:
        arguments["negative_prompt"] = negative_prompt
    return arguments


def comfy_images(images: Tensor) -> Tensor:
    """[images, height, width, 3] on the host of images [images, 3, height, width]."""
    return images.permute(0, 2, 3, 1).float().cpu().contiguous()


def _pictures(inputs: Sequence[Tensor | None]) -> list[list[np.ndarray]]:
    """The input images of each picture."""
    given = [one is not None for one in inputs]
    if given != sorted(given, reverse=True):
        raise RequestError(
            f"image_{len(given) - given[::-1].index(True)} is connected but "
            f"image_{given.index(False) + 1} is not; connect them from the first"
        )
    arrays = [_array(f"image_{i}", one) for i, one in enumerate(inputs, 1) if one is not None]
    count = max(map(len, arrays), default=1)
    for i, array in enumerate(arrays, 1):
        if len(array) not in (1, count):
            raise RequestError(
                f"image_{i} is a batch of {len(array)} and another input one of {count}; give one "
                "image, or as many in each"
            )
    return [[one[place % len(one)] for one in arrays] for place in range(count)]


def _array(name: str, images: Tensor) -> np.ndarray:
    if images.ndim != 4 or not len(images):
        raise RequestError(
            f"{name} must be a batch [images, height, width, channels], got "
            f"{'x'.join(map(str, images.shape))}"
        )
    # scaling by other nodes overshoots
    return images.detach().float().cpu().numpy().clip(0, 1)


def _mask(mask: Tensor) -> np.ndarray:
    array = mask.detach().float().cpu().numpy().clip(0, 1)
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        raise RequestError(
            f"mask must be one mask [height, width], got {'x'.join(map(str, mask.shape))}"
        )
    if not array.any():  # of another size, too: what Load Image gives without transparent pixels
        raise RequestError(
            "mask marks nothing to edit; paint one in Load Image's mask editor, or disconnect it"
        )
    return array
