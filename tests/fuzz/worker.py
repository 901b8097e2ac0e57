"""A process that runs inputs: python -m fuzz.worker SEED FOLDER PROGRESS.

Reads lines `KIND FIRST STOP` and answers each with a line of JSON. If it dies or hangs, the file
PROGRESS says at which input.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .kinds import Kind, generator, load
from .oracle import Events, Verdict, judged

PROGRESS = struct.Struct("<q")  # number of the input; -1 between inputs


@dataclass
class Block:
    """What some inputs did."""

    first: int
    stop: int
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0  # of all together, making them included
    slowest: tuple[float, int] = (0.0, -1)  # seconds and number
    largest: tuple[int, int] = (0, -1)  # bytes and number
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, verdict: Verdict) -> None:
        if verdict.fault:
            self.blame(number, verdict.fault, verdict.where)
        elif verdict.taken:
            self.taken += 1
        else:
            self.refused += 1
        self.slowest = max(self.slowest, (verdict.seconds, number))
        self.largest = max(self.largest, (verdict.bytes, number))

    def blame(self, number: int, what: str, where: str = "") -> None:
        self.faults.append({"number": number, "what": what, "where": where})


class Runner:
    """Runs inputs of a kind, and requests between them."""

    def __init__(
        self, name: str, seed: int, folder: Path, events: Events, progress: Any = None
    ) -> None:
        self._name, self._seed, self._progress = name, seed, progress
        self.kind: Kind = load(name, folder)
        self._events = events
        self._expected = self.kind.good()

    def run(self, first: int, stop: int) -> Block:
        found = Block(first, stop)
        start = time.perf_counter()
        for begin in range(first, stop, self.kind.block):
            end = min(begin + self.kind.block, stop)
            for number in range(begin, end):
                found.add(number, self.verdict(number))
            self._tell(end - 1)
            if not self._as_before():
                number, what = self._culprit(begin, end)
                found.blame(number, what)
            self._tell(-1)
        found.seconds = time.perf_counter() - start
        return found

    def case(self, number: int) -> Any:
        return self.kind.make(generator(self._name, self._seed, number), number)

    def verdict(self, number: int) -> Verdict:
        try:
            case = self.case(number)
        except Exception as error:  # a mistake of this harness
            return Verdict(fault=f"could not be made: {type(error).__name__}: {error}")
        self._tell(number)
        most = self.kind.most_bytes + self.kind.size(case)
        return judged(
            lambda: self.kind.prepare(case),
            lambda prepared: self.kind.run(prepared, number),
            self._events,
            self.kind.most_seconds,
            most,
        )

    def _as_before(self) -> bool:
        try:
            return self.kind.good() == self._expected
        except Exception:
            traceback.print_exc()
            return False

    def _culprit(self, first: int, stop: int) -> tuple[int, str]:
        """The first input after which a request is not what it was; each alone is tried first."""
        after = "after which a request gives other bits"
        for number in range(first, stop):
            self.kind.renew()
            self.verdict(number)
            if not self._as_before():
                self.kind.renew()
                return number, f"an input {after}"
        self.kind.renew()
        for number in range(first, stop):
            self.verdict(number)
            if not self._as_before():
                self.kind.renew()
                return number, f"the last of some inputs from {first} on {after}"
        self.kind.renew()
        return stop - 1, f"inputs {first} to {stop - 1} {after}, now and then"

    def _tell(self, number: int) -> None:
        if self._progress is not None:
            PROGRESS.pack_into(self._progress, 0, number)


def main() -> None:
    seed, folder, progress = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        # an input that takes all memory should fail here, not the machine
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(progress, "r+b") as file:
        shared = mmap.mmap(file.fileno(), PROGRESS.size)
    runners: dict[str, Runner] = {}
    events = Events()
    while line := sys.stdin.readline():
        name, first, stop = line.split()
        if name not in runners:
            seeds = Path(folder) / name.replace(":", "-")
            seeds.mkdir()
            runners[name] = Runner(name, int(seed), seeds, events, shared)
        found = runners[name].run(int(first), int(stop))
        print(json.dumps(asdict(found)), file=answers, flush=True)


if __name__ == "__main__":
    main()
