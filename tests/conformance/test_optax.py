"""The losses of optax on the same inputs, none less exact than there."""

import numpy as np
import oracle
import pytest
from peers import assert_not_worse

import fastll

optax = pytest.importorskip("optax")

#: JAX computes in float32 unless it is told otherwise.
SHAPE = 50, 200


@pytest.fixture
def arrays(rng):
    x = (3 * rng.standard_normal(SHAPE)).astype(np.float32)
    return (
        x,
        rng.integers(0, SHAPE[1], SHAPE[0]),
        rng.dirichlet(np.ones(SHAPE[1]), 50).astype(np.float32),
    )


def test_labels(arrays):
    x, y, _ = arrays
    peer = optax.softmax_cross_entropy_with_integer_labels(x, y)
    ours = fastll.cross_entropy(x, y, reduction="none")
    assert_not_worse(ours, peer, oracle.cross_entropy(x, y, -1).value[0])


def test_distributions(arrays):
    x, _, t = arrays
    peer = optax.softmax_cross_entropy(x, t)
    ours = fastll.cross_entropy(x, t, reduction="none")
    assert_not_worse(ours, peer, oracle.cross_entropy(x, t, -1).value[0])


def test_binary(arrays):
    x, _, t = arrays
    peer = optax.sigmoid_binary_cross_entropy(x, t)
    ours = fastll.binary_cross_entropy_with_logits(x, t, reduction="none")
    assert_not_worse(ours, peer, oracle.binary_cross_entropy_with_logits(x, t).value[0])


def test_focal(arrays):
    x, y, _ = arrays
    t = np.eye(SHAPE[1], dtype=np.float32)[y]
    peer = optax.sigmoid_focal_loss(x, t, alpha=0.25, gamma=2.0)
    ours = fastll.sigmoid_focal_loss(x, t, reduction="none")
    assert_not_worse(ours, peer, oracle.sigmoid_focal_loss(x, t).value[0])


def test_divergence(arrays):
    x, _, p = arrays
    q = fastll.softmax(x)
    peer = optax.losses.kl_divergence(np.log(q), p)
    assert_not_worse(fastll.kl_divergence(p, q), peer, oracle.kl_divergence(p, q, -1).value[0])


def test_squares(arrays):
    x, _, t = arrays
    peer = optax.squared_error(x, t)
    assert_not_worse(fastll.mse(x, t, reduction="none"), peer, oracle.mse(x, t).value[0])
