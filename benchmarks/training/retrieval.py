"""SigLIP on paired views of images: the plain formula, ours in one process, and ours in two.

Two encoders see one half each of scikit-learn's digits, the even and the odd columns of an image, and learn to find, among the
other halves of a batch, the one that belongs to their own. Scale and bias are learned, from where the paper starts them
(Zhai et al. 2023: log 10 and -10). Accuracy is that of the nearest other half in batches held out; by chance it is 1/128.

The three see the same batches from the same seed, in float64, so that nothing but an error can part their curves. The two
processes are what torchrun starts, on the CPU with gloo: each has half of every batch, DistributedDataParallel averages the
gradients, and the features of one half of the pairs meet those of the other in the loss, around its ring.

Under torchrun this module is what each rank runs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import torch_sigmoid

from ..measure import record
from ..measure.operators import siglip_loss

RANKS = 2
EPOCHS = 30
BATCH_SIZE = 128
# Less than a batch, and than a rank's half of it.
CHUNK_SIZE = 48
LEARNING_RATE = 3e-3
# Over seeds 0 to 9 it is at least 0.69.
REQUIRED_ACCURACY = 0.6
# In float64 sums taken in another order part two curves by 5e-15; rounding a gradient to fp32, by 1e-7.
TOLERANCE = 1e-10
PLAIN, ONE_PROCESS, TWO_PROCESSES = "plain formula", "torch_sigmoid", "torch_sigmoid, two processes"


class Run(NamedTuple):
    losses: list[float]
    accuracy: float
    scale: float
    bias: float


class Encoders(nn.Module):
    """Normalised features of both halves, and the scale and bias of their logits."""

    def __init__(self, inside: int = 32, width: int = 64):
        super().__init__()
        self.even, self.odd = (nn.Sequential(nn.Linear(inside, 128), nn.SiLU(), nn.Linear(128, width)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        even, odd = images[..., ::2].flatten(1), images[..., 1::2].flatten(1)
        return F.normalize(self.even(even), dim=1), F.normalize(self.odd(odd), dim=1), self.log_scale.exp(), self.bias


def train(loss, device: torch.device, epochs: int, seed: int, steps: int | None, label: str, group=None) -> Run:
    """Whole batches only, so that the ranks of `group` have the same share of each."""
    # Pixels are 0 to 16.
    images = torch.tensor(load_digits().images / 8 - 1, device=device)
    train_images, test_images = (
        images[part] for part in train_test_split(range(len(images)), test_size=0.25, random_state=seed)
    )
    torch.manual_seed(seed)
    encoders = Encoders().to(images)
    model = encoders if group is None else nn.parallel.DistributedDataParallel(encoders, process_group=group)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(seed)
    losses = []
    for _ in record.progress(range(epochs), label) if rank == 0 else range(epochs):
        order = torch.randperm(len(train_images), generator=shuffle).to(device)
        for batch in whole_batches(order)[:steps]:
            value = loss(*model(train_images[batch.chunk(size)[rank]]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    with torch.no_grad():
        even, odd, scale, bias = encoders(test_images)
        found = [(ours @ theirs.T).argmax(1) for ours, theirs in zip(whole_batches(even), whole_batches(odd))]
    correct = torch.stack(found) == torch.arange(BATCH_SIZE, device=device)
    return Run(losses, correct.double().mean().item(), scale.item(), bias.item())


def whole_batches(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor[: len(tensor) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


def ours(*tensors: Tensor, group=None) -> Tensor:
    return torch_sigmoid.siglip_loss(*tensors, chunk_size=CHUNK_SIZE, group=group)


def no_ranks() -> str | None:
    """Why there cannot be several processes here, if so."""
    if not dist.is_available():
        return "torch.distributed is not part of this torch"
    return None if dist.is_gloo_available() else "gloo is not part of this torch"


def train_ranks(epochs: int, seed: int, steps: int | None) -> Run | None:
    """What the first of RANKS processes had; None if they failed, in which case they have said so on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        # Ranks meet on this machine, whatever its name resolves to.
        torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(RANKS)]
        options = ["--epochs", str(epochs), "--seed", str(seed), "--out", str(result)]
        options += [] if steps is None else ["--steps", str(steps)]
        command = [sys.executable, "-m", *torchrun, "-m", "benchmarks.training.retrieval", *options]
        ended = subprocess.run(command, cwd=record.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return Run(**json.loads(result.read_text())) if ended.returncode == 0 else None


def compare(device: torch.device, epochs: int, seed: int, steps: int | None = None) -> dict[str, Run | None]:
    """The runs by who computes the loss, without those that cannot be here; of each epoch no more than `steps` batches."""
    epochs = min(epochs, EPOCHS)
    runs = {
        name: train(loss, device, epochs, seed, steps, f"paired views, {name}")
        for name, loss in ((PLAIN, siglip_loss), (ONE_PROCESS, ours))
    }
    if no_ranks() is None:
        runs[TWO_PROCESSES] = train_ranks(epochs, seed, steps)
    return runs


def largest_difference(one: Run, other: Run) -> float:
    """Of the loss, in any step; NaN if a loss is."""
    one, other = (torch.tensor(run.losses, dtype=torch.float64) for run in (one, other))
    return (one - other).abs().max().item()


def table(runs) -> Table:
    result = Table(title=f"float64, SigLIP on the even and the odd columns of digits, batches of {BATCH_SIZE}")
    for column in ("loss", "held-out accuracy", "last loss", "scale", "bias", "largest loss difference"):
        result.add_column(column)
    for name, run in runs.items():
        if run is None:
            result.add_row(name, "failed")
            continue
        shown = "" if name == PLAIN else f"{largest_difference(runs[PLAIN], run):.3g}"
        result.add_row(name, f"{run.accuracy:.4f}", f"{run.losses[-1]:.5f}", f"{run.scale:.3f}", f"{run.bias:.3f}", shown)
    if TWO_PROCESSES not in runs:
        result.caption = f"not run in two processes: {no_ranks()}"
    return result


def failures(runs, trained: bool) -> list[str]:
    """`trained`: whether an accuracy can be asked for."""
    found = []
    for name, run in runs.items():
        if run is None:
            found.append(f"paired views, {name}: ended without a result")
            continue
        difference = largest_difference(runs[PLAIN], run)
        if not difference <= TOLERANCE:
            found.append(f"paired views, {name}: the loss curve differs by {difference:.3g} from the plain formula's")
        if trained and run.accuracy < REQUIRED_ACCURACY:
            found.append(f"paired views, {name}: accuracy {run.accuracy:.4f} is below {REQUIRED_ACCURACY}")
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.training.retrieval", description="One rank of the two.")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    # A rank that waits for one that is gone ends too.
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    group = dist.group.WORLD

    def over_the_ring(*tensors):
        return ours(*tensors, group=group)

    device = torch.device("cpu")
    run = train(
        over_the_ring, device, arguments.epochs, arguments.seed, arguments.steps, f"paired views, {TWO_PROCESSES}", group
    )
    if dist.get_rank(group) == 0:
        arguments.out.write_text(json.dumps(run._asdict()))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
