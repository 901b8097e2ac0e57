"""The autoencoder in strips of rows: the image of the whole run, without its memory.

Tiling changes an image: each tile has its own mean and variance in every norm, and its own
attention. Here every activation is processed in strips, and the image's statistics come first:

- The mean and variance of a group norm are accumulated in float64 while its input is computed, so a
  norm is a scale and a shift by the time it is applied.
- A 3 x 3 convolution reads one extra row on either side; at the image's edge these are zeros, like
  its padding. Norm, activation, convolution and upsampling run strip by strip; an activation is
  stored only where a later norm must wait for it.
- The middle attention has the keys and values of the whole image, and processes queries in chunks.

A stored strip is freed as soon as no later strip needs it. At the image's resolution two
activations are alive at a time, instead of six. With a store on the host only strips are on the
device; with `recompute` the inside of the largest blocks is computed twice instead of stored.

Convolutions match the whole-image result bit for bit where the backend's kernel sums in the same
order (oneDNN's does); norm and attention match up to floating-point rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAE_SCALE
from ..errors import RequestError
from ..images import normalized
from ..memory.autoencoder import (
    Layer,
    VaeShape,
    decoder_layers,
    encoder_layers,
    keeps,
    query_count,
    spans,
)
from .bands import Bands

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


_PARTS = 4  # of a strip in bfloat16 whose moments are computed in float32


class Moments:
    """Mean and variance of each group of channels, accumulated strip by strip.

    Merged after Chan, Golub and LeVeque (1979), so that large means cause no cancellation.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._count: Any = 0
        self._mean: Any = 0.0  # [groups], float64
        self._squares: Any = 0.0  # [groups], float64: squared deviations from the mean, summed

    def add(self, strip: Tensor) -> None:
        """Adds a strip [1, channels, rows, width]."""
        values = strip.reshape(self._groups, -1)
        if strip.dtype != torch.bfloat16:
            self._add(values)
            return
        for part in values.chunk(_PARTS, dim=1):  # so that copies in float32 stay small
            self._add(part.float())

    def _add(self, values: Tensor) -> None:
        """Adds values, [groups, count]."""
        count = values.shape[1]
        mean = values.mean(1, keepdim=True)
        distances = values - mean
        rest = distances.mean(1).double()  # the rounding error of the float32 mean
        squares = torch.linalg.vector_norm(distances, dim=1).double().square() - count * rest**2
        step = mean[:, 0].double() + rest - self._mean
        total = self._count + count
        self._squares = self._squares + squares + step**2 * (self._count * count / total)
        self._mean = self._mean + step * (count / total)
        self._count = total

    def of_all(self, bands: Bands) -> None:
        """Takes in what the other ranks have found in their bands, in the order of the ranks."""
        own = torch.cat([self._mean.new_tensor([self._count]), self._mean, self._squares])
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        for found in bands.of_all(own):
            count, mean, squares = found[0], *found[1:].chunk(2)
            step, total = mean - self._mean, self._count + count
            self._squares = self._squares + squares + step**2 * (self._count * count / total)
            self._mean = self._mean + step * (count / total)
            self._count = total

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The norm as a scale and a shift, float32 [1, channels, 1, 1] each."""
        assert norm.num_groups == self._groups
        deviation = (self._squares / self._count + norm.eps).sqrt()
        repeat = norm.num_channels // self._groups
        scale = norm.weight.double() / deviation.repeat_interleave(repeat)
        shift = norm.bias.double() - self._mean.repeat_interleave(repeat) * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


class Rows(Protocol):
    """An activation that can be read by rows."""

    channels: int
    height: int
    width: int
    moments: Moments | None  # None where no norm follows

    def rows(self, first: int, last: int, right: int = 0) -> Tensor:
        """Rows first to last - 1, zeros outside the image, and `right` more columns of zeros.

        The caller may change the tensor.
        """

    def release(self, before: int) -> None:
        """Rows above `before` won't be read again."""


class Stored:
    """An activation stored strip by strip on the device `store`.

    With bands, this rank's band of it; `meet` makes it whole enough for what reads it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],  # channels, height, width
        strip: int,
        device: torch.device,
        store: torch.device,
        moments: Moments | None = None,
        dtype: torch.dtype = torch.float32,
        bands: Bands | None = None,
    ) -> None:
        self.channels, self.height, self.width = shape
        self.moments = moments
        self._bands = bands
        self._first, self._last = (0, self.height) if bands is None else bands.bounds(self.height)
        self._beside: list[tuple[int, Tensor]] = []  # rows of other bands, by their places
        self._dtype = dtype
        self._strip, self._device, self._store = strip, device, store
        self._strips: list[Tensor | None] = []

    def put(self, strip: Tensor) -> None:
        """Adds the next strip below."""
        if self.moments is not None:
            self.moments.add(strip)
        self._strips.append(strip.to(self._store))

    def take(self, first: int) -> Tensor:
        """The strip that begins at row `first`; it won't be read again."""
        index = (first - self._first) // self._strip
        strip = self._strips[index]
        assert strip is not None
        self._strips[index] = None
        return strip.to(self._device)

    def meet(self) -> None:
        """Once all strips are there: exchanges with the other bands what their readers need."""
        if self._bands is None:
            return
        if self.moments is not None:
            self.moments.of_all(self._bands)
        ends = [self.rows(row, row + 1)[0, :, 0] for row in (self._first, self._last - 1)]
        above, below = self._bands.neighbours(torch.stack(ends))
        if above is not None:
            self._beside.append((self._first - 1, above))
        if below is not None:
            self._beside.append((self._last, below))

    def rows(self, first: int, last: int, right: int = 0) -> Tensor:
        outside = first < 0 or last > self.height or right
        make = torch.zeros if outside else torch.empty
        size = (1, self.channels, last - first, self.width + right)
        result = make(size, dtype=self._dtype, device=self._device)
        low, high = max(first, 0), min(last, self.height)
        for start, strip in self._pieces(low, high):
            top, bottom = max(low, start), min(high, start + strip.shape[2])
            piece = strip[:, :, top - start : bottom - start]
            if self._store != self._device:
                piece = piece.to(self._device, memory_format=torch.contiguous_format)
            result[:, :, top - first : bottom - first, : self.width] = piece
        return result

    def _pieces(self, low: int, high: int) -> Iterator[tuple[int, Tensor]]:
        """What is stored of some rows, with the row that each piece begins at."""
        yield from (one for one in self._beside if low <= one[0] < high)
        first, last = max(low, self._first) - self._first, min(high, self._last) - self._first
        for index in range(first // self._strip, (last - 1) // self._strip + 1):
            strip = self._strips[index]
            assert strip is not None
            yield self._first + index * self._strip, strip

    def release(self, before: int) -> None:
        for index in range(min(max(before - self._first, 0) // self._strip, len(self._strips))):
            self._strips[index] = None


class Pixels:
    """An image on the host, read as the encoder takes it: in [-1, 1], channels first."""

    moments: Moments | None = None

    def __init__(
        self, pixels: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._pixels, self._device = pixels, device  # [height, width, 3], uint8
        self._dtype = dtype
        self.height, self.width, self.channels = pixels.shape

    def rows(self, first: int, last: int, right: int = 0) -> Tensor:
        result = torch.zeros(
            (1, self.channels, last - first, self.width + right),
            dtype=self._dtype,
            device=self._device,
        )
        low, high = max(first, 0), min(last, self.height)
        pixels = normalized(self._pixels[low:high], self._device)
        result[0, :, low - first : high - first, : self.width] = pixels
        return result

    def release(self, before: int) -> None:
        pass


class Upsampled:
    """A source with twice the rows and columns, convolved; computed on every read."""

    def __init__(self, source: Rows, conv: nn.Conv2d, moments: Moments | None = None) -> None:
        self.channels, self.moments = conv.out_channels, moments
        self.height, self.width = 2 * source.height, 2 * source.width
        self._source, self._conv = source, conv

    def rows(self, first: int, last: int, right: int = 0) -> Tensor:
        assert not right
        low, high = max(first, 0), min(last, self.height)
        result = _convolve(self._conv, self._doubled(low - 1, high + 1))
        if low > first or high < last:
            result = F.pad(result, (0, 0, low - first, last - high))
        return result

    def release(self, before: int) -> None:
        self._source.release((before - 1) // 2)

    def _doubled(self, first: int, last: int) -> Tensor:
        top = first // 2
        narrow = self._source.rows(top, (last - 1) // 2 + 1)
        wanted = torch.arange(first, last, device=narrow.device) // 2 - top
        narrow = narrow.index_select(2, wanted)
        return narrow.repeat_interleave(2, dim=3)


class _Runner:
    """Runs layers over strips of `strip` rows."""

    def __init__(
        self,
        layers: tuple[Layer, ...],
        groups: int,
        strip: int,
        device: torch.device,
        store: torch.device,
        dtype: torch.dtype,
        recompute: bool,
        bands: Bands | None = None,
    ) -> None:
        assert not (recompute and bands), "computing twice reads two rows of other bands"
        self._bands = bands
        self._dtype = dtype
        self._layers, self._groups, self._strip = layers, groups, strip
        self._device, self._store, self._recompute = device, store, recompute

    def run(
        self, modules: list[Any], source: Rows, write: Callable[[int, int, Tensor], None]
    ) -> None:
        """Runs the layers.

        Args:
            modules: the layers' modules; for the last a pair of norm and convolution.
            source: the input of the first layer.
            write: receives the output strip by strip: first row, row after the last, values
                [1, channels, rows, width].
        """
        for index, (layer, module) in enumerate(zip(self._layers, modules, strict=True)):
            if layer.kind == "out":
                self._out(module, source, write)
                return
            measured = self._layers[index + 1].kind not in ("up", "down")
            moments = Moments(self._groups) if measured else None
            source = self._apply(layer, module, source, moments)

    def _apply(self, layer: Layer, module: Any, source: Rows, moments: Moments | None) -> Rows:
        keep = keeps(layer, self._layers, self._recompute)
        if layer.kind == "conv":
            return self._convolution(module, source, moments)
        if layer.kind == "resnet":
            return (self._resnet if keep else self._resnet_again)(module, source, moments)
        if layer.kind == "attention":
            return self._attention(module, source, moments)
        if layer.kind == "down":
            return self._downsampling(module.conv, source, moments)
        upsampled = Upsampled(source, module.conv, moments)
        return self._kept(upsampled) if keep else self._measured(upsampled)

    def _stored(
        self, channels: int, height: int, width: int, moments: Moments | None = None
    ) -> Stored:
        shape = channels, height, width
        return Stored(
            shape, self._strip, self._device, self._store, moments, self._dtype, self._bands
        )

    def _spans(self, height: int) -> Iterator[tuple[int, int]]:
        """The strips that run here, of an activation of so many rows."""
        top, bottom = (0, height) if self._bands is None else self._bands.bounds(height)
        for first, last in spans(bottom - top, self._strip):
            yield top + first, top + last

    def _convolution(self, conv: nn.Conv2d, source: Rows, moments: Moments | None) -> Rows:
        out = self._stored(conv.out_channels, source.height, source.width, moments)
        for first, last in self._spans(out.height):
            out.put(_convolve(conv, source.rows(first - 1, last + 1)))
            source.release(last - 1)
        out.meet()
        return out

    def _downsampling(self, conv: nn.Conv2d, source: Rows, moments: Moments | None) -> Rows:
        out = self._stored(conv.out_channels, source.height // 2, source.width // 2, moments)
        for first, last in self._spans(out.height):
            # padded only by a row below and a column on the right
            rows = source.rows(2 * first, 2 * last + 1, right=1)
            out.put(F.conv2d(rows, conv.weight, conv.bias, stride=2))
            del rows
            source.release(2 * last - 1)
        return out

    def _kept(self, source: Upsampled) -> Rows:
        out = self._stored(source.channels, source.height, source.width, source.moments)
        for first, last in self._spans(out.height):
            out.put(source.rows(first, last))
            source.release(last)
        out.meet()
        return out

    def _measured(self, source: Upsampled) -> Rows:
        if source.moments is not None:
            for first, last in self._spans(source.height):
                source.moments.add(source.rows(first, last))
        return source

    def _resnet(self, block: Any, source: Rows, moments: Moments | None) -> Rows:
        """Stores the activation between the two convolutions."""
        size = block.conv1.out_channels, source.height, source.width
        before, hidden = _Norm(block.norm1, source), self._stored(*size, Moments(self._groups))
        skip = source if block.conv_shortcut is None else self._stored(*size)
        assert isinstance(skip, Stored)

        def first_half(first: int, last: int) -> Tensor:
            rows = source.rows(first - 1, last + 1)
            if skip is not source:
                skip.put(_pointwise(block.conv_shortcut, rows[:, :, 1:-1]))
            return _convolve(block.conv1, before.activate(rows, first - 1))

        def second_half(first: int, last: int) -> Tensor:
            rows = after.activate(hidden.rows(first - 1, last + 1), first - 1)
            rows = _convolve(block.conv2, rows)
            return rows.add_(skip.take(first))

        for first, last in self._spans(source.height):
            hidden.put(first_half(first, last))
            if skip is not source:
                source.release(last - 1)
        hidden.meet()
        after, out = _Norm(block.norm2, hidden), self._stored(*size, moments)
        for first, last in self._spans(source.height):
            out.put(second_half(first, last))
            hidden.release(last - 1)
        out.meet()
        return out

    def _resnet_again(self, block: Any, source: Rows, moments: Moments | None) -> Rows:
        """Computes the first convolution twice: for its moments, then for the second."""
        size = block.conv1.out_channels, source.height, source.width
        before, hidden = _Norm(block.norm1, source), Moments(self._groups)
        for first, last in self._spans(source.height):
            hidden.add(
                _convolve(
                    block.conv1,
                    before.activate(source.rows(first - 1, last + 1), first - 1),
                )
            )
        after = _Norm(block.norm2, source, hidden)

        def both_halves(first: int, last: int) -> Tensor:
            rows = source.rows(first - 2, last + 2)
            inner = rows[:, :, 2:-2]
            if block.conv_shortcut is None:
                skip = inner.clone(memory_format=torch.contiguous_format)
            else:
                skip = _pointwise(block.conv_shortcut, inner)
            del inner
            rows = _convolve(block.conv1, before.activate(rows, first - 2))
            rows = _convolve(block.conv2, after.activate(rows, first - 1, clear=True))
            return rows.add_(skip)

        out = self._stored(*size, moments)
        for first, last in self._spans(source.height):
            out.put(both_halves(first, last))
            source.release(last - 2)
        return out

    def _attention(self, block: Any, source: Rows, moments: Moments | None) -> Rows:
        """One head over all pixels; matrices are [channels, tokens], in float32 as their scores."""
        channels, width = source.channels, source.width
        tokens = source.height * width
        norm = _Norm(block.group_norm, source)
        keys = torch.empty(channels, tokens, device=self._device)
        values = torch.empty_like(keys)

        def normed(first: int, last: int) -> Tensor:
            return norm.apply(source.rows(first, last), first).view(channels, -1).float()

        def attended(first: int, last: int) -> Tensor:
            queries = _linear(block.to_q, normed(first, last)).mul_(channels**-0.5)
            result = torch.empty_like(queries)
            count = query_count(channels, source.height, self._strip)
            for part in range(0, queries.shape[1], count):
                some = slice(part, part + count)
                scores = queries[:, some].t() @ keys
                scores.sub_(scores.amax(1, keepdim=True)).exp_()
                torch.div(values @ scores.t(), scores.sum(1), out=result[:, some])
                del scores
            del queries
            rows = _linear(block.to_out[0], result).view(1, channels, -1, width)
            del result
            return rows.add_(source.rows(first, last)).to(self._dtype)

        for first, last in self._spans(source.height):
            columns = slice(first * width, last * width)
            rows = normed(first, last)
            keys[:, columns] = _linear(block.to_k, rows)
            values[:, columns] = _linear(block.to_v, rows)
            del rows
        if self._bands is not None:
            self._bands.join_(keys, source.height)
            self._bands.join_(values, source.height)
        out = self._stored(channels, source.height, width, moments)
        for first, last in self._spans(source.height):
            out.put(attended(first, last))
            source.release(last)
        out.meet()
        return out

    def _out(self, module: Any, source: Rows, write: Callable[[int, int, Tensor], None]) -> None:
        group_norm, conv = module
        norm = _Norm(group_norm, source)
        for first, last in self._spans(source.height):
            rows = norm.activate(source.rows(first - 1, last + 1), first - 1)
            write(first, last, _convolve(conv, rows))
            del rows
            source.release(last - 1)


class _Norm:
    """A group norm with known moments."""

    def __init__(self, norm: nn.GroupNorm, source: Rows, moments: Moments | None = None) -> None:
        moments = moments or source.moments
        assert moments is not None
        self._scale, self._shift = moments.scale_and_shift(norm)
        self._height = source.height

    def apply(self, rows: Tensor, first: int) -> Tensor:
        """Normalises rows in place, except those outside the image."""
        inside = self._inside(rows, first)
        scale, shift = self._scale.to(rows.dtype), self._shift.to(rows.dtype)
        torch.addcmul(shift, inside, scale, out=inside)
        return rows

    def activate(self, rows: Tensor, first: int, clear: bool = False) -> Tensor:
        """`apply`, then SiLU; with `clear`, rows outside the image become zeros."""
        F.silu(self._inside(self.apply(rows, first), first), inplace=True)
        if clear:
            rows[:, :, : max(-first, 0)] = 0
            rows[:, :, self._height - first :] = 0
        return rows

    def _inside(self, rows: Tensor, first: int) -> Tensor:
        return rows[:, :, max(-first, 0) : self._height - first]


def _convolve(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    """A 3 x 3 convolution; the rows include one extra on either side."""
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _pointwise(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    return F.conv2d(rows, conv.weight, conv.bias)


def _linear(linear: nn.Linear, columns: Tensor) -> Tensor:
    return torch.addmm(linear.bias[:, None].float(), linear.weight.float(), columns)


def check_strip_rows(strip_rows: Any) -> int:
    """The number of rows; raises RequestError unless it is a positive integer."""
    if isinstance(strip_rows, bool) or not isinstance(strip_rows, int) or strip_rows < 1:
        raise RequestError(
            f"strip_rows must be at least 1 row of latents (or None to run the autoencoder "
            f"whole), got {strip_rows!r}"
        )
    return strip_rows


def decode(
    autoencoder: AutoencoderKL,
    latents: Tensor,
    image: Tensor,
    strip_rows: int,
    store: torch.device | None = None,
    recompute: bool = False,
    bands: Bands | None = None,
) -> None:
    """Decodes into `image`.

    Args:
        latents: [1, 4, height, width], as the autoencoder takes them.
        image: [3, 8 height, 8 width] on the same device; receives values of about -1 to 1.
        strip_rows: rows of latents per strip of the image; strips of every layer have 8 times as
            many rows.
        store: where to keep activations; by default with the weights.
        recompute: compute the inside of the largest blocks twice instead of storing it.
        bands: of the ranks that decode the image together; all receive all of it.

    Raises:
        RequestError: `strip_rows` is not a positive integer, or strips don't support the
            autoencoder's structure.
    """
    layers = decoder_layers(VaeShape.from_config(autoencoder.config))
    runner = _runner(autoencoder, layers, latents.device, strip_rows, store, recompute, bands)
    if autoencoder.post_quant_conv is not None:
        latents = autoencoder.post_quant_conv(latents)
    _, channels, height, width = latents.shape
    device = latents.device
    source = Stored((channels, height, width), height, device, device, dtype=latents.dtype)
    source.put(latents)

    def write(first: int, last: int, rows: Tensor) -> None:
        image[:, first:last] = rows[0]

    runner.run(_decoder_modules(autoencoder), source, write)
    if bands is not None:
        bands.join_(image.flatten(1), image.shape[1])


def encode(
    autoencoder: AutoencoderKL,
    pixels: np.ndarray,
    strip_rows: int,
    store: torch.device | None = None,
    recompute: bool = False,
) -> Tensor:
    """Mean and logarithm of the variance of an image's latents, [1, 8, height / 8, width / 8].

    Args:
        pixels: [height, width, 3], uint8.
        strip_rows, store, recompute: as for `decode`.

    Raises:
        RequestError: as for `decode`.
    """
    device = autoencoder.encoder.conv_in.weight.device
    layers = encoder_layers(VaeShape.from_config(autoencoder.config))
    runner = _runner(autoencoder, layers, device, strip_rows, store, recompute)
    height, width = (side // VAE_SCALE for side in pixels.shape[:2])
    dtype = autoencoder.encoder.conv_in.weight.dtype
    size = (1, layers[-1].outputs, height, width)
    moments = torch.empty(size, dtype=dtype, device=device)

    def write(first: int, last: int, rows: Tensor) -> None:
        moments[:, :, first:last] = rows

    runner.run(_encoder_modules(autoencoder), Pixels(pixels, device, dtype), write)
    return moments if autoencoder.quant_conv is None else autoencoder.quant_conv(moments)


def _runner(
    autoencoder: AutoencoderKL,
    layers: tuple[Layer, ...],
    device: torch.device,
    strip_rows: int,
    store: torch.device | None,
    recompute: bool,
    bands: Bands | None = None,
) -> _Runner:
    strip = VAE_SCALE * check_strip_rows(strip_rows)
    config = autoencoder.config
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    activation = config["act_fn"]
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"} or activation not in ("silu", "swish"):
        raise RequestError(
            f"an autoencoder of {', '.join(sorted(kinds))} with {activation} can't run in strips; "
            "run it whole with strip_rows=None"
        )
    dtype = autoencoder.decoder.conv_in.weight.dtype
    groups = config["norm_num_groups"]
    return _Runner(layers, groups, strip, device, store or device, dtype, recompute, bands)


def _decoder_modules(autoencoder: AutoencoderKL) -> list[Any]:
    decoder: Any = autoencoder.decoder
    modules = [decoder.conv_in, *_middle_modules(decoder.mid_block)]
    for block in decoder.up_blocks:
        modules += [*block.resnets, *(block.upsamplers or [])]
    return [*modules, (decoder.conv_norm_out, decoder.conv_out)]


def _encoder_modules(autoencoder: AutoencoderKL) -> list[Any]:
    encoder: Any = autoencoder.encoder
    modules = [encoder.conv_in]
    for block in encoder.down_blocks:
        modules += [*block.resnets, *(block.downsamplers or [])]
    modules += _middle_modules(encoder.mid_block)
    return [*modules, (encoder.conv_norm_out, encoder.conv_out)]


def _middle_modules(block: Any) -> list[Any]:
    attentions = [attention for attention in block.attentions if attention is not None]
    return [block.resnets[0], *attentions, *block.resnets[1:]]
