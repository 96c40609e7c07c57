"""A program's share of a walk, on the device: which elements it handles, and how it loads and stores them.

A walk sees its tensors, all of one shape, as `n_matrices` matrices of `n_rows` rows and `n_columns` columns, the first two None
where there is one only. The strides of a tensor are three likewise, None where the address does not
change: along an expanded dimension, which is then loaded once and not once an element.

A program handles one tile at a time, in two parts. The body covers the columns up to the last multiple of 16, so the compiler
may prove that neighbouring lanes share their mask and move 16 bytes an access whatever the width. The tail, 16 columns wide,
covers the rest. A program without one of them skips it, by a branch that all its threads take alike.
"""

import triton
import triton.language as tl

from .maths import upcast

TAIL_COLUMNS = tl.constexpr(16)
# A width of 1 or a multiple of 16 is no reason to compile again. (In a tuple they would be: Triton specialises what is inside.)
SIZES = ["n_matrices", "n_rows", "n_columns"]


@triton.jit
def count_blocks(size, BLOCK_SIZE: tl.constexpr, USE_INT64: tl.constexpr):
    """How many blocks cover a size; one just below 2³¹, rounded up, would overflow 32 bits."""
    if size is None:
        return 1
    else:
        return tl.cdiv(size.to(tl.int64) if USE_INT64 else size, BLOCK_SIZE)


@triton.jit
def count_tiles(n_matrices, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, USE_INT64: tl.constexpr):
    n_tiles = count_blocks(n_columns, BLOCK_COLUMNS, USE_INT64)
    if n_rows is not None:
        n_tiles *= count_blocks(n_rows, BLOCK_ROWS, USE_INT64)
    if n_matrices is not None:
        n_tiles *= n_matrices
    return n_tiles


@triton.jit
def count_elements(n_matrices, n_rows, n_columns, like):
    """How many elements a walk covers, as a number of the dtype of `like`."""
    n_elements = n_columns.to(tl.int64)
    if n_rows is not None:
        n_elements *= n_rows
    if n_matrices is not None:
        n_elements *= n_matrices
    return n_elements.to(like.dtype)


@triton.jit
def place_of(
    index, n_matrices, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, USE_INT64: tl.constexpr
):
    """Where the tile of this index lies: its matrix, and its block of rows and of columns."""
    if USE_INT64:
        index = index.to(tl.int64)
    matrix = index * 0
    row_block = index * 0
    column_block = index
    if n_rows is not None:
        column_blocks = count_blocks(n_columns, BLOCK_COLUMNS, USE_INT64)
        row_block = index // column_blocks
        column_block = index % column_blocks
        if n_matrices is not None:
            row_blocks = count_blocks(n_rows, BLOCK_ROWS, USE_INT64)
            matrix = row_block // row_blocks
            row_block = row_block % row_blocks
    return matrix, row_block, column_block


@triton.jit
def select_part(
    place,
    n_matrices,
    n_rows,
    n_columns,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    HAS_TAIL: tl.constexpr = True,
):
    """Select a tile's body or tail: whether it is non-empty, and its matrix, rows, columns and their masks.

    Where the walk as a whole has no tail, every body is non-empty.
    """
    matrix, row_block, column_block = place
    if USE_INT64:
        n_columns = n_columns.to(tl.int64)
    first_column = column_block * BLOCK_COLUMNS
    n_body_columns = n_columns // TAIL_COLUMNS * TAIL_COLUMNS
    if TAIL:
        # Only the last block of a row reaches past n_body_columns.
        end = tl.minimum(n_columns, first_column + BLOCK_COLUMNS)
        present = n_body_columns < end
        columns = (n_body_columns + tl.arange(0, TAIL_COLUMNS))[None, :]
        column_mask = columns < end
    else:
        present = first_column < n_body_columns if HAS_TAIL else tl.full((), 1, tl.int1)
        columns = (first_column + tl.arange(0, BLOCK_COLUMNS))[None, :]
        column_mask = columns < n_body_columns
    if n_rows is None:
        rows = tl.zeros((1, 1), tl.int32)
        row_mask = rows == 0
        return present, (matrix, rows, columns, row_mask, column_mask, column_mask)
    else:
        rows = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = rows < n_rows
        return present, (matrix, rows, columns, row_mask, column_mask, row_mask & column_mask)


@triton.jit
def addresses(pointer, strides, part):
    """Where the part's elements lie, and which of these places exist; a dimension that does not move them has size 1."""
    matrix, rows, columns, row_mask, column_mask, mask = part
    matrix_stride, row_stride, column_stride = strides
    if matrix_stride is not None:
        pointer += matrix * matrix_stride
    if column_stride is None:
        return pointer + (rows * 0 if row_stride is None else rows * row_stride), row_mask
    elif row_stride is None:
        return pointer + columns * column_stride, column_mask
    else:
        return pointer + rows * row_stride + columns * column_stride, mask


@triton.jit
def load(pointer, strides, part):
    """The part's values: floats upcast for arithmetic, integers and bool as they are stored."""
    if strides[1] is None and strides[2] is None:
        value = tl.load(pointer if strides[0] is None else pointer + part[0] * strides[0])
        values = tl.full((1, 1), value, pointer.dtype.element_ty)
    else:
        places, mask = addresses(pointer, strides, part)
        values = tl.load(places, mask=mask)
    if values.dtype.is_floating():
        values = upcast(values)
    return values


@triton.jit
def store(pointer, strides, part, values):
    """Rounds once, to the dtype behind the pointer."""
    places, mask = addresses(pointer, strides, part)
    tl.store(places, values.to(pointer.dtype.element_ty), mask=mask)
