"""Rows of one block without options, from logits to results without a stop: as many rows at a time as a
register has lanes, whose scalars never leave the registers. The results are those of `columns` and
`rows`, to the bit, which also do what is not usual: rows without a usable maximum or a finite sum.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from fastll.backend.numba import folds, state, vector
from fastll.backend.numba.blocks import stream_block
from fastll.backend.numba.maths import cast, constants, exponential, formulas, lowest, window, zeros
from fastll.backend.numba.memory import allocate, deliver, fetch, release, target_of
from fastll.backend.numba.tiles import at_of, gather, scatter, size_of_rows, size_of_tile
from fastll.backend.numba.transpose import largest_of_registers, total_of_registers
from fastll.backend.numba.vector import (
    all_greater,
    bytes_of,
    in_register,
    inline,
    lanes_of,
    load,
    maximum,
    read,
    register_largest,
    register_total,
    shared,
    size_of,
    where_eq,
    widen,
    write,
)
from fastll.contract import BLOCK, GROUP, SHORT
from fastll.formulas.constants import LIMIT

TILE_SIZE = 1 << 13  # bytes of a tile of short rows

#: Operations whose rows go this way.
OPERATIONS = "logsumexp", "softmax", "log_softmax", "cross_entropy"
#: What is left in `out`: nothing, exponentials by a factor, logarithms.
READS, WRITES, LOGS = range(3)


def _kind(operation):
    """What an operation leaves there if there is an `out`, as there is but for a loss."""
    return {"logsumexp": READS, "log_softmax": LOGS}.get(operation, WRITES)


@inline
def takes(call):
    """Whether there is nothing but what rows usually have."""
    options = call.options
    more = call.state.address | call.second.address | call.sign.address | call.selected.address
    plain = options.softcap == 0.0 and options.inverse_temperature == 1.0
    return more == 0 and plain and options.label_smoothing == 0.0 and call.classes > 0


@inline
def takes_short(call):
    return takes(call) and call.classes < SHORT


class Scalars(NamedTuple):
    """Addresses of numbers of the rows of a group, of the compute dtype unless said otherwise."""

    value: int
    lse: int
    label: int  # -1: none
    sample: int  # float64
    label_weight: int  # float64
    labels: int  # int64, as they are given


@inline
def _allocate(sizes, like):
    """Memory for one call: the array that holds it, `Scalars`, and the addresses of other pieces."""
    own, wide = GROUP * size_of(like), GROUP * 8
    owner, pieces = allocate((own, own, own, wide, wide, wide, *sizes))
    return Scalars(*pieces[:6]), pieces[6:], owner


@inline
def load_labels(call, rows, group):
    """Labels, sample weights and class weights, as `folds.load_targets` has them.

    A row that is dropped has no label, and the weight 0.
    """
    labels, sample, like, count = call.labels, call.sample, call.like, group.count
    start, line = folds.start_of_row(labels, group, 0), in_register(like)
    if labels.inner == 8:
        vector.copy(start, rows.labels, count * 8)
    else:
        for i in range(count):
            write(rows.labels + i * 8, read(start + i * labels.inner, np.int64(0)))
    for i in range(count, (count + lanes_of(line) - 1) // lanes_of(line) * lanes_of(line)):
        write(rows.labels + i * 8, np.int64(0))
    for i in range(0, count, lanes_of(line)):
        y, kept, factor = vector.classified(
            rows.labels + i * 8, call.options.ignore_index, call.classes, line
        )
        write(rows.label + i * size_of(like), cast(y, like))
        write(rows.sample + i * 8, kept)
        write(rows.label_weight + i * 8, factor)
    for i in range(count if sample.address != 0 else 0):
        weight = read(rows.sample + i * 8, 0.0) * read(folds.start_of_row(sample, group, i), 0.0)
        write(rows.sample + i * 8, weight)
        if weight == 0.0:
            write(rows.label + i * size_of(like), cast(-1.0, like))
            write(rows.label_weight + i * 8, 1.0)
    for i in range(count if call.weight != 0 else 0):
        y = int(read(rows.label + i * size_of(like), like))
        if y >= 0:
            write(rows.label_weight + i * 8, np.float64(read(call.weight + y * size_of(like), like)))


class Results(NamedTuple):
    """What writing takes, of a register of rows."""

    factor: float  # of exp(x - m)
    scale: float  # what makes that of exponentials
    peak: float
    at_label: float  # the gradient there
    log_s: float


def _finish(operation):
    """A function for rows from i on, from their sums: their values, and what writing takes.

    Its exponentials are those of `aim`. False for rows that are not usual.
    """
    labelled, kind = operation == "cross_entropy", _kind(operation)

    def finish(call, rows, i, m, n, aim, total, counts, x_y):
        like, wide = call.like, widen(m)
        below = widen(total) * state.UNSHIFT
        usual = all_greater(LIMIT, vector.absolute(wide)) & all_greater(np.inf, vector.absolute(below))
        row = state.settled(wide, n, below, widen(counts))
        size = size_of(like)
        if call.lse.address != 0:
            write(rows.lse + i * size, cast(wide + row.log_s, like))
        factor = at_label = widen(x_y)
        if labelled:
            sample, weight = read(rows.sample + i * 8, wide), read(rows.label_weight + i * 8, wide)
            value = folds.cross_entropy_of(call, row, sample, at_label, weight, 0.0, 0.0)
            if call.value.address != 0:
                write(rows.value + i * size, cast(value, like))
            upstream = call.options.scale * sample
            factor, at_label = folds.cross_entropy_gradient_of(
                call, row, upstream, at_label, weight, 0.0, 1.0
            )
            factor = where_eq(sample, 0.0, 0.0, factor)
        elif kind == WRITES:
            factor = 1.0 / (row.e + row.k)
        scale, unshift = state.factors_of(factor, row.lead, like)
        if kind == WRITES:  # not with a scale in two parts
            usual = usual & all_greater(where_eq(factor, 0.0, 1.0, unshift), 0.5)
        peak = exponential(m, *aim)
        return usual, Results(
            cast(factor, like), cast(scale, like), peak, cast(at_label, like), cast(row.log_s, like)
        )

    return vector.phase(finish)


@inline
def _put(call, to, group, numbers):
    size = size_of(call.like)
    if to.address != 0:
        start = folds.start_of_row(to, group, 0)
        if to.inner == size:
            vector.copy(numbers, start, group.count * size)
        else:
            for i in range(group.count):
                write(start + i * to.inner, read(numbers + i * size, call.like))


@inline
def put_values(call, rows, group):
    """The numbers of rows that are asked for."""
    _put(call, call.value, group, rows.value)
    _put(call, call.lse, group, rows.lse)


# Short rows: a row per lane, class by class


class Short(NamedTuple):
    """Memory for one call: addresses."""

    x: int  # tiles: of logits, exponentials and results
    kept: int
    out: int
    rows: int  # one after the other


@inline
def allocate_short(call):
    tile = size_of_tile(call.classes, call.like)
    rows, pieces, owner = _allocate((tile, tile, tile, size_of_rows(call)), call.like)
    return Short(*pieces), rows, owner


@inline
def most_short(call):
    """Rows in a group: as many as leave room in the first-level cache."""
    width = lanes_of(in_register(call.like))
    most = 1 + TILE_SIZE // (call.classes * size_of(call.like))
    return min(GROUP, (most + width - 1) // width * width)


def short_rows(operation):
    """A function that does a group; false, and nothing is written, if a row of it is not usual."""
    labelled, kind, finish = operation == "cross_entropy", _kind(operation), _finish(operation)

    def run_register(call, memory, rows, i, writes):
        like, classes, zero = call.like, call.classes, in_register(constants(call.like).zero)
        one, line = constants(like).one, GROUP * size_of(like)
        x, kept, out = (
            at_of(memory.x, 0, i, like),
            at_of(memory.kept, 0, i, like),
            at_of(memory.out, 0, i, like),
        )
        m = read(x, zero)
        for j in range(1, classes):
            m = maximum(read(x + j * line, zero), m)
        n = state.reference_of(widen(m))
        aim = window(n, like)
        y, class_of_lanes = zero, zero
        if labelled:
            y = read(rows.label + i * size_of(like), zero)
        total = counts = x_y = zero
        for j in range(classes):
            v = read(x + j * line, zero)
            e = exponential(v, *aim)
            if kind == WRITES:
                write(kept + j * line, e)
            if labelled:
                x_y = where_eq(y, class_of_lanes, v, x_y)
                class_of_lanes = class_of_lanes + one
            counts = counts + formulas.at_maximum(v, m, one)
            total = total + formulas.below_maximum(v, m, e)
        usual, results = finish(call, rows, i, m, n, aim, total, counts, x_y)
        if not usual:
            return False
        class_of_lanes = zero
        for j in range(classes if kind != READS and writes else 0):
            if kind == LOGS:
                p = formulas.log_probability(read(x + j * line, zero), m, results.log_s)
            else:
                e = read(kept + j * line, zero)
                p = formulas.probability(e, results.peak, results.factor, results.scale)
            if labelled:
                p = where_eq(y, class_of_lanes, results.at_label, p)
                class_of_lanes = class_of_lanes + one
            write(out + j * line, p)
        return True

    run_register = vector.phase(run_register)

    def run(call, memory, rows, group):
        writes = not labelled or call.out.address != 0
        gather(call, call.x, group, 0, call.classes, memory.x, memory.rows)
        if labelled:
            load_labels(call, rows, group)
        for i in range(0, group.count, lanes_of(in_register(call.like))):
            if not run_register(call, memory, rows, i, writes):
                return False
        put_values(call, rows, group)
        if kind != READS and writes:
            scatter(call, call.out, group, 0, call.classes, memory.out, memory.rows)
        return True

    return vector.phase(run)


# Other rows: one after the other, but for their scalars


class Middle(NamedTuple):
    """Memory for one call: addresses. Of the scalars of rows, a register each."""

    kept: int  # exponentials of each row
    buffers: int  # its logits, where they are not in place
    out: int  # a row
    first: int  # a register of each row
    second: int
    logits: int  # int64: addresses of each row's logits
    lanes: int  # a vector
    maxima: int
    floors: int
    magics: int
    x_y: int
    factors: int
    scales: int
    peaks: int
    at_label: int
    log_s: int


@inline
def _pitch(call):
    """Bytes from a row's exponentials to the next one's."""
    vector_size = bytes_of(zeros(call.like))
    return (call.classes * size_of(call.like) + vector_size - 1) // vector_size * vector_size


@inline
def takes_middle(call):
    return takes(call) and SHORT <= call.classes <= BLOCK


@inline
def allocate_middle(call):
    like = call.like
    line, row = in_register(like), _pitch(call)
    width, size, all_rows = lanes_of(line), bytes_of(line), lanes_of(line) * row
    square, nine = width * size, (size, size, size, size, size, size, size, size, size)
    own = (all_rows, all_rows, row, square, square, width * 8, bytes_of(zeros(like)), *nine)
    rows, pieces, owner = _allocate(own, like)
    return Middle(*pieces), rows, owner


@inline
def most_middle(call):
    """Rows in a group: none is written, perhaps over its own logits, before all are as usual."""
    return lanes_of(in_register(call.like))


@shared
def _largest(x, n, like):
    """The maximum of at least a vector of logits, in lanes of a register."""
    vector.out_of_line()
    size, lanes = size_of(like), lanes_of(like)
    top = read(x + (n - lanes) * size, lowest(like))
    for j in range(0, n - lanes, lanes):
        top = maximum(read(x + j * size, top), top)
    return register_largest(top)


@shared
def _fold_row(x, n, m, floor, magic, kept, ahead, at_lanes, first, second, like):
    """Leave a row's exponentials in `kept`, unless that is 0.

    The sum of those below the maximum goes into `first`, the number of elements that are equal to it
    into `second`, in lanes of a register.
    """
    vector.out_of_line()
    size, lanes, line = size_of(like), lanes_of(like), in_register(like)
    whole, one = n // lanes * lanes, constants(like).one
    sums, counts = zeros(like), in_register(constants(like).zero)
    for j in range(0, whole, lanes):
        vector.prefetch_vector(ahead + j * size)
        v = read(x + j * size, sums)
        e = exponential(v, floor, magic)
        if kept != 0:
            write(kept + j * size, e)
        counts = counts + register_total(formulas.at_maximum(v, m, one))
        sums = sums + formulas.below_maximum(v, m, e)
    write(at_lanes, sums)
    for j in range(whole, n, lanes_of(line)):
        v = load(x + j * size, n - j, in_register(-constants(like).infinity))
        e = exponential(v, floor, magic)
        if kept != 0:
            write(kept + j * size, e)
        counts = counts + formulas.at_maximum(v, m, one)
        at = at_lanes + (j - whole) * size
        write(at, read(at, line) + formulas.below_maximum(v, m, e))
    write(first, register_total(read(at_lanes, sums)))
    write(second, counts)


class Row(NamedTuple):
    """What writing a row takes."""

    maximum: float
    log_s: float
    peak: float
    factor: float
    scale: float


def _result(kind):
    def result(v, row):
        if kind == LOGS:
            return formulas.log_probability(v, row.maximum, row.log_s)
        return formulas.probability(v, row.peak, row.factor, row.scale)

    return vector.inlined(result, f"result_{kind}")


def _write_row(kind):
    """A function that writes a row; its last register, read first, may overlap the one before."""
    result = _result(kind)

    def write_row(source, n, row, out, like):
        vector.out_of_line()
        size, lanes, line = size_of(like), lanes_of(like), in_register(like)
        whole, last = n // lanes * lanes, n - lanes_of(line)
        rest = read(source + last * size, line)
        for j in range(0, whole, lanes):
            write(out + j * size, result(read(source + j * size, zeros(like)), row))
        for j in range(whole, last, lanes_of(line)):
            write(out + j * size, result(read(source + j * size, line), row))
        write(out + last * size, result(rest, row))

    return vector.shared_as(write_row, f"write_row_{kind}")


_write_rows = {kind: _write_row(kind) for kind in (WRITES, LOGS)}


def middle_rows(operation):
    """A function that does a group; false, and nothing is written, if a row of it is not usual."""
    labelled, kind, finish = operation == "cross_entropy", _kind(operation), _finish(operation)
    write_row = _write_rows.get(kind, _write_rows[WRITES])

    def run(call, memory, rows, group):
        like, n, count, x = call.like, call.classes, group.count, call.x
        line, size, pitch = in_register(constants(like).zero), size_of(like), _pitch(call)
        width, register = lanes_of(line), bytes_of(line)
        writes = call.out.address != 0
        if labelled:
            load_labels(call, rows, group)
        for k in range(count):
            start = folds.start_of_row(x, group, k)
            v = fetch(x, start, 0, n, memory.buffers + k * pitch, like)
            write(memory.logits + k * 8, v)
            write(memory.first + k * register, _largest(v, n, like))
        for k in range(count, width):  # idle ones: harmless numbers
            write(memory.first + k * register, line)
        m = largest_of_registers(memory.first, like)
        reference = state.reference_of(widen(m))
        aim = window(reference, like)
        write(memory.maxima, m)
        write(memory.floors, aim[0])
        write(memory.magics, aim[1])
        write(memory.x_y, line)
        for k in range(count):
            at, v = k * size, read(memory.logits + k * 8, np.int64(0))
            top, floor = read(memory.maxima + at, like), read(memory.floors + at, like)
            kept = memory.kept + k * pitch if kind == WRITES and writes else 0
            ahead = folds.start_of_row(x, group, k + width)
            magic = read(memory.magics + at, like)
            sums = memory.lanes, memory.first + k * register, memory.second + k * register
            _fold_row(v, n, top, floor, magic, kept, ahead, *sums, like)
            if labelled:
                y = int(read(rows.label + at, like))
                if y >= 0:
                    write(memory.x_y + at, read(v + y * size, like))
        for k in range(count, width):
            write(memory.first + k * register, line)
            write(memory.second + k * register, in_register(constants(like).one))
        total = total_of_registers(memory.first, like)
        counts = total_of_registers(memory.second, like)
        x_y = read(memory.x_y, line)
        usual, results = finish(call, rows, 0, m, reference, aim, total, counts, x_y)
        if not usual:
            return False
        put_values(call, rows, group)
        if kind == READS or not writes:
            return True
        write(memory.factors, results.factor)
        write(memory.scales, results.scale)
        write(memory.peaks, results.peak)
        write(memory.at_label, results.at_label)
        write(memory.log_s, results.log_s)
        for k in range(count):
            at, start = k * size, folds.start_of_row(call.out, group, k)
            row = Row(
                read(memory.maxima + at, like),
                read(memory.log_s + at, like),
                read(memory.peaks + at, like),
                read(memory.factors + at, like),
                read(memory.scales + at, like),
            )
            source = memory.kept + k * pitch
            if kind == LOGS:
                source = read(memory.logits + k * 8, np.int64(0))
            out = memory.out if call.out.streamed else target_of(call.out, start, 0, memory.out)
            write_row(source, n, row, out, like)
            if labelled:
                y = int(read(rows.label + at, like))
                if y >= 0:
                    write(out + y * size, read(memory.at_label + at, like))
            if call.out.streamed:
                stream_block(out, n, start, like)
            else:
                deliver(call.out, start, 0, n, memory.out, like)
        return True

    return vector.phase(run)


def _fold_one_block(takes, allocate, most, rows, operation):
    """A function that does rows up to the first group that is not usual; None for other operations."""
    if operation not in OPERATIONS:
        return None
    run_group = rows(operation)

    def fold_one_block(call, row, stop):
        """Returns the rows that are left, or the first group of them."""
        vector.out_of_line()
        if not takes(call):
            return row, stop
        memory, numbers, owner = allocate(call)
        at_once, usual, until = most(call), True, row
        while usual and until < stop:
            row = until
            outer, inner, count = folds.place(call, row, at_once, stop)
            usual = run_group(call, memory, numbers, folds.Group(0, outer, inner, count, 0, 0, 0))
            until = row + count
        release(owner)
        return until if usual else row, until

    return vector.shared_as(fold_one_block, f"{rows.__name__}.{operation}")


#: What `folds.driver` takes for an operation: for columns, and for rows.
short = partial(_fold_one_block, takes_short, allocate_short, most_short, short_rows)
middle = partial(_fold_one_block, takes_middle, allocate_middle, most_middle, middle_rows)
