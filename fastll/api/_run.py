"""Pieces of a call to the backend that does it, and rows to threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import dispatch, layout, threads
from fastll.contract import Backend, Floats, Kernel, units_of
from fastll.dtypes import kind_of

Array = NDArray[Any]


def backend_for(operation: str, x: Array) -> Backend:
    """The backend for an operation on an array."""
    return dispatch.choose(operation, kind_of(x.dtype).compute.char, x.size)


def rows(kernel: Kernel, x: Array) -> None:
    """Run a kernel over the rows of a (outer, classes, inner) piece."""
    threads.run(kernel, x.shape[0] * x.shape[2], x.size)


def elements(kernel: Kernel, x: Array) -> None:
    """Run a kernel over the units of a (outer, n) piece."""
    threads.run(kernel, x.shape[0] * units_of(x.shape[1]), x.size)


def new_state(shape: tuple[int, ...]) -> Floats:
    """The identity (m, e, k) = (-inf, 0, 0) in every row."""
    state = np.zeros((*shape, 3))
    state[..., 0] = -np.inf
    return state


def fold(backend: Backend, x: Array, b: Array | None, axes: Sequence[int], state: Floats) -> None:
    """Add the rows of an array to their running state."""
    full = (x,) if b is None else (x, b)
    for x_, *b_, state_ in layout.rows(axes, full, (state,)).pieces:
        rows(backend.logsumexp(x_, b_[0] if b_ else None, state_, None, None), x_)


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


def each_row(
    axes: Sequence[int],
    full: Sequence[Array | None],
    row: Sequence[Array | None],
    bind: Callable[..., Kernel],
) -> bool:
    """Run the kernel that `bind` makes of the operands of each piece.

    Where rows are spread over several pieces nothing is run, and the result is False.
    """
    parts = layout.rows(axes, _present(full), _present(row))
    if parts.folds > 1:
        return False
    for views in with_absent(parts.pieces, (*full, *row)):
        rows(bind(*views), views[0])
    return True


def each_piece(
    axes: Sequence[int], full: Sequence[Array], row: Sequence[Array], bind: Callable[..., Kernel]
) -> None:
    """`each_row` whether or not rows are spread over several pieces: for kernels given their state."""
    for views in layout.rows(axes, full, row).pieces:
        rows(bind(*views), views[0])


def each_element(operands: Sequence[Array | None]) -> Iterator[tuple[Any, ...]]:
    """The operands of each piece of an element-wise operation."""
    return with_absent(layout.elementwise(_present(operands)), operands)


def with_absent(
    pieces: Iterable[tuple[Array, ...]], operands: Sequence[Array | None]
) -> Iterator[tuple[Any, ...]]:
    """Pieces with None put back where an operand is None."""
    for piece in pieces:
        views = iter(piece)
        yield tuple(None if a is None else next(views) for a in operands)


def _present(operands: Sequence[Array | None]) -> list[Array]:
    return [a for a in operands if a is not None]
