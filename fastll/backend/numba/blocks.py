"""Steps on blocks: contiguous elements of rows, one after the other or, of a tile, side by side.

Most are loops over vectors in which a formula stands.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np

from fastll.backend.numba import vector
from fastll.backend.numba.maths import cast, exponential, formulas, lowest, zeros
from fastll.backend.numba.memory import until_line
from fastll.backend.numba.vector import (
    inline,
    lanes_of,
    load,
    load_ahead,
    read,
    size_of,
    splat,
    store,
    write,
)
from fastll.formulas import TERMS
from fastll.formulas.constants import SHIFT


@inline
def cap(v, n, softcap, out, slope, like):
    """softcap * tanh(x / softcap) into `out`; its derivative into `slope` unless that is 0."""
    size, softcap = size_of(like), cast(softcap, like)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, vector.splat(like))
        capped, derivative = formulas.softcap(x, softcap)
        store(out + j * size, n - j, capped)
        if slope != 0:
            store(slope + j * size, n - j, derivative)


@inline
def mask(v, b, n, out, like):
    """x where its weight is not 0, -inf elsewhere."""
    size, none, zero = size_of(like), lowest(like), zeros(like)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, none)
        weight = load_ahead(b + j * size, n - j, zero)
        store(out + j * size, n - j, vector.where_eq(weight, zero, none, x))


@inline
def target(t, w, n, keep, spread, out, like):
    """u = w (keep * t + spread), with t = 0 and w = 1 where their address is 0."""
    size, zero = size_of(like), zeros(like)
    keep, spread = cast(keep, like), cast(spread, like)
    for j in range(0, n, lanes_of(like)):
        u = vector.splat(spread)
        if t != 0:
            u = formulas.smoothed(load_ahead(t + j * size, n - j, zero), keep, spread)
        if w != 0:
            u = u * load_ahead(w + j * size, n - j, zero)
        store(out + j * size, n - j, u)


@inline
def subtract(out, u, n, scale, like):
    """out -= scale * u."""
    size, zero, scale = size_of(like), zeros(like), cast(scale, like)
    for j in range(0, n, lanes_of(like)):
        weight = load_ahead(u + j * size, n - j, zero)
        gradient = load(out + j * size, n - j, zero)
        store(out + j * size, n - j, formulas.less_target(gradient, weight, scale))


@inline
def slope(p, v, n, maximum, mean, out, like):
    """p ((maximum - x) - mean)."""
    size, zero = size_of(like), zeros(like)
    maximum, mean = cast(maximum, like), cast(mean, like)
    for j in range(0, n, lanes_of(like)):
        y = load(p + j * size, n - j, zero), load(v + j * size, n - j, zero)
        store(out + j * size, n - j, formulas.entropy_slope(*y, maximum, mean))


@inline
def multiply(out, slope, n, like):
    """out *= slope."""
    size, zero = size_of(like), zeros(like)
    for j in range(0, n, lanes_of(like)):
        y = load(out + j * size, n - j, zero) * load(slope + j * size, n - j, zero)
        store(out + j * size, n - j, y)


@inline
def scale(v, n, first, second, out, like):
    """x * first * second, one after the other, into `out`, which may be where x is."""
    size, zero = size_of(like), zeros(like)
    first, second = cast(first, like), cast(second, like)
    for j in range(0, n, lanes_of(like)):
        store(out + j * size, n - j, load_ahead(v + j * size, n - j, zero) * first * second)


@inline
def fill(out, n, value, streamed, like):
    """A number in all elements."""
    size, lanes, values = size_of(like), lanes_of(like), splat(cast(value, like))
    head = min(n, until_line(out, like)) if streamed else 0
    store(out, head, values)
    for j in range(head, n, lanes):
        if streamed and n - j >= lanes:
            vector.stream(out + j * size, values)
        else:
            store(out + j * size, n - j, values)


@inline
def stream_block(v, n, out, like):
    """Copy numbers, whole lines past the caches."""
    size, lanes, zero = size_of(like), lanes_of(like), zeros(like)
    head = min(n, until_line(out, like))
    whole = head + (n - head) // lanes * lanes
    store(out, head, load(v, head, zero))
    for j in range(head, whole, lanes):
        vector.stream(out + j * size, read(v + j * size, zero))
    store(out + whole * size, n - whole, load(v + whole * size, n - whole, zero))


# Pairs of terms of an element x and a second one, to be summed


@inline
def weighted_terms(x, weight, maxima, floors, magics):
    """(b exp(x) / 2**n of elements below the maximum, b of those equal to it) in float64."""
    e = formulas.below_maximum(x, maxima, exponential(x, floors, magics))
    # scaled back before the weight comes in, which may be as large as a number can be
    terms = vector.widen(e) * 2.0**-SHIFT
    return terms * vector.widen(weight), vector.widen(formulas.at_maximum(x, maxima, weight))


@inline
def distance_terms(x, u, maxima):
    return formulas.distance(x, u, maxima), u


@inline
def entropy_term(e, x, maximum, floor):
    """e (maximum - x) of an `exponential` e, which is 0 up to the floor: there it stays finite."""
    return e * (maximum - vector.maximum(floor, x))


@inline
def divergence_term(e, t, maximum, x, x_maximum):
    """e ((x_maximum - x) - (maximum - t)) of the `exponential` e of t, 0 where that is."""
    return formulas.product(e, formulas.excess(x, x_maximum, t, maximum))


def term_of(operation):
    """The term of an operation of `TERMS`, with 0 for a second one."""
    formula = getattr(formulas, TERMS[operation].formula.__name__)

    def of_one(x, second):
        return formula(x), x

    def of_two(x, second):
        return formula(x, second), x

    return vector.inlined(of_one if TERMS[operation].inputs == 1 else of_two, f"{operation}_terms")


# What follows is for a maximum that is infinite or enormous: one element after the other, `step` bytes
# apart, by the library's exp. Logits are multiplied by `tau`.


@vector.shared
def add_exactly(row, v, tau, step, n, like):
    """Add to a row the exponentials of elements below the maximum, and count those equal to it.

    The sum is Kahan's.
    """
    e = 0.0
    lost = 0.0
    for j in range(n):
        x = np.float64(read(v + j * step, like) * tau)
        if x == row.maximum:
            row.at_maximum += 1.0
        else:
            term = math.exp(x - row.maximum) - lost
            added = e + term
            lost = (added - e) - term
            e = added
    row.below += e


@vector.shared
def add_distances_exactly(row, v, other, other_maximum, tau, step, n, like):
    """Add to a row the exponentials times the distances; see `divergence_term` for another array's."""
    away = 0.0
    m = row.maximum
    for j in range(n if abs(m) < np.inf else 0):
        x = np.float64(read(v + j * step, like) * tau)
        distance = m - x
        if other != 0:
            y = np.float64(read(other + j * step, like) * tau)
            distance = formulas.excess(y, other_maximum, x, m)
        away += formulas.product(math.exp(x - m), distance)
    row.away += away


@vector.shared
def add_weighted_exactly(row, v, b, step, n, like):
    """The same with weights.

    Those of both signs at an infinite maximum make it NaN, as does an infinite one at -inf.
    """
    e = 0.0
    k = 0.0
    m = row.maximum
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        weight = np.float64(read(b + j * step, like))
        if x == -np.inf and weight != 0.0:
            e += weight * 0.0
        elif x == m:
            k += weight * m if m == np.inf and weight != 0.0 else weight
        elif weight != 0.0:
            e += weight * math.exp(x - m)
    row.below += e
    row.at_maximum += k


@vector.shared
def exp_exactly(v, step, n, maximum, factor, out, like):
    """factor * exp(x - maximum); NaN throughout where the maximum is infinite."""
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        y = math.exp(x - maximum) * factor if abs(maximum) < np.inf else np.nan
        write(out + j * step, cast(y, like))
