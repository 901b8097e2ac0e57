"""Lets memory run out at one allocation after the other, and looks at what is left."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

from omnigen_fast.errors import MAX_MESSAGE, OmniGenError

from .allocations import FAILURES, Allocations, Stack
from .scenarios import Scenario


@dataclass(frozen=True)
class Failure:
    """Which allocation fails, and how."""

    number: int
    kind: str  # of `FAILURES`
    lasting: bool


def sites(scenario: Scenario) -> dict[Stack, list[int]]:
    """The numbers of the allocations of each call stack."""
    scenario.prepare()
    with Allocations().watching() as seen:
        result = scenario.act()
    scenario.check(result)
    found: dict[Stack, list[int]] = defaultdict(list)
    for number, stack in enumerate(seen.stacks):
        found[stack].append(number)
    return dict(found)


def sample(found: dict[Stack, list[int]]) -> list[Failure]:
    """A failure for each call stack, in turns at its first and last allocation."""
    ways = cycle((kind, lasting) for lasting in (False, True) for kind in FAILURES)
    return [
        Failure(numbers[0] if index % 2 else numbers[-1], *next(ways))
        for index, numbers in enumerate(found.values())
    ]


def exhaustive(found: dict[Stack, list[int]]) -> list[Failure]:
    """Every allocation; the first of each call stack in every way."""
    ways = [(kind, lasting) for lasting in (False, True) for kind in FAILURES]
    turn = cycle(ways)
    firsts = {numbers[0] for numbers in found.values()}
    count = sum(map(len, found.values()))
    return [
        Failure(number, *way)
        for number in range(count)
        for way in (ways if number in firsts else [next(turn)])
    ]


def faults(scenario: Scenario, failures: Iterable[Failure]) -> list[tuple[Failure, str]]:
    """What is wrong after failures, tried one after the other."""
    found = [(failure, fault(scenario, failure)) for failure in failures]
    return [(failure, text) for failure, text in found if text is not None]


def fault(scenario: Scenario, failure: Failure) -> str | None:
    """What is wrong after a failure; None if nothing is."""
    scenario.prepare()
    allocations = Allocations(failure.number, FAILURES[failure.kind], failure.lasting)
    message, result = None, None
    with allocations.watching():
        try:
            result = scenario.act()
        except OmniGenError as error:
            message = str(error)
        except Exception as error:
            return f"raised {type(error).__name__}: {error}"
    if not allocations.failed:
        return "the allocation was not reached"
    held = {one.untyped_storage()._cdata for one in scenario.held()}
    if message is not None and allocations.alive() - held:
        gc.collect()
        left = len(allocations.alive() - held)
        if left:
            return f"{left} tensors are still held"
    try:
        if message is None:
            scenario.check(result)
        else:
            if "out of memory" not in message or "\n" in message or len(message) > MAX_MESSAGE:
                return f"the message is {message!r}"
            scenario.check_failed()
    except (OmniGenError, RuntimeError, AssertionError, TypeError) as error:
        return f"afterwards: {type(error).__name__}: {error}"
    return None
