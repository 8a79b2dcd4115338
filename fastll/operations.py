"""The operations, each with arguments to try it on: what tests, benchmark and `warmup` go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastll.api import losses, reductions
from fastll.dispatch import use_backend

Array = NDArray[Any]


class Operation(NamedTuple):
    """A public function and what it is called with besides its first argument."""

    function: Callable[..., Any]
    arguments: Callable[[np.random.Generator, Array, int], tuple[Array, ...]]  # of rng, x, axis
    elementwise: bool = False
    reduces: bool = False  # to one value a row; otherwise the result is in the shape of x
    gradient: bool = False  # takes return_grad and grad_out


def _none(rng: np.random.Generator, x: Array, axis: int) -> tuple[Array, ...]:
    return ()


def _labels(rng: np.random.Generator, x: Array, axis: int) -> tuple[Array, ...]:
    kept = np.delete(x.shape, axis)
    return (rng.integers(0, x.shape[axis], kept) if x.shape[axis] else np.full(kept, -100),)


def _distribution(rng: np.random.Generator, x: Array, axis: int) -> tuple[Array, ...]:
    t = rng.random(x.shape)
    return ((t / t.sum(axis=axis, keepdims=True)).astype(x.dtype),)


def _probabilities(rng: np.random.Generator, x: Array, axis: int) -> tuple[Array, ...]:
    return (rng.random(x.shape).astype(x.dtype),)


OPERATIONS = {
    "logsumexp": Operation(reductions.logsumexp, _none, reduces=True),
    "softmax": Operation(reductions.softmax, _none),
    "log_softmax": Operation(reductions.log_softmax, _none),
    "sigmoid": Operation(reductions.sigmoid, _none, elementwise=True),
    "log_sigmoid": Operation(reductions.log_sigmoid, _none, elementwise=True),
    "sparse_cross_entropy": Operation(
        losses.sparse_cross_entropy, _labels, reduces=True, gradient=True
    ),
    "dense_cross_entropy": Operation(
        losses.dense_cross_entropy, _distribution, reduces=True, gradient=True
    ),
    "binary_cross_entropy_with_logits": Operation(
        losses.binary_cross_entropy_with_logits, _probabilities, elementwise=True, gradient=True
    ),
}


#: An array for each family of kernels, as (shape, axis): over rows, and over columns. On a GPU over
#: rows of several lengths, up to those that a cluster shares.
_SHAPES = {
    "cpu": (((2, 64), 1), ((64, 2), 0)),
    "cuda": (((2, 64), 1), ((64, 2), 0), ((2, 1000), 1), ((2, 32000), 1), ((2, 50257), 1)),
}


def warmup(
    operations: Sequence[str] | None = None,
    dtypes: Sequence[DTypeLike] = (np.float32, np.float64),
    *,
    backend: str = "numba",
) -> None:
    """Compile kernels ahead of their first use.

    Parameters
    ----------
    operations : sequence of str, optional
        Names of public functions; all of them by default.
    dtypes : sequence of dtype_like
        Dtypes of their first argument.
    backend : str
        The backend to compile for; see `backends`.

    Raises
    ------
    ValueError
        If there is no such operation or backend.
    RuntimeError
        If the backend is not available.

    Examples
    --------
    >>> import fastll
    >>> fastll.warmup(["logsumexp"], ["float32"], backend="numpy")
    """
    names = list(OPERATIONS) if operations is None else list(operations)
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"operations has {name!r}; expected some of {', '.join(OPERATIONS)}")
    rng = np.random.default_rng(0)
    with use_backend(backend):
        place, shapes = _host, _SHAPES["cpu"]
        if backend == "cuda":
            from numba import cuda  # its arrays are there wherever its kernels are

            place, shapes = cuda.to_device, _SHAPES["cuda"]
        for dtype in dtypes:
            for shape, axis in shapes:
                x = rng.standard_normal(shape).astype(dtype)
                for name in names:
                    operation = OPERATIONS[name]
                    arguments = [place(a) for a in operation.arguments(rng, x, axis)]
                    _call(operation, place(x), arguments, axis)


def _host(x: Array) -> Array:
    return x


def _call(operation: Operation, x: Array, arguments: Sequence[Array], axis: int) -> None:
    options: dict[str, Any] = {} if operation.elementwise else {"axis": axis}
    if operation.gradient:
        options["return_grad"] = True
    operation.function(x, *arguments, **options)
