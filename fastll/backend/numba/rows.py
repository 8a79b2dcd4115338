"""Folds whose class axis is the faster one in memory: row by row, block by block.

A block of `BLOCK` elements stays in the first-level cache from one step to the next. It is read in
place where its memory already is contiguous and of the compute dtype, otherwise through a buffer.

Rows are taken in groups small enough for the second-level cache, where the first pass leaves its
exponentials for the second. Where nothing but a factor is missing from them, the second pass is part of
the next group's first: memory and arithmetic are busy all the time.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from fastll.backend.numba import blocks, one_block, vector
from fastll.backend.numba.folds import (
    AVERAGES,
    PAIRED,
    TEMPERED,
    driver,
    has_targets,
    logit,
    start_of_row,
)
from fastll.backend.numba.maths import cast, constants, exponential, formulas, lowest, window, zeros
from fastll.backend.numba.memory import allocate, deliver, fetch, target_of, until_line
from fastll.backend.numba.state import (
    TABLE_SIZE,
    finite,
    move_distances,
    raise_maximum,
    row_of,
    usable,
)
from fastll.backend.numba.vector import inline, lanes_of, load, read, size_of, splat, store, write
from fastll.contract import BLOCK, GROUP
from fastll.formulas import TERMS
from fastll.formulas.constants import SHIFT

GROUP_SIZE = 1 << 18  # bytes of a group's rows, where there is a second pass
ROW_SIZE = 1 << 19  # bytes of a row up to which its exponentials are kept
#: Operations that keep them.
KEEPING = "softmax", "cross_entropy", "entropy_from_logits", "kl_divergence_from_logits"


class Memory(NamedTuple):
    """Memory for one call. Of the compute dtype unless said otherwise."""

    tables: int  # addresses from here on; of the tables of two groups
    x: int  # BLOCK elements, twice
    second: int  # BLOCK elements; of two blocks of target logits, the second one is at `slope`
    slope: int
    out: int
    terms: int  # kept exponentials of two groups
    references: int  # float64: reference exponent of each block of a row's kept exponentials; twice
    pitch: int  # bytes from a row's exponentials to the next one's; 0 where they are not kept
    rows: int  # in a group
    interleaves: bool  # rows are written while others are read


class Scalars(NamedTuple):
    """What makes a row's results of its exponentials or its logits, in the compute dtype."""

    peak: float  # the exponential of the maximum
    factor: float
    scale: float
    maximum: float
    log_s: float
    mean: float
    tau: float


@inline
def scalars_of(call, row):
    like = call.like
    floor, magic = window(row.reference, like)
    m = cast(row.maximum, like)
    peak = vector.first(exponential(splat(m), floor, magic))
    factor, scale = cast(row.factor, like), cast(row.scale, like)
    log_s, mean = cast(row.log_s, like), cast(row.mean, like)
    return Scalars(peak, factor, scale, m, log_s, mean, cast(call.options.inverse_temperature, like))


#: What is written of a row. Differences are those from the probabilities of target logits.
PROBABILITIES, LOGARITHMS, SLOPES, DIFFERENCES = range(4)


class Pending(NamedTuple):
    """What is left of a row that has been folded and is written, perhaps while the next one is read."""

    source: int  # address of exponentials, or for `LOGARITHMS`, of logits; 0: nothing to use
    aside: int  # from there to the logits, without tau (`SLOPES`), or to the others (`DIFFERENCES`)
    out: int
    n: int
    kind: int
    streamed: bool
    scalars: Scalars
    others: Scalars  # of the target logits


@inline
def nothing_pending(kind, like):
    zero = cast(0.0, like)
    scalars = Scalars(zero, zero, zero, zero, zero, zero, zero)
    return Pending(0, 0, 0, 0, kind, False, scalars, scalars)


@inline
def part_of(row, source, aside, out, n):
    """The same for n elements elsewhere."""
    return Pending(source, aside, out, n, row.kind, False, row.scalars, row.others)


@inline
def rest_of(row, count):
    """The row with `count` elements fewer left."""
    done = count * size_of(row.scalars.peak)
    source, out, n = row.source + done, row.out + done, row.n - count
    return Pending(source, row.aside, out, n, row.kind, row.streamed, row.scalars, row.others)


@inline
def write_vector(row, j, count):
    """Elements j to j + count of what is left; whole vectors may be streamed."""
    scalars = row.scalars
    size = size_of(scalars.peak)
    source, zero = row.source + j * size, zeros(scalars.peak)
    x = load(source, count, zero)
    if row.kind == LOGARITHMS:
        x = formulas.log_probability(x, scalars.maximum, scalars.log_s)
    else:
        x = formulas.probability(x, scalars.peak, scalars.factor, scalars.scale)
    if row.kind == SLOPES:
        logits = load(source + row.aside, count, zero) * scalars.tau
        x = formulas.entropy_slope(x, logits, scalars.maximum, scalars.mean)
    if row.kind == DIFFERENCES:
        others, e = row.others, load(source + row.aside, count, zero)
        x = x - formulas.probability(e, others.peak, others.factor, others.scale)
    if row.streamed and count >= lanes_of(x):
        vector.stream(row.out + j * size, x)
    else:
        store(row.out + j * size, count, x)


@inline
def write_rest(row):
    count = lanes_of(row.scalars.peak)
    whole = row.n // count * count
    for j in range(0, whole, count):
        write_vector(row, j, count)
    write_vector(row, whole, row.n - whole)


# Folding a block


@inline
def max_block(v, n, tau):
    """The maximum, times tau; NaN are passed over."""
    size, top = size_of(tau), lowest(tau)
    for j in range(0, n, lanes_of(tau)):
        top = vector.maximum(vector.load_ahead(v + j * size, n - j, lowest(tau)), top)
    return np.float64(vector.largest(top) * tau)


class Average(NamedTuple):
    """How an average of distances over exponentials is folded; see `blocks.divergence_term`."""

    wanted: bool
    logits: int  # block of x, whose softmax is compared with that of the elements; 0: none
    maximum: float  # of those so far
    growth: float  # of the distances with it, by the block


NO_AVERAGE, ENTROPY = Average(False, 0, 0.0, 0.0), Average(True, 0, 0.0, 0.0)


class Sums(NamedTuple):
    """Of a block, so far: in lanes."""

    next_top: float  # the maximum of the next block, of half the lanes
    added: float
    at_maximum: float
    away: float


class Block(NamedTuple):
    """A block that is added to a row, and what is done meanwhile."""

    v: int
    terms: int  # where its exponentials are left; 0: nowhere
    next_v: int
    next_n: int  # of the next block, whole vectors
    ready: int  # of the pending row, whole vectors
    maximum: float
    at_top: bool  # whether that may be in the block
    floor: float
    magic: float
    tau: float


@inline
def add_vector(block, sums, average, pending, j, count):
    """Add elements j to j + count, at most a vector."""
    top, added, at_maximum, away = sums
    tau, maximum = block.tau, block.maximum
    at, none, zero = j * size_of(tau), lowest(tau), zeros(tau)
    if j < block.next_n:
        top = vector.raised(vector.load_ahead(block.next_v + at, lanes_of(tau), none), top)
    x = load(block.v + at, count, none) * tau
    e = exponential(x, block.floor, block.magic)
    if block.at_top:
        added = added + formulas.below_maximum(x, maximum, e)
        at_maximum = at_maximum + formulas.at_maximum(x, maximum, constants(tau).one)
    else:
        added = added + e
    if average.wanted:
        if average.logits != 0:
            other = load(average.logits + at, count, zero) * tau
            other_maximum = cast(average.maximum, tau)
            away = away + blocks.divergence_term(e, x, maximum, other, other_maximum)
        else:
            away = away + blocks.entropy_term(e, x, maximum, block.floor)
    if block.terms != 0:
        write(block.terms + at, e)
    if j < block.ready:
        write_vector(pending, j, lanes_of(tau))
    return Sums(top, added, at_maximum, away)


@inline
def add_block(v, n, row, at_top, average, terms, pending, next_v, next_n, tau):
    """Add a block to a row; returns what is left of the pending row, and the next block's maximum.

    Adds the sum of exp(x) / 2**reference; `at_top`: of the elements below the maximum, and counts those
    equal to it. The row that is pending is written and the next block read meanwhile.
    """
    lanes, zero = lanes_of(tau), zeros(tau)
    whole, ready, read = n // lanes * lanes, pending.n // lanes * lanes, min(n, next_n) // lanes * lanes
    floor, magic = window(row.reference, tau)
    maximum = splat(cast(row.maximum, tau))
    block = Block(v, terms, next_v, read, ready, maximum, at_top, floor, magic, tau)
    sums = Sums(vector.lower_half(lowest(tau)), zero, zero, zero)
    for j in range(0, whole, lanes):  # by themselves, as their loads need no mask
        sums = add_vector(block, sums, average, pending, j, lanes)
    if whole < n:
        sums = add_vector(block, sums, average, pending, whole, n - whole)
    row.at_maximum += np.float64(vector.narrow_total(sums.at_maximum))
    row.added += np.float64(vector.narrow_total(sums.added)) * 2.0**-SHIFT
    if average.wanted:
        row.away_added += vector.total(sums.away) * 2.0**-SHIFT
    rest = max_block(next_v + read * size_of(tau), next_n - read, tau)
    written = min(ready, (n + lanes - 1) // lanes * lanes)
    return rest_of(pending, written), max(np.float64(vector.largest(sums.next_top) * tau), rest)


@inline
def fold_block(v, n, top, row, average, terms, pending, next_v, next_n, tau):
    """`add_block` for a block with maximum `top`. Leaves its exponentials, unless `terms` is 0."""
    if top > row.maximum:
        rise = top - finite(row.maximum)
        growth = average.growth - rise if average.logits != 0 else rise
        raise_maximum(row, top, average.wanted, growth)
    elif average.wanted:
        move_distances(row, average.growth)
    if usable(row.maximum):
        at_top = top == row.maximum
        return add_block(v, n, row, at_top, average, terms, pending, next_v, next_n, tau)
    if terms != 0:
        blocks.fill(terms, n, 0.0, False, tau)  # correct for -inf; never read otherwise
    blocks.add_exactly(row, v, tau, size_of(tau), n, tau)
    if average.wanted:
        other, other_maximum = average.logits, average.maximum
        blocks.add_distances_exactly(row, v, other, other_maximum, tau, size_of(tau), n, tau)
    return pending, max_block(next_v, next_n, tau)


def _summed(terms):
    """A function that returns the sums of pairs terms(x, second, *arguments) of a block."""

    def sum_block(v, second, n, zero, arguments, like):
        size, pad, count = size_of(like), zeros(like), lanes_of(like)
        sums, others = zero, zero
        for j in range(0, n, count):
            x, y = (
                vector.load_ahead(v + j * size, n - j, pad),
                vector.load_ahead(second + j * size, n - j, pad),
            )
            term, other = terms(x, y, *arguments)
            if n - j < count:
                term, other = vector.first_lanes(term, n - j), vector.first_lanes(other, n - j)
            sums, others = sums + term, others + other
        return vector.total(sums), vector.total(others)

    return vector.inlined(sum_block, f"{terms.__qualname__}_block")


_sum_distances, _sum_weighted = _summed(blocks.distance_terms), _summed(blocks.weighted_terms)


# Folding a row


@inline
def plain(call, x, start, j, n, buffer, slope):
    return fetch(x, start, j, n, buffer, call.like)


@inline
def capped(call, x, start, j, n, buffer, slope):
    """`plain`, then the soft cap if there is one; its derivative into `slope` unless that is 0."""
    v, cap = fetch(x, start, j, n, buffer, call.like), call.options.softcap
    if cap != 0.0:
        blocks.cap(v, n, cap, buffer, slope, call.like)
        return buffer
    return v


@inline
def tempered(call, x, start, j, n, buffer, slope):
    """`plain`, then by the inverse temperature."""
    v, tau = fetch(x, start, j, n, buffer, call.like), call.options.inverse_temperature
    if tau != 1.0:
        blocks.scale(v, n, tau, 1.0, buffer, call.like)
        return buffer
    return v


def _read_block(operation):
    """How a block of an operation's logits is read."""
    if operation == "cross_entropy":
        return capped
    return tempered if operation in TEMPERED else plain


@inline
def fetch_target(call, memory, group, i, j, n):
    """Address of u = w ((1 - eps) t + eps / C) of the contract, or without t, of w eps / C."""
    t, like, eps = call.second, call.like, call.options.label_smoothing
    keep, spread, buffer = 1.0 - eps, eps / call.classes, memory.second
    source = fetch(t, start_of_row(t, group, i), j, n, buffer, like) if t.address != 0 else 0
    weights = call.weight + j * size_of(like) if call.weight != 0 else 0
    if source != 0 and weights == 0 and spread == 0.0:
        return source
    blocks.target(source, weights, n, keep, spread, buffer, like)
    return buffer


@inline
def add_targets(call, memory, group, i, j, n, v, before):
    """Add a block to distances, those so far being from the maximum `before`, and to the mass."""
    like, row = call.like, row_of(group.table, i)
    u, m = fetch_target(call, memory, group, i, j, n), row.maximum
    finite = cast(m if m > -np.inf else 0.0, like)
    distance, mass = _sum_distances(v, u, n, zeros(like), (splat(finite),), like)
    row.distance += formulas.distance(before, row.mass, m) + distance
    row.mass += mass


@inline
def read_label(call, memory, group, i):
    """The logit at the label, and the derivative of the soft cap there."""
    row = row_of(group.table, i)
    y = int(row.label)
    if row.sample != 0.0 and y >= 0:
        start = start_of_row(call.x, group, i)
        v = capped(call, call.x, start, y, 1, memory.x, memory.slope)
        row.label_logit = read(v, call.like)
        if call.options.softcap != 0.0:
            row.label_slope = read(memory.slope, call.like)


@inline
def kept_terms(memory, group, i):
    """Address of the exponentials of row i of a group, 0 where they are not kept."""
    return memory.terms + (group.half * memory.rows + i) * memory.pitch if memory.pitch != 0 else 0


@inline
def beside(call, memory):
    """From the kept exponentials of a row, and from their references, to those of target logits."""
    return 2 * memory.rows * memory.pitch, references_size(call)


@inline
def references_size(call):
    return (call.classes // BLOCK + 1) * 8


@inline
def align_terms(call, references, terms, reference):
    """Bring the exponentials of all blocks to the last reference.

    By two factors, as one could be subnormal; what is lost is too small for a result from kept terms.
    """
    limit = -250.0 if lanes_of(call.like) == 32 else -2000.0
    for j in range(0, call.classes, BLOCK):
        lift = int(max(limit, read(references + j // BLOCK * 8, 0.0) - reference))
        if lift < 0:  # above, the block was not usable: all of it is 0
            at, n, half = terms + j * size_of(call.like), min(BLOCK, call.classes - j), lift // 2
            first, second = math.ldexp(1.0, half), math.ldexp(1.0, lift - half)
            blocks.scale(at, n, first, second, at, call.like)


def _fold_row(operation):
    """A function that folds the exponentials of a row, and writes the pending row meanwhile."""
    keeps, loss, paired = operation in KEEPING, operation == "cross_entropy", operation == PAIRED
    average = ENTROPY if operation in AVERAGES and not paired else NO_AVERAGE
    tempers = operation in TEMPERED
    read_block = capped if loss else plain

    def next_block(call, x, start, j, buffers):
        """(address, length) of the block from j on, not yet times tau; the one before it stays."""
        n = min(BLOCK, call.classes - j)
        buffer = buffers + j // BLOCK % 2 * BLOCK * size_of(call.like)
        return read_block(call, x, start, j, n, buffer, 0) if n > 0 else 0, n

    next_block = vector.inlined(next_block, f"{operation}_next_block")

    def fold_row(call, memory, group, i, pending):
        like, row, start = call.like, row_of(group.table, i), start_of_row(call.x, group, i)
        terms = kept_terms(memory, group, i) if keeps else 0
        tau = cast(call.options.inverse_temperature if tempers else 1.0, like)
        v, n = next_block(call, call.x, start, 0, memory.x)
        top = max_block(v, n, tau)
        if paired:
            others, other = start_of_row(call.second, group, i), row_of(group.second, i)
            t, _ = next_block(call, call.second, others, 0, memory.second)
            t_top = max_block(t, n, tau)
            aside, references = beside(call, memory)
        for j in range(0, call.classes, BLOCK):
            next_v, next_n = next_block(call, call.x, start, j + n, memory.x)
            before = row.maximum
            at = terms + j * size_of(like) if terms != 0 else 0
            pending, top = fold_block(v, n, top, row, average, at, pending, next_v, next_n, tau)
            if paired:
                next_t, _ = next_block(call, call.second, others, j + n, memory.second)
                m = finite(row.maximum)
                ratio = Average(True, v, m, m - finite(before))
                at = at + aside if terms != 0 else 0
                pending, t_top = fold_block(t, n, t_top, other, ratio, at, pending, next_t, next_n, tau)
                t = next_t
                write(memory.references + references + j // BLOCK * 8, other.reference)
            if keeps:
                write(memory.references + j // BLOCK * 8, row.reference)
            if loss and has_targets(call):
                add_targets(call, memory, group, i, j, n, v, before)
            v, n = next_v, next_n
        if terms != 0:
            align_terms(call, memory.references, terms, row.reference)
            if paired:
                align_terms(call, memory.references + references, terms + aside, other.reference)
        if loss:
            read_label(call, memory, group, i)
        return pending

    return vector.phase(fold_row)


@inline
def fold_weighted_row(call, memory, group, i):
    """Fold weighted exponentials of elements below the maximum, and weights of those equal to it."""
    x, b, like, row = call.x, call.second, call.like, row_of(group.table, i)
    masked, zero = memory.out, vector.widen(zeros(like))
    for j in range(0, call.classes, BLOCK):
        n = min(BLOCK, call.classes - j)
        v = fetch(x, start_of_row(x, group, i), j, n, memory.x, like)
        weights = fetch(b, start_of_row(b, group, i), j, n, memory.second, like)
        blocks.mask(v, weights, n, masked, like)
        top = max_block(masked, n, constants(like).one)
        if top > row.maximum:
            raise_maximum(row, top, False, 0.0)
        added, k = np.nan, 0.0
        if usable(row.maximum):
            floor, magic = window(row.reference, like)
            arguments = splat(cast(row.maximum, like)), floor, magic
            added, k = _sum_weighted(masked, weights, n, zero, arguments, like)
        if abs(added + k) < np.inf:  # so it is not where a weight is infinite or NaN
            row.added += added
            row.at_maximum += k
        else:
            blocks.add_weighted_exactly(row, masked, weights, size_of(like), n, like)


@inline
def fold_nll_row(call, memory, group, i):
    """Fold distances from 0, where there are targets."""
    row, x, like = row_of(group.table, i), call.x, call.like
    for j in range(0, call.classes if has_targets(call) else 0, BLOCK):
        n = min(BLOCK, call.classes - j)
        v = fetch(x, start_of_row(x, group, i), j, n, memory.x, like)
        u, zero = fetch_target(call, memory, group, i, j, n), zeros(like)
        row.distance += _sum_distances(v, u, n, zero, (zero,), like)[0]
    if row.label >= 0.0:
        row.label_logit = logit(call, group, i, int(row.label))


# Writing a row


def _kind(operation):
    """What is written of a row."""
    kinds = {"log_softmax": LOGARITHMS, "entropy_from_logits": SLOPES, PAIRED: DIFFERENCES}
    return kinds.get(operation, PROBABILITIES)


@inline
def does(row, like):
    """Whether kept exponentials do: for a factor of moderate size, for which neither the product nor
    their being aligned loses a digit of the result.
    """
    most = 2.0**-30 if lanes_of(like) == 32 else 2.0**-60
    return usable(row.maximum) and row.unshift == 1.0 and abs(row.scale) < most


def _result(operation):
    """A function that returns a row as it is to be written; with source 0 if by new exponentials."""
    kind = _kind(operation)

    def result(call, memory, group, i):
        row, x = row_of(group.table, i), start_of_row(call.x, group, i)
        source, out = x, start_of_row(call.out, group, i)
        scalars = others = scalars_of(call, row)
        if kind != LOGARITHMS:
            source = kept_terms(memory, group, i) if does(row, call.like) else 0
        aside = x - source
        if kind == DIFFERENCES:
            other = row_of(group.second, i)
            others, aside = scalars_of(call, other), beside(call, memory)[0]
            if not does(other, call.like):
                source = 0
        n = call.classes if source != 0 else 0
        return Pending(source, aside, out, n, kind, call.out.streamed, scalars, others)

    return vector.inlined(result, f"{operation}_result")


@inline
def exp_block(v, n, row, out, like):
    """factor * exp(x - m) for a row, by new exponentials."""
    size, m = size_of(like), row.maximum
    if not usable(m):
        blocks.exp_exactly(v, size, n, m, row.factor, out, like)
        return
    maxima, factor = splat(cast(m, like)), cast(row.factor, like)
    scale, unshift = cast(row.scale, like), cast(row.unshift, like)
    floor, magic = window(row.reference, like)
    peaks = exponential(maxima, floor, magic)
    for j in range(0, n, lanes_of(like)):
        e = exponential(vector.load_ahead(v + j * size, n - j, maxima), floor, magic)
        y = vector.where_eq(e, peaks, factor, (e * scale) * unshift)
        store(out + j * size, n - j, y)


@inline
def put_label_gradient(call, row, out, j, n):
    """Into elements j to j + n of a row."""
    y = int(row.label) - j
    if 0 <= y < n:
        write(out + y * size_of(call.like), cast(row.label_gradient, call.like))


@inline
def finish_gradient(call, memory, group, i, j, n, out):
    """Make the gradient of what is due to log s."""
    if has_targets(call):
        u = fetch_target(call, memory, group, i, j, n)
        blocks.subtract(out, u, n, row_of(group.table, i).upstream, call.like)
    if call.options.softcap != 0.0:
        blocks.multiply(out, memory.slope, n, call.like)
    put_label_gradient(call, row_of(group.table, i), out, j, n)


def _write_row(operation, result):
    """A function that writes a row, block by block."""
    loss, paired, kind = operation == "cross_entropy", operation == PAIRED, _kind(operation)
    log, slopes, read_block = kind == LOGARITHMS, kind == SLOPES, _read_block(operation)
    weighed = loss or operation in AVERAGES

    def write_row(call, memory, group, i):
        like, row, whole = call.like, row_of(group.table, i), result(call, memory, group, i)
        start, target = start_of_row(call.x, group, i), start_of_row(call.out, group, i)
        for j in range(0, call.classes, BLOCK):
            n, source = min(BLOCK, call.classes - j), whole.source + j * size_of(like)
            out = target_of(call.out, target, j, memory.out)
            if weighed and row.sample == 0.0:
                blocks.fill(out, n, 0.0, False, like)
                deliver(call.out, target, j, n, memory.out, like)
                continue
            aside = whole.aside
            if whole.source != 0 and slopes:
                aside = fetch(call.x, start, j, n, memory.x, like) - source
            elif log or whole.source == 0:
                source = read_block(call, call.x, start, j, n, memory.x, memory.slope)
            if log or whole.source != 0:
                write_rest(part_of(whole, source, aside, out, n))
            elif slopes:
                exp_block(source, n, row, memory.second, like)
                blocks.slope(memory.second, source, n, row.maximum, row.mean, out, like)
            else:
                exp_block(source, n, row, out, like)
            if paired and whole.source == 0:
                other, others = row_of(group.second, i), start_of_row(call.second, group, i)
                t = read_block(call, call.second, others, j, n, memory.second, 0)
                exp_block(t, n, other, memory.slope, like)
                blocks.subtract(out, memory.slope, n, 1.0, like)
            if loss:
                finish_gradient(call, memory, group, i, j, n, out)
            deliver(call.out, target, j, n, memory.out, like)

    return vector.phase(write_row)


@inline
def write_nll_row(call, memory, group, i):
    row, target, like = row_of(group.table, i), start_of_row(call.out, group, i), call.like
    kept = row.sample != 0.0
    for j in range(0, call.classes, BLOCK):
        n, out = min(BLOCK, call.classes - j), target_of(call.out, target, j, memory.out)
        blocks.fill(out, n, row.factor if kept else 0.0, call.out.streamed, like)
        if kept:
            finish_gradient(call, memory, group, i, j, n, out)
        deliver(call.out, target, j, n, memory.out, like)


# Walking through the rows of a group


def _walk(operation):
    """A function that folds the rows of a group while it writes those of the one before."""
    loss, kind = operation == "cross_entropy", _kind(operation)
    writes = operation != "logsumexp"
    fold_row, result = _fold_row(operation), _result(operation)
    write_row = _write_row(operation, result)

    def begin_to_write(call, memory, group, i):
        """What can be written of a row while another one is read, its first elements aside."""
        ready = memory.interleaves and i < group.count and row_of(group.table, i).sample != 0.0
        row = result(call, memory, group, i) if ready else nothing_pending(kind, call.like)
        if row.streamed:
            head = min(row.n, until_line(row.out, call.like))
            write_vector(row, 0, head)
            return rest_of(row, head)
        return row

    begin_to_write = vector.inlined(begin_to_write, f"{operation}_begin_to_write")

    def walk(call, memory, group, before):
        for i in range(max(group.count, before.count)):
            pending = nothing_pending(kind, call.like)
            if writes:
                pending = begin_to_write(call, memory, before, i)
            row = row_of(group.table, i)
            wanted = call.state.address == 0 and (row.sample != 0.0 or call.lse.address != 0)
            if not writes and call.second.address != 0:
                fold_weighted_row(call, memory, group, i)
            elif i < group.count and (wanted or not writes):
                pending = fold_row(call, memory, group, i, pending)
            if writes and i < before.count and pending.source != 0:
                write_rest(pending)
                if loss:
                    out = start_of_row(call.out, before, i)
                    put_label_gradient(call, row_of(before.table, i), out, 0, call.classes)
            elif writes and i < before.count:
                write_row(call, memory, before, i)

    return vector.phase(walk)


def _walk_nll(call, memory, group, before):
    for i in range(before.count):
        write_nll_row(call, memory, before, i)
    for i in range(group.count):
        if row_of(group.table, i).sample != 0.0:
            fold_nll_row(call, memory, group, i)


def _walk_terms(operation):
    """A function that folds the terms of an operation of `TERMS`."""
    sum_block = _summed(blocks.term_of(operation))

    def walk(call, memory, group, before):
        x, second, like = call.x, call.second, call.like
        for i in range(group.count):
            row = row_of(group.table, i)
            for j in range(0, call.classes, BLOCK):
                n = min(BLOCK, call.classes - j)
                v = fetch(x, start_of_row(x, group, i), j, n, memory.x, like)
                u = v
                if second.address != 0:
                    u = fetch(second, start_of_row(second, group, i), j, n, memory.second, like)
                row.value += sum_block(v, u, n, zeros(like), (), like)[0]

    return vector.phase(walk)


def _allocate(operation):
    """A function that returns the uninitialised `Memory` of a call, and the array that holds it."""
    kind, may_keep = _kind(operation), operation in KEEPING
    loss, states = operation == "cross_entropy", 2 if operation == PAIRED else 1
    from_logits = kind in (LOGARITHMS, SLOPES)

    def allocate_memory(call):
        size = size_of(call.like)
        row, block = call.classes * size, BLOCK * size
        writes, rows = call.out.address != 0, GROUP
        if writes:
            rows = max(1, min(GROUP, GROUP_SIZE // max(1, states * row)))
        plain = writes and call.state.address == 0 and call.options.softcap == 0.0
        keeps = may_keep and plain and row <= ROW_SIZE
        pitch = (row + 127) // 128 * 128 if keeps else 0
        interleaves = plain if kind == LOGARITHMS else keeps and not (loss and has_targets(call))
        if from_logits:  # others than those in place would have to be fetched
            interleaves = interleaves and call.x.read == 0
        interleaves = interleaves and call.out.write == 0
        tables, terms = 2 * states * TABLE_SIZE, 2 * states * rows * pitch
        references = states * references_size(call)
        sizes = (tables, 2 * block, block, block, block, terms, references)
        owner, pieces = allocate(sizes)
        return Memory(*pieces, pitch, rows, interleaves), owner

    return vector.inlined(allocate_memory, f"{operation}_allocate")


@inline
def _rows_at_once(call, memory, row):
    return memory.rows


@cache
def kernel(operation):
    """The kernel of an operation."""
    if operation in TERMS:
        walk = _walk_terms(operation)
    else:
        walk = vector.phase(_walk_nll) if operation == "nll_loss" else _walk(operation)
    direct = one_block.middle(operation)
    return driver("rows", operation, _allocate(operation), _rows_at_once, walk, direct)
