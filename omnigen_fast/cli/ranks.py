"""`--gpus`: a command as several ranks, of which the first prints and writes files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..errors import OmniGenError, RequestError
from ..parallel.launch import Ended, is_rank, joined, say, start
from ..parallel.layout import AUTO, MAX_RANKS
from .failure import failure

if TYPE_CHECKING:
    from ..parallel.failure import Mailbox

ARGUMENTS = "omnigen_fast.arguments"  # of the command line, in a context's `meta`


@dataclass(frozen=True)
class Place:
    """Where a command runs: in one process, or as one of several ranks."""

    device: str | None
    parallel: str | None = None  # of `from_pretrained`
    leads: bool = True  # whether it prints and writes files
    mailbox: Mailbox | None = None

    def same(self, name: str, value: int) -> int:
        """A value that all ranks take: the one of the first that asks."""
        return value if self.mailbox is None else int(self.mailbox.shared(name, str(value)))


gpus_option = click.option(
    "--gpus",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_RANKS),
    help="How many GPUs share the work; with --device cpu, processes.",
)


def on_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """Runs a command with `gpus_option`: `device` and `gpus` become `place`."""

    @functools.wraps(command)
    def run(context: click.Context, *, gpus: int, device: str | None, **options: Any) -> None:
        if is_rank():
            with _as_a_rank(gpus, device) as place:
                command(context, place=place, **options)
        elif gpus == 1:
            command(context, place=Place(device), **options)
        else:
            try:
                start(context.meta[ARGUMENTS], gpus, device)
            except Ended as error:
                kind = RequestError if error.status == 2 else OmniGenError
                raise failure(kind(str(error))) from error
            except (OmniGenError, OSError) as error:
                raise failure(error) from error

    return run


@contextmanager
def _as_a_rank(gpus: int, device: str | None) -> Iterator[Place]:
    """One of the ranks. What fails on any of them is said once, by one of them."""
    size = int(os.environ["WORLD_SIZE"])
    if gpus not in (1, size):
        raise failure(RequestError(f"--gpus {gpus} among {size} ranks; leave it out"))
    try:
        with joined(device) as (own, mailbox), _failing_once(mailbox):
            yield Place(own, AUTO, mailbox.rank == 0, mailbox)
    except RequestError as error:
        raise failure(error) from error


@contextmanager
def _failing_once(mailbox: Mailbox) -> Iterator[None]:
    """Says what has failed on any rank, unless another one does; the process ends."""
    status, sentence = 1, "ended by a signal"
    try:
        yield
        return
    except (OmniGenError, OSError, click.ClickException) as error:
        shown = error if isinstance(error, click.ClickException) else failure(error)
        status, sentence = shown.exit_code, shown.format_message()
    except KeyboardInterrupt:
        sentence = "interrupted by Ctrl-C"
    except BaseException as error:  # a fault of this program, with its traceback; or a signal
        from ..parallel.failure import sentence_of

        mailbox.leave(f"rank {mailbox.rank}: {sentence_of(error)}")
        raise
    # what all ranks refuse alike needs no number
    mailbox.leave(sentence if status == 2 else f"rank {mailbox.rank}: {sentence}")
    say(mailbox.failure() or sentence, mailbox)
    raise SystemExit(status)
