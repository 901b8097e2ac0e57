"""Products in float32 of 16-bit matrices: what they give, and when they are used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from numerics import assert_earned, inside, poisoned, random
from omnigen_fast.kernels import reference, widened
from test_attention import PREFILLS, STEPS, prefill_arguments, step_arguments

from omnigen_fast.linear import linear

pytestmark = pytest.mark.early
BF16 = torch.bfloat16
DECIDE = widened.faster


@pytest.fixture(name="used")
def _used(monkeypatch):
    """Float32 is said to be faster, and a block to be small."""
    monkeypatch.setattr(widened, "faster", lambda dtype: dtype in (BF16, torch.float16))
    for name, value in (("_WEIGHTS", 4 << 6), ("_ROWS", 40 << 6), ("_SUMS", 80)):
        monkeypatch.setattr(widened, name, value)


# ---- products ----


@pytest.mark.parametrize("dtype", (BF16, torch.float16))
@pytest.mark.parametrize("added", ("nothing", "bias", "itself"))
@pytest.mark.parametrize(("rows", "columns"), ((32, 1), (61, 64), (1, 9), (100, 6), (0, 3)))
@pytest.mark.usefixtures("used")
def test_product(rows, columns, added, dtype):
    """Every block, the last and smaller ones too; nothing beside the rows is read or written."""
    x, _ = inside(random(rows, 64, dtype=dtype))
    weight, _ = inside(random(columns, 64, dtype=dtype, seed=1))
    out, untouched = inside(random(rows, columns, dtype=dtype, seed=2))
    more = {"nothing": None, "bias": random(columns, dtype=dtype, seed=3), "itself": out}[added]
    beside = torch.zeros(1, dtype=dtype) if more is None else more.clone()
    plain = torch.addmm(beside, x, weight.t())
    exact = torch.addmm(beside.double(), x.double(), weight.t().double())
    assert widened.linear(x, weight, more, out) is out and untouched()
    assert_earned(out, plain, exact)


@pytest.mark.parametrize(("inner", "columns"), ((48, 96), (768, 300)))
def test_a_row_is_the_same_in_any_block(inner, columns):
    """Chunks of a layer change nothing."""
    if not DECIDE(BF16):
        pytest.skip("this CPU multiplies bfloat16 faster, and layers do")
    x, weight = random(700, inner, dtype=BF16), random(columns, inner, dtype=BF16, seed=1)
    total = random(700, columns, dtype=BF16, seed=2)
    expected = widened.linear(x, weight, total, total.clone())
    for rows in (1, 2, 5, 15, 16, 17, 250, 699):
        found = [
            widened.linear(some, weight, more, more.clone())
            for some, more in zip(x.split(rows), total.split(rows))
        ]
        assert torch.equal(torch.cat(found), expected), rows


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), ((9000, 768, 4096), (2000, 8192, 300), (40, 3072, 9216))
)
def test_scratch_is_bounded(monkeypatch, rows, inner, columns):
    empty, sizes = torch.empty, []

    def counted(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.nbytes)
        return made

    x, weight = torch.ones(rows, inner, dtype=BF16), torch.ones(columns, inner, dtype=BF16)
    out = torch.empty(rows, columns, dtype=BF16)
    monkeypatch.setattr(torch, "empty", counted)
    widened.linear(x, weight, None, out)
    assert len(sizes) == 3 and sum(sizes) <= 56 << 20
    assert (out == inner).all()


@pytest.mark.usefixtures("used")
def test_layers_use_it():
    x, weight, bias = random(40, 64, dtype=BF16), random(9, 64, dtype=BF16), random(9, dtype=BF16)
    out, untouched = poisoned(40, 9, dtype=BF16)
    exact = (x.float() @ weight.float().t()).to(BF16)
    assert linear(x, weight, out=out) is out and untouched()
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=0)
    assert torch.equal(linear(x, weight), out)
    assert torch.equal(linear(x, weight, bias=bias), widened.linear(x, weight, bias, out.clone()))
    total = random(40, 9, dtype=BF16, seed=4)
    expected = widened.linear(x, weight, total, total.clone())
    assert linear(x, weight, out=total, accumulate=True) is total
    assert torch.equal(total, expected)


@pytest.mark.usefixtures("used")
def test_what_it_takes():
    x = random(64, 64, dtype=BF16)
    assert widened.takes(x, x)
    for other in (x.float(), x.double(), x.to("meta")):
        assert not widened.takes(other, other)
        assert not widened.takes(x, other) and not widened.takes(other, x)


@pytest.mark.usefixtures("used")
def test_operands_of_two_dtypes_are_refused():
    """On two devices, too: tests/fake_gpu."""
    x = random(64, 64, dtype=BF16)
    with pytest.raises(RuntimeError):
        linear(x, x.float())


# ---- attention of the reference ----


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("kv_heads", (1, 2))
def test_attention_of_a_step(monkeypatch, case, kv_heads):
    args = step_arguments(*STEPS[case], 2, kv_heads, 64, BF16)
    compare(monkeypatch, reference.attention_step, args)


@pytest.mark.parametrize("case", PREFILLS)
def test_attention_of_prefill(monkeypatch, case):
    args = prefill_arguments(PREFILLS[case], 2, 1, 64, BF16)
    compare(monkeypatch, reference.attention_prefill, args)


def compare(monkeypatch, attention, args):
    plain = attention(*args)
    exact = attention(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    )
    monkeypatch.setattr(widened, "faster", lambda dtype: dtype == BF16)
    found = attention(*args)
    assert_earned(found, plain, exact)
    monkeypatch.setattr(reference, "_WIDENED_VALUES", 1)  # one head after the other
    assert torch.equal(attention(*args), found)


# ---- which dtype is faster ----


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    monkeypatch.setattr(widened, "_decided", {})


class Clock:
    """Products that take so many seconds of a clock that nothing else moves."""

    def __init__(self, narrow: float, wide: float, slow: int = 0) -> None:
        self.seconds, self.now, self.slow, self.products = {BF16: narrow}, 0.0, slow, 0
        self.seconds[torch.float32] = wide

    def mm(self, x, weight, out):
        self.products += 1
        self.now += self.seconds[x.dtype] + (1 if self.products <= self.slow else 0)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"), ((1.9, 1, True), (14, 1, True), (1.2, 1, False), (1, 9, False))
)
@pytest.mark.parametrize("slow", (0, 9))
def test_the_faster_one_is_found(monkeypatch, narrow, wide, expected, slow):
    """Also where the machine is busy with something else meanwhile."""
    clock = Clock(narrow * 1e-4, wide * 1e-4, slow)
    monkeypatch.setattr(widened, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(torch, "mm", clock.mm)
    assert DECIDE(BF16) is expected and clock.products
    monkeypatch.setattr(torch, "mm", None)  # once
    assert DECIDE(BF16) is expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_wide_dtypes_stay(monkeypatch, dtype):
    monkeypatch.setattr(torch, "mm", None)  # nothing is timed
    assert DECIDE(dtype) is False
