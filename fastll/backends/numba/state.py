"""The scalars of one row: its running state, and what becomes of it. See `fastll.contract`.

Everything here is float64; rows and columns share it, which is why they agree to the bit.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from fastll.backends.numba.maths import LN2_HIGH, LN2_LOW, exp_reduced
from fastll.backends.numba.vector import INLINE

#: A maximum of this magnitude, or an infinite one, is no reference for `maths.exponential`.
#: Float32 has steps of 1/16 there, so that x - m is exact wherever exp(x - m) matters.
LIMIT = 2.0**20

_LOG2E = 1 / math.log(2)


class Reference(NamedTuple):
    """The maximum m of a row as exp(m) = 2**n * lead."""

    usable: bool
    n: float
    lead: float


@njit(**INLINE)
def reference(m):
    """The `Reference` of a maximum."""
    if not abs(m) < LIMIT:
        return Reference(False, 0.0, 1.0)
    n = np.floor(m * _LOG2E + 0.5)
    return Reference(True, n, exp_reduced((m - n * LN2_HIGH) - n * LN2_LOW))


@njit(**INLINE)
def raise_maximum(m, e, k, top):
    """(m, e, k) relative to a larger maximum `top`.

    The rounding error of m - top, found as in Knuth's two-sum, corrects the exponential: otherwise a
    difference of d would cost d roundoffs.
    """
    if m == -np.inf:
        return top, e * 0.0, 0.0
    d = m - top
    rounded = d - m
    error = (m - (d - rounded)) - (top + rounded) if d > -np.inf else 0.0
    return top, (e + k) * (math.exp(d) * (1.0 + error)), 0.0


@njit(**INLINE)
def settle(m, e, k):
    """A row without an element above -inf is the identity; a NaN stays."""
    if m == -np.inf:
        return m, e * 0.0, 0.0
    return m, e, k


@njit(**INLINE)
def log_sum(e, k):
    """log(e + k) for k at least 1, or a row without elements."""
    return math.log1p(e + (k - 1.0))


@njit(**INLINE)
def weighted_log_sum(e, k):
    """(log|s|, sign of s) for s = e + k of any sign."""
    s = e + k
    apart = abs(e) < abs(k)
    return math.log(abs(k)) + math.log1p(e / k) if apart else math.log(abs(s)), np.sign(s)


@njit(**INLINE)
def times(coefficient, value):
    """The product, 0 where the coefficient is."""
    return coefficient * value if coefficient != 0.0 else 0.0


@njit(**INLINE)
def finish(m, e, k, classes, sparse, x_y, w_y, distance, mass, options):
    """The loss of a row, the factor of its probabilities in the gradient, and that at its target.

    `distance` is sum_j u_j (m - x_j) and `mass` is sum_j u_j. At the target the gradient is
    (c + excess) p - u_y - c, whose part c (p - 1) is computed as -c (1 - p): nothing cancels.
    """
    s, rest, log_s = e + k, e + (k - 1.0), log_sum(e, k)
    eps, z = options.label_smoothing, options.z_loss
    c = (1.0 - eps) * w_y if sparse else 0.0
    loss = times(c, log_s + (m - x_y)) + times(mass, log_s) + distance
    excess = mass
    if z != 0.0:
        loss += z * (m + log_s) * (m + log_s)
        excess += 2.0 * z * (m + log_s)
    if m == -np.inf and classes > 0:
        loss = np.nan
    g_y = np.nan
    if sparse and abs(m) < np.inf:
        p_y = math.exp(x_y - m) / s
        others = (rest - math.expm1(x_y - m)) / s  # 1 - p_y
        g_y = options.scale * (excess * p_y - eps / classes * w_y - c * others)
    return loss, options.scale * (c + excess) / s, g_y
