"""Processor: prompts to tokens."""

from __future__ import annotations

import os
import warnings
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig
from .errors import CheckpointError, RequestError, brief
from .guidance import Branch
from .request import PLACEHOLDER
from .sequence import EncodedBranch
from .tokenizer_file import is_library_error, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BEFORE = "<|user|>\nGenerate an image according to the following instructions\n"
_AFTER = "<|end|>\n<|assistant|>\n<|diffusion|>"
_BOS = "<s>"
_MAX_PLACEHOLDERS = 1024  # of a prompt: each is a piece of its own to tokenize and to embed
_NAMED_WORDS = 3  # unknown ones that a message names at most
_SPECIAL = ("<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>")


class Processor:
    """Tokenizes branches; caches the latest 256 texts.

    Args:
        tokenizer: OmniGen's, or one of its kind.
        config: sizes of the model.
        vocabulary: a sentence on what the model can draw, for prompts with words that a word-level
            tokenizer does not know.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, vocabulary: str | None = None
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        bos = tokenizer.token_to_id(_BOS)
        if bos is None:
            raise CheckpointError(
                f"the tokenizer has no token {_BOS}; this is not OmniGen's tokenizer.json"
            )
        self._bos: int = bos
        missing = [token for token in _SPECIAL if tokenizer.token_to_id(token) is None]
        if missing:
            # they are split into smaller tokens, as in the original
            warnings.warn(
                f"the tokenizer has no token {', '.join(missing)}; is it OmniGen's tokenizer.json?",
                UserWarning,
                stacklevel=3,
            )
        self._tokens = lru_cache(maxsize=256)(self._tokenize)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], config: ModelConfig, vocabulary: str | None = None
    ) -> Processor:
        """Reads a `tokenizer.json`; the other arguments are those of the class.

        Raises CheckpointError if it is missing, malformed or not of OmniGen's kind.
        """
        return cls(read_tokenizer(path), config, vocabulary)

    def unknown_words(self, text: str) -> str | None:
        """A sentence on the words of a prompt that a word-level tokenizer does not know, or None.

        They are all taken as one and the same word; other tokenizers know every text.
        """
        unknown_token = self._unknown_token
        if unknown_token is None:
            return None
        unknown: list[str] = []
        for piece in PLACEHOLDER.split(text)[::2]:
            found = self._tokenizer.encode(piece, add_special_tokens=False)
            unknown += [
                piece[start:stop]
                for token, (start, stop) in zip(found.ids, found.offsets)
                if token == unknown_token and any(map(str.isalnum, piece[start:stop]))
            ]
        if not unknown:
            return None
        several = list(dict.fromkeys(map(brief, unknown)))
        words = ", ".join(several[:_NAMED_WORDS]) + " and others" * (len(several) > _NAMED_WORDS)
        return (
            f"the model does not know {words}. "
            f"{self._vocabulary or 'Use words of its tokenizer.json.'}"
        )

    @cached_property
    def _unknown_token(self) -> int | None:
        """What a word-level tokenizer gives for words that it does not know."""
        model = getattr(self._tokenizer, "model", None)
        name = getattr(model, "unk_token", None)
        if type(model).__name__ != "WordLevel" or name is None:
            return None
        return self._tokenizer.token_to_id(name)

    def encode(self, branch: Branch, noise_tokens: int, steps: int) -> EncodedBranch:
        """Tokenizes one branch.

        Args:
            branch: text and images.
            noise_tokens: that follow the branch and its time token; they decide the rotary factor.
            steps: becomes part of the branch's key.

        Raises:
            RequestError: the branch has more tokens than the model has positions.
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
        """Drops the cached texts."""
        self._tokens.cache_clear()

    def _tokenize(
        self, text: str, image_tokens: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int, int], ...]]:
        """Token ids, kv_end, and of each image (first slot, slot after the last, index)."""
        # splitting at a group gives text, image number, text, ..., image number, text
        pieces = PLACEHOLDER.split(_BEFORE + text + _AFTER)
        texts, numbers = pieces[::2], [int(piece) - 1 for piece in pieces[1::2]]
        # before any piece is tokenized: a prompt may name an image many times
        slots = sum(image_tokens[number] for number in numbers)
        if slots > self.config.max_position_embeddings:
            raise self._too_long(slots)
        if len(numbers) > _MAX_PLACEHOLDERS:
            raise RequestError(
                f"the prompt names its images {len(numbers):,} times, at most "
                f"{_MAX_PLACEHOLDERS:,} times are read; name each image once or twice"
            )
        try:
            encoded = [self._tokenizer.encode(one, add_special_tokens=False).ids for one in texts]
        except BaseException as error:  # the library's own, for example for unknown words
            if not is_library_error(error):
                raise
            raise CheckpointError(f"the tokenizer can't encode the prompt: {error}") from error
        length = 1 + sum(map(len, encoded)) + slots
        if length > self.config.max_position_embeddings:
            raise self._too_long(length)
        ids, kv_end = [self._bos], [1]
        places: list[tuple[int, int, int]] = []
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
                f"the tokenizer gives token {max(ids)}, but the model has {self.config.vocab_size} "
                "tokens; tokenizer.json and the weights do not belong together"
            )
        return np.array(ids, np.int64), np.array(kv_end, np.int32), tuple(places)

    def _too_long(self, tokens: int, picture: str = "") -> RequestError:
        return RequestError(
            f"a prompt of {tokens} tokens{picture} is more than the model's "
            f"{self.config.max_position_embeddings} positions; shorten the prompt, or make its "
            "images or the picture smaller"
        )
