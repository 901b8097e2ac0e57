"""A plan that can't be carried out is refused when it is made, or meets its model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from golden_cases import TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.errors import RequestError
from omnigen_fast.memory.plan import MemoryPlan, Switches

PLAIN = MemoryPlan.plain(layers=3)
CAPTURED = replace(PLAIN, capture=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resident_layers": -1}, "resident_layers must be a whole number of at least 0, got -1"),
        ({"resident_layers": True}, "at least 0, got True"),
        ({"resident_layers": 2.0}, "at least 0, got 2.0"),
        ({"resident_layers": None}, "at least 0, got None"),
        ({"cache": "disk"}, "cache must be one of 'device', 'ring', 'none', got 'disk'"),
        ({"cache": None}, "got None"),
        ({"cache": ["ring"]}, r"got \['ring'\]"),
        ({"branches_per_pass": 0}, r"at least 1 \(or None for all branches\), got 0"),
        ({"branches_per_pass": False}, "branches_per_pass .* got False"),
        ({"mlp_rows": 0}, "mlp_rows must be a whole number of at least 1, got 0"),
        ({"mlp_rows": None}, "mlp_rows .* got None"),
        ({"strip_rows": 0}, r"strip_rows .* \(or None for the whole image\), got 0"),
        ({"strip_rows": "16"}, "strip_rows .* got '16'"),
        ({"kept_bytes": -1}, "kept_bytes must be a whole number of at least 0, got -1"),
        ({"kept_bytes": "1GiB"}, "kept_bytes .* got '1GiB'"),
        ({"capture": 1}, "capture must be True or False, got 1"),
        ({"vae_resident": None}, "vae_resident must be True or False, got None"),
        ({"strips_on_host": "no"}, "strips_on_host must be True or False, got 'no'"),
        ({"capture": True, "cache": "ring"}, "capture=True needs cache='device', got cache='ring'"),
        ({"capture": True, "cache": "none"}, "set capture=False"),
    ],
)
def test_bad_values(changes, says):
    with pytest.raises(RequestError, match=says) as caught:
        replace(PLAIN, **changes)
    assert str(caught.value).startswith("MemoryPlan: ")


def test_the_least_values():
    plan = replace(PLAIN, resident_layers=0, branches_per_pass=1, mlp_rows=1, strip_rows=1)
    plan.check(layers=3)
    CAPTURED.check(layers=3)


def test_more_layers_than_the_model_has():
    with pytest.raises(RequestError, match=r"resident_layers must be at most 3, .* got 99"):
        replace(PLAIN, resident_layers=99).check(layers=3)


def test_a_graph_can_not_record_streamed_layers():
    with pytest.raises(RequestError, match="needs all 3 layers resident, got resident_layers=2"):
        replace(CAPTURED, resident_layers=2).check(layers=3)


@pytest.mark.parametrize("plan", [PLAIN, CAPTURED, replace(PLAIN, cache="none")])
@pytest.mark.parametrize("use", [None, True, False])
@pytest.mark.parametrize("offload_cache", [None, True, False])
@pytest.mark.parametrize("offload_model", [None, True, False])
@pytest.mark.parametrize("apart", [None, True, False])
def test_switches_leave_a_valid_plan(plan, use, offload_cache, offload_model, apart):
    switches = Switches(use, offload_cache, offload_model, apart)
    found = switches.applied_to(plan, layers=3)
    found.check(layers=3)
    if use is not None:
        assert (found.cache != "none") == use
    if offload_cache is not None and use is not False:
        assert found.cache == ("ring" if offload_cache else "device")
    if offload_model is not None:
        assert found.resident_layers == (0 if offload_model else 3)
    if apart is not None:
        assert found.branches_per_pass == (1 if apart else None)
    streams = found.cache != "device" or found.resident_layers < 3
    assert found.capture == (plan.capture and not streams)


def test_switches_hide_no_mistake():
    """What was wrong before a switch is still said."""
    plan = replace(CAPTURED, resident_layers=1)
    with pytest.raises(RequestError, match="capture"):
        Switches(separate_cfg_infer=True).applied_to(plan, layers=3).check(layers=3)


def test_offloading_does_nothing_on_the_host():
    every = Switches(True, True, True, True)
    assert every.for_device(on_host=False) == every
    assert every.for_device(on_host=True) == Switches(use_kv_cache=True, separate_cfg_infer=True)


@pytest.mark.parametrize(
    "plan", [MemoryPlan.plain(99), MemoryPlan.plain(1, capture=True)], ids=["layers", "capture"]
)
def test_a_pipeline_refuses_it_early(shared_pipe, plan):
    with pytest.raises(RequestError, match="MemoryPlan: "):
        OmniGenPipeline.from_pretrained(TINY, device="cpu", memory=plan)
    steps = []
    with pytest.raises(RequestError, match="MemoryPlan: "):
        shared_pipe(
            "a cat",
            height=32,
            width=32,
            memory=plan,
            progress=False,
            callback_on_step_end=lambda *args: steps.append(1),
        )
    assert not steps


@pytest.mark.parametrize("amount", [8, "12"])
def test_an_amount_without_its_unit(shared_pipe, amount):
    with pytest.raises(RequestError, match=f'"{amount}GiB"'):
        shared_pipe("a cat", height=32, width=32, memory=amount, progress=False)
    with pytest.raises(RequestError, match=f'"{amount}GiB"'):
        OmniGenPipeline.from_pretrained(TINY, device="cpu", memory=amount)
