"""The gradient of sigmoid: what is saved, and the derivative of each derivative.

    σ = σ(x)                            SigmoidFunction            saves σ ("output") or x ("input"), and nothing else
    grad_input = grad_output·σ'         SigmoidBackwardFunction    saves grad_output and the same tensor

From σ, σ' = σ(1-σ) and ∂σ'/∂σ = 1-2σ: no memory beyond the output, and the precision of the rounded σ. From x,
σ' = e/(1+e)² with e = e^-|x|, and ∂σ'/∂x = -σ'·tanh(x/2): exact in both tails, at the cost of keeping x alive.
The second derivative is one kernel; where a third may follow it is built from differentiable pieces, hence of any order.
"""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import ops

_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def batch_first(info, in_dims, *tensors):
    """Each tensor with its batch dimension first, expanded (not copied) where it has none."""
    return tuple(
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims)
    )


class SigmoidFunction(Function):
    """`SigmoidFunction.apply(input, save="output")`: σ(x) with the gradient that `save` promises.

    Saves σ for save="output", x for save="input". `torch_sigmoid.sigmoid` is the validated way to call it.
    """

    @staticmethod
    def forward(input, save="output"):
        return ops.sigmoid_forward(input)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.save = inputs
        saved = output if ctx.save == "output" else input
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return None, None
        (saved,) = ctx.saved_tensors
        return sigmoid_backward(grad_output, saved, ctx.save), None

    @staticmethod
    def jvp(ctx, input_tangent, _):
        if input_tangent is None:
            return None
        if ops.forward_mode_is_nested():
            raise RuntimeError("SigmoidFunction loses tangents under nested torch.func.jvp; call torch_sigmoid.sigmoid there")
        (saved,) = ctx.saved_tensors
        return sigmoid_backward(input_tangent, saved, ctx.save)

    @staticmethod
    def vmap(info, in_dims, input, save):
        return SigmoidFunction.apply(input, save), in_dims[0]


class SigmoidBackwardFunction(Function):
    """grad_output·σ' as a differentiable function of grad_output and of what was saved."""

    @staticmethod
    def forward(grad_output, saved, save):
        return ops.sigmoid_backward(grad_output, saved, save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.save = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_grad_input):
        if grad_grad_input is None:
            return None, None, None
        grad_output, saved = ctx.saved_tensors
        needs_grad_output, needs_saved, _ = ctx.needs_input_grad
        if needs_grad_output and needs_saved and not differentiable_again():
            return *ops.sigmoid_double_backward(grad_grad_input, grad_output, saved, ctx.save), None
        return (
            sigmoid_backward(grad_grad_input, saved, ctx.save) if needs_grad_output else None,
            _curvature(grad_grad_input, grad_output, saved, ctx.save) if needs_saved else None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_output_tangent, saved_tangent, _):
        grad_output, saved = ctx.saved_tensors
        terms = []
        if grad_output_tangent is not None:
            terms.append(sigmoid_backward(grad_output_tangent, saved, ctx.save))
        if saved_tangent is not None:
            terms.append(_curvature(saved_tangent, grad_output, saved, ctx.save))
        return sum(terms[1:], start=terms[0]) if terms else None

    @staticmethod
    def vmap(info, in_dims, grad_output, saved, save):
        return SigmoidBackwardFunction.apply(*batch_first(info, in_dims, grad_output, saved), save), 0


class SigmoidInplaceFunction(Function):
    """σ(x) written over x; saves σ, which is then the same tensor. torch's operator writes: N1 makes the values equal."""

    @staticmethod
    def forward(ctx, input):
        ctx.mark_dirty(input)
        output = input.sigmoid_()
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return None
        (output,) = ctx.saved_tensors
        return sigmoid_backward(grad_output, output, "output")


class _EagerSigmoidFromOutput(Function):
    """SigmoidFunction with save="output" for eager reverse mode, which needs neither setup_context nor its cost."""

    @staticmethod
    def forward(ctx, input):
        output = ops.sigmoid_forward(input)
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return None if grad_output is None else sigmoid_backward(grad_output, ctx.saved_tensors[0], "output")


class _EagerSigmoidFromInput(Function):
    """SigmoidFunction with save="input", likewise."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        ctx.set_materialize_grads(False)
        return ops.sigmoid_forward(input)

    @staticmethod
    def backward(ctx, grad_output):
        return None if grad_output is None else sigmoid_backward(grad_output, ctx.saved_tensors[0], "input")


# Function.apply binds its arguments in Python at every call; below it is the C++ entry, which does not.
_apply_eager = {
    "output": super(Function, _EagerSigmoidFromOutput).apply,
    "input": super(Function, _EagerSigmoidFromInput).apply,
}


def sigmoid(input: Tensor, save: str) -> Tensor:
    """σ(input), recorded where anything listens: forward mode and transforms need SigmoidFunction, reverse mode less."""
    if _transforms_active() or forward_ad._current_level >= 0:
        return SigmoidFunction.apply(input, save)
    if input.requires_grad and _is_grad_enabled():
        # A tensor that has outlived its transform is a wrapper of the one that the graph knows.
        return _apply_eager[save](_unwrap_if_dead(input))
    return ops.sigmoid_forward(input)


def differentiable_again() -> bool:
    """Whether an operator called now must record how to differentiate it: create_graph, a dual level or a transform."""
    return _is_grad_enabled() or forward_ad._current_level >= 0 or _transforms_active()


def sigmoid_backward(grad_output: Tensor, saved: Tensor, save: str) -> Tensor:
    """grad_output·σ', differentiable where that is asked for."""
    if not (_is_grad_enabled() or _transforms_active() or forward_ad._current_level >= 0):
        return ops.sigmoid_backward(grad_output, saved, save)
    if _is_legacy_batched(grad_output) or _is_legacy_batched(saved):
        # What a Function records on such a wrapper (is_grads_batched=True, create_graph=True) is lost with it.
        return ops.sigmoid_backward_formula(grad_output, saved, save)
    return SigmoidBackwardFunction.apply(grad_output, saved, save)


def _curvature(grad_grad_input: Tensor, grad_output: Tensor, saved: Tensor, save: str) -> Tensor:
    """grad_grad_input·grad_output·∂σ'/∂saved, differentiable."""
    return ops.curvature_formula(grad_grad_input, grad_output, saved, save, sigmoid_backward)


def more_than_reverse_mode_listens() -> bool:
    """Whether a tracer, a transform or forward mode would see an operator called now."""
    return ops.only_torch_operators_are_seen() or _transforms_active() or forward_ad._current_level >= 0


def only_reverse_mode_listens(input: Tensor) -> bool:
    """Whether ordinary eager autograd is all that could record an operator on `input`."""
    return (
        not ops.only_torch_operators_are_seen()
        and ops.has_plain_storage(input)
        and forward_ad._current_level < 0
        and not _transforms_active()
        and not ops.modes_listen()
    )
