"""The public functions: validation, and the choice of path.

A call takes one of three paths, chosen in `path`:

triton   a float tensor on a device Triton drives: our kernels, under a torch.autograd.Function where a gradient is wanted
traced   under torch.compile, export, jit.trace, functionalize and nested torch.func.jvp, which see torch operators only:
         the same numerics in these, for a compiler to fuse
torch    everything else: torch's own operator; our gradient formula in torch operators where torch's is not exact
"""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import autograd, ops

__all__ = ["Path", "path", "sigmoid", "sigmoid_", "warmup"]

SAVE_MODES = ("output", "input")
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


def _torch_gradient_suffices(input: Tensor, save: str) -> bool:
    """Whether torch's own sigmoid has the gradient that `save` promises.

    It saves σ and multiplies in the tensor's dtype, which is right in fp32 and fp64; in bf16 on a CPU it multiplies in fp32.
    """
    if input.dtype not in ops.FLOAT_DTYPES or input.layout is not torch.strided or input.is_nested:
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
            gradient is within 1 ulp of the true derivative in 16 bit (4 ulp in fp32), and x stays alive until backward.
            Integer, complex, sparse and nested tensors have torch's own gradient under both.
        out: a tensor for the result, of its dtype and device; not differentiable, as in torch.

    Returns:
        A tensor of input's shape and memory format. On a GPU it is meant to be torch.sigmoid's bit for bit: the fp32 kernel
        compiles to ATen's arithmetic, and no GPU has measured it yet.

    Raises:
        TypeError: `input` or `out` is not a tensor.
        ValueError: `save` is neither "output" nor "input"; `out` has another dtype or device than the result.
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


def warmup(
    device: torch.device | str | int | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
) -> None:
    """Compile the kernels and load them onto a device, so that no training step and no CUDA-graph capture has to.

    Covers forward, backward and double backward of both `save` modes, for tensors that are dense in one memory format at
    any size, and for the expanded upstream gradients of `.sum().backward()`. Slices and transposes compile when they first
    come. Compilations are kept on disk by Triton, so a second process only loads them. Does nothing where no kernel runs.

    Args:
        device: by default the current accelerator, or the CPU without one.
        dtypes: any of float64, float32, float16 and bfloat16.

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


def check_save(save: str) -> None:
    """A ValueError unless `save` is one of SAVE_MODES."""
    if save not in SAVE_MODES:
        raise ValueError(f'save must be "output" or "input", got {save!r}')


def _sigmoid_out(input: Tensor, out: Tensor) -> Tensor:
    """torch's own operator: its values are ours, there is no gradient, and it knows the rules of resizing and overlap."""
    if not isinstance(out, Tensor):
        raise TypeError(f"sigmoid(): out must be a torch.Tensor, got {type(out).__name__}")
    dtype = input.dtype if input.dtype.is_floating_point or input.dtype.is_complex else torch.get_default_dtype()
    if out.dtype is not dtype or out.device != input.device:
        raise ValueError(f"sigmoid(): out must be {dtype} on {input.device}, as the result is, got {out.dtype} on {out.device}")
    return torch.sigmoid(input, out=out)
