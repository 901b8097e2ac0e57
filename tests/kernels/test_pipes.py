"""The pipe model on small pieces of machine code, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.kernels import bounds, pipes

# Of a warp: 2 products, 2 exponentials, one of each other kind; a copy and 2 fragments by LDSM.
TURN = """
        LDGSTS.E.BYPASS.128 [R2], [R4.64]
        LDSM.16.M88.4 R8, [R6]
        LDSM.16.MT88.2 R12, [R6+0x400]
        HMMA.16816.F32.BF16 R16, R8, R12, RZ
        FMNMX R20, R16, R17, !PT
        SHFL.BFLY PT, R21, R20, 0x2, 0x1f
        FFMA R22, R16, c[0x0][0x1a0], -R20
        MUFU.EX2 R23, R22
        MUFU.EX2 R24, R21
        F2FP.BF16.PACK_AB R25, R24, R23
        STS.128 [R7], R24
        LDS R26, [R7]
        IMAD R27, R26, R3, RZ
        HMMA.16816.F32.BF16 R28, R25, R12, R28
"""
COUNTED = pipes.Turn(
    instructions=15,  # with the branch back
    products=2,
    multiplies=2 * 16 * 8 * 16,
    tcgen05=0,
    mufu=2,
    fp32=1,
    imad=1,
    alu=2,
    shuffle=1,
    fed=(4 + 2) * 128,
    shared=32 * (16 + 4),
)


def disassembly(text: str) -> str:
    """Lines as nvdisasm prints them: addresses, labels at the margin."""
    lines = []
    for place, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        if line.endswith(":"):
            lines.append(line)
        else:
            guard = "" if line.startswith("@") else " " * 5
            lines.append(f"        /*{16 * place:04x}*/              {guard}{line} ;")
    return "\n".join(lines)


def loop(turn: str, after: str = "", label: str = ".L_x_0") -> str:
    """A loop between a beginning and an end."""
    return disassembly(f"S2R R0, SR_TID.X\n{label}:\n{turn}\n@P0 BRA `({label})\n{after}\nEXIT")


def test_a_plain_loop():
    assert pipes.main_turn(loop(TURN)) == COUNTED


def test_instructions_that_are_never_done_take_only_issue():
    found = pipes.main_turn(loop(TURN + "@!PT LDS RZ, [RZ]\n" * 3))
    assert found == replace(COUNTED, instructions=18)


def test_what_comes_before_and_after_the_loop_is_not_counted():
    code = disassembly(TURN) + "\n" + loop(TURN, after=TURN)
    assert pipes.main_turn(code) == COUNTED


@pytest.mark.parametrize("uniform", (False, True))
def test_a_region_that_most_turns_skip(uniform):
    """A cut block's mask: in the body, under a branch that leads over it."""
    branch = "BRA.U !UP1, `(.L_x_9)" if uniform else "@!P1 BRA `(.L_x_9)"
    masked = "FSEL R16, R16, -INF, P2\n" * 8
    turn = TURN.replace("FMNMX", f"{branch}\n{masked}.L_x_9:\nFMNMX")
    found = pipes.main_turn(loop(turn))
    assert found == replace(COUNTED, instructions=16)


def test_a_region_with_products_is_no_detour():
    """One thread of a CTA starts the products of 10.x, under a branch round them."""
    products = "@P1 BRA `(.L_x_9)\n" + "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]\n" * 3 + ".L_x_9:"
    found = pipes.main_turn(loop(f"{products}\nMUFU.EX2 R3, R4"))
    assert (found.tcgen05, found.mufu, found.multiplies) == (3, 1, 0)


def test_cold_blocks_behind_the_loop():
    """A wait that failed is repeated out of line and jumps back into the loop, past its head."""
    turn = "SYNCS.PHASECHK P1, [UR4]\n@!P1 BRA `(.L_x_5)\n.L_x_6:\n" + TURN
    cold = "EXIT\n.L_x_5:\nSYNCS.PHASECHK P1, [UR4]\n@!P1 BRA `(.L_x_5)\nBRA `(.L_x_6)"
    assert pipes.main_turn(loop(turn, cold)) == replace(COUNTED, instructions=17)


def test_of_two_loops_the_one_that_copies():
    """What masks the last blocks has no pipeline of copies, however many products it has."""
    masked = TURN.replace("LDGSTS.E.BYPASS.128 [R2], [R4.64]", "LDG.E.128 R2, [R4.64]") * 2
    code = loop(masked, after=f".L_x_7:\n{TURN}\n@P0 BRA `(.L_x_7)")
    assert pipes.main_turn(code) == COUNTED


def test_the_inner_of_two_loops():
    inner = f".L_x_1:\n{TURN}\n@P1 BRA `(.L_x_1)\nMUFU.RCP R1, R2"
    assert pipes.main_turn(loop(inner)) == COUNTED


def test_products_of_a_group_of_warps():
    """A from registers or from shared memory; a warp has a quarter of the group's work."""
    found = pipes.main_turn(
        loop(
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT\n"
            "HGMMA.64x32x16.F32.BF16 R88, R140, gdesc[UR4].tnspB, R88\n"
            "LDSM.16.M88.4 R8, [R6]"
        )
    )
    assert found.multiplies == (64 * 128 * 16 + 64 * 32 * 16) // 4
    assert found.fed == ((64 + 128) * 16 * 2 + 32 * 16 * 2) // 4
    assert found.shared == 512  # fragments of nothing that the products read


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        ("MUFU.EX2 R3, R4", "no loop multiplies matrices"),
        (TURN + "FROB.X4 R1, R2", "no pipe for the instruction FROB.X4"),
        (TURN + "USETMAXREG.DEALLOC.CTAPOOL 0x28", "no pipe for the instruction USETMAXREG"),
        (TURN + "BRX R2 -0x10", "an indirect branch"),
        ("HMMA.16832.F32 R1, R2, R3, R4", "an unknown shape of HMMA.16832.F32"),
        ("HGMMA.SP.F32 R1, R2, R3", "an unknown shape of HGMMA.SP.F32"),
    ],
)
def test_code_that_can_not_be_counted(turn, match):
    with pytest.raises(ValueError, match=match):
        pipes.main_turn(loop(turn))


def test_spills_in_loops():
    assert pipes.loop_spills(loop("LDL R2, [R1]\nIADD3 R2, R2, R3, RZ\nSTL [R1], R2")) == 2
    assert pipes.loop_spills(loop(TURN, after="STL [R1], R2\nLDL R3, [R1]")) == 0
    # wherever in the code the loop goes on, and in the turns that most skip
    cold = "EXIT\n.L_x_5:\nLDL R2, [R1]\nBRA `(.L_x_6)"
    turn = f"@!P1 BRA `(.L_x_5)\n.L_x_6:\n{TURN}"
    assert pipes.loop_spills(loop(turn, cold)) == 1


# What shipped for 8.0 once, with heads of 96: 128 x 64 by 8 warps.
TILE = pipes.Tile(block_m=128, block_n=64, head_dim=96, warps=8)
STEP = pipes.Turn(
    instructions=466,
    products=96,
    multiplies=196608,
    tcgen05=0,
    mufu=34,
    fp32=120,
    imad=33,
    alu=86,
    shuffle=8,
    fed=27648,
    shared=384,
)


def test_cycles_of_each_pipe():
    found = pipes.cycles(80, STEP, TILE)
    assert tuple(found) == pipes.PIPES
    assert {pipe: round(value) for pipe, value in found.items()} == {
        "matrix": 1536,  # 2 x 128 x 64 x 96 / 1024
        "mufu": 544,
        "fma": 612,
        "alu": 344,
        "shuffle": 64,
        "shared": 1944,  # fragments 1728, maxima and sums 24, copies 192
        "l2": 523,
        "issue": 932,
    }
    # twice the float32 lanes, a quarter of the matrix units
    later = pipes.cycles(86, STEP, TILE)
    assert (round(later["fma"]), later["matrix"]) == (306, 6144)


@pytest.mark.parametrize(
    ("capability", "ctas", "overlapped", "separate"),
    [
        (80, 1, 1536 / 1944, 1536 / (1728 + 740)),
        (80, 2, 1536 / 1944, 1536 / 1944),
        (86, 1, 1.0, 6144 / (6144 + 740)),
        (86, 2, 1.0, 1.0),
    ],
)
def test_bounds(capability, ctas, overlapped, separate):
    found = pipes.bounds(capability, STEP, TILE, ctas)
    assert found.overlapped == pytest.approx(overlapped)
    assert found.separate == pytest.approx(separate)


def test_products_of_tensor_memory():
    """Their shape is not in the code: the tile says it, and how many they must be."""
    turn = replace(STEP, tcgen05=(64 + 32) // 16 + 2 * 64 // 16, multiplies=0, products=14, fed=0)
    found = pipes.cycles(100, turn, TILE)
    assert found["matrix"] == 384
    # queries and keys once, values once
    assert found["shared"] == (2 * 96 * (128 + 64 + 64) + 8 * 384 + 2 * 2 * 64 * 96) / 128


def test_products_in_8_bits_of_warps():
    """Twice as deep as those of bfloat16; fragments are fed all the same."""
    for op in ("IMMA.16832.S8.S8", "QMMA.16832.F32.E4M3.E4M3"):
        found = pipes.main_turn(loop(f"LDSM.16.M88.4 R8, [R6]\n{op} R16, R8, R12, R16"))
        assert (found.products, found.multiplies, found.fed) == (1, 16 * 8 * 32, 512)


def test_products_in_8_bits_of_a_group_of_warps():
    found = pipes.main_turn(
        loop(
            "IGMMA.64x256x32.S8.S8 R24, gdesc[UR20], RZ, !UPT\n"
            "QGMMA.64x128x32.F32.E4M3.E4M3 R88, gdesc[UR4], R88"
        )
    )
    assert found.multiplies == (64 * 256 * 32 + 64 * 128 * 32) // 4
    assert found.fed == ((64 + 256) * 32 + (64 + 128) * 32) // 4


PRODUCT = pipes.ProductTile(block_m=128, block_n=256, block_k=128, warps=8, form="fp8")


@pytest.mark.parametrize(
    ("capability", "form", "matrix"),
    [(80, "int8", 2048), (86, "int8", 4096), (89, "fp8", 8192), (90, "int8", 1024)],
)
def test_cycles_of_a_product(capability, form, matrix):
    tile = replace(PRODUCT, form=form)
    turn = replace(STEP, multiplies=tile.multiplies // 8, mufu=0)
    found = pipes.cycles(capability, turn, tile)
    assert found["matrix"] == matrix  # 128 x 256 x 128 over the rate in 8 bits
    assert found["l2"] == (128 + 256) * 128 / pipes.RATES[capability].l2
    with pytest.raises(ValueError, match="matrix products, its tile"):
        pipes.cycles(capability, STEP, tile)


def test_a_product_of_tensor_memory():
    turn = replace(STEP, tcgen05=4, multiplies=0, fed=0, shared=0)
    found = pipes.cycles(100, turn, PRODUCT)
    assert (found["matrix"], found["shared"]) == (512, 2 * (128 + 256))  # fed and copied


@pytest.mark.parametrize("change", [{"multiplies": 98304}, {"tcgen05": 7}])
def test_code_that_does_not_do_the_tile(change):
    with pytest.raises(ValueError, match="matrix products, its tile"):
        pipes.cycles(80, replace(STEP, **change), TILE)


COUNTS = {"ctas": 2, "loop_spills": 0, "overlapped": 0.96, "separate": 0.9}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"overlapped": 0.951, "separate": 0.99, "ctas": 3}, []),
        ({"overlapped": 0.949}, ["overlapped: 94.9%, committed 96.0%"]),
        ({"separate": 0.8}, ["separate: 80.0%, committed 90.0%"]),
        ({"ctas": 1}, ["CTAs: 1, committed 2"]),
        ({"loop_spills": 3}, ["3 accesses to spilled registers in loops"]),
    ],
)
def test_the_guard(change, said):
    assert bounds.worse({**COUNTS, **change}, COUNTS) == said


def test_the_guard_wants_every_case():
    assert bounds.worse(COUNTS, None) == ["no committed counts"]
    committed = bounds.read_committed()["cases"]
    assert set(committed) == {case.id for case in bounds.cases()}
