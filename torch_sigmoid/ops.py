"""The operators on values, without autograd: the Triton kernel where the tensors allow it, else the same formula in torch.

The torch form is for every tensor without a kernel: on a CPU, on a device Triton does not drive, subclasses and DTensors,
fake and functional tensors, batched gradients. Its arithmetic is the kernels': fp32 for 16-bit tensors, one rounding at the
end. Each function takes `save`, which says what `saved` holds: "output" σ, "input" x.
"""

from functools import cache

import torch
from torch import Tensor

from . import kernels

aten_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_sigmoid_backward_into = torch.ops.aten.sigmoid_backward.grad_input

# As in kernels/launch.py: `data_ptr` would copy a tensor that `torch._lazy_clone` has made.
_address_of = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)

# Triton's code generation for NVIDIA starts at Turing.
MINIMUM_CAPABILITY = (7, 5)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
FLOAT_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))

# False where no tensor of this process can reach a kernel, whatever its device.
KERNELS_EXIST = not kernels.UNAVAILABLE and (
    kernels.INTERPRETED or bool(torch.version.cuda or torch.version.hip or torch.version.xpu)
)
# Below this many elements torch's operator runs wherever its bits are ours (N1: on NVIDIA), because a launch from Python
# costs more than one from C++. At 2²² fp32 elements the kernels of a forward and a backward take about 20 µs at 4.3 TB/s,
# which hides the launches; that is arithmetic on an H200's bandwidth, not a measurement. 0 always takes the kernels.
TORCH_BELOW_ON_NVIDIA = 2**22
torch_below = TORCH_BELOW_ON_NVIDIA if torch.version.cuda else 0


@cache
def kernels_refusal(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`; None where they do."""
    if kernels.UNAVAILABLE:
        return kernels.UNAVAILABLE
    if kernels.INTERPRETED and device.type in ("cpu", "cuda", "xpu"):
        return None
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no kernels for device type {device.type!r}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"compute capability {capability} is below Triton's minimum of {MINIMUM_CAPABILITY}"
    return None


def _plain_key_sets() -> frozenset[int]:
    """The dispatch keys of ordinary dense tensors, and of those made under inference_mode, of each device."""
    key, key_set = torch._C.DispatchKey, torch._C.DispatchKeySet
    plain = set()
    for backend in ("CPU", "CUDA", "XPU"):
        inference = key_set(getattr(key, backend)) | key_set(getattr(key, f"Autocast{backend}"))
        plain.add(inference.raw_repr())
        plain.add((inference | key_set(getattr(key, f"Autograd{backend}")) | key_set(key.ADInplaceOrView)).raw_repr())
    return frozenset(plain)


_PLAIN_KEY_SETS = _plain_key_sets()
_dispatch_keys = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_dispatch_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_transforms_active = torch._C._are_functorch_transforms_active
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_Transform = torch._C._functorch.TransformType


def has_plain_storage(tensor: Tensor) -> bool:
    """Whether `data_ptr` and strides tell the values of `tensor`.

    They do not for a functorch wrapper or a batched gradient, a subclass or fake tensor, a lazily negated or zero tensor:
    each of these has a type or a dispatch key of its own.
    """
    return type(tensor) in PLAIN_TYPES and _dispatch_keys(tensor).raw_repr() in _PLAIN_KEY_SETS


def modes_listen() -> bool:
    """Whether a dispatch mode records operators, among them make_fx, which keeps another stack for pre_dispatch=True.

    With that one it enters a function mode, which is the cheaper thing to look for.
    """
    return _dispatch_modes() > 0 or (_function_modes() > 0 and _is_dispatch_key_included(_PRE_DISPATCH))


def launchable(first: Tensor, *others: Tensor) -> bool:
    """Whether a kernel may run on these tensors: plain ones, on one device Triton drives, and nobody records operators.

    What `has_plain_storage` tells is asked for at a third of its cost: torch gives no data pointer, or 0, where memory does
    not hold the values, and of what has one only lazily negated and nested tensors are not read by their strides.
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
            if type(tensor) not in PLAIN_TYPES or _address_of(tensor) == 0 or tensor.is_neg() or tensor.get_device() != index:
                return False
    except RuntimeError:
        return False
    return True


def _transform_levels() -> list:
    """The kinds of the functorch transforms around this call, outermost first."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


def forward_mode_is_nested() -> bool:
    """Whether a Function would lose tangents: torch runs its `jvp` with forward mode off, for the outer levels too."""
    return _transform_levels().count(_Transform.Jvp) > 1


def only_torch_operators_are_seen() -> bool:
    """Whether a Function would be refused, by a tracer, or lose tangents, so that torch operators must take its place."""
    if _is_compiling() or _is_tracing():
        return True
    return _transforms_active() and (_Transform.Functionalize in _transform_levels() or forward_mode_is_nested())


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.float() if tensor.dtype.itemsize == 2 else tensor for tensor in tensors)


def sigmoid_forward(input: Tensor) -> Tensor:
    """σ(x)."""
    if _is_tracing() or input.numel() < torch_below or not launchable(input):
        return torch.sigmoid(input)
    return kernels.sigmoid_forward(input)


def _smaller_sigmoid(x: Tensor) -> Tensor:
    """σ(-|x|); `where` in place of `abs` keeps derivatives of every order right at x = 0."""
    return torch.sigmoid(torch.where(x < 0, x, -x))


def sigmoid_for_tracing(input: Tensor) -> Tensor:
    """σ(x), of which autograd itself derives every derivative from σ(-|x|), so that tracers need not know our Function.

    The value is torch.sigmoid's. The gradient is that of σ(x) for x < 0 and of -σ(-x) for x ≥ 0, which differ from σ by a
    constant and never round to 1.
    """
    (wide,) = upcast(input)
    smaller = _smaller_sigmoid(wide)
    gradient_only = smaller - smaller.detach()
    value = torch.sigmoid(wide).detach()
    return (value + torch.where(wide < 0, gradient_only, -gradient_only)).to(input.dtype)


def computes_eagerly(*tensors: Tensor) -> bool:
    """Whether operators on these tensors compute now and are seen by nobody, so that temporaries may be overwritten."""
    return not (_is_compiling() or _is_tracing() or modes_listen()) and all(map(has_plain_storage, tensors))


def sigmoid_backward(grad_output: Tensor, saved: Tensor, save: str) -> Tensor:
    """grad_output·σ'."""
    if launchable(saved, grad_output):
        return kernels.sigmoid_backward(grad_output, saved, from_input=save == "input")
    if save == "input" and saved.dtype is torch.float32 and computes_eagerly(saved, grad_output):
        # The formula below, in the memory of its result: on a CPU a large temporary costs more than the arithmetic.
        smaller = saved.abs().neg_().sigmoid_()
        return _sigmoid_backward_into(grad_output, smaller, grad_input=smaller)
    return sigmoid_backward_formula(grad_output, saved, save)


def sigmoid_backward_formula(grad_output: Tensor, saved: Tensor, save: str) -> Tensor:
    """grad_output·σ' in torch operators, differentiable: from the output grad·(1-σ)·σ, from the input with σ(-|x|) for σ."""
    wide_grad, wide = upcast(grad_output, saved)
    sigma = wide if save == "output" else _smaller_sigmoid(wide)
    return aten_sigmoid_backward(wide_grad, sigma).to(grad_output.dtype)


def sigmoid_double_backward(grad_grad_input: Tensor, grad_output: Tensor, saved: Tensor, save: str) -> tuple[Tensor, Tensor]:
    """The gradients that reach `grad_output` and `saved` when `grad_grad_input` reaches their grad_output·σ'."""
    if launchable(saved, grad_output, grad_grad_input):
        return kernels.sigmoid_double_backward(grad_grad_input, grad_output, saved, from_input=save == "input")
    return (
        sigmoid_backward_formula(grad_grad_input, saved, save).to(grad_output.dtype),
        curvature_formula(grad_grad_input, grad_output, saved, save, sigmoid_backward_formula),
    )


def curvature_formula(grad_grad_input: Tensor, grad_output: Tensor, saved: Tensor, save: str, backward) -> Tensor:
    """grad_grad_input·grad_output·∂σ'/∂saved: 1 - 2σ from the output, σ" = -σ'·tanh(x/2) from the input.

    `backward` is the sigmoid_backward to use; given a differentiable one, the result is differentiable.
    """
    outer, grad, wide = upcast(grad_grad_input, grad_output, saved)
    if save == "output":
        result = outer * grad * (1 - 2 * wide)
    else:
        result = -backward(outer * grad, wide, save) * torch.tanh(wide / 2)
    return result.to(saved.dtype)
