"""The scheduler over two ranks: what one process makes, and one end for both."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden_cases import GOLDEN, TINY
from parallel.ranks import run_ranks
from parallel.test_one_command import IN_TIME, START, ranks_of
from PIL import Image
from server.test_process import started

from omnigen_fast import OmniGenPipeline
from omnigen_fast.engine import Engine
from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.serving.leading import follow
from omnigen_fast.serving.scheduler import Scheduler, Settings
from omnigen_fast.serving.work import NotReadyError

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4}
SETTINGS = Settings(memory="1GiB")


def requests() -> list[dict[str, Any]]:
    """Text, an input image, an edit with a mask, several pictures."""
    cat = (GOLDEN / "images/cat.png").read_bytes()
    image = {"prompt": "<img><|image_1|></img> at night", "max_input_image_size": 64}
    return [
        {"prompt": "a red circle", "seed": 1},
        {**image, "input_images": [io.BytesIO(cat)], "seed": 2},
        {"prompt": "a red circle", "seed": 3, "num_images_per_prompt": 2},
        {**image, "input_images": [cat], "seed": 4, "strength": 0.5, "height": 48},
    ]


def loaded(parallel: Any) -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(
        str(TINY), device="cpu", dtype="float32", parallel=parallel
    )


def made(pipe: OmniGenPipeline) -> dict[str, Any]:
    """What a scheduler makes of the requests, all at once, one of them cancelled."""
    scheduler = Scheduler(pipe, SETTINGS)
    scheduler.wait_until_ready()
    tickets = [scheduler.submit({**SMALL, **one, "output_type": "pt"}) for one in requests()]
    given_up = scheduler.submit({**SMALL, "prompt": "a", "num_inference_steps": 1000, "seed": 5})
    found: dict[str, Any] = {"pictures": [ticket.future.result(60) for ticket in tickets]}
    given_up.cancel()
    with pytest.raises(OmniGenError):
        given_up.future.result(60)
    with pytest.raises(RequestError) as refused:
        scheduler.submit({**SMALL, "prompt": "a", "input_images": [np.zeros((64, 64, 3))]})
    found["refused"] = str(refused.value)

    # memory runs out on another rank, before the first step: both go on by a smaller plan
    again = scheduler.submit({**SMALL, "prompt": "out of memory", "seed": 6, "output_type": "pt"})
    found["again"] = again.future.result(60)
    found["ended"] = scheduler.close(join_seconds=30)
    return found


def served(parallel: Any) -> Any:
    pipe = loaded(parallel)
    if dist.get_rank() == 0:
        found = made(pipe)
    else:
        start, failed = Engine.start, []

        def fails(self, call, plan, own_rows=False):
            if "out of memory" in call.request.prompts[0].text and not failed:
                failed.append(plan)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return start(self, call, plan, own_rows)

        Engine.start = fails
        follow(pipe)
        Engine.start = start
        found = len(failed)
    dist.barrier()
    return found


def broken(parallel: Any) -> Any:
    """Rank 1 fails in a step: the scheduler on rank 0 says so, and takes nothing more."""
    pipe = loaded(parallel)
    if dist.get_rank():

        def fails(self, running):
            raise ValueError("a fault")

        Engine.step = fails
        with pytest.raises(OmniGenError, match="rank 1: ValueError: a fault"):
            follow(pipe)
        found = None
    else:
        scheduler = Scheduler(pipe, SETTINGS)
        with pytest.raises(NotReadyError) as caught:
            scheduler.wait_until_ready(60)
        found = str(caught.value)
    store = dist.PrefixStore("again", pipe.engine.placement.group.store)
    dist.init_process_group(
        "gloo", store=store, rank=pipe.engine.placement.group.rank, world_size=2
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"branches": 2}, {"rows": 2}], ids=["branches", "rows"])
def test_the_pictures_of_one_process(layout, tmp_path):
    found, failed = run_ranks(2, served, tmp_path, layout)
    assert failed == 1 and found["ended"]
    assert "several ranks can't be sent input_images as 'ndarray'" in found["refused"]
    alone = loaded(None)
    more = {"prompt": "out of memory", "seed": 6}
    for one, picture in zip([*requests(), more], [*found["pictures"], found["again"]]):
        expected = alone(**{**SMALL, **one}, output_type="pt", progress=False)
        assert (picture - expected).abs().max() < 1e-4


def test_a_rank_that_fails(tmp_path):
    found, _ = run_ranks(2, broken, tmp_path, "auto")
    assert found == "the model can't be used: rank 1: ValueError: a fault"


@pytest.mark.slow
def test_a_server(tmp_path):
    """One command: it answers, stops when told to, and ends where a rank is killed."""
    options = ("--gpus-per-replica", "2", "--drain-seconds", "5")
    body = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "size": "64x64"}
    with (tmp_path / "log").open("w") as log, started(*options, log=log) as live:
        ranks = ranks_of(live.process.pid)
        assert set(ranks) == {1}
        answer = live.generate(**body)
        assert answer.status == 200, answer.body
        file = base64.b64decode(json.loads(answer.body)["data"][0]["b64_json"])
        picture = np.asarray(Image.open(io.BytesIO(file))).astype(int)
        (expected,) = loaded(None)(
            **SMALL | {"prompt": body["prompt"], "seed": 1, "num_inference_steps": 2},
            progress=False,
        )
        assert abs(picture - np.asarray(expected).astype(int)).max() <= 1
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        assert live.process.wait(IN_TIME) == 1
    assert "rank 1 has gone away" in (tmp_path / "log").read_text()
    assert time.monotonic() - start < IN_TIME

    with started(*options) as live:
        ranks = ranks_of(live.process.pid)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(START) == 0
        end = time.monotonic() + IN_TIME
        while Path(f"/proc/{ranks[1]}").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
