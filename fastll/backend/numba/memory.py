"""Arrays as kernels see them, and how elements get from there into contiguous memory and back."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from fastll.backend.numba.vector import INLINE, call, lanes_of

#: Options of every kernel.
KERNEL = {"nogil": True, "error_model": "numpy"}


@njit(**INLINE)
def address_of(memory):
    """Where an array is. Signed: an unsigned and a signed integer make a float64 in Numba."""
    return np.int64(memory.ctypes.data)


@njit(**INLINE)
def release(memory):
    """Memory that is used by its address must be named after its last use, or it is freed before."""
    memory[0] = 0


@njit(**INLINE)
def size_of(like):
    return 4 if lanes_of(like) == 32 else 8


@njit(**INLINE)
def start_of(x, outer, inner):
    """Address of the first element of a row."""
    return x.address + outer * x.outer + inner * x.inner


@njit(**INLINE)
def fetch(x, start, j, n, buffer, like):
    """Address of elements j to j + n of the row that starts at `start`: in place or in the buffer."""
    source = start + j * x.classes
    if x.read == 0:
        return source
    call(x.read, source, x.classes, buffer, size_of(like), n)
    return buffer


@njit(**INLINE)
def target_of(x, start, j, buffer):
    """Where to leave elements from j on: in place, or in the buffer for `deliver`."""
    return start + j * x.classes if x.write == 0 else buffer


@njit(**INLINE)
def deliver(x, start, j, n, buffer, like):
    """Write the buffer out, if that is where they were left."""
    if x.write != 0:
        call(x.write, buffer, size_of(like), start + j * x.classes, x.classes, n)


@njit(**INLINE)
def until_line(address, like):
    """Elements before the first cache line."""
    return (-address & 63) // size_of(like)
