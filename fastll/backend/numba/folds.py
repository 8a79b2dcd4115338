"""Folds: the driver of their kernels, and the phases that rows and columns share.

A kernel walks through groups of rows: each is folded into its state, and then what has its shape is
written. How elements are read is that of two families: `rows` takes block by block along a row,
`columns` a tile across many rows. Either compiles a kernel for each operation that is called.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba import state, vector
from fastll.backend.numba.cache import cached
from fastll.backend.numba.calls import Layout, Number, Operand, RowOperand
from fastll.backend.numba.maths import cast, constants, formulas
from fastll.backend.numba.memory import KERNEL, address_of, fetch, release, start_of
from fastll.backend.numba.state import row_of, rows_of
from fastll.backend.numba.vector import absolute, fma, inline, read, size_of, where_eq, where_gt, write
from fastll.contract import Options


class Call(NamedTuple):
    """A fold as its kernel sees it."""

    x: Operand
    second: Operand
    labels: RowOperand
    sample: RowOperand
    weight: int  # address of the class weights
    options: Options
    state: RowOperand
    value: RowOperand
    lse: RowOperand
    sign: RowOperand
    selected: RowOperand
    out: Operand
    classes: int
    choices: int  # labels of a row that are selected
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
    buffer: int  # for a number of the compute dtype
    second: int  # table of the rows of target logits, where there are any


@inline
def has_targets(call):
    """Whether there is a second operand in the shape of the rows, be it only eps / C everywhere."""
    return call.second.address != 0 or call.options.label_smoothing != 0.0


@inline
def start_of_row(x, group, i):
    """Address of the first element of row i of a group."""
    return start_of(x, group.outer, group.inner + i)


@inline
def load_states(call, group):
    """The states that the rows start from."""
    step = call.state.step
    for i in range(group.count if call.state.address != 0 else 0):
        row, at = row_of(group.table, i), start_of_row(call.state, group, i)
        row.maximum, row.below = read(at, 0.0), read(at + step, 0.0)
        row.at_maximum = read(at + 2 * step, 0.0)
        row.reference = vector.first(state.reference_of(vector.splat(row.maximum)))


@inline
def load_samples(call, group):
    """Sample weights."""
    for i in range(group.count if call.sample.address != 0 else 0):
        row_of(group.table, i).sample = read(start_of_row(call.sample, group, i), 0.0)


@inline
def load_targets(call, group):
    """Sample weights, labels and their class weights.

    Another thread may have changed a label since it was checked: one that is no class makes NaN.
    """
    like = call.like
    load_samples(call, group)
    for i in range(group.count if call.labels.address != 0 else 0):
        row, y = row_of(group.table, i), read(start_of_row(call.labels, group, i), np.int64(0))
        if y == call.options.ignore_index:
            row.sample = 0.0
        elif y < 0 or y >= call.classes:
            y = np.int64(-1)
            row.label_weight = np.nan
        elif call.weight != 0:
            row.label_weight = read(call.weight + y * size_of(like), like)
        row.label = y


@inline
def logit(call, group, i, y):
    """Element y of row i of a group, times the inverse temperature."""
    like, start = call.like, start_of_row(call.x, group, i)
    x = read(fetch(call.x, start, y, 1, group.buffer, like), like)
    return x * cast(call.options.inverse_temperature, like)


@inline
def select(call, group):
    """The log-probabilities of the labels of rows; NaN for one that is no class."""
    labels, selected = call.labels, call.selected
    for i in range(group.count if selected.address != 0 else 0):
        row = row_of(group.table, i)
        label, to = start_of_row(labels, group, i), start_of_row(selected, group, i)
        for k in range(call.choices):
            y, result = read(label + k * labels.step, np.int64(0)), np.nan
            if 0 <= y < call.classes:
                x = np.float64(logit(call, group, i, y))
                result = formulas.log_probability(x, row.maximum, row.log_s)
            write(to + k * selected.step, cast(result, call.like))


@inline
def write_values(call, group):
    """The numbers of rows that are asked for."""
    for i in range(group.count):
        row = row_of(group.table, i)
        if call.value.address != 0:
            write(start_of_row(call.value, group, i), cast(row.value, call.like))
        if call.lse.address != 0:
            write(start_of_row(call.lse, group, i), cast(row.lse, call.like))


@inline
def weighted_log_sum(e, k):
    """log|e + k|, from whichever part dominates."""
    if abs(e) < abs(k):
        return math.log(abs(k)) + math.log1p(e / k)
    return math.log(abs(e + k))


@inline
def end_logsumexp(call, group):
    state.settle(group.table, group.count)
    step = call.state.step
    for i in range(group.count):
        row = row_of(group.table, i)
        m, e, k = row.maximum, row.below, row.at_maximum
        if call.second.address != 0:  # of any sign; a negative sum is NaN unless signs are asked for
            log_s = weighted_log_sum(e, k)
            if m == -np.inf and e == e:
                log_s = -np.inf
            elif call.sign.address == 0 and e + k < 0.0:
                log_s = np.nan
            row.lse = m + log_s
        if call.state.address != 0:
            at = start_of_row(call.state, group, i)
            write(at, m)
            write(at + step, e)
            write(at + 2 * step, k)
        if call.sign.address != 0:
            write(start_of_row(call.sign, group, i), cast(np.sign(e + k), call.like))
    write_values(call, group)
    select(call, group)


@inline
def end_softmax(call, group):
    state.settle(group.table, group.count)
    for i in range(0, group.count, state.LANES):
        rows = rows_of(group.table, i, 0.0)
        state.set_factors(rows, 1.0 / (rows.below + rows.at_maximum), call.like)


@inline
def end_log_softmax(call, group):
    state.settle(group.table, group.count)


@inline
def where_finite(maximum, value):
    """NaN where a maximum is infinite, as it is in a row without elements."""
    return where_gt(np.inf, absolute(maximum), value, np.nan)


@inline
def label_share(call, label_weight):
    """What of a label's class weight is the point mass."""
    eps = call.options.label_smoothing
    return label_weight * (1.0 - eps if call.labels.address != 0 else 0.0)


@inline
def cross_entropy_of(call, row, sample, x_y, label_weight, mass, distances):
    """Losses of rows that are `Settled`."""
    c_y, z_loss = label_share(call, label_weight), call.options.z_loss
    loss = formulas.cross_entropy_loss(row.m, row.log_s, c_y, x_y, mass, distances, z_loss)
    if call.classes > 0:
        loss = where_eq(row.m, -np.inf, np.nan, loss)
    return formulas.product(sample, loss)


@inline
def cross_entropy_gradient_of(call, row, upstream, x_y, label_weight, mass, label_slope):
    """Factors of exp(x - m) in their gradients, and gradients at the labels."""
    limits, z_loss = constants(0.0), call.options.z_loss
    q, t = formulas.split(x_y - row.m, limits.floor, limits.magic)
    c_y = label_share(call, label_weight)
    u_y = label_weight * (call.options.label_smoothing / call.classes)
    s, rest = row.e + row.k, row.e + (row.k - 1.0)
    factor, g_y = formulas.cross_entropy_gradient(
        row.m + row.log_s, s, rest, c_y, u_y, mass, z_loss, fma(q, t, t), fma(q, t, t - 1.0)
    )
    g_y = (g_y * upstream) * label_slope
    return factor * upstream / s, where_finite(row.m, g_y)


@vector.shared
def end_cross_entropy(call, group):
    """Losses, and what their gradients take."""
    vector.out_of_line()
    state.settle(group.table, group.count)
    for i in range(0, group.count, state.LANES):
        rows = rows_of(group.table, i, 0.0)
        x_y, weight, mass = rows.label_logit, rows.label_weight, rows.mass
        row = state.Settled(rows.maximum, rows.lead, rows.below, rows.at_maximum, rows.log_s)
        rows.value = cross_entropy_of(call, row, rows.sample, x_y, weight, mass, rows.distance)
        rows.upstream = upstream = call.options.scale * rows.sample
        factor, rows.label_gradient = cross_entropy_gradient_of(
            call, row, upstream, x_y, weight, mass, rows.label_slope
        )
        state.set_factors(rows, factor, call.like)
    write_values(call, group)


@inline
def end_nll_loss(call, group):
    eps = call.options.label_smoothing
    c = 1.0 - eps if call.labels.address != 0 else 0.0
    for i in range(0, group.count, state.LANES):
        rows = rows_of(group.table, i, 0.0)
        c_y, u_y = rows.label_weight * c, rows.label_weight * (eps / call.classes)
        loss = formulas.nll_loss(c_y, rows.label_logit, rows.distance)
        rows.value = formulas.product(rows.sample, loss)
        rows.upstream = call.options.scale * rows.sample
        if call.labels.address != 0:
            rows.factor = where_eq(rows.label, -1.0, np.nan, 0.0)
        rows.label_gradient = (0.0 - (c_y + u_y)) * rows.upstream
    write_values(call, group)


@inline
def set_softmax_factors(call, rows, s):
    """Factors of a softmax in the gradient."""
    tau = call.options.inverse_temperature
    state.set_factors(rows, rows.sample * (call.options.scale * tau) / s, call.like)


@inline
def end_entropy(call, group):
    state.settle(group.table, group.count)
    for i in range(0, group.count, state.LANES):
        rows = rows_of(group.table, i, 0.0)
        s, away = rows.below + rows.at_maximum, rows.away + rows.away_added / rows.lead
        value = where_finite(rows.maximum, formulas.softmax_entropy(rows.log_s, away, s))
        rows.value = formulas.product(rows.sample, value)
        rows.mean = away / s
        set_softmax_factors(call, rows, s)
    write_values(call, group)
    select(call, group)


@inline
def end_divergence(call, group):
    state.settle(group.table, group.count)
    state.settle(group.second, group.count)
    for i in range(0, group.count, state.LANES):
        rows, others = rows_of(group.table, i, 0.0), rows_of(group.second, i, 0.0)
        u, away = others.below + others.at_maximum, others.away + others.away_added / others.lead
        value = formulas.kl_divergence_of_sums(rows.log_s, others.log_s, away, u)
        value = where_finite(others.maximum, where_finite(rows.maximum, value))
        rows.value = formulas.product(rows.sample, value)
        others.sample = rows.sample
        set_softmax_factors(call, rows, rows.below + rows.at_maximum)
        set_softmax_factors(call, others, u)
    write_values(call, group)


@inline
def end_terms(call, group):
    for i in range(group.count):
        row = row_of(group.table, i)
        row.value = call.options.scale * row.value + 0.0  # without the sign that a scale gives a 0
    write_values(call, group)


#: What an operation does with a group of rows before its elements are read, and after.
PHASES = {
    "logsumexp": (load_states, end_logsumexp),
    "softmax": (load_states, end_softmax),
    "log_softmax": (load_states, end_log_softmax),
    "cross_entropy": (load_targets, end_cross_entropy),
    "nll_loss": (load_targets, end_nll_loss),
    "entropy_from_logits": (load_samples, end_entropy),
    "kl_divergence_from_logits": (load_samples, end_divergence),
}
_TERMS = load_states, end_terms
#: Those whose logits are multiplied by an inverse temperature.
TEMPERED = "logsumexp", "entropy_from_logits", "kl_divergence_from_logits"
#: That with a state of the second operand too, and those whose last state has a sum of distances.
PAIRED = "kl_divergence_from_logits"
AVERAGES = "entropy_from_logits", PAIRED


@inline
def place(call, row, most, stop):
    """(outer, inner, count) of the next group, from `row` on."""
    inner = row % call.inner
    return row // call.inner, inner, max(0, min(most, call.inner - inner, stop - row))


@inline
def _nothing_directly(call, row, stop):
    return row, stop


def driver(family, operation, allocate, rows_at_once, walk, direct=None):
    """The kernel of an operation, with the phases of a family.

    `allocate` makes its memory, `rows_at_once` says how many rows make the next group, `walk` folds
    the rows of one group and writes those of the one before. Before that, `direct(call, row, stop)`
    does what rows it can, and returns those that are next: (row, stop).
    """
    load, end = PHASES.get(operation, _TERMS)
    paired, direct = operation == PAIRED, direct or _nothing_directly

    def run(words, like, start, stop):
        call, done = _unpack(address_of(words), like), start
        while done < stop:
            row, until = direct(call, done, stop)
            done = until
            if row == until:
                continue
            memory, owner = allocate(call)
            before = Group(memory.tables, 0, 0, 0, 1, memory.x, 0)
            while row < until or before.count > 0:
                outer, inner, count = place(call, row, rows_at_once(call, memory, row), until)
                half = 1 - before.half
                table = memory.tables + half * state.TABLE_SIZE
                second = table + 2 * state.TABLE_SIZE
                group = Group(table, outer, inner, count, half, memory.x, second)
                state.begin(table)
                if paired:
                    state.begin(second)
                load(call, group)
                walk(call, memory, group, before)
                end(call, group)
                row += group.count
                written = group.count if call.out.address != 0 else 0
                before = Group(table, outer, inner, written, half, memory.x, second)
            release(owner)
        if call.out.streamed:
            vector.stream_fence()

    run.__qualname__ = f"{family}.{operation}"
    return cached(njit(**KERNEL)(run))


@cached
@njit(**KERNEL)
def check_labels(labels, classes, ignore_index, weight):
    """First position of a label outside [0, classes), or -1; weight and number of the kept ones."""
    kept = rows = 0.0
    for i in range(labels.size):
        y = labels[i]
        if y == ignore_index:
            continue
        if y < 0 or y >= classes:
            return i, 0.0, 0.0
        rows += 1.0
        kept += weight[y] if weight.size else 1.0
    return -1, kept, rows
