"""What torch.compile and torch.export make of each operator: counts of the graphs, ours beside torch's.

compiled   the graphs of forward and backward that Inductor is about to turn into code: transcendental operators (exp, log1p,
           sigmoid, a power whose exponent is no integer, ...) and divisions, of tensors with at least one dimension
saved      bytes per element of the output (for a loss, of the input) that the forward graph keeps for the backward graph, each
           storage once
exported   operators in the graph of torch.export, and in that of torch.onnx, which needs onnxscript

Dynamic shapes give the same counts; tests/test_graphs.py compares them. SigLIP is left out: its graphs depend on the number of
blocks. Writes graphs.csv and .json to the folder `cpu`. Takes about a minute, and two with ONNX.
"""

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_sigmoid.operators import cases

from . import record
from .operators import Operator, Provider

CPU = torch.device("cpu")
ROWS, COLUMNS = 32, 64
DTYPES = (torch.float32, torch.bfloat16)
# By their names in aten. Inductor computes glu as x·σ(gate).
TRANSCENDENTAL = {
    "glu",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sigmoid",
    "tanh",
    "sin",
    "cos",
    "atan",
    "erf",
}
DIVISIONS = {"div", "reciprocal"}


class Graphs(NamedTuple):
    """Of a training step: `saved` is the number of bytes that the forward graph keeps for the backward graph."""

    forward: GraphModule
    backward: GraphModule
    saved: int


class Counts(NamedTuple):
    transcendental: int
    divisions: int


def each_case() -> Iterator[tuple[str, Operator]]:
    """Every way to call an operator, but SigLIP, beside the same in torch's operators."""
    for name, row, case in cases():
        if row.family != "siglip":
            own = {"torch": Provider(case.formula), "ours": Provider(case.function)}
            yield name, Operator(row.family, case.written, case.formula, case.operands, own, case.columns, case.constants)


class Call(torch.nn.Module):
    """A function as a module, which torch.export demands."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands)


def run_compiled(function: Callable[..., Tensor], leaves, dynamic: bool = False) -> tuple[dict[str, GraphModule], list[Tensor]]:
    """The graphs "forward" and, where a leaf wants a gradient, "backward"; and the tensors that backward gets from forward.

    They are what Inductor has after its decompositions and its choice of what to recompute; torch's operators run them here.
    """
    from torch._inductor.compile_fx import compile_fx

    graphs, saved = {}, []

    def keep(graph, inputs, **options):
        graphs["backward" if options.get("is_backward") else "forward"] = graph

        def run(arguments):
            if options.get("is_backward"):
                names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
                saved.extend(
                    argument
                    for name, argument in zip(names, arguments)
                    if isinstance(argument, Tensor) and not name.startswith("tangents")
                )
            return graph(*arguments)

        run._boxed_call = True  # arguments come as one list, else torch warns
        return run

    def call(*operands):
        return function(*operands)  # torch 2.10 does not compile a function of torch.nn.functional itself

    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, dynamic=dynamic, backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=keep)
    )
    # dynamic=True makes symbols of numbers, too; here shapes alone are dynamic. And `keep` would not see a graph that torch
    # finds in its cache on disk, where Inductor has put it.
    with torch._dynamo.config.patch(specialize_float=True), torch._functorch.config.patch(enable_autograd_cache=False):
        output = compiled(*leaves)
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    return graphs, saved


def of_training(function: Callable[..., Tensor], leaves, dynamic: bool = False) -> Graphs:
    graphs, saved = run_compiled(function, leaves, dynamic)
    storages = {storage.data_ptr(): storage.nbytes() for tensor in saved if (storage := tensor.untyped_storage()).nbytes()}
    return Graphs(graphs["forward"], graphs["backward"], sum(storages.values()))


def calls(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def is_transcendental(node: Node) -> bool:
    name = node.target.overloadpacket.__name__
    if name == "pow":
        _, exponent = node.args
        return not (isinstance(exponent, int | float) and float(exponent).is_integer())
    return name in TRANSCENDENTAL


def count(*graphs: GraphModule) -> Counts:
    """Of the nodes whose value has a dimension: work on one number, such as a mean's division, is not per element."""
    nodes = [
        node
        for graph in graphs
        for node in calls(graph)
        if isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta["val"], Tensor) and node.meta["val"].dim()
    ]
    return Counts(sum(map(is_transcendental, nodes)), sum(node.target.overloadpacket.__name__ in DIVISIONS for node in nodes))


def exported(function: Callable[..., Tensor] | torch.nn.Module, operands, strict: bool = False) -> GraphModule:
    module = function if isinstance(function, torch.nn.Module) else Call(function)
    return torch.export.export(module, tuple(operands), strict=strict).module()


def onnx_operators(function: Callable[..., Tensor] | torch.nn.Module, operands) -> list[str]:
    """The operators of the ONNX graph, sorted by name."""
    module = function if isinstance(function, torch.nn.Module) else Call(function)
    # Of torch, about itself and what is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, tuple(operands), dynamo=True, verbose=False)
    return sorted(node.op_type for node in program.model_proto.graph.node)


def row_of(name: str, operator: Operator, label: str, dtypes=DTYPES) -> dict:
    function = operator.providers[label].function
    row = {"operator": name, "provider": label}
    for dtype in dtypes:
        operands = operator.operands(lambda *shape, dtype=dtype: torch.randn(shape, dtype=dtype), ROWS, COLUMNS)
        graphs = of_training(function, operator.leaves(operands))
        if dtype is torch.float32:
            row |= count(graphs.forward, graphs.backward)._asdict() | {"exported": len(calls(exported(function, operands)))}
            if importlib.util.find_spec("onnxscript"):
                row["onnx"] = len(onnx_operators(function, operands))
        row[f"saved, {record.short(dtype)}"] = graphs.saved / (ROWS * COLUMNS)
    return row


def main(argv=None) -> int:
    arguments = record.parser("graphs", __doc__, device=False).parse_args(argv)
    work = list(each_case())
    rows = [row_of(*each, label) for each in record.progress(work, "graphs") for label in ("torch", "ours")]
    if not importlib.util.find_spec("onnxscript"):
        print("graphs: ONNX is not counted, onnxscript is not installed")
    record.write(record.folder_of(CPU, arguments.out), "graphs", rows, record.environment(CPU))
    record.show("Graphs of torch.compile and torch.export", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
