"""The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.

Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is done
once a row is done for a group of `WIDTH` rows: a table in memory, named by its address, with a column
of float64 for each thing that is known of a row.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.maths import (
    LN2_HIGH,
    LN2_LOW,
    OUT_SHIFT,
    exp_reduced,
    log1p_sum,
    split,
    window,
)
from fastll.backend.numba.vector import (
    INLINE,
    absolute,
    first,
    fma,
    load,
    read,
    round_down,
    splat,
    store,
    where_eq,
    where_gt,
    write,
)

WIDTH = 64
LANES = 16  # of float64

#: A maximum of this magnitude, or an infinite one, is no reference for `maths.exponential`.
#: Float32 has steps of 1/16 there, so that x - m is exact wherever exp(x - m) matters.
LIMIT = 2.0**20

_LOG2E = 1 / math.log(2)

#: Offsets of a group's columns in bytes.
(
    M,  # these five as in `State`
    E,
    K,
    N,
    ADDED,
    LEAD,  # exp(m) / 2**n
    LOG_S,  # log(e + k)
    KEPT,  # 1, or 0 where the row is ignored
    Y,  # the label
    X_Y,  # logit, weight and derivative of the soft cap at the label
    W_Y,
    SLOPE_Y,
    DISTANCE,  # sum_j u_j (m - x_j)
    MASS,  # sum_j u_j
    LOSS,
    FACTOR,  # of exp(x - m) in the result
    SCALE,  # of `exponential` in the result
    G_Y,  # the gradient at the label
    END,
) = (column * WIDTH * 8 for column in range(19))


class State(NamedTuple):
    """A row that elements are being added to."""

    m: float
    e: float
    k: float
    n: float  # exponent of the reference of `exponential`
    added: float  # to e since, but in multiples of 2**n: so no exponential is needed on the way


@njit(**INLINE)
def get(column, i):
    return read(column + i * 8, 0.0)


@njit(**INLINE)
def put(column, i, value):
    write(column + i * 8, value)


@njit(**INLINE)
def lanes(column, i):
    """A vector of rows from i on."""
    return load(column + i * 8, LANES, splat(0.0))


@njit(**INLINE)
def put_lanes(column, i, values):
    store(column + i * 8, LANES, values)


@njit(**INLINE)
def usable(m):
    """Whether a maximum serves as a reference."""
    return abs(m) < LIMIT


@njit(**INLINE)
def where_usable(m, x, otherwise):
    return where_gt(splat(LIMIT), absolute(m), x, otherwise)


@njit(**INLINE)
def exponent_of(m):
    """The exponent n of the reference for a maximum m; 0 where it is not usable."""
    return where_usable(m, round_down(m * _LOG2E + 0.5), splat(0.0))


@njit(**INLINE)
def lead_of(m, n):
    """exp(m) / 2**n, a number about 1; 1 where m is not usable."""
    return where_usable(m, exp_reduced((m - n * LN2_HIGH) - n * LN2_LOW), splat(1.0))


@njit(**INLINE)
def state_of(group, i):
    return State(
        get(group + M, i),
        get(group + E, i),
        get(group + K, i),
        get(group + N, i),
        get(group + ADDED, i),
    )


@njit(**INLINE)
def set_state(group, i, row):
    put(group + M, i, row.m)
    put(group + E, i, row.e)
    put(group + K, i, row.k)
    put(group + N, i, row.n)
    put(group + ADDED, i, row.added)


@njit
def begin(group):
    """Every row the identity, idle ones too, so that their lanes hold harmless numbers."""
    for column in range(group, group + END, WIDTH * 8):
        value = splat(0.0)
        if column == group + M:
            value = splat(-np.inf)
        elif column == group + KEPT or column == group + W_Y or column == group + SLOPE_Y:
            value = splat(1.0)
        for i in range(0, WIDTH, LANES):
            put_lanes(column, i, value)


@njit
def raise_maximum(row, top):
    """The state relative to a larger maximum `top`.

    The rounding error of m - top, found as in Knuth's two-sum, corrects the exponential: otherwise a
    difference of d would cost d roundoffs.
    """
    n = first(exponent_of(splat(top)))
    if row.m == -np.inf:
        return State(top, (row.e + row.added) * 0.0, 0.0, n, 0.0)
    d = row.m - top
    rounded = d - row.m
    error = (row.m - (d - rounded)) - (top + rounded) if d > -np.inf else 0.0
    e = row.e + row.added / first(lead_of(splat(row.m), splat(row.n)))
    return State(top, (e + row.k) * (math.exp(d) * (1.0 + error)), 0.0, n, 0.0)


@njit
def settle(group, count):
    """Nothing more is added. A row without an element above -inf is the identity; a NaN stays."""
    zero, none = splat(0.0), splat(-np.inf)
    for i in range(0, count, LANES):
        m = lanes(group + M, i)
        lead = lead_of(m, lanes(group + N, i))
        e = lanes(group + E, i) + lanes(group + ADDED, i) / lead
        e = where_eq(m, none, e * zero, e)
        k = where_eq(m, none, zero, lanes(group + K, i))
        put_lanes(group + LEAD, i, lead)
        put_lanes(group + E, i, e)
        put_lanes(group + K, i, k)
        # for k at least 1, or a row without elements
        put_lanes(group + LOG_S, i, log1p_sum(e + (k - 1.0)))


@njit(**INLINE)
def weighted_log_sum(e, k):
    """log|e + k|, from whichever part dominates."""
    if abs(e) < abs(k):
        return math.log(abs(k)) + math.log1p(e / k)
    return math.log(abs(e + k))


@njit(**INLINE)
def times(coefficient, value):
    """The product, 0 where the coefficient is."""
    return coefficient * value if coefficient != 0.0 else 0.0


@njit(**INLINE)
def products(coefficient, value):
    zero = splat(0.0)
    return where_eq(coefficient, zero, zero, coefficient * value)


@njit(**INLINE)
def set_factors(group, i, factor):
    """Of a vector of rows from i on."""
    put_lanes(group + FACTOR, i, factor)
    put_lanes(group + SCALE, i, factor / lanes(group + LEAD, i) * 2.0**-OUT_SHIFT)


@njit
def finish(group, count, classes, sparse, options):
    """What becomes of the rows of a cross-entropy.

    At the label the gradient is (c + excess) p - u_y - c, whose part c (p - 1) is computed as
    -c (1 - p), and 1 - p from expm1(x_y - m): nothing cancels.
    """
    one, nan = splat(1.0), splat(np.nan)
    z, scale, eps = splat(options.z_loss), splat(options.scale), options.label_smoothing
    floor, magic = window(0.0, 0.0, 0.0)
    for i in range(0, count, LANES):
        m, log_s, mass = lanes(group + M, i), lanes(group + LOG_S, i), lanes(group + MASS, i)
        x_y, w_y = lanes(group + X_Y, i), lanes(group + W_Y, i)
        e, k = lanes(group + E, i), lanes(group + K, i)
        s = e + k
        rest = e + (k - one)
        c = splat(1.0 - eps if sparse else 0.0) * w_y
        lse = m + log_s
        loss = products(c, log_s + (m - x_y)) + products(mass, log_s)
        loss = (loss + lanes(group + DISTANCE, i)) + products(z, lse * lse)
        if classes > 0:
            loss = where_eq(m, splat(-np.inf), nan, loss)
        put_lanes(group + LOSS, i, products(lanes(group + KEPT, i), loss))
        excess = mass + products(z + z, lse)
        q, t = split(x_y - m, splat(floor), splat(magic))
        p_y = fma(q, t, t) / s
        others = (rest - fma(q, t, t - one)) / s  # 1 - p_y
        g_y = (excess * p_y - splat(eps / classes) * w_y) - c * others
        g_y = (scale * g_y) * lanes(group + SLOPE_Y, i)
        put_lanes(group + G_Y, i, where_gt(splat(np.inf), absolute(m), g_y, nan))
        set_factors(group, i, scale * (c + excess) / s)
