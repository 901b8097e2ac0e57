"""`omnigen-fast completion`: commands and options that the shell completes."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from ..errors import OmniGenError, RequestError
from ..whole_files import write_whole
from .config_file import PROGRAM
from .failure import failure
from .files import make_folder

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_OMNIGEN_FAST_COMPLETE"
_shell = click.argument("shell", required=False, type=click.Choice(SHELLS))


@click.group()
def completion() -> None:
    """Installs completion of commands and options for a shell."""


@completion.command()
@_shell
def install(shell: str | None) -> None:
    """Writes the script where the shell looks for it; by default for the shell of $SHELL."""
    try:
        chosen = _chosen(shell)
        path = script_path(chosen)
        text = script(chosen)
        make_folder(path.parent, "completion")
        write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
    click.echo(path)
    click.echo(_last_step(chosen, path))


@completion.command()
@_shell
def show(shell: str | None) -> None:
    """Prints the script, for a place of your own."""
    try:
        click.echo(script(_chosen(shell)))
    except OmniGenError as error:
        raise failure(error) from error


def script(shell: str) -> str:
    """Click's script for a shell."""
    kind = get_completion_class(shell)
    assert kind is not None, shell  # click knows all of `SHELLS`
    root = click.get_current_context().find_root().command
    return kind(root, {}, PROGRAM, _VARIABLE).source()


def script_path(shell: str) -> Path:
    """Where the shell, or what comes with it, looks for scripts of a user."""
    home = Path.home()
    data = _folder("XDG_DATA_HOME", home / ".local/share")
    config = _folder("XDG_CONFIG_HOME", home / ".config")
    return {
        "bash": data / "bash-completion/completions" / PROGRAM,
        "zsh": data / "zsh/site-functions" / f"_{PROGRAM}",
        "fish": config / "fish/completions" / f"{PROGRAM}.fish",
    }[shell]


def _folder(variable: str, default: Path) -> Path:
    """By the XDG Base Directory Specification: relative paths in the variable mean nothing."""
    found = os.environ.get(variable, "")
    return Path(found) if os.path.isabs(found) else default


def _chosen(shell: str | None) -> str:
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise RequestError(
            f"the shell {name or 'of $SHELL'} is not known; give one of {', '.join(SHELLS)}"
        )
    return name


def _last_step(shell: str, path: Path) -> str:
    if shell == "bash":
        return f"New shells complete {PROGRAM}, with the package bash-completion installed."
    if shell == "fish":
        return f"New shells complete {PROGRAM}."
    return f"Put this line into ~/.zshrc, before compinit: fpath+=({path.parent})"
