"""Parameters whose tensors have other names, or are stored in parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import TINY
from safetensors.torch import save_file

from omnigen_fast.weights import checkpoint, names
from omnigen_fast.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
CONFIG = json.loads((TINY / "config.json").read_text())
QKV = "llm.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden checkpoint to change."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_parts_of_a_parameter_are_joined(folder):
    """As diffusers has them; the layout is told by the names."""
    whole = Checkpoint.open(TINY)
    exact = whole.read(torch.float32, CPU)
    parts = {
        part.name: exact[name][part.start : part.start + part.shape[0]].clone()
        for name, sources in names.diffusers_sources(whole.config).items()
        for part in sources
    }
    assert len(parts) == len(exact) + 2 * whole.config.num_layers
    save_file(parts, folder / "model.safetensors")
    found = Checkpoint.open(folder).read(torch.float32, CPU)
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_parts_of_other_sizes_are_joined(tmp_path):
    """As keys and values are that fewer heads share."""
    parts = {"q": torch.arange(12.0).view(4, 3), "k": torch.full((2, 3), 0.5)}
    save_file(parts, tmp_path / "parts.safetensors")
    rows = names.TensorRows("q", 0, (4, 3)), names.TensorRows("k", 4, (2, 3))
    one = replace(
        Checkpoint.open(TINY),
        sources={"qk": rows},
        files=dict.fromkeys(parts, str(tmp_path / "parts.safetensors")),
    )
    assert torch.equal(one.read(torch.float32, CPU)["qk"], torch.cat([*parts.values()]))


@pytest.mark.parametrize(("shape", "frequencies"), [((8, 100), 100), ((8,), 256)], ids=str)
def test_the_time_embeddings_frequencies(shape, frequencies):
    shapes = {"t_embedder.mlp.0.weight": shape}
    config = checkpoint.read_config(CONFIG, shapes, checkpoint.ORIGINAL)
    assert config.time_frequencies == frequencies


def test_both_layouts_names_are_known():
    checkpoint = Checkpoint.open(TINY)
    original, whole = checkpoint.find(QKV)
    assert (original, whole.start, whole.shape) == ("layers.1.qkv_proj", 0, (576, 192))
    for part, start in (("q", 0), ("k", 192), ("v", 384)):
        name, rows = checkpoint.find(f"layers.1.self_attn.to_{part}.weight")
        assert (name, rows.start, rows.shape) == ("layers.1.qkv_proj", start, (192, 192))
    assert checkpoint.find("layers.1.self_attn.to_z.weight") is None
