"""Handwritten digits: the likelihood is categorical.

Model: the class of an image x of 8 x 8 pixels is k with probability softmax(W x + c)_k.
Likelihood: `cross_entropy` of the logits W x + c. A small penalty on W, a normal prior, keeps W finite:
the classes can be separated, and the likelihood alone would have no maximum.
Estimate: c is not penalised, so that the mean probability of each class is its frequency; and the
loss on images that were held out is far below that of the frequencies alone.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits

import fastll

images, classes = load_digits(return_X_y=True)
images = np.column_stack([images / 16, np.ones(len(images))])  # the last column is for c
chosen = np.random.default_rng(3).permutation(len(images))
X, y = images[chosen[:1200]], classes[chosen[:1200]]
held_out, held_out_y = images[chosen[1200:]], classes[chosen[1200:]]
PENALTY, GTOL = 1e-3, 1e-5


def objective(theta):
    """Mean loss with the penalty, and its gradient."""
    w = theta.reshape(10, 65)
    loss, grad = fastll.cross_entropy(X @ w.T, y, return_grad=True)
    slope = grad.T @ X
    slope[:, :64] += 2 * PENALTY * w[:, :64]
    return loss + PENALTY * np.sum(w[:, :64] ** 2), slope.ravel()


options = {"gtol": GTOL, "ftol": 0, "maxiter": 2000}
fit = minimize(objective, np.zeros(650), jac=True, method="L-BFGS-B", options=options)
W = fit.x.reshape(10, 65)

# The gradient by c is the mean probability less the frequency, at most GTOL where it is found.
frequency = np.bincount(y) / len(y)
assert fit.success
assert np.allclose(fastll.softmax(X @ W.T).mean(axis=0), frequency, rtol=0, atol=GTOL + 1e-14)
# The loss of one image is positive; its mean is known to within its standard error.
logits = held_out @ W.T
losses = fastll.cross_entropy(logits, held_out_y, reduction="none")
error = losses.std() / np.sqrt(len(losses))
assert losses.mean() + 4 * error < fastll.entropy(frequency)

right = np.mean(logits.argmax(axis=1) == held_out_y)
figure, axes = plt.subplots(2, 5, figsize=(7, 3.2), layout="constrained")
for k, ax in enumerate(axes.flat):
    ax.imshow(W[k, :64].reshape(8, 8), cmap="RdBu_r", vmin=-abs(W).max(), vmax=abs(W).max())
    ax.set(title=k, xticks=[], yticks=[])
figure.suptitle(
    f"Categorical likelihood; held out: {right:.1%} right, loss {losses.mean():.3f}±{error:.3f}"
)
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
