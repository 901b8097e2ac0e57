"""Binding: our transformer on the weights of a diffusers module, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import RequestError
from ..linear import Weight
from ..model import Transformer
from ..quantised import QuantisedWeight
from ..weights.checkpoint import is_quantised
from ..weights.names import TensorRows, diffusers_sources

DiffusersTransformer = Any  # OmniGenTransformer2DModel, with attributes that nn.Module doesn't type
_DTYPES = (torch.bfloat16, torch.float32)
_FLOAT8 = torch.float8_e4m3fn  # the storage that diffusers' layerwise casting has by default


@dataclass(frozen=True)
class BoundWeights:
    """Our model on a module's weights."""

    model: Transformer
    signature: tuple  # of the weights, see `weights_signature`
    adapted: bool  # whether adapters change some weights
    own_bytes: int  # of copies: weights with adapters merged in


def bind(transformer: DiffusersTransformer, config: ModelConfig) -> BoundWeights:
    """Builds our model on the module's weights.

    The weights are shared; q, k and v become views of one tensor. Only weights that an adapter
    changes are copies, computed in float32 and rounded once. Matrices of the layers that diffusers'
    layerwise casting keeps in float8_e4m3fn stay so, and are expanded ahead of their products; its
    other float8 weights become copies.

    Raises RequestError for weights that can't be shared; says what to do.
    """
    dtype = transformer.norm.weight.dtype
    if dtype not in _DTYPES:
        raise RequestError(
            f"the transformer is {str(dtype).removeprefix('torch.')}; use bfloat16 or float32 "
            "(float16 overflows in this model and gives black images)"
        )
    device = transformer.norm.weight.device
    weights: dict[str, Weight] = {}
    own_bytes, adapted = 0, False
    with torch.no_grad():
        for name, sources in diffusers_sources(config).items():
            if name == "pos_embed":
                weights[name] = transformer.patch_embedding.pos_embed
                continue
            parts = [_part(transformer, source, dtype, device) for source in sources]
            updated = any(updates for _, updates in parts)
            cast = {parameter.dtype for parameter, _ in parts} != {dtype}
            if updated or (cast and not is_quantised(name)):
                copied = torch.cat([_updated(*part, dtype) for part in parts])
                weights[name] = copied
                own_bytes += copied.nbytes
                adapted |= updated
            elif cast:
                weights[name] = _float8(name, [parameter for parameter, _ in parts])
            elif len(parts) == 1:
                weights[name] = parts[0][0].data
            else:
                weights[name] = _joined([parameter for parameter, _ in parts])
    model = Transformer(config, weights)
    model.expand()
    return BoundWeights(model, weights_signature(transformer), adapted, own_bytes)


def _part(
    transformer: DiffusersTransformer, source: TensorRows, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Parameter, list[Callable[[], Tensor]]]:
    """A parameter of the module, and functions that compute the active adapters' updates."""
    path, _, kind = source.name.rpartition(".")
    layer = module = transformer.get_submodule(path)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    parameter = getattr(module, kind)
    if parameter.dtype not in (dtype, _FLOAT8) or tuple(parameter.shape) != source.shape:
        raise RequestError(
            f"{source.name} is {parameter.dtype} {list(parameter.shape)} instead of {dtype} "
            f"{list(source.shape)}; quantized and mixed-dtype weights are not supported, except "
            "float8_e4m3fn of enable_layerwise_casting"
        )
    if parameter.is_meta or parameter.device != device:
        raise RequestError(
            "the transformer's weights are not all on one device (offloaded layer by layer?); use "
            "enable_model_cpu_offload, or omnigen_fast.OmniGenPipeline, whose memory= streams them"
        )
    return parameter, _updates(layer, source.name) if kind == "weight" else []


def _updates(layer: Any, name: str) -> list[Callable[[], Tensor]]:
    """Functions that compute what PEFT's active adapters add to a layer's weight."""
    if not hasattr(layer, "base_layer"):
        return []
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()  # as the layer's own forward does
        return []
    if layer.merged:
        return []
    known = [set(getattr(layer, names)) for names in layer.adapter_layer_names]
    active = [one for one in layer.active_adapters if any(one in names for names in known)]
    for one in active:
        biased = getattr(layer, "lora_bias", {}).get(one)
        if one in getattr(layer, "lora_variant", {}) or biased:
            raise RequestError(
                f"the adapter {one} of {name} is not plain LoRA (it uses DoRA or a bias); merge it "
                "(merge_and_unload) before enabling"
            )
    return [partial(layer.get_delta_weight, one) for one in active]


def _updated(
    parameter: nn.Parameter, updates: Sequence[Callable[[], Tensor]], dtype: torch.dtype
) -> Tensor:
    """The parameter with all updates added, rounded once."""
    value = parameter.data
    if updates:
        # float32: an update is often below bfloat16's resolution of the weight
        value = value.float()
        for update in updates:
            value = value + update().float()
    return value.to(dtype)


def _float8(name: str, parameters: Sequence[nn.Parameter]) -> QuantisedWeight:
    """The rows of all parameters, shared as they are stored; layerwise casting has no scales."""
    if {parameter.dtype for parameter in parameters} != {_FLOAT8}:
        raise RequestError(f"the parts of {name} differ in dtype; cast all of them or none")
    values = parameters[0].data if len(parameters) == 1 else _joined(parameters)
    scales = torch.ones(len(values), 1, device=values.device)
    return QuantisedWeight("fp8", values.shape[1], {"values": values, "scales": scales})


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parts, which become views of it; reuses an earlier one."""
    first = parts[0].data
    rows = sum(map(len, parts))
    place, together = first.data_ptr(), True
    for part in parts:
        together &= part.data_ptr() == place and part.is_contiguous()
        together &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        place += part.nbytes
    if together:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    joined = first.new_empty(rows, first.shape[1])
    torch.cat([_bits(part.data) for part in parts], out=_bits(joined))
    for part, value in zip(parts, joined.split([len(part) for part in parts])):
        part.data = value
    return joined


def _bits(x: Tensor) -> Tensor:
    """A view that can be copied: few operations take float8."""
    return x.view(torch.uint8) if x.dtype == _FLOAT8 else x


def weights_signature(transformer: DiffusersTransformer) -> tuple:
    """Changes when a weight is replaced, moved, converted or written to, or an adapter changes.

    Writes through `.data` don't change it. Between pictures they don't need to: the weights are
    shared, and nothing computed from them outlives a picture.
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
