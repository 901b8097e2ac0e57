"""tokenizer.json: only what OmniGen's consist of, in bounded size; the ids stay the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from damage import refused
from golden_cases import TINY
from tokenizers import Tokenizer

from omnigen_fast import CheckpointError
from omnigen_fast.tokenizer_file import is_library_error, read_tokenizer

PLAIN = json.loads((TINY / "tokenizer.json").read_text())
SHAPES = Path(__file__).parents[2] / "omnigen_fast/models/shapes/tokenizer.json"
TEXTS = ("a red circle  on blue", "猫 \U0001f600 <img></img>", " x", "", "<|user|>\nHi<|end|>")


def written(folder: Path, values: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def changed(path: str, value: Any) -> dict[str, Any]:
    """The golden tokenizer with a value in another place."""
    values = json.loads(json.dumps(PLAIN))
    *parents, last = path.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return values


def replaced(pattern: Any, content: Any) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


SPACE = {"String": " "}
MERGES = PLAIN["model"]["merges"]
NESTED: Any = replaced(SPACE, "_")
for _ in range(400):
    NESTED = sequence(NESTED)


@pytest.mark.parametrize("path", [TINY / "tokenizer.json", SHAPES], ids=["golden", "shapes"])
def test_same_ids(path):
    found, plain = read_tokenizer(path), Tokenizer.from_file(str(path))
    for text in TEXTS:
        expected = plain.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False).ids == expected


def test_merges_as_text_or_pairs(tmp_path):
    as_text = [one if isinstance(one, str) else " ".join(one) for one in MERGES]
    as_pairs = [one.split(" ") for one in as_text]
    expected = read_tokenizer(TINY / "tokenizer.json").encode("a red circle").ids
    for merges in (as_text, as_pairs):
        path = written(tmp_path, changed("model.merges", merges))
        assert read_tokenizer(path).encode("a red circle").ids == expected


def test_metaspace_for_a_normalizer(tmp_path):
    """As transformers 5 writes it."""
    values = changed("normalizer", None)
    values["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    found = read_tokenizer(written(tmp_path, values)).encode("a red circle").ids
    assert found == read_tokenizer(TINY / "tokenizer.json").encode("a red circle").ids


REFUSED = {
    "precompiled": (
        changed("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "its normalizer has a step 'Precompiled'; supported are Prepend, Replace and Lowercase",
    ),
    "precompiled-in-sequence": (
        changed("normalizer", sequence({"type": "Precompiled", "precompiled_charsmap": ""})),
        "a step 'Precompiled'",
    ),
    "long-content": (changed("normalizer", replaced(SPACE, "x" * 17)), "of 1 to 16 characters"),
    "no-content": (changed("normalizer", replaced(SPACE, "")), "of 1 to 16 characters"),
    "no-pattern": (changed("normalizer", replaced({"String": ""}, "x")), "of 1 to 16 characters"),
    "regex": (changed("normalizer", replaced({"Regex": "(a+)+$"}, "b")), "a plain string as its"),
    "growing": (
        changed("normalizer", sequence(*[replaced({"String": "x"}, "xxx")] * 4)),
        "its replacements make a text 81 times as long",
    ),
    "many": (changed("normalizer", sequence(*[replaced(SPACE, "_")] * 17)), "at most 16 steps"),
    "nested": (changed("normalizer", NESTED), "a step 'Sequence'"),
    "no-object": (changed("normalizer", 3), "normalizer must be an object, got 3"),
    "strip": (changed("normalizer", {"type": "Strip"}), "a step 'Strip'"),
    "split": (changed("pre_tokenizer", {"type": "Split"}), "its pre_tokenizer is 'Split'"),
    "byte-level": (changed("pre_tokenizer", {"type": "ByteLevel"}), "'ByteLevel'; supported"),
    "metaspace": (changed("pre_tokenizer", {"type": "Metaspace", "replacement": "ab"}), "1 to 1"),
    "dropout": (changed("model.dropout", 0.9), "dropout 0.9 makes it random; set it to null"),
    "dropout-true": (changed("model.dropout", True), "dropout True"),
    "dropout-nan": (changed("model.dropout", float("nan")), "dropout nan"),
    "prefix": (
        changed("model.continuing_subword_prefix", "##"),
        "subword_prefix is '##'",
    ),
    "suffix": (changed("model.end_of_word_suffix", "</w>"), "its end_of_word_suffix is '</w>'"),
    "unigram": (changed("model.type", "Unigram"), "its model is 'Unigram'; supported are BPE and"),
    "no-type": (changed("model.type", None), "its model is None"),
    "vocab-list": (changed("model.vocab", ["a"]), "its vocab must be an object of 1 to 262144"),
    "vocab-empty": (changed("model.vocab", {}), "its vocab must be an object"),
    "huge-id": (changed("model.vocab", {"<s>": 1 << 31}), "an id must be from 0 to 262143"),
    "negative-id": (changed("model.vocab", {"<s>": -1}), "an id must be from 0"),
    "true-id": (changed("model.vocab", {"<s>": True}), "an id must be from 0"),
    "one-id-twice": (changed("model.vocab", {"<s>": 1, "b": 1}), "two tokens of its vocab have"),
    "long-token": (changed("model.vocab", {"x" * 300: 1}), "a token of 300 characters"),
    "merge-of-three": (changed("model.merges", ["a b c"]), "a merge must be two tokens"),
    "merge-of-numbers": (changed("model.merges", [[1, 2]]), "a merge must be two tokens"),
    "unknown-merge": (changed("model.merges", ["zz yy"]), "gives a token that its vocab lacks"),
    "merges-object": (changed("model.merges", {"a": "b"}), "its merges must be a list"),
    "flag": (changed("model.byte_fallback", "yes"), "byte_fallback must be true or false"),
    "added-object": (changed("added_tokens", {"a": 1}), "added_tokens must be a list"),
    "added-many": (changed("added_tokens", PLAIN["added_tokens"] * 400), "at most 4096"),
    "added-empty": (changed("added_tokens", [{"id": 1, "content": ""}]), "an added token must be"),
    "added-long": (changed("added_tokens", [{"id": 1, "content": "x" * 10**6}]), "1 to 256"),
    "added-id": (changed("added_tokens", [{"id": 2**40, "content": "x"}]), "an id must be"),
    "added-text": (changed("added_tokens", ["x"]), "an added token must be an object, got 'x'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_omnigen_lacks(tmp_path, name):
    values, part = REFUSED[name]
    refused(
        lambda: read_tokenizer(written(tmp_path, values)), "not a tokenizer of OmniGen's kind", part
    )


@pytest.mark.parametrize("dropout", [None, 0, 0.0])
def test_no_dropout(tmp_path, dropout):
    found = read_tokenizer(written(tmp_path, changed("model.dropout", dropout)))
    assert len({tuple(found.encode("a red circle").ids) for _ in range(20)}) == 1


def test_what_encoding_does_not_use_is_left_out(tmp_path):
    values = changed("decoder", {"type": "Precompiled"})
    values["post_processor"] = {"type": "NoSuch", "nested": [[[[]]]]}
    found = read_tokenizer(written(tmp_path, values))
    assert (
        found.encode("a red circle").ids
        == read_tokenizer(TINY / "tokenizer.json")
        .encode("a red circle", add_special_tokens=False)
        .ids
    )


def test_sizes_are_bounded(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    start = time.process_time()
    refused(lambda: read_tokenizer(path), "it has 209715200 bytes, at most 16777216 are read")
    assert time.process_time() - start < 1


def test_a_replacement_of_50_mb(tmp_path):
    path = written(tmp_path, changed("normalizer", replaced(SPACE, "x" * (50 << 20))))
    refused(lambda: read_tokenizer(path), "can't be read as a tokenizer", "at most 16777216")


def test_a_panic_of_the_library_is_an_error(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer", type("T", (), {"from_str": staticmethod(panic)}))
    with pytest.raises(CheckpointError, match="is not a tokenizer: index out of bounds"):
        read_tokenizer(TINY / "tokenizer.json")
    assert not is_library_error(KeyboardInterrupt())


def test_added_tokens_that_normalize_alike(tmp_path):
    """Two patterns that become one: whatever the library does, the process lives."""
    token = {"normalized": True, "special": False}
    values = json.loads(SHAPES.read_text())
    values["added_tokens"] += [
        {"id": 200, "content": "AB", **token},
        {"id": 201, "content": "ab", **token},
    ]
    try:
        assert read_tokenizer(written(tmp_path, values)).encode("ab").ids
    except CheckpointError as error:
        assert "is not a tokenizer" in str(error)
