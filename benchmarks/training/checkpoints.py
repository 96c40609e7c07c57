"""Checkpoints of a training by torch.distributed.checkpoint: model, optimizer, losses, and where the shuffled batches stand."""

import os
import shutil
import signal
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .loop import Training


class State:
    """What a checkpoint holds of a training, under names that do not depend on the engine nor on the number of processes."""

    def __init__(self, training: Training):
        self.training = training

    def state_dict(self) -> dict:
        training = self.training
        model, optimizer = get_state_dict(training.model, training.optimizer)
        own = {"shuffle": training.shuffle.state_dict(), "losses": training.losses}
        return {"model": model, "optimizer": optimizer} | own

    def load_state_dict(self, state: dict) -> None:
        training = self.training
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(training.model, training.optimizer, **states)
        training.shuffle.load_state_dict(state["shuffle"])
        training.losses = state["losses"]


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingWriter(dcp.FileSystemWriter):
    """Writes the files of this rank, and kills it before the checkpoint is complete."""

    def write_data(self, *args):
        super().write_data(*args).wait()
        kill_this_process()


class Checkpoints:
    """The checkpoints of one training in a folder that all of its processes see.

    A checkpoint gets its name, step-N, when every rank has written its part: whoever dies before that leaves a folder
    step-N.partial, which nobody reads. The one before it is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def finished(self) -> list[int]:
        """After which steps there is a whole checkpoint."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, training: Training, killed: bool = False) -> None:
        """All ranks call this. `killed`: this one dies on the way."""
        step = len(training.losses)
        whole, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        writer = (DyingWriter if killed else dcp.FileSystemWriter)(partial)
        dcp.save({"training": State(training)}, storage_writer=writer)
        if dist.get_rank() == 0:
            partial.rename(whole)
            for old in self.finished()[:-2]:
                shutil.rmtree(self.folder / f"step-{old}")

    def load(self, training: Training) -> int:
        """Bring a training, on whatever number of ranks, to the last checkpoint; returns its step, 0 if there is none."""
        together = dist.is_initialized()
        last = [self.finished()[-1:]]
        if together:
            if dist.get_rank() == 0:
                for partial in self.folder.glob("step-*.partial"):
                    shutil.rmtree(partial)
            # The folder may change while the ranks look into it, so one of them looks for all.
            dist.broadcast_object_list(last, src=0)
        if not last[0]:
            return 0
        (step,) = last[0]
        with warnings.catch_warnings():
            # That one process loads what several have saved.
            warnings.filterwarnings("ignore" if not together else "default", "torch.distributed is disabled")
            dcp.load({"training": State(training)}, checkpoint_id=self.folder / f"step-{step}", no_dist=not together)
        return step
