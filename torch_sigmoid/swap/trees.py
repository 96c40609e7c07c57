"""Syntax trees of functions: known ones are told apart, and a known part is put in other words, see `Rewrite`.

What was rewritten has the original's globals, defaults, decorators and line numbers.
"""

import ast
import copy
import functools
import hashlib
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F

from .functions import FINGERPRINTS, Function, compiled, innermost, is_held, runs_its_source, through_decorators

Bound = dict[str, ast.expr | str]


def _is_one_of(*functions: Function) -> Callable[[Any], bool]:
    return lambda called: any(called is function for function in functions)


def _has_fingerprint(expected: str) -> Callable[[Any], bool]:
    def has(called: Any) -> bool:
        return isinstance(called, types.FunctionType) and fingerprint_of(called) == expected and runs_its_source(called)

    return has


# What a pattern calls by these names.
FUNCTIONS: dict[str, Callable[[Any], bool]] = {
    "sigmoid": _is_one_of(torch.sigmoid, torch.special.expit, F.sigmoid),
    "silu": _is_one_of(F.silu),
    "logsigmoid": _is_one_of(F.logsigmoid),
    **{name: _has_fingerprint(expected) for name, expected in FINGERPRINTS.items()},
}


_Cached = TypeVar("_Cached", bound=Callable[..., Any])


def remembered(function: _Cached) -> _Cached:
    """functools.lru_cache, which hides the types of a function and, from mypy, that classes of modules have a hash."""
    return cast(_Cached, functools.lru_cache(maxsize=4096)(function))


def tree_of(function: Function | str) -> ast.FunctionDef | None:
    """The definition of a function, or in a text, without decorators, annotations and docstring; None without a source."""
    if isinstance(function, str):
        source = function
    else:
        try:
            source = inspect.getsource(innermost(function))
        except (OSError, TypeError):
            return None
    try:
        (definition,) = ast.parse(textwrap.dedent(source)).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    if isinstance(function, types.FunctionType):
        ast.increment_lineno(definition, innermost(function).__code__.co_firstlineno - _first_line(definition))
    definition.decorator_list = []
    definition.returns = None
    if ast.get_docstring(definition, clean=False) is not None and len(definition.body) > 1:
        del definition.body[0]
    for node in ast.walk(definition):
        if isinstance(node, ast.arg):
            node.annotation = None
    return definition


def _first_line(definition: ast.FunctionDef) -> int:
    return min([definition.lineno, *(each.lineno for each in definition.decorator_list)])


def fingerprint(definition: ast.FunctionDef) -> str:
    """16 hexadecimal digits that tell a syntax tree from others, whatever it and its locals are called."""
    numbers: dict[str, int] = {}
    local = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    local |= {node.arg for node in ast.walk(definition) if isinstance(node, ast.arg)}
    local -= {"self"}

    def described(node: Any) -> str:
        if isinstance(node, list):
            return "[" + ",".join(map(described, node)) + "]"
        if node is None:  # in {**x}, or an argument by keyword without a default
            return ""
        if not isinstance(node, ast.AST):
            return repr(numbers.setdefault(node, len(numbers)) if isinstance(node, str) and node in local else node)
        if isinstance(node, ast.Constant):
            return repr(node.value)
        # Fields that some versions of Python lack, and the names of functions, do not count.
        ignored = {"ctx", "type_comment", "type_params"} | ({"name"} if node is definition else set())
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ignored and value not in (None, [])]
        if isinstance(node, (ast.Attribute, ast.keyword)):
            name = "attr" if isinstance(node, ast.Attribute) else "arg"
            return f"{type(node).__name__}({getattr(node, name)!r},{described(node.value)})"
        return type(node).__name__ + "(" + ",".join(f"{name}={described(value)}" for name, value in fields) + ")"

    return hashlib.sha256(described(definition).encode()).hexdigest()[:16]


_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@remembered
def fingerprint_of(function: "Function | str") -> str | None:
    """The fingerprint of a function or of a text; None where there is no source."""
    if isinstance(function, str) and _FINGERPRINT.fullmatch(function):
        return function
    tree = tree_of(function)
    return None if tree is None else fingerprint(tree)


@dataclass(frozen=True)
class Rewrite:
    r"""Put `put` in the place of `find`: an expression, or whole statements that follow each other.

    Both are Python. A name of two capitals or more stands for any expression, the same wherever it stands, and after `self.`
    for any attribute. In `find`, `sigmoid`, `silu` and `logsigmoid` stand for whatever the function calls torch's functions:
    torch.sigmoid, F.silu, nn.functional.silu. Two names mean more in `put`: `self.ACT(gate, other)` gives an activation that
    `find` calls as self.ACT(gate) the other factor, and self.FUSED calls the `fused` function of the `Form`. Everything else is
    taken as it is written, `self` too.

    Args:
        find: what to look for, which must be there once.
        put: what comes in its place.

    Raises:
        ValueError: either is not Python, or `put` has a name in capitals that `find` does not bind.

    Example:
        >>> from torch_sigmoid.swap import Rewrite
        >>> rewrite = Rewrite("HALF = XS.chunk(2, -1)\nreturn silu(HALF[0]) * HALF[1]", "return self.FUSED(XS, -1)")
        >>> sorted(rewrite.capitals)
        ['FUSED', 'XS']
    """

    find: str
    put: str

    @property
    def capitals(self) -> set[str]:
        """The names in capitals that are put."""
        return _capitals(ast.parse(self.put))

    def __post_init__(self) -> None:
        for name, text in (("find", self.find), ("put", self.put)):
            try:
                ast.parse(text)
            except (SyntaxError, TypeError, ValueError) as error:
                raise ValueError(f"Rewrite(): {name} must be Python, an expression or statements, got {text!r}") from error
        missing = self.capitals - _capitals(ast.parse(self.find)) - {"FUSED"}
        if missing:
            raise ValueError(f"Rewrite(): put uses {', '.join(sorted(missing))}, which find does not bind")


def _capitals(tree: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if _stands_for_any(name)}


def _stands_for_any(name: str) -> bool:
    return name.isupper() and name.isidentifier() and len(name) > 1


class _Matcher:
    """Matches a pattern against parts of one function, whose globals tell what it calls."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def matches(self, pattern: Any, node: Any, bound: Bound) -> bool:
        """Whether `node` is the pattern; what its capitals stand for is added to `bound`."""
        if isinstance(pattern, list):
            return len(pattern) == len(node) and all(self.matches(*pair, bound) for pair in zip(pattern, node))
        if isinstance(pattern, ast.Name):
            if _stands_for_any(pattern.id):
                return self._binds(pattern.id, node, bound)
            if pattern.id in FUNCTIONS:
                return FUNCTIONS[pattern.id](self.resolved(node))
        if type(pattern) is not type(node):
            return False
        if not isinstance(pattern, ast.AST):
            return bool(pattern == node)
        if isinstance(pattern, ast.Attribute) and _stands_for_any(pattern.attr):
            return self.matches(pattern.value, node.value, bound) and self._binds(pattern.attr, node.attr, bound)
        return all(
            self.matches(getattr(pattern, name, None), getattr(node, name, None), bound)
            for name in pattern._fields
            if name not in ("ctx", "type_comment", "kind")
        )

    def _binds(self, name: str, value: Any, bound: Bound) -> bool:
        if not isinstance(value, (ast.expr, str)) or isinstance(value, ast.Starred):
            return False
        if name in bound:
            return _same(bound[name], value)
        bound[name] = value
        return True

    def resolved(self, node: ast.AST) -> Any:
        """The object that a dotted name of globals stands for."""
        path = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        found = self.scope.get(node.id) if isinstance(node, ast.Name) else None
        for name in reversed(path):
            found = getattr(found, name, None)
        return inspect.unwrap(found) if callable(found) else found


def _same(a: ast.expr | str, b: ast.expr | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return ast.dump(_loaded(a)) == ast.dump(_loaded(b))


def _loaded(node: ast.expr) -> ast.expr:
    node = copy.deepcopy(node)
    for each in ast.walk(node):
        if hasattr(each, "ctx"):
            each.ctx = ast.Load()
    return node


class _Filler(ast.NodeTransformer):
    """A pattern with what was bound in the places of its capitals."""

    def __init__(self, bound: Bound, fused: str) -> None:
        self.bound = bound | {"FUSED": fused}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self.bound.get(node.id)
        return node if value is None else _with_context(value, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        node = ast.Attribute(self.visit(node.value), node.attr, node.ctx)
        value = self.bound.get(node.attr)
        if isinstance(value, str):
            node.attr = value
        return node


def _with_context(value: ast.expr | str, ctx: ast.expr_context) -> ast.expr:
    if isinstance(value, str):
        return ast.Name(value, ctx)
    value = copy.deepcopy(value)
    if isinstance(value, (ast.Name, ast.Attribute, ast.Subscript)):
        value.ctx = ctx
    return value


def _places(
    definition: ast.FunctionDef, pattern: list[ast.stmt], matcher: _Matcher
) -> Iterator[tuple[ast.AST, str, Any, Bound]]:
    """Where the pattern is found."""
    expression = pattern[0].value if len(pattern) == 1 and isinstance(pattern[0], ast.Expr) else None
    for node in ast.walk(definition):
        for field, value in ast.iter_fields(node):
            if expression is not None:
                for index, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    bound: Bound = {}
                    if isinstance(each, ast.expr) and matcher.matches(expression, each, bound):
                        yield node, field, index, bound
            elif isinstance(value, list) and all(isinstance(each, ast.stmt) for each in value):
                for start in range(len(value) - len(pattern) + 1):
                    bound = {}
                    if matcher.matches(pattern, value[start : start + len(pattern)], bound):
                        yield node, field, slice(start, start + len(pattern)), bound


@remembered
def called_by(function: Function) -> frozenset[str]:
    """Which of FUNCTIONS a function calls."""
    definition = tree_of(function)
    if definition is None:
        return frozenset()
    matcher = _Matcher(_scope(function))
    called = [matcher.resolved(node.func) for node in ast.walk(definition) if isinstance(node, ast.Call)]
    return frozenset(name for name, is_it in FUNCTIONS.items() if any(map(is_it, called)))


@dataclass(frozen=True)
class Match:
    """Where a rewrite applies to a function, once; `bound` says what the names in capitals stand for."""

    function: Function
    definition: ast.FunctionDef
    rewrite: Rewrite
    bound: Bound

    def written(self, fused: str) -> Function:
        """The function, rewritten; `fused` is the attribute of self that FUSED stands for."""
        definition, _, _ = self.filled(fused)
        return through_decorators(self.function, compiled(definition, innermost(self.function)))

    def filled(self, fused: str) -> tuple[ast.FunctionDef, list[ast.AST], list[ast.AST]]:
        """The definition, rewritten; and the nodes that gave way, and those in their place."""
        definition = copy.deepcopy(self.definition)
        pattern = ast.parse(self.rewrite.find).body
        ((node, field, index, bound),) = _places(definition, pattern, _Matcher(_scope(self.function)))
        put = ast.parse(self.rewrite.put).body
        value = getattr(node, field)
        old = value if index is None else value[index]
        filler = _Filler(bound, fused)
        new: Any = [filler.visit(each) for each in put]
        if not isinstance(index, slice):
            (statement,) = new
            new = statement.value
        olds, news = (each if isinstance(each, list) else [each] for each in (old, new))
        for each in news:
            for inner in ast.walk(each):
                ast.copy_location(inner, olds[0])
        if index is None:
            setattr(node, field, new)
        else:
            value[index] = new
        return definition, olds, news


def match(function: Function, rewrite: Rewrite) -> Match | None:
    """How a rewrite applies to a function; None where it does not: nothing or several parts match, or a name would be lost."""
    definition = tree_of(function)
    if definition is None:
        return None
    found = list(itertools.islice(_places(definition, ast.parse(rewrite.find).body, _Matcher(_scope(function))), 2))
    if len(found) != 1:
        return None
    found_once = Match(function, definition, rewrite, found[0][3])
    return None if _loses_a_name(*found_once.filled("_")) or not is_held(function) else found_once


def _loses_a_name(definition: ast.FunctionDef, old: list[ast.AST], new: list[ast.AST]) -> bool:
    """Whether something reads a local that the old nodes assigned and the new ones do not."""
    lost = _names(old, ast.Store) - _names(new, ast.Store)
    # What the first of the old nodes reads, it reads as it was before them.
    if lost & (_names(new, ast.Load) - _names(old[:1], ast.Load)):
        return True
    end = max((node.end_lineno, node.end_col_offset) for node in old if isinstance(node, ast.stmt)) if lost else (0, 0)
    replaced = {id(node) for each in new for node in ast.walk(each)}
    # A loop reads again what stands before, and an inner function reads when it is called.
    anywhere = (ast.For, ast.While, ast.Lambda, ast.FunctionDef)
    late = {
        id(node)
        for each in ast.walk(definition)
        if each is not definition and isinstance(each, anywhere)
        for node in ast.walk(each)
    }
    return any(
        isinstance(node, ast.Name)
        and node.id in lost
        and isinstance(node.ctx, ast.Load)
        and id(node) not in replaced
        and ((node.lineno, node.col_offset) >= end or id(node) in late)
        for node in ast.walk(definition)
    )


def _names(nodes: list[ast.AST], context: type[ast.expr_context]) -> set[str]:
    names = (node for each in nodes for node in ast.walk(each) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, context)}


def _scope(function: Function) -> dict[str, Any]:
    scope: dict[str, Any] = getattr(innermost(function), "__globals__", {})
    return scope
