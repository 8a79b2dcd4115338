"""Losses of rows and their gradients; those of elements are in `fastll.api.elementwise`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastll import calls, direct, dispatch
from fastll.adapted import adapted
from fastll.api import Reduction, check_reduction, integer, number
from fastll.arrays import Array
from fastll.calls import Call
from fastll.contract import Backend, Fold, Options, new
from fastll.dtypes import as_floats, kind_of, name_of


@adapted
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
    sample_weight: ArrayLike | None = None,
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
    sample_weight : array_like, optional
        One factor per row, of any sign; broadcasts to the shape of `logits` without `axis`. It
        multiplies the row's loss and gradient. A row whose weight is 0 is dropped, as by
        `ignore_index`. With "sum", these weights are the upstream gradient of a vector-Jacobian
        product, or a factor (loss scaling) that keeps a gradient in half precision from underflow.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the summed weight of the kept rows: their sample weights, times the class
        weights of labels as in PyTorch. It is NaN if that is 0. The mean of the z-loss is by sample
        weights alone. "none" gives each row's loss.
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
    first = "cross_entropy", logits, "logits"
    options = (ignore_index, label_smoothing, z_loss, softcap)
    weights, outputs = (weight, sample_weight), (return_lse, return_grad, grad_out)
    return _row_loss("any", first, target, axis, weights, options, reduction, outputs)


@adapted
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
    sample_weight: ArrayLike | None = None,
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
    first = "cross_entropy", logits, "logits"
    options = (ignore_index, label_smoothing, z_loss, softcap)
    weights, outputs = (weight, sample_weight), (return_lse, return_grad, grad_out)
    return _row_loss("sparse", first, target, axis, weights, options, reduction, outputs)


@adapted
def dense_cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: ArrayLike | None = None,
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
    first = "cross_entropy", logits, "logits"
    options = (-100, label_smoothing, z_loss, softcap)
    weights, outputs = (weight, sample_weight), (return_lse, return_grad, grad_out)
    return _row_loss("dense", first, target, axis, weights, options, reduction, outputs)


@adapted
def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Negative log-likelihood of labels or distributions under log-probabilities, with its gradient.

    For a row of C log-probabilities x, with label smoothing :math:`\epsilon`:

    .. math:: L = -\sum_j w_j u_j x_j, \quad u_j = (1 - \epsilon) t_j + \epsilon / C

    where t is the dense target, or 1 at the label and 0 elsewhere. It is `cross_entropy` of what
    `log_softmax` returns. Nothing is normalised: any numbers will do for x. For labels without
    smoothing, nothing but the entries at the labels is read.

    Parameters
    ----------
    log_probs : array_like
        As `logits` of `cross_entropy`.
    target, axis, weight, ignore_index, label_smoothing, sample_weight, reduction, return_grad, grad_out
        As for `cross_entropy`. A target or a weight of 0 contributes 0, even at a log-probability of
        -inf.

    Returns
    -------
    loss, grad
        As for `cross_entropy`; the gradient is with respect to `log_probs`, ``-w_j u_j``.

    Raises
    ------
    IndexError, TypeError, ValueError
        As for `cross_entropy`.

    References
    ----------
    `torch.nn.functional.nll_loss`, whose class axis is 1.

    Examples
    --------
    >>> from fastll import log_softmax, nll_loss
    >>> nll_loss(log_softmax([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), [0, 1], reduction="none")
    array([0.23954477, 1.09861229])
    """
    first = "nll_loss", log_probs, "log_probs"
    options = (ignore_index, label_smoothing, 0.0, None)
    weights, outputs = (weight, sample_weight), (False, return_grad, grad_out)
    return _row_loss("any", first, target, axis, weights, options, reduction, outputs)


class RowLosses(NamedTuple):
    """The losses of rows, and what was found beside them."""

    backend: Backend
    losses: Array
    kept: Any  # what a mean of them divides by, if one was asked for; see `Backend.weigh`
    lse: Array | None
    grad: Array | None


def _row_loss(
    kind: str,
    first: tuple[str, ArrayLike, str],
    target: ArrayLike,
    axis: int,
    weights: tuple[ArrayLike | None, ArrayLike | None],
    options: tuple[int, float, float, float | None],
    reduction: str,
    outputs: tuple[bool, bool, Any],
    temperature: float = 1.0,
) -> Any:
    """A loss of rows and their targets; see `losses_of_rows`."""
    operation, x, _ = first
    if weights[0] is None and weights[1] is None:
        inputs = x, target
        done = direct.loss(operation, kind, inputs, axis, options, temperature, reduction, outputs)
        if done is not None:
            return done
    call = Call(*first)
    found = losses_of_rows(
        kind, call, target, axis, weights, options, reduction, outputs, temperature=temperature
    )
    loss = found.losses
    if reduction != "none":
        loss = found.backend.total(loss, found.kept, call.compute)
    return call.results(loss, found.lse, found.grad, *outputs[1:])


class RowArguments(NamedTuple):
    """What a loss of rows is made of, checked."""

    axis: int
    rows: tuple[int, ...]
    dense: Array | None
    labels: Array | None
    weight: Array | None
    sample: Array | None
    options: Options  # but for `scale` and the temperature


def arguments_of_rows(
    kind: str,
    call: Call,
    target: ArrayLike,
    axis: int,
    weights: tuple[ArrayLike | None, ArrayLike | None],
    options: tuple[int, float, float, float | None],
    reduction: str,
    name: str = "target",
) -> RowArguments:
    """Check the arguments of `losses_of_rows`; whether a label is out of range is not checked."""
    axis, rows = call.rows(axis)
    dense, labels = target_of(call, kind, target, rows, name)
    weight = None if weights[0] is None else class_weight_of(call, weights[0], call.x.shape[axis])
    sample = call.sample_weight(weights[1], rows)
    check_reduction(reduction)
    ignore_index, smoothing, z_loss, softcap = check_options(options, dense is not None)
    scalars = new(Options, (ignore_index, smoothing, z_loss, softcap or 0.0, 1.0, 1.0))
    return new(RowArguments, (axis, rows, dense, labels, weight, sample, scalars))


def losses_of_rows(
    kind: str,
    call: Call,
    target: ArrayLike,
    axis: int,
    weights: tuple[ArrayLike | None, ArrayLike | None],
    options: tuple[int, float, float, float | None],
    reduction: str,
    outputs: tuple[bool, bool, Any],
    name: str = "target",
    temperature: float = 1.0,
) -> RowLosses:
    """The losses of a call's rows, and the gradient of what the reduction makes of them.

    `kind` is "sparse", "dense" or "any" of the two, `name` what the target is called; `weights` are
    those of classes and samples, `options` ignore_index, label_smoothing, z_loss and softcap, `outputs`
    return_lse, return_grad and grad_out.
    """
    taken = arguments_of_rows(kind, call, target, axis, weights, options, reduction, name)
    axis, rows, dense, labels, weight, sample, scalars = taken
    ignore_index, smoothing, z_loss, cap, *_ = scalars
    return_lse, return_grad, grad_out = outputs
    grad = None
    if return_grad or grad_out is not None:
        grad = call.output(grad_out, "grad_out", (dense, labels, weight, sample))

    x, mean = call.x, reduction == "mean"
    backend, place, compute = call.backend, call.place, call.compute
    kept, scale = None, 1.0
    if labels is not None:
        check, weighed = dispatch.debugging_labels(), sample if mean else None
        labels, kept = backend.weigh(labels, x.shape[axis], ignore_index, weight, weighed, check, name)
    elif mean:
        kept = calls.weight_of(backend, rows, sample)
    if mean:
        scale, z_loss = backend.averaged(kept, z_loss)
    losses = (place.empty if reduction == "none" else place.scratch)(rows, compute)
    lse = place.empty(rows, compute) if return_lse else None
    scalars = new(Options, (ignore_index, smoothing, z_loss, cap, scale, 1 / temperature))
    operands = call.operation, x, dense, labels, weight, sample, scalars
    calls.fold(backend, place, new(Fold, (*operands, None, losses, lse, None, None, grad)), (axis,))
    return RowLosses(backend, losses, kept if mean else None, lse, grad)


def check_options(
    options: tuple[int, float, float, float | None], dense: bool
) -> tuple[int, float, float, float | None]:
    """The options of `losses_of_rows` as numbers, for a target that is `dense` or not."""
    ignore_index, smoothing, z_loss, softcap = options
    ignore_index = integer(ignore_index, "ignore_index")
    if dense and ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}; a dense target has no labels to ignore")
    smoothing = number(smoothing, "label_smoothing", 0.0, 1.0)
    z_loss = number(z_loss, "z_loss", 0.0)
    if softcap is not None:
        softcap = number(softcap, "softcap", 0.0, above=True)
    return ignore_index, smoothing, z_loss, softcap


def target_of(
    call: Call, kind: str, target: ArrayLike, rows: tuple[int, ...], name: str
) -> tuple[Array | None, Array | None]:
    """A target as a dense one, or as labels; `kind` is as for `losses_of_rows`."""
    t = call.place.take(target, name)
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
                f"{name} has dtype {name_of(t.dtype)} and one entry per row; labels must be integers "
                f"(a dense target has the shape of {call.name}, {shape})"
            )
        raise ValueError(f"{name} has shape {t.shape}; expected that of {call.name}, {shape}")
    if t.dtype.kind not in "iu":
        expected = "integers (labels)" + " or floats (a dense target)" * (kind == "any")
        raise TypeError(f"{name} has dtype {name_of(t.dtype)}; expected {expected}")
    if t.shape != rows:
        fitting = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == t.shape]
        hint = f"; axis={fitting[0]} would fit" if len(fitting) == 1 else ""
        raise ValueError(
            f"{name} has shape {t.shape}; expected that of {call.name} without axis, {rows}{hint}"
        )
    return None, t


def class_weight_of(call: Call, weight: ArrayLike, classes: int) -> Array:
    """One weight per class; on the CPU contiguous and in the compute dtype."""
    w = call.place.take(weight, "weight")
    if w.shape != (classes,):
        raise ValueError(f"weight has shape {w.shape}; expected one weight per class, ({classes},)")
    return as_floats(w, call.compute) if call.place.on_cpu else w
