"""What a row is folded into: its running state, and how two of them become one.

Texts, bound to the names of a type: see `fastll.backend.cuda.variants`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.maths import *

#: Most numbers of a state.
PARTS = 8


class State(NamedTuple):
    """The running state of a row, or of a part of it, with sums relative to the maximum.

    With r = below + (at_maximum - 1), the sum without one of the largest, log1p(r) keeps its digits
    when one element dominates. A sum of terms is `below`, and its maximum -inf.
    """

    maximum: float
    below: Sum  # of exp(x - maximum) over the elements below the maximum
    at_maximum: float  # number of elements at the maximum, or the sum of their weights
    distance: Sum  # of u (maximum - x), where u is a target that is more than a point
    mass: Sum  # of u


def finite(m):
    """A maximum as what distances are measured from."""
    return m if m > -c.infinity else c.zero


def farther(distance, mass, m, top):
    """Distances from a maximum m as those from another one, `top` >= m."""
    if mass != c.zero and m != top:
        return plus(distance, mass * (finite(top) - finite(m)))
    return distance


def merged(a, b):
    """The state of two parts of a row."""
    m, at_maximum = a.maximum, a.at_maximum + b.at_maximum
    if m == b.maximum:
        below = add(a.below, b.below)
    else:
        upper, lower = a, b
        if m < b.maximum:
            upper, lower = b, a
        m, at_maximum = upper.maximum, upper.at_maximum
        if lower.maximum == -c.infinity:  # that of no elements; only a NaN counts
            below = Sum(upper.below.high + lower.below.high, upper.below.low)
        else:  # the product may be a normal number where the exponential is none
            fall = exp_minus_scaled(lower.maximum, m)
            more = plus(lower.below, lower.at_maximum)
            below = add(upper.below, Sum((more.high * fall) * c.unshift, (more.low * fall) * c.unshift))
    distance, mass = a.distance, a.mass
    if targets:
        distance = farther(a.distance, a.mass.high, a.maximum, m)
        distance = add(distance, farther(b.distance, b.mass.high, b.maximum, m))
        mass = add(a.mass, b.mass)
    return State(m, below, at_maximum, distance, mass)


def joined(a, b):
    """Two running states (m, e, k) together; in float64."""
    state = merged(
        State(a[0], Sum(a[1], c.zero), a[2], nothing, nothing),
        State(b[0], Sum(b[1], c.zero), b[2], nothing, nothing),
    )
    return state.maximum, state.below.high + state.below.low, state.at_maximum


def relative_to(lead, below):
    """A sum of `exponential` as one of exp(x - maximum)."""
    return Sum(below.high / lead, below.low / lead)


def leave(memory, at, step, numbers):
    """Leave four numbers in shared memory, `step` apart."""
    memory[np.uint32(at)], memory[np.uint32(at + step)] = numbers[0], numbers[1]
    memory[np.uint32(at + 2 * step)], memory[np.uint32(at + 3 * step)] = numbers[2], numbers[3]


def number(memory, at, peer):
    """A number in shared memory, as another thread block of a cluster has it."""
    return read_peer(memory, at, peer) if clustered else memory[np.uint32(at)]


def put(memory, at, step, state):
    """Leave a state in shared memory."""
    sums, distance, mass = state.below, state.distance, state.mass
    leave(memory, at, step, (state.maximum, state.at_maximum, sums.high, sums.low))
    if targets:
        leave(memory, at + 4 * step, step, (distance.high, distance.low, mass.high, mass.low))


def take(memory, at, step, peer):
    """A state from shared memory."""
    numbers = taken(memory, at, step, peer)
    below, distance, mass = Sum(numbers[2], numbers[3]), nothing, nothing
    if targets:
        sums = taken(memory, at + 4 * step, step, peer)
        distance, mass = Sum(sums[0], sums[1]), Sum(sums[2], sums[3])
    return State(numbers[0], below, numbers[1], distance, mass)


def taken(memory, at, step, peer):
    """Four numbers, as `leave` left them."""
    a, b = number(memory, at, peer), number(memory, at + step, peer)
    return a, b, number(memory, at + 2 * step, peer), number(memory, at + 3 * step, peer)
