"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). They exist in memory only: each mutant runs in a fork whose import of
the module is given the changed source, so tests that start processes of their own don't see it.
Of `--sample` mutants, drawn by `--seed`, each runs the tests that enter its function, the quickest
first and as many as `--seconds` allow, until one fails or takes three times as long as it should.
Left out are annotations, protocols, assertions and the words of errors and warnings. Tests that
fail without a mutant are not counted on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch  # noqa: F401 - once for all forks
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
_LORA = [f"lora{part}" for part in ("", "_scale", "_files", "_sources")]
_WEIGHTS = [f"weights/{name}" for name in ("store", "files", "names", "checkpoint", *_LORA)]
_STEPS = ["tests/test_golden.py", "tests/test_equivalence.py"]
# room: its modules of omnigen_fast, and pytest's arguments
ROOMS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "reference": (["../kernels/reference"], ["tests/kernels", "-k", "reference or specification"]),
    "streaming": (["streaming"], ["tests/test_streaming.py"]),
    "cache": (
        ["cache", "streamed_cache"],
        ["tests/test_cache.py", "tests/test_streaming.py", "tests/memory/test_plans.py"],
    ),
    "guidance": (["guidance"], _STEPS),
    "sequence": (["sequence"], _STEPS),
    "weights": (_WEIGHTS, ["tests/weights", "tests/memory/test_plans.py"]),
    "engine": (
        ["engine"],
        ["tests/test_engine.py", "tests/test_engine_places.py", "tests/test_graph.py"],
    ),
}
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, order=True)
class Mutant:
    path: Path
    line: int
    column: int
    operator: str
    occurrence: int  # of what the operator can change in its file

    def source(self) -> str:
        operator = plugins.get_operator(self.operator)()
        return mutate_code(self.path.read_text(), operator, self.occurrence)

    def compiles(self) -> bool:
        """Not where, for instance, another operator stands for the star of keyword arguments."""
        try:
            return bool(ast.parse(self.source()))
        except SyntaxError:
            return False

    def __str__(self) -> str:
        texts = self.path.read_text(), self.source()
        plain, changed = (text.splitlines()[self.line - 1].strip() for text in texts)
        return f"{self.path.relative_to(ROOT)}:{self.line} {plain}  ->  {changed}"

    def function(self) -> tuple[str, int] | None:
        """File and first line of the innermost function that it changes; None outside of all."""
        inside = [
            (str(self.path), min([node.lineno, *(one.lineno for one in node.decorator_list)]))
            for node in ast.walk(ast.parse(self.path.read_text()))
            if isinstance(node, ast.FunctionDef) and self.line <= node.end_lineno
        ]
        return max((one for one in inside if one[1] <= self.line), default=None)


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file outside of what is left out."""
    text, found = path.read_text(), []
    skipped = [
        ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))
        for part in filter(None, map(_left_out, ast.walk(ast.parse(text))))
    ]
    nodes = list(ast_nodes(get_ast(text)))
    for name in plugins.operator_names():
        if name.endswith(("VariableReplacer", "VariableInserter")):
            continue  # need arguments
        operator = plugins.get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in skipped):
                found.append(Mutant(path, *start, name, occurrence))
    return sorted(found)


def _left_out(node: ast.AST) -> Any:
    match node:
        case ast.AnnAssign() | ast.arg():
            return node.annotation
        case ast.FunctionDef():
            return node.returns
        case (
            ast.Assert()
            | ast.Raise()
            | ast.Call(func=ast.Attribute(attr="warn" | "warning"))
            | ast.ClassDef(bases=[ast.Name("Protocol")])
        ):
            return node


@dataclass
class Watch:
    """A pytest plugin: which functions of some files a test enters, and how long it takes.

    With `limits`, seconds by test, it runs these tests in that order, and notes no functions.
    """

    paths: Collection[str]
    limits: Mapping[str, float] | None = None
    entered: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failed: set[str] = field(default_factory=set)
    now: str = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.limits:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.limits]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = nodeid
        if self.limits:
            signal.setitimer(signal.ITIMER_REAL, 3 * self.limits[nodeid] + 10)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration  # of setup, call and teardown
        if report.failed:
            self.failed.add(report.nodeid)

    def note(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in self.paths:
            self.entered[code.co_filename, code.co_firstlineno].add(self.now)

    def run(self, arguments: Sequence[str], mutant: Mutant | None = None) -> bool:
        """Whether tests pass, in a process of its own, and in the time that they may take."""
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=self._run, args=(arguments, mutant, send))
        process.start()
        send.close()
        try:
            code, self.entered, self.seconds, self.failed = receive.recv()
            return code == 0
        except EOFError:
            return False
        finally:
            process.join()

    def _run(self, arguments: Sequence[str], mutant: Mutant | None, results: Any) -> None:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if mutant is not None:
            path, source, plain = str(mutant.path), mutant.source(), SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, name: (
                compile(source, path, "exec", 0, True) if self.path == path else plain(self, name)
            )
        hypothesis.settings.load_profile("ci")  # the same examples every time
        options = ["--tb=no", "-p", "no:cacheprovider"]
        if self.limits:
            options.append("-x")
            signal.setitimer(signal.ITIMER_REAL, 120)  # to collect them
        else:
            threading.setprofile(self.note)
            sys.setprofile(self.note)
        code = pytest.main([*arguments, *options], plugins=[self])
        results.send((int(code), dict(self.entered), dict(self.seconds), self.failed))
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="mutants to run at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant")
    chosen = parser.parse_args()
    names, arguments = ROOMS[chosen.room]
    paths = [(ROOT / "omnigen_fast" / f"{name}.py").resolve() for name in names]
    files = {str(path) for path in paths}
    assert not files & {str(getattr(one, "__file__", None)) for one in sys.modules.values()}
    if chosen.room != "reference":  # its tests ask for Triton's interpreter before all else
        from diffusers import AutoencoderKL  # noqa: F401 - once for all forks too

    every = [mutant for path in paths for mutant in mutants_of(path)]
    random.Random(chosen.seed).shuffle(every)
    drawn = list(islice(filter(Mutant.compiles, every), chosen.sample))
    plain = Watch(files)
    plain.run(arguments)
    seconds, broken = plain.seconds, plain.failed
    tests = sorted(seconds.keys() - broken, key=seconds.__getitem__)
    print(f"{len(every)} mutants, {len(tests)} tests, {sum(seconds.values()):.0f} s; ", end="")
    print(f"{len(broken)} tests fail without a mutant and are left out", flush=True)
    limits = {test: seconds[test] for test in tests}
    assert Watch(files, limits).run(arguments), "fail in another order"

    alive = []
    for done, mutant in enumerate(drawn):  # in no order: an interrupted run is a fair sample
        place = mutant.function()
        enter = [test for test in tests if place is None or test in plain.entered.get(place, ())]
        ends = list(accumulate(seconds[test] for test in enter))
        some = enter[: max(1, bisect(ends, chosen.seconds))]
        limits = {test: seconds[test] for test in some}
        where = sorted({test.partition("::")[0] for test in some})  # to collect no more
        if not some or Watch(files, limits).run(where, mutant):
            print(f"{done:3} survives {len(some)} tests: {mutant}", flush=True)
            alive.append(str(mutant))
    summary = {"room": chosen.room, "seed": chosen.seed, "mutants": len(drawn)}
    print(json.dumps({**summary, "killed": len(drawn) - len(alive), "survivors": alive}))


if __name__ == "__main__":
    main()
