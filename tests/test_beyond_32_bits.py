"""More than 2³¹ elements, without the memory: the programs at both ends run, and no page in between is touched."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import random

import torch_sigmoid
from torch_sigmoid import autograd
from torch_sigmoid.losses import Loss

resource = pytest.importorskip("resource")

BEYOND_32_BITS = {
    "dense": ((2**31 + 4096,), (1,)),
    # A row of bf16 is 2³³ bytes from the next.
    "rows": ((2, 2**30 + 2048), (2**32, 1)),
}


def resident_bytes():
    """What the process holds now: the tensors are still alive when it is asked."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("a process's memory is known on Linux only")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("layout", BEYOND_32_BITS)
def test_more_than_two_to_the_31_elements(layout, device, kernels):
    """Executed by the first and the last programs, at both ends; the pages in between are never touched."""
    if kernels.ptx is None:
        pytest.skip("the machine that executes PTX can run some of a launch's programs")
    before = resident_bytes()
    shape, strides = BEYOND_32_BITS[layout]
    assert torch.Size(shape).numel() == 2**31 + 4096
    x = torch.from_numpy(np.zeros(1 + sum((size - 1) * stride for size, stride in zip(shape, strides)), dtype=np.int16))
    x = x.view(torch.bfloat16).as_strided(shape, strides)
    n = 3000

    def ends_of(tensor):
        return (tensor[:n], tensor[-n:]) if layout == "dense" else (tensor[0, :n], tensor[-1, -n:])

    head, tail = ends_of(x)
    head.copy_(random((n,), torch.bfloat16))
    tail.copy_(random((n,), torch.bfloat16, seed=1))

    kernels.ptx.only = lambda n_programs: [0, 1, 2, *range(n_programs - 4, n_programs)]
    try:
        sigma = torch_sigmoid.sigmoid(x)
        grad = autograd.sigmoid_gradient(x, x, "input")
    finally:
        kernels.ptx.only = None
    for result, function in ((sigma, torch.sigmoid), (grad, lambda x: autograd.sigmoid_gradient_formula(x, x, "input"))):
        for ours, end in zip(ends_of(result), (head, tail)):
            torch.testing.assert_close(ours, function(end))
    assert resident_bytes() - before < 2**30


# Rounded up to whole tiles it needs more than 32 bits.
JUST_BELOW = 2**31 - 5


@pytest.fixture
def only_the_ends(kernels):
    """Of each launch a few programs run, the first and the last among them."""
    if kernels.ptx is None:
        pytest.skip("the machine that executes PTX can run some of a launch's programs")
    kernels.ptx.only = lambda n_programs: sorted({0, n_programs // 2, n_programs - 1})
    yield
    kernels.ptx.only = None


@pytest.mark.parametrize("n", [JUST_BELOW, 2**31 + 5])
def test_a_sum_over_about_two_to_the_31_elements(n, device, only_the_ends, monkeypatch):
    from torch_sigmoid.kernels import losses, reduce

    n_tiles = -(-n // 1024)
    monkeypatch.setattr(reduce, "MAX_PROGRAMS", n_tiles)
    x = torch.zeros(1).expand(n)
    forward, _, _ = losses.loss_launchers(Loss(reduction="sum"))
    sums = torch.zeros(n_tiles)
    forward((x, x, None, None), (sums,))
    tile, last = 1024 * math.log(2), (n - 1024 * (n_tiles - 1)) * math.log(2)
    assert sums[[0, n_tiles // 2, -1]].tolist() == pytest.approx([tile, tile, last])


@pytest.mark.parametrize("n", [JUST_BELOW, 2**31 + 5])
def test_statistics_of_about_two_to_the_31_elements(n, device, only_the_ends, monkeypatch):
    from torch_sigmoid.kernels import reduce, statistics

    n_tiles = -(-n // 1024)
    monkeypatch.setattr(reduce, "MAX_PROGRAMS", n_tiles)
    x, counted = torch.ones(1).expand(n), [1024, 1024, n - 1024 * (n_tiles - 1)]
    squares = torch.zeros(n_tiles, statistics.SQUARES_COLUMNS.value, dtype=torch.float64)
    statistics._squares((x,), (squares,))
    assert squares[[0, n_tiles // 2, -1], 1].tolist() == counted
    sums = torch.zeros(n_tiles, statistics.ACTIVATION_COLUMNS.value, dtype=torch.float64)
    statistics._activation("relu", 1.0)((x.view(1, 1, n), torch.zeros(statistics.BOUNDS)), (sums, torch.zeros(1)))
    assert sums[[0, n_tiles // 2, -1], 0].tolist() == counted


# Shape of an operand and of its gate; how many numbers the first and the last program sum up for a gate.
GATES = {
    "one": ((JUST_BELOW,), (1,), (1024, JUST_BELOW % 1024)),
    "of rows": ((JUST_BELOW, 2), (JUST_BELOW, 1), (2, 2)),
    "of long rows": ((2, JUST_BELOW), (2, 1), (1024, JUST_BELOW % 1024)),
    "of columns": ((2, JUST_BELOW), (1, JUST_BELOW), (2, 2)),
    "of long columns": ((JUST_BELOW, 2), (1, 2), (64, JUST_BELOW % 64)),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_summed_over_about_two_to_the_31_elements(name, device, only_the_ends, monkeypatch):
    from torch_sigmoid.kernels import gates, launch, reduce

    before = resident_bytes()
    shape, gate_shape, (first, last) = GATES[name]
    monkeypatch.setattr(reduce, "ENOUGH_PROGRAMS", 2**31)  # a tile each
    reduce.plan_along.cache_clear()
    # A gate of 0: σ' is ¼, and each term 1.
    gate = torch.from_numpy(np.zeros(gate_shape, dtype=np.int16)).view(torch.bfloat16).expand(shape)
    two = torch.full((1,), 2.0, dtype=torch.bfloat16).expand(shape)
    grad = torch.empty(shape, dtype=torch.bfloat16)
    planned = reduce.plan_along(shape, launch.strides_of((grad, two, two, gate)))
    sums = torch.empty(planned.splits, *planned.kept)
    backward, _ = gates.broadcast_launchers("sigmoid", 1.0, None, 0.0)
    backward((two, two, gate), (grad, sums))
    assert (grad.flatten()[0], grad.flatten()[-1]) == (1, 1)
    assert (sums.flatten()[0], sums.flatten()[-1]) == (first, last)
    assert resident_bytes() - before < 2**30
    reduce.plan_along.cache_clear()
