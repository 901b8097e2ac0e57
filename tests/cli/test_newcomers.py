"""Ten mistakes of a newcomer: one line with the way out, on the command line and in Python."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main
from omnigen_fast.errors import OmniGenError
from omnigen_fast.page.demo import INPUTS
from omnigen_fast.web.connections import listen

PROMPT = "A red star on a black background."
EDIT = "<img><|image_1|></img> Remove the star."
STAR = str(INPUTS / "star.png")


@pytest.fixture(scope="module")
def shapes():
    return OmniGenPipeline.from_pretrained("shapes", device="cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*arguments: str) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(main, list(arguments))
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2)
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def generate(*arguments: str) -> str:
    return said(*("generate", "--model", "shapes", "--out", "a.png", "--quiet", *arguments))


def raised(act) -> str:
    with pytest.raises(OmniGenError) as caught:
        act()
    return str(caught.value)


CALLS = {  # of the command line, and of Python: what each line must say
    "wrong size": (
        ["--prompt", PROMPT, "--height", "100"],
        {"prompt": PROMPT, "height": 100},
        "height must be a multiple of 16, got 100; the nearest are 96 and 112",
    ),
    "missing tag": (
        ["--prompt", "Remove the star.", "--image", STAR],
        {"prompt": "Remove the star.", "input_images": [STAR]},
        "names 0 of them; add <img><|image_1|></img> where it belongs",
    ),
    "memory without a unit": (
        ["--prompt", PROMPT, "--memory", "12"],
        {"prompt": PROMPT, "memory": 12},
        'for 12 GiB write "12GiB"',
    ),
    "missing file": (
        ["--prompt", EDIT, "--image", "none.png"],
        {"prompt": EDIT, "input_images": ["none.png"]},
        "none.png does not exist; give the path of an image file",
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_of_a_call(shapes, mistake):
    arguments, call, way_out = CALLS[mistake]
    assert way_out in generate(*arguments)
    assert way_out in raised(lambda: shapes(**{**shapes.defaults, **call}, progress=False))
    assert not list(Path().iterdir())


def test_an_unknown_word(shapes, caplog):
    """The rest of the prompt is drawn, and a line says what can be: once for each prompt."""
    way_out = "the model does not know 'dragon'. It draws one or two shapes"
    small = {"height": 16, "width": 16, "num_inference_steps": 1, "progress": False}
    shapes("A red dragon.", num_images_per_prompt=2, **small)
    assert [way_out in line for line in caplog.messages] == [True]
    command = [sys.executable, "-m", "omnigen_fast", "generate", "--model", "shapes"]
    command += ["--prompt", "A red dragon.", "--size", "16", "--steps", "1", "--out", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count(way_out) == 1


def test_every_unknown_word_is_looked_for(shapes):
    """In any place, whatever the case; punctuation is no word."""
    unknown = shapes.processor.unknown_words
    line = unknown("A castle, a DRAGON; a knight and a moat!")
    assert "'castle', 'DRAGON', 'knight' and others" in line and len(line) <= 300
    assert unknown("A RED star... (large)!") is None
    assert "'dragon'" in unknown("Do the dragon <img><|image_1|></img>")


def test_models_with_other_tokenizers_know_every_word(pipe):
    assert pipe.processor.unknown_words("A dragon above a castle, größer 猫") is None


def test_busy_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        way_out = f"port {port} is in use; give another --port"
        assert way_out in said("serve", "--model", "shapes", "--port", str(port))
        assert way_out in raised(lambda: listen("127.0.0.1", [port], way_out))


def test_wrong_folder(folder):
    way_out = "has no model.safetensors; give the folder of a model, or a hub id"
    (folder / "pictures").mkdir()
    assert way_out in generate("--model", "pictures", "--prompt", PROMPT)
    assert way_out in raised(lambda: OmniGenPipeline.from_pretrained("pictures"))


def test_no_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    way_out = "Connection refused; check name and network, or give a local folder"
    assert way_out in generate("--model", "owner/name", "--prompt", PROMPT)
    assert way_out in raised(lambda: OmniGenPipeline.from_pretrained("owner/name"))


def test_lora_of_another_model(shapes):
    lora, way_out = str(GOLDEN / "lora"), "it is for another model"
    assert way_out in generate("--prompt", PROMPT, "--lora", lora)
    assert way_out in raised(lambda: shapes.load_lora_weights(lora))


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "gpu"])
def test_unknown_device(device):
    line = generate("--prompt", PROMPT, "--device", device)
    assert f"device '{device}' can't be used" in line and "here there is " in line
    assert line.endswith("cpu") and len(line) <= 300
    assert line == raised(lambda: OmniGenPipeline.from_pretrained(TINY, device=device))
