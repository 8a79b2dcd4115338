"""Element-wise losses and their gradients."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import ArrayLike

from fastll import direct
from fastll.adapted import adapted
from fastll.api import Reduction, number
from fastll.api.formula import elementwise_loss
from fastll.arrays import Array, broadcast
from fastll.calls import Call
from fastll.formulas import elements

#: What is called below, once arguments are those of a formula.
_LOGITS = elementwise_loss(elements.binary_cross_entropy_with_logits)
_LOGITS_POS_WEIGHT = elementwise_loss(elements.binary_cross_entropy_with_logits_pos_weight)
_PROBS = elementwise_loss(elements.binary_cross_entropy)
_GAUSSIAN = elementwise_loss(elements.gaussian_nll)
_MSE = elementwise_loss(elements.mse)
#: PyTorch's `kl_div`, which `fastll.interop.torch` has.
_KL_DIV = elementwise_loss(elements.kl_div)
_KL_DIV_LOG_TARGET = elementwise_loss(elements.kl_div_log_target)
_FOCAL = elementwise_loss(elements.sigmoid_focal_loss)
#: By `log_input` and `full`.
_POISSON = {
    (True, False): elementwise_loss(elements.poisson_nll),
    (True, True): elementwise_loss(elements.poisson_nll_full),
    (False, False): elementwise_loss(elements.poisson_nll_of_rate),
    (False, True): elementwise_loss(elements.poisson_nll_of_rate_full),
}


@adapted
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

    For a logit x with target t, weight w and weight p of the positive class:

    .. math::

        L = w \left( p\,t\,\operatorname{softplus}(-x) + (1 - t) \operatorname{softplus}(x) \right),
        \quad \operatorname{softplus}(x) = \max(x, 0) + \operatorname{log1p}(\exp(-|x|))

    All summands are non-negative: a loss near zero keeps its digits.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Probabilities of the positive class, or bools or integers 0 and 1, with the shape of `logits`;
        not checked.
    weight : array_like, optional
        Factor of each element's loss; broadcasts to `logits`.
    pos_weight : array_like, optional
        Factor of the positive part of the loss; broadcasts to `logits`.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements, NaN if there are none; "none" gives each one's loss.
    return_grad, grad_out
        As for `cross_entropy`, like the errors.

    Returns
    -------
    loss, grad
        As for `cross_entropy`.

    References
    ----------
    `torch.nn.functional.binary_cross_entropy_with_logits`.

    Examples
    --------
    >>> from fastll import binary_cross_entropy_with_logits
    >>> binary_cross_entropy_with_logits([0.0, 40.0], [0, 1], reduction="none")
    array([6.93147181e-01, 4.24835426e-18])
    """
    loss = _LOGITS if pos_weight is None else _LOGITS_POS_WEIGHT
    options = reduction, return_grad, grad_out
    if weight is None:
        inputs = (logits, target) if pos_weight is None else (logits, target, pos_weight)
        if (found := direct.elementwise(loss.operation, inputs, (), options)) is not None:
            return found
    call = loss.begin(logits, "logits")
    t = _same_shape(call, target, "logits")
    others = (t,) if pos_weight is None else (t, call.take(pos_weight, "pos_weight"))
    return loss.finish(call, others, (), weight, *options)


@adapted
def binary_cross_entropy(
    probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Binary cross-entropy of probabilities, with its gradient.

    For a probability p with target t and weight w, as in PyTorch:

    .. math::

        L = -w \left( t \max(\log p, -100) + (1 - t) \max(\log(1 - p), -100) \right), \quad
        \frac{\partial L}{\partial p} = w \frac{p - t}{\max(p (1 - p), 10^{-12})}

    ``log(1 - p)`` keeps its digits for a small p. Near 1, p itself has none of them left: prefer
    `binary_cross_entropy_with_logits`.

    Parameters
    ----------
    probs : array_like
        Probabilities of the positive class, in [0, 1]; any shape and strides; float16, bfloat16,
        float32, float64; integers and bools as float64. A NaN has the loss NaN.
    target : array_like
        As for `binary_cross_entropy_with_logits`, with the shape of `probs`.
    weight : array_like, optional
        Factor of each element's loss; broadcasts to `probs`.
    reduction
        As for `binary_cross_entropy_with_logits`.
    return_grad, grad_out
        As for `cross_entropy`, with respect to `probs`.

    Returns
    -------
    loss, grad
        As for `cross_entropy`.

    Raises
    ------
    ValueError
        If a probability is outside [0, 1] (on a GPU its loss and gradient are NaN instead).
    TypeError, ValueError
        As for `cross_entropy`.

    References
    ----------
    `torch.nn.functional.binary_cross_entropy`.

    Examples
    --------
    >>> from fastll import binary_cross_entropy
    >>> binary_cross_entropy([0.5, 1e-20, 0.0], [1, 0, 1], reduction="none")
    array([6.93147181e-01, 1.00000000e-20, 1.00000000e+02])
    """
    options = reduction, return_grad, grad_out
    if weight is None:
        inputs, domain = (probs, target), (0, 0.0, 1.0)
        if (found := direct.elementwise(_PROBS.operation, inputs, (), options, domain)) is not None:
            return found
    call = _PROBS.begin(probs, "probs")
    t = _same_shape(call, target, "probs")
    call.check_domain(call.x, "probs", 0.0, 1.0)
    return _PROBS.finish(call, (t,), (), weight, *options)


@adapted
def gaussian_nll(
    mean: ArrayLike,
    target: ArrayLike,
    var: ArrayLike,
    *,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Negative log-likelihood of normal distributions, with its gradient.

    For a target t under the mean :math:`\mu` and the variance :math:`v = \max(var, \epsilon)`:

    .. math:: L = \tfrac12 \left( \frac{(\mu - t)^2}{v} + \log v \right),
              \quad \frac{\partial L}{\partial \mu} = \frac{\mu - t}{v}

    Parameters
    ----------
    mean : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Any real dtype; broadcasts to `mean`.
    var : array_like
        Variances, at least 0, of any real dtype. Without the last axis of `mean`, one per row, as in
        PyTorch; otherwise it broadcasts to `mean`.
    full : bool
        Add the constant term, ``log(2 pi) / 2``.
    eps : float
        The least variance, at least 0: smaller ones are replaced by it.
    reduction
        As for `binary_cross_entropy_with_logits`.
    return_grad, grad_out
        As for `cross_entropy`, with respect to `mean`.

    Returns
    -------
    loss, grad
        As for `cross_entropy`.

    Raises
    ------
    ValueError
        If a variance is negative (on a GPU its loss and gradient are NaN instead).
    TypeError, ValueError
        As for `cross_entropy`.

    References
    ----------
    `torch.nn.functional.gaussian_nll_loss`; Nix and Weigend, "Estimating the mean and variance of the
    target probability distribution", ICNN 1994.

    Examples
    --------
    >>> from fastll import gaussian_nll
    >>> gaussian_nll([1.0, 2.0], [0.0, 2.0], [1.0, 4.0], reduction="none")
    array([0.5       , 0.69314718])
    """
    parameters = number(eps, "eps", 0.0), math.log(2 * math.pi) / 2 if full else 0.0
    inputs, options = (mean, target, var), (reduction, return_grad, grad_out)
    domain = 2, 0.0, math.inf
    if (
        found := direct.elementwise(_GAUSSIAN.operation, inputs, parameters, options, domain)
    ) is not None:
        return found
    call = _GAUSSIAN.begin(mean, "mean")
    t, v = call.take(target, "target"), call.place.take(var, "var")
    if 0 < v.ndim == call.x.ndim - 1 and v.shape == call.x.shape[:-1]:
        v = v[..., None]
    call.check_domain(v, "var", 0.0)
    others = t, broadcast(v, call.x.shape, "var")
    return _GAUSSIAN.finish(call, others, parameters, None, *options)


@adapted
def mse(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Squared error, with its gradient.

    For a prediction x of a target t:

    .. math:: L = (x - t)^2, \quad \frac{\partial L}{\partial x} = 2 (x - t)

    This is twice the negative log-likelihood of a normal distribution of variance 1, without its
    constant: the least mean squared error is the greatest likelihood of any fixed variance.

    Parameters
    ----------
    prediction : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        Any real dtype; broadcasts to `prediction`.
    reduction
        As for `binary_cross_entropy_with_logits`.
    return_grad, grad_out
        As for `cross_entropy`, with respect to `prediction`.

    Returns
    -------
    loss, grad
        As for `cross_entropy`, like the errors.

    References
    ----------
    `torch.nn.functional.mse_loss`.

    Examples
    --------
    >>> from fastll import mse
    >>> loss, grad = mse([1.0, 3.0], [0.0, 1.0], return_grad=True)
    >>> float(loss), grad
    (2.5, array([1., 2.]))
    """
    inputs, options = (prediction, target), (reduction, return_grad, grad_out)
    if (found := direct.elementwise(_MSE.operation, inputs, (), options)) is not None:
        return found
    call = _MSE.begin(prediction, "prediction")
    others = (call.take(target, "target"),)
    return _MSE.finish(call, others, (), None, *options)


@adapted
def poisson_nll(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Negative log-likelihood of Poisson distributions, with its gradient.

    For a count t and a prediction x, the logarithm of the rate:

    .. math:: L = e^x - t x, \quad \frac{\partial L}{\partial x} = e^x - t

    and for a prediction that is the rate itself (``log_input=False``):

    .. math:: L = x - t \log(x + \epsilon), \quad
              \frac{\partial L}{\partial x} = 1 - \frac{t}{x + \epsilon}

    A count of 0 contributes nothing but the rate, even where that is 0.

    Parameters
    ----------
    prediction : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64. A
        rate below ``-eps`` has the loss and gradient NaN.
    target : array_like
        Counts, of any real dtype; broadcasts to `prediction`; not checked.
    log_input : bool
        Whether predictions are logarithms of rates.
    full : bool
        Where t > 1 add Stirling's approximation of log(t!), ``t log t - t + log(2 pi t) / 2``.
    eps : float
        Added to a rate before its logarithm is taken; at least 0.
    reduction
        As for `binary_cross_entropy_with_logits`.
    return_grad, grad_out
        As for `cross_entropy`, with respect to `prediction`.

    Returns
    -------
    loss, grad
        As for `cross_entropy`, like the errors.

    References
    ----------
    `torch.nn.functional.poisson_nll_loss`.

    Examples
    --------
    >>> from fastll import poisson_nll
    >>> poisson_nll([0.0, 1.0], [2, 1], reduction="none")
    array([1.        , 1.71828183])
    >>> poisson_nll([0.0, 2.0], [0, 2], log_input=False, eps=0, reduction="none")
    array([0.        , 0.61370564])
    """
    loss = _POISSON[bool(log_input), bool(full)]
    eps = number(eps, "eps", 0.0)
    parameters = () if log_input else (eps,)
    inputs, options = (prediction, target), (reduction, return_grad, grad_out)
    if (found := direct.elementwise(loss.operation, inputs, parameters, options)) is not None:
        return found
    call = loss.begin(prediction, "prediction")
    others = (call.take(target, "target"),)
    return loss.finish(call, others, parameters, None, *options)


@adapted
def sigmoid_focal_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
) -> Any:
    r"""Focal loss of logits, with its gradient: binary cross-entropy with less of what is easy.

    For a logit x with target t, with ``p = sigmoid(x)`` and the binary cross-entropy CE:

    .. math::

        L = \alpha_t (1 - p_t)^\gamma \, \mathrm{CE}, \quad p_t = t p + (1 - t) (1 - p), \quad
        \alpha_t = t \alpha + (1 - t) (1 - \alpha)

    Logarithms and the power are taken of the smaller one of p and 1 - p, so that loss and gradient keep
    their digits in both tails.

    Parameters
    ----------
    logits : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    target : array_like
        As for `binary_cross_entropy_with_logits`.
    alpha : float
        Share of the positive class, at most 1; below 0 there are no factors :math:`\alpha_t`.
    gamma : float
        Exponent, at least 0; 0 gives the binary cross-entropy.
    reduction
        As for `binary_cross_entropy_with_logits`.
    return_grad, grad_out
        As for `cross_entropy`.

    Returns
    -------
    loss, grad
        As for `cross_entropy`, like the errors.

    Notes
    -----
    torchvision's default for `reduction` is "none".

    References
    ----------
    `torchvision.ops.sigmoid_focal_loss`; Lin et al., "Focal loss for dense object detection",
    arXiv 1708.02002.

    Examples
    --------
    >>> from fastll import sigmoid_focal_loss
    >>> sigmoid_focal_loss([0.0, 2.0], [1, 0], reduction="none")
    array([0.0433217 , 1.23755863])
    """
    alpha = number(alpha, "alpha", -math.inf, 1.0)
    gamma = number(gamma, "gamma", 0.0)
    parameters = _focal_parameters(alpha, gamma)
    inputs, options = (logits, target), (reduction, return_grad, grad_out)
    if (found := direct.elementwise(_FOCAL.operation, inputs, parameters, options)) is not None:
        return found
    call = _FOCAL.begin(logits, "logits")
    others = (_same_shape(call, target, "logits"),)
    return _FOCAL.finish(call, others, parameters, None, *options)


def _focal_parameters(alpha: float, gamma: float) -> tuple[float, ...]:
    """Those of the formula."""
    weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    return *weights, gamma


def _same_shape(call: Call, target: ArrayLike, name: str) -> Array:
    """A target that must have the shape of the first array, called `name`."""
    t = call.place.take(target, "target")
    if t.shape != call.x.shape:
        raise ValueError(f"target has shape {t.shape}; expected that of {name}, {call.x.shape}")
    return t
