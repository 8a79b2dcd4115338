"""What a row is folded into, and what becomes of that, whatever the threads of a row are.

Texts, bound to the names of a variant: see `fastll.backend.cuda.variants`.
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


class Label(NamedTuple):
    """The label of a row, and what belongs to it."""

    number: int  # -1: none of the classes
    kept: bool  # whether it is not `ignore_index`
    logit: float
    weight: float
    slope: float  # of the cap


class Finished(NamedTuple):
    """What is known of a row when all of its elements are."""

    value: float
    lse: float
    maximum: float
    log_s: float
    factor: float  # of exp(x - maximum) in what is written
    at_label: float  # the gradient there
    scale: float  # of the gradient


class Scales(NamedTuple):
    """What exponentials are multiplied with to become what is written."""

    peak: float  # what that of the maximum becomes, before `second`
    first: float
    second: float


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


def no_label(kept):
    return Label(np.int64(-1), kept, c.zero, c.one, c.one)


def label_within(call, address):
    """(the label, whether it is kept); -1 for one outside of the classes, which is checked here, where
    the label is used."""
    y = read_label(address)
    kept = y != call.ignore_index
    return (y if 0 <= y < call.classes else np.int64(-1)), kept


def label_of(call, y, kept, logit):
    slope, weight = c.one, c.one
    if capped:
        logit, slope = softcap(logit, call.softcap)
    if weighted_classes:
        weight = read_weight(call.weight.address + y * call.weight.step)
    return Label(y, kept, logit, weight, slope)


def target_of(call, t, j):
    """u = w ((1 - eps) t + eps / C) of class j."""
    u = smoothed(t, call.keep, call.spread) if dense else call.spread
    if weighted_classes:
        u *= read_weight(call.weight.address + j * call.weight.step)
    return u


def gradient_scale(call):
    return call.scale * read_number(call.divisor) if call.divisor != 0 else call.scale


def finished(call, state, label, scale):
    """What becomes of the state of a row; `scale` is that of the gradient."""
    m = state.maximum
    rest = plus(state.below, state.at_maximum - c.one)
    if m == -c.infinity:
        rest = Sum(state.below.high, rest.low)  # 0, or NaN
    log_s = log1p_sum(rest)
    above = rest.high + rest.low
    lse, s = m + log_s, c.one + above
    value, factor, at_label = lse, c.one / s, c.zero
    if entropy:
        value, factor, at_label = cross_entropy(call, state, label, scale, log_s, above, s)
    if abs(m) == c.infinity or (sparse and label.number < 0):
        factor, at_label = c.nan, c.nan
    return Finished(value, lse, m, log_s, factor, at_label, scale)


def cross_entropy(call, state, label, scale, log_s, rest, s):
    """Loss, factor of exp(x - m) in the gradient, gradient at the label."""
    m, at_point, u_y, e_y = state.maximum, c.zero, c.zero, c.zero
    mass, distance = state.mass.high + state.mass.low, state.distance.high + state.distance.low
    if sparse:
        at_point, u_y = call.keep * label.weight, call.spread * label.weight
        e_y = exp_minus_scaled(label.logit, m) * c.unshift
    loss = cross_entropy_loss(m, log_s, at_point, label.logit, mass, distance, call.z_loss)
    if (m == -c.infinity and call.classes > 0) or (sparse and label.number < 0):
        loss = c.nan
    if sparse and not label.kept:
        loss = c.zero
    # e_y - 1 cancels only where the label is the maximum, and is exact there
    total, at_label = cross_entropy_gradient(
        m + log_s, s, rest, at_point, u_y, mass, call.z_loss, e_y, e_y - c.one
    )
    return loss, scale * total / s, scale * label.slope * at_label


def store_results(call, value_address, lse_address, row):
    if call.value.address != 0:
        write_value(value_address, row.value)
    if call.lse.address != 0:
        write_value(lse_address, row.lse)


def scales_of(factor, fall, lead):
    """The `Scales` of a factor of exp(x - m), where exponentials are relative to a maximum M <= m and
    `fall` is 2**SHIFT exp(M - m).

    The product of all factors may be no normal number where results are: then it is applied in two
    steps, of which the second one is exact.
    """
    down, whole = fall * c.unshift, factor * fall
    peak = factor * down if down >= c.least else whole * c.unshift
    first = peak / lead
    if abs(first) >= c.least:
        return Scales(peak, first, c.one)
    return Scales(whole / c.unshift, whole / (lead * c.unshift), c.unshift * c.unshift)


def term_of(call, x, ref):
    """The exponential of an element, and the slope of its cap."""
    slope = c.one
    if capped:
        x, slope = softcap(x, call.softcap)
    return relative(x, ref), slope


def product_of(e, slope, u, ref, row, scales):
    """An element of the output, by its exponential."""
    g = probability(e, ref.lead, scales.peak, scales.first)
    if entropy or clustered:  # the factor of a softmax is 1 / s, and needs no second one
        g *= scales.second
    if targets:
        g = less_target(g, u, row.scale)
    if capped:
        g *= slope
    return g


def log_of(x, row):
    """An element of a log-softmax."""
    m = row.maximum
    value = log_probability(x, m, row.log_s)
    if abs(m) == c.infinity and (value > -c.infinity or m < c.zero):
        value = c.nan
    return value
