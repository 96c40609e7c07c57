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
def below(kernels):
    """`ops.torch_below`, restored."""
    before = ops.torch_below
    yield lambda n: setattr(ops, "torch_below", n)
    ops.torch_below = before
    if kernels.ptx:
        kernels.ptx.only = None


def test_torchs_operator_takes_small_tensors_where_its_bits_are_ours(device, below, kernels):
    if not runs_kernels(device):
        pytest.skip("states what a device with kernels does")
    below(100)

    def launches(x):
        """Of a forward and a backward."""
        before = kernels.n_launches
        torch_sigmoid.sigmoid(x.requires_grad_()).sum().backward()
        return kernels.n_launches - before

    for dtype in (torch.float32, torch.float64):
        small, large = random((99,), dtype, device), random((100,), dtype, device)
        assert torch_sigmoid.path(small).name == "torch"
        assert "torch_below" in torch_sigmoid.path(small).reason
        assert torch_sigmoid.path(large).name == "triton"
        assert torch_sigmoid.path(small, save="input").name == "triton"
        assert (launches(small), launches(large)) == (0, 2)
    for dtype in (torch.float16, torch.bfloat16):
        # torch's 16-bit backward rounds more than once; its forward, which has the kernel's bits, takes less to launch.
        x = random((99,), dtype, device)
        assert torch_sigmoid.path(x).name == "triton"
        assert launches(x) == 1


def test_the_shipped_threshold(device, below, kernels):
    """Below it no kernel runs, from it on each one does, and derivatives of every order and mode agree across it."""
    if not runs_kernels(device):
        pytest.skip("states what a device with kernels does")
    shipped = ops.TORCH_BELOW_ON_NVIDIA

    def derivatives(x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(torch_sigmoid.sigmoid(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
        tangent = torch.func.jvp(torch_sigmoid.sigmoid, (x.detach(),), (torch.ones_like(x),))[1]
        return first, second, third, tangent, torch.func.vmap(torch.func.grad(torch_sigmoid.sigmoid))(x.detach())

    x = random((500,), torch.float32, device)
    by_kernels, before = derivatives(x), kernels.n_launches
    assert before > 0
    below(shipped)
    by_torch = derivatives(x)
    assert kernels.n_launches == before
    for ours, theirs in zip(by_kernels, by_torch):
        # The two σ they start from are each within 2 ulp on a CPU; on a GPU they are equal (N1).
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    x = random((shipped,), torch.float32, device)
    assert (torch_sigmoid.path(x[1:]).name, torch_sigmoid.path(x).name) == ("torch", "triton")
    if kernels.ptx:
        kernels.ptx.only = lambda n_programs: [0]
    sigma = torch_sigmoid.sigmoid(x)
    assert kernels.n_launches == before + 1
    torch.testing.assert_close(sigma[:1000], torch.sigmoid(x[:1000]))


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
