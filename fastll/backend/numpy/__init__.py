"""The reference: each formula of the contract as it is written, in float64, with whole arrays.

Slow, obvious, and the oracle of the tests. The only backend that makes full-size temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from fastll.backend.host import Host
from fastll.contract import CHUNK, CrossEntropyOptions, Kernel, units_of
from fastll.dtypes import as_floats, rounded

name = "numpy"
Array = Any


def _quiet(method: Callable[..., Kernel]) -> Callable[..., Kernel]:
    """Infinities and NaN are ordinary values here: no warnings."""

    @wraps(method)
    def bound(self: Backend, *args: Any) -> Kernel:
        kernel = method(self, *args)

        def quiet(start: int, stop: int) -> None:
            with np.errstate(all="ignore"):
                kernel(start, stop)

        return quiet

    return bound


class Backend(Host):
    """See `fastll.contract.Backend`."""

    name = "numpy"

    @_quiet
    def logsumexp(self, x: Array, b: Array, state: Array, out: Array, sign: Array) -> Kernel:
        def kernel(start: int, stop: int) -> None:
            r = _Rows(x, start, stop)
            before = r.of(state) if state is not None else None
            m, e, k = _fold(r.full(x), r.full(b) if b is not None else None, before)
            if state is not None:
                r.put(state, np.stack((m, e, k), axis=-1))
            if out is None:
                return
            s = e + k
            # log|s| from whichever of its two parts dominates
            log_s = np.where(
                np.abs(e) < np.abs(k), np.log(np.abs(k)) + np.log1p(e / k), np.log(np.abs(s))
            )
            value = np.where((m == -np.inf) & ~np.isnan(e), -np.inf, m + log_s)
            if sign is not None:
                r.put(sign, np.sign(s))
            else:
                value = np.where(s < 0, np.nan, value)
            r.put(out, value)

        return kernel

    @_quiet
    def softmax(self, x: Array, state: Array, out: Array, log: bool) -> Kernel:
        def kernel(start: int, stop: int) -> None:
            r = _Rows(x, start, stop)
            xs = r.full(x)
            m, e, k = np.moveaxis(r.of(state), -1, 0) if state is not None else _fold(xs, None, None)
            if log:
                result = (xs - m[:, None]) - np.log1p(e + (k - 1))[:, None]
            else:
                result = _probabilities(xs, m, e + k)
            r.put_full(out, result)

        return kernel

    @_quiet
    def cross_entropy(
        self,
        x: Array,
        target: Array,
        labels: Array,
        weight: Array,
        options: CrossEntropyOptions,
        loss: Array,
        lse: Array,
        grad: Array,
    ) -> Kernel:
        ignore_index, eps, z, cap, scale = options
        classes = x.shape[1]

        def kernel(start: int, stop: int) -> None:
            r = _Rows(x, start, stop)
            xs = r.full(x)
            slope = 1 / np.cosh(xs / cap) ** 2 if cap else 1.0
            if cap:
                xs = cap * np.tanh(xs / cap)
            m, e, k = _fold(xs, None, None)
            log_s = np.log1p(e + (k - 1))
            w = np.ones(classes) if weight is None else weight.astype(np.float64)
            row = np.arange(len(xs))
            if labels is not None:
                y = r.of(labels)
                kept = y != ignore_index
                u = np.broadcast_to(w * (eps / max(classes, 1)), xs.shape)
                c = np.zeros(len(xs))
                y = np.where(kept, y, 0)
                x_y = np.zeros(len(xs))
                if kept.any():
                    c = (1 - eps) * w[y]
                    x_y = xs[row, y]
                value = np.where(c == 0, 0, c * (log_s + (m - x_y)))
            else:
                kept = np.ones(len(xs), bool)
                u = w * ((1 - eps) * r.full(target) + eps / max(classes, 1))
                c = np.zeros(len(xs))
                value = np.zeros(len(xs))
            nll = log_s[:, None] + (m[:, None] - xs)
            value = value + np.where(u == 0, 0, u * nll).sum(axis=1)
            if classes:
                value = np.where(m == -np.inf, np.nan, value)
            row_lse = m + log_s
            if z:
                value = value + z * row_lse**2
            r.put(loss, np.where(kept, value, 0))
            if lse is not None:
                r.put(lse, row_lse)
            if grad is None:
                return
            total = c + u.sum(axis=1) + (2 * z * row_lse if z else 0)
            p = _probabilities(xs, m, e + k)
            g = total[:, None] * p - u
            if labels is not None and kept.any():
                # at y: (total - c) p - c (1 - p) - u, with 1 - p free of cancellation
                q = ((e + (k - 1)) - np.expm1(x_y - m)) / (e + k)
                g[row, y] = (total - c) * p[row, y] - c * q - u[row, y]
            r.put_full(grad, np.where(kept[:, None], scale * slope * g, 0))

        return kernel

    def check_labels(
        self, labels: Array, classes: int, ignore_index: int, weight: Array
    ) -> tuple[int, float]:
        kept = labels != ignore_index
        bad = np.flatnonzero(kept & ((labels < 0) | (labels >= classes)))
        if bad.size:
            return int(bad[0]), 0.0
        if weight is None:
            return -1, float(np.count_nonzero(kept))
        return -1, float(np.sum(weight[labels[kept]], dtype=np.float64))

    @_quiet
    def sigmoid(self, x: Array, out: Array, log: bool) -> Kernel:
        def kernel(start: int, stop: int) -> None:
            for row, part in _units(x, start, stop):
                xs = as_floats(x[row, part])
                tail = np.exp(-np.abs(xs))
                if log:
                    value = np.minimum(xs, 0) - np.log1p(tail)
                else:
                    value = np.where(xs >= 0, 1, tail) / (1 + tail)
                out[row, part] = rounded(value, out.dtype)

        return kernel

    @_quiet
    def binary_cross_entropy(
        self,
        x: Array,
        target: Array,
        weight: Array,
        pos_weight: Array,
        scale: float,
        loss: Array,
        partial: Array,
        grad: Array,
    ) -> Kernel:
        units = units_of(x.shape[1])

        def kernel(start: int, stop: int) -> None:
            for unit, (row, part) in enumerate(_units(x, start, stop), start):
                xs: Array = as_floats(x[row, part])
                t: Array = as_floats(target[row, part])
                w: Array = 1.0 if weight is None else as_floats(weight[row, part])
                positive = t if pos_weight is None else t * as_floats(pos_weight[row, part])
                negative = 1 - t
                # softplus(x) = max(x, 0) + log1p(exp(-|x|)), and likewise softplus(-x)
                tail = np.exp(-np.abs(xs))
                slope = np.where(xs > 0, negative, positive)
                linear = np.where(slope == 0, 0, slope * np.abs(xs))
                value = w * (linear + (positive + negative) * np.log1p(tail))
                if loss is not None:
                    loss[row, part] = value
                if partial is not None:
                    partial[divmod(unit, units)] = value.sum()
                if grad is not None:
                    upper, lower = np.where(xs >= 0, 1, tail), np.where(xs >= 0, tail, 1)
                    g = (negative * upper - positive * lower) / (1 + tail)
                    grad[row, part] = rounded(scale * w * g, grad.dtype)

        return kernel


class _Rows:
    """Rows `start` to `stop` of arrays over (outer, classes, inner), as two-dimensional float64."""

    def __init__(self, x: Array, start: int, stop: int) -> None:
        self.at = np.divmod(np.arange(start, stop), x.shape[2])

    def of(self, array: Array) -> Array:
        return array[self.at]

    def put(self, array: Array, values: Array) -> None:
        array[self.at] = values

    def full(self, array: Array) -> Array:
        outer, inner = self.at
        return as_floats(array[outer, :, inner])

    def put_full(self, array: Array, values: Array) -> None:
        outer, inner = self.at
        array[outer, :, inner] = rounded(values, array.dtype)


def _units(x: Array, start: int, stop: int) -> list[tuple[int, slice]]:
    """Outer row and slice of each unit of an element-wise operation."""
    units = units_of(x.shape[1])
    places = (divmod(unit, units) for unit in range(start, stop))
    return [(row, slice(at * CHUNK, (at + 1) * CHUNK)) for row, at in places]


def _fold(xs: Array, b: Array, before: Array) -> tuple[Array, Array, Array]:
    """The state (m, e, k) of rows, continued from `before`."""
    weights = np.ones_like(xs) if b is None else b
    xs = np.where(weights == 0, -np.inf, xs)
    # fmax passes NaN over: a NaN shows in e
    m = np.fmax.reduce(xs, axis=1, initial=-np.inf)
    if before is not None:
        m = np.fmax(m, before[:, 0])
    top = xs == m[:, None]
    e = np.sum(np.where(top | (weights == 0), 0, weights * np.exp(xs - m[:, None])), axis=1)
    # weights of both signs at an infinite maximum make it NaN
    unit = np.where(np.isposinf(m) & (b is not None), np.inf, 1)[:, None]
    k = np.sum(np.where(top & (weights != 0), weights * unit, 0), axis=1)
    if before is not None:
        m_0, e_0, k_0 = np.moveaxis(before, -1, 0)
        e = e + np.where(m_0 == m, e_0, (e_0 + k_0) * np.exp(m_0 - m))
        k = k + np.where(m_0 == m, k_0, 0)
    empty = m == -np.inf
    return m, np.where(empty & ~np.isnan(e), 0, e), np.where(empty, 0, k)


def _probabilities(xs: Array, m: Array, s: Array) -> Array:
    """exp(x - m) / s; NaN in every entry where the maximum is infinite."""
    p = np.exp(xs - m[:, None]) / s[:, None]
    return np.where(np.isinf(m)[:, None], np.nan, p)


backend = Backend()
