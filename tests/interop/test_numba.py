"""fastll in code that Numba compiles: the bits of its functions, in any layout; errors; cached code."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

import numpy as np  # noqa: E402
from conftest import require  # noqa: E402
from numba.core.errors import TypingError  # noqa: E402
from source_tree import make_tree  # noqa: E402
from table import LAYOUTS, assert_same_bits  # noqa: E402

import fastll  # noqa: E402
import fastll.interop.numba  # noqa: E402  # a source tree that is not installed has no entry point

ROOT = Path(__file__).parents[2]
DTYPES = (np.float64, np.float32)

#: One, those of one register and of more, one lane and more, one block and more.
SIZES = (1, 2, 7, 8, 10, 33, 63, 64, 100, 2048, 5000)

#: Rows of special values, which kernels do that have room for them.
SPECIAL = (
    [np.inf, 0, 1],
    [-np.inf, 0, 1],
    [-np.inf, -np.inf, -np.inf],
    [np.inf, np.inf, -np.inf],
    [np.nan, 0, np.inf],
    [3e6, 3e6 - 1, 0],
    [-3e6, -3e6 - 1, -4e6],
    [0, -40, -60],
    [1e-40, -1e-40, 700],
)


@pytest.fixture(autouse=True)
def _cython():
    require("cython")


@numba.njit
def logsumexp(a):
    return fastll.logsumexp(a)


@numba.njit
def logsumexp_of_rows(a, axis):
    return fastll.logsumexp(a, axis=axis)


@numba.njit
def logsumexp_kept(a, axis):
    return fastll.logsumexp(a, axis, keepdims=True)


@numba.njit
def softmax(x, axis):
    return fastll.softmax(x, axis=axis)


@numba.njit
def log_softmax(x, axis):
    return fastll.log_softmax(x, axis=axis)


@numba.njit
def gradient(logits, target, axis, ignore_index):
    return fastll.cross_entropy(
        logits, target, axis=axis, ignore_index=ignore_index, reduction="none", return_grad=True
    )


@numba.njit
def mean_gradient(logits, target):
    return fastll.cross_entropy(logits, target, return_grad=True)


@numba.njit
def losses(logits, target):
    return (
        fastll.cross_entropy(logits, target),
        fastll.cross_entropy(logits, target, reduction="sum"),
        fastll.cross_entropy(logits, target, reduction="none"),
    )


@numba.njit
def sigmoids(x):
    return fastll.sigmoid(x), fastll.log_sigmoid(x)


def normal(*shape):
    return np.random.default_rng(20261129).normal(size=shape) * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row(dtype):
    for row in (*map(normal, SIZES), *SPECIAL):
        x = np.array(row, dtype)
        found, label = logsumexp(x), x.size // 2
        assert_same_bits(dtype(found), fastll.logsumexp(x))
        assert_same_bits(softmax(x, 0), fastll.softmax(x))
        assert_same_bits(log_softmax(x, -1), fastll.log_softmax(x))
        loss, grad = gradient(x, label, -1, -100)
        expected = fastll.cross_entropy(x, label, reduction="none", return_grad=True)
        assert_same_bits((dtype(loss), grad), expected)


#: Few rows and more, short and long; float64 in three dimensions too.
SHAPES = [(3, 10), (10, 10), (17, 5), (40, 63), (2, 64), (3, 2100), (4, 1)]
TABLE = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
TABLE += [(shape, np.float64) for shape in ((2, 3, 5), (2, 70, 3))]


@pytest.mark.parametrize(("shape", "dtype"), TABLE)
def test_rows(shape, dtype):
    x = normal(*shape).astype(dtype)
    for axis in range(-1, x.ndim - 1):
        classes, rows = x.shape[axis], x.sum(axis).shape
        y = np.random.default_rng(1).integers(0, classes, rows)
        y.flat[-1] = 0 if y.size == 1 else -100
        assert_same_bits(logsumexp_of_rows(x, axis), fastll.logsumexp(x, axis=axis))
        assert_same_bits(logsumexp_kept(x, axis), fastll.logsumexp(x, axis=axis, keepdims=True))
        assert_same_bits(softmax(x, axis), fastll.softmax(x, axis=axis))
        assert_same_bits(log_softmax(x, axis), fastll.log_softmax(x, axis=axis))
        expected = fastll.cross_entropy(x, y, axis=axis, reduction="none", return_grad=True)
        assert_same_bits(gradient(x, y, axis, -100), expected)
    assert_same_bits(dtype(logsumexp(x)), fastll.logsumexp(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_special_values(dtype):
    """Beside others, a few and many, along both axes."""
    for rows in (len(SPECIAL), 40):
        x = normal(rows, 3).astype(dtype)
        x[: len(SPECIAL)] = SPECIAL
        y = np.arange(rows) % 3
        for a, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
            assert_same_bits(logsumexp_of_rows(a, axis), fastll.logsumexp(a, axis=axis))
            assert_same_bits(softmax(a, axis), fastll.softmax(a, axis=axis))
            expected = fastll.cross_entropy(a, y, axis=axis, reduction="none", return_grad=True)
            assert_same_bits(gradient(a, y, axis, -100), expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "byte-swapped"])
def test_layouts(layout):
    for shape in ((9, 20), (3, 100)):
        x = LAYOUTS[layout](normal(*shape))
        y = LAYOUTS["strided"](np.arange(shape[0], dtype=np.uint16))
        for axis in (0, 1):
            assert_same_bits(logsumexp_of_rows(x, axis), fastll.logsumexp(x, axis=axis))
        if layout in ("fortran", "strided"):
            expected = fastll.cross_entropy(x, y, reduction="none", return_grad=True)
            assert_same_bits(gradient(x, y, -1, -100), expected)
        assert logsumexp(x[:, 2]) == fastll.logsumexp(x[:, 2])


def test_layouts_of_more_dimensions():
    x = LAYOUTS["strided"](normal(4, 5, 6))
    for axis in range(3):
        assert_same_bits(log_softmax(x, axis), fastll.log_softmax(x, axis=axis))


def test_four_dimensions_and_nothing():
    x = normal(2, 3, 4, 5).transpose(3, 0, 2, 1)
    for axis in range(4):
        assert_same_bits(softmax(x, axis), fastll.softmax(x, axis=axis))
    assert_same_bits(logsumexp_of_rows(np.zeros((0, 3)), 1), np.zeros(0))
    assert_same_bits(logsumexp_of_rows(np.zeros((3, 0)), 1), np.full(3, -np.inf))
    assert logsumexp(np.zeros(0)) == -np.inf

    @numba.njit
    def of_all(x):
        return fastll.softmax(x, None), fastll.logsumexp(x, None, keepdims=True)

    y = np.ascontiguousarray(x)
    assert_same_bits(of_all(y), (fastll.softmax(y, axis=None), fastll.logsumexp(y, keepdims=True)))


def test_integers_are_taken_as_float64():
    x = np.arange(12).reshape(3, 4)
    assert_same_bits(softmax(x, 0), fastll.softmax(x, axis=0))
    assert_same_bits(softmax(x > 5, 1), fastll.softmax(x > 5, axis=1))
    assert logsumexp(x[0]) == fastll.logsumexp(x[0])
    assert_same_bits(sigmoids(x), (fastll.sigmoid(x), fastll.log_sigmoid(x)))


def test_reductions():
    """Values of rows have the same bits.

    Added in any order, n of them, which are positive, are within n roundoffs of float64 of their sum.
    In float32 that makes neighbours at most.
    """
    x, y = normal(500, 10), np.arange(500) % 10
    y[::7] = -100
    mean, total, rows = losses(x, y)
    close = {"rtol": 2 * 500 * 2.0**-53, "atol": 0}
    assert_same_bits(rows, fastll.cross_entropy(x, y, reduction="none"))
    np.testing.assert_allclose(mean, fastll.cross_entropy(x, y), **close)
    np.testing.assert_allclose(total, fastll.cross_entropy(x, y, reduction="sum"), **close)
    for dtype, rtol in ((np.float64, close["rtol"]), (np.float32, 2.0**-23)):
        found = mean_gradient(x.astype(dtype), y)
        mean, grad = fastll.cross_entropy(x.astype(dtype), y, return_grad=True)
        np.testing.assert_allclose(found[0], mean, rtol=rtol, atol=0)
        assert_same_bits(found[1], grad)


def test_ignored_labels():
    x, y = normal(2, 3), np.array([-100, -100])
    mean, total, rows = losses(x, y)
    assert np.isnan(mean)
    assert total == 0
    assert_same_bits(rows, np.zeros(2))
    assert_same_bits(mean_gradient(x, y)[1], np.zeros((2, 3)))
    assert np.isnan(losses(x[0], -100)[0])
    assert losses(x[0], -100)[1:] == (0, 0)
    # another one, which is a class too
    expected = fastll.cross_entropy(x, [0, 1], ignore_index=1, reduction="none", return_grad=True)
    assert_same_bits(gradient(x, np.array([0, 1]), 1, 1), expected)
    assert gradient(x[0], 1, 0, 1)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoids(dtype):
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -103.0, -745.0, 40.0, 1e-30]
    x = np.concatenate([special, normal(300) * 20]).astype(dtype)
    expected = fastll.sigmoid(x), fastll.log_sigmoid(x)
    assert_same_bits(sigmoids(x), expected)
    assert_same_bits(sigmoids(LAYOUTS["strided"](x)), expected)
    for i in range(20):
        found = sigmoids(x[i])
        assert_same_bits(tuple(map(dtype, found)), tuple(part[i] for part in expected))
    assert sigmoids(1) == (fastll.sigmoid(1), fastll.log_sigmoid(1))


def test_out():
    @numba.njit
    def into(x, out):
        return fastll.softmax(x, out=out), fastll.log_softmax(x, 0, out)[0], fastll.sigmoid(x, out)

    x, out = normal(4, 5), np.empty((4, 5))
    found = into(x, out)
    assert_same_bits(out, fastll.sigmoid(x))
    assert found[0].ctypes.data == out.ctypes.data

    @numba.njit
    def in_place(x):
        fastll.softmax(x, 1, x)

    expected = fastll.softmax(x)
    in_place(x)
    assert_same_bits(x, expected)
    with pytest.raises(ValueError, match="out has another shape than x"):
        into(x, out[:3])


@numba.njit(parallel=True, nogil=True)
def in_parallel(x, y):
    values, rows = np.empty(len(x)), np.empty_like(x)
    for i in numba.prange(len(x)):
        values[i] = fastll.cross_entropy(x[i], y[i]) + fastll.logsumexp(x[i]) + fastll.sigmoid(x[i, 0])
        rows[i] = fastll.softmax(x[i])
    return values, rows


def test_prange():
    x, y = normal(300, 70), np.arange(300) % 70
    values, rows = in_parallel(x, y)
    alone = np.array([in_parallel(x[i : i + 1], y[i : i + 1])[0][0] for i in range(20)])
    assert_same_bits(values[:20], alone)
    assert_same_bits(rows, fastll.softmax(x))


ROW, ROWS, STRIDED = np.ones(3), np.ones((2, 3)), np.ones(6)[::2]


@pytest.mark.parametrize(
    ("call", "x", "message"),
    [
        (lambda x: fastll.logsumexp(x), 1.0, r"logsumexp: a is float64; expected an array"),
        (
            lambda x: fastll.logsumexp(x),
            ROW + 1j,
            r"logsumexp: a is .*complex128.*; expected float32 or",
        ),
        (lambda x: fastll.logsumexp(x, b=x), ROW, r"logsumexp: b is not supported in Numba code"),
        (
            lambda x: fastll.logsumexp(x, return_sign=True),
            ROW,
            r"logsumexp: return_sign is not supported",
        ),
        (
            lambda x: fastll.logsumexp(x, 0, None, x[0] > 1),
            ROW,
            r"keepdims is of type bool; expected a const",
        ),
        (
            lambda x: fastll.softmax(x),
            ROW.astype(np.float16),
            r"softmax: x is .*float16.*; expected float32",
        ),
        (
            lambda x: fastll.softmax(x, (0, 1)),
            ROWS,
            r"softmax: axis is .*; expected an integer or None",
        ),
        (
            lambda x: fastll.softmax(x, 1.0),
            ROWS,
            r"softmax: axis is float64; expected an integer or None",
        ),
        (
            lambda x: fastll.softmax(x, out=x),
            STRIDED,
            r"softmax: out is .*; expected a C-contiguous, writ",
        ),
        (lambda x: fastll.sigmoid(x), 1j, r"sigmoid: x is complex128; expected float32 or float64"),
        (
            lambda x: fastll.cross_entropy(x, x),
            ROWS,
            r"target is .*; expected an array of integers with 1 d",
        ),
        (
            lambda x: fastll.cross_entropy(x, 1),
            ROWS,
            r"target is .*; expected an array of integers with 1 d",
        ),
        (
            lambda x: fastll.cross_entropy(x, x),
            ROW,
            r"cross_entropy: target is .*; expected an integer",
        ),
        (lambda x: fastll.cross_entropy(x, 1, weight=x), ROW, r"weight is not supported in Numba code"),
        (
            lambda x: fastll.cross_entropy(x, 1, label_smoothing=0.1),
            ROW,
            r"label_smoothing is not support",
        ),
        (
            lambda x: fastll.cross_entropy(x, 1, reduction="max"),
            ROW,
            r"'max'; expected a constant, 'mean' or",
        ),
    ],
)
def test_what_is_not_supported(call, x, message):
    with pytest.raises(TypingError, match=message):
        numba.njit(call)(x)


def test_errors():
    x, y = normal(4, 5), np.zeros(4, int)
    for axis in (2, -3):
        with pytest.raises(ValueError, match="axis is out of bounds"):
            softmax(x, axis)
        with pytest.raises(ValueError, match="axis is out of bounds"):
            logsumexp_of_rows(x, axis)
    with pytest.raises(ValueError, match="axis is out of bounds"):
        softmax(x[0], 1)
    with pytest.raises(ValueError, match="target has another shape"):
        losses(x, y[:3])
    for bad in (5, -1, -101):
        y[2] = bad
        with pytest.raises(IndexError, match=r"neither in \[0, classes\) nor ignore_index"):
            losses(x, y)
        with pytest.raises(IndexError, match=r"neither in \[0, classes\) nor ignore_index"):
            losses(x[0], bad)


CACHED = """
import sys
import numba, numpy as np
import fastll

@numba.njit(cache=True, parallel=True)
def rows(x):
    values = np.empty(len(x))
    for i in numba.prange(len(x)):
        values[i] = fastll.logsumexp(x[i])
    return values

if sys.argv[1] == "changed":
    import fastll.interop.numba as adapter
    adapter.ABI += 1
x = np.arange(12.0).reshape(3, 4)
assert (rows(x) == fastll.logsumexp(x, axis=1)).all()
print(sum(rows.stats.cache_hits.values()))
"""


def python(path, *arguments, **env):
    """What a new process prints, or its error."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(path.parent)} | env
    command = [sys.executable, "-W", "error", str(path), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def is_installed():
    """Whether Numba finds the entry point in a new process."""
    found = entry_points(group="numba_extensions")
    return any(entry.value == "_fastll_numba:init" for entry in found)


def test_cached_code(tmp_path):
    """It is found again by other processes; and refused by another version of what it calls."""
    path = tmp_path / "code.py"
    path.write_text(("" if is_installed() else "import fastll.interop.numba") + CACHED)
    assert python(path, "") == "0"
    assert python(path, "") == "1"
    assert "with another version of fastll: delete its cache" in python(path, "changed")


IMPORTED = """
import sys
import numba
import numpy as np

assert numba.njit(lambda x: x + 1)(1) == 2
assert "fastll" not in sys.modules
import fastll
assert "fastll.interop.numba" in sys.modules
assert numba.njit(lambda x: fastll.logsumexp(x))(np.zeros(1)) == 0
print("right")
"""


def test_nothing_is_imported_for_others(tmp_path):
    """Who compiles without fastll does not wait for its import; afterwards it is known all the same."""
    if not is_installed():
        pytest.skip("fastll is not installed, and has no entry point")
    path = tmp_path / "code.py"
    path.write_text(IMPORTED)
    assert python(path) == "right"


def test_missing_extension(tmp_path):
    tree, path = make_tree(tmp_path), tmp_path / "code.py"
    path.write_text(
        "import fastll.interop.numba, numba, numpy\n"
        "numba.njit(lambda x: fastll.logsumexp(x))(numpy.ones(1))"
    )
    expected = "fastll in Numba code needs its compiled extension: this is a source tree without"
    assert expected in python(path, PYTHONPATH=str(tree))
