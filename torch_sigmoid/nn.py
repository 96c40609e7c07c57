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
    """log σ(x), element by element: a drop-in for `torch.nn.LogSigmoid`. See `torch_sigmoid.logsigmoid`."""

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return torch.nn.LogSigmoid()

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class SiLU(torch.nn.SiLU):
    """x·σ(x), element by element: a drop-in for `torch.nn.SiLU`. See `torch_sigmoid.silu`.

    Args:
        inplace: write the result over the input.
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
    """x·σ(alpha·x), element by element, as in CLIP. See `torch_sigmoid.quick_gelu`.

    Args:
        alpha: positive and finite.
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
    """a·σ(b) for the halves a, b of the input along `dim`: a drop-in for `torch.nn.GLU`. See `torch_sigmoid.glu`.

    Args:
        dim: the dimension to halve.
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return torch.nn.GLU(self.dim)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return functional.glu(input, self.dim)


class SigmoidGate(torch.nn.Module):
    """input·σ(gate), called with both; the gate may be broadcast against the input. See `torch_sigmoid.sigmoid_gate`."""

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, gate: Tensor) -> Tensor: ...

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return functional.sigmoid_gate(input, gate)


class SwiGLU(torch.nn.Module):
    """silu(gate)·up, called with both. See `torch_sigmoid.swiglu`.

    Args:
        alpha, limit, up_offset: of the clamped form; GPT-OSS has 1.702, 7.0 and 1.0.
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
    """silu(gate)·up for gate and up in one tensor. See `torch_sigmoid.swiglu_packed`.

    Args:
        dim: the dimension that holds gate and up.
        interleaved: whether they alternate along `dim`, as in GPT-OSS; else they are its halves.
        alpha, limit, up_offset: as in `SwiGLU`.
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
    """Binary cross entropy of logits: a drop-in for `torch.nn.BCEWithLogitsLoss`, and an instance of it.

    See `torch_sigmoid.binary_cross_entropy_with_logits`. `weight` and `pos_weight` are buffers, as in torch.

    Args:
        weight, size_average, reduce, reduction, pos_weight: as in torch.
        label_smoothing, ignore_index: as in the function.
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
    """Focal loss of logits. See `torch_sigmoid.sigmoid_focal_loss`, whose arguments these are.

    Note that `reduction` is "none" by default, as in torchvision. `weight` is a buffer.
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
    """The sigmoid loss of image-text pairs, called with both features, scale, bias and ids. See `torch_sigmoid.siglip_loss`.

    `group` is a process group, a DeviceMesh of one dimension, "world", or None. A copy has the same one. A process group cannot
    be pickled, but "world" can.
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
