"""Predicted bytes against those that the pipeline's own code makes; predicted work and time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from dry_run import CONFIG, as_edit, peaks, random_case
from omnigen_fast.kernels import ops

from omnigen_fast import profiles
from omnigen_fast.config import released_sizes
from omnigen_fast.forms import CACHES, FORMS, PRODUCTS
from omnigen_fast.memory.autoencoder import VaeShape, decode_bytes, encode_bytes
from omnigen_fast.memory.cost import Estimate, cost
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.memory.seconds import step_flops
from omnigen_fast.memory.terms import total_bytes, total_seconds
from omnigen_fast.precision import Precision
from omnigen_fast.schedule import ALL_BRANCHES, StepKind, StepSchedule
from omnigen_fast.solvers import SOLVERS

pytestmark = pytest.mark.early

A800, RTX3090 = profiles.load("a800"), profiles.load("rtx3090")
PLAIN = MemoryPlan.plain(layers=32)
# Bytes that both sides count alike, whatever is done with them.
FIXED = ("layers", "other weights", "cache", "ring of layers", "expanded layer")

BFLOAT16 = Precision.of("bfloat16")


def estimate_of(workload, profile=A800):
    return Estimate(released_sizes(), VaeShape(), BFLOAT16, workload, profile)


@pytest.mark.slow_except("0")
@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_those_of_the_pipeline(seed):
    """To 2 % of what there is beside weights and caches, which is far less than 2 % of all."""
    rng = random.Random(seed)
    for place in range(21):
        storage = rng.choice((None, *FORMS)) if place % 2 else None
        compute = rng.choice((None, *PRODUCTS)) if place % 3 else None
        cache = rng.choice((None, *CACHES)) if place % 5 else None
        call, plan = random_case(rng, storage, compute, cache)
        if place % 3 == 0:
            kinds = (ALL_BRANCHES, StepKind(branches=(0,)))
            kinds = tuple(rng.choice(kinds) for _ in range(len(call.schedule)))
            call.schedule = StepSchedule(kinds, None, rng.choice(SOLVERS))
        elif place % 6 == 1:
            computed = [step % 3 < 2 for step in range(len(call.schedule))]
            kinds = tuple(replace(ALL_BRANCHES, computed=one) for one in computed)
            call.schedule = StepSchedule(kinds, None, SOLVERS[place % 5], order=1 + place % 2)
        if place % 4 == 0:
            as_edit(call)
        found = peaks(call, plan)
        exact = {name: found.pop(name) for name in ("positions", "latents")}
        assert set(found) == ({"denoise"} if plan.cache == "none" else {"prefill", "denoise"})
        estimate = Estimate(CONFIG, VaeShape(), call.precision, call.workload(), A800)
        for phase, counted in found.items():
            terms = list(getattr(estimate.bytes, phase)(plan))
            assert {one.name: one.bytes for one in terms if one.name in exact} == exact
            predicted = total_bytes(terms) - estimate.bytes.context_bytes
            fixed = total_bytes(term for term in terms if term.name in FIXED)
            assert predicted - fixed == pytest.approx(counted - fixed, rel=0.02), (phase, plan)


@pytest.mark.parametrize("seed", range(2))
def test_bytes_of_a_librarys_attention(seed):
    """Two outputs and their log-sum-exps beside a pass, likewise to 2 %."""
    rng = random.Random(seed)
    for _ in range(6):
        call, plan = random_case(rng, None, None, None)
        with ops.use(attention="flash"):
            counted = peaks(call, plan)["denoise"]
        predicted = []
        for attention in ("flash", "triton"):
            precision = replace(call.precision, attention=attention)
            estimate = Estimate(CONFIG, VaeShape(), precision, call.workload(), A800)
            terms = list(estimate.bytes.denoise(plan))
            fixed = total_bytes(term for term in terms if term.name in FIXED)
            predicted.append(total_bytes(terms) - estimate.bytes.context_bytes - fixed)
        assert predicted[0] == pytest.approx(counted - fixed, rel=0.02), plan
        assert predicted[1] < predicted[0]


def test_operations_of_a_step():
    """The figures of 1024 px with guidance: no, one and two input images."""
    for images, tera in enumerate((72.9, 122.5, 135.7)):
        workload = typical_workload(1024, 1024, images=images)
        assert step_flops(released_sizes(), workload) / 1e12 == pytest.approx(tera, rel=0.002)


def test_autoencoder_phases():
    workload = typical_workload(1024, 768, images=1, max_input_image_size=512, pictures=2)
    estimate, shape = estimate_of(workload), VaeShape()
    for plan in (PLAIN, replace(PLAIN, vae_resident=False, strip_rows=16, strips_on_host=True)):
        host = plan.strips_on_host
        phases = cost(released_sizes(), shape, BFLOAT16, workload, plan, A800).phases
        found = {term.name: term.bytes for term in phases["decode"]}
        assert found["decode"] == decode_bytes(
            shape, 1024, 768, plan.strip_rows, host_store=host, pictures=2
        )
        assert {term.name: term.bytes for term in phases["encode"]}["encode"] == encode_bytes(
            shape, 512, 512, plan.strip_rows, host_store=host
        )
        # moved or resident, its weights are there once
        assert found["VAE"] == estimate.bytes.vae_bytes
        assert [term.name for term in phases["decode"]].count("VAE") == 1
        denoising = {term.name for term in phases["denoise"]}
        assert ("VAE" in denoising) == plan.vae_resident


def test_rings_are_gone_before_the_decode():
    workload = typical_workload(1024, 1024, images=1)
    plan = replace(PLAIN, resident_layers=0, cache="ring")
    phases = estimate_of(workload).cost(plan).phases
    rings = {"ring of layers", "ring of caches"}
    assert rings <= {term.name for term in phases["denoise"]}
    assert not rings & {term.name for term in phases["decode"]}


def test_a_recording_keeps_its_memory():
    """The loop's, in each phase but its own, where a later call takes that loop over."""
    estimate = estimate_of(typical_workload(512, 512, images=1))
    eager, captured = (estimate.cost(replace(PLAIN, capture=capture)) for capture in (False, True))
    loop = estimate.bytes.loop_bytes(PLAIN)
    for name, terms in captured.phases.items():
        more = total_bytes(terms) - total_bytes(eager.phases[name])
        assert more == (0 if name == "denoise" else loop)
    assert len(captured.phases) == 4
    assert captured.seconds < eager.seconds


@pytest.mark.parametrize("images", range(3))
@pytest.mark.parametrize("profile", [A800, RTX3090], ids=lambda one: one.name)
def test_streaming_hides_behind_the_computation(profile, images):
    estimate = estimate_of(typical_workload(1024, 1024, images=images), profile)
    resident, streamed = (estimate.cost(replace(PLAIN, resident_layers=some)) for some in (32, 0))
    assert resident.seconds < streamed.seconds < 1.1 * resident.seconds


def test_streaming_does_not_hide_where_a_step_is_short():
    """An H200's step at 512 px computes for less time than its weights travel."""
    workload = typical_workload(512, 512)
    estimate = estimate_of(workload, profiles.load("h200"))
    plan = replace(PLAIN, resident_layers=0)
    streamed = estimate.cost(plan)
    waiting = {one.name: one.seconds for one in streamed.durations}["waiting"]
    assert waiting > 0.5 * streamed.seconds
    link = estimate.bytes.profile.link_bytes_per_second
    least = workload.steps * 32 * estimate.bytes.layer_bytes / link
    assert streamed.seconds > least


def test_seconds_are_the_sum_of_the_durations():
    rng = random.Random(5)
    for _ in range(50):
        call, plan = random_case(rng)
        plain = MemoryPlan.plain(CONFIG.num_layers)
        for current in (None, plain, replace(plain, resident_layers=3, vae_resident=False)):
            estimate = Estimate(CONFIG, VaeShape(), BFLOAT16, call.workload(), RTX3090)
            found = estimate.cost(plan, current)
            assert min(one.seconds for one in found.durations) > -1e-9
            assert total_seconds(found.durations) == pytest.approx(
                estimate.seconds.of(plan, current), rel=1e-9
            )


def test_recomputing_costs_time_and_saves_the_cache():
    workload = typical_workload(1024, 1024, images=2)
    kept, recomputed = (
        estimate_of(workload).cost(replace(PLAIN, cache=cache)) for cache in ("device", "none")
    )
    assert recomputed.seconds > 1.5 * kept.seconds
    saved = total_bytes(kept.denoise) - total_bytes(recomputed.denoise)
    assert saved > 0.8 * estimate_of(workload).bytes.arena_bytes(PLAIN)


def test_a_shared_prefix_is_kept_and_computed_once():
    apart, together = (
        typical_workload(1024, 1024, images=1, image_first=first) for first in (False, True)
    )
    saved = apart.cache_rows() - together.cache_rows()
    assert 4096 <= saved < 4130  # the image's tokens, and what stands before them
    first, second = (estimate_of(one).cost(PLAIN) for one in (apart, together))
    assert total_bytes(first.prefill) - total_bytes(second.prefill) > saved * 393_216
    assert second.seconds < first.seconds
