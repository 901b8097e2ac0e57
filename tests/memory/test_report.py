"""What a pipeline says of its last call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.memory.plan import Condition, MemoryPlan, Workload
from omnigen_fast.precision import Precision
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


TEXT = {"prompt": "A cat.", "height": 64, "width": 48, "num_inference_steps": 3, "seed": 1}
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> at night",
    "input_images": [str(GOLDEN / "images" / "cat.png")],
    "max_input_image_size": 96,
}
BATCH = {
    **TEXT,
    "prompt": [TEXT["prompt"], EDIT["prompt"]],
    "input_images": [[], EDIT["input_images"]],
    "max_input_image_size": 96,
    "num_images_per_prompt": 2,
}
PLAIN = MemoryPlan.plain(layers=3, kept_bytes=1 << 20)
CHANGES = {
    "nothing": {},
    "no cache": {"use_kv_cache": False},
    "apart": {"separate_cfg_infer": True},
    "together": {"separate_cfg_infer": False, "use_kv_cache": True},
    "ignored on a CPU": {"offload_model": True, "offload_kv_cache": True},
    "4 GB": {"memory": "4GB"},
    "the least that will do": {"memory": "least"},
    "a plan": {"memory": replace(PLAIN, resident_layers=1, cache="ring", strip_rows=2)},
    "a plan and switches": {
        "memory": replace(PLAIN, resident_layers=1, cache="ring"),
        "use_kv_cache": False,
        "offload_model": False,
    },
    "another dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("request_", [TEXT, EDIT, BATCH], ids=["text", "edit", "batch"])
def test_a_call_runs_by_the_plan_that_was_told(load_pipe, monkeypatch, request_, change):
    """And telling it starts nothing, changes nothing and draws no noise."""
    pipe = load_pipe()
    call = {**request_, **change, "output_type": "latent"}
    if call.get("memory") == "least":
        candidates = pipe.plan(**request_).candidates
        assert candidates[-1].peak_bytes < candidates[0].peak_bytes
        call["memory"] = candidates[-1].peak_bytes
    state = torch.get_rng_state()
    for place in ("start", "arrange", "load", "refresh", "forget", "free"):
        monkeypatch.setattr(pipe.engine, place, forbidden)
    before = pipe.engine.arrangement, list(pipe.engine.cache.keys.shape), pipe.dtype
    told = pipe.plan(**call)
    assert before == (pipe.engine.arrangement, list(pipe.engine.cache.keys.shape), pipe.dtype)
    assert not pipe.engine.image_latents and not pipe.model.crops()
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.last_plan is None and pipe.summary() == "nothing has run yet"
    monkeypatch.undo()
    pipe(**call, progress=False)
    assert pipe.last_plan == replace(told.plan, precision=pipe.last_plan.precision)
    dtype = change.get("dtype", "float32")
    assert pipe.last_plan.precision == Precision.of(dtype)
    predicted = pipe.last_report.predicted
    if not isinstance(change.get("memory"), MemoryPlan):
        assert predicted.peak_bytes == told.cost.peak_bytes
    assert told.explain()


def forbidden(*args, **kwargs):
    raise AssertionError("a plan starts nothing")


def test_a_given_plan_that_does_not_fit_is_still_explained(pipe, monkeypatch):
    monkeypatch.setattr("omnigen_fast.run.free_bytes", lambda *arguments: 1 << 20)
    plan = MemoryPlan.plain(3)
    decision = pipe.plan("A cat.", height=64, width=64, memory=plan)
    assert decision.chosen.plan == decision.plan == plan
    assert not decision.fits(decision.chosen)
    assert "predicted" in decision.explain()
