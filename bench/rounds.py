"""What measurements on the CPU and on a GPU share."""

from __future__ import annotations

import numpy as np

#: Number of calls per round when a small call is timed.
CALLS = 200
#: A slow peer is dropped after this many seconds, but not before this many rounds.
PATIENCE, LEAST_ROUNDS = 1.5, 3
#: Tolerance for peers, relative to the largest value, by the size of an element in bytes. Peers may
#: sum in the dtype of the logits.
TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-9}


def ratio(above: list[float], below: list[float]) -> float:
    """Median ratio over the rounds that both have."""
    n = min(len(above), len(below))
    return float(np.median(np.divide(above[:n], below[:n])))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
