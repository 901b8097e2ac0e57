"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). They exist in memory only: each mutant runs in a fork that imports the
changed source; tests that start processes of their own don't see it. Of `--sample` mutants, drawn
by `--seed`, each runs the tests that enter its function, the quickest first and as many as
`--seconds` allow, until one fails or takes three times as long as it should. Annotations,
protocols, assertions and the words of errors and warnings stay as they are.
"""

from __future__ import annotations

import argparse
import ast
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

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
    "engine": ("engine", "tests/test_engine.py tests/test_engine_places.py tests/test_graph.py"),
}
OPTIONS = shlex.split("-x --tb=no -p no:cacheprovider --hypothesis-profile=ci")
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Mutant:
    path: Path
    line: int
    operator: Any
    occurrence: int  # of what the operator can change in its file

    def source(self) -> str:
        return mutate_code(self.path.read_text(), self.operator, self.occurrence)

    def __str__(self) -> str:
        texts = self.path.read_text(), self.source()
        plain, changed = (text.splitlines()[self.line - 1].strip() for text in texts)
        return f"{self.path.name}:{self.line} {plain}  ->  {changed}"

    def function(self) -> tuple[str, int] | None:
        """File and first line of the innermost function that it changes; None outside of all."""
        inside = [
            (str(self.path), min([node.lineno, *(one.lineno for one in node.decorator_list)]))
            for node in ast.walk(ast.parse(self.path.read_text()))
            if isinstance(node, ast.FunctionDef) and self.line <= node.end_lineno
        ]
        return max((one for one in inside if one[1] <= self.line), default=None)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file outside of what is left out."""
    text = path.read_text()
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
        for occurrence, ((line, column), _) in enumerate(places):
            star = text.splitlines()[line - 1].startswith("*,", column)  # no operator
            if not star and not any(first <= (line, column) < last for first, last in skipped):
                yield Mutant(path, line, operator, occurrence)


def _left_out(node: ast.AST) -> Any:
    match node:
        case ast.Assert() | ast.Raise() | ast.ClassDef(bases=[ast.Name("Protocol")]):
            return node
        case ast.Call(func=ast.Attribute(attr="warn" | "warning")):
            return node
    return getattr(node, "annotation", getattr(node, "returns", None))


@dataclass
class Watch:
    """A pytest plugin: which functions of `files` a test enters, and how long it takes.

    With `limits`, seconds by test, it runs these tests in that order, up to the first that fails.
    """

    files: Collection[str] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    entered: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    now: str = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.limits or by_name]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = nodeid
        if self.limits:
            signal.setitimer(signal.ITIMER_REAL, 3 * self.limits[nodeid] + 10)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration  # of setup, call and teardown

    def note(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in self.files:
            self.entered[code.co_filename, code.co_firstlineno].add(self.now)

    def run(self, arguments: Sequence[str], mutant: Mutant | None = None) -> bool:
        """Whether tests pass, in a process of its own, and in the time that they may take."""
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=self._run, args=(arguments, mutant, send))
        process.start()
        send.close()
        with suppress(EOFError):
            self.entered, self.seconds = receive.recv()
        process.join()
        return process.exitcode == 0

    def _run(self, arguments: Sequence[str], mutant: Mutant | None, results: Any) -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if mutant is not None:
            path, source, plain = str(mutant.path), mutant.source(), SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, name: (
                compile(source, path, "exec", 0, True) if self.path == path else plain(self, name)
            )
        for module in (threading, sys):
            module.setprofile(self.note if self.files else None)
        signal.setitimer(signal.ITIMER_REAL, 1800 if self.files else 120)  # the latter to collect
        code = pytest.main([*arguments, *OPTIONS], plugins=[self])
        results.send((dict(self.entered), dict(self.seconds)))
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="mutants to run at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant")
    chosen = parser.parse_args()
    modules, arguments = map(shlex.split, ROOMS[chosen.room])
    paths = [path.resolve() for name in modules for path in sorted(PACKAGE.glob(f"{name}.py"))]
    if chosen.room != "reference":  # its tests ask for Triton's interpreter before all else
        from diffusers import AutoencoderKL  # noqa: F401 - once for all forks
    every = [mutant for path in paths for mutant in mutants_of(path)]
    drawn = random.Random(chosen.seed).sample(every, min(chosen.sample, len(every)))
    plain = Watch({str(path) for path in paths})
    assert plain.run(arguments), "the tests fail without a mutant"
    seconds = dict(sorted(plain.seconds.items(), key=lambda item: item[1]))
    assert Watch(limits=seconds).run(arguments), "the tests fail in another order"
    print(f"{len(every)} mutants, {len(seconds)} tests, {sum(seconds.values()):.0f} s", flush=True)

    alive = []
    for done, mutant in enumerate(drawn):  # in no order: an interrupted run is a fair sample
        place = mutant.function()
        tests = [one for one in seconds if place is None or one in plain.entered.get(place, ())]
        ends = list(accumulate(seconds[test] for test in tests))
        limits = {test: seconds[test] for test in tests[: max(1, bisect(ends, chosen.seconds))]}
        where = sorted({test.partition("::")[0] for test in limits})  # to collect no more
        if not limits or Watch(limits=limits).run(where, mutant):
            print(f"{done:3} survives {len(limits)} tests: {mutant}", flush=True)
            alive.append(str(mutant))
    print(json.dumps({**vars(chosen), "mutants": len(drawn), "survivors": alive}))


if __name__ == "__main__":
    main()
