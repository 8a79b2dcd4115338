"""Calls by the rules of `_torch_rules` inside PyTorch's graph.

An `autograd.Function` records a call, which costs least. Where PyTorch traces (``torch.compile``), a
call is one of two operators, `fastll::value` and `fastll::slope`, of a rule's name, its tensors and its
options as numbers; where it transforms (``torch.func``), a pair of functions that know about batches.
PyTorch then reduces the values. A transformation that is traced goes by a rule's formula.
"""

# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastll import direct
from fastll.contract import LONG
from fastll.interop._torch_rules import (
    FLOATS,
    HALVES,
    RULES,
    Options,
    Rule,
    Tensor,
    Tensors,
    dtype_of,
    of_dtype,
    row_divisor,
    widened,
)

#: How fastll refuses arguments.
REFUSALS = IndexError, NotImplementedError, TypeError, ValueError

# Recording

#: Up to this many elements, a call that is recorded finds its gradient together with its value.
_AT_ONCE = LONG


#: The name of a rule, its options, the reduction, and the dtype of the result unless it is the value's.
_Call = tuple[str, Options, str, torch.dtype | None]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, known: Tensors, *tensors: Tensor) -> Tensor:
        name, options, reduction, dtype = ctx.call = call
        rule = RULES[name]
        if known:
            value = known[0]
        elif reduction != "none" and tensors[0].numel() <= _AT_ONCE:
            value, ctx.grad = rule.value(tensors, options, reduction, grad=True)
        else:
            value = rule.value(tensors, options, reduction)
        ctx.save_for_backward(*tensors, value if rule.by_result else None)
        return of_dtype(value, dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        name, options, reduction, _ = ctx.call
        *tensors, result = ctx.saved_tensors
        found = vars(ctx).pop("grad", None)  # once: whoever gets it may write to it
        nothing = [None] * (len(tensors) - 1)
        if torch.is_grad_enabled():  # for second derivatives
            value = by_formula(name, tensors, options, reduction)
            upstream = upstream.to(value.dtype)
            (grad,) = torch.autograd.grad(value, tensors[0], upstream, create_graph=True)
            return None, None, grad, *nothing
        rule = RULES[name]
        if reduction != "none" and upstream.is_cpu and upstream.item() == 1:
            if found is None:
                _, found = rule.value(tensors, options, reduction, grad=True)
            return None, None, found, *nothing
        if rule.wide:
            upstream = widened(upstream)
        if reduction == "mean":
            assert rule.divisor is not None
            upstream = upstream / rule.divisor(tensors, options)
            options = _for_mean(name, tensors, options)
        if reduction != "none":
            upstream = upstream.expand(rule.shape(tensors[0], options))
        grad = rule.slope(upstream, [result] if rule.by_result else tensors, options)
        return None, None, grad, *nothing


# PyTorch's `apply` is this one and, before it, a look at what `is_traced` tells: 2 us
_record = super(torch.autograd.Function, _Recorded).apply


def _has_two_means(name: str, tensors: Tensors, options: Options) -> bool:
    """Whether class weights count in the mean of the loss, but not in that of a z-loss."""
    return name == "cross_entropy" and options[3] != 0 and tensors[2] is not None


def _for_mean(name: str, tensors: Tensors, options: Options) -> Options:
    """With a z-loss times what its mean by the number of rows differs by from that by weights."""
    if not _has_two_means(name, tensors, options):
        return options
    x, target, _, sample = tensors
    ratio = row_divisor(tensors, options) / row_divisor((x, target, None, sample), options)
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
    shape = tensors[1].shape if rule == "selective_log_softmax" else found.shape(x, options)
    return x.new_empty(shape, dtype=widened(x).dtype if found.wide else x.dtype)


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
    name: str,
    tensors: Tensors,
    options: Options,
    reduction: str = "none",
    known: Tensors = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A call by a rule, in the graph where there is one; `known` has its value if that is known.

    The result is of `dtype` where that costs nothing more.
    """
    recorded = torch.is_grad_enabled()
    if recorded:
        for t in tensors[1:]:
            if t is not None and t.requires_grad:
                return by_formula(name, tensors, options, reduction)
    if not is_traced():
        if not (recorded and tensors[0].requires_grad):
            return known[0] if known else RULES[name].value(tensors, options, reduction)
        return _record((name, options, reduction, dtype), tuple(known), *tensors)
    if reduction == "mean" and _has_two_means(name, tensors, options):
        return by_formula(name, tensors, options, reduction)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # for which operators have no rules
            return by_formula(name, tensors, options, reduction)
        given = [t is not None for t in tensors]
        kept = [t for t in tensors if t is not None]
        # an empty list is none of floats to PyTorch
        value = torch.ops.fastll.value(name, given, kept, list(options) or [0.0])
    else:
        value = _Value.apply(name, options, *tensors)
    return _reduced(RULES[name], value, tensors, options, reduction)


def quick_loss(x: Tensor, target: Tensor, own: tuple[int, float], reduction: str) -> Tensor | None:
    """PyTorch's cross-entropy of a plain matrix and labels, about which nothing more has to be asked.

    `own` are ignore_index and label_smoothing. None declines.
    """
    if is_traced() or type(x) is not torch.Tensor or type(target) is not torch.Tensor:
        return None
    if x.dtype not in FLOATS or x.ndim != 2 or x.numel() == 0 or target.dtype is not torch.int64:
        return None
    dtype = dtype_of("cross_entropy", x) if x.dtype in HALVES else None
    if not (x.requires_grad and torch.is_grad_enabled()):
        options, outputs = (*own, 0.0, None), (False, False, None)
        loss = direct.loss("cross_entropy", "any", (x, target), -1, options, 1.0, reduction, outputs)
        return loss if loss is None else of_dtype(loss, dtype)
    call = "cross_entropy", (-1, *own, 0.0, math.nan, 1.0), reduction, dtype
    try:
        return _record(call, (), x, target, None, None)
    except REFUSALS:
        return None


def is_traced() -> bool:
    """Whether PyTorch traces or transforms: tensors may then have no memory to read."""
    return bool(torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
