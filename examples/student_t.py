"""Your own likelihood: a line through data with outliers, by Student's t-distribution.

Model: y = a + b x + noise, where the noise has a t-distribution: a value far out is no surprise to it.
Likelihood: `student_t`, a plain function of value and slope, which `elementwise_loss` makes a loss.
Estimate: within a few standard errors of the truth, as Fisher's information gives them; least squares,
for which the noise is normal, are further off.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import fastll
from fastll.formulas import log1p
from fastll.testing import gradcheck

DOF = 1.5  # of so heavy a tail that the noise has no variance


@fastll.elementwise_loss
def student_t(x, target, *, dof):
    """-log of the density at the target, without the constant, and its derivative by x."""
    r = x - target
    return 0.5 * (dof + 1) * log1p(r * r / dof), (dof + 1) * r / (dof + r * r)


assert gradcheck(lambda x: student_t(x, [0.0, 1.0], dof=DOF, return_grad=True), [0.3, -5.0])

rng = np.random.default_rng(5)
truth = np.array([1.0, 3.0])
x = rng.uniform(-4, 4, 200)
X = np.column_stack([np.ones_like(x), x])
y = X @ truth + rng.standard_t(DOF, size=200)


def objective(line):
    """Mean loss and its gradient at line = (a, b)."""
    loss, grad = student_t(X @ line, y, dof=DOF, return_grad=True)
    return loss, X.T @ grad


least_squares = np.linalg.lstsq(X, y)[0]
fit = minimize(objective, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-7})

# The information of one observation about its mean is (dof + 1) / (dof + 3). One in 16,000 estimates
# is off by more than four standard errors.
errors = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * (DOF + 3) / (DOF + 1))
assert fit.success
assert np.all(abs(fit.x - truth) < 4 * errors)

at = np.array([-4, 4])
plt.figure(figsize=(6, 4))
plt.plot(x, y, ".", alpha=0.5)
for (a, b), style, name in (
    (least_squares, "C2--", "least squares"),
    (fit.x, "C1", "Student's t"),
    (truth, "k:", "truth"),
):
    plt.plot(at, a + b * at, style, label=f"{name}: {a:.2f} + {b:.2f} x")
plt.ylim(-25, 30)
plt.title("A likelihood of your own, for noise with outliers")
plt.legend()
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
