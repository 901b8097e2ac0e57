"""What docs/ shows runs, and what it says of defaults is so."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
from pathlib import Path

import pytest
from golden_cases import GOLDEN, TINY

from omnigen_fast import OmniGenPipeline

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["diffusers", "inference", "moving"]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 1, "max_input_image_size": 64}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)


EXAMPLES = [(page, code) for page in PAGES for code in blocks(page)]


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
    for name in ("street.jpg", "cat.png"):
        shutil.copy(GOLDEN / "images/cat.png", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, f"docs/{page}.md", "exec"), found)
    picture = found["image"] if "image" in found else found["images"][0]
    assert min(picture.size) > 0 and max(picture.size) <= 64


def test_examples_say_that_they_need_the_weights():
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text()
        assert text.count("```python") == text.count("Needs the real weights.") >= 1


def test_every_argument_stands_in_the_table_with_its_default():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (\S*) ?\|", (DOCS / "inference.md").read_text(), re.M)
    named = {
        name: default.strip("`")
        for names, default in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    parameters = dict(inspect.signature(OmniGenPipeline.__call__).parameters)
    for hidden in ("self", "progress", "callback_on_step_end_tensor_inputs"):
        del parameters[hidden]
    assert named.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert named[name].replace('"', "") == str(parameter.default), name
