"""A model of the pipes of a multiprocessor, fed with the machine code of a loop of matrix products.

From a disassembly, `main_turn` counts what one turn of the main loop asks of each pipe; `cycles`
puts that over the pipes' rates; `bounds` says which share of the matrix units' rate is left:

- `overlapped`: all pipes work at once all the time, so the busiest one decides.
- `separate`: a CTA computes either products or everything else (the softmax), never both; only
  the CTAs that share a multiprocessor overlap, freely.

Counted, not measured. The model knows no latencies, no bank conflicts, no first and last turns and
no traffic on the tensor memory of 10.x; on all of these a GPU can only be slower.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a multiprocessor does in a cycle.

    Attributes:
        matrix: multiply-adds of bfloat16 matrix products into float32.
        int8: of int8 ones into int32.
        fp8: of e4m3 ones into float32; 0 where there are none.
        fp32: float32 additions, multiplications and multiply-adds.
        l2: bytes that come from the L2 cache while all multiprocessors read.
        imad: integer multiply-adds, on pipes that float32 uses too.
        alu: integer additions, comparisons, minima, selections, roundings to bfloat16.
        mufu: exponentials and the like.
        shuffle: values that lanes pass to one another.
        shared: bytes into and out of shared memory.
        issue: instructions of warps.
    """

    matrix: int
    int8: int
    fp8: int
    fp32: int
    l2: int
    imad: int = 64
    alu: int = 64
    mufu: int = 16
    shuffle: int = 32
    shared: int = 128
    issue: int = 4


# fp32, imad, alu, mufu, shuffle: the table of arithmetic throughput in the CUDA C++ Programming
# Guide; that roundings run on the ALU pipe is from the documentation of Nsight Compute. matrix,
# int8, fp8: the dense rate in the white paper or data sheet of the device, over its multiprocessors
# and boost clock; in int8 on 10.x that of products of tensor memory: no sheet has that of warps'
# own, which Triton takes there. l2: 5,120 bytes a cycle (A100's white paper, taken for H100 too)
# over the multiprocessors; for the others, where no figure is published, assumed to be H100's.
RATES = {
    80: Rates(matrix=1024, int8=2048, fp8=0, fp32=64, l2=47),  # A100: 312 TFLOP/s, 108 at 1.41 GHz
    86: Rates(
        matrix=256, int8=1024, fp8=0, fp32=128, l2=38
    ),  # RTX 3090: 71 TFLOP/s, 82 at 1.695 GHz
    89: Rates(
        matrix=256, int8=1024, fp8=512, fp32=128, l2=38
    ),  # RTX 4090: 165 TFLOP/s, 128 at 2.52 GHz
    90: Rates(
        matrix=2048, int8=4096, fp8=4096, fp32=128, l2=38
    ),  # H100 SXM: 989 TFLOP/s, 132 at 1.83 GHz
    100: Rates(
        matrix=4096, int8=8192, fp8=8192, fp32=128, l2=38
    ),  # B200: 2,250 TFLOP/s, 148 at 1.85 GHz
    120: Rates(
        matrix=256, int8=1024, fp8=512, fp32=128, l2=38
    ),  # RTX 5090: 209.5 TFLOP/s, 170 at 2.407 GHz
}

PIPES = ("matrix", "mufu", "fma", "alu", "shuffle", "shared", "l2", "issue")

_OF_WARPS = {"HMMA", "IMMA", "QMMA"}
_OF_GROUPS = {"HGMMA": 2, "IGMMA": 1, "QGMMA": 1}  # bytes of an element
_TCGEN05 = {"UTCHMMA", "UTCIMMA", "UTCQMMA"}
_PRODUCTS = {*_OF_WARPS, *_OF_GROUPS, *_TCGEN05}
_COPIES = {"LDGSTS", "UTMALDG", "UBLKCP"}
_SPILLS = {"LDL", "STL"}

# Which pipe an instruction takes beside the issue of its warp.
_PIPE = {
    name: pipe
    for pipe, names in {
        "matrix": "HMMA IMMA QMMA HGMMA IGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA",
        "mufu": "MUFU F2F F2I I2F FRND POPC FLO BREV",
        "fp32": "FADD FMUL FFMA FSWZADD HADD2 HMUL2 HFMA2",
        "fp32 pair": "FADD2 FMUL2 FFMA2",
        "imad": "IMAD IMUL",
        "alu": "IADD IADD3 VIADD LOP3 LOP ISETP SEL FSEL FSETP FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 "
        "VIADDMNMX HMNMX2 PRMT SHF SHL SHR LEA PLOP3 MOV SGXT BMSK P2R R2P IABS F2FP I2FP CS2R "
        "HSETP2 HSET2 FCHK VABSDIFF I2I",
        "shuffle": "SHFL",
        "shared": "LDS LDSM STS STSM ATOMS",
        # "l2" is counted from the tile, not from the copies that fill shared memory
        "none": "LDGSTS UTMALDG UBLKCP LDG STG LDL STL LDC LDCU ULDC LDTM STTM "
        "UIADD3 UMOV ULEA ULOP3 USEL UISETP USHF UIMAD UPRMT UPLOP3 USGXT UP2UR UR2UP UFLO UVIADD "
        "UVIMNMX UIMNMX UBREV UPOPC R2UR S2UR S2R CREDUX REDUX VOTE VOTEU MATCH ELECT "
        "BAR WARPSYNC DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPGROUPSET FENCE MEMBAR ERRBAR BSSY BSYNC "
        "BREAK ARRIVES CCTL UTCBAR UTCATOMSWS NANOSLEEP YIELD PREEXIT ACQBULK NOP BRA JMP EXIT "
        "CALL RET B2R R2B BPT UVIRTCOUNT ENDCOLLECTIVE",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: `guard` is its predicate, "" where it has none."""

    guard: str
    op: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def pipe(self) -> str:
        """Raises: ValueError where the model does not know the instruction."""
        if self.guard == "!PT":  # never done: the compiler fills time with these
            return "none"
        if self.name not in _PIPE:
            raise ValueError(f"no pipe for the instruction {self.op}; add it to pipes.py")
        return _PIPE[self.name]

    @property
    def target(self) -> str | None:
        """The label that a branch leads to."""
        found = re.search(r"`\((\S+)\)", self.operands)
        return found[1] if found and self.name in ("BRA", "JMP") else None

    @property
    def always_leaves(self) -> bool:
        """Whether the next line never follows."""
        conditional = self.guard or re.match(r"!?U?P\d", self.operands)
        return self.name in ("BRA", "JMP", "EXIT", "RET") and not conditional


_LINE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;|^(\.L_\w+):", re.M
)


@dataclass
class _Block:
    """Instructions that follow one another, and the blocks after them, by index."""

    instructions: list[Instruction]
    next: list[int]

    def count(self, names: set[str]) -> int:
        return sum(one.name in names for one in self.instructions)


def _blocks(code: str) -> list[_Block]:
    """The control flow of a kernel, from the text of `nvdisasm --print-code`."""
    blocks, labels, targets = [_Block([], [])], {}, []
    open_end = True  # whether the last block goes on with the next line

    def begin() -> None:
        nonlocal open_end
        if open_end:
            blocks[-1].next.append(len(blocks))
        blocks.append(_Block([], []))
        open_end = True

    for guard, op, operands, label in _LINE.findall(code):
        if label:
            begin()
            labels[label] = len(blocks) - 1
            continue
        one = Instruction(guard, op, operands)
        if not open_end:
            begin()
        blocks[-1].instructions.append(one)
        if one.name in ("BRX", "JMX"):
            raise ValueError("an indirect branch; its targets are not in the code")
        if one.target:
            targets.append((len(blocks) - 1, one.target))
        if one.always_leaves:
            open_end = False
        elif one.target:
            begin()
    for place, label in targets:
        blocks[place].next.append(labels[label])
    blocks[-1].next = [place for place in blocks[-1].next if place < len(blocks)]
    return blocks


@dataclass(frozen=True)
class _Loop:
    """A natural loop.

    Attributes:
        body: its blocks, those that lie elsewhere in the code included.
        turn: the blocks of an ordinary turn.
    """

    body: frozenset[int]
    turn: tuple[int, ...]


def _loops(blocks: list[_Block]) -> list[_Loop]:
    """All loops that can be reached."""
    order, before = _order(blocks)
    dominators = {place: set(order) for place in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for place in order[1:]:
            new = {place} | set.intersection(*(dominators[one] for one in before[place]))
            changed |= new != dominators[place]
            dominators[place] = new

    latches: dict[int, list[int]] = {}
    for place in order:
        for after in blocks[place].next:
            if after in dominators[place]:
                latches.setdefault(after, []).append(place)
    found = []
    for head, ends in latches.items():
        body, waiting = {head}, list(ends)
        while waiting:
            place = waiting.pop()
            if place not in body:
                body.add(place)
                waiting += before[place]
        forward = {
            place: [one for one in blocks[place].next if one in body - dominators[place]]
            for place in order
            if place in body
        }
        found.append(_Loop(frozenset(body), _ordinary_turn(blocks, head, ends, forward)))
    return found


def _order(blocks: list[_Block]) -> tuple[list[int], dict[int, set[int]]]:
    """The blocks that can be reached, each before those it leads forward to; what leads to each."""
    before: dict[int, set[int]] = {0: set()}
    order, stack = [], [(0, iter(blocks[0].next))]
    while stack:
        place, rest = stack[-1]
        for after in rest:
            known = after in before
            before.setdefault(after, set()).add(place)
            if not known:
                stack.append((after, iter(blocks[after].next)))
                break
        else:
            order.append(place)
            stack.pop()
    return order[::-1], before


def _ordinary_turn(
    blocks: list[_Block], head: int, ends: list[int], forward: dict[int, list[int]]
) -> tuple[int, ...]:
    """The way from a loop's head round to it again that most turns take.

    Of all ways the one with the most products and copies, and of those the shortest: waiting for a
    barrier again and masking a cut block stand in branches that few turns enter.
    """

    def worth(place: int) -> tuple[int, int, int]:
        one = blocks[place]
        return one.count(_PRODUCTS), one.count(_COPIES), -len(one.instructions)

    best = {head: (worth(head), (head,))}
    for place, following in forward.items():
        for after in following:
            sums = tuple(map(sum, zip(best[place][0], worth(after))))
            if after not in best or sums > best[after][0]:
                best[after] = sums, (*best[place][1], after)
    return max(best[end] for end in ends)[1]


@dataclass(frozen=True)
class Turn:
    """One turn of the main loop, in instructions of a warp.

    Attributes:
        instructions: all of them.
        products: those of the matrix units.
        multiplies: multiply-adds of the warp's matrix products; 0 where `tcgen05`.
        tcgen05: products that one thread starts for the whole CTA (10.x).
        mufu, fp32, imad, alu, shuffle: instructions on these pipes; packed float32 ones twice.
        fed: bytes of shared memory that the products read.
        shared: bytes of all other accesses to shared memory.
    """

    instructions: int
    products: int
    multiplies: int
    tcgen05: int
    mufu: int
    fp32: int
    imad: int
    alu: int
    shuffle: int
    fed: int
    shared: int


def loop_spills(code: str) -> int:
    """Accesses to local memory inside loops."""
    blocks = _blocks(code)
    places = {place for loop in _loops(blocks) for place in loop.body}
    return sum(blocks[place].count(_SPILLS) for place in places)


def main_turn(code: str) -> Turn:
    """Of the loop with the most copies and products, those inside it aside.

    Raises:
        ValueError: no loop multiplies matrices, or the code has an instruction without a pipe.
    """
    blocks = _blocks(code)

    def count(loop: _Loop, names: set[str]) -> int:
        return sum(blocks[place].count(names) for place in loop.turn)

    loops = [loop for loop in _loops(blocks) if count(loop, _PRODUCTS)]
    loops = [loop for loop in loops if not any(one.body < loop.body for one in loops)]
    if not loops:
        raise ValueError("no loop multiplies matrices")
    main = max(loops, key=lambda loop: (count(loop, _COPIES), count(loop, _PRODUCTS)))
    return _turn([one for place in main.turn for one in blocks[place].instructions])


def _turn(instructions: list[Instruction]) -> Turn:
    pipes = Counter(one.pipe for one in instructions)
    names = Counter(one.name for one in instructions)
    fed = shared = multiplies = 0
    for one in instructions:
        if one.name in _OF_WARPS:
            multiplies += _of_a_warp(one)
        elif one.name in _OF_GROUPS:
            work, operands = _of_a_group(one)
            multiplies += work
            fed += operands
        elif one.name == "LDSM" and names.keys() & _OF_WARPS:  # fragments of the operands
            fed += _shared_bytes(one)
        elif one.pipe == "shared":
            shared += _shared_bytes(one)
    return Turn(
        instructions=len(instructions),
        products=pipes["matrix"],
        multiplies=multiplies,
        tcgen05=sum(names[one] for one in _TCGEN05),
        mufu=pipes["mufu"],
        fp32=pipes["fp32"] + 2 * pipes["fp32 pair"],
        imad=pipes["imad"],
        alu=pipes["alu"],
        shuffle=pipes["shuffle"],
        fed=fed,
        shared=shared,
    )


def _of_a_warp(one: Instruction) -> int:
    """Multiply-adds; the shape stands in the name, as in HMMA.16816.F32.BF16: 16 x 8 x 16."""
    shapes = {"16832": 16 * 8 * 32, "16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
    deepest = "16816" if one.name == "HMMA" else "16832"
    shape = one.op.split(".")[1]
    if shape not in shapes or shapes[shape] > shapes[deepest]:
        raise ValueError(f"an unknown shape of {one.op}")
    return shapes[shape]


def _of_a_group(one: Instruction) -> tuple[int, int]:
    """Multiply-adds and bytes of shared memory, a quarter of those of the group of four warps.

    B always comes from shared memory; A too, unless the second operand is a register.
    """
    found = re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\.", one.op)
    if not found:
        raise ValueError(f"an unknown shape of {one.op}")
    rows, columns, depth = map(int, found.groups())
    in_registers = re.match(r"R\d+, R\d+,", one.operands)
    elements = columns * depth + (0 if in_registers else rows * depth)
    return rows * columns * depth // 4, _OF_GROUPS[one.name] * elements // 4


def _shared_bytes(one: Instruction) -> int:
    """Of a warp: a matrix of 8 x 8 is 128, and an access narrower than 4 bytes a lane takes 4."""
    if one.name in ("LDSM", "STSM"):
        count = re.search(r"\.([24])$", one.op)
        return 128 * (int(count[1]) if count else 1)
    width = re.search(r"\.(64|128)\b", one.op)
    return 32 * (int(width[1]) // 8 if width else 4)


@dataclass(frozen=True)
class Tile:
    """What a CTA of the attention works on in a turn.

    Attributes:
        block_m: query rows.
        block_n: keys.
        head_dim: of both products.
    """

    block_m: int
    block_n: int
    head_dim: int
    warps: int

    @property
    def multiplies(self) -> int:
        """Multiply-adds of scores and values."""
        return 2 * self.block_m * self.block_n * self.head_dim

    def rate(self, rates: Rates) -> int:
        """Multiply-adds of a cycle."""
        return rates.matrix

    @property
    def copied(self) -> int:
        """Bytes of K and V, in bfloat16."""
        return 2 * 2 * self.block_n * self.head_dim

    @property
    def tcgen05(self) -> int:
        """Products of 128 x N x 16: the scores', and for each part of a head the values'."""
        parts = 1 if self.head_dim & (self.head_dim - 1) == 0 else 2
        return (self.head_dim + parts * self.block_n) // 16 * max(1, self.block_m // 128)

    @property
    def fed_by_tcgen05(self) -> int:
        """Bytes of queries, keys and values; probabilities come from tensor memory."""
        return 2 * self.head_dim * (self.block_m + 2 * self.block_n)


@dataclass(frozen=True)
class ProductTile:
    """What a CTA of a product in 8 bits works on in a turn.

    Attributes:
        block_m: rows of the result.
        block_n: its columns.
        block_k: depth.
        form: int8 or fp8.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    form: str

    @property
    def multiplies(self) -> int:
        """Multiply-adds."""
        return self.block_m * self.block_n * self.block_k

    def rate(self, rates: Rates) -> int:
        """Multiply-adds of a cycle."""
        return {"int8": rates.int8, "fp8": rates.fp8}[self.form]

    @property
    def copied(self) -> int:
        """Bytes of both factors."""
        return (self.block_m + self.block_n) * self.block_k

    @property
    def tcgen05(self) -> int:
        """Products of 128 x N x 32, with N up to 256."""
        return self.block_k // 32 * (self.block_m // 128) * -(-self.block_n // 256)

    @property
    def fed_by_tcgen05(self) -> int:
        """Bytes of both factors."""
        return self.copied


def cycles(capability: int, turn: Turn, tile: Tile | ProductTile) -> dict[str, float]:
    """Cycles of each of `PIPES` for one turn of one CTA.

    Raises:
        ValueError: the code does not do the tile's products, so it was misread.
    """
    _check(turn, tile)
    rates, lanes = RATES[capability], 32 * tile.warps
    # from 8.6 on half of the float32 lanes do integer multiply-adds too; on 8.0 all
    floats = (turn.fp32 + turn.imad) * lanes / rates.fp32
    return {
        "matrix": tile.multiplies / tile.rate(rates),
        "mufu": turn.mufu * lanes / rates.mufu,
        "fma": max(floats, turn.imad * lanes / rates.imad),
        "alu": turn.alu * lanes / rates.alu,
        "shuffle": turn.shuffle * lanes / rates.shuffle,
        "shared": (_fed(turn, tile) + turn.shared * tile.warps + tile.copied) / rates.shared,
        "l2": tile.copied / rates.l2,
        "issue": turn.instructions * tile.warps / rates.issue,
    }


def _check(turn: Turn, tile: Tile | ProductTile) -> None:
    found, expected = turn.multiplies * tile.warps, tile.multiplies
    if turn.tcgen05:
        found, expected = turn.tcgen05, tile.tcgen05
    if found != expected:
        raise ValueError(f"a turn has {found} matrix products, its tile {expected}: {tile}")


def _fed(turn: Turn, tile: Tile | ProductTile) -> int:
    """Bytes of shared memory that the products of a CTA read."""
    return tile.fed_by_tcgen05 if turn.tcgen05 else turn.fed * tile.warps


@dataclass(frozen=True)
class Bounds:
    """Shares of the matrix units' rate that a loop can reach at most; see the module."""

    overlapped: float
    separate: float


def bounds(capability: int, turn: Turn, tile: Tile | ProductTile, ctas: int) -> Bounds:
    """Of a loop of which `ctas` share a multiprocessor."""
    rates, found = RATES[capability], cycles(capability, turn, tile)
    matrix = found["matrix"]
    overlapped = matrix / max(found.values())
    # products wait for what they read; the rest of a turn, the softmax, is without the copies
    products = max(matrix, _fed(turn, tile) / rates.shared)
    softmax = max(
        *(found[pipe] for pipe in ("mufu", "fma", "alu", "shuffle")),
        turn.shared * tile.warps / rates.shared,
        (turn.instructions - turn.products) * tile.warps / rates.issue,
    )
    longest = max(ctas * products, ctas * softmax, products + softmax)
    return Bounds(overlapped, min(overlapped, ctas * matrix / longest))
