"""Every constant of the formulas, once: as Python numbers, and rounded to each floating type.

Coefficients, from the constant on, are Chebyshev fits. EXP: of (exp(f) - 1 - f) / f**2 for
|f| <= ln(2) / 2, which makes an error of exp(f) of 0.13 ulp in float32 and 0.11 in float64. ATANH: of
(atanh(z) - z) / z**3 as a function of z**2, for |z| <= 3 - 2 sqrt(2).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

EXP = {
    "float32": (
        0.5,
        0.16666577025255677587,
        0.041666554661622913223,
        0.0083631731335131513025,
        0.0013926176191150313267,
    ),
    "float64": (
        0.50000000000000010211,
        0.16666666666666667452,
        0.041666666666624161578,
        0.0083333333333300644245,
        0.001388888891719688114,
        0.000198412698630406699,
        0.000024801521322116824174,
        2.755726848011633485e-6,
        2.7620075999810651055e-7,
        2.5100375924709716851e-8,
    ),
}
ATANH = {
    "float32": (
        0.33333342519814533154,
        0.19994390272121269827,
        0.14789975190232547312,
    ),
    "float64": (
        0.33333333333333348431,
        0.19999999999949751953,
        0.14285714312987874917,
        0.11111105567375917728,
        0.090914445642062292024,
        0.076658607479130060874,
        0.073082254897760543173,
    ),
}

#: ln 2 as a sum whose first part has 32 significant bits: its multiples up to 2**20 are exact in
#: float64.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

#: Exponentials are computed times 2**SHIFT. Those of a row are relative to its reference, so that they
#: keep all their digits down to the smallest subnormal result, in float64 as well (which takes 52).
SHIFT = 64

#: A maximum of this magnitude, or an infinite one, is no reference for exponentials. Below it, x - m is
#: exact wherever exp(x - m) matters: float32 has steps of 1/16 there.
LIMIT = 2.0**20
#: The limit without fused multiply-add, where n ln 2 must be exact in three parts of ln 2.
LIMIT_UNFUSED = 2.0**14


class Constants(NamedTuple):
    """What the formulas need of a floating type, rounded to that type."""

    ln2_low: Any  # with ln2_high the parts of ln 2 that fused products are exact enough with
    magic: Any  # 1.5 * 2**(bits of the mantissa) + the exponent's bias
    floor: Any  # below it, exp is 0
    ceiling: Any  # above it, exp is infinite
    scaled_magic: Any  # magic and floor of exponentials times 2**SHIFT
    scaled_floor: Any
    reduced_magic: Any  # magic of exponentials times 2**-SHIFT
    least: Any  # the smallest normal number
    lift: Any  # 2**lift_bits, which makes every subnormal number a normal one
    lift_bits: Any
    exp: tuple[Any, ...]  # coefficients from the highest power on
    atanh: tuple[Any, ...]  # of (2 atanh(z / 2) - z) / z**3 as a function of z**2, likewise
    zero: Any = 0
    half: Any = 0.5
    one: Any = 1
    two: Any = 2
    infinity: Any = math.inf
    nan: Any = math.nan
    log2e: Any = 1 / math.log(2)
    ln2: Any = math.log(2)
    ln2_high: Any = math.log(2)
    shift: Any = 2.0**SHIFT
    unshift: Any = 2.0**-SHIFT
    root: Any = math.sqrt(2) - 1  # above it, log1p halves its argument
    half_log_tau: Any = math.log(2 * math.pi) / 2
    log_floor: Any = -100  # PyTorch's least logarithm of a probability
    variance_floor: Any = 1e-12  # and its least p (1 - p) in a slope


@cache
def of(name: str) -> Constants:
    """The constants of "float32" or "float64"."""
    dtype = np.dtype(name).type
    mantissa, bias = (23, 127) if name == "float32" else (52, 1023)
    magic = 1.5 * 2**mantissa + bias
    exact = Constants(
        ln2_low=(LN2_HIGH - float(dtype(math.log(2)))) + LN2_LOW,
        magic=magic,
        floor=-bias * math.log(2),
        ceiling=(bias + 2) * math.log(2),
        scaled_magic=magic + SHIFT,
        scaled_floor=(-bias - SHIFT) * math.log(2),
        reduced_magic=magic - SHIFT,
        least=2.0 ** (1 - bias),
        lift=2.0 ** (mantissa + 1),
        lift_bits=mantissa + 1,
        exp=EXP[name][::-1],
        atanh=tuple(c * 4.0 ** -(j + 1) for j, c in enumerate(ATANH[name]))[::-1],
    )
    return Constants(*(tuple(map(dtype, c)) if isinstance(c, tuple) else dtype(c) for c in exact))
