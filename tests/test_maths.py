"""What kernels/maths.py says of its arithmetic, with each approximate instruction of a GPU at its worst.

The interpreter has neither rsqrt.approx nor div.approx, so their errors are emulated: by PTX ISA, "Floating Point
Instructions", at most 2^-22.9 relative for rsqrt.approx.ftz.f32, and 2 ulp for div.approx.ftz.f32.
"""

import re

import numpy as np
import pytest
import torch
from reference import SIXTEEN_BIT

import torch_sigmoid

RSQRT_ERROR = 2**-22.9
DIVISION_ERROR = 2 * 2.0**-23


def all_finite(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def rounded(values, dtype):
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(dtype)


def fma(a, b, c):
    """In fp32; the product of two fp32 numbers is exact in fp64, and the sum has 29 bits to spare."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("error", [-RSQRT_ERROR, -RSQRT_ERROR / 3, 0.0, RSQRT_ERROR / 3, RSQRT_ERROR])
def test_the_sixteen_bit_reciprocal_has_the_bits_of_the_division(dtype, error):
    """For each denominator 1 + e^-x of a 16-bit x, also where σ is subnormal (bf16 x < -87.3) or 0."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        d = np.float32(1) + np.exp(-all_finite(dtype).float().numpy())
        root = np.float32(1 / np.sqrt(np.float64(d)) * (1 + error))
        approximation = root * root
        step = np.fmin(fma(-d, approximation, np.float32(1)), np.float32(1))
        result = fma(approximation, step, approximation)
        expected = np.float32(1) / d
    assert np.isinf(d).any()
    assert torch.equal(rounded(result, dtype), rounded(expected, dtype))
    if abs(error) == RSQRT_ERROR:
        assert not torch.equal(rounded(approximation, dtype), rounded(expected, dtype)), "the Newton step is needed"


@pytest.mark.parametrize("error", [-DIVISION_ERROR, 0.0, DIVISION_ERROR])
def test_the_division_of_the_fp32_gradient_is_corrected_to_an_ulp(error):
    """quotient = e·(1/s) is 3 ulp off at worst; one step with the residual e - s·quotient makes it 1."""
    e = np.exp2(np.linspace(-126, 0, 200_001)).astype(np.float32)
    s = fma(e, np.float32(2) + e, np.float32(1))
    reciprocal = np.float32(1 / np.float64(s) * (1 + error))
    quotient = e * reciprocal
    corrected = fma(fma(-s, quotient, e), reciprocal, quotient)
    exact = np.float64(e) / np.float64(s)
    # Below it the residual itself is subnormal.
    normal = exact > 2.0**-102
    ulp = 2.0 ** (np.floor(np.log2(exact)) - 23)
    assert (np.abs(corrected - exact) / ulp)[normal].max() <= 0.51
    assert (np.abs(corrected - exact) / ulp).max() <= 3
    if error:
        assert (np.abs(quotient - exact) / ulp)[normal].max() > 2


def test_the_instructions_are_those_emulated_here():
    kernels = torch_sigmoid.kernels
    if kernels.UNAVAILABLE or kernels.INTERPRETED:
        pytest.skip("compiles; the interpreter does not")
    from benchmarks.measure.code import compile_operator, targets

    def after_the_exponential(operator, dtype):
        ptx = compile_operator(operator, dtype, targets()["sm_90"], (1 << 20,)).asm["ptx"]
        return ptx[ptx.rindex("ex2.approx.ftz.f32") + len("ex2.approx.ftz.f32") :]

    # .ftz would flush subnormals, and min.NaN keep the NaN of d = inf.
    for dtype in SIXTEEN_BIT:
        flushing = set(re.findall(r"\w[\w.]*\.ftz\S*|min\.NaN\S*", after_the_exponential("forward", dtype)))
        assert flushing == {"rsqrt.approx.ftz.f32"}
    flushing = set(re.findall(r"\w[\w.]*\.ftz\S*", after_the_exponential("backward-from-input", torch.float32)))
    assert flushing == {"div.approx.ftz.f32"}
