"""Exponentials of half-precision input: what takes the place of texts of `maths`.

Those of a row are exp(x - m) ~ 2**(x slope + intercept), with slope = log2 e and intercept = -m slope:
one fused operation and the machine's approximation of 2**x. The rounding of an exponent d is a relative
error of d / 2 roundoffs, as that of x - m would be. The rounding of the intercept is one factor of all
exponentials of the row, that of the maximum included, which is `lead`: it cancels. From `STEEP` on it
would not stay small; but there all elements below the maximum are so far from it that their
exponentials are 0. Any slope does that of at least 2 over the distance of neighbours, and a power of
two makes no rounding errors.

What is written is made of exponentials times 2**SHIFT, so that those keep their digits that are less
than the smallest normal number. Exponents are then less than 128, and their rounding at most 2**-18:
less than half precision shows.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.primitives import (
    approximate_exp2,
    exponent,
    exponent_bits,
    fma,
    power_of_two,
)
from fastll.formulas import constants
from fastll.formulas.vocabulary import absolute, maximum


class Line(NamedTuple):
    """What the exponentials of a row are relative to: the exponent of 2 is x slope + intercept."""

    maximum: float
    slope: float
    intercept: float
    lead: float  # the exponential of the maximum; 1 where that is infinite


#: Maxima of this magnitude are those of bfloat16, whose neighbours are at least 2**9 apart there.
STEEP = 2.0**17

c = constants.of("float32")
#: What the texts below name, for those who bind them.
NAMES = {
    "Line": Line,
    "approximate_exp2": approximate_exp2,
    "shift": np.float32(constants.SHIFT),
    "steep": np.float32(STEEP),
    "steepness": np.float32(18),
    "log2e_low": np.float32(1 / math.log(2) - float(c.log2e)),
}
shift, steep, steepness = NAMES["shift"], NAMES["steep"], NAMES["steepness"]
log2e_low = NAMES["log2e_low"]


def exponential(x, floor, magic):
    """exp(x) 2**(SHIFT - n_ref), as in `fastll.formulas.maths`."""
    y = maximum(floor, x)
    z = fma(y, c.log2e, magic)
    f = fma(y, log2e_low, fma(y, c.log2e, magic - z))
    return approximate_exp2(f) * exponent_bits(z)


def tails(x):
    """exp(-|x|) 2**SHIFT, exp(-|x|); 0 for what is less than the smallest normal number."""
    y = c.zero - absolute(x)
    return approximate_exp2(fma(y, c.log2e, shift)), approximate_exp2(y * c.log2e)


def reference(m):
    """The `Line` of a maximum."""
    slope, intercept, lead = c.log2e, c.zero, c.one
    if abs(m) >= steep and abs(m) < c.infinity:
        slope = power_of_two(steepness - exponent(abs(m)))
    if abs(m) < c.infinity:
        intercept = (c.zero - m) * slope
        lead = approximate_exp2(fma(m, slope, intercept))
    return Line(m, slope, intercept, lead)


def relative(x, line):
    """The exponential of an element."""
    return approximate_exp2(fma(x, line.slope, line.intercept))


def relative_near(x, line):
    return relative(x, line)


def offset_of(line):
    return c.zero


def lifted_line(line, factor):
    """A line of exponentials times 2**SHIFT, and the one factor that makes of them what is written;
    where that is no normal number, of exponentials as they are."""
    first, lifted = (factor / line.lead) * c.unshift, line.intercept + shift
    if not abs(first) >= c.least:
        first, lifted = factor / line.lead, line.intercept
    return Line(line.maximum, line.slope, lifted, line.lead), first
