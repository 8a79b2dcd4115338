"""The operations that formulas are written in, on NumPy arrays.

A formula is an undecorated function of numbers. `fastll.formulas.bind` gives it the operations of a
target instead of these: vectors on the CPU, scalars on a GPU; `setup.py` translates it into C++. These
definitions say what each operation means, and let a formula run as plain Python.

Arguments mix freely: what a target has one number of goes with a vector of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastll.formulas.constants import Constants, of

Numbers = Any  # NumPy arrays or scalars of one floating dtype


def constants(x: Numbers) -> Constants:
    """The constants in the dtype of x."""
    return of(np.asarray(x).dtype.name)


def fma(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    """a b + c, rounded once (here only in float32, nearly so)."""
    dtype = np.result_type(a, b, c)
    return (np.asarray(a, np.longdouble) * b + c).astype(dtype)


def maximum(a: Numbers, b: Numbers) -> Numbers:
    """The larger one; b where either is NaN."""
    return np.where(np.asarray(a) > b, a, b)


def absolute(a: Numbers) -> Numbers:
    """The magnitude."""
    return np.abs(a)


def where_eq(a: Numbers, b: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """x where a == b, else y."""
    return np.where(np.asarray(a) == b, x, y)


def where_gt(a: Numbers, b: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """x where a > b, else y."""
    return np.where(np.asarray(a) > b, x, y)


def where_ge(a: Numbers, b: Numbers, x: Numbers, y: Numbers) -> Numbers:
    """x where a >= b, else y."""
    return np.where(np.asarray(a) >= b, x, y)


def horner(coefficients: tuple[Any, ...], x: Numbers) -> Numbers:
    """The polynomial with these coefficients, from the highest power on, by one `fma` per power."""
    result = coefficients[0]
    for coefficient in coefficients[1:]:
        result = fma(result, x, coefficient)
    return result


def exponent_bits(z: Numbers) -> Numbers:
    """The low bits of a number's representation, moved to the place of its sign and exponent."""
    z = np.asarray(z)
    bits, mantissa = (np.uint32, 23) if z.dtype == np.float32 else (np.uint64, 52)
    return (z.view(bits) << bits(mantissa)).view(z.dtype)


def exponent(x: Numbers) -> Numbers:
    """The whole number n where x = 2**n f with sqrt(1/2) <= f < sqrt(2); any for x <= 0, inf, NaN."""
    x = np.asarray(x)
    fraction, n = np.frexp(x)
    return np.where(fraction < np.sqrt(0.5), n - 1, n).astype(x.dtype)


def downscale(x: Numbers) -> Numbers:
    """2**-n for the n of `exponent`."""
    x = np.asarray(x)
    return np.ldexp(x.dtype.type(1), -exponent(x).astype(np.int32))
