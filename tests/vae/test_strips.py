"""The autoencoder in strips: the whole's image, and the memory that was foretold."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from golden_cases import TINY
from torch.utils.flop_counter import FlopCounterMode

from bench.full_size import VAE
from bench.vae_strips import (
    as_on_a_gpu,
    decode_peak,
    encode_peak,
    peak_bytes,
    random_autoencoder,
    random_image,
)
from omnigen_fast.errors import RequestError
from omnigen_fast.images import normalized
from omnigen_fast.memory.autoencoder import (
    VaeShape,
    decode_bytes,
    decode_flops,
    encode_bytes,
    encode_flops,
    weight_bytes,
)
from omnigen_fast.vae import strips
from omnigen_fast.vae.vae import Vae

SMALL = {**VAE, "block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8}
SIZES = [(8, 8), (11, 5), (6, 16), (1, 1)]  # of latents; most strips don't divide these
# another name of the CPU: what is kept goes through the store as it does to a host
STORE = torch.device("cpu:0")


@pytest.fixture(scope="module")
def small() -> Vae:
    return random_autoencoder(SMALL)


@pytest.fixture(scope="module")
def meta() -> Vae:
    return random_autoencoder(VAE, "meta")


def relative(value, expected) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def random_latents(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, height, width, generator=generator) * 0.3


def decoded(vae, latents, **way):
    """The image before it is clamped, in which no difference hides."""
    latents, size = latents / 0.13025, (3, 8 * latents.shape[2], 8 * latents.shape[3])
    if not way:
        return vae.autoencoder.decode(latents).sample[0]
    image = torch.full(size, torch.nan)
    with torch.no_grad():
        strips.decode(vae.autoencoder, latents, image, **way)
    return image


def encoded(vae, image, **way):
    with torch.no_grad():
        if way:
            return strips.encode(vae.autoencoder, image.pixels, **way)
        return vae.autoencoder.encode(normalized(image.pixels)[None]).latent_dist.parameters


class TestSameAsWhole:
    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_decode(self, small, height, width, rows):
        latents = random_latents(height, width)
        whole = decoded(small, latents)
        for recompute in (False, True):
            image = decoded(small, latents, strip_rows=rows, recompute=recompute)
            assert relative(image, whole) < 5e-6

    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_encode(self, small, height, width, rows):
        image = random_image(8 * height, 8 * width)
        whole = encoded(small, image)
        for recompute in (False, True):
            moments = encoded(small, image, strip_rows=rows, recompute=recompute)
            assert relative(moments, whole) < 5e-6

    @pytest.mark.parametrize("recompute", [False, True])
    def test_as_near_to_float64(self, small, recompute):
        exact = Vae(copy.deepcopy(small.autoencoder).double())
        latents, image = random_latents(7, 6), random_image(56, 48)
        way = {"strip_rows": 2, "recompute": recompute}
        image64 = exact.autoencoder.decode(latents.double() / 0.13025).sample[0]
        error = relative(decoded(small, latents), image64)
        assert relative(decoded(small, latents, **way), image64) < 2 * error
        moments64 = exact.autoencoder.encode(
            normalized(image.pixels)[None].double()
        ).latent_dist.parameters
        error = relative(encoded(small, image), moments64)
        assert relative(encoded(small, image, **way), moments64) < 2 * error

    @pytest.mark.parametrize("recompute", [False, True])
    def test_store(self, small, recompute):
        """Where strips are kept changes no bit."""
        way = {"strip_rows": 2, "recompute": recompute}
        latents, image = random_latents(7, 6), random_image(56, 48)
        expected = decoded(small, latents, **way)
        assert torch.equal(decoded(small, latents, **way, store=STORE), expected)
        expected = encoded(small, image, **way)
        assert torch.equal(encoded(small, image, **way, store=STORE), expected)

    @pytest.mark.parametrize(
        "changes",
        [
            {"mid_block_add_attention": False},
            {"use_quant_conv": False, "use_post_quant_conv": False},
            {"layers_per_block": 1},
            {"block_out_channels": [64, 32, 16, 16]},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_structures(self, changes):
        vae = random_autoencoder({**SMALL, **changes})
        latents, image = random_latents(5, 4), random_image(40, 32)
        for recompute in (False, True):
            way = {"strip_rows": 2, "recompute": recompute}
            assert relative(decoded(vae, latents, **way), decoded(vae, latents)) < 5e-6
            assert relative(encoded(vae, image, **way), encoded(vae, image)) < 5e-6

    def test_golden(self):
        vae = Vae.from_folder(TINY / "vae", torch.device("cpu"))
        latents = torch.cat([random_latents(8, 6), random_latents(8, 6, seed=1)])
        image = random_image(64, 48)
        images, code = vae.decode(latents), vae.encode(image)
        assert images.shape == (2, 3, 64, 48)
        assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
        for rows in (1, 3, 8):
            assert relative(vae.decode(latents, rows), images) < 1e-5
            assert relative(vae.encode(image, rows), code) < 1e-5


def test_whole_is_diffusers(small):
    latents = random_latents(6, 5)
    expected = small.autoencoder.decode(latents / 0.13025).sample
    assert torch.equal(small.decode(latents), (expected * 0.5 + 0.5).clamp(0, 1))


def test_convolutions_give_the_same_bits(small):
    """Zeros outside the image and rows of a neighbour sum as padding and image do."""
    conv = small.autoencoder.decoder.up_blocks[1].resnets[0].conv1
    rows = torch.randn(1, conv.in_channels, 40, 24, generator=torch.Generator().manual_seed(0))
    source = strips.Stored((conv.in_channels, 40, 24), 40, rows.device, rows.device)
    source.put(rows)
    with torch.no_grad():
        parts = [
            strips._convolve(conv, source.rows(first - 1, min(first + 16, 40) + 1))
            for first in (0, 16, 32)
        ]
        # of the backend the last bits are not promised; a wrong row would be far off
        assert relative(torch.cat(parts, 2), conv(rows)) < 1e-6


def test_moments_of_a_large_mean():
    values = torch.randn(1, 8, 30, 20, generator=torch.Generator().manual_seed(0)) + 3000
    moments = strips.Moments(4)
    for strip in values.split([7, 1, 22], dim=2):
        moments.add(strip)
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6)
    scale, shift = moments.scale_and_shift(norm)
    exact = values.double().reshape(4, -1)
    deviation = (exact.var(1, correction=0) + 1e-6).sqrt().repeat_interleave(2)
    mean = exact.mean(1).repeat_interleave(2)
    torch.testing.assert_close(scale.flatten().double(), 1 / deviation, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift.flatten().double(), -mean / deviation, rtol=1e-6, atol=0)


class TestErrors:
    @pytest.mark.parametrize("rows", [0, -1, True, 2.5, "8"])
    def test_rows(self, small, rows):
        with pytest.raises(RequestError, match="strip_rows must be at least 1 row of latents"):
            small.decode(random_latents(2, 2), rows)
        with pytest.raises(RequestError, match="strip_rows must be at least 1 row of latents"):
            small.encode(random_image(16, 16), rows)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"act_fn": "gelu"}, "gelu can't run in strips"),
            (
                {"up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3},
                "AttnUpDecoderBlock2D",
            ),
        ],
    )
    def test_other_blocks(self, changes, part):
        vae = random_autoencoder({**SMALL, **changes})
        with pytest.raises(RequestError, match=f"{part}.*strip_rows=None"):
            vae.decode(random_latents(2, 2), 1)


def ways(sample: int) -> list:
    """Sizes of 256 to 2048 pixels and ways to run, drawn once; few strips, for their tracking."""
    draw = random.Random(0)
    result = [
        pytest.param(1024, 1024, {}, id="1024-whole"),
        pytest.param(2048, 2048, {}, id="2048-whole"),
        pytest.param(1024, 1024, {"strip_rows": 32}, id="1024-strips"),
        pytest.param(256, 256, {"strip_rows": 8, "host_store": True}, id="256-host"),
    ]
    for _ in range(sample):
        height, width = (16 * draw.randint(16, 128) for _ in range(2))
        way = {}
        if draw.random() < 0.85:
            way["strip_rows"] = draw.randint(height // 40, height // 8 + 2)
            way["recompute"] = draw.random() < 0.5
            way["host_store"] = draw.random() < 0.5
        result.append(pytest.param(height, width, way, id=f"{height}x{width}"))
    return result


class TestCost:
    @pytest.mark.slow_except("1024-*", "256-*")
    @pytest.mark.parametrize(("height", "width", "way"), ways(16))
    def test_bytes(self, meta, height, width, way):
        """Foretold as tracked, within 2 %."""
        shape = VaeShape.from_config(meta.autoencoder.config)
        run = {key: value for key, value in way.items() if key != "host_store"}
        if way.get("host_store"):
            run["store"] = torch.device("cpu")
        tracked = decode_peak(meta, height, width, **run)
        assert decode_bytes(shape, height, width, **way) == pytest.approx(tracked, rel=0.02)
        tracked = encode_peak(meta, height, width, **run)
        assert encode_bytes(shape, height, width, **way) == pytest.approx(tracked, rel=0.02)

    def test_bytes_of_pictures(self, meta):
        latents = torch.empty(3, 4, 16, 16, device="meta")
        with as_on_a_gpu():
            tracked = peak_bytes(meta, lambda: meta.decode(latents, 8), latents)
        foretold = decode_bytes(VaeShape(), 128, 128, 8, pictures=3)
        assert foretold == pytest.approx(tracked, rel=0.02)

    def test_what_strips_save(self):
        """At 1024 px: a part of the whole's bytes, and no more than a strip's worth from a host."""
        whole = decode_bytes(VaeShape(), 1024, 1024)
        assert decode_bytes(VaeShape(), 1024, 1024, 8) < 0.41 * whole
        assert decode_bytes(VaeShape(), 1024, 1024, 8, recompute=True) < 0.24 * whole
        assert decode_bytes(VaeShape(), 1024, 1024, 8, host_store=True) < 0.05 * whole

    def test_weights(self, meta):
        real = sum(parameter.nbytes for parameter in meta.autoencoder.parameters())
        assert weight_bytes(VaeShape()) == real

    @pytest.mark.parametrize("recompute", [False, True])
    def test_flops_of_strips(self, meta, recompute):
        way = {"strip_rows": 5, "recompute": recompute}
        with FlopCounterMode(display=False) as counter:
            meta.decode(torch.empty(1, 4, 16, 24, device="meta"), **way)
        counted = counter.get_total_flops()
        assert decode_flops(VaeShape(), 128, 192, **way) == pytest.approx(counted, rel=1e-3)
        with FlopCounterMode(display=False) as counter:
            meta.encode(random_image(128, 192), **way)
        counted = counter.get_total_flops()
        assert encode_flops(VaeShape(), 128, 192, **way) == pytest.approx(counted, rel=1e-3)

    def test_flops_of_the_whole(self, meta):
        with FlopCounterMode(display=False) as counter:
            meta.decode(torch.empty(1, 4, 16, 24, device="meta"))
        counted = counter.get_total_flops()
        assert decode_flops(VaeShape(), 128, 192) == pytest.approx(counted, rel=1e-3)
        with FlopCounterMode(display=False) as counter:
            meta.encode(random_image(128, 192))
        counted = counter.get_total_flops()
        assert encode_flops(VaeShape(), 128, 192) == pytest.approx(counted, rel=1e-3)


def test_pixels_are_those_of_the_whole():
    image = random_image(32, 16)
    source = strips.Pixels(image.pixels, torch.device("cpu"))
    rows = source.rows(-1, 33)
    whole = torch.from_numpy(image.pixels).float().permute(2, 0, 1) / 255 * 2 - 1
    assert torch.equal(rows[0, :, 1:-1], whole)
    assert not rows[:, :, 0].any() and not rows[:, :, -1].any()
    assert np.array_equal(rows.shape, (1, 3, 34, 16))
