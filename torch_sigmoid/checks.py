"""Checks of the public functions' arguments. Each raises an error that says what came and what was expected, or returns.

Nothing here waits for a device except `check_targets`, which only runs under `torch_sigmoid.debug()`.
"""

import math
import numbers
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .internals import has_plain_keys

SAVE_MODES = ("output", "input")
# Far beyond, γ·log(1 - p_t) is no finite number.
MAX_GAMMA = 1e6
DENSE_FLOATS = "dense, float64, float32, float16 or bfloat16"


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def check_save(save: str) -> None:
    """A ValueError unless `save` is one of SAVE_MODES."""
    if save not in SAVE_MODES:
        raise ValueError(f'save must be "output" or "input", got {save!r}')


def check_tensors(caller: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}(): {name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_floats(caller: str, **tensors: Tensor) -> None:
    """A TypeError where torch's own operator has no kernel, and its error does not name the argument."""
    for name, tensor in tensors.items():
        if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            raise TypeError(f"{caller}(): {name} must be a tensor of a float dtype, got {tensor.dtype}")


def check_bool(caller: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{caller}(): {name} must be True or False, got {value!r}")


def check_devices(caller: str, **tensors: Tensor) -> None:
    first, *others = tensors.values()
    device = first.device
    if any(tensor.device != device for tensor in others):
        found = " and ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{caller}(): expected tensors on one device, got {found}")


def check_broadcasts(caller: str, name: str, tensor: Tensor, input: Tensor) -> None:
    shape, full = tuple(tensor.shape), tuple(input.shape)
    if len(shape) > len(full) or any(size not in (1, whole) for size, whole in zip(reversed(shape), reversed(full))):
        raise ValueError(f"{caller}(): {name} must broadcast to input's shape {full}, got {shape}")


def halved_dim(caller: str, input: Tensor, dim: int) -> int:
    """`dim` counted from the front, if it can be halved; else a RuntimeError, as in torch."""
    if input.dim() == 0:
        raise RuntimeError(f"{caller}(): expected a tensor with a dimension to halve, got one of no dimensions")
    if isinstance(dim, (Tensor, str, float)):
        raise TypeError(f"{caller}(): dim must be an int, got {type(dim).__name__}")
    size = input.size(dim)
    if size % 2:
        raise RuntimeError(f"{caller}(): the size of dim must be even, got {size} in dim {dim} of shape {tuple(input.shape)}")
    return dim % input.dim()


def promoted(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that torch would compute in: that of torch.result_type, which Dynamo cannot trace."""
    if one.dtype is other.dtype:
        return one, other
    dtype = torch.promote_types(one.dtype, other.dtype)
    if one.is_floating_point() and other.is_floating_point() and (one.dim() == 0) != (other.dim() == 0):
        dtype = one.dtype if one.dim() else other.dtype
    return one.to(dtype), other.to(dtype)


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}"


def check_loss_options(
    caller: str, reduction: str, label_smoothing: float, ignore_index: int | None, alpha: float = -1, gamma: float = 0
) -> None:
    """An error unless the options of a loss are what the functions take."""
    for name, value in (("label_smoothing", label_smoothing), ("alpha", alpha), ("gamma", gamma)):
        if not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{caller}(): {name} must be a number, got {type(value).__name__}")
    if not 0 <= gamma <= MAX_GAMMA:
        raise ValueError(f"{caller}(): gamma must not be negative, nor above {MAX_GAMMA:g}, got {gamma}")
    if alpha != -1 and not 0 <= alpha <= 1:
        raise ValueError(f"{caller}(): alpha must be in [0, 1], or -1 for none, got {alpha}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{caller}(): reduction must be "none", "mean" or "sum", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{caller}(): label_smoothing must be in [0, 1], got {label_smoothing}")
    if ignore_index is not None and not isinstance(ignore_index, int):
        raise TypeError(f"{caller}(): ignore_index must be an int, got {type(ignore_index).__name__}")


def check_gate_options(caller: str, alpha: float, limit: float | None = None, up_offset: float = 0.0) -> None:
    """An error unless the options of a gate are numbers in their ranges."""
    for name, value in (("alpha", alpha), ("limit", 0 if limit is None else limit), ("up_offset", up_offset)):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{caller}(): {name} must be a number, got {type(value).__name__}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"{caller}(): alpha must be positive and finite, got {alpha}")
    if limit is not None and not limit >= 0:
        raise ValueError(f"{caller}(): limit must not be negative, got {limit}")
    if not -math.inf < up_offset < math.inf:
        raise ValueError(f"{caller}(): up_offset must be finite, got {up_offset}")


def is_value_of(number: int, dtype: torch.dtype) -> bool:
    """Whether the dtype can represent this integer exactly."""
    if dtype is torch.bool:
        return number in (0, 1)
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
    info, magnitude = torch.finfo(dtype), abs(number)
    digits = (magnitude // (magnitude & -magnitude or 1)).bit_length()
    return magnitude <= info.max and digits <= 1 - round(math.log2(info.eps))


def overridable(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let an argument that is no tensor but has a `__torch_function__`, such as fx's Proxy, take over the call.

    Tensor subclasses and function modes do not: they see the torch operators that `function` calls. `sigmoid` and `sigmoid_`
    check for themselves: there this wrapper would cost about half as much as the call.
    """

    @wraps(function)
    def wrapper(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        arguments = *args, *kwargs.values()
        if has_torch_function(arguments) and not all(
            isinstance(each, Tensor) or not hasattr(type(each), "__torch_function__") for each in arguments
        ):
            return handle_torch_function(wrapper, arguments, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def weight_for(caller: str, name: str, weight: Tensor | None, input: Tensor) -> Tensor | None:
    """The weight on input's device, if it broadcasts to input's shape."""
    if weight is None:
        return None
    check_tensors(caller, **{name: weight})
    if weight.is_complex():
        raise TypeError(f"{caller}(): {name} must be real, got {weight.dtype}")
    check_broadcasts(caller, name, weight, input)
    if weight.dim() == 0 and weight.device.type == "cpu":
        # A number on the host goes with tensors of any device, as in torch; waiting for the device would be of no use.
        return weight.to(input.device, non_blocking=True)
    check_devices(caller, **{"input": input, name: weight})
    return weight


def check_targets(caller: str, name: str, target: Tensor, ignore_index: int | None) -> None:
    """A ValueError unless all targets are in [0, 1] or ignored."""
    if target.is_meta or type(target) is not Tensor or not has_plain_keys(target):
        return
    fine = (target >= 0) & (target <= 1)
    if ignore_index is not None:
        fine |= target == ignore_index
    if not fine.all():
        raise ValueError(f"{caller}(): {name} must be in [0, 1], got {target[~fine][0].item()}")


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and not isinstance(chunk_size, int):
        raise TypeError(f"siglip_loss(): chunk_size must be an int or None, got {type(chunk_size).__name__}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"siglip_loss(): chunk_size must be at least 1, got {chunk_size}")


def number_for(caller: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A tensor without dimensions, of the arithmetic's dtype, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=dtype, device=like.device)
    check_tensors(caller, **{name: value})
    if value.numel() != 1:
        raise ValueError(f"{caller}(): {name} must have one element, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError(f"{caller}(): {name} must be real, got {value.dtype}")
    if value.dim() or value.device.type != "cpu":
        check_devices(caller, **{"image_features": like, name: value})
    return value.reshape(()).to(like.device, dtype, non_blocking=True)


def ids_for(caller: str, name: str, ids: Tensor | None, features: Tensor) -> Tensor | None:
    """The ids of these features as int64, side by side; None where none are given."""
    if ids is None:
        return None
    check_tensors(caller, **{name: ids})
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool or ids.layout is not torch.strided:
        raise TypeError(f"{caller}(): {name} must be dense integers, got {described(ids)}")
    if ids.dim() != 1 or ids.shape[0] != features.shape[0]:
        expected = f"({features.shape[0]},), one for each row of its features"
        raise ValueError(f"{caller}(): {name} must have shape {expected}, got {tuple(ids.shape)}")
    check_devices(caller, **{name.replace("ids", "features"): features, name: ids})
    return ids.to(torch.int64).contiguous()
