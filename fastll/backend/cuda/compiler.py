"""From a Python function to machine code. The only module that imports a CUDA compiler.

Numba makes PTX of a kernel, for which it needs no GPU, and nvJitLink, which comes with it, machine code
of that. The code is kept on disk, under a name made of all that it depends on.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from cuda import core as core
from numba import cuda, types
from numba.cuda import dispatcher as _dispatcher
from numba.cuda.cudadrv import nvvm as _nvvm
from numba.cuda.extending import intrinsic as intrinsic

from fastll import formulas
from fastll.backend import disk

if not hasattr(core, "Device"):  # before its version 0.5
    from cuda.core import experimental as core

Capability = tuple[int, int]

#: The first version of PTX with these cards. 7.8 has all older ones; but on those of clusters and of
#: copies in bulk, kernels need 8.0, of CUDA 12.0.
_PTX_VERSIONS = {
    (9, 0): "8.0",
    (10, 0): "8.6",
    (12, 0): "8.7",
    (10, 3): "8.8",
    (12, 1): "8.8",
    (11, 0): "9.0",
}

_lock = threading.RLock()


class Kernel:
    """A function of one argument, a structure of `fastll.backend.cuda.calls`; made by `kernels`."""

    key: str  # names it among all kernels

    def __init__(
        self,
        function: Callable[[Any], None],
        call: type,
        real: type,
        *,
        cluster: int = 1,
        approximate: bool = False,
        roomy: bool = False,
        **lengths: int,
    ) -> None:
        self.function = function
        self.approximate = approximate  # whether divisions may be wrong by 2 ulp
        self.roomy = roomy  # whether it asks for more shared memory than it may without asking
        self.real = real  # the NumPy type of the numbers in the call, and its bytes
        self.real_size = np.dtype(real).itemsize
        self.cluster = cluster  # thread blocks that work together
        self.argument = _argument(call, real, lengths)


def _argument(call: type, real: type, lengths: dict[str, int]) -> Any:
    """The Numba type of a structure, where `lengths` are those of its tuples."""
    number = getattr(types, real.__name__)

    def member(hint: Any) -> Any:
        return {int: types.int64, float: number}.get(hint) or _argument(hint, real, lengths)

    members = []
    for name, hint in get_type_hints(call).items():
        if get_origin(hint) is not tuple:
            members.append(member(hint))
        elif lengths[name]:
            members.append(types.UniTuple(member(get_args(hint)[0]), lengths[name]))
        else:
            members.append(types.Tuple(()))
    if all(kind == members[0] for kind in members):
        found = types.NamedUniTuple(members[0], len(members), call)
    else:
        found = types.NamedTuple(tuple(members), call)
    found.name = call.__name__  # all others' names contain it: the full one costs a tenth of the time
    return found


def kernels(factory: Callable[..., Kernel]) -> Callable[..., Kernel]:
    """A factory that makes the kernel of its arguments, whose texts name it, once."""

    @functools.cache
    def made(*arguments: Any) -> Kernel:
        kernel = factory(*arguments)
        kernel.key = f"{factory.__module__}.{factory.__name__}{arguments!r}"
        return kernel

    return made


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that vanishes into the kernels that call it."""
    compiled: Callable[..., Any] = cuda.jit(device=True, forceinline=True)(function)
    return compiled


def bound(names: dict[str, Any], *modules: ModuleType) -> SimpleNamespace:
    """The texts of modules bound to names. Of two texts of one name, the later module's is taken; what
    else the modules have goes by the earlier ones."""
    found = {text.__name__: text for module in modules for text in formulas.texts(module)}
    known = {name: value for module in reversed(modules) for name, value in vars(module).items()}
    known = {name: value for name, value in (known | names).items() if name not in found}
    return formulas.bind(known, device, list(found.values()))


def ptx(kernel: Kernel, capability: Capability, threads: int) -> tuple[str, str]:
    """PTX of a kernel for a compute capability, and the name of its entry.

    `threads` is the most that a thread block will have, and so what its registers must suffice for.
    Products and sums are not fused where the source does not say so: a formula has one value, here
    and on the CPU.
    """
    signature = types.void(kernel.argument)
    # Numba asks the driver for the device's capability when a kernel calls a function of ours, and has
    # no option for what NVVM fuses, which nvJitLink cannot undo
    device = _replaced(
        _dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    options = {"fma": False} | ({"prec_div": False} if kernel.approximate else {})
    unfused = _replaced(_nvvm, "compile_ir", functools.partial(_nvvm.compile_ir, **options))
    with _lock, device, unfused:
        code, _ = cuda.compile_ptx(kernel.function, signature, cc=capability, launch_bounds=threads)
    (mangled,) = re.findall(r"\.visible \.entry (\w+)", code)
    entry = f"fastll_{kernel.function.__name__}"
    code = code.replace(mangled, entry)
    # NVVM states its own version, which older drivers and linkers refuse
    version = _PTX_VERSIONS.get(capability, "7.8" if capability < (9, 0) else None)
    if version is not None:
        code = re.sub(r"^\.version .*", f".version {version}", code, count=1, flags=re.MULTILINE)
    if kernel.cluster > 1:
        required = f".explicitcluster\n.reqnctapercluster {kernel.cluster}, 1, 1"
        code = re.sub(r"(\.maxntid.*)", rf"\1\n{required}", code)
    return code, entry


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another function in a module for a while, for the calling thread only."""
    original, thread = getattr(module, name), threading.get_ident()

    def chosen(*args: Any, **options: Any) -> Any:
        return (function if threading.get_ident() == thread else original)(*args, **options)

    setattr(module, name, chosen)
    try:
        yield
    finally:
        setattr(module, name, original)


def machine_code(kernel: Kernel, capability: Capability, threads: int) -> tuple[bytes, str]:
    """A cubin of a kernel for a compute capability, and the name of its entry; from disk if there."""
    key = repr((kernel.key, capability, threads)).encode()
    path = None
    with suppress(Exception):
        path = disk.root() / str(_VERSION) / f"{disk.digest(key).hex()}.cubin" if _VERSION else None
        if path is not None:
            entry, _, code = disk.read(path).partition(b"\n")
            return code, entry.decode()
    code, name = _compiled(kernel, capability, threads)
    if path is not None:
        with suppress(Exception):
            disk.write(path, name.encode() + b"\n" + code)
    return code, name


def _compiled(kernel: Kernel, capability: Capability, threads: int) -> tuple[bytes, str]:
    code, entry = ptx(kernel, capability, threads)
    return assembled(code, capability), entry


def assembled(code: str, capability: Capability) -> bytes:
    """A cubin of PTX."""
    options = core.ProgramOptions(arch="sm_{}{}".format(*capability), fma=False)
    return bytes(core.Program(code, "ptx", options).compile("cubin").code)


def _version() -> str | None:
    """A name for these sources and the packages they are compiled by; None: no cache."""
    versions = {}
    for package in ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    here = Path(__file__)
    folders = here.parent, here.parents[1], here.parents[2], Path(formulas.__file__).parent
    sources = [path for folder in folders for path in folder.glob("*.py")]
    found: str | None = disk.version(sources, versions)
    return found


try:
    _VERSION = _version()  # before the kernels are imported, so that no older ones go by this name
except Exception:
    _VERSION = None
