"""`doctor` names what to do about each finding, and `completion` writes a script that completes."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from omnigen_fast.cli import doctor as module
from omnigen_fast.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def findings(result) -> dict[str, str]:
    """What follows each finding, by the finding."""
    found: dict[str, str] = {}
    latest = ""
    for line in result.output.split("\n\n")[-1].splitlines():
        if line.startswith("         -> "):
            found[latest] = line.removeprefix("         -> ")
        else:
            latest = line
            found[latest] = ""
    return found


def doctor():
    return CliRunner().invoke(main, ["doctor"])


class TestDoctor:
    def test_a_machine_that_works(self):
        result = doctor()
        assert result.exit_code == 0, result.output
        found = findings(result)
        assert result.output.startswith("omnigen_fast") and "ok: as it should be" in result.output
        assert "problem" not in {line.split()[0] for line in found}
        assert any(line.startswith("ok       the packages") for line in found)
        for line, way_out in found.items():
            assert way_out or line.startswith("ok "), line

    def test_a_package_of_another_version(self, monkeypatch):
        version = importlib.metadata.version
        wrong = {"torch": "2.5.0"}
        monkeypatch.setattr(module, "version", lambda name: wrong.get(name) or version(name))
        result = doctor()
        assert result.exit_code == 1
        (line,) = (line for line in findings(result) if line.startswith("problem"))
        assert "torch 2.5.0 is installed" in line
        assert findings(result)[line].startswith("pip install 'torch")

    def test_a_driver_without_a_gpu_in_torch(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
        result = doctor()
        assert result.exit_code == 1
        (line,) = (line for line in findings(result) if line.startswith("problem"))
        assert "an NVIDIA driver is here" in line and "build of PyTorch" in findings(result)[line]

    def test_little_memory_and_a_small_disk(self, monkeypatch):
        monkeypatch.setattr("omnigen_fast.memory.device.free_bytes", lambda *_: 1 << 30)
        usage = shutil.disk_usage("/")._replace(free=10**9)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: usage)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere/hub")
        found = findings(doctor())
        memory = next(line for line in found if "takes at least" in line)
        assert memory.startswith("note") and "--size 512" in found[memory]
        disk = next(line for line in found if "1.0 GB are free" in line)
        assert "HF_HOME" in found[disk]

    def test_a_config_file_with_a_mistake(self, folder):
        path = folder / ".config/omnigen-fast/config.toml"
        path.parent.mkdir(parents=True)
        path.write_text("modle = 'x'")
        result = doctor()
        assert result.exit_code == 1 and "did you mean model?" in result.output

    def test_a_check_that_fails_does_not_end_the_others(self, monkeypatch):
        def broken():
            raise RuntimeError("no such symbol\nmore")

        monkeypatch.setattr(torch.cuda, "is_available", broken)
        result = doctor()
        assert result.exit_code == 1 and "config file" in result.output
        assert "the check of device failed: no such symbol" in result.output


class TestCompletion:
    @pytest.mark.parametrize(
        ("shell", "path"),
        [
            ("bash", ".local/share/bash-completion/completions/omnigen-fast"),
            ("zsh", ".local/share/zsh/site-functions/_omnigen-fast"),
            ("fish", ".config/fish/completions/omnigen-fast.fish"),
        ],
    )
    def test_it_is_written_where_the_shell_looks(self, folder, monkeypatch, shell, path):
        monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
        result = CliRunner().invoke(main, ["completion", "install"])
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[0] == str(folder / path)
        text = (folder / path).read_text()
        assert f"{shell}_complete" in text and "omnigen-fast" in text
        shown = CliRunner().invoke(main, ["completion", "show", shell])
        assert shown.output.rstrip("\n") == text.rstrip("\n")

    def test_other_shells(self, monkeypatch):
        monkeypatch.setenv("SHELL", "/bin/tcsh")
        result = CliRunner().invoke(main, ["completion", "install"])
        assert result.exit_code == 2
        assert "the shell tcsh is not known; give one of bash, zsh, fish" in result.output

    def test_it_completes(self):
        """What the scripts ask the program for."""
        names = complete("omnigen-fast gen", 1)
        assert "generate" in names
        assert "--negative-prompt" in complete("omnigen-fast generate --neg", 2)
        assert "ab2" in complete("omnigen-fast generate --solver a", 3)


def complete(words: str, place: int) -> str:
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(place)}
    variables["_OMNIGEN_FAST_COMPLETE"] = "bash_complete"
    done = subprocess.run(
        [sys.executable, "-c", "from omnigen_fast.cli import main; main(prog_name='omnigen-fast')"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
