"""From what a client sends to the arguments of a call, and from pictures to the answer."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from ..config import ModelConfig
from ..fewer_steps import not_given
from ..request import DEFAULT_SIDE, with_placeholders
from ..serving.work import Ticket
from .errors import error
from .options import Options
from .schemas import EXTENSIONS, Common

if TYPE_CHECKING:
    from PIL.Image import Image

_QUALITY = 95  # of jpeg and webp, unless asked for another


def call_arguments(
    given: Common,
    options: Options,
    config: ModelConfig,
    images: Sequence[IO[bytes]] = (),
    mask: IO[bytes] | None = None,
) -> dict[str, Any]:
    """The arguments of a call of the pipeline, within the server's bounds.

    Args:
        given: what the client sends.
        options: of the server.
        config: of the model.
        images: input images.
        mask: of the first of them.

    Raises:
        ApiError: more than allowed, or arguments that contradict each other.
    """
    if given.model not in (None, options.model_name):
        text = f"the model {given.model!r} is not here; its name is {options.model_name!r}"
        raise error("model_not_found", text, param="model")
    arguments: dict[str, Any] = {
        name: value
        for name in EXTENSIONS
        if (value := getattr(given, name, None)) is not None and name not in ("height", "width")
    }
    arguments["prompt"] = with_placeholders(given.prompt, len(images))
    arguments["num_images_per_prompt"] = _bounded("n", given.n or 1, options.max_images)
    if given.stream and (given.n or 1) > 1:
        raise error("invalid_value", "n must be 1 with stream; send several requests", param="n")
    if given.timesteps is not None:
        _bounded("timesteps", len(given.timesteps), options.max_steps, "the number of ")
    elif given.num_inference_steps is not None:
        _bounded("num_inference_steps", given.num_inference_steps, options.max_steps)
    arguments |= not_given(options.arguments_of(given.quality), arguments)
    side = math.isqrt(options.max_pixels)
    if given.max_input_image_size is None:
        arguments["max_input_image_size"] = min(DEFAULT_SIDE, side, config.max_image_side)
    else:
        _bounded("max_input_image_size", given.max_input_image_size, side)
    if images:
        arguments["input_images"] = list(images)
    if mask is not None:
        arguments["mask_image"] = mask
    size = _size(given)
    if size is None and len(images) == 1:
        arguments["use_input_image_size_as_output"] = True
    elif arguments.get("use_input_image_size_as_output"):
        if size is not None:
            text = "use_input_image_size_as_output and a size contradict each other; give one"
            raise error("invalid_value", text, param="size")
    else:
        default = min(DEFAULT_SIDE, config.max_image_side, side // 16 * 16)
        width, height = size or (default, default)
        if width * height > options.max_pixels:
            text = (
                f"size must have at most {options.max_pixels:,} pixels here, got {width} x {height}"
            )
            raise error("invalid_value", text, param="size")
        arguments |= {"width": width, "height": height}
    return arguments


def _size(given: Common) -> tuple[int, int] | None:
    """(width, height), or None for the default."""
    named = None if given.size in (None, "auto") else given.size
    if given.width is not None or given.height is not None:
        if given.width is None or given.height is None:
            raise error("invalid_value", "give width and height, or neither", param="width")
        if named is not None:
            raise error("invalid_value", "give size, or width and height, not both", param="size")
        return given.width, given.height
    if named is None:
        return None
    width, height = named.split("x")
    return int(width), int(height)


def _bounded(name: str, value: int, most: int, what: str = "") -> int:
    if value > most:
        text = f"{what}{name} must be at most {most} on this server, got {min(value, 10**12)}"
        raise error("invalid_value", text, param=name)
    return value


def shown_steps(partial_images: int, steps: int) -> list[int]:
    """After which steps previews are made; fewer where there are not enough steps."""
    wanted = [round(steps * (i + 1) / (partial_images + 1)) for i in range(partial_images)]
    return sorted({one for one in wanted if 0 < one < steps})


def encode(image: Image, given: Common) -> str:
    """A picture as a file in base64."""
    kind = given.output_format or "png"
    options: dict[str, Any] = {}
    if kind != "png":
        compression = given.output_compression
        options["quality"] = _QUALITY if compression is None else max(1, compression)
    file = io.BytesIO()
    image.save(file, kind.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()


def described(given: Common, ticket: Ticket) -> dict[str, Any]:
    """What every answer and event says of its pictures."""
    height, width = ticket.size
    return {
        "size": f"{width}x{height}",
        "quality": given.quality or "auto",
        "background": "opaque",
        "output_format": given.output_format or "png",
    }


def usage(ticket: Ticket) -> dict[str, Any]:
    """Tokens of the prompt, the input images and the pictures."""
    given = ticket.text_tokens + ticket.image_tokens
    return {
        "input_tokens": given,
        "input_tokens_details": {
            "image_tokens": ticket.image_tokens,
            "text_tokens": ticket.text_tokens,
        },
        "output_tokens": ticket.noise_tokens,
        "total_tokens": given + ticket.noise_tokens,
    }


def answer(images: Sequence[Image], given: Common, ticket: Ticket) -> dict[str, Any]:
    """The body of an answer."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": encode(image, given)} for image in images],
        **described(given, ticket),
        "usage": usage(ticket),
        "seed": ticket.seed,
    }
