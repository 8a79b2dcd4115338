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

from fastll.backends.numba.maths import (
    OUT_SHIFT,
    SUM_SHIFT,
    cast,
    constants,
    exponential,
    softcap,
    window,
)
from fastll.backends.numba.state import raise_maximum, reference
from fastll.backends.numba.vector import (
    INLINE,
    call,
    fma,
    lanes_of,
    largest,
    load_ahead,
    maximum,
    read,
    splat,
    store_ahead,
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


NOTHING = Operand(0, 0, 0, 0, 0, 0)


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
        store_ahead(out + j * size, n - j, capped)
        if slope != 0:
            store_ahead(slope + j * size, n - j, derivative)


@njit(**INLINE)
def max_block(v, n, like):
    """The maximum; NaN are passed over."""
    size = size_of(like)
    lowest = splat(-constants(like).infinity)
    top = lowest
    for j in range(0, n, lanes_of(like)):
        top = maximum(load_ahead(v + j * size, n - j, lowest), top)
    return np.float64(largest(top))


@njit(**INLINE)
def scan_block(v, n, ref, like):
    """(sum of exp(x - m), maximum) in one pass, for a block below the maximum m of `ref`."""
    size = size_of(like)
    lowest = splat(-constants(like).infinity)
    floor, magic = window(ref.n, float(SUM_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    top = lowest
    sums = splat(constants(like).zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        top = maximum(x, top)
        sums = sums + exponential(x, floors, magics)
    return total(sums) * 2.0**-SUM_SHIFT / ref.lead, np.float64(largest(top))


@njit(**INLINE)
def sum_block(v, n, m, ref, like):
    """(sum of exp(x - m) over the elements other than m, number of those equal to m)."""
    size = size_of(like)
    if not ref.usable:
        return sum_exact(v, size, n, m, like)
    c = constants(like)
    lowest, zero, one = splat(-c.infinity), splat(c.zero), splat(c.one)
    tops = splat(cast(m, like))
    floor, magic = window(ref.n, float(SUM_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    sums = zero
    counts = zero
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        sums = sums + where_eq(x, tops, zero, exponential(x, floors, magics))
        counts = counts + where_eq(x, tops, one, zero)
    return total(sums) * 2.0**-SUM_SHIFT / ref.lead, total(counts)


@njit
def sum_exact(v, step, n, m, like):
    """`sum_block` by the library's exp, for a maximum that is infinite or enormous.

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
def fold_block(v, n, m, e, k, ref, like):
    """(m, e, k) and the reference of m, with a block added."""
    if ref.usable:
        below, top = scan_block(v, n, ref, like)
        if top < m:
            return m, e + below, k, ref
    else:
        top = max_block(v, n, like)
    if top > m:
        m, e, k = raise_maximum(m, e, k, top)
        ref = reference(m)
    others, count = sum_block(v, n, m, ref, like)
    return m, e + others, k + count, ref


@njit(**INLINE)
def mask_block(v, b, n, out, like):
    """x where its weight is not 0, -inf elsewhere."""
    size = size_of(like)
    c = constants(like)
    lowest, zero = splat(-c.infinity), splat(c.zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        weight = load_ahead(b + j * size, n - j, zero)
        store_ahead(out + j * size, n - j, where_eq(weight, zero, lowest, x))


@njit(**INLINE)
def weighted_sum_block(v, b, n, m, ref, like):
    """(sum of b exp(x - m) over the elements other than m, sum of b over those equal to m)."""
    size = size_of(like)
    if not ref.usable:
        return weighted_sum_exact(v, b, size, n, m, like)
    c = constants(like)
    lowest, zero = splat(-c.infinity), splat(c.zero)
    tops = splat(cast(m, like))
    floor, magic = window(ref.n, float(SUM_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    sums = widen(zero)
    tops_sum = widen(zero)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, lowest)
        weight = load_ahead(b + j * size, n - j, zero)
        terms = widen(where_eq(x, tops, zero, exponential(x, floors, magics)))
        # scaled back before the weight comes in, which may be as large as a number can be
        terms = terms * widen(splat(cast(2.0**-SUM_SHIFT, like)))
        sums = sums + terms * widen(weight)
        tops_sum = tops_sum + widen(where_eq(x, tops, weight, zero))
    return total(sums) / ref.lead, total(tops_sum)


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
def fold_weighted_block(v, b, n, m, e, k, ref, buffer, like):
    """`fold_block` with weights."""
    mask_block(v, b, n, buffer, like)
    top = max_block(buffer, n, like)
    if top > m:
        m, e, k = raise_maximum(m, e, k, top)
        ref = reference(m)
    others, count = weighted_sum_block(buffer, b, n, m, ref, like)
    return m, e + others, k + count, ref


@njit(**INLINE)
def exp_block(v, n, m, ref, factor, out, like):
    """factor * exp(x - m); exactly `factor` where x is m."""
    size = size_of(like)
    if not ref.usable:
        exp_exact(v, size, n, m, factor, out, like)
        return
    tops, top_value = splat(cast(m, like)), splat(cast(factor, like))
    scale = splat(cast(factor / ref.lead * 2.0**-OUT_SHIFT, like))
    floor, magic = window(ref.n, float(OUT_SHIFT), like)
    floors, magics = splat(floor), splat(magic)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, tops)
        y = exponential(x, floors, magics) * scale
        store_ahead(out + j * size, n - j, where_eq(x, tops, top_value, y))


@njit
def exp_exact(v, step, n, m, factor, out, like):
    """`exp_block` by the library's exp; NaN throughout where the maximum is infinite."""
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        y = math.exp(x - m) * factor if abs(m) < np.inf else np.nan
        write(out + j * step, cast(y, like))


@njit(**INLINE)
def log_block(v, n, m, log_s, out, like):
    """(x - m) - log s: both parts are at most 0, so that nothing cancels."""
    size = size_of(like)
    tops, logs = splat(cast(m, like)), splat(cast(log_s, like))
    for j in range(0, n, lanes_of(like)):
        store_ahead(out + j * size, n - j, (load_ahead(v + j * size, n - j, tops) - tops) - logs)


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
        store_ahead(out + j * size, n - j, u)


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
        sums = sums + where_eq(weight, zero, zero, weight * (tops - x))
        weights = weights + weight
    return total(sums), total(weights)


@njit(**INLINE)
def subtract_block(out, u, n, factor, like):
    """out -= factor * u."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    factors = splat(cast(-factor, like))
    for j in range(0, n, lanes_of(like)):
        y = fma(load_ahead(u + j * size, n - j, zero), factors, load_ahead(out + j * size, n - j, zero))
        store_ahead(out + j * size, n - j, y)


@njit(**INLINE)
def multiply_block(out, slope, n, like):
    """out *= slope."""
    size = size_of(like)
    zero = splat(constants(like).zero)
    for j in range(0, n, lanes_of(like)):
        y = load_ahead(out + j * size, n - j, zero) * load_ahead(slope + j * size, n - j, zero)
        store_ahead(out + j * size, n - j, y)


@njit(**INLINE)
def fill_block(out, n, value, like):
    size = size_of(like)
    values = splat(cast(value, like))
    for j in range(0, n, lanes_of(like)):
        store_ahead(out + j * size, n - j, values)
