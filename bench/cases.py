"""What is measured: shapes of real workloads, sweeps over sizes, and kinds of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log, log10
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastll.operations import OPERATIONS

Array = NDArray[Any]


class Case(NamedTuple):
    """A shape and what to measure on it: `operation`, or `operation/variant` for a single variant."""

    name: str
    shape: tuple[int, ...]
    axis: int
    operations: tuple[str, ...]
    quick: tuple[str, ...] = ()  # operations in the quick set
    dtypes: tuple[str, ...] = ("float32",)  # the quick set uses only the first
    logits: tuple[str, ...] = ("randn",)  # likewise
    group: str = "workloads"


def _names(**wanted: object) -> tuple[str, ...]:
    """Operations of the table by their fields."""
    return tuple(
        name
        for name, operation in OPERATIONS.items()
        if all(getattr(operation, field) == value for field, value in wanted.items())
    )


def _main(names: Iterable[str]) -> tuple[str, ...]:
    """With the gradient where there is one."""
    return tuple(f"{n}/{'gradient' if OPERATIONS[n].gradient else 'value'}" for n in names)


def takes(name: str, domain: str) -> bool:
    """Whether an operation has an argument of a domain."""
    return any(argument.domain == domain for argument in OPERATIONS[name].arguments)


ELEMENTWISE, ROWWISE = _names(elementwise=True), _names(elementwise=False)
#: What the quick set measures wherever it can, of rows and of elements; and what it measures once.
ROWS = _names(elementwise=False, measured="throughout")
ELEMENTS = _names(elementwise=True, measured="throughout")
ROWS_ONCE = _main(_names(elementwise=False, measured="once"))
ELEMENTS_ONCE = _main(_names(elementwise=True, measured="once"))
BOTH, SWEPT = _main(ROWS), _main((*ROWS, *ELEMENTS))
GRADIENTS = tuple(measure for measure in BOTH if measure.endswith("/gradient"))

WORKLOADS = (
    Case(
        "gpt2",
        (2048, 50257),
        1,
        (*ROWWISE, *ELEMENTWISE),
        (*BOTH, *ROWS_ONCE),
        ("float32", "float64", "bfloat16", "float16"),
        ("randn", "peaked", "offset", "masked", "ignored"),
    ),
    Case("llama2", (8192, 32000), 1, ROWS),
    Case("llama3", (1024, 128256), 1, ROWS),
    Case("gemma", (512, 256000), 1, ROWS),
    Case("imagenet", (65536, 1000), 1, ROWWISE, BOTH),
    Case("imagenet21k", (4096, 21841), 1, ROWS),
    Case("hundred", (500_000, 100), 1, ROWWISE),
    Case("ten", (2_000_000, 10), 1, ROWWISE, BOTH),
    Case(
        "criteo",
        (45_000_000,),
        0,
        ELEMENTWISE,
        (*(f"{name}/value" for name in ELEMENTS), *_main(ELEMENTS), *ELEMENTS_ONCE),
    ),
    Case("segmentation", (19, 1024, 2048), 0, ROWS, GRADIENTS),
    Case("pixels", (8, 1000, 128, 128), 1, ROWS),
    Case("columns", (4096, 4096), 0, ROWWISE, BOTH),
)

_NUMBERS = tuple(f"{name}/value" for name in (*ROWS, *ELEMENTS) if not takes(name, "labels"))
_LABELLED = tuple(f"{name}/value" for name in ROWS if takes(name, "labels"))

#: Small calls, where the overhead of a call from Python dominates.
CALLS = (
    Case("10", (10,), 0, _NUMBERS, _NUMBERS, dtypes=("float64",), group="calls"),
    Case("1x10", (1, 10), 1, _LABELLED, _LABELLED, group="calls"),
    Case("32x1000", (32, 1000), 1, BOTH, GRADIENTS, group="calls"),
)

_DECADES = {
    n: BOTH if log10(n).is_integer() else () for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
}
SWEEPS = (
    *(
        Case(f"2^{k}", (2**k >> 10, 1024), 1, SWEPT, SWEPT if k % 3 == 0 else (), group="sizes")
        for k in range(12, 28)
    ),
    *(
        Case(f"{1000 * n}rows", (1000 * n, 100), 1, BOTH, quick, group="rows")
        for n, quick in _DECADES.items()
    ),
    *(
        Case(f"{100 * n}classes", (1000, 100 * n), 1, BOTH, quick, group="classes")
        for n, quick in _DECADES.items()
    ),
)

CASES = {case.name: case for case in (*WORKLOADS, *CALLS, *SWEEPS)}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))

_ROWS = (*ROWS, *ROWS_ONCE)
_HALVES = ("float32", "bfloat16")

#: Cases for a GPU: those with targets, and one whose class axis is not the last.
CUDA_CASES = {
    case.name: case
    for case in (
        *(
            Case(f"8192x{n}", (8192, n), 1, _ROWS, _ROWS if n == 50257 else BOTH, _HALVES)
            for n in (4096, 32000, 50257, 128256, 262144)
        ),
        Case("short10", (1 << 22, 10), 1, _ROWS, BOTH, _HALVES),
        Case("short1000", (1 << 20, 1000), 1, _ROWS, BOTH, _HALVES),
        Case(
            "elements",
            (1 << 28,),
            0,
            (*ELEMENTS, *(f"{name}/value" for name in ELEMENTWISE), *ELEMENTS_ONCE),
            (*_main(ELEMENTS), *ELEMENTS_ONCE),
            _HALVES,
        ),
        Case("columns", (8192, 8192), 0, _ROWS),
        Case("call", (32, 1000), 1, (*BOTH, *ROWS_ONCE), BOTH, group="calls"),
    )
}

#: Longest row, in bytes, that the registers of eight thread blocks hold; a longer one is read twice.
ON_CHIP = 131072 * 4
#: Target for a small call from Python in seconds, without waiting for the GPU.
CALL_TARGET = 15e-6
#: Target speed of a loss with its gradient, as a multiple of each peer's.
PEER_TARGETS = {"torch": 3.0, "torch.compile": 1.5, "liger": 1.5}


def target(measure: str, case: Case, dtype: str) -> float | None:
    """Target share of a GPU's copy bandwidth; `measure` is `operation/variant`."""
    if case.group == "calls" or case.axis != len(case.shape) - 1:
        return None
    name, _, variant = measure.partition("/")
    operation = OPERATIONS[name]
    if operation.elementwise:
        return 0.9
    if case.shape[1] <= 1000:
        return 0.75
    if operation.reduces and variant == "value":
        return 0.9
    size = 2 if dtype in ("float16", "bfloat16") else 4
    return 0.85 if case.shape[1] * size <= ON_CHIP else 0.75


DTYPES = ("float16", "bfloat16", "float32", "float64")

#: A shape from the command line with fewer elements than this is a small call, without a floor.
CALL_BELOW = 100_000
#: Largest array in bytes: the result, the target and a peer's copies must fit into memory too.
MAX_BYTES = 1_100_000_000


def _peaked(x: Array, labels: Array, axis: int) -> None:
    """Logits as after training: the label has probability 0.99."""
    np.put_along_axis(x, np.expand_dims(labels, axis), 5 + log(x.shape[axis]), axis)


def _offset(x: Array, labels: Array, axis: int) -> None:
    x += 1e4


def _masked(x: Array, labels: Array, axis: int) -> None:
    """Every other class is -inf, except the label."""
    np.moveaxis(x, axis, -1)[..., ::2] = -np.inf
    np.put_along_axis(x, np.expand_dims(labels, axis), 0, axis)


def _ignored(x: Array, labels: Array, axis: int) -> None:
    flat = labels.reshape(-1)
    flat[np.arange(flat.size) % 10 < 3] = -100


def _takes_logits(name: str) -> bool:
    return name in ROWWISE and OPERATIONS[name].arguments[0].domain == "logits"


class Kind(NamedTuple):
    """A kind of logits: what is done to the standard normal ones, and for which operations."""

    change: Callable[[Array, Array, int], None]
    suits: Callable[[str], bool]


LOGITS = {
    "randn": Kind(lambda x, labels, axis: None, lambda name: True),
    "peaked": Kind(_peaked, _takes_logits),
    "offset": Kind(_offset, _takes_logits),
    # a class that is impossible must have no share of a target
    "masked": Kind(_masked, lambda name: _takes_logits(name) and not takes(name, "distribution")),
    "ignored": Kind(_ignored, lambda name: takes(name, "labels")),
}
