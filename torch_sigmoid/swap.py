"""Put ours where torch's stands, in a model that already exists."""

import threading
import warnings

import torch
import torch.nn.functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import nn
from .checks import check_save
from .functional import binary_cross_entropy_with_logits, glu, logsigmoid, sigmoid, sigmoid_, silu

__all__ = ["intercept", "replace", "restore"]

_OURS = {getattr(torch.nn, name): getattr(nn, name) for name in ("Sigmoid", "SiLU", "GLU", "LogSigmoid", "BCEWithLogitsLoss")}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def replace(model: torch.nn.Module, *, save: str = "output") -> torch.nn.Module:
    """Make each `torch.nn.Sigmoid`, `SiLU`, `GLU`, `LogSigmoid` and `BCEWithLogitsLoss` in `model` ours, in place.

    The module objects stay the same and only change their class: names, hooks, training flag, sharing between parents and
    references from outside are untouched, and `model` itself may be one. Subclasses of torch's modules are left alone.
    A second call changes the `save` of what the first has replaced.

    Args:
        model: any module.
        save: as in `torch_sigmoid.Sigmoid`; the others save their input.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `save` is neither "output" nor "input".
    """
    check_save(save)
    for module in _modules(model, "replace"):
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
            module._replaced = True
            if type(module) is nn.Sigmoid:
                module._mode = "output"
        if type(module) is nn.Sigmoid and getattr(module, "_replaced", False):
            module.save = save
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `replace`: the modules it changed are torch's again. Returns `model`."""
    for module in _modules(model, "restore"):
        if type(module) in _THEIRS and module.__dict__.pop("_replaced", False):
            module.__dict__.pop("_mode", None)
            module.__class__ = _THEIRS[type(module)]
    return model


def _modules(model, caller):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}(): model must be a torch.nn.Module, got {type(model).__name__}")
    return model.modules()


class intercept(TorchFunctionMode):
    """A context under which torch's sigmoid is ours: `with torch_sigmoid.intercept(save="input"): loss = model(x)`.

    It covers torch.sigmoid, Tensor.sigmoid, torch.special.expit, torch.nn.functional.sigmoid and torch.nn.Sigmoid, and the
    in-place torch.sigmoid_ and Tensor.sigmoid_, which save σ under either `save`; and silu, glu, logsigmoid and
    binary_cross_entropy_with_logits of torch.nn.functional, and their modules. Calls with `out=`, which have no gradient, stay
    torch's. Backward may run outside of it.

    What `torch.utils.checkpoint` recomputes in a backward outside the context is torch's own sigmoid. With
    use_reentrant=False, and under other saved-tensor hooks, save="input" therefore gives way to "output" with a warning: σ
    would reach a backward that expects x. `replace` has no such limit.

    Args:
        save: as in `torch_sigmoid.sigmoid`.

    Raises:
        ValueError: `save` is neither "output" nor "input".
    """

    def __init__(self, *, save: str = "output") -> None:
        check_save(save)
        super().__init__()
        self.save = save

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _nesting.handled or func not in _COVERED or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        _nesting.handled = True
        try:
            if func in _OTHERS:
                return _OTHERS[func](*args, **kwargs)
            return sigmoid(*args, **kwargs, save=self._save_now()) if func in _SIGMOIDS else sigmoid_(*args, **kwargs)
        finally:
            _nesting.handled = False

    def _save_now(self) -> str:
        if torch.compiler.is_compiling() or self.save == "output":
            return self.save
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            warnings.warn(
                'intercept(save="input") saves the output under checkpointing and other saved-tensor hooks; '
                "use torch_sigmoid.replace to save the input there",
                stacklevel=4,
            )
            return "output"
        return self.save


def intercepted_save() -> str | None:
    """The `save` of the intercept around this call; None where there is none."""
    modes = [mode for mode in torch.overrides._get_current_function_mode_stack() if isinstance(mode, intercept)]
    return modes[-1].save if modes else None


class _Nesting(threading.local):
    """Whether an inner `intercept` has taken the call, whose own torch.sigmoid an outer one must let through."""

    # Not on the class: torch.compile guards on where it finds the attribute, which the first call would set on the instance.
    def __init__(self) -> None:
        self.handled = False


_nesting = _Nesting()
_SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, torch.special.expit, torch.nn.functional.sigmoid)
_SIGMOIDS_INPLACE = (torch.sigmoid_, Tensor.sigmoid_)
_OTHERS = {
    torch.nn.functional.silu: silu,
    torch.nn.functional.glu: glu,
    torch.nn.functional.logsigmoid: logsigmoid,
    torch.nn.functional.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
}
_COVERED = frozenset((*_SIGMOIDS, *_SIGMOIDS_INPLACE, *_OTHERS))
