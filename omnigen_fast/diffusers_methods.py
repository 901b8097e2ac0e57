"""DiffusersMethods: attributes and methods that diffusers gives every pipeline."""

from __future__ import annotations

import inspect
import io
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .config import VAE_SCALE
from .engine import Engine
from .equivalents import FIXED_SCHEDULE, Equivalents, named_arguments, own_names
from .errors import RequestError, first_line
from .model import Transformer
from .request import DEFAULT_SIDE, Request
from .saving import save
from .surroundings import isolated

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

_Pipeline = TypeVar("_Pipeline", bound="DiffusersMethods")
_DEFAULT_STEPS = 50


class DiffusersMethods(Equivalents):
    """What scripts and callbacks written for diffusers' pipelines read and call."""

    engine: Engine
    _latest: Request | None  # of the running or the latest call
    _bar: Mapping[str, Any]  # arguments of tqdm
    _offload_model: bool | None

    @abstractmethod
    def _exclusive(self) -> AbstractContextManager[None]:
        """One call or change at a time."""

    @abstractmethod
    def to(self, *where: Any, device: Any = None, dtype: Any = None) -> Any:
        """Moves everything to a device."""

    @property
    def transformer(self) -> Transformer:
        """The same as `model`."""
        return self.engine.model

    @property
    def name_or_path(self) -> str:
        """The folder that the weights come from."""
        return self.engine.checkpoint.folder

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, in each direction."""
        return VAE_SCALE

    @property
    def default_sample_size(self) -> int:
        """Latents per side where a call gives no height and width."""
        return DEFAULT_SIDE // VAE_SCALE

    @property
    def tokenizer_max_length(self) -> int:
        """Positions of the model, which prompt and picture share."""
        return self.engine.config.max_position_embeddings

    @property
    def num_timesteps(self) -> int:
        """Steps of the running or the latest call; 0 before the first."""
        return 0 if self._latest is None else self._latest.steps

    @property
    def guidance_scale(self) -> float | None:
        """That of the running or the latest call; None before the first."""
        return None if self._latest is None else self._latest.guidance.text

    _num_timesteps = num_timesteps
    _guidance_scale = guidance_scale

    @property
    def _execution_device(self) -> torch.device:
        return self.engine.device

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return ["latents"]

    @property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A new diffusers scheduler that describes the steps; what is set in it is used nowhere.

        Its `timesteps` are those of the running or the latest call.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True)
        steps = self.num_timesteps or _DEFAULT_STEPS
        given = None if self._latest is None else self._latest.times
        times = [step / steps for step in range(steps + 1)] if given is None else given
        scheduler.set_timesteps(sigmas=[1 - time for time in times[:-1]])
        scheduler.set_shift = _no_shift
        return scheduler

    @classmethod
    def from_pipe(cls: type[_Pipeline], pipeline: Any, **changes: Any) -> _Pipeline:
        """The pipeline itself: one does all tasks.

        Raises RequestError for another kind of pipeline, or changes.
        """
        if isinstance(pipeline, cls) and not changes:
            return pipeline
        raise RequestError(
            "from_pipe returns a pipeline of this package as it is; pass diffusers' "
            "OmniGenPipeline to omnigen_fast.enable, or load its folder with from_pretrained"
        )

    @isolated
    @named_arguments
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes a model folder that `from_pretrained` loads again, whole or not at all.

        It has the layout that the model was loaded from. Weights are saved in the pipeline's dtype,
        with active and fused LoRAs merged in.

        Args:
            save_directory: a new or empty folder, or one saved before, which is replaced.

        Raises:
            RequestError: the folder holds other files, or the pipeline was loaded from it.
            OmniGenError: it can't be written.
        """
        with self._exclusive():
            self.engine.refresh()
            save(self.engine, save_directory)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Sets the arguments of the progress bar, such as `disable=True`, instead of earlier ones.

        Args:
            config: arguments of tqdm, other than `iterable` and `total`.

        Raises:
            RequestError: tqdm doesn't take them.
        """
        from tqdm import tqdm

        from .progress import Bar

        signature = inspect.signature(tqdm.__init__)
        own = [one for name, one in signature.parameters.items() if name not in _BAR_OWN]
        signature = signature.replace(parameters=own)
        config = own_names("set_progress_bar_config", signature, (), config)
        try:
            with Bar(total=1, **{**config, "disable": False, "file": io.StringIO()}):
                pass
        except Exception as error:  # tqdm checks nothing: whatever fails first
            raise RequestError(f"the progress bar can't use these: {first_line(error)}") from error
        self._bar = config

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Later calls stream all layers from the host.

        Args:
            gpu_id: of the GPU to compute on; None for the pipeline's device.
            device: likewise, any device.

        Raises:
            RequestError: a device that can't be used.
        """
        if gpu_id is not None:
            device = f"{'cuda' if device is None else torch.device(device).type}:{gpu_id}"
        if device is not None:
            self.to(device)
        self._offload_model = True

    def disable_model_cpu_offload(self) -> None:
        """The original's switch: later calls keep all layers on the device."""
        self._offload_model = False

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """The same as `enable_model_cpu_offload`, which streams layer by layer already."""
        self.enable_model_cpu_offload(gpu_id, device)

    @property
    def model_cpu_offload(self) -> bool:
        """The original's attribute: whether all layers are streamed on demand of the caller."""
        return bool(self._offload_model)

    def enable_vae_slicing(self) -> None:
        """Does nothing: images are always decoded one by one."""

    def disable_vae_slicing(self) -> None:
        """Does nothing: images are always decoded one by one."""

    def enable_vae_tiling(self) -> None:
        """Does nothing: the memory planner decodes in strips where memory is short."""

    def disable_vae_tiling(self) -> None:
        """Does nothing: the memory planner decodes in strips only where memory is short."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Does nothing: attention never stores its matrix of scores."""

    def disable_attention_slicing(self) -> None:
        """Does nothing: attention never stores its matrix of scores."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Does nothing: attention never stores its matrix of scores."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does nothing: attention never stores its matrix of scores."""


def _no_shift(shift: float) -> None:
    raise RequestError(f"a shift of {shift} can't be set; {FIXED_SCHEDULE}")


_BAR_OWN = ("self", "iterable", "total", "kwargs")  # arguments of tqdm that a call sets
