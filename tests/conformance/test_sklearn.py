"""scikit-learn's log_loss, with sample weights."""

import numpy as np
import pytest
from peers import assert_not_worse

import fastll

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def problem(rng):
    p = rng.dirichlet(np.ones(7), 500)
    return p, np.concatenate((np.arange(7), rng.integers(0, 7, 493))), rng.exponential(size=500)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_log_loss(problem, weighted, normalize):
    p, y, w = problem
    w = w if weighted else np.ones(500)
    wide = p.astype(np.longdouble)
    exact = -(w * np.log(wide[np.arange(500), y])).sum() / (
        w.sum(dtype=np.longdouble) if normalize else 1
    )
    ours = fastll.nll_loss(
        np.log(p), y, sample_weight=w if weighted else None, reduction="mean" if normalize else "sum"
    )
    peer = metrics.log_loss(y, p, sample_weight=w if weighted else None, normalize=normalize)
    assert_not_worse(ours, peer, exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_log_loss_of_logits(problem, rng, weighted):
    """One call from logits, for which scikit-learn needs the probabilities first."""
    _, y, w = problem
    x, w = 3 * rng.standard_normal((500, 7)), w if weighted else None
    ours = fastll.cross_entropy(x, y, sample_weight=w)
    peer = metrics.log_loss(y, fastll.softmax(x), sample_weight=w)
    np.testing.assert_allclose(ours, peer, rtol=1e-13)


def test_binary_log_loss(rng):
    p, y = rng.random(300), rng.integers(0, 2, 300)
    ours = fastll.binary_cross_entropy(p, y, weight=None)
    np.testing.assert_allclose(ours, metrics.log_loss(y, p), rtol=1e-13)


def test_a_weight_of_zero_drops_a_row(problem):
    """Deliberate. Contract: "a weight of 0 drops the row as ignore_index does": there even where the
    probability of what was seen is 0, and scikit-learn's, which is clipped first, is not."""
    p, y, w = problem
    w[3] = 0
    p[3] = np.eye(7)[(y[3] + 1) % 7]
    with np.errstate(divide="ignore"):
        ours = fastll.nll_loss(np.log(p), y, sample_weight=w)
    np.testing.assert_allclose(ours, metrics.log_loss(y, p, sample_weight=w), rtol=1e-13)
    w[3] = 1
    with np.errstate(divide="ignore"):
        assert fastll.nll_loss(np.log(p), y, sample_weight=w) == np.inf
    assert metrics.log_loss(y, p, sample_weight=w) < np.inf
