"""What measurements on the CPU and on a GPU have in common."""

from __future__ import annotations

import numpy as np

#: Calls in a round of a small call.
CALLS = 200
#: Seconds after which a slow peer is measured no more, and rounds that it gets in any case.
PATIENCE, LEAST_ROUNDS = 1.5, 3
#: By the bytes of an element, relative to the largest value: peers may sum in the dtype itself.
TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-9}


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds that both had."""
    n = min(len(above), len(below))
    return float(np.median(np.divide(above[:n], below[:n])))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
