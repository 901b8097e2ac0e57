"""Presets of quality, and which steps are extrapolated instead of computed.

Both come from `fewer_steps.json`; `python -m examples.shapes.fewer_steps` measures what is in it.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import RequestError, printable

_P = ParamSpec("_P")
_R = TypeVar("_R")

QUALITIES = ("exact", "high", "fast")
REUSES = ("off", "careful", "fast")
ORDER = 1  # of the extrapolation: a line through the last two computed velocities
MAX_REUSE = 1000.0  # larger thresholds compute no fewer steps


@functools.lru_cache(maxsize=1)
def table() -> Mapping[str, Any]:
    """What was measured: presets, thresholds and the profile of change."""
    return json.loads(Path(__file__).with_name("fewer_steps.json").read_text(encoding="utf-8"))


def preset(quality: Any) -> dict[str, Any]:
    """The arguments of a call that a quality stands for.

    Raises RequestError unless it is one of `QUALITIES`.
    """
    if not isinstance(quality, str) or quality not in QUALITIES:
        raise RequestError(f"quality must be one of {', '.join(QUALITIES)}, got {_show(quality)}")
    return dict(table()["presets"][quality])


def left_to_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's arguments that a caller leaves to it.

    Args:
        given: what the caller has given, `quality` included if it was. `timesteps` stands for the
            number of steps and their times.

    Raises:
        RequestError: an unknown quality.
    """
    return not_given(preset(given.get("quality", QUALITIES[0])), given)


def not_given(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a preset's arguments that a caller has not given; see `left_to_preset`."""
    taken = set(given)
    if given.get("timesteps") is not None:
        taken |= {"num_inference_steps", "time_shift"}
    return {name: value for name, value in chosen.items() if name not in taken}


def with_preset(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A call of a pipeline whose `quality` gives the arguments that the caller does not give."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "quality" not in kwargs:  # the defaults are those of the first
            return function(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        return function(*args, **{**kwargs, **left_to_preset(given)})

    return run


def reuse_threshold(value: Any) -> float:
    """The error that the steps between two computed ones may add to the latents.

    Relative to the velocities' size, so to the whole way from noise to picture; 0 computes every
    step. Raises RequestError unless it is one of `REUSES` or a threshold.
    """
    if isinstance(value, str) and value in REUSES:
        return 0.0 if value == "off" else float(table()["reuse"]["thresholds"][value])
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: torch's
        number = math.nan
    if not 0 <= number <= MAX_REUSE:
        raise RequestError(
            f"reuse must be {', '.join(REUSES)} or a threshold from 0 to {MAX_REUSE:g}, got "
            f"{_show(value)}; careful is {table()['reuse']['thresholds']['careful']:g}"
        )
    return number


def computed_steps(
    ends: Sequence[float], begins_anew: Sequence[bool], threshold: float
) -> list[bool]:
    """Which steps are computed; the others are extrapolated.

    The first steps of a flow, as many as the extrapolation needs, and the last step always are. The
    choice depends on the times alone: it is the same for every picture, and known beforehand.

    Args:
        ends: [steps + 1], of each step's beginning and the last one's end.
        begins_anew: [steps], whether velocities are combined in another way than before.
        threshold: see `reuse_threshold`.
    """
    times = ends[:-1]
    places = _places(times)
    computed: list[bool] = []
    last, known = 0, 0  # the last computed step; how many there are since the flow began
    for step in range(len(times)):
        known = 0 if begins_anew[step] else known
        error = (places[step] - places[last]) ** 3
        needed = known <= ORDER or step == len(times) - 1 or error > threshold
        if needed:
            last, known = step, known + 1
        computed.append(needed)
    return computed


def fitted_timesteps(steps: int) -> list[float]:
    """When steps may begin so that each adds about the same error, for `timesteps` of a call.

    They lie dense where velocities bend: near the noise, and just before the picture.
    """
    profile = table()["reuse"]["profile"]["times"]
    places = _places(profile)
    found = []
    for step in range(steps):
        wanted = places[-1] * step / steps
        i = min(bisect_right(places, wanted), len(places) - 1)
        share = (wanted - places[i - 1]) / (places[i] - places[i - 1])
        found.append(profile[i - 1] + share * (profile[i] - profile[i - 1]))
    return found


def _places(times: Sequence[float]) -> list[float]:
    """Where times lie on a line on which equal gaps between computed steps add equal errors.

    A gap h over which a velocity v is a straight line, through its values at the beginning and a
    gap before, moves the latents by 5/12 h^3 v'' too far. The integral of the cube root of that,
    relative to v, is the place; v''/v is measured, and constant between the profile's times.
    """
    profile = table()["reuse"]["profile"]
    ends = profile["times"]
    rates = [(5 / 12 * one) ** (1 / 3) for one in profile["curvatures"]]
    spans = [rate * (stop - start) for rate, (start, stop) in zip(rates, pairwise(ends))]
    sums = [0.0, *accumulate(spans)]
    found = []
    for time in times:
        place = min(bisect_right(ends, time), len(rates)) - 1
        found.append(sums[place] + rates[place] * (time - ends[place]))
    return found


def _show(value: Any) -> str:
    try:
        return printable(repr(value), 60)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"an enormous {type(value).__name__}"
