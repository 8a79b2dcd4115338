"""PTX text into instructions with resolved operands. Calls are expanded in place."""

import bisect
import re
from dataclasses import dataclass, field

import numpy as np

from .memory import PTXError

SIZES = {"pred": 1, "f16x2": 4, "bf16x2": 4, "bf16": 2} | {
    f"{letter}{bits}": bits // 8 for letter in "bsu" for bits in (8, 16, 32, 64)
}
SIZES |= {"f16": 2, "f32": 4, "f64": 8}
SPECIAL = re.compile(
    r"%(n?tid|n?ctaid|cluster_n?ctaid|n?clusterid)\.[xyz]$|%(laneid|n?warpid|n?smid|gridid"
    r"|lanemask_\w\w|cluster_n?ctarank|is_explicit_cluster|\w+_smem_size)$"
)
NAME = r"[\w$%.]+"
STATEMENT = re.compile(
    rf"\s*(?:(?P<brace>[{{}}])|(?P<label>{NAME})\s*:(?!:)"
    r"|(?P<text>[^\s;{}][^;{}]*(?:{[^{}]*}[^;{}]*)*);)"
)
VARIABLE = re.compile(
    rf"((?:\.\w+\s+)*?)\.(global|const|shared|local|param|reg)\s+((?:\.\w+\s+|\d+\s+)*)({NAME})(.*)",
    re.S,
)
HEADER = re.compile(rf"[^;{{]*?\.(entry|func)\s*(\([^)]*\))?\s*({NAME})\s*(\([^)]*\))?([^;{{]*)", re.S)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s]+")


@dataclass(eq=False)
class Register:
    name: str
    kind: str


@dataclass(eq=False)
class Variable:
    name: str
    space: str
    kind: str
    size: int
    align: int
    initial: bytes | None = None
    extern: bool = False
    address: int = 0


@dataclass(eq=False)
class Label:
    name: str
    position: int = -1
    targets: list | None = None


@dataclass(frozen=True)
class Literal:
    value: int | float
    bits: int | None = None  # of a float given by its bits, and their number
    width: int = 0


@dataclass(frozen=True)
class Address:
    base: object
    offset: int


@dataclass(frozen=True)
class Negated:
    register: Register


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(eq=False)
class Instruction:
    line: int
    text: str
    opcode: str
    operands: list
    guard: object = None  # a predicate, or its negation

    def __post_init__(self):
        self.base, *self.mods = self.opcode.split(".")
        self.kinds = [m for m in self.mods if m in SIZES]
        self.kind = self.kinds[-1] if self.kinds else None


@dataclass(eq=False)
class Function:
    name: str
    entry: bool
    params: list
    results: list
    directives: dict
    source: list = field(default_factory=list)
    code: list = field(default_factory=list)  # of an entry: its instructions, calls expanded
    variables: list = field(default_factory=list)  # those it mentions
    uses_local: bool = False


def literal(text):
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", digits):
        width = 4 if match[1] else 8
        bits = int(match[1] or match[2], 16) ^ ((sign < 0) << (8 * width - 1))
        return Literal(float(np.array(bits, f"u{width}").view(f"f{width}")), bits, width)
    if re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", digits):
        digits = digits.rstrip("U")
        octal = re.fullmatch("0[0-7]+", digits)
        return Literal(sign * int(digits, 8 if octal else 0))
    if re.fullmatch(r"\d+\.\d*([eE][+-]?\d+)?|\d+[eE][+-]?\d+", digits):
        return Literal(sign * float(digits))
    return Literal(32) if text == "WARP_SZ" else None


def declared(text):
    """The variables of one declaration: space, kind, name, element count, alignment, initial values."""
    match = VARIABLE.fullmatch(text.strip())
    if not match:
        return None
    linkage, space, modifiers, first, rest = match.groups()
    kind = next(iter(re.findall(r"\.((?:pred|[bsuf]+\d+(?:x2)?))\b", modifiers)), None)
    if kind not in SIZES or re.search(r"\.v\d\b", modifiers):
        raise PTXError(f"declaration not understood: {text.strip()}")
    align = int(next(iter(re.findall(r"\.align\s+(\d+)", modifiers)), SIZES[kind]))
    names, _, values = (first + rest).partition("=")
    found = []
    for name in names.split(","):
        bare, *dims = re.split(r"[\[\]]+", name.strip().rstrip("]"))
        count = int(np.prod([int(d or 0) for d in dims])) if dims else 1
        found.append((bare.strip(), space, kind, count, align, values.strip(), ".extern" in linkage))
    return found


class Program:
    """The functions and the variables of a module."""

    def __init__(self, text):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"^[ \t]*\.(version|target|address_size|file|loc)\b[^\n]*", "", text, flags=re.M)
        text = re.sub(r"\.section\s[^{]*\{[^}]*\}", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        self.starts = [m.end() for m in re.finditer("\n", text)]
        self.globals, self.functions = {}, {}
        position, end = 0, len(text.rstrip())
        while position < end:
            match = HEADER.match(text, position)
            body = match and match.end() < end and text[match.end()]
            if body:
                function = self.header(match)
                position = match.end() + 1
                if body == "{":
                    position = self.body(text, position, function)
                    self.functions[function.name] = function
                continue
            match = re.compile(r"\s*([^;{}]*(?:\{[^{}]*\})?[^;{}]*);?").match(text, position)
            line = self.line(match.start(1))
            if match.end() == position or not match[1]:
                raise PTXError(f"line {line}: not understood: {text[position : position + 60].strip()}")
            for variable in declared(match[1]) or ():
                self.declare(self.globals, variable, line)
            position = match.end()
        self.entries = {}
        for function in self.functions.values():
            if function.entry:
                Expansion(self, function)
                self.entries[function.name] = function

    def line(self, position):
        return bisect.bisect(self.starts, position) + 1

    def header(self, match):
        def formals(text):
            text = (text or "()")[1:-1]
            text = re.sub(r"\.ptr\b\s*(\.(global|const|shared|local)\b)?\s*(\.align\s+\d+)?", "", text)
            return [declared(p)[0] for p in text.split(",") if p.strip()]

        directives = {
            name: [int(v) for v in re.findall(r"\d+", values)]
            for name, values in re.findall(r"\.(\w+)((?:\s*\d+\s*,?)*)", match[5])
        }
        kind, results, name, params, _ = match.groups()
        return Function(name, kind == "entry", formals(params), formals(results), directives)

    def body(self, text, position, function):
        depth = 1
        while depth:
            match = STATEMENT.match(text, position)
            if not match:
                line = self.line(position)
                raise PTXError(f"line {line}: not understood: {text[position : position + 60].strip()}")
            kind = match.lastgroup
            depth += {"{": 1, "}": -1}.get(match["brace"], 0)
            function.source.append((self.line(match.start(kind)), kind, match[kind]))
            position = match.end()
        function.source.pop()
        return position

    def declare(self, scope, variable, line):
        name, space, kind, count, align, values, extern = variable
        size = SIZES[kind]
        initial = None
        if values:
            items = [literal(v.strip()) for v in values.strip("{} \n\t").split(",")]
            if None in items:
                raise PTXError(f"line {line}: initial values of {name} not understood: {values[:60]}")
            dtype = f"f{size}" if kind[0] == "f" else f"u{size}"
            items = [i.value if kind[0] == "f" else int(i.value) % 256**size for i in items]
            initial = np.array(items, dtype).tobytes()
            count = max(count, len(items))
        extern = extern and space == "shared"
        scope[name] = Variable(name, space, kind, size * count, align, initial, extern)
        return scope[name]


class Expansion:
    """The instructions of an entry: scopes resolved, calls in place."""

    def __init__(self, program, entry):
        self.program, self.entry, self.depth = program, entry, 0
        self.scopes = self.families = self.labels = None
        scope = dict(program.globals)
        offset = 0
        for formal in entry.params:
            variable = program.declare(scope, formal, 0)
            variable.address = offset = -(-offset // variable.align) * variable.align
            offset += variable.size
        entry.params = [scope[formal[0]] for formal in entry.params]
        self.expand(entry, scope, None)

    def expand(self, function, scope, leave):
        self.depth += 1
        if self.depth > 50:
            raise PTXError(f"{function.name}: recursion is not supported")
        outer = self.scopes, self.families, self.labels
        self.scopes, self.families, self.labels = [{}, scope], [{}, {}], {}  # innermost first
        last = None
        for line, kind, text in function.source:
            if kind == "brace":
                self.scopes[:0] = [{}] if text == "{" else []
                self.families[:0] = [{}] if text == "{" else []
                if text == "}":
                    del self.scopes[0], self.families[0]
            elif kind == "label":
                last = self.labels.setdefault(text, Label(text))
                last.position = len(self.entry.code)
            elif text.startswith(".branchtargets"):
                names = re.findall(NAME, text)[1:]
                last.targets = [self.labels.setdefault(n, Label(n)) for n in names]
            elif text.startswith(".reg"):
                self.registers(text)
            elif text.startswith("."):
                for variable in declared(text) or () if not text.startswith(".pragma") else ():
                    found = self.program.declare(self.scopes[0], variable, line)
                    if found.space == "local":
                        self.entry.uses_local = True
                    elif found.space == "param":
                        found.space = "local"  # what a call passes: a place of the thread's own
            else:
                self.instruction(line, " ".join(text.split()), leave)
        for label in self.labels.values():
            if label.position < 0:
                raise PTXError(f"{function.name}: no label {label.name}")
        self.scopes, self.families, self.labels = outer
        self.depth -= 1

    def registers(self, text):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in names.split(","):
            family = re.fullmatch(rf"({NAME})<\d+>", name.strip())
            if family:
                self.families[0][family[1]] = kind
            else:
                self.scopes[0][name.strip()] = Register(name.strip(), kind)

    def lookup(self, name):
        for scope, families in zip(self.scopes, self.families, strict=True):
            if name in scope:
                found = scope[name]
                if isinstance(found, Variable) and found not in self.entry.variables:
                    self.entry.variables.append(found)
                return found
            prefix = name.rstrip("0123456789")
            if prefix != name and prefix in families:
                return scope.setdefault(name, Register(name, families[prefix]))
        return None

    def operand(self, text, line):
        if text[0] == "{":
            return [self.operand(part.strip(), line) for part in text[1:-1].split(",")]
        if text[0] == "[":
            base, *offsets = re.findall(r"[+-]*\s*[^\s+-]+", text[1:-1])
            offset = sum(int(re.sub(r"[+\s]", "", o).replace("--", ""), 0) for o in offsets)
            return Address(self.operand(base.strip(), line), offset)
        if text[0] == "!":
            return Negated(self.operand(text[1:], line))
        if "|" in text:
            return tuple(self.operand(part, line) for part in text.split("|"))
        if SPECIAL.match(text):
            return Special(text[1:])
        found = literal(text) or self.lookup(text)
        if text == "_" or found:
            return found
        raise PTXError(f"line {line}: unknown name {text}")

    def instruction(self, line, text, leave):
        guard, rest = None, text
        if match := re.fullmatch(r"@(!?)\s*(\S+)\s+(.*)", text):
            guard = self.operand(match[1] + match[2], line)
            rest = match[3]
        opcode, _, rest = rest.partition(" ")
        rest = re.sub(r"\s*\|\s*", "|", rest)
        operands = OPERAND.findall(rest)
        if opcode.split(".")[0] == "call":
            if guard:
                raise PTXError(f"line {line}: a call under a predicate is not supported: {text}")
            return self.call(line, text, operands)
        if opcode.split(".")[0] in ("bra", "brx"):
            labels = [self.labels.setdefault(o, Label(o)) for o in operands[-1:]]
            operands = [self.operand(o, line) for o in operands[:-1]] + labels
        elif opcode.split(".")[0] == "ret" and leave:
            opcode, operands = "bra", [leave]
        else:
            operands = [self.operand(o, line) for o in operands]
        self.entry.code.append(Instruction(line, text, opcode, operands, guard))
        return None

    def call(self, line, text, operands):
        lists = [
            [self.operand(a, line) for a in re.findall(r"[^,\s]+", o[1:-1])]
            for o in operands
            if o[0] == "("
        ]
        names = [o for o in operands if o[0] != "("]
        callee = self.program.functions.get(names[0])
        results = lists.pop(0) if operands[0][0] == "(" else []
        params = lists.pop(0) if lists else []
        if callee is None or len(names) > 1:
            raise PTXError(f"line {line}: not a function of this module: {text}")
        if len(results) != len(callee.results) or len(params) != len(callee.params):
            raise PTXError(f"line {line}: wrong number of arguments: {text}")
        scope = dict(self.program.globals)
        after = []
        for formals, actuals, out in ((callee.params, params, False), (callee.results, results, True)):
            for (name, space, kind, *_), actual in zip(formals, actuals, strict=True):
                scope[name] = actual
                if space == "reg":
                    scope[name] = register = Register(name, kind)
                    ends = [actual, register] if out else [register, actual]
                    move = Instruction(line, text, f"mov.{kind}", ends)
                    (after if out else self.entry.code).append(move)
                elif not isinstance(actual, Variable):
                    raise PTXError(f"line {line}: an argument in a register is not supported: {text}")
        leave = Label("return")
        self.expand(callee, scope, leave)
        leave.position = len(self.entry.code)
        self.entry.code += after
