"""How an update is scaled: PEFT's config, whether of a folder or in the header of a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .lora import MAX_SCALE

_NAME_CHARACTERS = 64  # longer than any module's name
_MAX_WAYS, _MAX_PATTERN = 1 << 13, 256  # of an alpha_pattern, see _ways
_MAX_PATTERNS = 1024  # one per module, where all differ
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")  # the others change the weights under the LoRA


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError unless a config describes a LoRA that can be merged as it is."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{where} has a {_cut(kind)} adapter; only LoRA is supported")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise CheckpointError(f"{where} uses {option}, which is not supported; merge it first")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{where} uses init_lora_weights={_cut(repr(start))}, which may change the weights "
            "under the LoRA; convert it to a plain one with PEFT first"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"adapter_config.json: alpha_pattern must be an object, got {type(patterns).__name__}"
        )
    if len(patterns) > _MAX_PATTERNS or sum(map(_ways, patterns)) > 2 * _MAX_WAYS:
        raise CheckpointError(
            f"adapter_config.json: the {len(patterns)} entries of alpha_pattern could be slow; "
            "give names of modules"
        )


def scale_of(config: Mapping[str, Any] | None, module: str, rank: int, alpha: Any) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski, 2023).

    Args:
        config: PEFT's, if there is one.
        module: its name in the config's model.
        alpha: what a file without a config says; None for a scale of 1.
    """
    if config is None:
        return 1.0 if alpha is None else float(alpha) / rank
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not abs(alpha) <= MAX_SCALE:
        raise CheckpointError(
            f"adapter_config.json: lora_alpha must be a number up to {MAX_SCALE:g}, got "
            f"{'an enormous one' if isinstance(alpha, int) else _cut(repr(alpha))}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ways(pattern: str) -> int:
    """How many ways backtracking may try: raises CheckpointError if they are many.

    Counts the places where each repetition can end, times the alternatives of each group. Repeated
    groups, lookarounds and references are rejected, as is an invalid expression.
    """
    # each escape and each class of characters is one character
    plain = re.sub(
        r"\\(.)|\[\^?\]?[^\]]*\]",
        lambda found: "\0" if (found[1] or "").isdigit() else "x",
        pattern[: _MAX_PATTERN + 1],
        flags=re.DOTALL,
    )
    ways: int = _NAME_CHARACTERS ** sum(map(plain.count, "*+{")) * 2 ** plain.count("?")
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
    return ways


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
