"""Code written for the original or for diffusers runs here, or is told in one line what to write.

The calls have the arguments of the original's guide and of diffusers' page on OmniGen, on a small
model.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, relative_error
from PIL import Image

import omnigen_fast
from omnigen_fast import OmniGenPipeline, RequestError
from omnigen_fast.equivalents import ARGUMENTS, ATTRIBUTES
from omnigen_fast.errors import ArgumentError, AttributeNameError
from omnigen_fast.for_diffusers import calls

pytestmark = pytest.mark.early

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
