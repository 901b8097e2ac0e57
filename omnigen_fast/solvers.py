"""Solvers of the flow from noise to picture: when they evaluate it, and what they make of it.

A solver is a table: for each evaluation of the velocity v at the latents z five coefficients,

    z <- latents z + velocity v + history h
    h <- kept_latents z + kept_velocity v        (with the z before the update)

so that one piece of work serves all evaluations, and a captured step all solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

SOLVERS = ("euler", "heun", "midpoint", "ab2", "dpmpp2m")
TWO_EVALUATIONS = ("heun", "midpoint")  # in a step; the others have one
MULTISTEP = ("ab2", "dpmpp2m")  # use what an earlier step has found


class Update(NamedTuple):
    """What an evaluation does to the latents and to the history."""

    velocity: float
    latents: float = 1.0
    history: float = 0.0
    kept_latents: float = 0.0
    kept_velocity: float = 0.0


def evaluations(solver: str, steps: int) -> list[int]:
    """How often each step evaluates the velocity.

    The last step of `heun` is one of Euler's: the model is not asked at time 1.
    """
    counts = [2 if solver in TWO_EVALUATIONS else 1] * steps
    if solver == "heun":
        counts[-1] = 1
    return counts


def evaluation_times(solver: str, times: Sequence[float]) -> tuple[float, ...]:
    """The times of all evaluations.

    Args:
        solver: its name.
        times: [steps + 1], of each step's beginning and the last one's end.
    """
    found: list[float] = []
    for start, stop, count in zip(times, times[1:], evaluations(solver, len(times) - 1)):
        second = stop if solver == "heun" else (start + stop) / 2
        found += [start, second][:count]
    return tuple(found)


def reached(solver: str, times: Sequence[float]) -> tuple[float, ...]:
    """The time that the latents have after each evaluation; arguments as `evaluation_times`."""
    found: list[float] = []
    for start, stop, count in zip(times, times[1:], evaluations(solver, len(times) - 1)):
        between = (start + stop) / 2 if solver == "midpoint" else stop
        found += [between] * (count - 1) + [stop]
    return tuple(found)


def updates(solver: str, times: Sequence[float], fresh: Sequence[bool]) -> list[Update]:
    """What each evaluation does.

    Args:
        solver: its name.
        times: [steps + 1], see `evaluation_times`.
        fresh: [steps], whether a step must not use what was found before it: the first one, and
            one whose velocities are combined in another way.
    """
    found: list[Update] = []
    for step, (start, stop) in enumerate(pairwise(times)):
        length = stop - start
        before = None if fresh[step] else times[step - 1]
        if solver == "heun" and step < len(times) - 2:
            # Euler's step, then the mean of both velocities (Heun, 1900)
            found.append(Update(length, kept_velocity=1.0))
            found.append(Update(length / 2, history=-length / 2))
        elif solver == "midpoint":
            found.append(Update(length / 2, kept_velocity=1.0))
            found.append(Update(length, history=-length / 2))
        elif solver == "ab2":
            found.append(_ab2(before, start, length))
        elif solver == "dpmpp2m":
            found.append(_dpmpp2m(before, start, stop))
        else:
            found.append(Update(length))
    return found


def _ab2(before: float | None, start: float, length: float) -> Update:
    """Adams and Bashforth of second order; the step before may have another length."""
    half = 0.0 if before is None else length / (start - before) / 2
    return Update(length * (1 + half), history=-length * half, kept_velocity=1.0)


def _dpmpp2m(before: float | None, start: float, stop: float) -> Update:
    """DPM-Solver++(2M) (Lu et al., 2022) for the flow, where alpha is t and sigma is 1 - t.

    With the predicted picture D = z + (1 - t) v, its first order is Euler's step. The second adds
    (stop - start) / (1 - start) (D - D_before) / (2 r), where r compares the lengths of both steps
    in log(t / (1 - t)). That is infinite at times 0 and 1: a step from the one before that began
    at 0, and a step to 1, are of first order.
    """
    length, slope = stop - start, 0.0
    if before is not None and before > 0 and stop < 1:
        ratio = (_log_snr(start) - _log_snr(before)) / (_log_snr(stop) - _log_snr(start))
        slope = length / (1 - start) / (2 * ratio)
    return Update(
        length + slope * (1 - start),
        latents=1 + slope,
        history=-slope,
        kept_latents=1.0,
        kept_velocity=1 - start,
    )


def _log_snr(time: float) -> float:
    return math.log(time) - math.log1p(-time)


def shifted(time: float, shift: float) -> float:
    """A time, from 0 (noise) to 1 (picture), moved towards the noise by a factor above 1.

    The usual shift of the noise's share `sigma = 1 - t`: `shift sigma / (1 + (shift - 1) sigma)`
    (Esser et al., 2024).
    """
    return time / (time + shift - shift * time)
