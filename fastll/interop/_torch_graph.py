"""fastll's functions inside PyTorch's graph: what `fastll.interop.torch` and `fastll.adapted` go by.

Each has a `Rule`: its value, and its gradient for an upstream gradient of each value, both by fastll's
kernels; and a formula in PyTorch's own operations, for second derivatives and those with respect to
other arguments. A call is recorded by an `autograd.Function`, which costs least. Where PyTorch traces
or batches instead (``torch.compile``, ``torch.func``), it is one of two operators, `fastll::value` and
`fastll::slope`, of a rule's name, its tensors and its options as numbers; then PyTorch reduces.
"""

# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import fastll
from fastll.api import elementwise, losses

Tensor = Any  # torch.Tensor
Tensors = Sequence[Any]  # of tensors, or None for those that are not given
Options = Sequence[float]

_aten = torch.ops.aten


class Rule(NamedTuple):
    """How a function of some tensors is computed and differentiated with respect to the first one."""

    #: value(tensors, options, reduction)
    value: Callable[[Tensors, Options, str], Tensor]
    #: slope(upstream, tensors, options): the upstream gradients are those of unreduced values
    slope: Callable[[Tensor, Tensors, Options], Tensor]
    #: formula(tensors, options): unreduced values in PyTorch's own operations
    formula: Callable[[Tensors, Options], Tensor]
    #: divisor(tensors, options) of a mean
    divisor: Callable[[Tensors, Options], Any] | None = None
    rows: bool = False  # a value for each row, without the axis that is the first option
    wide: bool = True  # values of halves are of float32
    by_result: bool = False  # `slope` takes the result in place of the tensors


def _row_shape(x: Tensor, axis: int) -> list[int]:
    axis %= x.ndim
    return [*x.shape[:axis], *x.shape[axis + 1 :]]


def _widened(x: Tensor) -> Tensor:
    """What values are computed in: float32 for halves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Row losses


def _is_sparse(tensors: Tensors) -> bool:
    return not tensors[1].is_floating_point()


def _row_loss(
    operation: str, tensors: Tensors, options: Options, reduction: str, upstream: Tensor = None
) -> Any:
    """The value; or the gradient, where there is an upstream one for each row."""
    x, target, weight, sample = tensors
    axis, ignore_index, smoothing, z_loss, softcap, temperature = options
    own = (int(ignore_index), smoothing, float(z_loss), None if math.isnan(softcap) else softcap)
    outputs = (False, upstream is not None, None)
    if upstream is not None:
        sample = upstream if sample is None else upstream * sample
    name = "logits" if operation == "cross_entropy" else "log_probs"
    found = losses._row_loss(
        "any",
        (operation, x, name),
        target,
        int(axis),
        (weight, sample),
        own,
        reduction,
        outputs,
        temperature,
    )
    return found if upstream is None else found[1]


def _targets(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """What a row's class losses are multiplied by, and what its loss is multiplied by."""
    x, target, weight, sample = tensors
    axis, ignore_index, smoothing, *_ = options
    axis = int(axis) % x.ndim
    rows = torch.ones((), dtype=_widened(x).dtype, device=x.device).expand(_row_shape(x, axis))
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
    x = _widened(tensors[0])
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
    x = _widened(tensors[0])
    shares, rows = _targets(tensors, options)
    loss = torch.where(shares == 0, 0, -shares * x).sum(int(options[0]))
    return torch.where(rows == 0, 0, rows * loss)


def _row_divisor(tensors: Tensors, options: Options) -> Any:
    """The summed weight of the kept rows."""
    x, target, weight, sample = tensors
    rows = torch.ones((), dtype=torch.float64, device=x.device)
    rows = rows.expand(_row_shape(x, int(options[0]))) if sample is None else sample.double()
    if _is_sparse(tensors):
        kept = target != int(options[1])
        rows = torch.where(kept, rows, 0)
        if weight is not None:
            rows = rows * weight.double()[torch.where(kept, target, 0).long()]
    return rows.expand(_row_shape(x, int(options[0]))).sum()


def _selected(tensors: Tensors, options: Options, reduction: str) -> Tensor:
    axis, temperature = options
    return fastll.selective_log_softmax(*tensors, axis=int(axis), temperature=temperature)


def _selected_slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
    """That of a log-probability is minus that of the cross-entropy."""
    logits, index = tensors
    axis, temperature = options
    if index.ndim < logits.ndim:
        own = (axis, -1, 0.0, 0.0, math.nan, temperature)
        return _row_loss("cross_entropy", (logits, index, None, None), own, "sum", -upstream)
    grad = torch.softmax(_widened(logits) / temperature, int(axis))
    grad *= -upstream.sum(-1).unsqueeze(int(axis))
    grad.scatter_add_(int(axis), index.long().movedim(-1, int(axis)), upstream.movedim(-1, int(axis)))
    return (grad / temperature).to(logits.dtype)


def _selected_formula(tensors: Tensors, options: Options) -> Tensor:
    logits, index = tensors
    axis, temperature = int(options[0]), options[1]
    log_p = torch.log_softmax(_widened(logits) / temperature, axis)
    if index.ndim < logits.ndim:
        return log_p.gather(axis, index.long().unsqueeze(axis)).squeeze(axis)
    return log_p.gather(axis, index.long().movedim(-1, axis)).movedim(axis, -1)


def _of_logits(function: Callable[..., Any], formula: Callable[..., Tensor]) -> Rule:
    """The rule of a function of one or two arrays of logits, an axis and a temperature."""

    def call(tensors: Tensors, options: Options, sample: Tensor, reduction: str, grad: bool) -> Any:
        axis, temperature = options
        own = {"axis": int(axis), "temperature": temperature, "sample_weight": sample}
        return function(*tensors[:-1], **own, reduction=reduction, return_grad=grad)

    def value(tensors: Tensors, options: Options, reduction: str) -> Tensor:
        return call(tensors, options, tensors[-1], reduction, False)

    def slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
        sample = upstream if tensors[-1] is None else upstream * tensors[-1]
        return call(tensors, options, sample, "sum", True)[1]

    def weighted(tensors: Tensors, options: Options) -> Tensor:
        axis, temperature = int(options[0]), options[1]
        rows = formula(
            axis, *(torch.log_softmax(_widened(x) / temperature, axis) for x in tensors[:-1])
        )
        return rows if tensors[-1] is None else torch.where(tensors[-1] == 0, 0, rows * tensors[-1])

    def divisor(tensors: Tensors, options: Options) -> Any:
        rows = _row_shape(tensors[0], int(options[0]))
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
) -> Rule:
    """The rule of an element-wise loss: as a public function, and as a formula's loss with operands and
    parameters. If it is weighted, the last tensor is the weight."""

    def value(tensors: Tensors, options: Options, reduction: str) -> Tensor:
        count = 3 if function is fastll.gaussian_nll else 2
        return function(*tensors[:count], **named(tensors, options), reduction=reduction)

    def slope(upstream: Tensor, tensors: Tensors, options: Options) -> Tensor:
        if weighted and tensors[-1] is not None:
            upstream = upstream * tensors[-1]
        of_formula, operands, parameters = loss(tensors, options)
        weight = upstream.expand(tensors[0].shape)
        return of_formula(*operands, **parameters, weight=weight, reduction="sum", return_grad=True)[1]

    def divisor(tensors: Tensors, options: Options) -> Any:
        return tensors[0].numel()

    def widened(tensors: Tensors, options: Options) -> Tensor:
        wide = [t if t is None else _widened(t) for t in tensors]
        return formula(wide, options)

    return Rule(value, slope, widened, divisor)


_functional = torch.nn.functional


def _with_logits(tensors: Tensors, options: Options) -> Any:
    if tensors[2] is None:
        return elementwise._LOGITS, tensors[:2], {}
    return elementwise._LOGITS_POS_WEIGHT, tensors[:3], {}


def _bce_formula(function: Callable[..., Tensor], tensors: Tensors, **options: Any) -> Tensor:
    x, target, *_, weight = tensors
    return function(x, target.to(x.dtype), weight, reduction="none", **options)


def _variances(tensors: Tensors) -> Tensors:
    mean, target, var = tensors
    return mean, target, var if var.ndim in (0, mean.ndim) else _per_row(mean, var)


def _per_row(mean: Tensor, var: Tensor) -> Tensor:
    return var.unsqueeze(-1) if var.shape == mean.shape[:-1] else var


def _poisson(tensors: Tensors, options: Options) -> Any:
    log_input, full, eps = options
    return elementwise._POISSON[bool(log_input), bool(full)], tensors, {} if log_input else {"eps": eps}


def _focal(tensors: Tensors, options: Options) -> Any:
    alpha, gamma = options
    weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    names = "positive_weight", "negative_weight", "gamma"
    return elementwise._FOCAL, tensors, dict(zip(names, (*weights, gamma), strict=True))


def _focal_formula(tensors: Tensors, options: Options) -> Tensor:
    x, target = tensors
    alpha, gamma = options
    target = target.to(x.dtype)
    loss = _functional.binary_cross_entropy_with_logits(x, target, reduction="none")
    p = torch.sigmoid(x)
    loss = loss * (p * (1 - target) + (1 - p) * target) ** gamma
    return loss if alpha < 0 else loss * (alpha * target + (1 - alpha) * (1 - target))


def _poisson_formula(tensors: Tensors, options: Options) -> Tensor:
    log_input, full, eps = options
    own = {"log_input": bool(log_input), "full": bool(full), "eps": eps}
    return _functional.poisson_nll_loss(*tensors, **own, reduction="none")


def _kl_div(tensors: Tensors, options: Options, reduction: str = "") -> Any:
    return elementwise._KL_DIV_LOG_TARGET if options[0] else elementwise._KL_DIV, tensors, {}


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
        lambda t, o, reduction: _row_loss("cross_entropy", t, o, reduction),
        lambda u, t, o: _row_loss("cross_entropy", t, o, "sum", u),
        _cross_entropy_formula,
        _row_divisor,
        rows=True,
    ),
    "nll_loss": Rule(
        lambda t, o, reduction: _row_loss("nll_loss", t, o, reduction),
        lambda u, t, o: _row_loss("nll_loss", t, o, "sum", u),
        _nll_formula,
        _row_divisor,
        rows=True,
    ),
    "selective_log_softmax": Rule(_selected, _selected_slope, _selected_formula, rows=True),
    "entropy_from_logits": _of_logits(fastll.entropy_from_logits, _entropy),
    "kl_divergence_from_logits": _of_logits(fastll.kl_divergence_from_logits, _divergence),
    "binary_cross_entropy_with_logits": _elements(
        fastll.binary_cross_entropy_with_logits,
        _with_logits,
        lambda t, o: {"pos_weight": t[2], "weight": t[3]},
        lambda t, o: _bce_formula(_functional.binary_cross_entropy_with_logits, t, pos_weight=t[2]),
        weighted=True,
    ),
    "binary_cross_entropy": _elements(
        fastll.binary_cross_entropy,
        lambda t, o: (elementwise._PROBS, t[:2], {}),
        lambda t, o: {"weight": t[2]},
        lambda t, o: _bce_formula(_functional.binary_cross_entropy, t),
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
        lambda t, o: _functional.gaussian_nll_loss(
            *_variances(t), full=bool(o[0]), eps=o[1], reduction="none"
        ),
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
        lambda t, o, reduction: _kl_div(t, o)[0](*t, reduction=reduction),
        lambda u, t, o: _kl_div(t, o)[0](*t, weight=u, reduction="sum", return_grad=True)[1],
        lambda t, o: _functional.kl_div(*t, reduction="none", log_target=bool(o[0])),
        lambda t, o: t[0].numel(),
    ),
    "logsumexp": Rule(
        _along(fastll.logsumexp),
        _lse_slope,
        lambda t, o: torch.logsumexp(_widened(t[0]), int(o[0])),
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
        lambda t, o: _functional.logsigmoid(t[0]),
        wide=False,
    ),
}


# Recording


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, options: Options, reduction: str, known: list[Tensor], *tensors: Tensor
    ) -> Tensor:
        rule = RULES[name]
        value = known[0] if known else rule.value(tensors, options, reduction)
        ctx.call = name, options, reduction
        ctx.save_for_backward(*tensors, *([value] if rule.by_result else []))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        name, options, reduction = ctx.call
        rule, tensors = RULES[name], ctx.saved_tensors
        tensors, results = (tensors[:-1], tensors[-1:]) if rule.by_result else (tensors, ())
        if torch.is_grad_enabled():  # for second derivatives
            with torch.enable_grad():
                value = by_formula(name, tensors, options, reduction)
            (grad,) = torch.autograd.grad(value, tensors[0], upstream, create_graph=True)
        else:
            if reduction == "mean":
                assert rule.divisor is not None
                upstream = upstream / rule.divisor(tensors, options)
                options = _for_mean(name, tensors, options)
            if reduction != "none":
                rows = rule.rows
                shape = _row_shape(tensors[0], int(options[0])) if rows else tensors[0].shape
                upstream = upstream.expand(shape)
            grad = rule.slope(upstream, results or tensors, options)
        return None, None, None, None, grad, *[None] * (len(tensors) - 1)


def _for_mean(name: str, tensors: Tensors, options: Options) -> Options:
    """With a z-loss times what its mean by the number of rows differs by from that by weights."""
    if name != "cross_entropy" or not options[3] or tensors[2] is None:
        return options
    x, target, _, sample = tensors
    ratio = _row_divisor(tensors, options) / _row_divisor((x, target, None, sample), options)
    return *options[:3], options[3] * ratio, *options[4:]


def by_formula(name: str, tensors: Tensors, options: Options, reduction: str) -> Tensor:
    """A call in PyTorch's own operations."""
    rule = RULES[name]
    if reduction == "mean":
        options = _for_mean(name, tensors, options)
    value = rule.formula(tensors, options)
    return _reduced(rule, value, tensors, options, reduction)


def _reduced(rule: Rule, value: Tensor, tensors: Tensors, options: Options, reduction: str) -> Tensor:
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    assert rule.divisor is not None
    return (value.sum() / rule.divisor(tensors, options)).to(value.dtype)


# Operators


def _all(given: Sequence[bool], tensors: Sequence[Tensor]) -> list[Any]:
    """Tensors with None in the places of those that are not given: no operator differentiates those."""
    rest = iter(tensors)
    return [next(rest) if one else None for one in given]


def _value(rule: str, given: Sequence[bool], tensors: Sequence[Tensor], options: Options) -> Tensor:
    with torch.no_grad():
        return RULES[rule].value(_all(given, tensors), options, "none")


def _slope(
    rule: str,
    upstream: Tensor,
    given: Sequence[bool],
    tensors: Sequence[Tensor],
    options: Options,
) -> Tensor:
    with torch.no_grad():
        return RULES[rule].slope(upstream, _all(given, tensors), options).contiguous()


def _value_of_fake(
    rule: str, given: Sequence[bool], tensors: Sequence[Tensor], options: Options
) -> Tensor:
    found, x = RULES[rule], tensors[0]
    shape = _row_shape(x, int(options[0])) if found.rows else x.shape
    if rule == "selective_log_softmax":
        shape = tensors[1].shape
    return x.new_empty(shape, dtype=_widened(x).dtype if found.wide else x.dtype)


def _slope_of_fake(
    rule: str,
    upstream: Tensor,
    given: Sequence[bool],
    tensors: Sequence[Tensor],
    options: Options,
) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


def _set_up(ctx: Any, inputs: Any, output: Tensor) -> None:
    rule, given, tensors, options = inputs
    by_result = RULES[rule].by_result
    ctx.call, ctx.count = (rule, [True] if by_result else given, options), len(tensors)
    ctx.save_for_backward(*([output] if by_result else tensors))


def _backward(ctx: Any, upstream: Tensor) -> Any:
    rule, given, options = ctx.call
    grad = torch.ops.fastll.slope(rule, upstream, given, list(ctx.saved_tensors), options)
    return None, None, [grad, *[None] * (ctx.count - 1)], None


_value_operator = torch.library.custom_op(
    "fastll::value",
    _value,
    mutates_args=(),
    schema="(str rule, bool[] given, Tensor[] tensors, float[] options) -> Tensor",
)
_slope_operator = torch.library.custom_op(
    "fastll::slope",
    _slope,
    mutates_args=(),
    schema="(str rule, Tensor upstream, bool[] given, Tensor[] tensors, float[] options) -> Tensor",
)
_value_operator.register_fake(_value_of_fake)
_slope_operator.register_fake(_slope_of_fake)
_value_operator.register_autograd(_backward, setup_context=_set_up)


# Transformations


class _Value(torch.autograd.Function):
    """Unreduced values where ``torch.func`` differentiates or batches."""

    @staticmethod
    def forward(name: str, options: Options, *tensors: Tensor) -> Tensor:
        return RULES[name].value(tensors, options, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        name, options, *tensors = inputs
        ctx.call = name, options, len(tensors)
        ctx.save_for_backward(*([output] if RULES[name].by_result else tensors))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        name, options, count = ctx.call
        grad = _Slope.apply(name, options, upstream, *ctx.saved_tensors)
        return None, None, grad, *[None] * (count - 1)

    @staticmethod
    def vmap(info: Any, dims: Any, name: str, options: Options, *tensors: Tensor) -> Any:
        def call(tensors: Tensors) -> Tensor:
            return _Value.apply(name, options, *tensors)

        return _batched(call, info.batch_size, name, tensors, dims[2:], 2)


class _Slope(torch.autograd.Function):
    """Gradients there."""

    @staticmethod
    def forward(name: str, options: Options, upstream: Tensor, *tensors: Tensor) -> Tensor:
        return RULES[name].slope(upstream, tensors, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        raise NotImplementedError("torch.func takes first derivatives of fastll's functions only")

    @staticmethod
    def vmap(
        info: Any, dims: Any, name: str, options: Options, upstream: Tensor, *tensors: Tensor
    ) -> Any:
        def call(tensors: Tensors) -> Tensor:
            return _Slope.apply(name, options, *tensors)

        return _batched(call, info.batch_size, name, (upstream, *tensors), dims[2:], 3)


def _batched(
    call: Callable[[Tensors], Tensor],
    size: int,
    name: str,
    tensors: Tensors,
    dims: Sequence[int | None],
    vector: int,
) -> tuple[Tensor, int]:
    """A call for a batch, which comes first, as axes are counted from the end.

    Class weights, the tensor `vector` of some rules, have no place for it: a batch of them is a loop.
    """
    vector = vector if name in ("cross_entropy", "nll_loss") else -1
    if vector > 0 and dims[vector] is not None:
        each = [
            [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
            for i in range(size)
        ]
        return torch.stack([call(one) for one in each]), 0
    moved = [
        t if t is None or i == vector else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for i, (t, d) in enumerate(zip(tensors, dims, strict=True))
    ]
    return call(moved), 0


def run(
    name: str, tensors: Tensors, options: Options, reduction: str = "none", known: Tensors = ()
) -> Tensor:
    """A call by a rule, in the graph where there is one; `known` has its value if that is known."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[1:]):
        return by_formula(name, tensors, options, reduction)
    traced = torch.compiler.is_compiling()
    if not traced and not transforms():
        return _Recorded.apply(name, options, reduction, list(known), *tensors)
    if reduction == "mean" and name == "cross_entropy" and options[3] and tensors[2] is not None:
        return by_formula(name, tensors, options, reduction)
    if traced:
        given = [t is not None for t in tensors]
        kept = [t for t in tensors if t is not None]
        # an empty list is none of floats to PyTorch
        value = torch.ops.fastll.value(name, given, kept, list(options) or [0.0])
    else:
        value = _Value.apply(name, options, *tensors)
    return _reduced(RULES[name], value, tensors, options, reduction)


def transforms() -> bool:
    """Whether ``torch.func`` is at work: tensors may then have no memory to read."""
    return torch._C._functorch.maybe_current_level() is not None


# fastll's own signatures

_LOSSES = {"cross_entropy", "sparse_cross_entropy", "dense_cross_entropy", "nll_loss"}


def call(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A public function of fastll, of arguments that PyTorch records or traces."""
    bound = inspect.signature(getattr(fastll, function)).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    out = given.pop("out", None)
    if out is not None:
        raise RuntimeError(
            "out is given, but PyTorch records this call; expected none, or torch.no_grad()"
        )
    return _CALLS[function](given)


def _taken(given: dict[str, Any], *names: str) -> list[Tensor]:
    """Arguments as tensors on the device of the first that is one."""
    values = [given[name] for name in names]
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    return [
        v if v is None or isinstance(v, torch.Tensor) else torch.as_tensor(v, device=device)
        for v in values
    ]


def _last_axis(axis: Any, x: Tensor) -> Any:
    """An axis counted from the end, which a batch in front does not change; None for several."""
    if axis is None or isinstance(axis, (tuple, list)):
        axes = range(x.ndim) if axis is None else axis
        axis = next(iter(axes)) if len(axes) == 1 else None
    return None if axis is None else int(axis) % x.ndim - x.ndim if -x.ndim <= axis < x.ndim else axis


def _loss_of_rows(rule: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(given: dict[str, Any]) -> Any:
        x = "logits" if rule == "cross_entropy" else "log_probs"
        tensors = _taken(given, x, "target", "weight", "sample_weight")
        cap = given.get("softcap")
        axis = _last_axis(given["axis"], tensors[0])
        options = (
            axis,
            given.get("ignore_index", -100),
            given["label_smoothing"],
            given.get("z_loss", 0.0),
            math.nan if cap is None else cap,
            1.0,
        )
        lse = None
        if given.get("return_lse"):
            capped = tensors[0] if cap is None else cap * torch.tanh(_widened(tensors[0]) / cap)
            lse = run("logsumexp", (capped,), (axis,)) if cap is None else torch.logsumexp(capped, axis)
        return _with_gradient(function, rule, tensors, options, given, lse)

    return call


def _with_gradient(
    function: Callable[..., Any],
    rule: str,
    tensors: Tensors,
    options: Options,
    given: dict[str, Any],
    lse: Tensor = None,
) -> Any:
    """The loss in the graph, and the gradient beside it, if one was asked for."""
    known: list[Tensor] = []
    grad = None
    if not (torch.compiler.is_compiling() or transforms()):  # the function itself checks the arguments
        with torch.no_grad():
            own = given | ({"return_lse": False} if "return_lse" in given else {})
            found = function(**own)
        known = [found[0]] if given["return_grad"] else [found]
        grad = found[-1] if given["return_grad"] else None
    elif given["return_grad"] or given["grad_out"] is not None:
        raise NotImplementedError("return_grad and grad_out are not for calls that PyTorch traces")
    loss = run(rule, tensors, options, given["reduction"], known)
    results = [r for r in (loss, lse, grad) if r is not None]
    return tuple(results) if len(results) > 1 else loss


def _simple(rule: str, names: Sequence[str], options: Sequence[str]) -> Callable[..., Any]:
    """A function whose tensors and options, which may be numbers or bools, have these names."""

    def call(given: dict[str, Any]) -> Any:
        tensors = _taken(given, *names)
        own = [
            float(given[name]) if name != "axis" else _last_axis(given[name], tensors[0])
            for name in options
        ]
        if "reduction" in given:
            return _with_gradient(getattr(fastll, rule), rule, tensors, own, given)
        return run(rule, tensors, own)

    return call


def _fold_of(rule: str, name: str) -> Callable[..., Any]:
    """A function of an axis; of several axes, or with weights, in PyTorch's own operations."""

    def call(given: dict[str, Any]) -> Any:
        (x,) = _taken(given, name)
        axis = _last_axis(given["axis"], x)
        if axis is not None and given.get("b") is None and not given.get("return_sign"):
            result = run(rule, (x,), (axis,))
            return result.unsqueeze(axis) if given.get("keepdims") else result
        axes = tuple(range(x.ndim)) if given["axis"] is None else given["axis"]
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if rule == "logsumexp":
            return _weighted_lse(given, _widened(x), axes)
        lse = torch.logsumexp(_widened(x), axes, keepdim=True)
        log_p = x - lse
        return (log_p if rule == "log_softmax" else log_p.exp()).to(x.dtype)

    return call


def _weighted_lse(given: dict[str, Any], x: Tensor, axes: tuple[int, ...]) -> Any:
    (b,) = _taken(given | {"a": x, "b": given["b"]}, "a", "b")[1:]
    terms = x if b is None else torch.where(b == 0, -math.inf, x)
    m = terms.detach().amax(axes, keepdim=True)
    m = torch.where(m.isfinite(), m, 0)
    s = ((terms - m).exp() if b is None else (terms - m).exp() * b).sum(axes, keepdim=True)
    result = (s.abs() if given["return_sign"] else s).log() + m
    results = (result, s.sign()) if given["return_sign"] else (result,)
    if not given["keepdims"]:
        kept = [i for i in range(x.ndim) if i not in {axis % x.ndim for axis in axes}]
        results = tuple(r.reshape([r.shape[i] for i in kept]) for r in results)
    return results if given["return_sign"] else results[0]


def _of_probabilities(term: Callable[..., Tensor]) -> Callable[..., Any]:
    """A sum of terms of probabilities, in PyTorch's own operations."""

    def call(given: dict[str, Any]) -> Any:
        names = [name for name in ("p", "q") if name in given]
        base = 1.0 if given["base"] is None else math.log(given["base"])
        axis = given["axis"]
        value = term(*map(_widened, _taken(given, *names)))
        return (value.sum() if axis is None else value.sum(axis)) / base

    return call


def _selective(given: dict[str, Any]) -> Any:
    tensors = _taken(given, "logits", "index")
    options = (_last_axis(given["axis"], tensors[0]), given["temperature"])
    with torch.no_grad():
        traced = torch.compiler.is_compiling() or transforms()
        checked = None if traced else fastll.selective_log_softmax(**given)
    known = [checked[0] if isinstance(checked, tuple) else checked] if checked is not None else []
    results = [run("selective_log_softmax", tensors, options, known=known)]
    if given["return_entropy"]:
        results.append(run("entropy_from_logits", (tensors[0], None), options))
    if given["return_lse"]:
        results.append(run("logsumexp", (tensors[0] / given["temperature"],), options[:1]))
    return tuple(results) if len(results) > 1 else results[0]


def _sequences(mean: bool) -> Callable[..., Any]:
    def call(given: dict[str, Any]) -> Any:
        reduction: Any = "mean" if mean else "none"
        loss = fastll.sparse_cross_entropy(
            given["logits"], given["tokens"], ignore_index=given["ignore_index"], reduction=reduction
        )
        return loss.exp() if mean else -loss.sum(-1)

    return call


_special = torch.special

_CALLS = {
    "cross_entropy": _loss_of_rows("cross_entropy", fastll.cross_entropy),
    "sparse_cross_entropy": _loss_of_rows("cross_entropy", fastll.sparse_cross_entropy),
    "dense_cross_entropy": _loss_of_rows("cross_entropy", fastll.dense_cross_entropy),
    "nll_loss": _loss_of_rows("nll_loss", fastll.nll_loss),
    "selective_log_softmax": _selective,
    "entropy_from_logits": _simple(
        "entropy_from_logits", ("logits", "sample_weight"), ("axis", "temperature")
    ),
    "kl_divergence_from_logits": _simple(
        "kl_divergence_from_logits",
        ("logits", "target_logits", "sample_weight"),
        ("axis", "temperature"),
    ),
    "binary_cross_entropy_with_logits": _simple(
        "binary_cross_entropy_with_logits", ("logits", "target", "pos_weight", "weight"), ()
    ),
    "binary_cross_entropy": _simple("binary_cross_entropy", ("probs", "target", "weight"), ()),
    "gaussian_nll": _simple("gaussian_nll", ("mean", "target", "var"), ("full", "eps")),
    "mse": _simple("mse", ("prediction", "target"), ()),
    "poisson_nll": _simple("poisson_nll", ("prediction", "target"), ("log_input", "full", "eps")),
    "sigmoid_focal_loss": _simple("sigmoid_focal_loss", ("logits", "target"), ("alpha", "gamma")),
    "logsumexp": _fold_of("logsumexp", "a"),
    "softmax": _fold_of("softmax", "x"),
    "log_softmax": _fold_of("log_softmax", "x"),
    "sigmoid": _simple("sigmoid", ("x",), ()),
    "log_sigmoid": _simple("log_sigmoid", ("x",), ()),
    "entropy": _of_probabilities(_special.entr),
    "kl_divergence": _of_probabilities(lambda p, q: torch.where(p == 0, 0, p * (p / q).log())),
    "distribution_cross_entropy": _of_probabilities(lambda p, q: -_special.xlogy(p, q)),
    "sequence_log_likelihood": _sequences(False),
    "perplexity": _sequences(True),
}
