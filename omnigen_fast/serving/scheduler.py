"""Scheduler: one engine thread that carries out many requests, and decides at every step boundary.

The request that is shortest by its predicted time goes first; each second of waiting outweighs
some of it, so nothing starves. Requests that are set aside keep their latents and the rows of their
conditions, which costs nothing but memory. Small pictures of one size step together where that is
predicted to be faster than one after the other.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from ..call import Memory
from ..errors import BusyError, OmniGenError, RequestError, first_line
from ..memory.device import parse_memory, profile_of
from ..memory.plan import first_workload
from ..memory.planner import Decision
from ..memory.planner import plan as fastest_plan
from ..parallel.group import guarded
from ..pipeline import OmniGenPipeline
from ..results import as_result
from ..run import SMALLER, budget_of, decide, generate
from ..streaming import is_out_of_memory
from ..surroundings import undisturbed
from .admission import beside, moves_weights, needed_bytes
from .job import Job, OnStep, expected, next_step, total_left
from .leading import Arguments, Leading
from .pace import Pace
from .work import (
    DONE,
    FAILED,
    ClosedError,
    NotReadyError,
    QueueFullError,
    ServingError,
    Step,
    Ticket,
    TimedOutError,
)

if TYPE_CHECKING:
    from ..call import Call
    from ..config import ModelConfig
    from ..engine import Engine
    from ..profiles import Profile
    from ..vae.preview import Preview

_log = logging.getLogger("omnigen_fast.serving")

POLICIES = ("shortest", "fcfs")
_GAIN = 0.98  # seconds of steps together, against one by one, for which it pays
_MAX_SEED = (1 << 32) - 1
_WARM_SIDE = 64  # pixels; on a CPU, where nothing is compiled
_WARM_STEPS = 4  # of which one compiles, one is captured, and two are replayed
_LEAST_RETRY = 1.0  # seconds
_IDLE_SECONDS = 1.0  # after which other ranks are told that there is nothing to do


@dataclass(frozen=True)
class Settings:
    """How requests are ordered and bounded.

    Args:
        policy: "shortest" (by predicted time, first) or "fcfs" (first come, first served).
        packing: whether steps of like requests run together where that is faster.
        max_pack: how many requests may step together.
        ageing: seconds of a request's time that each second of waiting outweighs.
        max_queue: how many requests may run and wait.
        timeout_seconds: after which a request ends; None for never.
        memory: how much of the device's memory to use; see `OmniGenPipeline.from_pretrained`.
        warm_up: whether a small request runs before the scheduler is ready.

    Raises RequestError for a value that can't be used.
    """

    policy: str = "shortest"
    packing: bool = True
    max_pack: int = 8
    ageing: float = 0.35
    max_queue: int = 64
    timeout_seconds: float | None = None
    memory: str | int = "auto"
    warm_up: bool = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            allowed = " or ".join(POLICIES)
            raise RequestError(f"policy must be {allowed}, got {self.policy!r}")
        for name, least in (("max_pack", 1), ("max_queue", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RequestError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not (isinstance(self.ageing, int | float) and 0 <= self.ageing < math.inf):
            raise RequestError(f"ageing must be a number of at least 0, got {self.ageing!r}")
        seconds = self.timeout_seconds
        if seconds is not None and not 0 < seconds < math.inf:
            raise RequestError(f"timeout_seconds must be above 0, got {seconds!r}")
        parse_memory(self.memory)


@dataclass(frozen=True)
class State:
    """What the scheduler does now."""

    ready: bool  # loaded, warm, and taking requests
    accepting: bool  # not closed
    failure: str | None  # why the model can't be used
    running: int  # requests that have begun
    waiting: int


class Observer(Protocol):
    """What is told of everything that happens; called in the engine thread, so it must be quick."""

    def ended(self, reason: str, ticket: Ticket) -> None:
        """An accepted request is over."""

    def refused(self, reason: str) -> None:
        """A request was not accepted."""

    def stepped(self, requests: int, seconds: float) -> None:
        """Steps of this many requests were taken together."""

    def conditions(self, found: int, computed: int) -> None:
        """A request began with so many conditions kept from before, and so many new ones."""


class _Silent:
    def ended(self, reason: str, ticket: Ticket) -> None: ...

    def refused(self, reason: str) -> None: ...

    def stepped(self, requests: int, seconds: float) -> None: ...

    def conditions(self, found: int, computed: int) -> None: ...


class Scheduler:
    """Carries out requests on one pipeline; use it from any thread.

    Nothing else may call the pipeline meanwhile: such calls wait until the scheduler is closed.

    Args:
        load: makes the pipeline, in the scheduler's thread; or the pipeline itself.
        settings: see `Settings`.
        observer: see `Observer`.
    """

    def __init__(
        self,
        load: OmniGenPipeline | Callable[[], OmniGenPipeline],
        settings: Settings | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._load = load
        self._observer: Observer = observer or _Silent()
        self.pace = Pace()
        self.preview: Preview | None = None
        self._pipe: OmniGenPipeline | None = None
        self._profile: Profile  # of the device, and what plans may use of it: once it is loaded
        self._budget = 0
        self._jobs: list[Job] = []  # in order of arrival
        self._busy: list[Job] = []  # those that the engine thread is working on now
        self._changed = threading.Condition()
        self._accepting, self._ending = True, False
        self._warm, self._failure = False, ""
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="omnigen-engine", daemon=True)
        self._thread.start()

    # For any thread

    @property
    def config(self) -> ModelConfig:
        """Of the model; raises NotReadyError before it is loaded."""
        return self._pipeline().config

    def state(self) -> State:
        """What goes on now."""
        with self._changed:
            running = sum(job.began is not None for job in self._jobs)
            return State(
                ready=self._warm and self._accepting,
                accepting=self._accepting,
                failure=self._failure or None,
                running=running,
                waiting=len(self._jobs) - running,
            )

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Waits until the model is warm; returns whether it is.

        Raises NotReadyError if the model can't be loaded.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._warm or self._failure, timeout)
            if self._failure:
                raise NotReadyError(self._failure)
            return self._warm

    def check(self) -> None:
        """Raises what `submit` would raise now, whatever the request."""
        self._pipeline()
        with self._changed:
            self._check_open()

    def submit(
        self,
        arguments: Mapping[str, Any],
        *,
        id: str | None = None,
        timeout_seconds: float | None = None,
        on_step: OnStep | None = None,
        shown: Iterable[int] = (),
        on_end: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Takes a request, or refuses it at once.

        Args:
            arguments: of a call of the pipeline, without callbacks, `dtype` and `memory`.
            id: of the request, for logs; a new one unless given.
            timeout_seconds: instead of the settings' own.
            on_step: called after each step, in the engine thread: it must be quick.
            shown: numbers of steps, from 1, for which `on_step` gets the expected latents.
            on_end: called once when the request is over, in the thread that ends it.

        Raises:
            RequestError: an argument can't be used; says which, and what can.
            MemoryBudgetError: no plan fits.
            QueueFullError, ClosedError, NotReadyError: not now.
        """
        self.check()
        pipe = self._pipeline()
        given = {"progress": False, **arguments}
        for name in ("callback_on_step_end", "dtype", "memory"):
            if given.get(name) is not None:
                raise RequestError(f"a request can't have {name}; it is the server's to choose")
        if all(given.get(name) is None for name in ("seed", "generator", "latents")):
            given["seed"] = secrets.randbelow(_MAX_SEED + 1)
        several = pipe.engine.placement.group is not None
        arguments_of = Arguments(given) if several else None
        call = pipe.make_call(**given)
        decision = self._decide(pipe, call)
        now = time.monotonic()
        seconds = self.settings.timeout_seconds if timeout_seconds is None else timeout_seconds
        job = Job(
            ticket=_ticket(id or secrets.token_hex(8), call),
            call=call,
            decision=decision,
            arrival=now,
            deadline=None if seconds is None else now + seconds,
            shown=frozenset(shown),
            on_step=on_step,
            arguments=arguments_of,
        )
        job.ticket._cancel = lambda error: self._cancel(job, error)
        if on_end is not None:
            job.ticket.future.add_done_callback(lambda _: on_end(job.ticket))
        with self._changed:
            self._check_open()
            self._jobs.append(job)
            self._changed.notify_all()
        return job.ticket

    def stop_accepting(self) -> None:
        """Refuses new requests from now on; those that were accepted go on."""
        with self._changed:
            self._accepting = False
            self._changed.notify_all()

    def close(self, drain_seconds: float = 0.0, join_seconds: float = 60.0) -> bool:
        """Ends the scheduler; requests that are not over in time end with a ClosedError.

        Args:
            drain_seconds: for the requests that were accepted.
            join_seconds: for the engine thread's operation in progress.

        Returns:
            Whether the engine thread has ended.
        """
        self.stop_accepting()
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs, drain_seconds)
            self._ending = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        for job in jobs:
            self._cancel(job, ClosedError("the server is ending; send the request to another one"))
        self._thread.join(join_seconds)
        return not self._thread.is_alive()

    def retry_after(self) -> float:
        """Predicted seconds until a request ends and another one can be accepted."""
        with self._changed:
            jobs = list(self._jobs)
        if not jobs:
            return _LEAST_RETRY
        return max(_LEAST_RETRY, total_left(jobs, self.pace) / len(jobs))

    def _pipeline(self) -> OmniGenPipeline:
        if self._pipe is None or self._failure:
            raise NotReadyError(self._failure or "the model is still being loaded; try again soon")
        return self._pipe

    def _check_open(self) -> None:
        if not self._accepting:
            self._observer.refused(ClosedError.reason)
            raise ClosedError("the server is ending and takes no more requests")
        if self._failure:
            raise NotReadyError(self._failure)
        if len(self._jobs) >= self.settings.max_queue:
            self._observer.refused(QueueFullError.reason)
            count = len(self._jobs)
            seconds = max(_LEAST_RETRY, total_left(self._jobs, self.pace) / count)
            raise QueueFullError(
                f"{count} requests run or wait already; try again in {math.ceil(seconds)} s",
                seconds,
            )

    def _decide(self, pipe: OmniGenPipeline, call: Call) -> Decision:
        """The plan for a request alone, within what could be used when the engine was last idle."""
        engine = pipe.engine
        if call.precision != engine.precision:
            raise RequestError("a request can't have a dtype; it is the server's to choose")
        return fastest_plan(
            engine.config,
            engine.vae.shape,
            call.precision,
            call.workload(),
            self._profile,
            self._budget,
            call.request.switches,
            current=engine.arrangement,
            kept_bytes=engine.cache_bytes,
            capture=engine.graphs.possible(),
        )

    def _cancel(self, job: Job, error: ServingError) -> None:
        """Ends a request before its time; the engine thread does so where it is under way."""
        with self._changed:
            if job not in self._jobs:
                return
            if job.running is not None or job in self._busy:
                job.ending = job.ending or error
                self._changed.notify_all()
                return
            self._jobs.remove(job)
            self._changed.notify_all()
        self._settle(job, error=error)

    # In the engine thread

    def _run(self) -> None:
        try:
            load = self._load
            pipe = load if isinstance(load, OmniGenPipeline) else load()
            with pipe.driving() as own, guarded(own.placement.group), _led(own) as engine:
                self._open(pipe, engine)
                while self._wait_for_work(engine):
                    self._turn(engine)
        except BaseException as error:
            if not isinstance(error, OmniGenError):
                _log.exception("the engine thread ended")
            self._fail_all(f"the model can't be used: {first_line(error)}")

    def _open(self, pipe: OmniGenPipeline, engine: Engine) -> None:
        """Finds out what memory there is, warms up, and lets requests in."""
        from ..vae.preview import Preview

        self._profile = profile_of(engine.device)
        self._budget = self._usable(engine)
        if self.settings.warm_up:
            on_host = engine.device.type != "cuda"
            side = first_workload(pipe.config).height
            side = min(side, _WARM_SIDE) if on_host else side
            warm_up = {"height": side, "width": side, "num_inference_steps": _WARM_STEPS}
            given: dict[str, Any] = {"prompt": "a cat", "seed": 0, **warm_up}
            call = pipe.make_call(**given)
            if isinstance(engine, Leading):
                engine.describe(call, Arguments(given))
            generate(engine, call, self._memory(engine), lambda *_: True, lambda _: None)
        with undisturbed():
            self.preview = Preview.fit(engine.vae)
        self._budget = self._usable(engine)
        with self._changed:
            self._pipe, self._warm = pipe, True
            self._changed.notify_all()

    def _usable(self, engine: Engine) -> int:
        """Bytes that plans may use."""
        given = parse_memory(self.settings.memory)
        if given is not None:
            return given
        free = budget_of(engine)
        return engine.least(free) if isinstance(engine, Leading) else free

    def _memory(self, engine: Engine) -> Memory:
        """What plans may use, for those who find it out: of several ranks the least."""
        return self._budget if isinstance(engine, Leading) else self.settings.memory

    def _wait_for_work(self, engine: Engine) -> bool:
        """Waits until there is a request; False once there will be none."""
        waits = _IDLE_SECONDS if isinstance(engine, Leading) else None
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._jobs or self._ending, waits):
                    return bool(self._jobs)
            if isinstance(engine, Leading):
                engine.idle()

    def _turn(self, engine: Engine) -> None:
        """What happens between two step boundaries."""
        self._end_early(engine)
        with self._changed:
            jobs = [job for job in self._order() if job.ending is None]
            self._busy = jobs[:1]
        if not jobs:
            return
        pack = jobs[:1]
        try:
            self._begin(engine, jobs[0], jobs)
            pack = self._pack(engine, jobs)
            self._step(engine, pack)
        except Exception as error:
            self._failed(engine, pack, error)
        finally:
            with self._changed:
                self._busy = []

    def _under_way(self) -> list[Job]:
        """Requests that hold memory."""
        with self._changed:
            return [job for job in self._jobs if job.running is not None]

    def _end_early(self, engine: Engine) -> None:
        """Drops requests that were cancelled or whose time is over."""
        now = time.monotonic()
        with self._changed:
            for job in self._jobs:
                if job.deadline is not None and now >= job.deadline:
                    job.ending = job.ending or TimedOutError(
                        f"the request took longer than {job.deadline - job.arrival:g} s"
                    )
            ending = [job for job in self._jobs if job.ending is not None]
        for job in ending:
            self._set_aside(engine, job)
            self._end(job, error=job.ending)

    def _order(self) -> list[Job]:
        """Requests, the one first whose step comes next."""
        alone = [job for job in self._jobs if job.running is not None and _is_alone(job)]
        if self.settings.policy == "fcfs":
            key: Callable[[Job], float] = lambda job: job.arrival  # noqa: E731
        else:
            # Seconds of all of it, not of what is left: a long request that is nearly done would
            # else go before short ones, which costs them more than it gains. Its arrival stands
            # for how long it has waited, up to a constant that all have in common.
            def key(job: Job) -> float:
                return job.total(self.pace) + self.settings.ageing * job.arrival

        # what had to move weights goes on to its end: to move them back and forth costs more
        return alone or sorted(self._jobs, key=key)

    def _begin(self, engine: Engine, job: Job, jobs: Sequence[Job]) -> None:
        """Starts a request unless it is under way; sets others aside as far as it needs.

        Args:
            engine: the engine.
            job: the request.
            jobs: all, those first that are to be kept under way.
        """
        if job.running is not None:
            return
        others = [one for one in jobs if one.running is not None and one is not job]
        while True:
            self._choose_plan(engine, job, alone=not others)
            alone = job.apart or moves_weights(job.plan, engine.arrangement)
            every = [one.footprint for one in (*others, job)]
            if not others or (not alone and needed_bytes(every) <= self._budget):
                try:
                    self._start(engine, job)
                    return
                except BusyError:
                    if not others:
                        raise
            self._set_aside(engine, others.pop())

    def _choose_plan(self, engine: Engine, job: Job, alone: bool) -> None:
        """Alone what the pipeline's own call would run by, else what moves no weights."""
        if alone:
            self._budget = self._usable(engine)
            memory = self._memory(engine)
            workload, switches = job.call.workload(), job.call.request.switches
            if job.failed:
                candidate = job.decision.after(job.failed)
                if candidate is None:
                    raise OmniGenError(
                        f"out of memory with every plan for this request "
                        f"({job.call.failures[-1]}); {SMALLER}"
                    )
                job.plan = candidate.plan
                return
            job.decision = decide(engine, workload, switches, memory, job.call.precision)
            job.plan = job.decision.plan
            return
        job.plan = beside(job.decision.plan, engine.arrangement, job.estimate, self._budget)

    def _start(self, engine: Engine, job: Job) -> None:
        work, start = job.start, time.monotonic()
        if not self._under_way() and engine.cache.nbytes < job.plan.kept_bytes // 2:
            engine.cache.clear()  # a smaller plan has left room for one request alone
        with engine.operations():  # which name what is kept
            entries = job.call.entries(job.plan)
        found = sum(entry in engine.cache for entry in entries)
        if isinstance(engine, Leading):
            assert job.arguments is not None
            engine.describe(job.call, job.arguments)
        job.running = engine.start(job.call, job.plan, own_rows=True)
        _synchronize(engine)
        if job.plan.cache == "device":
            self._observer.conditions(found, len(entries) - found)
        now = time.monotonic()
        self.pace.note(work, now - start)
        if job.began is None:
            job.began = now
            job.ticket.facts.queued_seconds = start - job.arrival

    def _pack(self, engine: Engine, jobs: Sequence[Job]) -> list[Job]:
        """The first request, and others whose steps are worth taking together with its own."""
        pack, like = [jobs[0]], jobs[0].like
        if not self.settings.packing or like is None:
            return pack
        together = self.pace.expect(next_step(pack))
        for job in jobs[1:]:
            if len(pack) >= self.settings.max_pack:
                break
            if job.like != like:
                continue
            joint = self.pace.expect(next_step([*pack, job]))
            if joint >= _GAIN * (together + self.pace.expect(next_step([job]))):
                break
            if not self._joins(engine, job, pack):
                break
            pack.append(job)
            together = joint
        return pack

    def _joins(self, engine: Engine, job: Job, pack: Sequence[Job]) -> bool:
        """Whether a request can step together with others; starts it unless it is under way."""
        with self._changed:
            if job.ending is not None or job not in self._jobs:
                return False
            self._busy.append(job)
        every = [one.footprint for one in {*self._under_way(), job}]
        if needed_bytes(every, [one.footprint for one in (*pack, job)]) > self._budget:
            return False
        if job.running is None:
            job.plan = beside(job.decision.plan, engine.arrangement, job.estimate, self._budget)
            if moves_weights(job.plan, engine.arrangement):
                return False
            try:
                self._start(engine, job)
            except BusyError:
                return False
            except Exception as error:
                self._failed(engine, [job], error)
                return False
        return job.like == pack[0].like

    def _step(self, engine: Engine, pack: Sequence[Job]) -> None:
        """Takes the next step of each request, and finishes those for which it was the last one."""
        if not pack[0].call.finished:  # else decoding is tried again
            self._take_step(engine, pack)
        for job in pack:
            # a failure of an earlier one sets all aside: their turn comes again
            if job.call.finished and job.ending is None and job.running is not None:
                try:
                    self._finish(engine, job)
                except Exception as error:
                    self._failed(engine, [job], error)

    def _take_step(self, engine: Engine, pack: Sequence[Job]) -> None:
        running = [job.running for job in pack if job.running is not None]
        before = {
            job: one.latents.clone()
            for job, one in zip(pack, running)
            if job.call.steps_done + 1 in job.shown
        }
        work, start = next_step(pack), time.monotonic()
        if len(pack) == 1:
            engine.step(*running)
        else:
            engine.step_together(*running)
        _synchronize(engine)  # a boundary is where the step is over, not where it was launched
        seconds = time.monotonic() - start
        self.pace.note(work, seconds)
        self._observer.stepped(len(pack), seconds)
        for job, one in zip(pack, running):
            one.save()
            facts = job.ticket.facts
            facts.steps = job.call.steps_done
            facts.packed_steps += len(pack) > 1
            if job.on_step is not None:
                shown = expected(before[job], job) if job in before else None
                _tell(job, Step(job.call.steps_done, len(job.call.schedule), shown))

    def _finish(self, engine: Engine, job: Job) -> None:
        work, start = job.decode, time.monotonic()
        assert job.running is not None
        plan, request = job.plan, job.call.request
        latents = engine.finish(job.running)
        job.running = None
        if request.output_type == "latent":
            images = latents.clone()
        else:
            images = engine.decode(latents, plan)
            if request.edit is not None:
                images = request.edit.compose_(images)
        result = as_result(images, request.output_type)
        self.pace.note(work, time.monotonic() - start)
        self._end(job, result=result)

    def _set_aside(self, engine: Engine, job: Job) -> None:
        """Gives up what a request holds; it can be started again from its last step."""
        if job.running is not None:
            engine.drop(job.running)
            job.running = None

    def _failed(self, engine: Engine, pack: Sequence[Job], error: Exception) -> None:
        """After a failure: everything is set aside, and goes on from the last finished step."""
        engine.recover()
        reason = first_line(error)
        memory = is_out_of_memory(error) and not isinstance(error, OmniGenError)
        if memory:
            _log.warning("out of memory in spite of the plan (%s)", reason)
        elif not isinstance(error, OmniGenError):
            ids = ", ".join(job.ticket.id for job in pack)
            _log.error("requests %s failed: %s", ids, reason, exc_info=error)
        beside_others = len(pack) > 1 or any(job not in pack for job in self._under_way())
        for job in list(self._jobs):
            self._set_aside(engine, job)
            engine.end(job.call)
        error.__traceback__ = None  # it holds the step's tensors
        if memory:
            engine.free()
        for job in pack:
            if job not in self._jobs:
                continue
            if beside_others and not job.apart:
                job.apart = True
            elif memory:
                job.call.failures.append(reason)
                job.failed.append(job.plan)
            else:
                self._end(job, error=error)

    def _end(self, job: Job, result: Any = None, error: Exception | None = None) -> None:
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.remove(job)
            self._changed.notify_all()
        self._settle(job, result, error)

    def _settle(self, job: Job, result: Any = None, error: Exception | None = None) -> None:
        """Tells everyone who wants to know that a request is over."""
        ticket = job.ticket
        ticket.facts.seconds = time.monotonic() - job.arrival
        if job.began is None:
            ticket.facts.queued_seconds = ticket.facts.seconds
        reason = DONE if error is None else getattr(error, "reason", FAILED)
        self._observer.ended(reason, ticket)
        if error is None:
            ticket.future.set_result(result)
        else:
            ticket.future.set_exception(error)

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            self._failure, self._warm = reason, False
            jobs, self._jobs = self._jobs, []
            self._changed.notify_all()
        for job in jobs:
            self._settle(job, error=NotReadyError(reason))


@contextmanager
def _led(engine: Engine) -> Iterator[Engine]:
    """The engine, or what stands for those of all ranks."""
    group = engine.placement.group
    if group is None:
        yield engine
        return
    leading = Leading(engine, group)
    yield cast("Engine", leading)
    leading.close()


def _ticket(id: str, call: Call) -> Ticket:
    branch, _ = call.pictures[0][0]
    images = sum(stop - first for first, stop, _ in branch.spans)
    request = call.request
    return Ticket(
        id=id,
        seed=request.seed,
        size=(request.height, request.width),
        pictures=request.images,
        text_tokens=branch.length - images,
        image_tokens=images,
        noise_tokens=request.images * request.noise_tokens,
    )


def _is_alone(job: Job) -> bool:
    """Whether nothing else is under way beside a request."""
    return job.apart or job.plan.cache != "device"


def _synchronize(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.current_stream(engine.device).synchronize()


def _tell(job: Job, step: Step) -> None:
    assert job.on_step is not None
    try:
        job.on_step(step)
    except Exception:  # who asked may be gone; the request itself goes on
        _log.exception("on_step of request %s failed", job.ticket.id)
