"""A GPU for the tests: a real one where there is one, else the emulator of PTX.

Tests are written for NumPy. `on_device` makes of a public function one that takes NumPy arrays, calls
the function with arrays on the device, in the same strides, and brings back what it returns and writes.
"""

import functools
from types import SimpleNamespace

import numpy as np
import ptx
from numpy.lib.array_utils import byte_bounds

import fastll
from fastll import libraries
from fastll.backends.cuda import compiler, launch
from fastll.operations import OPERATIONS

CAPABILITY = (9, 0)
#: Arguments that are arrays, where they are named.
ARRAYS = ("logits", "target", "x", "a", "b", "weight", "pos_weight", "out", "grad_out")


class DeviceArray:
    """An array in emulated memory, where NumPy can see it as `host`."""

    def __init__(self, host, address, memory):
        self.host, self.address, self.memory = host, address, memory

    def __del__(self):
        if self.memory is not None:
            self.memory.release(self.address)


class Emulated:
    """What `fastll.backends.cuda.launch.Gpu` is, by emulation; and the library of its arrays."""

    name, mutable = "emulated", True
    capability = CAPABILITY

    def __init__(self):
        self.memory = ptx.Memory(256 << 20)
        self.launches = []
        self.options = {}

    def launch(self, kernel, stream, blocks, block, arguments, *, bound, shared=0):
        module = compiled(kernel, self.capability, bound)
        cluster = getattr(kernel, "cluster", 1)
        stats = module.launch(
            None,
            blocks,
            block,
            list(arguments),
            self.memory,
            shared=shared,
            cluster=cluster,
            **self.options,
        )
        self.launches.append(SimpleNamespace(kernel=kernel, stream=stream, stats=stats))

    def read(self, address, count, dtype, stream):
        return self.memory.view(address, dtype, (count,)).copy()

    def release(self, address):
        self.memory.free(address)

    def to_device(self, x):
        """A copy of the memory that an array spans, and the array over it."""
        low, high = byte_bounds(x) if x.size else (0, 0)
        address = self.memory.alloc(max(high - low, 1))
        if x.size:
            raw = np.lib.stride_tricks.as_strided(
                np.asarray(SimpleNamespace(__array_interface__=_bytes(low, high - low)))
            )
            self.memory.write(address, raw)
        return DeviceArray(_view(address + _offset(x, low), x), address, self)

    # the library

    def device(self, x):
        return libraries.Device("cuda", 0)

    def view(self, x, name):
        h = x.host
        return libraries.device_view(
            h.__array_interface__["data"][0], h.shape, h.strides, h.dtype, x, h.flags.writeable
        )

    def writes(self, x):
        pass

    def converted(self, x, dtype):
        return self.to_device(x.host.astype(dtype))

    def empty(self, shape, dtype, device, order):
        permuted, inverse = shape, tuple(range(len(shape)))
        if order is not None:
            permuted, inverse = libraries.permuted(shape, order)
        size = int(np.prod(permuted)) * dtype.itemsize
        address = self.memory.alloc(max(size, 1))
        host = _view(address, np.empty(permuted, dtype)).transpose(inverse)
        return self.view(DeviceArray(host, address, self), "new")

    def give(self, view):
        return view.owner

    def stream(self, device):
        return 7

    def order(self, x, device, consumer):
        pass


@functools.cache
def compiled(kernel, capability, bound):
    """A kernel for the emulator."""
    return ptx.Module(compiler.ptx(kernel, capability, bound)[0])


def _bytes(address, size):
    return {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}


def _offset(x, low):
    return x.__array_interface__["data"][0] - low if x.size else 0


def _view(address, x):
    """An array over memory in the shape, strides and dtype of another."""
    interface = {
        "data": (address, not x.flags.writeable),
        "shape": x.shape,
        "strides": x.strides,
        "typestr": f"|V{x.itemsize}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface)).view(x.dtype)


@functools.cache
def emulated():
    gpu = Emulated()
    libraries._known[DeviceArray] = gpu
    return gpu


def on_device(function):
    """The function for NumPy arrays, done on the device."""
    gpu = emulated()

    @functools.wraps(function)
    def called(*args, **options):
        moved = {}

        def move(x):
            if isinstance(x, list | tuple) or np.isscalar(x):
                x = np.asarray(x) if np.size(x) else np.asarray(x, np.int64)
            if isinstance(x, np.ndarray):
                if not x.dtype.isnative:
                    x = x.astype(x.dtype.newbyteorder("="))
                if id(x) not in moved:
                    moved[id(x)] = x, gpu.to_device(x)
                return moved[id(x)][1]
            return x

        arrays = [move(a) for a in args[:2]] + list(args[2:])
        if args[1:] and function.__name__ in ("softmax", "log_softmax", "logsumexp", "entropy"):
            arrays[1:2] = args[1:2]  # the axis
        named = {name: move(value) if name in ARRAYS else value for name, value in options.items()}
        result = function(*arrays, **named)
        for host, there in moved.values():
            if host.flags.writeable:
                host[...] = there.host

        def back(value):
            for host, there in moved.values():
                if value is there:
                    return host
            return value.host.copy()[()]

        return tuple(back(value) for value in result) if isinstance(result, tuple) else back(result)

    return called


def instead_of_host(monkeypatch):
    """The public functions for NumPy arrays, done on the device."""
    gpu = emulated()
    monkeypatch.setattr(launch, "gpu", lambda index: gpu)
    monkeypatch.setattr(launch, "count", lambda: 1)
    for name in fastll.__all__:
        function = getattr(fastll, name)
        if function.__module__ in ("fastll.api.reductions", "fastll.api.losses"):
            monkeypatch.setattr(fastll, name, on_device(function))
    for name, operation in OPERATIONS.items():
        replaced = operation._replace(function=on_device(operation.function))
        monkeypatch.setitem(OPERATIONS, name, replaced)
