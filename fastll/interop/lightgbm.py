"""Objectives and metrics for LightGBM, from version 4.3 on.

An objective is called as ``(preds, train_data)`` where it is ``params["objective"]``, and as
``(y_true, y_pred, weight)`` by the estimators in the style of scikit-learn. Each of them takes it as it
is. Gradient and Hessian are float32 NumPy arrays in the shape and memory layout of the predictions
(Fortran's where there are several classes), so that LightGBM copies nothing.

**The same start.** LightGBM starts its own objectives from the average (``boost_from_average``), but
those of a user from 0. For the same start, give the `Dataset` an ``init_score``: one number per row,
or one per row and class. It is the logarithm of the odds of the mean label for `Binary`, of the share
of each class for `Softmax`, of the mean label for `Poisson`. Predictions are raw scores, to which it
has to be added: ``fastll.softmax(booster.predict(X) + init)``.

**Metrics** take raw scores, which is what LightGBM hands them where the objective is one's own. They
have the names of the built-in ones, and say that they are to be minimised. LGBMClassifier also
evaluates a metric of its own, which takes raw scores for probabilities: ``metric="None"`` prevents it.

Examples
--------
>>> import lightgbm
>>> import numpy as np
>>> import fastll
>>> from fastll.interop.lightgbm import Softmax, multi_logloss
>>> X = np.arange(60.0).reshape(60, 1)
>>> data = lightgbm.Dataset(X, np.arange(60) // 20)
>>> parameters = {"objective": Softmax(), "num_class": 3, "min_data_in_leaf": 5, "verbose": -1}
>>> found = {}
>>> booster = lightgbm.train(
...     parameters, data, 20, valid_sets=[data], valid_names=["train"], feval=multi_logloss,
...     callbacks=[lightgbm.record_evaluation(found)],
... )
>>> fastll.softmax(booster.predict(X)).argmax(axis=1)[::10]
array([0, 0, 1, 1, 2, 2])
>>> bool(found["train"]["multi_logloss"][-1] < found["train"]["multi_logloss"][0])
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastll.interop import _boosting, require

require("lightgbm", "4.3")

Told = tuple[str, float, bool]


@dataclass(frozen=True)
class Binary(_boosting.Logistic):
    r"""Binary cross-entropy, as ``"binary"``.

    For a raw score x with label y and weight w, with :math:`p = 1 / (1 + e^{-x})`:

    .. math:: g = w (p - y), \quad h = w p (1 - p)

    Called with predictions and a `Dataset`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows,).

    Raises
    ------
    ValueError
        If a label is outside [0, 1], or shapes do not match.

    Examples
    --------
    >>> from fastll.interop.lightgbm import Binary
    >>> Binary()([0, 1], [0.0, 0.0])
    (array([ 0.5, -0.5], dtype=float32), array([0.25, 0.25], dtype=float32))
    """


@dataclass(frozen=True)
class Softmax(_boosting.Softmax):
    r"""Cross-entropy of K classes, as ``"multiclass"``.

    For a row of raw scores x with label y and weight w, with :math:`p = \mathrm{softmax}(x)`:

    .. math:: g_k = w (p_k - [k = y]), \quad h_k = w \frac{K}{K - 1} p_k (1 - p_k)

    Called with predictions and a `Dataset`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows, K).

    Parameters
    ----------
    hessian : {"scaled", "exact", "doubled", "residual"}
        "scaled" is LightGBM's rule, with the factor of Friedman's update of the leaves. "exact" is the
        diagonal of the Hessian, :math:`p (1 - p)`, and "doubled" XGBoost's bound, :math:`2 p (1 - p)`.
        "residual" is :math:`|p_k - [k = y]|`, which stays away from 0 where the model is wrong.

    Raises
    ------
    IndexError
        If a label is outside [0, K).
    ValueError
        If a label is not an integer, or shapes do not match.

    References
    ----------
    Friedman, "Greedy function approximation: a gradient boosting machine", Annals of Statistics 2001.

    Examples
    --------
    >>> from fastll.interop.lightgbm import Softmax
    >>> grad, hess = Softmax()([1], [[0.0, 0.0]])
    >>> grad, hess
    (array([[ 0.5, -0.5]], dtype=float32), array([[0.5, 0.5]], dtype=float32))
    """

    hessian: _boosting.Hessian = "scaled"


@dataclass(frozen=True)
class Poisson(_boosting.Poisson):
    r"""Poisson negative log-likelihood, as ``"poisson"``.

    For a raw score x, the logarithm of the rate, with count y, weight w and :math:`\delta` =
    `max_delta_step`:

    .. math:: g = w (e^x - y), \quad h = w e^{x + \delta}

    Called with predictions and a `Dataset`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows,).

    Parameters
    ----------
    max_delta_step : float
        At least 0; LightGBM's ``poisson_max_delta_step``.

    Raises
    ------
    ValueError
        If a label is negative or not finite, or shapes do not match.

    Examples
    --------
    >>> from fastll.interop.lightgbm import Poisson
    >>> Poisson(max_delta_step=0)([0, 3], [0.0, 0.0])
    (array([ 1., -2.], dtype=float32), array([1., 1.], dtype=float32))
    """


def binary_logloss(first: Any, second: Any, weight: Any = None) -> Told:
    """Mean binary cross-entropy of raw scores; probabilities are not clipped.

    Parameters
    ----------
    first, second
        Raw scores of shape (rows,) and a `Dataset`, or labels and raw scores.
    weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("binary_logloss", value, False)``: lower values are better.

    Raises
    ------
    ValueError
        As for `Binary`.

    Examples
    --------
    >>> from fastll.interop.lightgbm import binary_logloss
    >>> binary_logloss([1, 0], [0.0, -40.0])
    ('binary_logloss', 0.34657359027997264, False)
    """
    return _told("binary_logloss", _boosting.logistic_loss, first, second, weight)


def multi_logloss(first: Any, second: Any, weight: Any = None) -> Told:
    """Mean cross-entropy of raw scores; probabilities are not clipped.

    Parameters
    ----------
    first, second
        Raw scores of shape (rows, K) and a `Dataset`, or labels and raw scores.
    weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("multi_logloss", value, False)``: lower values are better.

    Raises
    ------
    IndexError, ValueError
        As for `Softmax`.

    Examples
    --------
    >>> from fastll.interop.lightgbm import multi_logloss
    >>> multi_logloss([1, 0], [[0.0, 0.0], [0.0, 0.0]])
    ('multi_logloss', 0.6931471805599453, False)
    """
    return _told("multi_logloss", _boosting.softmax_loss, first, second, weight)


def poisson_nll(first: Any, second: Any, weight: Any = None) -> Told:
    r"""Mean Poisson negative log-likelihood, :math:`e^x - y x`, of raw scores x with counts y.

    As in LightGBM, the term of y alone is left out.

    Parameters
    ----------
    first, second
        Raw scores of shape (rows,) and a `Dataset`, or labels and raw scores.
    weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("poisson", value, False)``: lower values are better.

    Raises
    ------
    ValueError
        As for `Poisson`.

    Examples
    --------
    >>> from fastll.interop.lightgbm import poisson_nll
    >>> poisson_nll([0, 2], [0.0, 0.0])
    ('poisson', 1.0, False)
    """
    return _told("poisson", _boosting.poisson_loss, first, second, weight)


def _told(name: str, loss: _boosting.Loss, first: Any, second: Any, weight: Any) -> Told:
    return name, loss(*_boosting.taken(first, second, weight)), False
