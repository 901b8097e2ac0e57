"""The options for how a model is stored and computed, which every command that loads one has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_C = TypeVar("_C", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--weights", help="How they are stored: bfloat16, int8, fp8, nf4 or auto."),
    click.option("--compute", help="What layers multiply in: int8 or fp8; default: --dtype."),
    click.option("--vae-dtype", default="float32", show_default=True, help="float32 or bfloat16."),
)


def precision_options(command: _C) -> _C:
    """Adds `weights`, `compute` and `vae_dtype`, arguments of `from_pretrained`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
