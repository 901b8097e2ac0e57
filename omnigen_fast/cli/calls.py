"""The calls of one `generate`: a seed and a prompt each, and what becomes of their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click

from ..errors import OmniGenError, RequestError
from ..page.record import Record
from .files import picture_paths, save_pictures, save_result

_MAX_BYTES = 16 << 20  # of a file of prompts


@dataclass(frozen=True)
class OneCall:
    """A call of a command that makes several."""

    prompts: tuple[str, ...]  # of one call; several are a batch
    seed: int | None
    where: str = ""  # the line of the file that the prompt is from

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Adds the line to errors of the request."""
        try:
            yield
        except RequestError as error:
            raise RequestError(f"{self.where}{error}") if self.where else error from error


def calls_of(prompts: Sequence[str], file: Path | None, seeds: Sequence[int]) -> list[OneCall]:
    """Every call, in the order of its pictures: prompt by prompt, for each seed by seed.

    Args:
        prompts: of the command line, which are one batch.
        file: or a file of prompts, which run one after the other.
        seeds: as given; without any, each call draws its own.

    Raises RequestError if the file can't be used.
    """
    chosen: list[int | None] = [*seeds] or [None]
    if file is None:
        return [OneCall(tuple(prompts), seed) for seed in chosen]
    lines = _lines(file)
    return [
        OneCall((text,), seed, f"{file}, line {number}: ")
        for number, text in lines
        for seed in chosen
    ]


def _lines(file: Path) -> list[tuple[int, str]]:
    """Number and text of each line of a file that is not empty; "-" is standard input."""
    try:
        with click.open_file(str(file), "rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"--prompt-file {file} can't be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise RequestError(
            f"--prompt-file {file} has more than {_MAX_BYTES >> 20} MiB; use omnigen-fast batch"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompt-file {file} is not UTF-8: {error}") from error
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise RequestError(f"--prompt-file {file} is empty; write one prompt a line")
    if lines[0][1].startswith("{"):
        raise RequestError(
            f"--prompt-file {file} has JSON in it, one prompt a line is read; for lines with "
            f"settings of their own: omnigen-fast batch {file} FOLDER"
        )
    return lines


class Saver:
    """Writes pictures as soon as their call is over, and arrays of all calls as one file.

    Args:
        out: the file to write; several pictures are numbered.
        output_type: as of a call.
        pictures: how many there will be.
    """

    def __init__(self, out: Path, output_type: str, pictures: int) -> None:
        self._out, self._type = out, output_type
        self._left = picture_paths(out, pictures)
        self._arrays: list[Any] = []
        self.paths: list[Path] = []

    def add(self, result: Any, record: Record | None) -> None:
        """Takes what a call returned."""
        if self._type != "pil":
            self._arrays.append(result)
            return
        paths = list(islice(self._left, len(result)))
        save_pictures(result, paths, record)
        self._wrote(paths)

    def finish(self) -> None:
        """Writes what is left."""
        if self._arrays:
            self._wrote(save_result(_joined(self._arrays), self._type, self._out, None))

    def _wrote(self, paths: Sequence[Path]) -> None:
        self.paths += paths
        for path in paths:
            click.echo(path)


def show_picture(path: Path) -> None:
    """Opens a picture with the system's viewer.

    Raises OmniGenError if there is none.
    """
    if click.launch(str(path)) != 0:
        raise OmniGenError(f"{path} is written, but no program could open it; leave out --open")


def _joined(results: Sequence[Any]) -> Any:
    """Arrays or tensors of several calls as one."""
    if len(results) == 1:
        return results[0]
    if hasattr(results[0], "cpu"):
        import torch

        return torch.cat(list(results))
    import numpy as np

    return np.concatenate(results)
