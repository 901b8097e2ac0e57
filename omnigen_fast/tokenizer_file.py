"""tokenizer.json, checked before the tokenizers library builds anything from it.

The library panics or aborts the process on some files, and takes unbounded time and memory for
others. So only what OmniGen's tokenizers consist of is handed on: a BPE or word-level model, plain
replacements before it, and added tokens. What encoding a prompt does not use (truncation, padding,
post-processor, decoder) is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, brief, first_line
from .regular_files import read_regular

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_BYTES = 16 << 20  # OmniGen's has 2 to 4 MB, by how its merges are written
_MAX_TOKENS = 1 << 18  # OmniGen's has 32,064
_MAX_MERGES = 1 << 19
_MAX_ADDED = 1 << 12
_MAX_TOKEN = 256  # characters
_MAX_AFFIX = 16  # characters that a normalizer inserts
_MAX_GROWTH = 8  # of a text's length by all replacements together
_MAX_STEPS = 16
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BPE_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges")


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a `tokenizer.json`; the tokenizer neither truncates nor pads.

    Raises CheckpointError if it is missing, malformed, too large or not of OmniGen's kind.
    """
    from tokenizers import Tokenizer

    data = read_regular(path, "a tokenizer", _MAX_BYTES)
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path} is not a tokenizer: it has no model")
    try:
        checked = _checked(values)
    except _Refused as error:
        raise CheckpointError(f"{path} is not a tokenizer of OmniGen's kind: {error}") from error
    try:
        return Tokenizer.from_str(json.dumps(checked))
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise CheckpointError(f"{path} is not a tokenizer: {first_line(error)}") from error


def is_library_error(error: BaseException) -> bool:
    """Whether it is the tokenizers library's own: a bare Exception, or a panic, which is none."""
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _Refused(Exception):
    """Why a part can't be used."""


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """What encoding needs of a tokenizer's JSON."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(values.get("added_tokens") or []),
        "normalizer": _normalizer(values.get("normalizer")),
        "pre_tokenizer": _pre_tokenizer(values.get("pre_tokenizer")),
        "post_processor": None,
        "decoder": None,
        "model": _model(values["model"]),
    }


def _added_tokens(tokens: Any) -> list[dict[str, Any]]:
    if not isinstance(tokens, list) or len(tokens) > _MAX_ADDED:
        raise _Refused(f"added_tokens must be a list of at most {_MAX_ADDED}")
    result = []
    for token in tokens:
        if not isinstance(token, dict):
            raise _Refused(f"an added token must be an object, got {brief(token)}")
        flags = {name: token.get(name, False) for name in _ADDED_FLAGS}
        result.append(
            {
                "id": _token_id(token.get("id")),
                "content": _text("an added token", token.get("content"), _MAX_TOKEN, least=1),
                **{name: _flag(name, flag) for name, flag in flags.items()},
            }
        )
    return result


def _normalizer(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    steps = _parts("normalizer", given)
    checked = [_normalizer_step(step) for step in steps]
    growth = 1.0
    for step in checked:
        if step["type"] == "Replace":
            growth *= max(1.0, len(step["content"]) / len(step["pattern"]["String"]))
    if growth > _MAX_GROWTH:
        raise _Refused(f"its replacements make a text {growth:.0f} times as long")
    return {"type": "Sequence", "normalizers": checked}


def _parts(name: str, given: Any) -> list[Any]:
    """The steps of a sequence, or the one that is given."""
    if not isinstance(given, dict):
        raise _Refused(f"{name} must be an object, got {brief(given)}")
    if given.get("type") != "Sequence":
        return [given]
    steps = given.get("normalizers")
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS:
        raise _Refused(f"{name} must have at most {_MAX_STEPS} steps")
    return steps


def _normalizer_step(step: Any) -> dict[str, Any]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Lowercase":
        return {"type": kind}
    if kind == "Prepend":
        return {"type": kind, "prepend": _text("Prepend", step.get("prepend"), _MAX_AFFIX, least=1)}
    if kind == "Replace":
        pattern = step.get("pattern")
        if not isinstance(pattern, dict) or set(pattern) != {"String"}:
            raise _Refused(f"Replace must have a plain string as its pattern, got {brief(pattern)}")
        return {
            "type": kind,
            "pattern": {"String": _text("Replace", pattern["String"], _MAX_AFFIX, least=1)},
            "content": _text("Replace", step.get("content"), _MAX_AFFIX, least=1),
        }
    raise _Refused(
        f"its normalizer has a step {brief(kind)}; supported are Prepend, Replace and Lowercase"
    )


def _pre_tokenizer(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "Whitespace":
        return {"type": kind}
    if kind == "Metaspace":  # as transformers 5 writes what was a normalizer
        scheme = given.get("prepend_scheme", "always")
        if scheme not in ("always", "first", "never"):
            raise _Refused(f"Metaspace's prepend_scheme is {brief(scheme)}")
        replacement = _text("Metaspace", given.get("replacement"), 1, least=1)
        split = _flag("split", given.get("split", True))
        return {
            "type": kind,
            "replacement": replacement,
            "prepend_scheme": scheme,
            "split": split,
        }
    raise _Refused(
        f"its pre_tokenizer is {brief(kind)}; supported are none, Metaspace and Whitespace"
    )


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    kind = model.get("type")
    if kind not in ("BPE", "WordLevel"):
        raise _Refused(f"its model is {brief(kind)}; supported are BPE and WordLevel")
    vocabulary = _vocabulary(model.get("vocab"))
    unknown = model.get("unk_token")
    if unknown is not None or kind == "WordLevel":
        _text("unk_token", unknown, _MAX_TOKEN)
    if kind == "WordLevel":
        return {"type": kind, "vocab": vocabulary, "unk_token": unknown}
    dropout = model.get("dropout")
    if dropout is not None and (isinstance(dropout, bool) or dropout != 0):
        raise _Refused(f"dropout {brief(dropout)} makes it random; set it to null")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _Refused(f"its {name} is {brief(model[name])}")
    return {
        "type": kind,
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        **{name: _flag(name, model.get(name, False)) for name in _BPE_FLAGS},
        "vocab": vocabulary,
        "merges": _merges(model.get("merges"), vocabulary),
    }


def _vocabulary(vocabulary: Any) -> dict[str, int]:
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= _MAX_TOKENS:
        raise _Refused(f"its vocab must be an object of 1 to {_MAX_TOKENS} tokens")
    for token, number in vocabulary.items():
        if len(token) > _MAX_TOKEN:
            raise _Refused(f"a token of {len(token)} characters; at most {_MAX_TOKEN} are read")
        _token_id(number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise _Refused("two tokens of its vocab have one id")
    return vocabulary


def _merges(merges: Any, vocabulary: Mapping[str, int]) -> list[list[str]]:
    if not isinstance(merges, list) or len(merges) > _MAX_MERGES:
        raise _Refused(f"its merges must be a list of at most {_MAX_MERGES}")
    result = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_text, pair)):
            raise _Refused(f"a merge must be two tokens, got {brief(merge)}")
        if not all(token in vocabulary for token in (*pair, pair[0] + pair[1])):
            raise _Refused(f"the merge {brief(merge)} gives a token that its vocab lacks")
        result.append(pair)
    return result


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _text(what: str, value: Any, most: int, least: int = 0) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise _Refused(f"{what} must be a text of {least} to {most} characters, got {brief(value)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Refused(f"{name} must be true or false, got {brief(value)}")
    return value


def _token_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_TOKENS:
        raise _Refused(f"an id must be from 0 to {_MAX_TOKENS - 1}, got {brief(value)}")
    return value
