"""The public functions; here, the checks of their arguments that are not arrays."""

from __future__ import annotations

import math
from typing import Any, Literal

Reduction = Literal["mean", "sum", "none"]

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


def check_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    return reduction


def integer(value: Any, name: str) -> int:
    """An integer of 64 bits."""
    if type(value) is not int and (not hasattr(value, "__index__") or isinstance(value, bool)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise ValueError(f"{name} is {value}; expected an integer of 64 bits")
    return int(value)


def number(
    value: Any,
    name: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: bool = False,
) -> float:
    """A finite number from `least` (or only `above` it) to `most`."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; expected a number") from None
    if not (least <= result <= most) or math.isinf(result) or (above and result == least):
        bounds = f"above {least:g}" if above else f"of at least {least:g}"
        if most < math.inf:
            bounds = f"in [{least:g}, {most:g}]" if math.isfinite(least) else f"of at most {most:g}"
        elif least == -math.inf:
            bounds = "that is finite"
        raise ValueError(f"{name} is {value!r}; expected a number {bounds}")
    return result
