"""The CPU's operations in C++ against their float64 specification, and how they are built."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_earned, double, inside, poisoned, random
from omnigen_fast.kernels import cpu, ops, reference, widened
from test_attention import PARTS, STEPS, some_rows, step_arguments, turned, turning

from omnigen_fast.compilation import compiler

pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(
        cpu.why_not() is not None or compiler() is None,
        reason=f"the operations can't be built here: {cpu.why_not() or 'no C++ compiler'}",
    ),
]
BF16 = torch.bfloat16
ROWS = (0, 1, 63, 64, 65, 257)


# What CPUs with AVX512 have: instructions for bfloat16 or not, and which products are faster.
VARIANTS = {"bfloat16": (True, False), "float32": (True, True), "without": (False, True)}
# The last differs in its roundings only, which `test_roundings` compares.
PARAMETERS = ("bfloat16", "float32", pytest.param("without", marks=pytest.mark.slow))


def builder_of(variant: str, folder: Path | None, command=None) -> cpu.Builder:
    return cpu.Builder(compiler() if command is None else command, folder, *VARIANTS[variant])


@pytest.fixture(scope="module", autouse=True, params=PARAMETERS)
def built(request, tmp_path_factory):
    """Operations for some sizes of heads; their attention also where PyTorch's would run."""
    if VARIANTS[request.param][0] and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the CPU has no instructions for bfloat16")
    builder = builder_of(request.param, tmp_path_factory.mktemp("built"))
    with (
        mock.patch.object(cpu, "_libraries", {}),
        mock.patch.object(cpu, "_has_amx", lambda: False),
    ):
        for head_dim in (32, 64, 96, 128):
            cpu.prepare(builder, head_dim)
        yield builder


def check_step(*args):
    out, untouched = poisoned(*args[0].shape, dtype=BF16)
    before = [x.clone() for x in args[:5]]
    with mock.patch.object(reference, "attention_step", None):  # not the one that runs
        assert cpu.attention_step(*args, out=out) is out
        assert torch.equal(cpu.attention_step(*args), out)
    assert untouched()
    for x, was in zip(args, before):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)
    plain = reference.attention_step(*args)
    assert_earned(out, plain, reference.attention_step(*(doubled(x) for x in args)))


def doubled(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128))
@pytest.mark.parametrize("case", STEPS)
def test_step(case, head_dim):
    check_step(*step_arguments(*STEPS[case], 2, 2, head_dim, BF16))


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128))
@pytest.mark.parametrize("case", STEPS)
def test_step_with_queries_to_be_rotated(case, head_dim):
    """To the bit as with queries that `rope_` has rotated."""
    args = turning(step_arguments(*STEPS[case], 4, 2, head_dim, BF16))
    check_step(*args)
    found = cpu.attention_step(*args)
    assert torch.equal(found, cpu.attention_step(*turned(args, cpu.rope_)))


@pytest.mark.parametrize("head_dim", (64, 96))
def test_step_of_some_rows(head_dim):
    check_step(*some_rows(step_arguments(*STEPS["mixed"], 4, 2, head_dim, BF16), PARTS))


@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 1), (4, 2), (3, 3)))
def test_step_grouped_heads(heads, kv_heads):
    check_step(*step_arguments([130, 64], [(0, 129), (7, 64)], heads, kv_heads, 96, BF16))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 70)), min_size=1, max_size=4))
def test_step_any_lengths(groups):
    lengths = [rows for rows, _ in groups]
    cached = [(7 * place, length) for place, (_, length) in enumerate(groups)]
    check_step(*step_arguments(lengths, cached, 2, 1, 64, BF16))


def test_step_more_keys_than_a_chunk_and_large_scores():
    """The running maximum rises and falls by hundreds, and every exponential stays finite."""
    q, *rest = step_arguments([700], [(0, 900)], 2, 2, 64, BF16)
    check_step(q * 60, *rest)


def test_step_no_rows():
    args = step_arguments([0, 0], [(0, 1), (1, 2)], 2, 2, 64, BF16)
    assert cpu.attention_step(*args).shape == (0, 2, 64)


def test_what_is_no_number_stays_in_its_rows():
    args = step_arguments([70], [(0, 90)], 2, 2, 64, BF16)
    args[0][3] = torch.nan
    found = cpu.attention_step(*args)
    assert found[3].isnan().all() and not found[[i for i in range(70) if i != 3]].isnan().any()
    args[0][3] = 0
    args[3][5, 1, 7] = torch.nan  # a cached key of the second head
    found = cpu.attention_step(*args)
    assert found[:, 1].isnan().all() and not found[:, 0].isnan().any()


def test_any_number_of_threads_gives_the_same_bits():
    args, found = step_arguments(*STEPS["long"], 4, 2, 96, BF16), []
    before = torch.get_num_threads()
    x, weight = random(300, 768, dtype=BF16), random(768, dtype=BF16, seed=1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((cpu.attention_step(*args), cpu.rms_norm(x, weight, 1e-5)))
    finally:
        torch.set_num_threads(before)
    for attended, normed in found[1:]:
        assert torch.equal(attended, found[0][0]) and torch.equal(normed, found[0][1])


@pytest.mark.parametrize("rows", ROWS)
def test_norms(rows):
    x, x_untouched = inside(random(rows, 96, dtype=BF16), gap=5)
    weight, before = random(96, dtype=BF16, seed=2), x.clone()
    out, untouched = poisoned(rows, 96, dtype=BF16)
    assert cpu.rms_norm(x, weight, 1e-5, out=out) is out and untouched()
    assert x_untouched() and torch.equal(x, before)
    exact = reference.rms_norm(*double(x, weight), 1e-5)
    assert_earned(out, reference.rms_norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128))
@pytest.mark.parametrize("rows", ROWS)
def test_rope(rows, head_dim):
    heads, kv_heads = 4, 2
    qkv, untouched = inside(random(rows, (heads + 2 * kv_heads) * head_dim, dtype=BF16))
    cos, _ = inside(random(rows, head_dim // 2, seed=1))
    sin, _ = inside(random(rows, head_dim // 2, seed=2))
    plain, exact = qkv.clone(), qkv.double()
    reference.rope_(plain, cos, sin, heads, kv_heads)
    reference.rope_(exact, cos.double(), sin.double(), heads, kv_heads)
    caches = [poisoned(rows + 3, kv_heads, head_dim, dtype=BF16) for _ in range(2)]
    places = torch.arange(rows).flip(0) + 2
    cpu.rope_cache_(qkv, cos, sin, heads, kv_heads, caches[0][0], caches[1][0], places)
    assert untouched()
    assert_earned(qkv, plain, exact)
    queries = heads * head_dim
    keys_only, whole = plain.clone(), qkv.clone()
    reference.rope_(whole, cos, sin, heads, kv_heads, True)
    cpu.rope_(keys_only, cos, sin, heads, kv_heads, True)
    assert torch.equal(keys_only[:, :queries], plain[:, :queries])
    by_head = qkv.unflatten(1, (-1, head_dim))
    for (cache, beside), kept in zip(caches, by_head[:, heads:].split(kv_heads, 1)):
        assert beside() and torch.equal(cache[places], kept) and cache[:2].isnan().all()


@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows):
    gate_up, untouched = inside(random(rows, 2 * 144, dtype=BF16).mul_(4))
    plain, exact = reference.swiglu(gate_up), reference.swiglu(gate_up.double())
    out, beside = poisoned(rows, 144, dtype=BF16)
    assert cpu.swiglu(gate_up, out=out) is out and beside()
    assert_earned(out, plain, exact)
    gate = gate_up[:, :144]
    assert cpu.swiglu(gate_up, out=gate) is gate and untouched() and torch.equal(gate, out)


def test_swiglu_far_out():
    gate = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan, -100, 100, 0] * 2)
    found = cpu.swiglu(torch.cat([gate, torch.ones(16)]).to(BF16)[None])
    expected = torch.nn.functional.silu(gate.to(BF16))[None]
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_reference_does_what_they_do_not_take():
    """Other dtypes, and widths that fill no register: to the bit."""
    for dtype, width in ((torch.float32, 96), (BF16, 100)):
        x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
        assert torch.equal(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
        assert torch.equal(cpu.swiglu(x.repeat(1, 2)), reference.swiglu(x.repeat(1, 2)))
    for head_dim, dtype in ((64, torch.float32), (80, BF16)):
        args = step_arguments(*STEPS["mixed"], 2, 2, head_dim, dtype)
        assert torch.equal(cpu.attention_step(*args), reference.attention_step(*args))
        args = turning(args)
        assert torch.equal(cpu.attention_step(*args), reference.attention_step(*args))
        qkv, angles = random(5, 6 * head_dim, dtype=dtype), random(5, head_dim // 2, seed=1)
        same = qkv.clone()
        cpu.rope_(qkv, angles, angles, 2, 2)
        reference.rope_(same, angles, angles, 2, 2)
        assert torch.equal(qkv, same)


def test_pytorch_attends_where_there_is_amx():
    args = step_arguments(*STEPS["mixed"], 2, 2, 64, BF16)
    with mock.patch.object(cpu, "_has_amx", lambda: True):
        assert torch.equal(cpu.attention_step(*args), reference.attention_step(*args))


def test_the_door_checks_and_chooses():
    x, weight = random(3, 64, dtype=BF16), random(64, dtype=BF16, seed=1)
    with ops.use("cpp"):
        assert ops._implementation(x) is ops._CPP
        with pytest.raises(ValueError, match="weight"):
            ops.rms_norm(x, weight[:5], 1e-5)
        compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
        found = [ops.rms_norm(x, weight, 1e-5) for _ in range(2)]
        found.append(compiled(x, weight, 1e-5))
    expected = cpu.rms_norm(x, weight, 1e-5)
    assert all(torch.equal(one, expected) for one in found)
    assert ops._implementation(x) is ops._REFERENCE


def test_roundings(tmp_path):
    """As the instructions for bfloat16 do it: ties, infinities and what is no number."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the CPU has no instructions for bfloat16")
    halves = torch.arange(-256, 256).float() + 0.5  # a product with 1.0 has more bits than bfloat16
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, 1e-30, 0.0, -0.0, 1.0] * 2)
    x = torch.cat([random(4096) * 100, special, halves])[None].to(BF16)
    found = []
    for variant in ("float32", "without"):
        with mock.patch.object(cpu, "_libraries", {}):
            cpu.prepare(builder_of(variant, tmp_path), 32)
            angle = torch.linspace(0, 6, x.shape[1] // 2)[None]
            turned = x.clone()
            cpu.rope_(turned, angle.cos(), angle.sin(), 1, 0)
            found.append((turned, cpu.swiglu(x)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# ---- how they are built ----


def test_what_is_built_is_kept_and_loaded(built):
    (first, *_) = kept = sorted(built.folder.iterdir())
    assert len(kept) == 4 and all(one.suffix == ".so" for one in kept)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    with mock.patch.object(cpu, "_compile", side_effect=AssertionError):
        built.library(64)


def test_a_damaged_file_is_built_again(built, tmp_path):
    builder = replace(built, folder=tmp_path / "deep" / "folder")
    builder.library(32)
    (kept,) = builder.folder.iterdir()
    kept.unlink()  # not written over: the process has it mapped
    kept.write_bytes(b"\x7fELF, cut")
    builder.library(32)
    assert kept.stat().st_size > 1000 and list(builder.folder.iterdir()) == [kept]


@pytest.mark.parametrize("kind", ("none", "a file", "others can write"))
def test_a_folder_that_is_not_to_be_used(built, tmp_path, kind):
    folder: Path | None = tmp_path / "folder"
    if kind == "none":
        folder = None
    elif kind == "a file":
        folder.write_text("in the way")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    replace(built, folder=folder).library(32)
    assert folder is None or folder.is_file() or not list(folder.iterdir())


def script(folder: Path, text: str) -> tuple[str]:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return (str(path),)


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("echo 'x.cpp:1: error: no such option' >&2; exit 1", "no such option"),
        ("exit 3", "no reason given"),
        ('for last; do :; done; echo rubbish > "$last"', "cpu.so"),
        ("exit 0", "cpu.so"),
        ("exec sleep 60", "took more than 0.5 s"),
    ),
)
def test_a_compiler_that_fails(tmp_path, text, said):
    builder = builder_of("float32", tmp_path / "kept", script(tmp_path, text))
    with (
        mock.patch.object(cpu, "_SECONDS", 0.5),
        pytest.raises(cpu.Unavailable, match=said) as error,
    ):
        builder.library(32)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "kept").iterdir())


def test_no_compiler(tmp_path):
    with pytest.raises(cpu.Unavailable, match="there is no C\\+\\+ compiler 'no-such-g'"):
        builder_of("float32", tmp_path, ("no-such-g", "-x")).library(32)


@pytest.mark.parametrize("head_dim", (0, 20, 272))
def test_heads_of_no_whole_registers(built, head_dim):
    with pytest.raises(cpu.Unavailable, match=f"heads of {head_dim} features"):
        cpu.prepare(built, head_dim)


def test_other_cpus(built):
    with (
        mock.patch.object(torch.cpu, "_is_avx512_supported", return_value=False),
        pytest.raises(cpu.Unavailable, match="the CPU has no AVX512"),
    ):
        cpu.prepare(built, 64)


@pytest.mark.parametrize(
    ("instructions", "faster", "variant"),
    (
        (True, False, "bfloat16"),
        (True, True, "float32"),
        (False, True, "without"),
        (False, False, "without"),
    ),
)
def test_what_is_built_here(monkeypatch, instructions, faster, variant):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(widened, "faster", lambda dtype: faster and dtype == BF16)
    assert cpu.Builder.of_this_cpu(("g++",), None) == builder_of(variant, None, ("g++",))
