"""Cost of the autoencoder: its layers as data, and the bytes and operations of each way to run.

Arithmetic on sizes only, for plans. Bytes are those of live tensors, which `strips.py` and
diffusers' AutoencoderKL allocate in this order, without the workspace that a convolution allocates
temporarily and without the allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ..config import LATENT_CHANNELS, VAE_SCALE

FLOAT = 4  # bytes
IMAGE_CHANNELS = 3
MIN_QUERIES = 64  # per chunk of attention: with fewer, its products are too small


@dataclass(frozen=True)
class VaeShape:
    """Sizes of an AutoencoderKL. The defaults are SDXL's, which OmniGen uses."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each resolution, the image's first
    layers_per_block: int = 2
    attention: bool = True  # in the middle blocks
    value_bytes: int = FLOAT  # of a weight and of an activation: 4 in float32, 2 in bfloat16

    @classmethod
    def from_config(cls, config: Mapping[str, Any], value_bytes: int = FLOAT) -> VaeShape:
        """Reads an AutoencoderKL's `config.json` (or its `config`)."""
        return cls(
            tuple(config["block_out_channels"]),
            config.get("layers_per_block", 1),
            config.get("mid_block_add_attention", True),
            value_bytes,
        )

    @property
    def dtype(self) -> str:
        """That it computes in."""
        return "float32" if self.value_bytes == FLOAT else "bfloat16"


@dataclass(frozen=True)
class Layer:
    """A layer of the encoder or the decoder."""

    kind: Literal["conv", "resnet", "attention", "up", "down", "out"]
    inputs: int  # channels
    outputs: int
    scale: int  # output rows per row of latents
    held: int = 0  # floats per latent of the block's input, which diffusers keeps until its end

    @property
    def size(self) -> int:
        """Output floats per latent."""
        return self.outputs * self.scale**2

    @property
    def has_shortcut(self) -> bool:
        return self.kind == "resnet" and self.inputs != self.outputs


@lru_cache
def decoder_layers(shape: VaeShape) -> tuple[Layer, ...]:
    """From latents (after `post_quant_conv`) to the image."""
    deep = shape.channels[-1]
    layers = [Layer("conv", LATENT_CHANNELS, deep, 1), *_middle(shape, 1)]
    scale, inputs = 1, deep
    for index, outputs in enumerate(reversed(shape.channels)):
        held = inputs * scale**2
        for number in range(shape.layers_per_block + 1):
            layers.append(Layer("resnet", inputs, outputs, scale, held if number else 0))
            inputs = outputs
        if index < len(shape.channels) - 1:
            layers.append(Layer("up", outputs, outputs, 2 * scale, held))
            scale *= 2
    return (*layers, Layer("out", inputs, IMAGE_CHANNELS, scale))


@lru_cache
def encoder_layers(shape: VaeShape) -> tuple[Layer, ...]:
    """From pixels to mean and log-variance (before `quant_conv`)."""
    scale, inputs = VAE_SCALE, shape.channels[0]
    layers = [Layer("conv", IMAGE_CHANNELS, inputs, scale)]
    for index, outputs in enumerate(shape.channels):
        held = inputs * scale**2
        for number in range(shape.layers_per_block):
            layers.append(Layer("resnet", inputs, outputs, scale, held if number else 0))
            inputs = outputs
        if index < len(shape.channels) - 1:
            scale //= 2
            layers.append(Layer("down", outputs, outputs, scale, held))
    return (*layers, *_middle(shape, scale), Layer("out", inputs, 2 * LATENT_CHANNELS, scale))


def _middle(shape: VaeShape, scale: int) -> list[Layer]:
    deep = shape.channels[-1]
    held = deep * scale**2
    attention = [Layer("attention", deep, deep, scale, held)] if shape.attention else []
    return [
        Layer("resnet", deep, deep, scale),
        *attention,
        Layer("resnet", deep, deep, scale, held),
    ]


def keeps(layer: Layer, layers: tuple[Layer, ...], recompute: bool) -> bool:
    """Whether strips keep a layer's intermediate result rather than compute it twice.

    That is the inside of a residual block (between its convolutions), or the output of an
    upsampling. `recompute` drops results that are larger than the largest output that must be kept.
    """
    if not recompute:
        return True
    limit = max(one.size for one in layers if one.kind not in ("up", "out"))
    return (2 if layer.kind == "resnet" else 1) * layer.size <= limit


def query_count(channels: int, height: int, rows: int) -> int:
    """Queries per chunk of attention: the scores are then as large as a strip."""
    return max(MIN_QUERIES, channels * rows // height)


def spans(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each strip of `height` rows."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def weight_bytes(shape: VaeShape) -> int:
    """Of encoder and decoder, including the convolutions on latents."""
    total = LATENT_CHANNELS * (LATENT_CHANNELS + 1) + 2 * LATENT_CHANNELS * (
        2 * LATENT_CHANNELS + 1
    )
    for layer in (*decoder_layers(shape), *encoder_layers(shape)):
        inputs, outputs = layer.inputs, layer.outputs
        if layer.kind == "attention":
            total += 4 * inputs * (inputs + 1) + 2 * inputs
            continue
        total += 9 * inputs * outputs + outputs
        if layer.kind == "resnet":
            total += 2 * inputs + 9 * outputs**2 + 3 * outputs
            total += (inputs + 1) * outputs if layer.has_shortcut else 0
        elif layer.kind == "out":
            total += 2 * inputs
    return shape.value_bytes * total


def decode_bytes(
    shape: VaeShape,
    height: int,
    width: int,
    strip_rows: int | None = None,
    *,
    host_store: bool = False,
    recompute: bool = False,
    pictures: int = 1,
) -> int:
    """Peak on the device, without weights and input, of decoding to `height` x `width` pixels.

    Args:
        strip_rows: as for `Vae.decode`; None for the whole image.
        host_store: activations are kept on the host, and only strips are on the device.
        recompute: as for `Vae.decode`.
        pictures: how many are decoded, one at a time.
    """
    rows, columns = height // VAE_SCALE, width // VAE_SCALE
    # the images, and latents before and after `post_quant_conv`
    floats = pictures * IMAGE_CHANNELS * height * width + 2 * LATENT_CHANNELS * rows * columns
    layers = decoder_layers(shape)
    if strip_rows is None:
        return floats * FLOAT + _whole_values(layers, rows * columns) * shape.value_bytes
    return floats * FLOAT + _strips_bytes(
        shape, layers, rows, columns, strip_rows, host_store, recompute
    )


def encode_bytes(
    shape: VaeShape,
    height: int,
    width: int,
    strip_rows: int | None = None,
    *,
    host_store: bool = False,
    recompute: bool = False,
) -> int:
    """Peak on the device, without weights, of encoding `height` x `width` pixels.

    The pixels are on the host and are copied whole, or strip by strip. Arguments as for
    `decode_bytes`.
    """
    rows, columns = height // VAE_SCALE, width // VAE_SCALE
    layers = encoder_layers(shape)
    if strip_rows is None:
        pixels = IMAGE_CHANNELS * height * width
        return (pixels + _whole_values(layers, rows * columns)) * shape.value_bytes
    moments = 2 * LATENT_CHANNELS * rows * columns * shape.value_bytes
    return moments + _strips_bytes(shape, layers, rows, columns, strip_rows, host_store, recompute)


def decode_flops(
    shape: VaeShape,
    height: int,
    width: int,
    strip_rows: int | None = None,
    *,
    recompute: bool = False,
) -> int:
    """Operations (a multiplication and an addition are two) of decoding a picture.

    Convolutions and attention only. With `recompute`, strips compute some of them twice.
    """
    return _flops(decoder_layers(shape), height, width, strip_rows, recompute)


def encode_flops(
    shape: VaeShape,
    height: int,
    width: int,
    strip_rows: int | None = None,
    *,
    recompute: bool = False,
) -> int:
    """Operations of encoding an image, as `decode_flops` counts them."""
    return _flops(encoder_layers(shape), height, width, strip_rows, recompute)


def _flops(
    layers: tuple[Layer, ...], height: int, width: int, strip_rows: int | None, recompute: bool
) -> int:
    columns = width // VAE_SCALE
    rows = height // VAE_SCALE
    strip = VAE_SCALE * (strip_rows or rows)
    total = 0
    lazy: Layer | None = None  # an upsampling that is recomputed at every read
    for layer in layers:
        high, wide = rows * layer.scale, columns * layer.scale
        once = 2 * 9 * layer.inputs * layer.outputs * wide  # a row of a 3 x 3 convolution
        if layer.kind == "attention":
            tokens = high * wide
            total += 4 * tokens**2 * layer.inputs + 8 * tokens * layer.inputs**2
        elif layer.kind == "resnet":
            second = 2 * 9 * layer.outputs**2 * wide
            skip = 2 * layer.inputs * layer.outputs * wide * layer.has_shortcut
            again = strip_rows is not None and not keeps(layer, layers, recompute)
            for first, last in spans(high, strip):
                total += (last - first) * (once + second + skip)
                # the second pass reads the rows of the first convolution that it needs
                total += (last - first + 2) * once if again else 0
                if lazy:
                    row = 2 * 9 * lazy.inputs * lazy.outputs * wide
                    total += row * (_inside(first - 1, last + 1, high))
                    total += row * (_inside(first - 2, last + 2, high)) if again else 0
        else:
            total += high * once
        lazy = None
        if layer.kind == "up" and strip_rows is not None and not keeps(layer, layers, recompute):
            lazy = layer
    return total


def _inside(first: int, last: int, height: int) -> int:
    return min(last, height) - max(first, 0)


def _whole_values(layers: tuple[Layer, ...], latents: int) -> int:
    """Peak of diffusers' forward pass, in the order of its statements.

    Its fused attention keeps no scores. The image and the moments come on top.
    """
    peak = 0
    for layer in layers:
        into, out = layer.inputs * layer.scale**2, layer.size
        if layer.kind == "resnet":
            # input and norm with activation; input, activation and convolution; input, (shortcut,)
            # second convolution, sum and quotient
            last = into + 3 * out + (out if layer.has_shortcut else 0)
            floats = max(3 * into, 2 * into + out, into + 2 * out, last)
        elif layer.kind == "attention":
            floats = 7 * into  # input, norm, query, key, value, result, projection
        elif layer.kind == "up":
            floats = into // 4 + into + out
        elif layer.kind == "down":
            floats = 4 * into + 4 * into + out  # input, padded, convolution
        elif layer.kind == "out":
            floats = 3 * into
        else:
            floats = into + out
        peak = max(peak, floats + layer.held)
    return peak * latents


class _Kept:
    """An activation in strips, as `strips.Stored`; counts floats."""

    def __init__(self, channels: int, height: int, width: int, strip: int, host: bool) -> None:
        self.channels, self.height, self.width = channels, height, width
        self.strip, self.host = strip, host

    def made(self, rows: int) -> int:
        """Floats on the device once this many rows are computed."""
        return 0 if self.host else rows * self.width * self.channels

    def live(self, before: int) -> int:
        """Floats on the device once the rows before `before` are freed."""
        return self.made(self.height - max(before, 0) // self.strip * self.strip)

    def read(self, first: int, last: int, right: int = 0) -> int:
        """Peak of reading rows: the rows and, from the host, a copy of one strip of them."""
        floats = (last - first) * (self.width + right) * self.channels
        if self.host:
            pieces = [
                min(last, start + self.strip, self.height) - max(first, start, 0)
                for start in range(max(first, 0) // self.strip * self.strip, last, self.strip)
            ]
            floats += max(pieces) * self.width * self.channels
        return floats


class _Upsampled:
    """An upsampling that is recomputed at every read, as `strips.Upsampled`."""

    def __init__(self, source: _Kept | _Upsampled, channels: int) -> None:
        self.source, self.channels = source, channels
        self.height: int = 2 * source.height
        self.width: int = 2 * source.width

    def live(self, before: int) -> int:
        return self.source.live((before - 1) // 2)

    def read(self, first: int, last: int) -> int:
        low, high = max(first, 0), min(last, self.height)
        into = self.source.channels * self.source.width
        read = self.source.read((low - 1) // 2, high // 2 + 1)
        narrow = (high - low + 2) * into
        given = (high // 2 + 1 - (low - 1) // 2) * into
        out = (high - low) * self.width * self.channels
        padded = (last - first) * self.width * self.channels if high - low < last - first else 0
        return max(read, given + narrow, 3 * narrow, 2 * narrow + out, out + padded)


def _strips_bytes(
    shape: VaeShape,
    layers: tuple[Layer, ...],
    rows: int,
    columns: int,
    strip_rows: int,
    host: bool,
    recompute: bool,
) -> int:
    """Peak of a run in strips.

    Where only strips are on the device, all count as float32: in bfloat16 some are for a moment.
    """
    size = FLOAT if host else shape.value_bytes
    return size * _strips_values(layers, rows, columns, strip_rows, host, recompute, FLOAT // size)


def _strips_values(
    layers: tuple[Layer, ...],
    rows: int,
    columns: int,
    strip_rows: int,
    host: bool,
    recompute: bool,
    float_values: int,
) -> int:
    """Peak of `strips.run`, by the same steps on sizes instead of tensors.

    Attention is in float32, each of whose values takes the room of `float_values`.
    """
    strip = VAE_SCALE * strip_rows
    start = layers[0]
    high, wide = rows * start.scale, columns * start.scale
    # pixels are on the host, and latents are so few that they may count as there
    source: _Kept | _Upsampled = _Kept(start.inputs, high, wide, strip, host=True)
    peak = 0
    for index, layer in enumerate(layers):
        high, wide = rows * layer.scale, columns * layer.scale
        kept = _Kept(layer.outputs, high, wide, strip, host)
        measured = layer.kind != "out" and layers[index + 1].kind not in ("up", "down")
        if layer.kind == "up" and not keeps(layer, layers, recompute):
            source = _Upsampled(source, layer.outputs)
            peak = max(peak, *_lazy_steps(source, strip))
            continue
        if layer.kind == "resnet":
            again = not keeps(layer, layers, recompute)
            steps = (_resnet_again if again else _resnet)(layer, source, kept, measured)
        elif layer.kind == "attention":
            steps = _attention(source, kept, float_values)
        else:
            steps = _convolution(layer, source, kept, measured)
        peak = max(peak, *steps)
        source = kept
    return peak


def _lazy_steps(source: _Upsampled, strip: int) -> Iterator[int]:
    for first, last in spans(source.height, strip):
        out = (last - first) * source.width * source.channels
        yield source.live(-1) + max(source.read(first, last), 2 * out)


def _convolution(
    layer: Layer, source: _Kept | _Upsampled, kept: _Kept, measured: bool
) -> Iterator[int]:
    reader = source
    if layer.kind == "up":
        reader = _Upsampled(source, layer.outputs)
    for first, last in spans(kept.height, kept.strip):
        out = (last - first) * kept.width * kept.channels
        if layer.kind == "up":
            read, before = reader.read(first, last), first
        elif layer.kind == "down":
            assert isinstance(source, _Kept)  # an upsampling is never followed by a downsampling
            given = (2 * (last - first) + 1) * (source.width + 1) * source.channels
            read, before = max(source.read(2 * first, 2 * last + 1, 1), given + out), 2 * first - 1
        else:
            given = (last - first + 2) * source.width * source.channels
            read, before = max(source.read(first - 1, last + 1), given + out), first - 1
        done = 0 if layer.kind == "out" else kept.made(first)
        yield reader.live(before) + done + max(read, out * (2 if measured else 1))


def _resnet(layer: Layer, source: _Kept | _Upsampled, kept: _Kept, measured: bool) -> Iterator[int]:
    hidden = skip = kept
    for first, last in spans(kept.height, kept.strip):
        out = (last - first) * kept.width * kept.channels
        given = (last - first + 2) * source.width * source.channels
        if layer.has_shortcut:
            before = source.live(first - 1) + hidden.made(first) + skip.made(first)
            new = skip.made(last - first)
            yield before + max(source.read(first - 1, last + 1), given + out)
            yield before + new + max(given + out, 2 * out)
        else:
            before = source.live(-1) + hidden.made(first)
            yield before + max(source.read(first - 1, last + 1), given + out, 2 * out)
    for first, last in spans(kept.height, kept.strip):
        out = (last - first) * kept.width * kept.channels
        given = (last - first + 2) * kept.width * kept.channels
        before = hidden.live(first - 1) + kept.made(first)
        old = skip.live(first)
        yield before + old + max(hidden.read(first - 1, last + 1), given + out)
        yield before + max(old + out + (out if skip.host else 0), skip.live(last) + 2 * out)


def _resnet_again(
    layer: Layer, source: _Kept | _Upsampled, kept: _Kept, measured: bool
) -> Iterator[int]:
    row = source.width * source.channels
    for first, last in spans(kept.height, kept.strip):
        out = (last - first) * kept.width * kept.channels
        read = source.read(first - 1, last + 1)
        yield source.live(-1) + max(read, (last - first + 2) * row + out, 2 * out)
    for first, last in spans(kept.height, kept.strip):
        line = kept.width * kept.channels
        out = (last - first) * line
        inner = out + 2 * line
        given = (last - first + 4) * row
        yield (
            source.live(first - 2)
            + kept.made(first)
            + max(
                source.read(first - 2, last + 2),
                given + out + inner,
                out + inner + out,
                out * (2 if measured else 1),
            )
        )


def _attention(source: _Kept | _Upsampled, kept: _Kept, float_values: int) -> Iterator[int]:
    tokens = kept.height * kept.width
    keys = 2 * float_values * tokens * kept.channels
    queries = query_count(kept.channels, kept.height, kept.strip)
    for first, last in spans(kept.height, kept.strip):
        part = (last - first) * kept.width
        out = part * kept.channels
        yield source.live(-1) + keys + max(source.read(first, last), 2 * float_values * out)
    for first, last in spans(kept.height, kept.strip):
        part = (last - first) * kept.width
        out = part * kept.channels
        some = min(queries, part)
        read = source.read(first, last)
        yield (
            source.live(first)
            + kept.made(first)
            + keys
            + max(
                read,
                float_values * (2 * out + some * (tokens + kept.channels)),
                float_values * out + read,
            )
        )
