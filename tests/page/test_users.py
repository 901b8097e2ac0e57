"""Who may use the page: the file of users, and what their browsers send."""

from __future__ import annotations

from base64 import b64encode

import pytest

from omnigen_fast.errors import OmniGenError
from omnigen_fast.page.users import VARIABLE, Users


def sent(text: str) -> str:
    return "Basic " + b64encode(text.encode("utf-8", "surrogatepass")).decode()


def test_names_and_passwords_of_a_file(tmp_path):
    path = tmp_path / "users"
    path.write_text("\ufeffann:a secret\n\n  bob:pass:word  \r\nzoé:müßig\n", encoding="utf-8")
    users = Users.read(path, {})
    for right in ("ann:a secret", "bob:pass:word", "zoé:müßig"):
        assert users.know(sent(right))
        assert users.know(sent(right).replace("Basic", "basic"))
    for wrong in ("ann:pass:word", "ann:a secret ", "ann:", "ann", "", "eve:a secret", "\udcff:x"):
        assert not users.know(sent(wrong))
    for odd in ("", "Basic", "Bearer x", "Basic ?", "Basic /w==", sent("a" * 10_000)):
        assert not users.know(odd)


def test_the_file_comes_before_the_variable(tmp_path):
    (tmp_path / "users").write_text("ann:1")
    assert Users.read(None, {}) is None
    assert Users.read(None, {VARIABLE: "eve:2"}).know(sent("eve:2"))
    users = Users.read(tmp_path / "users", {VARIABLE: "eve:2"})
    assert users.know(sent("ann:1")) and not users.know(sent("eve:2"))


def test_no_password_is_kept_as_it_is():
    assert "secret" not in repr(vars(Users({"ann": "secret"})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann:1\nsecret", "line 2: write user:password"),
        (":secret", "line 1: write user:password"),
        ("ann:", "line 1: write user:password"),
        ("ann:secret\nann:secret", "line 2: this user has a password already"),
        ("", "names no user; write user:password, one a line"),
        ("\n \n", "names no user"),
    ],
)
def test_mistakes_are_named_without_what_is_secret(tmp_path, text, message):
    (tmp_path / "users").write_text(text)
    with pytest.raises(OmniGenError) as caught:
        Users.read(tmp_path / "users", {})
    assert message in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(OmniGenError, match=f"^{VARIABLE}"):
        Users.read(None, {VARIABLE: text})


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary").write_bytes(b"a:\xff")
    (tmp_path / "huge").write_bytes(b"a:b\n" * 20_000)
    for name, message in {
        "none": "does not exist; give a file with user:password lines",
        ".": "a folder",
        "binary": "is not UTF-8",
        "huge": "bytes",
    }.items():
        with pytest.raises(OmniGenError, match=message):
            Users.read(tmp_path / name, {})
