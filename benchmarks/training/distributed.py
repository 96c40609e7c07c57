"""Training on PyTorch's engines, killed, resumed and resharded: are the losses those of one process?

1. Each engine trains every model of engines.py in 2 processes, FSDP2 with tensor parallelism in 4, in float64 and float32.
2. A process kills itself by SIGKILL, in mid-training or while it writes a checkpoint; torchrun starts all of them again, and
   they go on from the last checkpoint that is whole.
3. Checkpoints are resumed by another number of processes, and on another engine, in float64.

Each time the losses of all steps must be those of one process that is not disturbed, to 1e-10 in float64 and 1e-5 in float32;
exits with 1 if they are not, or if nothing was resumed. On a CPU the processes talk over gloo, on GPUs, one for each process,
over NCCL. Writes distributed.csv and .json. Takes five minutes on two cores.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..measure import record
from .loop import run_ranks

# Of engines.STEPS, which are more than an epoch: a part of them, when a checkpoint is written, and when a process dies.
PART, SAVED, EVERY, KILLED = 8, 12, 6, 13


class Scenario(NamedTuple):
    """What happens, on which engine and in how many processes, the options of engines.py, and the step that is resumed.

    `saved_by`: the engine and the number of processes whose checkpoint of step PART is resumed.
    """

    what: str
    engine: str
    processes: int
    options: tuple[str, ...]
    resumed_at: int = 0
    restarts: int = 0
    saved_by: tuple[str, int] | None = None


def trained(engine: str, processes: int) -> Scenario:
    return Scenario("trained", engine, processes, ("--checkpoint-every", str(PART)))


def killed(step: int, resumed_at: int, engine: str, processes: int, dtype: str, task: str) -> Scenario:
    what = f"killed {'as it saved' if step == SAVED else 'after'} step {step}"
    options = f"--dtype {dtype} --task {task} --checkpoint-every {EVERY} --kill-rank 1 --kill-at-step {step}"
    return Scenario(what, engine, processes, tuple(options.split()), resumed_at, restarts=1)


def resharded(engine: str, processes: int, saved_by: tuple[str, int]) -> Scenario:
    what = "saved by {}, {} processes".format(*saved_by)
    return Scenario(what, engine, processes, ("--dtype", "float64", "--task", "transformer", "siglip"), PART, saved_by=saved_by)


SCENARIOS = (
    trained("ddp", 2),
    trained("fsdp2", 2),
    trained("tp", 2),
    trained("fsdp2-tp", 4),
    killed(KILLED, SAVED, "ddp", 2, "float64", "siglip"),
    killed(KILLED, SAVED, "fsdp2", 2, "float64", "transformer"),
    killed(KILLED, SAVED, "tp", 2, "float64", "replaced"),
    killed(KILLED, SAVED, "fsdp2-tp", 4, "float64", "focal"),
    killed(SAVED, SAVED - EVERY, "fsdp2", 2, "float32", "transformer"),
    resharded("fsdp2", 1, ("fsdp2", 2)),
    resharded("fsdp2-tp", 4, ("tp", 2)),
)


class FailedError(Exception):
    """What the processes of a scenario said before they ended with an error."""


def run_engine(engine: str, processes: int, *options: str, out: Path, device: torch.device, restarts: int = 0) -> list[dict]:
    """The rows of an engine's run."""
    arguments = ["--engine", engine, *options, "--device", device.type, "--out", str(out)]
    ended = run_ranks(processes, *arguments, restarts=restarts, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise FailedError(ended.stdout)
    return record.read(out, f"{engine}-{processes}")["rows"]


def run(scenario: Scenario, device: torch.device, folder: Path) -> list[dict]:
    """The rows of a scenario; `folder` is for the checkpoints of all."""

    def checkpoints(what: str, engine: str, processes: int) -> Path:
        return folder / f"{what}, {engine}, {processes}"

    own = checkpoints(scenario.what, scenario.engine, scenario.processes)
    if scenario.saved_by:
        for saved in checkpoints("trained", *scenario.saved_by).glob(f"*/step-{PART}"):
            shutil.copytree(saved, own / saved.parent.name / saved.name)
    options = (*scenario.options, "--checkpoint", str(own))
    begun = time.perf_counter()
    rows = run_engine(scenario.engine, scenario.processes, *options, out=folder, device=device, restarts=scenario.restarts)
    whole = {"seconds with starts": round(time.perf_counter() - begun, 1)}
    return [{"what": scenario.what} | row | whole for row in rows]


def parse(argv):
    parser = record.parser("distributed", __doc__)
    enough = torch.cuda.device_count() >= max(scenario.processes for scenario in SCENARIOS)
    parser.set_defaults(device=torch.device("cuda" if enough else "cpu"))
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse(argv)
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for scenario in record.progress(SCENARIOS, "engines"):
            name = f"{scenario.engine}, {scenario.processes} processes, {scenario.what}"
            try:
                own = run(scenario, arguments.device, Path(folder))
            except FailedError as error:
                failures.append(f"{name}: ended with an error:\n{error}")
                continue
            rows += own
            resumed_at = {row["resumed at step"] for row in own}
            if resumed_at != {scenario.resumed_at}:
                failures.append(f"{name}: resumed at step {resumed_at}, expected {scenario.resumed_at}")
    if rows:
        columns = ["what", "engine", "processes", "task", "dtype", "resumed at step", "largest loss difference", "seconds"]
        record.show("PyTorch's engines: the losses of each step against those of one process", rows, columns)
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        record.write(
            record.folder_of(arguments.device, arguments.out), "distributed", rows, record.environment(arguments.device)
        )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
