"""The formulas of `fastll.formulas`, compiled for vectors, and the reductions that go with them."""

# mypy: ignore-errors

from __future__ import annotations

from types import ModuleType

import numpy as np
from numba import typeof
from numba.extending import intrinsic

from fastll.backend.numba import vector
from fastll.backend.numba.vector import Vector, cast, inline, lanes_of, splat
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


@inline
def zeros(like):
    return splat(constants(like).zero)


@inline
def lowest(like):
    """The vector of -inf."""
    return splat(-constants(like).infinity)


#: Every formula, by its name: as a module, which compiled code may take attributes of.
formulas = ModuleType("formulas")
vars(formulas).update(vars(bind({**vars(vector), "constants": constants}, inline)))

exponential = formulas.exponential


@inline
def window(n, like):
    """(floor, magic) of `exponential` for a reference exponent, or a vector of them, in float64."""
    bias = 127.0 if lanes_of(like) == 32 else 1023.0
    return cast((n - (bias + SHIFT)) * LN2, like), constants(like).scaled_magic - cast(n, like)


@inline
def log1p_finite(r):
    """log(1 + r) in float64 of a finite r > -1: with s = 1 + r = 2**n f, n ln 2 + log f.

    What rounding takes from s is known, by Knuth's two-sum, and comes back in f.
    """
    s = r + 1.0
    back = s - 1.0
    error = (r - back) + (1.0 - (s - back))
    n, down = vector.exponent(s), vector.downscale(s)
    log = formulas.series(vector.fma(s, down, -1.0) + error * down)
    return vector.fma(n, LN2_HIGH, vector.fma(n, LN2_LOW, log))


@inline
def log1p_sum(r):
    """The same for r >= -1; a NaN stays."""
    s = r + 1.0
    log = vector.where_gt(s, 0.0, log1p_finite(r), -np.inf)
    return vector.where_gt(np.inf, s, log, s)  # a NaN stays
