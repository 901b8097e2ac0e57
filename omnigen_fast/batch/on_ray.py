"""A batch on Ray: the lines are read and written here, and carried out by actors of the cluster.

A dataset of Ray Data leads from one to the other. A task on this machine reads lines and the files
they name, in portions of like ones; actors keep the model, carry out a portion and return what is
to be in the files; this process writes it. So only this process writes to the folder, as without
Ray, and the machines of the cluster need no common disk.

Ray repeats what was lost with a worker. What arrives twice is dropped here, and what does not
arrive is asked for again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, OmniGenError, RequestError, first_line, printable
from ..image_decoder import MAX_FILE_BYTES
from ..page.record import Record
from ..regular_files import read_regular
from ..whole_files import write_whole
from .lines import Job, Source
from .results import Earlier, Entry, Results
from .run import Failed, carry_out, groups, pending

if TYPE_CHECKING:
    from ..pipeline import OmniGenPipeline

LOCAL = "local"  # instead of an address: a cluster of this machine, for this batch alone
_PORTION_BYTES = 256 << 20  # of files that go to an actor at a time
_INSTALL = "--ray needs Ray; install it with: pip install 'omnigen_fast[ray]'"
_ROUNDS = 3  # in a row that bring nothing new, after which the batch ends with an error

SaveIn = Callable[[Path, Job, Any, Record], Sequence[Path]]  # as `run.Save`, in a folder


@dataclass(frozen=True)
class Cluster:
    """Where a batch runs.

    Args:
        address: of a Ray cluster that this machine belongs to, as `ray.init` takes it, or `LOCAL`.
        actors: how many models to keep; by default one for each GPU of the cluster, or for each
            machine if there is none.
        device: that the models are loaded on: "cuda", "cpu", or None for a GPU if there is one.

    Raises:
        OmniGenError: Ray is not installed.
        RequestError: no batch can run there.
    """

    address: str
    actors: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise OmniGenError(_INSTALL)
        if self.address.startswith("ray://"):
            raise RequestError(
                f"--ray {printable(self.address, 80)} is a Ray client's address; run the command "
                "on a machine of the cluster, with --ray auto"
            )
        if self.device not in (None, "cpu", "cuda"):
            raise RequestError(
                f"with --ray, --device must be cuda or cpu, got {printable(self.device, 60)}; Ray "
                "gives each actor its own GPU"
            )


@dataclass(frozen=True)
class _Portion:
    """Lines that an actor takes at a time, and what was found before them."""

    number: int  # from 0
    jobs: tuple[Job, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)  # that the lines name, by path
    passed: tuple[tuple[int, str, Entry | None], ...] = ()  # as `pending` tells
    is_last: bool = False


@dataclass(frozen=True)
class _Answer:
    """What became of a line, with the content of its files by name."""

    entry: Entry
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class _End:
    """All answers of a portion are there."""

    portion: _Portion  # without its files
    lines: tuple[int, ...]


@dataclass(frozen=True)
class _Reader:
    """Reads the lines of a batch, in a task on the machine that has its files."""

    path: Path
    source: Source
    earlier: Earlier
    retry_failed: bool
    answered: frozenset[int]  # numbers of lines that this batch is finished with

    def __call__(self, _batch: Any) -> Iterator[dict[str, np.ndarray]]:
        """The portions, one in each block."""
        for portion in self._portions():
            yield _column("portion", portion)

    def _portions(self) -> Iterator[_Portion]:
        passed: list[tuple[int, str, Entry | None]] = []
        number = 0
        with open(self.path, "rb") as file:
            found = self.source.lines(file)
            lines = (line for line in found if line.number not in self.answered)
            jobs = pending(lines, self.earlier, self.retry_failed, lambda *one: passed.append(one))
            for group in groups(jobs):
                for part in _bounded(group):
                    files: dict[str, bytes] = {}
                    ready: list[Job] = []
                    for job in part:
                        try:
                            files |= _contents(job)
                            ready.append(job)
                        except CheckpointError as error:
                            passed.append((job.number, "failed", Failed(job, str(error)).entry))
                    yield _Portion(number, tuple(ready), files, tuple(passed))
                    passed.clear()
                    number += 1
        yield _Portion(number, passed=tuple(passed), is_last=True)


class _Actor:
    """Carries out portions, with a model that it keeps."""

    def __init__(self, load: Callable[[], OmniGenPipeline], save: SaveIn) -> None:
        self._load, self._save = load, save
        self._pipe: OmniGenPipeline | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Answers to a portion, one in each block; an error that ends the batch is one too."""
        for portion in batch["portion"]:
            try:
                for answer in self._answers(portion):
                    yield _column("answer", answer)
            except (OmniGenError, OSError) as error:
                yield _column("answer", error)

    def _answers(self, portion: _Portion) -> Iterator[_Answer | _End]:
        if portion.jobs:
            if self._pipe is None:
                self._pipe = self._load()
            with tempfile.TemporaryDirectory(prefix="omnigen-") as folder:
                yield from self._made(self._pipe, portion, Path(folder))
        lines = tuple(job.number for job in portion.jobs)
        yield _End(replace(portion, jobs=(), files={}), lines)

    def _made(self, pipe: OmniGenPipeline, portion: _Portion, folder: Path) -> Iterator[_Answer]:
        out = folder / "out"
        out.mkdir()
        copies = {
            path: str(folder / str(i))
            for i, path in enumerate(path for job in portion.jobs for path, _ in job.files())
        }
        for path, content in portion.files.items():
            Path(copies[path]).write_bytes(content)
        for outcome in carry_out(pipe, [job.with_files(copies) for job in portion.jobs]):
            entry = outcome.saved(partial(self._save, out))
            contents = {}
            for name in entry.names():
                contents[name] = (out / name).read_bytes()
                (out / name).unlink()
            yield _Answer(_with_own_paths(entry, copies), contents)


def run(
    load: Callable[[], OmniGenPipeline],
    source: Source,
    path: Path,
    results: Results,
    save: SaveIn,
    cluster: Cluster,
    retry_failed: bool = False,
    advanced: Callable[[str], object] = lambda _: None,
) -> Counter[str]:
    """Carries out a batch on Ray; what an earlier run has done stays as it is.

    Args:
        load: makes the pipeline, in an actor: a function of a module, or a `partial` of one.
        source: how lines are read.
        path: of the batch file; it and the folders of `source` are those of this machine.
        results: that say what is done, and get an entry for each line that runs.
        save: writes pictures in a folder of an actor; likewise a function of a module.
        cluster: where the lines run.
        retry_failed: whether to try lines again that failed as they stand.
        advanced: called with each line's status: "done", "kept" or "failed".

    Returns:
        How many lines have each status.

    Raises:
        OmniGenError: Ray can't be reached, or a pipeline can't be loaded.
        OSError: pictures or results can't be written, or weights can't be read.
    """
    # the task that reads may have another working directory
    source = replace(source, folder=source.folder.absolute(), out=source.out.absolute())
    path = path.absolute()
    with _connected(cluster.address):
        batch = _Batch(load, source, path, results, save, cluster, retry_failed, advanced)
        without = 0  # rounds
        while not batch.is_finished and without < _ROUNDS:
            before = len(batch.answered)
            lost = batch.round()
            without = 0 if len(batch.answered) > before else without + 1
        if not batch.is_finished:
            raise OmniGenError(f"Ray has lost workers again and again: {lost}; see its logs")
    return batch.counts


@dataclass
class _Batch:
    """What this process knows of a batch that runs."""

    load: Callable[[], OmniGenPipeline]
    source: Source
    path: Path
    results: Results
    save: SaveIn
    cluster: Cluster
    retry_failed: bool
    advanced: Callable[[str], object]
    answered: set[int] = field(default_factory=set)  # numbers of lines
    counts: Counter[str] = field(default_factory=Counter)
    is_finished: bool = False

    def round(self) -> str:
        """Carries out what has no answer yet; returns what went wrong.

        Raises:
            OmniGenError: no line can be carried out.
            OSError: likewise, or files can't be written.
        """
        from ray.exceptions import RayError

        ends: list[_End] = []
        wrong = "lines have no answer"
        try:
            for batch in self._dataset().iter_batches(batch_size=1, prefetch_batches=0):
                (found,) = batch["answer"]
                if isinstance(found, Exception):
                    raise found
                if isinstance(found, _End):
                    ends.append(found)
                    for number, status, entry in found.portion.passed:
                        self._take(number, status, entry)
                else:
                    self._write(found)
        except RayError as error:
            wrong = first_line(error)
        self.is_finished = self._is_whole(ends)
        return wrong

    def _is_whole(self, ends: Sequence[_End]) -> bool:
        """Whether every line of every portion has its answer."""
        seen = {end.portion.number for end in ends}
        last = [end.portion.number for end in ends if end.portion.is_last]
        lines = {number for end in ends for number in end.lines}
        return bool(last) and seen >= set(range(max(last))) and lines <= self.answered

    def _write(self, answer: _Answer) -> None:
        """Writes the files of a line, then its entry, unless it came before."""
        if answer.entry.line in self.answered:
            return
        for name, content in answer.files.items():
            write_whole(self.results.folder / name, partial(_put, content))
        self._take(answer.entry.line, answer.entry.status, answer.entry)

    def _take(self, number: int, status: str, entry: Entry | None) -> None:
        if number in self.answered:
            return
        if entry is not None:
            self.results.append(entry)
        self.answered.add(number)
        self.counts[status] += 1
        self.advanced(status)

    def _dataset(self) -> Any:
        import ray

        earlier, answered = self.results.earlier(), frozenset(self.answered)
        reader = _Reader(self.path, self.source, earlier, self.retry_failed, answered)
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actors, resources = _shares(self.cluster, ray.nodes())
        portions = ray.data.from_items([0]).map_batches(
            reader, batch_size=None, num_cpus=0, label_selector=here
        )
        return portions.map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(self.load, self.save),
            **resources,
        )


def _shares(cluster: Cluster, nodes: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """How many actors to start, and what each gets of the cluster."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(one.get("CPU", 0)) for one in alive if one.get("CPU", 0) >= 1]
    gpus = int(sum(one.get("GPU", 0) for one in alive))
    if cluster.device == "cuda" and not gpus:
        raise RequestError("--device cuda: the Ray cluster has no GPU; leave it out, or give cpu")
    if gpus and cluster.device != "cpu":
        return min(cluster.actors or gpus, gpus), {"num_gpus": 1, "num_cpus": 1}
    if not cpus:
        raise OmniGenError("the Ray cluster has no CPU to run on; start it with --num-cpus")
    actors = min(cluster.actors or len(cpus), sum(cpus))
    return actors, {"num_cpus": max(1, min(*cpus, sum(cpus) // actors))}


def _bounded(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """A group in parts whose files have at most `_PORTION_BYTES`, or one line."""
    part: list[Job] = []
    total = 0
    for job in jobs:
        size = sum(os.path.getsize(path) for path, _ in job.files() if os.path.isfile(path))
        if part and total + size > _PORTION_BYTES:
            yield part
            part, total = [], 0
        part.append(job)
        total += size
    yield part


def _contents(job: Job) -> dict[str, bytes]:
    """What is in the files that a line names, by path, without those that do not exist.

    Raises CheckpointError for one that can't be read.
    """
    # an actor that opens the copy of what does not exist says so
    paths = [path for path, _ in job.files() if os.path.exists(path)]
    return {path: read_regular(path, "a file of its line", MAX_FILE_BYTES) for path in paths}


def _with_own_paths(entry: Entry, copies: Mapping[str, str]) -> Entry:
    """An entry whose error names files as the line does, not the copies of an actor."""
    error = entry.error
    if error is None:
        return entry
    for path, copy in copies.items():
        error = error.replace(copy, printable(path, 100))
    return replace(entry, error=printable(error))


def _put(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)


def _column(name: str, value: Any) -> dict[str, np.ndarray]:
    """A block of one row."""
    values = np.empty(1, dtype=object)
    values[0] = value
    return {name: values}


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Starts a cluster of this machine, or joins one, and leaves it in the end."""
    # On a machine of one's own, without a word to others: loopback alone, with a key that no other
    # user knows. Ray reads the first of these when it is imported.
    quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # of what is written past Python
    private = {
        **quiet,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
    }
    is_local = address == LOCAL
    with (
        _environment(private if is_local else quiet),
        tempfile.TemporaryDirectory(
            prefix="omnigen-ray-", dir=_short_folder(), ignore_cleanup_errors=True
        ) as folder,
    ):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise OmniGenError(_INSTALL) from error
        own: dict[str, Any] = {"include_dashboard": False, "_temp_dir": folder} if is_local else {}
        with _signals_kept(), _silent():
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise OmniGenError(
                    f"Ray at {printable(address, 80)} can't be reached: {first_line(error)}"
                ) from error
        with redirect_stdout(sys.stderr):  # where Ray reports the ends of workers
            try:
                _quiet()
                yield
            finally:
                ray.shutdown()


@cache
def _token() -> str:
    """Ray reads it once in a process."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def _short_folder() -> str | None:
    """Where the paths of Ray's sockets are short enough."""
    return "/tmp" if os.path.isdir("/tmp") else None


def _quiet() -> None:
    """Settings of Ray Data: one line in a block, and no messages but errors."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # byte: an answer is passed on when it is there
    context.target_min_block_size = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Handlers stay as they are: Ray's own would end the process without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silent() -> Iterator[None]:
    """Drops what is written to standard error past Python: Ray says there how loud it will be."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
