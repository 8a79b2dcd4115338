"""Arrays of other libraries: which library an array belongs to, and what fastll needs from it.

Inside fastll every array is a NumPy array *object*, even one on a GPU: validation, layout and kernels
use its shape, strides, dtype and address. Nothing here imports a library before one of its arrays is
met, and then it has been imported already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fastll.adapted import AdapterNeededError

Array = NDArray[Any]
Shape = tuple[int, ...]  # also an order of axes


class Device(NamedTuple):
    """Where memory is: "cpu", or "cuda" with an index."""

    type: str
    index: int = 0  # type: ignore[assignment]  # hides tuple.index

    def __str__(self) -> str:
        return self.type if self == CPU else f"{self.type}:{self.index}"


CPU = Device("cpu")

#: End of the error message for an array on a GPU without the package that handles it.
NEEDS_NUMBA_CUDA = 'needs the package numba-cuda: pip install "fastll[cuda12]" or "fastll[cuda13]"'


class Library(Protocol):
    """What fastll needs from an array library.

    `stream` and `order` are only called for arrays on a GPU.
    """

    name: str  # in messages
    mutable: bool = True  # whether its arrays may be written to
    plain: tuple[type, ...] = ()  # types of arrays that have `facts`

    def device(self, x: Any) -> Device:
        """Device of an array."""

    def view(self, x: Any, name: str) -> Array:
        """NumPy object with an array's geometry; `TypeError` with the array's name if it has none."""

    def are_plain(self, arrays: tuple[Any, ...]) -> bool:
        """Whether arrays are this library's, on the CPU, and may be read as they are."""
        return False

    def adopt(self, a: Array) -> Any:
        """The library's array for the memory of a NumPy array on the CPU."""
        return a

    def check_writable(self, x: Any, name: str) -> None:
        """Raise an error if an array, called `name`, cannot be written to."""
        if not self.mutable:
            raise TypeError(f"{name} is an array of {self.name}, which cannot be written")

    def writes(self, x: Any) -> None:
        """Notify the library before writing to `x`."""
        return

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        """View of a new array, its `owner`; `order` lists the axes, outermost in memory first."""

    def facts(self, x: Any) -> tuple[int, Hashable]:
        """The address of a `plain` array on a GPU, and all else that a call of it depends on; None or
        an error where that is more than its geometry."""
        return 0, None

    def maker(
        self, shape: Shape, dtype: np.dtype[Any], order: Shape | None, device: Device
    ) -> Callable[[], Any]:
        """What makes the library's own array of `empty`. Only called for those that have `facts`."""
        return lambda: self.empty(shape, dtype, device, order).owner  # type: ignore[attr-defined]

    def address(self, x: Any) -> int:
        """The address of an array that was made by `maker`."""
        return self.facts(x)[0]

    def give(self, view: Array) -> Any:
        """The library's array for a result: the view's `owner`, or one for a NumPy array or scalar."""
        return view.owner  # type: ignore[attr-defined]

    def stream(self, device: Device) -> int:
        """Handle of the caller's current stream."""

    def order(self, x: Any, device: Device, consumer: int) -> None:
        """Make a stream wait for the work that produces an array, without blocking the host."""
        order_streams(device, self.stream(device), consumer)


class View(np.ndarray[Any, np.dtype[Any]]):
    """An array that refers to the library's own object for the same memory."""

    owner: Any = None


class DeviceView(View):
    """The geometry of an array on a device. It supports views and nothing else."""

    __array_ufunc__ = None  # type: ignore[assignment]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func not in _GEOMETRY:
            _refuse(self)
        return super().__array_function__(func, types, args, kwargs)

    def __getitem__(self, at: Any) -> Any:
        index = at if isinstance(at, tuple) else (at,)
        if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
            _refuse(self)
        return super().__getitem__(index if ... in index else (*index, ...))  # an array, never a scalar

    def reshape(self, *shape: Any, **options: Any) -> Any:
        if not self.flags.c_contiguous:
            _refuse(self)
        return super().reshape(*shape, **options)

    def __repr__(self) -> str:
        return f"DeviceView(shape={self.shape}, dtype={self.dtype}, address={self.ctypes.data:#x})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)


_GEOMETRY = {np.broadcast_to, np.may_share_memory, np.shares_memory, np.shape, np.ndim, np.size}


def _refuse(self: DeviceView, *args: Any, **options: Any) -> NoReturn:
    raise TypeError("this array is on a device: NumPy cannot access its memory")


_TOUCHING = """
    __bool__ __complex__ __contains__ __copy__ __deepcopy__ __float__ __index__ __int__ __iter__
    __reduce__ __reduce_ex__ __setitem__ all any argmax argmin argpartition argsort astype byteswap
    choose clip compress conj conjugate copy cumprod cumsum diagonal dot dump dumps fill flatten item
    max mean min nonzero partition prod put ravel repeat round searchsorted sort std sum take tobytes
    tofile tolist trace var
"""
for _name in _TOUCHING.split():
    setattr(DeviceView, _name, _refuse)


def device_view(
    address: int,
    shape: Shape,
    strides: Shape | None,  # in bytes; None means C order
    dtype: np.dtype[Any],
    owner: Any,
    writeable: bool = True,
) -> DeviceView:
    """View of memory on a device; nothing is read."""
    interface = {
        "data": (address, not writeable),
        "shape": tuple(shape),
        "strides": strides,
        "typestr": f"|V{dtype.itemsize}",
        "version": 3,
    }
    # views of the view keep the owner alive too
    memory = SimpleNamespace(__array_interface__=interface, owner=owner)
    view = np.asarray(memory).view(dtype).view(DeviceView)
    view.owner = owner
    return view


#: Library of each type of array met so far; None for NumPy's, or if np.asarray converts it.
_known: dict[type, Library | None] = dict.fromkeys((np.ndarray, list, tuple, int, float, bool))

#: Package and class name of the arrays for which this package has a module, named after theirs.
_ARRAYS = {("torch", "Tensor"), ("cupy", "ndarray"), ("numba", "DeviceNDArrayBase")}
_ARRAYS |= {("numba", "FakeCUDAArray")}  # in its simulator


def library_of(x: Any) -> Library | None:
    """Library of an array; None for NumPy arrays and for whatever np.asarray accepts."""
    try:
        return _known[type(x)]
    except KeyError:
        return _find(x)


def _find(x: Any) -> Library | None:
    kind = type(x)
    if isinstance(x, np.ndarray | np.generic):
        return _known.setdefault(kind, None)
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if (package, base.__name__) == ("dask", "Array"):
            raise AdapterNeededError("dask", "a dask array is not taken here; expected a NumPy array")
        if (package, base.__name__) in _ARRAYS:
            return _known.setdefault(kind, load(package))
    if hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack_device__"):
        from fastll.array_libraries.dlpack import Exchanged

        return Exchanged(x)
    return None


def load(module: str) -> Library:
    """Load a library by the name of its module in this package."""
    return cast(Library, import_module(f"fastll.array_libraries.{module}").library)


def order_streams(device: Device, after: int, stream: int) -> None:
    """Make `stream` wait for the work submitted to another stream, `after`, of the same device."""
    if after == stream:
        return
    from numba import cuda

    with cuda.gpus[device.index]:
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(after))
        event.wait(cuda.external_stream(stream))


def submitted(device: Device, stream: int) -> Callable[[], bool] | None:
    """What tells, without waiting, whether all work submitted to a stream by now is done.

    None while a graph is captured from the stream: what it reads has to be kept by whoever replays it.
    """
    from cuda.bindings import driver
    from numba import cuda

    error, capturing = driver.cuStreamIsCapturing(stream)
    if error or capturing:
        return None
    with cuda.gpus[device.index]:
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(stream))

    def done() -> bool:
        # to ask must not break a capture of another thread's
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _, mode = driver.cuThreadExchangeStreamCaptureMode(relaxed)
        try:
            return bool(event.query())
        finally:
            driver.cuThreadExchangeStreamCaptureMode(mode)

    return done


def permuted(shape: Shape, order: Shape) -> tuple[Shape, Shape]:
    """Shape to allocate for an order of the axes in memory, and the transposition back."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tuple([shape[axis] for axis in order]), tuple(inverse)
