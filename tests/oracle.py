"""The formulas once more, plainly and in extended precision, each with the size of what it sums.

An operation of the table has a function of its name here. It is called as the operation is (arrays,
`axis` unless it is element-wise, options) and returns an `Expected`, per row or per element.

A result is a pair (value, scale). With an arithmetic of unit roundoff eps, a method that adds terms of
one sign is off by a few eps times the sum of the terms' magnitudes, which is `scale`: the tests allow
that much and no more. Written from the formulas of PyTorch and SciPy, without looking at the package.
"""

from typing import Any, NamedTuple

import numpy as np

Real = np.longdouble
#: 1 for a method that rounds x - m before the exponential, which costs |x - m| roundoffs; else 0.
SUBTRACTED = 0


Pair = tuple[Any, Any]


class Expected(NamedTuple):
    """What an operation returns with reduction "none", and what a mean divides by."""

    value: Pair
    extras: tuple[Pair, ...] = ()  # in the order of the table
    gradient: Pair | None = None
    mean: Any = (
        None  # the pairs of a mean and of its gradient, where these are others than over the number
    )


def _moved(a, axis):
    return np.moveaxis(np.asarray(a, Real), axis, -1)


def _log_sum(x):
    """(maximum, log sum exp(x - maximum)) over the last axis, kept; the maximum itself apart."""
    top = np.argmax(x, axis=-1)[..., None]
    m = np.take_along_axis(x, top, axis=-1)
    e = np.exp(x - m)
    np.put_along_axis(e, top, 0, axis=-1)
    return m, np.log1p(e.sum(axis=-1, keepdims=True))


def logsumexp(a, axis, b=None, return_sign=False):
    """log|s| with the scale |m| + |log|s/exp(m)||, and the sign of s, exact."""
    x = _moved(a, axis)
    b = np.ones_like(x) if b is None else _moved(b, axis)
    x = np.where(b == 0, -np.inf, x)
    m = np.max(x, axis=-1, initial=-np.inf, keepdims=True)
    m = np.where(np.isfinite(m), m, 0)
    terms = b * np.exp(x - m)
    s = terms.sum(axis=-1)
    # 2 ulp of the maximum and of the logarithm; where weights cancel, what is left of their digits
    with np.errstate(divide="ignore", invalid="ignore"):
        condition = np.abs(terms).sum(axis=-1) / np.abs(s)
        log_s = np.log(np.abs(s))
    sign = np.sign(s)
    value = (log_s + m[..., 0], np.abs(m[..., 0]) + np.abs(log_s) + condition)
    return Expected(value, ((sign, np.zeros_like(sign)),) if return_sign else ())


def softmax(x, axis):
    x = _moved(x, axis)
    m, log_s = _log_sum(x)
    p = np.exp(x - m) / np.exp(log_s)
    scale = p * (1 + SUBTRACTED * np.abs(x - m))
    return Expected((np.moveaxis(p, -1, axis), np.moveaxis(scale, -1, axis)))


def log_softmax(x, axis):
    x = _moved(x, axis)
    m, log_s = _log_sum(x)
    value = (x - m) - log_s
    scale = np.abs(value) + SUBTRACTED * log_s * np.abs(x - m).max(axis=-1, keepdims=True)
    return Expected((np.moveaxis(value, -1, axis), np.moveaxis(scale, -1, axis)))


def sigmoid(x):
    x = np.asarray(x, Real)
    value = np.where(x < 0, np.exp(x), 1) / (1 + np.exp(-np.abs(x)))
    return Expected((value, value))


def log_sigmoid(x):
    x = np.asarray(x, Real)
    value = np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))
    return Expected((value, np.abs(value)))


def _targets(x, target, weight, ignore_index, label_smoothing, sample_weight):
    """Smoothed, weighted targets; sample weights, 0 of ignored rows; what a mean divides by, with class
    weights of labels and without."""
    classes = x.shape[-1]
    w = np.ones(classes, Real) if weight is None else np.asarray(weight, Real)
    g = np.ones(x.shape[:-1], Real) if sample_weight is None else np.asarray(sample_weight, Real)
    target = np.asarray(target)
    if target.dtype.kind in "iu":
        g = np.where(target == ignore_index, 0, g)
        t = (np.where(g == 0, 0, target)[..., None] == np.arange(classes)).astype(Real)
        count = (g * (t * w).sum(axis=-1)).sum()
    else:
        t = target
        count = g.sum()
    return w * ((1 - label_smoothing) * t + label_smoothing / Real(classes)), g, count, g.sum()


def cross_entropy(
    logits,
    target,
    axis,
    *,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    sample_weight=None,
):
    """Loss and lse of a row, gradient of an element. Labels are those of integers."""
    x = _moved(logits, axis)
    slope = np.ones_like(x)
    if softcap is not None:
        slope = 1 / np.cosh(x / softcap) ** 2
        x = softcap * np.tanh(x / softcap)
    dense = np.asarray(target).dtype.kind not in "iu"
    t = _moved(target, axis) if dense else target
    u, g, count, rows = _targets(x, t, weight, ignore_index, label_smoothing, sample_weight)
    m, log_s = _log_sum(x)
    terms = u * (log_s + (m - x))
    lse = (m + log_s)[..., 0]
    # the square doubles the relative error of lse, whose own scale is |m| + log s
    spread = np.abs(m[..., 0]) + log_s[..., 0]
    p = np.exp(x - m) / np.exp(log_s)
    total = u.sum(axis=-1, keepdims=True)
    # a roundoff of x (of its cap, or of x - m) is one of exp(x) times |x|
    shift = SUBTRACTED * np.abs(x - m) + (
        0 if softcap is None else 2 * np.abs(x).max(axis=-1, keepdims=True)
    )

    def weighted(z):
        """Loss and gradient with a factor of lse**2, each with its scale."""
        loss = g * (np.where(u == 0, 0, terms).sum(axis=-1) + z * lse**2)
        loss_scale = np.abs(g) * (
            np.abs(np.where(u == 0, 0, terms)).sum(axis=-1) + 2 * z * np.abs(lse) * spread
        )
        pull = 2 * z * lse[..., None]
        grad = g[..., None] * slope * ((total + pull) * p - u)
        size = (total + 2 * z * spread[..., None]) * p + np.abs(u)
        pairs = (loss, loss_scale * (1 + shift.max(axis=-1)))
        return pairs, _back((grad, np.abs(g[..., None] * slope) * size * (1 + shift)), axis)

    value, gradient = weighted(z_loss)
    mean = ()
    if count and rows:  # in a mean the squares are averaged over the rows, not their weight
        loss, grad = weighted(z_loss * count / rows)
        mean = [[part.sum() / count for part in loss], [part / count for part in grad]]
    return Expected(value, ((lse, spread + 1),), gradient, mean)


sparse_cross_entropy = dense_cross_entropy = cross_entropy


def nll_loss(
    log_probs, target, axis, *, weight=None, ignore_index=-100, label_smoothing=0.0, sample_weight=None
):
    x = _moved(log_probs, axis)
    dense = np.asarray(target).dtype.kind not in "iu"
    t = _moved(target, axis) if dense else target
    u, g, count, _ = _targets(x, t, weight, ignore_index, label_smoothing, sample_weight)
    terms = g[..., None] * np.where(u == 0, 0, -u * x)
    value = terms.sum(axis=-1), np.abs(terms).sum(axis=-1)
    grad = _back((-g[..., None] * u, np.abs(g[..., None] * u)), axis)
    return Expected(value, (), grad, _mean(value, grad, count))


sparse_nll_loss = dense_nll_loss = nll_loss


def _back(pair, axis):
    """A pair of arrays with the axis of the classes where it was."""
    return tuple(np.moveaxis(part, -1, axis) for part in pair)


def _mean(value, gradient, count):
    """Mean and its gradient for a divisor of any sign."""
    if not count:
        return ()
    return [
        (value[0].sum() / count, value[1].sum() / abs(count)),
        (gradient[0] / count, gradient[1] / abs(count)),
    ]


def _tempered(logits, axis, temperature):
    """Logits over the temperature, and how many roundoffs more their exponentials may be off by."""
    x = _moved(logits, axis) / Real(temperature)
    shift = 0 if temperature == 1 else 2 * np.abs(x).max(axis=-1, keepdims=True)
    return x, shift


def selective_log_softmax(
    logits, index, axis, *, temperature=1.0, return_entropy=False, return_lse=False
):
    x, shift = _tempered(logits, axis, temperature)
    m, log_s = _log_sum(x)
    x_y = np.take_along_axis(x, np.asarray(index)[..., None], axis=-1)
    value = ((x_y - m) - log_s)[..., 0]
    off = SUBTRACTED * np.abs(x - m).max(axis=-1, keepdims=True) * log_s
    scale = (np.abs((x_y - m) - log_s) + off + shift)[..., 0]
    extras = []
    if return_entropy:
        extras.append(entropy_from_logits(logits, axis, temperature=temperature).value)
    if return_lse:
        spread = np.abs(m[..., 0]) + log_s[..., 0] + 1
        extras.append(((m + log_s)[..., 0], spread + np.broadcast_to(shift, m.shape)[..., 0]))
    return Expected((value, scale), tuple(extras))


def entropy_from_logits(logits, axis, *, temperature=1.0, sample_weight=None):
    x, shift = _tempered(logits, axis, temperature)
    shift = shift + SUBTRACTED * np.abs(x).max(axis=-1, keepdims=True) * 2
    m, log_s = _log_sum(x)
    p = np.exp(x - m) / np.exp(log_s)
    d = np.where(p == 0, 0, m - x)
    mean = (p * d).sum(axis=-1, keepdims=True)
    g = np.ones(x.shape[:-1], Real) if sample_weight is None else np.asarray(sample_weight, Real)
    h = (log_s + mean)[..., 0]
    value = g * h, np.abs(g) * h * (1 + np.broadcast_to(shift, m.shape)[..., 0])
    of_logits = g[..., None] / Real(temperature)
    grad = of_logits * p * (d - mean), np.abs(of_logits) * p * (d + mean) * (1 + shift)
    grad = _back(grad, axis)
    return Expected(value, (), grad, _mean(value, grad, g.sum()))


def kl_divergence_from_logits(logits, target_logits, axis, *, temperature=1.0, sample_weight=None):
    x, x_shift = _tempered(logits, axis, temperature)
    t, t_shift = _tempered(target_logits, axis, temperature)
    shift = x_shift + t_shift
    shift = shift + SUBTRACTED * 2 * (np.abs(x) + np.abs(t)).max(axis=-1, keepdims=True)
    (m, log_s), (n, log_u) = _log_sum(x), _log_sum(t)
    q, p = np.exp(x - m) / np.exp(log_s), np.exp(t - n) / np.exp(log_u)
    terms, sizes = p * ((m - x) - (n - t)), p * ((m - x) + (n - t))
    g = np.ones(x.shape[:-1], Real) if sample_weight is None else np.asarray(sample_weight, Real)
    loss = (log_s - log_u)[..., 0] + terms.sum(axis=-1)
    size = (log_s + log_u)[..., 0] + sizes.sum(axis=-1)
    value = g * loss, np.abs(g) * size * (1 + np.broadcast_to(shift, m.shape)[..., 0])
    of_logits = g[..., None] / Real(temperature)
    grad = _back((of_logits * (q - p), np.abs(of_logits) * (q + p) * (1 + shift)), axis)
    return Expected(value, (), grad, _mean(value, grad, g.sum()))


def binary_cross_entropy_with_logits(logits, target, *, weight=1.0, pos_weight=1.0):
    x, t = np.asarray(logits, Real), np.asarray(target).astype(Real)
    w, p = np.asarray(weight, Real), np.asarray(pos_weight, Real)
    soft = np.log1p(np.exp(-np.abs(x)))
    loss = w * (p * t * (np.maximum(-x, 0) + soft) + (1 - t) * (np.maximum(x, 0) + soft))
    rising, falling = w * (1 - t) * sigmoid(x).value[0], w * p * t * sigmoid(-x).value[0]
    return Expected((loss, np.abs(loss)), (), (rising - falling, np.abs(rising + falling)))


def gaussian_nll(mean, target, var, *, full=False, eps=1e-6):
    x, t, v = (np.asarray(a).astype(Real) for a in (mean, target, var))
    v = np.maximum(v, Real(np.float32(eps) if mean.dtype.itemsize < 8 else eps))
    linear = (x - t) ** 2 / v
    loss = (linear + np.log(v)) / 2 + (np.log(2 * np.pi * Real(1)) / 2 if full else 0)
    scale = (linear + np.abs(np.log(v))) / 2 + full
    return Expected((loss, scale), (), ((x - t) / v, np.abs((x - t) / v)))


def mse(prediction, target):
    x, t = (np.asarray(a).astype(Real) for a in (prediction, target))
    return Expected(((x - t) ** 2,) * 2, (), (2 * (x - t), 2 * np.abs(x - t)))


def binary_cross_entropy(probs, target, *, weight=1.0):
    p, t, w = (np.asarray(a).astype(Real) for a in (probs, target, weight))
    loss = -w * (t * np.maximum(np.log(p), -100) + (1 - t) * np.maximum(np.log1p(-p), -100))
    slope = w * (p - t) / np.maximum(p * (1 - p), Real(1e-12))
    return Expected((loss, np.abs(loss)), (), (slope, np.abs(slope)))


def poisson_nll(prediction, target, *, log_input=True, full=False, eps=1e-8):
    x, t = (np.asarray(a).astype(Real) for a in (prediction, target))
    eps = Real(np.float32(eps) if prediction.dtype.itemsize < 8 else eps)
    if log_input:
        terms, slopes = (np.exp(x), -t * x), (np.exp(x), -t)
        scale = 0
    else:  # a roundoff of x + eps is one of its logarithm, absolute
        log = np.where(t == 0, 0, np.log(x + eps))
        terms, slopes, scale = (x, -t * log), (1, -np.where(t == 0, 0, t / (x + eps))), np.abs(t)
    if full:
        s = np.where(t > 1, t, 1)
        stirling = [np.where(t > 1, a, 0) for a in (s * np.log(s), -s, np.log(2 * np.pi * s) / 2)]
        terms = (*terms, *stirling)
    scale = scale + sum(map(np.abs, terms))
    return Expected((sum(terms), scale), (), (sum(slopes), sum(map(np.abs, slopes))))


def sigmoid_focal_loss(logits, target, *, alpha=0.25, gamma=2.0):
    """A roundoff of log(1 - p_t), or of what is added to it, is `gamma` of them of the power."""
    x, t = np.asarray(logits, Real), np.asarray(target).astype(Real)
    ce = binary_cross_entropy_with_logits(x, t).value[0]
    p, q = sigmoid(x).value[0], sigmoid(-x).value[0]
    wrong = t * q + (1 - t) * p
    weight = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1
    powers = 1 + gamma * (1 + np.where((t == 0) | (t == 1), 0, np.abs(np.log(wrong))))
    factor = weight * wrong**gamma
    slope = factor * ((1 - t) * p - t * q + gamma * (1 - 2 * t) * (p * q / wrong) * ce)
    parts = (1 - t) * p + t * q + gamma * np.abs(1 - 2 * t) * (p * q / wrong) * ce
    return Expected((factor * ce, factor * ce * powers), (), (slope, factor * parts * powers))


def entropy(p, axis, base=None):
    p = _moved(p, axis)
    terms = -p * np.log(np.where(p == 0, 1, p)) / (1 if base is None else np.log(Real(base)))
    return Expected((terms.sum(axis=-1), np.abs(terms).sum(axis=-1)))


def kl_divergence(p, q, axis, base=None):
    p, q = _moved(p, axis), _moved(q, axis)
    terms = np.where(p == 0, 0, p * np.log(p / q)) / (1 if base is None else np.log(Real(base)))
    return Expected((terms.sum(axis=-1), np.abs(terms).sum(axis=-1)))


def distribution_cross_entropy(p, q, axis, base=None):
    p, q = _moved(p, axis), _moved(q, axis)
    terms = np.where(p == 0, 0, -p * np.log(q)) / (1 if base is None else np.log(Real(base)))
    return Expected((terms.sum(axis=-1), np.abs(terms).sum(axis=-1)))
