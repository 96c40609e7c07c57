"""The fp32 claims of kernels/maths.py and the public docstrings follow from tests/bounds.py, hold, and are tight."""

import bounds
import numpy as np
import pytest
import torch
from bounds import CLAIMS, EXP_OF_EX2, OF_NUMPY, Arithmetic, claim_of_loss
from reference import interpreted, runs_kernels

import torch_sigmoid as ts
from torch_sigmoid import ops

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.0, 3.7, 4.0]
TARGETS = [0.0, 1.0, 0.25, 0.9, 1e-3]
# Below it a product with the residual of a quotient, or the result, is subnormal.
NORMAL = 2.0**-119


def numbers():
    """Where tails change their binade errors weigh most, so dense; both signs, and around the zero of silu'."""
    x = np.concatenate([np.linspace(0, 82, 20_001), np.linspace(0, 4, 5_001), np.log(2) * np.arange(1, 118) + 1e-4])
    x = np.concatenate([x, -x, np.linspace(-1.3, -1.2, 501)])
    return torch.from_numpy(x).float()


def arithmetics(device, ex2_ulps=0):
    """What derives the claims, and what this device computes with: an emulated GPU's ex2 may be off by `ex2_ulps`."""
    if interpreted(device):
        return Arithmetic(), Arithmetic(**OF_NUMPY)
    return Arithmetic(), Arithmetic(EXP_OF_EX2[ex2_ulps] if executes_ptx(device) else bounds.EXP)


def executes_ptx(device):
    return runs_kernels(device) and device == "cpu" and not interpreted(device)


def judged(actual, bounded, terms, x, claim, device):
    """Errors are within what is derived for each x; the largest derived one is within the claim, and over half of it."""
    claimed, machine = arithmetics(device)
    counted = terms > NORMAL
    scale = bounds.ulp(terms)
    derived = (claimed.total_error(bounded(claimed), x) / scale)[counted]
    assert derived.max() <= claim
    assert derived.max() > 0.5 * claim, "state the smaller bound"
    error = np.abs(actual - bounded(machine).value)
    if runs_kernels(device):
        assert (error <= machine.total_error(bounded(machine), x) + 1e-14 * terms)[counted].all()
    else:
        # Formulas in torch operators differ in their last roundings.
        assert ((error / scale)[counted] <= claim).all()


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    output = function(x)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


def wide(tensor):
    return tensor.detach().cpu().double().numpy()


@pytest.mark.parametrize("order", [0, 1], ids=["value", "gradient"])
@pytest.mark.parametrize("function", ["sigmoid", "silu", "logsigmoid"])
def test_functions_of_one_number(function, order, device):
    x = numbers()
    operators = {"sigmoid": lambda x: ts.sigmoid(x, save="input"), "silu": ts.silu, "logsigmoid": ts.logsigmoid}
    actual = wide(value_and_gradient(operators[function], x.to(device))[order])
    x = wide(x)

    def bounded(arithmetic):
        if (function, order) == ("sigmoid", 0):
            return bounds.sigmoid(arithmetic, x)
        return bounds.weighted(arithmetic, x, function, order)

    terms = np.abs(bounded(Arithmetic()).value)
    if (function, order) == ("silu", 1):
        terms = (1 + np.abs(x) / (1 + np.exp(x))) / (1 + np.exp(-x))
    judged(actual, bounded, terms, x, CLAIMS[function, order], device)


@pytest.mark.parametrize("order", [0, 1], ids=["value", "gradient"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_losses(gamma, order, device):
    x = numbers()[::3]
    t = torch.tensor(TARGETS).repeat_interleave(len(x))
    x = x.repeat(len(TARGETS))

    def loss(x):
        if gamma:
            return ts.sigmoid_focal_loss(x, t.to(x), -1, gamma)
        return ts.binary_cross_entropy_with_logits(x, t.to(x), reduction="none")

    actual = wide(value_and_gradient(loss, x.to(device))[order])
    x, t = wide(x), wide(t)
    p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    u, entropy = t * q + (1 - t) * p, t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)
    terms = u**gamma * (entropy if order == 0 else (1 - t) * p + t * q + gamma * entropy * np.abs(1 - 2 * t) * p * q / u)
    judged(
        actual, lambda arithmetic: bounds.weighted_loss(arithmetic, x, t, gamma, order), terms, x, claim_of_loss(gamma), device
    )


def test_clamped_swiglu(device):
    """With the roundings of α and of α·g made good within 6 ulp, else each costs up to |α·g| ulp more."""
    g = torch.linspace(-46, 6.9, 40_001)
    up = torch.zeros_like(g)
    value, to_gate = value_and_gradient(lambda g: ts.swiglu(g, up.to(g), alpha=1.702, limit=7.0), g.to(device))
    x = wide(g)
    z = 1.702 * x
    sigma, complement = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    # The product is made good where there is a fused multiply-add.
    lost = 0.0 if runs_kernels(device) and not interpreted(device) else 2 * np.abs(z)
    for actual, exact, terms in (
        (value, x * sigma, np.abs(x) * sigma),
        (to_gate, sigma * (1 + z * complement), sigma * (1 + np.abs(z) * complement)),
    ):
        error = np.abs(wide(actual) - exact) / bounds.ulp(terms)
        assert (error <= 6 + lost).all()


def test_the_second_derivative_of_sigmoid_in_fp32(device):
    """To grad_output: v·σ' within 5 ulp; to x: v·d·σ" within 8, around the zero of σ" too, where 1 - 2σ cancels."""
    if not runs_kernels(device) or interpreted(device):
        pytest.skip("needs the machine's own arithmetic")
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.logspace(-37, 0, 2_001), torch.tensor([1e-38, -1e-40, 1e-44])])
    v, d = torch.full_like(x, 1.5), torch.full_like(x, 1e6)
    to_grad_output, to_x = ops.sigmoid_double_backward(v.to(device), d.to(device), x.to(device), "input")
    wide_x = wide(x)
    e = np.exp(-np.abs(wide_x))
    slope = 1.5 * e / (1 + e) ** 2
    for actual, exact, allowed in ((to_grad_output, slope, 5.0), (to_x, -1e6 * slope * np.tanh(wide_x / 2), 8.0)):
        normal = np.abs(exact) > 2.0**-126
        error = (np.abs(wide(actual) - exact) / bounds.ulp(exact))[normal]
        assert error.max() <= allowed
        assert error.max() > 0.3 * allowed
