"""Element-wise operations: a thread block takes `UNIT` elements of a row, in vectors where possible."""

# mypy: ignore-errors

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import calls, primitives, states
from fastll.backend.cuda.compiler import Kernel, cuda, device, kernels
from fastll.backend.cuda.maths import Sum
from fastll.formulas import element, formula_of

THREADS = 256
#: Elements that a thread holds at a time, and how often it does.
HELD, ROUNDS = 8, 4
#: Elements of a unit, whose values add up to one number.
UNIT = THREADS * HELD * ROUNDS
#: Bytes of shared memory: what the warps have found.
SHARED = 8 * states.WARPS


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


def _loader(operand, real, lanes):
    """Function (held, at, address, step, left): `lanes` elements into held[at:], 0 from `left` on."""
    read = primitives.reader(operand.format, real)
    fetch = primitives.vector_reader(operand.format) if operand.vectors else None

    @device
    def load(held, at, address, step, left):
        if fetch is not None:
            fetch(held, at, address, left >= lanes)
        if fetch is None or left < lanes:
            for i in range(lanes):
                if i < left:
                    held[at + i] = read(address + i * step)
                elif fetch is None:
                    held[at + i] = real(0)

    return load


def _storer(operand, real, lanes, modern):
    """Function (held, at, address, step, left): the other way round."""
    write = primitives.writer(operand.format, real, modern)
    deliver = primitives.vector_writer(operand.format, modern) if operand.vectors else None

    @device
    def store(held, at, address, step, left):
        if deliver is not None and left >= lanes:
            deliver(address, held, at)
        else:
            for i in range(lanes):
                if i < left:
                    write(address + i * step, held[at + i])

    return store


def _mover(operand, lanes, at, pick, move):
    """Function (call, outer, first, held): HELD elements of the operand `pick` of a call."""
    vectors, size = operand.vectors, primitives.size_of(operand.format)

    @device
    def mover(call, outer, first, held):
        place = pick(call)
        step = size if vectors else place.inner
        address, left = place.address + outer * place.outer + first * step, call.length - first
        for q in range(HELD // lanes):
            move(held, at + q * lanes, address + q * (THREADS * lanes) * step, step, left)
            left -= THREADS * lanes

    return mover


def _both(first, second):
    @device
    def both(call, outer, at, held):
        first(call, outer, at, held)
        second(call, outer, at, held)

    return both


def _movers(variant, real, lanes):
    """Functions (call, outer, first, held) that load the inputs and the weight of a call, one after the
    other, and store its values and slopes from what follows these."""
    count = len(variant.inputs)
    operands = [(a, lambda call, k=k: call.inputs[k]) for k, a in enumerate(variant.inputs)]
    operands.append((variant.weight, lambda call: call.weight))
    operands.append((variant.value, lambda call: call.value))
    operands.append((variant.slope, lambda call: call.slope))
    loads, stores = [], [device(lambda call, outer, first, held: None)]
    for k, (operand, pick) in enumerate(operands):
        if operand is not None and k <= count:
            move = _loader(operand, real, lanes)
            loads.append(_mover(operand, lanes, k * HELD, device(pick), move))
        elif operand is not None:
            move = _storer(operand, real, lanes, variant.modern)
            stores.append(_mover(operand, lanes, k * HELD, device(pick), move))
    return reduce(_both, loads), reduce(_both, stores)


def _inputs(count):
    """Function (held, i): the numbers of element i, of which a thread holds HELD of each input."""
    if count == 1:
        return device(lambda held, i: (held[i],))
    others, at = _inputs(count - 1), (count - 1) * HELD
    return device(lambda held, i: (*others(held, i), held[at + i]))


def _evaluator(f, real, row, count):
    """Function (call, held, i) of (value, e, slope), as `Element.log1p` says, for any formula."""
    formula, inputs, zero = formula_of(row, vars(f), device), _inputs(count), real(0)
    has_log1p, has_slope = row.log1p, row.slope

    @device
    def evaluate(call, held, i):
        found = formula(*(inputs(held, i) + call.parameters))
        if has_log1p:
            return found
        if has_slope:
            return found[0], zero, found[1]
        return found, zero, zero

    return evaluate


@kernels
def kernel(variant):
    """The kernel of a map.

    Where only sums of values are asked for, the sum of a thread's log1p(e) is the log1p of one number,
    q = prod (1 + e) - 1: at most 2**32, and it keeps all its digits where every e is tiny.
    """
    x, row, count = variant.inputs[0], element(variant.operation), len(variant.inputs)
    real, lanes = primitives.compute_type(x.format), primitives.lanes_of(x.format) if x.vectors else 4
    f = states.shared(real, primitives.is_half(x.format), variant.modern)
    zero, log1p, log1p_sum, sum_of_block = real(0), f.log1p_fraction, f.log1p_sum, f.sum_of_block
    weighted, summed = variant.weight is not None, variant.partial
    together = row.log1p and summed and variant.value is None and not weighted
    log1p_left = row.log1p and not together
    evaluate, write_sum = _evaluator(f, real, row, count), primitives.writer(real.__name__)
    load, store = _movers(variant, real, lanes)
    weights, values, slopes, size = ((count + i) * HELD for i in range(4))

    def run(call):
        memory = cuda.shared.array(0, real)
        held = cuda.local.array(size, real)
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
                    value, slope = value * held[weights + i], slope * held[weights + i]
                if summed and inside:
                    total += value
                    if together:
                        product += primitives.fma(product, e, e)
                held[values + i], held[slopes + i] = value, slope * call.scale
            store(call, outer, first, held)
            first += THREADS * HELD
        if summed:
            if together:
                total += log1p_sum(Sum(product, zero))
            total = sum_of_block(total, memory)
            if cuda.threadIdx.x == 0:
                at = call.partial.address + outer * call.partial.outer + part * call.partial.inner
                write_sum(at, total)

    approximate = primitives.is_half(x.format)
    lengths = {"inputs": count, "parameters": row.parameters}
    return Kernel(run, calls.Map, real, approximate=approximate, **lengths)
