"""LoRA adapters: which are loaded, what each adds, and the weights they are merged into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import RequestError
from ..linear import Weight
from ..precision import Precision
from .checkpoint import Checkpoint, stored

MAX_SCALE = 1e9  # of an update; larger ones overflow float32 sums
_SHOWN_NAMES, _SHOWN_LENGTH = 3, 60  # of adapters, in an error


@dataclass(frozen=True)
class LowRank:
    """`scale * up @ down`, added to some rows of one parameter (Hu et al., 2021)."""

    parameter: str
    start: int  # first row
    down: Tensor  # [rank, inputs], float32
    up: Tensor  # [outputs, rank], float32
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA as it was read."""

    updates: tuple[LowRank, ...]


@dataclass(frozen=True)
class Loaded:
    """An adapter, and how strongly it acts."""

    adapter: Adapter
    name: str | None  # None: unloaded after it was fused
    weight: float
    active: bool = True
    fused: float | None = None  # the strength that it keeps, whatever happens to its name


@dataclass(frozen=True)
class Loras:
    """The adapters of a model in the order of their loading; each change gives another object.

    The order alone decides in which order updates are summed, so equal strengths mean equal bits.
    """

    loaded: tuple[Loaded, ...] = ()
    enabled: bool = True

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.loaded if one.name is not None]

    @property
    def active(self) -> list[str]:
        return [one.name for one in self.loaded if one.name is not None and one.active]

    def applied(self) -> list[tuple[Adapter, float]]:
        """Adapters with their strengths, as they act on the weights."""
        strengths = [
            (one.adapter, one.fused)
            if one.fused is not None
            else (one.adapter, one.weight if one.active and self.enabled else 0.0)
            for one in self.loaded
        ]
        return [(adapter, strength) for adapter, strength in strengths if strength]

    def changed(self, other: Loras) -> set[str]:
        """Parameters whose values differ between two states."""
        before, after = dict(self.applied()), dict(other.applied())
        return {
            update.parameter
            for adapter in before.keys() | after.keys()
            if before.get(adapter) != after.get(adapter)
            for update in adapter.updates
        }

    def free_name(self, name: str) -> str:
        """`name`, or with a number if an adapter has it."""
        taken = set(self.names)
        numbered = (f"{name} ({i})" for i in range(2, len(taken) + 3))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def check_new(self, name: str) -> None:
        """Raises RequestError if an adapter has the name."""
        if name in self.names:
            raise RequestError(
                f"an adapter {_named(name)} is loaded already; unload it first, or give another "
                "adapter_name"
            )

    def with_adapter(self, name: str, adapter: Adapter, weight: float) -> Loras:
        self.check_new(name)
        return replace(self, loaded=(*self.loaded, Loaded(adapter, name, weight)))

    def without(self, names: Iterable[str]) -> Loras:
        """Unloads adapters; what was fused stays in the weights.

        Raises RequestError if there is none of a name.
        """
        gone = set(names)
        self._check(gone)
        kept = [
            replace(one, name=None) if one.name in gone else one
            for one in self.loaded
            if one.name not in gone or one.fused is not None
        ]
        return replace(self, loaded=tuple(kept))

    def with_active(self, weights: Mapping[str, float]) -> Loras:
        """Makes these adapters active, with these weights, and no others."""
        self._check(weights)
        changed = [
            one
            if one.name is None
            else replace(one, active=True, weight=weights[one.name])
            if one.name in weights
            else replace(one, active=False)
            for one in self.loaded
        ]
        return replace(self, loaded=tuple(changed))

    def with_fused(self, scale: float, names: Sequence[str] | None) -> Loras:
        """Fuses the active adapters, or those named, at their weights times `scale`.

        Raises RequestError if there is nothing to fuse, one is fused already, or the product is
        too large.
        """
        chosen = set(self.active if names is None else names)
        self._check(chosen)
        fused, loaded = 0, []
        for one in self.loaded:
            if one.name in chosen:
                if one.fused is not None and names is None:
                    loaded.append(one)
                    continue
                if one.fused is not None:
                    raise RequestError(
                        f"{_named(one.name)} is fused already; call unfuse_lora() first"
                    )
                strength = one.weight * scale
                if not abs(strength) <= MAX_SCALE:
                    raise RequestError(
                        f"lora_scale {scale:g} times the weight of {_named(one.name)} is above "
                        f"{MAX_SCALE:g}"
                    )
                fused += 1
                one = replace(one, fused=strength)
            loaded.append(one)
        if not fused:
            raise RequestError(
                "there is no active adapter to fuse that is not fused already; load one with "
                "load_lora_weights"
            )
        return replace(self, loaded=tuple(loaded))

    def without_fused(self) -> Loras:
        """Adapters act by their weights again; those unloaded since are gone."""
        kept = [replace(one, fused=None) for one in self.loaded if one.name is not None]
        return replace(self, loaded=tuple(kept))

    def _check(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in set(self.names)]
        if unknown:
            some = [_named(name) for name in self.names[:_SHOWN_NAMES]]
            more = ["..."] if len(self.names) > _SHOWN_NAMES else []
            raise RequestError(
                f"no adapter {_named(unknown[0])} is loaded; loaded: "
                f"{', '.join(some + more) or 'none'}"
            )


def merged(
    checkpoint: Checkpoint,
    adapters: Iterable[tuple[Adapter, float]],
    precision: Precision,
    device: torch.device,
    parameters: Iterable[str],
) -> Iterator[tuple[str, Weight]]:
    """Names and values of `parameters`: the checkpoint's plus all updates, rounded once.

    Each value is computed from the checkpoint, so it does not depend on which adapters were loaded
    before; without adapters the weights are the checkpoint's, bit for bit. Quantised weights are
    quantised again from the sum.

    Args:
        adapters: each with its strength.
    """
    by_parameter: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
    for adapter, strength in adapters:
        for update in adapter.updates:
            by_parameter[update.parameter].append((update, strength))
    for name in parameters:
        updates = by_parameter.get(name)
        if not updates:
            yield from checkpoint.read_stored(precision, device, [name]).items()
        else:
            # float32: a low-rank update is often below bfloat16's resolution of the weight
            exact = checkpoint.exact(name, precision, device)
            matrix = exact.flatten(1)
            for update, strength in updates:
                rows = matrix[update.start : update.start + len(update.up)]
                up, down = update.up.to(rows.device), update.down.to(rows.device)
                rows.addmm_(up, down, alpha=update.scale * strength)
            yield name, stored(name, exact, precision)


def _named(name: object) -> str:
    """A name for an error message, cut."""
    text = repr(name)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."
