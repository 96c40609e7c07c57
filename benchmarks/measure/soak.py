"""A soak: whether 10,000 calls with changing shapes leave memory, objects, launches or answers behind.

Calls every case of torch_sigmoid.operators, forward and backward, and steps of a training under a GradientWatch. Each call
draws its tensors anew, in one of 25 random variants of dtype, size, number of dimensions and strides. The first hundred calls
see each variant four times, so all that is kept for a shape is there by then. What is alive is counted then and after the last
call:

objects     that the garbage collector tracks, after it has run
tensors     among them
blocks      of memory that Python has allocated, those of numbers and strings included
cached      answers: of every functools cache of the process, torch's too, and of tensors that dispatch recognises
launches    that are kept
MiB         resident memory of the process, on Linux

What grows by more than ALLOWED is an error, and nothing is written. All runs twice: on the CPU's own path, and on a stub of a
GPU (stub.py), where launches are kept and results are uninitialised memory.

Writes soak.csv and .json. Takes about ten minutes, the first time a few more to compile.
"""

import argparse
import functools
import gc
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torch_sigmoid
from torch_sigmoid import autograd, dispatch
from torch_sigmoid.diagnostics import GradientWatch
from torch_sigmoid.operators import cases

from . import record, stub
from .pairs import STATUS, resident_mebibytes

CALLS, SETTLED, VARIANTS = 10_000, 100, 25
# By how much each may grow after SETTLED calls, so that a leak at every tenth of 10,000 shows. The first count, which is kept,
# and Python's free lists take up to 450 blocks. Allocators take memory in steps; 9,900 tensors of one number take 5 MiB.
ALLOWED = {"objects": 10, "tensors": 0, "blocks": 900, "cached": 0, "launches": 0, "MiB": 4.0}
_CACHE = type(functools.cache(lambda: None))


class Variant(NamedTuple):
    """What the tensors of a call are like."""

    dtype: torch.dtype
    rows: int
    columns: int
    dimensions: int
    layout: str

    def make(self, *shape: int) -> Tensor:
        """Random numbers in this layout."""
        if self.layout == "transposed" and len(shape) == 2:
            return torch.randn(shape[::-1], dtype=self.dtype).t()
        if self.layout == "rows of a slice":
            return torch.randn(*shape[:-1], shape[-1] + 8, dtype=self.dtype)[..., : shape[-1]]
        if self.layout == "off alignment":
            return torch.randn(1 + torch.Size(shape).numel(), dtype=self.dtype)[1:].view(shape)
        return torch.randn(shape, dtype=self.dtype)

    def shaped(self, tensor: Tensor) -> Tensor:
        """A matrix of as many rows with the dimensions of this variant; other tensors as they are."""
        if tensor.dim() != 2 or self.dimensions == 2:
            return tensor
        return tensor[0] if self.dimensions == 1 else tensor.unflatten(0, (2, -1))


def variants(seed: int = 0) -> list[Variant]:
    draw = random.Random(seed)
    return [
        Variant(
            draw.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
            2 * draw.randint(1, 16),
            draw.choice((draw.randint(2, 70), 16 * draw.randint(1, 8))),
            draw.randint(1, 3),
            draw.choice(("dense", "transposed", "rows of a slice", "off alignment")),
        )
        for _ in range(VARIANTS)
    ]


Call = Callable[[Variant], None]


def operator_calls() -> dict[str, Call]:
    def call_of(row, case) -> Call:
        def call(variant):
            operands = case.operands(variant.make, variant.rows, variant.columns)
            if row.family != "siglip":
                operands = map(variant.shaped, operands)
            operands = [each.detach().requires_grad_(index not in case.constants) for index, each in enumerate(operands)]
            output = case.function(*operands)
            output.backward(torch.ones_like(output))

        return call

    return {name: call_of(row, case) for name, row, case in cases()}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.gated = nn.Linear(16, 32), nn.Linear(16, 32), torch_sigmoid.SigmoidGate()
        sigmoid = torch_sigmoid.Sigmoid(save="input")
        self.rest = nn.Sequential(nn.Linear(32, 64), torch_sigmoid.SwiGLUPacked(), sigmoid, nn.Linear(32, 1))

    def forward(self, x):
        return self.rest(self.gated(self.up(x), self.gate(x)))


class Training:
    """Steps of a watched network, over batches of changing shape. The watch's history is full after 32 steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = Network()
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.loss = torch_sigmoid.BCEWithLogitsLoss()
        self.watch = GradientWatch(self.network, history=32).attach()

    def step(self, variant):
        variant = variant._replace(dtype=torch.float32)
        x = variant.shaped(variant.make(variant.rows, 16))
        logits = self.network(x)
        self.loss(logits, torch.zeros_like(logits)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


TRAINING = "a training under a GradientWatch"


def calls() -> dict[str, Call]:
    return operator_calls() | {TRAINING: Training().step}


def census() -> dict[str, float]:
    """What is alive now."""
    gc.collect()
    blocks, alive = sys.getallocatedblocks(), gc.get_objects()
    types = list(map(type, alive))
    caches = (each for each, kind in zip(alive, types) if kind is _CACHE)
    likenesses = (*dispatch._known_pairs.values(), *autograd._known_inputs.values())
    counts = {
        "objects": len(alive),
        "tensors": sum(issubclass(kind, Tensor) for kind in types),
        "blocks": blocks,
        "cached": sum(cache.cache_info().currsize for cache in caches) + sum(map(len, likenesses)),
    }
    if kept := sys.modules.get("torch_sigmoid.kernels.kept"):
        counts["launches"] = sum(map(len, kept.caches))
    if STATUS.exists():
        counts["MiB"] = round(resident_mebibytes("VmRSS"), 2)
    return counts


def soak(call: Call, n_calls: int) -> tuple[dict[str, float], dict[str, float]]:
    """What is alive after SETTLED calls, and after `n_calls`."""
    order, chosen = random.Random(0), variants()
    counts = []
    for number in range(n_calls):
        if number % VARIANTS == 0:
            order.shuffle(chosen)
        call(chosen[number % VARIANTS])
        if number + 1 in (SETTLED, n_calls):
            counts.append(census())
    first, last = counts
    return first, last


def measure(path: str, n_calls: int, chosen: list[str] | None = None) -> list[dict]:
    rows = []
    for name, call in record.progress(calls().items(), path):
        if chosen and name not in chosen:
            continue
        first, last = soak(call, n_calls)
        row = {"path": path, "what": name, "calls": n_calls}
        for count in first:
            row |= {f"{count} after {SETTLED}": first[count], f"{count} at the end": last[count]}
        rows.append(row)
    return rows


def growth(row: dict) -> dict[str, float]:
    """By how much each count has grown."""
    ends = [key.removesuffix(" at the end") for key in row if key.endswith(" at the end")]
    return {count: round(row[f"{count} at the end"] - row[f"{count} after {SETTLED}"], 2) for count in ends}


def measure_on_stub(n_calls: int, chosen: list[str] | None) -> list[dict]:
    """As `measure`, in a process of its own."""
    if reason := stub.unavailable():
        print(f"soak: no launches, since there is no stub of a GPU: {reason}")
        return []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.measure.soak", "--calls", str(n_calls), "--stub", str(rows)]
        command += ["--what", *chosen] if chosen else []
        subprocess.run(command, env=stub.environment(Path(folder)), cwd=record.ROOT, check=True)
        return json.loads(rows.read_text())


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("soak", __doc__, device=False)
    parser.add_argument("--calls", type=int, default=CALLS, help="of each (default: %(default)s)")
    parser.add_argument("--what", nargs="+", choices=[*operator_calls(), TRAINING], metavar="NAME", help="call only these")
    parser.add_argument("--stub", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.calls <= SETTLED:
        parser.error(f"argument --calls: must exceed {SETTLED}, after which nothing may grow, got {arguments.calls}")
    torch.set_num_threads(1)
    if arguments.stub:
        stub.activate()
        # Kernels at every size.
        torch_sigmoid.torch_below(0)
        arguments.stub.write_text(json.dumps(measure("stub of a GPU", arguments.calls, arguments.what)))
        return 0
    rows = measure("CPU", arguments.calls, arguments.what) + measure_on_stub(arguments.calls, arguments.what)
    grown = [{"path": row["path"], "what": row["what"]} | growth(row) for row in rows]
    record.show(f"What {arguments.calls} calls of each have added after the first {SETTLED}", grown)
    if leaks := [row for row in grown if any(row.get(count, 0) > allowed for count, allowed in ALLOWED.items())]:
        raise record.WrongResultError(f"more than the allowed {ALLOWED} is left by {leaks}")
    cpu = torch.device("cpu")
    record.write(record.folder_of(cpu, arguments.out), "soak", rows, record.environment(cpu), settled=SETTLED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
