"""`omnigen-fast compare`: its measures, and what it says of configurations."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from golden_cases import TINY

from bench.commands import compare
from bench.quality import parse_configuration, psnr, ssim
from omnigen_fast.errors import RequestError


def test_psnr():
    x = torch.zeros(1, 3, 8, 8)
    assert psnr(x, x) == math.inf
    assert psnr(x + 0.1, x) == pytest.approx(20)
    assert psnr(x + 0.01, x) == pytest.approx(40)


def test_ssim_of_what_is_known():
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x) == pytest.approx(1)
    # of constant pictures only the means count: (2 a b + c1) / (a^2 + b^2 + c1)
    a, b, c1 = 0.25, 0.75, 0.01**2
    constant = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert constant == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    # unlike pictures are unlike, and both ways the same
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    assert ssim(x, y) == pytest.approx(ssim(y, x)) and abs(ssim(x, y)) < 0.1
    assert ssim(x, 1 - x) < 0


def test_ssim_is_that_of_the_definition():
    """Window by window, by its definition."""
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.rand(1, 1, 13, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    places = torch.arange(11) - 5.0
    line = torch.exp(-(places**2) / 4.5).double()
    weight = line[:, None] * line
    weight /= weight.sum()
    values = []
    for top in range(3):
        for left in range(2):
            a, b = (t[0, 0, top : top + 11, left : left + 11] for t in (x, y))
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = ((weight * (t - (weight * t).sum()) ** 2).sum() for t in (a, b))
            shared = (weight * (a - mean_a) * (b - mean_b)).sum()
            top_ = (2 * mean_a * mean_b + 1e-4) * (2 * shared + 9e-4)
            values.append(top_ / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(x, y) == pytest.approx(torch.stack(values).mean().item())


def run(*arguments: str):
    done = CliRunner().invoke(compare, ["--device", "cpu", "--steps", "2", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_equal_configurations_are_equal(tmp_path):
    path = tmp_path / "x.json"
    done = run("--model", "random:tiny", "--size", "64", "--a", "bfloat16", "--json", str(path))
    assert done.exit_code == 0, done.stderr
    result = json.loads(path.read_text())
    for row in result["rows"]:
        assert row["latent_error"] == 0 and row["max_pixel_difference"] == 0 and row["ssim"] == 1
        assert row["psnr_db"] is None  # JSON has no infinity


def test_a_lower_precision_is_seen_and_drawn(tmp_path):
    sheet = tmp_path / "sheet.png"
    path = tmp_path / "x.json"
    done = run("--model", str(TINY), "--size", "64", "--json", str(path), "--sheet", str(sheet))
    assert done.exit_code == 0, done.stderr
    for row in json.loads(path.read_text())["rows"]:
        assert 1e-4 < row["latent_error"] < 0.1 and 30 < row["psnr_db"] < 90
        assert 0.9 < row["ssim"] < 1
    from PIL import Image

    with Image.open(sheet) as image:
        assert image.width > 3 * 64 and image.height > 2 * 64


def test_less_work_is_seen():
    error = {}
    for name in ("heun", "ab2+reuse-fast", "high", "fast"):
        arguments = ("--a", "float32+exact", "--b", f"float32+{name}")
        if name not in ("high", "fast"):
            arguments = ("--a", "float32", *arguments[2:])
        done = run(
            "--model", str(TINY), "--size", "64", "--seeds", "1", "--images", "0", *arguments
        )
        assert done.exit_code == 0, done.output
        (row,) = (line.split() for line in done.stdout.splitlines() if line[:1].isdigit())
        error[name] = float(row[1])
    assert all(0 < one < 0.2 for one in error.values()), error
    assert len(set(error.values())) == len(error)


def test_what_changes_no_image_changes_none():
    done = run("--model", str(TINY), "--size", "64", "--a", "float32", "--b", "float32+no-kv")
    errors = [float(line.split()[1]) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_storage_and_products_by_one_name():
    assert parse_configuration("nf4+int8+cache-fp8") == replace(
        parse_configuration("nf4+compute-int8+cache-fp8"), name="nf4+int8+cache-fp8"
    )
    found = parse_configuration("float32+int8+int8")
    assert (found.storage, found.compute, found.cache) == ("int8", "int8", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("float16", "'float16' is not known"),
        ("float32+bfloat16", "float32 and bfloat16 contradict"),
        ("kv+no-kv", "kv and no-kv contradict"),
        ("int8+nf4", "int8 and nf4 contradict"),
        ("int8+int8+int8", "int8 and int8 and int8 contradict"),
        ("cache-int8+cache-fp8", "cache-int8 and cache-fp8 contradict"),
        ("euler+ab2", "euler and ab2 contradict"),
        ("high+fast", "high and fast contradict"),
        ("", "'' is not known"),
    ],
)
def test_configurations_that_make_no_sense(text, said):
    with pytest.raises(RequestError, match=said):
        parse_configuration(text)
    done = run("--model", "random:tiny", "--a", text)
    assert done.exit_code == 2 and said in done.stderr


def test_a_sheet_that_cannot_be_written(tmp_path):
    done = run("--model", "random:tiny", "--size", "64", "--sheet", str(tmp_path / "x.txt"))
    assert done.exit_code == 2 and "must end in .png" in done.stderr
