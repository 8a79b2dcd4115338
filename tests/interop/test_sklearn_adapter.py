"""fastll.interop.sklearn beside scikit-learn: losses, warnings, errors, coefficients, conventions."""

# ruff: noqa: E402 (scikit-learn may be missing)

import pickle
import warnings

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from scipy import sparse
from sklearn import metrics
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

import fastll
from fastll.interop import sklearn as adapter
from fastll.interop.sklearn import SoftmaxRegression, log_loss, neg_log_loss_scorer

N, K = 200, 5
NAMES = np.array(["ape", "bee", "cat", "dog", "eel"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """scikit-learn's fits are slow where the threads of two BLAS wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def problem(rng):
    p = rng.dirichlet(np.ones(K), N)
    p[0] = np.eye(K)[3]  # clipped
    return p, np.concatenate((np.arange(K), rng.integers(0, K, N - K))), rng.exponential(size=N)


@pytest.fixture
def alone(monkeypatch):
    """Nothing is handed to scikit-learn."""

    def refused(*args, **kwargs):
        raise AssertionError("this call went to scikit-learn")

    monkeypatch.setattr(adapter.metrics, "log_loss", refused)


def assert_close(found, expected, dtype="float64"):
    """A mean or sum of positive terms: the peer adds them in the dtype, in blocks of 128 and pairs of
    these, and rounds each; for float32 twenty roundoffs at most."""
    assert type(found) is float
    np.testing.assert_allclose(found, expected, rtol=20 * np.finfo(dtype).eps)


LABELS = {
    "range": lambda y: y,
    "gaps": lambda y: 10 * y - 7,
    "far": lambda y: y * 2**40 - 2**41,
    "bytes": lambda y: np.array([-128, -1, 0, 3, 127], np.int8)[y],
    "unsigned": lambda y: y.astype(np.uint64) + np.uint64(2**63),
    "floats": lambda y: y + 1.0,
    "strings": lambda y: NAMES[y],
    "objects": lambda y: NAMES.astype(object)[y],
    "list": lambda y: NAMES[y].tolist(),
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_loss(problem, label, dtype):
    p, y, w = problem
    p, y = p.astype(dtype), label(y)
    for given in (
        {},
        {"normalize": False},
        {"sample_weight": w},
        {"sample_weight": w, "normalize": False},
    ):
        assert_close(log_loss(y, p, **given), metrics.log_loss(y, p, **given), dtype)


@pytest.mark.parametrize("label", [LABELS[name] for name in ("range", "gaps", "floats", "strings")])
def test_log_loss_with_labels(problem, label):
    """Some of the classes alone are in y."""
    p, y, w = problem
    classes = np.unique(label(y))
    some = (y == 1) | (y == 2)
    p, y, w = p[some], label(y)[some], w[some]
    for labels in (classes, classes.tolist()):
        expected = metrics.log_loss(y, p, sample_weight=w, labels=labels)
        assert_close(log_loss(y, p, sample_weight=w, labels=labels), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary_log_loss(rng, dtype):
    p, y, w = rng.random(N).astype(dtype), rng.integers(0, 2, N), rng.random(N)
    p[:3] = 0, 1, 0.5
    for labels in (y, y == 1, NAMES[y], 3 - y):
        for q in (p, p[:, None], p.tolist()):
            expected = metrics.log_loss(labels, q, sample_weight=w)
            assert_close(log_loss(labels, q, sample_weight=w), expected, dtype)
    expected = metrics.log_loss(np.ones(N, bool), p, labels=[False, True])
    assert_close(log_loss(np.ones(N, bool), p, labels=[False, True]), expected, dtype)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "name", ["range", "gaps", "far", "bytes", "unsigned", "floats", "strings", "list"]
)
def test_plain_calls_are_fastlls(problem, name):
    p, y, w = problem
    assert log_loss(LABELS[name](y), p.tolist(), sample_weight=w) > 0
    assert log_loss(LABELS[name](y), p, labels=np.unique(LABELS[name](y))) > 0
    assert log_loss(y > 0, p[:, 0]) > 0


def test_indicators(problem):
    p, y, _ = problem
    assert_close(log_loss(np.eye(K, dtype=int)[y], p), metrics.log_loss(np.eye(K, dtype=int)[y], p))


WRONG = {
    "sums": lambda p, y: log_loss(y, 0.9 * p),
    "barely": lambda p, y: log_loss(y, (1 + 1e-7) * p),
    "more": lambda p, y: log_loss(y, p + 1e-9 * (p == 1)),
    "negative": lambda p, y: log_loss(y, p - 1e-9 * (p == 0)),
    "nan": lambda p, y: log_loss(y, np.where(p == 1, np.nan, p)),
    "inf": lambda p, y: log_loss(y, np.where(p == 1, np.inf, p)),
    "classes": lambda p, y: log_loss(y % 4, p),
    "one class": lambda p, y: log_loss(0 * y, p),
    "one label": lambda p, y: log_loss(0 * y, p, labels=[0]),
    "unknown": lambda p, y: log_loss(y, p[:, :2], labels=[0, 1]),
    "too many labels": lambda p, y: log_loss(y, p, labels=range(6)),
    "unsorted": lambda p, y: log_loss(y, p, labels=[4, 3, 2, 1, 0]),
    "lengths": lambda p, y: log_loss(y[1:], p),
    "weights": lambda p, y: log_loss(y, p, sample_weight=np.ones(3)),
    "weights of nan": lambda p, y: log_loss(y, p, sample_weight=np.full(N, np.nan)),
    "no weight": lambda p, y: log_loss(y, p, sample_weight=np.zeros(N)),
    "continuous": lambda p, y: log_loss(y + 0.5, p),
    "normalize": lambda p, y: log_loss(y, p, normalize="yes"),
    "empty": lambda p, y: log_loss([], np.zeros((0, 5))),
    "three axes": lambda p, y: log_loss(y, p[:, :, None]),
    "sparse": lambda p, y: log_loss(y, sparse.csr_array(p)),
    "strings for numbers": lambda p, y: log_loss(NAMES[y], p, labels=range(5)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_warnings_and_errors(problem, monkeypatch, call):
    """As scikit-learn's: the same warnings, the same value, or the same error."""

    def outcome():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = call(*problem[:2])
            except Exception as error:
                result = type(error), str(error)
        return result, [(of.category, str(of.message)) for of in caught]

    ours = outcome()
    monkeypatch.setitem(globals(), "log_loss", metrics.log_loss)
    theirs = outcome()
    assert ours == theirs
    assert isinstance(theirs[0], tuple) or theirs[1]


def test_former_name(problem):
    p, y, _ = problem
    with pytest.warns(FutureWarning, match="y_pred"):
        assert log_loss(y, y_pred=p) == log_loss(y, p)
    with pytest.raises(ValueError, match="both y_pred and y_proba"):
        log_loss(y, p, y_pred=p)


def test_scorer():
    x, y = load_iris(return_X_y=True)
    model = SoftmaxRegression(max_iter=300)
    ours = cross_val_score(model, x, y, scoring=neg_log_loss_scorer)
    np.testing.assert_allclose(ours, cross_val_score(model, x, y, scoring="neg_log_loss"), rtol=1e-13)
    assert (ours < 0).all()
    pickle.loads(pickle.dumps(neg_log_loss_scorer))


# ---- SoftmaxRegression ----


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.SkipTestWarning",
    "ignore::sklearn.exceptions.ConvergenceWarning",
)
@parametrize_with_checks([SoftmaxRegression(), SoftmaxRegression(class_weight="balanced", C=0.5)])
def test_conventions(estimator, check):
    check(estimator)


def digits(dtype="float64", classes=10):
    x, y = load_digits(return_X_y=True)
    kept = y < classes
    return (x[kept] / 16).astype(dtype), y[kept]


def both(*data, **options):
    """Fitted to a gradient of 1e-9 by both."""
    weight = data[2] if len(data) > 2 else None
    options = {"tol": 1e-9, "max_iter": 5000} | options
    ours, theirs = SoftmaxRegression(**options), LogisticRegression(solver="lbfgs", **options)
    return [model.fit(*data[:2], sample_weight=weight) for model in (ours, theirs)]


def assert_same_fit(ours, theirs):
    """Gradients of the mean within 1e-9 of 0, where a step of the coefficients of length d changes them
    by at least d / (C n), n at most 1797 here with weights up to 3: they are within 2 * 1e-9 * 5400 C
    of each other, 1e-5; intercepts, free to shift together, differ from their mean as much."""
    assert (ours.coef_.shape, ours.coef_.dtype) == (theirs.coef_.shape, theirs.coef_.dtype)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    shift = theirs.intercept_.mean() - ours.intercept_.mean() if len(ours.intercept_) > 1 else 0
    np.testing.assert_allclose(ours.intercept_ + shift, theirs.intercept_, atol=1e-4)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("intercept", [False, True])
def test_coefficients(rng, classes, intercept):
    x, y = digits(classes=classes)
    options = {"fit_intercept": intercept}
    assert_same_fit(*both(x, NAMES.repeat(2)[y] if classes == 3 else y, **options))
    options |= {"class_weight": "balanced", "C": 0.3}
    assert_same_fit(*both(x, y, 3 * rng.random(len(y)), **options))
    options["class_weight"] = {0: 2.0, 1: 0.5}
    assert_same_fit(*both(x, y, **options))


@pytest.mark.parametrize("classes", [2, 4])
def test_predictions(rng, classes):
    x, y = digits(classes=classes)
    ours, theirs = both(x, y)
    # logits of up to 64 terms times coefficients that are within 1e-5
    for name in ("decision_function", "predict_proba", "predict_log_proba"):
        found, expected = getattr(ours, name)(x), getattr(theirs, name)(x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=64e-5)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    assert ours.score(x, y) == theirs.score(x, y)
    far = 1e4 * x[:1]
    assert np.isfinite(ours.predict_log_proba(far)).all()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_sparse(classes, layout):
    x, y = digits(classes=classes)
    ours, dense = SoftmaxRegression(tol=1e-9, max_iter=5000), SoftmaxRegression(tol=1e-9, max_iter=5000)
    ours.fit(sparse.coo_array(x).asformat(layout), y)
    assert_same_fit(ours, dense.fit(x, y))
    np.testing.assert_allclose(
        ours.predict_proba(sparse.csr_array(x)), ours.predict_proba(x), rtol=1e-12
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_float32(classes):
    """Products are float32; the gradient is only that good."""
    x, y = digits("float32", classes)
    ours, theirs = both(x, y, tol=1e-5)
    assert ours.coef_.dtype == ours.predict_proba(x).dtype == np.float32
    double = SoftmaxRegression(tol=1e-9, max_iter=5000).fit(x.astype(float), y)
    # not farther from the minimum than scikit-learn's, or within what a gradient of 1e-5 leaves
    distance = np.abs(ours.coef_ - double.coef_).max()
    assert distance <= max(np.abs(theirs.coef_ - double.coef_).max(), 1e-5 * len(y))


def test_rows_in_several_parts(monkeypatch):
    x, y = digits()
    whole = SoftmaxRegression(tol=1e-9, max_iter=5000).fit(x, y)
    monkeypatch.setattr(adapter, "_BYTES", 10000)
    assert_same_fit(SoftmaxRegression(tol=1e-9, max_iter=5000).fit(x, y), whole)


def test_no_penalty(rng):
    x = rng.standard_normal((300, 3))
    y = (x @ rng.standard_normal((3, 3)) + rng.gumbel(size=(300, 3))).argmax(axis=1)
    ours, theirs = both(x, y, C=np.inf)
    # shifts of all rows are free without a penalty
    for name in ("coef_", "intercept_"):
        found, expected = (getattr(model, name) for model in (ours, theirs))
        np.testing.assert_allclose(found - found.mean(0), expected - expected.mean(0), atol=1e-5)


def test_warm_start():
    x, y = digits()
    model = SoftmaxRegression(warm_start=True, tol=1e-6, max_iter=5000).fit(x, y)
    assert model.n_iter_.dtype == np.int32
    assert model.n_iter_[0] > 10
    assert model.fit(x, y).n_iter_[0] <= 1
    with pytest.raises(ValueError, match="warm_start expected"):
        model.fit(x[:, 1:], y)
    assert SoftmaxRegression(tol=1e-6, max_iter=5000).fit(x, y).fit(x, y).n_iter_[0] > 10


def test_no_convergence():
    x, y = digits()
    with pytest.warns(
        ConvergenceWarning, match=r"lbfgs failed to converge after 3 iteration.*(.|\n)*max_iter"
    ):
        SoftmaxRegression(max_iter=3).fit(x, y)


@pytest.mark.parametrize("weight", [-1.0, np.zeros(4), np.ones((4, 1)), np.ones(3), [1, 2, np.nan, 4]])
def test_wrong_weights(weight):
    with pytest.raises(ValueError, match=r"weight|inconsistent"):
        SoftmaxRegression().fit(np.eye(4), [0, 1, 2, 2], sample_weight=weight)


@pytest.mark.parametrize("wrong", [{"C": 0}, {"C": -1}, {"C": "one"}, {"tol": -1}, {"max_iter": None}])
def test_wrong_parameters(wrong):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=f"^{name} is "):
        SoftmaxRegression(**wrong).fit(np.eye(3), [0, 1, 2])


def test_loss_is_that_of_fastll(rng):
    """The minimum is one of the sum of fastll's losses and of the penalty."""
    x, y = digits(classes=4)
    weight, c = rng.random(len(y)), 0.7
    model = SoftmaxRegression(C=c, tol=1e-9, max_iter=5000).fit(x, y, sample_weight=weight)

    def objective(coef):
        loss = fastll.cross_entropy(
            x @ coef.T + model.intercept_, y, sample_weight=weight, reduction="sum"
        )
        return loss + (coef**2).sum() / (2 * c)

    least = objective(model.coef_)
    for _ in range(10):
        assert objective(model.coef_ + 1e-3 * rng.standard_normal(model.coef_.shape)) > least
