"""The dtypes fastll computes with: what is accepted, computed in, and returned."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

ACCEPTED = "float16, bfloat16, float32, float64, integers and bool"

#: Storage formats a compiled backend can read, in the order of the codes it is told them by.
FORMATS = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


class Kind(NamedTuple):
    """How the elements of one dtype are stored, computed with and returned."""

    code: int  # index into FORMATS
    floating: bool
    swapped: bool  # stored in the other byte order
    compute: np.dtype[Any]  # arithmetic; also the dtype of values (losses, log-sum-exp)
    element: np.dtype[Any]  # of element-wise results (softmax, gradients)

    @property
    def native(self) -> bool:
        """Stored just as it is computed with, so that a kernel may read it in place."""
        return self.code < 2 and not self.swapped


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_known: dict[np.dtype[Any], Kind] = {}


def kind_of(dtype: np.dtype[Any], name: str = "x") -> Kind:
    """The `Kind` of a dtype; `TypeError` naming the argument where fastll does not take it."""
    kind = _known.get(dtype)
    if kind is None:
        stored = dtype.newbyteorder("=")
        format_name = "uint8" if stored.kind == "b" else stored.name
        # longdouble is a float128 or, where it is no wider than double, a second float64
        if format_name not in FORMATS or stored.char == "g":
            raise TypeError(f"{name} has dtype {dtype}; fastll takes {ACCEPTED}")
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
