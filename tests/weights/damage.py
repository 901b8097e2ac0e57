"""Changes to a model folder, and how they must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from omnigen_fast import CheckpointError


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(call, *parts: str) -> None:
    """The call fails with one line that holds all parts."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    for part in parts:
        assert part in message


def shard(folder: Path) -> list[str]:
    """Splits model.safetensors in three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    weight_map = {name: names[i % 3] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names
