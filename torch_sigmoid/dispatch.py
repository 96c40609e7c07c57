"""Which path a call takes, and who listens to it.

triton   a float tensor on a device that Triton drives: our kernels, under a torch.autograd.Function where a gradient is wanted;
         a DTensor likewise on its shard, by way of an operator of torch.library
traced   under torch.compile, export, jit.trace, functionalize and nested torch.func.jvp, which see torch operators only: the
         same gradients in these, for a compiler to fuse, and torch's operator alone where none is wanted
torch    everything else: torch's own operator, or our gradient formula in torch operators where torch's is not exact
"""

import importlib.util
import os
import sys
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .checks import check_save, check_tensors
from .internals import (
    FakeTensor,
    Likeness,
    dispatch_modes,
    functionalizes,
    has_plain_keys,
    in_forward_mode,
    is_exporting,
    is_tracing,
    likeness,
    make_fx_traces,
    modes_listen,
    nested_jvp,
    plain_grad_mode,
    transforms_active,
)

Save = Literal["output", "input"]
Tensors = tuple[Tensor, ...]
# One an argument, None for one that gets none.
Gradients = tuple[Tensor | None, ...]

# Triton's code generation for NVIDIA starts at Turing.
MINIMUM_CAPABILITY = (7, 5)
PLAIN_TYPES: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter)
FLOAT_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
WIDE_DTYPES = frozenset((torch.float32, torch.float64))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # somebody has put a module of his own in its place
        return True


# False where no tensor of this process can reach a kernel, whatever its device. Does not import Triton to find out.
KERNELS_EXIST: bool = _is_installed("triton") and bool(
    os.environ.get("TRITON_INTERPRET") or torch.version.cuda or torch.version.hip or torch.version.xpu
)
# From here on launches hide behind the work, and the kernels' forward and backward take torch's time; below it up to 1.7 times
# as long, on an H100 (threshold.csv of its results).
TORCH_BELOW_ON_NVIDIA = 2**26
threshold: int = TORCH_BELOW_ON_NVIDIA if torch.version.cuda else 0

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
# For a tensor that is only read: `data_ptr`, all that an older torch has, would copy what `torch._lazy_clone` has made.
_address_of = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)


def torch_below(n_elements: int | None = None) -> int:
    """Set the number of elements below which torch's own operator takes the place of our kernels; returns the number before.

    A launch from Python costs more than one from C++, which a small tensor does not hide. Torch's operator is taken only where
    its bits are ours: for fp32 and fp64 with save="output", and for every forward of sigmoid. The gates and losses always take
    their kernels.

    Args:
        n_elements: 0 always takes the kernels; None only asks. By default 2²⁶ with an NVIDIA build of torch, else 0:
            on an H100, forward and backward take torch's time from there on, and longer below.

    Raises:
        TypeError: not an int.
        ValueError: negative.

    Example:
        >>> before = torch_sigmoid.torch_below(0)  # from here on kernels at every size
        >>> torch_sigmoid.torch_below(before)
        0
    """
    global threshold
    before = threshold
    if n_elements is not None:
        if not isinstance(n_elements, int) or isinstance(n_elements, bool):
            raise TypeError(f"torch_below(): n_elements must be an int or None, got {n_elements!r}")
        if n_elements < 0:
            raise ValueError(f"torch_below(): n_elements must not be negative, got {n_elements}")
        threshold = n_elements
    return before


# Who listens to an operator that is called now; each one includes those before it.
NOBODY = 0  # only values are wanted
REVERSE_MODE = 1  # eager autograd may record the call: any Function will do
TRANSFORM = 2  # torch.func or forward mode: Functions with setup_context, jvp and vmap
TRACER = 3  # sees torch operators only: it would refuse a Function, or lose its tangents


def listener() -> int:
    """Who listens: NOBODY, REVERSE_MODE, TRANSFORM or TRACER."""
    if _is_compiling() or is_tracing():
        return TRACER
    if transforms_active():
        # torch runs a Function's `jvp` with forward mode off, for the outer levels too.
        return TRACER if functionalizes() or nested_jvp() else TRANSFORM
    if in_forward_mode():
        return TRANSFORM
    return REVERSE_MODE if _is_grad_enabled() else NOBODY


def exports() -> bool:
    """Whether torch.export or torch.onnx traces: what they record is run, not trained."""
    return is_exporting() if _is_compiling() else is_tracing() and torch.onnx.is_in_onnx_export()


def compiles_reverse_mode() -> bool:
    """Whether torch.compile traces a call that no transform and no forward mode surrounds."""
    return _is_compiling() and not transforms_active() and not in_forward_mode()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether reverse mode would record a call of these tensors."""
    return _is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def kernels_refusal(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`; None where they do."""
    if device.type not in ("cpu", "cuda", "xpu") or (device.type == "cpu" and not KERNELS_EXIST):
        return f"Triton has no kernels for device type {device.type!r}"
    if kernels.UNAVAILABLE:
        return str(kernels.UNAVAILABLE)
    if kernels.INTERPRETED:
        return None
    if device.type == "cpu":
        return f"Triton has no kernels for device type {device.type!r}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"compute capability {capability} is below Triton's minimum of {MINIMUM_CAPABILITY}"
    return None


def has_plain_storage(tensor: Tensor) -> bool:
    """Whether the values of `tensor` lie at its `data_ptr`, spaced by its strides.

    They do not for a functorch wrapper or a batched gradient, a subclass or fake tensor, a lazily negated or zero tensor:
    each of these has a type or a dispatch key of its own.
    """
    return type(tensor) in PLAIN_TYPES and has_plain_keys(tensor)


@cache
def is_distributed(kind: type[Tensor]) -> bool:
    """Whether this is DTensor, or inherits from it."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and issubclass(kind, tensor.DTensor)


def asks_library(tensor: Tensor) -> bool:
    """Whether a call is one operator of torch.library: to a DTensor, and to a fake tensor that make_fx does not record."""
    kind = type(tensor)
    if kind in PLAIN_TYPES:
        return False
    if is_distributed(kind):
        return True
    # Without torch.distributed there are no sharding rules, hence no operators.
    return issubclass(kind, FakeTensor) and torch.distributed.is_available() and not make_fx_traces()


def reaches_kernels(input: Tensor) -> bool:
    """Whether a kernel may run on a tensor like this or on its shards, unless somebody records operators."""
    kind = type(input)
    return (kind in PLAIN_TYPES or is_distributed(kind)) and kernels_refusal(input.device) is None


def launchable(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel may run on these tensors: plain ones, on one device that Triton drives, and nobody records operators.

    This asks what `has_plain_storage` does, at a third of its cost: torch gives no data pointer, or 0, to a tensor whose memory
    does not hold its values. Of the others, only lazily negated and nested tensors cannot be read by their strides.
    """
    if _is_compiling() or modes_listen():
        return False
    if kernels_refusal(first.device) is not None or first.is_nested:
        return False
    index = first.get_device()
    try:
        if type(first) not in PLAIN_TYPES or _address_of(first) == 0 or first.is_neg():
            return False
        for tensor in others:
            if tensor is not None and (
                type(tensor) not in PLAIN_TYPES or _address_of(tensor) == 0 or tensor.is_neg() or tensor.get_device() != index
            ):
                return False
    except RuntimeError:
        return False
    return True


# What recognises two tensors, and their addresses.
Known = tuple[Likeness, int, int]
# By the number of elements, which is known sooner than the shape.
_known_pairs: dict[int, list[Likeness]] = {}
MAX_SIZES, MAX_LIKENESSES = 1024, 8


def known_launchable(first: Tensor, other: Tensor) -> Known | None:
    """What recognises these tensors, if nobody listens and some like them were `launchable` before; see `remembered`.

    `listener` and `launchable` ask the same for three times as long, and a launcher is spared as much again.
    """
    # To tensors like those that nobody listened to nobody listens now, but for modes, forward mode and grad mode.
    if not _known_pairs or plain_grad_mode() is not False or dispatch_modes():
        return None
    try:
        addresses = _address_of(first), _address_of(other)  # no sparse tensor has one
        for is_alike in (likenesses := _known_pairs.get(first.numel(), [])):
            if first.is_nested or other.is_nested or 0 in addresses:
                return None
            if is_alike(first, other):
                if is_alike is not likenesses[0]:
                    promote(likenesses, is_alike)
                return is_alike, *addresses
    except (RuntimeError, TypeError):  # what has no address; a symbolic number, which cannot be looked up
        pass
    return None


def remembered(first: Tensor, other: Tensor) -> Known | None:
    """Have `known_launchable` recognise such tensors, which must be launchable; returns what it will.

    None where somebody listens now, where their dtypes differ, and where there is no room.
    """
    if listener() != NOBODY or first is other or first.dtype is not other.dtype:
        return None
    if len(_known_pairs) >= MAX_SIZES:
        _known_pairs.clear()
    likenesses = _known_pairs.setdefault(first.numel(), [])
    if len(likenesses) >= MAX_LIKENESSES:
        return None
    likenesses.append(likeness(first, other))
    return likenesses[-1], _address_of(first), _address_of(other)


def promote(likenesses: list[Likeness], found: Likeness) -> None:
    """Have this one be tried first from now on, in whichever thread; two at once may drop one, which is then found anew."""
    likenesses[:] = [found, *(each for each in likenesses if each is not found)]


def computes_eagerly(*tensors: Tensor | None) -> bool:
    """Whether operators on these tensors compute now and are seen by nobody, so that temporaries may be overwritten."""
    if listener() != NOBODY or modes_listen():
        return False
    # A loop costs half of what `all` does.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and not has_plain_storage(tensor):
            return False
    return True


def is_ours(tensor: Tensor) -> bool:
    """Whether our formulas cover this tensor; the rest is torch's own."""
    return tensor.dtype in FLOAT_DTYPES and tensor.layout is torch.strided and not tensor.is_nested


class Path(NamedTuple):
    """The path a call takes: `name` is "triton", "traced" or "torch", and `reason` says why it is this one.

    Example:
        >>> torch_sigmoid.path(torch.ones(3, dtype=torch.int32)).reason
        "dtype torch.int32 is torch's own: the kernels take float64, float32, float16 and bfloat16"
    """

    name: Literal["triton", "traced", "torch"]
    reason: str


@cache
def _triton_path() -> Path:
    interpreted = "TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
    return Path("triton", interpreted if kernels.INTERPRETED else "a float tensor on a device Triton drives")


_TRACED = Path("traced", "under torch.compile, export, jit.trace, functionalize or nested jvp, which see torch operators only")
_torch_path = cache(lambda reason: Path("torch", reason))


def path(input: Tensor, *, save: Save = "output") -> Path:
    """Which path `sigmoid(input, save=save)` takes, and why.

    Args:
        input: the tensor that would be passed.
        save: the `save` that would be passed.

    Returns:
        `Path(name, reason)` with the name "triton", "traced" or "torch".

    Raises:
        TypeError: `input` is not a tensor.
        ValueError: `save` is neither "output" nor "input".

    Example:
        >>> torch_sigmoid.path(torch.ones(3)).name
        'torch'
    """
    check_tensors("path", input=input)
    check_save(save)
    if input.dtype not in FLOAT_DTYPES:
        return _torch_path(f"dtype {input.dtype} is torch's own: the kernels take float64, float32, float16 and bfloat16")
    if not is_ours(input):
        return _torch_path("sparse and nested tensors are torch's own")
    if listener() == TRACER:
        return _TRACED
    kind = type(input)
    if kind not in PLAIN_TYPES and not is_distributed(kind):
        return _torch_path(f"{kind.__name__} is a Tensor subclass, which sees torch's operators")
    if refusal := kernels_refusal(input.device):
        return _torch_path(refusal)
    if is_small(input, save):
        return _torch_path("at this size torch's operator has the same bits and launches sooner (torch_sigmoid.torch_below)")
    return _triton_path()


def is_small(input: Tensor, save: Save) -> bool:
    """Whether torch's operator gives the kernels' bits, derivatives included, and costs less.

    Under a tracer numel() need not be a number, and comparing it would tie the trace to its answer.
    """
    return (
        save == "output" and input.dtype in WIDE_DTYPES and not (_is_compiling() or is_tracing()) and input.numel() < threshold
    )
