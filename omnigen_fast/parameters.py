"""Names, shapes and sizes of the transformer's weights."""

from __future__ import annotations

from collections.abc import Mapping

from .config import LATENT_CHANNELS, PATCH, ModelConfig
from .forms import Part, parts_of
from .precision import Precision

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


# Name of the one part of a plain parameter.
PLAIN = ""


def layer_parts(config: ModelConfig, precision: Precision) -> dict[str, Mapping[str, Part]]:
    """The tensors that each of a layer's parameters is stored as, by their names.

    Those of a form as `forms.parts_of` names them; of a plain parameter there is one, `PLAIN`.
    """
    found: dict[str, Mapping[str, Part]] = {}
    for name, shape in layer_shapes(config).items():
        form = precision.form_of(name)
        plain = {PLAIN: Part(shape, precision.arithmetic)}
        found[name] = plain if form is None else parts_of(form, shape)
    return found


def stored_bytes(parts: Mapping[str, Mapping[str, Part]]) -> int:
    """Of a layer's tensors, each alone."""
    return sum(part.nbytes for some in parts.values() for part in some.values())


def buffer_bytes(parts: Mapping[str, Mapping[str, Part]]) -> int:
    """Of a buffer that holds one layer, each tensor aligned."""
    return sum(aligned(part.nbytes) for some in parts.values() for part in some.values())


def aligned(size: int) -> int:
    """A size in whole units of `ALIGNED_BYTES`."""
    return -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
