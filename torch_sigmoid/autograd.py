"""The autograd.Functions: what is saved, and the derivative of each derivative, once for all families.

Sigmoid
    σ = σ(x)                            SigmoidFunction            saves σ ("output") or x ("input"), and nothing else
    grad_input = grad_output·σ'         SigmoidBackwardFunction    saves grad_output and the same tensor

From σ, σ' = σ(1-σ) and ∂σ'/∂σ = 1-2σ: no memory beyond the output, and the precision of the rounded σ. From x,
σ' = e/(1+e)² with e = e^-|x|, and ∂σ'/∂x = -σ'·tanh(x/2): exact in both tails, at the cost of keeping x alive.

Gates and losses, each an `Operator` that knows its value, its gradients and the gradients of those
    y = operator(*tensors)                    OperatorFunction            saves the tensors
    grads = operator'(grad_output, *tensors)  OperatorBackwardFunction    saves grad_output and the tensors

A second derivative is one kernel; where a third may follow it is built from differentiable pieces, hence of any order.
All Functions stand in this file, which is longer than others, so that what each one saves can be compared with its neighbours.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch, eager, kernels
from .dispatch import (
    MAX_LIKENESSES,
    NOBODY,
    PLAIN_TYPES,
    REVERSE_MODE,
    TRACER,
    TRANSFORM,
    WIDE_DTYPES,
    Gradients,
    Save,
    Tensors,
    asks_library,
    compiles_reverse_mode,
    exports,
    known_launchable,
    launchable,
    listener,
    promote,
    remembered,
    wants_gradient,
)
from .formulas import curvature_from_output, sigmoid_grad_from_input, sigmoid_grad_from_output, upcast
from .formulas import sigmoid as sigmoid_formula
from .internals import (
    Likeness,
    apply_of,
    is_legacy_batched,
    is_tracing,
    likeness,
    nested_jvp,
    plain_grad_mode,
    unwrap_if_dead,
)


def batch_first(info: Any, in_dims: Sequence[int | None], *tensors: Tensor) -> Tensors:
    """Each tensor with its batch dimension first, expanded (not copied) where it has none."""
    return tuple(
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims)
    )


def library() -> ModuleType:
    """The operators of torch.library, which are not made before somebody asks for them."""
    return importlib.import_module(".library", __package__)


# Sigmoid on values: the kernel where the tensors allow it, else the formula in torch operators.


def sigmoid_value(input: Tensor) -> Tensor:
    """σ(x)."""
    value: Tensor
    if type(input) not in PLAIN_TYPES and asks_library(input):
        value = library().OPERATORS["sigmoid", 0](input, "output")
    elif is_tracing() or input.numel() < dispatch.threshold or not launchable(input):
        value = torch.sigmoid(input)
    else:
        value = kernels.sigmoid.sigmoid_forward(input)
    return value


def sigmoid_gradient(grad_output: Tensor, saved: Tensor, save: Save) -> Tensor:
    """grad_output·σ'."""
    gradient: Tensor
    if launchable(saved, grad_output):
        gradient = kernels.sigmoid.sigmoid_backward(grad_output, saved, save == "input", remembered(grad_output, saved))
        return gradient
    if asks_library(saved):
        gradient = library().OPERATORS["sigmoid", 1](grad_output, saved, save)
        return gradient
    if save == "input" and eager.takes(saved, grad_output):
        return eager.sigmoid_gradient(grad_output, saved)
    return sigmoid_gradient_formula(grad_output, saved, save)


def sigmoid_gradient_formula(grad_output: Tensor, saved: Tensor, save: Save) -> Tensor:
    """grad_output·σ' in torch operators, differentiable."""
    formula = sigmoid_grad_from_output if save == "output" else sigmoid_grad_from_input
    return formula(upcast(grad_output), upcast(saved)).to(grad_output.dtype)


def sigmoid_second_gradients(grad_grad_input: Tensor, grad_output: Tensor, saved: Tensor, save: Save) -> tuple[Tensor, Tensor]:
    """The gradients that reach `grad_output` and `saved` when `grad_grad_input` reaches their grad_output·σ'."""
    if launchable(saved, grad_output, grad_grad_input):
        gradients: tuple[Tensor, Tensor] = kernels.sigmoid.sigmoid_double_backward(
            grad_grad_input, grad_output, saved, save == "input"
        )
        return gradients
    if asks_library(saved):
        second_gradients: tuple[Tensor, Tensor] = library().OPERATORS["sigmoid", 2](grad_grad_input, grad_output, saved, save)
        return second_gradients
    return sigmoid_second_gradients_formula(grad_grad_input, grad_output, saved, save)


def sigmoid_second_gradients_formula(
    grad_grad_input: Tensor, grad_output: Tensor, saved: Tensor, save: Save
) -> tuple[Tensor, Tensor]:
    """The same in torch operators, differentiable."""
    return (
        sigmoid_gradient_formula(grad_grad_input, saved, save).to(grad_output.dtype),
        _curvature(grad_grad_input, grad_output, saved, save, sigmoid_gradient_formula),
    )


def _curvature(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    saved: Tensor,
    save: Save,
    gradient: Callable[[Tensor, Tensor, Save], Tensor],
) -> Tensor:
    """grad_grad_input·grad_output·∂σ'/∂saved; differentiable if `gradient`, which gives grad·σ', is."""
    outer, grad, wide = upcast(grad_grad_input), upcast(grad_output), upcast(saved)
    if save == "output":
        result = outer * grad * curvature_from_output(wide)
    else:
        result = -gradient(outer * grad, wide, save) * torch.tanh(wide / 2)
    return result.to(saved.dtype)


class SigmoidFunction(Function):
    """`SigmoidFunction.apply(input, save="output")`: σ(x) with the gradient that `save` promises.

    Saves σ for save="output", x for save="input". `torch_sigmoid.sigmoid` is the validated way to call it: the function checks
    what it is given, and takes this Function where autograd has to record it.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> torch_sigmoid.SigmoidFunction.apply(x, "input").sum().backward()
        >>> x.grad
        tensor([0.2500, 0.2500])
    """

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, input: Tensor, save: Save = "output") -> Tensor: ...

    @staticmethod
    def forward(input: Tensor, save: Save = "output") -> Tensor:
        return sigmoid_value(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Save], output: Tensor) -> None:
        input, ctx.save = inputs
        saved = output if ctx.save == "output" else input
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Gradients:
        if grad_output is None:
            return None, None
        (saved,) = ctx.saved_tensors
        return sigmoid_backward(grad_output, saved, ctx.save), None

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor | None, _: None) -> Tensor | None:
        if input_tangent is None:
            return None
        if nested_jvp():
            raise RuntimeError("SigmoidFunction loses tangents under nested torch.func.jvp; call torch_sigmoid.sigmoid there")
        (saved,) = ctx.saved_tensors
        return sigmoid_backward(input_tangent, saved, ctx.save)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], input: Tensor, save: Save) -> tuple[Tensor, int | None]:
        return SigmoidFunction.apply(input, save), in_dims[0]


class SigmoidBackwardFunction(Function):
    """grad_output·σ' as a differentiable function of grad_output and of what was saved."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, grad_output: Tensor, saved: Tensor, save: Save) -> Tensor: ...

    @staticmethod
    def forward(grad_output: Tensor, saved: Tensor, save: Save) -> Tensor:
        return sigmoid_gradient(grad_output, saved, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Save], output: Tensor) -> None:
        *tensors, ctx.save = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor | None) -> Gradients:
        if grad_grad_input is None:
            return None, None, None
        grad_output, saved = ctx.saved_tensors
        needs_grad_output, needs_saved, _ = ctx.needs_input_grad
        if needs_grad_output and needs_saved and listener() == NOBODY:
            return *sigmoid_second_gradients(grad_grad_input, grad_output, saved, ctx.save), None
        return (
            sigmoid_backward(grad_grad_input, saved, ctx.save) if needs_grad_output else None,
            _curvature(grad_grad_input, grad_output, saved, ctx.save, sigmoid_backward) if needs_saved else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, grad_output_tangent: Tensor | None, saved_tangent: Tensor | None, _: None) -> Tensor | None:
        grad_output, saved = ctx.saved_tensors
        terms = []
        if grad_output_tangent is not None:
            terms.append(sigmoid_backward(grad_output_tangent, saved, ctx.save))
        if saved_tangent is not None:
            terms.append(_curvature(saved_tangent, grad_output, saved, ctx.save, sigmoid_backward))
        return sum(terms[1:], start=terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, saved: Tensor, save: Save) -> tuple[Tensor, int]:
        grad_output, saved = batch_first(info, in_dims, grad_output, saved)
        return SigmoidBackwardFunction.apply(grad_output, saved, save), 0


class SigmoidInplaceFunction(Function):
    """σ(x) written over x; saves σ, which is then the same tensor. torch's operator writes: N1 makes the values equal."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, input: Tensor) -> Tensor: ...

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.mark_dirty(input)
        output = input.sigmoid_()
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
        if grad_output is None:
            return None
        (output,) = ctx.saved_tensors
        return sigmoid_backward(grad_output, output, "output")


class _EagerSigmoidFromOutput(Function):
    """SigmoidFunction with save="output" for eager reverse mode, which needs neither setup_context nor its cost."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = sigmoid_value(input)
        # What `save_for_backward` and `set_materialize_grads` set, without two calls.
        ctx.to_save = (output,)
        ctx.materialize_grads = False
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
        return None if grad_output is None else sigmoid_backward(grad_output, ctx.saved_tensors[0], "output")


class _EagerSigmoidFromInput(Function):
    """SigmoidFunction with save="input", likewise."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.to_save = (input,)
        ctx.materialize_grads = False
        return sigmoid_value(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Tensor | None:
        return None if grad_output is None else sigmoid_backward(grad_output, ctx.saved_tensors[0], "input")


class _CompiledSigmoidFromInput(Function):
    """SigmoidFunction with save="input" for torch.compile."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, input: Tensor) -> Tensor: ...

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return torch.sigmoid(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        with torch.enable_grad():  # torch.compile turns it off, for its backend "eager" too
            return sigmoid_gradient_formula(grad_output, ctx.saved_tensors[0], "input")


def traced_sigmoid(input: Tensor, save: Save) -> Tensor:
    """σ(input) for a tracer, in torch's operators.

    From the output, Inductor computes torch's own gradient as we do: in fp32, rounded once.
    """
    if save == "output" or exports():
        return torch.sigmoid(input)
    if not compiles_reverse_mode():
        return sigmoid_formula(input)
    return _CompiledSigmoidFromInput.apply(input) if wants_gradient(input) else torch.sigmoid(input)


_apply_eagerly: dict[Save, Callable[..., Tensor]] = {
    "output": apply_of(_EagerSigmoidFromOutput),
    "input": apply_of(_EagerSigmoidFromInput),
}


_STRIDED = torch.strided
# By `save`: what recognises inputs like those that were recorded for eager reverse mode before.
_known_inputs: dict[Save, list[Likeness]] = {"output": [], "input": []}


def record_known(input: Tensor, save: Save) -> Tensor | None:
    """σ(input), recorded, if eager reverse mode listens and an input like this was recorded for it before; else None.

    `sigmoid` and `record_sigmoid` would do the same, but ask twice as long.
    """
    if not plain_grad_mode():
        return None
    try:
        likenesses = _known_inputs[save]
        if not likenesses or input.layout is not _STRIDED or input.is_nested:
            return None
        for is_alike in likenesses:
            if is_alike(input):
                break
        else:
            return None
    except (AttributeError, KeyError, TypeError):  # what is not a tensor, is not a `save`, or cannot be one
        return None
    if is_alike is not likenesses[0]:
        promote(likenesses, is_alike)
    return _apply_eagerly[save](input)


def _remember(input: Tensor, save: Save) -> None:
    """Have `record_known` recognise such inputs."""
    # A DTensor is first put in place; and whether to record inputs of the other dtypes depends on `torch_below`, too.
    known = _known_inputs[save]
    if type(input) in PLAIN_TYPES and (save == "input" or input.dtype not in WIDE_DTYPES) and len(known) < MAX_LIKENESSES:
        known.append(likeness(input, any_size=True))


def record_sigmoid(input: Tensor, save: Save, listening: int) -> Tensor:
    """σ(input), recorded for whoever listens; a tracer must not."""
    if type(input) not in PLAIN_TYPES and asks_library(input):
        (input,) = library().in_place(library().Sigmoid(save), [input])
    if listening >= TRANSFORM:
        return SigmoidFunction.apply(input, save)
    if listening == REVERSE_MODE and input.requires_grad:
        # After a transform ends, its tensors are dead wrappers: unwrap them, so that the graph sees the tensor inside.
        input = unwrap_if_dead(input)
        _remember(input, save)
        return _apply_eagerly[save](input)
    return sigmoid_value(input)


def sigmoid_backward(grad_output: Tensor, saved: Tensor, save: Save) -> Tensor:
    """grad_output·σ', differentiable where that is asked for."""
    if known := known_launchable(grad_output, saved):
        gradient: Tensor = kernels.sigmoid.sigmoid_backward(grad_output, saved, save == "input", known)
        return gradient
    listening = listener()
    if listening == NOBODY:
        return sigmoid_gradient(grad_output, saved, save)
    if listening == TRACER or is_legacy_batched(grad_output) or is_legacy_batched(saved):
        # What a Function records on such a wrapper (is_grads_batched=True, create_graph=True) is lost with it.
        return sigmoid_gradient_formula(grad_output, saved, save)
    return SigmoidBackwardFunction.apply(grad_output, saved, save)


# The value, and the count that a loss adds to it.
Value = tuple[Tensor] | tuple[Tensor, Tensor | None]


class Operator:
    """What the Functions below ask of an operator: its value and derivatives, by one kernel each, or in torch operators.

    `tensors` are its operands, of which the first `n_differentiable` get gradients (all by default), followed by what
    `forward` has added to them for backward. Kernels run where `launchable` allows it, else the formulas, which are
    differentiable:

        forward(*tensors)                                  the value, and what else backward needs, as a tuple
        backward(grad_output, *tensors)                    the gradients
        double_backward(grads, grad_output, *tensors)      for what reaches these: what reaches grad_output and the operands
        formula, backward_formula, double_backward_formula, jvp_formula    likewise, in torch operators
        value_formula(*tensors)                            as `forward`, in torch operators, whose derivatives nobody asks for
        plain(*tensors)                                    the value as a user of torch would write it
        batched()                                          the operator on tensors with one more dimension in front
    """

    n_differentiable: ClassVar[int | None] = None
    # From this listener on the formula takes the place of the Functions.
    formula_from: ClassVar[int] = TRACER
    forward: Callable[..., Value]
    backward: Callable[..., Tensors]
    double_backward: Callable[..., Tensors]
    formula: Callable[..., Tensor]
    backward_formula: Callable[..., Tensors]
    double_backward_formula: Callable[..., Tensors]
    jvp_formula: Callable[..., Tensor]
    value_formula: Callable[..., Value]
    plain: Callable[..., Tensor]
    batched: Callable[[], "Operator"]


def _filled(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> Tensors:
    """Gradients or tangents, with zeros for those that nothing reaches."""
    return tuple(tensor.new_zeros(()).expand(tensor.shape) if grad is None else grad for grad, tensor in zip(grads, tensors))


def _padded(grads: Sequence[Tensor | None], ctx: Any) -> Gradients:
    """The gradients, after a None for the operator and before a None for each operand without a gradient."""
    return (None, *grads) + (None,) * (len(ctx.needs_input_grad) - 1 - len(grads))


class OperatorFunction(Function):
    """operator(*tensors), for torch.func and forward mode."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, operator: Operator, *tensors: Tensor | None) -> Tensor: ...

    @staticmethod
    def forward(operator: Operator, *tensors: Tensor | None) -> Tensor:
        return operator.forward(*tensors)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Gradients:
        if grad_output is None:
            return _padded((), ctx)
        return _padded(operator_backward(ctx.operator, grad_output, *ctx.saved_tensors), ctx)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        tensors: Tensors = ctx.saved_tensors
        operator: Operator = ctx.operator
        return operator.jvp_formula(_filled(tangents, tensors), *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: Operator, *tensors: Tensor) -> tuple[Tensor, int]:
        return OperatorFunction.apply(operator.batched(), *batch_first(info, in_dims[1:], *tensors)), 0


class _EagerOperatorFunction(Function):
    """operator(*tensors), for eager reverse mode, where `forward` may add to what is saved."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *tensors: Tensor | None) -> Tensor:
        output, *others = operator.forward(*tensors)
        ctx.operator = operator
        ctx.save_for_backward(*tensors, *others)
        ctx.set_materialize_grads(False)
        return output

    backward = OperatorFunction.backward


class OperatorBackwardFunction(Function):
    """The gradients of an operator's tensors as a differentiable function of grad_output and of them."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, operator: Operator, grad_output: Tensor, *tensors: Tensor | None) -> Tensors: ...

    @staticmethod
    def forward(operator: Operator, grad_output: Tensor, *tensors: Tensor | None) -> Tensors:
        return tuple(operator.backward(grad_output, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        if all(grad is None for grad in grads):
            return _padded((), ctx)
        grad_output, *tensors = ctx.saved_tensors
        operator: Operator = ctx.operator
        derive = operator.double_backward if listener() == NOBODY else operator.double_backward_formula
        return _padded(derive(_filled(grads, tensors), grad_output, *tensors), ctx)

    @staticmethod
    def jvp(ctx: Any, _: object, grad_output_tangent: Tensor | None, *tangents: Tensor | None) -> Tensors:
        grad_output, *tensors = ctx.saved_tensors
        operator: Operator = ctx.operator
        (grad_output_tangent,) = _filled([grad_output_tangent], [grad_output])
        of_grad_output = operator.backward_formula(grad_output_tangent, *tensors)
        # The second derivative is symmetric: what reaches the tensors from the tangents is what the tangents make of them.
        _, *of_tensors = operator.double_backward_formula(_filled(tangents, tensors), grad_output, *tensors)
        return tuple(one + other for one, other in zip(of_grad_output, of_tensors))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], operator: Operator, *tensors: Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        results = OperatorBackwardFunction.apply(operator.batched(), *batch_first(info, in_dims[1:], *tensors))
        return results, (0,) * len(results)


def operator_backward(operator: Operator, grad_output: Tensor, *tensors: Tensor | None) -> Tensors:
    """The gradients of the tensors, differentiable where that is asked for."""
    listening = listener()
    if listening == NOBODY:
        return operator.backward(grad_output, *tensors)
    if listening == TRACER or any(tensor is not None and is_legacy_batched(tensor) for tensor in (grad_output, *tensors)):
        # What a Function records on such a wrapper (is_grads_batched=True, create_graph=True) is lost with it.
        return operator.backward_formula(grad_output, *tensors)
    return OperatorBackwardFunction.apply(operator, grad_output, *tensors)


_apply_operator_eagerly = apply_of(_EagerOperatorFunction)


# Of operands that need not be asked any further.
_ORDINARY = frozenset((*PLAIN_TYPES, type(None)))


def recordable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as a Function can save it."""
    if tensor is None:
        return None
    if tensor.is_inference():
        # Autograd saves none, such as the gate that a frozen network computed for a trained operand.
        return tensor.clone()
    return unwrap_if_dead(tensor)


class _CompiledOperatorFunction(Function):
    """operator(*tensors) for torch.compile: its graph holds the gradient's formula, not what autograd makes of the value's."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, operator: Operator, *tensors: Tensor | None) -> Tensor: ...

    @staticmethod
    def forward(ctx: Any, operator: Operator, *tensors: Tensor | None) -> Tensor:
        output, *others = operator.value_formula(*tensors)
        ctx.operator = operator
        ctx.save_for_backward(*tensors, *others)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        with torch.enable_grad():  # as above
            return _padded(ctx.operator.backward_formula(grad_output, *ctx.saved_tensors), ctx)


def _traced(operator: Operator, *tensors: Tensor | None) -> Tensor:
    """operator(*tensors) for a tracer, in torch's operators."""
    if exports():
        return operator.plain(*tensors)
    if not compiles_reverse_mode():
        return operator.formula(*tensors)
    if not wants_gradient(*tensors):
        return operator.plain(*tensors)
    if wants_gradient(*tensors[operator.n_differentiable or len(tensors) :]):
        return operator.formula(*tensors)
    distinct: list[Tensor | None] = []
    for tensor in tensors:
        # torch.compile refuses a Function of one tensor given twice, as in swiglu(x, x).
        again = tensor is not None and any(tensor is each for each in distinct)
        distinct.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return _CompiledOperatorFunction.apply(operator, *distinct)


def record(operator: Operator, *tensors: Tensor | None) -> Tensor:
    """operator(*tensors), recorded for whoever listens. A tracer sees torch operators only, so it gets the formula."""
    listening = listener()
    if listening == TRACER:
        return _traced(operator, *tensors)
    n = operator.n_differentiable
    if listening >= operator.formula_from or (
        # Only the formula has the derivatives of the other operands.
        n is not None and listening == REVERSE_MODE and any(each is not None and each.requires_grad for each in tensors[n:])
    ):
        return operator.formula(*tensors)
    if not _ORDINARY.issuperset(map(type, tensors)) and any(each is not None and asks_library(each) for each in tensors):
        operator, tensors = library().seen(operator, tensors)
    if listening == TRANSFORM:
        return OperatorFunction.apply(operator, *tensors)
    if listening == NOBODY:
        return operator.forward(*tensors)[0]
    # A loop costs half of what `any` does.
    for each in tensors:
        if each is not None and each.requires_grad:
            return _apply_operator_eagerly(operator, *map(recordable, tensors))
    with torch.no_grad():  # so that the formulas know that nothing listens
        return operator.forward(*tensors)[0]
