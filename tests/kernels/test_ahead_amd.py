"""Every shipped launch configuration of AMD's GPUs compiles to the machine code that was meant.

Needs no GPU. None of this has run on a card.
"""

from __future__ import annotations

import pytest
from machine_code import compile_selected
from omnigen_fast.kernels import launch, ops

from bench.kernels import ahead_amd

CASES = list(ahead_amd.cases())

# What Triton writes, shortened: a loop inside a loop, and a branch forward.
_ASSEMBLY = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
attention_step_kernel:
.Lfunc_begin0:
	.loc	1 20 0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
	s_cbranch_scc1 .LBB0_4
.LBB0_1:
	global_load_dwordx4 v[8:11], v[2:3], off
	global_load_dwordx2 v[8:9], v[2:3], off
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
	s_cbranch_vccnz .LBB0_2
	s_branch .LBB0_1
.LBB0_4:
	scratch_load_dword v1, off, off
	s_endpgm
  - .agpr_count:     0
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 1
    .vgpr_count:     186
    .vgpr_spill_count: 2
    .wavefront_size: 64
"""


def test_an_assembly_is_read():
    found = ahead_amd.read(_ASSEMBLY, 4, 24576, "block_m=128")
    assert (found.registers, found.spills, found.shared) == (186, 3, 24576)
    assert found.scratch == 8 + 1 and (found.warps, found.lanes) == (4, 64)
    assert found.products == {"v_mfma_f32_32x32x8_bf16": 2}
    assert found.anywhere == {"v_mfma_f32_32x32x8_bf16": 3}
    assert found.wide_loads == 2
    straight = _ASSEMBLY.replace("s_cbranch_vccnz .LBB0_2", "").replace("s_branch .LBB0_1", "")
    assert ahead_amd.read(straight, 4, 0, "").products == {}
    with pytest.raises(ValueError, match="no vgpr_spill_count in the assembly"):
        ahead_amd.read(_ASSEMBLY.replace(".vgpr_spill_count", ".other"), 4, 0, "")


def test_every_operation_has_a_configuration_for_every_architecture():
    attention = {
        f"{name}/{head_dim}/{bits}"
        for name in ("attention_step", "attention_step_8bit", "attention_prefill")
        for head_dim in (64, 96, 128)
        for bits in (16, 32)
    }
    rows = {name for name in ops.OPERATIONS if not name.startswith("attention_")}
    assert set(launch.AMD) == set(ahead_amd.LIMITS)
    for architecture, entries in launch.AMD.items():
        assert set(entries) == attention | rows, architecture
        assert not any(one.tensor_maps for one in entries.values())  # NVIDIA's copy engine


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [
        *((known, known) for known in launch.AMD),
        *(("gfx90a", "gfx942"), ("gfx940", "gfx942"), ("gfx1101", "gfx1100")),
        *(("gfx1151", "gfx1100"), ("gfx1200", "gfx1201"), ("gfx951", "gfx950")),
        *(("gfx906", None), ("gfx908", None), ("gfx1030", None), ("gfx1300", None), ("", None)),
    ],
)
def test_other_architectures_take_the_nearest(architecture, entry):
    assert launch.entry_of(architecture) == entry
    if entry is not None:
        found = launch.lookup("attention_step", architecture, 96)
        assert found == launch.AMD[entry]["attention_step/96/16"]


@pytest.fixture(scope="module")
def compiled(request) -> dict[str, ahead_amd.Compiled | str]:
    """The machine code of the tests' cases, or the error."""
    return compile_selected(request, ahead_amd.__name__, lambda code: ahead_amd.Compiled(**code))


def _ends(case: ahead_amd.Case) -> tuple[str, ...]:
    """What the names of a case's matrix instructions end with; `_xf32` would not be exact."""
    if case.kernel == "scaled_mm_":
        return {"int8": ("_i8", "_iu8"), "fp8": ("_fp8_fp8", "_f8f6f4")}[case.form]
    return ("_bf16",) if case.dtype == "bf16" else ("_f32",)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_machine_code(case, compiled):
    code, limits = compiled[case.id], ahead_amd.LIMITS[case.capability]
    assert isinstance(code, ahead_amd.Compiled), code
    assert code.spills == 0 and code.scratch == 0
    assert code.shared <= limits.shared
    assert code.lanes == limits.lanes and code.warps * code.lanes <= 1024
    assert code.wide_loads
    if case.uses_matrix_units or case.kernel == "scaled_mm_":
        assert code.products
    elif not case.is_attention:
        assert not code.anywhere
    for name in code.anywhere:
        assert name.startswith(limits.units)
        assert name.endswith(_ends(case)), name
