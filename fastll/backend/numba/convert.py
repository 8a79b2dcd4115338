"""Strided numbers of any dtype to contiguous ones of the compute dtype, and back.

Kernels are compiled for the two compute dtypes only. Whatever else an array holds passes, a block at a
time, through a function of this module, which a kernel calls by its address. Formats are those of
`fastll.dtypes.FORMATS`; each becomes a function when it is first met.
"""

# mypy: ignore-errors

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic

from fastll.backend.numba.cache import cached_cfunc
from fastll.backend.numba.vector import INLINE, Vector, load, read, splat, store, write
from fastll.dtypes import FORMATS

_BITS = {"float32": np.uint32, "float64": np.uint64, "float16": np.uint16, "bfloat16": np.uint16}


@intrinsic
def _reinterpret(typing_context, value, like):
    """The bits of a number as one of another type of that size."""

    def codegen(context, builder, signature, values):
        return builder.bitcast(values[0], context.get_value_type(like))

    return like(value, like), codegen


def _by_instruction(name, source, result):
    """float16 from or to float32 by the CPU."""
    half = ir.HalfType()

    @intrinsic
    def convert(typing_context, value):
        def codegen(context, builder, signature, values):
            if name == "fpext":
                return builder.fpext(builder.bitcast(values[0], half), ir.FloatType())
            return builder.bitcast(builder.fptrunc(values[0], half), ir.IntType(16))

        return result(source), codegen

    return convert


@intrinsic
def _swap_bytes(typing_context, value):
    def codegen(context, builder, signature, values):
        return builder.bswap(values[0]) if value.bitwidth > 8 else values[0]

    return value(value), codegen


@njit(**INLINE)
def _from_half(bits):
    """float16 to float32. Subnormal: its 10 bits under the exponent of 2**-14, less 2**-14."""
    sign = (np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13)
    exponent = magnitude & np.uint32(0x0F800000)
    like = np.float32(0)
    if exponent == np.uint32(0):
        small = _reinterpret(np.uint32(magnitude | np.uint32(0x38800000)), like)
        magnitude = _reinterpret(small - np.float32(2.0**-14), np.uint32(0))
    elif exponent == np.uint32(0x0F800000):
        magnitude = np.uint32(magnitude | np.uint32(0x7F800000))
    else:
        magnitude = np.uint32(magnitude + np.uint32(112 << 23))
    return _reinterpret(np.uint32(sign | magnitude), like)


@njit(**INLINE)
def _to_half(value):
    """float32 to float16, to nearest even. Subnormal: the sum with 0.5 rounds at bit 2**-24."""
    bits = _reinterpret(value, np.uint32(0))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x47800000):  # 2**16 and beyond
        rest = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # below 2**-14
        small = _reinterpret(magnitude, np.float32(0)) + np.float32(0.5)
        rest = np.uint32(_reinterpret(small, np.uint32(0)) - np.uint32(0x3F000000))
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        shifted = magnitude - np.uint32(112 << 23) + np.uint32(0x0FFF) + odd
        rest = np.uint32(np.uint32(shifted) >> np.uint32(13))
    return np.uint16(sign | rest)


_HALVES = get_host_cpu_features().get("f16c", False)
if _HALVES:
    _from_half = _by_instruction("fpext", types.uint16, types.float32)
    _to_half = _by_instruction("fptrunc", types.float32, types.uint16)


@njit(**INLINE)
def _from_bfloat(bits):
    return _reinterpret(np.uint32(np.uint32(bits) << np.uint32(16)), np.float32(0))


@njit(**INLINE)
def _to_bfloat(value):
    """float32 to bfloat16, to nearest even."""
    bits = _reinterpret(value, np.uint32(0))
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def _decoder(name):
    """A function from the stored bits to a number."""
    if name == "float16":
        return _from_half
    if name == "bfloat16":
        return _from_bfloat
    if name in _BITS:
        like = np.dtype(name).type(0)
        return njit(**INLINE)(lambda bits: _reinterpret(bits, like))
    return njit(**INLINE)(lambda bits: bits)


def _encoder(name):
    """A function from a number in the compute dtype to the stored bits."""
    if name == "float16":
        return _to_half
    if name == "bfloat16":
        return _to_bfloat
    like = _BITS[name](0)
    return njit(**INLINE)(lambda value: _reinterpret(value, like))


_WIDE = Vector(types.float32, 32)
_I16, _I32, _F16 = (ir.VectorType(t, 32) for t in (ir.IntType(16), ir.IntType(32), ir.HalfType()))


def _all(kind, number):
    return ir.Constant(kind, [number] * kind.count)


@intrinsic
def _load_halves(typing_context, address):
    """32 contiguous float16 as a vector."""

    def codegen(context, builder, signature, values):
        bits = builder.load(builder.inttoptr(values[0], _I16.as_pointer()), align=1)
        return builder.fpext(builder.bitcast(bits, _F16), _WIDE.ir)

    return _WIDE(types.int64), codegen


@intrinsic
def _load_brains(typing_context, address):
    """32 contiguous bfloat16 as a vector."""

    def codegen(context, builder, signature, values):
        bits = builder.load(builder.inttoptr(values[0], _I16.as_pointer()), align=1)
        return builder.bitcast(builder.shl(builder.zext(bits, _I32), _all(_I32, 16)), _WIDE.ir)

    return _WIDE(types.int64), codegen


@intrinsic
def _store_halves(typing_context, address, v):
    def codegen(context, builder, signature, values):
        bits = builder.bitcast(builder.fptrunc(values[1], _F16), _I16)
        builder.store(bits, builder.inttoptr(values[0], _I16.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, v), codegen


@intrinsic
def _store_brains(typing_context, address, v):
    """To nearest even, as `_to_bfloat`."""

    def codegen(context, builder, signature, values):
        bits = builder.bitcast(values[1], _I32)
        upper = builder.lshr(bits, _all(_I32, 16))
        odd = builder.and_(upper, _all(_I32, 1))
        rounded = builder.add(builder.add(bits, _all(_I32, 0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", values[1], values[1])
        quiet = builder.or_(upper, _all(_I32, 0x40))
        rounded = builder.select(is_nan, quiet, builder.lshr(rounded, _all(_I32, 16)))
        stored = builder.trunc(rounded, _I16)
        builder.store(stored, builder.inttoptr(values[0], _I16.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, v), codegen


#: By vectors, of contiguous numbers: where the CPU has the instructions.
_LOAD, _STORE = {"bfloat16": _load_brains}, {"bfloat16": _store_brains}
if _HALVES:
    _LOAD["float16"], _STORE["float16"] = _load_halves, _store_halves


_SIGNATURE = types.void(*(types.int64,) * 5)


@functools.cache
def reader(code, swapped, compute):
    """Function (source, source stride, destination, destination stride, count) into `compute`."""
    name = FORMATS[code]
    stored = np.dtype(_BITS.get(name, name)).type(0)
    decode = _decoder(name)
    number = np.dtype(compute).type
    by_vectors = name in _LOAD and not swapped and compute == "float32"
    load_vector = _LOAD.get(name, _load_brains)

    @cached_cfunc(_SIGNATURE, f"reader_{code}_{swapped}_{compute}")
    def convert(source, source_stride, destination, destination_stride, count):
        done = 0
        if by_vectors and source_stride == 2 and destination_stride == 4:
            done = count // 32 * 32
            for i in range(0, done, 32):
                store(destination + i * 4, 32, load_vector(source + i * 2))
        for i in range(done, count):
            bits = read(source + i * source_stride, stored)
            if swapped:
                bits = _swap_bytes(bits)
            write(destination + i * destination_stride, number(decode(bits)))

    return convert


@functools.cache
def writer(code):
    """Function (source, source stride, destination, destination stride, count) out of `compute`."""
    name = FORMATS[code]
    encode = _encoder(name)
    like = np.float64(0) if name == "float64" else np.float32(0)
    by_vectors = name in _STORE
    store_vector = _STORE.get(name, _store_brains)

    @cached_cfunc(_SIGNATURE, f"writer_{code}")
    def convert(source, source_stride, destination, destination_stride, count):
        done = 0
        if by_vectors and source_stride == 4 and destination_stride == 2:
            done = count // 32 * 32
            for i in range(0, done, 32):
                store_vector(destination + i * 2, load(source + i * 4, 32, splat(np.float32(0))))
        for i in range(done, count):
            write(destination + i * destination_stride, encode(read(source + i * source_stride, like)))

    return convert
