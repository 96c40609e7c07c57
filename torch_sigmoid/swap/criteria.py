"""Focal losses that a model of transformers computes in a function of its own, `model.loss_function`.

That function makes a criterion, a module that lives as long as the call, whose method calls the focal loss.
"""

import types
from typing import Any

import torch

from .functions import Function, runs_its_source
from .gates import FusedGate
from .trees import Rewrite, fingerprint_of, match, remembered

# The method of a criterion that is known, and its rewrite.
METHOD, KNOWN = "loss_labels", ("3802891fcb38e3c8",)
REWRITE = Rewrite("detr_focal_loss", "self.FUSED")
_NAME = "_fused_detr_focal_loss"
# Where a model keeps the loss function that somebody had set before.
RECORD = "_replaced_loss"


# Not remembered: somebody may put another method on the criterion at any time.
def _criterion_of(function: Function) -> str | None:
    """The name of the known criterion among the globals that a loss function uses."""
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    names: tuple[str, ...] = getattr(getattr(function, "__code__", None), "co_names", ())
    for name in names:
        candidate = scope.get(name)
        if isinstance(candidate, type) and issubclass(candidate, torch.nn.Module):
            method = getattr(candidate, METHOD, None)
            if method is not None and fingerprint_of(method) in KNOWN and runs_its_source(method):
                return name
    return None


class FocalLossFunction:
    """A loss function of transformers that computes its focal loss by ours. Called as the original is."""

    def __init__(self, original: Function) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original: Any = self.original
        name = _criterion_of(original)
        if name is None:
            return original(*args, **kwargs)
        criterion = original.__globals__[name]
        scope = original.__globals__ | {name: _rewritten(criterion, getattr(criterion, METHOD))}
        function = types.FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
        function.__kwdefaults__ = original.__kwdefaults__
        return function(*args, **kwargs)


@remembered
def _rewritten(criterion: type[torch.nn.Module], method: Function) -> type[torch.nn.Module]:
    found = match(method, REWRITE)
    assert found is not None
    return type(criterion.__name__, (criterion,), {METHOD: found.written(_NAME), _NAME: FusedGate("detr_focal_loss")})


def replace(model: torch.nn.Module) -> None:
    """Have a model that computes a known loss compute it by ours."""
    if not isinstance(getattr(type(model), "loss_function", None), property) or RECORD in model.__dict__:
        return
    # Asked for a loss that a model does not have, transformers warns.
    function = model.loss_function if getattr(model, "loss_type", None) or "_loss_function" in model.__dict__ else None
    if isinstance(function, types.FunctionType) and _criterion_of(function) is not None:
        model.__dict__[RECORD] = model.__dict__.get("_loss_function")
        model.__dict__["_loss_function"] = FocalLossFunction(function)


def restore(model: torch.nn.Module) -> None:
    """Undo `replace`."""
    if RECORD in model.__dict__:
        before = model.__dict__.pop(RECORD)
        del model.__dict__["_loss_function"]
        if before is not None:
            model.__dict__["_loss_function"] = before
