"""Logistic regression: the likelihood is Bernoulli's.

Model: y is 1 with probability sigmoid(x @ w), else 0.
Likelihood: `binary_cross_entropy_with_logits` of the logits x @ w.
Estimate: within a few standard errors of the w that generated the data, as Fisher's information gives
them; and the probabilities have the mean of y, as for every logistic regression with an intercept.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import fastll

rng = np.random.default_rng(1)
truth = np.array([-0.5, 2.0, -1.0])
X = np.column_stack([np.ones(2000), rng.standard_normal((2000, 2))])
y = rng.uniform(size=2000) < fastll.sigmoid(X @ truth)


def objective(w):
    """Mean loss and its gradient."""
    loss, grad = fastll.binary_cross_entropy_with_logits(X @ w, y, return_grad=True)
    return loss, X.T @ grad


fit = minimize(objective, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-8})
p = fastll.sigmoid(X @ fit.x)

# The first entry of the gradient is mean(p) - mean(y); the optimiser left at most gtol of it.
assert fit.success
assert abs(p.mean() - y.mean()) <= 1e-8 + 1e-15
# An estimate is normal about the truth, with the inverse of the information as its covariance:
# one in 16,000 is off by more than four standard errors.
information = (X * (p * (1 - p))[:, None]).T @ X
errors = np.sqrt(np.diag(np.linalg.inv(information)))
assert np.all(abs(fit.x - truth) < 4 * errors)

shown = slice(0, 500)
side = np.linspace(-3, 3, 200)
grid = np.stack([np.ones((200, 200)), *np.meshgrid(side, side)], axis=-1)
plt.figure(figsize=(6, 4.5))
plt.contourf(side, side, fastll.sigmoid(grid @ fit.x), levels=np.linspace(0, 1, 11), cmap="RdBu_r")
plt.colorbar(label="probability of 1")
plt.scatter(X[shown, 1], X[shown, 2], c=y[shown], s=16, cmap="RdBu_r", edgecolor="w", linewidth=0.6)
plt.axis((-3, 3, -3, 3))
plt.title(f"Bernoulli likelihood: w = {fit.x.round(2)} ± {errors.round(2)}")
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
