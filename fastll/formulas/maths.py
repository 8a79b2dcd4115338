"""exp, log, log1p and tanh, which the formulas of losses are made of.

Exponential. With n = round(x / ln 2) and f = x - n ln 2, |f| <= ln(2) / 2,

    exp(x) = 2**n exp(f),    exp(f) = 1 + q,    q = f + f**2 r(f),

where r is a Chebyshev fit of (exp(f) - 1 - f) / f**2 and ln 2 is the sum of two constants, so that two
fused operations give f to an ulp. The rounding is an addition: z = x / ln 2 + MAGIC leaves n in the low
bits of z. Those bits, moved to the place of the exponent, *are* 2**n; what MAGIC holds besides
1.5 * 2**23 is the exponent's bias.

`exponential` returns exp(x) 2**(SHIFT - n_ref) for a reference exponent n_ref, usually that of the
row's maximum. Nothing is subtracted from x first, so no digit of it is lost: the relative error is that
of exp at the exact x, however large the row's offset. Below `floor` the result is exactly 0.

Sources: Cody and Waite, "Software Manual for the Elementary Functions" (1980), for the reduction;
Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, for tracking the exponent.
"""

# mypy: ignore-errors

from fastll.formulas.vocabulary import (
    absolute,
    constants,
    downscale,
    exponent,
    exponent_bits,
    fma,
    horner,
    maximum,
    where_eq,
    where_gt,
)


def reduced(x, n):
    """x - n ln 2."""
    c = constants(x)
    return fma(n, -c.ln2_low, fma(n, -c.ln2_high, x))


def split(x, floor, magic):
    """(q, s) with exp(x) 2**(SHIFT - n_ref) = s (1 + q)."""
    c = constants(x)
    y = maximum(floor, x)  # a NaN in x stays
    z = fma(y, c.log2e, magic)
    f = reduced(y, z - magic)
    return fma(f * f, horner(c.exp, f), f), exponent_bits(z)


def exponential(x, floor, magic):
    """exp(x) 2**(SHIFT - n_ref); 0 below floor."""
    q, s = split(x, floor, magic)
    return fma(q, s, s)


def exp_fraction(f):
    """exp(f), |f| <= ln(2) / 2."""
    c = constants(f)
    return c.one + fma(f * f, horner(c.exp, f), f)


def tails(x):
    """exp(-|x|) 2**SHIFT, exp(-|x|)."""
    c = constants(x)
    scaled = exponential(c.zero - absolute(x), c.scaled_floor, c.scaled_magic)
    return scaled, scaled * c.unshift


def exp(x):
    """exp(x), from the smallest subnormal number to infinity.

    A power 2**n beyond the normal numbers is none: exp(x) 2**SHIFT is computed for x <= 0 and
    exp(x) 2**-SHIFT above.
    """
    c = constants(x)
    y = where_gt(x, c.ceiling, c.ceiling, x)
    magic = where_gt(x, c.zero, c.reduced_magic, c.scaled_magic)
    return exponential(y, c.scaled_floor, magic) * where_gt(x, c.zero, c.shift, c.unshift)


def exp_product(n, high, low):
    """exp(n (high + low)), right to a few ulp however large n high is: what rounding takes is known.

    What the product and the sum lose is so small that exp(x + lost) = exp(x) (1 + lost).
    """
    c = constants(high)
    product_high = n * high
    product_low = n * low
    x = product_high + product_low
    lost = fma(n, high, c.zero - product_high) + (product_low - (x - product_high))
    e = exp(x)
    return where_gt(x, c.scaled_floor, fma(e, lost, e), e)  # below, the result is 0 and lost any


def product(coefficient, value):
    """The product, 0 where the coefficient is."""
    c = constants(value)
    return where_eq(coefficient, c.zero, c.zero, coefficient * value)


def twice_atanh(z):
    """2 atanh(z / 2), |z| <= 6 - 4 sqrt(2)."""
    c = constants(z)
    w = z * z
    return fma(z * w, horner(c.atanh, w), z)


def series(u):
    """log(1 + u) for sqrt(1/2) <= 1 + u <= sqrt(2).

    log(1 + u) = 2 atanh(z / 2) with z = 2 u / (2 + u), |z| <= 6 - 4 sqrt(2). A subnormal u keeps its
    digits.
    """
    c = constants(u)
    return twice_atanh((u + u) / (u + c.two))


def log1p_fraction(e):
    """log(1 + e), 0 <= e <= 1. Above sqrt(2) - 1, 1 + e is halved."""
    c = constants(e)
    log = series(where_gt(e, c.root, (e - c.one) * c.half, e))
    return where_gt(e, c.root, log + c.ln2, log)


def parts(x):
    """(n, f) with x = 2**n f, sqrt(1/2) <= f < sqrt(2), for a positive x.

    From 1 on, x is divided by 4 first, so that 2**-n is a normal number for the largest x too.
    """
    c = constants(x)
    normal = where_gt(c.one, x, x * c.lift, x * (c.half * c.half))
    n = where_gt(c.one, x, exponent(normal) - c.lift_bits, exponent(normal) + c.two)
    return n, normal * downscale(normal)


def times_ln2(n, rest):
    """n ln 2 + rest."""
    c = constants(rest)
    return fma(n, c.ln2_high, fma(n, c.ln2_low, rest))


def log(x):
    """log(x), with log(0) = -inf and NaN below 0: for x = 2**n f, n ln 2 + log(f)."""
    c = constants(x)
    n, f = parts(x)
    finite = times_ln2(n, series(f - c.one))
    positive = where_gt(c.infinity, x, finite, x)  # inf and NaN stay
    return where_gt(x, c.zero, positive, where_eq(x, c.zero, c.zero - c.infinity, x * c.nan))


def log1p(x):
    """log(1 + x), with log(0) = -inf and NaN below.

    With y = 1 + x as rounded, 1 + x = y + lost, by Knuth's two-sum. For y = 2**n f that is n ln 2 plus
    log(f + 2**-n lost). A small x is all in `lost`, and keeps its digits. (2**-n may be subnormal: it
    is made of one that is not.)
    """
    c = constants(x)
    y = c.one + x
    back = y - c.one
    lost = (x - back) + (c.one - (y - back))
    n = exponent(y)
    quarter = c.half * c.half
    down = downscale(y * quarter) * quarter
    fraction = series(fma(y, down, c.zero - c.one) + lost * down)
    finite = fma(n, c.ln2_high, fma(n, c.ln2_low, fraction))
    positive = where_gt(c.infinity, y, finite, y)  # inf and NaN stay
    return where_gt(y, c.zero, positive, where_eq(y, c.zero, c.zero - c.infinity, y * c.nan))


def log_ratio(p, q):
    """log(p / q) of positive numbers, also where the ratio is next to 1 or is no number of the type.

    With p = 2**n f and q = 2**k g, sqrt(1/2) <= f / g <= sqrt(2) after a step of n where it is needed:
    log(p / q) = (n - k) ln 2 + 2 atanh((f - g) / (f + g)), where f - g is exact (Sterbenz).
    """
    c = constants(p)
    n_p, f_p = parts(p)
    n_q, g = parts(q)
    root = c.one + c.root
    large = where_gt(f_p, g * root, c.one, c.zero)
    step = where_gt(g, f_p * root, c.zero - c.one, large)
    halved = where_gt(f_p, g * root, f_p * c.half, f_p)
    f = where_gt(g, f_p * root, f_p + f_p, halved)
    difference = f - g
    fraction = twice_atanh((difference + difference) / (f + g))
    apart = p - q
    finite = times_ln2((n_p - n_q) + step, fraction)
    return where_gt(c.infinity, absolute(apart), finite, apart)  # that of infinities, and NaN


def softcap(x, cap):
    """cap tanh(x / cap) and its derivative, 1 - tanh(x / cap)**2.

    With e = exp(-2 |x| / cap): tanh = (1 - e) / (1 + e), and 1 - tanh**2 = 4 e / (1 + e)**2. Near 0,
    where 1 - e would cancel, -expm1 takes its place: expm1 = s (1 + q) - 1 = s q + (s - 1). A zero
    keeps its sign.
    """
    c = constants(x)
    y = absolute(x / cap)
    q, s = split(c.zero - (y + y), c.floor, c.magic)
    e = fma(q, s, s)
    fall = fma(q, s, s - c.one)
    share = c.one / (fall + c.two)
    magnitude = (c.zero - fall) * share * cap
    capped = where_gt(c.zero, x, c.zero - magnitude, magnitude)
    slope = c.two * share
    return where_eq(x, c.zero, x, capped), e * (slope * slope)
