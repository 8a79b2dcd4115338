"""CUDA kernels by Numba, launched on the caller's stream: every operation on NVIDIA GPUs.

An operation's kernel is made for the formats and options it meets, when it first meets them.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cached_property, lru_cache, partial

import numpy as np

from fastll import layout
from fastll.backend.cuda import elementwise, geometry, launch, rows, strided, team, totals
from fastll.backend.cuda.primitives import FLOATS, VECTOR, lanes_of, size_of
from fastll.backend.cuda.state import PARTS
from fastll.backend.shim import Old
from fastll.contract import Options, bad_label
from fastll.dtypes import FORMATS, kind_of

#: Where there is no operand.
_NO_STRIDES = (0, 0, 0)


def bind(index, stream, empty):
    """The backend for a device and a stream; `empty` (shape, dtype) makes arrays there."""
    try:
        gpu = launch.gpu(index)
    except Exception as error:
        raise RuntimeError(f"an array is on cuda:{index}, but {why_not() or error}") from error
    return Backend(gpu, stream, empty)


def why_not():
    """Why there is no GPU to use, in a line; None if there is one."""
    try:
        return None if launch.count() else "the NVIDIA driver sees no GPU"
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"there is no GPU, or no NVIDIA driver for it: install one ({reason})"


class Backend(Old):
    """See `fastll.contract.Backend`."""

    name = "cuda"
    partial_dtype = None  # that which is computed in
    unit = elementwise.UNIT

    def __init__(self, gpu, stream, empty):
        self._gpu = gpu
        self._stream = stream
        self._empty = empty

    def run(self, kernel, units, elements):
        if units:
            kernel(0, units)

    def _logsumexp(self, x, b, state, out, sign):
        if b is None and state is None and sign is None:
            return self._over_rows("logsumexp", x, value=out)
        return self._over_strides("logsumexp", x, t=b, state=state, value=out, other=sign)

    def _softmax(self, x, state, out, log):
        operation = "log_softmax" if log else "softmax"
        if state is None:
            return self._over_rows(operation, x, out=out)
        return self._over_strides(operation, x, state=state, out=out)

    def _cross_entropy(self, x, target, labels, weight, options, loss, lse, grad):
        return self._over_rows(
            "cross_entropy",
            x,
            out=grad,
            t=target,
            labels=labels,
            weight=weight,
            options=options,
            value=loss,
            other=lse,
        )

    def _over_rows(self, operation, x, *, out=None, t=None, labels=None, **operands):
        """The kernel for rows that lie in memory as they are, or else the one for all strides."""
        name = _format(x)
        classes = x.shape[1]
        steps = [_row_step(a, name) for a in (x, out, t) if a is not None]
        small = [a for a in (labels, operands.get("value"), operands.get("other")) if a is not None]
        steps += [_step(a) for a in small]
        if None in steps or classes <= geometry.SHORT or classes >= 1 << 31 or name not in FLOATS:
            return self._over_strides(operation, x, out=out, t=t, state=labels, **operands)
        return self._over_teams(operation, x, out, t, labels, **operands)

    def _over_teams(
        self, operation, x, out, t, labels, weight=None, options=None, value=None, other=None
    ):
        name, (outer, classes, inner) = _format(x), x.shape
        options = options or _NO_OPTIONS
        target = t if t is not None else labels
        places = [(_address(a), _step(a)) for a in (x, value, other, out, target)]
        whole = places[0][0] | places[0][1] | places[3][0] | places[3][1]
        if t is not None:
            whole |= places[4][0] | places[4][1]
        kernel, plan, shared = _team_kernel(
            name,
            classes,
            "dense" if t is not None else "sparse" if labels is not None else operation,
            None if labels is None else _format(labels),
            None if weight is None else _format(weight),
            out is not None,
            options.label_smoothing != 0.0,
            options.softcap != 0.0,
            whole % VECTOR == 0,
            self._gpu.capability,
        )
        arguments = (
            *places[0],
            outer * inner,
            classes,
            plan.segment,
            plan.capacity,
            *places[1],
            *places[2],
            *places[3],
            *places[4],
            _address(weight),
            0 if weight is None else weight.strides[0],
            _divisor(options, kernel),
            options.ignore_index,
            *_numbers(options, classes, kernel),
        )
        return self._launch(
            kernel,
            -(-outer * inner // plan.teams) * plan.cluster,
            (plan.threads, plan.teams),
            arguments,
            bound=plan.bound,
            shared=shared,
        )

    def _over_strides(
        self,
        operation,
        x,
        *,
        out=None,
        t=None,
        state=None,
        weight=None,
        options=None,
        value=None,
        other=None,
    ):
        name, (outer, classes, inner) = _format(x), x.shape
        count = outer * inner
        entropy = operation == "cross_entropy"
        running = state is not None and not entropy
        options = options or _NO_OPTIONS
        size = size_of(name)
        lanes = geometry.lanes_of_row(classes)
        packed = (inner == 1 and classes) and all(
            a is None or (_format(a) == name and a.strides[:2] == (classes * size, size))
            for a in (x, out)
        )
        per_block, threads, shared = geometry.BLOCK // lanes, geometry.BLOCK, 0
        staged = packed and lanes == 1 and name in FLOATS and (t is None or entropy)
        kernel = strided.kernel(
            name,
            operation,
            labels=_format(state) if state is not None and entropy else None,
            dense=_format(t) if t is not None and entropy else None,
            factors=_format(t) if t is not None and not entropy else None,
            weights=None if weight is None else _format(weight),
            running=running,
            written=None if out is None else _format(out),
            smoothed=options.label_smoothing != 0.0,
            capped=options.softcap != 0.0,
            staged=bool(staged),
        )
        real_size = np.dtype(kernel.real).itemsize
        if staged:
            per_block = threads = geometry.staged_rows(classes, real_size)
            shared = threads * (classes | 1) * real_size
        elif lanes > 1:
            shared = PARTS * threads * real_size
        arguments = (
            count,
            classes,
            inner,
            lanes,
            int(abs(x.strides[2]) < abs(x.strides[1]) and inner > 1),
            _address(x),
            *x.strides,
            _address(out),
            *_strides(out, 3),
            _address(t),
            *_strides(t, 3),
            _address(state),
            *_strides(state, 3),
            _address(value),
            *_strides(value, 2),
            _address(other),
            *_strides(other, 2),
            _address(weight),
            0 if weight is None else weight.strides[0],
            _divisor(options, kernel),
            options.ignore_index,
            *_numbers(options, classes, kernel),
        )
        return self._launch(
            kernel, -(-count // per_block), (threads, 1), arguments, bound=geometry.BLOCK, shared=shared
        )

    def labels(self, labels, classes, ignore_index, weight, check):
        kept = _Weight(partial(self._weigh, labels, classes, ignore_index, weight))
        if check:
            kept.words = self._weigh(labels, classes, ignore_index, weight, debugging=True)
        return labels, kept

    def _weigh(self, labels, classes, ignore_index, weight, debugging=False):
        """The words of a `_Weight`; `IndexError` for a label that is none if asked for, which waits."""
        pieces = [inputs for inputs, *_ in layout.elements((labels,), None, None, None)]
        blocks = [-(-piece.size // totals.UNIT) for (piece,) in pieces]
        alone = len(blocks) == 1 and blocks[0] == 1
        words = self._empty((totals.WEIGHT_WORDS,), np.float64)
        sums = words if alone else self._empty((max(1, sum(blocks)),), np.float64)
        bad = self._empty((max(1, sum(blocks)),), np.float64) if debugging else None
        kernel = totals.weigh(_format(labels), None if weight is None else _format(weight))
        done = 0
        for (piece,), count in zip(pieces, blocks, strict=True):
            arguments = (
                piece.size,
                piece.shape[1],
                _address(piece),
                *piece.strides,
                classes,
                ignore_index,
                _address(weight),
                0 if weight is None else weight.strides[0],
                _address(sums) + 8 * done,
                _address(bad) + 8 * done if debugging else 0,
            )
            if count:
                self._start(kernel, count, totals.THREADS, arguments)
            done += count
        if debugging:
            self._raise_bad(labels, pieces, blocks, bad, classes, ignore_index)
        if not alone:
            self._add_up(sums[:done], words, reciprocals=_address(words) + 8)
        return words

    def factor(self, kept):
        """What a gradient is multiplied with: a number, or where on the device there is one."""
        if isinstance(kept, _Weight):
            return kept
        return 1.0 / kept if kept else np.nan

    def total(self, values, denominator, dtype):
        result = self._empty((), dtype)
        self._add_up(values, result, denominator=denominator)
        return result

    def _add_up(self, values, out, denominator=None, reciprocals=0):
        """A tree of sums of contiguous numbers, the last of which goes to `out`."""
        divisor = 1.0
        if isinstance(denominator, _Weight):
            denominator = _address(denominator.words)
        elif denominator is not None:
            denominator, divisor = 0, float(denominator)
        else:
            denominator = 0
        while values.size > totals.UNIT:
            count = -(-values.size // totals.UNIT)
            sums = self._empty((count,), np.float64)
            kernel = totals.add_up(_format(values), "float64")
            arguments = (values.size, _address(values), _address(sums), 0, 0, 1.0)
            self._start(kernel, count, totals.THREADS, arguments)
            values = sums
        kernel = totals.add_up(_format(values), _format(out))
        arguments = (values.size, _address(values), _address(out), denominator, reciprocals, divisor)
        self._start(kernel, 1, totals.THREADS, arguments)

    def _raise_bad(self, labels, pieces, blocks, bad, classes, ignore_index):
        """`IndexError` for the first label outside of the classes: waits for the device."""
        found = self._gpu.read(_address(bad), sum(blocks), np.float64, self._stream)
        start = 0
        for (piece,), count in zip(pieces, blocks, strict=True):
            first = found[start : start + count].min(initial=np.inf)
            start += count
            if np.isfinite(first):
                row, column = divmod(int(first), piece.shape[1])
                address = _address(piece) + row * piece.strides[0] + column * piece.strides[1]
                (label,) = self._gpu.read(address, 1, labels.dtype, self._stream)
                position = _position(labels, address)
                raise bad_label(label, position, classes, ignore_index)

    def fill_identity(self, state):
        self._merge(state, 0)

    def merge(self, state, other):
        self._merge(state, _address(other))

    def _merge(self, state, other):
        count = state.size // 3
        if count:
            blocks = -(-count // geometry.BLOCK)
            arguments = (count, _address(state), other)
            self._start(totals.merge(), blocks, geometry.BLOCK, arguments)

    def _sigmoid(self, x, out, log):
        name, written = _format(x), _format(out)
        whole = name == written and _vectors(name, x, out)
        kernel = elementwise.sigmoid(name, written, log, whole)
        length, units, blocks = _units(x)
        arguments = (length, units, _address(x), *x.strides, _address(out), *out.strides)
        return self._launch(kernel, blocks, (elementwise.THREADS, 1), arguments, bound=geometry.BLOCK)

    def _binary_cross_entropy(self, x, target, weight, pos_weight, scale, loss, partial, grad):
        name = _format(x)
        result = loss if partial is None else partial
        whole = _format(target) == name and _vectors(name, x, target, grad)
        kernel = elementwise.binary_cross_entropy(
            name,
            _format(target),
            None if weight is None else _format(weight),
            None if pos_weight is None else _format(pos_weight),
            None if grad is None else _format(grad),
            whole,
            partial is not None,
        )
        length, units, blocks = _units(x)
        arguments = [length, units]
        for a in (x, target, weight, pos_weight, result, grad):
            arguments += [_address(a), *_strides(a, 2)]
        arguments.append(kernel.real(scale))
        shared = 2 * team.WARPS * np.dtype(kernel.real).itemsize
        return self._launch(
            kernel,
            blocks,
            (elementwise.THREADS, 1),
            arguments,
            bound=geometry.BLOCK,
            shared=shared,
        )

    def _launch(self, kernel, blocks, block, arguments, *, bound, shared=0):
        """A `Kernel` of the contract, which does all of its units at once."""
        return partial(self._go, kernel, blocks, block, arguments, bound, shared)

    def _go(self, kernel, blocks, block, arguments, bound, shared, start, stop):
        self._gpu.launch(kernel, self._stream, blocks, block, arguments, bound=bound, shared=shared)

    def _start(self, kernel, blocks, threads, arguments):
        """A kernel of `totals`, at once."""
        shared = 2 * team.WARPS * 8
        self._gpu.launch(
            kernel, self._stream, blocks, (threads, 1), arguments, bound=threads, shared=shared
        )


class _Weight:
    """The weight of the kept labels, on the device, where a mean asks for it.

    Its words are the weight, 1 / itself, and that in float32.
    """

    def __init__(self, weigh):
        self._weigh = weigh

    @cached_property
    def words(self):
        return self._weigh()


_NO_OPTIONS = Options()


@lru_cache(1024)
def _team_kernel(
    name, classes, operation, labels, weights, written, smoothed, capped, aligned, capability
):
    """The kernel of `rows` for a call, the team of each row, and bytes of shared memory."""
    plan = geometry.team(classes, name, 2 if operation == "dense" else 1, capability)
    ragged = classes % lanes_of(name) != 0
    kernel = rows.kernel(
        name,
        plan.vectors,
        operation,
        labels=labels,
        weights=weights,
        written=written,
        smoothed=smoothed,
        capped=capped,
        cluster=plan.cluster,
        chunked=plan.chunked,
        aligned=aligned and not ragged,
        modern=capability >= (8, 0),
    )
    shared = rows.SCRATCH + (plan.teams * plan.threads * lanes_of(name) if ragged else 0)
    return kernel, plan, shared * np.dtype(kernel.real).itemsize


def _numbers(options, classes, kernel):
    """keep, spread, z_loss, cap and scale in the kernel's compute type."""
    eps = options.label_smoothing
    scale = 1.0 if isinstance(options.scale, _Weight) else options.scale
    numbers = (1.0 - eps, eps / max(classes, 1), options.z_loss, options.softcap, scale)
    return [kernel.real(number) for number in numbers]


def _divisor(options, kernel):
    """Address of the factor of the gradient, where that is on the device."""
    if not isinstance(options.scale, _Weight):
        return 0
    return _address(options.scale.words) + (16 if kernel.real is np.float32 else 8)


def _format(a):
    return _named(a.dtype)


@lru_cache(64)
def _named(dtype):
    return FORMATS[kind_of(dtype).code]


def _address(a):
    return 0 if a is None else a.__array_interface__["data"][0]


def _strides(a, count):
    return (*a.strides, *_NO_STRIDES)[:count] if a is not None else _NO_STRIDES[:count]


def _step(a):
    """Bytes from row to row of (outer, [classes,] inner); None where no one number is that."""
    if a is None:
        return 0
    outer, inner = a.shape[0], a.shape[-1]
    if inner == 1:
        return a.strides[0]
    if outer == 1 or a.strides[0] == inner * a.strides[-1]:
        return a.strides[-1]
    return None


def _row_step(a, name):
    """`_step` of an array over (outer, classes, inner) whose classes are contiguous and of a format."""
    if _format(a) != name or (a.shape[1] > 1 and a.strides[1] != size_of(name)):
        return None
    return _step(a)


def _vectors(name, *arrays):
    """Whether rows (outer, n) of a format can be read and written by vectors."""
    size = size_of(name)
    return name in FLOATS and all(
        a is None
        or (
            _format(a) == name
            and a.strides[1] == size
            and _address(a) % 16 == 0
            and (a.shape[0] == 1 or a.strides[0] % 16 == 0)
        )
        for a in arrays
    )


def _units(x):
    """Elements of a row of (outer, n), units of it, and blocks of all."""
    outer, length = x.shape
    units = -(-length // elementwise.UNIT)
    return length, units, outer * units


def _position(a, address):
    """Index of the element at an address."""
    offset = address - _address(a)
    order = sorted(range(a.ndim), key=lambda axis: -abs(a.strides[axis]))
    index = [0] * a.ndim
    for axis in order:
        step = a.strides[axis]
        if a.shape[axis] > 1 and step:
            index[axis] = min(max(int(offset / step), 0), a.shape[axis] - 1)
            offset -= index[axis] * step
    return tuple(index)
