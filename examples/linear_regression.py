"""Linear regression: the likelihood is normal.

Model: y = a + b x + noise, where the noise is normal with a variance v that is not known either.
Likelihood: `gaussian_nll` of the mean a + b x and the variance v; all three are fitted at once.
Estimate: in closed form, a and b are the least squares and v is the mean of the squared residuals.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import fastll

rng = np.random.default_rng(0)
x = rng.uniform(-1, 1, 300)
y = 0.5 + 2 * x + 0.4 * rng.standard_normal(300)
X = np.column_stack([np.ones_like(x), x])


def objective(theta):
    """Mean loss and its gradient at theta = (a, b, log v)."""
    *line, log_v = theta
    loss, grad = fastll.gaussian_nll(X @ line, y, np.exp(log_v), full=True, return_grad=True)
    # v is shared: loss = (R / v + log v + log 2 pi) / 2 gives d loss / d log v = (1 - R / v) / 2
    slope = 0.5 + (log_v + np.log(2 * np.pi)) / 2 - loss
    return loss, np.append(X.T @ grad, slope)


fit = minimize(objective, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-7})
*line, log_v = fit.x

# A minimum is off by H^-1 times the gradient that is left there, to first order in it; twice that
# covers the second order. H is diagonal by blocks: X'X / (n v) and 1/2.
exact = np.linalg.lstsq(X, y)[0]
variance = np.mean((y - X @ exact) ** 2)
hessian = np.zeros((3, 3))
hessian[:2, :2], hessian[2, 2] = X.T @ X / (len(y) * variance), 0.5
margin = 2 * np.sqrt(3) * 1e-7 / np.linalg.eigvalsh(hessian)[0]
assert fit.success
assert np.allclose(fit.x, [*exact, np.log(variance)], rtol=0, atol=margin)

at, v = np.array([-1, 1]), np.exp(log_v)
plt.figure(figsize=(6, 4))
plt.plot(x, y, ".", alpha=0.5)
plt.plot(at, line[0] + line[1] * at, "C1", label=f"mean {line[0]:.2f} + {line[1]:.2f} x")
for sign in (-2, 2):
    plt.plot(at, line[0] + line[1] * at + sign * np.sqrt(v), "C1:")
plt.title(f"Normal likelihood: variance {v:.3f} (dotted: two standard deviations)")
plt.legend()
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
