"""Reuse and presets: which steps are computed, what becomes of the others, and who decides."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, relative_error
from recording import recording_graphs
from step_cases import CHANGES, PLAN, assert_packed_is_alone, under

from omnigen_fast import fewer_steps
from omnigen_fast.denoise import Loop
from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.fewer_steps import QUALITIES, computed_steps, fitted_timesteps, table
from omnigen_fast.memory.seconds import steps_flops
from omnigen_fast.schedule import ALL_BRANCHES, StepKind, StepSchedule
from omnigen_fast.solvers import SOLVERS
from omnigen_fast.step_values import ReuseValues

PHOTOS = [str(GOLDEN / "images" / name) for name in ("coffee.png", "cat.png")]
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 14,
    "guidance_scale": 2.5,
    "seed": 11,
    "max_input_image_size": 96,
    "output_type": "latent",
    "progress": False,
    "reuse": 5e-3,
}
EDIT = {**TEXT, "prompt": "<img><|image_1|></img> no cup", "input_images": PHOTOS[:1]}
BATCH = {**TEXT, "prompt": [TEXT["prompt"], EDIT["prompt"]], "input_images": [[], PHOTOS[:1]]}
ALONE = {**TEXT, "guidance_scale": 1}  # one branch
INTERVALS = {"guidance_interval": (0, 0.6), "image_guidance_interval": (0, 0.4)}
SKIPPED = replace(ALL_BRANCHES, computed=False)


def flags(schedule: StepSchedule) -> list[bool]:
    return [kind.computed for kind in schedule.kinds]


def equal(steps: int) -> list[float]:
    return [step / steps for step in range(steps + 1)]


class TestSchedule:
    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 100, 1000])
    @pytest.mark.parametrize("threshold", [0, 1e-9, 1e-4, 4e-3, 1000])
    def test_first_and_last_steps_are_computed(self, steps, threshold):
        found = computed_steps(equal(steps), [True] + [False] * (steps - 1), threshold)
        assert len(found) == steps and all(found[:2]) and found[-1]
        assert all(found) or threshold > 0
        if threshold == 1000:
            assert sum(found) == min(steps, 3)

    def test_a_larger_threshold_computes_no_more(self):
        counts = [
            sum(computed_steps(equal(50), [True] + [False] * 49, threshold))
            for threshold in np.geomspace(1e-7, 10, 40)
        ]
        assert counts == sorted(counts, reverse=True) and counts[0] == 50 and counts[-1] == 3

    def test_steps_lie_dense_where_velocities_bend(self, monkeypatch):
        """By hand: the error of each gap is below the threshold, and with one step more above."""
        profile = {"times": [0, 0.5, 1], "curvatures": [12 / 5 * 8, 12 / 5]}
        monkeypatch.setattr(fewer_steps, "table", lambda: {"reuse": {"profile": profile}})
        found = computed_steps(equal(100), [True] + [False] * 99, 0.1**3)
        kept = [step / 100 for step, computed in enumerate(found) if computed]
        gaps = [after - before for before, after in pairwise(kept)]
        # the cube root of 8 h^3 is at most 0.1, then that of h^3
        assert gaps[2:9] == pytest.approx([0.06] * 7)
        assert gaps[-4:-1] == pytest.approx([0.11] * 3, abs=0.011)

    def test_a_change_of_guidance_begins_anew(self, pipe):
        request = {**TEXT, "guidance_interval": (0, 0.5), "num_inference_steps": 20, "reuse": 1.0}
        found = flags(pipe.make_call(**request).schedule)
        assert [step for step, one in enumerate(found) if one] == [0, 1, 10, 11, 19]

    def test_fitted_timesteps_add_equal_errors(self):
        found = [*fitted_timesteps(25), 1.0]
        gaps = np.diff(fewer_steps._places(found))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-9)
        assert found[0] == 0 and (np.diff(found) > 0).all()

    def test_weights_are_those_of_a_line(self):
        kinds = (ALL_BRANCHES, ALL_BRANCHES, SKIPPED, SKIPPED, ALL_BRANCHES, SKIPPED)
        times = (0, 0.1, 0.3, 0.4, 0.5, 0.8, 1)
        rows = StepSchedule(kinds, times, order=1).extrapolations()
        np.testing.assert_allclose(rows[2], (3, -2, 0))  # 0.3 from 0.1 and 0
        np.testing.assert_allclose(rows[3], (4, -3, 0))
        np.testing.assert_allclose(rows[5], (1.75, -0.75, 0))  # 0.8 from 0.5 and 0.1
        assert [row[-1] for row in rows] == [1, 1, 0, 0, 1, 0]

    def test_after_a_change_one_velocity_is_used_again(self):
        other = StepKind(branches=(0,), coefficients=(1.0,))
        kinds = (ALL_BRANCHES, ALL_BRANCHES, other, replace(other, computed=False))
        assert StepSchedule(kinds, order=1).extrapolations()[3] == (1, 0, 0)

    @pytest.mark.parametrize("order", [1, 2])
    def test_kept_velocities_of_a_polynomial_are_exact(self, order):
        kinds = (*(ALL_BRANCHES,) * 3, SKIPPED, SKIPPED, ALL_BRANCHES, SKIPPED)
        times = (0, 0.1, 0.15, 0.3, 0.5, 0.6, 0.9, 1)
        schedule = StepSchedule(kinds, times, order=order)
        latents = torch.zeros(2, 4, 2, 2)
        values = ReuseValues.make(schedule, latents)
        for step, kind in enumerate(kinds):
            at = torch.tensor([step, step])
            velocity = torch.full_like(latents, 2 - 3 * times[step] + order * times[step] ** order)
            if kind.computed:
                values.keep_(velocity, at)
            else:
                values.extrapolate(at, out=latents)
                torch.testing.assert_close(latents, velocity)


class TestPictures:
    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("request_", [ALONE, TEXT, EDIT], ids=["1", "2", "3 branches"])
    def test_by_hand(self, pipe, request_, solver):
        """The solver's table in float64 over velocities; those not computed lie on a line."""
        call = pipe.make_call(**request_, solver=solver)
        schedule = call.schedule
        assert 4 < sum(flags(schedule)) < 14
        seen: list[torch.Tensor] = []
        plain = Loop._combine

        def combine(loop, kind, moved):
            plain(loop, kind, moved)
            seen.append(moved.double())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_combine", combine)
            found = pipe(**request_, solver=solver)
        assert len(seen) == schedule.computed
        z, history, kept = call.latents.double(), torch.zeros_like(found).double(), []
        updates = iter(schedule.updates([True] + [False] * 13))
        times = iter(schedule.evaluated or schedule.ends[:-1])
        for kind, count in zip(schedule.kinds, schedule.per_step):
            for place in range(count):
                at, update = next(times), next(updates)
                if kind.computed:
                    v = seen.pop(0)
                    kept = [(at, v), *kept[:1]] if place == 0 else kept
                else:
                    (t, v), (before, older) = kept
                    v = v + (at - t) / (t - before) * (v - older)
                z, history = (
                    update.latents * z + update.velocity * v + update.history * history,
                    update.kept_latents * z + update.kept_velocity * v,
                )
        assert relative_error(found, z) < 1e-5

    @pytest.mark.parametrize("options", [{}, INTERVALS], ids=["always", "intervals"])
    def test_a_batch_is_each_prompt_alone(self, pipe, options):
        """The steps too: each picture decides as it does alone."""
        noise = pipe.make_call(**BATCH).latents
        batch = {**BATCH, "seed": None, "solver": "ab2", **options}
        assert_packed_is_alone(pipe, batch, noise)
        made = [
            pipe.make_call(**{**one, "solver": "ab2", **options}) for one in (TEXT, EDIT, BATCH)
        ]
        first, *others = [flags(call.schedule) for call in made]
        assert others == [first, first] and not all(first)

    @under(*CHANGES, {"strip_rows": 4})
    @pytest.mark.parametrize("solver", ["euler", "midpoint"])
    def test_under_any_plan(self, pipe, monkeypatch, solver, change):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        request = {**BATCH, "solver": solver}
        expected = pipe(**request, memory=PLAN)
        for _ in range(2):
            found = pipe(**request, memory=replace(PLAN, **change))
            assert relative_error(found, expected) < 1e-5
            assert torch.equal(found, expected) or "capture" not in change
        assert events.count("capture") == 2 * ("capture" in change)

    def test_a_capture_serves_other_thresholds(self, pipe, monkeypatch):
        """Which steps are computed is not recorded with them."""
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        requests = [{**EDIT, "reuse": threshold} for threshold in (5e-3, 2e-3, 2e-2)]
        expected = [pipe(**request, memory=PLAN) for request in requests]
        for request, one in zip(requests, expected):
            assert torch.equal(pipe(**request, memory=replace(PLAN, capture=True)), one)
        assert events.count("capture") == 2

    @pytest.mark.parametrize("at", [3, 6])
    @pytest.mark.parametrize("solver", ["euler", "ab2"])
    def test_another_plan_goes_on_from_the_last_step(self, pipe, monkeypatch, at, solver):
        expected = pipe(**TEXT, solver=solver)
        left, plain = [at], Loop.predict

        def failing(loop, kind):
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("out of memory")
            return plain(loop, kind)

        monkeypatch.setattr(Loop, "predict", failing)
        assert relative_error(pipe(**TEXT, solver=solver), expected) < 1e-5
        assert left[0] < 0

    def test_masks_loras_and_callbacks(self, pipe):
        mask = np.zeros((64, 96), np.uint8)
        mask[16:40, 24:61] = 255
        image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
        edit = {**EDIT, "input_images": [image], "mask_image": mask, "output_type": "np"}
        edit |= {"use_input_image_size_as_output": True, "height": None, "width": None}
        seen = []
        pipe.load_lora_weights(GOLDEN / "lora")
        try:
            found = pipe(**edit, callback_on_step_end=lambda _, step, *rest: seen.append(step))
        finally:
            pipe.unload_lora_weights()
        assert seen == list(range(14)) and pipe.last_report.steps.extrapolated > 3
        assert ((found[0] * 255).round().astype(np.uint8)[mask == 0] == image[mask == 0]).all()
        assert np.abs(found - pipe(**edit)).max() > 1e-3  # the LoRA

    @pytest.mark.parametrize("value", ["off", 0, 0.0])
    def test_off_is_as_it_was(self, pipe, value):
        request = {**EDIT, "reuse": value}
        plain = {name: one for name, one in EDIT.items() if name != "reuse"}
        assert pipe.make_call(**request).schedule == StepSchedule.euler(14)
        assert torch.equal(pipe(**request, quality="exact"), pipe(**plain))

    def test_an_interval_of_all_the_time_is_none(self, pipe):
        whole = {"guidance_interval": (0, 1), "image_guidance_interval": [0.0, 1.0]}
        assert torch.equal(pipe(**EDIT, **whole), pipe(**EDIT))

    def test_the_error_falls_with_the_threshold(self, pipe):
        exact = pipe(**{**TEXT, "num_inference_steps": 40, "reuse": 0})
        errors = [
            relative_error(pipe(**{**TEXT, "num_inference_steps": 40, "reuse": one}), exact)
            for one in (1e-4, 1e-2, 1e3)
        ]
        assert errors == sorted(errors) and errors[0] < errors[2] / 10

    def test_the_summary_says_what_was_saved(self, pipe):
        pipe(**{**TEXT, "reuse": "off"})
        assert "steps: all 14 computed\n" in pipe.summary()
        pipe(**TEXT)
        workload = pipe.make_call(**TEXT).workload()
        computed = workload.schedule.computed
        share = 1 - steps_flops(pipe.config, workload) / steps_flops(pipe.config, workload, None)
        assert share == pytest.approx(1 - computed / 14)
        said = f"steps: {computed} of 14 computed; reuse saved {share:.0%} of their operations\n"
        assert said in pipe.summary()

    def test_plans_count_what_is_computed(self, pipe):
        seconds = [pipe.plan(**{**EDIT, "reuse": one}).cost.seconds for one in ("off", 5e-3, 1000)]
        assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 3


class TestPresets:
    def test_exact_is_the_defaults(self, pipe):
        import inspect

        defaults = inspect.signature(type(pipe).__call__).parameters
        assert table()["presets"].keys() == set(QUALITIES)
        for name, value in table()["presets"]["exact"].items():
            assert defaults[name].default == value
        assert all(
            one.keys() == table()["presets"]["exact"].keys() for one in table()["presets"].values()
        )

    @pytest.mark.parametrize("quality", QUALITIES)
    def test_gives_what_the_call_does_not(self, pipe, quality):
        plain = {
            name: one for name, one in TEXT.items() if name not in ("reuse", "num_inference_steps")
        }
        preset = fewer_steps.preset(quality)
        schedule = pipe.make_call(**plain, quality=quality).schedule
        assert schedule == pipe.make_call(**plain, **preset).schedule
        own = pipe.make_call(**plain, quality=quality, solver="euler", num_inference_steps=9)
        assert own.schedule.solver == "euler" and len(own.schedule) == 9
        given = [0, 0.1, 0.3]
        own = pipe.make_call(**plain, quality=quality, timesteps=given)
        assert own.schedule.times == (*given, 1) and own.schedule.solver == preset["solver"]
        found = pipe(**plain, quality=quality, num_inference_steps=6)
        expected = pipe(**plain, **{**preset, "num_inference_steps": 6})
        assert torch.equal(found, expected)

    def test_a_plan_predicts_their_time(self, pipe):
        plain = {
            name: one for name, one in TEXT.items() if name not in ("reuse", "num_inference_steps")
        }
        exact, high, fast = (pipe.plan(**plain, quality=one).cost.seconds for one in QUALITIES)
        assert fast < high < exact

    @pytest.mark.parametrize(
        ("argument", "match"),
        [
            ({"reuse": "quick"}, "reuse must be off, careful, fast or a threshold"),
            ({"reuse": -1}, "reuse must be"),
            ({"reuse": math.nan}, "reuse must be"),
            ({"reuse": math.inf}, "reuse must be"),
            ({"reuse": None}, "reuse must be"),
            ({"reuse": True}, "reuse must be"),
            ({"reuse": [0.1, 0.2]}, "reuse must be"),
            ({"reuse": 10**5000}, "reuse must be"),
            ({"reuse": "a\nb" * 500}, "reuse must be"),
            ({"quality": "best"}, "quality must be one of exact, high, fast"),
            ({"quality": None}, "quality must be one of"),
            ({"quality": ["high"]}, "quality must be one of"),
            ({"quality": 10**5000}, "quality must be one of"),
        ],
    )
    def test_refused(self, pipe, argument, match):
        request = {**TEXT, **argument}
        for method in (pipe, pipe.plan):
            with pytest.raises(RequestError, match=match) as caught:
                method(**request)
            assert isinstance(caught.value, OmniGenError)
            assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)

    def test_the_table_says_where_it_comes_from(self):
        assert table()["reuse"]["profile"].keys() >= {"date", "processor", "prompts", "torch"}
        measured = table()["measured"]
        found = json.loads((GOLDEN.parents[1] / measured["results"]).read_text())
        for part in ("presets", "grid", "distance"):
            assert found[part]["processor"] == measured["processor"]
        for name, row in found["presets"]["rows"].items():
            assert row["options"] == {"quality": name}
