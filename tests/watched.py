"""Layers and networks that the tests of GradientWatch watch, and what a watch must say of them in float64."""

import contextlib

import torch
from torch import nn

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch


def layers():
    return {
        "sigmoid": nn.Sigmoid(),
        "ours": torch_sigmoid.Sigmoid(),
        "ours from input": torch_sigmoid.Sigmoid(save="input"),
        "silu": nn.SiLU(),
        "logsigmoid": nn.LogSigmoid(),
        "glu": nn.GLU(),
        "hardsigmoid": nn.Hardsigmoid(),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "our silu": torch_sigmoid.SiLU(),
        "our logsigmoid": torch_sigmoid.LogSigmoid(),
        "our glu": torch_sigmoid.GLU(),
    }


def exact_derivative(layer, x):
    """f' of each float64 x by the formula, in a form that does not cancel; of a GLU, of its gate."""
    e = torch.exp(-x.abs())
    slope, smaller, larger = e / (1 + e) ** 2, e / (1 + e), 1 / (1 + e)
    sigma, complement = torch.where(x < 0, smaller, larger), torch.where(x < 0, larger, smaller)
    slopes = {
        nn.SiLU: sigma * (1 + x * complement),
        nn.LogSigmoid: complement,
        nn.Tanh: 4 * torch.exp(-2 * x.abs()) / (1 + torch.exp(-2 * x.abs())) ** 2,
        nn.ReLU: (x > 0).double(),
        nn.Hardsigmoid: (x.abs() < 3).double() / 6,
    }
    return next((slopes[kind] for kind in slopes if isinstance(layer, kind)), slope)


@contextlib.contextmanager
def watching(*modules, **options):
    """A watch of a network of these modules, which stays alive meanwhile."""
    network = nn.Sequential(*modules)
    with GradientWatch(network, **options) as watch:
        yield watch


def run(layer, x, grad_output=None):
    """The gradient of x."""
    x = x.clone().requires_grad_()
    output = layer(x * 1)
    return torch.autograd.grad(output, x, torch.ones_like(output) if grad_output is None else grad_output)[0]


def seen(watch, name="0"):
    """The last row of a layer."""
    layer = watch.to_dict()["layers"][name]
    return {key: value[-1] if isinstance(value, list) else value for key, value in layer.items()}


def gate_of(layer, *inputs):
    if isinstance(layer, nn.GLU):
        return inputs[0].chunk(2, layer.dim)[1]
    if isinstance(layer, torch_sigmoid.SwiGLUPacked):
        return inputs[0].chunk(2, layer.dim)[0]
    return inputs[isinstance(layer, torch_sigmoid.SigmoidGate)]


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.Sigmoid(),
        nn.Linear(16, 16),
        torch_sigmoid.Sigmoid(save="input"),
        nn.Dropout(0.1),
        nn.Linear(16, 1),
    )


def train(model, steps, device, accumulate=1, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(accumulate):
            model(torch.randn(32, 8, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
