"""A working directory of one's own, and the calls that a batch makes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from omnigen_fast import OmniGenPipeline


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch, pipe) -> list[list[str]]:
    """The prompts of each call that was made, all on the shared pipeline."""
    made: list[list[str]] = []
    call = OmniGenPipeline.__call__

    @functools.wraps(call)  # whose signature `plan` reads
    def counted(self, prompt, *arguments, **named):
        made.append(prompt)
        return call(self, prompt, *arguments, **named)

    monkeypatch.setattr(OmniGenPipeline, "__call__", counted)
    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", lambda *_, **__: pipe)
    return made
