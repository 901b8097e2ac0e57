"""Which names a server answers to, and which web pages of others may talk to it: none.

A web page that a browser shows may ask any address. It reaches a server on 127.0.0.1 through a name
of its own that leads there (DNS rebinding), which the Host header shows, or from its own origin,
which Origin and Sec-Fetch-Site show.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import RequestError

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(\d{1,5}))?")


@dataclass(frozen=True)
class Hosts:
    """The names that a server answers to, besides 127.0.0.1, localhost and ::1."""

    names: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Hosts:
        """Raises RequestError for a name that a Host header can't have."""
        checked = set()
        for name in names:
            found = _split(name) or _split(f"[{name}]")
            if found is None or found[1] is not None:
                raise RequestError(f"a host must be a name or an address without port, got {name}")
            checked.add(found[0])
        return cls(frozenset(checked))

    def problem(self, headers: Mapping[str, str], here: str | None) -> str | None:
        """Why a request must not be answered, or None.

        Args:
            headers: of the request, by their names in lower case.
            here: the address of this machine that it came to.
        """
        host = headers.get("host", "")
        named = _split(host)
        if named is None or not self._knows(named[0], here):
            shown = host or "none"
            return f"this server does not answer to the host {shown}; start it with --allowed-host"
        origin = headers.get("origin")
        if origin is not None and not self._same(origin, host):
            return f"a page of another server ({origin}) may not use this one; open its own page"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            if headers.get("sec-fetch-mode") != "navigate":
                return "a page of another server may not use this one; open its own page"
            if headers.get("sec-fetch-dest") != "document":
                return "a page of another server may not show this one; open its own page"
        return None

    def forwarded(self, host: str) -> bool:
        """Whether a proxy may say that it was asked for this host."""
        named = _split(host)
        return named is not None and named[0] in self.names

    def _knows(self, name: str, here: str | None) -> bool:
        # An address is no name that someone else could lead here.
        return name in _LOOPBACK or name in self.names or name == here

    def _same(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:  # an open bracket, ...
            return False
        if parts.scheme not in ("http", "https"):
            return False
        if parts.netloc.lower() == host.lower():
            return True
        theirs, ours = _split(parts.netloc), _split(host)
        if theirs is None or ours is None:
            return False
        if theirs[0] in self.names:  # behind a proxy that keeps its name to itself
            return True
        return {theirs[0], ours[0]} <= _LOOPBACK and theirs[1] == ours[1]


def _split(host: str) -> tuple[str, str | None] | None:
    """Name in lower case and port of a Host header, or None."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    name = match[1].lower().rstrip(".") if not match[1].startswith("[") else match[1][1:-1].lower()
    if ":" in name:
        try:
            name = str(ipaddress.IPv6Address(name))
        except ValueError:
            return None
    return name, match[2]
