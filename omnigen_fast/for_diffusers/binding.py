"""Our transformer over the tensors of a diffusers module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import RequestError
from ..model import Transformer
from ..weights.names import Source, diffusers_sources

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Weights:
    """The model over a module's tensors as they were found."""

    model: Transformer
    signature: tuple  # equal as long as nothing has changed them
    adapted: bool  # some hold an adapter's update
    own_bytes: int  # tensors that are not the module's: weights with adapters in them


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
