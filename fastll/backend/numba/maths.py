"""The formulas of `fastll.formulas`, compiled for vectors, and the reductions that go with them."""

# mypy: ignore-errors

from __future__ import annotations

from types import ModuleType

import numpy as np
from numba import njit, typeof, types
from numba.extending import intrinsic, overload

from fastll.backend.numba import vector
from fastll.backend.numba.vector import (
    INLINE,
    Vector,
    downscale,
    exponent,
    fma,
    lanes_of,
    where_gt,
)
from fastll.formulas import bind
from fastll.formulas.constants import LN2_HIGH, LN2_LOW, SHIFT, of

LN2 = LN2_HIGH + LN2_LOW


@intrinsic
def constants(typing_context, like):
    """The `Constants` of the type of `like`, a scalar or a vector."""
    element = like.element if isinstance(like, Vector) else like
    table = of(element.name)
    kind = typeof(table)

    def codegen(context, builder, signature, values):
        return context.get_constant_generic(builder, kind, table)

    return kind(like), codegen


def cast(value, like):
    """A float64 in the type of `like`, a scalar or a vector."""
    raise NotImplementedError("for compiled code")


@overload(cast, jit_options=INLINE)
def _cast_to(value, like):
    element = like.element if isinstance(like, Vector) else like
    if element == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


_OPERATIONS = {
    name: getattr(vector, name)
    for name in (
        "absolute",
        "downscale",
        "exponent",
        "exponent_bits",
        "fma",
        "horner",
        "maximum",
        "where_eq",
        "where_ge",
        "where_gt",
    )
}

#: Every formula, by its name: as a module, which compiled code may take attributes of.
formulas = ModuleType("formulas")
vars(formulas).update(vars(bind({**_OPERATIONS, "constants": constants}, njit(**INLINE))))

exponential = formulas.exponential
series = formulas.series


@njit(**INLINE)
def window(n, like):
    """(floor, magic) of `exponential` for a reference exponent, a whole number in float64."""
    bias = 127.0 if lanes_of(like) == 32 else 1023.0
    return cast((n - bias - SHIFT) * LN2, like), constants(like).scaled_magic - cast(n, like)


@njit(**INLINE)
def log1p_sum(r):
    """log(1 + r) in float64, r >= -1: with s = 1 + r = 2**n f, n ln 2 + log f.

    What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
    """
    s = r + 1.0
    back = s - 1.0
    error = (r - back) + (1.0 - (s - back))
    n, down = exponent(s), downscale(s)
    log = series(fma(s, down, -1.0) + error * down)
    log = fma(n, LN2_HIGH, fma(n, LN2_LOW, log))
    log = where_gt(s, 0.0, log, -np.inf)
    return where_gt(np.inf, s, log, s)  # a NaN stays
