"""Sigmoid: the functions."""

from typing import cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .autograd import SigmoidInplaceFunction, record_known, record_sigmoid, traced_sigmoid
from .checks import SAVE_MODES, check_save, check_tensors
from .dispatch import (
    REVERSE_MODE,
    TRACER,
    WIDE_DTYPES,
    Save,
    has_plain_storage,
    is_ours,
    is_small,
    listener,
    reaches_kernels,
)
from .internals import is_view, modes_listen


def _torch_gradient_suffices(input: Tensor) -> bool:
    """Whether torch's own sigmoid has the gradient that save="output" promises.

    Torch saves σ and multiplies in the tensor's dtype, which is right in fp32 and fp64; in bf16 on a CPU it multiplies in fp32.
    """
    return input.dtype in WIDE_DTYPES or (input.dtype is torch.bfloat16 and input.device.type == "cpu")


def sigmoid(input: Tensor, *, save: Save = "output", out: Tensor | None = None) -> Tensor:
    r"""σ(x) = 1 / (1 + e^-x), element by element, with a gradient that need not be lost where σ rounds to 1.

    The gradient is grad·σ·(1-σ), computed in fp32 (fp64 for fp64) and rounded once. From a σ that has itself been rounded,
    1-σ loses its digits as x grows: in bf16 it is 0 from x = 6.25 on. save="input" keeps x in place of σ and computes
    grad·e/(1+e)² with e = e^-|x|, which is the same function (σ' is even) and loses nothing in either tail.

    Args:
        input: a tensor of any shape, layout and dtype that torch.sigmoid takes. Float tensors keep their dtype, integers and
            bool give the default dtype. fp64, fp32, fp16 and bf16 have kernels; the rest is torch's own.
        save: "output" saves σ for backward, which the next layer usually keeps anyway: no extra memory. "input" saves x, which
            then stays alive until backward; the gradient is within 1 ulp of the true derivative in 16 bit, and within 4 in fp32
            on an H100, for every x between -87 and 87 (exhaustive.csv of its results; tests/bounds.py derives 4.5 from the
            errors that CUDA documents). Integer, complex, sparse and nested tensors have torch's own gradient under both.
        out: a tensor for the result, on its device; not differentiable, as in torch. The result is cast to its dtype, which
            may be narrower or wider, but not an integer one, nor a real one for a complex input.

    Returns:
        A tensor of input's shape and memory format. On a GPU it equals torch.sigmoid's bit for bit: on an H100 for every fp32,
        fp16 and bf16 input; executed on a CPU, the compiled kernel gives the bits of ATen's formula (tests/test_n1.py).

    Raises:
        TypeError: `input` or `out` is not a tensor.
        ValueError: `save` is neither "output" nor "input"; `out` is on another device, or of a dtype that takes no such result.
        RuntimeError: `out` is given where a gradient is wanted.

    Example:
        >>> x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
        >>> torch_sigmoid.sigmoid(x, save="input").backward()
        >>> round(x.grad.item(), 7)  # torch.sigmoid leaves 0
        0.0003357
    """
    if not isinstance(input, Tensor):
        if has_torch_function_unary(input):
            return cast(Tensor, handle_torch_function(sigmoid, (input,), input, save=save, out=out))
        check_tensors("sigmoid", input=input)
    if save not in SAVE_MODES:
        check_save(save)
    if out is not None:
        return _sigmoid_out(input, out)
    if is_small(input, save):
        return torch.sigmoid(input)
    if (recorded := record_known(input, save)) is not None:
        return recorded
    if not is_ours(input):
        return torch.sigmoid(input)
    listening = listener()
    if listening == TRACER:
        return traced_sigmoid(input, save)
    if save == "input" or reaches_kernels(input) or not _torch_gradient_suffices(input):
        return record_sigmoid(input, save, listening)
    return torch.sigmoid(input)


def sigmoid_(input: Tensor) -> Tensor:
    """σ(x) written over `input`, which is returned. Saves σ, the same tensor, for backward: no extra memory.

    The gradient is that of sigmoid(save="output"); under forward mode, transforms and tracers it is torch's own. A view in
    fp16 or bf16 that takes part in a gradient is computed out of place and copied back, as torch's rules on views demand.

    Args:
        input: a floating or complex tensor of any shape and layout.

    Raises:
        TypeError: `input` is not a tensor.
        RuntimeError: `input` is a leaf that requires grad, of an integer dtype, or a view that torch forbids to modify; it
            is unchanged then.

    Example:
        >>> x = torch.zeros(2)
        >>> torch_sigmoid.sigmoid_(x) is x, x
        (True, tensor([0.5000, 0.5000]))
    """
    if not isinstance(input, Tensor):
        if has_torch_function_unary(input):
            return cast(Tensor, handle_torch_function(sigmoid_, (input,), input))
        check_tensors("sigmoid_", input=input)
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if needs_grad and input.is_leaf:
        raise RuntimeError(
            "sigmoid_(): input is a leaf tensor that requires grad, whose value its gradient refers to; "
            "expected a tensor computed from it, or a call under torch.no_grad()"
        )
    only_reverse_mode = needs_grad and listener() == REVERSE_MODE and has_plain_storage(input) and not modes_listen()
    if not (only_reverse_mode and is_ours(input)) or _torch_gradient_suffices(input):
        return torch.sigmoid_(input)
    if is_view(input):
        return input.copy_(sigmoid(input))
    return SigmoidInplaceFunction.apply(input)


def _sigmoid_out(input: Tensor, out: Tensor) -> Tensor:
    """torch's own operator: its values are ours, there is no gradient, and it knows the rules of resizing and overlap."""
    check_tensors("sigmoid", out=out)
    dtype = input.dtype if input.dtype.is_floating_point or input.dtype.is_complex else torch.get_default_dtype()
    if not torch.can_cast(dtype, out.dtype) or out.device != input.device:
        expected = f"a dtype that {dtype} can be cast to, on {input.device}"
        raise ValueError(f"sigmoid(): out must have {expected}, got {out.dtype} on {out.device}")
    return torch.sigmoid(input, out=out)
