"""The tokenizer's file, and prompts that it is to encode."""

from __future__ import annotations

import json
import random
from pathlib import Path

from omnigen_fast.config import ModelConfig
from omnigen_fast.guidance import Branch
from omnigen_fast.processor import Processor

from .. import mutate, tiny
from .folders import Files, Folders, special

_WHOLE = 50  # every so many inputs a pipeline is loaded and makes a picture
_PROMPTS = ("a cat on a mat", "é日本語 👩‍👩‍👧 <|user|> x" + " y" * 200, "e\u0301" * 50 + "\ufeff")
_PARTS = (
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/" * 40_000},
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}] * 50},
    {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}]
        * 9,
    },
    {"type": "Prepend", "prepend": "▁" * 1000},
    {"type": "Prepend", "prepend": ""},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False},
    {"type": "Unigram", "unk_id": 9, "vocab": []},
    {"type": "WordLevel", "vocab": {"<s>": 1}, "unk_token": "<unk>"},
    {
        "type": "WordPiece",
        "vocab": {"<s>": 1},
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
    {"type": "Fixed"},
    ["a", "b"],
    "a b",
    "<s>",
    "<unk>",
    "▁",
    0.9,
    {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
    {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    {
        "id": 1 << 31,
        "content": "<s>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    },
)
_NAMES = (
    *("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"),
    *("truncation", "padding", "vocab", "merges", "dropout", "unk_token", "byte_fallback"),
    *("type", "content", "pattern", "id", "<s>", "<unk>", "ignore_merges", "fuse_unk"),
)


class Tokenizers(Folders):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model, _ = tiny.write_models(folder)
        self.pristine = self._model
        self._config = ModelConfig.from_phi3(tiny.CONFIG, 8)
        self._pipe = tiny.load_pipe(self._model)

    def make(self, rng: random.Random, number: int) -> Files:
        if rng.random() < 0.01:
            return {"tokenizer.json": special(rng)}
        values = tiny.tokenizer()
        if rng.random() < 0.4:
            part = rng.choice(("normalizer", "pre_tokenizer", "model", "padding", "truncation"))
            values[part] = rng.choice(_PARTS)
        values = mutate.tree(rng, json.loads(json.dumps(values)), _PARTS, _NAMES)
        return {"tokenizer.json": mutate.json_bytes(rng, values)}

    def run(self, prepared: Path, number: int) -> None:
        if number % _WHOLE == 0:
            tiny.picture(tiny.load_pipe(prepared))
            return
        first, second = (
            Processor.from_file(prepared / "tokenizer.json", self._config) for _ in range(2)
        )
        for prompt in _PROMPTS:
            one, other = (reader.encode(Branch(prompt), 4, 1) for reader in (first, second))
            assert one.token_ids.tolist() == other.token_ids.tolist(), (
                "other tokens the second time"
            )

    def good(self) -> bytes:
        self._pipe.clear_cache()
        return tiny.picture(self._pipe)

    def renew(self) -> None:
        self._pipe = tiny.load_pipe(self._model)
