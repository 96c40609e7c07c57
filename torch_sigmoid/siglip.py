"""The sigmoid loss of image-text pairs (Zhai et al. 2023, SigLIP), in blocks of the matrix of all pairs.

    s = ⟨image_i, text_j⟩    l = scale·s + bias    loss = Σ_ij log(1 + e^z)/B    z = -l for a pair that belongs together, else l

    G = ∂Σ/∂l = -σ(z) or σ(z)
    grad_image = scale/B·G·text    grad_text = scale/B·Gᵀ·image    grad_scale = ΣG·s/B    grad_bias = ΣG/B

Where a gradient is wanted, forward computes it as well. For each block of rows it multiplies out s, adds up the loss and writes
G over s in one pass, and adds the products G·text and Gᵀ·image to what it keeps for backward, which multiplies by
grad_output·scale/B. That is three matrix products a step, as in autograd of the plain formula; a backward that computed s again
would take four. No block outlives its pass, so memory is O(block + features).

Over a process group the texts pass from rank to rank, see ring.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from . import kernels
from .autograd import recordable
from .checks import (
    DENSE_FLOATS,
    check_chunk_size,
    check_devices,
    check_tensors,
    described,
    ids_for,
    number_for,
    overridable,
    promoted,
)
from .dispatch import NOBODY, PLAIN_TYPES, TRANSFORM, Gradients, Tensors, exports, is_ours, launchable, listener
from .eager import weighted
from .formulas import upcast
from .internals import apply_of, make_fx_traces, transforms_active, uncompiled
from .losses import autocasts, own_dtypes
from .ring import Alone, Ring, agree, is_dtensor, resolved, ring_of, warn_if_forgotten

# Memory for a block of similarities. On a CPU it should stay in the cache from one pass to the next: with two cores and 32 MiB
# of L3, 4096 pairs of width 256 take 0.26 s in blocks of 1 to 16 MiB, and 0.31 s in blocks of 0.5 MiB.
# A GPU needs enough rows to be busy: 65,536 bf16 texts come to 4096 rows, which the authors of siglip-kernel 0.1.2 publish as
# the best number on a GH200. Not measured here.
BLOCK_BYTES = {"cpu": 4 * 2**20}
BLOCK_BYTES_OF_ACCELERATORS = 512 * 2**20
# With fewer rows matrix products slow down: with 32 they take 1.6 times as long as with 256, on that CPU.
FEWEST_ROWS = 64
# Beyond it log(1 + e^z) is z, in fp64 too.
SOFTPLUS_IS_LINEAR_FROM = 40.0


def default_chunk_size(text: Tensor) -> int:
    """How many rows of the matrix fill a block."""
    memory = BLOCK_BYTES.get(text.device.type, BLOCK_BYTES_OF_ACCELERATORS)
    return max(FEWEST_ROWS, memory // max(1, text.shape[0] * text.itemsize))


softplus: Callable[..., Tensor] = functools.partial(torch.ops.aten.softplus.out, beta=1.0, threshold=SOFTPLUS_IS_LINEAR_FROM)


class Block:
    """Memory for the similarities of some images with some texts, and the pass over them."""

    def __init__(self, n_images: int, text: Tensor, scale: Tensor, bias: Tensor) -> None:
        self.scale, self.bias = scale, bias
        self.similarity = text.new_empty((n_images, text.shape[0]))
        self.launches = launchable(text, scale, bias)
        if not self.launches:
            # Torch operators take two matrices more. Each block uses them again: new memory costs more than the arithmetic.
            self.wide, self.spare = (scale.new_empty(self.similarity.shape) for _ in range(2))

    def sums(self, image: Tensor, image_ids: Tensor, text: Tensor, text_ids: Tensor, first: int | None) -> Tensor:
        """Sums of log(1 + e^z), one or more. `first` is explained in `_negate_pairs`."""
        similarity = self._similarity(image, text)
        if self.launches:
            n_sums = kernels.siglip.programs_of(*similarity.shape)
            sums = self.scale.new_empty((1, n_sums))
            kernels.siglip.pairs_forward(similarity, image_ids, text_ids, self.scale, self.bias, *sums)
            return sums
        z = self._signed_logits(similarity, image_ids, text_ids, first)
        return softplus(z, out=z).sum().reshape(1, 1)

    def gradient(
        self, image: Tensor, image_ids: Tensor, text: Tensor, text_ids: Tensor, first: int | None
    ) -> tuple[Tensor, Tensor]:
        """Three rows of sums, those of log(1 + e^z), of G·s and of G; and G in the features' dtype, until the next call."""
        similarity = self._similarity(image, text)
        if self.launches:
            sums = self.scale.new_empty((3, kernels.siglip.programs_of(*similarity.shape)))
            kernels.siglip.pairs_gradient(similarity, image_ids, text_ids, self.scale, self.bias, *sums)
            return sums, similarity
        z = self._signed_logits(similarity, image_ids, text_ids, first)
        spare = self.spare[: len(image)]
        loss = softplus(z, out=spare).sum()
        gradient = self._negate_pairs(z.sigmoid_(), image_ids, text_ids, first)
        sums = torch.stack((loss, torch.mul(gradient, similarity, out=spare).sum(), gradient.sum()))[:, None]
        return sums, gradient if gradient.dtype is similarity.dtype else similarity.copy_(gradient)

    def _similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.mm(image, text.mT, out=self.similarity[: len(image)])

    def _signed_logits(self, similarity: Tensor, image_ids: Tensor, text_ids: Tensor, first: int | None) -> Tensor:
        """z, in memory of its own."""
        logits = self.wide[: len(similarity)].copy_(similarity).mul_(self.scale).add_(self.bias)
        return self._negate_pairs(logits, image_ids, text_ids, first)

    def _negate_pairs(self, values: Tensor, image_ids: Tensor, text_ids: Tensor, first: int | None) -> Tensor:
        """Negate, in place, the values of pairs that belong together: those of equal ids.

        If `first` is not None, nobody has given ids, and it is the text that belongs to the first of these images: the pairs
        are a diagonal, empty for the texts of another rank.
        """
        if first is not None:
            values.diagonal(first).neg_()
            return values
        together = image_ids[:, None] == text_ids
        return torch.where(together, torch.neg(values, out=self.spare[: len(values)]), values, out=values)


def value_and_factors(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int | None,
    ring: Alone,
    needs: Sequence[bool],
    *,
    of_all: bool = False,
) -> tuple[Tensor, Gradients]:
    """Σ log(1 + e^z) of the images of all ranks, and, each where it is needed, G·text, Gᵀ·image, ΣG·s and ΣG.

    ΣG·s and ΣG are sums over this rank's images, or over those of all ranks.
    """
    by_position = image_ids is None or text_ids is None
    if image_ids is None or text_ids is None:
        # Ids that no other rank has.
        first_id = ring.rank << 32
        text_ids = torch.arange(first_id, first_id + text.shape[0], device=text.device)
        image_ids = text_ids[: image.shape[0]]
    chunk_size = min(chunk_size or default_chunk_size(text), image.shape[0])
    of_chunks = list(zip(image.split(chunk_size), image_ids.split(chunk_size))) if chunk_size else []
    to_image = image.new_zeros(image.shape, dtype=scale.dtype) if needs[0] else None
    # A rank may have no images, or no texts.
    sums = [scale.new_zeros((3 if any(needs) else 1, 1))]

    def add_texts(rank: int, texts: Tensor, ids: Tensor) -> Tensor | None:
        """Add what the texts of a rank contribute; returns their gradient. The block goes before the next one is made."""
        block = Block(chunk_size, texts, scale, bias)
        to_texts = texts.new_zeros(texts.shape, dtype=scale.dtype) if needs[1] else None
        for index, (images, their_ids) in enumerate(of_chunks if len(texts) else ()):
            first = (index * chunk_size if rank == ring.rank else texts.shape[0]) if by_position else None
            if not any(needs):
                sums.append(block.sums(images, their_ids, texts, ids, first))
                continue
            of_block, gradient = block.gradient(images, their_ids, texts, ids, first)
            sums.append(of_block)
            if to_image is not None:
                _add_product(to_image[index * chunk_size :][:chunk_size], gradient, texts)
            if to_texts is not None:
                _add_product(to_texts, gradient.mT, images)
        return to_texts

    with own_dtypes(image.device.type):
        texts_of_ranks = ring.round(text, text_ids)
        for rank, texts, ids in texts_of_ranks:
            to_texts = add_texts(rank, texts, ids)
            if to_texts is not None:
                texts_of_ranks.give(to_texts)
    totals = torch.cat(sums, 1).sum(1)
    ring.sum(totals if of_all else totals[:1])
    loss, *of_numbers = totals
    to_text = texts_of_ranks.collected() if needs[1] else None
    to_scale, to_bias = (each if needed else None for each, needed in zip(of_numbers or (None, None), needs[2:]))
    return loss, (to_image, to_text, to_scale, to_bias)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    if total.dtype is one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def gradients_of(grad: Tensor, scale: Tensor, factors: Gradients, dtypes: Sequence[torch.dtype]) -> Gradients:
    """The gradients of features, scale and bias, in their dtypes, from that of the sum and the factors that forward left."""
    of_similarity = grad * scale
    return tuple(
        None if factor is None else (factor * (of_similarity if factor.dim() else grad)).to(dtype)
        for factor, dtype in zip(factors, dtypes)
    )


class SigLIPFunction(Function):
    """The loss, differentiable in features, scale and bias. Saves the factors of their gradients, and the scale.

    In one process also what a second derivative needs: features, bias and ids.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        chunk_size: int | None,
        ring: Alone,
        dtype: torch.dtype,
        n_images: int | None,
    ) -> Tensor:
        operands = image, text, scale, bias, image_ids, text_ids
        of_all = n_images is not None
        total, factors = value_and_factors(*operands, chunk_size, ring, ctx.needs_input_grad[:4], of_all=of_all)
        ctx.save_for_backward(scale, *factors, *(() if ring.size > 1 else (image, text, bias, image_ids, text_ids)))
        ctx.dtypes = [each.dtype for each in (image, text, scale, bias)]
        ctx.chunk_size, ctx.n_ranks, ctx.n_images = chunk_size, ring.size, n_images or image.shape[0]
        return (total / (n_images or image.shape[0] * ring.size)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        scale, *factors = ctx.saved_tensors
        if listener() == NOBODY:
            grad = grad_output.to(scale.dtype) / ctx.n_images
            gradients = gradients_of(grad, scale, tuple(factors[:4]), ctx.dtypes)
        elif ctx.n_ranks > 1:
            raise RuntimeError("siglip_loss(): with a process group there is no second derivative; got create_graph=True")
        else:
            image, text, bias, image_ids, text_ids = factors[4:]
            gradients = gradients_formula(grad_output, image, text, scale, bias, image_ids, text_ids, ctx.chunk_size)
        return *gradients, None, None, None, None, None, None


# In torch operators, differentiable in whatever way. Nothing here writes into a view: tracers and subclasses may lose that.


def positions(image: Tensor, text: Tensor) -> Tensors:
    """The ids of images and texts where those of one position belong together."""
    return tuple(torch.arange(each.shape[0], device=each.device) for each in (image, text))


def _logits(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """s, z, and which pairs belong together."""
    similarity = upcast(image @ text.mT)
    logits = similarity * scale + bias
    together = image_ids[:, None] == text_ids
    return similarity, torch.where(together, -logits, logits), together


def formula(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The loss."""
    if image_ids is None or text_ids is None:
        image_ids, text_ids = positions(image, text)
    _, z, _ = _logits(image, text, scale, bias, image_ids, text_ids)
    return (weighted(-1.0, -z, "logsigmoid", 0).sum() / image.shape[0]).to(dtype)


def gradients_formula(
    grad_output: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int | None,
) -> Tensors:
    """The gradients as differentiable expressions, computed again block by block for each further derivative."""
    if image_ids is None or text_ids is None:
        image_ids, text_ids = positions(image, text)
    grad = grad_output.to(scale.dtype) / image.shape[0]

    def of_chunk(
        grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor
    ) -> Tensors:
        similarity, z, together = _logits(image, text, scale, bias, image_ids, text_ids)
        pairs = weighted(torch.where(together, -grad, grad), z, "sigmoid", 0)
        wide_image, wide_text = upcast(image), upcast(text)
        return scale * (pairs @ wide_text), scale * (pairs.mT @ wide_image), (pairs * similarity).sum(), pairs.sum()

    chunk_size = chunk_size or default_chunk_size(text)
    parts = [
        checkpoint(of_chunk, grad, images, text, scale, bias, ids, text_ids, use_reentrant=False)
        for images, ids in zip(image.split(chunk_size), image_ids.split(chunk_size))
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
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int | None,
    dtype: torch.dtype,
    ring: Alone,
    n_images: int | None = None,
) -> Tensor:
    """The loss in `dtype`, by whichever way is open to those who listen.

    Over several ranks, each gets gradients whose average over the ranks is that of the loss. With `n_images`, the number on all
    ranks, each gets those of the loss itself.
    """
    operands = image, text, scale, bias, image_ids, text_ids
    needs = [torch.is_grad_enabled() and each.requires_grad for each in operands[:4]]
    if ring.size == 1:
        if torch.compiler.is_compiling() and not exports() and not transforms_active():
            from .siglip_library import siglip

            total: Tensor = siglip(*operands, chunk_size, needs)[0]
            return (total / image.shape[0]).to(dtype)
        if not _computes_in_blocks(operands) or not (image.numel() and text.numel()):
            return formula(*operands, dtype)
    recorded = cast("_Operands", tuple(map(recordable, operands)))
    if any(needs):
        return _apply(*recorded, chunk_size, ring, dtype, n_images)
    with torch.no_grad():
        value, _ = value_and_factors(*recorded, chunk_size, ring, needs)
        return (value / (n_images or image.shape[0] * ring.size)).to(dtype)


def _computes_in_blocks(operands: "_Operands") -> bool:
    """Whether operators on these operands compute now, and at most eager reverse mode listens."""
    return listener() < TRANSFORM and not make_fx_traces() and all(type(each) in PLAIN_TYPES for each in operands[:4])


@overridable
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    chunk_size: int | None = None,
    group: "torch.distributed.ProcessGroup | DeviceMesh | str | None" = None,
) -> Tensor:
    r"""-1/B·Σ_ij log σ(z_ij·(logit_scale·⟨image_i, text_j⟩ + logit_bias)): the loss of SigLIP.

    z_ij is 1 where image i and text j belong together, else -1. Sigmoid loss for language image pre-training, Zhai et al.
    2023, in the form of open_clip: `logit_scale` multiplies as it is (what a model learns is its logarithm), and the sum is
    divided by the number of images B. The matrix products are torch.matmul's, in the features' dtype; the arithmetic of the
    loss is fp32 (fp64 for fp64). In fp16, ∂loss/∂logit of a pair below 6e-8 is lost in those products, as in torch; bf16 keeps
    it.

    Text i belongs to image i, and further texts to none. With ids, each image belongs to all texts of its id: several captions
    of an image, or several images of a product, count as pairs.

    Of the B × M matrix `chunk_size` rows exist at a time. Where a gradient is wanted, forward computes it in the same pass:
    three matrix products, of which backward needs none. Call the loss under `torch.no_grad` if you want its value only, which
    takes one.

    With `group` each rank passes its own features, and the texts go around the ring of ranks in both directions while the ranks
    compute. Every rank gets the loss of the whole batch, that of all ranks together. Its gradients are those of the sum over
    all ranks divided by its own batch size: averaged over ranks, as DistributedDataParallel averages them, the gradients of
    parameters, scale and bias are those of that loss.

    DTensors need no `group`. Features that are sharded by Shard(0) over one dimension of their mesh are one batch, whose loss
    is computed over the ranks of that dimension; shards may have unequally many rows. The loss is a replicated DTensor, and the
    gradients are those of the loss itself, not to be averaged: sharded as the features are for these, and the same on every
    rank for scale and bias, which may be replicated DTensors, plain tensors or numbers. If features are replicated, each rank
    computes all of it, and nothing is communicated.

    Args:
        image_features, text_features: (B, D) and (M, D), float, usually normalised. M ≥ B unless there are ids.
        logit_scale, logit_bias: tensors of one element, or numbers; no bias if None.
        image_ids, text_ids: (B,) and (M,), integers; pairs of equal ids belong together, on whichever rank they are. Both or
            neither.
        chunk_size: rows of the matrix at a time; None for as many as take 4 MiB on a CPU and 512 MiB elsewhere.
        group: the ranks that make up the batch: a process group, a DeviceMesh of one dimension (of others pass one, as in
            mesh["dp"]), or "world" for the group that torch.distributed.init_process_group makes. All of its ranks must call,
            with the same B, M, D and dtype, and for each argument either all or none must want a gradient, or be given. The
            hosts compare these at each call, without waiting for a device. None for this rank alone; if there are others, that
            warns once in a process. To keep it from warning, pass a group of this rank alone.

    Returns:
        The loss, a number of the features' dtype; at least fp32 under autocast, where features are cast as matmul casts them.
        With DTensors, a DTensor.

    Saved for backward: the features' gradients, up to a factor, in fp32 (fp64 for fp64), and the scale; over one rank also the
    features, bias and ids, for a second derivative. Differentiable to any order; over several ranks once only, and in eager
    reverse mode only. torch.compile sees one operator that never holds the matrix; with a group or DTensors it breaks the
    graph. torch.export, torch.func, forward mode, fake and meta tensors and other subclasses get the formula in torch
    operators, which does hold it.

    Raises:
        TypeError: an argument is of the wrong type, one of the ids is given without the other, or some of features and ids are
            DTensors and others are not.
        ValueError: features that are no matrices of one width, fewer texts than images without ids, ids of another shape, two
            devices, a scale or bias of more than one element, a chunk_size below 1; a group without this rank; DTensors of
            other placements, which the error says how to redistribute.
        ValueError, TypeError or RuntimeError on every rank: a rank has another shape or dtype, other ids or gradients, or an
            error of its own. The message says which ranks have what.
        RuntimeError: several ranks together with create_graph=True, transforms or forward mode; or a rank that has ended, or
            has not called when the group's timeout is over.

    Example:
        >>> features = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> torch_sigmoid.siglip_loss(features, features, 10.0, -10.0)
        tensor(0.6933)
        >>> ids = torch.tensor([0, 0, 1, 2])  # the first two texts describe the first two images alike
        >>> torch_sigmoid.siglip_loss(features, features, 10.0, -10.0, image_ids=ids, text_ids=ids)
        tensor(5.6933)
    """
    arguments = image_features, text_features, logit_scale, logit_bias, image_ids, text_ids
    has_dtensors = any(map(is_dtensor, arguments))
    if torch.compiler.is_compiling():
        if has_dtensors or group is not None:
            return uncompiled(siglip_loss)(
                *arguments[:4], image_ids=image_ids, text_ids=text_ids, chunk_size=chunk_size, group=group
            )
    elif has_dtensors:
        from .siglip_dtensor import loss_of_dtensors

        return loss_of_dtensors(*arguments, chunk_size, group)
    elif group is None:
        warn_if_forgotten()
    ring = ring_of(resolved(group))
    if isinstance(ring, Ring):
        operands, dtype, _ = agreed_operands(ring, arguments, chunk_size)
    else:
        operands, dtype = operands_of(*arguments, chunk_size)
    return apply(*operands, chunk_size, dtype, ring)


def agreed_operands(
    ring: Ring, arguments: "Arguments", chunk_size: int | None, shapes: str = ""
) -> tuple["_Operands", torch.dtype, list[tuple[int, int]]]:
    """What `operands_of` gives, if the ranks agree on it, and each rank's numbers of images and texts.

    These must be the same, unless `shapes` says what must be in their place. A rank that fails tells the others, which would
    wait for it.
    """
    try:
        operands, dtype = operands_of(*arguments, chunk_size)
        if not _computes_in_blocks(operands):
            expected = "over several ranks expected plain tensors in eager reverse mode"
            raise RuntimeError(f"siglip_loss(): {expected}, got a tracer, a transform or a tensor subclass")
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        agree(ring.group, "", error)
        raise
    image, text, scale, bias, ids, _ = operands
    named = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
    wanting = [name for name, each in named.items() if torch.is_grad_enabled() and each.requires_grad]
    told = (
        shapes or f"image_features {tuple(image.shape)}, text_features {tuple(text.shape)}",
        str(image.dtype),
        "no ids" if ids is None else "ids",
        f"gradients of {', '.join(wanting) or 'nothing'}",
    )
    return operands, dtype, agree(ring.group, ", ".join(told), rows=(image.shape[0], text.shape[0]))


# Features, scale, bias and ids, as they were passed and as they are computed with.
Arguments = tuple[Any, Any, Any, Any, Any, Any]
_Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def operands_of(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int | None,
) -> tuple[_Operands, torch.dtype]:
    """Features, scale, bias and ids as they are computed with, and the dtype of the loss."""
    caller = "siglip_loss"
    features = {"image_features": image_features, "text_features": text_features}
    check_tensors(caller, **features)
    shapes = f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
    if image_features.dim() != 2 or text_features.dim() != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(f"{caller}(): image_features must be (B, D) and text_features (M, D), {shapes}")
    if (image_ids is None) != (text_ids is None):
        missing, given = ("image_ids", "text_ids") if image_ids is None else ("text_ids", "image_ids")
        raise TypeError(f"{caller}(): {given} were given without {missing}; expected both or neither")
    if image_ids is None and text_features.shape[0] < image_features.shape[0]:
        raise ValueError(f"{caller}(): without image_ids and text_ids expected a text for each image, {shapes}")
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
    ids = ids_for(caller, "image_ids", image_ids, image), ids_for(caller, "text_ids", text_ids, text)
    return (image, text, scale, bias, *ids), dtype
