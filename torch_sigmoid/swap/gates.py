"""What stands in a fused block where its gate was computed: modules, which hooks and a GradientWatch can see.

An activation that is multiplied with something stays the module that it was, under its name, and takes the other factor as a
second argument. Where a block computes its gate without a module, one is put beside its children, where neither
`named_modules` nor a state_dict finds it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import functional as ours
from .. import nn

# A layer of this package, with its options, and the tensors that it is called with.
Call = tuple[torch.nn.Module, tuple[Tensor, ...]]


class GatedSiLU(nn.SiLU):
    """silu(gate)·up, called with both or with the packed tensor that they are the halves of; of one tensor it is silu."""

    # For `warmup`.
    operators: ClassVar[tuple[str, ...]] = ("silu", "swiglu", "swiglu_packed")

    def forward(self, input: Tensor, up: Tensor | None = None, *, packed_dim: int | None = None) -> Tensor:
        if packed_dim is not None:
            return ours.swiglu_packed(input, packed_dim)
        return super().forward(input) if up is None else ours.swiglu(input, up)

    def layer_of(self, input: Tensor, up: Tensor | None = None, *, packed_dim: int | None = None) -> Call:
        """The layer that a call comes to."""
        if packed_dim is not None:
            return nn.SwiGLUPacked(packed_dim), (input,)
        return (nn.SiLU(), (input,)) if up is None else (nn.SwiGLU(), (input, up))


class GatedSigmoid(nn.Sigmoid):
    """operand·σ(gate), called with gate and operand or with a packed tensor, its halves operand and gate; of one tensor σ."""

    operators: ClassVar[tuple[str, ...]] = ("sigmoid", "sigmoid_gate", "glu")

    def forward(self, input: Tensor, operand: Tensor | None = None, *, packed_dim: int | None = None) -> Tensor:
        if packed_dim is not None:
            return ours.glu(input, packed_dim)
        return super().forward(input) if operand is None else ours.sigmoid_gate(operand, input)

    def layer_of(self, input: Tensor, operand: Tensor | None = None, *, packed_dim: int | None = None) -> Call:
        """The layer that a call comes to."""
        if packed_dim is not None:
            return nn.GLU(packed_dim), (input,)
        return (nn.Sigmoid(save=self.save), (input,)) if operand is None else (nn.SigmoidGate(), (operand, input))


GATED: dict[str, type[torch.nn.Module]] = {"silu": GatedSiLU, "sigmoid": GatedSigmoid}


class FusedGate(torch.nn.Module):
    """A function of this package in the place of what a block computed inline."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    @property
    def operators(self) -> tuple[str, ...]:
        return ("sigmoid_focal_loss" if self.function == "detr_focal_loss" else self.function,)

    def __call__(self, *args: Any, **options: Any) -> Any:
        # A tracer of fx knows the modules of a model by their names, and this one has none: it records the function.
        traced = any(isinstance(each, torch.fx.Proxy) for each in args)
        return self.forward(*args, **options) if traced else super().__call__(*args, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        return FUNCTIONS[self.function](*args, **options)

    def layer_of(self, *args: Any, **options: Any) -> Call | None:
        """The layer that a call comes to; None of a loss."""
        if self.function not in _LAYERS:
            return None
        layer, n_tensors = _LAYERS[self.function]
        return layer(*args[n_tensors:], **options), args[:n_tensors]

    def extra_repr(self) -> str:
        return self.function


def detr_focal_loss(inputs: Tensor, targets: Tensor, num_boxes: Any, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    """Focal loss as the DETR family sums it up: the mean of each query's, over the number of boxes."""
    loss = ours.sigmoid_focal_loss(inputs, targets, alpha if alpha >= 0 else -1, gamma).mean(1).sum()
    return torch.div(loss, num_boxes)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "swiglu": ours.swiglu,
    "swiglu_packed": ours.swiglu_packed,
    "sigmoid_gate": ours.sigmoid_gate,
    "sigmoid_focal_loss": ours.sigmoid_focal_loss,
    "siglip_loss": ours.siglip_loss,
    "detr_focal_loss": detr_focal_loss,
}

# The layers of those that are gates, and how many tensors they take.
_LAYERS: dict[str, tuple[type[torch.nn.Module], int]] = {
    "swiglu": (nn.SwiGLU, 2),
    "swiglu_packed": (nn.SwiGLUPacked, 1),
    "sigmoid_gate": (nn.SigmoidGate, 2),
}
