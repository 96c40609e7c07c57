"""Binary losses: forward, backward and double backward, one kernel each, with the reduction inside.

elements         L = v·ℓ(x)        v = weight·α_t, and 0 where the target is ignored; ℓ is that of maths.py
forward          L, ΣL, or ΣL/n for the n targets that are not ignored
backward         grad_x = d·L'     d = grad_output, divided by n for a mean
double backward  for w, the gradient that reaches grad_x:
                 to x: w·d·L"      to grad_output: w·L', summed up and divided as L is

The target is smoothed as it is loaded, and may be of any dtype; weights are read through the strides of what they broadcast
to. A sum is taken in two stages, in fp32 (fp64 for fp64): each program adds up its tiles, and one program adds up those sums,
in an order that depends on shapes, strides and dtypes only. What a single program can do alone takes one stage.

`options` have gamma, alpha, label_smoothing, ignore_index and reduction; alpha and ignore_index may be None.
"""

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from . import maths
from .launch import SIZES, Launcher, load_as_stored, load_tile, plan, select_tile, store_tile

# A sum has as many programs at most: enough to fill a large GPU, few enough for one program to add up what they leave.
MAX_PROGRAMS = 2048
# A single program saves a launch, and is as fast for few tiles.
TILES_OF_A_SINGLE_PROGRAM = 4
FOLD_BLOCK = 1024
NONE, SUM, MEAN = map(tl.constexpr, range(3))
REDUCTIONS = {"none": NONE.value, "sum": SUM.value, "mean": MEAN.value}


def is_counted(options):
    """Whether the divisor is known to the device only."""
    return options.reduction == "mean" and options.ignore_index is not None


@triton.jit
def load_example(
    pointers,
    row_strides,
    column_strides,
    tile,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """x, the target as it is stored, v, and the positive and the negative part of the target."""
    x = load_tile(pointers[0], row_strides[0], column_strides[0], tile)
    target = load_as_stored(pointers[1], row_strides[1], column_strides[1], tile)
    positive = target.to(x.dtype)
    negative = 1.0 - positive
    if SMOOTHING != 0.0:
        keep, spread = maths.constant(1.0 - SMOOTHING, x), maths.constant(0.5 * SMOOTHING, x)
        positive = positive * keep + spread
        negative = negative * keep + spread
    v = maths.constant(1.0, x)
    if ALPHA is not None:
        v = maths.constant(ALPHA, x) * positive + maths.constant(1.0 - ALPHA, x) * negative
    if HAS_WEIGHT:
        v = v * load_tile(pointers[2], row_strides[2], column_strides[2], tile).to(x.dtype)
    if HAS_POS_WEIGHT:
        positive = positive * load_tile(pointers[3], row_strides[3], column_strides[3], tile).to(x.dtype)
    return x, target, v, positive, negative


@triton.jit
def is_ignored(target, IGNORE: tl.constexpr):
    if target.dtype.is_floating():
        target = maths.upcast(target)
    return target == maths.constant(IGNORE, target)


@triton.jit
def without_ignored(value, target, IGNORE: tl.constexpr):
    if IGNORE is not None:
        value = tl.where(is_ignored(target, IGNORE), 0.0, value)
    return value


@triton.jit
def divisor(count_ptr, n_rows, n_columns, like, IGNORE: tl.constexpr):
    """How many targets are not ignored, as a number of the arithmetic's dtype."""
    if IGNORE is not None:
        return tl.load(count_ptr).to(like.dtype)
    else:
        n_elements = n_columns.to(tl.int64)
        if n_rows is not None:
            n_elements *= n_rows
        return n_elements.to(like.dtype)


@triton.jit
def divided(value, by):
    if value.dtype == tl.float64:
        return value / by
    else:
        return tl.div_rn(value, by)


@triton.jit(do_not_specialize=[*SIZES, "n_tiles"])
def loss_forward_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    output_ptr,
    count_ptr,
    x_row_stride,
    target_row_stride,
    weight_row_stride,
    pos_weight_row_stride,
    output_row_stride,
    x_column_stride,
    target_column_stride,
    weight_column_stride,
    pos_weight_column_stride,
    output_column_stride,
    n_rows,
    n_columns,
    n_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Reduced, `output` and `count` are of each program."""
    ROUND: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    pointers = x_ptr, target_ptr, weight_ptr, pos_weight_ptr
    row_strides = x_row_stride, target_row_stride, weight_row_stride, pos_weight_row_stride
    column_strides = x_column_stride, target_column_stride, weight_column_stride, pos_weight_column_stride
    zeros = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), x_ptr.dtype.element_ty))
    total = zeros
    total_of_tails = tl.sum(zeros)
    n_counted = tl.full((), 0, tl.int64)
    for index in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        for TAIL in tl.static_range(2):
            present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, index)
            if present:
                x, target, v, positive, negative = load_example(
                    pointers, row_strides, column_strides, tile, HAS_WEIGHT, HAS_POS_WEIGHT, ALPHA, SMOOTHING
                )
                loss = without_ignored(maths.weighted_loss(v, x, positive, negative, GAMMA, 0, ROUND), target, IGNORE)
                _, _, _, mask = tile
                if REDUCTION == NONE:
                    store_tile(output_ptr, output_row_stride, output_column_stride, tile, loss)
                elif TAIL:
                    total_of_tails += tl.sum(tl.where(mask, loss, 0.0))
                else:
                    total += tl.where(mask, loss, 0.0)
                if REDUCTION == MEAN and IGNORE is not None:
                    counts = tl.where(is_ignored(target, IGNORE), 0, mask.to(tl.int32))
                    n_counted += tl.sum(counts).to(tl.int64)
    if REDUCTION != NONE:
        result = tl.sum(total) + total_of_tails
        if REDUCTION == MEAN:
            if IGNORE is None:
                result = divided(result, divisor(count_ptr, n_rows, n_columns, result, IGNORE))
            else:
                tl.store(count_ptr + tl.program_id(0), n_counted)
        tl.store(output_ptr + tl.program_id(0), result)


@triton.jit(do_not_specialize=SIZES)
def loss_backward_kernel(
    grad_output_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    count_ptr,
    grad_x_ptr,
    grad_output_row_stride,
    x_row_stride,
    target_row_stride,
    weight_row_stride,
    pos_weight_row_stride,
    grad_x_row_stride,
    grad_output_column_stride,
    x_column_stride,
    target_column_stride,
    weight_column_stride,
    pos_weight_column_stride,
    grad_x_column_stride,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    ROUND: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    pointers = x_ptr, target_ptr, weight_ptr, pos_weight_ptr
    row_strides = x_row_stride, target_row_stride, weight_row_stride, pos_weight_row_stride
    column_strides = x_column_stride, target_column_stride, weight_column_stride, pos_weight_column_stride
    for TAIL in tl.static_range(2):
        present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            x, target, v, positive, negative = load_example(
                pointers, row_strides, column_strides, tile, HAS_WEIGHT, HAS_POS_WEIGHT, ALPHA, SMOOTHING
            )
            grad = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile).to(x.dtype)
            if REDUCTION == MEAN:
                grad = divided(grad, divisor(count_ptr, n_rows, n_columns, grad, IGNORE))
            grad_x = without_ignored(maths.weighted_loss(grad * v, x, positive, negative, GAMMA, 1, ROUND), target, IGNORE)
            store_tile(grad_x_ptr, grad_x_row_stride, grad_x_column_stride, tile, grad_x)


@triton.jit(do_not_specialize=[*SIZES, "n_tiles"])
def loss_double_backward_kernel(
    w_ptr,
    grad_output_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    count_ptr,
    to_x_ptr,
    to_grad_output_ptr,
    w_row_stride,
    grad_output_row_stride,
    x_row_stride,
    target_row_stride,
    weight_row_stride,
    pos_weight_row_stride,
    to_x_row_stride,
    to_grad_output_row_stride,
    w_column_stride,
    grad_output_column_stride,
    x_column_stride,
    target_column_stride,
    weight_column_stride,
    pos_weight_column_stride,
    to_x_column_stride,
    to_grad_output_column_stride,
    n_rows,
    n_columns,
    n_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_POS_WEIGHT: tl.constexpr,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Reduced, `to_grad_output` is of each program."""
    ROUND: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    pointers = x_ptr, target_ptr, weight_ptr, pos_weight_ptr
    row_strides = x_row_stride, target_row_stride, weight_row_stride, pos_weight_row_stride
    column_strides = x_column_stride, target_column_stride, weight_column_stride, pos_weight_column_stride
    zeros = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), x_ptr.dtype.element_ty))
    total = zeros
    total_of_tails = tl.sum(zeros)
    for index in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        for TAIL in tl.static_range(2):
            present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, index)
            if present:
                x, target, v, positive, negative = load_example(
                    pointers, row_strides, column_strides, tile, HAS_WEIGHT, HAS_POS_WEIGHT, ALPHA, SMOOTHING
                )
                w = load_tile(w_ptr, w_row_stride, w_column_stride, tile).to(x.dtype)
                grad = load_tile(grad_output_ptr, grad_output_row_stride, grad_output_column_stride, tile).to(x.dtype)
                if REDUCTION == MEAN:
                    w = divided(w, divisor(count_ptr, n_rows, n_columns, w, IGNORE))
                to_x = maths.weighted_loss(w * grad * v, x, positive, negative, GAMMA, 2, ROUND)
                store_tile(to_x_ptr, to_x_row_stride, to_x_column_stride, tile, without_ignored(to_x, target, IGNORE))
                to_grad = without_ignored(maths.weighted_loss(w * v, x, positive, negative, GAMMA, 1, ROUND), target, IGNORE)
                _, _, _, mask = tile
                if REDUCTION == NONE:
                    store_tile(to_grad_output_ptr, to_grad_output_row_stride, to_grad_output_column_stride, tile, to_grad)
                elif TAIL:
                    total_of_tails += tl.sum(tl.where(mask, to_grad, 0.0))
                else:
                    total += tl.where(mask, to_grad, 0.0)
    if REDUCTION != NONE:
        tl.store(to_grad_output_ptr + tl.program_id(0), tl.sum(total) + total_of_tails)


@triton.jit(do_not_specialize=["n_partials"])
def fold_kernel(sums_ptr, counts_ptr, output_ptr, count_ptr, n_partials, HAS_COUNTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Adds up what the programs left; divides it by what they have counted, which is stored too."""
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros((BLOCK_SIZE,), sums_ptr.dtype.element_ty)
    counts = tl.zeros((BLOCK_SIZE,), tl.int64)
    for start in range(0, n_partials, BLOCK_SIZE):
        mask = start + offsets < n_partials
        sums += tl.load(sums_ptr + start + offsets, mask=mask, other=0.0)
        if HAS_COUNTS:
            counts += tl.load(counts_ptr + start + offsets, mask=mask, other=0)
    result = tl.sum(sums)
    if HAS_COUNTS:
        n_counted = tl.sum(counts)
        tl.store(count_ptr, n_counted)
        result = divided(result, n_counted.to(result.dtype))
    tl.store(output_ptr, result)


@lru_cache(maxsize=4096)
def walk(shape, strides, position):
    """The plan for tensors of these strides in the order of the one at `position`, and the programs of a sum over them."""
    chosen = plan(shape, (*strides, strides[position]))
    if chosen is None:
        return None
    tiles = chosen.programs
    programs = 1 if tiles <= TILES_OF_A_SINGLE_PROGRAM else min(tiles, MAX_PROGRAMS)
    return chosen._replace(row_strides=chosen.row_strides[:-1], column_strides=chosen.column_strides[:-1]), programs


def walk_of(tensors, position):
    return walk(tensors[position].shape, tuple(tensor.stride() for tensor in tensors), position)


def _arrange(inputs, outputs, n_inputs, n_outputs, position, summed):
    """The first n_inputs and n_outputs are of the full shape; where there is a sum, the last full output has no strides."""
    chosen, programs = walk_of((*inputs[:n_inputs], *outputs[:n_outputs]), position)
    none = (None,) if summed else ()
    strides = *chosen.row_strides, *none, *chosen.column_strides, *none
    tile = chosen.block_rows, chosen.block_columns, chosen.use_int64
    if not summed:
        programs = chosen.programs
    return programs, (*strides, chosen.n_rows, chosen.n_columns, chosen.programs, *tile)


def _arrange_backward(inputs, outputs):
    chosen, _ = walk_of((*inputs[:5], *outputs), 1)
    tile = chosen.block_rows, chosen.block_columns, chosen.use_int64
    return chosen.programs, (*chosen.row_strides, *chosen.column_strides, chosen.n_rows, chosen.n_columns, *tile)


# Constants are compiled in: who changes gamma at every step compiles at every step.
@lru_cache(maxsize=256)
def _launchers(options, has_weight, has_pos_weight):
    of_elements = options.gamma, options.alpha, options.label_smoothing, options.ignore_index
    constants = has_weight, has_pos_weight, *of_elements, REDUCTIONS[options.reduction]
    summed = options.reduction != "none"
    forward = partial(_arrange, n_inputs=4, n_outputs=1 - summed, position=0, summed=summed)
    double_backward = partial(_arrange, n_inputs=6, n_outputs=2 - summed, position=2, summed=summed)
    return (
        Launcher(loss_forward_kernel, *constants, arrange=forward, layouts_follow=False),
        Launcher(loss_backward_kernel, *constants, arrange=_arrange_backward, layouts_follow=False),
        Launcher(loss_double_backward_kernel, *constants, arrange=double_backward, layouts_follow=False),
    )


def _arrange_fold(inputs, outputs):
    return 1, (len(inputs[0]),)


_fold = [Launcher(fold_kernel, counts, FOLD_BLOCK, arrange=_arrange_fold, layouts_follow=False) for counts in (False, True)]


def _walkable(full, position, outputs=()):
    """The tensors, some of them as copies where no plan covers all of them and the outputs."""
    if walk_of((*full, *outputs), position) is not None:
        return full
    x = full[position]
    if x.stride() != torch.empty_like(x, device="meta").stride():
        x = torch.empty_like(x).copy_(x)
    copies = [
        x
        if tensor is full[position]
        else tensor
        if walk_of((x, tensor, *outputs), 0) is not None
        else _materialised(tensor, x, broadcast_inside=True)
        for tensor in full
    ]
    if walk_of((*copies, *outputs), position) is None:
        copies = [tensor if tensor is x or not any(tensor.stride()) else _materialised(tensor, x, False) for tensor in copies]
    return copies


def _materialised(tensor, x, broadcast_inside):
    """A copy in the order of x's memory; with broadcast_inside not of the innermost dimensions that are broadcast."""
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    n_kept = x.dim()
    if broadcast_inside:
        n_kept = 1 + max((i for i, d in enumerate(order) if tensor.stride(d) and tensor.shape[d] > 1), default=-1)
    tensor = tensor.permute(order)[(slice(None),) * n_kept + (slice(1),) * (x.dim() - n_kept)].contiguous()
    return tensor.permute([order.index(d) for d in range(x.dim())]).expand(x.shape)


def _broadcast(x, target, weight, pos_weight):
    """Tensors of x's shape; x itself in place of a weight that is not there."""
    if target.dtype is torch.bool:
        target = target.view(torch.uint8)
    return [x, target, *(x if each is None else each.expand(x.shape) for each in (weight, pos_weight))]


def partials(x, programs):
    """Memory for what each program sums up over x."""
    return torch.empty(programs, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32, device=x.device)


def folded(sums, dtype):
    """The sum of what the programs left."""
    output = torch.empty((), dtype=dtype, device=sums.device)
    _fold[False]((sums, sums), (output, output))
    return output


def loss_forward(x, target, weight, pos_weight, options, dtype):
    """The loss in `dtype`, and the count of targets that a mean with ignored ones is divided by, else None."""
    full = _broadcast(x, target, weight, pos_weight)
    forward, _, _ = _launchers(options, weight is not None, pos_weight is not None)
    if options.reduction == "none":
        output = torch.empty_like(x, dtype=dtype)
        forward(_walkable(full, 0, (output,)), (output, output))
        return output, None
    full = _walkable(full, 0)
    _, programs = walk_of(full, 0)
    output = torch.empty((), dtype=dtype, device=x.device)
    if is_counted(options):
        sums, counts = partials(x, programs), torch.empty(programs, dtype=torch.int64, device=x.device)
        count = torch.empty((), dtype=torch.int64, device=x.device)
        forward(full, (sums, counts))
        _fold[True]((sums, counts), (output, count))
        return output, count
    if programs == 1:
        forward(full, (output, output))
        return output, None
    sums = partials(x, programs)
    forward(full, (sums, sums))
    return folded(sums, dtype), None


def loss_backward(grad_output, x, target, weight, pos_weight, count, options):
    """The gradient of x."""
    grad_x = torch.empty_like(x)
    full = [grad_output.expand(x.shape), *_broadcast(x, target, weight, pos_weight)]
    _, backward, _ = _launchers(options, weight is not None, pos_weight is not None)
    backward((*_walkable(full, 1, (grad_x,)), x if count is None else count), (grad_x,))
    return grad_x


def loss_double_backward(w, grad_output, x, target, weight, pos_weight, count, options):
    """The gradients that reach `grad_output` and x."""
    to_x = torch.empty_like(x)
    full = [w, grad_output.expand(x.shape), *_broadcast(x, target, weight, pos_weight)]
    _, _, double_backward = _launchers(options, weight is not None, pos_weight is not None)
    count = x if count is None else count
    if options.reduction == "none":
        to_grad_output = torch.empty_like(x, dtype=grad_output.dtype)
        outputs = to_x, to_grad_output
        double_backward((*_walkable(full, 2, outputs), count), outputs)
        return to_grad_output, to_x
    full = _walkable(full, 2, (to_x,))
    _, programs = walk_of((*full, to_x), 2)
    if programs == 1:
        to_grad_output = torch.empty_like(grad_output)
        double_backward((*full, count), (to_x, to_grad_output))
        return to_grad_output, to_x
    sums = partials(x, programs)
    double_backward((*full, count), (to_x, sums))
    return folded(sums, grad_output.dtype), to_x
