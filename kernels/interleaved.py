"""Gates of interleaved pairs: one tensor holds (g, a), a gate and its operand, next to each other along its last dimension.

The formulas are those of gates.py. A walk goes over the pairs, so a packed tensor has twice as many columns as the walk. A
thread reads 16 bytes of a packed tensor twice: as many pairs as there are elements in 16 bytes of the output. It splits them in
registers, and joins gradients likewise:

    memory     g₀ a₀ g₁ a₁ g₂ a₂ g₃ a₃ │ g₄ a₄ g₅ a₅ g₆ a₆ g₇ a₇     two accesses of a thread, in 16 bit
    registers  g₀ g₁ g₂ g₃ g₄ g₅ g₆ g₇,  a₀ a₁ a₂ a₃ a₄ a₅ a₆ a₇     and one of the output

If a program loaded a tile twice as wide and split it, a thread would hold other pairs than it stores, and the program would
exchange them through shared memory. Where pairs do not follow each other in the walk, as in a transpose, the first and the
second of each pair are read and written as two strided tensors.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .gates import FUNCTIONS, gate_backward_formula, gate_double_backward_formula, gate_forward_formula
from .launch import Launcher, plan
from .pointwise import as_constants, pointwise, with_formula
from .tiles import TAIL_COLUMNS, load, place_of, select_part, store

FORMULA = None  # as in pointwise.py
ACCESS_BITS = tl.constexpr(128)


@triton.jit
def select_body(place, n_columns, BLOCK_COLUMNS: tl.constexpr, USE_INT64: tl.constexpr):
    """The packed columns at which a tile's body begins, and at which the bodies of a row end."""
    if USE_INT64:
        n_columns = n_columns.to(tl.int64)
    return 2 * place[2] * BLOCK_COLUMNS, 2 * (n_columns // TAIL_COLUMNS * TAIL_COLUMNS)


@triton.jit
def accesses(pointer, part, body, SECOND: tl.constexpr):
    """The elements of a body's packed tile that all threads access first, or those that they access second."""
    WIDTH: tl.constexpr = ACCESS_BITS // pointer.dtype.element_ty.primitive_bitwidth
    matrix, rows, columns, row_mask, _, _ = part
    begin, end = body
    threads = tl.arange(0, columns.shape[1] // WIDTH).to(begin.dtype)
    starts = begin + WIDTH * (2 * threads + SECOND)
    packed_columns = starts[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    mask = packed_columns < end
    return matrix, rows[:, :, None], packed_columns, row_mask[:, :, None], mask, row_mask[:, :, None] & mask


@triton.jit
def firsts(part):
    """The first of each pair of a part; the second is the next element."""
    matrix, rows, columns, row_mask, column_mask, mask = part
    return matrix, rows, 2 * columns, row_mask, column_mask, mask


@triton.jit
def load_access(pointer, strides, part, body, SECOND: tl.constexpr):
    values = load(pointer, strides, accesses(pointer, part, body, SECOND))
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1], values.shape[2] // 2, 2)))


@triton.jit
def alternate(one, other):
    """Of (rows, threads, pairs) for each of two accesses, all in the order of memory: (rows, columns)."""
    both = tl.permute(tl.join(one, other), (0, 1, 3, 2))
    return tl.reshape(both, (both.shape[0], both.shape[1] * both.shape[2] * both.shape[3]))


@triton.jit
def by_access(values, PAIRS: tl.constexpr):
    """What `alternate` joins."""
    both = tl.reshape(values, (values.shape[0], values.shape[1] // (2 * PAIRS), 2, PAIRS))
    return tl.split(tl.permute(both, (0, 1, 3, 2)))


@triton.jit
def load_pairs(pointer, strides, part, body, TAIL: tl.constexpr):
    """The first and the second of each pair."""
    if TAIL:
        return load(pointer, strides, firsts(part)), load(pointer + 1, strides, firsts(part))
    else:
        one = load_access(pointer, strides, part, body, 0)
        other = load_access(pointer, strides, part, body, 1)
        return alternate(one[0], other[0]), alternate(one[1], other[1])


@triton.jit
def store_pairs(pointer, strides, part, body, first, second, TAIL: tl.constexpr):
    if TAIL:
        store(pointer, strides, firsts(part), first)
        store(pointer + 1, strides, firsts(part), second)
    else:
        WIDTH: tl.constexpr = ACCESS_BITS // pointer.dtype.element_ty.primitive_bitwidth
        first = by_access(first, WIDTH // 2)
        second = by_access(second, WIDTH // 2)
        for SECOND in tl.static_range(2):
            joined = tl.join(first[SECOND], second[SECOND])
            values = tl.reshape(joined, (joined.shape[0], joined.shape[1], WIDTH))
            store(pointer, strides, accesses(pointer, part, body, SECOND), values)


def interleaved_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    N_SINGLE_INPUTS: tl.constexpr,
    N_SINGLE_OUTPUTS: tl.constexpr,
    constants,
):
    """Like `pointwise_kernel`, with packed tensors after the others: two values of the formula each. At most one is written."""
    ROUND_TO_16_BIT: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    N_INPUTS: tl.constexpr = len(inputs)
    LAST: tl.constexpr = len(outputs) - 1
    place = place_of(tl.program_id(0), n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
    body = select_body(place, n_columns, BLOCK_COLUMNS, USE_INT64)
    for TAIL in tl.static_range(2):
        present, part = select_part(place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            values = ()
            for i in tl.static_range(N_SINGLE_INPUTS):
                values += (load(inputs[i], strides[i], part),)
            for i in tl.static_range(N_SINGLE_INPUTS, N_INPUTS):
                values += load_pairs(inputs[i], strides[i], part, body, TAIL)
            results = FORMULA(*values, *constants, ROUND_TO_16_BIT)
            if N_SINGLE_OUTPUTS:
                store(outputs[0], strides[N_INPUTS], part, results if LAST == 0 else results[0])
            if N_SINGLE_OUTPUTS <= LAST:
                to_first, to_second = results[LAST], results[LAST + 1]
                store_pairs(outputs[LAST], strides[N_INPUTS + LAST], part, body, to_first, to_second, TAIL)


@triton.jit
def interleaved_forward_formula(
    g, a, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    return gate_forward_formula(a, g, FUNCTION, ALPHA, LIMIT, OFFSET, ROUND)


@triton.jit
def interleaved_backward_formula(
    d, g, a, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    to_a, to_g = gate_backward_formula(d, a, g, FUNCTION, ALPHA, LIMIT, OFFSET, ROUND)
    return to_g, to_a


@triton.jit
def interleaved_double_backward_formula(
    d, w, v, g, a, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    to_d, to_a, to_g = gate_double_backward_formula(v, d, a, w, g, FUNCTION, ALPHA, LIMIT, OFFSET, ROUND)
    return to_d, to_g, to_a


def halves(packed):
    """The first and the second of each pair, as strided views."""
    return packed[..., ::2], packed[..., 1::2]


def over_pairs(inputs, outputs):
    """The programs and arguments of a kernel; None where the pairs of a packed tensor do not follow each other in the walk."""
    packed = inputs[-1].shape  # always packed, and never of the others' shape
    tensors = (*inputs, *outputs)
    are_packed = [tensor.shape == packed for tensor in tensors]
    strides = tuple(
        (*tensor.stride()[:-1], 2 * tensor.stride(-1)) if is_packed else tensor.stride()
        for tensor, is_packed in zip(tensors, are_packed)
    )
    walk = plan((*packed[:-1], packed[-1] // 2), strides)
    if walk is None:
        return None
    steps = []
    for tensor, is_packed, step in zip(tensors, are_packed, walk.strides):
        if is_packed:
            if tensor.stride(-1) != 1 or step[-1] != 2:
                return None
            step = (*step[:-1], 1)
        steps.append(step)
    n_single_inputs, n_single_outputs = (sum(each.shape != packed for each in of) for of in (inputs, outputs))
    return walk.tiles, (*walk._replace(strides=tuple(steps)).arguments, n_single_inputs, n_single_outputs)


class PairsLauncher(Launcher):
    """A Launcher whose last input, and any other tensors after those that are not, are packed."""

    def __init__(self, formula, *constants):
        kernel = with_formula(interleaved_kernel, formula)
        super().__init__(kernel, as_constants(constants), arrange=over_pairs, layouts_follow=False)
        self.of_halves = pointwise(formula, *constants, layouts_follow=False)

    def _launch(self, key, inputs, outputs):
        if outputs[0].numel() == 0 or over_pairs(inputs, outputs) is not None:
            return super()._launch(key, inputs, outputs)
        packed = inputs[-1].shape
        unpacked = (
            tuple(part for tensor in tensors for part in (halves(tensor) if tensor.shape == packed else (tensor,)))
            for tensors in (inputs, outputs)
        )
        return self.of_halves(*unpacked)


@lru_cache(maxsize=256)
def launchers(function, alpha, limit, offset):
    formulas = interleaved_forward_formula, interleaved_backward_formula, interleaved_double_backward_formula
    return tuple(PairsLauncher(formula, FUNCTIONS[function], alpha, limit, offset) for formula in formulas)


def forward(packed, gate):
    """A·h(G) of the pairs (g, a); `gate` is the name of h, ALPHA, LIMIT and OFFSET."""
    output = torch.empty_like(halves(packed)[0])
    launchers(*gate)[0]((packed,), (output,))
    return output


def backward(grad_output, packed, gate):
    """The gradients of the pairs, packed alike."""
    grad_packed = torch.empty_like(packed)
    launchers(*gate)[1]((grad_output, packed), (grad_packed,))
    return grad_packed


def double_backward(grad, grad_output, packed, gate):
    """What reaches `grad_output` and `packed` when `grad` reaches the gradients of the pairs."""
    to_packed = torch.empty_like(packed)
    # In the memory format of the other: tensors of several make no walk.
    to_grad_output = torch.empty_like(halves(to_packed)[0], dtype=grad_output.dtype)
    launchers(*gate)[2]((grad_output, grad, packed), (to_grad_output, to_packed))
    return to_grad_output, to_packed
