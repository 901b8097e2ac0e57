"""The nodes on a stand-in of ComfyUI; make test-comfyui runs them in the real one."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
import workflow
from golden_cases import TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.errors import CheckpointError, OmniGenError, RequestError
from omnigen_fast.forms import CACHES
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT

pytestmark = pytest.mark.early

LOAD, LORA, GENERATE, PLAN, EXAMPLE = (
    f"OmniGenFast{name}" for name in ("LoadModel", "Lora", "Generate", "Plan", "ExampleImage")
)


@pytest.fixture(scope="session")
def shapes():
    return OmniGenPipeline.from_pretrained("shapes", device="cpu")


def defaults(node) -> dict:
    """The inputs of a node as its widgets come."""
    return {
        one.id: one.options[0] if one.default is None else one.default
        for one in node.define_schema().inputs
        if one.widget
    }


@pytest.fixture
def load(nodes):
    def load(**given):
        chosen = {**defaults(nodes[LOAD]), "model": "tiny", "dtype": "float32", **given}
        return nodes[LOAD].execute(**chosen).args[0]

    return load


@pytest.fixture
def generate(nodes):
    def generate(model, **given):
        small = {"prompt": "A cat.", "width": 64, "height": 64, "steps": 3}
        small["max_input_image_size"] = 64
        return (
            nodes[GENERATE].execute(model, **{**defaults(nodes[GENERATE]), **small, **given}).args
        )

    return generate


def own(pipe, **given) -> torch.Tensor:
    """The pipeline's own pictures, as ComfyUI wants them."""
    small = {"prompt": "A cat.", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 0}
    small |= {"max_input_image_size": 64, "output_type": "pt", "progress": False}
    return pipe(**{**small, **given}).permute(0, 2, 3, 1)


def test_schemas_match_what_nodes_take(nodes):
    assert set(nodes) == {LOAD, LORA, GENERATE, PLAN, EXAMPLE}
    for node in nodes.values():
        schema = node.define_schema()
        parameters = dict(inspect.signature(node.execute).parameters)
        others = parameters.pop("inputs", None)
        ids = {one.id for one in schema.inputs}
        assert parameters.keys() <= ids and (others or parameters.keys() == ids)
        assert schema.display_name.startswith("OmniGen: ") and schema.description
        for one in schema.inputs:
            if one.widget and one.default is not None:
                one.check(one.default)


@pytest.mark.parametrize("name", workflow.NAMES)
def test_every_node_and_input_of_a_workflow_exists(nodes, name):
    workflow.check(workflow.read(name), nodes)


@pytest.mark.parametrize("name", workflow.NAMES)
def test_both_forms_are_the_same_workflow(nodes, name):
    flow = {key: {**node} for key, node in workflow.read(name).items()}
    for node in flow.values():
        node.pop("_meta")
    assert workflow.queued(workflow.drawn(name), nodes) == flow
    for number, node, place, target, slot, kind in workflow.drawn(name)["links"]:
        by_id = {one["id"]: one for one in workflow.drawn(name)["nodes"]}
        assert number in by_id[node]["outputs"][place]["links"]
        assert by_id[node]["outputs"][place]["type"] == kind
        assert by_id[target]["inputs"][slot]["link"] == number


def test_a_wrong_workflow_is_noticed(nodes):
    flow = workflow.read("edit")
    (key,) = (key for key, node in flow.items() if node["class_type"] == GENERATE)
    for change in ({"stepz": 3}, {"quality": "best"}, {"image_1": ["1", 0]}, {"width": 5000}):
        wrong = {**flow, key: {**flow[key], "inputs": {**flow[key]["inputs"], **change}}}
        with pytest.raises(AssertionError):
            workflow.check(wrong, nodes)


@pytest.mark.slow_except("edit")
@pytest.mark.parametrize("name", [name for name in workflow.NAMES if name != "plan"])
def test_workflows_make_the_pipelines_own_pictures(nodes, shapes, name):
    flow = workflow.read(name)
    (key,) = (key for key, node in flow.items() if node["class_type"] == GENERATE)
    given = flow[key]["inputs"]
    given["steps"] = 2
    made = workflow.run(flow, nodes)
    found = made[key][0]
    arguments = {"num_inference_steps": 2, "output_type": "pt", "progress": False}
    arguments |= {
        one: given[one] for one in ("prompt", "seed", "guidance_scale", "img_guidance_scale")
    }
    images = [made[given[one][0]][0][0].numpy() for one in ("image_1", "image_2") if one in given]
    if images:
        arguments["input_images"] = images
    if "mask" in given:
        mask = torch.zeros(128, 128)
        mask[64:, :64] = 1
        arguments |= {"mask_image": mask.numpy(), "mask_blur": given["mask_blur"]}
    if "mask" in given or given["use_input_image_size"]:
        arguments["use_input_image_size_as_output"] = True
    else:
        arguments |= {"width": 128, "height": 128}
    expected = shapes(**arguments).permute(0, 2, 3, 1)
    assert found.shape == (1, 128, 128, 3) and found.dtype is torch.float32
    assert torch.equal(found, expected)


def test_the_plans_workflow(nodes):
    flow = workflow.read("plan")
    (key,) = (key for key, node in flow.items() if node["class_type"] == PLAN)
    assert "128 x 128 px, 25 steps" in workflow.run(flow, nodes)[key][0]


def test_models_of_comfyuis_folder_are_listed(comfy, nodes):
    models = {one.id: one for one in nodes[LOAD].define_schema().inputs}["model"].options
    assert models == ["owner/tiny", "tiny", "Shitao/OmniGen-v1", "shapes"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "../tiny"}, "there is no model '../tiny' in models/omnigen"),
        ({"model": str(TINY)}, "there is no model"),
        ({"hub_id": str(TINY)}, "hub_id must be OWNER/NAME"),
        ({"hub_id": "tests/golden"}, "hub_id must be OWNER/NAME"),
        ({"memory": "12"}, 'for 12 GiB write "12GiB"'),
        ({"weights": "int3"}, "int3"),
        ({"dtype": "float16"}, "float16 overflows"),
        ({"cache": "nf4"}, "cache must be bfloat16, int8 or fp8, got 'nf4'"),
        ({"attention": "fastest"}, "attention must be auto, triton, flash or cudnn"),
        ({"attention": "cudnn"}, 'attention="cudnn" can\'t be had on cpu'),
        ({"attention": "flash", "cache": "int8"}, "attention=flash reads no keys and values in"),
    ],
)
def test_models_that_cant_be_loaded(load, given, words):
    with pytest.raises(OmniGenError, match=None) as caught:
        load(**given)
    assert words in str(caught.value)


def test_a_model_whose_files_change_is_opened_again(comfy, nodes):
    given = {**defaults(nodes[LOAD]), "model": "tiny"}
    before = nodes[LOAD].fingerprint_inputs(**given)
    assert before == nodes[LOAD].fingerprint_inputs(**given)
    config = comfy.models / "omnigen/tiny/config.json"
    config.write_text(config.read_text() + " ")
    assert nodes[LOAD].fingerprint_inputs(**given) != before
    assert nodes[LOAD].fingerprint_inputs(**{**given, "model": "shapes"}) is None


def test_weights_are_read_by_the_first_picture(load, generate):
    model = load()
    assert model.pipe.engine.store.resident == 0
    picture, summary = generate(model)
    assert torch.equal(picture, own(OmniGenPipeline.from_pretrained(TINY, dtype="float32")))
    assert model.pipe.engine.store.resident == model.pipe.config.num_layers
    assert "all 3 computed" in summary


@pytest.mark.parametrize("weights", ["int8", "auto"])
def test_weights_are_stored_as_asked(load, generate, weights):
    model = load(weights=weights, dtype="bfloat16")
    pipe = OmniGenPipeline.from_pretrained(TINY, weights=weights)
    assert model.pipe.engine.precision == pipe.engine.precision
    assert torch.equal(generate(model)[0], own(pipe))


@pytest.mark.parametrize("cache", CACHES)
def test_keys_and_values_are_kept_as_asked(load, generate, pipe, cache):
    model = load(cache=cache)
    kept = OmniGenPipeline.from_pretrained(TINY, dtype="float32", cache=cache)
    assert model.pipe.engine.precision == kept.engine.precision
    found = generate(model)[0]
    assert torch.equal(found, own(kept)) and not torch.equal(found, own(pipe))


def test_who_attends_is_as_asked(load, generate):
    model = load(attention="flash")
    assert model.pipe.engine.precision.attention == "flash"
    flash = OmniGenPipeline.from_pretrained(TINY, dtype="float32", attention="flash")
    assert torch.equal(generate(model)[0], own(flash))


def test_auto_keeps_the_other_settings(load):
    found = load(weights="auto", dtype="bfloat16", cache="int8", attention="triton")
    precision = found.pipe.engine.precision
    assert (precision.cache, precision.attention) == ("int8", "triton")


@pytest.mark.parametrize("name", workflow.NAMES)
def test_workflows_without_the_optional_settings_run_as_by_default(nodes, name):
    flow = workflow.read(name)
    (key,) = (key for key, node in flow.items() if node["class_type"] == LOAD)
    given = flow[key]["inputs"]
    full = nodes[LOAD].execute(**given).args[0].pipe.engine.precision
    assert given.pop("cache") == "dtype" and given.pop("attention") == "auto"
    workflow.check(flow, nodes)
    assert nodes[LOAD].execute(**given).args[0].pipe.engine.precision == full
    assert nodes[LOAD].fingerprint_inputs(**given) is None


def test_auto_chooses_by_what_comfyui_has_free(load):
    plain = load(weights="auto", dtype="bfloat16").pipe.engine.precision
    less = load(weights="auto", dtype="bfloat16", memory="280MiB").pipe.engine.precision
    assert plain.storage == "bfloat16" and less.storage in ("bfloat16", "int8", "fp8", "nf4")


def test_a_batch(load, generate, pipe):
    found = generate(load(), batch_size=2)[0]
    assert found.shape == (2, 64, 64, 3) and found.is_contiguous()
    assert torch.equal(found, own(pipe, num_images_per_prompt=2))


def test_images_of_a_batch_make_pictures_of_their_own(load, generate, pipe):
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    one = torch.rand(1, 32, 64, 4, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    prompt = "<img><|image_1|></img> and <img><|image_2|></img>"
    found = generate(load(), prompt=prompt, image_1=images, image_2=one)[0]
    clipped = one[0].clamp(0, 1).numpy()
    wanted = own(
        pipe, prompt=[prompt] * 3, input_images=[[image.numpy(), clipped] for image in images]
    )
    assert found.shape[0] == 3 and torch.equal(found, wanted)


def test_images_that_the_prompt_does_not_name_come_first(load, generate, pipe):
    images = torch.rand(2, 1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    found = generate(load(), prompt="both", image_1=images[0], image_2=images[1])[0]
    prompt = "<img><|image_1|></img><img><|image_2|></img> both"
    given = [image[0].numpy() for image in images]
    assert torch.equal(found, own(pipe, prompt=prompt, input_images=given))


def test_a_mask_keeps_the_rest_to_the_pixel(load, generate):
    image = torch.randint(0, 256, (1, 64, 96, 3), generator=torch.Generator().manual_seed(0)) / 255
    mask = torch.zeros(1, 64, 96)
    mask[:, :32] = 1
    found = generate(load(), prompt="edit", image_1=image, mask=mask, max_input_image_size=96)[0]
    assert found.shape == (1, 64, 96, 3)
    assert not torch.equal(found[:, :32], image[:, :32])
    assert torch.allclose(found[:, 32:], image[:, 32:], atol=1e-6)


def test_quality_gives_the_steps(load, generate, comfy):
    generate(load(), steps=0, quality="fast")
    steps = len(comfy.bar.shown)
    assert 1 < steps < 50 and {total for _, total, _ in comfy.bar.shown} == {steps}


def test_negative_prompts(load, generate, pipe):
    model = load()
    built_in = generate(model, negative_prompt=DEFAULT_NEGATIVE_PROMPT)[0]
    other = generate(model, negative_prompt="red")[0]
    assert torch.equal(built_in, own(pipe))
    assert torch.equal(other, own(pipe, negative_prompt="red"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 100}, "width must be a multiple of 16, got 100"),
        ({"prompt": ""}, "prompt is empty"),
        ({"image_2": torch.zeros(1, 64, 64, 3)}, "image_2 is connected but image_1 is not"),
        (
            {"image_1": torch.zeros(2, 64, 64, 3), "image_2": torch.zeros(3, 64, 64, 3)},
            "image_1 is a batch of 2 and another input one of 3",
        ),
        ({"image_1": torch.zeros(64, 64, 3)}, "must be a batch [images, height, width, channels]"),
        (
            {"image_1": torch.zeros(1, 64, 64, 3), "mask": torch.zeros(1, 64, 64)},
            "mask marks nothing to edit",
        ),
        (
            {"image_1": torch.zeros(1, 64, 64, 3), "mask": torch.ones(2, 64, 64)},
            "mask must be one mask [height, width], got 2x64x64",
        ),
        ({"mask": torch.ones(1, 64, 64)}, "mask_image needs one prompt with one input image"),
        ({"image_1": torch.full((1, 64, 64, 3), float("nan"))}, "must lie in [0, 1]"),
    ],
)
def test_mistakes_end_in_one_line(load, generate, given, words):
    with pytest.raises(RequestError) as caught:
        generate(load(), **given)
    assert words in str(caught.value)


def test_progress_and_previews(load, generate, comfy, monkeypatch):
    from omnigen_fast.comfyui import watch

    monkeypatch.setattr(watch, "_PREVIEW_SECONDS", 0)
    model = load()
    generate(model, steps=6)
    values, totals, previews = zip(*comfy.bar.shown)
    assert values == (1, 2, 3, 4, 5, 6) and set(totals) == {6}
    assert previews[0] is None  # nothing to extrapolate from yet
    assert all(kind == "JPEG" and image.size == (64, 64) for kind, image, _ in previews[1:])
    comfy.bar.shown.clear()
    generate(model, steps=6, preview=False)
    assert [preview for *_, preview in comfy.bar.shown] == [None] * 6


def test_the_last_preview_is_the_picture(load, generate, comfy, monkeypatch):
    from omnigen_fast.comfyui import watch

    monkeypatch.setattr(watch, "_PREVIEW_SECONDS", 0)
    model = load()
    generate(model, strength=0.5, steps=8, image_1=torch.full((1, 64, 64, 3), 0.5), prompt="x")
    assert [value for value, *_ in comfy.bar.shown] == [1, 2, 3, 4]  # half are left out
    latents = []
    model.pipe(
        prompt="<img><|image_1|></img> x",
        strength=0.5,
        num_inference_steps=8,
        input_images=[torch.full((64, 64, 3), 0.5)],
        seed=0,
        progress=False,
        use_input_image_size_as_output=True,
        max_input_image_size=64,
        callback_on_step_end=lambda *given: latents.append(given[3]["latents"]),
    )
    last = model.loaded.preview().image(latents[-1][0])
    assert comfy.bar.shown[-1][2][1].tobytes() == last.tobytes()


def test_an_interruption_stops_after_the_step(load, generate, comfy, monkeypatch):
    model = load()
    before = generate(model)[0]
    comfy.bar.shown.clear()

    def interrupt(self, value, total=None, preview=None):
        comfy.bar.shown.append(value)
        comfy.manager.interrupted = value == 2

    with monkeypatch.context() as patch:
        patch.setattr(comfy.bar.ProgressBar, "update_absolute", interrupt)
        with pytest.raises(comfy.manager.InterruptProcessingException):
            generate(model, steps=50, seed=1)
    assert comfy.bar.shown == [1, 2]
    assert torch.equal(generate(model)[0], before)


def test_an_interruption_before_the_first_step(load, generate, comfy):
    comfy.manager.interrupted = True
    with pytest.raises(comfy.manager.InterruptProcessingException):
        generate(load())
    assert not comfy.bar.shown


def test_models_unload_when_comfyui_asks(load, generate, comfy):
    model = load()
    before = generate(model)[0]
    assert comfy.manager.current == [model.loaded.patcher]
    held = model.loaded.patcher.loaded_size()
    assert held > 0 and model.loaded.patcher.current_loaded_device().type == "cpu"
    comfy.manager.unload_all_models()
    assert not comfy.manager.current
    assert model.pipe.engine._model is None and model.loaded.patcher.loaded_size() < held
    assert torch.equal(generate(model)[0], before)


def test_a_part_is_unloaded_where_that_is_enough(load, generate, comfy):
    model = load(dtype="bfloat16")  # converted: in memory, not in the mapped file
    engine = model.pipe.engine
    before = generate(model)[0]
    layers = engine.store.resident
    engine.forget()
    wanted = sum(one.nbytes for one in engine.model.layers[0].parameters())
    comfy.manager.free_memory(comfy.manager.free + wanted, comfy.manager.get_torch_device())
    assert comfy.manager.current == [model.loaded.patcher]
    assert engine.store.resident == layers - 1
    assert torch.equal(generate(model)[0], before)
    assert engine.store.resident == layers


def test_asked_by_its_own_call_it_keeps_its_weights(load, generate, comfy, monkeypatch, caplog):
    model = load()
    monkeypatch.setattr(
        comfy.bar.ProgressBar,
        "update_absolute",
        lambda *_given: comfy.manager.unload_all_models(),
    )
    generate(model)
    assert "no memory was given back" in caplog.text


def test_a_model_that_nobody_holds_goes(load, generate, comfy):
    model = load()
    generate(model)
    comfy.manager.unload_all_models()
    pipe = weakref.ref(model.pipe)
    del model
    gc.collect()
    assert pipe() is None


def test_what_comfyui_has_free_is_the_budget(load, generate, comfy):
    from omnigen_fast.comfyui import memory

    model = load()
    pipe, patcher = model.pipe, model.loaded.patcher
    comfy.manager.free = 500 << 20
    held = pipe.engine.held_bytes()
    found = memory.potential_budget(pipe, patcher, None)
    assert (500 << 20) + held <= found < (2 << 30)
    assert memory.potential_budget(pipe, patcher, 100 << 20) == 100 << 20
    comfy.manager.free = 8 << 30
    assert memory.reserve(pipe, patcher, 1 << 30, 3 << 30) == 1 << 30
    assert comfy.manager.asked == [(3 << 30) - held]  # of the fastest plan, less what is there


def test_others_count_as_free_until_they_are_unloaded(load, comfy, monkeypatch):
    from omnigen_fast.comfyui import memory

    model = load()
    pipe, patcher = model.pipe, model.loaded.patcher
    other = type("Other", (), {"load_device": pipe.device, "loaded_size": lambda _self: 1 << 30})()
    comfy.manager.current.append(other)
    comfy.manager.free = 1 << 30
    shared = memory.potential_budget(pipe, patcher, None)
    monkeypatch.setattr(memory, "on_host", lambda _device: False)  # as on a GPU
    apart = memory.potential_budget(pipe, patcher, None)
    assert apart == shared + (1 << 30) - comfy.manager.RESERVED


def test_a_request_that_fits_nowhere(load, generate):
    with pytest.raises(OmniGenError, match="memory"):
        generate(load(memory="2MiB"))


def test_loras(load, generate, nodes, comfy):
    plain = load()
    lora = comfy.models / "loras/one.safetensors"

    def with_lora(model, name, strength):
        return nodes[LORA].execute(model, name, strength).args[0]

    first = with_lora(plain, "one.safetensors", 0.5)
    both = with_lora(first, "two.safetensors", -1.0)
    twice = with_lora(first, "one.safetensors", 0.25)
    pipe = OmniGenPipeline.from_pretrained(TINY, dtype="float32")
    wanted = {"plain": own(pipe)}
    pipe.load_lora_weights(lora, "a", weight=0.5)
    wanted["first"] = own(pipe)
    pipe.load_lora_weights(comfy.models / "loras/two.safetensors", "b", weight=-1.0)
    wanted["both"] = own(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora, "a", weight=0.75)
    wanted["twice"] = own(pipe)
    models = {"first": first, "plain": plain, "both": both, "twice": twice}
    for name in (*models, "first"):  # each finds what the one before has left
        assert torch.equal(generate(models[name])[0], wanted[name]), name
    assert not torch.equal(wanted["plain"], wanted["first"])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("none.safetensors", CheckpointError, "none.safetensors"),
        ("../omnigen/tiny/model.safetensors", RequestError, "there is no LoRA"),
    ],
)
def test_loras_that_cant_be_read(load, nodes, name, kind, words):
    with pytest.raises(kind) as caught:
        nodes[LORA].execute(load(), name, 1.0)
    assert words in str(caught.value)


def test_a_lora_that_changes_is_read_again(nodes, comfy):
    given = {"lora": "one.safetensors", "strength": 1.0}
    path = comfy.models / "loras/one.safetensors"
    before = nodes[LORA].fingerprint_inputs(**given)
    path.write_bytes(path.read_bytes())
    assert nodes[LORA].fingerprint_inputs(**given) != before
    assert nodes[LORA].fingerprint_inputs(lora="missing", strength=1.0) is None


def test_the_plan_runs_nothing(load, nodes, comfy):
    model = load()
    given = {**defaults(nodes[PLAN]), "prompt": "A cat.", "width": 64, "height": 64}
    text = nodes[PLAN].execute(model, **given).args[0]
    assert "plan (predicted; * chosen" in text and "64 x 64 px, 50 steps" in text
    explained = nodes[PLAN].execute(model, **{**given, "explain": True}).args[0]
    assert "seconds predicted" in explained
    assert model.pipe.engine.store.resident == 0 and not comfy.manager.current


@pytest.mark.parametrize("cache", CACHES)
def test_the_plan_counts_the_cache_as_it_is_kept(load, nodes, cache):
    given = {**defaults(nodes[PLAN]), "prompt": "A cat.", "width": 64, "height": 64}
    plain = nodes[PLAN].execute(load(), **given).args[0]
    kept = nodes[PLAN].execute(load(cache=cache), **given).args[0]
    words = f"KV cache on device in {cache}"
    assert words in kept and words not in plain


def test_the_plan_is_by_who_attends(load, nodes, monkeypatch):
    planned = []
    plan = OmniGenPipeline.plan

    def noted(self, **arguments):
        planned.append(plan(self, **arguments))
        return planned[-1]

    monkeypatch.setattr(OmniGenPipeline, "plan", noted)
    given = {**defaults(nodes[PLAN]), "prompt": "A cat.", "width": 64, "height": 64}
    assert "plan (predicted" in nodes[PLAN].execute(load(attention="flash"), **given).args[0]
    assert [one.estimate.precision.attention for one in planned] == ["flash"]


def test_example_images_are_those_of_the_bundled_model(nodes):
    names = {one.id: one for one in nodes[EXAMPLE].define_schema().inputs}["name"].options
    assert "star" in names
    for name in names:
        image = nodes[EXAMPLE].execute(name).args[0]
        assert image.shape == (1, 128, 128, 3) and image.min() >= 0 and image.max() <= 1
