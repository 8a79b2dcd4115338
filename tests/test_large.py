"""Beyond 2**31 elements, by views that take no memory; and how much memory a call takes."""

import numpy as np
import pytest

import fastll

ROWS, CLASSES = 66_000, 33_000  # 2.18e9 elements


def test_index_arithmetic_is_64_bit(compiled):
    """All rows are one row; the labels and results are those of each."""
    assert ROWS * CLASSES > 2**31
    row = np.zeros(CLASSES, np.float32)
    row[-1] = 5
    x = np.broadcast_to(row, (ROWS, CLASSES))
    expected = np.log(CLASSES - 1 + np.exp(5.0))
    lse = fastll.logsumexp(x, axis=1)
    np.testing.assert_allclose(lse, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets_beyond_2_to_the_31(compiled, layout):
    """The ends of a view whose strides reach 9 GB further are the right elements."""
    try:
        memory = np.zeros((3 * 2**30 + 64,), np.uint8)  # pages that are never touched
    except MemoryError:
        pytest.skip("no address space")
    far = memory[: 3 * 2**30].view(np.float32).reshape(3, -1)
    far[0, :40] = 1
    far[1, :40] = 2
    far[2, :40] = 3
    x = far[:, :40] if layout == "rows" else far[:, :40].T
    axis = 1 if layout == "rows" else 0
    np.testing.assert_allclose(
        fastll.logsumexp(x, axis=axis), np.array([1, 2, 3]) + np.log(40), rtol=1e-6
    )


def test_extra_memory_is_of_the_order_of_rows(compiled):
    tracemalloc = pytest.importorskip("tracemalloc")
    x = np.zeros((400, 50_000), np.float16)
    y = np.zeros(400, np.int64)
    grad = np.empty_like(x)

    def calls():
        fastll.logsumexp(x, axis=1)
        fastll.logsumexp(x.T, axis=0)
        fastll.logsumexp(x, axis=(0, 1))
        fastll.softmax(x, out=grad)
        fastll.cross_entropy(x, y, return_grad=True, grad_out=grad, label_smoothing=0.1, softcap=9.0)
        fastll.binary_cross_entropy_with_logits(x, x.view(np.int16), return_grad=True, grad_out=grad)

    calls()  # compile first
    tracemalloc.start()
    calls()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 20
