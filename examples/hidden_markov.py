"""A hidden Markov model: its likelihood is a chain of log-sum-exps.

Model: one of two hidden states follows the other with the probabilities exp(moves), and each emits one
of three symbols with the probabilities exp(emits). Only the symbols are seen.
Likelihood: the forward algorithm, one `logsumexp` over the previous state per step. The algorithm of
Baum and Welch raises it at each step: probabilities become their frequencies under the posterior.
Estimate: the likelihood is the sum over all paths; and twice the gain of the fit over the truth has a
chi-squared distribution, with one degree of freedom for each of the six free probabilities (Wilks).
"""

import sys
from itertools import pairwise, product

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import chi2

import fastll

START = np.log([0.5, 0.5])
TRUTH = np.log([[0.9, 0.1], [0.2, 0.8]]), np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
rng = np.random.default_rng(4)


def sample(n, length):
    """The symbols of n sequences, by step."""
    moves, emits = np.exp(TRUTH[0]), np.exp(TRUTH[1]).cumsum(axis=1)
    state, symbols = rng.integers(0, 2, n), np.empty((length, n), int)
    for step in symbols:
        step[:] = (rng.uniform(size=(n, 1)) > emits[state, :2]).sum(axis=1)
        state = (rng.uniform(size=n) > moves[state, 0]).astype(int)
    return symbols


def forward(symbols, moves, emits):
    """log P(symbols so far, state), by step and sequence."""
    steps = [START + emits.T[symbols[0]]]
    for seen in symbols[1:]:
        steps.append(fastll.logsumexp(steps[-1][:, :, None] + moves, axis=1) + emits.T[seen])
    return np.array(steps)


def backward(symbols, moves, emits):
    """log P(symbols to come | state), by step and sequence."""
    steps = [np.zeros((symbols.shape[1], 2))]
    for seen in symbols[:0:-1]:
        steps.append(fastll.logsumexp(moves + (emits.T[seen] + steps[-1])[:, None, :], axis=2))
    return np.array(steps[::-1])


def improve(symbols, moves, emits):
    """The log-likelihood of a model, and a better model."""
    before, after = forward(symbols, moves, emits), backward(symbols, moves, emits)
    each = fastll.logsumexp(before[-1], axis=1)
    to = emits.T[symbols] + after - each[:, None]
    pairs = before[:-1, :, :, None] + moves + to[1:, :, None, :]
    states = fastll.softmax(before + after)
    emitted = np.array([states[symbols == symbol].sum(axis=0) for symbol in range(3)]).T
    changes = fastll.logsumexp(pairs, axis=(0, 1))
    return each.sum(), (fastll.log_softmax(changes), fastll.log_softmax(np.log(emitted)))


# All 2 ** 8 paths of 3 sequences. No sum of 16 logarithms of 0.1 or more exceeds 38, whose ulp is
# 7.1e-15. A path takes 15 additions, within half an ulp each, and the recursion 8 log-sum-exps, within
# 2 ulps, and 16 additions: together less than 32 ulps.
few = sample(3, 8)
paths = [
    START[path[0]] + sum(TRUTH[0][pair] for pair in pairwise(path)) + TRUTH[1][path, few.T].sum(axis=1)
    for path in product(range(2), repeat=8)
]
likelihood = fastll.logsumexp(forward(few, *TRUTH)[-1], axis=1)
assert np.allclose(likelihood, fastll.logsumexp(paths, axis=0), rtol=0, atol=32 * 7.1e-15)

symbols = sample(200, 50)
model = np.log([[0.6, 0.4], [0.4, 0.6]]), np.log([[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]])
history = []
while len(history) < 2 or history[-1] - history[-2] > 1e-3:
    value, model = improve(symbols, *model)
    history.append(value)
truth = fastll.logsumexp(forward(symbols, *TRUTH)[-1], axis=1).sum()
assert min(np.diff(history)) > 0
assert 0 < 2 * (history[-1] - truth) < chi2.isf(1e-4, df=6)

plt.figure(figsize=(6, 4))
plt.plot(history, ".-", label="Baum and Welch")
plt.axhline(truth, color="k", ls=":", label="the model that generated the data")
plt.xlabel("step")
plt.ylabel("log-likelihood")
plt.title(f"P(stay) = {np.exp(model[0][0, 0]):.2f}, {np.exp(model[0][1, 1]):.2f}; truth: 0.90, 0.80")
plt.legend()
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
