"""DTensors: every operator on every placement, counted beside torch's, and the kernels on local shards.

The table is that of `python -m benchmarks shards`; what it measures is in benchmarks/measure/shards.py.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from reference import random
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import torch_sigmoid
from benchmarks.measure import shards
from torch_sigmoid.operators import cases
from torch_sigmoid.shards import Linear, follow

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
NAMED = {name: case for name, row, case in cases() if row.family != "siglip"}
# They hold two operands along their last dimension, which is sharded here.
PACKED = ("glu", "swiglu_packed", "swiglu_packed interleaved")


@pytest.fixture
def processes(tmp_path):
    """A function that starts so many processes of one group."""
    groups = []

    def start(size):
        groups.append(Ranks(size, tmp_path))
        return groups[-1]

    yield start
    for group in groups:
        group.end()


# One of each family of torch.library in two processes, and of gates one that comes first and one that comes second. In four
# processes, which take longer, some.
IN_TWO = ("sigmoid", "silu", "sigmoid_gate", "swiglu", "swiglu_packed", "binary_cross_entropy_with_logits")


@pytest.mark.parametrize(
    ("mesh", "names"),
    [((2,), IN_TWO), ((4,), ("sigmoid_gate", "sigmoid_focal_loss")), ((2, 2), ("sigmoid", "swiglu_packed"))],
    ids=["2", "4", "2×2"],
)
def test_no_placement_costs_more_collectives_than_torch_or_a_wrong_number(mesh, names, processes):
    rows = processes(torch.Size(mesh).numel()).run(shards.measure, mesh, names, within=240)[0]
    assert shards.failures(rows) == []
    for row in rows[1::2]:
        is_packed = row["operator"] in PACKED and "S(1)" in row["placement"]
        is_loss = row["operator"].startswith(("binary", "sigmoid_focal_loss"))
        if "P" in row["placement"] or is_packed:
            continue
        # A mean divides its partial sum; torch 2.10 first adds up these numbers.
        added = int(is_loss and "S" in row["placement"] and torch.__version__ < (2, 11))
        assert (row["forward collectives"], row["backward collectives"]) == (added, 0), row
        if not is_loss:
            assert row["forward operators"] <= 2, row
            assert row["backward operators"] <= 2, row


def second_gradients(function, leaves):
    """The gradients of grad_output and of the leaves, from a cotangent of ones."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    value = function(*leaves)
    upstream = torch.ones_like(value).requires_grad_()
    first = torch.autograd.grad(value, wanted, upstream, create_graph=True)
    return torch.autograd.grad(first, (upstream, *wanted), [torch.ones_like(each) for each in first])


def errors_of_double_backward():
    """By operator and placement, against the formula in one process."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for (name, case), placement in itertools.product(NAMED.items(), [Shard(0), Shard(1), Partial()]):
        torch.manual_seed(0)
        operands = case.operands(shards.random, 3, shards.COLUMNS)
        plain = [each.clone().requires_grad_(i not in case.constants) for i, each in enumerate(operands)]
        expected = second_gradients(case.formula, plain)
        distributed = [shards.placed(each, mesh, (placement,), i in case.constants) for i, each in enumerate(operands)]
        found[name, str(placement)] = shards.error_of(second_gradients(case.function, distributed), expected)
    return found


def what_mixes():
    """What a DTensor beside plain tensors gives, a mean with ignored targets, and a gate cut differently from its operand."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, gate = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    try:
        torch_sigmoid.sigmoid_gate(sharded, gate)
        message = None
    except RuntimeError as error:
        message = str(error)
    with torch_sigmoid.debug():
        try:
            torch_sigmoid.binary_cross_entropy_with_logits(sharded, sharded.detach())
            refused = None
        except ValueError as error:
            refused = str(error)
    target = (gate > 0).double()
    own = torch_sigmoid.binary_cross_entropy_with_logits(
        sharded, distribute_tensor(target, mesh, [Shard(0)]), pos_weight=torch.tensor(2.0).double(), ignore_index=0
    )
    whole = torch_sigmoid.binary_cross_entropy_with_logits(x, target, pos_weight=torch.tensor(2.0).double(), ignore_index=0)
    logits, labels = x.bfloat16().repeat(100, 1), target.bfloat16().repeat(100, 1)
    wide = torch_sigmoid.binary_cross_entropy_with_logits(logits.float(), labels)
    halves = [distribute_tensor(each, mesh, [Shard(0)]) for each in (logits, labels)]
    narrow = torch_sigmoid.binary_cross_entropy_with_logits(*halves)
    try:
        torch_sigmoid.swiglu(sharded, distribute_tensor(gate, init_device_mesh("cpu", (1, 2)), [Shard(0), Replicate()]))
        crossed = None
    except RuntimeError as error:
        crossed = str(error)
    negative_dim = torch.ops.torch_sigmoid.gated_packed(
        distribute_tensor(x, mesh, [Shard(1)]), "silu", -1, True, 1.0, None, 0.0
    ).full_tensor() - torch_sigmoid.swiglu_packed(x)
    across = torch_sigmoid.swiglu(sharded, distribute_tensor(gate, mesh, [Shard(1)]))
    return {
        "message": message,
        "refused": refused,
        "mean": (own.full_tensor() - whole).abs().item(),
        "sum of the ranks' sums": (narrow.full_tensor() - wide).abs().item(),
        "crossed": crossed,
        "negative dim": negative_dim.abs().max().item(),
        "gate": (across.full_tensor() - torch_sigmoid.swiglu(x, gate)).abs().max().item(),
        "path": torch_sigmoid.path(sharded),
    }


def both():
    return errors_of_double_backward(), what_mixes()


def test_double_backward_and_mixed_operands_over_two_processes(processes):
    for errors, mixed in processes(2).run(both, within=120):
        assert {where: error for where, error in errors.items() if not error <= shards.TOLERANCE} == {}
        assert "need to convert all torch.Tensor to DTensor" in mixed["message"]
        assert "target must be in [0, 1], got 1.54" in mixed["refused"]
        assert mixed["mean"] < 1e-15
        assert mixed["sum of the ranks' sums"] < 1e-6  # a step of bf16 there is 4e-3
        assert "mesh" in mixed["crossed"]
        assert max(mixed["gate"], mixed["negative dim"]) < 1e-15
        assert "DTensor" not in mixed["path"].reason


@pytest.fixture
def mesh(device, tmp_path):
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


# Autograd's stream of a CPU, which DTensor asks for.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.ways("interpreter")
def test_kernels_run_on_the_shards(name, device, mesh, kernels):
    """One launch each where a plain tensor has one, with its bits: in value, gradients and second gradients."""
    operands = NAMED[name].operands(lambda *shape: random(shape, torch.float32, device), 5, 6)
    constants = NAMED[name].constants
    plain = [each.clone().requires_grad_(i not in constants) for i, each in enumerate(operands)]
    sharded = [distribute_tensor(each, mesh, [Shard(0)]).requires_grad_(i not in constants) for i, each in enumerate(operands)]
    launches, results = [], []
    for leaves in (plain, sharded):
        before = kernels.n_launches
        value = NAMED[name].function(*leaves)
        gradients = torch.autograd.grad(value, [each for each in leaves if each.requires_grad], torch.ones_like(value))
        results.append((value, *gradients, *second_gradients(NAMED[name].function, leaves)))
        launches.append(kernels.n_launches - before)
    assert all(isinstance(each, DTensor) for each in results[1])
    for expected, found in zip(*results):
        torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-6, atol=1e-7)
    assert launches[0] == launches[1]


class Tensor:
    def __init__(self, shape, *placements):
        self.shape, self.placements = shape, placements


def test_the_largest_sharded_tensor_decides():
    wide, row = Tensor((4, 6), Shard(1)), Tensor((4, 1), Shard(0))
    assert follow([wide, row], [(4, 6), (4, 1)], (), ()) == ([(Shard(1),), (Replicate(),)], [(Shard(1),), (Partial(),)])


def test_a_dimension_that_is_kept_whole_is_gathered():
    packed, grad = Tensor((4, 8), Shard(1)), Tensor((4, 4), Shard(0))
    assert follow([grad, packed], [(4, 8)], (1,), ()) == ([(Shard(0),), (Shard(0),)], [(Shard(0),)])
    assert follow([packed], [(4, 8)], (1,), ()) == ([(Replicate(),)], [(Replicate(),)])


def test_linear_in_what_is_partial_and_else_not():
    linear = [Linear(frozenset([1]), frozenset([0]))]
    gate, up = Tensor((4,), Replicate()), Tensor((4,), Partial())
    assert follow([gate, up], [(4,)], (), linear) == ([(Replicate(),), (Partial(),)], [(Partial(),)])
    largest = Tensor((4,), Partial("max"))
    assert follow([gate, largest], [(4,)], (), linear) == ([(Replicate(),), (Replicate(),)], [(Replicate(),)])
    assert follow([up, gate], [(4,)], (), linear) == ([(Replicate(),), (Replicate(),)], [(Replicate(),)])


def test_shards_without_a_dimension_of_their_own():
    weight = Tensor((6,), Replicate())
    grid = Tensor((4, 6), Shard(1))
    assert follow([grid, weight], [()], (), ()) == ([(Shard(1),), (Shard(0),)], [(Partial(),)])
