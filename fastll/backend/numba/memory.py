"""Arrays as kernels see them, and how elements get from there into contiguous memory and back."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils

from fastll.backend.numba.vector import call, emitted, inline, size_of

#: Options of every kernel.
KERNEL = {"nogil": True, "error_model": "numpy"}


@inline
def address_of(memory):
    """Where an array is. Signed: an unsigned and a signed integer make a float64 in Numba."""
    return np.int64(memory.ctypes.data)


@emitted(lambda start, sizes: types.UniTuple(types.int64, len(sizes)))
def _cut(builder, start, sizes):
    """Where pieces of memory of these sizes begin."""
    starts = [start]
    for size in cgutils.unpack_tuple(builder, sizes):
        starts.append(builder.add(starts[-1], size))
    return cgutils.pack_array(builder, starts[:-1])


@inline
def allocate(sizes):
    """Uninitialised memory on lines of the cache: the array that holds it, and where pieces begin."""
    owner = np.empty(_cut(0, (*sizes, 0))[-1] + 64, np.uint8)
    return owner, _cut((address_of(owner) + 63) // 64 * 64, sizes)


@inline
def release(memory):
    """Memory that is used by its address must be named after its last use, or it is freed before."""
    memory[0] = 0


@inline
def start_of(x, outer, inner=0):
    """Address of the first element of a row."""
    return x.address + outer * x.outer + inner * x.inner


@inline
def fetch(x, start, j, n, buffer, like):
    """Address of elements j to j + n of the row that starts at `start`: in place or in the buffer."""
    source = start + j * x.classes
    if x.read == 0:
        return source
    call(x.read, source, x.classes, buffer, size_of(like), n)
    return buffer


@inline
def target_of(x, start, j, buffer):
    """Where to leave elements from j on: in place, or in the buffer for `deliver`."""
    return start + j * x.classes if x.write == 0 else buffer


@inline
def deliver(x, start, j, n, buffer, like):
    """Write the buffer out, if that is where they were left."""
    if x.write != 0:
        call(x.write, buffer, size_of(like), start + j * x.classes, x.classes, n)


@inline
def until_line(address, like):
    """Elements before the first cache line."""
    return (-address & 63) // size_of(like)
