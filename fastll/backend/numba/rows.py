"""Folds whose class axis is the faster one in memory: row by row, block by block.

A block of `BLOCK` elements stays in the first-level cache from one step to the next. It is read in
place where its memory already is contiguous and of the compute dtype, otherwise through a buffer.

Rows are taken in groups small enough for the second-level cache, where the first pass leaves its
exponentials for the second. Where nothing but a factor is missing from them, the second pass is part of
the next group's first: memory and arithmetic are busy all the time.
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
    fill_block,
    lowest,
    mask_block,
    multiply_block,
    scale_block,
    subtract_block,
    sum_exact,
    target_block,
    weighted_sum_exact,
    weighted_terms,
    zeros,
)
from fastll.backend.numba.folds import driver, has_targets
from fastll.backend.numba.maths import cast, constants, exponential, formulas, window
from fastll.backend.numba.memory import (
    address_of,
    deliver,
    fetch,
    size_of,
    start_of,
    target_of,
    until_line,
)
from fastll.backend.numba.state import (
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
    State,
    get,
    put,
    raise_maximum,
    set_state,
    state_of,
    times,
    usable,
)
from fastll.backend.numba.vector import (
    INLINE,
    first,
    first_lanes,
    for_each,
    inlined,
    lanes_of,
    largest,
    load,
    load_ahead,
    maximum,
    phase,
    power,
    read,
    splat,
    store,
    stream,
    total,
    where_eq,
    widen,
    write,
)
from fastll.contract import BLOCK, GROUP
from fastll.formulas import TERMS
from fastll.formulas.constants import SHIFT

GROUP_SIZE = 1 << 18  # bytes of a group's rows, where there is a second pass
ROW_SIZE = 1 << 19  # bytes of a row up to which its exponentials are kept


class Memory(NamedTuple):
    """Addresses of memory for one call."""

    x: int  # BLOCK elements of the compute dtype, twice
    second: int  # BLOCK elements
    slope: int
    out: int
    tables: int  # of two groups
    references: int  # float64: reference exponent of each block of a row's kept exponentials
    terms: int  # exponentials of two groups, or 0
    pitch: int  # bytes from a row's exponentials to the next one's
    rows: int  # in a group


class Pending(NamedTuple):
    """A row that has been folded and is written, perhaps while the next one is read."""

    source: int  # address of exponentials, or if `log`, of logits
    out: int
    j: int  # the first element that is left
    n: int
    log: bool
    streamed: bool
    peak: float  # the exponential of the maximum; from here on in the compute dtype
    factor: float
    scale: float
    maximum: float
    log_s: float


@njit(**INLINE)
def nothing_pending(like):
    zero = cast(0.0, like)
    return Pending(0, 0, 0, 0, False, False, zero, zero, zero, zero, zero)


@njit(**INLINE)
def rest_of(row, count):
    """The row with `count` elements fewer left."""
    at = row.j + count
    values = row.peak, row.factor, row.scale, row.maximum, row.log_s
    return Pending(row.source, row.out, at, row.n, row.log, row.streamed, *values)


@njit(**INLINE)
def part_of(row, source, out, n):
    """The same for n elements elsewhere."""
    values = row.peak, row.factor, row.scale, row.maximum, row.log_s
    return Pending(source, out, 0, n, row.log, False, *values)


@njit(**INLINE)
def write_vector(row, j, count, whole):
    """Elements j to j + count of a row; `whole` vectors may be streamed."""
    size = size_of(row.scale)
    x = load(row.source + j * size, count, zeros(row.scale))
    if row.log:
        x = formulas.log_probability(x, row.maximum, row.log_s)
    else:
        x = formulas.probability(x, row.peak, row.factor, row.scale)
    if row.streamed and whole:
        stream(row.out + j * size, x)
    else:
        store(row.out + j * size, count, x)


@njit(**INLINE)
def write_rest(row):
    """All that is left of a row."""
    count = lanes_of(row.scale)
    j = row.j
    while j + count <= row.n:
        write_vector(row, j, count, True)
        j += count
    write_vector(row, j, row.n - j, False)


# Folding a block


@njit(**INLINE)
def max_block(v, n, like):
    """The maximum; NaN are passed over."""
    size, top = size_of(like), lowest(like)
    for j in range(0, n, lanes_of(like)):
        top = maximum(load_ahead(v + j * size, n - j, lowest(like)), top)
    return np.float64(largest(top))


@njit(**INLINE)
def add_block(v, n, row, at_top, terms, pending, next_v, next_n, like):
    """The state with a block added, what is left of the pending row, and the next block's maximum.

    Adds the sum of exp(x) / 2**reference; `at_top`: of the elements below the maximum, and counts those
    equal to it. The row that is pending is written and the next block read meanwhile.
    """
    size, count = size_of(like), lanes_of(like)
    none, zero, one = lowest(like), zeros(like), constants(like).one
    top, sums, counts = none, zero, zero
    maxima = splat(cast(row.maximum, like))
    floor, magic = window(row.reference, like)
    ready = (pending.n - pending.j) // count * count
    for j in range(0, n, count):
        if j < next_n:
            top = maximum(load_ahead(next_v + j * size, next_n - j, none), top)
        x = load(v + j * size, n - j, none)
        e = exponential(x, floor, magic)
        if at_top:
            sums = sums + formulas.below_maximum(x, maxima, e)
            counts = counts + formulas.at_maximum(x, maxima, one)
        else:
            sums = sums + e
        if terms != 0:
            store(terms + j * size, count, e)
        if j < ready:
            write_vector(pending, pending.j + j, count, True)
    k, added = row.at_maximum + total(counts), row.added + total(sums) * 2.0**-SHIFT
    written = min(ready, (n + count - 1) // count * count)
    state = State(row.maximum, row.below, k, row.reference, added)
    return state, rest_of(pending, written), np.float64(largest(top))


@njit(**INLINE)
def fold_block(v, n, top, row, terms, pending, next_v, next_n, like):
    """`add_block` for a block with maximum `top`. Leaves its exponentials, unless `terms` is 0."""
    if top > row.maximum:
        row = raise_maximum(row, top)
    if usable(row.maximum):
        at_top = top == row.maximum
        return add_block(v, n, row, at_top, terms, pending, next_v, next_n, like)
    if terms != 0:
        fill_block(terms, n, 0.0, like)  # correct for -inf; never read otherwise
    e, k = sum_exact(v, size_of(like), n, row.maximum, like)
    state = State(row.maximum, row.below + e, row.at_maximum + k, row.reference, row.added)
    return state, pending, max_block(next_v, next_n, like)


@njit(**INLINE)
def add_weighted_block(v, b, n, row, like):
    """Add the sum of b exp(x) / 2**n below the maximum, and that of b over elements equal to it."""
    size = size_of(like)
    if not usable(row.maximum):
        e, k = weighted_sum_exact(v, b, size, n, row.maximum, like)
        return State(row.maximum, row.below + e, row.at_maximum + k, row.reference, row.added)
    maxima = splat(cast(row.maximum, like))
    floor, magic = window(row.reference, like)
    sums, sums_at_top = widen(zeros(like)), widen(zeros(like))
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest(like))
        weight = load_ahead(b + j * size, n - j, zeros(like))
        terms, at_top = weighted_terms(x, weight, maxima, floor, magic)
        sums = sums + terms
        sums_at_top = sums_at_top + at_top
    k, added = row.at_maximum + total(sums_at_top), row.added + total(sums)
    return State(row.maximum, row.below, k, row.reference, added)


@njit(**INLINE)
def fold_weighted_block(v, b, n, row, buffer, like):
    """`fold_block` with weights."""
    mask_block(v, b, n, buffer, like)
    top = max_block(buffer, n, like)
    if top > row.maximum:
        row = raise_maximum(row, top)
    return add_weighted_block(buffer, b, n, row, like)


@njit(**INLINE)
def added_lanes(i, sums, terms):
    return sums[i] + terms[i]


@njit(**INLINE)
def masked_lanes(i, terms, count):
    return first_lanes(terms[i], count)


@njit(**INLINE)
def zero_lanes(i, like):
    return zeros(like)


@njit(**INLINE)
def total_lanes(i, sums):
    return total(sums[i])


def summed(terms, count):
    """A function of a block that returns the sums of the `count` terms of each element.

    terms(x, second, maximum) is a tuple of them.
    """
    added, masked = for_each(added_lanes, count), for_each(masked_lanes, count)
    none, totals = for_each(zero_lanes, count), for_each(total_lanes, count)

    def sum_block(v, second, n, maximum, like):
        size, zero = size_of(like), zeros(like)
        maxima = splat(cast(maximum, like))
        sums = none(like)
        for j in range(0, n, lanes_of(like)):
            x = load_ahead(v + j * size, n - j, zero)
            new = terms(x, load_ahead(second + j * size, n - j, zero), maxima)
            if n - j < lanes_of(like):
                new = masked(new, n - j)
            sums = added(sums, new)
        return totals(sums)

    return inlined(sum_block, f"{terms.__qualname__}_block")


# Folding a row


@njit(**INLINE)
def capped(call, start, j, n, buffer, slope):
    """`fetch`, then the soft cap where there is one; its derivative into `slope` unless that is 0."""
    v, cap = fetch(call.x, start, j, n, buffer, call.like), call.options.softcap
    if cap != 0.0:
        cap_block(v, n, cap, buffer, slope, call.like)
        return buffer
    return v


@njit(**INLINE)
def plain(call, start, j, n, buffer, slope):
    return fetch(call.x, start, j, n, buffer, call.like)


@njit(**INLINE)
def row_of(x, group, i):
    """Address of the first element of row i of a group."""
    return start_of(x, group.outer, group.inner + i)


@njit(**INLINE)
def terms_of(memory, group, i):
    """Address of the exponentials of row i of a group, 0 where they are not kept."""
    if memory.terms == 0:
        return 0
    return memory.terms + (group.half * memory.rows + i) * memory.pitch


@njit(**INLINE)
def align_terms(call, memory, terms, reference):
    """Bring the exponentials of all blocks to the last reference.

    By two factors, as one could be subnormal; what is lost is too small for a result from kept terms.
    """
    limit = -250.0 if lanes_of(call.like) == 32 else -2000.0
    for j in range(0, call.classes, BLOCK):
        lift = max(limit, get(memory.references, j // BLOCK) - reference)
        if lift < 0.0:  # above, the block was not usable: all of it is 0
            half = np.floor(lift * 0.5)
            at, n = terms + j * size_of(call.like), min(BLOCK, call.classes - j)
            scale_block(at, n, power(half), power(lift - half), call.like)


def _fold_row(name, read_block, keeps, after_block, after_row):
    """A function that folds the exponentials of a row, and writes the pending row meanwhile."""

    def next_block(call, memory, start, j):
        """(address, length) of the block of elements from j on; the one before it stays."""
        n = min(BLOCK, call.classes - j)
        buffer = memory.x + j // BLOCK % 2 * BLOCK * size_of(call.like)
        return read_block(call, start, j, n, buffer, 0) if n > 0 else 0, n

    next_block = inlined(next_block, f"{name}_next_block")

    def fold_row(call, memory, group, i, pending):
        like, table, start = call.like, group.table, row_of(call.x, group, i)
        terms = terms_of(memory, group, i) if keeps else 0
        row = state_of(table, i)
        v, n = next_block(call, memory, start, 0)
        top = max_block(v, n, like)
        for j in range(0, call.classes, BLOCK):
            next_v, next_n = next_block(call, memory, start, j + n)
            before = row.maximum
            at = terms + j * size_of(like) if terms != 0 else 0
            row, pending, top = fold_block(v, n, top, row, at, pending, next_v, next_n, like)
            if keeps:
                put(memory.references, j // BLOCK, row.reference)
            after_block(call, memory, group, i, j, n, v, before, row.maximum)
            v, n = next_v, next_n
        set_state(table, i, row)
        if terms != 0:
            align_terms(call, memory, terms, row.reference)
        after_row(call, memory, group, i)
        return pending

    return phase(fold_row)


@njit(**INLINE)
def nothing_after_block(call, memory, group, i, j, n, v, before, maximum):
    pass


@njit(**INLINE)
def nothing_after_row(call, memory, group, i):
    pass


@njit(**INLINE)
def fold_weighted_row(call, memory, group, i):
    x, b, like = call.x, call.second, call.like
    row = state_of(group.table, i)
    for j in range(0, call.classes, BLOCK):
        n = min(BLOCK, call.classes - j)
        v = fetch(x, row_of(x, group, i), j, n, memory.x, like)
        weights = fetch(b, row_of(b, group, i), j, n, memory.second, like)
        row = fold_weighted_block(v, weights, n, row, memory.out, like)
    set_state(group.table, i, row)


@njit(**INLINE)
def fetch_target(call, memory, group, i, j, n):
    """Address of u = w ((1 - eps) t + eps / C) of the contract, or without t, of w eps / C."""
    t, like, eps = call.second, call.like, call.options.label_smoothing
    keep, spread, buffer = 1.0 - eps, eps / call.classes, memory.second
    source = 0
    if t.address != 0:
        source = fetch(t, row_of(t, group, i), j, n, buffer, like)
    weights = call.weight + j * size_of(like) if call.weight != 0 else 0
    if source != 0 and weights == 0 and spread == 0.0:
        return source
    target_block(source, weights, n, keep, spread, buffer, like)
    return buffer


_sum_distances = summed(distance_terms, 2)


@njit(**INLINE)
def add_targets(call, memory, group, i, j, n, v, before, maximum):
    """Distance and mass of a block, for a maximum that was `before`."""
    if has_targets(call):
        table = group.table
        u = fetch_target(call, memory, group, i, j, n)
        finite = maximum if maximum > -np.inf else 0.0
        distance, mass = _sum_distances(v, u, n, finite, call.like)
        mass_before = get(table + MASS, i)
        distance += times(mass_before, maximum - before)
        put(table + DISTANCE, i, get(table + DISTANCE, i) + distance)
        put(table + MASS, i, mass_before + mass)


@njit(**INLINE)
def read_label(call, memory, group, i):
    """The logit at the label, and the derivative of the soft cap there."""
    table, y = group.table, int(get(group.table + LABEL, i))
    if call.labels.address != 0 and get(table + KEPT, i) != 0.0 and y >= 0:
        v = capped(call, row_of(call.x, group, i), y, 1, memory.x, memory.slope)
        put(table + LABEL_LOGIT, i, np.float64(read(v, call.like)))
        if call.options.softcap != 0.0:
            put(table + LABEL_SLOPE, i, np.float64(read(memory.slope, call.like)))


# Writing a row


@njit(**INLINE)
def kept_row(call, memory, group, i):
    """Row i of a group by its exponentials; nothing of it where they are not kept, or do not do.

    They do for a factor of moderate size, for which neither the product nor exponentials that were
    aligned lose a digit of the result.
    """
    table, like = group.table, call.like
    m, scale = get(table + MAXIMUM, i), get(table + SCALE, i)
    source = terms_of(memory, group, i)
    n, most = call.classes, 2.0**-30 if lanes_of(like) == 32 else 2.0**-60
    ordinary = get(table + UNSHIFT, i) == 1.0 and abs(scale) < most
    if source == 0 or not usable(m) or not ordinary:
        n = 0
    floor, magic = window(get(table + REFERENCE, i), like)
    peak, zero = first(exponential(splat(cast(m, like)), floor, magic)), cast(0.0, like)
    values = peak, cast(get(table + FACTOR, i), like), cast(scale, like), zero, zero
    return Pending(source, row_of(call.out, group, i), 0, n, False, call.out.streamed, *values)


@njit(**INLINE)
def logits_row(call, memory, group, i):
    """Row i of a group by its logits, for its log-probabilities."""
    table, like, zero = group.table, call.like, cast(0.0, call.like)
    source, n = row_of(call.x, group, i), call.classes
    values = zero, zero, zero, cast(get(table + MAXIMUM, i), like), cast(get(table + LOG_S, i), like)
    return Pending(source, row_of(call.out, group, i), 0, n, True, call.out.streamed, *values)


@njit(**INLINE)
def until_aligned(row):
    """What is left of a row when its first elements, up to where it may be streamed, are written."""
    if row.streamed:
        head = min(row.n, until_line(row.out, row.scale))
        write_vector(row, 0, head, False)
        return rest_of(row, head)
    return row


@njit(**INLINE)
def pending_probabilities(call, memory, group, i):
    """A row that can be written while another one is read."""
    if i < group.count and memory.terms != 0 and call.out.write == 0:
        return until_aligned(kept_row(call, memory, group, i))
    return nothing_pending(call.like)


@njit(**INLINE)
def pending_logarithms(call, memory, group, i):
    if i < group.count and call.state.address == 0 and call.x.read == 0 and call.out.write == 0:
        return until_aligned(logits_row(call, memory, group, i))
    return nothing_pending(call.like)


@njit(**INLINE)
def pending_gradient(call, memory, group, i):
    if i < group.count and not has_targets(call) and get(group.table + KEPT, i) != 0.0:
        return pending_probabilities(call, memory, group, i)
    return nothing_pending(call.like)


@njit(**INLINE)
def exp_block(v, n, table, i, out, like):
    """factor * exp(x - m) for row i of a group, by new exponentials."""
    size, m, factor = size_of(like), get(table + MAXIMUM, i), get(table + FACTOR, i)
    if not usable(m):
        exp_exact(v, size, n, m, factor, out, like)
        return
    maxima, factor = splat(cast(m, like)), cast(factor, like)
    scale, unshift = cast(get(table + SCALE, i), like), cast(get(table + UNSHIFT, i), like)
    floor, magic = window(get(table + REFERENCE, i), like)
    peaks = exponential(maxima, floor, magic)
    for j in range(0, n, lanes_of(like)):
        e = exponential(load_ahead(v + j * size, n - j, maxima), floor, magic)
        y = where_eq(e, peaks, factor, (e * scale) * unshift)
        store(out + j * size, n - j, y)


def _fill_probabilities(name, read_block):
    def fill(call, memory, group, i, row, j, n, at):
        """factor * exp(x - m) for elements j to j + n of row i, by what is kept of it or anew."""
        if row.n > 0:
            write_rest(part_of(row, row.source + j * size_of(call.like), at, n))
        else:
            v = read_block(call, row_of(call.x, group, i), j, n, memory.x, memory.slope)
            exp_block(v, n, group.table, i, at, call.like)

    return inlined(fill, f"{name}_fill")


@njit(**INLINE)
def fill_logarithms(call, memory, group, i, row, j, n, at):
    v = fetch(call.x, row_of(call.x, group, i), j, n, memory.x, call.like)
    write_rest(part_of(row, v, at, n))


_fill_capped = _fill_probabilities("capped", capped)


@njit(**INLINE)
def fill_gradient(call, memory, group, i, row, j, n, at):
    table, like, y = group.table, call.like, int(get(group.table + LABEL, i)) - j
    if get(table + KEPT, i) == 0.0:
        fill_block(at, n, 0.0, like)
        return
    _fill_capped(call, memory, group, i, row, j, n, at)
    if has_targets(call):
        u = fetch_target(call, memory, group, i, j, n)
        subtract_block(at, u, n, call.options.scale, like)
    if call.options.softcap != 0.0:
        multiply_block(at, memory.slope, n, like)
    if call.labels.address != 0 and 0 <= y < n:
        write(at + y * size_of(like), cast(get(table + LABEL_GRADIENT, i), like))


@njit(**INLINE)
def complete(call, group, i):
    """What a row lacks that was written from its exponentials."""


@njit(**INLINE)
def complete_gradient(call, group, i):
    y = int(get(group.table + LABEL, i))
    if call.labels.address != 0 and y >= 0:
        at = row_of(call.out, group, i) + y * size_of(call.like)
        write(at, cast(get(group.table + LABEL_GRADIENT, i), call.like))


# Walking through the rows of a group


def _walk(name, fold_row, wanted, result, pending, fill, complete):
    """A function that folds the rows of a group while it writes those of the one before."""

    def write_row(call, memory, group, i):
        row, start = result(call, memory, group, i), row_of(call.out, group, i)
        for j in range(0, call.classes, BLOCK):
            n = min(BLOCK, call.classes - j)
            at = target_of(call.out, start, j, memory.out)
            fill(call, memory, group, i, row, j, n, at)
            deliver(call.out, start, j, n, memory.out, call.like)

    write_row = phase(write_row)

    def walk(call, memory, group, before):
        for i in range(max(group.count, before.count)):
            row = pending(call, memory, before, i)
            if i < group.count and wanted(call, group, i):
                row = fold_row(call, memory, group, i, row)
            if i < before.count:
                if row.n > 0:
                    write_rest(row)
                    complete(call, before, i)
                else:
                    write_row(call, memory, before, i)

    return phase(walk)


@njit(**INLINE)
def not_folded(call, group, i):
    return call.state.address == 0


@njit(**INLINE)
def kept_or_asked(call, group, i):
    return get(group.table + KEPT, i) != 0.0 or call.lse.address != 0


_fold_plain = _fold_row("plain", plain, False, nothing_after_block, nothing_after_row)
_fold_kept = _fold_row("kept", plain, True, nothing_after_block, nothing_after_row)
_fold_loss = _fold_row("loss", capped, True, add_targets, read_label)


@phase
def _walk_logsumexp(call, memory, group, before):
    for i in range(group.count):
        if call.second.address == 0:
            _fold_plain(call, memory, group, i, nothing_pending(call.like))
        else:
            fold_weighted_row(call, memory, group, i)


def _walk_sum(operation):
    """A function that folds the terms of an operation of `TERMS`."""
    inputs, formula = TERMS[operation].inputs, getattr(formulas, TERMS[operation].formula.__name__)
    of_one = inlined(lambda x, second, maximum: (formula(x),), f"{operation}_terms")
    of_two = inlined(lambda x, second, maximum: (formula(x, second),), f"{operation}_terms")
    sum_block = summed(of_one if inputs == 1 else of_two, 1)

    def walk(call, memory, group, before):
        x, second, like = call.x, call.second, call.like
        for i in range(group.count):
            value = 0.0
            for j in range(0, call.classes, BLOCK):
                n = min(BLOCK, call.classes - j)
                v = fetch(x, row_of(x, group, i), j, n, memory.x, like)
                u = v
                if inputs == 2:
                    u = fetch(second, row_of(second, group, i), j, n, memory.second, like)
                value += sum_block(v, u, n, 0.0, like)[0]
            put(group.table + VALUE, i, value)

    return phase(walk)


def _allocate(operation):
    """A function that returns the uninitialised `Memory` of a call, and the array that holds it."""
    may_keep = operation in ("softmax", "cross_entropy")

    def allocate(call):
        size = size_of(call.like)
        row, block = call.classes * size, BLOCK * size
        writes, rows, pitch = call.out.address != 0, GROUP, 0
        if writes:
            rows = max(1, min(GROUP, GROUP_SIZE // max(1, row)))
        keeps = may_keep and writes and call.state.address == 0 and call.options.softcap == 0.0
        keeps = keeps and row <= ROW_SIZE
        if keeps:
            pitch = (row + 127) // 128 * 128
        tables = 5 * block
        terms = tables + 2 * END
        references = terms + 2 * rows * pitch
        owner = np.empty(references + (call.classes // BLOCK + 1) * 8 + 64, np.uint8)
        x = (address_of(owner) + 63) // 64 * 64
        memory = Memory(
            x,
            x + 2 * block,
            x + 3 * block,
            x + 4 * block,
            x + tables,
            x + references,
            x + terms if keeps else 0,
            pitch,
            rows,
        )
        return memory, owner

    return inlined(allocate, f"{operation}_allocate")


@njit(**INLINE)
def _rows_at_once(call, memory, row):
    return memory.rows


_WALKS = {
    "logsumexp": _walk_logsumexp,
    "softmax": _walk(
        "softmax",
        _fold_kept,
        not_folded,
        kept_row,
        pending_probabilities,
        _fill_probabilities("plain", plain),
        complete,
    ),
    "log_softmax": _walk(
        "log_softmax",
        _fold_plain,
        not_folded,
        logits_row,
        pending_logarithms,
        fill_logarithms,
        complete,
    ),
    "cross_entropy": _walk(
        "cross_entropy",
        _fold_loss,
        kept_or_asked,
        kept_row,
        pending_gradient,
        fill_gradient,
        complete_gradient,
    ),
}


@cache
def kernel(operation):
    """The kernel of an operation."""
    walk = _WALKS[operation] if operation in _WALKS else _walk_sum(operation)
    return driver("rows", operation, _allocate(operation), _rows_at_once, walk)
