"""The autoencoder in bfloat16: how much it changes, and the memory that was foretold."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_cases import golden_request
from test_strips import SMALL, random_latents, relative

from bench.full_size import VAE
from bench.vae_strips import decode_peak, encode_peak, random_autoencoder, random_image
from omnigen_fast.errors import RequestError
from omnigen_fast.memory.autoencoder import VaeShape, decode_bytes, encode_bytes, weight_bytes
from omnigen_fast.vae.vae import Vae

WAYS = [{}, {"strip_rows": 2}, {"strip_rows": 3, "recompute": True}]


@pytest.fixture(scope="module")
def pair() -> tuple[Vae, Vae]:
    """An autoencoder in float32 and the same in bfloat16."""
    exact = random_autoencoder(SMALL)
    return exact, Vae(copy.deepcopy(exact.autoencoder).to(torch.bfloat16))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_error(pair, way):
    """Of pixels and latents, as large as bfloat16's own; strips add none to the whole's."""
    exact, narrow = pair
    latents, image = random_latents(7, 6), random_image(56, 48)
    for job, given in (("decode", latents), ("encode", image)):
        expected = getattr(exact, job)(given)
        whole, found = getattr(narrow, job)(given), getattr(narrow, job)(given, **way)
        assert found.dtype == whole.dtype == torch.float32
        assert 1e-5 < relative(found, expected) < 0.02
        assert relative(found, expected) < 1.5 * relative(whole, expected)


@pytest.mark.parametrize(
    ("side", "way"),
    [
        (1024, {}),
        (512, {"strip_rows": 16}),
        (512, {"strip_rows": 16, "recompute": True}),
        (256, {"strip_rows": 8, "host_store": True}),
    ],
    ids=str,
)
def test_bytes(side, way):
    """Foretold as tracked, within 2 %; or as in float32, where only strips are on the device."""
    meta = random_autoencoder(VAE, "meta")
    meta.autoencoder.to(torch.bfloat16)
    shape = VaeShape(value_bytes=2)
    assert meta.shape == shape
    assert 2 * weight_bytes(shape) == weight_bytes(VaeShape())
    run = {key: value for key, value in way.items() if key != "host_store"}
    if "host_store" in way:
        run["store"] = torch.device("cpu")
    for peak, estimate in ((decode_peak, decode_bytes), (encode_peak, encode_bytes)):
        tracked, foretold = peak(meta, side, side, **run), estimate(shape, side, side, **way)
        if "host_store" in way:
            assert tracked < foretold < 1.6 * tracked
        else:
            assert foretold == pytest.approx(tracked, rel=0.02)


def test_pipeline(load_pipe, shared_pipe):
    narrow = load_pipe(vae_dtype="bfloat16")
    request = golden_request("text") | {"progress": False, "num_inference_steps": 3}
    assert torch.equal(
        narrow(**request, output_type="latent"), shared_pipe(**request, output_type="latent")
    )
    found, expected = (pipe(**request, output_type="pt") for pipe in (narrow, shared_pipe))
    assert 0 < (found - expected).abs().mean() < 0.01
    assert narrow.vae.dtype == torch.bfloat16 and shared_pipe.vae.dtype == torch.float32
    held = [pipe.plan(**request).cost.decode for pipe in (shared_pipe, narrow)]
    one, other = ({term.name: term.bytes for term in terms} for terms in held)
    assert one["VAE"] == 2 * other["VAE"]
    with pytest.raises(RequestError, match="vae_dtype must be bfloat16 or float32, got 'int8'"):
        load_pipe(vae_dtype="int8")
