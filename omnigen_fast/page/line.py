"""The line of those who wait for a picture, and who of them still looks.

A session is what one open page calls itself. The first one who uses its name owns it. Requests that
nobody watches expire, so that a full line empties by itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import RequestError
from .job import Job

MAX_JOBS = 16  # each holds one of Gradio's 40 threads; the others stop jobs and serve files
MAX_JOBS_OF_SESSION = 2  # one that ends after its current step, and the next
UNWATCHED_SECONDS = 10.0  # until a job that nobody watches expires
_EVICTED_SECONDS = 1.0  # the same in a full line; a page watches within milliseconds
_PATIENCE = 2.0  # seconds that a newcomer waits for room in a full line
_MAX_SESSIONS = 4096  # whose owners are remembered


@dataclass
class _Place:
    session: str | None
    job: Job
    since: float = field(default_factory=time.monotonic)


class Line:
    """Jobs in order of arrival, the first of which runs, and the sessions they belong to."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._moved = threading.Condition()
        self._closed = False
        self._owners: OrderedDict[str, str | None] = OrderedDict()
        self._watchers: Counter[str | None] = Counter()
        self._left: OrderedDict[str | None, float] = OrderedDict()  # when the last watcher went

    def owns(self, session: str, token: str | None) -> bool:
        """Whether a client may act for a session; the first one who asks may."""
        with self._moved:
            owner = self._owners.setdefault(session, token)
            self._owners.move_to_end(session)
            while len(self._owners) > _MAX_SESSIONS:
                self._owners.popitem(last=False)
        return owner == token

    def owner(self, session: str | None) -> str | None:
        """The client that may act for a session."""
        with self._moved:
            return None if session is None else self._owners.get(session)

    def watchers(self, session: str) -> int:
        """The number of those who watch a session."""
        return self._watchers[session]

    @contextmanager
    def watched(self, session: str) -> Iterator[None]:
        """Counts a watcher while it is one."""
        with self._moved:
            self._watchers[session] += 1
        try:
            yield
        finally:
            with self._moved:
                self._watchers[session] -= 1
                if self._watchers[session] <= 0:
                    del self._watchers[session]
                    self._left[session] = time.monotonic()
                    while len(self._left) > _MAX_SESSIONS:
                        self._left.popitem(last=False)

    @contextmanager
    def place(self, session: str | None, job: Job) -> Iterator[None]:
        """A place at the end of the line, until it is left.

        Raises RequestError if there is none: for this session, or for anyone.
        """
        mine = _Place(session, job)
        with self._moved:
            self._make_room(session)
            self._places.append(mine)
        try:
            yield
        finally:
            with self._moved:
                self._places.remove(mine)
                self._moved.notify_all()

    def again(self, job: Job, following: Job) -> bool:
        """Puts the next job of a request at the end of the line, where the last one has ended.

        So a request for many pictures holds up nobody for longer than one picture. False if the
        request was told to stop meanwhile.
        """
        with self._moved:
            if job.told or self._closed:
                return False
            place = next(place for place in self._places if place.job is job)
            self._places.remove(place)
            place.job = following
            self._places.append(place)
            self._moved.notify_all()
        return True

    def wait(self, job: Job) -> Iterator[int]:
        """Yields the number of jobs before this one when it changes, until its turn or a stop."""
        before: int | None = None

        def changed() -> bool:
            return job.stopping or self._before(job) != before

        while True:
            with self._moved:
                self._moved.wait_for(changed)
                before = self._before(job)
            if job.stopping or before == 0:
                return
            yield before

    def stop(self, session: str | None) -> None:
        """Stops the jobs of a session."""
        self._stop(lambda place: place.session == session)

    def expire(self) -> None:
        """Stops the jobs that nobody has watched for some time."""
        self._stop(lambda place: self._unwatched(place) > UNWATCHED_SECONDS)

    def close(self) -> None:
        """Ends all jobs, without waiting for their steps, and takes no more."""
        with self._moved:
            self._closed = True
            for place in self._places:
                place.job.abandon()
            self._moved.notify_all()

    def sessions(self) -> set[str | None]:
        """The sessions that have a job, or a watcher."""
        with self._moved:
            return {place.session for place in self._places} | set(self._watchers)

    def _stop(self, which: Callable[[_Place], bool]) -> None:
        with self._moved:
            for place in self._places:
                if which(place):
                    place.job.stop()
            self._moved.notify_all()

    def _make_room(self, session: str | None) -> None:
        end = time.monotonic() + _PATIENCE
        while not self._has_room(session):
            if time.monotonic() > end:
                raise RequestError(f"{MAX_JOBS} requests wait already; try again in a minute")
            self._moved.wait(0.2)

    def _has_room(self, session: str | None) -> bool:
        """Whether the line has room for a job; if not, asks one that nobody watches to go."""
        if self._closed:
            raise RequestError("the page is closing; start it again")
        if sum(place.session == session for place in self._places) >= MAX_JOBS_OF_SESSION:
            raise RequestError(
                f"{MAX_JOBS_OF_SESSION} requests of this page run or wait already; stop one first"
            )
        if len(self._places) < MAX_JOBS:
            return True
        staying = [place for place in self._places if not place.job.stopping]
        if staying:
            unwatched = max(staying, key=self._unwatched)
            if self._unwatched(unwatched) > _EVICTED_SECONDS:
                unwatched.job.stop()
                self._moved.notify_all()
        return False

    def _unwatched(self, place: _Place) -> float:
        """For how many seconds nobody has watched a job."""
        if self._watchers[place.session]:
            return 0.0
        return time.monotonic() - max(place.since, self._left.get(place.session, 0.0))

    def _before(self, job: Job) -> int:
        return next(i for i, place in enumerate(self._places) if place.job is job)
