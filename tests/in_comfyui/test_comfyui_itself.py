"""The nodes in the real ComfyUI, by its HTTP API: make test-comfyui COMFYUI=FOLDER.

COMFYUI_PYTHON is an interpreter that has ComfyUI's requirements and this package.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from comfyui_process import running
from golden_cases import GOLDEN, TINY
from PIL import Image
from playwright.sync_api import sync_playwright

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main
from omnigen_fast.page.demo import INPUTS

PROGRAM = Path(os.environ.get("COMFYUI", "none"))
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
FLOWS = Path(__file__).parents[2] / "examples/comfyui"
NAMES = ("text", "edit", "two-images", "mask")
GENERATE, SAVE = "OmniGenFastGenerate", "SaveImage"

pytestmark = pytest.mark.skipif(
    not (PROGRAM / "main.py").exists(), reason="COMFYUI names no folder of ComfyUI"
)


def flow(name: str) -> dict:
    return json.loads((FLOWS / f"{name}.api.json").read_text())


def one(prompt: dict, kind: str) -> str:
    """The id of the one node of a kind."""
    (found,) = (key for key, node in prompt.items() if node["class_type"] == kind)
    return found


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models/loras", "models/omnigen", "input", "output", "user"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(TINY, folder / "models/omnigen/tiny")
    shutil.copy(GOLDEN / "lora/adapter_model.safetensors", folder / "models/loras/tiny.safetensors")
    result = CliRunner().invoke(main, ["comfyui", "install", str(folder)])
    assert result.exit_code == 0, result.output
    with running(PROGRAM, PYTHON, folder) as found:
        yield found


@pytest.fixture(scope="module")
def shapes():
    torch.set_num_threads(1)
    return OmniGenPipeline.from_pretrained("shapes", device="cpu")


def saved(images: torch.Tensor) -> list[np.ndarray]:
    """What ComfyUI's Save Image makes of images [images, 3, height, width]: it rounds down."""
    pixels = (images.permute(0, 2, 3, 1).cpu().numpy() * np.float32(255)).clip(0, 255)
    return list(pixels.astype(np.uint8))


def expected(pipe: OmniGenPipeline, prompt: dict) -> list[np.ndarray]:
    """The pictures of a workflow, made by the pipeline itself."""
    given = dict(prompt[one(prompt, GENERATE)]["inputs"])
    arguments = {
        "prompt": given["prompt"],
        "num_inference_steps": given["steps"],
        "num_images_per_prompt": given["batch_size"],
        "output_type": "pt",
        "progress": False,
    }
    names = ("guidance_scale", "img_guidance_scale", "seed", "mask_blur", "width", "height")
    arguments |= {name: given[name] for name in names}
    images = [
        str(INPUTS / f"{prompt[given[name][0]]['inputs']['name']}.png")
        for name in ("image_1", "image_2", "image_3")
        if name in given
    ]
    if images:
        arguments["input_images"] = images
    if "mask" in given:
        mask = np.zeros((128, 128), np.uint8)
        mask[64:, :64] = 255
        arguments["mask_image"] = mask
    if "mask" in given or given["use_input_image_size"]:
        arguments["use_input_image_size_as_output"] = True
    return saved(pipe(**arguments))


def pixels(paths: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in paths]


def test_every_node_is_there(comfyui):
    nodes = comfyui.ask("/object_info")
    ours = {name for name in nodes if name.startswith("OmniGenFast")}
    assert {"LoadModel", "Lora", "Generate", "Plan", "ExampleImage"} == {
        name.removeprefix("OmniGenFast") for name in ours
    }
    models = nodes["OmniGenFastLoadModel"]["input"]["required"]["model"][1]["options"]
    assert models == ["tiny", "Shitao/OmniGen-v1", "shapes"]
    assert set(nodes["OmniGenFastLoadModel"]["input"]["optional"]) == {"cache", "attention"}


@pytest.fixture(scope="module")
def page(comfyui):
    """ComfyUI's page, once its nodes are there."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    assert browser, "chromium is missing; install it, on Debian with: apt-get install chromium"
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        found = opened.new_page(viewport={"width": 1600, "height": 1000})
        found.set_default_timeout(120_000)
        found.goto(f"http://127.0.0.1:{comfyui.port}/")
        found.wait_for_function("window.app?.graph && window.LiteGraph?.registered_node_types")
        found.wait_for_function(f"'{GENERATE}' in LiteGraph.registered_node_types")
        yield found
        opened.close()


@pytest.mark.parametrize("settings", ["all", "without those that are optional"])
@pytest.mark.parametrize("name", (*NAMES, "plan"))
def test_the_page_queues_what_it_loads(page, name, settings):
    drawn = json.loads((FLOWS / f"{name}.json").read_text())
    if settings != "all":  # as a page has stored it that did not know them
        (load,) = (node for node in drawn["nodes"] if node["type"] == "OmniGenFastLoadModel")
        load["inputs"] = [one for one in load["inputs"] if one.get("shape") != 7]
        del load["widgets_values"][-2:]
    page.evaluate("drawn => app.loadGraphData(drawn)", drawn)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in queued.values():
        if node["class_type"] == "PreviewAny":
            del node["inputs"]["preview"]  # a widget that only the page has, for the text
    assert queued == flow(name)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_the_pipelines_own(comfyui, shapes, name):
    prompt = flow(name)
    found = pixels(comfyui.pictures(comfyui.finished(comfyui.queue(prompt)), one(prompt, SAVE)))
    wanted = expected(shapes, prompt)
    assert len(found) == len(wanted) == 1
    assert np.array_equal(found[0], wanted[0])


def test_a_batch_is_one_tensor(comfyui, shapes):
    prompt = flow("text")
    prompt[one(prompt, GENERATE)]["inputs"] |= {"batch_size": 2, "steps": 3}
    found = pixels(comfyui.pictures(comfyui.finished(comfyui.queue(prompt)), one(prompt, SAVE)))
    wanted = expected(shapes, prompt)
    assert len(found) == 2 and all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("settings", [{"cache": "int8"}, {"attention": "flash"}])
def test_optional_settings_of_a_model(comfyui, settings):
    prompt = flow("text")
    prompt[one(prompt, "OmniGenFastLoadModel")]["inputs"] |= settings
    prompt[one(prompt, GENERATE)]["inputs"]["steps"] = 3
    found = pixels(comfyui.pictures(comfyui.finished(comfyui.queue(prompt)), one(prompt, SAVE)))
    pipe = OmniGenPipeline.from_pretrained("shapes", device="cpu", **settings)
    assert np.array_equal(found[0], expected(pipe, prompt)[0])


def test_progress_and_previews(comfyui):
    prompt = flow("text")
    prompt[one(prompt, GENERATE)]["inputs"] |= {"seed": 77, "steps": 60}
    with comfyui.events("watcher") as events:
        prompt_id = comfyui.queue(prompt, "watcher")
        values, previews = [], []
        for kind, data in events:
            if kind == "progress" and data["node"] == one(prompt, GENERATE):
                values.append((data["value"], data["max"]))
            elif kind == "preview":
                previews.append(Image.open(io.BytesIO(data)).size)
            elif kind in ("execution_success", "execution_error") and (
                data["prompt_id"] == prompt_id
            ):
                break
    assert values == [(step, 60) for step in range(1, 61)]
    assert previews and set(previews) == {(512, 512)}  # ComfyUI enlarges them


def test_an_interruption_stops_within_a_step(comfyui, shapes):
    prompt = flow("text")
    prompt[one(prompt, GENERATE)]["inputs"] |= {"seed": 78, "steps": 1000}
    with comfyui.events("impatient") as events:
        prompt_id = comfyui.queue(prompt, "impatient")
        values, seen = [], 0
        for kind, data in events:
            if kind == "progress" and data["node"] == one(prompt, GENERATE):
                values.append(data["value"])
                if len(values) == 5:
                    comfyui.ask("/interrupt", {})
                    seen = comfyui.ask("/spy")["steps"]  # that are done by now
            elif kind == "execution_interrupted" and data["prompt_id"] == prompt_id:
                break
            elif kind in ("execution_success", "execution_error"):
                pytest.fail(f"{kind}: {data}")
    assert values[-1] <= seen + 1
    # the next picture is not touched by that
    prompt[one(prompt, GENERATE)]["inputs"] |= {"steps": 3}
    history = comfyui.finished(comfyui.queue(prompt))
    (found,) = pixels(comfyui.pictures(history, one(prompt, SAVE)))
    assert np.array_equal(found, expected(shapes, prompt)[0])


def test_models_unload_when_comfyui_asks(comfyui, shapes):
    prompt = flow("text")
    inputs = prompt[one(prompt, GENERATE)]["inputs"]
    inputs |= {"seed": 79, "steps": 2}
    comfyui.finished(comfyui.queue(prompt))
    assert held(comfyui) == (1, [True])
    comfyui.ask("/free", {"unload_models": True})
    wait_until_held(comfyui, (0, [False]))
    # the model node is not run again; its pipeline loads what the next picture needs
    inputs["seed"] = 80
    history = comfyui.finished(comfyui.queue(prompt))
    (found,) = pixels(comfyui.pictures(history, one(prompt, SAVE)))
    assert np.array_equal(found, expected(shapes, prompt)[0])
    assert held(comfyui) == (1, [True])
    comfyui.ask("/free", {"free_memory": True})
    wait_until_held(comfyui, (0, []))  # nobody holds it


def held(comfyui) -> tuple[int, list[bool]]:
    """How many models the manager has; whether each pipeline has its weights."""
    found = comfyui.ask("/spy")
    return found["managed"], found["loaded"]


def wait_until_held(comfyui, wanted: tuple[int, list[bool]]) -> None:
    end = time.monotonic() + 60
    while (found := held(comfyui)) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.2)


def test_a_lora_of_comfyuis_folder(comfyui):
    prompt = {
        "1": {
            "class_type": "OmniGenFastLoadModel",
            "inputs": {
                "model": "tiny",
                "hub_id": "",
                "weights": "as stored",
                "compute": "dtype",
                "dtype": "float32",
                "vae_dtype": "float32",
                "memory": "auto",
            },
        },
        "2": {
            "class_type": "OmniGenFastLora",
            "inputs": {"model": ["1", 0], "lora": "tiny.safetensors", "strength": 0.5},
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "l"}},
    }
    inputs = dict(flow("text")[one(flow("text"), GENERATE)]["inputs"], steps=2, seed=1)
    inputs |= {"width": 64, "height": 64, "prompt": "A cat."}
    pipe = OmniGenPipeline.from_pretrained(TINY, dtype="float32", device="cpu")
    found = {}
    for model in ("2", "1"):  # with it, and then without
        prompt["3"] = {"class_type": GENERATE, "inputs": {**inputs, "model": [model, 0]}}
        (found[model],) = pixels(comfyui.pictures(comfyui.finished(comfyui.queue(prompt)), "4"))
        if model == "2":
            pipe.load_lora_weights(comfyui.folder / "models/loras/tiny.safetensors", weight=0.5)
        else:
            pipe.unload_lora_weights()
        assert np.array_equal(found[model], expected(pipe, prompt)[0])
    assert not np.array_equal(found["1"], found["2"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 100}, "width must be a multiple of 16, got 100"),
        ({"prompt": "<img><|image_1|></img> red"}, "prompt names image 1 but input_images has"),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_mistakes_end_in_one_line(comfyui, changes, words):
    prompt = flow("text")
    prompt = {key: prompt[key] for key in ("1", "2", "3")}
    prompt[one(prompt, GENERATE)]["inputs"] |= changes
    history = comfyui.finished(comfyui.queue(prompt))
    (error,) = (data for kind, data in history["status"]["messages"] if kind == "execution_error")
    assert error["node_type"] == GENERATE
    assert error["exception_message"].startswith(words)
    assert "\n" not in error["exception_message"].strip()
