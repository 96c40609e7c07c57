"""N2, N3, N5: the values of the gradients, first and second."""

import pytest
import torch
from reference import (
    FLOATS,
    FROM_INPUT,
    NORMAL_RANGE,
    ROUNDED_ONCE,
    SIXTEEN_BIT,
    all_patterns,
    allowance,
    derivative,
    derivative_of_all_patterns,
    gradient,
    is_normal,
    random,
    readable,
    runs_kernels,
    sample,
    second_derivative,
    ulp_error,
)

import torch_sigmoid
from torch_sigmoid import autograd

pytestmark = [pytest.mark.ways("ptx"), pytest.mark.usefixtures("poisoned_allocations")]


def from_input(x):
    return torch_sigmoid.sigmoid(x, save="input")


def finite_unit_interval(dtype):
    """Every σ that a 16-bit dtype can hold."""
    patterns = all_patterns(dtype)
    return patterns[(patterns >= 0) & (patterns <= 1)]


def errors_from_output(dtype, device):
    """Errors in ulp of the backward from σ, over every σ of the dtype times several gradients, against exact arithmetic."""
    sigma = finite_unit_interval(dtype).repeat(8)
    grad = random(sigma.shape, dtype, seed=1)
    actual = autograd.sigmoid_gradient(grad.to(device), sigma.to(device), "output")
    # 11-bit factors: the product of the three is exact in float64 but for σ too small to matter in 1 - σ.
    exact = grad.double() * sigma.double() * (1 - sigma.double())
    return ulp_error(actual, exact)[is_normal(exact, dtype) & readable(sigma, device)]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_from_the_output_sixteen_bit_gradients_are_rounded_once(dtype, device):
    worst = errors_from_output(dtype, device).max()
    assert worst <= ROUNDED_ONCE + allowance(dtype, device)
    assert worst > 0.499, "no rounding could reach less than half an ulp: the measurement is at fault"


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_through_autograd_too(dtype, device):
    x = all_patterns(dtype)
    x = x[x.abs() < 20].to(device)
    grad = random(x.shape, dtype, device, seed=2)
    sigma = torch_sigmoid.sigmoid(x).cpu().double()
    exact = grad.cpu().double() * sigma * (1 - sigma)
    error = ulp_error(gradient(torch_sigmoid.sigmoid, x, grad), exact)[is_normal(exact, dtype)]
    assert error.max() <= ROUNDED_ONCE + allowance(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_the_output_fp32_and_fp64_gradients_are_torchs_bit_for_bit(dtype, device):
    sigma = torch.sigmoid(sample(dtype)).to(device)
    grad = random(sigma.shape, dtype, device, seed=3, scale=100)
    ours = autograd.sigmoid_gradient(grad, sigma, "output")
    torchs = torch.ops.aten.sigmoid_backward(grad, sigma)
    assert torch.equal(ours.nan_to_num(7.0), torchs.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_from_the_input_every_sixteen_bit_gradient_is_the_true_derivative(dtype, device):
    x = all_patterns(dtype)
    exact = derivative_of_all_patterns(dtype)
    judged = x.isfinite() & is_normal(exact, dtype)
    actual = gradient(from_input, x.to(device))
    assert (actual.cpu()[judged] != 0).all()
    worst = ulp_error(actual, exact)[judged].max()
    assert worst <= FROM_INPUT[dtype] + allowance(dtype, device)
    # Half an ulp is lost by rounding alone, so the bound of one ulp has no factor of two to give away.
    assert worst > 0.499


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_the_input_wide_gradients_are_the_true_derivative(dtype, device):
    x = sample(dtype)
    x = x[x.abs() < NORMAL_RANGE[dtype]]
    exact = derivative(x)
    actual = gradient(from_input, x.to(device))
    assert (actual != 0).all()
    error = ulp_error(actual, exact)
    assert error.max() <= FROM_INPUT[dtype]
    assert error.max() > 1.0, "within one ulp everywhere: state the smaller bound"


@pytest.mark.parametrize(
    ("dtype", "lost_from"), [(torch.bfloat16, 6.25), (torch.float16, 8.33), (torch.float32, 17.33)], ids=str
)
def test_where_torch_loses_the_gradient_from_the_input_does_not(dtype, lost_from, device):
    x = torch.tensor([lost_from, lost_from + 1], dtype=dtype, device=device)
    assert (gradient(torch.sigmoid, x) == 0).all()
    ours = gradient(from_input, x)
    assert ulp_error(ours, derivative(x.cpu())).max() <= FROM_INPUT[dtype] + allowance(dtype, device)


def test_bf16_at_eight_has_the_true_derivative(device):
    x = torch.tensor(8.0, dtype=torch.bfloat16, device=device)
    assert gradient(torch.sigmoid, x) == 0
    exact = derivative(x.cpu())
    assert ulp_error(gradient(from_input, x), exact) <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_at_nan_and_infinity(dtype, device, save):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype, device=device)
    grad = gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x)
    assert grad[0].isnan()
    assert grad[1:].tolist() == [0.0, 0.0]
    nan_upstream = gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), torch.zeros(1, dtype=dtype, device=device), x[:1])
    assert nan_upstream.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_scales_exactly_with_its_upstream_gradient(dtype, device, save):
    """Loss scaling multiplies by powers of two and must not change a digit."""
    x = random((1000,), dtype, device)
    function = lambda x: torch_sigmoid.sigmoid(x, save=save)  # noqa: E731
    one = gradient(function, x, torch.ones_like(x))
    assert torch.equal(gradient(function, x, torch.full_like(x, 8.0)), one * 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_second_derivative(dtype, device, save):
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64).to(dtype)
    v, g = random(x.shape, dtype, seed=4), random(x.shape, dtype, seed=5)
    if save == "input":
        saved, slope, curvature = x, derivative(x), second_derivative(x)
    else:
        saved = torch.sigmoid(x)
        wide = saved.double()
        slope, curvature = wide * (1 - wide), 1 - 2 * wide
    to_grad, to_saved = autograd.sigmoid_second_gradients(v.to(device), g.to(device), saved.to(device), save)
    curvature = v.double() * g.double() * curvature
    # Each is a product of at most five factors in fp32 or fp64, each within 4 ulp, rounded once.
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps * (0.5 + allowance(dtype, device))
    scale = (v.double() * g.double()).abs()
    tolerance = 16 * eps + (rounding if dtype in SIXTEEN_BIT else 0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((to_grad.cpu().double() - v.double() * slope).abs() <= tolerance * (v.double() * slope).abs() + smallest).all()
    # 1 - 2σ cancels near x = 0: its error is relative to the factor 1, not to the result.
    cancellation = 16 * eps * scale * (slope if save == "input" else 1)
    error = (to_saved.cpu().double() - curvature).abs()
    assert (error <= tolerance * curvature.abs() + cancellation + smallest).all()


def test_the_torch_form_has_the_kernels_values(device):
    """One contract, two implementations: from σ, fp32 agrees to the last bit; from x, the tail is written in two ways."""
    if not runs_kernels(device) or device != "cuda":
        pytest.skip("needs a device on which both run with the same exponential")
    x, g = (random((4099,), torch.float32, device, seed) for seed in range(2))
    for save, saved, tolerance in (("output", torch.sigmoid(x), 0), ("input", x, 8 * torch.finfo(torch.float32).eps)):
        kernel = autograd.sigmoid_gradient(g, saved, save)
        formula = autograd.sigmoid_gradient_formula(g, saved, save)
        torch.testing.assert_close(kernel, formula, rtol=tolerance, atol=0)
