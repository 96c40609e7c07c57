"""The sigmoid loss of all pairs of images and texts, over a block of similarities s: its sum, and its gradient in s.

logit l = scale·s + bias       z = -l for a pair that belongs together, else l
loss      Σ log(1 + e^z)       gradient G = ∂loss/∂l = -σ(z) or σ(z), written over s, with ΣG·s and ΣG

`scale` and `bias` are read on the device. Which column belongs to a row says `labels`; -1 means none.
Each program leaves its sums, in fp32 (fp64 for fp64), for the caller to add up once all chunks of a matrix have left theirs.
"""

import triton
import triton.language as tl

from . import maths
from .launch import SIZES, Launcher, load_tile, select_tile, store_tile
from .losses import walk, walk_of


@triton.jit
def load_pairs(
    similarity_ptr,
    label_ptr,
    scale_ptr,
    bias_ptr,
    similarity_row_stride,
    label_row_stride,
    similarity_column_stride,
    label_column_stride,
    tile,
):
    """s, z, and whether each pair belongs together."""
    similarity = load_tile(similarity_ptr, similarity_row_stride, similarity_column_stride, tile)
    scale = maths.upcast(tl.load(scale_ptr)).to(similarity.dtype)
    bias = maths.upcast(tl.load(bias_ptr)).to(similarity.dtype)
    logit = similarity * scale + bias
    rows, columns, row_mask, _ = tile
    label_ptr += rows if label_row_stride is None else rows * label_row_stride
    together = tl.load(label_ptr, mask=row_mask, other=-1) == columns
    return similarity, tl.where(together, maths.negative(logit), logit), together


@triton.jit(do_not_specialize=[*SIZES, "n_tiles"])
def pairs_forward_kernel(
    similarity_ptr,
    label_ptr,
    scale_ptr,
    bias_ptr,
    sums_ptr,
    similarity_row_stride,
    label_row_stride,
    similarity_column_stride,
    label_column_stride,
    n_rows,
    n_columns,
    n_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    ROUND: tl.constexpr = similarity_ptr.dtype.element_ty.primitive_bitwidth == 16
    total = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), similarity_ptr.dtype.element_ty))
    total_of_tails = tl.sum(total)
    for index in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        for TAIL in tl.static_range(2):
            present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, index)
            if present:
                _, z, _ = load_pairs(
                    similarity_ptr,
                    label_ptr,
                    scale_ptr,
                    bias_ptr,
                    similarity_row_stride,
                    label_row_stride,
                    similarity_column_stride,
                    label_column_stride,
                    tile,
                )
                _, _, _, mask = tile
                loss = tl.where(mask, maths.weighted(-1.0, maths.negative(z), maths.LOGSIGMOID, 0, ROUND), 0.0)
                if TAIL:
                    total_of_tails += tl.sum(loss)
                else:
                    total += loss
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total) + total_of_tails)


@triton.jit(do_not_specialize=[*SIZES, "n_tiles"])
def pairs_gradient_kernel(
    similarity_ptr,
    label_ptr,
    scale_ptr,
    bias_ptr,
    gradient_ptr,
    scale_sums_ptr,
    bias_sums_ptr,
    similarity_row_stride,
    label_row_stride,
    similarity_column_stride,
    label_column_stride,
    n_rows,
    n_columns,
    n_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
):
    """`gradient` may be `similarity`, and has its strides."""
    ROUND: tl.constexpr = similarity_ptr.dtype.element_ty.primitive_bitwidth == 16
    of_scale = maths.upcast(tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), similarity_ptr.dtype.element_ty))
    of_bias = of_scale
    of_scale_in_tails = tl.sum(of_scale)
    of_bias_in_tails = tl.sum(of_scale)
    for index in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        for TAIL in tl.static_range(2):
            present, tile = select_tile(n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64, index)
            if present:
                similarity, z, together = load_pairs(
                    similarity_ptr,
                    label_ptr,
                    scale_ptr,
                    bias_ptr,
                    similarity_row_stride,
                    label_row_stride,
                    similarity_column_stride,
                    label_column_stride,
                    tile,
                )
                gradient = maths.weighted(tl.where(together, -1.0, 1.0), z, maths.SIGMOID, 0, ROUND).to(similarity.dtype)
                store_tile(gradient_ptr, similarity_row_stride, similarity_column_stride, tile, gradient)
                _, _, _, mask = tile
                to_bias = tl.where(mask, gradient, 0.0)
                to_scale = tl.where(mask, gradient * similarity, 0.0)
                if TAIL:
                    of_scale_in_tails += tl.sum(to_scale)
                    of_bias_in_tails += tl.sum(to_bias)
                else:
                    of_scale += to_scale
                    of_bias += to_bias
    tl.store(scale_sums_ptr + tl.program_id(0), tl.sum(of_scale) + of_scale_in_tails)
    tl.store(bias_sums_ptr + tl.program_id(0), tl.sum(of_bias) + of_bias_in_tails)


def _arrange(inputs, outputs):
    chosen, programs = walk_of(inputs[:2], 0)
    tile = chosen.block_rows, chosen.block_columns, chosen.use_int64
    sizes = chosen.n_rows, chosen.n_columns, chosen.programs
    return programs, (*chosen.row_strides, *chosen.column_strides, *sizes, *tile)


_forward = Launcher(pairs_forward_kernel, arrange=_arrange, layouts_follow=False)
_gradient = Launcher(pairs_gradient_kernel, arrange=_arrange, layouts_follow=False)


def programs_of(n_rows, n_columns):
    """How many sums a matrix of this shape leaves behind; no more than one of more rows."""
    _, programs = walk((n_rows, n_columns), ((n_columns, 1), (1, 0)), 0)
    return programs


def pairs_forward(similarity, labels, scale, bias, sums):
    """Leaves sums of log(1 + e^z) over a contiguous matrix of more than one column."""
    _forward((similarity, labels[:, None].expand(similarity.shape), scale, bias), (sums,))


def pairs_gradient(similarity, labels, scale, bias, scale_sums, bias_sums):
    """Writes G over the similarities, and leaves sums of G·s and of G."""
    labels = labels[:, None].expand(similarity.shape)
    _gradient((similarity, labels, scale, bias), (similarity, scale_sums, bias_sums))
