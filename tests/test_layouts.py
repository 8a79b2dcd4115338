"""Shapes, strides and axes at random: Hypothesis against the plain reference."""

import numpy as np
import oracle
import pytest
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st
from table import ROUNDOFFS, assert_close

import fastll

#: What rows over several axes may be off by: where these do not merge, a running state divides the sum
#: of a piece by the exponential of its maximum (2 roundoffs), and raises it to a larger one (2 more).
SPREAD = ROUNDOFFS + 4

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@st.composite
def arrays(draw):
    """A view of some memory: transposed, stepped, reversed, broadcast; and some of its axes."""
    shape = draw(shapes)
    steps = [draw(st.sampled_from([1, 1, 2, -1, -2])) for _ in shape]
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    memory = (3 * rng.standard_normal([abs(s) * n for s, n in zip(steps, shape, strict=True)])).astype(
        dtype
    )
    x = memory[tuple(slice(None, None, s) for s in steps)].transpose(
        draw(st.permutations(range(len(shape))))
    )
    repeated = draw(st.sets(st.integers(0, x.ndim - 1)))
    x = np.broadcast_to(
        x[tuple(slice(0, 1) if i in repeated else slice(None) for i in range(x.ndim))],
        [draw(st.integers(1, 4)) if i in repeated and n else n for i, n in enumerate(x.shape)],
    )
    axes = draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))
    return x, tuple(axes)


@pytest.mark.parametrize("name", ["numba", "cython", "numpy"])
@given(case=arrays())
@settings(max_examples=150, deadline=None)
def test_reductions(name, case):
    from conftest import require

    require(name)
    x, axes = case
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    kept = moved.shape[: x.ndim - len(axes)]
    flat = moved.reshape(*kept, int(np.prod(moved.shape[len(kept) :])))
    oracle.SUBTRACTED = int(name == "numpy")
    with fastll.use_backend(name), np.errstate(divide="ignore"):
        factor = SPREAD if len(axes) > 1 else ROUNDOFFS
        expected = oracle.logsumexp(flat, -1)[0]
        assert_close(fastll.logsumexp(x, axis=axes), expected, x.dtype, factor=factor)
        if x.size:
            value, scale = oracle.softmax(flat, -1).value
            result = np.moveaxis(fastll.softmax(x, axis=axes), axes, range(-len(axes), 0))
            assert_close(result.reshape(value.shape), (value, scale), x.dtype, factor=factor)
        assert_close(fastll.sigmoid(x), oracle.sigmoid(x), x.dtype)
        if len(axes) == 1 and flat.shape[-1]:
            rng = np.random.default_rng(0)
            y = rng.integers(0, flat.shape[-1], kept)
            expected = oracle.cross_entropy(x, y, axes[0], label_smoothing=0.1)
            results = fastll.cross_entropy(
                x,
                y,
                axis=axes[0],
                label_smoothing=0.1,
                reduction="none",
                return_lse=True,
                return_grad=True,
            )
            pairs = (expected.value, *expected.extras, expected.gradient)
            for result, pair in zip(results, pairs, strict=True):
                assert_close(result, pair, x.dtype)
    oracle.SUBTRACTED = 0


@pytest.mark.parametrize("classes", [1, 10, 63, 64, 1000])
@pytest.mark.parametrize("rows", [7, 70])
def test_rows_of_one_block_in_any_strides(rng, rows, classes):
    """Groups that are partial, unusual, swapped, reversed or repeated: the bits of both backends."""
    require("cython")
    require("numba")
    x = rng.standard_normal((rows, classes), np.float32)
    y, weights = rng.integers(0, classes, rows), rng.integers(0, 3, rows)
    y[rows // 2] = -100
    unusual = x.copy()
    unusual[0], unusual[rows // 2], unusual[-1, 0] = -np.inf, np.nan, np.inf
    repeated = np.broadcast_to(x[0], x.shape), np.broadcast_to(x[:, :1], x.shape)
    more = {"sample_weight": weights, "return_lse": True, "return_grad": True}
    for logits in (x, unusual, x[::-1], x[:, ::-1], x.astype(">f4"), np.asfortranarray(x), *repeated):
        found = []
        for name in ("cython", "numba"):
            with fastll.use_backend(name):
                loss = fastll.cross_entropy(logits, y, reduction="none", **more)
                found.append((*loss, fastll.softmax(logits), fastll.log_softmax(logits)))
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)
