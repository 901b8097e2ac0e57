"""Who computes a step's attention fastest on a card, as measured there: "triton" or a library.

`bench/kernels/tune.py` and `python -m bench.gpu_check --keep-winners` race them and write the table
between the two marks. Of a card or a head_dim that nobody has measured there is no entry.
"""

from __future__ import annotations

TRITON = "triton"

# Name of a card, as CUDA gives it -> head_dim -> "triton", "flash" or "cudnn", in bfloat16.
# winners: begin
WINNERS: dict[str, dict[int, str]] = {}
# winners: end


def winner(card: str, head_dim: int) -> str:
    """The fastest on a card; Triton where that was not measured."""
    return WINNERS.get(card, {}).get(head_dim, TRITON)
