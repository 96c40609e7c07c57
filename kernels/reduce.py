"""The walk that sums: formulas whose results are added up where they are computed, some of them stored on the way.

`total` sums over all elements. Each program adds up its tiles and leaves a partial sum for each term; `fold` adds those up, in
one program. Where one program suffices, it takes one launch.
`along` sums along one dimension, as the gradient of a broadcast operand is: each program adds up tiles that share the elements
of that operand. Where several programs share them, or a second dimension is summed up, torch's `sum` adds their partial sums.

A formula is that of pointwise.py, returning a tuple: first what is stored, then the terms. Sums are fp32 (fp64 for fp64) and no
atomics take part, so their order depends on shapes, strides, dtypes and alignment only: tensors that start on 16 bytes are read
by wider accesses, and each thread then adds up other elements.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launcher, Walk, ceil_div, coalesce, dense_alike, needs_int64, plan, strides_of, tile_shape, with_gaps
from .maths import divided, upcast
from .pointwise import as_constants, load_all, with_formula
from .tiles import TAIL_COLUMNS, count_blocks, count_elements, count_tiles, place_of, select_part, store

FORMULA = None  # `with_formula` gives each kernel its own

# Enough programs to fill a large GPU, few enough for one program to add up what they leave.
MAX_PROGRAMS = 2048
# A single program saves a launch, and is as fast for few tiles.
TILES_OF_A_SINGLE_PROGRAM = 4
FOLD_BLOCK = 1024
# A sum along a dimension is split between programs until there are this many, which keep a large GPU busy.
ENOUGH_PROGRAMS = 1024
# Down columns a program reads 128 neighbours at a time, which leaves rows for its threads to share.
ROWS_TO_SHARE = 8


def total_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    N_INPUTS: tl.constexpr,
    N_SUMS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    GIVEN: tl.constexpr,
    constants,
):
    """The last N_SUMS outputs hold a number a program: its sums, or counts, divided by the number of elements if IS_MEAN."""
    DTYPE: tl.constexpr = inputs[0].dtype.element_ty
    ROUND_TO_16_BIT: tl.constexpr = DTYPE.primitive_bitwidth == 16
    N_STORED: tl.constexpr = len(outputs) - N_SUMS
    totals = ()
    tails = ()
    for i in tl.static_range(N_SUMS):
        if outputs[N_STORED + i].dtype.element_ty.is_int():
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        else:
            zeros = upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), DTYPE))
        totals += (zeros,)
        tails += (tl.sum(zeros),)
    for index in range(
        tl.program_id(0), count_tiles(n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64), tl.num_programs(0)
    ):
        place = place_of(index, n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        for TAIL in tl.static_range(2):
            present, part = select_part(place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
            if present:
                values = load_all(inputs, strides, n_matrices, n_rows, n_columns, part, N_INPUTS, GIVEN)
                results = FORMULA(*values, *constants, ROUND_TO_16_BIT)
                for i in tl.static_range(N_STORED):
                    store(outputs[i], strides[N_INPUTS + i], part, results[i])
                # A tuple is not assigned to by index.
                added = ()
                for i in tl.static_range(N_SUMS):
                    result = results if N_STORED + N_SUMS == 1 else results[N_STORED + i]
                    term = tl.where(part[5], result, 0)
                    added += (tails[i] + tl.sum(term) if TAIL else totals[i] + term,)
                if TAIL:
                    tails = added
                else:
                    totals = added
    for i in tl.static_range(N_SUMS):
        result = tl.sum(totals[i]) + tails[i]
        if IS_MEAN:
            result = divided(result, count_elements(n_matrices, n_rows, n_columns, result))
        tl.store(outputs[N_STORED + i] + tl.program_id(0), result)


def along_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    N_INPUTS: tl.constexpr,
    n_splits,
    n_steps,
    ALONG_COLUMNS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    constants,
):
    """Sums along the columns or the rows, `n_steps` tiles a program.

    The last output holds splits × matrices × rows, or × columns.
    """
    DTYPE: tl.constexpr = inputs[0].dtype.element_ty
    ROUND_TO_16_BIT: tl.constexpr = DTYPE.primitive_bitwidth == 16
    N_STORED: tl.constexpr = len(outputs) - 1
    sums_ptr = outputs[N_STORED]
    program = tl.program_id(0)
    if USE_INT64:
        program = program.to(tl.int64)
    row_blocks = count_blocks(n_rows, BLOCK_ROWS, USE_INT64)
    column_blocks = count_blocks(n_columns, BLOCK_COLUMNS, USE_INT64)
    n_blocks = column_blocks if ALONG_COLUMNS else row_blocks
    if ALONG_COLUMNS:
        split = program % n_splits
        row_block = program // n_splits
        if n_matrices is None:
            matrix = 0
        else:
            matrix = row_block // row_blocks
            row_block = row_block % row_blocks
    else:
        column_block = program % column_blocks
        split = program // column_blocks
        if n_matrices is None:
            matrix = 0
        else:
            matrix = split // n_splits
            split = split % n_splits
    AXIS: tl.constexpr = 1 if ALONG_COLUMNS else 0
    total = upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), DTYPE))
    # Tails come once a row of blocks, so they are summed up at once.
    tails = upcast(tl.zeros((BLOCK_ROWS, 1) if ALONG_COLUMNS else (1, TAIL_COLUMNS), DTYPE))
    for block in range(split * n_steps, tl.minimum(n_blocks, (split + 1) * n_steps)):
        if ALONG_COLUMNS:
            place = matrix, row_block, block
        else:
            place = matrix, block, column_block
        for TAIL in tl.static_range(1 + HAS_TAIL):
            present, part = select_part(
                place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, HAS_TAIL
            )
            if present:
                values = load_all(inputs, strides, n_matrices, n_rows, n_columns, part, N_INPUTS, None)
                results = FORMULA(*values, *constants, ROUND_TO_16_BIT)
                for i in tl.static_range(N_STORED):
                    store(outputs[i], strides[N_INPUTS + i], part, results[i])
                term = tl.where(part[5], results[N_STORED], 0.0)
                if TAIL:
                    tails += tl.sum(term, axis=AXIS, keep_dims=True)
                else:
                    total += term
    total = tl.sum(total, axis=AXIS, keep_dims=True)
    outer = split if n_matrices is None else split * n_matrices + matrix
    if ALONG_COLUMNS:
        _, part = select_part((matrix, row_block, 0), n_matrices, n_rows, n_columns, 0, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        offsets = outer * (1 if n_rows is None else n_rows) + part[1]
        tl.store(sums_ptr + offsets, (total + tails if HAS_TAIL else total).to(sums_ptr.dtype.element_ty), mask=part[3])
    else:
        for TAIL in tl.static_range(1 + HAS_TAIL):
            present, part = select_part(
                (matrix, 0, column_block), n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, HAS_TAIL
            )
            if present:
                result = (tails if TAIL else total).to(sums_ptr.dtype.element_ty)
                tl.store(sums_ptr + outer * n_columns + part[2], result, mask=part[4])


@triton.jit
def fold_kernel(inputs, outputs, n_partials, HAS_COUNTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Adds up what the programs left; divides it by what they have counted, which is stored too."""
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros((BLOCK_SIZE,), inputs[0].dtype.element_ty)
    counts = tl.zeros((BLOCK_SIZE,), tl.int64)
    for start in range(0, n_partials, BLOCK_SIZE):
        mask = start + offsets < n_partials
        sums += tl.load(inputs[0] + start + offsets, mask=mask, other=0.0)
        if HAS_COUNTS:
            counts += tl.load(inputs[1] + start + offsets, mask=mask, other=0)
    result = tl.sum(sums)
    if HAS_COUNTS:
        n_counted = tl.sum(counts)
        tl.store(outputs[1], n_counted)
        result = divided(result, n_counted.to(result.dtype))
    tl.store(outputs[0], result)


def programs_for(n_tiles: int) -> int:
    return 1 if n_tiles <= TILES_OF_A_SINGLE_PROGRAM else min(n_tiles, MAX_PROGRAMS)


def walk_to_sum(inputs, stored) -> Walk | None:
    """The walk over inputs and stored outputs, in the order of the first input; None where copies must come first."""
    existing = [tensor for tensor in inputs if tensor is not None]
    walk = plan(inputs[0].shape, strides_of((*existing, *stored)), leading=0)
    return walk and with_gaps(walk, inputs)


def prepared(inputs, stored=()):
    """The inputs, as copies where no walk covers them, and how many programs will sum over them."""
    walk = walk_to_sum(inputs, stored)
    if walk is None:
        inputs = dense_alike(inputs, inputs[0])
        walk = walk_to_sum(inputs, stored)
    return inputs, programs_for(walk.tiles)


def total(formula, *constants, n_sums=1, is_mean=False, given=None):
    """The launcher of a formula whose last `n_sums` results are summed up over all elements.

    Called with `prepared` inputs, and as its last outputs with memory for as many partial sums each as there are programs. The
    sums are divided by the number of elements if `is_mean`. For `given` see pointwise.py.
    """

    def arrange(inputs, outputs):
        walk = walk_to_sum(inputs, outputs[:-n_sums])
        return programs_for(walk.tiles), (*walk.arguments, len(inputs), n_sums, is_mean, given)

    return Launcher(with_formula(total_kernel, formula), as_constants(constants), arrange=arrange, layouts_follow=False)


def _arrange_fold(inputs, outputs):
    return 1, (len(inputs[0]), len(inputs) > 1)


_fold = Launcher(fold_kernel, FOLD_BLOCK, arrange=_arrange_fold, layouts_follow=False)


def partial_sums(x, programs):
    """Memory for what each program sums up over x."""
    return torch.empty(programs, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32, device=x.device)


def fold(sums, output, counts=None, count=None):
    """Write the sum of the partial sums to `output`; with `counts`, divided by their sum, which goes to `count`."""
    if counts is None:
        _fold((sums,), (output,))
    else:
        _fold((sums, counts), (output, count))


class Along(NamedTuple):
    """A walk whose terms are summed along its columns or its rows."""

    walk: Walk
    along_columns: bool
    steps: int
    splits: int
    # The sizes of the matrices and of the rows or columns that are left, and which of these are summed up as well.
    kept: tuple[int, int]
    also_summed: tuple[bool, bool]

    @property
    def programs(self) -> int:
        n_matrices, row_blocks, column_blocks = self.walk.blocks
        return n_matrices * self.splits * (row_blocks if self.along_columns else column_blocks)


@lru_cache(maxsize=4096)
def plan_along(shape, strides) -> Along | None:
    """How to sum over a walk along the dimensions in which the last tensor does not move, in the order of the first one."""
    sizes, steps = coalesce(shape, strides, leading=0)
    summed = [own[-1] == 0 for own in steps]
    if len(sizes) > 3 or not any(summed):
        return None
    dims = list(range(len(sizes)))
    if not summed[-1] and len(dims) > 2 and not summed[-2]:
        dims = [1, 0, 2]
    sizes, steps, summed = ([values[d] for d in dims] for values in (sizes, steps, summed))
    along_columns = summed[-1]
    missing = 3 - len(sizes)
    n_matrices, n_rows, n_columns = sizes = (1,) * missing + tuple(sizes)
    of_each = tuple((None,) * missing + tuple(stride or None for stride in own) for own in zip(*steps))
    tile = tile_shape(n_matrices * n_rows, n_columns, narrowed=1 if along_columns else ROWS_TO_SHARE)
    walk = Walk((None,) * missing + sizes[missing:], of_each, *tile, needs_int64(shape, strides))
    _, row_blocks, column_blocks = walk.blocks
    n_blocks, others = (column_blocks, row_blocks) if along_columns else (row_blocks, column_blocks)
    n_steps = ceil_div(n_blocks, min(n_blocks, ceil_div(ENOUGH_PROGRAMS, others * n_matrices)))
    summed = (False,) * missing + tuple(summed)
    kept, also = (n_rows, summed[1]) if along_columns else (n_columns, False)
    return Along(walk, along_columns, n_steps, ceil_div(n_blocks, n_steps), (n_matrices, kept), (summed[0], also))


def along(formula, *constants):
    """The launcher of a formula whose last result is summed up along the dimensions in which the last input does not move.

    Called by `sum_along`.
    """

    def arrange(inputs, outputs):
        planned = plan_along(outputs[0].shape, strides_of((*outputs[:-1], *inputs)))
        walk, n_stored = planned.walk, len(outputs) - 1
        walk = walk._replace(strides=(*walk.strides[n_stored:], *walk.strides[:n_stored]))
        has_tail = walk.sizes[2] % TAIL_COLUMNS.value != 0
        return planned.programs, (*walk.arguments, len(inputs), planned.splits, planned.steps, planned.along_columns, has_tail)

    return Launcher(with_formula(along_kernel, formula), as_constants(constants), arrange=arrange, layouts_follow=False)


def sum_along(launcher, inputs, stored, broadcast):
    """Launch over inputs of one shape, of which the last is `broadcast` expanded; returns the sum in the shape of `broadcast`.

    None, without a launch, where no walk covers the tensors. No dimension of `broadcast` may itself be expanded.
    """
    leading = stored[0]
    planned = plan_along(leading.shape, strides_of((*stored, *inputs)))
    if planned is None:
        return None
    summed = (planned.splits > 1, *planned.also_summed)
    wide = torch.float64 if broadcast.dtype is torch.float64 else torch.float32
    dtype = wide if any(summed) else broadcast.dtype
    sums = torch.empty(planned.splits, *planned.kept, dtype=dtype, device=leading.device)
    launcher(inputs, (*stored, sums))
    if any(summed):
        sums = sums.sum([d for d, summed_up in enumerate(summed) if summed_up]).to(broadcast.dtype)
    # What is left lies in the storage order of the walk.
    order = sorted(range(leading.dim()), key=lambda d: -leading.stride(d))
    return sums.view([broadcast.shape[d] for d in order]).permute([order.index(d) for d in range(leading.dim())])
