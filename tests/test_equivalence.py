"""What must not change the image, and what must repeat to the bit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_cases import CASES, GOLDEN, TINY, golden_request, golden_result, relative_error
from omnigen_fast.kernels import ops
from tokenizers import Tokenizer

from omnigen_fast import sequence
from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.guidance import Branch, guidance_branches
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.processor import Processor
from omnigen_fast.request import Guidance, Prompt
from omnigen_fast.sequence import EncodedBranch, shared_tokens

PHOTOS = [str(GOLDEN / "images" / name) for name in ("astronaut.png", "cat.png", "coffee.png")]
MIXED = {
    "prompt": [
        "A lighthouse in a storm.",
        "The dog of <img><|image_1|></img> wears a hat",
        "<img><|image_2|></img> with the background of <img><|image_1|></img>, at night",
    ],
    "input_images": [[], [PHOTOS[1]], [PHOTOS[0], PHOTOS[2]]],
    "height": 64,
    "width": 80,
    "num_inference_steps": 3,
    "max_input_image_size": 96,
    "progress": False,
    "output_type": "latent",
}
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 3,
    "seed": 11,
    "progress": False,
    "output_type": "latent",
}
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [PHOTOS[2]],
    "max_input_image_size": 96,
}


def _noise(images=3, height=8, width=10):
    return torch.randn(images, 4, height, width, generator=torch.Generator().manual_seed(1))


def test_a_batch_without_one_and_two_images_equals_each_prompt_alone(pipe):
    noise = _noise()
    packed = pipe(**MIXED, latents=noise)
    assert packed.shape == noise.shape
    for index in range(3):
        request = {**MIXED, "prompt": MIXED["prompt"][index]}
        request["input_images"] = MIXED["input_images"][index]
        alone = pipe(**request, latents=noise[index : index + 1])
        assert relative_error(packed[index : index + 1], alone) < 1e-5


def test_branches_one_by_one_equal_branches_together(pipe):
    noise = _noise()
    together = pipe(**MIXED, latents=noise, separate_cfg_infer=False)
    one_by_one = pipe(**MIXED, latents=noise, separate_cfg_infer=True)
    assert relative_error(one_by_one, together) < 1e-5


@pytest.mark.parametrize("separate", [True, False])
def test_the_cache_equals_recomputing_in_each_step(pipe, separate):
    noise = _noise()
    switches = {"latents": noise, "separate_cfg_infer": separate}
    cached = pipe(**MIXED, **switches)
    recomputed = pipe(**MIXED, **switches, use_kv_cache=False)
    assert relative_error(recomputed, cached) < 1e-5


IMAGE_FIRST = {
    **EDIT,
    "prompt": "<img><|image_1|></img> and <img><|image_2|></img>, side by side",
    "input_images": [PHOTOS[2], PHOTOS[1]],
    "max_input_image_size": 224,
}


@pytest.mark.parametrize("prompts", [1, 2])
def test_branches_that_begin_alike_share_keys_and_values(pipe, monkeypatch, prompts):
    """With the image first: its tokens are kept and computed once, and the image is the same."""
    noise = _noise(prompts, 8, 6)
    request = {**IMAGE_FIRST, "seed": None, "latents": noise}
    if prompts == 2:
        request["prompt"] = [IMAGE_FIRST["prompt"], "<img><|image_1|></img> at night"]
        request["input_images"] = [IMAGE_FIRST["input_images"], [PHOTOS[2]]]
    shared = pipe(**request)
    entries = list(pipe.make_call(**request).entries(pipe.last_plan))
    assert all(entry in pipe.engine.cache for entry in entries)
    entries = [entry for entry in entries if len(entry.keys) == 2]
    assert len(entries) == prompts
    for entry in entries:
        assert entry.condition.shared > 0.4 * min(entry.condition.tokens)
    rows = pipe.engine.cache.used_rows

    monkeypatch.setattr(sequence, "pair_up", lambda branches: [(branch,) for branch in branches])
    pipe.clear_cache()
    assert relative_error(shared, pipe(**request)) < 1e-5
    saved = sum(entry.condition.shared for entry in entries)
    assert pipe.engine.cache.used_rows == rows + saved


def _branch(ids, kv_end=None, spans=(), long=False):
    causal = range(1, len(ids) + 1)
    ends = causal if kv_end is None else kv_end
    return EncodedBranch(np.array(ids), np.array(ends, np.int32), spans, long, (tuple(ids), spans))


def test_what_two_branches_share():
    image, other = (SimpleNamespace(digest=name, size=(32, 16)) for name in "ab")
    ends = [1, 4, 4, 4, 5, 6]
    one = _branch([7, 0, 0, 0, 8, 9], ends, ((1, 4, image),))
    assert shared_tokens(one, one) == 6
    assert shared_tokens(one, _branch([7, 0, 0, 0, 8, 3], ends, ((1, 4, image),))) == 5
    assert shared_tokens(one, _branch([7, 0, 0, 0], ends[:4], ((1, 4, image),))) == 4
    # another image, an image of another length, an image where the other has a token 0
    assert shared_tokens(one, _branch([7, 0, 0, 0, 8, 9], ends, ((1, 4, other),))) == 1
    longer = _branch([7, 0, 0, 0, 0, 9], [1, 5, 5, 5, 5, 6], ((1, 5, image),))
    assert shared_tokens(one, longer) == shared_tokens(longer, one) == 1
    # other ids in an image's slots, as hands may fill them: it is shared whole or not at all
    assert shared_tokens(one, _branch([7, 0, 5, 0, 8, 9], ends, ((1, 4, image),))) == 1
    single, text = _branch([7, 0, 8], spans=((1, 2, image),)), _branch([7, 0, 8])
    assert shared_tokens(single, text) == shared_tokens(text, single) == 1
    assert shared_tokens(_branch([1, 2]), _branch([3, 2])) == 0
    short, long = _branch([1, 2]), _branch([1, 2], long=True)
    assert shared_tokens(short, long) == shared_tokens(long, short) == 0
    # the same tokens, of which one branch sees fewer
    causal, whole = _branch([1, 2, 3]), _branch([1, 2, 3], [1, 3, 3])
    assert shared_tokens(causal, whole) == shared_tokens(whole, causal) == 1


def test_recomputing_keeps_one_layer_only(pipe, monkeypatch):
    layers = []
    original = pipe.model.step_recomputed

    def step_recomputed(latents, pos_embed, passes, times, states, select, cache):
        layers.append(cache.layers)
        return original(latents, pos_embed, passes, times, states, select, cache)

    monkeypatch.setattr(pipe.model, "step_recomputed", step_recomputed)
    pipe(**EDIT, use_kv_cache=False)
    assert layers == [1, 1, 1]
    assert not len(pipe.engine.cache)


@pytest.mark.parametrize("request_", [TEXT, EDIT], ids=["text", "edit"])
def test_same_seed_same_bytes_whatever_was_made_before(load_pipe, request_):
    fresh = load_pipe()
    first = fresh(**request_)
    assert torch.equal(fresh(**request_), first)  # nothing computed anew but the steps
    busy = load_pipe()
    busy(**{**EDIT, "prompt": "<img><|image_1|></img> something else", "seed": 3})
    busy(**{**TEXT, "prompt": "Something else again, and longer.", "seed": 4})
    assert torch.equal(busy(**request_), first)


def test_seed_and_generator_are_the_same(pipe):
    del_seed = {key: value for key, value in TEXT.items() if key != "seed"}
    seeded = pipe(**TEXT)
    assert torch.equal(pipe(**del_seed, generator=torch.Generator().manual_seed(11)), seeded)
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    both = pipe(**del_seed, generator=generators, num_images_per_prompt=2)
    assert relative_error(both[:1], seeded) < 1e-5
    assert relative_error(both[1:], pipe(**{**TEXT, "seed": 12})) < 1e-5
    assert relative_error(both[1:], seeded) > 0.01


def test_without_a_seed_images_differ(pipe):
    del_seed = {key: value for key, value in TEXT.items() if key != "seed"}
    assert not torch.equal(pipe(**del_seed), pipe(**del_seed))


def test_images_per_prompt_come_prompt_by_prompt(pipe):
    noise = _noise(4, 8, 6)
    prompts = {**TEXT, "prompt": ["A cat.", "A dog."], "seed": None, "latents": noise}
    found = pipe(**prompts, num_images_per_prompt=2)
    for index, prompt in enumerate(["A cat.", "A cat.", "A dog.", "A dog."]):
        alone = pipe(
            **{**TEXT, "prompt": prompt, "seed": None, "latents": noise[index : index + 1]}
        )
        assert relative_error(found[index : index + 1], alone) < 1e-5


def test_a_second_call_computes_no_condition(pipe, monkeypatch):
    tokenizer = _Tokenizer()
    monkeypatch.setattr(pipe, "processor", Processor(tokenizer, pipe.config))
    first = pipe(**EDIT)
    for owner, name in (
        (pipe.model, "prefill"),
        (pipe.model, "embed_condition"),
        (pipe.vae, "encode"),
        (tokenizer, "encode"),
    ):
        monkeypatch.setattr(owner, name, _forbidden)
    other = pipe(**{**EDIT, "seed": 12})
    assert relative_error(other, first) > 0.01


class _Tokenizer:
    """A tokenizer whose methods can be replaced."""

    def __init__(self):
        own = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        self.encode, self.token_to_id = own.encode, own.token_to_id


def _forbidden(*args, **kwargs):
    raise AssertionError("computed again")


def test_the_negative_prompt_is_computed_once(pipe, monkeypatch):
    computed = []
    original = pipe.model.prefill

    def prefill(sequences, *args):
        computed.extend(one.branch.key[0] for one in sequences)
        original(sequences, *args)

    monkeypatch.setattr(pipe.model, "prefill", prefill)
    for prompt in ("A cat.", "A dog.", "A horse."):
        pipe(**{**TEXT, "prompt": prompt})
    pipe(**EDIT)
    assert len(computed) == 6  # three prompts, one negative prompt, cond and img-cond of the edit
    assert sum(text.startswith("low quality") for text in computed) == 1


def test_kept_conditions_are_bounded(load_pipe):
    pipe = load_pipe(condition_cache_bytes=1 << 20)
    for index in range(12):
        pipe(**{**TEXT, "prompt": f"Prompt number {index}."})
        assert pipe.engine.cache.used_rows * pipe.engine.cache.row_bytes <= pipe.engine.cache.nbytes
    row = pipe.engine.cache.row_bytes
    largest_request = (264 + 1 + 3 + 80) * row
    assert pipe.engine.cache.nbytes <= max(1 << 20, largest_request)
    pipe.clear_cache()
    assert pipe.engine.cache.nbytes == 0 and not pipe.engine.image_latents


@pytest.mark.parametrize(
    ("guidance", "groups"),
    [
        ({"guidance_scale": 2.5, "img_guidance_scale": 1.6}, 3),
        ({"guidance_scale": 2.5, "img_guidance_scale": 1.0}, 2),
        ({"guidance_scale": 1.6, "img_guidance_scale": 1.6}, 2),
        ({"guidance_scale": 1.0, "img_guidance_scale": 1.0}, 1),
        ({"guidance_scale": 2.5, "use_img_guidance": False}, 2),
        ({"guidance_scale": 1.0, "use_img_guidance": False}, 1),
    ],
)
def test_a_branch_that_counts_nothing_is_not_run(pipe, monkeypatch, guidance, groups):
    """And the velocity is that of the full formula, whose branches are run one at a time."""
    ran = []
    original = pipe.model.step

    def step(latents, pos_embed, passes, *args):
        ran.append(sum(len(groups.pictures) for groups in passes))
        return original(latents, pos_embed, passes, *args)

    monkeypatch.setattr(pipe.model, "step", step)
    noise = _noise(1, 8, 6)
    request = {**EDIT, "seed": None, "latents": noise, "num_inference_steps": 1}
    request["memory"] = MemoryPlan.plain(layers=3)  # for one step, keeping nothing may be chosen
    found = pipe(**request, **guidance)
    assert ran == [groups]

    # one step from noise to image: the result is the noise plus the velocity
    cond = pipe(**request, guidance_scale=1.0, img_guidance_scale=1.0) - noise
    uncond = pipe(**request, guidance_scale=0.0, img_guidance_scale=0.0) - noise
    img = pipe(**request, guidance_scale=0.0, img_guidance_scale=1.0) - noise
    text, image = guidance["guidance_scale"], guidance.get("img_guidance_scale")
    if guidance.get("use_img_guidance", True):
        velocity = uncond + image * (img - uncond) + text * (cond - img)
    else:
        velocity = uncond + text * (cond - uncond)
    assert relative_error(found - noise, velocity) < 1e-5


def test_the_branch_of_images_names_all_of_them_in_order():
    prompt = Prompt("with <img><|image_2|></img>", ("a", "b", "c"), "ugly")
    branches = guidance_branches(prompt, Guidance(text=2.5, image=1.5, use_image=True))
    tags = "<img><|image_1|></img> <img><|image_2|></img> <img><|image_3|></img>"
    assert branches == [
        (Branch(prompt.text, prompt.images), 2.5),
        (Branch("ugly"), -0.5),
        (Branch(tags, prompt.images), -1.0),
    ]


def test_the_rotary_factor_is_chosen_by_each_branchs_own_length(load_pipe):
    """A limit between the branches' lengths: cond and img-cond are long, uncond is short."""
    pipe = load_pipe()
    name = "one_image"  # 133, 264 and 98 condition tokens, 24 of noise
    request = {**golden_request(name), "negative_prompt": "ugly", "output_type": "latent"}

    def run(limit, **changes):
        checkpoint = dataclasses.replace(
            pipe.engine.checkpoint,
            config=dataclasses.replace(
                pipe.config,
                original_max_position_embeddings=limit,
                # keeps the scale of cos and sin, which the limit is part of, at 1
                max_position_embeddings=limit if limit > 400 else 400,
            ),
        )
        pipe.engine.checkpoint = checkpoint
        pipe.model.config = checkpoint.config
        pipe.processor.config = checkpoint.config
        pipe.clear_cache()
        encoded = []
        original = pipe.processor.encode
        pipe.processor.encode = lambda *args: encoded.append(original(*args)) or encoded[-1]
        try:
            return pipe(**{**request, **changes}, progress=False), [b.long for b in encoded]
        finally:
            pipe.processor.encode = original

    found, long = run(100)
    assert long == [True, False, True]
    # each branch alone, one step, against the guided velocity of all three
    one = {"num_inference_steps": 1, "seed": None, "latents": golden_result(name)["noise"]}
    found, _ = run(100, **one)
    cond, cond_long = run(100, **one, guidance_scale=1.0, img_guidance_scale=1.0)
    uncond, uncond_long = run(100, **one, guidance_scale=0.0, img_guidance_scale=0.0)
    img, img_long = run(100, **one, guidance_scale=0.0, img_guidance_scale=1.0)
    assert (cond_long, uncond_long, img_long) == ([True], [False], [True])
    noise = one["latents"]
    expected = uncond - noise + 1.6 * (img - uncond) + 2.5 * (cond - img)
    assert relative_error(found - noise, expected) < 1e-5
    # and the factor matters: with one limit for all the image is another
    all_short, flags = run(401, **one)
    assert flags == [False] * 3
    assert relative_error(all_short - noise, expected) > 1e-3


def test_the_long_factor_is_longrope(shared_pipe):
    """Rotary tables against the formula, in float64."""
    config = shared_pipe.config
    positions = torch.tensor([0, 1, 77, 4095, 4096, 9000])
    for long, factor in ((False, config.short_factor), (True, config.long_factor)):
        cos, sin = shared_pipe.model.rotary(positions, long)
        pair = torch.arange(config.head_dim // 2, dtype=torch.float64)
        frequency = 1 / (
            torch.tensor(factor, dtype=torch.float64) * 10000 ** (2 * pair / config.head_dim)
        )
        angle = positions.double()[:, None] * frequency
        scale = (1 + torch.tensor(32.0).log() / torch.tensor(4096.0).log()) ** 0.5
        # float32 holds an angle of 9000 to 5e-4
        assert (cos - angle.cos() * scale).abs().max() < 1e-3
        assert (sin - angle.sin() * scale).abs().max() < 1e-3


def test_use_input_image_size_as_output_gives_that_size(pipe):
    images = pipe(
        "<img><|image_1|></img> Remove the cup.",
        [PHOTOS[2]],
        num_inference_steps=1,
        max_input_image_size=160,
        use_input_image_size_as_output=True,
        progress=False,
    )
    expected = golden_result("edit_same_size")["image"].shape[2:]
    assert images[0].size == (expected[1], expected[0])


@pytest.mark.parametrize("name", ["text", "one_image"])
def test_output_types_show_one_image(pipe, name):
    request = {**golden_request(name), "progress": False}
    tensor = pipe(**request, output_type="pt")
    array = pipe(**request, output_type="np")
    (picture,) = pipe(**request)
    height, width = CASES[name]["request"]["height"], CASES[name]["request"]["width"]
    assert tensor.shape == (1, 3, height, width) and array.shape == (1, height, width, 3)
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    # the original rounds down
    pixels = (golden_result(name)["image"][0].permute(1, 2, 0) * 255).to(torch.uint8)
    assert picture.mode == "RGB" and picture.size == (width, height)
    difference = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
    assert (difference.view(height, width, 3) - pixels.int()).abs().max() <= 1


def test_a_callback_sees_every_step_and_can_change_and_stop(pipe):
    seen = []

    def watch(given, step, time, tensors):
        assert given is pipe
        seen.append((step, round(time, 6), tensors["latents"].shape))

    whole = pipe(**{**TEXT, "num_inference_steps": 4}, callback_on_step_end=watch)
    assert seen == [(i, i / 4, (1, 4, 8, 6)) for i in range(4)]

    def zero(given, step, time, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    assert not pipe(**{**TEXT, "num_inference_steps": 4}, callback_on_step_end=zero).any()

    def stop(given, step, time, tensors):
        given._interrupt = step == 1

    latents = []
    stopped = pipe(
        **{**TEXT, "num_inference_steps": 4},
        callback_on_step_end=lambda *args: (
            latents.append(args[3]["latents"].clone()) or stop(*args)
        ),
    )
    assert len(latents) == 2 and torch.equal(stopped, latents[-1])
    assert relative_error(stopped, whole) > 0.01
    # the next call runs to its end
    assert torch.equal(pipe(**{**TEXT, "num_inference_steps": 4}), whole)


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (5, "must return None or"),
        (torch.zeros(1), "must return None or"),
        ({"latents": [0.0]}, "must return None or"),
        ({"latents": torch.zeros(1, 4, 8, 7)}, r"shape \(1, 4, 8, 7\) for \(1, 4, 8, 6\)"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, returned, match):
    with pytest.raises(RequestError, match=match):
        pipe(**TEXT, callback_on_step_end=lambda *args: returned)


def test_a_failure_leaves_a_pipeline_that_works(pipe, monkeypatch):
    expected = pipe(**EDIT)
    pipe.clear_cache()
    calls = []
    original = ops.attention_prefill

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # three branches; the first one in the second layer
            raise OSError("the file is gone")
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "attention_prefill", fail_once)
    with pytest.raises(OSError, match="the file is gone"):
        pipe(**EDIT)
    assert torch.equal(pipe(**EDIT), expected)

    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**EDIT, callback_on_step_end=interrupted)
    assert torch.equal(pipe(**EDIT), expected)


def test_a_callback_can_not_call_the_pipeline(pipe):
    with pytest.raises(OmniGenError, match="is running"):
        pipe(**TEXT, callback_on_step_end=lambda *args: pipe(**TEXT))


def test_threads_take_turns(load_pipe):
    from concurrent.futures import ThreadPoolExecutor

    pipe = load_pipe()
    requests = [{**TEXT, "prompt": f"Prompt {i}", "seed": i} for i in range(6)]
    expected = [pipe(**request) for request in requests]
    pipe.clear_cache()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda request: pipe(**request), requests))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_another_dtype_reads_the_weights_again(load_pipe):
    pipe = load_pipe(dtype="bfloat16")
    request = {**golden_request("text"), "output_type": "latent", "progress": False}
    expected = golden_result("text")["latents"]
    assert relative_error(pipe(**request, dtype=torch.float32), expected) < 1e-5
    assert pipe.dtype == torch.float32
    assert relative_error(pipe(**request, dtype="bfloat16"), expected) > 1e-4


def test_latents_that_are_no_numbers_are_an_error_and_not_a_black_picture(pipe):
    def break_it(pipe, step, time, tensors):
        if step == 1:
            tensors["latents"][0, 0, 0, 0] = float("nan")

    with pytest.raises(OmniGenError, match="the latents hold NaN or infinities after step 3 of 3"):
        pipe(**TEXT, callback_on_step_end=break_it)
    assert pipe(**TEXT).isfinite().all()


def test_a_damaged_vae_is_an_error_and_not_a_black_picture(load_pipe):
    pipe = load_pipe()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *arguments, **options: decode(*arguments, **options) * float("nan")
    with pytest.raises(OmniGenError, match="the VAE gave pixels that are no numbers"):
        pipe(**TEXT | {"output_type": "pil"})


def test_an_image_that_was_encoded_to_nan_is_encoded_again(load_pipe):
    pipe = load_pipe()
    expected, encode = pipe(**EDIT), pipe.vae.encode
    pipe.clear_cache()
    pipe.vae.encode = lambda *arguments, **options: encode(*arguments, **options) * float("nan")
    with pytest.raises(OmniGenError, match="the latents hold NaN"):
        pipe(**EDIT)
    pipe.vae.encode = encode
    assert torch.equal(pipe(**EDIT), expected)


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("reserve", False),
        ("reserve", True),
        ("prefill", False),
        ("crop_pos_embed", True),
    ],
)
def test_an_interrupt_leaves_no_rows_that_are_empty_or_held(load_pipe, monkeypatch, place, kept):
    """The next call computes them, and a longer one finds room."""
    pipe = load_pipe(condition_cache_bytes=0)
    longer = {**EDIT, "prompt": f"{EDIT['prompt']} {'very ' * 50}slowly"}
    expected = pipe(**longer), pipe(**EDIT)
    if not kept:
        pipe.clear_cache()
    owner = pipe.engine.cache if place == "reserve" else pipe.model
    original = getattr(owner, place)

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe(**EDIT)
    monkeypatch.undo()
    assert torch.equal(pipe(**EDIT), expected[1])
    assert torch.equal(pipe(**longer), expected[0])
