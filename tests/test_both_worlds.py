"""Code written for the original or for diffusers runs here, or is told in one line what to write.

The calls have the arguments of the original's guide and of diffusers' page on OmniGen, on a small
model.
"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, TINY, relative_error
from PIL import Image
from safetensors.torch import load_file

import omnigen_fast
from omnigen_fast import MemoryPlan, OmniGenError, OmniGenPipeline, RequestError
from omnigen_fast.equivalents import ARGUMENTS, ATTRIBUTES
from omnigen_fast.errors import ArgumentError, AttributeNameError
from omnigen_fast.for_diffusers import calls

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
IMAGES = GOLDEN / "images"
CAT, CUP = str(IMAGES / "cat.png"), str(IMAGES / "coffee.png")
TEXT = "A fox reads a newspaper."
ONE = "The cat of <img><|image_1|></img> sleeps on a sofa."
TWO = "The cat is <img><|image_1|></img>. It drinks from <img><|image_2|></img>."
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}
QUIET = {**SMALL, "progress": False}
# what the original's guide spells out
SWITCHES = {
    "separate_cfg_infer": True,
    "use_kv_cache": True,
    "offload_kv_cache": True,
    "offload_model": False,
    "use_input_image_size_as_output": False,
}
# The original's call, in its order.
ORIGINALS = (
    *("prompt", "input_images", "height", "width", "num_inference_steps", "guidance_scale"),
    *("use_img_guidance", "img_guidance_scale", "max_input_image_size", "separate_cfg_infer"),
    *("offload_model", "use_kv_cache", "offload_kv_cache", "use_input_image_size_as_output"),
    *("dtype", "seed", "output_type"),
)


@pytest.fixture(scope="module")
def shared(build):
    return omnigen_fast.enable(build())


@pytest.fixture
def enabled(shared):
    yield omnigen_fast.enable(shared)


def latents(pipe, *args, **call) -> torch.Tensor:
    return pipe(*args, **{**QUIET, "seed": 0, "output_type": "latent", **call})


def offloads(pipe) -> bool | None:
    """What a call demands of the weights; on a CPU nothing follows from it."""
    return pipe.make_call(TEXT, **QUIET).request.switches.offload_model


def in_one_line(error: BaseException) -> str:
    message = str(error)
    assert 0 < len(message) <= 300 and message.isprintable(), message
    return message


class TestOriginal:
    @pytest.mark.parametrize(
        ("given", "same_as"),
        [
            ({"prompt": TEXT, "guidance_scale": 2.5}, {"prompt": TEXT, "guidance_scale": 2.5}),
            (
                {"prompt": ONE, "input_images": [CAT], "guidance_scale": 2.5, **SWITCHES},
                {"prompt": ONE, "input_images": [CAT], "guidance_scale": 2.5},
            ),
            (
                {"prompt": TEXT, "input_images": None, "offload_model": True},
                {"prompt": TEXT},
            ),
            (
                {"prompt": TEXT, "dtype": torch.float32, "separate_cfg_infer": False},
                {"prompt": TEXT, "dtype": None},
            ),
            (
                {"prompt": [TEXT, ONE], "input_images": [[], [CAT]], "img_guidance_scale": 1.8},
                {"prompt": [TEXT, ONE], "input_images": [None, [CAT]], "img_guidance_scale": 1.8},
            ),
            # its notebook has closing tags like these
            (
                {"prompt": "<img><|image_1|><img> sleeps.", "input_images": [CAT]},
                {"prompt": "<img><|image_1|><img> sleeps.", "input_images": CAT},
            ),
            (
                {"prompt": r"<img><|image_1|><\/img> sleeps.", "input_images": [CAT]},
                {"prompt": r"<img><|image_1|><\/img> sleeps.", "input_images": [Image.open(CAT)]},
            ),
        ],
        ids=["text", "switches", "no-images", "dtype", "batch", "open-tag", "escaped-tag"],
    )
    def test_calls(self, shared_pipe, given, same_as):
        found = latents(shared_pipe, **given, max_input_image_size=64)
        expected = latents(shared_pipe, **same_as, max_input_image_size=64)
        assert relative_error(found, expected) < TOLERANCE

    def test_a_list_of_images_comes_back(self, shared_pipe, tmp_path):
        images = shared_pipe(
            prompt=TWO,
            input_images=[CAT, CUP],
            **QUIET,
            guidance_scale=2.5,
            img_guidance_scale=1.6,
            max_input_image_size=64,
            seed=0,
        )
        assert isinstance(images, list) and len(images) == 1
        images[0].save(tmp_path / "out.png")
        assert Image.open(tmp_path / "out.png").size == (48, 32)

    def test_the_input_images_size(self, shared_pipe):
        (image,) = shared_pipe(
            prompt=ONE,
            input_images=[CAT],
            num_inference_steps=1,
            max_input_image_size=64,
            use_input_image_size_as_output=True,
            progress=False,
        )
        assert max(image.size) <= 64 and image.size != (48, 32)

    def test_the_order_of_arguments(self, shared_pipe):
        parameters = list(inspect.signature(OmniGenPipeline.__call__).parameters)[1:]
        assert tuple(parameters[: len(ORIGINALS)]) == ORIGINALS
        call = (TEXT, None, 32, 48, 2, 2.5, True, 1.6, 1024, True, False, True, True, False)
        found = shared_pipe(*call, torch.float32, 0, "pt", progress=False)
        expected = latents(shared_pipe, TEXT, guidance_scale=2.5, output_type="pt")
        assert relative_error(found, expected) < TOLERANCE

    def test_attributes_and_methods(self, load_pipe):
        pipe = load_pipe()
        assert pipe.to("cpu") is pipe
        pipe.enable_model_cpu_offload()
        assert pipe.model_cpu_offload is True
        assert offloads(pipe)
        offloaded = latents(pipe, TEXT)
        pipe.disable_model_cpu_offload()
        assert offloads(pipe) is False
        assert pipe.model_cpu_offload is False
        assert relative_error(latents(pipe, TEXT), offloaded) < TOLERANCE
        assert pipe.device.type == "cpu" and pipe.vae.dtype == torch.float32
        assert pipe.vae.config.scaling_factor > 0
        pipe.merge_lora(str(GOLDEN / "lora"))
        assert relative_error(latents(pipe, TEXT), offloaded) > 1e-3


def examples():
    """As diffusers' page has them: texts, edits of an image's size, two images."""
    photo, cup = (Image.open(path).convert("RGB") for path in (CAT, CUP))
    edit = {"guidance_scale": 2, "img_guidance_scale": 1.6, "num_inference_steps": 2}
    return {
        "text": {"prompt": TEXT, "guidance_scale": 3, **SMALL},
        "edit": {
            "prompt": "<img><|image_1|></img> Colour the cat red.",
            "input_images": [photo],
            "use_input_image_size_as_output": True,
            **edit,
        },
        "question": {
            "prompt": "Which one is thirsty? Mark it in blue. <img><|image_1|></img>",
            "input_images": [photo],
            "use_input_image_size_as_output": True,
            **edit,
        },
        "two": {"prompt": TWO, "input_images": [photo, cup], **edit, **SMALL},
    }


class TestDiffusersExamples:
    @pytest.mark.parametrize("name", examples())
    def test_same_images_enabled_and_here(self, enabled, shared_pipe, name):
        call = {**examples()[name], "max_input_image_size": 64, "output_type": "np"}
        found = [
            pipe(**call, generator=torch.Generator(device="cpu").manual_seed(222)).images[0]
            for pipe in (enabled, shared_pipe)
        ]
        assert found[0].shape == found[1].shape
        assert relative_error(*map(torch.from_numpy, found)) < TOLERANCE

    @pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
    def test_the_same_forms_of_a_result(self, enabled, shared_pipe, kind):
        call = {"prompt": [TEXT, TEXT], **SMALL, "output_type": kind}
        results = [enabled(**call).images, shared_pipe(**call).images]
        tuples = [pipe(**call, return_dict=False) for pipe in (enabled, shared_pipe)]
        assert [type(one) for one in tuples] == [tuple, tuple]
        assert [len(one) for one in tuples] == [1, 1]
        for theirs, ours in (results, [one[0] for one in tuples]):
            assert isinstance(ours, type(theirs))
            assert len(ours) == len(theirs) == 2
            if kind == "pil":
                assert {image.size for image in [*ours, *theirs]} == {(48, 32)}
            else:
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype

    def test_a_generator_for_each_image(self, enabled, shared_pipe):
        call = {**SMALL, "guidance_scale": 2.5, "output_type": "latent"}
        found = [
            pipe([TEXT, TEXT], **call, generator=generators([1, 2, 3, 4]), num_images_per_prompt=2)
            for pipe in (enabled, shared_pipe)
        ]
        assert relative_error(found[0].images, found[1].images) < TOLERANCE
        alone = [latents(shared_pipe, TEXT, seed=seed, guidance_scale=2.5) for seed in (1, 2, 3, 4)]
        assert relative_error(found[1], torch.cat(alone)) < TOLERANCE

    def test_every_argument_of_diffusers_call(self):
        import diffusers

        here = inspect.signature(OmniGenPipeline.__call__).parameters
        theirs = inspect.signature(diffusers.OmniGenPipeline.__call__).parameters
        assert theirs.keys() <= here.keys()


def generators(seeds):
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class TestResults:
    def test_images_of_a_list(self, shared_pipe):
        result = shared_pipe(TEXT, **QUIET)
        assert result.images is result and isinstance(result, list)
        assert result.to_tuple()[0] is result and result["images"] is result
        assert result[0] is result[-1] and result[:1] == list(result)
        with pytest.raises(TypeError, match="list indices must be integers"):
            result["image"]

    def test_images_of_an_array(self, shared_pipe):
        result = latents(shared_pipe, TEXT, output_type="np")
        assert type(result.images) is np.ndarray
        assert np.shares_memory(result, result.images)
        assert type(result + 1) is np.ndarray and isinstance(result.mean(), np.float32)

    @pytest.mark.parametrize("kind", ["pt", "latent"])
    def test_images_of_a_tensor(self, shared_pipe, kind, tmp_path):
        result = latents(shared_pipe, TEXT, output_type=kind)
        assert type(result) is type(result.images) is torch.Tensor
        assert result.images.data_ptr() == result.data_ptr()
        torch.save(result, tmp_path / "result.pt")
        loaded = torch.load(tmp_path / "result.pt", weights_only=True)
        for one in (loaded, copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
            assert torch.equal(one, result)

    def test_return_dict_is_a_switch(self, shared_pipe):
        for call in (shared_pipe, shared_pipe.plan, shared_pipe.make_call):
            with pytest.raises(RequestError, match="return_dict must be True or False, got 'no'"):
                call(TEXT, **QUIET, return_dict="no")

    def test_no_size_means_the_default(self, shared_pipe):
        with pytest.raises(RequestError, match="16 to 768 pixels, got 1024"):
            shared_pipe(TEXT, height=None, width=None)


class TestCallbacks:
    def test_what_callbacks_read(self, shared_pipe):
        seen = []

        def read(pipe, step, time, tensors):
            seen.append((pipe.num_timesteps, pipe._num_timesteps, pipe._guidance_scale))
            seen.append((pipe.guidance_scale, pipe.interrupt, pipe.scheduler.timesteps.tolist()))
            assert pipe._execution_device == torch.device("cpu")
            return {}

        latents(shared_pipe, TEXT, guidance_scale=2.25, callback_on_step_end=read)
        assert seen == [(2, 2, 2.25), (2.25, False, [0.0, 0.5])] * 2

    def test_before_the_first_call(self, load_pipe):
        pipe = load_pipe()
        assert pipe.num_timesteps == 0 and pipe.guidance_scale is None

    def test_a_callback_can_replace_latents_and_stop(self, shared_pipe):
        usual = latents(shared_pipe, TEXT, num_inference_steps=4)

        def halve(pipe, step, time, tensors):
            return {"latents": tensors["latents"] / 2} if step == 0 else {}

        def stop(pipe, step, time, tensors):
            pipe._interrupt = True
            return tensors

        call = {"num_inference_steps": 4}
        halved = latents(shared_pipe, TEXT, **call, callback_on_step_end=halve)
        stopped = latents(shared_pipe, TEXT, **call, callback_on_step_end=stop)
        assert relative_error(halved, usual) > 0.01
        assert relative_error(stopped, usual) > 0.01
        assert torch.equal(latents(shared_pipe, TEXT, **call), usual)

    def test_it_receives_what_it_asks_for(self, shared_pipe):
        seen = []

        def see(pipe, step, time, tensors):
            seen.append(list(tensors))
            return tensors

        call = {"callback_on_step_end": see, "num_inference_steps": 1}
        plain = latents(shared_pipe, TEXT, num_inference_steps=1)
        for names in ([], ["latents"]):
            found = latents(shared_pipe, TEXT, **call, callback_on_step_end_tensor_inputs=names)
            assert torch.equal(found, plain)
        assert seen == [[], ["latents"]]
        with pytest.raises(RequestError, match=r"only be \['latents'\].*got \['prompt_embeds'\]"):
            latents(shared_pipe, TEXT, **call, callback_on_step_end_tensor_inputs=["prompt_embeds"])


class TestNames:
    @pytest.mark.parametrize("name", ARGUMENTS["__call__"])
    def test_other_arguments_of_a_call(self, shared_pipe, name):
        for call in (shared_pipe, shared_pipe.plan, shared_pipe.make_call):
            with pytest.raises(ArgumentError, match=f"has no argument {name}; ") as found:
                call(TEXT, **QUIET, **{name: "other"})
            assert isinstance(found.value, TypeError) and isinstance(found.value, RequestError)
            in_one_line(found.value)
        assert torch.equal(latents(shared_pipe, TEXT, **{name: None}), latents(shared_pipe, TEXT))

    @pytest.mark.parametrize(
        ("name", "value"),
        [(name, other.usual[0]) for name, other in ARGUMENTS["__call__"].items() if other.usual],
    )
    def test_what_asks_for_nothing_is_taken(self, shared_pipe, name, value):
        assert torch.equal(latents(shared_pipe, TEXT, **{name: value}), latents(shared_pipe, TEXT))

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


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class TestSaving:
    @pytest.mark.parametrize("layout", ["original", "diffusers"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_is_saved_is_loaded_again(
        self, load_pipe, diffusers_folder, tmp_path, layout, dtype
    ):
        folder = TINY if layout == "original" else diffusers_folder
        pipe = load_pipe(folder, dtype=dtype)
        assert pipe.save_pretrained(tmp_path / "new" / "model") is None
        again = load_pipe(tmp_path / "new" / "model", dtype=dtype)
        for output_type in ("latent", "pt"):
            call = {"input_images": [CAT], "max_input_image_size": 64, "output_type": output_type}
            assert torch.equal(latents(again, ONE, **call), latents(pipe, ONE, **call))
        assert os.path.isdir(tmp_path / "new/model/transformer") == (layout == "diffusers")
        assert os.listdir(tmp_path / "new") == ["model"]

    def test_diffusers_loads_its_layout(self, load_pipe, diffusers_folder, tmp_path):
        from diffusers import OmniGenTransformer2DModel

        load_pipe(diffusers_folder).save_pretrained(str(tmp_path / "model"))
        before, after = (
            OmniGenTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
            for folder in (diffusers_folder, tmp_path / "model")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_weights_are_the_checkpoints_to_the_bit(self, load_pipe, tmp_path):
        load_pipe().save_pretrained(tmp_path)
        before, after = written(TINY), written(tmp_path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].float(), after[name]) for name in before)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_what_changes_the_weights_is_saved(self, load_pipe, tmp_path, streamed):
        """LoRAs that act, fused ones, and a write of the caller's own."""
        pipe = load_pipe(memory=MemoryPlan.plain(0 if streamed else 2))
        pipe.load_lora_weights(GOLDEN / "lora", "one", weight=0.7)
        pipe.load_lora_weights(GOLDEN / "lora", "off")
        pipe.set_adapters("one", 0.7)
        pipe.model.norm.data.mul_(1.25)
        expected = latents(pipe, TEXT)
        pipe.save_pretrained(tmp_path / "merged")
        found = load_pipe(tmp_path / "merged")
        assert relative_error(latents(found, TEXT), expected) < TOLERANCE
        assert found.get_list_adapters() == {}
        assert relative_error(latents(load_pipe(), TEXT), expected) > 1e-3

    def test_a_saved_folder_is_replaced(self, load_pipe, tmp_path):
        folder = tmp_path / "model"
        pipe = load_pipe()
        pipe.save_pretrained(folder)
        first = written(folder)
        pipe.load_lora_weights(GOLDEN / "lora")
        pipe.save_pretrained(folder, safe_serialization=True, push_to_hub=False)
        second = written(folder)
        assert any(not torch.equal(first[name], second[name]) for name in first)
        assert os.listdir(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        ("where", "words"),
        [
            ("notes", "holds other files, such as notes.txt; give an empty folder"),
            ("settings", "holds other files, such as config.json; give an empty folder"),
            ("notes/notes.txt", "is a file; give a folder"),
            (None, "must be the path of a folder, got None"),
            ("", "must be the path of a folder, got ''"),
            ("a\0b", "must be the path of a folder, got "),
        ],
    )
    def test_where_nothing_is_written(self, shared_pipe, tmp_path, monkeypatch, where, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes/notes.txt").write_text("mine")
        (tmp_path / "settings").mkdir()
        (tmp_path / "settings/config.json").write_text("{}")
        with pytest.raises(RequestError) as found:
            shared_pipe.save_pretrained(where)
        assert words in in_one_line(found.value)
        assert os.listdir(tmp_path / "notes") == ["notes.txt"]

    def test_not_over_its_own_weights(self, load_pipe, tmp_path):
        load_pipe().save_pretrained(tmp_path / "model")
        (tmp_path / "link").symlink_to(tmp_path / "model")
        pipe = load_pipe(tmp_path / "link")
        for folder in ("model", "link", "link/"):
            with pytest.raises(RequestError, match="reads its weights from"):
                pipe.save_pretrained(tmp_path / folder)

    def test_a_failure_leaves_what_was_there(self, load_pipe, tmp_path, monkeypatch):
        pipe, folder = load_pipe(), tmp_path / "model"
        pipe.save_pretrained(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def busy(source, target):
            if Path(source).name == "new":
                raise OSError(16, "Device or resource busy")
            return rename(source, target)

        rename = os.rename
        for owner, name, failing in [
            (pipe.vae.autoencoder, "save_pretrained", full),
            (os, "rename", busy),
        ]:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                for target in (folder, tmp_path / "other"):
                    with pytest.raises(OmniGenError, match=r"can.t be written: [ND]") as found:
                        pipe.save_pretrained(target)
                    in_one_line(found.value)
        assert os.listdir(tmp_path) == ["model"]
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert after == before

    def test_not_from_a_callback(self, shared_pipe, tmp_path):
        def save(pipe, *_):
            pipe.save_pretrained(tmp_path / "model")

        with pytest.raises(OmniGenError, match="running"):
            latents(shared_pipe, TEXT, callback_on_step_end=save)
        assert os.listdir(tmp_path) == []


class TestEnabled:
    def test_the_originals_arguments(self, enabled, shared_pipe):
        call = {**SMALL, "max_input_image_size": 64, "guidance_scale": 2.5, "output_type": "latent"}
        found = enabled(
            ONE,
            [CAT],
            **call,
            seed=3.0,
            use_img_guidance=True,
            use_kv_cache=True,
            offload_kv_cache=False,
            separate_cfg_infer=False,
            offload_model=False,
            dtype=torch.float32,
            negative_prompt=None,
        ).images
        expected = shared_pipe(ONE, [CAT], **call, seed=3, progress=False)
        assert relative_error(found, expected) < TOLERANCE

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"use_img_guidance": False}, "omnigen_fast.OmniGenPipeline takes it"),
            ({"use_kv_cache": False}, "always kept"),
            ({"offload_kv_cache": True}, "stay on the device"),
            ({"separate_cfg_infer": True}, "run together"),
            ({"offload_model": True}, "pipe.enable_model_cpu_offload()"),
            ({"negative_prompt": "blur"}, "omnigen_fast.OmniGenPipeline takes it"),
            ({"memory": "8GiB"}, "omnigen_fast.OmniGenPipeline takes it"),
            ({"progress": False}, "pipe.set_progress_bar_config(disable=True)"),
            ({"dtype": torch.bfloat16}, "is float32, not torch.bfloat16; call pipe.to(dtype)"),
            ({"dtype": "nonsense"}, "is float32, not nonsense"),
            ({"seed": 1, "generator": torch.Generator()}, "give seed or generator, not both"),
            ({"seed": "x"}, "seed must be an integer"),
            ({"timesteps": [1.0, 0.5]}, "set pipe.scheduler instead"),
            ({"sigmas": [1.0, 0.5]}, "has no argument sigmas"),
            ({"promt": 1}, "did you mean prompt?"),
            ({"prompt_embeds": 1}, "give the text as prompt"),
        ],
    )
    def test_what_it_refuses(self, enabled, arguments, words):
        with pytest.raises(RequestError) as found:
            enabled(TEXT, **SMALL, **arguments)
        assert words in in_one_line(found.value)
        assert isinstance(found.value, ValueError)

    def test_a_missing_prompt(self, enabled):
        with pytest.raises(ArgumentError, match="missing a required argument: 'prompt'"):
            enabled()

    @pytest.mark.parametrize("name", calls._ATTRIBUTES)
    def test_attributes_that_it_lacks(self, enabled, name):
        with pytest.raises(AttributeNameError, match=f"has no attribute {name}; ") as found:
            getattr(enabled, name)
        in_one_line(found.value)
        assert not hasattr(enabled, name)

    def test_it_is_still_diffusers_class(self, build, tmp_path):
        import diffusers

        pipe = build()
        kind = type(pipe)
        omnigen_fast.enable(pipe)
        assert isinstance(pipe, diffusers.OmniGenPipeline)
        assert type(pipe).__name__ == "OmniGenPipeline"
        assert inspect.signature(pipe.__call__) == inspect.signature(kind.__call__.__get__(pipe))
        with pytest.raises(AttributeError, match="no attribute 'foo'"):
            pipe.foo  # noqa: B018
        pipe.save_pretrained(tmp_path)
        assert '"_class_name": "OmniGenPipeline"' in (tmp_path / "model_index.json").read_text()
        omnigen_fast.disable(pipe)
        assert type(pipe) is kind

    def test_timesteps_need_a_scheduler(self, build):
        """As the documents say: plain, diffusers refuses them too."""
        pipe = omnigen_fast.disable(build())
        for change in (omnigen_fast.disable, omnigen_fast.enable):
            with pytest.raises(ValueError, match="sigmas"):
                change(pipe)(TEXT, **SMALL, timesteps=[1.0, 0.5])


def test_every_named_equivalent_exists(shared_pipe, enabled):
    """What a message tells people to write is there: arguments, attributes, methods."""
    for table in ARGUMENTS.values():
        for other in table.values():
            check_words(other.equivalent, shared_pipe)
    for text in ATTRIBUTES.values():
        check_words(text, shared_pipe)
    for text in calls._ATTRIBUTES.values():
        check_words(text, enabled)


def check_words(text: str, pipe) -> None:
    for word in text.replace("(", " ").replace(",", " ").replace(";", " ").split():
        word = word.rstrip(".:)")
        if word.startswith("pipe."):
            found = pipe
            for name in word.split(".")[1:]:
                found = getattr(found, name)
        elif word.startswith("omnigen_fast."):
            assert hasattr(omnigen_fast, word.split(".")[1])
