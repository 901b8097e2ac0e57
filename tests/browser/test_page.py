"""The page in a real browser, on the golden checkpoint: `make test-browser`."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from omnigen_fast.page.demo import INPUTS, SIDE, STEPS
from omnigen_fast.page.record import find_images, read_record

GOLDEN = Path(__file__).parents[1] / "golden"
CAT = GOLDEN / "images/cat.png"
WAIT = (
    int(os.environ.get("PAGE_WAIT", 120)) * 1000
)  # ms, for anything: a busy machine is slow, not wrong
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SCREENSHOT = "PAGE_SCREENSHOT"  # where to write one, of the model that ships
BROWSER_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True)
class Server:
    """The page's process: where it listens, and where it saves."""

    address: str
    folder: Path

    def saved(self) -> set[Path]:
        return set(self.folder.glob("*.png"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    start = tmp_path_factory.mktemp("start")
    (start / "tiny").symlink_to(GOLDEN / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = "shapes" if SCREENSHOT in os.environ else "tiny"
    options = {"model": model, "device": "cpu", "dtype": "float32", "port": port}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "omnigen_fast.app", "--local-files-only"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        cwd=start,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line == f"The page is at http://127.0.0.1:{port}/\n"
    yield Server(line.split()[-1], start / "omnigen-pictures")
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[BrowserContext]:
    assert BROWSER, "chromium is missing; install it, on Debian with: apt-get install chromium"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=BROWSER,
            args=BROWSER_OPTIONS,
            viewport={"width": 1240, "height": 1000},
            timeout=WAIT,
        )
        context.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        yield context
        context.close()


@pytest.fixture
def page(server, browser) -> Iterator[Page]:
    """The page, filled for a small picture. It may ask its own server only."""
    page, hosts = browser.new_page(), set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.address)
    fill(page, width=64, height=64, steps=3, max_input_size=64)
    yield page
    page.close()
    assert hosts - {""} == {urlsplit(server.address).netloc}


def fill(page: Page, **numbers: float) -> None:
    for name, value in numbers.items():
        page.locator(f"#{name.replace('_', '-')} input").fill(str(value))


def generate(page: Page, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate").click()


def done(page: Page, server: Server, before: set[Path]) -> Path:
    """Waits for the end; the one file that was saved, which is the one that is shown."""
    expect(page.locator("#status")).to_contain_text("Done: ")
    (path,) = {one for one in server.saved() - before if "input" not in one.name}
    shown = page.locator("#saved").locator("input, textarea")
    expect(shown).to_have_value(f"{path.parent.name}/{path.name}")
    expect(page.locator("#result img")).to_have_attribute("src", re.compile(path.name))
    source = page.locator("#result img").get_attribute("src")
    assert page.request.get(source).body() == path.read_bytes()
    return path


def usable(page: Page) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()


def test_generate(page, server):
    before = server.saved()
    generate(page, "A cat on a sofa.")
    path = done(page, server, before)
    usable(page)
    record = read_record(path)
    assert record.prompts == ("A cat on a sofa.",)
    assert record.arguments["num_inference_steps"] == 3
    assert Image.open(path).size == (64, 64)
    # the seed that was drawn is shown, and makes the same picture again
    assert page.locator("#seed input").input_value() == str(record.arguments["seed"])
    page.locator("#randomize input").uncheck()
    before = server.saved()
    page.locator("#generate").click()
    end = time.monotonic() + 120
    while server.saved() == before:  # the status may pass too quickly to be seen
        assert time.monotonic() < end
        page.wait_for_timeout(20)
    again = done(page, server, before)
    assert again.read_bytes() == path.read_bytes()


def test_edit_with_an_upload(page, server):
    before = server.saved()
    page.locator("#image-1 input[type=file]").set_input_files(CAT)
    expect(page.locator("#image-1 img")).to_be_visible()
    page.locator("#use-input-size input").check()
    generate(page, "<img><|image_1|></img> Make the cat black.")
    path = done(page, server, before)
    usable(page)
    record = read_record(path)
    ((found,),) = find_images(record, path)  # raises if it is not what was uploaded
    assert Path(found).read_bytes() == CAT.read_bytes()
    assert Image.open(path).size == (64, 48)  # a photograph of 3 : 2, in steps of 16


def test_stop(page, server):
    before = server.saved()
    fill(page, width=256, height=256, steps=1000)
    generate(page, "A cat on a sofa.")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Step \d+ of 1000, .* left"))
    preview = re.compile("^data:image/jpeg;base64,")
    expect(page.locator("#result img")).to_have_attribute("src", preview)
    expect(page.locator("#generate")).to_be_disabled()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped after step")
    after = re.search(r"after step (\d+) of 1000", page.locator("#status").inner_text())
    assert int(after[1]) < 1000
    usable(page)
    assert server.saved() == before
    fill(page, width=64, height=64, steps=3)
    page.locator("#generate").click()
    done(page, server, before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", "100", "width must be a multiple of 16, got 100"),
        ("steps", "0", "num_inference_steps must be"),
        ("seed", "", "seed must be an integer, got None; or choose a random one"),
        (
            "guidance",
            "2000",
            "guidance_scale must be from -1000 to 1000, got 2000; 1 to 5 is usual",
        ),
    ],
)
def test_error(page, server, field, value, message):
    before = server.saved()
    page.locator("#randomize input").uncheck()
    right = page.locator(f"#{field} input").input_value()
    fill(page, **{field: value})
    generate(page, "A cat on a sofa.")
    expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()
    usable(page)
    assert server.saved() == before
    fill(page, **{field: right})
    page.locator("#generate").click()
    done(page, server, before)


def test_uploads_that_are_no_images(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(CAT.read_bytes()[:5000])
    page.locator("#image-1 input[type=file]").set_input_files(broken)
    expect(page.locator("#image-1 img")).to_be_attached()
    generate(page, "<img><|image_1|></img> Make the cat black.")
    expect(page.get_by_role("alert").filter(has_text="save or download it again")).to_be_visible()
    usable(page)


def test_huge_uploads_are_refused(server):
    huge = {"files": ("huge.png", bytes((64 << 20) + 1))}
    try:
        answer = httpx.post(f"{server.address}gradio_api/upload", files=huge, timeout=120)
    except httpx.WriteError:  # it hung up before it had read all of it
        return
    assert answer.status_code == 413


def test_a_browser_cannot_name_files_of_the_server(page, server):
    """What a page sends when an image is uploaded, with a path that was not."""
    sent = []
    page.on("request", lambda request: sent.append(request))
    generate(page, "<img><|image_1|></img> Make it black.")
    expect(page.get_by_role("alert")).to_be_visible()
    (join,) = (request for request in sent if "/queue/join" in request.url)
    body = join.post_data_json
    before = server.saved()
    meta = {"meta": {"_type": "gradio.FileData"}}
    files = [{"path": str(CAT), **meta}, {"path": "", "url": CAT.as_uri(), **meta}]
    for file in [*files, {"path": str(CAT)}]:
        body["session_hash"] = f"{len(str(file))}session"
        body["data"][1] = file
        api = f"{server.address}gradio_api/queue"
        assert page.request.post(f"{api}/join", data=body).ok
        events = page.request.get(f"{api}/data", params={"session_hash": body["session_hash"]})
        assert '"success":false' in events.text()
    assert server.saved() == before


def test_prompt_text_is_no_markup(page):
    generate(page, "<img><|image_1|></img> <b>bold</b><script>document.title = 1</script>")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.locator("#status b, #status script").count() == 0
    expect(page).to_have_title("OmniGen")


def test_reload_while_it_runs(page, server):
    before = server.saved()
    fill(page, width=256, height=256, steps=1000)
    generate(page, "A cat on a sofa.")
    expect(page.locator("#status")).to_contain_text("Step ")
    page.reload()
    usable(page)
    expect(page.locator("#status")).not_to_contain_text("Step")
    fill(page, width=64, height=64, steps=3, max_input_size=64)
    generate(page, "A dog on a sofa.")
    path = done(page, server, before)  # one file: the call that nobody watched was stopped
    assert read_record(path).prompts == ("A dog on a sofa.",)


def test_two_users(page, browser, server):
    """The second waits, sees that it does, and can give up or stay."""
    before = server.saved()
    fill(page, width=256, height=256, steps=1000)
    generate(page, "A cat on a sofa.")
    expect(page.locator("#status")).to_contain_text("Step ")
    other = browser.new_page()
    other.goto(server.address)
    fill(other, width=64, height=64, steps=3)
    for stays in (False, True):
        generate(other, "A dog on a sofa.")
        expect(other.locator("#status")).to_contain_text("Waiting: 1 before this one")
        (page if stays else other).locator("#stop").click()
        if not stays:
            expect(other.locator("#status")).to_contain_text("Stopped before it began")
            expect(page.locator("#status")).to_contain_text("Step ")
            usable(other)
    expect(page.locator("#status")).to_contain_text("Stopped after step")
    assert read_record(done(other, server, before)).prompts == ("A dog on a sofa.",)
    other.close()


def test_example_fills_the_fields_and_runs(page, server):
    before = server.saved()
    page.locator("#examples").get_by_text("Remove the cup.").click()
    path = done(page, server, before)
    record = read_record(path)
    assert record.prompts == ("<img><|image_1|></img> Remove the cup.",)
    assert record.arguments["use_input_image_size_as_output"]
    assert record.arguments["num_inference_steps"] == 3
    expect(page.locator("#prompt textarea")).to_have_value(record.prompts[0])


def test_memory_table(page):
    page.locator("#prompt textarea").fill("A cat on a sofa.")
    page.locator("#memory-section").get_by_text("Memory").first.click()
    page.locator("#plan").click()
    expect(page.locator("#plans").get_by_role("gridcell", name="chosen")).to_be_visible()
    memory = page.locator("#memory input")
    for given, message in (("1KiB", "this request needs at least"), ("a lot", "got 'a lot'")):
        memory.fill(given)
        memory.press("Enter")
        page.locator("#plan").click()
        expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()


@pytest.mark.skipif(SCREENSHOT not in os.environ, reason=f"{SCREENSHOT}=FILE.png makes it")
def test_screenshot(page, server):
    """The page after a picture, for the documentation."""
    before = server.saved()
    page.locator("#image-1 input[type=file]").set_input_files(INPUTS / "circle-triangle.png")
    fill(page, width=SIDE, height=SIDE, max_input_size=SIDE, steps=STEPS)
    page.locator("#use-input-size input").check()
    page.locator("#prompt textarea").fill("<img><|image_1|></img> Make the triangle purple.")
    page.locator("#generate").click()
    done(page, server, before)
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.quantize(128).save(os.environ[SCREENSHOT], optimize=True)
