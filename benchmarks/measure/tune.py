"""Launch shapes that might win: elements a program, warps a program. What is measured best belongs into kernels/launch.py.

On a GPU: GB/s of forward and of both backwards at 2²⁶ elements, for each shape. The shape in use is among them.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from torch_sigmoid import kernels

from . import record
from .operators import operators
from .speed import Case, make_buffers, measure

N = 1 << 26
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = (512, 1024, 2048, 4096)
WARPS = (2, 4, 8)
ROUNDS = 10


def launches(buffers):
    """The three kernels as functions of a buffer's index, and the tensors that each moves."""
    pairs = [(x, grad) for (x,), grad in buffers]
    return {
        "forward": (2, lambda i: kernels.sigmoid_forward(pairs[i % len(pairs)][0])),
        "backward from output": (3, lambda i: kernels.sigmoid_backward(*pairs[i % len(pairs)], False)),
        "backward from input": (3, lambda i: kernels.sigmoid_backward(*pairs[i % len(pairs)], True)),
    }


def with_shape(run, elements, warps):
    """`run` under this launch shape: plans and kept launches of another are dropped first."""
    from torch_sigmoid.kernels import launch, sigmoid

    launchers = [sigmoid._forward, *sigmoid._backward.values()]

    def reshaped(i):
        in_place = launch.TILE_ELEMENTS, launch.NUM_WARPS
        if in_place != (elements, warps):
            launch.TILE_ELEMENTS, launch.NUM_WARPS = elements, warps
            launch.plan.cache_clear()
            for launcher in launchers:
                launcher.kept.clear()
        run(i)

    return reshaped


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or kernels.UNAVAILABLE:
        print(f"tune: skipped, {kernels.UNAVAILABLE or 'there is no GPU'}")
        return 0
    from torch_sigmoid.kernels import launch

    device = torch.device("cuda")
    in_use = launch.TILE_ELEMENTS, launch.NUM_WARPS
    rows = []
    for dtype in record.progress(DTYPES, "launch shapes"):
        buffers = make_buffers(operators()["sigmoid"], Case(dtype, "dense", N), device)
        for name, (tensors, run) in launches(buffers).items():
            shapes = list(itertools.product(ELEMENTS, WARPS))
            samples = measure({shape: with_shape(run, *shape) for shape in shapes}, device, ROUNDS)
            for shape, values in samples.items():
                median, low, high = record.quantiles(values)
                rows.append(
                    {
                        "kernel": name,
                        "dtype": record.short(dtype),
                        "elements a program": shape[0],
                        "warps": shape[1],
                        "in use": shape == in_use,
                        "GB/s": round(tensors * N * dtype.itemsize / median / 1e9, 1),
                        "20 %": round(tensors * N * dtype.itemsize / high / 1e9, 1),
                        "80 %": round(tensors * N * dtype.itemsize / low / 1e9, 1),
                    }
                )
    record.write(record.folder_of(device, arguments.out), "tune", rows, record.environment(device))
    record.show(f"Launch shapes on {record.device_name(device)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
