"""Sigmoid for PyTorch with the exact gradient, in Triton GPU kernels, with every autograd mode torch has.

Importing this package imports neither Triton nor anything that needs a GPU: the first kernel does.
"""

import importlib.util as _importlib
import pathlib as _pathlib
import sys as _sys
import typing as _typing

# An installed package contains kernels/; in a checkout it stands beside the package, at the root, and is loaded from there.
# Type checkers read kernels.pyi.
if not _typing.TYPE_CHECKING and not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    _kernels = _pathlib.Path(__file__).parent.parent / "kernels" / "__init__.py"
    _spec = _importlib.spec_from_file_location(f"{__name__}.kernels", _kernels)
    assert _spec is not None
    assert _spec.loader is not None
    kernels = _sys.modules[_spec.name] = _importlib.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from . import diagnostics as diagnostics
from . import functional as functional
from . import layers as layers
from . import nn as nn
from .autograd import SigmoidFunction
from .functional import (
    Path,
    binary_cross_entropy_with_logits,
    debug,
    glu,
    logsigmoid,
    path,
    quick_gelu,
    siglip_loss,
    sigmoid,
    sigmoid_,
    sigmoid_focal_loss,
    sigmoid_gate,
    silu,
    swiglu,
    swiglu_packed,
    torch_below,
)
from .nn import (
    GLU,
    BCEWithLogitsLoss,
    LogSigmoid,
    QuickGELU,
    SigLIPLoss,
    Sigmoid,
    SigmoidFocalLoss,
    SigmoidGate,
    SiLU,
    SwiGLU,
    SwiGLUPacked,
)
from .operators import warmup
from .swap import intercept

if _typing.TYPE_CHECKING:
    from .swap import register, register_transformers, replace, report, restore, unregister_transformers


__version__ = "0.2.0"

# Without the modules: `from torch_sigmoid import *` must not put another `nn` or `functional` in the place of torch's.
__all__ = [
    "GLU",
    "BCEWithLogitsLoss",
    "LogSigmoid",
    "Path",
    "QuickGELU",
    "SiLU",
    "SigLIPLoss",
    "Sigmoid",
    "SigmoidFocalLoss",
    "SigmoidFunction",
    "SigmoidGate",
    "SwiGLU",
    "SwiGLUPacked",
    "binary_cross_entropy_with_logits",
    "debug",
    "glu",
    "intercept",
    "logsigmoid",
    "path",
    "quick_gelu",
    "register",
    "register_transformers",
    "replace",
    "report",
    "restore",
    "siglip_loss",
    "sigmoid",
    "sigmoid_",
    "sigmoid_focal_loss",
    "sigmoid_gate",
    "silu",
    "swiglu",
    "swiglu_packed",
    "torch_below",
    "unregister_transformers",
    "warmup",
]

# Imported when they are first asked for, see swap/__init__.py.
_OF_SWAP = ("register", "register_transformers", "replace", "report", "restore", "unregister_transformers")

if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        if name in _OF_SWAP:
            from . import swap

            globals()[name] = found = getattr(swap, name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_OF_SWAP})
