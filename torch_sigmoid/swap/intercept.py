"""Ours in place of the functions that a model calls."""

import functools
import threading
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.nn.functional
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from ..checks import check_save
from ..dispatch import Save
from ..functional import binary_cross_entropy_with_logits, glu, sigmoid, sigmoid_, silu
from ..internals import (
    NN_NAMESPACE,
    function_modes,
    in_backward,
    saved_tensor_hooks,
    script_as,
    set_for_backward,
    set_of_backward,
)
from ..operators import OPERATORS
from . import focal
from .places import Places

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..losses import Reduction

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Function = Callable[..., Any]


class intercept(TorchFunctionMode):
    """A context under which torch's sigmoid is ours: `with torch_sigmoid.intercept(save="input"): loss = model(x)`.

    It covers torch.sigmoid, Tensor.sigmoid, torch.special.expit, torch.nn.functional.sigmoid and torch.nn.Sigmoid, and the
    in-place torch.sigmoid_ and Tensor.sigmoid_, which save σ under either `save`; silu, glu, logsigmoid and
    binary_cross_entropy_with_logits of torch.nn.functional, and their modules; and the `sigmoid_focal_loss` of torchvision and
    of transformers, if its source is a form that we know. Calls with `out=`, which have no gradient, stay torch's. Backward
    may run outside of it. It is a decorator too.

    While it is active in some thread, thin wrappers stand in the place of these functions: in torch, and in every module that
    has imported one by name or keeps it in a dictionary, such as {"silu": F.silu}. Other threads get torch's functions through
    them. When the last context ends, each place gets its own function back. A call of anything else costs the same inside as
    outside. The first entry searches the modules of the process (0.1 s for 3000), later ones take some 50 µs: enter around a
    training loop, not in each step.

    Limits:

    - A torch.sigmoid, torch.special.expit or F.logsigmoid that an object took before, as in `self.activation = torch.sigmoid`
      or a functools.partial, stays torch's. F.silu, F.glu and the other functions in Python are reached wherever they are
      held, but a focal loss only in modules: of one that is held elsewhere, σ and the cross entropy become ours.
    - F.silu inside is another object than F.silu outside. A model that holds the one cannot be pickled where the other is.
    - torch.compile compiles `torch.sigmoid(x)` and `F.silu(x)` anew for the inside of the context and for the outside, but not
      the method `x.sigmoid()`, which stays as it was at the first call.

    What `torch.utils.checkpoint` recomputes in a backward outside the context is torch's own sigmoid. With
    use_reentrant=False, and under other saved-tensor hooks, save="input" therefore gives way to "output" with a warning: σ
    would reach a backward that expects x. `replace` has no such limit.

    Args:
        save: as in `torch_sigmoid.sigmoid`.

    Raises:
        ValueError: `save` is neither "output" nor "input".

    Example:
        >>> x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
        >>> with torch_sigmoid.intercept(save="input"):
        ...     y = torch.sigmoid(x)
        >>> y.backward()
        >>> round(x.grad.item(), 7)
        0.0003357
    """

    def __init__(self, *, save: Save = "output") -> None:
        check_save(save)
        super().__init__()
        self.save: Save = save

    def __call__(self, function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        save = self.save

        @functools.wraps(function)
        def intercepted(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            # A new one, which torch.compile can trace.
            with intercept(save=save):
                return function(*args, **kwargs)

        return intercepted

    def __enter__(self) -> "Self":
        if is_compiling():
            # A trace cannot replace attributes, and there a mode costs nothing. (By name: Dynamo would compile a method that
            # mentions torch, for itself.)
            super().__enter__()  # type: ignore[no-untyped-call]
        else:
            _places.occupy()
            _thread.saves.append(self.save)
            set_for_backward(_thread.saves)
        return self

    def __exit__(self, *exception: object) -> None:
        if is_compiling():
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        else:
            _thread.saves.pop()
            _places.vacate()

    def __torch_function__(
        self, func: _Function, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Only torch.compile comes here.
        if func in _OURS:
            return _call(func, _OURS[func], args, kwargs or {}, self.save)
        return func(*args, **(kwargs or {}))


class _Thread(threading.local):
    """The `save` of each intercept that this thread has entered, and of the call that ours is computing, if it is."""

    # Not on the class: torch.compile guards on where it finds the attribute, which the first call would set on the instance.
    def __init__(self) -> None:
        self.saves: list[Save] = []
        self.computing: Save | None = None


_thread = _Thread()


def intercepted_save() -> Save | None:
    """The `save` of the intercept around this call; None where there is none."""
    saves = _thread.saves
    if is_compiling():
        saves = [*saves, *(mode.save for mode in function_modes() if isinstance(mode, intercept))]
    elif not saves and in_backward():
        # A GPU's backward runs in a thread of its own.
        saves = set_of_backward()
    return saves[-1] if saves else None


def _call(theirs: _Function, ours: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], save: Save | None = None) -> Any:
    """Ours, unless no intercept surrounds the call, or it comes from ours, or has an `out`."""
    if _thread.computing or not (save := save or intercepted_save()) or kwargs.get("out") is not None:
        return theirs(*args, **kwargs)
    _thread.computing = save
    try:
        return ours(*args, **kwargs)
    finally:
        _thread.computing = None


def _wrapped(theirs: _Function, ours: _Function) -> _Function:
    """What stands in the place of `theirs`."""
    call = _call  # for a wrapper that has other globals

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(theirs, ours, args, kwargs)

    if isinstance(theirs, types.FunctionType):
        # torch.jit.script compiles the source of `theirs`, and looks its names up in the wrapper's globals.
        wrapper = types.FunctionType(wrapper.__code__, theirs.__globals__, theirs.__name__, None, wrapper.__closure__)
    else:
        script_as(wrapper, theirs)
    return functools.wraps(theirs)(wrapper)


def _save_now() -> Save:
    save = _thread.computing or "output"
    if not is_compiling() and save == "input" and saved_tensor_hooks():
        warnings.warn(
            'intercept(save="input") saves the output under checkpointing and other saved-tensor hooks; '
            "use torch_sigmoid.replace to save the input there",
            stacklevel=5,
        )
        return "output"
    return save


def _sigmoid(input: Tensor, *, out: None = None) -> Tensor:
    return sigmoid(input, save=_save_now())


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """torch.binary_cross_entropy_with_logits, which torch.nn.functional's ends in."""
    names: tuple[Reduction, ...] = "none", "mean", "sum"
    return binary_cross_entropy_with_logits(input, target, weight, reduction=names[reduction], pos_weight=pos_weight)


_OURS: dict[_Function, _Function] = {
    **{theirs: row.cases[""].function for row in OPERATORS.values() for theirs in row.torch_functions},
    **dict.fromkeys(OPERATORS["sigmoid"].torch_functions, _sigmoid),
    torch.sigmoid_: sigmoid_,
    Tensor.sigmoid_: sigmoid_,
    # Where torch.nn.functional's end, which a module may hold as an attribute.
    NN_NAMESPACE["silu"]: silu,
    NN_NAMESPACE["silu_"]: functools.partial(silu, inplace=True),
    NN_NAMESPACE["glu"]: glu,
    torch.binary_cross_entropy_with_logits: _cross_entropy,
}


def _focal_loss_of(module: types.ModuleType) -> tuple[_Function, _Function] | None:
    """The focal loss that a library's module defines, and what stands in its place; None where we do not know its form."""
    theirs = vars(module).get(focal.NAME)
    if not isinstance(theirs, types.FunctionType) or (ours := focal.form_of(theirs)) is None:
        return None
    return theirs, _wrapped(theirs, functools.partial(ours, theirs))


_places = Places(
    {theirs: _wrapped(theirs, ours) for theirs, ours in _OURS.items()},
    hidden=[NN_NAMESPACE],
    later=dict.fromkeys(focal.LIBRARIES, _focal_loss_of),
)
