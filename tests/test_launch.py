"""Launching: what is kept from one launch to the next, what must not be, and where torch's operator takes over."""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch
from reference import random, runs_kernels

import torch_sigmoid
from benchmarks import stub
from torch_sigmoid import ops

SCRIPT = pathlib.Path(__file__).with_name("stub_launches.py")
CHECKS = [line[4:-3] for line in SCRIPT.read_text().splitlines() if line.startswith("def check_")]


@functools.cache
def failures():
    """What each check of stub_launches.py found, in one process that believes to have a GPU."""
    if reason := stub.unavailable():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:
        environment = stub.environment(pathlib.Path(folder))
        environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
        completed = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.skipif(ops.kernels.INTERPRETED, reason="compiles; the interpreter does not")
@pytest.mark.parametrize("check", CHECKS)
def test_kept_launches(check):
    assert failures()[check] is None, failures()[check]


@pytest.fixture
def below():
    """`ops.torch_below`, restored."""
    before = ops.torch_below
    yield lambda n: setattr(ops, "torch_below", n)
    ops.torch_below = before


def test_torchs_operator_takes_small_tensors_where_its_bits_are_ours(device, below):
    if not runs_kernels(device):
        pytest.skip("states what a device with kernels does")
    below(100)
    for dtype in (torch.float32, torch.float64):
        small, large = random((99,), dtype, device), random((100,), dtype, device)
        assert torch_sigmoid.path(small).name == "torch"
        assert "torch_below" in torch_sigmoid.path(small).reason
        assert torch_sigmoid.path(large).name == "triton"
        assert torch_sigmoid.path(small, save="input").name == "triton"
        assert torch_sigmoid.sigmoid(small.requires_grad_()).grad_fn.name() == "SigmoidBackward0"
        assert "Eager" in torch_sigmoid.sigmoid(large.requires_grad_()).grad_fn.name()
    for dtype in (torch.float16, torch.bfloat16):
        # torch's 16-bit backward rounds more than once.
        x = random((99,), dtype, device)
        assert torch_sigmoid.path(x).name == "triton"
        assert "Eager" in torch_sigmoid.sigmoid(x.requires_grad_()).grad_fn.name()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_derivatives_from_the_output_are_torchs_bit_for_bit(dtype, device):
    """Else a derivative would depend on which side of `torch_below` its tensor lies: N4."""
    if not runs_kernels(device):
        pytest.skip("states what the kernels do")
    sigma = torch.sigmoid(random((4099,), dtype, device))
    grad, outer = random((4099,), dtype, device, seed=1), random((4099,), dtype, device, seed=2)
    expected = torch.ops.aten.sigmoid_backward(grad, sigma)
    assert torch.equal(ops.sigmoid_backward(grad, sigma, "output"), expected)

    grad.requires_grad_()
    sigma.requires_grad_()
    expected = torch.autograd.grad(torch.ops.aten.sigmoid_backward(grad, sigma), (grad, sigma), outer)
    actual = ops.sigmoid_double_backward(outer, grad.detach(), sigma.detach(), "output")
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def test_warmup_refuses_what_has_no_kernels(device):
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        torch_sigmoid.warmup(device, [torch.float32, torch.int64])
    assert torch_sigmoid.warmup(device, [torch.float32]) is None
    assert torch_sigmoid.warmup(dtypes=[]) is None
