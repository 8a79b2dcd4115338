"""Element-wise operations: the value of an element and, of a loss, its slope (the derivative with
respect to the first input).

A function takes its inputs, then its parameters. It returns the value; or (value, slope); or, as
`Element.log1p` says, (value, e, slope) with 0 <= e <= 1 and the value short of log1p(e): then the sum
of many values takes one logarithm, that of the product of all 1 + e.
"""

# mypy: ignore-errors

from fastll.formulas.maths import exp, exp_product, log, log1p, log1p_fraction, product, tails
from fastll.formulas.vocabulary import (
    absolute,
    constants,
    fma,
    maximum,
    where_eq,
    where_ge,
    where_gt,
)


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
    return where_gt(c.zero, x, x, c.zero) - log1p_fraction(e)


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


def binary_cross_entropy_with_logits(x, target):
    """target softplus(-x) + (1 - target) softplus(x): both coefficients together are 1."""
    c = constants(x)
    return softplus_parts(x, target, c.one - target)


def binary_cross_entropy_with_logits_pos_weight(x, target, pos_weight):
    """The same with a factor of the positive part."""
    c = constants(x)
    positive = target * pos_weight
    negative = c.one - target
    linear, e, slope = softplus_parts(x, positive, negative)
    return linear + (positive + negative) * log1p_fraction(e), slope


def gaussian_nll(mean, target, var, least, constant):
    """((mean - target)**2 / v + log v) / 2 + constant, v = max(var, least); NaN for a var below 0."""
    c = constants(mean)
    v = where_gt(least, var, least, var)
    d = mean - target
    slope = d / v
    value = fma(c.half, fma(d, slope, log(v)), constant)
    return where_gt(c.zero, var, c.nan, value), where_gt(c.zero, var, c.nan, slope)


def mse(x, target):
    """(x - target)**2."""
    d = x - target
    return d * d, d + d


def binary_cross_entropy(p, target):
    """-target log p - (1 - target) log(1 - p), with PyTorch's floors; NaN for a p outside [0, 1]."""
    c = constants(p)
    negative = c.one - target
    log_p = maximum(c.log_floor, log(p))  # a NaN stays
    log_q = maximum(c.log_floor, log1p(c.zero - p))
    variance = (c.one - p) * p
    slope = (p - target) / maximum(c.variance_floor, variance)
    return (
        c.zero - (target * log_p + negative * log_q),
        where_gt(c.zero, variance, c.nan, slope),
    )


def kl_div(x, target):
    """target (log target - x), of a logarithm of a probability."""
    c = constants(x)
    return product(target, log(target) - x), c.zero - target


def kl_div_log_target(x, target):
    """The same of the logarithm of a target."""
    c = constants(x)
    share = exp(target)
    return product(share, target - x), c.zero - share


def stirling(t):
    """t log t - t + log(2 pi t) / 2, nearly log t!, where t is above 1; else 0."""
    c = constants(t)
    return where_gt(t, c.one, fma(t + c.half, log(t), c.half_log_tau - t), c.zero)


def poisson_nll(x, target):
    """exp(x) - target x, of the logarithm of a rate."""
    rate = exp(x)
    return rate - product(target, x), rate - target


def poisson_nll_full(x, target):
    """The same with nearly log(target!)."""
    value, slope = poisson_nll(x, target)
    return value + stirling(target), slope


def poisson_nll_of_rate(x, target, eps):
    """x - target log(x + eps), of a rate; NaN where x + eps is below 0."""
    c = constants(x)
    rate = x + eps
    value = x - product(target, log(rate))
    slope = c.one - where_eq(target, c.zero, c.zero, target / rate)
    return where_gt(c.zero, rate, c.nan, value), where_gt(c.zero, rate, c.nan, slope)


def poisson_nll_of_rate_full(x, target, eps):
    """The same with nearly log(target!)."""
    value, slope = poisson_nll_of_rate(x, target, eps)
    return value + stirling(target), slope


def sigmoid_focal_loss(x, target, positive_weight, negative_weight, gamma):
    """w ce m**gamma with the binary cross-entropy ce, m = t (1 - p) + (1 - t) p, p = sigmoid(x) and
    w = t positive_weight + (1 - t) negative_weight.

    With e = exp(-|x|), p and 1 - p are 1 / (1 + e) and e / (1 + e) in some order. Let `near` be the
    coefficient (t or 1 - t) of the first, and `far` that of the second:

        m = (near + far e) / (1 + e),    log m = log(near + far e) - log1p(e)

    of which log(far e) = -|x| where `near` is 0, as it is for a label that the sign of x agrees with.
    (Beyond the floor e is 0, and with it ce there: m matters no more.) Both p - t and

        dm/dx = (1 - 2 t) p (1 - p),    p (1 - p) / m = e / (near + far e) / (1 + e)

    have the sign of 1 - 2 t where t is a label, so that nothing cancels in

        dL/dx = w m**gamma ((p - t) + gamma (1 - 2 t) (p (1 - p) / m) ce)
    """
    c = constants(x)
    negative = c.one - target
    linear, e, slope = softplus_parts(x, target, negative)
    soft = log1p_fraction(e)
    value = linear + soft
    near = where_gt(x, c.zero, negative, target)
    far = where_gt(x, c.zero, target, negative)
    mixed = fma(far, e, near)
    steep = where_eq(near, c.zero, maximum(c.scaled_floor, c.zero - absolute(x)), c.zero)
    power = exp_product(gamma, steep, where_eq(near, c.zero, c.zero, log(mixed)) - soft)
    share = where_eq(near, c.zero, c.one, e / mixed) / (e + c.one)
    pull = (gamma * (negative - target)) * share
    weight = fma(target, positive_weight, negative * negative_weight)
    return product(weight, value * power), (weight * power) * (slope + product(pull, value))
