"""Blocks: the steps that kernels over rows are put together from, on contiguous memory.

A row is handled in blocks of `BLOCK` elements, which stay in the first-level cache between steps. A
block is read in place where its memory already is contiguous and of the compute dtype, otherwise
through a buffer.

The order of a sum is part of the contract among rows, columns and backends: element j of a block goes
to lane j modulo LANES, in order; the lanes' sums fold by halves in float64; blocks add in float64.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.maths import (
    OUT_SHIFT,
    SUM_SHIFT,
    cast,
    constants,
    exponential,
    softcap,
    window,
)
from fastll.backend.numba.state import (
    FACTOR,
    SCALE,
    M,
    N,
    State,
    get,
    raise_maximum,
    usable,
)
from fastll.backend.numba.vector import (
    INLINE,
    call,
    fma,
    lanes_of,
    largest,
    load,
    load_ahead,
    maximum,
    read,
    splat,
    store,
    stream,
    total,
    where_eq,
    widen,
    write,
)

BLOCK = 2048


class Operand(NamedTuple):
    """An array as a kernel sees it: where it is, its strides in bytes, and who reads and writes it.

    `read` and `write` are addresses of functions of `convert`; 0 where the class axis (the only axis,
    for element-wise operations) is contiguous and in the compute dtype. `address` is 0 where there is
    no such operand.
    """

    address: int
    outer: int
    classes: int
    inner: int
    read: int
    write: int
    streamed: bool  # written past the caches


NOTHING = Operand(0, 0, 0, 0, 0, 0, False)


@njit(**INLINE)
def address_of(memory):
    """Where an array is. Signed: an unsigned and a signed integer make a float64 in Numba."""
    return np.int64(memory.ctypes.data)


@njit(**INLINE)
def release(memory):
    """Memory that is used by its address must be named after its last use, or it is freed before."""
    memory[0] = 0


@njit(**INLINE)
def size_of(like):
    return 4 if lanes_of(like) == 32 else 8


@njit(**INLINE)
def start_of(x, outer, inner):
    """Address of the first element of a row."""
    return x.address + outer * x.outer + inner * x.inner


@njit(**INLINE)
def fetch(x, start, j, n, buffer, like):
    """Address of elements j to j + n of the row that starts at `start`: in place or in the buffer."""
    source = start + j * x.classes
    if x.read == 0:
        return source
    call(x.read, source, x.classes, buffer, size_of(like), n)
    return buffer


@njit(**INLINE)
def target_of(x, start, j, buffer):
    """Where to leave elements from j on: in place, or in the buffer for `deliver`."""
    return start + j * x.classes if x.write == 0 else buffer


@njit(**INLINE)
def deliver(x, start, j, n, buffer, like):
    """Write the buffer out, if that is where they were left."""
    if x.write != 0:
        call(x.write, buffer, size_of(like), start + j * x.classes, x.classes, n)


@njit(**INLINE)
def cap_block(v, n, cap, out, slope, like):
    """softcap * tanh(x / softcap) into `out`; its derivative into `slope` unless that is 0."""
    size = size_of(like)
    caps = splat(cast(cap, like))
    for j in range(0, n, lanes_of(like)):
        capped, derivative = softcap(load_ahead(v + j * size, n - j, splat(like)), caps)
        store(out + j * size, n - j, capped)
        if slope != 0:
            store(slope + j * size, n - j, derivative)


@njit(**INLINE)
def max_block(v, n, like):
    """The maximum; NaN are passed over."""
    size = size_of(like)
    lowest = splat(-constants(like).infinity)
    top = lowest
    for j in range(0, n, lanes_of(like)):
        top = maximum(load_ahead(v + j * size, n - j, lowest), top)
    return np.float64(largest(top))


class Pending(NamedTuple):
    """A row that has been folded and is written while the next one is read.

    So memory and arithmetic both are busy all the time.
    """

    source: int  # address of exponentials, or if `log`, of logits
    out: int
    j: int  # the first element that is left
    n: int
    log: bool
    streamed: bool
    scale: float  # of exponentials; from here on in the compute dtype
    same: float  # the exponential of the maximum: it gives `factor` exactly
    factor: float
    top: float  # subtracted from logits, and then `lowered`
    lowered: float


@njit(**INLINE)
def advanced(row, count):
    """The row with `count` elements fewer left."""
    return Pending(
        row.source,
        row.out,
        row.j + count,
        row.n,
        row.log,
        row.streamed,
        row.scale,
        row.same,
        row.factor,
        row.top,
        row.lowered,
    )


@njit(**INLINE)
def write_vector(row, j, count, whole):
    """Elements j to j + count of a row; `whole` vectors may be streamed."""
    size = size_of(row.scale)
    x = load(row.source + j * size, count, splat(constants(row.scale).zero))
    if row.log:  # both parts are at most 0, so that nothing cancels
        x = (x - splat(row.top)) - splat(row.lowered)
    else:
        x = where_eq(x, splat(row.same), splat(row.factor), x * splat(row.scale))
    if row.streamed and whole:
        stream(row.out + j * size, x)
    else:
        store(row.out + j * size, count, x)


@njit(**INLINE)
def vectors_left(row):
    return (row.n - row.j) // lanes_of(row.scale)


@njit(**INLINE)
def write_rest(row):
    """All that is left of a row."""
    count = lanes_of(row.scale)
    j = row.j
    while j + count <= row.n:
        write_vector(row, j, count, True)
        j += count
    write_vector(row, j, row.n - j, False)


@njit(**INLINE)
def add_block(v, n, row, at_top, terms, pending, next_v, next_n, like):
    """The state with a block added, what is left of the pending row, and the next block's maximum.

    Adds the sum of exp(x) / 2**n; `at_top`: of the elements other than m, and counts those. The row
    that is pending is written and the next block read meanwhile: memory and arithmetic both are busy.
    """
    size, count = size_of(like), lanes_of(like)
    c = constants(like)
    lowest, zero, one = splat(-c.infinity), splat(c.zero), splat(c.one)
    tops = splat(cast(row.m, like))
    floor, magic = window(row.n, float(SUM_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    sums = zero
    counts = zero
    top = lowest
    ready = vectors_left(pending) * count
    for j in range(0, n, count):
        if j < next_n:
            top = maximum(load_ahead(next_v + j * size, next_n - j, lowest), top)
        x = load(v + j * size, n - j, lowest)
        term = exponential(x, floors, magics)
        if at_top:
            sums = sums + where_eq(x, tops, zero, term)
            counts = counts + where_eq(x, tops, one, zero)
        else:
            sums = sums + term
        if terms != 0:
            store(terms + j * size, count, term)
        if j < ready:
            write_vector(pending, pending.j + j, count, True)
    row = State(row.m, row.e, row.k + total(counts), row.n, row.added + total(sums) * 2.0**-SUM_SHIFT)
    written = min(ready, (n + count - 1) // count * count)
    return row, advanced(pending, written), np.float64(largest(top))


@njit
def sum_exact(v, step, n, m, like):
    """`add_block` by the library's exp, for a maximum that is infinite or enormous.

    One term after the other, but with Kahan's compensation.
    """
    e = 0.0
    k = 0.0
    lost = 0.0
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        if x == m:
            k += 1.0
        else:
            term = math.exp(x - m) - lost
            added = e + term
            lost = (added - e) - term
            e = added
    return e, k


@njit(**INLINE)
def fold_block(v, n, top, row, terms, pending, next_v, next_n, like):
    """`add_block` for a block with maximum `top`.

    Leaves the block's terms, exp(x) / 2**(n - SUM_SHIFT), unless their address is 0.
    """
    if top > row.m:
        row = raise_maximum(row, top)
    if usable(row.m):
        return add_block(v, n, row, top == row.m, terms, pending, next_v, next_n, like)
    if terms != 0:
        fill_block(terms, n, 0.0, like)  # right for -inf; of others nobody asks
    e, k = sum_exact(v, size_of(like), n, row.m, like)
    row = State(row.m, row.e + e, row.k + k, row.n, row.added)
    return row, pending, max_block(next_v, next_n, like)


@njit(**INLINE)
def mask_block(v, b, n, out, like):
    """x where its weight is not 0, -inf elsewhere."""
    size = size_of(like)
    c = constants(like)
    lowest, zero = splat(-c.infinity), splat(c.zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        weight = load_ahead(b + j * size, n - j, zero)
        store(out + j * size, n - j, where_eq(weight, zero, lowest, x))


@njit(**INLINE)
def weighted_terms(x, weight, tops, floors, magics):
    """(b exp(x) / 2**n of elements other than m, b of those equal) in float64."""
    zero = splat(constants(x).zero)
    terms = widen(where_eq(x, tops, zero, exponential(x, floors, magics)))
    # scaled back before the weight comes in, which may be as large as a number can be
    terms = terms * widen(splat(cast(2.0**-SUM_SHIFT, x)))
    return terms * widen(weight), widen(where_eq(x, tops, weight, zero))


@njit(**INLINE)
def weighted_sum_block(v, b, n, row, like):
    """Add the sum of b exp(x) / 2**n over the elements other than m, and that of b over those equal."""
    size = size_of(like)
    if not usable(row.m):
        e, k = weighted_sum_exact(v, b, size, n, row.m, like)
        return State(row.m, row.e + e, row.k + k, row.n, row.added)
    c = constants(like)
    lowest, zero = splat(-c.infinity), splat(c.zero)
    tops = splat(cast(row.m, like))
    floor, magic = window(row.n, float(SUM_SHIFT), like)
    sums = widen(zero)
    tops_sum = widen(zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        weight = load_ahead(b + j * size, n - j, zero)
        terms, at_top = weighted_terms(x, weight, tops, splat(floor), splat(magic))
        sums = sums + terms
        tops_sum = tops_sum + at_top
    return State(row.m, row.e, row.k + total(tops_sum), row.n, row.added + total(sums))


@njit
def weighted_sum_exact(v, b, step, n, m, like):
    """`weighted_sum_block` likewise; weights of both signs at an infinite maximum make it NaN."""
    e = 0.0
    k = 0.0
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        weight = np.float64(read(b + j * step, like))
        if x == m:
            k += weight * m if m == np.inf and weight != 0.0 else weight
        elif weight != 0.0:
            e += weight * math.exp(x - m)
    return e, k


@njit(**INLINE)
def fold_weighted_block(v, b, n, row, buffer, like):
    """`fold_block` with weights."""
    mask_block(v, b, n, buffer, like)
    top = max_block(buffer, n, like)
    if top > row.m:
        row = raise_maximum(row, top)
    return weighted_sum_block(buffer, b, n, row, like)


@njit(**INLINE)
def exp_block(v, n, group, i, out, like):
    """factor * exp(x - m) for row i of a group; exactly `factor` where the exponentials are equal."""
    size = size_of(like)
    m, factor = get(group + M, i), get(group + FACTOR, i)
    if not usable(m):
        exp_exact(v, size, n, m, factor, out, like)
        return
    tops, factors = splat(cast(m, like)), splat(cast(factor, like))
    scales = splat(cast(get(group + SCALE, i), like))
    floor, magic = window(get(group + N, i), float(OUT_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    same = exponential(tops, floors, magics)
    for j in range(0, n, lanes_of(like)):
        term = exponential(load_ahead(v + j * size, n - j, tops), floors, magics)
        store(out + j * size, n - j, where_eq(term, same, factors, term * scales))


@njit
def exp_exact(v, step, n, m, factor, out, like):
    """`exp_block` by the library's exp; NaN throughout where the maximum is infinite."""
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        y = math.exp(x - m) * factor if abs(m) < np.inf else np.nan
        write(out + j * step, cast(y, like))


@njit(**INLINE)
def target_block(t, w, n, keep, spread, out, like):
    """u = w (keep * t + spread), with t = 0 and w = 1 where their address is 0."""
    size = size_of(like)
    c = constants(like)
    zero = splat(c.zero)
    keeps, spreads = splat(cast(keep, like)), splat(cast(spread, like))
    for j in range(0, n, lanes_of(like)):
        u = spreads
        if t != 0:
            u = fma(load_ahead(t + j * size, n - j, zero), keeps, spreads)
        if w != 0:
            u = u * load_ahead(w + j * size, n - j, zero)
        store(out + j * size, n - j, u)


@njit(**INLINE)
def distances(x, u, tops):
    """u (m - x), where a u of 0 annuls an infinite x."""
    zero = splat(constants(x).zero)
    return where_eq(u, zero, zero, u * (tops - x))


@njit(**INLINE)
def linear_block(v, u, n, m, like):
    """(sum of u (m - x), sum of u); a u of 0 annuls an infinite x."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    tops = splat(cast(m if m > -np.inf else 0.0, like))
    sums = zero
    weights = zero
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, zero)
        weight = load_ahead(u + j * size, n - j, zero)
        sums = sums + distances(x, weight, tops)
        weights = weights + weight
    return total(sums), total(weights)


@njit(**INLINE)
def subtract_block(out, u, n, factor, like):
    """out -= factor * u."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    factors = splat(cast(-factor, like))
    for j in range(0, n, lanes_of(like)):
        y = fma(load_ahead(u + j * size, n - j, zero), factors, load(out + j * size, n - j, zero))
        store(out + j * size, n - j, y)


@njit(**INLINE)
def multiply_block(out, slope, n, like):
    """out *= slope."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for j in range(0, n, lanes_of(like)):
        y = load(out + j * size, n - j, zero) * load(slope + j * size, n - j, zero)
        store(out + j * size, n - j, y)


@njit(**INLINE)
def fill_block(out, n, value, like):
    size = size_of(like)
    values = splat(cast(value, like))
    for j in range(0, n, lanes_of(like)):
        store(out + j * size, n - j, values)


@njit(**INLINE)
def scale_block(out, n, factor, like):
    """out *= factor."""
    size = size_of(like)
    zero, factors = splat(constants(like).zero), splat(cast(factor, like))
    for j in range(0, n, lanes_of(like)):
        store(out + j * size, n - j, load(out + j * size, n - j, zero) * factors)


@njit(**INLINE)
def until_line(address, like):
    """Elements before the first line of the cache."""
    return (-address & 63) // size_of(like)
