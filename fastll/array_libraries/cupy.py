"""CuPy arrays."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from fastll.array_libraries import Array, Device, Shape, device_view, order_streams, permuted

name = "cupy"
mutable = True


def device(x: Any) -> Device:
    return Device("rocm" if cupy.cuda.runtime.is_hip else "cuda", x.device.id)


def view(x: Any, name: str) -> Array:
    return device_view(x.data.ptr, x.shape, x.strides, x.dtype, x)


def writes(x: Any) -> None:
    pass


def empty(shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
    with cupy.cuda.Device(device.index):
        if order is None:
            return view(cupy.empty(shape, dtype), "result")
        shape, inverse = permuted(shape, order)
        return view(cupy.empty(shape, dtype).transpose(inverse), "result")


def give(view: Array) -> Any:
    return view.owner  # type: ignore[attr-defined]


def stream(device: Device) -> int:
    with cupy.cuda.Device(device.index):
        handle: int = cupy.cuda.get_current_stream().ptr
    return handle


def order(x: Any, device: Device, consumer: int) -> None:
    order_streams(device, stream(device), consumer)
