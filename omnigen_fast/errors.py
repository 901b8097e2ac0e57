"""The errors that this package raises."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_MESSAGE = 300  # characters
_MAX_READ = 16 << 10  # characters of a text that are looked at
_MAX_WORD = 120  # characters of a path or a value in a message that is too long
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 70
_BRIEF.maxlevel = 3


def printable(text: object, limit: int = MAX_MESSAGE) -> str:
    """A text on one line, without control characters, at most `limit` characters.

    What is too long loses the middle of its longest words, such as paths, and then its own middle:
    the beginning says what is wrong, the end what to do.
    """
    line = str(text)
    if len(line) > _MAX_READ:  # bounds the work below
        line = f"{line[: _MAX_READ // 2]}...{line[-_MAX_READ // 2 :]}"
    line = "".join(
        " " if one.isspace() else one if one.isprintable() else ascii(one)[1:-1]
        for one in " ".join(line.splitlines())
    )
    if len(line) > limit:
        line = " ".join(map(_shortened, line.split(" ")))
    if len(line) > limit:
        tail = limit // 3
        line = f"{line[: limit - tail - 3]}...{line[-tail:]}"
    return line


def brief(value: object) -> str:
    """A value for a message: its `repr`, cut in depth and length before it is made."""
    return _BRIEF.repr(value)


def _shortened(word: str) -> str:
    return word if len(word) <= _MAX_WORD else f"{word[:40]}...{word[43 - _MAX_WORD :]}"


def _rebuilt(kind: type[OmniGenError], args: tuple[Any, ...]) -> OmniGenError:
    """An error from a pickle, whatever arguments its class takes."""
    return Exception.__new__(kind, *args)


class OmniGenError(Exception):
    """Base of this package's errors: one line with the value, what is allowed and how to fix it.

    The message has at most `MAX_MESSAGE` printable characters.
    """

    def __init__(self, message: str) -> None:
        # names and other libraries' messages may contain anything
        super().__init__(printable(message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args), self.__dict__


class RequestError(OmniGenError, ValueError):
    """An argument of a call can't be used."""


class ArgumentError(RequestError, TypeError):
    """An argument has an unknown name, is missing, or is given twice."""


class AttributeNameError(OmniGenError, AttributeError):
    """An attribute of another pipeline that does not exist here, or one that can't be set."""


class CheckpointError(OmniGenError, ValueError):
    """A model folder or one of its files can't be used."""


class ProfileError(OmniGenError, ValueError):
    """A device's profile can't be used."""


class MemoryBudgetError(OmniGenError):
    """No plan fits the available memory.

    Attributes:
        least_bytes: memory that the smallest plan with the same switches needs.
        budget_bytes: available memory.
    """

    def __init__(self, message: str, least_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes
        self.budget_bytes = budget_bytes


class BusyError(OmniGenError):
    """Calls under way hold what another one needs: it can start once one of them is over."""


class OutOfMemoryError(OmniGenError, MemoryError):
    """Memory ran out where no other plan is tried: while a model loads, LoRAs merge, weights move.

    Everything is as it was before the call that raises it.
    """


class RankError(OmniGenError):
    """Another rank of a process group has failed: its number and its error's sentence.

    The group can't be used any more; start the ranks again.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__
