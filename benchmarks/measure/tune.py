"""Launch shapes on a GPU: elements and warps per program.

Measures GB/s of sigmoid's forward and both of its backwards at 2²⁶ elements, with the shape in use and others. If another one
wins, enter it into kernels/launch.py.

Writes tune.csv and .json. Takes a few minutes, and needs a GPU.
"""

import itertools
import sys

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
    """The three kernels: how many tensors each moves, and a function that calls it on the i-th buffers."""
    pairs = [(x, grad) for (x,), grad in buffers]
    return {
        "forward": (2, lambda i: kernels.sigmoid.sigmoid_forward(pairs[i % len(pairs)][0])),
        "backward from output": (3, lambda i: kernels.sigmoid.sigmoid_backward(*pairs[i % len(pairs)], False)),
        "backward from input": (3, lambda i: kernels.sigmoid.sigmoid_backward(*pairs[i % len(pairs)], True)),
    }


def with_shape(run, elements, warps):
    """`run` with this launch shape, after dropping the plans and launches that were kept for another one."""
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
    arguments = record.parser("tune", __doc__, device=False).parse_args(argv)
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
