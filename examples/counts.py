"""Counts: the likelihood is Poisson's.

Model: y is a count, Poisson with the rate exp(a + b t), which grows or decays over the time t.
Likelihood: `poisson_nll` of the logarithm of the rate.
Estimate: within a few standard errors of the truth, as Fisher's information gives them; and the
rates add up to the counts. With no trend, the rate is the mean count: that is fitted first.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import fastll

rng = np.random.default_rng(2)
truth = np.array([2.5, -0.8])
t = np.linspace(0, 4, 400)
X = np.column_stack([np.ones_like(t), t])
y = rng.poisson(np.exp(X @ truth))
GTOL = 1e-7


def fit(x):
    """The coefficients of maximum likelihood."""

    def objective(w):
        loss, grad = fastll.poisson_nll(x @ w, y, full=True, return_grad=True)
        return loss, x.T @ grad

    found = minimize(objective, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": GTOL})
    assert found.success
    return found.x


# The first entry of a gradient is the mean rate less the mean count: at most GTOL where it is found.
(log_rate,) = fit(X[:, :1])
assert abs(np.exp(log_rate) - y.mean()) <= GTOL + 1e-14

w = fit(X)
rate = np.exp(X @ w)
assert abs(rate.mean() - y.mean()) <= GTOL + 1e-14
# One in 16,000 estimates is off by more than four standard errors.
errors = np.sqrt(np.diag(np.linalg.inv((X * rate[:, None]).T @ X)))
assert np.all(abs(w - truth) < 4 * errors)

plt.figure(figsize=(6, 4))
plt.plot(t, y, ".", alpha=0.5, label="counts")
plt.plot(t, rate, "C1", label=f"exp({w[0]:.2f} - {-w[1]:.2f} t)")
plt.plot(t, np.exp(X @ truth), "k:", label="truth")
plt.axhline(np.exp(log_rate), color="C2", lw=1, label="no trend: the mean")
plt.xlabel("t")
plt.title("Poisson likelihood")
plt.legend()
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
