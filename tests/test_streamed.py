"""Results larger than the caches are written past them, and rows while the next ones are read.

They must be the bits that the same rows have in a small call, where nothing of this is done.
"""

import numpy as np
import pytest

import fastll
from fastll.contract import STREAM_FROM

ROWS, CLASSES = 500, 20_011


def unaligned(shape, offset):
    """Memory whose first element is `offset` elements after a line of the cache."""
    size = 4 * np.prod(shape)
    raw = np.empty(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + int(4 * offset)
    return raw[start : start + size].view(np.float32).reshape(shape)


@pytest.fixture(scope="module")
def logits():
    """Rows of every kind: ordinary, rising, falling, masked, empty, constant, infinite, enormous."""
    x = np.random.default_rng(0).standard_normal((ROWS, CLASSES), np.float32)
    x *= np.linspace(0.1, 20, ROWS, dtype=np.float32)[:, None]
    x[3] = np.linspace(-3000, 3000, CLASSES)
    x[4] = x[3, ::-1]
    x[5, :9000] = -np.inf
    x[6] = -np.inf
    x[7] = 2.5
    x[8, 12_345] = np.inf
    x[9] += np.float32(2.0**22)
    x[10, 100] = np.nan
    x[11] = 200 * (np.arange(CLASSES) // 2048)
    assert x.nbytes >= STREAM_FROM
    return x


#: Rows that are compared with calls of their own.
SAMPLE = [*range(16), 100, ROWS - 2, ROWS - 1]


def results(x, y, axis, out):
    """Each result in the shape of x."""
    yield "softmax", fastll.softmax(x, axis=axis, out=out)
    yield "log_softmax", fastll.log_softmax(x, axis=axis, out=out)
    fastll.cross_entropy(x, y, axis=axis, reduction="none", grad_out=out)
    yield "gradient", out
    fastll.cross_entropy(x, y, axis=axis, reduction="none", label_smoothing=0.1, grad_out=out)
    yield "smoothed", out


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("offset", [0, 5, 0.25])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bits_are_those_of_small_calls(compiled, logits, layout, offset):
    y = np.random.default_rng(1).integers(0, CLASSES, ROWS)
    y[13] = -100
    x, axis, pick = logits, 1, lambda a: a[SAMPLE]
    if layout == "columns":
        x, axis, pick = np.ascontiguousarray(logits.T), 0, lambda a: np.ascontiguousarray(a.T[SAMPLE])
    small = results(logits[SAMPLE], y[SAMPLE], 1, np.empty((len(SAMPLE), CLASSES), np.float32))
    large = results(x, y, axis, unaligned(x.shape, offset))
    for (name, expected), (_, actual) in zip(small, large, strict=True):
        np.testing.assert_array_equal(pick(actual), expected, err_msg=name)


def test_in_place(compiled, logits):
    y = np.random.default_rng(1).integers(0, CLASSES, ROWS)
    apart = np.empty_like(logits)
    fastll.cross_entropy(logits, y, grad_out=apart)
    x = logits.copy()
    fastll.cross_entropy(x, y, grad_out=x)
    np.testing.assert_array_equal(x, apart)
    x = logits.copy()
    fastll.softmax(x, axis=1, out=x)
    np.testing.assert_array_equal(x, fastll.softmax(logits, axis=1))


@pytest.mark.parametrize("offset", [0, 3, 0.25])
def test_sigmoid(compiled, logits, offset):
    out = unaligned(logits.shape, offset)
    for operation in (fastll.sigmoid, fastll.log_sigmoid):
        operation(logits, out=out)
        np.testing.assert_array_equal(out[SAMPLE], operation(logits[SAMPLE]))


def test_threads(compiled, logits):
    """What one thread streamed, another one reads."""
    before = fastll.get_num_threads()
    try:
        fastll.set_num_threads(1)
        alone = fastll.softmax(logits, axis=1)
        fastll.set_num_threads(4)
        np.testing.assert_array_equal(fastll.softmax(logits, axis=1), alone)
    finally:
        fastll.set_num_threads(before)
