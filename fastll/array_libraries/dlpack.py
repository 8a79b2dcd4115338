"""All other arrays with DLPack or `__cuda_array_interface__`, such as JAX's.

A result is given to the library of the array by `from_dlpack` of its array API namespace. Without such
a namespace it is a NumPy array, or on a GPU a Numba device array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from fastll import array_libraries as libraries
from fastll.array_libraries import CPU, Array, Device, Library, Shape

#: Devices by their DLPack code. Pinned host memory belongs to the host, managed memory to the GPU.
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 13: "cuda"}
_DEVICES |= {14: "oneapi", 15: "webgpu", 16: "hexagon"}

_DEFAULT_STREAM = 1  # in DLPack's numbering

_LINE = 64  # bytes in a cache line: JAX takes over memory aligned to it, and copies other memory


class Exchanged(Library):
    """The library of one array, as far as its protocols describe it."""

    def __init__(self, x: Any) -> None:
        self.name = type(x).__module__.partition(".")[0].replace("jaxlib", "jax")
        self.mutable = self.name != "jax"
        self.namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
        # DLPack is preferred, as it orders streams
        self.interface = None
        if not hasattr(self.namespace, "from_dlpack"):
            self.namespace, self.interface = None, getattr(x, "__cuda_array_interface__", None)
        self.consumer: int | None = None  # the stream that uses the array, if it is another's

    def device(self, x: Any) -> Device:
        if not hasattr(x, "__dlpack_device__"):
            return Device("cuda", _strided_memory(x, -1).device_id)
        try:
            code, index = x.__dlpack_device__()
        except BufferError as error:  # on several devices, or on one that DLPack does not know
            raise NotImplementedError(f"no backend for this {self.name} array: {error}") from None
        kind = _DEVICES.get(int(code), f"DLPack device {int(code)}")
        return CPU if kind == "cpu" else Device(kind, index)

    def view(self, x: Any, name: str) -> Array:
        device = self.device(x)
        if device == CPU:
            # np.from_dlpack does not accept bfloat16, but JAX gives NumPy a view of it
            return np.from_dlpack(x) if self.mutable else np.asarray(x)
        if self.interface is None:
            memory = _strided_memory(x, _DEFAULT_STREAM)  # some stream is required
            strides = memory.strides and tuple([s * memory.dtype.itemsize for s in memory.strides])
            # `memory` keeps the array alive
            owner = _Held(memory, self, device)
            return libraries.device_view(
                memory.ptr, memory.shape, strides, memory.dtype, owner, not memory.readonly
            )
        if self.interface.get("mask") is not None:
            raise TypeError(f"{name} has a mask; expected an array without a mask")
        address, read_only = self.interface["data"]
        shape, dtype = self.interface["shape"], np.dtype(self.interface["typestr"])
        return libraries.device_view(
            address, shape, self.interface.get("strides"), dtype, _Held(x, self, device), not read_only
        )

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        if device == CPU:
            size = prod(shape) * dtype.itemsize
            raw = np.empty(size + _LINE, np.uint8)
            start = -raw.ctypes.data % _LINE
            return raw[start : start + size].view(dtype).reshape(shape)
        if self.namespace is None:
            return libraries.load("numba").empty(shape, dtype, device, order)
        buffer = _Buffer(shape, dtype, device, self.stream(device))
        return libraries.device_view(buffer.address, shape, None, dtype, buffer)

    def give(self, view: Array) -> Any:
        result = view.owner if isinstance(view, libraries.View) else np.asarray(view)
        if self.namespace is None:
            return result
        try:
            return self.namespace.from_dlpack(result)
        except BufferError:  # NumPy exports no bfloat16
            return self.namespace.asarray(result)

    def stream(self, device: Device) -> int:
        return (self.interface or {}).get("stream") or 0

    def order(self, x: Any, device: Device, consumer: int) -> None:
        self.consumer = consumer
        if self.interface is None:
            if consumer:  # the view has already ordered the default stream
                x.__dlpack__(stream=consumer)
        elif self.interface.get("stream") is not None:
            libraries.order_streams(device, self.stream(device), consumer)


class _Held:
    """Another library's memory, kept as long as a stream may use it.

    The last view of it goes when a call returns, and then its kernels may still be queued: without
    anything that holds the memory, its library could give it out again.
    """

    def __init__(self, memory: Any, library: Exchanged, device: Device) -> None:
        self.memory, self.library, self.device = memory, library, device

    def __del__(self) -> None:
        stream = self.library.consumer
        if stream is None:
            stream = self.library.stream(self.device)
        with suppress(Exception):  # without a driver there is nothing that could be queued
            done = libraries.submitted(self.device, stream)
            if done is not None:
                _waiting.append((self.memory, done))
        _let_go()


#: Memory that was used by work that may be queued still, and what tells whether that is done.
_waiting: deque[tuple[Any, Callable[[], bool]]] = deque()


def _let_go() -> None:
    """Let go of memory whose work is done. What is left is asked for with the next array."""
    for _ in range(len(_waiting)):
        with suppress(Exception):  # another thread has taken the last one; or there is no device left
            memory, done = _waiting.popleft()
            if not done():
                _waiting.append((memory, done))


class _Buffer:
    """GPU memory for another library to take over by DLPack, ordered after the work that writes it."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any], device: Device, stream: int) -> None:
        from cuda import core
        from numba import cuda

        self.device, self.stream = device, stream
        producer = core.Stream.from_handle(stream) if stream else core.LEGACY_DEFAULT_STREAM
        with cuda.gpus[device.index]:  # restores the current device
            gpu = core.Device(device.index)
            gpu.set_current()
            memory = gpu.allocate(max(1, prod(shape) * dtype.itemsize), stream=producer)
        self.address = int(memory.handle)
        self.memory = core.utils.StridedMemoryView.from_buffer(memory, shape, dtype=dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.index

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream is not None and stream != -1:
            libraries.order_streams(self.device, self.stream, stream)
        return self.memory.__dlpack__(stream=-1, **options)


def _strided_memory(x: Any, stream: int) -> Any:
    """View of an array on a GPU by either protocol, ordered for a stream (-1: not ordered)."""
    kind = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        raise RuntimeError(f"a {kind} on a GPU {libraries.NEEDS_NUMBA_CUDA}") from error
    view = getattr(StridedMemoryView, "from_any_interface", StridedMemoryView)  # in older versions
    try:
        return view(x, stream)
    except RuntimeError as error:  # no driver
        raise RuntimeError(f"a {kind} claims to be on a GPU, but there is none: {error}") from error
