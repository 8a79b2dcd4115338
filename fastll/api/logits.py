"""What language models and reinforcement learning need of logits, without their softmax in memory."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from fastll import calls, direct, dispatch
from fastll.adapted import adapted
from fastll.api import Reduction, check_reduction, number
from fastll.arrays import Array
from fastll.calls import Call
from fastll.contract import Fold, Options
from fastll.dtypes import name_of


@adapted
def selective_log_softmax(
    logits: ArrayLike,
    index: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
) -> Any:
    r"""Log-probabilities of some classes of each row, in one read of the logits.

    .. math:: \log p_k = x_k / T - \log \sum_j \exp(x_j / T)

    computed as ``(x_k / T - m) - log1p(r)``, where m is the maximum of x / T and r the sum of the
    others' ``exp(x_j / T - m)``. No log-softmax is held in memory, and both parts are at most 0.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    index : array_like
        Classes in [0, C), of any integer dtype: one per row, in the shape of `logits` without `axis`,
        or K per row, with one more axis at the end.
    axis : int
        The axis of the classes.
    temperature : float
        The logits are multiplied by its reciprocal first; positive.
    return_entropy : bool
        Also return the entropy of each row's distribution; see `entropy_from_logits`.
    return_lse : bool
        Also return the log-sum-exp of each row's x / T.

    Returns
    -------
    log_probs : array or scalar
        In the shape of `index`; float64 for float64 and integer logits, float32 for all others.
    entropy, lse : array or scalar
        One per row, of the same dtype; only if asked for.

    Raises
    ------
    IndexError
        If a class is outside [0, C). On a GPU its log-probability is NaN instead, unless `debug_labels`
        is in force.
    TypeError, ValueError
        If `index` is not of integers or has another shape; if the temperature is not positive; as for
        `cross_entropy`.

    See Also
    --------
    nll_loss, cross_entropy : with a gradient.

    References
    ----------
    The function of this name in the library TRL, for policy gradients.

    Examples
    --------
    >>> from fastll import selective_log_softmax
    >>> selective_log_softmax([[0.0, 0.0], [3.0, 0.0]], [1, 0])
    array([-0.69314718, -0.04858735])
    >>> log_probs, entropy = selective_log_softmax([[0.0, 0.0]], [[1, 0]], return_entropy=True)
    >>> log_probs, entropy
    (array([[-0.69314718, -0.69314718]]), array([0.69314718]))
    """
    call = Call("logsumexp", logits, "logits")
    axis, rows = call.rows(axis)
    i = call.place.take(index, "index")
    if i.size == 0 and isinstance(index, (list, tuple)):
        i = i.astype("int64")  # an empty list is of float64
    if i.dtype.kind not in "iu":
        raise TypeError(f"index has dtype {name_of(i.dtype)}; expected integers")
    if i.shape[: len(rows)] != rows or i.ndim > len(rows) + 1:
        raise ValueError(
            f"index has shape {i.shape}; expected that of logits without axis, {rows}, or one more axis"
        )
    options = _options(temperature)
    backend, place = call.backend, call.place
    check = dispatch.debugging_labels()
    labels, _ = backend.weigh(i, call.x.shape[axis], None, None, None, check, "index")
    assert labels is not None
    log_probs = place.empty(i.shape, call.compute)
    entropy = place.empty(rows, call.compute) if return_entropy else None
    lse = place.empty(rows, call.compute) if return_lse else None
    selected = log_probs
    if i.ndim == len(rows):
        labels, selected = labels[..., None], log_probs[..., None]
    operation = "entropy_from_logits" if return_entropy else "logsumexp"
    fold = Fold(
        operation, call.x, labels=labels, options=options, value=entropy, lse=lse, selected=selected
    )
    calls.fold(backend, place, fold, (axis,))
    results = [place.give(a) for a in (log_probs, entropy, lse) if a is not None]
    return tuple(results) if len(results) > 1 else results[0]


@adapted
def entropy_from_logits(
    logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Entropy of the softmax of logits, in nats, in one read, with its gradient.

    .. math:: H = -\sum_j p_j \log p_j = \log s + \frac1s \sum_j e^{x_j - m} (m - x_j), \quad
              s = \sum_j e^{x_j - m}, \quad m = \max_j x_j

    for :math:`p = \operatorname{softmax}(x)` and logits that have been divided by the temperature. All
    terms are non-negative: nothing cancels.

    Parameters
    ----------
    logits, axis, temperature
        As for `selective_log_softmax`.
    sample_weight, return_grad, grad_out
        As for `cross_entropy`.
    reduction : {"none", "mean", "sum"}
        "none" gives each row's entropy; "mean" divides by the number of rows, or by the sum of their
        sample weights.

    Returns
    -------
    entropy : array or scalar
        float64 for float64 and integer logits, float32 for all others. Logits of -inf contribute 0; a
        row of nothing else, or with NaN or +inf, is NaN.
    grad : array
        The gradient :math:`-p_j (\log p_j + H) / T`, in the shape and dtype of `logits`; only if
        `return_grad`.

    Raises
    ------
    TypeError, ValueError
        As for `cross_entropy`; if the temperature is not positive.

    See Also
    --------
    entropy : of probabilities.

    Examples
    --------
    >>> from fastll import entropy_from_logits
    >>> entropy_from_logits([[0.0, 0.0], [40.0, 0.0]])
    array([6.93147181e-01, 1.74182524e-16])
    """
    outputs = False, return_grad, grad_out
    return _of_rows(
        "entropy_from_logits", (logits,), axis, temperature, sample_weight, reduction, outputs
    )


@adapted
def kl_divergence_from_logits(
    logits: ArrayLike,
    target_logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Kullback-Leibler divergence of two distributions given by logits, with its gradient.

    .. math:: L = \sum_j p_j (\log p_j - \log q_j), \quad p = \operatorname{softmax}(t / T), \quad
              q = \operatorname{softmax}(x / T)

    for logits x and target logits t: the loss of distillation, without a factor :math:`T^2`. Each array
    is read once.

    Parameters
    ----------
    logits : array_like
        As for `selective_log_softmax`.
    target_logits : array_like
        Any real dtype, and the shape of `logits`.
    axis, temperature
        As for `selective_log_softmax`; the temperature is that of both.
    sample_weight, return_grad, grad_out
        As for `cross_entropy`.
    reduction : {"mean", "sum", "none"}
        As for `entropy_from_logits`.

    Returns
    -------
    loss : array or scalar
        float64 for float64 and integer logits, float32 for all others; never below 0. A p of 0
        contributes 0; a q of 0 where p is not makes it inf.
    grad : array
        The gradient :math:`(q_j - p_j) / T` with respect to `logits`, in their shape and dtype; only if
        `return_grad`.

    Raises
    ------
    TypeError, ValueError
        As for `cross_entropy`; if the temperature is not positive.

    See Also
    --------
    kl_divergence : of probabilities.

    References
    ----------
    G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531.
    `torch.nn.functional.kl_div` with ``log_target=True``, of the logarithms of both.

    Examples
    --------
    >>> from fastll import kl_divergence_from_logits
    >>> float(kl_divergence_from_logits([[0.0, 0.0]], [[1.0, 0.0]]))
    0.110944071671727
    """
    inputs, outputs = (logits, target_logits), (False, return_grad, grad_out)
    return _of_rows(
        "kl_divergence_from_logits", inputs, axis, temperature, sample_weight, reduction, outputs
    )


def _options(temperature: float) -> Options:
    return Options(inverse_temperature=1 / number(temperature, "temperature", 0.0, above=True))


def _of_rows(
    operation: str,
    inputs: tuple[ArrayLike, ...],
    axis: int,
    temperature: float,
    sample_weight: ArrayLike | None,
    reduction: str,
    outputs: tuple[bool, bool, Any],
) -> Any:
    """A value of each row of logits, or of these and those of a target, reduced, and its gradient."""
    if sample_weight is None:
        scalars = (-100, 0.0, 0.0, None), temperature
        found = direct.loss(operation, "dense", inputs, axis, *scalars, reduction, outputs)
        if found is not None:
            return found
    call = Call(operation, inputs[0], "logits")
    second = None
    if len(inputs) == 2:
        second = call.place.take(inputs[1], "target_logits")
        if second.shape != call.x.shape:
            raise ValueError(
                f"target_logits has shape {second.shape}; expected that of logits, {call.x.shape}"
            )
    axis, rows = call.rows(axis)
    sample = call.sample_weight(sample_weight, rows)
    each, mean = check_reduction(reduction) == "none", reduction == "mean"
    options = _options(temperature)
    _, return_grad, grad_out = outputs
    grad = None
    if return_grad or grad_out is not None:
        grad = call.output(grad_out, "grad_out", (second, sample))
    backend, place = call.backend, call.place
    kept = calls.weight_of(backend, rows, sample) if mean else None
    if mean:
        options = options._replace(scale=backend.averaged(kept, 0.0)[0])
    value = (place.empty if each else place.scratch)(rows, call.compute)
    fold = Fold(call.operation, call.x, second, sample=sample, options=options, value=value, out=grad)
    calls.fold(backend, place, fold, (axis,))
    result = value if each else backend.total(value, kept, call.compute)
    return call.results(result, None, grad, return_grad, grad_out)
