"""The emulator of PTX: instructions against exact arithmetic, and the errors it is there to find."""

import itertools
import math
import re
import warnings
from fractions import Fraction

import numpy as np
import ptx
import pytest

HEAD = ".version 8.0\n\n.target sm_90\n// lines are counted\n.address_size 64\n"
KINDS = {"u": "u", "s": "i", "f": "f", "b": "u"}


def dtype_of(kind):
    return np.dtype(KINDS[kind[0]] + str(int(kind[1:]) // 8))


def kernel(body, params="", name="kernel"):
    """An entry with registers of every kind; its parameters are p0, p1, ... of 64 bits."""
    count = params if isinstance(params, int) else 0
    formals = ", ".join(f".param .u64 p{k}" for k in range(count))
    loads = "".join(f"ld.param.u64 %rd{90 + k}, [p{k}];\n" for k in range(count))
    registers = (
        ".reg .pred %p<9>; .reg .b16 %h<99>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %rd<99>;"
    )
    registers += " .reg .f64 %fd<99>;"
    return f".visible .entry {name}({formals})\n{{\n{registers}\n{loads}{body}\nret;\n}}\n"


def compute(instruction, out, *inputs, **options):
    """One instruction on arrays: `D` is the destination, `A`, `B`, `C` the sources."""
    memory = ptx.Memory(1 << 20)
    kinds = [{"i": "s"}.get(a.dtype.kind, a.dtype.kind) + str(8 * a.itemsize) for a in inputs]
    n = len(inputs[0])
    names = "".join(f".reg .b{k[1:]} {name};" for name, k in zip("ABC", kinds, strict=False))
    body = f"{{ {names} .reg .b{out[1:]} D;\nmov.u32 %r1, %tid.x; cvt.u64.u32 %rd1, %r1;\n"
    addresses = [memory.alloc(n * dtype_of(out).itemsize)]
    for k, (name, kind, array) in enumerate(zip("ABC", kinds, inputs, strict=False)):
        body += f"mad.lo.u64 %rd2, %rd1, {array.itemsize}, %rd{91 + k};\n"
        body += f"ld.global.b{kind[1:]} {name}, [%rd2];\n"
        addresses.append(memory.alloc(array.nbytes))
        memory.write(addresses[-1], array)
    body += f"{instruction}\nmad.lo.u64 %rd2, %rd1, {dtype_of(out).itemsize}, %rd90;\n"
    body += f"st.global.b{out[1:]} [%rd2], D; }}"
    module = ptx.Module(HEAD + kernel(body, len(addresses)))
    module.launch(None, 1, n, addresses, memory, **options)
    return memory.read(addresses[0], dtype_of(out), n)


def launch(body, grid=1, block=32, args=(), memory=None, head="", **options):
    memory = memory or ptx.Memory(1 << 20)
    return ptx.Module(HEAD + head + kernel(body, len(args))).launch(
        None, grid, block, args, memory, **options
    )


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    math.inf,
    -math.inf,
    math.nan,
    1e-42,
    -3e-39,
    3.4e38,
    1 / 3,
    2.5,
    -2.5,
    1e10,
]


@pytest.fixture
def pairs(rng):
    a, b = np.meshgrid(np.array(FLOATS, np.float32), np.array(FLOATS, np.float32))
    return a.ravel(), b.ravel()


def integers(dtype, rng, n=400):
    info = np.iinfo(dtype)
    edges = np.array(
        [0, 1, 2, 31, 32, 33, 63, 64, info.max, info.max - 1, info.min, info.min + 1], dtype
    )
    ends = rng.integers(info.min, info.max, n, dtype, endpoint=True) >> rng.integers(
        0, info.bits, n
    ).astype(dtype)
    return np.concatenate([ends, edges, edges[::-1], np.zeros(3, dtype)])


def wrap(value, dtype):
    bits = np.iinfo(dtype).bits
    value = int(value) % 2**bits
    return value - 2**bits if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def truncated(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(kind, rng):
    dtype = dtype_of(kind)
    bits = 8 * dtype.itemsize
    a, b, c = (
        integers(dtype, rng),
        rng.permutation(integers(dtype, rng)),
        rng.permutation(integers(dtype, rng)),
    )
    table = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul.lo": lambda x, y, z: x * y,
        "mul.hi": lambda x, y, z: x * y >> bits,
        "mad.lo": lambda x, y, z: x * y + z,
        "min": lambda x, y, z: min(x, y),
        "max": lambda x, y, z: max(x, y),
        "div": lambda x, y, z: truncated(x, y) if y else -1,
        "rem": lambda x, y, z: x - y * truncated(x, y) if y else 0,
    }
    for name, exact in table.items():
        text = f"{name}.{kind} D, A, B{', C' * name.startswith('mad')};"
        actual = compute(text, kind, a, b, c)
        expected = [wrap(exact(int(x), int(y), int(z)), dtype) for x, y, z in zip(a, b, c, strict=True)]
        np.testing.assert_array_equal(actual, np.array(expected, dtype), text)


@pytest.mark.parametrize("kind", ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"])
def test_shifts_are_clamped(kind, rng):
    a = integers(dtype_of(kind), rng)
    count = rng.permutation(np.concatenate([np.arange(70), [255, 1 << 31, 2**32 - 1]]).repeat(7))[
        : len(a)
    ]
    expected = [int(x) >> int(s) for x, s in zip(a, count, strict=True)]
    if kind[0] != "b":
        actual = compute(f"shr.{kind} D, A, B;", kind, a, count.astype(np.uint32))
        np.testing.assert_array_equal(actual, np.array(expected, a.dtype))
    else:
        actual = compute(f"shl.{kind} D, A, B;", kind, a, count.astype(np.uint32))
        expected = [
            wrap(int(x) << int(s) if s < 64 else 0, a.dtype) for x, s in zip(a, count, strict=True)
        ]
        np.testing.assert_array_equal(actual, np.array(expected, a.dtype))


def test_wide_products(rng):
    a, b = integers(np.int32, rng), rng.permutation(integers(np.int32, rng))
    np.testing.assert_array_equal(compute("mul.wide.s32 D, A, B;", "s64", a, b), a.astype("i8") * b)
    u, v = a.view("u4"), b.view("u4")
    np.testing.assert_array_equal(compute("mul.wide.u32 D, A, B;", "u64", u, v), u.astype("u8") * v)
    c = integers(np.int64, rng)
    np.testing.assert_array_equal(
        compute("mad.wide.s32 D, A, B, C;", "s64", a, b, c), a.astype("i8") * b + c
    )


def test_carries(rng):
    a, b, c = (rng.permutation(integers(np.uint64, rng)) for _ in range(3))
    halves = "mov.b64 {%r1, %r2}, A; mov.b64 {%r3, %r4}, B; mov.b64 {%r5, %r6}, C; "
    join = "mov.b64 D, {%r7, %r8};"
    text = halves + "add.cc.u32 %r7, %r1, %r3; addc.u32 %r8, %r2, %r4; " + join
    np.testing.assert_array_equal(compute(text, "u64", a, b, c), a + b)
    text = halves + "sub.cc.u32 %r7, %r1, %r3; subc.u32 %r8, %r2, %r4; " + join
    np.testing.assert_array_equal(compute(text, "u64", a, b, c), a - b)
    mask = np.uint64(2**32 - 1)
    text = halves + "mad.lo.cc.u32 %r7, %r1, %r3, %r5; madc.hi.u32 %r8, %r1, %r3, %r6; " + join
    np.testing.assert_array_equal(compute(text, "u64", a, b, c), (a & mask) * (b & mask) + c)
    text = "add.cc.u64 D, A, B; addc.u64 D, 0, 0;"
    wide = [(int(x) + int(y)) >> 64 for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(compute(text, "u64", a, b), np.array(wide, "u8"))


def test_bits(rng):
    a, b, c = (rng.permutation(integers(np.uint32, rng)) for _ in range(3))
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))

    def check(text, exact):
        np.testing.assert_array_equal(
            compute(text, "u32", a, b, c), [exact(*row) for row in rows], text
        )

    def byte(x, y, pick):
        value = (x | y << 32) >> 8 * (pick & 7) & 255
        return value if not pick & 8 else 255 * (value >> 7)

    m = 2**32 - 1
    check("and.b32 D, A, B;", lambda x, y, z: x & y)
    check("xor.b32 D, A, B;", lambda x, y, z: x ^ y)
    check("not.b32 D, A;", lambda x, y, z: x ^ m)
    check("lop3.b32 D, A, B, C, 0xE8;", lambda x, y, z: x & y | x & z | y & z)
    check("lop3.b32 D, A, B, C, 0x96;", lambda x, y, z: x ^ y ^ z)
    check("popc.b32 D, A;", lambda x, y, z: x.bit_count())
    check("clz.b32 D, A;", lambda x, y, z: 32 - x.bit_length())
    check("bfind.u32 D, A;", lambda x, y, z: (x.bit_length() - 1) & m)
    check("bfind.shiftamt.u32 D, A;", lambda x, y, z: 32 - x.bit_length() if x else m)
    check("brev.b32 D, A;", lambda x, y, z: int(f"{x:032b}"[::-1], 2))
    check("shf.l.wrap.b32 D, A, B, C;", lambda x, y, z: ((x | y << 32) << (z & 31)) >> 32 & m)
    check("shf.l.clamp.b32 D, A, B, C;", lambda x, y, z: ((x | y << 32) << min(z, 32)) >> 32 & m)
    check("shf.r.wrap.b32 D, A, B, C;", lambda x, y, z: (x | y << 32) >> (z & 31) & m)
    check("shf.r.clamp.b32 D, A, B, C;", lambda x, y, z: (x | y << 32) >> min(z, 32) & m)
    check(
        "prmt.b32 D, A, B, C;", lambda x, y, z: sum(byte(x, y, z >> 4 * k) << 8 * k for k in range(4))
    )
    check("bfe.u32 D, A, 5, 9;", lambda x, y, z: x >> 5 & 511)
    check("bfe.s32 D, A, 5, 9;", lambda x, y, z: ((x >> 5 & 511) - (x >> 13 & 1) * 512) & m)
    check("bfe.s32 D, A, 28, 9;", lambda x, y, z: ((x >> 28) - (x >> 31) * 16) & m)
    check("bfi.b32 D, A, B, 5, 9;", lambda x, y, z: y & ~(511 << 5) | (x & 511) << 5)
    check("selp.b32 D, A, B, 1;", lambda x, y, z: x)
    check("slct.b32.s32 D, A, B, C;", lambda x, y, z: x if z < 2**31 else y)
    check(
        "{ .reg .b16 l, h; mov.b32 {l, h}, A; mov.b32 D, {h, l}; }",
        lambda x, y, z: (x >> 16 | x << 16) & m,
    )
    check("{ .reg .b16 l; mov.b32 {l, _}, A; cvt.s32.s16 D, l; }", lambda x, y, z: wrap(x, "i2") & m)
    check(
        "{ .reg .b64 w; mov.b64 w, {A, B}; shr.u64 w, w, 8; cvt.u32.u64 D, w; }",
        lambda x, y, z: (x >> 8 | y << 24) & m,
    )
    check("cvt.s32.s8 D, A;", lambda x, y, z: wrap(x, "i1") & m)
    check("cvt.sat.u8.s32 D, A;", lambda x, y, z: min(max(wrap(x, "i4"), 0), 255))


def test_comparisons(pairs):
    a, b = pairs
    nan = np.isnan(a) | np.isnan(b)
    for name, ordered in {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }.items():
        for unordered in (False, True):
            text = f"setp.{name}{'u' * unordered}.f32 %p1, A, B; selp.u32 D, 1, 0, %p1;"
            np.testing.assert_array_equal(
                compute(text, "u32", a, b), np.where(nan, unordered, ordered), text
            )
    np.testing.assert_array_equal(
        compute("setp.nan.f32 %p1, A, B; selp.u32 D, 1, 0, %p1;", "u32", a, b), nan
    )
    both = """setp.gt.f32 %p3, A, 0f00000000; setp.lt.or.f32 %p1|%p2, A, B, !%p3;
    selp.u32 %r3, 2, 0, %p2; selp.u32 D, 1, 0, %p1; or.b32 D, D, %r3;"""
    q = ~(a > 0)
    np.testing.assert_array_equal(compute(both, "u32", a, b), ((a < b) | q) + 2 * (~(a < b) | q))
    np.testing.assert_array_equal(
        compute("set.le.u32.f32 D, A, B;", "u32", a, b), (a <= b) * np.uint32(0xFFFFFFFF)
    )
    assert (compute("set.gt.s32.f32 D, A, B;", "s32", a, b) == -(a > b).astype("i4")).all()
    assert (compute("set.gt.f32.f32 D, A, B;", "f32", a, b) == (a > b)).all()
    signed = np.array([-1, 0, 1], "i4"), np.array([1, 0, -1], "i4")
    low = compute("setp.lt.s32 %p1, A, B; selp.u32 D, 1, 0, %p1;", "u32", *signed)
    assert low.tolist() == [1, 0, 0]
    assert compute("setp.lo.u32 %p1, A, B; selp.u32 D, 1, 0, %p1;", "u32", *signed).tolist() == [
        0,
        0,
        1,
    ]


@np.errstate(all="ignore")
def test_float32(pairs):
    a, b = pairs

    def check(text, expected):
        expected = np.where(
            np.isnan(expected), np.array(0x7FFFFFFF, "u4").view("f4"), expected.astype("f4")
        )
        np.testing.assert_array_equal(compute(text, "u32", a, b), expected.view("u4"), text)

    def flushed(x):
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)

    check("add.f32 D, A, B;", a + b)
    check("sub.rn.f32 D, A, B;", a - b)
    check("mul.f32 D, A, B;", a * b)
    check("mul.ftz.f32 D, A, B;", flushed(flushed(a) * flushed(b)))
    check("add.sat.f32 D, A, B;", np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1) + 0))
    check("div.rn.f32 D, A, B;", a / b)
    check("rcp.rn.f32 D, A;", 1 / a)
    check("sqrt.rn.f32 D, A;", np.sqrt(a))
    check("neg.f32 D, A;", -a)
    check("abs.ftz.f32 D, A;", np.abs(flushed(a)))
    nan = np.isnan(a) | np.isnan(b)
    both_zero = (a == 0) & (b == 0)
    zero = np.where(np.signbit(a) & np.signbit(b), np.float32(-0.0), np.float32(0))
    check("max.f32 D, A, B;", np.where(both_zero, zero, np.fmax(a, b)))
    check("max.NaN.f32 D, A, B;", np.where(nan, np.nan, np.where(both_zero, zero, np.fmax(a, b))))
    zero = np.where(np.signbit(a) | np.signbit(b), np.float32(-0.0), np.float32(0))
    check("min.f32 D, A, B;", np.where(both_zero, zero, np.fmin(a, b)))
    np.testing.assert_array_equal(
        compute("copysign.f32 D, A, B;", "u32", a, b), np.copysign(b, a).view("u4")
    )
    check("cvt.rni.f32.f32 D, A;", np.rint(a))
    check("cvt.sat.f32.f32 D, A;", np.where(np.isnan(a), 0, np.clip(a, 0, 1) + 0))


def neighbours(exact, dtype):
    """The numbers of a dtype just below and above a fraction."""
    x = dtype(float(exact))
    below = x if Fraction(float(x)) <= exact else np.nextafter(x, dtype(-np.inf))
    above = x if Fraction(float(x)) >= exact else np.nextafter(x, dtype(np.inf))
    return below, above


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_is_rounded_once(kind, rng):
    dtype = dtype_of(kind).type
    a = (1 + rng.random(200)).astype(dtype)
    b = (1 + rng.random(200)).astype(dtype)
    c = -(a.astype(np.float64) * b).astype(dtype) * dtype(rng.choice([1, 1, 3]))
    modes = ("rn", "rm", "rp", "rz") if kind == "f32" else ("rn",)
    for mode in modes:
        actual = compute(f"fma.{mode}.{kind} D, A, B, C;", kind, a, b, c)
        for x, y, z, value in zip(a, b, c, actual, strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            below, above = neighbours(exact, dtype)
            if mode == "rn":
                gaps = exact - Fraction(float(below)), Fraction(float(above)) - exact
                assert value in (below, above)
                assert abs(Fraction(float(value)) - exact) == min(gaps)
            else:
                expected = {"rm": below, "rp": above, "rz": below if exact > 0 else above}[mode]
                assert value == expected


def test_directed_rounding(rng):
    for kind in ("f32", "f64"):
        dtype = dtype_of(kind).type
        a = (rng.standard_normal(100) * 10.0 ** rng.integers(-3, 4, 100)).astype(dtype)
        b = rng.standard_normal(100).astype(dtype)
        for name, exact in {
            "add": lambda x, y: x + y,
            "sub": lambda x, y: x - y,
            "mul": lambda x, y: x * y,
        }.items():
            down, up, zero = (
                compute(f"{name}.{m}.{kind} D, A, B;", kind, a, b) for m in ("rm", "rp", "rz")
            )
            for k in range(100):
                value = exact(Fraction(float(a[k])), Fraction(float(b[k])))
                assert (down[k], up[k]) == neighbours(value, dtype)
                assert zero[k] == (down[k] if value > 0 else up[k])
    x = rng.standard_normal(100)
    down, up = (compute(f"cvt.{m}.f32.f64 D, A;", "f32", x) for m in ("rm", "rp"))
    assert all(
        (d, u) == neighbours(Fraction(v), np.float32) for d, u, v in zip(down, up, x, strict=True)
    )
    big = rng.integers(-(2**31), 2**31, 100).astype("i4")
    down = compute("cvt.rm.f32.s32 D, A;", "f32", big)
    assert all(d == neighbours(Fraction(int(v)), np.float32)[0] for d, v in zip(down, big, strict=True))


def test_float_to_integer():
    x = np.array([0.5, 1.5, -1.5, 2.5, 3e9, -3e9, 1e20, -1e20, np.inf, -np.inf, np.nan], "f4")
    top, big = 2**31 - 1, 2**63
    rounds = [0, 2, -2, 2, top, -top - 1, top, -top - 1, top, -top - 1, 0]
    assert compute("cvt.rni.s32.f32 D, A;", "s32", x).tolist() == rounds
    assert compute("cvt.rzi.s32.f32 D, A;", "s32", x).tolist() == [0, 1, -1, 2, *rounds[4:]]
    assert compute("cvt.rmi.s32.f32 D, A;", "s32", x).tolist() == [0, 1, -2, 2, *rounds[4:]]
    assert compute("cvt.rpi.u32.f32 D, A;", "u32", x).tolist() == [
        1, 2, 0, 3, 3 * 10**9, 0, 2**32 - 1, 0, 2**32 - 1, 0, 0,
    ]  # fmt: skip
    wide = compute("cvt.rzi.s64.f64 D, A;", "s64", x.astype("f8")).tolist()
    assert wide == [0, 1, -1, 2, 3 * 10**9, -3 * 10**9, big - 1, -big, big - 1, -big, -big]
    wide = compute("cvt.rzi.u64.f32 D, A;", "u64", x).tolist()
    assert wide == [0, 1, 0, 2, 3 * 10**9, 0, 2 * big - 1, 0, 2 * big - 1, 0, big]


def test_conversions(rng):
    x = (rng.standard_normal(200) * 10.0 ** rng.integers(-9, 6, 200)).astype("f4")
    i = integers(np.int64, rng)
    with np.errstate(over="ignore"):
        half = x.astype("f2")
    np.testing.assert_array_equal(compute("cvt.rn.f16.f32 D, A;", "b16", x), half.view("u2"))
    np.testing.assert_array_equal(compute("cvt.f32.f16 D, A;", "f32", half), half.astype("f4"))
    np.testing.assert_array_equal(compute("cvt.f64.f32 D, A;", "f64", x), x.astype("f8"))
    np.testing.assert_array_equal(compute("cvt.rn.f32.s64 D, A;", "f32", i), i.astype("f4"))
    np.testing.assert_array_equal(
        compute("cvt.rn.f64.u64 D, A;", "f64", i.view("u8")), i.view("u8").astype("f8")
    )
    np.testing.assert_array_equal(compute("cvt.u16.s64 D, A;", "u16", i), i.astype("u2"))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x[:4] = np.nan, np.inf, -np.inf, 3.4e38
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        brain = x.astype(ml_dtypes.bfloat16)
    bits = np.where(np.isnan(x), 0x7FFF, brain.view("u2"))
    np.testing.assert_array_equal(compute("cvt.rn.bf16.f32 D, A;", "b16", x), bits)
    np.testing.assert_array_equal(
        compute("cvt.f32.bf16 D, A;", "f32", bits.astype("u2")), brain.astype("f4")
    )
    packed = compute("cvt.rn.bf16x2.f32 D, A, B;", "u32", x, x[::-1].copy())
    np.testing.assert_array_equal(packed, bits.astype("u4") << 16 | bits[::-1].astype("u4"))
    y = x[::-1].copy()
    with np.errstate(over="ignore"):
        expected = np.stack([x.astype("f2"), y.astype("f2")], axis=1)
    for text in ("cvt.rn.f16x2.f32 D, A, B;", "mov.b32 D, B; cvt.rn.f16x2.f32 D, A, D;"):
        packed = compute(text, "u32", y, x).view("f2").reshape(-1, 2)
        np.testing.assert_array_equal(packed, expected)
    one = np.full(32, 0x3F80, "u2")
    assert compute("fma.rn.bf16 D, A, A, A;", "b16", one).tolist() == [0x4000] * 32


def test_approximations(rng):
    x = (0.01 + rng.random(512) * 50).astype("f4")
    table = {
        "ex2.approx.ftz.f32 D, A;": (np.exp2, 2.0**-22),
        "lg2.approx.f32 D, A;": (np.log2, 2.0**-22),
        "rcp.approx.ftz.f32 D, A;": (lambda v: 1 / v, 2.0**-23),
        "rsqrt.approx.f32 D, A;": (lambda v: 1 / np.sqrt(v), 2.0**-22.9),
        "sqrt.approx.f32 D, A;": (np.sqrt, 2.0**-23),
        "tanh.approx.f32 D, A;": (np.tanh, 2.0**-11),
        "div.full.f32 D, A, A;": (lambda v: v / v, 2.0**-22),
    }
    for text, (exact, bound) in table.items():
        expected = exact(x.astype("f8"))
        scale = (
            np.where((x > 0.5) & (x < 2), 1, np.abs(expected)) if "lg2" in text else np.abs(expected)
        )
        error = np.abs(compute(text, "f32", x) - expected) / scale
        assert error.max() <= 2.0**-24, text
        moved = [np.abs(compute(text, "f32", x, perturb=seed) - expected) / scale for seed in (1, 1, 2)]
        assert bound / 4 < moved[0].max() <= bound, text
        assert (moved[0] == moved[1]).all(), text
        assert (moved[0] != moved[2]).any(), text
    special = np.array([0, -0.0, 1e-40, -np.inf, np.inf, -200, 200], "f4")
    assert compute("ex2.approx.ftz.f32 D, A;", "f32", special, perturb=3).tolist() == [
        1,
        1,
        1,
        0,
        math.inf,
        0,
        math.inf,
    ]
    d = np.array([3.0, 1e-310, np.inf])
    gross = compute("rcp.approx.ftz.f64 D, A;", "f64", d)
    assert gross[1:].tolist() == [math.inf, 0]
    assert abs(3 * gross[0] - 1) < 2.0**-20
    assert not gross.view("u8")[0] & 0xFFFFFFFF


# memory

STORE = "mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %rd90;\n"


def test_memory_places():
    memory = ptx.Memory(1 << 16)
    places = [memory.alloc(n) for n in (1, 300, 0, 256)]
    assert all(p % 256 == 0 for p in places)
    assert all(b - a >= 512 for a, b in itertools.pairwise(places))
    for p in places:
        memory.free(p)
    with pytest.raises(ptx.PTXError, match="not an allocation"):
        memory.free(places[0])
    with pytest.raises(MemoryError):
        memory.alloc(1 << 16)
    for _ in range(300):  # what is freed is used again
        memory.free(memory.alloc(1000))
    x = memory.alloc(8)
    with pytest.raises(ptx.PTXError, match="nothing has been written"):
        memory.read(x, "f4", 2)
    memory.write(x, np.float32(1))
    assert memory.read(x, "f4", ()) == 1
    with pytest.raises(ptx.PTXError, match="outside of an allocation"):
        memory.write(x, np.zeros(9, "u1"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "st.global.u32 [%rd1], %r1;",
            r"not allocated, 4 bytes at 0x\w+: st.global.u32.*thread \(16, 0, 0\)",
        ),
        ("ld.global.u32 %r1, [%rd1+-4];", r"not allocated, .*thread \(0, 0, 0\)"),
        (
            "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];",
            r"misaligned, 16 bytes .*thread \(1, 0, 0\)",
        ),
        (
            "rem.u32 %r2, %r1, 16; mad.wide.u32 %rd1, %r2, 4, %rd90; ld.global.nc.f32 %f1, [%rd1];",
            r"not initialised, .*thread \(8, 0, 0\)",
        ),
        ("ld.global.u8 %r1, [%rd90+32];", "not initialised"),
        ("mov.u64 %rd1, 0; st.global.u8 [%rd1], %r1;", "outside global memory"),
        (
            "setp.eq.u32 %p1, %r1, 20; @%p1 st.global.u32 [%rd1], %r1;",
            r"not allocated, .*thread \(20, 0, 0\)",
        ),
        ("st.shared.u32 [%rd1], %r1;", "outside shared memory"),
        ("ld.u16 %h1, [%rd90+62];", "not initialised"),
        ("setp.eq.u32 %p1, %r1, 3;\n@%p1 trap;", r"line \d+: trap: .*thread \(3, 0, 0\)"),
        ("atom.global.add.u32 %r2, [%rd90+32], 1;", "not initialised"),
    ],
)
def test_bad_accesses_are_found(text, reason):
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(64)
    memory.write(address, np.zeros(32, "u1"))
    with pytest.raises(ptx.PTXError, match=reason):
        launch(STORE + text, args=[address], memory=memory)


def test_what_is_freed_is_not_read():
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(128)
    memory.write(address, np.zeros(32, "u4"))
    launch(STORE + "ld.global.u32 %r1, [%rd1];", args=[address], memory=memory)
    memory.free(address)
    with pytest.raises(ptx.PTXError, match="not allocated"):
        launch(STORE + "ld.global.u32 %r1, [%rd1];", args=[address], memory=memory)


def test_stores_may_be_let_through_uninitialised():
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(128)
    launch(STORE + "ld.global.u32 %r1, [%rd1];", args=[address], memory=memory, strict=False)


def test_statistics():
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(4 * 256)
    memory.write(address, np.zeros(256, "u4"))
    text = STORE + "ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd1], %r2; add.s64 %rd2, %rd90, 4;\n"
    stats = launch(
        text + "ld.global.u32 %r2, [%rd2];", block=256, args=[address], memory=memory, track=True
    )
    assert (stats.bytes_read, stats.bytes_written) == (2048, 1024)
    assert (stats.sectors_read, stats.sectors_written) == (8 * (4 + 1), 8 * 4)
    assert (stats.max_reads, stats.max_writes) == (257, 1)
    start = address - memory.base
    assert stats.reads[start : start + 9].tolist() == [1] * 4 + [257] * 4 + [1]
    assert stats.threads_by_class["ld.global"] == 512
    assert stats.warps_by_class["ld.global"] == 16
    assert (stats.warp_instructions, stats.thread_instructions) == (8 * 9, 256 * 9)
    assert stats.threads == 256
    scattered = """mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 124; rem.u64 %rd1, %rd1, 1024;
    add.s64 %rd1, %rd1, %rd90;"""
    stats = launch(scattered + "ld.global.u32 %r2, [%rd1];", args=[address], memory=memory)
    assert stats.sectors_read == len({124 * k % 1024 // 32 for k in range(32)})


def test_profile():
    text = """mov.u32 %r1, %tid.x; mov.u32 %r2, 0; setp.lt.u32 %p1, %r1, 40; mov.u32 %r4, %ctaid.x;
    @!%p1 bra done;
    again: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r4;
    @%p2 bra again;
    done:
    """
    for lanes in (32, 4096):
        stats = launch(text, grid=4, block=96, profile=True, lanes=lanes)
        counts = [stats.executions[line] for line in sorted(stats.executions)]
        # of each block two warps loop once or as often as its number says
        loops = np.outer([1, 1, 2, 3], [1, 1, 0]).reshape(-1)
        one = np.ones(12)
        np.testing.assert_array_equal(counts, [one, one, loops, loops, one])
    assert not launch(text, block=96).executions


@pytest.mark.parametrize(
    ("access", "stride", "wavefronts", "conflicts"),
    [
        ("ld.shared.u32 %r5, [%r3];", 4, 1, 0),
        ("ld.shared.u32 %r5, [%r3];", 0, 1, 0),
        ("ld.shared.u32 %r5, [%r3];", 8, 2, 1),
        ("ld.shared.u32 %r5, [%r3];", 12, 1, 0),
        ("ld.shared.u32 %r5, [%r3];", 128, 32, 31),
        ("ld.shared.u32 %r5, [%r3];", 132, 1, 0),
        ("ld.shared.u16 %h5, [%r3];", 2, 1, 0),
        ("st.shared.u32 [%r3], %r1;", 16, 4, 3),
        ("ld.shared.u64 %rd5, [%r3];", 8, 2, 0),
        ("ld.shared.u64 %rd5, [%r3];", 16, 4, 2),
        ("ld.shared.v2.u32 {%r5, %r6}, [%r3];", 8, 2, 0),
        ("ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3];", 16, 4, 0),
        ("ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3];", 32, 8, 4),
        ("ld.shared::cluster.u32 %r5, [%r3];", 8, 2, 1),
        ("cvt.u64.u32 %rd3, %r3; cvta.shared.u64 %rd3, %rd3; ld.u32 %r5, [%rd3];", 8, 2, 1),
        ("atom.shared.add.u32 %r5, [%r3], 1;", 8, 2, 1),
    ],
)
def test_bank_conflicts(access, stride, wavefronts, conflicts):
    head = ".shared .align 128 .b8 buffer[8192];\n"
    text = f"mov.u32 %r1, %tid.x; mov.u32 %r2, buffer; mad.lo.u32 %r3, %r1, {stride}, %r2;\n{access}"
    options = {"head": head, "strict": False, "profile": True}
    if access.startswith("atom"):
        text = text.replace("atom", "st.shared.u32 [%r3], 0;\natom")
        wavefronts, conflicts = 2 * wavefronts, 2 * conflicts
    stats = launch(text, block=32, grid=3, **options)
    assert (stats.shared_wavefronts, stats.shared_conflicts) == (3 * wavefronts, 3 * conflicts)
    assert sum(stats.conflicts_at.values()) == stats.shared_conflicts
    half = launch(text.replace("mad.lo", "rem.u32 %r1, %r1, 16; mad.lo"), block=32, **options)
    assert half.shared_wavefronts <= stats.shared_wavefronts / 3  # as halves share all words


def test_vectors_and_narrow_types():
    memory = ptx.Memory(1 << 20)
    a, b = memory.alloc(512), memory.alloc(512)
    memory.write(a, np.arange(128, dtype="f4"))
    text = """mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 16; add.s64 %rd2, %rd1, %rd90;
    add.s64 %rd3, %rd1, %rd91;
    ld.global.L1::no_allocate.L2::128B.v4.f32 {%f1, %f2, _, %f4}, [%rd2];
    st.global.cs.v4.f32 [%rd3], {%f4, %f2, %f1, 0f3F800000};"""
    launch(text, args=[a, b], memory=memory)
    x = np.arange(128, dtype="f4").reshape(32, 4)
    np.testing.assert_array_equal(
        memory.read(b, "f4", (32, 4)), np.stack([x[:, 3], x[:, 1], x[:, 0], np.ones(32)], 1)
    )
    c = memory.alloc(128)
    memory.write(a, np.arange(-16, 16, dtype="i1"))
    text = """mov.u32 %r1, %tid.x; cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd1, %rd90;
    ld.global.s8 %r2, [%rd1];
    mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd2, %rd91; st.global.u32 [%rd2], %r2;"""
    launch(text, args=[a, c], memory=memory)
    np.testing.assert_array_equal(memory.read(c, "i4", 32), np.arange(-16, 16))


# threads together

SHARED = ".shared .align 16 .b8 buffer[512];\n"
OUT = "mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %rd90; st.global.u32 [%rd1], %r5;"


def collect(body, block=32, grid=1, head=SHARED, **options):
    """%r5 of all threads, after `body`; %r1 is a thread's number in the grid, %r2 in the block."""
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(4 * block * grid)
    start = """mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x;
    mad.lo.u32 %r1, %r3, %r4, %r2;\n"""
    launch(start + body + OUT, grid, block, [address], memory, head, **options)
    return memory.read(address, "u4", (grid, block))


EXCHANGE = """mov.u32 %r6, buffer; shl.b32 %r7, %r2, 2; add.u32 %r7, %r6, %r7; st.shared.u32 [%r7], %r1;
bar.sync 0;
xor.b32 %r8, %r2, 33; shl.b32 %r8, %r8, 2; add.u32 %r8, %r6, %r8; ld.shared.u32 %r5, [%r8];
"""


def test_barrier_and_shared_memory():
    for lanes in (64, 128, 4096):
        found = collect(EXCHANGE, block=64, grid=5, racecheck=True, lanes=lanes)
        np.testing.assert_array_equal(found, 64 * np.arange(5)[:, None] + (np.arange(64) ^ 33))


def test_races_are_found():
    unordered = EXCHANGE.replace("bar.sync 0;", "")
    with pytest.raises(ptx.PTXError, match=r"race: stored by another thread.*ld.shared"):
        collect(unordered, block=64, racecheck=True)
    warp = EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;")
    with pytest.raises(ptx.PTXError, match="race: stored by another thread"):
        collect(warp, block=64, racecheck=True)
    inside = warp.replace("33", "1")
    collect(inside, block=64, racecheck=True)  # within a warp, which is in step
    with pytest.raises(ptx.PTXError, match="race: stored by another thread"):
        collect(inside.replace("bar.warp.sync -1;", ""), block=64, racecheck=True)
    again = EXCHANGE + "st.shared.u32 [%r7], %r5;"
    with pytest.raises(ptx.PTXError, match=r"race: loaded by another thread.*st.shared"):
        collect(again, block=64, racecheck=True)
    collect(EXCHANGE + "bar.sync 0; st.shared.u32 [%r7], %r5;", block=64, racecheck=True)
    with pytest.raises(ptx.PTXError, match="race: stored by two threads"):
        collect("st.shared.u32 [buffer], %r2; mov.u32 %r5, 0;", racecheck=True)
    everyone = EXCHANGE.replace(
        "st.shared.u32 [%r7], %r1;",
        "st.shared.u32 [%r7], %r1; bar.sync 0; ld.shared.u32 %r5, [buffer];",
    )
    everyone = everyone.replace(
        "ld.shared.u32 %r5, [buffer];\nbar.sync 0;", "ld.shared.u32 %r5, [buffer];"
    )
    with pytest.raises(ptx.PTXError, match="race: loaded by another thread"):
        collect(everyone + "st.shared.u32 [%r7], %r5;", block=64, racecheck=True)


def test_shared_memory_is_not_initialised():
    with pytest.raises(ptx.PTXError, match="not initialised"):
        collect("ld.shared.u32 %r5, [buffer+4];")
    with pytest.raises(ptx.PTXError, match="not allocated"):
        collect("ld.shared.u32 %r5, [buffer+512];")
    dynamic = ".extern .shared .align 16 .b8 more[];\n"
    text = "st.shared.u32 [more+508], %r1; ld.shared.u32 %r5, [more+508];"
    assert collect(text, head=dynamic, shared=512, block=1).tolist() == [[0]]
    with pytest.raises(ptx.PTXError, match="not allocated"):
        collect(text, head=dynamic, shared=508, block=1)


def test_generic_addresses():
    text = """mov.u64 %rd5, buffer; cvta.shared.u64 %rd6, %rd5; isspacep.shared %p1, %rd6;
    isspacep.global %p2, %rd90;
    mul.wide.u32 %rd7, %r2, 4; add.u64 %rd6, %rd6, %rd7; st.u32 [%rd6], %r2;
    ld.shared.u32 %r5, [%rd5+124];
    and.pred %p3, %p1, %p2; selp.u32 %r5, %r5, 0, %p3;"""
    assert (collect(text) == 31).all()
    split = """mov.u64 %rd5, buffer; cvta.shared.u64 %rd6, %rd5; mul.wide.u32 %rd7, %r2, 4;
    add.u64 %rd6, %rd6, %rd7;
    add.u64 %rd8, %rd90, %rd7; and.b32 %r9, %r2, 1; setp.eq.u32 %p1, %r9, 0;
    selp.b64 %rd9, %rd6, %rd8, %p1;
    st.u32 [%rd9], %r2; ld.u32 %r5, [%rd9];"""
    np.testing.assert_array_equal(collect(split)[0], np.arange(32))
    with pytest.raises(ptx.PTXError, match="not a generic address"):
        collect("mov.u64 %rd5, 0x700000000000000; ld.u32 %r5, [%rd5];")


def test_barriers_that_are_never_complete():
    # those that skip the barrier and exit do not count, those that wait elsewhere do
    assert collect(
        "setp.lt.u32 %p1, %r2, 32; mov.u32 %r5, 7; @%p1 bra L; bar.sync 0; L:", block=64
    ).all()
    text = """setp.lt.u32 %p1, %r2, 32; mov.u32 %r5, 7; @%p1 bra L; bar.sync 0; bra M;
    L: bar.warp.sync 0xffffffff; setp.lt.u32 %p2, %r2, 16; @%p2 bra M; bar.warp.sync -1; M:"""
    with pytest.raises(ptx.PTXError, match=r"who is there differ: exited|deadlock"):
        collect(text, block=64)
    divided = (
        "setp.lt.u32 %p1, %r2, 16; mov.u32 %r5, 7; @%p1 bra L; bar.sync 0; bra M; L: bar.sync 0; M:"
    )
    with pytest.raises(ptx.PTXError, match="a warp is divided at barriers"):
        collect(divided)
    assert collect(divided.replace("16", "32"), block=64).all()
    with pytest.raises(ptx.PTXError, match="too many instructions"):
        collect("L: bra L;", limit=1000)


@pytest.mark.parametrize("mode", ["bfly", "down", "up", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode, width):
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 %r5|%p1, %r1, 3, {clamp}, -1; @!%p1 add.u32 %r5, %r5, 1000;"
    found = collect(text, block=64)[0]
    for lane in range(64):
        first = lane // width * width
        k = lane - first
        source = {"bfly": k ^ 3, "down": k + 3, "up": k - 3, "idx": 3}[mode]
        inside = 0 <= source < width
        assert found[lane] == first + (source if inside else k) + 1000 * (not inside)


def test_shuffles_need_those_whom_the_mask_names():
    low = """setp.lt.u32 %p1, %r2, 16; mov.u32 %r5, 0; @!%p1 bra L;
    shfl.sync.bfly.b32 %r5, %r1, 1, 31, {}; L:"""
    collect(low.format("0xffff"))
    with pytest.raises(ptx.PTXError, match=r"deadlock|exited"):
        collect(low.format("-1"))
    with pytest.raises(ptx.PTXError, match="its mask does not name"):
        collect(low.format("0x7fff"))
    with pytest.raises(ptx.PTXError, match="exited threads"):
        collect("shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", block=40)
    with pytest.raises(ptx.PTXError, match="takes no part"):
        collect("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0x1;", block=1)
    # some come later, by a path that lies behind
    late = """setp.lt.u32 %p1, %r2, 5; @%p1 bra B; A: shfl.sync.idx.b32 %r5, %r1, 2, 31, -1; bra C;
    B: add.u32 %r1, %r1, 0; bra A; C:"""
    assert (collect(late) == 2).all()


def test_votes():
    head = "setp.lt.u32 %p1, %r2, 5;"
    assert (
        collect(head + "vote.sync.ballot.b32 %r5, %p1, -1;", block=64)[0] == [31] * 32 + [0] * 32
    ).all()
    for name, values in {"any": (1, 0), "all": (0, 0), "uni": (0, 1)}.items():
        text = head + f"vote.sync.{name}.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2;"
        assert collect(text, block=64)[0].tolist() == [values[0]] * 32 + [values[1]] * 32
    assert (collect("redux.sync.max.u32 %r5, %r2, -1;", block=64)[0] == [31] * 32 + [63] * 32).all()
    assert (collect("redux.sync.add.s32 %r5, %r2, -1;") == 31 * 16).all()
    part = collect("mov.u32 %r5, 0; setp.lt.u32 %p1, %r2, 7; @!%p1 bra L; activemask.b32 %r5; L:")[0]
    assert part.tolist() == [127] * 7 + [0] * 25


def test_atomics():
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(16)
    memory.write(address, np.zeros(4, "u4"))
    text = """mov.u32 %r1, %tid.x; atom.global.add.u32 %r2, [%rd90], 1;
    red.global.max.u32 [%rd90+4], %r2;
    cvt.rn.f32.u32 %f1, %r1; atom.global.add.f32 %f2, [%rd90+8], %f1;
    atom.global.cas.b32 %r3, [%rd90+12], 31, 5;
    red.global.or.b32 [%rd90+12], 31;"""
    launch(text, args=[address], memory=memory, grid=3)
    assert memory.read(address, "u4", 2).tolist() == [96, 95]
    assert memory.read(address + 8, "f4", ()) == 3 * 31 * 16
    assert memory.read(address + 12, "u4", ()) == 31


CLUSTER_BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
CLUSTER = f"""mov.u32 %r6, %cluster_ctarank; mov.u32 %r10, buffer;
shl.b32 %r7, %r2, 2; add.u32 %r7, %r10, %r7; st.shared.u32 [%r7], %r1;
{CLUSTER_BARRIER}
xor.b32 %r8, %r6, 1; mapa.shared::cluster.u32 %r9, %r7, %r8; ld.shared::cluster.u32 %r5, [%r9];
"""
CLUSTER_END = "barrier.cluster.arrive; barrier.cluster.wait;\n"


def test_clusters():
    for lanes in (64, 4096):
        found = collect(CLUSTER + CLUSTER_END, block=32, grid=8, cluster=2, lanes=lanes, racecheck=True)
        np.testing.assert_array_equal(found, 32 * (np.arange(8) ^ 1)[:, None] + np.arange(32))
    generic = CLUSTER.replace(
        "mapa.shared::cluster.u32 %r9, %r7, %r8; ld.shared::cluster.u32 %r5, [%r9];",
        """
    cvt.u64.u32 %rd5, %r7; cvta.shared.u64 %rd5, %rd5; mapa.u64 %rd6, %rd5, %r8; ld.u32 %r5, [%rd6];""",
    )
    np.testing.assert_array_equal(collect(generic + CLUSTER_END, grid=8, cluster=2), found)
    with pytest.raises(ptx.PTXError, match="race: stored by another"):
        collect(CLUSTER.replace(CLUSTER_BARRIER, "bar.sync 0;"), grid=2, cluster=2, racecheck=True)
    with pytest.raises(ptx.PTXError, match="outside shared memory"):
        collect(CLUSTER.replace("xor.b32 %r8, %r6, 1", "mov.u32 %r8, 2"), grid=2, cluster=2)
    with pytest.raises(ptx.PTXError, match="without arrive"):
        collect("barrier.cluster.wait;", grid=2, cluster=2)
    with pytest.raises(ptx.PTXError, match="arrives twice"):
        collect("barrier.cluster.arrive; barrier.cluster.arrive;", grid=2, cluster=2)
    early = "setp.eq.u32 %p1, %r3, 0; mov.u32 %r5, 0; @%p1 bra L;\n" + CLUSTER + "L:"
    with pytest.raises(ptx.PTXError, match="a block that has exited"):
        collect(early.replace("L:", OUT + "ret; L:"), grid=2, cluster=2)
    with pytest.raises(ptx.PTXError, match="not made of clusters"):
        collect(CLUSTER, grid=3, cluster=2)


def test_special_registers():
    names = [
        "tid.x",
        "tid.y",
        "tid.z",
        "ctaid.x",
        "ctaid.y",
        "ctaid.z",
        "ntid.y",
        "nctaid.x",
        "laneid",
        "warpid",
    ]
    names += ["cluster_ctarank", "clusterid.x", "lanemask_lt", "cluster_ctaid.x"]
    memory = ptx.Memory(1 << 20)
    grid, block = (4, 3, 2), (5, 4, 3)
    address = memory.alloc(4 * len(names) * 24 * 60)
    text = """mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;
    mad.lo.u32 %r2, %r3, 4, %r2;
    mad.lo.u32 %r1, %r2, 5, %r1; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %ctaid.z;
    mad.lo.u32 %r5, %r6, 3, %r5; mad.lo.u32 %r4, %r5, 4, %r4; mad.lo.u32 %r1, %r4, 60, %r1;
    mad.wide.u32 %rd1, %r1, 56, %rd90;\n"""
    text += "".join(
        f"mov.u32 %r9, %{name}; st.global.u32 [%rd1+{4 * k}], %r9;\n" for k, name in enumerate(names)
    )
    launch(text, grid, block, [address], memory, cluster=2, lanes=256)
    found = dict(
        zip(
            names,
            np.moveaxis(memory.read(address, "u4", (2, 3, 4, 3, 4, 5, len(names))), -1, 0),
            strict=True,
        )
    )
    z, y, x, tz, ty, tx = np.indices((2, 3, 4, 3, 4, 5))
    linear = tx + 5 * ty + 20 * tz
    expected = {
        "tid.x": tx,
        "tid.y": ty,
        "tid.z": tz,
        "ctaid.x": x,
        "ctaid.y": y,
        "ctaid.z": z,
        "ntid.y": 4,
        "nctaid.x": 4,
    }
    expected |= {
        "laneid": linear % 32,
        "warpid": linear // 32,
        "cluster_ctarank": x % 2,
        "clusterid.x": x // 2,
    }
    expected |= {"lanemask_lt": (1 << linear % 32) - 1, "cluster_ctaid.x": x % 2}
    for name in names:
        np.testing.assert_array_equal(found[name], np.broadcast_to(expected[name], x.shape), name)


# programs


def test_loops_that_threads_leave_at_different_times():
    text = "mov.u32 %r5, 0; L: setp.ge.u32 %p1, %r5, %r2; @%p1 bra M; add.u32 %r5, %r5, 1; bra L; M:"
    np.testing.assert_array_equal(collect(text, block=100, grid=3), np.tile(np.arange(100), (3, 1)))


def test_branch_tables():
    text = """T: .branchtargets L0, L1, L2; rem.u32 %r6, %r2, 3; brx.idx %r6, T;
    L0: mov.u32 %r5, 10; bra M; L1: mov.u32 %r5, 11; bra M; L2: mov.u32 %r5, 12; M:"""
    np.testing.assert_array_equal(collect(text)[0], 10 + np.arange(32) % 3)


def test_functions_local_memory_and_tables():
    head = """.global .align 4 .u32 table[4] = {5, 0x10, 7, 8};
.visible .func (.param .b32 result) twice(.param .b32 value)
{
  .reg .b32 %r<9>; .reg .pred %p<2>;
  ld.param.b32 %r1, [value+0];
  setp.gt.u32 %p1, %r1, 7;
  @%p1 bra BIG;
  add.u32 %r1, %r1, %r1;
  st.param.b32 [result+0], %r1;
  ret;
BIG:
  st.param.b32 [result+0], %r1;
  ret;
}
.func (.reg .b32 o) plus(.reg .b32 a, .reg .b32 b) { add.u32 o, a, b; ret; }
"""
    text = """.local .align 8 .b8 __local_depot0[16]; .reg .b64 %SP; .reg .b64 %SPL;
    mov.u64 %SPL, __local_depot0; cvta.local.u64 %SP, %SPL;
    and.b32 %r6, %r2, 3; mul.wide.u32 %rd3, %r6, 4; add.u64 %rd4, %SP, %rd3; st.u32 [%rd4], %r2;
    add.u64 %rd5, %SPL, %rd3;
    ld.local.u32 %r7, [%rd5];
    mov.u64 %rd6, table; cvta.global.u64 %rd6, %rd6; add.u64 %rd6, %rd6, %rd3;
    ld.global.u32 %r8, [%rd6];
    { // callseq
    .param .b32 param0; st.param.b32 [param0+0], %r7; .param .b32 retval0;
    call.uni (retval0), twice, (param0);
    ld.param.b32 %r9, [retval0+0];
    }
    call (%r5), plus, (%r8, %r9);"""
    memory = ptx.Memory(1 << 20)
    address = memory.alloc(128)
    start = "mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.x;\n"
    module = ptx.Module(HEAD + head + kernel(start + text + OUT, 1))
    assert module.uses_local
    for _ in range(2):
        module.launch(None, 1, 32, [address], memory)
    t = np.arange(32)
    np.testing.assert_array_equal(
        memory.read(address, "u4", 32), np.array([5, 16, 7, 8])[t % 4] + np.where(t > 7, t, 2 * t)
    )
    assert not ptx.Module(HEAD + kernel("")).uses_local


def test_parameters():
    text = """.visible .entry k(
    .param .u64 out, .param .f32 a, .param .align 8 .b8 s[16], .param .u16 h, .param .f64 d)
.maxntid 64, 1, 1
{ .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .f64 %fd<9>; .reg .b32 %r<9>;
ld.param.u64 %rd1, [out]; ld.param.f32 %f1, [a]; ld.param.u32 %r1, [s+4]; ld.param.u16 %r2, [h];
ld.param.f64 %fd1, [d];
st.global.f32 [%rd1], %f1; st.global.u32 [%rd1+4], %r1; st.global.u32 [%rd1+8], %r2;
st.global.f64 [%rd1+16], %fd1; }"""
    memory = ptx.Memory(1 << 20)
    out = memory.alloc(32)
    module = ptx.Module(HEAD + text)
    module.launch("k", 1, 1, [out, 1.5, np.arange(4, dtype="u4"), np.int64(-1), 2], memory)
    assert memory.read(out, "f4", ()) == 1.5
    assert memory.read(out + 4, "u4", 2).tolist() == [1, 65535]
    assert memory.read(out + 16, "f8", ()) == 2
    for args, block, reason in (
        ([out], 1, "takes 5 arguments"),
        ([out, 1, bytes(16), 1, 2], 65, "at most"),
    ):
        with pytest.raises(ptx.PTXError, match=reason):
            module.launch("k", 1, block, args, memory)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wgmma.fence.sync.aligned;", "unknown instruction"),
        ("add.odd.u32 %r1, %r2, %r3;", r"line 9: unknown modifier .odd: add.odd"),
        ("add.f32 %f1, %rd1, %f2;\nadd.f32 %f1, %r1, %nothing;", "unknown name %nothing"),
        ("add.f64 %fd1, %f1, %f2;", "not understood"),
        ("bra NOWHERE;", "no label NOWHERE"),
        ("call.uni printf, (%r1);", "not a function of this module"),
        ("bar.sync 1;", "only barrier 0"),
        ("fma.rz.f64 %fd1, %fd1, %fd1, %fd1;", "no such form"),
        ("mul.u32 %r1, %r1, %r1;", "no such form"),
    ],
)
def test_what_is_not_known_is_refused(text, reason):
    with pytest.raises(ptx.PTXError, match=re.escape(reason) if "(" in reason else reason):
        ptx.Module(HEAD + kernel(text))


# what the compiler makes


@pytest.fixture(scope="module")
def cuda():
    pytest.importorskip("numba_cuda")
    return pytest.importorskip("numba.cuda")


def compiled(cuda, function, signature, cc):
    from numba import types

    kinds = {"f": types.CPointer(types.float32), "d": types.CPointer(types.float64), "i": types.int64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text, _ = cuda.compile_ptx(function, types.void(*(kinds[s] for s in signature)), cc=cc)
        except Exception as reason:  # no NVVM here
            pytest.skip(f"cannot compile: {reason}")
    return ptx.Module(text)


@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (9, 0)])
def test_compiled_logsumexp(cuda, cc, rng):
    from numba import float32, int64

    def kernel(x, out, n):
        partial = cuda.shared.array(32, float32)
        thread, row = cuda.threadIdx.x, int64(cuda.blockIdx.x)
        m, s = float32(-math.inf), float32(0)
        i = int64(thread)
        while i < n:
            v = x[row * n + i]
            top = max(m, v)
            if top > -math.inf:
                s = s * math.exp(m - top) + math.exp(v - top)
            m = top
            i += cuda.blockDim.x
        for k in (16, 8, 4, 2, 1):
            other, weight = cuda.shfl_xor_sync(0xFFFFFFFF, m, k), cuda.shfl_xor_sync(0xFFFFFFFF, s, k)
            top = max(m, other)
            if top > -math.inf:
                s = s * math.exp(m - top) + weight * math.exp(other - top)
            m = top
        if thread % 32 == 0:
            partial[thread // 32] = m + math.log(s) if s > 0 else m
        cuda.syncthreads()
        if thread == 0:
            total = float32(0)
            top = partial[0]
            for k in range(1, cuda.blockDim.x // 32):
                top = max(top, partial[k])
            for k in range(cuda.blockDim.x // 32):
                total += math.exp(partial[k] - top)
            out[row] = top + math.log(total)

    module = compiled(cuda, kernel, "ffi", cc)
    memory = ptx.Memory(1 << 22)
    for rows, n in ((40, 300), (3, 1), (1, 70)):
        x = (10 * rng.standard_normal((rows, n))).astype("f4")
        a, out = memory.alloc(x.nbytes), memory.alloc(4 * rows)
        memory.write(a, x)
        for perturb in (0, 1):
            stats = module.launch(
                None, rows, 128, [a, out, n], memory, racecheck=perturb, track=True, perturb=perturb
            )
            assert stats.max_reads == stats.max_writes == 1
            assert (stats.bytes_read, stats.bytes_written) == (x.nbytes, 4 * rows)
            expected = np.log(np.exp(x.astype("f8")).sum(axis=1))
            # a few roundings of the result and of exponents up to 80 in size
            np.testing.assert_allclose(
                memory.read(out, "f4", rows), expected, rtol=0, atol=80 * 2.0**-22
            )


@pytest.mark.parametrize("cc", [(7, 5), (9, 0)])
def test_compiled_float64(cuda, cc, rng):
    def kernel(x, out, n):
        i = cuda.grid(1)
        if i < n:
            v = x[i]
            out[5 * i] = math.exp(v)
            out[5 * i + 1] = math.log(abs(v))
            out[5 * i + 2] = math.log1p(abs(v)) / 3.0
            out[5 * i + 3] = math.sqrt(abs(v))
            out[5 * i + 4] = math.tanh(v)

    module = compiled(cuda, kernel, "ddi", cc)
    x = np.concatenate(
        [rng.standard_normal(300) * 30, [1e-300, 1e300, 0.5, -745, 709.7, np.inf, -np.inf]]
    )
    memory = ptx.Memory(1 << 20)
    a, out = memory.alloc(x.nbytes), memory.alloc(5 * x.nbytes)
    memory.write(a, x)
    module.launch(None, 3, 128, [a, out, len(x)], memory)
    y = np.abs(x)
    with np.errstate(all="ignore"):
        expected = np.stack([np.exp(x), np.log(y), np.log1p(y) / 3, np.sqrt(y), np.tanh(x)], axis=1)
    found = memory.read(out, "f8", (len(x), 5))
    # libdevice is within two units of the last place, NumPy within one
    np.testing.assert_array_max_ulp(found, expected, 4)


def test_compiled_float32_functions(cuda, rng):
    from numba import float32

    def kernel(x, out, n):
        i = cuda.grid(1)
        if i < n:
            v = x[i]
            out[4 * i] = math.exp(v)
            out[4 * i + 1] = math.log(abs(v))
            out[4 * i + 2] = float32(1) / v
            out[4 * i + 3] = math.log1p(math.exp(-abs(v)))

    module = compiled(cuda, kernel, "ffi", (9, 0))
    x = np.concatenate([rng.standard_normal(400) * 20, [1e-40, 88.7, -103, 1e30]]).astype("f4")
    memory = ptx.Memory(1 << 20)
    a, out = memory.alloc(x.nbytes), memory.alloc(4 * x.nbytes)
    memory.write(a, x)
    w = x.astype("f8")
    with np.errstate(all="ignore"):
        expected = np.stack([np.exp(w), np.log(abs(w)), 1 / w, np.log1p(np.exp(-abs(w)))], 1).astype(
            "f4"
        )
    for perturb in (0, 5):
        module.launch(None, 4, 128, [a, out, len(x)], memory, perturb=perturb)
        np.testing.assert_array_max_ulp(memory.read(out, "f4", (len(x), 4)), expected, 4)
