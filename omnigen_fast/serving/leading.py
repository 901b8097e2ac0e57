"""One model over several ranks, driven by the scheduler of the first.

Rank 0 tells the others each operation of its engine before it carries it out: of which call, by
which plan. They make the same calls of the same arguments, and do the same with their own engines.
A message is JSON, with the content of image files after it; nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..call import Call
from ..engine import Engine
from ..errors import BusyError, OmniGenError, RankError, RequestError, brief
from ..memory.plan import MemoryPlan
from ..parallel.failure import sentence_of
from ..parallel.group import Group
from ..pipeline import OmniGenPipeline
from ..placement import Placement
from ..precision import Precision
from ..run import budget_of
from ..running import Running
from ..streaming import is_out_of_memory

_FILE = "$file"  # stands for the content of a file in a message
_FINE, _BUSY, _FAILED, _MEMORY = range(4)  # how an operation ends; ranks agree on the last of these

T = TypeVar("T")


class Arguments:
    """Arguments of a call as JSON, and the content of the files among them.

    Raises RequestError for what a message can't carry, such as an array.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.files: list[bytes] = []
        self.plain = {name: self._plain(name, value) for name, value in given.items()}

    def _plain(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self._plain(name, one) for one in value]
        if isinstance(value, bytes):
            self.files.append(value)
            return {_FILE: len(self.files) - 1}
        if hasattr(value, "read") and hasattr(value, "seek"):
            value.seek(0)
            content = value.read()
            value.seek(0)
            return self._plain(name, content)
        raise RequestError(
            f"several ranks can't be sent {name} as {brief(type(value).__name__)}; give images as "
            "files or as bytes"
        )


def _restored(value: Any, files: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_restored(one, files) for one in value]
    if isinstance(value, dict):
        return io.BytesIO(files[value[_FILE]])
    return value


class Leading:
    """Rank 0's engine, as the scheduler drives it: the other ranks do the same.

    What is not defined here is read from the engine.
    """

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine, self._group = engine, group
        self.placement = Placement()  # those who drive this exchange nothing themselves
        self._arguments: dict[int, Arguments] = {}  # by the number of a call
        self._numbers: dict[int, int] = {}  # of calls, by their ids
        self._told: set[int] = set()  # numbers of calls that the others have
        self._over: list[int] = []
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def describe(self, call: Call, arguments: Arguments) -> None:
        """Says of which arguments a call was made, before it is started first."""
        if id(call) in self._numbers:
            return
        number = self._numbers[id(call)] = self._next
        self._next += 1
        self._arguments[number] = arguments
        weakref.finalize(call, self._forget, id(call), number)

    def _forget(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._arguments.pop(number, None)
        self._over.append(number)

    def start(self, call: Call, plan: MemoryPlan, own_rows: bool = False) -> Running:
        number = self._numbers[id(call)]
        files: list[bytes] = []
        more: dict[str, Any] = {"plan": asdict(plan), "own_rows": own_rows}
        if number not in self._told:
            described = self._arguments.pop(number)
            more["arguments"], files = described.plain, described.files
            self._told.add(number)
        self._tell("start", number, files, **more)
        return _agreed(
            self._group,
            lambda: self._engine.start(call, plan, own_rows),
            lambda: self._engine.end(call),
        )

    def step(self, running: Running) -> None:
        self._tell("step", self._numbers[id(running.call)])
        with _Unbroken(self._group):
            self._engine.step(running)

    def finish(self, running: Running) -> Tensor:
        self._tell("finish", self._numbers[id(running.call)])
        return _agreed(self._group, lambda: self._engine.finish(running))

    def decode(self, latents: Tensor, plan: MemoryPlan) -> Tensor:
        shape = list(latents.shape)
        self._tell("decode", None, plan=asdict(plan), shape=shape)
        self._group.broadcast_(latents)
        with _Unbroken(self._group):
            return self._engine.decode(latents, plan)

    def drop(self, running: Running) -> None:
        self.end(running.call)

    def end(self, call: Call) -> None:
        if id(call) in self._numbers:
            self._tell("end", self._numbers[id(call)])
        self._engine.end(call)

    def recover(self) -> None:
        self._tell("recover", None)
        self._engine.recover()

    def free(self) -> None:
        self._tell("free", None)
        self._engine.free()

    def least(self, size: int) -> int:
        """The least of the bytes that plans may use on each rank; `size` on this one."""
        self._tell("usable", None)
        return self._group.least(size)

    def idle(self) -> None:
        """Tells the others that there is nothing to do; raises RankError if one has failed."""
        self._tell("idle", None)

    def close(self) -> None:
        """Ends `follow` on the other ranks."""
        self._tell("close", None)

    def _tell(
        self, what: str, number: int | None, files: Sequence[bytes] = (), **more: Any
    ) -> None:
        over = [self._over.pop() for _ in range(len(self._over))]
        self._told.difference_update(over)
        head = {"do": what, "number": number, "over": over, "files": list(map(len, files)), **more}
        self._group.tell(b"".join([json.dumps(head).encode(), b"\0", *files]))


class _Unbroken:
    """Around what exchanges: an error that other ranks don't have ends the group."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, OmniGenError):  # all ranks raise these alike
            return
        self._group.watch.fail(sentence_of(error))
        raise RankError(f"rank {self._group.rank}: {sentence_of(error)}") from error


def _agreed(group: Group, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
    """What an operation without exchanges gives, if it works on all ranks.

    Raises:
        BusyError, torch.OutOfMemoryError, OmniGenError: it does not on this or another one.
    """
    status, own, found = _FINE, None, None
    try:
        found = work()
    except Exception as error:
        own, status = error, _FAILED
        if isinstance(error, BusyError):
            status = _BUSY
        elif is_out_of_memory(error):
            status = _MEMORY
    (worst,) = group.agree(status)
    if worst == _FINE:
        return found  # type: ignore[return-value]
    if own is None:
        undo()
    elif worst == status:
        raise own
    if worst == _BUSY:
        raise BusyError("another rank is busy with other calls")
    if worst == _MEMORY:
        raise torch.OutOfMemoryError("out of memory on another rank")
    raise OmniGenError("the operation has failed on another rank")


def follow(pipe: OmniGenPipeline) -> None:
    """What the ranks beside the first do: all that its engine does, until it is closed."""
    group = pipe.engine.placement.group
    assert group is not None and not group.leads
    with pipe.driving() as engine, group.guarding():
        follower = _Follower(pipe, engine, group)
        while follower.follow():
            pass


class _Follower:
    def __init__(self, pipe: OmniGenPipeline, engine: Engine, group: Group) -> None:
        self._pipe, self._engine, self._group = pipe, engine, group
        self._given: dict[int, tuple[Any, list[bytes]]] = {}  # of calls that are not made yet
        self._calls: dict[int, Call] = {}
        self._running: dict[int, Running] = {}

    def follow(self) -> bool:
        """Does what rank 0 tells next; False once it has closed."""
        message = self._group.tell()
        text, _, rest = message.partition(b"\0")
        head = json.loads(text)
        files, place = [], 0
        for size in head["files"]:
            files.append(rest[place : place + size])
            place += size
        for number in head["over"]:
            self._calls.pop(number, None)
            self._given.pop(number, None)
        self._do(head, files)
        return bool(head["do"] != "close")

    def _do(self, head: dict[str, Any], files: list[bytes]) -> None:
        what, number, engine = head["do"], head["number"], self._engine
        if what == "start":
            self._start(number, head, files)
        elif what == "step":
            running = self._running[number]
            with _Unbroken(self._group):
                engine.step(running)
            running.save()
        elif what == "finish":
            running = self._running.pop(number)
            self._swallow(lambda: _agreed(self._group, lambda: engine.finish(running)))
        elif what == "decode":
            latents = torch.empty(head["shape"], device=engine.device)
            self._group.broadcast_(latents)
            with _Unbroken(self._group):
                self._swallow(lambda: engine.decode(latents, _plan(head)))
        elif what == "end":
            self._running.pop(number, None)
            if number in self._calls:
                engine.end(self._calls[number])
        elif what in ("recover", "free"):
            getattr(engine, what)()
        elif what == "usable":
            self._group.least(budget_of(engine))

    def _start(self, number: int, head: dict[str, Any], files: list[bytes]) -> None:
        if "arguments" in head:
            self._given[number] = head["arguments"], files

        def work() -> Running:
            if number in self._given:
                plain, content = self._given[number]
                given = {name: _restored(value, content) for name, value in plain.items()}
                self._calls[number] = self._pipe.make_call(**given)
                del self._given[number]
            return self._engine.start(self._calls[number], _plan(head), head["own_rows"])

        def undo() -> None:
            self._engine.end(self._calls[number])

        found = self._swallow(lambda: _agreed(self._group, work, undo))
        if found is not None:
            self._running[number] = found

    @staticmethod
    def _swallow(work: Callable[[], T]) -> T | None:
        """None for an error that rank 0 has too, and deals with."""
        try:
            return work()
        except RankError:
            raise
        except (OmniGenError, torch.OutOfMemoryError):
            return None


def _plan(head: dict[str, Any]) -> MemoryPlan:
    given = dict(head["plan"])
    if given["precision"] is not None:
        given["precision"] = Precision(**given["precision"])
    return MemoryPlan(**given)
