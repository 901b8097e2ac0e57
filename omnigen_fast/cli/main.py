"""The command line: the group of all commands."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import click

from .. import __version__
from .app import app
from .batch import batch
from .comfyui import comfyui
from .completion import completion
from .config_file import add_config
from .convert import convert
from .demo import demo
from .doctor import doctor
from .env import env
from .generate import generate, show
from .plan import plan
from .process import as_a_process
from .ranks import ARGUMENTS
from .serve import serve


class _Group(click.Group):
    def main(self, *arguments: Any, **options: Any) -> Any:
        with as_a_process():
            return super().main(*arguments, **options)

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        given = list(args)  # parsing takes them off the list
        context = super().make_context(info_name, args, *more, **extra)
        context.meta[ARGUMENTS] = given
        return context


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="omnigen-fast")
def main() -> None:
    """Makes and edits images with OmniGen."""


def _add_commands() -> None:
    """Adds this package's commands and those of entry points, such as the benchmarks."""
    for command in (
        generate,
        batch,
        show,
        plan,
        convert,
        demo,
        app,
        serve,
        comfyui,
        env,
        doctor,
        completion,
    ):
        main.add_command(command)
    for entry in entry_points(group="omnigen_fast.commands"):
        main.add_command(entry.load(), entry.name)
    add_config(main)


_add_commands()
