"""Hands inputs to workers, watches them, and sums up what they found."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .kinds import LIGHT
from .oracle import waiting
from .worker import PROGRESS

HANGS = 20.0  # seconds after which an input hangs; two runs of more than 5 s come first
_STARTS = 300.0  # seconds that a worker may take to start
_IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # removing folders takes time
_BLOCK = 500  # inputs that are handed out at once


@dataclass
class Found:
    """What the inputs of one kind did."""

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0  # of all together, one worker after the other
    slowest: tuple[float, int] = (0.0, -1)  # seconds, and the input's number
    largest: tuple[int, int] = (0, -1)  # bytes above what the process held, and the number
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, block: Mapping[str, Any]) -> None:
        self.inputs += block["stop"] - block["first"]
        self.taken += block["taken"]
        self.refused += block["refused"]
        self.seconds += block["seconds"]
        self.slowest = max(self.slowest, tuple(block["slowest"]))
        self.largest = max(self.largest, tuple(block["largest"]))
        self.faults += block["faults"]


class _Died(Exception):
    """A worker that is no more, and at which input."""

    def __init__(self, number: int, how: str) -> None:
        self.number, self.how = number, how


class _Worker:
    """A process that runs inputs, of light kinds or of the others."""

    def __init__(self, light: bool, seed: int, folder: Path) -> None:
        self.light = light
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._progress = self._folder / "progress"
        self._progress.write_bytes(PROGRESS.pack(-1))
        place = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", str(seed), self._folder, self._progress],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self._folder / "log", "wb"),  # noqa: SIM115 - the process keeps it
            start_new_session=True,  # killed with what it has started
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )
        self._answers = selectors.DefaultSelector()
        self._answers.register(self._process.stdout, selectors.EVENT_READ)

    def run(self, kind: str, first: int, stop: int) -> dict[str, Any]:
        self._process.stdin.write(f"{kind} {first} {stop}\n".encode())
        self._process.stdin.flush()
        return json.loads(self._answer())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._answers.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _clock(self) -> float:
        """Seconds, without those in which the worker waited for a processor."""
        return time.monotonic() - waiting(self._process.pid)

    def _answer(self) -> str:
        """The next line; raises _Died if none comes."""
        last, since = -1, self._clock()
        while not self._answers.select(0.25):
            (number,) = PROGRESS.unpack(self._progress.read_bytes())
            if number != last:
                last, since = number, self._clock()
            elif self._clock() - since > (HANGS if number >= 0 else _STARTS):
                self.close()
                if number < 0:
                    raise RuntimeError("a worker does not answer")
                raise _Died(number, f"hangs: no end after {HANGS:g} s")
        if line := self._process.stdout.readline().decode():
            return line
        status = self._process.wait()
        (number,) = PROGRESS.unpack(self._progress.read_bytes())
        log = (self._folder / "log").read_text(errors="replace")
        self.close()
        if number < 0:
            raise RuntimeError(f"a worker failed:\n{log[-4000:]}")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        last = ascii(log.strip().rpartition("\n")[2])[1:-1][:150]
        raise _Died(number, f"ended the process: {how} {last}")


def fuzz(
    numbers: Mapping[str, tuple[int, int]],
    seed: int,
    jobs: int,
    done: Callable[[str, Found], None] = lambda kind, found: None,
) -> dict[str, Found]:
    """Runs inputs of each kind in `jobs` processes.

    Args:
        numbers: first and stop of the inputs' numbers, by kind.
        seed: of the inputs.
        jobs: workers at a time.
        done: called now and then with a kind and what was found so far.
    """
    found = {kind: Found() for kind in numbers}
    tasks: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    for kind, (first, stop) in numbers.items():
        size = max(1, min(_BLOCK, -(-(stop - first) // jobs)))
        for start in range(first, stop, size):
            tasks.put((kind, start, min(start + size, stop)))
    lock, errors = threading.Lock(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_IN_MEMORY) as folder:

        def work() -> None:
            worker: _Worker | None = None
            try:
                while not errors:
                    kind, first, stop = tasks.get_nowait()
                    if worker is not None and worker.light != (kind in LIGHT):
                        worker.close()
                        worker = None
                    worker, blocks = _run(worker, kind, seed, first, stop, Path(folder))
                    with lock:
                        for block in blocks:
                            found[kind].add(block)
                        done(kind, found[kind])
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                if worker is not None:
                    worker.close()

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as stopped:
            errors.append(stopped)
            for thread in threads:
                thread.join()
    if errors:
        raise errors[0]
    for one in found.values():
        one.faults.sort(key=lambda fault: fault["number"])
    return found


def _run(
    worker: _Worker | None, kind: str, seed: int, first: int, stop: int, folder: Path
) -> tuple[_Worker | None, list[dict[str, Any]]]:
    """Runs inputs, those around one that ends its worker too."""
    blocks: list[dict[str, Any]] = []
    todo = [(first, stop)]
    while todo:
        start, end = todo.pop()
        if start == end:
            continue
        worker = worker or _Worker(kind in LIGHT, seed, folder)
        try:
            blocks.append(worker.run(kind, start, end))
        except _Died as death:
            worker = None
            fault = {"number": death.number, "what": death.how, "where": ""}
            blocks.append(
                {
                    "first": death.number,
                    "stop": death.number + 1,
                    "taken": 0,
                    "refused": 0,
                    "seconds": 0.0,
                    "slowest": (0.0, -1),
                    "largest": (0, -1),
                    "faults": [fault],
                }
            )
            todo += [(death.number + 1, end), (start, death.number)]
    return worker, blocks
