"""Steps on blocks: contiguous elements of rows, one after the other or, of a tile, side by side.

Most are loops over vectors in which a formula stands.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastll.backend.numba.maths import cast, constants, exponential, formulas
from fastll.backend.numba.memory import size_of
from fastll.backend.numba.vector import (
    INLINE,
    lanes_of,
    load,
    load_ahead,
    read,
    splat,
    store,
    where_eq,
    widen,
    write,
)
from fastll.formulas.constants import SHIFT


@njit(**INLINE)
def lowest(like):
    """The vector of -inf."""
    return splat(-constants(like).infinity)


@njit(**INLINE)
def zeros(like):
    return splat(constants(like).zero)


@njit(**INLINE)
def cap_block(v, n, cap, out, slope, like):
    """softcap * tanh(x / softcap) into `out`; its derivative into `slope` unless that is 0."""
    size, cap = size_of(like), cast(cap, like)
    for j in range(0, n, lanes_of(like)):
        capped, derivative = formulas.softcap(load_ahead(v + j * size, n - j, splat(like)), cap)
        store(out + j * size, n - j, capped)
        if slope != 0:
            store(slope + j * size, n - j, derivative)


@njit(**INLINE)
def mask_block(v, b, n, out, like):
    """x where its weight is not 0, -inf elsewhere."""
    size, none, zero = size_of(like), lowest(like), zeros(like)
    for j in range(0, n, lanes_of(like)):
        x = load_ahead(v + j * size, n - j, none)
        weight = load_ahead(b + j * size, n - j, zero)
        store(out + j * size, n - j, where_eq(weight, zero, none, x))


@njit(**INLINE)
def target_block(t, w, n, keep, spread, out, like):
    """u = w (keep * t + spread), with t = 0 and w = 1 where their address is 0."""
    size, zero = size_of(like), zeros(like)
    keep, spread = cast(keep, like), cast(spread, like)
    for j in range(0, n, lanes_of(like)):
        u = splat(spread)
        if t != 0:
            u = formulas.smoothed(load_ahead(t + j * size, n - j, zero), keep, spread)
        if w != 0:
            u = u * load_ahead(w + j * size, n - j, zero)
        store(out + j * size, n - j, u)


@njit(**INLINE)
def subtract_block(out, u, n, scale, like):
    """out -= scale * u."""
    size, zero, scale = size_of(like), zeros(like), cast(scale, like)
    for j in range(0, n, lanes_of(like)):
        weight = load_ahead(u + j * size, n - j, zero)
        gradient = load(out + j * size, n - j, zero)
        store(out + j * size, n - j, formulas.less_target(gradient, weight, scale))


@njit(**INLINE)
def multiply_block(out, slope, n, like):
    """out *= slope."""
    size, zero = size_of(like), zeros(like)
    for j in range(0, n, lanes_of(like)):
        y = load(out + j * size, n - j, zero) * load(slope + j * size, n - j, zero)
        store(out + j * size, n - j, y)


@njit(**INLINE)
def scale_block(out, n, first, second, like):
    """out *= first * second, one after the other."""
    size, zero = size_of(like), zeros(like)
    first, second = cast(first, like), cast(second, like)
    for j in range(0, n, lanes_of(like)):
        store(out + j * size, n - j, load(out + j * size, n - j, zero) * first * second)


@njit(**INLINE)
def fill_block(out, n, value, like):
    size, values = size_of(like), splat(cast(value, like))
    for j in range(0, n, lanes_of(like)):
        store(out + j * size, n - j, values)


@njit(**INLINE)
def weighted_terms(x, weight, maxima, floors, magics):
    """(b exp(x) / 2**n of elements below the maximum, b of those equal to it) in float64."""
    e = formulas.below_maximum(x, maxima, exponential(x, floors, magics))
    # scaled back before the weight comes in, which may be as large as a number can be
    terms = widen(e) * 2.0**-SHIFT
    return terms * widen(weight), widen(formulas.at_maximum(x, maxima, weight))


@njit(**INLINE)
def distance_terms(x, u, maxima):
    return formulas.distance(x, u, maxima), u


# What follows is for a maximum that is infinite or enormous: one element after the other, `step` bytes
# apart, by the library's exp.


@njit
def sum_exact(v, step, n, maximum, like):
    """(sum of exp(x - maximum) below the maximum, count of elements equal to it).

    The sum is Kahan's.
    """
    e = 0.0
    k = 0.0
    lost = 0.0
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        if x == maximum:
            k += 1.0
        else:
            term = math.exp(x - maximum) - lost
            added = e + term
            lost = (added - e) - term
            e = added
    return e, k


@njit
def weighted_sum_exact(v, b, step, n, maximum, like):
    """The same with weights; those of both signs at an infinite maximum make it NaN."""
    e = 0.0
    k = 0.0
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        weight = np.float64(read(b + j * step, like))
        if x == maximum:
            k += weight * maximum if maximum == np.inf and weight != 0.0 else weight
        elif weight != 0.0:
            e += weight * math.exp(x - maximum)
    return e, k


@njit
def exp_exact(v, step, n, maximum, factor, out, like):
    """factor * exp(x - maximum); NaN throughout where the maximum is infinite."""
    for j in range(n):
        x = np.float64(read(v + j * step, like))
        y = math.exp(x - maximum) * factor if abs(maximum) < np.inf else np.nan
        write(out + j * step, cast(y, like))
