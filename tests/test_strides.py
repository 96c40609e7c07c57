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


def extent_of(sizes, strides):
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides) if size)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x_layout=strided_tensors(), grad_gap=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_strides(device, x_layout, grad_gap, dtype):
    sizes, strides, offset = x_layout
    x = random((offset + extent_of(sizes, strides),), dtype, device).as_strided(sizes, strides, offset)
    grad = random((*sizes, grad_gap), dtype, device, seed=1)[..., 0]
    assert_near(torch_sigmoid.sigmoid(x), torch.sigmoid(x.double()), dtype)
    slope = torch.sigmoid(x.double()) * torch.sigmoid(-x.double())
    assert_near(autograd.sigmoid_gradient(grad, x, "input"), grad.double() * slope, dtype)


@st.composite
def broadcast_pairs(draw):
    """A tensor of any strides, one that broadcasts to its shape, and the gap between elements of an upstream gradient."""
    sizes, strides, offset = draw(strided_tensors())
    small = [draw(st.sampled_from([1, size])) for size in sizes]
    order = draw(st.permutations(range(len(sizes))))
    own, extent = [0] * len(sizes), 1
    for dim in order:
        # Where 0, every element is the same number, and has a gradient of its own.
        own[dim] = draw(st.sampled_from([0, extent]))
        extent = max(extent, own[dim] * max(small[dim], 1))
    return (sizes, strides, offset), (small, own, draw(st.integers(0, 3))), draw(st.integers(1, 2))


def made(layout, dtype, device, seed):
    sizes, strides, offset = layout
    return random((offset + extent_of(sizes, strides),), dtype, device, seed).as_strided(sizes, strides, offset)


def derivatives(function, tensors, upstream, outers):
    """The value, the gradients, and the gradients of the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, upstream)]
    value = function(*leaves[:-1])
    grads = torch.autograd.grad(value, leaves[:-1], leaves[-1], create_graph=True)
    return value, *grads, *torch.autograd.grad(grads, leaves, outers)


def assert_agrees_with_float64(ours, theirs, tensors, upstream, outers, dtype):
    actual = derivatives(ours, tensors, upstream, outers)
    wide = [tensor.double() for tensor in (*tensors, upstream, *outers)]
    n = len(tensors)
    expected = derivatives(theirs, wide[:n], wide[n], wide[n + 1 :])
    # A few roundings of terms of which none exceeds a hundred, and at most a thousand are added up.
    eps = torch.finfo(dtype).eps
    for one, other in zip(actual, expected):
        assert one.shape == other.shape
        largest = other.abs().max().item() if other.numel() else 0
        torch.testing.assert_close(one.double(), other, rtol=4 * eps, atol=4 * eps * largest + 1e-4)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts=broadcast_pairs(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_gate_that_broadcasts(device, layouts, dtype):
    x_layout, gate_layout, gap = layouts
    x, gate = made(x_layout, dtype, device, 0), made(gate_layout, dtype, device, 1)
    upstream = random((*x.shape, gap), dtype, device, seed=2)[..., 0]
    outers = random(x.shape, dtype, device, seed=3), random(gate.shape, dtype, device, seed=4)
    assert_agrees_with_float64(
        torch_sigmoid.sigmoid_gate, lambda x, gate: x * torch.sigmoid(gate), (x, gate), upstream, outers, dtype
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts=broadcast_pairs(), reduction=st.sampled_from(["none", "sum"]), of_positives=st.booleans())
def test_any_weight_that_broadcasts(device, layouts, reduction, of_positives):
    x_layout, weight_layout, gap = layouts
    x, weight = made(x_layout, torch.float32, device, 0), made(weight_layout, torch.float32, device, 1).abs()
    target = torch.sigmoid(random((*x.shape, gap), torch.float32, device, seed=2)[..., 0])
    shape = x.shape if reduction == "none" else ()
    upstream, outer = random(shape, torch.float32, device, seed=3), random(x.shape, torch.float32, device, seed=4)
    name = "pos_weight" if of_positives else "weight"

    def ours(x):
        return torch_sigmoid.binary_cross_entropy_with_logits(x, target, reduction=reduction, **{name: weight})

    def theirs(x):
        options = {name: weight.double().expand(x.shape)}
        return torch.nn.functional.binary_cross_entropy_with_logits(x, target.double(), reduction=reduction, **options)

    assert_agrees_with_float64(ours, theirs, (x,), upstream, (outer,), torch.float32)
