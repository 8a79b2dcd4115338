"""Kernels for what is left of the rows: sums over them, their labels' weights, their running states.

All in float64: there is one number a row at most.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from fastll.backend.cuda import state, team
from fastll.backend.cuda.compiler import WORD, cuda, variants
from fastll.backend.cuda.primitives import integer_reader, numba_type, reader, writer

THREADS = 1024
#: Numbers that a block adds up.
UNIT = 16 * THREADS
#: What `weigh` leaves of all labels: the sum, 1 / sum, and 1 / sum in float32.
WEIGHT_WORDS = 3

_read, _write = reader("float64"), writer("float64")
_write_single = writer("float32")


@variants
def add_up(name, written):
    """The kernel that adds up numbers of one format; divided if it is the last of a tree."""
    read, write = reader(name, np.float64), writer(written)
    result = np.float32 if written == "float32" else np.float64
    group = team.of(np.float64)
    post, collect = group.post, group.collect

    def kernel(count, values, out, denominator, reciprocals, divisor):
        memory = cuda.shared.array(0, np.float64)
        block = np.int64(cuda.blockIdx.x)
        total = 0.0
        for i in range(block * UNIT + cuda.threadIdx.x, min(count, (block + 1) * UNIT), THREADS):
            total += read(values + i * values_size)
        post(total, memory, 0)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            total, low = collect(memory, 0, 0)
            total += low
            total /= _read(denominator) if denominator != 0 else divisor
            write(out + block * out_size, result(total))
            if reciprocals != 0:
                _write(reciprocals, 1.0 / total)
                _write_single(reciprocals + 8, np.float32(1.0 / total))

    values_size = 4 if name == "float32" else 8
    out_size = 4 if written == "float32" else 8
    kernel.signature = (WORD,) * 5 + (numba_type(np.float64),)
    return kernel


@variants
def weigh(labels, weights):
    """The kernel that adds up the weights of a block's labels, and finds the first that is none.

    A block alone leaves what becomes of the sum as well: all of the words.

    `labels` is the format of labels, `weights` that of class weights or None.
    """
    read_label = integer_reader(labels)
    read_weight = reader(weights or "float64", np.float64)
    group = team.of(np.float64)
    post, collect, maximum = group.post, group.collect, group.maximum

    def kernel(
        count,
        length,
        source,
        outer_step,
        step,
        classes,
        ignore_index,
        weight,
        weight_step,
        out,
        bad,
    ):
        memory = cuda.shared.array(0, np.float64)
        block = np.int64(cuda.blockIdx.x)
        total, first_bad = 0.0, -np.inf
        for i in range(block * UNIT + cuda.threadIdx.x, min(count, (block + 1) * UNIT), THREADS):
            label = read_label(source + i // length * outer_step + i % length * step)
            if label != ignore_index:
                if 0 <= label < classes:
                    total += read_weight(weight + label * weight_step) if weights is not None else 1.0
                elif bad != 0:
                    first_bad = max(first_bad, -np.float64(i))
        if bad != 0:
            first_bad = maximum(first_bad, memory, team.WARPS)
        post(total, memory, 0)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            total, low = collect(memory, 0, 0)
            total += low
            _write(out + block * 8, total)
            if cuda.gridDim.x == 1:
                _write(out + 8, 1.0 / total)
                _write_single(out + 16, np.float32(1.0 / total))
            if bad != 0:
                _write(bad + block * 8, -first_bad)

    kernel.signature = (WORD,) * 11
    return kernel


@variants
def merge():
    """The kernel that adds one running state (rows, 3) to another; alone (other = 0), the identity."""
    joined = state.of(np.float64).joined

    def kernel(rows, mine, other):
        row = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if row >= rows:
            return
        at = mine + row * 24
        m, e, low, k = -np.inf, 0.0, 0.0, 0.0
        if other != 0:
            source = other + row * 24
            m, e, low, k = joined(
                _read(at),
                _read(at + 8),
                0.0,
                _read(at + 16),
                _read(source),
                _read(source + 8),
                0.0,
                _read(source + 16),
            )
        _write(at, m)
        _write(at + 8, e + low)
        _write(at + 16, k)

    kernel.signature = (WORD,) * 3
    return kernel
