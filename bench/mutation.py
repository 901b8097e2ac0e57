"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). They exist in memory only: each mutant runs in a fork whose import of
the module is given the changed source, so tests that start processes of their own don't see it.
Of `--sample` mutants, drawn by `--seed`, each runs the tests that enter its function, the quickest
first, then all others of the room, until one fails or takes three times as long as it should.
Left out are annotations, protocols, assertions and the words of errors and warnings. Tests that
fail without a mutant are not counted on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch  # noqa: F401 - once for all forks
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
OURS = ROOT / "omnigen_fast"
LORA = [f"lora{part}" for part in ("", "_scale", "_files", "_sources")]
# room: its files, and pytest's arguments
ROOMS: dict[str, tuple[list[Path], list[str]]] = {
    "reference": (
        [ROOT / "kernels" / "reference.py"],
        ["tests/kernels", "-k", "reference or specification"],
    ),
    "streaming": ([OURS / "streaming.py"], ["tests/test_streaming.py"]),
    "cache": (
        [OURS / "cache.py", OURS / "streamed_cache.py"],
        ["tests/test_cache.py", "tests/test_streaming.py", "tests/memory/test_plans.py"],
    ),
    "guidance": ([OURS / "guidance.py"], ["tests/test_golden.py", "tests/test_equivalence.py"]),
    "sequence": ([OURS / "sequence.py"], ["tests/test_golden.py", "tests/test_equivalence.py"]),
    "weights": (
        [
            OURS / "weights" / f"{name}.py"
            for name in ("store", "files", "names", "checkpoint", *LORA)
        ],
        ["tests/weights", "tests/memory/test_plans.py"],
    ),
    "engine": ([OURS / "engine.py"], ["tests/test_engine.py", "tests/test_graph.py"]),
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

    def __str__(self) -> str:
        plain = self.path.read_text().splitlines()[self.line - 1]
        changed = self.source().splitlines()[self.line - 1]
        return f"{self.path.relative_to(ROOT)}:{self.line} {plain.strip()}  ->  {changed.strip()}"


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file outside of what is left out."""
    text = path.read_text()
    skipped = list(_left_out(ast.parse(text)))
    nodes, found = list(ast_nodes(get_ast(text))), []
    for name in plugins.operator_names():
        if name.endswith(("VariableReplacer", "VariableInserter")):
            continue  # need arguments
        operator = plugins.get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in skipped):
                found.append(Mutant(path, *start, name, occurrence))
    return sorted(found)


def _left_out(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(tree):
        part: Any = None
        match node:
            case ast.AnnAssign() | ast.arg():
                part = node.annotation
            case ast.FunctionDef():
                part = node.returns
            case (
                ast.Assert()
                | ast.Raise()
                | ast.Call(func=ast.Attribute(attr="warn" | "warning"))
                | ast.ClassDef(bases=[ast.Name("Protocol")])
                | ast.If(test=ast.Name("TYPE_CHECKING"))
            ):
                part = node
        if part is not None:
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def function_of(mutant: Mutant) -> tuple[str, int] | None:
    """File and first line of the innermost function that a mutant changes; None outside of all."""
    inside = [
        (str(mutant.path), min([node.lineno, *(one.lineno for one in node.decorator_list)]))
        for node in ast.walk(ast.parse(mutant.path.read_text()))
        if isinstance(node, ast.FunctionDef) and mutant.line <= node.end_lineno
    ]
    return max((one for one in inside if one[1] <= mutant.line), default=None)


class Watch:
    """A pytest plugin: which functions a test enters and how long it takes.

    Args:
        paths: of the functions.
        limits: seconds by test, in the order to run them; without them, calls are noted.
    """

    def __init__(self, paths: Sequence[Path], limits: Mapping[str, float] | None = None) -> None:
        self.paths = {str(path) for path in paths}
        self.limits = limits
        self.entered: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.now = ""

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


def _run(watch: Watch, arguments: Sequence[str], mutant: Mutant | None, results: Any) -> None:
    """In a process of its own: runs tests, on a mutant if there is one, and sends what it saw."""
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    if mutant is not None:
        path, source, plain = str(mutant.path), mutant.source(), SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(source, path, "exec", 0, True) if self.path == path else plain(self, name)
        )
    hypothesis.settings.load_profile("ci")  # the same examples every time
    if watch.limits:
        signal.setitimer(signal.ITIMER_REAL, 120)  # to collect them
    else:
        threading.setprofile(watch.note)
        sys.setprofile(watch.note)
    stop = ["-x"] if watch.limits else []
    code = pytest.main([*arguments, "-q", "-p", "no:cacheprovider", *stop], plugins=[watch])
    results.send((int(code), dict(watch.entered), dict(watch.seconds), watch.failed))
    os._exit(0)


def run_tests(watch: Watch, arguments: Sequence[str], mutant: Mutant | None = None) -> Any:
    """Exit code, functions, seconds and failures of some tests; None where one didn't come back."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run, args=(watch, arguments, mutant, send))
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
    chosen = parser.parse_args()
    paths, arguments = ROOMS[chosen.room]
    assert not {str(path) for path in paths} & {
        str(getattr(one, "__file__", None)) for one in sys.modules.values()
    }
    if chosen.room != "reference":  # its tests ask for Triton's interpreter before all else
        importlib.import_module("diffusers").AutoencoderKL  # noqa: B018 - it is found when asked for

    every = [mutant for path in paths for mutant in mutants_of(path)]
    drawn = random.Random(chosen.seed).sample(every, min(chosen.sample, len(every)))
    _, entered, seconds, broken = run_tests(Watch(paths), arguments)
    tests = sorted(seconds.keys() - broken, key=seconds.__getitem__)
    print(f"{len(every)} mutants, {len(tests)} tests, {sum(seconds.values()):.0f} s; ", end="")
    print(f"{len(broken)} tests fail without a mutant and are left out", flush=True)
    quick = {test: seconds[test] for test in tests}
    assert run_tests(Watch(paths, quick), arguments)[0] == 0, "fail in another order"

    late, alive = 0, []
    for done, mutant in enumerate(drawn):  # in no order: an interrupted run is a fair sample
        function = function_of(mutant)
        first = {test: quick[test] for test in tests if test in entered.get(function, ())}
        if not first and function is not None:
            print(f"{done:3} is run by no test: {mutant}", flush=True)
            alive.append(str(mutant))
            continue
        found = run_tests(Watch(paths, first | quick), arguments, mutant)
        late += found is None
        if found is not None and found[0] == 0:
            print(f"{done:3} survives: {mutant}", flush=True)
            alive.append(str(mutant))
    summary = {"room": chosen.room, "seed": chosen.seed, "mutants": len(drawn), "late": late}
    print(json.dumps({**summary, "killed": len(drawn) - len(alive), "survivors": alive}))


if __name__ == "__main__":
    main()
