"""N1 against the original: ATen's formula, compiled by nvcc, and our kernel, executed by one machine: bit for bit.

What makes the two equal is that they compute the same: CUDA's expf, whose approximate instructions may be wrong in any way
they like, as long as the same operand gives the same result. So the comparison is made under every model of their errors.

Not promised are subnormal fp32 inputs of 8.1e-39 and more: Triton's .ftz makes the operand of ex2 0 where nvcc's is about
1e-38. The two are equal if a GPU's ex2.approx of 1e-38 is 1, as it is under the exact model.
"""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from reference import FLOATS, FORWARD, SIXTEEN_BIT, all_patterns, random_patterns, structured_sample, ulp_error

pytest.importorskip("triton")
import ptx
from ptx.memory import Operand

from torch_sigmoid import kernels

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
THREADS = 128
# Subnormal inputs from this magnitude up may differ (see the module's docstring).
SUBNORMAL_FROM = 8.1e-39
# With the approximate instructions exact, and with each model of their errors.
N_RANDOM, N_RANDOM_OF_OTHERS = 10_000_000, 1_500_000


@functools.cache
def aten(entry):
    """A kernel of aten.cu, as PTX."""
    return ptx.parse(_module(), entry)


@functools.cache
def _module():
    if not (nvcc := shutil.which("nvcc")):
        pytest.skip("needs nvcc, to compile ATen's formula")
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "aten.ptx"
        source = Path(__file__).with_name("aten.cu")
        subprocess.run([nvcc, "-arch=sm_90", "-ptx", "-o", module, source], check=True, capture_output=True)
        return module.read_text()


def run_aten(operator, model, *inputs):
    """ATen's result for tensors, all of one length."""
    output = torch.empty_like(inputs[0])
    n = output.numel()
    operands = [Operand(f"input {i}", tensor, True, False) for i, tensor in enumerate(inputs)]
    operands.append(Operand("output", output, False, True))
    addresses = [operand.start for operand in operands]
    ptx.launch(aten(f"{operator}_{NAMES[output.dtype]}"), -(-n // THREADS), THREADS, [*addresses, n], operands, model=model)
    return output


def different(ours, theirs):
    """Where the bits differ; a NaN is a NaN."""
    bits = BITS[ours.element_size()]
    return (ours.view(bits) != theirs.view(bits)) & ~(ours.isnan() & theirs.isnan())


@pytest.fixture(autouse=True)
def only_where_ptx_is_executed(request):
    if request.config.kernels.ptx is None:
        pytest.skip("needs --kernels=ptx")


def assert_equal(x, model):
    differ = different(kernels.sigmoid.sigmoid_forward(x), run_aten("sigmoid", model, x))
    if x.dtype is torch.float32:
        magnitude = x.abs()
        differ &= ~((magnitude >= SUBNORMAL_FROM) & (magnitude < torch.finfo(x.dtype).smallest_normal))
    assert not differ.any(), f"{int(differ.sum())} of {len(x)}, first at {x[differ][:3].tolist()}"


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_input(dtype, model):
    assert_equal(all_patterns(dtype), model)


def test_fp32_at_every_exponent_and_edge(model):
    assert_equal(structured_sample(torch.float32), model)


def test_subnormal_fp32_inputs_too_if_ex2_of_nearly_nothing_is_1(model):
    if model is not ptx.EXACT:
        pytest.skip("promised under the exact model only")
    x = structured_sample(torch.float32)
    assert not different(kernels.sigmoid.sigmoid_forward(x), run_aten("sigmoid", model, x)).any()


def test_millions_of_fp32_inputs(model):
    """A third of any bits, a third all over the range in which σ varies, a third of every size a network has."""
    generator = torch.Generator().manual_seed(7)
    chunk = 1 << 19
    for _ in range(0, N_RANDOM if model == "exact" else N_RANDOM_OF_OTHERS, 3 * chunk):
        x = torch.randint(-(2**31), 2**31, (chunk,), generator=generator).to(torch.int32).view(torch.float32)
        assert_equal(x, model)
        assert_equal(torch.rand(chunk, generator=generator) * 210 - 105, model)
        sizes = torch.exp2(torch.rand(chunk, generator=generator) * 10 - 5)
        assert_equal(torch.randn(chunk, generator=generator) * sizes, model)


def test_fp64(model):
    x = torch.cat([structured_sample(torch.float64)[::3], random_patterns(torch.float64), torch.randn(30_000).double() * 8])
    assert_equal(x, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_from_the_output(dtype, model):
    if model is not ptx.EXACT:
        pytest.skip("no approximate instruction takes part")
    generator = torch.Generator().manual_seed(1)
    sigma = torch.sigmoid(structured_sample(dtype))
    sizes = torch.exp2(torch.randint(-40, 40, sigma.shape, generator=generator).double())
    grad = (torch.randn(sigma.shape, generator=generator, dtype=torch.float64) * sizes).to(dtype)
    ours = kernels.sigmoid.sigmoid_backward(grad, sigma, from_input=False)
    assert not different(ours, run_aten("sigmoid_backward", model, grad, sigma)).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_machine_agrees_with_torch_on_atens_formula(dtype, model):
    """Else the comparisons above might compare two wrong things."""
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64).to(dtype)
    theirs = run_aten("sigmoid", model, x)
    true = torch.sigmoid(x.double())
    assert (ulp_error(theirs, true) <= FORWARD[dtype] + (model is not ptx.EXACT and dtype is torch.float32) * 2).all()
