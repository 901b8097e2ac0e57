"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0 [--at cache.py:120]

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). They exist in memory only: each mutant runs in a fork whose import of
the module is given the changed source, so tests that start processes of their own don't see it.
Of `--sample` mutants, drawn by `--seed`, each runs the tests that execute its lines, the quickest
first, then all others of the room, until one fails or takes three times as long as it should.
Left out are annotations, protocols, assertions and the words of errors and warnings. Tests that
fail without a mutant are not counted on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
# room: its files, and pytest's arguments for its tests
ROOMS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "reference": (["kernels/reference.py"], ["tests/kernels", "-k", "reference or specification"]),
    "streaming": (["omnigen_fast/streaming.py"], ["tests/test_streaming.py"]),
    "cache": (
        ["omnigen_fast/cache.py", "omnigen_fast/streamed_cache.py"],
        ["tests/test_cache.py", "tests/test_streaming.py", "tests/memory/test_plans.py"],
    ),
    "guidance": (
        ["omnigen_fast/guidance.py"],
        ["tests/test_golden.py", "tests/test_equivalence.py"],
    ),
    "sequence": (
        ["omnigen_fast/sequence.py"],
        ["tests/test_golden.py", "tests/test_equivalence.py"],
    ),
    "weights": (
        [f"omnigen_fast/weights/{name}.py" for name in ("store", "files", "names", "checkpoint")]
        + [f"omnigen_fast/weights/lora{part}.py" for part in ("", "_scale", "_files", "_sources")],
        ["tests/weights", "tests/memory/test_plans.py", "tests/test_golden.py"],
    ),
    "engine": (
        ["omnigen_fast/engine.py"],
        ["tests/test_engine.py", "tests/test_graph.py"],
    ),
}
SHARED = "shared"  # in the place of a test's name: lines that run for all tests of a process
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, order=True)
class Mutant:
    path: str
    line: int
    column: int
    operator: str
    occurrence: int  # of what the operator can change in its file

    def source(self) -> str:
        operator = plugins.get_operator(self.operator)()
        return mutate_code((ROOT / self.path).read_text(), operator, self.occurrence)

    def __str__(self) -> str:
        plain = (ROOT / self.path).read_text().splitlines()[self.line - 1]
        changed = self.source().splitlines()[self.line - 1]
        return f"{self.path}:{self.line} {plain.strip()}  ->  {changed.strip()}"


def mutants_of(path: str) -> list[Mutant]:
    """Every mutant of a file outside of what is left out."""
    text = (ROOT / path).read_text()
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
        parts: list[Any] = [node]
        match node:
            case ast.AnnAssign() | ast.arg():
                parts = [node.annotation]
            case ast.FunctionDef():
                parts = [node.returns]
            case ast.Assert() | ast.Raise():
                pass
            case ast.Call(func=ast.Attribute(attr="warn" | "warning")):
                pass
            case ast.ClassDef(bases=[ast.Name("Protocol")]):
                pass
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                pass
            case _:
                continue
        for part in filter(None, parts):
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def lines_of(mutant: Mutant) -> range:
    """The lines of the statement, or of the head of the compound one, that a mutant changes."""
    best = range(0)
    for node in ast.walk(ast.parse((ROOT / mutant.path).read_text())):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            last = max(first, body[0].lineno - 1) if body else node.end_lineno
            if first <= mutant.line <= last and (not best or first >= best[0]):
                best = range(first, last + 1)
    return best or range(mutant.line, mutant.line + 1)  # an except has no statement of its own


class Watch:
    """A pytest plugin: which lines each test runs and how long it takes; and in which order."""

    def __init__(self, paths: Sequence[str], order: Sequence[str] = (), seconds: Any = None):
        self.paths = {str(ROOT / path): path for path in paths}
        self.order = {name: place for place, name in enumerate(order)}
        self.limits = seconds  # of each test; without them, tests are traced
        self.lines: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.now = SHARED

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.limits is not None:
            items[:] = [item for item in items if item.nodeid in self.order]
            items.sort(key=lambda item: self.order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.now, start = item.nodeid, time.perf_counter()
        if self.limits is not None:
            signal.setitimer(signal.ITIMER_REAL, 3 * self.limits[item.nodeid] + 10)
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - start
            self.now = SHARED

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before = self.now
        self.now = before if fixturedef.scope == "function" else SHARED
        try:
            return (yield)
        finally:
            self.now = before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        path = self.paths.get(frame.f_code.co_filename)
        if path is None:
            return None
        own = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not a module's or a class's body

        def step(frame: Any, event: str, _: Any) -> Any:
            self.lines[path, frame.f_lineno].add(self.now if own else SHARED)
            return step

        return step(frame, event, _)


def _run(watch: Watch, arguments: Sequence[str], mutant: Mutant | None, results: Any) -> None:
    """In a process of its own: runs tests, on a mutant if there is one, and sends what it saw."""
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    if mutant is not None:
        path, source, plain = str(ROOT / mutant.path), mutant.source(), SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(source, path, "exec", dont_inherit=True)
            if self.path == path
            else plain(self, name)
        )
    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # no time for shrinking
    )
    hypothesis.settings.load_profile("mutation")
    stop = ["-x"] if watch.limits else []
    if not watch.limits:
        threading.settrace(watch.trace)
        sys.settrace(watch.trace)
    else:
        signal.setitimer(signal.ITIMER_REAL, 120)  # to collect them
    code = pytest.main([*arguments, "-q", "-p", "no:cacheprovider", *stop], plugins=[watch])
    results.send((int(code), dict(watch.lines), watch.seconds, watch.failed))
    os._exit(0)


def run_tests(watch: Watch, arguments: Sequence[str], mutant: Mutant | None = None) -> Any:
    """Exit code, lines, seconds and failures of some tests; None where one didn't come back."""
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
    parser.add_argument("--at", nargs="*", help="of the sample, those in such places: FILE:LINE")
    chosen = parser.parse_args()
    paths, arguments = ROOMS[chosen.room]
    assert not any(str(getattr(one, "__file__", None)) in paths for one in sys.modules.values())
    if chosen.room != "reference":  # its tests ask for Triton's interpreter before all else
        importlib.import_module("diffusers").AutoencoderKL  # noqa: B018 - it is found when asked for

    every = [mutant for path in paths for mutant in mutants_of(path)]
    drawn = random.Random(chosen.seed).sample(every, min(chosen.sample, len(every)))
    _, lines, seconds, broken = run_tests(Watch(paths), arguments)
    tests = sorted(seconds.keys() - broken, key=seconds.__getitem__)
    print(f"{len(every)} mutants, {len(tests)} tests, {sum(seconds.values()):.0f} s; ", end="")
    print(f"{len(broken)} tests fail without a mutant and are left out", flush=True)
    assert run_tests(Watch(paths, tests, seconds), arguments)[0] == 0, "fail in another order"

    count, late, alive = 0, 0, []
    for mutant in sorted(drawn):
        if chosen.at and not any(f"{mutant.path}:{mutant.line}".endswith(one) for one in chosen.at):
            continue
        ran = set().union(*(lines.get((mutant.path, line), ()) for line in lines_of(mutant)))
        found: Any = (0,)
        if ran:
            order = sorted(tests, key=lambda test: (test not in ran, seconds[test]))
            found = run_tests(Watch(paths, order, seconds), arguments, mutant)
        count += 1
        late += found is None
        if found is not None and found[0] == 0:
            alive.append(str(mutant))
            print("survives:" if ran else "is run by no test:", mutant, flush=True)
    summary = {"room": chosen.room, "seed": chosen.seed, "mutants": count, "late": late}
    print(json.dumps({**summary, "killed": count - len(alive), "survivors": alive}))


if __name__ == "__main__":
    main()
