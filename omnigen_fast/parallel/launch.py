"""Ranks of one machine: starts them, joins them, and says what has ended them.

`start` runs a command once for each rank, through torchrun's Python API; `joined` is around what
such a process does, whether `start` or torchrun has started it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OmniGenError, RequestError, printable

if TYPE_CHECKING:
    from .failure import Mailbox

_RUN = "omnigen-fast"  # torchrun's name for what `start` has started
_EXCHANGE = timedelta(minutes=30)  # most that ranks wait for each other, in a callback or a load
_CHILDREN_SECONDS = 5.0  # in which children end once the first rank is over
_HERE = "127.0.0.1"
_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's name for where a rank may say what failed


class Ended(OmniGenError):
    """The ranks have failed: one sentence.

    Attributes:
        status: with which the command ends.
    """

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def is_rank() -> bool:
    """Whether this process is one of the ranks that torchrun or `start` has started."""
    return all(name in os.environ for name in _ENV) and os.environ["WORLD_SIZE"] != "1"


def is_started_here() -> bool:
    """Whether `start` has: it then says what has failed, and the ranks are silent."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN


def check_devices(ranks: int, device: str | None) -> None:
    """Raises RequestError unless this machine has a device for each of so many ranks."""
    import torch

    name = _device_type(device)
    if name == "cpu":
        return
    found = torch.cuda.device_count() if name == "cuda" else 0
    if name != "cuda" or found < ranks:
        raise RequestError(
            f"--gpus {ranks} needs as many GPUs, and this machine has {found}; give a smaller "
            "number, or --device cpu for processes on the CPU"
        )


def _device_type(device: str | None) -> str:
    """Of all ranks; raises RequestError where the caller has named one GPU."""
    if device in (None, "cuda", "cpu"):
        return device or "cuda"
    raise RequestError(
        f"--device {device!r} can't be used with several ranks, which take the GPUs in their "
        "order; leave it out, or give cuda or cpu"
    )


def start(arguments: Sequence[str], ranks: int, device: str | None) -> None:
    """Runs `python -m omnigen_fast ARGUMENTS` as so many ranks, and waits until all have ended.

    Raises:
        RequestError: there are not as many devices.
        Ended: a rank has failed; all have ended.
        KeyboardInterrupt: so have they after Ctrl-C.
    """
    check_devices(ranks, device)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it prints a page where a rank fails
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, *_ending_signals())}
    told: signal.Signals | None = None
    failures: dict[int, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="omnigen-ranks-") as folder,
        _environment(ranks, device),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=_RUN,
            # unlike the default it unpickles nothing that it finds in the store
            rdzv_backend="static",
            rdzv_endpoint=f"{_HERE}:{_free_port()}",
            rdzv_configs={"rank": 0, "timeout": 60},
            local_addr=_HERE,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "omnigen_fast", *arguments)
        except ChildFailedError as error:
            failures = {rank: _failure(rank, one) for rank, one in error.failures.items()}
        except SignalException as error:
            told = error.sigval
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if told == signal.SIGINT:
        raise KeyboardInterrupt
    if told is not None:
        signal.raise_signal(told)
    if failures:
        raise min(failures.values(), key=lambda one: one[0])[1]


def _ending_signals() -> list[signal.Signals]:
    names = ("SIGTERM", "SIGHUP", "SIGQUIT")  # those that torchrun handles
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((_HERE, 0))
        return int(one.getsockname()[1])


@contextmanager
def _environment(ranks: int, device: str | None) -> Iterator[None]:
    """What the ranks get from this process, while they start."""
    added = _added(ranks, device)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _added(ranks: int, device: str | None) -> dict[str, str]:
    """What ranks need in their environment and this one lacks: loopback, their share of cores."""
    added = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}  # seconds
    if sys.platform == "linux":
        added |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if device == "cpu":
        added["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return {name: value for name, value in added.items() if name not in os.environ}


def _failure(rank: int, failure: Any) -> tuple[tuple[bool, float], Ended]:
    """An order (a rank that was killed is the reason for what the others say), and an error."""
    number = -failure.exitcode
    if number > 0 and number not in (signal.SIGTERM, signal.SIGINT):
        name = failure.signal_name()
        why = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return (False, 0.0), Ended(f"rank {rank} was ended by {name}{why}", 1)
    data = failure.error_file_data
    message = data.get("message") if isinstance(data, dict) else None
    if isinstance(message, dict) and "message" in message:
        status = failure.exitcode if failure.exitcode > 0 else 1
        return (True, float(failure.timestamp)), Ended(str(message["message"]), status)
    return (True, float("inf")), Ended(f"rank {rank} ended with status {failure.exitcode}", 1)


def _own_device(device: str | None, number: int | str) -> str:
    """Of a rank, by its number on this machine. Raises RequestError if there is none."""
    import torch

    if _device_type(device) == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(f"cuda:{number}")
        return f"cuda:{number}"
    if device == "cuda":
        raise RequestError("--device cuda can't be used: there is no GPU; give --device cpu")
    return "cpu"


def _backend(device: str) -> str:
    return "gloo" if device == "cpu" else "nccl"


class Children:
    """Ranks that this process, which is rank 0, starts as its children.

    They end when it does, or when it closes what they follow; at the latest they are killed then.

    Args:
        module: that they run.
        ranks: how many there are with this process.
        device: as `--device`.
        given: what they read from standard input.

    Raises RequestError unless this machine has as many devices.
    """

    def __init__(self, module: str, ranks: int, device: str | None, given: str) -> None:
        check_devices(ranks, device)
        import torch.distributed as dist

        self.device = _own_device(device, 0)
        port = str(_free_port())
        size = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": _HERE, "MASTER_PORT": port}
        os.environ.update(_added(ranks, device))  # of this rank too
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                env={**os.environ, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C is for this process, which ends them
            )
            for rank in range(1, ranks)
        ]
        atexit.register(self.end)
        for one in self._processes:
            assert one.stdin is not None
            with suppress(OSError), one.stdin as pipe:
                pipe.write(given.encode())
        dist.init_process_group(
            _backend(self.device),
            init_method=f"tcp://{_HERE}:{port}",
            rank=0,
            world_size=ranks,
            timeout=_EXCHANGE,
        )

    def end(self) -> None:
        """Waits for the ranks, and kills those that take too long."""
        end = time.monotonic() + _CHILDREN_SECONDS
        for one in self._processes:
            try:
                one.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.kill()


@contextmanager
def joined(device: str | None) -> Iterator[tuple[str, Mailbox]]:
    """Around what a rank does: the process group of all, which has begun.

    Yields:
        (the device of this rank, where it leaves what has failed).

    Raises:
        RequestError: there is no such device.
    """
    import torch.distributed as dist

    from .failure import Mailbox, Watch

    own = _own_device(device, os.environ["LOCAL_RANK"])
    dist.init_process_group(_backend(own), timeout=_EXCHANGE)
    Watch.last_words = staticmethod(say)
    try:
        yield own, Mailbox(dist.distributed_c10d._get_default_store(), dist.get_rank())
    finally:
        with suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()


def say(sentence: str, mailbox: Mailbox) -> None:
    """Tells what has failed: the process that has started the ranks, or the user."""
    path = os.environ.get(_ERROR_FILE)
    if path:
        more = {"timestamp": str(int(time.time()))}
        with suppress(OSError):
            text = json.dumps({"message": {"message": printable(sentence), "extraInfo": more}})
            Path(path).write_text(text)
    if not is_started_here() and mailbox.may_say():
        with suppress(OSError, ValueError, AttributeError):
            print(f"Error: {sentence}", file=sys.stderr, flush=True)
