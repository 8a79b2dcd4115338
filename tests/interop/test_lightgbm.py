"""Objectives and metrics for LightGBM: the formulas, the trees of the built-in ones, early stopping."""

import pickle

import numpy as np
import pytest
from boosting import EPS32, data, logistic, poisson, softmax

lightgbm = pytest.importorskip("lightgbm", reason="lightgbm is not installed")

import fastll  # noqa: E402
from fastll.interop.lightgbm import (  # noqa: E402
    Binary,
    Poisson,
    Softmax,
    binary_logloss,
    multi_logloss,
    poisson_nll,
)

#: Objective, metric, and the parameters of the built-in ones.
KINDS = {
    "logistic": (Binary(), binary_logloss, {"objective": "binary"}),
    "softmax": (Softmax(), multi_logloss, {"objective": "multiclass", "num_class": 4}),
    "poisson": (Poisson(), poisson_nll, {"objective": "poisson"}),
}
COMMON = {"num_leaves": 6, "num_threads": 1, "verbose": -1, "seed": 0}
ROUNDS = 10

#: Derivatives of float64 scores, rounded to float32: half an ulp, and 2**-29 of it for all the rest.
ROUNDING = 0.5001 * EPS32


@pytest.mark.parametrize("hessian", ["scaled", "exact", "doubled", "residual"])
def test_softmax(rng, hessian):
    """In Fortran's order, as LightGBM has it, over several blocks."""
    scores = np.asfortranarray((5 * rng.standard_normal((30011, 7))).clip(-8, 8))
    labels = rng.integers(0, 7, 30011)
    found = Softmax(hessian)(labels, scores)
    for derivative, expected in zip(found, softmax(scores, labels, hessian), strict=True):
        assert derivative.dtype == np.float32
        assert derivative.flags.f_contiguous
        # the expected 1 - p has an error of 2**-53, absolutely; p (1 - p) is above 2**-28
        np.testing.assert_allclose(derivative, expected, rtol=ROUNDING, atol=0)


def test_logistic_and_poisson(rng):
    scores, labels = rng.uniform(-8, 8, 70001), rng.integers(0, 2, 70001)
    for found, expected in (
        (Binary()(labels, scores), logistic(scores, labels)),
        (Poisson(0.3)(3 * labels, scores), poisson(scores, 3 * labels, 0.3)),
    ):
        for derivative, wanted in zip(found, expected, strict=True):
            assert derivative.dtype == np.float32
            np.testing.assert_allclose(derivative, wanted, rtol=ROUNDING, atol=2.0**-49)  # of rate - y


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_and_weights(rng, kind):
    objective, metric, _ = KINDS[kind]
    x, y, w = data(kind)
    w = w.astype(np.float32)
    scores = np.asfortranarray(rng.standard_normal((len(y), 4) if kind == "softmax" else len(y)))
    plain, weighted = (lightgbm.Dataset(x, y, weight=by).construct() for by in (None, w))
    once = objective(scores, plain)
    found = objective(scores, weighted)
    for derivative, same, single in zip(found, objective(y, scores, w), once, strict=True):
        np.testing.assert_array_equal(derivative, same)
        # one is rounded after the product, the other before and after
        np.testing.assert_allclose(derivative.T, single.T * w, rtol=1.5 * EPS32)
    name, value, higher_is_better = metric(scores, weighted)
    assert not higher_is_better
    assert (name, value, False) == metric(y, scores, w)
    assert metric(scores, plain) == metric(y, scores) != metric(y, scores, w)


def start(kind, y, w):
    """What LightGBM's own objectives start from."""
    mean = np.average(y, weights=w)
    if kind == "softmax":
        shares = np.bincount(y, w, minlength=4) / (len(y) if w is None else w.sum())
        return np.tile(np.log(shares), (len(y), 1))
    return np.full(len(y), np.log(mean) - (np.log1p(-mean) if kind == "logistic" else 0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_the_built_in_objective(kind, weighted):
    """The same trees from the same start; the metric is LightGBM's, and reaches the same value."""
    objective, metric, params = KINDS[kind]
    x, y, w = data(kind)
    w = w.astype(np.float32) if weighted else None
    theirs, ours = {}, {}
    built_in = lightgbm.train(
        COMMON | params,
        train := lightgbm.Dataset(x, y, weight=w),
        ROUNDS,
        valid_sets=[train],
        callbacks=[lightgbm.record_evaluation(theirs)],
    )
    init = start(kind, y, w)
    booster = lightgbm.train(
        COMMON | params | {"objective": objective},
        train := lightgbm.Dataset(x, y, weight=w, init_score=init),
        ROUNDS,
        valid_sets=[train],
        feval=metric,
        callbacks=[lightgbm.record_evaluation(ours)],
    )
    for wanted, tree in zip(
        built_in.dump_model()["tree_info"], booster.dump_model()["tree_info"], strict=True
    ):
        assert _splits(tree["tree_structure"]) == _splits(wanted["tree_structure"])
    # Derivatives differ where a float64 next to a tie is rounded to float32: by EPS32 of values of the
    # order of 1. The Hessian is at least 0.05 per row, leaves are 0.1 of the quotient of the sums, and
    # errors of earlier rounds do not grow.
    bound = ROUNDS * 0.1 * EPS32 / 0.05
    raw = built_in.predict(x, raw_score=True)
    np.testing.assert_allclose(booster.predict(x) + init, raw, rtol=0, atol=bound)
    (name,), (same,) = ours["training"], theirs["training"]
    assert name == same
    # mean gradients are below 2
    np.testing.assert_allclose(ours["training"][name], theirs["training"][name], rtol=0, atol=2 * bound)


def _splits(node):
    """Which features are split where, from the root on."""
    if "leaf_value" in node:
        return []
    below = _splits(node["left_child"]) + _splits(node["right_child"])
    return [(node["split_feature"], node["threshold"]), *below]


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping(kind):
    """At the least value."""
    objective, metric, params = KINDS[kind]
    x, y, _ = data(kind)
    train = lightgbm.Dataset(x[:200], y[:200])
    found = {}
    booster = lightgbm.train(
        COMMON | params | {"objective": objective, "learning_rate": 0.2},
        train,
        60,
        valid_sets=[lightgbm.Dataset(x[200:], y[200:], reference=train)],
        valid_names=["valid"],
        feval=metric,
        callbacks=[lightgbm.early_stopping(3, verbose=False), lightgbm.record_evaluation(found)],
    )
    (values,) = found["valid"].values()
    assert len(values) < 60
    assert booster.best_iteration == np.argmin(values) + 1 == len(values) - 3
    assert min(values) < values[0]


@pytest.mark.filterwarnings("ignore:Cannot compute class", "ignore:The argument 'eval_set'")
@pytest.mark.parametrize("kind", KINDS)
def test_estimators(kind):
    """Estimators take objectives and metrics, pass weights, and can be cloned and pickled."""
    base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    objective, metric, params = KINDS[kind]
    x, y, w = data(kind)
    make = lightgbm.LGBMRegressor if kind == "poisson" else lightgbm.LGBMClassifier
    given = COMMON | {"n_estimators": 4, "boost_from_average": False, "metric": "None"}
    fit = {"sample_weight": w, "eval_set": [(x, y)], "eval_sample_weight": [w], "eval_metric": metric}
    theirs = make(**given, objective=params["objective"]).fit(x, y, sample_weight=w)
    model = base.clone(make(**given, objective=objective)).fit(x, y, **fit)
    raw = model.predict(x, raw_score=True)
    np.testing.assert_allclose(raw, theirs.predict(x, raw_score=True), rtol=0, atol=1e-6)
    (values,) = model.evals_result_["training"].values()
    assert values[-1] == pytest.approx(metric(y, raw, w.astype(np.float32))[1], rel=1e-12)
    again = pickle.loads(pickle.dumps(model))
    assert again.objective == objective
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    if kind == "softmax":
        np.testing.assert_allclose(fastll.softmax(raw), theirs.predict_proba(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "labels", "error", "message"),
    [
        (Softmax(), [0, 4], IndexError, r"label of row 1 is 4.0; expected an integer in \[0, 4\)"),
        (multi_logloss, [0, 0.5], ValueError, r"label of row 1 is 0.5; expected an integer"),
        (Binary(), [0, 2], ValueError, r"label of row 1 is 2.0; expected a number in \[0, 1\]"),
        (poisson_nll, [0, -1], ValueError, r"label of row 1 is -1.0; expected a finite number of at"),
    ],
)
def test_bad_labels_of_a_data_set(call, labels, error, message):
    """The messages are those of the adapter for XGBoost; here, labels come as LightGBM keeps them."""
    train = lightgbm.Dataset(np.arange(2.0).reshape(2, 1), labels, params={"verbose": -1}).construct()
    scores = np.zeros((2, 4) if call in (Softmax(), multi_logloss) else 2)
    with pytest.raises(error, match=message):
        call(scores, train)
