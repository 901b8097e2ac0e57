"""Configs of the transformer and of the autoencoder."""

from __future__ import annotations

import json
import random

from .. import mutate, tiny
from .checkpoints import Checkpoints
from .folders import Files, special

_NAMES = (
    *tiny.CONFIG,
    *tiny.DIFFUSERS_CONFIG,
    *("rope_parameters", "rope_type", "type", "short_factor", "long_factor", "short_mscale"),
    *("partial_rotary_factor", "attention_bias", "sliding_window", "quantization_config"),
    *("block_out_channels", "norm_num_groups", "layers_per_block", "latents_mean", "act_fn"),
    *("scaling_factor", "shift_factor", "mid_block_add_attention", "down_block_types", "auto_map"),
)
_VALUES = (
    "silu",
    "gelu",
    "su",
    "longrope",
    "default",
    "float16",
    [1.0, 1.1],
    [4, 4, 4, 4],
    [1 << 20] * 4,
    ["DownEncoderBlock2D"] * 4,
    ["CrossAttnDownBlock2D"] * 4,
    8,
    2,
    320,
    4096,
    1 << 20,
    {"type": "su", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]},
    {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [1e300] * 2},
)
_FILES = (*["config.json"] * 7, "vae/config.json")


class Configs(Checkpoints):
    def make(self, rng: random.Random, number: int) -> Files:
        diffusers = rng.random() < 0.4
        name = rng.choice(_FILES)
        if diffusers and name == "config.json":
            name = "transformer/config.json"
        files: Files = {"": b"diffusers" if diffusers else b"original"}
        if rng.random() < 0.02:
            files[name] = special(rng)
            return files
        values = json.loads((self._models[diffusers] / name).read_text())
        files[name] = mutate.json_bytes(rng, mutate.tree(rng, values, _VALUES, _NAMES))
        return files
