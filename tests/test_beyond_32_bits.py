"""More than 2³¹ elements, without the memory: the programs at both ends run, and no page in between is touched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import random

import torch_sigmoid
from torch_sigmoid import autograd

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
