"""Ours in place of the functions that a model calls."""

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checks import check_save
from ..dispatch import Save
from ..functional import sigmoid, sigmoid_
from ..internals import function_modes, saved_tensor_hooks
from ..operators import OPERATORS

if TYPE_CHECKING:
    from typing_extensions import Self


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

    Example:
        >>> x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
        >>> with torch_sigmoid.intercept(save="input"):
        ...     y = torch.sigmoid(x)
        >>> y.backward()
        >>> round(x.grad.item(), 7)
        0.0003357
    """

    if TYPE_CHECKING:
        # torch's have no types.
        def __enter__(self) -> Self: ...
        def __exit__(self, *exception: object) -> None: ...

    def __init__(self, *, save: Save = "output") -> None:
        check_save(save)
        super().__init__()
        self.save: Save = save

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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

    def _save_now(self) -> Save:
        if torch.compiler.is_compiling() or self.save == "output":
            return self.save
        if saved_tensor_hooks():
            warnings.warn(
                'intercept(save="input") saves the output under checkpointing and other saved-tensor hooks; '
                "use torch_sigmoid.replace to save the input there",
                stacklevel=4,
            )
            return "output"
        return self.save


def intercepted_save() -> Save | None:
    """The `save` of the intercept around this call; None where there is none."""
    modes = [mode for mode in function_modes() if isinstance(mode, intercept)]
    return modes[-1].save if modes else None


class _Nesting(threading.local):
    """Whether an inner `intercept` has taken the call, whose own torch.sigmoid an outer one must let through."""

    # Not on the class: torch.compile guards on where it finds the attribute, which the first call would set on the instance.
    def __init__(self) -> None:
        self.handled = False


_nesting = _Nesting()
_SIGMOIDS = OPERATORS["sigmoid"].torch_functions
_SIGMOIDS_INPLACE = (torch.sigmoid_, Tensor.sigmoid_)
_OTHERS = {
    theirs: row.cases[""].function for row in OPERATORS.values() if row.family != "sigmoid" for theirs in row.torch_functions
}
_COVERED = frozenset((*_SIGMOIDS, *_SIGMOIDS_INPLACE, *_OTHERS))
