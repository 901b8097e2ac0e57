"""Runs functions on the ranks of a gloo group: one process each, with one thread."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_START = 300.0  # seconds until ranks are given up
# A server imports these once, and every rank is forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "omnigen_fast.pipeline",
        "omnigen_fast.kernels.ops",
        "diffusers.models.autoencoders.autoencoder_kl",
        "torch.distributed",
        "tokenizers",
        "PIL.Image",
    ]
)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(size: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on every rank of a group, in their order.

    Args:
        size: how many ranks.
        work: a function of a module; what it returns, `torch.save` can write.
        folder: for their results.
        arguments: picklable.
    """
    port = free_port()
    processes = [
        _CONTEXT.Process(
            target=_rank, args=(rank, size, port, folder, work, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(_START)
    hung = [rank for rank, one in enumerate(processes) if one.is_alive()]
    for one in processes:
        one.kill()
    assert not hung, f"ranks {hung} did not end"
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    failures = [one["error"] for one in found if "error" in one]
    assert not failures, "\n".join(failures)
    return [one["result"] for one in found]


def _rank(
    rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        found = {"result": work(*arguments)}
    except BaseException:
        found = {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    torch.save(found, folder / f"{rank}.pt")
    if "error" in found:
        os._exit(1)  # the others may wait for this rank
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
