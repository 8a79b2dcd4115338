"""Folds: the driver of their kernels, and the phases that rows and columns share.

A kernel walks through groups of rows: each is folded into its state, and then what has its shape is
written. How elements are read is that of two families: `rows` takes block by block along a row,
`columns` a tile across many rows. Either compiles a kernel for each operation that is called.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.cache import cached
from fastll.backend.numba.calls import Layout, Number, Operand, RowOperand
from fastll.backend.numba.maths import cast
from fastll.backend.numba.memory import KERNEL, address_of, release, size_of, start_of
from fastll.backend.numba.state import (
    AT_MAXIMUM,
    BELOW,
    END,
    KEPT,
    LABEL,
    LABEL_WEIGHT,
    LSE,
    MAXIMUM,
    REFERENCE,
    VALUE,
    begin,
    finish_cross_entropy,
    finish_softmax,
    get,
    put,
    reference_of,
    settle,
    weighted_log_sum,
)
from fastll.backend.numba.vector import INLINE, first, read, splat, stream_fence, write
from fastll.contract import Options


class Call(NamedTuple):
    """A fold as its kernel sees it."""

    x: Operand
    second: Operand
    labels: RowOperand
    weight: int  # address of the class weights
    options: Options
    state: RowOperand
    value: RowOperand
    lse: RowOperand
    sign: RowOperand
    out: Operand
    classes: int
    inner: int
    like: Number  # 0: says what the compute dtype is


#: How a `Call` is given to a kernel.
LAYOUT = Layout(Call)
_unpack = LAYOUT.unpack


class Group(NamedTuple):
    """Rows inner to inner + count of an outer one."""

    table: int  # of `state`
    outer: int
    inner: int
    count: int
    half: int  # of the memory for groups: one is folded while the one before it is written


@njit(**INLINE)
def has_targets(call):
    """Whether a cross-entropy has a target in the shape of the row."""
    return call.labels.address == 0 or call.options.label_smoothing != 0.0


@njit(**INLINE)
def load_nothing(call, group):
    pass


@njit(**INLINE)
def load_states(call, group):
    """The states that the rows start from."""
    state, table = call.state, group.table
    if state.address != 0:
        for i in range(group.count):
            at = start_of(state, group.outer, group.inner + i)
            maximum = read(at, 0.0)
            put(table + MAXIMUM, i, maximum)
            put(table + BELOW, i, read(at + state.step, 0.0))
            put(table + AT_MAXIMUM, i, read(at + 2 * state.step, 0.0))
            put(table + REFERENCE, i, first(reference_of(splat(maximum))))


@njit(**INLINE)
def load_labels(call, group):
    """Labels and their class weights.

    Another thread may have changed a label since it was checked: one that is no class makes NaN.
    """
    labels, table, like = call.labels, group.table, call.like
    if labels.address != 0:
        for i in range(group.count):
            y = read(start_of(labels, group.outer, group.inner + i), np.int64(0))
            kept, weight = y != call.options.ignore_index, 1.0
            if kept and (y < 0 or y >= call.classes):
                y, weight = np.int64(-1), np.nan
            elif kept and call.weight != 0:
                weight = np.float64(read(call.weight + y * size_of(like), like))
            put(table + LABEL, i, float(y))
            put(table + KEPT, i, 1.0 if kept else 0.0)
            put(table + LABEL_WEIGHT, i, weight)


@njit(**INLINE)
def put_rows(x, group, column, like):
    """One number per row, where it is asked for."""
    if x.address != 0:
        for i in range(group.count):
            write(start_of(x, group.outer, group.inner + i), cast(get(group.table + column, i), like))


@njit(**INLINE)
def end_logsumexp(call, group):
    table, state, sign = group.table, call.state, call.sign
    settle(table, group.count)
    for i in range(group.count):
        m, e, k = get(table + MAXIMUM, i), get(table + BELOW, i), get(table + AT_MAXIMUM, i)
        if (
            call.second.address != 0
        ):  # sums of any sign; a negative one is NaN unless signs are asked for
            log_s = weighted_log_sum(e, k)
            if m == -np.inf and e == e:
                log_s = -np.inf
            elif sign.address == 0 and e + k < 0.0:
                log_s = np.nan
            put(table + LSE, i, m + log_s)
        if state.address != 0:
            at = start_of(state, group.outer, group.inner + i)
            write(at, m)
            write(at + state.step, e)
            write(at + 2 * state.step, k)
        if sign.address != 0:
            at = start_of(sign, group.outer, group.inner + i)
            write(at, cast(np.sign(e + k), call.like))
    put_rows(call.lse, group, LSE, call.like)


@njit(**INLINE)
def end_softmax(call, group):
    settle(group.table, group.count)
    finish_softmax(group.table, group.count, call.like)


@njit(**INLINE)
def end_log_softmax(call, group):
    settle(group.table, group.count)


@njit(**INLINE)
def end_cross_entropy(call, group):
    settle(group.table, group.count)
    sparse = call.labels.address != 0
    finish_cross_entropy(group.table, group.count, call.classes, sparse, call.options, call.like)
    put_rows(call.value, group, VALUE, call.like)
    put_rows(call.lse, group, LSE, call.like)


@njit(**INLINE)
def end_sum(call, group):
    for i in range(group.count):
        value = get(group.table + VALUE, i) * call.options.scale
        put(group.table + VALUE, i, value)
    put_rows(call.value, group, VALUE, call.like)


class Phases(NamedTuple):
    """What an operation does with a group of rows before its elements are read, and after."""

    load: object
    end: object


PHASES = {
    "logsumexp": Phases(load_states, end_logsumexp),
    "softmax": Phases(load_states, end_softmax),
    "log_softmax": Phases(load_states, end_log_softmax),
    "cross_entropy": Phases(load_labels, end_cross_entropy),
}
SUM = Phases(load_nothing, end_sum)


@njit(**INLINE)
def next_group(call, tables, half, row, stop, most):
    """The rows from `row` on that are neighbours, at most `most`."""
    inner = row % call.inner
    count = min(most, min(call.inner - inner, stop - row))
    return Group(tables + half * END, row // call.inner, inner, count, half)


def driver(family, operation, allocate, rows_at_once, walk):
    """The kernel of an operation, with the phases of a family.

    `allocate` makes its memory, `rows_at_once` says how many rows make the next group, `walk` folds
    the rows of one group and writes those of the one before.
    """
    load, end = PHASES.get(operation, SUM)

    def run(words, like, start, stop):
        call = _unpack(address_of(words), like)
        memory, owner = allocate(call)
        before = Group(memory.tables, 0, 0, 0, 1)
        row = start
        while row < stop or before.count > 0:
            most = rows_at_once(call, memory, row)
            group = next_group(call, memory.tables, 1 - before.half, row, max(row, stop), most)
            begin(group.table)
            load(call, group)
            walk(call, memory, group, before)
            end(call, group)
            row += group.count
            written = group.count if call.out.address != 0 else 0
            before = Group(group.table, group.outer, group.inner, written, group.half)
        if call.out.streamed:
            stream_fence()
        release(owner)

    run.__qualname__ = f"{family}.{operation}"
    return cached(njit(**KERNEL)(run))


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
