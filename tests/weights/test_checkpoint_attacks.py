"""Hostile model folders: bounded time and memory, one printable line, and never a wrong model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, refused, shard
from golden_cases import TINY
from safetensors.torch import load_file, save_file

from omnigen_fast import CheckpointError, OmniGenPipeline, RequestError
from omnigen_fast.vae.vae import Vae
from omnigen_fast.weights.checkpoint import Checkpoint, find_folders
from omnigen_fast.weights.files import find_weights, open_file, read_headers

CPU = torch.device("cpu")
IMAGE = str(TINY.parent / "images" / "cat.png")
CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 0, "max_input_image_size": 64}
NORM = "llm.norm.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def load(folder: Path, **arguments) -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(folder, device="cpu", dtype="float32", **arguments)


class TestIndex:
    """The index says where a tensor is; any other copy is refused."""

    def hold(self, folder: Path, file: str, **tensors: torch.Tensor) -> None:
        save_file({**load_file(folder / file), **tensors}, folder / file)

    @pytest.mark.parametrize("file", [0, 2], ids=["before", "after"])
    def test_second_copy(self, folder, file):
        names = shard(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        copied = next(name for name, place in index.items() if place == names[1])
        self.hold(folder, names[file], **{copied: torch.zeros(192)})
        refused(
            lambda: Checkpoint.open(folder),
            f"holds {copied}, but the index places it in {names[1]}",
            "remove the tensor or the index",
        )

    def test_copy_that_the_index_does_not_name(self, folder):
        shard(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"][NORM]
        path.write_text(json.dumps(index))
        refused(lambda: Checkpoint.open(folder), f"holds {NORM}, but the index does not name it")

    def test_place_without_the_tensor(self, folder):
        names = shard(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["llm.nowhere"] = names[0]
        path.write_text(json.dumps(index))
        refused(lambda: Checkpoint.open(folder), f"{names[0]} lacks llm.nowhere")

    @pytest.mark.parametrize(
        "name",
        ["../model.safetensors", "/etc/passwd", "a/../b", 3, None, ["x"], {"x": 1}, True],
    )
    def test_places_that_are_no_files(self, folder, name):
        shard(folder)
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(lambda: Checkpoint.open(folder), "which is not a file beside it")

    def test_vae_tensor_under_both_of_its_names(self, tmp_path):
        vae = Path(shutil.copytree(TINY / "vae", tmp_path / "vae"))

        def double(tensors):
            name = "decoder.mid_block.attentions.0.to_q.weight"
            tensors[name.replace("to_q", "query")] = torch.zeros_like(tensors[name])

        change_weights(vae / "diffusion_pytorch_model.safetensors", double)
        refused(lambda: Vae.from_folder(vae, CPU), "has a tensor twice, under two of its names")


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "socket": lambda path: bind_socket(path),
    "sparse": lambda path: sparse(path, 200 << 20),
    "nothing": lambda path: path.symlink_to("/no/such/file"),
}


def bind_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 108 characters
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
class TestKindsOfFiles:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ],
    )
    def test_no_regular_file(self, folder, name, kind):
        if "index" in name:
            shard(folder)
        (folder / name).unlink()
        KINDS[kind](folder / name)
        done: list[str] = []

        def run() -> None:
            with pytest.raises(CheckpointError) as caught:
                load(folder)
            done.append(str(caught.value))

        thread = threading.Thread(target=run, daemon=True)
        start = time.perf_counter()
        thread.start()
        thread.join(30)
        assert done, "it hangs"
        assert time.perf_counter() - start < 20
        assert len(done[0]) <= 300 and done[0].isprintable()
        expected = {"sparse": "2097152", "nothing": "does not exist"}.get(kind, "regular file")
        if not (kind == "sparse" and name.endswith("safetensors")):  # weights may be that large
            assert expected in done[0]


class TestHeaders:
    def write(self, path: Path, header: object, data: bytes = b"", size: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)

    @pytest.mark.parametrize(
        ("entry", "data"),
        [
            ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}, 4),
            ({"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 4]}, 4),
            ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, 4),
            ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, 4),
            ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, 8),
            ({"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 62]}, 4),
            ({"dtype": "F32", "shape": [0.5], "data_offsets": [0, 2]}, 2),
            ({"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}, 4),
            ({"dtype": "X", "shape": [1], "data_offsets": [0, 4]}, 4),
            ({"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}, 4),
            ({"shape": [1]}, 4),
            (3, 4),
        ],
    )
    def test_lying_entry(self, folder, entry, data):
        self.write(folder / "model.safetensors", {"pos_embed": entry}, bytes(data))
        refused(lambda: Checkpoint.open(folder), "is not a readable safetensors file")

    def test_overlapping_tensors(self, folder):
        one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        other = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
        self.write(folder / "model.safetensors", {"a": one, "b": other}, bytes(12))
        refused(lambda: Checkpoint.open(folder), "is not a readable safetensors file")

    def test_huge_header(self, folder):
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 90 << 20))
            file.truncate(100 << 20)
        start = time.process_time()
        refused(lambda: Checkpoint.open(folder), "has a header of 94371840 bytes; at most")
        assert time.process_time() - start < 1

    def test_many_tensors(self, folder):
        header = {
            f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)
        }
        self.write(folder / "model.safetensors", header)
        refused(lambda: Checkpoint.open(folder), "has 70000 tensors; at most 65536 are read")

    def test_deep_header(self, folder):
        self.write(folder / "model.safetensors", b'{"a":' * 200_000)
        refused(lambda: Checkpoint.open(folder), "is not a readable safetensors file")

    @pytest.mark.parametrize(
        "name", ["\x1b[31mred", "nul\x00byte", "x" * 100_000, "line\nbreak", "\u202eright"]
    )
    @pytest.mark.parametrize("vae", [False, True], ids=["model", "vae"])
    def test_names_are_printable(self, folder, name, vae):
        file = "vae/diffusion_pytorch_model.safetensors" if vae else "model.safetensors"
        change_weights(folder / file, lambda tensors: tensors.update({name: torch.zeros(1)}))
        with pytest.raises(CheckpointError, match="unexpected") as caught:
            load(folder)
        message = str(caught.value)
        assert len(message) <= 300 and message.isprintable()

    @pytest.mark.parametrize("name", ["\x1b[31mred", "x" * 100_000])
    def test_names_in_configs_are_printable(self, folder, name):
        change_json(folder / "config.json", **{name: 3})
        with pytest.raises(CheckpointError, match="no setting") as caught:
            load(folder)
        message = str(caught.value)
        assert len(message) <= 300 and message.isprintable()

    def test_scaled_float8_says_what_reads_it(self, folder):
        def scale(tensors):
            tensors["llm.layers.0.mlp.down_proj.scale_weight"] = torch.ones(())

        change_weights(folder / "model.safetensors", scale)
        refused(lambda: Checkpoint.open(folder), "float8 weights with scales", "convert")


class TestNamesOfFiles:
    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return Checkpoint.open(folder).read(torch.float32, CPU)

    def same(self, found: dict[str, torch.Tensor]) -> None:
        expected = self.weights(TINY)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_the_only_file_may_have_any_name(self, folder):
        (folder / "model.safetensors").rename(folder / "finetuned-3000.safetensors")
        self.same(self.weights(folder))

    def test_two_other_names(self, folder):
        shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
        (folder / "model.safetensors").rename(folder / "b.safetensors")
        refused(lambda: Checkpoint.open(folder), "has a.safetensors, b.safetensors: give the path")
        self.same(self.weights(folder / "b.safetensors"))

    def test_shards_without_an_index(self, folder):
        shard(folder)
        (folder / "model.safetensors.index.json").unlink()
        refused(
            lambda: Checkpoint.open(folder),
            "has no model.safetensors and no model.safetensors.index.json; it has model-00001-of-",
        )

    def test_a_file_with_its_config_beside(self, folder, pipe):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        found = load(folder / "other.safetensors")("A cat.", **CALL, output_type="pt")
        assert torch.equal(found, pipe("A cat.", **CALL, output_type="pt"))

    def test_a_file_without_config(self, tmp_path):
        shutil.copy(TINY / "model.safetensors", tmp_path / "x.safetensors")
        refused(lambda: load(tmp_path / "x.safetensors"), "config.json does not exist")

    def test_variant(self, folder):
        good = folder / "model.fp16.safetensors"
        save_file({n: t.half() for n, t in load_file(folder / "model.safetensors").items()}, good)
        save_file({}, folder / "model.safetensors")
        assert self.weights(good)["norm"].dtype == torch.float32
        pipe = load(folder, variant="fp16")
        expected = load_file(good)[NORM].float()
        assert torch.equal(pipe.model.norm, expected)
        refused(lambda: load(folder), "missing ")

    def test_missing_variant(self, folder):
        refused(lambda: load(folder, variant="fp16"), "has no model.fp16.safetensors")

    def test_sharded_variant(self, folder):
        names = shard(folder)
        index = folder / "model.safetensors.index.json"
        index.rename(folder / "model.safetensors.index.fp16.json")
        files = find_weights(str(folder), "model", variant="fp16")
        assert [Path(path).name for path in files.paths] == names
        assert len(read_headers(files)[0]) == len(load_file(TINY / "model.safetensors"))

    def test_vae_variant(self, tmp_path, pipe):
        vae = Path(shutil.copytree(TINY / "vae", tmp_path / "vae"))
        (vae / "diffusion_pytorch_model.safetensors").rename(
            vae / "diffusion_pytorch_model.fp16.safetensors"
        )
        found = Vae.from_folder(vae, CPU, "fp16").autoencoder.state_dict()
        expected = Vae.from_folder(TINY / "vae", CPU, "fp16").autoencoder.state_dict()  # has none
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_diffusers_transformer_without_its_pipeline(self, diffusers_folder, tmp_path):
        """The layout is told by the names of the tensors."""
        folder = Path(shutil.copytree(diffusers_folder / "transformer", tmp_path / "any"))
        shutil.copy(TINY / "tokenizer.json", folder)
        self.same(self.weights(folder))


class TestArguments:
    @pytest.mark.parametrize("name", [None, 3, b"model", ["model"]])
    def test_no_path(self, name):
        with pytest.raises(RequestError, match=r"must be a folder or a hub id .*, got"):
            OmniGenPipeline.from_pretrained(name)
        if name is not None:
            with pytest.raises(RequestError, match="must be a folder or a hub id"):
                OmniGenPipeline.from_pretrained(TINY, name, device="cpu")

    def test_a_pickle_says_what_reads_it(self, folder):
        (folder / "model.safetensors").rename(folder / "model.pt")
        for model in (folder, folder / "model.pt"):
            refused(lambda model=model: load(model), "omnigen-fast convert MODEL OUT")

    def test_vae_path_counts(self, folder, tmp_path):
        refused(lambda: load(folder, vae_path="nonexistent"), "nonexistent does not exist")
        refused(
            lambda: load(folder, vae_path=tmp_path), "has no diffusion_pytorch_model.safetensors"
        )
        other = Path(shutil.copytree(folder / "vae", tmp_path / "other"))
        change_json(other / "config.json", scaling_factor=0.5)
        assert load(folder, vae_path=other).vae.autoencoder.config["scaling_factor"] == 0.5
        file = other / "diffusion_pytorch_model.safetensors"
        assert load(folder, vae_path=file).vae.autoencoder.config["scaling_factor"] == 0.5

    def test_torch_dtype(self):
        assert OmniGenPipeline.from_pretrained(TINY, torch_dtype=torch.float32).dtype == (
            torch.float32
        )
        with pytest.raises(RequestError, match="dtype bfloat16 and torch_dtype float32 differ"):
            OmniGenPipeline.from_pretrained(TINY, dtype="bfloat16", torch_dtype="float32")
        with pytest.raises(RequestError, match="float16 overflows"):
            OmniGenPipeline.from_pretrained(TINY, torch_dtype=torch.float16)

    @pytest.mark.parametrize(("name", "around"), [("transformer", True), ("weights", False)])
    def test_only_diffusers_folder_is_looked_around(self, tmp_path, name, around):
        (tmp_path / "model_index.json").touch()
        inner = tmp_path / name
        inner.mkdir()
        expected = str(tmp_path if around else inner), str(inner)
        assert find_folders(str(inner)) == expected

    def test_subfolder(self, folder, pipe):
        found = load(folder.parent, subfolder="model")("A cat.", **CALL, output_type="pt")
        assert torch.equal(found, pipe("A cat.", **CALL, output_type="pt"))
        refused(lambda: load(folder.parent, subfolder="other"), "has no folder 'other'")

    @pytest.mark.parametrize("value", ["../x", "/etc", "", "a/../..", "a\0b", 3])
    @pytest.mark.parametrize("name", ["subfolder", "variant"])
    def test_names_lead_nowhere_else(self, folder, name, value):
        with pytest.raises(RequestError, match=f"{name} must be a name inside the folder, got"):
            load(folder, **{name: value})

    def test_subfolder_on_the_hub(self, monkeypatch, folder):
        asked = {}

        def snapshot_download(name, **arguments):
            asked.update(arguments)
            return str(folder.parent)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        load("owner/name", subfolder="model")
        assert all(pattern.startswith("model/") for pattern in asked["allow_patterns"])


class TestAnotherVae:
    """`pipe.vae = ...` takes diffusers' and ours, and what the old one made is forgotten."""

    PROMPT = "<img><|image_1|></img> Make it red."

    @pytest.fixture
    def other(self, tmp_path) -> Path:
        """A VAE with other weights."""
        vae = Path(shutil.copytree(TINY / "vae", tmp_path / "vae"))

        def scale(tensors):
            tensors["encoder.conv_in.weight"] *= 1.5
            tensors["decoder.conv_out.weight"] *= 0.5

        change_weights(vae / "diffusion_pytorch_model.safetensors", scale)
        return vae

    def image(self, pipe: OmniGenPipeline) -> torch.Tensor:
        return pipe(self.PROMPT, [IMAGE], **CALL, output_type="pt", progress=False)

    @pytest.mark.parametrize("kind", ["diffusers", "ours"])
    def test_like_loading_with_it(self, other, kind):
        from diffusers import AutoencoderKL

        expected = self.image(load(TINY, vae_path=other))
        pipe = load(TINY)
        before = self.image(pipe)
        given = AutoencoderKL.from_pretrained(other)
        pipe.vae = given if kind == "diffusers" else Vae.from_folder(other, CPU)
        assert torch.equal(self.image(pipe), expected)
        assert not torch.equal(before, expected)
        pipe.vae = load(TINY).vae
        assert torch.equal(self.image(pipe), before)

    def test_in_inference_mode(self, other):
        """What is made inside is used outside."""
        from diffusers import AutoencoderKL

        pipe = load(TINY)
        with torch.inference_mode():
            pipe.vae = AutoencoderKL.from_pretrained(other, torch_dtype=torch.float16)
            self.image(pipe)
        assert self.image(pipe).isfinite().all()

    def test_half_precision_becomes_float32(self):
        from diffusers import AutoencoderKL

        pipe = load(TINY)
        pipe.vae = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float16)
        assert {one.dtype for one in pipe.vae.autoencoder.parameters()} == {torch.float32}
        assert self.image(pipe).isfinite().all()

    @pytest.mark.parametrize("given", [None, 3, "vae", torch.nn.Linear(1, 1)])
    def test_no_vae(self, pipe, given):
        before = pipe.vae
        with pytest.raises(RequestError, match="vae must be diffusers' AutoencoderKL, got"):
            pipe.vae = given
        assert pipe.vae is before

    def test_another_kind_of_vae(self, pipe):
        from diffusers import AutoencoderKL

        with pytest.raises(CheckpointError, match="not OmniGen's VAE"):
            pipe.vae = AutoencoderKL(block_out_channels=(32, 32), norm_num_groups=32)
        with torch.device("meta"):
            empty = AutoencoderKL.from_config(AutoencoderKL.load_config(TINY / "vae"))
        with pytest.raises(RequestError, match="weights are offloaded"):
            pipe.vae = empty

    def test_not_while_it_runs(self, pipe):
        seen = []

        def swap(pipe, *_):
            try:
                pipe.vae = Vae.from_folder(TINY / "vae", CPU)
            except Exception as error:
                seen.append(str(error))

        pipe("A cat.", **CALL, callback_on_step_end=swap, progress=False)
        assert seen == ["the pipeline is running; it can't be called from a callback"]


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_header_is_not_waited_for(size, tmp_path, monkeypatch):
    """Some files of /proc are regular, have no size, and keep their readers waiting."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    monkeypatch.setattr("builtins.open", lambda *given, **options: pytest.fail("read it"))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_file(str(path), CPU)


def test_a_file_that_cannot_be_mapped_is_refused(folder, monkeypatch):
    def full(*given, **options):
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(CheckpointError, match="not a readable safetensors file: Cannot allocate"):
        Checkpoint.open(folder)
