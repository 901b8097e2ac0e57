"""The errors that this package raises about what it was given."""


class OmniGenError(Exception):
    """Base of this package's errors: one line with what was given, what is allowed, what to do."""

    def __init__(self, message: str) -> None:
        # a name or another library's message may hold line breaks
        super().__init__(" ".join(message.splitlines()))


class RequestError(OmniGenError, ValueError):
    """An argument of a call can't be used."""


class CheckpointError(OmniGenError, ValueError):
    """A model folder or one of its files can't be used."""


class ProfileError(OmniGenError, ValueError):
    """A device's profile can't be used."""


class MemoryBudgetError(OmniGenError):
    """No plan fits the memory that there is.

    Attributes:
        least_bytes: the least memory that a plan under the same switches needs.
        budget_bytes: what there is.
    """

    def __init__(self, message: str, least_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes
        self.budget_bytes = budget_bytes


def first_line(error: BaseException) -> str:
    """A failure in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
