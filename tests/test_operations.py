"""Every operation on every backend, dtype, layout, shape and option, against the oracle."""

import numpy as np
import oracle
import pytest
from table import (
    BINARY_OPTIONS,
    CROSS_ENTROPY_OPTIONS,
    DTYPES,
    LAYOUTS,
    ROUNDOFFS,
    SHAPES,
    assert_close,
)

import fastll
from fastll.operations import OPERATIONS

# shapes in one layout, and layouts of one shape of rows and one of columns
PLACES = [(shape, axis, "contiguous") for shape, axis in SHAPES] + [
    (shape, axis, layout) for shape, axis in SHAPES[:3] for layout in LAYOUTS if layout != "contiguous"
]


def value_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(
    params=PLACES, ids=lambda place: f"{'x'.join(map(str, place[0]))}-{place[1]}-{place[2]}"
)
def place(request, rng, dtype):
    """(x, axis, lay out another array the same way)."""
    shape, axis, layout = request.param
    lay_out = LAYOUTS[layout]
    return lay_out((5 * rng.standard_normal(shape)).astype(dtype)), axis, lay_out


def test_logsumexp(backend, dtype, place):
    x, axis, _ = place
    result = fastll.logsumexp(x, axis=axis)
    expected, _ = oracle.logsumexp(x, axis)
    assert result.dtype == value_dtype(dtype)
    assert_close(result, expected, dtype)


def test_logsumexp_weighted(backend, dtype, place, rng):
    x, axis, lay_out = place
    b = lay_out(np.round(2 * rng.standard_normal(x.shape)).astype(dtype))
    result, sign = fastll.logsumexp(x, axis=axis, b=b, return_sign=True)
    expected, expected_sign = oracle.logsumexp(x, axis, b)
    np.testing.assert_array_equal(sign, expected_sign)
    assert_close(result, expected, dtype)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(backend, dtype, place, name):
    x, axis, _ = place
    expected = getattr(oracle, name)(x, axis)
    result = OPERATIONS[name].function(x, axis=axis)
    assert result.dtype == dtype
    assert_close(result, expected, dtype)
    if x.flags.writeable and x.dtype == dtype:
        assert OPERATIONS[name].function(x, axis=axis, out=x) is x
        assert_close(x, expected, dtype)


@pytest.mark.parametrize("name", ["sigmoid", "log_sigmoid"])
def test_sigmoid(backend, dtype, place, name):
    x, _, _ = place
    expected = getattr(oracle, name)(x)
    result = OPERATIONS[name].function(x)
    assert result.dtype == dtype
    assert_close(result, expected, dtype)
    if x.flags.writeable and x.dtype == dtype:
        assert OPERATIONS[name].function(x, out=x) is x
        assert_close(x, expected, dtype)


@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_cross_entropy(backend, dtype, place, rng, kind, options):
    x, axis, lay_out = place
    options = dict(options)
    if options.get("weight"):
        options["weight"] = rng.uniform(0.5, 2, x.shape[axis])
        if dtype != np.float64:  # the weights that the kernel sees
            options["weight"] = options["weight"].astype(np.float32)
    (target,) = OPERATIONS[f"{kind}_cross_entropy"].arguments(rng, x.astype(dtype), axis)
    if kind == "sparse":
        target[rng.random(target.shape) < 0.2] = -100
    else:
        target = lay_out(target)
    loss, lse, grad, denominator = oracle.cross_entropy(x, target, axis, **options)

    def check(reduction, expected_loss, scale, factor=ROUNDOFFS):
        result = fastll.cross_entropy(
            x, target, axis=axis, reduction=reduction, return_lse=True, return_grad=True, **options
        )
        assert result[0].dtype == result[1].dtype == value_dtype(dtype)
        assert result[2].dtype == dtype
        assert_close(result[0], expected_loss, dtype, factor=factor)
        assert_close(result[1], lse, dtype)
        assert_close(result[2], (grad[0] * scale, grad[1] * scale), dtype, factor=factor)
        alone = fastll.cross_entropy(x, target, axis=axis, reduction=reduction, **options)
        np.testing.assert_array_equal(alone, result[0])

    check("none", loss, 1)
    check("sum", (loss[0].sum(), loss[1].sum()), 1)
    if denominator:
        # the weights add up one after the other, in float64: about sqrt(n) roundoffs
        factor = ROUNDOFFS + np.sqrt(target.size)
        check(
            "mean", (loss[0].sum() / denominator, loss[1].sum() / denominator), 1 / denominator, factor
        )
    if x.flags.writeable and x.dtype == dtype:
        result, returned = fastll.cross_entropy(
            x, target, axis=axis, reduction="sum", return_grad=True, grad_out=x, **options
        )
        assert returned is x
        assert_close(result, (loss[0].sum(), loss[1].sum()), dtype)
        assert_close(x, grad, dtype)


@pytest.mark.parametrize("options", BINARY_OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_binary_cross_entropy(backend, dtype, place, rng, options):
    x, _, lay_out = place
    target = lay_out(rng.random(x.shape).astype(dtype))
    # one that broadcasts, and one of the full shape
    shapes = {"weight": (1,) * x.ndim, "pos_weight": x.shape}
    chosen = {name: rng.uniform(0.5, 2, shapes[name]).astype(np.float32) for name in options}
    loss, grad = oracle.binary_cross_entropy(x, target, **chosen)
    function = fastll.binary_cross_entropy_with_logits
    result, slope = function(x, target, reduction="none", return_grad=True, **chosen)
    assert result.dtype == value_dtype(dtype)
    assert slope.dtype == dtype
    assert_close(result, loss, dtype)
    assert_close(slope, grad, dtype)
    summed = (loss[0].sum(), loss[1].sum())
    assert_close(function(x, target, reduction="sum", **chosen), summed, dtype)
    mean, slope = function(x, target, return_grad=True, **chosen)
    assert_close(mean, (summed[0] / x.size, summed[1] / x.size), dtype)
    assert_close(slope, (grad[0] / x.size, grad[1] / x.size), dtype)
    if x.flags.writeable and x.dtype == dtype:
        _, slope = function(x, target, reduction="sum", return_grad=True, grad_out=x, **chosen)
        assert slope is x
        assert_close(x, grad, dtype)
