"""LoRAs of every writer give the same weights; adapters come and go by name, to the bit."""

from __future__ import annotations

import json
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import LORA, ORIGINAL, diffusers_names, make_adapter, same, weights

from omnigen_fast import CheckpointError, OmniGenError, RequestError
from omnigen_fast.weights.lora_files import read_adapter

PLAIN = {name.removeprefix("base_model.model."): tensor for name, tensor in ORIGINAL.items()}
ALPHA, RANK = 8, 4  # of the golden LoRA


@pytest.fixture
def fresh(load_pipe):
    return load_pipe(device="cpu")


@pytest.fixture(scope="module")
def reference(load_pipe):
    """Weights before and after the golden LoRA, in PEFT's format."""
    pipe = load_pipe(device="cpu")
    before = weights(pipe)
    pipe.load_lora_weights(LORA)
    return before, weights(pipe)


def modules() -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in PLAIN})


def diffusers_file(prefix="transformer."):
    return diffusers_names(ORIGINAL, prefix)


def with_alpha(tensors, alpha=ALPHA, dtype=torch.float32):
    found = {name.partition(".lora_")[0] for name in tensors}
    return tensors | {f"{one}.alpha": torch.tensor(alpha, dtype=dtype) for one in found}


def kohya(tensors, prefix="lora_unet_", dtype=torch.float32):
    """As kohya's trainers name them."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".lora_")
        part = {"A": "down", "B": "up"}[part[0]]
        renamed[f"{prefix}{module.replace('.', '_')}.lora_{part}.weight"] = tensor
    return with_alpha(renamed, dtype=dtype)


def comfy(tensors, parts=("down", "up")):
    return with_alpha(
        {
            f"diffusion_model.{name}".replace("lora_A", f"lora_{parts[0]}").replace(
                "lora_B", f"lora_{parts[1]}"
            ): tensor
            for name, tensor in tensors.items()
        }
    )


def save(tensors, path, metadata=None):
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata
    )
    return path


def metadata_of(**config):
    values = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    values |= {f"transformer.{name}": value for name, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(values), "format": "pt"}


FORMATS = {
    "kohya": lambda: kohya(PLAIN),
    "kohya-integer-alpha": lambda: kohya(PLAIN, dtype=torch.int64),
    "kohya-transformer": lambda: kohya(diffusers_names(ORIGINAL, ""), "lora_transformer_"),
    "comfy": lambda: comfy(PLAIN),
    "comfy-lora-a": lambda: comfy(PLAIN, "AB"),
    "comfy-split": lambda: comfy(diffusers_names(ORIGINAL, "")),
    "diffusers-alphas": lambda: with_alpha(diffusers_file()),
    "original-names-in-diffusers": lambda: with_alpha(
        {f"transformer.{name}": tensor for name, tensor in PLAIN.items()}
    ),
    "language-model-alone": lambda: with_alpha(
        {name.removeprefix("llm."): tensor for name, tensor in PLAIN.items()}
    ),
}


def close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


class TestFormats:
    @pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
    @pytest.mark.parametrize("kind", ["file", "dict"])
    def test_the_same_weights(self, fresh, reference, tmp_path, make, kind):
        before, expected = reference
        tensors = make()
        fresh.load_lora_weights(
            tensors if kind == "dict" else save(tensors, tmp_path / "lora.safetensors")
        )
        close(weights(fresh), expected)
        fresh.unload_lora_weights()
        assert same(weights(fresh), before)

    @pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
    def test_on_a_checkpoint_of_diffusers(self, load_pipe, diffusers_folder, reference, make):
        pipe = load_pipe(diffusers_folder, device="cpu")
        pipe.load_lora_weights(make())
        close(weights(pipe), reference[1])

    def test_diffusers_folder_with_metadata(self, fresh, reference, tmp_path):
        save(diffusers_file(), tmp_path / "pytorch_lora_weights.safetensors", metadata_of())
        fresh.load_lora_weights(tmp_path)
        close(weights(fresh), reference[1])

    def test_without_alpha_the_scale_is_one(self, fresh, load_pipe, tmp_path):
        other = load_pipe(device="cpu")
        fresh.load_lora_weights(save(diffusers_file(), tmp_path / "a.safetensors"))
        other.load_lora_weights(LORA, weight=RANK / ALPHA)
        close(weights(fresh), weights(other))

    def test_rank_stabilised_metadata(self, fresh, load_pipe, tmp_path):
        other = load_pipe(device="cpu")
        path = tmp_path / "a.safetensors"
        fresh.load_lora_weights(save(diffusers_file(), path, metadata_of(use_rslora=True)))
        other.load_lora_weights(LORA, weight=RANK**0.5)
        close(weights(fresh), weights(other))

    def test_peft_file_reads_the_config_beside_it(self, fresh, reference):
        fresh.load_lora_weights(LORA / "adapter_model.safetensors")
        assert same(weights(fresh), reference[1])

    def test_peft_config_is_not_read_for_other_files(self, fresh, reference, tmp_path):
        (tmp_path / "adapter_config.json").write_text("not JSON")
        save(kohya(PLAIN), tmp_path / "style.safetensors")
        fresh.load_lora_weights(tmp_path / "style.safetensors")
        close(weights(fresh), reference[1])

    def test_half_precision(self, fresh, reference):
        fresh.load_lora_weights({name: t.half() for name, t in kohya(PLAIN).items()})
        for name, tensor in reference[1].items():
            torch.testing.assert_close(fresh.model.parameter(name).data, tensor, rtol=0, atol=1e-3)

    def test_other_modules(self, fresh):
        torch.manual_seed(0)
        shapes = {
            "x_embedder.proj": ((4, 4, 2, 2), (192, 4, 1, 1), "noise_proj.weight"),
            "final_layer.linear": ((4, 192), (16, 4), "output.weight"),
            "t_embedder.mlp.0": ((4, 256), (192, 4), "time_embed.0.weight"),
            "time_token.linear_2": ((4, 192), (192, 4), "time_token.1.weight"),
        }
        tensors = {}
        for module, (down, up, _) in shapes.items():
            tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(down)
            tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(up)
        before = weights(fresh)
        fresh.load_lora_weights(tensors)
        for module, (_, _, name) in shapes.items():
            down, up = (tensors[f"diffusion_model.{module}.lora_{x}.weight"] for x in "AB")
            expected = before[name] + (up.flatten(1) @ down.flatten(1)).view_as(before[name])
            torch.testing.assert_close(fresh.model.parameter(name).data, expected)

    def test_the_dicts_tensors_are_copied(self, fresh, reference):
        tensors = {name: tensor.clone() for name, tensor in kohya(PLAIN).items()}
        fresh.load_lora_weights(tensors)
        loaded = weights(fresh)
        for tensor in tensors.values():
            tensor.zero_()
        fresh.disable_lora()
        fresh.enable_lora()
        assert same(weights(fresh), loaded)


class TestDiffusersIsTheOracle:
    def deltas(self, folder, load) -> dict[str, torch.Tensor]:
        """What diffusers' transformer adds to each weight after `load`."""
        from diffusers import OmniGenTransformer2DModel
        from diffusers.loaders.peft import PeftAdapterMixin

        class Adapted(OmniGenTransformer2DModel, PeftAdapterMixin):
            """OmniGen's lacks the mixin that diffusers' other transformers have."""

        transformer = Adapted.from_pretrained(folder / "transformer")
        load(transformer)
        found = {}
        for name, module in transformer.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                found[name] = module.get_delta_weight("default").detach()
        assert found
        return found

    def ours(self, pipe, source) -> dict[str, torch.Tensor]:
        checkpoint = pipe.engine.checkpoint
        found = {(u.parameter, u.start): u for u in read_adapter(source, checkpoint).updates}
        return {key: u.scale * u.up @ u.down for key, u in found.items()}

    @pytest.mark.parametrize("metadata", [None, metadata_of(), metadata_of(use_rslora=True)])
    def test_its_own_reader(self, fresh, diffusers_folder, tmp_path, metadata):
        path = save(diffusers_file(), tmp_path / "pytorch_lora_weights.safetensors", metadata)
        if metadata is not None:  # its reader makes a LoraConfig of all of it
            values = json.loads(metadata["lora_adapter_metadata"])
            values["transformer.target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
            path = save(diffusers_file(), path, {"lora_adapter_metadata": json.dumps(values)})
        expected = self.deltas(
            diffusers_folder,
            lambda t: t.load_lora_adapter(
                str(tmp_path), weight_name=path.name, prefix="transformer", adapter_name="default"
            ),
        )
        self.compare(fresh, path, expected)

    def test_alphas(self, fresh, diffusers_folder):
        """Network alphas, by the converter that diffusers shares between its transformers."""
        from diffusers.loaders.lora_conversion_utils import (
            _convert_non_diffusers_z_image_lora_to_diffusers as convert,
        )

        tensors = comfy(diffusers_names(ORIGINAL, ""))
        converted = convert({name: tensor.clone() for name, tensor in tensors.items()})
        expected = self.deltas(
            diffusers_folder, lambda t: t.load_lora_adapter(converted, adapter_name="default")
        )
        self.compare(fresh, tensors, expected)

    def compare(self, pipe, source, expected):
        found = self.ours(pipe, source)
        assert len(found) == len(expected)
        for name, delta in expected.items():
            parameter, rows = pipe.engine.checkpoint.find(f"{name}.weight")
            torch.testing.assert_close(found[parameter, rows.start], delta)


class TestPlaces:
    def test_a_folder_with_one_file(self, fresh, reference, tmp_path):
        save(kohya(PLAIN), tmp_path / "style.safetensors")
        fresh.load_lora_weights(tmp_path)
        close(weights(fresh), reference[1])

    def test_several_files_need_a_name(self, fresh, reference, tmp_path):
        for name in ("one", "two"):
            save(kohya(PLAIN), tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=r"weight_name='one\.safetensors'"):
            fresh.load_lora_weights(tmp_path)
        fresh.load_lora_weights(tmp_path, weight_name="two.safetensors")
        close(weights(fresh), reference[1])
        assert fresh.get_active_adapters() == [f"{tmp_path}/two.safetensors"]

    def test_hub(self, fresh, reference, tmp_path, monkeypatch):
        asked = []
        shutil.copytree(LORA, tmp_path / "sub")
        save(kohya(PLAIN), tmp_path / "style.safetensors")

        def snapshot_download(name, **arguments):
            asked.append((name, arguments))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        hub = {"revision": "v1", "cache_dir": "/cache", "token": "t", "local_files_only": True}
        fresh.load_lora_weights("owner/name", weight_name="style.safetensors", **hub)
        name, arguments = asked.pop()
        assert name == "owner/name"
        assert "style.safetensors" in arguments.pop("allow_patterns")
        assert arguments == hub
        close(weights(fresh), reference[1])
        fresh.unload_lora_weights()
        fresh.load_lora_weights("owner/name", subfolder="sub")
        assert all(p.startswith("sub/") for p in asked.pop()[1]["allow_patterns"])
        assert same(weights(fresh), reference[1])

    @pytest.mark.parametrize("source", [None, 3, b"x", [], object()])
    def test_no_source(self, fresh, source):
        with pytest.raises(RequestError, match="must be a path, a hub id or a state dict"):
            fresh.load_lora_weights(source, "a")
        with pytest.raises(RequestError):
            fresh.load_lora_weights(source)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3])
    def test_weight_name_stays_inside(self, fresh, name):
        with pytest.raises(RequestError, match="must be a name inside the folder"):
            fresh.load_lora_weights(LORA, weight_name=name)

    @pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt"])
    def test_pickles(self, fresh, tmp_path, name):
        (tmp_path / name).write_bytes(b"x")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(CheckpointError, match="is a pickle"):
                fresh.load_lora_weights(path)


KINDS = {
    "LoKr": "lora_unet_llm_layers_0_self_attn_o_proj.lokr_w1",
    "LoHa": "lora_unet_llm_layers_0_self_attn_o_proj.hada_w1_a",
    "DoRA": "transformer.layers.0.self_attn.to_q.lora_magnitude_vector",
    "a DoRA": "lora_unet_llm_layers_0_self_attn_o_proj.dora_scale",
    "OFT": "lora_unet_llm_layers_0_self_attn_o_proj.oft_blocks",
    "biases": "base_model.model.llm.layers.0.self_attn.o_proj.lora_B.bias",
    "whole weight": "diffusion_model.llm.layers.0.self_attn.o_proj.diff",
    "Tucker": "lora_unet_x_embedder_proj.lora_mid.weight",
    "text encoder": "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_named(fresh, kind):
    with pytest.raises(CheckpointError) as caught:
        fresh.load_lora_weights(kohya(PLAIN) | {KINDS[kind]: torch.ones(4)})
    one_line(caught.value)
    assert kind in str(caught.value)


def one_line(error):
    assert str(error).isprintable() and len(str(error)) <= 300, str(error)


Q = "transformer.layers.0.self_attn.to_q"
CRAFTED = {
    "rank-0": lambda: {f"{Q}.lora_A.weight": (0, 192), f"{Q}.lora_B.weight": (192, 0)},
    "huge-rank": lambda: {
        f"{Q}.lora_A.weight": torch.zeros(1).expand(1 << 33, 192),
        f"{Q}.lora_B.weight": torch.zeros(1).expand(192, 1 << 33),
    },
    "huge-shape": lambda: {f"{Q}.lora_A.weight": torch.zeros(1).expand(4, 1 << 40)},
    "mismatched": lambda: {f"{Q}.lora_A.weight": (3, 192)},
    "many-axes": lambda: {f"{Q}.lora_A.weight": torch.zeros(1).expand((4, 192) + (1, 2) * 20)},
    "nan": lambda: {f"{Q}.lora_A.weight": torch.full((4, 192), torch.nan)},
    "inf": lambda: {f"{Q}.lora_B.weight": torch.full((192, 4), -torch.inf)},
    "overflow": lambda: {
        f"{Q}.lora_A.weight": torch.full((4, 192), 1e30),
        f"{Q}.lora_B.weight": torch.full((192, 4), 1e30),
    },
    "integers": lambda: {f"{Q}.lora_A.weight": torch.zeros(4, 192, dtype=torch.int8)},
    "complex": lambda: {f"{Q}.lora_A.weight": torch.zeros(4, 192, dtype=torch.complex64)},
    "alpha-inf": lambda: {f"{Q}.alpha": torch.tensor(torch.inf)},
    "alpha-nan": lambda: {f"{Q}.alpha": torch.tensor(torch.nan)},
    "alpha-vector": lambda: {f"{Q}.alpha": torch.ones(4)},
    "alpha-flag": lambda: {f"{Q}.alpha": torch.tensor(True)},
    "twice": lambda: {f"diffusion_{Q.replace('transformer', 'model')}.lora_A.weight": (4, 192)},
    "fused-and-split": lambda: {
        "llm.layers.0.self_attn.qkv_proj.lora_A.weight": (4, 192),
        "llm.layers.0.self_attn.qkv_proj.lora_B.weight": (576, 4),
    },
    "half": lambda: {"transformer.proj_out.lora_A.weight": (4, 192)},
    "odd-name": lambda: {"\x1b[31m\0\n" + "x" * 100_000: (1, 1)},
    "many": lambda: dict.fromkeys(map(str, range(1_000_000)), torch.zeros(1)),
    "no-tensor": lambda: {Q: "text"},
    "no-name": lambda: {3: (1, 1)},
    "meta": lambda: {f"{Q}.lora_A.weight": torch.empty(4, 192, device="meta")},
    "sparse": lambda: {f"{Q}.lora_A.weight": torch.zeros(4, 192).to_sparse()},
    "prefixes": lambda: {"transformer." * 10_000 + "lora_A.weight": (4, 192)},
}


class TestCrafted:
    @pytest.mark.parametrize("make", CRAFTED.values(), ids=CRAFTED)
    def test_one_line_in_bounded_time(self, fresh, reference, make):
        made = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in make().items()}
        tensors = diffusers_file() | made
        start = time.monotonic()
        with pytest.raises(OmniGenError) as caught:
            fresh.load_lora_weights(tensors)
        assert time.monotonic() - start < 2
        one_line(caught.value)
        assert same(weights(fresh), reference[0])

    def test_large_header(self, fresh, tmp_path):
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 99 << 20))
            file.truncate((99 << 20) + 8)
        with pytest.raises(CheckpointError, match="has a header of 103809024 bytes") as caught:
            fresh.load_lora_weights(path)
        one_line(caught.value)

    def test_large_config(self, fresh, tmp_path):
        folder = shutil.copytree(LORA, tmp_path / "lora")
        (folder / "adapter_config.json").write_text(" " * (5 << 20) + "{}")
        with pytest.raises(CheckpointError, match="at most 4194304 are read"):
            fresh.load_lora_weights(folder)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("{", "can't be read as JSON"),
            ("[" * 100_000, "can't be read as JSON"),
            ("[]", "must be a JSON object, got list"),
            ('{"transformer.lora_alpha": 1e999}', "lora_alpha must be a number"),
            ('{"transformer.peft_type": "LOHA"}', "LOHA adapter"),
            ('{"transformer.use_dora": true}', "use_dora"),
            ('{"transformer.init_lora_weights": "pissa"}', "init_lora_weights='pissa'"),
            (
                json.dumps({"transformer.alpha_pattern": {f"x{i}": 1 for i in range(5000)}}),
                "could be slow",
            ),
        ],
    )
    def test_metadata(self, fresh, tmp_path, text, part):
        path = save(diffusers_file(), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError) as caught:
            fresh.load_lora_weights(path)
        assert part in str(caught.value)
        one_line(caught.value)

    def test_scale_given_twice(self, fresh, tmp_path):
        tensors = with_alpha(diffusers_file())
        path = save(tensors, tmp_path / "a.safetensors", metadata_of())
        with pytest.raises(CheckpointError, match="gives its scale twice"):
            fresh.load_lora_weights(path)


@pytest.fixture
def two(fresh, tmp_path):
    """A pipeline with adapters "a" and "b", and the weights for any strengths of theirs."""
    make_adapter(fresh, tmp_path / "a", seed=1)
    make_adapter(fresh, tmp_path / "b", seed=2, target_modules=["o_proj", "x_embedder.proj"])
    base = weights(fresh)

    def expected(a=0.0, b=0.0):
        before = fresh.engine.loras
        fresh.unload_lora_weights()
        fresh.unfuse_lora()
        fresh.enable_lora()
        assert same(weights(fresh), base)
        for name, strength in (("a", a), ("b", b)):
            if strength:
                fresh.load_lora_weights(tmp_path / name, name, weight=strength)
        found = weights(fresh)
        fresh._set_loras(before)
        return found

    for name in "ab":
        fresh.load_lora_weights(tmp_path / name, adapter_name=name)
    return fresh, expected


class TestByName:
    def test_set_adapters(self, two):
        pipe, expected = two
        assert same(weights(pipe), expected(1, 1))
        pipe.set_adapters("a", 0.5)
        assert pipe.get_active_adapters() == ["a"]
        assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
        assert same(weights(pipe), expected(a=0.5))
        pipe.set_adapters(["b", "a"], [2, 0.25])
        assert same(weights(pipe), expected(0.25, 2))
        pipe.set_adapters(["a", "b"], [{"transformer": 0.5}, None])
        assert same(weights(pipe), expected(0.5, 1))
        pipe.set_adapters([])
        assert same(weights(pipe), expected())
        pipe.set_adapters(["a", "b"])
        assert same(weights(pipe), expected(1, 1))

    def test_disable_and_delete(self, two):
        pipe, expected = two
        pipe.disable_lora()
        assert same(weights(pipe), expected())
        pipe.set_adapters(["a"], [0.5])
        assert same(weights(pipe), expected())
        pipe.enable_lora()
        assert same(weights(pipe), expected(a=0.5))
        pipe.delete_adapters("a")
        assert pipe.get_list_adapters() == {"transformer": ["b"]}
        assert same(weights(pipe), expected())
        pipe.delete_adapters(["b"])
        assert pipe.get_list_adapters() == {}

    def test_fuse(self, two):
        pipe, expected = two
        pipe.fuse_lora(lora_scale=0.5)
        assert pipe.num_fused_loras == 2
        assert same(weights(pipe), expected(0.5, 0.5))
        pipe.set_adapters("a", 3)
        pipe.disable_lora()
        assert same(weights(pipe), expected(0.5, 0.5))
        pipe.enable_lora()
        pipe.unfuse_lora()
        assert same(weights(pipe), expected(a=3))

    def test_fused_stays_when_its_name_goes(self, two, tmp_path):
        pipe, expected = two
        pipe.fuse_lora(adapter_names=["a"], lora_scale=0.7)
        pipe.unload_lora_weights()
        assert pipe.get_list_adapters() == {}
        assert same(weights(pipe), expected(a=0.7))
        pipe.load_lora_weights(tmp_path / "a", "a")
        pipe.unfuse_lora()
        assert same(weights(pipe), expected(a=1))

    def test_fusing_at_one_keeps_the_bits(self, two):
        pipe, expected = two
        pipe.fuse_lora()
        assert same(weights(pipe), expected(1, 1))
        with pytest.raises(RequestError, match="no active adapter to fuse"):
            pipe.fuse_lora()
        with pytest.raises(RequestError, match="'a' is fused already"):
            pipe.fuse_lora(adapter_names="a")
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert same(weights(pipe), expected())

    def test_merging_twice_adds(self, fresh, load_pipe):
        other = load_pipe(device="cpu")
        before = weights(fresh)
        fresh.merge_lora(LORA)
        fresh.merge_lora(LORA)
        other.load_lora_weights(LORA, weight=2)
        close(weights(fresh), weights(other))
        assert fresh.get_active_adapters() == [str(LORA), f"{LORA} (2)"]
        fresh.unload_lora_weights()
        assert same(weights(fresh), before)

    def test_dicts_get_diffusers_names(self, fresh):
        for _ in range(2):
            fresh.load_lora_weights(kohya(PLAIN))
        assert fresh.get_active_adapters() == ["default_0", "default_1"]

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (lambda p: p.set_adapters("c"), "no adapter 'c' is loaded; loaded: 'a', 'b'"),
            (lambda p: p.set_adapters(["a", "a"]), "given twice"),
            (lambda p: p.set_adapters(["a", "b"], [1]), "has 1 entries for 2 adapters"),
            (lambda p: p.set_adapters("a", float("nan")), "must be a finite number"),
            (lambda p: p.set_adapters("a", 1e300), "must be at most 1e+09"),
            (lambda p: p.set_adapters("a", {"unet": 1}), "transformer"),
            (lambda p: p.set_adapters(None), "adapter names must be texts"),
            (lambda p: p.set_adapters(3), "adapter names must be texts"),
            (lambda p: p.delete_adapters(["a", "c"]), "no adapter 'c'"),
            (lambda p: p.delete_adapters("c" * 10_000), "no adapter"),
            (lambda p: p.fuse_lora(lora_scale="x"), "lora_scale must be a finite number"),
            (lambda p: p.fuse_lora(["unet"]), "components can only be"),
            (lambda p: p.fuse_lora(3), "components can only be"),
            (lambda p: p.fuse_lora(adapter_names=["c"]), "no adapter 'c'"),
            (lambda p: p.load_lora_weights(LORA, 3), "adapter_name must be a text"),
            (lambda p: p.load_lora_weights(LORA, "a"), "loaded already"),
            (lambda p: p.load_lora_weights(LORA, weight=1e10), "at most 1e+09"),
        ],
    )
    def test_what_can_not_be_done_changes_nothing(self, two, change, part):
        pipe, _ = two
        before = weights(pipe), pipe.engine.loras
        with pytest.raises(RequestError) as caught:
            change(pipe)
        assert part in str(caught.value)
        one_line(caught.value)
        assert same(weights(pipe), before[0]) and pipe.engine.loras == before[1]

    @pytest.mark.parametrize("after", range(1, 4))
    @pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
    def test_a_failure_leaves_all_as_it_was(self, two, monkeypatch, after, error):
        from omnigen_fast.weights.checkpoint import Checkpoint

        pipe, _ = two
        read = Checkpoint.read
        for change in (
            lambda: pipe.set_adapters("b", 0.3),
            lambda: pipe.fuse_lora(lora_scale=2),
            pipe.disable_lora,
            lambda: pipe.delete_adapters("a"),
        ):
            before = weights(pipe), pipe.engine.loras
            left = iter([True] * after + [False])

            def fail_once(*arguments, left=left):
                if not next(left, True):
                    raise error
                return read(*arguments)

            monkeypatch.setattr(Checkpoint, "read", fail_once)
            with pytest.raises(error):
                change()
            monkeypatch.setattr(Checkpoint, "read", read)
            assert same(weights(pipe), before[0]) and pipe.engine.loras == before[1]


def test_files_are_not_kept_open(fresh, tmp_path):
    path = save(kohya(PLAIN), tmp_path / "a.safetensors")
    fresh.load_lora_weights(path)
    expected = weights(fresh)
    path.unlink()
    fresh.disable_lora()
    fresh.enable_lora()
    assert same(weights(fresh), expected)
    assert load_file(LORA / "adapter_model.safetensors").keys() == ORIGINAL.keys()
