"""Losses of gradient boosting: gradient, diagonal of the Hessian, and value.

The adapters for boosting frameworks add names, defaults and the form in which a metric is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from fastll import binary_cross_entropy_with_logits, cross_entropy, poisson_nll
from fastll.api import number
from fastll.arrays import Array

Hessian = Literal["exact", "doubled", "scaled", "residual"]

#: Elements of a block. Its arrays stay in the cache until the Hessian has been made of the gradient.
BLOCK = 1 << 17


def taken(first: Any, second: Any, sample_weight: Any) -> tuple[Array, Array, Array | None]:
    """Scores, labels and weights, as arrays, of a call in either form.

    The native form is (scores, data set), the form of scikit-learn (labels, scores, weights).
    """
    if hasattr(second, "get_label"):
        scores, labels, sample_weight = first, second.get_label(), second.get_weight()
    else:
        scores, labels = second, first
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    rows = scores.shape[:1]
    if labels.shape != rows:
        raise ValueError(f"labels have the shape {labels.shape}; expected {rows}, those of the scores")
    weight = None if sample_weight is None else np.asarray(sample_weight)
    if weight is None or (weight.size == 0 and rows != (0,)):  # XGBoost, where there are none
        return scores, labels, None
    if weight.shape != rows:
        raise ValueError(f"sample_weight has the shape {weight.shape}; expected {rows}, one per row")
    return scores, labels, weight


def check(labels: Array, good: Array, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise an error that names the first label that is not good."""
    if not good.all():
        row = int(np.argmin(good))
        raise error(f"the label of row {row} is {labels[row]}; expected {expected}")


def check_one_score(scores: Array) -> None:
    if scores.ndim != 1:
        raise ValueError(f"scores have the shape {scores.shape}; expected (rows,)")


def check_probabilities(labels: Array) -> None:
    check(labels, (labels >= 0) & (labels <= 1), "a number in [0, 1]")


def check_counts(labels: Array) -> None:
    check(labels, (labels >= 0) & (labels < math.inf), "a finite number of at least 0")


def class_labels(scores: Array, labels: Array) -> Array:
    """Labels as integers; frameworks keep them as floats. There is none for rows to be ignored."""
    if scores.ndim != 2:
        raise ValueError(
            f"scores have the shape {scores.shape}; expected (rows, classes): set num_class"
        )
    with np.errstate(invalid="ignore"):
        found = labels.astype(np.int64)
    check(labels, found == labels, "an integer")
    classes = scores.shape[1]
    check(labels, (found >= 0) & (found < classes), f"an integer in [0, {classes})", IndexError)
    return found


class Objective:
    """A loss of scores, to be called as frameworks call objectives."""

    floor: ClassVar[float] = 0.0  # the least Hessian

    def __call__(self, first: Any, second: Any, sample_weight: Any = None) -> tuple[Array, Array]:
        """Gradient and diagonal of the Hessian: float32, in shape and memory layout of the scores."""
        scores, labels, weight = taken(first, second, sample_weight)
        labels = self.checked(scores, labels)
        if weight is not None:
            weight = weight.reshape(-1, *(1,) * (scores.ndim - 1))
        grad = np.empty_like(scores, dtype=np.float32)
        hess = np.empty_like(grad)
        direct = weight is None and scores.dtype == grad.dtype
        step = max(1, BLOCK // max(1, math.prod(scores.shape[1:])))
        g, h, spare = (np.empty_like(scores[:step]) for _ in range(3))
        for start in range(0, len(scores), step):
            rows = slice(start, min(start + step, len(scores)))
            some = slice(0, rows.stop - start)
            slope, curvature = (grad[rows], hess[rows]) if direct else (g[some], h[some])
            self.derivatives(scores[rows], labels[rows], slope, curvature, spare[some])
            if self.floor and curvature.min() < self.floor:  # rare, and np.maximum of a scalar is slow
                np.maximum(curvature, self.floor, out=curvature)
            if not direct:
                w = 1.0 if weight is None else weight[rows]
                np.multiply(slope, w, out=grad[rows])
                np.multiply(curvature, w, out=hess[rows])
        return grad, hess

    def checked(self, scores: Array, labels: Array) -> Array:
        """The labels as `derivatives` takes them."""
        raise NotImplementedError

    def derivatives(self, scores: Array, labels: Array, g: Array, h: Array, spare: Array) -> None:
        """Write gradient and Hessian diagonal of some rows, in their dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Logistic(Objective):
    """Binary cross-entropy of scores (n,) with labels in [0, 1]."""

    def checked(self, scores: Array, labels: Array) -> Array:
        check_one_score(scores)
        check_probabilities(labels)
        return labels.astype(scores.dtype)

    def derivatives(self, scores: Array, labels: Array, g: Array, h: Array, spare: Array) -> None:
        binary_cross_entropy_with_logits(scores, labels, reduction="sum", grad_out=g)
        # p (1 - p) with p = g + y, which for y = 0 and 1 keeps the digits of g where p rounds to 1:
        # g (1 - 2 y - g) + y (1 - y)
        np.subtract(1, labels, out=spare)
        np.subtract(spare, labels, out=h)
        h -= g
        h *= g
        spare *= labels
        h += spare


@dataclass(frozen=True)
class Softmax(Objective):
    """Cross-entropy of scores (n, K) with labels in [0, K)."""

    hessian: Hessian = "exact"

    def __post_init__(self) -> None:
        if self.hessian not in get_args(Hessian):
            raise ValueError(f"hessian is {self.hessian!r}; expected one of {get_args(Hessian)}")

    def checked(self, scores: Array, labels: Array) -> Array:
        return class_labels(scores, labels)

    def derivatives(self, scores: Array, labels: Array, g: Array, h: Array, spare: Array) -> None:
        if scores.flags.f_contiguous:  # of a small one, the transpose is what fastll is quickest with
            cross_entropy(scores.T, labels, axis=0, reduction="sum", grad_out=g.T)
        else:
            cross_entropy(scores, labels, reduction="sum", grad_out=g)
        np.abs(g, out=h)
        if self.hessian == "residual":
            return
        np.subtract(1, h, out=spare)
        h *= spare  # g is p, or p - 1 at the label: p (1 - p) in both cases
        classes = scores.shape[1]
        factor = {"exact": 1.0, "doubled": 2.0, "scaled": classes / max(1, classes - 1)}[self.hessian]
        if factor != 1:
            h *= factor


@dataclass(frozen=True)
class Poisson(Objective):
    """Poisson negative log-likelihood of scores (n,), logarithms of rates, with counts."""

    max_delta_step: float = 0.7

    def __post_init__(self) -> None:
        number(self.max_delta_step, "max_delta_step", 0.0)

    def checked(self, scores: Array, labels: Array) -> Array:
        check_one_score(scores)
        check_counts(labels)
        return labels.astype(scores.dtype)

    def derivatives(self, scores: Array, labels: Array, g: Array, h: Array, spare: Array) -> None:
        # the gradient for counts of 0 is the rate, which g + y would give with the digits of y
        poisson_nll(scores, np.zeros(1, scores.dtype), reduction="sum", grad_out=g)
        np.multiply(g, math.exp(self.max_delta_step), out=h)
        g -= labels


def logistic_loss(scores: Array, labels: Array, weight: Array | None) -> float:
    """Mean binary cross-entropy."""
    check_one_score(scores)
    check_probabilities(labels)
    if weight is None:
        return float(binary_cross_entropy_with_logits(scores, labels))
    total = binary_cross_entropy_with_logits(scores, labels, weight=weight, reduction="sum")
    return float(total / weight.sum(dtype=np.float64))


def softmax_loss(scores: Array, labels: Array, weight: Array | None) -> float:
    """Mean cross-entropy."""
    return float(cross_entropy(scores, class_labels(scores, labels), sample_weight=weight))


def poisson_loss(scores: Array, labels: Array, weight: Array | None) -> float:
    """Mean Poisson negative log-likelihood, without the term that does not depend on the scores."""
    check_one_score(scores)
    check_counts(labels)
    return mean(poisson_nll(scores, labels, reduction="none"), weight)


def mean(values: Array, weight: Array | None) -> float:
    return float(np.average(values.astype(np.float64), weights=weight))


Loss = Callable[[Array, Array, Array | None], float]
