"""Objectives and metrics for XGBoost: the formulas, the trees of the built-in ones, early stopping."""

import json
import pickle

import numpy as np
import pytest
from boosting import EPS32, data, logistic, poisson, softmax

xgboost = pytest.importorskip("xgboost", reason="xgboost is not installed")

from fastll.interop.xgboost import (  # noqa: E402
    BinaryLogistic,
    Poisson,
    Softmax,
    logloss,
    mlogloss,
    poisson_nloglik,
)

#: Objective, metric, and the parameters of the built-in ones, which all start from equal margins.
KINDS = {
    "logistic": (BinaryLogistic(), logloss, {"objective": "binary:logistic", "base_score": 0.5}),
    "softmax": (Softmax(), mlogloss, {"objective": "multi:softprob", "num_class": 4, "base_score": 0}),
    "poisson": (
        Poisson(),
        poisson_nloglik,
        {"objective": "count:poisson", "base_score": 1.0, "max_delta_step": 0.7},
    ),
}
COMMON = {"max_depth": 3, "nthread": 1, "seed": 0}
ROUNDS = 10
#: XGBoost prints the value of a user's metric, and reads it again.
SIX_DIGITS = 5e-7

#: A score of magnitude up to 16 has a rounding error of 8 EPS32 (half an ulp of 16) once the maximum
#: is subtracted; so has its exponential, relatively, to which the sum, the quotient and the kernel add
#: less than as much. The Hessian has twice that; 1 - p is off by a few roundings, absolutely.
GRADIENT, HESSIAN, ABSOLUTE = 16 * EPS32, 32 * EPS32, 4 * EPS32


def close(found, expected, rtol):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=ABSOLUTE)


@pytest.mark.parametrize("hessian", ["doubled", "exact", "scaled", "residual"])
def test_softmax(rng, hessian):
    scores = (5 * rng.standard_normal((30011, 7))).clip(-8, 8).astype(np.float32)  # several blocks
    labels = rng.integers(0, 7, 30011)
    grad, hess = Softmax(hessian)(labels, scores)
    expected = softmax(scores, labels, hessian)
    close(grad, expected[0], GRADIENT)
    close(hess, expected[1], HESSIAN)
    assert grad.shape == hess.shape == scores.shape


def test_logistic(rng):
    scores = rng.uniform(-16, 16, 70001).astype(np.float32)
    labels = np.where(rng.random(70001) < 0.2, rng.random(70001), rng.random(70001) < 0.5)
    for found, expected, rtol in zip(
        BinaryLogistic()(labels, scores), logistic(scores, labels), (GRADIENT, HESSIAN), strict=True
    ):
        close(found, expected, rtol)


def test_poisson(rng):
    """The Hessian keeps its digits where the count is much larger than the rate."""
    scores = rng.uniform(-16, 5, 70001).astype(np.float32)
    labels = rng.poisson(3, 70001) * 1000
    grad, hess = Poisson(0.3)(labels, scores)
    expected = poisson(scores, labels, 0.3)
    close(grad, expected[0], GRADIENT)
    np.testing.assert_allclose(hess, expected[1], rtol=HESSIAN)


def test_certain_rows_keep_their_digits():
    """Where p rounds to 1, derivatives at the label are those of 1 - p; Hessians end at the floor."""
    other = np.exp(-30.0)
    grad, hess = Softmax("exact")([0], np.array([[30, 0]], np.float32))
    np.testing.assert_allclose(grad, [[-other, other]], rtol=GRADIENT)
    np.testing.assert_allclose(hess, [[other, other]], rtol=HESSIAN)
    grad, hess = BinaryLogistic()([1, 0], np.array([30, -30], np.float32))
    np.testing.assert_allclose(grad, [-other, other], rtol=GRADIENT)
    np.testing.assert_allclose(hess, [other, other], rtol=HESSIAN)
    for objective, scores in ((Softmax(), [[100.0, 0]]), (BinaryLogistic(), [-100.0])):
        assert set(objective([0], scores)[1].flat) == {np.float32(1e-16)}


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_and_weights(rng, kind):
    objective, metric, _ = KINDS[kind]
    x, y, w = data(kind)
    w = w.astype(np.float32)
    scores = rng.standard_normal((len(y), 4) if kind == "softmax" else len(y), np.float32)
    plain, weighted = xgboost.DMatrix(x, y), xgboost.DMatrix(x, y, weight=w)
    once = objective(scores, plain)
    found = objective(scores, weighted)
    for derivative, same, single in zip(found, objective(y, scores, w), once, strict=True):
        np.testing.assert_array_equal(derivative, same)
        np.testing.assert_array_equal(derivative.T, single.T * w)
    name, value = metric(scores, weighted)
    assert name == metric.__name__
    assert value == metric(y, scores, sample_weight=w)
    # a row twice is a row of weight 2, up to the rounding of float32 values
    times = 1 + (y == 1)
    repeated = metric(np.repeat(y, times), np.repeat(scores, times, axis=0))
    assert metric(y, scores, times) == pytest.approx(repeated, rel=EPS32)


def structure(booster):
    """What each tree splits where, and its leaves."""
    splits, leaves = [], []

    def walk(node):
        if "leaf" in node:
            leaves.append(node["leaf"])
        else:
            splits.append((node["split"], node["split_condition"]))
            for child in node["children"]:
                walk(child)

    for tree in booster.get_dump(dump_format="json"):
        walk(json.loads(tree))
        splits.append("end")
    return splits, leaves


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_the_built_in_objective(kind, weighted):
    """The same trees; the metric of fastll is that of XGBoost, and reaches the same value."""
    objective, metric, params = KINDS[kind]
    x, y, w = data(kind)
    train = xgboost.DMatrix(x, y, weight=w if weighted else None)
    run = {"evals": [(train, "train")], "verbose_eval": False}
    theirs, ours = {}, {}
    built_in = xgboost.train(COMMON | params, train, ROUNDS, evals_result=theirs, **run)
    booster = xgboost.train(
        COMMON | params | {"disable_default_eval_metric": True},
        train,
        ROUNDS,
        obj=objective,
        custom_metric=metric,
        evals_result=ours,
        **run,
    )
    (expected_splits, expected), (splits, leaves) = structure(built_in), structure(booster)
    assert splits == expected_splits
    # Margins stay below 4, so that both round gradients (of the order of 1) by up to 4 EPS32, and the
    # Hessian is at least 0.04 per row. A leaf is 0.3 times the quotient of their sums. Errors of
    # earlier rounds do not grow, as leaves step towards the minimum: margins are off by ten leaves.
    leaf = 0.3 * 4 * EPS32 / 0.04
    np.testing.assert_allclose(leaves, expected, rtol=0, atol=leaf)
    # the mean loss changes by less than 2 times as much, and XGBoost keeps 6 digits of ours
    (name,), (same,) = ours["train"], theirs["train"]
    assert name == same
    bound = 2 * ROUNDS * leaf
    assert ours["train"][name] == pytest.approx(theirs["train"][name], abs=bound + SIX_DIGITS, rel=0)
    np.testing.assert_allclose(booster.predict(train), built_in.predict(train), rtol=bound)


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping(kind):
    """At the least value, in both forms, where the built-in metric stops too."""
    objective, metric, params = KINDS[kind]
    x, y, _ = data(kind)
    train, valid = xgboost.DMatrix(x[:200], y[:200]), xgboost.DMatrix(x[200:], y[200:])
    found = {}
    booster = xgboost.train(
        COMMON | params | {"disable_default_eval_metric": True, "eta": 0.6},
        train,
        60,
        obj=objective,
        custom_metric=metric,
        evals=[(valid, "valid")],
        evals_result=found,
        early_stopping_rounds=3,
        verbose_eval=False,
    )
    values = found["valid"][metric.__name__]
    assert len(values) < 60
    assert booster.best_iteration == np.argmin(values) == len(values) - 4
    assert booster.best_score == min(values) < values[0]


@pytest.mark.parametrize("kind", KINDS)
def test_estimators(kind):
    """Estimators take objectives and metrics, pass weights, and can be cloned and pickled."""
    base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    objective, metric, params = KINDS[kind]
    x, y, w = data(kind)
    make = xgboost.XGBRegressor if kind == "poisson" else xgboost.XGBClassifier
    given = COMMON | params | {"n_estimators": 4}
    given.pop("num_class", None)
    theirs = make(**given).fit(x, y, sample_weight=w)
    given |= {"objective": objective, "eval_metric": metric, "disable_default_eval_metric": True}
    if kind == "poisson":
        given["base_score"] = 0.0  # XGBRegressor takes it for a margin here
    model = base.clone(make(**given)).fit(
        x, y, sample_weight=w, eval_set=[(x, y)], sample_weight_eval_set=[w], verbose=False
    )
    (values,) = model.evals_result()["validation_0"].values()
    margins = model.predict(x, output_margin=True)
    weighted = metric(y, margins, sample_weight=w.astype(np.float32))
    assert values[-1] == pytest.approx(weighted, abs=SIX_DIGITS)
    assert structure(model.get_booster())[0] == structure(theirs.get_booster())[0]
    again = pickle.loads(pickle.dumps(model))
    assert again.objective == objective
    np.testing.assert_array_equal(again.predict(x), model.predict(x))


@pytest.mark.parametrize(
    ("call", "labels", "error", "message"),
    [
        (Softmax(), [0, 4, 1], IndexError, r"label of row 1 is 4; expected an integer in \[0, 4\)"),
        (Softmax(), [0, 1, -100], IndexError, r"label of row 2 is -100; expected an integer in"),
        (Softmax(), [0, 0.5, 1], ValueError, r"label of row 1 is 0.5; expected an integer"),
        (mlogloss, [0, np.nan, 1], ValueError, r"label of row 1 is nan; expected an integer"),
        (Softmax(), [0, 1], ValueError, r"labels have the shape \(2,\); expected \(3,\)"),
        (BinaryLogistic(), [0, 1, 2], ValueError, r"label of row 2 is 2; expected a number in"),
        (logloss, [0, np.nan, 1], ValueError, r"label of row 1 is nan; expected a number in \[0, 1\]"),
        (Poisson(), [0, -1, 1], ValueError, r"label of row 1 is -1; expected a finite number of at"),
        (poisson_nloglik, [np.inf, 0, 1], ValueError, r"label of row 0 is inf; expected a finite"),
    ],
)
def test_bad_labels(call, labels, error, message):
    scores = np.zeros((3, 4) if call in (Softmax(), mlogloss) else 3, np.float32)
    with pytest.raises(error, match=message):
        call(labels, scores)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"scores have the shape \(2,\); .*set num_class"):
        Softmax()([0, 1], [0.0, 1.0])
    for call in (BinaryLogistic(), Poisson(), logloss, poisson_nloglik):
        with pytest.raises(ValueError, match=r"scores have the shape \(1, 2\); expected \(rows,\)"):
            call([0], [[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"sample_weight has the shape \(1,\); expected \(2,\)"):
        Poisson()([0, 1], [0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match=r"hessian is 'double'; expected one of \('exact', 'doubled'"):
        Softmax("double")
    with pytest.raises(ValueError, match=r"max_delta_step is -1; expected a number of at least 0"):
        Poisson(-1)
