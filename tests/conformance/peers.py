"""How results are compared with those of another library."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def assert_not_worse(ours, peer, exact, units=1):
    """Our largest error is not above the peer's, but for the last roundings of a result.

    `exact` is in extended precision. The last two operations of both, a product or quotient and its
    rounding to the dtype, go up or down by chance: a unit of the largest result may come on top, or
    several `units`.
    """
    exact = np.asarray(exact, np.longdouble)
    own, other = (np.asarray(a).astype(np.longdouble) for a in (ours, peer))
    assert own.shape == other.shape == exact.shape
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(own[~finite], exact[~finite])
    if not finite.any():
        return
    eps = float(ml_dtypes.finfo(np.asarray(ours).dtype).eps)
    rounding = units * eps * np.abs(exact[finite]).max()
    own, other = (np.abs(a[finite] - exact[finite]).max() for a in (own, other))
    assert own <= other + rounding, f"off by {own:.3e}, the peer by {other:.3e}"
