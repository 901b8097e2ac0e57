"""Precision: in which forms weights are stored, computed with, and conditions kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import RequestError, brief
from .forms import CACHES, COMPUTED, FORMS, PRODUCTS, QUANTISED, cache_row_bytes

if TYPE_CHECKING:
    import torch

_BYTES = {"bfloat16": 2, "float32": 4}
_OLDEST_FP8 = (8, 9)
_FP8_ARCHITECTURES = ("gfx95", "gfx12")  # with the e4m3 of float8_e4m3fn
AUTO = "auto"  # the planner chooses
STORAGES = ("bfloat16", *FORMS)  # that a caller may name, from the one that changes weights least
COMPUTES = ("bfloat16", *PRODUCTS)  # likewise
CACHED = ("bfloat16", *CACHES)  # likewise
LIBRARIES = ("flash", "cudnn")  # that can compute a step's attention
ATTENTIONS = (AUTO, "triton", *LIBRARIES)


@dataclass(frozen=True)
class Precision:
    """Names of a storage, two dtypes, of what products are computed in, and of who attends.

    Each of them is decided and counted on its own. Weights are stored in the dtype of the
    arithmetic, or the matrices of the layers in one of `forms.FORMS` and the others in that dtype.
    Products in 8 bits take weights in a form of their own, whatever the storage of the others.
    Attention reads keys and values in the dtype of the queries or in one of `forms.CACHES`.

    Raises RequestError for names or combinations that nothing computes.
    """

    storage: str  # of the weights, on the device and on the host
    arithmetic: str  # of activations and products
    cache: str  # of the condition's keys and values
    compute: str | None = None  # of products in 8 bits (`forms.PRODUCTS`); None for the arithmetic
    attention: str = AUTO  # of ATTENTIONS: who computes that of a step

    def __post_init__(self) -> None:
        if self.arithmetic not in _BYTES:
            raise RequestError(f"dtype must be bfloat16 or float32, got {self.arithmetic!r}")
        if self.cache not in _BYTES and self.cache not in CACHES:
            raise RequestError(
                f"cache must be {', '.join(CACHED[:-1])} or {CACHED[-1]}, got {brief(self.cache)}"
            )
        if self.storage not in _BYTES and self.storage not in FORMS:
            raise RequestError(
                f"weights must be {', '.join(STORAGES)} or {AUTO}, got {brief(self.storage)}"
            )
        if self.compute is not None and self.compute not in PRODUCTS:
            raise RequestError(
                f"compute must be {', '.join(COMPUTES[:-1])} or {COMPUTES[-1]}, got "
                f"{brief(self.compute)}"
            )
        if self.attention not in ATTENTIONS:
            raise RequestError(
                f"attention must be {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}, got "
                f"{brief(self.attention)}"
            )
        if self.attention in LIBRARIES and self.cache in CACHES:
            raise RequestError(
                f"attention={self.attention} reads no keys and values in {self.cache}; use "
                f"attention=triton, or no cache={self.cache}"
            )
        plain = not self.quantised and self.storage != self.arithmetic
        if plain or (self.cache not in CACHES and self.cache != self.arithmetic):
            raise RequestError(
                f"weights in {self.storage}, arithmetic in {self.arithmetic} and a cache in "
                f"{self.cache} can't be combined; use one dtype for all three, or weights in "
                f"{', '.join(FORMS)} and a cache in {', '.join(CACHES)}"
            )

    @classmethod
    def of(
        cls,
        dtype: str | torch.dtype,
        weights: str | None = None,
        compute: str | None = None,
        cache: str | None = None,
        attention: str = AUTO,
    ) -> Precision:
        """One dtype for all, by name or as a `torch.dtype`; or weights, products, cache in others.

        Raises RequestError for combinations that nothing computes.
        """
        name = str(dtype).removeprefix("torch.")
        cache = name if cache is None else cache
        found = cls(name if weights is None else weights, name, cache, attention=attention)
        return found.with_compute(compute)

    def with_dtype(self, dtype: str | torch.dtype) -> Precision:
        """Arithmetic in another dtype, and plain weights and a plain cache too."""
        storage = self.storage if self.quantised else None
        return Precision.of(dtype, storage, self.compute, self.quantised_cache, self.attention)

    def with_compute(self, compute: str | None) -> Precision:
        """Products in this dtype, as a caller names it; None for that of the arithmetic.

        Raises RequestError unless it is that dtype or one of 8 bits.
        """
        if compute in _BYTES and compute != self.arithmetic:
            raise RequestError(
                f"compute={compute} needs dtype={compute}, got dtype={self.arithmetic}"
            )
        return replace(self, compute=None if compute in _BYTES else compute)

    def form_of(self, name: str) -> str | None:
        """The form of a layer's parameter, named as in `model.Block`; None for a plain one."""
        if self.compute is not None and name in COMPUTED[self.compute]:
            return PRODUCTS[self.compute]
        return self.storage if self.quantised and name in QUANTISED else None

    @property
    def expands(self) -> bool:
        """Whether layers hold weights that must be expanded before a product takes them."""
        return any(self.form_of(name) in FORMS for name in QUANTISED)

    @property
    def expanded(self) -> Precision:
        """That of a layer as products take it."""
        return replace(self, storage=self.arithmetic)

    @property
    def saved(self) -> Precision:
        """That of files: they hold no weights in the form of products."""
        return replace(self, compute=None)

    @property
    def quantised(self) -> bool:
        """Whether the matrices of the layers are stored in one of `forms.FORMS`."""
        return self.storage in FORMS

    @property
    def quantised_cache(self) -> str | None:
        """The form of `forms.CACHES` that keys and values are kept in; None for plain ones."""
        return self.cache if self.cache in CACHES else None

    @property
    def arithmetic_bytes(self) -> int:
        """Of one activation, and of one weight in a product."""
        return _BYTES[self.arithmetic]

    def pair_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Of a token's keys and values in one layer of the cache."""
        if self.quantised_cache is not None:
            return 2 * cache_row_bytes(kv_heads, head_dim)
        return 2 * kv_heads * head_dim * _BYTES[self.cache]

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        return _dtype(self.arithmetic)

    @property
    def cache_dtype(self) -> torch.dtype:
        return _dtype(CACHES.get(self.cache, self.cache))


def check_capability(compute: str | None, capability: str | None) -> None:
    """Raises RequestError if a GPU has no such products.

    Args:
        compute: what products are computed in.
        capability: compute capability, such as "8.9", or AMD's architecture, such as "gfx942";
            None where neither is known.
    """
    if compute != "fp8" or capability is None:
        return
    if capability.startswith("gfx"):
        # gfx94x has another e4m3, with half the range; before it there is none
        if not capability.startswith(_FP8_ARCHITECTURES):
            raise RequestError(
                f"compute=fp8 needs an AMD GPU of gfx950 or gfx12, this one is {capability}; "
                "use compute=int8"
            )
    elif tuple(map(int, capability.split("."))) < _OLDEST_FP8:
        raise RequestError(
            f"compute=fp8 needs a GPU of compute capability 8.9 or later, this one has "
            f"{capability}; use compute=int8"
        )


def _dtype(name: str) -> torch.dtype:
    import torch  # takes seconds, and plans need none of it

    return getattr(torch, name)
