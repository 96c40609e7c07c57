"""Sigmoid: forward, backward and double backward, one kernel each.

forward          σ = σ(x)
backward         grad_input = grad_output·σ'
double backward  for v, the gradient that reaches grad_input:
                 to grad_output: v·σ'        to what was saved: v·grad_output·∂σ'/∂saved

`saved` is σ, or x where FROM_INPUT: then σ' is exact in both tails, and ∂σ'/∂x = σ". From σ, ∂σ'/∂σ = 1 - 2σ.
"""

import torch
import triton
import triton.language as tl

from . import maths
from .pointwise import pointwise


@triton.jit
def sigmoid_forward_formula(x, ROUND_TO_16_BIT: tl.constexpr):
    return maths.sigmoid(x, ROUND_TO_16_BIT)


@triton.jit
def sigmoid_backward_formula(grad_output, saved, FROM_INPUT: tl.constexpr, ROUND_TO_16_BIT: tl.constexpr):
    if FROM_INPUT:
        return maths.weighted(grad_output, saved, maths.SIGMOID, 1, ROUND_TO_16_BIT)
    else:
        return maths.sigmoid_grad_from_output(grad_output, saved)


@triton.jit
def sigmoid_double_backward_formula(v, grad_output, saved, FROM_INPUT: tl.constexpr, ROUND_TO_16_BIT: tl.constexpr):
    to_grad_output = sigmoid_backward_formula(v, saved, FROM_INPUT, ROUND_TO_16_BIT)
    if FROM_INPUT:
        return to_grad_output, maths.weighted(v * grad_output, saved, maths.SIGMOID, 2, ROUND_TO_16_BIT)
    else:
        return to_grad_output, v * grad_output * maths.curvature_from_output(saved)


_forward = pointwise(sigmoid_forward_formula)
_backward = {from_input: pointwise(sigmoid_backward_formula, from_input) for from_input in (False, True)}
_double_backward = {from_input: pointwise(sigmoid_double_backward_formula, from_input) for from_input in (False, True)}


def sigmoid_forward(x):
    """σ(x) in x's dtype and memory format."""
    sigma = torch.empty_like(x)
    _forward((x,), (sigma,))
    return sigma


def sigmoid_backward(grad_output, saved, from_input, known=None):
    """grad_output·σ' in the dtype of `grad_output` and the memory format of `saved`. For `known` see launch.py."""
    # Naming a dtype costs a quarter of the allocation more.
    same = known is not None or grad_output.dtype is saved.dtype
    grad_input = torch.empty_like(saved) if same else torch.empty_like(saved, dtype=grad_output.dtype)
    _backward[from_input]((grad_output, saved), (grad_input,), known)
    return grad_input


def sigmoid_double_backward(grad_grad_input, grad_output, saved, from_input):
    """The gradients that reach `grad_output` and `saved`, in their dtypes and the memory format of `saved`."""
    outputs = torch.empty_like(saved, dtype=grad_output.dtype), torch.empty_like(saved)
    _double_backward[from_input]((grad_grad_input, grad_output, saved), outputs)
    return outputs
