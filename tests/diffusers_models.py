"""The golden checkpoint as diffusers' own classes write it and load it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from golden_cases import TINY

from omnigen_fast.weights.checkpoint import Checkpoint
from omnigen_fast.weights.names import diffusers_sources


def write_folder(folder: Path) -> Path:
    """Writes it to an empty folder in diffusers' layout; returns the folder."""
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


def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> OmniGenPipeline:
    """diffusers' pipeline on such a folder, as it is without this project."""
    from transformers import PreTrainedTokenizerFast

    transformer = OmniGenTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype
    )
    pipe = OmniGenPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer/tokenizer.json")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
