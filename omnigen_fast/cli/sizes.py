"""--size and --aspect: height and width of a picture from its size and the ratio of its sides."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..config import TOKEN_PIXELS
from ..errors import RequestError
from .config_file import given_options

_C = TypeVar("_C", bound=Callable[..., Any])

_ASPECT = re.compile(r"\s*(\d{1,4}(?:\.\d{1,4})?)\s*[:x/]\s*(\d{1,4}(?:\.\d{1,4})?)\s*")
_TOLERANCE = 0.15  # of the ratio, where sides are rounded


def aspect_option(command: _C) -> _C:
    """Adds --aspect."""
    return click.option(
        "--aspect",
        metavar="W:H",
        help="Of width to height, as in 3:2: a picture of as many pixels as --size squared, in "
        "multiples of 16.",
    )(command)


def sides(
    size: int | None, aspect: str | None, height: int | None, width: int | None, usual: int
) -> tuple[int | None, int | None]:
    """Height and width in pixels; None where no option decides.

    Args:
        size: of the picture; None if it is not given. The picture is square without an `aspect`,
            else has about size * size pixels.
        aspect: width to height, such as "3:2".
        height, width: as given; they win over `size`.
        usual: the size of an `aspect` without one.

    Raises RequestError for an aspect that multiples of 16 can't come near, or that is contradicted.
    """
    if aspect is not None:
        if height is not None or width is not None:
            raise RequestError(
                f"--aspect {aspect} can't be had with --height or --width; give --size and "
                "--aspect, or both sides"
            )
        return _of_aspect(usual if size is None else size, aspect)
    if size is not None and (height is None or width is None):
        _check_size(size)
    return (size if height is None else height), (size if width is None else width)


def chosen_sides(
    context: click.Context,
    size: int | None,
    aspect: str | None,
    usual: int,
    file: bool = True,
) -> dict[str, int]:
    """Height and width, where options of the size decide them; typed ones before the file's.

    Args:
        context: of the command.
        size, aspect: options of it.
        usual: the size of an aspect without one.
        file: whether the config file's options count.
    """
    typed, given = given_options(context, file=False), given_options(context, file=file)
    sized = {"size", "aspect"} & given
    sided = {"height", "width"} & given
    if sized & typed and not sided & typed:
        sided = set()
    elif not sized or (sided & typed and not sized & typed):
        size = aspect = None
    height, width = (
        context.params[name] if name in sided else None for name in ("height", "width")
    )
    found = zip(("height", "width"), sides(size, aspect, height, width, usual))
    return {name: value for name, value in found if value is not None}


def _check_size(size: int) -> None:
    if size <= 0:
        raise RequestError(f"--size must be positive, got {size}")
    if size % TOKEN_PIXELS:
        below = size - size % TOKEN_PIXELS
        nearest = f"{below} and {below + TOKEN_PIXELS}" if below else str(TOKEN_PIXELS)
        raise RequestError(
            f"--size must be a multiple of {TOKEN_PIXELS}, got {size}; the nearest: {nearest}"
        )


def _of_aspect(size: int, text: str) -> tuple[int, int]:
    """Height and width nearest to a ratio, of about size * size pixels."""
    found = _ASPECT.fullmatch(text)
    ratio = 0.0 if found is None or not float(found[2]) else float(found[1]) / float(found[2])
    if not ratio:
        raise RequestError(f"--aspect must be WIDTH:HEIGHT such as 3:2 or 16:9, got {text!r}")
    if not 0 < size <= 1 << 16:
        raise RequestError(f"--size must be from {TOKEN_PIXELS} to {1 << 16} pixels, got {size}")
    exact = size * math.sqrt(ratio), size / math.sqrt(ratio)
    near = [_multiples(one) for one in exact]
    width, height = min(
        ((w, h) for w in near[0] for h in near[1]),
        # the ratio first; of sides that hit it equally well, those with the right area
        key=lambda one: (
            round(abs(math.log(one[0] / one[1] / ratio)), 6),
            abs(math.log(one[0] * one[1] / size**2)),
        ),
    )
    if abs(width / height / ratio - 1) > _TOLERANCE:
        raise RequestError(
            f"--aspect {text} can't be had with --size {size}: sides are multiples of "
            f"{TOKEN_PIXELS}, and {width} x {height} comes nearest; give a larger --size"
        )
    return height, width


def _multiples(side: float) -> set[int]:
    """Those below and above."""
    below = math.floor(side / TOKEN_PIXELS) * TOKEN_PIXELS
    return {one for one in (below, below + TOKEN_PIXELS) if one}
