"""Bad input: an error at the public edge that says what came and what was expected, before anything is computed."""

import numpy as np
import pytest
import torch
from reference import random

import torch_sigmoid
from torch_sigmoid import Sigmoid, intercept, replace, restore, sigmoid, sigmoid_

pytestmark = [pytest.mark.ways("interpreter"), pytest.mark.launches_nothing("errors come before anything is computed")]


@pytest.mark.parametrize("value", [1.0, [1.0], None, "x", np.ones(2)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("function", [sigmoid, sigmoid_])
def test_what_is_not_a_tensor(function, value):
    with pytest.raises(TypeError, match=rf"must be a torch.Tensor, got {type(value).__name__}"):
        function(value)


@pytest.mark.parametrize("value", ["x", "both", None, True, 1])
def test_an_unknown_save(value, device):
    x = torch.zeros(2, device=device)
    calls = [
        lambda: sigmoid(x, save=value),
        lambda: Sigmoid(save=value),
        lambda: replace(torch.nn.Sigmoid(), save=value),
        lambda: intercept(save=value),
    ]
    for call in calls:
        with pytest.raises(ValueError, match='save must be "output" or "input", got'):
            call()


def test_save_input_excludes_inplace():
    with pytest.raises(ValueError, match="inplace"):
        Sigmoid(save="input", inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_leaf_in_place_is_refused_and_keeps_its_values(dtype, device):
    x = random((5,), dtype, device).requires_grad_()
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        sigmoid_(x)
    with pytest.raises(RuntimeError, match="leaf"):
        sigmoid_(x[1:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_torch_forbids_to_modify_keeps_its_values(dtype, device):
    base = random((4, 2), dtype, device).requires_grad_() * 1
    before = base.detach().clone()
    with pytest.raises(RuntimeError, match="view"):
        sigmoid_(base.unbind()[0])
    assert torch.equal(base, before)


def test_integers_in_place(device):
    with pytest.raises(RuntimeError, match="can't be cast"):
        sigmoid_(torch.zeros(2, dtype=torch.int64, device=device))


def test_an_expanded_tensor_in_place(device):
    x = torch.zeros(1, device=device).expand(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        sigmoid_(x)


def test_out_must_fit(device):
    x = random((3,), torch.float32, device)
    with pytest.raises(TypeError, match=r"out must be a torch.Tensor, got list"):
        sigmoid(x, out=[0.0] * 3)
    with pytest.raises(ValueError, match=r"out must have .* torch.float32 can be cast to, on .*, got torch.float32 on meta"):
        sigmoid(x, out=torch.empty(3, device="meta"))
    out = torch.full((3,), 7.0, device=device)
    with pytest.raises(RuntimeError, match="requires grad"):
        sigmoid(x.requires_grad_(), out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("function", [replace, restore])
def test_what_is_not_a_module(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Tensor"):
        function(torch.zeros(1))


def test_an_upstream_gradient_of_another_shape_or_dtype_is_torchs_business(device, save):
    x = random((3,), torch.float32, device).requires_grad_()
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch.autograd.grad(sigmoid(x, save=save), x, torch.ones(4, device=device))


def test_path_of_what_is_not_a_tensor():
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got float"):
        torch_sigmoid.path(1.0)
