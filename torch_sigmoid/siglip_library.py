"""SigLIP's loss as an operator of torch.library, which compilers do not look into: compiled code never holds the whole matrix.

Imported when torch.compile first meets the loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import Gradients
from .ring import Alone
from .siglip import gradients_of, value_and_factors


@torch.library.custom_op("torch_sigmoid::siglip", mutates_args=())
def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σ log(1 + e^z), and the factors of the gradients; a factor that is not needed has no elements."""
    if not (image.numel() and text.numel()):
        return tuple(each.zero_() for each in _results(image, text, scale, bias, needs))
    ids = image_ids, text_ids
    total, factors = value_and_factors(image, text, scale, bias, *ids, chunk_size, Alone(), needs)
    # What an operator returns must have memory of its own.
    return total.clone(), *(scale.new_empty(0) if each is None else each if each.dim() else each.clone() for each in factors)


@siglip.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return _results(image, text, scale, bias, options[-1])


def _results(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    operands = image, text, scale, bias
    return scale.new_empty(()), *(scale.new_empty(each.shape if needed else 0) for each, needed in zip(operands, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, _, _, _, ctx.needs = inputs
    ctx.save_for_backward(*operands, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, *to_factors: Tensor | None) -> Gradients:
    if grad_output is None or any(each is not None for each in to_factors):
        raise RuntimeError("torch_sigmoid::siglip has no second derivative; call torch_sigmoid.siglip_loss uncompiled for it")
    *operands, to_image, to_text, to_scale, to_bias = ctx.saved_tensors
    factors = to_image, to_text, to_scale, to_bias
    needed = tuple(factor if needed else None for factor, needed in zip(factors, ctx.needs))
    return *gradients_of(grad_output, tuple(operands), needed), None, None, None, None


siglip.register_autograd(_backward, setup_context=_save)
