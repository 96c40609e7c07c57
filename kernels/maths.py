"""Device functions on loaded values. Every formula of the package stands here once.

σ(x)  = 1 / (1 + e^-x)
σ'(x) = σ(x)·(1 - σ(x)) = σ(x)·σ(-x)          even in x
σ"(x) = σ'(x)·(1 - 2σ(x)) = -σ'(x)·tanh(x/2)

1 - σ cancels once σ rounds towards 1: from a bf16 σ it is exactly 0 for x ≥ 6.25. Since σ' is even, an operator that has
x takes σ(-|x|) ≤ 1/2 for σ, where 1 - σ keeps every bit.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def upcast(x):
    """Arithmetic is fp64 for fp64 and fp32 for everything else."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


# Under TRITON_INTERPRET=1 `triton.jit` gives an InterpretedFunction, which runs on CPU tensors and has no libdevice.
INTERPRETED = tl.constexpr(not isinstance(upcast, triton.JITFunction))


@triton.jit
def sigmoid(x):
    """σ(x), by ATen's own arithmetic: `one / (one + std::exp(-x))` in ATen/native/cuda/UnarySpecialOpsKernel.cu.

    libdevice.exp is CUDA's own expf, whose last multiplication nvcc fuses with the addition; Triton does the same as long
    as enable_fp_fusion is on. tl.exp and the approximate division have other digits.
    """
    if INTERPRETED:
        denominator = 1.0 + tl.exp(-x)
    else:
        denominator = 1.0 + libdevice.exp(-x)
    if x.dtype == tl.float64:
        return 1.0 / denominator
    else:
        return tl.div_rn(1.0, denominator)


@triton.jit
def sigmoid_grad(grad_output, sigma):
    """grad·(1 - σ)·σ, multiplied in ATen's order so that fp32 agrees to the last bit."""
    return grad_output * (1.0 - sigma) * sigma


@triton.jit
def smaller_sigmoid(x):
    """σ(-|x|), the one of σ(x) and σ(-x) that never rounds to 1; σ' is the same from either."""
    return sigmoid(-tl.abs(x))


@triton.jit
def curvature_from_output(sigma):
    """σ"/σ' = 1 - 2σ."""
    return 1.0 - 2.0 * sigma


@triton.jit
def curvature_from_input(x):
    """σ"/σ' = -tanh(x/2), which keeps its relative accuracy near x = 0, where 1 - 2σ cancels."""
    if INTERPRETED:
        return 1.0 - 2.0 * sigmoid(x)
    else:
        return -libdevice.tanh(0.5 * x)
