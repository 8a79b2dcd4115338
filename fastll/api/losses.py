"""Losses of rows and their gradients; those of elements are in `fastll.api.elementwise`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastll import calls, dispatch
from fastll.api import Reduction, check_reduction, integer, number
from fastll.arrays import Array, axis_of
from fastll.calls import Call
from fastll.contract import Fold, Options, new
from fastll.dtypes import as_floats, kind_of, name_of


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

    For a row of C logits x, with ``lse = log sum_j exp(x_j)`` and label smoothing :math:`\epsilon`:

    .. math::

        L = \sum_j w_j u_j (\mathrm{lse} - x_j) + z\,\mathrm{lse}^2, \quad
        u_j = (1 - \epsilon) t_j + \epsilon / C

    where t is the dense target, or 1 at the label and 0 elsewhere. ``lse - x_j`` is computed as
    ``log1p(r) + (m - x_j)``, where m is the maximum and r the sum of the others' ``exp(x_i - m)``: a
    loss near zero keeps its digits, and a common offset of the logits costs none.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Integers: labels in [0, C), with the shape of `logits` without `axis`. Floating: one
        distribution per row, with the shape of `logits`; it need not sum to one. A target of 0
        contributes 0, even at a logit of -inf.
    axis : int
        The axis of the classes.
    weight : array_like, optional
        One factor per class, shape (C,).
    ignore_index : int
        Rows with this label have loss 0 and gradient 0 and do not count in the mean, even if their
        logits are NaN. For labels only.
    label_smoothing : float
        Share of the target that is spread evenly over all classes, in [0, 1].
    z_loss : float
        Factor of ``lse**2``, added to each row's loss; at least 0.
    softcap : float, optional
        Replaces x by ``softcap * tanh(x / softcap)`` first; positive.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the summed weight of the kept labels, as in PyTorch, or for a dense target by
        the number of rows, and is NaN if that is 0. "none" gives each row's loss.
    return_lse : bool
        Also return the log-sum-exp of each row, ignored rows included.
    return_grad : bool
        Also return the gradient of the reduced loss (with "none": of each row's own loss) with respect
        to `logits`.
    grad_out : array, optional
        Output array for the gradient, with the shape and dtype of `logits`; may be `logits` itself.
        The gradient is then computed even without `return_grad`.

    Returns
    -------
    loss, lse : array or scalar
        float64 for float64 and integer logits, float32 for all others; `lse` only if `return_lse`.
    grad : array
        Same shape and dtype as `logits`; only if `return_grad`.

    Raises
    ------
    IndexError
        If a label is outside [0, C) and is not `ignore_index`; nothing has been written by then. On a
        GPU the loss and gradient of such a row are NaN instead, unless `debug_labels` is in force.
    TypeError
        If a dtype is complex, longdouble, object or string; if `target` is of bools, or labels are
        floats; if an array is masked.
    ValueError
        If shapes or devices do not match, an option is out of range, or `grad_out` cannot be written.

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
    options = (ignore_index, label_smoothing, z_loss, softcap)
    return _cross_entropy(
        "any", logits, target, axis, weight, options, reduction, return_lse, return_grad, grad_out
    )


def sparse_cross_entropy(
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
    """`cross_entropy` for integer labels, with the same options, results and errors.

    Parameters
    ----------
    logits : array_like
        As for `cross_entropy`, like the parameters after `target`.
    target : array_like
        Integers in [0, C), with the shape of `logits` without `axis`. Other dtypes: `TypeError`.

    Returns
    -------
    loss, lse, grad
        As for `cross_entropy`.

    Examples
    --------
    >>> from fastll import sparse_cross_entropy
    >>> float(sparse_cross_entropy([[0.0, 0.0]], [1]))
    0.6931471805599453
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    return _cross_entropy(
        "sparse", logits, target, axis, weight, options, reduction, return_lse, return_grad, grad_out
    )


def dense_cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    """`cross_entropy` for one distribution per row, with the same options, results and errors.

    Parameters
    ----------
    logits : array_like
        As for `cross_entropy`, like the parameters after `target`.
    target : array_like
        Any real dtype, and the shape of `logits`. Other shapes: `ValueError`.

    Returns
    -------
    loss, lse, grad
        As for `cross_entropy`.

    Examples
    --------
    >>> from fastll import dense_cross_entropy
    >>> float(dense_cross_entropy([[0.0, 0.0]], [[0.5, 0.5]]))
    0.6931471805599453
    """
    options = (-100, label_smoothing, z_loss, softcap)
    return _cross_entropy(
        "dense", logits, target, axis, weight, options, reduction, return_lse, return_grad, grad_out
    )


def _cross_entropy(
    kind: str,
    logits: ArrayLike,
    target: ArrayLike,
    axis: int,
    weight: ArrayLike | None,
    options: tuple[int, float, float, float | None],
    reduction: str,
    return_lse: bool,
    return_grad: bool,
    grad_out: Any,
) -> Any:
    call = Call("cross_entropy", logits, "logits")
    x, place, compute = call.x, call.place, call.compute
    if x.ndim == 0:
        raise ValueError("logits has no axis of classes; expected at least one dimension")
    axis = axis_of(axis, x.ndim)
    classes, rows = x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :]
    dense, labels = _target(call, kind, target, rows)
    weights = None if weight is None else _class_weight(call, weight, classes)
    mean = check_reduction(reduction) == "mean"
    ignore_index, smoothing, z_loss, softcap = options
    ignore_index = integer(ignore_index, "ignore_index")
    if dense is not None and ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}; a dense target has no labels to ignore")
    smoothing = number(smoothing, "label_smoothing", 0.0, 1.0)
    z_loss = number(z_loss, "z_loss", 0.0)
    cap = 0.0 if softcap is None else number(softcap, "softcap", 0.0, above=True)
    grad = None
    if return_grad or grad_out is not None:
        grad = call.output(grad_out, "grad_out", (dense, labels, weights))

    backend = call.backend
    denominator: Any = float(math.prod(rows))
    if labels is not None:
        check = dispatch.debugging_labels()
        labels, denominator = backend.labels(labels, classes, ignore_index, weights, check)
    scale = backend.factor(denominator) if mean else 1.0
    each = reduction == "none"
    loss = (place.empty if each else place.scratch)(rows, compute)
    lse = place.empty(rows, compute) if return_lse else None
    scalars = new(Options, (ignore_index, smoothing, z_loss, cap, scale))
    fields = "cross_entropy", x, dense, labels, weights, scalars, None, loss, lse, None, grad
    calls.fold(backend, place, new(Fold, fields), (axis,))
    if not each:
        loss = backend.total(loss, denominator if mean else None, compute)
    return call.results(loss, lse, grad, return_grad, grad_out)


def _target(
    call: Call, kind: str, target: ArrayLike, rows: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """A target as a dense one, or as labels; `kind` is "sparse", "dense" or "any" of the two."""
    t = call.place.take(target, "target")
    if t.dtype.kind in "iu" and t.shape == rows and kind != "dense":
        return None, t
    shape = call.x.shape
    if t.size == 0 and isinstance(target, (list, tuple)) and kind != "dense":
        t = t.astype(np.int64)  # an empty list is of float64
    floating = kind_of(t.dtype).floating
    if kind == "dense" or (kind == "any" and floating):
        if t.shape == shape:
            return t, None
        if t.shape == rows and floating:
            raise TypeError(
                f"target has dtype {name_of(t.dtype)} and one entry per row; labels must be integers "
                f"(a dense target has the shape of logits, {shape})"
            )
        raise ValueError(f"target has shape {t.shape}; expected that of logits, {shape}")
    if t.dtype.kind not in "iu":
        expected = "integers (labels)" + " or floats (a dense target)" * (kind == "any")
        raise TypeError(f"target has dtype {name_of(t.dtype)}; expected {expected}")
    if t.shape != rows:
        fitting = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == t.shape]
        hint = f"; axis={fitting[0]} would fit" if len(fitting) == 1 else ""
        raise ValueError(
            f"target has shape {t.shape}; expected that of logits without axis, {rows}{hint}"
        )
    return None, t


def _class_weight(call: Call, weight: ArrayLike, classes: int) -> Array:
    """One weight per class; on the CPU contiguous and in the compute dtype."""
    w = call.place.take(weight, "weight")
    if w.shape != (classes,):
        raise ValueError(f"weight has shape {w.shape}; expected one weight per class, ({classes},)")
    return as_floats(w, call.compute) if call.place.on_cpu else w
