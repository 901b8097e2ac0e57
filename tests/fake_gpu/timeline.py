"""Which work of a GPU is ordered after which: streams, events and memory, as vector clocks.

A stream runs its work in order; the host waits for nothing unless it is told to. Two accesses to
the same bytes, one of them a write, must be ordered: by one stream, by an event, or by a wait of
the host. What is not ordered is reported, whichever of the two a real GPU would do first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


class Fault(AssertionError):
    """Work that a real GPU could do wrong."""


@dataclass(eq=False)
class Actor:
    """A stream, or the host: does one thing after the other.

    `seen` says of each actor how much of its work is done before what this one does next.
    """

    name: str
    seen: dict[Actor, int] = field(default_factory=dict)

    def advance(self) -> int:
        """The time of the next piece of work."""
        self.seen[self] = self.seen.get(self, 0) + 1
        return self.seen[self]

    def mark(self) -> dict[Actor, int]:
        """All that is done once this point is reached."""
        return dict(self.seen)

    def wait(self, mark: dict[Actor, int]) -> None:
        """What comes next comes after a mark."""
        for actor, time in mark.items():
            self.seen[actor] = max(self.seen.get(actor, 0), time)

    def is_after(self, actor: Actor, time: int) -> bool:
        return self.seen.get(actor, 0) >= time


@dataclass(frozen=True)
class Part:
    """Bytes `first` to `stop` of a memory."""

    memory: Memory
    first: int
    stop: int


@dataclass(frozen=True)
class Access:
    """A piece of work that reads or writes."""

    actor: Actor
    time: int
    writes: bool
    what: str


@dataclass(eq=False)
class Memory:
    """A block of the device's or the host's memory, and who has used which bytes of it."""

    name: str
    owner: Actor  # whose later work may be given these bytes once they are freed
    accesses: dict[tuple[int, int], list[Access]] = field(default_factory=dict)
    freed: bool = False

    def use(self, first: int, stop: int, access: Access) -> None:
        """Notes an access; raises Fault if an earlier one may come after it."""
        for (low, high), earlier in self.accesses.items():
            if low >= stop or high <= first:
                continue
            for one in earlier:
                if one.writes or access.writes:
                    _check(one, access, self.name)
        kept = self.accesses.setdefault((first, stop), [])
        # an earlier one of the same actor says no more than this one
        kept[:] = [
            one for one in kept if one.actor is not access.actor or (one.writes > access.writes)
        ]
        kept.append(access)

    def free(self, host: Actor) -> None:
        """Ends it; raises Fault if somebody may still use it when its bytes are given away.

        The device's go to the stream that had them, in its order; the host's to the host.
        """
        self.freed = True
        for accesses in self.accesses.values():
            for one in accesses:
                if one.actor is self.owner or self.owner.is_after(one.actor, one.time):
                    continue
                if not host.is_after(one.actor, one.time):
                    raise Fault(f"{self.name} is freed while {one.actor.name} may {_does(one)} it")


def _check(one: Access, access: Access, name: str) -> None:
    if one.actor is not access.actor and not access.actor.is_after(one.actor, one.time):
        raise Fault(
            f"{access.actor.name} {_did(access)} {name} ({access.what}) in no order with "
            f"{one.actor.name}, which {_did(one)} it ({one.what})"
        )


def _does(access: Access) -> str:
    return "write" if access.writes else "read"


def _did(access: Access) -> str:
    return "writes" if access.writes else "reads"


@dataclass(frozen=True)
class Work:
    """What a kernel or copy reads and writes."""

    what: str
    reads: tuple[Part, ...]
    writes: tuple[Part, ...]

    def run(self, actor: Actor) -> None:
        """The actor does it next; raises Fault where that is in no order, or memory is gone."""
        time = actor.advance()
        for writes, parts in ((False, self.reads), (True, self.writes)):
            for part in parts:
                if part.memory.freed:
                    raise Fault(f"{self.what} uses {part.memory.name}, which was freed")
                if part.stop > part.first:
                    access = Access(actor, time, writes, self.what)
                    part.memory.use(part.first, part.stop, access)


def memories(work: Iterable[Work]) -> set[Memory]:
    """All that some work uses."""
    return {part.memory for one in work for part in (*one.reads, *one.writes)}
