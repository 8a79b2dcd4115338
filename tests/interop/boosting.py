"""What the tests of the adapters for boosting share: data, and the frameworks' formulas in NumPy."""

import numpy as np

EPS32 = 2.0**-23


def softmax(scores, labels, hessian):
    """Gradient and Hessian diagonal in float64, as a textbook writes them."""
    scores = np.asarray(scores, np.float64)
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    t = np.eye(scores.shape[1])[np.asarray(labels, int)]
    k = scores.shape[1]
    rules = {
        "exact": p * (1 - p),
        "doubled": 2 * p * (1 - p),
        "scaled": k / (k - 1) * p * (1 - p),
        "residual": abs(p - t),
    }
    return p - t, rules[hessian]


def logistic(scores, labels):
    p = 1 / (1 + np.exp(-np.asarray(scores, np.float64)))
    return p - labels, p * (1 - p)


def poisson(scores, labels, max_delta_step):
    scores = np.asarray(scores, np.float64)
    return np.exp(scores) - labels, np.exp(scores + max_delta_step)


def data(kind, rows=400, seed=20261120):
    """Features, labels and weights; the labels depend on the features, but not on them alone."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 6))
    if kind == "softmax":
        y = (x[:, :4] + rng.gumbel(size=(rows, 4))).argmax(1)
    elif kind == "logistic":
        y = (x[:, 0] - x[:, 1] + rng.logistic(size=rows) > 0.5).astype(int)
    else:
        y = rng.poisson(np.exp(0.5 * x[:, 0]))
    return x, y, 0.5 + rng.random(rows)
