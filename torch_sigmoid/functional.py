"""The public functions. Each is defined in the file of its family: sigmoid.py, gates.py, losses.py or siglip.py."""

from .dispatch import Path, path, torch_below
from .gates import glu, logsigmoid, quick_gelu, sigmoid_gate, silu, swiglu, swiglu_packed
from .losses import binary_cross_entropy_with_logits, debug, sigmoid_focal_loss
from .siglip import siglip_loss
from .sigmoid import sigmoid, sigmoid_

__all__ = [
    "Path",
    "binary_cross_entropy_with_logits",
    "debug",
    "glu",
    "logsigmoid",
    "path",
    "quick_gelu",
    "siglip_loss",
    "sigmoid",
    "sigmoid_",
    "sigmoid_focal_loss",
    "sigmoid_gate",
    "silu",
    "swiglu",
    "swiglu_packed",
    "torch_below",
]
