"""Lines of a batch file."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from omnigen_fast.batch.lines import KEYS, BadLine, Job, Source
from omnigen_fast.batch.results import Results
from omnigen_fast.batch.run import run
from omnigen_fast.page.record import Record

from .. import mutate, tiny
from ..oracle import Refused, message_fault
from . import Kind

_WHOLE = 20  # every so many inputs the lines are carried out
_GOOD: dict[str, Any] = {
    "id": "good",
    "prompt": "a cat <img><|image_1|></img>",
    "input_images": ["image.png"],
    "seed": 1,
}
_LINE: dict[str, Any] = {
    "id": "one",
    "prompt": "a dog and <|image_1|>",
    "input_images": ["image.png"],
    "negative_prompt": "ugly",
    "height": 16,
    "width": 32,
    "num_inference_steps": 1,
    "guidance_scale": 2.5,
    "num_images_per_prompt": 2,
    "seed": 7,
    "output_type": "pil",
    "solver": "heun",
    "reuse": 0.01,
    "quality": "fast",
    "guidance_interval": [0.1, 0.9],
    "mask_image": "image.png",
    "strength": 0.5,
}
_TRAINING: dict[str, Any] = {
    "task_type": "edit",
    "instruction": "make it green <img><|image_1|></img>",
    "input_images": ["./image.png"],
    "output_image": "made.png",
}
_VALUES = (
    *(
        "image.png",
        ["image.png", "image.png"],
        ["../image.png"],
        ["/dev/zero"],
        ["nowhere.png"],
        [None],
    ),
    *("data:image/png;base64,AAAA", ["https://127.0.0.1/a.png"], ["a\0b"], ["~/x"], ["."]),
    *("good", "good-1", "GOOD", "..", "a/b", "CON", "x" * 300, "a\n", 1, 16, 1000, 1 << 70),
    *("latent", "pil", "1GiB", "1MB", True),
)
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(KEYS.keys() - {"instruction"}),
    "height": 16,
    "width": 16,
    "num_inference_steps": 1,
    "guidance_scale": 3.0,
    "use_img_guidance": True,
    "img_guidance_scale": 1.6,
    "max_input_image_size": 64,
    "use_input_image_size_as_output": False,
    "num_images_per_prompt": 1,
    "dtype": "float32",
    "output_type": "latent",
    "solver": "euler",
    "time_shift": 1.0,
    "reuse": "off",
    "quality": "exact",
    "mask_blur": 0,
    "strength": 1.0,
}
_MOST_WORK = 100  # pixels of a side, and steps, of a line that is carried out


class Batches(Kind):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model, _ = tiny.write_models(folder)
        self._model = model
        self._pipe = tiny.load_pipe(model)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "image.png")
        made_with = Record("tiny", (), (), None, {})
        out = folder / "out"
        out.mkdir()
        self._source = Source(folder=folder, out=out, made_with=made_with, defaults=_DEFAULTS)

    def make(self, rng: random.Random, number: int) -> bytes:
        lines = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            line = json.loads(json.dumps(rng.choice((_LINE, _LINE, _TRAINING))))
            names = (*KEYS, "id", "generator", "progress", "hight", "")
            lines.append(mutate.json_bytes(rng, mutate.tree(rng, line, _VALUES, names)))
        lines.insert(rng.randrange(len(lines) + 1), json.dumps(_GOOD).encode())
        end = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n \n"))
        data = end.join(lines) + rng.choice((b"", end))
        return mutate.octets(rng, data) if rng.random() < 0.1 else data

    def size(self, case: bytes) -> int:
        return len(case)

    def run(self, prepared: bytes, number: int) -> None:
        lines = list(self._source.lines(io.BytesIO(prepared)))
        for line in lines:
            if isinstance(line, BadLine):
                fault = message_fault(line.error)
                assert not fault, f"line {line.number}: {fault}"
        if number % _WHOLE == 0:
            self._carry_out(line for line in lines if _is_small(line))
        if bad := [line.error for line in lines if isinstance(line, BadLine)]:
            raise Refused(bad[0])

    def good(self) -> bytes:
        self._pipe.clear_cache()
        text = io.BytesIO(json.dumps(_GOOD).encode())
        (latents,) = self._carry_out(self._source.lines(text))
        return latents

    def renew(self) -> None:
        self._pipe = tiny.load_pipe(self._model)

    def save(self, case: bytes, folder: Path) -> None:
        (folder / "batch.jsonl").write_bytes(case)

    def _carry_out(self, lines: Iterator[Job | BadLine]) -> list[bytes]:
        """Runs lines as if nothing had run before; returns the latents that were saved."""
        saved = []

        def save(job: Job, result: Any, record: Record) -> list[Path]:
            if job.output_type == "latent":
                saved.append(result.numpy().tobytes())
            return [self._source.out / f"{job.id}.png"]

        (self._source.out / "results.jsonl").unlink(missing_ok=True)
        with Results(self._source.out) as results:
            run(lambda: self._pipe, lines, results, save)
        for text in (self._source.out / "results.jsonl").read_text().splitlines():
            error = json.loads(text)["error"]
            fault = "" if error is None else message_fault(error)
            assert not fault, fault
        return saved


def _is_small(line: Job | BadLine) -> bool:
    if isinstance(line, BadLine):
        return True
    given = line.record.arguments
    sides = max(given["height"] or 0, given["width"] or 0, given["num_inference_steps"])
    return sides <= _MOST_WORK and line.pictures <= 2
