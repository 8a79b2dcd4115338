"""What memory allows: reading an array once, and reading one while writing another."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import threads

Array = NDArray[Any]


def median_time(call: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return float(np.median(times))


def read(x: Array) -> float:
    """Seconds to read `x` once, by a maximum over all threads."""
    flat = x.reshape(-1).view(np.dtype(f"f{x.itemsize}"))
    return median_time(lambda: threads.run(lambda a, b: flat[a:b].max(), flat.size, flat.size))


def copy(x: Array) -> float:
    """Seconds to read `x` once and write as much into warm memory, over all threads."""
    source, target = x.reshape(-1), np.zeros(x.size, x.dtype)
    return median_time(
        lambda: threads.run(lambda a, b: np.copyto(target[a:b], source[a:b]), x.size, x.size)
    )
