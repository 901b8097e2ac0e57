"""Adapters give the weights that PEFT gives, add up, and leave without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from omnigen_fast import CheckpointError, RequestError
from omnigen_fast.weights import lora_scale
from omnigen_fast.weights.checkpoint import Checkpoint

LORA = GOLDEN / "lora"
CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "progress": False}
OUR_NAMES = {
    "qkv_proj": "layers.{}.qkv_proj",
    "o_proj": "layers.{}.o_proj",
    "gate_up_proj": "layers.{}.gate_up_proj",
    "down_proj": "layers.{}.down_proj",
}


@pytest.fixture
def fresh(load_pipe):
    """A pipeline of the test's own."""
    return load_pipe(device="cpu")


def weights(pipe) -> dict[str, torch.Tensor]:
    """Copies of all parameters by our names."""
    names = [name for name in pipe.engine.checkpoint.sources if name != "pos_embed"]
    return {name: pipe.model.parameter(name).detach().clone() for name in names}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def changed(pipe, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, now in weights(pipe).items() if not torch.equal(now, before[name])}


def latent(pipe, **arguments) -> torch.Tensor:
    return pipe("A cat.", **CALL, output_type="latent", **arguments)


def lose_the_disk(monkeypatch, after: int) -> None:
    """The checkpoint can be read so many times more, until `monkeypatch.undo`."""
    left, read = iter(range(after)), Checkpoint.read

    def fail(*arguments):
        if next(left, None) is None:
            raise CheckpointError("the disk is gone")
        return read(*arguments)

    monkeypatch.setattr(Checkpoint, "read", fail)


class Original(nn.Module):
    """The modules of the original that a LoRA may change, under their names, with their weights."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.llm = nn.Module()
        self.llm.layers = nn.ModuleList(nn.Module() for _ in range(3))
        for i, layer in enumerate(self.llm.layers):
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            for part, name in (
                ("self_attn", "qkv_proj"),
                ("self_attn", "o_proj"),
                ("mlp", "gate_up_proj"),
                ("mlp", "down_proj"),
            ):
                weight = values[OUR_NAMES[name].format(i)]
                linear = nn.Linear(*weight.shape[::-1], bias=False)
                linear.weight.data = weight.float()
                setattr(getattr(layer, part), name, linear)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(4, 192, 2, stride=2)
        self.x_embedder.proj.weight.data = values["noise_proj.weight"].float()

    def merged(self) -> dict[str, torch.Tensor]:
        found = {"noise_proj.weight": self.x_embedder.proj.weight.detach()}
        for i, layer in enumerate(self.llm.layers):
            for part in (layer.self_attn, layer.mlp):
                for name, linear in part.named_children():
                    found[OUR_NAMES[name].format(i)] = linear.weight.detach()
        return found


def make_adapter(pipe, folder: Path, seed: int = 0, **config) -> dict[str, torch.Tensor]:
    """Has PEFT write a random adapter; returns the weights that PEFT merges it to, in float32."""
    torch.manual_seed(seed)
    base = Original({name: value.clone() for name, value in weights(pipe).items()})
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(OUR_NAMES), **config}
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return model.merge_and_unload().merged()


CONFIGS = [
    pytest.param({}, id="plain"),
    pytest.param({"use_rslora": True}, id="rank-stabilised"),
    pytest.param({"r": 1, "lora_alpha": 0.5}, id="rank-1"),
    pytest.param(
        {
            "alpha_pattern": {"o_proj": 3, "layers.0.self_attn.qkv_proj": 40},
            "rank_pattern": {"down_proj": 2},
        },
        id="patterns",
    ),
    pytest.param(
        {"alpha_pattern": {r"layers\.\d+\.self_attn\.o_proj|0.mlp.down_proj$": 5}},
        id="number",
    ),
    *(
        pytest.param({"alpha_pattern": {pattern: 5}}, id=pattern)
        for pattern in (
            r".*\.o_proj",
            r"^llm.layers\.[01]\.mlp.*proj",
            r"layers\.(0|2)\.(?:self_attn|mlp)\.\w+_proj",
            r"layers\.\d{1,2}.*down_proj$",
        )
    ),
    pytest.param({"target_modules": "all-linear", "lora_bias": False}, id="all-linear"),
    pytest.param({"target_modules": ["x_embedder.proj"]}, id="convolution"),
    pytest.param(
        {"target_modules": ["qkv_proj"], "layers_to_transform": [1]},
        id="one-layer",
    ),
]


class TestPeftIsTheOracle:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_float32(self, fresh, tmp_path, config):
        before = weights(fresh)
        expected = make_adapter(fresh, tmp_path, **config)
        fresh.load_lora_weights(tmp_path)
        touched = changed(fresh, before)
        assert touched == {n for n in expected if not torch.equal(expected[n], before[n])}
        assert touched
        for name in touched:
            found = fresh.model.parameter(name)
            delta = (expected[name] - before[name]).norm()
            assert (found - expected[name]).norm() <= 1e-6 * delta + 1e-7 * before[name].norm()

    def test_bfloat16_is_rounded_once(self, load_pipe, tmp_path):
        pipe = load_pipe(dtype="bfloat16", device="cpu")
        exact = make_adapter(pipe, tmp_path)
        pipe.load_lora_weights(tmp_path)
        for name, expected in exact.items():
            found = pipe.model.parameter(name)
            assert found.dtype == torch.bfloat16
            # half of the distance between neighbours
            limit = 1.001 * 2.0 ** (expected.abs().log2().floor() - 8)
            assert ((found.float() - expected).abs() <= limit).all()

    def test_two_add_up(self, fresh, tmp_path):
        before = weights(fresh)
        one = make_adapter(fresh, tmp_path / "one", seed=1)
        two = make_adapter(fresh, tmp_path / "two", seed=2, r=2, use_rslora=True)
        fresh.load_lora_weights(tmp_path / "one")
        fresh.load_lora_weights(tmp_path / "two")
        for name in one:
            expected = one[name] + two[name] - before[name]
            torch.testing.assert_close(fresh.model.parameter(name).data, expected)


class TestComingAndGoing:
    def test_unloading_leaves_no_trace(self, fresh):
        before, image = weights(fresh), fresh("A cat.", **CALL)[0].tobytes()
        fresh.load_lora_weights(LORA)
        assert changed(fresh, before) == {
            f"layers.{i}.{name}" for i in range(3) for name in ("qkv_proj", "o_proj")
        }
        assert fresh("A cat.", **CALL)[0].tobytes() != image
        fresh.unload_lora_weights()
        assert same(weights(fresh), before)
        assert fresh("A cat.", **CALL)[0].tobytes() == image

    def test_the_originals_name(self, fresh, load_pipe):
        other = load_pipe(device="cpu")
        fresh.merge_lora(LORA)
        other.load_lora_weights(LORA)
        assert same(weights(fresh), weights(other))
        fresh.unload_lora_weights(str(LORA))  # called by its path
        assert not same(weights(fresh), weights(other))

    @pytest.mark.parametrize("first", ["one", "two"])
    def test_unloading_by_name_in_any_order(self, fresh, tmp_path, first):
        second = {"one": "two", "two": "one"}[first]
        before = weights(fresh)
        make_adapter(fresh, tmp_path / "one", seed=1)
        make_adapter(fresh, tmp_path / "two", seed=2, target_modules=["o_proj", "x_embedder.proj"])
        fresh.load_lora_weights(tmp_path / second, adapter_name=second)
        alone = weights(fresh)
        fresh.unload_lora_weights()
        for name in ("one", "two"):
            fresh.load_lora_weights(tmp_path / name, adapter_name=name)
        fresh.unload_lora_weights(first)
        assert same(weights(fresh), alone)
        fresh.unload_lora_weights(second)
        assert same(weights(fresh), before)

    def test_half_the_weight_is_half_the_alpha(self, fresh, load_pipe, tmp_path):
        other, full = load_pipe(device="cpu"), load_pipe(device="cpu")
        make_adapter(fresh, tmp_path)
        fresh.load_lora_weights(tmp_path, weight=0.5)
        full.load_lora_weights(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 4}))
        other.load_lora_weights(tmp_path)
        assert same(weights(fresh), weights(other))
        assert not same(weights(fresh), weights(full))

    def test_same_name_twice(self, fresh):
        fresh.load_lora_weights(LORA, adapter_name="style")
        once = weights(fresh)
        with pytest.raises(RequestError, match="'style' is loaded already; unload it first"):
            fresh.load_lora_weights(LORA, adapter_name="style")
        assert same(weights(fresh), once)
        fresh.load_lora_weights(LORA, adapter_name="again")
        assert not same(weights(fresh), once)

    def test_unloading_what_is_not_there(self, fresh):
        fresh.load_lora_weights(LORA, adapter_name="style")
        with pytest.raises(RequestError, match="no adapter 'other' is loaded; loaded: 'style'"):
            fresh.unload_lora_weights("other")
        fresh.unload_lora_weights("style")
        with pytest.raises(RequestError, match="loaded: none"):
            fresh.unload_lora_weights("style")
        before = weights(fresh)
        fresh.unload_lora_weights()
        assert same(weights(fresh), before)

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
    def test_a_weight_that_is_no_number(self, fresh, weight):
        before = weights(fresh)
        with pytest.raises(RequestError, match="weight must be a finite number"):
            fresh.load_lora_weights(LORA, weight=weight)
        assert same(weights(fresh), before)

    def test_conditions_kept_before_it_are_not_used_after_it(self, fresh, load_pipe):
        plain = latent(fresh)
        fresh.load_lora_weights(LORA)
        changed = latent(fresh)
        other = load_pipe(device="cpu")
        other.load_lora_weights(LORA)
        assert torch.equal(changed, latent(other))
        assert not torch.equal(changed, plain)
        fresh.unload_lora_weights()
        assert torch.equal(latent(fresh), plain)

    def test_another_dtype_keeps_it(self, fresh, load_pipe):
        fresh.load_lora_weights(LORA)
        before = weights(fresh)
        found = latent(fresh, dtype="bfloat16")
        other = load_pipe(dtype="bfloat16", device="cpu")
        plain = latent(other)
        other.load_lora_weights(LORA)
        assert same(weights(fresh), weights(other))
        assert torch.equal(found, latent(other))
        assert not torch.equal(found, plain)
        latent(fresh, dtype="float32")
        assert same(weights(fresh), before)

    def test_a_failure_in_the_middle_changes_nothing(self, fresh, monkeypatch):
        before, read = weights(fresh), Checkpoint.read
        reads = iter([True, True, True, False])

        def fail_once(*arguments):
            if not next(reads, True):
                raise MemoryError
            return read(*arguments)

        monkeypatch.setattr(Checkpoint, "read", fail_once)
        with pytest.raises(MemoryError):
            fresh.load_lora_weights(LORA)
        assert next(reads, None) is None  # it failed in the middle indeed
        assert same(weights(fresh), before)
        with pytest.raises(RequestError, match="loaded: none"):
            fresh.unload_lora_weights(str(LORA))

    def test_ctrl_c_after_the_last_weight_changes_nothing(self, fresh, monkeypatch):
        before, refresh, done = weights(fresh), fresh.engine.refresh, []

        def interrupted(parameters=()):
            refresh(parameters)
            done.append(weights(fresh))
            if len(done) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(fresh.engine, "refresh", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.load_lora_weights(LORA)
        assert not same(done[0], before)
        assert same(weights(fresh), before)
        assert not fresh.get_list_adapters()

    def test_unloading_that_fails_in_the_middle_is_made_good(self, fresh, monkeypatch):
        """No picture comes from a mixture: the next call sets the weights first, or fails too."""
        fresh.load_lora_weights(LORA, adapter_name="style")
        whole, image = weights(fresh), latent(fresh)
        lose_the_disk(monkeypatch, after=2)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            fresh.unload_lora_weights()
        assert not same(weights(fresh), whole)  # it failed in the middle indeed
        with pytest.raises(CheckpointError, match="the disk is gone"):
            latent(fresh)
        monkeypatch.undo()
        assert torch.equal(latent(fresh), image)
        assert same(weights(fresh), whole)
        fresh.unload_lora_weights("style")

    def test_another_dtype_that_fails_in_the_middle_is_made_good(self, fresh, monkeypatch):
        fresh.load_lora_weights(LORA)
        expected = latent(fresh, dtype="bfloat16")
        latent(fresh, dtype="float32")
        lose_the_disk(monkeypatch, after=2)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            latent(fresh, dtype="bfloat16")
        monkeypatch.undo()
        assert torch.equal(latent(fresh, dtype="bfloat16"), expected)


ORIGINAL = load_file(LORA / "adapter_model.safetensors")
CONFIG = json.loads((LORA / "adapter_config.json").read_text())
O_PROJ = "base_model.model.llm.layers.0.self_attn.o_proj"
A, B = f"{O_PROJ}.lora_A.weight", f"{O_PROJ}.lora_B.weight"


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, _weights(folder))
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def diffusers_names(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The same adapter as one of diffusers' model, whose q, k and v are apart."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("base_model.model.llm.", prefix)
        name = name.replace("self_attn.o_proj", "self_attn.to_out.0")
        if "qkv_proj" in name:
            parts = tensor.chunk(3) if "lora_B" in name else [tensor] * 3
            for letter, part in zip("qkv", parts):
                renamed[name.replace("qkv_proj", f"to_{letter}")] = part
        else:
            renamed[name] = tensor
    return renamed


class TestNames:
    @pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
    def test_diffusers(self, fresh, load_pipe, tmp_path, prefix):
        names = diffusers_names(ORIGINAL, prefix)
        assert f"{prefix}layers.0.self_attn.to_k.lora_B.weight" in names
        fresh.load_lora_weights(write_adapter(tmp_path, names))
        other = load_pipe(device="cpu")
        other.load_lora_weights(LORA)
        for name, expected in weights(other).items():
            torch.testing.assert_close(
                fresh.model.parameter(name).data, expected, rtol=1e-6, atol=1e-7
            )

    def test_adapter_name_in_the_keys(self, fresh, load_pipe, tmp_path):
        names = {key.replace(".weight", ".default.weight"): v for key, v in ORIGINAL.items()}
        fresh.load_lora_weights(write_adapter(tmp_path, names))
        other = load_pipe(device="cpu")
        other.load_lora_weights(LORA)
        assert same(weights(fresh), weights(other))

    def test_bfloat16_and_shards(self, fresh, load_pipe, tmp_path):
        halved = {name: tensor.bfloat16() for name, tensor in ORIGINAL.items()}
        fresh.load_lora_weights(write_adapter(tmp_path / "whole", halved))
        other = load_pipe(device="cpu")
        folder = write_adapter(tmp_path / "parts", {})
        _weights(folder).unlink()
        names = sorted(halved)
        for file, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
            save_file({name: halved[name] for name in part}, folder / file)
        index = {
            "weight_map": {n: "ab"[names.index(n) >= 5] + ".safetensors" for n in names},
        }
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
        other.load_lora_weights(folder)
        assert same(weights(fresh), weights(other))


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in ORIGINAL.items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "config", "parts"),
    [
        pytest.param({A: torch.zeros(4, 191)}, {}, ["o_proj has A [4, 191]", "192 x 192"], id="A"),
        pytest.param({B: torch.zeros(191, 4)}, {}, ["B [191, 4]", "192 x 192"], id="B"),
        pytest.param({B: torch.zeros(192, 3)}, {}, ["A [4, 192] and B [192, 3]"], id="ranks"),
        pytest.param(
            {A: torch.zeros(0, 192), B: torch.zeros(192, 0)}, {}, ["A [0, 192]"], id="rank-0"
        ),
        pytest.param({A: torch.zeros(192)}, {}, ["belong to no", "o_proj"], id="vector"),
        pytest.param({A: torch.tensor(1.0)}, {}, ["belong to no", "o_proj"], id="number"),
        pytest.param(
            {A: torch.zeros(4, 192, dtype=torch.int32)}, {}, [f"{A} holds I32"], id="integers"
        ),
        pytest.param(
            {f"{O_PROJ}.lora_A.other.weight": torch.zeros(4, 192)},
            {},
            ["belong to no OmniGen layer", "lora_A"],
            id="two-in-one",
        ),
        pytest.param(
            {"base_model.model.unet.conv.lora_A.weight": torch.zeros(4, 4)},
            {},
            ["belong to no OmniGen layer: unet.conv"],
            id="other-module",
        ),
        pytest.param(
            {
                "base_model.model.llm.norm.lora_A.weight": torch.zeros(1, 1),
                "base_model.model.llm.norm.lora_B.weight": torch.zeros(192, 1),
            },
            {},
            ["belong to no OmniGen layer: llm.norm"],
            id="norm",
        ),
        pytest.param(
            {
                "base_model.model.llm.embed_tokens.lora_embedding_A": torch.zeros(4, 640),
                "base_model.model.llm.embed_tokens.lora_embedding_B": torch.zeros(192, 4),
            },
            {},
            ["belong to no OmniGen layer", "lora_embedding_A"],
            id="embedding",
        ),
        pytest.param(
            {f"{O_PROJ}.lora_magnitude_vector": torch.ones(192)},
            {},
            ["belong to no OmniGen layer", "magnitude"],
            id="dora-tensors",
        ),
        pytest.param({}, {"use_dora": True}, ["use_dora", "merge it first"], id="dora"),
        pytest.param({}, {"peft_type": "IA3"}, ["IA3 adapter; only LoRA"], id="ia3"),
        pytest.param({}, {"peft_type": ["LORA"]}, ["only LoRA"], id="odd-kind"),
        pytest.param({}, {"modules_to_save": ["norm"]}, ["modules_to_save"], id="whole-modules"),
        pytest.param({}, {"layer_replication": [[0, 3]]}, ["layer_replication"], id="replication"),
        pytest.param(
            {}, {"lora_alpha": "8"}, ["lora_alpha must be a number up to 1e+09, got '8'"], id="text"
        ),
        pytest.param(
            {}, {"lora_alpha": float("nan")}, ["must be a number up to 1e+09, got nan"], id="nan"
        ),
        pytest.param({}, {"lora_alpha": 10**400}, ["must be a number"], id="huge"),
        pytest.param({}, {"alpha_pattern": {"(": 1}}, ["alpha_pattern"], id="pattern"),
        pytest.param({}, {"alpha_pattern": {"(.+)+!": 1}}, ["is not supported"], id="slow"),
        pytest.param({}, {"alpha_pattern": {"(l|l)" * 30: 1}}, ["not supported"], id="ways"),
        pytest.param({}, {"alpha_pattern": {"l?" * 30: 1}}, ["not supported"], id="optional"),
        pytest.param({}, {"alpha_pattern": {".*" * 9 + "!": 1}}, ["not supported"], id="runs"),
        pytest.param({}, {"alpha_pattern": {r"(l)\1": 1}}, ["not supported"], id="reference"),
        pytest.param({}, {"alpha_pattern": {"(?=l)l": 1}}, ["not supported"], id="look"),
        pytest.param({}, {"alpha_pattern": {"x" * 300: 1}}, ["not supported"], id="long"),
        pytest.param(
            {}, {"lora_alpha": 1e308}, ["must be a number up to 1e+09, got 1e+308"], id="overflow"
        ),
        pytest.param({A: torch.full((4, 192), torch.nan)}, {}, ["o_proj holds NaN"], id="nan-A"),
        pytest.param({B: torch.full((192, 4), torch.inf)}, {}, ["o_proj holds NaN"], id="inf-B"),
        pytest.param({}, {"alpha_pattern": [1]}, ["alpha_pattern"], id="pattern-list"),
        pytest.param({}, {"alpha_pattern": {"o_proj": None}}, ["got None"], id="pattern-value"),
    ],
)
def test_what_does_not_fit_is_refused(fresh, tmp_path, tensors, config, parts):
    before = weights(fresh)
    folder = write_adapter(tmp_path, {**ORIGINAL, **tensors}, **config)
    with pytest.raises(CheckpointError) as caught:
        fresh.load_lora_weights(folder)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value)
    assert same(weights(fresh), before)
    fresh.load_lora_weights(LORA, adapter_name=str(folder))  # the name is free


class TestFiles:
    def refused(self, pipe, folder: Path, part: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            pipe.load_lora_weights(folder)
        assert part in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_half_a_pair(self, fresh, tmp_path):
        self.refused(fresh, write_adapter(tmp_path, without(A)), "belong to no OmniGen layer: llm")

    def test_no_tensors(self, fresh, tmp_path):
        self.refused(fresh, write_adapter(tmp_path, {}), "no LoRA tensors at all")

    def test_no_folder(self, fresh, tmp_path):
        self.refused(fresh, tmp_path / "none", "is not a folder or a file that is there; give a")

    def test_no_config(self, fresh, tmp_path):
        folder = write_adapter(tmp_path, ORIGINAL)
        (folder / "adapter_config.json").unlink()
        self.refused(fresh, folder, "adapter_config.json does not exist")

    def test_malformed_config(self, fresh, tmp_path):
        folder = write_adapter(tmp_path, ORIGINAL)
        (folder / "adapter_config.json").write_text("{")
        self.refused(fresh, folder, "can't be read as JSON")

    def test_pickle(self, fresh, tmp_path):
        folder = write_adapter(tmp_path, ORIGINAL)
        _weights(folder).rename(folder / "adapter_model.bin")
        self.refused(fresh, folder, "has adapter_model.bin but no adapter_model.safetensors")

    def test_truncated(self, fresh, tmp_path):
        folder = write_adapter(tmp_path, ORIGINAL)
        _weights(folder).write_bytes(_weights(LORA).read_bytes()[:-1])
        self.refused(fresh, folder, "not a readable safetensors file")


@pytest.mark.parametrize(
    ("pattern", "ways"),
    [
        ("o_proj", 1),
        ("a|b|c", 1),  # alternatives without a group are tried once each
        ("(a|b|c)", 3),
        ("(a|b)(c|d)", 9),  # as if each group had all of them
        ("l?", 2),
        ("l?l?l?", 8),
        (".*", 64),
        (".*.+", 64**2),
        (r"\*\+\?\|\(", 1),  # escaped: characters
        ("[*+?|(]", 1),
    ],
)
def test_ways_of_a_pattern(pattern, ways):
    assert lora_scale._ways(pattern) == ways


def test_the_most_ways_of_a_pattern():
    assert lora_scale._ways(".*.*l?") == 1 << 13
    with pytest.raises(CheckpointError, match="not supported"):
        lora_scale._ways(".*.*l?l?")
