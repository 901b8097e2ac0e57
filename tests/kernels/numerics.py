"""What the numerical tests share: bounds that are earned, buffers that show stray accesses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32)
_GUARD = 64


def name(value) -> str | None:
    """A short id for a dtype among a test's parameters."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inside(x: Tensor, gap: int = 8) -> tuple[Tensor, Callable[[], bool]]:
    """`x` as rows `gap` elements apart in a buffer of NaN, and whether that NaN still stands.

    What reads beside the rows returns NaN, what writes there is found out. Integers have the least
    one instead.
    """
    beside = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min
    width = x[:1].numel() if x.shape[0] else x.shape[1:].numel()
    stride = width + gap
    length = 2 * _GUARD + x.shape[0] * stride
    buffer = torch.full((length,), beside, dtype=x.dtype, device=x.device)
    inner = [1]
    for size in reversed(x.shape[2:]):
        inner.insert(0, inner[0] * size)
    view = buffer.as_strided(x.shape, (stride, *inner), _GUARD)
    view.copy_(x)

    def untouched() -> bool:
        rest = buffer.clone()
        rest.as_strided(x.shape, (stride, *inner), _GUARD).fill_(beside)
        return bool((rest.isnan() if x.is_floating_point() else rest == beside).all())

    return view, untouched


def poisoned(*shape: int, dtype: torch.dtype, gap: int = 8) -> tuple[Tensor, Callable[[], bool]]:
    """An output full of NaN; see `inside`."""
    return inside(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE), gap)


def assert_earned(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No worse than twice plain PyTorch in the same dtype, over all and at the worst element.

    Args:
        found: what a kernel computed.
        plain: what the reference computed from the same inputs in the same dtype.
        exact: what the reference computed in float64.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape == exact.shape
    assert exact.dtype == torch.float64 and not exact.isnan().any()
    if not exact.numel():
        return
    # two roundings of the float32 that kernels work in: where plain PyTorch happens to be exact
    tiny = 2 * torch.finfo(torch.float32).eps
    for norm in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        size = norm(exact)
        kernel, reference = (norm(x.double() - exact) for x in (found, plain))
        assert kernel <= 2 * reference + tiny * size, (
            f"error {(kernel / size).item():.2e}, of plain PyTorch {(reference / size).item():.2e}"
        )


def double(*tensors: Tensor) -> list[Tensor]:
    """Floating tensors as float64 copies, others as copies."""
    return [x.double().clone() if x.is_floating_point() else x.clone() for x in tensors]
