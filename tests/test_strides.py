"""Any strides at all, drawn at random: the same values."""

import pytest
import torch
from reference import assert_near, random

import torch_sigmoid
from torch_sigmoid import autograd

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@st.composite
def strided_tensors(draw):
    """A shape, strides without overlap or with expanded dimensions, in any dimension order, and a storage offset."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    order = draw(st.permutations(range(len(sizes))))
    strides, extent = [0] * len(sizes), 1
    for dim in order:
        gap = draw(st.integers(1, 3))
        if draw(st.booleans()) or sizes[dim] < 2:
            strides[dim] = extent * gap
            extent = strides[dim] * max(sizes[dim], 1)
        else:
            strides[dim] = 0
    return sizes, strides, draw(st.integers(0, 17))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x_layout=strided_tensors(), grad_gap=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_strides(device, x_layout, grad_gap, dtype):
    sizes, strides, offset = x_layout
    extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides) if size)
    x = random((max(extent, 1),), dtype, device).as_strided(sizes, strides, offset)
    grad = random((*sizes, grad_gap), dtype, device, seed=1)[..., 0]
    assert_near(torch_sigmoid.sigmoid(x), torch.sigmoid(x.double()), dtype)
    slope = torch.sigmoid(x.double()) * torch.sigmoid(-x.double())
    assert_near(autograd.sigmoid_gradient(grad, x, "input"), grad.double() * slope, dtype)
