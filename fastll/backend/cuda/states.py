"""What a row is folded into: its running state, and how two of them become one.

Texts, bound to the names of a type: see `fastll.backend.cuda.variants`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.maths import *
from fastll.backend.cuda.primitives import read_peer

#: Most numbers of a state.
PARTS = 8


class State(NamedTuple):
    """The running state of a row, or of a part of it, with sums relative to the maximum.

    With r = below + (at_maximum - 1), the sum without one of the largest, log1p(r) keeps its digits
    when one element dominates.
    """

    maximum: float
    below: Sum  # of exp(x - maximum) over the elements below the maximum
    at_maximum: float  # number of elements at the maximum, or the sum of their weights
    distance: Sum  # of u (maximum - x), where u is a target that is more than a point
    mass: Sum  # of u


def identity():
    nothing = Sum(c.zero, c.zero)
    return State(-c.infinity, nothing, c.zero, nothing, nothing)


def finite(m):
    """A maximum as what distances are measured from."""
    return m if m > -c.infinity else c.zero


def farther(distance, mass, m, top):
    """Distances from a maximum m as those from another one, `top` >= m."""
    if mass != c.zero and m != top:
        return plus(distance, mass * (finite(top) - finite(m)))
    return distance


def exponentials_merged(a, b):
    """The maximum of two states, and the sums of exponentials relative to it."""
    if a.maximum == b.maximum:
        return a.maximum, add(a.below, b.below), a.at_maximum + b.at_maximum
    upper, lower = a, b
    if a.maximum < b.maximum:
        upper, lower = b, a
    if lower.maximum == -c.infinity:  # that of no elements; only a NaN counts
        below = Sum(upper.below.high + lower.below.high, upper.below.low)
        return upper.maximum, below, upper.at_maximum
    # the product may be a normal number where the exponential is none
    fall = exp_minus_scaled(lower.maximum, upper.maximum)
    more = plus(lower.below, lower.at_maximum)
    more = Sum((more.high * fall) * c.unshift, (more.low * fall) * c.unshift)
    return upper.maximum, add(upper.below, more), upper.at_maximum


def merged(a, b):
    """The state of two parts of a row."""
    m, below, at_maximum = exponentials_merged(a, b)
    distance, mass = a.distance, a.mass
    if targets:
        distance = farther(a.distance, a.mass.high, a.maximum, m)
        distance = add(distance, farther(b.distance, b.mass.high, b.maximum, m))
        mass = add(a.mass, b.mass)
    return State(m, below, at_maximum, distance, mass)


def joined(a, b):
    """Two running states (m, e, k) together; in float64."""
    nothing = Sum(c.zero, c.zero)
    m, below, at_maximum = exponentials_merged(
        State(a[0], Sum(a[1], c.zero), a[2], nothing, nothing),
        State(b[0], Sum(b[1], c.zero), b[2], nothing, nothing),
    )
    return m, below.high + below.low, at_maximum


def relative_to(lead, below):
    """A sum of `exponential` as one of exp(x - maximum)."""
    return Sum(below.high / lead, below.low / lead)


def put_sum(memory, at, step, value):
    memory[np.uint32(at)], memory[np.uint32(at + step)] = value.high, value.low


def take_sum(memory, at, step, peer):
    return Sum(number(memory, at, peer), number(memory, at + step, peer))


def number(memory, at, peer):
    """A number in shared memory, as another thread block of a cluster has it."""
    if clustered:
        return read_peer(memory, at, peer)
    return memory[np.uint32(at)]


def put(memory, at, step, state):
    """Leave a state in shared memory, its numbers `step` apart."""
    memory[np.uint32(at)], memory[np.uint32(at + 3 * step)] = state.maximum, state.at_maximum
    put_sum(memory, at + step, step, state.below)
    if targets:
        put_sum(memory, at + 4 * step, step, state.distance)
        put_sum(memory, at + 6 * step, step, state.mass)


def take(memory, at, step, peer):
    """A state from shared memory."""
    distance, mass = Sum(c.zero, c.zero), Sum(c.zero, c.zero)
    if targets:
        distance = take_sum(memory, at + 4 * step, step, peer)
        mass = take_sum(memory, at + 6 * step, step, peer)
    below = take_sum(memory, at + step, step, peer)
    at_maximum = number(memory, at + 3 * step, peer)
    return State(number(memory, at, peer), below, at_maximum, distance, mass)
