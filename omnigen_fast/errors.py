"""The errors that this package raises."""


class OmniGenError(Exception):
    """Base of this package's errors: one line with the value, what is allowed and how to fix it."""

    def __init__(self, message: str) -> None:
        # names and other libraries' messages may contain line breaks
        super().__init__(" ".join(message.splitlines()))


class RequestError(OmniGenError, ValueError):
    """An argument of a call can't be used."""


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
