"""What is measured: each operator, and the providers whose implementations of it are compared.

`formula` is the operator in torch operators. Run in float64, with autograd for its gradients, it is the truth that every
provider must meet before it is timed. The provider "torch" is the same formula in the dtype at hand; all other times are given
relative to it. An operator of another package takes part if that package is installed and works.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import torch_sigmoid
from torch_sigmoid import kernels
from torch_sigmoid.operators import cases

# A provider with a larger relative error is not timed: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
ORDERS = ("forward", "backward", "double backward")


class Provider(NamedTuple):
    """`foreign`: from another package, so it is left out if it fails, and its backward may overwrite its operands."""

    function: Callable[..., Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    foreign: bool = False


class Operator(NamedTuple):
    """An operator; its `family` decides at which sizes it is timed, and into which file its times go.

    `written` is the formula for a reader. `operands(make, rows, columns)` gives the operands for rows·columns elements of the
    output (for a loss, of the input), and calls `make(*shape)` for each random one. Operands whose index is in `constants` get
    no gradient.
    """

    family: str
    written: str
    formula: Callable[..., Tensor]
    operands: Callable[[Callable[..., Tensor], int, int], tuple[Tensor, ...]]
    providers: dict[str, Provider]
    columns: int = 1
    constants: tuple[int, ...] = ()

    def build(self, make: Callable[..., Tensor], n: int) -> tuple[Tensor, ...]:
        columns = min(n, self.columns)
        return self.operands(make, n // columns, columns)

    def leaves(self, operands) -> tuple[Tensor, ...]:
        """The operands as leaves of a graph, on the same memory."""
        return tuple(operand.detach().requires_grad_(index not in self.constants) for index, operand in enumerate(operands))


def differentiable(leaves) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf.requires_grad]


def orders(function, leaves):
    """Each order of differentiation, with a call that runs the kernels of that order alone."""
    inputs = differentiable(leaves)
    output = function(*leaves)
    upstream = torch.ones_like(output).requires_grad_()
    grads = torch.autograd.grad(output, inputs, upstream, create_graph=True)
    v = [torch.ones_like(grad) for grad in grads]
    calls = (
        lambda: function(*leaves),
        lambda: torch.autograd.grad(output, inputs, upstream.detach(), retain_graph=True),
        lambda: torch.autograd.grad(grads, (upstream, *inputs), v),
    )
    yield from zip(ORDERS, calls)


def _naive():
    """The Function that a Triton tutorial would write: contiguous tensors, `kernel[grid]`, every lane masked."""
    import triton

    from .naive import sigmoid_backward_kernel, sigmoid_forward_kernel

    class NaiveSigmoid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x = x.contiguous()
            y = torch.empty_like(x)
            sigmoid_forward_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK_SIZE=1024)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad_output):
            (y,) = ctx.saved_tensors
            grad_output = grad_output.contiguous()
            grad_input = torch.empty_like(y)
            sigmoid_backward_kernel[(triton.cdiv(y.numel(), 1024),)](grad_output, y, grad_input, y.numel(), BLOCK_SIZE=1024)
            return grad_input

    return NaiveSigmoid.apply


def compiled(formula) -> Provider:
    return Provider(torch.compile(formula, dynamic=False), ("cuda",))


def sigmoid_providers() -> dict[str, Provider]:
    table = {
        "torch": Provider(torch.nn.Sigmoid()),
        "torch.compile": compiled(torch.sigmoid),
        "ours, output": Provider(torch_sigmoid.Sigmoid()),
        "ours, input": Provider(torch_sigmoid.Sigmoid(save="input")),
    }
    if not kernels.UNAVAILABLE and not kernels.INTERPRETED:
        table["naive Triton"] = Provider(_naive(), ("cuda",))
    return table


def _of_package(path: str) -> Callable[..., Tensor] | None:
    """The function at this path of a package; None if it is missing, or if importing it fails for whatever reason."""
    if not torch.cuda.is_available():
        return None
    module, _, name = path.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception:
        return None


def providers(formula, ours, packages) -> dict[str, Provider]:
    """`packages`: names of packages that have the operator, and the path of the function in each."""
    foreign = {name: function for name, path in packages.items() if (function := _of_package(path))}
    table = {"torch": Provider(formula), "torch.compile": compiled(formula), "ours": Provider(ours)}
    return table | {name: Provider(function, ("cuda",), foreign=True) for name, function in foreign.items()}


# The same operators in other packages: where they stand, by the package's name.
ELSEWHERE = {
    "logsigmoid": {"fla": "fla.modules.activations:logsigmoid"},
    "silu": {"fla": "fla.modules.activations:swish"},
    "swiglu": {
        "Liger": "liger_kernel.ops.swiglu:LigerSiLUMulFunction.apply",
        "fla": "fla.modules.activations:swiglu",
    },
}


@functools.cache
def operators() -> dict[str, Operator]:
    """The table of torch_sigmoid.operators with its providers; sigmoid, whose two `save` are providers, has one row."""
    table = {}
    for name, row, case in cases():
        if row.family == "sigmoid":
            own = {"providers": sigmoid_providers(), "operands": lambda make, n, _: (make(n),)}
        else:
            own = {"providers": providers(case.formula, case.function, ELSEWHERE.get(name, {})), "operands": case.operands}
        if row.family != "sigmoid" or name == "sigmoid":
            table[name] = Operator(
                family=row.family,
                written=case.written,
                formula=case.formula,
                columns=case.columns,
                constants=case.constants,
                **own,
            )
    return table


def chosen(names) -> dict[str, Operator]:
    """The operators of these names and families."""
    return {name: operator for name, operator in operators().items() if name in names or operator.family in names}
