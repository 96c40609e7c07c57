"""The formulas of kernels/maths.py in torch operators, name for name; tests/test_formulas.py holds the two together.

They compute wherever no kernel can, and they are what tracers, torch.func and higher derivatives see. So each is differentiable
in a way that loses nothing either: each sign of x has an expression of its own, which is the function beyond that sign too.
Arithmetic is fp32 or fp64: the callers upcast.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import compiles_reverse_mode
from .internals import constant

aten_sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward.default

# As in maths.py: an infinite x would make 0·∞ of a limit, and e^-|x| is subnormal where a product with it is not.
FAR = 1000.0
SHIFTS = {torch.float32: (75.875, 81.0), torch.float64: (690.0, 700.0)}
# e^NEAR and its reciprocal are normal numbers.
NEAR = {torch.float32: 80.0, torch.float64: 700.0}
# 8 bits of γ times a step of 1/64 of log u is exact in fp32, and what is left of either is small.
GAMMA_BITS, LOG_STEPS = 8, 64.0
BITS_OF_HALF = {torch.float32: 12, torch.float64: 26}


def upcast(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp64 for fp64, fp32 for everything else."""
    return x.float() if x.dtype.itemsize == 2 else x


def upcast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on x."""
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, without a `to` that changes nothing: of what it gives back, torch 2.11 loses a compiled gradient."""
    return x if x.dtype is dtype else x.to(dtype)


def smaller_sigmoid(x: Tensor) -> Tensor:
    """σ(-|x|)."""
    return torch.sigmoid(-_abs(x))


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
    # An infinite product would have lost NaN.
    far = constant(FAR) / alpha
    x = x.clamp(-far, far)
    rounded = alpha * x
    x = x.detach()
    if x.dtype is torch.float32 and not compiles_reverse_mode():
        return rounded, (alpha * x.double() - rounded.detach().double()).float()
    # Dekker's exact product: of halves, whose products are exact. What x's dtype has not of alpha comes after it.
    own = rounded_to(24, alpha) if x.dtype is torch.float32 else alpha
    alpha_high = rounded_to(constant(BITS_OF_HALF[x.dtype]), own)
    alpha_low = own - alpha_high
    x_high, x_low = _halves(x)
    lost = x_high * alpha_high - rounded.detach() + x_high * alpha_low + x_low * alpha_high + x_low * alpha_low
    return rounded, lost if own == alpha else lost + (alpha - own) * x


def rounded_to(bits: int, number: float) -> float:
    fraction, exponent = math.frexp(number)
    return math.ldexp(round(fraction * 2**bits), exponent - bits)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of half as many bits each."""
    bits = constant(BITS_OF_HALF[x.dtype])
    if compiles_reverse_mode():
        # A compiler may fuse the other form's arithmetic, and then it does not round.
        integer, n_dropped = (torch.int32, 12) if x.dtype is torch.float32 else (torch.int64, 27)
        high = (x.view(integer) & -(1 << n_dropped)).view(x.dtype)
    else:
        shifted = x * (2.0 ** (bits + 1) + 1)
        high = shifted - (shifted - x)
    return high, x - high


def _abs(x: Tensor) -> Tensor:
    """|x|, by `where`, which keeps derivatives of every order right at x = 0."""
    return torch.where(x < 0, -x, x)


def exp_minus_abs(x: Tensor, lost: Tensor | None = None, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e^-|x + lost| as e·scale: neither is a subnormal number, and a product with e keeps its digits.

    `lost` is None, or so small that e^lost is 1 + lost. Where `apart` is false, scale is 1, and e what it may be.
    """
    distance = _abs(x)
    shift, start = map(constant, SHIFTS[x.dtype])
    far = distance > start if apart is None else (distance > start) & apart
    e = torch.exp(torch.where(far, shift, 0.0) - distance)
    # Of two numbers `where` would make a tensor of the default dtype, in which e^-690 is 0.
    scale = torch.where(far, math.exp(-shift), x.new_ones(()))
    return e if lost is None else e + e * torch.where(x < 0, lost, -lost), scale


def one_minus(x: Tensor) -> Tensor:
    """1 - e^-|x|."""
    return -torch.expm1(-_abs(x))


def value(x: Tensor, function: str, alpha: float = 1.0) -> Tensor:
    """f(x) for `weighted`'s f, where its derivatives are computed apart: torch's own operators, but that silu(-∞) is no NaN.

    As in torch, e^x that fp32 has as a subnormal number only is 0 in σ(x).
    """
    if function == "logsigmoid":
        return F.logsigmoid(x)
    sigma = torch.sigmoid(x if alpha == 1 else alpha * x)
    return sigma if function == "sigmoid" else x.clamp(min=-constant(FAR) / alpha) * sigma


def weighted(
    v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0, round_to_16_bit: bool = False
) -> Tensor:
    """v·f(x), v·f'(x) or v·f"(x), by `order`, for f among "sigmoid", "silu" and "logsigmoid".

    With `alpha`, f is silu(alpha·x)/alpha. In 16 bit the rounding error of alpha·x does not show, and is not corrected.
    """
    if function == "logsigmoid" and order:
        return weighted(v, -x, "sigmoid", 0) if order == 1 else -weighted(v, x, "sigmoid", 1)
    if alpha == 1:
        gate, lost = x, None
    else:
        gate, lost = (alpha * x, None) if round_to_16_bit else product(alpha, x)
    below = gate < 0
    e, scale = exp_minus_abs(gate, lost)
    tail = e * scale
    if function == "logsigmoid":
        return v * (torch.where(below, x, 0.0) - torch.log1p(tail))
    one_plus = 1 + tail
    if order == 0 and function == "sigmoid":
        return v * (torch.where(below, e, 1.0) / one_plus) * torch.where(below, scale, 1.0)
    if order == 0:
        # Above 0 as x - x·σ(-x), whose derivative autograd finds at ∞ too.
        far = constant(FAR) / alpha
        near = x.clamp(-far, far)
        return v * torch.where(below, near * e / one_plus, x - near * tail / one_plus) * torch.where(below, scale, 1.0)
    # (1 + e)² would be rounded thrice.
    square = 1 + tail * (2 + tail)
    # After a quotient v overflows only where the result does; before `scale`, it is subnormal only where the result is.
    if function == "sigmoid":
        return v * (e / square if order == 1 else torch.where(below, e, -e) * one_minus(gate) / (square * one_plus)) * scale
    distance = _abs(gate).clamp(max=constant(FAR))
    if order == 1:
        # v·silu'(-|x|), of which v·silu'(|x|) is what v lacks.
        result = v * (e * (one_plus - distance) / square) * scale
        return torch.where(below, result, v - result)
    return v * (alpha * e * (2 * one_plus - distance * (1 - tail)) / (square * one_plus)) * scale


def exp_of_product(gamma: float, first: Tensor, second: Tensor) -> Tensor:
    """e^(γ·(first + second)) for |first| ≤ FAR, without the error that a large exponent has from being rounded itself."""
    per_one = constant(LOG_STEPS)
    steps = torch.round(first.detach() * per_one) / per_one
    large = rounded_to(constant(GAMMA_BITS), gamma)
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
    near = distance.clamp(max=constant(FAR))
    wrong, right = torch.where(above, negative, positive), torch.where(above, positive, negative)
    clear = wrong == 0
    if order == 0:
        e = tail = torch.exp(-distance)
    else:
        # As in maths.py: where the whole has a factor e^-y, its `last` part is multiplied after v.
        e, scale = exp_minus_abs(x, apart=clear if order == 1 else None)
        tail = e * scale
    one_plus = 1 + tail
    if order == 0 or gamma:
        log_one = torch.log1p(tail)
    if gamma:
        # Each branch of a `where` is differentiated, so each is finite where the other is taken.
        mixture = torch.where(clear, 1.0, wrong + right * tail)
        if gamma in (1, 2, 3, 4):
            focus = ((wrong + right * tail) / one_plus) ** gamma
        else:
            log_clear = -near
            if targets_vary:
                inverse = torch.exp(near.clamp(max=constant(NEAR[x.dtype])))
                log_clear = log_clear + torch.log(torch.where(clear, right + wrong * inverse, 1.0))
            focus = exp_of_product(gamma, torch.where(clear, log_clear, torch.log(mixture)), -log_one)
        if targets_vary:
            # Where the loss is infinite it is a line: with ∞·0 for the rest of its derivative there would be none.
            focus = torch.where(distance.isinf(), focus.detach(), focus)
        v = v * focus
    if order == 0:
        # A loss that does not count is 0 at an infinite logit too.
        nothing = clear | (v == 0) if isinstance(v, Tensor) else clear
        distance = torch.where(nothing & distance.isinf() if targets_vary else nothing, near, distance)
        return v * (wrong * (distance + log_one) + right * log_one)
    if order == 1 or gamma:
        slope = result = v * (wrong - right * (e if order == 1 else torch.where(clear, e, tail))) / one_plus
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
    return torch.where(above, result, -result) * scale if order == 1 else result * scale
