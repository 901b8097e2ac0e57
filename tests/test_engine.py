"""Calls side by side on one engine, and schedules: each call has the bits that it has alone."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, relative_error
from recording import recording_graphs

from omnigen_fast.engine import Engine
from omnigen_fast.errors import OmniGenError
from omnigen_fast.memory.device import held_bytes
from omnigen_fast.memory.plan import MemoryPlan

LAYERS = 3  # of the golden checkpoint
ROOM = 16 << 20  # for the conditions of several calls
PLAN = MemoryPlan.plain(LAYERS, kept_bytes=ROOM)
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
OTHER_SEED = {**TEXT, "seed": 12}
FEWER_STEPS = {**TEXT, "num_inference_steps": 3, "seed": 13}
WIDER = {**TEXT, "width": 80, "seed": 14}
TWO = {**EDIT, "num_images_per_prompt": 2, "seed": 15}
SIDE_BY_SIDE = {
    "text and edit": (TEXT, EDIT),
    "two seeds": (TEXT, OTHER_SEED),
    "two seeds of an edit": (EDIT, {**EDIT, "seed": 16}),
    "other step counts": (TEXT, FEWER_STEPS),
    "other sizes": (EDIT, WIDER),
    "three": (TEXT, TWO, FEWER_STEPS),
}


@pytest.fixture
def engine(pipe):
    """The shared pipeline's engine with nothing kept; nothing is under way behind it."""
    yield pipe.engine
    pipe.engine.forget()


@pytest.fixture(scope="module")
def alone(load_pipe):
    """Latents of requests, each on an engine that has nothing kept."""
    pipe, found = load_pipe(memory=PLAN), {}

    def run(request, plan: MemoryPlan = PLAN) -> torch.Tensor:
        key = repr(request), plan
        if key not in found:
            pipe.clear_cache()
            found[key] = pipe(**request, progress=False, memory=plan)
        return found[key]

    return run


def finish(engine, *running, order: random.Random | None = None) -> list[torch.Tensor]:
    """Steps calls until all are over, in turns or one at a time as chance has it."""
    while not all(one.finished for one in running):
        engine.step(*(running if order is None else [order.choice(running)]))
    return [engine.finish(one) for one in running]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("requests", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
def test_calls_side_by_side(pipe, engine, alone, monkeypatch, requests, captured):
    graphs, events = recording_graphs()
    plan = replace(PLAN, capture=captured)
    monkeypatch.setattr(engine, "graphs", graphs)
    for order in (None, random.Random(0)):
        running = [engine.start(pipe.make_call(**request), plan) for request in requests]
        for found, request in zip(finish(engine, *running, order=order), requests):
            assert torch.equal(found, alone(request))
    assert ("replay" in events) == captured


def test_a_call_that_begins_while_another_replays(pipe, engine, alone, monkeypatch):
    """It can't take the captured loop, which is busy; a call after both can."""
    graphs, events = recording_graphs()
    monkeypatch.setattr(engine, "graphs", graphs)
    plan = replace(PLAN, capture=True)
    first = engine.start(pipe.make_call(**TEXT), plan)
    engine.step(first)
    engine.step(first)
    assert events == ["capture", "replay"]
    second = engine.start(pipe.make_call(**OTHER_SEED), plan)
    assert second.loop is not first.loop
    found = finish(engine, first, second)
    assert torch.equal(found[0], alone(TEXT)) and torch.equal(found[1], alone(OTHER_SEED))
    assert events.count("capture") == 1 and events.count("replay") == 4
    third = engine.start(pipe.make_call(**OTHER_SEED), plan)
    assert torch.equal(*finish(engine, third), alone(OTHER_SEED))
    assert events.count("capture") == 1 and events.count("replay") == 9


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_one_of_two_is_dropped(pipe, engine, alone, monkeypatch, captured):
    """The other goes on; what was begun can be begun again."""
    monkeypatch.setattr(engine, "graphs", recording_graphs()[0])
    plan = replace(PLAN, capture=captured)
    first = engine.start(pipe.make_call(**TEXT), plan)
    second = engine.start(pipe.make_call(**OTHER_SEED), plan)
    for _ in range(2):
        engine.step(first, second)
    engine.drop(first)
    engine.drop(first)  # twice is once
    again = engine.start(pipe.make_call(**TEXT), plan)
    found = finish(engine, second, again)
    assert torch.equal(found[0], alone(OTHER_SEED)) and torch.equal(found[1], alone(TEXT))


@pytest.mark.parametrize("layers", [LAYERS, 1], ids=["resident", "streamed"])
@pytest.mark.parametrize("cache", ["device", "ring", "none"])
def test_beside_a_call_with_rings(pipe, engine, alone, cache, layers):
    """The second is even decoded meanwhile, for which a call alone gives the rings up."""
    plan = replace(PLAN, cache=cache, resident_layers=layers)
    first = engine.start(pipe.make_call(**EDIT), plan)
    engine.step(first)
    beside = replace(plan, cache="device")
    second = engine.start(pipe.make_call(**FEWER_STEPS), beside)
    (found,) = finish(engine, second)
    assert torch.equal(found, alone(FEWER_STEPS))
    assert engine.decode(found, beside).isfinite().all()
    third = engine.start(pipe.make_call(**TEXT), beside)
    found = finish(engine, first, third, order=random.Random(1))
    assert torch.equal(found[0], alone(EDIT, plan)) and torch.equal(found[1], alone(TEXT))


def test_weights_that_change_while_a_call_is_under_way(load_pipe):
    """It goes on with the keys and values that it has; the first call after it has new ones."""
    pipe, other = load_pipe(memory=PLAN), load_pipe(memory=PLAN)
    running = [one.engine.start(one.make_call(**TEXT), PLAN) for one in (pipe, other)]
    for one in (pipe, other):
        one.model.parameter("layers.0.down_proj").data.mul_(0.5)
    (alone,) = finish(other.engine, running[1])
    second = pipe.engine.start(pipe.make_call(**FEWER_STEPS), PLAN)
    assert torch.equal(finish(pipe.engine, running[0], second)[0], alone)
    other.clear_cache()
    assert torch.equal(pipe(**TEXT, progress=False), other(**TEXT, progress=False))


def test_a_write_beside_the_samples_is_noticed(load_pipe):
    """By the weight's version: the values that are compared are few."""
    pipe, other = load_pipe(memory=PLAN), load_pipe(memory=PLAN)
    before = pipe(**TEXT, progress=False)
    found = pipe.model.fingerprint()
    for one in (pipe, other):
        with torch.no_grad():
            one.model.parameter("layers.0.down_proj")[1, 1:].mul_(3)
    assert torch.equal(pipe.model.fingerprint()[1], found[1])
    changed = pipe(**TEXT, progress=False)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, other(**TEXT, progress=False))


def test_what_the_caller_has_set_stays_outside(load_pipe, alone):
    """Whoever drives the engine may do it under inference mode and autocast, or leave them."""
    pipe = load_pipe(memory=PLAN)
    engine, call = pipe.engine, pipe.make_call(**TEXT)

    @contextmanager
    def inside():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            yield

    with inside():
        engine.load(engine.precision, LAYERS)
        engine.forget()
    for _ in range(2):
        with inside():
            running = engine.start(call, PLAN)
        while not running.finished:
            with inside():
                engine.step(running)
        assert torch.equal(running.latents, alone(TEXT))
        with inside():
            latents = engine.finish(running)
            picture = engine.decode(latents, PLAN)
        assert torch.equal(picture, engine.decode(latents, PLAN))
        assert not picture.is_inference()
        with inside():
            engine.refresh(["layers.0.down_proj"])
        call = pipe.make_call(**TEXT)


def test_the_pipeline_is_called_while_a_call_is_under_way(pipe, engine, alone):
    first = engine.start(pipe.make_call(**EDIT), PLAN)
    engine.step(first)
    assert torch.equal(pipe(**TEXT, progress=False, memory=PLAN), alone(TEXT))
    pixels = pipe(**{**TEXT, "output_type": "pt"}, progress=False, memory=PLAN)
    assert pixels.shape == (1, 3, 64, 48)
    assert torch.equal(*finish(engine, first), alone(EDIT))


@pytest.mark.parametrize(
    "change",
    [
        {"resident_layers": 1},
        {"vae_resident": False},
        {"cache": "ring"},
        {"cache": "none"},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_that_moves_what_another_call_uses_is_refused(pipe, engine, alone, change):
    from omnigen_fast.precision import Precision

    if "precision" in change:
        change = {"precision": Precision.of(change["precision"])}
    first = engine.start(pipe.make_call(**TEXT), PLAN)
    engine.step(first)
    with pytest.raises(OmniGenError, match="another call is under way"):
        engine.start(pipe.make_call(**EDIT), replace(PLAN, **change))
    assert torch.equal(*finish(engine, first), alone(TEXT))
    plan = replace(PLAN, **change)
    if plan.precision is None:  # and it can be carried out afterwards
        second = engine.start(pipe.make_call(**EDIT), plan)
        assert relative_error(*finish(engine, second), alone(EDIT)) < 1e-5
        engine.arrange(PLAN, second.call)


def test_a_cache_too_small_for_both(pipe, engine, alone):
    """The second is refused, and is carried out when the first is over."""
    plan = replace(PLAN, kept_bytes=0)
    first = engine.start(pipe.make_call(**TEXT), plan)
    engine.step(first)
    for _ in range(2):
        with pytest.raises(OmniGenError, match="another request holds the condition cache"):
            engine.start(pipe.make_call(**EDIT), plan)
    assert torch.equal(*finish(engine, first), alone(TEXT))
    second = engine.start(pipe.make_call(**EDIT), plan)
    assert torch.equal(*finish(engine, second), alone(EDIT))


def test_a_failure_of_one_leaves_the_other(pipe, engine, alone, monkeypatch):
    first = engine.start(pipe.make_call(**TEXT), PLAN)
    engine.step(first)

    def fail(*arguments):
        raise KeyboardInterrupt

    for place in ("prefill", "crop_pos_embed"):
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, place, fail)
            with pytest.raises(KeyboardInterrupt):
                engine.start(pipe.make_call(**EDIT), PLAN)
        engine.recover()
    second = engine.start(pipe.make_call(**EDIT), PLAN)
    found = finish(engine, first, second)
    assert torch.equal(found[0], alone(TEXT)) and torch.equal(found[1], alone(EDIT))


class TestWhatIsHeld:
    """What an engine gives up, and when."""

    @pytest.fixture
    def kept(self, load_pipe):
        """An engine that keeps everything there is to keep, with half of its layers streamed."""
        pipe = load_pipe()
        pipe(**EDIT, memory=replace(PLAN, resident_layers=1, cache="ring"), progress=False)
        engine = pipe.engine
        assert engine.image_latents and engine.model.crops()
        assert engine.streamed is not None and len(engine.streamed)
        assert engine.store.slots  # latents were asked for: no decoder needed the ring's memory
        return engine

    def test_freeing_keeps_what_is_on_the_host(self, kept):
        kept.free()
        assert not kept.image_latents and not kept.model.crops() and not kept.store.slots
        assert kept.cache.nbytes == kept.streamed.nbytes == 0
        assert len(kept.streamed)

    def test_freeing_leaves_what_a_call_uses(self, pipe, engine):
        going = engine.start(pipe.make_call(**TEXT), PLAN)
        rows = engine.cache.used_rows
        engine.free()
        assert engine.cache.used_rows == rows > 0
        engine.drop(going)
        engine.free()
        assert engine.cache.nbytes == 0

    def test_forgetting_keeps_nothing_but_weights(self, kept):
        kept.forget()
        assert not kept.image_latents and not kept.model.crops()
        assert kept.streamed is None and kept.cache.nbytes == 0
        assert kept.store.resident == 1

    def test_a_forked_child_leaves_the_rings_to_its_parent(self, kept):
        kept.after_fork()
        assert kept.streamed is None and kept.model.stream is None and not kept.store.slots
        assert kept.store.resident == 1

    def test_everything_on_the_device_counts(self, kept):
        """The ring of layers, the streamed cache and its host's copies, the autoencoder."""

        def given_up(action) -> int:
            before = kept.held_bytes()
            action()
            return before - kept.held_bytes()

        def size(tensors) -> int:
            return held_bytes([*tensors], kept.device)

        slots, streamed = size(kept.store.slots), size(kept.streamed.tensors())
        autoencoder = size(kept.vae.autoencoder.parameters())
        assert slots and streamed
        assert given_up(kept.store.stop) == slots
        assert given_up(kept.forget) == streamed
        assert given_up(lambda: setattr(kept, "_store", None)) == 0
        weights = size(kept.model.parameters())
        assert given_up(lambda: setattr(kept, "_model", None)) == weights
        assert kept.held_bytes() == autoencoder

    @pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
    def test_a_gpus_allocator_gives_back_what_is_freed(self, kept, monkeypatch, device):
        emptied = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kept.cache.nbytes))
        kept.device = torch.device(device)
        kept.free()
        assert emptied == ([0] if device == "cuda" else [])

    def test_the_latents_of_256_images_are_kept(self, load_pipe):
        """The latest ones; what a call uses is among them."""
        pipe = load_pipe()
        engine, call = pipe.engine, pipe.make_call(**EDIT)
        engine.drop(engine.start(call, PLAN))
        ((used, latents),) = engine.image_latents.items()
        for other in range(255):
            engine.image_latents[str(other), None] = latents
        engine.cache.clear()
        engine.drop(engine.start(call, PLAN))
        assert len(engine.image_latents) == 256 and next(reversed(engine.image_latents)) == used
        engine.drop(engine.start(pipe.make_call(**{**EDIT, "max_input_image_size": 64}), PLAN))
        assert len(engine.image_latents) == 256
        assert ("0", None) not in engine.image_latents and used in engine.image_latents

    def test_a_condition_that_is_kept_is_not_computed_again(self, pipe, engine, monkeypatch):
        """Nor are the images of it encoded."""
        engine.drop(engine.start(pipe.make_call(**EDIT), PLAN))
        engine.image_latents.clear()
        monkeypatch.setattr(engine.model, "prefill", None)
        engine.drop(engine.start(pipe.make_call(**{**EDIT, "seed": 12}), PLAN))
        assert not engine.image_latents

    @pytest.mark.parametrize("cache", ["ring", "none"])
    def test_another_place_for_the_cache_frees_this_one(self, pipe, engine, cache):
        engine.drop(engine.start(pipe.make_call(**TEXT), PLAN))
        assert engine.cache.nbytes
        engine.drop(engine.start(pipe.make_call(**TEXT), replace(PLAN, cache=cache)))
        assert engine.cache.nbytes == 0
        assert (engine.streamed is not None and len(engine.streamed) > 0) == (cache == "ring")
        engine.drop(engine.start(pipe.make_call(**TEXT), PLAN))
        assert engine.cache.nbytes and not engine.streamed

    def test_a_cpu_reads_streamed_layers_where_they_are(self, kept):
        assert kept.store.slots and not kept.store._copies

    def test_where_weights_are(self, kept, load_pipe):
        assert kept.arrangement == replace(MemoryPlan.plain(1), vae_resident=True)
        unloaded = load_pipe().engine
        unloaded._model = unloaded._store = None
        assert unloaded.arrangement.resident_layers == 0
        for method in (unloaded.free, unloaded.forget, unloaded.recover, unloaded.after_fork):
            method()
        assert unloaded.model.dtype == torch.float32  # loaded again where it is wanted

    def test_budgets_are_two_gibibytes_unless_given(self, load_pipe):
        assert load_pipe().engine.cache_bytes == 2 << 30
        assert load_pipe(condition_cache_bytes=5).engine.cache_bytes == 5

    def test_an_engine_over_a_model_that_is_there(self, pipe, alone):
        """It captures where it can, and keeps as much as it is told."""
        here = pipe.engine
        engine = Engine.of(pipe.model, here.checkpoint, here.vae, 5)
        assert (engine.cache_bytes, engine.capture_steps) == (5, True)
        assert engine.model is pipe.model and engine.store.resident == LAYERS
        found = finish(engine, engine.start(pipe.make_call(**TEXT), PLAN))
        assert torch.equal(*found, alone(TEXT))
