"""Sigmoid for PyTorch with the exact gradient, in Triton GPU kernels, with every autograd mode torch has."""

import pathlib as _pathlib

# An installed package contains kernels/; in a checkout it stands beside the package, at the root.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from . import diagnostics, functional, nn
from .autograd import SigmoidFunction
from .functional import (
    Path,
    binary_cross_entropy_with_logits,
    debug,
    glu,
    logsigmoid,
    path,
    siglip_loss,
    sigmoid,
    sigmoid_,
    sigmoid_focal_loss,
    sigmoid_gate,
    silu,
    swiglu,
    warmup,
)
from .nn import GLU, BCEWithLogitsLoss, LogSigmoid, SigLIPLoss, Sigmoid, SigmoidFocalLoss, SigmoidGate, SiLU, SwiGLU
from .swap import intercept, replace, restore

__version__ = "0.1.0"

__all__ = [
    "GLU",
    "BCEWithLogitsLoss",
    "LogSigmoid",
    "Path",
    "SiLU",
    "SigLIPLoss",
    "Sigmoid",
    "SigmoidFocalLoss",
    "SigmoidFunction",
    "SigmoidGate",
    "SwiGLU",
    "binary_cross_entropy_with_logits",
    "debug",
    "diagnostics",
    "functional",
    "glu",
    "intercept",
    "logsigmoid",
    "nn",
    "path",
    "replace",
    "restore",
    "siglip_loss",
    "sigmoid",
    "sigmoid_",
    "sigmoid_focal_loss",
    "sigmoid_gate",
    "silu",
    "swiglu",
    "warmup",
]
