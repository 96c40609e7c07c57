"""Bounds on errors, derived: the documented error of each operation, carried through the formulas of kernels/maths.py.

This is Wilkinson's running analysis, in float64: a `Bounded` has the exact value, and a bound on the error of what fp32 makes
of it. What is put in:

- a sum, a product and a fused multiply-add are rounded once: half an ulp;
- expf and logf: by the CUDA Math API 1 ulp from the correctly rounded result, so 1.5 from the exact one;
- a quotient: 0.51 ulp, from a div.approx of 2 ulp by its residual (tests/test_maths.py);
- the series of log(1 + e): 2^-29 of the sum is left out.

No intermediate result is subnormal where the result is normal: tests/test_extremes.py.
"""

from dataclasses import dataclass

import numpy as np

EXP, LOG, QUOTIENT = 1.5, 1.5, 0.51
# The same expf on a machine that makes its one ex2.approx err by so many ulp after a correct rounding; 2 is what the PTX ISA
# allows. The rest of it: half an ulp of rounding, and two roundings of the reduced argument, ln 2 · 2^-24 relative.
EXP_OF_EX2 = {0: 1.2, 1: 2.2, 2: 3.2}

# numpy's, and with it the interpreter's: exp and log are off by up to 2.52 and 3.83 ulp, and an fma is rounded twice.
OF_NUMPY = {"exp_ulps": 2.6, "log_ulps": 3.9, "fused": False}

# What kernels/maths.py and the public docstrings claim in fp32, in ulp of the result, or of the sum of its terms' sizes where
# they cancel, for an upstream gradient of 1 (another costs one more rounding). tests/test_bounds.py derives them.
CLAIMS = {
    ("sigmoid", 0): 5.0,
    ("sigmoid", 1): 4.5,
    ("silu", 0): 6.0,
    ("silu", 1): 5.5,
    ("logsigmoid", 0): 5.5,
    ("logsigmoid", 1): 4.5,
}


def claim_of_loss(gamma):
    """Binary cross entropy, and focal loss whose power is a product, or not: then an ulp of log u counts γ·|log u|."""
    if gamma == 0:
        return 6.5
    return (8.0 if gamma in (1, 2, 3, 4) else 15.5) * (1 + gamma)


def ulp(value):
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(value), 2.0**-126))) - 23)


@dataclass
class Bounded:
    """A value, a bound on its rounding errors, and its derivative in e = e^-|x|, whose error meets itself in every term."""

    value: np.ndarray
    error: np.ndarray | float = 0.0
    slope: np.ndarray | float = 0.0

    def rounded(self, ulps=0.5):
        return Bounded(self.value, self.error + ulps * ulp(np.abs(self.value) + self.error), self.slope)

    def __add__(self, other):
        other = bounded(other)
        total = Bounded(self.value + other.value, self.error + other.error, self.slope + other.slope)
        # A sum loses no more than half an ulp, and no more than its smaller part.
        lost = np.minimum(0.5 * ulp(total.value), np.minimum(np.abs(self.value), np.abs(other.value)))
        return Bounded(total.value, total.error + lost, total.slope)

    def exact_product(self, other):
        other = bounded(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return Bounded(self.value * other.value, error, self.value * other.slope + other.value * self.slope)

    def __mul__(self, other):
        return self.exact_product(other).rounded()

    def __neg__(self):
        return Bounded(-self.value, self.error, -self.slope)

    def __sub__(self, other):
        return self + -bounded(other)


def bounded(number):
    return number if isinstance(number, Bounded) else Bounded(np.float64(number))


@dataclass
class Arithmetic:
    """fp32 as a GPU has it."""

    exp_ulps: float = EXP
    log_ulps: float = LOG
    fused: bool = True

    def fma(self, a, b, c):
        product = bounded(a).exact_product(b)
        if not self.fused:
            product = product.rounded()
        return product + c

    def exp_minus(self, distance):
        e = np.exp(-distance)
        return Bounded(e, 0.0, np.ones_like(e))

    def exp(self, power):
        value = np.exp(power.value)
        return Bounded(value, value * power.error, value * power.slope).rounded(self.exp_ulps)

    def quotient(self, a, b):
        a, b = bounded(a), bounded(b)
        value = a.value / b.value
        error, slope = (a.error + np.abs(value) * b.error) / np.abs(b.value), (a.slope - value * b.slope) / b.value
        return Bounded(value, error, slope).rounded(QUOTIENT)

    def log(self, a):
        return Bounded(np.log(a.value), a.error / np.abs(a.value), a.slope / a.value).rounded(self.log_ulps)

    def where(self, condition, a, b):
        a, b = bounded(a), bounded(b)
        return Bounded(*(np.where(condition, *each) for each in ((a.value, b.value), (a.error, b.error), (a.slope, b.slope))))

    def total_error(self, result, x):
        """What `result` may be off by, the error of e included; second orders are a 2^-20th of it."""
        e, far = np.exp(-np.abs(x)), np.abs(x) > 81
        # Far out e is the product of an exponential of another mantissa with a scale.
        of_e = np.where(far, 2.0**-23 * e, ulp(e * (1 + 2.0**-20)))
        error = result.error + np.abs(result.slope) * self.exp_ulps * of_e + np.where(far, 0.55 * ulp(result.value), 0.0)
        return error * (1 + 2.0**-20)

    def log_one_plus(self, e):
        s = self.quotient(e, e + 2)
        square = s * s
        series = bounded(1 / 15)
        for n in (13, 11, 9, 7, 5, 3):
            series = self.fma(square, series, 1 / n)
        twice = Bounded(2 * s.value, 2 * s.error, 2 * s.slope)
        result = self.fma(twice, square * series, twice)
        return Bounded(np.log1p(e.value), result.error + 2.0**-29 * np.log1p(e.value), result.slope)


def sigmoid(arithmetic, x):
    """1 / (1 + e^-x), whose quotient is correctly rounded."""
    return arithmetic.quotient(1, arithmetic.exp(Bounded(-x)) + 1)


def weighted(arithmetic, x, function, order):
    """For v = 1."""
    if function == "logsigmoid" and order == 1:
        return weighted(arithmetic, -x, "sigmoid", 0)
    a, below = arithmetic, x < 0
    e = a.exp_minus(np.abs(x))
    one_plus = e + 1
    if function == "logsigmoid":
        return -a.log_one_plus(e) + np.where(below, x, 0)
    if order == 0:
        result = a.quotient(a.where(below, e, 1), one_plus)
        return result if function == "sigmoid" else result * x
    square = a.fma(e, e + 2, 1)
    if function == "sigmoid":
        return a.quotient(e, square)
    # Around the zero of silu' errors are those of its terms.
    factor = a.where(below, e * (one_plus + x), a.fma(e, Bounded(1 + x).rounded(), 1))
    return a.quotient(factor, square)


def weighted_loss(arithmetic, x, target, gamma, order):
    a, above = arithmetic, x >= 0
    complement = Bounded(1 - target, np.abs(np.float32(1 - target) - (1 - target)))
    wrong, right = a.where(above, complement, target), a.where(above, target, complement)
    distance = np.abs(x)
    e = a.exp_minus(distance)
    one_plus, clear = e + 1, wrong.value == 0
    log_one = a.log_one_plus(e)
    power = None
    if gamma:
        mixture = a.where(clear, 1, a.fma(right, e, wrong))
        if gamma in (1, 2, 3, 4):
            u = a.quotient(a.where(clear, e, mixture), one_plus)
            for factor in range(int(gamma)):
                power = u if factor == 0 else power * u
        else:
            first = a.where(clear, -distance, a.log(mixture))
            slope = gamma * (first.slope - log_one.slope)
            exponent = gamma * (first.value - log_one.value)
            # Of the exponent only what is left of its large product is rounded, some five times.
            left = gamma * (2.0**-8 * np.abs(first.value) + 2.0**-7 + log_one.value)
            error = gamma * (first.error + log_one.error) + 5 * 0.5 * ulp(left)
            power = a.exp(Bounded(exponent, error, slope)).rounded(1.0)
    loss = a.fma(log_one, wrong + right, wrong * distance)
    loss = a.where(clear, log_one, loss)
    if order == 0:
        return loss * power if gamma else loss
    result = a.quotient(a.fma(-right, e, wrong), one_plus)
    if gamma:
        ratio = a.where(clear, 1, a.quotient(e, mixture))
        q = a.quotient(ratio * (wrong - right), one_plus)
        result = loss * gamma * q + result
    result = a.where(above, result, -result)
    return result * power if gamma else result
