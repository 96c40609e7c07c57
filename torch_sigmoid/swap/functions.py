"""Functions made again: with other code, and with the decorators that they had."""

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

# Of focal losses, by what rewrites call them: torchvision's, and that of the DETR family.
FINGERPRINTS = {"sigmoid_focal_loss": "3d349d5760d561f0", "detr_focal_loss": "5c484d299d240ef9"}


def innermost(function: Function) -> Function:
    """What decorators made with functools.wraps stand around."""
    inner: Function = inspect.unwrap(function)
    return inner


@functools.lru_cache(maxsize=4096)
def runs_its_source(function: Function) -> bool:
    """Whether a function runs what its file says, which may have changed since it was imported."""
    code = getattr(innermost(function), "__code__", None)
    return code is not None and code in _codes_in("".join(linecache.getlines(code.co_filename)))


@functools.lru_cache(maxsize=256)
def _codes_in(source: str) -> frozenset[types.CodeType]:
    """The code of everything that a file defines."""
    try:
        waiting = [compile(source, "source", "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return frozenset()
    found = set()
    while waiting:
        code = waiting.pop()
        found.add(code)
        waiting += (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(found)


def compiled(definition: ast.FunctionDef, original: Any) -> Function:
    """The definition as a function that has all of the original's but its code."""
    cells = original.__code__.co_freevars
    # Names from an enclosing scope, such as the one that super() needs, must be free in the code as they were.
    # The class around it, which gets the original's name, is for private names such as self.__gate.
    owner = ast.parse(f"class {_owner(original)}: pass").body[0]
    assert isinstance(owner, ast.ClassDef)
    owner.body = [definition]
    body: list[ast.stmt] = [owner, ast.Return(ast.Name(owner.name, ast.Load()))]
    outer = ast.parse(f"def outer({', '.join(cells)}): pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = body
    namespace: dict[str, Any] = {}
    filename = original.__code__.co_filename
    # Defaults are taken from the original, not computed again.
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [each and ast.Constant(None) for each in definition.args.kw_defaults]
    exec(compile(ast.fix_missing_locations(ast.Module([outer], [])), filename, "exec"), original.__globals__, namespace)
    (code,) = (
        value.__code__
        for value in vars(namespace["outer"](*(None for _ in cells))).values()
        if isinstance(value, types.FunctionType)
    )
    closure = {name: cell for name, cell in zip(cells, original.__closure__ or ())}
    function = types.FunctionType(
        code, original.__globals__, original.__name__, original.__defaults__, tuple(closure[name] for name in code.co_freevars)
    )
    function.__kwdefaults__ = original.__kwdefaults__
    function.__qualname__, function.__module__, function.__doc__ = original.__qualname__, original.__module__, original.__doc__
    function.__annotations__ = original.__annotations__
    function.__dict__.update(original.__dict__)
    return function


def _owner(method: Any) -> str:
    """The name of the class that a method was defined in; "_", in which no name is private, for a function."""
    owner: str = method.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return owner if owner.isidentifier() else "_"


def through_decorators(outer: Any, made: Function) -> Function:
    """`made` with the decorators of `outer`: copies of their functions, which hold `made` where they held the original."""
    inner = getattr(outer, "__wrapped__", None)
    if inner is None:
        return made
    made = through_decorators(inner, made)
    cells = tuple(types.CellType(made) if _holds(cell, inner) else cell for cell in outer.__closure__ or ())
    function = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, cells)
    function.__kwdefaults__ = outer.__kwdefaults__
    function.__dict__.update(outer.__dict__ | {"__wrapped__": made})
    function.__qualname__, function.__module__, function.__doc__ = outer.__qualname__, outer.__module__, outer.__doc__
    return function


def is_held(outer: Any) -> bool:
    """Whether each decorator is a function that holds in a cell what it stands around, so that it can hold something else."""
    while (inner := getattr(outer, "__wrapped__", None)) is not None:
        if not isinstance(outer, types.FunctionType) or not any(_holds(cell, inner) for cell in outer.__closure__ or ()):
            return False
        outer = inner
    return isinstance(outer, types.FunctionType)


def _holds(cell: Any, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
