"""Results larger than the caches are written past them, and rows while the next ones are read.

They must be the bits that the same rows have in a small call, where nothing of this is done.
"""

import numpy as np
import pytest
from table import DTYPES, Call, assert_same_bits, label

import fastll
from fastll.backend.host import STREAM_FROM
from fastll.operations import OPERATIONS

ROWS, CLASSES = 500, 20_011
WRITING = [name for name, operation in OPERATIONS.items() if operation.writes]


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


@pytest.fixture(scope="module", params=WRITING)
def calls(request, logits):
    """An operation that writes by each of its options, on the logits where it takes any."""
    operation, rng = OPERATIONS[request.param], np.random.default_rng(1)
    made = [
        Call(request.param, np.float32, logits.shape, i, rng) for i in range(len(operation.options))
    ]
    for call in made:
        if operation.arguments[0].domain == "logits":
            call.arrays = (logits, *call.arrays[1:])
    return made


def written(calls, change, axis, out):
    """What each call writes in the shape of its first argument."""
    for call in calls:
        operation = call.operation
        arrays, keywords = call.arguments(change)
        keywords |= {} if operation.elementwise else {"axis": axis}
        outputs = {"grad_out": out, "reduction": "none"} if operation.gradient else {"out": out}
        operation.function(*arrays, **keywords, **outputs)
        yield label(call.keywords), out


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("offset", [0, 5, 0.25])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bits_are_those_of_small_calls(compiled, calls, layout, offset):
    small = np.empty((len(SAMPLE), CLASSES), np.float32)
    if layout == "columns":
        axis, shape = 0, (CLASSES, ROWS)
        change, pick = lambda a: np.ascontiguousarray(a.T), lambda a: np.ascontiguousarray(a.T[SAMPLE])
    else:
        axis, shape = 1, (ROWS, CLASSES)
        change, pick = lambda a: a, lambda a: a[SAMPLE]
    expected = written(calls, lambda a: a[SAMPLE], 1, small)
    actual = written(calls, change, axis, unaligned(shape, offset))
    for (option, one), (_, other) in zip(expected, actual, strict=True):
        assert_same_bits(pick(other), one, option)


@pytest.mark.parametrize("classes", [1000, CLASSES])
@pytest.mark.parametrize(("dtype", "offset"), [("float16", 0), ("bfloat16", 2), ("bfloat16", 3)])
def test_16_bits(compiled, rng, dtype, classes, offset):
    """As they are, 2 bytes at a time: wherever the output begins, in place too."""
    dtype = DTYPES[dtype]
    x = (3 * rng.standard_normal((STREAM_FROM // 2 // classes + 1, classes), np.float32)).astype(dtype)
    x[3, 7], x[4], x[5, 1:] = np.inf, np.nan, -np.inf
    y = rng.integers(0, classes, len(x))

    def gradient(x, out):
        fastll.cross_entropy(x, y[: len(x)], reduction="none", grad_out=out)

    for function in (fastll.softmax, fastll.log_softmax, gradient):
        expected = np.empty_like(x[:40])
        function(x[:40], out=expected)
        raw = np.empty(x.nbytes + offset, np.uint8)[offset:]
        out = raw.view(dtype).reshape(x.shape)
        function(x, out=out)
        assert_same_bits(out[:40], expected)
        own = x.copy()
        function(own, out=own)
        assert_same_bits(own, out)


def test_in_place(compiled, calls):
    operation = calls[0].operation
    (logits, *others), keywords = calls[0].arguments(lambda a: a)
    output = "grad_out" if operation.gradient else "out"
    apart, x = np.empty_like(logits), logits.copy()
    operation.function(logits, *others, **keywords, **{output: apart})
    operation.function(x, *others, **keywords, **{output: x})
    assert_same_bits(x, apart)


def test_threads(compiled, logits):
    """What one thread streamed, another one reads."""
    before = fastll.get_num_threads()
    try:
        fastll.set_num_threads(1)
        alone = fastll.softmax(logits, axis=1)
        fastll.set_num_threads(4)
        assert_same_bits(fastll.softmax(logits, axis=1), alone)
    finally:
        fastll.set_num_threads(before)
