"""The kernels of the provider "naive Triton": what a Triton tutorial would write, for comparison only."""

import triton
import triton.language as tl


@triton.jit
def sigmoid_forward_kernel(x_ptr, y_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(y_ptr + offsets, tl.sigmoid(x), mask=mask)


@triton.jit
def sigmoid_backward_kernel(grad_output_ptr, y_ptr, grad_input_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    grad_output = tl.load(grad_output_ptr + offsets, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(grad_input_ptr + offsets, grad_output * y * (1 - y), mask=mask)
