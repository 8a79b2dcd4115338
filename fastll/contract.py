"""What a backend implements.

Every array that reaches a backend has been validated, allocated and brought to one of three shapes,
as a view with any strides (zero and negative ones too) and with nothing copied. One on a GPU is a NumPy
array object too, whose address, shape and strides are those on the device (`fastll.array_libraries`):

* *full*: ``(outer, classes, inner)``, reduced over ``classes``;
* *row*: ``(outer, inner)``, one entry a row, where row ``r`` is ``divmod(r, inner)``;
* *class*: ``(classes,)``, contiguous, in the compute dtype; on a GPU as the caller has it.

A method does no work. It binds its arrays and returns a `Kernel`: a callable that handles rows
``start`` to ``stop``, alone and without the GIL, so that any thread may run any part of it. A row's
result must depend on that row alone, to the bit; `fastll.threads` may then cut the rows as it likes.

The running state of a row is the triple ``(m, e, k)``: the maximum, the sum of ``b exp(x - m)`` over
the elements below the maximum, and the sum of ``b`` over those equal to it (``b`` is 1 without
weights). Then ``s = e + k`` is the sum of the pair (m, s), and ``log s = log1p(e + (k - 1))`` keeps its
digits when one element dominates. ``(-inf, 0, 0)`` is the identity.

With ``r = e + (k - 1)``, ``p_j = exp(x_j - m) / s`` and the smoothed, weighted target
``u_j = w_j ((1 - eps) t_j + eps / C)`` of a dense row, or ``u_j = w_j eps / C`` and the point mass
``c = (1 - eps) w_y`` at ``y`` of a sparse one, every cross-entropy is

    loss   = c (log1p(r) + m - x_y) + sum_j u_j (log1p(r) + m - x_j) + z lse**2
    grad_j = scale ((c + sum u + 2 z lse) p_j - u_j - c [j = y])

in which all summands of the loss are non-negative: nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

#: ``kernel(start, stop)`` handles those rows (or blocks, for element-wise operations).
Kernel = Callable[[int, int], object]

Array = NDArray[np.generic]
Floats = NDArray[np.float64]

#: Elements handled by one unit of an element-wise operation on the CPU, and in one partial sum.
CHUNK = 1 << 15


#: Below this many classes, neighbouring rows fill vectors better than a row does.
SHORT = 32

#: Bytes of a result from which it is written past the caches, in rows of at least so many classes.
STREAM_FROM = 1 << 25
STREAM_CLASSES = 512


def units_of(length: int, unit: int = CHUNK) -> int:
    """Number of units in an outer row of `length` elements."""
    return -(-length // unit)


class CrossEntropyOptions(NamedTuple):
    """The scalars of a cross-entropy, as its kernel takes them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    scale: Any  # factor of the gradient: 1.0, or `Backend.factor` of the mean's denominator


class Backend(Protocol):
    """One implementation of every operation, for arrays on one device and, on a GPU, one stream of it.

    The backends of the CPU have all but the kernels in common: `fastll.backend.host.Host`.
    """

    name: str
    unit: int  # elements in one unit of an element-wise operation, and in one partial sum
    partial_dtype: np.dtype[Any] | None  # of such a sum; None: that which is computed in

    def run(self, kernel: Kernel, units: int, elements: int) -> None:
        """Run a kernel over units 0 to `units`, which hold `elements` elements together."""
        ...

    def logsumexp(
        self,
        x: Array,  # full
        b: Array | None,  # full: weights
        state: Floats | None,  # row + (3,): continue from (m, e, k) and leave the result there
        out: Array | None,  # row, compute dtype
        sign: Array | None,  # row, compute dtype: the sign of s; without it a negative s gives NaN
    ) -> Kernel:
        """Log-sum-exp of each row, as a value, as a running state, or both."""
        ...

    def softmax(
        self,
        x: Array,  # full
        state: Floats | None,  # row + (3,): of rows longer than those of x; None: found from x
        out: Array,  # full, element dtype; may be x
        log: bool,
    ) -> Kernel:
        """Softmax or log-softmax of each row."""
        ...

    def cross_entropy(
        self,
        x: Array,  # full: logits
        target: Array | None,  # full: dense target, any real dtype
        labels: Array | None,  # row: sparse target, checked and int64; on a GPU of any integer dtype
        weight: Array | None,  # class
        options: CrossEntropyOptions,
        loss: Array,  # row, compute dtype
        lse: Array | None,  # row, compute dtype
        grad: Array | None,  # full, element dtype; may be x
    ) -> Kernel:
        """Loss, log-sum-exp and gradient of each row, for labels or for a dense target."""
        ...

    def check_labels(
        self, labels: Array, classes: int, ignore_index: int, weight: Array | None
    ) -> tuple[int, Any]:
        """Flat position of the first label outside [0, classes), or -1; the weight of all kept ones.

        Done at once: it precedes every kernel. On the CPU `labels` is one-dimensional, contiguous and
        int64, and the weight a float. On a GPU `labels` has the shape of the rows, any strides and any
        integer dtype, and the weight is a 0-d array of float64. A position is found there only while
        `dispatch.debugging_labels`, and raised by the backend, as `arrays.bad_label`.
        """
        ...

    def factor(self, kept: Any) -> Any:
        """The factor of the gradient of a mean over the weight of the kept labels, or over a number."""
        ...

    def total(self, values: Array, denominator: Any, dtype: np.dtype[Any]) -> Array:
        """Sum of all values, in float64 and then 0-d in `dtype`, over a number, a 0-d array or None."""
        ...

    def fill_identity(self, state: Floats) -> None:
        """Make every row of a new, contiguous (..., 3) state the identity."""
        ...

    def merge(self, state: Floats, other: Floats) -> None:
        """Fold contiguous running states (..., 3) into others in place."""
        ...

    def sigmoid(
        self,
        x: Array,  # (outer, n)
        out: Array,  # (outer, n), element dtype; may be x
        log: bool,
    ) -> Kernel:
        """Sigmoid or log-sigmoid; one unit is `unit` elements of one outer row."""
        ...

    def binary_cross_entropy(
        self,
        x: Array,  # (outer, n): logits
        target: Array,  # (outer, n), any real dtype
        weight: Array | None,  # (outer, n), any real dtype
        pos_weight: Array | None,  # (outer, n), any real dtype
        scale: float,  # factor of the gradient
        loss: Array | None,  # (outer, n), compute dtype: each element's loss
        partial: Array | None,  # (outer, ceil(n / unit)), `partial_dtype`: sums of the units' losses
        grad: Array | None,  # (outer, n), element dtype; may be x
    ) -> Kernel:
        """Binary cross-entropy with logits; one unit is `unit` elements of one outer row."""
        ...
