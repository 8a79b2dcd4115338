"""Kernels over rows whose class axis is the faster one in memory: row by row, block by block.

A row is folded into its state, and then what has its shape is written. Rows go through this in groups
small enough for the second-level cache, where the first pass leaves its exponentials for the second.
Where nothing but a factor is missing from them, the second pass is part of the next group's first.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.blocks import (
    BLOCK,
    Pending,
    address_of,
    advanced,
    cap_block,
    deliver,
    exp_block,
    fetch,
    fill_block,
    fold_block,
    fold_weighted_block,
    linear_block,
    max_block,
    multiply_block,
    release,
    scale_block,
    size_of,
    start_of,
    subtract_block,
    target_block,
    target_of,
    until_line,
    write_rest,
    write_vector,
)
from fastll.backend.numba.cache import cached
from fastll.backend.numba.maths import OUT_SHIFT, SUM_SHIFT, cast, exponential, window
from fastll.backend.numba.state import (
    DISTANCE,
    END,
    FACTOR,
    G_Y,
    KEPT,
    LOG_S,
    LOSS,
    MASS,
    SCALE,
    SLOPE_Y,
    W_Y,
    WIDTH,
    X_Y,
    E,
    K,
    M,
    N,
    Y,
    begin,
    exponent_of,
    finish,
    get,
    lanes,
    put,
    set_factors,
    set_state,
    settle,
    state_of,
    times,
    usable,
    weighted_log_sum,
)
from fastll.backend.numba.vector import (
    INLINE,
    first,
    lanes_of,
    power,
    read,
    splat,
    stream_fence,
    write,
)

KERNEL = {"nogil": True, "error_model": "numpy"}

GROUP_SIZE = 1 << 18  # bytes of a group's rows, where there is a second pass
ROW_SIZE = 1 << 19  # bytes of a row up to which its exponentials are kept
SMALL_SCALE = 2.0**-100  # a factor of exponentials that keeps its digits in float32


class Group(NamedTuple):
    """Rows inner to inner + count of an outer one."""

    table: int  # of `state`
    outer: int
    inner: int
    count: int
    terms: int  # address of their exponentials, or 0


class Buffers(NamedTuple):
    """Addresses of memory for one call."""

    x: int  # BLOCK elements of the compute dtype, twice
    u: int  # BLOCK elements
    slope: int
    out: int
    exponents: int  # float64: of the reference of each block of a row's exponentials
    tables: int  # of two groups
    terms: int  # of two groups
    pitch: int  # bytes from a row's exponentials to the next one's


@njit(**INLINE)
def allocate(classes, groups_of_terms, like):
    """Uninitialised `Buffers`, and the array that holds them."""
    size = size_of(like)
    block, blocks = BLOCK * size, (classes + BLOCK - 1) // BLOCK
    pitch = (classes * size + 127) // 128 * 128
    memory = np.empty(5 * block + blocks * 8 + 2 * END + 2 * groups_of_terms * pitch + 64, np.uint8)
    at = (address_of(memory) + 63) // 64 * 64
    tables = at + 5 * block
    terms = tables + 2 * END
    exponents = terms + 2 * groups_of_terms * pitch
    buffers = Buffers(
        at, at + 2 * block, at + 3 * block, at + 4 * block, exponents, tables, terms, pitch
    )
    return buffers, memory


@njit(**INLINE)
def load_states(state, group):
    """The states the rows start from."""
    if state.address != 0:
        for i in range(group.count):
            at = start_of(state, group.outer, group.inner + i)
            m = read(at, 0.0)
            put(group.table + M, i, m)
            put(group.table + E, i, read(at + state.classes, 0.0))
            put(group.table + K, i, read(at + 2 * state.classes, 0.0))
            put(group.table + N, i, first(exponent_of(splat(m))))


@njit(**INLINE)
def put_rows(x, group, column, like):
    """One number a row, where it is asked for."""
    if x.address != 0:
        at = start_of(x, group.outer, group.inner)
        for i in range(group.count):
            write(at + i * x.inner, cast(get(group.table + column, i), like))


@njit(**INLINE)
def put_lse(out, group, like):
    if out.address != 0:
        at = start_of(out, group.outer, group.inner)
        for i in range(group.count):
            value = get(group.table + M, i) + get(group.table + LOG_S, i)
            write(at + i * out.inner, cast(value, like))


@njit(**INLINE)
def conclude_logsumexp(state, out, sign, weighted, group, like):
    """What becomes of a group of rows of a log-sum-exp."""
    table = group.table
    settle(table, group.count)
    for i in range(group.count):
        m, e, k = get(table + M, i), get(table + E, i), get(table + K, i)
        if weighted:  # sums of any sign; a negative one is NaN unless signs are asked for
            log_s = weighted_log_sum(e, k)
            if m == -np.inf and e == e:
                log_s = -np.inf
            elif sign.address == 0 and e + k < 0.0:
                log_s = np.nan
            put(table + LOG_S, i, log_s)
        if state.address != 0:
            at = start_of(state, group.outer, group.inner + i)
            write(at, m)
            write(at + state.classes, e)
            write(at + 2 * state.classes, k)
        if sign.address != 0:
            at = start_of(sign, group.outer, group.inner + i)
            write(at, cast(np.sign(e + k), like))
    put_lse(out, group, like)


@njit(**INLINE)
def read_labels(labels, w, ignore_index, group, like):
    """Labels and their weights."""
    if labels.address != 0:
        at = start_of(labels, group.outer, group.inner)
        for i in range(group.count):
            y = read(at + i * labels.inner, np.int64(0))
            kept = y != ignore_index
            put(group.table + Y, i, float(y))
            put(group.table + KEPT, i, 1.0 if kept else 0.0)
            if w != 0 and kept:
                put(group.table + W_Y, i, np.float64(read(w + y * size_of(like), like)))


@njit(**INLINE)
def conclude(loss, lse, group, classes, sparse, options, like):
    """What becomes of a group of rows between its two passes; without a `loss`, for a softmax."""
    table = group.table
    settle(table, group.count)
    if loss.address != 0:
        finish(table, group.count, classes, sparse, options)
        put_rows(loss, group, LOSS, like)
    else:
        for i in range(0, group.count, lanes_of(0.0)):
            set_factors(table, i, splat(1.0) / (lanes(table + E, i) + lanes(table + K, i)))
    put_lse(lse, group, like)


@njit(**INLINE)
def next_group(tables, half, row, stop, inner_size, most):
    inner = row % inner_size
    count = min(most, min(inner_size - inner, stop - row))
    return Group(tables + half * END, row // inner_size, inner, count, 0)


@njit(**INLINE)
def nothing_pending(like):
    zero = cast(0.0, like)
    return Pending(0, 0, 0, 0, False, False, zero, zero, zero, zero, zero)


@njit(**INLINE)
def fetch_capped(x, start, j, n, cap, buffer, slope, like):
    """`fetch`, then the soft cap where there is one; its derivative into `slope` unless that is 0."""
    v = fetch(x, start, j, n, buffer, like)
    if cap != 0.0:
        cap_block(v, n, cap, buffer, slope, like)
        return buffer
    return v


@njit(**INLINE)
def next_block(x, start, j, cap, buffers, classes, like):
    """(address, length) of the block of elements from j on; the one before it stays where it is."""
    n = min(BLOCK, classes - j)
    buffer = buffers.x + j // BLOCK % 2 * BLOCK * size_of(like)
    return fetch_capped(x, start, j, n, cap, buffer, 0, like) if n > 0 else 0, n


@njit(**INLINE)
def first_block(x, start, cap, buffers, classes, like):
    """(address, length, maximum) of a row's first block."""
    v, n = next_block(x, start, 0, cap, buffers, classes, like)
    return v, n, max_block(v, n, like)


@cached
@njit(**KERNEL)
def logsumexp(x, b, state, out, sign, classes, inner_size, like, start, stop):
    buffers, memory = allocate(classes, 0, like)
    pending = nothing_pending(like)
    row = start
    while row < stop:
        group = next_group(buffers.tables, 0, row, stop, inner_size, WIDTH)
        begin(group.table)
        load_states(state, group)
        for i in range(group.count):
            x_start = start_of(x, group.outer, group.inner + i)
            s = state_of(group.table, i)
            v, n, top = first_block(x, x_start, 0.0, buffers, classes, like)
            for j in range(0, classes, BLOCK):
                next_v, next_n = next_block(x, x_start, j + n, 0.0, buffers, classes, like)
                if b.address == 0:
                    s, pending, top = fold_block(v, n, top, s, 0, pending, next_v, next_n, like)
                else:
                    weights = start_of(b, group.outer, group.inner + i)
                    weights = fetch(b, weights, j, n, buffers.u, like)
                    s = fold_weighted_block(v, weights, n, s, buffers.out, like)
                v, n = next_v, next_n
            set_state(group.table, i, s)
        conclude_logsumexp(state, out, sign, b.address != 0, group, like)
        row += group.count
    release(memory)


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


@njit(**INLINE)
def result_of(x, out, log, group, i, pitch, classes, like):
    """Row i of a group as it is to be written; nothing of it if that takes new exponentials."""
    table, zero = group.table, cast(0.0, like)
    m, scale = get(table + M, i), get(table + SCALE, i) * 2.0 ** (OUT_SHIFT - SUM_SHIFT)
    source = start_of(x, group.outer, group.inner + i)
    n, same = classes, zero
    if not log:
        source = group.terms + i * pitch
        if group.terms == 0 or not usable(m) or not abs(scale) > SMALL_SCALE:
            n = 0
        floor, magic = window(get(table + N, i), float(SUM_SHIFT), like)
        same = first(exponential(splat(cast(m, like)), splat(floor), splat(magic)))
    start = start_of(out, group.outer, group.inner + i)
    factor, lowered = cast(get(table + FACTOR, i), like), cast(get(table + LOG_S, i), like)
    scale = cast(scale, like)
    return Pending(source, start, 0, n, log, out.streamed, scale, same, factor, cast(m, like), lowered)


@njit(**INLINE)
def pending_row(x, out, log, group, i, pitch, classes, like):
    """`result_of` a row that may be written while another one is read."""
    if get(group.table + KEPT, i) == 0.0:
        return nothing_pending(like)
    row = result_of(x, out, log, group, i, pitch, classes, like)
    if row.streamed:
        head = min(row.n, until_line(row.out, like))
        write_vector(row, 0, head, False)
        row = advanced(row, head)
    return row


@njit(**INLINE)
def part_of(row, source, out, n):
    """The same for n elements elsewhere."""
    return Pending(
        source, out, 0, n, row.log, False, row.scale, row.same, row.factor, row.top, row.lowered
    )


@njit(**INLINE)
def write_row(x, t, w, out, log, sparse, spread, options, group, i, buffers, classes, like):
    """Probabilities, their logarithms or the gradient of row i of a group."""
    table, cap = group.table, options.softcap
    x_start = start_of(x, group.outer, group.inner + i)
    t_start = start_of(t, group.outer, group.inner + i)
    start = start_of(out, group.outer, group.inner + i)
    row = result_of(x, out, log, group, i, buffers.pitch, classes, like)
    y = int(get(table + Y, i))
    for j in range(0, classes, BLOCK):
        n = min(BLOCK, classes - j)
        g = target_of(out, start, j, buffers.out)
        if get(table + KEPT, i) == 0.0:
            fill_block(g, n, 0.0, like)
            deliver(out, start, j, n, buffers.out, like)
            continue
        if log:
            v = fetch(x, x_start, j, n, buffers.x, like)
            write_rest(part_of(row, v, g, n))
        elif row.n > 0:
            write_rest(part_of(row, row.source + j * size_of(like), g, n))
        else:
            v = fetch_capped(x, x_start, j, n, cap, buffers.x, buffers.slope, like)
            exp_block(v, n, table, i, g, like)
        if spread:
            u = fetch_target(t, t_start, w, j, n, options, classes, buffers.u, like)
            subtract_block(g, u, n, options.scale, like)
        if cap != 0.0:
            multiply_block(g, buffers.slope, n, like)
        if sparse and j <= y < j + n:
            write(g + (y - j) * size_of(like), cast(get(table + G_Y, i), like))
        deliver(out, start, j, n, buffers.out, like)


@cached
@njit(**KERNEL)
def reduce(
    x, t, labels, w, state, options, loss, lse, out, log, classes, inner_size, like, start, stop
):
    """Cross-entropy, or without a `loss`, softmax."""
    size, cap = size_of(like), options.softcap
    sparse = labels.address != 0
    spread = loss.address != 0 and (not sparse or options.label_smoothing != 0.0)
    folded = state.address != 0
    writes = out.address != 0
    most = WIDTH
    if writes:
        most = max(1, min(WIDTH, GROUP_SIZE // max(1, classes * size)))
    # whether the first pass leaves exponentials, and whether the second one needs nothing else
    keeps = writes and not (log or folded or cap != 0.0) and classes * size <= ROW_SIZE
    interleaves = writes and not (folded or spread) and out.write == 0
    interleaves = interleaves and (x.read == 0 if log else keeps)
    buffers, memory = allocate(classes, most if keeps else 0, like)
    before = Group(buffers.tables, 0, 0, 0, 0)
    half, row = 0, start
    while row < stop or before.count > 0:
        group = next_group(buffers.tables, half, row, max(row, stop), inner_size, most)
        if keeps:
            terms = buffers.terms + half * most * buffers.pitch
            group = Group(group.table, group.outer, group.inner, group.count, terms)
        table = group.table
        begin(table)
        load_states(state, group)
        read_labels(labels, w, options.ignore_index, group, like)
        for i in range(max(group.count, before.count)):
            pending = nothing_pending(like)
            if interleaves and i < before.count:
                pending = pending_row(x, out, log, before, i, buffers.pitch, classes, like)
            kept = get(table + KEPT, i) != 0.0
            if i < group.count and not folded and (kept or lse.address != 0):
                x_start = start_of(x, group.outer, group.inner + i)
                t_start = start_of(t, group.outer, group.inner + i)
                s = state_of(table, i)
                v, n, top = first_block(x, x_start, cap, buffers, classes, like)
                for j in range(0, classes, BLOCK):
                    next_v, next_n = next_block(x, x_start, j + n, cap, buffers, classes, like)
                    m = s.m
                    at = group.terms + i * buffers.pitch + j * size if keeps else 0
                    s, pending, top = fold_block(v, n, top, s, at, pending, next_v, next_n, like)
                    put(buffers.exponents, j // BLOCK, s.n)
                    if spread:
                        u = fetch_target(t, t_start, w, j, n, options, classes, buffers.u, like)
                        added, weight = linear_block(v, u, n, s.m, like)
                        mass = get(table + MASS, i)
                        added += times(mass, s.m - m)
                        put(table + DISTANCE, i, get(table + DISTANCE, i) + added)
                        put(table + MASS, i, mass + weight)
                    v, n = next_v, next_n
                set_state(table, i, s)
                if keeps:  # all for one reference; what underflows here does so in the result
                    for j in range(0, classes, BLOCK):
                        lift = get(buffers.exponents, j // BLOCK) - s.n
                        if lift != 0.0:
                            n = min(BLOCK, classes - j)
                            at = group.terms + i * buffers.pitch + j * size
                            scale_block(at, n, power(lift) if lift > -1023.0 else 0.0, like)
                if sparse and kept:
                    y = int(get(table + Y, i))
                    v = fetch_capped(x, x_start, y, 1, cap, buffers.x, buffers.slope, like)
                    put(table + X_Y, i, np.float64(read(v, like)))
                    if cap != 0.0:
                        put(table + SLOPE_Y, i, np.float64(read(buffers.slope, like)))
            if i < before.count:
                if pending.n > 0:
                    write_rest(pending)
                    if sparse:
                        y = int(get(before.table + Y, i))
                        write(pending.out + y * size, cast(get(before.table + G_Y, i), like))
                else:
                    write_row(
                        x, t, w, out, log, sparse, spread, options, before, i, buffers, classes, like
                    )
        conclude(loss, lse, group, classes, sparse, options, like)
        row += group.count
        before = Group(table, group.outer, group.inner, group.count if writes else 0, group.terms)
        half = 1 - half
    if out.streamed:
        stream_fence()
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
