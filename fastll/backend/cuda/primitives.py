"""What kernels ask of the machine: memory by address, vectors of 16 bytes, words of two halves,
clusters, bits.

Everything else is arithmetic, so that this is all that a simulator has to replace. Memory is named by
its address, an int64. A factory makes the functions of one storage format of `fastll.dtypes.FORMATS`.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import wraps
from inspect import signature

import numpy as np
from llvmlite import ir

from fastll.backend.cuda.compiler import intrinsic, types
from fastll.dtypes import FORMATS

WARP = 32
#: Bytes of the widest access.
VECTOR = 16
#: Formats that are read and written by vectors.
FLOATS = ("float32", "float64", "float16", "bfloat16")

_SIZES = {name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in FORMATS}
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()


def size_of(name: str) -> int:
    """Bytes of an element of a format."""
    return _SIZES[name]


def lanes_of(name: str) -> int:
    """Elements of a vector."""
    return VECTOR // _SIZES[name]


def is_half(name: str) -> bool:
    """Whether a format is one of half precision."""
    return name in ("float16", "bfloat16")


def compute_type(name: str) -> type:
    """The NumPy type that the elements of a format are computed in; its name is that of a format."""
    return np.float32 if name == "float32" or is_half(name) else np.float64


def emits(result=None, **kinds):
    """Make an operation of kernels from the function (builder, values) that emits its instructions.

    `result` is the type of what it returns, by default that of the last value; `kinds` are those that
    values are converted to, by name. Of an array the function takes the pointer to its elements.
    """

    def decorate(emit):
        names = list(signature(emit).parameters)[1:]

        @intrinsic
        @wraps(emit)  # and with its signature
        def operation(typing_context, *given):
            def codegen(context, builder, signature, values):
                pointers = [
                    context.make_array(kind)(context, builder, value).data
                    if isinstance(kind, types.Array)
                    else value
                    for kind, value in zip(given, values, strict=True)
                ]
                value = emit(builder, *pointers)
                return context.get_dummy_value() if value is None else value

            expected = map(kinds.get, names, given)
            return (result or given[-1])(*expected), codegen

        return operation

    return decorate


def _asm(builder, result, code, constraints, *values, effects=False):
    """Instructions of PTX."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.asm(kind, code, constraints, values, effects)


def _pointer(builder, address, kind):
    return builder.inttoptr(address, ir.PointerType(kind, addrspace=1))


def _stored_type(name):
    return {"float32": _F32, "float64": _F64}.get(name) or ir.IntType(8 * _SIZES[name])


def _load(builder, address, name):
    return builder.load(_pointer(builder, address, _stored_type(name)), align=_SIZES[name])


def _decode(builder, name, bits):
    """A stored element as a number of its compute type."""
    if name == "float16":
        return builder.fpext(builder.bitcast(bits, _HALF), _F32)
    if name == "bfloat16":  # the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)
    if name in FLOATS:
        return bits
    return builder.uitofp(bits, _F64) if name.startswith("u") else builder.sitofp(bits, _F64)


def _encode(builder, name, value, modern=False):
    """To the nearest number of a floating format, ties to even; a NaN stays one.

    `modern`: compute capability 8 or more, which rounds to bfloat16 by one instruction.
    """
    if name == "float16":
        return builder.bitcast(builder.fptrunc(value, _HALF), _I16)
    if name != "bfloat16":
        return value
    if modern:
        return _asm(builder, _I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", value)
    bits = builder.bitcast(value, _I32)
    upper = builder.lshr(bits, _I32(16))
    odd = builder.and_(upper, _I32(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, builder.or_(upper, _I32(0x40)), rounded), _I16)


def _converted(builder, value, real):
    """A float32 or float64 as another type."""
    return builder.fpext(value, _F64) if real is np.float64 else builder.fptrunc(value, _F32)


def reader(name, real=None):
    """Function (address) of an element, as a number of `real`, by default its compute type."""
    real = real or compute_type(name)

    @emits(getattr(types, real.__name__), address=types.int64)
    def read(builder, address):
        return _converted(builder, _decode(builder, name, _load(builder, address, name)), real)

    return read


def writer(name, real=None, modern=False):
    """Function (address, number of `real`, by default the compute type) of an element."""

    @emits(types.none, address=types.int64, value=getattr(types, (real or compute_type(name)).__name__))
    def write(builder, address, value):
        bits = _encode(builder, name, _converted(builder, value, compute_type(name)), modern)
        builder.store(bits, _pointer(builder, address, bits.type), align=_SIZES[name])

    return write


def integer_reader(name):
    """Function (address) of an integer, as an int64; one beyond int64 is -1, which is no label."""

    @emits(types.int64, address=types.int64)
    def read(builder, address):
        value = _load(builder, address, name)
        if name == "uint64":
            return builder.select(builder.icmp_signed("<", value, _I64(0)), _I64(-1), value)
        return builder.zext(value, _I64) if name.startswith("u") else builder.sext(value, _I64)

    return read


def _element(builder, values, at, i):
    """Pointer to an element of an array, from which no memory is left once loops are unrolled."""
    return builder.gep(values, [builder.add(at, at.type(i))])


def vector_reader(name):
    """Function (values, at, address, wanted): a vector into values[at:]; if not wanted, 0.

    The load is one instruction under a predicate, without a branch, so that many are under way at once.
    """
    double = name == "float64"
    word, count, letter, kind = (_F64, 2, "d", "f64") if double else (_I32, 4, "r", "b32")
    words, zero = [f"${i}" for i in range(count)], "0d0000000000000000" if double else "0"
    code = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; "
    code += " ".join(f"mov.{kind} {word}, {zero};" for word in words)
    code += f" @p ld.global.v{count}.{kind} {{{', '.join(words)}}}, [${count}]; }}"
    constraints = f"=&{letter}," * count + "l,r"

    @emits(types.none, address=types.int64, wanted=types.boolean)
    def fetch(builder, values, at, address, wanted):
        struct = ir.LiteralStructType([word] * count)
        vector = _asm(builder, struct, code, constraints, address, builder.zext(wanted, _I32))
        numbers = [builder.extract_value(vector, i) for i in range(count)]
        if name == "float32":
            numbers = [builder.bitcast(number, _F32) for number in numbers]
        elif not double:
            numbers = [_half(builder, name, two, upper) for two in numbers for upper in (False, True)]
        for i, number in enumerate(numbers):
            builder.store(number, _element(builder, values, at, i))

    return fetch


def _half(builder, name, word, upper):
    """One of the two halves of a word, as a float32."""
    if name == "bfloat16" and upper:
        return builder.bitcast(builder.and_(word, _I32(0xFFFF0000)), _F32)
    bits = builder.lshr(word, _I32(16)) if upper else word
    return _decode(builder, name, builder.trunc(bits, _I16))


def vector_writer(name, modern=False):
    """Function (address, values, at): a vector from values[at:].

    `modern`: see `_encode`; two numbers at once.
    """

    @emits(types.none, address=types.int64)
    def deliver(builder, address, values, at):
        numbers = [builder.load(_element(builder, values, at, i)) for i in range(lanes_of(name))]
        vector = _packed(builder, name, numbers, modern)
        builder.store(vector, _pointer(builder, address, vector.type), align=VECTOR)

    return deliver


def _packed(builder, name, numbers, modern):
    """Numbers as a vector of stored elements, of words where there are two."""
    if name == "bfloat16" and modern and len(numbers) > 1:
        words = [
            _asm(builder, _I32, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", *two)
            for two in zip(numbers[::2], numbers[1::2], strict=True)
        ]
    else:
        words = [_encode(builder, name, number, modern) for number in numbers]
    vector = ir.Constant(ir.VectorType(words[0].type, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, _I32(i))
    if word.type == _I16 and len(words) > 1:
        vector = builder.bitcast(vector, ir.VectorType(_I32, len(words) // 2))
    return vector


# shared memory, by the number of a byte in it


def _shared(builder, memory, at, kind):
    """Pointer to what is at byte `at` of a shared array."""
    start = builder.addrspacecast(memory, ir.PointerType(memory.type.pointee, addrspace=3))
    start = builder.bitcast(start, ir.PointerType(ir.IntType(8), addrspace=3))
    return builder.bitcast(builder.gep(start, [at]), ir.PointerType(kind, addrspace=3))


def _vector_type(name, width):
    """So many bytes as they are loaded: numbers, or words of two halves, or one half."""
    if width == 2:
        return ir.VectorType(_I16, 1)
    kind = {"float32": _F32, "float64": _F64}.get(name, _I32)
    return ir.VectorType(kind, width // (8 if name == "float64" else 4))


def vector_copier(modern=False):
    """Function (memory, at, address): a vector from global memory; it is there after `wait_for_copies`.

    `modern`: compute capability 8 or more, which needs no registers on the way.
    """

    @emits(types.none, at=types.int32, address=types.int64)
    def copy(builder, memory, at, address):
        if not modern:
            kind = ir.VectorType(_I32, 4)
            vector = builder.load(_pointer(builder, address, kind), align=VECTOR)
            builder.store(vector, _shared(builder, memory, at, kind), align=VECTOR)
            return
        place = builder.ptrtoint(_shared(builder, memory, at, ir.IntType(8)), _I32)
        code = "cp.async.cg.shared.global [$0], [$1], 16;"
        _asm(builder, ir.VoidType(), code, "r,l,~{memory}", place, address, effects=True)

    return copy


@emits(types.none)
def wait_for_copies(builder):
    """Wait for what the thread itself has started to copy; compute capability 8 or more."""
    _asm(builder, ir.VoidType(), "cp.async.wait_all;", "~{memory}", effects=True)


# the same in bulk, compute capability 9: a thread starts the copy of a row, and all threads wait at a
# barrier in shared memory


@emits(types.none, at=types.int32, count=types.int32)
def expect_copies(builder, memory, at, count):
    """Make a barrier at byte `at` for the copies of `count` threads."""
    place = builder.ptrtoint(_shared(builder, memory, at, _I64), _I32)
    code = "mbarrier.init.shared::cta.b64 [$0], $1; fence.proxy.async.shared::cta;"
    _asm(builder, ir.VoidType(), code, "r,r,~{memory}", place, count, effects=True)


@emits(types.none, at=types.int32, to=types.int32, address=types.int64, count=types.int32)
def copy_row(builder, memory, at, to, address, count):
    """Start to copy `count` bytes, whole vectors, of which the barrier at byte `at` is told."""
    code = (
        "{ .reg .b64 s; .reg .pred p; setp.ne.u32 p, $3, 0;"
        " mbarrier.arrive.expect_tx.shared::cta.b64 s, [$0], $3;"
        " @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$0]; }"
    )
    places = [builder.ptrtoint(_shared(builder, memory, a, _I64), _I32) for a in (at, to)]
    _asm(builder, ir.VoidType(), code, "r,r,l,r,~{memory}", *places, address, count, effects=True)


@emits(types.none, at=types.int32)
def wait_for_rows(builder, memory, at):
    """Wait for all copies of the barrier at byte `at`."""
    place = builder.ptrtoint(_shared(builder, memory, at, _I64), _I32)
    code = (
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0; @!p bra again; }"
    )
    _asm(builder, ir.VoidType(), code, "r,~{memory}", place, effects=True)


def element_copier(name, lowest=False):
    """Function (memory, at, address, wanted): an element from global memory, or 0 or -inf."""
    kind = ir.IntType(8 * _SIZES[name])
    stored = {"bfloat16": "float32"}.get(name, name)  # of which it is the upper half
    pad = np.array(-np.inf if lowest else 0, stored)
    pad = int(pad.view(f"u{pad.itemsize}")) >> 8 * (pad.itemsize - _SIZES[name])

    @emits(types.none, at=types.int32, address=types.int64, wanted=types.boolean)
    def copy(builder, memory, at, address, wanted):
        target = _shared(builder, memory, at, kind)
        with builder.if_else(wanted) as (inside, outside):
            with inside:
                value = builder.load(_pointer(builder, address, kind), align=_SIZES[name])
                builder.store(value, target, align=_SIZES[name])
            with outside:
                builder.store(kind(pad), target, align=_SIZES[name])

    return copy


def shared_reader(name):
    """Function (memory, at) of an element, as a number of its compute type."""
    result = getattr(types, compute_type(name).__name__)

    @emits(result, at=types.int32)
    def read(builder, memory, at):
        bits = builder.load(_shared(builder, memory, at, _stored_type(name)), align=_SIZES[name])
        return _decode(builder, name, bits)

    return read


def shared_writer(name, modern=False):
    """Function (memory, at, number of the compute type) of an element."""

    @emits(types.none, at=types.int32, value=getattr(types, compute_type(name).__name__))
    def write(builder, memory, at, value):
        bits = _encode(builder, name, value, modern)
        builder.store(bits, _shared(builder, memory, at, bits.type), align=_SIZES[name])

    return write


def shared_vector_reader(name, width=VECTOR):
    """Function (values, memory, at): the numbers of a vector of `width` bytes."""
    kind = _vector_type(name, width)

    @emits(types.none, at=types.int32)
    def fetch(builder, values, memory, at):
        vector = builder.load(_shared(builder, memory, at, kind), align=width)
        numbers = [builder.extract_element(vector, _I32(i)) for i in range(kind.count)]
        if width == 2:
            numbers = [_decode(builder, name, number) for number in numbers]
        elif is_half(name):
            numbers = [_half(builder, name, two, upper) for two in numbers for upper in (False, True)]
        for i, number in enumerate(numbers):
            builder.store(number, _element(builder, values, _I64(0), i))

    return fetch


def shared_vector_writer(name, width=VECTOR, modern=False):
    """Function (values, memory, at): a vector of `width` bytes."""

    @emits(types.none, at=types.int32)
    def put(builder, values, memory, at):
        numbers = [
            builder.load(_element(builder, values, _I64(0), i)) for i in range(width // _SIZES[name])
        ]
        vector = _packed(builder, name, numbers, modern)
        builder.store(vector, _shared(builder, memory, at, vector.type), align=width)

    return put


def vector_taker():
    """Function (memory, at, address): a vector from shared to global memory."""

    @emits(types.none, at=types.int32, address=types.int64)
    def take(builder, memory, at, address):
        kind = ir.VectorType(_I32, 4)
        vector = builder.load(_shared(builder, memory, at, kind), align=VECTOR)
        builder.store(vector, _pointer(builder, address, kind), align=VECTOR)

    return take


def element_taker(name):
    """The same of an element."""
    kind = ir.IntType(8 * _SIZES[name])

    @emits(types.none, at=types.int32, address=types.int64)
    def take(builder, memory, at, address):
        bits = builder.load(_shared(builder, memory, at, kind), align=_SIZES[name])
        builder.store(bits, _pointer(builder, address, kind), align=_SIZES[name])

    return take


# words of two halves, as int32: compute capability 8 or more


@emits(types.none, at=types.int32)
def shared_words(builder, words, memory, at):
    """The four words of a vector in shared memory."""
    kind = ir.VectorType(_I32, 4)
    vector = builder.load(_shared(builder, memory, at, kind), align=VECTOR)
    for i in range(4):
        word = builder.extract_element(vector, _I32(i))
        builder.store(word, _element(builder, words, _I64(0), i))


def larger_words(name):
    """Function (a, b): the larger halves; the other ones where one is NaN."""
    kind = {"float16": "f16x2", "bfloat16": "bf16x2"}[name]

    @emits(types.int32, a=types.int32, b=types.int32)
    def combine(builder, a, b):
        return _asm(builder, _I32, f"max.{kind} $0, $1, $2;", "=r,r,r", a, b)

    return combine


def half_of_word(name, upper):
    """Function (word): its lower or upper half, as a float32."""

    @emits(types.float32, word=types.int32)
    def half(builder, word):
        return _half(builder, name, word, upper)

    return half


def lowest_word(name):
    """Two halves of -inf."""
    return np.int32(np.uint32({"float16": 0xFC00FC00, "bfloat16": 0xFF80FF80}[name]))


# operations of `fastll.formulas.vocabulary`


def _layout(x):
    """Of a floating type: the integer of its size, bits of the mantissa, bias of the exponent."""
    return (_I64, 52, 1023) if x.type == _F64 else (_I32, 23, 127)


def _select(comparison):
    """x where a compares with b, else y; without a branch."""

    def select(builder, a, b, x, y):
        return builder.select(builder.fcmp_ordered(comparison, a, b), x, y)

    return emits()(select)


where_eq, where_gt, where_ge = _select("=="), _select(">"), _select(">=")


@emits()
def fma(builder, a, b, c):
    return builder.fma(a, b, c)


@emits()
def exponent_bits(builder, z):
    kind, mantissa, _ = _layout(z)
    return builder.bitcast(builder.shl(builder.bitcast(z, kind), kind(mantissa)), z.type)


@emits()
def exponent(builder, x):
    kind, mantissa, _ = _layout(x)
    root = 0x3FE6A09E667F3BCD if x.type == _F64 else 0x3F3504F3  # sqrt(1/2)
    bits = builder.sub(builder.bitcast(x, kind), kind(root))
    return builder.sitofp(builder.ashr(bits, kind(mantissa)), x.type)


@emits()
def horner(builder, coefficients, x):
    """The polynomial with these coefficients, from the highest power on."""
    result, *others = (builder.extract_value(coefficients, i) for i in range(coefficients.type.count))
    for coefficient in others:
        result = builder.fma(result, x, coefficient)
    return result


# and of reductions


@emits()
def power_of_two(builder, n):
    """2**n for a whole number n within the range of normal numbers."""
    kind, mantissa, bias = _layout(n)
    biased = builder.add(builder.fptosi(n, kind), kind(bias))
    return builder.bitcast(builder.shl(biased, kind(mantissa)), n.type)


@emits()
def larger(builder, a, b):
    """The larger one; the other one where one is NaN."""
    name = "llvm.nvvm.fmax.d" if a.type == _F64 else "llvm.nvvm.fmax.f"
    kind = ir.FunctionType(a.type, [a.type] * 2)
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), (a, b))


@emits()
def larger_or_nan(builder, a, b):
    """The larger one, or NaN where one is NaN: float32, compute capability 8 or more."""
    return _asm(builder, _F32, "max.NaN.f32 $0, $1, $2;", "=f,f,f", a, b)


@emits()
def approximate_exp2(builder, x):
    """Approximately 2**x, to 2 ulp of float32; 0 for what is less than the smallest normal number."""
    return _asm(builder, _F32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", x)


# clusters


@emits(types.int32)
def cluster_rank(builder):
    """The block's number in its cluster."""
    return _asm(builder, _I32, "mov.u32 $0, %cluster_ctarank;", "=r")


@emits(types.none)
def cluster_started(builder):
    """Tell the other blocks of the cluster that this one has started; it does not wait."""
    code = "barrier.cluster.arrive.relaxed;"
    _asm(builder, ir.VoidType(), code, "~{memory}", effects=True)


@emits(types.none)
def cluster_wait(builder):
    """Wait for what the other blocks of the cluster have told."""
    _asm(builder, ir.VoidType(), "barrier.cluster.wait;", "~{memory}", effects=True)


@emits(types.none)
def cluster_barrier(builder):
    """Wait for all blocks of the cluster, and for what they have written to each other's memory."""
    code = "barrier.cluster.arrive; barrier.cluster.wait;"
    _asm(builder, ir.VoidType(), code, "~{memory}", effects=True)


def peer_writer(real):
    """Function (memory, index, rank, number): to a shared array of another block of the cluster."""
    letter, kind = ("d", "f64") if real is np.float64 else ("f", "f32")
    code = f"{{ .reg .u32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.{kind} [a], $2; }}"
    size = np.dtype(real).itemsize

    @emits(types.none, index=types.int32, rank=types.int32)
    def write_peer(builder, memory, index, rank, number):
        at = builder.mul(index, _I32(size))
        place = builder.ptrtoint(_shared(builder, memory, at, ir.IntType(8)), _I32)
        _asm(
            builder, ir.VoidType(), code, f"r,r,{letter},~{{memory}}", place, rank, number, effects=True
        )

    return write_peer
