"""Turns arrays of any shape and strides into the three-dimensional views that kernels take.

A reduction divides the axes of an array into two kinds: kept (their positions are the rows) and reduced
(the classes). Neighbouring axes of a kind merge into one where the strides of every operand allow it. A
kernel walks two kept groups (outer, inner) and one reduced group (classes); the smallest groups, which
do not merge into these, are iterated here. Nothing is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]


#: Arrays; None for a missing one (never the first), which stays None in every piece.
Operands = Sequence[Any]
#: One view per operand, in the order they were given.
Piece = Sequence[Any]


class _Group(NamedTuple):
    size: int
    strides: tuple[int, ...]  # one per operand; 0 where an operand does not have the axis


def rows(axes: Sequence[int], full: Operands, row: Operands) -> tuple[Iterable[Piece], int]:
    """Pieces for a reduction over `axes` (ascending), and the number of pieces that share each row.

    `full` operands share one shape. `row` operands have that shape without `axes`, and may have further
    axes at the end, which are left alone. Rows in more than one piece need a running state.
    """
    shape = full[0].shape
    first, last = (axes[0], axes[-1] + 1) if axes else (0, 0)
    if last - first != len(axes):
        return _strided_rows(axes, full, row)
    ndim = len(shape) - len(axes)
    kept = prod(shape[:first]) if first else 1, prod(shape[last:]) if first < ndim else 1
    whole = kept[0], shape[first] if last - first == 1 else prod(shape[first:last]), kept[1]
    piece = []
    for a in full:
        if a is not None:
            if not a.flags.c_contiguous:
                return _strided_rows(axes, full, row)
            a = a.reshape(whole)
        piece.append(a)
    for a in row:
        if a is not None:
            if not a.flags.c_contiguous:
                return _strided_rows(axes, full, row)
            a = a.reshape(kept if a.ndim == ndim else kept + a.shape[ndim:])
        piece.append(a)
    return (piece,), 1


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


def elementwise(operands: Operands) -> Sequence[Piece]:
    """Pieces (outer, n) for an operation on each element; the operands share one shape."""
    shape, size = operands[0].shape, operands[0].size
    if _contiguous(operands):
        return ([None if a is None else a.reshape(1, size) for a in operands],)
    if size == 0:
        return ()
    groups = _merge(range(len(shape)), shape, lambda axis: _strides(operands, axis))
    kept, rest = _largest(groups, 2)
    order = [*rest, *kept]
    views = [None if a is None else _view(a, i, order, a.ndim) for i, a in enumerate(operands)]
    return list(_pieces(views, rest))


def _contiguous(operands: Operands) -> bool:
    for a in operands:  # noqa: SIM110  a generator takes as long as all else here
        if a is not None and not a.flags.c_contiguous:
            return False
    return True


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
