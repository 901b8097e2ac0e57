"""LoRA adapters in PEFT's format: merged into the weights, and removed without a trace."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .files import find_weights, read_json, read_tensors

_KEY = re.compile(r"(?:base_model\.model\.|transformer\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_NAME_CHARACTERS = 64  # longer than any module's name
_MAX_WAYS, _MAX_PATTERN = 1 << 13, 256  # of an alpha_pattern, see _check_pattern
_MAX_SCALE = 1e9  # of an update; larger ones overflow float32 sums


@dataclass(frozen=True)
class LowRank:
    """`scale * up @ down`, added to some rows of one parameter (Hu et al., 2021)."""

    parameter: str
    start: int  # first row
    down: Tensor  # [rank, inputs], float32
    up: Tensor  # [outputs, rank], float32
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA and its weight."""

    updates: tuple[LowRank, ...]
    weight: float


def read_adapter(
    folder: str | os.PathLike[str], checkpoint: Checkpoint, weight: float = 1.0
) -> Adapter:
    """Reads a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

    Modules may have the original's names or diffusers', whatever the checkpoint's layout.

    Raises:
        CheckpointError: files are missing or malformed, the adapter is not a LoRA, or it doesn't
            fit the model (the tensors that don't are named).
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder; give one with adapter_config.json")
    config = read_json(os.path.join(folder, "adapter_config.json"))
    _check_config(config, folder)
    paths = find_weights(folder, "adapter_model")
    tensors = read_tensors(paths, torch.float32, torch.device("cpu"))
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match and tensor.ndim >= 2 and match[2] not in pairs[match[1]]:
            pairs[match[1]][match[2]] = tensor
        else:
            unknown.append(name)
    updates = []
    for module, pair in sorted(pairs.items()):
        found = checkpoint.find(f"{module}.weight")
        # a vector (a norm's weight) has no low-rank update
        if found is None or pair.keys() != {"A", "B"} or len(found[1].shape) < 2:
            unknown.append(module)
            continue
        parameter, source = found
        down, up = pair["A"].flatten(1), pair["B"].flatten(1)
        rows, inputs = source.shape[0], math.prod(source.shape[1:])
        if down.shape != (len(down), inputs) or up.shape != (rows, len(down)) or not len(down):
            raise CheckpointError(
                f"{paths[0]}: {module} has A {list(pair['A'].shape)} and B {list(pair['B'].shape)},"
                f" whose product does not match the model's {rows} x {inputs}"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(f"{paths[0]}: {module} holds NaN or infinities")
        scale = _scale(config, module, len(down))
        if not abs(scale * weight) <= _MAX_SCALE:
            raise CheckpointError(
                f"{paths[0]}: {module} would be scaled by {scale * weight:.3g}, which is too much"
            )
        updates.append(LowRank(parameter, source.start, down, up, scale))
    if unknown or not updates:
        names = ", ".join(sorted(unknown)[:8]) or "no LoRA tensors at all"
        raise CheckpointError(f"{paths[0]} has tensors that belong to no OmniGen layer: {names}")
    return Adapter(tuple(updates), weight)


def merged(
    checkpoint: Checkpoint,
    adapters: Iterable[Adapter],
    dtype: torch.dtype,
    device: torch.device,
    parameters: Iterable[str],
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of `parameters`: the checkpoint's plus all updates, rounded once.

    Each value is computed from the checkpoint, so it does not depend on which adapters were loaded
    before; without adapters the weights are the checkpoint's, bit for bit.
    """
    by_parameter: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
    for adapter in adapters:
        for update in adapter.updates:
            by_parameter[update.parameter].append((update, adapter.weight))
    for name in parameters:
        weight = checkpoint.read(dtype, device, [name])[name]
        if updates := by_parameter.get(name):
            # float32: a low-rank update is often below bfloat16's resolution of the weight
            exact = weight.to(torch.float32, copy=True)
            matrix = exact.flatten(1)
            for update, strength in updates:
                rows = matrix[update.start : update.start + len(update.up)]
                up, down = update.up.to(rows.device), update.down.to(rows.device)
                rows.addmm_(up, down, alpha=update.scale * strength)
            weight = exact.to(dtype)
        yield name, weight


def _check_config(config: Mapping[str, Any], folder: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{folder} has a {kind} adapter; only LoRA is supported")
    for option in (
        "use_dora",
        "use_qalora",
        "fan_in_fan_out",
        "modules_to_save",
        "layer_replication",
        "lora_bias",
    ):
        if config.get(option):
            raise CheckpointError(f"{folder} uses {option}, which is not supported; merge it first")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"adapter_config.json: alpha_pattern must be an object, got {type(patterns).__name__}"
        )
    for pattern in patterns:
        _check_pattern(pattern)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not abs(alpha) <= _MAX_SCALE:
        raise CheckpointError(
            f"adapter_config.json: lora_alpha must be a number up to {_MAX_SCALE:g}, got {alpha!r}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_pattern(pattern: str) -> None:
    """Raises CheckpointError for an invalid or potentially slow regular expression.

    Bounds the ways that backtracking may try: the places where each repetition can end, times the
    alternatives of each group. Repeated groups, lookarounds and references are rejected.
    """
    # each escape and each class of characters is one character
    plain = re.sub(
        r"\\(.)|\[\^?\]?[^\]]*\]",
        lambda found: "\0" if (found[1] or "").isdigit() else "x",
        pattern,
        flags=re.DOTALL,
    )
    ways = _NAME_CHARACTERS ** sum(map(plain.count, "*+{")) * 2 ** plain.count("?")
    ways *= (plain.count("|") + 1) ** plain.count("(")
    odd = "\0" in plain or re.search(r"\(\?(?!:)|\)[*+?{]", plain)
    if odd or ways > _MAX_WAYS or len(pattern) > _MAX_PATTERN:
        raise CheckpointError(
            f"adapter_config.json: alpha_pattern {pattern[:80]!r} is not supported; give names of "
            r"modules, with at most two of * and +, and | between several"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:  # the latter for enormous repetitions
        raise CheckpointError(f"adapter_config.json: alpha_pattern: {error}") from error
