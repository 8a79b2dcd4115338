"""A user's extension module calls fastll's kernels without the GIL: the bits of fastll's functions."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import which

import pytest

pytest.importorskip("Cython", reason="Cython is not installed")

import numpy as np
from conftest import require
from source_tree import make_tree
from table import assert_same_bits

import fastll

ROOT = Path(__file__).parents[2]
DTYPES = (np.float64, np.float32)

USER = """
# cython: language_level=3, boundscheck=False, wraparound=False
from libc.stdint cimport int64_t
cimport fastll.cython_kernels as fastll
from fastll.cython_kernels cimport real

def one_row(const real[::1] x, int64_t label, real[:, ::1] out):
    cdef real lse, loss, bare
    with nogil:
        lse = fastll.logsumexp(&x[0], x.shape[0])
        fastll.softmax(&x[0], x.shape[0], &out[0, 0])
        fastll.log_softmax(&x[0], x.shape[0], &out[1, 0])
        loss = fastll.cross_entropy(&x[0], x.shape[0], label, &out[2, 0])
        bare = fastll.cross_entropy(&x[0], x.shape[0], label, <real*> NULL)
    return lse, loss, bare

def rows(const real[:, :] x, const int64_t[:] y, double scale, real[:, :] values, real[:, :, :] out):
    cdef Py_ssize_t n = x.shape[0], classes = x.shape[1], row = x.strides[0], step = x.strides[1]
    cdef Py_ssize_t to_row = out.strides[1], to_step = out.strides[2], next = values.strides[1]
    cdef real* p = &out[1, 0, 0]
    cdef int status = 0
    with nogil:
        status |= fastll.logsumexp_rows(&x[0, 0], n, classes, row, step, &values[0, 0], next)
        status |= fastll.softmax_rows(&x[0, 0], n, classes, row, step, &out[0, 0, 0], to_row, to_step)
        status |= fastll.log_softmax_rows(&x[0, 0], n, classes, row, step, p, to_row, to_step)
        status |= fastll.cross_entropy_rows(
            &x[0, 0], n, classes, row, step, &y[0], y.strides[0], &values[1, 0], next,
            scale, &out[2, 0, 0], to_row, to_step,
        )
        status |= fastll.cross_entropy_rows(
            &x[0, 0], n, classes, row, step, &y[0], y.strides[0], &values[2, 0], next,
            1, <real*> NULL, 0, 0,
        )
    return status

def sigmoids(const real[:] x, real[:, :] out):
    cdef Py_ssize_t i
    with nogil:
        for i in range(x.shape[0]):
            out[0, i] = fastll.sigmoid(x[i])
            out[1, i] = fastll.log_sigmoid(x[i])
"""

SETUP = """
from Cython.Build import cythonize
from setuptools import setup

modules = cythonize("user.pyx", include_path=[{root!r}])
setup(ext_modules=modules, script_args=["build_ext", "--inplace"])
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """The module, compiled."""
    require("cython")
    compiler = (sysconfig.get_config_var("CC") or "cl").split()[0]
    if which(os.environ.get("CC", compiler)) is None:
        pytest.skip("there is no C compiler")
    pytest.importorskip("fastll.cython_kernels")
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.pyx").write_text(USER)
    (folder / "setup.py").write_text(SETUP.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, "setup.py"],
        cwd=folder,
        env=os.environ | {"CFLAGS": "-O0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (path for path in folder.iterdir() if path.suffix in (".so", ".pyd"))
    spec = spec_from_file_location("user", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape):
    return np.random.default_rng(20261129).normal(size=shape) * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row(user, dtype):
    special = [np.inf, 0], [-np.inf, 0], [np.nan, 1], [2e7, 2e7]
    for x in (*map(normal, (1, 3, 10, 63, 64, 3000)), *special):
        x = np.array(x, dtype)
        for label in (x.size - 1, -100):
            out = np.empty((3, x.size), dtype)
            lse, loss, bare = user.one_row(x, label, out)
            loss_and_grad = fastll.cross_entropy(x, label, reduction="none", return_grad=True)
            assert_same_bits(dtype(lse), fastll.logsumexp(x))
            assert_same_bits(tuple(out[:2]), (fastll.softmax(x), fastll.log_softmax(x)))
            assert_same_bits((dtype(loss), out[2]), loss_and_grad)
            assert_same_bits(dtype(bare), loss_and_grad[0])


def expected(x, y, scale):
    weights = np.full(len(x), scale)
    _, grad = fastll.cross_entropy(x, y, sample_weight=weights, reduction="none", return_grad=True)
    losses = fastll.cross_entropy(x, y, reduction="none")
    return (
        np.array([fastll.logsumexp(x, axis=1), losses, losses]),
        np.array([fastll.softmax(x), fastll.log_softmax(x), grad]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (10, 10), (40, 3), (12, 64), (3, 2500)])
def test_rows(user, dtype, shape):
    """In any strides, of a power of two as scale: its products are exact."""
    x = normal(*shape).astype(dtype)
    y = np.arange(shape[0]) % shape[1]
    y[1::3] = -100
    spaced = np.zeros((shape[0], 3 * shape[1]), dtype)[:, ::3]
    spaced[...] = x
    for a in (x, np.asfortranarray(x), spaced, x[::-1, ::-1][::-1, ::-1]):
        labels = np.repeat(y, 2)[::2]
        for out in (np.empty((3, *shape), dtype), np.empty((shape[1], shape[0], 3), dtype).T):
            values = np.empty((shape[0], 3), dtype).T
            assert user.rows(a, labels, 0.25, values, out) == 0
            for found, right in zip((values, out), expected(x, y, 0.25), strict=True):
                assert_same_bits(np.ascontiguousarray(found), right)


def test_labels_that_are_no_class(user):
    """NaN for the row, and nothing for others."""
    x, values, out = normal(3, 4), np.empty((3, 3)), np.empty((3, 3, 4))
    for bad in (4, -1, 2**62):
        user.rows(x, np.array([1, bad, 2]), 1, values, out)
        assert np.isnan(values[1:, 1]).all()
        assert np.isnan(out[2, 1]).any()
        assert np.isfinite(values[:, ::2]).all()
        assert np.isfinite(out[2, ::2]).all()
        lse, loss, bare = user.one_row(x[0], bad, np.empty((3, 4)))
        assert np.isnan([loss, bare]).all()
        assert lse == fastll.logsumexp(x[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoids(user, dtype):
    x = np.concatenate([[0, np.inf, -np.inf, np.nan, -745, -103, 40], normal(100) * 20]).astype(dtype)
    out = np.empty((2, x.size), dtype)
    user.sigmoids(x, out)
    assert_same_bits(tuple(out), (fastll.sigmoid(x), fastll.log_sigmoid(x)))


def test_threads(user):
    """Several at once, on rows of their own."""
    x, y = normal(64, 500, 30), np.arange(500) % 30

    def work(i):
        values, out = np.empty((3, 500)), np.empty((3, 500, 30))
        for _ in range(20):
            user.rows(x[i], y, 1, values, out)
        return values, out

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(len(x))))
    for i in range(len(x)):
        for one, right in zip(found[i], expected(x[i], y, 1.0), strict=True):
            assert_same_bits(one, right)


def test_missing_extension(tmp_path):
    """A source tree that was not compiled says so."""
    code = f"import sys; sys.path.insert(0, {str(make_tree(tmp_path))!r}); import fastll.cython_kernels"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    expected = "ImportError: this is a source tree without its compiled extension; run python -m pip"
    assert expected in done.stderr
