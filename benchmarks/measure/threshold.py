"""From how many elements on sigmoid's kernels cost no more than torch's operator, by time on a GPU.

Where the two have the same bits, in fp32 with save="output", `torch_below` chooses between them. This measures what there is to
choose: forward, forward and backward, and both with a second derivative, by the kernels at every size and by torch's operator.

Writes threshold.csv and .json. Takes half a minute, and needs a GPU.
"""

import sys

import torch

import torch_sigmoid

from . import record
from .operators import operators
from .speed import Case, make_buffers, measure

SIZES = [2**exponent for exponent in range(20, 28)]
DTYPE = torch.float32
ROUNDS = 10


def forward(x, grad):
    with torch.no_grad():
        return torch_sigmoid.sigmoid(x)


def both(x, grad):
    return torch.autograd.grad(torch_sigmoid.sigmoid(x), x, grad)


def second(x, grad):
    (first,) = torch.autograd.grad(torch_sigmoid.sigmoid(x), x, grad, create_graph=True)
    return torch.autograd.grad(first, x, grad)


MODES = {"forward": forward, "both": both, "second derivative": second}


def by(below, mode, buffers):
    """`run(i)`, which makes the call on the i-th buffers with this `torch_below`."""
    pairs = [(x.detach().requires_grad_(), grad) for (x,), grad in buffers]

    def run(i):
        torch_sigmoid.torch_below(below)
        MODES[mode](*pairs[i % len(pairs)])

    return run


def main(argv=None) -> int:
    arguments = record.parser("threshold", __doc__, device=False).parse_args(argv)
    if not torch.cuda.is_available() or torch_sigmoid.kernels.UNAVAILABLE:
        print(f"threshold: skipped, {torch_sigmoid.kernels.UNAVAILABLE or 'there is no GPU'}")
        return 0
    device = torch.device("cuda")
    before, rows = torch_sigmoid.torch_below(), []
    try:
        for n in record.progress(SIZES, "threshold"):
            buffers = make_buffers(operators()["sigmoid"], Case(DTYPE, "dense", n), device)
            for mode in MODES:
                runs = {"kernels": by(0, mode, buffers), "torch": by(n + 1, mode, buffers)}
                microseconds = {
                    name: 1e6 * record.quantiles(samples)[0] for name, samples in measure(runs, device, ROUNDS).items()
                }
                row = {"mode": mode, "n": n} | {name: round(value, 2) for name, value in microseconds.items()}
                rows.append(row | {"kernels / torch": round(microseconds["kernels"] / microseconds["torch"], 3)})
    finally:
        torch_sigmoid.torch_below(before)
    record.write(record.folder_of(device, arguments.out), "threshold", rows, record.environment(device))
    record.show(f"Microseconds by kernels and by torch's operator on {record.device_name(device)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
