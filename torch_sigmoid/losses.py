"""The binary losses, on values and in autograd: binary cross entropy with logits, and sigmoid focal loss.

One Triton kernel each for forward, backward and double backward where that can run, reduction included; else the same formulas
in torch operators. Two Functions, which save what they were given and nothing else:

    loss = L(x, target, …)                  LossFunction            saves x, target and weights
    grad_x = grad_output·L'                 LossBackwardFunction    saves grad_output and the same

They differentiate in x alone, in ordinary reverse mode. Where a gradient of target or weights is asked for, under transforms,
forward mode and tracers, the formula itself is recorded: autograd then derives every derivative, in all of its arguments.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from . import ops
from .autograd import differentiable_again, more_than_reverse_mode_listens
from .gates import FAR, SHIFTED_FROM, exp_scaled
from .ops import kernels

# e^NEAR and its reciprocal are normal numbers.
NEAR = {torch.float32: 80.0, torch.float64: 700.0}
# Of γ 8 bits, of log u steps of 1/64: their product is exact in fp32, and what is left of either is small.
GAMMA_BITS, LOG_STEPS = 8, 64.0


@dataclass(frozen=True)
class Loss:
    """v·ℓ(x), elementwise or reduced; see kernels/maths.py for ℓ. Binary cross entropy if `gamma` is 0."""

    gamma: float = 0.0
    alpha: float | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    reduction: str = "mean"

    def parts(self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None):
        """v, and the positive and the negative part of the target, in the dtype of x."""
        positive, v = target.to(x.dtype), 1.0
        negative = 1 - positive
        if self.label_smoothing:
            keep, spread = 1 - self.label_smoothing, self.label_smoothing / 2
            positive, negative = positive * keep + spread, negative * keep + spread
        if self.alpha is not None:
            v = self.alpha * positive + (1 - self.alpha) * negative
        if weight is not None:
            v = v * weight.to(x.dtype)
        if pos_weight is not None:
            positive = positive * pos_weight.to(x.dtype)
        return v, positive, negative

    def elements(self, order: int, scale: Tensor | float, x: Tensor, target, weight, pos_weight, targets_vary: bool) -> Tensor:
        """scale·v·ℓ(x), or of its `order`th derivative in x; 0 where ignored. `x` is fp32 or fp64."""
        if self.ignore_index is not None:
            # Whatever is there, its derivatives are to be 0 and not NaN.
            ignored = target == self.ignore_index
            x, target = torch.where(ignored, 0.0, x), torch.where(ignored, 0, target)
        v, positive, negative = self.parts(x, target, weight, pos_weight)
        compute = weighted_loss_nearby if order < 2 and is_nearby(x) else weighted_loss
        result = compute(scale * v, x, positive, negative, self.gamma, order, targets_vary)
        return result if self.ignore_index is None else torch.where(ignored, 0.0, result)

    def count(self, target: Tensor) -> Tensor | None:
        """What a mean is divided by, where that is not the number of elements."""
        if self.reduction == "mean" and self.ignore_index is not None:
            return (target != self.ignore_index).sum()
        return None

    def reduced(self, elements: Tensor, count: Tensor | None) -> Tensor:
        if self.reduction == "none":
            return elements
        total = elements.sum()
        return total if self.reduction == "sum" else total / (elements.numel() if count is None else count)

    def formula(self, x, target, weight, pos_weight, dtype: torch.dtype, targets_vary: bool = True) -> Tensor:
        if x.dim() == 0:
            # torch's forward mode gives a number times a tensor without dimensions a tangent in fp64.
            return self.formula(x.unsqueeze(0), target, weight, pos_weight, dtype, targets_vary).reshape(())
        elements = self.elements(0, 1.0, wide(x), target, weight, pos_weight, targets_vary)
        return self.reduced(elements, self.count(target)).to(dtype)

    def upstream(self, grad_output: Tensor, x: Tensor, count: Tensor | None) -> Tensor:
        """The gradient that reaches each element."""
        if self.reduction != "mean":
            return grad_output
        return grad_output / (x.numel() if count is None else count)

    def backward_formula(self, grad_output, x, target, weight, pos_weight, count) -> Tensor:
        grad = self.upstream(grad_output.to(wide(x).dtype), x, count)
        return self.elements(1, grad, wide(x), target, weight, pos_weight, False).to(x.dtype)

    def double_backward_formula(self, w, grad_output, x, target, weight, pos_weight, count):
        w = self.upstream(w.to(wide(x).dtype), x, count)
        to_x = self.elements(2, w * grad_output.to(w.dtype), wide(x), target, weight, pos_weight, False)
        to_grad_output = self.elements(1, w, wide(x), target, weight, pos_weight, False)
        if self.reduction != "none":
            to_grad_output = to_grad_output.sum()
        return to_grad_output.to(grad_output.dtype), to_x.to(x.dtype)

    def forward(self, x, target, weight, pos_weight, dtype):
        """The loss, and the count that its mean is divided by, if that is not the number of elements."""
        if x.numel() and launchable(x, target, weight, pos_weight):
            return kernels.losses.loss_forward(x, target, weight, pos_weight, self, dtype)
        return self.formula(x, target, weight, pos_weight, dtype, targets_vary=False), self.count(target)

    def backward(self, grad_output, x, target, weight, pos_weight, count):
        if x.numel() and launchable(x, grad_output, target, weight, pos_weight, count):
            return kernels.losses.loss_backward(grad_output, x, target, weight, pos_weight, count, self)
        return self.backward_formula(grad_output, x, target, weight, pos_weight, count)

    def double_backward(self, w, grad_output, x, target, weight, pos_weight, count):
        if x.numel() and launchable(x, w, grad_output, target, weight, pos_weight, count):
            return kernels.losses.loss_double_backward(w, grad_output, x, target, weight, pos_weight, count, self)
        return self.double_backward_formula(w, grad_output, x, target, weight, pos_weight, count)


def wide(x: Tensor) -> Tensor:
    return ops.upcast(x)[0]


def launchable(x: Tensor, *others: Tensor | None) -> bool:
    return ops.launchable(x, *(tensor for tensor in others if tensor is not None))


def weighted_loss(
    v: Tensor | float, x: Tensor, positive: Tensor, negative: Tensor, gamma: float, order: int, targets_vary: bool
) -> Tensor:
    """v·ℓ(x), v·ℓ'(x) or v·ℓ"(x), by `order`: see kernels/maths.py, whose formulas these are.

    Differentiable in v and x; for order 0 and `targets_vary` in positive and negative too. v multiplies the sum and not its
    terms, one of which may be 0: so an infinite v makes a loss above 0 infinite, as in torch, and not NaN.
    """
    above = x >= 0
    distance = torch.where(above, x, -x)
    near = distance.clamp(max=FAR)
    wrong, right = torch.where(above, negative, positive), torch.where(above, positive, negative)
    e, scale = exp_scaled(-distance)
    tail = e * scale
    one_plus = 1 + tail
    clear = wrong == 0
    if order == 0 or gamma:
        log_one = torch.log1p(tail)
    if gamma:
        # Each branch of a `where` is differentiated, so each is finite where the other is taken.
        mixture = torch.where(clear, 1.0, wrong + right * tail)
        log_clear = -near
        if targets_vary:
            inverse = torch.exp(near.clamp(max=NEAR[x.dtype]))
            log_clear = log_clear + torch.log(torch.where(clear, right + wrong * inverse, 1.0))
        focus = power(gamma, torch.where(clear, log_clear, torch.log(mixture)), -log_one)
        if order == 0:
            # Where the loss is infinite it is a line: with ∞·0 for the rest of its derivative there would be none.
            focus = torch.where(distance.isinf(), focus.detach(), focus)
        v = v * focus
    if order == 0:
        # A loss that does not count is 0 at an infinite logit too.
        distance = torch.where(distance.isinf() & (clear | (v == 0)), near, distance)
        return v * (wrong * (distance + log_one) + right * log_one)
    if order == 1 or gamma:
        slope = v * torch.where(clear, -right * e, wrong - right * tail) / one_plus
        slope = result = slope * torch.where(clear, scale, 1.0)
    if order == 2:
        result = v * (wrong + right) * e / one_plus**2 * scale
    if gamma:
        loss = v * (wrong * (near + log_one) + right * log_one)
        q = (wrong - right) * torch.where(clear, 1.0, tail / mixture) / one_plus
        if order == 1:
            result = result + gamma * loss * q
        else:
            bend = (gamma - 1) * q - (1 - tail) / one_plus
            result = result + gamma * q * (2 * slope + loss * bend)
    return torch.where(above, result, -result) if order == 1 else result


def is_nearby(x: Tensor) -> bool:
    """Whether only values are wanted, on a CPU, and no e^-|x| is lost; a NaN among x says nothing of the others."""
    return (
        x.device.type == "cpu"
        and not differentiable_again()
        and ops.computes_eagerly(x)
        and x.numel() > 0
        and bool(x.abs().amax() <= -SHIFTED_FROM)
    )


def weighted_loss_nearby(
    v: Tensor | float, x: Tensor, positive: Tensor, negative: Tensor, gamma: float, order: int, targets_vary: bool
) -> Tensor:
    """`weighted_loss` of order 0 or 1 from the definitions, by torch's fused operators, at a fraction of the cost on a CPU."""
    if order or gamma:
        p, q = torch.sigmoid(x), torch.sigmoid(-x)
    if order == 0 or gamma:
        linear = negative * x.clamp(min=0) - positive * x.clamp(max=0)
        loss = torch.addcmul(linear, positive + negative, F.logsigmoid(x.abs()), value=-1)
    result = loss if order == 0 else torch.addcmul(negative * p, positive, q, value=-1)
    if gamma:
        u = torch.addcmul(positive * q, negative, p)
        if order:
            result.addcmul_(loss.mul_(negative - positive), p.mul_(q).div_(u), value=gamma)
        result = result.mul_(u.pow_(gamma))
    return result if isinstance(v, float) and v == 1 else v * result


def power(gamma: float, first: Tensor, second: Tensor) -> Tensor:
    """e^(γ·(first + second)) for |first| ≤ FAR, without the error that a large exponent has from being rounded itself."""
    steps = torch.round(first.detach() * LOG_STEPS) / LOG_STEPS
    fraction, exponent = math.frexp(gamma)
    large = math.ldexp(round(fraction * 2**GAMMA_BITS), exponent - GAMMA_BITS)
    product, rest = large * steps, (gamma - large) * steps + gamma * (first - steps + second)
    exponent = product + rest
    value = torch.exp(exponent)
    return value + value * ((product - exponent) + rest)


class LossFunction(Function):
    """L(x, target, …), differentiable in x."""

    @staticmethod
    def forward(ctx, loss, dtype, x, target, weight, pos_weight):
        result, count = loss.forward(x, target, weight, pos_weight, dtype)
        ctx.loss = loss
        ctx.save_for_backward(x, target, weight, pos_weight, count)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx, grad_output):
        nothing = (None,) * 6
        if grad_output is None:
            return nothing
        return *nothing[:2], loss_backward(ctx.loss, grad_output, *ctx.saved_tensors), *nothing[3:]


class LossBackwardFunction(Function):
    """grad_output·L' as a differentiable function of grad_output and x."""

    @staticmethod
    def forward(ctx, loss, grad_output, *saved):
        ctx.loss = loss
        ctx.save_for_backward(grad_output, *saved)
        ctx.set_materialize_grads(False)
        return loss.backward(grad_output, *saved)

    @staticmethod
    def backward(ctx, w):
        nothing = (None,) * 7
        if w is None:
            return nothing
        loss = ctx.loss
        derive = loss.double_backward_formula if differentiable_again() else loss.double_backward
        return nothing[0], *derive(w, *ctx.saved_tensors), *nothing[3:]


_apply = super(Function, LossFunction).apply
_apply_backward = super(Function, LossBackwardFunction).apply


def loss_backward(loss: Loss, grad_output: Tensor, x: Tensor, *others: Tensor | None) -> Tensor:
    """grad_output·L', differentiable where that is asked for."""
    if not differentiable_again():
        return loss.backward(grad_output, x, *others)
    if torch._C._functorch.is_legacy_batchedtensor(grad_output):
        # What a Function records on such a wrapper (is_grads_batched=True, create_graph=True) is lost with it.
        return loss.backward_formula(grad_output, x, *others)
    return _apply_backward(loss, grad_output, x, *others)


def apply(
    loss: Loss, dtype: torch.dtype, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """The loss in `dtype`, recorded where anything listens."""
    if more_than_reverse_mode_listens() or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (target, weight, pos_weight))
    ):
        return loss.formula(x, target, weight, pos_weight, dtype)
    if not (x.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():  # so that the formulas know that nothing listens
            return loss.forward(x, target, weight, pos_weight, dtype)[0]
    # A tensor that has outlived its transform is a wrapper of the one that the graph knows.
    unwrap = torch._C._functorch.unwrap_if_dead
    tensors = [None if tensor is None else unwrap(tensor) for tensor in (x, target, weight, pos_weight)]
    return _apply(loss, dtype, *tensors)
