"""The running state of a row, and what becomes of it.

A state is (m, e, low, k, d, d_low, w, w_low): the maximum; in two parts the sum of exp(x - m) over the
elements below it; and the number of elements at it. Then r = e + low + (k - 1) is the sum without one
of the largest, whose log1p keeps its digits when one element dominates. Of a cross-entropy whose target
is more than a point also, in two parts each, the sums of u (m - x) and of u.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from fastll.backend.cuda import maths
from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.primitives import read_peer

#: Numbers of a state.
PARTS = 8


@functools.cache
def of(real, sparse=False, dense=False, spread_out=False):
    """The functions for numbers of the type `real`.

    `sparse` and `dense`: kinds of cross-entropy; `spread_out`: whether its target is more than a point.
    """
    f = maths.of(real)
    zero, one, infinity, nan = f.zero, f.one, f.infinity, f.nan
    exp_minus, exp_minus_scaled, unshift = f.exp_minus, f.exp_minus_scaled, f.unshift
    log1p_sum, two_part_sum = f.log1p_sum, f.add

    @device
    def identity():
        """The state of no elements."""
        return -infinity, zero, zero, zero, zero, zero, zero, zero

    @device
    def joined(m, e, low, k, top, more, more_low, more_k):
        """The exponentials' part of two states."""
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
    def rebased(d, low, w, m, top):
        """A sum of u (m - x), of targets with the sum `w`, relative to a maximum `top` >= m."""
        if w != zero and m != top:
            return two_part_sum(d, low, w * (finite(top) - finite(m)), zero)
        return d, low

    @device
    def merged(one_part, other):
        """The state of two parts of a row."""
        m_1, e, low, k, d, d_low, w, w_low = one_part
        m_2, e_2, low_2, k_2, d_2, d_low_2, w_2, w_low_2 = other
        m, e, low, k = joined(m_1, e, low, k, m_2, e_2, low_2, k_2)
        if spread_out:
            d, d_low = rebased(d, d_low, w, m_1, m)
            d_2, d_low_2 = rebased(d_2, d_low_2, w_2, m_2, m)
            d, d_low = two_part_sum(d, d_low, d_2, d_low_2)
            w, w_low = two_part_sum(w, w_low, w_2, w_low_2)
        return m, e, low, k, d, d_low, w, w_low

    @device
    def put(memory, at, step, row):
        """Leave a state in shared memory, its numbers `step` apart."""
        m, e, low, k, d, d_low, w, w_low = row
        memory[np.uint32(at)], memory[np.uint32(at + step)] = m, e
        memory[np.uint32(at + 2 * step)], memory[np.uint32(at + 3 * step)] = low, k
        if spread_out:
            memory[np.uint32(at + 4 * step)], memory[np.uint32(at + 5 * step)] = d, d_low
            memory[np.uint32(at + 6 * step)], memory[np.uint32(at + 7 * step)] = w, w_low

    @device
    def take(memory, at, step):
        """A state from shared memory."""
        m, e = memory[np.uint32(at)], memory[np.uint32(at + step)]
        low, k = memory[np.uint32(at + 2 * step)], memory[np.uint32(at + 3 * step)]
        d, d_low, w, w_low = zero, zero, zero, zero
        if spread_out:
            d, d_low = memory[np.uint32(at + 4 * step)], memory[np.uint32(at + 5 * step)]
            w, w_low = memory[np.uint32(at + 6 * step)], memory[np.uint32(at + 7 * step)]
        return m, e, low, k, d, d_low, w, w_low

    @device
    def take_from_peer(memory, at, peer):
        """A state from the shared memory of another block of the cluster."""
        m, e = read_peer(memory, at, peer), read_peer(memory, at + 1, peer)
        low, k = read_peer(memory, at + 2, peer), read_peer(memory, at + 3, peer)
        d, d_low, w, w_low = zero, zero, zero, zero
        if spread_out:
            d, d_low = read_peer(memory, at + 4, peer), read_peer(memory, at + 5, peer)
            w, w_low = read_peer(memory, at + 6, peer), read_peer(memory, at + 7, peer)
        return m, e, low, k, d, d_low, w, w_low

    @device
    def finish(
        row,
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
        m, e, low, k, d, d_low, w, w_low = row
        distance, mass = d + d_low, w + w_low
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

    return SimpleNamespace(
        identity=identity,
        joined=joined,
        finite=finite,
        rebased=rebased,
        merged=merged,
        put=put,
        take=take,
        take_from_peer=take_from_peer,
        finish=finish,
    )
