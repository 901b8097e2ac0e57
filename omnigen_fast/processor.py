"""From prompts and images to the condition sequences that the transformer reads."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig
from .errors import CheckpointError, RequestError
from .request import PLACEHOLDER

if TYPE_CHECKING:
    from tokenizers import Tokenizer
from .guidance import Branch
from .sequence import EncodedBranch

_BEFORE = "<|user|>\nGenerate an image according to the following instructions\n"
_AFTER = "<|end|>\n<|assistant|>\n<|diffusion|>"
_BOS = "<s>"
_SPECIAL = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>")


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
