"""A GPU that is not there: libraries whose device memory is the host's, and a backend for it."""

import sys
import types
from contextlib import contextmanager
from functools import cache

import numpy as np

from fastll import adapted, array_libraries, dispatch, replay
from fastll.array_libraries import DeviceView, _known
from fastll.backend.host import Host
from fastll.backend.numpy import backend as reference
from fastll.contract import Kept, add_sums, bad_label

#: Elements of one unit of the fake GPU, which is not the CPU's.
UNIT = 10


def on_host(a):
    """What a device view stands for, as the fake GPU reads it."""
    if a is None:
        return None
    assert isinstance(a, DeviceView), f"{type(a)} reached the GPU"
    return np.asarray(a)


def moved(call, function):
    """A call with `function` of each of its arrays."""
    arrays = {
        name: tuple(map(function, value)) if name == "inputs" else function(value)
        for name, value in call._asdict().items()
        if name == "inputs" or isinstance(value, np.ndarray)
    }
    return call._replace(**arrays)


class Backend(Host):
    """The reference on the memory of fake arrays; the work is left to `run`, as on a GPU."""

    name = "cuda"
    unit = UNIT
    partial_dtype = None

    def __init__(self, empty):
        self.empty = empty

    @staticmethod
    def run(kernel, units, elements):
        if units:
            kernel(0, units)

    def fold(self, call):
        options = call.options
        if isinstance(options.scale, DeviceView):
            scale, z_loss = reference.averaged(Kept(*on_host(options.scale)), options.z_loss)
            call = call._replace(options=options._replace(scale=scale, z_loss=z_loss))
        return reference.fold(moved(call, on_host))

    def weigh(self, labels, classes, ignore_index, weight, sample, check, name):
        """What is kept stays on the device, as two numbers."""
        y = None if labels is None else on_host(labels).astype(np.int64)
        g = np.ones(y.shape) if sample is None else on_host(sample).astype(np.float64)
        if y is not None:
            counted = np.ones(y.shape, bool) if ignore_index is None else y != ignore_index
            good = counted & (y >= 0) & (y < classes)
            for at in zip(*np.nonzero(counted & ~good), strict=True) if check else ():
                raise bad_label(name, classes, ignore_index, y[at], tuple(map(int, at)))
            g = np.where(good, g, 0)
        w = 1 if weight is None else on_host(weight)[np.where(good, y, 0)]
        kept = self.empty((2,), np.float64)
        on_host(kept)[...] = np.sum(g * w), np.sum(g)
        return labels, kept

    def averaged(self, kept, z_loss):
        return (kept, z_loss) if isinstance(kept, DeviceView) else super().averaged(kept, z_loss)

    def total(self, values, denominator, dtype, exponential=False):
        result = self.empty((), dtype)
        if isinstance(denominator, DeviceView):
            denominator = Kept(*on_host(denominator))
        on_host(result)[...] = super().total(on_host(values), denominator, dtype, exponential)
        return result

    def accumulate(self, sums, losses, kept):
        if sums is None:
            sums = self.empty((2, 2), np.float64)
            on_host(sums)[...] = 0
        kept = Kept(*on_host(kept)) if isinstance(kept, DeviceView) else kept
        loss = float(reference.total(on_host(losses), None, np.dtype(np.float64)))
        add_sums(on_host(sums), np.array([[loss, 0], [kept.weight, 0]]))
        return sums

    def read(self, a):
        return on_host(a).copy()

    def fill_identity(self, state):
        super().fill_identity(on_host(state))

    def merge(self, state, other):
        super().merge(on_host(state), on_host(other))

    def map(self, call):
        if call.partial is None:
            return self._of_units(call)
        # of each element, added up afterwards
        value, partial = self.empty(call.inputs[0].shape, call.partial.dtype), call.partial
        kernel = self._of_units(call._replace(value=value, partial=None))

        def summed(start, stop):
            kernel(start, stop)
            for at in range(partial.shape[1]):
                units = on_host(value)[:, at * UNIT : (at + 1) * UNIT]
                on_host(partial)[:, at] = units.sum(axis=1)

        return summed

    def _of_units(self, call):
        """A kernel over units of `UNIT` elements, by the reference's over larger ones."""
        outer, length = call.inputs[0].shape

        def kernel(start, stop):
            assert (start, stop) == (0, outer * -(-length // UNIT))
            reference.map(moved(call, on_host))(0, outer)

        return kernel


def module(name, **contents):
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    return made


class GPU:
    """What has happened on the fake GPU, and what its libraries are told."""

    def __init__(self):
        self.bound = []  # (index, stream)
        self.ordered = []  # (device, before, after)
        self.submitted = []  # (device, stream), of which is asked when its work is done
        self.busy = False
        self.stream = 0

    def bind(self, index, stream, empty):
        self.bound.append((index, stream))
        return Backend(empty)


class CupyArray:
    """As much of `cupy.ndarray` as fastll asks."""

    def __init__(self, memory, index=0):
        self.memory = memory
        self.data = types.SimpleNamespace(ptr=memory.ctypes.data)
        self.device = types.SimpleNamespace(id=index)

    shape = property(lambda self: self.memory.shape)
    strides = property(lambda self: self.memory.strides)
    dtype = property(lambda self: self.memory.dtype)

    def transpose(self, axes):
        return CupyArray(self.memory.transpose(axes), self.device.id)

    def __getitem__(self, at):
        return CupyArray(np.asarray(self.memory[at]), self.device.id)

    def __add__(self, other):
        return CupyArray(np.asarray(self.memory + other.memory), self.device.id)


CupyArray.__module__, CupyArray.__name__ = "cupy", "ndarray"


def cupy(gpu):
    """The module `cupy` of a fake GPU."""
    current = [0]

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    return module(
        "cupy",
        ndarray=CupyArray,
        empty=lambda shape, dtype: CupyArray(np.empty(shape, dtype), current[0]),
        cuda=types.SimpleNamespace(
            Device=device,
            runtime=types.SimpleNamespace(is_hip=False),
            get_current_stream=lambda: types.SimpleNamespace(ptr=gpu.stream + 100 * current[0]),
        ),
    )


class Interface:
    """An array of an unknown library with `__cuda_array_interface__`."""

    def __init__(self, memory, stream=None, mask=None, read_only=False):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": memory.shape,
            "strides": memory.strides,
            "typestr": memory.dtype.str,
            "data": (memory.ctypes.data, read_only),
            "version": 3,
            "stream": stream,
            "mask": mask,
        }

    def __dlpack_device__(self):
        return 2, 0


@contextmanager
def installed(monkeypatch):
    """The fake GPU and its CuPy, for a while."""
    gpu = GPU()
    backend = module("fastll.backend.cuda", bind=gpu.bind, why_not=lambda: None)
    monkeypatch.setitem(sys.modules, "fastll.backend.cuda", backend)
    monkeypatch.setitem(sys.modules, "cupy", cupy(gpu))

    def order(device, before, after):
        if before != after:
            gpu.ordered.append((device.index, before, after))

    def submitted(device, stream):
        gpu.submitted.append((device.index, stream))
        return lambda: not gpu.busy

    monkeypatch.setattr(array_libraries, "order_streams", order)
    monkeypatch.setattr(array_libraries, "submitted", submitted)
    monkeypatch.setattr(dispatch, "_import", cache(dispatch._import.__wrapped__))
    monkeypatch.setattr(adapted, "on_gpu", {})
    monkeypatch.setattr(replay, "_plans", {})
    yield gpu
    _known.pop(CupyArray, None)
    sys.modules.pop("fastll.array_libraries.cupy", None)
