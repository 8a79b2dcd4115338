"""Arguments that are nearly right: the error says what is wrong and what would be right."""

import inspect
import sys
import types
import warnings

import numpy as np
import pytest

import fastll
from fastll import LogSumExp
from fastll.testing import gradcheck

X = np.arange(12.0).reshape(3, 4)


def test_labels_as_floats():
    """As pandas gives a column of labels with a missing one."""
    labels = np.array([0.0, np.nan, 2.0])
    for function in (fastll.cross_entropy, fastll.dense_cross_entropy):
        with pytest.raises(TypeError, match=r"target has dtype float64 .*labels must be integers"):
            function(X, labels)
    with pytest.raises(TypeError, match=r"target has dtype float64; expected integers \(labels\)"):
        fastll.sparse_cross_entropy(X, labels)


def test_axis_of_classes_is_hinted():
    logits, labels = np.zeros((2, 5, 3, 4)), np.zeros((2, 3, 4), int)
    with pytest.raises(
        ValueError, match=r"target has shape \(2, 3, 4\); .*\(2, 5, 3\); axis=1 would fit"
    ):
        fastll.cross_entropy(logits, labels)
    assert np.isfinite(fastll.cross_entropy(logits, labels, axis=1))
    with pytest.raises(ValueError, match=r"\(3, 3\)$"):  # more than one would
        fastll.cross_entropy(np.zeros((3, 3, 5)), np.zeros((3, 5), int))


MASKED = np.ma.array(X, mask=X == 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastll.logsumexp(MASKED),
        lambda: fastll.logsumexp(X, b=MASKED),
        lambda: fastll.sigmoid(MASKED),
        lambda: fastll.cross_entropy(MASKED, [0, 1, 2]),
        lambda: fastll.cross_entropy(X, np.ma.array([0, 1, 2], mask=[0, 0, 1])),
        lambda: fastll.softmax(X, out=MASKED.copy()),
    ],
)
def test_masks_are_not_ignored(call):
    with pytest.raises(TypeError, match="is a masked array with masked elements"):
        call()


def test_masked_arrays_without_masked_elements():
    np.testing.assert_array_equal(fastll.softmax(np.ma.array(X)), fastll.softmax(X))


def test_masked_arrays_that_another_thread_is_importing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy.ma", types.ModuleType("numpy.ma"))
    assert fastll.logsumexp([0.0]) == 0.0


@pytest.mark.parametrize("axis", [True, np.True_, (True,), (0, False)], ids=repr)
def test_axis_is_no_bool(axis):
    for function in (fastll.logsumexp, fastll.softmax):
        with pytest.raises(TypeError, match="axis is"):
            function(X, axis=axis)
    with pytest.raises(TypeError, match="axis is"):
        fastll.cross_entropy(X, [0, 1, 2], axis=axis)


@pytest.mark.parametrize("axis", [10**30, -(10**30), 2, (0, 10**30)], ids=repr)
def test_axis_out_of_bounds(axis):
    with pytest.raises(ValueError, match=f"axis is .*{axis if isinstance(axis, int) else 10**30}"):
        fastll.logsumexp(X, axis=axis)


@pytest.mark.parametrize("ignore_index", [-100, -1, (1 << 63) - 1])
def test_labels_beyond_int64(compiled, ignore_index):
    labels = np.array([0, 2**64 - 1, 1], np.uint64)
    with pytest.raises(IndexError, match=r"label 18446744073709551615 at \(1,\)"):
        fastll.cross_entropy(X, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, ">i8", "<i8"])
def test_gradient_over_the_labels(dtype):
    """Nothing may be written over labels that are still to be read, whatever their format."""
    memory = np.zeros(12 * 8, np.uint8)
    grad = memory.view(np.float64).reshape(3, 4)
    labels = memory.view(dtype)[:3]
    before = memory.copy()
    with pytest.raises(ValueError, match="grad_out shares memory with an input"):
        fastll.cross_entropy(X, labels, grad_out=grad)
    np.testing.assert_array_equal(memory, before)


def test_dtypes_that_are_none():
    if hasattr(np.dtypes, "StringDType"):
        with pytest.raises(TypeError, match=r"x has dtype StringDType\(\); fastll takes float16"):
            fastll.softmax(np.array(["a"], dtype=np.dtypes.StringDType()))
    for dtype in ("no dtype", int, object):
        with pytest.raises(TypeError, match=r"dtype is .*; expected a floating dtype of NumPy"):
            LogSumExp(dtype=dtype)


def test_shape_of_an_accumulator():
    assert LogSumExp(np.int64(3)).shape == LogSumExp(3).shape == LogSumExp([3]).shape == (3,)


def test_torch_dtype_of_an_accumulator():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"dtype is torch.float32; expected a floating dtype of NumPy"):
        LogSumExp(dtype=torch.float32)


def test_gradcheck_of_a_tensor():
    torch = pytest.importorskip("torch")
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    with warnings.catch_warnings(action="error"):
        assert gradcheck(lambda x: fastll.cross_entropy(torch.tensor(x), [2], return_grad=True), x)


def test_signatures_show_their_options():
    options = set(inspect.signature(fastll.cross_entropy).parameters)
    assert set(inspect.signature(fastll.sparse_cross_entropy).parameters) == options
    dense = set(inspect.signature(fastll.dense_cross_entropy).parameters)
    assert dense == options - {"ignore_index"}
    assert not hasattr(fastll, "__getattr__")
    assert fastll.testing.gradcheck is gradcheck
