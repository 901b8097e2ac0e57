"""A page's process and a browser that drives it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Page, expect

GOLDEN = Path(__file__).parents[1] / "golden"
CAT, COFFEE = GOLDEN / "images/cat.png", GOLDEN / "images/coffee.png"
TAG = "<img><|image_{}|></img>"
WAIT = (
    int(os.environ.get("PAGE_WAIT", 120)) * 1000
)  # ms, for anything: a busy machine is slow, not wrong
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
BROWSER_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True)
class Server:
    """The page's process: where it listens, and where it saves."""

    address: str
    folder: Path
    process: subprocess.Popen

    def saved(self) -> set[Path]:
        return set(self.folder.glob("*.png"))


@contextmanager
def started(start: Path, model: str, *options: str, **environment: str) -> Iterator[Server]:
    """A server in a folder of its own."""
    (start / "tiny").symlink_to(GOLDEN / "tiny")
    (start / "style").symlink_to(GOLDEN / "lora")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"model": model, "device": "cpu", "dtype": "float32", "port": port}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "omnigen_fast.app", "--local-files-only"),
            *(f"--{name}={value}" for name, value in given.items()),
            *options,
        ],
        cwd=start,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        line = process.stdout.readline()
        assert line == f"The page is at http://127.0.0.1:{port}/\n"
        yield Server(line.split()[-1], start / "omnigen-pictures", process)
    finally:
        process.terminate()
        process.wait(60)


def opened(page: Page, address: str) -> Page:
    """The page, ready, and filled for a small picture."""
    page.goto(address)
    ready(page)
    fill(page, width=64, height=64, steps=3, max_input_size=64)
    return page


def ready(page: Page) -> None:
    """Waits until the page has restored its fields."""
    page.locator("#generate").wait_for()
    page.wait_for_function("window.omnigen && omnigen.restored")


def fill(page: Page, **numbers: object) -> None:
    for name, value in numbers.items():
        field = page.locator(f"#{name.replace('_', '-')}").locator("input, textarea")
        field.first.fill(str(value))


def prompt(page: Page):
    return page.locator("#prompt textarea")


def generate(page: Page, text: str) -> None:
    prompt(page).fill(text)
    page.locator("#generate").click()


def upload(page: Page, number: int, file: Path) -> None:
    page.locator(f"#image-{number} input[type=file]").set_input_files(file)
    expect(page.locator(f"#image-{number} img")).to_be_visible()


def load(page: Page, file: Path) -> None:
    """Chooses a picture whose settings are loaded."""
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(file)


def done(page: Page, server: Server, before: set[Path]) -> Path:
    """Waits for the end; the one file that was saved, which is the one that is shown."""
    expect(page.locator("#status")).to_contain_text("Done: ")
    (path,) = {one for one in server.saved() - before if re.search(r"-\d+\.png$", one.name)} - {
        one for one in server.saved() if "input" in one.name
    }
    shown = page.locator("#saved").locator("input, textarea")
    expect(shown).to_have_value(f"{path.parent.name}/{path.name}")
    expect(page.locator("#result img")).to_have_attribute("src", re.compile(path.name))
    source = page.locator("#result img").get_attribute("src")
    assert page.request.get(source).body() == path.read_bytes()
    return path


def usable(page: Page) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()


def refused(page: Page, message: str) -> None:
    """Waits for a sentence beside Generate, in sight."""
    said = page.get_by_role("alert").filter(has_text=message)
    expect(said).to_be_visible()
    usable(page)
