"""A model's weights under the names of other layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from omnigen_fast.config import ModelConfig
from omnigen_fast.weights.names import DIFFUSERS, ORIGINAL, Layout, layout_sources

Weights = Mapping[str, Tensor]  # by the names of `parameter_shapes`


def diffusers_tensors(
    config: ModelConfig, weights: Weights, dtype: torch.dtype
) -> dict[str, Tensor]:
    """In diffusers' layout; views of the weights where those have the dtype."""
    return _renamed(config, weights, DIFFUSERS, dtype)


def _renamed(
    config: ModelConfig, weights: Weights, layout: Layout, dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        part.name: weights[name][part.start : part.start + part.shape[0]].to(dtype)
        for name, parts in layout_sources(config, layout).items()
        for part in parts
    }


def phi3_config(config: ModelConfig) -> dict:
    """What `config.json` of the original's layout says of a model."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "pad_token_id": 2,  # transformers' default is outside a small vocabulary
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "rope_scaling": {
            "type": "su",
            "short_factor": config.short_factor,
            "long_factor": config.long_factor,
        },
    }


def write_original(folder: Path, config: ModelConfig, weights: Weights) -> None:
    """Writes `config.json` and `model.safetensors` as the original reads them."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(phi3_config(config)))
    tensors = {}
    for name, parts in layout_sources(config, ORIGINAL).items():
        for part in parts:
            tensor = weights[name][part.start : part.start + part.shape[0]]
            tensors[part.name] = tensor.cpu().reshape(part.shape).contiguous()
    save_file(tensors, folder / "model.safetensors")
