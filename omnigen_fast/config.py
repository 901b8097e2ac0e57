"""ModelConfig: the sizes of a checkpoint, read from its config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_settings import check_settings, words
from .errors import CheckpointError, brief

PATCH = 2  # latent pixels per side of a token
VAE_SCALE = 8  # image pixels per latent pixel
TOKEN_PIXELS = PATCH * VAE_SCALE  # image pixels per side of a token
LATENT_CHANNELS = 4
TIME_FREQUENCIES = 256  # width of the sinusoid that embeds the time, in the released model

_MAX_SIZE = 1 << 20  # far above any real size: keeps a malformed file from exhausting memory
_MAX_TIME_FREQUENCIES = 1 << 16  # times 1000 steps is held at once
_SIZES = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "pos_embed_size",
    "time_frequencies",
)
_SILU = ("silu", "swish")

# Settings that change what the model computes, and the values that it has here.
_PHI3_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("phi3",),
    "hidden_act": _SILU,
    "hidden_activation": _SILU,
    "activation_function": _SILU,
    "partial_rotary_factor": (1.0,),
}
_DIFFUSERS_FIXED: Mapping[str, tuple[Any, ...]] = {
    "flip_sin_to_cos": (True,),
    "downscale_freq_shift": (0,),
    "timestep_activation_fn": _SILU,
}
_ROPE_FIXED: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0,)}

# Settings that are read below, or that a pass over given weights does not depend on.
_PHI3_KNOWN = words(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    original_max_position_embeddings sliding_window quantization_config
    architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    pretraining_tp remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings top_k top_p torchscript typical_p
    use_bfloat16 use_cache use_return_dict
    """
)
_DIFFUSERS_KNOWN = words(
    """
    hidden_size num_layers num_attention_heads num_key_value_heads intermediate_size vocab_size
    rms_norm_eps rope_base rope_scaling max_position_embeddings original_max_position_embeddings
    pos_embed_max_size time_step_dim patch_size in_channels pad_token_id quantization_config
    """
)
_ROPE_KNOWN = words(
    """
    type rope_type rope_theta rope_base short_factor long_factor original_max_position_embeddings
    factor attention_factor
    """
)


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
    time_frequencies: int = TIME_FREQUENCIES  # (256) width of the sinusoid that embeds the time

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
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
                raise CheckpointError(
                    f"config: {name} must be a positive number, got {brief(value)}"
                )
            object.__setattr__(self, name, float(value))  # PyTorch takes no integer above 2**63
        for name in ("short_factor", "long_factor"):
            factor = getattr(self, name)
            if len(factor) != self.head_dim // 2 or not all(map(_is_positive, factor)):
                raise CheckpointError(
                    f"config: {name} must hold {self.head_dim // 2} positive numbers"
                )
            object.__setattr__(self, name, tuple(map(float, factor)))

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
    def from_phi3(
        cls,
        values: Mapping[str, Any],
        pos_embed_size: int,
        time_frequencies: int = TIME_FREQUENCIES,
    ) -> ModelConfig:
        """Reads the original layout's `config.json` (a Phi-3 config).

        Raises CheckpointError for missing or impossible values, and for settings of other models.
        """
        check_settings("config", values, known=_PHI3_KNOWN, fixed=_PHI3_FIXED)
        # transformers 5 writes `rope_parameters` where earlier versions wrote `rope_scaling`
        both = [values.get(name) for name in ("rope_scaling", "rope_parameters")]
        given = [rope for rope in both if rope is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise CheckpointError("config: rope_scaling and rope_parameters differ; keep one")
        config = cls._read(
            values,
            given[0] if given else None,
            layers="num_hidden_layers",
            theta="rope_theta",
            pos_embed_size=pos_embed_size,
            time_frequencies=time_frequencies,
        )
        head_dim, window = values.get("head_dim"), values.get("sliding_window")
        if head_dim is not None and not _equal(head_dim, config.head_dim):
            raise CheckpointError(
                f"config: head_dim {brief(head_dim)} describes another model; OmniGen's is "
                f"hidden_size / num_attention_heads, {config.head_dim}"
            )
        if window is not None and not (
            _is_positive(window) and window >= config.max_position_embeddings
        ):
            raise CheckpointError(
                f"config: sliding_window {brief(window)} describes another model; OmniGen sees all "
                f"{config.max_position_embeddings} positions"
            )
        return config

    def to_phi3(self) -> dict[str, Any]:
        """The original layout's `config.json`, from which `from_phi3` reads the same sizes."""
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "rope_scaling": {
                "type": "su",
                "short_factor": list(self.short_factor),
                "long_factor": list(self.long_factor),
            },
        }

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], pos_embed_size: int) -> ModelConfig:
        """Reads `transformer/config.json` of diffusers' layout.

        Raises CheckpointError for missing or impossible values, and for settings of other models.
        """
        patch, channels = values.get("patch_size", PATCH), values.get("in_channels")
        if not _equal(patch, PATCH) or not (channels is None or _equal(channels, LATENT_CHANNELS)):
            raise CheckpointError(
                f"config: patch_size {brief(patch)} with {brief(channels)} channels; OmniGen has "
                f"{PATCH} with {LATENT_CHANNELS}"
            )
        check_settings("config", values, known=_DIFFUSERS_KNOWN, fixed=_DIFFUSERS_FIXED)
        side = values.get("pos_embed_max_size")
        if side is not None and not _equal(side, pos_embed_size):
            raise CheckpointError(
                f"config: pos_embed_max_size is {brief(side)}, but the position table has "
                f"{pos_embed_size} places per side"
            )
        return cls._read(
            values,
            values.get("rope_scaling"),
            layers="num_layers",
            theta="rope_base",
            pos_embed_size=pos_embed_size,
            time_frequencies=values.get("time_step_dim", TIME_FREQUENCIES),
        )

    @classmethod
    def _read(
        cls,
        values: Mapping[str, Any],
        rope: Any,
        *,
        layers: str,
        theta: str,
        pos_embed_size: int,
        time_frequencies: Any,
    ) -> ModelConfig:
        rope = _checked_rope(rope)
        kind = rope.get("rope_type", rope.get("type", "su" if rope else "default"))
        scaled = kind != "default"
        if scaled and kind not in ("su", "longrope"):
            raise CheckpointError(f"config: rope type {brief(kind)}; supported are su and longrope")
        try:
            sizes = {
                "hidden_size": values["hidden_size"],
                "num_layers": values[layers],
                "num_heads": values["num_attention_heads"],
                "num_kv_heads": _first(
                    values.get("num_key_value_heads"), values["num_attention_heads"]
                ),
                "intermediate_size": values["intermediate_size"],
                "vocab_size": values["vocab_size"],
                "max_position_embeddings": values["max_position_embeddings"],
                "time_frequencies": time_frequencies,
            }
            factors = (rope["short_factor"], rope["long_factor"]) if scaled else None
        except KeyError as error:
            raise CheckpointError(f"config: {error.args[0]} is missing") from error
        longest = sizes["max_position_embeddings"]
        sizes["original_max_position_embeddings"] = longest  # equal lengths turn scaling off
        if scaled:
            sizes["original_max_position_embeddings"] = _first(
                values.get("original_max_position_embeddings"),
                rope.get("original_max_position_embeddings"),
                longest,
            )
        for name, value in sizes.items():  # before anything is computed from them
            _check_size(name, value)
        if factors is None:
            factors = 2 * ([1.0] * (sizes["hidden_size"] // sizes["num_heads"] // 2),)
        # what is no list has too few numbers
        short, long = (tuple(one) if isinstance(one, list | tuple) else () for one in factors)
        config = cls(
            **sizes,
            rms_norm_eps=values.get("rms_norm_eps", 1e-5),
            rope_theta=values.get(theta, rope.get(theta, 10000.0)),
            short_factor=short,
            long_factor=long,
            pos_embed_size=pos_embed_size,
        )
        if scaled:
            _check_rope_scale(rope, config)
        return config


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


def _check_size(name: str, value: Any) -> None:
    most = _MAX_TIME_FREQUENCIES if name == "time_frequencies" else _MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        reason = f"; at most {most} is supported" if _is_positive(value) and value > most else ""
        raise CheckpointError(
            f"config: {name} must be a positive integer, got {brief(value)}{reason}"
        )


def _checked_rope(rope: Any) -> Mapping[str, Any]:
    if rope is None:
        return {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"config: rope_scaling must be an object, got {brief(rope)}")
    check_settings("config: rope_scaling", rope, known=_ROPE_KNOWN, fixed=_ROPE_FIXED)
    return rope


def _check_rope_scale(rope: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises CheckpointError if a config states another factor on cos and sin than it implies."""
    implied = {
        "factor": config.max_position_embeddings / config.original_max_position_embeddings,
        "attention_factor": config.rope_scale,
    }
    for name, value in implied.items():
        given = rope.get(name)
        if given is not None and not (
            _is_positive(given) and math.isclose(given, value, rel_tol=1e-6)
        ):
            raise CheckpointError(
                f"config: rope_scaling: {name} {brief(given)} describes another model; the lengths "
                f"give {value:.6g}"
            )


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _equal(value: Any, size: int) -> bool:
    return value == size and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    """Whether a JSON value is a positive number that float32 holds with room to spare."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1e-30 <= value <= 1e30
