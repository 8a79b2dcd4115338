"""The axes of the test table: dtypes, layouts, shapes, options; and what a result may be off by."""

import ml_dtypes
import numpy as np

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

#: Options of a cross-entropy; "weight" stands for random weights.
CROSS_ENTROPY_OPTIONS = [
    {},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0},
]

BINARY_OPTIONS = [{}, {"weight": True}, {"pos_weight": True}, {"weight": True, "pos_weight": True}]


def eps(dtype):
    """Unit roundoff of the dtype a result of `dtype` is computed in."""
    return np.finfo(np.float64 if dtype == np.float64 else np.float32).eps / 2


def assert_close(actual, expected, dtype, *, factor=ROUNDOFFS):
    """`actual` is (value, scale) of the oracle up to `factor` roundoffs and its own rounding."""
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
