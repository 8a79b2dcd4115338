"""Formulas of users: their text, checked and rewritten into one that every backend can bind.

A user writes what the texts of `fastll.formulas` may have and a little more: numbers, as literals or by
the name of a number outside, a minus, names that are assigned again, and calls of functions of their
own like that. From the source a new function is made, in which

* a number is `filled` into one of the element type, so that it widens nothing; arithmetic of numbers
  alone has been done, in float64;
* a parameter is `filled` too: all values are alike, and any operation takes any of them;
* each operation goes by its own name, whatever it was imported as, and local names have a prefix.

Names, numbers of arguments and numbers of results are checked as a compiler would, so that it is here
that a mistake is found, with its line.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import linecache
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np

import fastll.formulas as shared
from fastll.formulas import Element

#: What is refused, in words, and what to write instead.
INSTEAD: dict[tuple[type[ast.AST], ...], str] = {
    (ast.If, ast.IfExp, ast.Compare, ast.BoolOp, ast.Match): (
        "a branch or comparison; use where_gt, where_ge or where_eq"
    ),
    (ast.For, ast.While): "a loop",
    (ast.Return,): "a return before its end",
    (ast.Constant,): "a constant that is no number",
}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


class Callee(NamedTuple):
    """What a formula can call: an operation, or a function of the user's that has been read."""

    name: str
    arguments: int
    results: int


_OPERATIONS = {
    getattr(shared, name): Callee(name, getattr(shared, name).__code__.co_argcount, results)
    for name, results in shared.OPERATIONS.items()
}


class Own(NamedTuple):
    """A formula of a user's."""

    name: str  # made of its name and a digest of its text
    element: Element
    arguments: tuple[str, ...]  # names of the operands, then of the parameters
    defaults: dict[str, float]  # of parameters


def filled(x: Any, number: Any) -> Any:
    """A number of the type of x."""
    return np.asarray(x).dtype.type(number)


def read(formula: Any) -> Own:
    """Check a formula: `TypeError` if it is no function with a source, `SyntaxError` with the line."""
    if not isinstance(formula, FunctionType) or formula.__name__ == "<lambda>":
        raise TypeError(f"formula is {formula!r}; expected a function, made by def")
    program = _Program()
    main = _Reader(formula, program)
    main.read("own_formula")
    digest = hashlib.sha256("\n".join(map(ast.unparse, program.definitions)).encode()).hexdigest()
    name = f"{formula.__module__}.{formula.__qualname__}.{digest[:16]}"
    names = {key: getattr(shared, key) for key in shared.OPERATIONS} | {"filled": filled}
    functions = []
    for definition, path in zip(program.definitions, program.paths, strict=True):
        code = _code_of(definition, path)
        # the name is a part of symbols, which tells the code of one process from that of another
        code = code.replace(co_qualname=f"{name}.{code.co_name}")
        functions.append(FunctionType(code, names, code.co_name))
        names[code.co_name] = functions[-1]
    *helpers, last = functions
    element = Element(
        last,
        inputs=len(main.operands),
        parameters=len(main.parameters),
        slope=True,
        helpers=tuple(helpers),
    )
    return Own(name, element, (*main.operands, *main.parameters), main.defaults)


def _code_of(definition: ast.FunctionDef, path: str) -> CodeType:
    module = compile(ast.Module([definition], []), path, "exec", dont_inherit=True)
    (code,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    return code


class _Program:
    """The functions that make up a formula, each after those that it calls."""

    def __init__(self) -> None:
        self.definitions: list[ast.FunctionDef] = []
        self.paths: list[str] = []
        self.known: dict[FunctionType, Callee | None] = dict(_OPERATIONS)  # None: being read


class _Reader:
    """One function; `read` adds its rewritten definition to the program."""

    def __init__(self, function: FunctionType, program: _Program) -> None:
        self.function, self.program = function, program
        self.path = function.__code__.co_filename
        self.operands: list[str] = []
        self.parameters: list[str] = []
        self.defaults: dict[str, float] = {}
        self.names: set[str] = set()  # local ones so far
        try:
            lines, first = inspect.getsourcelines(function)
        except (OSError, TypeError):
            what = f"the source of {function.__qualname__} cannot be read"
            raise TypeError(f"{what}; define it in a file or a notebook") from None
        # a line before an indented source, so that it can be parsed
        before = "if 1:\n" if lines[0][:1].isspace() else ""
        tree: Any = ast.parse(before + "".join(lines))
        ast.increment_lineno(tree, first - 1 - bool(before))
        self.node: ast.FunctionDef = tree.body[0].body[0] if before else tree.body[0]

    def refusal(self, node: ast.AST, what: str) -> SyntaxError:
        line = getattr(node, "lineno", self.node.lineno)
        text = linecache.getline(self.path, line)
        return SyntaxError(f"a formula has {what}", (self.path, line, None, text))

    def read(self, name: str) -> Callee:
        """Check and rewrite the function, and call it `name`."""
        node = self.node
        if not isinstance(node, ast.FunctionDef):
            raise self.refusal(node, "a definition that is not by def")
        given = node.args
        operands = [*given.posonlyargs, *given.args]
        if given.vararg or given.kwarg or given.defaults or not operands:
            raise self.refusal(node, "an operand with a default, a starred one, or none at all")
        self.program.known[self.function] = None
        # what is computed at the definition
        node.decorator_list, node.returns, node.name = [], None, name
        given.kw_defaults = [None for _ in given.kwonlyargs]
        for argument in (*operands, *given.kwonlyargs):
            argument.annotation = None
        original = _code_of(node, self.path)
        body = self.arguments(main=name == "own_formula")
        statements = node.body[ast.get_docstring(node) is not None :]
        if not statements or not isinstance(statements[-1], ast.Return):
            raise self.refusal(node.body[-1], "no value returned at its end")
        for statement in statements[:-1]:
            body.append(self.statement(statement))
        last, results = self.several(statements[-1].value or statements[-1])
        if name == "own_formula" and results != 2:
            raise self.refusal(statements[-1], f"{results} values returned; expected value and slope")
        node.body = [*body, ast.copy_location(ast.Return(last), statements[-1])]
        ast.fix_missing_locations(node)
        self.check_source(original)
        self.program.definitions.append(node)
        self.program.paths.append(self.path)
        callee = Callee(name, len(self.operands), results)
        self.program.known[self.function] = callee
        return callee

    def check_source(self, found: CodeType) -> None:
        """Refuse what is not the function's text, as that of a file changed after its import.

        A name of an enclosing function is another instruction than a global one: that is left out.
        """
        code = self.function.__code__
        same = (found.co_code, found.co_consts) == (code.co_code, code.co_consts)
        if not same and not code.co_freevars:
            raise self.refusal(self.node, "another text now than when it was imported; import it again")

    def arguments(self, main: bool) -> list[ast.stmt]:
        """Rename the arguments; the statements that fill the parameters."""
        node, given = self.node, self.node.args
        operands = [*given.posonlyargs, *given.args]
        if given.kwonlyargs and not main:
            raise self.refusal(node, "a call of a function with keywords")
        self.operands = [a.arg for a in operands]
        self.parameters = [a.arg for a in given.kwonlyargs]
        for key, default in (self.function.__kwdefaults__ or {}).items():
            if not _is_number(default):
                raise self.refusal(node, f"a default of {key} that is no number")
            self.defaults[key] = float(default)
        self.names.update(self.operands, self.parameters)
        arguments = [f"v_{key}" for key in self.operands] + [f"p_{key}" for key in self.parameters]
        given.posonlyargs, given.kwonlyargs, given.kw_defaults = [], [], []
        given.args = [ast.arg(key) for key in arguments]
        filled: list[ast.stmt] = []
        for key in self.parameters:
            value = self.filled(ast.Name(f"p_{key}", ast.Load()))
            filled.append(ast.Assign([ast.Name(f"v_{key}", ast.Store())], value))
        return [ast.copy_location(statement, node) for statement in filled]

    def filled(self, number: ast.expr) -> ast.expr:
        like = ast.Name(f"v_{self.operands[0]}", ast.Load())
        return ast.Call(ast.Name("filled", ast.Load()), [like, number], [])

    def statement(self, node: ast.stmt) -> ast.stmt:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)]):
                value, results = self.several(node.value)
            case ast.Assign(targets=[target]):
                targets, value, results = [target], self.expression(node.value), 1
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=right):
                both = ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), op, right), node)
                targets, value, results = [target], self.expression(both), 1
            case _:
                raise self.refused(node)
        if len(targets) != results:
            raise self.refusal(node, f"{len(targets)} names for {results} values")
        stored: list[ast.expr] = []
        for name in map(ast.unparse, targets):
            if not name.isidentifier():
                raise self.refusal(node, f"an assignment to {name}, which is no name")
            self.names.add(name)
            stored.append(ast.Name(f"v_{name}", ast.Store()))
        together = stored[0] if results == 1 else ast.Tuple(stored, ast.Store())
        return ast.copy_location(ast.Assign([together], value), node)

    def several(self, node: ast.AST) -> tuple[ast.expr, int]:
        """An expression of one value or several, and their number."""
        match node:
            case ast.Tuple(elts=elements) if len(elements) > 1:
                return ast.Tuple([self.expression(e) for e in elements], ast.Load()), len(elements)
            case ast.Call():
                return self.call(node)
            case ast.expr():
                return self.expression(node), 1
        raise self.refusal(node, "no value returned at its end")

    def expression(self, node: ast.expr) -> ast.expr:
        """An expression of one value."""
        value = self.value(node)
        if isinstance(value, float):
            value = self.filled(ast.Constant(value))
        return ast.copy_location(value, node)

    def value(self, node: ast.expr) -> ast.expr | float:
        """The same, or the number that it is."""
        match node:
            case ast.Name(id=name) if name in self.names:
                return ast.Name(f"v_{name}", ast.Load())
            case ast.Constant(value=value) if _is_number(value):
                return self.number(node, value)
            case ast.Name() | ast.Attribute():
                value = self.outside(node)
                if _is_number(value):
                    return self.number(node, value)
                raise self.refusal(node, f"{ast.unparse(node)}, which is no number")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                right = self.value(operand)
                if isinstance(right, float):
                    return -right
                return ast.BinOp(self.filled(ast.Constant(-0.0)), ast.Sub(), right)  # zeros change sign
            case ast.BinOp(left=first, op=op, right=second) if isinstance(op, OPERATORS):
                left, right = self.value(first), self.value(second)
                if isinstance(left, float) and isinstance(right, float):
                    return _folded(left, op, right)
                return ast.BinOp(self.expression(first), op, self.expression(second))
            case ast.BinOp(op=ast.Pow()):
                raise self.refusal(node, "a power; use products, or exp(n * log(x))")
            case ast.Call():
                called, results = self.call(node)
                if results != 1:
                    raise self.refusal(node, f"{results} values where there must be one")
                return called
        raise self.refused(node)

    def number(self, node: ast.expr, value: Any) -> float:
        try:
            return float(value)
        except OverflowError:
            raise self.refusal(node, "a number beyond those of float64") from None

    def call(self, node: ast.Call) -> tuple[ast.expr, int]:
        """A call, and the number of its results."""
        function, what = self.outside(node.func), ast.unparse(node.func)
        if not isinstance(function, FunctionType):
            raise self.refusal(node, f"a call of {what}, which is no operation of fastll.formulas")
        if function not in self.program.known:
            reader = _Reader(function, self.program)
            reader.read(f"own_{len(self.program.known)}")
        callee = self.program.known[function]
        if callee is None:
            raise self.refusal(node, f"a call of {what}, which is being defined")
        if node.keywords or len(node.args) != callee.arguments:
            expected = f"{callee.arguments} arguments by position"
            raise self.refusal(node, f"a call of {what}, which takes {expected}")
        arguments = [self.expression(a) for a in node.args]
        called = ast.Call(ast.Name(callee.name, ast.Load()), arguments, [])
        return ast.copy_location(called, node), callee.results

    def outside(self, node: ast.expr) -> Any:
        """What a name from outside stands for when the formula is read."""
        match node:
            case ast.Name(id=name) if name not in self.function.__code__.co_varnames:
                found = vars(builtins) | self.function.__globals__ | self.enclosing()
                if name in found:
                    return found[name]
            case ast.Attribute(value=owner, attr=name):
                found = self.outside(owner)
                if hasattr(found, name):
                    return getattr(found, name)
        raise self.refusal(node, f"the unknown name {ast.unparse(node)}")

    def enclosing(self) -> dict[str, Any]:
        """The names of enclosing functions that have a value."""
        found = {}
        cells = self.function.__closure__ or ()
        for name, cell in zip(self.function.__code__.co_freevars, cells, strict=True):
            with suppress(ValueError):  # nothing has been assigned to it
                found[name] = cell.cell_contents
        return found

    def refused(self, node: ast.AST) -> SyntaxError:
        for kinds, what in INSTEAD.items():
            if isinstance(node, kinds):
                return self.refusal(node, what)
        return self.refusal(node, f"something that its rules do not allow: {ast.unparse(node)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _folded(a: float, operator: ast.operator, b: float) -> float:
    """Arithmetic of numbers, in float64."""
    with np.errstate(all="ignore"):
        left, right = np.float64(a), np.float64(b)
        match operator:
            case ast.Add():
                return float(left + right)
            case ast.Sub():
                return float(left - right)
            case ast.Mult():
                return float(left * right)
            case _:
                return float(left / right)
