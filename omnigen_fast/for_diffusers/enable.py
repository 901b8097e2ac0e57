"""enable: diffusers' own OmniGenPipeline with its transformer's work done by this runtime.

The pipeline's call, scheduler, callbacks and autoencoder stay diffusers'. Each call of its loop
gives the transformer the same condition: the first computes it once for all of the scheduler's
times, the others run the noise tokens alone. The weights are the pipeline's own, held once.
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
from ..denoise import GuidancePlan, Velocity, VelocityOf, cached_velocity
from ..errors import RequestError
from ..images import InputImage
from ..kernels import ops
from ..sequence import EncodedBranch, cache_entries, lay_out_all
from .binding import _bind, _signature
from .conditions import _branches, _one_time, _unfold
from .processor import _processor_class, _provide_processor, _withdraw_processor

_ATTRIBUTE = "_omnigen_fast"  # of a pipeline: its `_Runtime`


def enable(pipe: Any) -> Any:
    """Makes a diffusers `OmniGenPipeline` run on this runtime, with everything of its own kept.

    Given the class instead, makes it usable where torchvision is not installed: call it before
    `from_pretrained`, and `enable` again with the pipeline.

    Args:
        pipe: the pipeline, or the class `diffusers.OmniGenPipeline`. A pipeline that is enabled
            already stays as it is.

    Returns:
        What it was given.

    Raises:
        RequestError: not such a pipeline, or one that can't run here (float16, quantized weights,
            offloaded layer by layer, compiled); says what can.
    """
    if isinstance(pipe, type):
        _check_kind(pipe)
        _provide_processor()
        return pipe
    _check_kind(type(pipe))
    transformer = _inner(pipe.transformer)
    runtime = _runtime(pipe)
    if runtime is not None:
        if runtime.transformer is transformer and runtime.installed:
            return pipe
        disable(pipe)  # it has another transformer now
    if _installed_in(transformer) is not None:
        raise RequestError(
            "the pipeline's transformer is enabled through another pipeline; disable that one first"
        )
    runtime = _Runtime(pipe, transformer)
    runtime.install()
    return pipe


def disable(pipe: Any) -> Any:
    """Gives a pipeline, or the class, back what `enable` has replaced; returns it.

    The weights stay where they are: q, k and v of a layer remain parts of one tensor, which
    changes no value and is nothing that diffusers can tell.
    """
    if isinstance(pipe, type):
        _check_kind(pipe)
        _withdraw_processor()
        return pipe
    _check_kind(type(pipe))
    runtime = _runtime(pipe)
    if runtime is not None:
        runtime.uninstall()
    return pipe


def summary(pipe: Any) -> str:
    """Says what runs in a pipeline, and what its latest pictures took, in a few lines."""
    _check_kind(type(pipe))
    runtime = _runtime(pipe)
    if (
        runtime is None
        or not runtime.installed
        or runtime.transformer is not _inner(pipe.transformer)
    ):
        return "transformer  diffusers' own; omnigen_fast.enable(pipe) makes it run here"
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


def _inner(transformer: nn.Module) -> nn.Module:
    """diffusers' module, also where PEFT has wrapped it."""
    base = getattr(transformer, "get_base_model", None)
    return transformer if base is None else base()


def _forward_name(transformer: nn.Module) -> str:
    """Where a module's forward is: accelerate's hooks have their own in its place and call this."""
    return "_old_forward" if "_old_forward" in transformer.__dict__ else "forward"


def _installed_in(transformer: nn.Module) -> _Runtime | None:
    found = getattr(transformer, _forward_name(transformer))
    owner = getattr(found, "__self__", None)
    return owner if isinstance(owner, _Runtime) else None


@dataclass
class _Loop:
    """One condition on its way through a scheduler's times."""

    given: tuple[Any, ...]  # the arguments that stay the same from call to call
    versions: tuple[int, ...]
    times: dict[float, int]
    plan: GuidancePlan
    velocity: VelocityOf
    cache: ConditionCache
    calls_left: int


class _Runtime:
    """What `enable` puts into a pipeline."""

    def __init__(self, pipe: Any, transformer: nn.Module) -> None:
        self._pipe = pipe
        self.transformer = transformer
        self.installed = False
        side = math.isqrt(transformer.patch_embedding.pos_embed.shape[1])
        self.config = ModelConfig.from_diffusers(dict(transformer.config), side)
        if getattr(transformer, "_compiled_call_impl", None) is not None:
            raise RequestError("the transformer is compiled; enable a pipeline that is not")
        self._weights = _bind(transformer, self.config)
        self._loop: _Loop | None = None
        self._last = ""

    def install(self) -> None:
        """Puts this into the pipeline's places; `uninstall` puts back what was there."""
        pipe, transformer = self._pipe, self.transformer
        self._plain = getattr(transformer, _forward_name(transformer))
        self._own_forward = _forward_name(transformer) in transformer.__dict__
        self._processor = pipe.multimodal_processor
        processor = _processor_class(compact=True)
        pipe.multimodal_processor = processor(
            self._processor.text_tokenizer, self._processor.max_image_size, self.config
        )
        pipe.encode_input_images = self._encode_input_images
        setattr(transformer, _forward_name(transformer), self._forward)
        setattr(pipe, _ATTRIBUTE, self)
        self.installed = True

    def uninstall(self) -> None:
        """See `install`."""
        pipe, transformer = self._pipe, self.transformer
        name = _forward_name(transformer)
        if _installed_in(transformer) is self:
            # hooks that came or went meanwhile have moved it between the two names
            if name == "_old_forward" or self._own_forward:
                setattr(transformer, name, self._plain)
            else:
                del transformer.__dict__[name]
        pipe.multimodal_processor = self._processor
        pipe.__dict__.pop("encode_input_images", None)
        pipe.__dict__.pop(_ATTRIBUTE, None)
        self.installed, self._loop = False, None

    def summary(self) -> str:
        """What `summary` says of an enabled pipeline."""
        model, own = self._weights.model, self._weights.own_bytes
        held = "the pipeline's own, held once"
        if own:
            held += f", but for {own / 1e6:.1f} MB with adapters in them"
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
        """As `OmniGenTransformer2DModel.forward`; the velocities are float32."""
        if torch.is_grad_enabled():  # training
            return self._plain(
                hidden_states,
                timestep,
                input_ids,
                input_img_latents,
                input_image_sizes,
                attention_mask,
                position_ids,
                return_dict,
            )
        time = _one_time(timestep)
        fixed = (input_ids, attention_mask, *input_img_latents)
        given = (*fixed, tuple(hidden_states.shape), hidden_states.device)
        changed = _signature(self.transformer) != self._weights.signature
        loop = self._loop
        if loop is None or changed or time not in loop.times or not _same(loop, given):
            self._loop = loop = None  # frees its memory first
            if changed or self._weights.adapted:
                self._weights = _bind(self.transformer, self.config)
            if input_ids is None or attention_mask is None:
                raise RequestError("input_ids and attention_mask are needed, got None")
            self._check_place(hidden_states)
            branches = _branches(
                self.config,
                input_ids,
                input_img_latents,
                input_image_sizes,
                attention_mask,
                tuple(hidden_states.shape),
            )
            self._loop = loop = self._start(given, branches, hidden_states, time)
        index = torch.tensor([loop.times[time]], device=hidden_states.device)
        (values,) = loop.velocity(hidden_states.float(), loop.plan, index)
        loop.calls_left -= 1
        if loop.calls_left <= 0:
            self._loop = None  # the autoencoder wants the memory
        velocity = _unfold(values.float(), *hidden_states.shape[2:])
        if not return_dict:
            return (velocity,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    def _check_place(self, latents: Tensor) -> None:
        device = self._weights.model.device
        if device != latents.device:
            raise RequestError(
                f"the transformer is on {device} and its input on {latents.device}; move the "
                "pipeline with pipe.to(device)"
            )

    def _start(
        self, given: tuple, branches: list[EncodedBranch], latents: Tensor, time: float
    ) -> _Loop:
        """Computes the condition for all times that the scheduler has announced."""
        model = self._weights.model
        announced = self._pipe.scheduler.timesteps.float().tolist()
        times = [time] if time not in announced else announced[announced.index(time) :]
        calls = len(times)
        distinct = list(dict.fromkeys(times))
        # rows of the same picture stand one guidance branch apart
        kinds = 3 if any(branch.spans for branch in branches) else 2
        apart = len(branches) // kinds if len(branches) % kinds == 0 else len(branches)
        pictures = [branches[first::apart] for first in range(apart)]
        entries = cache_entries(pictures, len(distinct))
        cache = ConditionCache(self.config, model.dtype, model.device, 0)
        cache.reserve(list(entries))
        embedded = model.embed_times(torch.tensor(distinct, device=model.device))
        images = {image.digest: image.latents for one in branches for _, _, image in one.spans}
        sequences = lay_out_all(entries, cache, model.device)
        conditions = [model.embed_condition(one, images, embedded.tokens) for one in sequences]
        model.prefill(sequences, conditions, cache)
        noise_tokens = latents.shape[2] * latents.shape[3] // PATCH**2
        rows = [[(branch, 1.0)] for branch in branches]
        plan = GuidancePlan.make(model, Velocity.of(rows, entries, cache), noise_tokens, None)
        tokens = sum(branch.length for branch in branches)
        self._last = (
            f"{len(branches)} branches of {tokens} condition tokens in all, computed once for "
            f"{len(distinct)} times ({cache.used_rows} rows, {cache.nbytes / 1e6:.1f} MB); "
            f"{noise_tokens} noise tokens each"
        )
        return _Loop(
            given,
            _versions(given),
            {time: index for index, time in enumerate(distinct)},
            plan,
            cached_velocity(model, cache, embedded),
            cache,
            calls,
        )

    def _encode_input_images(
        self,
        input_pixel_values: list[Tensor],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """As the pipeline's method, with each image's own noise, so that a seeded edit repeats.

        Equal images are encoded once.
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
                generator = torch.Generator().manual_seed(int(digest[:15], 16))
                noise = torch.randn(posterior.mean.shape, generator=generator)
                latents = posterior.mean + posterior.std * noise.to(device, dtype)
                encoded[digest] = latents * vae.config.scaling_factor
            result.append(encoded[digest])
        return result


def _versions(given: tuple) -> tuple[int, ...]:
    return tuple(
        one._version for one in given if isinstance(one, Tensor) and not one.is_inference()
    )


def _same(loop: _Loop, given: tuple) -> bool:
    """Whether a call has the very tensors of the loop's first, unchanged."""
    if len(given) != len(loop.given) or _versions(given) != loop.versions:
        return False
    return all(
        mine is theirs if isinstance(mine, Tensor) else mine == theirs
        for mine, theirs in zip(given, loop.given)
    )
