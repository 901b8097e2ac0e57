"""What the page does, without the page: a call's course, what is saved, what is said."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY
from PIL import Image

from omnigen_fast.cli.main import main
from omnigen_fast.errors import MemoryBudgetError, OmniGenError, RequestError
from omnigen_fast.fewer_steps import QUALITIES, preset
from omnigen_fast.page.gallery import gallery
from omnigen_fast.page.job import (
    TABLE_HEADERS,
    Fields,
    Finished,
    Job,
    Progress,
    memory_table,
    save,
    sentence,
)
from omnigen_fast.page.record import find_images, find_mask, read_record
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT
from omnigen_fast.vae.preview import Preview, expected

CAT = str(GOLDEN / "images/cat.png")
FIELDS = Fields(
    prompt="A cat.",
    image_1=None,
    image_2=None,
    image_3=None,
    height=32.0,  # numbers come from the browser as floats
    width=48.0,
    guidance_scale=2.5,
    img_guidance_scale=1.6,
    steps=3.0,
    seed=7.0,
    randomize=False,
    max_input_image_size=32.0,
    use_input_image_size=False,
    negative_prompt=DEFAULT_NEGATIVE_PROMPT,
    memory="auto",
)
EDIT = replace(FIELDS, prompt="<img><|image_1|></img> Make it black.", image_1=CAT)
BAD = {
    "size": {"width": 100.0},
    "no size": {"height": None},
    "fraction": {"steps": 2.5},
    "steps": {"steps": 0.0},
    "guidance": {"guidance_scale": None},
    "prompt": {"prompt": "  "},
    "no image": {"prompt": "<img><|image_1|></img> Make it black."},
    "unnamed image": {"image_1": CAT},
    "no picture": {"prompt": EDIT.prompt, "image_1": __file__},
    "input size": {"use_input_image_size": True},
    "memory": {"memory": "a lot"},
    "little memory": {"memory": "1KiB"},
    "seed": {"seed": 1e30},
}


def course(pipe, fields: Fields, **options) -> list[Progress | Finished]:
    return list(Job(pipe, fields.call(), **options).run())


class TestFields:
    def test_become_the_call_that_python_makes(self, pipe):
        (expected_image,) = pipe(
            EDIT.prompt,
            [CAT],
            height=32,
            width=48,
            num_inference_steps=3,
            guidance_scale=2.5,
            img_guidance_scale=1.6,
            max_input_image_size=32,
            seed=7,
            progress=False,
        )
        end = course(pipe, EDIT)[-1]
        np.testing.assert_array_equal(np.array(end.image), np.array(expected_image))

    def test_random_seeds_differ(self):
        drawn = {replace(FIELDS, randomize=True, seed=None).call()["seed"] for _ in range(20)}
        assert len(drawn) > 1
        assert all(0 <= seed < 1 << 32 for seed in drawn)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"image_2": CAT}, "image 2 is given but image 1 is not"),
            ({"image_1": CAT, "image_3": CAT}, "image 3 is given but image 2 is not"),
            ({"seed": None}, "seed must be an integer, got None"),
        ],
    )
    def test_what_only_the_page_gets_wrong(self, given, message):
        with pytest.raises(RequestError, match=message):
            replace(FIELDS, **given).call()

    @pytest.mark.parametrize(
        ("given", "seeds"),
        [
            ({}, [7]),
            ({"pictures": 3.0}, [7, 8, 9]),
            ({"seeds": " 4, 5\n-6 ;7,"}, [4, 5, -6, 7]),
            ({"seeds": "18446744073709551615"}, [(1 << 64) - 1]),
            ({"seeds": "1 2", "pictures": 2.0}, [1, 2]),
            ({"seeds": None, "pictures": None}, [7]),
        ],
    )
    def test_a_call_for_each_seed(self, given, seeds):
        calls = replace(FIELDS, **given).calls()
        assert [call["seed"] for call in calls] == seeds
        assert all(call | {"seed": 7} == FIELDS.call() for call in calls)

    def test_each_picture_draws_its_own_seed(self):
        calls = replace(FIELDS, randomize=True, pictures=8.0).calls()
        assert len({call["seed"] for call in calls}) > 1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"pictures": 0.0}, "pictures must be from 1 to 16, got 0"),
            ({"pictures": 17.0}, "pictures must be from 1 to 16, got 17"),
            ({"pictures": 1.5}, "pictures must be from 1 to 16, got 1.5"),
            ({"seeds": "1, two"}, "seeds must be integers such as 1, 2, 3, got 'two'"),
            ({"seeds": "1.5"}, "seeds must be integers"),
            ({"seeds": "1," * 17}, "at most 16 seeds are taken, got 17"),
            ({"seeds": "1 2", "pictures": 3.0}, "2 seeds are listed for 3 pictures"),
            ({"image_1": "/none.png"}, "image 1 is no longer on the server; upload it again"),
            ({"mask": "/none.png"}, "the mask is no longer on the server; paint it again"),
        ],
    )
    def test_lists_counts_and_files_that_are_gone(self, given, message):
        with pytest.raises(RequestError) as caught:
            replace(FIELDS, **given).calls()
        assert message in str(caught.value)

    def test_a_mask_is_of_the_size_of_its_image(self, pipe, tmp_path):
        mask = tmp_path / "mask.png"
        size = Image.open(CAT).size
        drawn = Image.new("L", size)
        drawn.paste(255, (0, 0, size[0] // 2, size[1]))
        drawn.save(mask)
        fields = replace(EDIT, mask=str(mask), mask_blur=2.0)
        (expected_image,) = pipe(
            EDIT.prompt,
            [CAT],
            num_inference_steps=3,
            guidance_scale=2.5,
            img_guidance_scale=1.6,
            max_input_image_size=32,
            use_input_image_size_as_output=True,
            mask_image=str(mask),
            mask_blur=2,
            seed=7,
            progress=False,
        )
        end = course(pipe, fields)[-1]
        np.testing.assert_array_equal(np.array(end.image), np.array(expected_image))
        path = save(end.image, fields.call(), str(TINY), "float32", tmp_path / "pictures")
        assert find_mask(read_record(path), path) == str(path.with_name(f"{path.stem}-mask.png"))

    @pytest.mark.parametrize("given", BAD.values(), ids=BAD)
    def test_errors_are_those_of_python(self, pipe, given):
        arguments = replace(FIELDS, **given).call()
        with pytest.raises(OmniGenError) as here:
            list(Job(pipe, arguments).run())
        with pytest.raises(OmniGenError) as there:
            pipe(**arguments, progress=False)
        assert sentence(here.value) == str(there.value)
        with pytest.raises(OmniGenError) as table:
            memory_table(pipe, arguments)
        assert str(table.value) == str(there.value)

    def test_errors_are_those_of_the_command_line(self, pipe, tmp_path):
        with pytest.raises(RequestError) as here:
            course(pipe, replace(FIELDS, width=100.0))
        options = ["--model", str(TINY), "--prompt", "A cat.", "--width", "100", "--height", "32"]
        there = CliRunner().invoke(main, ["generate", *options, "--out", f"{tmp_path}/a.png"])
        assert there.output == f"Error: {here.value}\n"


class TestJob:
    def test_course(self, pipe):
        events = course(pipe, FIELDS, preview=Preview(torch.eye(4)[:, :3], torch.zeros(3)))
        *steps, end = events
        assert isinstance(end, Finished) and not end.stopped
        assert end.image.size == (48, 32)
        # some may be passed over when they come faster than they are looked at
        assert [step.done for step in steps] == sorted({step.done for step in steps})
        assert all(step.steps == 3 for step in steps)

    def test_stop_ends_it_after_the_step_that_runs(self, pipe):
        job = Job(pipe, replace(FIELDS, steps=50.0).call())
        pressed_in, original = 4, job._after_step

        def after(pipe, step, *rest):
            if step == pressed_in:  # the button, while this step is running
                job.stop()
            original(pipe, step, *rest)

        job._after_step = after
        *_, end = job.run()
        assert end.stopped
        assert (end.done, end.steps) == (pressed_in + 1, 50)
        assert course(pipe, FIELDS)[-1].done == 3  # and the pipeline is free again

    def test_left_early_it_stops(self, pipe):
        job = Job(pipe, replace(FIELDS, steps=1000.0).call())
        watched = job.run()
        next(watched)
        watched.close()
        assert job.stopping
        assert course(pipe, FIELDS)[-1].done == 3

    def test_any_failure_arrives(self):
        def broken(**arguments):
            raise MemoryError("no more")

        with pytest.raises(MemoryError, match="no more"):
            list(Job(broken, FIELDS.call()).run())
        assert "MemoryError: no more" in sentence(MemoryError("no more"))

    @pytest.mark.parametrize(
        ("progress", "text"),
        [
            (Progress(1, 50, None, None), "Step 1 of 50"),
            (Progress(10, 50, 0.5, None), "Step 10 of 50, 0.50 s each, 20 s left"),
            (Progress(10, 50, 5.0, None), "Step 10 of 50, 5.00 s each, 3 min 20 s left"),
            (Progress(0, 1000, 3.9, None), "Step 0 of 1000, 3.90 s each, 1 h 5 min left"),
        ],
    )
    def test_time_left(self, progress, text):
        assert str(progress) == text


class TestPreview:
    def test_fit_finds_the_colours_of_a_vae(self):
        """Of one whose latents are an affine function of the mean colour of 8 x 8 pixels."""
        mixing, shift = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), 0.3

        def encode(image):
            means = torch.from_numpy(image.pixels).float().div(255)
            means = means.reshape(32, 8, 32, 8, 3).mean((1, 3))
            return (means @ mixing + shift).permute(2, 0, 1)

        preview = Preview.fit(SimpleNamespace(encode=encode, loaded=nullcontext))
        colours = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(1))
        latents = (colours @ mixing + shift).permute(2, 0, 1)
        torch.testing.assert_close(preview.pixels(latents), colours, rtol=0, atol=1e-4)
        assert preview.image(latents).size == (48, 40)
        assert preview.image(latents.repeat(1, 40, 40)).size == (512, 427)

    def test_fits_the_vae_at_hand(self, shared_pipe):
        """It follows the fitted picture better than the one colour that fits best."""
        from omnigen_fast.vae.preview import _patches

        image = _patches()
        latents = shared_pipe.vae.encode(image)
        shown = Preview.fit(shared_pipe.vae).pixels(latents)
        means = torch.from_numpy(image.pixels).float().div(255).reshape(32, 8, 32, 8, 3)
        means = means.mean((1, 3))
        assert (shown - means).square().mean() < means.var(dim=(0, 1)).mean()

    def test_expected_is_the_end_of_a_straight_way(self):
        start, end = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        way = [start + (end - start) * i / 10 for i in range(11)]
        for step in range(10):
            torch.testing.assert_close(expected(way[step], way[step + 1], 9 - step), end)


class TestSave:
    IMAGE = Image.new("RGB", (48, 32), "teal")

    def save(self, folder, fields=EDIT):
        return save(self.IMAGE, fields.call(), "some/model", "float32", folder)

    def test_two_in_the_same_second(self, tmp_path):
        first, second = (self.save(tmp_path / "new/folder") for _ in range(2))
        assert first != second
        assert sorted(path.name for path in first.parent.iterdir()) == sorted(
            name for path in (first, second) for name in (path.name, f"{path.stem}-input-1.png")
        )
        record = read_record(second)
        assert record.model == "some/model"
        assert record.prompts == (EDIT.prompt,)
        ((image,),) = find_images(record, second)
        assert image == str(second.with_name(f"{second.stem}-input-1.png"))

    @pytest.mark.parametrize("fails", ["shutil.copyfile", "PIL.Image.Image.save"])
    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch, fails):
        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fails, full)
        with pytest.raises(OSError, match="No space left"):
            self.save(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_what_the_weights_are(self, tmp_path):
        loading = {"weights": "int8", "vae_path": "v", "revision": None, "device": "cpu"}
        loras = ["/x/style:0.5"]
        path = save(
            *(self.IMAGE, FIELDS.call(), "some/model", "float32", tmp_path),
            loras=loras,
            loading=loading,
        )
        record = read_record(path)
        assert record.loras == tuple(loras) and record.vae_path == "v"
        assert record.precision == {"weights": "int8"} and record.revision is None

    @pytest.mark.parametrize("quality", QUALITIES)
    def test_made_again_to_the_same_bytes(self, pipe, tmp_path, quality):
        fields = replace(EDIT, quality=quality)
        end = course(pipe, fields)[-1]
        path = save(end.image, fields.call(), str(TINY), "float32", tmp_path)
        recorded = read_record(path).arguments
        stands_for = {name: one for name, one in preset(quality).items() if name in recorded}
        assert recorded.items() >= {**stands_for, "num_inference_steps": 3}.items()
        assert recorded.get("quality", "exact") == quality
        again = tmp_path / "again.png"
        options = ["--model", str(TINY), "--device", "cpu", "--recorded-images", "--quiet"]
        result = CliRunner().invoke(
            main, ["generate", "--from", str(path), *options, "--out", str(again)]
        )
        assert result.exit_code == 0, result.output
        assert again.read_bytes() == path.read_bytes()


class TestMemoryTable:
    def test_marks_the_plan_that_is_carried_out(self, pipe):
        table = memory_table(pipe, EDIT.call())
        assert [row[0] for row in table].count("chosen") == 1
        assert all(len(row) == len(TABLE_HEADERS) for row in table)
        course(pipe, EDIT)
        from omnigen_fast.memory.planner import describe

        (chosen,) = (row for row in table if row[0] == "chosen")
        assert chosen[3] == describe(pipe.last_plan, pipe.config)

    def test_what_does_not_fit(self, pipe):
        least = min(float(row[1]) for row in memory_table(pipe, FIELDS.call()))
        with pytest.raises(MemoryBudgetError):
            memory_table(pipe, replace(FIELDS, memory=f"{least / 2} GB").call())

    def test_while_a_picture_is_made(self, pipe):
        """It neither waits for the call that runs nor disturbs it."""
        alone = course(pipe, FIELDS)[-1]
        job, tables = Job(pipe, FIELDS.call()), []
        original, free = job._after_step, threading.Event()

        def after(*arguments):
            original(*arguments)
            assert free.wait(60)

        job._after_step = after
        events = job.run()
        next(events)
        tables.append(memory_table(pipe, EDIT.call()))
        free.set()
        *_, end = events
        assert tables[0]
        np.testing.assert_array_equal(np.array(end.image), np.array(alone.image))


@pytest.mark.parametrize("one", gallery("any model").examples, ids=lambda one: one.prompt[:30])
def test_examples_of_the_gallery_run(pipe, one):
    images = [None if path is None else str(path) for path in one.three_images()]
    fields = Fields(
        *(one.prompt, *images, 32, 32, one.guidance_scale, 1.6, 1, 0, False, 32),
        *(one.use_input_image_size, DEFAULT_NEGATIVE_PROMPT, "auto"),
    )
    assert course(pipe, fields)[-1].done == 1


def test_without_gradio_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("components", "actions", "ui", "serve"):
        monkeypatch.delitem(sys.modules, f"omnigen_fast.page.{name}", raising=False)
    result = CliRunner().invoke(main, ["app"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: the page needs gradio; install it with: pip install 'omnigen_fast[app]'\n"
    )


@pytest.mark.parametrize("module", ["omnigen_fast.app", "omnigen_fast.cli"])
def test_as_a_module(module):
    arguments = ["--help"] if module.endswith("app") else ["app", "--help"]
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True)
    assert result.returncode == 0
    assert b"--share" in result.stdout and b"--port" in result.stdout


def test_the_page_gives_no_more_memory_than_there_is(pipe, monkeypatch):
    """Who asks for more would end the process, and with it the calls of others."""
    there = memory_table(pipe, FIELDS.call())
    assert memory_table(pipe, replace(FIELDS, memory="999TiB").call()) == there
    monkeypatch.setattr("omnigen_fast.memory.device.free_bytes", lambda *arguments: 1 << 10)
    greedy = replace(FIELDS, memory="999TiB")
    for call in (lambda: course(pipe, greedy), lambda: memory_table(pipe, greedy.call())):
        with pytest.raises(MemoryBudgetError):
            call()


def test_a_limit_is_for_every_picture(pipe):
    """What the page was started with holds, whatever a visitor asks for."""
    least = min(float(row[1]) for row in memory_table(pipe, FIELDS.call()))
    limit = int(least * 1e9 / 2)
    for memory in ("auto", "999TiB"):
        call = replace(FIELDS, memory=memory).call()
        with pytest.raises(MemoryBudgetError):
            memory_table(pipe, call, limit)
        with pytest.raises(MemoryBudgetError):
            list(Job(pipe, call, limit=limit).run())
    assert memory_table(pipe, FIELDS.call(), 1 << 60) == memory_table(pipe, FIELDS.call())
