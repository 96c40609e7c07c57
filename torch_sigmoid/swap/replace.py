"""Ours in place of torch's modules, by their class."""

from collections.abc import Iterator
from typing import TypeVar

import torch

from .. import nn
from ..checks import check_save
from ..dispatch import Save
from ..operators import OPERATORS

_OURS = {row.torch_module: row.module for row in OPERATORS.values() if row.torch_module}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_Model = TypeVar("_Model", bound=torch.nn.Module)


def replace(model: _Model, *, save: Save = "output") -> _Model:
    """Make each `torch.nn.Sigmoid`, `SiLU`, `GLU`, `LogSigmoid` and `BCEWithLogitsLoss` in `model` ours, in place.

    The module objects stay the same and only change their class: names, hooks, training flag, sharing between parents and
    references from outside are untouched, and `model` itself may be one. Subclasses of torch's modules are left alone, and
    so are direct calls such as `F.silu(x)`, for which there is `intercept`. A second call changes the `save` of what the
    first has replaced.

    Args:
        model: any module.
        save: as in `torch_sigmoid.Sigmoid`; the others save their input.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `save` is neither "output" nor "input".

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid())
        >>> torch_sigmoid.replace(model, save="input")[1]
        Sigmoid(save='input')
    """
    check_save(save)
    for module in _modules(model, "replace"):
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
            module.__dict__["_replaced"] = True
        if type(module) is nn.Sigmoid and getattr(module, "_replaced", False):
            module.save = save
    return model


def restore(model: _Model) -> _Model:
    """Undo `replace`: the modules it changed are torch's again. Returns `model`.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> torch_sigmoid.restore(torch_sigmoid.replace(torch.nn.Sequential(torch.nn.Sigmoid())))
        Sequential(
          (0): Sigmoid()
        )
    """
    for module in _modules(model, "restore"):
        if type(module) in _THEIRS and module.__dict__.pop("_replaced", False):
            module.__dict__.pop("save", None)
            module.__class__ = _THEIRS[type(module)]
    return model


def _modules(model: torch.nn.Module, caller: str) -> Iterator[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}(): model must be a torch.nn.Module, got {type(model).__name__}")
    return model.modules()
