"""The transformer as it is trained: what `omnigen_fast.model` computes, with gradients.

A picture's condition does not depend on time or noise, so several draws of (time, noise) share one
condition: the sequence is `[condition | draw 1 | draw 2 | ...]`, each draw a time token and the
noise tokens, each at the same positions, and no draw sees another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnigen_fast.config import LATENT_CHANNELS, PATCH, TIME_FREQUENCIES, ModelConfig
from omnigen_fast.parameters import parameter_shapes

from .layer import Layer, Layout

OUTPUT_NORM_EPS = 1e-6
_LAYER_WEIGHTS = ("input_norm", "qkv_proj", "o_proj", "post_norm", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Conditions:
    """Conditions of equal make-up, padded at their ends to one length."""

    token_ids: Tensor  # [batch, length], int64
    kv_end: Tensor  # [batch, length], int64: each row sees those before this place
    lengths: Tensor  # [batch], int64
    latents: Tensor  # [batch, images, 4, height, width] of the input images
    slots: Tensor  # [batch, images]: first row of each image


class Network(nn.Module):
    """Parameters named as in `omnigen_fast.model.parameter_shapes`, with "/" for "."."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_heads != config.num_kv_heads:
            raise ValueError("grouped key and value heads are not trained here")
        self.config = config
        self.weights = nn.ParameterDict()
        for name, shape in parameter_shapes(config).items():
            trained = name != "pos_embed"  # a fixed table, as in the original
            value = sine_table(config) if not trained else _initial(name, shape, config)
            self.weights[name.replace(".", "/")] = nn.Parameter(value, requires_grad=trained)
        factors = torch.tensor(config.short_factor, dtype=torch.float32)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.frequencies = 1 / (factors * config.rope_theta**exponents)

    def weight(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def named(self) -> dict[str, Tensor]:
        """All weights by their names in `parameter_shapes`."""
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(
        self,
        conditions: Conditions,
        noisy: Tensor,  # [batch, draws, 4, height, width]
        times: Tensor,  # [batch, draws], float32
    ) -> Tensor:  # [batch, draws, 4, height, width]
        """Velocities."""
        batch, draws = times.shape
        condition = self._embed_condition(conditions)
        length = condition.shape[1]
        time_tokens, shift, scale = self._embed_times(times)
        noise = self._embed_patches("noise_proj", noisy.flatten(0, 1))
        noise = noise.unflatten(0, (batch, draws))
        own = torch.cat([time_tokens.unsqueeze(2), noise], dim=2)  # [batch, draws, 1 + N, hidden]
        rows = own.shape[2]
        stream = torch.cat([condition, own.flatten(1, 2)], dim=1)

        places = torch.arange(length, device=stream.device)
        behind = conditions.lengths[:, None] + torch.arange(rows, device=stream.device)
        positions = torch.cat([places.expand(batch, -1), behind.repeat(1, draws)], dim=1)
        cos, sin = self._rotary(positions, stream.dtype)
        own_mask = torch.ones(rows, rows, dtype=torch.bool, device=stream.device)
        own_mask[0, 1:] = False  # the time token does not see the noise
        heads = self.config.num_heads

        def bias(mask: Tensor) -> Tensor:  # the same for every head
            return _bias(mask, stream.dtype).repeat_interleave(heads, dim=0)

        layout = Layout(
            cos,
            sin,
            condition_bias=bias(places < conditions.kv_end[..., None]),
            seen_bias=bias((places < conditions.lengths[:, None]).unsqueeze(1)),
            own_bias=_bias(own_mask, stream.dtype),
            length=length,
            draws=draws,
            heads=heads,
            eps=self.config.rms_norm_eps,
        )
        last = self.config.num_layers - 1
        for layer in range(self.config.num_layers):
            weights = [self.weight(f"layers.{layer}.{name}") for name in _LAYER_WEIGHTS]
            stream = Layer.apply(stream, *weights, layout, layer == last)
        noise = stream.unflatten(1, (draws, rows))[:, :, 1:]
        eps = self.config.rms_norm_eps
        normed = F.rms_norm(noise, noise.shape[-1:], self.weight("norm"), eps)
        normed = F.layer_norm(normed, normed.shape[-1:], eps=OUTPUT_NORM_EPS)
        modulated = normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)
        values = F.linear(modulated, self.weight("output.weight"), self.weight("output.bias"))
        height, width = noisy.shape[-2] // PATCH, noisy.shape[-1] // PATCH
        values = values.view(batch, draws, height, width, PATCH, PATCH, LATENT_CHANNELS)
        return values.permute(0, 1, 6, 2, 4, 3, 5).reshape(noisy.shape)

    def _embed_condition(self, conditions: Conditions) -> Tensor:  # [batch, length, hidden]
        embedded = F.embedding(conditions.token_ids, self.weight("embed_tokens"))
        images = conditions.latents.shape[1]
        if not images:
            return embedded
        tokens = self._embed_patches("image_proj", conditions.latents.flatten(0, 1))
        tokens = tokens.unflatten(0, (-1, images))
        rows = conditions.slots[..., None] + torch.arange(tokens.shape[2])
        index = rows.flatten(1).unsqueeze(2).expand(-1, -1, embedded.shape[2])
        return embedded.scatter(1, index, tokens.flatten(1, 2).to(embedded.dtype))

    def _embed_times(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Time token, shift and scale, [batch, draws, hidden] each."""
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32) / half
        angles = times[..., None] * torch.exp(-math.log(10000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.weight("norm").dtype)

        def mlp(name: str) -> Tensor:
            hidden = F.linear(waves, self.weight(f"{name}.0.weight"), self.weight(f"{name}.0.bias"))
            return F.linear(
                F.silu(hidden), self.weight(f"{name}.1.weight"), self.weight(f"{name}.1.bias")
            )

        modulation = F.linear(
            F.silu(mlp("time_embed")),
            self.weight("modulation.weight"),
            self.weight("modulation.bias"),
        )
        return mlp("time_token"), *modulation.chunk(2, dim=-1)

    def _embed_patches(self, name: str, latents: Tensor) -> Tensor:  # [pictures, N, hidden]
        height, width = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        weight = self.weight(f"{name}.weight")
        patches = latents.to(weight.dtype).unflatten(3, (width, PATCH))
        patches = patches.unflatten(2, (height, PATCH)).permute(0, 2, 4, 1, 3, 5)
        patches = patches.flatten(3).flatten(1, 2)
        side = self.config.pos_embed_size
        top, left = (side - height) // 2, (side - width) // 2
        table = self.weight("pos_embed").view(side, side, -1)
        table = table[top : top + height, left : left + width].flatten(0, 1)
        return F.linear(patches, weight.flatten(1), self.weight(f"{name}.bias")) + table

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = (positions.to(torch.float32)[..., None] * self.frequencies).unsqueeze(1)
        scale = self.config.rope_scale
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def sine_table(config: ModelConfig) -> Tensor:  # [1, side^2, hidden]
    """The fixed position table: sines and cosines of the column, then of the row."""
    side, quarter = config.pos_embed_size, config.hidden_size // 4
    frequencies = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    waves = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([waves.sin(), waves.cos()], dim=1)  # [side, hidden / 2]
    columns, rows = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).unsqueeze(0).to(torch.float32)


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    """Zero for biases and for what the output passes through; else normal by the inputs' number."""
    if name.endswith("norm"):
        return torch.ones(shape)
    if name.endswith("bias") or name.startswith(("modulation", "output")):
        return torch.zeros(shape)
    if name == "embed_tokens":
        return torch.randn(shape) * 0.5
    fan_in = math.prod(shape[1:])
    scale = fan_in**-0.5
    if name.endswith(("o_proj", "down_proj")):
        scale /= (2 * config.num_layers) ** 0.5
    return torch.randn(shape) * scale


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
