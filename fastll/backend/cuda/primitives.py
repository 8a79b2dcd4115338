"""What kernels ask of the machine: memory by address, vectors of 16 bytes, warps, barriers, bits.

Everything else is arithmetic, so that this is all that a simulator has to replace. Memory is named by
its address, an int64. A factory makes the functions of one storage format of `fastll.dtypes.FORMATS`.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fastll.backend.cuda.compiler import cuda, device, intrinsic, types

WARP = 32
#: Bytes of the widest access.
VECTOR = 16

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()

_INTEGERS = {f"{sign}int{8 * size}": (sign, size) for sign in ("", "u") for size in (1, 2, 4, 8)}
_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
#: Formats that are read and written by vectors.
FLOATS = tuple(_SIZES)
_SIZES |= {name: size for name, (_, size) in _INTEGERS.items()}


def size_of(name: str) -> int:
    """Bytes of an element of a format."""
    return _SIZES[name]


def compute_type(name: str) -> type:
    """The NumPy type that the elements of a format are computed in."""
    return np.float32 if name in ("float32", "float16", "bfloat16") else np.float64


def numba_type(real):
    return types.float32 if real is np.float32 else types.float64


def value_format(real: type) -> str:
    """The format of values (losses, log-sum-exp) that are computed in a type."""
    return "float32" if real is np.float32 else "float64"


def _pointer(builder, address, kind):
    return builder.inttoptr(address, ir.PointerType(kind, addrspace=1))


def _widen(builder, bits):
    """The upper half of a float32 is a bfloat16."""
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)


def _narrow(builder, value):
    """To the nearest bfloat16, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, _I32)
    upper = builder.lshr(bits, _I32(16))
    odd = builder.and_(upper, _I32(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, builder.or_(upper, _I32(0x40)), rounded), _I16)


def _decode(builder, name, bits):
    """A stored element as a number of its compute type."""
    if name == "float16":
        return builder.fpext(builder.bitcast(bits, _HALF), _F32)
    if name == "bfloat16":
        return _widen(builder, bits)
    if name in _INTEGERS:
        signed = not name.startswith("u")
        return builder.sitofp(bits, _F64) if signed else builder.uitofp(bits, _F64)
    return bits


def _encode(builder, name, value):
    if name == "float16":
        return builder.bitcast(builder.fptrunc(value, _HALF), _I16)
    if name == "bfloat16":
        return _narrow(builder, value)
    return value


def _stored(name):
    """What a format is loaded as."""
    return {"float32": _F32, "float64": _F64}.get(name) or ir.IntType(8 * _SIZES[name])


def reader(name, real=None):
    """Function (address) of an element, as a number of `real`, by default its compute type."""
    real = real or compute_type(name)
    result = numba_type(real)

    @intrinsic
    def read(typing_context, address):
        def codegen(context, builder, signature, values):
            kind = _stored(name)
            bits = builder.load(_pointer(builder, values[0], kind), align=_SIZES[name])
            value = _decode(builder, name, bits)
            return context.cast(builder, value, numba_type(compute_type(name)), result)

        return result(types.int64), codegen

    return read


def writer(name, real=None):
    """Function (address, number of `real`, by default the compute type) of an element."""
    value_type, stored = numba_type(real or compute_type(name)), numba_type(compute_type(name))

    @intrinsic
    def write(typing_context, address, value):
        def codegen(context, builder, signature, values):
            value = context.cast(builder, values[1], value_type, stored)
            pointer = _pointer(builder, values[0], _stored(name))
            builder.store(_encode(builder, name, value), pointer, align=_SIZES[name])
            return context.get_dummy_value()

        return types.none(types.int64, value_type), codegen

    return write


def integer_reader(name):
    """Function (address) of an integer, as an int64; one beyond int64 is -1, which is no label."""

    @intrinsic
    def read(typing_context, address):
        def codegen(context, builder, signature, values):
            kind = _stored(name)
            value = builder.load(_pointer(builder, values[0], kind), align=_SIZES[name])
            if kind.width == 64:
                if name == "uint64":
                    beyond = builder.icmp_signed("<", value, _I64(0))
                    value = builder.select(beyond, _I64(-1), value)
                return value
            return builder.zext(value, _I64) if name.startswith("u") else builder.sext(value, _I64)

        return types.int64(types.int64), codegen

    return read


def lanes_of(name: str) -> int:
    """Elements of a vector."""
    return VECTOR // _SIZES[name]


def _data(builder, context, array_type, array, index):
    """Pointer to an element of a Numba array, from which no memory is left once loops are unrolled."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def vector_reader(name, pad):
    """Function (values, at, address, wanted): a vector into values[at:], or `pad` if not wanted.

    The load is one instruction under a predicate, without a branch, so that many are under way at once.
    """
    lanes, double = lanes_of(name), name == "float64"
    word, count, letter = (_F64, 2, "d") if double else (_I32, 4, "r")
    pads = {-np.inf: {2: 0xFF80FF80, 4: 0xFF800000}, 0.0: {2: 0, 4: 0}}[pad]
    if name == "float16" and pad:
        pads = {2: 0xFC00FC00}
    outputs = ", ".join(f"${i}" for i in range(count))
    move = "mov.f64" if double else "mov.b32"
    code = (
        f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; "
        + " ".join(f"{move} ${i}, ${count + 2};" for i in range(count))
        + f" @p ld.global.v{count}.{'f64' if double else 'b32'} {{{outputs}}}, [${count}]; }}"
    )
    constraints = ",".join([f"=&{letter}"] * count + ["l", "r", letter])

    @intrinsic
    def fetch(typing_context, values, at, address, wanted):
        def codegen(context, builder, signature, arguments):
            array, index, source, flag = arguments
            kind = ir.FunctionType(ir.LiteralStructType([word] * count), [_I64, _I32, word])
            padding = ir.Constant(_F64, pad) if double else _I32(pads[min(_SIZES[name], 4)])
            inline = ir.InlineAsm(kind, code, constraints)
            loaded = builder.call(inline, [source, builder.zext(flag, _I32), padding])
            words = [builder.extract_value(loaded, i) for i in range(count)]
            for i in range(lanes):
                if double:
                    value = words[i]
                elif lanes == 4:
                    value = builder.bitcast(words[i], _F32)
                elif name == "bfloat16":  # one instruction an element
                    bits = (
                        builder.and_(words[i // 2], _I32(0xFFFF0000))
                        if i % 2
                        else builder.shl(words[i // 2], _I32(16))
                    )
                    value = builder.bitcast(bits, _F32)
                else:
                    half = builder.trunc(builder.lshr(words[i // 2], _I32(16 * (i % 2))), _I16)
                    value = _decode(builder, name, half)
                place = builder.add(index, ir.Constant(index.type, i))
                builder.store(value, _data(builder, context, signature.args[0], array, place))
            return context.get_dummy_value()

        return types.none(values, at, types.int64, types.boolean), codegen

    return fetch


def vector_writer(name, modern=False):
    """Function (address, values, at): a vector from values[at:].

    `modern`: compute capability 8 or more, which rounds two numbers to bfloat16 by one instruction.
    """
    lanes = lanes_of(name)
    pair = ir.InlineAsm(ir.FunctionType(_I32, [_F32, _F32]), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
    kind = ir.VectorType(_stored(name), lanes)
    packed = ir.VectorType(_I32, 4)

    @intrinsic
    def deliver(typing_context, address, values, at):
        def codegen(context, builder, signature, arguments):
            target, array, index = arguments
            numbers = []
            for i in range(lanes):
                place = builder.add(index, ir.Constant(index.type, i))
                numbers.append(builder.load(_data(builder, context, signature.args[1], array, place)))
            if name == "bfloat16" and modern:
                vector = ir.Constant(packed, ir.Undefined)
                for i in range(4):
                    two = builder.call(pair, numbers[2 * i : 2 * i + 2])
                    vector = builder.insert_element(vector, two, _I32(i))
            else:
                vector = ir.Constant(kind, ir.Undefined)
                for i, value in enumerate(numbers):
                    vector = builder.insert_element(vector, _encode(builder, name, value), _I32(i))
                if _SIZES[name] == 2:
                    vector = builder.bitcast(vector, packed)
            builder.store(vector, _pointer(builder, target, vector.type), align=VECTOR)
            return context.get_dummy_value()

        return types.none(types.int64, values, at), codegen

    return deliver


def _operation(arity, build):
    """An operation on numbers of one type, by what makes its instructions."""

    def codegen(context, builder, signature, values):
        return build(builder, signature.return_type == types.float64, *values)

    def one(typing_context, a):
        return a(a), codegen

    def two(typing_context, a, b):
        return a(a, a), codegen

    def three(typing_context, a, b, c):
        return a(a, a, a), codegen

    def four(typing_context, a, b, c, d):
        return a(a, a, a, a), codegen

    return intrinsic((one, two, three, four)[arity - 1])


def _layout(double):
    """Of a floating type: the integer of its size, bits of the mantissa, bias of the exponent."""
    return (_I64, 52, 1023) if double else (_I32, 23, 127)


def _select(comparison):
    """x where a compares with b, else y; without a branch."""

    def build(builder, double, a, b, x, y):
        return builder.select(builder.fcmp_ordered(comparison, a, b), x, y)

    return _operation(4, build)


def _larger(builder, double, a, b):
    name = "llvm.nvvm.fmax.d" if double else "llvm.nvvm.fmax.f"
    kind = ir.FunctionType(a.type, [a.type] * 2)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, (a, b))


def _asm_float32(code, constraints):
    def build(builder, double, *values):
        kind = ir.FunctionType(_F32, [_F32] * len(values))
        return builder.call(ir.InlineAsm(kind, code, constraints), values)

    return build


def _exponent_bits(builder, double, z):
    kind, mantissa, _ = _layout(double)
    return builder.bitcast(builder.shl(builder.bitcast(z, kind), kind(mantissa)), z.type)


def _exponent(builder, double, x):
    kind, mantissa, _ = _layout(double)
    root = 0x3FE6A09E667F3BCD if double else 0x3F3504F3  # sqrt(1/2)
    bits = builder.sub(builder.bitcast(x, kind), kind(root))
    return builder.sitofp(builder.ashr(bits, kind(mantissa)), x.type)


def _power(builder, double, n):
    kind, mantissa, bias = _layout(double)
    biased = builder.add(builder.fptosi(n, kind), kind(bias))
    return builder.bitcast(builder.shl(biased, kind(mantissa)), n.type)


#: Operations of `fastll.formulas.vocabulary`.
fma = _operation(3, lambda builder, double, a, b, c: builder.fma(a, b, c))
where_eq, where_gt, where_ge = _select("=="), _select(">"), _select(">=")
exponent_bits, exponent = _operation(1, _exponent_bits), _operation(1, _exponent)

#: 2**n for a whole number n within the range of normal numbers.
power_of_two = _operation(1, _power)
#: The larger one; the other one where one is NaN.
larger = _operation(2, _larger)
#: The larger one, or NaN where one is NaN: float32, compute capability 8 or more.
larger_or_nan = _operation(2, _asm_float32("max.NaN.f32 $0, $1, $2;", "=f,f,f"))
#: Approximately 2**x, to 2 ulp, for |x| <= 1/2, in float32.
approximate_exp2 = _operation(1, _asm_float32("ex2.approx.ftz.f32 $0, $1;", "=f,f"))


@intrinsic
def horner(typing_context, coefficients, x):
    """The polynomial with these coefficients, from the highest power on."""

    def codegen(context, builder, signature, values):
        result = builder.extract_value(values[0], 0)
        for i in range(1, len(coefficients)):
            result = builder.fma(result, values[1], builder.extract_value(values[0], i))
        return result

    return x(coefficients, x), codegen


def _special(register):
    @intrinsic
    def read(typing_context):
        def codegen(context, builder, signature, values):
            kind = ir.FunctionType(_I32, [])
            return builder.call(ir.InlineAsm(kind, f"mov.u32 $0, %{register};", "=r"), [])

        return types.int32(), codegen

    return read


#: The block's number in its cluster.
cluster_rank = _special("cluster_ctarank")


@intrinsic
def cluster_barrier(typing_context):
    """Wait for all blocks of the cluster, whose shared memory is then as they left it."""

    def codegen(context, builder, signature, values):
        code = "barrier.cluster.arrive; barrier.cluster.wait;"
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, code, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def read_peer(typing_context, array, index, rank):
    """Element of a shared array of float32 or float64 as another block of the cluster has it."""
    double = array.dtype == types.float64

    def codegen(context, builder, signature, values):
        memory, place, peer = values
        pointer = _data(builder, context, array, memory, place)
        address = builder.ptrtoint(pointer, _I64)
        word = _F64 if double else _F32
        code = (
            "{ .reg .u64 s; .reg .u32 a; cvta.to.shared.u64 s, $1; cvt.u32.u64 a, s;"
            " mapa.shared::cluster.u32 a, a, $2;"
            f" ld.shared::cluster.{'f64' if double else 'f32'} $0, [a]; }}"
        )
        kind = ir.FunctionType(word, [_I64, _I32])
        inline = ir.InlineAsm(
            kind, code, f"={'d' if double else 'f'},l,r,~{{memory}}", side_effect=True
        )
        return builder.call(inline, [address, builder.trunc(peer, _I32)])

    return array.dtype(array, index, rank), codegen


@device
def shuffle(value, mask):
    """The number that the lane with number `lane ^ mask` has."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, value, mask)
