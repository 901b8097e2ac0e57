"""The one door to the operations: callers import from here and never choose an implementation."""

from __future__ import annotations

from .reference import (
    add_rms_norm,
    attention_prefill,
    attention_step,
    guidance_step_,
    modulate,
    rms_norm,
    rope_,
    rope_cache_,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "attention_prefill",
    "attention_step",
    "guidance_step_",
    "modulate",
    "rms_norm",
    "rope_",
    "rope_cache_",
    "swiglu",
]
