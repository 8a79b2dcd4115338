"""Kernels over elements: one unit is `CHUNK` elements of one outer row."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from fastll.backend.numba.blocks import (
    BLOCK,
    address_of,
    deliver,
    fetch,
    release,
    size_of,
    start_of,
    target_of,
    until_line,
)
from fastll.backend.numba.cache import cached
from fastll.backend.numba.maths import (
    bce,
    bce_parts,
    cast,
    constants,
    log1p_sum,
    log_sigmoid,
)
from fastll.backend.numba.maths import sigmoid as logistic
from fastll.backend.numba.rows import KERNEL
from fastll.backend.numba.vector import (
    INLINE,
    fma,
    lanes_of,
    load_ahead,
    splat,
    store,
    stream,
    stream_fence,
    total,
    widen_lower,
    widen_upper,
    write,
)
from fastll.contract import CHUNK


@njit(**INLINE)
def sigmoid_block(v, n, log, out, streamed, like):
    size = size_of(like)
    zero = splat(constants(like).zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, zero)
        x = log_sigmoid(x) if log else logistic(x)
        if streamed and n - j >= lanes_of(like):
            stream(out + j * size, x)
        else:
            store(out + j * size, n - j, x)


@cached
@njit(**KERNEL)
def sigmoid(x, out, log, length, units, like, start, stop):
    memory = np.empty(2 * BLOCK * size_of(like), np.uint8)
    buffer = address_of(memory)
    out_buffer = buffer + BLOCK * size_of(like)
    for unit in range(start, stop):
        outer, first = unit // units, unit % units * CHUNK
        x_start, out_start = start_of(x, outer, 0), start_of(out, outer, 0)
        end = min(length, first + CHUNK)
        n = until_line(out_start + first * out.classes, like) if out.streamed else 0
        while first < end:
            n = min(n or BLOCK, end - first)
            v = fetch(x, x_start, first, n, buffer, like)
            y = target_of(out, out_start, first, out_buffer)
            sigmoid_block(v, n, log, y, out.streamed, like)
            deliver(out, out_start, first, n, out_buffer, like)
            first += n
            n = 0
    if out.streamed:
        stream_fence()
    release(memory)


@njit(**INLINE)
def bce_block(v, t, w, p, n, scale, loss, grad, like):
    """Losses and gradients where their address is not 0; the sum of the losses.

    Where that is all, and nothing is weighted, the sum of log1p(e) is the log1p of one number a lane,
    q = prod (1 + e) - 1: at most 2**64 in float32 and 2**128 in float64, and it keeps all its digits
    where every e is tiny.
    """
    size = size_of(like)
    c = constants(like)
    lowest, zero, one = splat(-c.infinity), splat(c.zero), splat(c.one)
    scales = splat(cast(scale, like))
    together = w == 0 and p == 0 and loss == 0
    sums = zero
    q = zero
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)  # with a target of 0, lanes beyond the end are 0
        target = load_ahead(t + j * size, n - j, zero)
        if together:
            value, e, slope = bce_parts(x, target, one - target)
            q = q + fma(q, e, e)
        else:
            positive = target
            if p != 0:
                positive = target * load_ahead(p + j * size, n - j, one)
            value, slope = bce(x, positive, one - target)
            if w != 0:
                weight = load_ahead(w + j * size, n - j, zero)
                value, slope = value * weight, slope * weight
        if loss != 0:
            store(loss + j * size, n - j, value)
        if grad != 0:
            store(grad + j * size, n - j, slope * scales)
        sums = sums + value
    return total(sums) + total(log1p_sum(widen_lower(q)) + log1p_sum(widen_upper(q)))


@cached
@njit(**KERNEL)
def binary_cross_entropy(x, t, w, p, scale, loss, partial, grad, length, units, like, start, stop):
    size = size_of(like)
    memory = np.empty(6 * BLOCK * size, np.uint8)
    buffer = address_of(memory)
    t_buffer, w_buffer = buffer + BLOCK * size, buffer + 2 * BLOCK * size
    p_buffer, loss_buffer = buffer + 3 * BLOCK * size, buffer + 4 * BLOCK * size
    grad_buffer = buffer + 5 * BLOCK * size
    for unit in range(start, stop):
        outer, first = unit // units, unit % units * CHUNK
        end = min(length, first + CHUNK)
        result = 0.0
        for j in range(first, end, BLOCK):
            n = min(BLOCK, end - j)
            v = fetch(x, start_of(x, outer, 0), j, n, buffer, like)
            target = fetch(t, start_of(t, outer, 0), j, n, t_buffer, like)
            weight, pos_weight, values, slopes = 0, 0, 0, 0
            if w.address != 0:
                weight = fetch(w, start_of(w, outer, 0), j, n, w_buffer, like)
            if p.address != 0:
                pos_weight = fetch(p, start_of(p, outer, 0), j, n, p_buffer, like)
            if loss.address != 0:
                values = target_of(loss, start_of(loss, outer, 0), j, loss_buffer)
            if grad.address != 0:
                slopes = target_of(grad, start_of(grad, outer, 0), j, grad_buffer)
            result += bce_block(v, target, weight, pos_weight, n, scale, values, slopes, like)
            if values != 0:
                deliver(loss, start_of(loss, outer, 0), j, n, loss_buffer, like)
            if slopes != 0:
                deliver(grad, start_of(grad, outer, 0), j, n, grad_buffer, like)
        if partial.address != 0:
            write(start_of(partial, outer, 0) + unit % units * partial.classes, result)
    release(memory)
