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
