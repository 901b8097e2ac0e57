"""`omnigen-fast convert`: others' weights become a folder that loads, or nothing is written."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from golden_cases import TINY
from safetensors.torch import load_file, save_file

from omnigen_fast import CheckpointError, OmniGenPipeline, conversion
from omnigen_fast.cli import main
from omnigen_fast.weights.checkpoint import Checkpoint
from omnigen_fast.weights.foreign import open_foreign
from omnigen_fast.weights.pickles import read_pickle

WEIGHTS = load_file(TINY / "model.safetensors")
CPU = torch.device("cpu")
SCALED = "llm.layers.0.mlp.down_proj"
QKV = "llm.layers.1.self_attn.qkv_proj"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def converted(model: object, out: Path, *options: object) -> dict[str, torch.Tensor]:
    """The tensors that were written."""
    result = run(model, out, *options)
    assert result.exit_code == 0, result.output
    Checkpoint.open(out)
    return load_file(out / "model.safetensors")


def refused(model: object, out: Path, *parts: str, options: tuple[object, ...] = ()) -> None:
    """The command fails with one line, and nothing is there."""
    before = set(os.listdir(out.parent))
    result = run(model, out, *options)
    assert result.exit_code in (1, 2), result.output
    message = result.output.removeprefix("Error: ").rstrip("\n")
    assert message.isprintable() and len(message) <= 300
    for part in parts:
        assert part in message
    assert set(os.listdir(out.parent)) == before


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def trained(folder: Path, tensors: dict[str, torch.Tensor] = WEIGHTS, name="model.pt") -> Path:
    """A folder as the original's trainer leaves it: no VAE."""
    folder.mkdir()
    torch.save(collections.OrderedDict(tensors), folder / name)
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / file, folder)
    return folder


def held(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


class TestSources:
    def test_trainer(self, tmp_path):
        model = trained(tmp_path / "0001000")
        found = converted(model, tmp_path / "out", "--base", TINY, "--dtype", "float32")
        same(found, WEIGHTS)
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 0}
        pipes = [
            OmniGenPipeline.from_pretrained(folder, device="cpu", dtype="float32")
            for folder in (tmp_path / "out", TINY)
        ]
        first, second = (pipe("A cat.", **call, output_type="pt", progress=False) for pipe in pipes)
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        "prefix",
        ["module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model.", "transformer."],
    )
    def test_prefixes(self, tmp_path, prefix):
        tensors = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
        model = trained(tmp_path / "model", tensors)
        same(converted(model, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)

    def test_compiled_layers(self, tmp_path):
        tensors = {n.replace("layers.", "layers._orig_mod."): t for n, t in WEIGHTS.items()}
        model = trained(tmp_path / "model", tensors)
        same(converted(model, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)

    @pytest.mark.parametrize("wrapper", ["model", "state_dict", "module"])
    def test_wrapped(self, tmp_path, wrapper):
        path = tmp_path / "model.pt"
        torch.save({wrapper: dict(WEIGHTS), "step": 3000}, path)
        same(converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)

    def test_parameters_and_views(self, tmp_path):
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}
        tensors[f"{QKV}.weight"] = WEIGHTS[f"{QKV}.weight"].t().contiguous().t()
        model = trained(tmp_path / "model", tensors)
        same(converted(model, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)

    def test_diffusers_layout(self, tmp_path, diffusers_folder):
        found = converted(diffusers_folder, tmp_path / "out", "--dtype", "float32")
        same(found, WEIGHTS)
        assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(diffusers_folder).config

    def test_diffusers_names_without_config(self, tmp_path, diffusers_folder):
        file = diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors"
        path = Path(shutil.copy(file, tmp_path / "merged.safetensors"))
        for base in (TINY, diffusers_folder):
            out = tmp_path / f"out-{base.name}"
            same(converted(path, out, "--base", base, "--dtype", "float32"), WEIGHTS)

    @pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt"])
    def test_only_weights(self, tmp_path, suffix):
        path = tmp_path / f"finetuned{suffix}"
        torch.save(dict(WEIGHTS), path)
        same(converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        held(tmp_path / "x.safetensors", WEIGHTS)
        shutil.copytree(TINY, tmp_path / "base")
        shutil.copytree(TINY / "vae", tmp_path / "other-vae")
        options = ("--base", "~/base", "--vae-path", "~/other-vae")
        assert run("~/x.safetensors", "~/out", *options).exit_code == 0
        assert (tmp_path / "out" / "vae" / "config.json").is_file()

    def test_vae_path_counts(self, tmp_path):
        other = Path(shutil.copytree(TINY / "vae", tmp_path / "other"))
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
        weights = load_file(other / "diffusion_pytorch_model.safetensors")
        half = {name: tensor.half() for name, tensor in weights.items()}
        held(other / "diffusion_pytorch_model.safetensors", half)
        converted(TINY, tmp_path / "out", "--vae-path", other)
        found = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
        same(found, {name: tensor.float() for name, tensor in half.items()})
        written = json.loads((tmp_path / "out/vae/config.json").read_text())
        assert written["scaling_factor"] == 0.5


class TestNumbers:
    @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("dtype", conversion.DTYPES)
    def test_dtypes(self, tmp_path, stored, dtype):
        tensors = {name: tensor.to(stored) for name, tensor in WEIGHTS.items()}
        path = held(tmp_path / "x.safetensors", tensors)
        found = converted(path, tmp_path / "out", "--base", TINY, "--dtype", dtype)
        kind = conversion.DTYPES[dtype]
        same(found, {name: tensor.float().to(kind) for name, tensor in tensors.items()})
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == dtype

    def test_bfloat16_by_default(self, tmp_path):
        found = converted(TINY, tmp_path / "out")
        same(found, {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()})

    def test_float16_overflow(self, tmp_path):
        path = held(
            tmp_path / "x.safetensors", {**WEIGHTS, "llm.norm.weight": torch.full((192,), 1e5)}
        )
        options = ("--base", TINY, "--dtype", "float16")
        refused(path, tmp_path / "out", "llm.norm.weight overflows", "bfloat16", options=options)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_damaged_numbers(self, tmp_path, value):
        norm = torch.ones(192)
        norm[7] = value
        path = held(tmp_path / "x.safetensors", {**WEIGHTS, "llm.norm.weight": norm})
        refused(path, tmp_path / "out", "llm.norm.weight holds NaN", options=("--base", TINY))


def scales(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Scales of a matrix [192, 256] in every way that is written, and each spread over it."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(one, generator=generator) + 0.5
        for name, one in {
            "one": (),
            "one-in-a-list": (1,),
            "one-in-a-matrix": (1, 1),
            "rows": (shape[0], 1),
            "rows-flat": (shape[0],),
            "columns": (1, shape[1]),
            "blocks-of-128": (2, 2),  # the last rows are half a block
            "blocks-of-64": (3, 4),
        }.items()
    }


class TestFloat8:
    def quantized(
        self, kind: torch.dtype, scale: torch.Tensor, spread: torch.Tensor, suffix: str
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Weights with one matrix in float8, and what that means."""
        weight = WEIGHTS[f"{SCALED}.weight"]
        small = (weight / spread).to(kind)
        tensors = {**WEIGHTS, f"{SCALED}.weight": small, f"{SCALED}{suffix}": scale}
        return tensors, small.float() * spread

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        if scale.shape == (192,):
            return scale[:, None].expand(192, 256)
        if scale.shape == (2, 2):
            return scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
        if scale.shape == (3, 4):
            return scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
        return scale.expand(192, 256)

    @pytest.mark.parametrize("kind", FLOAT8)
    @pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale", ".weight_scale_inv"])
    @pytest.mark.parametrize("name", scales((192, 256)))
    def test_scales(self, tmp_path, kind, suffix, name):
        scale = scales((192, 256))[name]
        tensors, expected = self.quantized(kind, scale, self.spread(scale), suffix)
        path = held(tmp_path / "x.safetensors", tensors)
        with open_foreign(str(path)).opened() as read:
            torch.testing.assert_close(read(f"{SCALED}.weight"), expected, rtol=0, atol=0)
        out = converted(path, tmp_path / "out", "--base", TINY)
        assert torch.equal(out[f"{SCALED}.weight"], expected.bfloat16())
        assert out.keys() == WEIGHTS.keys()

    @pytest.mark.parametrize("kind", FLOAT8)
    def test_without_scales(self, tmp_path, kind):
        tensors = {name: tensor.to(kind) for name, tensor in WEIGHTS.items()}
        path = tmp_path / "model.pt"
        torch.save(tensors, path)
        found = converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32")
        same(found, {name: tensor.float() for name, tensor in tensors.items()})

    @pytest.mark.parametrize("new", [False, True], ids=["scaled_fp8", "comfy_quant"])
    def test_comfyui(self, tmp_path, new):
        scale = torch.tensor(0.01)
        suffix = ".weight_scale" if new else ".scale_weight"
        tensors, expected = self.quantized(torch.float8_e4m3fn, scale, scale, suffix)
        if new:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{SCALED}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            tensors[f"{SCALED}.input_scale"] = torch.tensor(0.5)
        else:
            tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
            tensors[f"{SCALED}.scale_input"] = torch.tensor(0.5)
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        path = held(tmp_path / "comfy.safetensors", tensors)
        found = converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32")
        same(found, {**WEIGHTS, f"{SCALED}.weight": expected})

    def test_of_diffusers_names(self, tmp_path, diffusers_folder):
        """q, k and v have a scale each."""
        file = diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        expected = []
        for part, scale in (("q", 0.5), ("k", 2.0), ("v", 3.0)):
            module = f"layers.1.self_attn.to_{part}"
            small = tensors[f"{module}.weight"].to(torch.float8_e4m3fn)
            tensors |= {f"{module}.weight": small, f"{module}.weight_scale": torch.tensor(scale)}
            expected.append(small.float() * scale)
        path = held(tmp_path / "x.safetensors", tensors)
        found = converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32")
        assert torch.equal(found[f"{QKV}.weight"], torch.cat(expected))

    @pytest.mark.parametrize(
        ("scale", "part"),
        [
            (torch.ones(7), "its scale [7], which do not fit"),
            (torch.ones(5, 7), "its scale [5, 7], which do not fit"),
            (torch.ones(0), "its scale [0], which do not fit"),
            (torch.ones(1, 1, 2), "its scale [1, 1, 2], which do not fit"),
            (torch.tensor(0.0), "is no positive number"),
            (torch.tensor(-1.0), "is no positive number"),
            (torch.tensor(float("nan")), "is no positive number"),
            (torch.tensor(float("inf")), "is no positive number"),
            (torch.tensor(1), "is I64; a scale must be a float"),
        ],
    )
    def test_unusable_scales(self, tmp_path, scale, part):
        one = torch.tensor(1.0)
        tensors, _ = self.quantized(torch.float8_e4m3fn, scale, one, ".weight_scale")
        path = held(tmp_path / "x.safetensors", tensors)
        refused(path, tmp_path / "out", part, options=("--base", TINY))

    @pytest.mark.parametrize(
        ("more", "part"),
        [
            ({f"{SCALED}.weight_scale": torch.tensor(2.0)}, "F32 and has a scale"),
            ({"nowhere.weight_scale": torch.tensor(2.0)}, "a scale but no weight for nowhere"),
            (
                {
                    f"{SCALED}.weight_scale": torch.ones(()),
                    f"{SCALED}.scale_weight": torch.ones(()),
                },
                "two scales for",
            ),
            (
                {f"{SCALED}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).byte()},
                "says 'nvfp4'; supported are float8_e4m3fn",
            ),
            ({f"{SCALED}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "says None"),
            ({f"{SCALED}.weight": torch.zeros(192, 256, dtype=torch.int8)}, "holds I8"),
            ({f"{SCALED}.weight_zero_point": torch.zeros(1)}, "unexpected"),
        ],
    )
    def test_other_quantization(self, tmp_path, more, part):
        path = held(tmp_path / "x.safetensors", {**WEIGHTS, **more})
        refused(path, tmp_path / "out", part, options=("--base", TINY))

    def test_a_scale_of_one_changes_nothing(self, tmp_path):
        path = held(
            tmp_path / "x.safetensors", {**WEIGHTS, f"{SCALED}.weight_scale": torch.ones(())}
        )
        same(converted(path, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)


class Evil:
    """Would leave a file behind if it were run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def repacked(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with another pickle in it."""
    torch.save({"a": torch.ones(4, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") and pickled else data)
    return path


class TestPickles:
    @pytest.mark.parametrize("protocol", range(6))
    def test_code_is_not_run(self, tmp_path, protocol):
        trace = tmp_path / "trace"
        data = pickle.dumps({"pos_embed": Evil(trace)}, protocol)
        path = repacked(tmp_path / "model.pt", data)
        refused(path, tmp_path / "out", "is no state dict", "run", options=("--base", TINY))
        assert not trace.exists()

    @pytest.mark.parametrize("new", [True, False])
    def test_code_of_torch_save(self, tmp_path, new):
        trace = tmp_path / "trace"
        path = tmp_path / "model.pt"
        torch.save({"a": Evil(trace)}, path, _use_new_zipfile_serialization=new)
        refused(path, tmp_path / "out", "model.pt", options=("--base", TINY))
        assert not trace.exists()

    def test_the_name_of_the_code_is_told(self, tmp_path):
        path = repacked(tmp_path / "model.pt", pickle.dumps(Evil(tmp_path / "x"), 2))
        refused(path, tmp_path / "out", "calls 'posix.system', which was not run")
        torch.save(torch.nn.Linear(2, 2), path)
        refused(path, tmp_path / "out", "torch.nn.modules.linear.Linear", "model.state_dict()")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("ema", {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}),
            ("opt", {"model": {"a": torch.ones(1)}, "opt": {}, "args": 3}),
            ("param_groups", {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}),
            ("shadow_params", {"decay": 0.9, "shadow_params": [torch.ones(1)]}),
        ],
    )
    def test_training_state(self, tmp_path, name, value):
        path = tmp_path / "model.pt"
        torch.save(value, path)
        refused(path, tmp_path / "out", f"the state of a training run ({name})", "model.pt")

    @pytest.mark.parametrize("name", ["ema.pt", "optimizer.bin", "scheduler.pt", "ema_model.pth"])
    def test_names_of_training_state(self, tmp_path, name):
        torch.save(dict(WEIGHTS), tmp_path / name)
        refused(tmp_path / name, tmp_path / "out", "give the trainer's model.pt")

    def test_beside_training_state(self, tmp_path):
        model = trained(tmp_path / "model", name="finetuned.pt")
        for name in ("ema.pt", "optimizer.bin", "random_states_0.pt"):
            (model / name).write_bytes(b"no zip")
        same(converted(model, tmp_path / "out", "--base", TINY, "--dtype", "float32"), WEIGHTS)
        shutil.copy(model / "finetuned.pt", model / "older.pt")
        refused(model, tmp_path / "more", "has 2 files of weights", options=("--base", TINY))

    @pytest.mark.parametrize(
        "value",
        [3, [torch.ones(1)], {}, {3: torch.ones(1)}, {"a": 3}, {"a": torch.ones(3).to_sparse()}],
        ids=["number", "list", "empty", "keys", "values", "sparse"],
    )
    def test_no_state_dict(self, tmp_path, value):
        path = tmp_path / "model.pt"
        torch.save(value, path)
        refused(path, tmp_path / "out", "model.pt")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: b"PK\x03\x04" + bytes(1000),
            lambda data: pickle.dumps({"a": 1}),
            lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x03"),
        ],
        ids=["empty", "cut", "zip", "pickle", "directory"],
    )
    def test_damaged(self, tmp_path, damage):
        path = tmp_path / "model.pt"
        torch.save(dict(WEIGHTS), path)
        path.write_bytes(damage(path.read_bytes()))
        refused(path, tmp_path / "out", "model.pt is not a file of torch.save")

    def test_lying_sizes(self, tmp_path):
        """A tensor larger than its record must not be made."""
        path = tmp_path / "model.pt"
        torch.save({"a": torch.ones(4, 4)}, path)
        with zipfile.ZipFile(path) as archive:
            (name,) = [one for one in archive.namelist() if one.endswith("data.pkl")]
            data = archive.read(name)
        size = b"K\x04K\x04\x86"
        assert size in data
        huge = b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"
        repacked(path, data.replace(size, huge, 1))
        refused(path, tmp_path / "out", "can't be read as a state dict")

    def test_compressed(self, tmp_path):
        path = repacked(tmp_path / "model.pt", b"", zipfile.ZIP_DEFLATED)
        refused(path, tmp_path / "out", "is compressed, which torch.save never does")

    def test_tuples_that_take_forever_to_hash(self, tmp_path):
        data = b"\x80\x02}K\x01\x85q\x00"
        for i in range(60):
            data += b"h" + bytes([i, *b"h", i]) + b"\x86q" + bytes([i + 1])
        path = repacked(tmp_path / "model.pt", data + b"K\x01s.")
        refused(path, tmp_path / "out", "uses a tuple twice")

    def test_long_pickle(self, tmp_path):
        path = repacked(tmp_path / "model.pt", b"\x80\x02" + b"]" * 600_000 + b".")
        start = time.process_time()
        refused(path, tmp_path / "out", "has a pickle of 600003 bytes; at most 524288")
        assert time.process_time() - start < 2

    def test_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_pickle(str(tmp_path / "model.pt"))


class TestFolder:
    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("/no/such")
        for name in ("file", "folder", "link"):
            refused(TINY, tmp_path / name, "exists; nothing is overwritten")

    def test_no_parent(self, tmp_path):
        result = run(TINY, tmp_path / "no" / "out")
        assert result.exit_code == 2
        assert "does not exist; make it first" in result.output

    @pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "vae"])
    def test_missing_parts(self, tmp_path, missing):
        model = Path(shutil.copytree(TINY, tmp_path / "model"))
        shutil.rmtree(model / missing) if missing == "vae" else (model / missing).unlink()
        refused(model, tmp_path / "out", f"has no {missing} beside it; give", "--base")
        converted(model, tmp_path / "out", "--base", TINY)

    def test_parts_of_the_model_count(self, tmp_path):
        model = Path(shutil.copytree(TINY, tmp_path / "model"))
        (model / "config.json").write_text("{}")
        refused(model, tmp_path / "out", "hidden_size is missing", options=("--base", TINY))

    @pytest.mark.parametrize(
        ("model", "part"),
        [
            ("/no/such", "/no/such does not exist; give a folder"),
            ("/no/such.pt", "/no/such.pt does not exist"),
            ("/no/such.safetensors", "/no/such.safetensors does not exist"),
            (TINY / "config.json", "is no folder, .safetensors file or file of torch.save"),
            (TINY.parent / "images", "has no model.safetensors"),
        ],
    )
    def test_no_model(self, tmp_path, model, part):
        refused(model, tmp_path / "out", part, options=("--base", TINY))

    def test_another_model(self, tmp_path):
        path = held(tmp_path / "x.safetensors", {"weight": torch.ones(3)})
        refused(path, tmp_path / "out", "missing", "unexpected weight", options=("--base", TINY))

    def test_too_little_room(self, tmp_path, monkeypatch):
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 1000))
        refused(TINY, tmp_path / "out", "0.00 GB free and the model takes 0.00")

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(conversion, "_write_json", full)  # after the weights
        refused(TINY, tmp_path / "out", "out can't be written: No space left on device")

    @pytest.mark.slow_except("SIGTERM")
    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name
    )
    def test_signals_leave_nothing(self, tmp_path, number):
        """In a process of its own, stopped while it writes."""
        code = (
            "import time; from omnigen_fast import conversion; from omnigen_fast.cli import main\n"
            "conversion._write_json = lambda *_: (print('now', flush=True), time.sleep(60))\n"
            f"main(['convert', {str(TINY)!r}, {str(tmp_path / 'out')!r}])"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"now\n"
            assert len(os.listdir(tmp_path)) == 1  # the temporary folder
            process.send_signal(number)
            assert process.wait(30) in (1, -number)
        assert os.listdir(tmp_path) == []

    def test_mode(self, tmp_path):
        converted(TINY, tmp_path / "out")
        mask = os.umask(0)
        os.umask(mask)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
