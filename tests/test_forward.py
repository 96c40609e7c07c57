"""N1, N4, N5: the values of the forward pass."""

import pytest
import torch
from reference import FLOATS, FORWARD, SIXTEEN_BIT, allowance, is_normal, runs_kernels, sample, sigma, ulp_error

import torch_sigmoid

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_is_within_its_bound_of_the_true_value(dtype, device):
    x = sample(dtype)
    y = torch_sigmoid.sigmoid(x.to(device))
    exact = sigma(x)
    # Subnormal results differ by libm; ATen's own fp32 result flushes from x = -88.73 on.
    judged = x.isfinite() & is_normal(exact, dtype)
    worst = ulp_error(y, exact)[judged].max()
    assert worst <= FORWARD[dtype] + allowance(dtype, device)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_the_bound_in_sixteen_bit_is_tight(dtype, device):
    x = sample(dtype)
    exact = sigma(x)
    judged = x.isfinite() & is_normal(exact, dtype)
    assert ulp_error(torch_sigmoid.sigmoid(x.to(device)), exact)[judged].max() > 0.499


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_on_a_gpu_is_bit_for_bit_that_of_torch(dtype, device):
    if device != "cuda":
        pytest.skip("states what a GPU does")
    x = sample(dtype).to(device)
    ours, torchs = torch_sigmoid.sigmoid(x), torch.sigmoid(x)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    same = (ours.view(bits) == torchs.view(bits)) | (ours.isnan() & torchs.isnan())
    assert same.all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(dtype, device, save):
    inf, nan = float("inf"), float("nan")
    tiny = torch.finfo(dtype).smallest_normal / 2
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, tiny, -tiny], dtype=dtype, device=device)
    y = torch_sigmoid.sigmoid(x, save=save)
    assert y[0].isnan()
    assert y[1:].tolist() == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_value_does_not_depend_on_size_position_or_alignment(dtype, device):
    if not runs_kernels(device):
        pytest.skip("states what the kernels do; torch's CPU operator rounds vector and scalar parts differently")
    x = (torch.linspace(-30, 30, 3001, dtype=torch.float64)).to(dtype).to(device)
    whole = torch_sigmoid.sigmoid(x)
    for start, stop in ((0, 1), (1, 18), (5, 1029), (1000, 3001), (2999, 3000)):
        assert torch.equal(torch_sigmoid.sigmoid(x[start:stop]), whole[start:stop])
    assert torch.equal(torch_sigmoid.sigmoid(x[::3]), whole[::3])
    assert torch.equal(torch_sigmoid.sigmoid(x), whole)
