"""Turns arguments into arrays: every check of an array, an axis or an output.

Each error names the argument, its value and what was expected. Nothing here writes to an array, copies
an input or waits for a device.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fastll import adapted, replay
from fastll.array_libraries import CPU, Device, Library, Shape, library_of
from fastll.dtypes import kind_of, name_of

Array = NDArray[Any]
Axis = int | Sequence[int] | None

#: All axes of an array, by their number.
_ALL_AXES = tuple(tuple(range(ndim)) for ndim in range(65))


class Place:
    """The library and device of a call's arrays and results."""

    __slots__ = ("device", "library", "on_cpu")

    def __init__(self, library: Library, device: Device) -> None:
        self.library, self.device, self.on_cpu = library, device, device == CPU

    @property
    def stream(self) -> int:
        """Handle of the caller's current stream on a GPU."""
        return self.library.stream(self.device)

    def take(self, x: Any, name: str) -> Array:
        """An argument as an array of an accepted dtype; arrays are not copied."""
        library = self._library_of(x, name)
        check_unmasked(x, name)
        array: Array = np.asarray(x) if library is None else self._view(library, x, name)
        kind_of(array.dtype, name)
        return array

    def output(
        self,
        out: Any,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        inputs: Iterable[Array | None],
        *,
        like: Array | None = None,
        cast: bool = False,
    ) -> Array:
        """Check an output, and return the view to write it through."""
        library = self._library_of(out, name)
        if library is None and not isinstance(out, np.ndarray):
            raise TypeError(f"{name} is a {type(out).__name__}; expected an array")
        if library is not None:
            library.check_writable(out, name)
        check_unmasked(out, name)
        array: Array = out if library is None else self._view(library, out, name)
        check_output(array, name, shape, dtype, inputs, like, cast)
        if library is not None:
            library.writes(out)
            replay.written(out)
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array."""
        return self._new(shape, np.dtype(dtype), None)

    def _new(self, shape: Shape, dtype: np.dtype[Any], order: Shape | None) -> Array:
        view = self.library.empty(shape, dtype, self.device, order)
        replay.made(view, shape, dtype, order)
        return view

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array that does not outlive the call."""
        return np.empty(shape, dtype) if self.on_cpu else self.empty(shape, dtype)

    def empty_like(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """A new array with the shape of another and its axes in the same order in memory."""
        order = None
        if not x.flags.c_contiguous:
            order = tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))
        return self._new(x.shape, dtype, order)

    def give(self, view: Array) -> Any:
        """A result as an array of the library, or as a NumPy scalar."""
        return self.library.give(view)

    give_array = give  # as an array, even if it is of NumPy and has no dimensions

    def _view(self, library: Library, x: Any, name: str) -> Array:
        """The view of another library's array, ordered before work on this call's stream."""
        array = library.view(x, name)
        if library is not self.library and not self.on_cpu:
            library.order(x, self.device, self.stream)
        return array

    def _library_of(self, x: Any, name: str) -> Library | None:
        """The library of an argument, after a check that it is on this device."""
        library = library_of(x)
        device = CPU if library is None else library.device(x)
        if device != self.device:
            raise ValueError(f"{name} is on {device}; expected it on {self.device}, as the first array")
        return library


class _Host(Place):
    """NumPy arrays: the fast path."""

    __slots__ = ()

    def take(self, x: Any, name: str) -> Array:
        if type(x) is np.ndarray:
            kind_of(x.dtype, name)
            return x
        return super().take(x, name)

    empty = scratch = staticmethod(np.empty)  # type: ignore[assignment]

    def empty_like(self, x: Array, dtype: np.dtype[Any]) -> Array:
        if x.flags.c_contiguous:  # twice as fast
            return np.empty(x.shape, dtype)
        return np.empty_like(x, dtype=dtype, subok=False)

    def give(self, view: Array) -> Any:
        return view[()]

    def give_array(self, view: Array) -> Any:
        return view


#: The place of NumPy arrays and of anything that np.asarray takes. It asks no library for anything.
HOST = _Host(cast(Library, None), CPU)


def place_of(x: Any) -> Place:
    """The place of a call by its first array."""
    if type(x) is np.ndarray:
        return HOST
    library = library_of(x)
    if library is None:
        return HOST
    device = library.device(x)
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"an array of {library.name} is on {device}, which has no backend")
    if device.type == "cuda" and type(x) in library.plain:
        adapted.on_gpu.update(dict.fromkeys(library.plain, library))
    return Place(library, device)


def axes_of(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Axes counted from 0, in ascending order; None means all."""
    if axis is None:
        return _ALL_AXES[ndim]
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    axes = tuple(axis) if isinstance(axis, Sequence) and not isinstance(axis, str) else (axis,)
    if any(isinstance(a, (bool, np.bool_)) or not hasattr(a, "__index__") for a in axes):
        raise TypeError(f"axis is {axis!r}; expected an integer, a tuple of them or None")
    numbers = [operator.index(a) for a in axes]
    if not all(-ndim <= number < ndim for number in numbers):
        raise np.exceptions.AxisError(
            f"axis is {axis!r}; expected {-ndim} <= axis < {ndim} for {ndim} dimensions"
        )
    counted = {number % ndim for number in numbers}
    if len(counted) < len(numbers):
        raise ValueError(f"axis is {axis!r}; expected each axis once")
    return tuple(sorted(counted))


def kept_shape(shape: tuple[int, ...], axes: Sequence[int], keepdims: bool = False) -> tuple[int, ...]:
    """The shape of a reduction over some axes."""
    if keepdims:
        return tuple([1 if i in axes else n for i, n in enumerate(shape)])
    if len(axes) == len(shape):
        return ()
    if len(axes) == 1:
        return shape[: axes[0]] + shape[axes[0] + 1 :]
    return tuple([n for i, n in enumerate(shape) if i not in axes])


def axis_of(axis: int, ndim: int) -> int:
    """One axis, counted from 0."""
    if type(axis) is not int and (axis is None or isinstance(axis, Sequence)):
        raise TypeError(f"axis is {axis!r}; expected an integer")
    return axes_of(axis, ndim)[0]


def broadcast(x: Array, shape: tuple[int, ...], name: str) -> Array:
    """`x` broadcast to a shape, without copying."""
    if x.shape == shape:
        return x
    try:
        return np.broadcast_to(x, shape, subok=True)
    except ValueError:
        raise ValueError(
            f"{name} has shape {x.shape}; expected one that broadcasts to {shape}"
        ) from None


def check_unmasked(x: Any, name: str) -> None:
    """`TypeError` for a masked array with masked elements: the mask would be ignored."""
    # if it is not imported, there are no masked arrays; another thread may be about to import it
    ma = sys.modules.get("numpy.ma")
    if ma is not None and isinstance(x, getattr(ma, "MaskedArray", ())) and ma.is_masked(x):
        raise TypeError(f"{name} is a masked array with masked elements; expected one without a mask")


def check_output(
    out: Array,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inputs: Iterable[Array | None],
    like: Array | None,
    cast: bool,
) -> None:
    """Check that `out` can be written: shape, dtype, no element twice, no overlap with inputs.

    It may be `like` itself (the same memory in the same order), for an operation in place. With `cast`,
    any dtype will do that `dtype` can be cast to.
    """
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}; expected {shape}")
    if out.dtype != dtype:
        own, wanted = name_of(out.dtype), name_of(dtype)
        if cast and own != "bfloat16" and not np.can_cast(dtype, out.dtype, "same_kind"):
            raise TypeError(f"{name} has dtype {own}; expected one that {wanted} can be cast to")
        if not cast and (own != wanted or not out.dtype.isnative):
            raise TypeError(f"{name} has dtype {own}; expected {wanted}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writable array")
    if _overlaps_itself(out):
        raise ValueError(f"{name} has several elements at one address (strides {out.strides})")
    for x in (like, *inputs):
        if x is None or not np.may_share_memory(out, x) or (x is like and _memory(out) == _memory(x)):
            continue
        if _share_memory(out, x):
            raise ValueError(f"{name} shares memory with an input in another order; expected its own")


def _memory(a: Array) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    return a.__array_interface__["data"][0], a.strides, a.dtype


def _share_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=1 << 16)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(a: Array) -> bool:
    """Whether elements may coincide: some axis does not step over all axes of smaller stride."""
    reach = a.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return a.size > 0
        reach += stride * (size - 1)
    return False
