"""Vae: pixels to latents and back, in float32 or bfloat16."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, VAE_SCALE
from ..config_settings import check_settings, words
from ..errors import CheckpointError, RequestError, brief
from ..images import InputImage, normalized
from ..memory.autoencoder import VaeShape
from ..memory.device import on_host
from ..parallel.group import Group
from ..regular_files import read_json
from ..weights.files import WeightFiles, find_weights, read_tensors
from . import strips
from .bands import Bands

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# the attention block's parameters in earlier versions of diffusers: today's names
_OLD_NAMES = {
    "query.": "to_q.",
    "key.": "to_k.",
    "value.": "to_v.",
    "proj_attn.": "to_out.0.",
}

_STEM = "diffusion_pytorch_model"
_LEVELS = VAE_SCALE.bit_length()  # of resolution
_MAX_CHANNELS = 8192
_MAX_SAMPLE = 1 << 16
_KNOWN = words(
    """
    in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block
    act_fn latent_channels norm_num_groups sample_size scaling_factor shift_factor force_upcast
    use_quant_conv use_post_quant_conv mid_block_add_attention
    """
)
_FIXED = {"latents_mean": (None,), "latents_std": (None,)}
_SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")


class Vae:
    """An AutoencoderKL with the scale and shift of OmniGen's latents."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self._device = self.device
        self._resident = True
        self._scale: float = autoencoder.config["scaling_factor"]
        self._shift: float = autoencoder.config["shift_factor"] or 0.0

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        device: torch.device,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Vae:
        """Reads a folder with `config.json` and `diffusion_pytorch_model.safetensors`.

        Args:
            path: the folder, or a safetensors file in it.
            device: for the weights.
            variant: of the weights' name, where the folder has it.
            dtype: that it computes in.

        Raises:
            CheckpointError: files are missing or malformed, or not OmniGen's kind of VAE.
        """
        folder, files = find_vae(os.fspath(path), variant)
        autoencoder = _empty_autoencoder(read_json(os.path.join(folder, "config.json")), folder)
        expected = {name: tuple(t.shape) for name, t in autoencoder.state_dict().items()}
        tensors = read_tensors(files, dtype, device, rename=_current_name, shapes=expected)
        autoencoder.load_state_dict(tensors, assign=True)
        return cls(autoencoder)

    @classmethod
    def of(cls, given: Any) -> Vae:
        """A VAE as it is given: one of these, or diffusers' `AutoencoderKL`, which becomes float32.

        Raises:
            RequestError: it is neither, or its weights are not there.
            CheckpointError: it is not OmniGen's kind of VAE.
        """
        if isinstance(given, cls):
            return given
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        if not isinstance(given, AutoencoderKL):
            raise RequestError(f"vae must be diffusers' AutoencoderKL, got {type(given).__name__}")
        _check_config(given.config, "the AutoencoderKL")
        if any(weight.is_meta for weight in given.parameters()):
            raise RequestError(
                "the AutoencoderKL's weights are offloaded; give it with its weights"
            )
        for module in given.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                # a copy of those made in inference mode, which can't be used outside
                value = weight.detach().to(torch.float32, copy=weight.is_inference())
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return cls(given)

    @property
    def device(self) -> torch.device:
        return next(self.autoencoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations; pixels and latents are float32 outside."""
        return next(self.autoencoder.parameters()).dtype

    @property
    def config(self) -> Any:
        """diffusers' config of the autoencoder."""
        return self.autoencoder.config

    @property
    def resident(self) -> bool:
        """Whether the weights stay where it computes."""
        return self._resident

    @property
    def shape(self) -> VaeShape:
        """The sizes that its cost depends on."""
        return VaeShape.from_config(self.autoencoder.config, self.dtype.itemsize)

    def to(self, device: torch.device) -> None:
        """Sets the device to compute on. Resident weights move now, others on use (`loaded`)."""
        self._device = device
        if self._resident:
            _move(self.autoencoder, device)

    def enable_slicing(self) -> None:
        """Does nothing: images are always decoded one by one."""

    def disable_slicing(self) -> None:
        """Does nothing: images are always decoded one by one."""

    def enable_tiling(self) -> None:
        """Does nothing: the memory planner decodes in strips where memory is short."""

    def disable_tiling(self) -> None:
        """Does nothing: the memory planner decodes in strips only where memory is short."""

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
            pixels = normalized(image.pixels, self.device).unsqueeze(0).to(self.dtype)
            posterior = self.autoencoder.encode(pixels).latent_dist
        else:
            moments = strips.encode(self.autoencoder, image.pixels, strip_rows, store, recompute)
            posterior = DiagonalGaussianDistribution(moments)
        if self.dtype != torch.float32:
            posterior = DiagonalGaussianDistribution(posterior.parameters.float())
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

        def one(latents: Tensor, image: Tensor) -> None:
            if strip_rows is None:
                image.copy_(self.autoencoder.decode(latents).sample[0])
            else:
                strips.decode(self.autoencoder, latents, image, strip_rows, store, recompute)

        return self._decoded(latents, one)

    @torch.no_grad()
    def decode_in_bands(
        self,
        latents: Tensor,
        group: Group,
        strip_rows: int | None = None,
        *,
        store: torch.device | None = None,
    ) -> Tensor:
        """As `decode`, by ranks that make the same call and decode a band of rows each.

        Args:
            latents: of all pictures; pictures with fewer rows than ranks are decoded by every rank.
            group: the ranks; each gets the whole images.
            strip_rows, store: as for `decode`; None for a band at once.
        """
        height = latents.shape[2]
        if group.size > height:
            return self.decode(latents, strip_rows, store=store)
        bands = Bands(group, height)

        def one(latents: Tensor, image: Tensor) -> None:
            rows = strip_rows or bands.most_rows
            strips.decode(self.autoencoder, latents, image, rows, store, bands=bands)

        return self._decoded(latents, one)

    def _decoded(self, latents: Tensor, decode: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Images of latents, one by one; `decode` writes values of about -1 to 1."""
        latents = latents.to(self.device, torch.float32)
        pictures, _, height, width = latents.shape
        size = pictures, 3, VAE_SCALE * height, VAE_SCALE * width
        images = torch.empty(size, dtype=torch.float32, device=self.device)
        for one, image in zip(latents.split(1), images, strict=True):
            decode((one / self._scale + self._shift).to(self.dtype), image)
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


def find_vae(path: str, variant: str | None = None) -> tuple[str, WeightFiles]:
    """The folder of a VAE and the files with its weights.

    Args:
        path: the folder, or a safetensors file in it.
        variant: of the weights' name; ignored where the folder doesn't have it.
    """
    if os.path.isfile(path):
        return os.path.dirname(path) or ".", WeightFiles((path,))
    named = (f"{_STEM}.{variant}.safetensors", f"{_STEM}.safetensors.index.{variant}.json")
    if not any(os.path.lexists(os.path.join(path, name)) for name in named):
        variant = None
    return path, find_weights(path, _STEM, variant=variant, any_name=True)


def _empty_autoencoder(config: dict[str, Any], folder: str) -> AutoencoderKL:
    """The model that a config describes, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    _check_config(config, folder)
    try:
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)
    except MemoryError:
        raise
    except Exception as error:  # the constructor raises all kinds on a malformed config
        raise CheckpointError(f"{folder}/config.json describes no VAE: {error}") from error


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError unless a config describes OmniGen's kind of VAE."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise CheckpointError(f"{where}: {brief(kind)[1:-1]} is not an AutoencoderKL")
    check_settings(where, config, known=_KNOWN, fixed=_FIXED)
    channels = config.get("block_out_channels")
    if (
        not isinstance(channels, list | tuple)
        or len(channels) != _LEVELS
        or not all(_is_count(one, _MAX_CHANNELS) for one in channels)
        or not _are(config, latent_channels=LATENT_CHANNELS, in_channels=3, out_channels=3)
        or not _is_count(config.get("layers_per_block", 1), 16)
    ):
        sizes = {name: value for name, value in config.items() if name in _KNOWN}
        raise CheckpointError(
            f"{where}: not OmniGen's VAE, which has {LATENT_CHANNELS} latent channels at an "
            f"eighth of the image's size: {brief(sizes)}"
        )
    scale, shift = config.get("scaling_factor", 1), config.get("shift_factor")
    if not _is_number(scale) or not 1e-6 < scale < 1e6:
        raise CheckpointError(
            f"{where}: scaling_factor must be a positive number, got {brief(scale)}"
        )
    if shift is not None and not (_is_number(shift) and abs(shift) < 1e6):
        raise CheckpointError(f"{where}: shift_factor must be a number, got {brief(shift)}")
    sample = config.get("sample_size", 32)
    groups = config.get("norm_num_groups", 32)
    usable = {
        "act_fn": config.get("act_fn", "silu") in ("silu", "swish"),
        "down_block_types": _are_all(config.get("down_block_types"), "DownEncoderBlock2D"),
        "up_block_types": _are_all(config.get("up_block_types"), "UpDecoderBlock2D"),
        "norm_num_groups": _is_count(groups, _MAX_CHANNELS)
        and not any(one % groups for one in channels),
        "sample_size": all(
            _is_count(one, _MAX_SAMPLE)
            for one in (sample if isinstance(sample, list | tuple) and sample else [sample])
        ),
        **{name: isinstance(config.get(name, True), bool) for name in _SWITCHES},
    }
    for name, fits in usable.items():
        if not fits:
            raise CheckpointError(
                f"{where} describes no VAE that OmniGen can have: {name} is "
                f"{brief(config.get(name))}"
            )


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _are(config: Mapping[str, Any], **sizes: int) -> bool:
    """Whether a config has these sizes, which are also the defaults."""
    found = [config.get(name, size) for name, size in sizes.items()]
    return found == list(sizes.values()) and not any(isinstance(one, bool) for one in found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_all(value: Any, kind: str) -> bool:
    return isinstance(value, list | tuple) and list(value) == [kind] * _LEVELS


def _current_name(name: str) -> str:
    """Today's name of a parameter."""
    for old, new in _OLD_NAMES.items():
        if f".attentions.0.{old}" in name:
            return name.replace(old, new)
    return name


def _move(module: nn.Module, device: torch.device) -> None:
    """`module.to(device)`, whose signature diffusers' decorator hides from type checkers."""
    module.to(device)
