"""The adapters for other frameworks, and what they are compared with: mostly the framework's own.

A framework is imported when its first task is made, and has as many threads as fastll.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

import fastll
from bench.cases import Array
from bench.peers import Call

#: What is asked for: to be so many times as fast as the rival, to take at most so many seconds, or at
#: most so many more than the rival.
Target = tuple[Literal["faster", "seconds", "more"], float]


#: The rival of adapters that should cost little more than fastll on plain arrays.
PLAIN = "plain fastll"


class Made(NamedTuple):
    """The calls of a task; `count` is how often each of them does what is measured."""

    call: Call
    rivals: dict[str, Call]
    count: int = 1


class Task(NamedTuple):
    """A measurement, to be made when its turn comes."""

    framework: str
    operation: str
    variant: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Made]
    targets: Mapping[str, Target] = {}  # by the name of the rival
    #: How far results may be apart, relatively; by default what the dtype allows.
    tolerance: float | None = None

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.framework}-{self.operation}-{self.variant}-{shape}-{self.dtype}"


LARGE, SMALL, SHORT = (2048, 50257), (32, 1000), (65536, 32)
#: The quick run has fewer rows of the large shape, still more than fit into a cache.
QUICK_SHAPES, SHAPES = ((256, 50257), SMALL, SHORT), (LARGE, SMALL, SHORT)
#: Rows of two classes.
MANY = (1000000,)
VARIANTS = ("value", "gradient")
#: Steps and states of the hidden Markov model.
STEPS, QUICK_STEPS, STATES = 10000, 1000, 10


def _logits(shape: tuple[int, ...], dtype: str = "float32") -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, shape[1], shape[0])
    return rng.standard_normal(shape, np.float32).astype(dtype, copy=False), labels


def _is_large(shape: tuple[int, ...]) -> bool:
    return shape[1] == LARGE[1]


def torch(quick: bool) -> Iterator[Task]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            for variant in VARIANTS:
                targets: dict[str, Target] = {"torch": ("faster", 6.0 if _is_large(shape) else 1.0)}
                if _is_large(shape):
                    targets["torch.compile"] = ("faster", 1.5)
                if shape == SMALL:
                    targets[PLAIN] = ("more", 15e-6)
                make = partial(_torch, shape, dtype, variant == "gradient", not quick)
                yield Task("torch", "cross_entropy", variant, shape, dtype, make, targets)


def _torch(shape: tuple[int, ...], dtype: str, gradient: bool, compiled: bool) -> Made:
    import torch
    from torch.nn import functional

    from fastll.interop import torch as adapter

    torch.set_num_threads(fastll.get_num_threads())
    x, labels = (torch.from_numpy(a) for a in _logits(shape))
    plain = x.to(getattr(torch, dtype))
    first = plain.clone().requires_grad_() if gradient else plain

    def call(function: Callable[..., Any]) -> Any:
        loss = function(first, labels)
        return (loss.detach(), *torch.autograd.grad(loss, first)) if gradient else loss

    rivals = {"torch": partial(call, functional.cross_entropy)}
    if compiled:
        torch._dynamo.reset()  # otherwise it runs uncompiled after eight shapes
        rivals["torch.compile"] = partial(call, torch.compile(functional.cross_entropy, dynamic=False))
    if shape == SMALL:
        rivals[PLAIN] = partial(fastll.cross_entropy, plain, labels, return_grad=gradient)
    return Made(partial(call, adapter.cross_entropy), rivals)


def jax(quick: bool) -> Iterator[Task]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            for variant in VARIANTS:
                targets: dict[str, Target] = {"optax": ("faster", 4.0)} if _is_large(shape) else {}
                make = partial(_jax, shape, dtype, variant == "gradient")
                operation = "softmax_cross_entropy_with_integer_labels"
                yield Task("jax", operation, variant, shape, dtype, make, targets)


def _jax(shape: tuple[int, ...], dtype: str, gradient: bool) -> Made:
    import jax
    import optax

    from fastll.interop import jax as adapter

    x, labels = map(jax.numpy.asarray, _logits(shape, dtype))

    def bound(function: Callable[..., Any]) -> Call:
        def mean(x: Any) -> Any:
            return function(x, labels).mean()

        compiled = jax.jit(jax.value_and_grad(mean) if gradient else mean)
        return lambda: jax.block_until_ready(compiled(x))

    rivals = {"optax": bound(optax.softmax_cross_entropy_with_integer_labels)}
    return Made(bound(adapter.softmax_cross_entropy_with_integer_labels), rivals)


def dask(quick: bool) -> Iterator[Task]:
    large, _, short = QUICK_SHAPES if quick else SHAPES
    for shape in (large, short):
        for operation, variant in (("logsumexp", "value"), *(("cross_entropy", v) for v in VARIANTS)):
            make = partial(_dask, shape, operation, variant == "gradient")
            targets: dict[str, Target] = {PLAIN: ("faster", 1 / 1.3)}
            yield Task("dask", operation, variant, shape, "float32", make, targets)


def _dask(shape: tuple[int, ...], operation: str, gradient: bool) -> Made:
    import dask
    import dask.array

    from fastll.interop import dask as adapter

    x, labels = _logits(shape)
    rows = math.ceil(shape[0] / 8)
    lazy = dask.array.from_array(x, (rows, shape[1]))
    lazy_labels = dask.array.from_array(labels, rows)
    how = {"scheduler": "threads", "num_workers": fastll.get_num_threads()}
    compute = partial(dask.compute, **how)

    def own() -> Any:
        m = lazy.max(axis=1, keepdims=True)
        return compute((m + dask.array.log(dask.array.exp(lazy - m).sum(axis=1, keepdims=True)))[:, 0])[
            0
        ]

    def call() -> Any:
        if operation == "logsumexp":
            return compute(adapter.logsumexp(lazy, axis=1))[0]
        if not gradient:
            return compute(adapter.cross_entropy(lazy, lazy_labels))[0]
        # in chunks, as a gradient is used where arrays are
        return dask.persist(*adapter.cross_entropy(lazy, lazy_labels, return_grad=True), **how)

    if operation == "logsumexp":
        return Made(call, {PLAIN: partial(fastll.logsumexp, x, axis=1), "dask": own})
    return Made(call, {PLAIN: partial(fastll.cross_entropy, x, labels, return_grad=gradient)})


def sklearn(quick: bool) -> Iterator[Task]:
    # the matrix of labels that scikit-learn makes of the large shape would take a gigabyte
    for shape in (SMALL, SHORT):
        for dtype in ("float32", "float64"):
            own: dict[str, Target] = {"scikit-learn": ("faster", 5.0)}
            yield Task(
                "sklearn", "log_loss", "value", shape, dtype, partial(_log_loss, shape, dtype), own
            )
    # both stop at a tolerance, at different points
    for shape in ((1797, 64, 10), *(() if quick else ((100000, 100, 20),))):
        same: dict[str, Target] = {"scikit-learn": ("faster", 1.0)}
        make = partial(_regression, shape)
        yield Task("sklearn", "SoftmaxRegression", "fit", shape, "float64", make, same, 0.01)


def _log_loss(shape: tuple[int, ...], dtype: str) -> Made:
    from sklearn import metrics

    from fastll.interop import sklearn as adapter

    x, labels = _logits(shape, dtype)
    arguments = labels, fastll.softmax(x)
    every = np.arange(shape[1])
    rivals = {"scikit-learn": partial(metrics.log_loss, *arguments, labels=every)}
    return Made(partial(adapter.log_loss, *arguments, labels=every), rivals)


def _regression(shape: tuple[int, ...]) -> Made:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    from fastll.interop import sklearn as adapter

    if shape == (1797, 64, 10):
        x, y = load_digits(return_X_y=True)
        x /= 16
    else:
        rows, features, classes = shape
        rng = np.random.default_rng(0)
        x = rng.standard_normal((rows, features))
        scores = x @ rng.standard_normal((features, classes)) / math.sqrt(features)
        y = (scores + rng.gumbel(size=scores.shape)).argmax(axis=1)
    options = {"C": 1.0, "tol": 1e-4, "max_iter": 1000}
    ours = adapter.SoftmaxRegression(**options)
    own = LogisticRegression(solver="lbfgs", **options)
    return Made(lambda: ours.fit(x, y).coef_, {"scikit-learn": lambda: own.fit(x, y).coef_})


class _Data:
    """What objectives ask a data set of XGBoost or LightGBM for."""

    def __init__(self, labels: Array) -> None:
        self.labels = labels.astype(np.float32)

    def get_label(self) -> Array:
        return self.labels

    def get_weight(self) -> None:
        return None


def _boosting(framework: str, dtype: str) -> Iterator[Task]:
    for operation, shape in (("softmax", SHORT), ("softmax", SMALL), ("logistic", MANY)):
        make = partial(_objective, framework, operation, shape, dtype)
        name = f"{operation} objective"
        # derivatives are float32
        yield Task(framework, name, "derivatives", shape, dtype, make, tolerance=1e-5)


def xgboost(quick: bool) -> Iterator[Task]:
    return _boosting("xgboost", "float32")


def lightgbm(quick: bool) -> Iterator[Task]:
    return _boosting("lightgbm", "float64")


def _objective(framework: str, operation: str, shape: tuple[int, ...], dtype: str) -> Made:
    adapter = import_module(f"fastll.interop.{framework}")
    names = {"logistic": "BinaryLogistic" if framework == "xgboost" else "Binary", "softmax": "Softmax"}
    classes = shape[1] if operation == "softmax" else 2
    x, labels = _logits((shape[0], classes), dtype)
    if operation == "logistic":
        x = x[:, 0].copy()
    if framework == "lightgbm":
        x = np.asfortranarray(x)
    factor = 2 if framework == "xgboost" else classes / (classes - 1)
    numpy = {"softmax": partial(_numpy_softmax, factor), "logistic": _numpy_logistic}
    rivals = {"numpy": partial(numpy[operation], x, _Data(labels))}
    return Made(partial(getattr(adapter, names[operation])(), x, _Data(labels)), rivals)


def _numpy_softmax(factor: float, predictions: Array, data: _Data) -> tuple[Array, Array]:
    labels = data.get_label().astype(int)
    p = np.exp(predictions - predictions.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    gradient = p.copy()
    gradient[np.arange(len(labels)), labels] -= 1
    return gradient, np.maximum(factor * p * (1 - p), 1e-16)


def _numpy_logistic(predictions: Array, data: _Data) -> tuple[Array, Array]:
    p = 1 / (1 + np.exp(-predictions))
    return p - data.get_label(), np.maximum(p * (1 - p), 1e-16)


def scipy(quick: bool) -> Iterator[Task]:
    yield from _hmm("scipy", "python", quick, 12.0)


def numba(quick: bool) -> Iterator[Task]:
    targets: dict[str, Target] = {"numba": ("seconds", 100e-9)}
    yield Task("numba", "logsumexp", "njit", (STATES,), "float64", _numba_logsumexp, targets)
    yield from _hmm("numba", "njit", quick, 300.0)


def _hmm(framework: str, variant: str, quick: bool, faster: float) -> Iterator[Task]:
    shape = (QUICK_STEPS if quick else STEPS, STATES)
    make = partial(_forward_pass, shape[0], variant == "njit")
    targets: dict[str, Target] = {"scipy": ("faster", faster)}
    yield Task(framework, "HMM forward pass", variant, shape, "float64", make, targets)


def _model(steps: int) -> tuple[Array, Array]:
    """Logarithms of the probabilities of transitions, by state that is reached, and of observations."""
    rng = np.random.default_rng(0)
    transitions = np.log(rng.dirichlet(np.ones(STATES), STATES)).T.copy()
    return transitions, np.log(rng.random((steps, STATES)))


def _forward(logsumexp: Callable[[Array], Any], transitions: Array, observed: Array) -> Any:
    """Log-likelihood of what was observed, from equal initial probabilities."""
    alpha = observed[0] - np.log(observed.shape[1])
    after = np.empty_like(alpha)
    for t in range(1, observed.shape[0]):
        for state in range(observed.shape[1]):
            after[state] = logsumexp(alpha + transitions[state]) + observed[t, state]
        alpha[:] = after
    return logsumexp(alpha)


def _forward_pass(steps: int, compiled: bool) -> Made:
    import scipy.special

    model = _model(steps)
    rivals = {"scipy": partial(_forward, scipy.special.logsumexp, *model)}
    if compiled:
        return Made(partial(_compiled()["forward"], *model), rivals)
    return Made(partial(_forward, fastll.logsumexp, *model), rivals)


def _numba_logsumexp() -> Made:
    rows = np.random.default_rng(0).standard_normal((10000, STATES))
    calls = {name: partial(_compiled()[name], rows) for name in ("fastll", "numba")}
    return Made(calls.pop("fastll"), calls, len(rows))


@cache
def _compiled() -> dict[str, Callable[..., Any]]:
    """Functions of a user of Numba: a forward pass, and a sum over rows, by fastll and written out."""
    from numba import njit

    lse = fastll.logsumexp

    @njit
    def ours(x):  # type: ignore[no-untyped-def]
        return lse(x)

    @njit
    def written_out(x):  # type: ignore[no-untyped-def]
        m = x.max()
        return m + np.log(np.exp(x - m).sum())

    def over_rows(logsumexp: Callable[[Array], Any]) -> Callable[..., Any]:
        @njit
        def total(rows):  # type: ignore[no-untyped-def]
            result = 0.0
            for i in range(len(rows)):
                result += logsumexp(rows[i])
            return result

        return total  # type: ignore[no-any-return]

    forward = njit(_forward)
    return {
        "fastll": over_rows(ours),
        "numba": over_rows(written_out),
        "forward": lambda *model: forward(ours, *model),
    }


#: Tasks of each framework, and the packages whose versions are reported.
FRAMEWORKS: dict[str, Callable[[bool], Iterator[Task]]] = {
    "torch": torch,
    "jax": jax,
    "dask": dask,
    "sklearn": sklearn,
    "xgboost": xgboost,
    "lightgbm": lightgbm,
    "numba": numba,
    "scipy": scipy,
}
PACKAGES = (
    "torch",
    "jax",
    "optax",
    "dask",
    "scikit-learn",
    "xgboost",
    "lightgbm",
    "numba",
    "scipy",
    "numpy",
)


def why_not(framework: str) -> str | None:
    """Why the adapter cannot be imported; None if it can. Users of SciPy need none."""
    if framework == "scipy":
        return None
    try:
        import_module(f"fastll.interop.{framework}")
    except ImportError as error:
        return str(error)
    return None
