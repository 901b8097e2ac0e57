"""Masked edits: what is outside stays to the byte, and what is inside is the plain edit's."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, relative_error
from PIL import Image
from recording import recording_graphs
from step_cases import CHANGES, PLAN, under

from omnigen_fast.denoise import Loop
from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.images import read_image
from omnigen_fast.masks import feathered, read_mask
from omnigen_fast.solvers import SOLVERS

PHOTO = str(GOLDEN / "images" / "coffee.png")
EDIT = {
    "prompt": "<img><|image_1|></img> no cup",
    "input_images": [PHOTO],
    "max_input_image_size": 96,
    "use_input_image_size_as_output": True,
    "num_inference_steps": 4,
    "seed": 11,
    "progress": False,
}
LATENT = {**EDIT, "output_type": "latent"}
IMAGE = read_image(PHOTO, 96, 768, "photo")
HEIGHT, WIDTH = IMAGE.size
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[16:40, 24:61] = 255
INSIDE = torch.zeros(HEIGHT // 8, WIDTH // 8, dtype=torch.bool)
INSIDE[2:5, 3:8] = True


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Of rectangles, some of which are holes; never empty."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for place in range(rng.integers(1, 5)):
        top, left = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
        height, width = rng.integers(1, HEIGHT), rng.integers(1, WIDTH)
        mask[top : top + height, left : left + width] = place != 1
    mask[rng.integers(0, HEIGHT), rng.integers(0, WIDTH)] = True
    return mask


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class TestOutside:
    def test_bytes_are_those_of_the_input(self, pipe):
        """200 masks with seams, over pictures that have nothing to do with it."""
        rng = np.random.default_rng(0)
        for seed in range(200):
            mask, blur = random_mask(rng), int(rng.integers(0, 40))
            request = {**EDIT, "mask_image": mask, "mask_blur": blur, "seed": seed}
            edit = pipe.make_call(**request).request.edit
            found = edit.compose_(torch.from_numpy(rng.random((2, 3, HEIGHT, WIDTH), np.float32)))
            found = (found.permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
            for one in found:
                assert (one[~mask] == IMAGE.pixels[~mask]).all()

    @pytest.mark.slow
    def test_whole_calls_of_any_size(self, pipe):
        """200 pictures with their masks and seams, from the first step to the bytes."""
        rng = np.random.default_rng(1)
        for seed in range(200):
            height, width = (int(side) for side in rng.integers(1, 4, 2) * 16)
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = rng.random((height, width)) < rng.choice([0.0, 0.1, 0.9, 1.0])
            mask[rng.integers(height), rng.integers(width)] = True
            request = {**EDIT, "input_images": [image], "mask_image": mask, "seed": seed}
            request |= {"mask_blur": int(rng.integers(0, 40)), "num_inference_steps": 1}
            (found,) = pipe(**request)
            assert (np.array(found)[~mask] == image[~mask]).all(), seed

    @pytest.mark.parametrize("blur", [0, 5])
    def test_of_a_call(self, pipe, blur):
        (plain,) = pipe(**EDIT)
        (found,) = pipe(**EDIT, mask_image=MASK, mask_blur=blur)
        found, plain, outside = np.array(found), np.array(plain), MASK == 0
        assert (found[outside] == IMAGE.pixels[outside]).all()
        assert (found[~outside] != IMAGE.pixels[~outside]).mean() > 0.5
        assert (found != plain).any()

    def test_every_value_of_a_byte_comes_back(self, pipe):
        values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
        mask = np.zeros((16, 16), bool)
        mask[0, 0] = True
        request = {**EDIT, "input_images": [values], "mask_image": mask}
        for _ in range(2):
            (found,) = pipe(**request)
            assert (np.array(found)[~mask] == values[~mask]).all()

    @pytest.mark.parametrize("kind", ["pt", "np", "pil"])
    def test_all_kinds_of_output_show_one_picture(self, pipe, kind):
        request = {**EDIT, "mask_image": MASK, "mask_blur": 3}
        expected = pipe(**request, output_type="pt")[0].permute(1, 2, 0).numpy()
        found = pipe(**request, output_type=kind)[0]
        if kind == "pil":
            found, expected = np.array(found), (expected * 255).astype(np.uint8)
        elif kind == "pt":
            found = found.permute(1, 2, 0).numpy()
        assert (found == expected).all()
        known = IMAGE.pixels[MASK == 0] / np.float32(255 if kind != "pil" else 1)
        assert (found[MASK == 0] == known).all()


class TestLatents:
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_outside_are_on_the_inputs_way_and_callbacks_see_them(self, pipe, solver):
        call = pipe.make_call(**LATENT, mask_image=MASK, solver=solver)
        seen = []
        pipe(
            **LATENT,
            mask_image=MASK,
            solver=solver,
            callback_on_step_end=lambda _, step, time, kept: seen.append(kept["latents"]),
        )
        known = pipe.engine.image_latents[IMAGE.digest, None]
        for step, latents in enumerate(seen, 1):
            way = (1 - step / 4) * call.noise + step / 4 * known
            assert torch.equal(latents[..., ~INSIDE], way[..., ~INSIDE])
            assert relative_error(latents[..., INSIDE], way[..., INSIDE]) > 1e-2

    def test_a_white_mask_is_the_plain_edit(self, pipe):
        found = pipe(**LATENT, mask_image=np.full_like(MASK, 255))
        assert torch.equal(found, pipe(**LATENT))

    @pytest.mark.parametrize(
        "options", [{"mask_image": MASK}, {"strength": 0.6}], ids=lambda one: next(iter(one))
    )
    @under(*CHANGES, {"strip_rows": 4})
    @pytest.mark.parametrize("solver", ["euler", "midpoint"])
    def test_under_any_plan(self, pipe, monkeypatch, change, options, solver):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        request = {**LATENT, **options, "num_inference_steps": 7, "solver": solver}
        expected = pipe(**request, memory=PLAN)
        for _ in range(2):
            found = pipe(**request, memory=replace(PLAN, **change))
            assert relative_error(found, expected) < 1e-5
            assert torch.equal(found, expected) or "capture" not in change
        assert events.count("capture") == ("capture" in change)

    def test_a_capture_serves_other_masks(self, pipe, monkeypatch):
        graphs, events = recording_graphs()
        monkeypatch.setattr(pipe.engine, "graphs", graphs)
        requests = [
            {**LATENT, "mask_image": mask, "seed": seed}
            for mask in (MASK, np.roll(MASK, 16, 1))
            for seed in (1, 2)
        ]
        expected = [pipe(**request, memory=PLAN) for request in requests]
        for request, one in zip(requests, expected):
            assert torch.equal(pipe(**request, memory=replace(PLAN, capture=True)), one)
        assert events.count("capture") == 1

    @pytest.mark.parametrize(
        "options", [{"mask_image": MASK}, {"strength": 0.5}], ids=lambda one: next(iter(one))
    )
    def test_pictures_of_a_call_are_each_alone(self, pipe, options):
        noise = torch.cat([pipe.make_call(**LATENT | {"seed": one}).latents for one in (1, 2)])
        request = {**LATENT, **options, "seed": None}
        together = pipe(**request, latents=noise, num_images_per_prompt=2)
        for i in range(2):
            alone = pipe(**request, latents=noise[i : i + 1])
            assert relative_error(together[i : i + 1], alone) < 1e-5

    @pytest.mark.parametrize("at", [1, 3])
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_another_plan_goes_on_from_the_last_step(self, pipe, monkeypatch, at, strength):
        request = {**LATENT, "mask_image": MASK, "strength": strength, "num_inference_steps": 8}
        expected = pipe(**request)
        left, plain = [at], Loop.predict

        def failing(loop, kind):
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("out of memory")
            return plain(loop, kind)

        monkeypatch.setattr(Loop, "predict", failing)
        assert relative_error(pipe(**request), expected) < 1e-5
        assert left[0] < 0

    def test_the_input_is_encoded_where_its_condition_is_kept(self, pipe):
        pipe(**LATENT)
        pipe.engine.image_latents.clear()
        expected = pipe(**LATENT, mask_image=MASK)
        assert len(pipe.engine.image_latents) == 1
        assert torch.equal(pipe(**LATENT, mask_image=MASK), expected)


class TestStrength:
    @pytest.mark.parametrize(
        ("strength", "steps", "run"),
        [(0.6, 50, 30), (0.7, 10, 7), (0.3, 10, 3), (0.99, 4, 4), (0.01, 4, 1), (1, 4, 4)],
    )
    def test_which_steps_run(self, pipe, strength, steps, run):
        request = {**LATENT, "num_inference_steps": steps, "strength": strength}
        call = pipe.make_call(**request)
        assert len(call.schedule) == call.request.steps == run
        assert call.schedule.ends == pytest.approx([1 - i / steps for i in range(run, -1, -1)])

    def test_starts_from_the_input_with_noise(self, pipe):
        request = {**LATENT, "num_inference_steps": 10, "strength": 0.4}
        call = pipe.make_call(**request)
        running = pipe.engine.start(call, PLAN)
        known = pipe.engine.image_latents[IMAGE.digest, None]
        start = 0.4 * call.noise + 0.6 * known
        torch.testing.assert_close(running.latents, start)
        pipe.engine.drop(running)
        seen = []
        pipe(**request, callback_on_step_end=lambda _, *step: seen.append(step[:2]))
        assert [step for step, _ in seen] == [0, 1, 2, 3]
        assert [time for _, time in seen] == pytest.approx([0.6, 0.7, 0.8, 0.9])

    def test_of_times_given_by_hand(self, pipe):
        call = pipe.make_call(**LATENT, strength=0.5, timesteps=[0, 0.1, 0.3, 0.8])
        assert call.schedule.ends == (0.3, 0.8, 1)

    def test_one_is_the_plain_edit(self, pipe):
        assert pipe.make_call(**LATENT, strength=1).request.edit is None


class TestMasks:
    @pytest.mark.parametrize(
        "mask",
        [
            MASK,
            MASK > 0,
            MASK.astype(np.float32) / 255,
            torch.from_numpy(MASK),
            Image.fromarray(MASK),
            Image.fromarray(MASK).convert("1"),
            Image.fromarray(MASK).convert("RGB"),
            png(Image.fromarray(MASK)),
            png(Image.fromarray(MASK), "TIFF"),
            png(Image.merge("LA", [Image.fromarray(MASK), Image.new("L", (WIDTH, HEIGHT), 255)])),
            np.where(MASK, 128, 127).astype(np.uint8),
        ],
        ids=lambda mask: type(mask).__name__,
    )
    def test_white_is_edited(self, mask):
        found = read_mask(mask, IMAGE, 96, 768, 0)
        assert (found.opacity == MASK // 255).all()
        assert (found.latents == INSIDE.numpy()).all()

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", None])
    @pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 10, 200)])
    def test_transparent_is_edited(self, kind, colour):
        """Whatever the colours are; half transparent ones are edited from 128 on."""
        alpha = np.where(MASK, 127, 128).astype(np.uint8)
        image = Image.new("RGB", (WIDTH, HEIGHT), colour)
        image.putalpha(Image.fromarray(alpha))
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        source = np.array(image)
        if kind is not None:
            file = io.BytesIO()
            image.save(file, kind, **options)
            source = file.getvalue()
        assert (read_mask(source, IMAGE, 96, 768, 0).opacity == MASK // 255).all()

    def test_is_shrunk_and_cropped_as_the_input_is(self):
        rng = np.random.default_rng(1)
        photo = rng.integers(0, 256, (150, 203, 3), np.uint8)
        image = read_image(photo, 96, 768, "photo")
        mask = np.zeros((150, 203), np.uint8)
        mask[:, 100:] = 255
        found = read_mask(mask, image, 96, 768, 0).opacity
        assert found.shape == image.size
        assert set(found[0]) == {0, 1} and (found == found[0]).all()
        assert abs(found[0].mean() - 103 / 203) < 0.03

    @pytest.mark.parametrize("blur", [0, 1, 7, 1000])
    def test_a_seam_lies_inside(self, blur):
        """By its definition: the steps along rows and columns to the nearest pixel outside."""
        rng = np.random.default_rng(blur)
        for _ in range(5):
            edited = random_mask(rng)[:24, :24]
            places = np.argwhere(~edited)
            rows, columns = np.mgrid[:24, :24]
            distance = np.full(edited.shape, np.inf)
            for row, column in places:
                steps = abs(rows - row) + abs(columns - column)
                distance = np.minimum(distance, steps)
            expected = np.minimum(distance / (blur + 1), 1)
            np.testing.assert_allclose(feathered(edited, blur), expected, rtol=1e-6)
            assert ((feathered(edited, blur) > 0) == edited).all()

    @pytest.mark.parametrize(
        ("argument", "match"),
        [
            ({"mask_image": MASK[:-16]}, "mask_image is .* a mask of the input image's size"),
            ({"mask_image": np.zeros_like(MASK)}, "mask_image marks nothing to edit"),
            ({"mask_image": np.zeros((0, 4), np.uint8)}, "mask_image is an empty array"),
            ({"mask_image": "nowhere.png"}, "mask_image: nowhere.png does not exist"),
            ({"mask_image": b"no image"}, "mask_image "),
            ({"mask_image": 7}, "mask_image must be a path"),
            ({"mask_image": [MASK]}, "mask_image must be a path"),
            ({"mask_image": MASK.astype(np.float32)}, "mask_image holds floats"),
            ({"mask_image": MASK, "mask_blur": -1}, "mask_blur must be from 0"),
            ({"mask_image": MASK, "mask_blur": 0.5}, "mask_blur must be an integer"),
            ({"mask_image": MASK, "mask_blur": 5000}, "mask_blur must be from 0 to 1024 pixels"),
            ({"mask_blur": 3}, "mask_blur=3 needs a mask_image"),
            (
                {
                    "mask_image": MASK,
                    "use_input_image_size_as_output": False,
                    "height": 32,
                    "width": 32,
                },
                "the output of mask_image is as large as its input image",
            ),
            (
                {
                    "strength": 0.5,
                    "use_input_image_size_as_output": False,
                    "height": 32,
                    "width": 32,
                },
                "the output of strength is as large as its input image",
            ),
            ({"strength": 0}, "strength must be above 0"),
            ({"strength": 1.5}, "strength must be above 0"),
            ({"strength": "0.5"}, "strength must be a finite number"),
        ],
    )
    def test_refused(self, pipe, argument, match):
        with pytest.raises(RequestError, match=match) as caught:
            pipe(**{**EDIT, **argument})
        assert isinstance(caught.value, OmniGenError) and len(str(caught.value)) <= 300

    @pytest.mark.parametrize(
        "option", [{"mask_image": MASK}, {"strength": 0.5}], ids=lambda one: next(iter(one))
    )
    @pytest.mark.parametrize(
        "request_",
        [
            {"prompt": "A cat."},
            {"prompt": [EDIT["prompt"]] * 2, "input_images": [[PHOTO], [PHOTO]]},
            {
                "prompt": "<img><|image_1|></img> <img><|image_2|></img>",
                "input_images": [PHOTO, PHOTO],
            },
        ],
        ids=["no image", "a batch", "two images"],
    )
    def test_one_prompt_with_one_image(self, pipe, request_, option):
        with pytest.raises(RequestError, match="needs one prompt with one input image"):
            pipe(**request_, **option, height=64, width=64)
