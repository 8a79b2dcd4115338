"""Bits: a row's result depends on that row alone, not on the batch, the threads or the layout."""

from functools import partial
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from conftest import require
from table import DTYPES, LAYOUTS, Call, assert_same_bits, eps, inputs, parts

import fastll
from fastll import direct, dispatch
from fastll.backend.host import STREAM_FROM
from fastll.contract import LONG
from fastll.operations import OPERATIONS

ROWS = 70
GRADIENT = {"return_grad": True, "reduction": "none"}
# short rows, one block, several blocks, and a last vector that is not full
CLASSES = [10, 64, 1000, 5001]


def results(call, change=lambda a: a, axis=1):
    """All results of each row or element, with the rows first."""
    operation = call.operation
    arrays, keywords = call.arguments(change)
    if not operation.elementwise:
        keywords["axis"] = axis
    keywords |= dict.fromkeys(operation.extras, True)
    if operation.gradient:
        keywords |= {"reduction": "none", "return_grad": True}
    found = parts(operation.function(*arrays, **keywords))
    return [r.T if axis == 0 and r.ndim == 2 else r for r in found]


def turned(a):
    """An array with rows in front as one with rows behind."""
    return np.ascontiguousarray(a.T)


@pytest.fixture(params=["float16", "float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=CLASSES)
def classes(request):
    return request.param


#: Each operation without options, and with all.
CALLS = [
    pytest.param(name, i, id=f"{name}{'-all' * bool(i)}")
    for name, operation in OPERATIONS.items()
    for i in {0, len(operation.options) - 1}
]


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_batch(backend, dtype, classes, name, option, rng):
    call = Call(name, DTYPES[dtype], (ROWS, classes), option, rng)
    whole = results(call)
    for part in (slice(0, 1), slice(13, 14), slice(5, 40), slice(69, 70)):
        assert_same_bits(results(call, lambda a, part=part: a[part]), [r[part] for r in whole])


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_threads(backend, dtype, classes, threads, name, option, rng):
    call = Call(name, DTYPES[dtype], (ROWS, classes), option, rng)
    found = []
    for n in (1, 2, 3, 7):
        threads(n, share_from=1)
        found.append(results(call))
        if call.operation.gradient:  # sums and means too
            arrays, keywords = call.arguments(lambda a: a)
            for reduction in ("sum", "mean"):
                found[-1].append(call.operation.function(*arrays, **keywords, reduction=reduction))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_layout(compiled, dtype, classes, name, option, rng):
    call = Call(name, DTYPES[dtype], (ROWS, classes), option, rng)
    expected = results(call)
    for lay_out in LAYOUTS.values():
        assert_same_bits(results(call, lay_out), expected)
    assert_same_bits(results(call, turned, axis=0), expected)
    # and one column of them alone
    one = results(call, lambda a: np.ascontiguousarray(turned(a)[..., 3:4]), axis=0)
    assert_same_bits(one, [r[3:4] for r in expected])


@pytest.mark.parametrize(("classes", "inner"), [(19, 19), (19, 530), (70, 530), (5001, 576)])
def test_columns_over_themselves(compiled, threads, rng, classes, inner):
    """Some are read while others are folded, but none after it was written; threads cut anywhere."""
    x = rng.standard_normal((3, classes, inner), np.float32)
    x[2] += 50  # nothing of which the others may notice
    assert x.nbytes >= STREAM_FROM or classes < 5001  # streamed
    x[0, 3, 10], x[2, -1, 6], x[2, 5, inner - 7], x[0, :, -1] = np.nan, np.inf, 1e30, -np.inf
    y = rng.integers(0, classes, (3, inner))
    rows = np.moveaxis(x, 1, -1).copy()

    def gradient(x, axis, out=None, **options):
        return fastll.cross_entropy(
            x, y, axis=axis, reduction="none", return_grad=True, grad_out=out, **options
        )[1]

    for function in (
        fastll.softmax,
        fastll.log_softmax,
        gradient,
        partial(gradient, label_smoothing=0.1),
        partial(gradient, softcap=5.0),
    ):
        with np.errstate(invalid="ignore"):
            expected = np.moveaxis(function(rows, axis=-1), -1, 1)
            for n in (1, 3):
                threads(n, share_from=1)
                own = x.copy()
                function(own, axis=1, out=own)
                assert_same_bits(own, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 40, 2049, 5000, 140000])
def test_subnormal_results_in_every_layout(compiled, dtype, classes):
    """Kept exponentials, those of earlier blocks and recomputed ones give one value."""
    smallest = np.log(float(np.finfo(dtype).smallest_subnormal))
    x = np.full((3, classes), 1.5 * smallest, dtype)
    x[:, 0], x[:, 1] = 0, smallest + 3
    x[1] = x[1, ::-1]  # the maximum in the last block
    x[2] -= 300
    for function, options in (
        (fastll.softmax, {}),
        (fastll.cross_entropy, {"target": [0, 0, 0]} | GRADIENT),
        # factors of the gradient that are themselves nearly subnormal, or huge
        (fastll.cross_entropy, {"target": [0, 0, 0], "return_grad": True, "z_loss": 1e-38}),
        (fastll.cross_entropy, {"target": [0, 0, 0], "return_grad": True, "z_loss": 1e25}),
        (fastll.cross_entropy, {"target": [0, 0, 0], "weight": np.full(classes, 1e-36)} | GRADIENT),
    ):
        expected = parts(function(x, axis=1, **options))[-1]
        for layout in (np.asfortranarray(x), x[:, ::-1][:, ::-1], np.repeat(x, 2, axis=1)[:, ::2]):
            assert_same_bits(parts(function(layout, axis=1, **options))[-1], expected)
        if function is fastll.softmax:
            place = [1, classes - 2, 1]
            tiny = expected[[0, 1, 2], place]
            assert (tiny > 0).all()
            np.testing.assert_allclose(tiny[0], np.exp(np.longdouble(x[0, 1])), rtol=0.2)


def test_no_negative_zero_of_an_earlier_block(backend):
    x = np.repeat([-1000.0, 0.0], 2048)
    for dtype in ("float32", "float64"):
        result = np.asarray(fastll.softmax(x.astype(dtype)))
        assert (result[:2048] == 0).all()
        assert not np.signbit(result).any()


@pytest.fixture
def on_both():
    """A function that calls another one on Numba and on Cython (where there is an FMA)."""
    require("numba")
    require("cython")
    from fastll.backend.cython import backend as cython

    if cython.instruction_set == "baseline":
        pytest.skip("no fused multiply-add in the extension for this CPU")

    def found(function, *arguments, **keywords):
        for backend in ("numba", "cython"):
            with fastll.use_backend(backend):
                yield function(*arguments, **keywords)

    return found


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_compiled_backends_agree_to_the_bit(on_both, name, option, dtype):
    """Numba and Cython hold the same numbers and the same order of sums."""
    for classes in CLASSES:
        call = Call(name, DTYPES[dtype], (ROWS, classes), option)
        assert_same_bits(*on_both(results, call))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_factors_of_the_gradient(on_both, dtype, reduction, rng):
    """Exponentials that were kept do for moderate factors only; others give the same bits.

    Half of the rows have their maximum in a later block, so that what was kept is scaled down.
    """
    low = -280 if dtype == "float32" else -1600
    x = rng.uniform(low, 0, (16, 5000)).astype(dtype)
    x[::2, :2048] -= 20
    x[:, -1] = 0
    y = rng.integers(0, 5000, 16)
    for weight, z_loss in ((2.0**40, 0), (2.0**100, 0), (1e-25, 1)):
        keywords = {"weight": np.full(5000, weight), "z_loss": z_loss, "reduction": reduction}
        found = [
            grad
            for axis, logits in ((1, x), (0, turned(x)))
            for grad in on_both(gradient, logits, y, axis=axis, **keywords)
        ]
        for other in found[1:]:
            assert_same_bits(found[0], other)


def gradient(logits, target, axis, **keywords):
    """The gradient of a cross-entropy, as of rows."""
    _, grad = fastll.cross_entropy(logits, target, axis=axis, return_grad=True, **keywords)
    return turned(grad) if axis == 0 else grad


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("module", ["_v1", "_v3"])
def test_instruction_sets(monkeypatch, module, name):
    """What is compiled for older CPUs gives the same bits; without an FMA, nearly so."""
    require("cython")
    from fastll.backend import cython

    best = cython._best()
    try:
        other = import_module(f"fastll.backend.cython.{module}")
    except ImportError:
        pytest.skip("not built")
    if module == "_v3" and best.backend.instruction_set == "baseline":
        pytest.skip("this CPU is older")
    if best is other:
        pytest.skip("this is the one in use")
    operation, rng = OPERATIONS[name], np.random.default_rng(0)
    more = {"return_grad": True} if operation.gradient else {}
    for dtype in DTYPES.values():
        for shape, axis in (((70, 301), 1), ((301, 70), 0), ((150, 10), 1), ((3, 5000), 1)):
            arrays, keywords = inputs(name, dtype, shape, axis, {}, rng, spread=3)
            found = []
            for built in (best, other):
                monkeypatch.setattr(dispatch, "_first", lambda _, built=built: built.backend)
                entry = built.Direct(dispatch._forced, None, {})
                for way in ("fold", "loss", "elementwise"):
                    monkeypatch.setattr(direct, way, getattr(entry, way))
                found.append(parts(operation.function(*arrays, **keywords, **more)))
            if module == "_v3":
                assert_same_bits(*found)
                continue
            for expected, actual in zip(*found, strict=True):
                own = ml_dtypes.finfo(actual.dtype)
                actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
                # parts that cancel are about as large as the largest result; or a step of a subnormal
                largest = np.abs(
                    expected, where=np.isfinite(expected), out=np.zeros(expected.shape)
                ).max()
                small = 50 * eps(dtype) * largest + float(own.smallest_subnormal)
                rtol = 50 * eps(dtype) + 2 * float(own.eps)
                np.testing.assert_allclose(actual, expected, rtol=rtol, atol=small)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_long_row_is_shared(compiled, threads, monkeypatch, weighted, rng):
    """A log-sum-exp of several pieces, the last of which is not full."""
    x = rng.standard_normal((3, 3 * LONG + 77), np.float32)
    x[1, 2 * LONG] = 50  # the maximum at the edge of a piece
    x[2] = -np.inf
    options = {"b": rng.standard_normal(x.shape), "return_sign": True} if weighted else {}
    found, shares = [], []
    run = type(fastll.dispatch._load(compiled)).run

    def watched(kernel, units, elements):
        shares.append(units)
        run(kernel, units, elements)

    monkeypatch.setattr(type(fastll.dispatch._load(compiled)), "run", staticmethod(watched))
    for n in (1, 2, 7):
        threads(n, share_from=1)
        found.append(parts(fastll.logsumexp(x, axis=1, **options)))
    assert 9 in shares  # three pieces of three rows
    turned_options = {k: turned(v) if k == "b" else v for k, v in options.items()}
    found.append(parts(fastll.logsumexp(turned(x), axis=0, **turned_options)))
    for i, row in enumerate(x):
        own = {k: v[i] if k == "b" else v for k, v in options.items()}
        assert_same_bits(
            [np.array(p) for p in parts(fastll.logsumexp(row, **own))], [f[i] for f in found[0]]
        )
    for other in found[1:]:
        assert_same_bits(other, found[0])
    terms = np.exp(x.astype(float)) * options.get("b", 1)
    # terms of both signs cancel: 69 roundoffs of a sum, relative to that of magnitudes
    error = 69 * np.finfo(np.float32).eps / 2 * np.abs(terms).sum(1)[:2] / np.abs(terms.sum(1)[:2])
    expected = np.log(np.abs(terms.sum(1)[:2]))
    assert (np.abs(found[0][0][:2] - expected) <= error + np.spacing(np.float32(20))).all()
