r"""fastll's functions inside code that Numba compiles. Nothing but `fastll` needs to be imported.

A function under ``@numba.njit`` may call `fastll.logsumexp`, `softmax`, `log_softmax`, `cross_entropy`,
`sigmoid` and `log_sigmoid`, also in ``prange`` and with ``cache=True``. Numba finds them through the
entry point ``numba_extensions`` of the installed package (see ``_fastll_numba.py``).

Arrays are of float32 or float64, of any number of dimensions and any strides; those of integers and
bools are taken as float64.

=========================================== ========================================================
``logsumexp(a, axis, keepdims=...)``        `axis` is an integer or None, `keepdims` a constant
``softmax(x, axis, out=...)``, log_softmax  `axis` is an integer or None, `out` C-contiguous
``cross_entropy(logits, target, ...)``      integer labels, one for each row, of one row a number;
                                            `axis` and `ignore_index` are integers, `reduction` and
                                            `return_grad` constants
``sigmoid(x, out=...)``, log_sigmoid        x is an array or a number; compiled into the caller
=========================================== ========================================================

Formulas, defaults, shapes and dtypes are those of the functions themselves. All but the sigmoids call
the kernels of fastll's compiled extension, which is necessary. No Python object is involved. A call
does its work in the thread that makes it: it is ``prange`` that shares rows among threads.

**Bits** are those of the functions in Python, but for these, which agree within the bounds of both: the
sum and the mean of losses, which are added in order, in float64; rows of more than 2**18 numbers in a
log-sum-exp; and all elements as one row where these are not contiguous in C's order.

**Errors** are those of the functions without the values: `IndexError` for a label that is neither a
class nor `ignore_index`, `ValueError` for shapes and axes. What is not supported is a
`numba.TypingError`, which names the argument and says what is expected.

Examples
--------
>>> import numba
>>> import numpy as np
>>> import fastll
>>> @numba.njit
... def forward(start, moves, emits, symbols):
...     state = start + emits[:, symbols[0]]
...     for symbol in symbols[1:]:
...         state = fastll.logsumexp(state + moves, axis=1) + emits[:, symbol]
...     return fastll.logsumexp(state)
>>> moves, emits = np.log([[0.9, 0.2], [0.1, 0.8]]), np.log([[0.7, 0.3], [0.1, 0.9]])
>>> round(forward(np.log([0.5, 0.5]), moves, emits, np.array([0, 0, 1])), 4)
-2.4333
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from fastll.interop import require

require("numba", "0.61")

import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from llvmlite.binding import add_symbol  # noqa: E402
from numba import types  # noqa: E402
from numba.core import cgutils  # noqa: E402
from numba.core.errors import TypingError  # noqa: E402
from numba.cpython.unsafe.tuple import tuple_setitem  # noqa: E402
from numba.extending import intrinsic, overload, register_jitable  # noqa: E402

import fastll  # noqa: E402

#: Of the functions of exported.hpp that compiled code calls: to be raised when what they take changes,
#: as users keep code on disk.
ABI = 1

_I64 = ir.IntType(64)
_C_TYPES = {types.float32: "float", types.float64: "double"}
_inline = register_jitable(error_model="numpy")


# Calling C functions


class _Link(NamedTuple):
    """Makes C functions known to LLVM: Numba calls it before it loads code from disk."""

    abi: int

    def __call__(self):
        if self.abi != ABI:
            raise RuntimeError(
                "a function was compiled and cached with another version of fastll: delete its cache, "
                "the files .nbi and .nbc in __pycache__ or NUMBA_CACHE_DIR"
            )
        _link()


@cache
def _link():
    from fastll.backend.cython import ADDRESSES

    for name, address in ADDRESSES.items():
        add_symbol(f"fastll_{ABI}_{name}", address)


def _function(name, element, result, *arguments, by_address=False):
    """A C function for numbers of a type, as one that compiled code calls with a tuple.

    The tuple holds its arguments; or, `by_address`, the words of the structure whose address it takes.
    """
    try:
        _link()
    except ImportError as error:
        raise TypingError(f"fastll in Numba code needs its compiled extension: {error}") from None
    symbol = f"fastll_{ABI}_{name}_{_C_TYPES[element]}"

    def codegen(context, builder, signature, values):
        # this and Numba's own use of it are all that lets cached code find a function again
        context.active_code_library._reload_init.add(_Link(ABI))
        kinds = arguments or [types.int64] * len(signature.args[0])
        given = cgutils.unpack_tuple(builder, values[0])
        given = [
            context.cast(builder, value, kind, wanted)
            for value, kind, wanted in zip(given, signature.args[0], kinds, strict=True)
        ]
        if by_address:
            words = cgutils.alloca_once(builder, ir.ArrayType(_I64, len(given)))
            for i, word in enumerate(given):
                builder.store(word, cgutils.gep_inbounds(builder, words, 0, i))
            given = [builder.ptrtoint(words, _I64)]
        returned = ir.VoidType() if result == types.void else context.get_value_type(result)
        kind = ir.FunctionType(returned, [value.type for value in given])
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), given)
        return context.get_dummy_value() if result == types.void else found

    @intrinsic
    def call(typing_context, values):
        return result(values), codegen

    return call


@intrinsic
def _address(typing_context, array):
    """Where an array is. It is freed after its last use: `_keep` it as long as this is used."""

    def codegen(context, builder, signature, values):
        data = context.make_array(array)(context, builder, values[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), codegen


@intrinsic
def _keep(typing_context, array):
    def codegen(context, builder, signature, values):
        return context.get_dummy_value()

    return types.void(array), codegen


# Arrays as rows


@_inline
def _axis_of(axis, ndim):
    if axis < -ndim or axis >= ndim:
        raise ValueError("axis is out of bounds for the number of dimensions")
    return axis % ndim


@_inline
def _merged(shape, axis, size):
    """(outer, classes, inner) of a contiguous array, and their strides."""
    outer = inner = 1
    for k in range(len(shape)):
        if k < axis:
            outer *= shape[k]
        elif k > axis:
            inner *= shape[k]
    classes = shape[axis]
    return (outer, classes, inner), (classes * inner * size, inner * size, size)


@_inline
def _apart(shape, strides, axis):
    """The same of an array of up to three dimensions."""
    outer = inner = 1
    far = near = 0
    for k in range(len(shape)):
        if k != axis:
            outer, far, inner, near = inner, near, shape[k], strides[k]
    return (outer, shape[axis], inner), (far, strides[axis], near)


@_inline
def _without(shape, axis):
    """The shape of the rows."""
    rows = shape[1:]
    for k in range(axis):
        rows = tuple_setitem(rows, k, shape[k])
    return rows


@_inline
def _words(x, out, value, labels, sizes, strides, out_strides, value_size, ignore_index, scale):
    """`PlainRows` of exported.hpp: addresses, and what they are of."""
    of_values, of_labels = (sizes[2] * value_size, value_size), (sizes[2] * 8, 8)
    bits = np.float64(scale).view(np.int64)
    addresses, options = (x, out, value, labels), (ignore_index, bits)
    return (*addresses, *sizes, *strides, *out_strides, *of_values, *of_labels, *options)


@_inline
def _check_memory(status):
    if status != 0:
        raise MemoryError("fastll: no memory for the buffers of a kernel")


# Types of arguments


def _given(argument):
    """An argument whose value may be known: a Python value; otherwise its type."""
    if isinstance(argument, types.Omitted):
        return argument.value
    if isinstance(argument, types.NoneType):
        return None
    return argument.literal_value if isinstance(argument, types.Literal) else argument


def _constant(function, name, argument, *choices):
    """The value of an argument that must be a constant."""
    value = _given(argument)
    if not any(value is choice or (value == choice and isinstance(value, str)) for choice in choices):
        expected = " or ".join(map(repr, choices))
        found = f"of type {value}" if isinstance(value, types.Type) else repr(value)
        raise TypingError(f"{function}: {name} is {found}; expected a constant, {expected}")
    return value


def _refuse(function, **arguments):
    """Refuse arguments other than their defaults, (argument, default)."""
    for name, (argument, default) in arguments.items():
        value = _given(argument)
        if value is not default and value != default:
            raise TypingError(f"{function}: {name} is not supported in Numba code; expected {default}")


def _check_integer(function, name, argument, optional=False):
    argument = _given(argument)
    if isinstance(argument, int) and not isinstance(argument, bool):
        return
    if isinstance(argument, types.Integer) or (optional and argument is None):
        return
    expected = "an integer or None" if optional else "an integer"
    raise TypingError(f"{function}: {name} is {argument}; expected {expected}")


def _element(function, name, argument):
    """What an array or a number is computed in."""
    kind = argument.dtype if isinstance(argument, types.Array) else types.unliteral(argument)
    if kind in (types.float32, types.float64):
        return kind
    if isinstance(kind, types.Integer | types.Boolean):
        return types.float64
    raise TypingError(
        f"{function}: {name} is {argument}; expected float32 or float64 (integers and bools are taken "
        "as float64)"
    )


def _element_of_array(function, name, argument):
    if not isinstance(argument, types.Array) or argument.ndim == 0:
        raise TypingError(
            f"{function}: {name} is {argument}; expected an array of at least one dimension"
        )
    return _element(function, name, argument)


def _flat(array, element):
    """A function that makes an array a C-contiguous one of a type; the same if it is one."""
    if array.dtype != element:
        dtype = np.dtype(element.name)
        return _inline(lambda a: np.ascontiguousarray(a).astype(dtype))
    if array.layout == "C":
        return _inline(lambda a: a)
    return _inline(lambda a: np.ascontiguousarray(a))


def _prepared(array, element):
    """A function that makes an array one that kernels take, and a function that says how it lies."""
    if array.dtype == element and array.layout != "C" and array.ndim <= 3:
        return _inline(lambda a: a), _inline(lambda a, axis: _apart(a.shape, a.strides, axis))
    return _flat(array, element), _inline(lambda a, axis: _merged(a.shape, axis, a.itemsize))


# Functions

_ADDRESS = types.int64


@overload(fastll.logsumexp, prefer_literal=True)
def _logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False, out=None):
    element = _element_of_array("logsumexp", "a", a)
    _check_integer("logsumexp", "axis", axis, optional=True)
    keeps = _constant("logsumexp", "keepdims", keepdims, False, True)
    _refuse("logsumexp", b=(b, None), return_sign=(return_sign, False), out=(out, None))
    ndim, whole, dtype = a.ndim, _given(axis) is None, np.dtype(element.name)

    if whole or ndim == 1:
        row = _function("logsumexp_row", element, element, _ADDRESS, types.intp)
        flat, ones = _flat(a, element), (1,) * ndim

        def reduce(a, axis):
            if not whole:
                _axis_of(axis, ndim)
            x = flat(a)
            value = row((_address(x), x.size))
            _keep(x)
            return value

        reduce = _inline(reduce)
        finish = _inline(lambda value: np.full(ones, value, dtype) if keeps else value)
    else:
        rows = _function("logsumexp_rows", element, types.int64, by_address=True)
        prepare, lies = _prepared(a, element)
        size = dtype.itemsize
        rows_of = _inline(lambda shape, axis: tuple_setitem(shape, axis, 1)) if keeps else _without

        def reduce(a, axis):
            axis = _axis_of(axis, ndim)
            x = prepare(a)
            sizes, strides = lies(x, axis)
            values = np.empty(rows_of(x.shape, axis), dtype)
            at = _words(_address(x), 0, _address(values), 0, sizes, strides, strides, size, 0, 0.0)
            _check_memory(rows(at))
            _keep(x)
            return values

        reduce = _inline(reduce)
        finish = _inline(lambda values: values)

    def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False, out=None):
        return finish(reduce(a, axis))

    return logsumexp


def _output(function, element, x, out):
    """A function that returns the output, in the shape of x: a new array, or `out`."""
    given, dtype = _given(out), np.dtype(element.name)
    if given is None:
        return _inline(lambda x, out: np.empty(x.shape, dtype))
    fits = isinstance(given, types.Array) and given.dtype == element and given.ndim == x.ndim
    if not (fits and given.layout == "C" and given.mutable):
        expected = f"a C-contiguous, writable array of {element} with {x.ndim} dimensions, or None"
        raise TypingError(f"{function}: out is {given}; expected {expected}")

    def checked(x, out):
        if out.shape != x.shape:
            raise ValueError("out has another shape than x")
        return out

    return _inline(checked)


def _softmax_of(name, function):
    @overload(function, prefer_literal=True)
    def _softmax(x, axis=-1, out=None):
        element = _element_of_array(name, "x", x)
        _check_integer(name, "axis", axis, optional=True)
        output, ndim, whole = _output(name, element, x, out), x.ndim, _given(axis) is None

        if whole or ndim == 1:
            row = _function(f"{name}_row", element, types.void, _ADDRESS, types.intp, _ADDRESS)
            flat = _flat(x, element)

            def softmax(x, axis=-1, out=None):
                if not whole:
                    _axis_of(axis, ndim)
                a, result = flat(x), output(x, out)
                row((_address(a), a.size, _address(result)))
                _keep(a)
                return result

            return softmax

        rows = _function(f"{name}_rows", element, types.int64, by_address=True)
        prepare, lies = _prepared(x, element)

        def softmax_of_rows(x, axis=-1, out=None):
            at = _axis_of(axis, ndim)
            a, result = prepare(x), output(x, out)
            (sizes, strides), (_, out_strides) = lies(a, at), lies(result, at)
            words = _words(_address(a), _address(result), 0, 0, sizes, strides, out_strides, 0, 0, 0.0)
            _check_memory(rows(words))
            _keep(a)
            return result

        return softmax_of_rows


_softmax_of("softmax", fastll.softmax)
_softmax_of("log_softmax", fastll.log_softmax)


@_inline
def _count_kept(labels, classes, ignore_index):
    """How many labels are not ignored."""
    kept = bad = 0
    for label in labels:  # no early exit, so that the loop vectorises
        kept += label != ignore_index
        bad += (label != ignore_index) & ((label < 0) | (label >= classes))
    if bad:
        raise IndexError("target has a label that is neither in [0, classes) nor ignore_index")
    return kept


@overload(fastll.cross_entropy, prefer_literal=True)
def _cross_entropy(
    logits,
    target,
    axis=-1,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    sample_weight=None,
    reduction="mean",
    return_lse=False,
    return_grad=False,
    grad_out=None,
):
    element = _element_of_array("cross_entropy", "logits", logits)
    ndim, dtype = logits.ndim, np.dtype(element.name)
    is_array = isinstance(target, types.Array)
    kind, rank = (target.dtype, target.ndim) if is_array else (types.unliteral(target), 0)
    if not isinstance(kind, types.Integer) or rank != ndim - 1:
        expected = f"an array of integers with {ndim - 1} dimensions" if ndim > 1 else "an integer"
        raise TypingError(
            f"cross_entropy: target is {target}; expected {expected}, as logits is {logits}"
        )
    _check_integer("cross_entropy", "axis", axis)
    _check_integer("cross_entropy", "ignore_index", ignore_index)
    how = _constant("cross_entropy", "reduction", reduction, "mean", "sum", "none")
    gives_grad = _constant("cross_entropy", "return_grad", return_grad, False, True)
    _refuse(
        "cross_entropy",
        weight=(weight, None),
        label_smoothing=(label_smoothing, 0.0),
        z_loss=(z_loss, 0.0),
        softcap=(softcap, None),
        sample_weight=(sample_weight, None),
        return_lse=(return_lse, False),
        grad_out=(grad_out, None),
    )
    means, number, size = how == "mean", dtype.type, dtype.itemsize
    new_grad = _inline(lambda x: np.empty(x.shape, dtype)) if gives_grad else _inline(lambda x: x)
    where = _inline(lambda grad: _address(grad)) if gives_grad else _inline(lambda grad: np.int64(0))

    if ndim == 1:
        row = _function(
            "cross_entropy_row", element, element, _ADDRESS, types.intp, types.int64, _ADDRESS
        )
        flat = _flat(logits, element)
        label_of = _inline(lambda target: target[()]) if is_array else _inline(lambda target: target)

        def losses_of(logits, target, axis, ignore_index):
            _axis_of(axis, 1)
            x, label = flat(logits), np.int64(label_of(target))
            kept, grad = _count_kept((label,), x.size, ignore_index), new_grad(x)
            loss = row((_address(x), x.size, label if kept else np.int64(-100), where(grad)))
            _keep(x)
            return loss, grad, kept

        total = _inline(lambda loss: loss)
    else:
        rows = _function("cross_entropy_rows", element, types.int64, by_address=True)
        prepare, lies = _prepared(logits, element)
        labels_of = _flat(target, types.int64)

        def losses_of(logits, target, axis, ignore_index):
            at = _axis_of(axis, ndim)
            x, labels = prepare(logits), labels_of(target)
            if labels.shape != _without(x.shape, at):
                raise ValueError("target has another shape than the rows of logits")
            kept, grad = _count_kept(labels.reshape(-1), x.shape[at], ignore_index), new_grad(x)
            losses, scale = np.empty(labels.shape, dtype), 1.0 / kept if means else 1.0
            (sizes, strides), (_, grad_strides) = lies(x, at), lies(grad, at)
            addresses = _address(x), where(grad), _address(losses), _address(labels)
            words = _words(*addresses, sizes, strides, grad_strides, size, ignore_index, scale)
            _check_memory(rows(words))
            _keep(x)
            _keep(labels)
            return losses, grad, kept

        def total(losses):
            added = 0.0
            for loss in losses.reshape(-1):
                added += loss
            return added

    losses_of, total = _inline(losses_of), _inline(total)
    if how == "none":
        reduce = _inline(lambda losses, kept: losses)
    elif means:
        reduce = _inline(lambda losses, kept: number(total(losses) / kept))
    else:
        reduce = _inline(lambda losses, kept: number(total(losses)))

    def cross_entropy(
        logits,
        target,
        axis=-1,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
        softcap=None,
        sample_weight=None,
        reduction="mean",
        return_lse=False,
        return_grad=False,
        grad_out=None,
    ):
        losses, grad, kept = losses_of(logits, target, axis, ignore_index)
        return give(reduce(losses, kept), grad)

    give = _inline(lambda loss, grad: (loss, grad)) if gives_grad else _inline(lambda loss, grad: loss)
    return cross_entropy


def _number_function(name, function):
    @overload(function)
    def _of_numbers(x, out=None):
        from fastll.backend.numba.maths import formulas

        element = _element(name, "x", x)
        formula, number = getattr(formulas, name), np.dtype(element.name).type
        if not isinstance(x, types.Array):
            _refuse(name, out=(out, None))
            return lambda x, out=None: formula(number(x))
        output = _output(name, element, x, out)

        def of_array(x, out=None):
            result = output(x, out)
            numbers = result.reshape(-1)
            for i, value in enumerate(x.flat):
                numbers[i] = formula(number(value))
            return result

        return of_array


_number_function("sigmoid", fastll.sigmoid)
_number_function("log_sigmoid", fastll.log_sigmoid)
