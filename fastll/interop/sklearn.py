"""fastll for scikit-learn: `log_loss`, a scorer made of it, and multinomial logistic regression."""

# ruff: noqa: E402, N803, N806 (scikit-learn's version is checked first; its names of arguments)

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastll.api import number
from fastll.api.elementwise import binary_cross_entropy_with_logits
from fastll.api.losses import cross_entropy, nll_loss
from fastll.api.reductions import log_sigmoid, log_softmax, sigmoid, softmax
from fastll.interop import require

require("scikit-learn", "1.7")

from scipy import optimize, sparse
from sklearn import metrics
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from threadpoolctl import ThreadpoolController

Array = NDArray[Any]

__all__ = ["SoftmaxRegression", "log_loss", "neg_log_loss_scorer"]

#: Labels that are at most so many apart are counted, others are sorted.
_NEAR = 1 << 16
#: Bytes of the rows of a product: they are still in the cache when they are read again.
_BYTES = 1 << 20


def log_loss(
    y_true: ArrayLike,
    y_proba: ArrayLike | None = None,
    *,
    normalize: bool = True,
    sample_weight: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    y_pred: Any = "deprecated",
) -> float:
    r"""`sklearn.metrics.log_loss`: the negative log-likelihood of labels under predicted probabilities.

    .. math:: L = -\sum_i w_i \log p_{i, y_i} \Big/ \sum_i w_i

    where p is clipped to [eps, 1 - eps] of its dtype first. Nothing but the probability of each label
    goes through a logarithm, and no one-hot matrix is made.

    Parameters
    ----------
    y_true : array_like of shape (n_samples,)
        Labels: numbers or strings. An indicator matrix is handed to scikit-learn.
    y_proba : array_like of shape (n_samples, n_classes) or (n_samples,)
        Probabilities of the classes, in their sorted order; one-dimensional ones, or those of one
        column, are of the greater one of two classes.
    normalize : bool
        Return the mean rather than the sum.
    sample_weight : array_like of shape (n_samples,), optional
        Weights of the samples.
    labels : array_like, optional
        All classes; those of `y_true` by default.
    y_pred : array_like, optional
        A former name of `y_proba`, with scikit-learn's warning.

    Returns
    -------
    float
        The loss in nats, computed in float64: for float32 probabilities it is the more accurate one.

    Raises
    ------
    TypeError, ValueError
        What scikit-learn raises: a call that is not right, or that it answers with a warning (of
        probabilities that do not sum to one, or of unsorted `labels`), is handed to it.

    See Also
    --------
    fastll.cross_entropy : of logits, without the probabilities.

    Examples
    --------
    >>> from fastll.interop.sklearn import log_loss
    >>> proba = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
    >>> log_loss(["spam", "ham", "ham", "spam"], proba)
    0.21616187468057912
    """
    if not (isinstance(y_pred, str) and y_pred == "deprecated"):
        if y_proba is not None:
            raise ValueError("both y_pred and y_proba are given; y_pred is the former name of y_proba")
        warnings.warn("y_pred is now called y_proba; use that", FutureWarning, stacklevel=2)
        y_proba = y_pred
    picked = _probabilities_of_labels(y_true, y_proba, labels)
    weight = None if picked is None else _plain_weight(sample_weight, len(picked))
    if picked is None or weight is None or not isinstance(normalize, bool | np.bool_):
        options = {"normalize": normalize, "sample_weight": sample_weight, "labels": labels}
        return float(metrics.log_loss(y_true, y_proba, **options))
    eps = np.finfo(picked.dtype).eps
    log_probs = np.log(np.clip(picked, eps, 1 - eps), dtype=np.float64)
    if sample_weight is None:
        total = -np.sum(log_probs)
        return float(total / len(picked) if normalize else total)
    first = np.zeros(len(picked), np.int64)
    reduction: Any = "mean" if normalize else "sum"
    return float(nll_loss(log_probs[:, None], first, sample_weight=weight, reduction=reduction))


def _probabilities_of_labels(y_true: Any, y_proba: Any, labels: Any) -> Array | None:
    """The probability of each sample's label; None for what is not plain or not right."""
    if sparse.issparse(y_proba) or sparse.issparse(y_true):
        return None
    try:
        p, y = np.asarray(y_proba), np.asarray(y_true)
    except (TypeError, ValueError):  # ragged lists
        return None
    if p.dtype not in (np.float32, np.float64) or y.shape != p.shape[:1] or not y.size:
        return None
    if p.ndim == 2 and p.shape[1] == 1:
        p = p[:, 0]
    binary = p.ndim == 1
    if p.ndim > 2 or not _are_probabilities(p):
        return None
    codes = _codes_of(y, labels, 2 if binary else p.shape[1])
    if codes is None:
        return None
    if binary:
        return np.where(codes == 1, p, 1 - p)
    return p[np.arange(len(p)), codes]


def _are_probabilities(p: Array) -> bool:
    """Whether all are in [0, 1], and rows sum to one as closely as scikit-learn wants it."""
    if p.ndim == 1:
        return bool(p.min() >= 0 and p.max() <= 1)
    one = np.ones(p.shape[1], p.dtype)
    most = 1e-8 + np.sqrt(np.finfo(p.dtype).eps)
    rows = max(1, _BYTES // (p.itemsize * p.shape[1]))
    for start in range(0, len(p), rows):
        part = p[start : start + rows]
        # a NaN or an infinity fails one of these
        if not (part.min() >= 0 and part.max() <= 1 and np.abs(part @ one - 1).max() <= most):
            return False
    return True


def _codes_of(y: Array, labels: Any, count: int) -> Array | None:
    """The position of each label among the sorted classes, of which there must be `count`."""
    if y.dtype.kind == "b":
        y = y.view(np.uint8)
        labels = None if labels is None else np.asarray(labels)
        if labels is not None and labels.dtype.kind != "b":
            return None
    if y.dtype.kind not in "iuUfS" or (y.dtype.kind == "f" and not np.all(y == np.floor(y))):
        return None
    if labels is None:
        return _codes_without_labels(y, count)
    classes = np.asarray(labels)
    if classes.dtype.kind == "b":
        classes = classes.view(np.uint8)
    if classes.dtype.kind in "iu" and y.dtype.kind in "iu" and count > 1:
        least = int(classes[0]) if classes.size else 0
        if np.array_equal(classes, np.arange(least, least + count)):
            if not (least <= y.min() and y.max() < least + count):
                return None
            return _above(y, least)
    alike = classes.dtype.kind == y.dtype.kind or {classes.dtype.kind, y.dtype.kind} <= set("iuf")
    if not alike or classes.shape != (count,) or count < 2 or not np.all(classes[:-1] < classes[1:]):
        return None
    return _found(classes, y)


def _codes_without_labels(y: Array, count: int) -> Array | None:
    if y.dtype.kind in "iu":
        least, most = int(y.min()), int(y.max())
        if most - least <= _NEAR:
            y = _above(y, least)
            there = np.bincount(y) > 0
            codes = np.cumsum(there) - 1
            if codes[-1] + 1 != count or count < 2:
                return None
            return y if len(codes) == count else codes[y]
    classes = np.unique(y)
    if len(classes) != count or count < 2:
        return None
    return _found(classes, y)


def _above(y: Array, least: int) -> Array:
    """Integers less the least one of them, all of which are near it."""
    if y.dtype == np.uint64:
        return (y - np.uint64(least)).astype(np.int64)
    return y.astype(np.int64) - least if least else y.astype(np.int64, copy=False)


def _found(classes: Array, y: Array) -> Array | None:
    """The position of each label, if all are among the classes."""
    codes = np.searchsorted(classes, y)
    codes[codes == len(classes)] = 0
    return codes if np.array_equal(classes[codes], y) else None


def _plain_weight(weight: Any, count: int) -> Array | None:
    """Weights, ones if there are none; None for what is not right."""
    if weight is None:
        return np.ones(1)
    w = np.asarray(weight)
    if w.dtype.kind not in "biuf" or w.shape != (count,):
        return None
    w = w.astype(np.float64, copy=False)
    return w if np.isfinite(w).all() and w.sum() else None


neg_log_loss_scorer = metrics.make_scorer(
    log_loss, greater_is_better=False, response_method="predict_proba"
)
"""A scorer for `cross_val_score`, `GridSearchCV` and their like: ``-log_loss``, as "neg_log_loss"."""


class SoftmaxRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    r"""Multinomial logistic regression with an L2 penalty: ``LogisticRegression(solver="lbfgs")``.

    It minimises

    .. math:: \sum_i w_i L(x_i W^T + b, y_i) + \frac1{2 C} \|W\|^2

    over coefficients W and intercepts b, where L is `fastll.cross_entropy` or, with two classes and one
    row of coefficients, the binary one, and w are sample weights times class weights. SciPy's L-BFGS
    does it, with the options that scikit-learn gives it: results are the same, up to what the
    tolerance leaves open. Products are of some rows at a time, which stay in the cache until their
    gradient has been multiplied too.

    Parameters
    ----------
    C : float
        Inverse of the strength of the penalty; positive, infinity for none.
    fit_intercept : bool
        Whether there are intercepts. They are not penalised.
    class_weight : dict, "balanced" or None
        Weights of the classes, 1 for those that are not in it; "balanced" is
        ``n_samples / (n_classes * counts)``, of weighted counts with `sample_weight`.
    tol : float
        The fit ends when no entry of the gradient, of the mean, is greater.
    max_iter : int
        Number of iterations at most.
    warm_start : bool
        Start from the coefficients of the last fit.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        The labels, sorted.
    coef_ : array of shape (n_classes, n_features), or (1, n_features) of two classes
        Coefficients, in the dtype of the data.
    intercept_ : array of shape (n_classes,) or (1,)
        Intercepts; zeros without `fit_intercept`.
    n_iter_ : array of shape (1,)
        Number of iterations.
    n_features_in_, feature_names_in_
        As of every estimator.

    See Also
    --------
    sklearn.linear_model.LogisticRegression : with other solvers and penalties.

    References
    ----------
    R. H. Byrd, P. Lu, J. Nocedal and C. Zhu, "A limited memory algorithm for bound constrained
    optimization", SIAM Journal on Scientific Computing 16 (1995).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastll.interop.sklearn import SoftmaxRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> model = SoftmaxRegression(max_iter=200).fit(X, y)
    >>> round(model.score(X, y), 3)
    0.973
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        warm_start: bool = False,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit coefficients and intercepts.

        Parameters
        ----------
        X : array_like or sparse matrix of shape (n_samples, n_features)
            float32 or float64, others are converted to float64; sparse ones to CSR.
        y : array_like of shape (n_samples,)
            Labels of at least two classes.
        sample_weight : array_like of shape (n_samples,), or number, optional
            Weights of the samples.

        Returns
        -------
        SoftmaxRegression
            This estimator.

        Raises
        ------
        TypeError, ValueError
            If an argument or a parameter is not right, in scikit-learn's words or in those of fastll.
        """
        inverse = self.C
        if inverse != math.inf:
            inverse = number(inverse, "C", 0.0, above=True)
        number(self.tol, "tol", 0.0)
        number(self.max_iter, "max_iter", 0.0)
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C")
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; expected two or more classes")
        weight = self._weights(X, y, labels, sample_weight)

        rows = 1 if count == 2 else count
        objective = _Objective(X, labels, weight, rows, bool(self.fit_intercept), inverse)
        options = {"maxiter": self.max_iter, "maxls": 50, "gtol": self.tol}
        options["ftol"] = 64 * np.finfo(np.float64).eps
        start = self._start(objective)
        with _blas_of_scipy().limit(limits=1):
            result = optimize.minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
        n_iter = min(result.nit, self.max_iter)
        if result.status != 0:
            warnings.warn(
                f"lbfgs failed to converge after {n_iter} iteration(s) (status={result.status}):\n"
                f"{result.message}\nIncrease max_iter={self.max_iter}, or scale the features",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.n_iter_ = np.array([n_iter], np.int32)
        solution = result.x.astype(X.dtype).reshape(-1, rows)
        self.coef_ = np.ascontiguousarray(solution[: X.shape[1]].T)
        self.intercept_ = solution[-1].copy() if self.fit_intercept else np.zeros(rows, X.dtype)
        return self

    def _weights(self, X: Any, y: Array, labels: Array, sample_weight: Any) -> Array | None:
        """Sample weights times class weights; None if there are neither."""
        weight = None
        if sample_weight is not None:
            if isinstance(sample_weight, Real):
                sample_weight = np.full(len(y), sample_weight)
            weight = check_array(
                sample_weight,
                ensure_2d=False,
                dtype=np.float64,
                input_name="sample_weight",
            )
            if weight.ndim != 1:
                raise ValueError(f"sample_weight has {weight.ndim} dimensions; expected one")
            check_consistent_length(X, weight)
        if self.class_weight is not None:
            # balanced weights of a class whose samples have weight 0 are infinite
            with np.errstate(divide="ignore", invalid="ignore"):
                of_classes = compute_class_weight(
                    self.class_weight, classes=self.classes_, y=y, sample_weight=weight
                )
                weight = of_classes[labels] if weight is None else weight * of_classes[labels]
        if weight is not None and not weight.sum() > 0:
            raise ValueError(f"sample and class weights sum to {weight.sum()}; expected more than zero")
        return weight

    def _start(self, objective: _Objective) -> Array:
        """Coefficients, and below them intercepts, to start from."""
        start = np.zeros(objective.shape)
        if self.warm_start and hasattr(self, "coef_"):
            last = self.coef_.T
            if self.fit_intercept:
                last = np.vstack((last, self.intercept_))
            if last.shape != start.shape:
                raise ValueError(
                    f"the coefficients of the last fit have shape {last.T.shape}, with intercepts; "
                    f"warm_start expected {start.T.shape}"
                )
            start[...] = last
        return start.ravel()

    def decision_function(self, X: Any) -> Array:
        """Logits of the classes; with two classes, those of the second one, of shape (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False)
        logits: Array = X @ self.coef_.T
        logits += self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Any) -> Array:
        """The most probable label of each sample."""
        logits = self.decision_function(X)
        at = (logits > 0).astype(np.intp) if logits.ndim == 1 else logits.argmax(axis=1)
        found: Array = self.classes_[at]
        return found

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes, of shape (n_samples, n_classes)."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.stack((sigmoid(-logits), sigmoid(logits)), axis=1)
        return softmax(logits, out=logits)  # type: ignore[no-any-return]

    def predict_log_proba(self, X: Any) -> Array:
        """Their logarithms, finite where a probability is too small for its dtype."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.stack((log_sigmoid(-logits), log_sigmoid(logits)), axis=1)
        return log_softmax(logits, out=logits)  # type: ignore[no-any-return]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


@cache
def _blas_of_scipy() -> Any:
    """SciPy's BLAS, where it has one of its own, as in wheels: one thread is enough for it here.

    L-BFGS solves systems of 20 equations, for which two threads wait for each other: on two CPUs that
    others use too, a fit of iris took 1.7 s in place of 30 ms.
    """
    every = ThreadpoolController()
    own = [of["filepath"] for of in every.info() if f"{os.sep}scipy" in os.path.dirname(of["filepath"])]
    return every.select(filepath=own)


class _Objective:
    """The penalised mean loss of coefficients (n_features, rows), intercepts below, and its slope."""

    def __init__(
        self,
        X: Any,
        labels: Array,
        weight: Array | None,
        rows: int,
        intercept: bool,
        C: float,
    ) -> None:
        samples, self.features = X.shape
        self.shape = self.features + intercept, rows
        self.X, self.labels, self.weight, self.intercept = X, labels, weight, intercept
        self.total = float(samples if weight is None else weight.sum())
        self.strength = 1 / (C * self.total)
        self.step = samples
        if not sparse.issparse(X):
            self.step = max(1, _BYTES // (X.itemsize * (self.features + rows)))
        self.logits = np.empty((min(self.step, samples), rows), X.dtype)
        self.product = np.empty((self.features, rows), X.dtype)
        self.ones = np.ones(len(self.logits), X.dtype)

    def __call__(self, flat: Array) -> tuple[float, Array]:
        beta = flat.reshape(self.shape)
        coefficients = beta[: self.features]
        w, b = (part.astype(self.X.dtype, copy=False) for part in (coefficients, beta[self.features :]))
        slope, loss = np.zeros(self.shape), 0.0
        for start in range(0, len(self.labels), self.step):
            part = slice(start, start + self.step)
            x, labels = self.X[part], self.labels[part]
            logits = self.logits[: len(labels)]
            if sparse.issparse(x):
                logits[...] = x @ w
            else:
                np.matmul(x, w, out=logits)
            if self.intercept:
                logits += b
            loss += self._losses(logits, labels, None if self.weight is None else self.weight[part])
            if sparse.issparse(x):
                slope[: self.features] += x.T @ logits
            else:
                slope[: self.features] += np.matmul(x.T, logits, out=self.product)
            if self.intercept:
                slope[-1] += self.ones[: len(labels)] @ logits
        slope /= self.total
        slope[: self.features] += self.strength * coefficients
        penalty = self.strength / 2 * np.vdot(coefficients, coefficients)
        return loss / self.total + float(penalty), slope.ravel()

    def _losses(self, logits: Array, labels: Array, weight: Array | None) -> float:
        """The summed losses of some samples, whose logits become gradients."""
        if self.shape[1] == 1:
            logits = logits[:, 0]
            losses = binary_cross_entropy_with_logits(
                logits, labels, weight=weight, reduction="none", grad_out=logits
            )
        else:
            losses = cross_entropy(
                logits, labels, sample_weight=weight, reduction="none", grad_out=logits
            )
        return float(losses.sum(dtype=np.float64))
