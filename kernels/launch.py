"""Where blocks, warps, strides, offset width, alignment and devices are decided; no other file on the host knows of them.

A launch walks its tensors, all of one shape, as matrices of rows and columns, each tensor with its own three strides, see
tiles.py. Most launches are a single row: tensors that are dense in one common memory format, walked in storage order. A slice,
a `chunk` half or a broadcast operand makes rows or matrices of it, and what needs a fourth dimension is copied.
"""

import contextlib
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from .kept import Cache, keep
from .maths import INTERPRETED
from .tiles import TAIL_COLUMNS

# 1024 elements over 4 warps are 8 a thread: one 16-byte access in 16 bit, two in fp32.
TILE_ELEMENTS = 1024
# The interpreter pays per program more than per element.
INTERPRETED_TILE_ELEMENTS = 65536
NUM_WARPS = 4
INT32_MAX = 2**31 - 1
# For a tensor that is only read: `data_ptr`, all that an older torch has, would copy what `torch._lazy_clone` has made.
address_of = getattr(torch.Tensor, "const_data_ptr", torch.Tensor.data_ptr)

Strides = tuple[int, ...]


def ceil_div(size: int, by: int) -> int:
    """triton.cdiv, which asks for constants of a kernel first, and takes the host longer than a launch."""
    return -(-size // by)


class Walk(NamedTuple):
    """How a kernel walks its tensors, see tiles.py; `strides` holds three a tensor."""

    sizes: tuple[int | None, int | None, int]
    strides: tuple[tuple[int | None, int | None, int | None], ...]
    block_rows: int
    block_columns: int
    use_int64: bool

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The number of matrices, and of blocks of rows and of columns in each."""
        n_matrices, n_rows, n_columns = self.sizes
        return n_matrices or 1, ceil_div(n_rows or 1, self.block_rows), ceil_div(n_columns, self.block_columns)

    @property
    def tiles(self) -> int:
        return math.prod(self.blocks)

    @property
    def arguments(self) -> tuple:
        return self.strides, *self.sizes, self.block_rows, self.block_columns, self.use_int64


def needs_int64(shape: Strides, strides: tuple[Strides, ...]) -> bool:
    """Whether an element's offset in any of the tensors, or an index up to a tile past the end, exceeds 32 bits."""
    reach = max(math.prod(shape) - 1, *(sum((size - 1) * stride for size, stride in zip(shape, own)) for own in strides))
    return reach > INT32_MAX - INTERPRETED_TILE_ELEMENTS


def coalesce(shape: Strides, strides: tuple[Strides, ...], leading: int = -1):
    """The fewest dimensions that address every tensor by strides, outermost first in the storage order of the leading one."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: -strides[leading][d])
    sizes: list[int] = []
    steps: list[Strides] = []
    for d in order:
        step = tuple(own[d] for own in strides)
        if steps and steps[-1] == tuple(shape[d] * inner for inner in step):
            sizes[-1] *= shape[d]
            steps[-1] = step
        else:
            sizes.append(shape[d])
            steps.append(step)
    return sizes or [1], steps or [(1,) * len(strides)]


def tile_shape(n_rows: int, n_columns: int, transposed: bool = False, narrowed: int = 1) -> tuple[int, int]:
    """Rows and columns of a tile: the widest that wastes at most an eighth of its lanes, but no narrower than the tail.

    A tile is square to read a transpose; `narrowed` leaves as many rows at least, for the threads of a program to share.
    """
    large = INTERPRETED and n_rows * n_columns > INTERPRETED_TILE_ELEMENTS // 4
    elements = INTERPRETED_TILE_ELEMENTS if large else TILE_ELEMENTS
    if transposed:
        side = 1 << (elements.bit_length() // 2)
        return elements // side, side
    width = elements // narrowed
    while n_rows > 1 and width > TAIL_COLUMNS.value and ceil_div(n_columns, width) * width * 8 > n_columns * 9:
        width //= 2
    return elements // width, width


@lru_cache(maxsize=4096)
def plan(shape: Strides, strides: tuple[Strides, ...], leading: int = -1) -> Walk | None:
    """The walk over tensors of one shape and these strides, in the leading one's order; None where copies must come first."""
    sizes, steps = coalesce(shape, strides, leading)
    if len(sizes) > 3:
        return None
    transposed = len(sizes) > 1 and any(row == 1 and column > 1 for row, column in zip(*steps[-2:]))
    tile = tile_shape(math.prod(sizes[:-1]), sizes[-1], transposed)
    missing = (None,) * (3 - len(sizes))
    of_each = tuple((*missing, *(stride or None for stride in own)) for own in zip(*steps))
    return Walk((*missing, *sizes), of_each, *tile, needs_int64(shape, strides))


def strides_of(tensors) -> tuple[Strides, ...]:
    return tuple(tensor.stride() for tensor in tensors)


def dense_alike(tensors, like):
    """The tensors as copies in the memory format of `like`, but for those that have it."""
    strides = torch.empty_like(like, device="meta").stride()
    return tuple(
        tensor if tensor is None or tensor.stride() == strides else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        for tensor in tensors
    )


def _on_device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(tensor.device)
    return contextlib.nullcontext() if module.current_device() == tensor.get_device() else module.device(tensor.device)


def element_by_element(inputs, outputs):
    """The programs and arguments of a kernel over tensors of one shape; None where copies must come first."""
    existing = [tensor for tensor in inputs if tensor is not None]
    walk = plan(outputs[0].shape, strides_of((*existing, *outputs)))
    if walk is None:
        return None
    return walk.tiles, (*with_gaps(walk, inputs).arguments, len(inputs))


def with_gaps(walk: Walk, inputs) -> Walk:
    """The walk with strides for the inputs that are None, too."""
    if all(tensor is not None for tensor in inputs):
        return walk
    strides = iter(walk.strides)
    of_inputs = tuple((None,) * 3 if tensor is None else next(strides) for tensor in inputs)
    return walk._replace(strides=(*of_inputs, *strides))


def _read_only(tensor):
    """A lazy clone as a plain tensor over the same memory: Triton calls `data_ptr`, which would copy it."""
    if tensor is None or not torch._C._is_cow_tensor(tensor):
        return tensor
    offset = tensor.storage_offset()
    start = address_of(tensor) - offset * tensor.itemsize
    storage = torch._C._construct_storage_from_data_pointer(start, tensor.device, tensor.untyped_storage().nbytes())
    return tensor.new_empty(0).set_(storage, offset, tensor.shape, tensor.stride())


class Launcher:
    """A kernel with its constants, called with tensors on one device; what it compiles is kept.

    The kernel takes the inputs and the outputs, a tuple each, what `arrange(inputs, outputs)` gives beside the number of
    programs, and the constants. An input may be None, but not the first.

    The key of what is kept is what Triton's lookup sees: device, shape, strides, dtypes, and each pointer's offset from 16
    bytes (sizes, their divisibility and the width of offsets follow from the shape). The first launch of a key goes through
    `kernel[grid]`, and so does each that hooks watch, that is meant for another device than the current one, or whose driver
    has changed. With `layouts_follow`, all shapes are the first input's, and the outputs' strides and dtypes follow from the
    inputs'.

    A caller may recognise two inputs by other means, and pass as `known` an object that stands for all that have their device,
    shape, strides and dtypes, and their addresses. Nothing else is asked of them then.
    """

    def __init__(self, kernel, *constants, arrange=element_by_element, layouts_follow=True):
        self.kernel = kernel
        self.constants = constants
        self.arrange = arrange
        self.layouts_follow = layouts_follow
        self.kept = Cache()
        self.kept_alike = Cache()

    def __call__(self, inputs, outputs, known=None):
        """Run over `inputs`, writing `outputs`."""
        if known is not None:
            alike, one, other = known
            output = outputs[0].data_ptr()
            launch = self.kept_alike.get(alike)
            if launch is not None and not (one | other | output) & 15 and launch((one, other, output)):
                return
        first = inputs[0]
        key = [first.get_device(), first.shape]
        pointers = []
        for tensor in inputs:
            if tensor is None:
                pointers.append(None)
                key.append(None)
                continue
            pointer = address_of(tensor)
            pointers.append(pointer)
            key += tensor.dtype, tensor.stride(), pointer & 15
        for tensor in outputs:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            key.append(pointer & 15)
        if not self.layouts_follow:
            for tensor in (*inputs, *outputs):
                if tensor is not None:
                    key += tensor.shape, tensor.stride(), tensor.dtype
        key = tuple(key)
        launch = self.kept.get(key)
        if launch is None or not launch(pointers):
            self._launch(key, inputs, outputs)
        elif known is not None and not any(pointer & 15 for pointer in pointers):
            self.kept_alike.add(known[0], launch)

    def _launch(self, key, inputs, outputs):
        """Through `kernel[grid]`, keeping the compilation; what no walk covers is copied first."""
        if outputs[0].numel() == 0:
            return
        arranged = self.arrange(inputs, outputs)
        if arranged is None:
            assert self.arrange(outputs, outputs) is not None, "the outputs must make one walk"
            return self(dense_alike(inputs, outputs[0]), outputs)
        programs, arguments = arranged
        arguments += self.constants
        with _on_device_of(outputs[0]):
            # ATen's kernels are compiled with fused multiply-add, and Triton has announced another default.
            options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
            compiled = self.kernel[(programs,)](tuple(map(_read_only, inputs)), tuple(outputs), *arguments, **options)
            self.kept.add(key, keep(self.kernel, key[0], compiled, programs, arguments, len(inputs)))
