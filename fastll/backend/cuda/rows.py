"""What a row is folded into, and what becomes of that: the same whatever the threads of a row are."""

# mypy: ignore-errors

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import maths
from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.maths import Sum
from fastll.backend.cuda.primitives import (
    compute_type,
    integer_reader,
    read_peer,
    reader,
    size_of,
    value_format,
    writer,
)
from fastll.formulas import TERMS


class Variant(NamedTuple):
    """What a kernel is made for: the operation, and how its operands are stored (None: not there)."""

    operation: str
    x: str
    second: str | None = None  # weights of elements, a dense target or a second distribution
    labels: str | None = None
    weight: str | None = None  # of classes
    out: str | None = None
    state: bool = False  # whether there is a running state
    signed: bool = False  # whether the sign of a log-sum-exp is asked for
    smoothed: bool = False
    capped: bool = False
    modern: bool = False  # compute capability 8 or more
    staged: bool = False  # for threads on their own: whether rows go through shared memory
    # for teams, which have vectors:
    vectors: int = 0  # of a thread
    cluster: int = 1  # thread blocks that share a row
    chunked: bool = False  # whether a block takes its part of a row in chunks
    aligned: bool = False  # whether every row begins and ends with a vector


class Kind(NamedTuple):
    """A variant's operation, as the phases ask for it."""

    real: type  # what is computed in
    terms: bool  # a sum of terms
    weighted: bool  # a log-sum-exp of weighted elements
    exact: bool  # a log-sum-exp that is finished in float64: weighted, or of a running state
    entropy: bool  # a cross-entropy
    dense: bool
    sparse: bool
    targets: bool  # a cross-entropy with more than a point for a target
    logs: bool
    f: SimpleNamespace


@functools.cache
def kind(variant):
    weighted = variant.operation == "logsumexp" and variant.second is not None
    entropy = variant.operation == "cross_entropy"
    dense, sparse = entropy and variant.second is not None, entropy and variant.labels is not None
    # weights may cancel, and what is left of a sum must not be its rounding errors
    real = np.float64 if weighted else compute_type(variant.x)
    return Kind(
        real=real,
        terms=variant.operation in TERMS,
        weighted=weighted,
        exact=variant.operation == "logsumexp" and (weighted or variant.state or variant.signed),
        entropy=entropy,
        dense=dense,
        sparse=sparse,
        targets=dense or variant.smoothed,
        logs=variant.operation == "log_softmax",
        f=maths.of(real, size_of(variant.x) == 2 and not weighted, variant.modern),
    )


class State(NamedTuple):
    """The running state of a row, or of a part of it, with sums relative to the maximum.

    With r = below + (count - 1), the sum without one of the largest, log1p(r) keeps its digits when one
    element dominates.
    """

    maximum: float
    below: Sum  # of exp(x - maximum) over the elements below the maximum
    at_maximum: float  # the number of elements at the maximum, or the sum of their weights
    distance: Sum  # of u (maximum - x), where u is a target that is more than a point
    mass: Sum  # of u


@functools.cache
def states(real, targets):
    """The functions of `State` for numbers of the type `real`; `targets`: with distance and mass."""
    f = maths.of(real)
    zero, infinity, unshift = f.constant.zero, f.constant.infinity, f.constant.unshift
    add, exp_minus_scaled = f.add, f.exp_minus_scaled

    @device
    def identity():
        nothing = Sum(zero, zero)
        return State(-infinity, nothing, zero, nothing, nothing)

    @device
    def finite(m):
        """A maximum as what distances are measured from."""
        return m if m > -infinity else zero

    @device
    def farther(distance, mass, m, top):
        """Distances from a maximum m as those from another one, `top` >= m."""
        if mass != zero and m != top:
            return add(distance, Sum(mass * (finite(top) - finite(m)), zero))
        return distance

    @device
    def exponentials_merged(a, b):
        """The maximum of two states, and the sums of exponentials relative to it."""
        m, n = a.maximum, b.maximum
        if m == n:
            return m, add(a.below, b.below), a.at_maximum + b.at_maximum
        upper, lower = a, b
        if m < n:
            upper, lower = b, a
        if lower.maximum == -infinity:  # that of no elements; only a NaN counts
            below = Sum(upper.below.high + lower.below.high, upper.below.low)
            return upper.maximum, below, upper.at_maximum
        # the product may be a normal number where the exponential is none
        fall = exp_minus_scaled(lower.maximum, upper.maximum)
        more = add(lower.below, Sum(lower.at_maximum, zero))
        more = Sum((more.high * fall) * unshift, (more.low * fall) * unshift)
        return upper.maximum, add(upper.below, more), upper.at_maximum

    @device
    def merged(a, b):
        """The state of two parts of a row."""
        m, below, count = exponentials_merged(a, b)
        distance, mass = a.distance, a.mass
        if targets:
            distance = farther(a.distance, a.mass.high, a.maximum, m)
            distance = add(distance, farther(b.distance, b.mass.high, b.maximum, m))
            mass = add(a.mass, b.mass)
        return State(m, below, count, distance, mass)

    return SimpleNamespace(
        identity=identity, merged=merged, finite=finite, farther=farther, **_passing(real, targets)
    )


def _passing(real, targets):
    """Functions that leave a state in shared memory, its numbers `step` apart, and take it back."""
    zero = real(0)

    @device
    def put(memory, at, step, state):
        memory[np.uint32(at)], memory[np.uint32(at + step)] = state.maximum, state.below.high
        memory[np.uint32(at + 2 * step)] = state.below.low
        memory[np.uint32(at + 3 * step)] = state.at_maximum
        if targets:
            memory[np.uint32(at + 4 * step)] = state.distance.high
            memory[np.uint32(at + 5 * step)] = state.distance.low
            memory[np.uint32(at + 6 * step)] = state.mass.high
            memory[np.uint32(at + 7 * step)] = state.mass.low

    def taker(number):
        @device
        def take_sum(memory, at, step, peer):
            return Sum(number(memory, at, peer), number(memory, at + step, peer))

        @device
        def take(memory, at, step, peer):
            maximum, below = number(memory, at, peer), take_sum(memory, at + step, step, peer)
            count = number(memory, at + 3 * step, peer)
            distance, mass = Sum(zero, zero), Sum(zero, zero)
            if targets:
                distance = take_sum(memory, at + 4 * step, step, peer)
                mass = take_sum(memory, at + 6 * step, step, peer)
            return State(maximum, below, count, distance, mass)

        return take

    own = device(lambda memory, at, peer: memory[np.uint32(at)])
    of_peer = device(lambda memory, at, peer: read_peer(memory, at, peer))
    return {"put": put, "take": taker(own), "take_from_peer": taker(of_peer)}


@functools.cache
def sums(real):
    """What `states` has, of a fold whose state is one `Sum`."""
    zero = real(0)

    @device
    def put(memory, at, step, state):
        memory[np.uint32(at)], memory[np.uint32(at + step)] = state.high, state.low

    return SimpleNamespace(
        identity=device(lambda: Sum(zero, zero)),
        merged=maths.of(real).add,
        put=put,
        take=device(
            lambda memory, at, step, peer: Sum(memory[np.uint32(at)], memory[np.uint32(at + step)])
        ),
        take_from_peer=device(
            lambda memory, at, step, peer: Sum(
                read_peer(memory, at, peer), read_peer(memory, at + step, peer)
            )
        ),
    )


def folded_into(variant):
    """The functions of what the rows of a variant are folded into."""
    k = kind(variant)
    return sums(k.real) if k.terms else states(k.real, k.targets)


@functools.cache
def term_maker(variant):
    """Function (values, second, i) of the term of the element that a thread holds at i."""
    formula = getattr(kind(variant).f, TERMS[variant.operation].formula.__name__)
    if variant.second is None:
        return device(lambda values, second, i: formula(values[i]))
    return device(lambda values, second, i: formula(values[i], second[i]))


#: Most numbers of a state.
PARTS = 8


class Label(NamedTuple):
    """The label of a row, and what belongs to it."""

    number: int  # -1: none of the classes
    kept: bool  # whether it is not `ignore_index`
    logit: float
    weight: float
    slope: float  # of the cap


@functools.cache
def labels(variant):
    """Function (call, address of the label, pick, place) of a `Label`.

    The class count is compared here, where the label is used. `pick` (call, place, index) is the logit.
    """
    k = kind(variant)
    zero, one, capped, weighted = k.f.constant.zero, k.f.constant.one, variant.capped, variant.weight
    read_label, softcap = integer_reader(variant.labels or "int64"), k.f.softcap
    read_weight = reader(variant.weight or value_format(k.real), k.real)

    def finder(pick):
        @device
        def find(call, address, place, memory):
            y = read_label(address)
            kept = y != call.ignore_index
            if y < 0 or y >= call.classes:
                return Label(np.int64(-1), kept, zero, one, one)
            logit, slope, weight = pick(call, place, memory, y), one, one
            if capped:
                logit, slope = softcap(logit, call.softcap)
            if weighted is not None:
                weight = read_weight(call.weight.address + y * call.weight.step)
            return Label(y, kept, logit, weight, slope)

        return find

    return finder


class Finished(NamedTuple):
    """What is known of a row when all of its elements are."""

    value: float
    lse: float
    maximum: float
    log_s: float
    factor: float  # of exp(x - maximum) in what is written
    at_label: float  # the gradient there
    scale: float  # of the gradient


@functools.cache
def finishes(variant):
    """Function (call, state, label, scale of the gradient) of what is `Finished` of a row."""
    k = kind(variant)
    c, f = k.f.constant, k.f
    one, zero, infinity, nan = c.one, c.zero, c.infinity, c.nan
    add, log1p_sum, sparse, entropy = f.add, f.log1p_sum, k.sparse, k.entropy
    cross_entropy = _cross_entropy(k)

    @device
    def sum_of_terms(call, state, label, scale):
        value = call.scale * (state.high + state.low)
        return Finished(value, zero, zero, zero, zero, zero, scale)

    @device
    def exponentials(call, state, label, scale):
        m = state.maximum
        rest = add(state.below, Sum(state.at_maximum - one, zero))
        if m == -infinity:
            rest = Sum(state.below.high, rest.low)  # 0, or NaN
        log_s = log1p_sum(rest)
        above = rest.high + rest.low
        lse, s = m + log_s, one + above
        value, factor, at_label = lse, one / s, zero
        if entropy:
            value, factor, at_label = cross_entropy(call, state, label, scale, log_s, above, s)
        if abs(m) == infinity or (sparse and label.number < 0):
            factor, at_label = nan, nan
        return Finished(value, lse, m, log_s, factor, at_label, scale)

    return sum_of_terms if k.terms else exponentials


def gradient_scales(variant):
    """Function (call) of the factor of a gradient."""
    read = reader(value_format(kind(variant).real))

    @device
    def scale(call):
        return call.scale * read(call.divisor) if call.divisor != 0 else call.scale

    return scale


def _cross_entropy(k):
    """Function of (loss, factor of exp(x - m) in the gradient, gradient at the label)."""
    c, f, sparse = k.f.constant, k.f, k.sparse
    zero, one, infinity, nan = c.zero, c.one, c.infinity, c.nan
    loss_of, gradient_of, exp_minus = f.cross_entropy_loss, f.cross_entropy_gradient, f.exp_minus

    @device
    def cross_entropy(call, state, label, scale, log_s, rest, s):
        m = state.maximum
        mass, distance = state.mass.high + state.mass.low, state.distance.high + state.distance.low
        at_point, u_y = zero, zero
        if sparse:
            at_point, u_y = call.keep * label.weight, call.spread * label.weight
        loss = loss_of(m, log_s, at_point, label.logit, mass, distance, call.z_loss)
        if (m == -infinity and call.classes > 0) or (sparse and label.number < 0):
            loss = nan
        if sparse and not label.kept:
            loss = zero
        e_y = exp_minus(label.logit, m) if sparse else zero
        total, at_label = gradient_of(
            m + log_s, s, rest, at_point, u_y, mass, call.z_loss, e_y, e_y - one
        )
        return loss, scale * total / s, scale * label.slope * at_label

    return cross_entropy


class Scales(NamedTuple):
    """What exponentials are multiplied with to become what is written."""

    peak: float  # and what that of the maximum becomes, before `second`
    first: float
    second: float


@functools.cache
def writes(variant):
    """The functions that make what is written of the elements of a row."""
    k = kind(variant)
    c, f = k.f.constant, k.f
    one, infinity, nan = c.one, c.infinity, c.nan
    least, unshift = c.least, c.unshift
    shifted = one / unshift
    probability, less_target, log_probability = f.probability, f.less_target, f.log_probability
    softcap, relative = f.softcap, f.relative
    capped, targets = variant.capped, k.targets
    twice = k.entropy or variant.cluster > 1

    @device
    def scales(factor, fall, lead):
        """The `Scales` of a factor of exp(x - m), with exponentials relative to another maximum.

        `fall` is 2**SHIFT exp(that maximum - m). The product of all factors may be no normal number
        where results are: then it is applied in two steps, of which the second one is exact.
        """
        down, whole = fall * unshift, factor * fall
        peak = factor * down if down >= least else whole * unshift
        first = peak / lead
        if abs(first) >= least:
            return Scales(peak, first, one)
        return Scales(whole * shifted, whole / (lead * unshift), unshift * unshift)

    @device
    def term(x, ref, cap):
        """The exponential of an element, and the slope of its cap."""
        slope = one
        if capped:
            x, slope = softcap(x, cap)
        return relative(x, ref), slope

    @device
    def written(e, slope, u, ref, row, scales):
        """An element of the output, by its exponential."""
        g = probability(e, ref.lead, scales.peak, scales.first)
        if twice:
            g *= scales.second
        if targets:
            g = less_target(g, u, row.scale)
        if capped:
            g *= slope
        return g

    @device
    def log_written(x, m, log_s):
        """An element of a log-softmax."""
        value = log_probability(x, m, log_s)
        if abs(m) == infinity and (value > -infinity or m < c.zero):
            value = nan
        return value

    return SimpleNamespace(scales=scales, term=term, written=written, log_written=log_written)


@functools.cache
def target_maker(variant):
    """Function (call, target of class j, j) of u = w ((1 - eps) t + eps / C)."""
    k = kind(variant)
    smoothed, dense, weighted = k.f.smoothed, k.dense, variant.weight is not None
    read_weight = reader(variant.weight or value_format(k.real), k.real)

    @device
    def target(call, t, j):
        u = smoothed(t, call.keep, call.spread) if dense else call.spread
        if weighted:
            u *= read_weight(call.weight.address + j * call.weight.step)
        return u

    return target


def results(variant):
    """Function (call, place, finished) that stores the value and the lse of a row."""
    write = writer(value_format(compute_type(variant.x)), kind(variant).real)

    @device
    def store(call, value_address, lse_address, finished):
        if call.value.address != 0:
            write(value_address, finished.value)
        if call.lse.address != 0:
            write(lse_address, finished.lse)

    return store
