"""What memory allows: reading an array once, and reading one while writing another, on all threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import threads

Array = NDArray[Any]


def reader(*arrays: Array) -> Callable[[], None]:
    """A call that reads each array once, by a maximum."""
    words = [_words(x) for x in arrays]

    def read() -> None:
        for w in words:
            threads.run(lambda a, b, w=w: w[a:b].max(), w.size, w.size)  # type: ignore[misc]

    return read


def copier(source: Array, target: Array) -> Callable[[], None]:
    """A call that copies one array to another."""
    s, t = _words(source), _words(target)
    return lambda: threads.run(lambda a, b: np.copyto(t[a:b], s[a:b]), s.size, s.size)


def _words(x: Array) -> Array:
    """The memory of `x`, whatever its dtype, as floats of 32 bits (an odd last element is left out)."""
    raw = x.reshape(-1).view(np.uint8)
    return raw[: raw.size // 4 * 4].view(np.float32)
