"""Mutation testing: small faults put into one room at a time, and whether its tests notice.

    python -m bench.mutation cache --sample 100 --seed 0

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). They exist in memory only: each mutant is a fork of a process that has
collected the tests, in which functions and constants of the module are replaced; tests that start
processes of their own don't see it. Of `--sample` mutants, drawn by `--seed`, each runs the tests
that enter its function, the quickest first and as many as `--seconds` allow, until one fails or
takes three times as long as it should. Annotations, protocols, decorators, assertions and the
words of errors and warnings stay as they are.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from types import FunctionType, ModuleType
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
OPTIONS = shlex.split("-s --tb=no -p no:cacheprovider --hypothesis-profile=ci")
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


def functions(space: dict[str, Any], module: str) -> Iterator[tuple[str, FunctionType]]:
    """Those of a module or a class, by name, without their decorators."""
    for name, value in space.items():
        for inside in ("fget", "func", "__func__"):
            value = getattr(value, inside, value)
        while hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        if getattr(value, "__module__", None) == module:
            if isinstance(value, FunctionType):
                yield name, value
            elif isinstance(value, type):
                yield from ((f"{name}.{one}", each) for one, each in functions(vars(value), module))


def apply(mutant: Mutant) -> None:
    """Changes the functions and constants of a module that is imported."""
    modules = [one for one in sys.modules.values() if hasattr(one, "__file__")]
    (module,) = (one for one in modules if one.__file__ == str(mutant.path))
    changed = ModuleType(module.__name__)
    changed.__package__ = module.__package__
    exec(compile(mutant.source(), module.__file__, "exec"), vars(changed))
    plain = dict(functions(vars(module), module.__name__))
    for name, function in functions(vars(changed), module.__name__):
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(plain[name], part, getattr(function, part))
    for name, value in vars(changed).items():
        old = vars(module).get(name)
        if isinstance(value, int | float | str | tuple) and value != old:
            for one in modules:  # also where it was imported
                if vars(one).get(name) is old:
                    setattr(one, name, value)


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
