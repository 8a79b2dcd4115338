"""The peers, each called as its own users would call it: one table of formulas per library.

A library is imported when it is measured. Its formulas take (x, axis, *arguments), its arrays are made
before anything is timed, and it has as many threads as fastll.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

import fastll
from bench.cases import BCE, Array

Call = Callable[[], Any]
#: Takes operation, gradient, x, axis and arguments; None where the library has no such operation.
Bind = Callable[[str, bool, Array, int, tuple[Array, ...]], Call | None]


def numpy(name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]) -> Call | None:
    def logsumexp(x: Array, axis: int) -> Array:
        m = x.max(axis, keepdims=True)
        return np.squeeze(m + np.log(np.exp(x - m).sum(axis, keepdims=True)), axis)

    def softmax(x: Array, axis: int) -> Array:
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    def log_softmax(x: Array, axis: int) -> Array:
        return x - np.expand_dims(logsumexp(x, axis), axis)

    def cross_entropy(x: Array, axis: int, t: Array) -> Array:
        at_label = np.take_along_axis(x, np.expand_dims(t, axis), axis).squeeze(axis)
        return np.mean(logsumexp(x, axis) - at_label, where=t >= 0)

    formulas = {
        "logsumexp": logsumexp,
        "softmax": softmax,
        "log_softmax": log_softmax,
        "sigmoid": lambda x, axis: 1 / (1 + np.exp(-x)),
        "log_sigmoid": lambda x, axis: -np.logaddexp(0, -x),
        "sparse_cross_entropy": cross_entropy,
        "dense_cross_entropy": lambda x, axis, t: -(t * log_softmax(x, axis)).sum(axis).mean(),
        BCE: lambda x, axis, t: np.mean(np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))),
    }
    return None if gradient else partial(formulas[name], x, axis, *arguments)


def scipy(name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]) -> Call | None:
    from scipy import special

    formulas = {
        "logsumexp": special.logsumexp,
        "softmax": special.softmax,
        "log_softmax": special.log_softmax,
        "sigmoid": lambda x, axis: special.expit(x),
        "log_sigmoid": lambda x, axis: special.log_expit(x),
    }
    return partial(formulas[name], x, axis) if name in formulas else None


def torch(
    name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...], compiled: bool = False
) -> Call:
    import torch

    def tensor(a: Array) -> Any:
        if a.dtype == "bfloat16":
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    torch.set_num_threads(fastll.get_num_threads())
    return torch_binder(name, gradient, compiled)(*(tensor(a) for a in (x, *arguments)), axis=axis)


def torch_binder(name: str, gradient: bool, compiled: bool = False) -> Callable[..., Call]:
    """A function that makes calls for tensors on any device; the formula is compiled once."""
    import torch
    from torch.nn import functional

    formulas = {
        "logsumexp": torch.logsumexp,
        "softmax": torch.softmax,
        "log_softmax": torch.log_softmax,
        "sigmoid": lambda x, axis: torch.sigmoid(x),
        "log_sigmoid": lambda x, axis: functional.logsigmoid(x),
        "sparse_cross_entropy": lambda x, axis, t: functional.cross_entropy(x.movedim(axis, 1), t),
        "dense_cross_entropy": lambda x, axis, t: functional.cross_entropy(
            x.movedim(axis, 1), t.movedim(axis, 1)
        ),
        BCE: lambda x, axis, t: functional.binary_cross_entropy_with_logits(x, t),
    }
    formula = formulas[name]
    if compiled:
        torch._dynamo.reset()  # otherwise it runs uncompiled after eight shapes
        formula = torch.compile(formula, dynamic=False)
    return partial(_bind_tensors, formula, gradient)


def _bind_tensors(formula: Callable[..., Any], gradient: bool, x: Any, *others: Any, axis: int) -> Call:
    import torch

    if not gradient:
        return partial(formula, x, axis, *others)
    logits = x.detach().requires_grad_()

    def loss_and_gradient() -> Any:
        loss = formula(logits, axis, *others)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    return loss_and_gradient


def liger_binder(name: str, gradient: bool) -> Callable[..., Call] | None:
    """Liger's cross-entropy, which writes the gradient into the logits."""
    if name != "sparse_cross_entropy":
        return None
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return partial(
        _bind_tensors, lambda x, axis, t: LigerCrossEntropyFunction.apply(x, t, None)[0], gradient
    )


def jax(name: str, gradient: bool, x: Array, axis: int, arguments: tuple[Array, ...]) -> Call:
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)  # keep float64 arrays as they are

    def cross_entropy(x: Any, axis: int, t: Any) -> Any:
        at_label = jnp.take_along_axis(x, jnp.expand_dims(t, axis), axis).squeeze(axis)
        return jnp.mean(jax.nn.logsumexp(x, axis) - at_label, where=t >= 0)

    def dense_cross_entropy(x: Any, axis: int, t: Any) -> Any:
        return -jnp.sum(t * jax.nn.log_softmax(x, axis), axis).mean()

    def binary_cross_entropy(x: Any, axis: int, t: Any) -> Any:
        return jnp.mean(-t * jax.nn.log_sigmoid(x) - (1 - t) * jax.nn.log_sigmoid(-x))

    formulas = {
        "logsumexp": jax.nn.logsumexp,
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "sigmoid": lambda x, axis: jax.nn.sigmoid(x),
        "log_sigmoid": lambda x, axis: jax.nn.log_sigmoid(x),
        "sparse_cross_entropy": cross_entropy,
        "dense_cross_entropy": lambda x, axis, t: (
            -jnp.sum(t * jax.nn.log_softmax(x, axis), axis).mean()
        ),
        BCE: binary_cross_entropy,
    }
    formula = jax.value_and_grad(formulas[name]) if gradient else formulas[name]
    compiled = jax.jit(formula, static_argnums=1)
    arrays = [jnp.asarray(a) for a in (x, *arguments)]
    return lambda: jax.block_until_ready(compiled(arrays[0], axis, *arrays[1:]))


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
    "numpy": Peer("numpy", numpy),
    "scipy": Peer("scipy", scipy),
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
    """Largest difference relative to the largest value; infinite if only one of the two is finite."""
    worst = 0.0
    for a, b in zip(_parts(ours), _parts(theirs), strict=True):
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite]):
            return float("inf")
        if finite.any():
            a, b = a[finite], b[finite]
            worst = max(worst, float(np.max(np.abs(a - b)) / np.max(np.abs(a))))
    return worst


def _parts(result: Any) -> list[Array]:
    """The results as float64; of large ones, only the beginning."""
    parts = result if isinstance(result, tuple) else (result,)
    return [_numpy(part.reshape(-1)[: 1 << 20]).astype(np.float64) for part in parts]


def _numpy(a: Any) -> Array:
    if type(a).__module__ == "torch":
        a = a.cpu().float() if str(a.dtype) == "torch.bfloat16" else a.cpu()
    return np.asarray(a)
