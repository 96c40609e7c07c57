"""Where blocks, warps, strides, offset width, alignment and devices are decided; no other file knows of them.

A launch sees its tensors, all of one shape, as a matrix of rows and columns, each tensor with its own two strides. Most
launches are a single row: tensors that are dense in one common memory format, walked in storage order. A slice or a
`chunk` half becomes a true matrix, an expanded tensor has a column stride of None, and what needs three dimensions is copied.

A program handles one tile of that matrix, in two parts. The body covers the columns up to the last multiple of 16, so the
compiler may prove that neighbouring lanes share their mask and move 16 bytes an access whatever the width. The tail, 16
columns wide, covers the rest. A program without one of them skips it, by a branch that all its threads take alike.
"""

import contextlib
import math
import os
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .maths import INTERPRETED, upcast

# 1024 elements over 4 warps are 8 a thread: one 16-byte access in 16 bit, two in fp32.
TILE_ELEMENTS = 1024
# Neither decides how a kernel is compiled: a width of 1 or a multiple of 16 is no case of its own.
SIZES = ["n_rows", "n_columns"]
# The interpreter pays per program more than per element.
INTERPRETED_TILE_ELEMENTS = 65536
NUM_WARPS = 4
TAIL_COLUMNS = tl.constexpr(16)
INT32_MAX = 2**31 - 1
# `CompiledKernel.run` is no public interface; these versions were read and tried. Others launch by `kernel[grid]`.
KEEPS_COMPILATIONS = not INTERPRETED and triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
# Of a tensor that is only read. `data_ptr`, all that an older torch has, would copy what `torch._lazy_clone` has made.
address_of = getattr(torch.Tensor, "const_data_ptr", torch.Tensor.data_ptr)
# Of one operator: a network has dozens of shapes, and an entry takes about a kilobyte.
MAX_KEPT = 4096


@triton.jit
def select_tile(
    n_rows,
    n_columns,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    index=None,
):
    """Whether a tile has such a part, and the part: rows, columns, row mask and mask. The tile is the program's if not given.

    For a single row (`n_rows` None) the compiler folds the rows away.
    """
    program = tl.program_id(0) if index is None else index
    if USE_INT64:
        program = program.to(tl.int64)
        n_columns = n_columns.to(tl.int64)
    column_blocks = tl.cdiv(n_columns, BLOCK_COLUMNS)
    first_column = (program if n_rows is None else program % column_blocks) * BLOCK_COLUMNS
    n_body_columns = n_columns // TAIL_COLUMNS * TAIL_COLUMNS
    if TAIL:
        # Only the last block of a row reaches past n_body_columns.
        end = tl.minimum(n_columns, first_column + BLOCK_COLUMNS)
        present = n_body_columns < end
        columns = (n_body_columns + tl.arange(0, TAIL_COLUMNS))[None, :]
        mask = columns < end
    else:
        present = first_column < n_body_columns
        columns = (first_column + tl.arange(0, BLOCK_COLUMNS))[None, :]
        mask = columns < n_body_columns
    if n_rows is None:
        rows = tl.zeros((1, 1), tl.int32)
        return present, (rows, columns, rows == 0, mask)
    else:
        rows = (program // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = rows < n_rows
        return present, (rows, columns, row_mask, row_mask & mask)


@triton.jit
def load_as_stored(pointer, row_stride, column_stride, tile):
    """The tile's values; an expanded tensor is read once a row."""
    rows, columns, row_mask, mask = tile
    pointer += rows if row_stride is None else rows * row_stride
    if column_stride is None:
        return tl.load(pointer, mask=row_mask)
    else:
        return tl.load(pointer + columns * column_stride, mask=mask)


@triton.jit
def load_tile(pointer, row_stride, column_stride, tile):
    """The tile's values, upcast for arithmetic."""
    return upcast(load_as_stored(pointer, row_stride, column_stride, tile))


@triton.jit
def store_tile(pointer, row_stride, column_stride, tile, values):
    """Rounds once, to the dtype behind the pointer."""
    rows, columns, _, mask = tile
    pointer += rows if row_stride is None else rows * row_stride
    tl.store(pointer + columns * column_stride, values.to(pointer.dtype.element_ty), mask=mask)


def _keep(compiled, programs, arguments) -> tuple:
    """What launches a compilation again: a function, all of its arguments but the pointers, and where it may run.

    The compilation itself is among it: since Triton 3.8 its module is unloaded when nothing refers to it.
    """
    current_device = driver.active.get_current_device
    if current_device is torch.cuda.current_device:
        # The same without its check for initialisation, which a tensor on the device has answered.
        current_device = torch._C._cuda_getDevice
    launch, packs = compiled.run, False
    fixed = (compiled.packed_metadata, None, None, None)  # no metadata for hooks, and no hooks
    if _only_appends(launch):
        fixed = (launch.launch_cooperative_grid, launch.launch_pdl, *fixed, None, None)  # and no scratch memory
        fixed = (*fixed, launch.arg_annotations, launch.kernel_signature)
        launch, packs = launch.launch, True
    where = current_device, driver.active.get_current_stream, driver.active
    return launch, packs, compiled.function, fixed, arguments, programs, *where, compiled


def _only_appends(launch) -> bool:
    """Whether this is the CudaLauncher of Triton 3.7 or later, and does no more than to append arguments of its own."""
    return (
        type(launch).__name__ == "CudaLauncher"
        and hasattr(launch, "kernel_signature")
        and not (launch.global_scratch_size or launch.profile_scratch_size or getattr(launch, "gsan_enabled", False))
    )


def _watched(kernel) -> bool:
    """Whether a hook or a debugger expects launches to pass through Triton's own entry."""
    runtime = knobs.runtime
    try:
        return bool(
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
        )
    except AttributeError:  # someone has put another object in the place of Triton's chain of hooks
        return True


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
    reach = max(math.prod(shape) - 1, *(sum((size - 1) * stride for size, stride in zip(shape, own)) for own in strides))
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


def element_by_element(inputs, outputs) -> tuple[int, tuple] | None:
    """The programs and arguments of a kernel over tensors of one shape; None where a copy must come first.

    The arguments are the tensors' row strides, their column strides, `n_rows`, `n_columns`, BLOCK_ROWS, BLOCK_COLUMNS and
    USE_INT64.
    """
    chosen = plan(outputs[0].shape, tuple(tensor.stride() for tensor in (*inputs, *outputs)))
    if chosen is None:
        return None
    sizes = chosen.n_rows, chosen.n_columns
    tile = chosen.block_rows, chosen.block_columns, chosen.use_int64
    return chosen.programs, (*chosen.row_strides, *chosen.column_strides, *sizes, *tile)


def _read_only(tensor):
    """The tensor for Triton, which calls `data_ptr`: one made by `torch._lazy_clone` as a plain tensor over its memory."""
    if not torch._C._is_cow_tensor(tensor):
        return tensor
    offset = tensor.storage_offset()
    start = address_of(tensor) - offset * tensor.itemsize
    storage = torch._C._construct_storage_from_data_pointer(start, tensor.device, tensor.untyped_storage().nbytes())
    return tensor.new_empty(0).set_(storage, offset, tensor.shape, tensor.stride())


_launchers: weakref.WeakSet["Launcher"] = weakref.WeakSet()


def _forget_kept():
    """In the child of a fork, which a CUDA context does not survive, nor do the functions loaded into it."""
    for launcher in _launchers:
        launcher.kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_kept)


class Launcher:
    """A kernel with its constants, called with tensors on one device; what it compiles is kept.

    The kernel takes the tensors, what `arrange(inputs, outputs)` gives beside the number of programs, and the constants.

    Triton's own `kernel[grid](...)` looks up its compilation by every argument, at several times the cost of the launch. The
    key here is what that lookup sees: device, shape, strides, dtypes, and each pointer's offset from 16 bytes (sizes, their
    divisibility and the width of offsets follow from the shape). The first launch of a key goes through `kernel[grid]`,
    and so does each that hooks watch, that is meant for another device than the current one, or whose driver has changed.

    With `layouts_follow`, all shapes are the first input's, and the outputs' strides and dtypes follow from the inputs'.
    """

    def __init__(self, kernel, *constants, arrange=element_by_element, layouts_follow=True):
        self.kernel = kernel
        self.constants = constants
        self.arrange = arrange
        self.layouts_follow = layouts_follow
        self.kept: dict[tuple, tuple] = {}
        _launchers.add(self)

    def __call__(self, inputs, outputs):
        """Run over `inputs`, writing `outputs`."""
        first = inputs[0]
        device = first.get_device()
        key = [device, first.shape]
        pointers = []
        for tensor in inputs:
            pointer = address_of(tensor)
            pointers.append(pointer)
            key += tensor.dtype, tensor.stride(), pointer & 15
        for tensor in outputs:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            key.append(pointer & 15)
        if not self.layouts_follow:
            for tensor in (*inputs, *outputs):
                key += tensor.shape, tensor.stride(), tensor.dtype
        key = tuple(key)
        kept = self.kept.get(key)
        if kept is not None:
            launch, packs, function, fixed, arguments, programs, current_device, current_stream, compiled_for, _ = kept
            if current_device() == device and driver.active is compiled_for and not _watched(self.kernel):
                if packs:
                    launch(programs, 1, 1, current_stream(device), function, *fixed, (*pointers, *arguments))
                else:
                    launch(programs, 1, 1, current_stream(device), function, *fixed, *pointers, *arguments)
                return
        self._launch(key, inputs, outputs)

    def _launch(self, key, inputs, outputs):
        """Through `kernel[grid]`, keeping the compilation; what no plan covers is copied first."""
        if outputs[0].numel() == 0:
            return
        arranged = self.arrange(inputs, outputs)
        if arranged is None:
            assert self.arrange(outputs, outputs) is not None, "the outputs must amount to rows and columns"
            strides = outputs[0].stride()
            dense = (
                tensor if tensor.stride() == strides else torch.empty_like(outputs[0], dtype=tensor.dtype).copy_(tensor)
                for tensor in inputs
            )
            return self(tuple(dense), outputs)
        programs, arguments = arranged
        arguments += self.constants
        with _on_device_of(outputs[0]):
            # ATen's kernels are compiled with fused multiply-add, and Triton has announced another default.
            options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
            compiled = self.kernel[(programs,)](*map(_read_only, inputs), *outputs, *arguments, **options)
            if KEEPS_COMPILATIONS and compiled is not None and driver.active.get_current_device() == key[0]:
                if len(self.kept) >= MAX_KEPT:
                    self.kept.clear()
                self.kept[key] = _keep(compiled, programs, arguments)
