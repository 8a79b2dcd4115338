"""torch tensors, on the CPU and on CUDA devices. What PyTorch records or batches an adapter does."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensor

from fastll import adapted
from fastll import array_libraries as libraries
from fastll.array_libraries import CPU, Array, Device, Library, Shape
from fastll.dtypes import ACCEPTED, BFLOAT16

_INT = "int8 int16 int32 int64 uint8 uint16 uint32 uint64"  # torch before 2.3 lacks the last three
_DTYPES: dict[Any, np.dtype[Any]] = {
    getattr(torch, dtype): np.dtype(dtype)
    for dtype in f"bool float16 float32 float64 {_INT}".split()
    if hasattr(torch, dtype)
}
_DTYPES[torch.bfloat16] = BFLOAT16
_TORCH = {dtype: own for own, dtype in _DTYPES.items()}

#: The handle of a device's current stream; PyTorch's own compiled code asks by it, in a tenth of the
#: time of ``torch.cuda.current_stream``.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)

#: Types of tensors of which PyTorch's own functions take no special notice.
TENSORS = torch.Tensor, torch.nn.Parameter

_devices = {torch.device("cpu"): CPU}


adapted.torch = torch


#: From this many bytes on, memory is asked for in huge pages, as NumPy asks for its arrays.
_HUGE_FROM = 1 << 22
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
if _madvise is not None:
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def _use_huge_pages(x: Any) -> None:
    """Ask for huge pages for a new tensor: the faults of small ones take longer than a kernel."""
    if _madvise is None or x.nbytes < _HUGE_FROM:
        return
    start, stop = x.data_ptr(), x.data_ptr() + x.nbytes
    start += -start % mmap.PAGESIZE
    _madvise(start, (stop - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


def _stands_for_others(x: Any) -> bool:
    """Whether a tensor has no memory of its own, as in a transformation of ``torch.func``."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x)) or isinstance(x, FakeTensor)


class Torch(Library):
    name = "torch"
    plain = TENSORS

    def device(self, x: Any) -> Device:
        try:
            return _devices[x.device]
        except KeyError:
            kind, index = x.device.type, x.device.index
        if kind == "meta":
            raise TypeError("a torch tensor on the meta device has no elements to compute with")
        kind = "rocm" if kind == "cuda" and torch.version.hip else kind
        return _devices.setdefault(x.device, Device(kind, index or 0))

    def view(self, x: Any, name: str) -> Array:
        dtype = _DTYPES.get(x.dtype)
        if dtype is None:
            raise TypeError(f"{name} has dtype {x.dtype}; fastll takes {ACCEPTED}")
        if x.layout is not torch.strided:
            raise TypeError(
                f"{name} has layout {x.layout}; expected a dense tensor such as {name}.to_dense()"
            )
        if x.is_neg():
            raise TypeError(f"{name} is a negated view; expected {name}.resolve_neg()")
        if (x.requires_grad and torch.is_grad_enabled()) or _stands_for_others(x):
            raise adapted.AdapterNeededError(
                "_torch_calls",
                f"{name} is in PyTorch's graph, where this has no part; expected {name}.detach()",
            )
        x = x.detach() if x.requires_grad else x
        if not x.is_cpu:
            strides = tuple([stride * dtype.itemsize for stride in x.stride()])
            return libraries.device_view(x.data_ptr(), tuple(x.shape), strides, dtype, x)
        array: Array = x.view(torch.int16).numpy().view(BFLOAT16) if dtype is BFLOAT16 else x.numpy()
        return array

    def are_plain(self, arrays: tuple[Any, ...]) -> bool:
        recorded = torch.is_grad_enabled()
        for x in arrays:
            if type(x) not in TENSORS or not x.is_cpu or (recorded and x.requires_grad) or x.is_neg():
                return False
        return True

    def check_writable(self, x: Any, name: str) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, which writing to it would make wrong; expected a tensor "
                "that does not, or torch.no_grad()"
            )

    def writes(self, x: Any) -> None:
        # a backward pass that needs the old values then raises
        torch.autograd.graph.increment_version(x)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: Device, order: Shape | None) -> Array:
        owner = self.maker(shape, dtype, order, device)()
        if device.type == "cpu":
            _use_huge_pages(owner)
        result = self.view(owner, "result").view(
            libraries.DeviceView if device.type == "cuda" else libraries.View
        )
        result.owner = owner
        return result

    def facts(self, x: Any) -> tuple[int, Hashable]:
        if not x.is_cuda or x.is_neg() or (x.requires_grad and torch.is_grad_enabled()):
            return 0, None
        # of a tensor that stands for others, or is sparse, this raises an error
        return x.data_ptr(), (x.get_device(), x.dtype, x.shape, x.stride())

    def maker(
        self, shape: Shape, dtype: np.dtype[Any], order: Shape | None, device: Device
    ) -> Callable[[], Any]:
        allocated, inverse = (shape, None) if order is None else libraries.permuted(shape, order)
        make = partial(torch.empty, allocated, dtype=_TORCH[dtype], device=torch.device(str(device)))
        return make if inverse is None else lambda: make().permute(inverse)

    address = staticmethod(torch.Tensor.data_ptr)

    def adopt(self, a: Array) -> Any:
        if a.dtype is BFLOAT16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    def give(self, view: Array) -> Any:
        owner = getattr(view, "owner", None)
        return self.adopt(np.asarray(view)) if owner is None else owner

    def stream(self, device: Device) -> int:
        handle: int = _current_stream(device.index)
        return handle


library = Torch()
