"""Device functions on loaded values. Every formula of the package stands here once.

σ(x)  = 1 / (1 + e^-x)
σ'(x) = σ(x)·(1 - σ(x)) = e / (1 + e)²,  e = e^-|x|
σ"(x) = σ'(x)·(1 - 2σ(x)) = -σ'(x)·tanh(x/2)

silu(x)  = x·σ(x)                       logsigmoid(x)  = min(x, 0) - log(1 + e)
silu'(x) = σ(x)·(1 + x·σ(-x))           logsigmoid'(x) = σ(-x)
silu"(x) = σ'(x)·(2 - x·tanh(x/2))      logsigmoid"(x) = -σ'(x)

Losses, for a target of which a part `positive` is 1 and a part `negative` is 0:
c(x) = positive·log(1 + e^-x) + negative·log(1 + e^x)      u(x) = positive·σ(-x) + negative·σ(x)
ℓ(x) = c·u^γ: binary cross entropy for γ = 0, else focal loss (Lin et al. 2017), where u is 1 - p_t.

1 - σ cancels once σ rounds towards 1: from a bf16 σ it is exactly 0 for x ≥ 6.25. An operator that has x takes the form
in e ≤ 1, which is even in x as σ' is, where nothing cancels or overflows, and which is 0 only where σ' is subnormal.
"""

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def upcast(x):
    """Arithmetic is fp64 for fp64 and fp32 for everything else."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


# Under TRITON_INTERPRET=1 `triton.jit` gives an InterpretedFunction, which runs on CPU tensors and has no libdevice.
INTERPRETED = tl.constexpr(not isinstance(upcast, triton.JITFunction))


@triton.jit
def negative(x):
    """-x, which Triton's own minus computes as 0 - x with an instruction, where a product becomes the next one's sign bit."""
    return x * -1.0


@triton.jit
def constant(VALUE: tl.constexpr, like):
    """A literal of the dtype of `like`: Triton's own are fp32."""
    return tl.full((), VALUE, like.dtype)


@triton.jit
def exp(x):
    """e^x in CUDA's own digits; the interpreter has no libdevice."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def reciprocal(d):
    """1/d for d in [1, inf] without the branches and scaling of a division: rsqrt(d)², and one Newton step.

    Its error before the last rounding is 2^-43 of it, so that in 16 bit σ has the bits that a division gives, subnormals
    included, since rsqrt(d) ≥ 2^-64: tests/test_maths.py. For d = inf the step is NaN, which `minimum` makes a harmless 1.
    """
    root = libdevice.rsqrt(d)
    approximation = root * root
    step = tl.minimum(tl.fma(negative(d), approximation, 1.0), 1.0)
    return tl.fma(approximation, step, approximation)


@triton.jit
def sigmoid(x, ROUND_TO_16_BIT: tl.constexpr):
    """σ(x), by ATen's own arithmetic: `one / (one + std::exp(-x))` in ATen/native/cuda/UnarySpecialOpsKernel.cu.

    libdevice.exp is CUDA's own expf, whose last multiplication nvcc fuses with the addition; Triton does the same as long
    as enable_fp_fusion is on. tl.exp and the approximate division have other digits.
    """
    denominator = 1.0 + exp(negative(x))
    if x.dtype == tl.float64:
        return 1.0 / denominator
    elif ROUND_TO_16_BIT and not INTERPRETED:
        return reciprocal(denominator)
    else:
        return tl.div_rn(1.0, denominator)


@triton.jit
def sigmoid_grad_from_output(grad_output, sigma):
    """grad·(1 - σ)·σ, multiplied in ATen's order so that fp32 agrees to the last bit."""
    return grad_output * (1.0 - sigma) * sigma


@triton.jit
def sigmoid_grad_from_input(grad_output, x, ROUND_TO_16_BIT: tl.constexpr):
    """grad·e / (1 + e)² with e = e^-|x|; the square is 1 + e·(2 + e), which rounds twice where (1 + e)² rounds thrice."""
    minus_abs = negative(tl.abs(x))
    if INTERPRETED or x.dtype == tl.float64:
        e = exp(minus_abs)
        return grad_output * (e / tl.fma(e, 2.0 + e, 1.0))
    elif ROUND_TO_16_BIT:
        # The fast exponential is off by |x|·2^-24 of itself, which 16 bit does not see.
        e = libdevice.fast_expf(minus_abs)
        return grad_output * libdevice.fast_dividef(e, tl.fma(e, 2.0 + e, 1.0))
    else:
        e = exp(minus_abs)
        square = tl.fma(e, 2.0 + e, 1.0)
        reciprocal = libdevice.fast_dividef(1.0, square)
        quotient = e * reciprocal
        return grad_output * tl.fma(tl.fma(negative(square), quotient, e), reciprocal, quotient)


@triton.jit
def curvature_from_output(sigma):
    """σ"/σ' = 1 - 2σ."""
    return 1.0 - 2.0 * sigma


@triton.jit
def curvature_from_input(x):
    """σ"/σ' = -tanh(x/2), which keeps its relative accuracy near x = 0, where 1 - 2σ cancels."""
    if INTERPRETED:
        return 1.0 - 2.0 * sigmoid(x, ROUND_TO_16_BIT=False)
    else:
        return -libdevice.tanh(0.5 * x)


# The functions whose derivatives `weighted` knows.
SIGMOID, SILU, LOGSIGMOID = map(tl.constexpr, range(3))
# Beyond ±FAR every function here is at its limit; an infinite x would make 0·∞ of it.
FAR = tl.constexpr(1000.0)
SHIFT, SHIFTED_FROM, EXP_MINUS_SHIFT = tl.constexpr(32.0), tl.constexpr(64.0), tl.constexpr(math.exp(-32.0))


@triton.jit
def exp_minus_abs(x, ROUND_TO_16_BIT: tl.constexpr):
    """e^-|x| as e·scale: e alone is no subnormal number, and a product with it keeps its digits, until |x| > 119."""
    distance = tl.abs(x)
    if x.dtype == tl.float64:
        return exp(negative(distance)), tl.full(x.shape, 1.0, tl.float64)
    else:
        far = distance > SHIFTED_FROM
        power = tl.where(far, SHIFT, 0.0) - distance
        scale = tl.where(far, EXP_MINUS_SHIFT, 1.0)
        if ROUND_TO_16_BIT and not INTERPRETED:
            return libdevice.fast_expf(power), scale
        else:
            return exp(power), scale


@triton.jit
def limited(x):
    """x between ±FAR; NaN may become a number here, e^-|x| does not."""
    return tl.minimum(tl.maximum(x, -FAR), FAR)


@triton.jit
def quotient(numerator, denominator, ROUND_TO_16_BIT: tl.constexpr):
    """For denominators between 2^-126 and 2^126. In fp32 the approximate one, corrected by its residual: no branch."""
    if INTERPRETED or numerator.dtype == tl.float64:
        return numerator / denominator
    elif ROUND_TO_16_BIT:
        return libdevice.fast_dividef(numerator, denominator)
    else:
        reciprocal = libdevice.fast_dividef(1.0, denominator)
        approximation = numerator * reciprocal
        corrected = tl.fma(tl.fma(negative(denominator), approximation, numerator), reciprocal, approximation)
        # Of an infinite numerator nothing is left to correct.
        return tl.where(tl.abs(approximation) == float("inf"), approximation, corrected)


@triton.jit
def log_one_plus(e, ROUND_TO_16_BIT: tl.constexpr):
    """log(1 + e) for e in [0, 1], as 2·artanh(s) for s = e/(2+e) ≤ 1/3, whose series has no branch."""
    if e.dtype == tl.float64:
        if INTERPRETED:
            # Kahan: what 1 + e loses of e, the quotient gives back.
            rounded = 1.0 + e
            return tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
        else:
            return libdevice.log1p(e)
    else:
        s = quotient(e, 2.0 + e, ROUND_TO_16_BIT)
        square = s * s
        series = tl.fma(square, tl.fma(square, 1 / 11, 1 / 9), 1 / 7)
        if not ROUND_TO_16_BIT:
            # What is left out is below 2^-29 of the sum; without these, 2^-22.
            series = tl.fma(square, tl.fma(square, tl.fma(square, tl.fma(square, 1 / 15, 1 / 13), 1 / 11), 1 / 9), 1 / 7)
        series = tl.fma(square, tl.fma(square, series, 1 / 5), 1 / 3)
        return tl.fma(2.0 * s, square * series, 2.0 * s)


@triton.jit
def weighted(v, x, FUNCTION: tl.constexpr, ORDER: tl.constexpr, ROUND_TO_16_BIT: tl.constexpr):
    """v·f(x), v·f'(x) or v·f"(x), by ORDER, for f among SIGMOID, SILU and LOGSIGMOID.

    All are rational in e = e^-|x| ≤ 1, written for each sign of x so that nothing cancels but at a zero of f' or f", and
    the product with v comes before what could underflow.
    """
    if FUNCTION == LOGSIGMOID and ORDER == 1:
        return weighted(v, negative(x), SIGMOID, 0, ROUND_TO_16_BIT)
    elif FUNCTION == LOGSIGMOID and ORDER == 2:
        return negative(weighted(v, x, SIGMOID, 1, ROUND_TO_16_BIT))
    else:
        e, scale = exp_minus_abs(x, ROUND_TO_16_BIT)
        tail = e * scale
        one_plus = 1.0 + tail
        below = x < 0.0
        if FUNCTION == LOGSIGMOID:
            return v * (tl.where(below, x, 0.0) - log_one_plus(tail, ROUND_TO_16_BIT))
        elif ORDER == 0:
            # σ(x) is 1/(1+e) above 0 and e/(1+e) below.
            if FUNCTION == SILU:
                factor = tl.where(below, limited(x) * e, x)
            else:
                factor = tl.where(below, e, 1.0)
            return quotient(v * factor, one_plus, ROUND_TO_16_BIT) * tl.where(below, scale, 1.0)
        elif FUNCTION == SIGMOID:
            square = tl.fma(tail, 2.0 + tail, 1.0)
            if ORDER == 1:
                return quotient(v * e, square, ROUND_TO_16_BIT) * scale
            else:
                factor = tl.where(below, e, negative(e)) * (1.0 - tail)
                return quotient(v * factor, square * one_plus, ROUND_TO_16_BIT) * scale
        else:
            square = tl.fma(tail, 2.0 + tail, 1.0)
            near = limited(x)
            if ORDER == 1:
                factor = tl.where(below, e * (one_plus + near), tl.fma(tail, 1.0 + near, 1.0))
                return quotient(v * factor, square, ROUND_TO_16_BIT) * tl.where(below, scale, 1.0)
            else:
                factor = e * (2.0 * one_plus - tl.abs(near) * (1.0 - tail))
                return quotient(v * factor, square * one_plus, ROUND_TO_16_BIT) * scale


@triton.jit
def log(x, ROUND_TO_16_BIT: tl.constexpr):
    if INTERPRETED or ROUND_TO_16_BIT:
        return tl.log(x)
    else:
        return libdevice.log(x)


# Of γ 8 bits, of log u steps of 1/64: their product is exact in fp32, and what is left of either is small.
GAMMA_BITS, LOG_STEPS = 8, tl.constexpr(64.0)


@triton.constexpr_function
def large_part(gamma):
    fraction, exponent = math.frexp(gamma)
    return math.ldexp(round(fraction * 2**GAMMA_BITS), exponent - GAMMA_BITS)


@triton.constexpr_function
def number_of_factors(gamma):
    """How often the base of a power is multiplied: 0 where a logarithm is cheaper, or the power no product."""
    return int(gamma) if gamma in (1, 2, 3, 4) else 0


@triton.jit
def exp_of_product(GAMMA: tl.constexpr, first, second, ROUND_TO_16_BIT: tl.constexpr):
    """e^(γ·(first + second)) for |first| ≤ FAR; but for 16 bit without the error of a large exponent that is rounded itself."""
    if ROUND_TO_16_BIT and not INTERPRETED:
        return libdevice.fast_expf(constant(GAMMA, first) * (first + second))
    LARGE: tl.constexpr = large_part(GAMMA)
    steps = tl.floor(first * LOG_STEPS + 0.5) / LOG_STEPS
    product = constant(LARGE, first) * steps
    rest = constant(GAMMA - LARGE, first) * steps + constant(GAMMA, first) * (first - steps + second)
    exponent = product + rest
    lost = (product - exponent) + rest
    value = exp(exponent)
    return value + value * lost


@triton.jit
def weighted_loss(v, x, positive, negative_part, GAMMA: tl.constexpr, ORDER: tl.constexpr, ROUND_TO_16_BIT: tl.constexpr):
    """v·ℓ(x), v·ℓ'(x) or v·ℓ"(x), by ORDER. For γ > 0, positive + negative_part must be 1.

    With y = |x|, e = e^-y, and `right` the part of the target on x's side, `wrong` the other:

    c = wrong·y + (wrong + right)·log(1+e)      c' = (wrong - right·e)/(1+e)      c" = (wrong + right)·e/(1+e)²
    u = (wrong + right·e)/(1+e)                 q = u'/u                          q' = -q·(q + (1-e)/(1+e))
    ℓ' = u^γ·(c' + γ·c·q)                       ℓ" = u^γ·(c" + 2γ·c'·q + γ·c·q·((γ-1)·q - (1-e)/(1+e)))

    u^γ is a product for γ = 1, 2, 3 and 4, else the exponential of γ·log u, which is -γ·(y + log(1+e)) where nothing is wrong:
    no u underflows before its power.
    """
    above = x >= 0.0
    wrong = tl.where(above, negative_part, positive)
    right = tl.where(above, positive, negative_part)
    e, scale = exp_minus_abs(x, ROUND_TO_16_BIT)
    tail = e * scale
    one_plus = 1.0 + tail
    distance = tl.abs(x)
    near = tl.minimum(distance, FAR)
    clear = wrong == 0.0
    if ORDER == 0 or GAMMA != 0.0:
        log_one = log_one_plus(tail, ROUND_TO_16_BIT)
    if GAMMA != 0.0:
        gamma = constant(GAMMA, x)
        mixture = tl.where(clear, 1.0, tl.fma(right, tail, wrong))
        FACTORS: tl.constexpr = number_of_factors(GAMMA)
        if FACTORS > 0:
            u = quotient(tl.where(clear, e, mixture), one_plus, ROUND_TO_16_BIT) * tl.where(clear, scale, 1.0)
            for _ in tl.static_range(FACTORS):
                v = v * u
        else:
            log_mixture = tl.where(clear, negative(near), log(mixture, ROUND_TO_16_BIT))
            v = v * exp_of_product(GAMMA, log_mixture, negative(log_one), ROUND_TO_16_BIT)
    # v comes before what could underflow.
    v_wrong, v_right = v * wrong, v * right
    if ORDER == 0:
        return tl.where(v_wrong == 0.0, 0.0, v_wrong * distance) + (v_wrong + v_right) * log_one
    else:
        if ORDER == 1 or GAMMA != 0.0:
            # e alone is no subnormal number where e·scale is one.
            slope = tl.where(clear, negative(v_right) * e, v_wrong - v_right * tail)
            slope = quotient(slope, one_plus, ROUND_TO_16_BIT) * tl.where(clear, scale, 1.0)
            result = slope
        if ORDER == 2:
            result = quotient((v_wrong + v_right) * e, tl.fma(tail, 2.0 + tail, 1.0), ROUND_TO_16_BIT) * scale
        if GAMMA != 0.0:
            loss = v_wrong * near + (v_wrong + v_right) * log_one
            ratio = tl.where(clear, 1.0, quotient(tail, mixture, ROUND_TO_16_BIT))
            q = quotient((wrong - right) * ratio, one_plus, ROUND_TO_16_BIT)
            if ORDER == 1:
                result += gamma * loss * q
            else:
                bend = (gamma - 1.0) * q - quotient(1.0 - tail, one_plus, ROUND_TO_16_BIT)
                result += gamma * q * (2.0 * slope + loss * bend)
        if ORDER == 1:
            result = tl.where(above, result, negative(result))
        return result
