"""How fastll's functions are computed and differentiated on PyTorch's tensors: a `Rule` for each.

Value and gradient are by fastll's kernels. Beside them is a formula in PyTorch's own operations, for
second derivatives and those with respect to other arguments.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import fastll
from fastll.api import elementwise, losses

Tensor = Any  # torch.Tensor
Tensors = Sequence[Any]  # of tensors, or None for those that are not given
Options = Sequence[Any]  # numbers

_aten = torch.ops.aten

HALVES = torch.float16, torch.bfloat16
#: The dtypes that fastll computes with.
FLOATS = torch.float32, torch.float64, *HALVES

#: PyTorch's own functions, whatever `fastll.interop.torch.patch` has put in their places.
THEIRS = {
    name: getattr(torch.nn.functional, name)
    for name in (
        "cross_entropy",
        "nll_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
        "gaussian_nll_loss",
        "poisson_nll_loss",
        "softmax",
        "log_softmax",
    )
} | {"logsumexp": torch.logsumexp}


#: What autocasting computes in float32, on CPUs and on GPUs.
_WIDE_UNDER_AUTOCAST = {
    "cpu": {*THEIRS} - {"gaussian_nll_loss", "softmax", "log_softmax", "logsumexp"},
    "cuda": {*THEIRS} - {"gaussian_nll_loss", "logsumexp"},
}


def dtype_of(name: str, x: Tensor) -> torch.dtype:
    """That of the result of PyTorch's function."""
    kind = "cpu" if x.is_cpu else "cuda"
    if torch.is_autocast_enabled(kind) and name in _WIDE_UNDER_AUTOCAST[kind]:
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


class Rule(NamedTuple):
    """How a function of some tensors is computed and differentiated with respect to the first one."""

    #: value(tensors, options, reduction); where it has a divisor, ``grad=True`` adds its gradient
    value: Callable[..., Any]
    #: slope(upstream, tensors, options): the upstream gradients are those of unreduced values
    slope: Callable[[Tensor, Tensors, Options], Tensor]
    #: formula(tensors, options): unreduced values in PyTorch's own operations
    formula: Callable[[Tensors, Options], Tensor]
    #: divisor(tensors, options) of a mean
    divisor: Callable[[Tensors, Options], Any] | None = None
    rows: bool = False  # a value for each row, without the axis that is the first option
    wide: bool = True  # values of halves are of float32
    by_result: bool = False  # `slope` takes the result in place of the tensors

    def shape(self, x: Tensor, options: Options) -> Sequence[int]:
        """That of unreduced values."""
        return row_shape(x, int(options[0])) if self.rows else x.shape


def row_shape(x: Tensor, axis: int) -> list[int]:
    axis %= x.ndim
    return [*x.shape[:axis], *x.shape[axis + 1 :]]


def widened(x: Tensor) -> Tensor:
    """What values are computed in: float32 for halves."""
    return x.float() if x.dtype in HALVES else x


def of_dtype(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in a dtype, if one is given; to ask first is quicker than `Tensor.to` is."""
    return value if dtype is None or value.dtype is dtype else value.to(dtype)


# Row losses


def _is_sparse(tensors: Tensors) -> bool:
    return not tensors[1].is_floating_point()


def _row_loss(
    operation: str,
    tensors: Tensors,
    options: Options,
    reduction: str,
    upstream: Tensor = None,
    grad: bool = False,
) -> Any:
    """The value, or this and its gradient; or the latter alone, for an upstream one of each row."""
    x, target, weight, sample = tensors
    axis, ignore_index, smoothing, z_loss, softcap, temperature = options
    own = (int(ignore_index), smoothing, float(z_loss), None if math.isnan(softcap) else softcap)
    if upstream is not None:
        sample, grad = upstream if sample is None else upstream * sample, True
    first = operation, x, "logits" if operation == "cross_entropy" else "log_probs"
    weights, outputs = (weight, sample), (False, grad, None)
    found = losses._row_loss(
        "any", first, target, int(axis), weights, own, reduction, outputs, temperature
    )
    return found if upstream is None else found[1]


def _targets(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """What a row's class losses are multiplied by, and what its loss is multiplied by."""
    x, target, weight, sample = tensors
    axis, ignore_index, smoothing, *_ = options
    axis = int(axis) % x.ndim
    rows = torch.ones((), dtype=widened(x).dtype, device=x.device).expand(row_shape(x, axis))
    if sample is not None:
        rows = rows * sample
    if _is_sparse(tensors):
        kept = target != int(ignore_index)
        labels = torch.where(kept, target, 0).long().unsqueeze(axis)
        shares = torch.zeros_like(x, dtype=rows.dtype).scatter(axis, labels, 1.0)
        rows = torch.where(kept, rows, 0)
    else:
        shares = target.to(rows.dtype)
    shares = (1 - smoothing) * shares + smoothing / x.shape[axis]
    if weight is not None:
        shares = shares * weight.to(rows.dtype).reshape([-1] + [1] * (x.ndim - 1 - axis))
    return shares, rows


def _cross_entropy_formula(tensors: Tensors, options: Options) -> Tensor:
    x = widened(tensors[0])
    axis, _, _, z_loss, softcap, temperature = options
    shares, rows = _targets(tensors, options)
    x = x / temperature
    if not math.isnan(softcap):
        x = softcap * torch.tanh(x / softcap)
    lse = torch.logsumexp(x, int(axis), keepdim=True)
    loss = torch.where(shares == 0, 0, shares * (lse - x)).sum(int(axis))
    loss = loss + z_loss * lse.squeeze(int(axis)) ** 2
    return torch.where(rows == 0, 0, rows * loss)


def _nll_formula(tensors: Tensors, options: Options) -> Tensor:
    x = widened(tensors[0])
    shares, rows = _targets(tensors, options)
    loss = torch.where(shares == 0, 0, -shares * x).sum(int(options[0]))
    return torch.where(rows == 0, 0, rows * loss)


def row_divisor(tensors: Tensors, options: Options) -> Any:
    """The summed weight of the kept rows."""
    x, target, weight, sample = tensors
    rows = torch.ones((), dtype=torch.float64, device=x.device)
    rows = rows.expand(row_shape(x, int(options[0]))) if sample is None else sample.double()
    if _is_sparse(tensors):
        kept = target != int(options[1])
        rows = torch.where(kept, rows, 0)
        if weight is not None:
            rows = rows * weight.double()[torch.where(kept, target, 0).long()]
    return rows.expand(row_shape(x, int(options[0]))).sum()


def _selected(tensors: Tensors, options: Options, reduction: str) -> Tensor:
    axis, temperature = options
    own = {"axis": int(axis), "temperature": temperature}
    return fastll.selective_log_softmax(*tensors, **own)


def _selected_slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
    """That of a log-probability is minus that of the cross-entropy."""
    logits, index = tensors
    axis, temperature = options
    if index.ndim < logits.ndim:
        own = (axis, -1, 0.0, 0.0, math.nan, temperature)
        return _row_loss("cross_entropy", (logits, index, None, None), own, "sum", -upstream)
    grad = torch.softmax(widened(logits) / temperature, int(axis))
    grad *= -upstream.sum(-1).unsqueeze(int(axis))
    grad.scatter_add_(int(axis), index.long().movedim(-1, int(axis)), upstream.movedim(-1, int(axis)))
    return (grad / temperature).to(logits.dtype)


def _selected_formula(tensors: Tensors, options: Options) -> Tensor:
    logits, index = tensors
    axis, temperature = int(options[0]), options[1]
    log_p = torch.log_softmax(widened(logits) / temperature, axis)
    if index.ndim < logits.ndim:
        return log_p.gather(axis, index.long().unsqueeze(axis)).squeeze(axis)
    return log_p.gather(axis, index.long().movedim(-1, axis)).movedim(axis, -1)


def _of_logits(function: Callable[..., Any], formula: Callable[..., Tensor]) -> Rule:
    """The rule of a function of one or two arrays of logits, an axis and a temperature."""

    def call(tensors: Tensors, options: Options, sample: Tensor, reduction: str, grad: bool) -> Any:
        axis, temperature = options
        own = {"axis": int(axis), "temperature": temperature, "sample_weight": sample}
        return function(*tensors[:-1], **own, reduction=reduction, return_grad=grad)

    def value(tensors: Tensors, options: Options, reduction: str, grad: bool = False) -> Any:
        return call(tensors, options, tensors[-1], reduction, grad)

    def slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
        sample = upstream if tensors[-1] is None else upstream * tensors[-1]
        return call(tensors, options, sample, "sum", True)[1]

    def weighted(tensors: Tensors, options: Options) -> Tensor:
        axis, temperature = int(options[0]), options[1]
        rows = formula(axis, *(torch.log_softmax(widened(x) / temperature, axis) for x in tensors[:-1]))
        return rows if tensors[-1] is None else torch.where(tensors[-1] == 0, 0, rows * tensors[-1])

    def divisor(tensors: Tensors, options: Options) -> Any:
        rows = row_shape(tensors[0], int(options[0]))
        return math.prod(rows) if tensors[-1] is None else tensors[-1].expand(rows).sum()

    return Rule(value, slope, weighted, divisor, rows=True)


def _entropy(axis: int, log_p: Tensor) -> Tensor:
    return -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0).sum(axis)


def _divergence(axis: int, log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum(axis)


# Losses of elements


def _elements(
    function: Callable[..., Any],
    loss: Callable[[Tensors, Options], tuple[Callable[..., Any], Tensors, dict[str, float]]],
    named: Callable[[Tensors, Options], dict[str, Any]],
    formula: Callable[..., Tensor],
    weighted: bool = False,
    count: int = 2,
) -> Rule:
    """The rule of an element-wise loss: as a public function of `count` tensors, and as the loss of a
    formula with operands and parameters. If it is weighted, the last tensor is the weight."""

    def value(tensors: Tensors, options: Options, reduction: str, grad: bool = False) -> Any:
        own = named(tensors, options)
        return function(*tensors[:count], **own, reduction=reduction, return_grad=grad)

    def slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
        if weighted and tensors[-1] is not None:
            upstream = upstream * tensors[-1]
        of_formula, operands, parameters = loss(tensors, options)
        own = parameters | {"weight": upstream.expand(tensors[0].shape), "reduction": "sum"}
        return of_formula(*operands, **own, return_grad=True)[1]

    def divisor(tensors: Tensors, options: Options) -> Any:
        return tensors[0].numel()

    def by_torch(tensors: Tensors, options: Options) -> Tensor:
        return formula([t if t is None else widened(t) for t in tensors], options)

    return Rule(value, slope, by_torch, divisor)


def _with_logits(tensors: Tensors, options: Options) -> Any:
    if tensors[2] is None:
        return elementwise._LOGITS, tensors[:2], {}
    return elementwise._LOGITS_POS_WEIGHT, tensors[:3], {}


def _bce_formula(function: Callable[..., Tensor], tensors: Tensors, **options: Any) -> Tensor:
    x, target, *_, weight = tensors
    return function(x, target.to(x.dtype), weight, reduction="none", **options)


def _variances(tensors: Tensors) -> Tensors:
    """With one per row as the public function takes it."""
    mean, target, var = tensors
    per_row = 0 < var.ndim == mean.ndim - 1 and var.shape == mean.shape[:-1]
    return mean, target, var.unsqueeze(-1) if per_row else var


def _poisson(tensors: Tensors, options: Options) -> Any:
    log_input, full, eps = options
    return elementwise._POISSON[bool(log_input), bool(full)], tensors, {} if log_input else {"eps": eps}


def _focal(tensors: Tensors, options: Options) -> Any:
    names = "positive_weight", "negative_weight", "gamma"
    parameters = elementwise._focal_parameters(*options)
    return elementwise._FOCAL, tensors, dict(zip(names, parameters, strict=True))


def _focal_formula(tensors: Tensors, options: Options) -> Tensor:
    x, target = tensors
    alpha, gamma = options
    target = target.to(x.dtype)
    loss = THEIRS["binary_cross_entropy_with_logits"](x, target, reduction="none")
    p = torch.sigmoid(x)
    loss = loss * (p * (1 - target) + (1 - p) * target) ** gamma
    return loss if alpha < 0 else loss * (alpha * target + (1 - alpha) * (1 - target))


def _poisson_formula(tensors: Tensors, options: Options) -> Tensor:
    log_input, full, eps = options
    own = {"log_input": bool(log_input), "full": bool(full), "eps": eps}
    return THEIRS["poisson_nll_loss"](*tensors, **own, reduction="none")


def _kl_div(
    tensors: Tensors, options: Options, reduction: str, upstream: Tensor = None, grad: bool = False
) -> Any:
    loss = elementwise._KL_DIV_LOG_TARGET if options[0] else elementwise._KL_DIV
    found = loss(
        *tensors, weight=upstream, reduction=reduction, return_grad=grad or upstream is not None
    )
    return found if upstream is None else found[1]


# Folds and maps without a reduction


def _lse_slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
    axis = int(options[0])
    grad = fastll.softmax(tensors[0], axis)
    return grad.mul_(upstream.unsqueeze(axis))


def _softmax_slope(backward: Any) -> Callable[..., Tensor]:
    def slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
        result = tensors[0]
        return backward(upstream.to(result.dtype), result, int(options[0]), result.dtype)

    return slope


def _along(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def value(tensors: Tensors, options: Options, reduction: str) -> Tensor:
        return function(tensors[0], int(options[0]))

    return value


def _log_sigmoid_slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
    return fastll.sigmoid(-tensors[0]).mul_(upstream)


RULES = {
    "cross_entropy": Rule(
        lambda t, o, reduction, grad=False: _row_loss("cross_entropy", t, o, reduction, grad=grad),
        lambda u, t, o: _row_loss("cross_entropy", t, o, "sum", u),
        _cross_entropy_formula,
        row_divisor,
        rows=True,
    ),
    "nll_loss": Rule(
        lambda t, o, reduction, grad=False: _row_loss("nll_loss", t, o, reduction, grad=grad),
        lambda u, t, o: _row_loss("nll_loss", t, o, "sum", u),
        _nll_formula,
        row_divisor,
        rows=True,
    ),
    "selective_log_softmax": Rule(_selected, _selected_slope, _selected_formula, rows=True),
    "entropy_from_logits": _of_logits(fastll.entropy_from_logits, _entropy),
    "kl_divergence_from_logits": _of_logits(fastll.kl_divergence_from_logits, _divergence),
    "binary_cross_entropy_with_logits": _elements(
        fastll.binary_cross_entropy_with_logits,
        _with_logits,
        lambda t, o: {"pos_weight": t[2], "weight": t[3]},
        lambda t, o: _bce_formula(THEIRS["binary_cross_entropy_with_logits"], t, pos_weight=t[2]),
        weighted=True,
    ),
    "binary_cross_entropy": _elements(
        fastll.binary_cross_entropy,
        lambda t, o: (elementwise._PROBS, t[:2], {}),
        lambda t, o: {"weight": t[2]},
        lambda t, o: _bce_formula(THEIRS["binary_cross_entropy"], t),
        weighted=True,
    ),
    "gaussian_nll": _elements(
        fastll.gaussian_nll,
        lambda t, o: (
            elementwise._GAUSSIAN,
            _variances(t),
            {"constant": math.log(2 * math.pi) / 2 if o[0] else 0.0, "least": o[1]},
        ),
        lambda t, o: {"full": bool(o[0]), "eps": o[1]},
        lambda t, o: THEIRS["gaussian_nll_loss"](
            *_variances(t), full=bool(o[0]), eps=o[1], reduction="none"
        ),
        count=3,
    ),
    "mse": _elements(
        fastll.mse,
        lambda t, o: (elementwise._MSE, t, {}),
        lambda t, o: {},
        lambda t, o: (t[0] - t[1]) ** 2,
    ),
    "poisson_nll": _elements(
        fastll.poisson_nll,
        _poisson,
        lambda t, o: {"log_input": bool(o[0]), "full": bool(o[1]), "eps": o[2]},
        _poisson_formula,
    ),
    "sigmoid_focal_loss": _elements(
        fastll.sigmoid_focal_loss,
        _focal,
        lambda t, o: {"alpha": o[0], "gamma": o[1]},
        _focal_formula,
    ),
    "kl_div": Rule(
        lambda t, o, reduction, grad=False: _kl_div(t, o, reduction, grad=grad),
        lambda u, t, o: _kl_div(t, o, "sum", u),
        lambda t, o: THEIRS["kl_div"](*t, reduction="none", log_target=bool(o[0])),
        lambda t, o: t[0].numel(),
    ),
    "logsumexp": Rule(
        _along(fastll.logsumexp),
        _lse_slope,
        lambda t, o: torch.logsumexp(widened(t[0]), int(o[0])),
        rows=True,
    ),
    "softmax": Rule(
        _along(fastll.softmax),
        _softmax_slope(_aten._softmax_backward_data),
        lambda t, o: torch.softmax(t[0], int(o[0])),
        wide=False,
        by_result=True,
    ),
    "log_softmax": Rule(
        _along(fastll.log_softmax),
        _softmax_slope(_aten._log_softmax_backward_data),
        lambda t, o: torch.log_softmax(t[0], int(o[0])),
        wide=False,
        by_result=True,
    ),
    "sigmoid": Rule(
        lambda t, o, reduction: fastll.sigmoid(t[0]),
        lambda u, t, o: _aten.sigmoid_backward(u, t[0]),
        lambda t, o: torch.sigmoid(t[0]),
        wide=False,
        by_result=True,
    ),
    "log_sigmoid": Rule(
        lambda t, o, reduction: fastll.log_sigmoid(t[0]),
        _log_sigmoid_slope,
        lambda t, o: torch.nn.functional.logsigmoid(t[0]),
        wide=False,
    ),
}
