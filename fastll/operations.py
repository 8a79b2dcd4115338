"""The table of operations: what tests, benchmark and `warmup` need to know about each of them.

`import fastll` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import DTypeLike, NDArray

from fastll.api import elementwise, logits, losses, reductions

Array = NDArray[Any]

#: What the values of an array are: any real numbers (logits, and "real" of the order of 1), labels in
#: [0, C) (of tests, some are ignored) or an index in it, a distribution over the axis, probabilities in
#: [0, 1), those well inside, in [1/16, 15/16], positive numbers of the order of 1 (of a sample's
#: weights, some are 0), or factors of both signs and 0.
Domain = Literal[
    "logits",
    "real",
    "labels",
    "index",
    "distribution",
    "probability",
    "inside",
    "positive",
    "sample",
    "factor",
]
#: The shape of an array: that of the first argument, that without the axis, (C,), or one entry.
Shape = Literal["full", "rows", "classes", "one"]
#: The dotted name of a function, or a function of a library's module and the arrays. It is called with
#: the arrays as fastll is, the axis second where there is one, and returns the value.
Peer = str | Callable[..., Any]
Options = Mapping[str, Any]


class Argument(NamedTuple):
    """An array argument: its name, and what it holds."""

    name: str
    domain: Domain
    shape: Shape = "full"

    def make(self, rng: Generator, shape: tuple[int, ...], axis: int, dtype: DTypeLike) -> Array:
        """Such an array, for a first argument of a shape and dtype."""
        axis %= len(shape)
        rows = shape[:axis] + shape[axis + 1 :]
        shapes = {"full": shape, "rows": rows, "classes": shape[axis : axis + 1]}
        own = shapes.get(self.shape, (1,) * len(shape))
        dtype = np.dtype(dtype)
        wide = np.float32 if dtype.kind in "fV" and dtype.itemsize < 8 else np.float64
        if self.domain in ("labels", "index"):
            return rng.integers(0, shape[axis], own) if shape[axis] else np.full(own, -100)
        if self.domain in ("logits", "real"):
            return rng.standard_normal(own, wide).astype(dtype, copy=False)
        if self.domain == "factor":
            return np.round(2 * rng.standard_normal(own, wide)).astype(dtype)
        values = rng.random(own, wide)
        if self.domain == "distribution":
            values /= values.sum(axis=axis, keepdims=True)
        if self.domain == "inside":
            values = wide(1 / 16) + wide(14 / 16) * values
        if self.domain in ("positive", "sample"):
            values = wide(0.5) + wide(1.5) * values
        if self.domain == "sample":
            values = np.where(rng.random(own) < 0.1, 0, values)
        # what is not in the shape of the first argument need not have its dtype
        return values.astype(dtype if self.shape == "full" else wide, copy=False)


class Operation(NamedTuple):
    """A public function, what it is called with, and what the tests and the benchmark need to know.

    Its formula in extended precision, which results are compared with, is the function of the same
    name in ``tests/oracle.py``.
    """

    function: Callable[..., Any]
    #: The positional array arguments; the first one decides dtype, library and device.
    arguments: tuple[Argument, ...]
    elementwise: bool = False  # otherwise it has the keyword `axis`
    reduces: bool = False  # to one value per row; otherwise the result has the shape of the first one
    gradient: bool = False  # takes `reduction`, `return_grad` and `grad_out`
    #: Keywords that each add a result after the first one, in this order.
    extras: tuple[str, ...] = ()
    #: Keywords to try together, from none to all. An `Argument` stands for such an array.
    options: tuple[Options, ...] = ({},)
    #: The public function that chooses this one, or this case of it, by its arguments.
    chosen_by: str = ""
    #: The same in other libraries, by the name of the library (see ``bench/peers.py``).
    peers: Mapping[str, Peer] = {}
    #: How often the quick benchmark measures it: in every case that suits it, in one, or never.
    measured: Literal["throughout", "once", "full"] = "once"

    @property
    def writes(self) -> bool:
        """Whether a result can have the shape of the first argument."""
        return self.gradient or not self.reduces

    def make(
        self, rng: Generator, shape: tuple[int, ...], axis: int, dtype: DTypeLike
    ) -> tuple[Array, ...]:
        """The positional arguments, of random values."""
        return tuple(argument.make(rng, shape, axis, dtype) for argument in self.arguments)

    def keywords(
        self, rng: Generator, shape: tuple[int, ...], axis: int, dtype: DTypeLike, options: Options
    ) -> dict[str, Any]:
        """Options with their arrays, of random values; and the axis."""
        made: dict[str, Any] = {} if self.elementwise else {"axis": axis}
        for name, value in options.items():
            made[name] = value.make(rng, shape, axis, dtype) if isinstance(value, Argument) else value
        return made


def _logsumexp(np: Any, a: Any, axis: int) -> Any:
    m = a.max(axis, keepdims=True)
    return np.squeeze(m + np.log(np.exp(a - m).sum(axis, keepdims=True)), axis)


def _softmax(np: Any, x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _log_softmax(np: Any, x: Any, axis: int) -> Any:
    return x - np.expand_dims(_logsumexp(np, x, axis), axis)


def _sigmoid(np: Any, x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _focal(np: Any, p: Any, t: Any) -> Any:
    """The focal loss of probabilities, for any library with NumPy's functions."""
    ce = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    return (t / 4 + (1 - t) * 3 / 4) * ce * (1 - p * t - (1 - p) * (1 - t)) ** 2


def _second(x: Any, axis: int) -> Any:
    """A tensor with its classes on the axis that torch's losses take; moving an axis costs time."""
    return x if axis == 1 else x.movedim(axis, 1)


def _sparse(np: Any, lse: Any, x: Any, axis: int, labels: Any) -> Any:
    """The mean loss over the rows with a label, for any library with NumPy's functions."""
    return np.mean(lse - _select(np, x, axis, labels), where=labels >= 0)


def _select(np: Any, x: Any, axis: int, index: Any) -> Any:
    """The elements at an index, for any library with NumPy's functions."""
    return np.take_along_axis(x, np.expand_dims(index, axis), axis).squeeze(axis)


def _entropy(np: Any, log_p: Any, axis: int) -> Any:
    """That of log-probabilities, for any library with NumPy's functions."""
    p = np.exp(log_p)
    return -(p * np.where(p > 0, log_p, 0)).sum(axis)


def _peers(numpy: Peer, scipy: Peer, torch: Peer, jax: Peer) -> Mapping[str, Peer]:
    return {"numpy": numpy, "scipy": scipy, "torch": torch, "jax": jax}


_CLASS_WEIGHT = Argument("weight", "positive", "classes")
_SAMPLE_WEIGHT = {"sample_weight": Argument("sample_weight", "sample", "rows")}
#: The part of a row that all cross-entropies share.
_cross_entropy = partial(
    Operation,
    reduces=True,
    gradient=True,
    extras=("return_lse",),
    options=(
        {},
        {"weight": _CLASS_WEIGHT},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        _SAMPLE_WEIGHT,
        {
            "weight": _CLASS_WEIGHT,
            "label_smoothing": 0.2,
            "z_loss": 1e-3,
            "softcap": 30.0,
            **_SAMPLE_WEIGHT,
        },
    ),
    chosen_by="cross_entropy",
)
_nll_loss = partial(
    Operation,
    losses.nll_loss,
    reduces=True,
    gradient=True,
    chosen_by="nll_loss",
    options=(
        {},
        {"weight": _CLASS_WEIGHT, "label_smoothing": 0.2, **_SAMPLE_WEIGHT},
    ),
)
_WEIGHT = {"weight": Argument("weight", "positive", "one")}
_POS_WEIGHT = {"pos_weight": Argument("pos_weight", "positive")}

OPERATIONS = {
    "logsumexp": Operation(
        reductions.logsumexp,
        (Argument("a", "logits"),),
        reduces=True,
        options=({}, {"b": Argument("b", "factor"), "return_sign": True}),
        peers=_peers(_logsumexp, "scipy.special.logsumexp", "torch.logsumexp", "jax.nn.logsumexp"),
        measured="throughout",
    ),
    "softmax": Operation(
        reductions.softmax,
        (Argument("x", "logits"),),
        peers=_peers(_softmax, "scipy.special.softmax", "torch.softmax", "jax.nn.softmax"),
    ),
    "log_softmax": Operation(
        reductions.log_softmax,
        (Argument("x", "logits"),),
        peers=_peers(
            _log_softmax, "scipy.special.log_softmax", "torch.log_softmax", "jax.nn.log_softmax"
        ),
        measured="full",
    ),
    "entropy": Operation(
        reductions.entropy,
        (Argument("p", "distribution"),),
        reduces=True,
        options=({}, {"base": 2.0}),
        peers={
            "numpy": lambda np, p, axis: -(p * np.log(p)).sum(axis),
            "scipy": lambda scipy, p, axis: scipy.special.entr(p).sum(axis),
            "torch": lambda torch, p, axis: torch.special.entr(p).sum(axis),
            "jax": lambda jax, p, axis: jax.scipy.special.entr(p).sum(axis),
        },
    ),
    "kl_divergence": Operation(
        reductions.kl_divergence,
        (Argument("p", "distribution"), Argument("q", "distribution")),
        reduces=True,
        options=({}, {"base": 2.0}),
        peers={
            "numpy": lambda np, p, axis, q: (p * np.log(p / q)).sum(axis),
            "scipy": lambda scipy, p, axis, q: scipy.special.rel_entr(p, q).sum(axis),
            "torch": lambda torch, p, axis, q: torch.nn.functional.kl_div(
                q.log(), p, reduction="none"
            ).sum(axis),
            "jax": lambda jax, p, axis, q: jax.scipy.special.rel_entr(p, q).sum(axis),
        },
    ),
    "distribution_cross_entropy": Operation(
        reductions.distribution_cross_entropy,
        (Argument("p", "distribution"), Argument("q", "distribution")),
        reduces=True,
        options=({}, {"base": 2.0}),
        peers={
            "numpy": lambda np, p, axis, q: -(p * np.log(q)).sum(axis),
            "scipy": lambda scipy, p, axis, q: -scipy.special.xlogy(p, q).sum(axis),
            "torch": lambda torch, p, axis, q: -torch.xlogy(p, q).sum(axis),
            "jax": lambda jax, p, axis, q: -jax.scipy.special.xlogy(p, q).sum(axis),
        },
        measured="full",
    ),
    "sigmoid": Operation(
        reductions.sigmoid,
        (Argument("x", "logits"),),
        elementwise=True,
        peers=_peers(_sigmoid, "scipy.special.expit", "torch.sigmoid", "jax.nn.sigmoid"),
        measured="full",
    ),
    "log_sigmoid": Operation(
        reductions.log_sigmoid,
        (Argument("x", "logits"),),
        elementwise=True,
        peers={
            "numpy": lambda np, x: -np.logaddexp(0, -x),
            "scipy": "scipy.special.log_expit",
            "torch": "torch.nn.functional.logsigmoid",
            "jax": "jax.nn.log_sigmoid",
        },
        measured="full",
    ),
    "sparse_cross_entropy": _cross_entropy(
        losses.sparse_cross_entropy,
        (Argument("logits", "logits"), Argument("target", "labels", "rows")),
        peers={
            "numpy": lambda np, x, axis, t: _sparse(np, _logsumexp(np, x, axis), x, axis, t),
            "torch": lambda torch, x, axis, t: torch.nn.functional.cross_entropy(_second(x, axis), t),
            "jax": lambda jax, x, axis, t: _sparse(jax.numpy, jax.nn.logsumexp(x, axis), x, axis, t),
            "liger": lambda liger, x, axis, t: liger.LigerCrossEntropyFunction.apply(x, t, None)[0],
        },
        measured="throughout",
    ),
    "dense_cross_entropy": _cross_entropy(
        losses.dense_cross_entropy,
        (Argument("logits", "logits"), Argument("target", "distribution")),
        peers={
            "numpy": lambda np, x, axis, t: -(t * _log_softmax(np, x, axis)).sum(axis).mean(),
            "torch": lambda torch, x, axis, t: torch.nn.functional.cross_entropy(
                _second(x, axis), _second(t, axis)
            ),
            "jax": lambda jax, x, axis, t: -(t * jax.nn.log_softmax(x, axis)).sum(axis).mean(),
        },
        measured="full",
    ),
    "sparse_nll_loss": _nll_loss(
        (Argument("log_probs", "logits"), Argument("target", "labels", "rows")),
        peers={
            "torch": lambda torch, x, axis, t: torch.nn.functional.nll_loss(_second(x, axis), t),
        },
    ),
    "dense_nll_loss": _nll_loss(
        (Argument("log_probs", "logits"), Argument("target", "distribution")),
        peers={
            "numpy": lambda np, x, axis, t: -(t * x).sum(axis).mean(),
            "torch": lambda torch, x, axis, t: -(t * x).sum(axis).mean(),
            "jax": lambda jax, x, axis, t: -(t * x).sum(axis).mean(),
        },
        measured="full",
    ),
    "selective_log_softmax": Operation(
        logits.selective_log_softmax,
        (Argument("logits", "logits"), Argument("index", "index", "rows")),
        reduces=True,
        options=(
            {},
            {"temperature": 0.7, "return_lse": True},
            {"return_entropy": True, "return_lse": True},
        ),
        peers={
            "numpy": lambda np, x, axis, i: _select(np, _log_softmax(np, x, axis), axis, i),
            "torch": lambda torch, x, axis, i: x.log_softmax(axis).gather(axis, i.unsqueeze(axis)),
            "jax": lambda jax, x, axis, i: _select(jax.numpy, jax.nn.log_softmax(x, axis), axis, i),
        },
    ),
    "entropy_from_logits": Operation(
        logits.entropy_from_logits,
        (Argument("logits", "logits"),),
        reduces=True,
        gradient=True,
        options=({}, {"temperature": 0.7, **_SAMPLE_WEIGHT}),
        peers={
            "numpy": lambda np, x, axis: _entropy(np, _log_softmax(np, x, axis), axis),
            "torch": lambda torch, x, axis: _entropy(torch, x.log_softmax(axis), axis),
            "jax": lambda jax, x, axis: _entropy(jax.numpy, jax.nn.log_softmax(x, axis), axis),
        },
    ),
    "kl_divergence_from_logits": Operation(
        logits.kl_divergence_from_logits,
        (Argument("logits", "logits"), Argument("target_logits", "logits")),
        reduces=True,
        gradient=True,
        options=({}, {"temperature": 0.7, **_SAMPLE_WEIGHT}),
        peers={
            "torch": lambda torch, x, axis, t: (
                torch.nn.functional.kl_div(
                    x.log_softmax(axis), t.log_softmax(axis), log_target=True, reduction="sum"
                )
                * (x.shape[axis] / x.numel())
            ),
        },
    ),
    "binary_cross_entropy_with_logits": Operation(
        elementwise.binary_cross_entropy_with_logits,
        (Argument("logits", "logits"), Argument("target", "probability")),
        elementwise=True,
        gradient=True,
        options=({}, _WEIGHT, _POS_WEIGHT, {**_WEIGHT, **_POS_WEIGHT}),
        peers={
            "numpy": lambda np, x, t: np.mean(np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))),
            "torch": "torch.nn.functional.binary_cross_entropy_with_logits",
            "jax": lambda jax, x, t: (
                -(t * jax.nn.log_sigmoid(x) + (1 - t) * jax.nn.log_sigmoid(-x)).mean()
            ),
        },
        measured="throughout",
    ),
    "gaussian_nll": Operation(
        elementwise.gaussian_nll,
        (Argument("mean", "real"), Argument("target", "real"), Argument("var", "positive")),
        elementwise=True,
        gradient=True,
        options=({}, {"full": True, "eps": 1.0}),
        peers={
            "numpy": lambda np, x, t, v: np.mean((x - t) ** 2 / v + np.log(v)) / 2,
            "torch": "torch.nn.functional.gaussian_nll_loss",
            "jax": lambda jax, x, t, v: jax.numpy.mean((x - t) ** 2 / v + jax.numpy.log(v)) / 2,
        },
    ),
    "mse": Operation(
        elementwise.mse,
        (Argument("prediction", "real"), Argument("target", "real")),
        elementwise=True,
        gradient=True,
        peers={
            "numpy": lambda np, x, t: np.mean((x - t) ** 2),
            "torch": "torch.nn.functional.mse_loss",
            "jax": lambda jax, x, t: jax.numpy.mean((x - t) ** 2),
        },
        measured="full",
    ),
    "binary_cross_entropy": Operation(
        elementwise.binary_cross_entropy,
        (Argument("probs", "inside"), Argument("target", "probability")),
        elementwise=True,
        gradient=True,
        options=({}, _WEIGHT),
        peers={
            "numpy": lambda np, p, t: -np.mean(t * np.log(p) + (1 - t) * np.log1p(-p)),
            "torch": "torch.nn.functional.binary_cross_entropy",
            "jax": lambda jax, p, t: (
                -jax.numpy.mean(t * jax.numpy.log(p) + (1 - t) * jax.numpy.log1p(-p))
            ),
        },
        measured="full",
    ),
    "poisson_nll": Operation(
        elementwise.poisson_nll,
        (Argument("prediction", "positive"), Argument("target", "positive")),
        elementwise=True,
        gradient=True,
        options=(
            {},
            {"full": True},
            {"log_input": False},
            {"log_input": False, "full": True, "eps": 0.5},
        ),
        peers={
            "numpy": lambda np, x, t: np.mean(np.exp(x) - t * x),
            "torch": "torch.nn.functional.poisson_nll_loss",
            "jax": lambda jax, x, t: jax.numpy.mean(jax.numpy.exp(x) - t * x),
        },
        measured="full",
    ),
    "sigmoid_focal_loss": Operation(
        elementwise.sigmoid_focal_loss,
        (Argument("logits", "logits"), Argument("target", "probability")),
        elementwise=True,
        gradient=True,
        options=({}, {"alpha": -1.0, "gamma": 0.0}, {"alpha": 0.75, "gamma": 1.5}),
        peers={
            "numpy": lambda np, x, t: np.mean(_focal(np, _sigmoid(np, x), t)),
            "torch": lambda torch, x, t: _focal(torch, torch.sigmoid(x), t).mean(),
            "jax": lambda jax, x, t: _focal(jax.numpy, jax.nn.sigmoid(x), t).mean(),
        },
        measured="full",
    ),
}


def rows_of(operations: str | Iterable[str] | None) -> list[Operation]:
    """The rows of public functions, one name or several; all of them for None."""
    rows = {name: [row] for name, row in OPERATIONS.items()}
    for row in OPERATIONS.values():
        if row.chosen_by:
            rows.setdefault(row.chosen_by, []).append(row)
    if operations is None:
        operations = OPERATIONS
    names = [operations] if isinstance(operations, str) else list(operations)
    for name in names:
        if name not in rows:
            raise ValueError(f"operations has {name!r}; expected some of {', '.join(rows)}")
    return [row for name in names for row in rows[name]]
