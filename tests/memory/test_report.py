"""What a pipeline says of its last call."""

from __future__ import annotations

import pytest
from golden_cases import TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.memory.plan import Condition, Workload
from omnigen_fast.schedule import StepSchedule


def test_cached_share_counts_rows():
    conditions = (Condition((3,)), Condition((2,)))
    workload = Workload(32, 32, StepSchedule.euler(5), ((3, 2),), conditions)
    # uncached: 5 steps of (3 + 1 + 4) and (2 + 1 + 4) rows; cached: 3 + 5 and 2 + 5 rows once,
    # then 5 steps of 4 and 4
    assert workload.cached_share() == pytest.approx(1 - (15 + 40) / 75)


def test_cached_share_of_shared_conditions():
    """Two pictures of one prompt, and branches that begin alike, fill fewer rows."""
    five = StepSchedule.euler(5)
    alone = Workload(32, 32, five, ((9, 6),), (Condition((9,)), Condition((6,))))
    twice = Workload(32, 32, five, ((9, 6), (9, 6)), alone.conditions)
    begun = Workload(32, 32, five, ((9, 6),), (Condition((9, 6), shared=6),))
    assert alone.cached_share() < begun.cached_share() < twice.cached_share()
    filled, noise, uncached = 9 + 5 + 6 + 5, 5 * 4 * 2, 5 * (9 + 1 + 4 + 6 + 1 + 4)
    assert twice.cached_share() == pytest.approx(1 - (filled + 2 * noise) / (2 * uncached))
    assert begun.cached_share() == pytest.approx(1 - (filled - 6 + noise) / uncached)


def test_summary_says_what_was_kept():
    pipe = OmniGenPipeline.from_pretrained(TINY, device="cpu")
    assert pipe.summary() == "nothing has run yet"
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 4}
    pipe(**call, progress=False)
    share = float(pipe.summary().split("kept between steps: ")[1].split("%")[0])
    assert 50 < share < 100  # the default negative prompt alone is longer than the picture
    pipe(**call, use_kv_cache=False, progress=False)
    assert "kept between steps: 0%" in pipe.summary()
