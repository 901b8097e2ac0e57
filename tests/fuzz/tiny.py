"""A model of 30 KB in both layouts, and a pipeline of it: each input loads it anew in no time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from golden_cases import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from omnigen_fast import OmniGenPipeline
from omnigen_fast.config import ModelConfig
from omnigen_fast.weights.names import DIFFUSERS, ORIGINAL, layout_sources

_TOKENS = 300  # of the golden tokenizer: all bytes, and some pairs
CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DIFFUSERS_CONFIG: dict[str, Any] = {
    "_class_name": "OmniGenTransformer2DModel",
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 256,
    "rope_base": 10000,
    "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]},
    "pos_embed_max_size": 8,
    "time_step_dim": 256,
    "pad_token_id": 2,
}
_SIDE = 8  # of the position table
_TEXT = "a cat <img><|image_1|></img>"


def write_models(folder: Path) -> tuple[Path, Path]:
    """Writes the model in the original's layout and in diffusers'; returns their folders."""
    original, diffusers = folder / "original", folder / "diffusers"
    config = ModelConfig.from_phi3(CONFIG, _SIDE)
    values = torch.Generator().manual_seed(0)
    ours = {
        part.name: torch.randn(part.shape, generator=values) * 0.3
        for parts in layout_sources(config, ORIGINAL).values()
        for part in parts
    }
    original.mkdir()
    save_file(ours, original / "model.safetensors")
    (original / "config.json").write_text(json.dumps(CONFIG))
    _write_vae(original / "vae")
    (original / "tokenizer.json").write_text(json.dumps(tokenizer()))

    theirs = {}
    names = layout_sources(config, ORIGINAL)
    for parameter, parts in layout_sources(config, DIFFUSERS).items():
        whole = torch.cat([ours[part.name] for part in names[parameter]])
        for part in parts:
            theirs[part.name] = whole[part.start : part.start + part.shape[0]].clone()
    (diffusers / "transformer").mkdir(parents=True)
    save_file(theirs, diffusers / "transformer" / "diffusion_pytorch_model.safetensors")
    (diffusers / "transformer" / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    (diffusers / "tokenizer").mkdir()
    shutil.copy(original / "tokenizer.json", diffusers / "tokenizer")
    shutil.copytree(original / "vae", diffusers / "vae")
    (diffusers / "model_index.json").write_text('{"_class_name": "OmniGenPipeline"}')
    return original, diffusers


def tokenizer() -> dict[str, Any]:
    """The golden tokenizer with its first tokens alone, as the value of a tokenizer.json."""
    found = json.loads((TINY / "tokenizer.json").read_text())
    model = found["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < _TOKENS}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    known = model["vocab"]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= known.keys()]
    extra = [token for token in found["added_tokens"] if token["id"] >= _TOKENS]
    for index, token in enumerate(extra):
        token["id"] = _TOKENS + index
    return found


def _write_vae(folder: Path) -> None:
    """The golden autoencoder with four channels everywhere."""
    config = json.loads((TINY / "vae" / "config.json").read_text())
    config |= {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2}
    widths = set(json.loads((TINY / "vae" / "config.json").read_text())["block_out_channels"])
    tensors = {}
    for name, tensor in load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors").items():
        if "conv_shortcut" in name:
            continue  # where widths differ
        for axis in range(min(2, tensor.ndim)):
            if tensor.shape[axis] in widths and not _keeps(name, axis):
                tensor = tensor.narrow(axis, 0, 4)
        tensors[name] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def _keeps(name: str, axis: int) -> bool:
    """Whether an axis has the width of latents, which here is a block's width too."""
    return (name.startswith(("quant_conv", "encoder.conv_out")) and axis == 0) or (
        name.startswith("quant_conv") and axis == 1
    )


def load_pipe(folder: Path) -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(folder, dtype="float32", device="cpu", memory="8GiB")


def picture(pipe: OmniGenPipeline, prompt: Any = _TEXT, images: Any = (), **call: Any) -> bytes:
    """The bytes of a small picture's latents."""
    given = {"height": 16, "width": 16, "num_inference_steps": 1, "seed": 1} | call
    images = [Image.new("RGB", (32, 16), (9, 200, 30))] if images == () else images
    found = pipe(prompt, images, output_type="latent", progress=False, **given)
    return found.numpy().tobytes()
