"""Kernels for what is left of the rows: sums over them, their labels' weights, their running states.

All in float64: there is one number per row at most.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np

from fastll.backend.cuda import calls, states
from fastll.backend.cuda.compiler import Kernel, cuda, device, kernels
from fastll.backend.cuda.maths import Sum
from fastll.backend.cuda.primitives import integer_reader, reader, size_of, writer
from fastll.formulas import constants

THREADS = 1024
#: Numbers that a thread block adds up.
UNIT = 16 * THREADS
#: Threads that merge the states of the parts of a row.
PART_THREADS = 256
#: What `weigh` leaves of all rows: the sum, 1 / sum, and 1 / sum in float32.
WEIGHT_WORDS = 3
#: Bytes of shared memory: what the warps have found, twice.
SHARED = 2 * 8 * states.WARPS

_read, _write, _write_single = reader("float64"), writer("float64"), writer("float32", np.float64)
_shared = states.shared(np.float64)
_sum, _maximum, _joined = _shared.sum_of_block, _shared.maximum_of_team, _shared.joined
_plus, _exp_minus_scaled = _shared.plus, _shared.exp_minus_scaled
_UNSHIFT = 2.0**-constants.SHIFT


@device
def _reciprocal(total):
    """NaN of 0: a mean over nothing."""
    return 1.0 / total if total != 0.0 else np.nan


@device
def _write_reciprocals(address, total):
    _write(address, _reciprocal(total))
    _write_single(address + 8, _reciprocal(total))


@kernels
def add_up(values, out):
    """The kernel that adds up numbers of a format; the last of a tree divides."""
    read, write = reader(values, np.float64), writer(out, np.float64)
    size, out_size = size_of(values), size_of(out)

    def run(call):
        memory = cuda.shared.array(0, np.float64)
        block, total = np.int64(cuda.blockIdx.x), 0.0
        first, end = block * UNIT + cuda.threadIdx.x, min(call.size, (block + 1) * UNIT)
        for i in range(first, end, THREADS):
            total += read(call.values + i * size)
        total = _sum(total, memory)
        if cuda.threadIdx.x == 0:
            if cuda.gridDim.x == 1:
                divisor = _read(call.denominator) if call.denominator != 0 else call.divisor
                total = total / divisor if divisor != 0.0 else np.nan
                if call.exponential != 0:
                    total = (1.0 / _exp_minus_scaled(-total, 0.0)) / _UNSHIFT
                if call.reciprocals != 0:
                    _write_reciprocals(call.reciprocals, total)
            write(call.out + block * out_size, total)

    return Kernel(run, calls.Total, np.float64)


@kernels
def weigh(labels, axes, weight, sample, ignoring):
    """The kernel that adds up the weights of a thread block's rows, and finds the first bad label.

    A row's weight is the product of that of its label and its sample weight. If there is one thread
    block it leaves all of the words.
    """
    sparse, weighted, sampled = labels is not None, weight is not None, sample is not None
    read_label = integer_reader(labels or "int64")
    read_weight = reader(weight or "float64", np.float64)
    read_sample = reader(sample or "float64", np.float64)

    @device
    def offset_of(sizes, steps, i):
        offset = 0
        for axis in range(axes - 1, 0, -1):
            rest = i // sizes[axis]
            offset += (i - rest * sizes[axis]) * steps[axis]
            i = rest
        return offset + i * steps[0]

    @device
    def weight_of(call, i, label):
        total = 1.0
        if weighted:
            total = read_weight(call.weight.address + label * call.weight.step)
        if sampled:
            total *= read_sample(call.sample + offset_of(call.sizes, call.sample_steps, i))
        return total

    def run(call):
        memory = cuda.shared.array(0, np.float64)
        block, total, first_bad = np.int64(cuda.blockIdx.x), 0.0, -np.inf
        first, end = block * UNIT + cuda.threadIdx.x, min(call.size, (block + 1) * UNIT)
        for i in range(first, end, THREADS):
            label, bad = np.int64(0), False
            if sparse:
                label = read_label(call.labels + offset_of(call.sizes, call.label_steps, i))
                bad = label < 0 or label >= call.classes
                if ignoring and label == call.ignore_index:
                    continue
            if not bad:
                total += weight_of(call, i, label)
            elif call.bad != 0:
                first_bad = max(first_bad, -np.float64(i))
        if call.bad != 0:
            first_bad = _maximum(first_bad, memory, states.WARPS)
        total = _sum(total, memory)
        if cuda.threadIdx.x == 0:
            _write(call.out + block * 8, total)
            if cuda.gridDim.x == 1:
                _write_reciprocals(call.out + 8, total)
            if call.bad != 0:
                _write(call.bad + block * 8, -first_bad)

    return Kernel(run, calls.Weigh, np.float64, sizes=axes, label_steps=axes, sample_steps=axes)


@device
def _read_state(address):
    return _read(address), _read(address + 8), _read(address + 16)


@device
def _write_state(address, state):
    _write(address, state[0])
    _write(address + 8, state[1])
    _write(address + 16, state[2])


@kernels
def merge():
    """The kernel that adds one running state (rows, 3) to another; without the other, the identity."""

    def run(call):
        row = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if row >= call.rows:
            return
        at, m, below, at_maximum = call.state + row * 24, -np.inf, 0.0, 0.0
        if call.other != 0:
            m, below, at_maximum = _joined(_read_state(at), _read_state(call.other + row * 24))
        _write_state(at, (m, below, at_maximum))

    return Kernel(run, calls.Merge, np.float64)


@kernels
def merge_parts(lse):
    """The kernel that merges the states of the parts of a row, a thread block for each: those of a
    thread in their order, and those of the threads by halves."""
    write_lse = writer(lse, np.float64)

    def run(call):
        memory = cuda.shared.array(0, np.float64)
        row, thread, half = np.int64(cuda.blockIdx.x), cuda.threadIdx.x, np.int64(PART_THREADS)
        state = (-np.inf, 0.0, 0.0)
        for part in range(thread, call.parts, PART_THREADS):
            state = _joined(state, _read_state(call.states + (row * call.parts + part) * 24))
        while half > 1:
            memory[3 * thread], memory[3 * thread + 1], memory[3 * thread + 2] = state
            cuda.syncthreads()
            half //= 2
            if thread < half:
                at = 3 * (thread + half)
                state = _joined(state, (memory[at], memory[at + 1], memory[at + 2]))
            cuda.syncthreads()
        if thread == 0:
            m, below, at_maximum = state
            if call.merged != 0:
                _write_state(call.merged + row * 24, state)
            if call.lse != 0:
                result = m + math.log1p(below + (at_maximum - 1.0)) if m > -np.inf else m + below
                write_lse(call.lse + row * call.lse_step, result)

    return Kernel(run, calls.Parts, np.float64)


@kernels
def accumulate():
    """The kernel that adds a loss and the weight of its labels to running sums: a thread for each."""

    def run(call):
        row = np.int64(cuda.threadIdx.x)
        if row >= 2:
            return
        at, number, sums = call.sums + row * 16, call.number, Sum(0.0, 0.0)
        if call.fresh == 0:
            sums = Sum(_read(at), _read(at + 8))
        if row == 0:
            number = _read(call.loss)
        elif call.kept != 0:
            number = _read(call.kept)
        sums = _plus(sums, number)
        _write(at, sums.high)
        _write(at + 8, sums.low)

    return Kernel(run, calls.Accumulate, np.float64)
