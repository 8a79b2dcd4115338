"""LogSumExp: parts in any order and any grouping come to the log-sum-exp of the whole."""

import copy
import pickle
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastll
from fastll import LogSumExp

INF = np.inf

numbers = st.one_of(
    st.floats(-1e4, 1e4), st.sampled_from([-INF, INF, 0.0, -0.0, 1e30, -1e30, 1e300, np.nan])
)
chunks = st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=6)


def of(values):
    return LogSumExp().update(np.array(values, np.float64))


def assert_same(a, b):
    """The same up to the rounding of a few sums in float64, of the larger of m and log s."""
    np.testing.assert_allclose(a.value, b.value, rtol=1e-14, atol=1e-13)


@given(chunks)
def test_any_grouping(parts):
    whole = of([x for part in parts for x in part])
    one_by_one = reduce(lambda acc, part: acc.update(np.array(part, np.float64)), parts, LogSumExp())
    merged = reduce(lambda acc, part: acc.merge(of(part)), parts, LogSumExp())
    backwards = reduce(lambda acc, part: acc.merge(of(part)), reversed(parts), LogSumExp())
    for other in (one_by_one, merged, backwards):
        assert_same(other, whole)
    expected = fastll.logsumexp([x for part in parts for x in part])
    np.testing.assert_array_equal(whole.value, expected)


@given(chunks, chunks, chunks)
def test_merge_is_associative_and_commutative(a, b, c):
    a, b, c = (of([x for part in parts for x in part]) for parts in (a, b, c))

    def copy(x):
        return pickle.loads(pickle.dumps(x))

    assert_same(copy(a).merge(b), copy(b).merge(a))
    assert_same(copy(a).merge(b).merge(c), copy(a).merge(copy(b).merge(c)))
    assert_same(LogSumExp().merge(a), a)
    assert_same(copy(a).merge(LogSumExp()), a)


@given(st.lists(numbers, max_size=8))
def test_state_and_pickle(values):
    acc = of(values)
    for other in (LogSumExp.from_state(acc.state), pickle.loads(pickle.dumps(acc))):
        np.testing.assert_array_equal(other.state, acc.state)
        assert_same(other, acc)
    m, s = acc.state
    if np.isfinite(m):
        np.testing.assert_allclose(m + np.log(s), acc.value, rtol=1e-14, atol=1e-14)


def test_identity():
    acc = LogSumExp()
    assert acc.value == -INF
    assert [float(part) for part in acc.state] == [-INF, 0]
    acc.update([-INF, -INF])
    assert [float(part) for part in acc.state] == [-INF, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows(backend, rng, dtype):
    x = rng.standard_normal((3, 7, 20)).astype(dtype)
    acc = LogSumExp((3, 20), dtype)
    acc.update(x[:, :2], axis=1).update(x[:, 2:], axis=1)
    assert acc.shape == (3, 20)
    assert acc.value.dtype == acc.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(acc.value, fastll.logsumexp(x, axis=1), rtol=4 * np.finfo(acc.dtype).eps)
    everything = LogSumExp().update(x, axis=None)
    np.testing.assert_allclose(everything.value, fastll.logsumexp(x.astype(np.float64)), rtol=1e-6)
    pairs = LogSumExp(7).update(x, axis=(0, 2))
    np.testing.assert_allclose(
        pairs.value, fastll.logsumexp(x.astype(np.float64), axis=(0, 2)), rtol=1e-6
    )


def test_digits_survive_the_split(backend):
    """The log1p form holds for parts as for the whole."""
    np.testing.assert_allclose(
        LogSumExp().update([0.0]).update([-40.0]).value, 4.248354255291589e-18, rtol=1e-15
    )
    np.testing.assert_allclose(
        LogSumExp().update([-40.0]).merge(of([0.0])).value, 4.248354255291589e-18, rtol=1e-15
    )


def test_merge_leaves_the_other_alone():
    one, other = of([1.0, 2.0]), of([3.0])
    before = other.state
    assert one.merge(other) is one
    np.testing.assert_array_equal(other.state, before)
    twice = of([5.0])
    np.testing.assert_allclose(twice.merge(twice).value, 5 + np.log(2), rtol=1e-15)


def test_errors_change_nothing():
    acc = LogSumExp((2,)).update(np.ones((2, 3)))
    before = acc.state
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 2\), \(3,\) without axis -1; expected \(2,\)"
    ):
        acc.update(np.ones((3, 2)))
    with pytest.raises(TypeError, match="x has dtype complex128"):
        acc.update(np.ones((2, 3), complex))
    with pytest.raises(ValueError, match=r"other has shape \(\); expected \(2,\)"):
        acc.merge(LogSumExp())
    with pytest.raises(TypeError, match="other is a float"):
        acc.merge(3.0)
    np.testing.assert_array_equal(acc.state, before)
    with pytest.raises(ValueError, match="state has shapes"):
        LogSumExp.from_state((np.zeros(2), np.zeros(3)))
    with pytest.raises(ValueError, match=r"state has a sum of -1\.0"):
        LogSumExp.from_state((0.0, -1.0))
    with pytest.raises(TypeError, match=r"dtype is .*int64.*; expected a floating dtype"):
        LogSumExp(dtype=np.int64)
    assert "shape=(2,)" in repr(acc)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda acc: pickle.loads(pickle.dumps(acc))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_independent(copied):
    for acc in (LogSumExp((2,), np.float32), LogSumExp((2,)).update([[0.0, 1.0], [2.0, 3.0]])):
        before = acc.value
        other = copied(acc)
        assert other.dtype == acc.dtype
        np.testing.assert_array_equal(other.value, before)
        other.update(np.full((2, 3), 9.0))
        np.testing.assert_array_equal(acc.value, before)
        assert (other.value > 9).all()
