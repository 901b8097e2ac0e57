"""What the runtime does on AMD's GPUs, with a stand-in for what PyTorch for ROCm says of one."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from omnigen_fast.kernels import launch, ops

from omnigen_fast import profiles
from omnigen_fast.cli.main import main
from omnigen_fast.errors import RequestError
from omnigen_fast.memory.device import capability_of, profile_of
from omnigen_fast.pipeline import check_compute
from omnigen_fast.streaming import HostMemory

GPU = torch.device("cuda", 0)
# capabilities as ROCm gives them, which would be Hopper and Blackwell of CUDA
MI300X = ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", (9, 4), 206_141_652_992)
RX9070 = ("AMD Radeon Graphics", "gfx1201", (12, 0), 17_095_000_000)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered of another test's GPU."""
    caches = (launch.capability_of, ops._why_not, ops._notice)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Makes PyTorch one for ROCm, on a machine with a GPU."""

    def make(name: str, architecture: str, capability: tuple[int, int], memory: int) -> None:
        card = SimpleNamespace(
            name=name,
            gcnArchName=architecture,
            major=capability[0],
            minor=capability[1],
            total_memory=memory,
        )
        monkeypatch.setattr(torch.version, "hip", "7.2.26015")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: card)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return make


def on_a_gpu(bits: int = 16) -> mock.Mock:
    tensor = mock.Mock(spec=torch.Tensor)
    tensor.is_cuda, tensor.device = True, GPU
    tensor.element_size.return_value = bits // 8
    return tensor


def test_nvidia_has_no_architecture():
    assert torch.version.hip is None and launch.architecture_of(0) is None


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx950:sramecc+:xnack-", "gfx950"),
        ("gfx1100", "gfx1100"),
        ("gfx1201", "gfx1201"),
        ("gfx90a:sramecc+:xnack-", "gfx942"),
        ("gfx1151", "gfx1100"),
    ],
)
def test_a_device_finds_its_entry(install, caplog, architecture, entry):
    """By the architecture's name, not by a compute capability that means something else."""
    install("AMD card", architecture, (12, 0), 16 << 30)
    own = architecture.partition(":")[0]
    assert launch.capability_of(0) == own and capability_of(GPU) == own
    assert (
        launch.choose("attention_step", on_a_gpu(), 96)
        == (launch.AMD[entry]["attention_step/96/16"])
    )
    assert launch.choose("rms_norm", on_a_gpu(32)) == launch.AMD[entry]["rms_norm"]
    with caplog.at_level(logging.WARNING, "omnigen_fast"):
        for _ in range(3):
            assert ops._why_not(0) is None
            assert ops._implementation(on_a_gpu()) is ops._triton()
    said = [record.message for record in caplog.records]
    assert said == (
        [] if own == entry else [f"No launch configurations for {own}: those of {entry} run."]
    )
    assert ops.capturable(GPU)  # through the same CUDA graphs of PyTorch


@pytest.mark.parametrize("architecture", ["gfx1030", "gfx906:sramecc+:xnack-", "gfx908", "gfx803"])
def test_plain_operations_where_there_are_no_matrix_units(install, caplog, architecture):
    install("AMD card", architecture, (10, 3), 16 << 30)
    with caplog.at_level(logging.WARNING, "omnigen_fast"):
        for _ in range(3):
            assert ops._implementation(on_a_gpu()) is ops._REFERENCE
    (record,) = caplog.records
    own = architecture.partition(":")[0]
    assert record.message == (
        f"The Triton kernels can't run here: {own} is not gfx90a, gfx94x, gfx95x, gfx11 or gfx12. "
        "Plain PyTorch runs instead."
    )
    assert not ops.capturable(GPU)
    with ops.use("triton"), pytest.raises(RuntimeError, match=f"can't run on cuda:0: {own} is not"):
        ops._implementation(on_a_gpu())


@pytest.mark.parametrize("architecture", ["gfx942:sramecc+:xnack-", "gfx1100", "gfx90a"])
def test_fp8_is_refused_where_its_format_is_another(install, architecture):
    install("AMD card", architecture, (12, 0), 16 << 30)
    check_compute("int8", GPU)
    check_compute(None, GPU)
    own = architecture.partition(":")[0]
    with pytest.raises(RequestError) as caught:
        check_compute("fp8", GPU)
    assert str(caught.value) == (
        f"compute=fp8 needs an AMD GPU of gfx950 or gfx12, this one is {own}; use compute=int8"
    )


@pytest.mark.parametrize("architecture", ["gfx950:sramecc+:xnack-", "gfx1201", "gfx1200"])
def test_fp8_runs_where_its_format_is_the_same(install, architecture):
    install("AMD card", architecture, (9, 5), 16 << 30)
    check_compute("fp8", GPU)


@pytest.mark.parametrize(
    ("card", "profile"),
    [
        (MI300X, "mi300x"),
        (("AMD Radeon RX 7900 XTX", "gfx1100", (11, 0), 25_753_026_560), "rx7900xtx"),
        (("AMD Radeon RX 9070 XT", "gfx1201", (12, 0), 17_095_000_000), "rx9070xt"),
    ],
)
def test_a_card_has_its_profile(install, card, profile):
    install(*card)
    found, expected = profile_of(GPU), profiles.load(profile)
    assert found.name == expected.name and found.capability == expected.capability
    assert found.memory_bytes == card[-1]


@pytest.mark.parametrize(
    ("architecture", "gigabytes", "profile"),
    [
        ("gfx1201", 17.1, "rx9070xt"),
        ("gfx1200", 17.1, "rx9070xt"),
        ("gfx1101", 17.1, "rx7900xtx"),
        ("gfx1151", 64.0, "rx7900xtx"),
        ("gfx950", 309.0, "mi300x"),
        ("gfx90a", 68.7, "mi300x"),
        ("gfx1030", 17.2, "rx7900xtx"),
    ],
)
def test_other_cards_have_the_nearest_profile(install, architecture, gigabytes, profile):
    """Of AMD's, even where a capability of CUDA would be the same number."""
    install("AMD Radeon Graphics", architecture, (12, 0), round(gigabytes * 1e9))
    found, nearest = profile_of(GPU), profiles.load(profile)
    assert found.name == f"AMD Radeon Graphics (rates of {nearest.name}, the nearest profile)"
    assert found.capability == architecture
    assert found.bf16_flops_per_second == nearest.bf16_flops_per_second


def test_nvidias_cards_have_no_profile_of_amd():
    for capability in ("7.5", "9.4", "11.0", "12.0", "12.1"):
        for gigabytes in (8, 16, 24, 192, 288):
            found = profiles.nearest(capability, gigabytes * 1e9)
            assert not str(found.capability).startswith("gfx")


def test_page_locking_goes_through_the_same_calls(install):
    install(*MI300X)
    runtime = mock.Mock()
    runtime.cudaHostRegister.return_value = 0
    with mock.patch.object(torch.cuda, "cudart", return_value=runtime):
        tensor = HostMemory(GPU, most_locked_bytes=1 << 20).empty((16, 16), torch.bfloat16)
        runtime.cudaHostRegister.assert_called_once_with(tensor.data_ptr(), 512, 0)
        address = tensor.data_ptr()
        del tensor
        runtime.cudaHostUnregister.assert_called_once_with(address)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (MI300X, "cuda:0: the kernels are compiled for gfx942, but not run on a card"),
        (RX9070, "cuda:0: the kernels are compiled for gfx1201, but not run on a card"),
        (
            ("AMD Radeon RX 6900 XT", "gfx1030", (10, 3), 17_163_091_968),
            "cuda:0: there are no kernels for gfx1030; plain PyTorch runs",
        ),
    ],
)
def test_doctor_says_what_was_not_run(install, card, said):
    from omnigen_fast.cli import doctor

    install(*card)
    found = list(doctor._device())
    assert [one.kind for one in found] == ["ok", "note"]
    assert card[0] in found[0].text and found[1].text == said and found[1].way_out


def test_doctor_finds_a_driver_without_a_build(monkeypatch):
    from omnigen_fast.cli import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path == "/dev/kfd")
    (found,) = doctor._device()
    assert found.kind == "problem" and "an AMD driver is here" in found.text
    assert "without ROCm" in found.text and "ROCm" in found.way_out


def test_env_names_the_architecture(install, monkeypatch):
    install(*MI300X)
    monkeypatch.setattr("omnigen_fast.pipeline.check_device", lambda _device: GPU)
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 0, result.output
    assert "AMD Instinct MI300X, 206.1 GB, capability gfx942" in result.output


def test_plan_knows_amds_cards():
    def run(*arguments: str):
        return CliRunner().invoke(main, ["plan", *arguments])

    for name in ("mi300x", "rx7900xtx", "rx9070xt"):
        result = run("--device", name, "--size", "512")
        assert result.exit_code == 0, result.output
        assert "shares of them that the\nAMD Instinct MI300X attains" in result.output
    refused = run("--device", "mi300x", "--compute", "fp8")
    assert refused.exit_code == 2
    assert "this one is gfx942; use compute=int8" in refused.output
    assert run("--device", "rx9070xt", "--size", "512", "--compute", "fp8").exit_code == 0
    (line,) = run("--device", "mi325x").output.splitlines()
    assert "give a file, or mi300x, whose name is nearest" in line
