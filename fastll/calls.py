"""A public call on its way to a backend: the one place where arguments become a bound call.

A `Call` takes arguments as arrays, allocates results, chooses the backend, and runs a `Map` or a `Fold`
of whole arrays, piece by piece as `fastll.layout` cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastll import dispatch, layout
from fastll.arrays import HOST, Array, Place, axis_of, broadcast, kept_shape, place_of
from fastll.contract import LONG, Backend, Floats, Fold, Kept, Map, new, units_of
from fastll.dtypes import as_floats, kind_of


class Call:
    """One call: the first array, and the library, device and dtypes that follow from it."""

    __slots__ = ("compute", "element", "name", "operation", "place", "x")

    def __init__(self, operation: str, x: Any, name: str, place: Place | None = None) -> None:
        if type(x) is np.ndarray and place is None:
            place = HOST
        else:
            place = place or place_of(x)
            x = place.take(x, name)
        self.operation, self.name, self.place, self.x = operation, name, place, x
        kind = kind_of(x.dtype, name)
        self.compute, self.element = kind.compute, kind.element

    @property
    def backend(self) -> Backend:
        """The backend for this call."""
        return dispatch.choose(self.operation, self.x.size, self.place)

    def take(self, a: Any, name: str) -> Array:
        """Another argument, broadcast to the shape of the first array."""
        return broadcast(self.place.take(a, name), self.x.shape, name)

    def rows(self, axis: int) -> tuple[int, tuple[int, ...]]:
        """The axis of the classes, counted from 0, and the shape of the rows."""
        shape = self.x.shape
        if not shape:
            raise ValueError(f"{self.name} has no axis of classes; expected at least one dimension")
        axis = axis_of(axis, len(shape))
        return axis, shape[:axis] + shape[axis + 1 :]

    def sample_weight(self, weight: Any, rows: tuple[int, ...]) -> Array | None:
        """One weight per row; on the CPU float64."""
        if weight is None:
            return None
        w = self.place.take(weight, "sample_weight")
        if self.place.on_cpu:
            w = as_floats(w).reshape(w.shape)
        return broadcast(w, rows, "sample_weight")

    def output(self, out: Any, name: str, inputs: Iterable[Array | None] = ()) -> Array:
        """`out`, checked, or a new array, for a result with the shape of the first array."""
        if out is None:
            return self.place.empty_like(self.x, self.element)
        return self.place.output(out, name, self.x.shape, self.element, inputs, like=self.x)

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
        pieces = layout.elements(inputs, value, slope, weight)
        outer, length = pieces[0][0][0].shape if pieces else (0, 0)
        units = units_of(length, backend.unit)
        partial = sums = None
        if value is None:
            shape = len(pieces) * outer, units
            partial = sums = self.place.scratch(shape, backend.partial_dtype or self.compute)
        first = 0
        for inputs, value, slope, weight in pieces:
            if partial is not None and len(pieces) > 1:
                sums, first = partial[first : first + outer], first + outer
            fields = self.operation, inputs, value, sums, slope, weight, parameters, scale
            backend.run(backend.map(new(Map, fields)), outer * units, outer * length)
        return partial

    def check_domain(self, a: Array, name: str, low: float, high: float = math.inf) -> None:
        """`ValueError` for a value outside [low, high]; on a GPU nothing is checked, as that waits."""
        if not self.place.on_cpu:
            return
        check = Call("outside", a, name, self.place)
        counts = check.map(check.backend, (a,), None, parameters=(low, high))
        if np.any(counts):
            values = as_floats(a).reshape(a.shape)
            at = tuple(int(i) for i in np.argwhere((values < low) | (values > high))[0])
            expected = f"in [{low:g}, {high:g}]" if high < math.inf else f"of at least {low:g}"
            raise ValueError(f"{name} has {values[at]:g} at {at}; expected values {expected}")

    def results(
        self, loss: Any, lse: Array | None, grad: Array | None, return_grad: bool, grad_out: Any
    ) -> Any:
        """The loss alone, or a tuple of what was asked for."""
        place = self.place
        loss = place.give(loss)
        if not return_grad:
            return loss if lse is None else (loss, place.give(lse))
        given = place.give_array(grad) if grad_out is None else grad_out  # type: ignore[arg-type]
        return (loss, given) if lse is None else (loss, place.give(lse), given)


def weight_of(backend: Backend, rows: tuple[int, ...], sample: Array | None) -> Any:
    """What a mean over all rows divides by, as `Backend.weigh` has it."""
    if sample is None:
        return Kept(*[float(math.prod(rows))] * 2)
    return backend.weigh(None, 0, None, None, sample, False, "")[1]


def fold(backend: Backend, place: Place, call: Fold, axes: tuple[int, ...]) -> None:
    """Run a reduction of rows over `axes`; rows that no one view covers go by a running state."""
    pieces, parts = layout.folds(call, axes)
    if parts > 1 and call.value is not None:
        _sum_axis_by_axis(backend, place, call, axes)
        return
    if parts > 1 and call.state is None:
        state = new_state(backend, place, kept_shape(call.x.shape, axes))
        operation = call.operation if call.out is None else "logsumexp"
        fold(backend, place, Fold(operation, call.x, call.second, state=state), axes)
        call = call._replace(state=state)
        if call.out is None:
            finish(backend, place, call)
        else:
            fold(backend, place, call, axes)
        return
    for piece in pieces:
        long = piece.x.shape[1] > LONG and piece.operation == "logsumexp" and place.on_cpu
        if long and piece.state is None and piece.selected is None:
            _fold_long(backend, place, piece)
        else:
            _run(backend, piece)


def _run(backend: Backend, piece: Fold) -> None:
    outer, classes, inner = piece.x.shape
    rows = outer * inner
    # a row without classes is work too: it has a result
    backend.run(backend.fold(piece), rows, rows * (classes or 1))


def _fold_long(backend: Backend, place: Place, call: Fold) -> None:
    """Fold rows in pieces of `LONG` elements, by a state for each, and merge these as a tree."""
    outer, classes, inner = call.x.shape
    if outer > 1 and inner > 1:
        for i in range(outer):
            part = _some(call, slice(i, i + 1))
            _fold_long(backend, place, part._replace(lse=_of(call.lse, i), sign=_of(call.sign, i)))
        return
    axis = 0 if inner > 1 else 1  # of the pieces, among the states
    whole = classes // LONG
    count = whole + (classes % LONG > 0)
    states = new_state(backend, place, (count, inner) if axis == 0 else (outer, count))
    tree = states if axis == 0 else states.swapaxes(0, 1)

    def run(part: Fold, start: int, stop: int) -> None:
        state = states[start:stop] if axis == 0 else states[:, start:stop]
        _run(backend, part._replace(state=state))

    alone = call._replace(lse=None, sign=None)
    second = None if call.second is None else layout.pieces(call.second, LONG, axis)
    run(alone._replace(x=layout.pieces(call.x, LONG, axis), second=second), 0, whole)
    if count > whole:
        run(_some(alone, slice(None), slice(whole * LONG, None)), whole, count)
    while count > 1:
        half = count - count // 2
        backend.merge(tree[: count // 2], tree[half:count])
        count = half
    run(_some(call, slice(None), slice(0, 0)), 0, 1)


def _some(call: Fold, *at: slice) -> Fold:
    """A call for some of its elements."""
    return call._replace(x=call.x[at], second=None if call.second is None else call.second[at])


def _of(a: Array | None, i: int) -> Array | None:
    """The part of a row operand for one outer row."""
    return None if a is None else a[i : i + 1]


def _sum_axis_by_axis(backend: Backend, place: Place, call: Fold, axes: tuple[int, ...]) -> None:
    """Sum terms over the longest axis, and those sums over the others."""
    assert call.value is not None
    longest = max(axes, key=lambda axis: call.x.shape[axis])
    sums = place.scratch(kept_shape(call.x.shape, (longest,)), call.value.dtype)
    fold(backend, place, Fold(call.operation, call.x, call.second, value=sums), (longest,))
    others = tuple(axis - (axis > longest) for axis in axes if axis != longest)
    fold(backend, place, Fold("sum", sums, options=call.options, value=call.value), others)


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
