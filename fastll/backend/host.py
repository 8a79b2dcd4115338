"""What the backends of the CPU have in common: everything but the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import threads
from fastll.contract import CHUNK, Array, Floats, bad_label

_INT64 = np.dtype(np.int64)
_INT64_MAX = (1 << 63) - 1


class Host:
    """The part of `fastll.contract.Backend` that is the same for each of them."""

    unit = CHUNK
    partial_dtype = np.dtype(np.float64)

    #: (labels, classes, ignore_index, weight) -> flat position of the first label out of range, or -1,
    #: and weight of the kept ones. The labels are contiguous, of native int64.
    scan_labels: Callable[[NDArray[Any], int, int, Any], tuple[int, float]]
    run = staticmethod(threads.run)

    def labels(
        self, labels: NDArray[Any], classes: int, ignore_index: int, weight: Any, check: bool = True
    ) -> tuple[Array, float]:
        """As contiguous int64; always checked."""
        y = labels
        if y.dtype.kind == "u":
            # beyond int64 a label is out of range for certain, as is a negative one
            y = np.where(
                y > np.uint64(_INT64_MAX), -1 if ignore_index != -1 else -2, y.astype(np.int64)
            )
        if y.dtype != _INT64 or not y.flags.c_contiguous:
            y = np.ascontiguousarray(y, dtype=_INT64)
        bad, kept = self.scan_labels(y, classes, ignore_index, weight)
        if bad >= 0:
            at = tuple(int(i) for i in np.unravel_index(bad, y.shape))
            raise bad_label(labels[at], at, classes, ignore_index)
        return y, kept

    def factor(self, kept: float) -> float:
        return 1 / kept if kept else math.nan

    def total(self, values: NDArray[Any], denominator: float | None, dtype: np.dtype[Any]) -> Array:
        if values.size == 1:  # NumPy's reductions take a microsecond
            summed = values.item()
        else:
            summed = np.add.reduce(values, axis=None, dtype=np.float64)
        if denominator is not None:
            summed = summed / denominator if denominator else math.nan
        total: Array = dtype.type(summed)
        return total

    def fill_identity(self, state: Floats) -> None:
        state[...] = -np.inf, 0, 0

    def merge(self, state: Floats, other: Floats) -> None:
        parts = np.stack((state, other))
        m = parts[..., 0].max(axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            top = parts[..., 0] == m
            s = parts[..., 1] + parts[..., 2]
            below = s * np.exp(parts[..., 0] - m)
        state[..., 0] = m
        state[..., 1] = np.where(top, parts[..., 1], below).sum(axis=0)
        state[..., 2] = np.where(top, parts[..., 2], 0).sum(axis=0)
