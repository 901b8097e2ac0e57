"""What a request costs under a plan: bytes phase by phase as terms, seconds by roofline.

Bytes are those of the tensors that the runtime makes, in the order in which it makes them (on meta
tensors it can be watched doing so), with two things on top: the device's context, and the work
space of the autoencoder's convolutions. Seconds take the rates that a profile says are attained;
they are predictions. A profile without a CUDA capability is a CPU's: there the device's memory is
the host's, and weights are streamed from the mapped checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..config import LATENT_CHANNELS, PATCH, TIME_FREQUENCIES, TOKEN_PIXELS, VAE_SCALE, ModelConfig
from ..profiles import Profile
from ..vae_cost import (
    Layer,
    VaeShape,
    decode_bytes,
    decode_flops,
    decoder_layers,
    encode_bytes,
    encode_flops,
    encoder_layers,
    weight_bytes,
)
from .plan import RING, MemoryPlan, Workload
from .terms import Duration, Term, total_bytes, total_seconds

_FLOAT = 4  # bytes
_PATCH_VALUES = LATENT_CHANNELS * PATCH * PATCH
_ALIGNED = 256  # bytes, where a parameter begins in a streamed layer's buffer
_INDEX_BYTES = 28  # of a prefill row: token, position and cache row (int64), last key (int32)
# A whole decode was seen to reserve about 1.5 times what it allocates; the rest is the work space
# of convolutions and what the allocator can't give back in time.
_WORKSPACE_SHARE = 0.5
# Typical of CUDA, not measured: between two kernels of a graph, between two launched one by one,
# and what the host needs to launch one.
_GAP_CAPTURED, _GAP_EAGER, _LAUNCH = 1e-6, 2e-6, 15e-6
# Reads and writes of each value that a VAE layer makes: two norms, activations, the sum.
_VAE_MOVES = 10

_decode_bytes, _encode_bytes = lru_cache(256)(decode_bytes), lru_cache(256)(encode_bytes)
_decode_flops, _encode_flops = lru_cache(256)(decode_flops), lru_cache(256)(encode_flops)
_vae_weights = lru_cache(weight_bytes)


@dataclass(frozen=True)
class Cost:
    """Bytes of each phase, and where the seconds go."""

    encode: tuple[Term, ...]  # none without input images
    prefill: tuple[Term, ...]  # none where the condition is recomputed
    denoise: tuple[Term, ...]
    decode: tuple[Term, ...]
    durations: tuple[Duration, ...]

    @property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """Terms of the phases that the request has, in their order."""
        names = ("encode", "prefill", "denoise", "decode")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: total_bytes(self.phases[name]))

    @property
    def peak_bytes(self) -> int:
        return max(map(total_bytes, self.phases.values()))

    @property
    def seconds(self) -> float:
        return total_seconds(self.durations)


def cost(
    config: ModelConfig,
    vae: VaeShape,
    dtype_bytes: int,
    workload: Workload,
    plan: MemoryPlan,
    profile: Profile,
    current: MemoryPlan | None = None,
) -> Cost:
    """Cost of a request of which nothing is kept from earlier ones.

    Args:
        config: sizes of the transformer.
        vae: those of the autoencoder, which is always float32.
        dtype_bytes: of a value of the transformer: 2 for bfloat16, 4 for float32.
        workload: sizes of the request.
        plan: how it is carried out.
        profile: of the device.
        current: the plan by which weights lie now; None where they lie as `plan` wants them.
    """
    return Estimate(config, vae, dtype_bytes, workload, profile).cost(plan, current)


def step_flops(config: ModelConfig, workload: Workload) -> int:
    """Operations of one step with the condition's keys and values kept: products and attention."""
    groups = [tokens for picture in workload.branches for tokens in picture]
    products = product_flops(config, len(groups) * workload.noise_tokens)
    return config.num_layers * (products + attention_flops(config, groups, workload.noise_tokens))


def product_flops(config: ModelConfig, rows: int) -> int:
    """Of a layer's matrix products; a multiplication and an addition are two operations."""
    hidden = config.hidden_size
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return 2 * rows * hidden * (width + hidden + 3 * config.intermediate_size)


def attention_flops(config: ModelConfig, tokens: Sequence[int], noise_tokens: int) -> int:
    """Of a layer's attention in groups whose conditions have so many tokens."""
    keys = sum(one + 1 + noise_tokens for one in tokens)
    return 4 * noise_tokens * keys * config.num_heads * config.head_dim


@dataclass(frozen=True)
class Work:
    """Seconds of a pass through all layers, by what limits them."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launches: float = 0.0  # gaps between kernels, or what the host needs more than the device

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.elementwise + self.launches


class Estimate:
    """Costs of one request on one device under any plan; what plans share is computed once."""

    def __init__(
        self,
        config: ModelConfig,
        vae: VaeShape,
        dtype_bytes: int,
        workload: Workload,
        profile: Profile,
    ) -> None:
        self.config = config
        self.vae = vae
        self.size = dtype_bytes
        self.workload = workload
        self.profile = profile
        self.on_host = profile.capability is None
        self.unit = config.hidden_size * dtype_bytes  # one token's hidden state
        self.qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.key_width = config.num_kv_heads * config.head_dim
        most = dtype_bytes == 2
        self._product_rate = (
            profile.attained_product_flops_per_second if most else profile.fp32_flops_per_second
        )
        self._attention_rate = (
            profile.attained_attention_flops_per_second if most else profile.fp32_flops_per_second
        )
        self._bandwidth = profile.bandwidth_bytes_per_second * profile.attained_bandwidth_share
        self._work: dict[object, Work] = {}

    def cost(self, plan: MemoryPlan, current: MemoryPlan | None = None) -> Cost:
        """See `cost`."""
        return Cost(
            encode=tuple(self.encode(plan)),
            prefill=tuple(self.prefill(plan)),
            denoise=tuple(self.denoise(plan)),
            decode=tuple(self.decode(plan)),
            durations=tuple(self.durations(plan, current)),
        )

    # Sizes

    @cached_property
    def layer_elements(self) -> int:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        return (self.qkv_width + hidden) * hidden + 3 * hidden * inner + 2 * hidden

    @cached_property
    def layer_bytes(self) -> int:
        """Of a resident layer."""
        return self.layer_elements * self.size

    @cached_property
    def slot_bytes(self) -> int:
        """Of a streamed layer's buffer, in which each parameter is aligned."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        parts = (hidden, self.qkv_width * hidden, hidden * hidden, hidden)
        parts += (2 * inner * hidden, hidden * inner)
        return sum(-(-part * self.size // _ALIGNED) * _ALIGNED for part in parts)

    @cached_property
    def other_bytes(self) -> int:
        """Weights beside the layers, without the position table, which stays on the host."""
        hidden = self.config.hidden_size
        elements = self.config.vocab_size * hidden
        elements += 2 * (_PATCH_VALUES + 1) * hidden + hidden  # patches in, final norm
        elements += 2 * (TIME_FREQUENCIES + 1 + hidden + 1) * hidden  # the time's two embedders
        elements += 2 * (hidden + 1) * hidden + _PATCH_VALUES * (hidden + 1)  # modulation, output
        return elements * self.size

    @cached_property
    def vae_bytes(self) -> int:
        return _vae_weights(self.vae)

    @cached_property
    def groups(self) -> int:
        """(picture, branch) pairs."""
        return sum(map(len, self.workload.branches))

    @cached_property
    def branch_rows(self) -> list[tuple[int, int]]:
        """(rows that prefill computes, rows of keys) of every branch, time tokens left out."""
        found = []
        for condition in self.workload.conditions:
            for place, tokens in enumerate(condition.tokens):
                found.append((tokens - (condition.shared if place else 0), tokens))
        return found

    def passes(self, branches_per_pass: int | None) -> list[list[int]]:
        """Condition tokens of the groups of each pass."""
        most = max(map(len, self.workload.branches))
        size = min(branches_per_pass or most, most)
        return [
            [tokens for one in self.workload.branches for tokens in one[first : first + size]]
            for first in range(0, most, size)
        ]

    def cache_rows(self, plan: MemoryPlan) -> int:
        """Rows of keys and values of this request."""
        if plan.cache == "none":
            return sum(tokens + 2 for _, tokens in self.branch_rows)
        return self.workload.cache_rows()

    def row_bytes(self, plan: MemoryPlan) -> int:
        """Of one row's keys and values in all layers that are kept."""
        layers = 1 if plan.cache == "none" else self.config.num_layers
        return layers * 2 * self.key_width * self.size

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
        yield Term("encode", maps, self._strips(plan) + ", one input image after the other")
        yield Term("VAE work space", work, "of convolutions and the allocator, half of the above")

    def prefill(self, plan: MemoryPlan) -> Iterator[Term]:
        if plan.cache == "none":
            return
        yield from self.held(plan)
        yield from self.rings(plan)
        yield from self.captured(plan)
        yield self.times()
        yield from self._prefill(self.workload.steps, plan.mlp_rows, share=True)

    def denoise(self, plan: MemoryPlan) -> Iterator[Term]:
        yield from self.held(plan)
        yield from self.rings(plan)
        yield self.times()
        if plan.cache == "none":
            yield from self._prefill(1, plan.mlp_rows, share=False)
        loop = self.loop_bytes(plan)
        why = "a pass's workspace; of all groups residual stream, what is to be added, rotary"
        yield Term("loop", loop, why)
        if plan.capture:
            yield Term("captured step", loop, "the recording's own, once it serves another call")

    def decode(self, plan: MemoryPlan) -> Iterator[Term]:
        yield from self.held(plan)
        yield from self.captured(plan)
        yield from self.moved_vae(plan)
        maps, work = self.decode_maps(plan)
        yield Term("decode", maps, self._strips(plan) + ", one picture after the other")
        yield Term("VAE work space", work, "of convolutions and the allocator, half of the above")

    def held(self, plan: MemoryPlan) -> Iterator[Term]:
        """What is there in every phase, but for a condition that is not kept."""
        work, layers = self.workload, self.config.num_layers
        yield Term("context", self.context_bytes, "driver and libraries")
        resident = f"{plan.resident_layers} of {layers} on the device"
        yield Term("layers", plan.resident_layers * self.layer_bytes, resident)
        yield Term("other weights", self.other_bytes, "token embeddings, time, modulation, output")
        if plan.vae_resident:
            yield Term("VAE", self.vae_bytes, "in float32, on the device")
        if plan.cache == "device":
            yield Term("cache", self.arena_bytes(plan), self._cache_why(plan))
        elif plan.cache == "ring" and self.on_host:
            host = self.row_bytes(plan) * max(
                plan.kept_bytes // self.row_bytes(plan), self.cache_rows(plan)
            )
            yield Term("cache", host, "on the host, whose memory this is")
        sizes = {(work.height, work.width), *work.images}
        tokens = sum(_tokens(*one) for one in sizes)
        yield Term("positions", tokens * self.unit, f"crops of the table for {len(sizes)} sizes")
        yield Term("latents", self.latent_bytes, "of input images, and twice of the pictures")

    def rings(self, plan: MemoryPlan) -> Iterator[Term]:
        """What is there until the decode."""
        slots = min(RING, self.config.num_layers - plan.resident_layers)
        if slots:
            yield Term("ring of layers", slots * self.slot_bytes, f"{slots} that are streamed")
        row = 2 * self.key_width * self.size
        if plan.cache == "ring":
            rows = self.cache_rows(plan)
            yield Term("ring of caches", RING * rows * row, f"{RING} layers of {rows} rows")
        elif plan.cache == "none":
            rows = self.cache_rows(plan)
            yield Term("cache", rows * row, f"one layer of {rows} rows, computed in every step")

    def captured(self, plan: MemoryPlan) -> Iterator[Term]:
        """What a recording holds outside the loop."""
        if plan.capture:
            yield Term("captured step", self.loop_bytes(plan), "a loop's, kept for later calls")

    def moved_vae(self, plan: MemoryPlan) -> Iterator[Term]:
        if not plan.vae_resident:
            yield Term("VAE", self.vae_bytes, "in float32, brought to the device meanwhile")

    def times(self) -> Term:
        size = 3 * self.workload.steps * self.unit
        return Term("times", size, "embeddings and modulation of all steps")

    @property
    def context_bytes(self) -> int:
        return round(self.profile.context_bytes)

    @cached_property
    def latent_bytes(self) -> int:
        work = self.workload
        pixels = sum(height * width for height, width in work.images)
        pixels += 2 * len(work.branches) * work.height * work.width
        return LATENT_CHANNELS * _FLOAT * pixels // VAE_SCALE**2

    def arena_bytes(self, plan: MemoryPlan) -> int:
        """Keys and values of this request, or all that may be kept."""
        row = self.row_bytes(plan)
        return row * max(plan.kept_bytes // row, self.cache_rows(plan))

    def loop_bytes(self, plan: MemoryPlan) -> int:
        """What all steps use again."""
        noise = self.workload.noise_tokens
        longest = max(len(one) for one in self.passes(plan.branches_per_pass)) * noise
        rows = self.groups * noise
        rotary = self.config.head_dim * _FLOAT  # cosines and sines of half a head each
        # the velocities, and once more where those of several passes meet
        values = _PATCH_VALUES * self.size * (1 + (len(self.passes(plan.branches_per_pass)) > 1))
        streams = rows * (2 * self.unit + rotary + values)
        return self.workspace_bytes(longest, plan.mlp_rows) + streams

    def workspace_bytes(self, rows: int, mlp_rows: int) -> int:
        """As `model.Workspace`."""
        width = self.qkv_width + self.config.hidden_size
        gate_up = 2 * self.config.intermediate_size * min(rows, mlp_rows)
        return (rows * width + gate_up) * self.size

    def encode_maps(self, plan: MemoryPlan) -> tuple[int, int]:
        """Bytes of the largest image's activations, and of work space."""
        return max(
            (self._maps(_encode_bytes, plan, *image) for image in self.workload.images),
            default=(0, 0),
            key=sum,
        )

    def decode_maps(self, plan: MemoryPlan) -> tuple[int, int]:
        """Bytes of a picture's activations with all that is decoded, and of work space."""
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
        if plan.strip_rows is not None:  # what is kept between strips needs no work space
            at_once = of(self.vae, height, width, plan.strip_rows, host_store=True)
        return maps, round(_WORKSPACE_SHARE * at_once)

    def _prefill(self, steps: int, mlp_rows: int, share: bool) -> Iterator[Term]:
        own = [(rows if share else tokens) + steps for rows, tokens in self.branch_rows]
        longest = max(tokens for _, tokens in self.branch_rows) + steps
        row = 2 * self.unit + self.config.head_dim * _FLOAT + _INDEX_BYTES
        why = f"{sum(own)} rows of all branches: residual stream, what is to be added, rotary"
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
        return f"keys and values of {needed} rows in all layers{more}"

    # Seconds

    def durations(self, plan: MemoryPlan, current: MemoryPlan | None) -> Iterator[Duration]:
        steps, step = self.workload.steps, self.step_work(plan)
        if current is not None:
            moved = self.layers_moving(plan, current) + self.vae_moving(plan, current)
            yield Duration("arranging", moved, "weights to their places")
        if self.workload.images:
            yield Duration("encode", self.encode_seconds(plan), "input images, in float32")
        if plan.cache != "none":
            why = "the condition and all time tokens, once"
            yield Duration("prefill", self.prefill_seconds(plan), why)
        yield Duration("products", steps * step.products, "matrix products of all steps")
        yield Duration("attention", steps * step.attention, "of all steps")
        yield Duration("elementwise", steps * step.elementwise, "norms, rotary, SwiGLU, guidance")
        why = "between the kernels of a recording" if plan.capture else "kernel by kernel"
        yield Duration("launches", steps * step.launches, why)
        if self.copied_bytes(plan):
            share = steps * self.contention(plan)
            yield Duration("contention", share, "copies take a part of the memory's bandwidth")
        if plan.cache == "none":
            again = steps * self.condition_work(plan).seconds
            yield Duration("recomputing", again, "the condition in every step")
        waits = self.loop_seconds(plan) - steps * self.compute_seconds(plan)
        if self.copied_bytes(plan):
            yield Duration("waiting", waits, "for copies that outlast the computation")
        yield Duration("decode", self.decode_seconds(plan), "in float32")

    def seconds(self, plan: MemoryPlan, current: MemoryPlan | None = None) -> float:
        """Of all; the sum of `durations` up to rounding."""
        return self.transformer_seconds(plan, current) + self.vae_seconds(plan, current)

    def transformer_seconds(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        prefill = self.prefill_seconds(plan) if plan.cache != "none" else 0.0
        return self.layers_moving(plan, current) + prefill + self.loop_seconds(plan)

    def vae_seconds(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        encode = self.encode_seconds(plan) if self.workload.images else 0.0
        return self.vae_moving(plan, current) + encode + self.decode_seconds(plan)

    def layers_moving(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """Layers to the device, or their copies to the host."""
        moved = abs(plan.resident_layers - current.resident_layers) if current else 0
        return moved * self.layer_bytes / self.profile.link_bytes_per_second

    def vae_moving(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """The VAE to the device, to stay there."""
        comes = current is not None and plan.vae_resident and not current.vae_resident
        return self.vae_bytes * comes / self.profile.link_bytes_per_second

    def loop_seconds(self, plan: MemoryPlan) -> float:
        """All steps: computation, or the copies beside it where those take longer."""
        step = max(self.compute_seconds(plan), self.copy_seconds(plan))
        first = self.slot_bytes if plan.resident_layers < self.config.num_layers else 0
        return self.workload.steps * step + first / self.profile.link_bytes_per_second

    def compute_seconds(self, plan: MemoryPlan) -> float:
        """Of one step on the device."""
        seconds = self.step_work(plan).seconds
        if plan.cache == "none":
            seconds += self.condition_work(plan).seconds
        return seconds + self.contention(plan)

    def copied_bytes(self, plan: MemoryPlan) -> int:
        """What is streamed in one step."""
        size = (self.config.num_layers - plan.resident_layers) * self.layer_bytes
        if plan.cache == "ring":
            size += self.cache_rows(plan) * self.row_bytes(plan)
        return size

    def copy_seconds(self, plan: MemoryPlan) -> float:
        """Of one step's copies. Evenly spread over the layers, they run beside all of it."""
        return self.copied_bytes(plan) / self.profile.link_bytes_per_second

    def contention(self, plan: MemoryPlan) -> float:
        """What a step loses to its copies, which write to the memory that it reads."""
        return self.copied_bytes(plan) / self._bandwidth

    def prefill_seconds(self, plan: MemoryPlan) -> float:
        computing = self.condition_work(plan).seconds + self.contention(plan)
        return max(computing, self.copy_seconds(plan))

    def step_work(self, plan: MemoryPlan) -> Work:
        """Of the noise tokens."""
        key = (plan.branches_per_pass, plan.mlp_rows, plan.capture)
        if key not in self._work:
            self._work[key] = self._step_work(plan)
        return self._work[key]

    def condition_work(self, plan: MemoryPlan) -> Work:
        """Of the condition: once for all steps, or of one step where it is not kept."""
        kept = plan.cache != "none"
        key = (kept, plan.mlp_rows)
        if key not in self._work:
            self._work[key] = self._condition_work(kept, plan.mlp_rows)
        return self._work[key]

    def _step_work(self, plan: MemoryPlan) -> Work:
        config, noise = self.config, self.workload.noise_tokens
        layers = config.num_layers
        products = attention = moved = kernels = 0.0
        for tokens in self.passes(plan.branches_per_pass):
            rows = len(tokens) * noise
            products += layers * self._product_seconds(rows, plan.mlp_rows)
            width = config.num_heads * config.head_dim
            size = rows * (2 * width + 2 * self.key_width) + sum(tokens) * 2 * self.key_width
            attention += layers * max(
                attention_flops(config, tokens, noise) / self._attention_rate,
                size * self.size / self._bandwidth,
            )
            moved += layers * rows * self._row_moves
            # noise in: product, positions, choice of pictures; out: two norms, product, guidance
            moved += rows * (13 * self.unit + 4 * _PATCH_VALUES * self.size)
            kernels += layers * self._kernels(rows, plan.mlp_rows) + 9
        return self._launched(products, attention, moved / self._bandwidth, kernels, plan.capture)

    def _condition_work(self, kept: bool, mlp_rows: int) -> Work:
        """Attention as if every row saw the whole condition: text sees about half."""
        config = self.config
        layers, steps = config.num_layers, self.workload.steps if kept else 1
        products = attention = moved = kernels = 0.0
        for own, tokens in self.branch_rows:
            rows = (own if kept else tokens) + steps
            products += layers * self._product_seconds(rows, mlp_rows)
            flops = 4 * rows * tokens * config.num_heads * config.head_dim
            attention += layers * flops / self._attention_rate
            moved += layers * rows * self._row_moves
            kernels += layers * self._kernels(rows, mlp_rows)
        return self._launched(products, attention, moved / self._bandwidth, kernels, False)

    @cached_property
    def _row_moves(self) -> int:
        """Bytes that the elementwise kernels of a layer read and write for a row."""
        config = self.config
        norms = 8 * self.unit  # read residual and sum, write residual and normed; twice
        rotary = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * self.size
        return norms + rotary + 3 * config.intermediate_size * self.size

    def _product_seconds(self, rows: int, mlp_rows: int) -> float:
        """Of a layer's products: weights are read for each chunk of the MLP's rows."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        weights = hidden * (self.qkv_width + hidden)
        weights += 3 * hidden * inner * math.ceil(rows / mlp_rows)
        activations = rows * (3 * hidden + self.qkv_width + 3 * inner + hidden)
        moved = (weights + activations) * self.size / self._bandwidth
        return max(product_flops(self.config, rows) / self._product_rate, moved)

    def _kernels(self, rows: int, mlp_rows: int) -> int:
        """Of a layer: two norms, two products, rotary, attention; three for each chunk."""
        return 6 + 3 * math.ceil(rows / mlp_rows)

    def _launched(
        self, products: float, attention: float, elementwise: float, kernels: float, captured: bool
    ) -> Work:
        busy = products + attention + elementwise
        if captured:
            return Work(products, attention, elementwise, kernels * _GAP_CAPTURED)
        gaps = kernels * _GAP_EAGER
        return Work(products, attention, elementwise, max(gaps, kernels * _LAUNCH - busy))

    def encode_seconds(self, plan: MemoryPlan) -> float:
        layers = encoder_layers(self.vae)
        seconds = sum(
            self._vae_seconds(_encode_flops, layers, plan, *one) for one in self.workload.images
        )
        return seconds + self._bringing(plan)

    def decode_seconds(self, plan: MemoryPlan) -> float:
        work = self.workload
        one = self._vae_seconds(
            _decode_flops, decoder_layers(self.vae), plan, work.height, work.width
        )
        return len(work.branches) * one + self._bringing(plan)

    def _bringing(self, plan: MemoryPlan) -> float:
        return 0.0 if plan.vae_resident else self.vae_bytes / self.profile.link_bytes_per_second

    def _vae_seconds(
        self,
        flops_of: Callable[..., int],
        layers: Sequence[Layer],
        plan: MemoryPlan,
        height: int,
        width: int,
    ) -> float:
        latents = height * width // VAE_SCALE**2
        made = sum(layer.size for layer in layers) * latents * _FLOAT
        moved = _VAE_MOVES * made
        seconds = 0.0
        if plan.strip_rows is not None:
            moved = moved * (1 + 4 / (VAE_SCALE * plan.strip_rows))  # rows that two strips read
            rows = height // VAE_SCALE
            strips = sum(math.ceil(rows * one.scale / (8 * plan.strip_rows)) for one in layers)
            seconds += strips * 10 * _GAP_EAGER
            if plan.strips_on_host and not self.on_host:  # out once, in for moments and for use
                seconds += 3 * made / self.profile.link_bytes_per_second
        flops = flops_of(self.vae, height, width, plan.strip_rows)
        rate = self.profile.fp32_flops_per_second
        return seconds + flops / rate + moved / self._bandwidth


def _tokens(height: int, width: int) -> int:
    return (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
