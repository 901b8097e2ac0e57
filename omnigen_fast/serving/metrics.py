"""Metrics of a scheduler, for Prometheus."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from .scheduler import State
from .work import Ticket

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
_PACKS = (1, 2, 3, 4, 6, 8, 12, 16)
_RATE_SECONDS = 10.0  # over which steps a second are counted


class Metrics:
    """Counts what a scheduler tells it; an `Observer`. Names are documented in docs/serving.md."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.state: Callable[[], State] | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=10_000)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"omnigen_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"omnigen_{name}", what, registry=self.registry, buckets=buckets)

        self._finished = counter("requests_finished", "Accepted requests that are over.", "reason")
        self._refused = counter("requests_refused", "Requests that were not accepted.", "reason")
        self._e2e = histogram("request_seconds", "From acceptance to end.", _SECONDS)
        self._queued = histogram("queue_seconds", "From acceptance to the first step.", _SECONDS)
        self._steps = counter("steps", "Steps taken, of all requests.")
        self._passes = histogram("step_requests", "Requests that stepped together.", _PACKS)
        self._stepping = counter("step_seconds", "Seconds spent in steps.")
        self._hits = counter("condition_cache_hits", "Conditions found kept.")
        self._misses = counter("condition_cache_misses", "Conditions computed.")
        self.registry.register(_Now(self))

    def ended(self, reason: str, ticket: Ticket) -> None:
        self._finished.labels(reason).inc()
        self._e2e.observe(ticket.facts.seconds)
        self._queued.observe(ticket.facts.queued_seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def stepped(self, requests: int, seconds: float) -> None:
        self._steps.inc(requests)
        self._passes.observe(requests)
        self._stepping.inc(seconds)
        self._recent.append((monotonic(), requests))

    def conditions(self, found: int, computed: int) -> None:
        self._hits.inc(found)
        self._misses.inc(computed)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def steps_per_second(self) -> float:
        """Over the latest seconds."""
        since = monotonic() - _RATE_SECONDS
        return sum(count for at, count in list(self._recent) if at >= since) / _RATE_SECONDS


class _Now:
    """What is read when somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        def gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"omnigen_{name}", what, value=value)

        if self._metrics.state is not None:
            state = self._metrics.state()
            yield gauge("requests_running", "Requests that have begun.", state.running)
            yield gauge("requests_waiting", "Requests that have not begun.", state.waiting)
            yield gauge("ready", "1 if requests are taken.", float(state.ready))
        rate = self._metrics.steps_per_second()
        yield gauge("steps_per_second", "Of all requests, over 10 s.", rate)
        yield gauge("memory_bytes", "In use: the GPU's by PyTorch, or the process's.", _memory())


def _memory() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
