"""Precision: in which forms weights are stored, computed with, and conditions kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RequestError, brief
from .forms import FORMS

if TYPE_CHECKING:
    import torch

_BYTES = {"bfloat16": 2, "float32": 4}
AUTO = "auto"  # the planner chooses
STORAGES = ("bfloat16", *FORMS)  # that a caller may name, from the one that changes weights least


@dataclass(frozen=True)
class Precision:
    """Names of a storage and two dtypes. The autoencoder is float32 whatever they are.

    Each of the three is decided and counted on its own. Weights are stored in the dtype of the
    arithmetic, or the matrices of the layers in one of `forms.FORMS` and the others in that dtype.
    Attention reads keys and values in the dtype of the queries.

    Raises RequestError for names or combinations that nothing computes.
    """

    storage: str  # of the weights, on the device and on the host
    arithmetic: str  # of activations and products
    cache: str  # of the condition's keys and values

    def __post_init__(self) -> None:
        for name in (self.arithmetic, self.cache):
            if name not in _BYTES:
                raise RequestError(f"dtype must be bfloat16 or float32, got {name!r}")
        if self.storage not in _BYTES and self.storage not in FORMS:
            raise RequestError(
                f"weights must be {', '.join(STORAGES)} or {AUTO}, got {brief(self.storage)}"
            )
        plain = not self.quantised and self.storage != self.arithmetic
        if plain or self.cache != self.arithmetic:
            raise RequestError(
                f"weights in {self.storage}, arithmetic in {self.arithmetic} and a cache in "
                f"{self.cache} can't be combined; use one dtype for all three, or weights in "
                f"{', '.join(FORMS)}"
            )

    @classmethod
    def of(cls, dtype: str | torch.dtype, weights: str | None = None) -> Precision:
        """One dtype for all three, by name or as a `torch.dtype`; or weights in another form."""
        name = str(dtype).removeprefix("torch.")
        return cls(name if weights is None else weights, name, name)

    def with_dtype(self, dtype: str | torch.dtype) -> Precision:
        """Arithmetic and cache in another dtype, and plain weights too."""
        return Precision.of(dtype, self.storage if self.quantised else None)

    @property
    def quantised(self) -> bool:
        """Whether the matrices of the layers are stored in one of `forms.FORMS`."""
        return self.storage in FORMS

    @property
    def arithmetic_bytes(self) -> int:
        """Of one activation, and of one weight in a product."""
        return _BYTES[self.arithmetic]

    @property
    def cache_bytes(self) -> int:
        """Of one value of a key or value."""
        return _BYTES[self.cache]

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        return _dtype(self.arithmetic)

    @property
    def cache_dtype(self) -> torch.dtype:
        return _dtype(self.cache)


def _dtype(name: str) -> torch.dtype:
    import torch  # takes seconds, and plans need none of it

    return getattr(torch, name)
