"""What the source of a function says, where it is certain that it is what runs."""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import inspect
import symtable
import tokenize
from types import CellType, CodeType, FunctionType
from typing import Any, cast

_NESTED = inspect.CO_NESTED  # whether it stands in another function
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


def parse(function: Any) -> ast.FunctionDef | None:
    """The definition of a function without decorators, defaults and annotations. None where there
    is no source, or where it has been changed since and does not compile to what runs.
    """
    if type(function) is not FunctionType:
        return None
    try:
        lines, before = inspect.findsource(function)
        block = inspect.getblock(lines[before:])
        # What strings hold at the beginnings of lines is to stay.
        nested = block[0][:1].isspace()
        (definition,) = ast.parse("".join(["if 1:\n"] * nested + block)).body
        if nested:
            (definition,) = cast(ast.If, definition).body
        if not isinstance(definition, ast.FunctionDef):
            return None
        ast.increment_lineno(definition, before - nested)
        _strip(definition)
        return definition if _same(_code(definition, function), function.__code__) else None
    except (OSError, TypeError, ValueError, IndexError, SyntaxError, tokenize.TokenError):
        return None


def _strip(definition: ast.FunctionDef) -> None:
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for argument in (
        *arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg,
        arguments.kwarg,
    ):  # fmt: skip
        if argument is not None:
            argument.annotation = None
    arguments.defaults = []
    arguments.kw_defaults = [None] * len(arguments.kwonlyargs)


def replaced(function: FunctionType, definition: ast.FunctionDef) -> FunctionType:
    """`function` with another definition, of the same variables from outside."""
    code = _code(definition, function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return remade(function, code, tuple(cells[name] for name in code.co_freevars))


def remade(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    """`function` of other code and cells."""
    name, defaults = function.__name__, function.__defaults__
    new = FunctionType(code, function.__globals__, name, defaults, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__doc__, new.__qualname__ = function.__doc__, function.__qualname__
    new.__module__, new.__annotations__ = function.__module__, function.__annotations__
    new.__dict__.update(function.__dict__)
    return new


def _code(definition: ast.FunctionDef, function: FunctionType) -> CodeType:
    free = [ast.arg(name) for name in function.__code__.co_freevars]
    own_name = [definition.name] * (definition.name not in function.__code__.co_freevars)
    around = ast.FunctionDef(
        name="around",
        args=ast.arguments(posonlyargs=[], args=free, kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=[*(ast.Global([name]) for name in own_name), definition],
        decorator_list=[],
    )
    # Methods of what a file imports are called by other instructions (Python 3.11 and 3.12).
    lines, _ = inspect.findsource(function)
    imports = [ast.Import([ast.alias(name)]) for name in _imported("".join(lines))]
    module = ast.fix_missing_locations(ast.Module([*imports, around], type_ignores=[]))
    flags = function.__code__.co_flags & _FUTURE
    file = function.__code__.co_filename
    code: CodeType = compile(module, file, "exec", flags, dont_inherit=True)
    for name in ("around", definition.name):
        (code,) = (c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


@functools.lru_cache(64)
def _imported(source: str) -> list[str]:
    try:
        names = symtable.symtable(source, "", "exec").get_symbols()
    except (SyntaxError, ValueError):  # a notebook or a page with code in it
        return []
    return [symbol.get_name() for symbol in names if symbol.is_imported()]


def _same(a: CodeType, b: CodeType) -> bool:
    names = (
        "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount",
        "co_posonlyargcount", "co_kwonlyargcount",
    )  # fmt: skip
    return (
        all(getattr(a, name) == getattr(b, name) for name in names)
        and a.co_flags | _NESTED == b.co_flags | _NESTED
        and len(a.co_consts) == len(b.co_consts)
        and all(map(_same_constants, a.co_consts, b.co_consts))
    )


def _same_constants(a: Any, b: Any) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _same(a, b)
    # 0.0 and -0.0 are equal, NaN is not, and a set has many texts.
    return type(a) is type(b) and (a == b if isinstance(a, frozenset) else repr(a) == repr(b))


def fingerprint(function: Any) -> str | None:
    """Equal for functions that do the same by the same steps, whatever the names of their variables
    and what they say of themselves. None where `parse` is.
    """
    definition = parse(function)
    if definition is None:
        return None
    body = definition.body
    if ast.get_docstring(definition, clean=False) is not None:
        body = body[1:]
    names = {name: f"variable {n}" for n, name in enumerate(function.__code__.co_varnames)}

    def steps(part: Any) -> Any:
        if isinstance(part, ast.AST):
            # What is empty is left out, because versions of Python differ in it.
            fields = [(name, steps(value)) for name, value in ast.iter_fields(part)]
            return type(part).__name__, [field for field in fields if field[1] not in (None, [])]
        if isinstance(part, list):
            return [steps(each) for each in part]
        return part

    for part in ast.walk(definition):
        if isinstance(part, ast.Name):
            part.id = names.get(part.id, part.id)
    code = function.__code__
    arguments = code.co_argcount, code.co_kwonlyargcount, function.__defaults__
    what = repr((arguments, steps(body)))
    return hashlib.sha256(what.encode()).hexdigest()[:32]
