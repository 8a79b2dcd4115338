"""Cross-entropies and their gradients."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastll import dispatch, layout
from fastll.api import _run
from fastll.arrays import Place, axis_of, broadcast, place_of
from fastll.contract import Fold, Map, Options, units_of
from fastll.dtypes import as_floats, kind_of, name_of

Array = NDArray[Any]
Reduction = Literal["mean", "sum", "none"]

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


class DenseOptions(TypedDict, total=False):
    """The options of `dense_cross_entropy`; see `cross_entropy`."""

    axis: int
    weight: ArrayLike | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: Reduction
    return_lse: bool
    return_grad: bool
    grad_out: Array | None


class SparseOptions(DenseOptions, total=False):
    """The options of `sparse_cross_entropy`; see `cross_entropy`."""

    ignore_index: int


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Cross-entropy of logits against class labels or a distribution, with its gradient.

    Of one row of C logits x, with ``lse = log sum_j exp(x_j)`` and label smoothing :math:`\epsilon`:

    .. math::

        L = \sum_j w_j u_j (\mathrm{lse} - x_j) + z\,\mathrm{lse}^2, \quad
        u_j = (1 - \epsilon) t_j + \epsilon / C

    where t is the dense target, or 1 at the label and 0 elsewhere. (For labels, as in PyTorch, the mean
    divides by the summed weights of the labels.) ``lse - x_j`` is computed as ``log1p(r) + (m - x_j)``,
    where m is the maximum and r the sum of the others' ``exp(x_i - m)``: a loss near zero keeps its
    digits, and a common offset of the logits costs none.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Integers: labels in [0, C), in the shape of `logits` without `axis`. Floating: a distribution
        a row, in the shape of `logits`; it need not sum to one. A target of 0 contributes 0, even
        at a logit of -inf.
    axis : int
        The axis of the classes.
    weight : array_like, optional
        A factor for each class, shape (C,).
    ignore_index : int
        Rows with this label have loss 0, gradient 0, and do not count in the mean, whatever their
        logits are. For labels only.
    label_smoothing : float
        In [0, 1]: the share of the target that is spread over all classes.
    z_loss : float
        Factor of ``lse**2``, added to each row's loss; at least 0.
    softcap : float, optional
        Replaces x by ``softcap * tanh(x / softcap)`` first; positive.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the summed weight of the kept labels, or by the number of rows for a dense
        target; over nothing it is NaN. "none" gives each row's loss.
    return_lse : bool
        Also return the log-sum-exp of each row (of ignored rows too).
    return_grad : bool
        Also return the gradient of the reduced loss (with "none": of each row's own loss) with respect
        to `logits`.
    grad_out : array, optional
        Where to leave the gradient, which is then computed in any case: of the shape and dtype of
        `logits`. May be `logits` itself.

    Returns
    -------
    loss : array or scalar
        float64 for float64 and integer logits, float32 for every other.
    lse : array or scalar
        In the same dtype; only if `return_lse`.
    grad : array
        In the shape and dtype of `logits`; only if `return_grad`.

    Raises
    ------
    IndexError
        If a label is outside [0, C) and is not `ignore_index`; nothing has been written then. On a GPU
        the loss and gradient of such a row are NaN, and only `debug_labels` has it raised.
    TypeError
        If a dtype is complex, longdouble, object, string, or (of `target`) bool.
    ValueError
        If shapes or devices do not match, an option is out of its range, or `grad_out` cannot be
        written.

    Notes
    -----
    The gradient of a row is ``(W + 2 z lse) p_j - w_j u_j`` with ``W = sum_j w_j u_j`` and
    ``p_j = exp(x_j - m) / s``; at the label it is computed from ``1 - p`` without cancellation.

    References
    ----------
    `torch.nn.functional.cross_entropy`. z-loss: Chowdhery et al., "PaLM", arXiv 2204.02311; soft
    capping: Gemma Team, "Gemma 2", arXiv 2408.00118.

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import cross_entropy
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    >>> cross_entropy(logits, [0, 1], reduction="none")
    array([2.39544766e-01, 3.85749970e-22])
    >>> loss, grad = cross_entropy(logits, [0, -100], return_grad=True)
    >>> grad.round(3)
    array([[-0.213,  0.107,  0.107],
           [ 0.   ,  0.   ,  0.   ]])
    """
    place = place_of(logits)
    x = place.take(logits, "logits")
    t = _target(place, target)
    dense = kind_of(t.dtype).floating
    if dense and _integer(ignore_index, "ignore_index") >= 0:
        raise ValueError(f"ignore_index is {ignore_index}; a dense target has no labels to ignore")
    return _cross_entropy(
        place,
        x,
        t if dense else None,
        None if dense else t,
        axis=axis,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        return_lse=return_lse,
        return_grad=return_grad,
        grad_out=grad_out,
    )


def sparse_cross_entropy(logits: ArrayLike, target: ArrayLike, **options: Unpack[SparseOptions]) -> Any:
    """`cross_entropy` for a target of integer labels, with the same options.

    Parameters
    ----------
    logits : array_like
        Any shape and strides.
    target : array_like
        Integer labels in [0, C), in the shape of `logits` without `axis`.
    **options
        Those of `cross_entropy`.

    Returns
    -------
    loss, lse, grad
        As of `cross_entropy`.

    Raises
    ------
    TypeError
        If `target` is not an array of integers; else as `cross_entropy`.

    Examples
    --------
    >>> from fastll import sparse_cross_entropy
    >>> float(sparse_cross_entropy([[0.0, 0.0]], [1]))
    0.6931471805599453
    """
    place = place_of(logits)
    return _cross_entropy(place, place.take(logits, "logits"), None, _target(place, target), **options)


def dense_cross_entropy(logits: ArrayLike, target: ArrayLike, **options: Unpack[DenseOptions]) -> Any:
    """`cross_entropy` for a target that is a distribution a row, with the same options.

    Parameters
    ----------
    logits : array_like
        Any shape and strides.
    target : array_like
        In the shape of `logits`, of any real dtype.
    **options
        Those of `cross_entropy`, except `ignore_index`.

    Returns
    -------
    loss, lse, grad
        As of `cross_entropy`.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`.

    Examples
    --------
    >>> from fastll import dense_cross_entropy
    >>> float(dense_cross_entropy([[0.0, 0.0]], [[0.5, 0.5]]))
    0.6931471805599453
    """
    if "ignore_index" in options:
        raise TypeError("dense_cross_entropy() has no ignore_index: a dense target has no labels")
    place = place_of(logits)
    t = place.take(target, "target")
    return _cross_entropy(place, place.take(logits, "logits"), t, None, **options)


def _cross_entropy(
    place: Place,
    x: Array,
    dense: Array | None,
    labels: Array | None,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    if x.ndim == 0:
        raise ValueError("logits has no axis of classes; expected at least one dimension")
    axis = axis_of(axis, x.ndim)
    shape = x.shape
    classes, kept = shape[axis], shape[:axis] + shape[axis + 1 :]
    value = kind_of(x.dtype).compute
    weights = None if weight is None else _class_weight(place, weight, classes, value)
    _check_reduction(reduction)
    ignored = _integer(ignore_index, "ignore_index")
    smoothing = _number(label_smoothing, "label_smoothing", 0.0, 1.0)
    z = _number(z_loss, "z_loss", 0.0, math.inf)
    cap = 0.0 if softcap is None else _number(softcap, "softcap", 0.0, math.inf, open_below=True)
    if dense is not None and dense.shape != shape:
        raise ValueError(f"target has shape {dense.shape}; expected that of logits, {shape}")
    if labels is not None:
        labels = _labels(place, labels, kept)
    grad = None
    if return_grad or grad_out is not None:
        grad = place.result(x, grad_out, "grad_out", (dense, labels, weights))

    backend = dispatch.choose("cross_entropy", value, x.size, place)
    denominator: Any = None
    if labels is None:
        denominator = float(math.prod(kept))
    else:
        check = dispatch.debugging_labels()
        labels, denominator = backend.labels(labels, classes, ignored, weights, check)
    scale = backend.factor(denominator) if reduction == "mean" else 1.0
    options = Options(ignored, smoothing, z, cap, scale)

    loss = (place.empty if reduction == "none" else place.scratch)(kept, value)
    lse = place.empty(kept, value) if return_lse else None
    pieces, _ = layout.rows((axis,), (x, dense, grad), (labels, loss, lse))
    for x_, dense_, grad_, labels_, loss_, lse_ in pieces:
        call = Fold(
            "cross_entropy",
            x_,
            second=dense_,
            labels=labels_,
            weight=weights,
            options=options,
            value=loss_,
            lse=lse_,
            out=grad_,
        )
        _run.rows(backend, backend.fold(call), x_)
    if reduction != "none":
        loss = backend.total(loss, denominator if reduction == "mean" else None, value)
    return _outputs(place, loss, lse, grad if return_grad else None, grad_out)


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Binary cross-entropy of logits, with its gradient.

    Of one logit x with target t, weight w and weight p of the positive class:

    .. math::

        L = w \left( p\,t\,\operatorname{softplus}(-x) + (1 - t) \operatorname{softplus}(x) \right),
        \quad \operatorname{softplus}(x) = \max(x, 0) + \operatorname{log1p}(\exp(-|x|))

    All summands are non-negative: a loss near zero keeps its digits.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Probabilities of the positive class, or bools or integers 0 and 1, in the shape of `logits`.
        The values are not checked.
    weight : array_like, optional
        A factor of each element's loss; broadcasts to `logits`.
    pos_weight : array_like, optional
        A factor of the positive part of the loss; broadcasts to `logits`.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements; over nothing it is NaN. "none" gives each element's
        loss.
    return_grad : bool
        Also return the gradient of the reduced loss (with "none": of each element's own loss) with
        respect to `logits`.
    grad_out : array, optional
        Where to leave the gradient, which is then computed in any case: of the shape and dtype of
        `logits`. May be `logits` itself.

    Returns
    -------
    loss : array or scalar
        float64 for float64 and integer logits, float32 for every other.
    grad : array
        In the shape and dtype of `logits`; only if `return_grad`.

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string.
    ValueError
        If shapes or devices do not match, `reduction` is none of the three, or `grad_out` cannot be
        written.

    References
    ----------
    `torch.nn.functional.binary_cross_entropy_with_logits`.

    Examples
    --------
    >>> from fastll import binary_cross_entropy_with_logits
    >>> binary_cross_entropy_with_logits([0.0, 40.0], [0, 1], reduction="none")
    array([6.93147181e-01, 4.24835426e-18])
    """
    place = place_of(logits)
    x, t = place.take(logits, "logits"), place.take(target, "target")
    value = kind_of(x.dtype).compute
    if t.shape != x.shape:
        raise ValueError(f"target has shape {t.shape}; expected that of logits, {x.shape}")
    w = p = None
    if weight is not None:
        w = broadcast(place.take(weight, "weight"), x.shape, "weight")
    if pos_weight is not None:
        p = broadcast(place.take(pos_weight, "pos_weight"), x.shape, "pos_weight")
    _check_reduction(reduction)
    grad = None
    if return_grad or grad_out is not None:
        grad = place.result(x, grad_out, "grad_out", (t, w, p))

    backend = dispatch.choose("binary_cross_entropy", value, x.size, place)
    scale = 1 / x.size if reduction == "mean" and x.size else 1.0
    loss = place.empty_like(x, value) if reduction == "none" else None
    pieces = layout.elementwise((x, t, w, p, loss, grad))
    outer, length = pieces[0][0].shape if pieces else (0, 0)
    units = units_of(length, backend.unit)
    partial = sums = None
    if loss is None:
        partial = sums = place.scratch((len(pieces) * outer, units), backend.partial_dtype or value)
    for i, (x_, t_, w_, p_, loss_, grad_) in enumerate(pieces):
        if partial is not None and len(pieces) > 1:
            sums = partial[i * outer : (i + 1) * outer]
        name = "binary_cross_entropy" if p_ is None else "binary_cross_entropy_pos_weight"
        inputs = (x_, t_) if p_ is None else (x_, t_, p_)
        call = Map(name, inputs, value=loss_, partial=sums, slope=grad_, weight=w_, scale=scale)
        backend.run(backend.map(call), outer * units, x_.size)
    if partial is not None:
        loss = backend.total(partial, float(x.size) if reduction == "mean" else None, value)
    return _outputs(place, loss, None, grad if return_grad else None, grad_out)


def _target(place: Place, target: ArrayLike) -> Array:
    """A target as an array: labels or, for a floating dtype, a dense one."""
    t = place.take(target, "target")
    if t.size == 0 and isinstance(target, (list, tuple)):
        return t.astype(np.int64)  # nothing in it says otherwise
    if t.dtype.kind == "b":
        raise TypeError("target has dtype bool; expected integers (labels) or floats (a dense target)")
    return t


def _labels(place: Place, labels: Array, shape: tuple[int, ...]) -> Array:
    """Labels in the shape of the rows; on the CPU as contiguous int64."""
    kind = labels.dtype.kind
    if kind not in "iu":
        raise TypeError(f"target has dtype {name_of(labels.dtype)}; expected integers (labels)")
    if labels.shape != shape:
        raise ValueError(
            f"target has shape {labels.shape}; expected that of logits without axis, {shape}"
        )
    return labels


def _class_weight(place: Place, weight: ArrayLike, classes: int, dtype: np.dtype[Any]) -> Array:
    """One weight a class; on the CPU contiguous and in `dtype`."""
    w = place.take(weight, "weight")
    if w.shape != (classes,):
        raise ValueError(f"weight has shape {w.shape}; expected one weight a class, ({classes},)")
    return as_floats(w, dtype) if place.on_cpu else w


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")


def _integer(value: Any, name: str) -> int:
    if type(value) is not int and (not hasattr(value, "__index__") or isinstance(value, bool)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise ValueError(f"{name} is {value}; expected an integer of 64 bits")
    return int(value)


def _number(value: Any, name: str, least: float, most: float, open_below: bool = False) -> float:
    """A finite number within bounds."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; expected a number") from None
    if not (least <= number <= most) or math.isinf(number) or (open_below and number == least):
        bounds = f"in [{least:g}, {most:g}]" if most < math.inf else "of at least 0"
        raise ValueError(
            f"{name} is {value!r}; expected a number {'above 0' if open_below else bounds}"
        )
    return number


def _outputs(place: Place, loss: Any, lse: Array | None, grad: Array | None, grad_out: Any) -> Any:
    """The loss alone, or a tuple of what there is."""
    result = place.give(loss)
    if grad is not None:
        given = place.give_array(grad) if grad_out is None else grad_out
        return (result, given) if lse is None else (result, place.give(lse), given)
    return result if lse is None else (result, place.give(lse))
