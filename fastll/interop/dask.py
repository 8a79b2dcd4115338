"""fastll for dask: its functions over chunked arrays, lazily, on any scheduler.

Each function returns dask arrays and computes nothing. Where the classes of a row are in one chunk, a
chunk is a call of fastll's function. Where they are in several, running states of the chunks
(`fastll.LogSumExp`) are merged as a tree, and what has the shape of the array, a softmax or a gradient,
is made of each chunk and the merged state: `logits` are not rechunked, and there is no array of their
size beyond the result. A state takes 40 bytes per row and chunk, which is little where chunks have some
hundred classes and more. Chunks are NumPy arrays.

Arguments are checked when a function is called, with the errors of fastll's function of that name.
Labels are not known then: a chunk with a label that is out of range raises `IndexError` when it is
computed, with the position in that chunk.
"""

# ruff: noqa: E402 (dask's version is checked first)

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

import fastll
from fastll import LogSumExp, dispatch
from fastll.api import Reduction, check_reduction
from fastll.api.losses import check_options, class_weight_of, target_of
from fastll.arrays import HOST, Axis, axes_of, broadcast, kept_shape
from fastll.calls import Call
from fastll.contract import Kept
from fastll.dtypes import as_floats, kind_of
from fastll.interop import _parts as parts
from fastll.interop import require

require("dask", "2025.1")

import dask.array as da

Array = NDArray[Any]
Indices = tuple[int, ...]
#: Arrays by the name that a function of their chunks gives them, each with its axes.
Arrays = dict[str, tuple[Any, Indices]]

__all__ = ["NegativeLogLikelihood", "cross_entropy", "log_softmax", "logsumexp", "softmax"]


def logsumexp(
    a: Any,
    axis: Axis = None,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Any:
    """`fastll.logsumexp` of a dask array.

    Parameters
    ----------
    a : dask array
        Or what `dask.array.asarray` takes.
    axis, keepdims, return_sign
        As for `fastll.logsumexp`.
    b : array_like, optional
        Weights; `a` and `b` broadcast to one shape. Where a row is in several chunks, they are computed
        with in float64.

    Returns
    -------
    res, sgn : dask array
        As of `fastll.logsumexp`: equal to the bit where the reduced axes are in one chunk, and within
        the rounding of merges elsewhere.

    Raises
    ------
    TypeError, ValueError
        As of `fastll.logsumexp`, when this is called.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastll.interop.dask import logsumexp
    >>> logsumexp(da.zeros((4, 1000), chunks=(2, 300)), axis=1).compute()
    array([6.90775528, 6.90775528, 6.90775528, 6.90775528])
    """
    x = da.asarray(a)
    dtype = Call("logsumexp", _stand_in(x, "a"), "a").compute
    if b is not None:
        if isinstance(b, int | float) and not isinstance(b, np.generic):
            b = np.asarray(b, dtype)  # as for NumPy, a number has no dtype of its own
        b = da.asarray(b)
        dtype = np.result_type(dtype, kind_of(b.dtype, "b").compute)
        try:
            shape = np.broadcast_shapes(x.shape, b.shape)
        except ValueError:
            raise ValueError(
                f"b has shape {b.shape}; expected one that broadcasts with {x.shape}"
            ) from None
        x = _broadcast(x, shape)
        b = _broadcast(b, shape).rechunk(x.chunks)
    axes = axes_of(axis, x.ndim)
    whole = all(x.numblocks[i] == 1 for i in axes)
    if b is None and return_sign and not whole:
        b = da.ones_like(x, dtype=dtype)
    inds = tuple(range(x.ndim))
    rows = tuple(i for i in inds if i not in axes)
    arrays: Arrays = {"a": (x, inds)} if b is None else {"a": (x, inds), "b": (b, inds)}
    if whole:
        found = _map(_logsumexp, inds, dtype, arrays, axes=axes, return_sign=return_sign), inds
    elif b is None:
        found = _map(_value, rows, dtype, {"state": (_states(x, axes, dtype), rows)}), rows
    else:
        pair = _tree(_map(_weighted, inds, dtype, arrays, axes=axes), axes, _merged_pairs)
        found = (
            _map(_signed, rows, dtype, {"pair": (pair, rows)}, dtype=dtype, return_sign=return_sign),
            rows,
        )
    results = [_pick(found, i, rows, dtype) for i in range(1 + return_sign)]
    if keepdims:
        at = tuple(None if i in axes else slice(None) for i in inds)
        results = [result[at] for result in results]
    return tuple(results) if return_sign else results[0]


def softmax(x: Any, axis: Axis = -1) -> Any:
    """`fastll.softmax` of a dask array, chunked as it is.

    Parameters
    ----------
    x : dask array
        Or what `dask.array.asarray` takes.
    axis : int, tuple of int or None
        As for `fastll.softmax`.

    Returns
    -------
    dask array
        As of `fastll.softmax`: equal to the bit where `axis` is in one chunk, and within the rounding
        of merges elsewhere. An array in several chunks is read twice.

    Raises
    ------
    TypeError, ValueError
        As of `fastll.softmax`, when this is called.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastll.interop.dask import softmax
    >>> softmax(da.zeros((1, 4), chunks=2)).compute()
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    return _softmax("softmax", x, axis)


def log_softmax(x: Any, axis: Axis = -1) -> Any:
    """`fastll.log_softmax` of a dask array, as `softmax`.

    Parameters
    ----------
    x, axis
        As for `softmax`, like the result and the errors.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastll.interop.dask import log_softmax
    >>> log_softmax(da.zeros((1, 4), chunks=2)).compute()
    array([[-1.38629436, -1.38629436, -1.38629436, -1.38629436]])
    """
    return _softmax("log_softmax", x, axis)


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Any = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_grad: bool = False,
) -> Any:
    """`fastll.cross_entropy` of dask arrays, with its gradient.

    Parameters
    ----------
    logits : dask array
        Or what `dask.array.asarray` takes; chunked along any axis, that of the classes too.
    target, weight, sample_weight : array_like
        As for `fastll.cross_entropy`: dask arrays or others. They are rechunked to the chunks of
        `logits`.
    axis, ignore_index, label_smoothing, z_loss, softcap, reduction, return_lse, return_grad
        As for `fastll.cross_entropy`.

    Returns
    -------
    loss, lse, grad : dask array
        As of `fastll.cross_entropy`; the loss of "mean" and "sum" is 0-d. Where classes are in one
        chunk, all but these is equal to the bit; elsewhere it is within the rounding of merges. The
        gradient is chunked as `logits` are.

    Raises
    ------
    TypeError, ValueError
        As of `fastll.cross_entropy`, when this is called; if the size of a chunk is unknown.
    IndexError
        For a label that is out of range, when its chunk is computed.

    Notes
    -----
    With "mean", gradients wait for the number (or the weight) of rows that are kept, which reads labels
    and sample weights alone. Where classes are in several chunks, `logits` are read once, and once more
    for gradients; a dense target or label smoothing takes another read, and `softcap` a temporary of
    the size of a chunk.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastll.interop.dask import cross_entropy
    >>> logits = da.zeros((6, 1000), chunks=(2, 300))
    >>> loss, grad = cross_entropy(logits, [0, 1, 2, 3, 4, -100], return_grad=True)
    >>> float(loss.compute()), grad.chunks
    (6.907755278982137, ((2, 2, 2), (300, 300, 300, 100)))
    """
    mean = check_reduction(reduction) == "mean"
    own = ignore_index, label_smoothing, z_loss, softcap
    call = _Rows(logits, target, axis, (weight, sample_weight), own)
    kept = call.kept() if mean and (return_grad or z_loss) else {}
    compute, rows = call.kind.compute, call.rows
    scaled = mean and return_grad and call.whole
    if call.whole:
        arrays = call.arrays | kept
        outputs = {"return_lse": return_lse, "return_grad": return_grad, "scaled": scaled}
        found = _map(_whole, call.inds, compute, arrays, options=call.options, **outputs), call.inds
        results = [_pick(found, i, rows, compute) for i in range(1 + return_lse)]
        if return_grad:
            results.append(_pick(found, 1 + return_lse, call.inds, call.kind.element))
    else:
        of_rows: Arrays = {"part": (call.part(), rows)}
        of_rows |= call.of_rows | kept
        results = [_map(_losses, rows, np.float64, of_rows, options=call.options)]
        if return_lse:
            results.append(_map(_lse_of_part, rows, compute, {"part": of_rows["part"]}))
        if return_grad:
            arrays = call.arrays | of_rows
            element = call.kind.element
            results.append(_map(_gradient, call.inds, element, arrays, options=call.options))
    losses = results[0]
    if call.lifted:
        results = [result[0] for result in results]
    if reduction == "none":
        results[0] = results[0].astype(compute)
    else:
        of_rows = {"losses": (losses, rows)} | (call.weighed if mean else {})
        total = _map(_total, rows, np.float64, of_rows, options=call.options)
        total = _tree(total, tuple(range(len(rows))), operator.add)
        options = {"mean": mean, "scaled": scaled, "dtype": compute}
        results[0] = _map(_reduced, (), compute, {"total": (total, ())}, **options)
    return tuple(results) if len(results) > 1 else results[0]


class NegativeLogLikelihood:
    """`fastll.NegativeLogLikelihood` over dask arrays: nothing is computed before a result is.

    Results are 0-d dask arrays; `compute` gives an accumulator of fastll, which takes further updates.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastll.interop.dask import NegativeLogLikelihood
    >>> logits, tokens = da.zeros((100, 8), chunks=(30, 8)), da.arange(100, chunks=30) % 8
    >>> heldout = NegativeLogLikelihood().update(logits, tokens)
    >>> float(heldout.perplexity.compute())
    8.0
    >>> heldout.compute()
    NegativeLogLikelihood(mean=2.07944154, count=100)
    """

    def __init__(self) -> None:
        self._total = _map(_nothing, (), np.float64, {"zero": (da.zeros(()), ())})
        self._weighted = False

    def update(
        self,
        logits: Any,
        target: Any,
        *,
        axis: int = -1,
        weight: Any = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        sample_weight: Any = None,
    ) -> Self:
        """Add rows and their targets, lazily.

        Parameters
        ----------
        logits, target, axis, weight, ignore_index, softcap, sample_weight
            As for `cross_entropy`, like the errors.

        Returns
        -------
        NegativeLogLikelihood
            This accumulator.
        """
        options = ignore_index, 0.0, 0.0, softcap
        call = _Rows(logits, target, axis, (weight, sample_weight), options)
        if call.whole:
            inds = call.inds
            found = _map(_accumulated, inds, np.float64, call.arrays, options=call.options)
        else:
            inds = call.rows
            arrays: Arrays = {"part": (call.part(), inds)}
            arrays |= call.weighed
            found = _map(_accumulated_part, inds, np.float64, arrays, options=call.options)
        total = _tree(found, tuple(range(found.ndim)), _merged_accumulators)
        self._weighted |= weight is not None or sample_weight is not None
        return self._add(total)

    def merge(self, other: NegativeLogLikelihood) -> Self:
        """Add the rows of another accumulator of this class, which is not changed.

        Raises
        ------
        TypeError
            If `other` is of another class.
        """
        if not isinstance(other, NegativeLogLikelihood):
            raise TypeError(
                f"other is a {type(other).__name__}; expected a {type(self).__name__} of dask arrays"
            )
        self._weighted |= other._weighted
        return self._add(other._total)

    def _add(self, total: Any) -> Self:
        both: Arrays = {"a": (self._total, ()), "b": (total, ())}
        self._total = _map(_merged_accumulators, (), np.float64, both)
        return self

    def compute(self, **options: Any) -> fastll.NegativeLogLikelihood:
        """Compute the sums; options are those of `dask.compute`."""
        found: fastll.NegativeLogLikelihood = self._total.compute(**options)
        return found

    def _result(self, name: str, dtype: Any = np.float64) -> Any:
        return _map(_attribute, (), dtype, {"of": (self._total, ())}, name=name)

    @property
    def sum(self) -> Any:
        """The sum of the losses, in nats."""
        return self._result("sum")

    @property
    def count(self) -> Any:
        """What the mean divides by."""
        return self._result("count", np.float64 if self._weighted else np.int64)

    @property
    def mean(self) -> Any:
        """The loss per row, in nats."""
        return self._result("mean")

    @property
    def perplexity(self) -> Any:
        """``exp(mean)``."""
        return self._result("perplexity")

    @property
    def bits_per_token(self) -> Any:
        """``mean / log(2)``."""
        return self._result("bits_per_token")


#: What takes a dask array in fastll itself.
_TAKING = (logsumexp, softmax, log_softmax, cross_entropy)


def call(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A public function of fastll, of arguments one of which is a dask array."""
    own = {taking.__name__: taking for taking in _TAKING}
    if function not in own:
        raise TypeError(f"{function} takes no dask array; {', '.join(own)} do")
    bound = inspect.signature(getattr(fastll, function)).bind(*args, **kwargs)
    for name in ("out", "grad_out"):
        if bound.arguments.pop(name, None) is not None:
            raise TypeError(f"{name} is given, but dask arrays are not written to; expected none")
    return own[function](*bound.args, **bound.kwargs)


class _Options(NamedTuple):
    """What is not an array in a call: the axis and the number of classes, and options."""

    axis: int
    classes: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None


class _Rows:
    """Logits and what belongs to their rows: checked, and in the same chunks."""

    def __init__(
        self,
        logits: Any,
        target: Any,
        axis: int,
        weights: tuple[Any, Any],
        options: tuple[int, float, float, float | None],
    ) -> None:
        x = da.asarray(logits)
        call = Call("cross_entropy", _stand_in(x, "logits"), "logits")
        self.kind = kind_of(x.dtype)
        axis, shape = call.rows(axis)
        given = _stand_in(target, "target") if isinstance(target, da.Array) else target
        dense, labels = target_of(call, "any", given, shape, "target")
        found = labels if dense is None else dense
        t = target if isinstance(target, da.Array) else da.from_array(found)
        weight, sample = weights
        if weight is not None:
            is_lazy = isinstance(weight, da.Array)
            checked = class_weight_of(
                call, _stand_in(weight, "weight") if is_lazy else weight, x.shape[axis]
            )
            weight = weight if is_lazy else da.from_array(checked)
        if sample is not None:
            sample = da.asarray(sample)
            taken = HOST.take(_stand_in(sample, "sample_weight"), "sample_weight")
            broadcast(taken, shape, "sample_weight")
            sample = _broadcast(sample, shape)
        checked_options = check_options(options, dense is not None)

        self.lifted = x.ndim == 1
        if self.lifted:  # one row, as an array of rows
            x, t, axis = x[None], t[None], 1
            sample = None if sample is None else sample[None]
        self.inds = tuple(range(x.ndim))
        self.rows = tuple(i for i in self.inds if i != axis)
        self.whole = x.numblocks[axis] == 1
        self.options = _Options(axis, x.shape[axis], *checked_options)
        of_rows = tuple(x.chunks[i] for i in self.rows)
        #: Those with an entry per row, and with those the class weights in one chunk.
        self.of_rows: Arrays = {}
        if dense is None:
            self.of_rows["labels"] = t.rechunk(of_rows), self.rows
        if sample is not None:
            self.of_rows["sample"] = sample.rechunk(of_rows), self.rows
        self.weighed = dict(self.of_rows)
        self.arrays: Arrays = {"logits": (x, self.inds)} | self.of_rows
        if dense is not None:
            self.arrays["dense"] = t.rechunk(x.chunks), self.inds
        if weight is not None:
            self.weighed["weight"] = weight.rechunk(-1), (axis,)
            self.arrays["weight"] = weight.rechunk((x.chunks[axis],)), (axis,)
        if not self.whole:
            self.arrays["classes"] = da.arange(x.shape[axis], chunks=(x.chunks[axis],)), (axis,)

    def kept(self) -> Arrays:
        """What a mean divides by, as a 0-d array of a pair: the weight and the number of kept rows."""
        if not self.of_rows:
            count = math.prod(self.arrays["logits"][0].shape) // max(self.options.classes, 1)
            return {
                "kept": (_map(_all_rows, (), np.float64, {"zero": (da.zeros(()), ())}, count=count), ())
            }
        found = _map(_kept, self.rows, np.float64, self.weighed, options=self.options)
        axes = tuple(range(len(self.rows)))
        return {"kept": (_tree(found, axes, operator.add), ())}

    def part(self) -> Any:
        """What is found of whole rows, of which no chunk has all classes."""
        arrays = {name: of for name, of in self.arrays.items() if name != "sample"}
        found = _map(_part, self.inds, np.float64, arrays, options=self.options)
        return _tree(found, (self.options.axis,), parts.merged)


def _stand_in(x: Any, name: str) -> Array:
    """A NumPy array with the shape and the dtype of a dask array, and one element in memory."""
    if any(math.isnan(n) for n in x.shape):
        raise ValueError(f"{name} has chunks of unknown size; compute_chunk_sizes() of it finds them")
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else da.broadcast_to(x, shape)


def _softmax(operation: str, x: Any, axis: Axis) -> Any:
    x = da.asarray(x)
    kind = kind_of(Call(operation, _stand_in(x, "x"), "x").x.dtype)
    axes = axes_of(axis, x.ndim)
    inds = tuple(range(x.ndim))
    if all(x.numblocks[i] == 1 for i in axes):
        function = fastll.softmax if operation == "softmax" else fastll.log_softmax
        return _map(function, inds, kind.element, {"x": (x, inds)}, axis=axes)
    rows = tuple(i for i in inds if i not in axes)
    arrays: Arrays = {"x": (x, inds), "state": (_states(x, axes, kind.compute), rows)}
    return _map(parts.softmax_of, inds, kind.element, arrays, operation=operation, axes=axes)


def _states(x: Any, axes: Indices, dtype: Any) -> Any:
    """The running states of rows, `axes` of which are in several chunks."""
    inds = tuple(range(x.ndim))
    found = _map(_state, inds, np.float64, {"a": (x, inds)}, axes=axes, dtype=dtype)
    return _tree(found, axes, _merged_states)


# ---- Graphs ----


def _map(
    function: Callable[..., Any], out: Indices, dtype: Any, arrays: Arrays, /, **options: Any
) -> Any:
    """A function of the chunks of arrays, as an array with the axes `out`; it may return any object.
    Axes of `arrays` that are not among `out` are in one chunk."""
    pairs = [item for of in arrays.values() for item in of]
    return da.blockwise(
        partial(_of_chunks, tuple(arrays), function, options),
        out,
        *pairs,
        dtype=dtype,
        meta=np.empty((0,) * len(out), dtype),
        align_arrays=False,
        token=function.__name__.strip("_"),
    )


def _of_chunks(
    names: tuple[str, ...], function: Callable[..., Any], options: dict[str, Any], *chunks: Any
) -> Any:
    return function(**dict(zip(names, map(_alone, chunks), strict=True)), **options)


def _alone(chunk: Any) -> Any:
    """A chunk out of the lists that dask makes along axes that an array alone has."""
    while isinstance(chunk, list):
        (chunk,) = chunk
    return chunk


def _tree(x: Any, axes: Indices, merge: Callable[[Any, Any], Any]) -> Any:
    """What the chunks of an array hold, merged over some axes."""
    if not axes:
        return x
    return da.reduction(
        x,
        _same,
        partial(_merged, merge),
        axis=axes,
        concatenate=False,
        dtype=x.dtype,
        meta=np.empty((0,) * (x.ndim - len(axes)), x.dtype),
    )


def _same(x: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
    return x


def _merged(
    merge: Callable[[Any, Any], Any],
    found: Any,
    axis: Any,
    keepdims: bool,
    computing_meta: bool = False,
) -> Any:
    return found if computing_meta else reduce(merge, _flat(found))


def _flat(found: Any) -> Iterator[Any]:
    if isinstance(found, list):
        for item in found:
            yield from _flat(item)
    else:
        yield found


def _pick(found: tuple[Any, Indices], i: int, out: Indices, dtype: Any) -> Any:
    """An array of item i of what the chunks hold."""
    return _map(_item, out, dtype, {"found": found}, i=i)


# ---- Chunks ----


def _item(found: tuple[Any, ...], i: int) -> Any:
    return found[i]


def _logsumexp(a: Array, axes: Indices, return_sign: bool, b: Any = None) -> tuple[Any, ...]:
    found = fastll.logsumexp(a, axes, b, return_sign=return_sign)
    return found if return_sign else (found,)


def _state(a: Array, axes: Indices, dtype: Any) -> LogSumExp:
    return LogSumExp(kept_shape(a.shape, axes), dtype).update(a, axes)


def _merged_states(a: LogSumExp, b: LogSumExp) -> LogSumExp:
    return copy.copy(a).merge(b)


def _value(state: LogSumExp) -> tuple[Any]:
    return (state.value,)


def _weighted(a: Array, b: Array, axes: Indices) -> Any:
    return fastll.logsumexp(a, axes, as_floats(b).reshape(b.shape), return_sign=True)


def _merged_pairs(first: tuple[Any, Any], second: tuple[Any, Any]) -> Any:
    """Logarithms of magnitudes, and signs, of sums of both."""
    values, signs = (np.stack(both) for both in zip(first, second, strict=True))
    return fastll.logsumexp(values, 0, signs, return_sign=True)


def _signed(pair: tuple[Any, Any], dtype: Any, return_sign: bool) -> tuple[Any, Any]:
    value, sign = pair
    if not return_sign:
        value = np.where(sign < 0, np.nan, value)
    return value.astype(dtype), sign.astype(dtype)


def _averaged(kept: Array | None, z_loss: float) -> tuple[float, float]:
    """The scale of a gradient, and the factor of the z-loss."""
    if kept is None:
        return 1.0, z_loss
    scale, z_loss = _backend(1).averaged(Kept(*kept.tolist()), z_loss)
    return scale, z_loss


def _backend(size: int) -> Any:
    return dispatch.choose("cross_entropy", size, HOST)


def _whole(
    logits: Array,
    options: _Options,
    return_lse: bool,
    return_grad: bool,
    scaled: bool,
    labels: Array | None = None,
    dense: Array | None = None,
    weight: Array | None = None,
    sample: Any = None,
    kept: Array | None = None,
) -> tuple[Any, ...]:
    """The losses of rows and what is asked for beside; `scaled` as a mean has them."""
    scale, z_loss = _averaged(kept, options.z_loss)
    if scaled:
        rows = kept_shape(logits.shape, (options.axis,))
        sample = parts.scaled(parts.kept_of(rows, labels, sample, options.ignore_index), scale)
    found = fastll.cross_entropy(
        logits,
        dense if labels is None else labels,  # type: ignore[arg-type]  # one of them is there
        axis=options.axis,
        weight=weight,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        z_loss=z_loss,
        softcap=options.softcap,
        sample_weight=sample,
        reduction="none",
        return_lse=return_lse,
        return_grad=return_grad,
    )
    return found if return_lse or return_grad else (found,)


def _target(options: _Options, labels: Any, dense: Any, weight: Any, classes: Array) -> parts.Target:
    first = int(classes[0]) if classes.size else 0
    if dense is not None:
        dense = np.moveaxis(dense, options.axis, -1)
    _, count, ignore_index, smoothing, _, softcap = options
    return parts.Target(labels, dense, weight, first, count, ignore_index, smoothing, softcap)


def _part(
    logits: Array,
    options: _Options,
    classes: Array,
    labels: Array | None = None,
    dense: Array | None = None,
    weight: Array | None = None,
) -> parts.Part:
    return parts.part_of(logits, options.axis, _target(options, labels, dense, weight, classes))


def _losses(
    part: parts.Part,
    options: _Options,
    labels: Array | None = None,
    sample: Any = None,
    kept: Array | None = None,
) -> Array:
    _, z_loss = _averaged(kept, options.z_loss)
    return parts.losses(part, labels, sample, options.ignore_index, z_loss)


def _lse_of_part(part: parts.Part) -> Any:
    return part.state.value


def _gradient(
    logits: Array,
    options: _Options,
    part: parts.Part,
    classes: Array,
    labels: Array | None = None,
    dense: Array | None = None,
    weight: Array | None = None,
    sample: Any = None,
    kept: Array | None = None,
) -> Array:
    scale, z_loss = _averaged(kept, options.z_loss)
    target = _target(options, labels, dense, weight, classes)
    return parts.gradient(logits, options.axis, part, target, sample, scale, z_loss)


def _all_rows(zero: Any, count: int) -> Array:
    return np.array([count, count], np.float64)


def _kept(
    options: _Options, labels: Array | None = None, weight: Array | None = None, sample: Any = None
) -> Array:
    sample = None if sample is None else as_floats(sample).reshape(sample.shape)
    weight = None if weight is None else as_floats(weight)
    checked = options.classes, options.ignore_index, weight, sample, False, "target"
    return np.array(_backend(1).weigh(labels, *checked)[1])


def _total(
    losses: Array,
    options: _Options,
    labels: Array | None = None,
    weight: Array | None = None,
    sample: Any = None,
) -> Array:
    """The sum of the losses of a chunk, and what their mean divides by."""
    kept = float(losses.size)
    if labels is not None or sample is not None:
        kept = _kept(options, labels, weight, sample)[0]
    return np.array([losses.sum(dtype=np.float64), kept])


def _reduced(total: Array, mean: bool, scaled: bool, dtype: Any) -> Any:
    loss, kept = total
    if mean and kept == 0:
        return dtype.type(np.nan)
    return dtype.type(loss / kept if mean and not scaled else loss)


def _nothing(zero: Any) -> fastll.NegativeLogLikelihood:
    return fastll.NegativeLogLikelihood()


def _accumulated(
    logits: Array,
    options: _Options,
    labels: Array | None = None,
    dense: Array | None = None,
    weight: Array | None = None,
    sample: Any = None,
) -> fastll.NegativeLogLikelihood:
    return fastll.NegativeLogLikelihood().update(
        logits,
        dense if labels is None else labels,  # type: ignore[arg-type]  # one of them is there
        axis=options.axis,
        weight=weight,
        ignore_index=options.ignore_index,
        softcap=options.softcap,
        sample_weight=sample,
    )


def _accumulated_part(
    part: parts.Part,
    options: _Options,
    labels: Array | None = None,
    weight: Array | None = None,
    sample: Any = None,
) -> fastll.NegativeLogLikelihood:
    losses = parts.losses(part, labels, sample, options.ignore_index, 0.0)
    total = _total(losses, options, labels, weight, sample)
    sums = np.array([[total[0], 0.0], [total[1], 0.0]])
    found = fastll.NegativeLogLikelihood()
    found.__setstate__((sums, weight is not None or sample is not None))
    return found


def _merged_accumulators(
    a: fastll.NegativeLogLikelihood, b: fastll.NegativeLogLikelihood
) -> fastll.NegativeLogLikelihood:
    return fastll.NegativeLogLikelihood().merge(a).merge(b)


def _attribute(of: Any, name: str) -> Any:
    return getattr(of, name)
