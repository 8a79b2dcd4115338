"""Kernels over rows whose class axis is the slower one in memory: many rows at a time, class by class.

`WIDTH` neighbouring rows make a tile: a block of `BLOCK` classes of each, gathered so that the rows are
contiguous, and handled with one row to a lane. Each row's sum keeps the order that `blocks` lays down
(element j of a block in accumulator j modulo LANES), so that a row has the same result, to the bit, in
either layout.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backends.numba.blocks import (
    BLOCK,
    NOTHING,
    address_of,
    exp_exact,
    release,
    size_of,
    start_of,
    sum_exact,
    weighted_sum_exact,
)
from fastll.backends.numba.cache import cached
from fastll.backends.numba.maths import (
    OUT_SHIFT,
    SUM_SHIFT,
    cast,
    constants,
    exponential,
    softcap,
    window,
)
from fastll.backends.numba.rows import KERNEL, load_state, store_lse, store_state
from fastll.backends.numba.state import (
    finish,
    log_sum,
    raise_maximum,
    reference,
    settle,
    times,
)
from fastll.backends.numba.vector import (
    INLINE,
    bytes_of,
    call,
    fma,
    lanes_of,
    load,
    maximum,
    prefetch_vector,
    read,
    splat,
    store,
    where_eq,
    widen,
    write,
)

WIDTH = 64
#: Classes from the one that is written to the one that is prefetched.
LINES_AHEAD = 8


@njit(**INLINE)
def gather(x, outer, inner, j, n, count, tile, like):
    """Classes j to j + n of `count` rows into a tile: class by class, WIDTH rows apart."""
    size = size_of(like)
    pad = splat(constants(like).zero)
    for i in range(n):
        source = start_of(x, outer, inner) + (j + i) * x.classes
        line = tile + i * WIDTH * size
        if x.read == 0:
            for w in range(0, count, lanes_of(like)):
                store(line + w * size, count - w, load(source + w * size, count - w, pad))
        else:
            call(x.read, source, x.inner, line, size, count)


@njit(**INLINE)
def scatter(x, outer, inner, j, n, count, tile, like):
    """A tile back into classes j to j + n of `count` rows."""
    size = size_of(like)
    pad = splat(constants(like).zero)
    for i in range(n):
        target = start_of(x, outer, inner) + (j + i) * x.classes
        line = tile + i * WIDTH * size
        if x.write == 0:
            for w in range(0, count, lanes_of(like)):
                prefetch_vector(target + LINES_AHEAD * x.classes + w * size)
                store(target + w * size, count - w, load(line + w * size, count - w, pad))
        else:
            call(x.write, line, size, target, x.inner, count)


class Lanes(NamedTuple):
    """The state of the WIDTH rows of a tile: scalars as float64 arrays, vectors by their address."""

    m: np.ndarray
    e: np.ndarray
    k: np.ndarray
    n: np.ndarray  # of `state.Reference`
    lead: np.ndarray
    usable: np.ndarray
    tops: int  # m in the compute dtype
    floors: int  # of `maths.window`
    magics: int
    counts: int
    sums: int  # LANES accumulators
    more_sums: int
    wide: int  # LANES float64 vectors: the sums on their way to one


@njit(**INLINE)
def lanes(like):
    """Uninitialised `Lanes`, and the array that holds their vectors."""
    line = WIDTH * size_of(like)
    accumulators = lanes_of(like) * bytes_of(widen(splat(like)))
    memory = np.empty(4 * line + 3 * accumulators, np.uint8)
    at = address_of(memory)
    sums = at + 4 * line
    result = Lanes(
        np.empty(WIDTH),
        np.empty(WIDTH),
        np.empty(WIDTH),
        np.empty(WIDTH),
        np.empty(WIDTH),
        np.empty(WIDTH, np.bool_),
        at,
        at + line,
        at + 2 * line,
        at + 3 * line,
        sums,
        sums + accumulators,
        sums + 2 * accumulators,
    )
    return result, memory


@njit(**INLINE)
def clear(accumulators, zero):
    """Set all of them to the vector `zero`."""
    for i in range(lanes_of(zero)):
        store(accumulators + i * bytes_of(zero), lanes_of(zero), zero)


@njit(**INLINE)
def accumulate(accumulators, j, v):
    """Add the vector of element j of a block."""
    at = accumulators + j % lanes_of(v) * bytes_of(v)
    store(at, lanes_of(v), load(at, lanes_of(v), v) + v)


@njit(**INLINE)
def fold_sums(accumulators, n, zero, wide):
    """The sums of n elements, folded by halves in float64, as the first vector at `wide`."""
    count = lanes_of(zero)
    size, wide_size = bytes_of(zero), bytes_of(widen(zero))
    for i in range(count):
        v = widen(load(accumulators + i * size, count, zero))
        store(wide + i * wide_size, count, v)
    half = count // 2
    while half > 0:
        for i in range(min(half, n)):
            at = wide + i * wide_size
            other = load(at + half * wide_size, count, widen(zero))
            store(at, count, load(at, count, widen(zero)) + other)
        half //= 2


@njit(**INLINE)
def set_reference(s, i, like):
    """Bring row i's reference and its vectors' lane up to its maximum."""
    size = size_of(like)
    ref = reference(s.m[i])
    s.n[i], s.lead[i], s.usable[i] = ref.n, ref.lead, ref.usable
    floor, magic = window(ref.n, float(SUM_SHIFT), like)
    write(s.tops + i * size, cast(s.m[i], like))
    write(s.floors + i * size, floor)
    write(s.magics + i * size, magic)


@njit(**INLINE)
def begin(s, state, outer, inner, count, like):
    """Start `count` rows from their state, or from the identity. Idle lanes hold harmless numbers."""
    for i in range(WIDTH):
        s.m[i], s.e[i], s.k[i] = -np.inf, 0.0, 0.0
        if i < count:
            s.m[i], s.e[i], s.k[i], _ = load_state(state, outer, inner + i)
        set_reference(s, i, like)


@njit(**INLINE)
def raise_maxima(s, tile, n, count, like):
    """The rows' maxima with those of a tile."""
    size = size_of(like)
    lowest = splat(-constants(like).infinity)
    for w in range(0, count, lanes_of(like)):
        top = lowest
        for j in range(n):
            top = maximum(load(tile + (j * WIDTH + w) * size, lanes_of(like), lowest), top)
        store(s.counts, lanes_of(like), top)
        for i in range(w, min(count, w + lanes_of(like))):
            above = np.float64(read(s.counts + (i - w) * size, like))
            if above > s.m[i]:
                s.m[i], s.e[i], s.k[i] = raise_maximum(s.m[i], s.e[i], s.k[i], above)
                set_reference(s, i, like)


@njit(**INLINE)
def fold_tile(s, tile, n, count, like):
    """`blocks.fold_block` for the rows of a tile."""
    size = size_of(like)
    c = constants(like)
    zero, one = splat(c.zero), splat(c.one)
    raise_maxima(s, tile, n, count, like)
    for w in range(0, count, lanes_of(like)):
        tops = load(s.tops + w * size, lanes_of(like), zero)
        floors = load(s.floors + w * size, lanes_of(like), zero)
        magics = load(s.magics + w * size, lanes_of(like), zero)
        clear(s.sums, zero)
        counts = zero
        for j in range(n):
            x = load(tile + (j * WIDTH + w) * size, lanes_of(like), zero)
            accumulate(s.sums, j, where_eq(x, tops, zero, exponential(x, floors, magics)))
            counts = counts + where_eq(x, tops, one, zero)
        fold_sums(s.sums, n, zero, s.wide)
        store(s.counts, lanes_of(like), counts)
        for i in range(w, min(count, w + lanes_of(like))):
            if s.usable[i]:
                others = read(s.wide + (i - w) * 8, 0.0) * 2.0**-SUM_SHIFT / s.lead[i]
                equal = np.float64(read(s.counts + (i - w) * size, like))
            else:
                others, equal = sum_exact(tile + i * size, WIDTH * size, n, s.m[i], like)
            s.e[i] += others
            s.k[i] += equal


@njit(**INLINE)
def fold_weighted_tile(s, tile, b, n, count, like):
    """`blocks.fold_weighted_block` for the rows of a tile."""
    size = size_of(like)
    c = constants(like)
    lowest, zero = splat(-c.infinity), splat(c.zero)
    unshift = widen(splat(cast(2.0**-SUM_SHIFT, like)))
    for at in range(0, n * WIDTH * size, bytes_of(zero)):
        x = load(tile + at, lanes_of(like), zero)
        weight = load(b + at, lanes_of(like), zero)
        store(tile + at, lanes_of(like), where_eq(weight, zero, lowest, x))
    raise_maxima(s, tile, n, count, like)
    for w in range(0, count, lanes_of(like)):
        tops = load(s.tops + w * size, lanes_of(like), zero)
        floors = load(s.floors + w * size, lanes_of(like), zero)
        magics = load(s.magics + w * size, lanes_of(like), zero)
        clear(s.sums, widen(zero))
        clear(s.more_sums, widen(zero))
        for j in range(n):
            x = load(tile + (j * WIDTH + w) * size, lanes_of(like), zero)
            weight = load(b + (j * WIDTH + w) * size, lanes_of(like), zero)
            terms = widen(where_eq(x, tops, zero, exponential(x, floors, magics))) * unshift
            accumulate(s.sums, j, terms * widen(weight))
            accumulate(s.more_sums, j, widen(where_eq(x, tops, weight, zero)))
        fold_sums(s.sums, n, widen(zero), s.wide)
        fold_sums(s.more_sums, n, widen(zero), s.sums)
        for i in range(w, min(count, w + lanes_of(like))):
            if s.usable[i]:
                others = read(s.wide + (i - w) * 8, 0.0) / s.lead[i]
                equal = read(s.sums + (i - w) * 8, 0.0)
            else:
                others, equal = weighted_sum_exact(
                    tile + i * size, b + i * size, WIDTH * size, n, s.m[i], like
                )
            s.e[i] += others
            s.k[i] += equal


@njit(**INLINE)
def settle_rows(s, count):
    for i in range(count):
        s.m[i], s.e[i], s.k[i] = settle(s.m[i], s.e[i], s.k[i])


@njit(**INLINE)
def exp_tile(s, tile, n, count, factors, out, like):
    """`blocks.exp_block` for the rows of a tile."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for w in range(0, count, lanes_of(like)):
        for i in range(w, w + lanes_of(like)):
            floor, magic = window(s.n[i], float(OUT_SHIFT), like)
            write(s.floors + i * size, floor)
            write(s.magics + i * size, magic)
            write(s.sums + (i - w) * size, cast(factors[i], like))
            write(s.counts + (i - w) * size, cast(factors[i] / s.lead[i] * 2.0**-OUT_SHIFT, like))
        tops = load(s.tops + w * size, lanes_of(like), zero)
        floors = load(s.floors + w * size, lanes_of(like), zero)
        magics = load(s.magics + w * size, lanes_of(like), zero)
        top_values = load(s.sums, lanes_of(like), zero)
        scales = load(s.counts, lanes_of(like), zero)
        for j in range(n):
            at = (j * WIDTH + w) * size
            x = load(tile + at, lanes_of(like), zero)
            y = exponential(x, floors, magics) * scales
            store(out + at, lanes_of(like), where_eq(x, tops, top_values, y))
        for i in range(w, min(count, w + lanes_of(like))):
            if not s.usable[i]:
                exp_exact(tile + i * size, WIDTH * size, n, s.m[i], factors[i], out + i * size, like)


@njit(**INLINE)
def log_tile(s, tile, n, count, logs, out, like):
    """`blocks.log_block` for the rows of a tile."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for w in range(0, count, lanes_of(like)):
        for i in range(w, w + lanes_of(like)):
            write(s.counts + (i - w) * size, cast(logs[i], like))
        tops = load(s.tops + w * size, lanes_of(like), zero)
        log_s = load(s.counts, lanes_of(like), zero)
        for j in range(n):
            at = (j * WIDTH + w) * size
            store(out + at, lanes_of(like), (load(tile + at, lanes_of(like), zero) - tops) - log_s)


@njit(**INLINE)
def cap_tile(tile, n, cap, slope, like):
    """`blocks.cap_block` for a tile, in place."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    caps = splat(cast(cap, like))
    for at in range(0, n * WIDTH * size, bytes_of(zero)):
        capped, derivative = softcap(load(tile + at, lanes_of(like), zero), caps)
        store(tile + at, lanes_of(like), capped)
        store(slope + at, lanes_of(like), derivative)


@njit(**INLINE)
def target_tile(t, w, j, n, dense, keep, spread, like):
    """`blocks.target_block` for a tile, in place; without `dense`, t is 0."""
    size = size_of(like)
    c = constants(like)
    zero = splat(c.zero)
    keeps, spreads = splat(cast(keep, like)), splat(cast(spread, like))
    for i in range(n):
        weight = splat(read(w + (j + i) * size, like) if w != 0 else c.one)
        for at in range(i * WIDTH * size, (i + 1) * WIDTH * size, bytes_of(zero)):
            u = spreads
            if dense:
                u = fma(load(t + at, lanes_of(like), zero), keeps, spreads)
            store(t + at, lanes_of(like), u * weight)


@njit(**INLINE)
def linear_tile(s, tile, u, n, count, before, distance, mass, like):
    """`blocks.linear_block` for the rows of a tile, added to distance and mass.

    `before` is the maximum that the distance so far refers to.
    """
    size = size_of(like)
    zero = splat(constants(like).zero)
    for w in range(0, count, lanes_of(like)):
        for i in range(w, w + lanes_of(like)):
            top = s.m[i] if s.m[i] > -np.inf else 0.0
            write(s.counts + (i - w) * size, cast(top, like))
        tops = load(s.counts, lanes_of(like), zero)
        clear(s.sums, zero)
        clear(s.more_sums, zero)
        for j in range(n):
            x = load(tile + (j * WIDTH + w) * size, lanes_of(like), zero)
            weight = load(u + (j * WIDTH + w) * size, lanes_of(like), zero)
            accumulate(s.sums, j, where_eq(weight, zero, zero, weight * (tops - x)))
            accumulate(s.more_sums, j, weight)
        fold_sums(s.sums, n, zero, s.wide)
        for i in range(w, min(count, w + lanes_of(like))):
            added = read(s.wide + (i - w) * 8, 0.0)
            distance[i] += times(mass[i], s.m[i] - before[i]) + added
        fold_sums(s.more_sums, n, zero, s.wide)
        for i in range(w, min(count, w + lanes_of(like))):
            mass[i] += read(s.wide + (i - w) * 8, 0.0)


@njit(**INLINE)
def subtract_tile(out, u, n, factor, like):
    """`blocks.subtract_block` for a tile."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    factors = splat(cast(-factor, like))
    for at in range(0, n * WIDTH * size, bytes_of(zero)):
        y = fma(load(u + at, lanes_of(like), zero), factors, load(out + at, lanes_of(like), zero))
        store(out + at, lanes_of(like), y)


@njit(**INLINE)
def multiply_tile(out, slope, n, like):
    """`blocks.multiply_block` for a tile."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for at in range(0, n * WIDTH * size, bytes_of(zero)):
        y = load(out + at, lanes_of(like), zero) * load(slope + at, lanes_of(like), zero)
        store(out + at, lanes_of(like), y)


@njit(**INLINE)
def tiles(count, classes, like):
    """Uninitialised memory for `count` tiles, and the size of one."""
    size = min(BLOCK, classes) * WIDTH * size_of(like)
    return np.empty(count * size, np.uint8), size


@njit(**INLINE)
def rows_of_tile(row, stop, inner_size):
    """(outer, inner, count) of the tile that starts at a row."""
    inner = row % inner_size
    return row // inner_size, inner, min(WIDTH, min(inner_size - inner, stop - row))


@cached
@njit(**KERNEL)
def logsumexp(x, b, state, out, sign, classes, inner_size, like, start, stop):
    memory, tile_size = tiles(2, classes, like)
    tile = address_of(memory)
    weights = tile + tile_size
    s, vectors = lanes(like)
    row = start
    while row < stop:
        outer, inner, count = rows_of_tile(row, stop, inner_size)
        begin(s, state, outer, inner, count, like)
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            gather(x, outer, inner, j, n, count, tile, like)
            if b.address == 0:
                fold_tile(s, tile, n, count, like)
            else:
                gather(b, outer, inner, j, n, count, weights, like)
                fold_weighted_tile(s, tile, weights, n, count, like)
        settle_rows(s, count)
        for i in range(count):
            m, e, k = s.m[i], s.e[i], s.k[i]
            if state.address != 0:
                store_state(state, outer, inner + i, m, e, k)
            if out.address != 0:
                store_lse(out, sign, b.address != 0, outer, inner + i, m, e, k, like)
        row += count
    release(memory)
    release(vectors)


@cached
@njit(**KERNEL)
def softmax(x, state, out, log, classes, inner_size, like, start, stop):
    memory, tile_size = tiles(2, classes, like)
    tile = address_of(memory)
    results = tile + tile_size
    s, vectors = lanes(like)
    factors = np.zeros(WIDTH)
    row = start
    while row < stop:
        outer, inner, count = rows_of_tile(row, stop, inner_size)
        begin(s, state, outer, inner, count, like)
        if state.address == 0:
            for j in range(0, classes, BLOCK):
                n = min(BLOCK, classes - j)
                gather(x, outer, inner, j, n, count, tile, like)
                fold_tile(s, tile, n, count, like)
        for i in range(count):
            factors[i] = log_sum(s.e[i], s.k[i]) if log else 1.0 / (s.e[i] + s.k[i])
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            if classes > BLOCK or state.address != 0:
                gather(x, outer, inner, j, n, count, tile, like)
            if log:
                log_tile(s, tile, n, count, factors, results, like)
            else:
                exp_tile(s, tile, n, count, factors, results, like)
            scatter(out, outer, inner, j, n, count, results, like)
        row += count
    release(memory)
    release(vectors)


@cached
@njit(**KERNEL)
def cross_entropy(x, t, labels, w, options, loss, lse, grad, classes, inner_size, like, start, stop):
    size = size_of(like)
    memory, tile_size = tiles(4, classes, like)
    tile = address_of(memory)
    u, slope, results = tile + tile_size, tile + 2 * tile_size, tile + 3 * tile_size
    s, vectors = lanes(like)
    cap, eps, scale = options.softcap, options.label_smoothing, options.scale
    keep, share = 1.0 - eps, eps / classes
    sparse, dense = labels.address != 0, t.address != 0
    spread = dense or eps != 0.0
    y, kept = np.zeros(WIDTH, np.int64), np.ones(WIDTH, np.bool_)
    x_y, slope_y = np.zeros(WIDTH), np.ones(WIDTH)
    distance, mass, before = np.zeros(WIDTH), np.zeros(WIDTH), np.zeros(WIDTH)
    factors, g_y = np.zeros(WIDTH), np.zeros(WIDTH)
    row = start
    while row < stop:
        outer, inner, count = rows_of_tile(row, stop, inner_size)
        begin(s, NOTHING, outer, inner, count, like)
        for i in range(count):
            distance[i], mass[i], x_y[i], slope_y[i] = 0.0, 0.0, 0.0, 1.0
            if sparse:
                y[i] = read(start_of(labels, outer, inner + i), np.int64(0))
                kept[i] = y[i] != options.ignore_index
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            gather(x, outer, inner, j, n, count, tile, like)
            if cap != 0.0:
                cap_tile(tile, n, cap, slope, like)
            before[:] = s.m
            fold_tile(s, tile, n, count, like)
            if spread:
                if dense:
                    gather(t, outer, inner, j, n, count, u, like)
                target_tile(u, w, j, n, dense, keep, share, like)
                linear_tile(s, tile, u, n, count, before, distance, mass, like)
            for i in range(count):
                if sparse and kept[i] and j <= y[i] < j + n:
                    at = ((y[i] - j) * WIDTH + i) * size
                    x_y[i] = np.float64(read(tile + at, like))
                    slope_y[i] = np.float64(read(slope + at, like)) if cap != 0.0 else 1.0
        settle_rows(s, count)
        for i in range(count):
            at = start_of(loss, outer, inner + i)
            m, e, k = s.m[i], s.e[i], s.k[i]
            if lse.address != 0:
                write(start_of(lse, outer, inner + i), cast(m + log_sum(e, k), like))
            w_y = np.float64(read(w + y[i] * size, like)) if sparse and w != 0 and kept[i] else 1.0
            value, factors[i], g_y[i] = finish(
                m, e, k, classes, sparse, x_y[i], w_y, distance[i], mass[i], options
            )
            g_y[i] *= slope_y[i]
            write(at, cast(value if kept[i] else 0.0, like))
        for j in range(0, classes if grad.address != 0 else 0, BLOCK):
            n = min(BLOCK, classes - j)
            if classes > BLOCK:
                gather(x, outer, inner, j, n, count, tile, like)
                if cap != 0.0:
                    cap_tile(tile, n, cap, slope, like)
            exp_tile(s, tile, n, count, factors, results, like)
            if spread:
                if classes > BLOCK:
                    if dense:
                        gather(t, outer, inner, j, n, count, u, like)
                    target_tile(u, w, j, n, dense, keep, share, like)
                subtract_tile(results, u, n, scale, like)
            if cap != 0.0:
                multiply_tile(results, slope, n, like)
            for i in range(count):
                if not kept[i]:
                    for c in range(n):
                        write(results + (c * WIDTH + i) * size, cast(0.0, like))
                elif sparse and j <= y[i] < j + n:
                    write(results + ((y[i] - j) * WIDTH + i) * size, cast(g_y[i], like))
            scatter(grad, outer, inner, j, n, count, results, like)
        row += count
    release(memory)
    release(vectors)
