"""Sigmoid: forward, backward and double backward, one kernel each.

forward          σ = σ(x)
backward         grad_input = grad_output·σ'
double backward  for v, the gradient that reaches grad_input:
                 to grad_output: v·σ'        to what was saved: v·grad_output·∂σ'/∂saved

`saved` is σ, or x where FROM_INPUT: then σ' is exact in both tails, and ∂σ'/∂x = σ". From σ, ∂σ'/∂σ = 1 - 2σ.
Arithmetic is fp32 (fp64 for fp64), rounded once when stored.
"""

import torch
import triton
import triton.language as tl

from . import maths
from .launch import launch, load_tile, select_tile, store_tile


@triton.jit
def sigmoid_forward_kernel(
    x_ptr,
    sigma_ptr,
    x_row_stride,
    sigma_row_stride,
    x_column_stride,
    sigma_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    for TAIL in tl.static_range(2):
        tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
        store_tile(sigma_ptr, sigma_row_stride, sigma_column_stride, tile, maths.sigmoid(x))


@triton.jit
def sigmoid_backward_kernel(
    grad_output_ptr,
    saved_ptr,
    grad_input_ptr,
    grad_output_row_stride,
    saved_row_stride,
    grad_input_row_stride,
    grad_output_column_stride,
    saved_column_stride,
    grad_input_column_stride,
    n_rows,
    n_columns,
    FROM_INPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    for TAIL in tl.static_range(2):
        tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
        saved = load_tile(saved_ptr, saved_row_stride, saved_column_stride, tile)
        sigma = maths.smaller_sigmoid(saved) if FROM_INPUT else saved
        grad_input = maths.sigmoid_grad(grad_output, sigma)
        store_tile(grad_input_ptr, grad_input_row_stride, grad_input_column_stride, tile, grad_input)


@triton.jit
def sigmoid_double_backward_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    saved_ptr,
    grad_grad_output_ptr,
    grad_saved_ptr,
    grad_grad_input_row_stride,
    grad_output_row_stride,
    saved_row_stride,
    grad_grad_output_row_stride,
    grad_saved_row_stride,
    grad_grad_input_column_stride,
    grad_output_column_stride,
    saved_column_stride,
    grad_grad_output_column_stride,
    grad_saved_column_stride,
    n_rows,
    n_columns,
    FROM_INPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    for TAIL in tl.static_range(2):
        tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        v = load_tile(grad_grad_input_ptr, grad_grad_input_row_stride, grad_grad_input_column_stride, tile)
        grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
        saved = load_tile(saved_ptr, saved_row_stride, saved_column_stride, tile)
        if FROM_INPUT:
            sigma = maths.smaller_sigmoid(saved)
            grad_saved = maths.sigmoid_grad(v * grad_output, sigma) * maths.curvature_from_input(saved)
        else:
            sigma = saved
            grad_saved = v * grad_output * maths.curvature_from_output(sigma)
        grad_grad_output = maths.sigmoid_grad(v, sigma)
        store_tile(grad_grad_output_ptr, grad_grad_output_row_stride, grad_grad_output_column_stride, tile, grad_grad_output)
        store_tile(grad_saved_ptr, grad_saved_row_stride, grad_saved_column_stride, tile, grad_saved)


def sigmoid_forward(x):
    """σ(x) in x's dtype and memory format."""
    sigma = torch.empty_like(x)
    launch(sigmoid_forward_kernel, (x,), (sigma,))
    return sigma


def sigmoid_backward(grad_output, saved, from_input):
    """grad_output·σ' in the dtype of `grad_output` and the memory format of `saved`."""
    grad_input = torch.empty_like(saved, dtype=grad_output.dtype)
    launch(sigmoid_backward_kernel, (grad_output, saved), (grad_input,), FROM_INPUT=from_input)
    return grad_input


def sigmoid_double_backward(grad_grad_input, grad_output, saved, from_input):
    """The gradients that reach `grad_output` and `saved`, in their dtypes and the memory format of `saved`."""
    outputs = torch.empty_like(saved, dtype=grad_output.dtype), torch.empty_like(saved)
    launch(sigmoid_double_backward_kernel, (grad_grad_input, grad_output, saved), outputs, FROM_INPUT=from_input)
    return outputs
