"""Kernels for what is left of the rows: sums over them, their labels' weights, their running states.

All in float64: there is one number per row at most.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import calls, variants, warps
from fastll.backend.cuda.compiler import Kernel, cuda, device, kernels
from fastll.backend.cuda.primitives import integer_reader, reader, size_of, writer

THREADS = 1024
#: Numbers that a thread block adds up.
UNIT = 16 * THREADS
#: What `weigh` leaves of all labels: the sum, 1 / sum, and 1 / sum in float32.
WEIGHT_WORDS = 3
#: Bytes of shared memory: what the warps have found, twice.
SHARED = 2 * 8 * warps.WARPS

_read, _write, _write_single = reader("float64"), writer("float64"), writer("float32", np.float64)
_shared = variants.shared(np.float64)
_post, _collect, _maximum = _shared.post, _shared.collect, _shared.maximum_of_team
_joined = _shared.joined


@device
def _write_reciprocals(address, total):
    _write(address, 1.0 / total)
    _write_single(address + 8, 1.0 / total)


class AddUp(NamedTuple):
    """Formats of the numbers and of their sum."""

    values: str
    out: str


class Weigh(NamedTuple):
    """The format and the number of axes of labels, and the format of class weights."""

    labels: str
    axes: int
    weight: str | None


class Merge(NamedTuple):
    """Nothing differs."""


@kernels
def add_up(variant):
    """The kernel that adds up numbers; the last one of a tree divides."""
    read, write = reader(variant.values, np.float64), writer(variant.out, np.float64)
    size, out_size = size_of(variant.values), size_of(variant.out)

    def run(call):
        memory = cuda.shared.array(0, np.float64)
        block, total = np.int64(cuda.blockIdx.x), 0.0
        first, end = block * UNIT + cuda.threadIdx.x, min(call.size, (block + 1) * UNIT)
        for i in range(first, end, THREADS):
            total += read(call.values + i * size)
        _post(total, memory, 0)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            found = _collect(memory, 0, 0)
            total = found.high + found.low
            total /= _read(call.denominator) if call.denominator != 0 else call.divisor
            write(call.out + block * out_size, total)
            if call.reciprocals != 0:
                _write_reciprocals(call.reciprocals, total)

    return Kernel(run, calls.Total, np.float64)


@kernels
def weigh(variant):
    """The kernel that adds up the weights of a thread block's labels, and finds the first bad one.

    If there is one thread block it leaves all of the words.
    """
    weighted, axes = variant.weight is not None, variant.axes
    read_label = integer_reader(variant.labels)
    read_weight = reader(variant.weight or "float64", np.float64)

    @device
    def address_of(call, i):
        address = call.labels
        for axis in range(axes - 1, 0, -1):
            rest = i // call.sizes[axis]
            address += (i - rest * call.sizes[axis]) * call.steps[axis]
            i = rest
        return address + i * call.steps[0]

    def run(call):
        memory = cuda.shared.array(0, np.float64)
        block, total, first_bad = np.int64(cuda.blockIdx.x), 0.0, -np.inf
        first, end = block * UNIT + cuda.threadIdx.x, min(call.size, (block + 1) * UNIT)
        for i in range(first, end, THREADS):
            label = read_label(address_of(call, i))
            if label != call.ignore_index:
                if 0 <= label < call.classes:
                    at = call.weight.address + label * call.weight.step
                    total += read_weight(at) if weighted else 1.0
                elif call.bad != 0:
                    first_bad = max(first_bad, -np.float64(i))
        if call.bad != 0:
            first_bad = _maximum(first_bad, memory, warps.WARPS)
        _post(total, memory, 0)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            found = _collect(memory, 0, 0)
            total = found.high + found.low
            _write(call.out + block * 8, total)
            if cuda.gridDim.x == 1:
                _write_reciprocals(call.out + 8, total)
            if call.bad != 0:
                _write(call.bad + block * 8, -first_bad)

    return Kernel(run, calls.Weigh, np.float64, sizes=axes, steps=axes)


@kernels
def merge(variant):
    """The kernel that adds one running state (rows, 3) to another; without the other, the identity."""

    @device
    def read_state(address):
        return _read(address), _read(address + 8), _read(address + 16)

    def run(call):
        row = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if row >= call.rows:
            return
        at, m, below, at_maximum = call.state + row * 24, -np.inf, 0.0, 0.0
        if call.other != 0:
            m, below, at_maximum = _joined(read_state(at), read_state(call.other + row * 24))
        _write(at, m)
        _write(at + 8, below)
        _write(at + 16, at_maximum)

    return Kernel(run, calls.Merge, np.float64)
