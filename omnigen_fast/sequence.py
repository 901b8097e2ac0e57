"""Encoded branches: how the cache shares them and how prefill lays them out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cache import Cache, Entry, Span
from .images import InputImage
from .memory.plan import SHARED_TOKENS, Condition


@dataclass(frozen=True)
class EncodedBranch:
    """A tokenized branch. Branches with equal `key`s have equal keys and values in every layer."""

    token_ids: np.ndarray  # [condition tokens], int64, 0 in the slots of images
    kv_end: np.ndarray  # [condition tokens], int32: each token sees those before this index
    spans: tuple[tuple[int, int, InputImage], ...]  # (first slot, slot after the last, image)
    long: bool  # whether its rotary embedding uses the long factor
    key: Hashable

    @property
    def length(self) -> int:
        """The number of condition tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class ConditionSequence:
    """The rows that prefill computes for a branch: `[its own tokens | time tokens of all steps]`.

    Every cache entry is computed on its own, so its keys and values are bit-identical whatever the
    rest of the batch.
    """

    branch: EncodedBranch
    shared: int  # tokens before these, computed by the previous sequence
    token_ids: Tensor  # [rows], int64, 0 for image and time tokens
    positions: Tensor  # [rows], int64; all time tokens share the position after the condition
    kv_end: Tensor  # [shared + rows], int32, see kernels.reference.attention_prefill
    cu_rows: Tensor  # [2], int32: 0 and shared + rows
    cache_rows: Tensor  # [rows], int64: cache row of each key and value


def pair_up(branches: Sequence[EncodedBranch]) -> list[tuple[EncodedBranch, ...]]:
    """Groups the branches of a picture for the cache: single, or two with a common prefix.

    If the image comes before the instruction, the image branch and the full condition have a
    common prefix; its keys and values are equal if both use the same rotary factor. Only the pair
    with the longest prefix is formed.
    """
    distinct = list({branch.key: branch for branch in branches}.values())
    pairs = [
        (shared_tokens(one, other), i, j)
        for i, one in enumerate(distinct)
        for j, other in enumerate(distinct[:i])
    ]
    shared, i, j = max(pairs, default=(0, 0, 0))
    if shared < SHARED_TOKENS:
        return [(branch,) for branch in distinct]
    rest = [(branch,) for place, branch in enumerate(distinct) if place not in (i, j)]
    return [(distinct[j], distinct[i]), *rest]


def shared_tokens(one: EncodedBranch, other: EncodedBranch) -> int:
    """The length of the common prefix, in tokens with equal keys and values."""
    if one.long != other.long:
        return 0
    most = min(one.length, other.length)
    same = (one.token_ids[:most] == other.token_ids[:most]) & (
        one.kv_end[:most] == other.kv_end[:most]
    )
    shared = most if same.all() else int(same.argmin())
    places = [
        {(first, stop, image.digest, image.size) for first, stop, image in branch.spans}
        for branch in (one, other)
    ]
    # an image's tokens see the whole image, so it is shared whole or not at all
    ends = [first for first, *_ in places[0] ^ places[1]]
    ends += [first for first, stop, *_ in places[0] & places[1] if stop > shared]
    return min([shared, *ends])


def cache_entries(
    pictures: Sequence[Sequence[EncodedBranch]],
    steps: int,
    share: bool = True,
    form: Callable[[Sequence[EncodedBranch]], Hashable] = lambda branches: None,
) -> dict[Entry, tuple[EncodedBranch, ...]]:
    """The cache entries that pictures need, and the branches of each entry.

    Args:
        pictures: the branches of each picture.
        steps: time tokens after each branch.
        share: whether branches with a common prefix share its rows.
        form: see `Entry.form`, of the branches of an entry.
    """
    entries: dict[Entry, tuple[EncodedBranch, ...]] = {}
    for branches in pictures:
        for kept in pair_up(branches) if share else [(branch,) for branch in branches]:
            shared = shared_tokens(*kept) if len(kept) == 2 else 0
            condition = Condition(tuple(branch.length for branch in kept), shared)
            keys = tuple(branch.key for branch in kept)
            entries[Entry(keys, condition, steps, form(kept))] = kept
    return entries


def lay_out_all(
    entries: Mapping[Entry, Sequence[EncodedBranch]],
    cache: Cache,
    device: torch.device,
) -> list[ConditionSequence]:
    """The sequences that prefill computes for entries of the cache, in order."""
    return [
        lay_out(branch, entry.steps, span, device)
        for entry, branches in entries.items()
        for branch, span in zip(branches, cache[entry])
    ]


def lay_out(
    branch: EncodedBranch, steps: int, span: Span, device: torch.device
) -> ConditionSequence:
    """Lays a branch out for prefill.

    Args:
        branch: the branch.
        steps: time tokens after it.
        span: its rows in the cache.
        device: of the sequence.
    """
    length, shared = branch.length, span.shared
    kv_end = torch.full((length + steps,), length, dtype=torch.int32)
    kv_end[:length] = torch.from_numpy(branch.kv_end)
    token_ids = torch.zeros(length - shared + steps, dtype=torch.int64)
    token_ids[: length - shared] = torch.from_numpy(branch.token_ids[shared:])
    return ConditionSequence(
        branch=branch,
        shared=shared,
        token_ids=token_ids.to(device),
        positions=torch.arange(shared, length + steps, device=device).clamp(max=length),
        kv_end=kv_end.to(device),
        cu_rows=torch.tensor([0, length + steps], dtype=torch.int32, device=device),
        cache_rows=span.rows(steps, device),
    )
