"""What is special about each element-wise loss: tails, clamps, options, and what their minimum is."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mpmath
import numpy as np
import oracle
import pytest
from table import assert_close

import fastll

mpmath.mp.dps = 60

INF, NAN = np.inf, np.nan
FLOATS = ["float32", "float64"]
EACH = {"reduction": "none", "return_grad": True}


def assert_accurate(actual, exact, dtype, roundoffs):
    """Numbers are within so many roundoffs of the exact ones, or one step of the subnormal ones."""
    info = np.finfo(dtype)
    for value, expected in zip(actual, exact, strict=True):
        allowed = roundoffs * info.eps / 2 * abs(float(expected)) + float(info.smallest_subnormal)
        assert abs(float(mpmath.mpf(float(value)) - expected)) <= allowed, (value, expected)


# Binary cross-entropy of probabilities


@pytest.mark.parametrize("dtype", FLOATS)
def test_binary_tails(backend, dtype):
    """log(1 - p) of a small p, log p of a p near 1, and all between."""
    tiny = np.finfo(dtype).tiny
    near = 1 - np.finfo(dtype).eps * np.array([0.5, 1, 3])
    p = np.concatenate([np.geomspace(tiny, 1e-3, 40), np.linspace(0.01, 0.99, 99), near]).astype(dtype)
    for t in (0, 1, 0.25):
        loss, grad = fastll.binary_cross_entropy(p, np.full_like(p, t), **EACH)
        expected = oracle.binary_cross_entropy(p, np.full_like(p, t))
        assert_close(loss, expected, np.dtype(dtype))
        assert_close(grad, expected.gradient, np.dtype(dtype))


def test_binary_clamps(backend):
    p, t = np.array([0.0, 0.0, 1.0, 1.0, NAN, 1e-50]), np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.5])
    loss, grad = fastll.binary_cross_entropy(p, t, **EACH)
    # half of log(1e-50) = -115 is clamped to -100
    np.testing.assert_array_equal(loss, [0, 100, 100, 0, NAN, 50])
    np.testing.assert_allclose(grad, [0, -1e12, 1e12, 0, NAN, -0.5e12], rtol=1e-15)


@pytest.mark.parametrize("bad", [-1e-30, 1 + 2.0**-20, INF, -INF])
def test_binary_domain(backend, bad):
    p = np.array([[0.5, 1.0, bad], [0.0, NAN, 0.25]])
    if backend == "cuda":
        for out in fastll.binary_cross_entropy(p, np.zeros_like(p), **EACH):
            np.testing.assert_array_equal(np.isnan(out), [[False, False, True], [False, True, False]])
        return
    with pytest.raises(ValueError, match=r"^probs has .* at \(0, 2\); expected values in \[0, 1\]"):
        fastll.binary_cross_entropy(p, np.zeros_like(p), grad_out=p)
    assert p[0, 0] == 0.5


def test_binary_is_that_of_logits(backend, rng):
    x, t = 3 * rng.standard_normal(500), rng.random(500)
    p = fastll.sigmoid(x)
    loss, grad = fastll.binary_cross_entropy(p, t, **EACH)
    wanted, slope = fastll.binary_cross_entropy_with_logits(x, t, **EACH)
    # a roundoff of p is one of p / (1 - p) of log(1 - p), which is up to exp(|x|)
    roundoffs = 10 * np.finfo(float).eps * np.exp(np.abs(x).max())
    np.testing.assert_allclose(loss, wanted, rtol=roundoffs)
    np.testing.assert_allclose(grad * p * (1 - p), slope, rtol=roundoffs, atol=roundoffs)


# Squared error


def test_mse_is_gaussian_likelihood_of_variance_one(backend, rng):
    x, t = rng.standard_normal((2, 3, 50))
    loss, grad = fastll.mse(x, t, **EACH)
    nll, slope = fastll.gaussian_nll(x, t, 1.0, full=True, **EACH)
    np.testing.assert_allclose(nll, loss / 2 + np.log(2 * np.pi) / 2, rtol=1e-15)
    np.testing.assert_array_equal(slope, grad / 2)


def test_mse_broadcasts_its_target(backend, rng):
    x, t = rng.standard_normal((3, 4)), rng.standard_normal(4)
    expected = fastll.mse(x, np.tile(t, (3, 1)), reduction="none")
    np.testing.assert_array_equal(fastll.mse(x, t, reduction="none"), expected)
    with pytest.raises(ValueError, match=r"target has shape \(3,\)"):
        fastll.mse(x, t[:3])


# Poisson


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponentials_of_rates(backend, dtype):
    """From the smallest subnormal rate to the last finite one, and infinity."""
    info = np.finfo(dtype)
    low, high = np.log(float(info.smallest_subnormal)), np.log(float(info.max))
    x = np.concatenate([np.linspace(low + 1, high - 1e-3, 301), np.linspace(-2, 2, 100)]).astype(dtype)
    loss, grad = fastll.poisson_nll(x, np.zeros_like(x), **EACH)
    exact = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
    assert_accurate(loss, exact, dtype, 3)
    assert_accurate(grad, exact, dtype, 3)
    ends = np.array([high + 0.1, high + 100, INF, low - 1, -INF, NAN], dtype)
    expected = [INF, INF, INF, 0, 0, NAN]
    np.testing.assert_array_equal(fastll.poisson_nll(ends, 0.0, reduction="none"), expected)


def test_counts_of_zero(backend):
    x = np.array([-INF, -3.0])
    np.testing.assert_array_equal(fastll.poisson_nll(x, 0.0, **EACH)[0], [0, np.exp(-3)])
    assert fastll.poisson_nll(-INF, 1.0) == INF
    of_rate = {"log_input": False, "eps": 0.0, **EACH}
    loss, grad = fastll.poisson_nll(np.array([0.0, 0.0, -1.0]), np.array([0.0, 2.0, 0.0]), **of_rate)
    np.testing.assert_array_equal(loss, [0, INF, NAN])
    np.testing.assert_array_equal(grad, [1, -INF, NAN])


@pytest.mark.parametrize("log_input", [True, False])
def test_stirling(backend, log_input):
    """Added above 1 only; for counts it is log(t!) up to 1 / (12 t)."""
    t = np.array([0.0, 1.0, 1.5, 2.0, 50.0, NAN])
    plain, full = (
        fastll.poisson_nll(np.full(6, 0.5), t, log_input=log_input, full=full, reduction="none")
        for full in (False, True)
    )
    np.testing.assert_array_equal(full[:2], plain[:2])
    log_factorials = [float(mpmath.loggamma(v + 1)) for v in t[2:5]]
    error = log_factorials - (full - plain)[2:5]
    assert (error > 1 / (12 * t[2:5] + 1)).all()  # Robbins
    assert (error < 1 / (12 * t[2:5])).all()
    assert np.isnan(full[5])


def test_rates_and_their_logarithms(backend, rng):
    rate, t = rng.uniform(0.1, 30, 200), rng.poisson(5, 200)
    by_log = fastll.poisson_nll(np.log(rate), t, full=True)
    by_rate = fastll.poisson_nll(rate, t, log_input=False, full=True, eps=0)
    np.testing.assert_allclose(by_rate, by_log, rtol=1e-14)


# Focal loss


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_tails(backend, dtype, gamma):
    """Labels at logits of both signs, where loss and gradient are as small as numbers get."""
    most = -np.log(float(np.finfo(dtype).smallest_subnormal)) / (1 + gamma)
    x = np.concatenate([np.linspace(-1.2 * most, 1.2 * most, 101), [1e-4, -1e-4, 0]]).astype(dtype)
    # the power, by e = exp(-|x|), has 4 roundoffs and those of gamma log1p(e), whose own are 2 of ln 2;
    # its factors and their products have 6
    roundoffs = 10 + 2 * gamma
    if backend == "numpy":  # the power of p takes gamma of its roundoffs, and exp up to 2 of them
        roundoffs += 6 * gamma
    for t in (0, 1):
        loss, grad = fastll.sigmoid_focal_loss(x, np.full_like(x, t), alpha=-1, gamma=gamma, **EACH)
        y = [mpmath.mpf(float(v)) * (1 - 2 * t) for v in x]
        wrong = [1 / (1 + mpmath.exp(-v)) for v in y]
        ce = [mpmath.log1p(mpmath.exp(v)) for v in y]
        exact = [c * w**gamma for c, w in zip(ce, wrong, strict=True)]
        slope = [
            (1 - 2 * t) * w**gamma * (w + gamma * (1 - w) * c) for c, w in zip(ce, wrong, strict=True)
        ]
        assert_accurate(loss, exact, dtype, roundoffs)
        assert_accurate(grad, slope, dtype, roundoffs)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_of_infinities(backend, gamma):
    x = np.array([INF, -INF, INF, -INF, NAN, INF, -INF])
    t = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5])
    loss, grad = fastll.sigmoid_focal_loss(x, t, alpha=-1, gamma=gamma, **EACH)
    np.testing.assert_array_equal(loss, [0, 0, INF, INF, NAN, INF, INF])
    half = 0.5 * 0.5**gamma
    np.testing.assert_array_equal(grad, [0, 0, 1, -1, NAN, half, -half])


def test_focal_loss_without_focus(backend, rng):
    x, t = 5 * rng.standard_normal((2, 400))
    t = 1 / (1 + np.exp(-t))
    for hard in (t, t > 0.5):
        found = fastll.sigmoid_focal_loss(x, hard, alpha=-1, gamma=0, **EACH)
        expected = fastll.binary_cross_entropy_with_logits(x, hard, **EACH)
        # weights t and 1 - t add up to 1 to a roundoff
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=8 * np.finfo(float).eps, atol=1e-16)


def test_focal_weights(backend):
    x = np.array([0.5, -2.0, 3.0])
    plain = fastll.sigmoid_focal_loss(x, [1, 0, 1], alpha=-1, **EACH)
    weighted = fastll.sigmoid_focal_loss(x, [1, 0, 1], alpha=0.75, **EACH)
    for one, other in zip(weighted, plain, strict=True):
        np.testing.assert_allclose(one, other * [0.75, 0.25, 0.75], rtol=1e-15)
    assert fastll.sigmoid_focal_loss(INF, 0, alpha=1) == 0  # a class without weight


@pytest.mark.parametrize(
    ("options", "match"),
    [({"alpha": 1.5}, "alpha is 1.5"), ({"alpha": -INF}, "alpha"), ({"gamma": -0.5}, "gamma is -0.5")],
)
def test_focal_options(options, match):
    with pytest.raises(ValueError, match=match):
        fastll.sigmoid_focal_loss([0.0], [0], **options)


# Maximum likelihood


def descend(slope, x, rate):
    """Where gradient descent on a mean loss of one number ends."""
    for _ in range(200):
        x -= rate * slope(x)
    return x


class Model(NamedTuple):
    """Data, the loss of a parameter, its estimate from the data's mean, and a step of the descent,
    about the inverse of the curvature."""

    draw: Callable
    loss: Callable
    estimate: Callable
    step: float


MODELS = {
    "mean, by mse": Model(lambda rng: rng.normal(2, 1, 1000), fastll.mse, float, 0.4),
    "mean, by gaussian_nll": Model(
        lambda rng: rng.normal(-1, 3, 1000), partial(fastll.gaussian_nll, var=9.0), float, 7.0
    ),
    "frequency": Model(lambda rng: rng.random(1000) < 0.3, fastll.binary_cross_entropy, float, 0.1),
    "logit of a frequency": Model(
        lambda rng: rng.random(1000) < 0.7,
        fastll.binary_cross_entropy_with_logits,
        lambda mean: np.log(mean / (1 - mean)),
        4.0,
    ),
    "rate": Model(
        lambda rng: rng.poisson(4, 1000), partial(fastll.poisson_nll, log_input=False), float, 2.0
    ),
    "logarithm of a rate": Model(lambda rng: rng.poisson(4, 1000), fastll.poisson_nll, np.log, 0.2),
}


@pytest.mark.parametrize("name", MODELS)
def test_minimum_is_the_maximum_likelihood_estimate(compiled, rng, name):
    model = MODELS[name]
    data = model.draw(rng)
    n = data.size

    def slope(x):
        return model.loss(np.full(n, x), data, return_grad=True)[1].sum()

    # eps = 1e-8 is in the rate that is found
    np.testing.assert_allclose(descend(slope, 0.5, model.step), model.estimate(data.mean()), rtol=1e-8)


def test_variance_of_least_loss(compiled, rng):
    """By the loss's difference quotient with respect to log v."""
    t = rng.normal(2, 1.5, 1000)

    def slope(log_v, step=1e-4):
        high, low = (
            fastll.gaussian_nll(np.full(1000, t.mean()), t, np.exp(log_v + h)) for h in (step, -step)
        )
        return (high - low) / (2 * step)

    # the quotient is off by step**2 / 6 times the third derivative, 1 / 2
    np.testing.assert_allclose(np.exp(descend(slope, 0.0, 1.5)), t.var(), rtol=1e-8)
