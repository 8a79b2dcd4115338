"""The peers, each called as its own users would call it.

Which function of a library computes an operation is in the table of operations. A library is imported
when it is measured, its arrays are made before anything is timed, and it has as many threads as fastll.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np

import fastll
from bench.cases import Array
from fastll.operations import OPERATIONS

Call = Callable[[], Any]
#: Takes operation, gradient, x, axis and arguments; None where the library has no such operation.
Bind = Callable[[str, bool, Array, int, tuple[Array, ...]], Call | None]

#: The module that a library's functions in the table take, where its name is another one.
MODULES = {"liger": "liger_kernel.ops.cross_entropy"}


def formula(library: str, name: str) -> Callable[..., Any] | None:
    """A library's function for an operation: of x, the axis if there is one, and the other arrays."""
    peer = OPERATIONS[name].peers.get(library)
    if isinstance(peer, str):
        return resolve_name(peer)  # type: ignore[no-any-return]
    if peer is None:
        return None
    module = import_module(MODULES.get(library, library))
    return partial(peer, module)


def ordered(name: str, x: Any, axis: int, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a formula."""
    return (x, *others) if OPERATIONS[name].elementwise else (x, axis, *others)


def plain(
    library: str, name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]
) -> Call | None:
    """Libraries that take NumPy arrays and have no gradients."""
    function = None if gradient else formula(library, name)
    return function and partial(function, *ordered(name, x, axis, arguments))


def torch(
    name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...], compiled: bool = False
) -> Call | None:
    return _bind_arrays(torch_binder(name, gradient, compiled), x, axis, arguments)


def torch_of_rows(
    name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]
) -> Call | None:
    """Compiled once per number of classes, for any number of rows."""
    return _bind_arrays(_binder_of_rows(name, gradient), x, axis, arguments)


def _bind_arrays(
    binder: Callable[..., Call] | None, x: Array, axis: int, arguments: tuple[Array, ...]
) -> Call | None:
    import torch

    def tensor(a: Array) -> Any:
        if a.dtype == "bfloat16":
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    torch.set_num_threads(fastll.get_num_threads())
    return binder and binder(*(tensor(a) for a in (x, *arguments)), axis=axis)


def torch_binder(name: str, gradient: bool, compiled: bool = False) -> Callable[..., Call] | None:
    """A function that makes calls for tensors on any device; the formula is compiled once."""
    import torch

    function = formula("torch", name)
    if function is None:
        return None
    if compiled:
        torch._dynamo.reset()  # otherwise it runs uncompiled after eight shapes
        function = torch.compile(function, dynamic=False)
    return partial(_bind_tensors, function, name, gradient)


@cache
def _binder_of_rows(name: str, gradient: bool) -> Callable[..., Call] | None:
    """The same, but only the axis of the classes is static: PyTorch recompiles for other sizes of it.

    A compiler that does not know the number of rows guesses whether threads pay: it shall use them.
    """
    import torch

    function = formula("torch", name)
    if function is None:
        return None
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    function = torch.compile(function, options={"cpp.dynamic_threads": True})
    return partial(_bind_tensors, function, name, gradient, mark=torch._dynamo.mark_static)


def _bind_tensors(
    function: Callable[..., Any],
    name: str,
    gradient: bool,
    x: Any,
    *others: Any,
    axis: int,
    mark: Callable[[Any, int], None] | None = None,
) -> Call:
    import torch

    first = x.detach().requires_grad_() if gradient else x
    if mark is not None:
        mark(first, axis)
    arguments = ordered(name, first, axis, others)
    if not gradient:
        return partial(function, *arguments)

    def loss_and_gradient() -> Any:
        loss = function(*arguments)
        upstream = torch.ones_like(loss) if loss.ndim else None
        return loss.detach(), *torch.autograd.grad(loss, first, upstream)

    return loss_and_gradient


def liger_binder(name: str, gradient: bool) -> Callable[..., Call] | None:
    """Liger's functions, of which cross-entropy writes the gradient into the logits."""
    function = formula("liger", name)
    return function and partial(_bind_tensors, function, name, gradient)


def jax(name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]) -> Call | None:
    import jax

    jax.config.update("jax_enable_x64", True)  # keep float64 arrays as they are
    function = formula("jax", name)
    if function is None:
        return None
    first, *others = map(jax.numpy.asarray, (x, *arguments))

    def value(first: Any, *others: Any) -> Any:
        return function(*ordered(name, first, axis, others))

    def value_and_gradient(first: Any, *others: Any) -> Any:
        loss, pull = jax.vjp(lambda first: value(first, *others), first)
        return loss, pull(jax.numpy.ones_like(loss))[0]

    compiled = jax.jit(value_and_gradient if gradient else value)

    def call() -> Any:
        result = compiled(first, *others)
        # cheaper than jax.block_until_ready; value and gradient are ready together
        (result[1] if gradient else result).block_until_ready()
        return result

    return call


class Peer(NamedTuple):
    """A library and the function that makes its calls."""

    package: str
    bind: Callable[..., Any]  # a `Bind`; on a GPU a function of (operation, gradient) that returns one

    @property
    def version(self) -> str | None:
        """Version of the package; None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


PEERS = {
    "numpy": Peer("numpy", partial(plain, "numpy")),
    "scipy": Peer("scipy", partial(plain, "scipy")),
    "torch": Peer("torch", torch),
    "torch.compile": Peer("torch", partial(torch, compiled=True)),
    "jax": Peer("jax", jax),
}


CUDA_PEERS = {
    "torch": Peer("torch", torch_binder),
    "torch.compile": Peer("torch", partial(torch_binder, compiled=True)),
    "liger": Peer("liger-kernel", liger_binder),
}


def disagreement(ours: Any, theirs: Any) -> float:
    """Largest difference relative to the largest value, if that is not 0; infinite if only one of the
    two is finite.
    """
    worst = 0.0
    for a, b in zip(_parts(ours), _parts(theirs), strict=True):
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite]):
            return float("inf")
        if finite.any():
            a, b = a[finite], b[finite]
            worst = max(worst, float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) or 1)))
    return worst


def _parts(result: Any) -> list[Array]:
    """The results as float64; of large ones, only the beginning."""
    parts = result if isinstance(result, tuple) else (result,)
    # PyTorch's are cut before they are copied; JAX would compile the cut
    cut = (p if type(p).__module__ == "torch" else np.asarray(p) for p in parts)
    return [_numpy(part.reshape(-1)[: 1 << 20]).astype(np.float64) for part in cut]


def _numpy(a: Any) -> Array:
    if type(a).__module__ == "torch":
        a = a.cpu().float() if str(a.dtype) == "torch.bfloat16" else a.cpu()
    return np.asarray(a)
