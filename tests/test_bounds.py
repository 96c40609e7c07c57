"""The fp32 claims of kernels/maths.py and the public docstrings follow from tests/bounds.py, hold, and are tight."""

import contextlib

import bounds
import numpy as np
import pytest
import torch
from bounds import CLAIMS, EXP_OF_EX2, OF_NUMPY, Arithmetic, claim_of_loss
from reference import interpreted, runs_kernels

import torch_sigmoid as ts
from torch_sigmoid import autograd

pytestmark = pytest.mark.ways("ptx")

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.0, 3.7, 4.0]
TARGETS = [0.0, 1.0, 0.25, 0.9, 1e-3]
# Below it a product with the residual of a quotient, or the result, is subnormal.
NORMAL = 2.0**-119


def numbers():
    """Where tails change their binade errors weigh most, so dense; both signs, and around the zero of silu'."""
    x = np.concatenate([np.linspace(0, 82, 20_001), np.linspace(0, 4, 5_001), np.log(2) * np.arange(1, 118) + 1e-4])
    x = np.concatenate([x, -x, np.linspace(-1.3, -1.2, 501)])
    return torch.from_numpy(x).float()


def ulps_of_ex2(model):
    """By how much a model of the approximate instructions lets ex2.approx be off; None is a device's own, within expf's ulp."""
    if model is None:
        return 0
    return 1 if model.one_ulp else 2 * (model.part is not None)


def machine(model, device):
    """The arithmetic that kernels on this device have."""
    if interpreted(device):
        return Arithmetic(**OF_NUMPY)
    return Arithmetic() if model is None else Arithmetic(EXP_OF_EX2[ulps_of_ex2(model)])


def judged(compute, bounded, terms, x, claim, device, kernels):
    """What is derived is within the claim, and over half of it; errors are within what is derived for each x, and over half.

    `compute` runs under every model of the approximate instructions, if there are any.
    """
    counted = terms > NORMAL
    scale = bounds.ulp(terms)
    derived = (Arithmetic().total_error(bounded(Arithmetic()), x) / scale)[counted]
    assert derived.max() <= claim
    assert derived.max() > 0.5 * claim, "state the smaller bound"
    reached = 0.0
    with contextlib.closing(kernels.models()) as models:
        for model in models:
            arithmetic = machine(model, device)
            result = bounded(arithmetic)
            error = np.abs(compute() - result.value)
            if not runs_kernels(device):
                # Formulas in torch operators differ in their last roundings.
                assert ((error / scale)[counted] <= claim).all()
                return
            allowed = arithmetic.total_error(result, x) + 1e-14 * terms
            assert (error <= allowed)[counted].all(), f"{model}: {(error / allowed)[counted].max():.2f} of what is derived"
            reached = max(reached, (error / allowed)[counted].max())
    assert reached > 0.5, f"{reached:.2f} of the bound is all that the worst case reaches: derive a smaller one"


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    output = function(x)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


def wide(tensor):
    return tensor.detach().cpu().double().numpy()


@pytest.mark.parametrize("order", [0, 1], ids=["value", "gradient"])
@pytest.mark.parametrize("function", ["sigmoid", "silu", "logsigmoid"])
def test_functions_of_one_number(function, order, device, kernels):
    logits = numbers().to(device)
    operators = {"sigmoid": lambda x: ts.sigmoid(x, save="input"), "silu": ts.silu, "logsigmoid": ts.logsigmoid}
    x = wide(logits)

    def compute():
        return wide(value_and_gradient(operators[function], logits)[order])

    def bounded(arithmetic):
        if (function, order) == ("sigmoid", 0):
            return bounds.sigmoid(arithmetic, x)
        return bounds.weighted(arithmetic, x, function, order)

    terms = np.abs(bounded(Arithmetic()).value)
    if (function, order) == ("silu", 1):
        terms = (1 + np.abs(x) / (1 + np.exp(x))) / (1 + np.exp(-x))
    judged(compute, bounded, terms, x, CLAIMS[function, order], device, kernels)


@pytest.mark.parametrize("order", [0, 1], ids=["value", "gradient"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_losses(gamma, order, device, kernels):
    logits = numbers()[::11]
    targets = torch.tensor(TARGETS).repeat_interleave(len(logits)).to(device)
    logits = logits.repeat(len(TARGETS)).to(device)

    def loss(x):
        if gamma:
            return ts.sigmoid_focal_loss(x, targets, -1, gamma)
        return ts.binary_cross_entropy_with_logits(x, targets, reduction="none")

    def compute():
        return wide(value_and_gradient(loss, logits)[order])

    x, t = wide(logits), wide(targets)
    p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    u, entropy = t * q + (1 - t) * p, t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)
    terms = u**gamma * (entropy if order == 0 else (1 - t) * p + t * q + gamma * entropy * np.abs(1 - 2 * t) * p * q / u)

    def bounded(arithmetic):
        return bounds.weighted_loss(arithmetic, x, t, gamma, order)

    judged(compute, bounded, terms, x, claim_of_loss(gamma), device, kernels)


def test_clamped_swiglu(device, model):
    """With the roundings of α and of α·g made good within 6 ulp, else each costs up to |α·g| ulp more.

    An ulp of ex2 costs one of the value, and of the gradient where it is largest.
    """
    g = torch.linspace(-46, 6.9, 40_001)
    up = torch.zeros_like(g)
    value, to_gate = value_and_gradient(lambda g: ts.swiglu(g, up.to(g), alpha=1.702, limit=7.0, up_offset=1.0), g.to(device))
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
        assert (error <= 6 + 2 * ulps_of_ex2(model) + lost).all()


def test_the_second_derivative_of_sigmoid_in_fp32(device, model):
    """To grad_output: v·σ' within 5 ulp; to x: v·d·σ" within 8, around the zero of σ" too, where 1 - 2σ cancels.

    An ulp of ex2 costs up to two.
    """
    if not runs_kernels(device) or interpreted(device):
        pytest.skip("needs the machine's own arithmetic")
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.logspace(-37, 0, 2_001), torch.tensor([1e-38, -1e-40, 1e-44])])
    v, d = torch.full_like(x, 1.5), torch.full_like(x, 1e6)
    to_grad_output, to_x = autograd.sigmoid_second_gradients(v.to(device), d.to(device), x.to(device), "input")
    wide_x = wide(x)
    e = np.exp(-np.abs(wide_x))
    slope = 1.5 * e / (1 + e) ** 2
    for actual, exact, allowed in ((to_grad_output, slope, 5.0), (to_x, -1e6 * slope * np.tanh(wide_x / 2), 8.0)):
        normal = np.abs(exact) > 2.0**-126
        error = (np.abs(wide(actual) - exact) / bounds.ulp(exact))[normal]
        assert error.max() <= allowed + 2 * ulps_of_ex2(model)
        assert error.max() > 0.3 * allowed
