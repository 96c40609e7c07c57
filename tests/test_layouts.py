"""Any shape, stride, alignment and offset width: the same values, torch's memory format, and no copies."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import FLOATS, LAYOUTS, SIXTEEN_BIT, assert_near, gradient, random, runs_kernels

import torch_sigmoid
from torch_sigmoid import autograd

pytestmark = [pytest.mark.ways("ptx"), pytest.mark.usefixtures("poisoned_allocations")]


def memory_format(tensor):
    """The strides that matter: of dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.launches_nothing("empty tensors among the layouts")
def test_every_layout_forward_and_backward(layout, dtype, device, save):
    x = LAYOUTS[layout](dtype, device)
    before = x.clone()
    y = torch_sigmoid.sigmoid(x, save=save)
    assert memory_format(y) == memory_format(torch.sigmoid(x))
    assert_near(y, torch.sigmoid(x.double()), dtype)

    upstream = random(x.shape, dtype, device, seed=9)
    shrink = [slice(None)] * (x.dim() - 1) + [slice(0, 1)] if x.dim() else []
    upstreams = {
        "dense": upstream,
        "expanded": torch.ones((), dtype=dtype, device=device).expand(x.shape),
        "expanded-columns": upstream[tuple(shrink)].expand(x.shape) if x.numel() else upstream,
        "transposed": upstream.mT.contiguous().mT if x.dim() > 1 else upstream,
        "every-second": upstream.repeat_interleave(2, -1)[..., ::2] if x.dim() else upstream,
    }
    saved = y if save == "output" else x
    for name, grad in upstreams.items():
        result = autograd.sigmoid_gradient(grad, saved, save)
        wide = saved.double()
        slope = wide * (1 - wide) if save == "output" else torch.sigmoid(wide) * torch.sigmoid(-wide)
        assert_near(result, grad.double() * slope, dtype)
        if runs_kernels(device):
            assert memory_format(result) == memory_format(torch.empty_like(saved)), name
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.launches_nothing("empty tensors among the layouts")
def test_every_layout_in_the_double_backward(layout, device, save):
    x = LAYOUTS[layout](torch.float32, device)
    saved = torch.sigmoid(x) if save == "output" else x
    v, grad = random(x.shape, torch.float32, device, 1), random(x.shape, torch.float32, device, 2)
    for outer in (v, v[:1].expand(x.shape) if x.dim() and x.numel() else v):
        actual = autograd.sigmoid_second_gradients(outer, grad, saved, save)
        exact = autograd.sigmoid_second_gradients(outer.cpu().double(), grad.cpu().double(), saved.cpu().double(), save)
        for ours, true in zip(actual, exact):
            torch.testing.assert_close(ours.cpu().double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layout", ["chunk-half", "chunk-half-odd", "expanded-rows", "expanded-all", "transposed", "every-second"]
)
def test_rows_slices_and_expanded_tensors_are_read_in_place(layout, device, monkeypatch):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    x = LAYOUTS[layout](torch.float32, device)
    grad = random((1,), torch.float32, device).expand(x.shape)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append(arguments)

    output = torch.empty_like(x)
    launches = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("copied"))
    launcher = launch.Launcher(Kernel())
    launcher((x,), (output,))
    launcher((grad, x), (output,))
    assert [tensor.data_ptr() for tensor in launches[0][:2]] == [x.data_ptr(), output.data_ptr()]
    assert [tensor.data_ptr() for tensor in launches[1][:3]] == [grad.data_ptr(), x.data_ptr(), output.data_ptr()]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_alignment_of_every_operand(dtype, device):
    n = 1030
    storage, upstream = random((n + 16,), dtype, device), random((n + 16,), dtype, device, seed=1)
    whole = torch_sigmoid.sigmoid(storage.double())
    for offset in (1, 2, 3, 4, 8):
        x, grad = storage[offset : offset + n], upstream[offset // 2 : offset // 2 + n]
        assert_near(torch_sigmoid.sigmoid(x), whole[offset : offset + n], dtype)
        slope = torch.sigmoid(x.double()) * torch.sigmoid(-x.double())
        assert_near(autograd.sigmoid_gradient(grad, x, "input"), grad.double() * slope, dtype)


def test_lazily_negated_tensors_are_read_with_their_sign(device, save):
    negated = torch.randn(40, dtype=torch.complex64, device=device).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(torch_sigmoid.sigmoid(negated, save=save), torch.sigmoid(negated.resolve_neg()))
    x = random((40,), torch.float32, device)
    plain = gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x, negated.resolve_neg())
    torch.testing.assert_close(gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x, negated), plain)


def test_offsets_become_64_bit_exactly_when_32_bits_do_not_suffice():
    """On meta tensors: no memory. The margin is a tile, whose masked lanes are addressed too."""
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")

    def use_int64(*tensors):
        return launch.plan(tuple(tensors[0].shape), tuple(tensor.stride() for tensor in tensors)).use_int64

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    limit = 2**31 - launch.INTERPRETED_TILE_ELEMENTS
    assert not use_int64(meta(limit))
    assert use_int64(meta(limit + 1))
    assert use_int64(meta(2**31 + 5))
    assert use_int64(meta(2**33).view(2**16, 2**17).t())
    # Few elements, far apart; and one operand alone suffices.
    far = meta(2**32)[:: 2**31]
    assert use_int64(far)
    assert use_int64(far, meta(2))
    assert use_int64(meta(1).expand(2**31), meta(2**31))
    assert not use_int64(meta(2**20, 2**10)[:, : 2**9], meta(2**20, 2**9))
    assert use_int64(meta(2**20, 2**12)[:, : 2**9], meta(2**20, 2**9))
    assert not use_int64(meta())


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 + 5, 2**33 + 1])
def test_programs_cover_more_than_two_billion_elements(n):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")

    plan = launch.plan((n,), ((1,), (1,)))
    assert plan.programs * plan.block_columns >= n
    assert plan.programs < 2**31, "the limit of a grid's first dimension"


# Offsets beyond 2³¹ from the row alone, and from a column stride that itself fits 32 bits: in the tail, in the body, in both.
FAR_APART = [((2, 33), (2**31, 1)), ((9,), (2**28,)), ((17,), (2**27,)), ((33, 3), (1, 2**30))]


@pytest.mark.parametrize(("shape", "strides"), FAR_APART, ids=str)
def test_elements_more_than_two_to_the_31_apart(shape, strides, device):
    if not runs_kernels(device):
        pytest.skip("states what the kernels do")
    # calloc's untouched pages take no memory.
    storage = torch.from_numpy(np.zeros(2**31 + 2**12, dtype=np.float16)).to(device)
    x = storage.as_strided(shape, strides)
    x.copy_(random(shape, torch.float16))
    torch.testing.assert_close(torch_sigmoid.sigmoid(x), torch.sigmoid(x))
    grad = random(shape, torch.float16, device, seed=1)
    torch.testing.assert_close(autograd.sigmoid_gradient(grad, x, "input"), autograd.sigmoid_gradient_formula(grad, x, "input"))


@pytest.mark.parametrize("n_columns", [1, 2, 3, 15, 16, 17, 33, 100, 127, 500, 1000, 1024, 1025, 5000])
def test_tiles_waste_few_lanes(n_columns):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")

    rows, columns = launch.tile_shape(64, n_columns, False)
    assert rows * columns in (launch.TILE_ELEMENTS, launch.INTERPRETED_TILE_ELEMENTS)
    covered = -(-n_columns // columns) * columns
    assert covered <= max(16, n_columns * 9 / 8, n_columns + 15)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_results_do_not_change_from_run_to_run(dtype, device, save):
    x, grad = random((5000,), dtype, device), random((5000,), dtype, device, seed=1)
    runs = [gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x, grad) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_a_launch_is_made_on_the_tensors_device(monkeypatch):
    """Triton launches on the current device: the guard must switch to the tensor's, and only where it is another."""
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    entered = []

    class Module:
        current_device = staticmethod(lambda: 0)
        device = staticmethod(lambda device: entered.append(device) or contextlib.nullcontext())

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    for index in (0, 1):
        tensor = SimpleNamespace(device=torch.device("cuda", index), get_device=lambda index=index: index)
        with launch._on_device_of(tensor):
            pass
    with launch._on_device_of(torch.empty(1)):
        pass
    assert entered == [torch.device("cuda", 1)]
