"""Element-wise operations: the value of an element and, of a loss, its slope (the derivative with
respect to the first input).

A function takes its inputs, then its parameters. It returns the value; or (value, slope); or, as
`Element.log1p` says, (value, e, slope) with 0 <= e <= 1 and the value short of log1p(e): then the sum
of many values takes one logarithm, that of the product of all 1 + e.
"""

# mypy: ignore-errors

from fastll.formulas.maths import log, log1p, tails
from fastll.formulas.vocabulary import absolute, constants, fma, where_eq, where_ge, where_gt


def outside(x, low, high):
    """1 outside [low, high], else 0, as for a NaN: what a check of a domain adds up."""
    c = constants(x)
    return where_gt(low, x, c.one, where_gt(x, high, c.one, c.zero))


def sigmoid(x):
    """1 / (1 + exp(-x)), by exp(-|x|), so that the lower tail is exp(x) to the last subnormal."""
    c = constants(x)
    scaled, e = tails(x)
    share = c.one / (e + c.one)
    return where_ge(x, c.zero, share, (scaled * share) * c.unshift)


def log_sigmoid(x):
    """min(x, 0) - log1p(exp(-|x|))."""
    c = constants(x)
    _, e = tails(x)
    return where_gt(c.zero, x, x, c.zero) - log1p(e)


def softplus_parts(x, positive, negative):
    """Of positive softplus(-x) + negative softplus(x): the linear part, exp(-|x|), and the derivative.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)). A coefficient of 0 annuls an infinite x.
    """
    c = constants(x)
    _, e = tails(x)
    slope = where_gt(x, c.zero, negative, positive)
    linear = where_eq(slope, c.zero, c.zero, slope * absolute(x))
    share = c.one / (e + c.one)
    upper = where_ge(x, c.zero, share, e * share)
    lower = where_ge(x, c.zero, e * share, share)
    return linear, e, negative * upper - positive * lower


def binary_cross_entropy(x, target):
    """target softplus(-x) + (1 - target) softplus(x): both coefficients together are 1."""
    c = constants(x)
    return softplus_parts(x, target, c.one - target)


def binary_cross_entropy_pos_weight(x, target, pos_weight):
    """The same with a factor of the positive part."""
    c = constants(x)
    positive = target * pos_weight
    negative = c.one - target
    linear, e, slope = softplus_parts(x, positive, negative)
    return linear + (positive + negative) * log1p(e), slope


def gaussian_nll(mean, target, var, least, constant):
    """((mean - target)**2 / v + log v) / 2 + constant, v = max(var, least); NaN for a var below 0."""
    c = constants(mean)
    v = where_gt(least, var, least, var)
    d = mean - target
    slope = d / v
    value = fma(c.half, fma(d, slope, log(v)), constant)
    return where_gt(c.zero, var, c.nan, value), where_gt(c.zero, var, c.nan, slope)
