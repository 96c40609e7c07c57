"""The sigmoid loss of image-text pairs (Zhai et al. 2023, SigLIP), in chunks of the matrix of all pairs.

    l = scale·⟨image_i, text_j⟩ + bias        loss = Σ_ij log(1 + e^z)/B        z = -l for i = j, else l

    G = ∂Σ/∂l = -σ(z) or σ(z)
    grad_image = scale/B·G·text    grad_text = scale/B·Gᵀ·image    grad_scale = ΣG·⟨image, text⟩/B    grad_bias = ΣG/B

Only `chunk_size` rows of the matrix exist at a time, in forward and, computed again, in backward: the features and two numbers
are what is saved. Distributed, the texts pass from rank to rank around a ring, and in backward their gradients with them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from . import kernels
from .autograd import recordable
from .checks import (
    DENSE_FLOATS,
    check_chunk_size,
    check_devices,
    check_tensors,
    described,
    number_for,
    overridable,
    promoted,
)
from .dispatch import NOBODY, TRANSFORM, Gradients, Tensors, is_ours, launchable, listener
from .formulas import upcast, weighted
from .internals import apply_of, graph_break
from .losses import autocasts, own_dtypes
from .ring import Alone, Ring, agree, resolved, ring_of, warn_if_forgotten


def _chunks(image: Tensor, chunk_size: int) -> list[slice]:
    """The rows of each chunk; of an empty batch one chunk, without rows."""
    return [slice(start, start + chunk_size) for start in range(0, max(1, image.shape[0]), chunk_size)]


class Pairs:
    """The pairs of this rank's images with the texts of every rank, chunk by chunk: sums over them, and G.

    Each chunk leaves `kinds` partial sums per program; `totals` adds up those of all chunks at once, in the end.
    """

    scale: Tensor
    bias: Tensor
    rows: list[slice]
    launches: bool
    sums: Tensor
    labels: list[Tensor]

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kinds: int, n_ranks: int, chunk_size: int
    ) -> None:
        self.scale, self.bias = scale, bias
        self.rows = _chunks(image, chunk_size)
        size = image.shape[0]
        self.launches = size > 1 and launchable(image, text, scale, bias)
        programs = kernels.siglip.programs_of(min(chunk_size, size), size) if self.launches else 1
        self.sums = image.new_zeros((n_ranks, len(self.rows), kinds, programs), dtype=_sum_type(image))
        if self.launches:
            self.labels = [torch.arange(size, device=image.device)]
            self.labels += [torch.full((size,), -1, device=image.device)] * (n_ranks > 1)

    def totals(self) -> Tensor:
        """The sum of each kind."""
        return self.sums.sum((0, 1, 3))

    def _labels(self, rank: int, chunk: int) -> Tensor:
        """For each row, the column of the text that belongs to it; -1 where the texts are another rank's."""
        return self.labels[rank > 0][self.rows[chunk]]

    def add_losses(self, similarity: Tensor, rank: int, chunk: int) -> None:
        """Sums up log(1 + e^z); where torch operators do it, over the memory of `similarity`."""
        (sums,) = self.sums[rank, chunk]
        if self.launches:
            kernels.siglip.pairs_forward(similarity, self._labels(rank, chunk), self.scale, self.bias, sums)
            return
        logits = upcast(similarity).mul_(self.scale).add_(self.bias)
        if rank == 0:
            logits.diagonal(self.rows[chunk].start).neg_()
        sums[0] = -torch.nn.functional.logsigmoid(logits.neg_()).sum()

    def gradient(self, similarity: Tensor, rank: int, chunk: int) -> Tensor:
        """G in the dtype of `similarity`, which is overwritten; sums up G·s and G."""
        of_scale, of_bias = self.sums[rank, chunk]
        if self.launches:
            labels = self._labels(rank, chunk)
            kernels.siglip.pairs_gradient(similarity, labels, self.scale, self.bias, of_scale, of_bias)
            return similarity
        wide = upcast(similarity)
        gradient = wide * self.scale + self.bias
        together = gradient.diagonal(self.rows[chunk].start) if rank == 0 else gradient[:0]
        together.neg_()
        gradient.sigmoid_()
        together.neg_()
        of_scale[0] = wide.mul_(gradient).sum()
        of_bias[0] = gradient.sum()
        return gradient.to(similarity.dtype)


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class SigLIPFunction(Function):
    """The loss, differentiable in features, scale and bias, which are what is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        chunk_size: int,
        group: "dist.ProcessGroup | None",
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(image, text, scale, bias)
        ctx.chunk_size = chunk_size
        ctx.ring = ring = ring_of(group)
        pairs = Pairs(image, text, scale, bias, 1, ring.size, chunk_size)
        with own_dtypes(image.device.type):
            for rank, texts, _ in ring.round(text, _ids(text)):
                for chunk, rows in enumerate(pairs.rows):
                    pairs.add_losses(image[rows] @ texts.mT, (rank - ring.rank) % ring.size, chunk)
        (total,) = pairs.totals()
        return (ring.sum(total) / (image.shape[0] * ring.size)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        image, text, scale, bias = ctx.saved_tensors
        if listener() != NOBODY:
            if isinstance(ctx.ring, Ring):
                raise RuntimeError("siglip_loss(): with a process group there is no second derivative; got create_graph=True")
            return *gradients_formula(grad_output, image, text, scale, bias, ctx.chunk_size), None, None, None
        to_image, to_text, (to_scale, to_bias) = gradients(
            image, text, scale, bias, ctx.chunk_size, ctx.ring, ctx.needs_input_grad
        )
        grad = grad_output.to(to_scale.dtype) / image.shape[0]
        to_features = (None if each is None else (each * (grad * scale)).to(image.dtype) for each in (to_image, to_text))
        return *to_features, (grad * to_scale).to(scale.dtype), (grad * to_bias).to(bias.dtype), None, None, None


def gradients(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int, ring: Alone, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """G·text and Gᵀ·image, None where not needed, and ΣG·⟨image, text⟩ with ΣG.

    The gradients of the texts go around the ring with them, and come home in the end.
    """
    pairs = Pairs(image, text, scale, bias, 2, ring.size, chunk_size)
    to_image = image.new_zeros(image.shape, dtype=_sum_type(image)) if needs[0] else None
    round = ring.round(text, _ids(text))
    with own_dtypes(image.device.type):
        for rank, texts, _ in round:
            to_texts = text.new_zeros(text.shape, dtype=_sum_type(text)) if needs[1] else None
            for chunk, rows in enumerate(pairs.rows):
                gradient = pairs.gradient(image[rows] @ texts.mT, (rank - ring.rank) % ring.size, chunk)
                if to_image is not None:
                    _add_product(to_image[rows], gradient, texts)
                if to_texts is not None:
                    _add_product(to_texts, gradient.mT, image[rows])
            if to_texts is not None:
                round.give(to_texts)
    return to_image, round.collected() if needs[1] else None, pairs.totals()


def _ids(text: Tensor) -> Tensor:
    return torch.zeros(text.shape[0], dtype=torch.int64, device=text.device)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    if total.dtype is one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _logits(image: Tensor, text: Tensor, rows: slice, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨image, text⟩ of some rows, z, and which pairs belong together; differentiable."""
    similarity = upcast(image[rows] @ text.mT)
    logits = similarity * scale + bias
    together = torch.zeros_like(logits, dtype=torch.bool)
    together.diagonal(rows.start).fill_(1)
    return similarity, torch.where(together, -logits, logits), together


def formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """The loss in torch operators, differentiable in whatever way."""
    total = torch.zeros((), dtype=_sum_type(image), device=image.device)
    for rows in _chunks(image, chunk_size):
        _, z, _ = _logits(image, text, rows, scale, bias)
        total = total + weighted(-1.0, -z, "logsigmoid", 0).sum()
    return (total / image.shape[0]).to(dtype)


def gradients_formula(
    grad_output: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int
) -> Tensors:
    """The gradients as differentiable expressions, computed again chunk by chunk for each further derivative."""
    grad = grad_output.to(_sum_type(image)) / image.shape[0]

    def of_chunk(grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, rows: slice) -> Tensors:
        similarity, z, together = _logits(image, text, rows, scale, bias)
        pairs = weighted(torch.where(together, -grad, grad), z, "sigmoid", 0)
        wide_image, wide_text = upcast(image[rows]), upcast(text)
        return scale * (pairs @ wide_text), scale * (pairs.mT @ wide_image), (pairs * similarity).sum(), pairs.sum()

    parts = [
        checkpoint(of_chunk, grad, image, text, scale, bias, rows, use_reentrant=False) for rows in _chunks(image, chunk_size)
    ]
    to_image, *others = zip(*parts)
    results = torch.cat(to_image), *(sum(each[1:], each[0]) for each in others)
    return tuple(result.to(of.dtype) for result, of in zip(results, (image, text, scale, bias)))


_apply = apply_of(SigLIPFunction)


def apply(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    chunk_size: int,
    group: "dist.ProcessGroup | None",
    dtype: torch.dtype,
) -> Tensor:
    """The loss in `dtype`; under transforms, forward mode and tracers by its formula."""
    if listener() >= TRANSFORM or not image.numel():
        return formula(image, text, scale, bias, chunk_size, dtype)
    tensors = map(recordable, (image, text, scale, bias))
    return _apply(*tensors, chunk_size, group, dtype)


@overridable
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    chunk_size: int = 256,
    group: "torch.distributed.ProcessGroup | str | None" = None,
) -> Tensor:
    r"""-1/B·Σ_ij log σ(z_ij·(logit_scale·⟨image_i, text_j⟩ + logit_bias)), z = 1 for i = j, else -1: the loss of SigLIP.

    Sigmoid loss for language image pre-training, Zhai et al. 2023, in the form of open_clip: `logit_scale` multiplies as it is
    (what a model learns is its logarithm), and the sum is divided by the batch size B. Of the B × B matrix `chunk_size` rows
    exist at a time, in forward and, computed again, in backward: O(chunk_size·B) memory. The matrix products are
    torch.matmul's, in the features' dtype; the arithmetic of the loss is fp32 (fp64 for fp64). In fp16, ∂loss/∂logit of a pair
    below 6e-8 is lost in those products, as in torch; bf16 keeps it.

    With a process group each rank passes its own features, and text features go around the ring of ranks. Every rank gets the
    loss of the whole batch, that of all ranks together. Its gradients are those of the sum over all ranks divided by its own
    batch size: averaged over ranks, as DistributedDataParallel averages them, the gradients of parameters, scale and bias are
    those of that loss.

    Args:
        image_features, text_features: (B, D) each, float, usually normalised.
        logit_scale, logit_bias: tensors of one element, or numbers; no bias if None.
        chunk_size: rows of the matrix at a time.
        group: a process group, or "world" for the one that torch.distributed.init_process_group makes. All of its ranks must
            call, with the same B, D and dtype, and for each argument either all or none must want a gradient. The ranks compare
            these over the group's store at each call, without waiting for a device. Under torch.compile it breaks the graph.

    Returns:
        The loss, a number of the features' dtype; at least fp32 under autocast, where features are cast as matmul casts them.

    Saved for backward: the features, scale and bias. Differentiable to any order; with a process group once only, and in eager
    reverse mode only.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: features that are no matrices of one shape, two devices, a scale or bias of more than one element, a
            chunk_size below 1, a rank with another batch size; then every rank raises.
        RuntimeError: `group` together with create_graph=True, transforms or forward mode.

    Example:
        >>> features = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> torch_sigmoid.siglip_loss(features, features, 10.0, -10.0)
        tensor(0.6933)
    """
    arguments = image_features, text_features, logit_scale, logit_bias
    if torch.compiler.is_compiling():
        if group is not None:
            graph_break()
    elif group is None:
        warn_if_forgotten()
    ranks = resolved(group)
    if ranks is None or dist.get_world_size(ranks) == 1:
        image, text, scale, bias, dtype = _siglip_operands(*arguments, chunk_size)
        return apply(image, text, scale, bias, chunk_size, None, dtype)
    # A rank that fails tells the others, which would wait for it.
    try:
        image, text, scale, bias, dtype = _siglip_operands(*arguments, chunk_size)
        if listener() >= TRANSFORM:
            raise RuntimeError("siglip_loss(): with a process group expected eager reverse mode, got a tracer or a transform")
    except (TypeError, ValueError, RuntimeError) as error:
        agree(ranks, "", error)
        raise
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (image, text, scale, bias)]
    agree(ranks, f"features {tuple(image.shape)} {image.dtype}, gradients {needs}")
    return apply(image, text, scale, bias, chunk_size, ranks, dtype)


def _siglip_operands(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """Features, scale and bias as they are computed with, and the dtype of the loss."""
    caller = "siglip_loss"
    features = {"image_features": image_features, "text_features": text_features}
    check_tensors(caller, **features)
    shapes = f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(f"{caller}(): image_features and text_features must be of one shape (B, D), {shapes}")
    check_chunk_size(chunk_size)
    check_devices(caller, **features)
    image, text = promoted(image_features, text_features)
    if not (is_ours(image) and is_ours(text)):
        raise TypeError(f"{caller}(): features must be {DENSE_FLOATS}, got {described(image)} and {described(text)}")
    dtype = image.dtype
    if autocasts(image.device.type) and dtype is not torch.float64:
        dtype = torch.float32
        image, text = (each.to(torch.get_autocast_dtype(image.device.type)) for each in (image, text))
    scale = number_for(caller, "logit_scale", logit_scale, image)
    bias = number_for(caller, "logit_bias", 0.0 if logit_bias is None else logit_bias, image)
    return image, text, scale, bias, dtype
