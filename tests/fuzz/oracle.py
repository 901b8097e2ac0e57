"""What must hold while an input is read: the error, the time, the memory, and what is not done."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omnigen_fast.errors import MAX_MESSAGE, OmniGenError

_WATCHED = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "pickle.find_class",
    "shutil.rmtree",
    "ctypes.dlopen",
)
_DECODER = "from omnigen_fast.image_decoder import serve"


@dataclass
class Verdict:
    """What an input did."""

    taken: bool = False  # else refused
    seconds: float = 0.0  # by the wall clock, without waiting for a processor
    bytes: int = 0  # memory above what the process held before, or of a process that it started
    fault: str = ""
    where: str = ""  # the innermost line of this project in the fault's traceback


class Refused(Exception):
    """A kind's own word for a refusal that is no OmniGenError, such as a command's exit status.

    Its text is held to the same rules as a message.
    """


class Events:
    """Records what no input may cause; installed once in a process."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._watching = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or event not in _WATCHED or _is_decoder(event, arguments):
            return
        if event == "ctypes.dlopen" and arguments[0] is None:
            return
        self.seen.append(f"{event} {ascii(arguments)[:150]}")
        raise RuntimeError(f"{event} is forbidden here")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.seen.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False


def _is_decoder(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is the project's own process, which decodes images and can be killed."""
    if event != "subprocess.Popen":
        return False
    executable, command = arguments[0], arguments[1]
    return (
        executable == sys.executable
        and list(command[1:3]) == ["-I", "-c"]
        and (_DECODER in command[3])
    )


def judged(
    prepare: Callable[[], Any],
    work: Callable[[Any], object],
    events: Events,
    most_seconds: float,
    most_bytes: int,
) -> Verdict:
    """Runs `work` on what `prepare` returns, and once more if it took too long.

    The shorter time counts, by the wall clock less what was spent waiting for a processor: others
    may be busy here. Where more processes run than there are processors, the limit is higher by
    that ratio.
    """
    most_seconds *= crowding()
    found = _once(prepare(), work, events, most_bytes)
    if found.seconds > most_seconds:
        again = _once(prepare(), work, events, most_bytes)
        found.seconds = min(found.seconds, again.seconds)
        if found.seconds > most_seconds and not found.fault:
            found.fault = f"took {found.seconds:.1f} s, at most {most_seconds:.2g} s are allowed"
    return found


def crowding() -> float:
    """How many processes are ready to run for each processor, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _once(prepared: Any, work: Callable[[Any], object], events: Events, most_bytes: int) -> Verdict:
    found = Verdict()
    memory, CHILDREN.largest = Memory(), 0
    start = time.perf_counter() - waiting() - CHILDREN.waited
    try:
        with events.watched():
            work(prepared)
        found.taken = True
    except (OmniGenError, Refused) as error:
        found.fault = message_fault(str(error))
        found.where = _where(error) if found.fault else ""
    except BaseException as error:  # a Rust panic is no Exception
        found.fault = f"{type(error).__name__}: {ascii(str(error))[1:-1][:300]}"
        found.where = _where(error)
    found.seconds = time.perf_counter() - waiting() - CHILDREN.waited - start
    found.bytes = max(memory.above(), CHILDREN.largest)
    if events.seen:
        found.fault = f"did {events.seen[0]}"
    elif found.bytes > most_bytes and not found.fault:
        found.fault = f"took {found.bytes / 1e6:.0f} MB, at most {most_bytes / 1e6:.0f} are allowed"
    return found


def message_fault(text: str) -> str:
    """What is wrong with a message; empty if nothing is."""
    if not text.strip():
        return "an empty message"
    if len(text) > MAX_MESSAGE:
        return f"a message of {len(text)} characters: {text[:120]!a}"
    if not text.isprintable():
        return f"a message that is not printable: {ascii(text)[:200]}"
    return ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"omnigen_fast{os.sep}" in frame.filename]
    frame = (ours or frames or [None])[-1]
    return "" if frame is None else f"{os.path.basename(frame.filename)}:{frame.lineno}"


def waiting(process: int | str = "self") -> float:
    """Seconds that a process was ready to run while others ran; 0 where the system can't tell."""
    try:
        with open(f"/proc/{process}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class Children:
    """What is known of processes that inputs start."""

    waited = 0.0  # seconds for a processor, all together
    largest = 0  # bytes that one took above what it began with, for the input at hand


CHILDREN = Children()


class Memory:
    """The highest resident memory from now on, above what is resident now."""

    def __init__(self) -> None:
        self._resettable = _reset_peak()
        self._before = _status("VmRSS")
        self._highest = _peak()

    def above(self) -> int:
        """Bytes; 0 where the system can't tell and it was no more than at an earlier time."""
        peak = _status("VmHWM") if self._resettable else _peak()
        if not self._resettable and peak <= self._highest:
            return 0
        return max(0, peak - self._before)


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    """Bytes by the name that Linux gives them; without Linux the highest so far."""
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(name.encode()):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return _peak()
