"""Every operation on every backend, dtype, layout, shape and option, against the oracle."""

import numpy as np
import pytest
from table import (
    DTYPES,
    LAYOUTS,
    ROUNDOFFS,
    SHAPES,
    assert_close,
    assert_same_bits,
    case,
    label,
    parts,
)

import fastll
from fastll.operations import OPERATIONS

#: Shapes of element-wise operations: whole vectors or not, several blocks, several axes.
FLAT = [SHAPES[0], SHAPES[2], SHAPES[7]]


def cases():
    """(operation, number of its set of options, shape, axis, layout, dtype).

    Every set of options in each shape and dtype. The first set and the last one, in which most options
    come together, in each layout of rows, of columns and between, half of the dtypes in turn.
    """
    dtypes, others = list(DTYPES), [layout for layout in LAYOUTS if layout != "contiguous"]
    for name, operation in OPERATIONS.items():
        last = len(operation.options) - 1
        for option in range(last + 1):
            for shape, axis in FLAT if operation.elementwise else SHAPES:
                for dtype in dtypes:
                    yield name, option, shape, axis, "contiguous", dtype
            for i, (shape, axis) in enumerate(SHAPES[:3] if option in (0, last) else ()):
                for j, layout in enumerate(others):
                    for dtype in dtypes[(i + j + option) % 2 :: 2]:
                        yield name, option, shape, axis, layout, dtype


def named(case):
    """A case as the name of a test."""
    name, option, shape, axis, layout, dtype = case
    options = label(OPERATIONS[name].options[option])
    return f"{name}-{options}-{'x'.join(map(str, shape))}-{axis}-{layout}-{dtype}"


def value_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


@pytest.mark.parametrize("chosen", list(cases()), ids=named)
def test_operation(chosen, backend):
    name, option, shape, axis, layout, dtype = chosen
    dtype = DTYPES[dtype]
    arrays, keywords, expected = case(name, dtype, shape, axis, option)

    def lay_out(a):
        return LAYOUTS[layout](a) if isinstance(a, np.ndarray) and a.ndim else a

    arrays = [lay_out(a) for a in arrays]
    keywords = {name: lay_out(value) for name, value in keywords.items()}
    check = check_loss if OPERATIONS[name].gradient else check_value
    check(OPERATIONS[name], arrays, keywords, expected, dtype)


def check_value(operation, arrays, keywords, expected, dtype):
    """The result and what comes beside it; in place too."""
    result, *extras = parts(operation.function(*arrays, **keywords))
    assert result.dtype == (value_dtype(dtype) if operation.reduces else dtype)
    assert_close(result, expected, dtype)
    for extra, pair in zip(extras, expected.extras, strict=True):
        assert_close(extra, pair, dtype)
    x = arrays[0]
    if operation.writes and x.flags.writeable and x.dtype == dtype:
        assert operation.function(*arrays, **keywords, out=x) is x
        assert_close(x, expected, dtype)


def check_loss(operation, arrays, keywords, expected, dtype):
    """Losses, what comes beside them and gradients by every reduction; in place too."""
    extras = dict.fromkeys(operation.extras, True)
    chosen = getattr(fastll, operation.chosen_by) if operation.chosen_by else operation.function

    def check(reduction, pair, slope, factor=ROUNDOFFS):
        value, *others, grad = operation.function(
            *arrays, **keywords, **extras, reduction=reduction, return_grad=True
        )
        assert value.dtype == value_dtype(dtype)
        assert grad.dtype == dtype
        assert_close(value, pair, dtype, factor=factor)
        assert_close(grad, slope, dtype, factor=factor)
        for other, pair in zip(others, expected.extras, strict=True):
            assert other.dtype == value_dtype(dtype)
            assert_close(other, pair, dtype)
        assert_same_bits(chosen(*arrays, **keywords, reduction=reduction), value)

    check("none", expected.value, expected.gradient)
    total = [part.sum() for part in expected.value]
    check("sum", total, expected.gradient)
    size = expected.value[0].size
    if expected.mean:
        # the weights of labels add up one after the other, in float64: about sqrt(n) roundoffs
        check("mean", *expected.mean, factor=ROUNDOFFS + np.sqrt(size))
    elif size and expected.mean is None:
        check("mean", [part / size for part in total], [part / size for part in expected.gradient])
    x = arrays[0]
    if x.flags.writeable and x.dtype == dtype:
        result, returned = operation.function(
            *arrays, **keywords, reduction="sum", return_grad=True, grad_out=x
        )
        assert returned is x
        assert_close(result, total, dtype)
        assert_close(x, expected.gradient, dtype)
