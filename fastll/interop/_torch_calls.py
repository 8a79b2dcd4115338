"""fastll's own functions, of arguments that PyTorch records, traces or transforms."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastll
from fastll.interop._torch_graph import is_traced, run
from fastll.interop._torch_rules import Options, Tensor, Tensors, widened


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
            capped = tensors[0] if cap is None else cap * torch.tanh(widened(tensors[0]) / cap)
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
    if not is_traced():  # the function itself checks the arguments
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
            return _weighted_lse(given, widened(x), axes)
        lse = torch.logsumexp(widened(x), axes, keepdim=True)
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
        value = term(*map(widened, _taken(given, *names)))
        return (value.sum() if axis is None else value.sum(axis)) / base

    return call


def _selective(given: dict[str, Any]) -> Any:
    tensors = _taken(given, "logits", "index")
    options = (_last_axis(given["axis"], tensors[0]), given["temperature"])
    with torch.no_grad():
        checked = None if is_traced() else fastll.selective_log_softmax(**given)
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
