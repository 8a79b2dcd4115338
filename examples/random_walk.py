"""A random walk that is seen through noise: fastll inside code that Numba compiles.

Model: a walker on a ring of ten places moves to either neighbour with probability m / 2, else it stays.
Its place is seen right with probability 0.6, and otherwise as any place.
Likelihood: the forward algorithm of a hidden Markov model, under ``@njit``, with a `fastll.logsumexp`
per step and place: milliseconds for 5000 steps.
Estimate: m is the best on a grid, whose points `prange` shares among threads; and twice the gain of its
log-likelihood over the truth has a chi-squared distribution with one degree of freedom (Wilks).
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from numba import njit, prange
from scipy.stats import chi2

import fastll

PLACES, STEPS, TRUTH = 10, 5000, 0.3
EMITS = np.log(np.full((PLACES, PLACES), 0.4 / PLACES) + 0.6 * np.eye(PLACES))
rng = np.random.default_rng(5)


@njit
def moves_of(m):
    """log P(from i to j), at [j, i]."""
    moves = np.full((PLACES, PLACES), -np.inf)
    for i in range(PLACES):
        moves[i, i] = np.log(1 - m)
        moves[i - 1, i] = moves[i, i - 1] = np.log(m / 2)
    return moves


@njit
def log_likelihood(seen, moves):
    """By the forward algorithm: `state` is log P(what was seen so far, place)."""
    state = EMITS[:, seen[0]] - np.log(PLACES)
    after = np.empty_like(state)
    for t in range(1, len(seen)):
        for j in range(PLACES):
            after[j] = fastll.logsumexp(state + moves[j]) + EMITS[j, seen[t]]
        state[:] = after
    return fastll.logsumexp(state)


@njit(parallel=True)
def log_likelihoods(seen, grid):
    """Of all m of a grid."""
    found = np.empty(len(grid))
    for k in prange(len(grid)):
        found[k] = log_likelihood(seen, moves_of(grid[k]))
    return found


def scaled(seen, moves):
    """The same by probabilities, scaled to 1 at each step, as textbooks have it."""
    state, total = np.full(PLACES, 1 / PLACES), 0.0
    for t, place in enumerate(seen):
        state = (np.exp(moves) @ state if t else state) * np.exp(EMITS[:, place])
        total += np.log(state.sum())
        state /= state.sum()
    return total


steps = rng.choice([-1, 0, 1], STEPS, p=[TRUTH / 2, 1 - TRUTH, TRUTH / 2])
places = steps.cumsum() % PLACES
seen = np.where(rng.random(STEPS) < 0.6, places, rng.integers(0, PLACES, STEPS))

# No number exceeds 2**14, whose ulp is 1.8e-12. A step takes two additions, within half an ulp each,
# and a log-sum-exp, within 2; with scaled probabilities that of a logarithm, itself off by 1e-15.
truth = log_likelihood(seen, moves_of(TRUTH))
assert abs(truth) < 2**14
assert abs(truth - scaled(seen, moves_of(TRUTH))) < STEPS * 4 * 1.8e-12

grid = np.linspace(0.2, 0.4, 101)
found = log_likelihoods(seen, grid)
best = grid[found.argmax()]
assert 0 < found.argmax() < len(grid) - 1
assert 0 <= 2 * (found.max() - truth) < chi2.isf(1e-4, df=1)

plt.figure(figsize=(6, 4))
plt.plot(grid, found - found.max(), ".-")
plt.axvline(TRUTH, color="k", ls=":", label=f"the truth, {TRUTH}; estimate: {best:.3f}")
plt.axhline(-chi2.isf(0.05, df=1) / 2, color="k", lw=0.5, label="interval of 95% confidence")
plt.xlabel("probability of a move")
plt.ylabel("log-likelihood, from its maximum")
plt.legend()
plt.savefig(sys.argv[1]) if len(sys.argv) > 1 else plt.show()
