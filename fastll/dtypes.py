"""The dtypes: which are accepted, which one is computed in, and which one is returned."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: bfloat16 where ml_dtypes is not needed: a record of one field.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])

FLOATING = "float16, bfloat16, float32, float64"
ACCEPTED = f"{FLOATING}, integers and bool"

_INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
#: Storage formats that compiled backends read, in the order of their codes.
FORMATS = ("float32", "float64", "float16", "bfloat16", *_INTEGERS)


class Kind(NamedTuple):
    """How the elements of a dtype are stored, computed with and returned."""

    code: int  # index into FORMATS
    floating: bool
    swapped: bool  # stored in the other byte order
    compute: np.dtype[Any]  # arithmetic; also the dtype of values (losses, log-sum-exp)
    element: np.dtype[Any]  # of element-wise results (softmax, gradients)


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_known: dict[np.dtype[Any], Kind] = {}


def kind_of(dtype: np.dtype[Any], name: str = "x") -> Kind:
    """The `Kind` of a dtype; `TypeError` naming the argument if the dtype is not accepted."""
    kind = _known.get(dtype)
    if kind is None:
        # some of the others have no byte order to ask for
        stored = dtype.newbyteorder("=") if dtype.kind in "biufV" else dtype
        format_name = "uint8" if stored.kind == "b" else name_of(stored)
        # longdouble is a float128 or, where it is no wider than double, a second float64
        if format_name not in FORMATS or stored.char == "g":
            raise TypeError(f"{name} has dtype {name_of(dtype)}; fastll takes {ACCEPTED}")
        floating = stored.kind == "f" or format_name == "bfloat16"
        element = stored if floating else _FLOAT64
        kind = Kind(
            code=FORMATS.index(format_name),
            floating=floating,
            swapped=not dtype.isnative,
            compute=_FLOAT32 if element.itemsize < 8 else _FLOAT64,
            element=element,
        )
        _known[dtype] = kind
    return kind


def name_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, as other libraries spell it too."""
    return "bfloat16" if dtype == BFLOAT16 else str(dtype)


def as_floats(a: NDArray[Any], dtype: np.dtype[Any] = _FLOAT64) -> NDArray[Any]:
    """A contiguous copy (or the array itself) in a floating dtype that NumPy computes with."""
    if a.dtype is dtype and a.flags.c_contiguous:
        return a
    if a.dtype == BFLOAT16:  # the upper half of a float32
        a = (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(a, dtype)


def rounded(a: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Floats converted to another dtype, rounded to nearest."""
    if dtype != BFLOAT16:
        return a.astype(dtype)
    bits = a.astype(np.float32).view(np.uint32)
    even = ((bits >> 16) & 1) + 0x7FFF
    return np.where(np.isnan(a), np.uint16(0x7FC0), ((bits + even) >> 16).astype(np.uint16)).view(dtype)
