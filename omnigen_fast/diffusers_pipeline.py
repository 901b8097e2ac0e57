"""enable: diffusers' own OmniGenPipeline with its transformer's work done by this runtime.

The pipeline's call, scheduler, callbacks and autoencoder stay diffusers'. Each call of its loop
gives the transformer the same condition: the first computes it once for all of the scheduler's
times, the others run the noise tokens alone. The weights are the pipeline's own, held once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cache import ConditionCache
from .checkpoint import Source, diffusers_sources
from .config import PATCH, TOKEN_PIXELS, VAE_SCALE, ModelConfig
from .denoise import GuidancePlan, Velocity, VelocityOf, cached_velocity
from .errors import RequestError
from .images import InputImage, read_image
from .kernels import ops
from .model import Transformer
from .processor import EncodedBranch, cache_entries, lay_out_all

_ATTRIBUTE = "_omnigen_fast"  # of a pipeline: its `_Runtime`
_DTYPES = (torch.bfloat16, torch.float32)


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


@dataclass(frozen=True)
class _GivenImage:
    """An input image as diffusers' loop hands it over; stands where `InputImage` does."""

    latents: Tensor  # [4, height / 8, width / 8]
    digest: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return VAE_SCALE * self.latents.shape[1], VAE_SCALE * self.latents.shape[2]


@dataclass(frozen=True)
class _Weights:
    """The model over a module's tensors as they were found."""

    model: Transformer
    signature: tuple  # equal as long as nothing has changed them
    adapted: bool  # some hold an adapter's update
    own_bytes: int  # tensors that are not the module's: weights with adapters in them


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


def _one_time(timestep: int | float | Tensor) -> float:
    """The time of a call: that of all its rows."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.float().flatten().tolist())
    if len(values) != 1:
        raise RequestError(f"all rows of a call must have one time, got {sorted(values)}")
    return values.pop()


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


def _branches(
    config: ModelConfig,
    input_ids: Tensor,
    image_latents: Sequence[Tensor],
    image_sizes: Mapping[int, Sequence[Sequence[int]]],
    mask: Tensor,
    latent_shape: tuple[int, ...],
) -> list[EncodedBranch]:
    """The condition of every row, its padding left out.

    Args:
        config: sizes of the model.
        input_ids: [rows, tokens], padded on the left.
        image_latents: of all rows' images, row by row.
        image_sizes: first and past-the-last token of each image, by row.
        mask: diffusers' [rows, T, T], or [rows, tokens]: how many tokens each sees, 0 for padding.
        latent_shape: of the call.
    """
    rows, tokens = input_ids.shape
    height, width = latent_shape[2] // PATCH, latent_shape[3] // PATCH
    noise_tokens = height * width
    if latent_shape[0] != rows or max(height, width) > config.pos_embed_size:
        raise RequestError(
            f"latents {list(latent_shape)} for {rows} rows of tokens; as many rows are needed, and "
            f"at most {config.max_image_side} pixels a side"
        )
    if mask.ndim == 3:
        mask = _kv_ends(mask, tokens, noise_tokens)
    ids, ends = input_ids.cpu().numpy(), mask.to(torch.int32).cpu().numpy()
    images = iter(image_latents)
    spans: dict[int, list[tuple[int, int, Any]]] = {}
    for row, places in image_sizes.items():
        for first, stop in places:
            spans.setdefault(row, []).append((first, stop, _given_image(next(images))))
    branches = []
    for row in range(rows):
        padding = int((ends[row] == 0).sum())
        length = tokens - padding
        if length + 1 + noise_tokens > config.max_position_embeddings:
            raise RequestError(
                f"{length} tokens with {noise_tokens} for the picture are more than the model's "
                f"{config.max_position_embeddings} positions"
            )
        placed = tuple((a - padding, b - padding, image) for a, b, image in spans.get(row, ()))
        token_ids, kv_end = ids[row, padding:].astype(np.int64), ends[row, padding:].copy()
        long = config.uses_long_factor(length + 1 + noise_tokens)
        shown = tuple((a, b, image.digest, image.size) for a, b, image in placed)
        key = (token_ids.tobytes(), kv_end.tobytes(), shown, long)
        branches.append(EncodedBranch(token_ids, kv_end, placed, long, key))
    return branches


def _given_image(latents: Tensor) -> _GivenImage:
    content = latents[0].float().cpu().numpy()
    digest = hashlib.blake2b(repr(content.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(content))
    return _GivenImage(latents[0], digest.hexdigest())


def _kv_ends(mask: Tensor, tokens: int, noise_tokens: int) -> Tensor:
    """[rows, tokens], int32: how many tokens of its own row each sees, 0 for padding.

    Raises:
        RequestError: a mask that OmniGen's rules do not make.
    """
    seen = mask[:, -1, :tokens].bool()  # a noise token sees all but the padding
    places = torch.arange(tokens, device=mask.device)
    length = seen.sum(1)
    padding = tokens - length
    block = mask[:, :tokens, :tokens].bool() & seen[:, :, None]
    ends = block.sum(2)
    prefix = (places - padding[:, None])[:, None, :] < ends[:, :, None]
    wrong = (
        mask.shape[1:] != (tokens + 1 + noise_tokens,) * 2
        or not torch.equal(seen, places >= padding[:, None])
        or not torch.equal(block, prefix & seen[:, :, None] & seen[:, None, :])
        or (seen & (ends == 0)).any()
        or not torch.equal(mask[:, tokens, :tokens].bool(), seen)
        or not mask[:, tokens:, tokens].all()
        or mask[:, tokens, tokens + 1 :].any()
        or (mask[:, :tokens, tokens:].bool() & seen[:, :, None]).any()
        or not torch.equal(
            mask[:, tokens + 1 :, :tokens].bool(),
            seen[:, None, :].expand(-1, noise_tokens, -1),
        )
        or not mask[:, tokens + 1 :, tokens + 1 :].all()
    )
    if wrong:
        raise RequestError(
            f"an attention mask {list(mask.shape)} that is not OmniGen's; give the one that "
            "the pipeline's own processor makes"
        )
    return ends.to(torch.int32)


def _unfold(values: Tensor, height: int, width: int) -> Tensor:
    """[rows, 4, height, width] of patches [rows, N, 16], each (row, column, channel)."""
    patches = values.unflatten(1, (height // PATCH, width // PATCH))
    patches = patches.unflatten(3, (PATCH, PATCH, -1)).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(values), -1, height, width)


def _bind(transformer: nn.Module, config: ModelConfig) -> _Weights:
    """Our model over the module's tensors.

    Nothing is held twice: q, k and v become parts of one tensor. Only weights that an adapter
    changes are copies, computed in float32 and rounded once.
    """
    dtype = transformer.norm.weight.dtype
    if dtype not in _DTYPES:
        raise RequestError(
            f"the transformer is {str(dtype).removeprefix('torch.')}; use bfloat16 or float32 "
            "(float16 overflows in this model and gives black images)"
        )
    device = transformer.norm.weight.device
    weights: dict[str, Tensor] = {}
    own_bytes, adapted = 0, False
    with torch.no_grad():
        for name, sources in diffusers_sources(config).items():
            if name == "pos_embed":
                weights[name] = transformer.patch_embedding.pos_embed
                continue
            parts = [_part(transformer, source, dtype, device) for source in sources]
            if any(updates for _, updates in parts):
                weights[name] = torch.cat([_updated(*part) for part in parts])
                own_bytes += weights[name].nbytes
                adapted = True
            elif len(parts) == 1:
                weights[name] = parts[0][0].data
            else:
                weights[name] = _joined([parameter for parameter, _ in parts])
    model = Transformer(config, weights)
    return _Weights(model, _signature(transformer), adapted, own_bytes)


def _part(
    transformer: nn.Module, source: Source, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Parameter, list[Callable[[], Tensor]]]:
    """A parameter of the module, and what gives the updates that adapters add to it now."""
    path, _, kind = source.name.rpartition(".")
    layer = module = transformer.get_submodule(path)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    parameter = getattr(module, kind)
    if parameter.dtype != dtype or tuple(parameter.shape) != source.shape:
        raise RequestError(
            f"{source.name} is {parameter.dtype} {list(parameter.shape)} instead of {dtype} "
            f"{list(source.shape)}; quantized or mixed weights can't run here"
        )
    if parameter.is_meta or parameter.device != device:
        raise RequestError(
            "the transformer's weights are not all on one device (offloaded layer by layer?); use "
            "enable_model_cpu_offload, or omnigen_fast.OmniGenPipeline, whose memory= streams them"
        )
    return parameter, _updates(layer, source.name) if kind == "weight" else []


def _updates(layer: nn.Module, name: str) -> list[Callable[[], Tensor]]:
    """What PEFT's active adapters add to a layer's weight."""
    if not hasattr(layer, "base_layer"):
        return []
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()  # as its own forward would
        return []
    if layer.merged:
        return []
    known = [set(getattr(layer, names)) for names in layer.adapter_layer_names]
    active = [one for one in layer.active_adapters if any(one in names for names in known)]
    for one in active:
        biased = getattr(layer, "lora_bias", {}).get(one)
        if one in getattr(layer, "lora_variant", {}) or biased:
            raise RequestError(
                f"the adapter {one} of {name} is more than a sum of two products (DoRA, a bias); "
                "merge it (merge_and_unload) before enabling"
            )
    return [lambda one=one: layer.get_delta_weight(one) for one in active]


def _updated(parameter: nn.Parameter, updates: Sequence[Callable[[], Tensor]]) -> Tensor:
    value = parameter.data
    if updates:
        # float32: an update is often below bfloat16's resolution of the weight
        value = value.float()
        for update in updates:
            value = value + update().float()
    return value.to(parameter.dtype)


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of the parts' rows, of which they become views; it may exist already."""
    first = parts[0].data
    rows = sum(map(len, parts))
    place, together = first.data_ptr(), True
    for part in parts:
        together &= part.data_ptr() == place and part.is_contiguous()
        together &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        place += part.nbytes
    if together:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    joined = torch.cat([part.data for part in parts])
    for part, value in zip(parts, joined.split([len(part) for part in parts])):
        part.data = value
    return joined


def _signature(transformer: nn.Module) -> tuple:
    """Differs when a weight was replaced, moved, converted or written to, or an adapter changed.

    Writes through `.data` go unnoticed, and need not be noticed between pictures: the weights are
    shared, and nothing that is computed from them outlives a picture.
    """
    tensors = tuple(
        (one.data_ptr(), 0 if one.is_inference() else one._version, one.dtype, one.device)
        for one in transformer.parameters()
    )
    adapters = tuple(
        (
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            module.disable_adapters,
            tuple(getattr(module, "scaling", {}).items()),
        )
        for module in transformer.modules()
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters")
    )
    return tensors, adapters


@lru_cache(maxsize=2)
def _processor_class(compact: bool) -> type:
    """diffusers' processor with this project's reading of images, so without torchvision.

    `compact`: its attention mask is [rows, tokens], see `_branches`, not quadratic.
    """
    from diffusers.pipelines.omnigen.processor_omnigen import (
        OmniGenCollator,
        OmniGenMultiModalProcessor,
    )

    class Collator(OmniGenCollator):
        def create_mask(self, attention_mask: Tensor, num_tokens_for_output_images: list) -> tuple:
            kv_end = attention_mask.cumsum(1) * attention_mask
            return kv_end, [None] * len(attention_mask)

        def adjust_attention_for_input_images(self, attention_mask: Tensor, image_sizes: dict):
            for row, places in image_sizes.items():
                for first, stop in places:
                    attention_mask[row, first:stop] = attention_mask[row, stop - 1].clone()
            return attention_mask

        def create_position(self, attention_mask: Tensor, num_tokens_for_output_images: list):
            return (attention_mask.cumsum(1) - 1).clamp(min=0)

    class Processor(OmniGenMultiModalProcessor):
        def __init__(
            self, text_tokenizer: Any, max_image_size: int = 1024, config: ModelConfig | None = None
        ) -> None:
            self.text_tokenizer = text_tokenizer
            self.max_image_size = max_image_size
            # 192: the released model's
            self._max_side = TOKEN_PIXELS * 192 if config is None else config.max_image_side
            self.collator = Collator() if compact else OmniGenCollator()

        def reset_max_image_size(self, max_image_size: int) -> None:
            self.max_image_size = max_image_size

        def process_image(self, image: Any) -> Tensor:
            found = read_image(image, self.max_image_size, self._max_side, "an input image")
            pixels = torch.from_numpy(found.pixels).to(torch.float32)
            return pixels.permute(2, 0, 1) / 255 * 2 - 1

    return Processor


def _provide_processor() -> None:
    """Gives diffusers' module the name that it lacks without torchvision."""
    from diffusers.pipelines.omnigen import pipeline_omnigen

    if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
        pipeline_omnigen.OmniGenMultiModalProcessor = _processor_class(compact=False)


def _withdraw_processor() -> None:
    from diffusers.pipelines.omnigen import pipeline_omnigen

    found = getattr(pipeline_omnigen, "OmniGenMultiModalProcessor", None)
    if found is _processor_class(compact=False):
        del pipeline_omnigen.OmniGenMultiModalProcessor
