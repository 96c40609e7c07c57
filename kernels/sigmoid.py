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
from .launch import SIZES, TAIL_COLUMNS, Launcher, load_tile, select_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
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
    ROUND_TO_16_BIT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
            store_tile(sigma_ptr, sigma_row_stride, sigma_column_stride, tile, maths.sigmoid(x, ROUND_TO_16_BIT))


@triton.jit(do_not_specialize=SIZES)
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FROM_INPUT: tl.constexpr,
):
    ROUND_TO_16_BIT: tl.constexpr = grad_output_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            saved = load_tile(saved_ptr, saved_row_stride, saved_column_stride, tile)
            if FROM_INPUT:
                grad_input = maths.weighted(grad_output, saved, maths.SIGMOID, 1, ROUND_TO_16_BIT)
            else:
                grad_input = maths.sigmoid_grad_from_output(grad_output, saved)
            store_tile(grad_input_ptr, grad_input_row_stride, grad_input_column_stride, tile, grad_input)


@triton.jit(do_not_specialize=SIZES)
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FROM_INPUT: tl.constexpr,
):
    ROUND_TO_16_BIT: tl.constexpr = grad_output_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            v = load_tile(grad_grad_input_ptr, grad_grad_input_row_stride, grad_grad_input_column_stride, tile)
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            saved = load_tile(saved_ptr, saved_row_stride, saved_column_stride, tile)
            if FROM_INPUT:
                grad_grad_output = maths.weighted(v, saved, maths.SIGMOID, 1, ROUND_TO_16_BIT)
                grad_saved = maths.weighted(v * grad_output, saved, maths.SIGMOID, 2, ROUND_TO_16_BIT)
            else:
                grad_grad_output = maths.sigmoid_grad_from_output(v, saved)
                grad_saved = v * grad_output * maths.curvature_from_output(saved)
            store_tile(
                grad_grad_output_ptr, grad_grad_output_row_stride, grad_grad_output_column_stride, tile, grad_grad_output
            )
            store_tile(grad_saved_ptr, grad_saved_row_stride, grad_saved_column_stride, tile, grad_saved)


_forward = Launcher(sigmoid_forward_kernel)
_backward = {from_input: Launcher(sigmoid_backward_kernel, from_input) for from_input in (False, True)}
_double_backward = {from_input: Launcher(sigmoid_double_backward_kernel, from_input) for from_input in (False, True)}


def sigmoid_forward(x):
    """σ(x) in x's dtype and memory format."""
    sigma = torch.empty_like(x)
    _forward((x,), (sigma,))
    return sigma


def sigmoid_backward(grad_output, saved, from_input):
    """grad_output·σ' in the dtype of `grad_output` and the memory format of `saved`."""
    # Naming a dtype costs a quarter of the allocation more.
    same = grad_output.dtype is saved.dtype
    grad_input = torch.empty_like(saved) if same else torch.empty_like(saved, dtype=grad_output.dtype)
    _backward[from_input]((grad_output, saved), (grad_input,))
    return grad_input


def sigmoid_double_backward(grad_grad_input, grad_output, saved, from_input):
    """The gradients that reach `grad_output` and `saved`, in their dtypes and the memory format of `saved`."""
    outputs = torch.empty_like(saved, dtype=grad_output.dtype), torch.empty_like(saved)
    _double_backward[from_input]((grad_grad_input, grad_output, saved), outputs)
    return outputs


def warmup(device, dtype):
    """Compile and load every kernel for dense tensors, and the backwards for an expanded upstream gradient too."""
    x = torch.empty(TAIL_COLUMNS.value + 1, dtype=dtype, device=device)
    sigmoid_forward(x)
    for grad in (x, x[:1].expand_as(x)):
        for from_input in (False, True):
            sigmoid_backward(grad, x, from_input)
            sigmoid_double_backward(x, grad, x, from_input)
