"""Schedules: what the engine makes of them is what is computed by hand, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, relative_error
from recording import recording_graphs
from step_cases import CHANGES, PLAN, assert_packed_is_alone, under

from omnigen_fast import profiles
from omnigen_fast.config import released_sizes
from omnigen_fast.errors import RequestError
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.cost import Estimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.memory.terms import total_bytes
from omnigen_fast.precision import Precision
from omnigen_fast.schedule import ALL_BRANCHES, StepKind, StepSchedule

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


def velocity(pipe, request, times, z: torch.Tensor, step: int, branch: int) -> torch.Tensor:
    """Of one branch at `z`, all pictures; of one without images that of the images is no branch."""
    engine, call = pipe.engine, pipe.make_call(**{**request, **ONE_BRANCH[branch]})
    steps = request["num_inference_steps"]
    call.schedule = StepSchedule((ALL_BRANCHES,) * steps, times)
    call.latents, call.steps_done = z.float(), step
    running = engine.start(call, PLAN)
    engine.step(running)
    length = call.schedule.tensor().diff().double()[step]
    found = (running.latents.double() - z.float()) / length
    engine.drop(running)
    return found


def by_hand(pipe, request, schedule: StepSchedule) -> torch.Tensor:
    """Euler steps over velocities, each of a request that has no other branch, in float64."""
    times = schedule.tensor()
    pictures = pipe.make_call(**request).pictures
    z = pipe.make_call(**request).latents.double()
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
                    if found is None:
                        found = velocity(pipe, request, schedule.times, z, step, place)
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


@under(*CHANGES)
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


# (of the text, of the images), and which of the seven steps each of them guides
INTERVALS = {
    "text early": ((0, 0.5), None, (0, 1, 2, 3), range(7)),
    "images late": (None, (0.5, 1), range(7), (4, 5, 6)),
    "apart": ((2 / 7, 5 / 7), (0, 3 / 7), (2, 3, 4), (0, 1, 2)),
    "never": ((0.9, 1), (0.9, 1), (), ()),
}


def guided(request, text, image):
    return {**request, "guidance_interval": text, "image_guidance_interval": image}


def guided_by_hand(pipe, request, text_steps, image_steps) -> torch.Tensor:
    """Guidance as InstructPix2Pix writes it, with a scale of 1 outside an interval."""
    z = pipe.make_call(**request).latents.double()
    images = [[]] if isinstance(request["prompt"], str) else request["input_images"]
    images = [request.get("input_images", [])] if len(images) == 1 else images
    for step in range(7):
        text = request["guidance_scale"] if step in text_steps else 1.0
        image = 1.6 if step in image_steps else 1.0
        cond, uncond = (velocity(pipe, request, None, z, step, branch) for branch in (0, 1))
        img = velocity(pipe, request, None, z, step, 2) if any(images) else uncond
        for picture, given in enumerate(images):
            c, u, i = cond[picture], uncond[picture], img[picture]
            if given:
                z[picture] += (u + image * (i - u) + text * (c - i)) / 7
            else:
                z[picture] += (u + text * (c - u)) / 7
    return z


class TestGuidanceInterval:
    @pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
    @pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
    def test_is_what_is_computed_by_hand(self, pipe, request_, interval):
        text, image, text_steps, image_steps = interval
        expected = guided_by_hand(pipe, request_, text_steps, image_steps)
        found = pipe(**guided(request_, text, image), progress=False)
        assert relative_error(found, expected) < 1e-5

    @pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
    def test_all_of_the_time_is_none(self, pipe, request_):
        whole = guided(request_, (0, 1), [0.0, 1.0])
        schedule = pipe.make_call(**whole).schedule
        assert schedule == pipe.make_call(**request_).schedule == StepSchedule.euler(7)
        expected = pipe(**request_, progress=False)
        assert torch.equal(pipe(**whole, progress=False), expected)

    @pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
    def test_a_batch_is_each_prompt_alone(self, pipe, interval):
        noise = pipe.make_call(**BATCH).latents
        batch = guided({**BATCH, "seed": None, "progress": False}, *interval[:2])
        assert_packed_is_alone(pipe, batch, noise)

    @under(*CHANGES)
    def test_under_any_plan(self, pipe, monkeypatch, change):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        request = guided({**BATCH, "progress": False}, *INTERVALS["apart"][:2])
        expected = pipe(**request, memory=PLAN)
        for _ in range(2):
            found = pipe(**request, memory=replace(PLAN, **change))
            assert relative_error(found, expected) < 1e-5
            assert torch.equal(found, expected) or "capture" not in change
        # three of the four kinds come too seldom
        assert events.count("capture") == 0

    def test_each_kind_is_captured_once(self, pipe, monkeypatch):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        request = guided({**EDIT, "progress": False}, (0, 0.5), (0, 0.5))
        assert [len(one) for one in pipe.make_call(**request).pictures] == [3]
        plan = replace(PLAN, capture=True)
        expected = pipe(**request, memory=PLAN)
        for _ in range(2):
            assert torch.equal(pipe(**request, memory=plan), expected)
        assert events.count("capture") == 2 and events.count("replay") == 5 + 7

    @pytest.mark.parametrize(
        ("request_", "text", "image", "branches"),
        [
            (TEXT, (0, 0.5), None, [2, 2, 2, 2, 1, 1, 1]),
            (TEXT, (1 / 7, 2 / 7), None, [1, 2, 1, 1, 1, 1, 1]),  # the first bound belongs to it
            (EDIT, (0, 0.5), (0, 0.5), [3, 3, 3, 3, 1, 1, 1]),
            (EDIT, (0, 0.5), None, [3] * 7),
            (EDIT, None, (0, 0.5), [3, 3, 3, 3, 2, 2, 2]),
        ],
    )
    def test_branches_that_count_nothing_are_not_run(self, pipe, request_, text, image, branches):
        workload = pipe.make_call(**guided(request_, text, image)).workload()
        found = [len(workload.branches_of(kind)[0]) for kind in workload.schedule.kinds]
        assert found == branches

    def test_what_no_step_runs_is_not_computed(self, pipe):
        request = guided(EDIT, (0.9, 1), (0.9, 1))
        call = pipe.make_call(**request)
        assert len(call.entries(PLAN)) == 1
        assert torch.equal(
            pipe(**request, progress=False),
            pipe(**EDIT | {"guidance_scale": 1, "img_guidance_scale": 1}, progress=False),
        )

    def test_without_a_cache_a_step_computes_its_own_conditions(self, pipe, monkeypatch):
        seen = []
        plain = pipe.model.step_recomputed

        def counted(latents, pos_embed, passes, times, states, *rest):
            seen.append(len(states))
            return plain(latents, pos_embed, passes, times, states, *rest)

        monkeypatch.setattr(pipe.model, "step_recomputed", counted)
        pipe(**guided(EDIT, (0, 0.5), (0, 0.5)), progress=False, use_kv_cache=False)
        assert seen == [3, 3, 3, 3, 1, 1, 1]

    def test_a_plan_counts_what_is_run(self, pipe):
        every, half, none = (
            pipe.plan(**guided(EDIT, stop and (0, stop), stop and (0, stop))).cost.seconds
            for stop in (None, 0.5, 0.1)
        )
        assert none < half < every

    @pytest.mark.parametrize("name", ["guidance_interval", "image_guidance_interval"])
    @pytest.mark.parametrize(
        "value",
        [(0.5, 0.5), (0.7, 0.2), (-0.1, 1), (0, 1.1), (0,), (0, 0.5, 1), 0.5, "01"]
        + [(0, float("nan")), (None, 1), {}],
        ids=str,
    )
    def test_refused(self, pipe, name, value):
        with pytest.raises(RequestError, match=f"^{name} must be two times") as caught:
            pipe(**TEXT, **{name: value})
        assert len(str(caught.value)) <= 300


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
