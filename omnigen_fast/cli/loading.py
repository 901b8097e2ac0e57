"""The options that say which model to load and how, which several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .files import PATH_OR_NAME

_C = TypeVar("_C", bound=Callable[..., Any])

_OPTIONS = {
    "model": click.option(
        "--model",
        default="Shitao/OmniGen-v1",
        show_default=True,
        type=PATH_OR_NAME,
        help="Folder or hub id.",
    ),
    "vae_path": click.option(
        "--vae-path",
        type=PATH_OR_NAME,
        help="Folder, file or hub id of the VAE; default: the model's own.",
    ),
    "revision": click.option("--revision", help="Branch, tag or commit on the hub."),
    "cache_dir": click.option(
        "--cache-dir", type=PATH_OR_NAME, help="Folder for files from the hub."
    ),
    "local_files_only": click.option(
        "--local-files-only", is_flag=True, help="Do not download from the hub."
    ),
    "device": click.option(
        "--device", help="cuda, cuda:1, cpu, ...; the current GPU if there is one."
    ),
    "dtype": click.option(
        "--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32."
    ),
    "weights": click.option(
        "--weights", help="How they are stored: bfloat16, int8, fp8, nf4 or auto."
    ),
    "compute": click.option(
        "--compute", help="What layers multiply in: int8 or fp8; default: --dtype."
    ),
    "cache": click.option(
        "--cache",
        help="How the condition's keys and values are kept: int8 or fp8; default: --dtype.",
    ),
    "attention": click.option(
        "--attention",
        default="auto",
        show_default=True,
        help="Who computes that of a step: triton, flash, cudnn or auto.",
    ),
    "vae_dtype": click.option(
        "--vae-dtype", default="float32", show_default=True, help="float32 or bfloat16."
    ),
    "compile": click.option(
        "--compile/--no-compile",
        default=None,
        help="On a CPU, run operations in C++, built here; default: for large models.",
    ),
}
NAMES = tuple(_OPTIONS)


def loading_options(*left_out: str) -> Callable[[_C], _C]:
    """Adds the model and arguments of `from_pretrained`, but for those named."""

    def add(command: _C) -> _C:
        for name, option in reversed(_OPTIONS.items()):
            if name not in left_out:
                command = option(command)
        return command

    return add
