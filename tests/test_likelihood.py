"""Likelihoods of sequences, and of data in parts: what they add up, and the theory's identities."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import DTYPES, LAYOUTS, assert_same_bits, eps

import fastll
from fastll import NegativeLogLikelihood
from fastll.contract import add_sums

INF = np.inf


def data(rng, shape=(4, 7, 30), dtype=np.float32):
    """Logits, and tokens of which some are ignored."""
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    tokens = rng.integers(0, shape[-1], shape[:-1])
    tokens[rng.random(tokens.shape) < 0.2] = -100
    return logits, tokens


def of(losses):
    """An accumulator of rows with losses of that size, each an update of its own."""
    likelihood = NegativeLogLikelihood()
    for loss in losses:
        likelihood.update([-loss, 0.0] if loss > 40 else [0.0, np.log(np.expm1(loss))], 0)
    return likelihood


def bits_of(likelihood):
    return likelihood.__getstate__()[0]


# in parts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parts_come_to_the_whole(backend, rng, dtype):
    x, y = data(rng, dtype=dtype)
    # a shape, an axis and a number of rows of its own
    parts = [(x[0], y[0], 1), (x[1:3].transpose(0, 2, 1), y[1:3], 1), (x[3, 0], y[3, 0], 0)]
    parts.append((x[3, 1:], y[3, 1:], -1))
    acc, losses = NegativeLogLikelihood(), []
    for logits, tokens, axis in parts:
        assert acc.update(logits, tokens, axis=axis) is acc
        losses.append(np.ravel(fastll.cross_entropy(logits, tokens, axis=axis, reduction="none")))
    losses = np.concatenate(losses, dtype=np.float64)
    kept = np.count_nonzero(y != -100)
    # a sum of n numbers of one sign in float64 is within n roundoffs
    tolerance = {"rtol": losses.size * eps(np.float64)}
    np.testing.assert_allclose(acc.sum, losses.sum(), **tolerance)
    np.testing.assert_allclose(acc.mean, losses.sum() / kept, **tolerance)
    assert acc.count == kept
    assert type(acc.count) is int
    assert acc.perplexity == np.exp(acc.mean)
    assert acc.bits_per_token == acc.mean / np.log(2)


@pytest.mark.parametrize("options", [{"weight": np.linspace(0.5, 2, 30)}, {"softcap": 2.0}], ids=list)
@pytest.mark.parametrize("dense", [False, True])
def test_options(backend, rng, options, dense):
    x, y = data(rng, dtype=np.float64)
    if dense:
        y = rng.random(x.shape)
    acc = NegativeLogLikelihood().update(x[:1], y[:1], **options).update(x[1:], y[1:], **options)
    # the same terms, added in another order
    tolerance = {"rtol": 2 * x[..., 0].size * eps(np.float64)}
    np.testing.assert_allclose(acc.mean, fastll.cross_entropy(x, y, **options), **tolerance)
    np.testing.assert_allclose(
        acc.sum, fastll.cross_entropy(x, y, **options, reduction="sum"), **tolerance
    )
    assert isinstance(acc.count, float if "weight" in options else int)


def test_ignore_index(rng):
    x, y = data(rng)
    acc = NegativeLogLikelihood().update(x, np.where(y == -100, 3, y), ignore_index=3)
    assert acc.count == np.count_nonzero((y != -100) & (y != 3))


def test_many_updates_lose_nothing():
    """float64 alone would lose each of the small ones: they are below half an ulp of the large one."""
    large, small = 2.0**30, 2.0**-24
    acc = of([large, *[small] * 4096])
    each = of([small]).sum
    assert each == pytest.approx(small, rel=1e-6)
    assert large + each == large
    expected = large + 4096 * Fraction(each)
    assert Fraction(acc.sum) == Fraction(float(expected)) != large
    assert acc.mean == acc.sum / 4097
    merged = NegativeLogLikelihood()
    for _ in range(4096):
        merged.merge(of([small]))
    assert merged.merge(of([large])).sum == acc.sum


@given(st.lists(st.lists(st.floats(0, 1e12), max_size=4), max_size=6), st.randoms())
def test_sums_in_two_parts_do_not_depend_on_the_order(groups, random):
    def merged(groups):
        total = np.zeros(2)
        for group in groups:
            part = np.zeros(2)
            for x in group:
                add_sums(part, np.array([x, 0.0]))
            add_sums(total, part)
        return total

    exact = sum((Fraction(x) for group in groups for x in group), Fraction())
    flat = [[x] for group in groups for x in group]
    random.shuffle(flat)
    for total in (merged(groups), merged(groups[::-1]), merged(flat)):
        # n additions of second parts, which are at most n roundoffs of the sum: n**2 2**-106 of it
        error = Fraction(total[0]) + Fraction(total[1]) - exact
        assert abs(error) <= (len(flat) + len(groups)) ** 2 * Fraction(2) ** -106 * exact


@pytest.mark.parametrize("values", [[], [0.5], [1e-20, 3.0, 1e15, 0.3], [1.0, INF], [INF, np.nan]])
def test_a_new_one_is_the_identity(values):
    acc = of(values)
    before = bits_of(acc)
    assert acc.merge(NegativeLogLikelihood()) is acc
    assert_same_bits(bits_of(acc), before)
    assert_same_bits(bits_of(NegativeLogLikelihood().merge(acc)), before)


def test_merge_and_copies():
    one, other = of([0.5, 2.0]), of([3.0])
    before = bits_of(other)
    assert one.merge(other).count == 3
    assert_same_bits(bits_of(other), before)
    for copied in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert_same_bits(bits_of(copied), bits_of(one))
        copied.update([0.0, 0.0], 1)
        assert (copied.count, one.count) == (4, 3)
    total = one.sum
    assert one.merge(one).sum == 2 * total
    weighted = NegativeLogLikelihood().update([0.0, 0.0], 1, weight=[1.0, 0.5])
    assert type(one.merge(weighted).count) is float
    assert pickle.loads(pickle.dumps(one)).count == 6.5


def test_nothing(backend):
    for acc in (
        NegativeLogLikelihood(),
        NegativeLogLikelihood().update(np.zeros((0, 3)), np.zeros(0, int)),
        NegativeLogLikelihood().update(np.zeros((2, 3)), [-100, -100]),
    ):
        assert (acc.sum, acc.count) == (0, 0)
        assert all(math.isnan(x) for x in (acc.mean, acc.perplexity, acc.bits_per_token))
    assert repr(NegativeLogLikelihood()) == "NegativeLogLikelihood(mean=nan, count=0)"


def test_impossible_and_improbable_tokens(backend):
    assert NegativeLogLikelihood().update([0.0, -2000.0], 1).perplexity == INF
    acc = NegativeLogLikelihood().update([0.0, -INF], 1)
    assert acc.update([0.0, 0.0], 1).sum == acc.mean == acc.perplexity == INF
    assert math.isnan(acc.update([0.0, np.nan], 1).sum)


def test_errors_change_nothing(backend):
    acc = NegativeLogLikelihood().update([[0.0, 1.0]], [1])
    before = bits_of(acc)
    with pytest.raises(IndexError, match=r"target has label 2 at \(0,\)"):
        acc.update([[0.0, 1.0]], [2])
    with pytest.raises(ValueError, match=r"target has shape \(3,\)"):
        acc.update([[0.0, 1.0]], [1, 1, 1])
    with pytest.raises(TypeError, match="other is a float"):
        acc.merge(3.0)
    assert_same_bits(bits_of(acc), before)
    assert acc.count == 1


# of sequences


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(300, 11), (5, 7, 40), (2, 3, 4, 5)], ids=str)
def test_sequences_are_sums_of_tokens(backend, rng, shape, dtype, layout):
    x, y = data(rng, shape, dtype)
    x, y = LAYOUTS[layout](x), LAYOUTS[layout](y)
    losses = fastll.cross_entropy(x, y, reduction="none")
    value = fastll.sequence_log_likelihood(x, y)
    assert value.dtype == losses.dtype
    # at most 10 of 300 tokens go to one lane, and lanes add in float64 (on a GPU in two float32)
    wide = losses.astype(np.float64)
    np.testing.assert_allclose(value, -wide.sum(axis=-1), rtol=11 * eps(losses.dtype))
    of_all = fastll.perplexity(x, y)
    assert of_all.dtype == losses.dtype
    assert np.shape(of_all) == ()
    # the mean is of float64, whose roundoffs the exponential multiplies by the mean
    mean = wide.sum() / np.count_nonzero(y != -100)
    np.testing.assert_allclose(
        of_all, np.exp(mean), rtol=eps(losses.dtype) + (mean + 2) * losses.size * eps(np.float64)
    )


def test_padding_does_not_leak(backend, rng):
    x, y = data(rng)
    expected = fastll.sequence_log_likelihood(x, y), fastll.perplexity(x, y)
    x[y == -100] = np.nan
    assert_same_bits((fastll.sequence_log_likelihood(x, y), fastll.perplexity(x, y)), expected)
    y[y == -100] = -1
    changed = {"ignore_index": -1}
    assert_same_bits(fastll.sequence_log_likelihood(x, y, **changed), expected[0])
    assert_same_bits(fastll.perplexity(x, y, **changed), expected[1])
    none = fastll.sequence_log_likelihood(x, np.full(y.shape, -100))
    assert_same_bits(none, np.zeros(none.shape, none.dtype))  # no -0.0


def test_sequences_without_tokens(backend):
    x, y = np.zeros((2, 0, 3)), np.zeros((2, 0), int)
    np.testing.assert_array_equal(fastll.sequence_log_likelihood(x, y), [0, 0])
    assert np.isnan(fastll.perplexity(x, y))
    assert np.isnan(fastll.perplexity(np.zeros((2, 3)), [-100, -100]))
    assert fastll.sequence_log_likelihood(np.zeros((0, 4, 3)), np.zeros((0, 4), int)).shape == (0,)


def test_sequences_of_impossible_tokens(backend):
    x = np.array([[0.0, -INF], [0.0, 0.0]])
    assert fastll.sequence_log_likelihood(x, [1, 0]) == -INF
    assert fastll.perplexity(x, [1, 0]) == INF
    assert fastll.perplexity([[0.0, -100.0]], [1]) == pytest.approx(np.exp(100), rel=1e-13)
    assert fastll.perplexity(np.array([[0, -100]], np.float32), [1]) == INF  # exp(100) is no float32
    assert np.isnan(fastll.perplexity([[0.0, np.nan]], [1]))


@pytest.mark.parametrize("function", [fastll.sequence_log_likelihood, fastll.perplexity])
def test_bad_sequences(function):
    x, y = np.zeros((2, 3, 4)), np.zeros((2, 3), int)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 2\); expected .* \(2, 3\)"):
        function(x, y[:, :2])
    with pytest.raises(TypeError, match="tokens has dtype float64; expected integers"):
        function(x, y.astype(float))
    with pytest.raises(IndexError, match=r"tokens has label 4 at \(0, 0\); expected 0 <= label < 4"):
        function(x, y + 4)
    with pytest.raises(ValueError, match=r"logits has shape \(4,\); expected \(\.\.\., T, V\)"):
        function(x[0, 0], 1)
    with pytest.raises(TypeError, match="logits has dtype complex128"):
        function(x.astype(complex), y)


# what the theory says


def test_perplexity_is_one_number(backend, rng):
    x, y = data(rng, dtype=np.float64)
    mean = fastll.cross_entropy(x, y)
    acc = NegativeLogLikelihood().update(x[:2], y[:2]).update(x[2:], y[2:])
    # the roundoffs of a sum of all tokens' losses, times the mean
    rtol = (mean + 2) * y.size * eps(np.float64)
    np.testing.assert_allclose(fastll.perplexity(x, y), np.exp(mean), rtol=rtol)
    np.testing.assert_allclose(acc.perplexity, np.exp(mean), rtol=rtol)
    total = fastll.sequence_log_likelihood(x, y).sum()
    np.testing.assert_allclose(total, -acc.sum, rtol=y.size * eps(np.float64))


def test_likelihood_of_counts_is_the_exponential_of_cross_entropy(backend, rng):
    """With N_i tokens i among N it is exp(-N H(p, q)), where p_i = N_i / N, and p maximises it."""
    counts = np.array([5, 3, 1, 7])
    n, p = counts.sum(), counts / counts.sum()
    tokens = rng.permutation(np.repeat(np.arange(4), counts))

    def log_likelihood(logits):
        return fastll.sequence_log_likelihood(np.tile(logits, (n, 1)), tokens)

    # each side is a sum of 16 or 4 losses, a few roundoffs each
    tolerance = {"rtol": 40 * eps(np.float64)}
    logits = rng.standard_normal(4)
    np.testing.assert_allclose(
        log_likelihood(logits), -n * fastll.cross_entropy(logits, p), **tolerance
    )
    np.testing.assert_allclose(log_likelihood(np.log(counts)), -n * fastll.entropy(p), **tolerance)
    assert log_likelihood(logits) < log_likelihood(np.log(counts))


def test_minimiser_is_the_softmax_of_log_counts(backend):
    """Gradient descent: the estimate of maximum likelihood is the frequency of each token."""
    counts = np.array([10, 5, 3, 2])
    tokens, logits = np.repeat(np.arange(4), counts), np.zeros(4)
    # the least curvature, but for a common offset, is above 0.1: an error falls to 0.8 of itself
    for _ in range(170):
        rows = np.tile(logits, (len(tokens), 1))
        loss, grad = fastll.cross_entropy(rows, tokens, return_grad=True)
        logits = logits - 2 * grad.sum(axis=0)
    np.testing.assert_allclose(fastll.softmax(logits), counts / counts.sum(), rtol=1e-14)
    np.testing.assert_allclose(fastll.softmax(logits), fastll.softmax(np.log(counts)), rtol=1e-14)
    np.testing.assert_allclose(loss, fastll.entropy(counts / counts.sum()), rtol=1e-14)
