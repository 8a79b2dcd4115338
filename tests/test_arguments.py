"""Every bad argument: an error of the right type that names it, and nothing written to any output."""

import numpy as np
import pytest
from table import all_options, assert_same_bits, inputs, label, parts

import fastll
from fastll.operations import OPERATIONS, Argument

X = np.arange(12.0).reshape(3, 4) / 16  # probabilities too
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


ROWWISE = [name for name, operation in OPERATIONS.items() if not operation.elementwise]
LOSSES = [name for name, operation in OPERATIONS.items() if operation.gradient]
WRITING = [name for name, operation in OPERATIONS.items() if operation.writes]
#: (operation, array argument); those by keyword with the options that they are one of.
ARRAYS = [(name, i, {}) for name, o in OPERATIONS.items() for i in range(len(o.arguments))] + [
    (name, key, options)
    for name, operation in OPERATIONS.items()
    for options in operation.options
    for key, value in options.items()
    if isinstance(value, Argument)
]
NUMBERS = {
    (name, key): None
    for name, operation in OPERATIONS.items()
    for options in operation.options
    for key, value in options.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
}


def ids(value):
    """Of an operation, an argument, options or a bad array in the name of a test."""
    return label(value) if isinstance(value, dict) else str(getattr(value, "dtype", value))


def call_of(name, options=None):
    """A valid call of an operation: its arrays, the first one X, and its keywords."""
    options = OPERATIONS[name].options[0] if options is None else options
    arrays, keywords = inputs(name, np.float64, X.shape, 1, options)
    return [X, *arrays[1:]], keywords


def output_of(name):
    return "grad_out" if OPERATIONS[name].gradient else "out"


def refuses(name, error, match, arrays, keywords):
    """Check that a call raises, and writes nothing to an output."""
    outputs = {output_of(name): np.full(X.shape, 7.0)} if OPERATIONS[name].writes else {}
    with pytest.raises(error, match=match):
        OPERATIONS[name].function(*arrays, **outputs | keywords)
    for out in outputs.values():
        np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize(
    ("name", "at", "options", "bad"),
    # None is the default of an option
    [(*a, bad) for a in ARRAYS for bad in BAD_DTYPES if bad is not None or isinstance(a[1], int)],
    ids=ids,
)
def test_dtype_of_arrays(backend, name, at, options, bad):
    arrays, keywords = call_of(name, options)
    accepted = ".*float16, bfloat16, float32, float64" if at == 0 else ""
    if isinstance(at, int):
        arrays[at] = bad
        argument = OPERATIONS[name].arguments[at].name
    else:
        keywords[at], argument = bad, at
    refuses(name, TypeError, f"^{argument} has dtype{accepted}", arrays, keywords)


@pytest.mark.parametrize(("name", "at", "options"), [a for a in ARRAYS if a[1] != 0], ids=ids)
def test_shape_of_arrays(backend, name, at, options):
    """Two axes too many; a length that is not that of the first argument."""
    arrays, keywords = call_of(name, options)
    where = arrays if isinstance(at, int) else keywords
    argument = OPERATIONS[name].arguments[at].name if isinstance(at, int) else at
    *others, last = where[at].shape
    for shape in ((*others, last, 2, 2), (*others, last + 7)):
        where[at] = np.zeros(shape, where[at].dtype)
        refuses(name, ValueError, rf"^{argument} has shape \({shape[0]}", arrays, keywords)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_numbers(backend, name, option):
    arrays, keywords = call_of(name)
    for value, error in (("a", TypeError), (np.nan, ValueError)):
        refuses(name, error, f"^{option} is {value!r}; expected", arrays, keywords | {option: value})


@pytest.mark.parametrize("name", OPERATIONS)
def test_names_of_options(backend, name):
    arrays, keywords = call_of(name)
    refuses(name, TypeError, "optoin", arrays, keywords | {"optoin": 1})


@pytest.mark.parametrize("reduction", ["avg", None])
@pytest.mark.parametrize("name", LOSSES)
def test_reduction(backend, name, reduction):
    arrays, keywords = call_of(name)
    match = f"^reduction is {reduction!r}; expected 'mean', 'sum' or 'none'"
    refuses(name, ValueError, match, arrays, keywords | {"reduction": reduction})


@pytest.mark.parametrize(
    ("axis", "error", "match"),
    [
        (2, ValueError, "axis"),
        (-3, ValueError, "axis"),
        (1.0, TypeError, "axis is 1.0"),
        ("1", TypeError, "axis is '1'"),
    ],
)
@pytest.mark.parametrize("name", ROWWISE)
def test_axis(backend, name, axis, error, match):
    arrays, keywords = call_of(name)
    refuses(name, error, match, arrays, keywords | {"axis": axis})


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_axes(backend, name):
    with pytest.raises(ValueError, match="axis"):
        OPERATIONS[name].function(X, axis=(0, 0))


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
@pytest.mark.parametrize("name", WRITING)
def test_outputs(backend, name, out, error, match):
    arrays, keywords = call_of(name)
    before = np.array(out)
    for more in ({}, {"return_grad": True}) if OPERATIONS[name].gradient else ({},):
        with pytest.raises(error, match=f"^{output_of(name)} {match}"):
            OPERATIONS[name].function(*arrays, **keywords, **more, **{output_of(name): out})
        np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("name", WRITING)
def test_outputs_that_overlap_inputs(backend, name):
    operation, output = OPERATIONS[name], output_of(name)
    arrays, keywords = call_of(name, operation.options[-1])
    message = f"^{output} shares memory with an input"
    memory = np.arange(40.0) / 64
    x = memory[:12].reshape(3, 4)
    for other in (
        memory[1:13].reshape(3, 4),
        memory[:12].reshape(3, 4)[::-1],
        memory[:12].reshape(4, 3).T,
    ):
        kept = memory.copy()
        with pytest.raises(ValueError, match=message):
            operation.function(x, *arrays[1:], **keywords, **{output: other})
        np.testing.assert_array_equal(memory, kept)
    for other in (*arrays[1:], *keywords.values()):
        if isinstance(other, np.ndarray) and (other.shape, other.dtype) == (X.shape, X.dtype):
            kept = other.copy()
            with pytest.raises(ValueError, match=message):
                operation.function(*arrays, **keywords, **{output: other})
            np.testing.assert_array_equal(other, kept)
    # neighbours that interleave without sharing an element are fine
    both = np.zeros((3, 8))
    both[:, ::2] = X
    more = {"return_grad": True} if operation.gradient else {}
    expected = parts(operation.function(*arrays, **keywords, **more))[-1]
    operation.function(both[:, ::2], *arrays[1:], **keywords, **{output: both[:, 1::2]})
    assert_same_bits(both[:, 1::2], expected)
    np.testing.assert_array_equal(both[:, ::2], X)


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
    (
        {"sample_weight": np.ones(4)},
        ValueError,
        r"sample_weight has shape \(4,\); expected one that broadcasts to \(3,\)",
    ),
    ({"sample_weight": ["a"]}, TypeError, "sample_weight has dtype"),
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


@pytest.mark.parametrize(("name", "option"), all_options())
def test_inputs_are_never_written(backend, name, option):
    operation = OPERATIONS[name]
    arrays, keywords = inputs(name, np.float64, (5, 40), 1, operation.options[option])
    given = [a for a in (*arrays, *keywords.values()) if isinstance(a, np.ndarray)]
    before = [a.copy() for a in given]
    operation.function(*arrays, **keywords, **({"return_grad": True} if operation.gradient else {}))
    for array, kept in zip(given, before, strict=True):
        assert_same_bits(array, kept)


def test_warmup():
    """A string is one name; a function that chooses between others stands for these."""
    for names in ("softmax", ["cross_entropy", "softmax"], "cross_entropy", (), None):
        fastll.warmup(names, backend="numpy")


def test_every_function_is_in_the_table():
    public = {getattr(fastll, name) for name in fastll.__all__}
    modules = [f"fastll.api.{name}" for name in ("reductions", "losses", "logits", "elementwise")]
    of_arrays = {f.__name__ for f in public if getattr(f, "__module__", "") in modules}
    names = {o.function.__name__ for o in OPERATIONS.values()}
    assert of_arrays == names | {o.chosen_by for o in OPERATIONS.values() if o.chosen_by}
    for name, operation in OPERATIONS.items():
        assert operation.function is getattr(fastll, name, getattr(fastll, operation.chosen_by, None))


@pytest.mark.parametrize("dtype", [">u8", ">i8", "u1", ">u2"])
def test_labels_of_any_integer_dtype(backend, dtype):
    assert fastll.cross_entropy(X, Y.astype(dtype)) == fastll.cross_entropy(X, Y)


def test_unsigned_labels_beyond_int64_are_out_of_range(backend):
    for order in "<>":
        # as int64 the last one would be -100, the default ignore_index
        y = np.array([0, 1, 2**64 - 100], order + "u8")
        with pytest.raises(IndexError, match=r"at \(2,\)"):
            fastll.cross_entropy(X, y)
