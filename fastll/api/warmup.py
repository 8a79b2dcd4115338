"""Compilation ahead of the first use."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np
from numpy.typing import DTypeLike

from fastll.dispatch import use_backend

#: An array for each family of kernels, as (shape, axis): over rows, and over columns. On a GPU over
#: rows of several lengths, up to those that a cluster shares.
_SHAPES: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "cpu": (((2, 64), 1), ((64, 2), 0)),
    "cuda": (((2, 64), 1), ((64, 2), 0), ((2, 1000), 1), ((2, 32000), 1), ((2, 50257), 1)),
}


def warmup(
    operations: str | Iterable[str] | None = None,
    dtypes: Iterable[DTypeLike] = (np.float32, np.float64),
    *,
    backend: str = "numba",
) -> None:
    """Compile kernels ahead of their first use.

    On the CPU most calls never wait for compilation: where Numba is faster, it takes over from Cython
    when its kernels have been compiled beside the work. After `warmup` it does from the first call on.
    Calls do wait with ``use_backend("numba")``, without fastll's compiled extension, and on a GPU.

    Parameters
    ----------
    operations : str or iterable of str, optional
        Names of public functions, or one name; all of them by default.
    dtypes : iterable of dtype_like
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
    >>> fastll.warmup("logsumexp", ["float32"], backend="numpy")
    >>> fastll.warmup(["cross_entropy", "softmax"], backend="numpy")
    """
    from fastll.operations import rows_of  # a millisecond that other calls can save

    chosen = rows_of(operations)
    rng = np.random.default_rng(0)
    with use_backend(backend):
        place, shapes = np.asarray, _SHAPES["cpu"]
        if backend == "cuda":
            from numba import cuda  # its arrays are there wherever its kernels are

            place, shapes = cuda.to_device, _SHAPES["cuda"]
        for dtype, (shape, axis), operation in product(dtypes, shapes, chosen):
            arrays = map(place, operation.make(rng, shape, axis, dtype))
            keywords = operation.keywords(rng, shape, axis, dtype, {})
            if operation.gradient:
                keywords["return_grad"] = True
            operation.function(*arrays, **keywords)
