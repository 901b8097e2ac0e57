"""Who computes a step's attention: the same pictures, and who is chosen, refused and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from golden_cases import CASES, GOLDEN, TINY, golden_request, golden_result, relative_error
from omnigen_fast.kernels import library, ops, winners
from omnigen_fast.profiles import load as load_profile
from recording import recording_graphs
from step_cases import CHANGES, PLAN, under

from omnigen_fast import OmniGenPipeline, RequestError
from omnigen_fast.attention import attending, attention_for
from omnigen_fast.cli.main import main
from omnigen_fast.config import released_sizes
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.estimate import ByteEstimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.precision import Precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLOAT32 = [name for name, case in CASES.items() if case.get("dtype") is None]
HALF = Precision.of("bfloat16")


@pytest.fixture(scope="module")
def flash(load_pipe):
    """On a CPU: PyTorch's own flash attention."""
    return load_pipe(attention="flash")


@pytest.fixture
def calls(monkeypatch):
    """How often each library was called for a group's segment, and segments were joined."""
    found: Counter[str] = Counter()
    dense = library._dense

    def counted(name, *args):
        found[name] += 1
        return dense(name, *args)

    monkeypatch.setattr(library, "_dense", counted)
    return found


@pytest.mark.parametrize("name", FLOAT32)
def test_latents_are_the_originals(flash, calls, name):
    """One, two and three branches, batches of different lengths, adapters."""
    if CASES[name].get("lora"):
        flash.merge_lora(GOLDEN / "lora")
    try:
        latents = flash(**golden_request(name), output_type="latent", progress=False)
    finally:
        flash.unload_lora_weights()
    assert relative_error(latents, golden_result(name)["latents"]) < 1e-5
    assert calls["flash"] and flash.attention == "flash"


EDIT = {
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 64,
    "height": 48,
    "width": 64,
    "num_inference_steps": 4,
    "seed": 3,
    "output_type": "latent",
    "progress": False,
}


@pytest.mark.parametrize("branches", (1, 2, 3))
def test_every_group_has_two_calls_in_every_layer(flash, pipe, calls, branches):
    changes = {"guidance_scale": 1.0} if branches == 1 else {}
    changes |= {"use_img_guidance": False} if branches < 3 else {}
    found = flash(**{**EDIT, **changes})
    assert calls == {"flash": 2 * branches * 4 * flash.config.num_layers}
    assert relative_error(found, pipe(**{**EDIT, **changes})) < 1e-5
    assert calls.total() == 2 * branches * 4 * flash.config.num_layers  # by the other none


@under(*CHANGES, {"mlp_rows": 16})
def test_under_every_plan(flash, change):
    expected = flash(**EDIT, memory=PLAN)
    flash.clear_cache()
    found = flash(**EDIT, memory=replace(PLAN, **change))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    (
        {"guidance_interval": (0.2, 0.7), "num_inference_steps": 6},
        {"solver": "heun"},
        {"reuse": 1e-2, "solver": "ab2", "num_inference_steps": 8},
        {"num_images_per_prompt": 2},
    ),
    ids=str,
)
def test_steps_that_differ(flash, pipe, changes):
    request = {**EDIT, **changes}
    assert relative_error(flash(**request), pipe(**request)) < 1e-5


def test_steps_of_several_calls_together(flash, pipe):
    """Packed: their groups' rows in the cache come from each call."""
    plan = MemoryPlan.plain(layers=flash.config.num_layers, kept_bytes=16 << 20)
    requests = [
        {**EDIT, "prompt": prompt, "input_images": None, "seed": seed}
        for seed, prompt in enumerate(("a cat", "a dog that sleeps on a red sofa"))
    ]
    alone = [pipe(**one) for one in requests]
    engine = flash.engine
    flash.clear_cache()
    running = [engine.start(flash.make_call(**one), plan, own_rows=True) for one in requests]
    while not running[0].finished:
        engine.step_together(*running)
    for one, expected in zip(running, alone):
        assert relative_error(engine.finish(one), expected) < 1e-5


def test_a_capture_of_what_reads_spans_serves_these_alone(load_pipe):
    """cuDNN's calls are recorded with their places; FlashAttention reads them on the device."""
    plan = MemoryPlan.plain(layers=3, kept_bytes=2 << 30, capture=True)
    prompts = ["A cat.", "A dog that sleeps on a red sofa beside a window.", "A bird, small."]
    for reads, captures in (((), 0), (("flash",), len(prompts) + 1)):
        pipe = load_pipe(attention="flash", memory=plan)
        pipe.engine.graphs, events = recording_graphs()
        request = {**EDIT, "input_images": None, "num_inference_steps": 5}
        for prompt in prompts:  # until the cache has room for all
            pipe(**{**request, "prompt": prompt})
        before = events.count("capture")
        with mock.patch.object(library, "READS_SPANS", reads):
            for prompt in [prompts[0], *prompts]:
                pipe(**{**request, "prompt": prompt})
        assert (events.count("capture") - before > 0) == (captures > 0)


def test_a_loop_that_is_taken_over_has_the_new_calls_spans(load_pipe):
    """Eager steps of a captured loop read them on the host."""
    pipe = load_pipe(attention="flash")
    plan = MemoryPlan.plain(layers=3, kept_bytes=2 << 30, capture=True)
    plan = replace(plan, precision=pipe.engine.precision)
    pipe.engine.graphs, _ = recording_graphs()
    found = []
    for prompt in ("A cat.", "A dog that sleeps on a red sofa.", "A bird, small."):
        call = {**EDIT, "input_images": None, "prompt": prompt}
        pipe(**call, memory=plan)
        kept = pipe.engine.graphs._captured.loop
        running = pipe.engine.start(pipe.make_call(**call), plan)
        assert running.loop is kept
        (groups,) = kept._groups.values()
        (one,) = groups
        starts = [span.start for entry in running.entries for span in pipe.engine.cache[entry]]
        assert sorted(one.spans[4::6]) == sorted(starts)
        assert one.spans[4::6] == one.cache_start.tolist()
        found.append(one.spans)
        pipe.engine.drop(running)
    assert found[0] != found[1] != found[2]


def test_by_default_nothing_changes(load_pipe, pipe, calls):
    for attention in ("auto", "triton"):
        other = load_pipe(attention=attention)
        assert other.attention == "triton" and other.engine.precision.attention == attention
        assert torch.equal(other(**EDIT), pipe(**EDIT))
        pipe.clear_cache()
    assert not calls and not winners.WINNERS


def test_a_callers_own_choice_stays(flash, calls):
    with ops.use("reference"):
        flash(**EDIT)
    with ops.use(attention="library"):
        flash(**EDIT)
    assert not calls
    with attending("triton"):
        assert ops.choice().attention == "triton"
    with attending("cudnn"):
        assert ops.choice().attention == "cudnn"


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (
            {"attention": "cudnn"},
            'can\'t be had on cpu: it is for NVIDIA GPUs; use attention="triton"',
        ),
        ({"attention": "flash2"}, "must be auto, triton, flash or cudnn, got 'flash2'"),
        ({"attention": None}, "must be a name such as flash, got None"),
        (
            {"attention": "flash", "cache": "int8"},
            "no keys and values in int8; use attention=triton",
        ),
    ),
    ids=str,
)
def test_refusals(arguments, said):
    with mock.patch("omnigen_fast.pipeline.Vae") as vae, pytest.raises(RequestError) as error:
        OmniGenPipeline.from_pretrained(TINY, **arguments)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not vae.from_folder.called  # before anything is read


def test_refused_changes_leave_the_pipeline_as_it_was(load_pipe):
    pipe = load_pipe(attention="flash")
    expected = pipe(**EDIT)
    real = library.why_not

    def no_bfloat16(name, device, dtype, head_dim):
        return (
            "it takes no bfloat16"
            if dtype == torch.bfloat16
            else real(name, device, dtype, head_dim)
        )

    with mock.patch.object(library, "why_not", no_bfloat16):
        for change in (
            lambda: pipe.to(torch.bfloat16),
            lambda: pipe(**EDIT, dtype="bfloat16"),
            lambda: pipe.plan(**EDIT, dtype="bfloat16"),
        ):
            with pytest.raises(RequestError, match=r"flash.*takes no bfloat16"):
                change()
    assert pipe.dtype == torch.float32 and torch.equal(pipe(**EDIT), expected)


@pytest.fixture
def on_a_card(monkeypatch):
    """A card that somebody has measured: `on_a_card({96: "flash"}, reason)`."""

    def use(fastest, reason=None):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H200")
        monkeypatch.setitem(winners.WINNERS, "NVIDIA H200", fastest)
        monkeypatch.setattr(library, "why_not", lambda *_: reason)

    return use


def test_auto_takes_the_winner_of_the_card(on_a_card):
    config = released_sizes()
    on_a_card({96: "cudnn"})
    assert attention_for(HALF, config, GPU) == "cudnn"
    assert attention_for(HALF, config, CPU) == "triton"
    assert attention_for(replace(HALF, attention="triton"), config, GPU) == "triton"
    assert attention_for(replace(HALF, cache="int8"), config, GPU) == "triton"
    on_a_card({96: "cudnn"}, "it takes bfloat16 and float16, not float32")
    assert attention_for(Precision.of("float32"), config, GPU) == "triton"
    with pytest.raises(RequestError, match=r"on cuda:0: it takes bfloat16.*use attention"):
        attention_for(Precision.of("float32", attention="flash"), config, GPU)
    on_a_card({64: "cudnn"})
    assert attention_for(HALF, config, GPU) == "triton"
    on_a_card({96: "triton"})
    assert attention_for(HALF, config, GPU) == "triton"


def loop_bytes(attention, profile="h200", cache=None):
    precision = Precision.of("bfloat16", cache=cache, attention=attention)
    config = released_sizes()
    work = typical_workload(1024, 1024, images=1)
    estimate = ByteEstimate(config, VaeShape(), precision, work, load_profile(profile))
    return estimate.loop_bytes(MemoryPlan.plain(config.num_layers))


def test_what_a_library_takes_is_counted(on_a_card):
    plain = loop_bytes("triton")
    assert loop_bytes("auto") == plain
    # outputs in bfloat16 and log-sum-exps in float32 of three branches, twice
    beside = 2 * 3 * 4096 * (3072 * 2 + 32 * 4)
    assert loop_bytes("flash") == loop_bytes("cudnn") == plain + beside
    on_a_card({96: "flash"})
    assert loop_bytes("auto") == plain + beside
    assert loop_bytes("auto", "a800") == plain
    assert loop_bytes("auto", cache="int8") == loop_bytes("triton", cache="int8")


def test_the_option(monkeypatch, tmp_path):
    given = []
    load = OmniGenPipeline.from_pretrained.__func__

    def watched(cls, *args, **named):
        given.append(named["attention"])
        return load(cls, *args, **named)

    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", classmethod(watched))
    monkeypatch.chdir(tmp_path)
    small = ("--model", str(TINY), "--height", "32", "--width", "32", "--steps", "1", "--quiet")
    (tmp_path / "lines.jsonl").write_text('{"id": "a", "prompt": "a cat", "seed": 1}')
    for command in (
        ("generate", "--prompt", "a cat", *small, "--out", "one.png"),
        ("batch", "lines.jsonl", *small),
    ):
        for more, expected in ((("--attention", "flash"), "flash"), ((), "auto")):
            folder = [expected] if command[0] == "batch" else []
            done = CliRunner().invoke(main, [*command, *folder, *more])
            assert done.exit_code == 0, done.output
            assert given[-1:] == [expected] or command[0] == "batch"
    wrong = ["generate", "--prompt", "a", *small, "--out", "a.png", "--attention", "cudnn"]
    done = CliRunner().invoke(main, wrong)
    assert done.exit_code != 0 and "for NVIDIA GPUs" in done.output


def test_plans_count_it():
    found = {}
    for name in ("auto", "triton", "flash"):
        arguments = ["plan", "--device", "h200", "--attention", name, "--explain"]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        found[name] = done.output
    assert found["auto"] == found["triton"] != found["flash"]
    refused = ["plan", "--device", "h200", "--attention", "flash", "--cache", "int8"]
    done = CliRunner().invoke(main, refused)
    assert done.exit_code != 0 and "no keys and values in int8" in done.output
