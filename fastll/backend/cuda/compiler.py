"""From a Python function to machine code. The only module that imports a CUDA compiler.

Numba makes PTX of a kernel, for which it needs no GPU, and nvJitLink, which comes with it, machine code
of that. The code is kept on disk, under a name made of all that it depends on.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools
import re
import threading
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from numba import cuda, types
from numba.cuda import dispatcher as _dispatcher
from numba.cuda.extending import intrinsic  # noqa: F401  for `primitives`

from fastll.backend import disk

#: Kernels take integers (addresses, strides, counts) and numbers of the compute dtype.
WORD = types.int64

_lock = threading.RLock()


def device(function):
    """A function that vanishes into the kernels that call it."""
    return cuda.jit(device=True, forceinline=True)(function)


def variants(factory):
    """A factory of kernels, each of which is made once and has a `key` that names it."""

    @functools.cache
    def made(*args, **options):
        kernel = factory(*args, **options)
        kernel.key = repr((factory.__module__, factory.__name__, args, sorted(options.items())))
        return kernel

    return made


def ptx(kernel, capability, threads):
    """PTX of a kernel for a compute capability, and the name of its entry.

    `kernel` has its argument types as `signature`; `threads` is the most that a block will have, and so
    what its registers must suffice for.
    """
    with _lock, _without_device(capability):
        code, _ = cuda.compile_ptx(
            kernel, types.void(*kernel.signature), cc=capability, launch_bounds=threads
        )
    (entry,) = re.findall(r"\.visible \.entry (\w+)", code)
    blocks = getattr(kernel, "cluster", 1)
    if blocks > 1:
        code = re.sub(
            r"(\.maxntid.*)", rf"\1\n.explicitcluster\n.reqnctapercluster {blocks}, 1, 1", code
        )
    return code, entry


@contextmanager
def _without_device(capability):
    """Numba asks the driver for the device's capability when a kernel calls a function of ours."""

    class Device:
        compute_capability = capability

    asked = _dispatcher.get_current_device
    _dispatcher.get_current_device = lambda: Device
    try:
        yield
    finally:
        _dispatcher.get_current_device = asked


def machine_code(kernel, capability, threads):
    """A cubin of a kernel for a compute capability, and the name of its entry; from disk if there."""
    key = repr((kernel.key, capability, threads)).encode()
    try:
        path = disk.root() / _VERSION / f"{disk.digest(key).hex()}.cubin"
        entry, _, code = disk.read(path).partition(b"\n")
        return code, entry.decode()
    except Exception:
        code, entry = _compiled(kernel, capability, threads)
    with suppress(Exception):
        disk.write(path, entry.encode() + b"\n" + code)
    return code, entry


def _compiled(kernel, capability, threads):
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:  # before its version 0.5
        from cuda.core.experimental import Program, ProgramOptions

    code, entry = ptx(kernel, capability, threads)
    # without fusing products and sums on its own, so that a result has one value in all variants
    options = ProgramOptions(arch="sm_{}{}".format(*capability), fma=False)
    return bytes(Program(code, "ptx", options).compile("cubin").code), entry


def _version():
    """A name for these sources and the packages they are compiled by; None: no cache."""
    versions = {}
    for package in ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    here = Path(__file__)
    folders = here.parent, here.parents[1], here.parents[2]
    return disk.version([path for folder in folders for path in folder.glob("*.py")], versions)


try:
    _VERSION = _version()  # before the kernels are imported, so that no older ones go by this name
except Exception:
    _VERSION = None
