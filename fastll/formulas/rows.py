"""Row-wise operations: the terms of a row's sums, what becomes of the sums, and what is written in the
shape of the row. The formulas and the names of the sums are those of `fastll.contract`.
"""

# mypy: ignore-errors

from fastll.formulas.maths import log, log_ratio, product
from fastll.formulas.vocabulary import constants, fma, where_eq, where_ge, where_gt


def below_maximum(x, m, e):
    """The `exponential` e of an element below the row's maximum; 0 of one equal to it."""
    return where_eq(x, m, constants(x).zero, e)


def at_maximum(x, m, weight):
    """The weight of an element equal to the row's maximum; 0 of one below."""
    return where_eq(x, m, weight, constants(x).zero)


def smoothed(target, keep, spread):
    """(1 - eps) t + eps / C."""
    return fma(target, keep, spread)


def distance(x, u, m):
    """u (m - x), where a u of 0 annuls an infinite x, and the maximum an infinite u."""
    return where_eq(x, m, constants(x).zero, product(u, m - x))


def probability(e, peak, factor, scale):
    """factor exp(x - m) of the `exponential` e; exactly `factor` where e is that of the maximum."""
    return where_eq(e, peak, factor, e * scale)


def log_probability(x, m, log_s):
    """log softmax: both parts are at most 0, so that nothing cancels."""
    return (x - m) - log_s


def less_target(gradient, u, scale):
    """The gradient of a row less `scale` u."""
    return fma(u, constants(u).zero - scale, gradient)


def cross_entropy_loss(m, log_s, c_y, x_y, mass, distances, z_loss):
    """c (log s + m - x_y) + log s sum u + sum u (m - x) + z lse**2."""
    lse = m + log_s
    linear = product(c_y, log_s + (m - x_y)) + product(mass, log_s)
    return (linear + distances) + product(z_loss, lse * lse)


def cross_entropy_gradient(lse, s, rest, c_y, u_y, mass, z_loss, e_y, fall_y):
    """Factor of exp(x - m) in the gradient, and the gradient at the label.

    At the label the gradient is (c + excess) p - u_y - c, whose part c (p - 1) is computed as
    -c (1 - p). With e_y = exp(x_y - m), fall_y = e_y - 1 by expm1 and rest = s - 1, 1 - p is
    (rest - fall_y) / s: nothing cancels.
    """
    excess = mass + product(z_loss + z_loss, lse)
    others = (rest - fall_y) / s
    at_label = (excess * (e_y / s) - u_y) - c_y * others
    return c_y + excess, at_label


def nll_loss(c_y, x_y, distances):
    """-c x_y - sum u x, where `distances` are from 0."""
    zero = constants(x_y).zero
    return product(c_y, zero - x_y) + distances


def softmax_entropy(log_s, away, s):
    """log s + sum exp(x - m) (m - x) / s."""
    return log_s + away / s


def entropy_slope(p, x, m, mean):
    """p ((m - x) - mean), where `mean` is that of m - x; 0 for p = 0."""
    return product(p, (m - x) - mean)


def excess(x, m, t, n):
    """(m - x) - (n - t), by how much further x is below its maximum than t is."""
    return (m - x) - (n - t)


def kl_divergence_of_sums(log_s, log_u, away, u):
    """(log s - log u) + away / u; what is below 0 is a rounding error."""
    c = constants(away)
    value = (log_s - log_u) + away / u
    return where_gt(c.zero, value, c.zero, value)


def itself(x):
    """The term of a plain sum."""
    return x


def entropy(p):
    """-p log p, 0 for p = 0 and -inf below."""
    c = constants(p)
    term = where_gt(p, c.zero, (c.zero - p) * log(p), p)  # 0 and NaN stay
    return where_gt(c.zero, p, c.zero - c.infinity, term + c.zero)


def kl_divergence(p, q):
    """p log(p / q), 0 for p = 0 <= q; inf where p > 0 = q, and where one of them is negative."""
    c = constants(p)
    inside = where_gt(q, c.zero, p * log_ratio(p, q), c.infinity - q)  # a NaN stays
    outside = where_gt(c.zero, p, c.infinity, p) + where_ge(q, c.zero, c.zero, c.infinity - q)
    return where_gt(p, c.zero, inside, outside)


def distribution_cross_entropy(p, q):
    """-p log q, likewise, but NaN where p is negative: `entropy` is -inf there."""
    c = constants(p)
    inside = where_gt(q, c.zero, p * (c.zero - log(q)), c.infinity - q)
    outside = where_gt(c.zero, p, c.nan, p) + where_ge(q, c.zero, c.zero, c.infinity - q)
    return where_gt(p, c.zero, inside, outside)
