"""What the backends of the CPU have in common: everything but the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastll import threads
from fastll.contract import CHUNK, SHORT, Array, Floats, Kept, add_sums, bad_label

_INT64, _FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


def _last_level_cache() -> int:
    """Bytes of the last cache on the way to memory; a usual number where the system does not say."""
    for level in (3, 2):
        with suppress(OSError, ValueError):
            size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size").read_text("ascii")
            return int(size.rstrip("K\n")) << 10
    return 1 << 25


#: Minimum size in bytes of an output that is written by non-temporal stores: with an input as large, it
#: would not stay in the caches. Servers report sizes that all of their virtual machines share.
STREAM_FROM = min(max(_last_level_cache() // 2, 1 << 22), 1 << 25)


def crosses(x: Array) -> tuple[bool, bool]:
    """The family of kernels that suits the strides of rows (outer, classes, inner): whether outer and
    inner change places, and whether vectors go across neighbouring rows, not along one."""
    outer, classes, inner = x.shape
    far, step, near = (abs(s) for s in x.strides)
    swap = inner == 1 or (outer > 1 and far < near)
    if swap:
        inner, near = outer, far
    return swap, (step > near and inner > 1) or classes < SHORT


class Host:
    """The part of `fastll.contract.Backend` that is the same for each of them."""

    unit = CHUNK
    partial_dtype = np.dtype(np.float64)

    #: (labels, classes, ignore_index, weight) -> flat position of the first label out of range, or -1,
    #: weight of the kept ones, and their number. The labels are contiguous, of native int64.
    scan_labels: Callable[[NDArray[Any], int, int, Any], tuple[int, float, float]]
    run = staticmethod(threads.run)

    def weigh(
        self,
        labels: NDArray[Any] | None,
        classes: int,
        ignore_index: int | None,
        weight: Any,
        sample: NDArray[Any] | None,
        check: bool,
        name: str,
    ) -> tuple[Array | None, Kept]:
        """As contiguous int64; always checked."""
        if labels is None:
            assert sample is not None
            rows = float(np.add.reduce(sample, axis=None))
            return None, Kept(rows, rows)
        y = labels
        ignored = _INT64_MIN if ignore_index is None else ignore_index
        if y.dtype.kind == "u":
            # beyond int64 a label is out of range for certain, as is a negative one
            y = np.where(y > np.uint64(_INT64_MAX), -1 if ignored != -1 else -2, y.astype(np.int64))
        if y.dtype != _INT64 or not y.flags.c_contiguous:
            y = np.ascontiguousarray(y, dtype=_INT64)
        if ignore_index is None and y.size and y.min() == _INT64_MIN:  # which no label may be
            bad, kept, rows = int(y.argmin()), 0.0, 0.0
        else:
            bad, kept, rows = self.scan_labels(y, classes, ignored, weight)
        if bad >= 0:
            at = tuple(int(i) for i in np.unravel_index(bad, y.shape))
            raise bad_label(name, classes, ignore_index, labels[at], at)
        if sample is None:
            return y, Kept(kept, rows)
        sample, of = sample.ravel(), y.ravel()
        if rows < of.size or np.count_nonzero(sample) < of.size:
            at = (of != ignored) & (sample != 0)
            sample, of = sample[at], of[at]
        rows = float(np.add.reduce(sample))
        return y, Kept(rows if weight is None else float(np.add.reduce(sample * weight[of])), rows)

    def averaged(self, kept: Kept, z_loss: float) -> tuple[float, float]:
        if z_loss and kept.rows != kept.weight:
            z_loss *= kept.weight / kept.rows if kept.rows else math.nan
        return 1 / kept.weight if kept.weight else math.nan, z_loss

    def total(
        self,
        values: NDArray[Any],
        denominator: float | Kept | None,
        dtype: np.dtype[Any],
        exponential: bool = False,
    ) -> Array:
        if values.size == 1:  # NumPy's reductions take a microsecond
            summed = values.item()
        else:
            summed = np.add.reduce(values, axis=None, dtype=np.float64)
        if isinstance(denominator, Kept):
            denominator = denominator.weight
        if denominator is not None:
            summed = summed / denominator if denominator else math.nan
        total: Array
        if exponential:
            with np.errstate(over="ignore"):
                total = dtype.type(np.exp(summed))
        else:
            total = dtype.type(summed)
        return total

    def accumulate(self, sums: Floats | None, losses: NDArray[Any], kept: Kept) -> Floats:
        sums = np.zeros((2, 2)) if sums is None else sums
        add_sums(sums, np.array([[self.total(losses, None, _FLOAT64), 0.0], [kept.weight, 0.0]]))
        return sums

    def read(self, a: Array) -> NDArray[Any]:
        return a

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
