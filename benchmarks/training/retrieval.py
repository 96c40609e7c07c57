"""SigLIP on paired views of images: the plain formula, ours in one process, and ours in two.

Two encoders each see one half of an image from scikit-learn's digits, its even or its odd columns, and learn to find the half
that belongs to their own among those of a batch. Scale and bias are learned, from where the paper starts them (Zhai et al.
2023: log 10 and -10). The accuracy is how often the nearest other half is the right one, in batches held out; chance is 1/128.

All three see the same batches from the same seed, in float64, so that only an error can make their curves differ. The two
processes are those of engines.py, on the CPU with gloo: each has half of every batch, DistributedDataParallel averages the
gradients, and the loss passes the features of one half of the pairs to the other process around its ring.
"""

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import torch_sigmoid
from torch_sigmoid.operators import siglip_loss

from ..measure import record
from .loop import Training, run_ranks
from .tasks import largest_difference

RANKS = 2
EPOCHS = 30
BATCH_SIZE = 128
# Smaller than a batch, and than a rank's half of it.
CHUNK_SIZE = 48
LEARNING_RATE = 3e-3
# Seeds 0 to 9 reach at least 0.69.
REQUIRED_ACCURACY = 0.6
# In float64 another order of sums makes curves differ by 5e-15; rounding a gradient to fp32, by 1e-7.
TOLERANCE = 1e-10
PLAIN, ONE_PROCESS, TWO_PROCESSES = "plain formula", "torch_sigmoid", "torch_sigmoid, two processes"


class Run(NamedTuple):
    losses: list[float]
    accuracy: float
    scale: float
    bias: float


class Encoders(nn.Module):
    """Gives normalised features of both halves, and the scale and bias of their logits."""

    def __init__(self, inside: int = 32, width: int = 64):
        super().__init__()
        self.even, self.odd = (nn.Sequential(nn.Linear(inside, 128), nn.SiLU(), nn.Linear(128, width)) for _ in range(2))
        # With a dimension, which fully_shard asks of a parameter.
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        even, odd = images[..., ::2].flatten(1), images[..., 1::2].flatten(1)
        return F.normalize(self.even(even), dim=1), F.normalize(self.odd(odd), dim=1), self.log_scale.exp(), self.bias


def load(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """The images to train on and those held out, in float64."""
    # Pixels are 0 to 16.
    images = torch.tensor(load_digits().images / 8 - 1, device=device)
    train_images, test_images = train_test_split(range(len(images)), test_size=0.25, random_state=seed)
    return images[train_images], images[test_images]


def make_training(loss, device: torch.device, seed: int) -> tuple[Training, Tensor]:
    """The encoders' training from a seed, and the images held out."""
    train_images, test_images = load(device, seed)
    torch.manual_seed(seed)
    encoders = Encoders().to(train_images)

    def of_images(model: nn.Module, images: Tensor) -> Tensor:
        return loss(*model(images))

    return Training(encoders, of_images, (train_images,), BATCH_SIZE, LEARNING_RATE, seed), test_images


def run_of(training: Training, test_images: Tensor) -> Run:
    """What a training has reached."""
    with torch.no_grad():
        even, odd, scale, bias = training.model(test_images)
        found = [(ours @ theirs.T).argmax(1) for ours, theirs in zip(whole_batches(even), whole_batches(odd))]
    correct = torch.stack(found) == torch.arange(BATCH_SIZE, device=test_images.device)
    return Run(training.losses, correct.double().mean().item(), scale.item(), bias.item())


def train(loss, device: torch.device, steps: int, seed: int, label: str) -> Run:
    training, test_images = make_training(loss, device, seed)
    training.run(steps, label)
    return run_of(training, test_images)


def whole_batches(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor[: len(tensor) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


def ours(*tensors: Tensor, group=None) -> Tensor:
    return torch_sigmoid.siglip_loss(*tensors, chunk_size=CHUNK_SIZE, group=group)


def no_ranks() -> str | None:
    """Why this torch cannot train in several processes; None if it can."""
    if not dist.is_available():
        return "torch.distributed is not part of this torch"
    return None if dist.is_gloo_available() else "gloo is not part of this torch"


def train_ranks(steps: int, seed: int) -> Run | None:
    """The run of RANKS processes on PyTorch's engine `ddp`; None if they failed, after they said so on stderr."""
    from .checkpoints import Checkpoints  # needs torch.distributed

    with tempfile.TemporaryDirectory() as folder:
        options = ["--engine", "ddp", "--task", "siglip", "--dtype", "float64", "--device", "cpu", "--steps", str(steps)]
        options += ["--seed", str(seed), "--checkpoint", folder, "--checkpoint-every", str(steps), "--out", folder]
        ended = run_ranks(RANKS, *options)
        if ended.returncode:
            return None
        # What two processes have saved, one process loads.
        training, test_images = make_training(ours, torch.device("cpu"), seed)
        Checkpoints(Path(folder) / f"siglip-float64-seed{seed}").load(training)
        return run_of(training, test_images)


def compare(device: torch.device, epochs: int, seed: int, steps: int | None = None) -> dict[str, Run | None]:
    """The runs by name, two processes only if torch can start them; `steps` in place of `epochs`, if given."""
    steps = steps or min(epochs, EPOCHS) * (len(load(device, seed)[0]) // BATCH_SIZE)
    runs = {
        name: train(loss, device, steps, seed, f"paired views, {name}")
        for name, loss in ((PLAIN, siglip_loss), (ONE_PROCESS, ours))
    }
    if no_ranks() is None:
        runs[TWO_PROCESSES] = train_ranks(steps, seed)
    return runs


def rows(runs) -> list[dict]:
    """For a table, a row for each run."""
    shown = []
    for name, run in runs.items():
        row = {"loss": name, "held-out accuracy": "failed"}
        if run is not None:
            row |= {"held-out accuracy": run.accuracy, "last loss": run.losses[-1], "scale": run.scale, "bias": run.bias}
            row["largest loss difference"] = None if name == PLAIN else largest_difference(runs[PLAIN], run)
        shown.append(row)
    return shown


def show(runs) -> None:
    title = f"float64, SigLIP on the even and the odd columns of digits, batches of {BATCH_SIZE}"
    record.show(title, rows(runs), caption=None if TWO_PROCESSES in runs else f"not run in two processes: {no_ranks()}")


def failures(runs, trained: bool) -> list[str]:
    """`trained`: whether the runs were long enough to require an accuracy."""
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
