"""A GPU for the tests: a real one where there is one, else the emulator of PTX.

Tests are written for NumPy. `on_device` makes of a public function one that takes NumPy arrays, calls
the function with arrays on the device, in the same strides, and brings back what it returns and has
written. FASTLL_TEST_DEVICE=emulator leaves a real GPU alone.
"""

import ctypes
import functools
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import ptx
import pytest
from numpy.lib.array_utils import byte_bounds

import fastll
from fastll import adapted, replay
from fastll import array_libraries as libraries
from fastll.backend.cuda import compiler, launch
from fastll.operations import OPERATIONS, Argument

CAPABILITY = (9, 0)
#: Arguments that are arrays where they are given by name.
OUTPUTS = ("out", "grad_out")
ARRAYS = {
    *OUTPUTS,
    *(argument.name for row in OPERATIONS.values() for argument in row.arguments),
    *(
        value.name
        for row in OPERATIONS.values()
        for options in row.options
        for value in options.values()
        if isinstance(value, Argument)
    ),
}
#: How many positional arguments of a public function are arrays.
POSITIONAL = {
    name: len(row.arguments) for key, row in OPERATIONS.items() for name in (key, row.chosen_by)
}
POSITIONAL |= {"perplexity": 2, "sequence_log_likelihood": 2}


class DeviceArray:
    """An array on a device, with its geometry as a NumPy object, whose memory only an emulator has."""

    def __init__(self, geometry, address, memory):
        self.geometry, self.address, self.memory = geometry, address, memory

    def __del__(self):
        if self.memory is not None:
            self.memory.release(self.address)


class Library(libraries.Library):
    """A library of arrays on a device, whose memory is NaN in every format before it is written.

    What it stands on: `allocate`, `release`, `write` and `contents`.
    """

    def __init__(self):
        self.array = type(self.name, (DeviceArray,), {})
        self.plain = (self.array,)
        libraries._known[self.array] = self

    def to_device(self, x):
        """A copy of the memory that an array spans, and the array over it."""
        low, high = byte_bounds(x) if x.size else (0, 0)
        address = self.allocate(max(high - low, 1))
        if x.size:
            self.write(address, _raw(low, high - low))
        return self.array(_view(address + _offset(x, low), x), address, self)

    def device(self, x):
        return libraries.Device("cuda", 0)

    def view(self, x, name):
        g = x.geometry
        address = g.__array_interface__["data"][0]
        return libraries.device_view(address, g.shape, g.strides, g.dtype, x, g.flags.writeable)

    def empty(self, shape, dtype, device, order):
        permuted, inverse = shape, tuple(range(len(shape)))
        if order is not None:
            permuted, inverse = libraries.permuted(shape, order)
        address = self.allocate(max(int(np.prod(permuted)) * dtype.itemsize, 1))
        geometry = _view(address, np.empty(permuted, dtype)).transpose(inverse)
        return self.view(self.array(geometry, address, self), "new")

    def facts(self, x):
        g = x.geometry
        address = g.__array_interface__["data"][0]
        return address, (g.shape, g.strides, g.dtype, g.flags.writeable)

    def give(self, view):
        return view.owner

    def order(self, x, device, consumer):
        pass


class Emulated(Library):
    """What `fastll.backend.cuda.launch.Gpu` is, by emulation; and the library of its arrays."""

    name = "emulated"
    capability = CAPABILITY

    def __init__(self):
        super().__init__()
        self.memory = ptx.Memory(256 << 20)
        self.launches = []
        self.options = {}

    def function(self, launch):
        return launch.kernel, compiled(launch.kernel, self.capability, launch.bound)

    def start(self, stream, launches):
        for (kernel, module), blocks, block, shared, pointers in launches:
            kinds = [{"f32": "f", "f64": "d"}.get(p.kind, "q") for p in module.kernel(None).params]
            options = {"shared": shared, "cluster": kernel.cluster} | self.options
            arguments = words(pointers, kinds)
            stats = module.launch(None, blocks, block, arguments, self.memory, **options)
            told = {"blocks": blocks, "block": block, "shared": shared}
            self.launches.append(
                SimpleNamespace(kernel=kernel, stream=stream, stats=stats, module=module, **told)
            )

    def read(self, address, count, dtype, stream):
        return self.memory.view(address, dtype, (count,)).copy()

    def stream(self, device):
        return 7

    def allocate(self, size):
        return self.memory.alloc(size)

    def release(self, address):
        self.memory.free(address)

    def write(self, address, raw):
        self.memory.write(address, raw)

    def contents(self, x):
        return x.geometry


def words(pointers, kinds):
    """The arguments of a launch, which the driver finds through pointers; `kinds` as in `struct`."""
    types = {"f": ctypes.c_float, "d": ctypes.c_double, "q": ctypes.c_int64}
    places = (ctypes.c_void_p * len(kinds)).from_address(pointers)
    return [types[kind].from_address(place).value for kind, place in zip(kinds, places, strict=True)]


@functools.cache
def compiled(kernel, capability, bound):
    """A kernel for the emulator."""
    return ptx.Module(compiler.ptx(kernel, capability, bound)[0])


class Real(Library):
    """Arrays on a real GPU by its driver, and a stream that waits for no other."""

    name = "real"

    def __init__(self, driver=None):
        super().__init__()
        if driver is None:
            from cuda.bindings import driver
        self.driver = driver
        self.checked(driver.cuInit(0))
        self.context = self.checked(
            driver.cuDevicePrimaryCtxRetain(self.checked(driver.cuDeviceGet(0)))
        )
        with self.current():
            self.handle = int(self.checked(driver.cuStreamCreate(1)))  # CU_STREAM_NON_BLOCKING

    def checked(self, result):
        error, *values = result
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver says {error.name}")
        return values[0] if values else None

    @contextmanager
    def current(self):
        """The calling thread's context for a while."""
        self.checked(self.driver.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            self.checked(self.driver.cuCtxPopCurrent())

    def stream(self, device):
        return self.handle

    def allocate(self, size):
        with self.current():
            address = int(self.checked(self.driver.cuMemAlloc(size)))
            self.checked(self.driver.cuMemsetD8Async(address, 0xFF, size, self.handle))
        return address

    def release(self, address):
        with suppress(Exception), self.current():  # at the end of the process there may be no driver
            self.driver.cuStreamSynchronize(self.handle)
            self.driver.cuMemFree(address)

    def write(self, address, raw):
        with self.current():
            host = raw.ctypes.data
            self.checked(self.driver.cuMemcpyHtoDAsync(address, host, raw.nbytes, self.handle))
            self.checked(self.driver.cuStreamSynchronize(self.handle))

    def contents(self, x):
        g = x.geometry
        if not g.size:
            return np.empty(g.shape, g.dtype)
        low, high = byte_bounds(g)
        raw = np.empty(high - low, np.uint8)
        with self.current():
            self.checked(self.driver.cuMemcpyDtoHAsync(raw.ctypes.data, low, raw.nbytes, self.handle))
            self.checked(self.driver.cuStreamSynchronize(self.handle))
        return _view(raw.ctypes.data + _offset(g, low), g).copy()


class Driver:
    """What is asked of the CUDA driver, done to the memory of the emulator."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self, memory):
        self.memory, self.free = memory, 1 << 30
        attributes = {"L2_CACHE_SIZE": 64, "MULTIPROCESSOR_COUNT": 2}
        attributes |= {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0}
        named = {f"CU_DEVICE_ATTRIBUTE_{name}": value for name, value in attributes.items()}
        self.CUdevice_attribute = SimpleNamespace(**named)

    def __getattr__(self, name):
        functions = {
            "cuDeviceGetAttribute": lambda attribute, device: attribute,
            "cuDeviceGetName": lambda length, device: b"emulated\0  ",
            "cuDriverGetVersion": lambda: 13000,
            "cuMemAlloc": self.memory.alloc,
            "cuMemFree": self.memory.free,
            "cuMemcpyHtoDAsync": lambda to, at, size, stream: self.memory.write(to, _raw(at, size)),
            "cuMemcpyDtoHAsync": self.to_host,
            "cuMemcpyDtoDAsync": self.copy,
            "cuMemsetD8Async": self.fill,
            "cuEventElapsedTime": lambda start, stop: 1.0,
        }
        if name == "cuMemGetInfo":
            return lambda: (0, self.free, 1 << 31)
        return lambda *arguments: (0, functions.get(name, lambda *_: 0)(*arguments))

    def to_host(self, to, at, size, stream):
        found = self.memory.view(at, np.uint8, (size,))
        ctypes.memmove(to, found.ctypes.data, size)

    def copy(self, to, at, size, stream):
        self.memory.write(to, self.memory.view(at, np.uint8, (size,)).copy())

    def fill(self, to, value, size, stream):
        self.memory.view(to, np.uint8, (size,))[:] = value


def _raw(address, size):
    """The bytes there; what they belong to must outlive them."""
    interface = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


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


emulated = functools.cache(Emulated)


@functools.cache
def gpu():
    """The GPU of the tests."""
    from conftest import why_no_gpu  # which the emulator alone, as the benchmark has it, does not need

    return emulated() if why_no_gpu() else Real()


def on_device(function):
    """The function for NumPy arrays, done on the device."""
    there = gpu()

    @functools.wraps(function)
    def called(*args, **options):
        moved = {}

        def move(x, name=None):
            if isinstance(x, list | tuple) or np.isscalar(x):
                if name in OUTPUTS:
                    pytest.skip("a list is not on a GPU")
                x = np.asarray(x) if np.size(x) else np.asarray(x, np.int64)
            if not isinstance(x, np.ndarray):
                return x
            if not x.dtype.isnative:
                x = x.astype(x.dtype.newbyteorder("="))
            if id(x) not in moved:
                if x.dtype.hasobject or any(
                    np.may_share_memory(x, other) for other, _ in moved.values()
                ):
                    pytest.skip("neither objects nor what two arrays share is brought to a GPU")
                moved[id(x)] = x, there.to_device(x)
            return moved[id(x)][1]

        count = POSITIONAL.get(function.__name__, len(args))  # all of a user's loss
        if any(a is None for a in args[:count]):
            pytest.skip("no array of a GPU")
        arrays = [*map(move, args[:count]), *args[count:]]
        named = {
            name: move(value, name) if name in ARRAYS else value for name, value in options.items()
        }
        result = function(*arrays, **named)
        for host, array in moved.values():
            if host.flags.writeable:
                host[...] = there.contents(array)

        def back(value):
            for host, array in moved.values():
                if value is array:
                    return host
            return there.contents(value).copy()[()]

        return tuple(back(value) for value in result) if isinstance(result, tuple) else back(result)

    return called


def instead_of_host(monkeypatch):
    """The public functions for NumPy arrays, done on the device."""
    there = gpu()
    monkeypatch.setattr(adapted, "on_gpu", {})
    monkeypatch.setattr(replay, "_plans", {})
    if isinstance(there, Emulated):
        monkeypatch.setattr(launch, "gpu", lambda index: there)
        monkeypatch.setattr(launch, "count", lambda: 1)
    for name in fastll.__all__:
        function = getattr(fastll, name)
        if name in POSITIONAL:
            monkeypatch.setattr(fastll, name, on_device(function))
    make = fastll.elementwise_loss
    monkeypatch.setattr(fastll, "elementwise_loss", lambda formula: on_device(make(formula)))
    update, value = fastll.LogSumExp.update, fastll.LogSumExp.value.fget

    def updated(self, x, axis=-1):
        return update(self, there.to_device(np.asarray(x)), axis)

    def fetched(self):
        found = value(self)
        return there.contents(found).copy()[()] if isinstance(found, DeviceArray) else found

    likelihood = fastll.NegativeLogLikelihood.update

    def counted(self, logits, target, *, weight=None, **options):
        x, y = there.to_device(np.asarray(logits)), there.to_device(np.asarray(target))
        w = None if weight is None else there.to_device(np.asarray(weight))
        return likelihood(self, x, y, weight=w, **options)

    monkeypatch.setattr(fastll.NegativeLogLikelihood, "update", counted)
    monkeypatch.setattr(fastll.LogSumExp, "update", updated)
    monkeypatch.setattr(fastll.LogSumExp, "value", property(fetched))
    for name, operation in OPERATIONS.items():
        replaced = operation._replace(function=on_device(operation.function))
        monkeypatch.setitem(OPERATIONS, name, replaced)
