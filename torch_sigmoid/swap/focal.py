"""The focal losses of other libraries: where they are defined, in which forms, and the same by ours."""

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..checks import MAX_GAMMA
from ..dispatch import is_ours
from ..functional import sigmoid_focal_loss

_Function = Callable[..., Any]

NAME = "sigmoid_focal_loss"
# The modules that define it; others import it from there.
LIBRARIES = (
    "torchvision.ops.focal_loss",
    "transformers.loss.loss_for_object_detection",
    "transformers.loss.loss_grounding_dino",
    "transformers.models.maskformer.modeling_maskformer",
)


def fingerprint(function: FunctionType) -> str | None:
    """A hash of what a function does: of its syntax tree without docstring and annotations. None where it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.arg)):
            vars(node).update({"returns": None} if isinstance(node, ast.FunctionDef) else {"annotation": None})
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    # From Python 3.13 on, a dump leaves empty lists out.
    return hashlib.sha256(re.sub(r"(, )?\w+=\[\]", "", ast.dump(tree)).encode()).hexdigest()[:16]


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


# The forms that were compared with ours: torchvision's up to 0.29, and those of transformers 5.24.
FORMS: dict[str, _Function] = {
    "985912bfbba283a8": of_each_element,
    "33da404704629b0b": mean_over_queries,
    "665e5a886dcce3cd": mean_over_pixels,
    "a65c8b17836699d9": sum_of_all,
}


def form_of(function: FunctionType) -> _Function | None:
    """What computes the same by ours, called with the function before its arguments; None if we do not know its form."""
    return FORMS.get(fingerprint(function) or "")
