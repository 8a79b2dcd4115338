"""The reference: each formula of the contract as it is written, in float64, with whole arrays.

Slow, obvious, and independent of `fastll.formulas`, which it checks; a formula of a user's is run as it
stands. The only backend that makes full-size temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastll.backend.host import Host
from fastll.contract import CHUNK, Fold, Kernel, Map, units_of
from fastll.dtypes import as_floats, rounded
from fastll.formulas import element

Array = Any


#: Infinities and NaN are ordinary values here: no warnings.
_quiet = np.errstate(all="ignore")


class Backend(Host):
    """See `fastll.contract.Backend`."""

    name = "numpy"

    def map(self, call: Map) -> Kernel:
        formula = ELEMENTS.get(call.operation) or element(call.operation).formula
        units = units_of(call.inputs[0].shape[1])

        @_quiet
        def kernel(start: int, stop: int) -> None:
            for unit in range(start, stop):
                row, at = divmod(unit, units)
                part = slice(at * CHUNK, (at + 1) * CHUNK)
                result = formula(*(as_floats(a[row, part]) for a in call.inputs), *call.parameters)
                value, slope = result if isinstance(result, tuple) else (result, None)
                value = np.broadcast_to(value, call.inputs[0][row, part].shape)  # it may be a number
                factor = 1.0 if call.weight is None else as_floats(call.weight[row, part])
                if call.value is not None:
                    call.value[row, part] = rounded(factor * value, call.value.dtype)
                if call.partial is not None:
                    call.partial[row, at] = np.sum(factor * value)
                if call.slope is not None:
                    call.slope[row, part] = rounded(call.scale * factor * slope, call.slope.dtype)

        return kernel

    def fold(self, call: Fold) -> Kernel:
        formula = FOLDS.get(call.operation, _sum_of_terms)

        @_quiet
        def kernel(start: int, stop: int) -> None:
            formula(_Rows(call, start, stop))

        return kernel

    def scan_labels(
        self, labels: Array, classes: int, ignore_index: int, weight: Array
    ) -> tuple[int, float, float]:
        labels = labels.reshape(-1)
        kept = labels != ignore_index
        bad = np.flatnonzero(kept & ((labels < 0) | (labels >= classes)))
        if bad.size:
            return int(bad[0]), 0.0, 0.0
        rows = float(np.count_nonzero(kept))
        if weight is None:
            return -1, rows, rows
        return -1, float(np.sum(weight[labels[kept]], dtype=np.float64)), rows


def _sigmoid(x: Array) -> Array:
    tail = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, tail) / (1 + tail)


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _times(coefficient: Array, value: Array) -> Array:
    """The product, 0 where the coefficient is."""
    return np.where(coefficient == 0, 0, coefficient * value)


def _binary_cross_entropy_with_logits(
    x: Array, t: Array, pos_weight: Array = 1.0
) -> tuple[Array, Array]:
    positive, negative = pos_weight * t, 1 - t
    value = _times(positive, _softplus(-x)) + _times(negative, _softplus(x))
    return value, negative * _sigmoid(x) - positive * _sigmoid(-x)


def _gaussian_nll(
    mean: Array, target: Array, var: Array, least: float, constant: float
) -> tuple[Array, Array]:
    v = np.where(var < 0, np.nan, np.maximum(var, least))
    return ((mean - target) ** 2 / v + np.log(v)) / 2 + constant, (mean - target) / v


def _binary_cross_entropy(p: Array, t: Array) -> tuple[Array, Array]:
    value = -t * np.maximum(np.log(p), -100) - (1 - t) * np.maximum(np.log1p(-p), -100)
    slope = (p - t) / np.maximum(p * (1 - p), 1e-12)
    return value, np.where((p < 0) | (p > 1), np.nan, slope)


def _poisson_nll(x: Array, t: Array) -> tuple[Array, Array]:
    return np.exp(x) - _times(t, x), np.exp(x) - t


def _poisson_nll_of_rate(x: Array, t: Array, eps: float) -> tuple[Array, Array]:
    value, slope = x - _times(t, np.log(x + eps)), 1 - np.where(t == 0, 0, t / (x + eps))
    below = x + eps < 0
    return np.where(below, np.nan, value), np.where(below, np.nan, slope)


def _with_stirling(t: Array, value: Array, slope: Array) -> tuple[Array, Array]:
    stirling = t * np.log(t) - t + np.log(2 * np.pi * t) / 2
    return value + np.where(t > 1, stirling, 0), slope


def _sigmoid_focal_loss(
    x: Array, t: Array, positive_weight: float, negative_weight: float, gamma: float
) -> tuple[Array, Array]:
    ce, slope = _binary_cross_entropy_with_logits(x, t)
    p, q = _sigmoid(x), _sigmoid(-x)
    wrong = t * q + (1 - t) * p  # 1 - p_t
    weight = t * positive_weight + (1 - t) * negative_weight
    pull = gamma * (1 - 2 * t) * np.where((p == 0) | (q == 0), 0, p * q / wrong)
    return _times(weight, ce * wrong**gamma), weight * wrong**gamma * (slope + _times(pull, ce))


#: Element-wise operations: their value, or value and slope.
ELEMENTS: dict[str, Callable[..., Any]] = {
    "outside": lambda x, low, high: np.where((x < low) | (x > high), 1.0, 0.0),
    "sigmoid": _sigmoid,
    "log_sigmoid": lambda x: -_softplus(-x),
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
    "binary_cross_entropy_with_logits_pos_weight": _binary_cross_entropy_with_logits,
    "gaussian_nll": _gaussian_nll,
    "mse": lambda x, t: ((x - t) ** 2, 2 * (x - t)),
    "binary_cross_entropy": _binary_cross_entropy,
    "poisson_nll": _poisson_nll,
    "poisson_nll_full": lambda x, t: _with_stirling(t, *_poisson_nll(x, t)),
    "poisson_nll_of_rate": _poisson_nll_of_rate,
    "poisson_nll_of_rate_full": lambda x, t, eps: _with_stirling(t, *_poisson_nll_of_rate(x, t, eps)),
    "sigmoid_focal_loss": _sigmoid_focal_loss,
    "kl_div": lambda x, t: (_times(t, np.log(t) - x), -t),
    "kl_div_log_target": lambda x, t: (_times(np.exp(t), t - x), -np.exp(t)),
}


def _kl_divergence(p: Array, q: Array) -> Array:
    close = np.abs(p - q) < q / 2
    log = np.where(close, np.log1p((p - q) / q), np.log(p) - np.log(q))
    value = np.where((p < 0) | (q < 0) | ((p > 0) & (q == 0)), np.inf, _times(p, log))
    return np.where(np.isnan(p) | np.isnan(q), np.nan, value)


def _distribution_cross_entropy(p: Array, q: Array) -> Array:
    value = np.where((q < 0) | ((p > 0) & (q == 0)), np.inf, -_times(p, np.log(q)))
    return np.where((p < 0) | np.isnan(p) | np.isnan(q), np.nan, value)


#: Terms of the folds that are sums of them.
TERMS: dict[str, Callable[..., Any]] = {
    "sum": lambda x: x,
    "entropy": lambda p: np.where(p < 0, -np.inf, -_times(p, np.log(p))),
    "kl_divergence": _kl_divergence,
    "distribution_cross_entropy": _distribution_cross_entropy,
}


class _Rows:
    """Rows `start` to `stop` of a fold's operands, as two-dimensional float64."""

    def __init__(self, call: Fold, start: int, stop: int) -> None:
        self.call = call
        self.at = np.divmod(np.arange(start, stop), call.x.shape[2])
        self.x = self.full(call.x)

    def of(self, array: Array) -> Array:
        return None if array is None else array[self.at]

    def samples(self) -> Array:
        """Sample weights."""
        sample = self.call.sample
        return np.ones(len(self.x)) if sample is None else as_floats(self.of(sample))

    def put(self, array: Array, values: Array) -> None:
        if array is not None:
            array[self.at] = values

    def full(self, array: Array) -> Array:
        outer, inner = self.at
        return None if array is None else as_floats(array[outer, :, inner])

    def put_full(self, array: Array, values: Array) -> None:
        outer, inner = self.at
        array[outer, :, inner] = rounded(values, array.dtype)


def _logsumexp(rows: _Rows) -> None:
    call = rows.call
    x = rows.x * call.options.inverse_temperature
    m, e, k = _exponentials(x, rows.full(call.second), rows.of(call.state))
    rows.put(call.state, np.stack((m, e, k), axis=-1))
    s = e + k
    # log|s| from whichever of its two parts dominates
    log_s = np.where(np.abs(e) < np.abs(k), np.log(np.abs(k)) + np.log1p(e / k), np.log(np.abs(s)))
    value = np.where((m == -np.inf) & ~np.isnan(e), -np.inf, m + log_s)
    rows.put(call.lse, value if call.sign is not None else np.where(s < 0, np.nan, value))
    rows.put(call.sign, np.sign(s))
    _select(rows, x, m, np.log1p(e + (k - 1)))


def _select(rows: _Rows, x: Array, m: Array, log_s: Array) -> None:
    """The log-probabilities of some classes."""
    if rows.call.selected is not None:
        y = rows.of(rows.call.labels)
        valid = (y >= 0) & (y < x.shape[1])
        x_y = np.take_along_axis(x, np.where(valid, y, 0), axis=1) if x.shape[1] else np.nan
        value = (x_y - m[:, None]) - log_s[:, None]
        rows.put(rows.call.selected, np.where(valid, value, np.nan))


def _softmax(rows: _Rows) -> None:
    call = rows.call
    before = rows.of(call.state)
    m, e, k = _exponentials(rows.x) if before is None else np.moveaxis(before, -1, 0)
    if call.operation == "log_softmax":
        result = (rows.x - m[:, None]) - np.log1p(e + (k - 1))[:, None]
    else:
        result = _probabilities(rows.x, m, e + k)
    rows.put_full(call.out, result)


def _cross_entropy(rows: _Rows) -> None:
    call, x = rows.call, rows.x
    z, cap, scale = call.options[2:5]
    slope = 1 / np.cosh(x / cap) ** 2 if cap else 1.0
    if cap:
        x = cap * np.tanh(x / cap)
    m, e, k = _exponentials(x)
    log_s = np.log1p(e + (k - 1))
    sample, row, y, c, x_y, u = _targets(rows, x)
    value = _times(c, log_s + (m - x_y))
    value = value + _times(u, log_s[:, None] + (m[:, None] - x)).sum(axis=1)
    if x.shape[1]:
        value = np.where(m == -np.inf, np.nan, value)
    lse = m + log_s
    value = value + _times(z, lse**2)
    rows.put(call.value, _times(sample, value))
    rows.put(call.lse, lse)
    if call.out is None:
        return
    total = c + u.sum(axis=1) + _times(2 * z, lse)
    p = _probabilities(x, m, e + k)
    g = total[:, None] * p - u
    # at y: (total - c) p - c (1 - p) - u, with 1 - p free of cancellation
    q = ((e + (k - 1)) - np.expm1(x_y - m)) / (e + k)
    g[row, y] = (total - c)[row] * p[row, y] - (c * q)[row] - u[row, y]
    rows.put_full(call.out, _times(sample[:, None], scale * slope * g))


def _targets(rows: _Rows, x: Array) -> tuple[Array, ...]:
    """Sample weights, 0 of ignored rows; the rows that have a label, and it; c, x_y and u."""
    call = rows.call
    count, classes = x.shape
    ignore_index, eps = call.options[:2]
    w = np.ones(classes) if call.weight is None else call.weight.astype(np.float64)
    sample = rows.samples()
    c, x_y = np.zeros(count), np.zeros(count)
    if call.labels is None:
        u = w * ((1 - eps) * rows.full(call.second) + eps / max(classes, 1))
        return sample, np.zeros(0, int), np.zeros(0, int), c, x_y, u
    y = rows.of(call.labels)
    sample = np.where(y == ignore_index, 0, sample)
    row = np.flatnonzero(sample)
    y = y[row]
    c[row], x_y[row] = (1 - eps) * w[y], x[row, y]
    return sample, row, y, c, x_y, np.broadcast_to(_times(eps / max(classes, 1), w), x.shape)


def _nll_loss(rows: _Rows) -> None:
    call = rows.call
    sample, row, y, c, x_y, u = _targets(rows, rows.x)
    rows.put(call.value, _times(sample, _times(c, -x_y) + _times(u, -rows.x).sum(axis=1)))
    if call.out is not None:
        g = -u
        g[row, y] -= c[row]
        rows.put_full(call.out, _times(sample[:, None], call.options.scale * g))


def _entropy_from_logits(rows: _Rows) -> None:
    call = rows.call
    x = rows.x * call.options.inverse_temperature
    m, e, k = _exponentials(x)
    log_s, p, distance = np.log1p(e + (k - 1)), _probabilities(x, m, e + k), m[:, None] - x
    away = _times(p, distance).sum(axis=1)
    sample = rows.samples()
    rows.put(call.value, _times(sample, np.where(m == -np.inf, np.nan, log_s + away)))
    rows.put(call.lse, m + log_s)
    _select(rows, x, m, log_s)
    if call.out is not None:
        scale = call.options.scale * call.options.inverse_temperature
        g = scale * _times(p, distance - away[:, None])
        rows.put_full(call.out, _times(sample[:, None], g))


def _kl_divergence_from_logits(rows: _Rows) -> None:
    call = rows.call
    x, t = (a * call.options.inverse_temperature for a in (rows.x, rows.full(call.second)))
    m, e, k = _exponentials(x)
    n, f, l = _exponentials(t)  # noqa: E741  as the contract names it
    q, p = _probabilities(x, m, e + k), _probabilities(t, n, f + l)
    ratio = (m[:, None] - x) - (n[:, None] - t)
    value = (np.log1p(e + (k - 1)) - np.log1p(f + (l - 1))) + _times(p, ratio).sum(axis=1)
    # what is below 0 is a rounding error
    value = np.where(np.isinf(m) | np.isinf(n), np.nan, np.where(value < 0, 0, value))
    sample = rows.samples()
    rows.put(call.value, _times(sample, value))
    if call.out is not None:
        scale = call.options.scale * call.options.inverse_temperature
        rows.put_full(call.out, _times(sample[:, None], scale * (q - p)))


def _sum_of_terms(rows: _Rows) -> None:
    call = rows.call
    operands = [rows.full(a) for a in (call.x, call.second) if a is not None]
    sums = TERMS[call.operation](*operands).sum(axis=1)
    rows.put(call.value, call.options.scale * sums + 0.0)  # without the sign that a scale gives a 0


FOLDS: dict[str, Callable[[_Rows], None]] = {
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "entropy_from_logits": _entropy_from_logits,
    "kl_divergence_from_logits": _kl_divergence_from_logits,
}


def _exponentials(x: Array, b: Array = None, before: Array = None) -> tuple[Array, Array, Array]:
    """The state (m, e, k) of rows, continued from `before`."""
    weights = np.ones_like(x) if b is None else b
    x = np.where(weights == 0, -np.inf, x)
    # fmax passes NaN over: a NaN shows in e
    m = np.fmax.reduce(x, axis=1, initial=-np.inf)
    if before is not None:
        m = np.fmax(m, before[:, 0])
    top = x == m[:, None]
    terms = weights * np.where(x == -np.inf, 0, np.exp(x - m[:, None]))  # no number: inf times 0
    e = np.sum(np.where((top & (x > -np.inf)) | (weights == 0), 0, terms), axis=1)
    # weights of both signs at an infinite maximum make it NaN
    unit = np.where(np.isposinf(m) & (b is not None), np.inf, 1)[:, None]
    k = np.sum(np.where(top & (weights != 0), weights * unit, 0), axis=1)
    if before is not None:
        m_0, e_0, k_0 = np.moveaxis(before, -1, 0)
        e = e + np.where(m_0 == m, e_0, (e_0 + k_0) * np.exp(m_0 - m))
        k = k + np.where(m_0 == m, k_0, 0)
    empty = m == -np.inf
    return m, np.where(empty & ~np.isnan(e), 0, e), np.where(empty, 0, k)


def _probabilities(x: Array, m: Array, s: Array) -> Array:
    """exp(x - m) / s; NaN in every entry where the maximum is infinite."""
    p = np.exp(x - m[:, None]) / s[:, None]
    return np.where(np.isinf(m)[:, None], np.nan, p)


backend = Backend()
