"""Ctrl-C at one line of the package after the other, and what is left."""

from __future__ import annotations

import dis
import os
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import omnigen_fast

from .scenarios import Scenario

_PACKAGE = str(Path(omnigen_fast.__file__).resolve().parent)
_ROOT = str(Path(_PACKAGE).parent)
_MAPPED_FILES = str(torch.storage.__file__)  # it is called while weights are read
_TRACED = (_PACKAGE, _MAPPED_FILES)

Line = tuple[str, int]
NOT_REACHED = "the line was not reached"


class Lines:
    """Counts the package's lines that this thread runs inside a `with` block.

    Python raises KeyboardInterrupt between two instructions; here before the first of a line.

    Args:
        interrupt_at: the number of the line before which it comes; None for none.
    """

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.lines: list[Line] = []
        self.interrupted = False
        self._interrupt_at = interrupt_at
        self._count = 0

    def __enter__(self) -> Lines:
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _enter_frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._see if frame.f_code.co_filename.startswith(_TRACED) else None

    def _see(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.interrupted and not _leaves_block(frame):
            if self._interrupt_at is None:
                name = os.path.relpath(frame.f_code.co_filename, _ROOT)
                self.lines.append((name, frame.f_lineno))
            elif self._count == self._interrupt_at:
                self.interrupted = True
                raise KeyboardInterrupt
            self._count += 1
        return self._see


def _leaves_block(frame: FrameType) -> bool:
    """Whether a `with` block is about to be left: Python looks at no signal before it has been."""
    return frame.f_lasti in _exits(frame.f_code)


@cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where the arguments of `__exit__` are put on the stack: None, three times."""
    found = [one for one in dis.get_instructions(code) if one.opname != "NOP"]
    return frozenset(
        three[0].offset
        for three in zip(found, found[1:], found[2:])
        if all(one.opname == "LOAD_CONST" and one.argval is None for one in three)
    )


def interruptible(scenario: Scenario) -> dict[Line, list[int]]:
    """The numbers at which each line runs."""
    scenario.prepare()
    with Lines() as seen:
        result = scenario.act()
    scenario.check(result)
    found: dict[Line, list[int]] = {}
    for number, line in enumerate(seen.lines):
        found.setdefault(line, []).append(number)
    return found


def interrupt_fault(scenario: Scenario, number: int) -> str | None:
    """What is wrong after an interrupt; None if nothing is."""
    scenario.prepare()
    lines, text = Lines(number), "no KeyboardInterrupt"
    try:
        with lines:
            scenario.act()
    except KeyboardInterrupt:
        text = ""
    except Exception as error:
        text = f"raised {type(error).__name__}: {error}"
    if not lines.interrupted:
        return NOT_REACHED
    if text:
        return text
    try:
        scenario.settle()
        scenario.check_other()
        scenario.check_failed()
    except Exception as error:
        return f"afterwards: {type(error).__name__}: {error}"
    return None
