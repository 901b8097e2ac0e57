"""How each kernel is launched, as data: block sizes, warps and stages per GPU generation.

`bench/kernels/tune.py` measures candidates on a GPU and rewrites the table between two marks.
Until then those of the attention and of scaled_mm_ are those of which `bench/kernels/bounds.py`
counts the most; on AMD's GPUs, the largest tiles found that keep everything in registers. Every
entry is compiled ahead of time by `tests/kernels/test_ahead.py` or `test_ahead_amd.py`, which hold
it to the shared memory and the registers of its generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch configuration; a kernel reads the sizes that it has.

    Attributes:
        num_warps: warps of a program; of 64 lanes on AMD's gfx9, else of 32.
        num_stages: depth of the loads' pipeline in a loop.
        block_m: query rows of a program (attention), rows of a tile (scaled_mm_).
        block_n: keys of a block (attention), columns of a tile (scaled_mm_).
        block_k: depth of a tile (scaled_mm_).
        block: columns (swiglu, dequantise_*_), pairs (rope_), values (quantise_cache_), tokens
            (guidance_step_) or heads of rows (join_segments) of a block.
            The norms and all that quantises rows take a whole row.
        tensor_maps: whether whole blocks of keys come through Hopper's copy engine
            (attention_step on 9.0 and later); other rows use plain loads.
        one_loop: whether blocks of keys that are masked and those that are not share a loop
            (attention_prefill).
    """

    num_warps: int
    num_stages: int = 1
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    block: int = 0
    tensor_maps: bool = False
    one_loop: bool = False


# Compute capability -> kernel, for attention with head_dim and the bits of the dtype. In 32 bits
# the attention multiplies exactly, without matrix units: small tiles, for checks rather than speed.
# table: begin
TABLE: dict[int, dict[str, Launch]] = {
    80: {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=128, block_k=64),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    86: {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=128, block_k=64),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    89: {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=128, block_k=64),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    90: {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=256, block_k=128),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=128),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=64),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=8, num_stages=3, block_m=128, block_n=64),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    100: {
        "rms_norm": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=256, block_k=128),
        "swiglu": Launch(num_warps=4, block=2048),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64),
        "attention_prefill/64/16": Launch(
            num_warps=4, num_stages=2, block_m=128, block_n=64, one_loop=True
        ),
        "attention_prefill/96/16": Launch(
            num_warps=4, num_stages=2, block_m=128, block_n=64, one_loop=True
        ),
        "attention_prefill/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    120: {
        "rms_norm": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=3, block_m=128, block_n=128, block_k=64),
        "swiglu": Launch(num_warps=4, block=2048),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "join_segments": Launch(num_warps=4, block=32),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=8, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=3, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=64),
        "attention_prefill/128/16": Launch(num_warps=4, num_stages=2, block_m=64, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
}
# table: end

# AMD's architecture -> kernel, as above.
# amd: begin
AMD: dict[str, dict[str, Launch]] = {
    "gfx942": {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=2, block_m=128, block_n=128, block_k=64),
        "join_segments": Launch(num_warps=4, block=32),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "dequantise_int8_": Launch(num_warps=2, block=2048),
        "dequantise_fp8_": Launch(num_warps=2, block=2048),
        "dequantise_nf4_": Launch(num_warps=2, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=4, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=4, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=4, block_m=16, block_n=16),
    },
    "gfx950": {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=2, block_m=128, block_n=128, block_k=64),
        "join_segments": Launch(num_warps=4, block=32),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "dequantise_int8_": Launch(num_warps=2, block=2048),
        "dequantise_fp8_": Launch(num_warps=2, block=2048),
        "dequantise_nf4_": Launch(num_warps=2, block=4096),
        "attention_step/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_step/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step_8bit/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/64/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=64),
        "attention_prefill/96/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=4, num_stages=2, block_m=128, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=4, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=4, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=4, block_m=16, block_n=16),
    },
    "gfx1100": {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64, block_k=64),
        "join_segments": Launch(num_warps=4, block=32),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_step/96/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=8, block_m=64, block_n=32),
        "attention_step_8bit/64/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_step_8bit/96/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_step_8bit/128/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_prefill/64/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_step/128/32": Launch(num_warps=16, block_m=16, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
    "gfx1201": {
        "rms_norm": Launch(num_warps=8),
        "rms_norm_quantise_": Launch(num_warps=8),
        "modulate": Launch(num_warps=8),
        "swiglu": Launch(num_warps=4, block=2048),
        "swiglu_quantise_": Launch(num_warps=8),
        "quantise_": Launch(num_warps=8),
        "quantise_cache_": Launch(num_warps=4, block=2048),
        "scaled_mm_": Launch(num_warps=8, num_stages=2, block_m=128, block_n=64, block_k=64),
        "join_segments": Launch(num_warps=4, block=32),
        "rope_": Launch(num_warps=4, block=1024),
        "rope_cache_": Launch(num_warps=4, block=1024),
        "guidance_step_": Launch(num_warps=2, block=64),
        "dequantise_int8_": Launch(num_warps=4, block=2048),
        "dequantise_fp8_": Launch(num_warps=4, block=2048),
        "dequantise_nf4_": Launch(num_warps=4, block=4096),
        "attention_step/64/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_step/96/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_step/128/16": Launch(num_warps=8, block_m=128, block_n=16),
        "attention_step_8bit/64/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_step_8bit/96/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_step_8bit/128/16": Launch(num_warps=4, block_m=64, block_n=16),
        "attention_prefill/64/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_prefill/96/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_prefill/128/16": Launch(num_warps=8, block_m=128, block_n=32),
        "attention_step/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_step/128/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_step_8bit/64/32": Launch(num_warps=8, block_m=32, block_n=16),
        "attention_step_8bit/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_step_8bit/128/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/64/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/96/32": Launch(num_warps=8, block_m=16, block_n=16),
        "attention_prefill/128/32": Launch(num_warps=8, block_m=16, block_n=16),
    },
}
# amd: end

# What begins the name of an architecture whose kernels can use matrix units -> the entry it takes.
_GENERATIONS = {
    "gfx90a": "gfx942",
    "gfx94": "gfx942",
    "gfx95": "gfx950",
    "gfx11": "gfx1100",
    "gfx12": "gfx1201",
}

# What the interpreter takes for tensors on the CPU.
_INTERPRETED = 80


def architecture_of(device: int | None) -> str | None:
    """What AMD calls a device's architecture, such as "gfx942"; None of NVIDIA's GPUs.

    PyTorch for ROCm gives such devices a compute capability, too, which means something else than
    CUDA's: 12.0 is gfx1200.
    """
    if torch.version.hip is None:
        return None
    # with features, as in "gfx942:sramecc+:xnack-"
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def entry_of(architecture: str) -> str | None:
    """Which of AMD's entries an architecture takes; None where it has no matrix units to use."""
    if architecture in AMD:
        return architecture
    found = (entry for start, entry in _GENERATIONS.items() if architecture.startswith(start))
    return next(found, None)


@lru_cache(maxsize=256)
def lookup(kernel: str, generation: int | str, head_dim: int = 0, bits: int = 16) -> Launch:
    """The configuration of a kernel on a generation, or else on the latest one before it.

    Args:
        kernel: name of the operation.
        generation: compute capability, 80 for 8.0, or AMD's architecture, such as "gfx942".
        head_dim: of the attention, 0 for other kernels.
        bits: of the dtype; only the attention differs.
    """
    key = f"{kernel}/{head_dim}/{bits}" if head_dim else kernel
    if isinstance(generation, str):
        entry = entry_of(generation)
        assert entry is not None, generation  # `ops` has asked before
        return AMD[entry][key]
    return TABLE[max((known for known in TABLE if known <= generation), default=min(TABLE))][key]


@lru_cache(maxsize=64)
def capability_of(device: int | None) -> int | str:
    """Compute capability of a CUDA device, 80 for 8.0; AMD's architecture of a ROCm device."""
    architecture = architecture_of(device)
    if architecture is not None:
        return architecture
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, x: Tensor, head_dim: int = 0) -> Launch:
    """The configuration of a kernel for the device and the dtype of `x`."""
    capability = capability_of(x.device.index) if x.is_cuda else _INTERPRETED
    return lookup(kernel, capability, head_dim, 8 * x.element_size())
