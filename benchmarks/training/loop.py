"""A training loop for one process or several, which can stop anywhere and go on.

Each process gets an equal part of the same global batches, so the mean of their losses is the loss of the whole batch.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..measure import record


class Share(NamedTuple):
    """Part `rank` of the `size` parts of each batch; the ranks of `group` have the others."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' values."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value / self.size


ALONE = Share()


class Shuffle:
    """Whole batches of rows, epoch after epoch, in an order that depends on the seed alone."""

    def __init__(self, n_rows: int, batch_size: int, seed: int):
        self.n_rows, self.batch_size = n_rows, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.before_epoch, self.position = self.generator.get_state(), 0
        order = torch.randperm(self.n_rows, generator=self.generator)
        self.batches = order.split(self.batch_size)[: self.n_rows // self.batch_size]

    def next(self) -> Tensor:
        if self.position == len(self.batches):
            self.begin_epoch()
        self.position += 1
        return self.batches[self.position - 1]

    def state_dict(self) -> dict:
        return {"generator": self.before_epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        self.begin_epoch()
        self.position = state["position"]


class Training:
    """Trains with AdamW: `loss(model, *rows)`, with the rows of a batch from each tensor of `data`, is a mean over its rows.

    `losses` are those of the whole batches. A data-parallel `model` averages gradients over the ranks of `share`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        data: tuple[Tensor, ...],
        batch_size: int,
        learning_rate: float,
        seed: int,
        share: Share = ALONE,
    ):
        self.model, self.loss, self.data, self.share = model, loss, data, share
        # Parameters may be tensors and DTensors side by side, which torch's loop over many of them at once refuses.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, foreach=False)
        self.shuffle = Shuffle(len(data[0]), batch_size, seed)
        self.losses: list[float] = []

    def step(self) -> None:
        batch = self.shuffle.next().chunk(self.share.size)[self.share.rank].to(self.data[0].device)
        value = self.loss(self.model, *(rows[batch] for rows in self.data))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.losses.append(self.share.mean(value.detach()).item())

    def run(
        self, steps: int, label: str = "training", after_step: Callable[[int], None] | None = None, shown: bool = True
    ) -> None:
        """Train until there are `steps` losses; `after_step` gets their number. `shown`: whether a bar shows the progress."""
        missing = range(len(self.losses) + 1, steps + 1)
        for done in record.progress(missing, label) if shown else missing:
            self.step()
            if after_step:
                after_step(done)


def run_ranks(processes: int, *options: str, restarts: int = 0, **how) -> subprocess.CompletedProcess:
    """Have torchrun start the processes of engines.py on this machine; `how` is for subprocess.run."""
    # Without an address the ranks look for each other at whatever this machine's name resolves to.
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    torchrun += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", *torchrun, "-m", "benchmarks.training.engines", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, cwd=record.ROOT, env=environment, **how)
