"""What a backend implements.

A call reaches a backend as a `Map` (element-wise) or a `Fold` (over rows): one structure that names the
operation and holds every operand. Its arrays have been validated, allocated and brought to one of three
shapes, as views with any strides (zero and negative ones too) and without copying anything. One on a
GPU is a NumPy array object too, whose address, shape and strides are those on the device
(`fastll.array_libraries`):

* *full*: ``(outer, classes, inner)``, reduced over ``classes``;
* *row*: ``(outer, inner)``, one entry per row, where row ``r`` is ``divmod(r, inner)``;
* *class*: ``(classes,)``, contiguous, in the compute dtype; on a GPU as the caller has it.

`Backend.map` and `Backend.fold` do no work. They bind the arrays and return a `Kernel`: a callable that
handles rows (or units) ``start`` to ``stop``, alone and without the GIL, so that any thread may run any
part. A row's result must depend on that row alone, to the bit; `fastll.threads` may then cut the rows
as it likes.

**The running state** of a row is the triple ``(m, e, k)``: the maximum, the sum of ``b exp(x - m)``
over the elements below the maximum, and the sum of ``b`` over those equal to it (``b`` is 1 without
weights). Then ``s = e + k`` is the sum of the pair (m, s), and ``log s = log1p(e + (k - 1))`` keeps
its digits when one element dominates. ``(-inf, 0, 0)`` is the identity.

**Cross-entropy.** With ``r = e + (k - 1)``, ``p_j = exp(x_j - m) / s`` and the smoothed, weighted
target ``u_j = w_j ((1 - eps) t_j + eps / C)`` of a dense row, or ``u_j = w_j eps / C`` and the
point mass ``c = (1 - eps) w_y`` at ``y`` of a sparse one, every cross-entropy is

    loss   = c (log1p(r) + m - x_y) + sum_j u_j (log1p(r) + m - x_j) + z lse**2
    grad_j = scale ((c + sum u + 2 z lse) p_j - u_j - c [j = y])

in which all summands of the loss are non-negative: nothing cancels. A row's sample weight g is a factor
of its loss and of ``scale``; a row whose g is 0 is dropped, whatever its logits are. The loss of
log-probabilities is the same with ``m = log s = 0``, and ``grad_j = -scale (u_j + c [j = y])``.

**Entropy of logits.** With ``p`` and one more sum, ``a = sum_j exp(x_j - m) (m - x_j)``, of which all
terms are non-negative,

    H      = log s + a / s
    grad_j = scale tau p_j ((m - x_j) - a / s)

and for the distribution p of a second array t, whose state is (n, f, l) with ``u = f + l``,

    a      = sum_j exp(t_j - n) ((m - x_j) - (n - t_j))
    KL     = (log s - log u) + a / u
    grad_j = scale tau (exp(x_j - m) / s - exp(t_j - n) / u)

where ``exp(t_j - n) = 0`` annuls an infinite factor, and x and t are the logits times tau, the
``inverse_temperature``, in the compute dtype.

**The order of sums** is part of the contract among the backends of the CPU, in every layout: it is
why they agree to the bit. A row is summed in blocks of `BLOCK` elements. Element j of a block goes
to lane j modulo the lanes of a vector of `VECTOR_BYTES` (32 float32 or 16 float64), in order, in
the compute dtype; the exponentials of a row of fewer than `SHORT` elements are one lane. The lanes
fold by halves (lane i and lane i + half): those of exponentials in the compute dtype, others in
float64, where they may be larger than it holds; blocks add in float64, in order. So a sum is off by
at most 69 roundoffs of float32, relative to the sum of magnitudes: 64 terms of a lane and five
additions of lanes (128 and 4 in float64); as roundoffs of both signs occur, by about 4. It does not
grow with the length of the row. A log-sum-exp of more than `LONG` elements is that of pieces of as
many, whose states merge as a binary tree. Sums of a unit of an element-wise operation (`CHUNK`
elements) are formed as the others; values of rows, and sums of units, add in float64, as NumPy does
it. On a GPU the order depends on the number of classes alone, and warps and thread blocks add in
two float32 (`fastll.backend.cuda.geometry`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

#: ``kernel(start, stop)`` handles those rows (or units, of element-wise operations).
Kernel = Callable[[int, int], object]

Array = NDArray[np.generic]
Floats = NDArray[np.float64]

#: Elements of a block, which stays in the first-level cache from one step to the next.
BLOCK = 2048
#: Bytes of a vector, whatever the registers of the CPU hold.
VECTOR_BYTES = 128
#: Elements of one unit of an element-wise operation on the CPU, and of one partial sum.
CHUNK = 1 << 15
#: Rows that are finished together on the CPU.
GROUP = 64

#: Below this many classes, neighbouring rows fill vectors better than one does.
SHORT = 64

#: Elements of a log-sum-exp beyond which it is folded in pieces, so that threads share a row. No
#: vocabulary is that large.
LONG = 1 << 18

#: Minimum number of classes of rows that are written by non-temporal stores.
STREAM_CLASSES = 512


def units_of(length: int, unit: int = CHUNK) -> int:
    """Number of units in an outer row of `length` elements."""
    return -(-length // unit)


def bad_label(
    name: str, classes: int, ignore_index: int | None, label: int, position: tuple[int, ...]
) -> IndexError:
    """The error for a label of `name`, or where none is ignored a class, that is out of range."""
    what, ignored = "class", ""
    if ignore_index is not None:
        what, ignored = "label", f" or ignore_index = {ignore_index}"
    return IndexError(
        f"{name} has {what} {label} at {position}; expected 0 <= {what} < {classes}{ignored}"
    )


def add_sums(sums: Floats, more: Floats) -> None:
    """Add sums in two parts (..., 2) to others in place. The second part is what rounding took from the
    first one, which Knuth's two-sum finds."""
    a, b = sums[..., 0], more[..., 0]
    with np.errstate(invalid="ignore", over="ignore"):
        total = a + b
        back = total - a
        error = (a - (total - back)) + (b - back)
    sums[..., 1] += more[..., 1] + np.where(np.isfinite(total), error, 0)  # that of an infinity is NaN
    sums[..., 0] = total


class Options(NamedTuple):
    """The scalars of a fold."""

    ignore_index: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    scale: Any = 1.0  # factor of the gradient, or of the sum of terms; or as `Backend.averaged` has it
    inverse_temperature: float = 1.0  # factor of the logits, of both arrays


DEFAULTS = Options()


class Map(NamedTuple):
    """An element-wise operation and its operands, each of shape (outer, n)."""

    operation: str  # a key of `fastll.formulas.ELEMENTS` or `OWN`
    inputs: tuple[Array, ...]  # any real dtype; the first decides which dtype is computed in
    value: Array | None = None  # each element's value, in the element dtype or the compute dtype
    partial: Array | None = None  # (outer, ceil(n / unit)), `partial_dtype`: sums of the units' values
    slope: Array | None = None  # `scale` times the slope, element dtype; may be the first input
    weight: Array | None = None  # any real dtype: a factor of value and slope
    parameters: tuple[float, ...] = ()  # of the formula
    scale: float = 1.0


class Kept(NamedTuple):
    """What a mean over rows divides by."""

    weight: float  # sum of the sample weights of the kept rows, times class weights of their labels
    rows: float  # sum of their sample weights


class Fold(NamedTuple):
    """A reduction of rows and its operands."""

    operation: str  # "logsumexp", "softmax", "log_softmax", "cross_entropy", "nll_loss",
    # "entropy_from_logits", "kl_divergence_from_logits" or a key of `TERMS`
    x: Array  # full; decides which dtype is computed in, with the weights of a log-sum-exp
    second: Array | None = None  # full, any real dtype: weights, dense target, second distribution
    labels: Array | None = None  # row: sparse target, as `Backend.weigh` returned it; or row + (K,)
    weight: Array | None = None  # class
    sample: Array | None = None  # row, float64 (on a GPU any real dtype): sample weights
    options: Options = DEFAULTS
    state: Floats | None = None  # row + (3,): a log-sum-exp continues from (m, e, k) and leaves the
    # result there; a softmax takes the state of rows that are longer than those of x
    value: Array | None = None  # row, compute dtype: the loss, the entropy, or the sum of terms
    lse: Array | None = None  # row, compute dtype
    sign: Array | None = None  # row, compute dtype: sign of s; without it a negative s gives NaN
    selected: Array | None = None  # row + (K,), compute dtype: log-probabilities of the K labels of a
    # row, NaN for one that is no class; of "logsumexp" and "entropy_from_logits"
    out: Array | None = None  # full, element dtype: probabilities, their logarithms or the gradient;
    # may be x


#: ``new(Map, fields)`` takes a third of the time of ``Map(*fields)``, which small calls notice.
new = tuple.__new__


class Backend(Protocol):
    """One implementation of every operation, for arrays on one device and, on a GPU, one stream of it.

    What the backends of the CPU have in common is in `fastll.backend.host.Host`.
    """

    name: str
    unit: int  # elements in one unit of a map, and in one partial sum
    partial_dtype: np.dtype[Any] | None  # of such a sum; None: the compute dtype

    def map(self, call: Map) -> Kernel:
        """An element-wise operation; one unit is `unit` elements of one outer row."""
        ...

    def fold(self, call: Fold) -> Kernel:
        """A reduction of rows."""
        ...

    def run(self, kernel: Kernel, units: int, elements: int) -> None:
        """Run a kernel over units 0 to `units`, which hold `elements` elements together."""
        ...

    def weigh(
        self,
        labels: Array | None,
        classes: int,
        ignore_index: int | None,
        weight: Array | None,
        sample: Array | None,
        check: bool,
        name: str,
    ) -> tuple[Array | None, Any]:
        """Labels in the form that `fold` takes, and the weight of the kept ones: a `Kept`, or on a GPU
        something that finds it there.

        `labels` has any strides and any integer dtype, and the shape of the rows or one axis more.
        Raises `bad_label` for the first one outside [0, classes) that is not `ignore_index`, of the
        argument `name`; on a GPU only if asked to `check`, as that waits for the device. Without labels
        (a dense target) all rows are kept.
        """
        ...

    def averaged(self, kept: Any, z_loss: float) -> tuple[Any, float]:
        """`Options.scale` and `z_loss` of a mean, where lse**2 is averaged by sample weights alone."""
        ...

    def total(
        self, values: Array, denominator: Any, dtype: np.dtype[Any], exponential: bool = False
    ) -> Array:
        """Sum of all values, in float64 and then 0-d in `dtype`, over a number, the weight of kept
        rows or None.

        With `exponential`, exp of that, which must be at least 0, or NaN.
        """
        ...

    def accumulate(self, sums: Floats | None, losses: Array, kept: Any) -> Floats:
        """Add the sum of losses and the weight of the kept labels to running sums (2, 2), of two parts
        each (see `add_sums`), in place or, without them, to new ones."""
        ...

    def read(self, a: Array) -> NDArray[Any]:
        """The contents of a contiguous array in the host's memory; waits for a GPU."""
        ...

    def fill_identity(self, state: Floats) -> None:
        """Make every row of a new, contiguous (..., 3) state the identity."""
        ...

    def merge(self, state: Floats, other: Floats) -> None:
        """Fold contiguous running states (..., 3) into others in place."""
        ...
