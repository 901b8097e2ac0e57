"""Weight files, shards, their indices, and what else stands in a model folder."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from pathlib import Path

import torch

from omnigen_fast.processor import Processor
from omnigen_fast.vae.vae import Vae
from omnigen_fast.weights.checkpoint import Checkpoint

from .. import mutate, tiny
from .folders import Files, Folders, special, tensors_mutated

_WHOLE = 40  # every so many inputs a pipeline is loaded and makes a picture
_VAE = "vae/diffusion_pytorch_model.safetensors"
_CPU = torch.device("cpu")


class Checkpoints(Folders):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._models = tiny.write_models(folder)
        self._pipe = tiny.load_pipe(self._models[0])

    def make(self, rng: random.Random, number: int) -> Files:
        diffusers = rng.random() < 0.4
        files: Files = {"": b"diffusers" if diffusers else b"original"}
        folder = self._models[diffusers]
        weights = "transformer/diffusion_pytorch_model" if diffusers else "model"
        kind = rng.randrange(20)
        if kind < 11:
            name = f"{weights}.safetensors"
            files[name] = tensors_mutated(rng, (folder / name).read_bytes())
        elif kind < 13:
            files[_VAE] = tensors_mutated(rng, (folder / _VAE).read_bytes())
        elif kind < 18:
            files |= _sharded(rng, weights, (folder / f"{weights}.safetensors").read_bytes())
        elif kind == 18:
            names = sorted(str(one.relative_to(folder)) for one in folder.rglob("*.*"))
            files[rng.choice(names)] = special(rng)
        else:
            files[f"{weights}.safetensors"] = special(rng)
            name = rng.choice(("pytorch_model.bin", "model.pt", f"{weights}.bin", "other.ckpt"))
            files[name] = pickle.dumps(print)
        return files

    def prepare(self, case: Files) -> Path:
        self.pristine = self._models[case[""] == b"diffusers"]
        return super().prepare({name: one for name, one in case.items() if name})

    def save(self, case: Files, folder: Path) -> None:
        self.case_folder = folder / "input"
        self.prepare(case)

    def run(self, prepared: Path, number: int) -> None:
        if number % _WHOLE == 0:
            tiny.picture(tiny.load_pipe(prepared))
            return
        checkpoint = Checkpoint.open(prepared)
        checkpoint.read(torch.float32, _CPU)
        Processor.from_file(checkpoint.tokenizer_path, checkpoint.config)
        if _changed(prepared, self.pristine):  # takes 60 ms
            Vae.from_folder(prepared / "vae", _CPU)

    def good(self) -> bytes:
        self._pipe.clear_cache()
        return tiny.picture(self._pipe)

    def renew(self) -> None:
        self._pipe = tiny.load_pipe(self._models[0])


def _changed(folder: Path, pristine: Path) -> bool:
    """Whether a folder's autoencoder is another than the pristine one's."""
    names = [path.relative_to(pristine) for path in pristine.glob("vae/*")]
    return not all(
        (folder / name).exists() and os.path.samefile(folder / name, pristine / name)
        for name in names
    )


def _sharded(rng: random.Random, weights: str, data: bytes) -> Files:
    """The weights in two or three files with an index, and something wrong with one of them."""
    (size,) = struct.unpack_from("<Q", data)
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = sorted(name for name in header if name != "__metadata__")
    count = rng.choice((2, 3))
    stem = weights.rpartition("/")[2]
    files = [f"{stem}-0000{i + 1}-of-0000{count}.safetensors" for i in range(count)]
    places = {name: files[index % count] for index, name in enumerate(names)}
    held = {file: [name for name in names if places[name] == file] for file in files}
    if rng.random() < 0.25:  # a second copy, or one that is not where the index says
        name = rng.choice(names)
        held[rng.choice(files)].append(name)
    index = {"metadata": {"total_size": len(values)}, "weight_map": places}
    if rng.random() < 0.5:
        known = (*files, "../model.safetensors", "/dev/zero", "config.json", ".", "", "a\0b", "x/y")
        index = mutate.tree(rng, index, known, (*names[:5], "weight_map"))
    folder = weights.rpartition("/")[0]
    inside = f"{folder}/" if folder else ""
    found: Files = {f"{inside}{stem}.safetensors.index.json": mutate.json_bytes(rng, index)}
    found[f"{inside}{stem}.safetensors"] = special(rng)._replace(kind="missing")
    for file, inner in held.items():
        found[inside + file] = _packed(header, values, dict.fromkeys(inner))
    chosen = inside + rng.choice(files)
    if rng.random() < 0.3:
        found[chosen] = tensors_mutated(rng, found[chosen])  # type: ignore[arg-type]
    elif rng.random() < 0.2:
        found[chosen] = special(rng)
    return found


def _packed(header: dict, values: bytes, names: dict[str, None]) -> bytes:
    """A safetensors file of some tensors of another."""
    entries, body = {}, b""
    for name in names:
        start, stop = header[name]["data_offsets"]
        place = [len(body), len(body) + stop - start]
        entries[name] = header[name] | {"data_offsets": place}
        body += values[start:stop]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body
