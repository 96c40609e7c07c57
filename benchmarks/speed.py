"""Time over size, dtype and layout, beside torch eager, torch.compile and a naive Triton Function.

On a GPU: forward, backward and both, over 2¹⁰ to 2²⁸ elements, odd sizes, pointers off their alignment, channels_last, rows of
a slice and expanded upstream gradients; GB/s from the traffic that no implementation can avoid, and the fraction of what a copy
reaches in the same run. On a CPU: forward and both, fp32, against torch.nn.Sigmoid.

Providers take turns within a round, in an order that changes from round to round, on buffers that together exceed the L2 cache.
A sample is a batch of calls between two events (two clock readings on a CPU); medians and 20/80 % quantiles over the rounds.
"""

import argparse
import collections
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import record
from .operators import TOLERANCE, operators

MODES = ("forward", "backward", "both")
LAYOUT_SIZE = 1 << 24
SIZES = {"cuda": tuple(1 << k for k in range(10, 29, 2)), "cpu": tuple(1 << k for k in range(10, 25, 2))}
DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32,)}
ROUNDS = {"cuda": 20, "cpu": 60}
# One thread: with several, another process on a core costs a whole time slice at the end of every operator.
CPU_THREADS = 1
BATCH_SECONDS = {"cuda": 1e-3, "cpu": 2e-3}
# torch.compile takes seconds for each shape, so it is measured at these sizes and in every layout.
COMPILED_SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
MAX_BUFFERS = 64
CHECKED_ELEMENTS = 1 << 20


class Case(NamedTuple):
    dtype: torch.dtype
    layout: str
    n: int


def dense(n, dtype, device):
    return torch.randn(n, dtype=dtype, device=device), torch.randn(n, dtype=dtype, device=device)


def odd(n, dtype, device):
    return dense(n + 7, dtype, device)


def off_alignment(n, dtype, device):
    return tuple(tensor[1:] for tensor in dense(n + 1, dtype, device))


def channels_last(n, dtype, device):
    shape = (max(1, n // (64 * 64 * 64)), 64, 64, 64)
    return tuple(torch.randn(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last) for _ in range(2))


def rows_of_a_slice(n, dtype, device):
    return tuple(torch.randn(n // 1000, 1024, dtype=dtype, device=device)[:, :1000] for _ in range(2))


def expanded_gradient(n, dtype, device):
    """Of `.sum().backward()`: one number, so a tensor less to read."""
    return torch.randn(n, dtype=dtype, device=device), torch.randn((), dtype=dtype, device=device).expand(n)


LAYOUTS = {
    function.__name__.replace("_", " "): function
    for function in (dense, odd, off_alignment, channels_last, rows_of_a_slice, expanded_gradient)
}


def cases(device_type):
    """Every dtype over all sizes, then in every other layout at one size."""
    for dtype in DTYPES[device_type]:
        yield from (Case(dtype, "dense", n) for n in SIZES[device_type])
        if device_type != "cpu":
            yield from (Case(dtype, layout, LAYOUT_SIZE) for layout in LAYOUTS if layout != "dense")


def gradient(function, x, grad):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check(name, operator, provider, case, device):
    """WrongResultError unless value and gradient are the formula's, up to a few roundings of the dtype.

    A gradient may come from the true x or from the provider's own rounded output: both are what somebody promises.
    """
    n = min(case.n, CHECKED_ELEMENTS)
    x, grad = LAYOUTS[case.layout](n, case.dtype, device)
    y, actual = gradient(provider.function, x, grad)
    value, derivative = operator.exact(x)
    from_x, from_y = grad.double() * derivative, grad.double() * y.double() * (1 - y.double())
    scale = from_x.abs() + torch.finfo(case.dtype).smallest_normal
    errors = {
        "value": (y.double() - value).abs() / value,
        "gradient": torch.minimum((actual.double() - from_x).abs(), (actual.double() - from_y).abs()) / scale,
    }
    for what, error in errors.items():
        worst = error.max().item()
        if not worst <= TOLERANCE[case.dtype]:
            raise record.WrongResultError(f"{name}, {case}: the {what} is off by {worst:.2g} of itself")


def make_buffers(case, device):
    """Inputs and gradients that together exceed the L2 cache, so that no call finds its operands there."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = min(MAX_BUFFERS, 1 + math.ceil(2 * l2 / (2 * case.n * case.dtype.itemsize)))
    return [LAYOUTS[case.layout](case.n, case.dtype, device) for _ in range(count)]


def prepare(function, mode, buffers):
    """`run(i)`: the timed call on the i-th buffers. Graphs of "backward" are built here, outside of the timing.

    As many results are held as there are buffers, lest each be written where the last one is still in the L2 cache.
    """
    grad_of = torch.autograd.grad
    results = collections.deque(maxlen=len(buffers) if len(buffers) > 1 else 0)
    if mode == "forward":
        return lambda i: results.append(function(buffers[i % len(buffers)][0]))
    leaves = [(x.detach().requires_grad_(), grad) for x, grad in buffers]
    if mode == "both":

        def both(i):
            x, grad = leaves[i % len(leaves)]
            y = function(x)
            results.append((y, grad_of(y, x, grad)))

        return both
    graphs = [(function(x), x, grad) for x, grad in leaves]

    def backward(i):
        results.append(grad_of(*graphs[i % len(graphs)], retain_graph=True))

    return backward


class Timer:
    """Seconds of a call within a batch of `k`: by events on a GPU, by the clock on a CPU."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, run, k):
        if not self.cuda:
            start = time.perf_counter()
            for i in range(k):
                run(i)
            return (time.perf_counter() - start) / k
        start, end = self.events
        start.record()
        for i in range(k):
            run(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / k


def measure(runs, device, rounds):
    """Samples of each provider, in seconds."""
    timer = Timer(device)
    for run in runs.values():
        for i in range(3):
            run(i)
    slowest = max(timer(run, 3) for run in runs.values())
    k = max(1, min(1000, math.ceil(BATCH_SECONDS[device.type] / slowest)))
    samples = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in order:
            runs[name](0)
            samples[name].append(timer(runs[name], k))
    return samples


def rows_of(name, operator, case, mode, samples, copy_rate):
    """One row a provider, with its ratio to every provider but ours."""
    tensors = {"forward": operator.forward_tensors, "backward": operator.backward_tensors}
    if case.layout == "expanded gradient":
        tensors["backward"] -= 1
    tensors["both"] = sum(tensors.values())
    medians = {provider: record.quantiles(values)[0] for provider, values in samples.items()}
    for provider, values in samples.items():
        median, low, high = record.quantiles(values)
        rate = tensors[mode] * case.n * case.dtype.itemsize / median / 1e9
        row = {
            "operator": name,
            "provider": provider,
            "mode": mode,
            "dtype": record.short(case.dtype),
            "layout": case.layout,
            "n": case.n,
            "microseconds": round(median * 1e6, 3),
            "20 %": round(low * 1e6, 3),
            "80 %": round(high * 1e6, 3),
            "GB/s": round(rate, 1),
        }
        if copy_rate:
            row["of a copy"] = round(rate / copy_rate, 3)
        others = [other for other in medians if not other.startswith("ours") and other != provider]
        yield row | {f"time / {other}": round(median / medians[other], 3) for other in others}


def copy_rate_of(buffers, case, device, rounds):
    """GB/s of a device-to-device copy of the same tensors, read and write counted."""
    runs = {"copy": lambda i: buffers[i % len(buffers)][1].copy_(buffers[i % len(buffers)][0])}
    (samples,) = measure(runs, device, rounds).values()
    return 2 * case.n * case.dtype.itemsize / record.quantiles(samples)[0] / 1e9


def run(device, rounds, seconds):
    """All rows, and the cases that there was no time for."""
    rows, skipped, end = [], [], time.monotonic() + seconds
    work = list(itertools.product(operators().items(), cases(device.type)))
    for (name, operator), case in record.progress(work, f"speed on {device}"):
        if time.monotonic() > end:
            skipped.append(str(case))
            continue
        torch._dynamo.reset()
        chosen = {
            label: provider
            for label, provider in operator.providers.items()
            if device.type in provider.devices
            and (label != "torch.compile" or case.layout != "dense" or case.n in COMPILED_SIZES)
        }
        for label, provider in chosen.items():
            check(f"{name} by {label}", operator, provider, case, device)
        buffers = make_buffers(case, device)
        copyable = device.type == "cuda" and case.layout != "expanded gradient"
        rate = copy_rate_of(buffers, case, device, rounds) if copyable else None
        for mode in MODES if device.type == "cuda" else ("forward", "both"):
            if case.layout == "expanded gradient" and mode == "forward":
                continue
            runs = {label: prepare(provider.function, mode, buffers) for label, provider in chosen.items()}
            rows += rows_of(name, operator, case, mode, measure(runs, device, rounds), rate)
        del buffers, runs
    return rows, skipped


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=record.default_device())
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out the cases that would begin after this time")
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("speed: skipped, there is no GPU")
        return 0
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    try:
        rows, skipped = run(device, arguments.rounds or ROUNDS[device.type], arguments.seconds)
    except record.WrongResultError as error:
        print(f"speed: FAILED, {error}")
        return 1
    record.write(record.folder_of(device, arguments.out), "speed", rows, record.environment(device), skipped=skipped)
    columns = ["provider", "mode", "dtype", "layout", "n", "microseconds", "GB/s", "of a copy", "time / torch"]
    record.show(f"Speed on {record.device_name(device)}", rows, columns if device.type == "cuda" else None)
    if skipped:
        print(f"not measured for want of time: {', '.join(skipped)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
