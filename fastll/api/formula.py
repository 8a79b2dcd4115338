"""Losses made of formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from numpy.typing import ArrayLike

from fastll.adapted import again
from fastll.api import check_reduction, number
from fastll.arrays import Array
from fastll.calls import Call
from fastll.formulas import ELEMENTS, OWN

#: What every loss takes besides the arguments of its formula, and the defaults.
OPTIONS = {"weight": None, "reduction": "mean", "return_grad": False, "grad_out": None}

_BUILT_IN = {row.formula: (name, row) for name, row in ELEMENTS.items() if row.slope}


class ElementwiseLoss:
    """A loss made by `elementwise_loss`: called as its signature says, like every loss of fastll.

    Attributes
    ----------
    formula : function
        What it was made of.
    """

    def __init__(self, formula: Callable[..., Any]) -> None:
        self.formula = formula
        names: tuple[str, ...]
        defaults: dict[str, Any] = {}
        if formula in _BUILT_IN:
            self.operation, row = _BUILT_IN[formula]
            names = formula.__code__.co_varnames
        else:
            from fastll.formulas import own  # which only those need who have formulas

            self.operation, row, names, defaults = own.read(formula)
            OWN[self.operation] = row
        count = row.inputs + row.parameters
        self._operands, self._parameters = names[: row.inputs], names[row.inputs : count]
        for name in names[:count]:
            if name in OPTIONS:
                raise TypeError(f"the formula has an argument {name}; every loss has one, of its own")
        self._defaults, self._keywords = defaults | OPTIONS, {*self._parameters, *OPTIONS}
        keywords = dict.fromkeys(self._parameters, Parameter.empty) | self._defaults
        self.__signature__ = Signature(
            [
                *(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in self._operands),
                *(Parameter(k, Parameter.KEYWORD_ONLY, default=v) for k, v in keywords.items()),
            ]
        )
        self.__name__, self.__qualname__ = formula.__name__, formula.__qualname__
        self.__module__, self.__doc__ = formula.__module__, formula.__doc__

    def __repr__(self) -> str:
        return f"<loss {self.__module__}.{self.__qualname__}{self.__signature__}>"

    def __reduce__(self) -> Any:
        """By name where the name is the loss's, else by the formula's."""
        found: Any = sys.modules.get(self.__module__)
        for name in self.__qualname__.split("."):
            found = getattr(found, name, None)
        return self.__qualname__ if found is self else (ElementwiseLoss, (self.formula,))

    def __call__(self, *operands: ArrayLike, **keywords: Any) -> Any:
        return again(self._call, operands, keywords)

    def _call(self, *operands: ArrayLike, **keywords: Any) -> Any:
        options = self._defaults | keywords
        if len(operands) != len(self._operands) or options.keys() != self._keywords:
            # operands by name, or a mistake, which this raises
            bound = self.__signature__.bind(*operands, **keywords)
            bound.apply_defaults()
            operands, options = bound.args, bound.kwargs
        call = self.begin(operands[0], self._operands[0])
        others = tuple(map(call.take, operands[1:], self._operands[1:]))
        parameters = tuple(number(options[name], name) for name in self._parameters)
        given = (options[name] for name in OPTIONS)
        return self.finish(call, others, parameters, *given)

    def begin(self, x: ArrayLike, name: str) -> Call:
        """A call of the first array, whatever it is called."""
        return Call(self.operation, x, name)

    def finish(
        self,
        call: Call,
        others: tuple[Array, ...],
        parameters: tuple[float, ...],
        weight: ArrayLike | None,
        reduction: str,
        return_grad: bool,
        grad_out: Any,
    ) -> Any:
        """Run a call with the other arrays, of the first one's shape."""
        x = call.x
        w = None if weight is None else call.take(weight, "weight")
        count = x.size if check_reduction(reduction) == "mean" else None
        grad, scale = None, 1.0
        if return_grad or grad_out is not None:
            grad = call.output(grad_out, "grad_out", (*others, w))
            scale = 1 / count if count else 1.0
        loss = call.place.empty_like(x, call.compute) if reduction == "none" else None
        backend = call.backend
        sums = call.map(backend, (x, *others), loss, grad, w, parameters, scale)
        if sums is not None:
            loss = backend.total(sums, count, call.compute)
        return call.results(loss, None, grad, return_grad, grad_out)


def elementwise_loss(formula: Callable[..., Any]) -> ElementwiseLoss:
    r"""A loss of your own: an element-wise function made of a formula for one element.

    The formula takes the operands of an element, and keyword-only parameters; it returns the loss of
    the element and its slope, the derivative with respect to the first operand. What is made of it is
    like the losses of fastll: any dtype, shape and strides, in one pass, on threads and on GPUs.

    Parameters
    ----------
    formula : function
        Made by ``def``, of assignments to names, the operators ``+ - * /``, numbers (also by name, with
        the values of now), calls of what `fastll.formulas` has (``exp``, ``log``, ``where_gt``, ...)
        and of other functions like it, and a return at its end. It is read, not called: there are no
        branches, and both alternatives of a ``where_gt`` are computed. A number has the dtype that is
        computed in, and widens nothing.

    Returns
    -------
    loss : callable
        ``loss(*operands, **parameters, weight=None, reduction="mean", return_grad=False,
        grad_out=None)``, with options and results as for `binary_cross_entropy_with_logits`. The
        gradient is with respect to the first operand, to whose shape the others and `weight` broadcast.
        Parameters are finite numbers; one with a default may be left out. A loss can be pickled if its
        formula can be imported.

    Raises
    ------
    SyntaxError
        If the formula has something else, with the file and the line.
    TypeError
        If it is no function, or its source cannot be read.

    Notes
    -----
    On the CPU Numba compiles a loss at its first call, and keeps it on disk by what the formula says;
    without Numba, or by ``use_backend("numpy")``, NumPy evaluates it in float64. The cython backend has
    what was there when it was built, and raises `NotImplementedError`.

    `fastll.testing.gradcheck` tells whether the slope is right.

    Examples
    --------
    >>> import fastll
    >>> from fastll.formulas import absolute, where_gt
    >>> @fastll.elementwise_loss
    ... def huber(x, target, *, delta=1.0):
    ...     d = x - target
    ...     far = absolute(d) - delta
    ...     sign = where_gt(d, 0, delta, -delta)
    ...     return where_gt(far, 0, delta * (far + delta / 2), d * d / 2), where_gt(far, 0, sign, d)
    >>> loss, grad = huber([0.0, 3.0], [0.5, 0.0], delta=2.0, reduction="none", return_grad=True)
    >>> loss, grad
    (array([0.125, 4.   ]), array([-0.5,  2. ]))
    >>> x, t = [0.1, 3.0, -2.0], [0.5, 0.0, 1.0]
    >>> fastll.testing.gradcheck(lambda x: huber(x, t, return_grad=True), x)
    True
    """
    return ElementwiseLoss(formula)
