"""The formulas on a GPU, one number at a time, and what only its reductions need.

For half-precision input, `exponential` is the machine's own approximation of 2**x, right to 2 ulp of
float32: that input has 8 or 11 bits, and its results no more.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastll import formulas
from fastll.backend.cuda.compiler import device
from fastll.backend.cuda.primitives import (
    approximate_exp2,
    exponent,
    exponent_bits,
    fma,
    horner,
    larger_or_nan,
    power_of_two,
    where_eq,
    where_ge,
    where_gt,
)
from fastll.formulas import constants


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


@functools.cache
def of(real, approximate=False, modern=False):
    """The formulas for numbers of the type `real`, and the functions of `_reductions` and `_sums`.

    `approximate`: for half-precision input; `modern`: for compute capability 8 or more.
    """
    c = constants.of(np.dtype(real).name)
    operations = {
        "constants": device(lambda x: c),
        "fma": fma,
        "maximum": device(lambda a, b: where_gt(a, b, a, b)),
        "absolute": device(lambda a: abs(a)),
        "where_eq": where_eq,
        "where_gt": where_gt,
        "where_ge": where_ge,
        "horner": horner,
        "exponent_bits": exponent_bits,
        "exponent": exponent,
        "downscale": device(lambda x: power_of_two(-exponent(x))),
    }
    if modern and real is np.float32:
        operations["maximum"] = larger_or_nan
    if approximate:
        operations["exponential"] = _approximation(c, operations["maximum"])
    f = formulas.bind(operations, device)
    return SimpleNamespace(constant=c, **vars(f), **_references(f, c, real), **_sums(f, c))


def _approximation(c, maximum):
    log2e_low = np.float32(1 / math.log(2) - float(c.log2e))

    @device
    def exponential(x, floor, magic):
        """exp(x) 2**(SHIFT - n_ref), as in `fastll.formulas.maths`."""
        y = maximum(floor, x)
        z = fma(y, c.log2e, magic)
        f = fma(y, log2e_low, fma(y, c.log2e, magic - z))
        return approximate_exp2(f) * exponent_bits(z)

    return exponential


def _references(f, c, real):
    """Exponentials relative to a maximum."""
    exponential, split = f.exponential, f.split
    limit, largest = real(constants.LIMIT), np.finfo(real).max
    whole = real(1.5 * 2 ** (23 if real is np.float32 else 52))  # what a sum with it rounds to
    zero, one, infinity, unshift = c.zero, c.one, c.infinity, c.unshift
    floor_0, magic_0, log2e, ln2 = c.scaled_floor, c.scaled_magic, c.log2e, c.ln2
    shifted = real(2.0**constants.SHIFT)

    @device
    def reference(m):
        """The `Reference` of a maximum. An enormous or infinite one has no exponent, but an offset."""
        n, offset = zero, zero
        if abs(m) < limit:
            n = fma(m, log2e, whole) - whole
        elif abs(m) <= largest:
            offset = m
        elif m > zero:
            offset = largest
        floor, magic = fma(n, ln2, floor_0), magic_0 - n
        lead = exponential(m - offset, floor, magic) if abs(m) <= largest else one
        return Reference(m, offset, floor, magic, lead)

    @device
    def relative(x, ref):
        """The `exponential` of an element."""
        return exponential(x - ref.offset, ref.floor, ref.magic)

    @device
    def exp_minus_scaled(x, m):
        """exp(x - m) 2**SHIFT, x <= m, right to an ulp also where x - m is not a number of the type.

        The rounding error of the difference, found as in Knuth's two-sum, corrects the exponential:
        otherwise a difference of d would cost d roundoffs.
        """
        if x == m:
            return shifted
        d = x - m
        if not d > -infinity:
            return d - d if d != d else zero
        back = d - x
        error = (x - (d - back)) - (m + back)
        q, s = split(d, floor_0, magic_0)
        e = fma(q, s, s)
        return fma(e, error, e)

    @device
    def exp_minus(x, m):
        """exp(x - m), x <= m."""
        return exp_minus_scaled(x, m) * unshift

    functions = reference, relative, exp_minus_scaled, exp_minus
    return {function.__name__: function for function in functions}


def _sums(f, c):
    """Sums in two parts."""
    series, zero, one, infinity = f.series, c.zero, c.one, c.infinity
    ln2_high, ln2_low = c.ln2_high, c.ln2_low

    @device
    def add(a, b):
        """The sum of two `Sum`, the same in either order: Knuth."""
        s = a.high + b.high
        back = s - a.high
        error = (a.high - (s - back)) + (b.high - back)
        if not abs(s) < infinity:  # the error of an infinity is NaN
            error = zero
        return Sum(s, (a.low + b.low) + error)

    @device
    def log1p_sum(r):
        """log(1 + r) of a `Sum`, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.

        What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
        """
        s = r.high + one
        if not (s > zero and s < infinity):
            return -infinity if s == zero else s
        back = s - one
        error = ((r.high - back) + (one - (s - back))) + r.low
        n = exponent(s)
        down = power_of_two(-n)
        fraction = series(fma(error, down, fma(s, down, -one)))
        return fma(n, ln2_high, fma(n, ln2_low, fraction))

    return {"add": add, "log1p_sum": log1p_sum}
