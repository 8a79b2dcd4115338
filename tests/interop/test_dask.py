"""fastll over chunked arrays: the results of NumPy calls, from any chunks, and not before time."""

# ruff: noqa: E402 (dask may be missing)

import copy
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

dask = pytest.importorskip("dask", reason="dask is not installed")
da = pytest.importorskip("dask.array", reason="dask has no arrays")

import fastll
from fastll.interop import _parts as parts
from fastll.interop import dask as lazy

N, C = 12, 37
#: Of (N, C) arrays: whole, by rows, by classes, by both, odd, and with chunks that are empty.
CHUNKS = {
    "one": (N, C),
    "rows": (5, C),
    "classes": (N, 10),
    "both": (5, 10),
    "odd": ((1, 11), (36, 1)),
    "empty": ((0, 7, 5), (3, 0, 34)),
}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


@pytest.fixture(params=CHUNKS)
def chunks(request):
    return CHUNKS[request.param]


def assert_merged(found, expected, size=1.0):
    """Equal up to the roundings of merges, of numbers whose terms have magnitudes up to `size`.

    A merge rounds each sum three times, and there are at most three here, in float64; the last one of
    the value is in its own dtype, and may go to either side: 1 eps. Gradients end in differences of
    four rounded terms."""
    assert (found.shape, found.dtype) == (np.shape(expected), np.asarray(expected).dtype)
    expected, eps = np.asarray(expected), EPS[str(expected.dtype)]
    np.testing.assert_allclose(found, expected, rtol=eps, atol=(9 * EPS["float64"] + 4 * eps) * size)


def assert_lazily(results, expected, size=1.0):
    for result, of in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (np.shape(of), np.asarray(of).dtype)
    for found, of in zip(dask.compute(*results), expected, strict=True):
        assert_merged(np.asarray(found), of, size)


# ---- Reductions ----


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), ()])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp(rng, chunks, axis, dtype):
    x = (4 * rng.standard_normal((N, C))).astype(dtype)
    lazily = da.from_array(x, chunks=chunks)
    results = lazy.logsumexp(lazily, axis), lazy.logsumexp(lazily, axis, keepdims=True)
    assert_lazily(
        results, (fastll.logsumexp(x, axis), fastll.logsumexp(x, axis, keepdims=True)), size=16
    )


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_logsumexp_with_weights(rng, chunks, axis):
    x, b = rng.standard_normal((2, N, C)).astype(np.float32)
    x[0, 0], b[0, 0], b[:, 3] = np.inf, 0, -1
    lazily = da.from_array(x, chunks=chunks)
    for weights in (b, b[:, :1], 2.0, da.from_array(b, chunks=4)):
        given = weights.compute() if isinstance(weights, da.Array) else weights
        for sign in (False, True):
            result = lazy.logsumexp(lazily, axis, weights, return_sign=sign)
            expected = fastll.logsumexp(x, axis, given, return_sign=sign)
            result, expected = (result, expected) if sign else ((result,), (expected,))
            for found, of in zip(dask.compute(*result), expected, strict=True):
                # terms of both signs cancel: sums of N * C float32 terms to about 1e-3 of them
                np.testing.assert_allclose(found, of, rtol=1e-3, atol=2e-3)
    sign = lazy.logsumexp(lazily, 1, return_sign=True)[1].compute()
    np.testing.assert_array_equal(sign, fastll.logsumexp(x, 1, return_sign=True)[1])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_softmax(rng, chunks, name, axis):
    for dtype in ("float32", "float64"):
        x = (4 * rng.standard_normal((N, C))).astype(dtype)
        result = getattr(lazy, name)(da.from_array(x, chunks=chunks), axis)
        assert result.chunks == da.from_array(x, chunks=chunks).chunks
        assert_merged(result.compute(), getattr(fastll, name)(x, axis), 16 if name != "softmax" else 1)


def test_other_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x, labels = 4 * rng.standard_normal((N, C)), rng.integers(0, C, N).astype(np.uint8)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.int8, ">f4"):
        y = x.astype(dtype)
        lazily = da.from_array(y, chunks=(5, 10))
        loss, grad = lazy.cross_entropy(lazily, labels, label_smoothing=0.1, return_grad=True)
        expected, of = fastll.cross_entropy(y, labels, label_smoothing=0.1, return_grad=True)
        assert (loss.dtype, grad.dtype) == (expected.dtype, of.dtype)
        # terms up to 1 / N, rounded in float32, and once to the dtype
        eps = max(2.0**-23, 2.0 ** -(10 if dtype is np.float16 else 7)) if y.itemsize == 2 else 2.0**-23
        np.testing.assert_allclose(loss.compute(), expected, rtol=2.0**-22)
        found, of = (a.astype(np.float64) for a in (grad.compute(), of))
        np.testing.assert_allclose(found, of, rtol=eps, atol=2.0**-20 / N)
        # one rounding more, of the sum
        p = lazy.softmax(lazily).compute().astype(np.float64)
        np.testing.assert_allclose(p, fastll.softmax(y).astype(np.float64), rtol=2 * eps)


# ---- Losses ----

OPTIONS = {
    "plain": {"axis": 0},
    "z_loss": {"z_loss": 0.01, "axis": -1},
    "smoothing": {"label_smoothing": 0.2, "z_loss": 0.01, "axis": 0},
    "softcap": {"softcap": 3.0, "label_smoothing": 0.1, "axis": -1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_cross_entropy(rng, chunks, kind, options):
    x = 4 * rng.standard_normal((N, C))
    target = rng.dirichlet(np.ones(C), N) if kind == "dense" else rng.integers(0, C, N)
    if kind == "sparse":
        target[[2, 7]] = -100
        x[2, 5] = np.nan  # ignored
    if options["axis"] == 0:
        x, target, chunks = x.T, target.T, chunks[::-1]
    lazily = da.from_array(x, chunks=chunks)
    weight, sample = rng.random(C), rng.random(N)
    sample[4], sample[1] = 0, -0.5
    for reduction in ("none", "sum", "mean"):
        for weights in ({}, {"weight": weight, "sample_weight": sample}):
            given = options | weights | {"reduction": reduction}
            everything = given | {"return_lse": True, "return_grad": True}
            results = lazy.cross_entropy(lazily, target, **everything)
            assert results[2].chunks == lazily.chunks
            results = *results, lazy.cross_entropy(lazily, target, **given)
            expected = fastll.cross_entropy(x, target, **everything)
            # losses up to 20, with N of them
            size = 20.0 * (N if reduction == "sum" else 1)
            assert_lazily(results, (*expected, expected[0]), size)
    given["sample_weight"] = da.from_array(sample, chunks=4)
    target = da.from_array(target, chunks=3)
    assert_lazily((lazy.cross_entropy(lazily, target, **given),), expected[:1], size)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_of_whole_rows(rng, dtype):
    """Rows in one chunk are what NumPy calls make of them, to the bit."""
    x, labels = rng.standard_normal((64, 300)).astype(dtype), rng.integers(0, 300, 64)
    labels[5] = -100
    lazily = da.from_array(x, chunks=(17, 300))
    pairs = [(lazy.logsumexp(lazily, 1), fastll.logsumexp(x, 1))]
    pairs += [
        (getattr(lazy, name)(lazily), getattr(fastll, name)(x)) for name in ("softmax", "log_softmax")
    ]
    sample = rng.standard_normal(64)
    for reduction in ("none", "sum", "mean"):
        for weight in (None, sample):
            given = {"sample_weight": weight, "reduction": reduction, "return_grad": True}
            found = lazy.cross_entropy(lazily, labels, **given)
            expected = fastll.cross_entropy(x, labels, **given)
            pairs.append((found[1], expected[1])) if reduction != "mean" or weight is None else None
            pairs += [(found[0], expected[0])] if reduction == "none" else []
    for found, expected in pairs:
        np.testing.assert_array_equal(found.compute(), expected)


def test_a_small_loss_keeps_its_digits():
    """A label that is ahead of classes in other chunks by 40 and more: 1 - p is 1e-17 and less."""
    for ahead in (40.0, 200.0):
        for offset in (0.0, 4096.0):
            x = np.full((1, 9), offset)
            x[0, 4] += ahead
            lazily = da.from_array(x, chunks=(1, 3))
            loss, grad = lazy.cross_entropy(lazily, [4], return_grad=True)
            expected, of = fastll.cross_entropy(x, [4], return_grad=True)
            # the distance of two parts, `ahead`, is rounded to half an eps of it before its exponential
            rtol = (8 + ahead / 2) * EPS["float64"]
            np.testing.assert_allclose(loss.compute(), expected, rtol=rtol)
            np.testing.assert_allclose(grad.compute(), of, rtol=8 * EPS["float64"])
    tiny = lazy.logsumexp(da.from_array(np.array([0.0, -40.0]), chunks=1))
    np.testing.assert_allclose(tiny.compute(), fastll.logsumexp([0.0, -40.0]), rtol=EPS["float64"])


@pytest.mark.parametrize("sample", [None, 0.0])
def test_special_values(sample):
    inf, nan = np.inf, np.nan
    x = np.array(
        [
            [0, -inf, 1, -inf],  # a label of probability 0, in a part of its own
            [-inf, -inf, 0, 1],  # a part without a finite logit
            [-inf] * 4,
            [0, nan, 1, 2],
            [0, inf, 1, 2],
            [nan, inf, 1, 2],  # ignored
            [1e308, -1e308, 0, 0],
        ]
    )
    labels = np.array([1, 2, 0, 0, 2, -100, 1])
    sample = None if sample is None else np.where(np.arange(7) == 3, 0.0, 1.0)
    for cut in (1, 2, 3, 4):
        lazily = da.from_array(x, chunks=(7, cut))
        given = {"reduction": "none", "sample_weight": sample, "return_lse": True, "return_grad": True}
        for target in (labels, np.eye(4)[labels % 4]):
            with np.errstate(all="ignore"):
                expected = fastll.cross_entropy(x, target, **given)
            for found, of in zip(
                dask.compute(*lazy.cross_entropy(lazily, target, **given)), expected, strict=True
            ):
                rows = slice(None) if target.ndim == 1 else [0, 1, 2, 3, 4, 6]
                np.testing.assert_allclose(found[rows], of[rows], rtol=1e-14, atol=1e-15)
        for name in ("softmax", "log_softmax"):
            found = getattr(lazy, name)(lazily).compute()
            np.testing.assert_allclose(found, getattr(fastll, name)(x), rtol=1e-14, atol=1e-15)


def test_no_rows_and_no_mean():
    for chunks in ((3, C), (3, 10)):
        none = da.zeros((0, C), chunks=chunks)
        loss, grad = lazy.cross_entropy(none, np.zeros(0, int), return_grad=True)
        assert np.isnan(loss.compute())
        assert grad.compute().shape == (0, C)
        x = da.ones((4, C), chunks=chunks)
        loss, grad = lazy.cross_entropy(x, [-100] * 4, return_grad=True)
        assert np.isnan(loss.compute())
        np.testing.assert_array_equal(grad.compute(), np.zeros((4, C)))
    assert lazy.logsumexp(da.zeros((3, 0)), 1).compute().tolist() == [-np.inf] * 3


def test_one_row_and_many_axes(rng):
    x = rng.standard_normal((3, C, 4))
    labels = rng.integers(0, C, (3, 4))
    lazily = da.from_array(x, chunks=(2, 9, 3))
    for given in ({"reduction": "none"}, {}):
        given |= {"axis": 1, "return_grad": True}
        expected = fastll.cross_entropy(x, labels, **given)
        assert_lazily(lazy.cross_entropy(lazily, labels, **given), expected, size=20)
        expected = fastll.cross_entropy(x[0, :, 0], 3, return_grad=True)
        assert_lazily(lazy.cross_entropy(lazily[0, :, 0], 3, return_grad=True), expected, size=20)


def test_likelihood(rng, chunks):
    x, labels, weight = rng.standard_normal((N, C)), rng.integers(0, C, N), rng.random(C)
    labels[3] = -100
    lazily = da.from_array(x, chunks=chunks)
    for given in ({}, {"weight": weight}, {"sample_weight": rng.random(N), "softcap": 5.0}):
        heldout, expected = lazy.NegativeLogLikelihood(), fastll.NegativeLogLikelihood()
        for target in (labels, fastll.softmax(2 * x)):
            heldout.update(lazily, target, **given)
            expected.update(x, target, **given)
        more = lazy.NegativeLogLikelihood().update(lazily, labels).merge(heldout)
        for name in ("mean", "sum", "count", "perplexity", "bits_per_token"):
            found, of = getattr(heldout, name).compute(), getattr(expected, name)
            # sums of 24 losses, each within some roundings
            np.testing.assert_allclose(found, of, rtol=24 * EPS["float64"])
        computed = more.compute()
        assert isinstance(computed, fastll.NegativeLogLikelihood)
        expected.update(x, labels)
        np.testing.assert_allclose(computed.sum, expected.sum, rtol=36 * EPS["float64"])
        assert type(computed.count) is type(expected.count)
    assert lazy.NegativeLogLikelihood().count.compute() == 0


# ---- Laziness, errors, memory ----


def not_computed(*chunks, **_):
    raise AssertionError("a chunk was computed")


def uncomputable(shape, chunks, dtype=float):
    zeros = da.zeros(shape, chunks=chunks, dtype=dtype)
    return zeros.map_blocks(not_computed, dtype=dtype, meta=np.empty((0,) * len(shape), dtype))


@pytest.mark.parametrize("chunks", [(5, C), (5, 10)])
def test_nothing_is_computed(chunks):
    x, labels = uncomputable((N, C), chunks), uncomputable((N,), 5, int)
    weights = {"weight": uncomputable((C,), 7), "sample_weight": uncomputable((N,), 5)}
    results = [lazy.logsumexp(x, 1), lazy.softmax(x), lazy.log_softmax(x), lazy.logsumexp(x, 0, x)]
    for reduction in ("none", "sum", "mean"):
        given = {"reduction": reduction, "return_lse": True, "return_grad": True, "z_loss": 0.1}
        results += lazy.cross_entropy(x, labels, **given, **weights)
        results += lazy.cross_entropy(x, x, **given, **weights)
    heldout = (
        lazy.NegativeLogLikelihood()
        .update(x, labels, **weights)
        .merge(lazy.NegativeLogLikelihood().update(x, x))
    )
    results += [heldout.mean, heldout.count]
    for result in results:
        with pytest.raises(AssertionError, match="a chunk was computed"):
            result.compute()


WRONG = [
    (lambda x, y: lazy.logsumexp(x, 2), ValueError, "axis is 2; expected -2 <= axis < 2"),
    (lambda x, y: lazy.softmax(x, (0, 0)), ValueError, "expected each axis once"),
    (lambda x, y: lazy.logsumexp(x.astype(complex)), TypeError, "a has dtype complex128; fastll takes"),
    (lambda x, y: lazy.logsumexp(x, b=np.ones(3)), ValueError, r"b has shape \(3,\)"),
    (lambda x, y: lazy.softmax(x.astype(str)), TypeError, "x has dtype"),
    (
        lambda x, y: lazy.cross_entropy(x, y[:5]),
        ValueError,
        r"target has shape \(5,\); expected that of",
    ),
    (lambda x, y: lazy.cross_entropy(x, y.astype(float)), TypeError, "labels must be integers"),
    (lambda x, y: lazy.cross_entropy(x, y, axis=5), ValueError, "axis is 5"),
    (lambda x, y: lazy.cross_entropy(x, y, weight=np.ones(5)), ValueError, r"weight has shape \(5,\)"),
    (lambda x, y: lazy.cross_entropy(x, y, weight=x[0, :5]), ValueError, r"weight has shape \(5,\)"),
    (lambda x, y: lazy.cross_entropy(x, y, sample_weight=x[0]), ValueError, "sample_weight has shape"),
    (lambda x, y: lazy.cross_entropy(x, y, reduction="all"), ValueError, "reduction is 'all'"),
    (lambda x, y: lazy.cross_entropy(x, y, label_smoothing=2), ValueError, "label_smoothing is 2"),
    (lambda x, y: lazy.cross_entropy(x, y, softcap=0), ValueError, "softcap is 0"),
    (lambda x, y: lazy.cross_entropy(x, x, ignore_index=1), ValueError, "a dense target has no labels"),
    (lambda x, y: lazy.cross_entropy(x[x[:, 0] > 0], y), ValueError, "chunks of unknown size"),
    (lambda x, y: lazy.NegativeLogLikelihood().update(x, y[:5]), ValueError, "target has shape"),
    (lambda x, y: lazy.NegativeLogLikelihood().merge(0), TypeError, "other is a int"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_come_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call(uncomputable((N, C), (5, 10)), uncomputable((N,), 5, int))


@pytest.mark.parametrize("chunks", [(5, C), (5, 10)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_labels_out_of_range(chunks, reduction):
    labels = np.zeros(N, int)
    labels[8] = C
    loss = lazy.cross_entropy(da.zeros((N, C), chunks=chunks), labels, reduction=reduction)
    with pytest.raises(IndexError, match=rf"target has label {C} at \(3,\); expected 0 <= label < {C}"):
        loss.compute()


def test_parts_are_not_changed(rng):
    """dask may hand the same object to several tasks."""
    x = rng.standard_normal((N, C))
    target = parts.Target(rng.integers(0, C, N), None, None, 0, C, -100, 0.0, None)
    a, b = parts.part_of(x, 1, target), parts.part_of(2 * x, 1, target)
    before = copy.deepcopy((a, b))
    parts.merged(a, b)
    parts.gradient(x, 1, a, target, None, 1.0, 0.1)
    for one, was in zip((a, b), before, strict=True):
        np.testing.assert_array_equal(one.state.state, was.state.state)
        np.testing.assert_array_equal((one.loss, one.mass), (was.loss, was.mass))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}])
@pytest.mark.parametrize("axis", [0, 1])
def test_memory_of_a_gradient(options, axis):
    """A gradient takes its result, and a few slices of 256 KiB where there are options."""
    shape = (4096, 512) if axis else (512, 4096)
    target = np.zeros(4096, int)
    one = parts.Target(
        target, None, None, 0, 512, -100, options.get("label_smoothing", 0.0), options.get("softcap")
    )
    x = np.zeros(shape, np.float32)
    part = parts.part_of(x, axis, one)
    parts.gradient(x, axis, part, one, None, 1.0, 0.0)
    tracemalloc.start()
    try:
        result = parts.gradient(x, axis, part, one, None, 1.0, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # five slices, and two dozen float64 of each row
    assert peak < result.nbytes + 5 * 2**18 + 4096 * 8 * 24


# ---- fastll's own functions ----


def test_fastll_itself(rng):
    x, labels = rng.standard_normal((N, C)), rng.integers(0, C, N)
    lazily, lazy_labels = da.from_array(x, chunks=(5, 10)), da.from_array(labels, chunks=4)
    results = [
        fastll.logsumexp(lazily, 1),
        fastll.logsumexp(x, axis=0, b=lazily, keepdims=True, return_sign=True)[1],
        fastll.softmax(lazily, axis=0),
        fastll.log_softmax(lazily),
        fastll.cross_entropy(lazily, labels),
        *fastll.cross_entropy(x, target=lazy_labels, return_grad=True),
    ]
    expected = [
        fastll.logsumexp(x, 1),
        fastll.logsumexp(x, axis=0, b=x, keepdims=True, return_sign=True)[1],
        fastll.softmax(x, axis=0),
        fastll.log_softmax(x),
        fastll.cross_entropy(x, labels),
        *fastll.cross_entropy(x, labels, return_grad=True),
    ]
    assert all(isinstance(result, da.Array) for result in results)
    assert_lazily(results, expected, size=20)


REFUSED = [
    (
        lambda x: fastll.sigmoid(x),
        "sigmoid takes no dask array; logsumexp, softmax, log_softmax, cross",
    ),
    (lambda x: fastll.nll_loss(x, np.zeros(N, int)), "nll_loss takes no dask array"),
    (lambda x: fastll.softmax(x, out=np.zeros((N, C))), "out is given"),
    (lambda x: fastll.cross_entropy(x, x, grad_out=np.zeros((N, C))), "grad_out is given"),
    (
        lambda x: fastll.LogSumExp((N,)).update(x),
        "a dask array is not taken here; expected a NumPy array",
    ),
    (
        lambda x: fastll.NegativeLogLikelihood().update(x, x),
        "a dask array is not taken here; expected a NumPy array",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_takes_none(call, message):
    with pytest.raises(TypeError, match=message):
        call(uncomputable((N, C), (5, 10)))


def test_dask_is_not_imported_for_others():
    code = (
        "import sys, fastll; fastll.softmax([1.0]); print([m for m in sys.modules if m[:4] == 'dask'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- Elsewhere ----


def test_pickle(rng):
    x, labels = rng.standard_normal((N, C)), rng.integers(0, C, N)
    loss, grad = lazy.cross_entropy(da.from_array(x, chunks=(5, 10)), labels, return_grad=True)
    expected = fastll.cross_entropy(x, labels, return_grad=True)
    assert_lazily(pickle.loads(pickle.dumps((loss, grad))), expected, size=20)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_distributed(rng):
    """Two processes: what goes between them is pickled."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    x, labels = rng.standard_normal((N, C)), rng.integers(0, C, N)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster) as client:
        lazily = da.from_array(x, chunks=(5, 10))
        results = lazy.cross_entropy(lazily, labels, label_smoothing=0.1, return_grad=True)
        results = *results, lazy.softmax(lazily), lazy.logsumexp(lazily)
        heldout = lazy.NegativeLogLikelihood().update(lazily, labels)
        found = [future.result() for future in client.compute([*results, heldout.mean])]
    expected = fastll.cross_entropy(x, labels, label_smoothing=0.1, return_grad=True)
    expected = *expected, fastll.softmax(x), fastll.logsumexp(x), fastll.cross_entropy(x, labels)
    for one, of in zip(found, expected, strict=True):
        assert_merged(np.asarray(one), of, 20)
