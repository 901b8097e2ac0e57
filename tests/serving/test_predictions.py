"""Predicted seconds that measured ones correct, and bytes of requests side by side."""

from __future__ import annotations

import pytest

from omnigen_fast.memory.cost import Cost
from omnigen_fast.memory.terms import Term
from omnigen_fast.serving.admission import Footprint, needed_bytes
from omnigen_fast.serving.pace import Pace, Work


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def pace(clock):
    return Pace(now=lambda: clock[0])


def step(kind: str, planned: float, family: str = "64 px") -> Work:
    return Work(family, kind, lambda: planned)


class TestPace:
    def test_the_plan_counts_until_something_is_measured(self, pace):
        assert pace.expect(step("one", 2.0)) == 2.0

    def test_the_median_of_the_latest_counts(self, pace):
        for seconds in (9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0):
            pace.note(step("one", 2.0), seconds)
        assert pace.expect(step("one", 2.0)) == 4.5

    def test_others_are_corrected_by_the_factor_of_their_family_or_of_all(self, pace):
        pace.note(step("one", 2.0), 6.0)
        assert pace.expect(step("two", 3.0)) == 9.0
        pace.note(step("one", 1.0, "1024 px"), 5.0)
        assert pace.expect(step("two", 3.0)) == 9.0
        assert pace.expect(step("one", 1.0, "512 px")) == 4.0  # of 3 and 5

    def test_old_samples_are_forgotten(self, pace, clock):
        pace.note(step("one", 2.0), 6.0)
        clock[0] = 121.0
        assert pace.expect(step("one", 2.0)) == 2.0

    def test_what_is_kept_is_bounded(self, pace):
        for number in range(2000):
            pace.note(step(str(number), 1.0), 1.0)
        assert len(pace._taken) <= 512


def terms(**sizes: int) -> tuple[Term, ...]:
    return tuple(Term(name.replace("_", " "), size, "") for name, size in sizes.items())


WEIGHTS = {"layers": 100, "other_weights": 10, "cache": 40}
COST = Cost(
    encode=(),
    prefill=terms(**WEIGHTS, latents=1, condition=30),
    denoise=terms(**WEIGHTS, latents=1, loop=20),
    decode=terms(**WEIGHTS, latents=1, VAE=5, decode=60),
    durations=(),
)


class TestBytes:
    def test_the_parts_of_a_request(self):
        one = Footprint.of(COST)
        assert (one.shared, one.kept, one.loop) == (150, 21, 20)
        assert one.shared + one.kept + one.passing == COST.peak_bytes == 216

    def test_alone_it_is_the_plans_peak(self):
        assert needed_bytes([Footprint.of(COST)]) == COST.peak_bytes
        assert needed_bytes([]) == 0

    def test_side_by_side_weights_count_once_and_one_passes_at_a_time(self):
        one = Footprint.of(COST)
        assert needed_bytes([one, one, one]) == 150 + 3 * 21 + 45
        assert needed_bytes([one, one, one], [one, one]) == 150 + 3 * 21 + 45 + 2 * 20
        assert needed_bytes([one, one], [one]) == 150 + 2 * 21 + 45
