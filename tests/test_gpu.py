"""What only a GPU can show: capture in a graph, other devices and streams, billions of elements, every fp32 input."""

import pytest
import torch
from reference import gradient, random

import torch_sigmoid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GIB = 2**30


def test_the_kernels_run_on_this_gpu():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch_sigmoid.path(torch.empty(1, dtype=dtype, device="cuda")).name == "triton"


def test_forward_and_backward_are_captured_in_a_graph(save):
    x = random((1000,), torch.bfloat16, "cuda").requires_grad_()

    def step():
        x.grad = None
        torch_sigmoid.sigmoid(x, save=save).sum().backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        x.copy_(random((1000,), torch.bfloat16, "cuda", seed=1))
    graph.replay()
    expected = gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x)
    assert torch.equal(x.grad, expected)


def test_a_side_stream():
    stream = torch.cuda.Stream()
    x = random((1 << 20,), torch.float32, "cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = torch_sigmoid.sigmoid(x * 2)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, torch.sigmoid(x * 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_a_device_that_is_not_the_current_one(save):
    x = random((1000,), torch.float32, "cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(
            gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x), gradient(torch.sigmoid, x), rtol=1e-4, atol=1e-7
        )
        assert torch.cuda.current_device() == 0


def test_more_than_two_billion_elements():
    n = 2**31 + 7
    if torch.cuda.mem_get_info()[0] < 14 * GIB:
        pytest.skip("needs 14 GiB free")
    x = torch.full((n,), 0.5, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    y = torch_sigmoid.sigmoid(x)
    assert y[-1] == torch.sigmoid(x[-1:])
    assert bool((y[:-1] == torch.sigmoid(x[:1])).all())


def test_every_fp32_input_is_bit_for_bit_torchs():
    """N1 over all 2³² patterns."""
    chunk = 2**28
    for start in range(-(2**31), 2**31, chunk):
        x = torch.arange(start, start + chunk, dtype=torch.int64, device="cuda").to(torch.int32).view(torch.float32)
        ours, theirs = torch_sigmoid.sigmoid(x), torch.sigmoid(x)
        same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
        assert bool(same.all()), f"{int((~same).sum())} differ, the first at x = {x[~same][0].item()!r}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_is_allocated_beyond_the_result(dtype, save):
    x = random((1 << 20,), dtype, "cuda").requires_grad_()
    size = x.numel() * x.element_size()
    torch_sigmoid.sigmoid(x, save=save).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = torch_sigmoid.sigmoid(x, save=save)
    assert torch.cuda.memory_allocated() - before == size
    torch.autograd.grad(y, x, torch.ones((), dtype=dtype, device="cuda").expand_as(y))
    assert torch.cuda.max_memory_allocated() - before <= 2 * size + 4096


def test_nothing_synchronises(save):
    x = random((1000,), torch.float16, "cuda").requires_grad_()
    function = lambda x: torch_sigmoid.sigmoid(x, save=save)  # noqa: E731
    gradient(function, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(function, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
