"""The matrix product of the transformer's layers: the one place that knows how a weight is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .kernels import ops, widened
from .quantised import QuantisedWeight

# [out features, in features]. Products take dense ones, in the dtype of the activations, or ones in
# 8 bits with a scale for each row; others are expanded ahead of them, see `model.Expander`.
Weight: TypeAlias = Tensor | QuantisedWeight


@dataclass(frozen=True)
class QuantisedRows:
    """Activations in 8 bits, with a scale for each row: what a product in 8 bits takes."""

    values: Tensor  # [rows, features], int8 or float8_e4m3fn
    scales: Tensor  # [rows], float32

    def __len__(self) -> int:
        return len(self.values)

    def split(self, rows: int) -> Iterator[QuantisedRows]:
        """Consecutive parts of so many rows."""
        for values, scales in zip(self.values.split(rows), self.scales.split(rows)):
            yield QuantisedRows(values, scales)


def linear(
    x: Tensor | QuantisedRows,  # [rows, in features]
    weight: Weight,
    out: Tensor | None = None,  # [rows, out features]
    bias: Tensor | None = None,  # [out features]
    accumulate: bool = False,
) -> Tensor:  # [rows, out features]
    """`x @ weight.T + bias`, written to `out` where it is given; in 8 bits, it is.

    With `accumulate`, it is added to `out` instead, in float32 and rounded once: a residual stream
    is then read and written once, and its next norm reads it alone.
    """
    if isinstance(x, QuantisedRows):
        assert isinstance(weight, QuantisedWeight) and out is not None and bias is None
        ops.scaled_mm_(x.values, x.scales, weight.values, weight.scales, out, accumulate)
        return out
    assert isinstance(weight, Tensor)
    if widened.takes(x, weight):
        out = x.new_empty(len(x), len(weight)) if out is None else out
        return widened.linear(x, weight, out if accumulate else bias, out)
    if accumulate:
        assert out is not None and bias is None
        return torch.addmm(out, x, weight.t(), out=out)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
