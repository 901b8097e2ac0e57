"""What docs/ shows runs, and what it says of defaults is so."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["diffusers", "inference", "moving"]
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/shapes/README.md",
    *sorted(DOCS.glob("*.md")),
]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 1, "max_input_image_size": 64}


def blocks(page: str) -> list[str]:
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


EXAMPLES = [(page, code) for page in (*PAGES, "README") for code in blocks(page)]


def commands() -> list[str]:
    """What the documents tell people to type: in lines of their own, and in the text."""
    start = r"(?:omnigen-fast|python3? -m|make|jupyter|pip) "
    found = set()
    for path in TEXTS:
        text = path.read_text()
        found |= set(re.findall(rf"^(?: {{4}}\$ )?({start}.*?)(?:\s+#.*)?$", text, re.M))
        found |= set(re.findall(rf"`({start}[^`]*)`", text))
    return sorted(found)


def shrunk(call):
    """A call with a picture that the golden checkpoint makes in no time."""

    @functools.wraps(call)
    def small(self, *args, **kwargs):
        return call(self, *args, **{**kwargs, **SMALL})

    return small


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_examples_run(page, code, build, monkeypatch, tmp_path):
    """On the golden checkpoint instead of the real weights, and small."""
    import diffusers

    load = OmniGenPipeline.from_pretrained
    theirs = diffusers.OmniGenPipeline
    monkeypatch.setattr(
        OmniGenPipeline, "from_pretrained", lambda name: load(TINY) if "OmniGen-v1" in name else 0
    )
    monkeypatch.setattr(theirs, "from_pretrained", lambda name, torch_dtype: build(torch_dtype))
    monkeypatch.setattr(OmniGenPipeline, "__call__", shrunk(OmniGenPipeline.__call__))
    monkeypatch.setattr(theirs, "__call__", shrunk(theirs.__call__))
    for name in ("street.jpg", "cat.png", "two_man.jpg"):
        shutil.copy(GOLDEN / "images/cat.png", tmp_path / name)
    shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, f"docs/{page}.md", "exec"), found)
    picture = found["image"] if "image" in found else found["images"][0]
    assert min(picture.size) > 0 and max(picture.size) <= 64


def test_examples_say_that_they_need_the_weights():
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text()
        assert text.count("```python") == text.count("Needs the real weights.") >= 1


@pytest.mark.parametrize("command", commands())
def test_commands_are_right(command, tmp_path, monkeypatch):
    """They run where that takes no weights; of the others, all options exist and are valid."""
    program, *arguments = shlex.split(command)
    if program == "make":
        made = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
    elif program == "omnigen-fast":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "FOLDER").mkdir()
        name, *options = arguments
        if name in ("env", "plan"):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
        elif name == "generate":
            shutil.copy(GOLDEN / "images/cat.png", tmp_path / "photo.jpg")
            small = ["--model", str(TINY), "--height", "64", "--width", "64", "--steps", "1"]
            if "--from" in options:
                made = [*small, "--prompt", "A cat.", "--out", "made.png"]
                assert CliRunner().invoke(main, [name, *made]).exit_code == 0
                options[options.index("--from") + 1] = "made.png"
            result = CliRunner().invoke(main, [name, *options, *small])
            assert result.exit_code == 0, result.output
        else:
            main.commands[name].make_context(name, options)
    elif program.startswith("python"):
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module), command
        source = Path(importlib.util.find_spec(module).origin).read_text()
        for option in (one for one in arguments if one.startswith("--")):
            assert f'"{option}"' in source, option
    elif program == "pip":
        assert arguments[0] == "install"
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    else:
        pytest.fail(f"no way to check: {command}")


@pytest.mark.parametrize("function", ["__call__", "from_pretrained"])
def test_every_argument_stands_in_the_table_with_its_default(function):
    call, load = (DOCS / "inference.md").read_text().split("And of `from_pretrained`:")
    table = {"__call__": call, "from_pretrained": load}[function]
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (.*?) ?\| ", table, re.M)
    named = {
        name: default.strip("`")
        for names, default in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    parameters = dict(inspect.signature(getattr(OmniGenPipeline, function)).parameters)
    parameters.pop("self", None)
    assert named.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert named[name].replace('"', "'") in (
                str(parameter.default),
                repr(parameter.default),
            ), name
