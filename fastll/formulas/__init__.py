"""The formulas, once: plain Python functions that every compiled backend shares.

For a formula of your own (`fastll.elementwise_loss`) there are, with any numbers x:

* ``+ - * /``, ``fma(a, b, c)`` = a b + c rounded once, ``product(a, b)`` = a b but 0 where a is 0;
* ``exp(x)``, ``log(x)``, ``log1p(x)``, ``sigmoid(x)``, ``log_sigmoid(x)``, and ``softcap(x, cap)``,
  which returns both cap tanh(x / cap) and its derivative;
* ``absolute(x)``, ``maximum(a, b)``;
* ``where_gt(a, b, x, y)``, ``where_ge``, ``where_eq``: x where a > b (a >= b, a == b), else y.

Inside, `maths` has what formulas are made of, `elements` and `rows` the operations, `constants` every
coefficient, `vocabulary` the operations that the text may use. A text consists of assignments to new
names (tuples may be unpacked), calls, ``+ - * /``, constants (with a minus or without) and a final
return; no branch, loop or literal. `bind` compiles the texts for a target of Numba,
`fastll.formulas.cpp` translates them into C++ for Cython, and `fastll.formulas.own` makes texts of
users' formulas. The NumPy reference and the tests' oracle do not use them: they check them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from fastll.formulas import elements, maths, rows
from fastll.formulas.elements import log_sigmoid, sigmoid
from fastll.formulas.maths import exp, log, log1p, product, softcap
from fastll.formulas.vocabulary import absolute, fma, maximum, where_eq, where_ge, where_gt

#: What formulas of users are written in, and the number of its results.
OPERATIONS = {
    "absolute": 1,
    "exp": 1,
    "fma": 1,
    "log": 1,
    "log1p": 1,
    "log_sigmoid": 1,
    "maximum": 1,
    "product": 1,
    "sigmoid": 1,
    "softcap": 2,
    "where_eq": 1,
    "where_ge": 1,
    "where_gt": 1,
}

__all__ = [
    "absolute",
    "exp",
    "fma",
    "log",
    "log1p",
    "log_sigmoid",
    "maximum",
    "product",
    "sigmoid",
    "softcap",
    "where_eq",
    "where_ge",
    "where_gt",
]


class Element(NamedTuple):
    """An element-wise operation; see `fastll.formulas.elements`."""

    formula: Any  # a function
    inputs: int = 1
    parameters: int = 0
    slope: bool = False  # returns (value, slope)
    log1p: bool = False  # returns (value, e, slope), where log1p(e) is still to be added to the value
    helpers: tuple[FunctionType, ...] = ()  # functions of a user's that the formula calls


class Terms(NamedTuple):
    """A fold of rows whose value is the sum of a term of each element; see `fastll.formulas.rows`."""

    formula: Callable[..., Any]
    inputs: int = 1


#: Element-wise operations by name. Their order is that of the codes that Cython's kernels are told.
ELEMENTS = {
    "outside": Element(elements.outside, parameters=2),
    "sigmoid": Element(elements.sigmoid),
    "log_sigmoid": Element(elements.log_sigmoid),
    "binary_cross_entropy_with_logits": Element(
        elements.binary_cross_entropy_with_logits, inputs=2, slope=True, log1p=True
    ),
    "binary_cross_entropy_with_logits_pos_weight": Element(
        elements.binary_cross_entropy_with_logits_pos_weight, inputs=3, slope=True
    ),
    "gaussian_nll": Element(elements.gaussian_nll, inputs=3, parameters=2, slope=True),
    "mse": Element(elements.mse, inputs=2, slope=True),
    "binary_cross_entropy": Element(elements.binary_cross_entropy, inputs=2, slope=True),
    "poisson_nll": Element(elements.poisson_nll, inputs=2, slope=True),
    "poisson_nll_full": Element(elements.poisson_nll_full, inputs=2, slope=True),
    "poisson_nll_of_rate": Element(elements.poisson_nll_of_rate, inputs=2, parameters=1, slope=True),
    "poisson_nll_of_rate_full": Element(
        elements.poisson_nll_of_rate_full, inputs=2, parameters=1, slope=True
    ),
    "sigmoid_focal_loss": Element(elements.sigmoid_focal_loss, inputs=2, parameters=3, slope=True),
    "kl_div": Element(elements.kl_div, inputs=2, slope=True),
    "kl_div_log_target": Element(elements.kl_div_log_target, inputs=2, slope=True),
}

#: Those that users have made, by names that their texts decide: see `fastll.formulas.own`.
OWN: dict[str, Element] = {}

#: Folds that are sums of terms, by name, likewise.
TERMS = {
    "sum": Terms(rows.itself),
    "entropy": Terms(rows.entropy),
    "kl_divergence": Terms(rows.kl_divergence, inputs=2),
    "distribution_cross_entropy": Terms(rows.distribution_cross_entropy, inputs=2),
}


def element(operation: str) -> Element:
    """The row of an element-wise operation, built in or a user's."""
    return ELEMENTS.get(operation) or OWN[operation]


def texts(*modules: ModuleType) -> list[FunctionType]:
    """The formulas of modules (all of them by default), each after those that it calls."""
    return [
        function
        for module in modules or (maths, elements, rows)
        for function in vars(module).values()
        if isinstance(function, FunctionType) and function.__module__ == module.__name__
    ]


def bind(
    operations: Mapping[str, Any],
    compiled: Callable[[FunctionType], Any],
    functions: list[FunctionType] | None = None,
) -> SimpleNamespace:
    """The formulas with the operations of a target as their globals, each `compiled` for it.

    An operation that has the name of a formula takes its place, in the formulas that call it too.
    """
    names = dict(operations)
    for function in texts() if functions is None else functions:
        if function.__name__ not in operations:
            names[function.__name__] = compiled(
                FunctionType(function.__code__, names, function.__name__)
            )
    return SimpleNamespace(**names)


def formula_of(
    row: Element, bound: Mapping[str, Any], compiled: Callable[[FunctionType], Any]
) -> Callable[..., Any]:
    """The formula of an element-wise operation among those that `bind` returned, or bound to them."""
    name = row.formula.__name__
    if name not in bound:
        bound = vars(bind(bound, compiled, [*row.helpers, row.formula]))
    found: Callable[..., Any] = bound[name]
    return found
