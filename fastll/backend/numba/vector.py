"""Vectors of a fixed number of lanes as values in Numba code.

A `Vector` is an LLVM vector of 128 bytes: 32 float32 or 16 float64, whatever the CPU has; LLVM makes
of it what the registers hold. So the code is vector code by construction, not by an optimiser's leave,
and the order of every sum is the same on every machine.

Memory is named by address (an int64), since the arrays behind it may be of any dtype and strides.
All arithmetic is IEEE: no flag lets LLVM reorder or contract it.
"""

# mypy: ignore-errors

from __future__ import annotations

import operator
from typing import NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

#: For functions that must vanish into their caller, and so need no entry for Python or C.
INLINE = {
    "forceinline": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def inlined(function, name):
    """A function that a factory made. As part of symbols, `name` tells it from others of the factory:

    code on disk comes from several processes, each of which numbers its functions in its own order.
    """
    function.__qualname__ = name
    return njit(**INLINE)(function)


def phase(function):
    """A large function, which Numba copies into its caller: with others it is compiled only there."""
    return njit(inline="always", error_model="numpy")(function)


def for_each(function, count):
    """A function that returns (function(0, *arguments), ..., function(count - 1, *arguments))."""
    name, at = f"{function.__qualname__}_{count}", count - 1
    if count == 0:
        return inlined(lambda *arguments: (), name)
    before = for_each(function, at)
    return inlined(lambda *arguments: (*before(*arguments), function(at, *arguments)), name)


#: Bytes from what is read or written to what is prefetched.
AHEAD = 2048

LANES = {types.float32: 32, types.float64: 16}

_I32 = ir.IntType(32)


class Vector(types.Type):
    """A vector of `lanes` numbers of one type."""

    def __init__(self, element, lanes):
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element}, {lanes})")

    @property
    def ir(self):
        return ir.VectorType(_ir_float(self.element), self.lanes)

    @property
    def ir_bits(self):
        return ir.VectorType(ir.IntType(self.element.bitwidth), self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.ir)


def _ir_float(element):
    return ir.FloatType() if element == types.float32 else ir.DoubleType()


def _natural(element):
    return Vector(element, LANES[element])


def _splat(builder, value, lanes):
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _lanes([0] * lanes))


def _lanes(numbers):
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


def _intrinsic_call(builder, name, result, arguments):
    """Call LLVM's intrinsic `name` at vector type `result`."""
    bits = 32 if isinstance(result.element, ir.FloatType) else 64
    signature = ir.FunctionType(result, [a.type for a in arguments])
    full_name = f"llvm.{name}.v{result.count}f{bits}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, full_name), arguments)


def _common(arguments):
    """The type of the vectors among arguments, if all the others are single elements of one."""
    vector = next((a for a in arguments if isinstance(a, Vector)), None)
    if vector is None or any(a not in (vector, vector.element) for a in arguments):
        return None
    return vector


def _splatted(builder, vector, kinds, values):
    return [
        value if kind == vector else _splat(builder, value, vector.lanes)
        for kind, value in zip(kinds, values, strict=True)
    ]


def _operation(arity, emit):
    """A function of `arity` vectors of one type, or elements of it, to one: emit(builder, *values)."""

    def typed(typing_context, *arguments):
        vector = _common(arguments)
        if vector is None:
            return None

        def codegen(context, builder, signature, values):
            return emit(builder, *_splatted(builder, vector, signature.args, values))

        return vector(*arguments), codegen

    # Numba reads the number of arguments off the signature
    return intrinsic(
        {
            1: lambda typing_context, a: typed(typing_context, a),
            2: lambda typing_context, a, b: typed(typing_context, a, b),
            3: lambda typing_context, a, b, c: typed(typing_context, a, b, c),
            4: lambda typing_context, a, b, c, d: typed(typing_context, a, b, c, d),
        }[arity]
    )


def _arithmetic(symbol, instruction):
    """An operator of vectors, likewise. (An `overload` takes a compilation for each pair of types.)"""

    @infer_global(symbol)
    class Arithmetic(AbstractTemplate):
        def generic(self, arguments, keywords):
            vector = _common(arguments)
            return vector and vector(*arguments)

    @lower_builtin(symbol, Vector, Vector)
    @lower_builtin(symbol, Vector, types.Float)
    @lower_builtin(symbol, types.Float, Vector)
    def lower(context, builder, signature, values):
        values = _splatted(builder, signature.return_type, signature.args, values)
        return getattr(builder, instruction)(*values)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _instruction)


def _select(comparison):
    """where(a <comparison> b, then, otherwise), false for NaN."""
    return _operation(
        4, lambda builder, a, b, x, y: builder.select(builder.fcmp_ordered(comparison, a, b), x, y)
    )


def _fma(builder, a, b, c):
    return _intrinsic_call(builder, "fma", a.type, (a, b, c))


where_eq = _select("==")
where_gt = _select(">")
where_ge = _select(">=")

fma = _operation(3, _fma)

#: The larger one; `b` where either is NaN.
maximum = _operation(2, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

absolute = _operation(1, lambda builder, a: _intrinsic_call(builder, "fabs", a.type, (a,)))

round_down = _operation(1, lambda builder, a: _intrinsic_call(builder, "floor", a.type, (a,)))


@intrinsic
def horner(typing_context, coefficients, x):
    """The polynomial with a tuple of coefficients, from the highest power on."""

    def codegen(context, builder, signature, values):
        first, *others = cgutils.unpack_tuple(builder, values[0])
        result = _splat(builder, first, x.lanes)
        for coefficient in others:
            result = _fma(builder, result, values[1], _splat(builder, coefficient, x.lanes))
        return result

    return x(coefficients, x), codegen


@intrinsic
def splat(typing_context, value):
    """The vector with `value` in every lane."""
    vector = _natural(value)

    def codegen(context, builder, signature, values):
        return _splat(builder, values[0], vector.lanes)

    return vector(value), codegen


@intrinsic
def exponent_bits(typing_context, v):
    """The low bits of a number's representation as its sign and exponent, the rest zero."""
    mantissa = 23 if v.element == types.float32 else 52

    def codegen(context, builder, signature, values):
        bits = builder.bitcast(values[0], v.ir_bits)
        shift = ir.Constant(v.ir_bits, [mantissa] * v.lanes)
        return builder.bitcast(builder.shl(bits, shift), v.ir)

    return v(v), codegen


class _Format(NamedTuple):
    """Of a floating type: widths, and the representations of numbers as integers."""

    bits: int
    mantissa: int
    bias: int
    root: int  # the smallest number that is at least sqrt(1/2)
    whole: int  # 1.5 * 2**mantissa: with a whole number added, its low bits are that number


_FORMATS = {
    ir.FloatType(): _Format(32, 23, 127, 0x3F3504F4, 0x4B400000),
    ir.DoubleType(): _Format(64, 52, 1023, 0x3FE6A09E667F3BCD, 0x4338000000000000),
}


def _by_exponent(emit):
    """A function of a vector x by n, where x = 2**n f with sqrt(1/2) <= f < sqrt(2).

    `emit` takes the builder, n as integers, a function to make such constants, and the format.
    """

    def by_exponent(builder, x):
        form, count = _FORMATS[x.type.element], x.type.count
        integers = ir.VectorType(ir.IntType(form.bits), count)

        def constant(number):
            return ir.Constant(integers, [number] * count)

        above = builder.sub(builder.bitcast(x, integers), constant(form.root))
        n = builder.ashr(above, constant(form.mantissa))
        return emit(builder, n, constant, form, x.type)

    return _operation(1, by_exponent)


def _exponent(builder, n, constant, form, kind):
    sum_with_whole = builder.bitcast(builder.add(n, constant(form.whole)), kind)
    return builder.fsub(sum_with_whole, builder.bitcast(constant(form.whole), kind))


def _downscale(builder, n, constant, form, kind):
    bits = builder.shl(builder.sub(constant(form.bias), n), constant(form.mantissa))
    return builder.bitcast(bits, kind)


#: n, and 2**-n, where x = 2**n f with sqrt(1/2) <= f < sqrt(2).
exponent = _by_exponent(_exponent)
downscale = _by_exponent(_downscale)


@intrinsic
def first_lanes(typing_context, v, count):
    """The first `count` lanes; 0 in the others."""

    def codegen(context, builder, signature, values):
        mask = _mask(builder, values[1], v.lanes)
        return builder.select(mask, values[0], ir.Constant(v.ir, [0.0] * v.lanes))

    return v(v, types.int64), codegen


@intrinsic
def first(typing_context, v):
    """The first lane."""

    def codegen(context, builder, signature, values):
        return builder.extract_element(values[0], _I32(0))

    return v.element(v), codegen


@intrinsic
def widen(typing_context, v):
    """The same lanes in float64."""
    wide = Vector(types.float64, v.lanes)

    def codegen(context, builder, signature, values):
        return values[0] if v == wide else builder.fpext(values[0], wide.ir)

    return wide(v), codegen


@intrinsic
def widen_lower(typing_context, v):
    """The lower half of the lanes in float64; all of them where they are."""
    return _widen_half(v, range(16))


@intrinsic
def widen_upper(typing_context, v):
    """The upper half of the lanes in float64; zeros where all are in the lower one."""
    return _widen_half(v, range(v.lanes - 16, v.lanes) if v.lanes > 16 else None)


def _widen_half(v, numbers):
    wide = Vector(types.float64, 16)

    def codegen(context, builder, signature, values):
        if numbers is None:
            return ir.Constant(wide.ir, [0.0] * 16)
        half = builder.shuffle_vector(values[0], values[0], _lanes(numbers))
        return half if v.element == types.float64 else builder.fpext(half, wide.ir)

    return wide(v), codegen


def _halves(builder, v, combine):
    """Fold the upper half of the lanes onto the lower until one is left."""
    count = v.type.count
    while count > 1:
        count //= 2
        low = builder.shuffle_vector(v, v, _lanes(range(count)))
        high = builder.shuffle_vector(v, v, _lanes(range(count, 2 * count)))
        v = combine(low, high)
    return builder.extract_element(v, _I32(0))


@intrinsic
def total(typing_context, v):
    """The sum of the lanes, in float64, by halves."""

    def codegen(context, builder, signature, values):
        (value,) = values
        if v.element == types.float32:
            value = builder.fpext(value, Vector(types.float64, v.lanes).ir)
        return _halves(builder, value, builder.fadd)

    return types.float64(v), codegen


@intrinsic
def largest(typing_context, v):
    """The largest of the lanes, none of which is NaN."""

    def codegen(context, builder, signature, values):
        def combine(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _halves(builder, values[0], combine)

    return v.element(v), codegen


def _mask(builder, count, lanes):
    """The first `count` (int64) lanes."""
    limit = _splat(builder, builder.trunc(count, _I32), lanes)
    return builder.icmp_signed("<", _lanes(range(lanes)), limit)


def _masked(builder, name, vector, arguments, result):
    """Call LLVM's masked load or store at a vector type."""
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    signature = ir.FunctionType(result, [a.type for a in arguments])
    full_name = f"llvm.masked.{name}.v{vector.count}f{bits}.p0v{vector.count}f{bits}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, full_name), arguments)


@intrinsic
def _load_all(typing_context, address, pad):
    def codegen(context, builder, signature, values):
        return builder.load(builder.inttoptr(values[0], pad.ir.as_pointer()), align=1)

    return pad(types.int64, pad), codegen


@intrinsic
def _load_some(typing_context, address, count, pad):
    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], pad.ir.as_pointer())
        mask = _mask(builder, values[1], pad.lanes)
        return _masked(builder, "load", pad.ir, (pointer, _I32(1), mask, values[2]), pad.ir)

    return pad(types.int64, types.int64, pad), codegen


@intrinsic
def _store_all(typing_context, address, v):
    def codegen(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], v.ir.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, v), codegen


@intrinsic
def stream(typing_context, address, v):
    """Write a vector past the caches: that reads nothing, where a plain store reads the line first.

    The address is that of a line of the cache.
    """

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], v.ir.as_pointer())
        store = builder.store(values[1], pointer, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.none(types.int64, v), codegen


@intrinsic
def stream_fence(typing_context):
    """What was streamed is in memory before whatever is written next."""

    def codegen(context, builder, signature, values):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def power(typing_context, n):
    """2**n for a whole number -1023 < n < 1024 in float64."""

    def codegen(context, builder, signature, values):
        i64 = ir.IntType(64)
        whole = builder.fptosi(builder.fadd(values[0], ir.Constant(ir.DoubleType(), 1023.0)), i64)
        return builder.bitcast(builder.shl(whole, i64(52)), ir.DoubleType())

    return types.float64(n), codegen


@intrinsic
def _store_some(typing_context, address, count, v):
    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], v.ir.as_pointer())
        mask = _mask(builder, values[1], v.lanes)
        _masked(builder, "store", v.ir, (values[2], pointer, _I32(1), mask), ir.VoidType())
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, v), codegen


@intrinsic
def lanes_of(typing_context, v):
    """The number of lanes of a vector, or of the vectors of a scalar's type."""
    lanes = v.lanes if isinstance(v, Vector) else LANES[v]

    def codegen(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), lanes)

    return types.int64(v), codegen


@intrinsic
def bytes_of(typing_context, v):
    """The size of a vector in memory."""

    def codegen(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), v.lanes * v.element.bitwidth // 8)

    return types.int64(v), codegen


@njit(**INLINE)
def load(address, count, pad):
    """The numbers at `address`; beyond the first `count`, those of `pad`."""
    if count >= lanes_of(pad):
        return _load_all(address, pad)
    return _load_some(address, count, pad)


@njit(**INLINE)
def store(address, count, v):
    """Write the first `count` lanes."""
    if count >= lanes_of(v):
        _store_all(address, v)
    else:
        _store_some(address, count, v)


@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line of an address, which may lie beyond any array."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
        builder.call(function, (pointer, _I32(0), _I32(3), _I32(1)))  # to read, to keep, data
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@njit(**INLINE)
def prefetch_vector(address):
    """Ask for the two cache lines of a vector. The CPU's own prefetcher is late for our loops."""
    prefetch(address)
    prefetch(address + 64)


@njit(**INLINE)
def load_ahead(address, count, pad):
    """`load` in a walk through memory."""
    prefetch_vector(address + AHEAD)
    return load(address, count, pad)


@intrinsic
def read(typing_context, address, like):
    """The scalar of the type of `like` at `address`."""

    def codegen(context, builder, signature, values):
        kind = context.get_value_type(like)
        return builder.load(builder.inttoptr(values[0], kind.as_pointer()), align=1)

    return like(types.int64, like), codegen


@intrinsic
def write(typing_context, address, value):
    """Write a scalar at `address`."""

    def codegen(context, builder, signature, values):
        kind = context.get_value_type(value)
        builder.store(values[1], builder.inttoptr(values[0], kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, value), codegen


@intrinsic
def call(typing_context, function, source, source_stride, destination, destination_stride, count):
    """Call the C function at an address with five int64."""
    arguments = (types.int64,) * 6

    def codegen(context, builder, signature, values):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i64] * 5)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.none(*arguments), codegen
