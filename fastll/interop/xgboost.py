"""Objectives and metrics for XGBoost, from version 2.1 on.

An objective is called as ``obj(predt, dtrain)`` by `xgboost.train` and as ``(y_true, y_pred)``, with
``sample_weight`` if there are any, by the estimators in the style of scikit-learn. Each of them takes
it as it is. Gradient and Hessian are float32 NumPy arrays in the shape of the predictions.

**The same start.** Name the built-in objective in the parameters too: predictions are then
probabilities or rates. XGBoost estimates no intercept for an objective of one's own, but starts from
`base_score`, 0.5 by default: a probability, for ``"multi:softprob"`` a margin of all classes, for
``"count:poisson"`` a rate. Set it to the mean label, or to what the built-in objective has estimated
(``booster.save_config()`` has it). The estimators in the style of scikit-learn name an objective
themselves. That of XGBRegressor has no transformation: its `base_score` is a margin, and so are its
predictions.

**Metrics** take margins, which is what XGBoost hands them where the objective is one's own. They have
the names of the built-in ones, and are minimised. XGBoost also evaluates the default metric of the
objective named in the parameters, unless ``disable_default_eval_metric=True``.

Examples
--------
>>> import numpy as np
>>> import xgboost
>>> from fastll.interop.xgboost import Softmax, mlogloss
>>> X = np.arange(60, dtype=np.float32).reshape(60, 1)
>>> data = xgboost.DMatrix(X, np.arange(60) // 20)
>>> parameters = {"objective": "multi:softprob", "num_class": 3, "disable_default_eval_metric": True}
>>> found = {}
>>> booster = xgboost.train(
...     parameters, data, 20, obj=Softmax(), custom_metric=mlogloss,
...     evals=[(data, "train")], evals_result=found, verbose_eval=False,
... )
>>> booster.predict(data).argmax(axis=1)[::10]
array([0, 0, 1, 1, 2, 2])
>>> found["train"]["mlogloss"][-1] < found["train"]["mlogloss"][0]
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastll.arrays import Array
from fastll.interop import _boosting, require

require("xgboost", "2.1")

#: The least Hessian of XGBoost's own objectives.
_FLOOR = 1e-16


@dataclass(frozen=True)
class BinaryLogistic(_boosting.Logistic):
    r"""Binary cross-entropy, as ``"binary:logistic"``.

    For a margin x with label y and weight w, with :math:`p = 1 / (1 + e^{-x})`:

    .. math:: g = w (p - y), \quad h = w \max(p (1 - p), 10^{-16})

    Called with predictions and a `DMatrix`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows,).

    Raises
    ------
    ValueError
        If a label is outside [0, 1], or shapes do not match.

    Examples
    --------
    >>> from fastll.interop.xgboost import BinaryLogistic
    >>> BinaryLogistic()([0, 1], [0.0, 0.0])
    (array([ 0.5, -0.5], dtype=float32), array([0.25, 0.25], dtype=float32))
    """

    floor: ClassVar[float] = _FLOOR


@dataclass(frozen=True)
class Softmax(_boosting.Softmax):
    r"""Cross-entropy of K classes, as ``"multi:softprob"``.

    For a row of margins x with label y and weight w, with :math:`p = \mathrm{softmax}(x)`:

    .. math:: g_k = w (p_k - [k = y]), \quad h_k = w \max(2 p_k (1 - p_k), 10^{-16})

    Called with predictions and a `DMatrix`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows, K).

    Parameters
    ----------
    hessian : {"doubled", "exact", "scaled", "residual"}
        "doubled" is XGBoost's rule up to version 3.2, :math:`2 p (1 - p)`: a bound on the Hessian that
        makes trees of all classes in one round safe. "exact" is its diagonal, :math:`p (1 - p)`, and
        "scaled" LightGBM's :math:`\frac{K}{K - 1} p (1 - p)`. "residual", the rule of later versions,
        is :math:`|p_k - [k = y]|`, which stays away from 0 where the model is wrong.

    Raises
    ------
    IndexError
        If a label is outside [0, K).
    ValueError
        If a label is not an integer, or shapes do not match.

    References
    ----------
    Chen et al., "Efficient second-order gradient boosting for conditional random fields", AISTATS 2015,
    for the bound.

    Examples
    --------
    >>> from fastll.interop.xgboost import Softmax
    >>> grad, hess = Softmax()([1], [[0.0, 0.0]])
    >>> grad, hess
    (array([[ 0.5, -0.5]], dtype=float32), array([[0.5, 0.5]], dtype=float32))
    """

    hessian: _boosting.Hessian = "doubled"
    floor: ClassVar[float] = _FLOOR


@dataclass(frozen=True)
class Poisson(_boosting.Poisson):
    r"""Poisson negative log-likelihood, as ``"count:poisson"``.

    For a margin x, the logarithm of the rate, with count y, weight w and :math:`\delta` =
    `max_delta_step`:

    .. math:: g = w (e^x - y), \quad h = w e^{x + \delta}

    Called with predictions and a `DMatrix`, or with labels, predictions and weights, it returns
    ``(grad, hess)``, float32 of shape (rows,).

    Parameters
    ----------
    max_delta_step : float
        At least 0. For ``"count:poisson"``, XGBoost also limits leaves by its parameter of this name,
        0.7 by default. With this objective, set it in the parameters too.

    Raises
    ------
    ValueError
        If a label is negative or not finite, or shapes do not match.

    Examples
    --------
    >>> from fastll.interop.xgboost import Poisson
    >>> Poisson(max_delta_step=0)([0, 3], [0.0, 0.0])
    (array([ 1., -2.], dtype=float32), array([1., 1.], dtype=float32))
    """


def logloss(first: Any, second: Any, sample_weight: Any = None) -> Any:
    """Mean binary cross-entropy of margins; probabilities are not clipped.

    Parameters
    ----------
    first, second
        Margins of shape (rows,) and a `DMatrix`, or labels and margins.
    sample_weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("logloss", value)`` in the first form, the value in the second.

    Raises
    ------
    ValueError
        As for `BinaryLogistic`.

    Examples
    --------
    >>> from fastll.interop.xgboost import logloss
    >>> logloss([1, 0], [0.0, -40.0])
    0.34657359027997264
    """
    return _returned("logloss", _boosting.logistic_loss, first, second, sample_weight)


def mlogloss(first: Any, second: Any, sample_weight: Any = None) -> Any:
    """Mean cross-entropy of margins; probabilities are not clipped.

    Parameters
    ----------
    first, second
        Margins of shape (rows, K) and a `DMatrix`, or labels and margins.
    sample_weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("mlogloss", value)`` in the first form, the value in the second.

    Raises
    ------
    IndexError, ValueError
        As for `Softmax`.

    Examples
    --------
    >>> from fastll.interop.xgboost import mlogloss
    >>> mlogloss([1, 0], [[0.0, 0.0], [0.0, 0.0]])
    0.6931471805599453
    """
    return _returned("mlogloss", _boosting.softmax_loss, first, second, sample_weight)


def poisson_nloglik(first: Any, second: Any, sample_weight: Any = None) -> Any:
    r"""Mean Poisson negative log-likelihood, :math:`e^x - y x + \log y!`, of margins x with counts y.

    Parameters
    ----------
    first, second
        Margins of shape (rows,) and a `DMatrix`, or labels and margins.
    sample_weight : array_like, optional
        In the second form.

    Returns
    -------
    ``("poisson-nloglik", value)`` in the first form, the value in the second.

    Raises
    ------
    ValueError
        As for `Poisson`.

    Examples
    --------
    >>> from fastll.interop.xgboost import poisson_nloglik
    >>> poisson_nloglik([0, 2], [0.0, 0.0])
    1.3465735902799727
    """
    return _returned("poisson-nloglik", _poisson, first, second, sample_weight)


poisson_nloglik.__name__ = "poisson-nloglik"  # where XGBoost reads the name in the second form


def _poisson(scores: Array, labels: Array, weight: Array | None) -> float:
    from scipy.special import gammaln  # XGBoost requires it

    constant = _boosting.mean(gammaln(labels.astype(np.float64) + 1), weight)
    return _boosting.poisson_loss(scores, labels, weight) + constant


def _returned(name: str, loss: _boosting.Loss, first: Any, second: Any, sample_weight: Any) -> Any:
    value = loss(*_boosting.taken(first, second, sample_weight))
    return (name, value) if hasattr(second, "get_label") else value
