"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0

Each mutant is a fork of a process that has collected the tests; tests that start processes of
their own don't see it. Of `--sample` mutants, drawn by `--seed`, each runs the tests that enter its
function, the quickest first and as many as `--seconds` allow, until one fails or takes three times
as long as it should. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import threading
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import pytest

from .mutants import Mutant, apply, mutants_of

PACKAGE = Path(__file__).resolve().parents[1] / "omnigen_fast"
ROOMS = {  # their modules, and pytest's arguments
    "reference": ("../kernels/reference", "tests/kernels -k 'reference or specification'"),
    "streaming": ("streaming", "tests/test_streaming.py"),
    "cache": ("*cache", "tests/test_cache.py tests/test_streaming.py tests/memory/test_plans.py"),
    "guidance": ("guidance", "tests/test_golden.py tests/test_equivalence.py"),
    "sequence": ("sequence", "tests/test_golden.py tests/test_equivalence.py"),
    "weights": (
        "weights/store weights/files weights/names weights/checkpoint weights/lora*",
        "tests/weights tests/memory/test_plans.py",
    ),
    "engine": (
        "engine holdings running",
        "tests/test_engine.py tests/test_engine_places.py tests/test_graph.py",
    ),
}
OPTIONS = shlex.split("-s --tb=no -p no:cacheprovider --hypothesis-profile=ci")
FORK = multiprocessing.get_context("fork")


class Room:
    """A pytest plugin that runs mutants where the tests would run."""

    def __init__(self, paths: Sequence[Path], chosen: argparse.Namespace) -> None:
        self.files, self.chosen = {str(path) for path in paths}, chosen
        every = [mutant for path in paths for mutant in mutants_of(path)]
        self.drawn = random.Random(chosen.seed).sample(every, min(chosen.sample, len(every)))
        self.entered: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.now = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration  # of setup, call and teardown

    def note(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in self.files:
            self.entered[code.co_filename, code.co_firstlineno].add(self.now)

    def passes(self, items: Sequence[pytest.Item], limits: dict[str, float]) -> bool:
        """Whether tests pass, up to the first that fails; ends the process at one that hangs."""
        for item, following in zip_longest(items, items[1:]):
            self.now = item.nodeid
            if limits:
                signal.setitimer(signal.ITIMER_REAL, 3 * limits[self.now] + 10)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if item.session.testsfailed:
                return False
        return True

    def all_pass(self, items: Sequence[pytest.Item]) -> Any:
        """The functions that each test enters, and its seconds; None if one fails."""
        for module in (threading, sys):
            module.setprofile(self.note)
        return self.passes(items, {}) and (dict(self.entered), dict(self.seconds))

    def survives(self, mutant: Mutant, items: Sequence[pytest.Item], limits: Any) -> bool:
        apply(mutant)
        return self.passes(items, limits)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from diffusers import AutoencoderKL  # noqa: F401 - once for all forks

        found = in_fork(self.all_pass, session.items)
        assert found, "the tests fail without a mutant"
        entered, seconds = found
        ordered = sorted(session.items, key=lambda item: seconds[item.nodeid])
        total = f"{len(seconds)} tests, {sum(seconds.values()):.0f} s"
        print(f"{len(self.drawn)} mutants, {total}", flush=True)
        assert in_fork(self.passes, ordered, seconds), "the tests fail in another order"
        alive = []
        for done, mutant in enumerate(self.drawn):  # an interrupted run is a fair sample
            place = mutant.function()
            items = [one for one in ordered if not place or one.nodeid in entered.get(place, ())]
            ends = list(accumulate(seconds[item.nodeid] for item in items))
            items = items[: max(1, bisect(ends, self.chosen.seconds))]
            if not items or in_fork(self.survives, mutant, items, seconds):
                print(f"{done:3} survives {len(items)} tests: {mutant}", flush=True)
                alive.append(str(mutant))
        print(json.dumps({**vars(self.chosen), "mutants": len(self.drawn), "survivors": alive}))
        return True


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; None if it ends without."""
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        send.send(function(*arguments))
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="mutants to run at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant")
    chosen = parser.parse_args()
    modules, arguments = map(shlex.split, ROOMS[chosen.room])
    paths = [path.resolve() for name in modules for path in sorted(PACKAGE.glob(f"{name}.py"))]
    pytest.main([*arguments, *OPTIONS], plugins=[Room(paths, chosen)])


if __name__ == "__main__":
    main()
