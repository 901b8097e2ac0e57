"""Which tests `make test` leaves to `make test-slow`, and what one that it runs may cost.

`make test` has to end within six minutes on two cores. Tests that take long are marked:

    @pytest.mark.slow                              # the whole test
    pytest.param(..., marks=pytest.mark.slow)      # a parametrisation
    @pytest.mark.slow_for("257-*")                 # parametrisations of such ids
    @pytest.mark.slow_except("64-int8", "96-*")    # all but those of such ids

What is left has to check every kind of thing that the slow ones check, in a case of it.
"""

from __future__ import annotations

import fnmatch
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest

SHOWN = 5  # of the costliest tests
# CPU seconds of all tests that are not slow: six minutes of two cores, less what setting up the
# environment, linting and collecting the tests take.
TOTAL = 450.0


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Marks as slow what `slow_for` or `slow_except` say, by the ids of parametrisations."""
    found: dict[str, list[str]] = defaultdict(list)
    patterns: dict[str, tuple[str, ...]] = {}
    for item in items:
        for name, if_fits in (("slow_for", True), ("slow_except", False)):
            mark = item.get_closest_marker(name)
            if mark is not None:
                place, _, rest = item.nodeid.partition("[")
                patterns[place] = mark.args
                found[place].append(rest.removesuffix("]"))
                fits = any(fnmatch.fnmatchcase(found[place][-1], one) for one in mark.args)
                if fits == if_fits:
                    item.add_marker("slow")
    for place, names in patterns.items():
        if len(found[place]) > len(names):  # else some may have been picked by their ids
            missing = [one for one in names if not fnmatch.filter(found[place], one)]
            if missing:
                raise pytest.UsageError(
                    f"{place}: no parametrisation that a mark names: {', '.join(missing)}"
                )


def _spent() -> float:
    """CPU seconds of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


class Costs:
    """CPU time of each test, on whatever else the machine is busy with.

    The first that needs something of a module or a session pays for it. Ranks that a fork server
    starts are none of its children, and so are not counted.
    """

    def __init__(self, limit: float | None) -> None:
        """`limit`: CPU seconds; a test above it that is not marked as slow fails."""
        self._limit = limit
        self._last = 0.0
        self._seconds = 0.0
        self._quick: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._last, self._seconds = _spent(), 0.0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        now = _spent()
        self._seconds += now - self._last
        if item.get_closest_marker("slow") is None:
            report.quick_seconds = now - self._last  # for the process that sums up
            over = self._limit is not None and self._seconds > self._limit
            if over and report.when == "call" and report.passed:
                report.outcome = "failed"
                report.longrepr = (
                    f"{item.nodeid} passed, but took {self._seconds:.1f} CPU seconds, and a test "
                    f"that is not marked as slow may take {self._limit:g}: tests/quick_tests.py"
                )
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = getattr(report, "quick_seconds", None)
        if seconds is not None:
            self._quick[report.nodeid] += seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._limit is None or not self._quick:
            return
        total = sum(self._quick.values())
        terminalreporter.section("CPU time of tests that are not slow")
        terminalreporter.write_line(
            f"{total:.0f} s of {len(self._quick)} tests; at most {TOTAL:.0f} s"
            + (" are meant: MARK MORE AS SLOW" if total > TOTAL else " are meant")
        )
        costliest = sorted(self._quick.items(), key=lambda one: -one[1])[:SHOWN]
        for name, seconds in costliest:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
