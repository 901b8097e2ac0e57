"""The tokens of guidance branches as the cache keeps them and as prefill computes them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cache import Entry, Span
from .images import InputImage
from .memory.plan import SHARED_TOKENS, Condition


@dataclass(frozen=True)
class EncodedBranch:
    """A branch as tokens. Equal `key`s have equal keys and values in every layer."""

    token_ids: np.ndarray  # [condition tokens], int64, 0 in the slots of images
    kv_end: np.ndarray  # [condition tokens], int32: each sees the tokens before this place
    spans: tuple[tuple[int, int, InputImage], ...]  # (first, past the last) slot of each image
    long: bool  # whether its rotary embedding takes the long factor
    key: Hashable

    @property
    def length(self) -> int:
        """Condition tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class ConditionSequence:
    """What prefill computes of a branch: `[tokens that no other has | time tokens of all steps]`.

    Each entry of the cache is computed on its own, so that its keys and values have the same bits
    whatever else is computed beside it.
    """

    branch: EncodedBranch
    shared: int  # tokens in front of these, computed by the sequence before
    token_ids: Tensor  # [rows], int64, 0 where an image or a time token stands
    positions: Tensor  # [rows], int64; time tokens all stand behind the condition
    kv_end: Tensor  # [shared + rows], int32, see kernels.reference.attention_prefill
    cu_rows: Tensor  # [2], int32: 0 and shared + rows
    cache_rows: Tensor  # [rows], int64: where each row's key and value go


def pair_up(branches: Sequence[EncodedBranch]) -> list[tuple[EncodedBranch, ...]]:
    """The branches of one picture as the cache keeps them: alone, or two that begin alike.

    With the image in front of the instruction, the branch of the images begins as the whole
    condition does: their keys and values are the same up to where they differ, if both have the
    same rotary factor. Of all pairs the one that shares most is made.
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
    """How many tokens from the first on have the same keys and values in both branches."""
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
    # an image's tokens see all of it, so it is shared whole or not at all
    ends = [first for first, *_ in places[0] ^ places[1]]
    ends += [first for first, stop, *_ in places[0] & places[1] if stop > shared]
    return min([shared, *ends])


def cache_entries(
    pictures: Sequence[Sequence[EncodedBranch]], steps: int, share: bool = True
) -> dict[Entry, tuple[EncodedBranch, ...]]:
    """What the cache is to hold for some pictures, and the branches of each entry.

    Args:
        pictures: the branches of each.
        steps: how many time tokens stand behind each branch.
        share: whether a picture's branches that begin alike are kept together.
    """
    entries = {}
    for branches in pictures:
        for kept in pair_up(branches) if share else [(branch,) for branch in branches]:
            shared = shared_tokens(*kept) if len(kept) == 2 else 0
            condition = Condition(tuple(branch.length for branch in kept), shared)
            entries[Entry(tuple(branch.key for branch in kept), condition, steps)] = kept
    return entries


def lay_out_all(
    entries: Mapping[Entry, Sequence[EncodedBranch]],
    cache: Mapping[Entry, Sequence[Span]],
    device: torch.device,
) -> list[ConditionSequence]:
    """What prefill is to compute for some entries of the cache, in its order."""
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
        branch: what to compute.
        steps: how many time tokens stand behind it.
        span: its rows in the cache.
        device: where the sequence is to be.
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
