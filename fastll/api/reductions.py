"""Log-sum-exp, softmax, sigmoid, and entropies of distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastll import calls, direct
from fastll.adapted import adapted
from fastll.api import number
from fastll.arrays import Array, Axis, axes_of, broadcast, kept_shape
from fastll.calls import Call
from fastll.contract import DEFAULTS, Fold, Options, new
from fastll.dtypes import kind_of, rounded


@adapted
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    out: Array | None = None,
) -> Any:
    r"""Logarithm of the sum of exponentials, in one read of the array.

    .. math:: \log \sum_j b_j \exp(a_j) = m + \log \sum_j b_j \exp(a_j - m), \quad m = \max_j a_j

    computed as ``m + log1p(sum over the others)``, so that it keeps its digits where one element
    dominates. The signature and the special values are SciPy's.

    Parameters
    ----------
    a : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    axis : int, tuple of int or None
        Axes to reduce over; None means all.
    b : array_like, optional
        Weights; `a` and `b` broadcast to one shape. An element whose weight is 0 is ignored, even if it
        is inf or NaN. An infinite weight makes the sum infinite, or NaN at an exponential of 0; a NaN
        makes it NaN. A Python number has the dtype of `a`.
    keepdims : bool
        Keep the reduced axes in the result, with size 1.
    return_sign : bool
        Also return the sign of the sum; the result is then the logarithm of its magnitude. Without
        it, a negative sum gives NaN.
    out : array, optional
        Output array of the result's shape and, except on a GPU, of any dtype it can be cast to.

    Returns
    -------
    res : array or scalar
        float64 if `a` or `b` is of float64 or of integers, else float32. -inf if there are no elements,
        +inf if one is +inf, NaN if one is NaN.
    sgn : array or scalar
        -1, 0 or 1 (NaN if `res` is); only if `return_sign`.

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string; if `axis` is not an integer.
    ValueError
        If an axis is out of bounds or repeated; if shapes or devices do not match; if `out` cannot be
        written.

    See Also
    --------
    LogSumExp : the same over chunks, processes or machines.

    References
    ----------
    P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
    functions", IMA Journal of Numerical Analysis 41 (2021). `scipy.special.logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import logsumexp
    >>> float(logsumexp([1000.0, 1000.0]))
    1000.6931471805599
    >>> float(logsumexp([0.0, -40.0]))
    4.248354255291589e-18
    >>> logsumexp(np.zeros((2, 4), np.float32), axis=1)
    array([1.3862944, 1.3862944], dtype=float32)
    >>> log_difference, sign = logsumexp([1.0, 2.0], b=[1.0, -1.0], return_sign=True)
    >>> float(log_difference), float(sign)
    (1.541324854612918, -1.0)
    """
    if b is None and out is None and not (keepdims or return_sign):
        found = direct.fold("logsumexp", (a,), axis)
        if found is not None:
            return found
    call = Call("logsumexp", a, "a")
    x, place = call.x, call.place
    weights = None
    if b is not None:
        if isinstance(b, int | float) and not isinstance(b, np.generic):
            b = np.asarray(b, call.compute)  # as for NumPy, a number has no dtype of its own
        weights = place.take(b, "b")
        # what is computed in is the wider of the two, so that no weight is rounded
        call.compute = np.result_type(call.compute, kind_of(weights.dtype).compute)
        try:
            shape = np.broadcast_shapes(x.shape, weights.shape)
        except ValueError:
            raise ValueError(
                f"b has shape {weights.shape}; expected one that broadcasts with {x.shape}"
            ) from None
        x, weights = broadcast(x, shape, "a"), broadcast(weights, shape, "b")
    if x.ndim == 0:
        x, weights = x.reshape(1), None if weights is None else weights.reshape(1)
    axes = axes_of(axis, x.ndim)
    shape = kept_shape(x.shape, axes, keepdims)
    output = None
    if out is not None:
        output = place.output(out, "out", shape, call.compute, (x, weights), cast=place.on_cpu)
    # the kernels of a GPU write `out` itself; on the CPU it may have another dtype
    result = place.empty(shape, call.compute) if output is None or place.on_cpu else output
    sign = place.empty(shape, call.compute) if return_sign else None
    lse, signs = result, sign
    if keepdims:  # the rows are what is left without the axes of one entry
        at = (*(0 if i in axes else slice(None) for i in range(x.ndim)), ...)
        lse, signs = result[at], None if sign is None else sign[at]
    calls.fold(call.backend, place, Fold("logsumexp", x, weights, lse=lse, sign=signs), axes)
    if output is not None and output is not result:
        np.copyto(output, rounded(result, output.dtype))
    returned = place.give(result) if out is None else out
    return returned if sign is None else (returned, place.give(sign))


@adapted
def softmax(x: ArrayLike, axis: Axis = -1, *, out: Array | None = None) -> Any:
    r"""Softmax over the last axis (where SciPy takes all axes), in one read and one write.

    .. math:: p_j = \exp(x_j - m) / \sum_i \exp(x_i - m), \quad m = \max_i x_i

    Parameters
    ----------
    x : array_like
        Any shape and strides, scalars too; float16, bfloat16, float32, float64; integers and bools
        as float64.
    axis : int, tuple of int or None
        Axes over which the probabilities sum to one; None means all.
    out : array, optional
        Output array of the result's shape and dtype; may be `x` itself.

    Returns
    -------
    array or scalar
        Same shape and dtype as `x` (float64 for integers). The probability of -inf is 0. A row that
        contains NaN or whose maximum is infinite is NaN.

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string, or that of `out` is not the result's.
    ValueError
        If an axis is out of bounds or repeated; if `out` cannot be written.

    References
    ----------
    `scipy.special.softmax`; Blanchard, Higham and Higham (2021), see `logsumexp`.

    Examples
    --------
    >>> from fastll import softmax
    >>> softmax([0.0, 0.0, float("-inf")])
    array([0.5, 0.5, 0. ])
    """
    return _softmax("softmax", x, axis, out)


@adapted
def log_softmax(x: ArrayLike, axis: Axis = -1, *, out: Array | None = None) -> Any:
    r"""Logarithm of the softmax over the last axis (where SciPy takes all axes).

    One read and one write.

    .. math:: \log p_j = (x_j - m) - \log \sum_i \exp(x_i - m), \quad m = \max_i x_i

    Both parts are at most 0, and the second has the log1p form: nothing cancels.

    Parameters
    ----------
    x, axis, out
        As for `softmax`, like the errors.

    Returns
    -------
    array or scalar
        Same shape and dtype as `x` (float64 for integers). The result for -inf is -inf; a row that
        contains NaN, or only -inf, is NaN.

    References
    ----------
    `scipy.special.log_softmax`; Blanchard, Higham and Higham (2021), see `logsumexp`.

    Examples
    --------
    >>> from fastll import log_softmax
    >>> log_softmax([1000.0, 0.0])
    array([    0., -1000.])
    """
    return _softmax("log_softmax", x, axis, out)


def _softmax(operation: str, x: ArrayLike, axis: Axis, out: Array | None) -> Any:
    if (found := direct.fold(operation, (x,), axis, 1.0, out)) is not None:
        return found
    call = Call(operation, x, "x")
    result = call.output(out, "out")
    full, target = (call.x, result) if call.x.ndim else (call.x.reshape(1), result.reshape(1))
    axes = axes_of(axis, full.ndim)
    if full.size:
        fields = (operation, full, None, None, None, None, DEFAULTS, *[None] * 5, target)
        calls.fold(call.backend, call.place, new(Fold, fields), axes)
    return call.place.give(result) if out is None else out


@adapted
def entropy(p: ArrayLike, axis: Axis = -1, base: float | None = None) -> Any:
    r"""Entropy of distributions over the last axis, in one read.

    .. math:: H = -\sum_j p_j \log p_j

    where 0 log 0 is 0. Nothing is normalised: p need not sum to one.

    Parameters
    ----------
    p : array_like
        As `x` of `softmax`.
    axis : int, tuple of int or None
        Axes to sum over; None means all.
    base : float, optional
        Base of the logarithm, which gives the unit: 2 for bits; None for the natural one, nats.

    Returns
    -------
    array or scalar
        float64 for float64 and integer `p`, float32 for all others. A negative p makes it -inf.

    Raises
    ------
    TypeError, ValueError
        As for `softmax`; if `base` is not a positive number, or 1.

    References
    ----------
    `scipy.special.entr`, whose terms these are; `scipy.stats.entropy` normalises p first.

    Examples
    --------
    >>> from fastll import entropy
    >>> entropy([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], base=2)
    array([1. , 1.5])
    """
    return _sum_of_terms("entropy", (p,), axis, base)


@adapted
def kl_divergence(p: ArrayLike, q: ArrayLike, axis: Axis = -1, base: float | None = None) -> Any:
    r"""Kullback-Leibler divergence of q from p over the last axis, each read once.

    .. math:: D(p \| q) = \sum_j p_j \log (p_j / q_j)

    where p = 0 contributes 0 and p > 0 with q = 0 makes it inf. Nothing is normalised. The logarithm is
    accurate to its last digits where p is next to q, too, and where p / q is no number of the dtype.

    Parameters
    ----------
    p : array_like
        As `x` of `softmax`.
    q : array_like
        Broadcasts to the shape of `p`, and is computed with in the same dtype.
    axis, base
        As for `entropy`, like the errors.

    Returns
    -------
    array or scalar
        float64 for float64 and integer `p`, float32 for all others. A negative p or q makes it inf.

    References
    ----------
    `scipy.special.rel_entr`, whose terms these are.

    Examples
    --------
    >>> from fastll import kl_divergence
    >>> kl_divergence([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], [[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]], base=2)
    array([ 1., inf])
    """
    return _sum_of_terms("kl_divergence", (p, q), axis, base)


@adapted
def distribution_cross_entropy(
    p: ArrayLike, q: ArrayLike, axis: Axis = -1, base: float | None = None
) -> Any:
    r"""Cross-entropy of two distributions over the last axis, each read once.

    .. math:: H(p, q) = -\sum_j p_j \log q_j = H(p) + D(p \| q)

    the sum of `entropy` and `kl_divergence`, to rounding: p = 0 contributes 0 and p > 0 with q = 0
    makes it inf. It is what the code of q takes for data of p. Nothing is normalised.

    Parameters
    ----------
    p, q, axis, base
        As for `kl_divergence`, like the errors.

    Returns
    -------
    array or scalar
        float64 for float64 and integer `p`, float32 for all others. A negative q makes it inf; a
        negative p makes it NaN, the sum of an entropy of -inf and a divergence of inf.

    See Also
    --------
    dense_cross_entropy : that of a distribution and the softmax of logits.

    Examples
    --------
    >>> from fastll import distribution_cross_entropy
    >>> distribution_cross_entropy([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], base=2)
    np.float64(2.0)
    """
    return _sum_of_terms("distribution_cross_entropy", (p, q), axis, base)


def _sum_of_terms(operation: str, inputs: tuple[ArrayLike, ...], axis: Axis, base: float | None) -> Any:
    scale = 1.0 if base is None else math.log(number(base, "base", 0.0, above=True))
    if scale == 0.0:
        raise ValueError("base is 1; expected a positive number other than 1")
    if (found := direct.fold(operation, inputs, axis, 1 / scale)) is not None:
        return found
    call = Call(operation, inputs[0], "p")
    x, second = call.x, call.take(inputs[1], "q") if len(inputs) == 2 else None
    if x.ndim == 0:
        x, second = x.reshape(1), None if second is None else second.reshape(1)
    axes = axes_of(axis, x.ndim)
    value = call.place.empty(kept_shape(x.shape, axes), call.compute)
    fold = Fold(call.operation, x, second, options=Options(scale=1 / scale), value=value)
    calls.fold(call.backend, call.place, fold, axes)
    return call.place.give(value)


@adapted
def sigmoid(x: ArrayLike, *, out: Array | None = None) -> Any:
    r"""Logistic sigmoid, accurate in both tails.

    .. math:: \sigma(x) = 1 / (1 + \exp(-x))

    Parameters
    ----------
    x, out
        As for `softmax`, like the errors.

    Returns
    -------
    array or scalar
        Same shape and dtype as `x` (float64 for integers).

    References
    ----------
    `scipy.special.expit`.

    Examples
    --------
    >>> from fastll import sigmoid
    >>> sigmoid([-1000.0, -40.0, 0.0])
    array([0.00000000e+00, 4.24835426e-18, 5.00000000e-01])
    """
    return _elementwise("sigmoid", x, out)


@adapted
def log_sigmoid(x: ArrayLike, *, out: Array | None = None) -> Any:
    r"""Logarithm of the logistic sigmoid, accurate in both tails.

    .. math:: \log \sigma(x) = \min(x, 0) - \operatorname{log1p}(\exp(-|x|))

    Parameters
    ----------
    x, out
        As for `softmax`, like the errors.

    Returns
    -------
    array or scalar
        Same shape and dtype as `x` (float64 for integers).

    References
    ----------
    `scipy.special.log_expit`.

    Examples
    --------
    >>> from fastll import log_sigmoid
    >>> log_sigmoid([-1000.0, 40.0])
    array([-1.00000000e+03, -4.24835426e-18])
    """
    return _elementwise("log_sigmoid", x, out)


def _elementwise(operation: str, x: ArrayLike, out: Array | None) -> Any:
    if (found := direct.elementwise(operation, (x,), (), (out,))) is not None:
        return found
    call = Call(operation, x, "x")
    result = call.output(out, "out")
    call.map(call.backend, (call.x,), result)
    return call.place.give(result) if out is None else out
