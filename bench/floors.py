"""The limit set by memory: the time to read arrays once and to copy one, on all threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import threads

Array = NDArray[Any]

LINE = 64


def reader(*arrays: Array) -> Callable[[], None]:
    """Make a call that reads each array once, by a maximum; under 512 bytes per part are skipped."""
    maximum = _maximum()

    def read() -> None:
        for x in arrays:
            _share(x.nbytes, lambda a, b, at=x.ctypes.data: maximum(at + a, at + b))  # type: ignore[misc]

    return read


def copier(source: Array, target: Array) -> Callable[[], None]:
    """Make a call that copies one array to another.

    It uses the C library's memcpy on parts as large as possible, which then bypasses the caches.
    """
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    s, t = source.ctypes.data, target.ctypes.data
    return lambda: _share(source.nbytes, lambda a, b: memcpy(t + a, s + a, b - a))


def _share(size: int, call: Callable[[int, int], object]) -> None:
    """Split `size` bytes into one part per thread; call each thread with the ends of its part."""
    parts = threads.get_num_threads()

    def kernel(start: int, stop: int) -> None:
        a, b = (size * end // parts // LINE * LINE if end < parts else size for end in (start, stop))
        call(a, b)

    threads.run(kernel, parts, size)


@cache
def _maximum() -> Callable[[int, int], float]:
    """A function that returns the maximum of the float32 between two addresses, at memory speed."""
    from numba import njit

    from fastll.backend.numba.vector import largest, load_ahead, maximum, splat

    @njit(nogil=True)
    def kernel(start: int, stop: int) -> float:
        a = b = c = d = splat(np.float32(-np.inf))
        for at in range(start, stop - 511, 512):
            a = maximum(load_ahead(at, 32, a), a)
            b = maximum(load_ahead(at + 128, 32, b), b)
            c = maximum(load_ahead(at + 256, 32, c), c)
            d = maximum(load_ahead(at + 384, 32, d), d)
        return largest(maximum(maximum(a, b), maximum(c, d)))

    return kernel  # type: ignore[no-any-return]
