"""The layers."""

import torch
from torch import Tensor

from . import functional, ops

__all__ = ["Sigmoid"]

# Where no kernel can run, the layer must not cost more than torch's: fp32 takes the shortest way to what `sigmoid` would do.
_TORCH_ALONE = not ops.KERNELS_EXIST
_FLOAT32 = torch.float32


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
        self._mode = _mode(save, inplace)

    @property
    def save(self) -> str:
        return "input" if self._mode == "input" else "output"

    @save.setter
    def save(self, save: str) -> None:
        self._mode = _mode(save, self.inplace)

    @property
    def inplace(self) -> bool:
        return self._mode == "inplace"

    @inplace.setter
    def inplace(self, inplace: bool) -> None:
        self._mode = _mode(self.save, inplace)

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles in place of this layer: TorchScript has torch's own operator only."""
        return torch.nn.Sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        mode = self._mode
        if mode == "output" and _TORCH_ALONE and input.dtype is _FLOAT32:
            return input.sigmoid()
        if mode == "inplace":
            return functional.sigmoid_(input)
        return functional.sigmoid(input, save=mode)

    def extra_repr(self) -> str:
        return {"output": "", "input": "save='input'", "inplace": "inplace=True"}[self._mode]


def _mode(save: str, inplace: bool) -> str:
    """The two options in one word, which is all that a forward has to read."""
    functional.check_save(save)
    if inplace and save == "input":
        raise ValueError('save="input" needs the input that inplace=True overwrites; expected one of the two')
    return "inplace" if inplace else save
