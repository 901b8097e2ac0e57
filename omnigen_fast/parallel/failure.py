"""Failures among ranks: what one leaves, the others raise, and none outlives its group.

A rank that fails leaves one sentence in the group's store and closes its connections, so that
exchanges under way fail on the others too; these look into the store for the reason. A thread of
each rank looks there as well, twice a second, and tells that the rank is alive. It ends a process
that is caught in an exchange which can't fail by itself.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist

from ..errors import OmniGenError, RankError, first_line, printable
from ..streaming import is_out_of_memory

_LOOK_SECONDS = 0.5
_SILENT_SECONDS = 8.0  # after which a rank that does not tell that it is alive has gone away
_GRACE_SECONDS = 3.0  # to end by itself, once another rank has failed
_REASON_SECONDS = 2.5  # in which a rank whose exchange has failed finds out why
_PREFIX = "omnigen_fast"
_FAILURE, _SAID = f"{_PREFIX}/failure", f"{_PREFIX}/said"


def sentence_of(error: BaseException) -> str:
    """What the other ranks are told about an error of this one."""
    if isinstance(error, OmniGenError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    if isinstance(error, Exception):
        return printable(f"{type(error).__name__}: {first_line(error)}")
    return "ended by a signal" if not isinstance(error, SystemExit) else "ended by sys.exit"


class Mailbox:
    """The part of the store of a process group in which ranks leave what has failed.

    Args:
        store: of the group, which this has a connection of its own to: the group's own is in use
            while ranks wait for each other.
        rank: of this process.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.rank = rank
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=_SILENT_SECONDS))
        self._lock = threading.Lock()

    def leave(self, sentence: str) -> None:
        """Leaves a sentence that names the rank, unless there is one already."""
        with suppress(Exception), self._lock:
            self._store.compare_set(_FAILURE, "", sentence)

    def failure(self) -> str | None:
        """What was left first."""
        try:
            with self._lock:
                if not self._store.check([_FAILURE]):
                    return None
                return printable(self._store.get(_FAILURE).decode(errors="replace"))
        except Exception:  # the store has gone with the process that held it
            return "rank 0, or the process that has started the ranks, has gone away"

    def may_say(self) -> bool:
        """True on the first rank that asks: only one tells the user what has failed."""
        try:
            with self._lock:
                said = self._store.compare_set(_SAID, "", str(self.rank))
        except Exception:  # nobody is left to ask
            return True
        return bool(said.decode() == str(self.rank))

    def shared(self, name: str, value: str) -> str:
        """The value that the first of the ranks gives to a name."""
        with self._lock:
            found = self._store.compare_set(f"{_PREFIX}/{name}", "", value)
        return str(found.decode())

    def tell_alive(self, count: int) -> None:
        with self._lock:
            self._store.set(f"{_PREFIX}/alive/{self.rank}", str(count))

    def alive(self, rank: int) -> str | None:
        """What a rank told last; None before its first time."""
        key = f"{_PREFIX}/alive/{rank}"
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else None


def _say(sentence: str, mailbox: Mailbox) -> None:
    if mailbox.may_say():
        with suppress(OSError, ValueError, AttributeError):
            print(f"Error: {sentence}", file=sys.stderr, flush=True)


class Watch:
    """Keeps an eye on the other ranks of a group.

    Args:
        store: of the process group.
        rank: of this process.
        size: how many ranks there are.
        let_go: drops all references to further groups, whose connections are open as long.
    """

    # Called with the sentence before a process is ended; a command line puts its own in place.
    last_words: ClassVar[Callable[[str, Mailbox], None]] = _say

    def __init__(self, store: Any, rank: int, size: int, let_go: Callable[[], None]) -> None:
        self.rank, self._size, self._let_go = rank, size, let_go
        self._store, self._mailbox = store, Mailbox(store, rank)
        self._failed: str | None = None
        self._heard: dict[int, tuple[str | None, float]] = {}
        self._busy = 0  # calls and exchanges that this rank is in
        self._closed = threading.Event()
        atexit.register(self.close)
        threading.Thread(target=self._look, name="omnigen-ranks", daemon=True).start()

    def close(self) -> None:
        """Ends the watch; the others don't expect to hear of this rank any more."""
        if not self._closed.is_set():
            self._closed.set()
            with suppress(Exception):
                self._mailbox.tell_alive(-1)

    def check(self) -> None:
        """Raises RankError if a rank has failed."""
        if self._failed is not None:
            raise RankError(self._failed)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around an exchange with the other ranks: where it fails, raises why."""
        self.check()
        self._busy += 1
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, OmniGenError) or is_out_of_memory(error):
                raise
            if self._failed is None:
                self._failed = self._reason(error)
        else:
            return
        finally:
            self._busy -= 1
        raise RankError(self._failed)  # here, not in the handler: the traceback holds tensors

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around all that the ranks do together: what one raises ends it on all of them."""
        self.check()
        self._busy += 1
        try:
            yield
        except BaseException as error:
            self.fail(sentence_of(error))
            raise
        finally:
            self._busy -= 1

    def fail(self, sentence: str) -> None:
        """Tells the others, and closes the connections to them: they wait for this rank."""
        if self._failed is None:
            self._failed = f"rank {self.rank}: {sentence}"
        self._mailbox.leave(self._failed)
        self._disconnect()

    def _reason(self, error: BaseException) -> str:
        """Why an exchange has failed: another rank's sentence, or that it has gone away."""
        before = {rank: self._alive(rank) for rank in self._others()}
        end = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < end:
            told = self._failed or self._mailbox.failure()
            if told is not None:
                return told
            time.sleep(0.1)
        gone = [rank for rank in self._others() if self._alive(rank) == before[rank]]
        if gone:
            return f"rank {gone[0]} has gone away"
        return f"an exchange between the ranks has failed ({first_line(error)})"

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self._size) if rank != self.rank)

    def _alive(self, rank: int) -> str | None:
        try:
            return self._mailbox.alive(rank)
        except Exception:
            return None

    def _look(self) -> None:
        count = 0
        while not self._closed.wait(_LOOK_SECONDS):
            if not self._connected() and not self._busy:
                return  # the program has left the group
            count += 1
            with suppress(Exception):  # then `failure` says what is wrong with the store
                self._mailbox.tell_alive(count)
                silent = self._silent()
                if silent is not None:
                    self._mailbox.leave(
                        f"rank {silent} has not answered for {_SILENT_SECONDS:.0f} s"
                    )
            told = self._mailbox.failure()
            if told is not None:
                self._end(told)
                return

    def _silent(self) -> int | None:
        """A rank that does not tell any more that it is alive; one that has left need not."""
        now = time.monotonic()
        for rank in self._others():
            told = self._mailbox.alive(rank)
            if told == "-1" or rank not in self._heard or told != self._heard[rank][0]:
                self._heard[rank] = told, now
            elif now - self._heard[rank][1] > _SILENT_SECONDS:
                return rank
        return None

    def _end(self, told: str) -> None:
        """Ends the calls of this process, or the process if these are caught."""
        if self._failed is None:
            self._failed = told
        if self._connected() and dist.get_backend() == "nccl":
            self._disconnect()  # ends the kernels that wait for the other rank
        while not self._closed.wait(_GRACE_SECONDS):
            if self._busy:
                type(self).last_words(self._failed, self._mailbox)
                os._exit(1)

    def _connected(self) -> bool:
        """Whether the group is the default one still."""
        return dist.is_initialized() and dist.distributed_c10d._get_default_store() is self._store

    def _disconnect(self) -> None:
        """Closes this rank's connections to the others, whatever is under way."""
        self._let_go()
        with suppress(Exception):
            if not self._connected():
                return
            if dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
