"""The folder that ComfyUI loads the nodes from: written whole or not at all, and removed again."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from ..whole_files import temporary_folder, write_whole

NAME = "omnigen_fast"  # of the folder in custom_nodes
_MARK = "# Written by `omnigen-fast comfyui install`"
_ENTRY = f'''{_MARK}; `omnigen-fast comfyui uninstall` removes it.
"""The nodes of omnigen_fast, which is installed in ComfyUI's Python: upgrade it there."""

import sys

try:
    from omnigen_fast.comfyui.nodes import comfy_entrypoint
except ModuleNotFoundError as error:
    if error.name != "omnigen_fast":
        raise
    raise ModuleNotFoundError(
        f"{{sys.executable}} has no omnigen_fast; install it there: {{sys.executable}} -m pip "
        "install FOLDER_OF_OMNIGEN_FAST"
    ) from None

__all__ = ["comfy_entrypoint"]
'''
# What is in ComfyUI's own folder, and in the data folder of its desktop application.
_PROGRAM = ("main.py", "folder_paths.py", "nodes.py", "custom_nodes")
_DATA = ("custom_nodes", "models", "input", "output", "user")
_SCHEMA = "comfy_api/latest"  # came with the nodes' schema


def install(comfyui: Path) -> Path:
    """Writes the folder, or renews the one that an earlier version wrote.

    Args:
        comfyui: ComfyUI's folder, or the data folder of its desktop application.

    Returns:
        The folder.

    Raises:
        RequestError: there is no ComfyUI, one that is too old, or something else of that name.
        OSError: it can't be written.
    """
    target = _target(comfyui)
    if (comfyui / "main.py").exists() and not (comfyui / _SCHEMA).is_dir():
        raise RequestError(
            f"the ComfyUI in {comfyui} is too old for these nodes: it has no {_SCHEMA}; update it"
        )
    if os.path.lexists(target):
        _check_ours(target)
        write_whole(target / "__init__.py", _write)
        return target
    with temporary_folder(str(target)) as folder:
        write_whole(Path(folder, "__init__.py"), _write)
        os.rename(folder, target)
    return target


def uninstall(comfyui: Path) -> Path:
    """Removes the folder that `install` has written, and returns where it was.

    Raises:
        RequestError: there is no ComfyUI, no such folder, or somebody else's.
        OSError: it can't be removed.
    """
    target = _target(comfyui)
    if not os.path.lexists(target):
        raise RequestError(f"{target} does not exist; there is nothing to remove")
    _check_ours(target)
    with temporary_folder(str(target)) as folder:
        os.rename(target, os.path.join(folder, NAME))
    return target


def _target(comfyui: Path) -> Path:
    for names in (_PROGRAM, _DATA):
        if all((comfyui / name).exists() for name in names):
            return comfyui / "custom_nodes" / NAME
    inner = comfyui / "ComfyUI"
    if all((inner / name).exists() for name in _PROGRAM):
        raise RequestError(f"{comfyui} holds ComfyUI in a folder of its own; give {inner}")
    raise RequestError(f"{comfyui} is not ComfyUI; give the folder with its main.py")


def _write(path: str) -> None:
    Path(path).write_text(_ENTRY, encoding="utf-8")


def _check_ours(target: Path) -> None:
    """Raises RequestError unless a folder holds what `install` writes, and nothing else."""
    entry = target / "__init__.py"
    strange = f"{target} was not written by this command; move it away first"
    if target.is_symlink() or not target.is_dir() or not entry.is_file():
        raise RequestError(strange)
    with open(entry, encoding="utf-8", errors="replace") as file:
        if file.read(len(_MARK)) != _MARK:
            raise RequestError(strange)
    others = sorted({one.name for one in target.iterdir()} - {"__init__.py", "__pycache__"})
    if others:
        raise RequestError(f"{target} also holds {others[0]}; move that away first")
