"""Pieces of a call to the backend that does it, and rows to threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import layout, threads
from fastll.contract import Backend, Floats, Kernel, units_of

Array = NDArray[Any]


def rows(kernel: Kernel, x: Array) -> None:
    """Run a kernel over the rows of a (outer, classes, inner) piece."""
    outer, _, inner = x.shape
    threads.run(kernel, outer * inner, x.size)


def elements(kernel: Kernel, x: Array) -> None:
    """Run a kernel over the units of a (outer, n) piece."""
    outer, length = x.shape
    threads.run(kernel, outer * units_of(length), x.size)


def new_state(shape: tuple[int, ...]) -> Floats:
    """The identity (m, e, k) = (-inf, 0, 0) in every row."""
    state = np.zeros((*shape, 3))
    state[..., 0] = -np.inf
    return state


def fold(backend: Backend, x: Array, b: Array | None, axes: Sequence[int], state: Floats) -> None:
    """Add the rows of an array to their running state."""
    pieces, _ = layout.rows(axes, (x, b), (state,))
    for x_, b_, state_ in pieces:
        rows(backend.logsumexp(x_, b_, state_, None, None), x_)


def finish(backend: Backend, state: Floats, weighted: bool, out: Array, sign: Array | None) -> None:
    """The log-sum-exp of running states: that of no further elements."""
    count = out.size
    nothing = np.empty((count, 0, 1), out.dtype)
    kernel = backend.logsumexp(
        nothing,
        nothing if weighted else None,
        state.reshape(count, 1, 3),
        out.reshape(count, 1),
        None if sign is None else sign.reshape(count, 1),
    )
    if count:
        kernel(0, count)
