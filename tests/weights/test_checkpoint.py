"""A model folder is read as it is, or refused in one line that names what is wrong with it."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import change_json, change_weights, refused, shard
from golden_cases import GOLDEN, TINY
from safetensors.torch import load_file, save_file

from omnigen_fast import CheckpointError, OmniGenPipeline
from omnigen_fast.config import ModelConfig
from omnigen_fast.guidance import Branch
from omnigen_fast.images import read_image
from omnigen_fast.parameters import parameter_shapes
from omnigen_fast.processor import Processor
from omnigen_fast.vae.vae import Vae
from omnigen_fast.weights import checkpoint, files
from omnigen_fast.weights.checkpoint import Checkpoint
from omnigen_fast.weights.files import TensorReader, find_weights, read_json, resolve

CPU = torch.device("cpu")
HOST = torch.device("cpu")
CONFIG = json.loads((TINY / "config.json").read_text())
QKV = "llm.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden checkpoint to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


class TestReading:
    def test_every_parameter(self):
        checkpoint = Checkpoint.open(TINY)
        weights = checkpoint.read(torch.float32, CPU)
        assert {n: tuple(t.shape) for n, t in weights.items()} == parameter_shapes(
            checkpoint.config
        )
        file = load_file(TINY / "model.safetensors")
        assert torch.equal(weights["layers.1.qkv_proj"], file[QKV])
        assert torch.equal(weights["time_embed.1.bias"], file["t_embedder.mlp.2.bias"])
        assert torch.equal(weights["time_token.0.weight"], file["time_token.mlp.0.weight"])
        assert torch.equal(weights["noise_proj.weight"], file["x_embedder.proj.weight"])
        assert torch.equal(weights["image_proj.weight"], file["input_x_embedder.proj.weight"])
        # every tensor of the file is used, and once
        sums = sorted(tensor.double().sum().item() for tensor in file.values())
        assert sorted(tensor.double().sum().item() for tensor in weights.values()) == sums

    def test_some_parameters(self):
        weights = Checkpoint.open(TINY).read(torch.float32, CPU, ["norm", "layers.0.o_proj"])
        assert list(weights) == ["norm", "layers.0.o_proj"]

    def test_shards(self, folder):
        shards = shard(folder)
        whole = Checkpoint.open(TINY).read(torch.float32, CPU)
        parts = Checkpoint.open(folder)
        assert {Path(path).name for path in parts.files.values()} == set(shards)
        for name, tensor in parts.read(torch.float32, CPU).items():
            assert torch.equal(tensor, whole[name])

    def test_conversion_rounds_to_nearest(self):
        checkpoint = Checkpoint.open(TINY)
        exact = checkpoint.read(torch.float32, CPU)
        for name, tensor in checkpoint.read(torch.bfloat16, CPU).items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, exact[name].to(torch.bfloat16))

    def test_bfloat16_file(self, folder):
        def halve(tensors):
            tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

        change_weights(folder / "model.safetensors", halve)
        expected = Checkpoint.open(TINY).read(torch.bfloat16, CPU)
        for name, tensor in Checkpoint.open(folder).read(torch.bfloat16, CPU).items():
            assert torch.equal(tensor, expected[name])
        for name, tensor in Checkpoint.open(folder).read(torch.float32, CPU).items():
            assert torch.equal(tensor, expected[name].float())

    def test_long_reads_renew_the_mapping(self, monkeypatch):
        expected = Checkpoint.open(TINY).read(torch.bfloat16, CPU)
        monkeypatch.setattr("omnigen_fast.weights.files._RENEW_BYTES", 1 << 16)
        opened = []
        real = files.open_file
        monkeypatch.setattr(files, "open_file", lambda *where: opened.append(where) or real(*where))
        for name, tensor in Checkpoint.open(TINY).read(torch.bfloat16, CPU).items():
            assert torch.equal(tensor, expected[name])
        assert len(opened) > 10
        monkeypatch.undo()
        opened.clear()
        monkeypatch.setattr(files, "open_file", lambda *where: opened.append(where) or real(*where))
        Checkpoint.open(TINY).read(torch.bfloat16, CPU)
        assert len(opened) == 3  # for the headers, what they say of forms, and the values

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
    def test_equal_dtype_is_the_mapped_file(self, folder):
        weights = Checkpoint.open(folder).read(torch.float32, CPU)
        mapped = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, rest = line.partition(" ")
            if rest.endswith(str(folder / "model.safetensors")):
                mapped.append([int(end, 16) for end in span.split("-")])
        assert len(weights) > 30
        for tensor in weights.values():
            start = tensor.data_ptr()
            assert any(low <= start and start + tensor.nbytes <= high for low, high in mapped)

    def test_tensors_outlive_the_file(self, folder):
        expected = Checkpoint.open(TINY).read(torch.float32, CPU)
        weights = Checkpoint.open(folder).read(torch.float32, CPU)
        shutil.rmtree(folder)
        gc.collect()
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name])

    def test_no_pickle_is_read(self, folder, shared_pipe, monkeypatch):
        # with shared_pipe, all that loading imports is there already

        class Unpickler(pickle.Unpickler):
            def __init__(self, *_, **__):
                read()

        def read(*_, **__):
            raise AssertionError("a pickle was read")

        for name in ("pytorch_model.bin", "model.pt", "vae/diffusion_pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(ValueError))
        lora = shutil.copytree(GOLDEN / "lora", folder / "lora")
        (lora / "adapter_model.bin").write_bytes(pickle.dumps(ValueError))
        for name in ("torch.load", "pickle.load", "pickle.loads"):
            monkeypatch.setattr(name, read)
        monkeypatch.setattr("pickle.Unpickler", Unpickler)
        pipe = OmniGenPipeline.from_pretrained(folder, dtype="float32", device="cpu")
        pipe.load_lora_weights(lora)
        assert pipe.dtype == torch.float32

    def test_the_position_table_stays_on_the_host(self, monkeypatch):
        asked = {}

        class Reader(TensorReader):
            def read(self, name, device):
                asked[name] = device
                return super().read(name, HOST)

        monkeypatch.setattr(checkpoint, "TensorReader", Reader)
        Checkpoint.open(TINY).read(torch.float32, torch.device("meta"))
        assert [name for name, device in asked.items() if device == HOST] == ["pos_embed"]
        assert {device for name, device in asked.items() if name != "pos_embed"} == {
            torch.device("meta")
        }

    @pytest.mark.parametrize(
        ("shapes", "side"),
        [({}, 1), ({"t": (49,)}, 1), ({"t": (1, 0, 8)}, 1), ({"t": (1, 49, 8)}, 7)],
        ids=str,
    )
    def test_side_of_the_position_table(self, shapes, side):
        assert checkpoint._table_side(shapes, "t") == side

    @pytest.mark.parametrize("places", [48, 50, 1, 2])
    def test_a_position_table_is_square(self, places):
        if places == 1:
            assert checkpoint._table_side({"t": (1, 1, 8)}, "t") == 1
            return
        with pytest.raises(CheckpointError, match=f"t has {places} places, which is not a square"):
            checkpoint._table_side({"t": (1, places, 8)}, "t")


class TestTensors:
    def test_missing_unexpected_and_misshapen_are_named_together(self, folder):
        def damage(tensors):
            del tensors["llm.norm.weight"], tensors[QKV]
            tensors["llm.lm_head.weight"] = torch.zeros(2)
            tensors["x_embedder.proj.bias"] = torch.zeros(191)

        change_weights(folder / "model.safetensors", damage)
        refused(
            lambda: Checkpoint.open(folder),
            f"missing {QKV}, llm.norm.weight",
            "unexpected llm.lm_head.weight",
            "misshapen x_embedder.proj.bias is [191] instead of [192]",
        )

    def test_many_are_counted(self, folder):
        change_json(folder / "config.json", num_hidden_layers=1000)
        refused(lambda: Checkpoint.open(folder), "missing llm.layers.10.", "and 5974 more")

    def test_another_model(self, folder):
        save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
        refused(lambda: Checkpoint.open(folder), "missing ", "unexpected weight")

    def test_no_tensors_at_all(self, folder):
        """The names are those of the folder's layout."""
        save_file({}, folder / "model.safetensors")
        refused(lambda: Checkpoint.open(folder), "missing final_layer.")
        inner = folder / "transformer"  # as diffusers has it
        inner.mkdir()
        shutil.copy(folder / "config.json", inner)
        save_file({}, inner / "diffusion_pytorch_model.safetensors")
        refused(lambda: Checkpoint.open(folder), "missing embed_tokens.weight")

    def test_integers(self, folder):
        def damage(tensors):
            tensors["llm.norm.weight"] = tensors["llm.norm.weight"].int()
            tensors[QKV] = tensors[QKV].bool()

        change_weights(folder / "model.safetensors", damage)
        refused(
            lambda: Checkpoint.open(folder),
            f"{QKV} holds BOOL",
            "llm.norm.weight holds I32",
            "not floating-point",
        )

    @pytest.mark.parametrize(
        ("shape", "part"),
        [
            ((1, 2303, 192), "pos_embed has 2303 places, which is not a square"),
            ((1, 0, 192), "pos_embed is [1, 0, 192] instead of [1, 1, 192]"),
            ((1, 2304, 191), "pos_embed is [1, 2304, 191] instead of [1, 2304, 192]"),
            ((2304, 192), "misshapen pos_embed"),
            ((2, 2304, 192), "misshapen pos_embed is [2, 2304, 192]"),
        ],
    )
    def test_position_table(self, folder, shape, part):
        def damage(tensors):
            tensors["pos_embed"] = torch.zeros(shape)

        change_weights(folder / "model.safetensors", damage)
        refused(lambda: Checkpoint.open(folder), part)

    def test_another_size_of_position_table(self, folder):
        def shrink(tensors):
            tensors["pos_embed"] = tensors["pos_embed"][:, :16].clone()

        change_weights(folder / "model.safetensors", shrink)
        assert Checkpoint.open(folder).config.max_image_side == 4 * 16


class TestFiles:
    def test_numbers_of_four_bits(self, folder):
        """safetensors knows them, torch makes no weights of them."""
        path = folder / "model.safetensors"
        header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
        refused(lambda: Checkpoint.open(folder), "a holds F4, not floating-point weights")

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: b"", id="empty"),
            pytest.param(lambda data: data[:7], id="less-than-a-length"),
            pytest.param(lambda data: data[:1000], id="header-cut"),
            pytest.param(lambda data: data[:-1], id="data-cut"),
            pytest.param(lambda data: data + b"\0", id="more-data"),
            pytest.param(lambda data: b"\xff" * 5000, id="garbage"),
            pytest.param(lambda data: struct.pack("<Q", 1 << 62) + data[8:], id="lying-length"),
            pytest.param(lambda data: data[:8] + b"[" + data[9:], id="no-json"),
            pytest.param(lambda data: data.replace(b'"F32"', b'"F99"', 1), id="unknown-dtype"),
            pytest.param(lambda data: data.replace(b"[192]", b"[191]", 1), id="lying-shape"),
            pytest.param(lambda data: b"PK\x03\x04" + data, id="zip-of-torch"),
        ],
    )
    def test_damaged_safetensors(self, folder, damage):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(damage(data))
        assert path.read_bytes() != data
        refused(
            lambda: Checkpoint.open(folder), "model.safetensors is not a readable safetensors file"
        )

    @pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.ckpt", "model.pth"])
    def test_pickles_are_refused(self, folder, name):
        (folder / "model.safetensors").rename(folder / name)
        refused(
            lambda: Checkpoint.open(folder),
            f"has {name} but no model.safetensors",
            "can run code",
            "omnigen-fast convert MODEL OUT",
        )

    def test_empty_folder(self, tmp_path):
        refused(lambda: Checkpoint.open(tmp_path), "has no model.safetensors")

    def test_another_name_is_no_default(self, folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"has no model\.safetensors; it has other"):
            find_weights(str(folder), "model")
        assert find_weights(str(folder), "model", any_name=True).paths == (
            str(folder / "other.safetensors"),
        )

    def test_a_file_that_is_given(self, folder):
        path = str(folder / "model.safetensors")
        assert files.locate(path) == path
        for other in (folder / "none.safetensors", folder / "config.json"):
            with pytest.raises(CheckpointError, match=r"does not exist; give|is a file; give"):
                files.locate(other)

    def test_missing_shard(self, folder):
        names = shard(folder)
        (folder / names[1]).unlink()
        refused(lambda: Checkpoint.open(folder), f"lacks shards: {names[1]}")

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("../model.safetensors", "'../model.safetensors', which is not a file beside it"),
            ("/etc/passwd", "'/etc/passwd', which is not a file beside it"),
            ("sub/model", "'sub/model', which is not a file beside it"),
            ("..", "lacks shards: .."),
            ("", "lacks shards"),
        ],
    )
    def test_an_index_leads_nowhere_else(self, folder, name, part):
        save_file({}, folder.parent / "model.safetensors")
        names = shard(folder)
        index = {"weight_map": {"a": names[0], "b": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(lambda: find_weights(str(folder), "model"), part)

    @pytest.mark.parametrize(
        "index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}, {"weight_map": 3}]
    )
    def test_an_index_without_a_map(self, folder, index):
        shard(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(lambda: Checkpoint.open(folder), "index.json has no weight_map")

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            (b"", "can't be read as JSON"),
            (b"{", "can't be read as JSON"),
            (b"\xff\xfe{}", "can't be read as JSON"),
            (b'{"a":' * 100_000, "can't be read as JSON"),
            (b'{"a": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
            (b"[]", "must hold a JSON object, got list"),
            (b"null", "must hold a JSON object, got NoneType"),
            (b"{}", "hidden_size is missing"),
        ],
        ids=["empty", "cut", "not-utf8", "deep", "huge-number", "list", "null", "no-keys"],
    )
    def test_malformed_config(self, folder, text, part):
        (folder / "config.json").write_bytes(text)
        refused(lambda: Checkpoint.open(folder), part)

    def test_missing_config(self, folder):
        (folder / "config.json").unlink()
        refused(lambda: Checkpoint.open(folder), "config.json does not exist", "not complete")

    def test_config_is_a_folder(self, tmp_path):
        refused(lambda: read_json(tmp_path), "can't be read as JSON")


ROPE = CONFIG["rope_scaling"]


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"hidden_size": 1 << 40}, "hidden_size"),
            ({"hidden_size": -192}, "hidden_size must be a positive integer"),
            ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
            ({"hidden_size": "192"}, "hidden_size must be a positive integer, got '192'"),
            ({"hidden_size": 192.0}, "hidden_size must be a positive integer, got 192.0"),
            ({"hidden_size": float("nan")}, "hidden_size must be a positive integer, got nan"),
            ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
            ({"hidden_size": 194, "num_attention_heads": 4}, "194 is not a multiple of 4"),
            ({"hidden_size": 190, "num_attention_heads": 38}, "head_dim 5 is odd"),
            ({"num_attention_heads": 0}, "num_heads must be a positive integer, got 0"),
            ({"num_attention_heads": -2}, "num_heads must be a positive integer"),
            ({"num_attention_heads": [2]}, "num_heads must be a positive integer, got [2]"),
            ({"num_key_value_heads": 5}, "2 query heads can't share 5 key heads"),
            ({"num_key_value_heads": "2"}, "num_kv_heads must be a positive integer"),
            ({"num_hidden_layers": 1 << 20}, "1048576 layers; at most 1024"),
            ({"num_hidden_layers": True}, "num_layers must be a positive integer, got True"),
            ({"intermediate_size": 10**300}, "intermediate_size must be a positive integer"),
            ({"intermediate_size": 255}, "mlp.down_proj.weight is [192, 256] instead"),
            ({"vocab_size": 0}, "vocab_size must be a positive integer"),
            ({"vocab_size": 641}, "embed_tokens.weight is [640, 192] instead of [641, 192]"),
            ({"max_position_embeddings": -1}, "max_position_embeddings must be"),
            ({"original_max_position_embeddings": "4k"}, "must be a positive integer, got '4k'"),
            ({"original_max_position_embeddings": 1}, "must be at least 2"),
            ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
            ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, got inf"),
            ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
            ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
            ({"rope_theta": None}, "rope_theta must be a positive number, got None"),
            ({"rope_scaling": "su"}, "rope_scaling must be an object, got 'su'"),
            ({"rope_scaling": [1]}, "rope_scaling must be an object, got [1]"),
            ({"rope_scaling": {"type": "yarn"}}, "'yarn'; supported are su and longrope"),
            ({"rope_scaling": {"type": ["su"]}}, "supported are su and longrope"),
            ({"rope_scaling": {"type": "su"}}, "short_factor is missing"),
            ({"rope_scaling": {**ROPE, "long_factor": 3}}, "long_factor must hold 48 positive"),
            ({"rope_scaling": {**ROPE, "long_factor": [1.0]}}, "long_factor must hold 48"),
            ({"rope_scaling": {**ROPE, "short_factor": [0.0] * 48}}, "48 positive numbers"),
            ({"rope_scaling": {**ROPE, "short_factor": [float("inf")] * 48}}, "48 positive"),
            ({"rope_scaling": {**ROPE, "short_factor": "x" * 48}}, "48 positive numbers"),
        ],
    )
    def test_lying_config(self, folder, changes, part):
        change_json(folder / "config.json", **changes)
        refused(lambda: Checkpoint.open(folder), part)

    def test_released_sizes(self):
        config = ModelConfig.from_phi3(CONFIG, 48)
        assert (config.hidden_size, config.num_heads, config.head_dim) == (192, 2, 96)
        assert (config.num_layers, config.intermediate_size, config.vocab_size) == (3, 256, 640)
        assert config.long_factor == tuple(ROPE["long_factor"])
        assert config.short_factor == tuple(ROPE["short_factor"])
        assert config.rope_scale == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5, rel=1e-12)
        assert [config.uses_long_factor(n) for n in (4095, 4096, 4097)] == [False, False, True]

    def test_transformers_5(self):
        values = {k: v for k, v in CONFIG.items() if k not in ("rope_scaling", "rope_theta")}
        parameters = {k: v for k, v in ROPE.items() if k != "type"}
        values["rope_parameters"] = {**parameters, "rope_type": "longrope", "rope_theta": 500.0}
        expected = replace(ModelConfig.from_phi3(CONFIG, 48), rope_theta=500.0)
        assert ModelConfig.from_phi3(values, 48) == expected

    def test_original_length_among_the_rope_parameters(self):
        values = {k: v for k, v in CONFIG.items() if k != "original_max_position_embeddings"}
        values["rope_scaling"] = {**ROPE, "original_max_position_embeddings": 1000}
        assert ModelConfig.from_phi3(values, 48).original_max_position_embeddings == 1000

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_scaling": None},
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
            {"rope_scaling": {"type": "default"}},
        ],
        ids=["none", "transformers-5", "default"],
    )
    def test_without_scaling(self, rope):
        config = ModelConfig.from_phi3({**CONFIG, **rope}, 48)
        assert config.short_factor == config.long_factor == (1.0,) * 48
        assert config.rope_scale == 1.0
        assert config.rope_theta == 10000.0

    @pytest.mark.parametrize(
        "changes",
        [{"patch_size": 4, "in_channels": 4}, {"patch_size": 2, "in_channels": 16}],
    )
    def test_other_latents_in_diffusers_layout(self, changes):
        with pytest.raises(CheckpointError, match="OmniGen has 2 with 4"):
            ModelConfig.from_diffusers({**CONFIG, "num_layers": 3, **changes}, 48)


class TestTokenizer:
    config = ModelConfig.from_phi3(CONFIG, 48)

    def ids(self, path: Path) -> list[int]:
        processor = Processor.from_file(path, self.config)
        return processor.encode(Branch("A cat."), 4, 1).token_ids.tolist()

    def test_missing(self, folder):
        (folder / "tokenizer.json").unlink()
        refused(
            lambda: OmniGenPipeline.from_pretrained(folder, device="cpu"),
            "tokenizer.json does not exist",
        )

    @pytest.mark.parametrize("text", ["", "{}", "[]", "no json", '{"version": "1.0"}'])
    def test_malformed(self, tmp_path, text):
        path = tmp_path / "tokenizer.json"
        path.write_text(text)
        refused(lambda: self.ids(path), "tokenizer.json is not a tokenizer")

    def test_of_another_model(self, tmp_path):
        values = json.loads((TINY / "tokenizer.json").read_text())
        values["added_tokens"] = [
            token
            for token in values["added_tokens"]
            if token["content"] not in ("<img>", "<|diffusion|>")
        ]
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(values))
        with pytest.warns(UserWarning, match=r"no token <\|diffusion\|>, <img>; is it OmniGen's"):
            self.ids(path)

    def test_without_a_first_token(self, tmp_path):
        text = (TINY / "tokenizer.json").read_text().replace('"<s>"', '"<first>"')
        path = tmp_path / "tokenizer.json"
        path.write_text(text)
        refused(lambda: self.ids(path), "no token <s>", "not OmniGen's")

    def test_words_that_are_in_no_vocabulary(self, tmp_path):
        values = json.loads((TINY / "tokenizer.json").read_text())
        values["model"] = {"type": "WordLevel", "vocab": {"<s>": 1}, "unk_token": "<absent>"}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(values))
        refused(lambda: self.ids(path), "the tokenizer can't encode the prompt: WordLevel error")

    def test_more_tokens_than_the_model_has(self):
        processor = Processor.from_file(
            TINY / "tokenizer.json", replace(self.config, vocab_size=600)
        )
        refused(
            lambda: processor.encode(Branch("A cat."), 4, 1),
            "the model has 600",
            "do not belong together",
        )

    def test_its_truncation_and_padding_are_switched_off(self, tmp_path):
        values = json.loads((TINY / "tokenizer.json").read_text())
        values["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        values["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(values))
        assert self.ids(path) == self.ids(TINY / "tokenizer.json")


class TestVae:
    @pytest.fixture
    def vae(self, tmp_path) -> Path:
        return Path(shutil.copytree(TINY / "vae", tmp_path / "vae"))

    image = read_image(GOLDEN / "images" / "cat.png", 32, 768, "image")

    def test_old_names_of_attention(self, vae):
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
        old[".to_out.0."] = ".proj_attn."

        def rename(tensors):
            for name in list(tensors):
                for new, earlier in old.items():
                    if ".attentions.0." in name and new in name:
                        tensors[name.replace(new, earlier)] = tensors.pop(name)

        change_weights(vae / "diffusion_pytorch_model.safetensors", rename)
        names = load_file(vae / "diffusion_pytorch_model.safetensors")
        assert "decoder.mid_block.attentions.0.proj_attn.weight" in names
        found, expected = Vae.from_folder(vae, CPU), Vae.from_folder(TINY / "vae", CPU)
        latents = expected.encode(self.image)
        assert torch.equal(found.encode(self.image), latents)
        assert torch.equal(found.decode(latents[None]), expected.decode(latents[None]))

    def test_shift(self, vae):
        change_json(vae / "config.json", shift_factor=0.5, scaling_factor=2.0)
        plain, shifted = Vae.from_folder(TINY / "vae", CPU), Vae.from_folder(vae, CPU)
        latents = plain.encode(self.image)
        torch.testing.assert_close(shifted.encode(self.image), (latents / 0.13025 - 0.5) * 2)
        torch.testing.assert_close(
            shifted.decode(shifted.encode(self.image)[None]), plain.decode(latents[None])
        )

    def test_half_precision_file_runs_in_float32(self, vae):
        def halve(tensors):
            tensors |= {name: tensor.half() for name, tensor in tensors.items()}

        change_weights(vae / "diffusion_pytorch_model.safetensors", halve)
        assert Vae.from_folder(vae, CPU).encode(self.image).dtype == torch.float32

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"_class_name": "VQModel"}, "VQModel is not an AutoencoderKL"),
            ({"latent_channels": 16}, "4 latent channels"),
            ({"block_out_channels": [8, 8, 16]}, "an eighth of the image's size"),
            ({"block_out_channels": [8, 8, 16, 1 << 40]}, "not OmniGen's VAE"),
            ({"block_out_channels": "8888"}, "not OmniGen's VAE"),
            ({"layers_per_block": 10**9}, "not OmniGen's VAE"),
            ({"in_channels": 4}, "not OmniGen's VAE"),
            ({"out_channels": 1}, "not OmniGen's VAE"),
            ({"norm_num_groups": 0}, "describes no VAE"),
            ({"act_fn": "rm -rf"}, "describes no VAE"),
            ({"down_block_types": ["NoSuchBlock"] * 4}, "describes no VAE"),
            ({"block_out_channels": [8, 8, 16, 32]}, "misshapen "),
            ({"layers_per_block": 2}, "missing "),
            ({"scaling_factor": 0}, "scaling_factor must be a positive number, got 0"),
            ({"scaling_factor": "x"}, "scaling_factor must be a positive number, got 'x'"),
            ({"scaling_factor": float("nan")}, "scaling_factor must be a positive number"),
            ({"shift_factor": float("inf")}, "shift_factor must be a number, got inf"),
            ({"shift_factor": [1]}, "shift_factor must be a number, got [1]"),
        ],
    )
    def test_lying_config(self, vae, changes, part):
        change_json(vae / "config.json", **changes)
        refused(lambda: Vae.from_folder(vae, CPU), part)

    def test_missing_config(self, vae):
        (vae / "config.json").unlink()
        refused(lambda: Vae.from_folder(vae, CPU), "config.json does not exist")

    def test_missing_weights(self, vae):
        (vae / "diffusion_pytorch_model.safetensors").unlink()
        refused(lambda: Vae.from_folder(vae, CPU), "has no diffusion_pytorch_model.safetensors")

    def test_pickle(self, vae):
        weights = vae / "diffusion_pytorch_model.safetensors"
        weights.rename(vae / "diffusion_pytorch_model.bin")
        refused(lambda: Vae.from_folder(vae, CPU), "has diffusion_pytorch_model.bin but no")

    def test_truncated(self, vae):
        weights = vae / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        refused(lambda: Vae.from_folder(vae, CPU), "not a readable safetensors file")

    def test_missing_and_unexpected_tensors(self, vae):
        def damage(tensors):
            tensors["decoder.bias"] = tensors.pop("decoder.conv_in.bias")

        change_weights(vae / "diffusion_pytorch_model.safetensors", damage)
        refused(
            lambda: Vae.from_folder(vae, CPU),
            "missing decoder.conv_in.bias",
            "unexpected decoder.bias",
        )


class TestResolve:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Answers from a list of folders, or raises; remembers what it was asked."""
        asked: list[tuple[str, dict]] = []

        def answer_with(answer):
            def snapshot_download(name, **arguments):
                asked.append((name, arguments))
                if isinstance(answer, Exception):
                    raise answer
                return str(answer)

            monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
            return asked

        return answer_with

    def test_local_folder(self, hub):
        asked = hub(AssertionError())
        assert resolve(TINY) == str(TINY)
        assert asked == []

    def test_hub_id(self, hub):
        asked = hub(TINY)
        pipe = OmniGenPipeline.from_pretrained(
            "owner/name", device="cpu", revision="v1", cache_dir="/cache", token="secret"
        )
        assert pipe.config.hidden_size == 192
        ((name, arguments),) = asked
        assert name == "owner/name"
        patterns = arguments.pop("allow_patterns")
        assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in patterns)
        assert arguments == {
            "revision": "v1",
            "cache_dir": "/cache",
            "token": "secret",
            "local_files_only": False,
        }

    def test_vae_from_the_hub(self, hub, folder):
        asked = hub(TINY / "vae")
        shutil.rmtree(folder / "vae")
        OmniGenPipeline.from_pretrained(folder, device="cpu", revision="v1")
        ((name, arguments),) = asked
        assert name == "stabilityai/sdxl-vae"
        assert arguments["revision"] is None  # a commit of the model is none of the VAE

    def test_vae_path(self, hub, folder, tmp_path):
        asked = hub(AssertionError())
        (folder / "vae").rename(tmp_path / "other")
        pipe = OmniGenPipeline.from_pretrained(folder, tmp_path / "other", device="cpu")
        assert pipe.vae.device == CPU
        assert asked == []

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("Name resolution failed\nand more\n  lines"),
            OSError("offline"),
            ValueError(""),
        ],
    )
    def test_failing_network_is_one_line(self, hub, error):
        hub(error)
        first = str(error).split("\n")[0] or "ValueError"
        refused(
            lambda: resolve("owner/name"),
            f"owner/name is not a local folder, and fetching it from the hub failed: {first}",
        )

    @pytest.mark.parametrize(
        "name", ["/no/such/folder", "./no", "../no/such", "~/no", "no", "a/b/c", "a\\b/c"]
    )
    def test_absent_path_is_not_sent_to_the_hub(self, hub, name):
        asked = hub(AssertionError())
        refused(lambda: resolve(name), f"{name} does not exist", "hub id (owner/name)")
        assert asked == []

    def test_empty_name(self, hub):
        hub(AssertionError())
        refused(lambda: resolve(""), "an empty path does not exist")

    def test_file(self):
        refused(
            lambda: resolve(TINY / "model.safetensors"), "is a file; give the folder that holds"
        )
