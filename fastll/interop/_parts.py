"""Rows whose classes are in several parts: what is found of each part, and how parts come together.

For the classes j of a part, with targets ``u_j`` as in `fastll.contract`, a row has the running state
of their logits, whose log-sum-exp is ``lse``, and

    loss = sum_j u_j (lse - x_j),   mass = sum_j u_j

in which no summand is negative. Parts a and b are one part with

    loss = loss_a + loss_b + mass_a (lse - lse_a) + mass_b (lse - lse_b)

where ``lse - lse_a = log(1 + exp(lse_b - lse_a))``: nothing cancels here either, so that a loss near
zero keeps its digits. Its gradient is made part by part from the state and the mass of whole rows.
Everything here is a NumPy array; no framework is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastll import calls
from fastll.api.losses import cross_entropy, nll_loss
from fastll.api.streaming import LogSumExp
from fastll.calls import Call
from fastll.contract import Fold, bad_label
from fastll.dtypes import as_floats, kind_of, rounded

Array = NDArray[Any]

#: Bytes of rows that are worked on together: they stay in the cache from one step to the next.
_BYTES = 1 << 18


#: Infinities and NaN are ordinary values here: no warnings.
_quiet = np.errstate(all="ignore")


class Part(NamedTuple):
    """What is found of a part of the classes of rows."""

    state: LogSumExp
    loss: Array  # float64, in the shape of the rows, like the mass
    mass: Array


class Target(NamedTuple):
    """The part of a target that belongs to some classes, and the options that go with it."""

    labels: Array | None  # of the rows
    dense: Array | None
    weight: Array | None  # of these classes
    first: int  # the first one of these
    total: int  # number of all classes
    ignore_index: int
    smoothing: float
    softcap: float | None

    def local(self, here: int) -> tuple[tuple[Array, ...], Array]:
        """Where rows have a label among these `here` classes, and which one it is."""
        labels = self.labels
        if labels is None:
            return (np.zeros(0, np.intp),), np.zeros(0, np.intp)
        kept = labels != self.ignore_index
        bad = kept & ((labels < 0) | (labels >= self.total))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise bad_label("target", self.total, self.ignore_index, labels[at], at)
        there = kept & (labels >= self.first) & (labels < self.first + here)
        return np.nonzero(there), labels[there].astype(np.int64) - self.first

    def spread(self, shape: tuple[int, ...]) -> tuple[Array, float, float] | None:
        """The part of the target that is not at labels: as a dense one for rows of a `shape` that ends
        with the classes, with its label smoothing and a factor; None if there is no such part."""
        here = shape[-1]
        share = 0.0 if self.dense is None else 1 - self.smoothing
        even = self.smoothing * here / self.total if here else 0.0
        if share + even == 0 or not here:
            return None
        dense = np.broadcast_to(np.float32(0), shape) if self.dense is None else self.dense
        return dense, even / (share + even), share + even

    def at_labels(self, classes: Array) -> tuple[Array, Array]:
        """The point mass at labels, and what smoothing adds to it there."""
        w = np.ones(len(classes)) if self.weight is None else as_floats(self.weight)[classes]
        return (1 - self.smoothing) * w, self.smoothing / self.total * w


@_quiet
def part_of(x: Array, axis: int, target: Target) -> Part:
    """A part of logits, whose classes are on `axis`."""
    if target.softcap is not None:
        x = _capped(x.astype(kind_of(x.dtype).compute), target.softcap)
    classes_last = np.moveaxis(x, axis, -1)
    rows = classes_last.shape[:-1]
    state = LogSumExp(rows, kind_of(x.dtype).compute).update(x, axis)
    m, r, _ = _sums(state)
    loss, mass = np.zeros(rows), np.zeros(rows)
    spread = target.spread(classes_last.shape)
    if spread is not None:
        dense, smoothing, factor = spread
        options: Any = {
            "weight": target.weight,
            "label_smoothing": smoothing,
            "sample_weight": factor,
            "reduction": "none",
        }
        loss += cross_entropy(classes_last, dense, **options)
        mass += nll_loss(np.broadcast_to(-1.0, classes_last.shape), dense, **options)
    at, classes = target.local(classes_last.shape[-1])
    c, _ = target.at_labels(classes)
    x_y = as_floats(classes_last[(*at, classes)])
    loss[at] += _times(c, np.log1p(r[at]) + (m[at] - x_y))
    mass[at] += c
    # -inf is infinitely far from any other logits that a row may have
    loss[m == -np.inf] = np.inf
    loss[mass == 0] = 0
    return Part(state, loss, mass)


@_quiet
def merged(a: Part, b: Part) -> Part:
    """Two parts of rows as one. Neither is changed."""
    state = copy.copy(a.state).merge(b.state)
    (m_a, s_a), (m_b, s_b) = a.state.state, b.state.state
    gap = np.where(m_a == m_b, 0, m_b - m_a) + (np.log(s_b) - np.log(s_a))
    gap = np.where((s_a == 0) & (s_b == 0), 0, gap)
    lifted = _times(a.mass, np.logaddexp(0, gap)) + _times(b.mass, np.logaddexp(0, -gap))
    return Part(state, a.loss + b.loss + lifted, a.mass + b.mass)


@_quiet
def losses(part: Part, labels: Array | None, sample: Any, ignore_index: int, z_loss: float) -> Array:
    """The losses of whole rows, in float64."""
    m, _, lse = _sums(part.state)
    loss = np.where(m == -np.inf, np.nan, part.loss) + _times(z_loss, lse * lse)
    of_rows: Array = _times(kept_of(m.shape, labels, sample, ignore_index), loss)
    return of_rows


@_quiet
def gradient(
    x: Array, axis: int, part: Part, target: Target, sample: Any, scale: float, z_loss: float
) -> Array:
    """The gradient of the losses of rows, `scale` times, with respect to a part of their logits."""
    element, compute = kind_of(x.dtype).element, kind_of(x.dtype).compute
    result = np.empty_like(x, element, subok=False)
    logits, out = np.moveaxis(x, axis, -1), np.moveaxis(result, axis, -1)
    m, r, lse = _sums(part.state)
    kept = kept_of(m.shape, target.labels, sample, target.ignore_index)
    upstream = scaled(kept, scale)
    total = part.mass + _times(2 * z_loss, lse)
    # probabilities times a factor are those of a sum that is so many times smaller
    divisor = np.where(kept == 0, 1, upstream * total)
    state = part.state._state / divisor[..., None]
    state[divisor == 0] = np.inf
    state[..., 0] = m
    spread = target.spread(logits.shape)
    if spread is None and target.softcap is None and element == x.dtype:
        _softmax_of("softmax", logits, state, out, (logits.ndim - 1,))
    else:
        for rows in _slabs(logits):
            block = logits[rows].astype(compute)
            slope = None
            if target.softcap is not None:
                slope = _slope_of_cap(block, target.softcap)
                block = _capped(block, target.softcap)
            _softmax_of("softmax", block, state[rows], block, (block.ndim - 1,))
            if spread is not None:
                dense, smoothing, factor = spread
                options: Any = {"weight": target.weight, "label_smoothing": smoothing}
                _, of_target = nll_loss(
                    np.broadcast_to(compute.type(-1), block.shape),
                    dense[rows],
                    sample_weight=factor * upstream[rows],
                    reduction="sum",
                    return_grad=True,
                    **options,
                )
                block += of_target
            if slope is not None:
                block *= slope
            out[rows] = rounded(block, element)
    at, classes = target.local(logits.shape[-1])
    c, even = target.at_labels(classes)
    x_y, slope_y = as_floats(logits[(*at, classes)]), np.ones(())
    if target.softcap is not None:
        slope_y = _slope_of_cap(x_y, target.softcap)
        x_y = _capped(x_y, target.softcap)
    s, below = r[at] + 1, x_y - m[at]
    # 1 - p without cancellation
    q = (r[at] - np.expm1(below)) / s
    of_label = (total[at] - c) * (np.exp(below) / s) - c * q - even
    of_label[np.isinf(m[at])] = np.nan
    out[(*at, classes)] = rounded(upstream[at] * slope_y * of_label, element)
    out[kept == 0] = 0
    return result


def softmax_of(operation: str, x: Array, state: LogSumExp, axes: tuple[int, ...]) -> Array:
    """ "softmax" or "log_softmax" of a part of the elements of rows, from the state of whole rows."""
    result = np.empty_like(x, kind_of(x.dtype).element, subok=False)
    _softmax_of(operation, x, state._state, result, axes)
    return result


def _softmax_of(operation: str, x: Array, state: Array, out: Array, axes: tuple[int, ...]) -> None:
    call = Call(operation, x, "x")
    if x.size:
        fold = Fold(operation, x, state=np.ascontiguousarray(state), out=out)
        calls.fold(call.backend, call.place, fold, axes)


def _sums(state: LogSumExp) -> tuple[Array, Array, Array]:
    """The maxima, the sums less one, with all of their digits, and their log-sum-exp, in float64."""
    m, e, k = np.moveaxis(state._state, -1, 0)
    r = e + (k - 1)
    return m, r, m + np.log1p(r)


def kept_of(rows: tuple[int, ...], labels: Array | None, sample: Any, ignore_index: int) -> Array:
    """Sample weights, 0 of the rows that are dropped; a new array."""
    kept = np.ones(rows)
    if sample is not None:
        kept *= as_floats(np.asarray(sample)).reshape(np.shape(sample))
    if labels is not None:
        kept[labels == ignore_index] = 0
    return kept


def scaled(kept: Array, scale: float) -> Array:
    """Sample weights times a factor, NaN of a mean over nothing; dropped rows stay dropped."""
    return np.where(kept == 0, 0, scale * kept)


def _times(factor: Any, value: Any) -> Any:
    """The product, 0 where the factor is."""
    return np.where(factor == 0, 0.0, factor * value)


def _capped(x: Array, softcap: float) -> Array:
    """Logits in a floating dtype as the soft cap has them, in place of `x`."""
    x = np.divide(x, softcap, out=x)
    np.tanh(x, out=x)
    return np.multiply(x, softcap, out=x)


def _slope_of_cap(x: Array, softcap: float) -> Array:
    """The derivative of capped logits, a new array."""
    slope: Array = np.cosh(x / softcap)
    slope *= slope
    return np.reciprocal(slope, out=slope)


def _slabs(x: Array) -> Iterator[tuple[slice, ...]]:
    """Slices of the rows of an array that ends with the classes, by its longest axis of rows."""
    rows = x.shape[:-1]
    if not rows:
        yield (slice(None),)
        return
    axis = max(range(len(rows)), key=rows.__getitem__)
    each = 8 * math.prod(x.shape) // max(rows[axis], 1)
    step = max(1, _BYTES // max(each, 1))
    for start in range(0, rows[axis], step):
        yield (*(slice(None),) * axis, slice(start, start + step))
