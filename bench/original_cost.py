"""What the original package needs for a request: bytes and seconds, from the tensors it makes.

A comparison, not a part of the runtime: it says where the original's memory and time go. Read off
OmniGen 1.0.3 with the versions that it pins, transformers 4.45.2 and PyTorch 2.3.

Where its bytes go:

- **Masks.** One S x S float32 mask for each row of a batch (S: condition, time and noise tokens)
  stays on the device throughout; later steps crop it, which makes a view. Each pass makes its own
  additive in float32 (two more at once), then bfloat16; PyTorch's masked attention copies that to
  a row length that is a multiple of 8.
- **Cache.** What it keeps of a layer are views: of the rotated keys, 1 x hidden for each of the S
  tokens, and of the fused queries, keys and values, 3 x hidden. A view keeps all of its tensor, so
  a layer holds 4 x hidden x S until its cache is moved to the host, as exact copies. With
  `offload_kv_cache`, the first step moves neither layer 0 nor the last one.
- **Padding.** Without `separate_cfg_infer` all branches are one batch, padded to the longest.
- **Whole MLP.** For every token, the fused gate and up, the activated gate and their product live
  at once.
- **Streaming.** With `offload_model` or `offload_kv_cache` two layers are on the device, and each
  is copied back to the host, unchanged, when the next one's turn comes.

Its seconds are eager kernels one after another: matrix products and attention at the device's
attained rates, elementwise kernels at its attained bandwidth, copies to the host in line, copies
from it behind a layer's work. The host's own time is left out.

How close it comes, checked in `tests/bench/test_original_cost.py`: bytes are within max(1.8 GB, 14
%) of every cell of both tables, taking their G as 10^9. The tables can't have counted the decode
(weights, VAE and a whole decode of 1024 px take 11.3 GB, where they say 9), so they are held
against the peak of all that comes before it. Seconds are no better than a roofline: 0.65 to 0.96 of
the documented ones on the A800, 0.70 to 1.07 on the RTX 3090, and 0.37 to 0.78 there with
`offload_model`. What `offload_model` adds in the tables are copies to the host at 14 to 20 GB/s on
the A800 and at 3.3 to 5.9 GB/s on the RTX 3090, where pinned ones reach 25: slower links, or copies
that weren't pinned. That isn't modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from omnigen_fast.profiles import DocumentedCell, Profile

from omnigen_fast.config import ModelConfig, released_sizes
from omnigen_fast.memory.plan import Sizes, Switches
from omnigen_fast.memory.terms import Duration, Term, total_bytes, total_seconds

_BF16, _FP32 = 2, 4
_VAE_BYTES = 334_615_452  # 83.65 million parameters of the SDXL VAE in float32
# Operations of a pixel, and of a pixel with each other one (the middle block's attention).
_DECODE_FLOPS, _ENCODE_FLOPS, _VAE_ATTENTION_FLOPS = 9.461e6, 4.129e6, 0.5
# Attention with a mask tensor can't take FlashAttention; the kernel that it gets runs at a half to
# a third of the rate without a mask.
_MASKED_SHARE = 0.4
_MOVED = 2  # layers on the device where layers are moved
_DEFAULTS = Switches(
    use_kv_cache=True, offload_kv_cache=True, offload_model=False, separate_cfg_infer=True
)


@dataclass(frozen=True)
class Cost:
    """The original's cost of a request: bytes of its three phases, at each one's peak."""

    encode: tuple[Term, ...]  # none without input images
    denoise: tuple[Term, ...]
    decode: tuple[Term, ...]
    durations: tuple[Duration, ...]

    @property
    def documented_bytes(self) -> int:
        """The peak that the original's tables give: of all that comes before the decode."""
        return max(total_bytes(self.encode), total_bytes(self.denoise))

    @property
    def peak_bytes(self) -> int:
        return max(self.documented_bytes, total_bytes(self.decode))

    @property
    def seconds(self) -> float:
        return total_seconds(self.durations)


def cost(profile: Profile, sizes: Sizes, switches: Switches | None = None) -> Cost:
    """The released model's cost in the original, as if the device had any amount of memory.

    A switch that is None has the original's default.
    """
    given = vars(switches) if switches else {}
    switches = replace(_DEFAULTS, **{key: given[key] for key in given if given[key] is not None})
    original = _Original(profile, sizes, switches, released_sizes())
    return Cost(
        encode=original.encode(),
        denoise=max(original.moments(), key=total_bytes),
        decode=original.decode(),
        durations=original.durations(),
    )


def of_cell(profile: Profile, cell: DocumentedCell) -> Cost:
    """The cost of what a cell of the documented tables describes."""
    side = cell.max_input_image_size
    sizes = Sizes(cell.height, cell.width, ((side, side),) * cell.images)
    switches = Switches(
        use_kv_cache=cell.use_kv_cache,
        offload_kv_cache=cell.offload_kv_cache,
        offload_model=cell.offload_model,
        separate_cfg_infer=cell.separate_cfg_infer,
    )
    return cost(profile, sizes, switches)


@dataclass(frozen=True)
class _Pass:
    """One run through the layers: a batch of padded branches."""

    batch: int
    condition: int  # tokens, padded
    noise: int
    image_tokens: int  # of all rows' input images

    @property
    def length(self) -> int:
        return self.condition + 1 + self.noise


@dataclass(frozen=True)
class _Original:
    profile: Profile
    sizes: Sizes
    switches: Switches
    config: ModelConfig

    @property
    def cached(self) -> bool:
        return bool(self.switches.use_kv_cache)

    def queries(self, one: _Pass, first: bool) -> int:
        """Tokens of each row that a step computes."""
        return 1 + one.noise if self.cached and not first else one.length

    # Bytes

    @property
    def unit(self) -> int:
        """One token's hidden state."""
        return self.config.hidden_size * _BF16

    @property
    def layer_bytes(self) -> int:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden) * _BF16

    def passes(self) -> list[_Pass]:
        """The passes of a step, in their order."""
        noise, branches = self.sizes.noise_tokens, self.sizes.branches
        images = (self.sizes.image_tokens, 0, self.sizes.image_tokens)  # uncond has none
        if self.switches.separate_cfg_infer:
            return [_Pass(1, tokens, noise, own) for tokens, own in zip(branches, images)]
        return [_Pass(len(branches), max(branches), noise, sum(images))]

    def context(self) -> Term:
        size = round(self.profile.context_bytes)
        return Term("context", size, "driver and libraries")

    def weights(self) -> tuple[Term, ...]:
        """The transformer's weights while it runs, and the VAE's, which wait."""
        config, hidden = self.config, self.config.hidden_size
        rest = config.vocab_size * hidden  # token embeddings
        rest += config.pos_embed_size**2 * hidden
        rest += 2 * (256 + 1 + hidden + 1) * hidden  # the time's two embedders
        rest += 2 * (hidden + 1) * hidden + 16 * (hidden + 1)  # modulation, output
        rest += 2 * (16 + 1) * hidden + hidden  # patches of noise and of input images; final norm
        others = Term("other weights", rest * _BF16, "embeddings, position table, time, output")
        if self.switches.offload_model:
            moved = Term("layers", _MOVED * self.layer_bytes, "one at work, one on its way")
            return moved, others
        layers = Term("layers", config.num_layers * self.layer_bytes, "all stay")
        return layers, others, self.vae()

    def vae(self) -> Term:
        return Term("VAE", _VAE_BYTES, "in float32")

    def masks(self) -> Term:
        size = sum(_FP32 * one.batch * one.length**2 for one in self.passes())
        return Term("masks", size, "S x S in float32 for every row; later steps keep them as views")

    def caches(self, first: bool, running: int) -> tuple[Term, ...]:
        """Keys and values on the device while the last layer of pass `running` is at work."""
        if not self.cached:
            return ()
        passes, offload = self.passes(), self.switches.offload_kv_cache
        layers = _MOVED if offload else self.config.num_layers
        if offload and not first:
            rows = sum(one.batch * one.condition for one in passes)
            size = layers * 2 * self.unit * rows
            return (Term("cache", size, "two layers' exact copies for every pass"),)
        # in the first step the passes to come have none yet
        done = passes[: running + 1] if first else passes
        size = layers * 4 * self.unit * sum(one.batch * one.length for one in done)
        why = "views that keep whole fused queries, keys and values, and rotated keys, of "
        return (Term("cache", size, why + ("layers 0 and last" if offload else "all layers")),)

    def moments(self) -> Iterator[tuple[Term, ...]]:
        """What is alive at each moment of the loop that may be its peak."""
        always = (self.context(), *self.weights(), self.masks())
        for first in (True, False):
            for running, one in enumerate(self.passes()):
                queries = self.queries(one, first)
                caches = self.caches(first, running)
                # the additive mask is made before the first layer: this pass has no cache yet
                before = self.caches(first, running - 1) if first else caches
                held = self.embeddings(one, first)
                bias = _BF16 * one.batch * queries * one.length
                making = Term("additive mask", 4 * bias, "two in float32 at once")
                yield (*always, *before, held, making)
                mask = Term("additive mask", bias, "in bfloat16")
                yield (*always, *caches, held, mask, self.attention(one, first))
                yield (*always, *caches, held, mask, self.mlp(one, first))

    def embeddings(self, one: _Pass, first: bool) -> Term:
        rows = one.image_tokens + one.batch * one.noise
        queries = self.queries(one, first)
        if queries == one.length:  # the condition's, before they are joined
            rows += one.batch * one.condition
        rows += one.batch * queries
        why = "input images, condition, noise and all of them joined stay until the pass ends"
        return Term("embeddings", rows * self.unit, why)

    def attention(self, one: _Pass, first: bool) -> Term:
        """A layer's tensors while its attention runs, beyond what the cache keeps alive."""
        queries, unit = self.queries(one, first), self.unit
        # residual, normed, rotated queries and their contiguous copy, output
        rows = 5 * queries
        if first and self.cached:
            keys = one.condition  # the first step sees the condition's keys alone
            rows += 2 * keys  # contiguous copies
        else:
            keys = one.length
            rows += 4 * queries + 2 * keys  # fused and rotated; joined with the cache, or copied
        bias = one.batch * queries * (keys + 8 - keys % 8) * _BF16 if keys % 8 else 0
        why = "a layer's queries, keys and values, and the mask copied to an aligned row length"
        return Term("attention", one.batch * rows * unit + bias, why)

    def mlp(self, one: _Pass, first: bool) -> Term:
        queries = self.queries(one, first)
        # residual and normed; gate and up, activated gate, product
        row = 2 * self.unit + 4 * self.config.intermediate_size * _BF16
        why = "gate and up, the activated gate and their product for every token at once"
        return Term("MLP", one.batch * queries * row, why)

    def encode(self) -> tuple[Term, ...]:
        if not self.sizes.images:
            return ()
        pixels = max(height * width for height, width in self.sizes.images)
        # a down block's input, and a resnet's input, output, their sum and that sum scaled
        maps = Term("encode", 5 * 128 * pixels * _FP32, "5 maps of 128 channels in float32")
        if self.switches.offload_model:
            return self.context(), self.vae(), maps
        return self.context(), *self.weights(), maps

    def decode(self) -> tuple[Term, ...]:
        pixels = self.sizes.height * self.sizes.width
        # the last up block's input, which has 256 channels; its norm, and that activated
        maps = Term("decode", 3 * 256 * pixels * _FP32, "3 maps of 256 channels in float32")
        if self.switches.offload_model:
            return self.context(), self.vae(), self.masks(), maps
        return self.context(), *self.weights(), self.masks(), maps

    # Seconds

    def durations(self) -> tuple[Duration, ...]:
        later = self.sizes.steps - 1
        products = attention = elementwise = waits = 0.0
        for one in self.passes():
            for first, count in ((True, 1), (False, later)):
                queries = self.queries(one, first)
                kernels = self.layer_seconds(one, queries, first)
                layers = count * self.config.num_layers
                products += layers * kernels[0]
                attention += layers * kernels[1]
                elementwise += layers * kernels[2]
                waits += layers * self.copy_seconds(one, first, sum(kernels))
        return (
            Duration("products", products, "matrix products at the attained rate"),
            Duration("attention", attention, f"masked: at {_MASKED_SHARE} of the attained rate"),
            Duration("elementwise", elementwise, "every norm, rotation, mask and join on its own"),
            Duration("copies", waits, "to the host in line; from it where they outlast a layer"),
            Duration("VAE", self.vae_seconds(), "in float32 without TF32"),
        )

    def layer_seconds(self, one: _Pass, queries: int, first: bool) -> tuple[float, float, float]:
        """Of a layer's products, attention and elementwise kernels."""
        config, profile, unit = self.config, self.profile, self.unit
        rows = one.batch * queries
        joins = queries < one.length  # with the cache
        keys = one.condition if first and self.cached else one.length
        hidden, inner = config.hidden_size, config.intermediate_size
        flops = 2 * rows * (4 * hidden * hidden + 3 * hidden * inner)
        scores = 4 * rows * keys * hidden
        # hidden states read and written for a row: each norm 18, in float32 and out of it; each
        # rotation 10; copies of the queries 2; residuals 6. The MLP reads and writes 5 x inner.
        moved = rows * ((2 * 18 + 2 * 10 + 2 + 6) * unit + 5 * inner * _BF16)
        moved += one.batch * one.length * (4 * unit if joins else 0)
        moved += 2 * _BF16 * rows * keys  # the mask, aligned in every layer
        moved += 22 * rows * one.length / config.num_layers  # and made additive once a pass
        rate = profile.attained_attention_flops_per_second * _MASKED_SHARE
        return profile.seconds(0, flops), scores / rate, profile.seconds(moved)

    def copy_seconds(self, one: _Pass, first: bool, work: float) -> float:
        """What copies add to a layer's `work`.

        Each copy to the host stands in line before the layer; the next layer's copy to the device
        starts with it and has until the end of the layer.
        """
        link = self.profile.link_bytes_per_second
        out = back = 0
        if self.switches.offload_model:
            out += self.layer_bytes
            back += self.layer_bytes
        if self.cached and self.switches.offload_kv_cache:
            size = 2 * self.unit * one.batch * one.condition
            out += size
            back += 0 if first else size
        return out / link + max(0.0, (back - out) / link - work)

    def vae_seconds(self) -> float:
        pixels = self.sizes.height * self.sizes.width
        flops = pixels * (_DECODE_FLOPS + _VAE_ATTENTION_FLOPS * pixels)
        # cond and img-cond have the same images, each encoded anew
        for height, width in self.sizes.images * 2:
            area = height * width
            flops += area * (_ENCODE_FLOPS + _VAE_ATTENTION_FLOPS * area)
        return flops / self.profile.fp32_flops_per_second
