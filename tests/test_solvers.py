"""Solvers: each reaches its order on a flow with a known end, and is the same under any plan."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, relative_error
from recording import recording_graphs
from step_cases import CHANGES, PLAN, assert_packed_is_alone, under

from omnigen_fast.denoise import Loop
from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.schedule import ALL_BRANCHES, StepSchedule
from omnigen_fast.solvers import MULTISTEP, SOLVERS, TWO_EVALUATIONS, shifted
from omnigen_fast.step_values import PlacedBranch, StepValues

OTHERS = [solver for solver in SOLVERS if solver != "euler"]
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "ab2": 2, "dpmpp2m": 2}
PHOTO = str(GOLDEN / "images" / "coffee.png")
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 6,
    "guidance_scale": 2.5,
    "seed": 11,
    "max_input_image_size": 96,
    "output_type": "latent",
    "progress": False,
}
EDIT = {**TEXT, "prompt": "<img><|image_1|></img> no cup", "input_images": [PHOTO]}
BATCH = {**TEXT, "prompt": [TEXT["prompt"], EDIT["prompt"]], "input_images": [[], [PHOTO]]}
# The guidance of both ends in the middle, at different steps.
INTERVALS = {"guidance_interval": (0, 0.5), "image_guidance_interval": (0, 0.4)}

# The flow to pictures that are normally distributed about one of two means.
MEANS, DEVIATION = (-0.6, 1.1), 0.5
UNEVEN = {
    "equal": lambda u: u,
    "shifted": lambda u: shifted(u, 2.0),
    "wavy": lambda u: u + 0.1 * math.sin(2 * math.pi * u),
}


def flow(z, time: float):
    """Of z = (1 - t) noise + t picture, the mean of picture - noise; numpy or torch."""
    variance = (1 - time) ** 2 + (time * DEVIATION) ** 2
    slope = (time * DEVIATION**2 - (1 - time)) / variance
    first, second = ((z - time * mean) / variance**0.5 for mean in MEANS)
    exponent = (first**2 - second**2) / 2  # log of how much likelier the second is
    share = 1 / (1 + (torch if isinstance(z, torch.Tensor) else np).exp(-exponent))
    towards = [mean + slope * (z - time * mean) for mean in MEANS]
    return (1 - share) * towards[0] + share * towards[1]


def end(z: np.ndarray) -> np.ndarray:
    """Where the flow takes z from time 0 to time 1: it keeps the order, so the quantiles too."""
    z = torch.as_tensor(z, dtype=torch.float64)
    low, high = torch.full_like(z, -9), torch.full_like(z, 9)
    for _ in range(80):
        middle = (low + high) / 2
        share = sum(torch.special.ndtr((middle - mean) / DEVIATION) for mean in MEANS) / 2
        below = share < torch.special.ndtr(z)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).numpy()


def solved(solver: str, times, z, steps: int | None = None):
    """By the solver's table alone, in float64, after so many of the steps."""
    schedule = StepSchedule((ALL_BRANCHES,) * (len(times) - 1), tuple(times), solver)
    evaluated = evaluation_points(schedule)
    history = np.zeros_like(z)
    fresh = [step == 0 for step in range(len(schedule))]
    updates = schedule.updates(fresh)
    assert len(updates) == len(evaluated)
    count = None if steps is None else schedule.first(steps)
    for time, update in list(zip(evaluated, updates))[:count]:
        v = flow(z, time)
        z, history = (
            update.latents * z + update.velocity * v + update.history * history,
            update.kept_latents * z + update.kept_velocity * v,
        )
    return z


def evaluation_points(schedule):
    return schedule.evaluated or schedule.tensor()[:-1].tolist()


def grid(steps: int, uneven=UNEVEN["equal"]) -> list[float]:
    return [uneven(step / steps) for step in range(steps)] + [1.0]


def order(errors: dict[int, float]) -> float:
    """The slope of the error against the length of the steps, on log scales."""
    lengths = [-math.log(steps) for steps in errors]
    return np.polyfit(lengths, [math.log(one) for one in errors.values()], 1)[0]


NOISE = np.linspace(-2, 2, 17)


@pytest.mark.parametrize("uneven", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("solver", SOLVERS)
def test_reaches_its_order(solver, uneven):
    errors = {
        steps: np.abs(solved(solver, grid(steps, uneven), NOISE) - end(NOISE)).max()
        for steps in (128, 256, 512, 1024)
    }
    # at the ends dpmpp2m's log(t / (1 - t)) is infinite, which leaves a logarithm in its error
    least = 1.7 if solver == "dpmpp2m" else 0.9 * ORDERS[solver]
    assert least < order(errors) < 1.15 * ORDERS[solver], errors


@pytest.mark.parametrize("uneven", UNEVEN.values(), ids=UNEVEN)
def test_dpmpp2m_is_of_second_order_between_the_ends(uneven):
    def error(steps: int) -> float:
        times = [0.1 + 0.8 * uneven(step / steps) for step in range(steps + 1)]
        # what stands after the last but one step of a table that goes on to the end
        return solved("dpmpp2m", [*times, 1.0], NOISE, steps)

    exact = solved("midpoint", [0.1 + 0.8 * i / 20000 for i in range(20001)] + [1.0], NOISE, 20000)
    errors = {steps: np.abs(error(steps) - exact).max() for steps in (64, 128, 256, 512)}
    assert order(errors) == pytest.approx(2, abs=0.1), errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_reaches_its_order(pipe, solver):
    """What runs on the device, in float32: a real loop, with the flow in place of the model."""
    call = pipe.make_call(**{**TEXT, "guidance_scale": 1.0})
    entries = call.entries(PLAN)
    pipe.engine.cache.reserve(list(entries))
    placed = PlacedBranch.of(call.pictures, entries, pipe.engine.cache)
    assert [[one.coefficient for one in picture] for picture in placed] == [[1.0]]
    errors = {}
    for steps in (32, 64, 128):
        schedule = StepSchedule((ALL_BRANCHES,) * steps, tuple(grid(steps)), solver)
        times = schedule.evaluated_tensor()
        values = StepValues.make(
            pipe.model,
            placed,
            call.latents.clone(),
            schedule.lengths(),
            pipe.model.embed_times(times),
            schedule=schedule,
        )

        def velocity(values, passes, branches, times=times):
            v = flow(values.latents, float(times[values.step[0]]))
            rows, columns = (side // 2 for side in v.shape[2:])
            patches = v.view(1, 4, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
            return [patches.reshape(1, rows * columns, 16)]

        loop = Loop(pipe.model, values, velocity)
        loop.predict = lambda kind, loop=loop, velocity=velocity: velocity(loop.values, (), ())[0]
        for _ in range(schedule.evaluations):
            loop.step()
        errors[steps] = np.abs(values.latents.numpy() - end(call.latents)).max()
    pipe.engine.cache.give_back(list(entries))
    least = 1.4 if solver == "dpmpp2m" else 0.85 * ORDERS[solver]
    assert least < order(errors) < 1.25 * ORDERS[solver], errors


def test_dpmpp2m_is_that_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(8)
    times = [float(1 - sigma) for sigma in scheduler.sigmas]
    z = torch.as_tensor(NOISE)
    for timestep, time in zip(scheduler.timesteps, times):
        # theirs points from picture to noise
        z = scheduler.step(-flow(z, time), timestep, z).prev_sample
    np.testing.assert_allclose(solved("dpmpp2m", times, NOISE), z.numpy(), atol=1e-5)


def test_heun_and_midpoint_by_hand():
    times, z = grid(3, UNEVEN["wavy"]), NOISE
    heun = midpoint = z
    for step, (start, stop) in enumerate(pairwise(times)):
        h = stop - start
        v = flow(heun, start)
        second = flow(heun + h * v, stop) if step < 2 else v
        heun = heun + h / 2 * (v + second)
        half = midpoint + h / 2 * flow(midpoint, start)
        midpoint = midpoint + h * flow(half, start + h / 2)
    np.testing.assert_allclose(solved("heun", times, z), heun, rtol=1e-12)
    np.testing.assert_allclose(solved("midpoint", times, z), midpoint, rtol=1e-12)


@pytest.mark.parametrize("uneven", UNEVEN.values(), ids=UNEVEN)
def test_ab2_is_exact_where_the_velocity_is_linear_in_time(uneven):
    times = grid(5, uneven)
    schedule = StepSchedule((ALL_BRANCHES,) * 5, tuple(times), "ab2")
    z = history = 0.0
    for step, update in enumerate(schedule.updates([True] + [False] * 4)):
        v = 3 + 2 * times[step]
        z, history = z + update.velocity * v + update.history * history, v
    # the first step is Euler's
    assert z == pytest.approx(3 + 1 - times[1] ** 2)


def test_the_reference_of_dpmpp2m():
    """As the paper writes it, with alpha, sigma and their log ratio, away from the ends."""
    t = [0.3, 0.45, 0.7]
    lam = [math.log(one / (1 - one)) for one in t]
    z = [NOISE, NOISE * 0.8 + 0.1]
    pictures = [one + (1 - time) * flow(one, time) for one, time in zip(z, t)]
    h, before = lam[2] - lam[1], lam[1] - lam[0]
    r = before / h
    mixed = (1 + 1 / (2 * r)) * pictures[1] - 1 / (2 * r) * pictures[0]
    expected = (1 - t[2]) / (1 - t[1]) * z[1] - t[2] * math.expm1(-h) * mixed
    update = StepSchedule((ALL_BRANCHES,) * 3, (*t, 1.0), "dpmpp2m").updates([True, False, False])
    found = update[1].latents * z[1] + update[1].velocity * flow(z[1], t[1])
    found = found + update[1].history * pictures[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


class TestEvaluations:
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_how_many_there_are(self, pipe, solver):
        workload = pipe.make_call(**TEXT, solver=solver).workload()
        expected = {"heun": 11, "midpoint": 12}.get(solver, 6)
        assert workload.steps == 6 and workload.evaluations == expected
        assert sum(workload.schedule.counts.values()) == expected
        schedule = workload.schedule
        assert len(schedule.evaluated_tensor()) == len(schedule.lengths()) == expected

    def test_times(self):
        kinds = (ALL_BRANCHES,) * 2
        assert StepSchedule(kinds, None, "heun").evaluated == (0, 0.5, 0.5)
        assert StepSchedule(kinds, None, "midpoint").evaluated == (0, 0.25, 0.5, 0.75)
        assert StepSchedule(kinds, None, "ab2").evaluated == (0, 0.5)
        assert StepSchedule(kinds).evaluated is None

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_callbacks_come_with_steps(self, pipe, solver):
        seen = []
        pipe(**TEXT, solver=solver, callback_on_step_end=lambda _, *step: seen.append(step[:2]))
        assert seen == [(step, step / 6) for step in range(6)]

    def test_a_plan_counts_evaluations(self, pipe):
        def seconds(solver, steps):
            request = {**TEXT, "num_inference_steps": steps}
            return pipe.plan(**request, solver=solver).cost.seconds

        assert seconds("ab2", 20) == pytest.approx(seconds("euler", 20), rel=1e-3)
        assert seconds("midpoint", 10) == pytest.approx(seconds("euler", 20), rel=1e-3)


class TestPictures:
    @pytest.mark.parametrize("solver", OTHERS)
    def test_of_many_steps_are_those_of_euler(self, pipe, solver):
        """All go to the same picture; those of second order are there sooner."""

        def made(solver, steps):
            return pipe(**{**TEXT, "num_inference_steps": steps}, solver=solver)

        exact = made("midpoint", 96)
        assert relative_error(made(solver, 24), exact) < 0.3 * relative_error(
            made("euler", 24), exact
        )

    @pytest.mark.parametrize("options", [{}, INTERVALS], ids=["always", "intervals"])
    @pytest.mark.parametrize("solver", OTHERS)
    def test_a_batch_is_each_prompt_alone(self, pipe, solver, options):
        noise = pipe.make_call(**BATCH).latents
        batch = {**BATCH, "seed": None, "solver": solver, **options}
        assert_packed_is_alone(pipe, batch, noise)

    @under(*CHANGES)
    @pytest.mark.parametrize("solver", OTHERS)
    def test_under_any_plan(self, pipe, monkeypatch, solver, change):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        request = {**BATCH, "solver": solver, "time_shift": 2.0}
        expected = pipe(**request, memory=PLAN)
        for _ in range(2):  # captured steps are taken over by the second call
            found = pipe(**request, memory=replace(PLAN, **change))
            assert relative_error(found, expected) < 1e-5
            assert torch.equal(found, expected) or "capture" not in change
        assert events.count("capture") == ("capture" in change)

    @pytest.mark.parametrize("solver", MULTISTEP)
    def test_a_change_of_branches_begins_anew(self, pipe, solver):
        """Steps before it belong to another flow: as if a call began there."""
        whole = {**TEXT, "solver": solver, "guidance_interval": (0, 0.5)}
        seen = []
        expected = pipe(
            **whole, callback_on_step_end=lambda _, step, t, kept: seen.append(kept["latents"])
        )
        call = pipe.make_call(**whole)
        call.latents, call.steps_done = seen[2].clone(), 3
        running = pipe.engine.start(call, PLAN)
        while not running.finished:
            pipe.engine.step(running)
        assert torch.equal(pipe.engine.finish(running), expected)

    @pytest.mark.parametrize("solver", OTHERS)
    def test_another_plan_goes_on_from_the_last_step(self, pipe, monkeypatch, solver):
        expected = pipe(**TEXT, solver=solver)
        left, plain = [6], Loop.predict

        def failing(loop, kind):
            left[0] -= 1
            if not left[0]:  # of two evaluations in a step the second
                raise torch.OutOfMemoryError("out of memory")
            return plain(loop, kind)

        monkeypatch.setattr(Loop, "predict", failing)
        assert relative_error(pipe(**TEXT, solver=solver), expected) < 1e-5
        assert left[0] < 0

    def test_euler_is_as_it_was(self, pipe):
        call = pipe.make_call(**TEXT, solver="euler", time_shift=1)
        assert call.schedule == StepSchedule.euler(6)
        running = pipe.engine.start(call, PLAN)
        assert running.loop.values.solver is None
        pipe.engine.drop(running)


class TestTimes:
    @pytest.mark.parametrize("shift", [0.5, 3])
    def test_the_shift_is_that_of_the_noise(self, pipe, shift):
        sigmas = np.linspace(1, 0, 7)
        expected = 1 - shift * sigmas / (1 + (shift - 1) * sigmas)
        schedule = pipe.make_call(**TEXT, time_shift=shift).schedule
        np.testing.assert_allclose(schedule.ends, expected, atol=1e-12)

    def test_by_hand(self, pipe):
        given = [0, 0.05, 0.2, 0.7]
        schedule = pipe.make_call(**TEXT, timesteps=given).schedule
        assert schedule.times == (0, 0.05, 0.2, 0.7, 1)
        seen = []
        pipe(**TEXT, timesteps=given, callback_on_step_end=lambda _, *one: seen.append(one[1]))
        assert seen == given
        equal = [i / 6 for i in range(6)]  # rounded as float32 does, or not
        assert relative_error(pipe(**TEXT, timesteps=equal), pipe(**TEXT)) < 1e-5

    @pytest.mark.parametrize(
        ("argument", "match"),
        [
            ({"solver": "rk4"}, "solver must be one of euler, heun"),
            ({"solver": None}, "solver must be one of"),
            ({"solver": ["ab2"]}, "solver must be one of"),
            ({"time_shift": 0}, "time_shift must be from 0.01 to 100"),
            ({"time_shift": "3"}, "time_shift must be a finite number"),
            ({"time_shift": math.inf}, "time_shift must be a finite number"),
            ({"time_shift": 2, "timesteps": [0, 0.5]}, "not both"),
            ({"timesteps": []}, "timesteps must be 1 to 1000 increasing times"),
            ({"timesteps": [0.1, 0.5]}, "timesteps must be"),
            ({"timesteps": [0, 0.5, 1]}, "timesteps must be"),
            ({"timesteps": [0, 0.5, 0.5]}, "timesteps must be"),
            ({"timesteps": [0, 1e-46]}, "timesteps must be"),
            ({"timesteps": [0, 0.5, 0.5 + 1e-12]}, "timesteps must be"),
            ({"timesteps": [999, 500, 1]}, "timesteps must be"),
            ({"timesteps": [0, math.nan]}, "timesteps must be"),
            ({"timesteps": [0, "0.5"]}, "timesteps must be"),
            ({"timesteps": 7}, "timesteps must be"),
            ({"timesteps": [i / 2000 for i in range(1001)]}, "timesteps must be"),
        ],
    )
    def test_refused(self, pipe, argument, match):
        with pytest.raises(RequestError, match=match) as caught:
            pipe(**TEXT, **argument)
        assert isinstance(caught.value, OmniGenError) and len(str(caught.value)) <= 300


def test_the_names_of_solvers():
    assert set(ORDERS) == set(SOLVERS)
    assert {*MULTISTEP, *TWO_EVALUATIONS, "euler"} == set(SOLVERS)
