"""Vectors of a fixed number of lanes as values in Numba code.

A `Vector` is an LLVM vector of 128 bytes: 32 float32 or 16 float64, whatever the CPU has; LLVM makes
of it what the registers hold. So the code is vector code by construction, not by an optimiser's leave,
and the order of every sum is the same on every machine.

Memory is named by address (an int64), since the arrays behind it may be of any dtype and strides.
All arithmetic is IEEE: no flag lets LLVM reorder or contract it.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
import operator
from functools import partial, wraps
from typing import NamedTuple

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

#: For functions that kernels call, which need no entry for Python or C. An option that is not given
#: is taken from the caller.
shared = partial(
    njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=False
)
#: For those of them that must vanish into their caller.
inline = partial(shared, forceinline=True)


def inlined(function, name):
    """A function that a factory made. As part of symbols, `name` tells it from others of the factory:

    code on disk comes from several processes, each of which numbers its functions in its own order.
    """
    function.__qualname__ = name
    return inline(function)


def shared_as(function, name):
    """The same of one that stays a function of its own."""
    function.__qualname__ = name
    return shared(function)


def phase(function):
    """A large function, which Numba copies into its caller: with others it is compiled only there."""
    return njit(inline="always", error_model="numpy")(function)


#: Bytes from what is read or written to what is prefetched.
AHEAD = 2048

_I8, _I32, _I64, _DOUBLE = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()

_FEATURES = get_host_cpu_features()
#: Bytes of a register. What keeps many vectors at a time has them of this size, not of 128.
REGISTER = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16


class _Format(NamedTuple):
    """Of a floating type: sizes, and the representations of numbers as integers."""

    lanes: int
    bits: int
    mantissa: int
    bias: int
    root: int  # the smallest number that is at least sqrt(1/2)
    whole: int  # 1.5 * 2**mantissa: with a whole number added, its low bits are that number


_FORMATS = {
    ir.FloatType(): _Format(32, 32, 23, 127, 0x3F3504F4, 0x4B400000),
    _DOUBLE: _Format(16, 64, 52, 1023, 0x3FE6A09E667F3BCD, 0x4338000000000000),
}


class Vector(types.Type):
    """A vector of numbers of one type, by default as many as fill 128 bytes."""

    def __init__(self, element, lanes=None):
        element_ir = ir.FloatType() if element == types.float32 else _DOUBLE
        self.element = element
        self.ir = ir.VectorType(element_ir, lanes or _FORMATS[element_ir].lanes)
        super().__init__(name=f"Vector({element}, {self.ir.count})")


class Model(models.PrimitiveModel):
    """How values of a type that has an `ir` are represented."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.ir)


register_model(Vector)(Model)


def register_of(element):
    """The type of vectors that fill a register."""
    return Vector(element, REGISTER * 8 // element.bitwidth)


def lanes_in_register(element_ir):
    """How many lanes such a vector has."""
    return REGISTER * 8 // _FORMATS[element_ir].bits


def emitted(result):
    """A function for kernels out of emit(builder, *values), which emits its code.

    The type of what it returns is result(*types) of its arguments; nothing where `result` is None.
    """

    def decorate(emit):
        @wraps(emit)  # Numba reads the arguments off the signature, beginning with the second
        def typed(typing_context, *arguments):
            kind = types.none if result is None else result(*arguments)

            def codegen(context, builder, signature, values):
                value = emit(builder, *values)
                return context.get_dummy_value() if kind == types.none else value

            return None if kind is None else (kind(*arguments), codegen)

        return intrinsic(typed)

    return decorate


@emitted(None)
def out_of_line(builder):
    """Keep the function that calls this from being inlined: loops there need its registers."""
    builder.function.attributes.add("noinline")


def _common(*arguments):
    """The type of the vectors among arguments, if all the others are single elements of one."""
    vector = next((a for a in arguments if isinstance(a, Vector)), None)
    if vector is None or any(a not in (vector, vector.element) for a in arguments):
        return None
    return vector


def _splat(builder, value, lanes):
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _lanes([0] * lanes))


def _splatted(builder, values):
    """Values of types that have a `_common` one as vectors."""
    lanes = next((v.type.count for v in values if isinstance(v.type, ir.VectorType)), 0)
    if not lanes:
        return values
    return [v if isinstance(v.type, ir.VectorType) else _splat(builder, v, lanes) for v in values]


def _common_or_number(*arguments):
    """`_common`, or the type of numbers alone."""
    return _common(*arguments) or (arguments[0] if len(set(arguments)) == 1 else None)


def elementwise(emit):
    """`emitted` for a function of vectors of one type, or elements of it, to one; or of numbers."""
    emit_all = wraps(emit)(lambda builder, *values: emit(builder, *_splatted(builder, values)))
    return emitted(_common_or_number)(emit_all)


def _arithmetic(symbol, instruction):
    """An operator of vectors, likewise. (An `overload` takes a compilation for each pair of types.)"""

    @infer_global(symbol)
    class Arithmetic(AbstractTemplate):
        def generic(self, arguments, keywords):
            vector = _common(*arguments)
            return vector and vector(*arguments)

    @lower_builtin(symbol, Vector, Vector)
    @lower_builtin(symbol, Vector, types.Float)
    @lower_builtin(symbol, types.Float, Vector)
    def lower(context, builder, signature, values):
        return getattr(builder, instruction)(*_splatted(builder, values))


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


def _lanes(numbers):
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


def _llvm(builder, name, result, *arguments):
    """Call a function of LLVM's."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _element(v):
    return v.type.element if isinstance(v.type, ir.VectorType) else v.type


def _code(v):
    """The type of a vector or a number as LLVM's names of functions have it."""
    lanes = f"v{v.type.count}" if isinstance(v.type, ir.VectorType) else ""
    return f"{lanes}f{_FORMATS[_element(v)].bits}"


# Lane by lane, or of numbers alone


def _select(comparison):
    """where(a <comparison> b, then, otherwise), false for NaN."""

    def where(builder, a, b, then, otherwise):
        return builder.select(builder.fcmp_ordered(comparison, a, b), then, otherwise)

    return elementwise(where)


where_eq = _select("==")
where_gt = _select(">")
where_ge = _select(">=")


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fma(builder, a, b, c):
    return _llvm(builder, f"llvm.fma.{_code(a)}", a.type, a, b, c)


fma = elementwise(_fma)

#: The larger one; `b` where either is NaN.
maximum = elementwise(larger)

absolute = elementwise(lambda builder, a: _llvm(builder, f"llvm.fabs.{_code(a)}", a.type, a))


@emitted(lambda coefficients, x: x)
def horner(builder, coefficients, x):
    """The polynomial with a tuple of coefficients, from the highest power on."""
    coefficients = cgutils.unpack_tuple(builder, coefficients)
    _, result, *others = _splatted(builder, [x, *coefficients])
    for coefficient in others:
        result = _fma(builder, result, x, coefficient)
    return result


def _integers(v, number):
    """An integer of the size of v, or a vector of integers, of the size of its elements."""
    kind = ir.IntType(_FORMATS[_element(v)].bits)
    if not isinstance(v.type, ir.VectorType):
        return kind(number)
    return ir.Constant(ir.VectorType(kind, v.type.count), [number] * v.type.count)


def _exponent(builder, x):
    """The integers n where x = 2**n f with sqrt(1/2) <= f < sqrt(2)."""
    form = _FORMATS[_element(x)]
    root = _integers(x, form.root)
    above = builder.sub(builder.bitcast(x, root.type), root)
    return builder.ashr(above, _integers(x, form.mantissa))


@elementwise
def exponent(builder, x):
    """n where x = 2**n f with sqrt(1/2) <= f < sqrt(2)."""
    whole = _integers(x, _FORMATS[_element(x)].whole)
    sum_with_whole = builder.bitcast(builder.add(_exponent(builder, x), whole), x.type)
    return builder.fsub(sum_with_whole, builder.bitcast(whole, x.type))


@elementwise
def downscale(builder, x):
    """2**-n for the n of `exponent`."""
    form = _FORMATS[_element(x)]
    biased = builder.sub(_integers(x, form.bias), _exponent(builder, x))
    return builder.bitcast(builder.shl(biased, _integers(x, form.mantissa)), x.type)


@elementwise
def exponent_bits(builder, x):
    """The low bits of a number's representation as its sign and exponent, the rest zero."""
    shift = _integers(x, _FORMATS[_element(x)].mantissa)
    return builder.bitcast(builder.shl(builder.bitcast(x, shift.type), shift), x.type)


# Between types


@emitted(Vector)
def splat(builder, value):
    """The vector with `value` in every lane."""
    return _splat(builder, value, _FORMATS[value.type].lanes)


@emitted(register_of)
def in_register(builder, value):
    """The same in a register."""
    return _splat(builder, value, lanes_in_register(value.type))


@emitted(lambda v, number: v)
def filled(builder, v, number):
    """The vector like v with a float64, or a number of its own type, in every lane."""
    element = v.type.element
    if number.type != element:
        number = builder.fptrunc(number, element)
    return _splat(builder, number, v.type.count)


def _widened(builder, v):
    wide = ir.VectorType(_DOUBLE, v.type.count)
    return v if v.type == wide else builder.fpext(v, wide)


@emitted(lambda v: Vector(types.float64, v.ir.count))
def widen(builder, v):
    """The same lanes in float64."""
    return _widened(builder, v)


@lower_cast(Vector, Vector)
def _to_lanes_of(context, builder, kind, result, v):
    if kind == result:
        return v
    return (
        builder.fpext(v, result.ir)
        if result.element == types.float64
        else builder.fptrunc(v, result.ir)
    )


@lower_cast(types.Float, Vector)
def _to_lanes(context, builder, kind, result, number):
    return _splat(builder, number, result.ir.count)


def _cast_type(value, like):
    element = like.element if isinstance(like, Vector) else like
    return Vector(element, value.ir.count) if isinstance(value, Vector) else element


@emitted(_cast_type)
def cast(builder, value, like):
    """A float64, or a vector of them, with the numbers of the type of `like`."""
    kind = _element(like)
    if kind == _DOUBLE:
        return value
    return builder.fptrunc(
        value, kind if value.type == _DOUBLE else ir.VectorType(kind, value.type.count)
    )


@emitted(lambda a, b: types.boolean)
def all_greater(builder, a, b):
    """Whether a > b in all lanes, of which one has a vector of them."""
    a, b = _splatted(builder, (a, b))
    bits = ir.IntType(a.type.count)
    return builder.icmp_signed("==", builder.bitcast(builder.fcmp_ordered(">", a, b), bits), bits(-1))


@emitted(lambda v: v.element)
def first(builder, v):
    """The first lane."""
    return builder.extract_element(v, _I32(0))


def _mask(builder, count, v):
    """The first `count` (int64) lanes of a vector such as v."""
    limit = _splat(builder, builder.trunc(count, _I32), v.type.count)
    return builder.icmp_signed("<", _lanes(range(v.type.count)), limit)


@emitted(lambda v, count: v)
def first_lanes(builder, v, count):
    """The first `count` lanes; 0 in the others."""
    return builder.select(_mask(builder, count, v), v, ir.Constant(v.type, None))


def shuffled(builder, a, b, lanes):
    """A vector of some of the lanes of two, those of b being numbered after those of a."""
    return builder.shuffle_vector(a, b, _lanes(lanes))


def _both_halves(builder, v):
    """The lower half of the lanes, and the upper one."""
    half = v.type.count // 2
    return (shuffled(builder, v, v, range(at, at + half)) for at in (0, half))


def _halves(builder, v, combine, left=1):
    """Fold the upper half of the lanes onto the lower until so many are left."""
    while v.type.count > left:
        v = combine(*_both_halves(builder, v))
    return v if left > 1 else builder.extract_element(v, _I32(0))


def _to_register(combine):
    """A function that folds the lanes of a vector by halves until they fit into a register."""

    def fold(builder, v):
        return _halves(builder, v, partial(combine, builder), lanes_in_register(v.type.element))

    return emitted(lambda v: register_of(v.element))(fold)


register_total, register_largest = _to_register(ir.IRBuilder.fadd), _to_register(larger)


@emitted(lambda v: Vector(v.element, v.ir.count // 2))
def lower_half(builder, v):
    """The lower half of the lanes."""
    return next(_both_halves(builder, v))


@emitted(lambda v, top: top)
def raised(builder, v, top):
    """The largest of lanes of `top` and the lanes of both halves of v, of which NaN are passed over."""
    for half in _both_halves(builder, v):
        top = larger(builder, half, top)
    return top


@emitted(lambda v: types.float64)
def total(builder, v):
    """The sum of the lanes, in float64, by halves."""
    return _halves(builder, _widened(builder, v), builder.fadd)


@emitted(lambda v: v.element)
def narrow_total(builder, v):
    """The same in their own type: of exponentials, which are no infinite sum."""
    return _halves(builder, v, builder.fadd)


@emitted(lambda v: v.element)
def largest(builder, v):
    """The largest of the lanes, none of which is NaN."""
    return _halves(builder, v, partial(larger, builder))


@emitted(lambda v: types.int64)
def lanes_of(builder, v):
    """The number of lanes of a vector, or of the vectors of a scalar's type."""
    return _I64(v.type.count if isinstance(v.type, ir.VectorType) else _FORMATS[v.type].lanes)


@emitted(lambda v: types.int64)
def size_of(builder, v):
    """The size in bytes of a number, or of one lane of a vector."""
    return _I64(_FORMATS[_element(v)].bits // 8)


@emitted(lambda v: types.int64)
def bytes_of(builder, v):
    """The size in bytes of a vector."""
    return _I64(v.type.count * _FORMATS[v.type.element].bits // 8)


@emitted(
    lambda address, ignored, classes, like: types.UniTuple(Vector(types.float64, like.ir.count), 3)
)
def classified(builder, address, ignored, classes, like):
    """As many labels as `like` has lanes, as numbers; -1 where they are no class.

    Then 0 where they are ignored, else 1; and NaN where they are neither that nor a class, else 1.
    """
    count = like.type.count
    kind, wide = ir.VectorType(_I64, count), ir.VectorType(_DOUBLE, count)
    y = builder.load(pointer(builder, address, kind), align=1)
    kept = builder.icmp_signed("!=", y, _splat(builder, ignored, count))
    inside = builder.icmp_unsigned("<", y, _splat(builder, classes, count))
    known = builder.and_(kept, inside)
    # as the last bits of 2**52, which are whole numbers
    least = ir.Constant(wide, [2.0**52] * count)
    digits = builder.bitcast(builder.or_(y, builder.bitcast(least, kind)), wide)
    number = {x: ir.Constant(wide, [x] * count) for x in (-1.0, 0.0, 1.0, math.nan)}
    y = builder.select(known, builder.fsub(digits, least), number[-1.0])
    unknown = builder.and_(kept, builder.not_(inside))
    results = (
        y,
        builder.select(kept, number[1.0], number[0.0]),
        builder.select(unknown, number[math.nan], number[1.0]),
    )
    return cgutils.pack_array(builder, results)


# Memory


def pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@emitted(lambda address, like: like)
def read(builder, address, like):
    """The number or the vector of the type of `like` at `address`."""
    return builder.load(pointer(builder, address, like.type), align=1)


@emitted(None)
def write(builder, address, value):
    """Write a number or a vector at `address`."""
    builder.store(value, pointer(builder, address, value.type), align=1)


@emitted(None)
def copy(builder, source, target, size):
    """Copy some bytes."""
    arguments = pointer(builder, target, _I8), pointer(builder, source, _I8), size, ir.IntType(1)(0)
    _llvm(builder, "llvm.memcpy.p0i8.p0i8.i64", ir.VoidType(), *arguments)


@emitted(lambda address, count, pad: pad)
def _read_some(builder, address, count, pad):
    name = f"llvm.masked.load.{_code(pad)}.p0{_code(pad)}"
    at, mask = pointer(builder, address, pad.type), _mask(builder, count, pad)
    return _llvm(builder, name, pad.type, at, _I32(1), mask, pad)


@emitted(None)
def _write_some(builder, address, count, v):
    name = f"llvm.masked.store.{_code(v)}.p0{_code(v)}"
    at, mask = pointer(builder, address, v.type), _mask(builder, count, v)
    _llvm(builder, name, ir.VoidType(), v, at, _I32(1), mask)


@inline
def load(address, count, pad):
    """The numbers at `address`; beyond the first `count`, those of `pad`."""
    return read(address, pad) if count >= lanes_of(pad) else _read_some(address, count, pad)


@inline
def store(address, count, v):
    """Write the first `count` lanes."""
    if count >= lanes_of(v):
        write(address, v)
    else:
        _write_some(address, count, v)


@emitted(None)
def stream(builder, address, v):
    """Write a vector past the caches: that reads nothing, where a plain store reads the line first.

    The address is that of a line of the cache.
    """
    written = builder.store(v, pointer(builder, address, v.type), align=64)
    written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


@emitted(None)
def stream_fence(builder):
    """What was streamed is in memory before whatever is written next."""
    builder.fence("seq_cst")


@emitted(None)
def prefetch(builder, address):
    """Ask for the cache line of an address, which may lie beyond any array."""
    at, settings = pointer(builder, address, _I8), (_I32(0), _I32(3), _I32(1))
    _llvm(builder, "llvm.prefetch.p0i8", ir.VoidType(), at, *settings)  # to read, to keep, data


@inline
def prefetch_vector(address):
    """Ask for the two cache lines of a vector. The CPU's own prefetcher is late for our loops."""
    prefetch(address)
    prefetch(address + 64)


@inline
def load_ahead(address, count, pad):
    """`load` in a walk through memory."""
    prefetch_vector(address + AHEAD)
    return load(address, count, pad)


@emitted(None)
def call(builder, function, source, source_stride, destination, destination_stride, count):
    """Call the C function at an address with five int64."""
    arguments = source, source_stride, destination, destination_stride, count
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 5)
    builder.call(pointer(builder, function, kind), arguments)
