"""Finds the modules to watch, and knows of each its derivative and when its backward loses a gradient."""

import fnmatch
import math
import warnings
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..internals import is_compiled
from ..operators import OPERATORS
from ..swap.intercept import intercepted_save

# Watched by default; `modules=(*SIGMOID_LIKE, MyGate)` adds to them.
SIGMOID_LIKE: tuple[type[torch.nn.Module], ...] = (
    *(row.torch_module or row.module for row in OPERATORS.values() if row.watched),
    torch.nn.Hardsigmoid,
    torch.nn.Tanh,
    torch.nn.ReLU,
)


class Known(NamedTuple):
    """f'(x) = kind'(scale·x), with `kind` among statistics.KINDS, and when a backward returns 0 in its place (LOST_WHEN).

    `kind` is None where nothing is known of the derivative: then only the norms of gradients are taken.
    """

    kind: str | None
    scale: float
    lost_when: str


_UNKNOWN = Known(None, 1.0, "never")
# What there is beside the operators of this package.
_OTHERS: dict[type[torch.nn.Module], Known] = {
    torch.nn.Hardsigmoid: Known("hardsigmoid", 1.0, "never"),
    torch.nn.Tanh: Known("tanh", 1.0, "tanh rounds to ±1"),
    torch.nn.ReLU: Known("relu", 1.0, "never"),
}
# A subclass computes what its `forward` computes: one that brings its own is unknown.
_OTHER_FORWARDS = {module_type.forward: row for module_type, row in _OTHERS.items()}
_OUR_FORWARDS = {row.module.forward: row.watched for row in OPERATORS.values() if row.watched}
_TORCHS_FORWARDS = {row.torch_module.forward: row.watched for row in OPERATORS.values() if row.watched and row.torch_module}


def known(module: torch.nn.Module) -> Known:
    """Look up a module by the type whose `forward` it runs."""
    forward = type(module).forward
    if watched := _OUR_FORWARDS.get(forward):
        return Known(watched.kind, watched.scale(module), watched.lost)
    if watched := _TORCHS_FORWARDS.get(forward):
        return Known(watched.kind, watched.scale(module), watched.lost_by_torch)
    return _OTHER_FORWARDS.get(forward, _UNKNOWN)


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


def lost_when(layer: Layer, module: torch.nn.Module, x: Tensor) -> str:
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
    return layer.known.lost_when


def activated(module: torch.nn.Module, x: Tensor) -> Tensor | None:
    """Select the x that the activation is applied to, as (outer, units, inner): the whole input, or the gate of a GLU.

    A unit is a feature of the last dimension, or a channel (dimension 1) of an input with four dimensions or more.
    None where there is nothing to count: an empty input, or one that the module is about to refuse.
    """
    dim = None
    if isinstance(module, torch.nn.GLU):
        dim = module.dim
        if x.dim() == 0 or x.size(dim) % 2:
            return None
        x = x.chunk(2, dim)[1]
    return units_in_the_middle(x, dim) if x.numel() else None


def units_in_the_middle(x: Tensor, dim: int | None = None) -> Tensor:
    """Reshape x to (outer, units, inner), with the units along `dim` where that is given."""
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
    everything = list(model.named_modules())
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
