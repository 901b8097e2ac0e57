"""`omnigen-fast comfyui`: makes a ComfyUI load the nodes, or stops that."""

from __future__ import annotations

from pathlib import Path

import click

from ..comfyui.install import install, uninstall
from ..errors import OmniGenError
from .failure import failure
from .files import UserPath

_FOLDER = click.argument("path_to_comfyui", type=UserPath(path_type=Path))


@click.group()
def comfyui() -> None:
    """Nodes for ComfyUI."""


@comfyui.command("install")
@_FOLDER
def install_nodes(path_to_comfyui: Path) -> None:
    """Makes a ComfyUI load the nodes, from its next start on.

    Writes a folder in its custom_nodes that imports this package, which ComfyUI's own Python must
    have. Upgrading the package upgrades the nodes.
    """
    try:
        click.echo(f"{install(path_to_comfyui)}: start ComfyUI again to see the nodes")
    except (OmniGenError, OSError) as error:
        raise failure(error) from error


@comfyui.command("uninstall")
@_FOLDER
def uninstall_nodes(path_to_comfyui: Path) -> None:
    """Removes the folder that install has written."""
    try:
        click.echo(f"{uninstall(path_to_comfyui)} is removed")
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
