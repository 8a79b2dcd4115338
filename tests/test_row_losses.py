"""What is special about losses of rows: sample weights, folds of logits, identities between them."""

import numpy as np
import pytest
from table import DTYPES, assert_same_bits

import fastll

INF, NAN = np.inf, np.nan

#: Losses of rows: a name, and a function (logits, options) of rows of 40 classes.
LABELS = np.arange(9) % 5
DENSE = np.random.default_rng(1).dirichlet(np.ones(40), 9)
TARGETS = np.random.default_rng(2).standard_normal((9, 40))
LOSSES = {
    "sparse": lambda x, **options: fastll.cross_entropy(x, LABELS, **options),
    "dense": lambda x, **options: fastll.cross_entropy(x, DENSE, **options),
    "smoothed": lambda x, **options: fastll.cross_entropy(
        x, LABELS, label_smoothing=0.1, z_loss=0.01, softcap=3.0, **options
    ),
    "sparse nll": lambda x, **options: fastll.nll_loss(x, LABELS, **options),
    "dense nll": lambda x, **options: fastll.nll_loss(x, DENSE, **options),
    "entropy": lambda x, **options: fastll.entropy_from_logits(x, **options),
    "kl": lambda x, **options: fastll.kl_divergence_from_logits(x, TARGETS, **options),
}
WEIGHTS = np.array([2.0, -1.0, 0.0, 0.5, 0.0, 1.0, -3.0, 4.0, 1e-3])


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=["rows", "columns"])
def logits(request, rng):
    x = rng.standard_normal((9, 40))
    return x if request.param == "rows" else np.asfortranarray(x)


def test_sample_weights_are_the_upstream_gradient(backend, loss, logits):
    """Values and gradients times g: 2 roundings, of the product and of the scale it is part of."""
    each, slopes = loss(logits, reduction="none", return_grad=True)
    value, grad = loss(logits, sample_weight=WEIGHTS, reduction="sum", return_grad=True)
    close = {"rtol": 8e-16, "atol": 1e-16}
    np.testing.assert_allclose(value, np.sum(WEIGHTS * each), rtol=1e-14)
    np.testing.assert_allclose(grad, WEIGHTS[:, None] * slopes, **close)
    weighted, other = loss(logits, sample_weight=WEIGHTS, reduction="none", return_grad=True)
    np.testing.assert_allclose(weighted, WEIGHTS * each, **close)
    assert_same_bits(other, grad)
    mean, mean_grad = loss(logits, sample_weight=WEIGHTS, reduction="mean", return_grad=True)
    np.testing.assert_allclose(mean, value / WEIGHTS.sum(), rtol=1e-14)
    np.testing.assert_allclose(mean_grad, grad / WEIGHTS.sum(), **close)


def test_a_weight_of_one_changes_no_bit(backend, loss, logits):
    for reduction in ("none", "sum", "mean"):
        expected = loss(logits, reduction=reduction, return_grad=True)
        for ones in (1, np.ones(9, np.float32), np.broadcast_to(np.float16(1), 9)):
            result = loss(logits, reduction=reduction, return_grad=True, sample_weight=ones)
            assert_same_bits(result, expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_weight_of_zero_drops_a_row(backend, loss, logits, bad):
    """Whatever its logits are, and as if it were not there."""
    weights = np.array([1.0, 0, 1, 1, 0, 1, 1, 1, 1])
    logits[1], logits[4, 3] = bad, bad
    value, grad = loss(logits, sample_weight=weights, reduction="none", return_grad=True)
    assert np.isfinite(value).all()
    assert np.isfinite(grad).all()
    for zeros in (value[[1, 4]], grad[[1, 4]]):
        assert_same_bits(zeros, np.zeros_like(zeros))
    mean = loss(logits, sample_weight=weights, reduction="mean")
    np.testing.assert_allclose(mean, value.sum() / 7, rtol=4e-15)


def test_a_weight_of_zero_is_ignore_index(backend, rng):
    x = rng.standard_normal((9, 40))
    weights = np.where(np.arange(9) % 3, 1.0, 0.0)
    ignored = np.where(weights, LABELS, -100)
    for options in ({}, {"weight": rng.random(40)}, {"z_loss": 0.1, "label_smoothing": 0.1}):
        for reduction in ("none", "sum", "mean"):
            more = {**options, "reduction": reduction, "return_grad": True}
            dropped = fastll.cross_entropy(x, LABELS, sample_weight=weights, **more)
            for one, other in zip(fastll.cross_entropy(x, ignored, **more), dropped, strict=True):
                np.testing.assert_allclose(one, other, rtol=4e-16)


def test_mean_of_no_weight(backend, loss):
    assert np.isnan(loss(np.zeros((9, 40)), sample_weight=0, reduction="mean"))
    assert loss(np.zeros((9, 40)), sample_weight=0, reduction="sum") == 0


@pytest.mark.parametrize("sample", [None, np.array([1.0, 2, 0, 1, 1, 3, 0, 1, 1])])
def test_mean_of_z_loss_is_over_rows(backend, rng, sample):
    """Not over class weights: these are of 0.001 here."""
    x, z = rng.standard_normal((9, 40)), 0.25
    labels = np.where(np.arange(9) == 5, -100, LABELS)
    weight = rng.random(40) / 1000
    g = np.where(labels == -100, 0, 1 if sample is None else sample)
    options = {"weight": weight, "sample_weight": sample}
    plain, plain_grad = fastll.cross_entropy(x, labels, **options, return_grad=True)
    value, grad = fastll.cross_entropy(x, labels, **options, z_loss=z, return_grad=True)
    lse = fastll.logsumexp(x, axis=1)
    np.testing.assert_allclose(value - plain, z * np.sum(g * lse**2) / g.sum(), rtol=1e-13)
    more = (g * 2 * z * lse / g.sum())[:, None] * fastll.softmax(x)
    np.testing.assert_allclose(grad - plain_grad, more, rtol=1e-10, atol=1e-15)


def test_loss_scaling(backend, rng):
    """Gradients of a mean over many rows are below what float16 holds, unless they are scaled."""
    x = (2 * rng.standard_normal((4096, 256))).astype(np.float16)
    y = rng.integers(0, 256, 4096)
    _, plain = fastll.cross_entropy(x, y, return_grad=True)
    scale = 2.0**10
    _, scaled = fastll.cross_entropy(
        x, y, sample_weight=scale / len(x), reduction="sum", return_grad=True
    )
    _, exact = fastll.cross_entropy(x.astype(np.float64), y, return_grad=True)
    assert np.mean(plain == 0) > 0.01
    # an ulp of float16, as float32 may round the other way first; the smallest ones are subnormal
    np.testing.assert_allclose(
        scaled.astype(np.float64) / scale, exact, rtol=2**-10, atol=2**-24 / scale
    )


# identities


def test_nll_loss_of_log_softmax_is_cross_entropy(backend, rng, logits):
    options = {"weight": rng.random(40), "label_smoothing": 0.2, "sample_weight": WEIGHTS}
    for target in (LABELS, DENSE):
        for reduction in ("none", "sum", "mean"):
            one = fastll.cross_entropy(logits, target, **options, reduction=reduction)
            other = fastll.nll_loss(fastll.log_softmax(logits), target, **options, reduction=reduction)
            np.testing.assert_allclose(other, one, rtol=1e-13)


def test_one_hot_is_sparse(backend, logits):
    one_hot = np.eye(40)[LABELS]
    for f in (fastll.cross_entropy, fastll.nll_loss):
        dense = f(logits, one_hot, sample_weight=WEIGHTS, return_grad=True)
        sparse = f(logits, LABELS, sample_weight=WEIGHTS, return_grad=True)
        for one, other in zip(dense, sparse, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-16)


def test_binary_is_two_classes(backend, rng):
    x, t = 3 * rng.standard_normal((2, 50))
    t = fastll.sigmoid(t)
    two = np.stack((np.zeros(50), x), axis=1)
    loss, grad = fastll.cross_entropy(two, np.stack((1 - t, t), axis=1), return_grad=True)
    other, other_grad = fastll.binary_cross_entropy_with_logits(x, t, return_grad=True)
    np.testing.assert_allclose(loss, other, rtol=1e-14)
    np.testing.assert_allclose(grad[:, 1], other_grad, rtol=1e-12, atol=1e-17)


def test_entropy_and_divergence_of_logits(backend, logits):
    """As of the probabilities; and the cross-entropy of a distribution is H + KL."""
    p = fastll.softmax(TARGETS)
    h = fastll.entropy_from_logits(TARGETS)
    np.testing.assert_allclose(h, fastll.entropy(p), rtol=1e-14)
    kl = fastll.kl_divergence_from_logits(logits, TARGETS, reduction="none")
    cross = fastll.cross_entropy(logits, p, reduction="none")
    np.testing.assert_allclose(h + kl, cross, rtol=1e-14)
    assert_same_bits(fastll.kl_divergence_from_logits(TARGETS, TARGETS, reduction="none"), np.zeros(9))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_divergence_is_never_negative(backend, rng, dtype):
    x = rng.standard_normal((50, 200)).astype(dtype)
    t = (x.astype(np.float64) * (1 + 1e-3)).astype(dtype)
    assert (fastll.kl_divergence_from_logits(x, t, reduction="none") >= 0).all()


def test_an_offset_costs_no_digit(backend, rng):
    x = rng.integers(-50, 50, (9, 40)) / 8
    for f in (fastll.entropy_from_logits, lambda x: fastll.kl_divergence_from_logits(x, TARGETS)):
        np.testing.assert_allclose(f(x + 2.0**20 - 64), f(x), rtol=1e-13)


# selected classes


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_selected_classes(backend, rng, axis):
    """One or several classes of each row, as of a log-softmax; entropy and lse beside them."""
    x = rng.standard_normal((4, 50, 3))
    log_p = np.moveaxis(fastll.log_softmax(x, axis=axis), axis, -1)
    index = rng.integers(0, log_p.shape[-1], (*log_p.shape[:-1], 6))
    several = fastll.selective_log_softmax(x, index, axis=axis)
    # a log-softmax is written in the dtype of the logits, which is float64 here
    np.testing.assert_allclose(several, np.take_along_axis(log_p, index, -1), rtol=4e-15)
    one, entropy, lse = fastll.selective_log_softmax(
        x, index[..., 2].astype(np.uint8), axis=axis, return_entropy=True, return_lse=True
    )
    assert_same_bits(one, several[..., 2])
    assert_same_bits(entropy, fastll.entropy_from_logits(x, axis=axis))
    np.testing.assert_allclose(lse, fastll.logsumexp(x, axis=axis), rtol=4e-15)
    none = fastll.selective_log_softmax(x, index[..., :0], axis=axis)
    assert none.shape == (*log_p.shape[:-1], 0)


def test_selected_classes_are_checked(backend):
    x = np.zeros((3, 4))
    for bad, name in (([0, 4, 1], "4"), ([0, -1, 1], "-1"), ([0, -100, 1], "-100")):
        with pytest.raises(
            IndexError, match=rf"index has class {name} at \(1,\); expected 0 <= class < 4"
        ):
            fastll.selective_log_softmax(x, bad)
    with pytest.raises(IndexError, match=r"index has class -9223372036854775808 at \(2, 0\)"):
        fastll.selective_log_softmax(x, [[0], [1], [-(2**63)]])
    with pytest.raises(
        ValueError, match=r"index has shape \(4,\); expected that of logits without axis"
    ):
        fastll.selective_log_softmax(x, np.zeros(4, int))
    with pytest.raises(TypeError, match="index has dtype float64; expected integers"):
        fastll.selective_log_softmax(x, np.zeros(3))
    for temperature in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="temperature is"):
            fastll.selective_log_softmax(x, [0, 1, 2], temperature=temperature)


def test_temperature(backend, rng):
    """As of logits that are divided by it, by a power of two to the bit; the gradient too."""
    x, t = rng.standard_normal((2, 9, 40))
    for f in (
        lambda x, t, **o: fastll.selective_log_softmax(x, LABELS, **o),
        lambda x, t, **o: fastll.entropy_from_logits(x, **o),
        lambda x, t, **o: fastll.kl_divergence_from_logits(x, t, **o),
    ):
        assert_same_bits(f(x, t, temperature=4.0), f(x / 4, t / 4))
    for f in (fastll.entropy_from_logits, fastll.kl_divergence_from_logits):
        arrays = (x, t)[: 1 + (f is fastll.kl_divergence_from_logits)]
        _, grad = f(*arrays, temperature=4.0, return_grad=True)
        _, other = f(*(a / 4 for a in arrays), return_grad=True)
        assert_same_bits(grad, other / 4)


# special values


@pytest.mark.parametrize("repeats", [1, 40, 3000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize(
    ("row", "entropy"),
    [
        ([0.0, -INF], 0.0),
        ([-INF, -INF], NAN),
        ([INF, 0.0], NAN),
        ([INF, -INF], NAN),
        ([NAN, 0.0], NAN),
        ([NAN, -INF], NAN),
        ([1e30, 1e30], np.log(2)),
        ([1e30, -1e30], 0.0),
        ([-3e6, -3e6], np.log(2)),
        ([3e38, -3e38], 0.0),
        ([1.0, 1.0], np.log(2)),
    ],
)
def test_special_entropies(backend, row, entropy, dtype, layout, repeats):
    """-inf contributes 0; a row without a distribution is NaN."""
    x = np.repeat(np.array(row, dtype), repeats)
    x = x[None] if layout == "row" else np.stack((x, x, x), axis=1).T
    expected = np.full(len(x), entropy + np.log(repeats), dtype)
    value, grad = fastll.entropy_from_logits(x, return_grad=True)
    tolerance = {"rtol": 8 * np.finfo(dtype).eps}
    np.testing.assert_allclose(value, expected, **tolerance)
    # equal probabilities have the gradient 0, up to the rounding of their distance from the mean
    np.testing.assert_allclose(
        grad, np.where(np.isnan(expected), NAN, 0)[:, None] + 0 * grad, atol=1e-15
    )
    index = np.zeros(len(x), int)
    log_p, other, lse = fastll.selective_log_softmax(x, index, return_entropy=True, return_lse=True)
    assert_same_bits(other, value)
    np.testing.assert_array_equal(lse, fastll.logsumexp(x, axis=1))
    np.testing.assert_array_equal(log_p, fastll.log_softmax(x)[:, 0])
    if not np.isnan(entropy):
        kl, grad = fastll.kl_divergence_from_logits(x, x, return_grad=True)
        assert kl == 0
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
    ("x", "t", "kl"),
    [
        ([0.0, -INF], [0.0, 0.0], INF),
        ([0.0, 0.0], [0.0, -INF], np.log(2)),
        ([0.0, -INF], [1.0, -INF], 0.0),
        ([-INF, -INF], [0.0, 0.0], NAN),
        ([0.0, 0.0], [-INF, -INF], NAN),
        ([INF, 0.0], [0.0, 0.0], NAN),
        ([0.0, 0.0], [0.0, INF], NAN),
        ([NAN, 0.0], [0.0, 0.0], NAN),
        ([0.0, 0.0], [0.0, NAN], NAN),
        ([0.0, 0.0], [NAN, -INF], NAN),
        ([1e30, -1e30], [0.0, -1e30], 0.0),
        ([-800.0, 0.0], [0.0, -800.0], 800.0),
    ],
)
def test_special_divergences(backend, x, t, kl):
    for repeats in (1, 40, 3000):
        rows = [np.repeat(np.array(a), repeats)[None] for a in (x, t)]
        columns = [np.repeat(a, 3, axis=0).T.copy().T for a in rows]
        for arrays in (rows, columns):
            value = fastll.kl_divergence_from_logits(*arrays, reduction="none")
            np.testing.assert_allclose(value, np.full(len(arrays[0]), kl), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
@pytest.mark.parametrize("layout", ["row", "column"])
def test_maxima_that_rise(backend, rng, order, layout):
    """From block to block, with elements that count in each of them."""
    x = np.linspace(-60, 5, 7001)
    t = np.linspace(-3, 50, 7001)
    if order == "shuffled":
        rng.shuffle(x)
    if order == "falling":
        x, t = x[::-1], t[::-1]
    wide_x, wide_t = x.astype(np.longdouble), t.astype(np.longdouble)
    log_q = wide_x - wide_x.max() - np.log(np.sum(np.exp(wide_x - wide_x.max())))
    log_p = wide_t - wide_t.max() - np.log(np.sum(np.exp(wide_t - wide_t.max())))
    h, kl = -np.sum(np.exp(log_q) * log_q), np.sum(np.exp(log_p) * (log_p - log_q))
    arrays = [a[None].copy() if layout == "row" else np.stack((a, a)).T.copy().T for a in (x, t)]
    np.testing.assert_allclose(fastll.entropy_from_logits(arrays[0]), float(h), rtol=1e-14)
    value = fastll.kl_divergence_from_logits(*arrays, reduction="none")
    # the sums that it is the difference of are below 60
    np.testing.assert_allclose(value, float(kl), rtol=1e-14, atol=60 * 2.0**-50)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_no_elements(backend, shape):
    x, rows = np.zeros(shape), shape[0]
    expected = np.full(rows, NAN)
    np.testing.assert_array_equal(fastll.entropy_from_logits(x), expected)
    value, grad = fastll.kl_divergence_from_logits(x, x, reduction="none", return_grad=True)
    np.testing.assert_array_equal(value, expected)
    assert grad.shape == shape
    np.testing.assert_array_equal(fastll.nll_loss(x, x, reduction="none"), np.zeros(rows))
    ignored = np.full(rows, -100)
    assert np.isnan(fastll.nll_loss(x, ignored))
    np.testing.assert_array_equal(fastll.nll_loss(x, ignored, reduction="none"), np.zeros(rows))


def test_nll_loss_of_zero_probability(backend):
    """-inf costs infinitely much at the label, and nothing elsewhere."""
    x = np.log(np.array([[0.0, 1.0], [0.0, 1.0]]), where=[[False, True]] * 2, out=np.full((2, 2), -INF))
    np.testing.assert_array_equal(fastll.nll_loss(x, [0, 1], reduction="none"), [INF, 0])
    dense = np.array([[0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_array_equal(fastll.nll_loss(x, dense, reduction="none"), [INF, 0])
    weighted = fastll.nll_loss(x, [0, 1], weight=[0.0, 1.0], reduction="none")
    np.testing.assert_array_equal(weighted, [0, 0])
