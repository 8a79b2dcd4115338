"""Every bad argument: an error of the right type that names it, and nothing written to any output."""

import numpy as np
import pytest

import fastll
from fastll.operations import OPERATIONS

X = np.arange(12.0).reshape(3, 4)
Y = np.array([0, 1, 2])
T = np.full((3, 4), 0.25)

BAD_DTYPES = [
    np.zeros(3, complex),
    np.zeros(3, np.longdouble),
    np.zeros(3, object),
    np.array(["a", "b"]),
    np.zeros(3, "datetime64[s]"),
    np.zeros(3, [("a", float)]),
    [1, "a"],
    None,
]


@pytest.mark.parametrize("x", BAD_DTYPES, ids=lambda x: str(getattr(x, "dtype", x)))
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtype_of_first_argument(backend, name, x):
    argument = "a" if name == "logsumexp" else "logits" if OPERATIONS[name].gradient else "x"
    arguments = (Y,) if OPERATIONS[name].gradient else ()
    with pytest.raises(
        TypeError, match=rf"^{argument} has dtype .*float16, bfloat16, float32, float64"
    ):
        OPERATIONS[name].function(x, *arguments)


REDUCTION_ERRORS = [
    ({"axis": 2}, ValueError, "axis"),
    ({"axis": -3}, ValueError, "axis"),
    ({"axis": (0, 0)}, ValueError, "axis"),
    ({"axis": 1.0}, TypeError, "axis is 1.0"),
    ({"axis": "1"}, TypeError, "axis is '1'"),
]


@pytest.mark.parametrize(("options", "error", "match"), REDUCTION_ERRORS)
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_axes(backend, name, options, error, match):
    with pytest.raises(error, match=match):
        OPERATIONS[name].function(X, **options)


def test_logsumexp_arguments(backend):
    with pytest.raises(ValueError, match=r"b has shape \(3,\)"):
        fastll.logsumexp(X, b=np.ones(3))
    with pytest.raises(TypeError, match="b has dtype complex128"):
        fastll.logsumexp(X, b=np.ones(4, complex))
    with pytest.raises(TypeError, match="out has dtype int64"):
        fastll.logsumexp(X, axis=1, out=np.zeros(3, np.int64))


def read_only(a):
    a.flags.writeable = False
    return a


BAD_OUTPUTS = [
    ([[0.0] * 4] * 3, TypeError, "is a list"),
    (np.zeros((4, 3)), ValueError, r"has shape \(4, 3\); expected \(3, 4\)"),
    (np.zeros((3, 4), np.float32), TypeError, "has dtype float32; expected float64"),
    (read_only(np.zeros((3, 4))), ValueError, "is read-only"),
    (np.broadcast_to(np.zeros(4), (3, 4)), ValueError, "is read-only"),
    (
        np.lib.stride_tricks.as_strided(np.zeros(12), (3, 4), (8, 8)),
        ValueError,
        "has several elements at one",
    ),
]


@pytest.mark.parametrize(("out", "error", "match"), BAD_OUTPUTS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sigmoid", "log_sigmoid"])
def test_out(backend, name, out, error, match):
    before = np.array(out)
    with pytest.raises(error, match=f"^out {match}"):
        OPERATIONS[name].function(X, out=out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(("out", "error", "match"), BAD_OUTPUTS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("target", [Y, T], ids=["sparse", "dense"])
def test_grad_out(backend, out, target, error, match):
    with pytest.raises(error, match=f"^grad_out {match}"):
        fastll.cross_entropy(X, target, return_grad=True, grad_out=out)
    with pytest.raises(error, match=f"^grad_out {match}"):
        fastll.binary_cross_entropy_with_logits(X, T, grad_out=out)


def test_outputs_that_overlap_inputs(backend):
    memory = np.arange(40.0)
    x = memory[:12].reshape(3, 4)
    for other in (
        memory[1:13].reshape(3, 4),
        memory[:12].reshape(3, 4)[::-1],
        memory[:12].reshape(4, 3).T,
    ):
        kept = memory.copy()
        with pytest.raises(ValueError, match="out shares memory with an input"):
            fastll.softmax(x, out=other)
        with pytest.raises(ValueError, match="grad_out shares memory with an input"):
            fastll.cross_entropy(x, Y, grad_out=other)
        np.testing.assert_array_equal(memory, kept)
    target = T.copy()
    with pytest.raises(ValueError, match="grad_out shares memory"):
        fastll.cross_entropy(X, target, grad_out=target)
    with pytest.raises(ValueError, match="grad_out shares memory"):
        fastll.binary_cross_entropy_with_logits(X, target, grad_out=target)
    # neighbours that interleave without sharing an element are fine
    both = np.zeros((3, 8))
    both[:, ::2] = X
    fastll.softmax(both[:, ::2], out=both[:, 1::2])
    np.testing.assert_array_equal(both[:, 1::2], fastll.softmax(X))


CROSS_ENTROPY_ERRORS = [
    ({"logits": np.float64(1), "target": 0}, ValueError, "logits has no axis"),
    ({"axis": 2}, ValueError, "axis"),
    ({"axis": (1,)}, TypeError, r"axis is \(1,\)"),
    ({"axis": None}, TypeError, "axis is None"),
    (
        {"target": [0, 1]},
        ValueError,
        r"target has shape \(2,\); expected that of logits without axis, \(3,\)",
    ),
    ({"target": Y[:, None]}, ValueError, r"target has shape \(3, 1\)"),
    ({"target": T[:2]}, ValueError, r"target has shape \(2, 4\); expected that of logits, \(3, 4\)"),
    ({"target": [True, False, True]}, TypeError, "target has dtype bool"),
    ({"target": Y.astype(complex)}, TypeError, "target has dtype complex128"),
    ({"target": Y.astype(object)}, TypeError, "target has dtype object"),
    ({"target": [0, 4, 1]}, IndexError, r"label 4 at \(1,\); expected 0 <= label < 4"),
    ({"target": [0, 1, -1]}, IndexError, r"label -1 at \(2,\)"),
    ({"target": [0, -100, 1], "ignore_index": -1}, IndexError, r"label -100 at \(1,\)"),
    ({"target": np.array([0, 2**63, 1], np.uint64)}, IndexError, r"at \(1,\)"),
    ({"target": np.array([0, 2**64 - 100, 1], np.uint64)}, IndexError, r"at \(1,\)"),
    (
        {"weight": np.ones(3)},
        ValueError,
        r"weight has shape \(3,\); expected one weight per class, \(4,\)",
    ),
    ({"weight": np.ones((1, 4))}, ValueError, r"weight has shape \(1, 4\)"),
    ({"weight": np.ones(4, complex)}, TypeError, "weight has dtype complex128"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index is 1.5"),
    ({"ignore_index": None}, TypeError, "ignore_index is None"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index is"),
    ({"target": T, "ignore_index": 1}, ValueError, "ignore_index is 1; a dense target"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing is -0.1; expected a number in \[0, 1\]"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing is 1.1"),
    ({"label_smoothing": np.nan}, ValueError, "label_smoothing is nan"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing is 'a'"),
    ({"z_loss": -1}, ValueError, "z_loss is -1"),
    ({"z_loss": np.inf}, ValueError, "z_loss is inf"),
    ({"softcap": 0}, ValueError, "softcap is 0; expected a number above 0"),
    ({"softcap": -3.0}, ValueError, "softcap is -3.0"),
    ({"softcap": np.nan}, ValueError, "softcap is nan"),
    ({"reduction": "avg"}, ValueError, "reduction is 'avg'; expected 'mean', 'sum' or 'none'"),
    ({"reduction": None}, ValueError, "reduction is None"),
]


@pytest.mark.parametrize(("options", "error", "match"), CROSS_ENTROPY_ERRORS, ids=lambda v: str(v)[:40])
def test_cross_entropy(backend, options, error, match):
    out = np.full((3, 4), 7.0)
    arguments = {"logits": X, "target": Y, "grad_out": out, "return_grad": True} | options
    with pytest.raises(error, match=match):
        fastll.cross_entropy(**arguments)
    np.testing.assert_array_equal(out, 7)


def test_sparse_and_dense(backend):
    with pytest.raises(TypeError, match="target has dtype float64; expected integers"):
        fastll.sparse_cross_entropy(X, T)
    with pytest.raises(ValueError, match=r"target has shape \(3,\); expected that of logits, \(3, 4\)"):
        fastll.dense_cross_entropy(X, Y)
    with pytest.raises(TypeError, match="ignore_index"):
        fastll.dense_cross_entropy(X, T, ignore_index=-100)
    with pytest.raises(TypeError, match="smoothing"):
        fastll.sparse_cross_entropy(X, Y, smoothing=0.1)
    one_hot = np.eye(4, dtype=np.int64)[Y]
    assert fastll.dense_cross_entropy(X, one_hot) == fastll.sparse_cross_entropy(X, Y)


def test_label_position_in_many_axes(backend):
    x = np.zeros((2, 5, 3))
    y = np.zeros((2, 3), int)
    y[1, 2] = 5
    with pytest.raises(IndexError, match=r"label 5 at \(1, 2\); expected 0 <= label < 5"):
        fastll.cross_entropy(x, y, axis=1)


BINARY_ERRORS = [
    ({"target": T[0]}, ValueError, r"target has shape \(4,\); expected that of logits, \(3, 4\)"),
    ({"target": T.astype(complex)}, TypeError, "target has dtype complex128"),
    (
        {"weight": np.ones(3)},
        ValueError,
        r"weight has shape \(3,\); expected one that broadcasts to \(3, 4\)",
    ),
    ({"pos_weight": np.ones((2, 4))}, ValueError, "pos_weight has shape"),
    ({"pos_weight": np.ones(4, object)}, TypeError, "pos_weight has dtype object"),
    ({"reduction": 3}, ValueError, "reduction is 3"),
]


@pytest.mark.parametrize(("options", "error", "match"), BINARY_ERRORS, ids=lambda v: str(v)[:40])
def test_binary(backend, options, error, match):
    out = np.full((3, 4), 7.0)
    with pytest.raises(error, match=match):
        fastll.binary_cross_entropy_with_logits(
            **({"logits": X, "target": T, "grad_out": out} | options)
        )
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize("n", [0, -1])
def test_number_of_threads(n):
    with pytest.raises(ValueError, match=f"n is {n}; expected at least 1"):
        fastll.set_num_threads(n)


@pytest.mark.parametrize("n", [1.5, "2", True])
def test_type_of_number_of_threads(n):
    with pytest.raises(TypeError, match="n is"):
        fastll.set_num_threads(n)


def test_backend_names():
    with pytest.raises(
        ValueError, match="backend is 'fast'; expected one of numba, cython, numpy, cuda"
    ):
        fastll.use_backend("fast").__enter__()
    with pytest.raises(ValueError, match="backend is 'fast'"):
        fastll.warmup(backend="fast")
    with pytest.raises(ValueError, match="operations has 'sofmax'"):
        fastll.warmup(["sofmax"])


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy_with_logits"])
def test_inputs_are_never_written(backend, rng, name):
    x, t = rng.standard_normal((5, 40)), rng.random((5, 40))
    kept_x, kept_t = x.copy(), t.copy()
    getattr(fastll, name)(x, t, return_grad=True)
    np.testing.assert_array_equal(x, kept_x)
    np.testing.assert_array_equal(t, kept_t)


@pytest.mark.parametrize("dtype", [">u8", ">i8", "u1", ">u2"])
def test_labels_of_any_integer_dtype(backend, dtype):
    assert fastll.cross_entropy(X, Y.astype(dtype)) == fastll.cross_entropy(X, Y)


def test_unsigned_labels_beyond_int64_are_out_of_range(backend):
    for order in "<>":
        # as int64 the last one would be -100, the default ignore_index
        y = np.array([0, 1, 2**64 - 100], order + "u8")
        with pytest.raises(IndexError, match=r"at \(2,\)"):
            fastll.cross_entropy(X, y)
