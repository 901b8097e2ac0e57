"""A stand-in of ComfyUI, and its folders."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_cases import GOLDEN, TINY

STAND_IN = str(Path(__file__).parent / "stand_in")


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """The stand-in's modules and ours, once they can be imported."""
    sys.path.insert(0, STAND_IN)
    try:
        import folder_paths
        from comfy import model_management, utils

        models = tmp_path_factory.mktemp("models")
        folder_paths.models_dir = str(models)
        (models / "loras").mkdir()
        folder_paths.add_model_folder_path("loras", str(models / "loras"))
        lora = GOLDEN / "lora/adapter_model.safetensors"
        for name in ("one.safetensors", "two.safetensors"):
            shutil.copy(lora, models / "loras" / name)
        shutil.copy(TINY / "tokenizer.json", models / "loras/none.safetensors")
        for name in ("tiny", "owner/tiny"):
            shutil.copytree(TINY, models / "omnigen" / name)
        (models / "omnigen/empty").mkdir()

        from omnigen_fast.comfyui import nodes

        yield SimpleNamespace(
            folder_paths=folder_paths,
            manager=model_management,
            bar=utils,
            nodes=nodes,
            models=models,
        )
    finally:
        sys.path.remove(STAND_IN)


@pytest.fixture
def comfy(modules):
    """The same, with nothing loaded and nothing shown."""
    modules.manager.current.clear()
    modules.manager.asked.clear()
    modules.manager.interrupted = False
    modules.manager.free = 8 << 30
    modules.bar.shown.clear()
    return modules


@pytest.fixture
def nodes(comfy):
    """Classes of nodes by their ids, as ComfyUI asks for them."""
    extension = asyncio.run(comfy.nodes.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
