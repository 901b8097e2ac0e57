"""Shared by all tests: pipelines on the golden checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden_cases import TINY


@pytest.fixture(scope="session")
def load_pipe():
    """Loads a pipeline on the golden checkpoint: `load_pipe(dtype="float32", ...)`."""
    from omnigen_fast import OmniGenPipeline

    def load(folder: Path = TINY, **arguments: Any) -> OmniGenPipeline:
        return OmniGenPipeline.from_pretrained(folder, **{"dtype": "float32", **arguments})

    return load


@pytest.fixture(scope="session")
def shared_pipe(load_pipe):
    """One float32 pipeline for all tests that change nothing but its cache."""
    return load_pipe()


@pytest.fixture
def pipe(shared_pipe):
    """The shared pipeline with nothing kept."""
    shared_pipe.clear_cache()
    return shared_pipe
