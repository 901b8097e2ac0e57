"""`omnigen-fast comfyui install` and `uninstall`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnigen_fast import whole_files
from omnigen_fast.cli.main import main

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder that looks like ComfyUI's."""
    folder = tmp_path / "ComfyUI"
    for name in ("custom_nodes", "comfy_api/latest"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (folder / name).touch()
    return folder


def run(command: str, folder: Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["comfyui", command, str(folder)])
    assert result.exit_code == code, result.output
    assert result.output.count("\n") == 1
    return result.output


def test_the_folder_gives_comfyui_the_nodes(program):
    target = program / "custom_nodes/omnigen_fast"
    assert str(target) in run("install", program)
    assert [path.name for path in target.iterdir()] == ["__init__.py"]
    assert os.listdir(program / "custom_nodes") == ["omnigen_fast"]
    code = f"""
import asyncio, importlib.util
spec = importlib.util.spec_from_file_location("nodes_of_ours", {str(target / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
extension = asyncio.run(module.comfy_entrypoint())
print(len(asyncio.run(extension.get_node_list())))
"""
    made = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(STAND_IN)},
        capture_output=True,
        text=True,
    )
    assert made.stdout == "5\n", made.stderr


def test_a_python_without_this_package_is_told_so(program):
    run("install", program)
    entry = program / "custom_nodes/omnigen_fast/__init__.py"
    made = subprocess.run(
        [sys.executable, "-I", "-S", str(entry)], capture_output=True, text=True, cwd=program
    )
    last = made.stderr.splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: {sys.executable} has no omnigen_fast; install it")


def test_again_renews_it(program):
    run("install", program)
    entry = program / "custom_nodes/omnigen_fast/__init__.py"
    text = entry.read_text()
    entry.write_text(text[:60] + " of an earlier version")
    (entry.parent / "__pycache__").mkdir()
    run("install", program)
    assert entry.read_text() == text


def test_uninstall_removes_it(program):
    run("install", program)
    (program / "custom_nodes/omnigen_fast/__pycache__").mkdir()
    assert "is removed" in run("uninstall", program)
    assert not os.listdir(program / "custom_nodes")
    assert "nothing to remove" in run("uninstall", program, 2)


def test_the_data_folder_of_the_desktop_application(tmp_path):
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (tmp_path / name).mkdir()
    run("install", tmp_path)
    assert (tmp_path / "custom_nodes/omnigen_fast/__init__.py").is_file()


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_is_no_comfyui(program, command):
    parent = program.parent
    assert run(command, parent / "missing", 2).endswith("give the folder with its main.py\n")
    assert run(command, parent, 2).endswith(f"give {program}\n")
    (program / "folder_paths.py").unlink()
    assert f"{program} is not ComfyUI" in run(command, program, 2)
    assert not os.listdir(program / "custom_nodes")


def test_a_comfyui_that_is_too_old(program):
    (program / "comfy_api/latest").rmdir()
    assert "too old for these nodes" in run("install", program, 2)


@pytest.mark.parametrize("command", ["install", "uninstall"])
@pytest.mark.parametrize("kind", ["folder", "other nodes", "file", "link", "more"])
def test_what_others_put_there_stays(program, command, kind, tmp_path):
    target = program / "custom_nodes/omnigen_fast"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(tmp_path)
    elif kind == "more":
        run("install", program)
        (target / "notes.txt").write_text("mine")
    else:
        target.mkdir()
        if kind == "other nodes":
            (target / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    before = sorted(program.rglob("*"))
    assert "move" in run(command, program, 2)
    assert sorted(program.rglob("*")) == before


def test_whole_or_not_at_all(program, monkeypatch):
    def fails(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "_to_disk", fails)
    assert "No space left" in run("install", program, 1)
    assert not os.listdir(program / "custom_nodes")
