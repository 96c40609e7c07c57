"""What a small sigmoid costs on the host: 1024 elements, for which a GPU's own time hardly counts.

call    one forward of the function, without gradient
chain   forward and backward of one function in a chain of eight
layer   forward and backward of one layer in a chain of eight
graph   on a GPU: the same as `layer`, replayed as a CUDA graph, until the device is done

Of gates and losses, beside torch's formula, "call" and "layer" of the function. Each takes what the one before gives as its
first operand, and others of its own. Where the output has not the shape of an operand, as that of `glu` and of a mean, there is
no chain: forward and backward of one call are repeated eight times.

"floor" is the least that a Function in Python can cost, whatever it computes: torch.sigmoid forward, one product backward.

On a GPU the first three are read off the clock without waiting for the device. Without a GPU they run in a process whose CUDA
driver is a stub that returns at once (stub.py). Torch's times then contain its arithmetic on the CPU, half a microsecond; ours
contain dispatch and launch as on a GPU, but for the driver's own part.

Writes host.csv and .json. Takes about two minutes; the first time half a minute more, to compile.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import torch_sigmoid
from torch_sigmoid.internals import apply_of

from . import record, stub
from .operators import differentiable, operators
from .speed import Case, check

ELEMENTS = 1024
LAYERS = 8
ROUNDS, CALLS = 100, 40
# There are twelve gates and losses.
ROUNDS_OF_OTHERS, CALLS_OF_OTHERS = 40, 10
DTYPES = (torch.float32, torch.bfloat16)


class FloorFunction(torch.autograd.Function):
    """Not the gradient of sigmoid, but as many tensors saved, and one operator."""

    @staticmethod
    def forward(ctx, x):
        output = torch.sigmoid(x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0]


floor = apply_of(FloorFunction)


class Floor(torch.nn.Module):
    def forward(self, x):
        return floor(x)


# "call" and "chain" call these, and "layer" the modules of operators.py and `Floor`.
FUNCTIONS = {
    "torch": torch.sigmoid,
    "ours, output": torch_sigmoid.sigmoid,
    "ours, input": lambda x: torch_sigmoid.sigmoid(x, save="input"),
    "floor": floor,
}


def chain(function, leaves):
    """A call of forward and backward through LAYERS of `function`; of one each, where its output cannot be its operand."""
    first, *others = leaves
    own = [[other.detach().requires_grad_(other.requires_grad) for other in others] for _ in range(LAYERS)]
    output = function(*leaves)
    grad = torch.randn_like(output)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    all_wanted = [first, *(leaf for layer in own for leaf in layer if leaf.requires_grad)]

    def run():
        h = first
        for layer in own:
            h = function(h, *layer)
        torch.autograd.grad(h, all_wanted, grad)

    def repeat():
        for _ in range(LAYERS):
            torch.autograd.grad(function(*leaves), wanted, grad)

    return run if output.shape == first.shape else repeat


def forward(function, leaves):
    def run():
        with torch.no_grad():
            for _ in range(LAYERS):
                function(*leaves)

    return run


def captured(run):
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def sample(runs, synchronize, rounds, calls):
    """Seconds per layer, for each run and round; the runs take turns, in an order that changes."""
    samples = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(calls):
            run()
    order = list(runs)
    gc.collect()
    gc.disable()
    for _ in record.progress(range(rounds), "host cost"):
        order.append(order.pop(0))
        for name in order:
            run = runs[name]
            run()
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if name[0] == "graph":
                synchronize()
            samples[name].append((time.perf_counter() - start) / calls / LAYERS)
            synchronize()
    gc.enable()
    return samples


def expected_launches(name, label, dtype):
    """Of a forward and a backward."""
    if name != "sigmoid":
        return {"torch": 0, "ours": 2}[label]
    # save="output" launches a kernel only for a backward that torch rounds differently: that of 16 bit.
    return {"torch": 0, "floor": 0, "naive Triton": 2, "ours, input": 1, "ours, output": int(dtype.itemsize == 2)}[label]


def check_launches(name, label, function, leaves):
    """The stub computes no values, so check that a provider launches as many kernels as it should."""
    launches, dtype = stub.last_launch(0), leaves[0].dtype
    before, output = launches.launches, function(*leaves)
    torch.autograd.grad(output, differentiable(leaves), torch.ones_like(output))
    expected = expected_launches(name, label, dtype)
    if launches.launches - before != expected:
        raise record.WrongResultError(f"{name} by {label} in {dtype}: {launches.launches - before} launches, not {expected}")


def runs_of(name, operator, dtype, device, stubbed):
    """What is timed of an operator in a dtype, by what and provider; checked before."""
    providers = {label: each.function for label, each in operator.providers.items() if not each.foreign}
    providers.pop("torch.compile")
    if name == "sigmoid":
        providers["floor"] = Floor()
    leaves = operator.leaves(operator.build(lambda *shape: torch.randn(shape, dtype=dtype, device=device), ELEMENTS))
    runs = {}
    for label, function in providers.items():
        if stubbed:
            check_launches(name, label, function, leaves)
        elif label != "floor":
            check(f"{name} by {label}", operator, operator.providers[label], Case(dtype, "dense", ELEMENTS), device)
        called = FUNCTIONS.get(label, function) if name == "sigmoid" else function
        runs["call", label] = forward(called, leaves)
        runs["layer", label] = chain(function, leaves)
        if name == "sigmoid":
            runs["chain", label] = chain(called, leaves)
            if not stubbed:
                runs["graph", label] = captured(runs["layer", label])
    return runs


def measure(device, stubbed):
    synchronize = (lambda: None) if stubbed else torch.cuda.synchronize
    rows = []
    for name, operator in operators().items():
        if operator.family == "siglip":
            continue
        rounds = (ROUNDS, CALLS) if name == "sigmoid" else (ROUNDS_OF_OTHERS, CALLS_OF_OTHERS)
        own = []
        for dtype in DTYPES:
            samples = sample(runs_of(name, operator, dtype, device, stubbed), synchronize, *rounds)
            medians = {key: record.quantiles(values)[0] for key, values in samples.items()}
            for (what, label), values in samples.items():
                row = {"operator": name, "what": what, "dtype": record.short(dtype), "provider": label}
                row |= record.timing(values) | {"time / torch": round(medians[what, label] / medians[what, "torch"], 3)}
                own.append(row)
        rows += sorted(own, key=lambda row: (row["what"], row["dtype"] != "fp32"))
    return rows


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("host", __doc__, device=False)
    parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    stubbed = arguments.stub
    if not torch.cuda.is_available() and not stubbed:
        if reason := stub.unavailable():
            print(f"host: skipped, there is no GPU and no stub of one: {reason}")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.measure.host", "--stub", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=stub.environment(Path(folder)), cwd=record.ROOT).returncode
    device = torch.device("cpu" if stubbed else "cuda")
    if stubbed:
        stub.activate()
        torch.set_num_threads(1)
    rows = measure(device, stubbed)
    about = record.environment(device)
    if stubbed:
        about["device"] = f"stub of a CUDA driver on a {about['device']}"
    record.write(record.folder_of(device, arguments.out), "host", rows, about)
    record.show(f"Host cost at {ELEMENTS} elements, µs: {about['device']}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
