"""What is measured: one row an operator, and the providers it is measured against.

An operator is a function of one tensor here; `exact` is its value and derivative in float64, which every provider must meet
before it is timed. `forward_tensors` and `backward_tensors` count the reads and writes of one element that no implementation
can avoid.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import torch_sigmoid
from torch_sigmoid import kernels

# Of the largest relative error that lets a provider be timed: a few roundings of the dtype, and torch's own lost tails.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


class Provider(NamedTuple):
    function: Callable[[Tensor], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")


class Operator(NamedTuple):
    exact: Callable[[Tensor], tuple[Tensor, Tensor]]
    providers: dict[str, Provider]
    baseline: str
    forward_tensors: int
    backward_tensors: int


def exact_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)


def _naive():
    """The Function on a Triton kernel that tutorials teach: contiguous tensors, `kernel[grid]`, one mask for all lanes."""
    import triton

    from .naive import sigmoid_backward_kernel, sigmoid_forward_kernel

    class NaiveSigmoid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x = x.contiguous()
            y = torch.empty_like(x)
            sigmoid_forward_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK_SIZE=1024)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad_output):
            (y,) = ctx.saved_tensors
            grad_output = grad_output.contiguous()
            grad_input = torch.empty_like(y)
            sigmoid_backward_kernel[(triton.cdiv(y.numel(), 1024),)](grad_output, y, grad_input, y.numel(), BLOCK_SIZE=1024)
            return grad_input

    return NaiveSigmoid.apply


def providers() -> dict[str, Provider]:
    table = {
        "torch": Provider(torch.nn.Sigmoid()),
        "torch.compile": Provider(torch.compile(torch.sigmoid, dynamic=False), ("cuda",)),
        "ours, output": Provider(torch_sigmoid.Sigmoid()),
        "ours, input": Provider(torch_sigmoid.Sigmoid(save="input")),
    }
    if not kernels.UNAVAILABLE and not kernels.INTERPRETED:
        table["naive Triton"] = Provider(_naive(), ("cuda",))
    return table


@functools.cache
def operators() -> dict[str, Operator]:
    return {"sigmoid": Operator(exact_sigmoid, providers(), "torch", forward_tensors=2, backward_tensors=3)}
