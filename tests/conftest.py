"""Shared by all tests: the golden checkpoint, its cases, and a pipeline on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


def golden_request(name: str) -> dict[str, Any]:
    """The arguments of a golden case, image names made paths."""
    request = dict(CASES[name]["request"])
    if "input_images" in request:
        request["input_images"] = _paths(request["input_images"])
    return request


def _paths(images: Any) -> Any:
    if isinstance(images, list):
        return [_paths(image) for image in images]
    return str(GOLDEN / "images" / images)


def golden_result(name: str) -> dict[str, torch.Tensor]:
    """What the original returned."""
    return load_file(GOLDEN / "expected" / f"{name}.safetensors")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


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
