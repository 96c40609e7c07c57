"""The focal losses of other libraries: where they are defined, in which forms, and the same by ours."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..checks import MAX_GAMMA
from ..dispatch import is_ours
from ..functional import sigmoid_focal_loss
from .functions import FINGERPRINTS, runs_its_source

_Function = Callable[..., Any]

NAME = "sigmoid_focal_loss"
# The modules that define it; others import it from there.
LIBRARIES = (
    "torchvision.ops.focal_loss",
    "transformers.loss.loss_for_object_detection",
    "transformers.loss.loss_grounding_dino",
    "transformers.models.maskformer.modeling_maskformer",
)


def of_each_element(
    theirs: _Function, inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Any:
    """torchvision's, with our arguments."""
    if not _takes(inputs, targets, alpha, gamma) or (alpha < 0 and alpha != -1) or reduction not in ("none", "mean", "sum"):
        return theirs(inputs, targets, alpha, gamma, reduction)
    return sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)  # type: ignore[arg-type]  # one of the three


def mean_over_queries(
    theirs: _Function, inputs: Tensor, targets: Tensor, num_boxes: Any, alpha: float = 0.25, gamma: float = 2
) -> Any:
    """The DETR family's: the mean over dimension 1, the sum of the rest, over the number of boxes or masks."""
    if not _takes(inputs, targets, alpha, gamma):
        return theirs(inputs, targets, num_boxes, alpha, gamma)
    return sigmoid_focal_loss(inputs, targets, alpha if alpha >= 0 else -1, gamma).mean(1).sum() / num_boxes


def mean_over_pixels(
    theirs: _Function, inputs: Tensor, labels: Tensor, num_masks: Any, alpha: float = 0.25, gamma: float = 2
) -> Any:
    """MaskFormer's: the DETR family's, with other names."""
    return mean_over_queries(theirs, inputs, labels, num_masks, alpha, gamma)


def sum_of_all(
    theirs: _Function, inputs: Tensor, targets: Tensor, num_boxes: Any, alpha: float = 0.25, gamma: float = 2
) -> Any:
    """Grounding DINO's: the sum over the number of boxes."""
    if not _takes(inputs, targets, alpha, gamma):
        return theirs(inputs, targets, num_boxes, alpha, gamma)
    return sigmoid_focal_loss(inputs, targets, alpha if alpha >= 0 else -1, gamma, "sum") / num_boxes


def _takes(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> bool:
    """Whether ours takes these arguments; theirs may take others, and says itself what is wrong with them."""
    if not (isinstance(alpha, (int, float)) and isinstance(gamma, (int, float)) and alpha <= 1 and 0 <= gamma <= MAX_GAMMA):
        return False
    tensors = isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.shape == targets.shape
    return tensors and is_ours(inputs) and targets.layout is torch.strided and not targets.is_nested


# The forms that were compared with ours: torchvision's of 0.29, and those of transformers 5.24.
FORMS: dict[str, _Function] = {
    FINGERPRINTS["sigmoid_focal_loss"]: of_each_element,
    FINGERPRINTS["detr_focal_loss"]: mean_over_queries,
    "5a6cd7a15c1db2e8": mean_over_pixels,
    "87498cb2c926e38b": sum_of_all,
}


def form_of(function: FunctionType) -> _Function | None:
    """What computes the same by ours, called with the function before its arguments; None if we do not know its form."""
    from .trees import fingerprint_of

    return FORMS.get(fingerprint_of(function) or "") if runs_its_source(function) else None
