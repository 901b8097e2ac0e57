"""The ranks beside a server's own process: started with it, and ended with it.

`python -m omnigen_fast.serving.followers` is one of them; standard input says what to load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OmniGenError
from ..parallel.launch import Children, joined, say
from ..parallel.layout import AUTO
from ..pipeline import OmniGenPipeline
from .leading import follow

_MODULE = "omnigen_fast.serving.followers"


def load(
    ranks: int, device: str | None, loras: Sequence[str], options: Mapping[str, Any]
) -> OmniGenPipeline:
    """A pipeline, on so many GPUs of this machine if that is more than one.

    Args:
        ranks: how many.
        device: as `--device`; None for the GPU, or the GPUs.
        loras: files, folders or hub ids.
        options: further arguments of `from_pretrained`, as JSON can write them.

    Raises:
        RequestError: there are not as many devices.
    """
    if ranks == 1:
        return _loaded(device, None, loras, options)
    given = json.dumps({"device": device, "loras": list(loras), "options": dict(options)})
    children = Children(_MODULE, ranks, device, given)
    return _loaded(children.device, AUTO, loras, options)


def _loaded(
    device: str | None, parallel: str | None, loras: Sequence[str], options: Mapping[str, Any]
) -> OmniGenPipeline:
    pipe = OmniGenPipeline.from_pretrained(device=device, parallel=parallel, **options)
    for one in loras:
        pipe.load_lora_weights(one)
    return pipe


def main() -> None:
    """A rank beside the first."""
    given = json.load(sys.stdin)
    with joined(given["device"]) as (own, mailbox):
        try:
            follow(_loaded(own, AUTO, given["loras"], given["options"]))
        except OmniGenError as error:
            mailbox.leave(f"rank {mailbox.rank}: {error}")
            say(mailbox.failure() or str(error), mailbox)
            sys.exit(1)


if __name__ == "__main__":
    main()
