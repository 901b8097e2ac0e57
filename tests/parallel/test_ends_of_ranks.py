"""What one rank raises ends the call on all of them, in time, with that rank's sentence."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden_cases import TINY
from parallel.ranks import free_port, run_ranks

from omnigen_fast import OmniGenPipeline
from omnigen_fast.engine import Engine
from omnigen_fast.parallel.failure import Watch

CALL: dict[str, Any] = {
    "prompt": "a red circle",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "seed": 1,
    "progress": False,
    "output_type": "latent",
}
IN_TIME = 20.0  # seconds

pytestmark = pytest.mark.slow  # nearly all look at the same calls of eleven groups of ranks


def loaded(layout: Any = "auto") -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(
        str(TINY), device="cpu", dtype="float32", parallel=layout
    )


def group_again(port: int) -> None:
    """A new process group in the same processes, as if they had been started again."""
    rank, size = int(os.environ["TEST_RANK"]), int(os.environ["TEST_SIZE"])
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=2),
    )


def raising(who: int, error: BaseException, step: int = 1):
    """A callback that raises on one rank after a step."""

    def callback(pipe, index, time, tensors):
        if index == step and dist.get_rank() == who:
            raise error

    return callback


def out_of_memory(pipe: OmniGenPipeline, who: int, method: str) -> None:
    """Makes an operation of one rank's engine fail as it does where memory runs out."""
    if dist.get_rank() != who:
        return
    original = getattr(Engine, method)

    def fails(self, *arguments, **more):
        setattr(pipe.engine, method, original.__get__(pipe.engine))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    setattr(pipe.engine, method, fails.__get__(pipe.engine))


def attempt(call) -> tuple[str, str, float]:
    """What a call raises, in how many seconds."""
    start = time.monotonic()
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def same(found: Any, expected: Any) -> bool:
    """Whether two results are the same; only rank 0 has any."""
    if dist.get_rank():
        return len(found) == len(expected) == 0
    return torch.equal(found, expected)


def cases(ports: list[int]) -> dict[str, Any]:
    """Every way in which a call can end early, one after the other, each in a new group."""
    found: dict[str, Any] = {}
    os.environ["TEST_RANK"], os.environ["TEST_SIZE"] = str(dist.get_rank()), "2"
    who = dist.get_rank()

    pipe = loaded()
    whole = pipe(**CALL)

    steps: list[int] = []

    def stopping(pipe, index, time, tensors):
        steps.append(index)
        pipe._interrupt = who == 0 and index == 1

    # these leave the group as it was
    found["cancelled"] = attempt(lambda: pipe(**dict(CALL, callback_on_step_end=stopping)))
    found["steps"] = steps
    height = 72 if who else 64
    found["refused"] = attempt(lambda: pipe(**dict(CALL, height=height)))
    found["other"] = attempt(lambda: pipe(**dict(CALL, seed=who)))
    found["after these"] = same(pipe(**CALL), whole)

    # these end it
    def ended(name: str, prepare=lambda pipe: None, **more: Any) -> None:
        group_again(ports.pop())
        pipe = loaded()
        prepare(pipe)
        first = attempt(lambda: pipe(**dict(CALL, **more)))
        found[name] = (first, attempt(lambda: pipe(**CALL)))

    for rank in (0, 1):
        error = ValueError("the callback's own fault")
        ended(f"callback {rank}", callback_on_step_end=raising(rank, error))
        ended(f"step {rank}", lambda pipe, rank=rank: out_of_memory(pipe, rank, "step"))
    ended("start", lambda pipe: out_of_memory(pipe, 1, "start"))
    ended("decode", lambda pipe: out_of_memory(pipe, 1, "decode"), output_type="pt")
    ended("Ctrl-C", callback_on_step_end=raising(0, KeyboardInterrupt()))

    group_again(ports.pop())
    name = str(TINY) if who == 0 else "/nonexistent/folder"
    found["load"] = attempt(
        lambda: OmniGenPipeline.from_pretrained(name, device="cpu", parallel="auto")
    )
    group_again(ports.pop())
    found["after all"] = same(loaded()(**CALL), whole)
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    ports = [free_port() for _ in range(9)]
    return run_ranks(2, cases, tmp_path_factory.mktemp("ends"), ports)


def test_a_cancel_on_one_rank_stops_all_at_the_same_step(ends):
    for one in ends:
        assert one["cancelled"][:2] == ("", "") and one["steps"] == [0, 1]


def test_what_one_rank_refuses_all_refuse_and_go_on(ends):
    for one in ends:
        assert one["refused"][0] == "RequestError"
        assert one["refused"][1].startswith("height must be a multiple of 16, got 72")
        assert one["other"][0] == "RequestError"
        assert "rank 1 was given another request than rank 0" in one["other"][1]
        assert one["after these"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_callback_that_raises(ends, rank):
    own, other = ends[rank][f"callback {rank}"], ends[1 - rank][f"callback {rank}"]
    assert own[0][:2] == ("ValueError", "the callback's own fault")
    sentence = f"rank {rank}: ValueError: the callback's own fault"
    assert other[0][:2] == ("RankError", sentence)
    for first, later in (own, other):
        assert first[2] < IN_TIME and later[2] < 1
        assert later[:2] == ("RankError", sentence)  # the group is over


@pytest.mark.parametrize(
    ("name", "rank"), [("step 0", 0), ("step 1", 1), ("start", 1), ("decode", 1)]
)
def test_out_of_memory_on_one_rank(ends, name, rank):
    sentence = "CUDA out of memory. Tried to allocate 2.00 GiB"
    for place, one in enumerate(ends):
        (kind, text, seconds), later = one[name]
        assert kind == ("OmniGenError" if place == rank else "RankError")
        assert text.startswith(f"rank {rank}: " * (place != rank) + "out of memory")
        assert sentence in text and seconds < IN_TIME
        assert later[0] == "RankError" and later[2] < 1


def test_an_interrupt_on_one_rank(ends):
    assert ends[0]["Ctrl-C"][0][0] == "KeyboardInterrupt"
    assert ends[1]["Ctrl-C"][0][:2] == ("RankError", "rank 0: interrupted by Ctrl-C")


def test_a_model_that_one_rank_can_not_load(ends):
    assert ends[1]["load"][0] == "CheckpointError"
    assert ends[0]["load"][0] == "RankError"
    assert ends[0]["load"][1].startswith("rank 1: ") and "/nonexistent/folder" in ends[0]["load"][1]


def test_new_ranks_after_a_failure_work(ends):
    assert all(one["after all"] for one in ends)


def silent(folder: Path) -> None:
    """Rank 1 stops to answer; rank 0, which waits for it, is ended by its own watch."""
    pipe = loaded()
    if dist.get_rank() == 1:
        (folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)

    def last_words(sentence: str, mailbox: Any) -> None:
        (folder / "ended").write_text(sentence)
        os.kill(int((folder / "stopped").read_text()), signal.SIGCONT)

    Watch.last_words = staticmethod(last_words)
    (folder / "started").touch()
    pipe(**CALL)


def test_a_rank_that_does_not_answer(tmp_path):
    with pytest.raises(FileNotFoundError):  # neither has a result
        run_ranks(2, silent, tmp_path, tmp_path)
    started, ended = tmp_path / "started", tmp_path / "ended"
    assert ended.read_text() == "rank 1 has not answered for 8 s"
    assert ended.stat().st_mtime - started.stat().st_mtime < IN_TIME
