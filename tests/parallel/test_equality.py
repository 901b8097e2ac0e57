"""Every layout makes the pictures of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_result, relative_error
from parallel_cases import CALLS, EDIT, LOADED, golden_calls, latents_and_image, load
from ranks import run_ranks

pytestmark = pytest.mark.early

LAYOUTS = {
    2: ({"branches": 2}, {"rows": 2}),
    3: ({"branches": 3}, {"rows": 3}),
    4: ({"branches": 2, "rows": 2}, {"rows": 4}, {"branches": 4}),
    6: ({"branches": 3, "rows": 2}, {"branches": 2, "rows": 3}, "auto"),
}
TOLERANCE = 1e-5


def make(calls: dict[str, Any], layouts: Any) -> Any:
    """Runs on every rank: each call in each layout."""
    found = []
    for layout in layouts:
        pipe = load(layout)
        found.append({name: latents_and_image(pipe, call) for name, call in calls.items()})
    return found


def make_with_forms(layouts: Any) -> Any:
    """Runs on every rank: one call in each layout, with weights in every form."""
    return {
        (kind, place): latents_and_image(load(layout, lora, **options), EDIT)
        for kind, (options, lora) in LOADED.items()
        for place, layout in enumerate(layouts)
    }


@pytest.fixture(scope="module")
def alone():
    """What one process makes of `CALLS`."""
    pipe = load()
    return {name: latents_and_image(pipe, call) for name, call in CALLS.items()}


def assert_same(
    ranks: list[dict[str, Any]], expected: dict[str, Any], name: str, of_image: float = TOLERANCE
) -> None:
    first, *others = ranks
    assert relative_error(first["latents"], expected["latents"]) < TOLERANCE, name
    assert relative_error(first["image"], expected["image"]) < of_image, name
    for one in others:
        assert one["image"] is None, name
        assert torch.equal(one["latents"], first["latents"]), name


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("size", LAYOUTS)
def test_goldens(size, tmp_path):
    found = run_ranks(size, make, tmp_path, golden_calls(), LAYOUTS[size])
    for place in range(len(LAYOUTS[size])):
        for name in golden_calls():
            assert_same([rank[place][name] for rank in found], golden_result(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_of_call(size, tmp_path, alone):
    layouts = LAYOUTS[size][:2]
    found = run_ranks(size, make, tmp_path, CALLS, layouts)
    for place, layout in enumerate(layouts):
        for name in CALLS:
            assert_same([rank[place][name] for rank in found], alone[name], name)
            # steps of one branch split rows, whose attention sums in another order on a CPU
            if layout == {"branches": 2} and name not in ("no guidance", "intervals"):
                latents = found[0][place][name]["latents"]
                assert torch.equal(latents, alone[name]["latents"]), name


@pytest.mark.slow
def test_every_form_of_weights(tmp_path):
    layouts = ({"branches": 2}, {"rows": 2})
    found = run_ranks(2, make_with_forms, tmp_path, layouts)
    for kind, (options, lora) in LOADED.items():
        expected = latents_and_image(load(lora=lora, **options), EDIT)
        for place in range(len(layouts)):
            # the decoder runs in strips, which bfloat16 rounds at other places
            of_image = 0.01 if kind == "bfloat16 VAE" else TOLERANCE
            assert_same([rank[kind, place] for rank in found], expected, kind, of_image)
