"""fastll.interop.jax against fastll on NumPy arrays, whose kernels it shares, and against optax."""

# ruff: noqa: E402 (without the packages, what needs them is not imported)

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")

import jax.numpy as jnp
from jax import export
from jax.test_util import check_grads

import fastll
from fastll import threads

fj = pytest.importorskip("fastll.interop.jax", reason="fastll is not compiled", exc_type=ImportError)

from fastll.backend.cython import Xla

DTYPES = ["float16", "bfloat16", "float32", "float64"]
REDUCTIONS = ["mean", "sum", "none"]
#: What sums of rows may be off by, which both add in float64, in another order: of float32 it is the
#: last rounding, of float64 a roundoff for each of the few hundred rows, of both signs.
ULPS = {"float32": 1, "float64": 8}


@pytest.fixture(autouse=True)
def wide():
    """float64 in JAX."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def numbers(rng, shape, dtype="float64"):
    return (3 * rng.standard_normal(shape)).astype(jnp.dtype(dtype))


def of_rows(shape, axis):
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def assert_same(found, expected, ulps=0):
    """Equal to the bit, or up to some roundoffs; NaN is equal to NaN."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if ulps:
        np.testing.assert_array_max_ulp(found, expected, ulps)
    else:
        np.testing.assert_array_equal(found, expected)


def assert_loss(function, reference, x, others, reduction, **options):
    """Value and gradient under jit are those of fastll on NumPy arrays."""
    keywords = dict(options, reduction=reduction)
    expected, slope = reference(x, *others, **keywords, return_grad=True)

    @jax.jit
    def value_and_slope(x):
        value, pull = jax.vjp(lambda x: function(x, *others, **keywords), x)
        return value, *pull(jnp.ones_like(value))

    found = value_and_slope(x)
    ulps = ULPS[expected.dtype.name]
    assert_same(found[0], expected, 0 if reduction == "none" else ulps)
    # of float64, the sum of the sample weights that a mean's gradient is divided by is off by as much
    summed = x.dtype == np.float64 and reduction == "mean" and "sample_weight" in options
    assert_same(found[1], slope, ulps if summed else 0)


#: Shapes and axes, each with several combinations of the others: compiling is what takes time.
CASES = [
    ((7, 300), -1),
    ((130, 10), 1),
    ((5, 9, 70), 1),
    ((3, 40, 5), 0),
    ((12,), 0),
    ((2, 3000, 3), 1),
]
ROW_OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0},
    {"weight": 1, "sample_weight": 1, "z_loss": 0.5},
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("options", range(len(ROW_OPTIONS)))
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_cross_entropy(rng, case, options, kind):
    shape, axis = CASES[case]
    rows, reduction = of_rows(shape, axis), REDUCTIONS[(case + options) % 3]
    x = numbers(rng, shape, DTYPES[(case + 2 * options + (kind == "dense")) % 4])
    given = dict(ROW_OPTIONS[options], axis=axis)
    if "weight" in given:
        given["weight"] = rng.random(shape[axis]).astype(np.float32)
        given["sample_weight"] = rng.integers(0, 3, rows).astype(np.float32)
    if kind == "sparse":
        labels = np.where(rng.random(rows) < 0.2, -100, rng.integers(0, shape[axis], rows))
        target = np.asarray(labels, np.int32)
    else:
        target = rng.random(shape).astype(np.float32)
    assert_loss(fj.cross_entropy, fastll.cross_entropy, x, (target,), reduction, **given)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_entropy(rng, case):
    shape, axis = CASES[case]
    x = numbers(rng, shape, DTYPES[case % 4])
    options = {"axis": axis, "temperature": 0.7}
    if case % 2:
        options["sample_weight"] = rng.random(of_rows(shape, axis))
    functions = fj.entropy_from_logits, fastll.entropy_from_logits
    assert_loss(*functions, x, (), REDUCTIONS[case % 3], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7, 300), (70000,)])
def test_binary_cross_entropy(rng, dtype, shape):
    name = "binary_cross_entropy_with_logits"
    x, t = numbers(rng, shape, dtype), rng.random(shape).astype(np.float32)
    options = [{}, {"weight": rng.random(shape[-1:])}, {"pos_weight": rng.random(shape)}]
    for reduction, given in zip(REDUCTIONS, rng.permutation(options), strict=True):
        assert_loss(getattr(fj, name), getattr(fastll, name), x, (t,), reduction, **given)


@pytest.mark.parametrize("axis", [None, -1, 0, (0, 1), (0, 2), ()])
def test_reductions(rng, axis):
    x, b = numbers(rng, (4, 70, 6)), rng.standard_normal((70, 1)).astype(np.float32)

    @jax.jit
    def results(x):
        weighted = fj.logsumexp(x, axis, b, True, True)
        return fj.softmax(x, axis), fj.log_softmax(x, axis), fj.logsumexp(x, axis), *weighted

    expected = fastll.softmax(x, axis), fastll.log_softmax(x, axis), fastll.logsumexp(x, axis)
    expected += fastll.logsumexp(x, axis, b, True, True)
    for i, (a, e) in enumerate(zip(results(x), expected, strict=True)):
        if axis == (0, 2) or i > 2:
            # NumPy's views of axes that are not neighbours, or of weights, are read in another order;
            # of 420 terms of both signs, a hundredth may be left
            np.testing.assert_allclose(a, e, 1e-13, 1e-13)
        else:
            assert_same(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(rng, dtype):
    x = numbers(rng, (9, 600), dtype)
    for name, axis in ("softmax", 1), ("log_softmax", 0), ("logsumexp", 0), ("logsumexp", 1):
        assert_same(getattr(fj, name)(x, axis), getattr(fastll, name)(x, axis))


def test_special_values():
    x = np.array([[0.0, -40.0], [-np.inf, -np.inf], [np.inf, 0.0], [np.nan, 0.0], [1e30, 1e30]])
    assert_same(fj.logsumexp(x, 1), fastll.logsumexp(x, 1))
    assert_same(fj.softmax(x), fastll.softmax(x))
    y = np.array([0, -100, 0, -100, 1])
    assert_loss(fj.cross_entropy, fastll.cross_entropy, x, (y,), "none")
    assert_loss(
        fj.cross_entropy, fastll.cross_entropy, x[:1], (y[1:2],), "mean"
    )  # NaN: nothing is kept
    for shape in (0, 5), (3, 0), (0, 0):
        nothing = np.zeros(shape)
        assert_same(fj.logsumexp(nothing, -1), fastll.logsumexp(nothing, -1))
        assert_same(fj.softmax(nothing), nothing)
        assert_same(fj.cross_entropy(nothing, nothing), fastll.cross_entropy(nothing, nothing))
    assert_same(fj.softmax(3.0), np.float64(1))


def test_any_integers(rng):
    """Labels of any integer dtype; integer logits have JAX's default float."""
    x, y = rng.integers(-3, 4, (6, 5)), rng.integers(0, 5, 6)
    for dtype in "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64":
        assert_same(fj.cross_entropy(x, y.astype(dtype)), fastll.cross_entropy(x, y), 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loss_scaling(rng, dtype):
    """A factor of the loss is applied before rounding: it keeps gradients of halves from underflow."""
    x, y = 3 * numbers(rng, (3, 50), dtype), rng.integers(0, 50, 3)
    scaled = jax.jit(jax.grad(lambda x: 2.0**15 * fj.cross_entropy(x, y)))(x)
    sample = np.full(3, 2.0**15 / 3)
    _, expected = fastll.cross_entropy(x, y, sample_weight=sample, reduction="sum", return_grad=True)
    # 2**15 is multiplied by a third there, and divided by 3 here: a roundoff may move a rounding
    info = jnp.finfo(dtype)
    least = float(info.smallest_subnormal)
    np.testing.assert_allclose(scaled.astype(float), expected.astype(float), float(info.eps), least)


def test_large_without_reduction(rng):
    """The gradient is computed with the loss, and multiplied later, where 0 drops a row too."""
    x, y = numbers(rng, (1 << 12, 64), "float32"), rng.integers(0, 64, 1 << 12)
    x[1] = np.nan
    factor = rng.integers(0, 3, len(x)).astype(np.float32)
    factor[1] = 0

    def f(x):
        losses = fj.cross_entropy(x, y, reduction="none")
        return jnp.where(factor == 0, 0, losses * factor).sum()

    slope = jax.jit(jax.grad(f))(x)
    given = {"sample_weight": factor, "reduction": "sum", "return_grad": True}
    assert_same(slope, fastll.cross_entropy(x, y, **given)[1])  # by 2 nothing is rounded


def test_large_mean_of_unreduced(rng):
    """The gradient that is computed with the losses is that of their mean, and is not written twice."""
    shape = 5000, 60
    x, y = numbers(rng, shape, "float32"), rng.integers(0, 60, 5000)

    def slope(reduction):
        return jax.jit(jax.grad(lambda x: reduction(fj.cross_entropy(x, y, reduction="none"))))

    given = {"reduction": "sum", "return_grad": True}
    share = np.full(5000, np.float32(1) / np.float32(5000))
    expected = fastll.cross_entropy(x, y, sample_weight=share, **given)[1]
    assert_same(slope(jnp.mean)(x), expected)
    text = slope(jnp.mean).lower(x).compile().as_text()
    assert not re.search(r"= f32\[5000,60\]\S* (multiply|fusion)", text)
    # both round a factor and its product with exponentials; here another factor and product follow
    found, expected = slope(jnp.sum)(x), fastll.cross_entropy(x, y, **given)[1]
    np.testing.assert_allclose(found, expected, 6 * 2.0**-24, 0)


# vmap and scan


def row_loss(x, y):
    return fj.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.1)


def loops(f, *arguments):
    """What `vmap` over the first axis of each is meant to give."""
    parts = [f(*given) for given in zip(*arguments, strict=True)]
    return jax.tree.map(lambda *a: jnp.stack(a), *parts)


@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 7), (4, 6, 300), (3, 2, 4, 9)])
def test_vmap(rng, shape):
    x, y = numbers(rng, shape, "float32"), rng.integers(0, shape[-1], shape[:-1])
    y[np.unravel_index(0, y.shape)] = -100
    f = jax.jit(jax.value_and_grad(row_loss))
    for found, expected in zip(jax.jit(jax.vmap(f))(x, y), loops(f, x, y), strict=True):
        # the mean's divisor is applied to each row here, and once there: a roundoff of float64
        np.testing.assert_allclose(found, expected, 2 * np.finfo(np.float32).eps, 1e-38)
    if len(shape) > 3:  # twice
        twice, expected = jax.vmap(jax.vmap(row_loss))(x, y), loops(jax.vmap(row_loss), x, y)
        np.testing.assert_allclose(twice, expected, 2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(("kind", "reduction"), [("sparse", "mean"), ("dense", "none")])
def test_vmap_over_some(rng, kind, reduction):
    """Arguments that are mapped, and others that are not, of which no copies are made."""
    n, rows, classes = 3, 4, 70
    x = numbers(rng, (n, rows, classes))
    y = rng.integers(0, classes, (n, rows)) if kind == "sparse" else rng.random((n, rows, classes))
    weight, sample = rng.random((n, classes)), rng.random((n, rows))

    def f(x, y, weight, sample):
        options = {"weight": weight, "sample_weight": sample, "z_loss": 0.3, "reduction": reduction}
        return fj.cross_entropy(x, y, **options)

    @jax.jit
    def slopes(x, y, weight, sample):
        value, pull = jax.vjp(lambda x, sample: f(x, y, weight, sample), x, sample)
        return value, pull(1.0 + jnp.arange(value.size).reshape(value.shape))

    for mapped in (0, 0, 0, 0), (0, None, None, None), (None, 0, None, None), (0, 0, None, 0):
        pairs = list(zip((x, y, weight, sample), mapped, strict=True))
        given = [a if axis == 0 else a[0] for a, axis in pairs]
        apart = [a if axis == 0 else np.stack([a[0]] * n) for a, axis in pairs]
        found, expected = jax.jit(jax.vmap(slopes, mapped))(*given), loops(slopes, *apart)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, 1e-13, 1e-15)  # sums of at most 70 in other orders


def test_vmap_is_one_call(rng):
    x, y = numbers(rng, (6, 40)), rng.integers(0, 40, 6)
    compiled = jax.jit(jax.vmap(jax.grad(row_loss))).lower(x, y).compile().as_text()
    assert compiled.count('custom_call_target="fastll"') == 1
    assert "while" not in compiled


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_elementwise(rng, reduction):
    x, t, weight = numbers(rng, (5, 30)), rng.random((5, 30)), rng.random((5, 30))

    @jax.jit
    def f(x, t, weight, g):
        value, pull = jax.vjp(
            lambda x: fj.binary_cross_entropy_with_logits(x, t, weight=weight, reduction=reduction), x
        )
        return value, pull(g * jnp.ones_like(value))

    for g in (
        np.full(5, 2.0),
        np.arange(5.0),
    ):  # of reductions, upstream gradients that are one, and that are not
        found, expected = jax.vmap(f)(x, t, weight, g), loops(f, x, t, weight, g)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, 1e-14)


def test_scan(rng):
    x, y = numbers(rng, (4, 6, 9)), rng.integers(0, 9, (4, 6))

    def total(x):
        def step(carry, xy):
            return carry + fj.cross_entropy(*xy), fj.softmax(xy[0])

        return jax.lax.scan(step, 0.0, (x, y))[0]

    value, grad = jax.jit(jax.value_and_grad(total))(x)
    expected = [fastll.cross_entropy(*xy, return_grad=True) for xy in zip(x, y, strict=True)]
    np.testing.assert_allclose(value, sum(loss for loss, _ in expected), 1e-15)
    assert_same(grad, np.stack([slope for _, slope in expected]))


# derivatives that go by formulas


def test_derivatives_of_losses(rng):
    """Of every argument, twice over."""
    x, y, t = numbers(rng, (3, 4)) / 3, rng.integers(0, 4, 3), rng.random((3, 4))
    w, s = rng.random(4) + 0.5, rng.random(3) + 0.5
    options = {"label_smoothing": 0.2, "z_loss": 0.3, "softcap": 4.0}

    def sparse(x, w, s):
        return fj.cross_entropy(x, y, weight=w, sample_weight=s, **options)

    def dense(x, t, w, s):
        return fj.cross_entropy(x, t, weight=w, sample_weight=s, reduction="none", **options)

    def entropy(x, s):
        return fj.entropy_from_logits(x, temperature=0.5, sample_weight=s, reduction="sum")

    def binary(x, t, w, p):
        return fj.binary_cross_entropy_with_logits(x, t, weight=w, pos_weight=p)

    cases = (
        (sparse, (x, w, s)),
        (dense, (x, t, w, s)),
        (entropy, (x, s)),
        (binary, (x, t, w, w[::-1].copy())),
    )
    for f, arguments in cases:
        first = jax.jit(lambda *a, f=f: jax.vjp(f, *a)[1](jnp.ones_like(f(*a))))
        check_grads(jax.jit(f), arguments, order=1, modes=["rev"])
        check_grads(first, arguments, order=1, modes=["rev" if f is dense else "fwd"])


def test_hessian(rng):
    x, y = numbers(rng, 5), 2
    p = fastll.softmax(x)
    found = jax.jit(jax.hessian(lambda x: fj.cross_entropy(x, y)))(x)
    np.testing.assert_allclose(found, np.diag(p) - np.outer(p, p), 1e-12, 1e-16)


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_derivatives_of_reductions(rng, axis):
    """In both modes, and of the second order, they are those of JAX's own functions."""
    x, b, *along = rng.standard_normal((4, 3, 5, 2))

    def derivatives(f, *primals):
        def first(*given):
            return jax.jvp(f, given, tuple(along[: len(given)]))[1]

        value, pull = jax.vjp(first, *primals)
        return value, *pull(jnp.cos(value))

    def compare(ours, own, *primals):
        found, expected = jax.jit(lambda *a: (derivatives(ours, *a), derivatives(own, *a)))(*primals)
        for a, e in zip(found, expected, strict=True):
            # sums of at most 15 terms, of which some cancel
            np.testing.assert_allclose(a, e, 1e-12, 1e-14)

    for name in "softmax", "log_softmax":
        compare(partial(getattr(fj, name), axis=axis), partial(getattr(jax.nn, name), axis=axis), x)
    own = jax.scipy.special.logsumexp
    compare(partial(fj.logsumexp, axis=axis), partial(own, axis=axis), x)
    signed = {"axis": axis, "return_sign": True}
    compare(lambda x, b: fj.logsumexp(x, b=b, **signed)[0], lambda x, b: own(x, b=b, **signed)[0], x, b)


def test_derivative_at_a_target_of_zero(rng):
    """It is lse - x there too."""
    x, t = numbers(rng, (2, 5)), np.eye(2, 5)
    slope = jax.jit(jax.grad(lambda t: fj.cross_entropy(x, t, reduction="sum")))(t)
    np.testing.assert_allclose(slope, -fastll.log_softmax(x), 1e-14)


def test_dropped_rows_have_no_derivatives(rng):
    x, y = numbers(rng, (3, 5)), np.array([1, -100, 2])
    x[1] = np.nan
    f = jax.jit(jax.grad(lambda x, w: fj.cross_entropy(x, y, weight=w), (0, 1)))
    slope, of_weight = f(x, np.ones(5))
    assert np.all(slope[1] == 0)
    assert np.all(np.isfinite(slope))
    assert np.all(np.isfinite(of_weight))


# optax


AXES = [-1, 0, (1, 2), (2, 0), None]


def compare_with_optax(name, x, target, axis, where, slopes):
    """Values, and gradients if asked for, in the same dtypes."""

    @jax.jit
    def both(x, target, where):
        results = []
        for f in getattr(fj, name), getattr(optax, name):
            value, pull = jax.vjp(lambda x, f=f: f(x, target, axis, where), x)
            results.append((value, *(pull(jnp.ones_like(value)) if slopes else ())))
        return results

    # optax computes in the dtype of the logits: sums of at most 72 terms are off by as many roundoffs
    tolerance = 72 * float(jnp.finfo(x.dtype).eps)
    for found, expected in zip(*both(x, target, where), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(
            found.astype(float), expected.astype(float), tolerance, 4 * tolerance
        )


@pytest.mark.parametrize("masked", [None, "rows", "elements"])
@pytest.mark.parametrize("i", range(len(AXES)))
def test_optax(rng, masked, i):
    axis = AXES[i]
    axes = range(3) if axis is None else {a % 3 for a in np.atleast_1d(axis)}
    x = numbers(rng, (4, 3, 6), DTYPES[(i + (masked == "rows")) % 4])
    rows = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    classes = int(np.prod([x.shape[a] for a in axes]))
    where = None if masked is None else rng.random(rows if masked == "rows" else x.shape) < 0.7
    # an optax gradient of masked elements is NaN
    given = axis, where, masked is None
    if axis is not None:
        labels = rng.integers(-classes, classes, rows)  # below 0 from the end
        compare_with_optax("softmax_cross_entropy_with_integer_labels", x, labels, *given)
        labels.flat[0] = classes  # NaN
        compare_with_optax("softmax_cross_entropy_with_integer_labels", x, labels, axis, where, False)
    if axis is not None or masked != "rows":
        target = [rng.random(x.shape).astype(x.dtype), np.float32(0.5), rng.random((3, 6)) > 0.5][i % 3]
        compare_with_optax("softmax_cross_entropy", x, target, *given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_optax_sigmoid(rng, dtype):
    x, t = numbers(rng, (4, 6), dtype), rng.random(6)
    found = fj.sigmoid_binary_cross_entropy(x, t)
    expected = optax.sigmoid_binary_cross_entropy(x, t)
    assert found.dtype == expected.dtype
    eps = float(jnp.finfo(dtype).eps)  # optax rounds both halves, their factors and the sum
    np.testing.assert_allclose(found.astype(float), expected.astype(float), 8 * eps, 8 * eps)


def test_optax_refuses():
    for f in (fj, optax):
        with pytest.raises(TypeError):
            f.softmax_cross_entropy_with_integer_labels(jnp.zeros((2, 3)), jnp.zeros(2))
        with pytest.raises(TypeError):
            f.softmax_cross_entropy(jnp.zeros((2, 3), int), jnp.zeros((2, 3)))


# errors


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            r"target has shape \(3,\); expected that of logits without axis, \(2,\)",
            {"target": np.zeros(3, int)},
        ),
        (TypeError, "target has dtype bool", {"target": np.zeros((2, 3), bool)}),
        (TypeError, "logits has dtype complex64", {"logits": np.zeros((2, 3), np.complex64)}),
        (ValueError, "axis is 2", {"axis": 2}),
        (ValueError, "reduction is 'avg'", {"reduction": "avg"}),
        (ValueError, r"label_smoothing is 2; expected a number in \[0, 1\]", {"label_smoothing": 2}),
        (ValueError, r"weight has shape \(2,\)", {"weight": np.ones(2)}),
        (ValueError, r"sample_weight has shape \(3,\)", {"sample_weight": np.ones(3)}),
        (ValueError, "ignore_index is 1", {"target": np.zeros((2, 3)), "ignore_index": 1}),
    ],
)
def test_errors_when_traced(error, match, call):
    given = {"logits": np.zeros((2, 3), np.float32), "target": np.zeros(2, int)} | call
    arrays = {k: given.pop(k) for k in list(given) if isinstance(given[k], np.ndarray)}
    with pytest.raises(error, match=match):
        jax.jit(lambda arrays: fj.cross_entropy(**arrays, **given))(arrays)


def test_options_are_not_arrays():
    with pytest.raises(TypeError, match=r"z_loss is .*; expected a number"):
        jax.jit(lambda z: fj.cross_entropy(np.zeros((2, 3)), np.zeros(2, int), z_loss=z))(1.0)


def test_labels_out_of_range():
    message = (
        r"INVALID_ARGUMENT: target has label 3 at \(1, 0\); "
        r"expected 0 <= label < 3 or ignore_index = -100"
    )
    y = np.array([[0], [3]])
    for f in fj.cross_entropy, jax.vmap(fj.cross_entropy), jax.grad(fj.cross_entropy):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(f)(np.zeros((2, 1, 3)), y))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"label 18446744073709551516 at \(0,\)"):
        jax.block_until_ready(fj.cross_entropy(np.zeros((1, 3)), np.array([2**64 - 100], np.uint64)))


def test_other_devices():
    f = jax.jit(lambda x: fj.logsumexp(x, -1))
    with pytest.raises(NotImplementedError, match=r'kernels for CPUs only.*jax.devices\("cpu"\)'):
        export.export(f, platforms=["cuda"])(np.zeros((2, 3)))


def test_other_backends():
    with fastll.use_backend("numpy"), pytest.raises(NotImplementedError, match="'numpy' does not take"):
        fj.logsumexp(np.zeros(3))
    with fastll.use_backend("cython"):
        fj.logsumexp(np.zeros(3))


@pytest.mark.parametrize("version", [(1, 0), (0, 0)])
def test_other_versions_of_the_interface(version):
    with pytest.raises(
        ImportError, match=r"fastll speaks versions 0.1 to 0.3 .*, not {}.{}".format(*version)
    ):
        Xla.handler(*version)


# threads


def test_threads(rng, monkeypatch):
    """Several at once, each of which shares its work; the result does not depend on their number."""
    x, y = numbers(rng, (64, 4096), "float32"), rng.integers(0, 4096, 64)
    f = jax.jit(jax.value_and_grad(fj.cross_entropy))
    expected = fastll.cross_entropy(x, y, return_grad=True)
    monkeypatch.setattr(threads, "SHARE_FROM", 1)
    before = fastll.get_num_threads()
    try:
        for count in 1, 4:
            fastll.set_num_threads(count)
            with ThreadPoolExecutor(4) as pool:
                for value, grad in pool.map(lambda _: f(x, y), range(40)):
                    assert_same(value, expected[0], 1)
                    assert_same(grad, expected[1])
    finally:
        monkeypatch.undo()
        fastll.set_num_threads(before)
