"""The tokenizer: every word that the tasks use is a token."""

from __future__ import annotations

import random
import re
from pathlib import Path

from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT

from .phrases import SHARE, free_words
from .tasks import KINDS, random_task

# The ids of the first three are those of OmniGen's tokenizer.
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>")
IMAGE_TAGS = ("<img>", "</img>", *(f"<|image_{number}|>" for number in range(1, 11)))
_INSTRUCTION = "Generate an image according to the following instructions"
_EXTRA = "an a the of in to with and , . ! ? no one two shape object thing mask empty background"


def vocabulary() -> list[str]:
    """All words, sorted; drawn until long after no new one appears."""
    rng = random.Random(0)
    text = [_INSTRUCTION, _EXTRA, DEFAULT_NEGATIVE_PROMPT]
    text += [random_task(kind, rng).words(rng) for kind in KINDS for _ in range(500)]
    text += [free_words(random_task(kind, rng), rng) for kind in SHARE for _ in range(4000)]
    joined = re.sub(r"<[^>]*>", " ", " ".join(text)).lower()
    # as the tokenizer splits; ")." is one piece
    return sorted(set(re.findall(r"\w+|[^\w\s]+", joined)))


def write_tokenizer(path: Path) -> int:
    """Writes a `tokenizer.json`; returns the number of tokens."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    words = vocabulary()
    ids = {token: index for index, token in enumerate([*SPECIAL, *IMAGE_TAGS, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (*SPECIAL, *IMAGE_TAGS)]
    )
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()
