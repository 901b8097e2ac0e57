"""Bytes that a request takes under a plan, phase by phase, as terms for printing.

These are the tensors that the runtime allocates, in its order (a test compares them with a run on
meta tensors), plus the device's context and the workspace of the autoencoder's convolutions. A
device that computes in the host's memory streams weights from the mapped checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache

from ..config import LATENT_CHANNELS, VAE_SCALE, ModelConfig
from ..config import tokens as tokens_of
from ..forms import COMPUTED
from ..kernels import winners
from ..parameters import (
    PATCH_VALUES,
    buffer_bytes,
    layer_parts,
    parameter_shapes,
    stored_bytes,
)
from ..precision import AUTO, LIBRARIES, Precision
from ..profiles import Profile
from ..schedule import ALL_BRANCHES, StepKind
from ..solvers import MULTISTEP
from .autoencoder import VaeShape, decode_bytes, encode_bytes, weight_bytes
from .plan import RING, MemoryPlan, Workload
from .terms import Term

_FLOAT = 4  # bytes
_INDEX_BYTES = 28  # of a prefill row: token, position and cache row (int64), last key (int32)
# A whole decode reserved about 1.5 times what it allocated; the rest is the workspace of
# convolutions and what the allocator can't return in time.
_WORKSPACE_SHARE = 0.5

_decode_bytes, _encode_bytes = lru_cache(256)(decode_bytes), lru_cache(256)(encode_bytes)
_vae_weights = lru_cache(weight_bytes)


class ByteEstimate:
    """Bytes of one request on one device under any plan; shared parts are computed once."""

    def __init__(
        self,
        config: ModelConfig,
        vae: VaeShape,
        precision: Precision,
        workload: Workload,
        profile: Profile,
    ) -> None:
        self.config = config
        self.vae = vae
        self.precision = precision
        self.workload = workload
        self.profile = profile
        self.on_host = profile.on_host
        self.unit = config.hidden_size * precision.arithmetic_bytes  # one token's hidden state
        # one token's keys and values in one layer
        self.pair = precision.pair_bytes(config.num_kv_heads, config.head_dim)

    # Sizes

    @cached_property
    def layer_bytes(self) -> int:
        """Of a resident layer."""
        return stored_bytes(layer_parts(self.config, self.precision))

    @cached_property
    def slot_bytes(self) -> int:
        """Of a streamed layer's buffer, in which each tensor is aligned."""
        return buffer_bytes(layer_parts(self.config, self.precision))

    @cached_property
    def expanded_bytes(self) -> int:
        """Of the layer that quantised ones are expanded into; 0 where they are not."""
        if not self.precision.expands:
            return 0
        return stored_bytes(layer_parts(self.config, self.precision.expanded))

    @cached_property
    def other_bytes(self) -> int:
        """Weights other than the layers. The position table is always on the host."""
        elements = sum(
            math.prod(shape)
            for name, shape in parameter_shapes(self.config).items()
            if not name.startswith("layers.") and (self.on_host or name != "pos_embed")
        )
        return elements * self.precision.arithmetic_bytes

    @cached_property
    def vae_bytes(self) -> int:
        return _vae_weights(self.vae)

    @cached_property
    def groups(self) -> int:
        """(picture, branch) pairs."""
        return sum(map(len, self.workload.branches))

    @cached_property
    def branch_rows(self) -> list[tuple[int, int]]:
        """(rows that prefill computes, rows of keys) of every branch, without time tokens."""
        found = []
        for condition in self.workload.conditions:
            for place, tokens in enumerate(condition.tokens):
                found.append((tokens - (condition.shared if place else 0), tokens))
        return found

    def passes(
        self, branches_per_pass: int | None, kind: StepKind = ALL_BRANCHES
    ) -> list[list[int]]:
        """Condition tokens of the groups of each pass."""
        branches = self.workload.branches_of(kind)
        most = max(map(len, branches))
        size = min(branches_per_pass or most, most)
        return [
            [tokens for one in branches for tokens in one[first : first + size]]
            for first in range(0, most, size)
        ]

    def cache_rows(self, plan: MemoryPlan) -> int:
        """Rows of keys and values of this request."""
        if plan.cache == "none":
            return sum(tokens + 2 for _, tokens in self.branch_rows)
        return self.workload.cache_rows()

    def row_bytes(self, plan: MemoryPlan) -> int:
        """Of one row's keys and values, in all layers that the cache holds."""
        layers = 1 if plan.cache == "none" else self.config.num_layers
        return layers * self.pair

    # Bytes

    def encode(self, plan: MemoryPlan) -> Iterator[Term]:
        if not self.workload.images:
            return
        yield from self.held(plan)
        yield from self.rings(plan)
        yield from self.captured(plan)
        yield self.times()
        yield from self.moved_vae(plan)
        maps, work = self.encode_maps(plan)
        yield Term("encode", maps, self._strips(plan) + ", one input image at a time")
        yield Term("VAE workspace", work, "of convolutions and the allocator, half of the above")

    def prefill(self, plan: MemoryPlan) -> Iterator[Term]:
        if plan.cache == "none":
            return
        yield from self.held(plan)
        yield from self.rings(plan)
        yield from self.captured(plan)
        yield self.times()
        yield from self._prefill(self.workload.evaluations, plan.mlp_rows, share=True)

    def denoise(self, plan: MemoryPlan) -> Iterator[Term]:
        yield from self.held(plan)
        yield from self.rings(plan)
        yield self.times()
        if plan.cache == "none":
            yield from self._prefill(1, plan.mlp_rows, share=False)
        why = "a pass's workspace; of all groups residual stream and rotary"
        yield Term("loop", self.loop_bytes(plan), why)

    def decode(self, plan: MemoryPlan) -> Iterator[Term]:
        yield from self.held(plan)
        yield from self.captured(plan)
        yield from self.moved_vae(plan)
        maps, work = self.decode_maps(plan)
        yield Term("decode", maps, self._strips(plan) + ", one picture at a time")
        yield Term("VAE workspace", work, "of convolutions and the allocator, half of the above")

    def held(self, plan: MemoryPlan) -> Iterator[Term]:
        """What is there in every phase; a cache of one layer is not."""
        work, layers = self.workload, self.config.num_layers
        yield Term("context", self.context_bytes, "driver and libraries")
        resident = f"{plan.resident_layers} of {layers} on the device"
        if self.precision.compute is not None:
            resident += f", in {self.precision.compute} for products"
        elif self.precision.quantised:
            resident += f", in {self.precision.storage}"
        yield Term("layers", plan.resident_layers * self.layer_bytes, resident)
        if self.expanded_bytes and plan.resident_layers == layers:
            yield self._expanded()
        yield Term(
            "other weights",
            self.other_bytes,
            "token embeddings, time, modulation, output" + ", positions" * self.on_host,
        )
        if plan.vae_resident:
            yield Term("VAE", self.vae_bytes, f"in {self.vae.dtype}, on the device")
        if plan.cache == "device":
            yield Term("cache", self.arena_bytes(plan), self._cache_why(plan))
        elif plan.cache == "ring" and self.on_host:
            host = self.row_bytes(plan) * max(
                plan.kept_bytes // self.row_bytes(plan), self.cache_rows(plan)
            )
            yield Term("cache", host, "on the host, whose memory this is")
        sizes = {(work.height, work.width), *work.images}
        places = sum(tokens_of(*one) for one in sizes)
        why = f"crops of the table for {len(sizes)} image size{'s' * (len(sizes) > 1)}"
        yield Term("positions", places * self.unit, why)
        yield Term("latents", self.latent_bytes, "of input images, and two copies of the pictures'")

    def rings(self, plan: MemoryPlan) -> Iterator[Term]:
        """What is freed before the decode."""
        slots = min(RING, self.config.num_layers - plan.resident_layers)
        if slots:
            yield Term("ring of layers", slots * self.slot_bytes, f"{slots} streamed layers")
            if self.expanded_bytes:
                yield self._expanded()
        if plan.cache == "ring":
            rows = self.cache_rows(plan)
            yield Term("ring of caches", RING * rows * self.pair, f"{RING} layers of {rows} rows")
        elif plan.cache == "none":
            rows = self.cache_rows(plan)
            yield Term(
                "cache", rows * self.pair, f"one layer of {rows} rows, recomputed in every step"
            )

    def captured(self, plan: MemoryPlan) -> Iterator[Term]:
        """What a CUDA graph holds outside the loop."""
        if plan.capture:
            yield Term(
                "captured step", self.loop_bytes(plan), "a loop's tensors, kept for later calls"
            )

    def moved_vae(self, plan: MemoryPlan) -> Iterator[Term]:
        if not plan.vae_resident:
            why = f"in {self.vae.dtype}, on the device for this phase"
            yield Term("VAE", self.vae_bytes, why)

    def _expanded(self) -> Term:
        why = f"the one that is computed with, in {self.precision.arithmetic}"
        return Term("expanded layer", self.expanded_bytes, why)

    def times(self) -> Term:
        size = 3 * self.workload.evaluations * self.unit
        return Term("times", size, "embeddings and modulation of all steps")

    @property
    def context_bytes(self) -> int:
        return round(self.profile.context_bytes)

    @cached_property
    def state_bytes(self) -> int:
        """What solver, reuse and edit keep beside the pictures' latents."""
        work, schedule = self.workload, self.workload.schedule
        copies = 3 * (not schedule.plain) + (schedule.solver in MULTISTEP)  # the call has it too
        copies += 2 * (schedule.order + 1) * schedule.extrapolates  # likewise
        pixels = (copies * len(work.branches) + work.kept_latents) * work.height * work.width
        return LATENT_CHANNELS * _FLOAT * pixels // VAE_SCALE**2

    @cached_property
    def latent_bytes(self) -> int:
        work = self.workload
        pixels = sum(height * width for height, width in work.images)
        pixels += 2 * len(work.branches) * work.height * work.width
        return LATENT_CHANNELS * _FLOAT * pixels // VAE_SCALE**2

    def arena_bytes(self, plan: MemoryPlan) -> int:
        """Keys and values of this request, or the room for earlier ones if that is more."""
        row = self.row_bytes(plan)
        return row * max(plan.kept_bytes // row, self.cache_rows(plan))

    def spare_bytes(self, plan: MemoryPlan) -> int:
        """Of the cache on the device: what this request does not need."""
        if plan.cache != "device":
            return 0
        return self.arena_bytes(plan) - self.row_bytes(plan) * self.cache_rows(plan)

    def loop_bytes(self, plan: MemoryPlan) -> int:
        """What every step reuses."""
        noise, value = self.workload.noise_tokens, self.precision.arithmetic_bytes
        # cosines and sines of half a head each, of every kind of step
        rotary, longest, rows, several = 0, 0, 0, 0
        for kind in self.workload.schedule.counts:
            if kind.computed:
                passes = self.passes(plan.branches_per_pass, kind)
                groups = sum(map(len, passes))
                rotary += groups * noise * self.config.head_dim * _FLOAT
                longest = max(longest, max(map(len, passes)) * noise)
                rows = max(rows, groups * noise)
                several |= len(passes) > 1
        # the velocities, and once more where those of several passes meet
        streams = rows * (self.unit + PATCH_VALUES * value * (1 + several)) + rotary
        space = self.workspace_bytes(longest, plan.mlp_rows) + self.library_bytes(longest)
        return space + streams + self.state_bytes

    def library_bytes(self, rows: int) -> int:
        """What a library's attention of a pass takes: two outputs and their log-sum-exps."""
        if not self.by_library:
            return 0
        return 2 * rows * (self.unit + self.config.num_heads * _FLOAT)

    @cached_property
    def by_library(self) -> bool:
        """Whether a library computes a step's attention, or might if that is left to the card."""
        name = self.precision.attention
        if name == AUTO:
            cards = self.profile.device_names
            found = {winners.winner(one, self.config.head_dim) for one in cards}
            return bool(found & {*LIBRARIES}) and self.precision.quantised_cache is None
        return name in LIBRARIES

    def workspace_bytes(self, rows: int, mlp_rows: int) -> int:
        """As `model.Workspace`."""
        width = self.config.qkv_width + self.config.hidden_size
        gate_up = 2 * self.config.intermediate_size * min(rows, mlp_rows)
        size = (rows * width + gate_up) * self.precision.arithmetic_bytes
        compute = self.precision.compute
        if compute is not None:  # what products in 8 bits take, and a scale for each of its rows
            size += 2 * _FLOAT * rows
            names = COMPUTED[compute]
            size += rows * self.config.hidden_size * bool({*names} - {"down_proj"})
            size += gate_up // 2 * ("down_proj" in names)
        return size

    def host_bytes(self, plan: MemoryPlan) -> int:
        """What a plan holds on the host of a GPU, most of it page-locked; without the process."""
        positions = math.prod(parameter_shapes(self.config)["pos_embed"])
        size = positions * self.precision.arithmetic_bytes
        size += (self.config.num_layers - plan.resident_layers) * self.slot_bytes
        size += self.vae_bytes * (not plan.vae_resident)
        if plan.cache == "ring":
            size += self.row_bytes(plan) * self.cache_rows(plan)
        if plan.strips_on_host:
            work, rows = self.workload, plan.strip_rows
            size += max(
                of(self.vae, *image, rows, host_store=False)
                - of(self.vae, *image, rows, host_store=True)
                for of, images in (
                    (_encode_bytes, work.images),
                    (_decode_bytes, [(work.height, work.width)]),
                )
                for image in images
            )
        return size

    def encode_maps(self, plan: MemoryPlan) -> tuple[int, int]:
        """Bytes of the largest image's activations, and of workspace."""
        return max(
            (self._maps(_encode_bytes, plan, *image) for image in self.workload.images),
            default=(0, 0),
            key=sum,
        )

    def decode_maps(self, plan: MemoryPlan) -> tuple[int, int]:
        """Bytes of a picture's activations and all decoded pictures, and of workspace."""
        work = self.workload
        maps, space = self._maps(_decode_bytes, plan, work.height, work.width)
        others = len(work.branches) - 1
        return maps + others * 3 * _FLOAT * work.height * work.width, space

    def _maps(
        self, of: Callable[..., int], plan: MemoryPlan, height: int, width: int
    ) -> tuple[int, int]:
        host = plan.strips_on_host and not self.on_host
        maps = of(self.vae, height, width, plan.strip_rows, host_store=host)
        at_once = maps
        if plan.strip_rows is not None:  # activations kept between strips need no workspace
            at_once = of(self.vae, height, width, plan.strip_rows, host_store=True)
        return maps, round(_WORKSPACE_SHARE * at_once)

    def _prefill(self, steps: int, mlp_rows: int, share: bool) -> Iterator[Term]:
        own = [(rows if share else tokens) + steps for rows, tokens in self.branch_rows]
        longest = max(tokens for _, tokens in self.branch_rows) + steps
        row = self.unit + self.config.head_dim * _FLOAT + _INDEX_BYTES
        why = f"{sum(own)} rows of all branches: residual stream and rotary"
        yield Term("condition", sum(own) * row, why)
        why = f"for the {longest} rows of the longest branch"
        yield Term("prefill workspace", self.workspace_bytes(longest, mlp_rows), why)

    def _strips(self, plan: MemoryPlan) -> str:
        if plan.strip_rows is None:
            return "activations of the whole image"
        place = ", kept on the host" if plan.strips_on_host else ""
        return f"activations in strips of {plan.strip_rows} rows of latents{place}"

    def _cache_why(self, plan: MemoryPlan) -> str:
        needed = self.cache_rows(plan)
        kept = self.arena_bytes(plan) // self.row_bytes(plan) - needed
        more = f" and {kept} for earlier requests" if kept else ""
        form = self.precision.quantised_cache
        kept_in = f", in {form}" if form else ""
        return f"keys and values of {needed} rows, all layers{more}{kept_in}"
