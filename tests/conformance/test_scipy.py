"""SciPy: its own tests with fastll's functions, and the same inputs through both, none less exact."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import scipy.special
from conftest import require
from peers import DTYPES, assert_not_worse

import fastll

HERE = Path(__file__).parent
AXES = [0, 1, (0, 2), None]


@pytest.mark.parametrize("name", ["cython", "numpy"])
def test_tests_of_scipy(name, tmp_path):
    """All of `scipy.special.tests.test_logsumexp` that are not of complex numbers pass."""
    if importlib.util.find_spec("scipy.special.tests") is None:
        pytest.skip("SciPy is installed without its tests")
    require(name)
    command = [sys.executable, "-m", "pytest", "--pyargs", "scipy.special.tests.test_logsumexp"]
    command += ["-p", "as_scipy", "-p", "no:cacheprovider", "-q", "-c", os.devnull]
    paths = os.pathsep.join(map(str, (HERE, HERE.parents[1])))
    done = subprocess.run(
        command,
        env=os.environ | {"FASTLL_BACKEND": name, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 59


@pytest.fixture(params=DTYPES)
def x(request, rng):
    return (5 * rng.standard_normal((6, 40, 3))).astype(DTYPES[request.param])


def moved(x, axes):
    """The axes as the last one."""
    axes = tuple(range(x.ndim)) if axes is None else (axes,) if isinstance(axes, int) else axes
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def scipys(name, x, *arguments):
    """SciPy's result; halves of bfloat16 by float32, as SciPy has none."""
    x = x.astype(np.float32) if x.dtype == DTYPES["bfloat16"] else x
    return getattr(scipy.special, name)(x, *arguments)


@pytest.mark.parametrize("axis", AXES)
def test_logsumexp(x, axis):
    exact = oracle.logsumexp(moved(x, axis), -1).value[0]
    assert_not_worse(fastll.logsumexp(x, axis=axis), scipys("logsumexp", x, axis), exact)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("axis", AXES)
def test_softmax(x, name, axis):
    exact = getattr(oracle, name)(moved(x, axis), -1).value[0]
    ours, peer = getattr(fastll, name)(x, axis=axis), scipys(name, x, axis)
    assert_not_worse(moved(ours, axis), moved(peer, axis), exact)


@pytest.mark.parametrize(("name", "theirs"), [("sigmoid", "expit"), ("log_sigmoid", "log_expit")])
def test_sigmoid(x, name, theirs):
    exact = getattr(oracle, name)(x).value[0]
    assert_not_worse(getattr(fastll, name)(x), scipys(theirs, x), exact)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_terms(rng, dtype):
    """SciPy's terms, added up by NumPy."""
    p, q = rng.dirichlet(np.ones(50), (2, 30)).astype(dtype)
    p[:, 3] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = oracle.kl_divergence(p, q, -1)
    for ours, terms, exact in (
        (fastll.entropy(p), scipy.special.entr(p), oracle.entropy(p, -1)),
        (fastll.kl_divergence(p, q), scipy.special.rel_entr(p, q), divergence),
    ):
        assert_not_worse(ours, terms.sum(axis=-1), exact.value[0])


@pytest.mark.parametrize("b", [[np.inf, 1, 1], [np.nan, 2, 1], [0, np.nan, 1], [-np.inf, 1, 2]])
@pytest.mark.parametrize("a", [[1.0, 1, 2], [-np.inf, -np.inf, -np.inf], [-np.inf, 0, 1]])
def test_special_weights(a, b):
    with np.errstate(all="ignore"):
        expected = scipy.special.logsumexp(a, b=b)
    np.testing.assert_array_equal(fastll.logsumexp(a, b=b), expected)


# deliberate differences


def test_default_axis(x):
    """Contract: "the last axis by default, as in torch and JAX (SciPy takes all)"."""
    assert fastll.softmax(x).shape == x.shape
    np.testing.assert_allclose(fastll.softmax(x.astype(np.float64)).sum(axis=-1), 1, rtol=1e-14)
    np.testing.assert_allclose(scipys("softmax", x.astype(np.float64)).sum(), 1, rtol=1e-14)


def test_values_of_halves_are_float32():
    """Contract: "values are float64 for float64 input and float32 for every other"."""
    x = np.zeros(3, np.float16)
    assert fastll.logsumexp(x).dtype == np.float32
    assert scipys("logsumexp", x).dtype == np.float16


def test_an_infinite_maximum_has_no_logarithm_of_probabilities():
    """Contract: a row of +inf has no softmax; SciPy's log_softmax is -inf beside it."""
    assert np.isnan(fastll.log_softmax([1.0, np.inf])[1])
