"""Kernels that each operator launches, and memory that it keeps: torch's and ours.

kernels   in forward, backward and double backward, on tensors of (8, 8): the torch operators that compute something, each of
          which is one kernel on a GPU, and our launches. Without a GPU's driver, Triton's interpreter makes the launches
products  of matrices among them, in forward and backward
saved     the storage that autograd keeps, each once: beside the kernels in tensors of the output's size (of the input's, for a
          loss), and on tensors of realistic size in bytes per element, for each dtype
peak      on a GPU: bytes per element allocated above the operands, at the highest, until forward has returned and until
          backward has; the upstream gradient is not counted

Checks each result before it counts. Writes counts.csv and .json (kernels) to the folder `cpu`, and memory.csv and .json to the
device's folder. Takes about two minutes.
"""

import contextlib
import os
import subprocess
import sys
from unittest import mock

import torch
from torch._decomp import decompositions
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sigmoid import dispatch, kernels

from . import record
from .operators import Operator, differentiable, operators, orders
from .speed import Case, build, check, checked

ROWS = COLUMNS = 8
# How many elements an operand has while its memory is measured.
ELEMENTS = {"cuda": 1 << 24, "cpu": 1 << 20}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
ALLOCATE = ("aten::empty", "aten::new_empty")
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
BCE = torch.ops.aten.binary_cross_entropy_with_logits.default


class Counter(TorchDispatchMode):
    """Counts the torch operators that compute something, and the launches of our kernels."""

    def __init__(self):
        super().__init__()
        self.operators = self.launches = self.products = 0
        self.launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is BCE:
            # To a mode this is one operator; count those that it runs.
            with self:
                return decompositions.binary_cross_entropy_with_logits(*args, **(kwargs or {}))
        name = func._schema.name
        computes = not (func.is_view or name in ("aten::detach", "aten::promote_types") or name.startswith(ALLOCATE))
        self.operators += computes and not self.launching
        self.products += name in PRODUCTS
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return self.operators + self.launches


@contextlib.contextmanager
def counted():
    """A Counter of what runs in this context, except for the torch operators that Triton's interpreter itself uses."""
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
        # The kernels step aside for a mode that records operators; this mode must see them launched.
        stack.enter_context(mock.patch.object(dispatch, "modes_listen", return_value=False))
        yield stack.enter_context(counter)


def count(function, leaves) -> dict[str, Counter]:
    """A counter for each of forward, backward and double backward."""
    counters = {}
    for order, call in orders(function, leaves):
        with counted() as counters[order]:
            call()
    return counters


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
    """Bytes allocated above what was there before, at the peak of forward, and of forward and backward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = function(*leaves)
    forward = torch.cuda.max_memory_allocated() - before
    torch.autograd.grad(y, differentiable(leaves), grad)
    return forward, torch.cuda.max_memory_allocated() - before


def row_of(name: str, operator: Operator, label: str) -> dict:
    function = operator.providers[label].function
    leaves = operator.leaves(operator.operands(torch.randn, ROWS, COLUMNS))
    counters = count(function, leaves)
    launched = {order: counter.kernels for order, counter in counters.items()}
    products = counters["forward"].products + counters["backward"].products
    saved = saved_bytes(function, *leaves) / (ROWS * COLUMNS * leaves[0].itemsize)
    return {"operator": name, "provider": label} | launched | {"products": products, "saved": saved}


def count_kernels() -> list[dict]:
    rows = []
    for name, operator in operators().items():
        for label in ("torch", "ours") if operator.family != "sigmoid" else ():
            check(f"{name} by {label}", operator, operator.providers[label], Case(torch.float32, "dense", 64), CPU)
            rows.append(row_of(name, operator, label))
    return rows


def measure_memory(device: torch.device) -> list[dict]:
    elements = ELEMENTS[device.type]
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


@record.reporting
def main(argv=None) -> int:
    arguments = record.parser("counts", __doc__).parse_args(argv)
    device = arguments.device
    if kernels.INTERPRETED:
        rows = count_kernels()
        record.write(record.folder_of(CPU, arguments.out), "counts", rows, record.environment(CPU))
        record.show("Kernels of each derivative, and tensors saved", rows)
        return 0
    rows = measure_memory(device)
    record.write(record.folder_of(device, arguments.out), "memory", rows, record.environment(device))
    record.show(f"Bytes per element on {record.device_name(device)}", rows)
    if kernels.UNAVAILABLE:
        print(f"counts: launches are not counted, {kernels.UNAVAILABLE}")
        return 0
    # Triton decides when the kernels are imported, which has happened, so a second process interprets them.
    command = [sys.executable, "-m", "benchmarks.measure.counts", "--out", str(arguments.out.resolve())]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=record.ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
