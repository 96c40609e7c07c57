"""More than 2³¹ elements, without the memory: the programs at both ends run, and no page in between is touched."""

import numpy as np
import pytest
import torch
from reference import random

import torch_sigmoid
from torch_sigmoid import ops

BEYOND_32_BITS = {
    "dense": ((2**31 + 4096,), (1,)),
    # A row of bf16 is 2³³ bytes from the next.
    "rows": ((2, 2**30 + 2048), (2**32, 1)),
}


@pytest.mark.parametrize("layout", BEYOND_32_BITS)
def test_more_than_two_to_the_31_elements(layout, device, kernels):
    """Executed by the first and the last programs, at both ends; the pages in between are never touched."""
    if kernels.ptx is None:
        pytest.skip("the machine that executes PTX can run some of a launch's programs")
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
        grad = ops.sigmoid_backward(x, x, "input")
    finally:
        kernels.ptx.only = None
    for result, function in ((sigma, torch.sigmoid), (grad, lambda x: ops.sigmoid_backward_formula(x, x, "input"))):
        for ours, end in zip(ends_of(result), (head, tail)):
            torch.testing.assert_close(ours, function(end))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB"
