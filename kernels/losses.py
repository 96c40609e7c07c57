"""Binary losses: forward, backward and double backward, one kernel each, with the reduction inside.

elements         L = v·ℓ(x)        v = weight·α_t, and 0 where the target is ignored; ℓ is that of maths.py
forward          L, ΣL, or ΣL/n for the n targets that are not ignored
backward         grad_x = d·L'     d = grad_output, divided by n for a mean
double backward  for w, the gradient that reaches grad_x:
                 to x: w·d·L"      to grad_output: w·L', summed up and divided as L is

The target is smoothed as it is loaded, and may be of any dtype; weights are read through the strides of what they broadcast to.

`options` have gamma, alpha, label_smoothing, ignore_index and reduction; alpha and ignore_index may be None.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import maths
from .pointwise import pointwise
from .reduce import fold, partial_sums, prepared, total


def is_counted(options):
    """Whether the device must count what a mean is divided by, because some targets are ignored."""
    return options.reduction == "mean" and options.ignore_index is not None


@triton.jit
def parts_of(x, target, weight, pos_weight, ALPHA: tl.constexpr, SMOOTHING: tl.constexpr):
    """v, and the positive and the negative part of the target."""
    positive = target.to(x.dtype)
    negative = 1.0 - positive
    if SMOOTHING != 0.0:
        keep, spread = maths.constant(1.0 - SMOOTHING, x), maths.constant(0.5 * SMOOTHING, x)
        positive = positive * keep + spread
        negative = negative * keep + spread
    v = maths.constant(1.0, x)
    if ALPHA is not None:
        v = maths.constant(ALPHA, x) * positive + maths.constant(1.0 - ALPHA, x) * negative
    return v * weight, positive * pos_weight, negative


@triton.jit
def is_ignored(target, IGNORE: tl.constexpr):
    return target == maths.constant(IGNORE, target)


@triton.jit
def without_ignored(value, target, IGNORE: tl.constexpr):
    if IGNORE is not None:
        value = tl.where(is_ignored(target, IGNORE), 0.0, value)
    return value


@triton.jit
def loss_forward_formula(
    x,
    target,
    weight,
    pos_weight,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """L; for a mean that leaves out ignored targets also 1 for each target that counts, else 0."""
    v, positive, negative = parts_of(x, target, weight, pos_weight, ALPHA, SMOOTHING)
    loss = without_ignored(maths.weighted_loss(v, x, positive, negative, GAMMA, 0, ROUND), target, IGNORE)
    if IS_MEAN and IGNORE is not None:
        return loss, tl.where(is_ignored(target, IGNORE), 0, 1)
    else:
        return loss


@triton.jit
def divided_for_mean(grad, count, n_elements, IGNORE: tl.constexpr, IS_MEAN: tl.constexpr):
    if IS_MEAN:
        grad = maths.divided(grad, n_elements if IGNORE is None else count.to(grad.dtype))
    return grad


@triton.jit
def loss_backward_formula(
    x,
    target,
    weight,
    pos_weight,
    d,
    count,
    n_elements,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    ROUND: tl.constexpr,
):
    v, positive, negative = parts_of(x, target, weight, pos_weight, ALPHA, SMOOTHING)
    d = divided_for_mean(d, count, n_elements, IGNORE, IS_MEAN)
    return without_ignored(maths.weighted_loss(d * v, x, positive, negative, GAMMA, 1, ROUND), target, IGNORE)


@triton.jit
def loss_double_backward_formula(
    x,
    target,
    weight,
    pos_weight,
    w,
    d,
    count,
    n_elements,
    GAMMA: tl.constexpr,
    ALPHA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    ROUND: tl.constexpr,
):
    v, positive, negative = parts_of(x, target, weight, pos_weight, ALPHA, SMOOTHING)
    w = divided_for_mean(w, count, n_elements, IGNORE, IS_MEAN)
    to_x = without_ignored(maths.weighted_loss(w * d * v, x, positive, negative, GAMMA, 2, ROUND), target, IGNORE)
    to_d = without_ignored(maths.weighted_loss(w * v, x, positive, negative, GAMMA, 1, ROUND), target, IGNORE)
    return to_x, to_d


# Constants are compiled in: who changes gamma at every step compiles at every step.
@lru_cache(maxsize=256)
def loss_launchers(options):
    """Of forward, backward and double backward."""
    is_mean, reduced = options.reduction == "mean", options.reduction != "none"
    constants = options.gamma, options.alpha, options.label_smoothing, options.ignore_index, is_mean
    counted, given = is_counted(options), "n_elements"
    backward = pointwise(loss_backward_formula, *constants, given=given, layouts_follow=False)
    if not reduced:
        forward = pointwise(loss_forward_formula, *constants, layouts_follow=False)
        return forward, backward, pointwise(loss_double_backward_formula, *constants, given=given, layouts_follow=False)
    forward = total(loss_forward_formula, *constants, n_sums=1 + counted, is_mean=is_mean and not counted)
    return forward, backward, total(loss_double_backward_formula, *constants, given=given)


def _broadcast(x, target, weight, pos_weight):
    """The inputs of a formula, in x's shape."""
    if target.dtype is torch.bool:
        target = target.view(torch.uint8)
    return x, target, *(each if each is None else each.expand(x.shape) for each in (weight, pos_weight))


def loss_forward(x, target, weight, pos_weight, options, dtype):
    """The loss in `dtype`, and the count of targets that a mean with ignored ones is divided by, else None."""
    inputs = _broadcast(x, target, weight, pos_weight)
    forward, _, _ = loss_launchers(options)
    if options.reduction == "none":
        output = torch.empty_like(x, dtype=dtype)
        forward(inputs, (output,))
        return output, None
    inputs, programs = prepared(inputs)
    output = torch.empty((), dtype=dtype, device=x.device)
    if is_counted(options):
        sums, counts = partial_sums(x, programs), torch.empty(programs, dtype=torch.int64, device=x.device)
        count = torch.empty((), dtype=torch.int64, device=x.device)
        forward(inputs, (sums, counts))
        fold(sums, output, counts, count)
        return output, count
    if programs == 1:
        forward(inputs, (output,))
        return output, None
    sums = partial_sums(x, programs)
    forward(inputs, (sums,))
    fold(sums, output)
    return output, None


def loss_backward(grad_output, x, target, weight, pos_weight, count, options):
    """The gradient of x."""
    grad_x = torch.empty_like(x)
    count = count if count is None else count.expand(x.shape)
    inputs = *_broadcast(x, target, weight, pos_weight), grad_output.expand(x.shape), count
    _, backward, _ = loss_launchers(options)
    backward(inputs, (grad_x,))
    return grad_x


def loss_double_backward(w, grad_output, x, target, weight, pos_weight, count, options):
    """The gradients that reach `grad_output` and x."""
    to_x, to_grad_output = torch.empty_like(x), torch.empty_like(grad_output)
    count = count if count is None else count.expand(x.shape)
    inputs = *_broadcast(x, target, weight, pos_weight), w, grad_output.expand(x.shape), count
    _, _, double_backward = loss_launchers(options)
    if options.reduction == "none":
        to_grad_output = torch.empty_like(x, dtype=grad_output.dtype)
        double_backward(inputs, (to_x, to_grad_output))
        return to_grad_output, to_x
    inputs, programs = prepared(inputs, (to_x,))
    if programs == 1:
        double_backward(inputs, (to_x, to_grad_output))
        return to_grad_output, to_x
    sums = partial_sums(x, programs)
    double_backward(inputs, (to_x, sums))
    fold(sums, to_grad_output)
    return to_grad_output, to_x
