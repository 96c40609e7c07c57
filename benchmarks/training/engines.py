"""Training in several processes on PyTorch's engines: DDP, FSDP2, tensor parallelism, and the last two at once.

torchrun --nproc-per-node 2 -m benchmarks.train --engine ddp         DistributedDataParallel: each has a copy of the model
torchrun --nproc-per-node 2 -m benchmarks.train --engine fsdp2       fully_shard: each has a shard of every parameter
torchrun --nproc-per-node 2 -m benchmarks.train --engine tp          each has half of every MLP and of the attention heads
torchrun --nproc-per-node 4 -m benchmarks.train --engine fsdp2-tp    a mesh of 2 × 2: shards of halves

Trains a transformer with our SwiGLU and gated attention, one written in torch operators that `torch_sigmoid.replace` has made
ours, a classifier of a rare class with our binary cross-entropy and focal loss, and two encoders with our SigLIP loss, whose
features pass from process to process. A GradientWatch runs in each process; the first one prints what it has seen there.

Then the first process trains each model again, alone, from the same seed on the same global batches, in torch operators: the
loss of each step must be the same to 1e-10 in float64 and 1e-5 in float32. Exits with 1 if it is not, and says where.

With --checkpoint DIR, which all hosts must see, the models are saved as they train, and a run that finds a checkpoint there
goes on from it, on whatever engine and number of processes. If one dies, `torchrun --max-restarts 1` starts all of them again.
Writes ENGINE-PROCESSES.csv and .json. Takes half a minute.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch
from torch_sigmoid.operators import focal_loss, siglip_loss

from ..measure import record
from . import imbalanced, networks, retrieval, tasks
from .checkpoints import Checkpoints, kill_this_process
from .loop import ALONE, Share, Training

# Their processes along the two dimensions of a mesh, data × tensor, from the number of all.
ENGINES: dict[str, Callable[[int], tuple[int, int]]] = {
    "ddp": lambda processes: (processes, 1),
    "fsdp2": lambda processes: (processes, 1),
    "tp": lambda processes: (1, processes),
    "fsdp2-tp": lambda processes: (processes // 2, 2),
}
TASKS = ("transformer", "replaced", "bce", "focal", "siglip")
HEADS = 4
# Of the transformers; the others have 11 and 10 batches to an epoch. STEPS are more, so that batches are shuffled anew.
BATCHES = 10
STEPS = 14
WATCHED_EVERY = 5
# In float64 another order of sums makes losses differ by 2e-15, in float32 by 1e-6; focal loss with an alpha of
# 0.2501 in place of 0.25 makes them differ by 2e-5.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
# A process that waits this long for another one ends.
TIMEOUT = timedelta(minutes=2)


class Task(NamedTuple):
    """What is trained: `ours` and `plain`, in torch operators, are each a function that makes the model, and a loss of it.

    A loss is `loss(model, *rows, group)`, with the rows of a batch from each tensor of `data`. `plan` says how tensor
    parallelism splits the model's layers.
    """

    data: tuple[Tensor, ...]
    batch_size: int
    ours: tuple[Callable[[], nn.Module], Callable[..., Tensor]]
    plain: tuple[Callable[[], nn.Module], Callable[..., Tensor]]
    plan: dict


def of_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda model, inputs, targets, group: loss(model(inputs), targets)


def split(by_outputs: str, by_inputs: str) -> dict:
    """The plan for layers whose names are separated by spaces: the first ones give what the others take."""
    plan = {name: ColwiseParallel() for name in by_outputs.split()}
    return plan | {name: RowwiseParallel() for name in by_inputs.split()}


def load(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Task]:
    """The tasks by name."""
    _, digits = tasks.load_tasks(device, dtype, seed)
    images = tuple(each[: BATCHES * tasks.BATCH_SIZE] for each in (digits.train_inputs, digits.train_targets))
    rare = imbalanced.load_task(device, seed)
    rare_class = rare.train_inputs.to(dtype), rare.train_targets.to(dtype)
    to_pair, _ = retrieval.load(device, seed)

    packed, by_llama = (
        partial(networks.Transformer, classes=digits.classes, heads=HEADS, mlp=mlp)
        for mlp in (networks.PackedMLP, networks.LlamaMLP)
    )
    cross_entropy = of_logits(F.cross_entropy)
    bce, our_bce = map(of_logits, (F.binary_cross_entropy_with_logits, torch_sigmoid.binary_cross_entropy_with_logits))
    focal, our_focal = (of_logits(partial(loss, **imbalanced.FOCAL)) for loss in (focal_loss, torch_sigmoid.sigmoid_focal_loss))
    by_head = "blocks.*.project blocks.*.gate"
    return {
        "transformer": Task(
            images,
            tasks.BATCH_SIZE,
            (partial(packed, networks.OURS), cross_entropy),
            (partial(packed, networks.TORCH), cross_entropy),
            split(f"{by_head} blocks.*.mlp.gate_and_up", "blocks.*.out blocks.*.mlp.down"),
        ),
        "replaced": Task(
            images,
            tasks.BATCH_SIZE,
            (lambda: torch_sigmoid.replace(by_llama(networks.TORCH)), cross_entropy),
            (partial(by_llama, networks.TORCH), cross_entropy),
            split(f"{by_head} blocks.*.mlp.w1 blocks.*.mlp.w3", "blocks.*.out blocks.*.mlp.w2"),
        ),
        "bce": Task(
            rare_class,
            tasks.BATCH_SIZE,
            (imbalanced.make_network, our_bce),
            (imbalanced.make_network, bce),
            split("0", "2"),
        ),
        "focal": Task(
            rare_class,
            tasks.BATCH_SIZE,
            (imbalanced.make_network, our_focal),
            (imbalanced.make_network, focal),
            split("0", "2"),
        ),
        # Tensor parallelism leaves the features whole, on each of its processes the same: only data has a group.
        "siglip": Task(
            (to_pair.to(dtype),),
            retrieval.BATCH_SIZE,
            (retrieval.Encoders, lambda model, images, group: retrieval.ours(*model(images), group=group)),
            (retrieval.Encoders, lambda model, images, group: siglip_loss(*model(images))),
            split("even.0 odd.0", "even.2 odd.2"),
        ),
    }


def make_mesh(engine: str, device: torch.device) -> DeviceMesh:
    """The processes as data × tensor, in groups whose timeout is TIMEOUT; a mesh's own groups wait half an hour."""
    grid = torch.arange(dist.get_world_size()).view(ENGINES[engine](dist.get_world_size()))
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=TIMEOUT)[0] for ranks in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, grid, mesh_dim_names=("data", "tensor"))


def parallelized(engine: str, model: nn.Module, mesh: DeviceMesh, plan: dict) -> nn.Module:
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("data"))
    if "tp" in engine:
        parallelize_module(model, mesh["tensor"], plan)
    if "fsdp2" in engine:
        for module in (*(each for each in model.modules() if isinstance(each, networks.Block)), model):
            fully_shard(module, mesh=mesh["data"])
    return model


def make_training(
    task: Task, who: tuple, seed: int, wrap=lambda model: model, share: Share = ALONE
) -> tuple[nn.Module, Training]:
    """`task.ours` or `task.plain` from a seed: the model, and its training after `wrap(model)`."""
    make, loss = who
    torch.manual_seed(seed)
    inputs, *_ = task.data
    model = make().to(inputs)
    own_loss = partial(loss, group=share.group)
    return model, Training(wrap(model), own_loss, task.data, task.batch_size, retrieval.LEARNING_RATE, seed, share)


class Run(NamedTuple):
    """`held` is the part of the model's parameters that this process holds."""

    losses: list[float]
    resumed_at: int
    held: float
    seconds: float


def train(arguments, name: str, task: Task, dtype: str, mesh: DeviceMesh) -> Run:
    """Train a task on the engine, from its last checkpoint if there is one; the first process prints what a watch has seen."""
    begun = time.perf_counter()
    share = Share(mesh.get_local_rank("data"), mesh["data"].size(), mesh.get_group("data"))
    wrap = partial(parallelized, arguments.engine, mesh=mesh, plan=task.plan)
    model, training = make_training(task, task.ours, arguments.seed, wrap, share)
    first = dist.get_rank() == 0
    checkpoints, resumed_at = None, 0
    if arguments.checkpoint is not None:
        checkpoints = Checkpoints(arguments.checkpoint / f"{name}-{dtype}-seed{arguments.seed}")
        resumed_at = checkpoints.load(training)
        if resumed_at > arguments.steps:
            raise ValueError(f"--steps {arguments.steps} is over: {checkpoints.folder} holds step {resumed_at}")

    def after_step(step: int) -> None:
        dies = step == arguments.kill_at_step and dist.get_rank() == arguments.kill_rank and is_first_attempt()
        if checkpoints and (step % arguments.checkpoint_every == 0 or step == arguments.steps):
            checkpoints.save(training, dies)
        elif dies:
            kill_this_process()

    with GradientWatch(model, every=WATCHED_EVERY) as watch:
        training.run(arguments.steps, f"{arguments.engine}, {name}, {dtype}", after_step, shown=first)
    if first and dtype == arguments.dtype[0]:
        print(f"\nWhat a GradientWatch saw in the first of {dist.get_world_size()} processes: {name} in {dtype}")
        watch.report()
    return Run(training.losses, resumed_at, held(model), time.perf_counter() - begun)


def held(model: nn.Module) -> float:
    """The part of a model's parameters that lies in this process."""
    whole = sum(each.numel() for each in model.parameters())
    here = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return sum(each.numel() for each in here) / whole


def is_first_attempt() -> bool:
    """Whether torchrun has started these processes, and not restarted them."""
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def compare(arguments, runs: dict[tuple[str, str], Run], loaded: dict[str, dict[str, Task]]) -> list[dict]:
    """A row for each run: the largest difference of its losses from those of one process, in torch operators."""
    rows = []
    for (name, dtype), run in record.progress(runs.items(), "one process"):
        task = loaded[dtype][name]
        _, alone = make_training(task, task.plain, arguments.seed)
        alone.run(arguments.steps, shown=False)
        rows.append(
            {
                "engine": arguments.engine,
                "processes": int(os.environ["WORLD_SIZE"]),
                "task": name,
                "dtype": dtype,
                "steps": arguments.steps,
                "resumed at step": run.resumed_at,
                "parameters held": run.held,
                "last loss": run.losses[-1],
                "largest loss difference": tasks.largest_difference(run, alone),
                "seconds": round(run.seconds, 2),
            }
        )
    return rows


def failures(rows: list[dict]) -> list[str]:
    return [
        f"{row['engine']} in {row['processes']} processes, {row['task']}, {row['dtype']}: the losses differ by "
        f"{row['largest loss difference']:.3g} from those of one process, more than {TOLERANCES[row['dtype']]:g}"
        for row in rows
        # A NaN is a failure too.
        if not row["largest loss difference"] <= TOLERANCES[row["dtype"]]
    ]


def parse(argv) -> argparse.Namespace:
    parser = record.parser("train", __doc__, out=Path("runs/train"))
    parser.prog = "torchrun --nproc-per-node N -m benchmarks.train"
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS, help="default: all")
    parser.add_argument("--dtype", choices=TOLERANCES, nargs="+", default=list(TOLERANCES), help="default: both")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save there, and go on from what was saved there")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--kill-rank", type=int, metavar="RANK", help="a test: this process kills itself, once")
    parser.add_argument(
        "--kill-at-step", type=int, metavar="STEP", help="after this step, or while it writes the checkpoint that is due then"
    )
    arguments = parser.parse_args(argv)
    engine, killed = arguments.engine, (arguments.kill_rank, arguments.kill_at_step)
    if not dist.is_torchelastic_launched():
        parser.error(
            f"--engine {engine} needs several processes: torchrun --nproc-per-node 2 -m benchmarks.train --engine {engine}"
        )
    if os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        # https://github.com/pytorch/pytorch/issues/135712
        parser.error(
            "--max-restarts: processes started again would find the addresses of those that died, and wait for them; "
            "expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"
        )
    world = int(os.environ["WORLD_SIZE"])
    data, tensor = ENGINES[engine](world)
    if data * tensor != world:
        parser.error(f"--engine {engine} needs an even number of processes, got {world}")
    if HEADS % tensor:
        parser.error(f"--engine {engine} splits {HEADS} heads, got {tensor} processes to split them among")
    if tasks.BATCH_SIZE % data:
        parser.error(f"--engine {engine} splits batches of {tasks.BATCH_SIZE} rows, got {data} processes to split them among")
    for name in ("steps", "checkpoint_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if killed != (None, None):
        if None in killed:
            parser.error("--kill-rank and --kill-at-step need each other, got one of them")
        if not 0 <= arguments.kill_rank < world:
            parser.error(f"--kill-rank must be 0 to {world - 1}, got {arguments.kill_rank}")
        if not 1 <= arguments.kill_at_step <= arguments.steps:
            parser.error(f"--kill-at-step must be 1 to {arguments.steps}, got {arguments.kill_at_step}")
    if arguments.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {arguments.device}")
    if arguments.device.type == "cuda":
        arguments.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if arguments.device.index >= torch.cuda.device_count():
            here, found = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            parser.error(f"--device cuda: {here} processes on this machine need a GPU each, got {found}")
    return arguments


def main(argv=None) -> int:
    arguments = parse(argv)
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
        backend = "gloo"
    else:
        torch.cuda.set_device(arguments.device)
        # Checkpoints and SigLIP's ranks also talk over the CPU.
        backend = "cpu:gloo,cuda:nccl"
    loaded = {dtype: load(arguments.device, getattr(torch, dtype), arguments.seed) for dtype in arguments.dtype}
    dist.init_process_group(backend, timeout=TIMEOUT)
    first, world = dist.get_rank() == 0, dist.get_world_size()
    mesh = make_mesh(arguments.engine, arguments.device)
    runs = {
        (name, dtype): train(arguments, name, loaded[dtype][name], dtype, mesh)
        for dtype in arguments.dtype
        for name in arguments.task
    }
    dist.destroy_process_group()
    if not first:
        return 0
    rows = compare(arguments, runs, loaded)
    record.show(f"{arguments.engine}, {world} processes", rows, caption="differences from one process, in torch operators")
    record.write(arguments.out, f"{arguments.engine}-{world}", rows, record.environment(arguments.device))
    found = failures(rows)
    for failure in found:
        print(f"FAILED: {failure}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
