"""What an operator keeps for backward, and on a GPU what it needs at its peak, in bytes per element of its output.

saved           storage that autograd keeps, each once: measured with saved-tensor hooks, on any device
peak forward    allocated above the operands once forward has returned, at the highest
peak both       the same until backward has returned, the upstream gradient not counted
"""

import argparse
import sys
from pathlib import Path

import torch

from . import record
from .operators import differentiable, operators
from .speed import Case, build, checked

ELEMENTS = 1 << 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved_bytes(function, *leaves):
    """Bytes of the distinct storages that the graph of function(*leaves) keeps."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(*leaves)
    del y
    return sum(storages.values())


def peaks(function, leaves, grad):
    """Bytes above what was there before, at the peak of forward and of forward and backward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = function(*leaves)
    forward = torch.cuda.max_memory_allocated() - before
    torch.autograd.grad(y, differentiable(leaves), grad)
    return forward, torch.cuda.max_memory_allocated() - before


def measure(device):
    elements = ELEMENTS if device.type == "cuda" else ELEMENTS >> 4
    rows = []
    work = [(name, operator, dtype) for name, operator in operators().items() for dtype in DTYPES]
    for name, operator, dtype in record.progress(work, "memory"):
        torch._dynamo.reset()
        for label, provider in checked(name, operator, Case(dtype, "dense", 1 << 12), device).items():
            operands, grad = build(operator, Case(dtype, "expanded gradient", elements), device)
            leaves = operator.leaves(operands)
            torch.autograd.grad(provider.function(*leaves), differentiable(leaves), grad)
            row = {"operator": name, "provider": label, "dtype": record.short(dtype), "n": elements}
            row["saved"] = saved_bytes(provider.function, *leaves) / elements
            if device.type == "cuda":
                peak = peaks(provider.function, leaves, grad)
                row["peak forward"], row["peak both"] = (value / elements for value in peak)
            rows.append(row)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=record.default_device())
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device.type == "cpu":
        print("memory: no GPU, so no peaks: what is saved for backward only")
    try:
        rows = measure(device)
    except record.WrongResultError as error:
        print(f"memory: FAILED, {error}")
        return 1
    record.write(record.folder_of(device, arguments.out), "memory", rows, record.environment(device))
    record.show(f"Bytes per element on {record.device_name(device)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
