"""Mistakes of a newcomer who starts the page: one line with the way out, and no page.

Those that are made on the page itself are in tests/browser and in `test_job.py`.
"""

from __future__ import annotations

import socket

import pytest
from click.testing import CliRunner
from golden_cases import GOLDEN

from omnigen_fast.cli.main import main

pytest.importorskip("gradio")


def said(*arguments: str, **environment: str) -> str:
    """The one line of a page that can't start."""
    result = CliRunner().invoke(main, ["app", *arguments], env=environment)
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2)
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and len(line) <= 307
    return line.removeprefix("Error: ")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").touch()


SHAPES = ["--model", "shapes", "--device", "cpu"]
MISTAKES = {
    "memory without a unit": ([*SHAPES, "--memory", "12"], 'for 12 GiB write "12GiB"'),
    "memory in words": ([*SHAPES, "--memory", "a lot"], 'an amount such as "8GiB"'),
    "wrong folder": (
        ["--model", "pictures"],
        "has no model.safetensors; give the folder of a model, or a hub id",
    ),
    "missing file": ([*SHAPES, "--lora", "none.safetensors"], "none.safetensors"),
    "LoRA of another model": ([*SHAPES, "--lora", str(GOLDEN / "lora")], "it is for another model"),
    "LoRA with a word for its weight": ([*SHAPES, "--lora", "a:heavy"], "give LORA:0.8"),
    "unknown device": ([*SHAPES, "--device", "toaster"], "device 'toaster' can't be used"),
    "pictures into a file": ([*SHAPES, "--out-dir", "file"], "is a file; give a folder"),
    "no file of users": ([*SHAPES, "--auth", "none"], "give a file with user:password lines"),
    "a VAE that is not there": ([*SHAPES, "--vae-path", "none"], "none"),
    "weights of no kind": ([*SHAPES, "--weights", "int3"], "weights"),
    "host elsewhere": ([*SHAPES, "--host", "192.0.2.1"], "can't listen"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_at_the_start(mistake):
    arguments, way_out = MISTAKES[mistake]
    assert way_out in said(*arguments)


def test_a_password_among_the_users_is_not_shown():
    line = said(*SHAPES, OMNIGEN_PAGE_AUTH="hunter2")
    assert "write user:password" in line and "hunter2" not in line


def test_busy_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = said(*SHAPES, "--port", str(port))
        assert f"port {port} is in use; give another --port, or none for a free one" in line


def test_no_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    line = said("--model", "owner/name", "--device", "cpu")
    assert "Connection refused; check name and network, or give a local folder" in line
