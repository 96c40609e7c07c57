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
from .launch import Launcher, plan
from .pointwise import pointwise
from .reduce import programs_for
from .tiles import SIZES, addresses, count_tiles, load, place_of, select_part

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


@triton.jit(do_not_specialize=SIZES)
def activation_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
):
    """f'(x) is the KIND's derivative at SCALE·x.

    `strides` are those of x and of `alive`, which does not move where x has more elements than units.
    """
    x_ptr, bounds_ptr = inputs
    partials_ptr, alive_ptr = outputs
    zero = tl.full((), 0.0, tl.float64)
    n = zero
    n_saturated = zero
    n_lost = zero
    sum_of_slopes = zero
    smallest = tl.full((), float("inf"), tl.float64)
    for index in range(
        tl.program_id(0), count_tiles(n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64), tl.num_programs(0)
    ):
        place = place_of(index, n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        for TAIL in tl.static_range(2):
            present, part = select_part(place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
            if present:
                mask = part[5]
                x = load(x_ptr, strides[0], part)
                scaled = x if SCALE == 1.0 else maths.constant(SCALE, x) * x
                slope = tl.abs(derivative(scaled, KIND)).to(tl.float64)
                saturated = within(x, bounds_ptr) & mask
                n += count(mask)
                n_saturated += count(saturated)
                n_lost += count(within(x, bounds_ptr + 4) & mask)
                sum_of_slopes += tl.sum(tl.where(mask, slope, 0.0))
                # A NaN is no minimum, on any device.
                smallest = tl.minimum(smallest, tl.min(tl.where(mask & (slope >= 0.0), slope, float("inf"))))
                alive = (mask & (saturated == 0)).to(tl.int32)
                if strides[1][1] is None:
                    alive = tl.max(alive, axis=0, keep_dims=True)
                if strides[1][2] is None:
                    alive = tl.max(alive, axis=1, keep_dims=True)
                places, _ = addresses(alive_ptr, strides[1], part)
                # Programs that share a unit store the same 1.
                tl.store(places, alive.to(tl.float32), mask=alive == 1)
    partials_ptr += tl.program_id(0) * ACTIVATION_COLUMNS
    tl.store(partials_ptr, n)
    tl.store(partials_ptr + 1, n_saturated)
    tl.store(partials_ptr + 2, n_lost)
    tl.store(partials_ptr + 3, sum_of_slopes)
    tl.store(partials_ptr + 4, smallest)


@triton.jit(do_not_specialize=SIZES)
def squares_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    squares = tl.full((), 0.0, tl.float64)
    n = tl.full((), 0.0, tl.float64)
    n_not_finite = tl.full((), 0.0, tl.float64)
    for index in range(
        tl.program_id(0), count_tiles(n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64), tl.num_programs(0)
    ):
        place = place_of(index, n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        for TAIL in tl.static_range(2):
            present, part = select_part(place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
            if present:
                mask = part[5]
                g = load(inputs[0], strides[0], part).to(tl.float64)
                finite = tl.abs(g) < float("inf")
                squares += tl.sum(tl.where(mask & finite, g * g, 0.0))
                n += count(mask)
                n_not_finite += count(mask & (finite == 0))
    partials_ptr = outputs[0] + tl.program_id(0) * SQUARES_COLUMNS
    tl.store(partials_ptr, squares)
    tl.store(partials_ptr + 1, n)
    tl.store(partials_ptr + 2, n_not_finite)


@triton.jit(do_not_specialize=["n_partials"])
def add_to_totals_kernel(
    inputs, outputs, n_partials, N_SUMS: tl.constexpr, HAS_MINIMUM: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Adds each column of the partials to its total; the last column is a minimum where HAS_MINIMUM."""
    (partials_ptr,) = inputs
    (totals_ptr,) = outputs
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


@triton.jit
def streak_formula(alive, streak, ROUND_TO_16_BIT: tl.constexpr):
    """`alive` cleared for the next batch; one batch more for a unit in which nothing was alive, none for the others."""
    return alive * 0.0, tl.where(alive > 0.0, 0.0, streak + 1.0)


def _activation_walk(x):
    """Over (outer, units, inner), along with a number for each unit."""
    return plan(x.shape, (x.stride(), (0, 1, 0)), leading=0)


def _arrange_activation(inputs, outputs):
    walk = _activation_walk(inputs[0])
    return programs_for(walk.tiles), walk.arguments


def _squares_walk(g):
    return plan(g.shape, (g.stride(),))


def _arrange_squares(inputs, outputs):
    walk = _squares_walk(inputs[0])
    return programs_for(walk.tiles), walk.arguments


def _arrange_fold(inputs, outputs):
    return 1, (len(inputs[0]),)


@lru_cache(maxsize=64)
def _activation(kind, scale):
    return Launcher(activation_kernel, DERIVATIVES.index(kind), scale, arrange=_arrange_activation)


_squares = Launcher(squares_kernel, arrange=_arrange_squares)
_fold_activation = Launcher(add_to_totals_kernel, ACTIVATION_COLUMNS.value - 1, True, FOLD_BLOCK, arrange=_arrange_fold)
_fold_squares = Launcher(add_to_totals_kernel, SQUARES_COLUMNS.value, False, FOLD_BLOCK, arrange=_arrange_fold)
_streak = pointwise(streak_formula)


def _partials(x, walk, columns):
    return torch.empty(programs_for(walk.tiles), columns.value, dtype=torch.float64, device=x.device)


def add_activation(x, kind, bounds, totals, alive, streak, scale=1.0):
    """Add what an activation's input tells to `totals`, and a batch to the `streak` of each unit that saturated throughout.

    `x` is (outer, units, inner), and f'(x) the derivative of `kind` at scale·x; `bounds` are its BOUNDS in the dtype of the
    arithmetic; `totals` are ACTIVATION_COLUMNS fp64 numbers; `alive` (zeros) and `streak` are fp32, one a unit.
    """
    partials = _partials(x, _activation_walk(x), ACTIVATION_COLUMNS)
    _activation(kind, scale)((x, bounds), (partials, alive))
    _fold_activation((partials,), (totals,))
    _streak((alive, streak), (alive, streak))


def add_squares(g, totals):
    """Add what a gradient tells to `totals`, SQUARES_COLUMNS fp64 numbers."""
    if _squares_walk(g) is None:
        g = g.contiguous()
    partials = _partials(g, _squares_walk(g), SQUARES_COLUMNS)
    _squares((g,), (partials,))
    _fold_squares((partials,), (totals,))
