"""A forward method in which dropout and its neighbours are one call, made of the method's source.

Looked for are, for any names of the variables, in one statement or in two:

    DROP(ACTIVATION(x))
    residual + DROP(x), which may be returned
    either NORM(residual + DROP(x)), or the sum, possibly renamed, and then NORM(sum)

DROP, ACTIVATION and NORM are calls of attributes with such a name, or functions of
torch.nn.functional. A sum becomes a condition on the objects that are there at the call, with the
statements as they were in its `else`; nothing is assumed of these objects here. Every variable that
the statements leave behind has the value that it had.

Left alone is what could be seen to change: in `try` and `with`, where an error is not the end;
variables that others see too, of closures or global ones; properties, which would be read more
than once; a sum that anything but further sums and its norm gets, which could ask for its gradient;
and forwards that ask what class they are of.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import torch.nn.functional as F

from . import _source

FUSION = "_dropout_ext"  # the attribute of the class that has the functions of _fuse.py


_DROPS = ("drop", "stochastic")
_Node = TypeVar("_Node", bound=ast.AST)
_Found = tuple[int, list[ast.stmt]] | None


class Place(NamedTuple):
    """Attributes of the module that take part, None for what is a function."""

    drop: str | None
    norm: str | None = None
    activation: str | None = None


class Forward(NamedTuple):
    function: types.FunctionType
    places: tuple[Place, ...]


def rewritten(original: type, function: Any) -> Forward | None:
    """Of the forward of a class; None where there is nothing to fuse in it."""
    inner = function
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    code = getattr(inner, "__code__", None)
    if code is None or not any(_has(name, *_DROPS) for name in code.co_names):
        return None
    definition = _source.parse(inner)
    if definition is None:
        return None
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    if not arguments or not _is_read_plainly(definition, arguments[0].arg):
        return None
    rewriter = _Rewriter(original, inner, definition, arguments[0].arg)
    rewriter.run(definition)
    if not rewriter.places:
        return None
    new = _rewrapped(function, _source.replaced(inner, definition))
    return None if new is None else Forward(new, tuple(rewriter.places))


def _rewrapped(function: Any, inner: Any) -> Any:
    """`inner` in the decorators of `function`, None where they hold it otherwise than in a cell."""
    if not hasattr(function, "__wrapped__"):
        return inner
    held = function.__wrapped__
    wrapped = _rewrapped(held, inner)
    if wrapped is None or type(function) is not types.FunctionType:
        return None
    cells = function.__closure__ or ()
    if not any(_holds(cell, held) for cell in cells):
        return None
    itself = types.CellType()
    closure = tuple(
        types.CellType(wrapped)
        if _holds(cell, held)
        else itself
        if _holds(cell, function)
        else cell
        for cell in cells
    )
    new = _source.remade(function, function.__code__, closure)
    new.__dict__["__wrapped__"] = wrapped
    itself.cell_contents = new
    return new


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


class _Part(NamedTuple):
    """A call of a module or function: its text, the attribute that it is, and the argument."""

    text: str
    attribute: str | None
    of: ast.expr


class _Sum(NamedTuple):
    """Statements that drop and add."""

    length: int
    drop: _Part
    residual: str
    result: str | None  # the variable, None where it is returned
    norm: str | None  # in the same statement


# Whose blocks are left alone, where there are such in this version of Python.
_LEFT = ("FunctionDef", "AsyncFunctionDef", "ClassDef", "Try", "TryStar", "With", "AsyncWith")
_LEFT_TYPES = tuple(getattr(ast, name) for name in _LEFT if hasattr(ast, name))


class _Rewriter:
    def __init__(
        self,
        original: type,
        function: types.FunctionType,
        definition: ast.FunctionDef,
        self_name: str,
    ) -> None:
        self.original = original
        self.function = function
        self.self = self_name
        self.places: list[Place] = []
        self.loads = Counter(n.id for n in ast.walk(definition) if _is_loaded(n))
        self.summed = Counter(
            n.id
            for parent in ast.walk(definition)
            if isinstance(parent, ast.BinOp)
            for n in (parent.left, parent.right)
            if _is_loaded(n)
        )

    def run(self, node: Any) -> None:
        """On the blocks of statements in a function or in a statement of it."""
        for inner in getattr(node, "cases", ()):
            self.run(inner)
        for field in ("body", "orelse"):
            block = getattr(node, field, ())
            for statement in block:
                if not isinstance(statement, _LEFT_TYPES):
                    self.run(statement)
            if block:
                setattr(node, field, self._block(block))

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        while statements:
            length, new = self._activation(statements) or self._sum(statements) or (1, None)
            done += new or [self._in_expressions(statements[0])]
            statements = statements[length:]
        return done

    # What the statements are.

    def _method(self, node: ast.expr | None, *parts: str) -> tuple[str, ast.expr] | None:
        """Of `self.<name with one of parts>(expression)` the name and the expression."""
        if (
            _is_plain_call(node)
            and isinstance(node.func, ast.Attribute)
            and _is_name(node.func.value, self.self)
            and _has(node.func.attr, *parts)
            and not self._is_property(node.func.attr)
        ):
            return node.func.attr, node.args[0]
        return None

    def _drop(self, node: ast.expr | None) -> _Part | None:
        if found := self._method(node, *_DROPS):
            return _Part(f"{self.self}.{found[0]}", *found)
        if not (isinstance(node, ast.Call) and self._value_of(node.func) is F.dropout):
            return None
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return None
        given: dict[str | None, Any] = dict(
            zip(("input", "p", "training", "inplace"), node.args, strict=False)
        )
        given |= {keyword.arg: keyword.value for keyword in node.keywords}
        training = given.setdefault("training", ast.Constant(True))
        if set(given) != {"input", "p", "training"}:
            return None
        if not (self._is_simple(given["p"]) and self._is_simple(training)):
            return None
        function, p, training = map(ast.unparse, (node.func, given["p"], training))
        text = f"{self.self}.{FUSION}.Functional({function}, {p}, {training})"
        return _Part(text, None, given["input"])

    def _activated(self, node: ast.expr | None) -> _Part | None:
        if found := self._method(node, "act"):
            return _Part(f"{self.self}.{found[0]}", *found)
        if _is_plain_call(node) and self._value_of(node.func) in (F.relu, F.gelu, F.silu):
            return _Part(ast.unparse(node.func), None, node.args[0])
        return None

    def _value_of(self, node: ast.expr) -> Any:
        """What a dotted name of the function's module stands for."""
        if isinstance(node, ast.Attribute):
            return getattr(self._value_of(node.value), node.attr, None)
        code = self.function.__code__
        inside = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        if isinstance(node, ast.Name) and node.id not in inside:
            return self.function.__globals__.get(node.id)
        return None

    def _is_local(self, name: str | None) -> bool:
        """Whether it is a variable that nobody else sees."""
        code = self.function.__code__
        return name in set(code.co_varnames) - set(code.co_cellvars)

    def _is_only_summed(self, name: str, otherwise: int) -> bool:
        """Whether it is read as a term, and otherwise so often: the sum and the norm that one call
        returns have one node in the graph, so that nobody may ask for the sum's own gradient.
        """
        return self.loads[name] == self.summed[name] + otherwise

    def _is_property(self, name: str) -> bool:
        return isinstance(inspect.getattr_static(self.original, name, None), property)

    def _is_simple(self, node: ast.expr) -> bool:
        """Whether it may be evaluated twice."""
        while isinstance(node, ast.Attribute):
            if self._is_property(node.attr):
                return False
            node = node.value
        return isinstance(node, (ast.Name, ast.Constant))

    # The sequences: how many statements each is, and what takes their place.

    def _fused_activation(self, drop: _Part, activation: _Part) -> ast.expr:
        self.places.append(Place(drop.attribute, activation=activation.attribute))
        text = f"{self.self}.{FUSION}.activate({activation.text}, {drop.text})"
        call = cast(ast.Call, ast.parse(text, mode="eval").body)
        call.args.insert(1, activation.of)  # which may change what drops
        return call

    def _activation(self, statements: list[ast.stmt]) -> _Found:
        name, value = _assigned(statements[0])
        target, dropped = _assigned(statements[1]) if len(statements) > 1 else (None, None)
        activation, drop = self._activated(value), self._drop(dropped)
        if not (activation and drop and name == target and _is_name(drop.of, name)):
            return None
        if not self._is_local(name):
            return None
        fused = self._fused_activation(drop, activation)
        return 2, [_at(statements[0], ast.Assign([ast.Name(name, ast.Store())], fused))]

    def _in_expressions(self, statement: ast.stmt) -> ast.stmt:
        rewriter = self

        class Expressions(ast.NodeTransformer):
            def visit_Call(self, node: ast.Call) -> ast.AST:
                drop = rewriter._drop(node)
                activation = rewriter._activated(drop.of) if drop else None
                if drop is None or activation is None:
                    return self.generic_visit(node)
                return _at(node, rewriter._fused_activation(drop, activation))

            def keep(self, node: ast.AST) -> ast.AST:
                return node

            visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = keep
            visit_GeneratorExp = keep

        # Of others the blocks have been seen.
        simple = isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr))
        return Expressions().visit(statement) if simple else statement

    def _find_sum(self, statements: list[ast.stmt]) -> _Sum | None:
        name, value = _assigned(statements[0])
        drop = self._drop(value)
        if drop is not None and self._is_local(name) and len(statements) > 1:
            target, total = _assigned(statements[1], returned=True)
            norm, total = self._method(total, "norm") or (None, total)
            if target in (name, None):  # else the variable keeps what was dropped
                for dropped, residual in _terms(total):
                    if not (_is_name(dropped, name) and _is_name(residual)):
                        continue
                    if residual.id != name and self._is_local(residual.id):
                        return _Sum(2, drop, residual.id, target, norm)
        target, total = _assigned(statements[0], returned=True)
        norm, total = self._method(total, "norm") or (None, total)
        if target is not None and not self._is_local(target):
            return None
        for dropped, residual in _terms(total):
            drop = self._drop(dropped)
            if drop is not None and _is_name(residual) and self._is_local(residual.id):
                return _Sum(1, drop, residual.id, target, norm)
        return None

    def _sum(self, statements: list[ast.stmt]) -> _Found:
        found = self._find_sum(statements)
        if found is None:
            return None
        length, drop, residual, result, norm = found
        first, original = statements[0], statements[:length]
        before: list[ast.stmt] = []
        after: list[ast.stmt] = []
        of = drop.of
        if not _is_name(of):
            if any(isinstance(node, ast.NamedExpr) for node in ast.walk(of)):
                return None  # it may be of the residual
            of = ast.Name("_dropout_ext_input", ast.Load())
            before = [_at(first, ast.Assign([ast.Name(of.id, ast.Store())], drop.of))]
            if result is not None:  # it would hold memory
                after = [_at(first, ast.Delete([ast.Name(of.id, ast.Del())]))]
            original = [_Replace(drop.of, of).visit(first), *original[1:]]
        fusion = f"{self.self}.{FUSION}"
        arguments = f"{drop.text}, {of.id}, {residual}"
        outcome = "return" if result is None else f"{result} ="
        add = _Way(f"{fusion}.adds({arguments})", [f"{outcome} {fusion}.add({arguments})"])
        if norm is not None:
            arguments = f"{self.self}.{norm}, {arguments}"
            normed = f"{outcome} {fusion}.add_norm({arguments})"
            ways = [_Way(f"{fusion}.norms({arguments})", [normed])]
        elif result is not None and (then := self._normalized(statements[length:], result)):
            norm, target, renamed, count = then
            rest = statements[length : length + count]
            length, original = length + count, [*original, *rest]
            arguments = f"{self.self}.{norm}, {arguments}"
            renamed = None if renamed == target else renamed
            norms = "norms"
            if target is None:
                fused = [f"return {fusion}.add_norm({arguments})"]
            elif target == result and renamed is None:
                fused = [f"{target} = {fusion}.add_norm({arguments})"]
            else:
                norms = "norms_sum"
                total = renamed if target == result else result
                fused = [f"{target}, {total} = {fusion}.add_then_norm({arguments})"]
                if renamed not in (None, total):
                    fused.append(f"{renamed} = {total}")
            ways = [_Way(f"{fusion}.{norms}({arguments})", fused), add._replace(rest=rest)]
        else:
            ways = [add]
        self.places.append(Place(drop.attribute, norm=norm))
        new: list[ast.stmt] = original
        for way in reversed(ways):
            body = ast.parse("\n".join(way.statements)).body
            condition = ast.parse(way.condition, mode="eval").body
            body = [_at(first, statement) for statement in body] + copy.deepcopy(list(way.rest))
            new = [ast.If(_at(first, condition), body, new, lineno=first.lineno, col_offset=0)]
        return length, [*before, *new, *after]

    def _normalized(
        self, statements: list[ast.stmt], total: str
    ) -> tuple[str, str | None, str | None, int] | None:
        """Of `[renamed = total;] target = self.norm(total)` the norm, target (None where it is
        returned), renamed, and how many statements it is.
        """
        renamed = None
        for count, statement in enumerate(statements[:2], start=1):
            target, value = _assigned(statement, returned=True)
            norm = self._method(value, "norm")
            if target is not None and not self._is_local(target):
                return None
            if norm is not None and _is_name(norm[1], total):
                kept = target is not None and (target != total or renamed not in (None, target))
                names = {total: count} if target not in (None, total) else {}
                names |= {renamed: 0} if renamed not in (None, target) else {}
                if kept and not all(self._is_only_summed(*name) for name in names.items()):
                    return None
                return norm[0], target, renamed, count
            if not _is_name(value, total) or target in (None, total):
                return None
            renamed = target
        return None


class _Way(NamedTuple):
    condition: str
    statements: list[str]
    rest: Sequence[ast.stmt] = ()  # the original's, after them


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().visit(node)


def _assigned(statement: ast.stmt, returned: bool = False) -> tuple[Any, ast.expr | None]:
    """Name and value of an assignment to one name; no name and the value of what is returned."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        (target,) = statement.targets
        return (target.id, statement.value) if _is_name(target) else (None, None)
    if returned and isinstance(statement, ast.Return):
        return None, statement.value
    return None, None


def _terms(node: ast.expr | None) -> tuple[tuple[ast.expr, ast.expr], ...]:
    """The two of a sum, either first."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (node.left, node.right), (node.right, node.left)
    return ()


def _is_read_plainly(definition: ast.FunctionDef, name: str) -> bool:
    """Whether it keeps its value and nobody asks for its class."""
    for node in ast.walk(definition):
        if _is_name(node, name) and not isinstance(node.ctx, ast.Load):
            return False
        if name in (getattr(node, "name", None), getattr(node, "asname", None)):
            return False
        if isinstance(node, ast.Attribute) and node.attr == "__class__":
            return False
        if isinstance(node, ast.Call) and _is_name(node.func, "type"):
            return False
    return True


def _is_loaded(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _is_plain_call(node: ast.AST | None) -> TypeGuard[ast.Call]:
    """Whether it is a call of one argument."""
    return (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and not isinstance(node.args[0], ast.Starred)
    )


def _has(name: str, *parts: str) -> bool:
    return any(part in name.lower() for part in parts)


def _is_name(node: ast.AST | None, name: str | None = None) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and name in (None, node.id)


def _at(place: ast.stmt | ast.expr, new: _Node) -> _Node:
    """`new` at the line of what it stands for; all of it."""
    for node in cast(Any, ast.walk(new)):
        if "lineno" in node._attributes:
            node.lineno, node.end_lineno = place.lineno, place.end_lineno
            node.col_offset, node.end_col_offset = place.col_offset, place.end_col_offset
    return new
