"""What a GradientWatch costs: a training step without a watch, with every=1 and with every=10.

The network has four hidden sigmoid layers and is trained by SGD: of width 4096 with batches of 4096 on a GPU, of width 1024
with batches of 256 on one thread of a CPU. Before anything is timed, the parameters must be the same bits with a watch and
without.

Writes watch.csv and .json. Takes about a minute.
"""

import contextlib
import sys

import torch
from torch import nn

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch

from . import record
from .speed import CPU_THREADS, measure

HIDDEN_LAYERS = 4
WIDTH = {"cuda": 4096, "cpu": 1024}
BATCH = {"cuda": 4096, "cpu": 256}
# As many as every=10 needs for one watched step in each sample.
STEPS = 10
ROUNDS = {"cuda": 20, "cpu": 10}
VARIANTS = {"no watch": None, "every=1": 1, "every=10": 10}


class Training:
    """A network, its optimizer and its data, the same for every variant."""

    def __init__(self, device):
        torch.manual_seed(0)
        width = WIDTH[device.type]
        layers = [layer for _ in range(HIDDEN_LAYERS) for layer in (nn.Linear(width, width), torch_sigmoid.Sigmoid())]
        self.network = nn.Sequential(*layers, nn.Linear(width, 10)).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.input = torch.randn(BATCH[device.type], width, device=device)
        self.target = torch.randint(10, (BATCH[device.type],), device=device)

    def steps(self, _=0):
        for _ in range(STEPS):
            nn.functional.cross_entropy(self.network(self.input), self.target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def watched(device, every, stack):
    training = Training(device)
    if every:
        stack.enter_context(GradientWatch(training.network, every=every, history=64))
    return training


def run(device) -> list[dict]:
    with contextlib.ExitStack() as stack:
        trainings = {name: watched(device, every, stack) for name, every in VARIANTS.items()}
        for training in record.progress(trainings.values(), "the same parameters"):
            training.steps()
        plain, *others = ([*training.network.parameters()] for training in trainings.values())
        if not all(torch.equal(one, other) for own in others for one, other in zip(plain, own)):
            raise record.WrongResultError("a watch changed the parameters")
        samples = measure({name: training.steps for name, training in trainings.items()}, device, ROUNDS[device.type])
    rows = []
    baseline = record.quantiles(samples["no watch"])[0]
    for name, values in samples.items():
        row = {"watch": name, "layers": HIDDEN_LAYERS, "width": WIDTH[device.type], "batch": BATCH[device.type]}
        row |= record.timing([value / STEPS for value in values], "microseconds a step")
        rows.append(row | {"overhead %": round(100 * (record.quantiles(values)[0] / baseline - 1), 2)})
    return rows


@record.reporting
def main(argv=None) -> int:
    arguments = record.parser("watch", __doc__).parse_args(argv)
    device = arguments.device
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    rows = run(device)
    record.write(record.folder_of(device, arguments.out), "watch", rows, record.environment(device))
    record.show(f"A GradientWatch on {record.device_name(device)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
