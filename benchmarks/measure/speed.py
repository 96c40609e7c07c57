"""Time over size, dtype and layout, beside torch, torch.compile, other packages and a tutorial's Function.

On a GPU it times forward, backward and both: sigmoid from 2¹⁰ to 2²⁸ elements, at odd sizes, with pointers off their alignment,
channels_last, rows of a slice and expanded upstream gradients; gates and losses at fewer sizes. GB/s count the traffic that no
implementation can avoid, and are also given as a fraction of what a copy reaches in the same run. On a CPU: forward and both,
fp32, one thread, against torch.

Providers take turns within a round, in an order that changes from round to round, on buffers that together exceed the L2 cache.
A sample is a batch of calls between two events (two clock readings on a CPU); a row holds the median and the 20 % and 80 %
quantiles over the rounds. A provider of another package gets operands of its own, because Liger-Kernel's backward overwrites
them. No result is timed before it is checked.

Writes speed, gates, losses and siglip (.csv and .json). Takes about two minutes on a CPU, and about twenty on a GPU.

With --ways it times, on a CPU alone, our operators against torch's formula eager, compiled and exported, and writes ways.csv
and .json, which takes about half an hour on two cores, most of it the first time only, for Inductor; see ways.py.
"""

import collections
import math
import sys
import time
from typing import NamedTuple

import torch
import torch._functorch.config as functorch_config

from . import record
from .operators import TOLERANCE, chosen, differentiable, operators

MODES = ("forward", "backward", "both")
# The families of operators, and the file that each one's results go to.
FILES = {"sigmoid": "speed", "gates": "gates", "losses": "losses", "siglip": "siglip"}
LAYOUT_SIZE = 1 << 24
ROUNDS = {"cuda": 20, "cpu": 60}
# With several threads, each operator would wait for the slowest, which another process may keep off its core.
CPU_THREADS = 1
BATCH_SECONDS = {"cuda": 1e-3, "cpu": 2e-3}
MAX_BUFFERS = 64
CHECKED_ELEMENTS = 1 << 20
WAYS = ("eager", "compiled", "exported")


class Case(NamedTuple):
    dtype: torch.dtype
    layout: str
    n: int


def dense(shape, dtype, device):
    return torch.randn(shape, dtype=dtype, device=device)


def off_alignment(shape, dtype, device):
    return torch.randn(math.prod(shape) + 1, dtype=dtype, device=device)[1:].view(shape)


def channels_last(shape, dtype, device):
    """Images; if the shape is not that of images, others with about as many elements."""
    shape = shape if len(shape) == 4 else (max(1, math.prod(shape) >> 18), 64, 64, 64)
    return torch.randn(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def rows_of_a_slice(shape, dtype, device):
    """Rows with gaps between them; if the shape has no rows, others with about as many elements."""
    rows, columns = shape if len(shape) == 2 else (math.prod(shape) // 1000, 1000)
    return torch.randn(rows, columns + 24, dtype=dtype, device=device)[:, :columns]


# `.sum().backward()` gives an expanded gradient: one number, so one tensor less to read.
LAYOUTS = {
    "dense": dense,
    "odd": dense,
    "off alignment": off_alignment,
    "channels last": channels_last,
    "rows of a slice": rows_of_a_slice,
    "expanded gradient": dense,
}


class Plan(NamedTuple):
    """Which cases are timed: every dtype at all sizes, then, if `other_layouts`, in every other layout at one size.

    torch.compile takes seconds for each shape, so it takes part at `compiled_sizes` and in the other layouts only.
    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    compiled_sizes: tuple[int, ...] = ()
    other_layouts: bool = False

    def cases(self):
        for dtype in self.dtypes:
            yield from (Case(dtype, "dense", n) for n in self.sizes)
            if self.other_layouts:
                yield from (Case(dtype, layout, LAYOUT_SIZE + 7 * (layout == "odd")) for layout in LAYOUTS if layout != "dense")


def powers_of_two(*exponents):
    return tuple(1 << exponent for exponent in exponents)


FEWER_SIZES = Plan((torch.float32, torch.bfloat16), powers_of_two(12, 16, 20, 24, 26), compiled_sizes=powers_of_two(20, 24))
PLANS = {
    ("sigmoid", "cuda"): Plan(
        (torch.float32, torch.bfloat16, torch.float16),
        powers_of_two(*range(10, 29, 2)),
        compiled_sizes=powers_of_two(10, 16, 20, 24, 28),
        other_layouts=True,
    ),
    ("sigmoid", "cpu"): Plan((torch.float32,), powers_of_two(*range(10, 25, 2))),
    ("gates", "cuda"): FEWER_SIZES,
    ("gates", "cpu"): Plan((torch.float32,), powers_of_two(10, 16, 20)),
    ("losses", "cuda"): FEWER_SIZES,
    ("losses", "cpu"): Plan((torch.float32,), powers_of_two(10, 16, 20)),
    # The sizes are those of one features tensor, of width 256: up to 16384 pairs, 1024 on a CPU.
    ("siglip", "cuda"): Plan((torch.float32, torch.bfloat16), powers_of_two(16, 20, 22), compiled_sizes=powers_of_two(20)),
    ("siglip", "cpu"): Plan((torch.float32,), powers_of_two(16, 18)),
}


def build(operator, case, device):
    """The operands and an upstream gradient."""

    def make(*shape):
        return LAYOUTS[case.layout](shape, case.dtype, device)

    operands = operator.build(make, case.n)
    shape = operator.formula(*(operand.to("meta") for operand in operands)).shape
    if case.layout == "expanded gradient":
        return operands, torch.randn((), dtype=case.dtype, device=device).expand(shape)
    return operands, make(*shape)


def value_and_gradients(function, leaves, grad):
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, differentiable(leaves), grad)


def check(name, operator, provider, case, device):
    """Raise WrongResultError unless value and gradients are the formula's in float64, up to a few roundings of the dtype.

    Sums and cancellations leave an error that is small relative to the tensor's largest element, not to each element.
    """
    torch.manual_seed(0)
    n = min(case.n, CHECKED_ELEMENTS + case.n % 16)
    operands, grad = build(operator, case._replace(n=n), device)
    true = truth(operator, operands, grad)
    compare(name, case, value_and_gradients(provider.function, operator.leaves(operands), grad), true)


def truth(operator, operands, grad):
    """Value and gradients of the formula in float64."""
    wide = [operand.double() if operand.is_floating_point() else operand for operand in operands]
    return value_and_gradients(operator.formula, operator.leaves(wide), grad.double())


def compare(name, case, actual, true):
    """Raise WrongResultError unless the results, of which there may be fewer, are the true ones; see `check`."""
    eps, smallest = torch.finfo(case.dtype).eps, torch.finfo(case.dtype).smallest_normal
    for i, (result, exact) in enumerate(zip(actual, true)):
        what = f"gradient {i}" if i else "value"
        try:
            # A matrix product adds up hundreds of roundings; the gradient of a mean may be subnormal in fp16.
            atol = max(2 * eps, min(8 * eps, 1e-6)) * max(exact.abs().max().item(), smallest)
            torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[case.dtype], atol=atol)
        except AssertionError as error:
            raise record.WrongResultError(f"{name}, {case}: the {what} is wrong. {error}") from None


def checked(name, operator, case, device, without=()):
    """The providers that pass the check; if one of torch's or ours does not, WrongResultError."""
    providers = {}
    for label, provider in operator.providers.items():
        if device.type not in provider.devices or label in without:
            continue
        try:
            check(f"{name} by {label}", operator, provider, case, device)
        except Exception as error:
            if not provider.foreign:
                raise
            print(f"left out: {name} by {label}, {case}: {error}")
        else:
            providers[label] = provider
    return providers


def make_buffers(operator, case, device):
    """So many operands and gradients that they exceed the L2 cache: no call finds its own there."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    operands, grad = build(operator, case, device)
    size = grad.nbytes + sum(operand.nbytes for operand in operands)
    count = min(MAX_BUFFERS, 1 + math.ceil(2 * l2 / size))
    return [(operands, grad), *(build(operator, case, device) for _ in range(count - 1))]


def prepare(operator, provider, mode, buffers):
    """`run(i)`, which makes the timed call on the i-th buffers; the graphs for "backward" are built here, untimed.

    It keeps as many results as there are buffers, so that no call writes where the last result is still in the L2 cache.
    """
    function, grad_of = provider.function, torch.autograd.grad
    results = collections.deque(maxlen=len(buffers) if len(buffers) > 1 else 0)
    if provider.foreign:
        buffers = [(tuple(operand.clone() for operand in operands), grad) for operands, grad in buffers]
    if mode == "forward":
        return lambda i: results.append(function(*buffers[i % len(buffers)][0]))
    leaves = [(operator.leaves(operands), grad) for operands, grad in buffers]
    leaves = [(own, differentiable(own), grad) for own, grad in leaves]
    if mode == "both":

        def both(i):
            operands, inputs, grad = leaves[i % len(leaves)]
            y = function(*operands)
            results.append((y, grad_of(y, inputs, grad)))

        return both
    graphs = [(function(*operands), inputs, grad) for operands, inputs, grad in leaves]

    def backward(i):
        results.append(grad_of(*graphs[i % len(graphs)], retain_graph=True))

    return backward


class Timer:
    """Seconds per call in a batch of `k`: by events on a GPU, by the clock on a CPU."""

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


def traffic(operator, operands, grad):
    """Bytes that no implementation can avoid moving: each tensor once, and of an expanded gradient its one number."""
    read = sum(operand.nbytes for operand in operands)
    written = sum(leaf.nbytes for leaf in differentiable(operator.leaves(operands)))
    upstream = grad.nbytes if any(grad.stride()) else grad.itemsize
    moved = {"forward": read + grad.nbytes, "backward": read + upstream + written}
    return moved | {"both": sum(moved.values())}


def rows_of(name, case, mode, samples, moved, copy_rate):
    """A row for each provider, with its time over that of every other provider that is not ours."""
    medians = {provider: record.quantiles(values)[0] for provider, values in samples.items()}
    for provider, values in samples.items():
        rate = moved / medians[provider] / 1e9
        row = {
            "operator": name,
            "provider": provider,
            "mode": mode,
            "dtype": record.short(case.dtype),
            "layout": case.layout,
            "n": case.n,
            **record.timing(values),
            "GB/s": round(rate, 1),
        }
        if copy_rate:
            row["of a copy"] = round(rate / copy_rate, 3)
        others = [other for other in medians if not other.startswith("ours") and other != provider]
        yield row | {f"time / {other}": round(medians[provider] / medians[other], 3) for other in others}


def copy_rate_of(buffers, device, rounds):
    """GB/s of a device-to-device copy of the first operand, counting what it reads and writes."""
    sources = [operands[0] for operands, _ in buffers]
    runs = {"copy": lambda i: sources[(i + 1) % len(sources)].copy_(sources[i % len(sources)])}
    (samples,) = measure(runs, device, rounds).values()
    return 2 * sources[0].nbytes / record.quantiles(samples)[0] / 1e9


# A compiled backward that writes over what forward has kept could not be repeated.
@functorch_config.patch(donated_buffer=False)
def run(device, selection, rounds, seconds):
    """All rows, and the cases that would have begun after `seconds`."""
    rows, skipped, end = [], [], time.monotonic() + seconds
    plans = {name: PLANS[operator.family, device.type] for name, operator in selection.items()}
    work = [(name, case) for name, plan in plans.items() for case in plan.cases()]
    for name, case in record.progress(work, f"speed on {device}"):
        if time.monotonic() > end:
            skipped.append(f"{name}, {case}")
            continue
        torch._dynamo.reset()
        operator = selection[name]
        compiled = case.layout != "dense" or case.n in plans[name].compiled_sizes
        providers = checked(name, operator, case, device, without=() if compiled else ("torch.compile",))
        buffers = make_buffers(operator, case, device)
        moved = traffic(operator, *buffers[0])
        copyable = device.type == "cuda" and case.layout != "expanded gradient"
        rate = copy_rate_of(buffers, device, rounds) if copyable else None
        for mode in MODES if device.type == "cuda" else ("forward", "both"):
            if case.layout == "expanded gradient" and mode == "forward":
                continue
            runs = {label: prepare(operator, provider, mode, buffers) for label, provider in providers.items()}
            rows += rows_of(name, case, mode, measure(runs, device, rounds), moved[mode], rate)
        del buffers, runs
    return rows, skipped


def run_ways(arguments) -> int:
    """Time the ways to run on a CPU: the part of this command that stands in ways.py, which builds on this file."""
    from . import ways

    threads = sorted({*(arguments.threads or (1, torch.get_num_threads()))})
    families = {name: operator.family for name, operator in ways.each_case()}
    names = [name for name, family in families.items() if {name, family} & {*arguments.operators}]
    rows, skipped = ways.run(
        names, arguments.ways, threads, arguments.rounds or ways.ROUNDS, arguments.repeat, arguments.seconds
    )
    about = record.environment(arguments.device)
    about["threads"] = " / ".join(map(str, threads))
    folder = record.folder_of(arguments.device, arguments.out)
    record.write(folder, "ways", ways.updated(record.read(folder, "ways"), rows, about), about, skipped=skipped)
    record.show(f"Ours over torch's on {record.device_name(arguments.device)}", rows)
    if skipped:
        print(f"not measured, the time was up: {', '.join(skipped)}")
    return 0


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("speed", __doc__)
    families = ", ".join(FILES)
    parser.add_argument("--operators", nargs="+", default=[*FILES], help=f"names, or families of {families} (default: all)")
    parser.add_argument("--rounds", type=int, help="samples of each provider (default: 60 on a CPU, 20 on a GPU, 11 of --ways)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out the cases that would begin after this time")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help=f"time these ways to run on a CPU: {', '.join(WAYS)}")
    parser.add_argument("--threads", nargs="+", type=int, help="with --ways: numbers of threads (default: 1, and torch's)")
    parser.add_argument("--repeat", type=int, default=2, help="with --ways: how often to measure (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.operators) - set(FILES) - set(operators()):
        parser.error(f"operators must be among {', '.join([*FILES, *operators()])}; got {', '.join(sorted(unknown))}")
    device = arguments.device
    if arguments.ways and device.type != "cpu":
        parser.error(f"--ways needs --device cpu, got {device}")
    if min(arguments.repeat, *(arguments.threads or [1])) < 1:
        parser.error(f"--threads and --repeat must be at least 1, got {arguments.threads} and {arguments.repeat}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("speed: skipped, there is no GPU")
        return 0
    if arguments.ways:
        return run_ways(arguments)
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    selection = chosen(arguments.operators)
    rows, skipped = run(device, selection, arguments.rounds or ROUNDS[device.type], arguments.seconds)
    folder, about = record.folder_of(device, arguments.out), record.environment(device)
    for family in dict.fromkeys(operator.family for operator in selection.values()):
        own = [row for row in rows if selection[row["operator"]].family == family]
        record.write(folder, FILES[family], own, about, skipped=skipped)
    columns = ["operator", "provider", "mode", "dtype", "layout", "n", "microseconds", "GB/s", "of a copy", "time / torch"]
    record.show(f"Speed on {record.device_name(device)}", rows, columns if device.type == "cuda" else None)
    if skipped:
        print(f"not measured, the time was up: {', '.join(skipped)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
