"""What the page's buttons do: pictures, the table of plans, settings from a picture."""

from __future__ import annotations

import html
import json
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import OmniGenError, RequestError
from ..fewer_steps import QUALITIES, preset
from ..memory.device import parse_memory
from ..pipeline import OmniGenPipeline
from ..vae.preview import Preview
from .components import cached, gr
from .files import Files
from .gallery import Gallery
from .job import (
    TABLE_HEADERS,
    Fields,
    Finished,
    Job,
    Progress,
    clock,
    memory_table,
    save,
    sentence,
)
from .line import Line
from .loras import Chosen, Loras
from .record import read_record
from .settings import LARGEST_SEED, fields_of

_MAX_TABLES = 2  # memory tables at a time: they read the images, which may be large
_WRITING_SECONDS = 4.0  # that the end waits for a picture being written
_TABLE_PATIENCE = 1.0  # seconds that a table waits for its turn
_IMAGES = ("image_1", "image_2", "image_3")
NAMES = tuple(Fields.__dataclass_fields__)  # of the fields, in the page's order


class Actions:
    """A model, the folder for its pictures, and the calls that run or wait.

    Args:
        pipe: the model.
        model: as it was named.
        folder: for pictures.
        loras: what visitors can choose from.
        memory: at most, for each picture.
        loading: other arguments that the pipeline was loaded with.
    """

    def __init__(
        self,
        pipe: OmniGenPipeline,
        model: str,
        folder: Path,
        loras: Loras | None = None,
        memory: str = "auto",
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.model, self._folder = pipe, model, folder
        self.loras, self._loading = loras or Loras(pipe), dict(loading or {})
        self.limit = parse_memory(memory)
        self.dtype = str(pipe.dtype).removeprefix("torch.")
        self._preview = Preview.fit(pipe.vae)
        self.line, self.files = Line(), Files()
        self._tables = threading.Semaphore(_MAX_TABLES)
        self._writing = threading.Lock()

    def finish_writing(self) -> None:
        """Waits for the picture that is being written, if any; no other one is begun."""
        self._writing.acquire(timeout=_WRITING_SECONDS)

    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields status, picture, seed, saved file, both buttons' states, and what was made.

        What is shown stays until a step of the new picture is over: a refused request changes none
        of it.
        """
        same = gr.skip()
        running = gr.Button(interactive=False), gr.Button(interactive=True)
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        unchanged = same, same, same
        try:
            fields = Fields(*values)
            chosen = self.loras.choice(fields.lora, fields.lora_strength)
            calls = fields.calls()
            made: list[Finished] = []
            with self.line.place(request.session_hash, job := self._job(calls[0], chosen)):
                for number, call in enumerate(calls):
                    if number:
                        ended, job = job, self._job(call, chosen)
                        if not self.line.again(ended, job):
                            yield _status(_stopped(made, calls)), *unchanged, *idle, same
                            return
                    which = f"Picture {number + 1} of {len(calls)}: " * (len(calls) > 1)
                    for others in self.line.wait(job):
                        text = f"{which}Waiting: {others} before this one"
                        yield _status(text), *unchanged, *running, same
                    if job.stopping:
                        yield _status(_stopped(made, calls)), *unchanged, *idle, same
                        return
                    yield _status(f"{which}Starting"), *unchanged, *running, same
                    begun, note = False, ""
                    for event in job.run():
                        if not begun:
                            begun, note = True, self._note(call)
                        if isinstance(event, Progress):
                            picture = same if event.preview is None else event.preview
                            status = _status(f"{which}{event}", event.done / event.steps, note)
                            yield status, picture, *self._shown(call, fields, ""), *running, same
                            continue
                        made.append(event)
                        last = event.stopped or len(made) == len(calls)
                        end = self._finish(event, call, fields, chosen, calls, made, note)
                        if isinstance(end[1], Path) and (copy := cached(end[1])):
                            self.files.give(copy, self.line.owner(request.session_hash))
                        yield *end[:-1], *(idle if last else running), end[-1]
                        if event.stopped:
                            return
        except Exception as error:  # of any kind: shown, and the page goes on
            yield _failure(error), *unchanged, *idle, same

    def stop(self, request: gr.Request) -> None:
        """Stops the session's own calls."""
        self.line.stop(request.session_hash)

    def plans(self, *values: Any) -> tuple[Any, Any]:
        """The planner's table for the request, and the status."""
        if not self._tables.acquire(timeout=_TABLE_PATIENCE):
            return "", _failure(RequestError("others ask for this too; try again in a minute"))
        try:
            rows = memory_table(self.pipe, Fields(*values).call(), self.limit)
            return _table(rows), gr.skip()
        except Exception as error:  # as above
            return "", _failure(error)
        finally:
            self._tables.release()

    def load(self, path: Any) -> tuple[Any, ...]:
        """Status and fields, from an uploaded picture that carries its request."""
        unchanged = [gr.skip()] * len(NAMES)
        try:
            if not isinstance(path, str):
                raise RequestError("choose a picture that omnigen-fast has saved")
            try:
                record = read_record(path, Path(path).name)
            except RequestError as error:
                text = str(error).replace("give the options without --from", "fill in the fields")
                raise RequestError(text) from error
            values, notes = fields_of(record, self.loras, self.model, self.dtype, self._loading)
        except Exception as error:  # as above
            return _failure(error), *unchanged
        text = f"Settings loaded{'; ' * bool(notes)}{'; '.join(notes)}"
        return _status(text), *(values.get(name, gr.skip()) for name in NAMES)

    def example(self, gallery: Gallery, index: int) -> list[Any]:
        """Values of prompt, images, guidance scale and size, of an example."""
        one = gallery.examples[index]
        images = one.three_images()
        return [one.prompt, *images, one.guidance_scale, one.use_input_image_size]

    def steps_of(self, gallery: Gallery, quality: str) -> Any:
        """The steps that a quality stands for."""
        if quality == QUALITIES[0]:
            return gallery.steps
        return preset(quality)["num_inference_steps"]

    def _job(self, call: Mapping[str, Any], chosen: Chosen | None) -> Job:
        return Job(self.pipe, call, self._preview, self.loras.acting(chosen), self.limit)

    def _note(self, call: Mapping[str, Any]) -> str:
        """What a model with a fixed vocabulary does not know of a prompt that runs."""
        with suppress(Exception):  # of any kind: the picture is made all the same
            return self.pipe.processor.unknown_words(call["prompt"]) or ""
        return ""

    def _shown(self, call: Mapping[str, Any], fields: Fields, saved: str) -> tuple[Any, Any]:
        """Seed and saved file. A seed that others follow from stays what the visitor gave."""
        seed = call["seed"]
        # JSON's integers end here; the request's own check reports a larger one
        if not fields.randomize or (fields.seeds or "").strip() or abs(seed) > LARGEST_SEED:
            seed = gr.skip()
        return seed, saved

    def _finish(
        self,
        event: Finished,
        call: Mapping[str, Any],
        fields: Fields,
        chosen: Chosen | None,
        calls: Sequence[Any],
        made: Sequence[Finished],
        note: str,
    ) -> tuple[Any, ...]:
        """Status, picture, seed, saved file and what was made, after a picture."""
        if event.stopped:
            text = f"Stopped after step {event.done} of {event.steps}; nothing was saved"
            if len(made) > 1:
                text = f"{_stopped(made[:-1], calls)}, the next after step {event.done}"
            status = _status(text, event.done / event.steps)
            return status, event.image, *self._shown(call, fields, ""), gr.skip()
        loras = [] if chosen is None else [str(chosen)]
        try:
            with self._writing:
                path = save(
                    *(event.image, call, self.model, self.dtype, self._folder),
                    loras=loras,
                    loading=self._loading,
                )
        except (OmniGenError, OSError) as error:  # the picture is shown all the same
            status = _failure(error, "The picture was not saved: ")
            return status, event.image, *self._shown(call, fields, ""), gr.skip()
        text = f"Done: {event.steps} steps in {clock(event.seconds)}"
        if len(made) < len(calls):
            text = f"Picture {len(made)} of {len(calls)} is done"
        elif len(calls) > 1:
            seconds = clock(sum(one.seconds for one in made))
            text = f"Done: {len(calls)} pictures, {event.steps} steps each, in {seconds}"
        # the file itself, so that the download carries the request
        shown = self._shown(call, fields, str(path))
        return _status(text, len(made) / len(calls), note), path, *shown, _made(path, fields, call)


def _made(path: Path, fields: Fields, call: Mapping[str, Any]) -> str:
    """What the page's own list of pictures needs to know of one: text, for the browser alone."""
    copy = cached(path)
    if copy is None:
        return ""
    seed, listed = call["seed"], ""
    if abs(seed) > LARGEST_SEED:
        seed, listed = fields.seed, str(seed)
    own = {"seed": seed, "randomize": False, "seeds": listed, "pictures": 1, "mask": None}
    settings = {**vars(fields), **own}
    made = {"path": copy, "name": path.name, "at": time.time(), "settings": settings}
    return json.dumps({**made, "masked": fields.mask is not None})


def _stopped(made: Sequence[Finished], calls: Sequence[Any]) -> str:
    return f"Stopped after {len(made)} of {len(calls)}" if made else "Stopped before it began"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{one or "choice"}</th>' for one in TABLE_HEADERS)
    body = "".join(
        f"<tr{' class=chosen' * (row[0] == 'chosen')}>"
        + "".join(f"<td>{html.escape(one)}</td>" for one in row)
        + "</tr>"
        for row in rows
    )
    return (
        '<div role="region" tabindex="0" aria-label="Plans for this request"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _status(text: str, share: float | None = None, note: str = "") -> str:
    bar = ""
    if share is not None:
        bar = f'<progress value="{share:.4f}" max="1" aria-label="Progress"></progress>'
    said = f'<p class="note">{html.escape(note[:1].upper() + note[1:])}</p>' if note else ""
    return f'<p role="status">{html.escape(text)}</p>{bar}{said}'


def _failure(error: Exception, before: str = "") -> str:
    if not isinstance(error, OmniGenError):
        traceback.print_exception(error)
    return f'<p role="alert">{html.escape(before + sentence(error))}</p>'
