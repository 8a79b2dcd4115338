"""fastll by PyTorch's names and signatures, with gradients: a drop-in for `torch.nn.functional`.

    import fastll.interop.torch as F
    loss = F.cross_entropy(logits, target)          # in the graph, like PyTorch's
    with fastll.interop.torch.patch():              # existing code, without an edit
        train()

The class axis, defaults, dtypes of results and errors are PyTorch's. What fastll does not take (other
dtypes and layouts, meta tensors, legacy arguments), or what is wrong, PyTorch's own function is given.
Second derivatives, and derivatives with respect to targets and variances, are computed in PyTorch's
own operations, too. `torch.compile`, `torch.func.grad` and `vmap` see one operator for each call. A
recorded loss of up to 2**18 elements finds its gradient at once; a larger one, in the backward pass.

fastll's own functions (`fastll.cross_entropy` and the others) take part in the graph as well.
"""

# ruff: noqa: A002, E402 (PyTorch's names of arguments; its version is checked first)

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastll.interop import require

require("torch", "2.5")

import torch

from fastll import (
    entropy_from_logits,
    kl_divergence_from_logits,
    selective_log_softmax,
)
from fastll.array_libraries.torch import TENSORS
from fastll.interop._torch_graph import REFUSALS, quick_loss, run
from fastll.interop._torch_rules import FLOATS, THEIRS, Tensors, dtype_of, of_dtype

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "NLLLoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "entropy_from_logits",
    "gaussian_nll_loss",
    "kl_div",
    "kl_divergence_from_logits",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "patch",
    "poisson_nll_loss",
    "selective_log_softmax",
    "softmax",
]

Tensor = Any  # torch.Tensor


def _takes(x: Tensor, *others: Tensor) -> bool:
    """Whether fastll takes a first tensor, and others of its dtype, where they are given."""
    if not _is_plain(x) or x.dtype not in FLOATS or x.numel() == 0:
        return False
    return all(t is None or (_is_plain(t) and t.dtype is x.dtype) for t in others)


def _is_plain(x: Any) -> bool:
    """Whether it is a dense tensor on a CPU or a GPU, of no other type, such as one on many devices."""
    return (
        (type(x) in TENSORS or (torch.compiler.is_compiling() and isinstance(x, torch.Tensor)))
        and x.layout is torch.strided
        and (x.is_cpu or x.is_cuda)
    )


def _apply(
    name: str,
    given: tuple[Any, ...],
    rule: str,
    tensors: Tensors,
    options: tuple[float, ...] = (),
    reduction: str = "none",
) -> Tensor:
    """A call by its rule. What fastll refuses, PyTorch's function of that name is `given`."""
    dtype = dtype_of(name, tensors[0])
    try:
        value = run(rule, tensors, options, reduction, dtype=dtype)
    except REFUSALS:
        return THEIRS[name](*given)
    return of_dtype(value, dtype)


def _is_usual(reduction: Any, *legacy: Any) -> bool:
    return reduction in ("mean", "sum", "none") and all(argument is None for argument in legacy)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`; see `fastll.cross_entropy`.

    Parameters
    ----------
    input : Tensor
        Logits of shape (C), (N, C) or (N, C, d1, ...); float16, bfloat16, float32, float64.
    target : Tensor
        Labels (int64) in the shape of `input` without its class axis, or probabilities in its shape.
    weight, ignore_index, reduction, label_smoothing
        As for PyTorch's function.
    size_average, reduce
        Deprecated; PyTorch's own function then does the work.

    Returns
    -------
    Tensor
        Of the dtype of `input`, or of float32 under autocast.

    Examples
    --------
    >>> import torch
    >>> from fastll.interop.torch import cross_entropy
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 3]))
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.3750,  0.1250,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """
    if weight is None and size_average is None and reduce is None:
        loss = quick_loss(input, target, (ignore_index, label_smoothing), reduction)
        if loss is not None:
            return loss
    given = input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    if not (
        _is_usual(reduction, size_average, reduce)
        and _takes(input, weight)
        and input.ndim
        and _is_target(input, target)
    ):
        return THEIRS["cross_entropy"](*given)
    options = (_class_axis(input), ignore_index, label_smoothing, 0.0, math.nan, 1.0)
    tensors = input, target, weight, None
    return _apply("cross_entropy", given, "cross_entropy", tensors, options, reduction)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.nll_loss`; see `fastll.nll_loss`, and `cross_entropy` for the parameters."""
    given = input, target, weight, size_average, ignore_index, reduce, reduction
    if not (
        _is_usual(reduction, size_average, reduce)
        and _takes(input, weight)
        and input.ndim
        and _is_plain(target)
        and target.dtype is torch.int64
        and _is_target(input, target)
    ):
        return THEIRS["nll_loss"](*given)
    options = (_class_axis(input), ignore_index, 0.0, 0.0, math.nan, 1.0)
    return _apply("nll_loss", given, "nll_loss", (input, target, weight, None), options, reduction)


def _class_axis(x: Tensor) -> int:
    """Axis 1 of several, counted from the end."""
    return -1 if x.ndim == 1 else 1 - x.ndim


def _is_target(x: Tensor, target: Tensor) -> bool:
    """Whether it is labels or probabilities as PyTorch wants them."""
    if not _is_plain(target):
        return False
    if target.dtype is x.dtype:
        return bool(target.shape == x.shape)
    shape = x.shape
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return bool(target.dtype is torch.int64 and target.shape == rows)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor = None,
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`, of logits of any shape.

    See `fastll.binary_cross_entropy_with_logits`.
    """
    given = input, target, weight, size_average, reduce, reduction, pos_weight
    if not (_is_usual(reduction, size_average, reduce) and _pair(input, target, weight, pos_weight)):
        return THEIRS["binary_cross_entropy_with_logits"](*given)
    name, tensors = "binary_cross_entropy_with_logits", (input, target, pos_weight, weight)
    return _apply(name, given, name, tensors, (), reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy`; see `fastll.binary_cross_entropy`."""
    given = input, target, weight, size_average, reduce, reduction
    if not (_is_usual(reduction, size_average, reduce) and _pair(input, target, weight)):
        return THEIRS["binary_cross_entropy"](*given)
    tensors = input, target, weight
    return _apply("binary_cross_entropy", given, "binary_cross_entropy", tensors, (), reduction)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`torch.nn.functional.kl_div`, element by element, of log-probabilities; "batchmean" as there.

    A target of 0 contributes 0 at a log-probability of -inf as well, where PyTorch has NaN.
    """
    given = input, target, size_average, reduce, reduction, log_target
    batch = reduction == "batchmean"
    usual = _is_usual("sum" if batch else reduction, size_average, reduce)
    if not (usual and _pair(input, target) and input.ndim >= batch):
        return THEIRS["kl_div"](*given)
    how = "sum" if batch else reduction
    value = _apply(
        "kl_div", (*given[:4], how, log_target), "kl_div", given[:2], (float(log_target),), how
    )
    return value / input.shape[0] if batch else value


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`; see `fastll.gaussian_nll`."""
    given = input, target, var, full, eps, reduction
    per_row = (
        _is_plain(var) and _takes(input) and var.shape in (input.shape[:-1], (*input.shape[:-1], 1))
    )
    if not (
        _is_usual(reduction)
        and _pair(input, target)
        and eps > 0
        and _takes(input, var)
        and (var.shape == input.shape or per_row)
    ):
        return THEIRS["gaussian_nll_loss"](*given)
    options = float(full), eps
    return _apply("gaussian_nll_loss", given, "gaussian_nll", given[:3], options, reduction)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.poisson_nll_loss`; see `fastll.poisson_nll`."""
    given = input, target, log_input, full, size_average, eps, reduce, reduction
    if not (_is_usual(reduction, size_average, reduce) and _pair(input, target)):
        return THEIRS["poisson_nll_loss"](*given)
    options = float(log_input), float(full), eps
    return _apply("poisson_nll_loss", given, "poisson_nll", given[:2], options, reduction)


def _pair(x: Tensor, target: Tensor, *others: Tensor) -> bool:
    """Whether a target has the shape of the first tensor, and others broadcast to it."""
    if not (_takes(x, target, *others) and target.shape == x.shape):
        return False
    return all(t is None or torch.broadcast_shapes(t.shape, x.shape) == x.shape for t in others)


def logsumexp(input: Tensor, dim: int, keepdim: bool = False, *, out: Tensor = None) -> Tensor:
    """`torch.logsumexp`; see `fastll.logsumexp`."""
    if out is not None or not (_takes(input) and _is_axis(input, dim)):
        return THEIRS["logsumexp"](input, dim, keepdim, out=out)
    axis = dim % input.ndim - input.ndim
    value = _apply("logsumexp", (input, dim), "logsumexp", (input,), (axis,))
    return value.unsqueeze(axis) if keepdim else value


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.softmax`; see `fastll.softmax`."""
    return _normalised("softmax", input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.log_softmax`; see `fastll.log_softmax`."""
    return _normalised("log_softmax", input, dim, _stacklevel, dtype)


def _normalised(
    name: str, input: Tensor, dim: int | None, level: int, dtype: torch.dtype | None
) -> Tensor:
    if not (_takes(input) and _is_axis(input, dim)):
        return THEIRS[name](input, dim, level, dtype)
    wanted = dtype_of(name, input) if dtype is None else dtype
    if wanted not in FLOATS:
        return THEIRS[name](input, dim, level, dtype)
    x = of_dtype(input, wanted)
    given = x, dim, level, None
    assert dim is not None
    return _apply(name, given, name, (x,), (dim % x.ndim - x.ndim,))


def _is_axis(x: Tensor, dim: Any) -> bool:
    return type(dim) is int and -x.ndim <= dim < x.ndim


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):  # type: ignore[misc]
    """`torch.nn.CrossEntropyLoss` by `cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):  # type: ignore[misc]
    """`torch.nn.NLLLoss` by `nll_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):  # type: ignore[misc]
    """`torch.nn.BCEWithLogitsLoss` by `binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class KLDivLoss(torch.nn.KLDivLoss):  # type: ignore[misc]
    """`torch.nn.KLDivLoss` by `kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


@contextmanager
def patch() -> Iterator[None]:
    """Have `torch.nn.functional` use the functions of this module, in a ``with`` block.

    So do the losses of `torch.nn`, which call it. It holds for the whole process, and is undone at the
    end of the block. Names that were bound before (``from torch.nn.functional import ...``) stay.

    Examples
    --------
    >>> import torch
    >>> import fastll.interop.torch
    >>> with fastll.interop.torch.patch():
    ...     torch.nn.functional.cross_entropy is fastll.interop.torch.cross_entropy
    True
    """
    names = [name for name in THEIRS if name != "logsumexp"]
    before = {name: getattr(torch.nn.functional, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.functional, name, globals()[name])
        yield
    finally:
        for name, function in before.items():
            setattr(torch.nn.functional, name, function)
