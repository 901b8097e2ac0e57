"""The scheduler without HTTP: right pictures, order, bounds, and failures."""

from __future__ import annotations

import gc
import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, relative_error

from omnigen_fast.errors import MemoryBudgetError, OmniGenError, RequestError
from omnigen_fast.serving.scheduler import Scheduler, Settings
from omnigen_fast.serving.work import (
    CancelledError,
    ClosedError,
    NotReadyError,
    QueueFullError,
    TimedOutError,
)

WAIT = 120  # seconds; a busy machine is slow, not wrong
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 6,
    "seed": 1,
    "output_type": "latent",
}
LONG = {**TEXT, "num_inference_steps": 40, "seed": 2}
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 96,
    "seed": 3,
}
REQUESTS = [
    TEXT,
    LONG,
    EDIT,
    {**TEXT, "seed": 4},
    {**TEXT, "num_inference_steps": 9, "seed": 5, "guidance_interval": (0, 0.5)},
    {**EDIT, "num_images_per_prompt": 2, "seed": 6},
    {**TEXT, "width": 96, "seed": 7},
    {**TEXT, "solver": "heun", "seed": 8},
    {**EDIT, "use_input_image_size_as_output": True, "strength": 0.6, "seed": 9},
    {**TEXT, "use_kv_cache": False, "seed": 10},
    {**TEXT, "separate_cfg_infer": True, "seed": 11},
]


@pytest.fixture(scope="module")
def own_pipe(load_pipe):
    return load_pipe()


@pytest.fixture(scope="module")
def alone(own_pipe):
    """What the pipeline makes of each request."""
    return [own_pipe(**request, progress=False) for request in REQUESTS]


class Events:
    """An observer."""

    def __init__(self) -> None:
        self.ends, self.packs, self.refusals = [], [], []

    def ended(self, reason, ticket) -> None:
        self.ends.append((reason, ticket.id))

    def refused(self, reason) -> None:
        self.refusals.append(reason)

    def stepped(self, requests, seconds) -> None:
        self.packs.append(requests)

    def conditions(self, found, computed) -> None: ...


@pytest.fixture
def start(own_pipe, alone):
    """Starts schedulers on the pipeline, one after the other; nothing may be left of them."""
    opened = []

    @contextmanager
    def started(**settings):
        events = Events()
        scheduler = Scheduler(own_pipe, Settings(**{"warm_up": False, **settings}), events)
        scheduler.events = events
        opened.append(scheduler)
        try:
            assert scheduler.wait_until_ready(WAIT)
            yield scheduler
        finally:
            assert scheduler.close(join_seconds=WAIT)
        engine = own_pipe.engine
        assert not engine._running and engine._pack is None and not engine.cache._held
        assert not scheduler._jobs and not scheduler._busy

    yield started
    for one in opened:
        one.close()


class Pause:
    """Stops the engine thread after a step of a request, until it is let go."""

    def __init__(self, step: int = 1) -> None:
        self.there, self._go = threading.Event(), threading.Event()
        self._step = step

    def __call__(self, step) -> None:
        if step.done < self._step:
            return
        self.there.set()
        assert self._go.wait(WAIT)

    def __enter__(self) -> Pause:
        return self

    def __exit__(self, *_) -> None:
        self._go.set()

    def submit(self, scheduler, request):
        ticket = scheduler.submit(request, id="first", on_step=self)
        assert self.there.wait(WAIT)
        return ticket


@pytest.mark.parametrize("policy", ["shortest", "fcfs"])
def test_alone_the_bytes_are_the_pipelines(start, alone, policy):
    with start(policy=policy) as scheduler:
        for request, expected in zip(REQUESTS, alone):
            found = scheduler.submit(request).result(WAIT)
            assert torch.equal(found, expected), request


@pytest.mark.parametrize("packing", [True, False])
def test_beside_others(start, alone, packing):
    """Each is right to 1e-5, and to the bit where nothing is packed; some are cancelled."""
    chance = random.Random(0)
    with start(packing=packing, max_queue=100) as scheduler:
        with Pause() as pause:
            first = pause.submit(scheduler, LONG)
            order = [*range(len(REQUESTS))] * 2
            chance.shuffle(order)
            tickets = [(i, scheduler.submit(REQUESTS[i])) for i in order]
            cancelled = [scheduler.submit(REQUESTS[i]) for i in range(0, len(REQUESTS), 3)]
            for one in cancelled[::2]:
                one.cancel()
        for one in cancelled[1::2]:
            one.cancel()
        for i, ticket in [(1, first), *tickets]:
            found = ticket.result(WAIT)
            if packing:
                assert relative_error(found, alone[i]) < 1e-5
            else:
                assert torch.equal(found, alone[i])
        for one in cancelled:
            with pytest.raises(CancelledError):
                one.result(WAIT)
        assert (max(scheduler.events.packs) > 1) == packing
        assert len(scheduler.events.ends) == len({id for _, id in scheduler.events.ends})


def ends(scheduler) -> list[str]:
    return [id for _, id in scheduler.events.ends]


def test_the_shortest_goes_first(start):
    with start(packing=False) as scheduler:
        with Pause() as pause:
            tickets = [pause.submit(scheduler, LONG)]
            for steps in (9, 3, 6):
                one = {**TEXT, "num_inference_steps": steps}
                tickets.append(scheduler.submit(one, id=str(steps)))
        for ticket in tickets:
            ticket.result(WAIT)
        assert ends(scheduler) == ["3", "6", "9", "first"]


def test_a_long_one_that_is_nearly_done_waits_for_a_short_one(start):
    with start(packing=False, ageing=0) as scheduler:
        with Pause(LONG["num_inference_steps"] - 1) as pause:
            tickets = [pause.submit(scheduler, LONG), scheduler.submit(TEXT, id="short")]
        for ticket in tickets:
            ticket.result(WAIT)
        assert ends(scheduler) == ["short", "first"]


def test_first_come_first_served(start):
    with start(policy="fcfs", packing=False) as scheduler:
        with Pause() as pause:
            tickets = [pause.submit(scheduler, LONG)]
            for steps in (9, 3, 6):
                one = {**TEXT, "num_inference_steps": steps}
                tickets.append(scheduler.submit(one, id=str(steps)))
        for ticket in tickets:
            ticket.result(WAIT)
        assert ends(scheduler) == ["first", "9", "3", "6"]


def test_nothing_starves(start):
    """Short requests that never end to come do not keep a long one from its end."""
    with start(packing=False, ageing=0.5) as scheduler:
        long = scheduler.submit(LONG, id="long")
        short = [scheduler.submit({**TEXT, "num_inference_steps": 2})]
        while not long.future.done() and len(short) < 500:
            short.append(scheduler.submit({**TEXT, "num_inference_steps": 2}))
            short[-2].result(WAIT)
        assert long.future.done()
        assert ends(scheduler).index("long") > 0  # but some came first


def test_like_requests_step_together(start, own_pipe, monkeypatch):
    """As long as it is predicted to be faster: here two at a time, not three."""
    with start() as scheduler:
        monkeypatch.setattr(scheduler.pace, "expect", _two_at_a_time)
        with Pause() as pause:
            tickets = [pause.submit(scheduler, TEXT)]
            tickets += [scheduler.submit({**TEXT, "seed": seed}) for seed in range(3)]
        for ticket in tickets:
            ticket.result(WAIT)
        packs = scheduler.events.packs
    assert max(packs) == 2 and packs.count(2) >= 10
    assert sum(packs) == 4 * TEXT["num_inference_steps"]


def _two_at_a_time(work) -> float:
    if work.family[0] == "step":
        return {1: 1.0, 2: 1.2, 3: 9.0}[work.kind[1]]
    return 0.1


def test_a_full_queue(start):
    with start(max_queue=3) as scheduler:
        with Pause() as pause:
            first = pause.submit(scheduler, LONG)
            others = [scheduler.submit(TEXT) for _ in range(2)]
            with pytest.raises(QueueFullError, match=r"3 requests .* try again in \d+ s") as full:
                scheduler.submit(TEXT)
            assert full.value.retry_after >= 1
            others[0].cancel()  # one that waits makes room at once
            others[0] = scheduler.submit(TEXT)
        for ticket in (first, *others):
            ticket.result(WAIT)
        assert scheduler.events.refusals == ["queue_full"]


def test_time_is_over(start):
    with start() as scheduler:
        with Pause() as pause:
            first = pause.submit(scheduler, LONG)
            late = scheduler.submit(TEXT, timeout_seconds=0.001)
        with pytest.raises(TimedOutError, match=r"longer than 0\.001 s"):
            late.result(WAIT)
        first.result(WAIT)


def test_closing(start, alone):
    """Accepted requests end within the time to drain; later ones get a sentence."""
    with start() as scheduler:
        with Pause() as pause:
            tickets = [pause.submit(scheduler, TEXT), scheduler.submit(TEXT)]
            scheduler.stop_accepting()
            with pytest.raises(ClosedError, match="takes no more requests"):
                scheduler.submit(TEXT)
            assert not scheduler.state().ready
        assert scheduler.close(WAIT)
        for ticket in tickets:
            assert relative_error(ticket.result(0), alone[0]) < 1e-5
    with start() as scheduler:
        with Pause() as pause:
            first = pause.submit(scheduler, LONG)
            waiting = scheduler.submit(TEXT)
            assert not scheduler.close(0, join_seconds=0.1)
        for ticket in (first, waiting):
            with pytest.raises(ClosedError, match="send the request to another one"):
                ticket.result(WAIT)


@pytest.mark.parametrize("where", ["start", "step", "step_together", "finish", "decode"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), ValueError("odd")])
def test_a_failure_once(start, own_pipe, alone, monkeypatch, where, error):
    """It is tried again from the last finished step: the others never know."""
    engine, calls = own_pipe.engine, []
    right = getattr(engine, where)

    def fails_once(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return right(*arguments, **more)

    with start(packing=where != "step") as scheduler:
        monkeypatch.setattr(engine, where, fails_once)
        monkeypatch.setattr(scheduler.pace, "expect", lambda work: 1.0)  # so all step together
        with Pause() as pause:
            request = {**TEXT, "output_type": "pt"} if where == "decode" else TEXT
            tickets = [pause.submit(scheduler, request)]
            tickets += [scheduler.submit(request) for _ in range(3)]
        failed = 0
        for ticket in tickets:
            try:
                found = ticket.result(WAIT)
            except ValueError as raised:
                assert raised is error
                failed += 1
            else:
                assert where == "decode" or relative_error(found, alone[0]) < 1e-5
        assert len(calls) >= 2
        # alone, what fails is at fault
        assert failed <= (0 if isinstance(error, RuntimeError) else 1)


def test_memory_that_runs_out_again_and_again(start, own_pipe, alone, monkeypatch):
    """Every plan is tried, then the request gets a sentence; later ones are served."""
    engine, right = own_pipe.engine, own_pipe.engine.step

    def fails(*running):
        if running[0].call.request.seed == 99:
            raise torch.OutOfMemoryError("out of memory")
        right(*running)

    with start(packing=False) as scheduler:
        monkeypatch.setattr(engine, "step", fails)
        with Pause() as pause:
            first = pause.submit(scheduler, TEXT)
            bad = scheduler.submit({**TEXT, "seed": 99})
            other = scheduler.submit(EDIT)
        with pytest.raises(OmniGenError, match="out of memory with every plan"):
            bad.result(WAIT)
        assert torch.equal(first.result(WAIT), alone[0])
        assert torch.equal(other.result(WAIT), alone[2])


def test_memory_for_one_at_a_time(start, own_pipe, alone):
    """What does not fit beside others sets them aside, and they come back."""
    decision = own_pipe.plan(**LONG)
    least = decision.estimate.cost(replace(decision.plan, kept_bytes=0)).peak_bytes
    own_pipe.clear_cache()
    with start(memory=int(least * 1.001), packing=False) as scheduler:
        with Pause() as pause:
            first = pause.submit(scheduler, LONG)
            others = [scheduler.submit(TEXT), scheduler.submit(REQUESTS[3])]
        found = [ticket.result(WAIT) for ticket in (first, *others)]
        with pytest.raises(MemoryBudgetError, match="needs at least"):
            scheduler.submit({**TEXT, "height": 768, "width": 768, "num_images_per_prompt": 64})
    for one, i in zip(found, (1, 0, 3)):
        assert relative_error(one, alone[i]) < 1e-5


def test_what_a_request_may_not_choose(start):
    with start() as scheduler:
        for name, value in {"dtype": "bfloat16", "memory": "1GiB"}.items():
            with pytest.raises(RequestError, match=f"can't have {name}"):
                scheduler.submit({**TEXT, name: value})
        with pytest.raises(RequestError, match="prompt is empty"):
            scheduler.submit({**TEXT, "prompt": ""})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"policy": "random"}, "policy must be shortest or fcfs"),
        ({"max_queue": 0}, "max_queue must be an integer of at least 1"),
        ({"max_pack": True}, "max_pack must be an integer"),
        ({"ageing": -1}, "ageing must be a number of at least 0"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0"),
        ({"memory": "much"}, "memory must be"),
    ],
)
def test_settings_that_can_not_be(settings, sentence):
    with pytest.raises(RequestError, match=sentence):
        Settings(**settings)


def test_a_model_that_can_not_be_loaded():
    def load():
        raise OmniGenError("no such folder")

    scheduler = Scheduler(load)
    with pytest.raises(NotReadyError, match="no such folder"):
        scheduler.wait_until_ready(WAIT)
    with pytest.raises(NotReadyError, match="no such folder"):
        scheduler.submit(TEXT)
    assert scheduler.state().failure and scheduler.close()


def test_nothing_is_left(start, own_pipe):
    """Of a hundred requests, half of them cancelled."""

    def tensors() -> int:
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    chance, counts = random.Random(1), []
    for _ in range(3):
        with start(max_queue=1000) as scheduler:
            tickets = [
                scheduler.submit({**TEXT, "num_inference_steps": chance.randint(1, 4)})
                for _ in range(33)
            ]
            for ticket in tickets[::2]:
                ticket.cancel()
            for ticket in tickets:
                ticket.future.exception(WAIT)
            del tickets, ticket, scheduler
        counts.append(tensors())
    assert counts[2] <= counts[1] + 5  # a leak would be dozens
