"""Digits: against mpmath, at 60 decimal places, on the exact values of the inputs."""

import mpmath
import numpy as np
import pytest
import scipy.special
from table import DTYPES

import fastll

mpmath.mp.dps = 60

FLOATS = ["float32", "float64"]


def exact(x):
    return [mpmath.mpf(float(v)) for v in np.ravel(x)]


def exact_logsumexp(x):
    return mpmath.log(mpmath.fsum(mpmath.exp(v) for v in exact(x)))


def ulps(actual, expected):
    """The error in units of the last place of the expected value in the dtype of the actual one."""
    spacing = np.spacing(actual.dtype.type(abs(float(expected))))
    return abs(float((mpmath.mpf(float(actual)) - expected) / mpmath.mpf(float(spacing))))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [2, 10, 1000, 6000])
@pytest.mark.parametrize("spread", [0.1, 1, 10, 60])
def test_logsumexp_within_two_ulp(backend, rng, dtype, classes, spread):
    x = (spread * rng.standard_normal((6, classes))).astype(dtype)
    for row, value in zip(x, fastll.logsumexp(x, axis=1), strict=True):
        expected = exact_logsumexp(row)
        # of the larger of the two terms m and log s: where they cancel, digits are lost in any format
        largest = max(abs(expected), abs(exact(row.max())[0]))
        scale = np.spacing(x.dtype.type(float(largest))) / np.spacing(
            x.dtype.type(abs(float(expected)))
        )
        assert ulps(value, expected) <= 2 * scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [2, 37, 5000])
@pytest.mark.parametrize("gap", [1, 16, 17, 30, 50, 80, 100])
@pytest.mark.parametrize("offset", [0, 3.7, 1e4])
def test_loss_near_zero_keeps_its_digits(backend, rng, dtype, classes, gap, offset):
    x = rng.uniform(-1, 0, classes).astype(dtype) - dtype_of(dtype)(gap)
    x[classes // 2] = 0
    x = x + dtype_of(dtype)(offset)
    loss, grad = fastll.cross_entropy(x, classes // 2, return_grad=True)
    top, *others = sorted(exact(x), reverse=True)
    rest = mpmath.fsum(mpmath.exp(v - top) for v in others)
    expected = mpmath.log1p(rest)
    # a subnormal result has fewer digits
    floor = np.finfo(dtype).smallest_subnormal / float(expected)
    tolerance = 4 * np.finfo(dtype).eps + float(floor)
    if backend == "numpy":  # it subtracts the maximum first
        tolerance += gap * np.finfo(dtype).eps
    assert loss > 0
    assert abs(float(loss / expected) - 1) <= tolerance
    assert abs(float(-grad[classes // 2] / (rest / (1 + rest))) - 1) <= tolerance


def dtype_of(name):
    return DTYPES[name].type


@pytest.mark.parametrize("dtype", FLOATS)
def test_dominant_target_in_a_later_block(backend, dtype):
    x = np.full(9000, -60, dtype)
    x[7777] = 1
    expected = mpmath.log1p(8999 * mpmath.exp(-61))
    assert ulps(fastll.cross_entropy(x, 7777), expected) <= 4


@pytest.mark.parametrize("dtype", FLOATS)
def test_common_offset_costs_nothing(backend, rng, dtype):
    """Offsets that leave the differences exact leave the result of a loss as it is, to the digit."""
    x = np.round(8 * rng.standard_normal((5, 300))).astype(dtype)
    y = rng.integers(0, 300, 5)
    plain = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
    moved = fastll.cross_entropy(x + 10_000, y, reduction="none", return_grad=True)
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=6 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [10, 50_000])
def test_probabilities_sum_to_one(backend, rng, dtype, classes):
    p = fastll.softmax((10 * rng.standard_normal((4, classes))).astype(dtype))
    # each entry is off by at most 3 ulp, in either direction
    np.testing.assert_allclose(p.sum(axis=1, dtype=np.float64), 1, rtol=3 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_values(backend, dtype):
    one = dtype_of(dtype)
    assert fastll.softmax(np.array([12.3], dtype))[0] == 1
    assert fastll.log_softmax(np.array([12.3], dtype))[0] == 0
    assert fastll.logsumexp(np.array([one(0.1)])) == one(0.1)
    np.testing.assert_array_equal(fastll.softmax(np.full(4, 88.5, dtype)), np.full(4, 0.25, dtype))
    np.testing.assert_array_equal(fastll.sigmoid(np.zeros(3, dtype)), np.full(3, 0.5, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_tails_of_sigmoid(backend, dtype):
    last = -103 if dtype == "float32" else -744
    x = np.array([-80, -20, -1e-3, 5, 30, last], dtype)
    for v, p, log_p in zip(x, fastll.sigmoid(x), fastll.log_sigmoid(x), strict=True):
        t = mpmath.mpf(float(v))
        assert ulps(p, 1 / (1 + mpmath.exp(-t))) <= 3
        assert ulps(log_p, -mpmath.log1p(mpmath.exp(-t))) <= 3


def test_sigmoid_against_scipy(backend, rng):
    x = 20 * rng.standard_normal(5000)
    # SciPy's are within 2 ulp, ours within 3
    np.testing.assert_allclose(fastll.sigmoid(x), scipy.special.expit(x), rtol=5 * np.finfo(float).eps)
    np.testing.assert_allclose(
        fastll.log_sigmoid(x), scipy.special.log_expit(x), rtol=5 * np.finfo(float).eps
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_probabilities(backend, dtype):
    gap = 95 if dtype == "float32" else 725
    p = fastll.softmax(np.array([0, -gap], dtype))[1]
    assert ulps(p, mpmath.exp(-gap)) <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_binary_loss_near_zero(backend, dtype):
    x = np.array([17, 40, 80, -17, -40, -80], dtype)
    loss = fastll.binary_cross_entropy_with_logits(x, x > 0, reduction="none")
    for v, value in zip(x, loss, strict=True):
        assert ulps(value, mpmath.log1p(mpmath.exp(-abs(float(v))))) <= 3


@pytest.mark.parametrize("length", [1 << 11, 1 << 20])
def test_sums_do_not_degrade_with_length(backend, length):
    """Equal terms round the same way each time: a lane of 64 may lose 64 roundoffs, and no more."""
    x = np.full(length, 0.1, np.float32)
    one = mpmath.mpf(float(x[0]))
    assert ulps(fastll.logsumexp(x), one + mpmath.log(length)) <= 1
    loss = fastll.binary_cross_entropy_with_logits(x, np.zeros_like(x))
    assert abs(float(loss / mpmath.log1p(mpmath.exp(one))) - 1) <= 64 * np.finfo(np.float32).eps / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_float32(compiled, rng, dtype):
    """The loss is that of the same numbers in float32, not one rounded to the input's dtype."""
    x = (4 * rng.standard_normal((9, 2000))).astype(DTYPES[dtype])
    y = rng.integers(0, 2000, 9)
    wide = fastll.cross_entropy(x.astype(np.float32), y, reduction="none", return_grad=True)
    loss, grad = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
    np.testing.assert_array_equal(loss, wide[0])
    np.testing.assert_array_equal(grad, wide[1].astype(DTYPES[dtype]))
