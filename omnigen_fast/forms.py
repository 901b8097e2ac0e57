"""Forms: in which tensors a weight is stored, when it is not a plain one.

Pure arithmetic on shapes. `quantised` makes and reads the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

GROUP = 64  # columns that share a scale in int8 and nf4
# Matrices of a layer that are stored in a form. What stays plain takes 3 % of the memory, and most
# of it sets what every token is normed, timed or modulated by.
QUANTISED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_BYTES = {
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}


@dataclass(frozen=True)
class Part:
    """A tensor of a stored weight."""

    shape: tuple[int, ...]
    dtype: str  # PyTorch's name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def _int8(rows: int, columns: int) -> dict[str, Part]:
    groups = -(-columns // GROUP)
    return {
        "values": Part((rows, groups * GROUP), "int8"),
        "scales": Part((rows, groups), "bfloat16"),
    }


def _nf4(rows: int, columns: int) -> dict[str, Part]:
    groups = -(-columns // GROUP)
    return {
        "values": Part((rows, groups * GROUP // 2), "uint8"),
        "scales": Part((rows, groups), "uint8"),
        "ranges": Part((rows, 2), "float32"),
    }


def _fp8(rows: int, columns: int) -> dict[str, Part]:
    return {
        "values": Part((rows, columns), "float8_e4m3fn"),
        "scales": Part((rows, 1), "float32"),
    }


def _rows(dtype: str) -> Callable[[int, int], dict[str, Part]]:
    def parts(rows: int, columns: int) -> dict[str, Part]:
        return {"values": Part((rows, columns), dtype), "scales": Part((rows,), "float32")}

    return parts


# By name, from the one that changes weights least. The last group of a row is filled with zeros.
#
# int8  -127 to 127, times the scale of 64 columns
# fp8   e4m3, times the scale of a row
# nf4   two of 16 values (Dettmers et al., 2023) in a byte, the first column in its low half; times
#       the scale of 64 columns, itself a row's lowest scale and 0 to 255 of its steps
FORMS = {"int8": _int8, "fp8": _fp8, "nf4": _nf4}

# What products in 8 bits take as it is, by the name of the arithmetic: a scale for each row, which
# is each column of the result.
PRODUCTS = {"int8": "int8-rows", "fp8": "fp8-rows"}
_PRODUCT_FORMS = {"int8-rows": _rows("int8"), "fp8-rows": _rows("float8_e4m3fn")}
# Which products are computed in 8 bits; `bench.products` measures the error that each adds. Those
# of the embeddings, the modulation and the output layer are small and stay as they are.
COMPUTED = {"int8": QUANTISED, "fp8": ("gate_up_proj",)}


# In which a condition's keys and values are kept, by the name of the form: PyTorch's dtype (e4m3 as
# its bits), and the scale of each head in a row.
CACHES = {"int8": "int8", "fp8": "uint8"}
_SCALE_BYTES = 4
_ROW_UNIT = 16


def cache_row_bytes(kv_heads: int, head_dim: int) -> int:
    """Of a token's keys, or values, in one layer of a cache in 8 bits."""
    return -(-kv_heads * (head_dim + _SCALE_BYTES) // _ROW_UNIT) * _ROW_UNIT


def parts_of(form: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
    """The tensors that a weight [rows, columns] is stored as, by their names."""
    rows, columns = shape
    return (FORMS | _PRODUCT_FORMS)[form](rows, columns)
