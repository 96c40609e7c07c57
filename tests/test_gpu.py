"""What only a GPU can show: capture in a graph, other devices and streams, billions of elements, every fp32 input."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import gradient, random

import torch_sigmoid
from benchmarks.measure.host import captured

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

    replay = captured(step)
    with torch.no_grad():
        x.copy_(random((1000,), torch.bfloat16, "cuda", seed=1))
    replay()
    expected = gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x)
    assert torch.equal(x.grad, expected)


def test_after_warmup_a_capture_needs_no_call_before_it(save):
    """What warmup compiled and loaded is launched within the capture for the first time at this shape."""
    torch_sigmoid.warmup("cuda", [torch.float32])
    x = random((1237,), torch.float32, "cuda").requires_grad_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(torch_sigmoid.sigmoid(x, save=save).sum(), x)
    graph.replay()
    assert torch.equal(grad, gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x, torch.ones_like(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kept_launches_give_the_values_of_the_first(dtype, save):
    """Every alignment and many sizes and layouts, twice each, in an order that mixes them."""
    storage = random((4096,), dtype, "cuda")
    views = [storage[offset : offset + n] for offset in (0, 1, 2, 4, 8) for n in (1, 15, 16, 17, 1023, 1024, 2049)]
    views += [storage.view(64, 64)[:, :width] for width in (1, 16, 33, 48)] + [storage.view(64, 64).t()]
    function = lambda x: torch_sigmoid.sigmoid(x, save=save)  # noqa: E731
    first = [(function(x), gradient(function, x)) for x in views]
    for x, (y, grad) in reversed(list(zip(views, first))):
        assert torch.equal(function(x), y)
        assert torch.equal(y, torch.sigmoid(x))
        assert torch.equal(gradient(function, x), grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_sides_of_the_threshold_have_the_same_bits(dtype):
    """N4: torch's operator below `torch_below`, our kernels above, first and second derivatives included."""
    x = random((5000,), dtype, "cuda").requires_grad_()
    grad, outer = random((5000,), dtype, "cuda", seed=1), random((5000,), dtype, "cuda", seed=2)
    results = []
    for below in (0, 2**26):
        torch_sigmoid.torch_below(below)
        try:
            y = torch_sigmoid.sigmoid(x)
            (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
            results.append((y, first, *torch.autograd.grad(first, x, outer)))
        finally:
            torch_sigmoid.torch_below(0)
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def test_threads_launch_side_by_side(save):
    function = lambda x: torch_sigmoid.sigmoid(x, save=save)  # noqa: E731
    tensors = [random((1000 + i,), torch.bfloat16, "cuda", seed=i) for i in range(64)]
    expected = [gradient(function, x) for x in tensors]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for actual, right in zip(pool.map(lambda x: gradient(function, x), tensors), expected):
                assert torch.equal(actual, right)


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


def requested_bytes():
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_is_allocated_beyond_the_result(dtype, save):
    x = random((1 << 20,), dtype, "cuda").requires_grad_()
    size = x.numel() * x.element_size()
    torch_sigmoid.sigmoid(x, save=save).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, requested = torch.cuda.memory_allocated(), requested_bytes()
    y = torch_sigmoid.sigmoid(x, save=save)
    assert requested_bytes() - requested == size
    torch.autograd.grad(y, x, torch.ones((), dtype=dtype, device="cuda").expand_as(y))
    # Blocks may be larger than what is asked for by what is not worth splitting off.
    assert torch.cuda.max_memory_allocated() - before <= 2 * (size + 2**20)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_synchronises(save):
    x = random((1000,), torch.float16, "cuda").requires_grad_()
    function = lambda x: torch_sigmoid.sigmoid(x, save=save)  # noqa: E731
    gradient(function, x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradient(function, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(call):
    """The names of the kernels that a second call launches."""
    call()
    torch.cuda.synchronize()
    # Without acc_events torch warns, once in a process, which as an error leaves the profiler half started.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type is torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]


@pytest.fixture
def profiler():
    """Some machines' profilers see no kernel, torch's neither: https://github.com/pytorch/pytorch/issues/192021."""
    x = torch.zeros(1, device="cuda")
    if len(kernels_of(x.neg)) != 1:
        pytest.skip("torch's profiler records no kernel of torch's own here")


@pytest.mark.usefixtures("profiler")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("function", [torch_sigmoid.binary_cross_entropy_with_logits, torch_sigmoid.sigmoid_focal_loss])
def test_a_loss_is_one_pass_in_each_direction_and_never_synchronises(function, reduction):
    x, target = random((64, 4096), torch.bfloat16, "cuda").requires_grad_(), random((64, 4096), torch.float32, "cuda") > 0
    loss = function(x, target, reduction=reduction)
    grad = torch.ones_like(loss)
    forward = kernels_of(lambda: function(x, target, reduction=reduction))
    (backward,) = kernels_of(lambda: torch.autograd.grad(loss, x, grad, retain_graph=True))
    assert ["forward" in name for name in forward] == [True] + [False] * (reduction == "mean")
    assert "backward" in backward
    try:
        torch.cuda.set_sync_debug_mode("error")
        for ignore_index in (None, 0):
            loss = function(x, target.long(), reduction=reduction, ignore_index=ignore_index)
            torch.autograd.grad(loss, x, torch.ones_like(loss))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_siglip_never_holds_the_matrix_and_never_synchronises():
    size, chunk_size = 8192, 256
    image, text = (torch.nn.functional.normalize(random((size, 64), torch.float32, "cuda", seed=i)) for i in range(2))
    tensors = [each.requires_grad_() for each in (image, text, torch.tensor(10.0, device="cuda"))]
    torch_sigmoid.siglip_loss(*tensors, -10.0, chunk_size=chunk_size).backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = torch_sigmoid.siglip_loss(*tensors, -10.0, chunk_size=chunk_size)
        grads = torch.autograd.grad(loss, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 4 * size * size / 4
    signs = 2 * torch.eye(size, device="cuda", dtype=torch.float64) - 1
    wide = [each.detach().double().requires_grad_() for each in tensors]
    plain = -torch.nn.functional.logsigmoid(signs * (wide[2] * wide[0] @ wide[1].T - 10.0)).sum() / size
    for actual, expected in zip((loss, *grads), (plain, *torch.autograd.grad(plain, wide))):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.usefixtures("profiler")
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch_sigmoid.silu, [(64, 4096)]),
        (torch_sigmoid.logsigmoid, [(64, 4096)]),
        (torch_sigmoid.glu, [(64, 4096)]),
        (torch_sigmoid.swiglu, [(64, 4096), (64, 4096)]),
        (torch_sigmoid.sigmoid_gate, [(4096, 64), (4096, 1)]),
    ],
)
def test_a_gate_is_one_kernel_in_each_direction(function, shapes):
    tensors = [random(shape, torch.bfloat16, "cuda", seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    output = function(*tensors)
    grad = torch.ones_like(output)
    (forward,) = kernels_of(lambda: function(*tensors))
    (backward,) = kernels_of(lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True))
    assert "forward" in forward
    assert "backward" in backward
