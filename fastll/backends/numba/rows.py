"""Kernels over rows whose class axis is the faster one in memory: one row at a time, block by block.

The second pass over a row, where there is one, finds the row in the second-level cache.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit

from fastll.backends.numba.blocks import (
    BLOCK,
    address_of,
    cap_block,
    deliver,
    exp_block,
    fetch,
    fill_block,
    fold_block,
    fold_weighted_block,
    linear_block,
    log_block,
    multiply_block,
    release,
    size_of,
    start_of,
    subtract_block,
    target_block,
    target_of,
)
from fastll.backends.numba.cache import cached
from fastll.backends.numba.maths import cast
from fastll.backends.numba.state import (
    finish,
    log_sum,
    reference,
    settle,
    times,
    weighted_log_sum,
)
from fastll.backends.numba.vector import INLINE, read, write

KERNEL = {"nogil": True, "error_model": "numpy"}


@njit(**INLINE)
def load_state(state, outer, inner):
    """(m, e, k) of a row and its reference; the identity where there is no state."""
    m, e, k = -np.inf, 0.0, 0.0
    if state.address != 0:
        at = start_of(state, outer, inner)
        m, e, k = read(at, 0.0), read(at + state.classes, 0.0), read(at + 2 * state.classes, 0.0)
    return m, e, k, reference(m)


@njit(**INLINE)
def store_state(state, outer, inner, m, e, k):
    at = start_of(state, outer, inner)
    write(at, m)
    write(at + state.classes, e)
    write(at + 2 * state.classes, k)


@njit(**INLINE)
def store_lse(out, sign, weighted, outer, inner, m, e, k, like):
    """The log-sum-exp of a state, and the sign of the sum where it is asked for."""
    if weighted:
        log_s, s_sign = weighted_log_sum(e, k)
        if m == -np.inf and e == e:
            log_s = -np.inf
        if sign.address == 0 and s_sign < 0.0:
            log_s = np.nan
    else:
        log_s, s_sign = log_sum(e, k), np.sign(e + k)
    if sign.address != 0:
        write(start_of(sign, outer, inner), cast(s_sign, like))
    write(start_of(out, outer, inner), cast(m + log_s, like))


@cached
@njit(**KERNEL)
def logsumexp(x, b, state, out, sign, classes, inner_size, like, start, stop):
    size = size_of(like)
    memory = np.empty(3 * BLOCK * size, np.uint8)
    buffer = address_of(memory)
    b_buffer, masked = buffer + BLOCK * size, buffer + 2 * BLOCK * size
    for row in range(start, stop):
        outer, inner = row // inner_size, row % inner_size
        m, e, k, ref = load_state(state, outer, inner)
        x_start = start_of(x, outer, inner)
        b_start = start_of(b, outer, inner)
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            v = fetch(x, x_start, j, n, buffer, like)
            if b.address == 0:
                m, e, k, ref = fold_block(v, n, m, e, k, ref, like)
            else:
                weights = fetch(b, b_start, j, n, b_buffer, like)
                m, e, k, ref = fold_weighted_block(v, weights, n, m, e, k, ref, masked, like)
        m, e, k = settle(m, e, k)
        if state.address != 0:
            store_state(state, outer, inner, m, e, k)
        if out.address != 0:
            store_lse(out, sign, b.address != 0, outer, inner, m, e, k, like)
    release(memory)


@cached
@njit(**KERNEL)
def softmax(x, state, out, log, classes, inner_size, like, start, stop):
    memory = np.empty(2 * BLOCK * size_of(like), np.uint8)
    buffer = address_of(memory)
    out_buffer = buffer + BLOCK * size_of(like)
    for row in range(start, stop):
        outer, inner = row // inner_size, row % inner_size
        m, e, k, ref = load_state(state, outer, inner)
        x_start = start_of(x, outer, inner)
        out_start = start_of(out, outer, inner)
        if state.address == 0:
            for j in range(0, classes, BLOCK):
                n = min(BLOCK, classes - j)
                v = fetch(x, x_start, j, n, buffer, like)
                m, e, k, ref = fold_block(v, n, m, e, k, ref, like)
        log_s = log_sum(e, k)
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            v = fetch(x, x_start, j, n, buffer, like)
            y = target_of(out, out_start, j, out_buffer)
            if log:
                log_block(v, n, m, log_s, y, like)
            else:
                exp_block(v, n, m, ref, 1.0 / (e + k), y, like)
            deliver(out, out_start, j, n, out_buffer, like)
    release(memory)


@njit(**INLINE)
def fetch_capped(x, start, j, n, cap, buffer, slope, like):
    """`fetch`, then the soft cap where there is one; its derivative into `slope` unless that is 0."""
    v = fetch(x, start, j, n, buffer, like)
    if cap != 0.0:
        cap_block(v, n, cap, buffer, slope, like)
        return buffer
    return v


@njit(**INLINE)
def fetch_target(t, start, w, j, n, options, classes, buffer, like):
    """Address of u = w ((1 - eps) t + eps / C) of the contract, or without t, of w eps / C."""
    keep, spread = 1.0 - options.label_smoothing, options.label_smoothing / classes
    source = 0
    if t.address != 0:
        source = fetch(t, start, j, n, buffer, like)
    weights = w + j * size_of(like) if w != 0 else 0
    if source != 0 and weights == 0 and spread == 0.0:
        return source
    target_block(source, weights, n, keep, spread, buffer, like)
    return buffer


@cached
@njit(**KERNEL)
def cross_entropy(x, t, labels, w, options, loss, lse, grad, classes, inner_size, like, start, stop):
    size = size_of(like)
    memory = np.empty(4 * BLOCK * size, np.uint8)
    buffer = address_of(memory)
    t_buffer, slope = buffer + BLOCK * size, buffer + 2 * BLOCK * size
    out_buffer = buffer + 3 * BLOCK * size
    cap, scale = options.softcap, options.scale
    sparse = labels.address != 0
    spread = not sparse or options.label_smoothing != 0.0  # whether u is anything but 0
    for row in range(start, stop):
        outer, inner = row // inner_size, row % inner_size
        x_start, t_start = start_of(x, outer, inner), start_of(t, outer, inner)
        grad_start = start_of(grad, outer, inner)
        y = read(start_of(labels, outer, inner), np.int64(0)) if sparse else np.int64(0)
        kept = not sparse or y != options.ignore_index
        m, e, k, ref = -np.inf, 0.0, 0.0, reference(-np.inf)
        distance, mass = 0.0, 0.0  # sum of u (m - x), sum of u
        if kept or lse.address != 0:
            for j in range(0, classes, BLOCK):
                n = min(BLOCK, classes - j)
                v = fetch_capped(x, x_start, j, n, cap, buffer, 0, like)
                before = m
                m, e, k, ref = fold_block(v, n, m, e, k, ref, like)
                if spread and kept:
                    u = fetch_target(t, t_start, w, j, n, options, classes, t_buffer, like)
                    added, weight = linear_block(v, u, n, m, like)
                    distance += times(mass, m - before) + added
                    mass += weight
            m, e, k = settle(m, e, k)
        log_s = log_sum(e, k)
        if lse.address != 0:
            write(start_of(lse, outer, inner), cast(m + log_s, like))
        if not kept:
            write(start_of(loss, outer, inner), cast(0.0, like))
            if grad.address != 0:
                for j in range(0, classes, BLOCK):
                    n = min(BLOCK, classes - j)
                    g = target_of(grad, grad_start, j, out_buffer)
                    fill_block(g, n, 0.0, like)
                    deliver(grad, grad_start, j, n, out_buffer, like)
            continue
        x_y, w_y, slope_y = 0.0, 1.0, 1.0
        if sparse:
            v = fetch_capped(x, x_start, y, 1, cap, buffer, slope, like)
            x_y = np.float64(read(v, like))
            slope_y = np.float64(read(slope, like)) if cap != 0.0 else 1.0
            w_y = np.float64(read(w + y * size, like)) if w != 0 else 1.0
        value, factor, g_y = finish(m, e, k, classes, sparse, x_y, w_y, distance, mass, options)
        write(start_of(loss, outer, inner), cast(value, like))
        if grad.address == 0:
            continue
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            v = fetch_capped(x, x_start, j, n, cap, buffer, slope, like)
            g = target_of(grad, grad_start, j, out_buffer)
            exp_block(v, n, m, ref, factor, g, like)
            if spread:
                u = fetch_target(t, t_start, w, j, n, options, classes, t_buffer, like)
                subtract_block(g, u, n, scale, like)
            if cap != 0.0:
                multiply_block(g, slope, n, like)
            if sparse and j <= y < j + n:
                write(g + (y - j) * size, cast(g_y * slope_y, like))
            deliver(grad, grad_start, j, n, out_buffer, like)
    release(memory)


@cached
@njit(**KERNEL)
def check_labels(labels, classes, ignore_index, weight):
    """First position of a label outside [0, classes), or -1; the summed weight of the kept ones."""
    kept = 0.0
    for i in range(labels.size):
        y = labels[i]
        if y == ignore_index:
            continue
        if y < 0 or y >= classes:
            return i, 0.0
        kept += weight[y] if weight.size else 1.0
    return -1, kept
