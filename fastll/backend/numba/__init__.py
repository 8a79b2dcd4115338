"""Numba kernels, compiled when first used, run over rows on the package's threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fastll.backend.numba.cache  # noqa: F401  before the kernels: see its end
from fastll.backend.host import Host
from fastll.backend.numba import columns, folds, maps, rows
from fastll.backend.numba.calls import NO_ROWS, NOTHING, Operand, RowOperand
from fastll.backend.numba.convert import reader, writer
from fastll.contract import SHORT, STREAM_CLASSES, STREAM_FROM, Array, Fold, Kernel, Map, units_of
from fastll.dtypes import kind_of


class Backend(Host):
    """See `fastll.contract.Backend`."""

    name = "numba"

    def map(self, call: Map) -> Kernel:
        x = call.inputs[0]
        like = _like(x)
        value = _operand(call.value, like, 1)
        if call.value is not None and call.partial is None and call.slope is None:
            value = _streamed(value, call.value.ctypes.data != x.ctypes.data, call.value)
        mapped = maps.Call(
            tuple(_operand(a, like, 1) for a in call.inputs),
            call.parameters,
            _operand(call.weight, like, 1),
            value,
            _operand(call.partial, None, 1),
            _operand(call.slope, like, 1),
            call.scale,
            x.shape[1],
            units_of(x.shape[1]),
            like,
        )
        kernel, layout = maps.kernel(call.operation)
        return partial(kernel, layout.pack(mapped), like)

    def fold(self, call: Fold) -> Kernel:
        weights = call.second if call.operation == "logsumexp" else None
        layout = _Layout(call.x, weights)
        options = call.options
        simple = call.second is None and options.label_smoothing == options.softcap == 0.0
        folded = folds.Call(
            layout.full(call.x),
            layout.full(call.second),
            layout.row(call.labels),
            layout.row(call.sample),
            0 if call.weight is None else call.weight.ctypes.data,
            options,
            layout.row(call.state),
            layout.row(call.value),
            layout.row(call.lse),
            layout.row(call.sign),
            layout.row(call.selected),
            layout.output(call.out, call.x, simple),
            layout.classes,
            0 if call.selected is None else call.selected.shape[2],
            layout.inner,
            layout.like,
        )
        return partial(layout.kernel(call.operation), folds.LAYOUT.pack(folded), layout.like)

    def scan_labels(
        self, labels: Array, classes: int, ignore_index: int, weight: Array | None
    ) -> tuple[int, float, float]:
        ones = np.empty(0) if weight is None else weight
        found: tuple[int, float, float] = folds.check_labels(
            labels.reshape(-1), classes, ignore_index, ones
        )
        return found


class _Layout:
    """The family of kernels that suits an array's strides, and operands as it takes them."""

    kernel: Callable[[str], Callable[..., object]]

    def __init__(self, x: Array, weights: Array | None) -> None:
        outer, self.classes, self.inner = x.shape
        steps = [abs(s) for s in x.strides]
        self.like = _like(x)
        if weights is not None:  # they lose nothing
            self.like = self.like + _like(weights)
        self.swap = self.inner == 1 or (outer > 1 and steps[0] < steps[2])
        if self.swap:
            outer, self.inner = self.inner, outer
            steps.reverse()
        self.across = (steps[1] > steps[2] and self.inner > 1) or self.classes < SHORT
        self.kernel = columns.kernel if self.across else rows.kernel

    def full(self, a: Array | None) -> Operand:
        if a is None:
            return NOTHING
        a = a.transpose(2, 1, 0) if self.swap else a
        return _operand(a, self.like, 2 if self.across else 1)

    def output(self, a: Array | None, x: Array, simple: bool) -> Operand:
        """An operand that is written in the shape of x, by non-temporal stores where that pays.

        It is `simple` where it is made of exponentials by one factor.
        """
        out = self.full(a)
        if a is None:
            return out
        if self.across:  # parts of cache lines do not pay
            pays = (out.outer | out.classes) % 64 == 0
        else:  # nor what is in the cache: as the input, or because it is needed once more
            pays = simple and a.ctypes.data != x.ctypes.data and a.shape[1] >= STREAM_CLASSES
        return _streamed(out, pays, a)

    def row(self, a: Array | None) -> RowOperand:
        if a is None:
            return NO_ROWS
        outer, inner = a.strides[:2]
        if self.swap:
            outer, inner = inner, outer
        return RowOperand(a.ctypes.data, outer, inner, a.strides[2] if a.ndim == 3 else 0)


def _like(x: Array) -> Any:
    """A scalar of the dtype to compute in: kernels are compiled for its type."""
    return kind_of(x.dtype).compute.type(0)


def _operand(a: Array | None, like: Any, axis: int) -> Operand:
    """An array as an `Operand`; `axis` is the one that is contiguous where no conversion is needed."""
    if a is None:
        return NOTHING
    address, (outer, step), inner = a.ctypes.data, a.strides[:2], a.strides[2] if a.ndim == 3 else 0
    if like is None or (a.dtype == like.dtype and a.strides[axis] == a.itemsize and a.flags.aligned):
        return Operand(address, outer, step, inner, 0, 0, False)
    kind = kind_of(a.dtype)
    read, write = reader(kind.code, kind.swapped, like.dtype.name).address, 0
    if a.flags.writeable and kind.element == a.dtype:
        write = writer(kind.code).address
    return Operand(address, outer, step, inner, read, write, False)


def _streamed(out: Operand, pays: bool, a: Array) -> Operand:
    """The operand for non-temporal stores, where they pay."""
    return out._replace(streamed=pays and out.write == 0 and a.nbytes >= STREAM_FROM)


backend = Backend()
