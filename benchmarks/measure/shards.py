"""DTensors: collectives and local operators of each operator in each placement, torch's and ours.

Each operator runs on DTensors in fp64, on two and on four processes of this machine (gloo), with shards of the same and of
different sizes, fewer rows than processes, and sums that nobody has added up yet. Counted are the collectives and the operators
that each process runs on its own shard, in forward and in backward. The error is that of value and gradients against the
formula in one process, relative to the largest number; torch has no backward of log-sigmoid for DTensors, and takes the mean
of the means of shards for that of all.

Writes shards.csv and .json. Exits with 1 if ours is wrong anywhere, or needs more collectives than torch's formula. Takes about
a minute.
"""

import logging
import sys
import warnings
from collections.abc import Collection

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sigmoid.operators import OPERATORS

from . import ranks, record
from .operators import differentiable

TOLERANCE = 1e-12
COLUMNS = 8
# For each shape of the mesh: rows of the operands, and a placement for each of its dimensions.
PLACEMENTS = {
    (2,): [
        (4, (Shard(0),)),
        (3, (Shard(0),)),
        (1, (Shard(0),)),
        (3, (Shard(1),)),
        (3, (Replicate(),)),
        (3, (Partial(),)),
    ],
    (4,): [(5, (Shard(0),)), (3, (Shard(0),)), (3, (Shard(1),))],
    (2, 2): [
        (3, (Shard(0), Shard(1))),
        (5, (Shard(0), Shard(0))),
        (3, (Replicate(), Shard(0))),
        (3, (Partial(), Shard(0))),
        (3, (Partial(), Partial())),
    ],
}
# With torch's glu_backward the processes disagree there on what to do next, get wrong numbers and wait for each other.
HANGS = [("glu", (Partial(), Shard(0))), ("glu", (Partial(), Partial()))]
# Those of one process on its own data that compute nothing, and those that a collective is made of.
UNCOUNTED = ("aten::detach", "aten::alias", "aten::empty", "aten::new_empty", "_c10d_functional::")


class LocalOperators(TorchDispatchMode):
    """Counts the operators on the tensors of this process that compute something."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        self.n += not (func.is_view or func._schema.name.startswith(UNCOUNTED))
        return func(*args, **(kwargs or {}))


def counted(function, *arguments):
    """What function(*arguments) returns, how many collectives it made, and how many local operators."""
    with LocalOperators() as local, CommDebugMode() as collectives:
        result = function(*arguments)
    return result, collectives.get_total_counts(), local.n


def placed(tensor, mesh, placements, constant, n_dims=2):
    """The tensor as a DTensor. It is whole where it is broadcast, and a constant where it would be Partial."""
    own = []
    for placement in placements:
        if isinstance(placement, Shard):
            dim = placement.dim - (n_dims - tensor.dim())
            placement = Replicate() if dim < 0 or (tensor.shape[dim] == 1 and placement.dim == 1) else Shard(dim)
        elif constant:
            placement = Replicate()
        own.append(placement)
    whole = [Replicate() if isinstance(each, Partial) else each for each in own]
    result = distribute_tensor(tensor, mesh, whole, src_data_rank=None)
    parts = 1
    for dim, placement in enumerate(own):
        parts *= mesh.size(dim) if isinstance(placement, Partial) else 1
    if parts > 1:
        local = result.to_local() / parts
        result = DTensor.from_local(local, mesh, own, run_check=False, shape=tensor.shape, stride=tensor.stride())
    return result.requires_grad_(not constant)


def error_of(found, expected) -> float:
    errors = [(one.full_tensor() - other).abs().max() / other.abs().max() for one, other in zip(found, expected)]
    return torch.stack(errors).max().item()


def row_of(function, leaves, expected) -> dict:
    """Counts of a second call: at a first one torch finds out how each operator is to be sharded."""
    for _ in range(2):
        value, *forward = counted(function, *leaves)
        gradients, *backward = counted(torch.autograd.grad, value, differentiable(leaves), torch.ones_like(value))
    names = "forward collectives", "forward operators", "backward collectives", "backward operators"
    return dict(zip(names, (*forward, *backward))) | {"error": error_of((value, *gradients), expected)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def measure(mesh_shape: tuple[int, ...], names: Collection[str] = tuple(OPERATORS)) -> list[dict]:
    """The rows of a mesh, of the operators of these names; in each of its processes."""
    # Autograd asks for the stream of a CPU; torch recommends other meshes; and it may drop what DTensor uses.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", mesh_shape)
    rows = []
    for name, row in ((name, OPERATORS[name]) for name in names):
        for kind, case in row.cases.items() if row.family != "siglip" else ():
            for n_rows, placements in PLACEMENTS[mesh_shape]:
                torch.manual_seed(0)
                operands = case.operands(random, n_rows, COLUMNS)
                leaves = [each.clone().requires_grad_(i not in case.constants) for i, each in enumerate(operands)]
                value = case.formula(*leaves)
                expected = value, *torch.autograd.grad(value, differentiable(leaves), torch.ones_like(value))
                about = {"operator": f"{name} {kind}".strip(), "mesh": "×".join(map(str, mesh_shape)), "rows": n_rows}
                about["placement"] = " ".join(map(str, placements))
                for provider, function in (("torch", case.formula), ("ours", case.function)):
                    if provider == "torch" and (name, placements) in HANGS:
                        rows.append(about | {"provider": provider, "error": float("nan"), "refused": "hangs"})
                        continue
                    distributed = [placed(each, mesh, placements, i in case.constants) for i, each in enumerate(operands)]
                    try:
                        found = row_of(function, distributed, expected)
                    except (NotImplementedError, RuntimeError) as error:
                        if provider == "ours":
                            raise
                        found = {"error": float("nan"), "refused": type(error).__name__}
                    rows.append(about | {"provider": provider} | found)
    return rows


def failures(rows: list[dict]) -> list[str]:
    """Where ours is wrong, or needs more collectives than torch's formula in all."""
    found = []
    for theirs, own in zip(rows[::2], rows[1::2]):
        where = f"{own['operator']} on {own['mesh']} processes, {own['rows']} rows, {own['placement']}"
        if not own["error"] <= TOLERANCE:
            found.append(f"{where}: off by {own['error']:.2g}")
        if "refused" not in theirs:
            ours, torchs = (sum(row[f"{order} collectives"] for order in ("forward", "backward")) for row in (own, theirs))
            if ours > torchs:
                found.append(f"{where}: {ours} collectives, torch's formula {torchs}")
    return found


@record.reporting
def main(argv=None) -> int:
    arguments = record.parser("shards", __doc__).parse_args(argv)
    rows = []
    for mesh_shape in record.progress(PLACEMENTS, "DTensors"):
        rows += ranks.run(measure, torch.Size(mesh_shape).numel(), mesh_shape)[0]
    device = torch.device("cpu")
    record.write(record.folder_of(device, arguments.out), "shards", rows, record.environment(device))
    record.show("DTensors", rows)
    found = failures(rows)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
