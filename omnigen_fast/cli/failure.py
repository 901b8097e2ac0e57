"""Failures: errors as one line on standard error, without a traceback."""

from __future__ import annotations

import click

from ..errors import RequestError


class _RequestFailure(click.ClickException):
    exit_code = 2


def failure(error: Exception) -> click.ClickException:
    """What a command raises for an error; the exit code is 2 for an invalid request, else 1."""
    kind = _RequestFailure if isinstance(error, RequestError) else click.ClickException
    return kind(str(error))
