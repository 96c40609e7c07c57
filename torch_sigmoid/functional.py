"""The public functions: validation, and the choice of path.

A call takes one of three paths, chosen in `path`:

triton   a float tensor on a device Triton drives: our kernels, under a torch.autograd.Function where a gradient is wanted
traced   under torch.compile, export, jit.trace, functionalize and nested torch.func.jvp, which see torch operators only:
         the same numerics in these, for a compiler to fuse
torch    everything else: torch's own operator; our gradient formula in torch operators where torch's is not exact

The gates and losses take the same three; each of their operators (gates.py, losses.py) finds out for itself whether a kernel
may run. The losses also take torch operators under torch.func and forward mode.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from . import autograd, gates, losses, ops, siglip
from .checks import (
    DENSE_FLOATS,
    SAVE_MODES,
    check_broadcasts,
    check_chunk_size,
    check_devices,
    check_loss_options,
    check_save,
    check_targets,
    check_tensors,
    described,
    halved_dim,
    is_value_of,
    number_for,
    process_group,
    promoted,
    weight_for,
)

__all__ = [
    "Path",
    "binary_cross_entropy_with_logits",
    "debug",
    "glu",
    "logsigmoid",
    "path",
    "siglip_loss",
    "sigmoid",
    "sigmoid_",
    "sigmoid_focal_loss",
    "sigmoid_gate",
    "silu",
    "swiglu",
    "warmup",
]

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_WIDE_DTYPES = frozenset((torch.float32, torch.float64))


class Path(NamedTuple):
    """The path a call takes, and why."""

    name: str
    reason: str


_TRITON = Path(
    "triton",
    "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    if ops.kernels.INTERPRETED
    else "a float tensor on a device Triton drives",
)
_TRACED = Path("traced", "under torch.compile, export, jit.trace, functionalize or nested jvp, which see torch operators only")
_SPARSE_OR_NESTED = Path("torch", "sparse and nested tensors are torch's own")
_SMALL = Path("torch", "at this size torch's operator has the same bits and launches sooner (torch_sigmoid.ops.torch_below)")
_torch_path = cache(lambda reason: Path("torch", reason))


_Parameters, _Result = ParamSpec("_Parameters"), TypeVar("_Result")


def _overridable(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let an argument that is no tensor but has a `__torch_function__`, such as fx's Proxy, take over the call.

    Tensor subclasses and function modes do not: they see the torch operators that `function` calls. `sigmoid` and `sigmoid_`
    check for themselves: there this wrapper would cost about half as much as the call.
    """

    @wraps(function)
    def overridable(*args, **kwargs):
        arguments = *args, *kwargs.values()
        if has_torch_function(arguments) and not all(
            isinstance(each, Tensor) or not hasattr(type(each), "__torch_function__") for each in arguments
        ):
            return handle_torch_function(overridable, arguments, *args, **kwargs)
        return function(*args, **kwargs)

    return overridable


def path(input: Tensor, save: str = "output") -> Path:
    """Which path `sigmoid(input, save=save)` takes, and why.

    Args:
        input: the tensor that would be passed.
        save: the `save` that would be passed.

    Returns:
        `Path(name, reason)` with the name "triton", "traced" or "torch".

    Raises:
        TypeError: `input` is not a tensor.
        ValueError: `save` is neither "output" nor "input".
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"path(): input must be a torch.Tensor, got {type(input).__name__}")
    check_save(save)
    chosen = _path(input, save)
    refusal = ops.kernels_refusal(input.device) if chosen is _SMALL else None
    return _torch_path(refusal) if refusal else chosen


def _is_small(input: Tensor) -> bool:
    """Whether torch's operator gives the kernels' bits from the output, derivatives included, and costs less.

    Under a tracer numel() need not be a number, and comparing it would tie the trace to its answer.
    """
    return input.dtype in _WIDE_DTYPES and not (_is_compiling() or _is_tracing()) and input.numel() < ops.torch_below


def _path(input: Tensor, save: str) -> Path:
    if save == "output" and _is_small(input):
        return _SMALL
    if input.dtype not in ops.FLOAT_DTYPES:
        return _torch_path(f"dtype {input.dtype} is torch's own: the kernels take float64, float32, float16 and bfloat16")
    if input.layout is not torch.strided or input.is_nested:
        return _SPARSE_OR_NESTED
    if ops.only_torch_operators_are_seen():
        return _TRACED
    if type(input) not in ops.PLAIN_TYPES:
        return _torch_path(f"{type(input).__name__} is a Tensor subclass, which sees torch's operators")
    refusal = ops.kernels_refusal(input.device)
    return _TRITON if refusal is None else _torch_path(refusal)


def _is_ours(tensor: Tensor) -> bool:
    """Whether the formulas here cover it; the rest is torch's own."""
    return tensor.dtype in ops.FLOAT_DTYPES and tensor.layout is torch.strided and not tensor.is_nested


def _torch_gradient_suffices(input: Tensor, save: str) -> bool:
    """Whether torch's own sigmoid has the gradient that `save` promises.

    It saves σ and multiplies in the tensor's dtype, which is right in fp32 and fp64; in bf16 on a CPU it multiplies in fp32.
    """
    if not _is_ours(input):
        return True
    if save == "input":
        return False
    return input.dtype in _WIDE_DTYPES or (input.dtype is torch.bfloat16 and input.device.type == "cpu")


def sigmoid(input: Tensor, *, save: str = "output", out: Tensor | None = None) -> Tensor:
    r"""σ(x) = 1 / (1 + e^-x), element by element, with a gradient that need not be lost where σ rounds to 1.

    The gradient is grad·σ·(1-σ), computed in fp32 (fp64 for fp64) and rounded once. From a σ that has itself been rounded,
    1-σ loses its digits as x grows: in bf16 it is 0 from x = 6.25 on. save="input" keeps x in place of σ and computes
    grad·e/(1+e)² with e = e^-|x|, which is the same function (σ' is even) and loses nothing in either tail.

    Args:
        input: a tensor of any shape, layout and dtype that torch.sigmoid takes. Float tensors keep their dtype, integers and
            bool give the default dtype. fp64, fp32, fp16 and bf16 have kernels; the rest is torch's own.
        save: "output" saves σ for backward, which the next layer usually keeps anyway: no extra memory. "input" saves x: the
            gradient is within 1 ulp of the true derivative in 16 bit, 4 ulp in fp32 (which follows from an expf of 1 ulp:
            tests/bounds.py), and x stays alive until backward.
            Integer, complex, sparse and nested tensors have torch's own gradient under both.
        out: a tensor for the result, on its device; not differentiable, as in torch. The result is cast to its dtype, which
            may be narrower or wider, but not an integer one, nor a real one for a complex input.

    Returns:
        A tensor of input's shape and memory format. On a GPU it is meant to be torch.sigmoid's bit for bit: executed without
        one, the compiled kernel gives the bits of ATen's formula (tests/test_n1.py); no GPU has measured it yet.

    Raises:
        TypeError: `input` or `out` is not a tensor.
        ValueError: `save` is neither "output" nor "input"; `out` is on another device, or of a dtype that takes no such result.
        RuntimeError: `out` is given where a gradient is wanted.
    """
    if not isinstance(input, Tensor):
        if has_torch_function_unary(input):
            return handle_torch_function(sigmoid, (input,), input, save=save, out=out)
        raise TypeError(f"sigmoid(): input must be a torch.Tensor, got {type(input).__name__}")
    if save not in SAVE_MODES:
        check_save(save)
    if out is not None:
        return _sigmoid_out(input, out)
    # What _path would find out first, without the call.
    if (
        save == "output"
        and input.dtype in _WIDE_DTYPES
        and not (_is_compiling() or _is_tracing())
        and input.numel() < ops.torch_below
    ):
        return torch.sigmoid(input)
    chosen = _path(input, save)
    if chosen is _TRITON:
        return autograd.sigmoid(input, save)
    if chosen is _TRACED:
        # From the output, Inductor computes torch's own gradient as we do: in fp32, rounded once.
        return ops.sigmoid_for_tracing(input) if save == "input" else torch.sigmoid(input)
    return torch.sigmoid(input) if _torch_gradient_suffices(input, save) else autograd.sigmoid(input, save)


def sigmoid_(input: Tensor) -> Tensor:
    """σ(x) written over `input`, which is returned. Saves σ, the same tensor, for backward: no extra memory.

    The gradient is that of sigmoid(save="output"); under forward mode, transforms and tracers it is torch's own. A view in
    fp16 or bf16 that takes part in a gradient is computed out of place and copied back, as torch's rules on views demand.

    Args:
        input: a floating or complex tensor of any shape and layout.

    Raises:
        TypeError: `input` is not a tensor.
        RuntimeError: `input` is a leaf that requires grad, of an integer dtype, or a view that torch forbids to modify; it
            is unchanged then.
    """
    if not isinstance(input, Tensor):
        if has_torch_function_unary(input):
            return handle_torch_function(sigmoid_, (input,), input)
        raise TypeError(f"sigmoid_(): input must be a torch.Tensor, got {type(input).__name__}")
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if needs_grad and input.is_leaf:
        raise RuntimeError(
            "sigmoid_(): input is a leaf tensor that requires grad, whose value its gradient refers to; "
            "expected a tensor computed from it, or a call under torch.no_grad()"
        )
    if _torch_gradient_suffices(input, "output") or not (needs_grad and autograd.only_reverse_mode_listens(input)):
        return torch.sigmoid_(input)
    if input._is_view():
        return input.copy_(sigmoid(input))
    return autograd.SigmoidInplaceFunction.apply(input)


_SILU, _LOGSIGMOID = gates.Unary("silu"), gates.Unary("logsigmoid")
_SIGMOID_GATE = gates.Gated("sigmoid")


@_overridable
def logsigmoid(input: Tensor) -> Tensor:
    r"""log σ(x) = min(x, 0) - log(1 + e^-|x|), element by element; its gradient is grad·σ(-x).

    Neither cancels or overflows: for x → ∞ the value is -e^-x, for x → -∞ it is x. In 16 bit both are within 1 ulp of the true
    ones; in fp32 the value is within 5 and the gradient within 4, as tests/bounds.py derives from an expf of 1 ulp.

    Args:
        input: a tensor of any shape and float dtype; saved for backward, and nothing else.

    Raises:
        TypeError: `input` is not a tensor.
    """
    check_tensors("logsigmoid", input=input)
    return gates.apply(_LOGSIGMOID, input) if _is_ours(input) else torch.nn.functional.logsigmoid(input)


@_overridable
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""silu(x) = x·σ(x), element by element; its gradient is grad·σ(x)·(1 + x·σ(-x)).

    silu(-∞) and its gradient are 0, where torch gives NaN, and for x < -88 neither is lost. In 16 bit the value is within 1 ulp
    of the true one, and so is the gradient, but within a rounding of 1 around its zero at x = -1.278. In fp32 both are within 5
    ulp (around that zero, of the gradient's terms), as tests/bounds.py derives from an expf of 1 ulp.

    Args:
        input: a tensor of any shape and float dtype; saved for backward, and nothing else.
        inplace: write the result over `input`, and return it. Only for a gradient a copy of `input` is saved, as in torch.

    Raises:
        TypeError: `input` is not a tensor.
        RuntimeError: `inplace` on a leaf that requires grad.
    """
    check_tensors("silu", input=input)
    if not _is_ours(input):
        return torch.nn.functional.silu(input, inplace)
    if not inplace:
        return gates.apply(_SILU, input)
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if needs_grad and input.is_leaf:
        raise RuntimeError("silu(): input is a leaf tensor that requires grad, so it cannot be written over; got inplace=True")
    # A transform may want a gradient at another level than this one, and jit.trace demands one graph with and without grad.
    keeps_input = needs_grad or autograd.more_than_reverse_mode_listens()
    return input.copy_(gates.apply(_SILU, input.clone() if keeps_input else input))


@_overridable
def glu(input: Tensor, dim: int = -1) -> Tensor:
    r"""glu(a, b) = a·σ(b) for the halves a, b of `input` along `dim`; the gradient is written into one tensor like `input`.

    Gradients: grad·σ(b) and grad·a·e/(1+e)² with e = e^-|b|, which loses nothing where σ(b) rounds to 1.

    Args:
        input: a tensor of float dtype with at least one dimension; saved for backward, and nothing else. Its halves are read
            in place.
        dim: the dimension to halve, of even size.

    Raises:
        TypeError: `input` is not a tensor.
        RuntimeError: the size of `dim` is odd, or there is no dimension.
        IndexError: `dim` is out of range.
    """
    check_tensors("glu", input=input)
    if not _is_ours(input):
        return torch.nn.functional.glu(input, dim)
    return gates.apply(gates.Gated("sigmoid", halved_dim("glu", input, dim)), input)


@_overridable
def sigmoid_gate(input: Tensor, gate: Tensor) -> Tensor:
    r"""input·σ(gate), with `gate` broadcast against `input`: squeeze-and-excitation, gated attention.

    Gradients: grad·σ(gate) and, summed up over what was broadcast, grad·input·e/(1+e)² with e = e^-|gate|. A gate such as
    (N, C, 1, 1) of (N, C, H, W) or (B, T, H, 1) of (B, T, H, D) is read once a row; its gradient is summed up in fp32 (fp64 for
    fp64) where it is computed, in an order that depends on shapes, strides and dtypes only.

    Args:
        input: a tensor of any shape and float dtype.
        gate: a tensor whose shape broadcasts to input's. Both are saved for backward, as they are, and nothing else.
            Another dtype than input's promotes, as in torch; then what is promoted is saved.

    Returns:
        A tensor of input's shape.

    Raises:
        TypeError: one is not a tensor.
        ValueError: `gate` does not broadcast to the shape of `input`, or is on another device.
    """
    check_tensors("sigmoid_gate", input=input, gate=gate)
    check_devices("sigmoid_gate", input=input, gate=gate)
    check_broadcasts("sigmoid_gate", "gate", gate, input)
    input, gate = promoted(input, gate)
    if not (_is_ours(input) and _is_ours(gate)):
        return input * torch.sigmoid(gate)
    if gate.dim() < input.dim():
        gate = gate.reshape((1,) * (input.dim() - gate.dim()) + tuple(gate.shape))
    return gates.apply(_SIGMOID_GATE, input, gate)


@_overridable
def swiglu(
    gate: Tensor, up: Tensor | int | None = None, dim: int = -1, *, alpha: float | None = None, limit: float | None = None
) -> Tensor:
    r"""silu(gate)·up, or for one packed tensor silu(a)·b of its halves along `dim`: `swiglu(gate, up)`, `swiglu(packed, dim)`.

    With `alpha` or `limit` it is the form of GPT-OSS (alpha=1.702, limit=7.0): gate·σ(alpha·gate)·(up + 1), where gate is no
    larger than limit and up within ±limit; what was clamped has no gradient. Gradients: grad·silu(gate) and
    grad·up·silu'(gate), the second exact in the tails as `silu` is.

    Args:
        gate: a tensor of any shape and float dtype, or the packed tensor: its first half is the gate.
        up: a tensor that broadcasts with `gate`; another dtype promotes, as in torch. Or `dim`, for a packed tensor.
        dim: for a packed tensor the dimension to halve, of even size.
        alpha: scales the gate inside of σ; positive and finite. 1 if only `limit` is given.
        limit: not negative; none if only `alpha` is given.

    Saved for backward: the tensors as they are, or as promoted, and nothing else. Halves are read in place, and their gradient
    is written into one tensor.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes that do not broadcast, two devices, an `alpha` or `limit` out of range.
        RuntimeError: the size of `dim` is odd, or there is no dimension.
        IndexError: `dim` is out of range.
    """
    if isinstance(up, int) and not isinstance(up, bool):
        up, dim = None, up
    check_tensors("swiglu", gate=gate, **({} if up is None else {"up": up}))
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"swiglu(): alpha must be positive and finite, got {alpha}")
    if limit is not None and not limit >= 0:
        raise ValueError(f"swiglu(): limit must not be negative, got {limit}")
    clamped = alpha is not None or limit is not None
    constants = {
        "alpha": float(alpha or 1),
        "limit": None if limit in (None, math.inf) else float(limit),
        "offset": float(clamped),
    }
    if up is None:
        dim = halved_dim("swiglu", gate, dim)
        if not _is_ours(gate):
            return _swiglu_in_torch(*gate.chunk(2, dim), constants)
        return gates.apply(gates.Gated("silu", dim, True, **constants), gate)
    check_devices("swiglu", gate=gate, up=up)
    gate, up = promoted(gate, up)
    if not (_is_ours(gate) and _is_ours(up)):
        return _swiglu_in_torch(gate, up, constants)
    if gate.shape != up.shape:
        try:
            gate, up = torch.broadcast_tensors(gate, up)
        except RuntimeError:
            shapes = f"{tuple(gate.shape)} and {tuple(up.shape)}"
            raise ValueError(f"swiglu(): gate and up must broadcast together, got shapes {shapes}") from None
    return gates.apply(gates.Gated("silu", None, True, **constants), gate, up)


def _swiglu_in_torch(gate: Tensor, up: Tensor, constants: dict) -> Tensor:
    """For what torch has operators of its own: complex, integer, sparse and nested tensors."""
    if constants["offset"]:
        raise TypeError(f"swiglu(): with alpha or limit the tensors must be dense and of a float dtype, got {gate.dtype}")
    return torch.nn.functional.silu(gate) * up


# How many `debug` contexts surround this call; each thread and each asyncio task has a count of its own.
_debug_depth: ContextVar[int] = ContextVar("torch_sigmoid.debug", default=0)


class debug(contextlib.ContextDecorator):
    """A context in which the losses look at the values of their targets: `with torch_sigmoid.debug(): …`, or as a decorator.

    A target outside of [0, 1] that is not ignored, or is NaN, is then a ValueError. To find out, the host waits for the device
    at every call, which is why it is not done elsewhere. Compiled functions, and tensors without values, are not looked at.
    Other threads and asyncio tasks are not affected.
    """

    def __enter__(self) -> None:
        _debug_depth.set(_debug_depth.get() + 1)

    def __exit__(self, *exception) -> None:
        _debug_depth.set(_debug_depth.get() - 1)


@_overridable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""weight·(pos_weight·t·log(1 + e^-x) + (1-t)·log(1 + e^x)) for logits x and targets t: torch's function, with more.

    Neither term cancels or overflows, and each gradient, weight·((1-t)·σ(x) - pos_weight·t·σ(-x)), is exact in both tails: in
    bf16 the gradient of torch.nn.functional.binary_cross_entropy_with_logits at t = 1 is 0 from x = 6.25 on. Forward,
    backward and double backward are one pass over the tensors each, the reduction included; sums are taken in fp32 (fp64 for
    fp64), in an order that depends on shapes, strides and dtypes only.

    Args:
        input: logits x, of any shape and float dtype.
        target: of input's shape: floats, soft or hard, integers or bool. Values outside of [0, 1] are not looked for (see
            `debug`).
        weight: broadcasts to input's shape.
        size_average, reduce: torch's deprecated forms of `reduction`.
        reduction: "none", "mean" (over all elements that are not ignored) or "sum".
        pos_weight: of the positive part of the target; broadcasts to input's shape.
        label_smoothing: in [0, 1]; t becomes t·(1 - label_smoothing) + label_smoothing/2.
        ignore_index: elements of this target, a value that its dtype has, have neither loss nor gradient. If all are ignored
            a mean is NaN.

    Returns:
        The loss, in the dtype that input and target promote to; at least fp32 under autocast.

    Saved for backward: the tensors as they were given (logits as fp64 if the target is), and the count of what was not
    ignored. Under transforms, forward mode, or where target or weights require a gradient (all of them may), what autograd
    keeps of the formula.

    Raises:
        TypeError: an argument is no tensor, or not of a dtype described above.
        ValueError: target's shape is not input's, a weight does not broadcast, two devices, an unknown reduction, a smoothing
            out of range.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    caller = "binary_cross_entropy_with_logits"
    check_tensors(caller, input=input, target=target)
    check_loss_options(caller, reduction, label_smoothing, ignore_index)
    loss = losses.Loss(0.0, None, float(label_smoothing), ignore_index, reduction)
    if not (_is_ours(input) and target.layout is torch.strided and not target.is_nested):
        if label_smoothing or ignore_index is not None:
            found = f"{described(input)} with target {described(target)}"
            raise TypeError(f"{caller}(): label_smoothing and ignore_index need dense tensors, got {found}")
        return torch.nn.functional.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)
    return _loss(caller, loss, "input", input, "target", target, weight, pos_weight)


@_overridable
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    r"""α_t·(1 - p_t)^γ·BCE(x, t) for logits x and targets t, the focal loss of Lin et al. 2017, as torchvision.ops has it.

    1 - p_t = t·σ(-x) + (1-t)·σ(x), which does not cancel, and α_t = α·t + (1-α)·(1-t). 1 - p_t does not underflow before its
    power is taken, by a product where γ is a small integer and else in log space: value and gradient are finite for every γ,
    0 < γ < 1 included, and every logit, ±∞ included (but for the value where it is infinite itself: a logit of ±∞ against its
    target).

    Args:
        inputs: logits x, of any shape and float dtype.
        targets: of the shape of inputs: floats, soft or hard, integers or bool. Values outside of [0, 1] are not looked for
            (see `debug`).
        alpha: in [0, 1], the weight of positive targets; -1 for no weights.
        gamma: in [0, 1e6]. Each pair of alpha and gamma compiles kernels of its own, once.
        reduction: "none", "mean" (over all elements that are not ignored) or "sum".
        label_smoothing: in [0, 1]; t becomes t·(1 - label_smoothing) + label_smoothing/2.
        ignore_index: elements of this target have neither loss nor gradient.
        weight: broadcasts to the shape of inputs.

    Returns, saves and raises as `binary_cross_entropy_with_logits`; a ValueError also for an alpha or gamma out of range.
    """
    caller = "sigmoid_focal_loss"
    check_tensors(caller, inputs=inputs, targets=targets)
    check_loss_options(caller, reduction, label_smoothing, ignore_index, alpha, gamma)
    if not (_is_ours(inputs) and targets.layout is torch.strided and not targets.is_nested):
        found = f"{described(inputs)} with targets {described(targets)}"
        raise TypeError(f"{caller}(): logits must be {DENSE_FLOATS}, and targets dense, got {found}")
    loss = losses.Loss(float(gamma), None if alpha == -1 else float(alpha), float(label_smoothing), ignore_index, reduction)
    return _loss(caller, loss, "inputs", inputs, "targets", targets, weight, None)


@_overridable
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    chunk_size: int = 256,
    group: "torch.distributed.ProcessGroup | str | None" = None,
) -> Tensor:
    r"""-1/B·Σ_ij log σ(z_ij·(logit_scale·⟨image_i, text_j⟩ + logit_bias)), z = 1 for i = j, else -1: the loss of SigLIP.

    Sigmoid loss for language image pre-training, Zhai et al. 2023, in the form of open_clip: `logit_scale` multiplies as it is
    (what a model learns is its logarithm), and the sum is divided by the batch size B. Of the B × B matrix `chunk_size` rows
    exist at a time, in forward and, computed again, in backward: O(chunk_size·B) memory. The matrix products are
    torch.matmul's, in the features' dtype; the arithmetic of the loss is fp32 (fp64 for fp64). In fp16, ∂loss/∂logit of a pair
    below 6e-8 is lost in those products, as in torch; bf16 keeps it.

    With a process group each rank passes its own features, and text features go around the ring of ranks. Every rank gets the
    loss of the whole batch, that of all ranks together. Its gradients are those of the sum over all ranks divided by its own
    batch size: averaged over ranks, as DistributedDataParallel averages them, the gradients of parameters, scale and bias are
    those of that loss.

    Args:
        image_features, text_features: (B, D) each, float, usually normalised.
        logit_scale, logit_bias: tensors of one element, or numbers; no bias if None.
        chunk_size: rows of the matrix at a time.
        group: a process group, or "world" for the one that torch.distributed.init_process_group makes. All of its ranks must
            call, with the same B, D and dtype, and all or none of them for a gradient of each argument. What they have is
            compared over the group's store at each call, without waiting for a device. Under torch.compile it breaks the graph.

    Returns:
        The loss, a number of the features' dtype; at least fp32 under autocast, where features are cast as matmul casts them.

    Saved for backward: the features, scale and bias. Differentiable twice and more but for process groups, which know
    eager reverse mode only.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: features that are no matrices of one shape, two devices, a scale or bias of more than one element, a
            chunk_size below 1, a rank with another batch size; then every rank raises.
        RuntimeError: `group` together with create_graph=True, transforms or forward mode.
    """
    arguments = image_features, text_features, logit_scale, logit_bias
    if group is None:
        *operands, dtype = _siglip_operands(*arguments, chunk_size)
        return siglip.apply(*operands, chunk_size, None, dtype)
    if _is_compiling():
        torch._dynamo.graph_break()
    group = process_group(group)
    # Whatever is wrong on one rank, the others are told, who would wait for it.
    try:
        *operands, dtype = _siglip_operands(*arguments, chunk_size)
    except (TypeError, ValueError) as error:
        siglip.told_by_ranks(group, str(error))
        raise
    needs = [torch.is_grad_enabled() and each.requires_grad for each in operands]
    found = siglip.told_by_ranks(group, f"{tuple(operands[0].shape)} {operands[0].dtype}, gradients {needs}")
    if len(set(found)) > 1:
        raise ValueError(f"siglip_loss(): all ranks must have features of one shape and dtype, got {'; '.join(found)}")
    if len(found) > 1 and autograd.more_than_reverse_mode_listens():
        raise RuntimeError("siglip_loss(): with a process group expected eager reverse mode, got a tracer or a transform")
    return siglip.apply(*operands, chunk_size, group, dtype)


def _siglip_operands(image_features, text_features, logit_scale, logit_bias, chunk_size):
    """Features, scale and bias as they are computed with, and the dtype of the loss."""
    caller = "siglip_loss"
    features = {"image_features": image_features, "text_features": text_features}
    check_tensors(caller, **features)
    shapes = f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(f"{caller}(): image_features and text_features must be of one shape (B, D), {shapes}")
    check_chunk_size(chunk_size)
    check_devices(caller, **features)
    image, text = promoted(image_features, text_features)
    if not (_is_ours(image) and _is_ours(text)):
        raise TypeError(f"{caller}(): features must be {DENSE_FLOATS}, got {described(image)} and {described(text)}")
    dtype = image.dtype
    if _autocasts(image.device.type) and dtype is not torch.float64:
        dtype = torch.float32
        image, text = (each.to(torch.get_autocast_dtype(image.device.type)) for each in (image, text))
    scale = number_for(caller, "logit_scale", logit_scale, image)
    bias = number_for(caller, "logit_bias", 0.0 if logit_bias is None else logit_bias, image)
    return image, text, scale, bias, dtype


def _loss(caller, loss, input_name, input, target_name, target, weight, pos_weight):
    """Checks what the losses have in common, decides on dtypes, and computes."""
    if target.shape != input.shape:
        shapes = f"{tuple(input.shape)}, got {tuple(target.shape)}"
        raise ValueError(f"{caller}(): {target_name} must have the shape of {input_name}, {shapes}")
    if target.is_complex():
        raise TypeError(f"{caller}(): {target_name} must be floats, integers or bool, got {target.dtype}")
    if loss.ignore_index is not None and not is_value_of(loss.ignore_index, target.dtype):
        raise ValueError(f"{caller}(): ignore_index must be a value that {target.dtype} has, got {loss.ignore_index}")
    weight = weight_for(caller, "weight", weight, input)
    pos_weight = weight_for(caller, "pos_weight", pos_weight, input)
    check_devices(caller, **{input_name: input, target_name: target})
    if not (_is_compiling() or _is_tracing()) and _debug_depth.get():
        check_targets(caller, target_name, target, loss.ignore_index)
    dtype = input.dtype
    if target.dtype is not dtype and target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    if dtype is torch.float64:
        input = input.double()
    elif _autocasts(input.device.type):
        dtype = torch.float32
    return losses.apply(loss, dtype, input, target, weight, pos_weight)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def warmup(
    device: torch.device | str | int | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    *,
    include_gates: bool = False,
) -> None:
    """Compile the kernels and load them onto a device, so that no training step and no CUDA-graph capture has to.

    Covers forward, backward and double backward of both `save` modes, for tensors that are dense in one memory format at
    any size, and for the expanded upstream gradients of `.sum().backward()`. Slices and transposes compile when they first
    come. Compilations are kept on disk by Triton, so a second process only loads them. Does nothing where no kernel runs.

    Args:
        device: by default the current accelerator, or the CPU without one.
        dtypes: any of float64, float32, float16 and bfloat16.
        include_gates: also those of logsigmoid, silu, glu, sigmoid_gate and swiglu, for dense tensors, neither packed nor
            broadcast.

    Raises:
        ValueError: a dtype that has no kernels.
    """
    dtypes = tuple(dtypes)
    for dtype in dtypes:
        if dtype not in ops.FLOAT_DTYPES:
            raise ValueError(f"warmup(): dtypes must be among float64, float32, float16 and bfloat16, got {dtype}")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.empty(0, device=device).device
    if ops.kernels_refusal(device) is None:
        for dtype in dtypes:
            ops.kernels.warmup(device, dtype)
            if include_gates:
                ops.kernels.gates.warmup(device, dtype)


def _sigmoid_out(input: Tensor, out: Tensor) -> Tensor:
    """torch's own operator: its values are ours, there is no gradient, and it knows the rules of resizing and overlap."""
    if not isinstance(out, Tensor):
        raise TypeError(f"sigmoid(): out must be a torch.Tensor, got {type(out).__name__}")
    dtype = input.dtype if input.dtype.is_floating_point or input.dtype.is_complex else torch.get_default_dtype()
    if not torch.can_cast(dtype, out.dtype) or out.device != input.device:
        expected = f"a dtype that {dtype} can be cast to, on {input.device}"
        raise ValueError(f"sigmoid(): out must have {expected}, got {out.dtype} on {out.device}")
    return torch.sigmoid(input, out=out)
