"""Layers for Hugging Face's `kernels`, which puts their forward in the place of that of a model's own layers.

    from kernels import Mode, kernelize, use_kernel_mapping

    with use_kernel_mapping(torch_sigmoid.layers.MAPPING):
        model = kernelize(model, mode=Mode.TRAINING)  # or INFERENCE, either with | Mode.TORCH_COMPILE

`kernelize` changes every layer whose class has one of the names below. `use_kernel_forward_from_hub("SiLU")` names the class
that it decorates; `replace_kernel_forward_from_hub(SomeClass, "SiLU")` names one from outside. transformers names its SiLU and
QuickGELU if it accepts the installed version of `kernels`, but none of its gated MLPs: for those of Llama call
`replace_kernel_forward_from_hub(LlamaMLP, "SwiGLUMLP")`. Nothing is downloaded.

    name         formula                             saved for backward
    Sigmoid      σ(x)                                σ(x)
    SiLU         x·σ(x)                              x
    QuickGELU    x·σ(1.702x)                         x
    SiluAndMul   silu(a)·b for the input's halves    the input
    SwiGLUMLP    down(silu(gate(x))·up(x))           gate(x), up(x), and what the three linear layers save

This module does not import `kernels`. Note that a checkout of this repository has a folder kernels/ of its own at its root. A
Python that starts there, or has the root in PYTHONPATH, finds this folder in place of Hugging Face's package.

`kernels` demands layers without a constructor or state: it binds the forward to a layer of another class, which may read only
what that one has. So `Sigmoid` has no options; for an exact gradient use `torch_sigmoid.replace(model, save="input")`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import functional, nn

__all__ = ["MAPPING", "InstalledLayerRepository", "QuickGELU", "SiLU", "Sigmoid", "SiluAndMul", "SwiGLUMLP"]


class _Layer(torch.nn.Module):
    can_torch_compile = True
    has_backward = True


class Sigmoid(_Layer):
    """σ(x), as `torch_sigmoid.sigmoid` with save="output".

    Example:
        >>> torch_sigmoid.layers.Sigmoid()(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class SiLU(_Layer):
    """x·σ(x), as `torch_sigmoid.silu`; written over the input if the layer has `inplace=True`, as `torch.nn.SiLU` may.

    Example:
        >>> torch_sigmoid.layers.SiLU()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        # getattr's default costs a raised AttributeError at every call.
        return functional.silu(input, vars(self).get("inplace", False))


class QuickGELU(_Layer):
    """x·σ(1.702x), as `torch_sigmoid.quick_gelu`.

    Example:
        >>> torch_sigmoid.layers.QuickGELU()(torch.tensor([0.0, 10.0]))
        tensor([ 0., 10.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class SiluAndMul(_Layer):
    """silu(a)·b for the halves a, b of the last dimension, as `torch_sigmoid.swiglu_packed`.

    Example:
        >>> torch_sigmoid.layers.SiluAndMul()(torch.tensor([100.0, 0.0, 3.0, 5.0]))  # a = [100, 0], b = [3, 5]
        tensor([300.,   0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.swiglu_packed(input)


class SwiGLUMLP(_Layer):
    """down_proj(silu(gate_proj(x))·up_proj(x)), the feed-forward layer of Llama and its kin, as `torch_sigmoid.swiglu`.

    It serves layers that have these three and, as `act_fn`, a SiLU: a `torch.nn.SiLU` or `torch_sigmoid.SiLU`, one of their
    functions, transformers' `SiLUActivation`, or a layer that `kernels` knows as "SiLU". Nobody calls `act_fn`, so its hooks
    do not run. The caller must ensure that the layer computes this formula and nothing more, such as a dropout.

    Raises:
        TypeError: at the first call, if the layer lacks one of the four.
        ValueError: likewise, if `act_fn` is anything else.

    Example:
        >>> class MLP(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(4, 4) for _ in range(3))
        ...         self.act_fn = torch.nn.SiLU()
        ...
        ...     forward = torch_sigmoid.layers.SwiGLUMLP.forward  # which is what kernelize does
        >>> MLP()(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            gate_proj, up_proj, down_proj, act_fn = self.gate_proj, self.up_proj, self.down_proj, self.act_fn
        except AttributeError:
            missing = [name for name in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(self, name)]
            raise TypeError(
                "SwiGLUMLP needs a layer with gate_proj, up_proj, down_proj and act_fn, "
                f"got a {type(self).__name__} without {' and '.join(missing)}"
            ) from None
        if not _is_silu(act_fn):
            name = getattr(act_fn, "__name__", type(act_fn).__name__)
            raise ValueError(f"SwiGLUMLP needs a SiLU as act_fn, got {name} in a {type(self).__name__}")
        hidden: Tensor = down_proj(functional.swiglu(gate_proj(x), up_proj(x)))
        return hidden


def _is_silu(activation: object) -> bool:
    """Whether it is known to compute silu. A subclass is not: its forward may be another."""
    kind = type(activation)
    return (
        kind in (torch.nn.SiLU, nn.SiLU)
        or activation is torch.nn.functional.silu
        or activation is functional.silu
        or getattr(kind, "kernel_layer_name", None) == "SiLU"
        or (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation")
    )


_LAYERS: dict[str, type[torch.nn.Module]] = {
    layer.__name__: layer for layer in (Sigmoid, SiLU, QuickGELU, SiluAndMul, SwiGLUMLP)
}


@dataclass(frozen=True)
class InstalledLayerRepository:
    """One of the layers above, where `kernels` expects a repository on the hub.

    Args:
        layer_name: "Sigmoid", "SiLU", "QuickGELU", "SiluAndMul" or "SwiGLUMLP".

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> mapping = {"MyActivation": {"cuda": torch_sigmoid.layers.InstalledLayerRepository("SiLU")}}
        >>> print(mapping["MyActivation"]["cuda"].load().__name__)
        SiLU
    """

    layer_name: str

    def __post_init__(self) -> None:
        if self.layer_name not in _LAYERS:
            raise ValueError(f"layer_name must be one of {', '.join(_LAYERS)}, got {self.layer_name!r}")

    def load(self) -> type[torch.nn.Module]:
        """The layer's class."""
        return _LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"`torch_sigmoid`, layer `{self.layer_name}`"


# The inner dicts are those of `kernels`, whose keys may be its own type.
MAPPING: dict[str, dict[Any, Any]] = {
    name: {device: InstalledLayerRepository(name) for device in ("cpu", "cuda", "rocm", "xpu")} for name in _LAYERS
}
"""What `use_kernel_mapping` takes: each layer above by its name, for every mode of each device."""
