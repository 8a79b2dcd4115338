"""Losses made of users' formulas: what every loss has, and mistakes in a formula."""

import inspect
import math
import os
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import in_force, require
from table import DTYPES, LAYOUTS, assert_close, assert_same_bits

import fastll
from fastll import dispatch, formulas
from fastll.formulas import (
    absolute,
    elements,
    exp,
    fma,
    log,
    log1p,
    log_sigmoid,
    maximum,
    product,
    sigmoid,
    softcap,
    where_eq,
    where_ge,
    where_gt,
)
from fastll.testing import gradcheck

LOG_TWO = np.log(2)


def huber(x, target, *, delta=1.0):
    """Huber's loss."""
    d = x - target
    far = absolute(d) - delta
    outside = delta * (far + delta / 2)
    return where_gt(far, 0, outside, d * d / 2), where_gt(far, 0, sign(d) * delta, d)


def sign(d):
    return where_gt(d, 0, 1, -1)


def laplace_nll(mean, target, scale, *, floor):
    scale = maximum(floor, scale)
    d = (mean - target) / scale
    value = absolute(d)
    value += LOG_TWO + log(scale)
    return value, sign(d) / scale


def student_nll(x, target, *, nu=3, sigma=0.5):
    """Of a parameter alone: log(sigma), and a constant that Python works out."""
    d = (x - target) / sigma
    half = (nu + 1) * 0.5
    slope = 2 * half * d / (sigma * (nu + d * d))
    return half * log1p(d * d / nu) + log(sigma) - 0.25 * -math.pi, slope


def expected_huber(x, t, delta=1.0):
    d = x - t
    far = np.abs(d) > delta
    value = np.where(far, delta * (np.abs(d) - delta / 2), d * d / 2)
    return value, np.where(far, np.sign(d) * delta, d)


def expected_laplace(x, t, scale, floor):
    b = np.maximum(scale, floor)
    return np.abs(x - t) / b + np.log(2 * b), np.sign(x - t) / b


def expected_student(x, t, nu=3, sigma=0.5):
    d = (x - t) / sigma
    value = (nu + 1) / 2 * np.log1p(d * d / nu) + np.log(sigma) + np.pi / 4
    return value, (nu + 1) * d / (sigma * (nu + d * d))


#: Formula, the same in NumPy, number of operands, options, what the terms of a value add up to at most.
LOSSES = {
    "huber": (huber, expected_huber, 2, {"delta": 0.75}),
    "laplace": (laplace_nll, expected_laplace, 3, {"floor": 0.125}),
    "student": (student_nll, expected_student, 2, {"nu": 2.5}),
}


def operands(rng, count, dtype, shape=(3, 700)):
    """Real numbers, then positive ones."""
    arrays = [
        2 * rng.standard_normal(shape),
        2 * rng.standard_normal(shape),
        rng.uniform(0.05, 2, shape),
    ]
    return [a.astype(dtype) for a in arrays[:count]]


def scaled(value):
    """As the oracle has it: terms are below 8 here, where a value may be near 0."""
    return value, np.abs(value) + 8


#: Each loss in each dtype, and one of them in each layout.
PLACES = [(name, dtype, "contiguous") for name in LOSSES for dtype in DTYPES]
PLACES += [("huber", dtype, layout) for dtype in ("bfloat16", "float32") for layout in LAYOUTS]


@pytest.mark.parametrize(("name", "kind", "layout"), dict.fromkeys(PLACES))
def test_losses(backend, rng, name, kind, layout):
    formula, exact, count, options = LOSSES[name]
    dtype, loss = DTYPES[kind], fastll.elementwise_loss(formula)
    arrays = operands(rng, count, dtype)
    laid = [LAYOUTS[layout](a) for a in arrays]
    if backend == "cython":
        with pytest.raises(NotImplementedError, match=f"the cython backend was built without .*{name}"):
            loss(*laid, **options)
        return
    value, slope = exact(*(a.astype(np.longdouble) for a in arrays), **options)
    weight = rng.uniform(0.5, 2, (3, 1)).astype(np.float32)
    weighted = scaled(value * weight)
    for reduction, total, scale in (
        ("none", weighted, 1),
        ("sum", [part.sum() for part in weighted], 1),
        ("mean", [part.mean() for part in weighted], 1 / value.size),
    ):
        keywords = {**options, "weight": weight, "reduction": reduction}
        found, grad = loss(*laid, **keywords, return_grad=True)
        assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert grad.dtype == dtype
        assert_close(found, total, dtype)
        assert_close(grad, (slope * weight * scale, 8 * np.abs(slope * weight * scale)), dtype)
        assert_same_bits(loss(*laid, **keywords), found)
    plain, grad = loss(*laid, **options, reduction="none", return_grad=True)
    assert_close(plain, scaled(value), dtype)
    out = arrays[0].copy()
    loss(out, *laid[1:], **options, reduction="none", grad_out=out)
    assert_same_bits(out, grad)


@pytest.fixture(params=["numba", "numpy"])
def taken(request, monkeypatch):
    """Each backend of the CPU that takes formulas, in force during the test."""
    yield from in_force(request.param, monkeypatch)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(taken, rng, name):
    formula, _, count, options = LOSSES[name]
    x, *others = operands(rng, count, np.float64, (2, 9))
    # central differences do not see a kink nearer than two steps of 1e-4; there is none here
    gradcheck(lambda x: fastll.elementwise_loss(formula)(x, *others, **options, return_grad=True), x)


def mse(prediction, target):
    d = prediction - target
    return d * d, 2 * d


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_a_built_in_loss(rng, threads, dtype):
    """Sums, threads and conversions are the same; numbers in a formula widen nothing."""
    require("numba")
    own = fastll.elementwise_loss(mse)
    assert fastll.elementwise_loss(elements.mse).operation == "mse"
    x, t = (rng.standard_normal((5, 70_000)).astype(DTYPES[dtype]) for _ in range(2))
    with fastll.use_backend("numba"):
        for n in (1, 3):
            threads(n, share_from=1)
            for reduction in ("none", "sum", "mean"):
                options = {"reduction": reduction, "return_grad": True}
                assert_same_bits(own(x, t, **options), fastll.mse(x, t, **options))


def test_ptx_has_no_wider_numbers():
    pytest.importorskip("numba_cuda")
    from fastll.backend.cuda import compiler, maps

    whole = maps.Operand("float32", True)
    loss = fastll.elementwise_loss(student_nll)
    variant = maps.Variant(loss.operation, (whole, whole), value=whole, slope=whole, modern=True)
    code, _ = compiler.ptx(maps.kernel(variant), (8, 0), maps.THREADS)
    assert ".f64" not in code


def all_operations(x, y, z):
    capped, fall = softcap(x, 3)
    low = where_ge(x, y, y, x) + where_eq(x, y, 100, 0)
    sums = fma(x, y, z) + product(x, 1 / y) + absolute(x) + maximum(x, y) + low + capped + fall
    return sums + exp(x) + log(y) + log1p(y * y - 0.5), sigmoid(x) - log_sigmoid(-x)


def test_every_operation(taken, rng):
    names = set(all_operations.__code__.co_names) | {"where_gt"}
    assert names == {*formulas.__all__}
    x, y = rng.standard_normal((2, 500))
    y, z = np.abs(y) + 0.1, x * y
    x[:2] = y[0], 0
    value, grad = fastll.elementwise_loss(all_operations)(x, y, z, reduction="none", return_grad=True)
    low = np.where(x >= y, y, x) + np.where(x == y, 100, 0)
    expected = x * y + z + x / y + np.abs(x) + np.maximum(x, y) + low
    expected += 3 * np.tanh(x / 3) + 1 / np.cosh(x / 3) ** 2
    expected += np.exp(x) + np.log(y) + np.log1p(y * y - 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(grad, 1 / (1 + np.exp(-x)) + np.logaddexp(0, x), rtol=1e-13)


def log1p_and_exp(x):
    return log1p(x), exp(x)


def plain_log(x):
    return log(x), x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_over_all_numbers(taken, dtype):
    info = np.finfo(dtype)
    tiny = np.geomspace(np.longdouble(info.smallest_subnormal), 1, 200)
    huge = np.geomspace(1, np.longdouble(info.max), 200)
    x = np.concatenate([tiny, -tiny, huge, -np.geomspace(1, 800, 99)])
    x = np.concatenate([x, [0, np.inf, -np.inf, np.nan]]).astype(dtype)
    options = {"reduction": "none", "return_grad": True}
    by_log1p, by_exp = fastll.elementwise_loss(log1p_and_exp)(x, **options)
    by_log = fastll.elementwise_loss(plain_log)(x, **options)[0]
    # logarithms have 3 roundoffs and exp 2, besides the rounding of a subnormal result
    close = {"rtol": 2 * info.eps, "atol": float(info.smallest_subnormal)}
    with np.errstate(all="ignore"):
        wide = x.astype(np.longdouble)
        np.testing.assert_allclose(by_log1p, np.log1p(wide), **close)
        np.testing.assert_allclose(by_log, np.log(wide), **close)
        np.testing.assert_allclose(by_exp, np.exp(wide).astype(dtype), **close)


def constant(x):
    return 3, 2


def test_constants(taken):
    x = np.zeros((2, 5), np.float32)
    loss = fastll.elementwise_loss(constant)
    assert loss(x, reduction="sum") == 30
    np.testing.assert_array_equal(
        loss(x, weight=x + 2, reduction="none", return_grad=True), [x + 6, x + 4]
    )
    assert np.isnan(loss(x[:0]))
    assert loss(1.0) == 3


# What a loss is to Python


def test_signature():
    loss = fastll.elementwise_loss(laplace_nll)
    options = "weight=None, reduction='mean', return_grad=False, grad_out=None"
    text = f"(mean, target, scale, *, floor, {options})"
    assert str(inspect.signature(loss)) == text
    assert repr(loss) == f"<loss {__name__}.laplace_nll{text}>"
    assert (loss.__name__, loss.__module__, loss.formula) == ("laplace_nll", __name__, laplace_nll)
    assert fastll.elementwise_loss(huber).__doc__ == "Huber's loss."
    assert fastll.elementwise_loss(huber).operation == fastll.elementwise_loss(huber).operation
    assert fastll.elementwise_loss(student_nll).operation != loss.operation


def test_arguments():
    loss, x = fastll.elementwise_loss(laplace_nll), np.ones(3)
    expected = loss(x, x, x, floor=0.5)
    assert loss(x, scale=x, target=x, floor=0.5) == expected
    assert loss(x, 1, 1, floor=np.float32(0.5)) == expected  # they broadcast
    for arguments, options, match in (
        ((x, x), {"floor": 1}, "missing a required argument: 'scale'"),
        ((x, x, x), {}, "missing a required.* argument: 'floor'"),
        ((x, x, x, x), {"floor": 1}, "too many positional arguments"),
        ((x, x, x), {"floor": 1, "flor": 1}, "unexpected keyword argument 'flor'"),
        ((x, x, x), {"flor": 1}, "floor"),
        ((x, x, x), {"floor": "1a"}, "^floor is '1a'; expected a number"),
        ((x, x, x * 1j), {"floor": 1}, "^scale has dtype complex128"),
    ):
        with pytest.raises(TypeError, match=match):
            loss(*arguments, **options)
    for arguments, options, match in (
        ((x, x, x), {"floor": np.nan}, "^floor is nan; expected a number that is finite"),
        ((x, x, x), {"floor": 1, "reduction": "avg"}, "^reduction is 'avg'"),
        ((x, x[:2], x), {"floor": 1}, r"^target has shape \(2,\)"),
        ((x, x, x), {"floor": 1, "grad_out": np.ones(2)}, r"^grad_out has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            loss(*arguments, **options)


@fastll.elementwise_loss
def decorated(x, target):
    """By its name there is the loss itself."""
    return x * target, target


def test_pickle():
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    copy = pickle.loads(pickle.dumps(fastll.elementwise_loss(huber)))
    assert copy([3.0], [0.0], delta=2.0) == 4
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(fastll.elementwise_loss(local_formula(1)))


def local_formula(factor):
    def scaled_error(x, target):
        d = factor * (x - target)
        return d * d, 2 * factor * d

    return scaled_error


def test_numbers_of_an_enclosing_function():
    """They have the values that they had, and decide the name of the code."""
    one, two = (fastll.elementwise_loss(local_formula(n)) for n in (1.0, 2.0))
    assert one([3.0], [1.0]) == 4
    assert two([3.0], [1.0]) == 16
    assert one.operation != two.operation
    assert one.operation == fastll.elementwise_loss(local_formula(1)).operation


def test_backends(monkeypatch):
    """Numba first, then NumPy, and never Cython."""
    loss = fastll.elementwise_loss(huber)
    place = fastll.arrays.HOST
    loads, dispatch_first = dispatch._load, dispatch._first
    dispatch_first.cache_clear()
    try:
        if fastll.backends()["numba"].available:
            assert dispatch.choose(loss.operation, 10, place).name == "numba"
        dispatch_first.cache_clear()
        monkeypatch.setattr(
            dispatch, "_load", lambda name: "missing" if name == "numba" else loads(name)
        )
        assert dispatch.choose(loss.operation, 10, place).name == "numpy"
        assert loss([3.0], [0.0]) == 2.5
    finally:
        dispatch_first.cache_clear()


# The disk


MODULE = """
import fastll
{extra}
@fastll.elementwise_loss
def loss(x, target):
    d = x - target
    return {value}
"""
SCRIPT = """
from numba.core import event
passes = event.RecordingListener()
event.register("numba:run_pass", passes)
import mine
print(mine.loss([3.0], [1.0]), bool(passes.buffer))
"""


def test_the_disk_and_an_edited_formula(tmp_path):
    """The next process finds what one has compiled, wherever the formula stands; another is new."""
    require("numba")

    path = os.pathsep.join([str(Path(fastll.__file__).parents[1]), str(tmp_path)])

    def run(value, extra=""):
        (tmp_path / "mine.py").write_text(MODULE.format(value=value, extra=extra))
        done = subprocess.run(
            [sys.executable, "-B", "-c", SCRIPT],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kernels"), "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert not done.stderr
        return done.stdout.split()

    assert run("d * d, 2 * d") == ["4.0", "True"]
    assert run("d * d, 2 * d", "# a line more\n") == ["4.0", "False"]
    assert run("half * d * d, d", "half = 0.5\n") == ["2.0", "True"]
    assert run("half * d * d, d", "half = 0.25\n") == ["1.0", "True"]
    assert run("d * d, 2 * d") == ["4.0", "False"]


# Mistakes


def branch(x):
    if x:
        return x, x
    return x, x


def comparison(x):
    y = x + 1
    return (x > y) * x, x


def conditional(x):
    return x if x else -x, x


def loop(x):
    for _ in range(3):
        x = x + 1
    return x, x


def power(x):
    return x**2, 2 * x


def numpy_call(x):
    y = x * x
    return np.exp(y), y


def unknown_name(x):
    return x + epsilon, x  # noqa: F821


def unbound(x):
    y = x + z  # noqa: F821
    z = y
    return z, x


def no_number(x):
    return x + "1", x


def keyword(x):
    return where_gt(x, x, x, y=x), x


def too_few_arguments(x):
    y = x * x
    return where_gt(x, 0, y), y


def two_values_as_one(x):
    return softcap(x, 1) + x, x


def one_value_as_two(x):
    y, z = exp(x)
    return y, z


def attribute(x):
    x.y = x
    return x, x


def value_alone(x):
    return x * x


def three_values(x):
    return x, x, x


def nothing(x):
    return


def endless(x):
    y = x + x  # noqa: F841


def default_of_operand(x, y=1.0):
    return x, y


def starred(*x):
    return x, x


def no_operand(*, y=1.0):
    return y, y


def default_of_parameter(x, *, y=None):
    return x * y, x


def recursive(x):
    return recursive(x)


def calls_power(x):
    y = power(x)
    return y, y


def lambda_inside(x):
    f = lambda y: y  # noqa: E731
    return f(x), x


#: The line of the mistake, counted from the function's, and what is said.
MISTAKES = {
    branch: (1, "a branch or comparison; use where_gt"),
    comparison: (2, "a branch or comparison; use where_gt"),
    conditional: (1, "a branch or comparison; use where_gt"),
    loop: (1, "a loop"),
    power: (1, "a power; use products"),
    numpy_call: (2, "a call of np.exp, which is no operation of fastll.formulas"),
    unknown_name: (1, "the unknown name epsilon"),
    unbound: (1, "the unknown name z"),
    no_number: (1, "a constant that is no number"),
    keyword: (1, "a call of where_gt, which takes 4 arguments by position"),
    too_few_arguments: (2, "a call of where_gt, which takes 4 arguments by position"),
    two_values_as_one: (1, "2 values where there must be one"),
    one_value_as_two: (1, "2 names for 1 values"),
    attribute: (1, "an assignment to x.y, which is no name"),
    value_alone: (1, "1 values returned; expected value and slope"),
    three_values: (1, "3 values returned; expected value and slope"),
    nothing: (1, "no value returned at its end"),
    endless: (1, "no value returned at its end"),
    default_of_operand: (0, "an operand with a default"),
    starred: (0, "an operand with a default, a starred one"),
    no_operand: (0, "an operand with a default, a starred one, or none"),
    default_of_parameter: (0, "a default of y that is no number"),
    recursive: (1, "a call of recursive, which is being defined"),
    lambda_inside: (1, "something that its rules do not allow: lambda y: y"),
}


@pytest.mark.parametrize("formula", MISTAKES, ids=lambda f: f.__name__)
def test_mistakes_name_the_line(formula):
    line, what = MISTAKES[formula]
    with pytest.raises(SyntaxError, match=re.escape(f"a formula has {what}")) as caught:
        fastll.elementwise_loss(formula)
    assert caught.value.filename == __file__
    assert caught.value.lineno == formula.__code__.co_firstlineno + line
    with pytest.raises(SyntaxError):  # not known by its mistake
        fastll.elementwise_loss(formula)


def test_a_mistake_in_another_function():
    with pytest.raises(SyntaxError, match="a power") as caught:
        fastll.elementwise_loss(calls_power)
    assert caught.value.lineno == power.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    "formula",
    [lambda x: (x, x), 3, np.exp, fastll.LogSumExp.update],
    ids=["lambda", "number", "ufunc", "method"],
)
def test_what_is_no_formula(formula):
    with pytest.raises((TypeError, SyntaxError)):
        fastll.elementwise_loss(formula)


def weight(x, *, weight=1.0):
    return x * weight, weight


def test_names_that_every_loss_has():
    with pytest.raises(TypeError, match="the formula has an argument weight"):
        fastll.elementwise_loss(weight)


def test_sources(tmp_path, monkeypatch):
    """A formula is its text: that must be there, and be that of the function."""
    scope = {}
    exec("def f(x):\n    return x * x, 2 * x\n", scope)
    with pytest.raises(TypeError, match="the source of f cannot be read"):
        fastll.elementwise_loss(scope["f"])
    path = tmp_path / "edited.py"
    path.write_text("def f(x):\n    return x * x, 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    edited = import_module("edited")
    assert fastll.elementwise_loss(edited.f)([3.0]) == 9
    path.write_text("def f(x):\n    return x * x / 2, x\n# longer\n")
    with pytest.raises(SyntaxError, match="another text now than when it was imported"):
        fastll.elementwise_loss(edited.f)
