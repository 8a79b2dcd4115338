"""The kernels of element-wise operations: one driver, compiled for each of them."""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from numba import njit

from fastll.backend.numba import memory, vector
from fastll.backend.numba.cache import cached
from fastll.backend.numba.calls import Layout, Number, Operand
from fastll.backend.numba.maths import formulas, log1p_sum, zeros
from fastll.backend.numba.memory import allocate, deliver, fetch, start_of, target_of, until_line
from fastll.backend.numba.vector import inline, inlined, lanes_of, load_ahead, size_of, store
from fastll.contract import BLOCK, CHUNK
from fastll.formulas import element, formula_of


class Call(NamedTuple):
    """A map as its kernel sees it."""

    inputs: tuple[Operand, ...]
    parameters: tuple[Number, ...]
    weight: Operand
    value: Operand
    partial: Operand
    slope: Operand
    scale: Number
    length: int  # of an outer row
    units: int  # in it
    like: Number  # 0: says what the compute dtype is


def _for_each(function, count):
    """A function that returns (function(0, *arguments), ..., function(count - 1, *arguments))."""
    name, at = f"{function.__qualname__}_{count}", count - 1
    if count == 0:
        return inlined(lambda *arguments: (), name)
    before = _for_each(function, at)
    return inlined(lambda *arguments: (*before(*arguments), function(at, *arguments)), name)


@inline
def fetch_input(i, inputs, outer, j, n, buffer, like):
    x = inputs[i]
    at, buffer = start_of(x, outer), buffer + i * BLOCK * size_of(like)
    return fetch(x, at, j, n, buffer, like)


@inline
def load_input(i, inputs, j, n, pad):
    return load_ahead(inputs[i] + j * size_of(pad), n - j, pad)


def _block(operation):
    """A function that maps a block, by addresses, and returns the sum of the values.

    Where nothing but that is asked for, the sum of log1p(e) is the log1p of one number per lane,
    q = prod (1 + e) - 1: at most 2**64 in float32 and 2**128 in float64, and it keeps all its digits
    where every e is tiny.
    """
    row, log1p = element(operation), formulas.log1p_fraction
    formula, has_slope, has_log1p = formula_of(row, vars(formulas), inline), row.slope, row.log1p
    load_inputs = _for_each(load_input, row.inputs)

    def map_block(call, n, inputs, weights, values, slopes):
        size, lanes = size_of(call.like), lanes_of(call.like)
        zero = zeros(call.like)
        together = has_log1p and weights == 0 and values == 0
        sums = q = e = slope = zero
        for j in range(0, n, lanes):
            found = formula(*(load_inputs(inputs, j, n, zero) + call.parameters))
            if has_log1p:
                value, e, slope = found
            elif has_slope:
                value, slope = found
            else:
                value = found
            if has_log1p and not together:
                value = value + log1p(e)
            if weights != 0:
                weight = load_ahead(weights + j * size, n - j, zero)
                value, slope = value * weight, slope * weight
            if values != 0:
                if call.value.streamed and n - j >= lanes:
                    vector.stream(values + j * size, value)
                else:
                    store(values + j * size, n - j, value)
            if slopes != 0:
                store(slopes + j * size, n - j, slope * call.scale)
            if call.partial.address != 0:
                if n - j < lanes:
                    value, e = vector.first_lanes(value, n - j), vector.first_lanes(e, n - j)
                sums = sums + value
                if together:
                    q = q + vector.fma(q, e, e)
        result = vector.total(sums)
        if has_log1p:
            result += vector.total(log1p_sum(vector.widen(q)))
        return result

    return inlined(map_block, f"{operation}_block")


@inline
def target(x, outer, j, buffer):
    """`target_of`; 0 where there is no such operand."""
    return target_of(x, start_of(x, outer), j, buffer) if x.address != 0 else 0


@cache
def kernel(operation):
    """The kernel of an operation, and the layout of a `Call` to it.

    One unit is `CHUNK` elements of one outer row.
    """
    inputs = element(operation).inputs
    layout = Layout(Call, inputs=inputs, parameters=element(operation).parameters)
    unpack = layout.unpack
    map_block, fetch_inputs = _block(operation), _for_each(fetch_input, inputs)

    def run(words, like, start, stop):
        call = unpack(memory.address_of(words), like)
        streamed = call.value.streamed
        weight, value, slope, partial = call.weight, call.value, call.slope, call.partial
        block = BLOCK * size_of(like)
        owner, (buffers, weights, values, slopes) = allocate((inputs * block, block, block, block))
        for unit in range(start, stop):
            outer, j = unit // call.units, unit % call.units * CHUNK
            end = min(call.length, j + CHUNK)
            result = 0.0
            # non-temporal stores are aligned
            n = until_line(start_of(value, outer) + j * value.classes, like) if streamed else 0
            while j < end:
                n = min(n or BLOCK, end - j)
                factors = 0
                if weight.address != 0:
                    factors = fetch(weight, start_of(weight, outer), j, n, weights, like)
                inputs_at = fetch_inputs(call.inputs, outer, j, n, buffers, like)
                to, slopes_to = target(value, outer, j, values), target(slope, outer, j, slopes)
                result += map_block(call, n, inputs_at, factors, to, slopes_to)
                if value.address != 0:
                    deliver(value, start_of(value, outer), j, n, values, like)
                if slope.address != 0:
                    deliver(slope, start_of(slope, outer), j, n, slopes, like)
                j += n
                n = 0
            if partial.address != 0:
                vector.write(start_of(partial, outer) + unit % call.units * partial.classes, result)
        if streamed:
            vector.stream_fence()
        memory.release(owner)

    run.__qualname__ = f"maps.{operation}"
    return cached(njit(**memory.KERNEL)(run)), layout
