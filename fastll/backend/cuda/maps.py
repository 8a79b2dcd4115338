"""Element-wise operations: a thread block takes `UNIT` elements of a row, in vectors where possible."""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import calls, variants, warps
from fastll.backend.cuda.compiler import Kernel, cuda, device, kernels
from fastll.backend.cuda.maths import Sum
from fastll.backend.cuda.primitives import (
    compute_type,
    fma,
    lanes_of,
    reader,
    size_of,
    value_format,
    vector_reader,
    vector_writer,
    writer,
)
from fastll.formulas import ELEMENTS

THREADS = 256
#: Elements that a thread holds at a time, and how often it does.
HELD, ROUNDS = 8, 4
#: Elements of a unit, whose values add up to one number.
UNIT = THREADS * HELD * ROUNDS
#: Bytes of shared memory: what the warps have found.
SHARED = 8 * warps.WARPS


class Operand(NamedTuple):
    """How an operand is stored."""

    format: str
    vectors: bool  # whether it is read and written by vectors, as the first input is


class Variant(NamedTuple):
    """What a kernel is made for."""

    operation: str
    inputs: tuple[Operand, ...]
    weight: Operand | None = None
    value: Operand | None = None
    partial: bool = False
    slope: Operand | None = None
    modern: bool = False  # compute capability 8 or more


#: The numbers of element i that the formula takes, of which a thread holds HELD of each input.
_TAKE = {
    1: device(lambda held, i: (held[i],)),
    2: device(lambda held, i: (held[i], held[HELD + i])),
    3: device(lambda held, i: (held[i], held[HELD + i], held[2 * HELD + i])),
    4: device(lambda held, i: (held[i], held[HELD + i], held[2 * HELD + i], held[3 * HELD + i])),
}


def _loader(operand, lanes, real, at, pick):
    """Function (call, outer, first, held): elements of the operand `pick` from a call to held[at:]."""
    read, size = reader(operand.format, real), size_of(operand.format)
    fetch = vector_reader(operand.format, 0.0) if operand.vectors else None

    @device
    def load(call, outer, first, held):
        source = pick(call)
        step = source.inner if fetch is None else size
        base, left = source.address + outer * source.outer + first * step, call.length - first
        for q in range(HELD // lanes):
            start = base + q * (THREADS * lanes) * step
            if fetch is None:
                for i in range(lanes):
                    held[at + q * lanes + i] = read(start + i * step) if i < left else real(0)
            else:
                fetch(held, at + q * lanes, start, left >= lanes)
                if left < lanes:
                    for i in range(lanes):
                        if i < left:
                            held[at + q * lanes + i] = read(start + i * step)
            left -= THREADS * lanes

    return load


def _storer(operand, lanes, real, modern, pick):
    """Function (call, outer, first, values) that stores elements in the operand `pick` of a call."""
    if operand is None:
        return device(lambda call, outer, first, values: None)
    write, size = writer(operand.format, real), size_of(operand.format)
    deliver = vector_writer(operand.format, modern) if operand.vectors else None

    @device
    def store(call, outer, first, values):
        target = pick(call)
        step = target.inner if deliver is None else size
        base, left = target.address + outer * target.outer + first * step, call.length - first
        for q in range(HELD // lanes):
            start = base + q * (THREADS * lanes) * step
            if deliver is not None and left >= lanes:
                deliver(start, values, q * lanes)
            else:
                for i in range(lanes):
                    if i < left:
                        write(start + i * step, values[q * lanes + i])
            left -= THREADS * lanes

    return store


def _all(steps):
    """One function that does several steps."""
    if len(steps) == 1:
        return steps[0]
    first, others = steps[0], _all(steps[1:])

    @device
    def both(call, outer, at, held):
        first(call, outer, at, held)
        others(call, outer, at, held)

    return both


def _evaluator(f, real, row, count):
    """Function (call, held, i) of (value, e, slope), as `Element.log1p` says, for any formula."""
    formula, take, zero = getattr(f, row.formula.__name__), _TAKE[count], real(0)
    if row.log1p:
        return device(lambda call, held, i: formula(*(take(held, i) + call.parameters)))
    if row.slope:

        @device
        def with_slope(call, held, i):
            value, slope = formula(*(take(held, i) + call.parameters))
            return value, zero, slope

        return with_slope
    return device(lambda call, held, i: (formula(*(take(held, i) + call.parameters)), zero, zero))


@kernels
def kernel(variant):
    """The kernel of a map.

    Where only sums of values are asked for, the sum of a thread's log1p(e) is the log1p of one number,
    q = prod (1 + e) - 1: at most 2**32, and it keeps all its digits where every e is tiny.
    """
    x, row, count = variant.inputs[0], ELEMENTS[variant.operation], len(variant.inputs)
    real, lanes = compute_type(x.format), lanes_of(x.format) if x.vectors else 4
    f = variants.shared(real, size_of(x.format) == 2, variant.modern)
    zero, log1p, log1p_sum, post, collect = real(0), f.log1p, f.log1p_sum, f.post, f.collect
    weighted, valued, summed = variant.weight is not None, variant.value is not None, variant.partial
    together = row.log1p and summed and not valued and not weighted
    log1p_left = row.log1p and not together
    evaluate, write_sum = _evaluator(f, real, row, count), writer(value_format(real))
    loads = [
        _loader(operand, lanes, real, k * HELD, device(lambda call, k=k: call.inputs[k]))
        for k, operand in enumerate(variant.inputs)
    ]
    if weighted:
        pick = device(lambda call: call.weight)
        loads.append(_loader(variant.weight, lanes, real, count * HELD, pick))
    load = _all(loads)
    store_value = _storer(variant.value, lanes, real, variant.modern, device(lambda call: call.value))
    store_slope = _storer(variant.slope, lanes, real, variant.modern, device(lambda call: call.slope))
    size = HELD * len(loads)

    def run(call):
        memory = cuda.shared.array(0, real)
        held = cuda.local.array(size, real)
        values = cuda.local.array(HELD, real)
        slopes = cuda.local.array(HELD, real)
        unit = np.int64(cuda.blockIdx.x)
        outer = np.int64(np.uint32(unit) // np.uint32(call.units))
        part = unit - outer * call.units
        first = part * UNIT + cuda.threadIdx.x * lanes
        total, product = zero, zero
        for _ in range(ROUNDS):
            load(call, outer, first, held)
            for i in range(HELD):
                inside = first + (i // lanes) * (THREADS * lanes) + i % lanes < call.length
                value, e, slope = evaluate(call, held, i)
                if log1p_left:
                    value += log1p(e)
                if weighted:
                    value, slope = value * held[count * HELD + i], slope * held[count * HELD + i]
                if summed and inside:
                    total += value
                    if together:
                        product += fma(product, e, e)
                values[i], slopes[i] = value, slope * call.scale
            store_value(call, outer, first, values)
            store_slope(call, outer, first, slopes)
            first += THREADS * HELD
        if summed:
            if together:
                total += log1p_sum(Sum(product, zero))
            post(total, memory, 0)
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                found = collect(memory, 0, 0)
                at = call.partial.address + outer * call.partial.outer + part * call.partial.inner
                write_sum(at, found.high + found.low)

    return Kernel(run, calls.Map, real, inputs=count, parameters=row.parameters)
