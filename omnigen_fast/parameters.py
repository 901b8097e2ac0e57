"""Names, shapes and sizes of the transformer's weights."""

from __future__ import annotations

import math

from .config import LATENT_CHANNELS, PATCH, ModelConfig

PATCH_VALUES = LATENT_CHANNELS * PATCH * PATCH  # latent values of a token


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `Transformer`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, hidden),
        "noise_proj.weight": (hidden, LATENT_CHANNELS, PATCH, PATCH),
        "noise_proj.bias": (hidden,),
        "image_proj.weight": (hidden, LATENT_CHANNELS, PATCH, PATCH),
        "image_proj.bias": (hidden,),
        "norm": (hidden,),
        "modulation.weight": (2 * hidden, hidden),
        "modulation.bias": (2 * hidden,),
        "output.weight": (PATCH_VALUES, hidden),
        "output.bias": (PATCH_VALUES,),
        "pos_embed": (1, config.pos_embed_size**2, hidden),
    }
    for embedder in ("time_token", "time_embed"):
        shapes |= {
            f"{embedder}.0.weight": (hidden, config.time_frequencies),
            f"{embedder}.0.bias": (hidden,),
            f"{embedder}.1.weight": (hidden, hidden),
            f"{embedder}.1.bias": (hidden,),
        }
    for layer in range(config.num_layers):
        shapes |= {
            f"layers.{layer}.input_norm": (hidden,),
            f"layers.{layer}.qkv_proj": (config.qkv_width, hidden),
            f"layers.{layer}.o_proj": (hidden, hidden),
            f"layers.{layer}.post_norm": (hidden,),
            f"layers.{layer}.gate_up_proj": (2 * inner, hidden),
            f"layers.{layer}.down_proj": (hidden, inner),
        }
    return shapes


ALIGNED_BYTES = 256  # alignment of parameters in a layer's buffer


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's parameters, by their names in `model.Block`."""
    prefix = "layers.0."
    return {
        name.removeprefix(prefix): shape
        for name, shape in parameter_shapes(config).items()
        if name.startswith(prefix)
    }


def layer_elements(config: ModelConfig, element_bytes: int) -> int:
    """Elements of a buffer that holds one layer."""
    unit = ALIGNED_BYTES // element_bytes
    return sum(-(-math.prod(shape) // unit) * unit for shape in layer_shapes(config).values())
