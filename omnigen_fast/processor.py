"""From prompts and images to the condition sequences that the transformer reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .cache import Entry, Span
from .config import ModelConfig
from .errors import CheckpointError, RequestError
from .images import InputImage
from .memory.plan import SHARED_TOKENS, Condition
from .request import PLACEHOLDER, Guidance, Prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BEFORE = "<|user|>\nGenerate an image according to the following instructions\n"
_AFTER = "<|end|>\n<|assistant|>\n<|diffusion|>"
_BOS = "<s>"
_SPECIAL = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>")


@dataclass(frozen=True)
class Branch:
    """A guidance branch: the condition of one velocity that guidance combines."""

    text: str
    images: tuple[InputImage, ...] = ()


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


def guidance_branches(prompt: Prompt, guidance: Guidance) -> list[tuple[Branch, float]]:
    """The branches of one prompt and what the velocity of each counts.

    `v = uncond + w_img (img - uncond) + w (cond - img)` with image guidance, else
    `v = uncond + w (cond - uncond)`, collected by branch; a branch that counts 0 is left out, which
    changes no value.
    """
    text, image = guidance.text, guidance.image
    cond, uncond = Branch(prompt.text, prompt.images), Branch(prompt.negative)
    if guidance.use_image and prompt.images:
        tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(len(prompt.images)))
        branches = [(cond, text), (uncond, 1 - image), (Branch(tags, prompt.images), image - text)]
    else:
        branches = [(cond, text), (uncond, 1 - text)]
    return [(branch, coefficient) for branch, coefficient in branches if coefficient]


class Processor:
    """Tokenizes branches; remembers the latest 256 texts."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._bos = tokenizer.token_to_id(_BOS)
        if self._bos is None:
            raise CheckpointError(
                f"the tokenizer has no token {_BOS}; this is not OmniGen's tokenizer.json"
            )
        lacking = [token for token in _SPECIAL if tokenizer.token_to_id(token) is None]
        if lacking:
            # the original would spell them out in smaller tokens, and so does this
            warnings.warn(
                f"the tokenizer has no token {', '.join(lacking)}; is it OmniGen's tokenizer.json?",
                UserWarning,
                stacklevel=3,
            )
        self._tokens = lru_cache(maxsize=256)(self._tokenize)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], config: ModelConfig) -> Processor:
        """Reads a `tokenizer.json`.

        Raises CheckpointError if it is missing or malformed.
        """
        from tokenizers import Tokenizer

        if not os.path.isfile(path):
            raise CheckpointError(f"{path} does not exist; the model folder needs a tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception on malformed files
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, config)

    def encode(self, branch: Branch, noise_tokens: int, steps: int) -> EncodedBranch:
        """Tokens of one branch that is followed by a time token and `noise_tokens` noise tokens.

        Raises:
            RequestError: the branch is longer than the model's positions.
        """
        ids, kv_end, places = self._tokens(branch.text, tuple(i.tokens for i in branch.images))
        total = len(ids) + 1 + noise_tokens
        if total > self.config.max_position_embeddings:
            raise self._too_long(len(ids), f" with {noise_tokens} for the picture")
        spans = tuple((first, stop, branch.images[number]) for first, stop, number in places)
        long = self.config.uses_long_factor(total)
        images = tuple((image.digest, image.size) for _, _, image in spans)
        return EncodedBranch(ids, kv_end, spans, long, (branch.text, images, long, steps))

    def clear(self) -> None:
        """Forgets the remembered texts."""
        self._tokens.cache_clear()

    def _tokenize(
        self, text: str, image_tokens: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int, int], ...]]:
        """Token ids, kv_end, and the (first, past the last) slot and index of each image."""
        # split() with a group: text, image number, text, image number, ..., text
        pieces = PLACEHOLDER.split(_BEFORE + text + _AFTER)
        texts, numbers = pieces[::2], [int(piece) - 1 for piece in pieces[1::2]]
        try:
            encoded = [self._tokenizer.encode(one, add_special_tokens=False).ids for one in texts]
        except Exception as error:  # the library's own, if a word is in no vocabulary
            raise CheckpointError(f"the tokenizer can't encode the prompt: {error}") from error
        length = 1 + sum(map(len, encoded)) + sum(image_tokens[number] for number in numbers)
        if length > self.config.max_position_embeddings:
            # before a place is made for each: one image may be named many times
            raise self._too_long(length)
        ids, kv_end, places = [self._bos], [1], []
        for index, words in enumerate(encoded):
            ids += words
            kv_end += range(len(kv_end) + 1, len(ids) + 1)
            if index < len(numbers):
                start, slots = len(ids), image_tokens[numbers[index]]
                ids += [0] * slots
                kv_end += [start + slots] * slots
                places.append((start, start + slots, numbers[index]))
        if max(ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, the model has {self.config.vocab_size}; "
                "tokenizer.json and the weights do not belong together"
            )
        return np.array(ids, np.int64), np.array(kv_end, np.int32), tuple(places)

    def _too_long(self, tokens: int, picture: str = "") -> RequestError:
        return RequestError(
            f"a prompt of {tokens} tokens{picture} is more than the model's "
            f"{self.config.max_position_embeddings} positions; shorten the prompt, or make its "
            "images or the picture smaller"
        )


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
