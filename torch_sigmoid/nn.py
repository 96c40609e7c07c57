"""The layers: thin modules that call the functions. Where torch has such a layer, ours inherits from it."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import checks, functional
from .autograd import record_known
from .dispatch import KERNELS_EXIST, Save
from .losses import Reduction

__all__ = [
    "GLU",
    "BCEWithLogitsLoss",
    "LogSigmoid",
    "QuickGELU",
    "SiLU",
    "SigLIPLoss",
    "Sigmoid",
    "SigmoidFocalLoss",
    "SigmoidGate",
    "SwiGLU",
    "SwiGLUPacked",
]

# torch's `__call__` takes and gives anything: type checkers learn from the declarations below what each layer's `forward` does.

# Where no kernel can run, the layer must not cost more than torch's: fp32 takes the shortest way to what `sigmoid` would do.
_TORCH_ALONE = not KERNELS_EXIST
_FLOAT32 = torch.float32


class Sigmoid(torch.nn.Sigmoid):
    r"""σ(x) = 1 / (1 + e^-x), element by element: a drop-in for `torch.nn.Sigmoid`, and an instance of it.

    Input and output have the same shape, any. Dtypes are as in `torch_sigmoid.sigmoid`. The layer has no parameters or buffers,
    so its state_dict is empty, as torch's.

    Args:
        save: what backward works from. "output" saves σ, as torch does; "input" saves x, and the gradient stays exact
            where σ has rounded to 1 (see `torch_sigmoid.sigmoid`).
        inplace: write σ over the input. Excludes save="input", whose x would be overwritten.

    Raises:
        ValueError: `save` is neither "output" nor "input", or is "input" together with `inplace`.

    Example:
        >>> layer = torch_sigmoid.Sigmoid(save="input")
        >>> layer, layer(torch.zeros(2))
        (Sigmoid(save='input'), tensor([0.5000, 0.5000]))
    """

    save: Save = "output"
    inplace: bool = False

    def __init__(self, *, save: Save = "output", inplace: bool = False) -> None:
        super().__init__()
        checks.check_save(save)
        self.save = save
        self.inplace = inplace
        self._check_inplace()

    def _check_inplace(self) -> None:
        if self.inplace and self.save == "input":
            raise ValueError('save="input" needs the input that inplace=True overwrites; expected one of the two')

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles in place of this layer: TorchScript has torch's own operator only."""
        return torch.nn.Sigmoid()

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            self._check_inplace()
            return functional.sigmoid_(input)
        save = self.save
        if save == "output" and type(input) is Tensor and input.dtype is _FLOAT32:
            return input.sigmoid() if _TORCH_ALONE else functional.sigmoid(input)
        recorded = record_known(input, save)
        return functional.sigmoid(input, save=save) if recorded is None else recorded

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else "" if self.save == "output" else f"save={self.save!r}"


class LogSigmoid(torch.nn.LogSigmoid):
    """log σ(x), element by element: a drop-in for `torch.nn.LogSigmoid`.

    Saves x for backward. Shapes, dtypes and errors are those of `torch_sigmoid.logsigmoid`.

    Example:
        >>> torch_sigmoid.LogSigmoid()(torch.tensor([-200.0, 0.0]))
        tensor([-200.0000,   -0.6931])
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return torch.nn.LogSigmoid()

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class SiLU(torch.nn.SiLU):
    """x·σ(x), element by element: a drop-in for `torch.nn.SiLU`.

    Saves x for backward. Shapes, dtypes and errors are those of `torch_sigmoid.silu`.

    Args:
        inplace: write the result over the input. Where a gradient is wanted, a copy of the input is saved, as in torch.

    Example:
        >>> torch_sigmoid.SiLU()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """

    # Also for the modules of others that `replace` gives this class.
    inplace: bool = False

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return torch.nn.SiLU(self.inplace)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class QuickGELU(torch.nn.Module):
    """x·σ(alpha·x), element by element, as in CLIP.

    Saves x for backward. Shapes, dtypes and errors of a call are those of `torch_sigmoid.quick_gelu`.

    Args:
        alpha: positive and finite.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is out of range.

    Example:
        >>> layer = torch_sigmoid.QuickGELU()
        >>> layer, layer(torch.tensor([0.0, 10.0]))
        (QuickGELU(alpha=1.702), tensor([ 0., 10.]))
    """

    alpha: float = 1.702

    def __init__(self, alpha: float = 1.702) -> None:
        super().__init__()
        checks.check_gate_options("QuickGELU", alpha)
        self.alpha = alpha

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class GLU(torch.nn.GLU):
    """a·σ(b) for the halves a, b of the input along `dim`: a drop-in for `torch.nn.GLU`.

    Saves the input for backward. Shapes, dtypes and errors are those of `torch_sigmoid.glu`.

    Args:
        dim: the dimension to halve, of even size.

    Example:
        >>> torch_sigmoid.GLU()(torch.tensor([2.0, 3.0, 0.0, 100.0]))  # a = [2, 3], b = [0, 100]
        tensor([1., 3.])
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return torch.nn.GLU(self.dim)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.glu(input, self.dim)


class SigmoidGate(torch.nn.Module):
    """input·σ(gate), called with both; the gate may be broadcast against the input.

    Saves both for backward, neither expanded. Shapes, dtypes and errors are those of `torch_sigmoid.sigmoid_gate`.

    Example:
        >>> torch_sigmoid.SigmoidGate()(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 100.0]))
        tensor([1., 3.])
    """

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, gate: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return functional.sigmoid_gate(input, gate)


class SwiGLU(torch.nn.Module):
    """silu(gate)·up, called with both; in full gate·σ(alpha·gate)·(up + up_offset).

    Saves both for backward. Shapes, dtypes and errors of a call are those of `torch_sigmoid.swiglu`.

    Args:
        alpha, limit, up_offset: of the clamped form; GPT-OSS has 1.702, 7.0 and 1.0.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.

    Example:
        >>> torch_sigmoid.SwiGLU()(torch.tensor([100.0, 0.0]), torch.tensor([3.0, 5.0]))
        tensor([300.,   0.])
        >>> torch_sigmoid.SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)  # GPT-OSS
        SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    """

    def __init__(self, *, alpha: float = 1.0, limit: float | None = None, up_offset: float = 0.0) -> None:
        super().__init__()
        checks.check_gate_options(type(self).__name__, alpha, limit, up_offset)
        self.alpha = alpha
        self.limit = limit
        self.up_offset = up_offset

    if TYPE_CHECKING:

        def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.swiglu(gate, up, alpha=self.alpha, limit=self.limit, up_offset=self.up_offset)

    def extra_repr(self) -> str:
        clamped = (self.alpha, self.limit, self.up_offset) != (1, None, 0)
        return f"alpha={self.alpha}, limit={self.limit}, up_offset={self.up_offset}" * clamped


class SwiGLUPacked(SwiGLU):
    """silu(gate)·up for gate and up in one tensor, which is what it saves for backward.

    Shapes, dtypes and errors of a call are those of `torch_sigmoid.swiglu_packed`.

    Args:
        dim: the dimension that holds gate and up.
        interleaved: whether they alternate along `dim`, as in GPT-OSS; else they are its halves.
        alpha, limit, up_offset: as in `torch_sigmoid.SwiGLU`.

    Raises:
        TypeError: `interleaved` is not a bool, or an option not a number.
        ValueError: an option is out of range.

    Example:
        >>> gate_and_up = torch.tensor([100.0, 3.0, 0.0, 5.0])  # gate = [100, 0], up = [3, 5]
        >>> torch_sigmoid.SwiGLUPacked(interleaved=True)(gate_and_up)
        tensor([300.,   0.])
    """

    def __init__(
        self,
        dim: int = -1,
        *,
        interleaved: bool = False,
        alpha: float = 1.0,
        limit: float | None = None,
        up_offset: float = 0.0,
    ) -> None:
        checks.check_bool("SwiGLUPacked", "interleaved", interleaved)
        super().__init__(alpha=alpha, limit=limit, up_offset=up_offset)
        self.dim = dim
        self.interleaved = interleaved

    if TYPE_CHECKING:

        def __call__(self, packed: Tensor) -> Tensor: ...  # type: ignore[override]

    def forward(self, packed: Tensor) -> Tensor:  # type: ignore[override]
        return functional.swiglu_packed(
            packed,
            self.dim,
            interleaved=self.interleaved,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
        )

    def extra_repr(self) -> str:
        interleaved = "interleaved=True" * self.interleaved
        return ", ".join(filter(None, (f"dim={self.dim}", interleaved, super().extra_repr())))


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """t·log(1 + e^-x) + (1-t)·log(1 + e^x) of logits x and targets t: a drop-in for `torch.nn.BCEWithLogitsLoss`.

    Called with both. Shapes, dtypes, errors and what is saved for backward are those of
    `torch_sigmoid.binary_cross_entropy_with_logits`. `weight` and `pos_weight` are buffers, as in torch.

    Args:
        weight, size_average, reduce, reduction, pos_weight: as in torch.
        label_smoothing, ignore_index: as in the function.

    Raises:
        TypeError: `label_smoothing` is not a number, or `ignore_index` not an int.
        ValueError: `reduction` is unknown, or `label_smoothing` out of range.

    Example:
        >>> loss = torch_sigmoid.BCEWithLogitsLoss(label_smoothing=0.1)
        >>> loss, loss(torch.tensor([0.0, 8.0]), torch.ones(2))
        (BCEWithLogitsLoss(label_smoothing=0.1), tensor(0.5467))
    """

    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        checks.check_loss_options("BCEWithLogitsLoss", self.reduction, label_smoothing, ignore_index)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def __prepare_scriptable__(self) -> torch.nn.Module:
        if self.label_smoothing or self.ignore_index is not None:
            raise NotImplementedError("torch.jit.script knows torch's loss only, without label_smoothing and ignore_index")
        return torch.nn.BCEWithLogitsLoss(self.weight, reduction=self.reduction, pos_weight=self.pos_weight)

    def extra_repr(self) -> str:
        return _targets_repr(self).removeprefix(", ")

    if TYPE_CHECKING:
        reduction: Reduction

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )


class SigmoidFocalLoss(torch.nn.Module):
    """α_t·(1 - p_t)^γ·BCE(x, t), the focal loss of logits x and targets t, called with both.

    Note that `reduction` is "none" by default, as in torchvision. `weight` is a buffer. Shapes, dtypes, errors and what is
    saved for backward are those of `torch_sigmoid.sigmoid_focal_loss`.

    Args:
        alpha, gamma, reduction, label_smoothing, ignore_index, weight: as in the function.

    Raises:
        TypeError: an option is not a number, or `ignore_index` not an int.
        ValueError: `reduction` is unknown, or an option out of range.

    Example:
        >>> torch_sigmoid.SigmoidFocalLoss(reduction="mean")(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor(0.0866)
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: Reduction = "none",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.check_loss_options("SigmoidFocalLoss", reduction, label_smoothing, ignore_index, alpha, gamma)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    if TYPE_CHECKING:
        weight: Tensor | None

        def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor: ...

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            weight=self.weight,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}{_targets_repr(self)}"


def _targets_repr(loss: torch.nn.Module) -> str:
    """The options of a loss that change its targets, where they are set."""
    smoothing = f", label_smoothing={loss.label_smoothing}" if loss.label_smoothing else ""
    return smoothing + (f", ignore_index={loss.ignore_index}" if loss.ignore_index is not None else "")


class SigLIPLoss(torch.nn.Module):
    """The sigmoid loss of image-text pairs, called with both features, scale, bias and ids.

    Formula, shapes, dtypes, errors and what is saved for backward are those of `torch_sigmoid.siglip_loss`.

    Args:
        chunk_size: as in the function.
        group: a process group, a DeviceMesh of one dimension, "world", or None. A copy of the layer has the same one. A process
            group cannot be pickled, but "world" can.

    Raises:
        TypeError: `chunk_size` is not an int.
        ValueError: `chunk_size` is below 1.

    Example:
        >>> features = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> torch_sigmoid.SigLIPLoss()(features, features, 10.0, -10.0)
        tensor(0.6933)
    """

    def __init__(
        self,
        *,
        chunk_size: int | None = None,
        group: "torch.distributed.ProcessGroup | DeviceMesh | str | None" = None,
    ) -> None:
        super().__init__()
        checks.check_chunk_size(chunk_size)
        self.chunk_size = chunk_size
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SigLIPLoss":
        memo[id(self.group)] = self.group  # a process group cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    if TYPE_CHECKING:

        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: Tensor | float,
            logit_bias: Tensor | float | None = None,
            *,
            image_ids: Tensor | None = None,
            text_ids: Tensor | None = None,
        ) -> Tensor: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor:
        return functional.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            chunk_size=self.chunk_size,
            group=self.group,
        )

    def extra_repr(self) -> str:
        options = [] if self.chunk_size is None else [f"chunk_size={self.chunk_size}"]
        return ", ".join(options + ["distributed"] * (self.group is not None))
