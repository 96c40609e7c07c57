"""Where blocks, warps, strides, offset width, alignment and devices are decided; no other file knows of them.

A launch sees its tensors, all of one shape, as a matrix of rows and columns, each tensor with its own two strides. Most
launches are a single row: tensors that are dense in one common memory format, walked in storage order. A slice or a
`chunk` half becomes a true matrix, an expanded tensor has a column stride of None, and what needs three dimensions is copied.

A program handles one tile of that matrix, in two parts. The body covers the columns up to the last multiple of 16, so the
compiler may prove that neighbouring lanes share their mask and move 16 bytes an access whatever the width. The tail, 16
columns wide, covers the rest.
"""

import contextlib
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .maths import INTERPRETED, upcast

# 1024 elements over 4 warps are 8 a thread: one 16-byte access in 16 bit, two in fp32.
TILE_ELEMENTS = 1024
# The interpreter pays per program more than per element.
INTERPRETED_TILE_ELEMENTS = 65536
NUM_WARPS = 4
TAIL_COLUMNS = tl.constexpr(16)
INT32_MAX = 2**31 - 1


@triton.jit
def select_tile(
    n_rows,
    n_columns,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    """Rows, columns, row mask and mask of this program's tile; for a single row (`n_rows` None) the compiler folds the rows."""
    program = tl.program_id(0)
    if USE_INT64:
        program = program.to(tl.int64)
        n_columns = n_columns.to(tl.int64)
    column_blocks = tl.cdiv(n_columns, BLOCK_COLUMNS)
    first_column = (program if n_rows is None else program % column_blocks) * BLOCK_COLUMNS
    n_body_columns = n_columns // TAIL_COLUMNS * TAIL_COLUMNS
    if TAIL:
        # Only the last block of a row reaches past n_body_columns.
        columns = (n_body_columns + tl.arange(0, TAIL_COLUMNS))[None, :]
        mask = columns < tl.minimum(n_columns, first_column + BLOCK_COLUMNS)
    else:
        columns = (first_column + tl.arange(0, BLOCK_COLUMNS))[None, :]
        mask = columns < n_body_columns
    if n_rows is None:
        rows = tl.zeros((1, 1), tl.int32)
        return rows, columns, rows == 0, mask
    else:
        rows = (program // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = rows < n_rows
        return rows, columns, row_mask, row_mask & mask


@triton.jit
def load_tile(pointer, row_stride, column_stride, tile):
    """The tile's values, upcast for arithmetic; an expanded tensor is read once a row."""
    rows, columns, row_mask, mask = tile
    pointer += rows if row_stride is None else rows * row_stride
    if column_stride is None:
        values = tl.load(pointer, mask=row_mask)
    else:
        values = tl.load(pointer + columns * column_stride, mask=mask)
    return upcast(values)


@triton.jit
def store_tile(pointer, row_stride, column_stride, tile, values):
    """Rounds once, to the dtype behind the pointer."""
    rows, columns, _, mask = tile
    pointer += rows if row_stride is None else rows * row_stride
    tl.store(pointer + columns * column_stride, values.to(pointer.dtype.element_ty), mask=mask)


class Plan(NamedTuple):
    """How a kernel walks its tensors. `n_rows` is None for a single row, a column stride None for an expanded tensor."""

    n_rows: int | None
    n_columns: int
    row_strides: tuple[int | None, ...]
    column_strides: tuple[int | None, ...]
    block_rows: int
    block_columns: int
    use_int64: bool

    @property
    def programs(self) -> int:
        return triton.cdiv(self.n_rows or 1, self.block_rows) * triton.cdiv(self.n_columns, self.block_columns)


def needs_int64(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> bool:
    """Whether an element's offset in any of the tensors, or an index up to a tile past the end, exceeds 32 bits."""
    reach = max(sum((size - 1) * stride for size, stride in zip(shape, own)) for own in strides)
    return reach > INT32_MAX - INTERPRETED_TILE_ELEMENTS


def coalesce(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]):
    """The fewest dimensions, outermost first in the last tensor's storage order, that address every tensor by strides."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[-1][d])
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    for d in order:
        step = tuple(own[d] for own in strides)
        if steps and steps[-1] == tuple(shape[d] * inner for inner in step):
            sizes[-1] *= shape[d]
            steps[-1] = step
        else:
            sizes.append(shape[d])
            steps.append(step)
    return sizes or [1], steps or [(1,) * len(strides)]


def tile_shape(n_rows: int, n_columns: int, transposed: bool) -> tuple[int, int]:
    """Rows and columns of a tile: the widest that wastes at most an eighth of its lanes, but no narrower than the tail.

    A tile is square to read a transpose.
    """
    large = INTERPRETED and n_rows * n_columns > INTERPRETED_TILE_ELEMENTS // 4
    elements = INTERPRETED_TILE_ELEMENTS if large else TILE_ELEMENTS
    if n_rows == 1:
        return 1, elements
    if transposed:
        side = 1 << (elements.bit_length() // 2)
        return elements // side, side
    width = elements
    while width > TAIL_COLUMNS.value and triton.cdiv(n_columns, width) * width * 8 > n_columns * 9:
        width //= 2
    return elements // width, width


@lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Plan | None:
    """The plan for tensors of one shape and these strides, the last an output; None where a copy must come first."""
    sizes, steps = coalesce(shape, strides)
    if len(sizes) > 2:
        return None
    use_int64 = needs_int64(shape, strides)
    column_strides = tuple(stride or None for stride in steps[-1])
    if len(sizes) == 1:
        return Plan(None, sizes[0], (None,) * len(strides), column_strides, *tile_shape(1, sizes[0], False), use_int64)
    transposed = any(row == 1 and column > 1 for row, column in zip(*steps))
    return Plan(*sizes, steps[0], column_strides, *tile_shape(*sizes, transposed), use_int64)


def _on_device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(tensor.device)
    return contextlib.nullcontext() if module.current_device() == tensor.get_device() else module.device(tensor.device)


def launch(kernel, inputs, outputs, **constants):
    """Run `kernel` over tensors of one shape on one device, writing `outputs`: dense, and alike in their strides.

    The kernel takes the tensors, their row strides, their column strides, `n_rows`, `n_columns`, its own `constants`, and
    BLOCK_ROWS, BLOCK_COLUMNS and USE_INT64.
    """
    if outputs[0].numel() == 0:
        return
    shape, strides = outputs[0].shape, outputs[0].stride()
    tensors = (*inputs, *outputs)
    chosen = plan(shape, tuple(tensor.stride() for tensor in tensors))
    if chosen is None:
        tensors = tuple(
            tensor if tensor.stride() == strides else torch.empty_like(outputs[0], dtype=tensor.dtype).copy_(tensor)
            for tensor in tensors
        )
        chosen = plan(shape, (strides,) * len(tensors))
    _run(kernel, chosen, tensors, constants)


def _run(kernel, plan, tensors, constants):
    with _on_device_of(tensors[0]):
        kernel[(plan.programs,)](
            *tensors,
            *plan.row_strides,
            *plan.column_strides,
            plan.n_rows,
            plan.n_columns,
            **constants,
            BLOCK_ROWS=plan.block_rows,
            BLOCK_COLUMNS=plan.block_columns,
            USE_INT64=plan.use_int64,
            num_warps=NUM_WARPS,
            # ATen's kernels are compiled with fused multiply-add, and Triton has announced another default.
            enable_fp_fusion=True,
        )
