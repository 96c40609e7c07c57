"""Devices, and allocations that show a lane never written."""

import os

import pytest
import torch

import torch_sigmoid

# Two pytest workers on two cores: one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Small tensors too are meant for the kernels here; test_launch.py tests where torch's operator takes over.
torch_sigmoid.ops.torch_below = 0
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_report_header(config):
    paths = {device: torch_sigmoid.path(torch.empty(1, device=device)) for device in DEVICES}
    return [f"torch_sigmoid on {device}: {path.name} ({path.reason})" for device, path in paths.items()]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=["output", "input"])
def save(request):
    return request.param


@pytest.fixture
def poisoned_allocations(monkeypatch):
    """Fresh float memory holds NaN, so an element that a kernel leaves out cannot pass for a result."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
