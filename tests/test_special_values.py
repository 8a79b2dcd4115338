"""Infinities, NaN, empty axes, huge numbers: SciPy and PyTorch's answers, or better ones on purpose."""

import warnings

import numpy as np
import pytest
import scipy.special
from conftest import require
from table import DTYPES, assert_same_bits

import fastll
from fastll import dispatch
from fastll.api import losses
from fastll.contract import Fold

INF, NAN = np.inf, np.nan

ROWS = [
    [0.0, -40.0],
    [1.0, INF],
    [1.0, -INF],
    [INF, INF],
    [INF, -INF],
    [-INF, -INF],
    [1.0, NAN],
    [NAN, INF],
    [NAN, -INF],
    [NAN, NAN],
    [1e30, 1e30],
    [-1e30, 1e30],
    [3e6, 3e6 - 1],
    [700.0, -800.0],
    [5.0],
    [-INF],
    [INF],
    [],
]


@pytest.fixture(params=[1, 40, 3000], ids="x{}".format)
def repeats(request):
    """Every value of a row this many times: short rows, one block, several blocks."""
    return request.param


@pytest.fixture(params=["row", "column"])
def orient(request):
    """A row as a one-dimensional array, or as the middle column of three."""
    if request.param == "row":
        return lambda row: (row, 0, lambda result: result)
    return lambda row: (
        np.stack([np.zeros_like(row), row, np.ones_like(row)], axis=1),
        0,
        lambda result: np.asarray(result)[..., 1],
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_against_scipy(backend, dtype, row, repeats, orient):
    row = np.repeat(np.array(row, dtype), repeats)
    x, axis, pick = orient(row)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        wide = row.astype(np.float64)
        lse = scipy.special.logsumexp(wide)
        softmax = scipy.special.softmax(wide) if row.size else wide
        log_softmax = scipy.special.log_softmax(wide) if row.size else wide
    close = {"rtol": 4 * np.finfo(dtype).eps, "atol": np.finfo(dtype).smallest_subnormal}
    np.testing.assert_allclose(pick(fastll.logsumexp(x, axis=axis)), lse, **close)
    np.testing.assert_allclose(pick(fastll.softmax(x, axis=axis)), softmax, **close)
    if INF not in row:  # SciPy: -inf beside +inf; here as for softmax: NaN or that, but no number
        close["atol"] = 1e-16  # SciPy's has no log1p form
        np.testing.assert_allclose(pick(fastll.log_softmax(x, axis=axis)), log_softmax, **close)
    else:
        assert not np.isfinite(pick(fastll.log_softmax(x, axis=axis))).any()


@pytest.mark.parametrize(
    "sign", [[1, 1], [1, -1], [-1, -1], [0, 1], [1, 0], [0, 0], [-2, 0.5]], ids=str
)
@pytest.mark.parametrize("row", [row for row in ROWS if len(row) == 2], ids=str)
def test_weights(backend, row, sign, orient):
    a, b = np.array(row), np.array(sign, np.float64)
    x, axis, pick = orient(a)
    weights = b if x.ndim == 1 else b[:, None]
    value, result_sign = fastll.logsumexp(x, axis=axis, b=weights, return_sign=True)
    plain = fastll.logsumexp(x, axis=axis, b=weights)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # the elements that count, by IEEE rules
        a, b = a[b != 0], b[b != 0]
        m = a.max(initial=-INF)
        s = np.sum(b * (np.where(a == INF, INF, 0) if m == INF else np.exp(a - m))) if m > -INF else 0.0
        s = np.nan if np.isnan(a).any() else s
        expected = m + np.log(np.abs(s)) if s != 0 else -INF
        scipy_value = scipy.special.logsumexp(row, b=sign)
    # 1e-16: the plain logarithm here has no log1p form
    np.testing.assert_allclose(pick(value), expected, rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(pick(result_sign), np.sign(s))
    np.testing.assert_allclose(pick(plain), NAN if s < 0 else expected, rtol=1e-14, atol=1e-16)
    if not np.isnan(scipy_value):  # NaN is also what SciPy makes of some masked or huge elements
        np.testing.assert_allclose(pick(plain), scipy_value, rtol=1e-14)


def test_weight_of_zero_masks(backend):
    assert fastll.logsumexp([1.0, INF, NAN], b=[1.0, 0.0, 0.0]) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ([1.0, 1.0], [INF, 1.0]),
        ([1.0, 2.0], [1.0, INF]),
        ([1.0, 2.0], [INF, 1.0]),
        ([1.0, 2.0], [-INF, 1.0]),
        ([1.0, 2.0], [INF, -INF]),
        ([0.0, -1000.0], [1.0, INF]),  # inf times 0
        ([-INF, -INF], [NAN, 2.0]),
        ([-INF, -INF], [INF, 2.0]),
        ([-INF, 1.0], [INF, 2.0]),
        ([-INF, 1.0], [NAN, 2.0]),
        ([-INF, 1.0], [2.0, NAN]),
        ([INF, 1.0], [INF, 1.0]),
        ([INF, 1.0], [2.0, NAN]),
        ([3e6, 3e6], [1.0, INF]),
    ],
    ids=str,
)
def test_infinite_and_nan_weights(backend, dtype, row, weights, repeats, orient):
    """SciPy's answers, in one block and in several; the rows beside it keep theirs."""
    a, b = (np.repeat(np.array(x, dtype), repeats) for x in (row, weights))
    x, axis, pick = orient(a)
    if x.ndim > 1:
        b = np.stack([np.ones_like(b), b, np.ones_like(b)], axis=1)
    with np.errstate(all="ignore"):
        expected, expected_sign = scipy.special.logsumexp(np.array(row), b=weights, return_sign=True)
    value, sign = fastll.logsumexp(x, axis=axis, b=b, return_sign=True)
    np.testing.assert_array_equal(pick(value), expected)
    np.testing.assert_array_equal(pick(sign), expected_sign)
    plain = fastll.logsumexp(x, axis=axis, b=b)
    np.testing.assert_array_equal(pick(plain), NAN if expected_sign < 0 else expected)
    if x.ndim > 1:
        ones = fastll.logsumexp(x[:, ::2], axis=axis, b=b[:, ::2])
        np.testing.assert_array_equal(plain[::2], ones)


def test_weights_are_not_rounded(backend):
    """The dtype is that of both arrays, and weights beyond float32 keep their values."""
    zeros = np.zeros(3, np.float32)
    found = fastll.logsumexp(zeros, b=np.array([1e300, 1, 1]))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, scipy.special.logsumexp(zeros, b=[1e300, 1, 1]), rtol=1e-15)
    np.testing.assert_allclose(fastll.logsumexp(zeros[:1], b=[1e-60]), -60 * np.log(10), rtol=1e-15)


@pytest.mark.parametrize("dtype", [*DTYPES, "int16", "bool"])
@pytest.mark.parametrize("weights", [*DTYPES, "uint8"])
def test_dtype_of_weighted_sums(backend, rng, dtype, weights):
    a = rng.integers(0, 2, (4, 40, 3)).astype(DTYPES.get(dtype, dtype))
    b = rng.integers(1, 4, (4, 40, 3)).astype(DTYPES.get(weights, weights))
    wide = {"float64", "int16", "bool", "uint8"} & {dtype, weights}
    out = np.float64 if wide else np.float32
    for axis in (0, 1, 2, (0, 2)):
        found = fastll.logsumexp(a, axis=axis, b=b)
        assert found.dtype == out
        expected = np.log((b.astype(float) * np.exp(a.astype(float))).sum(axis))
        # sums of at most 40 terms below and 40 at the maximum: 4 roundoffs and the logarithm's 2
        np.testing.assert_allclose(found, expected, rtol=6 * np.finfo(out).eps)
    if backend != "cuda":  # a number has no dtype of its own
        assert fastll.logsumexp(a, b=2.5).dtype == fastll.logsumexp(a).dtype


@pytest.mark.parametrize(
    "weight", [[1, INF, 2], [1, NAN, 2], [INF, INF, 1], [1, -INF, 2], [0, INF, 1]], ids=str
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_infinite_and_nan_class_weights(backend, rng, weight, smoothing, dense, axis):
    """Those of the reference; rows of labels that have other weights are not touched by them."""
    x = rng.standard_normal((40, 3))
    y = np.arange(40) % 3
    target = rng.dirichlet(np.ones(3), 40) if dense else y
    options = {"weight": np.array(weight, float), "label_smoothing": smoothing, "reduction": "none"}
    with fastll.use_backend("numpy"):
        expected = losses.cross_entropy(x, target, **options)  # on the host for certain
    if axis == 0:
        x, target = x.T.copy(), target.T.copy()
    loss = fastll.cross_entropy(x, target, axis=axis, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    if not (dense or smoothing):
        ordinary = np.isfinite(np.array(weight, float))[y]
        np.testing.assert_array_equal(np.isfinite(loss), ordinary)


def test_documented_digits(backend):
    np.testing.assert_allclose(fastll.logsumexp([0, -40]), 4.248354255291589e-18, rtol=1e-15)


@pytest.mark.parametrize("row", [row for row in ROWS if len(row) > 1], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_loss_is_lse_less_logit(backend, row, label, repeats, orient):
    """What the formula gives by IEEE rules; NaN wherever it does."""
    row = np.repeat(np.array(row), repeats)
    x, axis, pick = orient(row)
    y = label * repeats
    target = y if x.ndim == 1 else np.full(3, y)
    loss, grad = fastll.cross_entropy(x, target, axis=axis, reduction="none", return_grad=True)
    with np.errstate(all="ignore"):
        expected = scipy.special.logsumexp(row) - row[y]
    if np.isfinite(expected):
        d = row - row.max()
        expected = np.log1p(np.exp(np.delete(d, np.argmax(d))).sum()) - d[y]
    np.testing.assert_allclose(pick(loss), expected, rtol=1e-14)
    slope = pick(np.moveaxis(grad, axis, 0))
    if np.isfinite(row.max()):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        np.testing.assert_allclose(slope, p - (np.arange(row.size) == y), rtol=1e-13, atol=1e-16)
    else:
        assert np.isnan(slope).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_never_leak(backend, rng, dtype, poison, orient):
    x = rng.standard_normal((6, 33)).astype(DTYPES[dtype])
    y = rng.integers(0, 33, 6)
    y[[1, 4]] = -7
    clean = x[[0, 2, 3, 5]]
    x[[1, 4]] = poison
    loss, grad = fastll.cross_entropy(x, y, ignore_index=-7, return_grad=True, label_smoothing=0.1)
    expected, slope = fastll.cross_entropy(
        clean, y[[0, 2, 3, 5]], ignore_index=-7, return_grad=True, label_smoothing=0.1
    )
    assert loss == expected
    np.testing.assert_array_equal(grad[[0, 2, 3, 5]], slope)
    np.testing.assert_array_equal(grad[[1, 4]].astype(np.float32), 0)
    columns = fastll.cross_entropy(
        x.T.copy(), y, axis=0, ignore_index=-7, return_grad=True, label_smoothing=0.1
    )
    assert columns[0] == loss
    np.testing.assert_array_equal(columns[1].T, grad)


@pytest.mark.parametrize("axis", [0, 1])
def test_everything_ignored(backend, axis):
    x = np.full((4, 4), NAN)
    y = np.full(4, -100)
    loss, grad = fastll.cross_entropy(x, y, axis=axis, return_grad=True)
    assert np.isnan(loss)
    assert fastll.cross_entropy(x, y, axis=axis, reduction="sum") == 0
    np.testing.assert_array_equal(grad, np.zeros((4, 4)))


@pytest.mark.parametrize("axis", [0, 1])
def test_dense_target_of_zero_at_minus_infinity(backend, axis):
    x = np.array([[0.0, -INF, 0.0]] * 2)
    t = np.array([[0.5, 0.0, 0.5]] * 2)
    if axis == 0:
        x, t = x.T.copy(), t.T.copy()
    loss, grad = fastll.cross_entropy(x, t, axis=axis, reduction="none", return_grad=True)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-15)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [10, 5000])  # of one block, and of several
def test_infinite_target(backend, classes, axis):
    x, t = np.zeros((3, classes)), np.full((3, classes), 1 / classes)
    x[:, 0], x[2, 0], x[2, -1] = 9, 0, 9  # the maximum before the target and after it
    t[:2, [classes // 2]], t[2, 0] = np.inf, np.inf
    x, t = (x, t) if axis == 1 else (x.T, t.T)
    np.testing.assert_array_equal(fastll.cross_entropy(x, t, axis=axis, reduction="none"), np.inf)


def test_minus_infinity_after_a_block_of_them(backend):
    """A maximum that rises from -inf in a later block leaves no NaN behind."""
    x = np.full((2, 5000), -INF, np.float32)
    x[:, 4500] = 3
    np.testing.assert_array_equal(fastll.logsumexp(x, axis=1), 3)
    loss, grad = fastll.cross_entropy(x, [4500, 4500], return_grad=True)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)
    t = np.zeros_like(x)
    t[:, 4500] = 1
    loss, grad = fastll.cross_entropy(x, t, return_grad=True)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_soft_cap_of_infinities(backend, dtype):
    x = np.array([[INF, 0.0, -INF]], dtype)
    lse = fastll.cross_entropy(x, [0], softcap=2.0, return_lse=True)[1]
    np.testing.assert_allclose(lse, np.log(np.exp(2) + 1 + np.exp(-2)), rtol=4 * np.finfo(dtype).eps)


def test_binary_infinities(backend):
    x = np.array([INF, -INF, INF, -INF, NAN])
    t = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    loss, grad = fastll.binary_cross_entropy_with_logits(x, t, reduction="none", return_grad=True)
    np.testing.assert_array_equal(loss, [0, 0, INF, INF, NAN])
    np.testing.assert_array_equal(grad, [0, 0, 1, -1, NAN])
    np.testing.assert_array_equal(fastll.sigmoid(x), [1, 0, 1, 0, NAN])
    np.testing.assert_array_equal(fastll.log_sigmoid(x), [0, -INF, 0, -INF, NAN])


class TestEmpty:
    def test_no_classes(self, backend):
        x = np.zeros((3, 0), np.float32)
        np.testing.assert_array_equal(fastll.logsumexp(x, axis=1), [-INF] * 3)
        assert fastll.softmax(x).shape == (3, 0)
        assert fastll.cross_entropy(x, np.full(3, -100), reduction="sum") == 0
        assert fastll.cross_entropy(x, np.zeros((3, 0))) == 0
        assert fastll.cross_entropy(x.T, np.zeros((0, 3)), axis=0, weight=np.zeros(0)) == 0
        with pytest.raises(IndexError, match="label 0 at"):
            fastll.cross_entropy(x, [0, 0, 0])

    def test_no_rows(self, backend):
        x = np.zeros((0, 3), np.float32)
        assert fastll.logsumexp(x, axis=1).shape == (0,)
        assert fastll.logsumexp(x) == -INF
        assert np.isnan(fastll.cross_entropy(x, []))
        assert fastll.cross_entropy(x, [], reduction="sum") == 0
        assert fastll.cross_entropy(x, [], reduction="none").shape == (0,)
        loss, grad = fastll.cross_entropy(x, np.zeros((0, 3)), return_grad=True)
        assert np.isnan(loss)
        assert grad.shape == (0, 3)

    def test_nothing(self, backend):
        assert fastll.logsumexp([]) == -INF
        assert fastll.softmax([]).shape == (0,)
        assert fastll.sigmoid(np.zeros((2, 0))).shape == (2, 0)
        assert np.isnan(fastll.binary_cross_entropy_with_logits([], []))
        assert fastll.binary_cross_entropy_with_logits([], [], reduction="sum") == 0


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_scalars(backend, axis):
    assert fastll.logsumexp(3.0, axis=axis) == 3
    assert fastll.softmax(3.0, axis=axis) == 1
    assert fastll.log_softmax(np.float32(3), axis=axis) == 0
    assert isinstance(fastll.softmax(np.float32(3)), np.float32)
    assert isinstance(fastll.sigmoid(0), np.float64)


def test_reduction_over_no_axis(backend):
    """As for NumPy's sums: each element is a row of its own."""
    x = np.array([[1.0, -INF], [NAN, 2.0]])
    np.testing.assert_array_equal(fastll.logsumexp(x, axis=()), x)
    np.testing.assert_array_equal(fastll.softmax(x, axis=()), [[1, NAN], [NAN, 1]])


def test_one_row_without_axes(backend):
    loss, lse, grad = fastll.cross_entropy([0.0, 0.0], 1, return_lse=True, return_grad=True)
    np.testing.assert_allclose([loss, lse], np.log(2), rtol=1e-15)
    np.testing.assert_array_equal(grad, [0.5, -0.5])


@pytest.mark.parametrize("kind", "bBhHiIlLqQ?")
def test_integers_and_bools_as_float64(backend, kind):
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind)
    np.testing.assert_array_equal(
        fastll.logsumexp(x, axis=1), fastll.logsumexp(x.astype(np.float64), axis=1)
    )
    loss, grad = fastll.cross_entropy(x, np.array([0, 1], np.uint8), return_grad=True)
    assert loss.dtype == grad.dtype == fastll.sigmoid(x).dtype == np.float64


@pytest.mark.parametrize("kind", "bBhHiIlLqQ")
def test_labels_of_any_integer_dtype(backend, kind):
    x = np.array([[0.0, 1, 2], [4, 1, 0]])
    assert fastll.cross_entropy(x, np.array([2, 0], kind)) == fastll.cross_entropy(x, [2, 0])


@pytest.mark.parametrize("label", [3, 2**40, -1, -(2**62)])
@pytest.mark.parametrize("name", ["numba", "cython"])
@pytest.mark.parametrize("order", "CF")
def test_label_that_another_thread_changes(name, label, order):
    """A label is checked again where it is used: the row is NaN, and memory stays safe."""
    require(name)
    backend = dispatch._load(name)
    x = np.asarray(np.random.default_rng(0).random((40, 3, 1)), order=order)
    labels, weight = np.ones((40, 1), np.int64), np.ones(3)
    loss, out = np.zeros((40, 1)), np.zeros_like(x)
    labels[7] = label  # after `Backend.labels` has passed them
    call = Fold("cross_entropy", x, labels=labels, weight=weight, value=loss, out=out)
    backend.fold(call)(0, 40)
    bad = np.arange(40) == 7
    np.testing.assert_array_equal(np.isnan(loss[:, 0]), bad)
    np.testing.assert_array_equal(np.isnan(out).all(axis=(1, 2)), bad)
    np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), bad)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_sigmoids(backend, dtype):
    """Both keep their digits down to the last subnormal number."""
    smallest = np.log(float(np.finfo(dtype).smallest_subnormal))
    x = np.linspace(smallest + 0.1, smallest + 40, 50).astype(dtype)
    close = {"rtol": 1e-6 if dtype == "float32" else 1e-14, "atol": np.finfo(dtype).smallest_subnormal}
    expected = np.exp(x.astype(np.longdouble)).astype(dtype)
    np.testing.assert_allclose(fastll.sigmoid(x), expected, **close)
    np.testing.assert_allclose(fastll.log_sigmoid(-x), -expected, **close)
    assert (np.asarray(fastll.log_sigmoid(-x)) < 0).all()


@pytest.mark.parametrize("kind", "?bIefd")
def test_binary_targets_of_any_dtype(backend, kind):
    x = np.array([0.5, -1.5, 3], np.float32)
    expected = fastll.binary_cross_entropy_with_logits(x, np.array([1, 0, 1], np.float32))
    assert fastll.binary_cross_entropy_with_logits(x, np.array([1, 0, 1]).astype(kind)) == expected


def test_variances(backend):
    mean = np.array([[1.0, 2.0], [3.0, 5.0]])
    per_row = fastll.gaussian_nll(mean, 0.0, [1.0, 4.0], reduction="none")
    np.testing.assert_array_equal(
        per_row, fastll.gaussian_nll(mean, 0.0, [[1.0, 1.0], [4.0, 4.0]], reduction="none")
    )
    tiny = fastll.gaussian_nll(mean, mean, 0.0, eps=1e-30, reduction="none")
    np.testing.assert_allclose(tiny, np.log(1e-30) / 2)
    if backend != "cuda":
        with pytest.raises(ValueError, match=r"var has -1 at \(0, 1\); expected values of at least 0"):
            fastll.gaussian_nll(mean, mean, [[1.0, -1.0]], grad_out=mean)
        assert mean[0, 0] == 1.0


def test_entropy(backend):
    p = np.array([[0.0, 1.0, 0.0], [0.5, -0.5, 1.0], [0.5, np.nan, 0.5], [np.inf, 0.0, 1.0]])
    values = fastll.entropy(p)
    np.testing.assert_array_equal(values, [0.0, -np.inf, np.nan, -np.inf])
    assert not np.signbit(values[0])
    np.testing.assert_array_equal(fastll.entropy(p[:, :0]), np.zeros(4))
    assert fastll.entropy(0.5, base=2) == 0.5
    q = np.random.default_rng(0).random((3, 4, 5, 6))
    expected = scipy.special.entr(q).sum(axis=(0, 2))
    np.testing.assert_allclose(fastll.entropy(q, axis=(0, 2)), expected, rtol=1e-14)
    for base in (1, 0, -2, "e"):
        with pytest.raises((TypeError, ValueError), match="base is"):
            fastll.entropy(q, base=base)


#: Probabilities, and what else may be in their place.
PROBABILITIES = [0.0, -0.0, 1e-320, 0.3, 0.7, 1.0, 1e308, INF, -0.5, -INF, NAN]


@pytest.mark.parametrize("axis", [0, 1])
def test_divergence_and_cross_entropy(backend, axis):
    """One term in a row: those of zeros beside it are 0."""
    p, q = np.array(np.meshgrid(PROBABILITIES, PROBABILITIES)).reshape(2, -1)
    rows = [np.stack([np.zeros_like(x), x, np.zeros_like(x)], axis=axis) for x in (p, q)]
    expected = scipy.special.rel_entr(p, q)
    divergence = fastll.kl_divergence(*rows, axis=axis)
    np.testing.assert_allclose(divergence, expected, rtol=1e-14)
    assert not np.signbit(divergence[divergence == 0]).any()
    with np.errstate(invalid="ignore"):
        expected = np.where(q < 0, INF, -scipy.special.xlogy(p, q))
    expected[(p < 0) | np.isnan(p) | np.isnan(q)] = NAN
    both = fastll.distribution_cross_entropy(*rows, axis=axis)
    np.testing.assert_allclose(both, expected, rtol=1e-14)
    assert not np.signbit(both[both == 0]).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divergence_of_neighbours(backend, rng, dtype):
    """p log(p / q) keeps its digits where the ratio is next to 1, or is no number of the dtype."""
    tiny, huge, eps = np.finfo(dtype).tiny, np.finfo(dtype).max, np.finfo(dtype).eps
    p = rng.random(2000).astype(dtype) + np.finfo(dtype).smallest_normal
    q = p * (1 + eps * np.arange(-1000, 1000)).astype(dtype)
    p = np.concatenate([p, np.array([tiny, huge, 1, 1, tiny / 8, huge], dtype)])
    q = np.concatenate([q, np.array([huge, tiny, huge, tiny / 8, 1, 1], dtype)])
    wide, other = p.astype(np.longdouble), q.astype(np.longdouble)
    with np.errstate(divide="ignore", over="ignore"):
        ratio = np.where(
            abs(wide - other) < other / 2, np.log1p((wide - other) / other), np.log(wide / other)
        )
        expected = (wide * ratio).astype(dtype)
    # the quotient, the series and the product: 4 ulp; subnormal results have fewer digits
    close = {"rtol": 4 * eps, "atol": np.finfo(dtype).smallest_subnormal}
    np.testing.assert_allclose(fastll.kl_divergence(p[:, None], q[:, None]), expected, **close)
    assert (fastll.kl_divergence(p[:, None], p[:, None]) == 0).all()


def test_cross_entropy_is_entropy_and_divergence(backend, rng):
    p, q = rng.dirichlet(np.ones(300), size=(2, 4, 5)).swapaxes(2, 3)[..., ::2]
    for axis, base in ((1, None), (-2, 2), ((0, 2), 10), (None, 0.5)):
        both = fastll.distribution_cross_entropy(p, q, axis, base)
        entropy, divergence = fastll.entropy(p, axis, base), fastll.kl_divergence(p, q, axis, base)
        # 300 terms at most of each sign, of which the largest sums are 4 roundoffs
        np.testing.assert_allclose(both, entropy + divergence, rtol=16 * np.finfo(float).eps)
        np.testing.assert_allclose(
            divergence * np.log(base or np.e), scipy.special.rel_entr(p, q).sum(axis), rtol=1e-13
        )
    row = q[0, :, 0]
    one = fastll.kl_divergence(p, row[:, None], axis=1)
    np.testing.assert_array_equal(
        one, fastll.kl_divergence(p, np.broadcast_to(row[:, None], p.shape), 1)
    )
    assert fastll.kl_divergence(0.5, 0.25, base=2) == 0.5
    assert fastll.kl_divergence(np.float32(0.5), 0.25).dtype == np.float32
    with pytest.raises(ValueError, match="q has shape"):
        fastll.kl_divergence(row, p)


@pytest.mark.parametrize("classes", [10, 63, 64, 1000, 5000])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_are_not_usual_in_place(compiled, rng, classes, value, dtype):
    """One row among others is computed in another way: no logits are overwritten before."""
    x = rng.standard_normal((70, classes), np.float32).astype(DTYPES[dtype])
    x[20, classes // 2] = value
    y = rng.integers(0, classes, 70)

    def gradient(x, out):
        fastll.cross_entropy(x, y, reduction="sum", grad_out=out)

    for function in (fastll.softmax, fastll.log_softmax, gradient):
        expected, own = np.empty_like(x), x.copy()
        function(x, out=expected)
        function(own, out=own)
        assert_same_bits(own, expected)
