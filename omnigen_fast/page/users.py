"""Who may use the page: names and passwords, from a file or a variable of the environment.

Browsers ask for them by HTTP's Basic scheme (RFC 7617) and send them with every request.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path

from ..errors import RequestError
from ..regular_files import read_regular

VARIABLE = "OMNIGEN_PAGE_AUTH"
REALM = 'Basic realm="omnigen-fast", charset="UTF-8"'
_MAX_BYTES = 64 << 10
_MAX_HEADER = 4096  # characters that are decoded


class Users:
    """Names with passwords, of which only keyed digests are kept."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._digests = [self._digest(f"{name}:{text}") for name, text in passwords.items()]

    @classmethod
    def read(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> Users | None:
        """From a file, else from the variable; None without either.

        Raises RequestError for text that is not lines of `user:password`. It shows none of it.
        """
        if file is not None:
            where = f"--auth {file}"
            if not file.exists():
                raise RequestError(f"{where} does not exist; give a file with user:password lines")
            text = read_regular(file, "user:password lines", _MAX_BYTES)
        elif VARIABLE in environment:
            text, where = environment[VARIABLE].encode("utf-8", "surrogateescape"), VARIABLE
        else:
            return None
        try:
            lines = text.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise RequestError(f"{where} is not UTF-8; write user:password, one a line") from error
        passwords: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, colon, password = line.strip().partition(":")
            if not (name and colon and password):
                raise RequestError(f"{where}, line {number}: write user:password")
            if name in passwords:
                raise RequestError(f"{where}, line {number}: this user has a password already")
            passwords[name] = password
        if not passwords:
            raise RequestError(f"{where} names no user; write user:password, one a line")
        return cls(passwords)

    def know(self, authorization: str) -> bool:
        """Whether a request's Authorization header has one of the names with its password.

        It takes the same time for every name and password of a length.
        """
        kind, _, sent = authorization.partition(" ")
        if kind.lower() != "basic" or len(sent) > _MAX_HEADER:
            return False
        try:
            pair = b64decode(sent.strip(), validate=True).decode()
        except ValueError:  # of both: not base64, not UTF-8
            return False
        digest, known = self._digest(pair), False
        for one in self._digests:  # all of them, whichever is right
            known |= hmac.compare_digest(one, digest)
        return known

    def _digest(self, pair: str) -> bytes:
        return hmac.new(self._key, pair.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
