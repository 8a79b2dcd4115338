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
from numba import types

from fastll.backend.numba.cache import cached_cfunc
from fastll.backend.numba.vector import Vector, emitted, inline, pointer, read, splat, write
from fastll.dtypes import FORMATS

_BITS = {"float32": np.uint32, "float64": np.uint64, "float16": np.uint16, "bfloat16": np.uint16}

_I16, _I32, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


@emitted(lambda value, like: like)
def _reinterpret(builder, value, like):
    """The bits of a number as one of another type of that size."""
    return builder.bitcast(value, like.type)


@emitted(lambda value: value)
def _swap_bytes(builder, value):
    return builder.bswap(value) if value.type.width > 8 else value


@inline
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


@inline
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


# What follows is for single numbers and for vectors of them.


def _of(values, element):
    """The type of as many numbers of another type."""
    kind = values.type
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _half_to_float(builder, bits):
    return builder.fpext(builder.bitcast(bits, _of(bits, _F16)), _of(bits, _F32))


def _float_to_half(builder, value):
    return builder.bitcast(builder.fptrunc(value, _of(value, _F16)), _of(value, _I16))


def _integer(values, number):
    return ir.Constant(values.type, [number] * 32 if isinstance(values.type, ir.VectorType) else number)


def _bfloat_to_float(builder, bits):
    wide = builder.zext(bits, _of(bits, _I32))
    return builder.bitcast(builder.shl(wide, _integer(wide, 16)), _of(bits, _F32))


def _float_to_bfloat(builder, value):
    """To nearest even."""
    bits = builder.bitcast(value, _of(value, _I32))
    upper = builder.lshr(bits, _integer(bits, 16))
    odd = builder.and_(upper, _integer(bits, 1))
    rounded = builder.add(builder.add(bits, _integer(bits, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(upper, _integer(bits, 0x40))
    rounded = builder.select(is_nan, quiet, builder.lshr(rounded, _integer(bits, 16)))
    return builder.trunc(rounded, _of(value, _I16))


#: By instructions, where the CPU has them: functions that emit these, (from bits, to bits).
_EMITTED = {"bfloat16": (_bfloat_to_float, _float_to_bfloat)}
if get_host_cpu_features().get("f16c", False):
    _EMITTED["float16"] = _half_to_float, _float_to_half


def _decoder(name):
    """A function from the stored bits to a number."""
    if name in _EMITTED:
        return emitted(lambda bits: types.float32)(_EMITTED[name][0])
    if name == "float16":
        return _from_half
    if name in _BITS:
        like = np.dtype(name).type(0)
        return inline(lambda bits: _reinterpret(bits, like))
    return inline(lambda bits: bits)


def _encoder(name):
    """A function from a number in the compute dtype to the stored bits."""
    if name in _EMITTED:
        return emitted(lambda value: types.uint16)(_EMITTED[name][1])
    if name == "float16":
        return _to_half
    like = _BITS[name](0)
    return inline(lambda value: _reinterpret(value, like))


def _vectors(name):
    """Functions that load and store 32 contiguous numbers as a vector."""
    decode, encode = _EMITTED.get(name, _EMITTED["bfloat16"])
    bits = ir.VectorType(_I16, 32)

    def load_vector(builder, address):
        return decode(builder, builder.load(pointer(builder, address, bits), align=1))

    def store_vector(builder, address, v):
        builder.store(encode(builder, v), pointer(builder, address, bits), align=1)

    return emitted(lambda address: Vector(types.float32))(load_vector), emitted(None)(store_vector)


SIGNATURE = types.void(*(types.int64,) * 5)


@functools.cache
def reader(code, swapped, compute):
    """Function (source, source stride, destination, destination stride, count) into `compute`."""
    name = FORMATS[code]
    stored = np.dtype(_BITS.get(name, name)).type(0)
    decode = _decoder(name)
    number = np.dtype(compute).type
    by_vectors = name in _EMITTED and not swapped and compute == "float32"
    load_vector, _ = _vectors(name)

    @cached_cfunc(SIGNATURE, f"reader_{code}_{swapped}_{compute}")
    def convert(source, source_stride, destination, destination_stride, count):
        done = 0
        if by_vectors and source_stride == 2 and destination_stride == 4:
            done = count // 32 * 32
            for i in range(0, done, 32):
                write(destination + i * 4, load_vector(source + i * 2))
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
    by_vectors = name in _EMITTED
    _, store_vector = _vectors(name)

    @cached_cfunc(SIGNATURE, f"writer_{code}")
    def convert(source, source_stride, destination, destination_stride, count):
        done = 0
        if by_vectors and source_stride == 4 and destination_stride == 2:
            done = count // 32 * 32
            for i in range(0, done, 32):
                store_vector(destination + i * 2, read(source + i * 4, splat(np.float32(0))))
        for i in range(done, count):
            write(destination + i * destination_stride, encode(read(source + i * source_stride, like)))

    return convert
