"""Arrays of any shape and strides as the three-dimensional views that kernels take.

A reduction over some axes of an array sees two kinds of them: kept (one result a position: the rows)
and reduced (the classes). Neighbouring axes of a kind merge into one where every operand's strides
allow it. A kernel walks two kept groups (outer, inner) and one reduced group (classes); whatever does
not merge into these, the smallest groups, is iterated here. Nothing is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]


class Layout(NamedTuple):
    """The pieces of one call; each holds one view per operand, in the order they were given."""

    pieces: Iterator[tuple[Array, ...]]
    folds: int  # pieces that every row is spread over: beyond 1, rows need a running state


class _Group(NamedTuple):
    size: int
    strides: tuple[int, ...]  # one per operand; 0 where an operand does not have the axis


def rows(axes: Sequence[int], full: Sequence[Array], row: Sequence[Array] = ()) -> Layout:
    """Pieces for a reduction over `axes`, in ascending order.

    `full` operands share one shape. `row` operands have that shape less `axes`, and may have further
    axes at the end, which stay as they are.
    """
    shape = full[0].shape
    first, last = (axes[0], axes[-1] + 1) if axes else (0, 0)
    if last - first == len(axes) and all(a.flags.c_contiguous for a in (*full, *row)):
        outer, classes, inner = prod(shape[:first]), prod(shape[first:last]), prod(shape[last:])
        extra = len(shape) - len(axes)
        piece = (
            *(a.reshape(outer, classes, inner) for a in full),
            *(a.reshape(outer, inner, *a.shape[extra:]) for a in row),
        )
        return Layout(iter((piece,)), 1)

    kept_axes = [axis for axis in range(len(shape)) if axis not in axes]
    if any(shape[axis] == 0 for axis in kept_axes):
        return Layout(iter(()), 1)
    position = {axis: i for i, axis in enumerate(kept_axes)}

    def strides(axis: int) -> tuple[int, ...]:
        of_rows = (a.strides[position[axis]] if axis in position else 0 for a in row)
        return (*(a.strides[axis] for a in full), *of_rows)

    (class_group,), reduced_rest = _largest(_merge(axes, shape, strides), 1)
    (outer_group, inner_group), kept_rest = _largest(_merge(kept_axes, shape, strides), 2)
    rest = [*kept_rest, *reduced_rest]

    def view(i: int, a: Array) -> Array:
        if i < len(full):
            return _view(a, i, [*rest, outer_group, class_group, inner_group], a.ndim)
        return _view(a, i, [*rest, outer_group, inner_group], len(kept_axes))

    views = [view(i, a) for i, a in enumerate((*full, *row))]
    pieces = (tuple(v[at] for v in views) for at in np.ndindex(*(g.size for g in rest)))
    return Layout(pieces, prod(g.size for g in reduced_rest))


def elementwise(operands: Sequence[Array]) -> Iterator[tuple[Array, ...]]:
    """Pieces (outer, n) for an operation on each element; the operands share one shape."""
    shape = operands[0].shape
    if all(a.flags.c_contiguous for a in operands):
        return iter((tuple(a.reshape(1, a.size) for a in operands),))
    if 0 in shape:
        return iter(())
    groups = _merge(range(len(shape)), shape, lambda axis: tuple(a.strides[axis] for a in operands))
    kept, rest = _largest(groups, 2)
    order = [*rest, *kept]
    views = [_view(a, i, order, a.ndim) for i, a in enumerate(operands)]
    return (tuple(v[at] for v in views) for at in np.ndindex(*(g.size for g in rest)))


def _view(a: Array, i: int, groups: list[_Group], extra: int) -> Array:
    """Operand i over the groups; its axes from `extra` on stay as they are."""
    return as_strided(
        a,
        (*(g.size for g in groups), *a.shape[extra:]),
        (*(g.strides[i] for g in groups), *a.strides[extra:]),
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
    """The `count` largest groups in their order (padded in front by size 1), and the others."""
    by_size = sorted(range(len(groups)), key=lambda i: -groups[i].size)[:count]
    largest = [groups[i] for i in sorted(by_size)]
    width = len(groups[0].strides) if groups else 64
    padding = [_Group(1, (0,) * width)] * (count - len(largest))
    return padding + largest, [g for i, g in enumerate(groups) if i not in by_size]
