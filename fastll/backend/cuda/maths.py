"""exp, log1p, tanh and the two losses of an element, in float32 or float64, for one thread.

Exponential. With k = round(x / ln 2) and f = x - k ln 2, |f| <= ln(2) / 2,

    exp(x) = 2**k exp(f),    exp(f) = 1 + q,    q = f + f**2 r(f),

where r is a Chebyshev fit of (exp(f) - 1 - f) / f**2 (error of exp(f): 0.13 ulp in float32, 0.11 in
float64), and ln 2 is the sum of two constants, so that f is right to an ulp by two fused operations.
The rounding is an addition: z = x / ln 2 + MAGIC leaves k in the low bits of z. Those bits, moved to
the exponent's place, *are* 2**k; what MAGIC holds besides 1.5 * 2**23 is the exponent's bias.
`exponential` returns exp(x) 2**(SHIFT - n) for a reference exponent n, usually that of the row's
maximum, so that no digit of x is lost to a subtraction. SHIFT places the terms high in the range: they
keep their digits down to 2**-SHIFT times the smallest normal number; below `floor` they are zero.

Half-precision input has 8 or 11 bits, and its results no more: there exp(f) is the machine's own
approximation of 2**(x / ln 2 - k), right to 2 ulp of float32, which halves the arithmetic.

Source: Cody and Waite (1980); Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm",
arXiv 2001.04438.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import numpy as np

from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.primitives import (
    as_exponent,
    exponent_of,
    fma,
    larger_or_nan,
    power_of_two,
    to_power,
)
from fastll.backend.polynomials import ATANH, EXP

#: Of the exponentials of a row: terms keep their digits down to 2**-158 of the largest in float32.
SHIFT = 32

_LN2_LOW = 2.3190468138462996e-17  # what float64 takes from ln 2
_LOG2E_LOW = 2.0355273740931033e-17

_FLOAT32 = SimpleNamespace(
    mantissa=23,
    bias=127,
    limit=2.0**14,  # of maxima that serve as references
    r=EXP["float32"],
    atanh=ATANH["float32"],
)
_FLOAT64 = SimpleNamespace(
    mantissa=52,
    bias=1023,
    limit=2.0**20,
    r=EXP["float64"],
    atanh=ATANH["float64"],
)


def _polynomial(coefficients):
    """Function (x) of a polynomial of 3, 5, 7 or 10 coefficients, from the constant on."""
    c = tuple(reversed(coefficients))

    @device
    def evaluate(x):
        p = c[0]
        for i in range(1, len(c)):
            p = fma(p, x, c[i])
        return p

    return evaluate


@functools.cache
def of(real, approximate=False, modern=False):
    """The functions for numbers of the type `real`.

    `approximate`: for half-precision input; `modern`: for compute capability 8 or more.
    """
    table = _FLOAT32 if real is np.float32 else _FLOAT64
    zero, half, one, two = real(0), real(0.5), real(1), real(2)
    infinity, nan = real(np.inf), real(np.nan)
    log2e, ln2 = real(1 / math.log(2)), real(math.log(2))
    log2e_low = real((1 / math.log(2) - float(log2e)) + _LOG2E_LOW)
    ln2_low = real((math.log(2) - float(ln2)) + _LN2_LOW)
    magic = real(1.5 * 2**table.mantissa + table.bias)
    shift, scale, unshift = real(SHIFT), real(2.0**SHIFT), real(2.0**-SHIFT)
    lowest = real((-table.bias - SHIFT) * math.log(2))  # of `floor`, for a reference of 0
    by_instruction = modern and real is np.float32
    largest = np.finfo(real).max
    limit, root = real(table.limit), real(math.sqrt(2) - 1)
    r, atanh = _polynomial([real(c) for c in table.r]), _polynomial([real(c) for c in table.atanh])
    whole = real(1.5 * 2**table.mantissa)
    least = real(1 - table.bias)  # exponent of a normal number

    @device
    def reference(m):
        """(n, offset) for a maximum: its exponent, or where that is too large or none, an offset."""
        if abs(m) < limit:
            return fma(m, log2e, whole) - whole, zero
        if abs(m) <= largest:
            return zero, m
        return zero, largest if m > zero else zero

    @device
    def window(n):
        """(floor, magic) of `exponential` for a reference exponent."""
        return fma(n, ln2, lowest), magic + (shift - n)

    @device
    def split(y, z, k):
        """(q, s) with exp(y) 2**(SHIFT - n) = s (1 + q), where z rounded to k."""
        f = fma(k, -ln2_low, fma(k, -ln2, y))
        return fma(f * f, r(f), f), as_exponent(z)

    @device
    def exponential(x, floor, magic):
        """exp(x) 2**(SHIFT - n), for floor and magic of `window`; 0 below floor, NaN of a NaN."""
        y = larger_or_nan(x, floor) if by_instruction else (floor if x < floor else x)
        z = fma(y, log2e, magic)
        k = z - magic
        if approximate:
            f = fma(y, log2e_low, fma(y, log2e, -k))
            return power_of_two(f) * as_exponent(z)
        q, s = split(y, z, k)
        return fma(q, s, s)

    @device
    def lead_of(m, offset, floor, magic):
        """The `exponential` of a maximum; 1 where it is infinite or none."""
        return exponential(m - offset, floor, magic) if abs(m) <= largest else one

    @device
    def exp_minus_scaled(x, m):
        """exp(x - m) 2**SHIFT, x <= m, right to an ulp also where x - m is not a number of the type.

        The rounding error of the difference, found as in Knuth's two-sum, corrects the exponential:
        otherwise a difference of d would cost d roundoffs.
        """
        if x == m:
            return scale
        d = x - m
        if not d > -infinity:
            return d - d if d != d else zero
        back = d - x
        error = (x - (d - back)) - (m + back)
        floor, magic_0 = window(zero)
        y = floor if d < floor else d
        z = fma(y, log2e, magic_0)
        q, s = split(y, z, z - magic_0)
        e = fma(q, s, s)
        return fma(e, error, e)

    @device
    def exp_minus(x, m):
        """exp(x - m), x <= m."""
        return exp_minus_scaled(x, m) * unshift

    @device
    def series(u):
        """log(1 + u) for sqrt(1/2) <= 1 + u <= sqrt(2): 2 atanh(z) with z = u / (2 + u)."""
        z = (u + u) / (u + two)  # not twice the half: that may be subnormal
        w = (z * half) * (z * half)
        return fma(z * w, atanh(w), z)

    @device
    def log1p(e):
        """log(1 + e), 0 <= e <= 1. Above sqrt(2) - 1, 1 + e is halved."""
        if e > root:
            return series((e - one) * half) + ln2
        return series(e)

    @device
    def log1p_sum(r, low):
        """log(1 + r + low), r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.

        What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
        """
        s = r + one
        if not (s > zero and s < infinity):
            return -infinity if s == zero else s
        back = s - one
        error = ((r - back) + (one - (s - back))) + low
        n = exponent_of(s)
        down = to_power(-n)
        return fma(n, ln2, fma(n, ln2_low, series(fma(error, down, fma(s, down, -one)))))

    @device
    def tails(x):
        """exp(-|x|) 2**SHIFT, exp(-|x|)."""
        floor, magic_0 = window(zero)
        scaled = exponential(-abs(x), floor, magic_0)
        return scaled, scaled * unshift

    @device
    def sigmoid(x):
        """1 / (1 + exp(-x)), by exp(-|x|), so that the lower tail is exp(x) to the last subnormal."""
        scaled, e = tails(x)
        share = one / (e + one)
        return share if x >= zero else (scaled * share) * unshift

    @device
    def log_sigmoid(x):
        """min(x, 0) - log1p(exp(-|x|))."""
        _, e = tails(x)
        return (zero if x > zero else x) - log1p(e)

    @device
    def softcap(x, cap):
        """cap tanh(x / cap) and its derivative, 1 - tanh(x / cap)**2.

        With e = exp(-2 |x| / cap): tanh = (1 - e) / (1 + e), and 1 - tanh**2 = 4 e / (1 + e)**2. Near
        0, where 1 - e would cancel, -expm1 takes its place: expm1 = s (1 + q) - 1 = s q + (s - 1).
        """
        y = abs(x / cap)
        d = -(y + y)
        floor, _ = window(zero)
        d = floor if d < floor else d
        z = fma(d, log2e, magic)
        k = z - magic
        q, s = split(d, z, k)
        s = s if k > least else zero
        e = fma(q, s, s)
        fall = fma(q, s, s - one)
        share = one / (fall + two)
        capped = -fall * share * cap
        slope = two * share
        return -capped if x < zero else capped, e * (slope * slope)

    @device
    def bce_parts(x, positive, negative):
        """The linear part of `bce`, exp(-|x|), and the derivative."""
        _, e = tails(x)
        slope = negative if x > zero else positive
        linear = zero if slope == zero else slope * abs(x)
        share = one / (e + one)
        upper = share if x >= zero else e * share
        lower = e * share if x >= zero else share
        return linear, e, negative * upper - positive * lower

    @device
    def bce(x, positive, negative):
        """positive softplus(-x) + negative softplus(x), and its derivative.

        softplus(x) = max(x, 0) + log1p(exp(-|x|)). A coefficient of 0 annuls an infinite x.
        """
        linear, e, derivative = bce_parts(x, positive, negative)
        return linear + (positive + negative) * log1p(e), derivative

    @device
    def two_sum(a, b):
        """a + b and what rounding took from it: Knuth."""
        s = a + b
        back = s - a
        return s, (a - (s - back)) + (b - back)

    @device
    def add(high, low, value, value_low):
        """The sum of two numbers of two parts each, the same in either order."""
        s, error = two_sum(high, value)
        if not abs(s) < infinity:  # the error of an infinity is NaN
            error = zero
        return s, (low + value_low) + error

    return SimpleNamespace(
        zero=zero,
        one=one,
        infinity=infinity,
        nan=nan,
        unshift=unshift,
        reference=reference,
        window=window,
        exponential=exponential,
        lead_of=lead_of,
        exp_minus=exp_minus,
        exp_minus_scaled=exp_minus_scaled,
        log1p_sum=log1p_sum,
        sigmoid=sigmoid,
        log_sigmoid=log_sigmoid,
        softcap=softcap,
        bce=bce,
        bce_parts=bce_parts,
        two_sum=two_sum,
        add=add,
    )
