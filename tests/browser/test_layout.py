"""The page on a phone, a tablet and a desk, light and dark: fits, and can be used by anyone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from driving import CAT, TAG, WAIT, done, generate, opened, prompt, ready, upload
from playwright.sync_api import Page, expect

WIDTHS = (390, 768, 1280)
SECTIONS = ("mask-section", "negative-section", "memory-section", "tips")
# What can have the focus, in the order of the page.
FOCUSABLE = """
() => [...document.querySelectorAll("a[href], button, input, textarea, select, [tabindex]")]
  .filter((one) => !one.disabled && one.tabIndex >= 0 && one.type !== "file"
    && one.checkVisibility({visibilityProperty: true}) && one.getClientRects().length)
  .map((one) => { one.dataset.walk ??= String(Math.random()); return one.dataset.walk; })
"""


@pytest.fixture(
    params=[(w, s) for s in ("light", "dark") for w in WIDTHS], ids=lambda one: f"{one[0]}-{one[1]}"
)
def sized(request, server, chromium) -> Iterator[Page]:
    width, scheme = request.param
    context = chromium.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 1000
    )
    context.set_default_timeout(WAIT)
    yield opened(context.new_page(), server.address)
    context.close()


def open_sections(page: Page) -> None:
    for name in SECTIONS:
        section = page.locator(f"#{name} > button")
        if section.get_attribute("aria-expanded") != "true":
            section.click()


def fits(page: Page) -> None:
    """Nothing is wider than the screen, and nothing was cut off to make it so."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter((one) => one.checkVisibility() && !one.closest("[role=region], canvas, svg")
            && one.getBoundingClientRect().right > innerWidth + 1)
          .map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert wide == []


def accessible(page: Page) -> None:
    """axe-core finds nothing serious."""
    found = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert found == [], json.dumps(found, indent=1)


def test_fits_and_is_accessible(sized, server):
    """At first, with everything open and filled, and after a picture."""
    fits(sized)
    accessible(sized)
    sized.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    expect(sized.locator("#generate")).to_be_in_viewport(ratio=1)
    place = sized.locator("#prompt").bounding_box()
    button = sized.locator("#generate").bounding_box()
    assert 0 <= button["y"] - place["y"] - place["height"] < 40  # directly under the prompt
    open_sections(sized)
    upload(sized, 1, CAT)
    expect(sized.locator("#mask-canvas")).to_be_visible()
    before = server.saved()
    generate(sized, f"{TAG.format(1)} Make it black.")
    done(sized, server, before)
    sized.locator("#plan").click()
    expect(sized.locator("#plans table")).to_be_visible()
    fits(sized)
    accessible(sized)
    sized.locator("#width input").fill("100")
    sized.locator("#use-input-size input").uncheck()
    sized.locator("#generate").click()
    expect(sized.locator("#status [role=alert]")).to_be_in_viewport()
    accessible(sized)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_column_below_700_pixels(server, context, width):
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(server.address)
    ready(page)
    lefts = {round(page.locator(f"#{name}").bounding_box()["x"]) for name in ("ask", "answer")}
    assert len(lefts) == (1 if width < 700 else 2)
    tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("ask", "answer", "settings")]
    if width < 700:
        assert tops == sorted(tops)


def test_generate_stays_in_sight_on_a_phone(server, context):
    page = context.new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(server.address)
    ready(page)
    page.locator("#images").scroll_into_view_if_needed()
    page.mouse.wheel(0, 300)
    expect(page.locator("#generate")).to_be_in_viewport()


def test_every_control_is_reached_by_tab_and_named(server, context):
    page = opened(context.new_page(), server.address)
    prompt(page).fill(f"{TAG.format(1)} Make it black.")
    upload(page, 1, CAT)
    open_sections(page)
    there = set(page.evaluate(FOCUSABLE))
    assert len(there) > 30
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(2 * len(there)):
        page.keyboard.press("Tab")
        walk = page.evaluate("document.activeElement?.dataset.walk")
        if walk is not None:
            reached.add(walk)
    left = [
        page.evaluate(f"document.querySelector('[data-walk=\"{one}\"]')?.outerHTML.slice(0, 200)")
        for one in there - reached
    ]
    assert left == []
    tree = page.locator("body").aria_snapshot()
    unnamed = [
        line
        for line in tree.splitlines()
        if re.match(
            r"\s*- (button|textbox|spinbutton|checkbox|combobox|listbox|slider)(:|$| \[)", line
        )
    ]
    assert unnamed == []


def test_a_mask_is_painted_by_keyboard(server, context):
    page = opened(context.new_page(), server.address)
    upload(page, 1, CAT)
    page.locator("#mask-section > button").click()
    expect(page.locator("#mask-canvas")).to_be_visible()
    page.locator("#mask-canvas").focus()
    for key in ("ArrowLeft", "ArrowUp", "Space", "ArrowRight", "Space"):
        page.keyboard.press(key)
    painted = page.evaluate(
        """() => { const c = document.getElementById("mask-canvas");
          const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
          let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 127; return n; }"""
    )
    assert painted > 100
    page.locator("#mask-undo").press("Enter")
    page.locator("#mask-clear").press("Enter")
