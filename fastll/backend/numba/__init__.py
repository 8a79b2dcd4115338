"""Numba kernels, compiled when first used, run over rows on the package's threads."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import numpy as np

import fastll.backend.numba.cache  # noqa: F401  before the kernels: see its end
from fastll.backend.host import Host
from fastll.backend.numba import columns, elementwise, rows
from fastll.backend.numba.blocks import NOTHING, Operand
from fastll.backend.numba.convert import reader, writer
from fastll.backend.shim import Old
from fastll.contract import SHORT, STREAM_CLASSES, STREAM_FROM, Options, units_of
from fastll.dtypes import kind_of

_NO_OPTIONS = Options()


class Backend(Old, Host):
    """See `fastll.contract.Backend`."""

    name = "numba"

    def _logsumexp(self, x, b, state, out, sign):
        view = _Rows(x)
        return partial(
            view.kernels.logsumexp,
            view.full(x),
            view.full(b),
            view.row(state),
            view.row(out),
            view.row(sign),
            *view.shape,
        )

    def _softmax(self, x, state, out, log):
        view = _Rows(x)
        return partial(
            view.kernels.reduce,
            view.full(x),
            NOTHING,
            NOTHING,
            0,
            view.row(state),
            _NO_OPTIONS,
            NOTHING,
            NOTHING,
            view.output(out, x),
            log,
            *view.shape,
        )

    def _cross_entropy(self, x, target, labels, weight, options, loss, lse, grad):
        view = _Rows(x)
        # whether a gradient is what comes out of a probability by one factor
        simple = target is None and options.label_smoothing == options.softcap == 0.0
        return partial(
            view.kernels.reduce,
            view.full(x),
            view.full(target),
            view.row(labels),
            0 if weight is None else weight.ctypes.data,
            NOTHING,
            options,
            view.row(loss),
            view.row(lse),
            view.output(grad, x, simple),
            False,
            *view.shape,
        )

    def scan_labels(self, labels, classes, ignore_index, weight):
        ones = np.empty(0) if weight is None else weight
        return rows.check_labels(labels.reshape(-1), classes, ignore_index, ones)

    def _sigmoid(self, x, out, log):
        like = _like(x)
        result = _operand(out, like, 1)
        pays = out.ctypes.data != x.ctypes.data and out.nbytes >= STREAM_FROM
        return partial(
            elementwise.sigmoid,
            _operand(x, like, 1),
            result._replace(streamed=pays and result.write == 0),
            log,
            *_units(x),
            like,
        )

    def _binary_cross_entropy(self, x, target, weight, pos_weight, scale, loss, partial_sums, grad):
        like = _like(x)
        inputs = (_operand(a, like, 1) for a in (x, target, weight, pos_weight))
        outputs = (_operand(loss, like, 1), _operand(partial_sums, None, 1), _operand(grad, like, 1))
        return partial(
            elementwise.binary_cross_entropy, *inputs, float(scale), *outputs, *_units(x), like
        )


class _Rows:
    """The kernels that suit an array's strides, and the operands in the order they take them."""

    def __init__(self, x):
        outer, classes, inner = x.shape
        steps = [abs(s) for s in x.strides]
        self.like = _like(x)
        self.swap = inner == 1 or (outer > 1 and steps[0] < steps[2])
        if self.swap:
            outer, inner = inner, outer
            steps.reverse()
        across = steps[1] > steps[2] or classes < SHORT
        self.kernels = columns if across and inner > 1 else rows
        self.axis = 2 if self.kernels is columns else 1
        self.shape = (classes, inner, self.like)

    def full(self, a):
        if a is None:
            return NOTHING
        return _operand(a.transpose(2, 1, 0) if self.swap else a, self.like, self.axis)

    def output(self, a, x, simple=True):
        """An operand that is written in the shape of x, and streamed where that pays."""
        if a is None:
            return NOTHING
        if self.swap:
            a = a.transpose(2, 1, 0)
        out = _operand(a, self.like, self.axis)
        if self.kernels is columns:  # pieces of lines do not pay
            pays = (out.outer | out.classes) % 64 == 0
        else:  # nor what is in the cache: as the input, or because it is needed once more
            pays = simple and a.ctypes.data != x.ctypes.data and a.shape[1] >= STREAM_CLASSES
        return out._replace(streamed=pays and out.write == 0 and a.nbytes >= STREAM_FROM)

    def row(self, a):
        if a is None:
            return NOTHING
        outer, inner = a.strides[:2]
        if self.swap:
            outer, inner = inner, outer
        step = a.strides[2] if a.ndim == 3 else 0
        return Operand(a.ctypes.data, outer, step, inner, 0, 0, False)


def _like(x):
    """A scalar of the dtype to compute in: kernels are compiled for its type."""
    return kind_of(x.dtype).compute.type(0)


def _operand(a, like, axis):
    """An array as an `Operand`; `axis` is the one that is contiguous where no conversion is needed."""
    if a is None:
        return NOTHING
    outer, step, *inner = a.strides
    strides = (outer, step, *(inner or (0,)))
    if like is None or (a.dtype == like.dtype and strides[axis] == a.itemsize and a.flags.aligned):
        return Operand(a.ctypes.data, *strides, 0, 0, False)
    kind = kind_of(a.dtype)
    read = reader(kind.code, kind.swapped, like.dtype.name).address
    write = 0
    if a.flags.writeable and kind.element == a.dtype:
        write = writer(kind.code).address
    return Operand(a.ctypes.data, *strides, read, write, False)


def _units(x):
    """(length of an outer row, number of units in it)."""
    return x.shape[1], units_of(x.shape[1])


backend = Backend()
