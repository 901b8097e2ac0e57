"""A request on its way through the scheduler: what is left of it, predicted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..memory.cost import Estimate
from ..memory.plan import MemoryPlan, Workload
from ..memory.planner import Decision
from ..schedule import StepSchedule
from .admission import Footprint
from .pace import Pace, Work
from .work import ServingError, Step, Ticket

if TYPE_CHECKING:
    from torch import Tensor

    from ..call import Call
    from ..engine import Running
    from .leading import Arguments

OnStep = Callable[[Step], None]


@dataclass(eq=False)
class Job:
    """A request between its submission and its end."""

    ticket: Ticket
    call: Call
    decision: Decision  # for it alone
    arrival: float  # by the scheduler's clock
    deadline: float | None
    shown: frozenset[int]  # steps whose expected picture somebody wants to see
    on_step: OnStep | None
    arguments: Arguments | None = None  # of the call, where several ranks make it
    plan: MemoryPlan = field(init=False)
    running: Running | None = None  # while it is under way
    began: float | None = None  # when it was started first
    ending: ServingError | None = None  # why it is to end before its time
    apart: bool = False  # memory ran out beside others: it goes on alone
    failed: list[MemoryPlan] = field(default_factory=list)  # those that ran out of memory, alone

    def __post_init__(self) -> None:
        self.plan = self.decision.plan

    @property
    def estimate(self) -> Estimate:
        return self.decision.estimate

    @cached_property
    def _footprints(self) -> dict[MemoryPlan, Footprint]:
        return {}

    @property
    def footprint(self) -> Footprint:
        """Its bytes under its plan."""
        if self.plan not in self._footprints:
            self._footprints[self.plan] = Footprint.of(self.estimate.cost(self.plan))
        return self._footprints[self.plan]

    @property
    def size(self) -> tuple[int, int]:
        return self.call.request.height, self.call.request.width

    @property
    def steps_left(self) -> int:
        return len(self.call.schedule) - self.call.steps_done

    @property
    def last_step(self) -> int:
        """The index of its last step."""
        return len(self.call.schedule) - 1

    @property
    def like(self) -> Hashable | None:
        """Equal for requests whose next steps can run together; None for one that steps alone."""
        if self.apart or not self.steps_left:
            return None
        if self.running is not None:
            return self.running.like
        request, plan = self.call.request, self.plan
        if self.call.schedule.solver != "euler" or plan.cache != "device":
            return None
        if request.edit is not None and request.edit.mask is not None:
            return None
        size = tuple(self.call.latents.shape[2:])
        return size, plan.branches_per_pass, plan.mlp_rows

    # Seconds

    def left(self, pace: Pace) -> float:
        """Predicted seconds until it is finished, alone."""
        seconds = self._steps(self.call.steps_done, pace) + pace.expect(self.decode)
        return seconds if self.running is not None else seconds + pace.expect(self.start)

    def total(self, pace: Pace) -> float:
        """Predicted seconds of all of it, alone, however far it is."""
        return pace.expect(self.start) + self._steps(0, pace) + pace.expect(self.decode)

    def _steps(self, first: int, pace: Pace) -> float:
        """Predicted seconds of the steps from this one on."""
        return sum(
            (len(places) - bisect_left(places, first)) * pace.expect(_steps_at([self], places[:1]))
            for places in self._alike
            if places[-1] >= first
        )

    @cached_property
    def _alike(self) -> list[list[int]]:
        """Its steps, by what they take: these are asked for at every step of any request."""
        schedule = self.call.schedule
        found: dict[Hashable, list[int]] = {}
        for place, kind in enumerate(zip(schedule.kinds, schedule.per_step)):
            found.setdefault(kind, []).append(place)
        return list(found.values())

    @property
    def start(self) -> Work:
        """What comes before its steps."""
        return Work("start", self._kind, self._planned_start)

    @property
    def decode(self) -> Work:
        """What comes after its steps."""
        return Work("decode", self._kind, self._planned_decode)

    @property
    def _kind(self) -> Hashable:
        return self.size, self.ticket.pictures, self.ticket.image_tokens, self.plan

    def _planned_start(self) -> float:
        seconds, plan = self.estimate.seconds, self.plan
        encode = seconds.encode_seconds(plan) if self.call.workload().images else 0.0
        return encode + (seconds.prefill_seconds(plan) if plan.cache != "none" else 0.0)

    def _planned_decode(self) -> float:
        return self.estimate.seconds.decode_seconds(self.plan)


def next_step(jobs: Sequence[Job]) -> Work:
    """The next steps of like requests, in one pass; of finished ones, the last step."""
    return _steps_at(jobs, [min(job.call.steps_done, job.last_step) for job in jobs])


def _steps_at(jobs: Sequence[Job], places: Sequence[int]) -> Work:
    """These steps of like requests, in one pass."""
    lead, count = jobs[0], len(jobs)
    plan = lead.plan
    kinds = [job.call.schedule.kinds[place] for job, place in zip(jobs, places)]
    branches = tuple(
        one for job, kind in zip(jobs, kinds) for one in job.call.workload().branches_of(kind)
    )
    computed = sum(kind.computed for kind in kinds)

    def planned() -> float:
        seconds = lead.estimate.seconds
        if count == 1:
            if not computed:
                return 0.0
            evaluations = lead.call.schedule.per_step[places[0]]
            computing = seconds.compute_seconds(plan, kinds[0])
            return evaluations * max(computing, seconds.copy_seconds(plan))
        joint = Workload(*lead.size, StepSchedule.euler(1), branches, conditions=())
        # what others join changes too often to record it
        return lead.estimate.of(joint).seconds.compute_seconds(replace(plan, capture=False))

    groups = sum(map(len, branches))
    kind = groups, count, lead.call.schedule.per_step[places[0]], computed, plan
    return Work(("step", lead.size), kind, planned)


def total_left(jobs: Iterable[Job], pace: Pace) -> float:
    """Predicted seconds of some requests, one after the other."""
    return sum(job.left(pace) for job in jobs)


def expected(before: Tensor, job: Job) -> Tensor:
    """Where the latents of a job that has just taken a step would end if they went straight on."""
    from ..vae.preview import expected as straight_on

    assert job.running is not None
    done, schedule = job.call.steps_done, job.call.schedule
    start, end = schedule.time(done - 1), schedule.time(done)
    return straight_on(before, job.running.latents, (1 - end) / (end - start))
