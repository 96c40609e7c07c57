"""The layers."""

import torch
from torch import Tensor

from . import functional

__all__ = ["Sigmoid"]


class Sigmoid(torch.nn.Sigmoid):
    r"""σ(x) = 1 / (1 + e^-x), element by element: a drop-in for `torch.nn.Sigmoid`, and an instance of it.

    It has no parameters or buffers, so its state_dict is empty, as torch's.

    Args:
        save: what backward works from. "output" keeps σ, as torch does; "input" keeps x, and the gradient stays exact
            where σ has rounded to 1 (see `torch_sigmoid.sigmoid`).
        inplace: write σ over the input. Excludes save="input", whose x would be overwritten.

    Shape:
        Input and output: any shape, the same.

    Raises:
        ValueError: `save` is neither "output" nor "input", or is "input" together with `inplace`.
    """

    def __init__(self, save: str = "output", inplace: bool = False) -> None:
        super().__init__()
        functional.check_save(save)
        if inplace and save == "input":
            raise ValueError('save="input" needs the input that inplace=True overwrites; expected one of the two')
        self.save = save
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.sigmoid(input)
        if self.inplace:
            return functional.sigmoid_(input)
        return functional.sigmoid(input, save=self.save)

    def extra_repr(self) -> str:
        options = ["save='input'"] if self.save == "input" else []
        return ", ".join(options + ["inplace=True"] * self.inplace)
