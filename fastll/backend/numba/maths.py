"""exp, log1p, tanh and the two losses of an element, on vectors of float32 or float64.

Exponential. With n = round(x / ln 2) and f = x - n ln 2, |f| <= ln(2) / 2,

    exp(x) = 2**n exp(f),    exp(f) = 1 + q,    q = f + f**2 r(f),

where r is a Chebyshev fit of (exp(f) - 1 - f) / f**2 (error of exp(f): 0.13 ulp in float32, 0.11 in
float64), and ln 2 is the sum of two constants, so that f is right to an ulp by two fused operations.
The rounding is an addition: z = x / ln 2 + MAGIC leaves n in the low bits of z. Those bits, moved to
the exponent's place, *are* 2**n; what MAGIC holds besides 1.5 * 2**23 is the exponent's bias.

`exponential` returns exp(x) 2**-n_ref 2**SHIFT for a reference exponent n_ref, usually that of the
row's maximum. Nothing is subtracted from x first, so no digit of it is lost: the relative error is
that of exp at the exact x, however large the row's offset. SHIFT places the row's terms high in the
range, so that they keep all their digits down to 2**-SHIFT times the smallest normal number; below
`floor` they are zero exactly. Sums are scaled back in float64, elements by the factor they are
multiplied with anyway.

Source: the reduction and the exponent tracking are those of Cody and Waite (1980) and of Dukhan and
Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from fastll.backend.numba.vector import (
    INLINE,
    Vector,
    absolute,
    downscale,
    exponent,
    exponent_bits,
    fma,
    maximum,
    splat,
    where_eq,
    where_ge,
    where_gt,
)
from fastll.backend.polynomials import ATANH, EXP

LN2 = math.log(2)
#: ln 2 as a sum whose first part has 33 bits: its multiples up to 2**20 are exact in float64.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

SUM_SHIFT = 64  # for sums: terms down to 2**-190 of the largest
OUT_SHIFT = 24  # for elements: down to the smallest subnormal number


class Constants(NamedTuple):
    """What the formulas need of a floating type, in that type."""

    zero: float
    half: float
    one: float
    two: float
    infinity: float
    log2e: float
    ln2: tuple  # a high and a low part
    magic: float  # 1.5 * 2**(bits of the mantissa) + the exponent's bias
    bias: float  # of the exponent, in float64
    r: tuple  # of exp, from the highest power
    atanh: tuple  # of log1p, from the highest power
    root: float  # sqrt(2) - 1, from where log1p halves its argument
    unshift: float  # 2**-OUT_SHIFT


def _constants(dtype, mantissa, bias, r, atanh):
    high = dtype(math.log(2))
    low = dtype((LN2_HIGH - float(high)) + LN2_LOW)
    return Constants(
        zero=dtype(0),
        half=dtype(0.5),
        one=dtype(1),
        two=dtype(2),
        infinity=dtype(np.inf),
        log2e=dtype(1 / math.log(2)),
        ln2=(high, low),
        magic=dtype(1.5 * 2**mantissa + bias),
        bias=float(bias),
        r=tuple(dtype(c) for c in reversed(r)),
        atanh=tuple(dtype(c) for c in reversed(atanh)),
        root=dtype(math.sqrt(2) - 1),
        unshift=dtype(2.0**-OUT_SHIFT),
    )


_FLOAT32 = _constants(
    np.float32,
    mantissa=23,
    bias=127,
    r=EXP["float32"],
    atanh=ATANH["float32"],
)
_FLOAT64 = _constants(
    np.float64,
    mantissa=52,
    bias=1023,
    r=EXP["float64"],
    atanh=ATANH["float64"],
)


def constants(like):
    """The `Constants` of the type of `like`, a scalar or a vector."""
    raise NotImplementedError("for compiled code")


@overload(constants)
def _constants_of(like):
    element = like.element if isinstance(like, Vector) else like
    table = _FLOAT32 if element == types.float32 else _FLOAT64
    return lambda like: table


def cast(value, like):
    """A float64 in the type of `like`, a scalar or a vector."""
    raise NotImplementedError("for compiled code")


@overload(cast)
def _cast_to(value, like):
    element = like.element if isinstance(like, Vector) else like
    if element == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


@njit(**INLINE)
def _polynomial(coefficients, x):
    p = splat(coefficients[0])
    for i in range(1, len(coefficients)):
        p = fma(p, x, splat(coefficients[i]))
    return p


@njit(**INLINE)
def window(n_ref, shift, like):
    """(floor, magic) of `exponential` for a reference exponent, a whole number in float64."""
    c = constants(like)
    return cast((n_ref - c.bias - shift) * LN2, like), c.magic + cast(shift - n_ref, like)


@njit(**INLINE)
def split(x, floor, magic):
    """(q, s) with exp(x) 2**(shift - n_ref) = s (1 + q)."""
    c = constants(x)
    y = maximum(floor, x)  # a NaN in x stays
    z = fma(y, splat(c.log2e), magic)
    n = z - magic
    f = fma(n, splat(-c.ln2[0]), y)
    f = fma(n, splat(-c.ln2[1]), f)
    return fma(f * f, _polynomial(c.r, f), f), exponent_bits(z)


@njit(**INLINE)
def exponential(x, floor, magic):
    """exp(x) 2**(shift - n_ref), for floor and magic of `window` in every lane; 0 below floor."""
    q, s = split(x, floor, magic)
    return fma(q, s, s)


@njit(**INLINE)
def exp_reduced(f):
    """exp(f), |f| <= ln(2) / 2."""
    c = constants(f)
    return splat(c.one) + fma(f * f, _polynomial(c.r, f), f)


@njit(**INLINE)
def _series(u):
    """log(1 + u) for sqrt(1/2) <= 1 + u <= sqrt(2).

    log(1 + u) = 2 atanh(z) with z = u / (2 + u), and atanh(z) = z + z**3 Q(z**2), |z| <= 3 - 2 sqrt(2).
    """
    c = constants(u)
    z = u / (u + c.two)
    w = z * z
    z = z + z
    return fma(z * w, _polynomial(c.atanh, w), z)


@njit(**INLINE)
def log1p(e):
    """log(1 + e), 0 <= e <= 1. Above sqrt(2) - 1, 1 + e is halved."""
    c = constants(e)
    root = splat(c.root)
    log = _series(where_gt(e, root, (e - c.one) * c.half, e))
    return where_gt(e, root, log + cast(LN2, e), log)


@njit(**INLINE)
def log1p_sum(r):
    """log(1 + r) in float64, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.

    What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
    """
    one = splat(1.0)
    s = r + one
    back = s - one
    error = (r - back) + (one - (s - back))
    n, down = exponent(s), downscale(s)
    log = _series(fma(s, down, splat(-1.0)) + error * down)
    log = fma(n, splat(LN2_HIGH), fma(n, splat(LN2_LOW), log))
    log = where_gt(s, splat(0.0), log, splat(-np.inf))
    return where_gt(splat(np.inf), s, log, s)  # a NaN stays


@njit(**INLINE)
def tails(x):
    """exp(-|x|) 2**OUT_SHIFT, exp(-|x|)."""
    c = constants(x)
    floor, magic = window(0.0, float(OUT_SHIFT), x)
    scaled = exponential(splat(c.zero) - absolute(x), splat(floor), splat(magic))
    return scaled, scaled * c.unshift


@njit(**INLINE)
def sigmoid(x):
    """1 / (1 + exp(-x)), by exp(-|x|), so that the lower tail is exp(x) to the last subnormal."""
    c = constants(x)
    scaled, e = tails(x)
    share = splat(c.one) / (e + c.one)
    return where_ge(x, splat(c.zero), share, (scaled * share) * c.unshift)


@njit(**INLINE)
def log_sigmoid(x):
    """min(x, 0) - log1p(exp(-|x|))."""
    zero = splat(constants(x).zero)
    _, e = tails(x)
    return where_gt(zero, x, x, zero) - log1p(e)


@njit(**INLINE)
def softcap(x, cap):
    """cap tanh(x / cap) and its derivative, 1 - tanh(x / cap)**2.

    With e = exp(-2 |x| / cap): tanh = (1 - e) / (1 + e), and 1 - tanh**2 = 4 e / (1 + e)**2. Near 0,
    where 1 - e would cancel, -expm1 takes its place: expm1 = s (1 + q) - 1 = s q + (s - 1).
    """
    c = constants(x)
    zero, one = splat(c.zero), splat(c.one)
    y = absolute(x / cap)
    floor, magic = window(0.0, 0.0, x)
    q, s = split(zero - (y + y), splat(floor), splat(magic))
    e = fma(q, s, s)
    fall = fma(q, s, s - one)
    share = one / (fall + c.two)
    capped = (zero - fall) * share * cap
    slope = c.two * share
    return where_gt(zero, x, zero - capped, capped), e * (slope * slope)


@njit(**INLINE)
def bce_parts(x, positive, negative):
    """The linear part of `bce`, exp(-|x|), and the derivative."""
    c = constants(x)
    zero, one = splat(c.zero), splat(c.one)
    _, e = tails(x)
    slope = where_gt(x, zero, negative, positive)
    linear = where_eq(slope, zero, zero, slope * absolute(x))
    share = one / (e + one)
    upper = where_ge(x, zero, share, e * share)
    lower = where_ge(x, zero, e * share, share)
    return linear, e, negative * upper - positive * lower


@njit(**INLINE)
def bce(x, positive, negative):
    """positive softplus(-x) + negative softplus(x), and its derivative.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)). A coefficient of 0 annuls an infinite x.
    """
    linear, e, derivative = bce_parts(x, positive, negative)
    return linear + (positive + negative) * log1p(e), derivative
