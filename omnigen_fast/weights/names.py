"""Tensor names in the two layouts of a checkpoint: the original's and diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import ModelConfig
from ..parameters import parameter_shapes

Layout = Mapping[str, Sequence[str]]  # our name: the tensors that it stacks along axis 0

ORIGINAL: Layout = {
    "embed_tokens": ["llm.embed_tokens.weight"],
    "noise_proj": ["x_embedder.proj"],
    "image_proj": ["input_x_embedder.proj"],
    "norm": ["llm.norm.weight"],
    "modulation": ["final_layer.adaLN_modulation.1"],
    "output": ["final_layer.linear"],
    "pos_embed": ["pos_embed"],
    "time_token.0": ["time_token.mlp.0"],
    "time_token.1": ["time_token.mlp.2"],
    "time_embed.0": ["t_embedder.mlp.0"],
    "time_embed.1": ["t_embedder.mlp.2"],
    "input_norm": ["llm.layers.{}.input_layernorm.weight"],
    "qkv_proj": ["llm.layers.{}.self_attn.qkv_proj.weight"],
    "o_proj": ["llm.layers.{}.self_attn.o_proj.weight"],
    "post_norm": ["llm.layers.{}.post_attention_layernorm.weight"],
    "gate_up_proj": ["llm.layers.{}.mlp.gate_up_proj.weight"],
    "down_proj": ["llm.layers.{}.mlp.down_proj.weight"],
}
DIFFUSERS: Layout = {
    "embed_tokens": ["embed_tokens.weight"],
    "noise_proj": ["patch_embedding.output_image_proj"],
    "image_proj": ["patch_embedding.input_image_proj"],
    "norm": ["norm.weight"],
    "modulation": ["norm_out.linear"],
    "output": ["proj_out"],
    "pos_embed": ["patch_embedding.pos_embed"],
    "time_token.0": ["time_token.linear_1"],
    "time_token.1": ["time_token.linear_2"],
    "time_embed.0": ["t_embedder.linear_1"],
    "time_embed.1": ["t_embedder.linear_2"],
    "input_norm": ["layers.{}.input_layernorm.weight"],
    "qkv_proj": [f"layers.{{}}.self_attn.to_{part}.weight" for part in "qkv"],
    "o_proj": ["layers.{}.self_attn.to_out.0.weight"],
    "post_norm": ["layers.{}.post_attention_layernorm.weight"],
    "gate_up_proj": ["layers.{}.mlp.gate_up_proj.weight"],
    "down_proj": ["layers.{}.mlp.down_proj.weight"],
}


@dataclass(frozen=True)
class TensorRows:
    """A tensor of a checkpoint, and the rows of our parameter that it fills."""

    name: str  # in the checkpoint
    start: int  # first row
    shape: tuple[int, ...]


def diffusers_sources(config: ModelConfig) -> dict[str, tuple[TensorRows, ...]]:
    """Each of our parameters with the tensors of diffusers' transformer that fill it."""
    return layout_sources(config, DIFFUSERS)


def layout_sources(config: ModelConfig, layout: Layout) -> dict[str, tuple[TensorRows, ...]]:
    """Each of our parameters with the tensors of a layout that fill it."""
    kv_rows = config.num_kv_heads * config.head_dim
    sources = {}
    for parameter, shape in parameter_shapes(config).items():
        head, _, tail = parameter.partition(".")
        if head == "layers":
            layer, _, kind = tail.partition(".")
            parts = [name.format(layer) for name in layout[kind]]
        elif parameter in layout:
            parts = list(layout[parameter])
        else:  # a weight or a bias of a named module
            module, _, kind = parameter.rpartition(".")
            parts = [f"{name}.{kind}" for name in layout[module]]
        rows = [config.hidden_size, kv_rows, kv_rows] if len(parts) == 3 else [shape[0]]
        starts = [sum(rows[:i]) for i in range(len(rows))]
        sources[parameter] = tuple(
            TensorRows(part, start, (count, *shape[1:]))
            for part, start, count in zip(parts, starts, rows)
        )
    return sources
