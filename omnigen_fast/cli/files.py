"""Files that commands write, and failures in one line."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import RequestError
from ..page import record as metadata

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
_SUFFIXES = {"pil": _IMAGE_SUFFIXES, "np": (".npy",), "pt": (".safetensors",)}
_SUFFIXES["latent"] = _SUFFIXES["pt"]


class _Failure(click.ClickException):
    """One line on standard error; 2 where the request is at fault, else 1."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.exit_code = 2 if isinstance(error, RequestError) else 1


def _check_writable(out: Path) -> None:
    """Fails before the work is done, not after."""
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder; give a file name in it")
    if not out.parent.is_dir():
        raise RequestError(f"--out: the folder {out.parent} does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise RequestError(f"--out: the folder {out.parent} can't be written to")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"--out: the folder {folder} can't be made: {reason}") from error


def _save(result: Any, output_type: str, out: Path, record: metadata.Record | None) -> list[Path]:
    """Writes the result; each file appears whole or not at all."""
    if output_type == "pil":
        names = [out]
        if len(result) > 1:
            names = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(len(result))]
        for i, (name, image) in enumerate(zip(names, result)):
            options = {"pnginfo": metadata.png_info(replace(record, index=i))} if record else {}
            _write(name, partial(image.save, **options))
        return names
    if output_type == "np":
        import numpy as np

        _write(out, lambda path: np.save(path, result))
    else:
        from safetensors.torch import save_file

        name = "latents" if output_type == "latent" else "images"
        _write(out, lambda path: save_file({name: result.cpu().contiguous()}, path))
    return [out]


def _write(name: Path, write: Any) -> None:
    from safetensors import SafetensorError

    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(suffix=name.suffix, dir=name.parent)
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{name} can't be written: {reason}") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
