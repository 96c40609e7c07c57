"""The binary losses: cross entropy with logits, and sigmoid focal loss. The operator, then the functions.

    loss = L(x, target, …)          saves x, target and weights
    grad_x = grad_output·L'

Their Functions differentiate in x alone, in ordinary reverse mode. Where a gradient of target or weights is asked for, under
transforms, forward mode and tracers, the formula itself is recorded: autograd then derives every derivative, in all arguments.
"""

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import eager, kernels
from .autograd import Operator, record
from .checks import (
    DENSE_FLOATS,
    check_devices,
    check_floats,
    check_loss_options,
    check_targets,
    check_tensors,
    described,
    is_value_of,
    overridable,
    weight_for,
)
from .dispatch import TRACER, TRANSFORM, Tensors, is_distributed, is_ours, launchable, listener
from .formulas import in_dtype, upcast, upcast_dtype, weighted_loss
from .internals import constant, legacy_reduction

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Reduction = Literal["none", "mean", "sum"]


@dataclass(frozen=True)
class Loss(Operator):
    """v·ℓ(x), elementwise or reduced; see kernels/maths.py for ℓ. Binary cross entropy if `gamma` is 0.

    The operands are x, target, weight and pos_weight, the last two of which may be None; for backward, the count of targets
    that are not ignored comes after them, None where that is the number of elements.
    """

    gamma: float = 0.0
    alpha: float | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    reduction: str = "mean"
    # Of the result. It says nothing of the kernels, which are kept by the rest.
    dtype: torch.dtype = field(default=torch.float32, compare=False)

    n_differentiable: ClassVar[int | None] = 1
    formula_from = TRANSFORM

    def parts(
        self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        """v, and the positive and the negative part of the target, in the dtype of x."""
        v: Tensor | float = 1.0
        positive = target.to(x.dtype)
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

    def elements(
        self,
        order: int,
        scale: Tensor | float,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        targets_vary: bool,
        by_fused: bool = False,
    ) -> Tensor:
        """scale·v·ℓ(x), or of its `order`th derivative in x, in fp32 or fp64; 0 where ignored."""
        x = upcast(x)
        if self.ignore_index is not None:
            # Whatever is there, its derivatives are to be 0 and not NaN.
            ignored = target == self.ignore_index
            x, target = torch.where(ignored, 0.0, x), torch.where(ignored, 0, target)
        v, positive, negative = self.parts(x, target, weight, pos_weight)
        v = v if isinstance(scale, float) and scale == 1 else scale * v
        if by_fused:
            result = eager.weighted_loss(v, x, positive, negative, self.gamma, order, pos_weight is None)
        else:
            result = weighted_loss(v, x, positive, negative, self.gamma, order, targets_vary)
        return result if self.ignore_index is None else torch.where(ignored, 0.0, result)

    def values(
        self,
        order: int,
        scale: Tensor | float,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The same in `dtype`; on a CPU where nobody listens, by fused operators and without a temporary of the size of x."""
        if not eager.takes(x, target, weight, pos_weight, scale if isinstance(scale, Tensor) else None):
            return in_dtype(self.elements(order, scale, x, target, weight, pos_weight, False), dtype)
        if x.numel() <= eager.block_size():
            return self.elements(order, scale, x, target, weight, pos_weight, False, by_fused=True).to(dtype)
        result = torch.empty_like(x, dtype=dtype)
        given = (scale, x, target, weight, pos_weight)
        for block, *others in eager.blocks_of(result, *(each for each in given if isinstance(each, Tensor))):
            parts = iter(others)
            arguments: list[Any] = [next(parts) if isinstance(each, Tensor) else each for each in given]
            scale, x, target, weight, pos_weight = arguments
            block.copy_(self.elements(order, scale, x, target, weight, pos_weight, False, by_fused=True))
        return result

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

    def _value(self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, targets_vary: bool) -> Tensor:
        if x.dim() == 0:
            # torch's forward mode gives a number times a tensor without dimensions a tangent in fp64.
            return self._value(x.unsqueeze(0), target.unsqueeze(0), weight, pos_weight, targets_vary).reshape(())
        if targets_vary:
            elements = self.elements(0, 1.0, x, target, weight, pos_weight, targets_vary)
        else:
            elements = self.values(0, 1.0, x, target, weight, pos_weight, upcast_dtype(x))
        return in_dtype(self.reduced(elements, self.count(target)), self.dtype)

    def upstream(self, grad_output: Tensor, x: Tensor, count: Tensor | None) -> Tensor:
        """The gradient that reaches each element."""
        if self.reduction != "mean":
            return grad_output
        return grad_output / (x.numel() if count is None else count)

    def formula(self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
        return self._value(x, target, weight, pos_weight, targets_vary=True)

    def value_formula(
        self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._value(x, target, weight, pos_weight, targets_vary=False), self.count(target)

    def plain(self, *tensors: Tensor) -> Tensor:
        # Torch's own loses a loss below an ulp of its logit, is NaN at an infinite one, and in ONNX a logarithm of 0.
        return self.value_formula(*tensors)[0]

    def backward_formula(
        self,
        grad_output: Tensor,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        count: Tensor | None,
    ) -> tuple[Tensor]:
        grad = self.upstream(grad_output.to(upcast_dtype(x)), x, count)
        return (self.values(1, grad, x, target, weight, pos_weight, x.dtype),)

    def double_backward_formula(
        self,
        grads: Tensors,
        grad_output: Tensor,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        count: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (w,), wide = grads, upcast(x)
        w = self.upstream(w.to(wide.dtype), x, count)
        to_x = self.elements(2, w * grad_output.to(w.dtype), wide, target, weight, pos_weight, False)
        to_grad_output = self.values(1, w, x, target, weight, pos_weight, w.dtype)
        if self.reduction != "none":
            to_grad_output = to_grad_output.sum()
        return to_grad_output.to(grad_output.dtype), to_x.to(x.dtype)

    def forward(
        self, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if x.numel() and launchable(x, target, weight, pos_weight):
            value: Tensor
            count: Tensor | None
            value, count = kernels.losses.loss_forward(x, target, weight, pos_weight, self, self.dtype)
            return value, count
        return self._value(x, target, weight, pos_weight, targets_vary=False), self.count(target)

    def backward(self, grad_output: Tensor, x: Tensor, *others: Any) -> tuple[Tensor]:
        if x.numel() and launchable(x, grad_output, *others):
            return (kernels.losses.loss_backward(grad_output, x, *others, self),)
        return self.backward_formula(grad_output, x, *others)

    def double_backward(self, grads: Tensors, grad_output: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        (w,) = grads
        if x.numel() and launchable(x, w, grad_output, *others):
            results: tuple[Tensor, Tensor] = kernels.losses.loss_double_backward(w, grad_output, x, *others, self)
            return results
        return self.double_backward_formula(grads, grad_output, x, *others)


# How many `debug` contexts surround this call; each thread and each asyncio task has a count of its own.
_debug_depth: ContextVar[int] = ContextVar("torch_sigmoid.debug", default=0)


class debug(contextlib.ContextDecorator):
    """A context in which the losses look at the values of their targets: `with torch_sigmoid.debug(): …`, or as a decorator.

    A target that is outside of [0, 1] or NaN, and not ignored, then raises a ValueError. The check makes the host wait for the
    device at every call, so the losses do not check elsewhere. Compiled functions and tensors without values (meta, fake) are
    not checked. Other threads and asyncio tasks are not affected.

    Example:
        >>> with torch_sigmoid.debug():
        ...     torch_sigmoid.binary_cross_entropy_with_logits(torch.zeros(2), torch.tensor([1.0, 2.0]))
        Traceback (most recent call last):
        ValueError: binary_cross_entropy_with_logits(): target must be in [0, 1], got 2.0
    """

    def __enter__(self) -> None:
        _debug_depth.set(_debug_depth.get() + 1)

    def __exit__(self, *exception: object) -> None:
        _debug_depth.set(_debug_depth.get() - 1)


@overridable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""weight·(pos_weight·t·log(1 + e^-x) + (1-t)·log(1 + e^x)) for logits x and targets t: torch's function, with more.

    Neither term cancels or overflows, and each gradient, weight·((1-t)·σ(x) - pos_weight·t·σ(-x)), is exact in both tails: in
    bf16 the gradient of torch.nn.functional.binary_cross_entropy_with_logits at t = 1 is 0 from x = 6.25 on. Forward,
    backward and double backward are one pass over the tensors each, the reduction included; sums are taken in fp32 (fp64 for
    fp64), in an order that depends on shapes, strides, dtypes and alignment only.

    Args:
        input: logits x, of any shape and float dtype.
        target: of input's shape: floats, soft or hard, integers or bool. The caller must ensure that values are in [0, 1];
            only under `debug` are they checked.
        weight: multiplies each element's loss; broadcasts to input's shape.
        size_average, reduce: torch's deprecated forms of `reduction`.
        reduction: "none", "mean" (over all elements that are not ignored) or "sum".
        pos_weight: multiplies the loss of the positive part of the target; broadcasts to input's shape.
        label_smoothing: in [0, 1]; t becomes t·(1 - label_smoothing) + label_smoothing/2.
        ignore_index: elements whose target is this number have neither loss nor gradient. The target's dtype must be able to
            hold it. If all elements are ignored, a mean is NaN.

    Returns:
        The loss, in the dtype that input and target promote to; at least fp32 under autocast, and if it is a sum or a mean over
        DTensors, which add up their shards' sums in that dtype.

    Saved for backward: the tensors as they were given (logits as fp64 if the target is), and how many targets were not ignored.
    Under transforms and forward mode, and where target or weights require a gradient (each of them may), autograd keeps what
    the formula in torch operators needs.

    Raises:
        TypeError: an argument is no tensor, or not of a dtype described above.
        ValueError: target's shape is not input's, a weight does not broadcast, two devices, an unknown reduction, a smoothing
            out of range.

    Example:
        >>> x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
        >>> torch_sigmoid.binary_cross_entropy_with_logits(x, torch.ones_like(x)).backward()
        >>> round(x.grad.item(), 7)  # torch leaves 0
        -0.0003357
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    caller = "binary_cross_entropy_with_logits"
    check_tensors(caller, input=input, target=target)
    check_floats(caller, input=input)
    check_loss_options(caller, reduction, label_smoothing, ignore_index)
    options = 0.0, None, float(constant(label_smoothing)), constant(ignore_index), reduction
    if not (is_ours(input) and target.layout is torch.strided and not target.is_nested):
        if label_smoothing or ignore_index is not None:
            found = f"{described(input)} with target {described(target)}"
            raise TypeError(f"{caller}(): label_smoothing and ignore_index need dense tensors, got {found}")
        return F.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)
    return _loss(caller, options, "input", input, "target", target, weight, pos_weight)


@overridable
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "none",
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    r"""α_t·(1 - p_t)^γ·BCE(x, t) for logits x and targets t, the focal loss of Lin et al. 2017, as torchvision.ops has it.

    1 - p_t = t·σ(-x) + (1-t)·σ(x), which does not cancel, and α_t = α·t + (1-α)·(1-t). The power of 1 - p_t is a product where
    γ is a small integer, and is else taken in log space, so that 1 - p_t does not underflow before. Value and gradient are
    therefore finite for every γ, 0 < γ < 1 included, and every logit, ±∞ included, except where the loss is infinite: at a
    logit of ±∞ against its target.

    Args:
        inputs: logits x, of any shape and float dtype.
        targets: of the shape of inputs: floats, soft or hard, integers or bool. The caller must ensure that values are in
            [0, 1]; only under `debug` are they checked.
        alpha: in [0, 1], the weight of positive targets; -1 for no weights.
        gamma: in [0, 1e6]. Each pair of alpha and gamma compiles kernels of its own, once.
        reduction: "none" (the default, as in torchvision), "mean" (over all elements that are not ignored) or "sum".
        label_smoothing: in [0, 1]; t becomes t·(1 - label_smoothing) + label_smoothing/2.
        ignore_index: elements whose target is this number have neither loss nor gradient.
        weight: multiplies each element's loss; broadcasts to the shape of inputs.

    Returns, saves and raises as `binary_cross_entropy_with_logits`; a ValueError also for an alpha or gamma out of range.

    Example:
        >>> torch_sigmoid.sigmoid_focal_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), reduction="mean")
        tensor(0.0866)
    """
    caller = "sigmoid_focal_loss"
    check_tensors(caller, inputs=inputs, targets=targets)
    check_floats(caller, inputs=inputs)
    check_loss_options(caller, reduction, label_smoothing, ignore_index, alpha, gamma)
    if not (is_ours(inputs) and targets.layout is torch.strided and not targets.is_nested):
        found = f"{described(inputs)} with targets {described(targets)}"
        raise TypeError(f"{caller}(): logits must be {DENSE_FLOATS}, and targets dense, got {found}")
    alpha, label_smoothing = constant(alpha), constant(label_smoothing)
    options = (
        float(constant(gamma)),
        None if alpha == -1 else float(alpha),
        float(label_smoothing),
        constant(ignore_index),
        reduction,
    )
    return _loss(caller, options, "inputs", inputs, "targets", targets, weight, None)


def _loss(
    caller: str,
    options: tuple[float, float | None, float, int | None, Reduction],
    input_name: str,
    input: Tensor,
    target_name: str,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
) -> Tensor:
    """Checks what the losses have in common, decides on dtypes, and computes."""
    *_, ignore_index, _ = options
    if target.shape != input.shape:
        shapes = f"{tuple(input.shape)}, got {tuple(target.shape)}"
        raise ValueError(f"{caller}(): {target_name} must have the shape of {input_name}, {shapes}")
    if target.is_complex():
        raise TypeError(f"{caller}(): {target_name} must be floats, integers or bool, got {target.dtype}")
    if ignore_index is not None and not is_value_of(ignore_index, target.dtype):
        raise ValueError(f"{caller}(): ignore_index must be a value that {target.dtype} has, got {ignore_index}")
    weight = weight_for(caller, "weight", weight, input)
    pos_weight = weight_for(caller, "pos_weight", pos_weight, input)
    check_devices(caller, **{input_name: input, target_name: target})
    if listener() != TRACER and _debug_depth.get():
        whole = cast("DTensor", target).full_tensor() if is_distributed(type(target)) else target
        check_targets(caller, target_name, whole, ignore_index)
    dtype = input.dtype
    if target.dtype is not dtype and target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    if dtype is torch.float64:
        input = input.double()
    elif autocasts(input.device.type):
        dtype = torch.float32
    operator = Loss(*options, dtype)
    operands = input, target, weight, pos_weight
    if operator.reduction == "none" or listener() >= operator.formula_from or not is_distributed(type(input)):
        return record(operator, *operands)
    # A Partial sum, which the ranks add up in its dtype. The mean of the shards' means would be wrong: their sizes differ.
    total = record(replace(operator, reduction="sum", dtype=torch.promote_types(dtype, torch.float32)), *operands)
    if operator.reduction == "sum":
        return total
    count = operator.count(target)
    return total / (input.numel() if count is None else count)


def autocasts(device_type: str) -> bool:
    # torch.amp.is_autocast_available would break the graph of torch.compile in torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def own_dtypes(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which operators compute in the dtypes of their tensors; a meta device has no autocast to turn off."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else contextlib.nullcontext()
