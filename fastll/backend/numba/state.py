"""The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.

Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is done
once per row is done for a group of `GROUP` rows: a table in memory, named by its address, with a column
of float64 for each thing that is known of a row.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backend.numba.maths import constants, formulas, log1p_sum
from fastll.backend.numba.vector import (
    INLINE,
    absolute,
    first,
    fma,
    lanes_of,
    load,
    read,
    round_down,
    splat,
    store,
    where_eq,
    where_ge,
    where_gt,
    write,
)
from fastll.contract import GROUP
from fastll.formulas.constants import LIMIT, LN2_HIGH, LN2_LOW, SHIFT

LANES = 16  # of float64

_LOG2E = 1 / math.log(2)
_UNSHIFT = 2.0**-SHIFT

#: Offsets of a table's columns in bytes.
(
    MAXIMUM,  # these five as in `State`
    BELOW,
    AT_MAXIMUM,
    REFERENCE,
    ADDED,
    LEAD,  # exp(maximum) / 2**reference
    LOG_S,  # log(below + at_maximum)
    LSE,
    KEPT,  # 1, or 0 where the row is ignored
    LABEL,  # -1 where it is no class
    LABEL_LOGIT,  # logit, class weight and derivative of the soft cap at the label
    LABEL_WEIGHT,
    LABEL_SLOPE,
    DISTANCE,  # sum_j u_j (maximum - x_j)
    MASS,  # sum_j u_j
    VALUE,  # the loss, or the sum of terms
    FACTOR,  # of exp(x - maximum) in the result
    SCALE,  # of `exponential` in the result, together with
    UNSHIFT,  # a second factor, so that both are normal numbers
    LABEL_GRADIENT,
    END,
) = (column * GROUP * 8 for column in range(21))


class State(NamedTuple):
    """A row that elements are being added to."""

    maximum: float
    below: float
    at_maximum: float
    reference: float  # exponent of the reference of `exponential`
    added: float  # to `below` since, in multiples of 2**reference: this takes no exponential


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
def usable(maximum):
    """Whether a maximum serves as a reference."""
    return abs(maximum) < LIMIT


@njit(**INLINE)
def where_usable(maximum, x, otherwise):
    return where_gt(LIMIT, absolute(maximum), x, otherwise)


@njit(**INLINE)
def reference_of(maximum):
    """The exponent of the reference for a maximum; 0 where that is not usable."""
    return where_usable(maximum, round_down(maximum * _LOG2E + 0.5), 0.0)


@njit(**INLINE)
def lead_of(maximum, n):
    """exp(maximum) / 2**n, a number about 1; 1 where the maximum is not usable."""
    fraction = formulas.exp_fraction((maximum - n * LN2_HIGH) - n * LN2_LOW)
    return where_usable(maximum, fraction, 1.0)


@njit(**INLINE)
def state_of(table, i):
    return State(
        get(table + MAXIMUM, i),
        get(table + BELOW, i),
        get(table + AT_MAXIMUM, i),
        get(table + REFERENCE, i),
        get(table + ADDED, i),
    )


@njit(**INLINE)
def set_state(table, i, row):
    put(table + MAXIMUM, i, row.maximum)
    put(table + BELOW, i, row.below)
    put(table + AT_MAXIMUM, i, row.at_maximum)
    put(table + REFERENCE, i, row.reference)
    put(table + ADDED, i, row.added)


@njit
def begin(table):
    """Every row the identity, idle ones too, so that their lanes hold harmless numbers."""
    for column in range(table, table + END, GROUP * 8):
        value = splat(0.0)
        if column == table + MAXIMUM:
            value = splat(-np.inf)
        elif column == table + KEPT or column == table + LABEL_WEIGHT or column == table + LABEL_SLOPE:
            value = splat(1.0)
        for i in range(0, GROUP, LANES):
            put_lanes(column, i, value)


@njit
def raise_maximum(row, top):
    """The state relative to a larger maximum `top`.

    The rounding error of maximum - top, found as in Knuth's two-sum, corrects the exponential:
    otherwise a difference of d would cost d roundoffs.
    """
    n = first(reference_of(splat(top)))
    if row.maximum == -np.inf:
        return State(top, (row.below + row.added) * 0.0, 0.0, n, 0.0)
    d = row.maximum - top
    rounded = d - row.maximum
    error = (row.maximum - (d - rounded)) - (top + rounded) if d > -np.inf else 0.0
    e = row.below + row.added / first(lead_of(splat(row.maximum), splat(row.reference)))
    return State(top, (e + row.at_maximum) * (math.exp(d) * (1.0 + error)), 0.0, n, 0.0)


@njit
def settle(table, count):
    """Finalise states after the last element.

    A row without an element above -inf is the identity; a NaN stays.
    """
    for i in range(0, count, LANES):
        m = lanes(table + MAXIMUM, i)
        lead = lead_of(m, lanes(table + REFERENCE, i))
        e = lanes(table + BELOW, i) + lanes(table + ADDED, i) / lead
        e = where_eq(m, -np.inf, e * 0.0, e)
        k = where_eq(m, -np.inf, 0.0, lanes(table + AT_MAXIMUM, i))
        log_s = log1p_sum(e + (k - 1.0))  # for k at least 1, or a row without elements
        put_lanes(table + LEAD, i, lead)
        put_lanes(table + BELOW, i, e)
        put_lanes(table + AT_MAXIMUM, i, k)
        put_lanes(table + LOG_S, i, log_s)
        put_lanes(table + LSE, i, m + log_s)


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
def set_factors(table, i, factor, like):
    """Of a vector of rows from i on.

    A product with a scale below `tiny` could lose digits that the result has: then there are two.
    """
    tiny = 2.0**-100 if lanes_of(like) == 32 else 2.0**-960
    scale = factor / lanes(table + LEAD, i)
    shifted = scale * _UNSHIFT
    put_lanes(table + FACTOR, i, factor)
    put_lanes(table + SCALE, i, where_ge(tiny, absolute(shifted), scale, shifted))
    put_lanes(table + UNSHIFT, i, where_ge(tiny, absolute(shifted), _UNSHIFT, 1.0))


@njit
def finish_softmax(table, count, like):
    for i in range(0, count, LANES):
        set_factors(table, i, 1.0 / (lanes(table + BELOW, i) + lanes(table + AT_MAXIMUM, i)), like)


@njit
def finish_cross_entropy(table, count, classes, sparse, options, like):
    """Losses, and what their gradients take."""
    scale, eps = options.scale, options.label_smoothing
    c = 1.0 - eps if sparse else 0.0
    limits = constants(0.0)
    for i in range(0, count, LANES):
        m, log_s, mass = lanes(table + MAXIMUM, i), lanes(table + LOG_S, i), lanes(table + MASS, i)
        x_y, w_y = lanes(table + LABEL_LOGIT, i), lanes(table + LABEL_WEIGHT, i)
        e, k = lanes(table + BELOW, i), lanes(table + AT_MAXIMUM, i)
        c_y, s, rest = w_y * c, e + k, e + (k - 1.0)
        loss = formulas.cross_entropy_loss(
            m, log_s, c_y, x_y, mass, lanes(table + DISTANCE, i), options.z_loss
        )
        if classes > 0:
            loss = where_eq(m, -np.inf, np.nan, loss)
        put_lanes(table + VALUE, i, formulas.product(lanes(table + KEPT, i), loss))
        q, t = formulas.split(x_y - m, limits.floor, limits.magic)
        e_y, fall_y = fma(q, t, t), fma(q, t, t - 1.0)
        factor, g_y = formulas.cross_entropy_gradient(
            m + log_s, s, rest, c_y, w_y * (eps / classes), mass, options.z_loss, e_y, fall_y
        )
        g_y = (g_y * scale) * lanes(table + LABEL_SLOPE, i)
        put_lanes(table + LABEL_GRADIENT, i, where_gt(np.inf, absolute(m), g_y, np.nan))
        set_factors(table, i, factor * scale / s, like)
