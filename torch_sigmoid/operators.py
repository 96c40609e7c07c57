"""The table of operators: how to call each, what of torch it replaces, and which gradients its backward loses.

An operator is added here and in its family, and nowhere else: `replace` and `intercept`, the doctor
(`python -m torch_sigmoid`), `warmup`, `GradientWatch`, the tests and the benchmarks read this table.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, nn
from . import functional as ours

# The form of GPT-OSS.
ALPHA, LIMIT, UP_OFFSET = 1.702, 7.0, 1.0

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A way to call an operator, and the same in torch's operators. Tests compare the two, and benchmarks time them.

    `written` is the formula for a reader. `operands(make, rows, columns)` gives the operands for rows·columns elements of the
    output (of the input, for a loss), each random one by `make(*shape)`; those among `constants` get no gradient.
    """

    written: str
    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    operands: Callable[[Make, int, int], tuple[Tensor, ...]]
    columns: int = 4096
    constants: tuple[int, ...] = ()


class Gate(NamedTuple):
    """What a call of a layer applies f to: x, which is `tensor`, one of those that it is called with, or a part along `dim`."""

    tensor: Tensor
    x: Tensor
    dim: int | None = None

    @classmethod
    def packed(cls, tensor: Tensor, dim: int, part: int, interleaved: bool = False) -> "Gate | None":
        """One half along `dim`, or every second number; None where the layer is about to refuse the tensor."""
        if tensor.dim() == 0 or tensor.size(dim) % 2:
            return None
        dim %= tensor.dim()
        half = tensor.size(dim) // 2
        parts = tensor.unflatten(dim, (half, 2) if interleaved else (2, half))
        return cls(tensor, parts.select(dim + interleaved, part), dim)

    def below(self, limit: float | None) -> "Gate":
        """The gate of a clamped form. Beyond the limit f' is 0, as it is of silu at -∞, for which such an x counts."""
        return self if limit is None else self._replace(x=torch.where(self.x > limit, -math.inf, self.x))


@dataclass(frozen=True)
class Watched:
    """What a layer does to gradients: f'(x) = kind'(scale·x), for `GradientWatch`.

    `lost_by_torch` and `lost` say when the backward of torch's layer, and of ours, finds 0 where f' is a normal number.
    `gate(module, *tensors)` is the x of a call, of a layer with a gate; of others it is the input.
    """

    kind: str
    lost_by_torch: str
    lost: str = "never"
    scale: Callable[[torch.nn.Module], float] = field(default=lambda module: 1.0)
    gate: Callable[..., Gate | None] = field(default=lambda module, input: Gate(input, input))


@dataclass(frozen=True)
class Row:
    """An operator. `cases` has the plain way to call it under "", and others under their names.

    An operator of one tensor may have `exact`: f and f' of a float, computed without cancellation, for the doctor to compare
    with.
    """

    family: str
    cases: dict[str, Case]
    module: type[torch.nn.Module]
    torch_module: type[torch.nn.Module] | None = None
    torch_functions: tuple[Callable[..., Tensor], ...] = ()
    exact: tuple[Callable[[float], float], Callable[[float], float]] | None = None
    watched: Watched | None = None


def exact_sigmoid(x: float, scale: float = 1.0) -> float:
    """σ(scale·x), with what the product's rounding loses."""
    power = scale * x
    sigma = 1 / (1 + math.exp(-power)) if x >= 0 else math.exp(power) / (1 + math.exp(power))
    lost = float(Fraction(scale) * Fraction(x) - Fraction(power))
    return sigma * (1 + lost * (1 - sigma))


def exact_sigmoid_slope(x: float) -> float:
    return exact_sigmoid(x) * exact_sigmoid(-x)


def exact_silu_slope(x: float, scale: float = 1.0) -> float:
    """silu'(scale·x)."""
    return exact_sigmoid(x, scale) * (1 + scale * x * exact_sigmoid(-x, scale))


def exact_logsigmoid(x: float) -> float:
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


# What torch has no operator for.


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_packed(packed: Tensor) -> Tensor:
    return swiglu(*packed.chunk(2, -1))


def swiglu_interleaved(packed: Tensor) -> Tensor:
    return swiglu(packed[..., ::2], packed[..., 1::2])


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + UP_OFFSET)


def focal_loss(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> Tensor:
    """As torchvision.ops has it: σ, the power of 1 - p_t, and their product."""
    p = torch.sigmoid(inputs)
    loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    loss = loss * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As open_clip has it: the logits of all pairs, and log σ of them with the sign of each pair; of more texts, too."""
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    signs = 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def weighted_cross_entropy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, weight, pos_weight: function(x, t, weight, pos_weight=pos_weight)


# What a watch sees of the gates.


def alpha_of(module: torch.nn.Module) -> float:
    return cast(nn.SwiGLU, module).alpha


def gate_of_packed(module: nn.SwiGLUPacked, packed: Tensor) -> Gate | None:
    gate = Gate.packed(packed, module.dim, 0, module.interleaved)
    return gate and gate.below(module.limit)


# Operands


def one(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    return (make(rows, columns),)


def two(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    return make(rows, columns), make(rows, columns)


def packed(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    return (make(rows, 2 * columns),)


def one_gate_a_row(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    return make(rows, columns), make(rows, 1)


def two_beyond_the_limit(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Operands so large that one in fifty is clamped; none at the limit, where torch's clamp has a gradient up to 2.13."""
    gate, up = 3 * make(rows, columns), 3 * make(rows, columns)
    return gate.masked_fill(gate == LIMIT, 0.0), up.masked_fill(up.abs() == LIMIT, 0.0)


def logits_and_targets(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    """One target in ten is 1."""
    return make(rows, columns), (make(rows, columns) > 1.28).to(make(1).dtype)


def with_weights_of_classes(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    return *logits_and_targets(make, rows, columns), make(columns).abs(), make(columns).abs()


def features(make: Make, rows: int, columns: int) -> tuple[Tensor, ...]:
    """Features whose logits have mean -1 and deviation 1."""
    scale = make(1)[0]
    return make(rows, columns), make(rows, columns), torch.full_like(scale, columns**-0.5), torch.full_like(scale, -1.0)


OPERATORS: dict[str, Row] = {
    "sigmoid": Row(
        "sigmoid",
        {
            "": Case("1 / (1 + e⁻ˣ)", ours.sigmoid, torch.sigmoid, one, columns=1),
            "from the input": Case("the same", functools.partial(ours.sigmoid, save="input"), torch.sigmoid, one, columns=1),
        },
        nn.Sigmoid,
        torch.nn.Sigmoid,
        (torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.sigmoid),
        (exact_sigmoid, exact_sigmoid_slope),
        Watched("sigmoid", "sigmoid rounds to 1", "sigmoid rounds to 1"),
    ),
    "logsigmoid": Row(
        "gates",
        {"": Case("min(x, 0) - log(1 + e), e = e^-abs(x)", ours.logsigmoid, F.logsigmoid, one)},
        nn.LogSigmoid,
        torch.nn.LogSigmoid,
        (F.logsigmoid,),
        (exact_logsigmoid, lambda x: exact_sigmoid(-x)),
        Watched("logsigmoid", "never"),
    ),
    "silu": Row(
        "gates",
        {"": Case("x·σ(x)", ours.silu, F.silu, one)},
        nn.SiLU,
        torch.nn.SiLU,
        (F.silu,),
        (lambda x: x * exact_sigmoid(x), exact_silu_slope),
        Watched("silu", "sigmoid rounds to 0 in fp32"),
    ),
    "quick_gelu": Row(
        "gates",
        {"": Case("x·σ(1.702x)", ours.quick_gelu, quick_gelu, one)},
        nn.QuickGELU,
        exact=(
            lambda x: x * exact_sigmoid(x, 1.702),
            lambda x: exact_silu_slope(x, 1.702),
        ),
        watched=Watched("silu", "never", scale=lambda module: cast(nn.QuickGELU, module).alpha),
    ),
    "glu": Row(
        "gates",
        {"": Case("a·σ(b)", ours.glu, F.glu, packed)},
        nn.GLU,
        torch.nn.GLU,
        (F.glu,),
        watched=Watched(
            "sigmoid", "sigmoid rounds to 1", gate=lambda module, input: Gate.packed(input, cast(nn.GLU, module).dim, 1)
        ),
    ),
    "sigmoid_gate": Row(
        "gates",
        {
            "": Case("x·σ(g)", ours.sigmoid_gate, gated, two),
            "broadcast": Case("x·σ(g), one g a row", ours.sigmoid_gate, gated, one_gate_a_row, columns=256),
        },
        nn.SigmoidGate,
        watched=Watched("sigmoid", "never", gate=lambda module, input, gate: Gate(gate, gate)),
    ),
    "swiglu": Row(
        "gates",
        {
            "": Case("silu(g)·u", ours.swiglu, swiglu, two),
            "clamped": Case(
                "g·σ(αg)·(u + 1), g ≤ limit, -limit ≤ u ≤ limit",
                functools.partial(ours.swiglu, alpha=ALPHA, limit=LIMIT, up_offset=UP_OFFSET),
                clamped_swiglu,
                two_beyond_the_limit,
            ),
        },
        nn.SwiGLU,
        watched=Watched("silu", "never", scale=alpha_of, gate=lambda module, gate, up: Gate(gate, gate).below(module.limit)),
    ),
    "swiglu_packed": Row(
        "gates",
        {
            "": Case("silu(a)·b", ours.swiglu_packed, swiglu_packed, packed),
            "interleaved": Case(
                "silu(a)·b, a and b alternating",
                functools.partial(ours.swiglu_packed, interleaved=True),
                swiglu_interleaved,
                packed,
            ),
        },
        nn.SwiGLUPacked,
        watched=Watched("silu", "never", scale=alpha_of, gate=gate_of_packed),
    ),
    "binary_cross_entropy_with_logits": Row(
        "losses",
        {
            "": Case(
                "mean of t·log(1 + e⁻ˣ) + (1-t)·log(1 + eˣ)",
                ours.binary_cross_entropy_with_logits,
                F.binary_cross_entropy_with_logits,
                logits_and_targets,
                constants=(1,),
            ),
            "weighted": Case(
                "the same with weights of classes, of their positive part too",
                weighted_cross_entropy(ours.binary_cross_entropy_with_logits),
                weighted_cross_entropy(F.binary_cross_entropy_with_logits),
                with_weights_of_classes,
                constants=(1, 2, 3),
            ),
        },
        nn.BCEWithLogitsLoss,
        torch.nn.BCEWithLogitsLoss,
        (F.binary_cross_entropy_with_logits,),
    ),
    "sigmoid_focal_loss": Row(
        "losses",
        {
            "": Case(
                "mean of α_t·(1-p_t)^γ·BCE",
                functools.partial(ours.sigmoid_focal_loss, reduction="mean"),
                functools.partial(focal_loss, reduction="mean"),
                logits_and_targets,
                constants=(1,),
            )
        },
        nn.SigmoidFocalLoss,
    ),
    "siglip_loss": Row(
        "siglip",
        {
            "": Case(
                "-Σ log σ(±(scale·⟨image_i, text_j⟩ + bias))/B",
                ours.siglip_loss,
                siglip_loss,
                features,
                columns=256,
            )
        },
        nn.SigLIPLoss,
    ),
}


def cases() -> Iterator[tuple[str, Row, Case]]:
    """Every case of every operator, by a name such as "swiglu" or "swiglu, clamped"."""
    for name, row in OPERATORS.items():
        for way, case in row.cases.items():
            yield f"{name}, {way}" if way else name, row, case


FAMILIES = tuple(dict.fromkeys(row.family for row in OPERATORS.values()))


def warmup(
    device: torch.device | str | int | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    operators: Iterable[str | torch.nn.Module] = ("sigmoid",),
) -> None:
    """Compile kernels and load them onto a device, so that no training step and no CUDA-graph capture has to.

    Covers forward, backward and double backward of tensors that are dense in one memory format, at any size, and the expanded
    upstream gradients of `.sum().backward()`. Slices and transposes still compile at their first call. So does a gate or loss
    with options other than the defaults, unless you pass its layer, or the model that contains it. Triton keeps compilations
    on disk, so a second process only loads them. Does nothing where no kernel runs.

    Args:
        device: by default the current accelerator, or the CPU without one.
        dtypes: any of float64, float32, float16 and bfloat16.
        operators: names of functions ("silu") or families ("sigmoid", "gates", "losses", "siglip"), or modules; in a model,
            every layer of this package is covered, with its options.

    Raises:
        TypeError: `dtypes` is a single one, or an operator is neither a name nor a module.
        ValueError: a dtype has no kernels, or no operator or family has this name.

    Example:
        >>> torch_sigmoid.warmup(dtypes=[torch.bfloat16], operators=["gates", "losses"])
    """
    if isinstance(dtypes, (str, torch.dtype)):
        raise TypeError(f"warmup(): dtypes must be several, such as [torch.float32], got {dtypes!r}")
    dtypes = tuple(dtypes)
    for dtype in dtypes:
        if dtype not in dispatch.FLOAT_DTYPES:
            raise ValueError(f"warmup(): dtypes must be among torch.float64, float32, float16 and bfloat16, got {dtype!r}")
    chosen = list(_chosen((operators,) if isinstance(operators, (str, torch.nn.Module)) else operators))
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"warmup(): device must be one of this machine, got {device!r}; dtypes and operators come after it"
        ) from error
    if dispatch.kernels_refusal(device) is not None:
        return
    before = dispatch.torch_below(0)
    try:
        for function, case in chosen:
            for dtype in dtypes:
                _run_once(function, case, device, dtype)
    finally:
        dispatch.torch_below(before)


def _chosen(operators: Iterable[str | torch.nn.Module]) -> Iterator[tuple[Callable[..., Tensor], Case]]:
    """Each function or layer to call, with the case that makes its operands."""
    for operator in operators:
        if isinstance(operator, torch.nn.Module):
            found = [pair for module in operator.modules() for pair in _calls_of(module)]
            if not found:
                raise ValueError(f"warmup(): {type(operator).__name__} has no layer of this package; call replace first?")
            yield from found
        elif isinstance(operator, str):
            cases = [case for name, row in OPERATORS.items() if operator in (name, row.family) for case in row.cases.values()]
            if not cases:
                known = ", ".join(dict.fromkeys((*FAMILIES, *OPERATORS)))
                raise ValueError(f"warmup(): operators must be among {known}, or modules, got {operator!r}")
            for case in cases:
                yield case.function, case
        else:
            raise TypeError(f"warmup(): operators must be names or modules, got {operator!r}")


def _calls_of(module: torch.nn.Module) -> Iterator[tuple[Callable[..., Tensor], Case]]:
    """What a module calls, if it is a layer of this package, or if `replace` has fused a gate in it."""
    for row in OPERATORS.values():
        if type(module) is row.module:
            yield module, row.cases[""]
    for holder in (module, *vars(module).values()):
        for name in getattr(holder, "operators", ()) if isinstance(holder, torch.nn.Module) else ():
            for case in OPERATORS[name].cases.values():
                yield case.function, case


def _run_once(function: Callable[..., Tensor], case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Forward, backward and double backward of dense tensors, and backward from an expanded gradient."""

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    operands = case.operands(make, 2, 17)
    leaves = [each.detach().requires_grad_(index not in case.constants) for index, each in enumerate(operands)]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for expanded in (False, True):
            output = function(*leaves)
            upstream = (output.new_ones(()).expand(output.shape) if expanded else torch.ones_like(output)).requires_grad_()
            grads = torch.autograd.grad(output, inputs, upstream, create_graph=True)
            torch.autograd.grad(grads, [upstream, *inputs], [torch.ones_like(each) for each in grads])
            with torch.no_grad():  # siglip_loss has a kernel for its value alone
                function(*leaves)
