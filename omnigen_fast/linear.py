"""The matrix product of the transformer's layers: the one place that knows how a weight is kept."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .quantised import QuantisedWeight

# [out features, in features]. Products take dense ones, in the dtype of the activations; quantised
# ones are expanded ahead of them, see `model.Expander`.
Weight: TypeAlias = Tensor | QuantisedWeight


def linear(
    x: Tensor,  # [rows, in features]
    weight: Weight,
    out: Tensor | None = None,  # [rows, out features]
    bias: Tensor | None = None,  # [out features]
) -> Tensor:  # [rows, out features]
    """`x @ weight.T + bias`, written to `out` where it is given."""
    assert isinstance(weight, Tensor)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
