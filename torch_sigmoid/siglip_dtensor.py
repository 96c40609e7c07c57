"""SigLIP's loss of DTensors: over the ranks that the batch is sharded over, with the gradients of the global loss.

Imported when siglip_loss first meets a DTensor.
"""

from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .dispatch import TRANSFORM, listener
from .ring import CALLER, Ring, ring_of
from .siglip import Arguments, agreed_operands, apply, operands_of, positions


def loss_of_dtensors(
    image: object,
    text: object,
    scale: object,
    bias: object,
    image_ids: object,
    text_ids: object,
    chunk_size: int | None,
    group: object,
) -> Tensor:
    """The loss, replicated, of features that are DTensors, sharded over one dimension of their mesh or over none."""
    image, text = _features(image, text, scale, bias, group)
    for name, each in (("image_ids", image_ids), ("text_ids", text_ids)):
        if each is not None and not (isinstance(each, DTensor) and _have_one_layout(each, image)):
            raise TypeError(
                f"{CALLER}: {name} must be a DTensor like the features, {_described(image)}, got {_described(each)}"
            )
    for name, each in (("logit_scale", scale), ("logit_bias", bias)):
        if isinstance(each, DTensor) and not all(placement.is_replicate() for placement in each.placements):
            raise ValueError(
                f"{CALLER}: {name} must be replicated, got {_described(each)}; call {name}.redistribute with Replicate() first"
            )
    if image_ids is None and text_ids is None and image.dim() == text.dim() == 2 and text.shape[0] < image.shape[0]:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise ValueError(f"{CALLER}: without image_ids and text_ids expected a text for each image, got {shapes}")

    if listener() >= TRANSFORM:
        raise RuntimeError(f"{CALLER}: with DTensors expected eager reverse mode, got a tracer or a transform")

    # Each rank computes the gradients of the global loss, so those of what is local are placed as their DTensors are.
    given = image, text, scale, bias, image_ids, text_ids
    local = (each.to_local(grad_placements=each.placements) if isinstance(each, DTensor) else each for each in given)
    arguments = cast(Arguments, tuple(local))
    dim = _sharded_dim(image)
    ring = ring_of(None if dim is None else image.device_mesh.get_group(dim))
    if dim is not None and isinstance(ring, Ring):
        loss = _loss_of_shards(image, text, dim, ring, arguments, chunk_size)
    else:
        operands, dtype = operands_of(*arguments, chunk_size)
        loss = apply(*operands, chunk_size, dtype, ring)
    mesh = image.device_mesh
    replicated: Tensor = DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated


def _loss_of_shards(
    image: DTensor, text: DTensor, dim: int, ring: Ring, arguments: Arguments, chunk_size: int | None
) -> Tensor:
    """The loss of this rank's shards with those of the others, which may have other numbers of rows."""
    has_ids = arguments[4] is not None or arguments[5] is not None
    if not has_ids and all(isinstance(each, Tensor) and each.dim() == 2 for each in arguments[:2]):
        # A rank may have fewer texts than images; their positions in the global batch take the place of these below.
        image_ids, text_ids = positions(*arguments[:2])
        arguments = *arguments[:4], image_ids, text_ids
    told = f"image_features {tuple(image.shape)}, text_features {tuple(text.shape)}, DTensors{' with ids' * has_ids}"
    operands, dtype, rows = agreed_operands(ring, arguments, chunk_size, told)
    ring.sizes = [n_texts for _, n_texts in rows]
    if not has_ids:
        rows_of = dict(zip(dist.get_process_group_ranks(ring.group), rows))
        before = [rows_of[rank] for rank in _ranks_before(image, dim)]
        ids = (own + sum(counts) for own, counts in zip(operands[4:], zip(*before) if before else ((), ())))
        operands = *operands[:4], *ids
    return apply(*operands, chunk_size, dtype, ring, image.shape[0])


def _ranks_before(tensor: DTensor, dim: int) -> list[int]:
    """The ranks that hold the shards before this rank's one."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    line = mesh.mesh[tuple(slice(None) if i == dim else where for i, where in enumerate(coordinate))]
    ranks: list[int] = line[: coordinate[dim]].tolist()
    return ranks


def _features(image: object, text: object, scale: object, bias: object, group: object) -> tuple[DTensor, DTensor]:
    """The features, if they are DTensors of one layout, and nothing else says which ranks take part."""
    if not (isinstance(image, DTensor) and isinstance(text, DTensor)):
        named = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
        found = ", ".join(f"{name} {_described(each)}" for name, each in named.items() if each is not None)
        raise TypeError(
            f"{CALLER}: with a DTensor expected DTensors as image_features and text_features, got {found}; for plain features "
            "pass plain tensors only, such as DTensor.to_local() gives, and group="
        )
    if group is not None:
        raise ValueError(f"{CALLER}: DTensors say which ranks take part; expected no group with them, got {group!r}")
    if image.device_mesh.get_coordinate() is None:
        raise ValueError(f"{CALLER}: the mesh of the features must hold this rank, {dist.get_rank()}, got {image.device_mesh}")
    _sharded_dim(image)
    if not _have_one_layout(image, text):
        raise ValueError(
            f"{CALLER}: image_features and text_features must have one mesh and equal placements, got {_described(image)} and "
            f"{_described(text)}; call text_features.redistribute(image_features.device_mesh, image_features.placements) first"
        )
    return image, text


def _sharded_dim(tensor: DTensor) -> int | None:
    """The dimension of the mesh that the rows are sharded over, None if each rank has all."""
    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = [dim for dim, each in enumerate(placements) if each == Shard(0) and mesh.size(dim) > 1]
    if len(sharded) > 1 or not all(each in (Shard(0), Replicate()) for each in placements):
        raise ValueError(
            f"{CALLER}: features must be sharded by Shard(0) over one dimension of the mesh, and replicated over others, got "
            f"{_described(tensor)}; redistribute them first, as in features.redistribute(placements=[Shard(0)])"
        )
    return sharded[0] if sharded else None


def _have_one_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def _described(value: object) -> str:
    if isinstance(value, DTensor):
        return f"placements {value.placements} on {value.device_mesh}"
    return f"a plain {type(value).__name__}"
