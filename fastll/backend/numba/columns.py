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

from fastll.backend.numba import blocks, one_block, state, vector
from fastll.backend.numba.folds import AVERAGES, PAIRED, TEMPERED, driver, has_targets, logit
from fastll.backend.numba.maths import cast, constants, exponential, formulas, lowest, window, zeros
from fastll.backend.numba.memory import allocate, start_of, until_line
from fastll.backend.numba.state import (
    TABLE_SIZE,
    finite,
    narrow_rows_of,
    row_of,
    rows_of,
    usable,
)
from fastll.backend.numba.tiles import at_of, gather, scatter, size_of_rows, size_of_tile
from fastll.backend.numba.vector import bytes_of, inline, lanes_of, read, size_of, write
from fastll.contract import BLOCK, GROUP, SHORT
from fastll.formulas import TERMS
from fastll.formulas.constants import SHIFT

FEW = SHORT  # classes that are written at a time
# bytes between pieces of memory: addresses that are a multiple of 4096 apart hinder each other
APART = 1024


class Tile(NamedTuple):
    """Addresses of memory for one call; numbers are of the compute dtype unless said otherwise."""

    tables: int  # of two groups; of target logits, two more
    narrow: int  # a table of what the elements' exponentials take, in the compute dtype; likewise
    slope: int  # of FEW classes: derivatives of the soft cap, probabilities of target logits
    out: int  # of FEW classes
    sums: int  # an accumulator, of one number per row, for each lane; twice
    more_sums: int
    wide: int  # the sums on their way to one, in float64
    x: int  # logits, capped
    second: int  # weights or targets, where there are any
    rows: int  # short ones, one after the other


def _allocate(operation):
    """A function that returns the uninitialised `Tile` of a call, and the array that holds it."""
    tables = 2 if operation == PAIRED else 1

    def allocate_tile(call):
        like, classes, table = call.like, call.classes, tables * TABLE_SIZE
        tile, few = size_of_tile(min(BLOCK, classes), like), size_of_tile(min(FEW, classes), like)
        sums = lanes_of(like) * bytes_of(vector.widen(zeros(like))) + 2 * APART
        second = tile if has_targets(call) else 0
        few, rows = few + APART, size_of_rows(call)
        sizes = (2 * table, table, few, few, sums, sums, sums, tile + APART, second, rows)
        owner, pieces = allocate(sizes)
        return Tile(*pieces), owner

    return vector.inlined(allocate_tile, f"{operation}_allocate")


# Sums


@inline
def where_finite(maxima):
    """`finite` of rows."""
    return vector.where_gt(maxima, -np.inf, maxima, 0.0)


@inline
def lanes_in(call):
    """The number of lanes that exponentials are summed in: those of a short row are one lane."""
    return 1 if call.classes < SHORT else lanes_of(call.like)


@inline
def clear(accumulators, zero, lanes):
    """Set all of them to the vector `zero`."""
    for i in range(lanes):
        write(accumulators + i * bytes_of(zero), zero)


@inline
def accumulate(accumulators, j, v, lanes):
    """Add the vector of element j of a block."""
    at = accumulators + (j & (lanes - 1)) * bytes_of(v)
    write(at, read(at, v) + v)


@inline
def fold_halves(at, zero, lanes):
    """The sum of vectors, by halves."""
    size, half = bytes_of(zero), lanes // 2
    while half > 0:
        for i in range(half):
            low = at + i * size
            write(low, read(low, zero) + read(low + half * size, zero))
        half //= 2
    return read(at, zero)


@inline
def fold_sums(accumulators, zero, wide, lanes):
    """The sums in float64, as which they are folded at `wide`."""
    size, none = bytes_of(zero), vector.widen(zero)
    for i in range(lanes):
        write(wide + i * bytes_of(none), vector.widen(read(accumulators + i * size, zero)))
    return fold_halves(wide, none, lanes)


def _summed(terms, count):
    """`rows._summed` for the rows from w on of a tile; a pair of which `count` are summed."""

    def sum_rows(tile, second, w, n, zero, arguments, lanes, like):
        vector.out_of_line()  # a number of lanes that is known would unroll all loops over them
        pad = zeros(like)
        clear(tile.sums, zero, lanes)
        if count == 2:
            clear(tile.more_sums, zero, lanes)
        for j in range(n):
            x, y = read(at_of(tile.x, j, w, like), pad), read(at_of(second, j, w, like), pad)
            term, other = terms(x, y, *arguments)
            accumulate(tile.sums, j, term, lanes)
            if count == 2:
                accumulate(tile.more_sums, j, other, lanes)
        sums = fold_sums(tile.sums, zero, tile.wide, lanes)
        return sums, fold_sums(tile.more_sums, zero, tile.wide, lanes) if count == 2 else sums

    return vector.shared_as(sum_rows, f"{terms.__qualname__}_rows")


_sum_distances, _sum_weighted = _summed(blocks.distance_terms, 2), _summed(blocks.weighted_terms, 2)


# Folding a tile


class Average(NamedTuple):
    """`rows.Average` for a tile."""

    wanted: bool
    logits: int  # tile of x, 0: none
    table: int  # of its rows


NO_AVERAGE, ENTROPY = Average(False, 0, 0), Average(True, 0, 0)


@inline
def aim(narrow_table, table, like):
    """Maxima and windows of the exponential as vectors of the compute dtype."""
    for w in range(0, GROUP, lanes_of(like)):
        rows, narrow = rows_of(table, w, like), narrow_rows_of(narrow_table, w, like)
        narrow.maximum = rows.maximum
        narrow.floor, narrow.magic = window(rows.reference, like)


@inline
def raise_maxima(tile, v, table, average, n, count, fresh, like):
    """The rows' maxima with those of a tile; `fresh` rows have none yet."""
    for w in range(0, GROUP, lanes_of(like)):
        top = lowest(like)
        for j in range(n):
            top = vector.maximum(read(at_of(v, j, w, like), top), top)
        rows = rows_of(table, w, like)
        rows.before = rows.maximum
        rows.top = top
        if fresh:
            rows.maximum = rows.top
            rows.reference = state.reference_of(rows.maximum)
    for i in range(0 if fresh else count):
        row = row_of(table, i)
        growth = 0.0
        if average.logits != 0:
            other = row_of(average.table, i)
            growth = finite(other.maximum) - finite(other.before)
        if row.top > row.maximum:
            rise = row.top - finite(row.maximum)
            growth = growth - rise if average.logits != 0 else rise
            state.raise_maximum(row, row.top, average.wanted, growth)
        elif average.wanted:
            state.move_distances(row, growth)
    aim(tile.narrow, table, like)


@inline
def add_sums(rows, added, k):
    """Add sums to rows whose maximum is usable."""
    rows.added = rows.added + state.where_usable(rows.maximum, added, 0.0)
    rows.at_maximum = rows.at_maximum + state.where_usable(rows.maximum, k, 0.0)


@inline
def fold_tile(tile, v, table, average, n, count, fresh, lanes, like):
    """`rows.fold_block` for the rows of a tile."""
    size, zero, one = size_of(like), zeros(like), constants(like).one
    raise_maxima(tile, v, table, average, n, count, fresh, like)
    for w in range(0, count, lanes_of(like)):
        rows, narrow = rows_of(table, w, like), narrow_rows_of(tile.narrow, w, like)
        maxima, floors, magics = narrow.maximum, narrow.floor, narrow.magic
        clear(tile.sums, zero, lanes)
        counts = other_maxima = zero
        if average.wanted:
            clear(tile.more_sums, zero, lanes)
        if average.logits != 0:
            other_maxima = cast(where_finite(rows_of(average.table, w, like).maximum), like)
        for j in range(n):
            x = read(at_of(v, j, w, like), zero)
            e = exponential(x, floors, magics)
            if average.wanted:
                if average.logits != 0:
                    other = read(at_of(average.logits, j, w, like), zero)
                    term = blocks.divergence_term(e, x, maxima, other, other_maxima)
                else:
                    term = blocks.entropy_term(e, x, maxima, floors)
                accumulate(tile.more_sums, j, term, lanes)
            accumulate(tile.sums, j, formulas.below_maximum(x, maxima, e), lanes)
            counts = counts + formulas.at_maximum(x, maxima, one)
        sums = vector.widen(fold_halves(tile.sums, zero, lanes))
        add_sums(rows, sums * 2.0**-SHIFT, vector.widen(counts))
        if average.wanted:
            away = fold_sums(tile.more_sums, zero, tile.wide, lanes) * 2.0**-SHIFT
            rows.away_added = rows.away_added + state.where_usable(rows.maximum, away, 0.0)
    for i in range(count):
        row = row_of(table, i)
        if not usable(row.maximum):
            at = v + i * size
            blocks.add_exactly(row, at, one, GROUP * size, n, like)
            if average.wanted:
                other, maximum = 0, 0.0
                if average.logits != 0:
                    other = average.logits + i * size
                    maximum = finite(row_of(average.table, i).maximum)
                blocks.add_distances_exactly(row, at, other, maximum, one, GROUP * size, n, like)


@inline
def fold_weighted_tile(tile, table, n, count, lanes, like):
    """`rows.fold_weighted_row` for a block of the rows of a tile."""
    size, zero = size_of(like), vector.widen(zeros(like))
    blocks.mask(tile.x, tile.second, n * GROUP, tile.x, like)
    raise_maxima(tile, tile.x, table, NO_AVERAGE, n, count, False, like)
    for w in range(0, count, lanes_of(like)):
        narrow = narrow_rows_of(tile.narrow, w, like)
        arguments = narrow.maximum, narrow.floor, narrow.magic
        added, k = _sum_weighted(tile, tile.second, w, n, zero, arguments, lanes, like)
        rows = rows_of(table, w, like)
        # NaN where a weight is infinite or NaN; the maximum of the tile is not needed any more
        rows.top = finite = (added + k) * 0.0
        add_sums(rows, vector.where_eq(finite, 0.0, added, 0.0), vector.where_eq(finite, 0.0, k, 0.0))
    for i in range(count):
        row = row_of(table, i)
        if not usable(row.maximum) or row.top != 0.0:
            v, b = tile.x + i * size, tile.second + i * size
            blocks.add_weighted_exactly(row, v, b, GROUP * size, n, like)


# Reading and folding the rows of a group


@vector.phase
def plain(call, x, tile, v, group, j, n):
    gather(call, x, group, j, n, v, tile.rows)


@inline
def tempered(call, x, tile, v, group, j, n):
    """`plain`, then by the inverse temperature."""
    gather(call, x, group, j, n, v, tile.rows)
    if call.options.inverse_temperature != 1.0:
        blocks.scale(v, n * GROUP, call.options.inverse_temperature, 1.0, v, call.like)


@inline
def capped(call, x, tile, v, group, j, n):
    """`rows.capped` for a tile, and what is at the labels."""
    like, cap = call.like, call.options.softcap
    labelled = group.count if call.labels.address != 0 else 0
    gather(call, x, group, j, n, v, tile.rows)
    for part in range(0, n if cap != 0.0 else 0, FEW):
        few, at = min(n - part, FEW), at_of(v, part, 0, like)
        blocks.cap(at, few * GROUP, cap, at, tile.slope, like)
        for i in range(labelled):
            row = row_of(group.table, i)
            y = int(row.label) - j - part
            if 0 <= y < few:
                row.label_slope = read(at_of(tile.slope, y, i, like), like)
    for i in range(labelled):
        row = row_of(group.table, i)
        y = int(row.label) - j
        if 0 <= y < n:
            row.label_logit = read(at_of(v, y, i, like), like)


@inline
def fetch_target(call, tile, group, j, n, u):
    """`rows.fetch_target` for a tile."""
    like, eps, zero = call.like, call.options.label_smoothing, zeros(call.like)
    source = 0
    if call.second.address != 0:
        gather(call, call.second, group, j, n, u, tile.rows)
        source = u
    blocks.target(source, 0, n * GROUP, 1.0 - eps, eps / call.classes, u, like)
    if call.weight != 0:
        for i in range(n):
            weight = read(call.weight + (j + i) * size_of(like), like)
            for w in range(0, GROUP, lanes_of(like)):
                at = at_of(u, i, w, like)
                write(at, read(at, zero) * weight)


@inline
def add_targets(call, tile, group, j, n):
    """`rows.add_targets` for a tile."""
    like = call.like
    fetch_target(call, tile, group, j, n, tile.second)
    for w in range(0, group.count, lanes_of(like)):
        rows = rows_of(group.table, w, like)
        m, zero = rows.maximum, zeros(like)
        maxima = (cast(where_finite(m), like),)
        distance, mass = _sum_distances(tile, tile.second, w, n, zero, maxima, lanes_of(like), like)
        rows.distance = rows.distance + (formulas.distance(rows.before, rows.mass, m) + distance)
        rows.mass = rows.mass + mass


def _read_block(operation):
    """`rows._read_block` for tiles."""
    if operation == "cross_entropy":
        return capped
    return tempered if operation in TEMPERED else plain


def _fold_group(operation):
    """A function that folds the exponentials of a group of rows."""
    weighted, loss, paired = operation == "logsumexp", operation == "cross_entropy", operation == PAIRED
    average = ENTROPY if operation in AVERAGES and not paired else NO_AVERAGE
    read_block = _read_block(operation)

    def fold_group(call, tile, group):
        like, table, lanes = call.like, group.table, lanes_in(call)
        for j in range(0, call.classes, BLOCK):
            n = min(BLOCK, call.classes - j)
            read_block(call, call.x, tile, tile.x, group, j, n)
            fresh = call.state.address == 0 and j == 0
            if weighted and call.second.address != 0:
                gather(call, call.second, group, j, n, tile.second, tile.rows)
                fold_weighted_tile(tile, table, n, group.count, lanes, like)
            else:
                fold_tile(tile, tile.x, table, average, n, group.count, fresh, lanes, like)
            if paired:
                read_block(call, call.second, tile, tile.second, group, j, n)
                ratio = Average(True, tile.x, table)
                other = group.second
                fold_tile(tile, tile.second, other, ratio, n, group.count, fresh, lanes, like)
            if loss and has_targets(call):
                add_targets(call, tile, group, j, n)

    return vector.phase(fold_group)


def _fold_nll_group(call, tile, group):
    """`rows.fold_nll_row` for the rows of a group."""
    like, zero = call.like, zeros(call.like)
    for j in range(0, call.classes if has_targets(call) else 0, BLOCK):
        n = min(BLOCK, call.classes - j)
        gather(call, call.x, group, j, n, tile.x, tile.rows)
        fetch_target(call, tile, group, j, n, tile.second)
        for w in range(0, group.count, lanes_of(like)):
            rows = rows_of(group.table, w, like)
            found = _sum_distances(tile, tile.second, w, n, zero, (zero,), lanes_of(like), like)
            distance = found[0]
            rows.distance = rows.distance + distance
    for i in range(group.count):
        row = row_of(group.table, i)
        if row.sample != 0.0 and row.label >= 0.0:
            row.label_logit = logit(call, group, i, int(row.label))


# Writing the rows of a group


@inline
def exp_tile(narrow_table, table, x, n, count, to, like):
    """`rows.exp_block` for the rows of a tile."""
    size, zero = size_of(like), zeros(like)
    for w in range(0, count, lanes_of(like)):
        narrow = narrow_rows_of(narrow_table, w, like)
        floors, magics = narrow.floor, narrow.magic
        factors, scales, unshifts = narrow.factor, narrow.scale, narrow.unshift
        peaks = exponential(narrow.maximum, floors, magics)
        for j in range(n):
            e = exponential(read(at_of(x, j, w, like), zero), floors, magics)
            y = vector.where_eq(e, peaks, factors, (e * scales) * unshifts)
            write(at_of(to, j, w, like), y)
    for i in range(count):
        row = row_of(table, i)
        if not usable(row.maximum):
            v, out = x + i * size, to + i * size
            blocks.exp_exactly(v, GROUP * size, n, row.maximum, row.factor, out, like)


@inline
def slope_tile(narrow_table, table, x, n, count, to, like):
    """`exp_tile`, then `blocks.slope`."""
    exp_tile(narrow_table, table, x, n, count, to, like)
    zero = zeros(like)
    for w in range(0, count, lanes_of(like)):
        narrow = narrow_rows_of(narrow_table, w, like)
        maxima, means = narrow.maximum, narrow.mean
        for j in range(n):
            p, v = read(at_of(to, j, w, like), zero), read(at_of(x, j, w, like), zero)
            write(at_of(to, j, w, like), formulas.entropy_slope(p, v, maxima, means))


@inline
def log_tile(narrow_table, table, x, n, count, to, like):
    """Log-probabilities."""
    for w in range(0, count, lanes_of(like)):
        narrow = narrow_rows_of(narrow_table, w, like)
        maxima, log_s = narrow.maximum, narrow.log_s
        for j in range(n):
            y = formulas.log_probability(read(at_of(x, j, w, like), maxima), maxima, log_s)
            write(at_of(to, j, w, like), y)


@inline
def factor_tile(narrow_table, table, x, n, count, to, like):
    """The factor itself."""
    for w in range(0, count, lanes_of(like)):
        for j in range(n):
            write(at_of(to, j, w, like), narrow_rows_of(narrow_table, w, like).factor)


@inline
def aim_factors(narrow_table, table, like):
    """`aim`, and what makes the result of an exponential."""
    aim(narrow_table, table, like)
    for w in range(0, GROUP, lanes_of(like)):
        rows, narrow = rows_of(table, w, like), narrow_rows_of(narrow_table, w, like)
        narrow.factor, narrow.log_s = rows.factor, rows.log_s
        narrow.scale, narrow.unshift = rows.scale, rows.unshift
        narrow.upstream, narrow.mean = rows.upstream, rows.mean


@inline
def subtract(tile, u, n, count, like):
    """`blocks.subtract` for the rows of a tile."""
    zero = zeros(like)
    for w in range(0, count, lanes_of(like)):
        scales = narrow_rows_of(tile.narrow, w, like).upstream
        for j in range(n):
            at = at_of(tile.out, j, w, like)
            weight = read(at_of(u, j, w, like), zero)
            write(at, formulas.less_target(read(at, zero), weight, scales))


@inline
def finish_gradient(call, tile, group, second, j, n):
    """`rows.finish_gradient` for a tile."""
    like, cap = call.like, call.options.softcap
    if has_targets(call):
        if cap != 0.0 or call.classes > BLOCK:  # the tile does not hold them any more
            fetch_target(call, tile, group, j, n, second)
        subtract(tile, second, n, group.count, like)
    if cap != 0.0:
        blocks.multiply(tile.out, tile.slope, n * GROUP, like)
    for i in range(group.count if call.labels.address != 0 else 0):
        row = row_of(group.table, i)
        y = int(row.label) - j
        if 0 <= y < n:
            write(at_of(tile.out, y, i, like), cast(row.label_gradient, like))


@inline
def clear_dropped(call, tile, group, n):
    """0 in rows that are dropped."""
    some = call.labels.address != 0 or call.sample.address != 0
    for i in range(group.count if some else 0):
        if row_of(group.table, i).sample == 0.0:
            for j in range(n):
                write(at_of(tile.out, j, i, call.like), cast(0.0, call.like))


def _write_group(operation):
    """A function that writes the rows of a group, a few classes at a time."""
    loss, nll, paired = operation == "cross_entropy", operation == "nll_loss", operation == PAIRED
    weighed, read_block = loss or nll or operation in AVERAGES, _read_block(operation)
    fill = {
        "log_softmax": log_tile,
        "nll_loss": factor_tile,
        "entropy_from_logits": slope_tile,
    }.get(operation, exp_tile)

    def write_group(call, tile, group):
        like = call.like
        whole = call.classes <= BLOCK and call.state.address == 0 and call.options.softcap == 0.0
        second_narrow = tile.narrow + TABLE_SIZE
        aim_factors(tile.narrow, group.table, like)
        if paired:
            aim_factors(second_narrow, group.second, like)
        for j in range(0, call.classes, FEW):
            n, x, second = min(FEW, call.classes - j), tile.x, tile.second
            if whole:  # the tiles keep what they hold
                x, second = at_of(x, j, 0, like), at_of(second, j, 0, like)
            elif not nll:
                read_block(call, call.x, tile, x, group, j, n)
            fill(tile.narrow, group.table, x, n, group.count, tile.out, like)
            if paired:
                if not whole:
                    read_block(call, call.second, tile, second, group, j, n)
                exp_tile(second_narrow, group.second, second, n, group.count, tile.slope, like)
                blocks.subtract(tile.out, tile.slope, n * GROUP, 1.0, like)
            if loss or nll:
                finish_gradient(call, tile, group, second, j, n)
            if weighed:
                clear_dropped(call, tile, group, n)
            scatter(call, call.out, group, j, n, tile.out, tile.rows)

    return vector.phase(write_group)


def _walk(operation):
    """A function that writes the group before and folds the next one."""
    writes, write_group = operation != "logsumexp", _write_group(operation)
    nll = operation == "nll_loss"
    fold_group = vector.phase(_fold_nll_group) if nll else _fold_group(operation)

    def walk(call, tile, group, before):
        if writes and before.count > 0:
            write_group(call, tile, before)
        if group.count > 0 and (call.state.address == 0 or not writes):
            fold_group(call, tile, group)

    return vector.phase(walk)


def _walk_terms(operation):
    """A function that folds the terms of an operation of `TERMS`."""
    sum_rows = _summed(blocks.term_of(operation), 1)

    def walk(call, tile, group, before):
        like, second = call.like, tile.x
        for j in range(0, call.classes, BLOCK):
            n = min(BLOCK, call.classes - j)
            gather(call, call.x, group, j, n, tile.x, tile.rows)
            if call.second.address != 0:
                second = tile.second
                gather(call, call.second, group, j, n, second, tile.rows)
            for w in range(0, group.count, lanes_of(like)):
                rows = rows_of(group.table, w, like)
                found = sum_rows(tile, second, w, n, zeros(like), (), lanes_of(like), like)
                rows.value = rows.value + found[0]

    return vector.phase(walk)


@inline
def _rows_at_once(call, tile, row):
    """Where lines are streamed, so many that the other groups begin at lines."""
    if call.out.streamed:
        at = start_of(call.out, row // call.inner, row % call.inner)
        return until_line(at, call.like) or GROUP
    return GROUP


@cache
def kernel(operation):
    """The kernel of an operation."""
    walk = _walk_terms(operation) if operation in TERMS else _walk(operation)
    direct = one_block.short(operation)
    return driver("columns", operation, _allocate(operation), _rows_at_once, walk, direct)
