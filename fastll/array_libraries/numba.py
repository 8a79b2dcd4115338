"""Numba's device arrays, and those of its simulator. Its current stream is the default stream."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numba import cuda

from fastll.array_libraries import Array, Device, Shape, device_view, order_streams, permuted

name = "numba"
mutable = True


def device(x: Any) -> Device:
    memory = getattr(x, "gpu_data", None)
    return Device("cuda", 0 if memory is None else memory.context.device.id)


def view(x: Any, name: str) -> Array:
    on_gpu = hasattr(x, "gpu_data")  # false in the simulator, whose arrays are on the host
    address = x.device_ctypes_pointer.value or 0 if on_gpu else x.ctypes.data
    return device_view(address, tuple(x.shape), x.strides, x.dtype, x)


def writes(x: Any) -> None:
    pass


def empty(shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
    strides = None
    if order is not None:
        outermost, inverse = permuted(shape, order)
        steps = [dtype.itemsize * int(np.prod(outermost[axis + 1 :])) for axis in range(len(shape))]
        strides = tuple([steps[axis] for axis in inverse])
    context: AbstractContextManager[Any] = cuda.gpus[device.index]
    with context:
        return view(cuda.device_array(shape, dtype, strides=strides), "result")


def give(view: Array) -> Any:
    return view.owner  # type: ignore[attr-defined]


def stream(device: Device) -> int:
    return 0


def order(x: Any, device: Device, consumer: int) -> None:
    order_streams(device, x.stream and int(x.stream), consumer)
