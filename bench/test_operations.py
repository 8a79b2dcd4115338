"""Every operation on every backend, in time and in multiples of its floor (`extra_info`)."""

from __future__ import annotations

import numpy as np
import pytest

import fastll
from bench import floors
from fastll.operations import OPERATIONS

#: GPT-2's vocabulary, ImageNet's classes, digits; an axis that is not the last one.
SHAPES = [((2048, 50257), 1), ((65536, 1000), 1), ((500_000, 10), 1), ((4096, 4096), 0)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda p: f"{p[0][0]}x{p[0][1]}-axis{p[1]}")
def case(request):
    """(x, axis)."""
    shape, axis = request.param
    return np.random.default_rng(0).standard_normal(shape, np.float32), axis


def floor_of(x: np.ndarray, arrays: int, writes: bool) -> float:
    """Each further input is one more read; a result in the shape of x is one write.

    Measured for each operation anew, just before it: the speed of a shared machine drifts.
    """
    read = floors.read(x) if arrays > 1 or not writes else 0.0
    return (floors.copy(x) if writes else read) + (arrays - 1) * read


@pytest.mark.parametrize("backend", ["numba", "cython"])
@pytest.mark.parametrize("grad", [False, True], ids=["value", "grad"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark, case, name, grad, backend):
    operation = OPERATIONS[name]
    if grad and not operation.gradient:
        pytest.skip("has no gradient")
    if not fastll.backends()[backend].available:
        pytest.skip(f"backend {backend} is not available")
    x, axis = case
    arguments = operation.arguments(np.random.default_rng(1), x, axis)
    options: dict[str, object] = {} if operation.elementwise else {"axis": axis}
    out = np.empty_like(x)
    if grad:
        options |= {"return_grad": True, "grad_out": out}
    elif not (operation.reduces or operation.gradient):
        options |= {"out": out}
    floor = floor_of(x, 1 + sum(a.shape == x.shape for a in arguments), "out" in options or grad)
    with fastll.use_backend(backend):
        benchmark.pedantic(operation.function, (x, *arguments), options, rounds=5, warmup_rounds=1)
    benchmark.extra_info["times_the_floor"] = benchmark.stats.stats.median / floor
