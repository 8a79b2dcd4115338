"""Where Numba is faster than Cython: measures what `NUMBA_FROM` in `fastll.dispatch` is set from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from statistics import geometric_mean
from timeit import Timer
from typing import Any

import numpy as np

import fastll
from bench.cases import ELEMENTS, ROWS, Case
from bench.jobs import Job, measures, workload
from fastll.backend.host import crosses
from fastll.dispatch import Family
from fastll.operations import OPERATIONS

DTYPES = ("float32", "float64", "float16", "bfloat16")
SIZES = tuple(1 << k for k in range(16, 25, 2))
#: Classes and axis of rows: short and long ones, and classes that are apart in memory.
CLASSES = ((10, 1), (100, 1), (1000, 1), (32000, 1), (1000, 0))
#: Alternating samples, each of as many calls as take so many seconds.
ROUNDS, SECONDS = 15, 2e-3
#: Ratio of the times, in the geometric mean, from which Numba counts as faster.
FASTER = 0.97


def crossover() -> Iterator[str]:
    """Measure, and yield one line per measurement, and in the end the lines of the table."""
    ratios: dict[tuple[Family, str], list[list[float]]] = {}
    sizes = ", ".join(f"2**{size.bit_length() - 1}" for size in SIZES)
    yield f"Time of numba over that of cython, at {sizes} elements:"
    for dtype in DTYPES:
        for measure in measures():
            name, variant = measure.split("/")
            if name not in (*ROWS, *ELEMENTS) or variant == "in-place":
                continue
            for classes, axis in ((1, 0),) if OPERATIONS[name].elementwise else CLASSES:
                found = []
                for size in SIZES:
                    case = _case(size, classes, axis)
                    call = workload(Job(name, variant, case, dtype, "randn", "", (), ROUNDS)).call
                    found.append(_compare(call))
                family = _family(OPERATIONS[name].elementwise, case)
                ratios.setdefault((family, dtype), []).append(found)
                where = f"{classes} classes, axis {axis}" if family != "maps" else "elements"
                yield f"{family} {dtype}, {measure}, {where}: {_listed(found)}"
    yield "Geometric means, and the size from which on they favour numba:"
    for (family, dtype), lists in ratios.items():
        means = [geometric_mean(column) for column in zip(*lists, strict=True)]
        slower = [size for size, mean in zip(SIZES, means, strict=True) if mean > FASTER]
        first = SIZES[0] if not slower else 4 * slower[-1]
        said = (
            f'("{family}", "{dtype}"): 1 << {first.bit_length() - 1}' if first <= SIZES[-1] else "never"
        )
        yield f"{family} {dtype}: {_listed(means)}; {said}"


def _case(size: int, classes: int, axis: int) -> Case:
    rows = max(1, size // classes)
    shape = (size,) if classes == 1 else (rows, classes) if axis == 1 else (classes, rows)
    return Case("", shape, axis, (), group="calls")


def _family(elementwise: bool, case: Case) -> Family:
    if elementwise:
        return "maps"
    outer, inner = prod(case.shape[: case.axis]), prod(case.shape[case.axis + 1 :])
    view = np.empty(case.shape, np.uint8).reshape(outer, case.shape[case.axis], inner)
    return "columns" if crosses(view)[1] else "rows"


def _compare(call: Callable[[], Any]) -> float:
    """Time by numba over time by cython."""
    timer, number = Timer(call), 1
    times: dict[str, list[float]] = {"cython": [], "numba": []}
    with fastll.use_backend("numba"):
        call()  # compiles
    while timer.timeit(number) < SECONDS:
        number *= 2
    for _ in range(ROUNDS):
        for backend, samples in times.items():
            with fastll.use_backend(backend):
                samples.append(timer.timeit(number))
    return min(times["numba"]) / min(times["cython"])  # a busy machine only adds to times


def _listed(ratios: list[float]) -> str:
    return " ".join(f"{found:.2f}" for found in ratios)
