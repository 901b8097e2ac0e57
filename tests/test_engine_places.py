"""How a call begins, goes on under another plan and ends, and what the engine moves for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import TINY
from test_engine import EDIT, FEWER_STEPS, LAYERS, PLAN, TEXT, finish

from omnigen_fast.errors import OmniGenError
from omnigen_fast.graph import StepGraphs
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.precision import Precision
from omnigen_fast.vae.vae import Vae

STREAMED = replace(PLAN, resident_layers=1, cache="ring")
CPU = torch.device("cpu")
LONG = {**TEXT, "prompt": "cat " * 40}
PARTIAL = {**EDIT, "use_input_image_size_as_output": True, "strength": 0.7}


@pytest.fixture
def engine(pipe):
    """The shared pipeline's engine, everything on the device and nothing kept."""
    yield pipe.engine
    pipe.engine.forget()
    pipe.engine.arrange(PLAN, pipe.make_call(**TEXT))


class TestCalls:
    def test_an_edit_of_part_of_the_way_starts_between_noise_and_image(self, pipe, engine):
        call = pipe.make_call(**PARTIAL)
        time, noise = call.schedule.time(0), call.noise.clone()
        running = engine.start(call, PLAN)
        (known,) = engine.image_latents.values()
        assert 0 < time < 1
        assert torch.equal(running.latents, (1 - time) * noise + time * known)
        engine.drop(running)

    @pytest.mark.parametrize("solver", ["euler", "ab2"])
    @pytest.mark.parametrize("request_", [TEXT, PARTIAL], ids=["text", "edit"])
    def test_it_goes_on_from_what_was_saved(self, pipe, engine, request_, solver):
        """Its latents, and what a multistep solver keeps of the step before."""
        request = {**request_, "solver": solver}
        (whole,) = finish(engine, engine.start(pipe.make_call(**request), PLAN))
        call = pipe.make_call(**request)
        while not call.finished:  # another plan after each step
            running = engine.start(call, PLAN if call.steps_done % 2 else STREAMED)
            engine.step(running)
            running.save()
            latents = running.latents.clone()
            engine.drop(running)
            assert torch.equal(call.latents, latents)
        assert bool(call.history) == (solver == "ab2")
        last = engine.start(call, PLAN)
        assert last.finished and last.loop is None
        last.save()
        assert torch.equal(engine.finish(last), whole)

    def test_a_finished_one_stops_no_other(self, pipe, engine):
        short, long = (engine.start(pipe.make_call(**one), PLAN) for one in (FEWER_STEPS, TEXT))
        for _ in range(5):
            engine.step(short, long)
        assert (short.call.steps_done, long.call.steps_done) == (3, 5)
        finish(engine, short, long)

    def test_end_ends_one_call(self, pipe, engine):
        """Of several that ask for the same."""
        first, second = (engine.start(pipe.make_call(**TEXT), PLAN) for _ in range(2))
        engine.end(second.call)
        assert second.loop is None and first.loop is not None
        second = engine.start(pipe.make_call(**TEXT), PLAN)
        engine.drop(second)
        assert second.loop is None and first.loop is not None
        third = engine.start(pipe.make_call(**TEXT), PLAN)
        finish(engine, third)
        assert first.loop is not None
        engine.end(first.call)
        assert first.loop is None

    def test_a_failure_empties_the_rings(self, pipe, engine):
        running = engine.start(pipe.make_call(**TEXT), STREAMED)
        engine.step(running)
        emptied = []
        engine.model.stream.reset = lambda: emptied.append("layers")
        engine.streamed.reset = lambda: emptied.append("conditions")
        engine.recover()
        assert sorted(emptied) == ["conditions", "layers"]
        engine.free()  # leaves what is under way
        del engine.streamed.reset, engine.model.stream.reset
        assert engine.streamed.nbytes and engine.store.slots
        engine.drop(running)

    def test_after_a_failure_only_what_is_under_way_is_held(self, pipe, engine):
        alone = replace(PLAN, kept_bytes=0)
        running = engine.start(pipe.make_call(**TEXT), alone)
        engine.cache.hold(())
        engine.recover()
        with pytest.raises(OmniGenError, match="another request holds the condition cache"):
            engine.start(pipe.make_call(**LONG), alone)
        engine.drop(running)
        engine.cache.hold(running.entries)
        engine.recover()
        engine.drop(engine.start(pipe.make_call(**LONG), alone))


class TestPlaces:
    def test_recomputing_keeps_the_rows_of_one_layer(self, pipe, engine):
        running = engine.start(pipe.make_call(**TEXT), replace(PLAN, cache="none"))
        assert running.cache.keys.shape[:2] == (1, running.cache.used_rows)
        engine.drop(running)

    def test_a_decoder_has_the_rings_memory(self, pipe, engine):
        (latents,) = finish(engine, engine.start(pipe.make_call(**TEXT), STREAMED))
        assert engine.store.slots and engine.streamed.nbytes
        engine.decode(latents, STREAMED)
        assert not engine.store.slots and not engine.streamed.nbytes

    @pytest.mark.parametrize("on_host", [False, True])
    def test_strips_lie_where_the_plan_says(self, pipe, engine, monkeypatch, on_host):
        places = []
        for name in ("encode", "decode"):
            real = getattr(engine.vae, name)

            def seen(*given, store, real=real):
                places.append(store)
                return real(*given, store=store)

            monkeypatch.setattr(engine.vae, name, seen)
        plan = replace(PLAN, strip_rows=2, strips_on_host=on_host)
        (latents,) = finish(engine, engine.start(pipe.make_call(**EDIT), plan))
        engine.decode(latents, plan)
        assert places == [CPU if on_host else None] * 2

    @pytest.mark.parametrize("capture", [False, True])
    def test_steps_are_captured_only_if_wanted(self, load_pipe, monkeypatch, capture):
        asked = []
        monkeypatch.setattr(StepGraphs, "on", lambda device: asked.append(device) or StepGraphs())
        engine = load_pipe().engine
        asked.clear()
        engine.capture_steps = capture
        engine.to(CPU)
        assert asked == [CPU] * capture

    def test_weights_that_are_loaded_again(self, load_pipe):
        """Keys and values of an equal precision stay, those of another go."""
        pipe = load_pipe()
        engine = pipe.engine
        plan = replace(STREAMED, cache="device")
        engine.drop(engine.start(pipe.make_call(**TEXT), plan))
        engine.drop(engine.start(pipe.make_call(**EDIT), replace(STREAMED, precision=None)))
        assert engine.cache.nbytes == 0 and len(engine.streamed)
        engine.drop(engine.start(pipe.make_call(**TEXT), plan))
        cache = engine.cache
        engine.load(Precision.of("float32"), 2)
        assert engine.store.resident == 2
        assert engine.cache is cache and len(cache) and engine.streamed is not None
        half = Precision.of("bfloat16")
        running = engine.start(pipe.make_call(**TEXT), replace(plan, precision=half))
        assert engine.precision == half and engine.model.dtype == torch.bfloat16
        assert engine.cache is not cache and engine.cache.keys.dtype == torch.bfloat16
        assert not len(cache) and engine.streamed is None
        engine.drop(running)
        engine.drop(engine.start(pipe.make_call(**TEXT), plan))  # the plan leaves it as it is
        assert engine.precision == half

    def test_weights_come_back_streamed(self, load_pipe):
        """Before a plan says what fits."""
        engine = load_pipe().engine
        engine._model = engine._store = None
        assert engine.store.resident == 0

    def test_another_vae(self, load_pipe):
        pipe = load_pipe()
        engine = pipe.engine
        running = engine.start(pipe.make_call(**EDIT), replace(PLAN, vae_resident=False))
        before, other = engine.vae, Vae.from_folder(TINY / "vae", CPU)
        with pytest.raises(OmniGenError, match="a call is under way and uses the VAE"):
            engine.take_vae(other)
        assert engine.vae is before
        engine.drop(running)
        engine.take_vae(other)
        assert engine.vae is other and not other.resident
        assert not engine.image_latents and not engine.cache.nbytes

    def test_where_weights_are_on_a_plan(self, pipe, engine):
        for resident, vae in ((1, True), (1, False), (LAYERS, True)):
            plan = replace(PLAN, resident_layers=resident, vae_resident=vae)
            engine.arrange(plan, pipe.make_call(**TEXT))
            assert engine.arrangement == replace(MemoryPlan.plain(resident), vae_resident=vae)
