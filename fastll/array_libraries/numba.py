"""Numba's device arrays, and those of its simulator. Its current stream is the default stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from fastll.array_libraries import Array, Device, Library, Shape, device_view, order_streams, permuted


class Numba(Library):
    name = "numba"

    def device(self, x: Any) -> Device:
        memory = getattr(x, "gpu_data", None)
        return Device("cuda", 0 if memory is None else memory.context.device.id)

    def view(self, x: Any, name: str) -> Array:
        on_gpu = hasattr(x, "gpu_data")  # false in the simulator, whose arrays are on the host
        address = x.device_ctypes_pointer.value or 0 if on_gpu else x.ctypes.data
        return device_view(address, tuple(x.shape), x.strides, x.dtype, x)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        strides = None
        if order is not None:
            outermost, inverse = permuted(shape, order)
            steps = [dtype.itemsize * int(np.prod(outermost[axis + 1 :])) for axis in range(len(shape))]
            strides = tuple([steps[axis] for axis in inverse])
        with cuda.gpus[device.index]:
            array = cuda.device_array(shape, dtype, strides=strides)
        return self.view(array, "result")

    def stream(self, device: Device) -> int:
        return 0

    def order(self, x: Any, device: Device, consumer: int) -> None:
        order_streams(device, x.stream and int(x.stream), consumer)


library = Numba()
