"""SigLIP's loss as an operator of torch.library, which compilers do not look into: compiled code never holds the whole matrix.

Imported when torch.compile first meets the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .dispatch import Gradients
from .ring import Alone
from .siglip import gradients_of, value_and_factors

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
) -> Results:
    """Σ log(1 + e^z), and the factors of the gradients; a factor that is not needed has no elements."""
    results = list(_results(Tensor.new_zeros, image, text, scale, bias, needs))
    if image.numel() and text.numel():
        ids = image_ids, text_ids
        total, factors = value_and_factors(image, text, scale, bias, *ids, chunk_size, Alone(), needs)
        for index, computed in enumerate((total, *factors)):
            if computed is not None:
                # What an operator returns must have memory of its own; the sums share theirs.
                results[index] = computed if computed.dim() else computed.clone()
    return cast(Results, tuple(results))


@siglip.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> Results:
    return _results(Tensor.new_empty, image, text, scale, bias, options[-1])


def _results(
    make: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, needs: Sequence[bool]
) -> Results:
    """Tensors of the results' shapes and dtype."""
    shapes = ((), *(each.shape if needed else (0,) for each, needed in zip((image, text, scale, bias), needs)))
    return cast(Results, tuple(make(scale, shape) for shape in shapes))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes, scale, ctx.needs = [each.dtype for each in inputs[:4]], inputs[2], inputs[-1]
    _, *factors = output
    ctx.mark_non_differentiable(*factors)
    ctx.save_for_backward(scale, *factors)


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Gradients:
    if torch.is_grad_enabled():
        raise RuntimeError("torch_sigmoid::siglip has no second derivative; got create_graph=True")
    scale, *factors = ctx.saved_tensors
    needed = tuple(factor if needed else None for factor, needed in zip(factors, ctx.needs))
    return *gradients_of(grad_output, scale, needed, ctx.dtypes), None, None, None, None


siglip.register_autograd(_backward, setup_context=_save)
