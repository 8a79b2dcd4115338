"""What a kernel is told: one structure per call. Its Numba type and the words of a launch follow from
its definition.

An operand that is not there has the address 0. Steps are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from numpy.typing import NDArray

from fastll.dtypes import FORMATS, kind_of

Array = NDArray[Any]
_Kind = TypeVar("_Kind")
#: Where memory begins, or 0: what differs where a call is made again with other arrays.
Address = Annotated[int, "address"]


class Full(NamedTuple):
    """An operand of shape (outer, classes, inner), or a running state (outer, 3, inner)."""

    address: Address = 0
    outer: int = 0
    classes: int = 0
    inner: int = 0


class Row(NamedTuple):
    """An operand of shape (outer, inner)."""

    address: Address = 0
    outer: int = 0
    inner: int = 0


class Line(NamedTuple):
    """An operand of one axis."""

    address: Address = 0
    step: int = 0


class Fold(NamedTuple):
    """A reduction of rows; see `fastll.contract.Fold`."""

    rows: int
    classes: int
    inner: int
    x: Full
    second: Full
    out: Full
    state: Full
    labels: Row
    sample: Row
    value: Row
    lse: Row
    sign: Row
    choices: Full  # the labels of which the log-probabilities are asked for: (outer, K, inner)
    selected: Full  # and these
    weight: Line
    divisor: Address  # of a number that the gradient is multiplied with, or 0
    row_divisor: Address  # of that of a mean without class weights, for lse**2
    wanted: int  # K
    ignore_index: int
    keep: float  # 1 - label_smoothing
    spread: float  # label_smoothing / classes
    z_loss: float
    softcap: float
    scale: float
    inverse_temperature: float
    segment: int = 0  # of a team: classes of each block of a cluster
    capacity: int = 0  # and those it takes at once
    parts: int = 1  # thread blocks that leave a state each
    rows_at: int = 0  # byte of shared memory where rows are
    pitch: int = 0  # and bytes of each
    lanes: int = 1  # of threads on their own: how many share a row
    across: int = 0  # and whether neighbours have different rows


class Map(NamedTuple):
    """An element-wise operation; see `fastll.contract.Map`. Operands have the shape (outer, n)."""

    length: int
    units: int  # of each outer row
    inputs: tuple[Row, ...]
    weight: Row
    value: Row
    partial: Row
    slope: Row
    parameters: tuple[float, ...]
    scale: float


class Total(NamedTuple):
    """A sum of contiguous numbers."""

    size: int
    values: Address
    out: Address
    denominator: Address  # or 0 for `divisor`
    reciprocals: Address  # of where 1 / sum goes, or 0
    divisor: float
    exponential: int = 0  # whether exp of the result is wanted


class Weigh(NamedTuple):
    """The sum of the weights of rows of any shape."""

    labels: Address
    sample: Address
    sizes: tuple[int, ...]
    label_steps: tuple[int, ...]
    sample_steps: tuple[int, ...]
    size: int
    classes: int
    ignore_index: int
    weight: Line
    out: Address  # of the blocks' sums
    bad: Address  # of the blocks' first bad labels, or 0


class Merge(NamedTuple):
    """Running states, contiguous, that others are added to; without others they are made new."""

    rows: int
    state: Address
    other: Address  # or 0


class Parts(NamedTuple):
    """Running states (rows, parts, 3) of the parts of rows, contiguous, for those of the rows."""

    parts: int
    states: Address
    merged: Address  # of the states (rows, 3), or 0
    lse: Address  # of the log-sum-exps, or 0
    lse_step: int


class Accumulate(NamedTuple):
    """Running sums (2, 2), and the numbers that are added to them."""

    sums: Address
    fresh: int  # whether the sums are new
    loss: Address
    kept: Address  # or 0 for `number`
    number: float


def words(call: tuple[Any, ...], real: Any) -> list[Any]:
    """A structure as the arguments of a launch."""
    found: list[Any] = []
    for value in call:
        if isinstance(value, tuple):
            found += words(value, real)
        else:
            found.append(real(value) if isinstance(value, float) else value)
    return found


def addresses(call: tuple[Any, ...]) -> list[bool]:
    """Which of the words of a structure are addresses."""
    found: list[bool] = []
    for value, is_address in zip(call, _addresses(type(call), len(call)), strict=True):
        found += addresses(value) if isinstance(value, tuple) else [is_address]
    return found


@cache
def _addresses(kind: type, count: int) -> tuple[bool, ...]:
    """The same of the members of a structure, or of a tuple, which has no addresses of its own."""
    hints = get_type_hints(kind, include_extras=True).values()
    return tuple([hint == Address for hint in hints]) or (False,) * count


def address(a: Array | None) -> int:
    return 0 if a is None else int(a.__array_interface__["data"][0])


def placed(kind: Callable[..., _Kind], a: Array | None) -> _Kind:
    """An array as an operand: `Full`, `Row` or `Line`."""
    return kind() if a is None else kind(address(a), *a.strides)


def format_of(a: Array | None) -> Any:
    """Name of a storage format of `fastll.dtypes.FORMATS`; None if there is no array."""
    return None if a is None else FORMATS[kind_of(a.dtype).code]
