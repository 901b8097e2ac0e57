"""Names and arguments that are none here are told in one line what to write."""

from __future__ import annotations

import inspect
import io
import threading

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, TINY, relative_error
from test_both_worlds import (
    QUIET,
    SMALL,
    TEXT,
    TOLERANCE,
    in_one_line,
    latents,
    offloads,
)
from tqdm import tqdm

from omnigen_fast import OmniGenError, OmniGenPipeline, RequestError
from omnigen_fast.equivalents import ARGUMENTS, ATTRIBUTES
from omnigen_fast.errors import ArgumentError, AttributeNameError

pytestmark = pytest.mark.early


@pytest.fixture(scope="module")
def drawn(shared_pipe) -> torch.Tensor:
    """What a call without anything else gives."""
    return latents(shared_pipe, TEXT)


class TestNames:
    @pytest.mark.parametrize("name", ARGUMENTS["__call__"])
    def test_other_arguments_of_a_call(self, shared_pipe, drawn, name):
        for call in (shared_pipe, shared_pipe.plan, shared_pipe.make_call):
            with pytest.raises(ArgumentError, match=f"has no argument {name}; ") as found:
                call(TEXT, **QUIET, **{name: "other"})
            assert isinstance(found.value, TypeError) and isinstance(found.value, RequestError)
            in_one_line(found.value)
        assert torch.equal(latents(shared_pipe, TEXT, **{name: None}), drawn)

    @pytest.mark.parametrize(
        ("name", "value"),
        [(name, other.usual[0]) for name, other in ARGUMENTS["__call__"].items() if other.usual],
    )
    def test_what_asks_for_nothing_is_taken(self, shared_pipe, drawn, name, value):
        assert torch.equal(latents(shared_pipe, TEXT, **{name: value}), drawn)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("promt", "did you mean prompt?"),
            ("Guidance_Scale", "did you mean guidance_scale?"),
            ("num_inference_step", "did you mean num_inference_steps?"),
            ("zzz", "help() of it lists its arguments"),
            ("\x1b" * 1000, "help() of it lists its arguments"),
        ],
    )
    def test_misspelt_arguments(self, shared_pipe, name, hint):
        for call in (shared_pipe, shared_pipe.plan, shared_pipe.make_call):
            with pytest.raises(ArgumentError) as found:
                call(TEXT, **{name: 1})
            assert in_one_line(found.value).endswith(hint)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda pipe: pipe(), "the call: missing a required argument: 'prompt'"),
            (lambda pipe: pipe(TEXT, prompt=TEXT), "the call: multiple values for argument"),
            (lambda pipe: pipe(*[TEXT] * 30), "the call: too many positional arguments"),
            (lambda pipe: pipe.plan(TEXT, None, prompt=TEXT), "plan(): multiple values"),
            (lambda pipe: pipe.load_lora_weights(), "load_lora_weights(): missing"),
            (lambda pipe: pipe.set_adapters("a", weights=1), "did you mean adapter_weights?"),
            (lambda pipe: pipe.fuse_lora(scale=1), "did you mean lora_scale?"),
            (lambda pipe: pipe.to("cpu", memory_format=3), "no argument memory_format; "),
            (lambda pipe: pipe.to(devise="cpu"), "did you mean device?"),
            (lambda _: OmniGenPipeline.from_pretrained(), "missing a required argument"),
            (lambda _: OmniGenPipeline.from_pretrained("x", devise=1), "did you mean device?"),
            (lambda _: OmniGenPipeline(vae=1, model=2, processor=3), "from_pretrained(model_name)"),
            (lambda _: OmniGenPipeline(transformer=1, tokenizer=2), "from_pretrained(model_name)"),
        ],
    )
    def test_other_methods(self, shared_pipe, call, words):
        with pytest.raises(ArgumentError) as found:
            call(shared_pipe)
        assert words in in_one_line(found.value)

    @pytest.mark.parametrize("method", sorted(set(ARGUMENTS) - {"__call__", "__init__"}))
    def test_other_arguments_of_methods(self, shared_pipe, method):
        function = getattr(shared_pipe, method)
        first = next(iter(inspect.signature(function).parameters.values()))
        args = (TINY,) if first.default is first.empty else ()
        for name in ARGUMENTS[method]:
            with pytest.raises(ArgumentError, match=f"has no argument {name}; ") as found:
                function(*args, **{name: "other"})
            in_one_line(found.value)

    def test_arguments_of_loading_that_ask_for_nothing(self):
        pipe = OmniGenPipeline.from_pretrained(
            pretrained_model_name_or_path=TINY,
            dtype="float32",
            use_safetensors=True,
            low_cpu_mem_usage=True,
            safety_checker=None,
            device_map=None,
        )
        assert pipe.dtype == torch.float32

    @pytest.mark.parametrize("name", ATTRIBUTES)
    def test_other_attributes(self, shared_pipe, name):
        for owner in (shared_pipe, OmniGenPipeline):
            with pytest.raises(AttributeNameError, match=f"no attribute {name}; ") as found:
                getattr(owner, name)
            assert isinstance(found.value, OmniGenError)
            in_one_line(found.value)
            assert not hasattr(owner, name)
        with pytest.raises(AttributeNameError, match=f"{name} can't be set; "):
            setattr(shared_pipe, name, 1)
        setattr(shared_pipe, name, None)  # takes out what is not there
        assert not hasattr(shared_pipe, name)

    @pytest.mark.parametrize(
        "kind", ["OmniGenPipeline", "StableDiffusionXLPipeline", "FluxPipeline"]
    )
    def test_diffusers_public_names(self, shared_pipe, kind):
        import diffusers

        for name in dir(getattr(diffusers, kind)):
            if not name.startswith("_"):
                assert hasattr(shared_pipe, name) or name in ATTRIBUTES, name

    def test_unknown_attributes_are_usual_errors(self, shared_pipe):
        for owner, words in [
            (shared_pipe, "'OmniGenPipeline' object has no attribute 'foo'"),
            (OmniGenPipeline, "type object 'OmniGenPipeline' has no attribute 'foo'"),
        ]:
            with pytest.raises(AttributeError) as found:
                owner.foo  # noqa: B018
            assert type(found.value) is AttributeError
            assert (found.value.name, found.value.obj) == ("foo", owner)
            assert str(found.value) == words
            assert getattr(owner, "foo", 3) == 3

    def test_a_failing_property_keeps_its_error(self, shared_pipe, monkeypatch):
        monkeypatch.delattr(shared_pipe.engine, "precision")
        with pytest.raises(AttributeError, match="'Engine' object has no attribute 'precision'"):
            shared_pipe.dtype  # noqa: B018

    @pytest.mark.parametrize(
        "name",
        [
            *("scheduler", "transformer", "model", "device", "dtype", "num_timesteps"),
            *("guidance_scale", "_guidance_scale", "interrupt", "config"),
            *("model_cpu_offload", "name_or_path", "vae_scale_factor", "_execution_device"),
        ],
    )
    def test_what_can_only_be_read(self, shared_pipe, name):
        before = getattr(shared_pipe, name)
        with pytest.raises(AttributeNameError, match=f"the pipeline's {name} can't be set; "):
            setattr(shared_pipe, name, before)

    def test_the_scheduler_describes_the_steps(self, shared_pipe):
        import diffusers

        latents(shared_pipe, TEXT, num_inference_steps=4)
        scheduler = shared_pipe.scheduler
        assert scheduler.timesteps.tolist() == [0, 0.25, 0.5, 0.75]
        latents(shared_pipe, TEXT, timesteps=[0, 0.5, 0.75])
        assert shared_pipe.scheduler.timesteps.tolist() == [0, 0.5, 0.75]
        assert scheduler.config.invert_sigmas and scheduler.config.num_train_timesteps == 1
        other = diffusers.FlowMatchHeunDiscreteScheduler.from_config(scheduler.config)
        with pytest.raises(AttributeNameError, match=r"omnigen_fast\.enable"):
            shared_pipe.scheduler = other
        with pytest.raises(RequestError, match=r"shift of 3.0 can't be set; give .*time_shift"):
            scheduler.set_shift(3.0)

    def test_parts_and_sizes(self, shared_pipe):
        assert shared_pipe.transformer is shared_pipe.model
        assert shared_pipe.name_or_path == str(TINY)
        assert (shared_pipe.vae_scale_factor, shared_pipe.default_sample_size) == (8, 128)
        assert shared_pipe.tokenizer_max_length == shared_pipe.config.max_position_embeddings

    def test_switches_of_what_is_always_so(self, shared_pipe):
        before = latents(shared_pipe, TEXT)
        for owner, names in [
            (shared_pipe, ("vae_slicing", "vae_tiling", "attention_slicing")),
            (shared_pipe, ("xformers_memory_efficient_attention",)),
            (shared_pipe.vae, ("slicing", "tiling")),
        ]:
            for name in names:
                for verb in ("enable", "disable"):
                    assert getattr(owner, f"{verb}_{name}")() is None
        shared_pipe.enable_attention_slicing("max")
        assert torch.equal(latents(shared_pipe, TEXT), before)

    def test_offloading(self, load_pipe):
        pipe = load_pipe()
        before = latents(pipe, TEXT)
        for switch in (pipe.enable_sequential_cpu_offload, pipe.enable_model_cpu_offload):
            switch(device="cpu")
            assert offloads(pipe)
            assert relative_error(latents(pipe, TEXT), before) < TOLERANCE
            pipe.disable_model_cpu_offload()
        with pytest.raises(RequestError, match="device 'cuda:93' can't be used"):
            pipe.enable_model_cpu_offload(gpu_id=93)
        assert not pipe.model_cpu_offload

    def test_from_pipe(self, shared_pipe, build):
        assert OmniGenPipeline.from_pipe(shared_pipe) is shared_pipe
        for pipeline, changes in [(build(), {}), (shared_pipe, {"vae": 1}), (None, {})]:
            with pytest.raises(RequestError, match=r"omnigen_fast\.enable"):
                OmniGenPipeline.from_pipe(pipeline, **changes)


class TestProgressBar:
    def test_its_style_stays(self, load_pipe, capsys):
        pipe = load_pipe()
        pipe.set_progress_bar_config(desc="drawing", ncols=60)
        latents(pipe, TEXT, progress=True)
        assert "drawing: 100%" in capsys.readouterr().err
        latents(pipe, TEXT, progress=False)
        pipe.set_progress_bar_config(disable=True)
        latents(pipe, TEXT, progress=True)
        assert capsys.readouterr().err == ""
        pipe.set_progress_bar_config()
        latents(pipe, TEXT, progress=True)
        assert "100%" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"total": 3}, "no argument total"),
            ({"iterable": []}, "no argument iterable"),
            ({"descr": "x"}, "did you mean desc?"),
            ({"ncols": "wide"}, "the progress bar can't use these: "),
            ({"bar_format": "{nothing}"}, "the progress bar can't use these: "),
        ],
    )
    def test_what_it_does_not_take(self, load_pipe, capsys, config, words):
        pipe = load_pipe()
        with pytest.raises(RequestError) as found:
            pipe.set_progress_bar_config(**config)
        assert words in in_one_line(found.value)
        latents(pipe, TEXT, progress=True)  # as before
        assert "100%" in capsys.readouterr().err

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_a_line_that_fails_blocks_no_other_thread(self, load_pipe, error):
        class Broken(io.StringIO):
            def write(self, text):
                raise error

        pipe = load_pipe()
        expected = latents(pipe, TEXT, progress=False)
        pipe.set_progress_bar_config(file=Broken())
        with pytest.raises(error):
            latents(pipe, TEXT, progress=True)
        pipe.set_progress_bar_config(file=io.StringIO())
        for shown in (True, False):
            assert torch.equal(in_another_thread(latents, pipe, TEXT, progress=shown), expected)

    def test_one_that_is_not_shown_waits_for_none(self, load_pipe):
        pipe = load_pipe()
        with tqdm.get_lock():
            in_another_thread(latents, pipe, TEXT, progress=False)


def in_another_thread(function, *args, **kwargs):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args, **kwargs)), daemon=True)
    thread.start()
    thread.join(120)
    assert found, "the call does not end, or failed"
    return found[0]


class TestArguments:
    @pytest.mark.parametrize(
        ("amount", "expected"),
        [
            ("1GiB", 1 << 30),
            ("1.5 GB", 1_500_000_000),
            ("auto", 2 << 30),
            (0, 0),
            (12_345, 12_345),
            (np.int64(5), 5),
            (2.0**20, 1 << 20),
        ],
    )
    def test_memory_for_conditions(self, load_pipe, amount, expected):
        assert load_pipe(condition_cache_bytes=amount).engine.cache_bytes == expected

    @pytest.mark.parametrize(
        "amount", [-1, True, None, 1.5, "", "much", "-1GiB", "8", [1], float("nan"), "x" * 9999]
    )
    def test_what_is_no_amount(self, load_pipe, amount):
        with pytest.raises(RequestError, match="condition_cache_bytes must be") as found:
            load_pipe(condition_cache_bytes=amount)
        in_one_line(found.value)

    @pytest.mark.parametrize("model", [None, 3, b"model", [], True])
    def test_what_is_no_model(self, model):
        with pytest.raises(RequestError, match="model_name must be a folder or a hub id") as found:
            OmniGenPipeline.from_pretrained(model)
        in_one_line(found.value)

    @pytest.mark.parametrize("progress", ["no", None, 1])
    def test_progress_is_a_switch(self, shared_pipe, progress):
        for call in (shared_pipe, shared_pipe.plan, shared_pipe.make_call):
            with pytest.raises(RequestError, match="progress must be True or False, got"):
                call(TEXT, **SMALL, progress=progress)

    @pytest.mark.parametrize("name", [3, [3], {"a": 1}])
    def test_what_is_no_adapters_name(self, shared_pipe, name):
        for change in (shared_pipe.unload_lora_weights, shared_pipe.delete_adapters):
            with pytest.raises(RequestError, match="adapter names must be texts"):
                change(name)

    @pytest.mark.parametrize("source", [None, 3, b"lora", [], ("a", "b")])
    def test_what_is_no_lora(self, shared_pipe, source):
        for load in (shared_pipe.load_lora_weights, shared_pipe.merge_lora):
            with pytest.raises(RequestError, match="a LoRA must be a path") as found:
                load(source)
            in_one_line(found.value)
        assert shared_pipe.get_list_adapters() == {}

    def test_diffusers_name_for_a_lora(self, load_pipe):
        pipe = load_pipe()
        pipe.load_lora_weights(
            pretrained_model_name_or_path_or_dict=GOLDEN / "lora", adapter_name="one", prefix=None
        )
        assert pipe.get_active_adapters() == ["one"]
