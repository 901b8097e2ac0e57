"""The application: OpenAI's image API, health, and metrics, on a scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..serving.metrics import Metrics
from ..serving.scheduler import Scheduler
from ..serving.work import Ticket
from ..web.bodies import Gone, Refusal, receive_body, receive_parts
from .errors import KINDS, UNKNOWN, ApiError, as_api_error, error
from .forms import MAX_FIELD_BYTES, Form, read_form
from .gate import TRACE, Gate, Trace
from .options import Options
from .pictures import answer, call_arguments, shown_steps
from .reference import page
from .schemas import (
    Common,
    Edit,
    Error,
    Generation,
    Health,
    Images,
    Models,
    parse_fields,
    parse_json,
)
from .streaming import Steps, events

MAX_JSON_BYTES = MAX_FIELD_BYTES
_ABOUT = (
    "OpenAI's image API. Parameters that OpenAI does not have are this model's own; the openai "
    "client sends them through extra_body."
)
_GENERATION, _EDIT = "image_generation", "image_edit"


def create_app(
    scheduler: Scheduler,
    options: Options | None = None,
    metrics: Metrics | None = None,
    *,
    closing: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application on a scheduler, which stays the caller's: it is not closed with it.

    Args:
        scheduler: that carries out the requests; it may still be loading.
        options: see `Options`.
        metrics: what /metrics shows; the scheduler's observer. None for no such address.
        closing: called when the application is shut down.
    """
    options = options or Options()
    if metrics is not None:
        metrics.state = scheduler.state

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(closing)

    app = FastAPI(
        title="omnigen-fast",
        version=__version__,
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(Gate, options=options)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_address)
    service = _Service(scheduler, options)
    _add_images(app, service)
    _add_operations(app, scheduler, options, metrics)
    return app


def _add_images(app: FastAPI, service: _Service) -> None:
    json_body = {"content": {"application/json": {"schema": _schema(Generation)}}}
    form = {"content": {"multipart/form-data": {"schema": _form_schema()}}}

    @app.post(
        "/v1/images/generations",
        response_model=Images,
        responses=_responses(400, 401, 403, 404, 408, 413, 429, 500, 503),
        openapi_extra={"requestBody": {"required": True, **json_body}},
        summary="Makes pictures from a prompt.",
    )
    async def generations(request: Request) -> Response:
        return await service.generate(request)

    @app.post(
        "/v1/images/edits",
        response_model=Images,
        responses=_responses(400, 401, 403, 404, 408, 413, 429, 500, 503),
        openapi_extra={"requestBody": {"required": True, **form}},
        summary="Makes pictures from input images and a prompt.",
    )
    async def edits(request: Request) -> Response:
        return await service.edit(request)


def _add_operations(
    app: FastAPI, scheduler: Scheduler, options: Options, metrics: Metrics | None
) -> None:
    started = int(time.time())
    model = {
        "id": options.model_name,
        "object": "model",
        "created": started,
        "owned_by": "omnigen_fast",
    }

    @app.get(
        "/v1/models",
        response_model=Models,
        responses=_responses(401, 403),
        summary="The model that is served.",
    )
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get(
        "/health", response_model=Health, responses=_responses(403), summary="The process lives."
    )
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/ready",
        response_model=Health,
        responses=_responses(403, 503),
        summary="Requests are taken: the model is loaded and warm, and the server is not ending.",
    )
    async def ready() -> dict[str, str]:
        state = scheduler.state()
        if state.failure:
            raise error("not_ready", state.failure)
        if not state.accepting:
            raise error("shutting_down", "the server is ending and takes no more requests")
        if not state.ready:
            raise error("not_ready", "the model is still being loaded; try again soon")
        return {"status": "ready"}

    if metrics is not None:

        @app.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}, **_responses(403)},
            summary="Metrics in Prometheus' text format.",
        )
        async def shown_metrics() -> Response:
            kind = "text/plain; version=0.0.4; charset=utf-8"
            return Response(metrics.text(), media_type=kind)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))


class _Service:
    """The two addresses that make pictures."""

    def __init__(self, scheduler: Scheduler, options: Options) -> None:
        self._scheduler, self._options = scheduler, options
        self._uploads = 0

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        self._check()
        length = request.headers.get("content-length")
        with await receive_body(request.receive, length, MAX_JSON_BYTES) as body:
            given = parse_json(Generation, body.read())
        return await self._answer(request, _GENERATION, given, Form())

    async def edit(self, request: Request) -> Response:
        """POST /v1/images/edits."""
        self._check()
        form = await self._receive(request)
        try:
            given = parse_fields(Edit, form.fields)
            if not form.images:
                text = "image is missing; send one or more files as image or image[]"
                raise error("invalid_value", text, param="image")
            return await self._answer(request, _EDIT, given, form)
        finally:
            form.close()

    def _check(self) -> None:
        """Refuses before the body is read what would be refused after it."""
        try:
            self._scheduler.check()
        except Exception as failure:
            raise as_api_error(failure) from None

    async def _receive(self, request: Request) -> Form:
        most = self._options.max_uploads
        if self._uploads >= most:
            text = f"{most} uploads are being received; try again in a moment"
            raise error("busy", text, retry_after=2)
        self._uploads += 1
        try:
            length = request.headers.get("content-length")
            parts = receive_parts(request.receive, length, self._options.max_upload_bytes)
            return await read_form(request.headers.get("content-type", ""), parts)
        except (Refusal, OSError) as failure:
            raise as_api_error(failure) from None
        finally:
            self._uploads -= 1

    async def _answer(self, request: Request, kind: str, given: Common, form: Form) -> Response:
        trace: Trace = request.scope[TRACE]
        trace.prompt = given.prompt
        config = self._scheduler.config
        arguments = call_arguments(given, self._options, config, form.images, form.mask)
        steps, shown = None, None
        if given.stream:
            steps = Steps()
            timed = arguments.get("timesteps")
            count = arguments["num_inference_steps"] if timed is None else len(timed)
            shown = shown_steps(given.partial_images or 0, count)
        submit = asyncio.ensure_future(
            asyncio.to_thread(self._submit, arguments, trace, steps, shown)
        )
        try:
            ticket = await asyncio.shield(submit)
        except asyncio.CancelledError:
            submit.add_done_callback(_cancelled)  # the thread goes on
            raise
        trace.ticket = ticket
        if steps is not None:
            preview = self._scheduler.preview
            assert preview is not None
            stream = events(kind, given, ticket, steps, preview, trace)
            return StreamingResponse(stream, media_type="text/event-stream")
        images = await _finished(ticket, request)
        return JSONResponse(await asyncio.to_thread(answer, images, given, ticket))

    def _submit(
        self, arguments: dict[str, Any], trace: Trace, steps: Steps | None, shown: list[int] | None
    ) -> Ticket:
        try:
            return self._scheduler.submit(
                arguments,
                id=trace.id,
                on_step=None if steps is None else steps.tell,
                on_end=None if steps is None else steps.end,
                shown=shown or (),
            )
        except Exception as failure:
            refusal = as_api_error(failure)
            raise (failure if refusal.code == UNKNOWN else refusal) from None


def _cancelled(submit: asyncio.Future[Ticket]) -> None:
    """Ends a request that nobody waits for any more."""
    if not submit.cancelled() and submit.exception() is None:
        submit.result().cancel()


async def _finished(ticket: Ticket, request: Request) -> Any:
    """What a request returns; raises Gone as soon as its client hangs up."""
    future = asyncio.wrap_future(ticket.future)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Gone
        try:
            return future.result()
        except Exception as failure:
            refusal = as_api_error(failure)
            raise (failure if refusal.code == UNKNOWN else refusal) from None
    finally:
        gone.cancel()
        future.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, refusal: Exception) -> Response:
    found = as_api_error(refusal)
    request.scope[TRACE].code = found.code
    return JSONResponse(found.body(), found.status, found.headers())


async def _refuse_address(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    if failure.status_code == 405:
        text = f"{request.url.path} has another method"
        refusal = error("method_not_allowed", text)
    else:
        text = f"there is nothing at {request.url.path}; see /docs"
        refusal = error("not_found", text)
    request.scope[TRACE].code = refusal.code
    headers = {**(failure.headers or {}), **refusal.headers()}
    return JSONResponse(refusal.body(), refusal.status, headers)


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of the documented errors."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        whens = [f"{kind.code}: {kind.when}" for kind in KINDS if kind.status == status]
        found[status] = {"model": Error, "description": "; ".join(whens)}
    return found


def _schema(kind: type[Common]) -> dict[str, Any]:
    return kind.model_json_schema()


def _form_schema() -> dict[str, Any]:
    schema = Edit.model_json_schema()
    file = {"type": "string", "format": "binary"}
    images = "The input images, in their order; also as image[]. At most 16, of 50 MiB each."
    schema["properties"] |= {
        "image": {"type": "array", "items": file, "description": images},
        "mask": {**file, "description": "Of the image's size: what is transparent is edited."},
    }
    schema["required"] = [*schema["required"], "image"]
    return schema
