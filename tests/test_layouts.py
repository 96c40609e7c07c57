"""Any shape, stride, alignment and offset width: the same values, torch's memory format, and no copies."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import FLOATS, LAYOUTS, SIXTEEN_BIT, WITHOUT_FLOAT16_EXECUTED, assert_near, gradient, random, runs_kernels

import torch_sigmoid
from torch_sigmoid import autograd

pytestmark = [pytest.mark.ways("ptx"), pytest.mark.usefixtures("poisoned_allocations")]


def memory_format(tensor):
    """The strides that matter: of dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


@pytest.mark.latin_square
@pytest.mark.parametrize("dtype", WITHOUT_FLOAT16_EXECUTED, ids=str)
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


IN_PLACE = ["chunk-half", "chunk-half-odd", "expanded-rows", "expanded-all", "transposed", "every-second"]
# Three dimensions that no two strides address.
IN_PLACE += ["block", "expanded-middle", "permuted", "channels-last", "every-second-row-and-column", "size-one-dims"]


class Kernel:
    """Launches nothing, and keeps what it is given."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(arguments)


def addresses(tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("layout", IN_PLACE)
def test_up_to_three_dimensions_are_read_in_place(layout, device, monkeypatch):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    x = LAYOUTS[layout](torch.float32, device)
    grad = random((1,), torch.float32, device).expand(x.shape)
    output, kernel = torch.empty_like(x), Kernel()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("copied"))
    for inputs in ((x,), (grad, x), (x, None, grad)):
        launch.Launcher(kernel)(inputs, (output,))
        read, written, *_ = kernel.launches.pop()
        assert addresses(read) == addresses(inputs)
        assert addresses(written) == [output.data_ptr()]


def test_what_needs_a_fourth_dimension_is_copied_and_nothing_else(device):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    x, dense = LAYOUTS["block-of-four"](torch.float32, device), random((3, 4, 5, 6), torch.float32, device, seed=1)
    kernel = Kernel()
    launch.Launcher(kernel)((dense, None, x), (torch.empty_like(x),))
    ((read, *_),) = kernel.launches
    assert read[0].data_ptr() == dense.data_ptr()
    assert read[1] is None
    assert read[2].data_ptr() != x.data_ptr()
    assert read[2].stride() == dense.stride()
    assert torch.equal(read[2], x)


ELEMENTWISE = {
    "sigmoid": (torch_sigmoid.sigmoid, torch.sigmoid),
    "sigmoid-from-input": (lambda x: torch_sigmoid.sigmoid(x, save="input"), torch.sigmoid),
    "silu": (torch_sigmoid.silu, torch.nn.functional.silu),
    "swiglu": (lambda x: torch_sigmoid.swiglu(x, x), lambda x: torch.nn.functional.silu(x) * x),
}


def derivatives(function, x, upstream, outer):
    """The value, the gradient, and the gradients of the gradient."""
    x, upstream = x.detach().requires_grad_(), upstream.detach().requires_grad_()
    value = function(x)
    (grad,) = torch.autograd.grad(value, x, upstream, create_graph=True)
    return value, grad, *torch.autograd.grad(grad, (x, upstream), outer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ELEMENTWISE)
@pytest.mark.parametrize(("layout", "copied"), [("block", False), ("expanded-middle", False), ("block-of-four", True)])
def test_a_block_of_three_dimensions_is_walked_in_place_in_every_order(layout, copied, operator, dtype, device, monkeypatch):
    copies = []
    if runs_kernels(device):
        launch = pytest.importorskip("torch_sigmoid.kernels.launch")
        original = launch.dense_alike
        monkeypatch.setattr(launch, "dense_alike", lambda *args: copies.append(1) or original(*args))
    ours, theirs = ELEMENTWISE[operator]
    x, upstream, outer = (LAYOUTS[layout](dtype, device, seed=seed) for seed in range(3))
    actual = derivatives(ours, x, upstream, outer)
    assert bool(copies) == (copied and runs_kernels(device))
    # From the output, the derivatives are those of the rounded σ.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(actual, derivatives(theirs, *(each.double() for each in (x, upstream, outer)))):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


MISSING = (None, None, None)
# Shape and strides of each tensor, the output's last; the sizes of the walk, and the strides that are left.
PLANS = {
    "no dimensions": ((), [(), ()], (None, None, 1), [(None, None, 1)] * 2),
    "one element": ((1, 1), [(5, 3), (1, 1)], (None, None, 1), [(None, None, 1)] * 2),
    "dense": ((3, 5, 7), [(35, 7, 1)] * 2, (None, None, 105), [(None, None, 1)] * 2),
    "dense in another order": ((3, 5, 7), [(1, 21, 3)] * 2, (None, None, 105), [(None, None, 1)] * 2),
    "every second": ((300,), [(2,), (1,)], (None, None, 300), [(None, None, 2), (None, None, 1)]),
    "expanded": ((3, 5, 7), [(0, 0, 0), (35, 7, 1)], (None, None, 105), [MISSING, (None, None, 1)]),
    "halves of rows": ((33, 32), [(64, 1), (32, 1)], (None, 33, 32), [(None, 64, 1), (None, 32, 1)]),
    "expanded rows": ((33, 32), [(0, 1), (32, 1)], (None, 33, 32), [(None, None, 1), (None, 32, 1)]),
    "expanded columns": ((33, 32), [(1, 0), (32, 1)], (None, 33, 32), [(None, 1, None), (None, 32, 1)]),
    "transposed": ((33, 32), [(1, 33), (32, 1)], (None, 33, 32), [(None, 1, 33), (None, 32, 1)]),
    "rows side by side": ((3, 5, 7), [(200, 7, 1), (35, 7, 1)], (None, 3, 35), [(None, 200, 1), (None, 35, 1)]),
    "block": ((3, 5, 7), [(200, 20, 1), (35, 7, 1)], (3, 5, 7), [(200, 20, 1), (35, 7, 1)]),
    "expanded in the middle": ((3, 5, 7), [(7, 0, 1), (35, 7, 1)], (3, 5, 7), [(7, None, 1), (35, 7, 1)]),
    "expanded around": ((3, 5, 7), [(0, 1, 0), (35, 7, 1)], (3, 5, 7), [(None, 1, None), (35, 7, 1)]),
    "block in another order": ((7, 3, 5), [(1, 200, 20), (1, 35, 7)], (3, 5, 7), [(200, 20, 1), (35, 7, 1)]),
    "two blocks": ((9, 5, 7), [(35, 7, 1), (200, 20, 1)], (9, 5, 7), [(35, 7, 1), (200, 20, 1)]),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_walk_has_the_fewest_dimensions_that_address_every_tensor(name):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    shape, strides, sizes, left = PLANS[name]
    walk = launch.plan(shape, tuple(strides))
    assert walk.sizes == sizes
    assert walk.strides == tuple(left)
    n_matrices, row_blocks, column_blocks = walk.blocks
    assert walk.tiles == n_matrices * row_blocks * column_blocks
    assert row_blocks * walk.block_rows >= (sizes[1] or 1) > (row_blocks - 1) * walk.block_rows
    assert column_blocks * walk.block_columns >= sizes[2] > (column_blocks - 1) * walk.block_columns
    # A sum follows the order of its first input, in which the first of two blocks is dense.
    if name == "two blocks":
        assert launch.plan(shape, tuple(strides), leading=0) == walk
        assert launch.plan((7, 9, 5), ((1, 35, 7), (45, 5, 1)), leading=0).sizes == (None, 45, 7)
        assert launch.plan((7, 9, 5), ((1, 35, 7), (45, 5, 1))).sizes == (None, 7, 45)


def test_no_walk_has_four_dimensions():
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")
    assert launch.plan((3, 4, 5, 6), ((1000, 200, 20, 2), (120, 30, 6, 1))) is None
    assert launch.plan((3, 4, 1, 6), ((1000, 200, 20, 2), (24, 6, 6, 1))).sizes == (3, 4, 6)


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

    walk = launch.plan((n,), ((1,), (1,)))
    assert walk.tiles * walk.block_columns >= n
    assert walk.tiles < 2**31, "the limit of a grid's first dimension"


# Offsets beyond 2³¹ from the row or the matrix alone, and from strides that fit 32 bits: in the tail, in the body, in both.
FAR_APART = [((2, 33), (2**31, 1)), ((9,), (2**28,)), ((17,), (2**27,)), ((33, 3), (1, 2**30))]
FAR_APART += [((3, 2, 33), (2**30, 64, 1)), ((2, 3, 17), (64, 2**30, 1))]


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


@pytest.mark.parametrize("gate_shape", [(2, 1), (1, 33)], ids=str)
def test_a_gate_that_is_broadcast_over_elements_more_than_two_to_the_31_apart(gate_shape, device):
    if not runs_kernels(device):
        pytest.skip("states what the kernels do")
    storage = torch.from_numpy(np.zeros(2**31 + 2**12, dtype=np.float16)).to(device)
    x = storage.as_strided((2, 33), (2**31, 1))
    x.copy_(random(x.shape, torch.float16))
    grad, gate = random(x.shape, torch.float16, device, seed=1), random(gate_shape, torch.float16, device, seed=2)

    def derived(function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
        return torch.autograd.grad(function(*leaves), leaves, tensors[2])

    actual = derived(torch_sigmoid.sigmoid_gate, x, gate, grad)
    exact = derived(lambda x, gate: x * torch.sigmoid(gate), x.double(), gate.double(), grad.double())
    for ours, theirs in zip(actual, exact):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("n_columns", [1, 2, 3, 15, 16, 17, 33, 100, 127, 500, 1000, 1024, 1025, 5000])
def test_tiles_waste_few_lanes(n_columns):
    launch = pytest.importorskip("torch_sigmoid.kernels.launch")

    for narrowed in (1, 8):
        rows, columns = launch.tile_shape(64, n_columns, False, narrowed)
        assert rows * columns in (launch.TILE_ELEMENTS, launch.INTERPRETED_TILE_ELEMENTS)
        assert rows >= narrowed
        assert columns >= 16, "the tail's"
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
