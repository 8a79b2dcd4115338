"""Checks that the tests of fastll use, for your own losses too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def gradcheck(
    f: Callable[[Any], tuple[Any, Any]],
    x: ArrayLike,
    *,
    step: float = 1e-4,
    rtol: float = 1e-6,
    atol: float = 1e-8,
) -> bool:
    r"""Check an analytic gradient against central differences.

    .. math:: \partial_i L(x) \approx
        \frac{8 (L(x + h e_i) - L(x - h e_i)) - (L(x + 2 h e_i) - L(x - 2 h e_i))}{12 h}

    The truncation error is of order :math:`h^4`, the rounding error :math:`\epsilon |L| / h`. With a
    step of 1e-4 both are below the default tolerances if L and its derivatives are near 1.

    Parameters
    ----------
    f : callable
        ``f(x)`` returns the loss and its gradient with respect to x. A loss that is an array is summed.
    x : array_like
        The point at which to check; finite. It is converted to float64.
    step, rtol, atol : float
        The step h, and tolerances as in `numpy.testing.assert_allclose`.

    Returns
    -------
    bool
        Always True: a wrong gradient raises.

    Raises
    ------
    AssertionError
        If an entry differs by more than ``atol + rtol * abs(difference quotient)``, or if the gradient
        does not have the shape of x.
    ValueError
        If `x` is not finite.

    Examples
    --------
    >>> from fastll import cross_entropy
    >>> from fastll.testing import gradcheck
    >>> x = [[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]]
    >>> gradcheck(lambda x: cross_entropy(x, [2, 0], return_grad=True), x)
    True
    """
    x = np.asarray(x).astype(np.float64)
    if not np.all(np.isfinite(x)):
        raise ValueError("x is not finite; expected an array of finite numbers")
    gradient = np.asarray(f(x.copy())[1]).astype(np.float64)
    if gradient.shape != x.shape:
        raise AssertionError(f"the gradient has shape {gradient.shape}; expected that of x, {x.shape}")

    def loss_at(index: tuple[int, ...], offset: float) -> float:
        shifted = x.copy()
        shifted[index] += offset
        return float(np.sum(np.asarray(f(shifted)[0])))

    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        near = loss_at(index, step) - loss_at(index, -step)
        far = loss_at(index, 2 * step) - loss_at(index, -2 * step)
        numeric[index] = (8 * near - far) / (12 * step)
    np.testing.assert_allclose(
        gradient, numeric, rtol=rtol, atol=atol, err_msg="gradient differs from central differences"
    )
    return True
