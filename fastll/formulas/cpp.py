"""The formulas, constants and tables of operations as a C++ header, which `setup.py` writes.

A formula becomes a template of its arguments: assignments to names become ``auto``, a tuple that is
returned becomes a small aggregate (`pack`), and the vocabulary is that of vector.hpp, where vectors and
numbers mix. ``#line`` lets the compiler name the line of the Python file. What is not of the rules in
`fastll.formulas` is refused with its line.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import dedent
from types import FunctionType

from fastll import contract
from fastll.formulas import ELEMENTS, TERMS, Element, Terms, constants, texts, vocabulary

#: The folder that contains the package: files are named relative to it.
ROOT = Path(__file__).parents[2]

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
VOCABULARY = {function.__name__ for function in texts(vocabulary)}


class _Translator:
    """One formula: its C++ text in `lines`."""

    def __init__(self, function: FunctionType, known: Iterable[str]) -> None:
        source, self.first = inspect.getsourcelines(function)
        self.path = Path(inspect.getsourcefile(function) or "")
        self.known = set(known)  # what it may call
        self.names: set[str] = set()
        self.lines: list[str] = []
        (definition,) = ast.parse(dedent("".join(source))).body
        self.function(definition)

    def refusal(self, node: ast.AST, what: str) -> SyntaxError:
        line = self.first + getattr(node, "lineno", 1) - 1
        return SyntaxError(f"a formula has {what}", (str(self.path), line, None, None))

    def add(self, node: ast.stmt, text: str) -> None:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        self.lines += [f'#line {self.first + node.lineno - 1} "{path.as_posix()}"', text]

    def function(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            raise self.refusal(node, "a decorator, or is no function")
        arguments = [a.arg for a in node.args.args]
        if ast.unparse(node.args) != ", ".join(arguments):
            raise self.refusal(node, "arguments that are not plain names")
        self.names.update(arguments)
        self.add(node, f"template <{', '.join(f'class T_{a}' for a in arguments)}>")
        signature = ", ".join(f"T_{a} {a}" for a in arguments)
        self.lines.append(f"INLINE auto {node.name}({signature}) {{")
        *statements, last = node.body[ast.get_docstring(node) is not None :] or [node]
        for statement in statements:
            self.assignment(statement)
        match last:
            case ast.Return(value=ast.Tuple(elts=values)):
                self.add(last, f"return pack({self.expressions(values)});")
            case ast.Return(value=ast.expr() as value):
                self.add(last, f"return {self.expression(value)};")
            case _:
                raise self.refusal(last, "no value returned at its end")
        self.lines.append("}")

    def assignment(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)]):
                left = "[{}]"
            case ast.Assign(targets=[ast.Name() as target]):
                left, targets = "{}", [target]
            case _:
                raise self.refusal(node, f"a statement that assigns to no names: {ast.unparse(node)}")
        value = self.expression(node.value)
        texts: list[str] = []
        for name in map(ast.unparse, targets):
            text = name if name != "_" else f"unused_{len(self.lines)}_{len(texts)}"
            if text in self.names or not text.isidentifier():
                raise self.refusal(node, f"an assignment to {text}, which is no new name")
            self.names.add(text)
            texts.append(text)
        self.add(node, f"[[maybe_unused]] auto {left.format(', '.join(texts))} = {value};")

    def expressions(self, nodes: Iterable[ast.expr]) -> str:
        return ", ".join(map(self.expression, nodes))

    def expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self.names:
                return name
            case ast.Attribute(value=owner, attr=name) if name in constants.Constants._fields:
                return f"{self.expression(owner)}.{name}"
            case ast.UnaryOp(op=ast.USub(), operand=ast.Attribute() as operand):
                return f"-{self.expression(operand)}"
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
                sign = OPERATORS[type(operator)]
                return f"({self.expression(left)} {sign} {self.expression(right)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in self.known:
                return f"{name}({self.expressions(arguments)})"
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                what = f"a call of {name}, which is neither a formula nor an operation"
                raise self.refusal(node, what)
        raise self.refusal(node, f"something that its rules do not allow: {ast.unparse(node)}")


def translate(functions: Iterable[FunctionType]) -> str:
    """Formulas as C++ templates, each after those that it calls.

    One that a target has its own of, and says so by a macro ``OWN_<name>``, is left out.
    """
    known = set(VOCABULARY)
    parts = []
    for function in functions:
        name = function.__name__
        parts += [f"#ifndef OWN_{name}", *_Translator(function, known).lines, "#endif"]
        known.add(name)
    return "\n".join(parts)


def _number(value: float, suffix: str = "") -> str:
    """A literal of exactly this number."""
    if math.isfinite(value):
        return f"{float(value).hex()}{suffix}"
    return "NAN" if math.isnan(value) else "INFINITY"


def _constants() -> str:
    """The constants of both types as structures, and the single ones of the Python modules."""
    parts = []
    for module in (contract, constants):
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, int):
                parts.append(f"constexpr int64_t {name} = {value};")
            elif name.isupper() and isinstance(value, float):
                parts.append(f"constexpr double {name} = {_number(value)};")
    parts.append("template <class T> struct Constants;")
    for cpp, name, suffix in (("float", "float32", "f"), ("double", "float64", "")):
        parts.append(f"template <> struct Constants<{cpp}> {{")
        for field, value in constants.of(name)._asdict().items():
            if isinstance(value, tuple):
                numbers = ", ".join(_number(v, suffix) for v in value)
                parts.append(f"    static constexpr {cpp} {field}[] = {{{numbers}}};")
            else:
                parts.append(f"    static constexpr {cpp} {field} = ({cpp}) {_number(value, suffix)};")
        parts.append("};")
    return "\n".join(parts)


def _table(kind: str, rows: Mapping[str, Element | Terms]) -> str:
    """A structure for each row of a table, and what calls something with the one of a name's place."""
    parts, cases = [], []
    for code, (name, row) in enumerate(rows.items()):
        traits = row._asdict()
        formula = traits.pop("formula").__name__
        traits.pop("helpers", None)
        values = [f"x({i})" for i in range(row.inputs)]
        values += [f"parameter({i})" for i in range(traits.get("parameters", 0))]
        parts.append(f"struct {kind}_{name} {{")
        parts += [f"    static constexpr int {key} = {int(value)};" for key, value in traits.items()]
        parts.append("    template <class X, class P> INLINE auto of(X x, P parameter) {")
        parts += [f"        return {formula}({', '.join(values)});", "    }", "};"]
        cases.append(f"        case {code}: return use({kind}_{name}());")
    names = ", ".join(f'"{name}"' for name in rows)
    parts.append(f"const char *{kind}_names[] = {{{names}{', ' if rows else ''}nullptr}};")
    parts.append(f"template <class Use> INLINE int with_{kind}(int64_t code, Use use) {{")
    parts += ["    switch (code) {", *cases, "        default: return 0;", "    }", "}"]
    return "\n".join(parts)


def header(
    functions: Iterable[FunctionType] | None = None,
    elements: Mapping[str, Element] = ELEMENTS,
    terms: Mapping[str, Terms] = TERMS,
) -> str:
    """The header, for C++ that has the vocabulary."""
    parts = [_constants(), translate(texts() if functions is None else functions)]
    parts += ['#line 1 "tables of fastll.formulas"']
    parts += [_table("element", elements), _table("term", terms)]
    body = "\n\n".join(parts)
    return f"#pragma once\n\nnamespace {{\n\n{body}\n\n}}  // namespace\n"
