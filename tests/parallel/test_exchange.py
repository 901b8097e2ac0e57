"""What ranks exchange: how many bytes, when, and that nothing depends on who is late."""

from __future__ import annotations

import math
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from parallel_cases import CALLS, EDIT, PLAIN, TEXT, load
from ranks import run_ranks

from omnigen_fast.errors import RequestError
from omnigen_fast.graph import StepGraphs
from omnigen_fast.parallel.group import Group

# all look at the same calls of four ranks
pytestmark = [pytest.mark.early, pytest.mark.slow]

LAYOUTS = {"rows": 4}, {"branches": 2, "rows": 2}
LAYERS, KV_WIDTH, CHANNELS, BYTES = 3, 192, 16, 4  # of the golden checkpoint in float32
QUICK = {**TEXT, "num_inference_steps": 1, "output_type": "latent", "progress": False}
COUNTED = ("uneven text", "uneven edit", "intervals", "several pictures", "one branch at a time")


def after_each_step(pipe: Any, **call: Any) -> list[torch.Tensor]:
    """The latents, on every rank."""
    found = []
    pipe(**{**QUICK, **call}, callback_on_step_end=lambda *given: found.append(given[3]["latents"]))
    return found


def latents_of(pipe: Any, **call: Any) -> torch.Tensor:
    """The last latents, on every rank."""
    return after_each_step(pipe, **call)[-1]


def refusal(pipe: Any, **call: Any) -> str:
    with pytest.raises(RequestError) as error:
        pipe(**{**QUICK, **call})
    return str(error.value)


def counted(layout: dict[str, int]) -> dict[str, list[dict[str, int]]]:
    """Bytes that this rank receives in each step of the calls in `COUNTED`."""
    pipe = load(layout)
    received = pipe.engine.placement.group.received
    found: dict[str, list[dict[str, int]]] = {}
    for name in COUNTED:
        with pipe.driving() as engine:
            received.clear()
            running = engine.start(pipe.make_call(**CALLS[name]), PLAIN)
            assert not received and running.like is None
            found[name] = []
            while not running.finished:
                engine.step(running)
                found[name].append(dict(received))
                received.clear()
            engine.drop(running)
    return found


def on_four_ranks() -> dict[str, Any]:
    """What the tests below look at; in one group, since starting one takes the longest."""
    found: dict[str, Any] = {"bytes": {str(one): counted(one) for one in LAYOUTS}}
    pipe = load(LAYOUTS[1])
    group = pipe.engine.placement.group
    rank = group.rank

    found["other seed"] = refusal(pipe, seed=rank // 3)
    found["other images"] = refusal(pipe, **(EDIT if rank == 1 else {}))
    found["refused"] = refusal(pipe, height=1000 if rank == 2 else 80)
    found["too small"] = refusal(pipe, height=16, width=16, guidance_scale=1)
    with pytest.raises(RequestError) as error:
        pipe.to("cpu")
    found["moved"] = str(error.value)

    found["latents"] = latents_of(pipe)
    found["without a seed"] = latents_of(pipe, seed=None)

    def change(_, step, time, tensors):
        return {"latents": tensors["latents"] + (rank == 0)}

    steps = []

    def stop(pipe, step, time, tensors):
        steps.append(step)
        pipe._interrupt = rank == 3 and step == 1

    seen = []

    def watch(_, step, time, tensors):
        seen.append(tensors["latents"].clone())
        return change(_, step, time, tensors)

    pipe(**{**QUICK, "num_inference_steps": 2}, callback_on_step_end=watch)
    found["seen"] = seen
    pipe(**{**QUICK, "num_inference_steps": 5}, callback_on_step_end=stop)
    found["steps"] = steps

    late = random.Random(rank)

    @contextmanager
    def lagging(self):
        time.sleep(late.choice((0, 0, 0, 2e-4, 1e-3)))
        yield

    in_time = after_each_step(pipe, num_inference_steps=200)
    with mock.patch.object(Group, "failing", lagging):
        late_steps = after_each_step(pipe, num_inference_steps=200)
    found["late"] = sum(map(torch.equal, late_steps, in_time))
    found["replayed"] = replayed(pipe)
    return found


def replayed(pipe: Any) -> list[bool]:
    """Whether later calls that take over the loop of the first give what they give alone."""
    calls: list[dict[str, Any]] = [
        {**EDIT, "seed": 1},
        {**EDIT, "seed": 2, "guidance_scale": 1.5},
        {**EDIT, "seed": 3, "prompt": f"{TEXT['prompt']} {EDIT['prompt']}"},  # shares no prefix
    ]
    calls = [{**one, "num_inference_steps": 5} for one in calls]
    expected = [latents_of(pipe, **one) for one in calls]
    events = []

    def capture(work):
        events.append(1)
        return work

    pipe.engine.graphs = StepGraphs(capture)
    plan = replace(PLAIN, capture=True)
    found = [latents_of(pipe, **one, memory=plan) for one in calls]
    return [len(events) == 1, *map(torch.equal, found, expected)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(4, on_four_ranks, tmp_path_factory.mktemp("four"))


def of_all(ranks: list[dict[str, Any]], name: str) -> Any:
    """What all ranks have found alike."""
    first, *others = (one[name] for one in ranks)
    assert all(one == first for one in others), name
    return first


# Of each call: noise tokens, pictures, and the groups of each of its steps.
SIZES = {
    "uneven text": (15, [2, 2, 2]),
    "uneven edit": (15, [3, 3, 3]),
    "intervals": (15, [2, 2, 3, 3]),
    "several pictures": (15, [10, 10, 10]),
    "one branch at a time": (15, [3, 3, 3]),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_are_those_of_the_formula(four, layout, name):
    """As docs/several-gpus.md has it."""
    branches, rows = layout.get("branches", 1), layout["rows"]
    tokens, steps = SIZES[name]
    for rank, found in enumerate(four):
        for groups, step in zip(steps, found["bytes"][str(layout)][name], strict=True):
            longest = math.ceil(tokens / rows)
            most = math.ceil(groups / branches)
            own = groups // branches + (rank // rows < groups % branches)
            assert step == {
                "velocities": 3 * most * longest * CHANNELS * BYTES,
                "rows": LAYERS * own * (rows - 1) * longest * 2 * KV_WIDTH * BYTES,
            }


def test_ranks_that_are_given_different_calls(four):
    sentence = "rank {} was given another request than rank 0; every rank must make the same call"
    assert of_all(four, "other seed") == sentence.format(3)
    assert of_all(four, "other images") == sentence.format(1)


def test_a_call_that_one_rank_refuses(four):
    """All do, and the group goes on: the calls after it are made."""
    assert of_all(four, "refused") == "height must be from 16 to 768 pixels, got 1000"


def test_fewer_noise_tokens_than_parts(four):
    assert of_all(four, "too small") == (
        "pictures of 1 noise tokens can't be split into 4 parts; ask for larger ones or start "
        "fewer ranks"
    )


def test_a_pipeline_of_several_ranks_stays_on_its_device(four):
    assert "stays where it was loaded" in of_all(four, "moved")


def test_noise_without_a_seed_is_one_draw(four):
    first, *others = (one["without a seed"] for one in four)
    assert all(torch.equal(one, first) for one in others)
    assert not torch.equal(first, four[0]["latents"])


def test_callbacks_change_the_latents_of_all_ranks_as_those_of_rank_0(four):
    for rank in four:
        assert torch.equal(rank["seen"][0], four[0]["latents"]) is False
        assert torch.equal(rank["seen"][1], four[0]["seen"][1])


def test_any_rank_stops_all(four):
    assert of_all(four, "steps") == [0, 1]


def test_bits_do_not_depend_on_who_is_late(four):
    assert of_all(four, "late") == 200


def test_a_captured_step_serves_later_calls(four):
    assert of_all(four, "replayed") == [True] * 4
