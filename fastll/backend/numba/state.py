"""The scalars of rows: their running state, and what becomes of it. See `fastll.contract`.

Everything here is float64. Rows and columns share it, which is why they agree to the bit. What is done
once per row is done for a group of `GROUP` rows: a table in memory, named by its address, with a column
of float64 for each thing that is known of a row. Columns are attributes: of one row they are numbers,
of several rows vectors.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import lower_getattr_generic, lower_setattr_generic, register_model

from fastll.backend.numba import vector
from fastll.backend.numba.maths import formulas, log1p_finite, log1p_sum
from fastll.backend.numba.vector import Vector, absolute, emitted, inline, shared, where_eq, where_gt
from fastll.contract import GROUP
from fastll.formulas.constants import LIMIT, LN2_HIGH, LN2_LOW, SHIFT

LANES = 16  # of float64

_LOG2E = 1 / math.log(2)
UNSHIFT = 2.0**-SHIFT
_WHOLE = 1.5 * 2.0**52  # with it, a number is rounded to a whole one

#: The columns of a table.
COLUMNS = (
    "maximum",
    "below",  # as of the last change of the maximum
    "at_maximum",
    "reference",  # exponent of the reference of `exponential`
    "added",  # to `below` since, in multiples of 2**reference: this takes no exponential
    "lead",  # exp(maximum) / 2**reference
    "away",  # sum of exponentials times distances, as of the last change of the maxima, and what was
    "away_added",  # added since, likewise
    "mean",  # distance, by the softmax
    "log_s",  # log(below + at_maximum)
    "lse",
    "sample",  # sample weight, 0 where the row is ignored
    "label",  # -1 where it is no class
    "label_logit",  # logit, class weight and derivative of the soft cap at the label
    "label_weight",
    "label_slope",
    "distance",  # sum_j u_j (maximum - x_j)
    "mass",  # sum_j u_j
    "value",  # the loss, or the sum of terms
    "factor",  # of exp(x - maximum) in the result; without exponentials, what is there instead
    "scale",  # of `exponential` in the result, together with
    "unshift",  # a second factor, so that both are normal numbers
    "label_gradient",
    "upstream",  # factor of the gradient
    "top",  # maximum of a tile, and the maximum before it
    "before",
    "floor",  # `window`
    "magic",
)
TABLE_SIZE = len(COLUMNS) * GROUP * 8


class _Rows(types.Type):
    """The address in the first column of a row, or with columns that are vectors, of several."""

    ir = ir.IntType(64)

    def __init__(self, column):
        self.column = column
        super().__init__(name=f"Rows({column})")


register_model(_Rows)(vector.Model)


@infer_getattr
class _Columns(AttributeTemplate):
    key = _Rows

    def generic_resolve(self, rows, name):
        return rows.column if name in COLUMNS else None


def _pointer(context, builder, rows, address, name):
    at = builder.add(address, address.type(COLUMNS.index(name) * GROUP * 8))
    return vector.pointer(builder, at, context.get_value_type(rows.column))


@lower_getattr_generic(_Rows)
def _read(context, builder, rows, address, name):
    return builder.load(_pointer(context, builder, rows, address, name), align=1)


@lower_setattr_generic(_Rows)
def _write(context, builder, signature, values, name):
    builder.store(values[1], _pointer(context, builder, signature.args[0], values[0], name), align=1)


def _row_at(builder, table, i, size):
    return builder.add(table, builder.mul(i, i.type(size)))


@emitted(lambda table, i: _Rows(types.float64))
def row_of(builder, table, i):
    """Row i."""
    return _row_at(builder, table, i, 8)


@emitted(lambda table, i, like: _Rows(Vector(types.float64, Vector(like).ir.count)))
def rows_of(builder, table, i, like):
    """Rows from i on, as many as a vector of the type of `like` has lanes."""
    return _row_at(builder, table, i, 8)


@emitted(lambda table, i, like: _Rows(Vector(like)))
def narrow_rows_of(builder, table, i, like):
    """The same of a table whose numbers are of the type of `like`."""
    return _row_at(builder, table, i, 4 if like.type == ir.FloatType() else 8)


@inline
def usable(maximum):
    """Whether a maximum serves as a reference."""
    return abs(maximum) < LIMIT


@inline
def where_usable(maximum, x, otherwise):
    return where_gt(LIMIT, absolute(maximum), x, otherwise)


@inline
def reference_of(maximum):
    """The exponent of the reference for a maximum; 0 where that is not usable."""
    return where_usable(maximum, (maximum * _LOG2E + _WHOLE) - _WHOLE, 0.0)


@inline
def lead_of_usable(maximum, n):
    """exp(maximum) / 2**n, a number about 1, of a maximum that is usable."""
    return formulas.exp_fraction((maximum - n * LN2_HIGH) - n * LN2_LOW)


@inline
def lead_of(maximum, n):
    """The same, and 1 where the maximum is not usable."""
    return where_usable(maximum, lead_of_usable(maximum, n), 1.0)


@shared
def begin(table):
    """Every row the identity, idle ones too, so that their lanes hold harmless numbers."""
    for at in range(table, table + TABLE_SIZE, LANES * 8):
        vector.write(at, vector.splat(0.0))
    for i in range(0, GROUP, LANES):
        rows = rows_of(table, i, 0.0)
        rows.maximum = -np.inf
        rows.sample = rows.label_weight = rows.label_slope = 1.0
        rows.label = -1.0


@inline
def finite(maximum):
    """A maximum as distances are from it: that of no elements counts as 0."""
    return maximum if maximum > -np.inf else 0.0


@inline
def raise_maximum(row, top, averages, growth):
    """Make the state of a row relative to a larger maximum `top`.

    If it `averages`, every distance grows by `growth` with that.

    The rounding error of maximum - top, found as in Knuth's two-sum, corrects the exponential:
    otherwise a difference of d would cost d roundoffs.
    """
    m, e = row.maximum, row.below
    if m == -np.inf:
        row.below = (e + row.added) * 0.0
        if averages:
            row.away = row.below
    else:
        d = m - top
        rounded = d - m
        error = (m - (d - rounded)) - (top + rounded) if d > -np.inf else 0.0
        lead = vector.first(lead_of(vector.splat(m), vector.splat(row.reference)))
        e += row.added / lead
        s, fall = e + row.at_maximum, math.exp(d) * (1.0 + error)
        row.below = s * fall
        if averages:
            away = (row.away + row.away_added / lead) + formulas.product(s, growth)
            row.away = formulas.product(fall, away)
    row.maximum, row.at_maximum, row.added = top, 0.0, 0.0
    if averages:
        row.away_added = 0.0
    row.reference = vector.first(reference_of(vector.splat(top)))


@inline
def move_distances(row, growth):
    """Let every distance grow, as the maximum of other elements has risen."""
    if growth != 0.0:
        lead = vector.first(lead_of(vector.splat(row.maximum), vector.splat(row.reference)))
        s = (row.below + row.added / lead) + row.at_maximum
        row.away += formulas.product(s, growth)


@shared
def settle(table, count):
    """Finalise states after the last element.

    A row without an element above -inf is the identity; a NaN stays.
    """
    vector.out_of_line()
    for i in range(0, count, LANES):
        rows = rows_of(table, i, 0.0)
        m = rows.maximum
        rows.lead = lead_of(m, rows.reference)
        e = rows.below + rows.added / rows.lead
        rows.below = e = where_eq(m, -np.inf, e * 0.0, e)
        rows.at_maximum = k = where_eq(m, -np.inf, 0.0, rows.at_maximum)
        rows.log_s = log1p_sum(e + (k - 1.0))  # for k at least 1, or a row without elements
        rows.lse = m + rows.log_s


class Settled(NamedTuple):
    """The state of rows after their last element, whose sum is e + k."""

    m: float
    lead: float
    e: float
    k: float
    log_s: float


@inline
def settled(m, n, added, k):
    """That of new rows with usable maxima, reference exponents n and finite sums."""
    lead = lead_of_usable(m, n)
    e = added / lead
    return Settled(m, lead, e, k, log1p_finite(e + (k - 1.0)))


@inline
def factors_of(factor, lead, like):
    """(scale, unshift) of `exponential` in a result, one after the other.

    A product with a scale below `tiny` could lose digits that the result has: then there are two.
    """
    tiny = 2.0**-100 if vector.lanes_of(like) == 32 else 2.0**-960
    scale = factor / lead
    shifted = scale * UNSHIFT
    least = absolute(shifted)
    return (
        vector.where_ge(tiny, least, scale, shifted),
        vector.where_ge(tiny, least, UNSHIFT, 1.0),
    )


@inline
def set_factors(rows, factor, like):
    rows.factor = factor
    rows.scale, rows.unshift = factors_of(factor, rows.lead, like)
