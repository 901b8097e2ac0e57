"""diffusers' own pipeline on this runtime: its call, callbacks and schedulers, our images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, GOLDEN, golden_request, golden_result, relative_error

import omnigen_fast
from omnigen_fast import RequestError
from omnigen_fast.for_diffusers.conditions import kv_ends
from omnigen_fast.memory.plan import SHARED_TOKENS

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[2]
FLOAT32 = [name for name, case in CASES.items() if not (case.get("dtype") or case.get("lora"))]
# what only the original's pipeline has
OURS_ALONE = ("seed", "separate_cfg_infer", "use_img_guidance", "use_kv_cache", "negative_prompt")
TOLERANCE = 1e-5
CAT = "<img><|image_1|></img> The cat at night."
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3}
EDIT = {"prompt": CAT, "input_images": [str(GOLDEN / "images/cat.png")], **SMALL}
EDIT["max_input_image_size"] = 64
# The longest row is the prompt's: diffusers takes row 0's positions for all, here they are right.
LONG = {
    "prompt": golden_request("text_long_prompt")["prompt"],
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
}


@pytest.fixture(scope="module")
def shared(build):
    """One pipeline for all tests that leave it as it is."""
    return build()


@pytest.fixture
def plain(shared):
    yield omnigen_fast.disable(shared)
    omnigen_fast.disable(shared)


@pytest.fixture
def enabled(plain):
    return omnigen_fast.enable(plain)


def draw(pipe, seed: int = 0, output_type: str = "latent", **arguments) -> torch.Tensor:
    return pipe(
        **arguments, generator=torch.Generator().manual_seed(seed), output_type=output_type
    ).images


def theirs(name: str) -> dict:
    """A golden case's arguments as diffusers names them."""
    request = golden_request(name)
    request["seed"] = request.get("seed", 0)
    for argument in set(OURS_ALONE) - {"seed"}:
        request.pop(argument, None)
    return request


@pytest.mark.parametrize("first", ("enabled", "cast"))
def test_layerwise_casting_is_float8_storage(build, first):
    """Weights stay in float8, shared; the picture is that of diffusers' own casting."""
    pipe = build()
    if first == "enabled":
        omnigen_fast.enable(pipe)
        draw(pipe, **LONG)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    found = draw(omnigen_fast.enable(pipe), **LONG)
    layer = pipe.transformer.layers[0]
    for module in (layer.self_attn.to_q, layer.mlp.gate_up_proj):
        assert module.weight.dtype == torch.float8_e4m3fn
    model = pipe._omnigen_fast._weights.model
    shared = layer.mlp.down_proj.weight.untyped_storage().data_ptr()
    assert model.parameter("layers.0.down_proj").values.untyped_storage().data_ptr() == shared
    expected = draw(omnigen_fast.disable(pipe), **LONG)
    exact = draw(build(), **LONG)
    assert relative_error(found, exact) > 1e-3 > 50 * TOLERANCE > relative_error(found, expected)


@pytest.mark.parametrize("name", FLOAT32)
def test_images_are_the_originals(enabled, name):
    request = golden_request(name)
    if request.get("use_img_guidance") is False or "negative_prompt" in request:
        pytest.skip("diffusers has no such argument")
    expected = golden_result(name)
    assert relative_error(draw(enabled, **theirs(name)), expected["latents"]) < TOLERANCE
    image = draw(enabled, output_type="pt", **theirs(name))
    assert relative_error(image, expected["image"]) < TOLERANCE


def test_images_are_this_projects_own(enabled, shared_pipe):
    """Also where diffusers would sample the image's latents anew in every call."""
    ours = shared_pipe(**EDIT, guidance_scale=2.5, seed=3, output_type="pt", progress=False)
    for _ in range(2):
        assert relative_error(draw(enabled, 3, "pt", **EDIT), ours) < TOLERANCE


def test_equals_diffusers_where_its_positions_are_right(plain):
    """The prompt is the longest row, so row 0, whose positions serve all, has no padding."""
    request = theirs("text_long_prompt")
    before = draw(plain, **request)
    after = draw(omnigen_fast.enable(plain), **request)
    assert relative_error(after, before) < TOLERANCE
    assert torch.equal(draw(omnigen_fast.disable(plain), **request), before)


def test_disable_restores_everything(plain):
    draw(plain, **EDIT)
    transformer, before = plain.transformer, dict(plain.__dict__)
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    omnigen_fast.enable(plain)
    assert omnigen_fast.enable(plain) is plain  # twice is once
    draw(plain, **EDIT)
    omnigen_fast.disable(plain)
    omnigen_fast.disable(plain)
    assert plain.__dict__ == before
    assert "forward" not in transformer.__dict__
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())


def test_weights_are_held_once(build, tmp_path):
    pipe = build()
    attention = pipe.transformer.layers[0].self_attn
    omnigen_fast.enable(pipe)
    storage = {
        getattr(attention, name).weight.untyped_storage().data_ptr()
        for name in ("to_q", "to_k", "to_v")
    }
    model = pipe.__dict__["_omnigen_fast"]._weights.model
    assert storage == {model.layers[0].qkv_proj.untyped_storage().data_ptr()}
    for layer, block in enumerate(pipe.transformer.layers):
        assert block.mlp.down_proj.weight.data_ptr() == model.layers[layer].down_proj.data_ptr()
    joined = model.layers[0].qkv_proj.data_ptr()
    omnigen_fast.enable(omnigen_fast.disable(pipe))
    again = pipe.__dict__["_omnigen_fast"]._weights.model
    assert again.layers[0].qkv_proj.data_ptr() == joined
    # and its parts are still saved as three
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_several_calls_of_changing_shape_and_prompt(enabled, shared_pipe):
    calls = [
        EDIT,
        {"prompt": "A cat.", **SMALL},
        {"prompt": "A cat.", **SMALL, "height": 64},
        {"prompt": ["A cat.", "Two dogs in the rain."], **SMALL},
        EDIT,
    ]
    for seed, call in enumerate(calls):
        ours = shared_pipe(
            **call, guidance_scale=2.5, seed=seed, output_type="latent", progress=False
        )
        assert relative_error(draw(enabled, seed, **call), ours) < TOLERANCE


def test_several_images_of_a_prompt(enabled, shared_pipe):
    call = {**EDIT, "num_images_per_prompt": 2}
    ours = shared_pipe(**call, guidance_scale=2.5, seed=1, output_type="latent", progress=False)
    assert relative_error(draw(enabled, 1, **call), ours) < TOLERANCE


def test_an_images_own_size(enabled):
    call = {key: EDIT[key] for key in ("prompt", "input_images", "max_input_image_size")}
    images = enabled(**call, num_inference_steps=1, use_input_image_size_as_output=True).images
    assert max(images[0].size) <= 64 and images[0].size != (48, 32)


def test_bfloat16_is_as_close_as_our_own(build, shared_pipe, load_pipe):
    exact = shared_pipe(**EDIT, guidance_scale=2.5, seed=3, output_type="latent", progress=False)
    ours = load_pipe(dtype="bfloat16")(
        **EDIT, guidance_scale=2.5, seed=3, output_type="latent", progress=False
    )
    found = draw(omnigen_fast.enable(build(torch.bfloat16)), 3, **EDIT)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) <= 1.5 * relative_error(ours, exact)


def schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    return {
        "shifted": FlowMatchEulerDiscreteScheduler(
            invert_sigmas=True, num_train_timesteps=1, shift=3.0
        ),
        "stochastic": FlowMatchEulerDiscreteScheduler(
            invert_sigmas=True, num_train_timesteps=1, stochastic_sampling=True
        ),
        "thousand": FlowMatchEulerDiscreteScheduler(),
        "heun": FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000),
    }


class AnyTimes:
    """Takes what OmniGen's call gives each scheduler, and lets it place the times itself."""

    def __init__(self, scheduler) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name):
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        self._scheduler.set_timesteps(len(sigmas), device=device)


@pytest.mark.parametrize("kind", ["shifted", "stochastic", "thousand", "heun"])
def test_any_scheduler(plain, kind):
    """Against diffusers' own transformer, where its positions are right."""
    request = {**LONG, "num_inference_steps": 4}
    own = plain.scheduler
    found = []
    try:
        for change in (omnigen_fast.disable, omnigen_fast.enable):
            scheduler = schedulers()[kind]
            plain.scheduler = AnyTimes(scheduler) if kind == "heun" else scheduler
            change(plain)
            torch.manual_seed(0)
            found.append(draw(plain, **request))
    finally:
        plain.scheduler = own
    assert relative_error(found[1], found[0]) < TOLERANCE


def test_times_that_nobody_announced(enabled, plain):
    """A loop of the user's own over the transformer, with diffusers' own mask."""
    processor = plain.__dict__["_omnigen_fast"]._processor
    long = LONG["prompt"]
    data = processor([long], [None], height=32, width=32, use_img_cfg=False)
    arguments = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "input_ids": data["input_ids"],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": data["attention_mask"],
        "position_ids": data["position_ids"],
    }
    with torch.no_grad():
        times = [0.123, 0.5, 0.123]
        found = [enabled.transformer(timestep=torch.tensor([t, t]), **arguments) for t in times]
        omnigen_fast.disable(enabled)
        for time, one in zip(times, found):
            expected = plain.transformer(timestep=torch.tensor([time, time]), **arguments)
            assert relative_error(one.sample, expected.sample) < TOLERANCE


def test_ids_in_the_slots_of_an_image_change_nothing(enabled):
    """Not even where two branches that begin alike differ in the midst of their image."""
    processor = enabled.multimodal_processor
    processor.reset_max_image_size(max_image_size=256)
    photo = str(GOLDEN / "images/coffee.png")
    data = processor([CAT], [[photo]], height=32, width=32, use_img_cfg=True)
    ids, places = data["input_ids"], data["input_image_sizes"]
    ((begin, stop),) = places[0]
    padding = int((data["attention_mask"][0] == 0).sum())
    assert stop - 5 - padding > SHARED_TOKENS  # so the branches are kept together
    arguments = {
        "hidden_states": torch.randn(len(ids), 4, 4, 4),
        "timestep": torch.tensor([0.5] * len(ids)),
        "input_img_latents": enabled.encode_input_images(data["input_pixel_values"]),
        "input_image_sizes": places,
        "attention_mask": data["attention_mask"],
        "position_ids": data["position_ids"],
    }
    with torch.no_grad():
        usual = enabled.transformer(input_ids=ids, **arguments).sample
        for first in (begin, stop - 5):
            other = ids.clone()
            other[0, first:stop] = 9
            found = enabled.transformer(input_ids=other, **arguments).sample
            assert relative_error(found, usual) < TOLERANCE


def test_callbacks(enabled):
    seen = []

    def keep(pipe, step, time, tensors):
        seen.append((pipe is enabled, step, round(float(time), 4)))
        return tensors

    def halve(pipe, step, time, tensors):
        return {"latents": tensors["latents"] * 0.5} if step == 0 else {}

    usual = draw(enabled, **EDIT, callback_on_step_end=keep)
    assert seen == [(True, 0, 0.0), (True, 1, 0.3333), (True, 2, 0.6667)]
    assert torch.equal(usual, draw(enabled, **EDIT))
    assert relative_error(draw(enabled, **EDIT, callback_on_step_end=halve), usual) > 0.01


def test_a_failing_callback_leaves_the_pipeline_usable(enabled):
    usual = draw(enabled, **EDIT)

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(enabled, **EDIT, callback_on_step_end=fail)
    assert torch.equal(draw(enabled, **EDIT), usual)


def adapter(pipe, **changes):
    """A PEFT adapter of random values on attention, MLP and a projection, loaded in place."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0", "gate_up_proj"], **changes
    )
    peft.inject_adapter_in_model(config, pipe.transformer)
    torch.manual_seed(0)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        parameter.requires_grad_(False)


def layers(pipe):
    return [one for one in pipe.transformer.modules() if hasattr(one, "active_adapters")]


@pytest.mark.parametrize("first", ["enable", "adapter"])
def test_an_adapter(build, first):
    """On, off, merged and as strong as it is set, whichever of the two came first."""
    pipe, request = build(), {**LONG, "num_inference_steps": 1}
    without = draw(pipe, **request)
    for step in ["enable", "adapter"] if first == "enable" else ["adapter", "enable"]:
        omnigen_fast.enable(pipe) if step == "enable" else adapter(pipe)

    def check(differs: bool = True) -> None:
        found = draw(omnigen_fast.enable(pipe), **request)
        expected = draw(omnigen_fast.disable(pipe), **request)
        assert relative_error(found, expected) < TOLERANCE
        assert (relative_error(found, without) > 1e-3) == differs
        omnigen_fast.enable(pipe)

    check()
    if first == "adapter":
        return
    for change, differs in [
        (lambda layer: layer.scale_layer(0.5), True),
        (lambda layer: layer.enable_adapters(False), False),
        (lambda layer: layer.enable_adapters(True), True),
        (lambda layer: layer.merge(), True),
        (lambda layer: layer.unmerge(), True),
    ]:
        for layer in layers(pipe):
            change(layer)
        check(differs)
        text = omnigen_fast.summary(pipe)
        merged = any(layer.merged for layer in layers(pipe))
        assert ("with adapters" in text) == (differs and not merged)


def test_an_adapter_that_is_no_sum_is_refused(build):
    pipe = build()
    adapter(pipe, use_dora=True)
    with pytest.raises(RequestError, match="merge it"):
        omnigen_fast.enable(pipe)


def test_changed_weights_are_used(build):
    """Written in place, through `.data`, replaced, or moved by a conversion."""
    pipe, request = build(), LONG
    weight = pipe.transformer.layers[1].self_attn.to_k.weight

    def in_place():
        with torch.no_grad():
            weight.mul_(1.5)

    def through_data():
        weight.data *= 1.5

    def replaced():
        layer = pipe.transformer.layers[1].mlp
        layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight * 1.5)

    def converted():
        pipe.transformer.to(torch.bfloat16).to(torch.float32)

    for change in (in_place, through_data, replaced, converted):
        before = draw(omnigen_fast.enable(pipe), **request)
        change()
        found = draw(pipe, **request)
        expected = draw(omnigen_fast.disable(pipe), **request)
        assert relative_error(found, expected) < TOLERANCE
        assert relative_error(found, before) > 1e-4


def test_gradients_flow_through_diffusers_own(enabled):
    processor = enabled.__dict__["_omnigen_fast"]._processor
    data = processor(["A cat."], [None], height=32, width=32, use_img_cfg=False)
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    sample = enabled.transformer(
        latents,
        torch.tensor([0.5, 0.5]),
        data["input_ids"],
        [],
        {},
        data["attention_mask"],
        data["position_ids"],
    ).sample
    sample.sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    enabled.transformer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("first", ["hooks", "enable"])
def test_hooks_of_accelerate_stay_in_use(build, first):
    """As `enable_model_cpu_offload` puts them there, which itself needs a GPU."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe, hook = build(), Count()
    usual = draw(omnigen_fast.enable(pipe), **EDIT)
    if first == "hooks":
        omnigen_fast.disable(pipe)
        add_hook_to_module(pipe.transformer, hook)
        omnigen_fast.enable(pipe)
    else:
        add_hook_to_module(pipe.transformer, hook)
    assert torch.equal(draw(pipe, **EDIT), usual)
    assert hook.calls == 3
    remove_hook_from_module(pipe.transformer)
    omnigen_fast.disable(pipe)
    assert omnigen_fast.summary(pipe).startswith("transformer  diffusers' own")
    request = LONG
    plainly = draw(pipe, **request)
    assert relative_error(draw(omnigen_fast.enable(pipe), **request), plainly) < TOLERANCE


def test_what_is_refused(build, enabled):
    for wrong in (object(), 3, dict):
        with pytest.raises(RequestError, match="OmniGenPipeline, got"):
            omnigen_fast.enable(wrong)
    pipe = build()
    pipe.transformer.to(torch.float16)
    with pytest.raises(RequestError, match="bfloat16 or float32"):
        omnigen_fast.enable(pipe)
    pipe = build()
    pipe.transformer.layers[1].to("meta")
    with pytest.raises(RequestError, match="not all on one device"):
        omnigen_fast.enable(pipe)
    other = build()
    other.transformer = enabled.transformer
    with pytest.raises(RequestError, match="another pipeline"):
        omnigen_fast.enable(other)


def test_a_mask_of_another_kind_is_refused(enabled):
    processor = enabled.__dict__["_omnigen_fast"]._processor
    data = processor([CAT], [EDIT["input_images"]], height=32, width=32, use_img_cfg=True)
    mask, tokens = data["attention_mask"], data["input_ids"].shape[1]
    compact = enabled.multimodal_processor(
        [CAT], [EDIT["input_images"]], height=32, width=32, use_img_cfg=True
    )
    noise_tokens = mask.shape[1] - tokens - 1
    assert torch.equal(kv_ends(mask, tokens, noise_tokens), compact["attention_mask"].int())
    for row, column in [(-1, 0), (tokens - 3, tokens - 1), (tokens, -1), (tokens - 1, 0)]:
        wrong = mask.clone()
        wrong[1, row, column] = 1 - wrong[1, row, column]
        with pytest.raises(RequestError, match="attention mask"):
            kv_ends(wrong, tokens, noise_tokens)


@pytest.mark.parametrize("kind", ["mask", "times"])
def test_calls_that_are_not_omnigens_run_diffusers_own_forward(enabled, plain, kind):
    """Full attention, or another time in each row, as a loop of the user's own may have."""
    processor = plain.__dict__["_omnigen_fast"]._processor
    data = processor([CAT], [EDIT["input_images"]], height=32, width=32, use_img_cfg=True)
    usual = {
        "hidden_states": torch.randn(3, 4, 4, 4),
        "timestep": torch.full((3,), 0.5),
        "input_ids": data["input_ids"],
        "input_img_latents": enabled.encode_input_images(data["input_pixel_values"]),
        "input_image_sizes": data["input_image_sizes"],
        "attention_mask": data["attention_mask"],
        "position_ids": data["position_ids"],
    }
    other = {
        "mask": {"attention_mask": torch.ones_like(data["attention_mask"])},
        "times": {"timestep": torch.tensor([0.1, 0.5, 0.9])},
    }
    with torch.no_grad():
        before = enabled.transformer(**usual).sample
        found = enabled.transformer(**{**usual, **other[kind]}).sample
        assert "diffusers' own forward" in omnigen_fast.summary(enabled)
        assert torch.equal(enabled.transformer(**usual).sample, before)
        compact = enabled.multimodal_processor(
            [CAT], [EDIT["input_images"]], height=32, width=32, use_img_cfg=True
        )
        if kind == "times":  # whose mask diffusers' own forward can't take
            mask = {"attention_mask": compact["attention_mask"]}
            with pytest.raises(RequestError, match="must have one time"):
                enabled.transformer(**{**usual, **other[kind], **mask})
        omnigen_fast.disable(plain)
        expected = plain.transformer(**{**usual, **other[kind]}).sample
    assert torch.equal(found, expected)


def test_summary(enabled):
    assert "nothing yet" in omnigen_fast.summary(enabled)
    draw(enabled, **EDIT)
    text = omnigen_fast.summary(enabled)
    assert "omnigen_fast, float32 on cpu" in text
    assert "3 branches" in text and "3 times" in text
    assert "shared with the pipeline" in text and "adapters" not in text


@pytest.mark.slow
def test_without_torchvision():
    """The class can be made where diffusers' own processor can't."""
    code = """
import importlib.machinery
finder = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == "torchvision" else finder(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
from diffusers import OmniGenPipeline
from diffusers.pipelines.omnigen import pipeline_omnigen
import omnigen_fast
assert not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor")
omnigen_fast.enable(OmniGenPipeline)
processor = pipeline_omnigen.OmniGenMultiModalProcessor(None, max_image_size=1024)
omnigen_fast.disable(OmniGenPipeline)
assert not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
