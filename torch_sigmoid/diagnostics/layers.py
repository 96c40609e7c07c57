"""Finds the modules to watch, and knows of each its derivative and when its backward loses a gradient."""

import fnmatch
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..internals import is_compiled
from ..operators import OPERATORS, Gate, Watched
from ..swap.gates import FusedGate, GatedSigmoid, GatedSiLU
from ..swap.intercept import intercepted_save
from .gradients import is_readable

SIGMOID_LIKE: tuple[type[torch.nn.Module], ...] = (
    *(row.torch_module or row.module for row in OPERATORS.values() if row.watched),
    FusedGate,
    torch.nn.Hardsigmoid,
    torch.nn.Tanh,
    torch.nn.ReLU,
)
"""The types of modules that a `GradientWatch` watches by default; `modules=(*SIGMOID_LIKE, MyGate)` adds to them."""


class Known(NamedTuple):
    """f'(x) = kind'(scale·x), with `kind` among statistics.KINDS, and when a backward returns 0 in its place (LOST_WHEN).

    `kind` is None where nothing is known of the derivative: then only the norms of gradients are taken.
    """

    kind: str | None
    scale: float
    lost_when: str


_UNKNOWN = Known(None, 1.0, "never")
# What there is beside the operators of this package.
_OTHERS: dict[type[torch.nn.Module], Watched] = {
    torch.nn.Hardsigmoid: Watched("hardsigmoid", "never"),
    torch.nn.Tanh: Watched("tanh", "tanh rounds to ±1"),
    torch.nn.ReLU: Watched("relu", "never"),
}
# A subclass computes what its `forward` computes: one that brings its own is unknown.
_TORCHS_FORWARDS: dict[Any, Watched] = {
    **{module_type.forward: row for module_type, row in _OTHERS.items()},
    **{row.torch_module.forward: row.watched for row in OPERATORS.values() if row.watched and row.torch_module},
}
_OUR_FORWARDS: dict[Any, Watched | None] = {
    **{row.module.forward: row.watched for row in OPERATORS.values() if row.watched},
    **{gated.forward: OPERATORS[name].watched for name, gated in (("silu", GatedSiLU), ("sigmoid", GatedSigmoid))},
}
# What `replace` puts into fused blocks: each call comes to a layer of this package.
_FUSED = frozenset((GatedSiLU.forward, GatedSigmoid.forward, FusedGate.forward))


def _row(module: torch.nn.Module) -> Watched | None:
    """Look up a module by the type whose `forward` it runs."""
    forward = type(module).forward
    if isinstance(module, FusedGate):
        return OPERATORS[module.function].watched if module.function in OPERATORS else None
    return _OUR_FORWARDS.get(forward) or _TORCHS_FORWARDS.get(forward)


def known(module: torch.nn.Module) -> Known:
    """What is known of a module's calls; where they bring its options, of a call with none."""
    row = _row(module)
    if row is None:
        return _UNKNOWN
    lost = row.lost_by_torch if type(module).forward in _TORCHS_FORWARDS else row.lost
    return Known(row.kind, 1.0 if type(module).forward in _FUSED else row.scale(module), lost)


class Call(NamedTuple):
    """What is known of a call, what it applies its activation to, and whether it multiplies another tensor with that."""

    known: Known
    gate: Gate
    has_operand: bool

    @property
    def x(self) -> Tensor:
        """As (outer, units, inner)."""
        return units_in_the_middle(self.gate.x, self.gate.dim)


def call_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What a call is; None of an unknown module, of an empty input, and where the module is about to refuse the call."""
    layer: Any = module
    try:
        if type(module).forward in _FUSED:
            layer, args = layer.layer_of(*args, **kwargs)
            kwargs = {}
        row = _row(layer)
        if row is None or not all(map(is_readable, (*args, *kwargs.values()))):
            return None
        gate = row.gate(layer, *args, **kwargs)
    except (TypeError, ValueError, IndexError):
        # The module will say what is wrong, in its own words.
        return None
    if gate is None or not gate.x.numel():
        return None
    about = known(layer)
    return Call(about._replace(lost_when=_lost_when(about, layer, gate.x)), gate, len(args) + len(kwargs) > 1)


class Layer(NamedTuple):
    """A watched module, which the watch does not keep alive."""

    index: int  # type: ignore[assignment]  # not tuple's method
    name: str
    module: weakref.ref[torch.nn.Module]
    known: Known

    @property
    def type_name(self) -> str:
        module = self.module()
        return self.known.kind or "?" if module is None else type(module).__name__


def _lost_when(about: Known, module: torch.nn.Module, x: Tensor) -> str:
    """When this call's backward will return 0, as a key of LOST_WHEN.

    Usually the row of the module's type says it; `save`, an `intercept` around the call and the device can change it.
    """
    forward = type(module).forward
    save = intercepted_save()
    if getattr(module, "save", save if forward is torch.nn.Sigmoid.forward else None) == "input":
        return "never"
    if save is not None and forward in (torch.nn.SiLU.forward, torch.nn.GLU.forward):
        # `intercept` runs our operator in place of torch's, and ours saves the input.
        return "never"
    if forward is torch.nn.GLU.forward and x.device.type == "cuda":
        # There torch's backward computes σ from the gate, in fp32; elsewhere in the tensor's dtype.
        return "sigmoid rounds to 1 in fp32"
    return about.lost_when


def units_in_the_middle(x: Tensor, dim: int | None = None) -> Tensor:
    """Reshape x to (outer, units, inner), with the units along `dim` where that is given.

    Otherwise a unit is a feature of the last dimension, or a channel (dimension 1) of an input with four dimensions or more.
    """
    if dim is not None:
        dim %= x.ndim
        return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
    if x.ndim >= 4:
        # A channels-last tensor becomes rows of channels, without a copy.
        return x.flatten(2) if x.is_contiguous() else x.movedim(1, -1).reshape(-1, x.shape[1])[..., None]
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)[..., None]


def find(model: torch.nn.Module, modules: Iterable[type | str] | type | str | None) -> list[Layer]:
    """The layers of `model` to watch, in its order; a module with several names comes once, under the first.

    Warns of those inside modules compiled by torch.compile, where no hook can see.
    """
    types, patterns = _chosen(modules)
    everything = list(_named_modules(model))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in everything):
            raise ValueError(
                f"GradientWatch(): no module is named {pattern!r}; there are {_some(name for name, _ in everything if name)}"
            )
    found = [
        (name, module)
        for name, module in everything
        if isinstance(module, types) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not found:
        expected = ", ".join(each.__name__ for each in types)
        raise ValueError(f"GradientWatch(): {type(model).__name__} has no layer to watch; expected one of {expected}")
    compiled = [name for name, module in everything if is_compiled(module)]
    inside = [
        name for name, _ in found if any(name == outer or not outer or name.startswith(outer + ".") for outer in compiled)
    ]
    if len(inside) == len(found):
        raise ValueError(
            "GradientWatch(): all of the layers to watch are inside modules compiled by torch.compile, where no hook can see; "
            "expected the model before it is compiled, run as it is"
        )
    if inside:
        warnings.warn(
            f"GradientWatch cannot see into modules compiled by torch.compile; not watched: {_some(inside)}", stacklevel=3
        )
    # The model itself has no name: it gets its type's, unless a layer is called so.
    root = type(model).__name__ if all(name != type(model).__name__ for name, _ in found) else "(root)"
    return [
        Layer(index, name or root, weakref.ref(module), known(module))
        for index, (name, module) in enumerate((name, module) for name, module in found if name not in inside)
    ]


def _named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules, and the gates that `replace` has put beside the children of a block, such as "layers.0.mlp.swiglu"."""
    for prefix, module in model.named_modules():
        yield prefix, module
        for attribute, gate in vars(module).items():
            if isinstance(gate, FusedGate) and _row(gate) is not None:
                name = attribute if hasattr(module, gate.function) else gate.function
                yield f"{prefix}.{name}" if prefix else name, gate


def _chosen(modules: Iterable[type | str] | type | str | None) -> tuple[tuple[type, ...], list[str]]:
    """The module types and the name patterns among `modules`."""
    if isinstance(modules, str | type):
        modules = (modules,)
    if isinstance(modules, torch.nn.Module) or not isinstance(modules, Iterable | None):
        raise TypeError(f"GradientWatch(): modules must hold module types and names, got {type(modules).__name__}")
    chosen = SIGMOID_LIKE if modules is None else tuple(modules)
    if not chosen:
        raise ValueError("GradientWatch(): modules is empty; expected module types or names, or None for SIGMOID_LIKE")
    for each in chosen:
        if not isinstance(each, str | type):
            raise TypeError(f"GradientWatch(): modules must hold module types and names, got {each!r}")
    return tuple(each for each in chosen if isinstance(each, type)), [each for each in chosen if isinstance(each, str)]


def _some(names: Iterable[str]) -> str:
    """The first eight names, quoted, and how many more there are."""
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
