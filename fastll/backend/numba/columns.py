"""Folds whose class axis is the slower one in memory: class by class, many rows at a time.

`GROUP` neighbouring rows make a tile: a block of `BLOCK` classes of each, gathered so that the rows are
contiguous, and handled with one row per lane. Each row's sum keeps the order of the contract (element j
of a block in accumulator j modulo the number of lanes), so that a row has the same result, to the bit,
in either layout.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.blocks import (
    cap_block,
    distance_terms,
    exp_exact,
    lowest,
    mask_block,
    multiply_block,
    subtract_block,
    sum_exact,
    target_block,
    weighted_sum_exact,
    weighted_terms,
    zeros,
)
from fastll.backend.numba.folds import driver, has_targets
from fastll.backend.numba.maths import cast, constants, exponential, formulas, window
from fastll.backend.numba.memory import address_of, size_of, start_of, until_line
from fastll.backend.numba.state import (
    ADDED,
    AT_MAXIMUM,
    BELOW,
    DISTANCE,
    END,
    FACTOR,
    KEPT,
    LABEL,
    LABEL_GRADIENT,
    LABEL_LOGIT,
    LABEL_SLOPE,
    LOG_S,
    MASS,
    MAXIMUM,
    REFERENCE,
    SCALE,
    UNSHIFT,
    VALUE,
    get,
    lanes,
    put,
    put_lanes,
    raise_maximum,
    reference_of,
    set_state,
    state_of,
    times,
    usable,
)
from fastll.backend.numba.vector import (
    INLINE,
    bytes_of,
    for_each,
    inlined,
    lanes_of,
    load,
    maximum,
    phase,
    prefetch_vector,
    read,
    splat,
    store,
    stream,
    where_eq,
    widen,
    write,
)
from fastll.backend.numba.vector import (
    call as call_address,
)
from fastll.contract import BLOCK, GROUP
from fastll.formulas import TERMS
from fastll.formulas.constants import SHIFT

FEW = 32  # classes that are written at a time
LINES_AHEAD = 8  # classes from the one that is read or written to the one that is prefetched


class Tile(NamedTuple):
    """Addresses of memory for one call; vectors are of the compute dtype unless said otherwise."""

    tables: int  # of two groups
    x: int  # logits, capped
    second: int  # weights or targets
    slope: int  # of FEW classes: derivatives of the soft cap
    out: int  # of FEW classes
    maxima: int  # one number per row; so down to `log_s`
    floors: int  # of `window`
    magics: int
    factors: int
    scales: int
    unshifts: int
    log_s: int
    sums: int  # an accumulator, of one number per row, for each lane; twice
    more_sums: int
    wide: int  # the sums on their way to one, in float64
    totals: int  # float64, one number per row, twice
    before: int  # float64: the maxima of before


@njit(**INLINE)
def allocate_tile(call, both):
    """An uninitialised `Tile`, with or without `second`, and the array that holds it."""
    like, line = call.like, GROUP * size_of(call.like)
    accumulators = lanes_of(like) * bytes_of(widen(splat(like)))
    tile = min(BLOCK, call.classes) * line
    slope = 2 * END
    lines = slope + 2 * FEW * line
    sums = lines + 7 * line
    totals = sums + 3 * accumulators
    x = totals + 3 * GROUP * 8
    owner = np.empty(x + (2 * tile if both else tile) + 64, np.uint8)
    at = (address_of(owner) + 63) // 64 * 64
    result = Tile(
        at,
        at + x,
        at + x + tile if both else at + x,
        at + slope,
        at + slope + FEW * line,
        at + lines,
        at + lines + line,
        at + lines + 2 * line,
        at + lines + 3 * line,
        at + lines + 4 * line,
        at + lines + 5 * line,
        at + lines + 6 * line,
        at + sums,
        at + sums + accumulators,
        at + sums + 2 * accumulators,
        at + totals,
        at + totals + 2 * GROUP * 8,
    )
    return result, owner


@njit(**INLINE)
def load_line(address, w, like):
    """The vector of rows from w on."""
    return load(address + w * size_of(like), lanes_of(like), zeros(like))


@njit(**INLINE)
def at_of(tile, j, w, like):
    """Address of class j of row w."""
    return tile + (j * GROUP + w) * size_of(like)


@njit(**INLINE)
def gather(x, group, j, n, tile, like):
    """Classes j to j + n of the rows into a tile: class by class, GROUP rows apart."""
    size, count, zero = size_of(like), group.count, zeros(like)
    source = start_of(x, group.outer, group.inner) + j * x.classes
    for i in range(n):
        line = at_of(tile, i, 0, like)
        if x.read == 0:
            for w in range(0, count, lanes_of(like)):
                prefetch_vector(source + LINES_AHEAD * x.classes + w * size)
                store(line + w * size, count - w, load(source + w * size, count - w, zero))
        else:
            call_address(x.read, source, x.inner, line, size, count)
        source += x.classes


@njit(**INLINE)
def scatter(x, group, j, n, tile, like):
    """A tile back into classes j to j + n of the rows."""
    size, count, zero = size_of(like), group.count, zeros(like)
    target = start_of(x, group.outer, group.inner) + j * x.classes
    for i in range(n):
        line = at_of(tile, i, 0, like)
        if x.write != 0:
            call_address(x.write, line, size, target, x.inner, count)
        elif x.streamed and count == GROUP and target % 64 == 0:
            for w in range(0, GROUP, lanes_of(like)):
                stream(target + w * size, load(line + w * size, lanes_of(like), zero))
        else:
            for w in range(0, count, lanes_of(like)):
                prefetch_vector(target + LINES_AHEAD * x.classes + w * size)
                store(target + w * size, count - w, load(line + w * size, count - w, zero))
        target += x.classes


# Sums


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
    count, zero_wide = lanes_of(zero), widen(zero)
    size, wide_size = bytes_of(zero), bytes_of(zero_wide)
    used = min(n, count)
    for i in range(used):
        v = widen(load(accumulators + i * size, count, zero))
        store(wide + i * wide_size, count, v)
    half = count // 2
    while half > 0:
        for i in range(half, used):
            at = wide + (i - half) * wide_size
            other = load(wide + i * wide_size, count, zero_wide)
            store(at, count, load(at, count, zero_wide) + other)
        used = min(used, half)
        half //= 2


@njit(**INLINE)
def clear_sums(i, tile, zero):
    clear(tile.sums + i * (tile.more_sums - tile.sums), zero)


@njit(**INLINE)
def accumulate_sums(i, tile, j, terms):
    accumulate(tile.sums + i * (tile.more_sums - tile.sums), j, terms[i])


@njit(**INLINE)
def fold_totals(i, tile, n, w, zero):
    fold_sums(tile.sums + i * (tile.more_sums - tile.sums), n, zero, tile.wide)
    sums = load(tile.wide, lanes_of(zero), widen(zero))
    store(tile.totals + (i * GROUP + w) * 8, lanes_of(zero), sums)


def summed(terms, count):
    """`rows.summed` for the rows of a tile; leaves the sums as totals."""
    clear_all, fold_all = for_each(clear_sums, count), for_each(fold_totals, count)
    accumulate_all = for_each(accumulate_sums, count)

    def sum_tile(tile, second, n, rows, like):
        zero = zeros(like)
        for w in range(0, rows, lanes_of(like)):
            maxima = load_line(tile.maxima, w, like)
            clear_all(tile, zero)
            for j in range(n):
                x = load(at_of(tile.x, j, w, like), lanes_of(like), zero)
                other = load(at_of(second, j, w, like), lanes_of(like), zero)
                accumulate_all(tile, j, terms(x, other, maxima))
            fold_all(tile, n, w, zero)

    return inlined(sum_tile, f"{terms.__qualname__}_tile")


# Folding a tile


@njit(**INLINE)
def aim(tile, table, like):
    """The references of the rows, a vector each."""
    size = size_of(like)
    for i in range(GROUP):
        floor, magic = window(get(table + REFERENCE, i), like)
        write(tile.maxima + i * size, cast(get(table + MAXIMUM, i), like))
        write(tile.floors + i * size, floor)
        write(tile.magics + i * size, magic)


@njit(**INLINE)
def raise_maxima(tile, table, n, rows, fresh, like):
    """The rows' maxima with those of a tile; `fresh` rows have none yet."""
    size = size_of(like)
    for w in range(0, GROUP, lanes_of(like)):
        top = lowest(like)
        for j in range(n):
            top = maximum(load(at_of(tile.x, j, w, like), lanes_of(like), top), top)
        store(tile.maxima + w * size, lanes_of(like), top)
    if fresh:
        for i in range(GROUP):
            put(table + MAXIMUM, i, np.float64(read(tile.maxima + i * size, like)))
        for i in range(0, GROUP, lanes_of(0.0)):
            put_lanes(table + REFERENCE, i, reference_of(lanes(table + MAXIMUM, i)))
    else:
        for i in range(rows):
            top = np.float64(read(tile.maxima + i * size, like))
            if top > get(table + MAXIMUM, i):
                set_state(table, i, raise_maximum(state_of(table, i), top))


@njit(**INLINE)
def fold_tile(tile, table, n, rows, fresh, like):
    """`rows.fold_block` for the rows of a tile."""
    size, zero, one = size_of(like), zeros(like), constants(like).one
    raise_maxima(tile, table, n, rows, fresh, like)
    aim(tile, table, like)
    for w in range(0, rows, lanes_of(like)):
        maxima = load_line(tile.maxima, w, like)
        floors, magics = load_line(tile.floors, w, like), load_line(tile.magics, w, like)
        clear(tile.sums, zero)
        counts = zero
        for j in range(n):
            x = load(at_of(tile.x, j, w, like), lanes_of(like), zero)
            e = formulas.below_maximum(x, maxima, exponential(x, floors, magics))
            accumulate(tile.sums, j, e)
            counts = counts + formulas.at_maximum(x, maxima, one)
        fold_sums(tile.sums, n, zero, tile.wide)
        store(tile.sums, lanes_of(like), counts)
        for i in range(w, min(rows, w + lanes_of(like))):
            m = get(table + MAXIMUM, i)
            if usable(m):
                others = read(tile.wide + (i - w) * 8, 0.0) * 2.0**-SHIFT
                put(table + ADDED, i, get(table + ADDED, i) + others)
                k = np.float64(read(tile.sums + (i - w) * size, like))
            else:
                e, k = sum_exact(tile.x + i * size, GROUP * size, n, m, like)
                put(table + BELOW, i, get(table + BELOW, i) + e)
            put(table + AT_MAXIMUM, i, get(table + AT_MAXIMUM, i) + k)


@njit(**INLINE)
def fold_weighted_tile(tile, table, n, rows, like):
    """`rows.fold_weighted_block` for the rows of a tile."""
    size, zero = size_of(like), zeros(like)
    mask_block(tile.x, tile.second, n * GROUP, tile.x, like)
    raise_maxima(tile, table, n, rows, False, like)
    aim(tile, table, like)
    for w in range(0, rows, lanes_of(like)):
        maxima = load_line(tile.maxima, w, like)
        floors, magics = load_line(tile.floors, w, like), load_line(tile.magics, w, like)
        clear(tile.sums, widen(zero))
        clear(tile.more_sums, widen(zero))
        for j in range(n):
            x = load(at_of(tile.x, j, w, like), lanes_of(like), zero)
            weight = load(at_of(tile.second, j, w, like), lanes_of(like), zero)
            terms, at_top = weighted_terms(x, weight, maxima, floors, magics)
            accumulate(tile.sums, j, terms)
            accumulate(tile.more_sums, j, at_top)
        fold_sums(tile.sums, n, widen(zero), tile.wide)
        fold_sums(tile.more_sums, n, widen(zero), tile.sums)
        for i in range(w, min(rows, w + lanes_of(like))):
            m, column = get(table + MAXIMUM, i), ADDED
            e, k = read(tile.wide + (i - w) * 8, 0.0), read(tile.sums + (i - w) * 8, 0.0)
            if not usable(m):
                column = BELOW
                v, b = tile.x + i * size, tile.second + i * size
                e, k = weighted_sum_exact(v, b, GROUP * size, n, m, like)
            put(table + column, i, get(table + column, i) + e)
            put(table + AT_MAXIMUM, i, get(table + AT_MAXIMUM, i) + k)


# Reading and folding the rows of a group


@njit(**INLINE)
def plain(call, tile, group, j, n):
    gather(call.x, group, j, n, tile.x, call.like)


@njit(**INLINE)
def capped(call, tile, group, j, n):
    """`rows.capped` for a tile, and what is at the labels."""
    table, like, cap = group.table, call.like, call.options.softcap
    labelled = group.count if call.labels.address != 0 else 0
    gather(call.x, group, j, n, tile.x, like)
    for part in range(0, n if cap != 0.0 else 0, FEW):
        count, at = min(n - part, FEW), at_of(tile.x, part, 0, like)
        cap_block(at, count * GROUP, cap, at, tile.slope, like)
        for i in range(labelled):
            y = int(get(table + LABEL, i)) - j - part
            if 0 <= y < count:
                put(table + LABEL_SLOPE, i, np.float64(read(at_of(tile.slope, y, i, like), like)))
    for i in range(labelled):
        y = int(get(table + LABEL, i)) - j
        if 0 <= y < n:
            put(table + LABEL_LOGIT, i, np.float64(read(at_of(tile.x, y, i, like), like)))


@njit(**INLINE)
def fetch_target(call, group, j, n, u):
    """`rows.fetch_target` for a tile."""
    like, eps, zero = call.like, call.options.label_smoothing, zeros(call.like)
    source = 0
    if call.second.address != 0:
        gather(call.second, group, j, n, u, like)
        source = u
    target_block(source, 0, n * GROUP, 1.0 - eps, eps / call.classes, u, like)
    if call.weight != 0:
        for i in range(n):
            weight = read(call.weight + (j + i) * size_of(like), like)
            for w in range(0, GROUP, lanes_of(like)):
                at = at_of(u, i, w, like)
                store(at, lanes_of(like), load(at, lanes_of(like), zero) * weight)


_sum_distances = summed(distance_terms, 2)


@njit(**INLINE)
def add_targets(call, tile, group, j, n):
    """Distances and masses of a tile, for maxima that were those of before."""
    if has_targets(call):
        table, like, size = group.table, call.like, size_of(call.like)
        fetch_target(call, group, j, n, tile.second)
        for i in range(GROUP):
            m = get(table + MAXIMUM, i)
            write(tile.maxima + i * size, cast(m if m > -np.inf else 0.0, like))
        _sum_distances(tile, tile.second, n, group.count, like)
        for i in range(group.count):
            rise, mass = get(table + MAXIMUM, i) - get(tile.before, i), get(table + MASS, i)
            distance = times(mass, rise) + get(tile.totals, i)
            put(table + DISTANCE, i, get(table + DISTANCE, i) + distance)
            put(table + MASS, i, mass + get(tile.totals + GROUP * 8, i))


@njit(**INLINE)
def nothing_after_block(call, tile, group, j, n):
    pass


def _fold_group(name, read_block, after_block):
    """A function that folds the exponentials of a group of rows."""

    def fold_group(call, tile, group):
        table, fresh = group.table, call.state.address == 0
        for j in range(0, call.classes, BLOCK):
            n = min(BLOCK, call.classes - j)
            read_block(call, tile, group, j, n)
            for i in range(0, GROUP, lanes_of(0.0)):
                put_lanes(tile.before, i, lanes(table + MAXIMUM, i))
            fold_tile(tile, table, n, group.count, fresh and j == 0, call.like)
            after_block(call, tile, group, j, n)

    return phase(fold_group)


@njit(**INLINE)
def fold_weighted_group(call, tile, group):
    for j in range(0, call.classes, BLOCK):
        n = min(BLOCK, call.classes - j)
        gather(call.x, group, j, n, tile.x, call.like)
        gather(call.second, group, j, n, tile.second, call.like)
        fold_weighted_tile(tile, group.table, n, group.count, call.like)


# Writing the rows of a group


@njit(**INLINE)
def exp_tile(tile, table, x, n, rows, like):
    """`rows.exp_block` for the rows of a tile."""
    size, zero = size_of(like), zeros(like)
    for w in range(0, rows, lanes_of(like)):
        floors, magics = load_line(tile.floors, w, like), load_line(tile.magics, w, like)
        peaks = exponential(load_line(tile.maxima, w, like), floors, magics)
        factors, scales = load_line(tile.factors, w, like), load_line(tile.scales, w, like)
        unshifts = load_line(tile.unshifts, w, like)
        for j in range(n):
            e = exponential(load(at_of(x, j, w, like), lanes_of(like), zero), floors, magics)
            y = where_eq(e, peaks, factors, (e * scales) * unshifts)
            store(at_of(tile.out, j, w, like), lanes_of(like), y)
    for i in range(rows):
        m = get(table + MAXIMUM, i)
        if not usable(m):
            v, out, factor = x + i * size, tile.out + i * size, get(table + FACTOR, i)
            exp_exact(v, GROUP * size, n, m, factor, out, like)


@njit(**INLINE)
def fill_probabilities(call, tile, group, x, second, j, n):
    exp_tile(tile, group.table, x, n, group.count, call.like)


@njit(**INLINE)
def fill_logarithms(call, tile, group, x, second, j, n):
    like = call.like
    for w in range(0, group.count, lanes_of(like)):
        maxima, log_s = load_line(tile.maxima, w, like), load_line(tile.log_s, w, like)
        for i in range(n):
            logits = load(at_of(x, i, w, like), lanes_of(like), maxima)
            y = formulas.log_probability(logits, maxima, log_s)
            store(at_of(tile.out, i, w, like), lanes_of(like), y)


@njit(**INLINE)
def fill_gradient(call, tile, group, x, second, j, n):
    table, like, cap = group.table, call.like, call.options.softcap
    exp_tile(tile, table, x, n, group.count, like)
    if has_targets(call):
        if cap != 0.0 or call.classes > BLOCK:  # the tile does not hold them any more
            fetch_target(call, group, j, n, second)
        subtract_block(tile.out, second, n * GROUP, call.options.scale, like)
    if cap != 0.0:
        multiply_block(tile.out, tile.slope, n * GROUP, like)
    for i in range(group.count if call.labels.address != 0 else 0):
        y = int(get(table + LABEL, i)) - j
        if get(table + KEPT, i) == 0.0:
            for c in range(n):
                write(at_of(tile.out, c, i, like), cast(0.0, like))
        elif 0 <= y < n:
            write(at_of(tile.out, y, i, like), cast(get(table + LABEL_GRADIENT, i), like))


def _write_group(name, read_block, fill):
    """A function that writes the rows of a group, a few classes at a time."""

    def write_group(call, tile, group):
        table, like, size = group.table, call.like, size_of(call.like)
        whole = call.classes <= BLOCK and call.state.address == 0 and call.options.softcap == 0.0
        aim(tile, table, like)
        for i in range(GROUP):
            write(tile.factors + i * size, cast(get(table + FACTOR, i), like))
            write(tile.scales + i * size, cast(get(table + SCALE, i), like))
            write(tile.unshifts + i * size, cast(get(table + UNSHIFT, i), like))
            write(tile.log_s + i * size, cast(get(table + LOG_S, i), like))
        for j in range(0, call.classes, FEW):
            n = min(FEW, call.classes - j)
            if whole:  # the tiles keep what they hold
                x, second = at_of(tile.x, j, 0, like), at_of(tile.second, j, 0, like)
            else:
                x, second = tile.x, tile.second
                read_block(call, tile, group, j, n)
            fill(call, tile, group, x, second, j, n)
            scatter(call.out, group, j, n, tile.out, like)

    return phase(write_group)


def _walk(name, read_block, after_block, fill):
    """A function that writes the group before and folds the next one."""
    fold_group = _fold_group(name, read_block, after_block)
    write_group = _write_group(name, read_block, fill)

    def walk(call, tile, group, before):
        if before.count > 0:
            write_group(call, tile, before)
        if group.count > 0 and call.state.address == 0:
            fold_group(call, tile, group)

    return phase(walk)


_fold_plain = _fold_group("plain", plain, nothing_after_block)


@phase
def _walk_logsumexp(call, tile, group, before):
    if call.second.address == 0:
        _fold_plain(call, tile, group)
    else:
        fold_weighted_group(call, tile, group)


def _walk_sum(operation):
    """A function that folds the terms of an operation of `TERMS`."""
    inputs, formula = TERMS[operation].inputs, getattr(formulas, TERMS[operation].formula.__name__)
    of_one = inlined(lambda x, second, maximum: (formula(x),), f"{operation}_terms")
    of_two = inlined(lambda x, second, maximum: (formula(x, second),), f"{operation}_terms")
    sum_tile = summed(of_one if inputs == 1 else of_two, 1)

    def walk(call, tile, group, before):
        for j in range(0, call.classes, BLOCK):
            n = min(BLOCK, call.classes - j)
            gather(call.x, group, j, n, tile.x, call.like)
            if inputs == 2:
                gather(call.second, group, j, n, tile.second, call.like)
            sum_tile(tile, tile.second, n, group.count, call.like)
            for i in range(group.count):
                put(group.table + VALUE, i, get(group.table + VALUE, i) + get(tile.totals, i))

    return phase(walk)


@njit(**INLINE)
def _allocate(call):
    return allocate_tile(call, call.second.address != 0)


@njit(**INLINE)
def _allocate_targets(call):
    return allocate_tile(call, has_targets(call))


@njit(**INLINE)
def _rows_at_once(call, tile, row):
    """Where lines are streamed, so many that the other groups begin at lines."""
    if call.out.streamed:
        at = start_of(call.out, row // call.inner, row % call.inner)
        return until_line(at, call.like) or GROUP
    return GROUP


_WALKS = {
    "logsumexp": _walk_logsumexp,
    "softmax": _walk("softmax", plain, nothing_after_block, fill_probabilities),
    "log_softmax": _walk("log_softmax", plain, nothing_after_block, fill_logarithms),
    "cross_entropy": _walk("cross_entropy", capped, add_targets, fill_gradient),
}


@cache
def kernel(operation):
    """The kernel of an operation."""
    walk = _WALKS[operation] if operation in _WALKS else _walk_sum(operation)
    allocate = _allocate_targets if operation == "cross_entropy" else _allocate
    return driver("columns", operation, allocate, _rows_at_once, walk)
