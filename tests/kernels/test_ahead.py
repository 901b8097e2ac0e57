"""Every shipped launch configuration compiles for its GPU, to the machine code that was meant.

Needs no GPU: Triton compiles for any, and its package brings the disassembler.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from machine_code import compile_selected
from omnigen_fast.kernels import launch, ops

from bench.kernels import ahead, bounds

pytestmark = pytest.mark.early

CASES = list(ahead.cases())


def quick_cases() -> set[str]:
    """Ids of a case for each generation, each of another kernel: attention and products first."""
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    kernels.sort(key=lambda kernel: not kernel.startswith(("attention_", "scaled_mm_")))
    return {
        next(
            one.id
            for one in CASES
            if (one.kernel, one.capability, one.dtype) == (kernel, capability, "bf16")
        )
        for kernel, capability in zip(kernels, ahead.LIMITS)
    }


def parameters(cases: Iterable[ahead.Case]) -> list:
    """Those of a test of each case; all but the quick ones are slow."""
    quick = quick_cases()
    return [
        pytest.param(one, id=one.id, marks=() if one.id in quick else pytest.mark.slow)
        for one in cases
    ]


@pytest.fixture(scope="module")
def compiled(request) -> dict[str, ahead.Compiled | str]:
    """The machine code of the tests' cases, or the error, from as many processes as cores here."""
    results = compile_selected(request, ahead.__name__, ahead.Compiled.read)
    request.config.compiled_table = table(results)
    return results


def table(results: dict[str, ahead.Compiled | str]) -> str:
    rows = [("kernel", "target", "configuration", "registers", "shared", "spills", "occupancy")]
    for case in (one for one in CASES if one.id in results):
        code = results[case.id]
        kernel, _, target = case.id.rpartition("-")
        if isinstance(code, ahead.Compiled):
            shared, spills = f"{code.shared / 1024:.1f} KB", f"{code.spills} B"
            rest = code.config, str(code.registers), shared, spills, f"{code.occupancy:.0%}"
        else:
            rest = ("does not compile", "", "", "", "")
        rows.append((kernel, target, *rest))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _triton() -> tuple[int, ...]:
    """Version of the Triton that runs here, as (3, 7)."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def _units_of(case: ahead.Case) -> set[str]:
    """The matrix instructions in 8 bits that a case's code has."""
    if case.kernel != "scaled_mm_":
        return set()
    # before Triton 3.8, products in int8 are the warps' own again on Blackwell
    int8 = "tcgen05" if _triton() >= (3, 8) else "imma"
    own = {90: {"int8": "igmma", "fp8": "qgmma"}, 100: {"int8": int8, "fp8": "tcgen05"}}
    return {own.get(case.capability, {"int8": "imma", "fp8": "qmma"})[case.form]}


@pytest.mark.parametrize("case", parameters(CASES))
def test_machine_code(case, compiled):
    code = compiled[case.id]
    assert isinstance(code, ahead.Compiled), code
    assert code.loop_spills == 0
    if case.capability < 100 and _counted_with_this_triton():  # others spill before their loops
        assert code.spills == 0
    assert code.shared <= ahead.LIMITS[case.capability].shared_block
    assert code.occupancy > 0
    assert code.wide_loads
    if case.kernel.startswith("dequantise_"):
        assert code.narrow_loads <= 6  # scales: one for each group of which a thread has a part
    elif not case.is_attention:
        assert not code.narrow_loads
        names = ("imma", "igmma", "qmma", "qgmma", "tcgen05")
        units = {name for name in names if getattr(code, name)}
        assert units == _units_of(case)
        assert bool(code.async_copies) == bool(units)
    elif case.dtype == "bf16":
        products = {90: code.hgmma, 100: code.tcgen05}
        assert products.get(case.capability, code.hmma)
        assert code.async_copies
        assert bool(code.map_copies) == case.tensor_maps
    else:  # exact products are not the matrix units'
        assert not code.hgmma and not code.hmma and not code.tcgen05


def _counted_with_this_triton() -> bool:
    """Whether `pipes.json` is of the Triton that runs here."""
    import triton

    return triton.__version__ == bounds.read_committed()["triton"]


@pytest.mark.parametrize("case", parameters(bounds.cases()))
def test_no_bound_falls(case, compiled):
    """Of the Triton that the counts were made with; another's code can only be counted."""
    code, committed = compiled[case.id], bounds.read_committed()
    assert isinstance(code, ahead.Compiled), code
    counts = bounds.count(case, code)  # raises for code that the model does not understand
    if not _counted_with_this_triton():
        pytest.skip(f"the committed counts are those of Triton {committed['triton']}")
    assert not bounds.worse(counts, committed["cases"].get(case.id))


def test_every_operation_has_a_configuration_for_every_generation():
    attention = {
        f"{name}/{head_dim}/{bits}"
        for name in ("attention_step", "attention_step_8bit", "attention_prefill")
        for head_dim in (64, 96, 128)
        for bits in (16, 32)
    }
    rows = {name for name in ops.OPERATIONS if not name.startswith("attention_")}
    assert set(launch.TABLE) == set(ahead.LIMITS)
    for capability, entries in launch.TABLE.items():
        assert set(entries) == attention | rows, capability


@pytest.mark.parametrize(
    ("capability", "nearest"),
    [
        *((known, known) for known in launch.TABLE),
        *((75, 80), (87, 86), (88, 86), (101, 100), (103, 100), (110, 100), (121, 120), (200, 120)),
    ],
)
def test_other_generations_take_the_nearest(capability, nearest):
    found = launch.lookup("attention_step", capability, 96)
    assert found == launch.TABLE[nearest]["attention_step/96/16"]
