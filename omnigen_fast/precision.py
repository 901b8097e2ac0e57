"""Precision: in which dtypes weights are stored, computed with, and conditions kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RequestError

if TYPE_CHECKING:
    import torch

_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Precision:
    """Names of three dtypes. The autoencoder is float32 whatever they are.

    Each of the three is decided and counted on its own. So far all of them must be equal: weights
    are dense, and attention reads keys and values in the dtype of the queries.

    Raises RequestError for names or combinations that nothing computes.
    """

    storage: str  # of the weights, on the device and on the host
    arithmetic: str  # of activations and products
    cache: str  # of the condition's keys and values

    def __post_init__(self) -> None:
        names = (self.storage, self.arithmetic, self.cache)
        for name in names:
            if name not in _BYTES:
                raise RequestError(f"dtype must be bfloat16 or float32, got {name!r}")
        if len(set(names)) > 1:
            raise RequestError(
                f"weights in {self.storage}, arithmetic in {self.arithmetic} and a cache in "
                f"{self.cache} can't be combined; use one dtype for all three"
            )

    @classmethod
    def of(cls, dtype: str | torch.dtype) -> Precision:
        """One dtype for all three, by name or as a `torch.dtype`."""
        name = str(dtype).removeprefix("torch.")
        return cls(name, name, name)

    @property
    def storage_bytes(self) -> int:
        """Of one weight."""
        return _BYTES[self.storage]

    @property
    def arithmetic_bytes(self) -> int:
        """Of one activation."""
        return _BYTES[self.arithmetic]

    @property
    def cache_bytes(self) -> int:
        """Of one value of a key or value."""
        return _BYTES[self.cache]

    @property
    def storage_dtype(self) -> torch.dtype:
        return _dtype(self.storage)

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        return _dtype(self.arithmetic)

    @property
    def cache_dtype(self) -> torch.dtype:
        return _dtype(self.cache)


def _dtype(name: str) -> torch.dtype:
    import torch  # takes seconds, and plans need none of it

    return getattr(torch, name)
