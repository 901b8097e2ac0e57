"""The terms that a cost is the sum of, each with its reason, for printing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """Bytes in use at the same time as those of the sum's other terms."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Duration:
    """Seconds spent before or after those of the sum's other durations."""

    name: str
    seconds: float
    why: str


def total_bytes(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)


def total_seconds(durations: Iterable[Duration]) -> float:
    return sum(duration.seconds for duration in durations)


def table(terms: Sequence[Term] | Sequence[Duration]) -> str:
    """A line for each term, in GB (10^9 bytes) or seconds, and one for the total."""
    rows = [(one.name, _amount(one), one.why) for one in terms]
    rows.append(("total", sum(amount for _, amount, _ in rows), ""))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}} {amount:8.2f}  {why}".rstrip() for name, amount, why in rows)


def _amount(one: Term | Duration) -> float:
    return one.bytes / 1e9 if isinstance(one, Term) else one.seconds
