"""Mutants: small faults in a module's source, put into the module that is imported.

The faults are cosmic-ray's (`pip install cosmic-ray`; it is in no extra, since it brings a
database and a web client). Annotations, protocols, decorators, fields of classes, assertions and
the words of errors and warnings stay as they are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code


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
        for node in ast.walk(ast.parse(text))
        for part in _left_out(node)
    ]
    nodes = list(ast_nodes(get_ast(text)))
    for name in plugins.operator_names():
        if name.endswith(("VariableReplacer", "VariableInserter", "RemoveDecorator")):
            continue
        operator = plugins.get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            star = text.splitlines()[line - 1].startswith("*,", column)  # no operator
            if not star and not any(first <= (line, column) < last for first, last in skipped):
                yield Mutant(path, line, operator, occurrence)


def _left_out(node: ast.AST) -> list[Any]:
    """What is not behaviour, and what can't be replaced in a module that is imported."""
    match node:
        case ast.Assert() | ast.Raise() | ast.ClassDef(bases=[ast.Name("Protocol")]):
            return [node]
        case ast.Call(func=ast.Attribute(attr="warn" | "warning")):
            return [node]
        case ast.ClassDef():
            fields = [one for one in node.body if not isinstance(one, ast.FunctionDef)]
            return [*node.decorator_list, *fields]
        case ast.FunctionDef():
            return [*node.decorator_list, *([node.returns] if node.returns else [])]
        case ast.arg(annotation=ast.expr()) | ast.AnnAssign():
            return [node.annotation]
    return []


def _functions(space: dict[str, Any], module: str) -> Iterator[tuple[str, FunctionType]]:
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
                for inner, function in _functions(vars(value), module):
                    yield f"{name}.{inner}", function


def apply(mutant: Mutant) -> None:
    """Changes the functions and constants of a module that is imported."""
    modules = [one for one in sys.modules.values() if hasattr(one, "__file__")]
    (module,) = (one for one in modules if one.__file__ == str(mutant.path))
    changed = ModuleType(module.__name__)
    changed.__package__ = module.__package__
    exec(compile(mutant.source(), module.__file__, "exec"), vars(changed))
    plain = dict(_functions(vars(module), module.__name__))
    for name, function in _functions(vars(changed), module.__name__):
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(plain[name], part, getattr(function, part))
    for name, value in vars(changed).items():
        old = vars(module).get(name)
        if isinstance(value, int | float | str | tuple) and value != old:
            for one in modules:  # also where it was imported
                if vars(one).get(name) is old:
                    setattr(one, name, value)
