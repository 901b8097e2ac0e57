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

from bench import docs
from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = [*sorted(ROOT.glob("*.md")), ROOT / "examples/shapes/README.md", *sorted(DOCS.glob("*.md"))]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 1, "max_input_image_size": 64}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.M | re.S)
NEEDS_WEIGHTS = "Needs the published weights."


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(path: Path, language: str) -> list[str]:
    return [code for kind, code in FENCED.findall(path.read_text()) if kind == language]


EXAMPLES = [
    # in front as many lines as in the page, so that errors name the right ones
    pytest.param(path, "\n" * text.count("\n", 0, found.start(2)) + found[2], id=name(path))
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    for text in [path.read_text()]
    for found in FENCED.finditer(text)
    # tests/server/test_docs.py runs those that ask a server
    if found[1] == "python" and "OpenAI(" not in found[2]
]


def commands() -> list[str]:
    """What the documents tell people to type: in lines of their own, and in the text."""
    start = r"(?:omnigen-fast|python3? -m|make|jupyter|pip) "
    found = set()
    for path in TEXTS:
        text = path.read_text()
        lines = "\n".join([*fenced(path, ""), *fenced(path, "bash")])
        lines += "\n" + "\n".join(re.findall(r"^ {4}\$ (.*)$", text, re.M))
        found |= set(re.findall(rf"^({start}.*?)(?:\s+#.*)?$", lines, re.M))
        inline = re.findall(rf"`({start}[^`]*)`", FENCED.sub("", text))
        found |= {" ".join(one.split()) for one in inline}
    return sorted(found)


def shrunk(call):
    """A call with a picture that the golden checkpoint makes in no time."""

    @functools.wraps(call)
    def small(self, *args, **kwargs):
        return call(self, *args, **{**kwargs, **SMALL})

    return small


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page, code, build, monkeypatch, tmp_path):
    """On the golden checkpoint instead of the published weights, and small."""
    import diffusers

    load = OmniGenPipeline.from_pretrained
    theirs = diffusers.OmniGenPipeline

    def load_small(model_name, **options):
        return load(TINY if "OmniGen-v1" in model_name else model_name, **options)

    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", load_small)
    monkeypatch.setattr(theirs, "from_pretrained", lambda name, torch_dtype: build(torch_dtype))
    monkeypatch.setattr(OmniGenPipeline, "__call__", shrunk(OmniGenPipeline.__call__))
    monkeypatch.setattr(theirs, "__call__", shrunk(theirs.__call__))
    for picture in ("street.jpg", "cat.png", "two_man.jpg", "cup.png", "cup-mask.png"):
        shutil.copy(GOLDEN / "images/cat.png", tmp_path / picture)
    shutil.copytree(GOLDEN / "lora", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, name(page), "exec"), found)
    picture = found["image"] if "image" in found else found["images"][0]
    assert min(picture.size) > 0 and max(picture.size) <= 64


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=name)
def test_examples_say_that_they_need_the_weights(page):
    after = FENCED.split(page.read_text())[1:]
    for kind, code, text in zip(after[::3], after[1::3], after[2::3]):
        if kind == "python":
            assert ("OmniGen-v1" in code) == text.lstrip().startswith(NEEDS_WEIGHTS), code


@pytest.mark.slow_for("*generate --gpus *")
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
        spec = importlib.util.find_spec(module)
        assert spec, command
        if spec.submodule_search_locations:  # a package
            module += ".__main__"
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
    call, load = (DOCS / "inference.md").read_text().split("Arguments of `from_pretrained`:")
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


@pytest.mark.parametrize("page", docs.paths(), ids=name)
def test_generated_text_is_up_to_date(page):
    assert page.read_text() == docs.refreshed(page), "run python -m bench.docs"


def test_output_is_generated_from_the_command_alone():
    shown = "text\n\n    $ omnigen-fast plan --help\n{}\n\nmore\n\n    not output\n"
    assert docs._with_output(shown.format("    old\n\n    older")) == docs._with_output(
        shown.format("    other")
    )
    typed = "    $ omnigen-fast app\n    $ omnigen-fast env\n\nmore\n\n    $ pip install .\n"
    assert docs._with_output(typed) == typed


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    text = FENCED.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def file_map() -> list[Path]:
    """Every path that docs/architecture.md lists."""
    text = (DOCS / "architecture.md").read_text().split("## File map")[1]
    found: list[Path] = []
    above: list[Path] = []
    for line in FENCED.search(text)[2].splitlines():
        indent, entry = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        path = (above[depth - 1] if depth else ROOT) / entry
        above[depth:] = [path]
        found.append(path)
    return found


def test_the_file_map_is_complete():
    listed = file_map()
    assert len(listed) == len(set(listed))
    assert [name(path) for path in listed if not path.exists()] == []
    modules = [*(ROOT / "omnigen_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    modules = [path for path in modules if path.name != "__init__.py"]
    assert [name(path) for path in modules if path not in listed] == []


def test_the_readme_is_short_and_its_figures_are_of_their_sources():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 200
    scores = (DOCS / "shapes.md").read_text()
    right = dict(re.findall(r"^\| \*\*(.+?)\*\* \| \d+ \| ([\d.]+ %)", scores, re.M))
    shown = re.search(
        r"([\d.]+ %) of the requested.*?([\d.]+ %) in edits, ([\d.]+ %) in", text, re.S
    )
    assert shown.groups() == (right["text to image"], right["edits"], right["composition"])
    (oldest,) = re.findall(r'"torch>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert f"PyTorch {oldest} or later" in text
