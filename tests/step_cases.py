"""What steps of every kind must hold to: the same under any plan, and packed as alone."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import relative_error

from omnigen_fast.memory.plan import MemoryPlan

PLAN = MemoryPlan.plain(layers=3, kept_bytes=16 << 20)
CHANGES: tuple[dict[str, Any], ...] = (  # of that plan
    {"branches_per_pass": 1},
    {"cache": "none"},
    {"resident_layers": 1, "cache": "ring"},
    {"capture": True},
)


def under(*changes: dict[str, Any]) -> pytest.MarkDecorator:
    """Runs a test under `PLAN` with each `change`."""
    return pytest.mark.parametrize("change", changes, ids=lambda change: ", ".join(change))


def assert_packed_is_alone(pipe, batch: dict[str, Any], noise) -> None:
    """Each picture of a batch without a seed, from its noise, is the one of its own call."""
    packed = pipe(**batch, latents=noise)
    for i, (prompt, images) in enumerate(zip(batch["prompt"], batch["input_images"], strict=True)):
        one = {**batch, "prompt": prompt, "input_images": images}
        alone = pipe(**one, latents=noise[i : i + 1])
        assert relative_error(packed[i : i + 1], alone) < 1e-5
