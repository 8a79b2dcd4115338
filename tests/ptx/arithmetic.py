"""What instructions compute, on arrays: functions of the sources that return the result.

Floating point is that of the host, which rounds as a GPU does; a NaN of float32 is 0x7fffffff.
"""

import numba
import numpy as np
from numba.extending import intrinsic

NAN32 = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
TINY = np.float32(2.0**-126)


@intrinsic
def _fma(_, a, b, c):
    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, b, c), generate


@numba.vectorize(["float32(float32,float32,float32)", "float64(float64,float64,float64)"])
def fma(a, b, c):  # NumPy has none, and the one of the hardware needs no proof
    return _fma(a, b, c)


def canonical(x):
    np.copyto(x, NAN32, where=np.isnan(x))


def flush(x):
    """Subnormal numbers to zeros of their sign."""
    return np.multiply(x, np.abs(x) >= TINY)


def saturated(x):
    """Into [0, 1]; 0 for a NaN, and for -0."""
    return np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1)) + x.dtype.type(0)


def finished(function, kind, ftz=False, sat=False):
    """function(*sources, out) with what float32 adds to it: .ftz, .sat, one NaN."""
    if kind not in ("f32", "f64"):
        return function

    def run(*args):
        *sources, out = args
        if ftz:
            sources = [flush(s) if s.dtype == np.float32 else s for s in sources]
        function(*sources, out)
        if kind == "f64":
            return
        if ftz:
            out[...] = flush(out)
        canonical(out)
        if sat:
            out[...] = saturated(out)

    return run


def returning(function):
    def run(*args):
        args[-1][...] = function(*args[:-1])

    return run


def directed(mode, nearest, excess):
    """A value rounded by `mode`, from a neighbour and the sign of what it exceeds that by."""
    if mode == "rz":
        wrong = np.where(nearest > 0, excess < 0, (excess > 0) & (nearest < 0))
    else:
        wrong = excess < 0 if mode == "rm" else excess > 0
    goal = {"rz": 0, "rm": -np.inf, "rp": np.inf}[mode]
    return np.where(wrong, np.nextafter(nearest, nearest.dtype.type(goal)), nearest)


def two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def rounded(base, mode, kind):
    """add, sub, mul, fma with a rounding other than to nearest."""

    def run(a, b, c=None):
        a, b = a.astype(np.float64), b.astype(np.float64)
        c = None if c is None else c.astype(np.float64)
        if base == "sub":
            b = -b
        if base in ("add", "sub"):
            s, e = two_sum(a, b)
        elif kind == "f32":
            s, e = (a * b, 0.0) if c is None else two_sum(a * b, c)  # the product is exact
        else:
            s = a * b
            e = fma(a, b, -s)
        nearest = s.astype(np.float32 if kind == "f32" else np.float64)
        return directed(mode, nearest, np.where(s == nearest, e, s - nearest))

    return run


def extremum(ufunc, bitwise):
    """fmin or fmax, which ignore a NaN; -0 < 0, for which zeros are combined by their bits."""

    def run(a, b):
        r = ufunc(a, b)
        if r.all():
            return r
        bits = f"u{r.itemsize}"
        return np.where(a == b, bitwise(a.view(bits), b.view(bits)).view(r.dtype), r)

    return run


fmin, fmax = extremum(np.fmin, np.bitwise_or), extremum(np.fmax, np.bitwise_and)


def nan_min(a, b):
    return np.where(np.isnan(a) | np.isnan(b), np.nan, fmin(a, b))


def nan_max(a, b):
    return np.where(np.isnan(a) | np.isnan(b), np.nan, fmax(a, b))


def noise(x, seed):
    """The same for the same bits; in [-1, 1]."""
    bits = x.view(f"u{x.itemsize}").astype(np.uint64) + np.uint64(seed)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        bits = (bits ^ (bits >> np.uint64(32))) * np.uint64(factor)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def quotient_approx(a, b):
    """.approx: no quotient by what is beyond 2**126, whose reciprocal is subnormal."""
    q = a / b
    return np.where((np.abs(b) > 2.0**126) & np.isfinite(b), np.where(np.isinf(a), np.nan, 0 * q), q)


# in float64: the function, the error that the manual allows, and whether it is absolute
APPROXIMATE = {
    "ex2": (np.exp2, 2.0**-22, False),
    "lg2": (np.log2, 2.0**-22, lambda x: (x > 0.5) & (x < 2)),
    "rcp": (np.reciprocal, 2.0**-23, False),
    "sqrt": (np.sqrt, 2.0**-23, False),
    "rsqrt": (lambda x: np.copysign(1, x) / np.sqrt(x), 2.0**-22.9, False),
    "sin": (np.sin, 2.0**-20.5, True),
    "cos": (np.cos, 2.0**-20.5, True),
    "tanh": (np.tanh, 2.0**-11, False),
    "div": (quotient_approx, 2.0**-22, False),
    "div.full": (np.divide, 2.0**-22, False),
}


def approximate(name, machine):
    function, bound, absolute = APPROXIMATE[name]

    def run(x, *others):
        y = function(x.astype(np.float64), *(o.astype(np.float64) for o in others))
        if machine.perturb:
            # half a unit of the last place is left for the rounding to float32; exp2(0) is 1
            error = (bound - 2.0**-24) * noise(x, machine.perturb) * (x != 0)
            if callable(absolute):
                y = np.where(absolute(x), y + error, y * (1 + error))
            else:
                y = np.where(np.isfinite(y), y + error, y) if absolute else y * (1 + error)
        return y

    return run


def gross(name, machine):
    """rcp and rsqrt .approx.ftz.f64: the upper 32 bits of a double."""

    def run(x):
        x = np.multiply(x, np.abs(x) >= 2.0**-1022)
        y = 1 / x if name == "rcp" else np.copysign(1, x) / np.sqrt(x)
        if machine.perturb:
            y = y * (1 + 2.0**-21 * noise(x, machine.perturb))
        y = np.multiply(y, np.abs(y) >= 2.0**-1022)
        return (y.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)

    return run


def widen(x):
    """bfloat16 bits to float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x, mode="rn"):
    """float32 to bfloat16 bits."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    if mode == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def on_bfloat16(function):
    """An operation on bfloat16 by way of float32."""

    def run(*args):
        *operands, out = args
        result = np.empty(out.shape, np.float32)
        function(*map(widen, operands), result)
        out[...] = narrow(result)

    return run


def to_integer(x, dtype, mode, nan_as_top):
    x = x.astype(np.float64)
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    info = np.iinfo(dtype)
    with np.errstate(invalid="ignore"):
        y = np.where((x >= float(info.min)) & (x < float(info.max) + (info.bits < 54)), x, 0).astype(
            dtype
        )
    y = np.where(x >= float(info.max), dtype(info.max), y)
    y = np.where(x <= float(info.min), dtype(info.min), y)
    top = np.array(1 << (info.bits - 1), f"u{info.bits // 8}").view(dtype)[()]
    return np.where(np.isnan(x), top if nan_as_top else dtype(0), y)


def converter(to, source, mode, sat, ftz):
    """The function of cvt between two kinds; None where it is not known."""
    floats = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
    number = lambda k: np.dtype(("i" if k[0] == "s" else "u") + str(int(k[1:]) // 8)).type  # noqa: E731
    if source == "bf16":
        inner = converter(to, "f32", mode, sat, ftz)
        return inner and (lambda x: inner(widen(x)))
    if to == "bf16":
        return (lambda x: narrow(x, mode)) if source == "f32" and mode in ("rn", "rz") else None
    if to not in floats and source not in floats:
        if sat:
            low, high = np.iinfo(number(to)).min, np.iinfo(number(to)).max
            own = np.iinfo(number(source))
            low, high = max(low, own.min), min(high, own.max)
            return lambda x: np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(number(to))
        return lambda x: x.astype(number(to))
    if to not in floats:
        wide = source == "f64" or to[1:] == "64"
        clean = flush if ftz and source == "f32" else np.asarray
        return lambda x: to_integer(clean(x), number(to), mode, wide) if mode else None
    goal = floats[to]
    integral = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(mode)
    if source in floats:
        widening = SIZE[source] < SIZE[to]
        if mode in ("rz", "rm", "rp") and (to, source) == ("f32", "f64"):

            def change(x):
                nearest = x.astype(goal)
                return directed(mode, nearest, x - nearest)

        elif integral:
            change = lambda x: integral(x).astype(goal)  # noqa: E731
        elif mode in (None, "rn") and (widening or mode or source == to):
            change = lambda x: x.astype(goal)  # noqa: E731
        else:
            return None
    elif mode == "rn":
        change = lambda x: x.astype(goal)  # noqa: E731
    elif mode and source[1:] != "64" and to == "f32":

        def change(x):
            nearest = x.astype(goal)
            return directed(mode, nearest, x - nearest.astype(np.float64))

    else:
        return None

    def run(x):
        y = change(flush(x) if ftz and source == "f32" else x)
        y = flush(y) if ftz and to == "f32" else y
        if to == "f32" and (source != to or mode):
            y = np.where(np.isnan(y), NAN32, y)
        return saturated(y) if sat else y

    return run


SIZE = {"f16": 2, "f32": 4, "f64": 8}


def high_product(a, b):
    if a.itemsize < 8:
        wide = f"{a.dtype.kind}{2 * a.itemsize}"
        return ((a.astype(wide) * b.astype(wide)) >> np.array(8 * a.itemsize, wide)).astype(a.dtype)
    low32, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    (xl, xh), (yl, yh) = (x & low32, x >> s), (y & low32, y >> s)
    middle = xh * yl + (xl * yl >> s)
    other = xl * yh + (middle & low32)
    high = xh * yh + (middle >> s) + (other >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def quotient(a, b):
    """Towards zero; all ones by zero."""
    q = (a - np.fmod(a, b)) // b
    return np.where(b == 0, np.array(-1).astype(q.dtype), q)


def clamped_shift(left):
    def run(a, b):
        shift = np.left_shift if left else np.right_shift
        return shift(a, np.minimum(b, np.uint32(8 * a.itemsize)).astype(a.dtype))

    return run


def funnel_shift(left, wrap):
    def run(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return run


def permute(a, b, c):
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.uint32(0)
    for k in range(4):
        pick = (c >> np.uint32(4 * k)).astype(np.uint64)
        byte = (both >> (np.uint64(8) * (pick & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint64(8), sign, byte)
        result = result | (byte << np.uint64(8 * k)).astype(np.uint32)
    return result


def extract(a, position, length):
    bits = 8 * a.itemsize
    position, length = (np.minimum(v & np.uint32(255), np.uint32(bits)) for v in (position, length))
    left = clamped_shift(True)
    right = clamped_shift(False)
    if a.dtype.kind == "u":
        return right(a, position) & ~left(~np.zeros_like(a), length)
    end = np.minimum(position + length, np.uint32(bits))  # beyond the top are copies of the sign
    copies = right(left(a, np.uint32(bits) - end), np.uint32(bits) - end + position)
    return np.where(length == 0, a.dtype.type(0), copies)


def insert(a, b, position, length):
    position, length = position & np.uint32(255), length & np.uint32(255)
    left = clamped_shift(True)
    mask = left(~left(~np.zeros_like(b), length), position)
    return (left(a, position) & mask) | (b & ~mask)


def leading_zeros(a):
    x = a.view(f"u{a.itemsize}")
    for k in (1, 2, 4, 8, 16, 32):
        if k < 8 * a.itemsize:
            x = x | (x >> x.dtype.type(k))
    return np.uint32(8 * a.itemsize) - np.bitwise_count(x).astype(np.uint32)


def top_bit(distance):
    def run(a):
        x = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        zeros = leading_zeros(x)
        bits = np.uint32(8 * a.itemsize)
        place = zeros if distance else bits - np.uint32(1) - zeros
        return np.where(zeros == bits, np.uint32(0xFFFFFFFF), place)

    return run


def reverse_bits(a):
    flat = np.ascontiguousarray(np.broadcast_to(a, a.shape or (1,)))
    bits = np.unpackbits(flat.view(np.uint8).reshape(flat.size, -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(a.shape)


def lookup3(table):
    def run(a, b, c):
        result = np.zeros_like(a | b | c)
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return run


def compare(name, kind):
    """The comparison of setp, function(a, b, out)."""
    ordered = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    ufuncs = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    ufuncs |= {"gt": np.greater, "ge": np.greater_equal}
    if kind[0] != "f" and kind != "bf16":
        return ufuncs.get(ordered.get(name, name))
    if name in ("num", "nan"):
        either = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return returning(either if name == "nan" else lambda a, b: ~either(a, b))
    if name == "ne":
        return returning(lambda a, b: (a < b) | (a > b))
    if name == "equ":
        return returning(lambda a, b: ~((a < b) | (a > b)))
    opposite = {"ltu": np.greater_equal, "leu": np.greater, "gtu": np.less_equal, "geu": np.less}
    if name in opposite:
        return returning(lambda a, b: ~opposite[name](a, b))
    return np.not_equal if name == "neu" else ufuncs.get(name)
