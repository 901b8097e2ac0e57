"""Seconds of a plan by roofline, from the rates that a profile attains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..config import VAE_SCALE, ModelConfig
from ..forms import COMPUTED, QUANTISED
from ..parameters import PATCH_VALUES, layer_shapes
from ..schedule import ALL_BRANCHES, StepKind
from .autoencoder import Layer, decode_flops, decoder_layers, encode_flops, encoder_layers
from .estimate import ByteEstimate
from .plan import MemoryPlan, Workload
from .terms import Duration

_FLOAT = 4  # bytes
# Typical of CUDA, not measured: the gap between two kernels of a graph, the gap between two single
# launches, and the host's time for a launch.
_GAP_CAPTURED, _GAP_EAGER, _LAUNCH = 1e-6, 2e-6, 15e-6
# Reads and writes of each value that a VAE layer outputs: two norms, activations, the sum.
_VAE_MOVES = 10
# Of the rate of products, what convolutions in bfloat16 are counted to reach; not measured.
_CONVOLUTION_SHARE = 0.4
# What keys and values in 8 bits take beyond ones in bfloat16, in units of the products with them,
# by compute capability: counted from machine code by the model in `bench.kernels.pipes`.
_EXPANDING = {"8.0": 1.5, "8.6": 0.5, "8.9": 0.5}
_EXPANDING_ELSEWHERE = 1.0
_decode_flops, _encode_flops = lru_cache(256)(decode_flops), lru_cache(256)(encode_flops)


def step_flops(config: ModelConfig, workload: Workload, kind: StepKind = ALL_BRANCHES) -> int:
    """Operations of one step with cached keys and values: products and attention."""
    groups = [tokens for picture in workload.branches_of(kind) for tokens in picture]
    products = product_flops(config, len(groups) * workload.noise_tokens)
    return config.num_layers * (products + attention_flops(config, groups, workload.noise_tokens))


def steps_flops(config: ModelConfig, workload: Workload, computed: bool | None = True) -> int:
    """Of all steps that are computed, of those that are not, or (None) as if all were."""
    return sum(
        count * step_flops(config, workload, replace(kind, computed=True))
        for kind, count in workload.schedule.counts.items()
        if computed in (None, kind.computed)
    )


def product_flops(config: ModelConfig, rows: int) -> int:
    """Of a layer's matrix products; a multiplication and an addition are two operations."""
    hidden = config.hidden_size
    return 2 * rows * hidden * (config.qkv_width + hidden + 3 * config.intermediate_size)


def attention_flops(
    config: ModelConfig, tokens: Sequence[int], noise_tokens: int, queries: int | None = None
) -> int:
    """Of a layer's attention.

    Args:
        config: sizes of the transformer.
        tokens: of each group's condition.
        noise_tokens: of each group.
        queries: how many of those a rank computes; None for all.
    """
    keys = sum(one + 1 + noise_tokens for one in tokens)
    rows = noise_tokens if queries is None else queries
    return 4 * rows * keys * config.num_heads * config.head_dim


def cached_flops(
    config: ModelConfig, tokens: Sequence[int], noise_tokens: int, queries: int | None = None
) -> int:
    """The part of `attention_flops` that reads the cache."""
    return attention_flops(config, tokens, noise_tokens, queries) - attention_flops(
        config, [-1] * len(tokens), noise_tokens, queries
    )


@dataclass(frozen=True)
class Work:
    """Seconds of a pass through all layers, by their limit."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launches: float = 0.0  # gaps between kernels, or the host's excess over the device

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.elementwise + self.launches


class SecondsEstimate:
    """Seconds of one request on one device under any plan; shared parts are computed once.

    Args:
        sizes: the bytes of the same request on the same device.
    """

    def __init__(self, sizes: ByteEstimate) -> None:
        self._sizes = sizes
        self._config, self._workload = sizes.config, sizes.workload
        profile = self._profile = sizes.profile
        half = sizes.precision.arithmetic == "bfloat16"
        self._product_rate = (
            profile.attained_product_flops_per_second if half else profile.fp32_flops_per_second
        )
        self._attention_rate = (
            profile.attained_attention_flops_per_second if half else profile.fp32_flops_per_second
        )
        self._narrow_rate = {
            "int8": profile.attained_int8_flops_per_second,
            "fp8": profile.attained_fp8_flops_per_second,
        }
        self._bandwidth = profile.bandwidth_bytes_per_second * profile.attained_bandwidth_share
        self._work: dict[object, Work] = {}

    def durations(self, plan: MemoryPlan, current: MemoryPlan | None) -> Iterator[Duration]:
        """Each part, in order."""
        steps = self._all_steps(plan)
        if current is not None:
            moved = self.layers_moving(plan, current) + self.vae_moving(plan, current)
            yield Duration("arranging", moved, "moving weights")
        if self._workload.images:
            yield Duration(
                "encode", self.encode_seconds(plan), f"input images, in {self._sizes.vae.dtype}"
            )
        if plan.cache != "none":
            why = "the condition and all time tokens, once"
            yield Duration("prefill", self.prefill_seconds(plan), why)
        yield Duration("products", steps.products, "matrix products of all steps")
        yield Duration("attention", steps.attention, "of all steps")
        yield Duration("elementwise", steps.elementwise, "norms, rotary, SwiGLU, guidance")
        if self.expanding:
            why = "quantised layers, in every step"
            yield Duration("expanding", self._steps() * self.expanding, why)
        why = "gaps in the CUDA graph" if plan.capture else "kernel by kernel"
        yield Duration("launches", steps.launches, why)
        if self.copied_bytes(plan):
            share = self._steps() * self.contention(plan)
            yield Duration("contention", share, "copies take some of the memory's bandwidth")
        if plan.cache == "none":
            again = sum(
                count * self.condition_work(plan, kind).seconds for kind, count in self._computed()
            )
            yield Duration("recomputing", again, "the condition in every step")
        if self.copied_bytes(plan):
            computing = sum(
                count * self.compute_seconds(plan, kind) for kind, count in self._computed()
            )
            waits = self.loop_seconds(plan) - computing
            yield Duration("waiting", waits, "for copies that take longer than the computation")
        yield Duration("decode", self.decode_seconds(plan), f"in {self._sizes.vae.dtype}")

    def of(self, plan: MemoryPlan, current: MemoryPlan | None = None) -> float:
        """The sum of `durations` up to rounding."""
        return self.of_transformer(plan, current) + self.of_vae(plan, current)

    def of_transformer(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """Prefill, all steps, and moving layers."""
        prefill = self.prefill_seconds(plan) if plan.cache != "none" else 0.0
        return self.layers_moving(plan, current) + prefill + self.loop_seconds(plan)

    def of_vae(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """Encode, decode, and moving the VAE."""
        encode = self.encode_seconds(plan) if self._workload.images else 0.0
        return self.vae_moving(plan, current) + encode + self.decode_seconds(plan)

    def layers_moving(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """Layers to the device, or their copies to the host."""
        moved = abs(plan.resident_layers - current.resident_layers) if current else 0
        return moved * self._sizes.layer_bytes / self._profile.link_bytes_per_second

    def vae_moving(self, plan: MemoryPlan, current: MemoryPlan | None) -> float:
        """The VAE to the device, to stay there."""
        comes = current is not None and plan.vae_resident and not current.vae_resident
        return self._sizes.vae_bytes * comes / self._profile.link_bytes_per_second

    def loop_seconds(self, plan: MemoryPlan) -> float:
        """All steps: the computation, or its concurrent copies if they take longer."""
        copies = self.copy_seconds(plan)
        steps = sum(
            count * max(self.compute_seconds(plan, kind), copies)
            for kind, count in self._computed()
        )
        first = self._sizes.slot_bytes if plan.resident_layers < self._config.num_layers else 0
        return steps + first / self._profile.link_bytes_per_second

    def _computed(self) -> Iterator[tuple[StepKind, int]]:
        """How many steps of each kind compute velocities; the others cost next to nothing."""
        for kind, count in self._workload.schedule.counts.items():
            if kind.computed:
                yield kind, count

    def _all_steps(self, plan: MemoryPlan) -> Work:
        """Of the noise tokens in all steps."""
        work = [(count, self.step_work(plan, kind)) for kind, count in self._computed()]
        return Work(
            products=sum(count * one.products for count, one in work),
            attention=sum(count * one.attention for count, one in work),
            elementwise=sum(count * one.elementwise for count, one in work),
            launches=sum(count * one.launches for count, one in work),
        )

    def _steps(self) -> int:
        """How many steps compute velocities."""
        return sum(count for _, count in self._computed())

    def compute_seconds(self, plan: MemoryPlan, kind: StepKind = ALL_BRANCHES) -> float:
        """Of one step on the device."""
        seconds = self.step_work(plan, kind).seconds
        if plan.cache == "none":
            seconds += self.condition_work(plan, kind).seconds
        return seconds + self.expanding + self.contention(plan)

    @property
    def _expanding_keys(self) -> float:
        return _EXPANDING.get(self._profile.capability or "", _EXPANDING_ELSEWHERE)

    @cached_property
    def expanding(self) -> float:
        """Of one pass through all layers: reading them as they are stored, writing them dense."""
        if not self._sizes.expanded_bytes:
            return 0.0
        moved = self._sizes.layer_bytes + self._sizes.expanded_bytes
        return self._config.num_layers * moved / self._bandwidth

    def copied_bytes(self, plan: MemoryPlan) -> int:
        """Streamed in one step."""
        size = (self._config.num_layers - plan.resident_layers) * self._sizes.layer_bytes
        if plan.cache == "ring":
            size += self._sizes.cache_rows(plan) * self._sizes.row_bytes(plan)
        return size

    def copy_seconds(self, plan: MemoryPlan) -> float:
        """Of one step's copies; spread over the layers, they overlap with the whole step."""
        return self.copied_bytes(plan) / self._profile.link_bytes_per_second

    def contention(self, plan: MemoryPlan) -> float:
        """The step's loss to its copies, which write to the memory that it reads."""
        return self.copied_bytes(plan) / self._bandwidth

    def prefill_seconds(self, plan: MemoryPlan) -> float:
        computing = self.condition_work(plan).seconds + self.expanding + self.contention(plan)
        return max(computing, self.copy_seconds(plan))

    def step_work(self, plan: MemoryPlan, kind: StepKind = ALL_BRANCHES) -> Work:
        """Of the noise tokens."""
        key = (plan.branches_per_pass, plan.mlp_rows, plan.capture, kind)
        if key not in self._work:
            self._work[key] = self._step_work(plan, kind)
        return self._work[key]

    def condition_work(self, plan: MemoryPlan, kind: StepKind = ALL_BRANCHES) -> Work:
        """Of the condition: once for all steps, or of one step of a kind without a cache."""
        kept = plan.cache != "none"
        key = (kept, plan.mlp_rows, None if kept else kind)
        if key not in self._work:
            self._work[key] = self._condition_work(kept, plan.mlp_rows, kind)
        return self._work[key]

    def _step_work(self, plan: MemoryPlan, kind: StepKind) -> Work:
        passes = self._sizes.passes(plan.branches_per_pass, kind)
        return self.noise_work(plan, passes, self._workload.noise_tokens)

    def noise_work(self, plan: MemoryPlan, passes: Sequence[Sequence[int]], queries: int) -> Work:
        """Of the noise tokens of one step in some passes.

        Args:
            plan: that they run by.
            passes: condition tokens of the groups of each.
            queries: noise tokens of each group that are computed; all are keys.
        """
        config, noise = self._config, self._workload.noise_tokens
        layers, value = config.num_layers, self._sizes.precision.arithmetic_bytes
        products = attention = moved = kernels = 0.0
        for tokens in passes:
            rows = len(tokens) * queries
            products += layers * self._product_seconds(rows, plan.mlp_rows)
            width = config.num_heads * config.head_dim
            pair = 2 * config.num_kv_heads * config.head_dim * value
            own_keys = len(tokens) * noise
            size = rows * 2 * width * value + own_keys * pair + sum(tokens) * self._sizes.pair
            flops = float(attention_flops(config, tokens, noise, queries))
            if self._sizes.precision.quantised_cache is not None:
                if self._sizes.on_host:  # expanded ahead: written and read
                    size += 2 * sum(tokens) * pair
                else:
                    flops += self._expanding_keys * cached_flops(config, tokens, noise, queries)
            attention += layers * max(flops / self._attention_rate, size / self._bandwidth)
            moved += layers * rows * self._row_moves(config.num_kv_heads)
            # input: product, positions, choice of pictures; output: two norms, product, guidance
            moved += rows * (13 * self._sizes.unit + 4 * PATCH_VALUES * value)
            kernels += layers * self._kernels(rows, plan.mlp_rows) + 9
        return self._launched(products, attention, moved / self._bandwidth, kernels, plan.capture)

    def _condition_work(self, kept: bool, mlp_rows: int, kind: StepKind) -> Work:
        """As if every row attended to the whole condition; text attends to about half.

        Without a cache, a kind of step computes the conditions of its own branches; those are told
        apart by their lengths.
        """
        read = {tokens for picture in self._workload.branches_of(kind) for tokens in picture}
        if kept:
            rows = self._sizes.branch_rows
        else:
            rows = [(one, one) for _, one in self._sizes.branch_rows if one in read]
        return self.prefill_work(rows, self._workload.evaluations if kept else 1, mlp_rows)

    def prefill_work(
        self, conditions: Sequence[tuple[int, int]], steps: int, mlp_rows: int
    ) -> Work:
        """Of some conditions.

        Args:
            conditions: (rows that are computed, rows of keys) of each, without time tokens.
            steps: time tokens of each.
            mlp_rows: as in the plan.
        """
        config = self._config
        layers = config.num_layers
        products = attention = moved = kernels = 0.0
        for own, tokens in conditions:
            rows = own + steps
            products += layers * self._product_seconds(rows, mlp_rows)
            flops = 4 * rows * tokens * config.num_heads * config.head_dim
            attention += layers * flops / self._attention_rate
            moved += layers * rows * self._row_moves(config.num_heads + config.num_kv_heads)
            kernels += layers * self._kernels(rows, mlp_rows)
        return self._launched(products, attention, moved / self._bandwidth, kernels, False)

    def _row_moves(self, rotated: int) -> int:
        """Bytes that a layer's elementwise kernels read and write per row.

        Args:
            rotated: heads of the QKV product that are rotated in their place.
        """
        config = self._config
        value = self._sizes.precision.arithmetic_bytes
        norms = 4 * self._sizes.unit  # read the residual stream, write the normed one; twice
        rotary = 2 * rotated * config.head_dim * value
        # what attention gives, read and written in 8 bits; the other outputs are counted as if wide
        quantised = self._sizes.precision.compute is not None
        attended = config.hidden_size * (value + 1) * quantised
        return norms + rotary + 3 * config.intermediate_size * value + attended

    def _product_seconds(self, rows: int, mlp_rows: int) -> float:
        """Of a layer's products: weights are read for each chunk of the MLP's rows."""
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        precision, width = self._sizes.precision, self._config.qkv_width
        weights = hidden * (width + hidden)
        weights += 3 * hidden * inner * math.ceil(rows / mlp_rows)
        # in and out of each product; what two of them add to is read, too
        activations = rows * (7 * hidden + width + 3 * inner)
        moved = float((weights + activations) * precision.arithmetic_bytes)
        flops = product_flops(self._config, rows) / self._product_rate
        if precision.compute is not None:  # a part of them at another rate, from half the bytes
            part = self._narrow_share
            moved -= part * (weights + activations) * (precision.arithmetic_bytes - 1)
            flops *= 1 - part + part * self._product_rate / self._narrow_rate[precision.compute]
        return max(flops, moved / self._bandwidth)

    @cached_property
    def _narrow_share(self) -> float:
        """The share of a layer's products that are in 8 bits."""
        shapes, compute = layer_shapes(self._config), self._sizes.precision.compute
        sizes = {name: math.prod(shapes[name]) for name in QUANTISED}
        names = () if compute is None else COMPUTED[compute]
        return sum(sizes[name] for name in names) / sum(sizes.values())

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
        layers = encoder_layers(self._sizes.vae)
        seconds = sum(
            self._vae_seconds(_encode_flops, layers, plan, *one) for one in self._workload.images
        )
        return seconds + self._bringing(plan)

    def decode_seconds(self, plan: MemoryPlan) -> float:
        work = self._workload
        one = self._vae_seconds(
            _decode_flops, decoder_layers(self._sizes.vae), plan, work.height, work.width
        )
        return len(work.branches) * one + self._bringing(plan)

    def _bringing(self, plan: MemoryPlan) -> float:
        if plan.vae_resident:
            return 0.0
        return self._sizes.vae_bytes / self._profile.link_bytes_per_second

    def _vae_seconds(
        self,
        flops_of: Callable[..., int],
        layers: Sequence[Layer],
        plan: MemoryPlan,
        height: int,
        width: int,
    ) -> float:
        latents = height * width // VAE_SCALE**2
        outputs = sum(layer.size for layer in layers) * latents * self._sizes.vae.value_bytes
        moved = float(_VAE_MOVES * outputs)
        seconds = 0.0
        if plan.strip_rows is not None:
            moved *= 1 + 4 / (VAE_SCALE * plan.strip_rows)  # rows that two strips read
            rows = height // VAE_SCALE
            strips = sum(math.ceil(rows * one.scale / (8 * plan.strip_rows)) for one in layers)
            seconds += strips * 10 * _GAP_EAGER
            if plan.strips_on_host and not self._sizes.on_host:
                # written once, read for the moments and read again
                seconds += 3 * outputs / self._profile.link_bytes_per_second
        flops = flops_of(self._sizes.vae, height, width, plan.strip_rows)
        rate = self._profile.fp32_flops_per_second
        if self._sizes.vae.dtype == "bfloat16":
            rate = max(rate, _CONVOLUTION_SHARE * self._profile.attained_product_flops_per_second)
        return seconds + flops / rate + moved / self._bandwidth
