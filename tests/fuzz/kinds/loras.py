"""LoRAs of every writer, as folders, files and state dicts."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from omnigen_fast.weights.lora_files import read_adapter

from .. import mutate, tiny
from .folders import Files, Folders, special, tensors_mutated

_WHOLE = 10  # every so many inputs the LoRA is merged, makes a picture and is unloaded
_RANK = 2
_MODULES = ("qkv_proj", "o_proj")
_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": _RANK,
    "lora_alpha": 4,
    "alpha_pattern": {"layers.0.self_attn.o_proj": 2},
    "rank_pattern": {},
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "target_modules": list(_MODULES),
    "modules_to_save": None,
}
_PATTERNS = (
    "(a*)*b",
    "(x+x+)+y",
    "(?=.*)",
    "[",
    "\\1",
    "a{99999}",
    ".*" * 30,
    "(a|aa)+$",
    "o_proj",
)
_VALUES = (
    "LOHA",
    "eva",
    "pissa",
    dict.fromkeys(_PATTERNS[:1], 3),
    dict.fromkeys(_PATTERNS[3:6], 3),
    {f"layers.{i}.self_attn.o_proj": i for i in range(2000)},
    {_PATTERNS[7]: 1e9},
    1e9,
    1 << 70,
)
_METADATA = "lora_adapter_metadata"


class Loras(Folders):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model, _ = tiny.write_models(folder)
        self._pipe = tiny.load_pipe(self._model)
        self.pristine = folder / "empty"
        self.pristine.mkdir()
        self._files = _seeds()

    def make(self, rng: random.Random, number: int) -> Files:
        writer = rng.choice(sorted(self._files))
        files: Files = dict(self._files[writer])
        kind = rng.randrange(10)
        name = rng.choice(sorted(files))
        content = files[name]
        if kind == 0:
            files[name] = special(rng)
        elif kind == 1:
            files[rng.choice(("adapter_model.bin", "x.pt", "x.safetensors"))] = pickle.dumps(print)
        elif name.endswith(".json") and isinstance(content, bytes):
            names = (*_CONFIG, *_PATTERNS)
            tree = mutate.tree(rng, json.loads(content), _VALUES, names)
            files[name] = mutate.json_bytes(rng, tree)
        elif isinstance(content, bytes):
            files[name] = tensors_mutated(rng, content)
        files[""] = rng.choice((b"folder", b"folder", b"file", b"dict"))
        return files

    def prepare(self, case: Files) -> Any:
        folder = super().prepare({name: one for name, one in case.items() if name})
        weights = [name for name, one in case.items() if name and isinstance(one, bytes)]
        weights = [name for name in weights if name.endswith(".safetensors")]
        if case[""] == b"folder" or not weights:
            return folder
        if case[""] == b"file":
            return folder / weights[0]
        try:
            return load(case[weights[0]])  # type: ignore[arg-type]
        except BaseException:  # the caller's own error, panics included
            return folder

    def save(self, case: Files, folder: Path) -> None:
        self.case_folder = folder / "input"
        self.prepare(case)

    def run(self, prepared: Any, number: int) -> None:
        checkpoint = self._pipe.engine.checkpoint
        if number % _WHOLE:
            for update in read_adapter(prepared, checkpoint).updates:
                assert math.isfinite(update.scale)
                assert torch.isfinite(update.up @ update.down).all()
            return
        try:
            self._pipe.load_lora_weights(prepared, "one")
            tiny.picture(self._pipe)
        finally:
            self._pipe.unload_lora_weights()

    def good(self) -> bytes:
        self._pipe.clear_cache()
        return tiny.picture(self._pipe)

    def renew(self) -> None:
        self._pipe = tiny.load_pipe(self._model)


def _seeds() -> dict[str, dict[str, bytes]]:
    """The files of one small LoRA as each writer writes it."""
    values = torch.Generator().manual_seed(1)

    def pairs(prefix: str, parts: tuple[str, str], dots: bool = True) -> dict[str, torch.Tensor]:
        found = {}
        for module, rows in zip(_MODULES, (24, 8)):
            name = f"{prefix}layers.0.self_attn.{module}"
            name = name if dots else name.replace(".", "_")
            found[f"{name}.{parts[0]}.weight"] = torch.randn(_RANK, 8, generator=values)
            found[f"{name}.{parts[1]}.weight"] = torch.randn(rows, _RANK, generator=values)
        return found

    def alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {name.partition(".lora_")[0] for name in tensors}
        return tensors | {f"{name}.alpha": torch.tensor(4.0) for name in names}

    ab, down_up = ("lora_A", "lora_B"), ("lora_down", "lora_up")
    peft = pairs("base_model.model.llm.", ab)
    config = json.dumps(_CONFIG).encode()
    halves = [dict(list(peft.items())[:2]), dict(list(peft.items())[2:])]
    shards = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {name: shards[i] for i in (0, 1) for name in halves[i]}}
    theirs = {
        f"transformer.layers.0.self_attn.{module}.{part}.weight": torch.randn(
            (_RANK, 8) if part == "lora_A" else (8, _RANK), generator=values
        )
        for module in ("to_q", "to_out.0")
        for part in ab
    }
    metadata = {_METADATA: json.dumps({f"transformer.{k}": v for k, v in _CONFIG.items()})}
    return {
        "peft": {"adapter_config.json": config, "adapter_model.safetensors": save(peft)},
        "peft shards": {
            "adapter_config.json": config,
            "adapter_model.safetensors.index.json": json.dumps(index).encode(),
            shards[0]: save(halves[0]),
            shards[1]: save(halves[1]),
        },
        "diffusers": {"pytorch_lora_weights.safetensors": save(theirs, metadata)},
        "diffusers alphas": {"pytorch_lora_weights.safetensors": save(alphas(theirs))},
        "kohya": {"lora.safetensors": save(alphas(pairs("lora_unet_", down_up, dots=False)))},
        "comfy": {"lora.safetensors": save(alphas(pairs("diffusion_model.", down_up)))},
        "bfloat16": {
            "lora.safetensors": save({name: one.bfloat16() for name, one in theirs.items()})
        },
    }
