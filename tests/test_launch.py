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
from benchmarks.measure import stub
from torch_sigmoid import autograd, dispatch, kernels

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


@pytest.mark.skipif(kernels.INTERPRETED, reason="compiles; the interpreter does not")
@pytest.mark.parametrize("check", CHECKS)
def test_kept_launches(check):
    assert failures()[check] is None, failures()[check]


@pytest.fixture
def below(kernels):
    """`torch_below`, restored."""
    before = torch_sigmoid.torch_below()
    yield torch_sigmoid.torch_below
    torch_sigmoid.torch_below(before)
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
    shipped = dispatch.TORCH_BELOW_ON_NVIDIA

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

    large = torch.empty(shipped, device=device)
    assert (torch_sigmoid.path(large[1:]).name, torch_sigmoid.path(large).name) == ("torch", "triton")
    below(x.numel())
    sigma = torch_sigmoid.sigmoid(x)
    assert kernels.n_launches == before + 1
    torch.testing.assert_close(sigma, torch.sigmoid(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_derivatives_from_the_output_are_torchs_bit_for_bit(dtype, device):
    """Else a derivative would depend on which side of `torch_below` its tensor lies: N4."""
    if not runs_kernels(device):
        pytest.skip("states what the kernels do")
    sigma = torch.sigmoid(random((4099,), dtype, device))
    grad, outer = random((4099,), dtype, device, seed=1), random((4099,), dtype, device, seed=2)
    expected = torch.ops.aten.sigmoid_backward(grad, sigma)
    assert torch.equal(autograd.sigmoid_gradient(grad, sigma, "output"), expected)

    grad.requires_grad_()
    sigma.requires_grad_()
    expected = torch.autograd.grad(torch.ops.aten.sigmoid_backward(grad, sigma), (grad, sigma), outer)
    actual = autograd.sigmoid_second_gradients(outer, grad.detach(), sigma.detach(), "output")
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def test_warmup_refuses_what_has_no_kernels(device):
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        torch_sigmoid.warmup(device, [torch.float32, torch.int64])
    assert torch_sigmoid.warmup(device, [torch.float32]) is None
    assert torch_sigmoid.warmup(dtypes=[]) is None


@pytest.mark.skipif(bool(kernels.UNAVAILABLE), reason="without Triton there are no launchers")
def test_no_cache_of_the_kernels_grows_without_bound():
    """Each alpha and limit of a gate, and each shape, is an entry."""
    modules = [module for name, module in sys.modules.items() if name.startswith("torch_sigmoid.kernels.")]
    caches = {function for module in modules for function in vars(module).values() if hasattr(function, "cache_info")}
    assert caches
    assert [function.__name__ for function in caches if function.cache_info().maxsize is None] == []


def test_a_gate_whose_launchers_were_dropped_computes_as_before(device):
    x = random((33,), torch.float32, device)
    before = torch_sigmoid.swiglu(x, x, alpha=1.5)
    if not kernels.UNAVAILABLE:
        kernels.gates.gate_launchers.cache_clear()
    assert torch.equal(torch_sigmoid.swiglu(x, x, alpha=1.5), before)


@pytest.fixture
def refusal(monkeypatch):
    """`dispatch.kernels_refusal` of an installation with Triton, without its interpreter."""
    monkeypatch.setattr(kernels, "UNAVAILABLE", None)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    return lambda device: dispatch.kernels_refusal.__wrapped__(torch.device(device))


@pytest.mark.parametrize("kind", ["cpu", "mps", "meta"])
def test_devices_without_kernels_are_named(kind, refusal):
    assert refusal(kind) == f"Triton has no kernels for device type '{kind}'"


def test_kernels_run_on_nvidia_from_turing_on_and_on_every_amd_and_intel_gpu(refusal, monkeypatch):
    capability = (7, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "(7, 0) is below" in refusal("cuda")
    assert refusal("xpu") is None
    # Under HIP the numbers count AMD's architectures, which NVIDIA's minimum says nothing of.
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert refusal("cuda") is None
    monkeypatch.setattr(torch.version, "hip", None)
    capability = (7, 5)
    assert refusal("cuda") is None


def test_the_interpreter_takes_tensors_of_every_device_that_kernels_have(refusal, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS_EXIST", True)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "KERNELS_EXIST", True)
    assert [refusal(kind) for kind in ("cpu", "cuda", "xpu")] == [None] * 3
    assert refusal("mps") == "Triton has no kernels for device type 'mps'"


@pytest.mark.skipif(not hasattr(torch.Tensor, "const_data_ptr"), reason="this torch has no way to read without copying")
@pytest.mark.parametrize("offset", [0, 3])
def test_reading_copies_nothing_of_a_tensor_that_is_copied_when_written(offset, device):
    """`torch._lazy_clone` shares memory until somebody writes; `data_ptr()` counts as writing."""
    source = random((103,), torch.float32, device)[offset:]
    x, grad, target = (torch._lazy_clone(source) for _ in range(3))
    x.requires_grad_()
    shared = [x, grad, target]
    results = [torch_sigmoid.sigmoid(x, save="input"), torch_sigmoid.silu(x), torch_sigmoid.swiglu(x, grad)]
    results += [torch_sigmoid.binary_cross_entropy_with_logits(x, target, reduction="none")]
    gradients = [torch.autograd.grad(result, x, grad)[0] for result in results]
    assert all(map(torch._C._is_cow_tensor, shared))

    plain = source.clone().requires_grad_()
    expected = [torch_sigmoid.sigmoid(plain, save="input"), torch_sigmoid.silu(plain), torch_sigmoid.swiglu(plain, source)]
    expected += [torch_sigmoid.binary_cross_entropy_with_logits(plain, source, reduction="none")]
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, gradients, [torch.autograd.grad(result, plain, source)[0] for result in expected]))

    before = source.clone()
    torch_sigmoid.sigmoid_(grad)
    torch_sigmoid.silu(target, inplace=True)
    assert not torch._C._is_cow_tensor(grad)
    assert not torch._C._is_cow_tensor(target)
    assert torch.equal(source, before)
