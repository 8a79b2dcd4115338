"""The formulas on a GPU, one number at a time, and what only its reductions need, as further texts.

For half-precision input, exponentials are the machine's own approximation of 2**x, right to 2 ulp of
float32, as that input has 8 or 11 bits, and its results no more: see `fastll.backend.cuda.halves`.
"""

# mypy: ignore-errors

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda import halves, primitives
from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.primitives import exponent, fma, power_of_two, where_gt
from fastll.formulas import bind, constants, texts
from fastll.formulas.maths import exponential, series, split


class Sum(NamedTuple):
    """A sum in two parts: `low` is what rounding took from `high`."""

    high: float
    low: float


class Reference(NamedTuple):
    """What the exponentials of a row, or of a part of it, are relative to."""

    maximum: float
    offset: float  # to be subtracted from elements: 0 for all but enormous maxima
    floor: float  # of `exponential`
    magic: float
    lead: float  # `exponential` of the maximum; 1 where that is infinite


#: Of the type that the texts below are bound to: its constants, the limit of maxima that have an
#: exponent, and the largest number.
c, limit, largest = constants.of("float32"), constants.LIMIT, np.inf


def reference(m):
    """The `Reference` of a maximum. An enormous or infinite one has no exponent, but an offset."""
    n, offset = c.zero, c.zero
    if abs(m) < limit:  # to the nearest whole number
        n = fma(m, c.log2e, c.magic) - c.magic
    elif abs(m) <= largest:
        offset = m
    elif m > c.zero:
        offset = largest
    floor, magic = fma(n, c.ln2, c.scaled_floor), c.scaled_magic - n
    lead = exponential(m - offset, floor, magic) if abs(m) <= largest else c.one
    return Reference(m, offset, floor, magic, lead)


def relative(x, ref):
    """The `exponential` of an element."""
    return exponential(x - ref.offset, ref.floor, ref.magic)


def relative_near(x, ref):
    """The same where the offset is 0."""
    return exponential(x, ref.floor, ref.magic)


def offset_of(ref):
    return ref.offset


def exp_minus_scaled(x, m):
    """exp(x - m) 2**SHIFT, x <= m, right to an ulp also where x - m is not a number of the type.

    The rounding error of the difference, found as in Knuth's two-sum, corrects the exponential:
    otherwise a difference of d would cost d roundoffs.
    """
    if x == m:
        return c.one / c.unshift
    d = x - m
    if not d > -c.infinity:
        return d - d if d != d else c.zero
    back = d - x
    error = (x - (d - back)) - (m + back)
    q, s = split(d, c.scaled_floor, c.scaled_magic)
    e = fma(q, s, s)
    return fma(e, error, e)


def add(a, b):
    """The sum of two `Sum`, the same in either order: Knuth."""
    s = a.high + b.high
    back = s - a.high
    error = (a.high - (s - back)) + (b.high - back)
    if not abs(s) < c.infinity:  # the error of an infinity is NaN
        error = c.zero
    return Sum(s, (a.low + b.low) + error)


def plus(a, number):
    """The sum of a `Sum` and a number."""
    return add(a, Sum(number, c.zero))


def log1p_sum(r):
    """log(1 + r) of a `Sum`, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.

    What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
    """
    s = r.high + c.one
    if not (s > c.zero and s < c.infinity):
        return -c.infinity if s == c.zero else s
    back = s - c.one
    error = ((r.high - back) + (c.one - (s - back))) + r.low
    n = exponent(s)
    down = power_of_two(-n)
    fraction = series(fma(error, down, fma(s, down, -c.one)))
    return fma(n, c.ln2_high, fma(n, c.ln2_low, fraction))


_TEXTS = texts(sys.modules[__name__])
_OPERATIONS = (
    "fma",
    "where_eq",
    "where_gt",
    "where_ge",
    "horner",
    "exponent_bits",
    "exponent",
    "power_of_two",
)


@cache
def of(real, approximate=False, modern=False) -> SimpleNamespace:
    """The formulas, and the texts above, for numbers of the type `real`.

    `approximate`: for half-precision input; `modern`: for compute capability 8 or more.
    """
    c = constants.of(real.__name__)
    names = {name: getattr(primitives, name) for name in _OPERATIONS} | {
        "c": c,
        "constants": device(lambda x: c),
        "limit": real(constants.LIMIT),
        "largest": np.finfo(real).max,
        "maximum": device(lambda a, b: where_gt(a, b, a, b)),
        "absolute": device(lambda a: abs(a)),
        "filled": device(lambda x, number: real(number)),
        "downscale": device(lambda x: power_of_two(-exponent(x))),
        "Sum": Sum,
        "Reference": Reference,
    }
    if modern and real is np.float32:
        names["maximum"] = primitives.larger_or_nan
    found = {text.__name__: text for text in (*texts(), *_TEXTS)}
    if approximate:
        names |= halves.NAMES
        found |= {text.__name__: text for text in texts(halves)}
    return bind(names, device, list(found.values()))
