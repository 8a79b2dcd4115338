"""Turns arrays of any shape and strides into the three-dimensional views that kernels take.

A reduction divides the axes of an array into two kinds: kept (their positions are the rows) and reduced
(the classes). Neighbouring axes of a kind merge into one where the strides of every operand allow it. A
kernel walks two kept groups (outer, inner) and one reduced group (classes); the smallest groups, which
do not merge into these, are iterated here. Nothing is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastll.contract import Fold, new

Array = NDArray[Any]


#: Arrays; None for a missing one (never the first), which stays None in every piece.
Operands = Sequence[Any]
#: One view per operand, in the order they were given.
Piece = Sequence[Any]
#: Inputs, value, slope and weight of an element-wise operation.
Elements = tuple[tuple[Array, ...], Array | None, Array | None, Array | None]


#: The row operands of a fold.
_ROW = ("labels", "sample", "state", "value", "lse", "sign", "selected")


class _Group(NamedTuple):
    size: int
    strides: tuple[int, ...]  # one per operand; 0 where an operand does not have the axis


def folds(call: Fold, axes: tuple[int, ...]) -> tuple[Iterable[Fold], int]:
    """A reduction over `axes` (ascending) as pieces, and the number of pieces that share each row.

    The call's *full* operands (of the contract) share one shape; its *row* operands have that shape
    without `axes`. Rows in more than one piece need a running state.
    """
    operation, x, second, labels, weight, sample, options, state, value, lse, sign, selected, out = call
    whole, kept = _contiguous_shapes(x.shape, axes)
    if (
        whole is None
        or not x.flags.c_contiguous
        or (second is not None and not second.flags.c_contiguous)
        or (labels is not None and not labels.flags.c_contiguous)
        or (sample is not None and not sample.flags.c_contiguous)
        or (state is not None and not state.flags.c_contiguous)
        or (value is not None and not value.flags.c_contiguous)
        or (lse is not None and not lse.flags.c_contiguous)
        or (sign is not None and not sign.flags.c_contiguous)
        or (selected is not None and not selected.flags.c_contiguous)
        or (out is not None and not out.flags.c_contiguous)
    ):
        return _strided_folds(call, axes)
    fields = (
        operation,
        x.reshape(whole),
        None if second is None else second.reshape(whole),
        None if labels is None else labels.reshape(kept + labels.shape[x.ndim - len(axes) :]),
        weight,
        None if sample is None else sample.reshape(kept),
        options,
        None if state is None else state.reshape((*kept, 3)),
        None if value is None else value.reshape(kept),
        None if lse is None else lse.reshape(kept),
        None if sign is None else sign.reshape(kept),
        None if selected is None else selected.reshape(*kept, selected.shape[-1]),
        None if out is None else out.reshape(whole),
    )
    return (new(Fold, fields),), 1


@lru_cache(1024)
def _contiguous_shapes(
    shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[tuple[int, int, int] | None, tuple[int, int]]:
    """(outer, classes, inner) and (outer, inner) of a contiguous array; None if `axes` are apart."""
    first, last = (axes[0], axes[-1] + 1) if axes else (0, 0)
    if last - first != len(axes):
        return None, (0, 0)
    outer = prod(shape[:first])
    inner = prod(shape[last:]) if first < len(shape) - len(axes) else 1
    return (outer, prod(shape[first:last]), inner), (outer, inner)


def _strided_folds(call: Fold, axes: tuple[int, ...]) -> tuple[Iterable[Fold], int]:
    full = call.x, call.second, call.out
    row = [getattr(call, name) for name in _ROW]
    pieces, parts = _strided_rows(axes, full, row)
    return (
        call._replace(x=x, second=second, out=out, **dict(zip(_ROW, rows, strict=True)))
        for x, second, out, *rows in pieces
    ), parts


def _strided_rows(axes: Sequence[int], full: Operands, row: Operands) -> tuple[Iterable[Piece], int]:
    shape = full[0].shape
    kept_axes = [axis for axis in range(len(shape)) if axis not in axes]
    if any(shape[axis] == 0 for axis in kept_axes):
        return (), 1
    position = {axis: i for i, axis in enumerate(kept_axes)}

    def strides(axis: int) -> tuple[int, ...]:
        of_rows = (0 if a is None or axis not in position else a.strides[position[axis]] for a in row)
        return (*_strides(full, axis), *of_rows)

    (class_group,), reduced_rest = _largest(_merge(axes, shape, strides), 1)
    (outer_group, inner_group), kept_rest = _largest(_merge(kept_axes, shape, strides), 2)
    rest = [*kept_rest, *reduced_rest]

    def view(i: int, a: Array | None) -> Array | None:
        if a is None:
            return None
        if i < len(full):
            return _view(a, i, [*rest, outer_group, class_group, inner_group], a.ndim)
        return _view(a, i, [*rest, outer_group, inner_group], len(kept_axes))

    views = [view(i, a) for i, a in enumerate((*full, *row))]
    return _pieces(views, rest), prod(g.size for g in reduced_rest)


def pieces(a: Array, length: int, axis: int) -> Array:
    """Pieces of so many classes of (outer, classes, inner) as rows of their own, without what is left.

    They take the place of the outer axis (0) or of the inner one (1), which has one entry.
    """
    outer, classes, inner = a.shape
    far, step, near = a.strides
    count = classes // length
    if axis == 0:
        return as_strided(a, (count, length, inner), (length * step, step, near), subok=True)
    return as_strided(a, (outer, length, count), (far, step, length * step), subok=True)


def elements(
    inputs: tuple[Array, ...], value: Array | None, slope: Array | None, weight: Array | None
) -> Sequence[Elements]:
    """An element-wise operation as pieces (outer, n) of one shape; the operands share one shape."""
    flat = 1, inputs[0].size
    views = []
    for a in inputs:
        if not a.flags.c_contiguous:
            return _strided_elements((*inputs, value, slope, weight))
        views.append(a.reshape(flat))
    if (
        (value is not None and not value.flags.c_contiguous)
        or (slope is not None and not slope.flags.c_contiguous)
        or (weight is not None and not weight.flags.c_contiguous)
    ):
        return _strided_elements((*inputs, value, slope, weight))
    return (
        (
            tuple(views),
            None if value is None else value.reshape(flat),
            None if slope is None else slope.reshape(flat),
            None if weight is None else weight.reshape(flat),
        ),
    )


def _strided_elements(operands: Operands) -> Sequence[Elements]:
    shape = operands[0].shape
    if operands[0].size == 0:
        return ()
    groups = _merge(range(len(shape)), shape, lambda axis: _strides(operands, axis))
    kept, rest = _largest(groups, 2)
    order = [*rest, *kept]
    views = [None if a is None else _view(a, i, order, a.ndim) for i, a in enumerate(operands)]
    return [(tuple(piece[:-3]), *piece[-3:]) for piece in _pieces(views, rest)]


def _strides(operands: Operands, axis: int) -> tuple[int, ...]:
    return tuple(0 if a is None else a.strides[axis] for a in operands)


def _pieces(views: Operands, rest: list[_Group]) -> Iterable[Piece]:
    """The views at each position of the groups that kernels do not walk."""
    for at in np.ndindex(*(g.size for g in rest)):
        yield [None if v is None else v[at] for v in views]


def _view(a: Array, i: int, groups: list[_Group], extra: int) -> Array:
    """Operand i over the groups; its axes from `extra` on are left alone."""
    return as_strided(
        a,
        (*(g.size for g in groups), *a.shape[extra:]),
        (*(g.strides[i] for g in groups), *a.strides[extra:]),
        subok=True,
        writeable=a.flags.writeable,
    )


def _merge(axes: Sequence[int], shape: tuple[int, ...], strides: Any) -> list[_Group]:
    """The axes, ordered by the first operand's strides, with neighbours merged where all allow it."""
    groups: list[_Group] = []
    for axis in sorted(axes, key=lambda axis: -abs(strides(axis)[0])):
        size, step = shape[axis], strides(axis)
        if size == 1:
            continue
        if groups and groups[-1].strides == tuple(s * size for s in step):
            size *= groups.pop().size
        groups.append(_Group(size, step))
    return groups


def _largest(groups: list[_Group], count: int) -> tuple[list[_Group], list[_Group]]:
    """The `count` largest groups in order (padded in front with size 1), and the others."""
    by_size = sorted(range(len(groups)), key=lambda i: -groups[i].size)[:count]
    largest = [groups[i] for i in sorted(by_size)]
    width = len(groups[0].strides) if groups else 64
    padding = [_Group(1, (0,) * width)] * (count - len(largest))
    return padding + largest, [g for i, g in enumerate(groups) if i not in by_size]
