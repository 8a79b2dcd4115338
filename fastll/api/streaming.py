"""Streaming: running states that can be updated, merged and sent elsewhere."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastll import calls, dispatch
from fastll.api.losses import losses_of_rows
from fastll.array_libraries import CPU, Device
from fastll.arrays import HOST, Axis, Place, axes_of, kept_shape, place_of
from fastll.calls import Call
from fastll.contract import Backend, Floats, Fold, add_sums
from fastll.dtypes import FLOATING, as_floats, kind_of

Array = NDArray[Any]


class LogSumExp:
    r"""Streaming log-sum-exp.

    The state of each row is the pair (m, s), the maximum so far and the sum of ``exp(x - m)``, whose
    log-sum-exp is ``m + log(s)``. ``(-inf, 0)`` is the identity; `merge` is associative and
    commutative within rounding, so that chunks, threads, processes and machines combine in any order:

    .. math:: (m_1, s_1) \oplus (m_2, s_2) = (m, s_1 e^{m_1 - m} + s_2 e^{m_2 - m}),
              \quad m = \max(m_1, m_2)

    The state lives on the device of the first array; later arrays must be there too. Results are
    arrays of that array's library.

    Parameters
    ----------
    shape : int or tuple of int
        Shape of the rows, and so of the value.
    dtype : dtype_like
        A floating dtype; the value is float64 for float64 and float32 for all others. The state is
        always float64.

    Raises
    ------
    TypeError, ValueError
        If `dtype` is not a floating one that fastll computes with; if `shape` is negative.

    References
    ----------
    M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import LogSumExp
    >>> first, second = LogSumExp(), LogSumExp()
    >>> float(first.update([0.0, 1.0]).merge(second.update([2.0])).value)
    2.407605964444380
    """

    __slots__ = ("_dtype", "_place", "_state")

    def __init__(self, shape: int | tuple[int, ...] = (), dtype: DTypeLike = np.float64) -> None:
        try:
            kind = kind_of(np.dtype(dtype), "dtype")
        except TypeError:
            kind = None
        if kind is None or not kind.floating:
            raise TypeError(f"dtype is {dtype!r}; expected a floating dtype of NumPy: {FLOATING}")
        self._dtype = kind.compute
        # where the first array was, and None before it
        self._place: Place | None = None
        lengths = (shape,) if hasattr(shape, "__index__") else tuple(shape)
        # (m, e, k) of the contract, where s = e + k: the split keeps the digits of log1p
        self._state: Floats = np.zeros((*lengths, 3))
        self._state[..., 0] = -np.inf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self._state.shape[:-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the value."""
        return self._dtype

    def update(self, x: ArrayLike, axis: Axis = -1) -> Self:
        """Add elements to the rows.

        Parameters
        ----------
        x : array_like
            Any shape and strides; its shape without `axis` must be that of the rows.
        axis : int, tuple of int or None
            Axes to reduce over; None means all.

        Returns
        -------
        LogSumExp
            This accumulator.

        Raises
        ------
        TypeError, ValueError
            If the dtype is complex, longdouble, object or string; if the shape or the device does not
            fit. Nothing has been added by then.
        """
        call = Call("logsumexp", x, "x", self._place)
        added = call.x if call.x.ndim else call.x.reshape(1)
        axes = axes_of(axis, added.ndim)
        kept = kept_shape(added.shape, axes)
        if kept != self.shape:
            raise ValueError(
                f"x has shape {added.shape}, {kept} without axis {axis}; expected {self.shape}"
            )
        backend = call.backend
        self._move_to(backend, call.place)
        if added.size:
            calls.fold(backend, call.place, Fold("logsumexp", added, state=self._state), axes)
        return self

    def _move_to(self, backend: Backend, place: Place) -> None:
        """Keep the state where the first array is."""
        if self._place is None:
            self._place = place
            if not place.on_cpu:
                self._state = calls.new_state(backend, place, self.shape)

    def merge(self, other: LogSumExp) -> Self:
        """Add the elements of another accumulator, which is not changed.

        Parameters
        ----------
        other : LogSumExp
            One of the same shape.

        Returns
        -------
        LogSumExp
            This accumulator.

        Raises
        ------
        TypeError, ValueError
            If `other` is not a `LogSumExp`; if the shapes or the devices differ.
        """
        if not isinstance(other, LogSumExp):
            raise TypeError(f"other is a {type(other).__name__}; expected a LogSumExp")
        if other.shape != self.shape:
            raise ValueError(f"other has shape {other.shape}; expected {self.shape}")
        if other._place is None:  # nothing to add
            return self
        place = self._place or other._place
        if place.device != other._place.device:
            raise ValueError(
                f"other is on {other._place.device}; expected it on {place.device}, as this one"
            )
        backend = self._backend(place)
        self._move_to(backend, place)
        backend.merge(self._state, other._state)
        return self

    def _backend(self, place: Place) -> Backend:
        return dispatch.choose("logsumexp", self._state.size // 3, place)

    @property
    def value(self) -> Any:
        """The log-sum-exp of all elements so far, -inf before the first."""
        place = self._place or HOST
        out = place.empty(self.shape, self._dtype)
        calls.finish(self._backend(place), place, Fold("logsumexp", out, state=self._state, lse=out))
        return place.give(out)

    @property
    def state(self) -> tuple[Any, Any]:
        """The pair (m, s), float64 arrays in the shape of the value."""
        place = self._place or HOST
        if place.on_cpu:
            m, e, k = np.moveaxis(self._state, -1, 0)
            return place.give_array(m.copy()), place.give_array(e + k)
        backend = self._backend(place)
        copy = calls.new_state(backend, place, self.shape)
        backend.merge(copy, self._state)
        parts = place.give(copy)
        return parts[..., 0], parts[..., 1] + parts[..., 2]

    @classmethod
    def from_state(cls, state: tuple[ArrayLike, ArrayLike], dtype: DTypeLike = np.float64) -> Self:
        """Make an accumulator from a state.

        Parameters
        ----------
        state : tuple of array_like
            The pair (m, s), two arrays of one shape, as returned by `state`.
        dtype : dtype_like
            As for the class.

        Returns
        -------
        LogSumExp
            A new accumulator.

        Raises
        ------
        ValueError
            If the shapes differ, or an s is negative (not checked on a GPU).
        """
        place = place_of(state[0])
        m, s = (place.take(part, "state") for part in state)
        if m.shape != s.shape:
            raise ValueError(f"state has shapes {m.shape} and {s.shape}; expected one shape")
        result = cls(m.shape, dtype)
        if not place.on_cpu:  # one element m with weight s
            backend = result._backend(place)
            result._move_to(backend, place)
            fold = Fold("logsumexp", m[..., None], s[..., None], state=result._state)
            calls.fold(backend, place, fold, (m.ndim,))
            return result
        result._place = place
        m, s = as_floats(m).reshape(m.shape), as_floats(s).reshape(s.shape)
        if np.any(s < 0):
            raise ValueError(f"state has a sum of {s.min()}; expected none below 0")
        k = np.minimum(s, 1.0)  # the maximum itself, in the split that keeps most digits
        result._state[...] = np.stack((m, s - k, k), axis=-1)
        return result

    def __copy__(self) -> Self:
        copy = type(self)((), self._dtype)
        copy._place, place = self._place, self._place or HOST
        if place.on_cpu:
            copy._state = self._state.copy()
        else:
            backend = self._backend(place)
            copy._state = calls.new_state(backend, place, self.shape)
            backend.merge(copy._state, self._state)
        return copy

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def __getstate__(self) -> tuple[np.dtype[Any], Floats]:
        if self._place is not None and not self._place.on_cpu:
            raise TypeError(f"the state is on {self._place.device}; only one on the CPU can be pickled")
        return self._dtype, self._state

    def __setstate__(self, state: tuple[np.dtype[Any], Floats]) -> None:
        self._dtype, self._state = state
        self._place = HOST

    def __repr__(self) -> str:
        return f"LogSumExp(shape={self.shape}, dtype={self._dtype}, value={self.value})"


class NegativeLogLikelihood:
    r"""Streaming negative log-likelihood: `cross_entropy` over data of any size, in parts.

    Its state is two sums, of the losses and of what their mean divides by, in float64 and in two parts
    each: the second part is what rounding has taken from the first. So n updates add up to within
    :math:`2^{-106} n^2`, relative, in any order: however many there are, none is lost, and chunks,
    threads, processes and machines may be merged as they come. (Within an update, the losses of rows
    are added in float64.) A new accumulator is the exact identity: merging it changes no bit.

    Results are Python's numbers. On a GPU the sums stay on the device, and an update does not wait for
    it; to read a result, to merge, copy or pickle does. Updates on several devices add up.

    References
    ----------
    D. E. Knuth, "The Art of Computer Programming", volume 2, section 4.2.2, for the sums.

    Examples
    --------
    >>> import numpy as np
    >>> from fastll import NegativeLogLikelihood
    >>> logits, tokens = np.zeros((100, 8), np.float32), np.arange(100) % 8
    >>> heldout = NegativeLogLikelihood()
    >>> for start in range(0, 100, 30):
    ...     part = slice(start, start + 30)
    ...     _ = heldout.update(logits[part], tokens[part])
    >>> heldout.count, heldout.mean, heldout.perplexity, heldout.bits_per_token
    (100, 2.0794415, 8.000000, 3.000000)
    """

    __slots__ = ("_sums", "_weighted")

    def __init__(self) -> None:
        # for each device, sums (2, 2) as `contract.add_sums` has them
        self._sums: dict[Device, tuple[Place, Floats]] = {}
        self._weighted = False

    def update(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        axis: int = -1,
        weight: ArrayLike | None = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Add rows and their targets.

        Parameters
        ----------
        logits, target, axis, weight, ignore_index, softcap, sample_weight
            As for `cross_entropy`: labels, or one distribution per row. Updates may differ in shape,
            dtype, library and device.

        Returns
        -------
        NegativeLogLikelihood
            This accumulator.

        Raises
        ------
        IndexError, TypeError, ValueError
            As for `cross_entropy`; nothing has been added by then. On a GPU a label that is out of
            range makes the sum NaN instead, unless `debug_labels` is in force.
        """

        call = Call("cross_entropy", logits, "logits")
        weights, options = (weight, sample_weight), (ignore_index, 0.0, 0.0, softcap)
        found = losses_of_rows(
            "any", call, target, axis, weights, options, "mean", (False, False, None)
        )
        place = call.place
        _, sums = self._sums.get(place.device, (None, None))
        self._sums[place.device] = place, found.backend.accumulate(sums, found.losses, found.kept)
        self._weighted |= weight is not None or sample_weight is not None
        return self

    def merge(self, other: NegativeLogLikelihood) -> Self:
        """Add the rows of another accumulator, which is not changed.

        Parameters
        ----------
        other : NegativeLogLikelihood
            It may be on another device.

        Returns
        -------
        NegativeLogLikelihood
            This accumulator.

        Raises
        ------
        TypeError
            If `other` is not a `NegativeLogLikelihood`.
        """
        if not isinstance(other, NegativeLogLikelihood):
            raise TypeError(f"other is a {type(other).__name__}; expected a NegativeLogLikelihood")
        more = other._totals()
        _, sums = self._sums.setdefault(CPU, (HOST, np.zeros((2, 2))))
        add_sums(sums, more)
        self._weighted |= other._weighted
        return self

    def _totals(self) -> Floats:
        """The sums of all devices, a new array."""
        totals = np.zeros((2, 2))
        for place, sums in self._sums.values():
            if not place.on_cpu:
                sums = dispatch.choose("cross_entropy", sums.size, place).read(sums)
            add_sums(totals, sums)
        return totals

    @property
    def sum(self) -> float:
        """The sum of the losses, in nats; 0 before the first."""
        return float(self._totals()[0].sum())

    @property
    def count(self) -> int | float:
        """What the mean divides by, as in `cross_entropy`: the number of rows that are not ignored, or,
        as a float after an update with weights, the sum of theirs."""
        high, low = self._totals()[1].tolist()
        return high + low if self._weighted else int(high) + int(low)

    @property
    def mean(self) -> float:
        """The loss per row, in nats: NaN before the first."""
        loss, count = self._totals().sum(axis=1).tolist()
        return loss / count if count else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(mean)``."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean))

    @property
    def bits_per_token(self) -> float:
        """``mean / log(2)``: the length of the code that the model gives the data, per row."""
        return self.mean / math.log(2)

    def __getstate__(self) -> tuple[Floats, bool]:
        return self._totals(), self._weighted

    def __setstate__(self, state: tuple[Floats, bool]) -> None:
        sums, self._weighted = state
        self._sums = {CPU: (HOST, sums)}

    def __repr__(self) -> str:
        return f"NegativeLogLikelihood(mean={self.mean}, count={self.count})"
