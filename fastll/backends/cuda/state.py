"""The running state of a row, and what becomes of it.

A state is (m, e, low, k): the maximum, in two parts the sum of exp(x - m) over the elements below it,
and the number of elements at it. Then r = e + low + (k - 1) is the sum without one of the largest,
whose log1p keeps its digits when one element dominates.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from types import SimpleNamespace

from fastll.backends.cuda import maths
from fastll.backends.cuda.compiler import device


@functools.cache
def of(real, sparse=False, dense=False):
    """The functions for numbers of the type `real`; `sparse` and `dense`: kinds of cross-entropy."""
    f = maths.of(real)
    zero, one, infinity, nan = f.zero, f.one, f.infinity, f.nan
    exp_minus, exp_minus_scaled, unshift = f.exp_minus, f.exp_minus_scaled, f.unshift
    log1p_sum, two_part_sum = f.log1p_sum, f.add

    @device
    def joined(m, e, low, k, top, more, more_low, more_k):
        """The state of two parts of a row."""
        if m == top:
            e, low = two_part_sum(e, low, more, more_low)
            return m, e, low, k + more_k
        if m < top:
            m, top = top, m
            e, low, k, more, more_low, more_k = more, more_low, more_k, e, low, k
        if top == -infinity:  # that of no elements; only a NaN counts
            return m, e + more, low, k
        # the product may be a normal number where the exponential is none
        fall = exp_minus_scaled(top, m)
        more, more_low = two_part_sum(more, more_low, more_k, zero)
        e, low = two_part_sum(e, low, (more * fall) * unshift, (more_low * fall) * unshift)
        return m, e, low, k

    @device
    def finite(m):
        """A maximum as what distances are measured from."""
        return m if m > -infinity else zero

    @device
    def rebased(distance, low, mass, m, top):
        """A sum of u (m - x), of targets with the sum `mass`, relative to a maximum `top` >= m."""
        if mass != zero and m != top:
            return two_part_sum(distance, low, mass * (finite(top) - finite(m)), zero)
        return distance, low

    @device
    def finish(
        m,
        e,
        low,
        k,
        distance,
        mass,
        classes,
        y,
        kept,
        x_y,
        w_y,
        slope_y,
        keep,
        spread,
        z_loss,
        gradient,
    ):
        """(value, lse, log s, factor of exp(x - m), gradient at the label) of a row.

        The value is a loss or, of neither kind, the log-sum-exp. At the label the gradient is
        (c + excess) p - u - c, whose part c (p - 1) is computed as -c (1 - p), without cancellation.
        """
        r, low = two_part_sum(e, low, k - one, zero)
        if m == -infinity:
            r = e  # 0, or NaN
        log_s = log1p_sum(r, low)
        rest = r + low
        s = one + rest
        lse = m + log_s
        value, factor, g_y = lse, one / s, zero
        if sparse or dense:
            c = keep * w_y if sparse else zero
            value = c * (log_s + (m - x_y)) if c != zero else zero
            excess = mass
            if mass != zero:
                value += mass * log_s + distance
            if z_loss != zero:
                value += z_loss * (lse * lse)
                excess += (z_loss + z_loss) * lse
            if (m == -infinity and classes > 0) or (sparse and y < 0):
                value = nan
            if not kept:
                value = zero
            factor = gradient * (c + excess) / s
            if sparse:
                p = exp_minus(x_y, m) / s
                others = rest / s if x_y == m else one - p
                g_y = gradient * slope_y * ((excess * p - spread * w_y) - c * others)
        if abs(m) == infinity or (sparse and y < 0):
            factor, g_y = nan, nan
        return value, lse, log_s, factor, g_y

    return SimpleNamespace(joined=joined, finite=finite, rebased=rebased, finish=finish)
