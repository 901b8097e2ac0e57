"""The door: which implementation runs, what `torch.compile` sees, what is refused."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import omnigen_fast.kernels
import pytest
import torch
from numerics import DEVICE, integers, poisoned, random
from omnigen_fast.kernels import contract, ops, reference

from bench.tracker import MemoryTracker
from omnigen_fast.forms import FORMS
from omnigen_fast.quantised import quantised

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, ROWS, CACHE_ROWS = 6, 3, 64, 32, 6, 9


def stored(dtype: torch.dtype) -> dict[str, dict]:
    """Good arguments of the operations that expand weights."""
    weight = random(ROWS, 100, dtype=dtype, seed=12)
    return {
        f"dequantise_{form}_": {
            "weight": weight.clone(),
            **dict(zip(("values", "scales", "ranges"), quantised("", weight, form).arguments)),
        }
        for form in FORMS
    }


def arguments(name: str, dtype: torch.dtype = torch.float32) -> dict:
    """Good arguments of an operation, by name."""
    qkv = random(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    parts = qkv.unflatten(1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), 1)
    q_k_v = dict(zip("qkv", parts))
    angles = random(ROWS, HEAD_DIM // 2, seed=1)
    rope = {"qkv": qkv, "cos": angles, "sin": angles, "heads": HEADS, "kv_heads": KV_HEADS}
    caches = {
        "k_cache": random(CACHE_ROWS, KV_HEADS, HEAD_DIM, dtype=dtype, seed=2),
        "v_cache": random(CACHE_ROWS, KV_HEADS, HEAD_DIM, dtype=dtype, seed=3),
    }
    width = contract.cache_width(KV_HEADS, HEAD_DIM)
    narrow = {
        name: torch.zeros(CACHE_ROWS, width, dtype=torch.int8, device=DEVICE)
        for name in ("k_cache", "v_cache")
    }
    x = {"x": random(ROWS, HIDDEN, dtype=dtype, seed=4)}
    weight = random(HIDDEN, dtype=dtype, seed=5)
    table = random(3, HIDDEN, dtype=dtype, seed=11)
    steps = torch.tensor([1, 0, 2], device=DEVICE)
    groups = {"cu_rows": integers(0, 4, ROWS)}
    quantised = {
        "values": torch.arange(ROWS * HIDDEN, device=DEVICE).to(torch.int8).view(ROWS, HIDDEN),
        "scales": random(ROWS, seed=12).abs(),
    }
    return {
        "rms_norm": {**x, "weight": weight, "eps": 1e-5},
        "quantise_": {**x, **quantised},
        "rms_norm_quantise_": {**x, "weight": weight, "eps": 1e-5, **quantised},
        "scaled_mm_": {
            **quantised,
            "weight": torch.arange(5 * HIDDEN, device=DEVICE).to(torch.int8).view(5, HIDDEN),
            "weight_scales": random(5, seed=13).abs(),
            "result": random(ROWS, 5, dtype=dtype, seed=14),
            "accumulate": True,
        },
        "rope_": {**rope, "keys_only": True},
        "rope_cache_": {
            **rope,
            **caches,
            "cache_rows": torch.tensor([8, 1, 0, 4, 3, 7], device=DEVICE),
        },
        "quantise_cache_": {
            "k": q_k_v["k"],
            "v": q_k_v["v"],
            **narrow,
            "cache_rows": torch.tensor([8, 1, 0, 4, 3, 7], device=DEVICE),
        },
        "join_segments": {
            "a": q_k_v["q"],
            "a_lse": random(HEADS, ROWS, seed=15).t(),
            "b": random(ROWS, HEADS, HEAD_DIM, dtype=dtype, seed=16),
            "b_lse": random(ROWS, HEADS, seed=17),
        },
        "attention_step_8bit": {
            **q_k_v,
            **narrow,
            **groups,
            "cache_start": integers(2, 0),
            "cache_len": integers(7, 0),
            "max_rows": 4,
            "cu_keys": None,
            "cos": angles.cos(),
            "sin": angles.sin(),
        },
        "attention_step": {
            **q_k_v,
            **caches,
            **groups,
            "cache_start": integers(2, 0),
            "cache_len": integers(7, 0),
            "max_rows": 4,
            "cu_keys": None,
            "cos": angles.cos(),
            "sin": angles.sin(),
        },
        "attention_prefill": {
            **q_k_v,
            **groups,
            "kv_end": integers(1, 3, 3, 4, 0, 1),
            "max_rows": 4,
            "first": 0,
        },
        "swiglu": {"gate_up": random(ROWS, 2 * HIDDEN, dtype=dtype, seed=7)},
        "swiglu_quantise_": {
            "gate_up": random(ROWS, 2 * HIDDEN, dtype=dtype, seed=7),
            **quantised,
        },
        **stored(dtype),
        "modulate": {**x, "shift": table, "scale": table, "step": steps, "eps": 1e-6},
        "guidance_step_": {
            "latents": random(2, 4, 4, 6),
            "prediction": random(5, 6, 16, dtype=dtype, seed=8),
            "coefficient": random(5, seed=9),
            "cu_groups": integers(0, 3, 5),
            "lengths": random(3, seed=10),
            "step": steps[:2],
            "patch": 2,
        },
    }[name]


OPERATIONS = tuple(ops.OPERATIONS)


@pytest.mark.slow_except("*-reference")
@pytest.mark.parametrize("kernels", ("reference", "triton"))
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name, kernels):
    operator = getattr(torch.ops.omnigen_fast, name).default
    with ops.use(kernels):
        torch.library.opcheck(operator, tuple(arguments(name).values()))


def test_schemas_have_the_references_arguments():
    """But for `out`: a compiled graph plans its own memory."""
    for name in OPERATIONS:
        expected = list(getattr(reference, name).__annotations__)[:-1]
        assert list(getattr(ops, name).__annotations__)[:-1] == expected
        schema = getattr(torch.ops.omnigen_fast, name).default._schema
        expected = [argument for argument in expected if argument != "out"]
        assert [argument.name for argument in schema.arguments] == expected


WITH_OUT = tuple(name for name in OPERATIONS if "out" in getattr(reference, name).__annotations__)


@pytest.mark.parametrize("kernels", ("reference", "triton"))
@pytest.mark.parametrize("name", WITH_OUT)
def test_results_go_where_the_caller_wants(name, kernels):
    operation = getattr(ops, name)
    with ops.use(kernels):
        expected = operation(**arguments(name))
        out, untouched = poisoned(*expected.shape, dtype=expected.dtype)
        assert operation(**arguments(name), out=out) is out
        assert untouched() and torch.equal(out, expected)
        for wrong, error in (
            (out.double(), TypeError),
            (out[:-1], ValueError),
            (shared_row(out), ValueError),
            (doubled(out), ValueError),
            (out.to("meta"), ValueError),
        ):
            with pytest.raises(error, match=r"\bout\b"):
                operation(**arguments(name), out=wrong)


@pytest.mark.parametrize("kernels", ("reference", "triton"))
def test_swiglu_in_the_place_of_its_gate(kernels):
    gate_up = arguments("swiglu")["gate_up"]
    up = gate_up[:, HIDDEN:].clone()
    with ops.use(kernels):
        expected = ops.swiglu(gate_up)
        ops.swiglu(gate_up, out=gate_up[:, :HIDDEN])
    assert torch.equal(gate_up[:, :HIDDEN], expected) and torch.equal(gate_up[:, HIDDEN:], up)


def test_every_operation_is_on_the_door():
    public = {
        name
        for name, value in vars(reference).items()
        if callable(value) and getattr(value, "__module__", "") == reference.__name__
        if not name.startswith("_")
    }
    assert set(OPERATIONS) == public


def test_an_operation_is_declared_in_three_places():
    """Reference, contract and one decorated function in ops; only the kernel comes on top."""
    for module in (reference, contract, ops):
        functions, rest = [], []
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in OPERATIONS:
                functions.append(node.name)
            else:
                rest.append(node)
        assert sorted(functions) == sorted(OPERATIONS), module.__name__
        if module is ops:
            inside = [one for node in rest for one in ast.walk(node)]
            assert not {one.value for one in inside if isinstance(one, ast.Constant)} & set(
                OPERATIONS
            )


@pytest.mark.parametrize("name", OPERATIONS)
def test_help_says_formula_and_shapes(name):
    text = inspect.getdoc(getattr(ops, name))
    for module in (reference, contract):
        assert inspect.getdoc(getattr(module, name)) in text
        assert f"`{module.__name__.rpartition('.')[2]}.{name}`" in text
    for argument in inspect.signature(getattr(ops, name)).parameters.values():
        if argument.annotation == "Tensor":
            assert re.search(rf"\b{argument.name}\b", text), argument


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_is_one_plain_call(name, monkeypatch):
    """The registered function is not wrapped, and passes every argument by position."""
    calls = []
    monkeypatch.setattr(ops, "_call", lambda *args: calls.append(args))
    public, given = getattr(ops, name), arguments(name)
    assert not hasattr(public, "__wrapped__")
    public(**given)
    parameters = inspect.signature(getattr(reference, name)).parameters
    ((called, *args),) = calls
    assert called == name and len(args) == len(parameters)
    for argument, value in zip(parameters, args):
        assert value is given.get(argument)


def everything(given: dict[str, dict]) -> list[torch.Tensor]:
    """Calls every operation; returns all that they return or change."""
    results = []
    for name, args in given.items():
        returned = getattr(ops, name)(*args.values())
        results += [] if returned is None else [returned]
        results += [value for value in args.values() if isinstance(value, torch.Tensor)]
    return results


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_without_a_graph_break(backend):
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled({name: arguments(name) for name in OPERATIONS})
        expected = everything({name: arguments(name) for name in OPERATIONS})
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_and_reference_agree_through_the_door(name, dtype):
    """Coarsely: the bounds are in test_rows and test_attention."""
    results = []
    for kernels in ("triton", "reference"):
        args = arguments(name, dtype)
        with ops.use(kernels):
            returned = getattr(ops, name)(**args)
        kept = [value for value in args.values() if isinstance(value, torch.Tensor)]
        results.append([*kept, *([] if returned is None else [returned])])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_library_attention_goes_around_the_kernels():
    from omnigen_fast.kernels import attention, swiglu

    assert ops._triton().attention_step is attention.attention_step
    with ops.use("triton", attention="library"):
        chosen = ops._implementation(random(1))
        assert chosen.attention_step is ops._REFERENCE.attention_step
        assert chosen.attention_prefill is ops._REFERENCE.attention_prefill
        assert chosen.swiglu is swiglu.swiglu


@pytest.mark.parametrize("name", ("flash", "cudnn"))
def test_a_library_has_a_steps_attention_alone(name):
    from omnigen_fast.kernels import attention, join, library

    for kernels, base in (("triton", ops._triton()), ("auto", ops._REFERENCE), ("cpp", ops._CPP)):
        with ops.use(kernels, attention=name):
            chosen = ops._implementation(random(1) if DEVICE == "cpu" else torch.zeros(1))
        changed = {key for key, run in vars(chosen).items() if run is not getattr(base, key)}
        assert changed == {"attention_step", "attention_step_8bit"}
        assert chosen.attention_step.func is library.attention_step
        assert chosen.attention_step.args == (name, base.join_segments)
    assert ops._triton().join_segments is join.join_segments
    assert ops._triton().attention_prefill is attention.attention_prefill
    with ops.use("reference", attention=name):
        assert ops._implementation(random(1)) is ops._REFERENCE


def test_use_ends_with_its_block():
    before = ops.choice()
    with ops.use("reference"), ops.use(attention="library") as inner:
        assert inner == ops.choice() == ops.Choice("reference", "library")
    assert ops.choice() == before == ops.Choice()
    with pytest.raises(ValueError, match=r"kernels must be .* got 'cuda'"), ops.use("cuda"):
        pass
    with pytest.raises(ValueError, match="attention must be"), ops.use(attention="flash2"):
        pass


def test_cpu_tensors_take_the_reference():
    assert ops._implementation(torch.zeros(1)) is ops._REFERENCE


def test_meta_tensors_take_the_memory_of_the_kernels():
    x = torch.empty(4, 64, device="meta")
    out = torch.empty_like(x)
    with MemoryTracker([x, out]) as memory:
        assert ops.rms_norm(x, x[0], 1e-5, out=out) is out
        assert ops.swiglu(x, out=x[:, :32]).shape == (4, 32)
        assert memory.allocations == 0
        result = ops.swiglu(x)
    assert result.shape == (4, 32)
    assert memory.peak_bytes == (2 * 4 * 64 + 4 * 32) * 4


def on_a_gpu() -> mock.Mock:
    tensor = mock.Mock(spec=torch.Tensor)
    tensor.is_cuda, tensor.device = True, torch.device("cuda", 0)
    return tensor


def test_one_notice_where_a_gpu_has_no_kernels(caplog):
    ops._notice.cache_clear()
    with (
        mock.patch.object(ops, "_why_not", return_value="compute capability 7.5 is below 8.0"),
        caplog.at_level(logging.WARNING, "omnigen_fast"),
    ):
        for _ in range(3):
            assert ops._implementation(on_a_gpu()) is ops._REFERENCE
        assert [record.message for record in caplog.records] == [
            "The Triton kernels can't run here: compute capability 7.5 is below 8.0. "
            "Plain PyTorch runs instead."
        ]
        with (
            ops.use("triton"),
            pytest.raises(RuntimeError, match="can't run on cuda:0: compute capability"),
        ):
            ops._implementation(on_a_gpu())
    ops._notice.cache_clear()


def test_what_keeps_the_kernels_from_a_gpu():
    why_not = ops._why_not.__wrapped__
    capability = mock.patch("torch.cuda.get_device_capability", return_value=(8, 0))
    with mock.patch("torch.version.cuda", "13.0"), capability:
        assert why_not(0) is None
        with mock.patch.object(ops, "_triton", side_effect=ImportError("no module")):
            assert why_not(0) == "triton can't be imported (no module)"
        with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
            assert why_not(0) == "compute capability 7.5 is below 8.0"
    with mock.patch("torch.version.cuda", None):
        assert "not for CUDA" in why_not(0)


def test_import_is_lazy_and_cpu_kernels_need_the_interpreter():
    program = (
        "import sys, torch\n"
        "from omnigen_fast.kernels import ops\n"
        "ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)\n"
        "assert 'triton' not in sys.modules\n"
        "with ops.use('triton'):\n"
        "    try:\n"
        "        ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)\n"
        "    except RuntimeError as error:\n"
        "        assert 'TRITON_INTERPRET=1' in str(error)\n"
        "        print('refused')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_only_the_kernels_can_be_captured():
    gpu = torch.device("cuda", 0)
    assert not ops.capturable(torch.device("cpu"))
    with mock.patch.object(ops, "_why_not", return_value=None):
        assert ops.capturable(gpu)
        for arguments in ({"kernels": "reference"}, {"attention": "library"}):
            with ops.use(**arguments):
                assert not ops.capturable(gpu), arguments
        for attention in ("flash", "cudnn"):
            with ops.use(attention=attention):
                assert ops.capturable(gpu)
        with ops.use("triton"):
            assert ops.capturable(gpu)
            assert not ops.capturable(torch.device("cpu"))  # in the interpreter
    with mock.patch.object(ops, "_why_not", return_value="compute capability 7.5 is below 8.0"):
        assert not ops.capturable(gpu)


def test_kernels_import_torch_and_triton_only():
    folder = Path(omnigen_fast.kernels.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name} reaches outside of kernels"
                modules = [] if node.level else [node.module]
            else:
                continue
            for module in modules:
                top = module.partition(".")[0]
                assert top in {"torch", "triton", *sys.stdlib_module_names}, (file.name, module)


def doubled(x):
    """The same shape with a step of two inside its rows."""
    return x.repeat_interleave(2, -1)[..., ::2]


def shared_row(x):
    return x[:1].expand(x.shape)


# operation, argument, what is made of it, the error
REFUSED = [
    *(
        (name, argument, lambda x: x.to(torch.int32), TypeError)
        for name, argument in (
            ("rms_norm", "x"),
            ("rope_", "qkv"),
            ("rope_", "cos"),
            ("attention_step", "q"),
            ("attention_step", "cos"),
            ("attention_step_8bit", "sin"),
            ("attention_prefill", "q"),
            ("swiglu", "gate_up"),
            ("modulate", "x"),
            ("guidance_step_", "latents"),
            ("guidance_step_", "prediction"),
            ("guidance_step_", "coefficient"),
            ("guidance_step_", "lengths"),
            ("guidance_step_", "step"),
            ("rope_cache_", "cache_rows"),
            ("quantise_cache_", "k_cache"),
            ("quantise_cache_", "cache_rows"),
            ("attention_step_8bit", "v_cache"),
            ("quantise_", "values"),
            ("rms_norm_quantise_", "scales"),
            ("scaled_mm_", "weight"),
            ("scaled_mm_", "result"),
            *((f"dequantise_{form}_", part) for form in FORMS for part in ("values", "scales")),
            ("dequantise_nf4_", "ranges"),
        )
    ),
    *(
        (name, argument, lambda x: x.long(), TypeError)
        for name, argument in (
            ("attention_step", "cu_rows"),
            ("attention_step", "cache_start"),
            ("attention_step", "cache_len"),
            ("attention_step_8bit", "cache_len"),
            ("attention_prefill", "cu_rows"),
            ("attention_prefill", "kv_end"),
            ("guidance_step_", "cu_groups"),
        )
    ),
    *(
        (name, argument, lambda x: x.to(torch.bfloat16), TypeError)
        for name, argument in (
            ("rms_norm", "weight"),
            ("rope_", "sin"),
            ("attention_step", "sin"),
            ("rope_cache_", "k_cache"),
            ("rope_cache_", "v_cache"),
            ("attention_step", "k"),
            ("attention_step", "v"),
            ("attention_step", "k_cache"),
            ("attention_step", "v_cache"),
            ("quantise_cache_", "v"),
            ("attention_step_8bit", "k"),
            ("attention_step_8bit", "k_cache"),
            ("attention_prefill", "k"),
            ("modulate", "shift"),
            ("modulate", "scale"),
            ("guidance_step_", "latents"),
        )
    ),
    *(
        (name, argument, lambda x: x.to("meta"), ValueError)
        for name, argument in (
            ("rms_norm", "weight"),
            ("rope_", "cos"),
            ("attention_step", "cos"),
            ("rope_cache_", "v_cache"),
            ("rope_cache_", "cache_rows"),
            ("attention_step", "k_cache"),
            ("attention_step", "cache_len"),
            ("attention_prefill", "kv_end"),
            ("modulate", "shift"),
            ("guidance_step_", "prediction"),
            ("guidance_step_", "lengths"),
            ("modulate", "step"),
        )
    ),
    *(
        (name, argument, doubled, ValueError)
        for name, argument in (
            ("rms_norm", "x"),
            ("rms_norm", "weight"),
            ("rope_", "qkv"),
            ("rope_", "cos"),
            ("attention_step", "cos"),
            ("rope_cache_", "k_cache"),
            ("rope_cache_", "cache_rows"),
            ("attention_step", "q"),
            ("attention_step", "v_cache"),
            ("attention_prefill", "k"),
            ("attention_prefill", "kv_end"),
            ("swiglu", "gate_up"),
            ("modulate", "scale"),
            ("guidance_step_", "latents"),
            ("guidance_step_", "prediction"),
            ("guidance_step_", "cu_groups"),
            ("quantise_", "x"),
            ("swiglu_quantise_", "values"),
            ("rms_norm_quantise_", "scales"),
            ("scaled_mm_", "values"),
            ("scaled_mm_", "weight"),
            ("scaled_mm_", "result"),
        )
    ),
    *(
        (name, argument, lambda x: x[:-1].contiguous(), ValueError)
        for name, argument in (
            ("quantise_", "values"),
            ("swiglu_quantise_", "scales"),
            ("scaled_mm_", "scales"),
            ("scaled_mm_", "weight_scales"),
            ("scaled_mm_", "result"),
            ("rms_norm", "weight"),
            ("rope_", "cos"),
            ("attention_step", "cos"),
            ("attention_step_8bit", "sin"),
            ("rope_cache_", "cache_rows"),
            ("attention_step", "k"),
            ("attention_step", "v_cache"),
            ("attention_step", "cache_start"),
            ("attention_prefill", "v"),
            ("attention_prefill", "kv_end"),
            ("modulate", "scale"),
            ("guidance_step_", "coefficient"),
            ("guidance_step_", "cu_groups"),
            ("guidance_step_", "step"),
        )
    ),
    *(
        (name, argument, lambda x: x[..., :-1].contiguous(), ValueError)
        for name, argument in (
            ("rope_", "qkv"),
            ("rope_cache_", "k_cache"),
            ("attention_step", "k"),
            ("swiglu", "gate_up"),
            ("modulate", "shift"),
            ("guidance_step_", "prediction"),
            ("rms_norm_quantise_", "weight"),
            ("swiglu_quantise_", "values"),
            ("scaled_mm_", "weight"),
            ("scaled_mm_", "result"),
        )
    ),
    *(
        (name, argument, shared_row, ValueError)
        for name, argument in (
            ("quantise_", "values"),
            ("scaled_mm_", "result"),
            ("rope_", "qkv"),
            ("rope_cache_", "k_cache"),
        )
    ),
    ("rms_norm", "x", lambda x: x[:, :0], ValueError),
    ("rms_norm", "x", lambda x: x[None], ValueError),
    ("rms_norm", "x", lambda x: x.tolist(), TypeError),
    ("rope_", "heads", lambda x: 0, ValueError),
    ("scaled_mm_", "values", lambda x: x.new_zeros(ROWS, 131073), ValueError),
    ("scaled_mm_", "values", lambda x: x[:, :0], ValueError),
    ("swiglu_quantise_", "gate_up", lambda x: x[:, :0], ValueError),
    ("attention_step", "k", lambda x: x[:, :1].expand(-1, 4, -1).contiguous(), ValueError),
    ("attention_step", "max_rows", lambda x: 2, ValueError),
    ("attention_step", "cos", lambda x: None, ValueError),
    ("attention_step_8bit", "sin", lambda x: None, ValueError),
    ("attention_prefill", "max_rows", lambda x: 2, ValueError),
    ("attention_prefill", "first", lambda x: 5, ValueError),
    ("attention_prefill", "first", lambda x: -1, ValueError),
    ("attention_step", "cu_rows", lambda x: x[:0], ValueError),
    ("guidance_step_", "patch", lambda x: 3, ValueError),
    ("guidance_step_", "lengths", lambda x: x[None], ValueError),
    ("quantise_cache_", "k_cache", lambda x: x.view(torch.uint8), TypeError),
    ("quantise_cache_", "k_cache", lambda x: x[:, 16:], ValueError),
    ("quantise_cache_", "v_cache", lambda x: x[:1].expand(CACHE_ROWS, -1), ValueError),
    ("attention_step_8bit", "v_cache", lambda x: x[:-1], ValueError),
    (
        "attention_step_8bit",
        "k_cache",
        lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape),
        ValueError,
    ),
    ("join_segments", "a_lse", lambda x: x.double(), TypeError),
    ("join_segments", "b_lse", lambda x: x[:-1], ValueError),
    ("join_segments", "b", lambda x: x[:-1], ValueError),
    ("join_segments", "b", lambda x: x.double(), TypeError),
    ("join_segments", "b", doubled, ValueError),
    ("join_segments", "a", lambda x: x[0], ValueError),
    ("modulate", "step", lambda x: x[0], ValueError),
    ("modulate", "step", lambda x: x.int(), TypeError),
    ("modulate", "step", lambda x: x[:0], ValueError),
    ("modulate", "step", lambda x: torch.cat([x, x[:1]]), ValueError),
    ("guidance_step_", "step", lambda x: torch.cat([x, x]), ValueError),
]


@pytest.mark.parametrize("kernels", ("reference", "triton"))
@pytest.mark.parametrize(
    ("name", "argument", "change", "error"),
    REFUSED,
    ids=[f"{place}-{one[0]}-{one[1]}" for place, one in enumerate(REFUSED)],
)
def test_refused_by_name(name, argument, change, error, kernels):
    args = arguments(name)
    args[argument] = change(args[argument])
    with ops.use(kernels), pytest.raises(error, match=rf"\b{argument}\b"):
        getattr(ops, name)(**args)


def test_kernels_refuse_what_they_are_not_written_for():
    for name, head_dim in product(("attention_step", "attention_prefill"), (32, 80, 256)):
        args = arguments(name)
        for part in ("q", "k", "v", "k_cache", "v_cache"):
            if part in args:
                args[part] = random(*args[part].shape[:2], head_dim)
        for part in ("cos", "sin"):
            if part in args:
                args[part] = random(ROWS, head_dim // 2)
        with (
            ops.use("triton"),
            pytest.raises(ValueError, match=f"q must have a head_dim .* {head_dim}"),
        ):
            getattr(ops, name)(**args)
        with ops.use("reference"):  # has no such limit
            assert getattr(ops, name)(**args).shape == args["q"].shape
    with ops.use("triton"), pytest.raises(TypeError, match=r"x must be bfloat16.*float64"):
        ops.rms_norm(random(2, 4).double(), random(4).double(), 1e-5)
    with pytest.raises(ValueError, match="x must have 1 to 65536 columns"):
        contract.rms_norm(torch.zeros(1, 65537), torch.zeros(65537), 1e-5)


@pytest.mark.parametrize(
    ("name", "part"), (("attention_step", "k_cache"), ("attention_prefill", "q"))
)
def test_offsets_of_32_bits_are_not_passed(name, part):
    """Rows that far apart would be read from a wrong place. On "meta" they need no memory."""
    args = arguments(name)
    for key, value in args.items():
        if isinstance(value, torch.Tensor):
            args[key] = value.to("meta")
    rows = args[part].shape[0]
    stride = (1 << 31) // (rows if part == "k_cache" else args["max_rows"])
    fits, far = (
        torch.empty((rows, step), dtype=args[part].dtype, device="meta").as_strided(
            args[part].shape, (step, HEAD_DIM, 1)
        )
        for step in (stride - 1, stride + 1)
    )
    check = getattr(contract, name)
    check(**{**args, part: fits}, fused=True)
    with pytest.raises(ValueError, match=rf"{part} must have less than 2\^31 elements"):
        check(**{**args, part: far}, fused=True)
    check(**{**args, part: far})  # the reference has no such limit
