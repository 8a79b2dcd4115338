"""Exponentials of half-precision input: what takes the place of texts of `maths`.

Those of a row are exp(x - m) 2**SHIFT ~ 2**(x slope + intercept), with slope = log2 e and intercept =
SHIFT - m slope: one fused operation and the machine's approximation of 2**x. Of an exponent less than
128 the rounding is at most 2**-18, a relative error of the exponential of less than that. The rounding
of the intercept is one factor of all exponentials of the row, that of the maximum included, which is
`lead`: it cancels. From `STEEP` on it would not stay small; but there all elements below the maximum
are so far from it that their exponentials are 0. Any slope does that of at least 2 over the distance of
neighbours, and a power of two makes no rounding errors.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.primitives import approximate_exp2, exponent, fma, power_of_two
from fastll.formulas import constants


class Line(NamedTuple):
    """What the exponentials of a row are relative to: the exponent of 2 is x slope + intercept."""

    maximum: float
    slope: float
    intercept: float
    lead: float  # the exponential of the maximum; 2**SHIFT where that is infinite


#: Maxima of this magnitude are those of bfloat16, whose neighbours are at least 2**9 apart there.
STEEP = 2.0**17

c = constants.of("float32")
shift, steep, steepness = np.float32(constants.SHIFT), np.float32(STEEP), np.float32(18)
#: What the texts below name, for those who bind them.
NAMES = {
    "Line": Line,
    "approximate_exp2": approximate_exp2,
    "shift": shift,
    "steep": steep,
    "steepness": steepness,
}


def exponential(x, floor, magic):
    """As in `fastll.formulas.maths`; what is below the floor is 0 of itself."""
    return approximate_exp2(fma(x, c.log2e, magic - c.magic))


def reference(m):
    """The `Line` of a maximum."""
    slope, intercept, lead = c.log2e, shift, c.one / c.unshift
    if abs(m) >= steep and abs(m) < c.infinity:
        slope = power_of_two(steepness - exponent(abs(m)))
    if abs(m) < c.infinity:
        intercept = fma(c.zero - m, slope, shift)
        lead = approximate_exp2(fma(m, slope, intercept))
    return Line(m, slope, intercept, lead)


def relative(x, line):
    """The exponential of an element."""
    return approximate_exp2(fma(x, line.slope, line.intercept))


def relative_near(x, line):
    return relative(x, line)


def offset_of(line):
    return c.zero
