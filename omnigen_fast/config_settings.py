"""Settings of a config file: which describe another model than the one that reads them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from .errors import CheckpointError, brief


def check_settings(
    where: str,
    values: Mapping[str, Any],
    *,
    known: Container[str],
    fixed: Mapping[str, tuple[Any, ...]],
) -> None:
    """Raises CheckpointError for a setting that describes another model.

    A setting that nobody knows may be a word (a version, a path) or empty: null, false, 0. A
    number or a structure may change what the model computes, and ignoring it would give another
    model's weights to this one.

    Args:
        where: for the message.
        values: the config.
        known: settings that are read elsewhere, or that change no result.
        fixed: settings that have one meaning here, and the values that stand for it; null does too.
    """
    for name, value in values.items():
        if value is None or name.startswith("_"):
            continue
        if name in fixed:
            if not any(_same(value, one) for one in fixed[name]):
                raise CheckpointError(
                    f"{where}: {name} {brief(value)} describes another model; OmniGen has "
                    f"{brief(fixed[name][0])}"
                )
        elif name not in known and value and not isinstance(value, str):
            raise CheckpointError(
                f"{where}: OmniGen has no setting {name} ({brief(value)}), so this describes "
                "another model; remove it if it changes nothing"
            )


def words(text: str) -> frozenset[str]:
    """The names in a text, as a set."""
    return frozenset(text.split())


def _same(value: Any, allowed: Any) -> bool:
    """Equality of JSON values, where true is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
