"""Pieces of a call to the backend that does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import layout
from fastll.arrays import Place
from fastll.contract import Backend, Floats, Fold, Kernel, units_of

Array = NDArray[Any]


def rows(backend: Backend, kernel: Kernel, x: Array) -> None:
    """Run a kernel over the rows of a (outer, classes, inner) piece."""
    outer, _, inner = x.shape
    backend.run(kernel, outer * inner, x.size)


def elements(backend: Backend, kernel: Kernel, x: Array) -> None:
    """Run a kernel over the units of a (outer, n) piece."""
    outer, length = x.shape
    backend.run(kernel, outer * units_of(length, backend.unit), x.size)


def new_state(backend: Backend, place: Place, shape: tuple[int, ...]) -> Floats:
    """The identity (m, e, k) = (-inf, 0, 0) in every row."""
    state = place.scratch((*shape, 3), np.float64)
    backend.fill_identity(state)
    return state


def fold(backend: Backend, x: Array, b: Array | None, axes: Sequence[int], state: Floats) -> None:
    """Add the rows of an array to their running state."""
    pieces, _ = layout.rows(axes, (x, b), (state,))
    for x_, b_, state_ in pieces:
        rows(backend, backend.fold(Fold("logsumexp", x_, second=b_, state=state_)), x_)


def finish(
    backend: Backend, place: Place, state: Floats, weighted: bool, out: Array, sign: Array | None
) -> None:
    """The log-sum-exp of running states: that of no further elements."""
    nothing = place.scratch((*out.shape, 0), out.dtype)
    pieces, _ = layout.rows((out.ndim,), (nothing, nothing if weighted else None), (state, out, sign))
    for x, b, state_, out_, sign_ in pieces:
        call = Fold("logsumexp", x, second=b, state=state_, lse=out_, sign=sign_)
        backend.run(backend.fold(call), out_.size, out_.size)
