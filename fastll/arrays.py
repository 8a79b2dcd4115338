"""Arguments into arrays: every check of an argument that is an array, an axis or an output.

Each error names the argument, its value and what was expected. Nothing here writes to an array.

Every public function takes NumPy arrays, whatever np.asarray takes, and the arrays of other libraries:
torch, CuPy, Numba, JAX and all that have DLPack or `__cuda_array_interface__`. The result comes back in
the library and on the device of the first one, computed on the caller's current stream. No input is
copied, and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import NDArray

from fastll.array_libraries import CPU, Device, Library, library_of
from fastll.dtypes import kind_of, name_of

Array = NDArray[Any]


class Place:
    """Where a call's arrays are and its results go: a library and one of its devices."""

    __slots__ = ("device", "library", "on_cpu")

    def __init__(self, library: Library | None, device: Device) -> None:
        self.library, self.device, self.on_cpu = library, device, device == CPU

    @property
    def stream(self) -> int:
        """Handle of the caller's current stream on a GPU."""
        return self._library.stream(self.device)

    def take(self, x: Any, name: str) -> Array:
        """An argument as an array of a dtype that fastll computes with; no copy where it is one."""
        library = self._library_of(x, name)
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
        """The view to write an output through, once it is checked."""
        library = self._library_of(out, name)
        if library is None:
            if not isinstance(out, np.ndarray):
                raise TypeError(f"{name} is a {type(out).__name__}; expected an array")
            check_output(out, name, shape, dtype, inputs, like, cast)
            return out
        if not library.mutable:
            raise TypeError(f"{name} is an array of {library.name}, which cannot be written")
        array = self._view(library, out, name)
        check_output(array, name, shape, dtype, inputs, like, cast)
        library.writes(out)
        return array

    def result(self, x: Array, out: Any, name: str, inputs: Iterable[Array | None] = ()) -> Array:
        """`out` once it is checked, or a new array, for a result in the shape of `x`."""
        element = kind_of(x.dtype).element
        if out is None:
            return self.empty_like(x, element)
        return self.output(out, name, x.shape, element, inputs, like=x)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array."""
        return self._library.empty(shape, np.dtype(dtype), self.device, None)

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array that stays within the call."""
        return np.empty(shape, dtype) if self.on_cpu else self.empty(shape, dtype)

    def empty_like(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """A new array in the shape of another, its axes in the same order in memory."""
        order = None
        if not x.flags.c_contiguous:
            order = tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))
        return self._library.empty(x.shape, dtype, self.device, order)

    def give(self, view: Array) -> Any:
        """A result as the library's own array; NumPy's without axes as a scalar."""
        return self._library.give(view)

    def give_array(self, view: Array) -> Any:
        """A result as the library's own array."""
        return self._library.give(view)

    @property
    def _library(self) -> Library:
        assert self.library is not None  # HOST overrides all that asks
        return self.library

    def _view(self, library: Library, x: Any, name: str) -> Array:
        """The view of another library's array, which this one's stream may then work on."""
        array = library.view(x, name)
        if library is not self.library and not self.on_cpu:
            library.order(x, self.device, self.stream)
        return array

    def _library_of(self, x: Any, name: str) -> Library | None:
        """The library of an argument, which must be on this device."""
        library = library_of(x)
        device = CPU if library is None else library.device(x)
        if device != self.device:
            raise ValueError(f"{name} is on {device}; expected it on {self.device}, as the first array")
        return library


class _Host(Place):
    """NumPy: the fast path."""

    __slots__ = ()

    def take(self, x: Any, name: str) -> Array:
        if type(x) is np.ndarray:
            kind_of(x.dtype, name)
            return x
        return super().take(x, name)

    empty = scratch = staticmethod(np.empty)  # type: ignore[assignment]

    def empty_like(self, x: Array, dtype: np.dtype[Any]) -> Array:
        return np.empty_like(x, dtype=dtype, subok=False)

    def result(self, x: Array, out: Any, name: str, inputs: Iterable[Array | None] = ()) -> Array:
        if out is None:
            return np.empty_like(x, dtype=kind_of(x.dtype).element, subok=False)
        return super().result(x, out, name, inputs)

    def give(self, view: Array) -> Any:
        return view[()]

    def give_array(self, view: Array) -> Any:
        return view


#: The place of NumPy arrays, and of what np.asarray takes.
HOST = _Host(None, CPU)


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
    return Place(library, device)


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
        return np.broadcast_to(x, shape, subok=True)
    except ValueError:
        raise ValueError(
            f"{name} has shape {x.shape}; expected one that broadcasts to {shape}"
        ) from None


def check_output(
    out: Array,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inputs: Iterable[Array | None],
    like: Array | None,
    cast: bool,
) -> None:
    """Whether `out` can be written: shape, dtype, writable, each element once, and not to an input.

    It may be `like` itself (the same memory in the same order), for an operation in place. With `cast`
    its dtype is one that `dtype` can be cast to.
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
