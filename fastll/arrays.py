"""Arguments into arrays: every check of an argument that is an array, an axis or an output.

Each error names the argument, its value and what was expected. Nothing here writes to an array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import NDArray

from fastll.dtypes import kind_of

Array = NDArray[Any]

_DLPACK_CPU = 1


def as_array(x: Any, name: str) -> Array:
    """`x` as a NumPy array of a dtype that fastll computes with; no copy where it is one."""
    if type(x) is not np.ndarray:
        _check_device(x, name)
        x = np.asarray(x)
    kind_of(x.dtype, name)
    array: Array = x
    return array


def _check_device(x: Any, name: str) -> None:
    """Arrays of other libraries come with their adapters; until then they are refused, not copied."""
    if isinstance(x, np.ndarray | np.generic):
        return
    kind = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
    if hasattr(x, "__cuda_array_interface__"):
        raise NotImplementedError(f"{name} is a {kind} on a cuda device, which has no backend yet")
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        device = x.__dlpack_device__()
        where = "on the CPU" if device[0] == _DLPACK_CPU else f"on DLPack device {tuple(device)}"
        raise NotImplementedError(
            f"{name} is a {kind} {where}; fastll takes NumPy arrays, such as np.asarray({name})"
        )


def axes_of(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Axes as numbers from 0, in ascending order; None is all of them."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    try:
        return tuple(sorted(normalize_axis_tuple(axis, ndim, "axis")))
    except TypeError:
        raise TypeError(f"axis is {axis!r}; expected an integer, a tuple of them or None") from None


def kept_shape(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    """A shape without some of its axes: that of the rows of a reduction over them."""
    return tuple([n for i, n in enumerate(shape) if i not in axes])


def axis_of(axis: int, ndim: int) -> int:
    """One axis, as a number from 0."""
    if type(axis) is not int and (not hasattr(axis, "__index__") or isinstance(axis, bool)):
        raise TypeError(f"axis is {axis!r}; expected an integer")
    return axes_of(axis, ndim)[0]


def broadcast(x: Array, shape: tuple[int, ...], name: str) -> Array:
    """A view of `x` in a shape."""
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {x.shape}; expected one that broadcasts to {shape}"
        ) from None


def check_output(
    out: Any, name: str, shape: tuple[int, ...], dtype: Any, like: Array | None, inputs: Iterable[Array]
) -> None:
    """Whether `out` can be written: shape, dtype, writable, each element once, and not to an input.

    It may be `like` itself (the same memory in the same order), for an operation in place.
    """
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} is a {type(out).__name__}; expected a NumPy array")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}; expected {shape}")
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; expected {np.dtype(dtype)}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writable array")
    if _overlaps_itself(out):
        raise ValueError(f"{name} has several elements in one place (strides {out.strides})")
    for x in (like, *inputs):
        if x is None or not np.may_share_memory(out, x) or (x is like and _same_memory(out, x)):
            continue
        if _share_memory(out, x):
            raise ValueError(f"{name} shares memory with an input in another order; expected its own")


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
        and a.dtype == b.dtype
    )


def _share_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=1 << 16)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(a: Array) -> bool:
    """Whether axes, ordered by stride, do not each step over all of the smaller ones."""
    reach = a.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return a.size > 0
        reach += stride * (size - 1)
    return False
