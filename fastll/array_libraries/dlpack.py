"""Any other array that speaks a protocol: JAX's, and whatever has DLPack or `__cuda_array_interface__`.

A result is handed to the library of the array by its `from_dlpack`, which the array API standard asks
for. Where there is no such namespace it is a NumPy array, or on a GPU a Numba device array.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from fastll.array_libraries import (
    CPU,
    NEEDS_NUMBA_CUDA,
    Array,
    Device,
    View,
    device_view,
    load,
    order_streams,
)

#: Devices by their code in DLPack: memory of the host that a GPU can read is the host's, memory that
#: both share the GPU's.
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 13: "cuda"}
_DEVICES |= {14: "oneapi", 15: "webgpu", 16: "hexagon"}

_DEFAULT_STREAM = 1  # as DLPack has it

_LINE = 64  # bytes: JAX takes over memory that begins on a line of the cache, and copies other


class Exchanged:
    """The library of one array, as far as its protocols tell."""

    def __init__(self, x: Any) -> None:
        self.name = type(x).__module__.partition(".")[0].replace("jaxlib", "jax")
        self.mutable = self.name != "jax"
        self.namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
        # of the two protocols DLPack is the one that orders streams
        self.interface = None
        if not hasattr(self.namespace, "from_dlpack"):
            self.namespace, self.interface = None, getattr(x, "__cuda_array_interface__", None)

    def device(self, x: Any) -> Device:
        if not hasattr(x, "__dlpack_device__"):
            return Device("cuda", _strided_memory(x, -1).device_id)
        try:
            code, index = x.__dlpack_device__()
        except BufferError as error:  # on several devices, or one that DLPack does not know
            raise NotImplementedError(f"an array of {self.name} has no backend: {error}") from None
        kind = _DEVICES.get(int(code), f"DLPack device {int(code)}")
        return CPU if kind == "cpu" else Device(kind, index)

    def view(self, x: Any, name: str) -> Array:
        if self.device(x) == CPU:
            # JAX has a NumPy view of bfloat16 too, which NumPy does not take by DLPack
            return np.from_dlpack(x) if self.mutable else np.asarray(x)
        if self.interface is None:
            memory = _strided_memory(
                x, _DEFAULT_STREAM
            )  # a stream must be named, and this does no harm
            strides = memory.strides and tuple([s * memory.dtype.itemsize for s in memory.strides])
            # the view of the memory keeps it alive
            return device_view(
                memory.ptr, memory.shape, strides, memory.dtype, memory, not memory.readonly
            )
        if self.interface.get("mask") is not None:
            raise TypeError(f"{name} has a mask; expected an array without")
        address, read_only = self.interface["data"]
        shape, dtype = self.interface["shape"], np.dtype(self.interface["typestr"])
        return device_view(address, shape, self.interface.get("strides"), dtype, x, not read_only)

    def writes(self, x: Any) -> None:
        pass

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: Device,
        order: tuple[int, ...] | None = None,
    ) -> Array:
        if device == CPU:
            size = prod(shape) * dtype.itemsize
            raw = np.empty(size + _LINE, np.uint8)
            start = -raw.ctypes.data % _LINE
            return raw[start : start + size].view(dtype).reshape(shape)
        if self.namespace is None:
            return load("numba").empty(shape, dtype, device, order)
        buffer = _Buffer(shape, dtype, device, self.stream(device))
        return device_view(buffer.address, shape, None, dtype, buffer)

    def give(self, view: Array) -> Any:
        result = view.owner if isinstance(view, View) else np.asarray(view)
        if self.namespace is None:
            return result
        try:
            return self.namespace.from_dlpack(result)
        except BufferError:  # NumPy exports no bfloat16
            return self.namespace.asarray(result)

    def stream(self, device: Device) -> int:
        return (self.interface or {}).get("stream") or 0

    def order(self, x: Any, device: Device, consumer: int) -> None:
        if self.interface is None:
            if consumer:  # the default stream has been ordered by the view
                x.__dlpack__(stream=consumer)
        elif self.interface.get("stream") is not None:
            order_streams(device, self.stream(device), consumer)


class _Buffer:
    """Memory of a GPU that another library takes over by DLPack, ordered after what wrote it."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device, stream: int
    ) -> None:
        from cuda import core
        from numba import cuda

        self.device, self.stream = device, stream
        producer = core.Stream.from_handle(stream) if stream else core.LEGACY_DEFAULT_STREAM
        with cuda.gpus[device.index]:  # the device that is current stays so
            gpu = core.Device(device.index)
            gpu.set_current()
            memory = gpu.allocate(max(1, prod(shape) * dtype.itemsize), stream=producer)
        self.address = int(memory.handle)
        self.memory = core.utils.StridedMemoryView.from_buffer(memory, shape, dtype=dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.index

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream is not None and stream != -1:
            order_streams(self.device, self.stream, stream)
        return self.memory.__dlpack__(stream=-1, **options)


def _strided_memory(x: Any, stream: int) -> Any:
    """A view of an array on a GPU by either protocol, for work on a stream; -1: for none."""
    kind = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        raise RuntimeError(f"a {kind} on a GPU {NEEDS_NUMBA_CUDA}") from error
    view = getattr(StridedMemoryView, "from_any_interface", StridedMemoryView)  # of older versions
    try:
        return view(x, stream)
    except RuntimeError as error:  # no driver
        raise RuntimeError(f"a {kind} says that it is on a GPU, but there is none: {error}") from error
