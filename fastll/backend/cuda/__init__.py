"""CUDA kernels by Numba, launched on the caller's stream: every operation on NVIDIA GPUs.

An operation's kernel is made for the formats and options it meets, when it first meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from math import nan
from typing import Any

import numpy as np

from fastll import contract, replay
from fastll.backend.cuda import calls, folds, geometry, launch, maps, pairs, states, teams, totals
from fastll.backend.cuda.calls import Array, Full, Line, Row, address, format_of, placed
from fastll.backend.cuda.compiler import Kernel
from fastll.backend.cuda.primitives import FLOATS, VECTOR, compute_type, lanes_of, size_of
from fastll.contract import Kept, bad_label

Empty = Callable[[tuple[int, ...], Any], Array]


def bind(index: int, stream: int, empty: Empty) -> Backend:
    """The backend for a device and a stream; `empty` (shape, dtype) makes arrays there."""
    try:
        gpu = launch.gpu(index)
    except Exception as error:
        raise RuntimeError(f"an array is on cuda:{index}, but {why_not() or error}") from error
    return Backend(gpu, stream, empty)


def why_not() -> str | None:
    """Why there is no GPU to use, in a line; None if there is one."""
    try:
        return None if launch.count() else "the NVIDIA driver sees no GPU"
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"there is no GPU, or no NVIDIA driver for it: install one ({reason})"


class Backend:
    """See `fastll.contract.Backend`."""

    name = "cuda"
    partial_dtype = None  # that which is computed in
    unit = maps.UNIT

    def __init__(self, gpu: launch.Gpu, stream: int, empty: Empty) -> None:
        self._gpu = gpu
        self._program = partial(launch.Program, gpu)
        self._stream = stream
        self._empty = empty

    def run(self, kernel: contract.Kernel, units: int, elements: int) -> None:
        if units:
            kernel(0, units)  # does all of them at once

    def map(self, call: contract.Map) -> contract.Kernel:
        x = call.inputs[0]
        vectors = _in_vectors(x, x)

        def stored(a: Array | None) -> Any:
            return None if a is None else maps.Operand(format_of(a), vectors and _in_vectors(a, x))

        variant = maps.Variant(
            call.operation,
            tuple(map(stored, call.inputs)),
            weight=stored(call.weight),
            value=stored(call.value),
            partial=call.partial is not None,
            slope=stored(call.slope),
            modern=self._gpu.capability >= (8, 0),
        )
        outer, length = x.shape
        units = contract.units_of(length, maps.UNIT)
        told = calls.Map(
            length,
            units,
            tuple(placed(Row, a) for a in call.inputs),
            weight=placed(Row, call.weight),
            value=placed(Row, call.value),
            partial=placed(Row, call.partial),
            slope=placed(Row, call.slope),
            parameters=tuple(map(float, call.parameters)),
            scale=float(call.scale),
        )
        return self._bound(maps.kernel(variant), outer * units, (maps.THREADS, 1), told, maps.SHARED)

    def fold(self, call: contract.Fold) -> contract.Kernel:
        steps = _team_steps(call)
        if steps is None:
            return self._by_threads(call)
        return self._in_parts(call, steps) or self._by_teams(call, steps)

    def _kernel(self, call: contract.Fold, **rows: Any) -> Kernel:
        """The kernel of a fold, for rows that are like that."""
        options = call.options
        variant = folds.Variant(
            call.operation,
            format_of(call.x),
            second=format_of(call.second),
            labels=format_of(call.labels),
            weight=format_of(call.weight),
            sample=format_of(call.sample),
            out=format_of(call.out),
            state=call.state is not None,
            signed=call.sign is not None,
            selected=call.selected is not None,
            smoothed=options.label_smoothing != 0.0,
            capped=options.softcap != 0.0,
            tempered=options.inverse_temperature != 1.0,
            averaged=_rows_weight(options) is not None,
            modern=self._gpu.capability >= (8, 0),
            **rows,
        )
        return folds.kernel(variant)

    def _in_parts(self, call: contract.Fold, steps: dict[str, int]) -> contract.Kernel | None:
        """Very long rows, of which every part has a thread block; None for others."""
        (outer, classes, inner), name = call.x.shape, format_of(call.x)
        if classes <= geometry.LONG or call.operation not in ("logsumexp", "softmax", "log_softmax"):
            return None
        if call.out is not None and not self._plan(classes, name, 1).chunked:
            return None
        rows, parts = outer * inner, -(-classes // geometry.PART)
        alone = call._replace(operation="logsumexp", lse=None, out=None)
        merged = call.lse is None

        def go(start: int, stop: int) -> None:
            states = self._empty((rows, parts, 3), np.float64)
            whole = self._empty((rows, 3), np.float64) if merged else None
            self._by_teams(alone, steps, states)(0, rows)
            lse = placed(Row, call.lse)
            told = calls.Parts(
                parts, address(states), address(whole), lse.address, steps.get("lse", lse.outer)
            )
            kernel = totals.merge_parts(format_of(call.lse) or "float64")
            block, shared = (totals.PART_THREADS, 1), 24 * totals.PART_THREADS
            self._bound(kernel, rows, block, told, shared)(0, rows)
            if whole is not None:
                self._write_in_parts(call, whole)

        return go

    def _write_in_parts(self, call: contract.Fold, states: Array) -> None:
        """Write rows of which the states are known, a part of a row as a row of its own."""
        x, out, part = call.x, call.out, geometry.PART
        for i in range(x.shape[0]):
            for k in range(x.shape[2]):
                row, target = x[i, :, k], out[i, :, k]  # type: ignore[index]
                whole = len(row) // part * part
                for begin, size in ((0, part), (whole, len(row) - whole)):
                    stop = whole if begin == 0 else len(row)
                    if begin < stop:
                        shape = (stop - begin) // size, size, 1
                        state = states[i * x.shape[2] + k].reshape(1, 1, 3)
                        piece = call._replace(
                            x=row[begin:stop].reshape(shape),
                            out=target[begin:stop].reshape(shape),
                            state=np.broadcast_to(state, (shape[0], 1, 3), subok=True),
                        )
                        self._by_threads(piece)(0, shape[0])

    def _plan(self, classes: int, name: str, inputs: int, part: int | None = None) -> geometry.Team:
        """The team for rows of contiguous classes of a format, or for parts of them."""
        scratch = teams.SCRATCH * np.dtype(compute_type(name)).itemsize
        return geometry.team(classes, name, inputs, scratch, self._gpu.capability, part)

    def _by_teams(
        self, call: contract.Fold, steps: dict[str, int], states: Array | None = None
    ) -> contract.Kernel:
        """Rows of contiguous classes; of parts of them, the `states` (rows, parts, 3)."""
        (outer, classes, inner), name = call.x.shape, format_of(call.x)
        inputs, lanes = 1 if call.second is None else 2, lanes_of(name)
        parts, part = (1, None) if states is None else (states.shape[1], geometry.PART)
        plan = self._plan(classes, name, inputs, part)
        told = _told(call)
        told = told._replace(
            segment=plan.segment,
            capacity=plan.capacity,
            parts=parts,
            rows_at=plan.rows_at,
            pitch=plan.pitch,
            **{key: getattr(told, key)._replace(outer=steps[key]) for key in steps},
        )
        if states is not None:
            told = told._replace(state=told.state._replace(address=address(states)))
        aligned = classes % lanes == 0 and not any(
            (a.address | a.outer) % VECTOR for a in (told.x, told.second, told.out)
        )
        kernel = self._kernel(
            call,
            team=True,
            several=plan.teams > 1,
            newest=self._gpu.capability >= (9, 0),
            cluster=plan.cluster,
            chunked=plan.chunked,
            in_parts=states is not None,
            aligned=aligned,
        )
        blocks = -(-outer * inner // plan.teams) * plan.cluster * parts
        block = plan.threads, plan.teams
        return self._bound(kernel, blocks, block, told, plan.shared, bound=geometry.RESIDENT)

    def _by_threads(self, call: contract.Fold) -> contract.Kernel:
        """Rows of any strides, and short ones."""
        name, (outer, classes, inner) = format_of(call.x), call.x.shape
        size, lanes = size_of(name), 1 if _label_alone(call) else geometry.lanes_of_row(classes)
        # rows that are short and lie one after the other go through shared memory
        short = (
            (lanes == 1 and inner == 1 and classes > 0 and name in FLOATS)
            and not _label_alone(call)
            and (call.operation != "logsumexp" or call.second is None)
            and all(
                format_of(a) == name and a.strides[:2] == (classes * size, size)
                for a in (call.x, call.out)
                if a is not None
            )
        )
        newest = short and self._gpu.capability >= (9, 0)
        kernel = self._kernel(call, classes=classes if short else 0, newest=newest)
        per_block, threads, shared = geometry.BLOCK // lanes, geometry.BLOCK, 0
        if short:
            _, pitch = geometry.piece_of(classes * size)
            per_block = threads = geometry.rows_together(pitch)
            shared = VECTOR + threads * pitch
        elif lanes > 1:
            parts = states.PARTS if call.operation != "kl_divergence_from_logits" else pairs.PARTS
            shared = parts * threads * kernel.real_size
        across = inner > 1 and abs(call.x.strides[2]) < abs(call.x.strides[1])
        told = _told(call)._replace(lanes=lanes, across=int(across))
        return self._bound(kernel, -(-outer * inner // per_block), (threads, 1), told, shared)

    def _bound(
        self,
        kernel: Kernel,
        blocks: int,
        block: tuple[int, int],
        told: tuple[Any, ...],
        shared: int,
        bound: int = geometry.BLOCK,
    ) -> contract.Kernel:
        """A `Kernel` of the contract; `bound` is the most threads the kernel is compiled for."""
        words = calls.words(told, kernel.real)
        made = launch.Launch(kernel, blocks, block, words, bound, shared)

        def go(start: int, stop: int) -> None:
            launch.start(self._gpu, made, self._stream)
            replay.launched(self._program, made, words, lambda: calls.addresses(told))

        return go

    def _total(self, kernel: Kernel, blocks: int, told: tuple[Any, ...]) -> None:
        """Launch a kernel of `totals`."""
        block = totals.THREADS, 1
        self._bound(kernel, blocks, block, told, totals.SHARED, bound=totals.THREADS)(0, blocks)

    def weigh(
        self,
        labels: Array | None,
        classes: int,
        ignore_index: int | None,
        weight: Array | None,
        sample: Array | None,
        check: bool,
        name: str,
    ) -> tuple[Array | None, Weight]:
        def weighed(weight: Array | None, error: Callable[..., IndexError] | None = None) -> Array:
            return self._weigh(labels, classes, ignore_index, weight, sample, error)

        kept = Weight(
            partial(weighed, weight), None if weight is None else Weight(partial(weighed, None))
        )
        if check and labels is not None:
            kept.words = weighed(weight, partial(bad_label, name, classes, ignore_index))
        return labels, kept

    def _weigh(
        self,
        labels: Array | None,
        classes: int,
        ignore_index: int | None,
        weight: Array | None,
        sample: Array | None,
        error: Callable[..., IndexError] | None,
    ) -> Array:
        """The words of a `Weight`; raises the error, if there is one, for a bad label: that waits."""
        operands = [a for a in (labels, sample) if a is not None]
        shape, size = operands[0].shape, operands[0].size
        flat = all(a.flags.c_contiguous for a in operands)
        if flat:
            shape = (size,)
        blocks = max(1, -(-size // totals.UNIT))
        words = self._empty((totals.WEIGHT_WORDS,), np.float64)
        sums = words if blocks == 1 else self._empty((blocks,), np.float64)
        bad = self._empty((blocks,), np.float64) if error else None
        kernel = totals.weigh(
            format_of(labels),
            len(shape),
            format_of(weight),
            format_of(sample),
            ignore_index is not None,
        )

        def steps(a: Array | None) -> tuple[int, ...]:
            if a is None:
                return (0,) * len(shape)
            return a.reshape(shape).strides if flat else a.strides

        told = calls.Weigh(
            labels=address(labels),
            sample=address(sample),
            sizes=shape,
            label_steps=steps(labels),
            sample_steps=steps(sample),
            size=size,
            classes=classes,
            ignore_index=ignore_index or 0,
            weight=placed(Line, weight),
            out=address(sums),
            bad=address(bad),
        )
        self._total(kernel, blocks, told)
        if error is not None and bad is not None and labels is not None:
            self._check(labels, bad, error)
        if blocks > 1:
            self._add_up(sums, words, reciprocals=address(words) + 8)
        return words

    def _check(self, labels: Array, bad: Array, error: Callable[..., IndexError]) -> None:
        """Raise error(label, position) of the first label out of range, for which it waits."""
        replay.prevent()
        first = self._gpu.read(address(bad), bad.size, np.float64, self._stream).min()
        if first < np.inf:
            at = tuple(int(i) for i in np.unravel_index(int(first), labels.shape))
            place = address(labels) + sum(i * step for i, step in zip(at, labels.strides, strict=True))
            (label,) = self._gpu.read(place, 1, labels.dtype, self._stream)
            raise error(label, at)

    def averaged(self, kept: Weight | Kept, z_loss: float) -> tuple[Any, float]:
        """With a `Weight`, kernels find the factors of both on the device."""
        if isinstance(kept, Weight):
            return kept, z_loss
        return 1.0 / kept.weight if kept.weight else nan, z_loss  # which is that of the rows

    def total(
        self, values: Array, denominator: Any, dtype: np.dtype[Any], exponential: bool = False
    ) -> Array:
        result = self._empty((), dtype)
        self._add_up(values, result, denominator, exponential=exponential)
        return result

    def accumulate(self, sums: contract.Floats | None, losses: Array, kept: Any) -> contract.Floats:
        loss, fresh = self.total(losses, None, np.dtype(np.float64)), sums is None
        sums = self._empty((2, 2), np.float64) if sums is None else sums
        place, number = (0, kept.weight) if isinstance(kept, Kept) else (address(kept.words), 0.0)
        told = calls.Accumulate(address(sums), int(fresh), address(loss), place, number)
        self._total(totals.accumulate(), 1, told)
        return sums

    def read(self, a: Array) -> np.ndarray[Any, Any]:
        return self._gpu.read(address(a), a.size, a.dtype, self._stream).reshape(a.shape)

    def _add_up(
        self,
        values: Array,
        out: Array,
        denominator: Any = None,
        reciprocals: int = 0,
        exponential: bool = False,
    ) -> None:
        """A tree of sums of contiguous numbers, the last of which goes to `out`."""
        place, divisor = 0, 1.0
        if isinstance(denominator, Weight):
            place = address(denominator.words)
        elif denominator is not None:
            divisor = float(denominator.weight if isinstance(denominator, Kept) else denominator)
        blocks = 0
        while blocks != 1:
            blocks = max(1, -(-values.size // totals.UNIT))
            sums = out if blocks == 1 else self._empty((blocks,), np.float64)
            told = calls.Total(
                values.size,
                address(values),
                address(sums),
                place,
                reciprocals,
                divisor,
                int(exponential),
            )
            self._total(totals.add_up(format_of(values), format_of(sums)), blocks, told)
            values = sums

    def fill_identity(self, state: contract.Floats) -> None:
        self.merge(state)

    def merge(self, state: contract.Floats, other: contract.Floats | None = None) -> None:
        count = state.size // 3
        if count:
            told = calls.Merge(count, address(state), address(other))
            self._total(totals.merge(), -(-count // totals.THREADS), told)


class Weight:
    """The weight of the kept rows, on the device, for when a mean asks for it.

    Its words are the weight, 1 / itself, and that in float32. `rows` is that without class weights, if
    there are any.
    """

    def __init__(self, weigh: Callable[[], Array], rows: Weight | None = None) -> None:
        self._weigh = weigh
        self.rows = rows

    @cached_property
    def words(self) -> Array:
        return self._weigh()


def _in_vectors(a: Array, x: Array) -> bool:
    """Whether an operand (outer, n) can be read and written by vectors, as one in the format of x."""
    name = format_of(a)
    return name in FLOATS and (
        name == format_of(x)
        and a.strides[1] == size_of(name)
        and address(a) % VECTOR == 0
        and (a.shape[0] == 1 or a.strides[0] % VECTOR == 0)
    )


def _label_alone(call: contract.Fold) -> bool:
    """Whether of a row the element at its label is read, and nothing is written but its loss."""
    point = call.labels is not None and call.options.label_smoothing == 0.0
    return call.operation == "nll_loss" and point and call.out is None


def _rows_weight(options: contract.Options) -> Weight | None:
    """What the factor of lse**2 in a mean is to be divided by, on the device, if not by the weight."""
    return options.scale.rows if isinstance(options.scale, Weight) and options.z_loss else None


def _operands(call: contract.Fold) -> dict[str, tuple[Any, Array | None]]:
    """Arrays as kernels are told of them, and their kinds, by their names in `calls.Fold`."""
    several = call.selected is not None

    def full(a: Array | None) -> Array | None:
        return None if a is None else a.transpose(0, 2, 1)

    return {
        "x": (Full, call.x),
        "second": (Full, call.second),
        "out": (Full, call.out),
        "state": (Full, full(call.state)),
        "choices": (Full, full(call.labels) if several else None),
        "selected": (Full, full(call.selected)),
        "labels": (Row, None if several else call.labels),
        "sample": (Row, call.sample),
        "value": (Row, call.value),
        "lse": (Row, call.lse),
        "sign": (Row, call.sign),
    }


def _team_steps(call: contract.Fold) -> dict[str, int] | None:
    """Bytes from row to row of operands where that is not the first step; None if teams do not take
    the rows of a call."""
    classes, name = call.x.shape[1], format_of(call.x)
    if classes <= geometry.SHORT or classes >= 1 << 31 or name not in FLOATS or _label_alone(call):
        return None
    weights = call.operation == "logsumexp" and call.second is not None
    if weights or call.state is not None or call.sign is not None:
        return None
    for a in (call.x, call.second, call.out):
        if a is not None and (format_of(a) != name or a.strides[1] != size_of(name)):
            return None
    steps = {}
    for key, (_, a) in _operands(call).items():
        if a is not None and a.shape[-1] > 1:
            if a.shape[0] > 1 and a.strides[0] != a.shape[-1] * a.strides[-1]:
                return None
            steps[key] = a.strides[-1]
    return steps


def _told(call: contract.Fold) -> calls.Fold:
    """What a kernel is told of a fold."""
    outer, classes, inner = call.x.shape
    options = call.options
    scale, rows_weight = options.scale, _rows_weight(options)
    reciprocal = 16 if compute_type(format_of(call.x)) is np.float32 else 8
    divisor = row_divisor = 0
    if isinstance(scale, Weight):
        divisor, scale = address(scale.words) + reciprocal, 1.0
    if rows_weight is not None:
        row_divisor = address(rows_weight.words) + reciprocal
    return calls.Fold(
        rows=outer * inner,
        classes=classes,
        inner=inner,
        **{key: placed(kind, a) for key, (kind, a) in _operands(call).items()},
        weight=placed(Line, call.weight),
        divisor=divisor,
        row_divisor=row_divisor,
        wanted=0 if call.selected is None else call.selected.shape[2],
        ignore_index=options.ignore_index,
        keep=1.0 - options.label_smoothing,
        spread=options.label_smoothing / max(classes, 1),
        z_loss=float(options.z_loss),
        softcap=float(options.softcap),
        scale=float(scale),
        inverse_temperature=float(options.inverse_temperature),
    )
