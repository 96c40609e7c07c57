"""What a watch on gradients adds up: of an activation's input x and its derivative f', and of a gradient.

activation   over all x: how many, how many saturated, how many lost to rounding, Σ|f'(x)|, min |f'(x)|;
             for each unit, whether any x of it is not saturated
squares      over all g: Σg² of the finite ones, how many g, and how many are not finite

Saturated and lost are intervals of x, found beforehand where |f'| crosses a threshold: a comparison is exact where f' in
fp32 is not. Sums are fp64, since the square of a vanishing gradient is no fp32 number. Each program leaves its sums behind,
and one more kernel adds them up in a fixed order: no atomics, so the same tensor gives the same bits.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import maths
from .launch import SIZES, Launcher, load_tile, needs_int64, plan, select_tile, store_tile, tile_shape

# The derivatives, by the number that selects one in a kernel; the first three are numbered as in maths.py.
DERIVATIVES = ("sigmoid", "silu", "logsigmoid", "tanh", "relu", "hardsigmoid")
TANH, RELU = tl.constexpr(3), tl.constexpr(4)
# Columns of what an activation leaves: count, saturated, lost, Σ|f'|, min |f'|. Of a gradient: Σg², count, not finite.
ACTIVATION_COLUMNS = tl.constexpr(5)
SQUARES_COLUMNS = tl.constexpr(3)
# Two intervals each of saturated and of lost x, as [from, to] pairs.
BOUNDS = 8
FOLD_BLOCK = 1024


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """f'(x), which stays finite where x is infinite."""
    if KIND < TANH:
        return maths.weighted(1.0, x, KIND, 1, ROUND_TO_16_BIT=False)
    elif KIND == TANH:
        return 4.0 * maths.weighted(1.0, 2.0 * x, maths.SIGMOID, 1, ROUND_TO_16_BIT=False)
    elif KIND == RELU:
        return tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))
    else:
        return tl.where(tl.abs(x) < 3.0, 1.0 / 6.0, tl.where(tl.abs(x) >= 3.0, 0.0, x))


@triton.jit
def within(x, bounds_ptr):
    """Whether x lies in one of the two intervals."""
    first = (x >= tl.load(bounds_ptr)) & (x <= tl.load(bounds_ptr + 1))
    return first | ((x >= tl.load(bounds_ptr + 2)) & (x <= tl.load(bounds_ptr + 3)))


@triton.jit
def count(mask):
    return tl.sum(mask.to(tl.int32)).to(tl.float64)


@triton.jit(do_not_specialize=[*SIZES, "n_units"])
def activation_kernel(
    x_ptr,
    bounds_ptr,
    partials_ptr,
    alive_ptr,
    x_row_stride,
    x_column_stride,
    n_rows,
    n_columns,
    n_units,
    UNITS_ARE_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
):
    """f'(x) is the KIND's derivative at SCALE·x."""
    zero = tl.full((), 0.0, tl.float64)
    n = zero
    n_saturated = zero
    n_lost = zero
    total = zero
    smallest = tl.full((), float("inf"), tl.float64)
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            rows, columns, _, mask = tile
            x = load_tile(x_ptr, x_row_stride, x_column_stride, tile)
            scaled = x if SCALE == 1.0 else maths.constant(SCALE, x) * x
            slope = tl.abs(derivative(scaled, KIND)).to(tl.float64)
            saturated = within(x, bounds_ptr) & mask
            n += count(mask)
            n_saturated += count(saturated)
            n_lost += count(within(x, bounds_ptr + 4) & mask)
            total += tl.sum(tl.where(mask, slope, 0.0))
            # A NaN is no minimum, on any device.
            smallest = tl.minimum(smallest, tl.min(tl.where(mask & (slope >= 0.0), slope, float("inf"))))
            # Programs that share a unit store the same 1.
            alive = (mask & (saturated == 0)).to(tl.int32)
            if UNITS_ARE_COLUMNS:
                any_alive = tl.max(alive, axis=0, keep_dims=True)
                tl.store(alive_ptr + columns, any_alive.to(tl.float32), mask=any_alive == 1)
            else:
                any_alive = tl.max(alive, axis=1, keep_dims=True)
                tl.store(alive_ptr + rows % n_units, any_alive.to(tl.float32), mask=any_alive == 1)
    partials_ptr += tl.program_id(0) * ACTIVATION_COLUMNS
    tl.store(partials_ptr, n)
    tl.store(partials_ptr + 1, n_saturated)
    tl.store(partials_ptr + 2, n_lost)
    tl.store(partials_ptr + 3, total)
    tl.store(partials_ptr + 4, smallest)


@triton.jit(do_not_specialize=SIZES)
def squares_kernel(
    g_ptr,
    partials_ptr,
    g_row_stride,
    g_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    squares = tl.full((), 0.0, tl.float64)
    n = tl.full((), 0.0, tl.float64)
    n_not_finite = tl.full((), 0.0, tl.float64)
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            _, _, _, mask = tile
            g = load_tile(g_ptr, g_row_stride, g_column_stride, tile).to(tl.float64)
            finite = tl.abs(g) < float("inf")
            squares += tl.sum(tl.where(mask & finite, g * g, 0.0))
            n += count(mask)
            n_not_finite += count(mask & (finite == 0))
    partials_ptr += tl.program_id(0) * SQUARES_COLUMNS
    tl.store(partials_ptr, squares)
    tl.store(partials_ptr + 1, n)
    tl.store(partials_ptr + 2, n_not_finite)


@triton.jit(do_not_specialize=["n_partials"])
def fold_kernel(
    partials_ptr, totals_ptr, n_partials, N_SUMS: tl.constexpr, HAS_MINIMUM: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Adds each column of the partials to its total; the last column is a minimum where HAS_MINIMUM."""
    N_COLUMNS: tl.constexpr = N_SUMS + HAS_MINIMUM
    rows = tl.arange(0, BLOCK_SIZE)
    for column in tl.static_range(N_SUMS):
        sums = tl.zeros((BLOCK_SIZE,), tl.float64)
        for start in range(0, n_partials, BLOCK_SIZE):
            offsets = (start + rows) * N_COLUMNS + column
            sums += tl.load(partials_ptr + offsets, mask=start + rows < n_partials, other=0.0)
        tl.store(totals_ptr + column, tl.load(totals_ptr + column) + tl.sum(sums))
    if HAS_MINIMUM:
        smallest = tl.full((BLOCK_SIZE,), float("inf"), tl.float64)
        for start in range(0, n_partials, BLOCK_SIZE):
            offsets = (start + rows) * N_COLUMNS + N_SUMS
            loaded = tl.load(partials_ptr + offsets, mask=start + rows < n_partials, other=float("inf"))
            smallest = tl.minimum(smallest, loaded)
        tl.store(totals_ptr + N_SUMS, tl.minimum(tl.load(totals_ptr + N_SUMS), tl.min(smallest)))


@triton.jit(do_not_specialize=SIZES)
def streak_kernel(
    alive_ptr,
    streak_ptr,
    new_alive_ptr,
    new_streak_ptr,
    alive_row_stride,
    streak_row_stride,
    new_alive_row_stride,
    new_streak_row_stride,
    alive_column_stride,
    streak_column_stride,
    new_alive_column_stride,
    new_streak_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    """One batch more for a unit in which nothing was alive, none for the others; and `alive` is cleared for the next."""
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            alive = load_tile(alive_ptr, alive_row_stride, alive_column_stride, tile)
            streak = load_tile(streak_ptr, streak_row_stride, streak_column_stride, tile)
            store_tile(new_alive_ptr, new_alive_row_stride, new_alive_column_stride, tile, alive * 0.0)
            streak = tl.where(alive > 0.0, 0.0, streak + 1.0)
            store_tile(new_streak_ptr, new_streak_row_stride, new_streak_column_stride, tile, streak)


def as_matrix(shape: tuple[int, ...], strides: tuple[int, ...]):
    """(outer, units, inner) as a matrix: its sizes, its strides, and whether its columns are the units.

    None if it is none, because outer and units do not lie in one stride.
    """
    (outer, units, inner), (outer_stride, unit_stride, inner_stride) = shape, strides
    if inner == 1:
        return (outer, units), (outer_stride, unit_stride), True
    if outer == 1 or outer_stride == units * unit_stride:
        return (outer * units, inner), (unit_stride, inner_stride), False
    return None


def _tiles(n_rows, n_columns):
    block_rows, block_columns = tile_shape(n_rows, n_columns, transposed=False)
    return block_rows, block_columns, triton.cdiv(n_rows, block_rows) * triton.cdiv(n_columns, block_columns)


def _arrange_activation(inputs, outputs):
    x = inputs[0]
    sizes, strides, units_are_columns = as_matrix(x.shape, x.stride())
    block_rows, block_columns, programs = _tiles(*sizes)
    use_int64 = needs_int64(sizes, (strides,))
    # A column stride of None would stand for an expanded tensor, which is read once a row; here each x counts.
    return programs, (*strides, *sizes, x.shape[1], units_are_columns, block_rows, block_columns, use_int64)


def _squares_plan(g):
    return plan(g.shape, (g.stride(),))


def _arrange_squares(inputs, outputs):
    chosen = _squares_plan(inputs[0])
    strides = *chosen.row_strides, chosen.column_strides[0] or 0
    sizes = chosen.n_rows, chosen.n_columns
    return chosen.programs, (*strides, *sizes, chosen.block_rows, chosen.block_columns, chosen.use_int64)


def _arrange_fold(inputs, outputs):
    return 1, (len(inputs[0]),)


@lru_cache(maxsize=64)
def _activation(kind, scale):
    return Launcher(activation_kernel, DERIVATIVES.index(kind), scale, arrange=_arrange_activation)


_squares = Launcher(squares_kernel, arrange=_arrange_squares)
_fold_activation = Launcher(fold_kernel, ACTIVATION_COLUMNS.value - 1, True, FOLD_BLOCK, arrange=_arrange_fold)
_fold_squares = Launcher(fold_kernel, SQUARES_COLUMNS.value, False, FOLD_BLOCK, arrange=_arrange_fold)
_streak = Launcher(streak_kernel)


def add_activation(x, kind, bounds, totals, alive, streak, scale=1.0):
    """Add what an activation's input tells to `totals`, and a batch to the `streak` of each unit that saturated throughout.

    `x` is (outer, units, inner), and f'(x) the derivative of `kind` at scale·x; `bounds` are its BOUNDS in the dtype of the
    arithmetic; `totals` are ACTIVATION_COLUMNS fp64 numbers; `alive` (zeros) and `streak` are fp32, one a unit.
    """
    matrix = as_matrix(x.shape, x.stride())
    if matrix is None:
        x = x.contiguous()
        matrix = as_matrix(x.shape, x.stride())
    *_, programs = _tiles(*matrix[0])
    partials = torch.empty(programs, ACTIVATION_COLUMNS.value, dtype=torch.float64, device=x.device)
    _activation(kind, scale)((x, bounds), (partials, alive))
    _fold_activation((partials,), (totals,))
    _streak((alive, streak), (alive, streak))


def add_squares(g, totals):
    """Add what a gradient tells to `totals`, SQUARES_COLUMNS fp64 numbers."""
    chosen = _squares_plan(g)
    if chosen is None:
        g = g.contiguous()
        chosen = _squares_plan(g)
    partials = torch.empty(chosen.programs, SQUARES_COLUMNS.value, dtype=torch.float64, device=g.device)
    _squares((g,), (partials,))
    _fold_squares((partials,), (totals,))
