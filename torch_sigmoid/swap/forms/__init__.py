"""The known forms: how libraries write the gates, losses and activations that this package has operators for.

Each library has a file here, which says what its code looks like and in which versions that was seen. `register` adds others.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..functions import Function, runs_its_source
from ..gates import FUNCTIONS
from ..trees import Rewrite, fingerprint_of

Known = tuple["str | Function", ...]


def _fingerprints(known: Known, whose: str) -> frozenset[str]:
    found = {each: fingerprint_of(each) for each in known}
    for each, value in found.items():
        if value is None:
            raise ValueError(
                f"{whose}: expected functions whose source can be read, their texts, or fingerprints, got {each!r}"
            )
    return frozenset(filter(None, found.values()))


@dataclass(frozen=True)
class Form:
    r"""A block whose method is known, and how it reads with an operator of this package.

    A module is of this form if the syntax tree of its `method` is among `known`, names of locals, comments, annotations and
    line breaks aside, and if what `self.ACT` stands for in the rewrite is a known `activation`. Nothing else counts: what
    differs by one operator is left alone.

    Args:
        name: what it is, for the report.
        library: whose code it is.
        versions: in which it was seen.
        known: the methods that are known: functions, their source texts, or fingerprints as `fingerprint_of` makes them.
        rewrites: what becomes of them; the first one that fits is taken. See `Rewrite`.
        method: which method is rewritten.
        activation: "silu" or "sigmoid" where the rewrite gives `self.ACT` a second argument.
        fused: where the rewrite calls `self.FUSED`, the function of this package that it calls.
        besides: other methods of the class, with what is known of them; they stay as they are.
        forward: a method of our own to take the known one's place, instead of rewrites.
        gate: with `forward`, the attribute that holds the activation.

    Raises:
        TypeError: `known`, `rewrites` or `besides` is not a tuple.
        ValueError: nothing is known, there is neither a rewrite nor a method in its place, or a rewrite puts `self.FUSED` or
            `self.ACT` without `fused` or `activation`.

    Example:
        >>> from torch_sigmoid.swap import Form, Rewrite
        >>> text = "def forward(self, x, gate):\n    return x * torch.sigmoid(gate)"
        >>> rewrite = Rewrite("A * sigmoid(GATE)", "self.FUSED(A, GATE)")
        >>> Form("my gate", "mine", "1.0", (text,), (rewrite,), fused="sigmoid_gate").name
        'my gate'
    """

    name: str
    library: str
    versions: str
    known: Known
    rewrites: tuple[Rewrite, ...] = ()
    method: str = "forward"
    activation: str | None = None
    fused: str | None = None
    besides: tuple[tuple[str, Known], ...] = ()
    forward: Callable[..., Any] | None = None
    gate: str | None = None

    def __post_init__(self) -> None:
        for name in ("known", "rewrites", "besides"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"Form({self.name!r}): {name} must be a tuple, got {type(getattr(self, name)).__name__}")
        if not self.known:
            raise ValueError(f"Form({self.name!r}): known must hold at least one method, got none")
        if bool(self.rewrites) == (self.forward is not None):
            raise ValueError(f"Form({self.name!r}): expected either rewrites or a forward")
        if self.fused is not None and self.fused not in FUNCTIONS:
            raise ValueError(f"Form({self.name!r}): fused must be one of {', '.join(FUNCTIONS)}, got {self.fused!r}")
        for name, argument in (("FUSED", "fused"), ("ACT", "activation")):
            if getattr(self, argument) is None and any(name in rewrite.capitals for rewrite in self.rewrites):
                raise ValueError(f"Form({self.name!r}): a rewrite puts self.{name}; expected {argument} to say what that is")
        if self.activation not in (None, "silu", "sigmoid"):
            raise ValueError(f"Form({self.name!r}): activation must be 'silu', 'sigmoid' or None, got {self.activation!r}")
        _ = self.fingerprints

    @functools.cached_property
    def fingerprints(self) -> frozenset[str]:
        return _fingerprints(self.known, f"Form({self.name!r})")

    @functools.cached_property
    def fingerprints_besides(self) -> dict[str, frozenset[str]]:
        return {name: _fingerprints(known, self.name) for name, known in self.besides}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that must be known."""
        return self.method, *(name for name, _ in self.besides)

    def knows(self, module_type: type[Any]) -> bool:
        """Whether the methods of this type are known."""
        function = getattr(module_type, self.method, None)
        if function is None or fingerprint_of(function) not in self.fingerprints:
            return False
        besides = [(getattr(module_type, name, ""), known) for name, known in self.fingerprints_besides.items()]
        return all(fingerprint_of(method) in known for method, known in besides) and all(
            map(runs_its_source, (function, *(method for method, _ in besides)))
        )


@dataclass(frozen=True)
class Activation:
    """A class of activations that computes what `kind` does: "sigmoid", "silu", "quick_gelu", "glu" or "logsigmoid"."""

    kind: str
    library: str
    versions: str
    name: str
    known: Known

    @functools.cached_property
    def fingerprints(self) -> frozenset[str]:
        return _fingerprints(self.known, f"Activation({self.name!r})")

    def knows(self, module_type: type[Any]) -> bool:
        return (
            module_type.__name__ == self.name
            and module_type.__module__.split(".")[0] == self.library
            and fingerprint_of(module_type.forward) in self.fingerprints
            and runs_its_source(module_type.forward)
        )


# The library of code that is nobody's in particular.
BY_HAND = "written by hand"
_registered: list[Form] = []


@functools.cache
def _of_libraries() -> tuple[tuple[Form, ...], tuple[Activation, ...]]:
    from . import by_hand, diffusers, open_clip, timm, torchvision, transformers

    files = transformers, timm, torchvision, diffusers, open_clip, by_hand
    return tuple(form for file in files for form in file.FORMS), tuple(each for file in files for each in file.ACTIVATIONS)


def forms() -> tuple[Form, ...]:
    """All known forms, those that were registered last first."""
    return (*reversed(_registered), *_of_libraries()[0])


def activations() -> tuple[Activation, ...]:
    return _of_libraries()[1]


def register(form: Form) -> Form:
    r"""Have `replace` know one more form, from now on. Returns it.

    Args:
        form: a `torch_sigmoid.swap.Form`, whose rewrites are `torch_sigmoid.swap.Rewrite`; `unregister` there undoes this.

    Raises:
        TypeError: not a Form.
        ValueError: it is registered already, or another form knows the same method.

    Example:
        >>> from torch_sigmoid.swap import Form, Rewrite, register, unregister
        >>> text = "def forward(self, x):\n    return self.out(self.act(self.gate(x)) * self.up(x))"
        >>> rewrite = Rewrite("self.ACT(GATE) * UP", "self.ACT(GATE, UP)")
        >>> form = register(Form("my MLP", "mine", "1.0", (text,), (rewrite,), activation="silu"))
        >>> unregister(form)
    """
    if not isinstance(form, Form):
        raise TypeError(f"register(): form must be a torch_sigmoid.swap.Form, got {type(form).__name__}")
    for other in forms():
        common = form.fingerprints & other.fingerprints if form.method == other.method else frozenset()
        if common and form.activation == other.activation:
            raise ValueError(
                f"register(): {form.name!r} knows a {form.method} that {other.name!r} of {other.library} knows already"
            )
    _registered.append(form)
    return form


def unregister(form: Form) -> None:
    r"""Undo `register`: `replace` does not know the form any more. Models replaced before stay as they are.

    Args:
        form: what `register` returned.

    Raises:
        ValueError: it is not registered.

    Example:
        >>> from torch_sigmoid.swap import Form, Rewrite, register, unregister
        >>> text = "def forward(self, x):\n    return self.out(torch.sigmoid(self.gate(x)) * x)"
        >>> rewrite = Rewrite("sigmoid(GATE) * XS", "self.FUSED(XS, GATE)")
        >>> form = register(Form("my gate", "mine", "1.0", (text,), (rewrite,), fused="sigmoid_gate"))
        >>> unregister(form)
    """
    if form not in _registered:
        raise ValueError(f"unregister(): {getattr(form, 'name', form)!r} is not registered")
    _registered.remove(form)
