"""A public call on its way to a backend: the one place where arguments become a bound call.

A `Call` takes arguments as arrays, allocates results, chooses the backend, and runs a `Map` or a `Fold`
of whole arrays, piece by piece as `fastll.layout` cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastll import dispatch, layout
from fastll.arrays import Array, Place, kept_shape, place_of
from fastll.contract import Backend, Floats, Fold, Map, units_of
from fastll.dtypes import kind_of


class Outputs(NamedTuple):
    """What a loss is asked to return."""

    reduction: str
    return_grad: bool
    grad_out: Any
    return_lse: bool = False


class Call:
    """One call: the first array, and the library, device and dtypes that follow from it."""

    __slots__ = ("compute", "name", "operation", "place", "x")

    def __init__(self, operation: str, x: Any, name: str, place: Place | None = None) -> None:
        self.operation, self.name = operation, name
        self.place = place or place_of(x)
        self.x = self.place.take(x, name)
        self.compute = kind_of(self.x.dtype).compute

    @property
    def backend(self) -> Backend:
        """The backend for this call."""
        return dispatch.choose(self.operation, self.compute, self.x.size, self.place)

    def gradient(self, outputs: Outputs, inputs: Iterable[Array | None]) -> Array | None:
        """Where to write the gradient; None if it is not asked for."""
        if not outputs.return_grad and outputs.grad_out is None:
            return None
        return self.place.result(self.x, outputs.grad_out, "grad_out", inputs)

    def map(
        self,
        backend: Backend,
        inputs: tuple[Array, ...],
        value: Array | None,
        slope: Array | None = None,
        weight: Array | None = None,
        parameters: tuple[float, ...] = (),
        scale: float = 1.0,
    ) -> Array | None:
        """Run an element-wise operation; without `value`, return partial sums of the values."""
        count, unit = len(inputs), backend.unit
        pieces = layout.elementwise((*inputs, value, slope, weight))
        partial = sums = None
        if value is None:
            outer, length = pieces[0][0].shape if pieces else (0, 0)
            shape = len(pieces) * outer, units_of(length, unit)
            partial = sums = self.place.scratch(shape, backend.partial_dtype or self.compute)
        for i, piece in enumerate(pieces):
            first = piece[0]
            outer, length = first.shape
            if partial is not None and len(pieces) > 1:
                sums = partial[i * outer : (i + 1) * outer]
            values, slopes, weights = piece[count:]
            operands = tuple(piece[:count]), values, sums, slopes, weights
            call = Map(self.operation, *operands, parameters, scale)
            backend.run(backend.map(call), outer * units_of(length, unit), first.size)
        return partial

    def results(self, outputs: Outputs, loss: Any, lse: Array | None, grad: Array | None) -> Any:
        """The loss alone, or a tuple of what was asked for."""
        loss = self.place.give(loss)
        if lse is None and not outputs.return_grad:
            return loss
        results = [loss]
        if lse is not None:
            results.append(self.place.give(lse))
        if outputs.return_grad and grad is not None:
            given = outputs.grad_out
            results.append(self.place.give_array(grad) if given is None else given)
        return tuple(results)


def fold(backend: Backend, place: Place, call: Fold, axes: Sequence[int]) -> None:
    """Run a reduction of rows over `axes`; rows that no one view covers go by a running state."""
    operation, x, second, labels, weight, options, state, value, lse, sign, out = call
    row = (labels, state, value, lse, sign)
    pieces, parts = layout.rows(axes, (x, second, out), row)
    if parts > 1 and state is None:
        state = new_state(backend, place, kept_shape(x.shape, axes))
        part = operation if out is None else "logsumexp"
        fold(backend, place, Fold(part, x, second, state=state), axes)
        call = call._replace(state=state)
        if out is None:
            finish(backend, place, call)
        else:
            fold(backend, place, call, axes)
        return
    for x, second, out, labels, state, value, lse, sign in pieces:
        piece = operation, x, second, labels, weight, options, state, value, lse, sign, out
        outer, _, inner = x.shape
        # a row without classes is work too: it has a result
        backend.run(backend.fold(Fold._make(piece)), outer * inner, x.size or outer * inner)


def finish(backend: Backend, place: Place, call: Fold) -> None:
    """Run a fold of no further elements: what becomes of running states."""
    result = call.value if call.lse is None else call.lse
    assert result is not None
    nothing = place.scratch((*result.shape, 0), result.dtype)
    second = None if call.second is None else nothing
    fold(backend, place, call._replace(x=nothing, second=second), (result.ndim,))


def new_state(backend: Backend, place: Place, shape: tuple[int, ...]) -> Floats:
    """The identity (m, e, k) = (-inf, 0, 0) in every row."""
    state = place.scratch((*shape, 3), np.float64)
    backend.fill_identity(state)
    return state
