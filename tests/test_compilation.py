"""`compile`: when operations in C++ are used, what they give, and what happens without them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, golden_request, relative_error
from omnigen_fast.kernels import cpu, ops

from omnigen_fast import RequestError, compilation
from omnigen_fast.memory.plan import MemoryPlan

pytestmark = pytest.mark.early

PLAN = MemoryPlan.plain(3, kept_bytes=16 << 20)
EDIT = {
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 96,
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "seed": 3,
    "output_type": "latent",
    "progress": False,
    "memory": PLAN,
}
needs_compiler = pytest.mark.skipif(
    cpu.why_not() is not None or compilation.compiler() is None,
    reason="the operations can't be built here",
)


@pytest.fixture(scope="module")
def compiled(load_pipe, tmp_path_factory):
    """A pipeline with operations in C++, also for attention where PyTorch's would run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cpu, "_libraries", {})
        patch.setattr(cpu, "_has_amx", lambda: False)
        pipe = load_pipe(dtype="bfloat16", compile=True)
        assert pipe.compiled and len(list(compilation.folder().iterdir())) == 1
        yield pipe


@pytest.fixture(scope="module")
def plain(load_pipe):
    return load_pipe(dtype="bfloat16", compile=False)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "omnigen_fast"]


def attentions(monkeypatch) -> list[int]:
    """Heads of every call of the attention in C++."""
    calls = []
    run = ops._CPP.attention_step

    def counted(q, *args):
        calls.append(q.shape[1])
        return run(q, *args)

    monkeypatch.setattr(ops._CPP, "attention_step", counted)
    return calls


@pytest.mark.parametrize("given", (1, 0, "yes", "AUTO", 0.0, [True]))
def test_what_compile_may_be(load_pipe, given):
    with pytest.raises(RequestError, match='compile must be True, False or "auto", got'):
        load_pipe(compile=given)
    assert [compilation.check_compile(one) for one in (None, "auto", True, False)] == [
        None,
        None,
        True,
        False,
    ]


@needs_compiler
def test_auto_is_for_large_models(load_pipe, plain, monkeypatch):
    assert not plain.compiled
    pipe = load_pipe(dtype="bfloat16")
    assert not pipe.compiled and torch.equal(pipe(**EDIT), plain(**EDIT))
    weights = sum(one.numel() for one in pipe.model.layers.parameters())
    for worth, compiles in ((weights + 1, False), (weights, True)):
        monkeypatch.setattr(compilation, "_WORTH", worth)
        assert load_pipe(dtype="bfloat16", compile="auto").compiled == compiles
    assert not load_pipe(dtype="float32", compile="auto").compiled


@needs_compiler
@pytest.mark.parametrize("name", ("text", "one_image"))
def test_as_exact_as_pytorch(compiled, plain, pipe, name, monkeypatch):
    request = {**golden_request(name), "output_type": "latent", "progress": False}
    exact = pipe(**request)
    calls = attentions(monkeypatch)
    found, usual = compiled(**request), plain(**request)
    assert calls and not torch.equal(found, usual)
    assert relative_error(found, exact) < 2 * relative_error(usual, exact)


@needs_compiler
def test_weights_and_caches_anywhere_give_the_same_bits(compiled):
    expected = compiled(**EDIT)
    for change in ({"resident_layers": 1}, {"resident_layers": 1, "cache": "ring"}):
        assert torch.equal(compiled(**{**EDIT, "memory": replace(PLAN, **change)}), expected)
    for change in ({"cache": "none"}, {"branches_per_pass": 1}, {"mlp_rows": 7}):
        found = compiled(**{**EDIT, "memory": replace(PLAN, **change)})
        assert relative_error(found, expected) < 3e-2, change


@needs_compiler
def test_loras_come_and_go(compiled, plain):
    before = compiled(**EDIT)
    for pipe in (compiled, plain):
        pipe.load_lora_weights(str(GOLDEN / "lora"))
    try:
        found, usual = compiled(**EDIT), plain(**EDIT)
        assert not torch.equal(found, before)
        assert relative_error(found, usual) < 3e-2
    finally:
        for pipe in (compiled, plain):
            pipe.unload_lora_weights()
    assert torch.equal(compiled(**EDIT), before)


@needs_compiler
@pytest.mark.parametrize(
    "chosen", ({"weights": "int8"}, {"weights": "nf4"}, {"compute": "int8"}), ids=str
)
def test_quantised_weights(load_pipe, chosen, monkeypatch):
    calls, found = attentions(monkeypatch), []
    for wanted in (False, True):
        pipe = load_pipe(dtype="bfloat16", compile=wanted, **chosen)
        found.append(pipe(**{**EDIT, "memory": "auto"}))
        assert bool(calls) == wanted
    assert relative_error(*found) < 5e-2


@needs_compiler
def test_packed_steps_and_a_call_that_ends_early(compiled, monkeypatch):
    engine = compiled.engine
    requests = [{**EDIT, "seed": seed} for seed in (5, 6)]
    alone = [compiled(**request) for request in requests]
    calls = attentions(monkeypatch)
    running = [
        engine.start(compiled.make_call(**one), PLAN, own_rows=True)
        for one in ({k: v for k, v in request.items() if k != "memory"} for request in requests)
    ]
    while not running[0].finished:
        engine.step_together(*running)
    assert calls
    for one, expected in zip(running, alone):
        assert relative_error(engine.finish(one), expected) < 3e-2

    def stop(pipe, step, time, values):
        pipe._interrupt = step == 1

    calls.clear()
    compiled(**EDIT, callback_on_step_end=stop)
    assert len(calls) == 2 * len(compiled.model.layers)  # two steps, all branches in one pass


@needs_compiler
def test_calls_from_threads_and_other_sizes(compiled):
    sizes = [(64, 96), (96, 64), (48, 48), (16, 16)]
    requests = [{**EDIT, "height": height, "width": width} for height, width in sizes]
    expected = [compiled(**one) for one in requests]
    found: dict[int, torch.Tensor] = {}

    def run(place: int) -> None:
        found[place] = compiled(**requests[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(requests))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert all(torch.equal(found[place], one) for place, one in enumerate(expected))


@needs_compiler
def test_a_step_is_one_graph_under_torch_compile(compiled):
    running = compiled.engine.start(
        compiled.make_call(**{k: v for k, v in EDIT.items() if k != "memory"}), PLAN
    )
    loop, values = running.loop, running.loop.values
    noise = values.latents.clone()

    def take(step):
        values.seek(0)
        values.latents.copy_(noise)
        with compiled.engine.compilation.operations(), torch.no_grad():
            step()
        return values.latents.clone()

    try:
        expected = take(loop.step)
        found = take(torch.compile(loop.step, fullgraph=True, backend="aot_eager"))
        assert torch.equal(found, expected)
    finally:
        compiled.engine.drop(running)


@needs_compiler
def test_what_a_caller_chooses_comes_first(compiled, plain):
    with ops.use("reference"):
        assert torch.equal(compiled(**EDIT), plain(**EDIT))


@needs_compiler
def test_it_follows_dtype(load_pipe, caplog):
    pipe = load_pipe(dtype="bfloat16", compile=True)
    assert pipe.compiled and not said(caplog)
    pipe.to(torch.float32)
    assert not pipe.compiled
    assert said(caplog) == [
        "Nothing is compiled (its operations are in bfloat16, not in float32); PyTorch's "
        "operations run instead."
    ]
    pipe.to(torch.bfloat16)
    assert pipe.compiled


@pytest.mark.parametrize(
    ("command", "reason"),
    (
        ("no-such-compiler -v", "there is no C++ compiler 'no-such-compiler'"),
        ("false", "false failed: no reason given"),
    ),
)
def test_without_a_compiler_that_works(load_pipe, plain, caplog, monkeypatch, command, reason):
    """One line, and the picture of PyTorch's operations; also where nobody asked."""
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(cpu, "why_not", lambda: None)
    monkeypatch.setattr(compilation, "_WORTH", 0)
    for wanted in (True, None):
        caplog.clear()
        pipe = load_pipe(dtype="bfloat16", compile=wanted)
        (line,) = said(caplog)
        assert reason in line and "PyTorch's operations run instead" in line
        assert not pipe.compiled and torch.equal(pipe(**EDIT), plain(**EDIT))


def test_where_no_compiler_is_installed(load_pipe, caplog, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilation, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(cpu, "why_not", lambda: None)
    monkeypatch.setattr(compilation, "_WORTH", 0)
    assert not load_pipe(dtype="bfloat16").compiled and not said(caplog)
    assert not load_pipe(dtype="bfloat16", compile=True).compiled
    assert "there is no C++ compiler; install one, or set CXX" in said(caplog)[0]


def test_other_cpus_run_pytorch(load_pipe, caplog, monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "the CPU has no AVX512")
    monkeypatch.setattr(compilation, "_WORTH", 0)
    assert not load_pipe(dtype="bfloat16").compiled and not said(caplog)
    assert not load_pipe(dtype="bfloat16", compile=True).compiled
    assert "the CPU has no AVX512" in said(caplog)[0]


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.folder() == tmp_path / "omnigen_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation.folder() == tmp_path / ".cache" / "omnigen_fast"
