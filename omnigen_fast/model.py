"""The transformer: prefill of the condition, and the step that runs the noise tokens alone.

The keys and values of the condition and of the time tokens don't depend on the noise, so `prefill`
computes them once for all steps. A step's queries are then exactly the noise tokens, and each sees
every key of its branch: no mask, no padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache
from .config import PATCH, ModelConfig
from .errors import RequestError
from .forms import PRODUCTS
from .kernels import ops
from .linear import QuantisedRows, Weight, linear
from .memory.plan import MLP_ROWS
from .parallel.exchange import RowExchange
from .parameters import PATCH_VALUES, layer_shapes
from .quantised import QuantisedWeight, parts_of_weight
from .sequence import ConditionSequence
from .streaming import Streamed

_OUTPUT_NORM_EPS = 1e-6
_SAMPLES = 8  # values of a weight that a fingerprint looks at, about
_KEPT_CROPS = 16  # of the position table; one of 1024 px takes 25 MB


@dataclass(frozen=True)
class TimeEmbeddings:
    """What the transformer needs of the times of all steps, computed once."""

    tokens: Tensor  # [steps, hidden]
    shift: Tensor  # [steps, hidden]
    scale: Tensor  # [steps, hidden]


@dataclass(frozen=True)
class StepGroups:
    """The (picture, branch) pairs that one pass runs; each has the picture's N noise tokens."""

    pictures: tuple[int, ...]  # of each group: whose latents
    step: Tensor  # [groups], int64: the step that each takes
    cu_rows: Tensor  # [groups + 1], int32
    max_rows: int
    cache_start: Tensor  # [groups], int32
    cache_len: Tensor  # [groups], int32: condition and the step's time token
    spans: list[int]  # of the groups, see `ops.attention_step`
    cos: Tensor  # [groups * N, head_dim / 2], float32
    sin: Tensor  # [groups * N, head_dim / 2], float32
    residual: Tensor  # [groups * N, hidden]
    values: Tensor  # [groups * N, 16], the velocities
    space: Workspace  # of all passes
    # Where other ranks have some groups, or some of their rows: N above is then the number of rows
    # here, and these say which, and how the others' keys and values come here.
    noise: NoiseRows | None = None
    exchange: RowExchange | None = None


@dataclass(frozen=True)
class NoiseRows:
    """The noise tokens that a rank runs of a step that several ranks share."""

    pictures: tuple[int, ...]  # that have groups here
    first: int  # of each picture's tokens, the first that runs here
    places: Tensor  # [pictures, N, 16], int64: where the patches' values are in the latents
    values: Tensor  # likewise, float32: memory for these values


@dataclass(frozen=True)
class PrefillState:
    """A branch on its way through the layers."""

    sequence: ConditionSequence
    cos: Tensor
    sin: Tensor
    residual: Tensor  # [rows, hidden]
    space: Workspace  # of all branches


def patches_of(latents: Tensor) -> Tensor:
    """The 2 x 2 patches of latents [pictures, 4, height, width], one for each noise token.

    A view [pictures, height / 2, width / 2, 4, 2, 2].
    """
    apart = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return apart.permute(0, 2, 4, 1, 3, 5)


class Workspace:
    """Memory for the intermediate results of a layer, used again by every layer, pass and step.

    Per row the widths of QKV and of the hidden state; the MLP processes `mlp_rows` rows at a time.
    Where products are in 8 bits, what they take is kept beside that.
    """

    def __init__(
        self, config: ModelConfig, rows: int, mlp_rows: int, like: Tensor, block: Block
    ) -> None:
        self.qkv = like.new_empty(rows, config.qkv_width)
        self.normed = like.new_empty(rows, config.hidden_size)
        self.mlp_rows = mlp_rows
        self.gate_up = like.new_empty(min(rows, mlp_rows), 2 * config.intermediate_size)
        self.hidden = self.inner = like.new_empty(0)
        self.scales = like.new_empty(0, dtype=torch.float32)
        if block.computes_in_8_bits(*_OF_HIDDEN):
            self.hidden = like.new_empty(rows, config.hidden_size, dtype=torch.uint8)
        if block.computes_in_8_bits(*_OF_INNER):
            shape = (len(self.gate_up), config.intermediate_size)
            self.inner = like.new_empty(shape, dtype=torch.uint8)
        if self.hidden.numel() or self.inner.numel():
            self.scales = like.new_empty(2, rows, dtype=torch.float32)

    def hidden_rows(self, rows: int, weight: QuantisedWeight) -> QuantisedRows:
        """Where hidden states in 8 bits go, for a product with a weight."""
        return QuantisedRows(self.hidden[:rows].view(weight.values.dtype), self.scales[0, :rows])

    def inner_rows(self, rows: int, weight: QuantisedWeight) -> QuantisedRows:
        """Where activations of the MLP go, likewise."""
        return QuantisedRows(self.inner[:rows].view(weight.values.dtype), self.scales[1, :rows])

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.qkv, self.normed, self.gate_up, self.hidden, self.inner, self.scales]


# What each product of a layer takes.
_OF_HIDDEN, _OF_INNER = ("qkv_proj", "o_proj", "gate_up_proj"), ("down_proj",)


class Block(nn.Module):
    """One layer. Its products add to the residual stream themselves, which norms only read.

    What a method returns is a view of the workspace, valid until the next call.
    """

    input_norm: Tensor  # [hidden]
    qkv_proj: Weight
    o_proj: Weight
    post_norm: Tensor  # [hidden]
    gate_up_proj: Weight
    down_proj: Weight

    def __init__(self, weights: Mapping[str, Weight], config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name, value in weights.items():
            self.set(name, value)

    def set(self, name: str, value: Weight) -> None:
        """Replaces a weight."""
        if isinstance(value, Tensor):
            value = nn.Parameter(value, requires_grad=False)
        setattr(self, name, value)

    def computes_in_8_bits(self, *names: str) -> bool:
        """Whether the product with any of these weights does."""
        return any(_in_form_of_products(getattr(self, name)) for name in names)

    @property
    def expands(self) -> bool:
        """Whether it holds weights that no product takes as they are."""
        weights = [getattr(self, name) for name in layer_shapes(self.config)]
        return any(
            isinstance(one, QuantisedWeight) and not _in_form_of_products(one) for one in weights
        )

    def for_products(self, like: Tensor) -> Block:
        """A layer as products take it, uninitialised; what is plain is in the dtype of `like`."""
        weights: dict[str, Weight] = {}
        for name, shape in layer_shapes(self.config).items():
            weight = getattr(self, name)
            weights[name] = like.new_empty(shape)
            if _in_form_of_products(weight):
                parts = {part: torch.empty_like(one) for part, one in weight.parts.items()}
                weights[name] = QuantisedWeight(weight.form, weight.shape[1], parts)
        return Block(weights, self.config)

    def project(self, residual: Tensor, space: Workspace, first: int = 0) -> Tensor:
        """Fused QKV product of the normed stream, [rows, (heads + 2 kv_heads) * head_dim].

        Written to the workspace from row `first` on; earlier rows are untouched.
        """
        normed = self._normed(residual, self.input_norm, self.qkv_proj, space)
        return linear(normed, self.qkv_proj, out=space.qkv[first : first + len(residual)])

    def _normed(
        self, residual: Tensor, norm: Tensor, weight: Weight, space: Workspace
    ) -> Tensor | QuantisedRows:
        """The normed stream, as the product with a weight takes it."""
        rows, eps = len(residual), self.config.rms_norm_eps
        if isinstance(weight, QuantisedWeight):
            out = space.hidden_rows(rows, weight)
            ops.rms_norm_quantise_(residual, norm, eps, out.values, out.scales)
            return out
        return ops.rms_norm(residual, norm, eps, out=space.normed[:rows])

    def attended(self, space: Workspace, rows: int) -> Tensor:
        """Where attention is to write, [rows, heads, head_dim]: the normed stream is done with."""
        return space.normed[:rows].unflatten(1, (self.config.num_heads, -1))

    def finish(self, residual: Tensor, attended: Tensor, space: Workspace) -> None:
        """Output projection and MLP, both added to `residual` [rows, hidden]."""
        taken: Tensor | QuantisedRows = attended.flatten(1)
        if isinstance(self.o_proj, QuantisedWeight):
            quantised = space.hidden_rows(len(residual), self.o_proj)
            ops.quantise_(attended.flatten(1), quantised.values, quantised.scales)
            taken = quantised
        linear(taken, self.o_proj, out=residual, accumulate=True)
        normed = self._normed(residual, self.post_norm, self.gate_up_proj, space)
        for some, stream in zip(normed.split(space.mlp_rows), residual.split(space.mlp_rows)):
            gate_up = linear(some, self.gate_up_proj, out=space.gate_up[: len(some)])
            activated = self._activated(gate_up, space)
            linear(activated, self.down_proj, out=stream, accumulate=True)

    def _activated(self, gate_up: Tensor, space: Workspace) -> Tensor | QuantisedRows:
        """SwiGLU, as the last product takes it."""
        if isinstance(self.down_proj, QuantisedWeight):
            inner = space.inner_rows(len(gate_up), self.down_proj)
            ops.swiglu_quantise_(gate_up, inner.values, inner.scales)
            return inner
        return ops.swiglu(gate_up, out=gate_up[:, : gate_up.shape[1] // 2])


def _in_form_of_products(weight: Weight) -> bool:
    return isinstance(weight, QuantisedWeight) and weight.form in PRODUCTS.values()


class Expander:
    """Expands layers with quantised weights, one after the other, into one layer for products.

    On the computation's own stream, so that a layer is expanded after the products of the one
    before; that is recorded with a step that is captured.
    """

    def __init__(self, layer: Block) -> None:
        self.layer = layer

    def __call__(self, stored: Block) -> Block:
        """The layer as products take it, valid until the next call."""
        for name in layer_shapes(stored.config):
            weight, out = getattr(stored, name), getattr(self.layer, name)
            if isinstance(weight, QuantisedWeight) and isinstance(out, Tensor):
                weight.dequantise(out.data)
            else:  # a ring may soon write over it
                for one, other in zip(
                    parts_of_weight(weight).values(), parts_of_weight(out).values()
                ):
                    other.data.copy_(one.data)
        return self.layer


class Transformer(nn.Module):
    """OmniGen's transformer over given weights; see `parameter_shapes` for their names.

    Args:
        config: sizes.
        weights: all on one device, and the plain ones of one floating dtype; but `pos_embed` may
            stay on the host: only the part that a picture's size needs is read.
    """

    embed_tokens: Tensor  # [vocabulary, hidden]
    noise_proj_weight: Tensor  # [hidden, 4, 2, 2]
    noise_proj_bias: Tensor
    image_proj_weight: Tensor  # [hidden, 4, 2, 2]
    image_proj_bias: Tensor
    norm: Tensor  # [hidden]
    modulation_weight: Weight
    modulation_bias: Tensor
    output_weight: Weight
    output_bias: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self.config = config
        table = weights["pos_embed"]
        assert isinstance(table, Tensor)
        self.pos_embed = table.view(
            config.pos_embed_size, config.pos_embed_size, config.hidden_size
        )
        self._pos_embed_crops: dict[tuple[int, int], Tensor] = {}
        per_layer: list[dict[str, Weight]] = [{} for _ in range(config.num_layers)]
        for name, value in weights.items():
            head, _, tail = name.partition(".")
            if head == "layers":
                layer, _, tail = tail.partition(".")
                per_layer[int(layer)][tail] = value
            elif name != "pos_embed":
                self.set_parameter(name, value)
        self.layers = nn.ModuleList(Block(values, config) for values in per_layer)
        self.stream: Streamed[Block] | None = None  # where layers come from that have no storage
        factors = torch.tensor([config.short_factor, config.long_factor], dtype=torch.float32)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        # [2, head_dim / 2]: short, long
        self._inverse_frequencies = 1 / (factors * config.rope_theta**exponents)

    def set_parameter(self, name: str, value: Weight) -> None:
        """Replaces the weight called `name` in `parameter_shapes`, other than `pos_embed`."""
        if name.startswith("layers."):
            _, layer, tail = name.split(".")
            self.block(int(layer)).set(tail, value)
        else:
            assert isinstance(value, Tensor)
            plain = nn.Parameter(value, requires_grad=False)
            self.register_parameter(name.replace(".", "_"), plain)

    def parameter(self, name: str) -> Any:
        """That weight: a parameter, or a `QuantisedWeight`."""
        if name.startswith("layers."):
            _, layer, tail = name.split(".")
            return getattr(self.layers[int(layer)], tail)
        return getattr(self, name.replace(".", "_"))

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        # `.to()`, `.half()`, `.cuda()`: caches, streamed layers and captures would not follow
        raise RequestError(
            "the transformer can't be moved or converted by itself; use pipe.to(device, dtype)"
        )

    def fingerprint(self) -> tuple[tuple[tuple[int, int], ...], Tensor]:
        """Differs, all but surely, after somebody has written to a weight that has storage.

        Address and version of each, which tell of replaced tensors and of writes that PyTorch
        sees; and the bits of a few of its values, for writes through `.data` that it does not see.
        """
        held = [one for one in self.parameters() if not one.is_meta]
        samples = [one.view(-1)[:: max(1, one.numel() // _SAMPLES)] for one in held]
        # dtypes together: quantised weights have several
        by_dtype: dict[torch.dtype, list[Tensor]] = {self.dtype: [self.norm.new_empty(0)]}
        for one in samples:
            by_dtype.setdefault(one.dtype, []).append(one)
        bits = [torch.cat(some).view(torch.uint8) for some in by_dtype.values()]
        joined = bits[0] if len(bits) == 1 else torch.cat(bits)
        return tuple((one.data_ptr(), one._version) for one in held), joined

    def move(self, device: torch.device | str) -> None:
        """Moves what has storage; layers that are streamed have none."""
        self.forget_crops()
        for module in self.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if not value.is_meta:
                    moved = nn.Parameter(value.data.to(device), requires_grad=False)
                    module.register_parameter(name, moved)

    def crops(self) -> list[Tensor]:
        """The crops of the position table that are kept between calls."""
        return list(self._pos_embed_crops.values())

    def forget_crops(self) -> None:
        """Frees them."""
        self._pos_embed_crops.clear()

    def expand(self) -> None:
        """Has quantised layers, all of which are on the device, expanded when they are taken."""
        if self.block(0).expands:
            resident = {layer: self.block(layer) for layer in range(len(self.layers))}
            expander = Expander(self.block(0).for_products(self.norm))
            self.stream = Streamed(None, (), resident, expander)

    def block(self, layer: int) -> Block:
        """A layer, wherever its weights are."""
        block = self.layers[layer]
        assert isinstance(block, Block)
        return block

    def _take(self, layer: int) -> Block:
        """A layer to compute with until `_release`."""
        return self.block(layer) if self.stream is None else self.stream.take(layer)

    def _release(self, layer: int) -> None:
        if self.stream is not None:
            self.stream.release(layer)

    def embed_times(self, times: Tensor) -> TimeEmbeddings:
        """Embeds the times of all steps, [steps] in [0, 1], float32.

        The sinusoid has its cosines first, frequencies 10000^(-i / half) for half its width; an odd
        width ends in a zero.
        """
        half = self.config.time_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
        angles = times[:, None] * torch.exp(-math.log(10000) * exponents)
        parts = [angles.cos(), angles.sin()]
        if self.config.time_frequencies % 2:
            parts.append(torch.zeros_like(times)[:, None])
        waves = torch.cat(parts, dim=-1).to(self.dtype)

        def mlp(name: str) -> Tensor:
            first, second = (
                (self.parameter(f"{name}.{i}.weight"), self.parameter(f"{name}.{i}.bias"))
                for i in range(2)
            )
            hidden = linear(waves, first[0], bias=first[1])
            return linear(F.silu(hidden), second[0], bias=second[1])

        modulation = linear(
            F.silu(mlp("time_embed")), self.modulation_weight, bias=self.modulation_bias
        )
        shift, scale = modulation.chunk(2, dim=-1)
        return TimeEmbeddings(mlp("time_token"), shift, scale)

    def rotary(self, positions: Tensor, long: bool) -> tuple[Tensor, Tensor]:
        """cos and sin, [rows, head_dim / 2] float32, of positions [rows] under LongRoPE.

        Frequencies `1 / (factor_i * theta^(2i / head_dim))`, both results multiplied by
        `config.rope_scale` (Ding et al., 2024); `long` chooses the factor.
        """
        frequencies = self._inverse_frequencies[int(long)].to(positions.device)
        angles = positions.to(torch.float32).unsqueeze(1) * frequencies
        return angles.cos() * self.config.rope_scale, angles.sin() * self.config.rope_scale

    def workspace(self, rows: int, mlp_rows: int = MLP_ROWS) -> Workspace:
        """Memory for passes of at most so many rows."""
        return Workspace(self.config, rows, mlp_rows, self.norm, self.block(0))

    def embed_condition(
        self,
        sequence: ConditionSequence,
        image_latents: Mapping[str, Tensor],
        time_tokens: Tensor,
        out: Tensor | None = None,  # [rows, hidden]
    ) -> Tensor:  # [rows, hidden]
        """Embeddings of a branch's sequence.

        Args:
            sequence: the branch, with as many time tokens as are given.
            image_latents: [4, height / 8, width / 8] of each image, by its digest.
            time_tokens: [steps, hidden].
            out: written and returned where it is given.
        """
        embedded = torch.index_select(self.embed_tokens, 0, sequence.token_ids, out=out)
        shared = sequence.shared
        for first, stop, image in sequence.branch.spans:
            if first >= shared:
                rows = embedded[first - shared : stop - shared]
                self._embed_image(image_latents[image.digest], out=rows)
        embedded[sequence.branch.length - shared :] = time_tokens
        return embedded

    def prefill_states(
        self,
        sequences: Sequence[ConditionSequence],
        mlp_rows: int = MLP_ROWS,
    ) -> list[PrefillState]:
        """Memory and rotary tables for some branches; their residuals are still to be embedded.

        Args:
            sequences: the branches; one with shared tokens directly follows the one that has them.
            mlp_rows: see `Workspace`.
        """
        space = self.workspace(max(len(one.kv_end) for one in sequences), mlp_rows)
        states = []
        for one in sequences:
            cos, sin = self.rotary(one.positions, one.branch.long)
            residual = self.norm.new_empty(len(one.token_ids), self.config.hidden_size)
            states.append(PrefillState(one, cos, sin, residual, space))
        return states

    def prefill(
        self,
        sequences: Sequence[ConditionSequence],
        image_latents: Mapping[str, Tensor],
        time_tokens: Tensor,
        cache: Cache,
        mlp_rows: int = MLP_ROWS,
    ) -> None:
        """Runs condition and time tokens and writes their keys and values into the cache.

        Layer by layer, so that the weights are passed over once.

        Args:
            sequences: the branches; one with shared tokens directly follows the one that has them.
            image_latents: see `embed_condition`.
            time_tokens: likewise.
            cache: rows for the branches reserved.
            mlp_rows: see `Workspace`.
        """
        states = self.prefill_states(sequences, mlp_rows)
        for state in states:
            self.embed_condition(state.sequence, image_latents, time_tokens, out=state.residual)
        for layer in range(len(self.layers)):
            block, (keys, values) = self._take(layer), cache.take(layer)
            self._prefill_layer(layer, block, states, keys, values)
            cache.release(layer)
            self._release(layer)

    def step(
        self,
        latents: Tensor,
        pos_embed: Tensor,
        passes: Sequence[StepGroups],
        times: TimeEmbeddings,
        cache: Cache,
    ) -> list[Tensor]:
        """Velocity of every group's noise tokens.

        All passes run in a layer before the next layer's begin: the weights are passed over once,
        however few groups a pass has.

        Args:
            latents: [pictures, 4, height / 8, width / 8], float32.
            pos_embed: [N, hidden], see `crop_pos_embed`.
            passes: what to run.
            times: of all steps; each group names its own.
            cache: filled, this step's time tokens selected.

        Returns:
            Of each pass [groups, N, 16]: (row, column, channel) of each token's patch. The next
            step writes them again.
        """
        self._embed_noise(latents, pos_embed, passes)
        for layer in range(len(self.layers)):
            block, (keys, values) = self._take(layer), cache.take(layer)
            self._step_layer(block, passes, keys, values)
            cache.release(layer)
            self._release(layer)
        return self._predict(passes, times)

    def step_recomputed(
        self,
        latents: Tensor,
        pos_embed: Tensor,
        passes: Sequence[StepGroups],
        times: TimeEmbeddings,
        states: Sequence[PrefillState],
        select: Callable[[], None],
        cache: Cache,
    ) -> list[Tensor]:
        """As `prefill` and `step` at once, keeping the keys and values of one layer at a time.

        Args:
            latents: as in `step`.
            pos_embed: likewise.
            passes: likewise.
            times: likewise.
            states: the branches of the groups, with this step's time token only; overwritten.
            select: puts the time tokens beside their conditions, see `Cache.select_step`.
            cache: of one layer, which every layer overwrites.

        Returns:
            As `step`.
        """
        self._embed_noise(latents, pos_embed, passes)
        for layer in range(len(self.layers)):
            block, (keys, values) = self._take(layer), cache.take(layer)
            self._prefill_layer(layer, block, states, keys, values)
            select()
            self._step_layer(block, passes, keys, values)
            self._release(layer)
        return self._predict(passes, times)

    def _prefill_layer(
        self,
        layer: int,
        block: Block,
        states: Sequence[PrefillState],
        keys: Tensor,
        values: Tensor,
    ) -> None:
        config = self.config
        for state in states:
            one, space = state.sequence, state.space
            # after the rows that the branch before has computed for this one too
            qkv = block.project(state.residual, space, one.shared)
            rotary = state.cos, state.sin, config.num_heads, config.num_kv_heads
            if keys.is_floating_point():
                ops.rope_cache_(qkv, *rotary, keys, values, one.cache_rows)
            else:
                ops.rope_(qkv, *rotary)
                ops.quantise_cache_(*self._split(qkv)[1:], keys, values, one.cache_rows)
            if layer == len(self.layers) - 1:
                continue  # nothing reads the condition after its last keys and values
            rows = len(one.kv_end)
            attended = ops.attention_prefill(
                *self._split(space.qkv[:rows]),
                one.cu_rows,
                one.kv_end,
                rows,
                one.shared,
                out=block.attended(space, rows),
            )
            block.finish(state.residual, attended[one.shared :], space)

    def _step_layer(
        self, block: Block, passes: Sequence[StepGroups], keys: Tensor, values: Tensor
    ) -> None:
        config = self.config
        is_plain = keys.is_floating_point()
        attend = ops.attention_step if is_plain else ops.attention_step_8bit
        for groups in passes:
            residual, space = groups.residual, groups.space
            qkv = block.project(residual, space)
            rotary = groups.cos, groups.sin
            left = ops.attention_rotates()
            ops.rope_(qkv, *rotary, config.num_heads, config.num_kv_heads, keys_only=left)
            q, k, v = self._split(qkv)
            cu_keys = None
            if groups.exchange is not None:
                both = qkv.unflatten(1, (-1, config.head_dim))[:, config.num_heads :]
                k, v = groups.exchange(both).chunk(2, dim=1)
                cu_keys = groups.exchange.cu_keys
            more: dict[str, Any] = {"cos": groups.cos, "sin": groups.sin} if left else {}
            if is_plain:
                more["spans"] = groups.spans
            attended = attend(
                q,
                k,
                v,
                keys,
                values,
                groups.cu_rows,
                groups.cache_start,
                groups.cache_len,
                groups.max_rows,
                cu_keys,
                **more,
                out=block.attended(space, len(residual)),
            )
            block.finish(residual, attended, space)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [rows, heads, head_dim] views of the fused product."""
        config = self.config
        by_head = qkv.unflatten(1, (-1, config.head_dim))
        q, k, v = by_head.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        return q, k, v

    def _embed_noise(
        self, latents: Tensor, pos_embed: Tensor, passes: Sequence[StepGroups]
    ) -> None:
        """Fills the residual streams with the noise tokens of the groups' pictures.

        In the workspace, which no layer uses yet; a picture's tokens are made once for all groups.
        """
        space, noise = passes[0].space, passes[0].noise
        if noise is None:
            pictures: Sequence[int] = range(len(latents))
            found = patches_of(latents)
            rows = len(pictures) * found.shape[1:3].numel()
            patches = space.qkv[:rows, :PATCH_VALUES]
            patches.view(found.shape).copy_(found)
        else:
            pictures, rows = noise.pictures, noise.places.shape[:2].numel()
            torch.take(latents, noise.places, out=noise.values)
            patches = space.qkv[:rows, :PATCH_VALUES]
            patches.copy_(noise.values.flatten(0, 1))
            pos_embed = pos_embed[noise.first : noise.first + noise.places.shape[1]]
        weight = self.noise_proj_weight.flatten(1)
        tokens = linear(patches, weight, out=space.normed[:rows], bias=self.noise_proj_bias)
        of_picture = dict(zip(pictures, tokens.unflatten(0, (len(pictures), -1))))
        for groups in passes:
            residuals = groups.residual.unflatten(0, (len(groups.pictures), -1))
            for picture, residual in zip(groups.pictures, residuals):
                torch.add(of_picture[picture], pos_embed, out=residual)

    def _embed_image(self, latents: Tensor, out: Tensor) -> None:
        """Embeds latents [4, height, width] of an image, positions added; `out` [N, hidden].

        The 2 x 2 convolution of stride 2, as a product over (channel, row, column).
        """
        height, width = latents.shape[1] // PATCH, latents.shape[2] // PATCH
        patches = latents.to(self.dtype).unflatten(2, (width, PATCH)).unflatten(1, (height, PATCH))
        patches = patches.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        linear(patches, self.image_proj_weight.flatten(1), out=out, bias=self.image_proj_bias)
        out.add_(self.crop_pos_embed(height, width))

    def crop_pos_embed(self, height: int, width: int) -> Tensor:
        """[height * width, hidden]: the centre of the position table."""
        crop = self._pos_embed_crops.get((height, width))
        if crop is None:
            if len(self._pos_embed_crops) >= _KEPT_CROPS:
                self._pos_embed_crops.clear()
            top, left = ((self.config.pos_embed_size - side) // 2 for side in (height, width))
            crop = self.pos_embed[top : top + height, left : left + width].flatten(0, 1)
            crop = crop.to(self.device, self.dtype)
            self._pos_embed_crops[height, width] = crop
        return crop

    def _predict(self, passes: Sequence[StepGroups], times: TimeEmbeddings) -> list[Tensor]:
        """The output layer: final RMSNorm, modulated LayerNorm, product; [groups, N, 16] each."""
        for groups in passes:
            normed = ops.rms_norm(
                groups.residual,
                self.norm,
                self.config.rms_norm_eps,
                out=groups.space.normed[: len(groups.residual)],
            )
            modulated = ops.modulate(
                normed, times.shift, times.scale, groups.step, _OUTPUT_NORM_EPS, out=normed
            )
            linear(modulated, self.output_weight, out=groups.values, bias=self.output_bias)
        return [groups.values.unflatten(0, (len(groups.pictures), -1)) for groups in passes]
