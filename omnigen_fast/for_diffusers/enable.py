"""enable: runs the transformer of diffusers' own OmniGenPipeline on this runtime.

The pipeline's call, scheduler, callbacks and autoencoder stay diffusers'. Its loop passes the same
condition to the transformer in every step: the first step computes it for all of the scheduler's
times, later steps run only the noise tokens. The weights are shared with the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import ConditionCache
from ..config import PATCH, ModelConfig
from ..denoise import CachedVelocity, Loop
from ..errors import RequestError
from ..images import InputImage
from ..kernels import ops
from ..sequence import EncodedBranch, cache_entries, lay_out_all
from ..step_values import PlacedBranch, StepValues
from ..vae.vae import content_noise
from .binding import DiffusersTransformer, bind, weights_signature
from .calls import enabled_class
from .conditions import UnusualCall, call_time, encoded_branches, unfold
from .processor import processor_class, provide_processor, withdraw_processor

_ATTRIBUTE = "_omnigen_fast"  # of an enabled pipeline: its `_Runtime`


def enable(pipe: Any) -> Any:
    """Makes a diffusers `OmniGenPipeline` run its transformer on this runtime.

    With the class instead of a pipeline, makes it usable without torchvision: call
    `enable(OmniGenPipeline)` before `from_pretrained`, then `enable(pipe)`.

    Args:
        pipe: the pipeline, or the class `diffusers.OmniGenPipeline`. An enabled pipeline stays
            unchanged.

    Returns:
        `pipe`.

    Raises:
        RequestError: another kind of object, or a pipeline that can't run here (float16, quantized
            weights, offloaded layer by layer, compiled); says what is supported.
    """
    if isinstance(pipe, type):
        _check_kind(pipe)
        provide_processor()
        return pipe
    _check_kind(type(pipe))
    transformer = _inner(pipe.transformer)
    runtime = _runtime(pipe)
    if runtime is not None:
        if runtime.transformer is transformer and runtime.installed:
            return pipe
        disable(pipe)  # its transformer was replaced
    if _installed_in(transformer) is not None:
        raise RequestError(
            "the pipeline's transformer is enabled through another pipeline; disable that one first"
        )
    runtime = _Runtime(pipe, transformer)
    runtime.install()
    return pipe


def disable(pipe: Any) -> Any:
    """Undoes `enable` for a pipeline or the class; returns it.

    q, k and v of each layer remain views of one tensor, with the same values; diffusers works the
    same with them.
    """
    if isinstance(pipe, type):
        _check_kind(pipe)
        withdraw_processor()
        return pipe
    _check_kind(type(pipe))
    runtime = _runtime(pipe)
    if runtime is not None:
        runtime.uninstall()
    return pipe


def summary(pipe: Any) -> str:
    """Describes in a few lines what runs in a pipeline, and its latest pictures."""
    _check_kind(type(pipe))
    runtime = _runtime(pipe)
    if (
        runtime is None
        or not runtime.installed
        or runtime.transformer is not _inner(pipe.transformer)
    ):
        return "transformer  diffusers' own; omnigen_fast.enable(pipe) runs it on this runtime"
    return runtime.summary()


def _check_kind(kind: type) -> None:
    names = {f"{base.__module__}.{base.__name__}" for base in kind.__mro__}
    if "diffusers.pipelines.omnigen.pipeline_omnigen.OmniGenPipeline" not in names:
        raise RequestError(
            "enable, disable and summary take diffusers' OmniGenPipeline, got "
            f"{kind.__module__}.{kind.__name__}"
        )


def _runtime(pipe: Any) -> _Runtime | None:
    return pipe.__dict__.get(_ATTRIBUTE)


def _inner(transformer: nn.Module) -> DiffusersTransformer:
    """diffusers' module, without PEFT's wrapper if there is one."""
    base = getattr(transformer, "get_base_model", None)
    return transformer if base is None else base()


def _forward_name(transformer: nn.Module) -> str:
    """The attribute with a module's own forward, which accelerate's hooks move."""
    return "_old_forward" if "_old_forward" in transformer.__dict__ else "forward"


def _installed_in(transformer: nn.Module) -> _Runtime | None:
    found = getattr(transformer, _forward_name(transformer))
    owner = getattr(found, "__self__", None)
    return owner if isinstance(owner, _Runtime) else None


@dataclass
class _Loop:
    """One condition and its way through a scheduler's times."""

    fixed: tuple[Any, ...]  # the arguments that stay the same from call to call
    versions: tuple[int, ...]  # of the tensors among them
    times: dict[float, int]  # time: index of its time token
    steps: Loop
    calls_left: int


class _Runtime:
    """This runtime in a pipeline that `enable` has changed."""

    def __init__(self, pipe: Any, transformer: DiffusersTransformer) -> None:
        self._pipe = pipe
        self.transformer = transformer
        self.installed = False
        side = math.isqrt(transformer.patch_embedding.pos_embed.shape[1])
        self.config = ModelConfig.from_diffusers(dict(transformer.config), side)
        if getattr(transformer, "_compiled_call_impl", None) is not None:
            raise RequestError("the transformer is compiled; enable a pipeline that is not")
        self._weights = bind(transformer, self.config)
        self._loop: _Loop | None = None
        self._last = ""

    def install(self) -> None:
        """Replaces forward, processor, image encoding and class; `uninstall` restores them."""
        pipe, transformer = self._pipe, self.transformer
        self._plain = getattr(transformer, _forward_name(transformer))
        self._own_forward = _forward_name(transformer) in transformer.__dict__
        self._processor = pipe.multimodal_processor
        processor = processor_class(compact=True)
        pipe.multimodal_processor = processor(
            self._processor.text_tokenizer, self._processor.max_image_size, self.config
        )
        pipe.encode_input_images = self._encode_input_images
        setattr(transformer, _forward_name(transformer), self._forward)
        setattr(pipe, _ATTRIBUTE, self)
        self._class = pipe.__class__
        pipe.__class__ = enabled_class(self._class)
        self.installed = True

    def uninstall(self) -> None:
        """Undoes `install`."""
        pipe, transformer = self._pipe, self.transformer
        name = _forward_name(transformer)
        if _installed_in(transformer) is self:
            # hooks added or removed in the meantime move it between the two names
            if name == "_old_forward" or self._own_forward:
                setattr(transformer, name, self._plain)
            else:
                del transformer.__dict__[name]
        pipe.multimodal_processor = self._processor
        pipe.__dict__.pop("encode_input_images", None)
        pipe.__dict__.pop(_ATTRIBUTE, None)
        pipe.__class__ = self._class
        self.installed, self._loop = False, None

    def summary(self) -> str:
        """The text of `summary`."""
        model, own = self._weights.model, self._weights.own_bytes
        held = "shared with the pipeline"
        if own:
            held += f", except {own / 1e6:.1f} MB with adapters merged in"
        lines = [
            f"transformer  omnigen_fast, {str(model.dtype).removeprefix('torch.')} on "
            f"{model.device}",
            f"kernels      {'Triton' if ops.capturable(model.device) else 'plain PyTorch'}",
            f"weights      {held}",
            "loop         diffusers' own: scheduler, callbacks, autoencoder",
            f"latest       {self._last or 'nothing yet'}",
        ]
        return "\n".join(lines)

    def _forward(
        self,
        hidden_states: Tensor,
        timestep: int | float | Tensor,
        input_ids: Tensor | None,
        input_img_latents: Sequence[Tensor],
        input_image_sizes: Mapping[int, Sequence[Sequence[int]]],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        return_dict: bool = True,
    ) -> Any:
        """Replaces `OmniGenTransformer2DModel.forward`; velocities are float32."""
        own = (
            hidden_states,
            timestep,
            input_ids,
            input_img_latents,
            input_image_sizes,
            attention_mask,
            position_ids,
            return_dict,
        )
        if torch.is_grad_enabled():  # training
            return self._plain(*own)
        tensors = (input_ids, attention_mask, *input_img_latents)
        fixed = (*tensors, tuple(hidden_states.shape), hidden_states.device)
        try:
            time = call_time(timestep)
            loop = self._loop_of(fixed, time, hidden_states, input_img_latents, input_image_sizes)
        except UnusualCall:
            if attention_mask is None or attention_mask.ndim != 3:
                raise  # diffusers' own forward takes its own masks alone
            self._last = "diffusers' own forward: the call is not one of OmniGen's pipeline"
            return self._plain(*own)
        values = loop.steps.values
        values.latents.copy_(hidden_states)
        values.seek(loop.times[time])
        found = loop.steps.predict()
        loop.calls_left -= 1
        if loop.calls_left <= 0:
            self._loop = None  # frees its memory for the autoencoder
        velocity = unfold(found.float(), *hidden_states.shape[2:])
        if not return_dict:
            return (velocity,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    def _loop_of(
        self,
        fixed: tuple[Any, ...],
        time: float,
        latents: Tensor,
        image_latents: Sequence[Tensor],
        image_sizes: Mapping[int, Sequence[Sequence[int]]],
    ) -> _Loop:
        """The loop that a call belongs to, or a new one."""
        input_ids, attention_mask = fixed[:2]
        changed = weights_signature(self.transformer) != self._weights.signature
        loop = self._loop
        if loop is not None and not changed and time in loop.times and _same(loop, fixed):
            return loop
        self._loop = loop = None  # frees its memory first
        if changed or self._weights.adapted:
            self._weights = bind(self.transformer, self.config)
        if input_ids is None or attention_mask is None:
            raise RequestError("input_ids and attention_mask are required, got None")
        self._check_place(latents)
        branches, images = encoded_branches(
            self.config, input_ids, image_latents, image_sizes, attention_mask, tuple(latents.shape)
        )
        self._loop = self._start(fixed, branches, images, latents, time)
        return self._loop

    def _check_place(self, latents: Tensor) -> None:
        device = self._weights.model.device
        if device != latents.device:
            raise RequestError(
                f"the transformer is on {device} and its input on {latents.device}; move the "
                "pipeline with pipe.to(device)"
            )

    def _start(
        self,
        fixed: tuple[Any, ...],
        branches: list[EncodedBranch],
        images: dict[str, Tensor],
        latents: Tensor,
        time: float,
    ) -> _Loop:
        """Computes the condition for all remaining times of the scheduler."""
        model = self._weights.model
        scheduled = self._pipe.scheduler.timesteps.float().tolist()
        times = [time] if time not in scheduled else scheduled[scheduled.index(time) :]
        distinct = list(dict.fromkeys(times))
        # diffusers orders rows by guidance branch, then by picture
        kinds = 3 if any(branch.spans for branch in branches) else 2
        apart = len(branches) // kinds if len(branches) % kinds == 0 else len(branches)
        pictures = [branches[first::apart] for first in range(apart)]
        entries = cache_entries(pictures, len(distinct))
        cache = ConditionCache(self.config, model.dtype, model.device, 0)
        cache.reserve(list(entries))
        embedded = model.embed_times(
            torch.tensor(distinct, dtype=torch.float32, device=model.device)
        )
        sequences = lay_out_all(entries, cache, model.device)
        model.prefill(sequences, images, embedded.tokens, cache)
        noise_tokens = latents.shape[2] * latents.shape[3] // PATCH**2
        rows = [[(branch, 1.0)] for branch in branches]
        values = StepValues.make(
            model,
            PlacedBranch.of(rows, entries, cache),
            torch.empty_like(latents, dtype=torch.float32),
            torch.zeros(
                len(distinct), dtype=torch.float32, device=model.device
            ),  # the scheduler takes the steps
            embedded,
        )
        steps = Loop(model, values, CachedVelocity(model, cache, len(values.slots)))
        tokens = sum(branch.length for branch in branches)
        self._last = (
            f"{len(branches)} branches with {tokens} condition tokens in total, computed once for "
            f"{len(distinct)} times ({cache.used_rows} rows, {cache.nbytes / 1e6:.1f} MB); "
            f"{noise_tokens} noise tokens each"
        )
        return _Loop(
            fixed=fixed,
            versions=_versions(fixed),
            times={time: index for index, time in enumerate(distinct)},
            steps=steps,
            calls_left=len(times),
        )

    def _encode_input_images(
        self,
        input_pixel_values: list[Tensor],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Replaces the pipeline's method; noise is seeded by each image's content, as in `Vae`.

        So seeded edits are repeatable. Equal images are encoded once.
        """
        vae = self._pipe.vae
        device, dtype = device or self._pipe._execution_device, dtype or vae.dtype
        encoded: dict[str, Tensor] = {}
        result = []
        for values in input_pixel_values:
            pixels = ((values[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            digest = InputImage(pixels.permute(1, 2, 0).cpu().numpy()).digest
            if digest not in encoded:
                posterior = vae.encode(values.to(device, dtype)).latent_dist
                noise = content_noise(digest, posterior.mean.shape)
                latents = posterior.mean + posterior.std * noise.to(device, dtype)
                encoded[digest] = latents * vae.config.scaling_factor
            result.append(encoded[digest])
        return result


def _versions(fixed: tuple[Any, ...]) -> tuple[int, ...]:
    """How often each tensor was written to."""
    return tuple(
        one._version for one in fixed if isinstance(one, Tensor) and not one.is_inference()
    )


def _same(loop: _Loop, fixed: tuple[Any, ...]) -> bool:
    """Whether a call has the same tensors as the loop's first, unchanged."""
    if len(fixed) != len(loop.fixed) or _versions(fixed) != loop.versions:
        return False
    return all(
        mine is theirs if isinstance(mine, Tensor) else mine == theirs
        for mine, theirs in zip(fixed, loop.fixed)
    )
