"""Vae: pixels to latents and back, always in float32."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, VAE_SCALE
from ..errors import CheckpointError
from ..images import InputImage, normalized
from ..memory.autoencoder import VaeShape
from ..memory.device import on_host
from ..weights.files import find_weights, read_json, read_tensors
from . import strips

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# the attention block's parameters in earlier versions of diffusers: today's names
_OLD_NAMES = {
    "query.": "to_q.",
    "key.": "to_k.",
    "value.": "to_v.",
    "proj_attn.": "to_out.0.",
}


class Vae:
    """An AutoencoderKL with the scale and shift of OmniGen's latents."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self._device = self.device
        self._resident = True
        self._scale: float = autoencoder.config["scaling_factor"]
        self._shift: float = autoencoder.config["shift_factor"] or 0.0

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], device: torch.device) -> Vae:
        """Reads a folder with `config.json` and `diffusion_pytorch_model.safetensors`.

        Raises:
            CheckpointError: files are missing or malformed, or not OmniGen's kind of VAE.
        """
        config = read_json(os.path.join(folder, "config.json"))
        paths = find_weights(os.fspath(folder), "diffusion_pytorch_model")
        autoencoder = _empty_autoencoder(config, folder)
        expected = {name: tuple(t.shape) for name, t in autoencoder.state_dict().items()}
        tensors = read_tensors(paths, torch.float32, device, rename=_current_name, shapes=expected)
        autoencoder.load_state_dict(tensors, assign=True)
        return cls(autoencoder)

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    @property
    def resident(self) -> bool:
        """Whether the weights stay where it computes."""
        return self._resident

    @property
    def shape(self) -> VaeShape:
        """The sizes that its cost depends on."""
        return VaeShape.from_config(self.autoencoder.config)

    def to(self, device: torch.device) -> None:
        """Sets the device to compute on. Resident weights move now, others on use (`loaded`)."""
        self._device = device
        if self._resident:
            _move(self.autoencoder, device)

    def place(self, resident: bool) -> None:
        """Keeps the weights on the device, or on the host outside `loaded`."""
        if resident != self._resident:
            self._resident = False
            try:
                _move(self.autoencoder, self._device if resident else torch.device("cpu"))
            except BaseException:
                _move(self.autoencoder, torch.device("cpu"))  # some of it may have moved
                raise
            self._resident = resident

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Has the weights on the device inside the block."""
        if self._resident or on_host(self._device):
            yield
            return
        kept = {parameter: parameter.data for parameter in self.autoencoder.parameters()}
        try:
            for parameter, value in kept.items():
                parameter.data = value.to(self._device)
            yield
        finally:  # weights don't change, so nothing is copied back
            for parameter, value in kept.items():
                parameter.data = value

    @torch.no_grad()
    def encode(
        self,
        image: InputImage,
        strip_rows: int | None = None,
        *,
        store: torch.device | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Latents [4, height / 8, width / 8], float32.

        Drawn from the posterior as in the original, but with noise seeded by the image's content:
        an image has the same latents in every request, whatever its seed. So a seeded edit is
        repeatable, and the condition can be kept.

        Args:
            strip_rows, store, recompute: as for `decode`.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        if strip_rows is None:
            pixels = normalized(image.pixels, self.device).unsqueeze(0)
            posterior = self.autoencoder.encode(pixels).latent_dist
        else:
            posterior = DiagonalGaussianDistribution(
                strips.encode(self.autoencoder, image.pixels, strip_rows, store, recompute)
            )
        noise = content_noise(image.digest, posterior.mean.shape).to(self.device)
        latents = posterior.mean + posterior.std * noise
        return ((latents - self._shift) * self._scale)[0]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        strip_rows: int | None = None,
        *,
        store: torch.device | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Images [pictures, 3, height, width] in [0, 1] of latents [pictures, 4, ...], float32.

        Decodes one picture at a time: it takes the memory of one, and batches change no value.

        Args:
            strip_rows: rows of latents to process at once; None for the whole image. Images match
                up to floating-point rounding.
            store: where to keep the strips; by default with the weights. On the host, a GPU needs
                memory for only a few strips.
            recompute: keep half as much and compute about a third more.

        Raises:
            RequestError: `strip_rows` is less than 1, or strips don't support the autoencoder's
                structure.
        """
        latents = latents.to(self.device, torch.float32)
        pictures, _, height, width = latents.shape
        size = pictures, 3, VAE_SCALE * height, VAE_SCALE * width
        images = torch.empty(size, dtype=torch.float32, device=self.device)
        for one, image in zip(latents.split(1), images, strict=True):
            if strip_rows is None:
                image.copy_(self.autoencoder.decode(one / self._scale + self._shift).sample[0])
            else:
                one = one / self._scale + self._shift
                strips.decode(self.autoencoder, one, image, strip_rows, store, recompute)
            image.mul_(0.5).add_(0.5).clamp_(0, 1)
        return images


def content_noise(digest: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 on the host, seeded by an image's content.

    Args:
        digest: of the image, see `InputImage.digest`.
        shape: of the noise.
    """
    generator = torch.Generator("cpu").manual_seed(int(digest[:15], 16))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _empty_autoencoder(config: dict[str, Any], folder: str | os.PathLike[str]) -> AutoencoderKL:
    """The model that a config describes, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    channels = config.get("block_out_channels")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointError(f"{folder}: {config['_class_name']} is not an AutoencoderKL")
    if (
        not isinstance(channels, list)
        or len(channels) != VAE_SCALE.bit_length()
        or config.get("latent_channels") != LATENT_CHANNELS
        or (config.get("in_channels", 3), config.get("out_channels", 3)) != (3, 3)
        or not all(isinstance(c, int) and 0 < c <= 8192 for c in channels)
        or config.get("layers_per_block", 1) not in range(1, 17)
    ):
        raise CheckpointError(
            f"{folder}: not OmniGen's VAE, which has {LATENT_CHANNELS} latent channels at an "
            f"eighth of the image's size: {json.dumps(config)[:200]}"
        )
    scale, shift = config.get("scaling_factor", 1), config.get("shift_factor") or 0
    if not isinstance(scale, int | float) or not 1e-6 < scale < 1e6:
        raise CheckpointError(f"{folder}: scaling_factor must be a positive number, got {scale!r}")
    if not isinstance(shift, int | float) or not abs(shift) < 1e6:
        raise CheckpointError(f"{folder}: shift_factor must be a number, got {shift!r}")
    try:
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)
    except Exception as error:  # the constructor raises all kinds on a malformed config
        raise CheckpointError(f"{folder}/config.json describes no VAE: {error}") from error


def _current_name(name: str) -> str:
    """Today's name of a parameter."""
    for old, new in _OLD_NAMES.items():
        if f".attentions.0.{old}" in name:
            return name.replace(old, new)
    return name


def _move(module: nn.Module, device: torch.device) -> None:
    """`module.to(device)`, whose signature diffusers' decorator hides from type checkers."""
    module.to(device)
