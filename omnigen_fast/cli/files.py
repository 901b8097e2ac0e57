"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import RequestError
from ..page import embedded
from ..page.record import Record
from ..whole_files import write_whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
SUFFIXES = {  # by output type
    "pil": IMAGE_SUFFIXES,
    "np": (".npy",),
    "pt": (".safetensors",),
    "latent": (".safetensors",),
}


class UserPath(click.Path):
    """A path in which ~ is the home folder, as in --out=~/a.png, which no shell replaces."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


# A path that is checked when it is opened, or the name of something else.
PATH_OR_NAME = UserPath(readable=False)


def check_writable(out: Path) -> None:
    """Raises RequestError now if writing the file would fail after the work."""
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder; give a file name in it")
    if not out.parent.is_dir():
        raise RequestError(f"--out: the folder {out.parent} does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"--out: the folder {out.parent} can't be written to")


def make_folder(folder: Path, name: str = "--out") -> None:
    """Makes a folder unless it exists; `name` is that of the argument."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exists = isinstance(error, FileExistsError)
        reason = "a file of that name exists" if exists else error.strerror
        raise OSError(f"{name}: the folder {folder} can't be made: {reason}") from error


def picture_paths(out: Path, count: int) -> Iterator[Path]:
    """The files of several pictures: NAME-1.png and so on; `out` itself for one.

    One by one, since nothing has checked the count yet.
    """
    if count == 1:
        yield out
        return
    for i in range(count):
        yield out.with_stem(f"{out.stem}-{i + 1}")


def save_pictures(images: Sequence[Any], paths: Sequence[Path], record: Record | None) -> None:
    """Writes pictures of one call, each with its place in the record if there is one."""
    for i, (path, image) in enumerate(zip(paths, images)):
        info: dict[str, Any] = {}
        if record is not None:
            info = embedded.saving(replace(record, index=i).text(), path.suffix)
        write_whole(path, partial(image.save, **info))


def save_result(result: Any, output_type: str, out: Path, record: Record | None) -> list[Path]:
    """Writes what a call returned, with its record if there is one; returns the files' paths."""
    if output_type == "pil":
        paths = list(picture_paths(out, len(result)))
        save_pictures(result, paths, record)
        return paths
    if output_type == "np":
        import numpy as np

        write_whole(out, partial(np.save, arr=result))
    else:
        from safetensors.torch import save_file

        name = "latents" if output_type == "latent" else "images"
        tensors = {name: result.cpu().contiguous()}
        write_whole(out, partial(save_file, tensors))
    return [out]
