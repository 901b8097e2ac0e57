"""Predicted seconds, corrected by what the same work really took."""

from __future__ import annotations

import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

_SAMPLES = 8  # of which the median counts
_FORGOTTEN = 120.0  # seconds after which a sample no longer counts: the machine may be another
_KEPT = 512  # kinds of work


@dataclass(frozen=True)
class Work:
    """Something that takes time."""

    family: Hashable  # of kinds that are slower or faster than planned by about the same factor
    kind: Hashable  # work that takes equally long each time
    planned: Callable[[], float]  # seconds


class Pace:
    """How long work takes; for several threads.

    What was never measured is predicted from the plan's seconds, times the factor by which work of
    the same family was slower or faster than planned.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._taken: OrderedDict[Hashable, deque[tuple[float, float]]] = OrderedDict()

    def note(self, work: Work, seconds: float) -> None:
        """Remembers what some work took."""
        planned = work.planned()
        with self._lock:
            self._add((work.family, work.kind), seconds)
            if planned > 0:
                self._add((work.family,), seconds / planned)
                self._add((), seconds / planned)

    def expect(self, work: Work) -> float:
        """Seconds that some work will take."""
        with self._lock:
            measured = self._median((work.family, work.kind))
            if measured is not None:
                return measured
            factors = [self._median(key) for key in ((work.family,), ())]
        return work.planned() * next((one for one in factors if one is not None), 1.0)

    def _add(self, key: Hashable, value: float) -> None:
        samples = self._taken.setdefault(key, deque(maxlen=_SAMPLES))
        samples.append((self._now(), value))
        self._taken.move_to_end(key)
        while len(self._taken) > _KEPT:
            self._taken.popitem(last=False)

    def _median(self, key: Hashable) -> float | None:
        since = self._now() - _FORGOTTEN
        found = [value for at, value in self._taken.get(key, ()) if at >= since]
        return statistics.median(found) if found else None
