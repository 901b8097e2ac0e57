"""The config file: the user's defaults for options, and which options were given where.

    model = "shapes"          # of every command that loads a model

    [generate]                # of one command
    steps = 30
    lora = ["style.safetensors:0.5"]

An option on the command line wins over the file, the file over what a model or a command has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import OmniGenError, RequestError, brief, printable
from ..fewer_steps import left_to_preset
from ..regular_files import read_regular
from .failure import failure
from .files import UserPath
from .loading import NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROGRAM = "omnigen-fast"
_MAX_BYTES = 1 << 20
_OPTION = "config"


def given_options(context: click.Context, file: bool = True) -> set[str]:
    """The options given on the command line, and with `file` also those of the config file."""
    absent = (
        {ParameterSource.DEFAULT}
        if file
        else {ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP}
    )
    return {name for name in context.params if context.get_parameter_source(name) not in absent}


def quality_values(context: click.Context) -> dict[str, Any]:
    """What a command's --quality decides about; the file's options don't narrow a typed one."""
    typed = given_options(context, file=False)
    given = typed if "quality" in typed else given_options(context)
    return left_to_preset({name: context.params[name] for name in given})


def default_path() -> Path:
    """Where the file is looked for without --config."""
    return Path(click.get_app_dir(PROGRAM)) / "config.toml"


def add_config(group: click.Group) -> None:
    """Gives every command with options --config, and so its values from the file."""

    def read(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
        try:
            values = read_config(path, group)
            context.default_map = values.get(str(context.info_name), {})
        except (OmniGenError, OSError) as error:
            raise failure(error) from error

    for command in group.commands.values():
        if isinstance(command, click.Group) or not _options(command):
            continue
        option = click.Option(
            [f"--{_OPTION}"],
            type=UserPath(path_type=Path),
            callback=read,
            is_eager=True,  # before the options that it gives values
            expose_value=False,
            metavar="FILE",
            help=f"Defaults of options (TOML).  [default: {PROGRAM}/config.toml where the system "
            "keeps configs]",
        )
        command.params.append(option)


def read_config(path: Path | None, group: click.Group) -> dict[str, dict[str, Any]]:
    """The values of each command's options, by their parameters' names.

    Args:
        path: of the file; None for the default one, which need not be there.
        group: whose commands' options it may name.

    Raises:
        RequestError: an unknown name, or a value that its option can't take.
        CheckpointError: it is too large or no regular file.
    """
    if path is None:
        path = default_path()
        if not path.is_file():
            return {}
    elif not path.exists():
        raise RequestError(f"--config: {path} does not exist")
    tables = _tables(path)
    commands = {
        name: _options(command)
        for name, command in group.commands.items()
        if not isinstance(command, click.Group)
    }
    loading = [name for name, options in commands.items() if {"model", "weights"} <= options.keys()]
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for key, value in tables.items():
        if not isinstance(value, dict):
            name = _known(path, "", key, [one.replace("_", "-") for one in NAMES])
            for command in loading:
                option = commands[command].get(name.replace("-", "_"))
                if option is not None and option.name:
                    found[command][option.name] = _checked(path, key, value, option)
    for key, value in tables.items():
        if isinstance(value, dict):
            command = _known(path, "", f"[{key}]", [f"[{name}]" for name in commands])[1:-1]
            options = {
                text.lstrip("-"): one
                for one in commands[command].values()
                for text in one.opts
                if text.startswith("--")
            }
            for name, one in value.items():
                option = options[_known(path, f"[{key}] ", name, options)]
                if option.name:
                    found[command][option.name] = _checked(path, f"[{key}] {name}", one, option)
    return found


def _tables(path: Path) -> dict[str, Any]:
    data = read_regular(path, "a config file", _MAX_BYTES)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from error


def _options(command: click.Command) -> dict[str, click.Option]:
    """Those that a file may set, by name."""
    return {
        one.name: one
        for one in command.params
        if isinstance(one, click.Option) and one.name and one.name not in (_OPTION, "help")
    }


def _known(path: Path, where: str, name: str, names: Iterable[str]) -> str:
    """The name as the options have it."""
    names = list(names)
    wanted = name.replace("_", "-")
    if wanted in names:
        return wanted
    near = get_close_matches(wanted[:60], names, 1, cutoff=0.65)
    way = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    if not where and not name.startswith("["):
        way += " Options of one command go under its name, as in [generate]"
    raise RequestError(f"{path}: {where}{printable(name, 60)} is not known; {way}")


def _checked(path: Path, where: str, value: Any, option: click.Option) -> Any:
    """A value as the command line would have it."""
    try:
        return _converted(value, option)
    except (click.ClickException, ValueError, TypeError) as error:
        said = error.message if isinstance(error, click.ClickException) else str(error)
        raise RequestError(f"{path}: {where} can't be {brief(value)}: {said}") from error


def _converted(value: Any, option: click.Option) -> Any:
    if option.is_flag:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false")
        return value
    if isinstance(value, bool | Mapping) or not isinstance(value, str | int | float | list):
        raise ValueError("it must be a text, a number or a list")
    if option.multiple and not isinstance(value, list):
        value = [value]
    if isinstance(value, list) and not option.multiple and option.nargs == 1:
        value = ",".join(map(str, value))
    context = click.Context(click.Command(None), resilient_parsing=False)
    option.type_cast_value(context, value)  # raises what the command line would
    return value
