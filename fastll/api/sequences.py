"""Likelihoods of sequences of tokens."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from fastll import calls
from fastll.adapted import adapted
from fastll.api.losses import RowLosses, losses_of_rows
from fastll.calls import Call
from fastll.contract import Fold, Options


@adapted
def sequence_log_likelihood(logits: ArrayLike, tokens: ArrayLike, *, ignore_index: int = -100) -> Any:
    r"""Log-likelihood of sequences of tokens.

    .. math:: \log P = \sum_t \log \operatorname{softmax}(x_t)_{y_t}

    for the logits :math:`x_t` and the token :math:`y_t` at position t: minus the sum of what
    `cross_entropy` gives for the tokens.

    Parameters
    ----------
    logits : array_like
        Shape (..., T, V), any strides; float16, bfloat16, float32, float64; integers and bools as
        float64. Those at position t are of the token there: a language model's are to be shifted by
        one first.
    tokens : array_like
        Integers in [0, V), shape (..., T).
    ignore_index : int
        Tokens with this label, such as padding, contribute 0, whatever their logits are.

    Returns
    -------
    array or scalar
        Shape (...); float64 for float64 and integer logits, float32 for all others. Without tokens 0.

    Raises
    ------
    IndexError, TypeError, ValueError
        As for `sparse_cross_entropy`; if `logits` has fewer than two dimensions.

    See Also
    --------
    perplexity, NegativeLogLikelihood

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import sequence_log_likelihood
    >>> logits = np.log([[[0.5, 0.5], [0.25, 0.75]]])  # one sequence of two tokens
    >>> np.exp(sequence_log_likelihood(logits, [[0, 1]]))
    array([0.375])
    """

    call, found = _of_tokens(logits, tokens, ignore_index)
    value = call.place.empty(found.losses.shape[:-1], call.compute)
    fold = Fold("sum", found.losses, options=Options(scale=-1.0), value=value)
    calls.fold(found.backend, call.place, fold, (found.losses.ndim - 1,))
    return call.place.give(value)


@adapted
def perplexity(logits: ArrayLike, tokens: ArrayLike, *, ignore_index: int = -100) -> Any:
    r"""Perplexity: the exponential of the mean negative log-likelihood of all tokens.

    Parameters
    ----------
    logits, tokens, ignore_index
        As for `sequence_log_likelihood`, like the errors. Ignored tokens do not count.

    Returns
    -------
    0-d array or scalar
        At least 1; NaN without tokens. The dtype is that of `sequence_log_likelihood`.

    See Also
    --------
    NegativeLogLikelihood : the same over data of any size, in parts.

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import perplexity
    >>> float(perplexity(np.zeros((2, 3, 50)), np.ones((2, 3), int)))
    50.0000000
    """

    call, found = _of_tokens(logits, tokens, ignore_index)
    return call.place.give(
        found.backend.total(found.losses, found.kept, call.compute, exponential=True)
    )


def _of_tokens(logits: ArrayLike, tokens: ArrayLike, ignore_index: int) -> tuple[Call, RowLosses]:
    """The losses of tokens."""
    call = Call("cross_entropy", logits, "logits")
    if call.x.ndim < 2:
        raise ValueError(f"logits has shape {call.x.shape}; expected (..., T, V)")
    options = (ignore_index, 0.0, 0.0, None)
    outputs = False, False, None
    return call, losses_of_rows(
        "sparse", call, tokens, -1, (None, None), options, "mean", outputs, "tokens"
    )
