"""Every error is one short printable line, and survives a pickle."""

from __future__ import annotations

import copy
import pickle

import pytest

from omnigen_fast import errors

KINDS = [
    errors.OmniGenError,
    errors.RequestError,
    errors.ArgumentError,
    errors.AttributeNameError,
    errors.CheckpointError,
    errors.ProfileError,
    lambda message: errors.MemoryBudgetError(message, 1 << 40, 7),
    errors.OutOfMemoryError,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\nc\u2028d\te", "a b c d e"),
        ("\x1b[31m\0\u202e\ud800", "\\x1b[31m\\x00\\u202e\\ud800"),
        ("Käse 猫", "Käse 猫"),
    ],
)
def test_a_message_is_printable(kind, text, expected):
    assert str(kind(text)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "\0" * 1_000_000, "\n" * 1_000_000, "\x1b" * 299]
)
def test_a_message_is_short(kind, text):
    message = str(kind(f"tensor {text} is unknown; rename it"))
    assert len(message) <= errors.MAX_MESSAGE
    assert message.isprintable()
    assert message.startswith("tensor ") and message.endswith("; rename it")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_copied_with_their_fields(kind):
    error = kind("no plan fits; free some memory")
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_the_first_line_of_any_error():
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"
    assert len(errors.first_line(ValueError("x" * 1_000_000))) <= errors.MAX_MESSAGE
