"""One server and one browser for all tests of the page, and a page for each."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from driving import BROWSER, BROWSER_OPTIONS, WAIT, Server, opened, started
from playwright.sync_api import expect, sync_playwright


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """The tiny model, with a LoRA to choose."""
    with started(tmp_path_factory.mktemp("start"), "tiny", "--lora", "style") as one:
        yield one


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    assert BROWSER, "chromium is missing; install it, on Debian with: apt-get install chromium"
    with sync_playwright() as driver:
        expect.set_options(timeout=WAIT)
        yield driver.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS, timeout=WAIT)


@pytest.fixture
def context(chromium) -> Iterator:
    """A browser of its own, without what others have left in theirs."""
    one = chromium.new_context(viewport={"width": 1240, "height": 1000})
    one.set_default_timeout(WAIT)
    yield one
    one.close()


@pytest.fixture
def page(server, context) -> Iterator:
    """The page, filled for a small picture. It may ask its own server only."""
    page, hosts = context.new_page(), set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    yield opened(page, server.address)
    page.close()
    assert hosts - {""} == {urlsplit(server.address).netloc}
