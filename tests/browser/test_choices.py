"""What can be chosen on the page: masks, LoRAs, several pictures, settings of earlier ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from driving import (
    CAT,
    TAG,
    done,
    fill,
    generate,
    load,
    opened,
    prompt,
    ready,
    refused,
    upload,
    usable,
)
from PIL import Image
from playwright.sync_api import Page, expect

from omnigen_fast.page.record import find_mask, read_record


def paint(page: Page) -> None:
    """A stroke from left to right through the middle."""
    if page.locator("#mask-section > button").get_attribute("aria-expanded") != "true":
        page.locator("#mask-section > button").click()
    canvas = page.locator("#mask-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.2 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], middle, steps=5)
    page.mouse.up()


def choose(page: Page, name: str, value: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def finished(page: Page, count: int) -> None:
    expect(page.locator("#status")).to_contain_text(f"Done: {count} pictures")
    usable(page)


def test_edit_with_a_mask(page, server):
    """What was not painted is the input's own, pixel for pixel."""
    before = server.saved()
    upload(page, 1, CAT)
    prompt(page).fill(f"{TAG.format(1)} Make it black.")
    paint(page)
    page.locator("#generate").click()
    path = done(page, server, before)
    record = read_record(path)
    mask = np.array(Image.open(find_mask(record, path)).convert("L"))
    assert mask.shape == Image.open(CAT).size[::-1]
    height, width = mask.shape
    assert mask[height // 2, width // 2] == 255 and mask[0, 0] == 0
    assert record.arguments["use_input_image_size_as_output"]
    # the same call in Python keeps the pixels outside, and so does the page's
    result = np.array(Image.open(path).convert("RGB"), np.int16)
    from omnigen_fast.images import read_image

    kept = read_image(str(CAT), 64, 1 << 16, "image").pixels.astype(np.int16)
    assert result.shape == kept.shape
    same = (result == kept).all(-1)
    assert same[:8].all() and same[-8:].all()
    assert not same.all()


def test_a_mask_needs_one_image(page, server):
    upload(page, 1, CAT)
    upload(page, 2, CAT)
    paint(page)
    page.locator("#generate").click()
    refused(page, "mask_image needs one prompt with one input image")
    page.locator("#mask-clear").click()


def test_several_pictures_and_a_list_of_seeds(page, server):
    before = server.saved()
    fill(page, pictures_count=3)
    generate(page, "A cat on a sofa.")
    finished(page, 3)
    drawn = {read_record(one).arguments["seed"] for one in server.saved() - before}
    assert len(drawn) == 3
    before = server.saved()
    fill(page, pictures_count=1, seeds="7, 11")
    page.locator("#generate").click()
    finished(page, 2)
    made = {read_record(one).arguments["seed"]: one for one in server.saved() - before}
    assert set(made) == {7, 11}
    expect(page.locator("#pictures img")).to_have_count(5)
    # alone, a seed makes the same picture
    before = server.saved()
    fill(page, seeds="11")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done: 3 steps")
    (again,) = server.saved() - before
    assert again.read_bytes() == made[11].read_bytes()
    for fields, message in (
        ({"seeds": "1, two"}, "seeds must be integers such as 1, 2, 3, got 'two'"),
        ({"seeds": "1, 2", "pictures_count": 3}, "2 seeds are listed for 3 pictures"),
        ({"seeds": "", "pictures_count": 17}, "pictures must be from 1 to 16, got 17"),
    ):
        fill(page, **fields)
        page.locator("#generate").click()
        refused(page, message)


def test_stop_ends_all_of_a_request(page, server):
    before = server.saved()
    fill(page, width=256, height=256, steps=1000, pictures_count=4)
    generate(page, "A cat on a sofa.")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Picture 1 of 4: Step \d+"))
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped after step")
    usable(page)
    assert server.saved() == before


def test_a_lora_is_chosen_by_name(page, server):
    before = server.saved()
    fill(page, seed=5)
    page.locator("#randomize input").uncheck()
    generate(page, "A cat on a sofa.")
    plain = done(page, server, before)
    pictures = []
    for lora, strength in (("style", 1), ("style", 0.5), ("none", 1)):
        choose(page, "lora", lora)
        fill(page, lora_strength=strength)
        before = server.saved()
        page.locator("#generate").click()
        expect(page.locator("#pictures img")).to_have_count(2 + len(pictures))
        (path,) = server.saved() - before
        usable(page)
        pictures.append(path)
    assert [read_record(one).loras for one in pictures] == [("style",), ("style:0.5",), ()]
    read = [np.array(Image.open(one)) for one in (plain, *pictures)]
    assert (read[0] != read[1]).any() and (read[1] != read[2]).any()
    assert pictures[-1].read_bytes() == plain.read_bytes()


def test_settings_of_a_picture(page, server, context, tmp_path):
    """Of a PNG, which the page made, in another tab; one that carries none changes nothing."""
    before = server.saved()
    upload(page, 1, CAT)
    fill(page, guidance=3.5, steps=2)
    choose(page, "lora", "style")
    choose(page, "quality", "fast")
    expect(page.locator("#steps input")).to_have_value("14")
    fill(page, steps=2)
    generate(page, f"{TAG.format(1)} Make it black.")
    path = done(page, server, before)
    other = opened(context.new_page(), server.address)
    load(other, path)
    expect(other.locator("#status")).to_contain_text(
        "Settings loaded; upload its input image again"
    )
    expect(prompt(other)).to_have_value(f"{TAG.format(1)} Make it black.")
    expect(prompt(other)).to_be_in_viewport()
    seed = str(read_record(path).arguments["seed"])
    for name, value in {"guidance": "3.5", "steps": "2", "seed": seed, "quality": "fast"}.items():
        expect(other.locator(f"#{name} input")).to_have_value(value)
    expect(other.locator("#lora input")).to_have_value("style")
    upload(other, 1, CAT)
    before = server.saved()
    other.locator("#generate").click()
    assert done(other, server, before).read_bytes() != b""
    (again,) = (one for one in server.saved() - before if "input" not in one.name)
    assert (np.array(Image.open(again)) == np.array(Image.open(path))).all()
    load(other, CAT)
    refused(other, "cat.png carries no request")
    expect(prompt(other)).to_have_value(f"{TAG.format(1)} Make it black.")


def test_pictures_of_this_tab(page, server, context):
    """Each can be an input, or give its settings back; no other tab shows them."""
    before = server.saved()
    generate(page, "A cat on a sofa.")
    path = done(page, server, before)
    expect(page.locator("#pictures img")).to_have_count(1)
    expect(page.locator("#pictures img")).to_have_attribute("alt", re.compile("A cat on a sofa."))
    page.get_by_role("button", name="Use as input").click()
    expect(page.locator("#image-1 img")).to_be_visible()
    expect(prompt(page)).to_have_value(f"{TAG.format(1)} A cat on a sofa.")
    fill(page, steps=2, guidance=4)
    before = server.saved()
    page.locator("#generate").click()
    expect(page.locator("#pictures img")).to_have_count(2)
    edit = done(page, server, before)
    ((copy,),) = read_record(edit).input_images
    assert Path(copy.path_from(edit)).read_bytes() == path.read_bytes()
    page.get_by_role("button", name="Use these settings").last.click()
    expect(prompt(page)).to_have_value("A cat on a sofa.")
    expect(page.locator("#image-1 img")).to_have_count(0)
    expect(page.locator("#steps input")).to_have_value("3")
    expect(page.locator("#randomize input")).not_to_be_checked()
    before = server.saved()
    page.locator("#generate").click()
    expect(page.locator("#pictures img")).to_have_count(3)
    (again,) = server.saved() - before
    assert again.read_bytes() == path.read_bytes()
    page.reload()
    ready(page)
    expect(page.locator("#pictures img")).to_have_count(3)
    other = opened(context.new_page(), server.address)
    expect(other.locator("#pictures img")).to_have_count(0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_settings_of_every_format(page, tmp_path, name):
    from golden_cases import TINY

    from omnigen_fast import cli

    out = tmp_path / name
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["generate", "--model", str(TINY), "--device", "cpu", "--prompt", "A dog.", "--seed=9"]
            + ["--size", "32", "--steps", "1", "--quiet", "--out", str(out)]
        )
    assert not ended.value.code
    load(page, out)
    expect(prompt(page)).to_have_value("A dog.")
    expect(page.locator("#seed input")).to_have_value("9")
    expect(page.locator("#width input")).to_have_value("32")
