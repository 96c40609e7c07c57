"""The formulas of kernels/maths.py in torch operators, name for name; tests/test_formulas.py holds the two together.

They compute wherever no kernel can, and they are what tracers, torch.func and higher derivatives see. So each is differentiable
in a way that loses nothing either: each sign of x has an expression of its own, which is the function beyond that sign too.
Arithmetic is fp32 or fp64: the callers upcast.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

aten_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.default

# As in maths.py: an infinite x would make 0·∞ of a limit, and e^-|x| is subnormal where a product with it is not.
FAR = 1000.0
SHIFTS = {torch.float32: (75.875, -81.0), torch.float64: (690.0, -700.0)}
# e^NEAR and its reciprocal are normal numbers.
NEAR = {torch.float32: 80.0, torch.float64: 700.0}
# 8 bits of γ times a step of 1/64 of log u is exact in fp32, and what is left of either is small.
GAMMA_BITS, LOG_STEPS = 8, 64.0
_Number = TypeVar("_Number", Tensor, float)


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp64 for fp64, fp32 for everything else."""
    return x.float() if x.dtype.itemsize == 2 else x


def upcast_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def smaller_sigmoid(x: Tensor) -> Tensor:
    """σ(-|x|); `where` in place of `abs` keeps derivatives of every order right at x = 0."""
    return torch.sigmoid(torch.where(x < 0, x, -x))


def sigmoid(x: Tensor) -> Tensor:
    """σ(x), whose every derivative autograd derives from σ(-|x|), so that tracers need not know our Function.

    The value is torch.sigmoid's. The gradient is that of σ(x) for x < 0 and of -σ(-x) for x ≥ 0, which differ from σ by a
    constant and never round to 1.
    """
    wide = upcast(x)
    smaller = smaller_sigmoid(wide)
    gradient_only = smaller - smaller.detach()
    value = torch.sigmoid(wide).detach()
    return (value + torch.where(wide < 0, gradient_only, -gradient_only)).to(x.dtype)


def sigmoid_grad_from_output(grad_output: Tensor, sigma: Tensor) -> Tensor:
    """grad·(1 - σ)·σ in torch's own operator, which rounds as the kernels do."""
    return aten_sigmoid_backward(grad_output, sigma)


def sigmoid_grad_from_input(grad_output: Tensor, x: Tensor) -> Tensor:
    """grad·σ'(x), by σ(-|x|) for σ."""
    return aten_sigmoid_backward(grad_output, smaller_sigmoid(x))


def curvature_from_output(sigma: Tensor) -> Tensor:
    """σ"/σ' = 1 - 2σ."""
    return 1 - 2 * sigma


def product(alpha: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha·x, and what its rounding has lost: up to |alpha·x| ulp of e^(alpha·x)."""
    rounded = alpha * x
    # An infinite product has lost nothing.
    x = x.detach().clamp(-FAR / alpha, FAR / alpha)
    if x.dtype is torch.float32:
        return rounded, (alpha * x.double() - (alpha * x).double()).float()
    # Dekker's exact product: of halves, whose products are exact.
    (x_high, x_low), (alpha_high, alpha_low) = _halves(x), _halves(alpha)
    return rounded, x_high * alpha_high - alpha * x + x_high * alpha_low + x_low * alpha_high + x_low * alpha_low


def _halves(x: _Number) -> tuple[_Number, _Number]:
    """x as a sum of two numbers of 26 bits each."""
    shifted = x * (2.0**27 + 1)
    high = shifted - (shifted - x)
    return high, x - high


def exp_minus_abs(x: Tensor, lost: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e^-|x + lost| as e·scale: neither is a subnormal number, and a product with e keeps its digits.

    `lost` is None, or so small that e^lost is 1 + lost.
    """
    shift, start = SHIFTS[x.dtype]
    power = torch.where(x < 0, x, -x)
    far = power < start
    # Of two numbers `where` would make a tensor of the default dtype, in which e^-690 is 0.
    e, scale = torch.exp(power + torch.where(far, shift, 0.0)), torch.where(far, math.exp(-shift), torch.ones_like(power))
    return e if lost is None else e + e * torch.where(x < 0, lost, -lost), scale


def one_minus(x: Tensor) -> Tensor:
    """1 - e^-|x|."""
    return -torch.expm1(torch.where(x < 0, x, -x))


def weighted(v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0) -> Tensor:
    """v·f(x), v·f'(x) or v·f"(x), by `order`, for f among "sigmoid", "silu" and "logsigmoid".

    With `alpha`, f is silu(alpha·x)/alpha.
    """
    if function == "logsigmoid" and order:
        return weighted(v, -x, "sigmoid", 0) if order == 1 else -weighted(v, x, "sigmoid", 1)
    gate, lost = (x, None) if alpha == 1 else product(alpha, x)
    below = gate < 0
    e, scale = exp_minus_abs(gate, lost)
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
        factor = e if order == 1 else torch.where(below, e, -e) * one_minus(gate)
    elif order == 1:
        factor = torch.where(below, e * (one_plus + near), 1 + tail * (1 + near))
        scale = torch.where(below, scale, 1.0)
    else:
        factor = alpha * e * (2 * one_plus - torch.where(below, -near, near) * (1 - tail))
    # After the quotient v overflows only where the result does; before `scale`, it is subnormal only where the result is.
    return v * (factor / one_plus ** (order + 1)) * scale


def exp_of_product(gamma: float, first: Tensor, second: Tensor) -> Tensor:
    """e^(γ·(first + second)) for |first| ≤ FAR, without the error that a large exponent has from being rounded itself."""
    steps = torch.round(first.detach() * LOG_STEPS) / LOG_STEPS
    fraction, exponent = math.frexp(gamma)
    large = math.ldexp(round(fraction * 2**GAMMA_BITS), exponent - GAMMA_BITS)
    product, rest = large * steps, (gamma - large) * steps + gamma * (first - steps + second)
    power = product + rest
    value = torch.exp(power)
    return value + value * ((product - power) + rest)


def weighted_loss(
    v: Tensor | float, x: Tensor, positive: Tensor, negative: Tensor, gamma: float, order: int, targets_vary: bool
) -> Tensor:
    """v·ℓ(x), v·ℓ'(x) or v·ℓ"(x), by `order`.

    Differentiable in v and x; for order 0 and `targets_vary` in positive and negative too. v multiplies the sum and not its
    terms, one of which may be 0: so an infinite v makes a loss above 0 infinite, as in torch, and not NaN.
    """
    above = x >= 0
    distance = torch.where(above, x, -x)
    near = distance.clamp(max=FAR)
    wrong, right = torch.where(above, negative, positive), torch.where(above, positive, negative)
    e, scale = exp_minus_abs(x)
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
        focus = exp_of_product(gamma, torch.where(clear, log_clear, torch.log(mixture)), -log_one)
        if order == 0:
            # Where the loss is infinite it is a line: with ∞·0 for the rest of its derivative there would be none.
            focus = torch.where(distance.isinf(), focus.detach(), focus)
        v = v * focus
    if order == 0:
        # A loss that does not count is 0 at an infinite logit too.
        distance = torch.where(distance.isinf() & (clear | (v == 0)), near, distance)
        return v * (wrong * (distance + log_one) + right * log_one)
    # As in maths.py: where the whole has a factor e^-y, its `last` part is multiplied after v.
    last = torch.where(clear, scale, 1.0)
    if order == 1 or gamma:
        slope = result = v * torch.where(clear, -right * e, wrong - right * tail) / one_plus
    if order == 2:
        result = v * (wrong + right) * e / one_plus**2
    if gamma:
        log_one = torch.where(clear & (scale != 1), e, log_one)
        loss = v * (wrong * (near + log_one) + right * log_one)
        q = (wrong - right) * torch.where(clear, 1.0, (tail if order == 1 else e) / mixture) / one_plus
        if order == 1:
            result = result + gamma * loss * q
        else:
            bend = (gamma - 1) * q * torch.where(clear, 1.0, scale) - (1 - tail) / one_plus
            result = result + gamma * q * (2 * slope + loss * bend)
    return torch.where(above, result, -result) * last if order == 1 else result * scale
