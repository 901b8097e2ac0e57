"""What ships: the sdist, the wheel, their metadata, the licences, the image, the workflow."""

from __future__ import annotations

import configparser
import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import omnigen_fast

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[1]
PACKAGES = ("omnigen_fast", "bench", "kernels", "profiles")
# Tracked files that the sdist leaves out.
NOT_IN_SDIST: set[str] = set()
# Files of an sdist that no one tracks.
GENERATED = {"PKG-INFO", "setup.cfg"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"}
# A source tree that is no git checkout may hold these.
NOT_SOURCE = (".venv*", ".peers", ".mypy", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def _git(*arguments: str) -> list[str]:
    """Lines that git prints; none where this is no checkout or git is missing."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.splitlines()


def _is_checkout() -> bool:
    top = _git("rev-parse", "--show-toplevel")
    return bool(top) and Path(top[0]).resolve() == ROOT.resolve()


def _source_files() -> list[str]:
    """What a fresh clone would hold, uncommitted changes included."""
    if _is_checkout():
        listed = _git("ls-files", "--cached", "--others", "--exclude-standard")
        return [name for name in listed if (ROOT / name).is_file()]
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        name.as_posix()
        for name in names
        if not any(fnmatch(part, one) for part in name.parts for one in NOT_SOURCE)
    ]


def _build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _copy(names: list[str], to: Path) -> Path:
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    pytest.importorskip("build")
    # a copy: setuptools would read a stale list of files beside the sources
    source = _copy(_source_files(), tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("dist")
    _build(source, out)
    return out


@pytest.fixture(scope="module")
def in_sdist(built) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [one.name for one in archive.getmembers() if one.isfile()]
    folders = {name.partition("/")[0] for name in names}
    assert folders == {f"omnigen_fast-{omnigen_fast.__version__}"}
    return {name.partition("/")[2] for name in names}


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def in_wheel(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel, in_wheel) -> email.message.Message:
    (name,) = (one for one in in_wheel if one.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(name))


@pytest.mark.skipif(not _is_checkout(), reason="needs git's list of files")
def test_sdist_holds_every_tracked_file_and_no_other(in_sdist):
    tracked = set(_source_files())
    assert tracked - in_sdist == NOT_IN_SDIST
    others = {name for name in in_sdist - tracked if ".egg-info/" not in name}
    assert others == GENERATED


def test_sdist_holds_what_its_tests_need(in_sdist):
    assert in_sdist >= {
        "tests/conftest.py",
        "tests/golden/cases.json",
        "tests/golden/images/cat.png",
        "tests/golden/tiny/model.safetensors",
        "tests/browser/test_page.py",
        "bench/counts.json",
        "bench/peers/original.txt",
        "bench/plots/sizes.png",
        "docs/memory.md",
        "docs/demo.png",
        "examples/inference.ipynb",
        "Makefile",
        "constraints.txt",
        ".ci/run",
        ".github/workflows/ci.yml",
        "Dockerfile",
        ".dockerignore",
    }


def test_wheel_holds_one_package_and_all_of_it(in_wheel):
    info = f"omnigen_fast-{omnigen_fast.__version__}.dist-info"
    assert {name.partition("/")[0] for name in in_wheel} == {"omnigen_fast", info}
    modules = {
        name if folder == "omnigen_fast" else f"omnigen_fast/{name}"
        for folder in PACKAGES
        for name in _source_files()
        if name.startswith(f"{folder}/") and name.endswith(".py")
    }
    assert modules == {name for name in in_wheel if name.endswith(".py")}


def test_wheel_holds_the_data(in_wheel):
    """Whatever is no module inside omnigen_fast/, and what benches and profiles read."""
    data = {
        name
        for name in _source_files()
        if name.startswith("omnigen_fast/") and not name.endswith(".py")
    }
    data |= {f"omnigen_fast/{name}" for name in _source_files() if fnmatch(name, "profiles/*.json")}
    data |= {"omnigen_fast/bench/counts.json", "omnigen_fast/bench/kernels/pipes.json"}
    data.add("omnigen_fast/kernels/cpu.cpp")
    assert "omnigen_fast/models/shapes/model.safetensors" in data
    assert "omnigen_fast/example_images/cat.png" in data
    assert "omnigen_fast/profiles/rtx3090.json" in data
    others = {name for name in in_wheel if not name.endswith(".py") and ".dist-info/" not in name}
    assert others == data


def test_metadata(metadata, in_wheel):
    assert metadata["Name"] == "omnigen_fast"
    assert metadata["Author"] == "The omnigen_fast authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE"}
    assert {name for name in in_wheel if "/licenses/" in name} == {
        f"omnigen_fast-{omnigen_fast.__version__}.dist-info/licenses/{name}"
        for name in ("LICENSE", "NOTICE")
    }
    assert metadata["Requires-Python"] == ">=3.10"
    classifiers = metadata.get_all("Classifier")
    for minor in (10, 11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    # a licence classifier beside an expression is an error
    assert not any(one.startswith("License ::") for one in classifiers)
    assert "OmniGen" in metadata["Keywords"]
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2409.11340"]
    extras = {"app", "bench", "browser", "dev", "gguf", "ray", "serve"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_one_version(metadata):
    version = omnigen_fast.__version__
    assert metadata["Version"] == version
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()
    for name in ("pyproject.toml", "setup.py"):
        assert version not in (ROOT / name).read_text()


def test_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"omnigen-fast": "omnigen_fast.cli:main"}
    assert dict(parser["omnigen_fast.commands"]) == {
        name: f"omnigen_fast.bench.commands:{name}" for name in ("bench", "compare")
    }


@pytest.mark.parametrize("module", ["omnigen_fast", "omnigen_fast.__main__"])
def test_python_m_is_the_command_line(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"omnigen-fast, version {omnigen_fast.__version__}\n"


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [f"\n   {number}. " in text for number in range(1, 10)] == [True] * 9


def test_notice_names_every_image():
    """By its path, or by its name below the folder that the text is about."""
    text = (ROOT / "NOTICE").read_text()
    images = [name for name in _source_files() if Path(name).suffix.lower() in IMAGES]
    assert len(images) > 10
    for name in images:
        folder, _, file = name.rpartition("/")
        below = text[text.index(f"{folder}/") :] if f"{folder}/" in text else ""
        assert name in text or re.search(rf"\b{re.escape(file)}\b", below), name


def test_notice_names_no_image_that_is_gone():
    files = {Path(name).name for name in _source_files()}
    named = set(re.findall(r"[\w-]+\.(?:png|jpg|ipynb)", (ROOT / "NOTICE").read_text()))
    assert named <= files


def test_workflow_runs_ci_on_every_python(monkeypatch):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML reads a bare `on` as true


def test_make_uses_the_interpreter_that_is_named():
    environment = {**os.environ, "PYTHON": "python3.99"}
    for target in ("test", "test-browser", "test-ray", "dist"):
        command = ["make", "--dry-run", "--always-make", target]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "python3.99 -m venv .venv" in done.stdout
    assert "PYTHON=" not in (ROOT / ".ci/run").read_text()


INSTRUCTIONS = {
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}


def _dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            found.append((name, " ".join(rest.split())))
    return found


def _image() -> list[tuple[str, str]]:
    """The last stage: what is in the image."""
    every = _dockerfile()
    start = max(index for index, (name, _) in enumerate(every) if name == "FROM")
    return every[start:]


def _context() -> list[str]:
    """The files that .dockerignore lets into the build."""
    kept, dropped = [], []
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            kept.append(line[1:])
        elif line and not line.startswith("#") and line != "*":
            dropped.append(line)
    assert all((ROOT / name).exists() for name in kept), kept
    return [
        name
        for name in _source_files()
        if any(name == one or name.startswith(f"{one}/") for one in kept)
        and not any(name.startswith(f"{one}/") for one in dropped)
    ]


def test_dockerfile_is_well_formed():
    every = _dockerfile()
    assert every[0][0] == "FROM"
    assert {name for name, _ in every} <= INSTRUCTIONS
    assert all(rest for _, rest in every)
    for name, rest in every:
        if name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(rest))
        if name == "RUN":
            assert shlex.split(rest)  # quotes are closed
            assert not rest.endswith("&&")


def test_dockerfile_copies_what_exists():
    context, stages = _context(), set()
    for name, rest in _dockerfile():
        words = shlex.split(rest)
        if name == "FROM":
            assert len(words) == 1 or (len(words) == 3 and words[1] == "AS")
            stages |= set(words[2:])
        elif name == "COPY":
            flags = [word for word in words if word.startswith("--")]
            sources = [word for word in words if not word.startswith("--")][:-1]
            if flags:
                assert [flag.partition("=")[2] in stages for flag in flags] == [True]
            else:
                for source in sources:
                    assert source == "." or source in context, source


def test_image_runs_the_command_line_as_a_user_on_cuda():
    image = dict(_image())
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04", image["FROM"])
    assert json.loads(image["ENTRYPOINT"]) == ["omnigen-fast"]
    assert image["USER"] not in ("root", "0")
    cache = re.search(r"HF_HOME=(\S+)", image["ENV"])
    assert cache and cache[1].startswith(f"{image['VOLUME']}/")
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY", text, re.IGNORECASE)


def test_image_pins_torch_before_the_package():
    installs = [rest for name, rest in _image() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert installs[0].endswith("--constraint /wheels/constraints.txt torch")
    assert "--constraint /wheels/constraints.txt" in installs[1] and ".whl" in installs[1]


@pytest.mark.slow
def test_image_builds_the_same_wheel(in_wheel, tmp_path):
    """From the files that .dockerignore lets through."""
    source = _copy(_context(), tmp_path / "source")
    _build(source, tmp_path / "dist", "--wheel")
    (path,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == in_wheel
