"""The arithmetic of LoRAs and their bounds, without a pipeline; names and values in errors."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from golden_cases import TINY
from safetensors.torch import save_file

from omnigen_fast import CheckpointError, RequestError
from omnigen_fast.precision import Precision
from omnigen_fast.weights import files, lora, lora_files, lora_scale, lora_sources
from omnigen_fast.weights.checkpoint import Checkpoint
from omnigen_fast.weights.lora import MAX_SCALE, Adapter, Loras, LowRank, merged

CHECKPOINT = Checkpoint.open(TINY)
ROWS = 192  # of o_proj, square
HOST = torch.device("cpu")
FLOAT32 = Precision.of("float32")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded(*weights: float) -> Loras:
    """Adapters "0", "1", ... with these weights."""
    loras = Loras()
    for number, weight in enumerate(weights):
        loras = loras.with_adapter(str(number), Adapter(()), weight)
    return loras


def adapter(down: float, up: float, rank: int = 2, **more: torch.Tensor) -> Adapter:
    """All values of A are `down`, all of B `up`; without an alpha the scale is 1."""
    module = "layers.0.self_attn.to_out.0"
    tensors = {
        f"{module}.lora_A.weight": torch.full((rank, ROWS), down),
        f"{module}.lora_B.weight": torch.full((ROWS, rank), up),
    }
    return lora_files.read_adapter(
        {**tensors, **{f"{module}.{name}": value for name, value in more.items()}}, CHECKPOINT
    )


@pytest.mark.parametrize(
    "value", [CHECKPOINT, Adapter(()), loaded(1.0), loaded(1.0).loaded[0]], ids=type
)
def test_what_was_read_does_not_change(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


class TestStrengths:
    @pytest.mark.parametrize(("weight", "scale"), [(0.75, 0.5), (-3, 0.25), (40, 7), (0.1, 30)])
    def test_fused_is_weight_times_scale(self, weight, scale):
        (one,) = loaded(weight).with_fused(scale, None).loaded
        assert one.fused == weight * scale
        ((_, strength),) = loaded(weight).with_fused(scale, ["0"]).applied()
        assert strength == weight * scale

    def test_the_largest_product_that_can_be_fused(self):
        (one,) = loaded(MAX_SCALE / 4).with_fused(4, None).loaded
        assert one.fused == MAX_SCALE
        for weight in (MAX_SCALE / 4, -MAX_SCALE / 4):
            with pytest.raises(RequestError, match=r"above 1e\+09"):
                loaded(weight).with_fused(math.nextafter(4, 5), None)

    def test_those_that_are_fused_are_passed_over_unless_named(self):
        loras = loaded(2, 3).with_fused(0.5, ["0"]).with_fused(0.25, None)
        assert [one.fused for one in loras.loaded] == [1, 0.75]
        with pytest.raises(RequestError, match="'0' is fused already"):
            loras.with_fused(1, ["0"])
        with pytest.raises(RequestError, match="no active adapter to fuse"):
            loras.with_fused(1, None)

    def test_what_changes_is_what_acts_otherwise(self):
        update = LowRank("layers.1.o_proj", 0, values(1, ROWS), values(ROWS, 1), 1.0)
        one = Loras().with_adapter("a", Adapter((update,)), 0.5)
        assert Loras().changed(one) == one.changed(Loras()) == {"layers.1.o_proj"}
        assert one.changed(one.with_active({"a": 0.25})) == {"layers.1.o_proj"}
        assert one.changed(one.with_active({"a": 0.5})) == set()
        assert one.changed(one.with_fused(1, None)) == set()

    @pytest.mark.parametrize(("scale", "strength"), [(0.75, 1.25), (30.0, 0.125), (-2.0, 8.0)])
    def test_merged_adds_scale_times_strength(self, scale, strength):
        down, up, start = values(3, ROWS), values(64, 3, seed=1), 17
        one = Adapter((LowRank("layers.0.qkv_proj", start, down, up, scale),))
        names = ["layers.0.qkv_proj", "layers.0.o_proj"]
        plain = CHECKPOINT.read(torch.float32, HOST, names)
        found = dict(merged(CHECKPOINT, [(one, strength)], FLOAT32, HOST, names))
        expected = plain["layers.0.qkv_proj"].clone()
        expected[start : start + 64] += scale * strength * (up @ down)
        torch.testing.assert_close(found["layers.0.qkv_proj"], expected)
        assert torch.equal(found["layers.0.o_proj"], plain["layers.0.o_proj"])


class TestScale:
    @pytest.mark.parametrize(
        ("config", "alpha", "scale"),
        [
            (None, None, 1),
            (None, 12, 3),
            ({}, None, 1),
            ({"lora_alpha": 6}, None, 1.5),
            ({"lora_alpha": 6, "use_rslora": True}, None, 3),
            ({"lora_alpha": 6, "alpha_pattern": {"o_proj": 10, "a.o_proj": 20}}, None, 2.5),
            ({"lora_alpha": 6, "alpha_pattern": {"proj": 10}}, None, 1.5),
        ],
        ids=str,
    )
    def test_of_rank_four(self, config, alpha, scale):
        assert lora_scale.scale_of(config, "a.o_proj", 4, alpha) == scale

    @pytest.mark.parametrize("alpha", [MAX_SCALE, -MAX_SCALE])
    def test_the_largest_alpha(self, alpha):
        assert lora_scale.scale_of({"lora_alpha": alpha}, "o_proj", 1, None) == alpha
        with pytest.raises(CheckpointError, match="lora_alpha must be a number up to"):
            lora_scale.scale_of({"lora_alpha": 1.001 * alpha}, "o_proj", 1, None)

    def test_the_most_patterns(self):
        names = {f"layers.{number}": 1 for number in range(1024)}
        lora_scale.check_config({"alpha_pattern": names}, "here")
        with pytest.raises(CheckpointError, match="the 1025 entries"):
            lora_scale.check_config({"alpha_pattern": {**names, "more": 1}}, "here")
        # together they may take twice the ways of the slowest one
        slow = {"a.*.*l?": 1, "b.*.*l?": 1}
        lora_scale.check_config({"alpha_pattern": slow}, "here")
        with pytest.raises(CheckpointError, match="the 3 entries"):
            lora_scale.check_config({"alpha_pattern": {**slow, "c": 1}}, "here")

    def test_the_longest_pattern(self):
        assert lora_scale._ways("x" * 256) == 1
        with pytest.raises(CheckpointError, match="is not supported"):
            lora_scale._ways("x" * 257)

    def test_a_long_value_is_cut(self):
        for kind, text in (("X" * 70, "X" * 70), ("X" * 71, "X" * 67 + "...")):
            with pytest.raises(CheckpointError) as caught:
                lora_scale.check_config({"peft_type": kind}, "here")
            assert str(caught.value) == f"here has a {text} adapter; only LoRA is supported"


class TestBounds:
    def test_the_largest_alpha_of_a_file(self):
        (update,) = adapter(1e-3, 1e-3, 1, alpha=torch.tensor(MAX_SCALE)).updates
        assert update.scale == MAX_SCALE
        with pytest.raises(CheckpointError, match=r"\.alpha must be a number up to 1e\+09"):
            adapter(1e-3, 1e-3, 1, alpha=torch.tensor(1.1 * MAX_SCALE))

    @pytest.mark.parametrize(
        ("alpha", "said"),
        [
            (torch.ones(2), "[2]"),
            (torch.ones(2, 1), "[2, 1]"),
            (torch.tensor(torch.nan), "nan"),
            (torch.tensor(True), "nan"),
            (torch.tensor(1j), "nan"),
        ],
        ids=str,
    )
    def test_an_alpha_is_one_number(self, alpha, said):
        with pytest.raises(CheckpointError) as caught:
            adapter(1.0, 1.0, alpha=alpha)
        assert str(caught.value).endswith(f"got {said}")

    @pytest.mark.parametrize("alpha", [1.0, 2e-3, 200.0])
    def test_the_largest_update(self, alpha):
        """Of rank 2, so the scale is half of alpha: a value changes by up to A * B * alpha."""
        (update,) = adapter(1e9, 0.9e11 / alpha, alpha=torch.tensor(alpha)).updates
        assert update.scale == pytest.approx(alpha / 2)
        with pytest.raises(CheckpointError, match=r"changes weights by up to 1\.1e\+20, which"):
            adapter(1e9, 1.1e11 / alpha, alpha=torch.tensor(alpha))

    def test_the_largest_rank(self):
        adapter(1e-3, 1e-3, 1024)
        with pytest.raises(CheckpointError, match="rank 1025, more than its 192 x 192 weights"):
            adapter(1e-3, 1e-3, 1025)

    def test_the_longest_name(self):
        suffix = ".lora_A.weight"
        name = "x" * (256 - len(suffix))
        assert lora_files._split(name + suffix) == (name, "down")
        assert lora_files._split("x" + name + suffix) == ("", "")

    def test_the_most_tensors(self):
        lora_sources._check_count("here", 1 << 16)
        with pytest.raises(CheckpointError, match="here has more than 65536 tensors"):
            lora_sources._check_count("here", (1 << 16) + 1)

    def test_tensors_of_all_files_count(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lora_sources, "_MAX_TENSORS", 5)
        paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
        for letter, path in zip("ab", paths):
            save_file({f"{letter}{i}": torch.zeros(1) for i in range(3)}, path)
        assert len(lora_sources._from_files(paths[:1], None).tensors) == 3
        with pytest.raises(CheckpointError, match=r"a\.safetensors has more than 5 tensors"):
            lora_sources._from_files(paths, None)

    def test_the_largest_config(self, tmp_path):
        path = tmp_path / "adapter_config.json"
        path.write_bytes(b" " * (4 << 20))
        lora_sources._check_size(str(path))
        path.write_bytes(b" " * ((4 << 20) + 1))
        with pytest.raises(CheckpointError, match="4194305 bytes; at most 4194304 are read"):
            lora_sources._check_size(str(path))

    @pytest.mark.parametrize(("size", "fits"), [(32 << 20, True), ((32 << 20) + 1, False)])
    def test_the_largest_header(self, tmp_path, size, fits):
        path = tmp_path / "lora.safetensors"
        with open(path, "wb") as file:
            file.write(size.to_bytes(8, "little"))
            file.truncate(size + 100)
        if fits:
            return files._check_header(str(path))
        with pytest.raises(CheckpointError, match="at most 33554432 are read"):
            files._check_header(str(path))


class TestErrors:
    @pytest.mark.parametrize(
        "tensor",
        [
            torch.empty(2, ROWS, device="meta"),
            torch.nested.nested_tensor([torch.zeros(ROWS)] * 2, layout=torch.jagged),
        ],
        ids=["meta", "nested"],
    )
    def test_only_plain_values_are_read(self, tensor):
        with pytest.raises(RequestError, match="'a' holds no plain values; give dense tensors"):
            lora_files.read_adapter({"a": tensor}, CHECKPOINT)

    @pytest.mark.parametrize("source", ["owner/name", "folder"])
    def test_a_repository_without_a_lora_may_have_one_of_another_name(
        self, tmp_path, monkeypatch, source
    ):
        monkeypatch.setattr(lora_sources, "resolve", lambda *_, **__: str(tmp_path))
        folder = str(tmp_path) if source == "folder" else source
        with pytest.raises(CheckpointError, match="has no LoRA: adapter_config") as caught:
            lora_files.read_adapter(folder, CHECKPOINT)
        assert ("weight_name=" in str(caught.value)) == (source != "folder")

    @pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, ", ...")])
    def test_the_first_three_adapters_are_named(self, count, more):
        with pytest.raises(RequestError) as caught:
            loaded(*[1.0] * count).without(["x"])
        names = ", ".join(repr(str(number)) for number in range(min(count, 3)))
        assert str(caught.value) == f"no adapter 'x' is loaded; loaded: {names}{more}"

    def test_long_names_are_cut(self):
        assert lora._named("x" * 58) == f"'{'x' * 58}'"
        assert lora._named("x" * 59) == f"'{'x' * 56}..."
        assert lora._named("short") == "'short'"

    def test_lists(self):
        assert lora_sources.some(["a", "b", "c"]) == "a, b, c"
        assert lora_sources.some(["a"]) == "a"
        assert lora_sources.some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"

    def test_shapes(self):
        assert lora_sources.shape_text((2, 3)) == "[2, 3]"
        assert lora_sources.shape_text((1,) * 8) == str([1] * 8)
        assert lora_sources.shape_text((1,) * 9) == ", ".join("1" * 8)

    def test_values(self):
        assert lora_sources.shown("a\nb\u00e9") == r"'a\nb\xe9'"
        assert lora_sources.shown("\u00e9") == "'\u00e9'"
        assert lora_sources.shown(["\u00e9"]) == "['\u00e9']"
        assert lora_sources.shown("x" * 70) == f"'{'x' * 70}'"
        assert lora_sources.shown(b"x" * 77) == f"b'{'x' * 77}'"
        assert lora_sources.shown(b"x" * 78) == f"b'{'x' * 31}...{'x' * 32}'"
        assert lora_sources.shown("a" * 40 + "b" * 40) == f"'{'a' * 33}...{'b' * 33}'"
        assert (
            lora_sources.shown(["a" * 77]) == f"{['a' * 77]}"[:33] + "..." + f"{['a' * 77]}"[-33:]
        )
        assert lora_sources.shown_path("") == "an empty path"
        assert lora_sources.shown_path("here") == "here"
        assert lora_sources.shown_path("x" * 100) == "x" * 100
        assert lora_sources.shown_path("x" * 101) == "x" * 48 + "..." + "x" * 48

    @pytest.mark.parametrize(
        ("count", "more"), [(3, ""), (4, " and 1 more"), (5, " and 2 more"), (7, " and 4 more")]
    )
    def test_the_first_three_unknown_tensors_are_named(self, count, more):
        names = [f"unet.{letter}.lora_A.weight" for letter in "abcdefg"[:count]]
        with pytest.raises(CheckpointError) as caught:
            lora_files.read_adapter({name: torch.zeros(2, 2) for name in names}, CHECKPOINT)
        assert str(caught.value) == (
            "the state dict has tensors that belong to no OmniGen layer: unet.a, unet.b, unet.c"
            + more
        )

    def test_types(self):
        module = "layers.0.self_attn.to_out.0"
        tensors = {f"{module}.lora_A.weight": torch.zeros(2, ROWS, dtype=torch.int8)}
        tensors[f"{module}.lora_B.weight"] = torch.zeros(ROWS, 2)
        with pytest.raises(CheckpointError) as caught:
            lora_files.read_adapter(tensors, CHECKPOINT)
        assert str(caught.value) == (
            f"the state dict: {module}.lora_A.weight holds int8, not floating-point weights"
        )

    def test_places(self):
        """Whose shape does not fit, by its own name."""
        tensors = {
            "layers.0.self_attn.to_q.lora_A.weight": torch.zeros(2, ROWS),
            "layers.0.self_attn.to_q.lora_B.weight": torch.zeros(ROWS + 1, 2),
        }
        with pytest.raises(CheckpointError) as caught:
            lora_files.read_adapter(tensors, CHECKPOINT)
        assert str(caught.value) == (
            "the state dict: layers.0.self_attn.to_q has A [2, 192] and B [193, 2], whose product "
            "does not match the model's 192 x 192; it is for another model"
        )
