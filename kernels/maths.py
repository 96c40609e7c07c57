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

Largest errors in fp32, in ulp of the result, or of the sum of its terms' sizes where they cancel: σ 5 and σ' 4.5, silu 6 and
silu' 5.5, logsigmoid 5.5 and its derivative 4.5, binary cross entropy 6.5, focal loss 8·(1 + γ) for γ of 1, 2, 3 or 4, else
15.5·(1 + γ). They are derived from an expf and logf that are 1 ulp off the correctly rounded result (CUDA Math API) and a
div.approx of 2 (PTX ISA), for an upstream gradient of 1; another costs the rounding of one more product. See tests/bounds.py.
On an H100 the first six are within 4 wherever they exceed 2^-119. In 16 bit the result's own rounding is all.
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
    """-x as a product, which the next instruction takes in as a sign. Triton's own minus is 0 - x, an instruction more."""
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
def curvature_from_output(sigma):
    """σ"/σ' = 1 - 2σ."""
    return 1.0 - 2.0 * sigma


# The functions whose derivatives `weighted` knows.
SIGMOID, SILU, LOGSIGMOID = map(tl.constexpr, range(3))
# Beyond ±FAR every function here is at its limit; an infinite x would make 0·∞ of it.
FAR = tl.constexpr(1000.0)
# Quotients of e^-SHIFTED_FROM are normal numbers with room for a residual; beyond it |x|·e^(SHIFT - |x|) is below 1, so that no
# v overflows by it. Of e^-SHIFT the rounding to fp32 is 2^-29 of it, where that of another shift is up to 2^-24.
SHIFT, SHIFTED_FROM, EXP_MINUS_SHIFT = tl.constexpr(75.875), tl.constexpr(81.0), tl.constexpr(math.exp(-75.875))
LOG2_E = tl.constexpr(1 / math.log(2))
SHIFT_FP64, SHIFTED_FROM_FP64, EXP_MINUS_SHIFT_FP64 = tl.constexpr(690.0), tl.constexpr(700.0), tl.constexpr(math.exp(-690.0))


@triton.jit
def exp_minus_abs(x, lost, ROUND_TO_16_BIT: tl.constexpr):
    """e^-|x + lost| as e·scale, where e and scale are no subnormal numbers until |x| > 163 (1398 in fp64).

    Multiply an upstream gradient by e first and by scale after: the product keeps its digits wherever it is a normal number.
    `lost` is None, or so small that e^lost is 1 + lost.
    """
    distance = tl.abs(x)
    DOUBLE: tl.constexpr = x.dtype == tl.float64
    far = distance > constant(SHIFTED_FROM_FP64 if DOUBLE else SHIFTED_FROM, x)
    scale = tl.where(far, constant(EXP_MINUS_SHIFT_FP64 if DOUBLE else EXP_MINUS_SHIFT, x), 1.0)
    if ROUND_TO_16_BIT and not INTERPRETED:
        # ex2.approx of a product that is rounded once: off by |x|·2^-23 of itself, which 16 bit does not see.
        e = tl.exp2(tl.fma(distance, -LOG2_E, tl.where(far, SHIFT * LOG2_E, 0.0)))
    else:
        e = exp(tl.where(far, constant(SHIFT_FP64 if DOUBLE else SHIFT, x), 0.0) - distance)
    if lost is not None:
        e = tl.fma(e, tl.where(x < 0.0, lost, negative(lost)), e)
    return e, scale


@triton.jit
def limited(x, ALPHA: tl.constexpr = 1.0):
    """x between ±FAR/ALPHA."""
    far = constant(FAR / ALPHA, x)
    above = tl.maximum(x, -far, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, far, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def rounded_to(bits, number):
    fraction, exponent = math.frexp(number)
    return math.ldexp(round(fraction * 2**bits), exponent - bits)


@triton.jit
def product(ALPHA: tl.constexpr, x):
    """ALPHA·x, and what its rounding has lost: up to |ALPHA·x| ulp of e^(ALPHA·x)."""
    x = limited(x, ALPHA)
    rounded = x * constant(ALPHA, x)
    if INTERPRETED:
        # The interpreter's fma rounds the product; in fp64 Dekker's is exact, by halves whose products are.
        if x.dtype == tl.float32:
            lost = (x.to(tl.float64) * ALPHA - rounded.to(tl.float64)).to(tl.float32)
        else:
            HIGH: tl.constexpr = rounded_to(26, ALPHA)
            shifted = x * 134217729.0
            high = shifted - (shifted - x)
            low = x - high
            lost = high * HIGH - rounded + high * (ALPHA - HIGH) + low * HIGH + low * (ALPHA - HIGH)
    else:
        lost = tl.fma(x, constant(ALPHA, x), negative(rounded))
        if x.dtype == tl.float32:
            REST: tl.constexpr = ALPHA - rounded_to(24, ALPHA)
            lost = tl.fma(x, REST, lost)
    return rounded, lost


@triton.jit
def one_minus(e, x, ROUND_TO_16_BIT: tl.constexpr):
    """1 - e for e = e^-|x|; where that cancels, (1 + e)·tanh(|x|/2), by the series of tanh."""
    if INTERPRETED:
        return 1.0 - e
    elif x.dtype == tl.float64:
        return negative(libdevice.expm1(negative(tl.abs(x))))
    else:
        half = 0.5 * tl.abs(x)
        square = half * half
        # What is left out is below 2^-26 of the sum at |x| = 1/2, in 16 bit below 2^-22 at 1/16.
        if ROUND_TO_16_BIT:
            near, series = half < 0.03125, tl.fma(square, -1 / 3, 1.0)
        else:
            near, series = half < 0.25, tl.fma(square, tl.fma(square, tl.fma(square, 62 / 2835, -17 / 315), 2 / 15), -1 / 3)
            series = tl.fma(square, series, 1.0)
        return tl.where(near, half * series * (1.0 + e), 1.0 - e)


@triton.jit
def quotient(numerator, denominator, ROUND_TO_16_BIT: tl.constexpr):
    """numerator/denominator, for denominators between 2^-126 and 2^126. In fp32 approximate, then corrected: no branch."""
    if INTERPRETED or numerator.dtype == tl.float64:
        return numerator / denominator
    elif ROUND_TO_16_BIT:
        return libdevice.fast_dividef(numerator, denominator)
    else:
        reciprocal = libdevice.fast_dividef(1.0, denominator)
        approximation = numerator * reciprocal
        corrected = tl.fma(tl.fma(negative(denominator), approximation, numerator), reciprocal, approximation)
        # An infinite quotient has no residual to correct it by.
        return tl.where(tl.abs(approximation) == float("inf"), approximation, corrected)


@triton.jit
def divided(value, by):
    """The correctly rounded quotient."""
    if value.dtype == tl.float64:
        return value / by
    else:
        return tl.div_rn(value, by)


@triton.jit
def log_one_plus(e, scale, ROUND_TO_16_BIT: tl.constexpr):
    """log(1 + e·scale)/scale for e in [0, 1], where scale is 1 or so small that this is e.

    It is 2·artanh(s) for s = e/(2+e) ≤ 1/3, whose series has no branch.
    """
    if e.dtype == tl.float64:
        if INTERPRETED:
            # Kahan: what 1 + e loses of e, the quotient gives back.
            rounded = 1.0 + e
            log = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
        else:
            log = libdevice.log1p(e)
        return tl.where(scale == 1.0, log, e)
    else:
        s = quotient(e, tl.fma(e, scale, 2.0), ROUND_TO_16_BIT)
        square = s * s * scale
        series = tl.fma(square, tl.fma(square, 1 / 11, 1 / 9), 1 / 7)
        if not ROUND_TO_16_BIT:
            # What is left out is below 2^-29 of the sum; without these, 2^-22.
            series = tl.fma(square, tl.fma(square, tl.fma(square, tl.fma(square, 1 / 15, 1 / 13), 1 / 11), 1 / 9), 1 / 7)
        series = tl.fma(square, tl.fma(square, series, 1 / 5), 1 / 3)
        return tl.fma(2.0 * s, square * series, 2.0 * s)


@triton.jit
def weighted(v, x, FUNCTION: tl.constexpr, ORDER: tl.constexpr, ROUND_TO_16_BIT: tl.constexpr, ALPHA: tl.constexpr = 1.0):
    """v·f(x), v·f'(x) or v·f"(x), by ORDER, for f among SIGMOID, SILU and LOGSIGMOID; for SILU, f(x) = silu(ALPHA·x)/ALPHA.

    All are rational in e = e^-|x| ≤ 1, written for each sign of x so that nothing cancels but at a zero of silu' or silu". The
    product with v comes after the quotient, so that it overflows only where the result does, and before `scale`, so that it
    is subnormal only where the result is.
    """
    if FUNCTION == LOGSIGMOID and ORDER == 1:
        return weighted(v, negative(x), SIGMOID, 0, ROUND_TO_16_BIT)
    elif FUNCTION == LOGSIGMOID and ORDER == 2:
        return negative(weighted(v, x, SIGMOID, 1, ROUND_TO_16_BIT))
    else:
        if ALPHA == 1.0:
            gate = x
            e, scale = exp_minus_abs(x, None, ROUND_TO_16_BIT)
        elif ROUND_TO_16_BIT:
            # What rounding the product loses is nothing that 16 bit would see.
            gate = x * constant(ALPHA, x)
            e, scale = exp_minus_abs(gate, None, ROUND_TO_16_BIT)
        else:
            gate, lost = product(ALPHA, x)
            e, scale = exp_minus_abs(gate, lost, ROUND_TO_16_BIT)
        tail = e * scale
        one_plus = 1.0 + tail
        below = gate < 0.0
        if FUNCTION == LOGSIGMOID:
            return v * (tl.where(below, x, 0.0) - log_one_plus(e, scale, ROUND_TO_16_BIT) * scale)
        elif ORDER == 0:
            # σ(x) is 1/(1+e) above 0 and e/(1+e) below.
            factor = tl.where(below, e, 1.0)
            last = tl.where(below, scale, 1.0)
            if FUNCTION == SILU:
                # An x that may be subnormal comes after v, one that may be infinite before.
                small = tl.abs(gate) < 1.0
                factor *= tl.where(small, 1.0, tl.maximum(x, constant(-FAR / ALPHA, x)))
                last = tl.where(small, x, last)
            return quotient(factor, one_plus, ROUND_TO_16_BIT) * v * last
        elif FUNCTION == SIGMOID:
            # (1 + e)² would be rounded thrice.
            square = tl.fma(tail, 2.0 + tail, 1.0)
            if ORDER == 1:
                return quotient(e, square, ROUND_TO_16_BIT) * v * scale
            else:
                slope = quotient(tl.where(below, e, negative(e)), square * one_plus, ROUND_TO_16_BIT) * v
                return slope * one_minus(tail, x, ROUND_TO_16_BIT) * scale
        else:
            square = tl.fma(tail, 2.0 + tail, 1.0)
            near = limited(gate)
            if ORDER == 1:
                factor = tl.where(below, e * (one_plus + near), tl.fma(tail, 1.0 + near, 1.0))
                return quotient(factor, square, ROUND_TO_16_BIT) * v * tl.where(below, scale, 1.0)
            else:
                factor = e * (2.0 * one_plus - tl.abs(near) * (1.0 - tail))
                if ALPHA != 1.0:
                    factor *= constant(ALPHA, x)
                return quotient(factor, square * one_plus, ROUND_TO_16_BIT) * v * scale


@triton.jit
def log(x, ROUND_TO_16_BIT: tl.constexpr):
    if INTERPRETED or ROUND_TO_16_BIT:
        return tl.log(x)
    else:
        return libdevice.log(x)


# 8 bits of γ times log u in steps of 1/64: the product is exact in fp32, and the rests of both are small.
GAMMA_BITS, LOG_STEPS = tl.constexpr(8), tl.constexpr(64.0)


@triton.constexpr_function
def number_of_factors(gamma):
    """How many factors the power u^γ is the product of; 0 where it is taken by a logarithm instead."""
    return int(gamma) if gamma in (1, 2, 3, 4) else 0


@triton.jit
def exp_of_product(GAMMA: tl.constexpr, first, second, ROUND_TO_16_BIT: tl.constexpr):
    """e^(γ·(first + second)) for |first| ≤ FAR; but for 16 bit without the error of a large exponent that is rounded itself."""
    if ROUND_TO_16_BIT and not INTERPRETED:
        return libdevice.fast_expf(constant(GAMMA, first) * (first + second))
    LARGE: tl.constexpr = rounded_to(GAMMA_BITS, GAMMA)
    # Times the power of two: since Triton 3.9 a quotient by it is approximate.
    steps = tl.floor(first * LOG_STEPS + 0.5) * (1 / LOG_STEPS)
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
    clear = wrong == 0.0
    distance = tl.abs(x)
    near = tl.minimum(distance, FAR)
    e, scale = exp_minus_abs(x, None, ROUND_TO_16_BIT)
    tail = e * scale
    one_plus = 1.0 + tail
    # Where the whole has a factor e^-y (nothing is wrong, or a second derivative), its `last` part is multiplied after v.
    near_e, last = tl.where(clear, e, tail), tl.where(clear, scale, 1.0)
    if ORDER == 0 or GAMMA != 0.0:
        log_one = log_one_plus(near_e, last, ROUND_TO_16_BIT)
    if GAMMA != 0.0:
        gamma = constant(GAMMA, x)
        mixture = tl.where(clear, 1.0, tl.fma(right, tail, wrong))
        FACTORS: tl.constexpr = number_of_factors(GAMMA)
        if FACTORS > 0:
            u = quotient(tl.where(clear, e, mixture), one_plus, ROUND_TO_16_BIT) * last
            for _ in tl.static_range(FACTORS):
                v = v * u
        else:
            log_mixture = tl.where(clear, negative(near), log(mixture, ROUND_TO_16_BIT))
            v = v * exp_of_product(GAMMA, log_mixture, negative(log_one * last), ROUND_TO_16_BIT)
    if ORDER == 0:
        # At an infinite logit, neither a part of 0 nor a weight of 0 may make NaN.
        result = tl.where(clear, 0.0, wrong * distance) + (wrong + right) * log_one
        return tl.where(v == 0.0, 0.0, result * v * last)
    else:
        if ORDER == 1 or GAMMA != 0.0:
            slope = quotient(tl.fma(negative(right), near_e, wrong), one_plus, ROUND_TO_16_BIT)
            result = slope
        if ORDER == 2:
            result = quotient((wrong + right) * e, tl.fma(tail, 2.0 + tail, 1.0), ROUND_TO_16_BIT)
        if GAMMA != 0.0:
            loss = wrong * near + (wrong + right) * log_one
            ratio = tl.where(clear, 1.0, quotient(tail if ORDER == 1 else e, mixture, ROUND_TO_16_BIT))
            q = quotient((wrong - right) * ratio, one_plus, ROUND_TO_16_BIT)
            if ORDER == 1:
                result += gamma * loss * q
            else:
                whole_q = q * tl.where(clear, 1.0, scale)
                bend = (gamma - 1.0) * whole_q - quotient(1.0 - tail, one_plus, ROUND_TO_16_BIT)
                result += gamma * q * (2.0 * slope + loss * bend)
        if ORDER == 1:
            return tl.where(above, result, negative(result)) * v * last
        else:
            return result * v * scale
