"""The page in a real browser, on the golden checkpoint: `make test-browser`."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest
from driving import (
    CAT,
    COFFEE,
    TAG,
    done,
    fill,
    generate,
    opened,
    prompt,
    ready,
    refused,
    upload,
    usable,
)
from PIL import Image
from playwright.sync_api import expect

from omnigen_fast.page.record import find_images, read_record


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
    upload(page, 1, CAT)
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
    ready(page)
    usable(page)
    expect(page.locator("#status")).not_to_contain_text("Step")
    fill(page, width=64, height=64, steps=3, max_input_size=64)
    generate(page, "A dog on a sofa.")
    path = done(page, server, before)  # one file: the call that nobody watched was stopped
    assert read_record(path).prompts == ("A dog on a sofa.",)


def test_two_users(page, context, server):
    """The second waits, sees that it does, and can give up or stay."""
    before = server.saved()
    fill(page, width=256, height=256, steps=1000)
    generate(page, "A cat on a sofa.")
    expect(page.locator("#status")).to_contain_text("Step ")
    other = opened(context.new_page(), server.address)
    # nothing of the first one's: no fields, no pictures
    expect(prompt(other)).to_have_value("")
    expect(other.locator("#pictures img")).to_have_count(0)
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


def test_example_fills_the_fields_and_a_second_click_runs_it(page, server):
    before = server.saved()
    page.locator("#examples").get_by_text("Remove the cup.").click()
    expect(prompt(page)).to_have_value(f"{TAG.format(1)} Remove the cup.")
    expect(page.locator("#image-1 img")).to_be_visible()
    expect(page.locator("#use-input-size input")).to_be_checked()
    expect(prompt(page)).to_be_in_viewport()
    expect(page.locator("#generate")).to_be_in_viewport()
    assert server.saved() == before
    expect(page.locator("#status")).to_have_text("")
    page.locator("#generate").click()
    path = done(page, server, before)
    record = read_record(path)
    assert record.prompts == ("<img><|image_1|></img> Remove the cup.",)
    assert record.arguments["use_input_image_size_as_output"]
    assert record.arguments["num_inference_steps"] == 3


def test_memory_table(page):
    prompt(page).fill("A cat on a sofa.")
    page.locator("#memory-section").get_by_text("Memory").first.click()
    page.locator("#plan").click()
    expect(page.locator("#plans").get_by_role("cell", name="chosen")).to_be_visible()
    expect(page.locator("#legend")).to_contain_text("what Generate would run now")
    memory = page.locator("#memory input")
    for given, message in (
        ("1KiB", "this request needs at least"),
        ("a lot", "got 'a lot'"),
        ("12", 'for 12 GiB write "12GiB"'),
    ):
        memory.fill(given)
        memory.press("Enter")
        page.locator("#plan").click()
        expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()


def test_a_refused_request_keeps_what_is_shown(page, server):
    """Seed, picture and file, and every field."""
    before = server.saved()
    generate(page, "A cat on a sofa.")
    path = done(page, server, before)
    source = page.locator("#result img").get_attribute("src")
    fill(page, width=100)
    page.locator("#generate").click()
    refused(page, "width must be a multiple of 16, got 100; the nearest are 96 and 112")
    expect(page.locator("#status")).to_be_in_viewport()
    seed = str(read_record(path).arguments["seed"])
    expect(page.locator("#seed input")).to_have_value(seed)
    expect(page.locator("#result img")).to_have_attribute("src", source)
    expect(page.locator("#saved").locator("input, textarea")).to_have_value(
        f"{path.parent.name}/{path.name}"
    )
    expect(page.locator("#width input")).to_have_value("100")


def test_ctrl_enter_in_the_prompt_starts(page, server):
    before = server.saved()
    prompt(page).fill("A cat on a sofa")
    prompt(page).press_sequentially(", asleep.")
    prompt(page).press("Control+Enter")
    assert read_record(done(page, server, before)).prompts == ("A cat on a sofa, asleep.",)


def test_tags_come_and_go_with_their_images(page, server):
    one, two = TAG.format(1), TAG.format(2)
    prompt(page).fill("Put the cat beside the cup.")
    upload(page, 1, CAT)
    expect(prompt(page)).to_have_value(f"{one} Put the cat beside the cup.")
    page.locator("#image-3 input[type=file]").set_input_files(COFFEE)  # not the next one
    expect(page.locator("#image-2 img")).to_be_visible()
    expect(page.locator("#image-3 img")).to_have_count(0)
    expect(prompt(page)).to_have_value(f"{one} {two} Put the cat beside the cup.")
    page.locator("#image-1").get_by_label("Remove image", exact=False).click()
    expect(page.locator("#image-2 img")).to_have_count(0)
    expect(page.locator("#image-1 img")).to_have_attribute("src", re.compile("coffee"))
    expect(prompt(page)).to_have_value(f"{one} Put the cat beside the cup.")
    before = server.saved()
    page.locator("#generate").click()
    path = done(page, server, before)
    ((found,),) = find_images(read_record(path), path)
    assert Path(found).read_bytes() == COFFEE.read_bytes()


def test_fields_survive_a_reload(page, server):
    upload(page, 1, CAT)
    prompt(page).fill(f"{TAG.format(1)} Make it black.")
    fill(page, guidance=3.5, seed=77, pictures_count=2, seeds="4, 5")
    page.locator("#randomize input").uncheck()
    page.locator("#use-input-size input").check()
    page.wait_for_function("sessionStorage.length > 0")
    page.reload()
    ready(page)
    expect(prompt(page)).to_have_value(f"{TAG.format(1)} Make it black.")
    expect(page.locator("#image-1 img")).to_be_visible()
    for name, value in {
        "width": "64",
        "guidance": "3.5",
        "seed": "77",
        "steps": "3",
        "pictures-count": "2",
    }.items():
        expect(page.locator(f"#{name} input")).to_have_value(value)
    expect(page.locator("#seeds").locator("input, textarea")).to_have_value("4, 5")
    expect(page.locator("#randomize input")).not_to_be_checked()
    expect(page.locator("#use-input-size input")).to_be_checked()
    before = server.saved()
    fill(page, seeds="", pictures_count=1)
    page.locator("#generate").click()
    assert read_record(done(page, server, before)).arguments["seed"] == 77


def test_what_is_refused_before_it_is_a_call_is_said_beside_generate(page, tmp_path):
    """A file that is too large."""
    huge = tmp_path / "huge.png"
    with open(huge, "wb") as file:
        file.truncate((64 << 20) + (1 << 20))
    page.locator("#image-1 input[type=file]").set_input_files(huge)
    expect(page.locator("#notice")).to_contain_text(re.compile("exceed .* 64"))
    expect(page.locator("#notice")).to_be_in_viewport()
