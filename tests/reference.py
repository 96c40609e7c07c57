"""What the tests measure against: oracles in float64 and mpmath, samples of every dtype, ulps, layouts and the bounds.

Nothing here uses torch_sigmoid, except to ask which path a device takes.
"""

import functools

import numpy as np
import pytest
import torch

import torch_sigmoid

try:
    import mpmath
except ImportError:  # a bare GPU machine
    mpmath = None

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Executed machine code takes a second a test. Where much else varies it shows what is left out here by another dtype: float16
# by bfloat16, which differs in conversions, and strides of 4 bytes by strides of 2.
WITHOUT_FLOAT16_EXECUTED = [pytest.param(dtype, marks=[pytest.mark.ways] * (dtype is torch.float16)) for dtype in FLOATS]
NARROW_EXECUTED = [pytest.param(torch.float32, marks=pytest.mark.ways), torch.bfloat16]
SIXTEEN_BIT = [torch.float16, torch.bfloat16]

# The numerical contract, in units of the last place of the exact value. Each is derived where it is stated.
ROUNDED_ONCE = 0.5 + 1e-3  # N2: one rounding to 16 bit (0.5) after fp32 arithmetic (1e-3 is 8 ulp of fp32 in fp16)
FROM_INPUT = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 4.0, torch.float64: 8.0}  # N3
# Forward: exp within 1 ulp, then a sum and a quotient rounded: a relative 2·eps, which is 4 ulp just above a power of two.
FORWARD = {torch.bfloat16: ROUNDED_ONCE, torch.float16: ROUNDED_ONCE, torch.float32: 4.0, torch.float64: 4.0}
# Triton's interpreter truncates fp32 to bf16 where a GPU rounds to nearest: half an ulp more, there and only there.
TRUNCATION = 0.5

# Where the true derivative is a normal number with room for the exponential: N3 is stated on these intervals.
NORMAL_RANGE = {torch.float32: 87.0, torch.float64: 700.0}


def runs_kernels(device):
    return torch_sigmoid.path(torch.empty(1, device=device)).name == "triton"


def interpreted(device):
    return runs_kernels(device) and torch_sigmoid.kernels.INTERPRETED


def allowance(dtype, device):
    return TRUNCATION if dtype is torch.bfloat16 and interpreted(device) else 0.0


def readable(x, device):
    """Where the interpreter reads x as it is: it takes a bf16 subnormal for another number."""
    if x.dtype is torch.bfloat16 and interpreted(device):
        return (x == 0) | (x.abs() >= torch.finfo(x.dtype).smallest_normal)
    return torch.ones_like(x, dtype=torch.bool)


def all_patterns(dtype):
    """Every bit pattern of a 16-bit dtype."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def structured_sample(dtype):
    """Every exponent with several mantissas, both signs, each saturation edge ± 4 ulp, subnormals, zeros, inf and NaN."""
    bits, mantissa = (torch.int32, 23) if dtype is torch.float32 else (torch.int64, 52)
    exponents = torch.arange(2 ** (dtype.itemsize * 8 - 1 - mantissa), dtype=torch.int64)
    mantissas = torch.tensor([0, 1, 2, 3 << (mantissa - 3), 1 << (mantissa - 1), (1 << mantissa) - 1])
    every_exponent = ((exponents[:, None] << mantissa) | mantissas).flatten().to(bits).view(dtype)
    # σ rounds to 1; its derivative from σ vanishes; e^x overflows; σ becomes subnormal, then 0.
    edges = torch.tensor([16.6355, 17.3287, 36.0437, 36.7368, 87.3365, 88.7228, 103.972, 708.396, 709.783, 744.44], dtype=dtype)
    around = (edges.view(bits)[:, None] + torch.arange(-4, 5, dtype=bits)).flatten().view(dtype)
    dense = torch.linspace(0, NORMAL_RANGE[dtype], 20_000, dtype=torch.float64).to(dtype)
    positive = torch.cat([every_exponent, around, dense])
    return torch.cat([positive, -positive])


def random_patterns(dtype, count=20_000):
    """Uniform bit patterns: all exponents equally often, NaN and inf among them."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    raw = torch.randint(low, high, (count,), generator=generator)
    return raw.view(dtype)[:count]


def sample(dtype):
    return all_patterns(dtype) if dtype in SIXTEEN_BIT else torch.cat([structured_sample(dtype), random_patterns(dtype)])


def _mpmath_values(x, function):
    if mpmath is None:
        pytest.skip("needs mpmath")
    with mpmath.workdps(40):
        return torch.tensor([float(function(mpmath.mpf(value))) for value in x.double().tolist()], dtype=torch.float64)


def _sigma_mp(x):
    return 1 / (1 + mpmath.exp(-x))


def _derivative_mp(x):
    return _sigma_mp(x) * _sigma_mp(-x)


@functools.cache
def _sixteen_bit_oracle(dtype, function):
    """By mpmath, over the finite patterns; NaN elsewhere."""
    x = all_patterns(dtype)
    exact = torch.full(x.shape, float("nan"), dtype=torch.float64)
    finite = x.isfinite()
    exact[finite] = _mpmath_values(x[finite], function)
    return exact


def sigma(x):
    """σ(x) in float64, from numpy alone; for float64 itself by mpmath."""
    if x.dtype is torch.float64:
        return _finite_only(x, lambda v: _mpmath_values(v, _sigma_mp))
    wide = x.double().numpy()
    with np.errstate(over="ignore"):
        return torch.as_tensor(1 / (1 + np.exp(-wide)))


def derivative(x):
    """σ'(x) = e^-|x| / (1 + e^-|x|)² in float64, from numpy alone; for float64 itself by mpmath."""
    if x.dtype is torch.float64:
        return _finite_only(x, lambda v: _mpmath_values(v, _derivative_mp))
    e = np.exp(-np.abs(x.double().numpy()))
    return torch.as_tensor(e / (1 + e) ** 2)


def second_derivative(x):
    """σ"(x) = -σ'(x)·tanh(x/2) in float64."""
    return -derivative(x) * torch.as_tensor(np.tanh(x.double().numpy() / 2))


def _finite_only(x, function):
    exact = torch.full(x.shape, float("nan"), dtype=torch.float64)
    finite = x.isfinite()
    exact[finite] = function(x[finite])
    return exact


def sigma_of_all_patterns(dtype):
    return _sixteen_bit_oracle(dtype, _sigma_mp)


def derivative_of_all_patterns(dtype):
    return _sixteen_bit_oracle(dtype, _derivative_mp)


def ulp(exact, dtype):
    """The distance of neighbouring numbers of `dtype` around `exact`; among subnormals, their spacing."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


def ulp_error(actual, exact):
    """|actual - exact| in ulps of actual's dtype around the exact value."""
    return (actual.cpu().double() - exact).abs() / ulp(exact, actual.dtype)


def is_normal(exact, dtype):
    info = torch.finfo(dtype)
    return (exact.abs() >= info.smallest_normal) & (exact.abs() <= info.max)


def gradient(function, x, grad_output=None):
    """The gradient of function(x) for an upstream gradient, ones by default."""
    x = x.detach().requires_grad_()
    output = function(x)
    return torch.autograd.grad(output, x, torch.ones_like(output) if grad_output is None else grad_output)[0]


def random(shape, dtype, device="cpu", seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def _strided(shape, strides, offset=0):
    """A random tensor of these strides, in a larger storage whose other elements are NaN."""

    def make(dtype, device, seed=0):
        extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        storage = torch.full((max(extent, 1),), float("nan"), dtype=dtype, device=device)
        view = storage.as_strided(shape, strides, offset)
        view.copy_(random(shape, dtype, device, seed))
        return view

    return make


def _expanded(small, shape):
    return lambda dtype, device, seed=0: random(small, dtype, device, seed).expand(shape)


# Sizes around each boundary: of the tail (16) and of a tile (1024), in both directions of it.
LAYOUTS = {
    "scalar": _strided((), ()),
    "empty": _strided((0,), (1,)),
    "empty-2d": _strided((3, 0), (1, 1)),
    "one": _strided((1,), (1,)),
    "prime": _strided((17,), (1,)),
    "below-tail": _strided((15,), (1,)),
    "at-tail": _strided((16,), (1,)),
    "below-tile": _strided((1023,), (1,)),
    "at-tile": _strided((1024,), (1,)),
    "above-tile": _strided((1025,), (1,)),
    "two-tiles-and-a-tail": _strided((2063,), (1,)),
    "matrix": _strided((37, 53), (53, 1)),
    "offset-by-one": _strided((1031,), (1,), 1),
    "transposed": _strided((37, 53), (1, 37)),
    "permuted": _strided((5, 7, 11), (1, 55, 5)),
    "channels-last": _strided((2, 5, 7, 3), (105, 1, 15, 5)),
    "chunk-half": _strided((33, 32), (64, 1)),
    "chunk-half-odd": _strided((33, 37), (74, 1), 37),
    "narrow-rows": _strided((65, 3), (4, 1)),
    "wide-rows": _strided((3, 1100), (1200, 1)),
    "every-second": _strided((300,), (2,)),
    "every-second-row-and-column": _strided((20, 30), (120, 2)),
    "transposed-slice": _strided((30, 20), (1, 41)),
    "block": _strided((3, 5, 7), (200, 20, 1)),
    "block-of-four": _strided((3, 4, 5, 6), (1000, 200, 20, 2)),
    "size-one-dims": _strided((1, 19, 1, 5), (7, 5, 3, 1)),
    "expanded-rows": _expanded((1, 43), (29, 43)),
    "expanded-columns": _expanded((29, 1), (29, 43)),
    "expanded-all": _expanded((1, 1), (29, 43)),
    "expanded-vector": _expanded((1,), (1030,)),
    "expanded-middle": _expanded((3, 1, 5), (3, 7, 5)),
}


# Correct to a few roundings: these tests ask whether each value is where it belongs; its last digits are test_backward's.
RELATIVE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_near(actual, exact, dtype):
    """Relative, with an absolute part for fp16 gradients that are subnormal."""
    torch.testing.assert_close(actual.double(), exact, rtol=RELATIVE[dtype], atol=1e-7 if dtype is torch.float16 else 1e-30)
