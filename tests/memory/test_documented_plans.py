"""The tables in docs/memory.md are what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnigen_fast.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
BLOCKS = re.findall(r"((?:^(?:    .*)?\n)+)", TEXT, re.M)
SHOWN = [part for block in BLOCKS for part in re.split(r"(?=^    \$ )", block, flags=re.M)]
COMMANDS = {
    lines[0].removeprefix("    $ "): [line.removeprefix("    ").rstrip() for line in lines[1:]]
    for lines in (part.rstrip().splitlines() for part in SHOWN)
    if lines and lines[0].startswith("    $ ")
}


def test_there_are_some():
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_printed(command):
    program, *arguments = command.split()
    assert program == "omnigen-fast"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.output.rstrip().splitlines()] == COMMANDS[command]
