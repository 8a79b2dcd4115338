"""Instructions into steps: pairs of functions, one for all lanes at once and one for some of them."""

import numpy as np

from . import arithmetic as f
from .memory import Fault, PTXError
from .parse import SIZES, Address, Register, Variable

HANDLERS = {}  # opcode up to the first dot -> (decoder, modifiers that it knows)
ROUNDING = ("rn", "rz", "rm", "rp")
CACHE = "weak volatile relaxed acquire release acq_rel cta cluster gpu sys nc ca cg cs lu cv wb wt"
SPACES = "param global shared shared::cta shared::cluster const local"
COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan"
CONTROL = {"bra": "branch", "brx": "branch", "ret": "exit", "exit": "exit", "trap": "exit"}


def role(ins):
    """What an instruction is to the scheduler; None: it is executed where it stands."""
    if ins.base in ("bar", "barrier"):
        if "warp" in ins.mods:
            return "meet"
        return None if "arrive" in ins.mods else "wait"
    if ins.base in ("shfl", "vote", "redux"):
        return "meet"
    return CONTROL.get(ins.base)


def classify(ins):
    """The class an instruction is counted in."""
    if ins.base in ("ld", "st", "atom", "red", "cp"):
        space = next((m.split("::")[0] for m in ins.mods if m in SPACES.split()), "generic")
        return f"{ins.base}.{space}"
    if role(ins) in ("branch", "exit"):
        return "control"
    if ins.base in ("bar", "barrier", "shfl", "vote", "redux"):
        return "barrier" if ins.base[:3] == "bar" else "warp"
    if ins.base in ("mov", "cvta", "cvt", "setp", "selp"):
        return ins.base
    if "approx" in ins.mods:
        return "special"
    return ins.kind if "f" in str(ins.kind) else "integer"


def handles(bases, modifiers=""):
    def register(decoder):
        for base in bases.split():
            HANDLERS[base] = decoder, set(modifiers.split())
        return decoder

    return register


def decode(machine, ins):
    decoder, known = HANDLERS.get(ins.base, (None, ()))
    if decoder is None:
        raise machine.error(ins, "unknown instruction")
    for mod in ins.mods:
        if mod not in SIZES and mod not in known and not mod.startswith(("L1::", "L2::")):
            raise machine.error(ins, f"unknown modifier .{mod}")
    try:
        return decoder(machine, ins)
    except PTXError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as reason:
        raise machine.error(ins, f"not understood ({reason})") from reason


def one(ins, names):
    return next((m for m in ins.mods if m in names), None)


def unknown(ins):
    raise ValueError(f"no such form of {ins.base}")


def move(a, out):
    np.copyto(out, a, casting="unsafe")


def sources(m, ins, kinds=None):
    operands = ins.operands[1:]
    return [m.read(o, k) for o, k in zip(operands, kinds or [ins.kind] * len(operands), strict=True)]


def simple(m, ins, function, kinds=None, result=None):
    return [m.alu(ins.operands[0], result or ins.kind, f.returning(function), *sources(m, ins, kinds))]


# arithmetic

FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": f.fma, "neg": np.negative}
FLOAT |= {"abs": np.abs, "div": np.divide, "mad": f.fma}
INTEGER = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "rem": np.fmod}
INTEGER |= {
    "min": f.returning(np.minimum),
    "max": f.returning(np.maximum),
    "div": f.returning(f.quotient),
}


@handles(
    "add sub mul mad fma neg abs min max div rem", "rn rz rm rp ftz sat lo hi wide NaN approx full cc"
)
def arithmetic(m, ins):
    kind, base, mods = ins.kind, ins.base, ins.mods
    d = ins.operands[0]
    if "cc" in mods:
        return extended(m, ins)
    if "f" not in kind:
        return integer(m, ins)
    mode = one(ins, ROUNDING) or "rn"
    args = sources(m, ins)
    if set(mods) & {"lo", "hi", "wide"} or ("sat" in mods and kind != "f32"):
        unknown(ins)
    if base in ("min", "max"):
        nan = "NaN" in mods
        function = f.returning({"min": (f.fmin, f.nan_min), "max": (f.fmax, f.nan_max)}[base][nan])
    elif base == "div" and mode == "rn" and set(mods) & {"approx", "full"}:
        function = f.returning(f.approximate("div.full" if "full" in mods else "div", m))
    elif mode != "rn":
        known = ("add", "sub", "mul", "fma") if kind == "f32" else ("add", "sub", "mul")
        if kind not in ("f32", "f64") or base not in known:
            unknown(ins)
        function = f.returning(f.rounded(base, mode, kind))
    else:
        function = FLOAT[base]
    if kind in ("bf16", "bf16x2"):
        if base in ("neg", "abs"):
            bit = np.uint16(0x8000)
            function = f.returning((lambda x: x ^ bit) if base == "neg" else lambda x: x & ~bit)
        else:
            function = f.on_bfloat16(function)
    elif kind in ("f16", "f16x2") and base == "fma":
        function = f.returning(lambda a, b, c: a.astype(np.float64) * b + c)
    return [m.alu(d, kind, f.finished(function, kind, "ftz" in mods, "sat" in mods), *args)]


def integer(m, ins):
    kind, base, mods = ins.kind, ins.base, ins.mods
    d, *operands = ins.operands
    part = one(ins, ("lo", "hi", "wide"))
    if set(mods) - {kind, part} or (part is None) != (base not in ("mul", "mad")):
        unknown(ins)
    result = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
    args = [m.read(o, kind) for o in operands[:2]] + [m.read(o, result) for o in operands[2:]]
    if part is None:
        return [m.alu(d, result, INTEGER[base], *args)]
    if part == "wide":
        dtype = m.read(d, result).dtype
        product = lambda a, b: a.astype(dtype) * b.astype(dtype)  # noqa: E731
    else:
        product = np.multiply if part == "lo" else f.high_product
    if base == "mul" and part == "lo":
        return [m.alu(d, result, np.multiply, *args)]
    if base == "mul":
        return [m.alu(d, result, f.returning(product), *args)]
    return [m.alu(d, result, f.returning(lambda a, b, c: product(a, b) + c), *args)]


@handles("addc subc madc", "cc lo hi")
def extended(m, ins):
    """With a carry, or a borrow, from the instruction before or to the next."""
    d, a, b, *c = (m.target(ins.operands[0], ins.kind)[1], *sources(m, ins))
    size = f"u{d.itemsize}"
    product = np.multiply if "lo" in ins.mods else f.high_product
    if "f" in ins.kind or ins.base in ("mul", "div") or bool(c) != ins.base.startswith("mad"):
        unknown(ins)

    def step(active):
        x, y = (product(a, b), c[0]) if c else (a, b)
        x, y = (np.broadcast_to(v, m.lanes).view(size) for v in (x, y))
        carry = m.carry if ins.base[-1] == "c" else np.zeros(m.lanes, bool)
        total = x - y - carry if ins.base.startswith("sub") else x + y + carry
        less, equal = (x < y, x == y) if ins.base.startswith("sub") else (total < x, total == x)
        d.view(size)[active.index] = total[active.index]
        if "cc" in ins.mods:
            m.carry[active.index] = (less | (carry & equal))[active.index]

    return [m.stepwise(step, ins)]


@handles("sqrt rcp rsqrt ex2 lg2 sin cos tanh", "approx rn ftz")
def unary(m, ins):
    if ins.kind == "f64" and "approx" in ins.mods:
        if ins.base not in ("rcp", "rsqrt") or "ftz" not in ins.mods:
            unknown(ins)
        return simple(m, ins, f.gross(ins.base, m))
    if "approx" in ins.mods and ins.kind == "f32":
        function = f.returning(f.approximate(ins.base, m))
    elif "rn" in ins.mods and ins.base in ("sqrt", "rcp"):
        function = np.sqrt if ins.base == "sqrt" else np.reciprocal
    else:
        unknown(ins)
    function = f.finished(function, ins.kind, "ftz" in ins.mods)
    return [m.alu(ins.operands[0], ins.kind, function, *sources(m, ins))]


@handles("and or xor not")
def logic(m, ins):
    table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return [m.alu(ins.operands[0], ins.kind, table[ins.base], *sources(m, ins))]


@handles("shl shr")
def shift(m, ins):
    d, a, b = ins.operands
    size = SIZES[ins.kind]
    if isinstance(b, Register) and size != 4:
        count, function = m.read(b, "u32"), f.returning(f.clamped_shift(ins.base == "shl"))
    else:  # NumPy clamps as PTX does, where both have one type
        count = m.read(b, ins.kind)
        function = np.left_shift if ins.base == "shl" else np.right_shift
    return [m.alu(d, ins.kind, function, m.read(a, ins.kind), count)]


@handles("shf", "l r wrap clamp")
def funnel(m, ins):
    return simple(m, ins, f.funnel_shift("l" in ins.mods, "wrap" in ins.mods), ["u32"] * 3)


@handles("prmt bfe bfi bfind brev clz popc lop3 copysign", "shiftamt")
def bits(m, ins):
    kind = ins.kind
    if ins.base == "lop3":
        d, a, b, c, table = ins.operands
        args = [m.read(o, kind) for o in (a, b, c)]
        return [m.alu(d, kind, f.returning(f.lookup3(table.value)), *args)]
    if ins.base == "bfe":
        return simple(m, ins, f.extract, [kind, "u32", "u32"])
    if ins.base == "bfi":
        return simple(m, ins, f.insert, [kind, kind, "u32", "u32"])
    if ins.base == "bfind":
        return simple(m, ins, f.top_bit("shiftamt" in ins.mods), result="u32")
    if ins.base in ("clz", "popc"):
        return simple(m, ins, f.leading_zeros if ins.base == "clz" else np.bitwise_count, result="u32")
    table = {"prmt": f.permute, "brev": f.reverse_bits, "copysign": lambda a, b: np.copysign(b, a)}
    return simple(m, ins, table[ins.base])


@handles("testp", "finite infinite number notanumber normal subnormal")
def test(m, ins):
    tiny = 2.0**-126 if ins.kind == "f32" else 2.0**-1022
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[ins.mods[0]]
    return simple(m, ins, test, result="pred")


# comparison and selection


def comparison(ins, kind):
    function = f.compare(one(ins, COMPARISONS.split()), kind) or unknown(ins)
    if kind in ("bf16", "bf16x2") or "x2" in kind:
        unknown(ins)
    if "ftz" in ins.mods:
        return lambda a, b, out: function(f.flush(a), f.flush(b), out)
    return function


@handles("setp", COMPARISONS + " and or xor ftz")
def setp(m, ins):
    d, a, b, *third = ins.operands
    targets = d if isinstance(d, tuple) else (d,)
    function = comparison(ins, ins.kind)
    args = [m.read(o, ins.kind) for o in (a, b)]
    if len(targets) == 1 and not third:
        return [m.alu(d, "pred", function, *args)]
    logical = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    combine = logical.get(one(ins, logical))
    if (combine is None) != (not third):
        unknown(ins)
    other = m.predicate(third[0]) if third else None

    def both(opposite):
        def run(a, b, out):
            result = np.empty(m.lanes, bool)
            function(a, b, result)
            result = ~result if opposite else result
            out[...] = combine(result, other()) if combine else result

        return run

    steps = [m.alu(t, "pred", both(opposite), *args) for opposite, t in enumerate(targets)]
    # the second predicate first where the first one is a source
    source = third and getattr(third[0], "register", third[0])
    return steps[::-1] if source is targets[0] else steps


@handles("set", COMPARISONS + " ftz")
def set_(m, ins):
    kind, source = ins.kinds
    function = comparison(ins, source)
    true = np.array(1 if kind == "f32" else -1).astype(m.dtype(kind))[()]

    def run(a, b):
        result = np.empty(m.lanes, bool)
        function(a, b, result)
        return result * true

    return simple(m, ins, run, [source] * 2, kind)


@handles("selp")
def selp(m, ins):
    d, a, b, p = ins.operands
    choice = m.predicate(p)
    args = m.read(a, ins.kind), m.read(b, ins.kind)
    return [m.alu(d, ins.kind, f.returning(lambda a, b: np.where(choice(), a, b)), *args)]


@handles("slct", "ftz")
def slct(m, ins):
    kind, by = ins.kinds
    return simple(m, ins, lambda a, b, c: np.where(c >= 0, a, b), [kind, kind, by], kind)


# moves and conversions


@handles("mov")
def mov(m, ins):
    d, a = ins.operands
    kind = ins.kind
    if isinstance(a, list):

        def pack(*args):
            *parts, out = args
            for k, part in enumerate(parts):
                out.view(part.dtype)[k :: len(parts)] = part

        part = f"u{8 * SIZES[kind] // len(a)}"
        return [m.alu(d, f"u{8 * SIZES[kind]}", pack, *(m.read(o, part) for o in a))]
    if isinstance(d, list):
        part = f"u{8 * SIZES[kind] // len(d)}"
        whole = m.read(a, f"u{8 * SIZES[kind]}")
        whole = np.full(m.lanes, whole) if whole.ndim == 0 else whole
        pieces = whole.view(m.read(a, part).dtype)
        return [m.alu(t, part, move, pieces[k :: len(d)]) for k, t in enumerate(d) if t is not None]
    if isinstance(a, Address):
        unknown(ins)
    return [m.alu(d, kind, move, m.read(a, kind))]


@handles("cvt", "rn rz rm rp rni rzi rmi rpi sat ftz")
def cvt(m, ins):
    kinds, d, args = ins.kinds, ins.operands[0], ins.operands[1:]
    mode = one(ins, (*ROUNDING, "rni", "rzi", "rmi", "rpi"))
    flags = "sat" in ins.mods, "ftz" in ins.mods
    if kinds[0] in ("f16x2", "bf16x2"):
        half = f.converter(kinds[0][:-2], kinds[1], mode, *flags) or unknown(ins)

        def pack(high, low, out):
            both = [np.asarray(half(x)).view(np.uint16) for x in (low, high)]  # out may be one of them
            out.view(np.uint16)[::2], out.view(np.uint16)[1::2] = both

        return [m.alu(d, "u32", pack, *(m.read(a, kinds[1]) for a in args))]
    function = f.converter(*kinds, mode, *flags) or unknown(ins)
    return [m.alu(d, kinds[0], f.returning(function), *(m.read(a, kinds[1]) for a in args))]


@handles("cvta", "to " + SPACES)
def cvta(m, ins):
    d, a = ins.operands
    space = one(ins, SPACES.split()).split("::")[0]
    base = np.array(m.window(space), np.uint64)
    return [m.alu(d, ins.kind, np.subtract if "to" in ins.mods else np.add, m.read(a, "u64"), base)]


@handles("isspacep", SPACES)
def isspacep(m, ins):
    window = np.uint64(m.window(one(ins, SPACES.split()).split("::")[0]))
    return simple(m, ins, lambda a: (a >> np.uint64(56)) << np.uint64(56) == window, ["u64"], "pred")


@handles("mapa", "shared::cluster")
def mapa(m, ins):
    def run(a, rank):
        clean = a & ~a.dtype.type(255 << m.rank_bit)
        return clean | ((rank + np.uint32(1)).astype(a.dtype) << a.dtype.type(m.rank_bit))

    return simple(m, ins, run, [ins.kind, "u32"])


@handles("getctarank", "shared::cluster")
def getctarank(m, ins):
    def run(a):
        rank = (a >> a.dtype.type(m.rank_bit)) & a.dtype.type(255)
        return np.where(rank == 0, m.rank[m.block_of], rank.astype(np.int64) - 1)

    return simple(m, ins, run, [ins.kind], "u32")


# memory


def place(ins, operand):
    space = one(ins, SPACES.split())
    if isinstance(operand.base, Variable) and space == "param":
        return operand.base.space  # what a call passes is a local variable
    return "global" if space == "const" else space


def elements(operand):
    return operand if isinstance(operand, list) else [operand]


@handles("ld ldu", f"{CACHE} {SPACES} v2 v4 v8")
def ld(m, ins):
    targets, where = elements(ins.operands[0]), ins.operands[1]
    space, kind, count = place(ins, where), ins.kind, len(targets)
    dtype = m.dtype(kind)
    if (f"v{count}" if count > 1 else None) != one(ins, ("v2", "v4", "v8")) or not isinstance(
        where, Address
    ):
        unknown(ins)
    if space == "param" and isinstance(where.base, Variable) and count == 1:
        start = where.base.address + where.offset
        if where.offset < 0 or where.offset + dtype.itemsize > where.base.size:
            unknown(ins)
        value = m.params[start : start + dtype.itemsize].view(dtype)
        return [m.alu(targets[0], kind, move, value)]
    address = m.address(where)
    # a register that is wider is filled
    outs = [m.target(t, kind)[1] for t in targets]

    def step(active):
        values = m.load(space, address(active), active.index, dtype, count)
        for k, out in enumerate(outs):
            out[active.index] = values[:, k]

    return [m.stepwise(step, ins)]


@handles("st", f"{CACHE} {SPACES} v2 v4 v8")
def st(m, ins):
    where, values = ins.operands[0], elements(ins.operands[1])
    space = place(ins, where)
    address = m.address(where)
    dtype = m.dtype(ins.kind)
    arrays = [np.broadcast_to(m.read(v, ins.kind), m.lanes) for v in values]
    count = len(values)
    if (f"v{count}" if count > 1 else None) != one(ins, ("v2", "v4", "v8")):
        unknown(ins)

    def step(active):
        index = active.index
        m.store(space, address(active), index, dtype, [a[index] for a in arrays])

    return [m.stepwise(step, ins)]


@handles(
    "cp",
    "async cg ca bulk shared shared::cta shared::cluster global wait_all commit_group wait_group"
    " mbarrier::complete_tx::bytes",
)
def copy(m, ins):
    """Asynchronous copies, done at once."""
    if "global" not in ins.mods:
        return []
    if "bulk" in ins.mods:
        return bulk(m, ins)
    target, source, size = ins.operands
    if size.value != 16:
        unknown(ins)
    to, address, dtype = m.address(target), m.address(source), m.dtype("u64")

    def step(active):
        values = m.load("global", address(active), active.index, dtype, 2)
        m.store("shared", to(active), active.index, dtype, list(values.T.copy()))

    return [m.stepwise(step, ins)]


def bulk(m, ins):
    """A copy of whole vectors by one thread, whose bytes arrive at a barrier."""
    to, address, at = (m.address(ins.operands[k]) for k in (0, 1, 3))
    size = m.read(ins.operands[2], "u32")

    def step(active):
        counts = np.broadcast_to(size, m.lanes)[active.index]
        if (counts % 16).any():
            raise Fault("not whole vectors", int(np.argmax(counts % 16 != 0)))
        lanes, shared = np.arange(m.lanes)[active.index], m.spaces["shared"]
        observed, shared.observe = shared.observe, m.races and m.races.observe  # no banks of a warp's
        for k, count in enumerate(counts):
            vectors = np.arange(0, count, 16).astype(np.uint64)
            index = np.full(len(vectors), lanes[k])
            values = m.load("global", address(active)[k] + vectors, index, np.dtype("u8"), 2)
            m.store("shared", to(active)[k] + vectors, index, np.dtype("u8"), list(values.T.copy()))
        shared.observe = observed
        m.exchange("shared", at(active), active.index, np.dtype("i4"), lambda k, old: old - counts[k])

    return [m.stepwise(step, ins)]


@handles("mbarrier", "init arrive expect_tx try_wait parity shared::cta b64")
def transactions(m, ins):
    """A barrier in shared memory, for one phase: bytes that are expected, and threads."""
    waits = "try_wait" in ins.mods
    target, where, *rest = ins.operands if "init" not in ins.mods else [None, *ins.operands]
    at, number = m.address(where), m.read(rest[0], "u32")
    out = m.target(target, "pred")[1] if waits else None

    def step(active):
        index, places = active.index, at(active)
        numbers = np.broadcast_to(number, m.lanes)[index].astype("i4")
        if "init" in ins.mods:
            m.store("shared", places, index, np.dtype("i4"), [0 * numbers, numbers])
        elif waits:
            found = m.load("shared", places, index, np.dtype("i4"), 2)
            if numbers.any() or found.any():
                raise Fault("waits for what has not arrived", int(np.argmax(found.any(axis=1))))
            out[index] = True
        else:
            more = lambda k, old: old + numbers[k]  # noqa: E731
            m.exchange("shared", places, index, np.dtype("i4"), more)
            threads = places + np.uint64(4)
            m.exchange("shared", threads, index, np.dtype("i4"), lambda k, old: old - 1)

    return [m.stepwise(step, ins)]


@handles("atom red", f"{CACHE} {SPACES} add min max and or xor exch cas inc dec")
def atomic(m, ins):
    operation, kind = (
        one(ins, ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]),
        ins.kind,
    )
    target, where, *values = ([None] if ins.base == "red" else []) + ins.operands
    space, address, dtype = place(ins, where), m.address(where), m.dtype(kind)
    b, c = [np.broadcast_to(m.read(v, kind), m.lanes) for v in (values * 2)[:2]]
    out = m.target(target, kind)[1]
    function = {
        "add": np.add,
        "min": np.minimum if kind[0] != "f" else f.fmin,
        "max": np.maximum if kind[0] != "f" else f.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, b: b,
        "inc": lambda old, b: dtype.type(0) if old >= b else old + dtype.type(1),
        "dec": lambda old, b: b if old == 0 or old > b else old - dtype.type(1),
        "cas": None,
    }[operation]
    if "x2" in kind or kind in ("f16", "bf16"):
        unknown(ins)

    def step(active):
        index = active.index
        value, other = b[index], c[index]
        if operation == "cas":
            change = lambda k, old: other[k] if old == value[k] else old  # noqa: E731
        else:
            change = lambda k, old: function(old, value[k])  # noqa: E731
        out[index] = m.exchange(space, address(active), index, dtype, change)

    return [m.stepwise(step, ins)]


# threads together


@handles("shfl", "sync bfly down up idx")
def shfl(m, ins):
    d, a, b, c, _ = ins.operands
    target, valid = d if isinstance(d, tuple) else (d, None)
    a, b, c = (m.read(o, "u32") for o in (a, b, c))
    mode = one(ins, ("bfly", "down", "up", "idx")) or unknown(ins)
    out = m.target(target, "u32")[1]
    flag = m.target(valid, "pred")[1]
    lane = m.lane.astype(np.int64)
    first = np.arange(m.lanes) - lane
    routes = {}

    def route(b, c):
        step, clamp = (b & np.uint32(31)).astype(np.int64), (c & np.uint32(31)).astype(np.int64)
        segment = ((c >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
        low = lane & segment
        high = low | (clamp & ~segment)
        source = {
            "bfly": lambda: lane ^ step,
            "down": lambda: lane + step,
            "up": lambda: lane - step,
            "idx": lambda: low | (step & ~segment),
        }[mode]()
        inside = source >= high if mode == "up" else source <= high
        return first + np.where(inside, source, lane), inside

    def step(active):
        key = b.flat[0], c.flat[0]
        if (b == key[0]).all() and (
            c == key[1]
        ).all():  # as good as always, and not to be worked out again
            if key not in routes:
                routes[key] = route(b, c)
            source, inside = routes[key]
        else:
            source, inside = route(b, c)
        index = active.index
        if not active.full:
            absent = ~active.mask[source][index]
            if absent.any():
                raise Fault("shfl from a thread that takes no part", int(np.argmax(absent)))
        values = np.broadcast_to(a, m.lanes)[source]
        out[index] = values[index]
        flag[index] = inside[index]

    return [m.stepwise(step, ins)]


@handles("vote redux", "sync any all uni ballot add min max and or xor")
def vote(m, ins):
    d, a, members = ins.operands
    members = np.broadcast_to(m.read(members, "u32"), m.lanes)
    operation = one(ins, ["any", "all", "uni", "ballot", "add", "min", "max", "and", "or", "xor"])
    ballot = ins.base == "vote"
    value = m.predicate(a) if ballot else m.read(a, ins.kind)
    out = m.target(d, ins.kind or "pred")[1]
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and}
    ufunc |= {"or": np.bitwise_or, "xor": np.bitwise_xor}

    def step(active):
        index = active.index
        if not ballot:
            full = np.broadcast_to(value, m.lanes)
            for key in {
                (int(w), int(k)) for w, k in zip(m.warp_of[index], members[index], strict=True)
            }:
                there = 32 * key[0] + np.flatnonzero([key[1] >> k & 1 for k in range(32)])
                out[there] = ufunc[operation].reduce(full[there], dtype=full.dtype)
            return
        votes = np.broadcast_to(value(), m.lanes) & (True if active.full else active.mask)
        yes = m.ballots(votes) & members
        result = {
            "ballot": yes,
            "any": yes != 0,
            "all": yes == members,
            "uni": (yes == 0) | (yes == members),
        }
        out[index] = result[operation][index]

    return [m.stepwise(step, ins)]


@handles("activemask")
def activemask(m, ins):
    out = m.target(ins.operands[0], ins.kind)[1]

    def step(active):
        out[active.index] = active.ballots[active.index]

    return [m.stepwise(step, ins)]


@handles("bar barrier", "sync cta warp cluster arrive wait aligned release relaxed acquire")
def barrier(m, ins):
    if "warp" in ins.mods:

        def meet(active):
            m.synchronised("warp", np.ones(m.lanes, bool) if active.full else active.mask)

        return [m.stepwise(meet, ins)]
    if "cluster" not in ins.mods:
        if "arrive" in ins.mods or [o.value for o in ins.operands] != [0]:
            raise m.error(ins, "only barrier 0 of the whole block is supported")
        return []
    if "wait" in ins.mods:
        return []

    def arrive(active):
        index = active.index
        if (m.arrivals > m.waits)[index].any():
            raise m.error(ins, "arrives twice without a wait")
        m.arrivals[index] += 1

    return [m.stepwise(arrive, ins)]


@handles("bra brx ret exit trap", "uni idx")
def control(m, ins):
    if ins.base == "brx" and not ins.operands[-1].targets:
        unknown(ins)
    return []  # the scheduler does them


@handles(
    "membar fence prefetch prefetchu discard brkpt nanosleep pmevent griddepcontrol applypriority",
    f"{CACHE} {SPACES} gl sc proxy alias async L1 L2 uniform launch_dependents wait mbarrier_init",
)
def nothing(m, ins):
    return []


@handles("createpolicy", f"{CACHE} {SPACES} fractional range cvt")
def createpolicy(m, ins):
    return [m.alu(ins.operands[0], "b64", move, np.zeros(1, np.uint64))]
