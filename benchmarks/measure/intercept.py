"""What `intercept` costs a model that calls nothing it covers: a forward, and entering and leaving it.

The model is 25 times a linear layer of width 16, a layer norm and a ReLU, without gradients and on one thread of a CPU: what it
takes is its calls on the host. A TorchFunctionMode that changes nothing is measured beside it. Before anything is timed, the
output must be the same bits with each.

Writes intercept.csv and .json. Takes about half a minute.
"""

import contextlib
import gc
import sys
import time

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import torch_sigmoid

from . import record
from .speed import CPU_THREADS

LAYERS = 25
WIDTH = 16
BATCH = 4
ROUNDS = 1000
# Of entering and leaving in each round, which is shorter than a forward.
ENTRIES = 10


class Mode(TorchFunctionMode):
    """Sees every call and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "no context": contextlib.nullcontext,
    "intercept": torch_sigmoid.intercept,
    "a TorchFunctionMode that changes nothing": Mode,
}


def seconds_of(run, times=1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def enter_and_leave():
    with torch_sigmoid.intercept():
        pass


@torch.no_grad()
def measure(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(BATCH, WIDTH)
    expected = model(x)
    for name, context in CONTEXTS.items():
        with context():
            if not torch.equal(model(x), expected):
                raise record.WrongResultError(f"the output with {name} is another")
    samples = {name: [] for name in CONTEXTS}
    entering = []
    order = list(CONTEXTS)
    gc.collect()
    gc.disable()
    for _ in record.progress(range(rounds), "intercept"):
        order.append(order.pop(0))
        for name in order:
            with CONTEXTS[name]():
                model(x)
                samples[name].append(seconds_of(lambda: model(x)))
        entering.append(seconds_of(enter_and_leave, ENTRIES))
    gc.enable()
    samples = {f"forward, {name}": values for name, values in samples.items()} | {"entering and leaving intercept": entering}
    rows = [{"what": name} | record.timing(values) for name, values in samples.items()]
    return [row | {"time / forward": round(row["microseconds"] / rows[0]["microseconds"], 4)} for row in rows]


@record.reporting
def main(argv=None) -> int:
    arguments = record.parser("intercept", __doc__, device=False).parse_args(argv)
    torch.set_num_threads(CPU_THREADS)
    rows = measure(ROUNDS)
    cpu = torch.device("cpu")
    record.write(record.folder_of(cpu, arguments.out), "intercept", rows, record.environment(cpu), layers=3 * LAYERS)
    record.show("intercept", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
