"""ModelConfig: the sizes of a checkpoint, read from its config."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

PATCH = 2  # latent pixels per side of a token
VAE_SCALE = 8  # image pixels per latent pixel
TOKEN_PIXELS = PATCH * VAE_SCALE  # image pixels per side of a token
LATENT_CHANNELS = 4
TIME_FREQUENCIES = 256  # width of the sinusoid that embeds the time


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer. The released model's are in parentheses."""

    hidden_size: int  # (3072)
    num_layers: int  # (32)
    num_heads: int  # (32)
    num_kv_heads: int  # (32)
    intermediate_size: int  # (8192)
    vocab_size: int  # (32064)
    rms_norm_eps: float  # (1e-5)
    rope_theta: float  # (10000)
    short_factor: tuple[float, ...]  # one per pair of a head's features; all 1 without LongRoPE
    long_factor: tuple[float, ...]
    max_position_embeddings: int  # (131072)
    original_max_position_embeddings: int  # (4096) longer branches use `long_factor`
    pos_embed_size: int  # (192) tokens per side of the position table

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "pos_embed_size",
        ):
            value = getattr(self, name)
            # far above any real size: keeps a malformed file from exhausting memory
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
                raise CheckpointError(f"config: {name} must be a positive integer, got {value!r}")
        if self.original_max_position_embeddings == 1:  # rope_scale divides by its logarithm
            raise CheckpointError("config: original_max_position_embeddings must be at least 2")
        if self.num_layers > 1024:
            raise CheckpointError(f"config: {self.num_layers} layers; at most 1024 are supported")
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"config: hidden_size {self.hidden_size} is not a multiple of "
                f"{self.num_heads} attention heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config: {self.num_heads} query heads can't share {self.num_kv_heads} key heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd; rotary needs it even")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise CheckpointError(f"config: {name} must be a positive number, got {value!r}")
        for name in ("short_factor", "long_factor"):
            factor = getattr(self, name)
            if len(factor) != self.head_dim // 2 or not all(map(_is_positive, factor)):
                raise CheckpointError(
                    f"config: {name} must hold {self.head_dim // 2} positive numbers"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_width(self) -> int:
        """Width of the fused QKV projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def max_image_side(self) -> int:
        """The longest side in pixels that the position table covers."""
        return self.pos_embed_size * TOKEN_PIXELS

    @property
    def rope_scale(self) -> float:
        """LongRoPE's factor on cos and sin (Ding et al., 2024)."""
        ratio = self.max_position_embeddings / self.original_max_position_embeddings
        if ratio <= 1:
            return 1.0
        return math.sqrt(1 + math.log(ratio) / math.log(self.original_max_position_embeddings))

    def uses_long_factor(self, length: int) -> bool:
        """Whether a branch of `length` tokens (condition, time and noise) uses `long_factor`."""
        return length > self.original_max_position_embeddings

    @classmethod
    def from_phi3(cls, values: Mapping[str, Any], pos_embed_size: int) -> ModelConfig:
        """Reads the original layout's `config.json` (a Phi-3 config).

        Raises CheckpointError for missing or impossible values.
        """
        # transformers 5 writes `rope_parameters` where earlier versions wrote `rope_scaling`
        rope = values.get("rope_scaling") or values.get("rope_parameters")
        return cls._read(
            values, rope, pos_embed_size, layers="num_hidden_layers", theta="rope_theta"
        )

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], pos_embed_size: int) -> ModelConfig:
        """Reads `transformer/config.json` of diffusers' layout.

        Raises CheckpointError for missing or impossible values.
        """
        patch, channels = values.get("patch_size", PATCH), values.get("in_channels")
        if (patch, channels) not in ((PATCH, LATENT_CHANNELS), (PATCH, None)):
            raise CheckpointError(
                f"config: patch_size {patch} with {channels} channels; OmniGen has 2 with 4"
            )
        return cls._read(
            values,
            values.get("rope_scaling"),
            pos_embed_size,
            layers="num_layers",
            theta="rope_base",
        )

    @classmethod
    def _read(
        cls,
        values: Mapping[str, Any],
        rope: Mapping[str, Any] | None,
        pos_embed_size: int,
        *,
        layers: str,
        theta: str,
    ) -> ModelConfig:
        if rope is not None and not isinstance(rope, Mapping):
            raise CheckpointError(f"config: rope_scaling must be an object, got {rope!r}")
        rope = rope or {}
        kind = rope.get("rope_type", rope.get("type", "su" if rope else "default"))
        scaled = kind != "default"
        if scaled and kind not in ("su", "longrope"):
            raise CheckpointError(f"config: rope type {kind!r}; supported are su and longrope")
        try:
            hidden, heads = values["hidden_size"], values["num_attention_heads"]
            if hidden > 1 << 20:
                raise CheckpointError(f"config: hidden_size {hidden} is too large for any OmniGen")
            pairs = hidden // heads // 2
            longest = values["max_position_embeddings"]
            original = values.get("original_max_position_embeddings") or rope.get(
                "original_max_position_embeddings", longest
            )
            return cls(
                hidden_size=hidden,
                num_layers=values[layers],
                num_heads=heads,
                num_kv_heads=values.get("num_key_value_heads") or heads,
                intermediate_size=values["intermediate_size"],
                vocab_size=values["vocab_size"],
                rms_norm_eps=values.get("rms_norm_eps", 1e-5),
                rope_theta=values.get(theta, rope.get(theta, 10000.0)),
                short_factor=tuple(rope["short_factor"]) if scaled else (1.0,) * pairs,
                long_factor=tuple(rope["long_factor"]) if scaled else (1.0,) * pairs,
                max_position_embeddings=longest,
                # equal lengths turn scaling off
                original_max_position_embeddings=original if scaled else longest,
                pos_embed_size=pos_embed_size,
            )
        except CheckpointError:
            raise
        except KeyError as error:
            raise CheckpointError(f"config: {error.args[0]} is missing") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"config: {type(error).__name__}: {error}") from error


def tokens(height: int, width: int) -> int:
    """Tokens of a picture of `height` x `width` pixels."""
    return (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)


def released_sizes() -> ModelConfig:
    """Sizes of the released model, for planning and prediction without its weights.

    The rotary factors are placeholders (all 1): they don't affect the cost.
    """
    return ModelConfig(
        hidden_size=3072,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        intermediate_size=8192,
        vocab_size=32064,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        short_factor=(1.0,) * 48,
        long_factor=(1.0,) * 48,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        pos_embed_size=192,
    )


def _is_positive(value: Any) -> bool:
    """Whether a JSON value is a positive number within the range of a float."""
    return isinstance(value, int | float) and 0 < value <= sys.float_info.max
