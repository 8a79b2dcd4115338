"""fastll in JAX, on CPUs: by XLA's foreign function interface, without a copy and without Python.

What is here works under `jax.jit`, `jax.grad`, `jax.vmap` (as one call of the whole batch) and
`jax.lax.scan`, and is meant to be compiled: a call outside `jax.jit` takes a millisecond.

`cross_entropy`, `binary_cross_entropy_with_logits` and `entropy_from_logits` have gradients of their
own (`jax.custom_vjp`). What they are differentiated for besides, other arguments or a second time, goes
by their formulas in `jax.numpy`: right, at JAX's speed. Forward mode (`jax.jvp`) is for `logsumexp`,
`softmax` and `log_softmax`, and for derivatives of gradients, as in `jax.hessian`.

Options are Python numbers, not arrays. Shapes, dtypes and options are checked when a function is
traced, with the errors of fastll. A label that is out of range is found when it runs:
`jax.errors.JaxRuntimeError` (``INVALID_ARGUMENT``) names the label, its position and the number of
classes.

A function that is compiled for anything but a CPU raises `NotImplementedError`.
"""

# ruff: noqa: E402 (JAX's version is checked first)

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastll.interop import require

require("jax", "0.7")

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import ArrayLike

from fastll import dispatch, threads
from fastll.api import Reduction, check_reduction, losses, number
from fastll.arrays import Axis, axes_of
from fastll.backend.cython import Xla
from fastll.calls import Call
from fastll.contract import Options
from fastll.dtypes import kind_of, name_of

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "entropy_from_logits",
    "log_softmax",
    "logsumexp",
    "sigmoid_binary_cross_entropy",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]

_TARGET = "fastll"


def _register() -> None:
    """Register the kernels with XLA, in the version of its interface that jaxlib states."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text("utf-8")
    found = dict(re.findall(r"define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    handler = Xla.handler(int(found["MAJOR"]), int(found["MINOR"]))
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    threads.follow(Xla.use)


_register()

#: Operands besides x and results, in the order of their bits in backend/cython/xla.hpp.
_OPERANDS = ("second", "third", "labels", "weight", "sample", "upstream")
_RESULTS = ("value", "lse", "sign", "out")
_REDUCTIONS = ("mean", "sum", "none")

_INT64_MIN = -(1 << 63)

#: Elements of unreduced losses from which on their gradients are computed with them. To multiply these
#: later takes less time than to read x twice, but at least the 50 us that XLA's threads take to wake.
_EARLY_FROM = 1 << 18


class _Plan(NamedTuple):
    """What is known of a call when it is traced."""

    operation: str
    axis: int | None = None  # of the classes, counted from 0; None for element-wise operations
    reduction: str = "none"
    options: Options = Options()
    lenient: bool = False  # a label below 0 counts from C, and a row whose label is out of range is NaN


# The primitive that is nothing but the place for an error: XLA says nothing that helps.
_on_cpu = Primitive("fastll_on_cpu")
_on_cpu.def_impl(lambda x: x)
_on_cpu.def_abstract_eval(lambda x: x)
batching.primitive_batchers[_on_cpu] = lambda inputs, axes: (_on_cpu.bind(*inputs), *axes)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "fastll.interop.jax has kernels for CPUs only: put the arguments on one, as by "
        'jax.device_put(x, jax.devices("cpu")[0]), or use the functions of jax.nn and optax'
    )


mlir.register_lowering(_on_cpu, _refuse)
mlir.register_lowering(_on_cpu, lambda context, x: [x], platform="cpu")


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _kernel(plan: _Plan, results: tuple[str, ...], x: Array, others: dict[str, Any]) -> Any:
    """Results of an operation, by the kernels."""
    rows = x.shape if plan.axis is None else x.shape[: plan.axis] + x.shape[plan.axis + 1 :]
    compute = _compute_dtype(plan, x, others)
    shapes = {
        "value": ((rows if plan.reduction == "none" else ()), compute),
        "lse": (rows, compute),
        "sign": (rows, compute),
        "out": (x.shape, x.dtype),
    }
    given = [name for name in _OPERANDS if others.get(name) is not None]
    integers = (
        Xla.code_of(plan.operation),
        sum(1 << _OPERANDS.index(name) for name in given),
        sum(1 << _RESULTS.index(name) for name in results),
        x.ndim,
        0 if plan.axis is None else plan.axis,
        _REDUCTIONS.index(plan.reduction),
        plan.options.ignore_index,
        plan.lenient,
    )
    call = jax.ffi.ffi_call(
        _TARGET,
        [jax.ShapeDtypeStruct(*shapes[name]) for name in results],
        vmap_method="expand_dims",
    )
    return call(
        _on_cpu.bind(x),
        *(others[name] for name in given),
        integers=np.array(integers, np.int64),
        numbers=np.array(plan.options[1:], np.float64),
    )


def _compute_dtype(plan: _Plan, x: Array, others: dict[str, Any]) -> Any:
    wide = [x]
    if plan.operation == "logsumexp" and others.get("second") is not None:
        wide.append(others["second"])
    return np.result_type(*(kind_of(a.dtype).compute for a in wide))


# Losses. Their gradients are kernels, too, whose own derivatives are formulas.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(plan: _Plan, x: Array, others: dict[str, Any]) -> Array:
    (value,) = _kernel(plan, ("value",), x, others)
    return value


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slope(plan: _Plan, x: Array, others: dict[str, Any], upstream: Array) -> Array:
    """The gradient with respect to x."""
    if plan.axis is None and plan.reduction == "none":  # each element has its own factor
        weight = others.get("weight")
        factor = upstream if weight is None else upstream * weight.astype(upstream.dtype)
        others = others | {"weight": factor}
    else:
        others = others | {"upstream": upstream}
    (slope,) = _kernel(plan, ("out",), x, others)
    return slope


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_and_slope(plan: _Plan, x: Array, others: dict[str, Any]) -> tuple[Array, Array]:
    """Both in one read of x, the gradient for the upstream gradient that is `_expected`."""
    plan = plan._replace(options=plan.options._replace(scale=_expected(plan, x)))
    value, slope = _kernel(plan, ("value", "out"), x, others)
    return value, slope


def _expected(plan: _Plan, x: Array) -> float:
    """The upstream gradient of a value if the loss is a mean of values."""
    rows = x.size if plan.axis is None else x.size // max(x.shape[plan.axis], 1)
    one = kind_of(x.dtype).compute.type(1)
    return 1.0 if plan.reduction != "none" else float(one / max(rows, 1))


def _slope_by_formula(plan: _Plan, x: Array, others: dict[str, Any], upstream: Array) -> Array:
    _, pull = jax.vjp(lambda x: _formula(plan, x, others), x)
    (slope,) = pull(upstream)
    return slope


def _value_and_slope_by_formula(plan: _Plan, x: Array, others: dict[str, Any]) -> tuple[Array, Array]:
    value, pull = jax.vjp(lambda x: _formula(plan, x, others), x)
    (slope,) = pull(jnp.full_like(value, _expected(plan, x)))
    return value, slope


def _differentiate(function: Any, formula: Any) -> None:
    """Let the derivative of what the kernels compute be that of a formula."""

    def rule(plan: _Plan, primals: Any, tangents: Any) -> Any:
        _, tangent = jax.jvp(partial(formula, plan), primals, tangents)
        return function(plan, *primals), tangent

    function.defjvp(rule)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, x: Array, others: dict[str, Any]) -> Array:
    return _value(plan, x, others)


def _loss_forward(plan: _Plan, x: Any, others: dict[str, Any]) -> Any:
    values = {name: a.value for name, a in others.items()}
    # keys, which say what is to be differentiated for
    asked = {name: None for name, a in {"x": x, **others}.items() if a.perturbed}
    # In one read, if the upstream gradient may come later: what keeps halves from underflow must be
    # there before the gradient is rounded. XLA multiplies by what it differs by from the one that is
    # expected, in place, or not at all if it sees that this is 1.
    pays = plan.reduction != "none" or x.value.size >= _EARLY_FROM
    early = "x" in asked and pays and x.value.dtype in (np.float32, np.float64)
    if early:
        value, slope = _value_and_slope(plan, x.value, values)
        return value, (x.value, values, asked, slope)
    return _value(plan, x.value, values), (x.value, values, asked, None)


def _loss_backward(plan: _Plan, kept: Any, upstream: Any) -> Any:
    x, others, asked, slope = kept
    if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
        upstream = jnp.zeros(upstream.shape, upstream.dtype)
    if slope is not None:
        factor = upstream / _expected(plan, x)
        if plan.axis is not None and plan.reduction == "none":
            factor = jnp.expand_dims(factor, plan.axis)
        # 0 drops a row, even if its gradient is NaN
        slope = jnp.where(factor == 0, 0, slope * factor)
    elif "x" in asked:
        slope = _slope(plan, x, others, upstream)
    slopes = dict.fromkeys(others)
    some = {name: others[name] for name in asked if name != "x"}
    if some:
        _, pull = jax.vjp(lambda some: _formula(plan, x, others | some), some)
        slopes |= pull(upstream)[0]
    return slope, slopes


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _formula(plan: _Plan, x: Array, others: dict[str, Any]) -> Array:
    """A loss as `jax.numpy` has it, for the derivatives that kernels do not have."""
    compute = kind_of(x.dtype).compute
    given = {name: a if name == "labels" else a.astype(compute) for name, a in others.items()}
    x = x.astype(compute)
    if plan.axis is None:
        value = _binary_cross_entropy(x, given)
        return value if plan.reduction == "none" else getattr(value, plan.reduction)()
    x = jnp.moveaxis(x, plan.axis, -1)
    if "second" in given:
        given["second"] = jnp.moveaxis(given["second"], plan.axis, -1)
    kept = given.get("sample", jnp.ones(x.shape[:-1], compute)) != 0
    if "labels" in given:
        kept &= given["labels"] != plan.options.ignore_index
    x = jnp.where(kept[..., None], x, 0)  # what is dropped has no derivative, even if it is NaN
    sample = jnp.where(kept, given.get("sample", 1), 0).astype(compute)
    if plan.operation == "entropy_from_logits":
        log_probs = jax.nn.log_softmax(x * plan.options.inverse_temperature)
        finite = jnp.where(log_probs > -jnp.inf, log_probs, 0)
        value, weight, penalty = -(jnp.exp(log_probs) * finite).sum(-1), sample, None
    else:
        value, weight, penalty = _cross_entropy(plan, x, given, sample)
    total = sample * value
    if plan.reduction == "mean":
        total = total.sum() / weight.sum()
        return total if penalty is None else total + (sample * penalty).sum() / sample.sum()
    if penalty is not None:
        total += sample * penalty
    return total if plan.reduction == "none" else total.sum()


def _cross_entropy(plan: _Plan, x: Array, given: dict[str, Any], sample: Array) -> Any:
    """Rows' losses, the weights that their mean is by, and what z-loss adds to them."""
    options, classes = plan.options, x.shape[-1]
    if options.softcap:
        x = options.softcap * jnp.tanh(x / options.softcap)
    weight = given.get("weight", jnp.ones(classes, x.dtype))
    by = sample
    if "labels" in given:
        labels = given["labels"]
        labels = jnp.where(labels < 0, labels + classes, labels) if plan.lenient else labels
        target = jax.nn.one_hot(labels, classes, dtype=x.dtype)
        by = sample * (target @ weight)
    else:
        target = given["second"]
    u = weight * ((1 - options.label_smoothing) * target + options.label_smoothing / classes)
    lse = jax.nn.logsumexp(x, axis=-1)
    distance = lse[..., None] - x
    distance = jnp.where((u == 0) & (x == -jnp.inf), 0, distance)
    penalty = options.z_loss * lse**2 if options.z_loss else None
    return (u * distance).sum(-1), by, penalty


def _binary_cross_entropy(x: Array, given: dict[str, Any]) -> Array:
    t = given["second"]
    positive, negative = given.get("third", 1) * t, 1 - t
    loss = jnp.where(positive == 0, 0, positive * jnp.logaddexp(-x, 0))
    loss += jnp.where(negative == 0, 0, negative * jnp.logaddexp(x, 0))
    return loss * given.get("weight", 1)


_differentiate(_value, _formula)
_differentiate(_slope, _slope_by_formula)
_differentiate(_value_and_slope, _value_and_slope_by_formula)


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
) -> Array:
    r"""Cross-entropy of logits against class labels or a distribution: `fastll.cross_entropy`.

    .. math::

        L = \sum_j w_j u_j (\mathrm{lse} - x_j) + z\,\mathrm{lse}^2, \quad
        u_j = (1 - \epsilon) t_j + \epsilon / C

    Parameters
    ----------
    logits : array_like
        float16, bfloat16, float32, float64; integers and bools as JAX's default float.
    target, axis, weight, ignore_index, label_smoothing, z_loss, softcap, sample_weight, reduction
        As for `fastll.cross_entropy`. A class axis that is not the last one costs no copy.

    Returns
    -------
    Array
        float64 for float64 logits, float32 for all others.

    Raises
    ------
    TypeError, ValueError
        As for `fastll.cross_entropy`, when the call is traced.
    jax.errors.JaxRuntimeError
        If a label is outside [0, C) and is not `ignore_index`, when the call is run.
    NotImplementedError
        If the call is compiled for another device than a CPU, or another backend of fastll than
        "cython" is in force when it is traced.

    References
    ----------
    See `fastll.cross_entropy`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from fastll.interop.jax import cross_entropy
    >>> logits, labels = jnp.array([[2.0, 0.0, 0.0], [0.0, 50.0, 0.0]]), jnp.array([0, 1])
    >>> loss, grad = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
    >>> print(loss, grad[0])
    0.1197724 [-0.1065  0.0533  0.0533]
    """
    x = _floats(logits)
    given = {"weight": weight, "sample": sample_weight}
    others = {name: jnp.asarray(a) for name, a in given.items() if a is not None}
    t = jnp.asarray(target)
    checked = losses.arguments_of_rows(
        "any",
        _begin("cross_entropy", x, "logits"),
        _stand_in(t),
        axis,
        (_stand_in(others.get("weight")), _stand_in(others.get("sample"))),
        (ignore_index, label_smoothing, z_loss, softcap),
        reduction,
    )
    others["second" if checked.labels is None else "labels"] = t
    if weight is not None:
        others["weight"] = others["weight"].astype(kind_of(x.dtype).compute)
    if sample_weight is not None:
        others["sample"] = jnp.broadcast_to(others["sample"], checked.rows)
    return _loss(_Plan("cross_entropy", checked.axis, reduction, checked.options), x, others)


def entropy_from_logits(
    logits: ArrayLike,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
) -> Array:
    r"""Entropy of the softmax of logits, in nats, in one read: `fastll.entropy_from_logits`.

    .. math:: H = -\sum_j p_j \log p_j, \quad p = \operatorname{softmax}(x / T)

    Parameters
    ----------
    logits : array_like
        As for `cross_entropy`.
    axis, temperature, sample_weight, reduction
        As for `fastll.entropy_from_logits`.

    Returns
    -------
    Array
        float64 for float64 logits, float32 for all others.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `cross_entropy`; if the temperature is not positive.

    Examples
    --------
    >>> from fastll.interop.jax import entropy_from_logits
    >>> print(entropy_from_logits([[0.0, 0.0], [40.0, 0.0]]))
    [6.9314718e-01 1.7418253e-16]
    """
    x = _floats(logits)
    call = _begin("entropy_from_logits", x, "logits")
    axis, rows = call.rows(axis)
    check_reduction(reduction)
    options = Options(inverse_temperature=1 / number(temperature, "temperature", 0.0, above=True))
    others: dict[str, Array] = {}
    if sample_weight is not None:
        sample = jnp.asarray(sample_weight)
        call.sample_weight(_stand_in(sample), rows)
        others["sample"] = jnp.broadcast_to(sample, rows)
    return _loss(_Plan("entropy_from_logits", axis, reduction, options), x, others)


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy of logits: `fastll.binary_cross_entropy_with_logits`.

    .. math::

        L = w \left( p\,t\,\operatorname{softplus}(-x) + (1 - t) \operatorname{softplus}(x) \right)

    Parameters
    ----------
    logits : array_like
        As for `cross_entropy`.
    target, weight, pos_weight, reduction
        As for `fastll.binary_cross_entropy_with_logits`.

    Returns
    -------
    Array
        float64 for float64 logits, float32 for all others.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `cross_entropy`.

    Examples
    --------
    >>> from fastll.interop.jax import binary_cross_entropy_with_logits
    >>> print(binary_cross_entropy_with_logits([0.0, 40.0], [0, 1], reduction="none"))
    [6.931472e-01 4.248354e-18]
    """
    x, t = _floats(logits), jnp.asarray(target)
    operation = "binary_cross_entropy_with_logits"
    call = _begin(operation, x, "logits")
    if call.place.take(_stand_in(t), "target").shape != x.shape:
        raise ValueError(f"target has shape {t.shape}; expected that of logits, {x.shape}")
    others = {"second": t}
    for key, name, a in ("weight", "weight", weight), ("third", "pos_weight", pos_weight):
        if a is not None:
            others[key] = jnp.asarray(a)
            call.take(_stand_in(others[key]), name)
            others[key] = jnp.broadcast_to(others[key], x.shape)
    check_reduction(reduction)
    if pos_weight is not None:
        operation += "_pos_weight"
    return _loss(_Plan(operation, None, reduction), x, others)


# Reductions and what has the shape of the logits: derivatives are formulas of what the kernels return.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _log_sum_exp(axis: int, signed: bool, a: Array, b: Array | None) -> Any:
    results = ("lse", "sign") if signed else ("lse",)
    return _kernel(_Plan("logsumexp", axis), results, a, {"second": b})


def _log_sum_exp_jvp(axis: int, signed: bool, primals: Any, tangents: Any) -> Any:
    (a, b), (a_dot, b_dot) = primals, tangents
    found = _log_sum_exp(axis, signed, a, b)
    lse = found[0]
    share = jnp.exp(a.astype(lse.dtype) - jnp.expand_dims(lse, axis))
    if signed:
        share *= jnp.expand_dims(found[1], axis)
    tangent = share * a_dot.astype(lse.dtype)
    if b is not None:
        tangent = jnp.where(b == 0, 0, tangent * b.astype(lse.dtype))
        if b_dot.dtype != jax.dtypes.float0:
            tangent += share * b_dot.astype(lse.dtype)
    return found, [tangent.sum(axis), *map(jnp.zeros_like, found[1:])]


_log_sum_exp.defjvp(_log_sum_exp_jvp)


def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Any:
    r"""Logarithm of the sum of exponentials, in one read: `fastll.logsumexp`.

    .. math:: \log \sum_j b_j \exp(a_j)

    The signature is that of `jax.scipy.special.logsumexp`, too, but for its ``where``.

    Parameters
    ----------
    a : array_like
        As `logits` of `cross_entropy`.
    axis, b, keepdims, return_sign
        As for `fastll.logsumexp`. Axes that are not neighbours cost a copy.

    Returns
    -------
    res, sgn : Array
        float64 if `a` or `b` is, else float32; `sgn` only if `return_sign`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `fastll.logsumexp` and `cross_entropy`.

    Examples
    --------
    >>> from fastll.interop.jax import logsumexp
    >>> print(logsumexp([0.0, -40.0]))
    4.248354e-18
    """
    x, weights = _floats(a), None
    _begin("logsumexp", x, "a")
    if b is not None:
        # as for NumPy, a number has no dtype of its own
        weights = jnp.asarray(b, x.dtype if isinstance(b, int | float) else None)
        kind_of(weights.dtype, "b")
        try:
            shape = np.broadcast_shapes(x.shape, weights.shape)
        except ValueError:
            raise ValueError(
                f"b has shape {weights.shape}; expected one that broadcasts with {x.shape}"
            ) from None
        x, weights = jnp.broadcast_to(x, shape), jnp.broadcast_to(weights, shape)
    axes = axes_of(axis, max(x.ndim, 1))
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    x, at, _ = _as_one_axis(x, axes)
    if weights is not None:
        weights, _, _ = _as_one_axis(weights, axes)
    found = _log_sum_exp(at, return_sign, x, weights)
    if keepdims:
        found = [a.reshape(kept) for a in found]
    return tuple(found) if return_sign else found[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalized(operation: str, axis: int, x: Array) -> Array:
    (out,) = _kernel(_Plan(operation, axis), ("out",), x, {})
    return out


def _normalized_jvp(operation: str, axis: int, primals: Any, tangents: Any) -> Any:
    out = _normalized(operation, axis, *primals)
    compute = kind_of(out.dtype).compute
    wide, x_dot = out.astype(compute), tangents[0].astype(compute)
    p = wide if operation == "softmax" else jnp.exp(wide)
    tangent = x_dot - (p * x_dot).sum(axis, keepdims=True)
    if operation == "softmax":
        tangent *= p
    return out, tangent.astype(out.dtype)


_normalized.defjvp(_normalized_jvp)


def softmax(x: ArrayLike, axis: Axis = -1) -> Array:
    r"""Softmax, in one read and one write: `fastll.softmax`.

    .. math:: p_j = \exp(x_j - m) / \sum_i \exp(x_i - m), \quad m = \max_i x_i

    Parameters
    ----------
    x : array_like
        As `logits` of `cross_entropy`.
    axis
        As for `fastll.softmax`. Axes that are not neighbours cost a copy.

    Returns
    -------
    Array
        Same shape and dtype as `x`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `fastll.softmax` and `cross_entropy`.

    Examples
    --------
    >>> from fastll.interop.jax import softmax
    >>> print(softmax([0.0, 0.0, float("-inf")]))
    [0.5 0.5 0. ]
    """
    return _of_same_shape("softmax", x, axis)


def log_softmax(x: ArrayLike, axis: Axis = -1) -> Array:
    r"""Logarithm of the softmax, in one read and one write: `fastll.log_softmax`.

    .. math:: \log p_j = (x_j - m) - \log \sum_i \exp(x_i - m), \quad m = \max_i x_i

    Parameters
    ----------
    x, axis
        As for `softmax`, like result and errors.

    Examples
    --------
    >>> from fastll.interop.jax import log_softmax
    >>> print(log_softmax([1000.0, 0.0]))
    [    0. -1000.]
    """
    return _of_same_shape("log_softmax", x, axis)


def _of_same_shape(operation: str, x: ArrayLike, axis: Axis) -> Array:
    x = _floats(x)
    _begin(operation, x, "x")
    x, at, restored = _as_one_axis(x, axes_of(axis, max(x.ndim, 1)))
    return restored(_normalized(operation, at, x))


# optax's losses, with its names, signatures and dtypes.


def softmax_cross_entropy(
    logits: Array, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""`optax.softmax_cross_entropy`: each row's cross-entropy against a distribution.

    Parameters
    ----------
    logits : Array
        float16, bfloat16, float32 or float64.
    labels : array_like
        Distributions, of any real dtype; `logits` and `labels` broadcast to one shape.
    axis : int, tuple of int or None
        The axes of the classes; None means all.
    where : array_like, optional
        Which elements are taken part of, in the shape of the logits or of the rows. A row of none of
        them has the loss 0.

    Returns
    -------
    Array
        In the dtype of `logits` and `labels` together.

    Notes
    -----
    One thing differs: a label of 0 contributes 0 at a logit of -inf, too, where optax gives NaN (its
    `safe_softmax_cross_entropy` does not).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastll.interop.jax import softmax_cross_entropy
    >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    >>> print(softmax_cross_entropy(logits, jnp.eye(2, 3)))
    [0.27613 2.9518 ]
    """
    x = _only(jnp.floating, logits, "logits")
    t = jnp.asarray(labels)
    dtype = jnp.result_type(x, t)
    if where is not None:
        mask = _mask(where, x.ndim, axis)
        axes = axes_of(axis, x.ndim)
        # where nothing is taken part of, any finite logits will do
        empty = ~mask.any(axes, keepdims=True)
        x = jnp.where(mask, x, jnp.where(empty, 0, -jnp.inf).astype(x.dtype))
        t = jnp.where(mask, t, jnp.zeros((), t.dtype))
    _begin("cross_entropy", x, "logits")
    kind_of(np.dtype(t.dtype), "labels")
    x, t = jnp.broadcast_arrays(x, t)
    axes = axes_of(axis, x.ndim)
    x, at, _ = _as_one_axis(x, axes)
    t, _, _ = _as_one_axis(t, axes)
    if t.dtype == bool:
        t = t.astype(jnp.uint8)
    return _loss(_Plan("cross_entropy", at), x, {"second": t}).astype(dtype)


def softmax_cross_entropy_with_integer_labels(
    logits: Array,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""`optax.softmax_cross_entropy_with_integer_labels`: each row's cross-entropy against a label.

    Parameters
    ----------
    logits : Array
        float16, bfloat16, float32 or float64.
    labels : array_like
        Integers; they broadcast to the shape of `logits` without `axis`. As in optax, a label below 0
        counts from the number of classes, and a row whose label is out of range then is NaN.
    axis : int or tuple of int
        The axes of the classes, over which a label is a flat index.
    where : array_like, optional
        Which elements are taken part of, in the shape of the logits or of the rows. A row of none of
        them has the loss 0.

    Returns
    -------
    Array
        In the dtype of `logits`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastll.interop.jax import softmax_cross_entropy_with_integer_labels
    >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    >>> print(softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1])))
    [0.27613 2.9518 ]
    """
    x, y = _only(jnp.floating, logits, "logits"), _only(jnp.integer, labels, "labels")
    _begin("cross_entropy", x, "logits")
    if not isinstance(axis, int | tuple):
        raise ValueError(f"axis is {axis!r}; expected an integer or a tuple of them")
    mask = None if where is None else _mask(where, x.ndim, axis)
    order = axis
    if isinstance(axis, tuple) and list(axis) != sorted(
        axis
    ):  # a label counts in the order of the axes
        others = [i for i in range(x.ndim) if i not in axes_of(axis, x.ndim)]
        moved = (*others, *(i % x.ndim for i in axis))
        x, order = x.transpose(moved), tuple(range(len(others), x.ndim))
        mask = None if mask is None else jnp.broadcast_to(mask, logits.shape).transpose(moved)
    axes = axes_of(order, x.ndim)
    if mask is not None:
        mask, _, _ = _as_one_axis(jnp.broadcast_to(mask, x.shape), axes)
    x, at, _ = _as_one_axis(x, axes)
    y = jnp.broadcast_to(y, x.shape[:at] + x.shape[at + 1 :])
    if mask is None:
        plan = _Plan("cross_entropy", at, options=Options(ignore_index=_INT64_MIN), lenient=True)
        return _loss(plan, x, {"labels": y}).astype(x.dtype)
    at_label = jnp.take_along_axis(x, jnp.expand_dims(y, at), axis=at).squeeze(at)
    any_of_row = mask.any(at)
    taken = jnp.where(mask | ~jnp.expand_dims(any_of_row, at), x, -jnp.inf)
    return jnp.where(any_of_row, logsumexp(taken, at) - at_label, 0).astype(x.dtype)


def sigmoid_binary_cross_entropy(logits: Array, labels: ArrayLike) -> Array:
    r"""`optax.sigmoid_binary_cross_entropy`: each element's binary cross-entropy.

    Parameters
    ----------
    logits : Array
        float16, bfloat16, float32 or float64.
    labels : array_like
        Probabilities of the positive class, or 0 and 1; `logits` and `labels` broadcast to one shape.

    Returns
    -------
    Array
        In the dtype of `logits`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastll.interop.jax import sigmoid_binary_cross_entropy
    >>> print(sigmoid_binary_cross_entropy(jnp.array([0.0, 40.0]), jnp.array([0, 1])))
    [6.931472e-01 4.248354e-18]
    """
    x = _only(jnp.floating, logits, "logits")
    x, t = jnp.broadcast_arrays(x, jnp.asarray(labels).astype(x.dtype))
    return binary_cross_entropy_with_logits(x, t, reduction="none").astype(x.dtype)


def _mask(where: ArrayLike, ndim: int, axis: Axis) -> Array:
    """Elements to take part of, with as many axes as the logits."""
    mask = jnp.asarray(where)
    return mask if mask.ndim == ndim else jnp.expand_dims(mask, axes_of(axis, ndim))


def _only(kind: Any, a: ArrayLike, name: str) -> Array:
    a = jnp.asarray(a)
    if not jnp.issubdtype(a.dtype, kind):
        expected = "an integer dtype" if kind is jnp.integer else "a floating one"
        raise TypeError(f"{name} has dtype {name_of(a.dtype)}; expected {expected}")
    return a


def _floats(a: ArrayLike) -> Array:
    """An array; integers and bools as JAX's default float."""
    a = jnp.asarray(a)
    return a.astype(float) if a.dtype.kind in "biu" else a


def _begin(operation: str, x: Array, name: str) -> Call:
    """A call of fastll that never runs, for its checks."""
    forced = dispatch._forced.get() or dispatch._environment
    if forced not in (None, "cython"):
        raise NotImplementedError(f"backend {forced!r} does not take calls of JAX; 'cython' does")
    return Call(operation, _stand_in(x), name)


def _stand_in(a: Any) -> Any:
    """An array of NumPy with the shape and dtype of another, and no memory."""
    return None if a is None else np.broadcast_to(np.zeros((), a.dtype), a.shape)


def _as_one_axis(x: Array, axes: tuple[int, ...]) -> tuple[Array, int, Any]:
    """An array whose axes, in ascending order, are one; which one; and how to undo that of a result."""
    shape, ndim = x.shape, max(x.ndim, 1)
    if axes != tuple(range(axes[0], axes[-1] + 1)) if axes else False:
        others = [i for i in range(ndim) if i not in axes]
        order = [*others, *axes]
        moved, at, restored = _as_one_axis(x.transpose(order), tuple(range(len(others), ndim)))
        return moved, at, lambda out: restored(out).transpose(np.argsort(order))
    first, last = (axes[0], axes[-1] + 1) if axes else (ndim, ndim)
    if last - first == 1 and x.ndim:
        return x, first, lambda out: out
    merged = x.reshape(*shape[:first], int(np.prod(shape[first:last])), *shape[last:])
    return merged, first, lambda out: out.reshape(shape)
