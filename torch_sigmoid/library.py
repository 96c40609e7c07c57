"""The operators of torch.library: what may not look into a call, or must not, sees one operator of `torch.ops.torch_sigmoid`.

    {family}(*tensors, *constants)                                      the value
    {family}_backward(grad_output, *tensors, *constants)                the gradients
    {family}_double_backward(*grads, grad_output, *tensors, *constants) for what reaches these: what reaches the arguments

The families are sigmoid, unary (SiLU, log-sigmoid, QuickGELU), gated (of two tensors), gated_packed, interleaved and loss. Each
operator has a fake implementation, a derivative, and a sharding rule: a DTensor runs it once on its shard, by a kernel where
one can run. The public functions call them for DTensors and fake tensors only; eager calls on plain tensors and compiled code
do not pay for them. `import torch_sigmoid.library` makes them known to torch, which the first such call does by itself. The
operator of siglip_loss, for torch.compile, is in siglip_library.py.

shards.py says where DTensors have to lie. The functions redistribute them before the call, and save them as they lie then, so
that backward need not do it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Placement, Replicate

from . import siglip_library as siglip_library
from .autograd import (
    Operator,
    operator_backward,
    sigmoid_backward,
    sigmoid_gradient,
    sigmoid_gradient_formula,
    sigmoid_second_gradients,
    sigmoid_second_gradients_formula,
    sigmoid_value,
)
from .dispatch import Save, Tensors
from .gates import Gated, Interleaved, Unary
from .internals import register_sharding_rule
from .losses import Loss
from .shards import Linear, Placed, Placements, follow, full_shape

NAMESPACE = "torch_sigmoid"


@dataclass(frozen=True)
class Sigmoid(Operator):
    """σ(x) as an operator. Its derivatives are functions of what `save` keeps."""

    save: Save

    def forward(self, input: Tensor) -> tuple[Tensor]:
        return (sigmoid_value(input),)

    def backward(self, grad_output: Tensor, saved: Tensor) -> tuple[Tensor]:
        return (sigmoid_gradient(grad_output, saved, self.save),)

    def double_backward(self, grads: Tensors, grad_output: Tensor, saved: Tensor) -> Tensors:
        return sigmoid_second_gradients(grads[0], grad_output, saved, self.save)

    def backward_formula(self, grad_output: Tensor, saved: Tensor) -> tuple[Tensor]:
        return (sigmoid_gradient_formula(grad_output, saved, self.save),)

    def double_backward_formula(self, grads: Tensors, grad_output: Tensor, saved: Tensor) -> Tensors:
        return sigmoid_second_gradients_formula(grads[0], grad_output, saved, self.save)


class Family(NamedTuple):
    """A family's name, how torch.library spells its arguments, and the operator that its constants make."""

    name: str
    operands: str
    constants: str
    operator: Callable[..., Operator]

    @property
    def n_operands(self) -> int:
        return self.operands.count(",") + 1

    @property
    def n_gradients(self) -> int:
        return 1 if self.operator is Loss else self.n_operands


_GATE = "str function, int? dim, bool gate_first, float alpha, float? limit, float offset"
_LOSS = "float gamma, float? alpha, float label_smoothing, int? ignore_index, str reduction, ScalarType dtype"
FAMILIES = (
    Family("sigmoid", "Tensor input", "str save", Sigmoid),
    Family("unary", "Tensor input", "str function, float alpha", Unary),
    Family("gated", "Tensor first, Tensor second", _GATE, Gated),
    Family("gated_packed", "Tensor packed", _GATE, Gated),
    Family("interleaved", "Tensor packed", _GATE, Interleaved),
    Family("loss", "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight", _LOSS, Loss),
)


def family_of(operator: Operator) -> Family:
    if isinstance(operator, Gated) and not isinstance(operator, Interleaved):
        return FAMILIES[2 if operator.dim is None else 3]
    return next(family for family in FAMILIES if family.operator is type(operator))


def whole(operator: Operator, operands: Sequence[Tensor | None]) -> Tensor:
    """A tensor, or a view, of the shape and the memory format of the value before it is reduced."""
    first = cast(Tensor, operands[0])
    return operator.parts(cast(Tensors, operands))[0] if isinstance(operator, Gated) else first


def value_like(operator: Operator, operands: Sequence[Tensor | None]) -> Tensor:
    """An empty tensor of the shape, the dtype and the memory format of the value."""
    like = whole(operator, operands)
    if not isinstance(operator, Loss):
        return torch.empty_like(like)
    if operator.reduction == "none":
        return torch.empty_like(like, dtype=operator.dtype)
    return like.new_empty((), dtype=operator.dtype)


def gradients_like(operator: Operator, operands: Sequence[Tensor | None], n: int) -> Tensors:
    """Empty tensors like the gradients of the first `n` operands. Gates of one shape have theirs in one memory format."""
    differentiable = cast(Tensors, tuple(operands[:n]))
    if isinstance(operator, Gated) and differentiable[0].shape == differentiable[-1].shape:
        return operator.memory_for(differentiable)[0]
    return tuple(torch.empty_like(tensor) for tensor in differentiable)


class Entry(NamedTuple):
    """One of the operators of a family: `order` is 0 for the value, 1 for backward, 2 for double backward.

    Its tensors are what reaches the gradients (order 2), grad_output (1 and 2), and the operands.
    """

    family: Family
    order: int

    @property
    def name(self) -> str:
        return self.family.name + ("", "_backward", "_double_backward")[self.order]

    @property
    def n_before(self) -> int:
        """The number of tensors before the operands."""
        return (0, 1, 1 + self.family.n_gradients)[self.order]

    @property
    def n_tensors(self) -> int:
        return self.n_before + self.family.n_operands

    @property
    def n_results(self) -> int:
        return (1, self.family.n_gradients, 1 + self.family.n_gradients)[self.order]

    @property
    def schema(self) -> str:
        grads = [f"Tensor grad_{i}" for i in range(self.family.n_gradients)] if self.order == 2 else []
        upstream = ["Tensor grad_output"] if self.order else []
        arguments = ", ".join((*grads, *upstream, self.family.operands, self.family.constants))
        results = ", ".join(["Tensor"] * self.n_results)
        return f"({arguments}) -> {results if self.n_results == 1 else f'({results})'}"

    def split(self, arguments: Sequence[Any]) -> tuple[Operator, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The operator that the constants make, the tensors before the operands, and the operands."""
        tensors, constants = arguments[: self.n_tensors], arguments[self.n_tensors :]
        return self.family.operator(*constants), tuple(tensors[: self.n_before]), tuple(tensors[self.n_before :])

    def like(self, arguments: Sequence[Any]) -> Tensors:
        """Empty tensors like the results."""
        operator, before, operands = self.split(arguments)
        if self.order == 0:
            return (value_like(operator, operands),)
        gradients = gradients_like(operator, operands, self.family.n_gradients)
        grad_output = before[-1]
        if self.order == 1:
            # An element-wise gradient has the dtype of what reaches it, as in the kernels.
            return (gradients[0].to(grad_output.dtype),) if isinstance(operator, (Sigmoid, Unary)) else gradients
        full = whole(operator, operands)
        return torch.empty_like(full if grad_output.dim() else grad_output, dtype=grad_output.dtype), *gradients

    def compute(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        operator, before, operands = self.split(arguments)
        if self.order == 0:
            return operator.forward(*operands)[:1]
        extra = (operator.count(cast(Tensor, operands[1])),) if isinstance(operator, Loss) else ()
        if self.order == 1:
            return operator.backward(*before, *operands, *extra)
        *grads, grad_output = before
        return operator.double_backward(tuple(grads), grad_output, *operands, *extra)

    def formula(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """The results in differentiable torch operators; of orders 1 and 2."""
        operator, before, operands = self.split(arguments)
        extra = (operator.count(cast(Tensor, operands[1])),) if isinstance(operator, Loss) else ()
        if self.order == 1:
            return operator.backward_formula(*before, *operands, *extra)
        *grads, grad_output = before
        return operator.double_backward_formula(tuple(grads), grad_output, *operands, *extra)

    def places(self, arguments: Sequence[Any]) -> tuple[list[Placements], list[Placements]]:
        """The sharding rule: where the DTensors have to lie, and where the results then do."""
        operator, before, operands = self.split(arguments)
        n = self.family.n_gradients
        given = cast(list[Placed], [each for each in (*before, *operands) if each is not None])
        shapes = [tuple(each.shape) for each in given]
        full = full_shape(shapes)
        # Those of the operands, after that of grad_output in a double backward, as they stand among the arguments.
        results = shapes[self.n_before - (self.order == 2) :][: self.n_results] if self.order else [full]
        kept_whole: Sequence[int] = ()
        linear = []
        if self.order:
            # Backward is linear in grad_output, and double backward in what reaches the gradients.
            linear.append(Linear(frozenset(range(n if self.order == 2 else 1)), frozenset(range(self.n_results))))
        if isinstance(operator, Loss):
            kept_whole = range(len(full)) if operator.reduction == "mean" else ()
            results = [()] if self.order == 0 and operator.reduction != "none" else results
        elif isinstance(operator, Gated):
            if len(operands) == 1:
                kept_whole = ((-1 if operator.dim is None else operator.dim) % len(full),)
            elif operator.limit is None and not operator.offset and self.order < 2:
                a = int(operator.gate_first)
                linear.append(Linear(frozenset((self.order + a,)), frozenset((1 - a if self.order else 0,))))
        return follow(given, results, kept_whole, linear)


def _unpacked(results: Sequence[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _define(entry: Entry) -> Callable[..., Any]:
    """Make the operator known to torch; returns it."""

    def compute(*arguments: Any) -> Any:
        results = entry.compute(arguments)
        if not all(each is None or each.is_contiguous() for each in (*results, *arguments[: entry.n_tensors])):
            # Torch's operators need not choose the memory format that the fake implementation promises.
            results = [
                result if result.stride() == each.stride() else torch.empty_like(each, dtype=result.dtype).copy_(result)
                for result, each in zip(results, entry.like(arguments))
            ]
        return _unpacked(results)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.constants = inputs[: entry.n_tensors], inputs[entry.n_tensors :]
        from_output = entry == Entry(FAMILIES[0], 0) and ctx.constants == ("output",)
        ctx.save_for_backward(*((output,) if from_output else tensors))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients: Sequence[Tensor | None]
        if any(ctx.needs_input_grad[entry.n_before + entry.family.n_gradients : entry.n_tensors]):
            raise RuntimeError(f"{qualified}: expected that target and weights need no gradient; the public functions give it")
        if entry.order == 0:
            operator, *_ = entry.split((*tensors, *ctx.constants))
            gradients = _gradients(operator, grads[0], tensors)
        else:
            # No operator is the derivative of these two: their formulas are derived.
            with torch.enable_grad():
                leaves = [each if each is None or each.requires_grad else each.detach() for each in tensors]
                results = entry.formula((*leaves, *ctx.constants))
            wanted = [i for i, each in enumerate(leaves) if each is not None and each.requires_grad]
            found = torch.autograd.grad(
                results, [leaves[i] for i in wanted], grads, allow_unused=True, create_graph=torch.is_grad_enabled()
            )
            gradients = [None] * len(tensors)
            for i, gradient in zip(wanted, found):
                gradients[i] = gradient
        return *gradients, *[None] * (entry.n_tensors + len(ctx.constants) - len(gradients))

    qualified = f"{NAMESPACE}::{entry.name}"
    operator = torch.library.custom_op(qualified, compute, mutates_args=(), schema=entry.schema)
    operator.register_fake(lambda *arguments: _unpacked(entry.like(arguments)))
    operator.register_autograd(backward, setup_context=setup_context)
    overload = getattr(getattr(torch.ops, NAMESPACE), entry.name).default
    register_sharding_rule(overload, entry.n_tensors, entry.places)
    return cast(Callable[..., Any], overload)


def _gradients(operator: Operator, grad_output: Tensor, saved: Tensors) -> Tensors:
    if isinstance(operator, Sigmoid):
        return (sigmoid_backward(grad_output, saved[0], operator.save),)
    return operator_backward(Seen(operator), grad_output, *saved)


_ENTRIES = {(family.name, order): Entry(family, order) for family in FAMILIES for order in range(3)}
OPERATORS = {key: _define(entry) for key, entry in _ENTRIES.items()}


class Seen(Operator):
    """An operator whose value and derivatives are those of torch.library, one call each."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.name = family_of(operator).name
        self.constants = astuple(operator)  # type: ignore[call-overload]  # all of them are dataclasses
        self.n_differentiable = operator.n_differentiable  # type: ignore[misc]
        self.formula_from = operator.formula_from  # type: ignore[misc]

    def _call(self, order: int, *tensors: Tensor | None) -> Tensors:
        results = OPERATORS[self.name, order](*tensors, *self.constants)
        return results if isinstance(results, tuple) else (results,)

    def _formula(self, order: int, *tensors: Tensor | None) -> Tensors:
        return tuple(_ENTRIES[self.name, order].formula((*tensors, *self.constants)))

    def forward(self, *operands: Tensor | None) -> tuple[Tensor]:
        return cast(tuple[Tensor], self._call(0, *operands))

    def backward(self, grad_output: Tensor, *operands: Tensor | None) -> Tensors:
        return self._call(1, grad_output, *operands)

    def double_backward(self, grads: Tensors, grad_output: Tensor, *operands: Tensor | None) -> Tensors:
        return self._call(2, *grads, grad_output, *operands)

    def backward_formula(self, grad_output: Tensor, *operands: Tensor | None) -> Tensors:
        return self._formula(1, grad_output, *operands)

    def double_backward_formula(self, grads: Tensors, grad_output: Tensor, *operands: Tensor | None) -> Tensors:
        return self._formula(2, *grads, grad_output, *operands)

    def formula(self, *operands: Tensor | None) -> Tensor:
        return self.operator.formula(*operands)

    def jvp_formula(self, tangents: Tensors, *operands: Tensor | None) -> Tensor:
        return self.operator.jvp_formula(tangents, *operands)

    def batched(self) -> "Seen":
        return Seen(self.operator.batched())


def in_place(operator: Operator, operands: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The operands, redistributed to where the operator runs on them; differentiable.

    Plain tensors among DTensors, and DTensors of several meshes, stay as they are: the operator then raises torch's error.
    """
    distributed = [each for each in operands if isinstance(each, DTensor)]
    if any(each is not None and not isinstance(each, DTensor) for each in operands):
        return operands
    if any(each.device_mesh != distributed[0].device_mesh for each in distributed):
        return operands
    entry = _ENTRIES[family_of(operator).name, 0]
    inputs, _ = entry.places((*operands, *astuple(operator)))  # type: ignore[call-overload]  # all of them are dataclasses
    placed = iter(map(moved, distributed, inputs))
    return [each if each is None else next(placed) for each in operands]


def moved(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """`tensor.redistribute(placements=placements)`, differentiable to any order."""
    return tensor if tensor.placements == tuple(placements) else _MovedFunction.apply(tensor, placements)


class _MovedFunction(Function):
    """torch's own backward of `redistribute` has no derivative in torch 2.11: second derivatives would lack a term."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, tensor: DTensor, placements: Sequence[Placement]) -> DTensor: ...

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
        # What reaches a sum reaches each of its terms.
        ctx.placements = [Replicate() if each.is_partial() else each for each in tensor.placements]
        return tensor.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, grad_output: DTensor) -> tuple[DTensor, None]:
        return moved(grad_output, ctx.placements), None


def seen(operator: Operator, operands: Sequence[Tensor | None]) -> tuple[Seen, Sequence[Tensor | None]]:
    """The operator as torch.library's, and its operands where it runs on them."""
    return Seen(operator), in_place(operator, operands)
