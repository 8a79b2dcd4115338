"""The axes of the test table (dtypes, layouts, shapes), its cases, and what a result may be off by."""

from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracle
import pytest

from fastll.operations import OPERATIONS, Argument

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

#: Unit roundoffs that a result may be off by, times its scale: exp and its argument 1, products and
#: quotients 2, a lane of 64 sums about 1 more by the square root of its length, rounding to the dtype.
ROUNDOFFS = 6


def _strided(x):
    big = np.zeros([2 * n + 1 for n in x.shape], x.dtype)
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def _unaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    view = raw.view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def _swapped(x):
    if not x.dtype.isbuiltin:  # bfloat16 has no other byte order
        return x.copy()
    return x.astype(x.dtype.newbyteorder())


#: Ways to lay the same values out in memory.
LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[(slice(None, None, -1),) * x.ndim].copy()[
        (slice(None, None, -1),) * x.ndim
    ],
    "strided": _strided,
    "unaligned": _unaligned,
    "read-only": _read_only,
    "byte-swapped": _swapped,
}

#: (shape, axis): rows, columns, both between, short rows, one class, one row, several blocks.
SHAPES = [
    ((7, 301), 1),
    ((301, 7), 0),
    ((3, 65, 5), 1),
    ((4, 3, 2, 6), 2),
    ((150, 10), 1),
    ((5, 1), 1),
    ((2500,), 0),
    ((2, 4200), 1),
    ((2100, 3), 0),
]

#: A factor of the logits, so that their exponentials differ.
SPREAD = 5


class Case(NamedTuple):
    """Arrays and keywords of a call (its options, `axis`), and what the oracle says of it."""

    arrays: tuple[Any, ...]
    keywords: dict[str, Any]
    expected: oracle.Expected


def inputs(name, dtype, shape, axis, options, rng=None, spread=SPREAD):
    """Arrays and keywords of a call of an operation; some of the labels are the ignored one."""
    operation = OPERATIONS[name]
    rng = np.random.default_rng(20261120) if rng is None else rng
    arrays = operation.make(rng, shape, axis, dtype)
    for argument, array in zip(operation.arguments, arrays, strict=True):
        if argument.domain == "logits":
            array[...] = array * array.dtype.type(spread)
        if argument.domain == "labels" and array.size > 1:
            array[rng.random(array.shape) < 0.2] = -100
            array.flat[0] = -100
    return arrays, operation.keywords(rng, shape, axis, dtype, options)


def case(name, dtype, shape, axis, option):
    """The case of one option (by its place in the table), made once for all backends."""
    arrays, keywords, expected = _case(name, dtype, shape, axis, option, oracle.SUBTRACTED)
    return Case(tuple(a.copy() for a in arrays), dict(keywords), expected)


@lru_cache(maxsize=256)
def _case(name, dtype, shape, axis, option, subtracted):
    arrays, keywords = inputs(name, dtype, shape, axis, OPERATIONS[name].options[option])
    with np.errstate(all="ignore"):
        return Case(arrays, keywords, getattr(oracle, name)(*arrays, **keywords))


class Call:
    """Arrays and keywords of an operation on rows, and what of them belongs to some of the rows."""

    def __init__(self, name, dtype, shape, option, rng=None):
        self.operation = OPERATIONS[name]
        options = self.operation.options[option]
        self.arrays, self.keywords = inputs(name, dtype, shape, 1, options, rng, spread=4)
        self.keywords.pop("axis", None)
        self._shapes = {a.name: a.shape for a in self.operation.arguments}
        self._shapes |= {k: v.shape for k, v in options.items() if isinstance(v, Argument)}

    def arguments(self, change):
        """Arrays and keywords, with a change of those that have an entry for each row."""
        names = [argument.name for argument in self.operation.arguments]
        arrays = [self._changed(*item, change) for item in zip(names, self.arrays, strict=True)]
        return arrays, {k: self._changed(k, v, change) for k, v in self.keywords.items()}

    def _changed(self, name, value, change):
        return change(value) if self._shapes.get(name) in ("full", "rows") else value


def parts(result):
    """A result as a sequence of arrays."""
    return result if isinstance(result, tuple | list) else (result,)


def label(options):
    """The name of a set of options in a test's."""
    return "+".join(options) or "plain"


def all_options(names=OPERATIONS):
    """Parameters (operation, number of its set of options)."""
    return [
        pytest.param(name, i, id=f"{name}-{label(options)}")
        for name in names
        for i, options in enumerate(OPERATIONS[name].options)
    ]


def bits(x):
    """The bits of numbers as integers; of a NaN, whatever its bits, one value."""
    x = np.asarray(x)
    found = np.ascontiguousarray(x).view(f"u{x.itemsize}").reshape(x.shape)
    return np.where(np.isnan(x), found.dtype.type(-1 & 2 ** (8 * x.itemsize) - 1), found)


def assert_same_bits(actual, expected, message=""):
    """Results, or tuples of them, of the same dtypes, shapes and bits: signs of zeros count."""
    for one, other in zip(parts(actual), parts(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype, message
        np.testing.assert_array_equal(bits(one), bits(other), err_msg=message, strict=True)


def eps(dtype):
    """Unit roundoff of the dtype a result of `dtype` is computed in."""
    return np.finfo(np.float64 if dtype == np.float64 else np.float32).eps / 2


def assert_close(actual, expected, dtype, *, factor=ROUNDOFFS):
    """`actual` is (value, scale) of the oracle up to `factor` roundoffs and its own rounding."""
    if isinstance(expected, oracle.Expected):
        expected = expected.value
    value, scale = (np.asarray(part) for part in expected)
    actual = np.asarray(actual)
    own = ml_dtypes.finfo(actual.dtype)
    allowed = (
        factor * eps(dtype) * scale + float(own.eps) / 2 * np.abs(value) + float(own.smallest_subnormal)
    )
    got = actual.astype(np.longdouble)
    assert got.shape == value.shape
    finite = np.isfinite(value)
    np.testing.assert_array_equal(got[~finite], value[~finite])
    error = np.abs(got[finite] - value[finite])
    worst = np.argmax(error / allowed[finite]) if error.size else 0
    assert np.all(error <= allowed[finite]), (
        f"off by {float((error / allowed[finite]).flat[worst]):.2f} of what is allowed: "
        f"{got[finite].flat[worst]!r}, expected {value[finite].flat[worst]!r}"
    )
