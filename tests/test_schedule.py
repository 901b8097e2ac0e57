"""Schedules: what the engine makes of them is what is computed by hand, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, relative_error
from recording import recording_graphs

from omnigen_fast import profiles
from omnigen_fast.config import released_sizes
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.cost import Estimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.memory.terms import total_bytes
from omnigen_fast.precision import Precision
from omnigen_fast.schedule import ALL_BRANCHES, StepKind, StepSchedule

PLAN = MemoryPlan.plain(layers=3, kept_bytes=16 << 20)
PHOTOS = [str(GOLDEN / "images" / name) for name in ("coffee.png", "cat.png")]
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 7,
    "guidance_scale": 2.5,
    "seed": 11,
    "max_input_image_size": 96,
    "output_type": "latent",
}
EDIT = {**TEXT, "prompt": "<img><|image_1|></img> no cup", "input_images": PHOTOS[:1]}
BATCH = {**TEXT, "prompt": [TEXT["prompt"], EDIT["prompt"]], "input_images": [[], PHOTOS[:1]]}
REQUESTS = {"text": TEXT, "edit": EDIT, "batch": BATCH}
# Requests that have but one branch: that of the whole condition, the negative prompt, the images.
ONE_BRANCH = (
    {"guidance_scale": 1.0, "img_guidance_scale": 1.0},
    {"guidance_scale": 0.0, "img_guidance_scale": 0.0},
    {"guidance_scale": 0.0, "img_guidance_scale": 1.0},
)
FIRST = StepKind(branches=(0,), coefficients=(1.0,))
PAIR = StepKind(branches=(0, 1), coefficients=(2.0, -1.0))
OWN = StepKind(branches=(1, 0))  # with the request's own coefficients


def again(kind: StepKind) -> StepKind:
    """A step that uses the velocities of the one before."""
    return replace(kind, computed=False)


KINDS = {
    "one branch": (FIRST,) * 7,
    "in turns": (ALL_BRANCHES, FIRST, PAIR, ALL_BRANCHES, OWN, FIRST, FIRST),
    "extrapolated": (
        *(ALL_BRANCHES, again(ALL_BRANCHES), again(ALL_BRANCHES)),
        *(PAIR, again(PAIR), FIRST, again(FIRST)),
    ),
}
UNEVEN = (0.0, 0.05, 0.1, 0.3, 0.35, 0.6, 0.9, 1.0)
TIMES = {"equal steps": None, "uneven": UNEVEN}


def by_hand(pipe, request, schedule: StepSchedule) -> torch.Tensor:
    """Euler steps over velocities, each of a request that has no other branch, in float64."""
    engine, times = pipe.engine, schedule.tensor()
    pictures = pipe.make_call(**request).pictures
    z = pipe.make_call(**request).latents.double()

    def velocity(step: int, branch: int) -> torch.Tensor:
        """Of all pictures; of one without images the branch of the images is no branch."""
        call = pipe.make_call(**{**request, **ONE_BRANCH[branch]})
        call.schedule = StepSchedule((ALL_BRANCHES,) * len(schedule), schedule.times)
        call.latents, call.steps_done = z.float(), step
        running = engine.start(call, PLAN)
        engine.step(running)
        found = (running.latents.double() - z.float()) / times.diff().double()[step]
        engine.drop(running)
        return found

    combined = torch.zeros_like(z)
    for step, kind in enumerate(schedule.kinds):
        if kind.computed:
            combined = torch.zeros_like(z)
            places = kind.branches or range(3)
            for order, place in enumerate(places):
                found = None
                for picture, branches in enumerate(pictures):
                    if place >= len(branches):
                        continue
                    found = velocity(step, place) if found is None else found
                    weight = branches[place][1]
                    if kind.coefficients is not None:
                        weight = kind.coefficients[order]
                    combined[picture] += weight * found[picture]
        z += times.diff().double()[step] * combined
    return z


def carried_out(pipe, request, schedule: StepSchedule, plan: MemoryPlan = PLAN) -> torch.Tensor:
    engine, call = pipe.engine, pipe.make_call(**request)
    call.schedule = schedule
    running = engine.start(call, plan)
    while not running.finished:
        engine.step(running)
    return engine.finish(running)


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_schedule_is_what_is_computed_by_hand(pipe, request_, kinds, times):
    schedule = StepSchedule(kinds, times)
    expected = by_hand(pipe, request_, schedule)
    assert relative_error(carried_out(pipe, request_, schedule), expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"branches_per_pass": 1},
        {"cache": "none"},
        {"resident_layers": 1, "cache": "ring"},
        {"capture": True},
    ],
    ids=lambda change: ", ".join(change),
)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_under_any_plan(pipe, monkeypatch, kinds, change):
    graphs, _ = recording_graphs()
    monkeypatch.setattr(pipe.engine, "graphs", graphs)
    plan, schedule = replace(PLAN, **change), StepSchedule(kinds, UNEVEN)
    expected = carried_out(pipe, BATCH, schedule)
    for _ in range(2):  # captured steps are taken over by the second call
        found = carried_out(pipe, BATCH, schedule, plan)
        if "capture" in change:
            assert torch.equal(found, expected)
        assert relative_error(found, expected) < 1e-5


def test_every_kind_is_captured_once(pipe, monkeypatch):
    """That comes often enough, extrapolated ones too; the others run one kernel at a time."""
    graphs, events = recording_graphs()
    monkeypatch.setattr(pipe.engine, "graphs", graphs)
    kinds = (FIRST, *(again(FIRST),) * 3, PAIR, *(FIRST,) * 3)
    plan, schedule = replace(PLAN, capture=True), StepSchedule(kinds)
    expected = carried_out(pipe, EDIT, schedule)
    assert not events
    assert torch.equal(carried_out(pipe, EDIT, schedule, plan), expected)
    assert events.count("capture") == 2 and events.count("replay") == 5
    assert torch.equal(carried_out(pipe, EDIT, schedule, plan), expected)
    assert events.count("capture") == 2 and events.count("replay") == 12


def test_what_is_kept_is_not_that_of_other_times(pipe):
    """As many steps, but the keys and values of their time tokens are others."""
    schedules = [StepSchedule((ALL_BRANCHES,) * 7, times) for times in (None, UNEVEN)]
    expected = []
    for schedule in schedules:
        pipe.clear_cache()
        expected.append(carried_out(pipe, EDIT, schedule))
    assert relative_error(*expected) > 1e-2
    for schedule, one in zip(schedules * 2, expected * 2):
        assert torch.equal(carried_out(pipe, EDIT, schedule), one)


PLANNED = [
    (MemoryPlan.plain(32, capture=True), "a800"),
    (replace(MemoryPlan.plain(32), cache="none", branches_per_pass=1), "rtx3090"),
    (replace(MemoryPlan.plain(0), cache="ring"), "rtx3090"),
]


class TestPlanner:
    @staticmethod
    def estimate(kinds, profile: str) -> Estimate:
        workload = typical_workload(1024, 1024, images=1)
        workload = replace(workload, schedule=StepSchedule(kinds))
        sizes, vae, precision = released_sizes(), VaeShape(), Precision.of("bfloat16")
        return Estimate(sizes, vae, precision, workload, profiles.load(profile))

    @pytest.mark.parametrize(("plan", "profile"), PLANNED)
    def test_seconds_are_the_sum_over_kinds(self, plan, profile):
        def seconds(*kinds: StepKind) -> float:
            cost = self.estimate(kinds, profile).cost(plan)
            assert cost.seconds == pytest.approx(
                self.estimate(kinds, profile).seconds.of(plan), rel=1e-9
            )
            return cost.seconds

        every, first = seconds(*[ALL_BRANCHES] * 12), seconds(*[FIRST] * 12)
        pair = seconds(*[PAIR] * 12)
        assert first < pair < every
        mixed = seconds(*[ALL_BRANCHES] * 6, *[FIRST] * 4, *[PAIR] * 2)
        assert mixed == pytest.approx((6 * every + 4 * first + 2 * pair) / 12, rel=1e-9)
        # the steps between cost nothing: all that depends on their number is in `every`
        half = seconds(*[ALL_BRANCHES, again(ALL_BRANCHES)] * 6)
        quarter = seconds(*[ALL_BRANCHES, *[again(ALL_BRANCHES)] * 3] * 3)
        assert every - half == pytest.approx(2 * (half - quarter), rel=1e-9)

    @pytest.mark.parametrize(("plan", "profile"), PLANNED)
    def test_bytes_are_those_of_the_widest_kind(self, plan, profile):
        def loop(*kinds: StepKind) -> int:
            return total_bytes(self.estimate(kinds, profile).bytes.denoise(plan))

        every = loop(*[ALL_BRANCHES] * 12)
        assert loop(*[FIRST] * 12) < every
        assert every == loop(*[ALL_BRANCHES, again(ALL_BRANCHES)] * 6)
        # and the rotary tables of each
        assert every < loop(*[ALL_BRANCHES, FIRST] * 6) < 1.1 * every
