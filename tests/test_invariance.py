"""Bits: a row's result depends on that row alone, not on the batch, the threads or the layout."""

from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from conftest import require
from table import DTYPES, LAYOUTS, eps

import fastll
from fastll import dispatch
from fastll.operations import OPERATIONS

ROWWISE = [name for name, operation in OPERATIONS.items() if not operation.elementwise]

# short rows, one block, several blocks, and a last vector that is not full
CLASSES = [10, 64, 1000, 5001]


def rows_of(name, x, arguments, axis, **options):
    """All results with a row at each index of the first axis."""
    operation = OPERATIONS[name]
    if operation.gradient:
        options |= {"reduction": "none", "return_lse": True, "return_grad": True}
        options |= {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
    results = operation.function(x, *arguments, axis=axis, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [np.moveaxis(r, axis, -1) if r.ndim == x.ndim else r for r in results]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(np.float64), other.astype(np.float64))


@pytest.fixture(params=["float16", "float32", "float64"])
def case(request, rng):
    """Arguments of an operation with 70 rows."""

    def make(name, classes):
        x = (4 * rng.standard_normal((70, classes))).astype(DTYPES[request.param])
        return x, OPERATIONS[name].arguments(rng, x, 1)

    return make


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("classes", CLASSES)
def test_batch(backend, case, name, classes):
    x, arguments = case(name, classes)
    whole = rows_of(name, x, arguments, 1)
    for part in (slice(0, 1), slice(13, 14), slice(5, 40), slice(69, 70)):
        assert_same([r[part] for r in whole], rows_of(name, x[part], [a[part] for a in arguments], 1))


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("classes", CLASSES)
def test_threads(backend, case, threads, name, classes):
    x, arguments = case(name, classes)
    results = []
    for n in (1, 2, 3, 7):
        threads(n, share_from=1)
        results.append(rows_of(name, x, arguments, 1))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("classes", CLASSES)
def test_layout(compiled, case, name, classes):
    x, arguments = case(name, classes)
    expected = rows_of(name, x, arguments, 1)
    for lay_out in LAYOUTS.values():
        assert_same(expected, rows_of(name, lay_out(x), arguments, 1))
    turned = [np.ascontiguousarray(a.T) if a.ndim == 2 else a for a in arguments]
    assert_same(expected, rows_of(name, np.ascontiguousarray(x.T), turned, 0))
    # and one column of them alone
    one = [a[:, 3:4] if a.ndim == 2 else a[3:4] for a in turned]
    assert_same([r[3:4] for r in expected], rows_of(name, np.ascontiguousarray(x.T[:, 3:4]), one, 0))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].elementwise])
def test_elements(backend, case, threads, name):
    x, _ = case("softmax", 3000)
    options = {"reduction": "sum"} if OPERATIONS[name].gradient else {}
    arguments = (x > 0,) if OPERATIONS[name].gradient else ()
    threads(1)
    expected = OPERATIONS[name].function(x, *arguments, **options)
    threads(4, share_from=1)
    np.testing.assert_array_equal(OPERATIONS[name].function(x, *arguments, **options), expected)
    if not options:
        np.testing.assert_array_equal(OPERATIONS[name].function(x[7, 5:9]), expected[7, 5:9])


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_backends_agree_to_the_bit(name, case, request):
    """Numba and Cython hold the same numbers and the same order of sums (where there is an FMA)."""
    require("numba")
    require("cython")
    from fastll.backend.cython import backend as cython

    if cython.instruction_set == "baseline":
        pytest.skip("no fused multiply-add in the extension for this CPU")
    for classes in CLASSES:
        x, arguments = case(name, classes)
        results = []
        for backend in ("numba", "cython"):
            with fastll.use_backend(backend):
                if OPERATIONS[name].elementwise:
                    results.append([np.asarray(OPERATIONS[name].function(x, *arguments))])
                else:
                    results.append(rows_of(name, x, arguments, 1))
        assert_same(*results)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("module", ["_v1", "_v3"])
def test_instruction_sets(monkeypatch, module, name):
    """What is compiled for older CPUs gives the same bits; without an FMA, nearly so."""
    require("cython")
    best = dispatch._load("cython")
    try:
        other = import_module(f"fastll.backend.cython.{module}").backend
    except ImportError:
        pytest.skip("not built")
    if module == "_v3" and best.instruction_set == "baseline":
        pytest.skip("this CPU is older")
    operation, rng = OPERATIONS[name], np.random.default_rng(0)
    for dtype in DTYPES.values():
        for shape, axis in (((70, 301), 1), ((301, 70), 0), ((150, 10), 1), ((3, 5000), 1)):
            x = (3 * rng.standard_normal(shape)).astype(dtype)
            arguments = operation.arguments(rng, x, axis)
            options = {} if operation.elementwise else {"axis": axis}
            if operation.gradient:
                options["return_grad"] = True
            results = []
            for backend in (best, other):
                monkeypatch.setattr(dispatch, "_load", lambda _, backend=backend: backend)
                result = operation.function(x, *arguments, **options)
                results.append(result if isinstance(result, tuple) else (result,))
            for expected, actual in zip(*results, strict=True):
                rtol = 50 * eps(dtype) + 2 * float(ml_dtypes.finfo(actual.dtype).eps)
                np.testing.assert_allclose(
                    np.asarray(actual, np.float64),
                    np.asarray(expected, np.float64),
                    rtol=rtol if module == "_v1" else 0,
                    atol=1e-9 * (module == "_v1"),
                )
