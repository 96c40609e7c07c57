"""The sigmoid loss of image-text pairs (Zhai et al. 2023, SigLIP), in chunks of the matrix of all pairs.

    l = scale·⟨image_i, text_j⟩ + bias        loss = Σ_ij log(1 + e^z)/B        z = -l for i = j, else l

    G = ∂Σ/∂l = -σ(z) or σ(z)
    grad_image = scale/B·G·text    grad_text = scale/B·Gᵀ·image    grad_scale = ΣG·⟨image, text⟩/B    grad_bias = ΣG/B

Only `chunk_size` rows of the matrix exist at a time, in forward and, computed again, in backward: the features and two numbers
are what is saved. Distributed, the texts pass from rank to rank around a ring, and in backward their gradients with them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from . import ops
from .autograd import differentiable_again, more_than_reverse_mode_listens
from .gates import weighted
from .ops import kernels


def _chunks(image: Tensor, chunk_size: int):
    """The rows of each chunk; of an empty batch one chunk, without rows."""
    return [slice(start, start + chunk_size) for start in range(0, max(1, image.shape[0]), chunk_size)]


class Pairs:
    """The pairs of one's images with the texts of each rank, chunk by chunk: what is summed up over them, and G.

    What a chunk sums up, `kinds` of sums, stays in parts until all are there, which takes one addition for all of them.
    """

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kinds: int, n_ranks: int, chunk_size: int):
        self.scale, self.bias = scale, bias
        self.rows = _chunks(image, chunk_size)
        size = image.shape[0]
        self.launches = size > 1 and ops.launchable(image, text, scale, bias)
        programs = kernels.siglip.programs_of(min(chunk_size, size), size) if self.launches else 1
        self.sums = image.new_zeros((n_ranks, len(self.rows), kinds, programs), dtype=_sum_type(image))
        if self.launches:
            self.labels = [torch.arange(size, device=image.device)]
            self.labels += [torch.full((size,), -1, device=image.device)] * (n_ranks > 1)

    def totals(self) -> Tensor:
        """The sum of each kind."""
        return self.sums.sum((0, 1, 3))

    def _labels(self, rank: int, chunk: int) -> Tensor:
        """The column that belongs to each row; -1 if none does, the texts being another rank's."""
        return self.labels[rank > 0][self.rows[chunk]]

    def add_losses(self, similarity: Tensor, rank: int, chunk: int) -> None:
        """Sums up log(1 + e^z); where torch operators do it, over the memory of `similarity`."""
        (sums,) = self.sums[rank, chunk]
        if self.launches:
            kernels.siglip.pairs_forward(similarity, self._labels(rank, chunk), self.scale, self.bias, sums)
            return
        logits = ops.upcast(similarity)[0].mul_(self.scale).add_(self.bias)
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
        (wide,) = ops.upcast(similarity)
        gradient = wide * self.scale + self.bias
        together = gradient.diagonal(self.rows[chunk].start) if rank == 0 else gradient[:0]
        together.neg_()
        gradient.sigmoid_()
        together.neg_()
        of_scale[0] = wide.mul_(gradient).sum()
        of_bias[0] = gradient.sum()
        return gradient.to(similarity.dtype)


class Ring:
    """The ranks of a process group, each of which sends to the next and receives from the one before."""

    def __init__(self, group):
        self.group = group
        self.size, rank = dist.get_world_size(group), dist.get_rank(group)
        self.next, self.before = (dist.get_global_rank(group, (rank + step) % self.size) for step in (1, -1))

    def exchange(self, tensor: Tensor):
        """Sends a tensor on; returns a function that waits for its counterpart and gives it."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        sending = dist.P2POp(dist.isend, tensor, self.next, self.group)
        works = dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, self.before, self.group)])

        def wait():
            for work in works:
                work.wait()
            return received

        return wait

    def texts(self, text: Tensor):
        """Each rank's texts in turn, one's own first; the next are under way while the present ones are worked on."""
        for step in range(self.size):
            pending = self.exchange(text) if step + 1 < self.size else None
            yield text
            if pending is not None:
                text = pending()

    def mean(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.group)
        return value / self.size


class Alone:
    """A ring of one."""

    size = 1

    def texts(self, text: Tensor):
        yield text

    def exchange(self, tensor: Tensor):
        return lambda: tensor

    def mean(self, value: Tensor) -> Tensor:
        return value


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class SigLIPFunction(Function):
    """The loss, differentiable in features, scale and bias, which are what is saved."""

    @staticmethod
    def forward(ctx, image, text, scale, bias, chunk_size, group, dtype):
        ctx.save_for_backward(image, text, scale, bias)
        ctx.chunk_size = chunk_size
        ctx.ring = ring = Alone() if group is None or dist.get_world_size(group) == 1 else Ring(group)
        pairs = Pairs(image, text, scale, bias, 1, ring.size, chunk_size)
        with torch.autocast(image.device.type, enabled=False):
            for rank, texts in enumerate(ring.texts(text)):
                for chunk, rows in enumerate(pairs.rows):
                    pairs.add_losses(image[rows] @ texts.mT, rank, chunk)
        (total,) = pairs.totals()
        return ring.mean(total / image.shape[0]).to(dtype)

    @staticmethod
    def backward(ctx, grad_output):
        image, text, scale, bias = ctx.saved_tensors
        if differentiable_again():
            if isinstance(ctx.ring, Ring):
                raise RuntimeError("siglip_loss(): with a process group there is no second derivative; got create_graph=True")
            return *gradients_formula(grad_output, image, text, scale, bias, ctx.chunk_size), None, None, None
        to_image, to_text, (to_scale, to_bias) = gradients(
            image, text, scale, bias, ctx.chunk_size, ctx.ring, ctx.needs_input_grad
        )
        grad = grad_output.to(to_scale.dtype) / image.shape[0]
        to_features = (None if each is None else (each * (grad * scale)).to(image.dtype) for each in (to_image, to_text))
        return *to_features, (grad * to_scale).to(scale.dtype), (grad * to_bias).to(bias.dtype), None, None, None


def gradients(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int, ring, needs):
    """G·text and Gᵀ·image, None where not needed, and ΣG·⟨image, text⟩ with ΣG.

    The gradients of the texts go around the ring with them, and come home in the end.
    """
    pairs = Pairs(image, text, scale, bias, 2, ring.size, chunk_size)
    to_image, to_texts = (
        tensor.new_zeros(tensor.shape, dtype=_sum_type(tensor)) if needed else None
        for tensor, needed in zip((image, text), needs)
    )
    with torch.autocast(image.device.type, enabled=False):
        for rank, texts in enumerate(ring.texts(text)):
            for chunk, rows in enumerate(pairs.rows):
                gradient = pairs.gradient(image[rows] @ texts.mT, rank, chunk)
                if to_image is not None:
                    _add_product(to_image[rows], gradient, texts)
                if to_texts is not None:
                    _add_product(to_texts, gradient.mT, image[rows])
            if to_texts is not None:
                to_texts = ring.exchange(to_texts)()
    return to_image, to_texts, pairs.totals()


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    if total.dtype is one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _logits(image: Tensor, text: Tensor, rows: slice, scale: Tensor, bias: Tensor):
    """⟨image, text⟩ of some rows, z, and which pairs belong together; differentiable."""
    (similarity,) = ops.upcast(image[rows] @ text.mT)
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


def gradients_formula(grad_output: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int):
    """The gradients as differentiable expressions, computed again chunk by chunk for each further derivative."""
    grad = grad_output.to(_sum_type(image)) / image.shape[0]

    def of_chunk(grad, image, text, scale, bias, rows):
        similarity, z, together = _logits(image, text, rows, scale, bias)
        pairs = weighted(torch.where(together, -grad, grad), z, "sigmoid", 0)
        wide_image, wide_text = ops.upcast(image[rows], text)
        return scale * (pairs @ wide_text), scale * (pairs.mT @ wide_image), (pairs * similarity).sum(), pairs.sum()

    parts = [
        checkpoint(of_chunk, grad, image, text, scale, bias, rows, use_reentrant=False) for rows in _chunks(image, chunk_size)
    ]
    to_image, *others = zip(*parts)
    results = torch.cat(to_image), *(sum(each[1:], each[0]) for each in others)
    return tuple(result.to(of.dtype) for result, of in zip(results, (image, text, scale, bias)))


_apply = super(Function, SigLIPFunction).apply


def apply(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, chunk_size: int, group, dtype: torch.dtype) -> Tensor:
    """The loss in `dtype`; under transforms, forward mode and tracers by its formula."""
    if more_than_reverse_mode_listens() or not image.numel():
        return formula(image, text, scale, bias, chunk_size, dtype)
    tensors = map(torch._C._functorch.unwrap_if_dead, (image, text, scale, bias))
    return _apply(*tensors, chunk_size, group, dtype)


_calls: dict[str, int] = {}


def told_by_ranks(group, told: str) -> list[str]:
    """What each rank tells the others at this call, over the group's store: hosts talk, and no device is waited for."""
    store = dist.distributed_c10d._get_process_group_store(group)
    call = _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def key(call, rank):
        return f"torch_sigmoid/siglip/{call}/{rank}"

    store.set(key(call, rank), told)
    found = store.multi_get([key(call, other) for other in range(size)])
    if call > 1:
        # Every rank has begun this call, so all have read what was told at the last one.
        store.delete_key(key(call - 1, rank))
    return [each.decode() for each in found]
