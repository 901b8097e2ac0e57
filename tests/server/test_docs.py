"""What docs/serving.md shows runs against a live server, and its tables are complete."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from golden_cases import GOLDEN
from PIL import Image

from omnigen_fast.cli.main import main
from omnigen_fast.server.schemas import EXTENSIONS, Edit
from omnigen_fast.serving.metrics import Metrics

from .conftest import WAIT
from .test_api import mask

PAGE = Path(__file__).parents[2] / "docs/serving.md"
TEXT = PAGE.read_text()
FENCED = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)
PYTHON = [code for kind, code in FENCED if kind == "python" and "OpenAI(" in code]
CURL = [code for kind, code in FENCED if kind == "bash"]


@pytest.fixture(scope="module")
def address(serve):
    with serve(api_key=None, model_name="omnigen") as live:
        yield live.url


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("cat.png", "mat.png"):
        with Image.open(GOLDEN / "images/cat.png") as image:
            image.resize((64, 64)).save(tmp_path / name)
    (tmp_path / "mask.png").write_bytes(mask()[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def here(code: str, address: str) -> str:
    """An example that asks the live server for a small picture."""
    return code.replace("http://127.0.0.1:8000", address).replace("1024x1024", "64x64")


def test_there_are_examples():
    assert len(PYTHON) == 3 and len(CURL) == 3


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code, address, folder, capsys):
    found: dict = {}
    exec(compile(here(code, address), PAGE.name, "exec"), found)
    if "answer" in found:
        image = base64.b64decode(found["answer"].data[0].b64_json)
        assert Image.open(io.BytesIO(image)).size == (64, 64)
    else:
        assert capsys.readouterr().out.count("image_generation.") == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("code", CURL, ids=range(len(CURL)))
def test_curl(code, address, folder):
    done = subprocess.run(
        ["bash", "-c", here(code, address)], capture_output=True, text=True, timeout=WAIT
    )
    assert done.returncode == 0, done.stdout
    assert "b64_json" in done.stdout
    assert ("event: image_edit.completed" in done.stdout) == ("stream=true" in code)


def test_every_option_is_in_the_table():
    rows = dict(re.findall(r"^\| `(--[^`]+)` \| (.*?) ?\| ", TEXT, re.M))
    options = {
        "/".join([*one.opts, *one.secondary_opts]): one for one in main.commands["serve"].params
    }
    assert rows.keys() == options.keys()
    for name, option in options.items():
        if (
            not option.is_flag
            and not option.multiple
            and isinstance(option.default, str | int | float)
        ):
            assert rows[name].strip("`") == str(option.default), name


def test_every_extension_and_metric_is_named():
    for name in (*EXTENSIONS, *Edit.model_fields):
        assert f"`{name}`" in TEXT or name in ("prompt", "stream", "partial_images"), name
    made = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in Metrics().registry.collect()
    }
    made |= {"omnigen_requests_running", "omnigen_requests_waiting", "omnigen_ready"}
    named = set(re.findall(r"`(omnigen_[a-z_]+)", TEXT)) - {"omnigen_fast"}
    assert named == made
