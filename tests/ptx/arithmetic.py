"""Floating point as a GPU computes it: exact operations rounded once, and models of the approximate instructions' errors."""

from fractions import Fraction

import numpy as np

# --- the approximate instructions -------------------------------------------------------------------------------------

# The largest errors that the PTX ISA documents (8.7, "Floating Point Instructions"): in ulp of the result, or relative to it.
ULPS = {"ex2": 2.0, "div": 2.0, "div.full": 2.0, "rcp": 1.0, "sqrt": 1.0, "rcp64": 1.0}
RELATIVE = {"rsqrt": 2.0**-22.9, "lg2": 2.0**-22, "tanh": 2.0**-11}


class Model:
    """How wrong an approximate instruction is on an input: a part in [-1, 1] of what is allowed.

    Args:
        name: as the test suite's --ptx-model spells it.
        part: `part(operation, operand_bits)`, numbers in [-1, 1]; None for correctly rounded results.
        one_ulp: allow one ulp, in place of what the PTX ISA documents.
    """

    def __init__(self, name, part=None, one_ulp=False):
        self.name, self.part, self.one_ulp = name, part, one_ulp

    def __repr__(self):
        return self.name

    def round(self, operation, exact, *operand_bits):
        """fp32 results for exact values given in fp64."""
        rounded = exact.astype(np.float32)
        if self.part is None:
            return rounded
        part = self.part(operation, operand_bits)
        if self.one_ulp or operation in ULPS:
            allowed = 1.0 if self.one_ulp else ULPS[operation]
            return moved(rounded, np.trunc(part * allowed + np.copysign(0.5, part)).astype(np.int32))
        wrong = exact * (1 + part * RELATIVE[operation])
        if operation == "lg2":  # between 0.5 and 2 its error is absolute
            wrong = np.where(np.abs(exact) < 1, exact + part * RELATIVE["lg2"], wrong)
        result = wrong.astype(np.float32)
        # Rounding must not take it further than allowed.
        beyond = (np.abs(result.astype(np.float64) - exact) > np.abs(wrong - exact)) & (part != 0) & np.isfinite(result)
        return np.where(beyond, np.nextafter(result, rounded), result)

    def step(self, operation, *operand_bits):
        """The error of rcp.approx.f64, in units of the last bit of its upper word: -1, 0 or 1."""
        if self.part is None:
            return np.int64(0)
        return np.sign(np.trunc(self.part(operation, operand_bits) * 1.5)).astype(np.int64)


def moved(value, ulps):
    """Move fp32 numbers `ulps` steps away from zero, never to 0 or infinity; zero, infinity and NaN stay."""
    bits = value.view(np.int32)
    magnitude = bits & 0x7FFFFFFF
    result = np.clip(magnitude + np.where(bits < 0, -ulps, ulps), 1, 0x7F7FFFFF)
    result = np.where((magnitude == 0) | (magnitude >= 0x7F800000), magnitude, result)
    return (result | (bits & np.int32(-(2**31)))).astype(np.int32).view(np.float32)


def _hashed(seed):
    """A part for each operation and input, which looks random and is the same every time."""

    def part(operation, operand_bits):
        key = np.uint64((seed * 0x9E3779B97F4A7C15 + int.from_bytes(operation.encode(), "little")) % 2**64)
        for bits in operand_bits:
            key = (np.asarray(bits).astype(np.uint64) + key) * np.uint64(0xBF58476D1CE4E5B9)
            key = key ^ (key >> np.uint64(29))
        return (key >> np.uint64(11)).astype(np.float64) / 2**52 - 1.0

    return part


EXACT = Model("exact")
MODELS = {
    model.name: model
    for model in (
        EXACT,
        Model("ulp-high", lambda operation, bits: np.float64(1.0), one_ulp=True),
        Model("ulp-low", lambda operation, bits: np.float64(-1.0), one_ulp=True),
        Model("isa-high", lambda operation, bits: np.float64(1.0)),
        Model("isa-low", lambda operation, bits: np.float64(-1.0)),
        # Errors of a quotient and of an exponential that add up instead of cancelling.
        Model("isa-opposed", lambda operation, bits: np.float64(1.0 if operation == "ex2" else -1.0)),
        Model("random-1", _hashed(1)),
        Model("random-2", _hashed(2)),
    )
}

# --- exact operations -------------------------------------------------------------------------------------------------


# CUDA C++ Programming Guide, "Floating-Point Standard". x86 hands on the first NaN that it is given, with its sign.
NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def canonical(x):
    """The one NaN that operations on fp32 give, in place of any."""
    if x.dtype != np.float32 or not (unordered := np.isnan(x)).any():
        return x
    return np.where(unordered, NAN, x)


def flush(x):
    """What .ftz does: subnormal numbers to a zero of their sign."""
    magnitude, tiny = np.abs(x), np.finfo(x.dtype).tiny
    if magnitude.min() >= tiny:  # which no NaN is
        return x
    return np.where(magnitude < tiny, np.copysign(x.dtype.type(0), x), x)


def saturate(x):
    """What .sat does: to [0, 1], and NaN to 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)) + x.dtype.type(0))


def two_sum(a, b):
    """a + b rounded, and what rounding lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(s, lost):
    """s + lost, which s is the rounded sum of, rounded to odd: then rounding once more to fewer digits is rounding once."""
    bits = s.view(np.int64)
    inexact_and_even = np.isfinite(s) & (lost != 0) & ((bits & 1) == 0)
    step = np.where((lost > 0) == (bits >= 0), 1, -1)
    return np.where(inexact_and_even, bits + step, bits).view(np.float64)


def fma32(a, b, c, rounding="rn"):
    """a·b + c, rounded once. The product of two fp32 numbers is exact in fp64."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = product + c
    if rounding == "rn":
        # Rounding twice differs only where the first leaves a tie, or where the result has fewer digits.
        doubtful = ((s.view(np.int64) & 0x1FFFFFFF) == 0x10000000) | (np.abs(s) < 2.0**-125)
        if doubtful.any():
            s = np.where(doubtful, to_odd(*two_sum(product, c)), s)
        return s.astype(np.float32)
    assert rounding == "rm"
    _, lost = two_sum(product, c)
    result = s.astype(np.float32)
    above = (result.astype(np.float64) > s) | ((result.astype(np.float64) == s) & (lost < 0))
    result = np.where(above, np.nextafter(result, np.float32(-np.inf)), result)
    cancels = (s == 0) & (lost == 0) & (np.signbit(product) != np.signbit(c))
    return np.where(cancels, np.float32(-0.0), result)


def fma64(a, b, c):
    """a·b + c in fp64, rounded once."""
    plain = a * b + c
    trivial = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)) | (a == 0) | (b == 0)
    # Where nothing can overflow or underflow on the way.
    near = (np.abs(a) < 2.0**900) & (np.abs(b) < 2.0**900) & (np.abs(c) < 2.0**900)
    near &= (np.abs(a * b) > 2.0**-900) & (np.abs(a * b) < 2.0**900) & ((c == 0) | (np.abs(c) > 2.0**-900))
    result = np.where(trivial, plain, _fma64_of_near(a, b, c))
    far = ~(near | trivial)
    if far.any():
        a, b, c = np.broadcast_arrays(a, b, c)
        result[far] = _fma64_of_far(a[far], b[far], c[far], plain[far])
    return result


def _fma64_of_near(a, b, c):
    """By error-free steps, the last but one rounded to odd (Boldo and Melquiond 2008)."""
    product = a * b
    a_wide, b_wide = a * 134217729.0, b * 134217729.0  # 2^27 + 1 splits 53 bits into halves
    a_high, b_high = a_wide - (a_wide - a), b_wide - (b_wide - b)
    a_low, b_low = a - a_high, b - b_high
    product_lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    low, lowest = two_sum(c, product_lost)
    high, middle = two_sum(product, low)
    return high + to_odd(*two_sum(lowest, middle))


def _fma64_of_far(a, b, c, plain):
    """The same, scaled by a power of two; what comes out subnormal in rational numbers, as scaling back would round again."""
    (a, of_a), (b, of_b), (c, of_c) = map(np.frexp, (a, b, c))
    # So far away one summand only decides where the other one ends in a tie.
    shift = np.where(c == 0, 0, np.clip(of_c - of_a - of_b, -200, 200))
    result = _fma64_of_near(a, b, np.ldexp(c, shift))
    scale = np.where(shift == 200, of_c - 200, of_a + of_b)
    scaled_back = np.ldexp(result, scale)
    scaled_back[result == 0] = plain[result == 0]
    for i in np.flatnonzero((result != 0) & (np.frexp(result)[1] + scale < -1021)):
        exact = Fraction(a[i]) * Fraction(b[i]) * Fraction(2) ** int(of_a[i] + of_b[i]) + Fraction(c[i]) * Fraction(2) ** int(
            of_c[i]
        )
        scaled_back[i] = float(exact)
    return scaled_back


def to_bf16(x):
    """The bits of bf16 for fp32 numbers, to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(x):
    """The bits of fp16 for fp32 numbers, to nearest, ties to even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
