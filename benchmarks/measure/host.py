"""What a small sigmoid costs on the host: 1024 elements, for which a GPU's own time hardly counts.

call    one forward of the function, without gradient
chain   forward and backward of one function in a chain of eight
layer   forward and backward of one layer in a chain of eight
graph   on a GPU: the same as `layer`, replayed as a CUDA graph, until the device is done

On a GPU the first three are read off the clock without waiting for the device. Without a GPU they run in a process whose CUDA
driver is a stub that returns at once (stub.py). Torch's times then contain its arithmetic on the CPU, half a microsecond; ours
contain dispatch and launch as on a GPU, but for the driver's own part.

Writes host.csv and .json. Takes about a minute.
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

from . import record, stub
from .operators import operators
from .speed import Case, check

ELEMENTS = 1024
LAYERS = 8
ROUNDS, CALLS = 150, 40
DTYPES = (torch.float32, torch.bfloat16)
# "call" and "chain" call these, and "layer" the modules of operators.py.
FUNCTIONS = {
    "torch": torch.sigmoid,
    "ours, output": torch_sigmoid.sigmoid,
    "ours, input": lambda x: torch_sigmoid.sigmoid(x, save="input"),
}


def chain(function, x, grad):
    """A call of forward and backward through LAYERS of `function`."""

    def run():
        h = x
        for _ in range(LAYERS):
            h = function(h)
        torch.autograd.grad(h, x, grad)

    return run


def forward(function, x):
    def run():
        with torch.no_grad():
            for _ in range(LAYERS):
                function(x)

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


def sample(runs, synchronize):
    """Seconds per layer, for each run and round; the runs take turns, in an order that changes."""
    samples = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(CALLS):
            run()
    order = list(runs)
    gc.collect()
    gc.disable()
    for _ in record.progress(range(ROUNDS), "host cost"):
        order.append(order.pop(0))
        for name in order:
            run = runs[name]
            run()
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            if name[0] == "graph":
                synchronize()
            samples[name].append((time.perf_counter() - start) / CALLS / LAYERS)
            synchronize()
    gc.enable()
    return samples


def check_launches(providers):
    """The stub computes no values, so check that each provider launches as many kernels as it should."""
    launches = stub.last_launch(0)
    for dtype in DTYPES:
        x = torch.randn(ELEMENTS, dtype=dtype, requires_grad=True)
        for label, provider in providers.items():
            before = launches.launches
            torch.autograd.grad(provider.function(x), x, torch.ones_like(x))
            # save="output" launches a kernel only for a backward that torch rounds differently: that of 16 bit.
            expected = {"torch": 0, "naive Triton": 2, "ours, input": 1, "ours, output": int(dtype.itemsize == 2)}[label]
            if launches.launches - before != expected:
                raise record.WrongResultError(f"{label} in {dtype}: {launches.launches - before} launches, not {expected}")


def measure(device, stubbed):
    name, operator = "sigmoid", operators()["sigmoid"]
    providers = {label: provider for label, provider in operator.providers.items() if label != "torch.compile"}
    if stubbed:
        check_launches(providers)
    else:
        for label, provider in providers.items():
            for dtype in DTYPES:
                check(f"{name} by {label}", operator, provider, Case(dtype, "dense", ELEMENTS), device)
    rows = []
    for dtype in DTYPES:
        x = torch.randn(ELEMENTS, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn(ELEMENTS, dtype=dtype, device=device)
        runs = {}
        for label, provider in providers.items():
            function = FUNCTIONS.get(label, provider.function)
            runs["call", label] = forward(function, x)
            runs["chain", label] = chain(function, x, grad)
            runs["layer", label] = chain(provider.function, x, grad)
            if not stubbed:
                runs["graph", label] = captured(runs["layer", label])
        samples = sample(runs, (lambda: None) if stubbed else torch.cuda.synchronize)
        medians = {key: record.quantiles(values)[0] for key, values in samples.items()}
        for (what, label), values in samples.items():
            row = {"operator": name, "what": what, "dtype": record.short(dtype), "provider": label} | record.timing(values)
            rows.append(row | {"time / torch": round(medians[what, label] / medians[what, "torch"], 3)})
    return sorted(rows, key=lambda row: (row["what"], row["dtype"] != "fp32"))


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
