"""Shared by all tests: pipelines on the golden checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_cases import TINY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first: processes that share the files then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def load_pipe():
    """Loads a pipeline on the golden checkpoint: `load_pipe(dtype="float32", ...)`."""
    from omnigen_fast import OmniGenPipeline

    def load(folder: Path = TINY, **arguments: Any) -> OmniGenPipeline:
        return OmniGenPipeline.from_pretrained(folder, **{"dtype": "float32", **arguments})

    return load


@pytest.fixture(scope="session")
def shared_pipe(load_pipe):
    """One float32 pipeline for all tests that change nothing but its cache."""
    return load_pipe()


@pytest.fixture
def pipe(shared_pipe):
    """The shared pipeline with nothing kept."""
    shared_pipe.clear_cache()
    return shared_pipe


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory) -> Path:
    """The golden checkpoint in diffusers' layout, written by diffusers' own classes."""
    import torch
    from diffusers import AutoencoderKL, OmniGenTransformer2DModel

    from omnigen_fast.weights.checkpoint import Checkpoint
    from omnigen_fast.weights.names import diffusers_sources

    folder = tmp_path_factory.mktemp("diffusers")
    checkpoint = Checkpoint.open(TINY)
    config, ours = checkpoint.config, checkpoint.read(torch.float32, torch.device("cpu"))
    transformer = OmniGenTransformer2DModel(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        pad_token_id=3,
        vocab_size=config.vocab_size,
        rope_scaling={
            "type": "su",
            "short_factor": list(config.short_factor),
            "long_factor": list(config.long_factor),
        },
        pos_embed_max_size=config.pos_embed_size,
    )
    theirs = {
        part.name: ours[name][part.start : part.start + part.shape[0]]
        for name, parts in diffusers_sources(config).items()
        for part in parts
    }
    transformer.load_state_dict(theirs)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKL.from_pretrained(TINY / "vae").save_pretrained(folder / "vae")
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "OmniGenPipeline"}')
    return folder


@pytest.fixture(scope="session")
def build(diffusers_folder):
    """Builds diffusers' own pipeline on the golden checkpoint, as it is without this project."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        OmniGenPipeline,
        OmniGenTransformer2DModel,
    )
    from transformers import PreTrainedTokenizerFast

    import omnigen_fast

    omnigen_fast.enable(OmniGenPipeline)  # torchvision may be missing

    def make(dtype: torch.dtype = torch.float32):
        folder = diffusers_folder
        transformer = OmniGenTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype
        )
        pipe = OmniGenPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer/tokenizer.json")
            ),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    yield make
    omnigen_fast.disable(OmniGenPipeline)
