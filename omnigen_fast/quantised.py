"""QuantisedWeight: a matrix stored in 8 or 4 bits, made from exact values and expanded to them.

Every form treats each row for itself, so rows that are quantised apart or together are the same,
bit for bit. Expanding multiplies in float32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .forms import FORMS, GROUP, PRODUCTS, Part, parts_of
from .kernels import ops
from .parameters import PLAIN

_BLOCK_VALUES = 1 << 22  # of the weight, quantised at once: bounds the float32 copies
_INT8_MOST, _FP8_MOST, _CODE_MOST = 127, 448.0, 255


class QuantisedWeight(nn.Module):
    """A weight [rows, columns] in one of `forms.FORMS` or in the form that products take.

    Args:
        form: its name.
        columns: of the weight; stored rows may be longer.
        parts: its tensors, as `forms.parts_of` names them.
    """

    values: Tensor
    scales: Tensor
    ranges: Tensor | None  # nf4's

    def __init__(self, form: str, columns: int, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.form = form
        self.ranges = None
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part, requires_grad=False))
        self.shape = torch.Size((len(self.values), columns))

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: part.data for name, part in self.named_parameters(recurse=False)}

    @property
    def arguments(self) -> list[Tensor]:
        """Its tensors as the operations take them: e4m3 as bits."""
        tensors = self.parts.values()
        return [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in tensors]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_meta(self) -> bool:
        return self.values.is_meta

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantise(self, out: Tensor) -> Tensor:
        """Writes the weight to `out` [rows, columns], bfloat16 or float32, and returns it."""
        assert self.form in FORMS
        getattr(ops, f"dequantise_{self.form}_")(out, *self.arguments)
        return out

    def exact(self) -> Tensor:
        """The weight in float32."""
        return self.dequantise(torch.empty(self.shape, dtype=torch.float32, device=self.device))


def as_weight(
    form: str | None, shape: tuple[int, ...], parts: Mapping[str, Tensor]
) -> Tensor | QuantisedWeight:
    """A weight of a layer from its tensors, named as `parameters.layer_parts` names them."""
    if PLAIN in parts:
        return parts[PLAIN]
    assert form is not None
    return QuantisedWeight(form, shape[1], parts)


def parts_of_weight(weight: Tensor | QuantisedWeight) -> dict[str, Tensor]:
    """The tensors of a weight of a layer, named likewise."""
    return weight.parts if isinstance(weight, QuantisedWeight) else {PLAIN: weight}


def empty_parts(parts: Mapping[str, Part], device: torch.device | str) -> dict[str, Tensor]:
    """Uninitialised tensors for them."""
    return {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtype), device=device)
        for name, part in parts.items()
    }


def quantised(name: str, weight: Tensor, form: str) -> QuantisedWeight:
    """A weight [rows, columns] in a form, on its device.

    Args:
        name: of the weight, for messages.
        weight: of any floating dtype.
        form: a name that `forms.parts_of` knows.

    Raises CheckpointError if a value is not finite.
    """
    rows, columns = weight.shape
    parts = empty_parts(parts_of(form, (rows, columns)), weight.device)
    block = max(1, _BLOCK_VALUES // max(1, columns))
    for first in range(0, rows, block):
        some = slice(first, first + block)
        _QUANTISE[form](weight[some].float(), {key: one[some] for key, one in parts.items()})
    if not weight.is_meta and not parts_finite(form, parts):
        raise CheckpointError(
            f"{name} holds NaN or infinities, or too large values; is it damaged?"
        )
    return QuantisedWeight(form, columns, parts)


def parts_finite(form: str, parts: Mapping[str, Tensor]) -> bool:
    """Whether stored parts stand for finite values: none of their floats is NaN or infinite."""
    floats = [one for one in parts.values() if one.dtype in (torch.bfloat16, torch.float32)]
    finite = all(bool(one.isfinite().all()) for one in floats)
    if form.startswith("fp8") and finite:  # the two NaN of e4m3, which has no infinities
        finite = not bool((parts["values"].view(torch.uint8) & 0x7F == 0x7F).any())
    return finite


def _groups(weight: Tensor, groups: int) -> Tensor:
    """[rows, groups, GROUP]; the last group is filled with zeros."""
    missing = groups * GROUP - weight.shape[1]
    if missing:
        weight = nn.functional.pad(weight, (0, missing))
    return weight.unflatten(1, (groups, GROUP))


def _over(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight / scale`, and 0 where all that share a scale are 0."""
    return torch.where(scale > 0, weight / scale, 0.0)


def _int8(weight: Tensor, out: Mapping[str, Tensor]) -> None:
    by_group = _groups(weight, out["scales"].shape[1])
    # times the reciprocal: GPUs divide by a constant that way, and results must not differ
    out["scales"].copy_(by_group.abs().amax(2) * (1 / _INT8_MOST))
    # by the scale as it is stored; its rounding may put the largest value over the end
    steps = _over(by_group, out["scales"].float().unsqueeze(2))
    out["values"].copy_(steps.round_().clamp_(-_INT8_MOST, _INT8_MOST).flatten(1))


def _fp8(weight: Tensor, out: Mapping[str, Tensor]) -> None:
    """The scale is a power of two: values that e4m3 holds are held exactly, whatever their row."""
    most = weight.abs().amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(most * (1 / _FP8_MOST))
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
    scale = torch.ldexp(torch.ones_like(most), exponent.clamp(-126, 127))
    scale = torch.where(most.isfinite(), scale, most)  # what is not is found out by that
    out["scales"].copy_(torch.where(most == 0, 0.0, scale))
    scaled = _over(weight, out["scales"]).clamp_(-_FP8_MOST, _FP8_MOST)
    out["values"].copy_(scaled.to(torch.float8_e4m3fn))


def _nf4(weight: Tensor, out: Mapping[str, Tensor]) -> None:
    by_group = _groups(weight, out["scales"].shape[1])
    most = by_group.abs().amax(2)
    low, high = (one.unsqueeze(1) for one in most.aminmax(dim=1))
    # eight bits of mantissa: a code of eight bits times it is exact, however it is computed
    step = ((high - low) * (1 / _CODE_MOST)).bfloat16().float()
    out["ranges"].copy_(torch.cat([low, step], 1))
    codes = _over(most - low, step).round_().clamp_(0, _CODE_MOST)
    out["scales"].copy_(codes)
    table = torch.tensor(ops.reference.NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    scaled = _over(by_group, (low + codes * step).unsqueeze(2))
    places = torch.bucketize(scaled.flatten(1), middles).to(torch.uint8)
    torch.bitwise_or(places[:, ::2], places[:, 1::2] << 4, out=out["values"])


def _rows(weight: Tensor, out: Mapping[str, Tensor]) -> None:
    """In plain PyTorch on every device: what is quantised on the host and on a GPU is the same."""
    with ops.use("reference"):
        ops.quantise_(weight, out["values"], out["scales"])


_QUANTISE: Mapping[str, Callable[[Tensor, Mapping[str, Tensor]], None]] = {
    "int8": _int8,
    "fp8": _fp8,
    "nf4": _nf4,
    "int8-rows": _rows,
    "fp8-rows": _rows,
}
assert _QUANTISE.keys() == {*FORMS, *PRODUCTS.values()}
