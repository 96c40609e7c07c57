"""What an operator launches in each derivative, and what it keeps: torch's own and ours, on tensors of (8, 8).

forward, backward, double backward    kernels: torch operators that compute something, each of which is a kernel on a GPU, and
                                      launches of ours, counted in Triton's interpreter
saved                                 what autograd keeps, in tensors of the output's size (of the input's, for a loss)
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._decomp import decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sigmoid import kernels, ops

from . import record
from .memory import saved_bytes
from .operators import Operator, differentiable, operators
from .speed import Case, check

ROWS = COLUMNS = 8
CPU = torch.device("cpu")
ALLOCATE = ("aten::empty", "aten::new_empty")
BCE = torch.ops.aten.binary_cross_entropy_with_logits.default


class Counter(TorchDispatchMode):
    """Counts the torch operators that compute something, and the launches of our kernels."""

    def __init__(self):
        super().__init__()
        self.operators = self.launches = 0
        self.launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is BCE:
            # One operator to a mode, which runs these.
            with self:
                return decompositions.binary_cross_entropy_with_logits(*args, **(kwargs or {}))
        name = func._schema.name
        computes = not (func.is_view or name in ("aten::detach", "aten::promote_types") or name.startswith(ALLOCATE))
        self.operators += computes and not self.launching
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return self.operators + self.launches


@contextlib.contextmanager
def counted():
    """A Counter of what runs in this context; what Triton's interpreter does in torch operators is not counted."""
    with contextlib.ExitStack() as stack:
        counter = Counter()
        if not kernels.UNAVAILABLE:
            from torch_sigmoid.kernels import launch

            call = launch.Launcher.__call__

            def launched(*arguments):
                outermost, counter.launching = not counter.launching, True
                counter.launches += outermost
                call(*arguments)
                counter.launching = not outermost

            stack.enter_context(mock.patch.object(launch.Launcher, "__call__", launched))
        # The kernels give way to a mode that records operators; this one is meant to see them launched.
        stack.enter_context(mock.patch.object(ops, "modes_listen", return_value=False))
        yield stack.enter_context(counter)


def count(function, leaves) -> list[Counter]:
    """Of forward, backward and double backward."""
    inputs = differentiable(leaves)
    output = function(*leaves)
    upstream = torch.ones_like(output).requires_grad_()
    grads = torch.autograd.grad(output, inputs, upstream, create_graph=True)
    v = [torch.ones_like(grad) for grad in grads]
    counters = []
    for call in (
        lambda: function(*leaves),
        lambda: torch.autograd.grad(output, inputs, upstream.detach(), retain_graph=True),
        lambda: torch.autograd.grad(grads, (upstream, *inputs), v),
    ):
        with counted() as counter:
            call()
        counters.append(counter)
    return counters


def row_of(name: str, operator: Operator, label: str) -> dict:
    function = operator.providers[label].function
    leaves = operator.leaves(operator.operands(torch.randn, ROWS, COLUMNS))
    numbers = [counter.kernels for counter in count(function, leaves)]
    saved = saved_bytes(function, *leaves) / (ROWS * COLUMNS * leaves[0].itemsize)
    derivatives = dict(zip(("forward", "backward", "double backward"), numbers))
    return {"operator": name, "provider": label} | derivatives | {"saved": saved}


def measure():
    rows = []
    for name, operator in operators().items():
        for label in ("torch", "ours") if operator.family != "sigmoid" else ():
            check(f"{name} by {label}", operator, operator.providers[label], Case(torch.float32, "dense", 64), CPU)
            rows.append(row_of(name, operator, label))
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks counts", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args(argv)
    if kernels.UNAVAILABLE:
        print(f"counts: skipped, {kernels.UNAVAILABLE}")
        return 0
    if not kernels.INTERPRETED:
        command = [sys.executable, "-m", "benchmarks.measure.counts", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=record.ROOT).returncode
    try:
        rows = measure()
    except record.WrongResultError as error:
        print(f"counts: FAILED, {error}")
        return 1
    record.write(record.folder_of(CPU, arguments.out), "counts", rows, record.environment(CPU))
    record.show("Kernels of each derivative, and tensors saved", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
