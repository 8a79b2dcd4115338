"""Log-sum-exp, softmax and sigmoid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastll import dispatch, layout
from fastll.api import _run
from fastll.arrays import axes_of, broadcast, kept_shape, place_of
from fastll.contract import Fold, Map
from fastll.dtypes import kind_of, rounded

Array = NDArray[Any]
Axis = int | Sequence[int] | None


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
        Axes to reduce over; None: all.
    b : array_like, optional
        Weights; `a` and `b` broadcast to one shape. Where a weight is 0 its element counts for
        nothing, even inf or NaN.
    keepdims : bool
        Leave the reduced axes in the result, with size 1.
    return_sign : bool
        Also return the sign of the sum, and let the result be the logarithm of its magnitude.
        Without it a negative sum gives NaN.
    out : array, optional
        Where to leave the result: of its shape and, except on a GPU, any dtype that it can be cast to.

    Returns
    -------
    res : array or scalar
        float64 for float64 and integer `a`, float32 for every other. Over no element: -inf. With
        +inf among the elements: +inf; with NaN: NaN.
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
    LogSumExp : the same in parts, over chunks, processes and machines.

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
    place = place_of(a)
    x = place.take(a, "a")
    weights = None
    if b is not None:
        weights = place.take(b, "b")
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
    kept = kept_shape(x.shape, axes)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape)) if keepdims else kept
    value = kind_of(x.dtype).compute
    # the kernels of a GPU write `out` itself; on the CPU it may be of another dtype
    output = None
    if out is not None:
        output = place.output(out, "out", shape, value, (x, weights), cast=place.on_cpu)
    direct = output is not None and not place.on_cpu
    result = output if output is not None and direct else place.empty(shape, value)
    sign = place.empty(shape, value) if return_sign else None
    row: tuple[Array, Array | None] = result, sign
    if keepdims:  # the rows: without the axes of one entry
        at = (*(0 if i in axes else slice(None) for i in range(x.ndim)), ...)
        row = result[at], None if sign is None else sign[at]
    backend = dispatch.choose("logsumexp", value, x.size, place)
    pieces, folds = layout.rows(axes, (x, weights), row)
    if folds == 1:
        for x_, b_, out_, sign_ in pieces:
            call = Fold("logsumexp", x_, second=b_, lse=out_, sign=sign_)
            _run.rows(backend, backend.fold(call), x_)
    else:
        state = _run.new_state(backend, place, kept)
        _run.fold(backend, x, weights, axes, state)
        _run.finish(backend, place, state, weights is not None, *row)

    if output is not None and not direct:
        np.copyto(output, rounded(result, output.dtype))
    returned = place.give(result) if out is None else out
    return returned if sign is None else (returned, place.give(sign))


def softmax(x: ArrayLike, axis: Axis = -1, *, out: Array | None = None) -> Any:
    r"""Softmax over the last axis by default, as in PyTorch and JAX; SciPy's default is all axes.

    .. math:: p_j = \exp(x_j - m) / \sum_i \exp(x_i - m), \quad m = \max_i x_i

    It takes one read and one write.

    Parameters
    ----------
    x : array_like
        Any shape and strides, scalars too; float16, bfloat16, float32, float64; integers and bools
        as float64.
    axis : int, tuple of int or None
        Axes that the probabilities sum to one over; None: all.
    out : array, optional
        Where to leave the result: of its shape and dtype. May be `x` itself.

    Returns
    -------
    array or scalar
        In the shape of `x`, in its dtype (float64 for integers). The probability of -inf is 0. A row
        whose maximum is infinite or that has a NaN is NaN.

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
    return _softmax(x, axis, out, log=False)


def log_softmax(x: ArrayLike, axis: Axis = -1, *, out: Array | None = None) -> Any:
    r"""Log-softmax over the last axis by default, as in PyTorch and JAX; SciPy's default is all axes.

    .. math:: \log p_j = (x_j - m) - \log \sum_i \exp(x_i - m), \quad m = \max_i x_i

    It takes one read and one write. Both parts are at most 0, and the second has the log1p form, so
    nothing cancels.

    Parameters
    ----------
    x : array_like
        Any shape and strides, scalars too; float16, bfloat16, float32, float64; integers and bools
        as float64.
    axis : int, tuple of int or None
        Axes that the probabilities sum to one over; None: all.
    out : array, optional
        Where to leave the result: of its shape and dtype. May be `x` itself.

    Returns
    -------
    array or scalar
        In the shape of `x`, in its dtype (float64 for integers). That of -inf is -inf; a row of
        nothing else, or with a NaN, is NaN.

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string, or that of `out` is not the result's.
    ValueError
        If an axis is out of bounds or repeated; if `out` cannot be written.

    References
    ----------
    `scipy.special.log_softmax`; Blanchard, Higham and Higham (2021), see `logsumexp`.

    Examples
    --------
    >>> from fastll import log_softmax
    >>> log_softmax([1000.0, 0.0])
    array([    0., -1000.])
    """
    return _softmax(x, axis, out, log=True)


def _softmax(x: ArrayLike, axis: Axis, out: Array | None, log: bool) -> Any:
    place = place_of(x)
    x = place.take(x, "x")
    result = place.result(x, out, "out")
    full, target = (x, result) if x.ndim else (x.reshape(1), result.reshape(1))
    axes = axes_of(axis, full.ndim)
    backend = dispatch.choose("softmax", kind_of(x.dtype).compute, x.size, place)
    if x.size:
        state = None
        pieces, folds = layout.rows(axes, (full, target), (state,))
        if folds > 1:
            state = _run.new_state(backend, place, kept_shape(full.shape, axes))
            _run.fold(backend, full, None, axes, state)
            pieces, _ = layout.rows(axes, (full, target), (state,))
        for x_, out_, state_ in pieces:
            name = "log_softmax" if log else "softmax"
            _run.rows(backend, backend.fold(Fold(name, x_, state=state_, out=out_)), x_)
    return place.give(result) if out is None else out


def sigmoid(x: ArrayLike, *, out: Array | None = None) -> Any:
    r"""Logistic sigmoid, at full precision in both tails.

    .. math:: \sigma(x) = 1 / (1 + \exp(-x))

    Parameters
    ----------
    x : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    out : array, optional
        Where to leave the result: of its shape and dtype. May be `x` itself.

    Returns
    -------
    array or scalar
        In the shape of `x`, in its dtype (float64 for integers).

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string, or that of `out` is not the result's.
    ValueError
        If `out` cannot be written.

    References
    ----------
    `scipy.special.expit`.

    Examples
    --------
    >>> from fastll import sigmoid
    >>> sigmoid([-1000.0, -40.0, 0.0])
    array([0.00000000e+00, 4.24835426e-18, 5.00000000e-01])
    """
    return _sigmoid(x, out, log=False)


def log_sigmoid(x: ArrayLike, *, out: Array | None = None) -> Any:
    r"""Logarithm of the logistic sigmoid, at full precision in both tails.

    .. math:: \log \sigma(x) = \min(x, 0) - \operatorname{log1p}(\exp(-|x|))

    Parameters
    ----------
    x : array_like
        Any shape and strides; float16, bfloat16, float32, float64; integers and bools as float64.
    out : array, optional
        Where to leave the result: of its shape and dtype. May be `x` itself.

    Returns
    -------
    array or scalar
        In the shape of `x`, in its dtype (float64 for integers).

    Raises
    ------
    TypeError
        If a dtype is complex, longdouble, object or string, or that of `out` is not the result's.
    ValueError
        If `out` cannot be written.

    References
    ----------
    `scipy.special.log_expit`.

    Examples
    --------
    >>> from fastll import log_sigmoid
    >>> log_sigmoid([-1000.0, 40.0])
    array([-1.00000000e+03, -4.24835426e-18])
    """
    return _sigmoid(x, out, log=True)


def _sigmoid(x: ArrayLike, out: Array | None, log: bool) -> Any:
    place = place_of(x)
    x = place.take(x, "x")
    result = place.result(x, out, "out")
    backend = dispatch.choose("sigmoid", kind_of(x.dtype).compute, x.size, place)
    for x_, out_ in layout.elementwise((x, result)):
        call = Map("log_sigmoid" if log else "sigmoid", (x_,), value=out_)
        _run.elements(backend, backend.map(call), x_)
    return place.give(result) if out is None else out
