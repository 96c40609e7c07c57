"""The gates: log-sigmoid and SiLU of one tensor, and a·h(g), one kernel each for forward, backward and double backward.

of one tensor    y = f(x)         grad_x = d·f'(x)
of two           y = A·h(G)       grad_a = d·h(G)         grad_g = d·A·h'(G)

d is the upstream gradient. h is σ (GLU, sigmoid_gate) or silu (SwiGLU), and A, G are the operand and the gate themselves.
In the clamped form of SwiGLU, G = min(g, LIMIT), A = a clamped to ±LIMIT, plus 1, and h(G) = silu(ALPHA·G)/ALPHA:
no gradient passes what was clamped. Double backward, for v, w, the gradients that reach grad_a and grad_g:

to d: v·h(G) + w·A·h'(G)        to a: w·d·h'(G)        to g: v·d·h'(G) + w·d·A·h"(G)

A gate that is broadcast against its operand is loaded once a row or once a column, and its gradient summed up where it is
computed: in fp32 (fp64 for fp64), within a program, then over programs, in a fixed order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch, maths
from .launch import SIZES, Launcher, load_tile, select_tile, store_tile

FUNCTIONS = {"sigmoid": maths.SIGMOID.value, "silu": maths.SILU.value, "logsigmoid": maths.LOGSIGMOID.value}
SIGMOID_GATE = "sigmoid", 1.0, None, 0.0
SWIGLU = "silu", 1.0, None, 0.0
# What a broadcast launch splits its sums for: as many programs keep a large GPU busy.
ENOUGH_PROGRAMS = 1024


@triton.jit(do_not_specialize=SIZES)
def unary_forward_kernel(
    x_ptr,
    output_ptr,
    x_row_stride,
    output_row_stride,
    x_column_stride,
    output_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    ROUND_TO_16_BIT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
            output = maths.weighted(1.0, x, FUNCTION, 0, ROUND_TO_16_BIT)
            store_tile(output_ptr, output_row_stride, output_column_stride, tile, output)


@triton.jit(do_not_specialize=SIZES)
def unary_backward_kernel(
    grad_output_ptr,
    x_ptr,
    grad_x_ptr,
    grad_output_row_stride,
    x_row_stride,
    grad_x_row_stride,
    grad_output_column_stride,
    x_column_stride,
    grad_x_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    ROUND_TO_16_BIT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
            grad_x = maths.weighted(grad_output, x, FUNCTION, 1, ROUND_TO_16_BIT)
            store_tile(grad_x_ptr, grad_x_row_stride, grad_x_column_stride, tile, grad_x)


@triton.jit(do_not_specialize=SIZES)
def unary_double_backward_kernel(
    v_ptr,
    grad_output_ptr,
    x_ptr,
    to_grad_output_ptr,
    to_x_ptr,
    v_row_stride,
    grad_output_row_stride,
    x_row_stride,
    to_grad_output_row_stride,
    to_x_row_stride,
    v_column_stride,
    grad_output_column_stride,
    x_column_stride,
    to_grad_output_column_stride,
    to_x_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    ROUND_TO_16_BIT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            v = load_tile(v_ptr, v_row_stride, v_column_stride, tile)
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
            to_grad_output = maths.weighted(v, x, FUNCTION, 1, ROUND_TO_16_BIT)
            to_x = maths.weighted(v * grad_output, x, FUNCTION, 2, ROUND_TO_16_BIT)
            store_tile(to_grad_output_ptr, to_grad_output_row_stride, to_grad_output_column_stride, tile, to_grad_output)
            store_tile(to_x_ptr, to_x_row_stride, to_x_column_stride, tile, to_x)


@triton.jit
def weighted_gate(
    v, g, FUNCTION: tl.constexpr, ORDER: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, ROUND: tl.constexpr
):
    """v·h(G), or v times a derivative of it in g, which is 0 beyond the limit."""
    gate = g
    if LIMIT is not None:
        gate = tl.where(g > maths.constant(LIMIT, g), maths.constant(LIMIT, g), g)
    if ALPHA != 1.0:
        gate *= maths.constant(ALPHA, g)
        if ORDER == 0:
            v *= maths.constant(1.0 / ALPHA, g)
        if ORDER == 2:
            v *= maths.constant(ALPHA, g)
    result = maths.weighted(v, gate, FUNCTION, ORDER, ROUND)
    if ORDER > 0 and LIMIT is not None:
        result = tl.where(g > maths.constant(LIMIT, g), 0.0, result)
    return result


@triton.jit
def operand(a, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """A."""
    if LIMIT is not None:
        limit = maths.constant(LIMIT, a)
        a = tl.where(a > limit, limit, tl.where(a < -limit, -limit, a))
    if OFFSET != 0.0:
        a += OFFSET
    return a


@triton.jit
def past_clamp(grad, a, LIMIT: tl.constexpr):
    """grad where a was not clamped, else 0."""
    if LIMIT is not None:
        grad = tl.where(tl.abs(a) > maths.constant(LIMIT, a), 0.0, grad)
    return grad


@triton.jit(do_not_specialize=SIZES)
def gate_forward_kernel(
    a_ptr,
    g_ptr,
    output_ptr,
    a_row_stride,
    g_row_stride,
    output_row_stride,
    a_column_stride,
    g_column_stride,
    output_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
            g = load_tile(g_ptr, g_row_stride, g_column_stride, tile)
            output = weighted_gate(operand(a, LIMIT, OFFSET), g, FUNCTION, 0, ALPHA, LIMIT, ROUND)
            store_tile(output_ptr, output_row_stride, output_column_stride, tile, output)


@triton.jit(do_not_specialize=SIZES)
def gate_backward_kernel(
    grad_output_ptr,
    a_ptr,
    g_ptr,
    grad_a_ptr,
    grad_g_ptr,
    grad_output_row_stride,
    a_row_stride,
    g_row_stride,
    grad_a_row_stride,
    grad_g_row_stride,
    grad_output_column_stride,
    a_column_stride,
    g_column_stride,
    grad_a_column_stride,
    grad_g_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
            g = load_tile(g_ptr, g_row_stride, g_column_stride, tile)
            grad_a = past_clamp(weighted_gate(grad_output, g, FUNCTION, 0, ALPHA, LIMIT, ROUND), a, LIMIT)
            grad_g = weighted_gate(grad_output * operand(a, LIMIT, OFFSET), g, FUNCTION, 1, ALPHA, LIMIT, ROUND)
            store_tile(grad_a_ptr, grad_a_row_stride, grad_a_column_stride, tile, grad_a)
            store_tile(grad_g_ptr, grad_g_row_stride, grad_g_column_stride, tile, grad_g)


@triton.jit(do_not_specialize=SIZES)
def gate_double_backward_kernel(
    v_ptr,
    w_ptr,
    grad_output_ptr,
    a_ptr,
    g_ptr,
    to_grad_output_ptr,
    to_a_ptr,
    to_g_ptr,
    v_row_stride,
    w_row_stride,
    grad_output_row_stride,
    a_row_stride,
    g_row_stride,
    to_grad_output_row_stride,
    to_a_row_stride,
    to_g_row_stride,
    v_column_stride,
    w_column_stride,
    grad_output_column_stride,
    a_column_stride,
    g_column_stride,
    to_grad_output_column_stride,
    to_a_column_stride,
    to_g_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
            g = load_tile(g_ptr, g_row_stride, g_column_stride, tile)
            v = past_clamp(load_tile(v_ptr, v_row_stride, v_column_stride, tile), a, LIMIT)
            w = load_tile(w_ptr, w_row_stride, w_column_stride, tile)
            grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
            scaled = w * operand(a, LIMIT, OFFSET)
            to_grad_output = weighted_gate(v, g, FUNCTION, 0, ALPHA, LIMIT, ROUND)
            to_grad_output += weighted_gate(scaled, g, FUNCTION, 1, ALPHA, LIMIT, ROUND)
            to_a = past_clamp(weighted_gate(w * grad_output, g, FUNCTION, 1, ALPHA, LIMIT, ROUND), a, LIMIT)
            to_g = weighted_gate(v * grad_output, g, FUNCTION, 1, ALPHA, LIMIT, ROUND)
            to_g += weighted_gate(scaled * grad_output, g, FUNCTION, 2, ALPHA, LIMIT, ROUND)
            store_tile(to_grad_output_ptr, to_grad_output_row_stride, to_grad_output_column_stride, tile, to_grad_output)
            store_tile(to_a_ptr, to_a_row_stride, to_a_column_stride, tile, to_a)
            store_tile(to_g_ptr, to_g_row_stride, to_g_column_stride, tile, to_g)


@triton.jit
def select_block(
    step,
    n_rows,
    n_columns,
    n_steps,
    n_units,
    REDUCE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    """The tile of this program's `step`, the gates of its rows or columns, and where their sums go among the partial ones.

    REDUCE_COLUMNS: row r has the (r % n_units)th gate. Else each column has a gate of its own in every group of n_rows rows.
    """
    program = tl.program_id(0)
    if USE_INT64:
        program = program.to(tl.int64)
    if REDUCE_COLUMNS:
        splits = tl.cdiv(tl.cdiv(n_columns, BLOCK_COLUMNS), n_steps)
        split = program % splits
        rows = (program // splits * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        columns = ((split * n_steps + step) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
        row_mask = rows < n_rows
        tile = rows, columns, row_mask, row_mask & (columns < n_columns)
        return tile, rows % n_units, row_mask, split * n_rows + rows
    else:
        column_blocks = tl.cdiv(n_columns, BLOCK_COLUMNS)
        splits = tl.cdiv(tl.cdiv(n_rows, BLOCK_ROWS), n_steps)
        part = program // column_blocks
        group = part // splits
        rows = ((part % splits * n_steps + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        columns = (program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
        row_mask = rows < n_rows
        column_mask = columns < n_columns
        tile = group * n_rows + rows, columns, row_mask, row_mask & column_mask
        return tile, group * n_columns + columns, column_mask, part * n_columns + columns


# n_columns is left to be specialised: rows that are multiples of 16 are read 16 bytes at a time.
BROADCAST_SIZES = ["n_rows", "n_steps", "n_units"]


@triton.jit(do_not_specialize=BROADCAST_SIZES)
def broadcast_forward_kernel(
    a_ptr,
    g_ptr,
    output_ptr,
    a_row_stride,
    output_row_stride,
    a_column_stride,
    output_column_stride,
    n_rows,
    n_columns,
    n_steps,
    n_units,
    REDUCE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    for step in range(n_steps):
        tile, units, unit_mask, _ = select_block(
            step, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64
        )
        g = maths.upcast(tl.load(g_ptr + units, mask=unit_mask))
        a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
        store_tile(output_ptr, output_row_stride, output_column_stride, tile, maths.weighted(a, g, maths.SIGMOID, 0, ROUND))


@triton.jit(do_not_specialize=BROADCAST_SIZES)
def broadcast_backward_kernel(
    grad_output_ptr,
    a_ptr,
    g_ptr,
    grad_a_ptr,
    sums_ptr,
    grad_output_row_stride,
    a_row_stride,
    grad_a_row_stride,
    grad_output_column_stride,
    a_column_stride,
    grad_a_column_stride,
    n_rows,
    n_columns,
    n_steps,
    n_units,
    REDUCE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    total = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), a_ptr.dtype.element_ty))
    for step in range(n_steps):
        tile, units, unit_mask, _ = select_block(
            step, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64
        )
        g = maths.upcast(tl.load(g_ptr + units, mask=unit_mask))
        grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
        a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
        grad_a = maths.weighted(grad_output, g, maths.SIGMOID, 0, ROUND)
        store_tile(grad_a_ptr, grad_a_row_stride, grad_a_column_stride, tile, grad_a)
        _, _, _, mask = tile
        total += tl.where(mask, maths.weighted(grad_output * a, g, maths.SIGMOID, 1, ROUND), 0.0)
    store_sums(sums_ptr, total, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)


@triton.jit
def store_sums(
    sums_ptr,
    total,
    n_rows,
    n_columns,
    n_steps,
    n_units,
    REDUCE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    """What this program has summed up for each of its gates."""
    _, _, unit_mask, sums = select_block(
        0, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64
    )
    AXIS: tl.constexpr = 1 if REDUCE_COLUMNS else 0
    total = tl.sum(total, axis=AXIS, keep_dims=True).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + sums, total, mask=unit_mask)


@triton.jit(do_not_specialize=BROADCAST_SIZES)
def broadcast_double_backward_kernel(
    v_ptr,
    grad_output_ptr,
    a_ptr,
    w_ptr,
    g_ptr,
    to_grad_output_ptr,
    to_a_ptr,
    sums_ptr,
    v_row_stride,
    grad_output_row_stride,
    a_row_stride,
    to_grad_output_row_stride,
    to_a_row_stride,
    v_column_stride,
    grad_output_column_stride,
    a_column_stride,
    to_grad_output_column_stride,
    to_a_column_stride,
    n_rows,
    n_columns,
    n_steps,
    n_units,
    REDUCE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    ROUND: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    total = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), a_ptr.dtype.element_ty))
    for step in range(n_steps):
        tile, units, unit_mask, _ = select_block(
            step, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64
        )
        g = maths.upcast(tl.load(g_ptr + units, mask=unit_mask))
        w = maths.upcast(tl.load(w_ptr + units, mask=unit_mask))
        v = load_tile(v_ptr, v_row_stride, v_column_stride, tile)
        grad_output = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile)
        a = load_tile(a_ptr, a_row_stride, a_column_stride, tile)
        to_grad_output = maths.weighted(v, g, maths.SIGMOID, 0, ROUND) + maths.weighted(w * a, g, maths.SIGMOID, 1, ROUND)
        store_tile(to_grad_output_ptr, to_grad_output_row_stride, to_grad_output_column_stride, tile, to_grad_output)
        to_a = maths.weighted(w * grad_output, g, maths.SIGMOID, 1, ROUND)
        store_tile(to_a_ptr, to_a_row_stride, to_a_column_stride, tile, to_a)
        to_g = maths.weighted(v * grad_output, g, maths.SIGMOID, 1, ROUND)
        to_g += maths.weighted(w * a * grad_output, g, maths.SIGMOID, 2, ROUND)
        _, _, _, mask = tile
        total += tl.where(mask, to_g, 0.0)
    store_sums(sums_ptr, total, n_rows, n_columns, n_steps, n_units, REDUCE_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)


_unary_launchers = {
    function: tuple(
        Launcher(kernel, FUNCTIONS[function])
        for kernel in (unary_forward_kernel, unary_backward_kernel, unary_double_backward_kernel)
    )
    for function in ("silu", "logsigmoid")
}


def unary_forward(x, function):
    """f(x)."""
    output = torch.empty_like(x)
    _unary_launchers[function][0]((x,), (output,))
    return output


def unary_backward(grad_output, x, function):
    """d·f'(x), in the dtype of `grad_output`."""
    grad_x = torch.empty_like(x, dtype=grad_output.dtype)
    _unary_launchers[function][1]((grad_output, x), (grad_x,))
    return grad_x


def unary_double_backward(v, grad_output, x, function):
    """The gradients that reach `grad_output` and `x`."""
    outputs = torch.empty_like(x, dtype=grad_output.dtype), torch.empty_like(x)
    _unary_launchers[function][2]((v, grad_output, x), outputs)
    return outputs


# Constants are compiled in: who changes alpha at every step compiles at every step.
@lru_cache(maxsize=256)
def _gate_launchers(function, alpha, limit, offset):
    constants = FUNCTIONS[function], alpha, limit, offset
    # Halves of one packed tensor and tensors of their own may have the same strides, but not their gradients.
    return tuple(
        Launcher(kernel, *constants, layouts_follow=False)
        for kernel in (gate_forward_kernel, gate_backward_kernel, gate_double_backward_kernel)
    )


def gate_forward(a, g, gate):
    """A·h(G), where `gate` is the name of h, ALPHA, LIMIT and the offset of A."""
    output = torch.empty_like(a)
    _gate_launchers(*gate)[0]((a, g), (output,))
    return output


def gate_backward(grad_output, a, g, gate, out):
    """The gradients of a and g, written to the two tensors of `out`."""
    _gate_launchers(*gate)[1]((grad_output, a, g), out)


def gate_double_backward(v, w, grad_output, a, g, gate, out):
    """The gradients that reach a and g, written to `out`; returns the one that reaches `grad_output`."""
    # In the memory format of the others: tensors of several cannot be walked as rows and columns.
    to_grad_output = torch.empty_like(out[0], dtype=grad_output.dtype)
    _gate_launchers(*gate)[2]((v, w, grad_output, a, g), (to_grad_output, *out))
    return to_grad_output


def warmup(device, dtype):
    """Compile and load the kernels for dense tensors, and the backwards for an expanded upstream gradient too."""
    x = torch.empty(launch.TAIL_COLUMNS.value + 1, dtype=dtype, device=device)
    for grad in (x, x[:1].expand_as(x)):
        for function in ("silu", "logsigmoid"):
            unary_forward(x, function)
            unary_backward(grad, x, function)
            unary_double_backward(x, grad, x, function)
        for gate in (SIGMOID_GATE, SWIGLU):
            gate_forward(x, x, gate)
            out = torch.empty_like(x), torch.empty_like(x)
            gate_backward(grad, x, x, gate, out)
            gate_double_backward(x, x, grad, x, x, gate, out)


class Matrix(NamedTuple):
    """How a tensor, with a gate broadcast against it, is `groups` of n_rows rows, its dimensions in the given order.

    With reduce_columns the gates are of rows, the same in each group; else they are of columns, others in each group.
    """

    order: tuple[int, ...]
    groups: int
    n_rows: int
    n_columns: int
    reduce_columns: bool

    def rows_of(self, full):
        """A tensor of the full shape as rows and columns; copied where its strides amount to none."""
        return full.permute(self.order).reshape(self.groups * self.n_rows, self.n_columns)

    def units_of(self, gate):
        """The gates, (1, n_rows, 1) or (groups, 1, n_columns), in the order of the rows or columns they belong to."""
        shape = (1, self.n_rows, 1) if self.reduce_columns else (self.groups, 1, self.n_columns)
        return gate.permute(self.order).reshape(shape).contiguous()

    def restored(self, flat, like):
        """What is in this order, in the shape of `like`."""
        return flat.view([like.shape[d] for d in self.order]).permute([self.order.index(d) for d in range(like.dim())])

    def empty_rows(self, full):
        return torch.empty(self.groups * self.n_rows, self.n_columns, dtype=full.dtype, device=full.device)

    def empty_sums(self, gate):
        """Memory for the sums of each program; where no sum is split, for the gradient itself."""
        splits = share(*self[1:]).splits
        shape = (splits, self.groups, self.n_rows) if self.reduce_columns else (self.groups, splits, self.n_columns)
        wide = gate.dtype if gate.dtype is torch.float64 else torch.float32
        single = splits == 1 and not (self.reduce_columns and self.groups > 1)
        return torch.empty(shape, dtype=gate.dtype if single else wide, device=gate.device)

    def total_of(self, sums, gate):
        summed = (0, 1) if self.reduce_columns else (1,)
        if sums.numel() > gate.numel():
            sums = sums.sum(summed)
        return self.restored(sums, gate).to(gate.dtype)


def as_matrix(a, g):
    """A Matrix in the order of a's memory; None where dimensions with and without a gate of their own alternate more often."""
    order = tuple(sorted(range(a.dim()), key=lambda d: -a.stride(d)))
    runs = []
    for d in order:
        if a.shape[d] == 1:
            continue
        summed = g.shape[d] == 1
        if runs and runs[-1][0] == summed:
            runs[-1][1] *= a.shape[d]
        else:
            runs.append([summed, a.shape[d]])
    sizes = [size for _, size in runs]
    match [summed for summed, _ in runs]:
        case [True]:
            return Matrix(order, 1, 1, *sizes, True)
        case [False, True]:
            return Matrix(order, 1, *sizes, True)
        case [True, False, True]:
            return Matrix(order, *sizes, True)
        case [True, False]:
            return Matrix(order, 1, *sizes, False)
        case [False, True, False]:
            return Matrix(order, *sizes, False)
    return None


class Blocks(NamedTuple):
    """How the programs of a broadcast launch share the work: each sums up the blocks of its steps."""

    block_rows: int
    block_columns: int
    steps: int
    splits: int
    programs: int


@lru_cache(maxsize=4096)
def share(groups, n_rows, n_columns, reduce_columns):
    rows = groups * n_rows if reduce_columns else n_rows
    large = maths.INTERPRETED and groups * n_rows * n_columns > launch.INTERPRETED_TILE_ELEMENTS // 4
    elements = launch.INTERPRETED_TILE_ELEMENTS if large else launch.TILE_ELEMENTS
    # A sum down columns reads 128 neighbours at a time, which leaves rows for the threads of a program to share.
    widest = elements if reduce_columns else elements // 8
    block_columns = min(widest, max(16, triton.next_power_of_2(n_columns)))
    block_rows = elements // block_columns
    row_blocks, column_blocks = triton.cdiv(rows, block_rows), triton.cdiv(n_columns, block_columns)
    along, others = (column_blocks, row_blocks) if reduce_columns else (row_blocks, groups * column_blocks)
    steps = triton.cdiv(along, min(along, triton.cdiv(ENOUGH_PROGRAMS, others)))
    splits = triton.cdiv(along, steps)
    return Blocks(block_rows, block_columns, steps, splits, splits * others)


def _arrange_broadcast(inputs, outputs):
    """Rows and columns have two dimensions, gates three, of which one is the last input, and sums come after the outputs."""
    full = [tensor for tensor in (*inputs, *outputs) if tensor.dim() == 2]
    strides = [tensor.stride() for tensor in full]
    rows, n_columns = full[0].shape
    groups, n_units, unit_columns = inputs[-1].shape
    reduce_columns = unit_columns == 1
    if reduce_columns:
        groups, n_rows = rows // n_units, rows
    else:
        n_rows = rows // groups
    blocks = share(groups, n_rows // groups if reduce_columns else n_rows, n_columns, reduce_columns)
    tile = reduce_columns, blocks.block_rows, blocks.block_columns, launch.needs_int64((rows, n_columns), strides)
    sizes = n_rows, n_columns, blocks.steps, n_units
    return blocks.programs, (*(row for row, _ in strides), *(column for _, column in strides), *sizes, *tile)


_broadcast = [
    Launcher(kernel, arrange=_arrange_broadcast, layouts_follow=False)
    for kernel in (broadcast_forward_kernel, broadcast_backward_kernel, broadcast_double_backward_kernel)
]


def _expanded(gate, like):
    return torch.empty_like(like, dtype=gate.dtype).copy_(gate)


def _sum_memory(like, dtype):
    return torch.empty_like(like, dtype=torch.promote_types(dtype, torch.float32))


def broadcast_forward(a, g):
    """a·σ(g) for a gate whose dimensions are a's or 1."""
    matrix = as_matrix(a, g)
    if matrix is None:
        return gate_forward(a, _expanded(g, a), SIGMOID_GATE)
    output = matrix.empty_rows(a)
    _broadcast[0]((matrix.rows_of(a), matrix.units_of(g)), (output,))
    return matrix.restored(output, a)


def broadcast_backward(grad_output, a, g):
    """The gradients of a and g."""
    matrix = as_matrix(a, g)
    if matrix is None:
        grad_a, grad_g = torch.empty_like(a), _sum_memory(a, g.dtype)
        gate_backward(grad_output, a, _expanded(g, a), SIGMOID_GATE, (grad_a, grad_g))
        return grad_a, grad_g.sum_to_size(g.shape).to(g.dtype)
    grad_a, sums = matrix.empty_rows(a), matrix.empty_sums(g)
    _broadcast[1]((matrix.rows_of(grad_output), matrix.rows_of(a), matrix.units_of(g)), (grad_a, sums))
    return matrix.restored(grad_a, a), matrix.total_of(sums, g)


def broadcast_double_backward(v, w, grad_output, a, g):
    """The gradients that reach `grad_output`, a and g."""
    matrix = as_matrix(a, g)
    if matrix is None:
        to_a, to_g = torch.empty_like(a), _sum_memory(a, g.dtype)
        gates = _expanded(w, a), grad_output, a, _expanded(g, a)
        to_grad_output = gate_double_backward(v, *gates, SIGMOID_GATE, (to_a, to_g))
        return to_grad_output, to_a, to_g.sum_to_size(g.shape).to(g.dtype)
    to_grad_output, to_a, sums = matrix.empty_rows(grad_output), matrix.empty_rows(a), matrix.empty_sums(g)
    full = [matrix.rows_of(tensor) for tensor in (v, grad_output, a)]
    _broadcast[2]((*full, matrix.units_of(w), matrix.units_of(g)), (to_grad_output, to_a, sums))
    return matrix.restored(to_grad_output, a), matrix.restored(to_a, a), matrix.total_of(sums, g)
