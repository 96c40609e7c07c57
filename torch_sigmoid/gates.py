"""The gates, on values and in autograd: log-sigmoid and SiLU of one tensor; GLU, x·σ(gate) and SwiGLU of two.

An operator here knows its value, its gradients and the gradients of those: by one Triton kernel each where that can run, else
by formulas in torch operators. It is put into autograd by two Functions, which save the inputs and nothing else:

    y = operator(*tensors)                    OperatorFunction            saves the tensors
    grads = operator'(grad_output, *tensors)  OperatorBackwardFunction    saves grad_output and the tensors

The formulas are kernels/maths.py's, each written in pieces whose own derivatives lose nothing either. So under tracers
autograd derives every derivative from the first one, and third derivatives come from the formula of the second.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

from . import ops
from .autograd import batch_first, differentiable_again
from .ops import kernels, upcast

# As in kernels/maths.py: an infinite x would make 0·∞ of a limit, and e^-|x| is subnormal where a product with it is not.
FAR = 1000.0
SHIFTS = {torch.float32: (75.875, -81.0), torch.float64: (690.0, -700.0)}
# Above it torch's fused operators lose nothing.
SHIFTED_FROM = -64.0


def exp_scaled(power: Tensor) -> tuple[Tensor, Tensor]:
    """e^power as e·scale, for power ≤ 0: neither is a subnormal number, and a product with e keeps its digits."""
    shift, start = SHIFTS[power.dtype]
    far = power < start
    # Of two numbers `where` would make a tensor of the default dtype, in which e^-690 is 0.
    return torch.exp(power + torch.where(far, shift, 0.0)), torch.where(far, math.exp(-shift), torch.ones_like(power))


def weighted(v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0) -> Tensor:
    """v·f(x), v·f'(x) or v·f"(x), by `order`, for f among "sigmoid", "silu" and "logsigmoid"; in fp32 or fp64.

    With `alpha`, f is silu(alpha·x)/alpha. Differentiable: each sign of x has an expression of its own, which is the function
    beyond that sign too.
    """
    if function == "logsigmoid" and order:
        return weighted(v, -x, "sigmoid", 0) if order == 1 else -weighted(v, x, "sigmoid", 1)
    gate = x if alpha == 1 else alpha * x
    below = gate < 0
    minus_abs = torch.where(below, gate, -gate)
    e, scale = exp_scaled(minus_abs)
    tail = e * scale
    if function == "logsigmoid":
        return v * (torch.where(below, x, 0.0) - torch.log1p(tail))
    one_plus = 1 + tail
    if order == 0:
        scale = torch.where(below, scale, 1.0)
        if function == "sigmoid":
            return v * (torch.where(below, e, 1.0) / one_plus) * scale
        # Above 0 as x - x·σ(-x), whose derivative autograd finds at ∞ too.
        near = x.clamp(-FAR / alpha, FAR / alpha)
        return v * torch.where(below, near * e / one_plus, x - near * tail / one_plus) * scale
    near = gate.clamp(-FAR, FAR)
    if function == "sigmoid":
        factor = e if order == 1 else torch.where(below, -e, e) * torch.expm1(minus_abs)
    elif order == 1:
        factor = torch.where(below, e * (one_plus + near), 1 + tail * (1 + near))
        scale = torch.where(below, scale, 1.0)
    else:
        factor = alpha * e * (2 * one_plus - torch.where(below, -near, near) * (1 - tail))
    # After the quotient v overflows only where the result does; before `scale`, it is subnormal only where the result is.
    return v * (factor / one_plus ** (order + 1)) * scale


def _weighted_now(v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0) -> Tensor:
    """`weighted` for values alone: where no x is far out, by torch's fused operators, at a fraction of the cost on a CPU."""
    if function == "logsigmoid" and order:
        return _weighted_now(v, -x, "sigmoid", 0) if order == 1 else -_weighted_now(v, x, "sigmoid", 1)
    now = order < 2 and x.device.type == "cpu" and not differentiable_again() and ops.computes_eagerly(x) and x.numel()
    gate = x if alpha == 1 else alpha * x
    # σ' is lost at both ends. A NaN among x says nothing of the others.
    if not now or not (-x.abs() if function == "sigmoid" and order else gate).amin() >= SHIFTED_FROM:
        return weighted(v, x, function, order, alpha)
    if order == 0:
        if alpha != 1:
            return v * torch.sigmoid(gate).mul_(x)
        return v * {"sigmoid": torch.sigmoid, "silu": F.silu, "logsigmoid": F.logsigmoid}[function](x)
    if function == "sigmoid":
        return ops.aten_sigmoid_backward(v, x.abs().neg_().sigmoid_())
    return v * torch.sigmoid(-gate).mul_(gate.clamp(max=FAR)).add_(1).mul_(torch.sigmoid(gate))


@dataclass(frozen=True)
class Unary:
    """y = f(x) for `function` "silu" or "logsigmoid"."""

    function: str

    def batched(self) -> "Unary":
        return self

    def forward(self, x):
        if ops.launchable(x):
            return kernels.gates.unary_forward(x, self.function, 1.0)
        return self.formula(x)

    def backward(self, grad_output, x):
        if ops.launchable(x, grad_output):
            return (kernels.gates.unary_backward(grad_output, x, self.function, 1.0),)
        return self.backward_formula(grad_output, x)

    def double_backward(self, grads, grad_output, x):
        (v,) = grads
        if ops.launchable(x, grad_output, v):
            return kernels.gates.unary_double_backward(v, grad_output, x, self.function, 1.0)
        return self.double_backward_formula(grads, grad_output, x)

    def formula(self, x):
        (wide,) = upcast(x)
        return _weighted_now(1.0, wide, self.function, 0).to(x.dtype)

    def backward_formula(self, grad_output, x):
        grad, wide = upcast(grad_output, x)
        return (_weighted_now(grad, wide, self.function, 1).to(grad_output.dtype),)

    def double_backward_formula(self, grads, grad_output, x):
        v, grad, wide = upcast(*grads, grad_output, x)
        to_grad_output = weighted(v, wide, self.function, 1)
        return to_grad_output.to(grad_output.dtype), weighted(v * grad, wide, self.function, 2).to(x.dtype)

    def jvp_formula(self, tangents, x):
        return self.backward_formula(*tangents, x)[0]


@dataclass(frozen=True)
class Gated:
    """y = A·h(G) of an operand a and a gate g, which may be the halves of one tensor along `dim`.

    h is `function`. If a `limit` or an `alpha` is given, the clamped form of SwiGLU, see kernels/gates.py. The gate of a
    "sigmoid" may be broadcast against the operand: of as many dimensions, each a's or 1.
    """

    function: str
    dim: int | None = None
    gate_first: bool = False
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    @property
    def constants(self):
        return self.function, self.alpha, self.limit, self.offset

    def batched(self) -> "Gated":
        return self if self.dim is None else replace(self, dim=self.dim + 1)

    def parts(self, tensors):
        """a and g."""
        if self.dim is not None:
            tensors = tensors[0].chunk(2, self.dim)
        return tensors[::-1] if self.gate_first else tensors

    def whole(self, a, g):
        """What has been computed for a and g, for the tensors they came from."""
        pair = (g, a) if self.gate_first else (a, g)
        return pair if self.dim is None else (torch.cat(pair, self.dim),)

    def memory_for(self, tensors):
        """Memory for the gradients of the tensors, and where in it those of a and g are."""
        # In one memory format: tensors of several cannot be walked as rows and columns.
        grads = tuple(torch.empty_like(tensors[0]) for _ in tensors)
        return grads, self.parts(grads)

    def forward(self, *tensors):
        a, g = self.parts(tensors)
        if not (ops.launchable(a, g) and a.numel()):
            return self.formula(*tensors)
        return kernels.gates.gate_forward(a, g, self.constants)

    def backward(self, grad_output, *tensors):
        a, g = self.parts(tensors)
        if not (ops.launchable(a, g, grad_output) and a.numel()):
            return self.backward_formula(grad_output, *tensors)
        if a.shape == g.shape:
            grads, out = self.memory_for(tensors)
            kernels.gates.gate_backward(grad_output, a, g, self.constants, out)
            return grads
        return kernels.gates.broadcast_backward(grad_output, a, g, self.constants)

    def double_backward(self, grads, grad_output, *tensors):
        (v, w), (a, g) = self.parts(grads), self.parts(tensors)
        if not (ops.launchable(a, g, grad_output, v, w) and a.numel()):
            return self.double_backward_formula(grads, grad_output, *tensors)
        if a.shape == g.shape:
            to_tensors, out = self.memory_for(tensors)
            return kernels.gates.gate_double_backward(v, w, grad_output, a, g, self.constants, out), *to_tensors
        return kernels.gates.broadcast_double_backward(v, w, grad_output, a, g, self.constants)

    # A, G and h in torch operators. A comparison, unlike a clamp, lets a NaN through, and leaves it a gradient.

    def _operand(self, a):
        if self.limit is not None:
            a = torch.where(a > self.limit, self.limit, torch.where(a < -self.limit, -self.limit, a))
        return a + self.offset if self.offset else a

    def _past_clamp(self, grad, a):
        return grad if self.limit is None else torch.where(a.abs() > self.limit, 0.0, grad)

    def _weighted(self, v, g, order):
        gate = g if self.limit is None else torch.where(g > self.limit, self.limit, g)
        result = _weighted_now(v, gate, self.function, order, self.alpha)
        return result if self.limit is None or not order else torch.where(g > self.limit, 0.0, result)

    def formula(self, *tensors):
        a, g = upcast(*self.parts(tensors))
        return self._weighted(self._operand(a), g, 0).to(tensors[0].dtype)

    def _reduced(self, to_a, to_g, tensors):
        """Gradients of a and g as those of the tensors, summed up over what was broadcast."""
        _, g = self.parts(tensors)
        dtype = tensors[0].dtype
        return self.whole(to_a.to(dtype), to_g.sum_to_size(g.shape).to(dtype))

    def backward_formula(self, grad_output, *tensors):
        grad, a, g = upcast(grad_output, *self.parts(tensors))
        to_a = self._past_clamp(self._weighted(grad, g, 0), a)
        return self._reduced(to_a, self._weighted(grad * self._operand(a), g, 1), tensors)

    def double_backward_formula(self, grads, grad_output, *tensors):
        v, w, grad, a, g = upcast(*self.parts(grads), grad_output, *self.parts(tensors))
        operand, v = self._operand(a), self._past_clamp(v, a)
        to_grad_output = self._weighted(v, g, 0) + self._weighted(w * operand, g, 1)
        to_a = self._past_clamp(self._weighted(w * grad, g, 1), a)
        to_g = self._weighted(v * grad, g, 1) + self._weighted(w * operand * grad, g, 2)
        return to_grad_output.to(grad_output.dtype), *self._reduced(to_a, to_g, tensors)

    def jvp_formula(self, tangents, *tensors):
        v, w, a, g = upcast(*self.parts(tangents), *self.parts(tensors))
        result = self._weighted(self._past_clamp(v, a), g, 0) + self._weighted(w * self._operand(a), g, 1)
        return result.to(tensors[0].dtype)


def _filled(grads, tensors):
    """Gradients or tangents, with zeros for those that nothing reaches."""
    return tuple(tensor.new_zeros(()).expand(tensor.shape) if grad is None else grad for grad, tensor in zip(grads, tensors))


class OperatorFunction(Function):
    """operator(*tensors)."""

    @staticmethod
    def forward(operator, *tensors):
        return operator.forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *operator_backward(ctx.operator, grad_output, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, _, *tangents):
        tensors = ctx.saved_tensors
        return ctx.operator.jvp_formula(_filled(tangents, tensors), *tensors)

    @staticmethod
    def vmap(info, in_dims, operator, *tensors):
        return OperatorFunction.apply(operator.batched(), *batch_first(info, in_dims[1:], *tensors)), 0


class OperatorBackwardFunction(Function):
    """The gradients of `tensors` as a differentiable function of grad_output and of them."""

    @staticmethod
    def forward(operator, grad_output, *tensors):
        return tuple(operator.backward(grad_output, *tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        grad_output, *tensors = ctx.saved_tensors
        operator = ctx.operator
        derive = operator.double_backward_formula if differentiable_again() else operator.double_backward
        return None, *derive(_filled(grads, tensors), grad_output, *tensors)

    @staticmethod
    def jvp(ctx, _, grad_output_tangent, *tangents):
        grad_output, *tensors = ctx.saved_tensors
        operator = ctx.operator
        (grad_output_tangent,) = _filled([grad_output_tangent], [grad_output])
        of_grad_output = operator.backward_formula(grad_output_tangent, *tensors)
        # The second derivative is symmetric: what reaches the tensors from the tangents is what the tangents make of them.
        _, *of_tensors = operator.double_backward_formula(_filled(tangents, tensors), grad_output, *tensors)
        return tuple(one + other for one, other in zip(of_grad_output, of_tensors))

    @staticmethod
    def vmap(info, in_dims, operator, *tensors):
        results = OperatorBackwardFunction.apply(operator.batched(), *batch_first(info, in_dims[1:], *tensors))
        return results, (0,) * len(results)


def operator_backward(operator, grad_output, *tensors):
    """The gradients of the tensors, differentiable where that is asked for."""
    if not differentiable_again():
        return operator.backward(grad_output, *tensors)
    if any(map(torch._C._functorch.is_legacy_batchedtensor, (grad_output, *tensors))):
        # What a Function records on such a wrapper (is_grads_batched=True, create_graph=True) is lost with it.
        return operator.backward_formula(grad_output, *tensors)
    return OperatorBackwardFunction.apply(operator, grad_output, *tensors)


# Below Function.apply, which binds its arguments in Python at every call; enough for eager reverse mode.
_apply_eager = super(Function, OperatorFunction).apply


def _recordable(tensor: Tensor) -> Tensor:
    """The tensor as a Function can save it."""
    if tensor.is_inference():
        # Autograd saves none, such as the gate that a frozen network computed for a trained operand.
        return tensor.clone()
    # After a transform ends, its tensors are dead wrappers: unwrap them, so that the graph sees the tensor inside.
    return torch._C._functorch.unwrap_if_dead(tensor)


def apply(operator: Unary | Gated, *tensors: Tensor) -> Tensor:
    """operator(*tensors), recorded where anything listens; in torch operators where only these are seen."""
    if ops.only_torch_operators_are_seen():
        if tensors[0].dim() == 0:
            # torch's forward mode gives a number times a tensor without dimensions a tangent in fp64.
            return operator.formula(*(tensor.unsqueeze(0) for tensor in tensors)).squeeze(0)
        return operator.formula(*tensors)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return OperatorFunction.apply(operator, *tensors)
    if not torch.is_grad_enabled():
        return operator.forward(*tensors)
    if any(tensor.requires_grad for tensor in tensors):
        return _apply_eager(operator, *map(_recordable, tensors))
    with torch.no_grad():  # so that the formulas know that nothing listens
        return operator.forward(*tensors)
