"""What a cost is the sum of: terms that can be printed, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """Bytes that live at the same time as those of the other terms of a sum."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Duration:
    """Seconds that are spent before or after those of the other durations of a sum."""

    name: str
    seconds: float
    why: str


def total_bytes(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)


def total_seconds(durations: Iterable[Duration]) -> float:
    return sum(duration.seconds for duration in durations)


def table(terms: Sequence[Term] | Sequence[Duration]) -> str:
    """A line for each term, in GB (10^9 bytes) or seconds, and one for their sum."""
    rows = [(one.name, _amount(one), one.why) for one in terms]
    rows.append(("together", sum(amount for _, amount, _ in rows), ""))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}} {amount:8.2f}  {why}".rstrip() for name, amount, why in rows)


def _amount(one: Term | Duration) -> float:
    return one.bytes / 1e9 if isinstance(one, Term) else one.seconds
