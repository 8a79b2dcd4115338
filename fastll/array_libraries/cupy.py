"""CuPy arrays."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import cupy
import numpy as np

from fastll.array_libraries import Array, Device, Library, Shape, device_view, permuted


class CuPy(Library):
    name = "cupy"
    plain = (cupy.ndarray,)

    def device(self, x: Any) -> Device:
        return Device("rocm" if cupy.cuda.runtime.is_hip else "cuda", x.device.id)

    def view(self, x: Any, name: str) -> Array:
        return device_view(x.data.ptr, x.shape, x.strides, x.dtype, x)

    def facts(self, x: Any) -> tuple[int, Hashable]:
        return x.data.ptr, (x.device.id, x.dtype, x.shape, x.strides)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        with cupy.cuda.Device(device.index):
            if order is None:
                return self.view(cupy.empty(shape, dtype), "result")
            shape, inverse = permuted(shape, order)
            return self.view(cupy.empty(shape, dtype).transpose(inverse), "result")

    def stream(self, device: Device) -> int:
        with cupy.cuda.Device(device.index):
            handle: int = cupy.cuda.get_current_stream().ptr
        return handle


library = CuPy()
