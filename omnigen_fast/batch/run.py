"""Carries out the lines of a batch that are not done yet; like ones together if that is faster."""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..call import seeded_noise
from ..errors import OmniGenError, first_line, printable
from ..page.record import Record, check_unchanged
from ..request import DEFAULT_NEGATIVE_PROMPT, latent_shape
from ..weights.files import read_single_tensor
from .lines import BadLine, Job
from .results import Entry, Results

if TYPE_CHECKING:
    from ..pipeline import OmniGenPipeline

WINDOW = 256  # lines that are read ahead in search of like ones
MAX_TOGETHER = 8  # lines of a call; an interrupt loses their work
_GAIN = 0.99  # predicted seconds of lines together, against one by one, for which it pays


class Save(Protocol):
    """Writes a line's pictures, whole or not at all; raises OSError if that fails."""

    def __call__(self, job: Job, result: Any, record: Record) -> Sequence[Path]:
        """Returns the files; `result` is what a call returns, `record` has the seed."""


@dataclass(frozen=True)
class _Ready:
    """A line that a call takes, and what is predicted for it alone."""

    job: Job
    size: tuple[int, int]  # (height, width) of its pictures
    seconds: float

    def shared(self) -> dict[str, Any]:
        """As those of the line, with the size of the pictures."""
        height, width = self.size
        size = {"height": height, "width": width, "use_input_image_size_as_output": False}
        return {**self.job.shared(), **size}


def pending(
    lines: Iterable[Job | BadLine],
    results: Results,
    retry_failed: bool,
    passed: Callable[[str], None],
) -> Iterator[Job]:
    """The lines that are to be carried out; bad ones get their entry.

    Args:
        lines: of the batch.
        results: of earlier runs.
        retry_failed: whether to try lines again that failed as they stand.
        passed: called with "kept" or "failed" for each line that needs no work.
    """
    for line in lines:
        entry = results.latest(line.number if line.id is None else line.id)
        if entry is not None and entry.digest != line.digest:
            entry = None  # the line asked for something else then
        if isinstance(line, BadLine):
            if entry is None or entry.status != "failed" or entry.error != line.error:
                results.append(Entry(line.number, line.id, "failed", line.digest, error=line.error))
            passed("failed")
        elif entry is not None and entry.status == "failed" and not retry_failed:
            passed("failed")
        elif entry is not None and entry.status == "done" and results.is_done(entry):
            passed("kept")
        else:
            yield line


def run(
    load: Callable[[], OmniGenPipeline],
    lines: Iterable[Job | BadLine],
    results: Results,
    save: Save,
    *,
    retry_failed: bool = False,
    advanced: Callable[[str], object] = lambda _: None,
) -> Counter[str]:
    """Carries out a batch; what an earlier run has done stays as it is.

    Args:
        load: makes the pipeline, or returns it; called only if there is something to do.
        lines: of the batch.
        results: that say what is done, and get an entry for each line that runs.
        save: writes pictures.
        retry_failed: whether to try lines again that failed as they stand.
        advanced: called with each line's status: "done", "kept" or "failed".

    Returns:
        How many lines have each status.

    Raises:
        OmniGenError: the pipeline can't be loaded.
        OSError: pictures or results can't be written.
    """
    counts: Counter[str] = Counter()

    def count(status: str) -> None:
        counts[status] += 1
        advanced(status)

    todo = pending(lines, results, retry_failed, count)
    window: deque[Job] = deque()
    while True:
        while len(window) < WINDOW and (job := next(todo, None)) is not None:
            window.append(job)
        if not window:
            return counts
        _Runner(load(), results, save, count).carry_out(_like_first(window))


def _like_first(window: deque[Job]) -> list[Job]:
    """Takes out of the window the first line and those that could run with it."""
    shared = window[0].shared()
    found: list[Job] = []
    others: list[Job] = []
    for job in window:
        is_like = len(found) < MAX_TOGETHER and job.shared() == shared
        (found if is_like else others).append(job)
    window.clear()
    window.extend(others)
    return found


@dataclass(frozen=True)
class _Runner:
    pipe: OmniGenPipeline
    results: Results
    save: Save
    count: Callable[[str], None]

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """Carries out lines with the same settings, in calls of as many as it pays to join."""
        ready = [one for job in jobs if (one := self._ready(job)) is not None]
        for size in dict.fromkeys(one.size for one in ready):
            like = [one for one in ready if one.size == size]
            count = self._together(like)
            for first in range(0, len(like), count):
                self._make(like[first : first + count])

    def _ready(self, job: Job) -> _Ready | None:
        """None for a line that no call takes; it then has its entry."""
        try:
            latents = None if job.latents is None else read_single_tensor(job.latents)
            call = _arguments([job], job.shared(), latents)
            decision = self.pipe.plan(**call, seed=job.record.arguments["seed"])
        except Exception as error:  # one line must not stop the others
            self._failed(job, error)
            return None
        workload = decision.estimate.workload
        return _Ready(job, (workload.height, workload.width), decision.cost.seconds)

    def _together(self, like: Sequence[_Ready]) -> int:
        """How many of some lines to run in one call."""
        count = len(like)
        while count > 1:
            part = like[:count]
            try:
                call = _arguments([one.job for one in part], part[0].shared())
                seconds = self.pipe.plan(**call).cost.seconds
            except OmniGenError:  # does not fit
                seconds = math.inf
            if seconds < _GAIN * sum(one.seconds for one in part):
                break
            count //= 2
        return count

    def _make(self, together: Sequence[_Ready]) -> None:
        """Runs lines in one call, or one by one if that fails."""
        start = time.perf_counter()
        seeds = [_seed(one.job) for one in together]
        result = None
        try:
            result = self._call(together, seeds)
        except OSError:  # weights that can't be read: no other line could do better
            raise
        except Exception as error:  # one line must not stop the others
            if len(together) == 1:
                self._failed(together[0].job, error)
                return
        if result is None:  # not in the handler: the traceback holds the call's tensors
            for one in together:
                self._make([one])
            return
        seconds = (time.perf_counter() - start) / len(together)
        first = 0
        for one, seed in zip(together, seeds):
            self._done(one.job, result[first : first + one.job.pictures], seed, seconds)
            first += one.job.pictures

    def _call(self, together: Sequence[_Ready], seeds: Sequence[int]) -> Any:
        """What a call for some lines returns, line by line."""
        jobs = [one.job for one in together]
        noise = [self._noise(one, seed) for one, seed in zip(together, seeds)]
        for job in jobs:
            for path, file in job.files():
                check_unchanged(file, path)
        arguments = _arguments(jobs, together[0].shared(), torch.cat(noise))
        return self.pipe(**arguments, progress=False)

    def _noise(self, one: _Ready, seed: int) -> Tensor:
        """Initial latents of a line, the same as if it ran alone."""
        device = self.pipe.device
        if one.job.latents is not None:
            return read_single_tensor(one.job.latents).to(device)
        return seeded_noise(seed, latent_shape(one.job.pictures, *one.size), device)

    def _done(self, job: Job, result: Any, seed: int, seconds: float) -> None:
        record = replace(job.record, arguments={**job.record.arguments, "seed": seed})
        files = self.save(job, result, record)
        entry = Entry(job.number, job.id, "done", job.digest, files[0].name, len(files))
        self.results.append(replace(entry, seed=seed, seconds=round(seconds, 3)))
        self.count("done")

    def _failed(self, job: Job, error: Exception) -> None:
        text = first_line(error)
        if not isinstance(error, OmniGenError):
            text = printable(f"{type(error).__name__}: {text}")
        self.results.append(Entry(job.number, job.id, "failed", job.digest, error=text))
        self.count("failed")


def _arguments(
    jobs: Sequence[Job], shared: Mapping[str, Any], latents: Any = None
) -> dict[str, Any]:
    """Arguments of a call that carries out some lines."""
    negatives = [job.record.negative_prompts for job in jobs]
    return {
        "prompt": [prompt for job in jobs for prompt in job.record.prompts],
        "input_images": [list(job.images) for job in jobs],
        "negative_prompt": [one[0] if one else DEFAULT_NEGATIVE_PROMPT for one in negatives],
        "latents": latents,
        **shared,
    }


def _seed(job: Job) -> int:
    """The seed of a line; one is drawn if it has none, and recorded."""
    given = job.record.arguments["seed"]
    return secrets.randbelow(1 << 32) if given is None else given
