"""Where an operator that works element by element runs, and where its results lie, if its tensors are DTensors.

Along each dimension of the mesh it follows the sharding of its largest sharded tensor, and the others are cut to match. A
result that is summed up over the dimension that is cut, such as the gradient of a broadcast gate, is a Partial sum there.
Where the operator is linear in the tensors that are Partial, its results are Partial too. Otherwise it takes whole tensors.
"""

from collections.abc import Collection, Sequence
from math import prod
from typing import NamedTuple, Protocol, cast

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

Shape = tuple[int, ...]
Placements = tuple[Placement, ...]


class Placed(Protocol):
    """A DTensor, or what torch knows of one."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def placements(self) -> Sequence[Placement]: ...


class Linear(NamedTuple):
    """The operator is linear in these tensors taken together: if they are Partial and no other is, so are these results."""

    tensors: frozenset[int]
    results: frozenset[int]


def full_shape(shapes: Collection[Shape]) -> Shape:
    """What the shapes broadcast to; the larger of two sizes that differ, as those of a packed tensor and of its half."""
    n = max(map(len, shapes))
    return tuple(max(sizes) for sizes in zip(*((1,) * (n - len(shape)) + shape for shape in shapes)))


def own_dim(dim: int, shape: Shape, full: Shape) -> int | None:
    """The dimension of `shape` that is `dim` of the full shape; None if `shape` is broadcast along it."""
    own = dim - (len(full) - len(shape))
    return None if own < 0 or (shape[own] == 1 and full[dim] != 1) else own


def along(
    present: Sequence[Placement],
    shapes: Sequence[Shape],
    results: Sequence[Shape],
    kept_whole: Collection[int],
    linear: Collection[Linear],
) -> tuple[list[Placement], list[Placement]]:
    """Where tensors and results lie along one dimension of a mesh."""
    full = full_shape(shapes)
    # Strided shards, which other types of placements are, count as none: they are gathered.
    sharded = [index for index, placement in enumerate(present) if type(placement) is Shard]
    for tensors, partial_results in linear if not sharded else ():
        kind, *others = {present[index] for index in tensors}
        if type(kind) is Partial and kind.reduce_op in ("sum", "avg") and not others:
            of_tensors: list[Placement] = [kind if index in tensors else Replicate() for index in range(len(shapes))]
            return of_tensors, [kind if index in partial_results else Replicate() for index in range(len(results))]
    # Of tensors of one size the last, which is an operand, and not the gradient that reaches it.
    for index in sorted(sharded, key=lambda index: (prod(shapes[index]), index), reverse=True):
        placement = cast(Shard, present[index])
        dim = placement.dim % len(shapes[index]) + len(full) - len(shapes[index])
        if dim not in kept_whole and own_dim(dim, shapes[index], full) is not None:
            own_dims = [own_dim(dim, shape, full) for shape in (*shapes, *results)]
            cut = [None if own is None else Shard(own) for own in own_dims]
            inputs, outputs = cut[: len(shapes)], cut[len(shapes) :]
            return [each or Replicate() for each in inputs], [each or Partial() for each in outputs]
    return [Replicate() for _ in shapes], [Replicate() for _ in results]


def follow(
    tensors: Sequence[Placed], results: Sequence[Sequence[int]], kept_whole: Collection[int], linear: Collection[Linear]
) -> tuple[list[Placements], list[Placements]]:
    """The placements that the tensors are to have, and those of results of these shapes.

    Shapes are broadcast against each other from the right. No shard may cut the dimensions of the full shape in `kept_whole`,
    such as the one that holds both halves of a packed tensor.
    """
    shapes, to_shapes = [tuple(each.shape) for each in tensors], [tuple(shape) for shape in results]
    per_mesh_dim = zip(*(each.placements for each in tensors))
    found = [along(present, shapes, to_shapes, kept_whole, linear) for present in per_mesh_dim]
    inputs, outputs = zip(*found)
    return list(zip(*inputs)), list(zip(*outputs))
