"""Syntax trees: which functions count as the same, where a rewrite fits, and what a rewritten function keeps."""

import ast
import functools
import linecache
import subprocess
import textwrap
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torch_sigmoid.swap import Rewrite, functions, trees
from torch_sigmoid.swap.forms import fingerprint_of

PRODUCT = Rewrite("self.ACT(GATE) * UP", "self.ACT(GATE, UP)")
HALVES = Rewrite("GATE, UP = PACKED.chunk(2, dim=DIM)\nOUT = self.ACT(GATE) * UP", "OUT = self.ACT(PACKED, packed_dim=DIM)")


def body_of(function, rewrite, fused="_"):
    """What a rewrite makes of a function, as text; None where it does not fit."""
    found = trees.match(function, rewrite)
    return found and "\n".join(ast.unparse(each) for each in found.filled(fused)[0].body)


def body_of_text(text, rewrite):
    """The same of the statements of a method, in a text."""
    source = "def forward(self, x, y, gate, up):\n" + textwrap.indent(textwrap.dedent(text), "    ")
    namespace = {"F": F, "torch": torch}
    filename = f"<text {hash(source)}>"
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    return body_of(namespace["forward"], rewrite)


# Fingerprints


BASE = "def forward(self, x):\n    y = self.gate(x)\n    return self.act(y) * self.up(x)"
SAME = {
    "other names of locals": "def forward(self, h):\n    z = self.gate(h)\n    return self.act(z) * self.up(h)",
    "another name of the method": BASE.replace("forward", "compute"),
    "annotations": BASE.replace("(self, x)", "(self, x: 'Tensor') -> 'Tensor'"),
    "comments": BASE.replace("(x)\n", "(x)  # the gate\n\n"),
    "a docstring": BASE.replace("x):\n", "x):\n    'The gated product.'\n"),
    "line breaks": BASE.replace(
        "self.act(y) * self.up(x)", "(\n        self.act(y)\n        * self.up(\n            x,\n        )\n    )"
    ),
    "decorators": "@torch.no_grad()\n" + BASE,
    "indentation": textwrap.indent(BASE, "        "),
}
DIFFERENT = {
    "another operator": BASE.replace("*", "+"),
    "the factors swapped": BASE.replace("self.act(y) * self.up(x)", "self.up(x) * self.act(y)"),
    "another attribute": BASE.replace("self.up", "self.down"),
    "another local": BASE.replace("self.up(x)", "self.up(y)"),
    "a global in place of a local": BASE.replace("self.up(x)", "self.up(z)"),
    "a default": BASE.replace("(self, x)", "(self, x=None)"),
    "another argument": BASE.replace("(self, x)", "(self, x, z)"),
    "an argument by keyword only": BASE.replace("(self, x)", "(self, *, x)"),
    "a keyword": BASE.replace("self.up(x)", "self.up(x, dim=0)"),
    "a statement more": BASE.replace("    return", "    y = y\n    return"),
    "a global of the same name as a local elsewhere": BASE.replace("self.gate(x)", "gate(x)"),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_a_fingerprint_does_not_depend_on_names_of_locals_and_layout(text):
    assert fingerprint_of(text) == fingerprint_of(BASE)


@pytest.mark.parametrize("text", DIFFERENT.values(), ids=DIFFERENT)
def test_a_fingerprint_tells_what_computes_something_else(text):
    assert fingerprint_of(text) is not None
    assert fingerprint_of(text) != fingerprint_of(BASE)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1", "True"),
        ("1", "1.0"),
        ("0.0", "-0.0"),
        ("'x'", "x"),
        ("None", "'None'"),
        ("{**x}", "{None: x}"),
        ("lambda *, y: y", "lambda *, y=None: y"),
        ("x[:1]", "x[1:]"),
        ("x[1]", "x[1,]"),
        ("x.y(z=1)", "x.z(y=1)"),
        ("f(*x)", "f(**x)"),
        ("lambda y: y", "lambda y: x"),
        ("x < 1", "x <= 1"),
        ("f'{x}'", "f'{x!r}'"),
    ],
)
def test_expressions_that_differ_have_different_fingerprints(a, b):
    first, second = (fingerprint_of(f"def forward(self, x):\n    return {each}") for each in (a, b))
    assert None not in (first, second)
    assert first != second


@pytest.mark.parametrize(
    "text", ["", "x = 1", "def f(: pass", "lambda x: x", "def f(): pass\ndef g(): pass", "async def f(): pass"]
)
def test_what_is_no_single_function_has_no_fingerprint(text):
    assert fingerprint_of(text) is None


def test_functions_without_a_source_have_no_fingerprint():
    namespace = {}
    exec("def forward(self, x): return x", namespace)
    assert fingerprint_of(namespace["forward"]) is None
    assert fingerprint_of(torch.sigmoid) is None
    assert fingerprint_of("0123456789abcdef") == "0123456789abcdef"


# Texts whose trees differ most between versions of Python: f-strings, slices, keyword-only arguments, positions, lambdas.
TEXTS = (
    BASE,
    "def f(self, x, *, dim: int = -1, **kw):\n    return x[..., ::2].sum(dim=dim, **kw)",
    "def f(self, x):\n    raise ValueError(f'got {x.shape} and {x!r:>10}, ' 'expected ' f'{self.n}')",
    "def f(self, x, /, y=None):\n    a, *b = x\n    return [each if each else (lambda z: z)(y) for each in b], {**a, 'b': b}",
    "def f(self, x):\n    with torch.no_grad(), self.scope as s:\n        s[0], s[x:, 1] = x, None\n    del s\n"
    "    return -x ** 2 < 1 < x",
    "def f(self, x):\n    def inner(y: int) -> int:\n        'doc'\n        return y\n    try:\n        x = (n := inner(x))\n"
    "    except* ValueError as e:\n        pass\n    return n",
)
# Loads the modules by themselves, so that a Python without torch can do it.
OTHER_PYTHON = """
import sys, types
for name in ("torch", "torch.nn", "torch.nn.functional"):
    sys.modules[name] = types.ModuleType(name)
torch, nn, functional = map(sys.modules.get, ("torch", "torch.nn", "torch.nn.functional"))
torch.nn, nn.functional, torch.special = nn, functional, functional
torch.sigmoid = functional.expit = functional.sigmoid = functional.silu = functional.logsigmoid = None
sys.modules["swap"] = types.ModuleType("swap")
for name, path in zip(("functions", "trees"), sys.argv[1:]):
    module = sys.modules[f"swap.{name}"] = types.ModuleType(f"swap.{name}")
    module.__package__ = "swap"
    exec(compile(open(path).read(), path, "exec"), vars(module))
for text in eval(sys.stdin.read()):
    tree = module.tree_of(text)
    print(tree and module.fingerprint(tree))
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_fingerprints_are_the_same_in_every_python(version):
    python = [f"python{version}", "-c", OTHER_PYTHON, functions.__file__, trees.__file__]
    try:
        subprocess.run([python[0], "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no Python {version} here")
    found = subprocess.run(python, input=repr(TEXTS), text=True, capture_output=True, check=True).stdout.split()
    here = [str(fingerprint_of(text)) for text in TEXTS]
    # except* is of Python 3.11.
    assert found[:-1] == here[:-1]
    assert "None" in (found[-1], here[-1]) or found[-1] == here[-1]


# Matching


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("return self.down(self.act(self.gate(x)) * self.up(x))", "return self.down(self.act(self.gate(x), self.up(x)))"),
        ("y = self.a1(x[0]) * (x + y)\nreturn y", "y = self.a1(x[0], x + y)\nreturn y"),
        ("if self.act(x) * y > 0:\n    return x", "if self.act(x, y) > 0:\n    return x"),
        ("return [self.act(x) * y]", "return [self.act(x, y)]"),
        ("return f(a=self.act(x) * y)", "return f(a=self.act(x, y))"),
    ],
)
def test_an_expression_is_rewritten_wherever_it_stands(text, expected):
    assert body_of_text(text, PRODUCT) == expected


@pytest.mark.parametrize(
    "text",
    [
        "return y * self.act(x)",
        "return self.act(x) + y",
        "return act(x) * y",
        "return self.act(x, y) * y",
        "return self.act(x, dim=1) * y",
        "return self.act.forward(x) * y",
        "return other.act(x) * y",
        "return self.act(*x) * y",
    ],
)
def test_what_is_written_another_way_does_not_match(text):
    assert body_of_text(text, PRODUCT) is None


def test_several_matches_are_refused():
    assert body_of_text("return self.act(x) * y", PRODUCT) is not None
    assert body_of_text("return self.act(x) * y + self.act(y) * x", PRODUCT) is None
    assert body_of_text("return self.act(self.act(x) * y) * x", PRODUCT) is None


def test_a_name_that_occurs_twice_stands_for_one_thing():
    twice = Rewrite("self.ACT(GATE) * GATE", "self.ACT(GATE, GATE)")
    assert body_of_text("return self.act(x[0]) * x[0]", twice) == "return self.act(x[0], x[0])"
    assert body_of_text("return self.act(x[0]) * x[1]", twice) is None


def test_a_function_is_known_by_what_it_is_and_not_by_its_name():
    rewrite = Rewrite("silu(GATE) * UP", "self.FUSED(GATE, UP)")
    for spelling in ("F.silu", "torch.nn.functional.silu"):
        assert body_of_text(f"return {spelling}(x) * y", rewrite) == "return self._(x, y)"
    for other in ("silu", "F.gelu", "F.missing", "self.silu", "x.silu", "torch.silu"):
        assert body_of_text(f"return {other}(x) * y", rewrite) is None


HALVES_LOST = {
    "read after": "gate, up = x.chunk(2, dim=-1)\ny = self.act(gate) * up\nreturn y + gate",
    "an argument, read after": "x, gate = x.chunk(2, dim=-1)\ny = self.act(x) * gate\nreturn y + x",
    "assigned before too": "gate = 0\ngate, up = x.chunk(2, dim=-1)\ny = self.act(gate) * up\nreturn y + gate",
    "read in the next turn": "for z in x:\n    z = gate\n    gate, up = x.chunk(2, dim=0)\n    y = self.act(gate) * up\n",
    "read by a function within": "z = lambda: gate\ngate, up = x.chunk(2, dim=-1)\ny = self.act(gate) * up\nreturn z()",
}
HALVES_KEPT = {
    "not read": "gate, up = x.chunk(2, dim=-1)\ny = self.act(gate) * up\nreturn y",
    "read before": "z = gate + up\ngate, up = x.chunk(2, dim=-1)\ny = self.act(gate) * up\nreturn y + z",
    "taken apart under its own name": "x = self.proj(x)\nx, up = x.chunk(2, dim=-1)\ny = self.act(x) * up\nreturn y",
    "assigned by both": "x = self.proj(x)\nx, up = x.chunk(2, dim=-1)\nx = self.act(x) * up\nreturn x",
}


@pytest.mark.parametrize("text", HALVES_LOST.values(), ids=HALVES_LOST)
def test_a_rewrite_that_would_lose_a_name_is_refused(text):
    assert body_of_text(text, HALVES) is None


@pytest.mark.parametrize("text", HALVES_KEPT.values(), ids=HALVES_KEPT)
def test_names_that_nobody_reads_may_go(text):
    assert ".chunk" not in body_of_text(text, HALVES)


def test_a_rewrite_says_what_it_does_not_bind():
    with pytest.raises(ValueError, match="put uses UP, which find does not bind"):
        Rewrite("self.ACT(GATE)", "self.ACT(GATE, UP)")


# What a rewritten function keeps


def act(gate, up=None):
    return gate if up is None else (gate, up)


class Base:
    act = staticmethod(act)

    def prepared(self, x):
        return x


SCALE = [1]


def noted(function):
    @functools.wraps(function)
    def wrapper(self, *args, **options):
        self.calls.append(function.__name__)
        return function(self, *args, **options)

    return wrapper


def under(scope):
    return lambda function: scope(noted(function))


class Block(Base):
    __offset = 3

    def __init__(self):
        self.calls = []

    def with_super(self, x):
        return self.act(super().prepared(x)) * 2

    def with_class(self, x):
        return self.act(__class__.__name__) * x

    def with_private_names(self, x):
        return self.act(self.__offset) * x

    def with_defaults(self, x, y=SCALE, *, z=SCALE, w):
        """Its documentation."""
        return self.act(x) * (y, z, w)

    @noted
    def decorated(self, x):
        return self.act(x) * 2

    @noted
    @torch.no_grad()
    @noted
    def thrice_decorated(self, x):
        return self.act(torch.is_grad_enabled()) * x

    def that_fails(self, x):
        y = self.act(x)
        return (
            self.act(y) * y.missing  # here
        )

    def with_comprehension(self, x):
        return [self.act(each) * x for each in x]

    def annotated(self, x: "int" = 1) -> "tuple":
        return self.act(x) * 2

    annotated.mark = "mine"


def written(name):
    original = getattr(Block, name)
    return original, trees.match(original, PRODUCT).written("_")


def closed_over(factor):
    class Inner(Block):
        def forward(self, x):
            return self.act(super().prepared(x)) * factor

    return Inner


def test_super_class_and_private_names_stay_what_they_were():
    assert written("with_super")[1](Block(), 5) == (5, 2)
    assert written("with_class")[1](Block(), 5) == ("Block", 5)
    assert written("with_private_names")[1](Block(), 5) == (3, 5)
    assert written("with_comprehension")[1](Block(), [5, 6]) == [(5, [5, 6]), (6, [5, 6])]


def test_each_closure_keeps_its_own_cells():
    for factor in (2, 3):
        inner = closed_over(factor)
        function = trees.match(inner.forward, PRODUCT).written("_")
        assert function(inner(), 5) == (5, factor)
        assert (
            function.__closure__[function.__code__.co_freevars.index("factor")]
            is (inner.forward.__closure__[inner.forward.__code__.co_freevars.index("factor")])
        )


def test_defaults_are_the_very_objects():
    original, function = written("with_defaults")
    x, (y, z, w) = function(Block(), 1, w=2)
    assert (x, w) == (1, 2)
    assert y is z is SCALE
    assert function.__kwdefaults__ == {"z": SCALE}
    assert function.__doc__ == original.__doc__ == "Its documentation."
    with pytest.raises(TypeError, match="w"):
        function(Block(), 1)


def test_a_function_keeps_its_names_annotations_and_attributes():
    original, function = written("annotated")
    for name in ("__name__", "__qualname__", "__module__", "__annotations__", "__globals__", "__dict__"):
        assert getattr(function, name) == getattr(original, name), name
    assert function.mark == "mine"


def test_decorators_stay_around_it_in_their_order():
    block = Block()
    assert written("decorated")[1](block, 5) == (5, 2)
    assert block.calls == ["decorated"]
    original, function = written("thrice_decorated")
    assert function(block, 5) == (False, 5)
    assert block.calls[1:] == ["thrice_decorated"] * 2
    assert function.__wrapped__.__wrapped__.__wrapped__ is not original.__wrapped__.__wrapped__.__wrapped__
    # The original is as it was, and calls its activation with one argument.
    assert original(block, 5) == 0


class Decorator:
    """A decorator that is no function."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance, owner):
        return self if instance is None else functools.partial(self.function, instance)


def from_a_list(function):
    held = [function]

    @functools.wraps(function)
    def wrapper(*args):
        return held[0](*args)

    return wrapper


@pytest.mark.parametrize("decorator", [Decorator, from_a_list, functools.lru_cache], ids=lambda each: each.__name__)
def test_decorators_that_hold_the_function_out_of_reach_are_refused(decorator):
    class Decorated(Base):
        @decorator
        def forward(self, x):
            return self.act(x) * 2

    assert fingerprint_of(Decorated.forward) is not None
    assert trees.match(Decorated.forward, PRODUCT) is None


def test_a_traceback_shows_the_line_of_the_original():
    with pytest.raises(AttributeError) as caught:
        written("that_fails")[1](Block(), 5)
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert frame.filename == str(Path(__file__))
    assert frame.name == "that_fails"
    assert frame.lineno == next(
        number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("y.missing  # here")
    )


def test_functions_without_a_source_match_nothing():
    assert trees.match(torch.nn.Module.__call__, PRODUCT) is None
    assert trees.match(len, PRODUCT) is None
