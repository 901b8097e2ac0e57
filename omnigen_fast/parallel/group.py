"""Group: the ranks that carry out one call together, and everything they exchange.

Data travel through the process group that the caller has initialised (NCCL between GPUs, gloo
between CPUs). What the hosts agree on, such as whether to go on after a step, travels through a
group of its own over gloo: that waits for no work on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import MAX_MESSAGE, RequestError
from .failure import Watch
from .layout import Layout, most_branches, parse_layout

_DIGEST = 32  # bytes
_SENTENCE = 4 * MAX_MESSAGE  # bytes of UTF-8


class Group:
    """One of the ranks, and its way to the others. Every rank must make the same calls.

    Args:
        layout: of as many ranks as the default process group has, which must be initialised.
        device: where this rank computes.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.device = device
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()
        self.backend: str = dist.get_backend()
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.received: Counter[str] = Counter()  # bytes from other ranks, by what they were
        self._control: Any = dist.new_group(backend="gloo")
        # of each number of parts of the rows, this rank's neighbours
        self._rows: dict[int, Any] = {}
        self.use(layout)
        self.watch = Watch(self.store, self.rank, self.size, self._let_go)

    def _let_go(self) -> None:
        self._control = None
        self._rows.clear()

    def use(self, layout: Layout) -> None:
        """Takes another layout of as many ranks; not once a pipeline has been made with this."""
        assert self.size == layout.size
        self.layout = layout
        for count in layout.row_counts():
            if count == 1 or count in self._rows:
                continue
            for start in range(0, self.size, count):
                ranks = list(range(start, start + count))
                made = dist.new_group(ranks)
                if self.rank in ranks:
                    self._rows[count] = made

    @property
    def leads(self) -> bool:
        """Whether this is the rank that returns pictures."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """Whether exchanges can be captured with a step in a CUDA graph."""
        return self.backend == "nccl"

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Around every exchange: where it fails, raises RankError with what has failed."""
        with self.watch.exchanging():
            yield

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Around all that ranks do together: what one raises ends it on all, and the group.

        Raises:
            RankError: another rank has failed, now or earlier.
        """
        with self.watch.calling():
            yield

    def gather_velocities(self, sent: Tensor, gathered: Tensor) -> None:
        """Collects the velocities of all ranks.

        Args:
            sent: [most rows, 16], of one size on all ranks.
            gathered: [ranks, most rows, 16], written in the order of the ranks.
        """
        self._gather(sent, gathered, None, "velocities")

    def exchange_rows(self, sent: Tensor, gathered: Tensor, parts: int) -> None:
        """Collects keys and values from the ranks that have the other rows of the same groups.

        Args:
            sent: [most rows, 2 kv_heads, head_dim], of one size on all ranks.
            gathered: [parts * most rows, 2 kv_heads, head_dim], written.
            parts: of the rows in this step, see `Layout.for_groups`.
        """
        self._gather(sent, gathered, self._rows[parts], "rows")

    def gather_bands(self, sent: Tensor, gathered: Tensor) -> None:
        """Collects parts of an activation or of an image from all ranks.

        Args:
            sent: of one size on all ranks.
            gathered: [ranks, *sent], written.
        """
        self._gather(sent, gathered, None, "bands")

    def _gather(self, sent: Tensor, gathered: Tensor, group: Any, name: str) -> None:
        # as bytes: gloo does not know every dtype
        mine, all_ = sent.view(-1).view(torch.uint8), gathered.view(-1).view(torch.uint8)
        with self.failing():
            _all_gather(all_, mine, group=group)
        self.received[name] += all_.numel() - mine.numel()

    def broadcast_(self, tensor: Tensor) -> None:
        """Gives every rank the values of rank 0's tensor, in place."""
        whole = tensor.contiguous()
        with self.failing():
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        if whole is not tensor:
            tensor.copy_(whole)

    def tell(self, message: bytes = b"") -> bytes:
        """Rank 0's message, on every rank; the others give none."""
        size = torch.tensor([len(message)])
        with self.failing():
            dist.broadcast(size, 0, group=self._control)
        if self.leads:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        else:
            content = torch.empty(int(size), dtype=torch.uint8)
        with self.failing():
            dist.broadcast(content, 0, group=self._control)
        return message or bytes(content.numpy())

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of the ranks' values, one by one; the same on every rank."""
        found = torch.tensor(values, dtype=torch.int64)
        with self.failing():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return tuple(map(int, found.tolist()))

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        return -self.agree(-value)[0]

    def same(self, what: str, digest: bytes, error: BaseException | None = None) -> None:
        """Checks that all ranks were given the same, and that none of them has refused it.

        Args:
            what: the ranks were given, for the message.
            digest: of it, 32 bytes; all zero where there is an error.
            error: why this rank refuses it.

        Raises:
            RequestError: what rank 0 was given differs; or another rank's error. A rank's own is
                left to it.
        """
        assert len(digest) == _DIGEST
        sentence = "" if error is None else str(error) or type(error).__name__
        told = sentence.encode()[:_SENTENCE].ljust(_SENTENCE, b"\0")
        mine = torch.frombuffer(bytearray(digest + told), dtype=torch.uint8)
        every = torch.empty(self.size, len(mine), dtype=torch.uint8)
        with self.failing():
            _all_gather(every.view(-1), mine, group=self._control)
        found = [bytes(one.tolist()) for one in every]
        if error is not None:
            raise error
        for one in found:
            other = one[_DIGEST:].rstrip(b"\0").decode(errors="replace")
            if other:
                raise RequestError(other)
        for rank, one in enumerate(found):
            if one[:_DIGEST] != found[0][:_DIGEST]:
                raise RequestError(
                    f"rank {rank} was given another {what} than rank 0; every rank must make the "
                    "same call"
                )


def _all_gather(gathered: Tensor, sent: Tensor, group: Any) -> None:
    # the second is the first's name before PyTorch 2.13
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, sent, group=group)


def guarded(group: Group | None) -> AbstractContextManager[None]:
    """`Group.guarding`, or nothing where everything runs in this process."""
    return nullcontext() if group is None else group.guarding()


def join(parallel: Any, device: torch.device) -> Group | None:
    """The group that the argument `parallel` asks for; None for one rank.

    Raises:
        RequestError: it can't be had; says why.
    """
    if parallel is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise RequestError(
            "parallel needs a process group: start the script with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    ranks = dist.get_world_size()
    layout = parse_layout(parallel, ranks) or most_branches(ranks)
    return None if ranks == 1 else Group(layout, device)
