"""Calls that step together: each keeps its own schedule, condition and picture."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, relative_error

from omnigen_fast.memory.plan import MemoryPlan

PLAN = MemoryPlan.plain(3, kept_bytes=16 << 20)
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 5,
    "seed": 11,
    "output_type": "latent",
}
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 96,
}
LIKE = {
    "seeds": [TEXT, {**TEXT, "seed": 12}, {**TEXT, "seed": 13}],
    "steps": [TEXT, {**TEXT, "num_inference_steps": 3}, {**TEXT, "num_inference_steps": 8}],
    "branches": [TEXT, EDIT, {**EDIT, "use_img_guidance": False, "seed": 14}],
    "pictures": [{**EDIT, "num_images_per_prompt": 2}, TEXT],
    "intervals": [
        {**EDIT, "guidance_interval": (0, 0.5), "image_guidance_interval": (0.3, 1)},
        {**TEXT, "guidance_interval": (0.4, 1)},
        TEXT,
    ],
    "times": [{**TEXT, "time_shift": 3}, {**TEXT, "timesteps": [0, 0.2, 0.9]}],
}


@pytest.fixture
def engine(pipe):
    yield pipe.engine
    pipe.engine.forget()


@pytest.mark.parametrize("passes", [None, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("requests", LIKE.values(), ids=LIKE)
def test_together_as_alone(pipe, engine, requests, passes):
    """They start, join, leave and step alone as chance has it; conditions stay as they were."""
    plan = replace(PLAN, branches_per_pass=passes)
    alone = [pipe(**request, progress=False, memory=plan) for request in requests]
    engine.forget()
    chance = random.Random(0)
    running = [engine.start(pipe.make_call(**requests[0]), plan, own_rows=True)]
    waiting, together = list(requests[1:]), 0
    while waiting or not all(one.finished for one in running):
        if waiting and chance.random() < 0.5:
            call = pipe.make_call(**waiting.pop(0))
            running.append(engine.start(call, plan, own_rows=True))
        going = [one for one in running if not one.finished]
        some = chance.sample(going, chance.randint(0, len(going)))
        some = [one for one in some if one.like == some[0].like]
        if len(some) == 1:
            engine.step(*some)
        elif some:
            together += 1
            engine.step_together(*some)
    assert together
    for one, expected in zip(running, alone):
        assert relative_error(engine.finish(one), expected) < 1e-5
    for request, expected in zip(requests, alone):  # from what is kept
        assert torch.equal(pipe(**request, progress=False, memory=plan), expected)
