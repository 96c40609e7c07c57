"""Sigmoid for PyTorch with the exact gradient, in Triton GPU kernels, with every autograd mode torch has."""

import pathlib as _pathlib

# An installed package contains kernels/; in a checkout it stands beside the package, at the root.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from . import diagnostics, functional, nn
from .autograd import SigmoidFunction
from .functional import Path, glu, logsigmoid, path, sigmoid, sigmoid_, sigmoid_gate, silu, swiglu, warmup
from .nn import GLU, LogSigmoid, Sigmoid, SigmoidGate, SiLU, SwiGLU
from .swap import intercept, replace, restore

__version__ = "0.1.0"

__all__ = [
    "GLU",
    "LogSigmoid",
    "Path",
    "SiLU",
    "Sigmoid",
    "SigmoidFunction",
    "SigmoidGate",
    "SwiGLU",
    "diagnostics",
    "functional",
    "glu",
    "intercept",
    "logsigmoid",
    "nn",
    "path",
    "replace",
    "restore",
    "sigmoid",
    "sigmoid_",
    "sigmoid_gate",
    "silu",
    "swiglu",
    "warmup",
]
