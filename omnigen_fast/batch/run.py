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
from .results import Earlier, Entry, Results

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
class Made:
    """What a call returned for a line."""

    job: Job
    result: Any
    record: Record  # with the seed that was given or drawn
    seconds: float  # of the call, divided by its lines

    def saved(self, save: Save) -> Entry:
        """Writes the pictures; returns the line's entry. Raises OSError if that fails."""
        job, seed = self.job, self.record.arguments["seed"]
        files = save(job, self.result, self.record)
        entry = Entry(job.number, job.id, "done", job.digest, files[0].name, len(files))
        return replace(entry, seed=seed, seconds=round(self.seconds, 3))


@dataclass(frozen=True)
class Failed:
    """A line for which no call returned anything."""

    job: Job
    error: str

    @property
    def entry(self) -> Entry:
        job = self.job
        return Entry(job.number, job.id, "failed", job.digest, error=self.error)

    def saved(self, save: Save) -> Entry:
        """The line's entry; there is nothing to write."""
        return self.entry


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
    earlier: Earlier,
    retry_failed: bool,
    passed: Callable[[int, str, Entry | None], None],
) -> Iterator[Job]:
    """The lines that are to be carried out.

    Args:
        lines: of the batch.
        earlier: results of earlier runs.
        retry_failed: whether to try lines again that failed as they stand.
        passed: called for each line that needs no work with its number, "kept" or "failed", and the
            entry that a bad line has yet to get.
    """
    for line in lines:
        entry = earlier.latest(line.number if line.id is None else line.id)
        if entry is not None and entry.digest != line.digest:
            entry = None  # the line asked for something else then
        if isinstance(line, BadLine):
            known = entry is not None and (entry.status, entry.error) == ("failed", line.error)
            bad = Entry(line.number, line.id, "failed", line.digest, error=line.error)
            passed(line.number, "failed", None if known else bad)
        elif entry is not None and entry.status == "failed" and not retry_failed:
            passed(line.number, "failed", None)
        elif entry is not None and entry.status == "done" and earlier.is_done(entry):
            passed(line.number, "kept", None)
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

    def passed(_number: int, status: str, entry: Entry | None) -> None:
        if entry is not None:
            results.append(entry)
        count(status)

    for jobs in groups(pending(lines, results, retry_failed, passed)):
        for outcome in carry_out(load(), jobs):
            entry = outcome.saved(save)
            results.append(entry)
            count(entry.status)
    return counts


def groups(jobs: Iterator[Job]) -> Iterator[list[Job]]:
    """Lines that could run together; reads `WINDOW` ahead in search of them."""
    window: deque[Job] = deque()
    while True:
        while len(window) < WINDOW and (job := next(jobs, None)) is not None:
            window.append(job)
        if not window:
            return
        yield _like_first(window)


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


def carry_out(pipe: OmniGenPipeline, jobs: Sequence[Job]) -> Iterator[Made | Failed]:
    """Carries out lines of a group, in calls of as many as it pays to join.

    Raises OSError if the weights can't be read.
    """
    ready = []
    for job in jobs:
        one = _ready(pipe, job)
        if isinstance(one, Failed):
            yield one
        else:
            ready.append(one)
    for size in dict.fromkeys(one.size for one in ready):
        like = [one for one in ready if one.size == size]
        count = _together(pipe, like)
        for first in range(0, len(like), count):
            yield from _make(pipe, like[first : first + count])


def _ready(pipe: OmniGenPipeline, job: Job) -> _Ready | Failed:
    try:
        latents = None if job.latents is None else read_single_tensor(job.latents)
        call = _arguments([job], job.shared(), latents)
        decision = pipe.plan(**call, seed=job.record.arguments["seed"])
    except Exception as error:  # one line must not stop the others
        return _failed(job, error)
    workload = decision.estimate.workload
    return _Ready(job, (workload.height, workload.width), decision.cost.seconds)


def _together(pipe: OmniGenPipeline, like: Sequence[_Ready]) -> int:
    """How many of some lines to run in one call."""
    count = len(like)
    while count > 1:
        part = like[:count]
        try:
            call = _arguments([one.job for one in part], part[0].shared())
            seconds = pipe.plan(**call).cost.seconds
        except OmniGenError:  # does not fit
            seconds = math.inf
        if seconds < _GAIN * sum(one.seconds for one in part):
            break
        count //= 2
    return count


def _make(pipe: OmniGenPipeline, together: Sequence[_Ready]) -> Iterator[Made | Failed]:
    """Runs lines in one call, or one by one if that fails."""
    start = time.perf_counter()
    seeds = [_seed(one.job) for one in together]
    result = None
    try:
        result = _call(pipe, together, seeds)
    except OSError:  # weights that can't be read: no other line could do better
        raise
    except Exception as error:  # one line must not stop the others
        failed = _failed(together[0].job, error)
    if result is None:  # not in the handler: the traceback holds the call's tensors
        if len(together) == 1:
            yield failed
            return
        for one in together:
            yield from _make(pipe, [one])
        return
    seconds = (time.perf_counter() - start) / len(together)
    first = 0
    for one, seed in zip(together, seeds):
        job = one.job
        record = replace(job.record, arguments={**job.record.arguments, "seed": seed})
        yield Made(job, result[first : first + job.pictures], record, seconds)
        first += job.pictures


def _call(pipe: OmniGenPipeline, together: Sequence[_Ready], seeds: Sequence[int]) -> Any:
    """What a call for some lines returns, line by line."""
    jobs = [one.job for one in together]
    noise = [_noise(pipe, one, seed) for one, seed in zip(together, seeds)]
    for job in jobs:
        for path, file in job.files():
            check_unchanged(file, path)
    arguments = _arguments(jobs, together[0].shared(), torch.cat(noise))
    return pipe(**arguments, progress=False)


def _noise(pipe: OmniGenPipeline, one: _Ready, seed: int) -> Tensor:
    """Initial latents of a line, the same as if it ran alone."""
    if one.job.latents is not None:
        return read_single_tensor(one.job.latents).to(pipe.device)
    return seeded_noise(seed, latent_shape(one.job.pictures, *one.size), pipe.device)


def _failed(job: Job, error: Exception) -> Failed:
    text = first_line(error)
    if not isinstance(error, OmniGenError):
        text = printable(f"{type(error).__name__}: {text}")
    return Failed(job, text)


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
