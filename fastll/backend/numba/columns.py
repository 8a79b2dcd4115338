"""Kernels over rows whose class axis is the slower one in memory: class by class, many rows at a time.

`WIDTH` neighbouring rows make a tile: a block of `BLOCK` classes of each, gathered so that the rows are
contiguous, and handled with one row to a lane. Each row's sum keeps the order that `blocks` lays down
(element j of a block in accumulator j modulo the number of lanes), so that a row has the same result,
to the bit, in either layout.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.blocks import (
    BLOCK,
    address_of,
    cap_block,
    distances,
    exp_exact,
    mask_block,
    multiply_block,
    release,
    size_of,
    start_of,
    subtract_block,
    sum_exact,
    target_block,
    until_line,
    weighted_sum_exact,
    weighted_terms,
)
from fastll.backend.numba.cache import cached
from fastll.backend.numba.maths import OUT_SHIFT, SUM_SHIFT, cast, constants, exponential, window
from fastll.backend.numba.rows import (
    KERNEL,
    conclude,
    conclude_logsumexp,
    load_states,
    next_group,
    read_labels,
)
from fastll.backend.numba.state import (
    ADDED,
    DISTANCE,
    END,
    FACTOR,
    G_Y,
    KEPT,
    LOG_S,
    MASS,
    SCALE,
    SLOPE_Y,
    WIDTH,
    X_Y,
    E,
    K,
    M,
    N,
    Y,
    begin,
    exponent_of,
    get,
    lanes,
    put,
    put_lanes,
    raise_maximum,
    set_state,
    state_of,
    times,
    usable,
)
from fastll.backend.numba.vector import (
    INLINE,
    bytes_of,
    call,
    lanes_of,
    load,
    maximum,
    prefetch_vector,
    read,
    splat,
    store,
    stream,
    stream_fence,
    where_eq,
    widen,
    write,
)

FEW = 32  # classes that are written at a time
LINES_AHEAD = 8  # classes from the one that is read or written to the one that is prefetched


class Tile(NamedTuple):
    """Addresses of memory for one call; vectors are of the compute dtype unless said otherwise."""

    table: int  # of `state`
    v: int  # logits, capped
    u: int  # weights or targets
    slope: int  # of FEW classes: derivatives of the soft cap
    out: int  # of FEW classes
    tops: int  # one number a row: m
    floors: int  # of `maths.window`
    magics: int
    factors: int
    scales: int
    sums: int  # an accumulator, of one number a row, for each lane
    more_sums: int
    wide: int  # the sums on their way to one, in float64
    before: int  # the maxima of before, in float64


@njit(**INLINE)
def allocate_tile(classes, both, like):
    """An uninitialised `Tile`, with or without `u`, and the array that holds it."""
    line = WIDTH * size_of(like)
    accumulators = lanes_of(like) * bytes_of(widen(splat(like)))
    tile = min(BLOCK, classes) * line
    at = END + 2 * FEW * line + 5 * line + 3 * accumulators + WIDTH * 8
    memory = np.empty(at + (2 * tile if both else tile) + 64, np.uint8)
    first = (address_of(memory) + 63) // 64 * 64
    slope = first + END
    tops = slope + 2 * FEW * line
    sums = tops + 5 * line
    before = sums + 3 * accumulators
    v = before + WIDTH * 8
    result = Tile(
        first,
        v,
        v + tile if both else v,
        slope,
        slope + FEW * line,
        tops,
        tops + line,
        tops + 2 * line,
        tops + 3 * line,
        tops + 4 * line,
        sums,
        sums + accumulators,
        sums + 2 * accumulators,
        before,
    )
    return result, memory


@njit(**INLINE)
def gather(x, group, j, n, tile, like):
    """Classes j to j + n of the rows into a tile: class by class, WIDTH rows apart."""
    size, count = size_of(like), group.count
    pad = splat(constants(like).zero)
    source = start_of(x, group.outer, group.inner) + j * x.classes
    for i in range(n):
        line = tile + i * WIDTH * size
        if x.read == 0:
            for w in range(0, count, lanes_of(like)):
                prefetch_vector(source + LINES_AHEAD * x.classes + w * size)
                store(line + w * size, count - w, load(source + w * size, count - w, pad))
        else:
            call(x.read, source, x.inner, line, size, count)
        source += x.classes


@njit(**INLINE)
def scatter(x, group, j, n, tile, like):
    """A tile back into classes j to j + n of the rows."""
    size, count = size_of(like), group.count
    pad = splat(constants(like).zero)
    target = start_of(x, group.outer, group.inner) + j * x.classes
    for i in range(n):
        line = tile + i * WIDTH * size
        if x.write != 0:
            call(x.write, line, size, target, x.inner, count)
        elif x.streamed and count == WIDTH and target % 64 == 0:
            for w in range(0, WIDTH, lanes_of(like)):
                stream(target + w * size, load(line + w * size, lanes_of(like), pad))
        else:
            for w in range(0, count, lanes_of(like)):
                prefetch_vector(target + LINES_AHEAD * x.classes + w * size)
                store(target + w * size, count - w, load(line + w * size, count - w, pad))
        target += x.classes


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
    used = min(n, count)
    for i in range(used):
        v = widen(load(accumulators + i * size, count, zero))
        store(wide + i * wide_size, count, v)
    half = count // 2
    while half > 0:
        for i in range(half, used):
            at = wide + (i - half) * wide_size
            other = load(wide + i * wide_size, count, widen(zero))
            store(at, count, load(at, count, widen(zero)) + other)
        used = min(used, half)
        half //= 2


@njit(**INLINE)
def aim(tile, shift, like):
    """The references of the rows, a vector each."""
    size = size_of(like)
    for i in range(WIDTH):
        floor, magic = window(get(tile.table + N, i), shift, like)
        write(tile.tops + i * size, cast(get(tile.table + M, i), like))
        write(tile.floors + i * size, floor)
        write(tile.magics + i * size, magic)


@njit(**INLINE)
def raise_maxima(tile, n, count, fresh, like):
    """The rows' maxima with those of a tile; `fresh` rows have none yet."""
    size, table = size_of(like), tile.table
    lowest = splat(-constants(like).infinity)
    for w in range(0, WIDTH, lanes_of(like)):
        top = lowest
        for j in range(n):
            top = maximum(load(tile.v + (j * WIDTH + w) * size, lanes_of(like), lowest), top)
        store(tile.tops + w * size, lanes_of(like), top)
    if fresh:
        for i in range(WIDTH):
            put(table + M, i, np.float64(read(tile.tops + i * size, like)))
        for i in range(0, WIDTH, lanes_of(0.0)):
            put_lanes(table + N, i, exponent_of(lanes(table + M, i)))
    else:
        for i in range(count):
            top = np.float64(read(tile.tops + i * size, like))
            if top > get(table + M, i):
                set_state(table, i, raise_maximum(state_of(table, i), top))


@njit(**INLINE)
def fold_tile(tile, n, count, fresh, like):
    """`blocks.fold_block` for the rows of a tile."""
    size, table = size_of(like), tile.table
    c = constants(like)
    zero, one = splat(c.zero), splat(c.one)
    raise_maxima(tile, n, count, fresh, like)
    aim(tile, float(SUM_SHIFT), like)
    for w in range(0, count, lanes_of(like)):
        tops = load(tile.tops + w * size, lanes_of(like), zero)
        floors = load(tile.floors + w * size, lanes_of(like), zero)
        magics = load(tile.magics + w * size, lanes_of(like), zero)
        clear(tile.sums, zero)
        counts = zero
        for j in range(n):
            x = load(tile.v + (j * WIDTH + w) * size, lanes_of(like), zero)
            accumulate(tile.sums, j, where_eq(x, tops, zero, exponential(x, floors, magics)))
            counts = counts + where_eq(x, tops, one, zero)
        fold_sums(tile.sums, n, zero, tile.wide)
        store(tile.sums, lanes_of(like), counts)
        for i in range(w, min(count, w + lanes_of(like))):
            m = get(table + M, i)
            if usable(m):
                others = read(tile.wide + (i - w) * 8, 0.0) * 2.0**-SUM_SHIFT
                put(table + ADDED, i, get(table + ADDED, i) + others)
                equal = np.float64(read(tile.sums + (i - w) * size, like))
                put(table + K, i, get(table + K, i) + equal)
            else:
                e, k = sum_exact(tile.v + i * size, WIDTH * size, n, m, like)
                put(table + E, i, get(table + E, i) + e)
                put(table + K, i, get(table + K, i) + k)


@njit(**INLINE)
def fold_weighted_tile(tile, n, count, like):
    """`blocks.fold_weighted_block` for the rows of a tile."""
    size, table = size_of(like), tile.table
    zero = splat(constants(like).zero)
    mask_block(tile.v, tile.u, n * WIDTH, tile.v, like)
    raise_maxima(tile, n, count, False, like)
    aim(tile, float(SUM_SHIFT), like)
    for w in range(0, count, lanes_of(like)):
        tops = load(tile.tops + w * size, lanes_of(like), zero)
        floors = load(tile.floors + w * size, lanes_of(like), zero)
        magics = load(tile.magics + w * size, lanes_of(like), zero)
        clear(tile.sums, widen(zero))
        clear(tile.more_sums, widen(zero))
        for j in range(n):
            x = load(tile.v + (j * WIDTH + w) * size, lanes_of(like), zero)
            weight = load(tile.u + (j * WIDTH + w) * size, lanes_of(like), zero)
            terms, at_top = weighted_terms(x, weight, tops, floors, magics)
            accumulate(tile.sums, j, terms)
            accumulate(tile.more_sums, j, at_top)
        fold_sums(tile.sums, n, widen(zero), tile.wide)
        fold_sums(tile.more_sums, n, widen(zero), tile.sums)
        for i in range(w, min(count, w + lanes_of(like))):
            m, column = get(table + M, i), ADDED
            e = read(tile.wide + (i - w) * 8, 0.0)
            k = read(tile.sums + (i - w) * 8, 0.0)
            if not usable(m):
                column = E
                e, k = weighted_sum_exact(
                    tile.v + i * size, tile.u + i * size, WIDTH * size, n, m, like
                )
            put(table + column, i, get(table + column, i) + e)
            put(table + K, i, get(table + K, i) + k)


@njit(**INLINE)
def linear_tile(tile, n, count, like):
    """`blocks.linear_block` for the rows of a tile, added to distance and mass."""
    size, table = size_of(like), tile.table
    zero = splat(constants(like).zero)
    for i in range(WIDTH):
        m = get(table + M, i)
        write(tile.tops + i * size, cast(m if m > -np.inf else 0.0, like))
    for w in range(0, count, lanes_of(like)):
        tops = load(tile.tops + w * size, lanes_of(like), zero)
        clear(tile.sums, zero)
        clear(tile.more_sums, zero)
        for j in range(n):
            x = load(tile.v + (j * WIDTH + w) * size, lanes_of(like), zero)
            weight = load(tile.u + (j * WIDTH + w) * size, lanes_of(like), zero)
            accumulate(tile.sums, j, distances(x, weight, tops))
            accumulate(tile.more_sums, j, weight)
        fold_sums(tile.sums, n, zero, tile.wide)
        for i in range(w, min(count, w + lanes_of(like))):
            lift = get(table + M, i) - get(tile.before, i)
            added = times(get(table + MASS, i), lift) + read(tile.wide + (i - w) * 8, 0.0)
            put(table + DISTANCE, i, get(table + DISTANCE, i) + added)
        fold_sums(tile.more_sums, n, zero, tile.wide)
        for i in range(w, min(count, w + lanes_of(like))):
            put(table + MASS, i, get(table + MASS, i) + read(tile.wide + (i - w) * 8, 0.0))


@njit(**INLINE)
def fetch_target_tile(t, w, options, classes, group, j, n, u, like):
    """`rows.fetch_target` for a tile."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    source = 0
    if t.address != 0:
        gather(t, group, j, n, u, like)
        source = u
    eps = options.label_smoothing
    target_block(source, 0, n * WIDTH, 1.0 - eps, eps / classes, u, like)
    if w != 0:
        for i in range(n):
            weight = splat(read(w + (j + i) * size, like))
            for at in range(u + i * WIDTH * size, u + (i + 1) * WIDTH * size, bytes_of(zero)):
                store(at, lanes_of(like), load(at, lanes_of(like), zero) * weight)


@njit(**INLINE)
def fetch_capped_tile(x, cap, sparse, tile, group, j, n, like):
    """`rows.fetch_capped` for a tile, and what is at the labels."""
    size, table, line = size_of(like), tile.table, WIDTH * size_of(like)
    gather(x, group, j, n, tile.v, like)
    if cap != 0.0:
        for part in range(0, n, FEW):
            count = min(n - part, FEW)
            at = tile.v + part * line
            cap_block(at, count * WIDTH, cap, at, tile.slope, like)
            for i in range(group.count if sparse else 0):
                y = int(get(table + Y, i)) - j - part
                if 0 <= y < count:
                    slope = read(tile.slope + y * line + i * size, like)
                    put(table + SLOPE_Y, i, np.float64(slope))
    for i in range(group.count if sparse else 0):
        y = int(get(table + Y, i)) - j
        if 0 <= y < n:
            put(table + X_Y, i, np.float64(read(tile.v + y * line + i * size, like)))


@njit(**INLINE)
def exp_tile(tile, v, n, count, like):
    """`blocks.exp_block` for the rows of a tile."""
    size, table = size_of(like), tile.table
    zero = splat(constants(like).zero)
    for w in range(0, count, lanes_of(like)):
        floors = load(tile.floors + w * size, lanes_of(like), zero)
        magics = load(tile.magics + w * size, lanes_of(like), zero)
        same = exponential(load(tile.tops + w * size, lanes_of(like), zero), floors, magics)
        factors = load(tile.factors + w * size, lanes_of(like), zero)
        scales = load(tile.scales + w * size, lanes_of(like), zero)
        for j in range(n):
            at = (j * WIDTH + w) * size
            term = exponential(load(v + at, lanes_of(like), zero), floors, magics)
            store(tile.out + at, lanes_of(like), where_eq(term, same, factors, term * scales))
    for i in range(count):
        m = get(table + M, i)
        if not usable(m):
            factor = get(table + FACTOR, i)
            exp_exact(v + i * size, WIDTH * size, n, m, factor, tile.out + i * size, like)


@njit(**INLINE)
def log_tile(tile, v, n, count, like):
    """(x - m) - log s for the rows of a tile; log s stands in for the scales."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for w in range(0, count, lanes_of(like)):
        tops = load(tile.tops + w * size, lanes_of(like), zero)
        lowered = load(tile.scales + w * size, lanes_of(like), zero)
        for j in range(n):
            at = (j * WIDTH + w) * size
            store(tile.out + at, lanes_of(like), (load(v + at, lanes_of(like), zero) - tops) - lowered)


@cached
@njit(**KERNEL)
def logsumexp(x, b, state, out, sign, classes, inner_size, like, start, stop):
    tile, memory = allocate_tile(classes, b.address != 0, like)
    row = start
    while row < stop:
        group = next_group(tile.table, 0, row, stop, inner_size, WIDTH)
        begin(group.table)
        load_states(state, group)
        for j in range(0, classes, BLOCK):
            n = min(BLOCK, classes - j)
            gather(x, group, j, n, tile.v, like)
            if b.address == 0:
                fold_tile(tile, n, group.count, j == 0 and state.address == 0, like)
            else:
                gather(b, group, j, n, tile.u, like)
                fold_weighted_tile(tile, n, group.count, like)
        conclude_logsumexp(state, out, sign, b.address != 0, group, like)
        row += group.count
    release(memory)


@cached
@njit(**KERNEL)
def reduce(
    x, t, labels, w, state, options, loss, lse, out, log, classes, inner_size, like, start, stop
):
    """Cross-entropy, or without a `loss`, softmax."""
    size, line, cap = size_of(like), WIDTH * size_of(like), options.softcap
    sparse = labels.address != 0
    spread = loss.address != 0 and (not sparse or options.label_smoothing != 0.0)
    folded = state.address != 0
    whole = classes <= BLOCK and cap == 0.0 and not folded  # the tiles keep what they hold
    tile, memory = allocate_tile(classes, spread, like)
    table = tile.table
    row = start
    while row < stop:
        most = WIDTH
        if out.streamed:  # so that the other groups begin at lines
            most = until_line(start_of(out, row // inner_size, row % inner_size), like) or WIDTH
        group = next_group(table, 0, row, stop, inner_size, most)
        begin(table)
        load_states(state, group)
        read_labels(labels, w, options.ignore_index, group, like)
        for j in range(0, 0 if folded else classes, BLOCK):
            n = min(BLOCK, classes - j)
            fetch_capped_tile(x, cap, sparse, tile, group, j, n, like)
            for i in range(WIDTH):
                put(tile.before, i, get(table + M, i))
            fold_tile(tile, n, group.count, j == 0, like)
            if spread:
                fetch_target_tile(t, w, options, classes, group, j, n, tile.u, like)
                linear_tile(tile, n, group.count, like)
        conclude(loss, lse, group, classes, sparse, options, like)
        aim(tile, float(OUT_SHIFT), like)
        for i in range(WIDTH):
            scale = get(table + LOG_S, i) if log else get(table + SCALE, i)
            write(tile.scales + i * size, cast(scale, like))
            write(tile.factors + i * size, cast(get(table + FACTOR, i), like))
        for j in range(0, classes if out.address != 0 else 0, FEW):
            n = min(FEW, classes - j)
            v, u = tile.v, tile.u
            if whole:
                v, u = v + j * line, u + j * line
            else:
                fetch_capped_tile(x, cap, sparse, tile, group, j, n, like)
            if log:
                log_tile(tile, v, n, group.count, like)
            else:
                exp_tile(tile, v, n, group.count, like)
            if spread:
                if not whole:
                    fetch_target_tile(t, w, options, classes, group, j, n, u, like)
                subtract_block(tile.out, u, n * WIDTH, options.scale, like)
            if cap != 0.0:
                multiply_block(tile.out, tile.slope, n * WIDTH, like)
            for i in range(group.count if sparse else 0):
                y = int(get(table + Y, i)) - j
                if get(table + KEPT, i) == 0.0:
                    for c in range(n):
                        write(tile.out + c * line + i * size, cast(0.0, like))
                elif 0 <= y < n:
                    write(tile.out + y * line + i * size, cast(get(table + G_Y, i), like))
            scatter(out, group, j, n, tile.out, like)
        row += group.count
    if out.streamed:
        stream_fence()
    release(memory)
