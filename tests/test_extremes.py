"""N3 for every upstream gradient: no product overflows, or loses its digits, on the way to a result that is a normal number."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import interpreted, is_normal, runs_kernels, ulp

import torch_sigmoid as ts
from torch_sigmoid import autograd
from torch_sigmoid.gates import Unary
from torch_sigmoid.losses import Loss

pytestmark = pytest.mark.ways("ptx")

mpmath = pytest.importorskip("mpmath")
UPSTREAM = [3e38, 1e30, 1.0, 1e-30, 1.2e-38]
DISTANCES = [1e-41, 1e-38, 1e-30, 1e-5, 0.3, 1.2784645, 2.0, 5.5, 17.0, 30.0, 58.25, 66.0, 75.0, 80.5, 82.0, 87.0, 89.0]
NUMBERS = [sign * y for y in (*DISTANCES, 103.0, 120.0, 145.0, 160.0) for sign in (1, -1)]


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def derivatives(function, x):
    """Value, first and second derivative in mpmath's numbers, and the sizes of the terms of each."""
    p, q = sigma(x), sigma(-x)
    t = mpmath.tanh(x / 2)
    if function == "sigmoid":
        results = p, p * q, -p * q * t
    elif function == "logsigmoid":
        results = mpmath.log(p), q, -p * q
    else:
        results = x * p, p * (1 + x * q), p * q * (2 - x * t)
        return results, (abs(x) * p, p * (1 + abs(x) * q), p * q * (2 + abs(x * t)))
    return results, [abs(each) for each in results]


def loss_derivatives(x, positive, gamma):
    """For a target of 0 or 1, by z, the logit's side: ℓ = c·u^γ with u = σ(z), c = log(1 + e^z)."""
    sign = -1 if positive else 1
    z = sign * x
    u, w = sigma(z), sigma(-z)
    c, g = mpmath.log1p(mpmath.exp(z)) if z < 30 else z + mpmath.log1p(mpmath.exp(-z)), mpmath.mpf(gamma)
    power = u**g
    first = u, g * c * w
    second = u * w, 2 * g * u * w, g * g * c * w * w, -g * c * u * w
    results = c * power, sign * sum(first) * power, sum(second) * power
    return results, (results[0], sum(first) * power, sum(map(abs, second)) * power)


def check(actual, upstream, x, of, order, dtype, allowed):
    with mpmath.workdps(50):
        pairs = [(mpmath.mpf(v), *of(mpmath.mpf(number))) for v, number in zip(upstream.tolist(), x.tolist())]
        exact = torch.tensor([float(v * results[order]) for v, results, _ in pairs], dtype=torch.float64)
        terms = torch.tensor([float(abs(v) * terms[order]) for v, _, terms in pairs], dtype=torch.float64)
    # 1/16 more than the smallest: results that a rounding may make subnormal are not judged.
    normal = is_normal(exact, dtype) & (exact.abs() > 1.07 * torch.finfo(dtype).smallest_normal)
    error = ((actual.cpu().double() - exact).abs() / ulp(torch.maximum(exact.abs(), terms), dtype))[normal]
    worst = error.nan_to_num(math.inf).argmax()
    place = f"x = {x[normal][worst]}, upstream {upstream[normal][worst]}: {actual[normal][worst]}, not {exact[normal][worst]}"
    assert error[worst] <= allowed, place


def grid(dtype, device):
    x = torch.tensor(NUMBERS, dtype=torch.float64).to(dtype)
    v = torch.tensor(UPSTREAM, dtype=torch.float64).to(dtype)
    x, v = x.repeat(len(v)), v.repeat_interleave(len(x))
    if interpreted(device) and dtype is torch.bfloat16:
        # The interpreter misreads bf16's subnormal numbers.
        smallest = torch.finfo(dtype).smallest_normal
        readable = (x.abs() >= smallest) & (v.abs() >= smallest)
        x, v = x[readable], v[readable]
    return x, v


def allowance(dtype, device, in_fp32):
    if dtype is torch.float32:
        return in_fp32
    return 1.5 if interpreted(device) else 0.6


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["sigmoid", "silu", "logsigmoid"])
def test_gradients_of_one_number(function, dtype, device):
    x, v = grid(dtype, device)
    if function == "sigmoid":
        if not runs_kernels(device):
            pytest.skip("torch's own backward from σ(-|x|)")
        first = autograd.sigmoid_gradient(v.to(device), x.to(device), "input")
        of_v, second = autograd.sigmoid_second_gradients(v.to(device), torch.ones_like(v).to(device), x.to(device), "input")
    else:
        operator = Unary(function)
        (first,) = operator.backward(v.to(device), x.to(device))
        of_v, second = operator.double_backward((v.to(device),), torch.ones_like(v).to(device), x.to(device))
    allowed = allowance(dtype, device, 8.0)
    of = lambda x: derivatives(function, x)  # noqa: E731
    check(first, v, x, of, 1, dtype, allowed)
    check(of_v, v, x, of, 1, dtype, allowed)
    if not (function == "sigmoid" and interpreted(device)):  # which has no tanh
        check(second, v, x, of, 2, dtype, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["sigmoid", "silu"])
def test_gates(function, dtype, device):
    """The gradient of the operand is v·h(g): that of a subnormal gate is a normal number for a v of 1e30."""
    x, v = grid(dtype, device)
    if not runs_kernels(device) and dtype is torch.float32:
        # Torch's own silu rounds x/2 among the subnormals.
        x, v = x[x.abs() > 1e-37], v[x.abs() > 1e-37]
    gate, one = x.to(device).requires_grad_(), torch.ones_like(x).to(device).requires_grad_()
    output = ts.sigmoid_gate(one, gate) if function == "sigmoid" else ts.swiglu(gate, one)
    to_gate, to_operand = torch.autograd.grad(output, (gate, one), v.to(device))
    of = lambda x: derivatives(function, x)  # noqa: E731
    check(to_operand, v, x, of, 0, dtype, allowance(dtype, device, 8.0))
    check(to_gate, v, x, of, 1, dtype, allowance(dtype, device, 8.0))


@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derivatives_of_losses(gamma, dtype, order, device):
    if not runs_kernels(device):
        pytest.skip("the formulas in torch operators multiply by v first")
    x, v = grid(dtype, device)
    if gamma == 3.7:
        # A power that is no product is rounded as such, before v.
        x, v = x[v <= 1], v[v <= 1]
    loss = Loss(gamma, reduction="none")
    for positive in (0.0, 1.0):
        target, one = torch.full_like(x, positive).to(device), torch.ones_like(x).to(device)
        if order == 1:
            (actual,) = loss.backward(v.to(device), x.to(device), target, None, None, None)
        else:
            _, actual = loss.double_backward((v.to(device),), one, x.to(device), target, None, None, None)
        of = lambda x: loss_derivatives(x, positive, gamma)  # noqa: E731, B023
        check(actual, v, x, of, order, dtype, allowance(dtype, device, 12.0 * (1 + gamma)))


def test_what_the_kernels_of_bf16_losses_once_flushed(device):
    """div.approx.ftz.f32 makes 0 of a subnormal term of a normal sum."""
    if not runs_kernels(device):
        pytest.skip("the kernels' quotient")
    for gamma, number, positive in ((0.5, -58.25, 0.0), (1.0, -43.75, 0.0), (2.0, 29.25, 1.0), (3.7, -18.625, 0.0)):
        x = torch.tensor([number], dtype=torch.bfloat16)
        target = torch.full_like(x, positive).to(device)
        one = torch.ones_like(x)
        (actual,) = Loss(gamma, reduction="none").backward(one.to(device), x.to(device), target, None, None, None)
        of = lambda x: loss_derivatives(x, positive, gamma)  # noqa: E731, B023
        check(actual, one, x, of, 1, torch.bfloat16, allowance(torch.bfloat16, device, 0.0))


def test_a_gradient_near_the_largest_number_is_torchs(device):
    """3e38 times silu'(0) = 1/2: also beside a gate that is far out."""
    x = torch.tensor([0.0, 0.5, -1.0, -100.0], device=device)
    for dtype, largest in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1.5e308)):
        ours, theirs = x.to(dtype).requires_grad_(), x.double().requires_grad_()
        upstream = torch.full_like(ours, largest)
        (actual,) = torch.autograd.grad(ts.silu(ours), ours, upstream)
        (expected,) = torch.autograd.grad(F.silu(theirs) * 2.0**-4, theirs, upstream.double())
        torch.testing.assert_close(actual.double() * 2.0**-4, expected, rtol=1e-2, atol=largest * 1e-30)


def test_a_scaled_gate_near_the_largest_number_does_not_overflow(device):
    """alpha·g does, g·σ(alpha·g) does not."""
    gate = torch.tensor([3e38, -3e38, 1e38, 2.0, math.inf, -math.inf], device=device)
    for dtype in DTYPES:
        g = gate.to(dtype).requires_grad_()
        up = torch.zeros_like(g)  # to which the clamped form adds 1
        output = ts.swiglu(g, up, alpha=1.702, up_offset=1.0)
        (grad,) = torch.autograd.grad(output, g, torch.ones_like(output))
        expected = torch.where(gate < 0, 0.0, gate * torch.sigmoid(1.702 * gate.clamp(-50, 50)))
        torch.testing.assert_close(output.float(), expected.to(dtype).float() * up.new_ones(()).float(), rtol=1e-2, atol=0)
        assert grad[[0, 2, 4]].tolist() == [1, 1, 1]
        assert grad[[1, 5]].tolist() == [0, 0]


def test_a_scaled_gate_is_far_out_by_its_product(device):
    """1e30·x·σ(200·x) at x = -1/2: σ alone is subnormal."""
    gate, up = torch.tensor([-0.5], device=device), torch.tensor([1e30], device=device)
    expected = -0.5 * 1e30 * math.exp(-100)
    assert ts.swiglu(gate, up, alpha=200.0, up_offset=1.0).item() == pytest.approx(expected, rel=1e-4)


def test_an_infinite_logit_beside_near_ones_has_its_gradient(device):
    x = torch.tensor([math.inf, 1.0], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ts.silu(x).sum(), x)
    assert grad[0] == 1


@pytest.mark.parametrize("place", ["weight", "pos_weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_gives_infinite_losses(place, dtype, device):
    """Where torch's cross entropy and its gradient are infinite ours are; where torch's are NaN they may be more than that."""
    if not runs_kernels(device):
        pytest.skip("the formulas in torch operators: torch_sigmoid/losses.py")
    x = torch.tensor([60.0, -60.0, 20.0, -20.0, 1.0, -1.0, 1e-3, -1e-3, 0.0, math.inf, -math.inf], dtype=dtype)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).repeat_interleave(len(x))
    x = x.repeat(3)

    def of(function):
        logits = x.to(device).requires_grad_()
        weight = {place: torch.full_like(logits, math.inf).detach()}
        value = function(logits, t.to(device), reduction="none", **weight)
        return value.detach().cpu(), torch.autograd.grad(value.sum(), logits)[0].cpu()

    for ours, torchs in zip(of(ts.binary_cross_entropy_with_logits), of(F.binary_cross_entropy_with_logits)):
        known = ~torchs.isnan()
        assert torch.equal(ours[known], torchs[known])


def test_a_weight_of_zero_silences_an_infinite_loss(device):
    x = torch.tensor([math.inf, 2.0], device=device, requires_grad=True)
    loss = ts.binary_cross_entropy_with_logits(x, torch.zeros_like(x), torch.tensor([0.0, 1.0], device=device))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert grad[0] == 0
