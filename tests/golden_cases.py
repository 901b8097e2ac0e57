"""The golden checkpoint and its cases: what the original returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
