"""The page's answers, without a browser: it needs Gradio, as the browser's tests do."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from golden_cases import TINY
from gradio import processing_utils
from gradio.data_classes import ImageData
from page_fields import page_fields
from PIL import Image

from omnigen_fast.page import actions, components, ui
from omnigen_fast.page.actions import NAMES, Actions
from omnigen_fast.page.job import Fields
from omnigen_fast.page.record import read_record
from omnigen_fast.pipeline import OmniGenPipeline


def user(name: str) -> SimpleNamespace:
    """As much of Gradio's request as is looked at."""
    return SimpleNamespace(session_hash=name)


@pytest.fixture
def opened(pipe, tmp_path) -> Actions:
    return Actions(pipe, str(TINY), tmp_path / "pictures")


def test_answers(opened, tmp_path):
    *_, (status, picture, _, saved, *_) = opened.generate(user("a"), *page_fields())
    assert "Done: 2 steps" in status
    assert isinstance(picture, Path) and str(picture) == saved
    assert list((tmp_path / "pictures").iterdir()) == [picture]


def test_on_a_full_disk_the_picture_is_shown(opened, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")

    monkeypatch.setattr(actions, "save", full)
    *_, (status, picture, _, saved, *_) = opened.generate(user("a"), *page_fields())
    assert "alert" in status
    assert "The picture was not saved: [Errno 28] No space left on device" in status
    assert picture.size == (32, 32)
    assert saved == ""


def test_in_the_order_in_which_they_came(opened):
    """While the first runs the others wait; the second gives up, the third has its turn."""
    first, second, third = (opened.generate(user(name), *page_fields()) for name in "abc")
    assert "Starting" in next(first)[0]
    assert "Waiting: 1 before" in next(second)[0]
    assert "Waiting: 2 before" in next(third)[0]
    opened.stop(user("b"))
    assert "Stopped before it began" in next(second)[0]
    assert not list(second)
    assert "Waiting: 1 before" in next(third)[0]
    assert "Done" in list(first)[-1][0]
    assert "Done" in list(third)[-1][0]


def test_one_that_waits_is_woken(opened):
    first, second = (opened.generate(user(name), *page_fields()) for name in "ab")
    next(first), next(second)
    ends = []
    waiting = threading.Thread(target=lambda: ends.extend(second))
    waiting.start()
    assert "Done" in list(first)[-1][0]
    waiting.join(60)
    assert "Done" in ends[-1][0]


def test_who_leaves_makes_room(opened):
    first, second = (opened.generate(user(name), *page_fields(steps=1000)) for name in "ab")
    next(first), next(second)
    first.close()
    assert "Starting" in next(second)[0]
    opened.stop(user("a"))  # of no use: it is b's
    next(second)
    opened.stop(user("b"))
    assert "Stopped after step" in list(second)[-1][0]


def test_a_bug_is_shown_and_told(opened, monkeypatch, capsys):
    def broken(*arguments):
        raise KeyError("<b>oops</b>")

    monkeypatch.setattr(actions, "Job", broken)
    ((status, *_),) = opened.generate(user("a"), *page_fields())
    assert "it failed (KeyError: &#x27;&lt;b&gt;oops&lt;/b&gt;&#x27;)" in status
    assert "Traceback" in capsys.readouterr().err


def test_pictures_may_lie_anywhere(opened, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    component = components.Picture()
    monkeypatch.setattr(component, "GRADIO_CACHE", str(tmp_path / "cache"))
    shown = component.postprocess(path)
    assert Path(shown.path).read_bytes() == path.read_bytes()
    Path(tmp_path / "full").touch()
    monkeypatch.setattr(component, "GRADIO_CACHE", str(tmp_path / "full"))  # takes no file
    head, data = component.postprocess(path).url.split(",")
    assert head == "data:image/png;base64"
    assert b64decode(data) == path.read_bytes()
    assert component.postprocess(None) is None
    assert component.preprocess(None) is None


def test_nothing_is_reported_or_kept(opened):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    blocks = ui.build(opened)
    assert not blocks.analytics_enabled
    assert not list(Path(ui.__file__).parent.glob("*.pyi"))
    assert isinstance(blocks, gr.Blocks)


def test_only_what_was_uploaded_is_an_input_image(tmp_path, monkeypatch):
    """Gradio checks the paths of those callers who mark them as files, and not of others."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    secret, link = tmp_path / "secret.png", tmp_path / "uploads/link.png"
    Image.new("RGB", (8, 8)).save(secret)
    Image.new("RGB", (8, 8)).save(tmp_path / "uploads/a.png")
    link.symlink_to(secret)
    component = components.Picture()
    uploaded = str(tmp_path / "uploads/a.png")
    assert component.preprocess(ImageData(path=uploaded)) == uploaded
    upwards = str(tmp_path / "uploads/../secret.png")
    for path in (str(secret), str(link), upwards, "", None, "http://127.0.0.1/a.png"):
        with pytest.raises(gr.Error, match="must be uploaded"):
            component.preprocess(ImageData(path=path))


@pytest.mark.parametrize("place", range(len(page_fields())))
def test_nothing_is_fetched_for_any_field(opened, monkeypatch, place):
    fetched = []

    async def fetch(address, **options):
        fetched.append(address)
        raise ConnectionError

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    blocks = ui.build(opened)
    (call,) = {fn.name: fn for fn in blocks.fns.values() if fn.name == "plans"}.values()
    file = {"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    for sent in (file, [{"deep": file}], {**file, "path": "HTTPS://example.org/a.png"}):
        inputs = page_fields()
        inputs[place] = sent
        with pytest.raises(gr.Error, match="must be uploaded"):
            asyncio.run(blocks.preprocess_data(call, inputs, None))
    assert not fetched
    assert asyncio.run(blocks.preprocess_data(call, page_fields(), None)) == page_fields()


def test_a_refused_request_changes_nothing_that_is_shown(opened):
    """Neither picture nor seed nor file, whenever it is refused."""
    for change in ({"height": 100}, {"image_2": str(TINY)}, {"pictures": 0}, {"lora": "../x"}):
        for status, *shown in opened.generate(user("a"), *page_fields(**change)):
            assert all(one == gr.skip() for one in shown[:3]), status
        assert "alert" in status


def test_several_pictures_are_made_one_after_the_other(opened, tmp_path):
    """Each by its own seed, as alone; a request of someone else has its turn in between."""
    first = opened.generate(user("a"), *page_fields(seeds="3, 5"))
    next(first)
    second = opened.generate(user("b"), *page_fields(seed=9))
    assert "Waiting: 1 before" in next(second)[0]
    answers = list(first_until_waiting(first))
    assert "Picture 1 of 2 is done" in answers[-2][0]
    assert "Picture 2 of 2: Waiting: 1 before" in answers[-1][0]
    assert "Done: 2 steps" in list(second)[-1][0]
    assert "Done: 2 pictures, 2 steps each" in list(first)[-1][0]
    seeds = [read_record(one).arguments["seed"] for one in (tmp_path / "pictures").iterdir()]
    assert sorted(seeds) == [3, 5, 9]


def first_until_waiting(answers):
    for answer in answers:
        yield answer
        if "Waiting" in answer[0]:
            return


def test_stop_between_two_pictures_ends_the_request(opened, tmp_path):
    answers = opened.generate(user("a"), *page_fields(seeds="3, 5"))
    for status, *_ in answers:
        if "is done" in status:
            opened.stop(user("a"))
    assert "Stopped after 1 of 2" in status
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_what_was_made_is_for_the_one_who_made_it(opened, tmp_path, monkeypatch):
    """The page lists it in the browser: no session has a place on the server for others to ask."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    *_, last = opened.generate(user("a"), *page_fields(seed=4))
    made = json.loads(last[-1])
    assert Path(made["path"]).read_bytes() == last[1].read_bytes()
    assert made["settings"]["seed"] == 4 and made["settings"]["prompt"] == "A cat."
    assert Fields(**made["settings"]).call() == Fields(*page_fields(seed=4)).call()


def test_settings_from_a_picture_that_carries_none(opened, tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    status, *fields = opened.load(str(path))
    assert "plain.png carries no request" in status and str(tmp_path) not in status
    assert all(one == gr.skip() for one in fields) and len(fields) == len(page_fields())


def test_unknown_words_are_named_beside_generate(tmp_path):
    pipe = OmniGenPipeline.from_pretrained("shapes", device="cpu")
    page = Actions(pipe, "shapes", tmp_path / "pictures")
    fields = page_fields(prompt="a red dragon", height=16, width=16, steps=1)
    *_, (status, *_) = page.generate(user("a"), *fields)
    assert "The model does not know &#x27;dragon&#x27;. It draws" in status
    shown = json.dumps(ui.build(page).get_config_file())
    assert "Fixed vocabulary." in shown and "It draws" in shown


def test_every_field_is_named_in_the_order_in_which_it_is_sent(opened):
    blocks = ui.build(opened)
    (call,) = (fn for fn in blocks.fns.values() if fn.name == "generate")
    ids = [one.elem_id for one in call.inputs]
    assert len(ids) == len(NAMES) == len(ui._FIELDS)
    assert ids[:4] == ["prompt", "image-1", "image-2", "image-3"]
    assert dict(zip(NAMES, ids))["height"] == "height"
    assert dict(zip(NAMES, ids))["lora_strength"] == "lora-strength"
