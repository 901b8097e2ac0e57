"""The documentation's pictures of the page: PAGE_SCREENSHOTS=docs makes them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from driving import WAIT, fill, opened, prompt, started, upload
from PIL import Image
from playwright.sync_api import expect

from omnigen_fast.page.demo import INPUTS, SIDE, STEPS

FOLDER = "PAGE_SCREENSHOTS"
pytestmark = pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER}=docs makes them")
VIEWS = {  # name: width, height, colours
    "page.png": (1280, 1000, "light"),
    "page-768.png": (768, 1200, "light"),
    "page-390.png": (390, 1200, "light"),
    "page-390-dark.png": (390, 1200, "dark"),
}


def test_screenshots(chromium, tmp_path):
    """An edit with the bundled model."""
    with started(tmp_path, "shapes") as server:
        for name, (width, height, scheme) in VIEWS.items():
            context = chromium.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            context.set_default_timeout(WAIT)
            page = opened(context.new_page(), server.address)
            fill(page, width=SIDE, height=SIDE, max_input_size=SIDE, steps=STEPS)
            prompt(page).fill("Make the triangle purple.")
            upload(page, 1, INPUTS / "circle-triangle.png")
            page.locator("#use-input-size input").check()
            page.locator("#generate").click()
            expect(page.locator("#status")).to_contain_text("Done: ")
            expect(page.locator("#pictures img")).to_have_count(1)
            page.mouse.move(0, 0)
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.quantize(128).save(Path(os.environ[FOLDER]) / name, optimize=True)
            context.close()
