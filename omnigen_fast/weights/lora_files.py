"""LoRAs as others write them: PEFT, diffusers, kohya and ComfyUI; files, hub ids, state dicts.

They differ in names and in how an update is scaled:

    writer      names                                           scale
    PEFT        base_model.model.MODULE.lora_A.weight           adapter_config.json
    diffusers   transformer.MODULE.lora_A.weight                metadata or MODULE.alpha, else 1
    ComfyUI     diffusion_model.MODULE.lora_A or lora_down      MODULE.alpha, else 1
    kohya       lora_unet_MODULE_WITH_UNDERSCORES.lora_down     MODULE.alpha, else 1
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .lora import MAX_SCALE, Adapter, LowRank
from .lora_scale import scale_of
from .lora_sources import Contents, Stored, open_lora, shape_text, shown, some
from .names import DIFFUSERS, ORIGINAL, layout_sources

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "_orig_mod.")
_FLAT = re.compile(r"(?:lora_unet_|lora_transformer_|lycoris_)(?:transformer_|diffusion_model_)?")
_KEY = re.compile(r"(.+)\.lora(?:_linear_layer)?[._](A|B|down|up)(?:(?:\.[^.]+)?\.weight)?")
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
_KINDS = (  # what a name holds, or ends in after a dot, and what such a file has
    (("lokr_",), "a LoKr"),
    (("hada_",), "a LoHa"),
    (("lora_magnitude_vector", "dora_scale"), "a DoRA"),
    (("oft_",), "an OFT adapter"),
    (("ia3_",), "an IA3 adapter"),
    (("lora_mid",), "a LoCon in Tucker form"),
    (("lora_embedding_",), "a LoRA of the embedding"),
    ((".diff", ".diff_b", ".set_weight"), "whole weight differences"),
    (("lora_te", "text_encoder"), "a LoRA of a text encoder, which OmniGen lacks"),
    ((".bias", ".b_norm"), "biases"),
)

_MAX_NAME = 256
_MIN_RANK_LIMIT = 1024  # and the larger side of the matrix
_MAX_UPDATE = 1e20  # of a single value, before a weight of up to MAX_SCALE


@dataclass(frozen=True)
class _Target:
    """Rows of a parameter that a module fills."""

    parameter: str
    start: int
    rows: int
    inputs: int


@dataclass
class _Module:
    """What was found for one module."""

    name: str  # as a config names it
    parts: dict[str, Stored] = field(default_factory=dict)  # down, up, alpha


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    checkpoint: Checkpoint,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Adapter:
    """Reads a LoRA: a folder, a .safetensors file, a hub id or a state dict.

    Modules may have the original's names or diffusers', whatever the checkpoint's layout.

    Args:
        source: what to read.
        checkpoint: of the model that it is for.
        weight_name: the file in the folder or in the hub's repository.
        subfolder: where in the folder or repository that is.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as `resolve` takes them.

    Raises:
        CheckpointError: files are missing or malformed, the adapter is not a LoRA, or it doesn't
            fit the model (the tensors that don't are named).
        RequestError: `source` is none of these.
    """
    contents = open_lora(source, weight_name, subfolder, hub)
    return _assembled(contents, checkpoint)


def _assembled(contents: Contents, checkpoint: Checkpoint) -> Adapter:
    where = contents.where
    modules, unknown = _modules(contents, _targets(checkpoint))
    odd = [
        f"{shown(name)[1:-1]} holds {tensor.dtype}"
        for name, tensor in contents.tensors.items()
        if not tensor.floating and not name.endswith(".alpha")
    ]
    if odd:
        raise CheckpointError(f"{where}: {some(odd)}, not floating-point weights")
    if unknown or not modules:
        names = ", ".join(shown(name)[1:-1] for name in sorted(unknown)[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{where} has tensors that belong to no OmniGen layer: "
            f"{names or 'no LoRA tensors at all'}{more}{_kind(unknown)}"
        )
    if contents.config is not None and any("alpha" in one.parts for one in modules.values()):
        raise CheckpointError(
            f"{where} gives its scale twice, in a config and as .alpha tensors; remove one"
        )
    _check_disjoint(where, modules)
    config = contents.config
    updates = [_update(where, target, one, config) for target, one in modules.items()]
    return Adapter(tuple(sorted(updates, key=lambda update: (update.parameter, update.start))))


def _modules(
    contents: Contents, targets: Mapping[str, _Target]
) -> tuple[dict[_Target, _Module], set[str]]:
    """What there is for each module, and the names that say nothing to this model."""
    flat = {name.replace(".", "_"): name for name in targets}
    modules: dict[_Target, _Module] = {}
    unknown = set()
    for name, tensor in contents.tensors.items():
        module, part = _split(name)
        target = targets.get(flat.get(module, module))
        fits = part == "alpha" or len(tensor.shape) >= 2
        found = None if target is None else modules.setdefault(target, _Module(module))
        if found is None or not part or not fits or part in found.parts:
            unknown.add(name if found is not None or not part else module)
        else:
            found.parts[part] = tensor
    for target, found in list(modules.items()):
        if not {"down", "up"} <= found.parts.keys():
            del modules[target]
            unknown.add(found.name)
    return modules, unknown


def _split(name: str) -> tuple[str, str]:
    """Module and part (down, up or alpha) that a tensor's name says; no part if none."""
    if len(name) > _MAX_NAME:
        return "", ""
    if name.endswith(".alpha"):
        module, part = name.removesuffix(".alpha"), "alpha"
    else:
        match = _KEY.fullmatch(name)
        if match is None:
            return "", ""
        module, part = match[1], _PARTS[match[2]]
    while prefix := next((p for p in _PREFIXES if module.startswith(p)), ""):
        module = module.removeprefix(prefix)
    if match := _FLAT.match(module):
        module = module[match.end() :]
    return module, part


def _targets(checkpoint: Checkpoint) -> dict[str, _Target]:
    """The matrices of the model by the names of their modules, in both layouts."""
    targets = {}
    for layout in (DIFFUSERS, ORIGINAL):
        for parameter, sources in layout_sources(checkpoint.config, layout).items():
            for source in sources:
                module, _, kind = source.name.rpartition(".")
                if kind != "weight" or len(source.shape) < 2:
                    continue  # a vector (a norm's weight) has no low-rank update
                rows, inputs = source.shape[0], math.prod(source.shape[1:])
                target = _Target(parameter, source.start, rows, inputs)
                targets[module] = target
                # adapters of the language model alone, and its prefix before diffusers' names
                targets.setdefault(module.removeprefix("llm."), target)
                if module.startswith("layers."):
                    targets.setdefault(f"llm.{module}", target)
    return targets


def _update(
    where: str, target: _Target, module: _Module, config: Mapping[str, Any] | None
) -> LowRank:
    name = shown(module.name)[1:-1]
    a, b = module.parts["down"], module.parts["up"]
    rank = a.shape[0]
    sizes = math.prod(a.shape[1:]), math.prod(b.shape[1:])
    if sizes != (target.inputs, rank) or b.shape[0] != target.rows or not rank:
        raise CheckpointError(
            f"{where}: {name} has A {shape_text(a.shape)} and B {shape_text(b.shape)},"
            f" whose product does not match the model's {target.rows} x {target.inputs}; it is for "
            "another model"
        )
    if rank > max(_MIN_RANK_LIMIT, target.rows, target.inputs):
        raise CheckpointError(
            f"{where}: {name} has rank {rank}, more than its {target.rows} x {target.inputs} "
            "weights can use"
        )
    down, up = _matrix(a), _matrix(b)
    largest = float(down.abs().amax()) * float(up.abs().amax()) * rank
    if not math.isfinite(largest):
        raise CheckpointError(f"{where}: {name} holds NaN or infinities")
    scale = scale_of(config, module.name, rank, _alpha(where, name, module.parts.get("alpha")))
    if not abs(scale) <= MAX_SCALE or not largest * abs(scale) <= _MAX_UPDATE:
        raise CheckpointError(
            f"{where}: {name} changes weights by up to {largest * abs(scale):.3g}, which is too "
            "much"
        )
    return LowRank(target.parameter, target.start, down, up, scale)


def _alpha(where: str, name: str, stored: Stored | None) -> float | None:
    if stored is None:
        return None
    alpha = math.nan
    if math.prod(stored.shape) == 1 and not stored.dtype.lower().startswith(("bool", "c")):
        alpha = float(stored.read())
    if not abs(alpha) <= MAX_SCALE:
        raise CheckpointError(
            f"{where}: {name}.alpha must be a number up to {MAX_SCALE:g}, got "
            f"{alpha if math.prod(stored.shape) == 1 else shape_text(stored.shape)}"
        )
    return alpha


def _matrix(stored: Stored) -> Tensor:
    """A copy [rows, columns] of one's own, in float32 on the host."""
    tensor = stored.read().to(torch.device("cpu"), torch.float32, copy=True)
    return tensor.flatten(1).contiguous()


def _check_disjoint(where: str, modules: Mapping[_Target, _Module]) -> None:
    """A fused qkv_proj and a to_q beside it would be added to the same rows."""
    ordered = sorted(modules, key=lambda target: (target.parameter, target.start))
    for one, other in pairwise(ordered):
        if one.parameter == other.parameter and one.start + one.rows > other.start:
            names = " and ".join(shown(modules[target].name) for target in (one, other))
            raise CheckpointError(f"{where}: {names} change the same weights")


def _kind(names: Iterable[str]) -> str:
    for parts, kind in _KINDS:
        if any(
            name.endswith(part) if part.startswith(".") else part in name[-_MAX_NAME:]
            for name in names
            for part in parts
        ):
            return f"; it has {kind}: only plain LoRA is supported, merge it first"
    return ""
