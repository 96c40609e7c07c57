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
import torch.nn.functional as F
from torch import Tensor

import torch_sigmoid
from torch_sigmoid import kernels

# A provider with a larger relative error is not timed: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
# The values that GPT-OSS uses.
ALPHA, LIMIT = 1.702, 7.0
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


def gate(written, formula, ours, operands, columns=4096, **packages) -> Operator:
    return Operator("gates", written, formula, operands, providers(formula, ours, packages), columns)


def loss(written, formula, ours, operands, constants, **packages) -> Operator:
    return Operator("losses", written, formula, operands, providers(formula, ours, packages), 4096, constants)


def gated(x, gate):
    return x * torch.sigmoid(gate)


def swiglu(gate, up):
    return F.silu(gate) * up


def clamped_swiglu(gate, up):
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def focal_loss(inputs, targets, alpha=0.25, gamma=2.0, reduction="none"):
    """The formula of torchvision.ops."""
    p = torch.sigmoid(inputs)
    loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    loss = loss * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def siglip_loss(image, text, scale, bias=None):
    """open_clip's formula: -log σ(±logit), + for an image and its own text, summed over texts, averaged over images."""
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def one(make, rows, columns):
    return (make(rows, columns),)


def two(make, rows, columns):
    return make(rows, columns), make(rows, columns)


def packed(make, rows, columns):
    return (make(rows, 2 * columns),)


def one_gate_a_row(make, rows, columns):
    return make(rows, columns), make(rows, 1)


def two_beyond_the_limit(make, rows, columns):
    """Scaled so that one value in fifty is clamped."""
    return 3 * make(rows, columns), 3 * make(rows, columns)


def logits_and_targets(make, rows, columns):
    """One target in ten is 1."""
    return make(rows, columns), (make(rows, columns) > 1.28).to(make(1).dtype)


def with_weights_of_classes(make, rows, columns):
    return *logits_and_targets(make, rows, columns), make(columns).abs(), make(columns).abs()


def features(make, rows, columns):
    """Their logits are around -1, with a standard deviation of 1."""
    scale = make(1)[0]
    return make(rows, columns), make(rows, columns), torch.full_like(scale, columns**-0.5), torch.full_like(scale, -1.0)


def weighted_cross_entropy(function):
    return lambda x, t, weight, pos_weight: function(x, t, weight, pos_weight=pos_weight)


@functools.cache
def operators() -> dict[str, Operator]:
    activations = "fla.modules.activations"
    return {
        "sigmoid": Operator("sigmoid", "1 / (1 + e⁻ˣ)", torch.sigmoid, lambda make, n, _: (make(n),), sigmoid_providers()),
        "logsigmoid": gate(
            "min(x, 0) - log(1 + e), e = e^-abs(x)",
            F.logsigmoid,
            torch_sigmoid.logsigmoid,
            one,
            fla=f"{activations}:logsigmoid",
        ),
        "silu": gate("x·σ(x)", F.silu, torch_sigmoid.silu, one, fla=f"{activations}:swish"),
        "glu": gate("a·σ(b)", F.glu, torch_sigmoid.glu, packed),
        "sigmoid_gate": gate("x·σ(g)", gated, torch_sigmoid.sigmoid_gate, two),
        "sigmoid_gate, broadcast": gate("x·σ(g), one g a row", gated, torch_sigmoid.sigmoid_gate, one_gate_a_row, columns=256),
        "swiglu": gate(
            "silu(g)·u",
            swiglu,
            torch_sigmoid.swiglu,
            two,
            Liger="liger_kernel.ops.swiglu:LigerSiLUMulFunction.apply",
            fla=f"{activations}:swiglu",
        ),
        "swiglu, packed": gate("silu(a)·b", lambda packed: swiglu(*packed.chunk(2, -1)), torch_sigmoid.swiglu, packed),
        "swiglu, clamped": gate(
            "g·σ(αg)·(u + 1), g ≤ limit, -limit ≤ u ≤ limit",
            clamped_swiglu,
            functools.partial(torch_sigmoid.swiglu, alpha=ALPHA, limit=LIMIT),
            two_beyond_the_limit,
        ),
        "binary_cross_entropy_with_logits": loss(
            "mean of t·log(1 + e⁻ˣ) + (1-t)·log(1 + eˣ)",
            F.binary_cross_entropy_with_logits,
            torch_sigmoid.binary_cross_entropy_with_logits,
            logits_and_targets,
            (1,),
        ),
        "binary_cross_entropy_with_logits, weighted": loss(
            "the same with weights of classes, of their positive part too",
            weighted_cross_entropy(F.binary_cross_entropy_with_logits),
            weighted_cross_entropy(torch_sigmoid.binary_cross_entropy_with_logits),
            with_weights_of_classes,
            (1, 2, 3),
        ),
        "sigmoid_focal_loss": loss(
            "mean of α_t·(1-p_t)^γ·BCE",
            functools.partial(focal_loss, reduction="mean"),
            functools.partial(torch_sigmoid.sigmoid_focal_loss, reduction="mean"),
            logits_and_targets,
            (1,),
        ),
        "siglip_loss": Operator(
            "siglip",
            "-Σ log σ(±(scale·⟨image_i, text_j⟩ + bias))/B",
            siglip_loss,
            features,
            providers(siglip_loss, torch_sigmoid.siglip_loss, {}),
            256,
        ),
    }


def chosen(names) -> dict[str, Operator]:
    """The operators of these names and families."""
    return {name: operator for name, operator in operators().items() if name in names or operator.family in names}
