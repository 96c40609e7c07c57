"""The gates: log-sigmoid and SiLU of one tensor; GLU, x·σ(gate) and SwiGLU of two. Operators, then the functions.

    y = f(x)            saves x
    y = A·h(G)          saves the operand and the gate, or the packed tensor of which they are the halves

The kernels are those of kernels/gates.py, where the formulas of the derivatives stand. Half of this long file is docstrings
and checks of the public functions, which belong beside their operators.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from . import eager, kernels
from .autograd import Operator, record
from .checks import (
    DENSE_FLOATS,
    check_bool,
    check_broadcasts,
    check_devices,
    check_floats,
    check_gate_options,
    check_tensors,
    described,
    halved_dim,
    overridable,
    promoted,
)
from .dispatch import TRANSFORM, WIDE_DTYPES, Tensors, is_ours, launchable, listener
from .eager import weighted
from .formulas import in_dtype, upcast, value
from .internals import constant


@dataclass(frozen=True)
class Unary(Operator):
    """y = f(x) for `function` "silu" or "logsigmoid"; with `alpha`, f(x) = silu(alpha·x)/alpha = x·σ(alpha·x)."""

    function: str
    alpha: float = 1.0

    def batched(self) -> "Unary":
        return self

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if launchable(x):
            return (kernels.gates.unary_forward(x, self.function, self.alpha),)
        if eager.takes(x):
            return (eager.unary(x, self.function, self.alpha),)
        return (self.formula(x),)

    def backward(self, grad_output: Tensor, x: Tensor) -> tuple[Tensor]:
        if launchable(x, grad_output):
            return (kernels.gates.unary_backward(grad_output, x, self.function, self.alpha),)
        if eager.takes(x, grad_output):
            return (eager.unary_gradient(grad_output, x, self.function, self.alpha),)
        return self.backward_formula(grad_output, x)

    def double_backward(self, grads: Tensors, grad_output: Tensor, x: Tensor) -> Tensors:
        (v,) = grads
        if launchable(x, grad_output, v):
            results: Tensors = kernels.gates.unary_double_backward(v, grad_output, x, self.function, self.alpha)
            return results
        return self.double_backward_formula(grads, grad_output, x)

    def _weighted(self, v: Tensor | float, x: Tensor, order: int) -> Tensor:
        return weighted(v, upcast(x), self.function, order, self.alpha, x.dtype not in WIDE_DTYPES)

    def formula(self, x: Tensor) -> Tensor:
        if x.dim() == 0:
            # torch's forward mode gives a number times a tensor without dimensions a tangent in fp64.
            return self.formula(x.unsqueeze(0)).squeeze(0)
        return self._weighted(1.0, x, 0).to(x.dtype)

    def value_formula(self, x: Tensor) -> tuple[Tensor]:
        return (in_dtype(value(upcast(x), self.function, self.alpha), x.dtype),)

    def plain(self, x: Tensor) -> Tensor:
        if self.function == "logsigmoid":
            return F.logsigmoid(x)
        return F.silu(x) if self.alpha == 1 else x * torch.sigmoid(self.alpha * x)

    def backward_formula(self, grad_output: Tensor, x: Tensor) -> tuple[Tensor]:
        return (self._weighted(upcast(grad_output), x, 1).to(grad_output.dtype),)

    def double_backward_formula(self, grads: Tensors, grad_output: Tensor, x: Tensor) -> Tensors:
        v, grad = map(upcast, (*grads, grad_output))
        return self._weighted(v, x, 1).to(grad_output.dtype), self._weighted(v * grad, x, 2).to(x.dtype)

    def jvp_formula(self, tangents: Tensors, x: Tensor) -> Tensor:
        (tangent,) = tangents
        return self.backward_formula(tangent, x)[0]


@dataclass(frozen=True)
class Gated(Operator):
    """y = A·h(G) of an operand a and a gate g, which may be the halves of one tensor along `dim`; see kernels/gates.py.

    h is `function`, "sigmoid" or "silu". The gate may be broadcast against the operand: of as many dimensions, each a's or 1.
    """

    function: str
    dim: int | None = None
    gate_first: bool = False
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    @property
    def constants(self) -> tuple[str, float, float | None, float]:
        return self.function, self.alpha, self.limit, self.offset

    def batched(self) -> "Gated":
        return self if self.dim is None else replace(self, dim=self.dim + 1)

    def parts(self, tensors: Tensors) -> Tensors:
        """a and g."""
        if self.dim is not None:
            tensors = tensors[0].chunk(2, self.dim)
        return tensors[::-1] if self.gate_first else tensors

    def whole(self, a: Tensor, g: Tensor) -> Tensors:
        """Join what was computed for a and for g in the way the tensors came: in their order, and packed if they were."""
        pair = (g, a) if self.gate_first else (a, g)
        return pair if self.dim is None else (torch.cat(pair, self.dim),)

    def memory_for(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Allocate the gradients of the tensors; returns them, and the parts of them that belong to a and g."""
        # In one memory format: tensors of several make no walk.
        grads = tuple(torch.empty_like(tensors[0]) for _ in tensors)
        return grads, self.parts(grads)

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        a, g = self.parts(tensors)
        if launchable(a, g) and a.numel():
            return (kernels.gates.gate_forward(a, g, self.constants),)
        if eager.takes(a, g):
            return (eager.gate_value(a, g, self.constants),)
        return (self.formula(*tensors),)

    def backward(self, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        a, g = self.parts(tensors)
        launches = launchable(a, g, grad_output) and a.numel()
        if not (launches or eager.takes(a, g, grad_output)):
            return self.backward_formula(grad_output, *tensors)
        if a.shape != g.shape:
            broadcast_backward = kernels.gates.broadcast_backward if launches else eager.broadcast_gradients
            return self.whole(*broadcast_backward(grad_output, a, g, self.constants))
        grads, out = self.memory_for(tensors)
        gate_backward = kernels.gates.gate_backward if launches else eager.gate_gradients
        gate_backward(grad_output, a, g, self.constants, out)
        return grads

    def double_backward(self, grads: Tensors, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        (v, w), (a, g) = self.parts(grads), self.parts(tensors)
        if not (launchable(a, g, grad_output, v, w) and a.numel()):
            return self.double_backward_formula(grads, grad_output, *tensors)
        if a.shape == g.shape:
            to_tensors, out = self.memory_for(tensors)
            return kernels.gates.gate_double_backward(v, w, grad_output, a, g, self.constants, out), *to_tensors
        to_grad_output, *to_parts = kernels.gates.broadcast_double_backward(v, w, grad_output, a, g, self.constants)
        return to_grad_output, *self.whole(*to_parts)

    # A, G and h in torch operators. A comparison, unlike a clamp, lets a NaN through, and leaves it a gradient.

    def _operand(self, a: Tensor) -> Tensor:
        if self.limit is not None:
            a = torch.where(a > self.limit, self.limit, torch.where(a < -self.limit, -self.limit, a))
        return a + self.offset if self.offset else a

    def _gate(self, g: Tensor) -> Tensor:
        return g if self.limit is None else torch.where(g > self.limit, self.limit, g)

    def _past_clamp(self, grad: Tensor, a: Tensor) -> Tensor:
        return grad if self.limit is None else torch.where(a.abs() > self.limit, 0.0, grad)

    def _weighted(self, v: Tensor | float, g: Tensor, order: int) -> Tensor:
        wide = upcast(g)
        result = weighted(v, self._gate(wide), self.function, order, self.alpha, g.dtype not in WIDE_DTYPES)
        return result if self.limit is None or not order else torch.where(wide > self.limit, 0.0, result)

    def formula(self, *tensors: Tensor) -> Tensor:
        if tensors[0].dim() == 0:  # as in Unary
            return self.formula(*(tensor.unsqueeze(0) for tensor in tensors)).squeeze(0)
        a, g = self.parts(tensors)
        return self._weighted(self._operand(upcast(a)), g, 0).to(tensors[0].dtype)

    def value_formula(self, *tensors: Tensor) -> tuple[Tensor]:
        a, g = map(upcast, self.parts(tensors))
        return (in_dtype(self._operand(a) * value(self._gate(g), self.function, self.alpha), tensors[0].dtype),)

    def plain(self, *tensors: Tensor) -> Tensor:
        if self.function == "sigmoid" and self.dim is not None:
            return F.glu(tensors[0], self.dim)
        a, g = self.parts(tensors)
        if self.limit is not None:
            a, g = a.clamp(-self.limit, self.limit), g.clamp(max=self.limit)
        if self.offset:
            a = a + self.offset
        if self.function == "sigmoid":
            return a * torch.sigmoid(g)
        return (F.silu(g) if self.alpha == 1 else g * torch.sigmoid(self.alpha * g)) * a

    def _reduced(self, to_a: Tensor, to_g: Tensor, tensors: Tensors) -> Tensors:
        """The gradients of the tensors from those of a and g, summed up along broadcast dimensions."""
        _, g = self.parts(tensors)
        dtype = tensors[0].dtype
        return self.whole(to_a.to(dtype), to_g.sum_to_size(g.shape).to(dtype))

    def backward_formula(self, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        a, g = self.parts(tensors)
        grad, a = map(upcast, (grad_output, a))
        to_a = self._past_clamp(self._weighted(grad, g, 0), a)
        return self._reduced(to_a, self._weighted(grad * self._operand(a), g, 1), tensors)

    def double_backward_formula(self, grads: Tensors, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        a, g = self.parts(tensors)
        v, w, grad, a = map(upcast, (*self.parts(grads), grad_output, a))
        operand, v = self._operand(a), self._past_clamp(v, a)
        to_grad_output = self._weighted(v, g, 0) + self._weighted(w * operand, g, 1)
        to_a = self._past_clamp(self._weighted(w * grad, g, 1), a)
        to_g = self._weighted(v * grad, g, 1) + self._weighted(w * operand * grad, g, 2)
        return to_grad_output.to(grad_output.dtype), *self._reduced(to_a, to_g, tensors)

    def jvp_formula(self, tangents: Tensors, *tensors: Tensor) -> Tensor:
        a, g = self.parts(tensors)
        v, w, a = map(upcast, (*self.parts(tangents), a))
        result = self._weighted(self._past_clamp(v, a), g, 0) + self._weighted(w * self._operand(a), g, 1)
        return result.to(tensors[0].dtype)


@dataclass(frozen=True)
class Interleaved(Gated):
    """`Gated` for one tensor that holds pairs next to each other along its last dimension; see kernels/interleaved.py."""

    gate_first: bool = True

    def batched(self) -> "Interleaved":
        return self

    def parts(self, tensors: Tensors) -> Tensors:
        (packed,) = tensors
        return packed[..., 1::2], packed[..., ::2]

    def whole(self, a: Tensor, g: Tensor) -> Tensors:
        # Legacy batching, of is_grads_batched=True, knows `reshape` but not `flatten`.
        return (torch.stack((g, a), -1).reshape(*a.shape[:-1], 2 * a.shape[-1]),)

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        (packed,) = tensors
        if launchable(packed) and packed.numel():
            return (kernels.interleaved.forward(packed, self.constants),)
        return super().forward(packed)

    def backward(self, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        (packed,) = tensors
        if launchable(packed, grad_output) and packed.numel():
            return (kernels.interleaved.backward(grad_output, packed, self.constants),)
        return super().backward(grad_output, packed)

    def double_backward(self, grads: Tensors, grad_output: Tensor, *tensors: Tensor) -> Tensors:
        (grad,), (packed,) = grads, tensors
        if launchable(packed, grad_output, grad) and packed.numel():
            results: Tensors = kernels.interleaved.double_backward(grad, grad_output, packed, self.constants)
            return results
        return self.double_backward_formula(grads, grad_output, packed)


_SILU, _LOGSIGMOID, _SIGMOID_GATE = Unary("silu"), Unary("logsigmoid"), Gated("sigmoid")


@overridable
def logsigmoid(input: Tensor) -> Tensor:
    r"""log σ(x) = min(x, 0) - log(1 + e^-|x|), element by element; its gradient is grad·σ(-x).

    Nothing cancels or overflows: the value approaches -e^-x for x → ∞ and x for x → -∞. In 16 bit value and gradient are within
    1 ulp of the true ones. In fp32 both are within 4 ulp on an H100, for every input whose result exceeds 2^-119
    (exhaustive.csv of its results); from the errors that CUDA documents, tests/bounds.py derives 5.5 and 4.5.

    Args:
        input: a tensor of any shape and float dtype; saved for backward, and nothing else.

    Raises:
        TypeError: `input` is not a tensor of a float dtype.

    Example:
        >>> torch_sigmoid.logsigmoid(torch.tensor([-200.0, 0.0]))
        tensor([-200.0000,   -0.6931])
    """
    check_tensors("logsigmoid", input=input)
    check_floats("logsigmoid", input=input)
    return record(_LOGSIGMOID, input) if is_ours(input) else F.logsigmoid(input)


@overridable
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""silu(x) = x·σ(x), element by element; its gradient is grad·σ(x)·(1 + x·σ(-x)).

    silu(-∞) and its gradient are 0, where torch gives NaN, and for x < -88 neither is lost. In 16 bit value and gradient are
    within 1 ulp of the true ones; around the gradient's zero at x = -1.278, its error is within a rounding of 1. In fp32 both
    are within 4 ulp (around that zero, of the gradient's terms) on an H100, for every input whose result exceeds 2^-119
    (exhaustive.csv of its results); from the errors that CUDA documents, tests/bounds.py derives 6 and 5.5. Compiled, the value
    for x < -88 is torch's 0; exported, or compiled without a gradient, torch's operator runs alone.

    Args:
        input: a tensor of any shape and float dtype; saved for backward, and nothing else.
        inplace: write the result over `input`, and return it. Where a gradient is wanted, a copy of `input` is saved, as in
            torch.

    Raises:
        TypeError: `input` is not a tensor of a float dtype.
        RuntimeError: `inplace` on a leaf that requires grad.

    Example:
        >>> torch_sigmoid.silu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """
    check_tensors("silu", input=input)
    check_floats("silu", input=input)
    if not is_ours(input):
        return F.silu(input, inplace)
    if not inplace:
        return record(_SILU, input)
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if needs_grad and input.is_leaf:
        raise RuntimeError("silu(): input is a leaf tensor that requires grad, so it cannot be written over; got inplace=True")
    # A transform may want a gradient at another level than this one, and jit.trace demands one graph with and without grad.
    keeps_input = needs_grad or listener() >= TRANSFORM
    return input.copy_(record(_SILU, input.clone() if keeps_input else input))


@overridable
def quick_gelu(input: Tensor, *, alpha: float = 1.702) -> Tensor:
    r"""x·σ(alpha·x), element by element: CLIP's approximation of GELU; its gradient is grad·silu'(alpha·x).

    As in `silu`, nothing is lost in the tails, and errors are within the bounds derived there: 1 ulp in 16 bit, 6 in fp32
    (around a zero of the gradient, of its terms).

    Args:
        input: a tensor of any shape and float dtype; saved for backward, and nothing else.
        alpha: positive and finite. Each one compiles kernels of its own, once.

    Raises:
        TypeError: `input` is not a tensor of a float dtype, or `alpha` not a number.
        ValueError: `alpha` is out of range.

    Example:
        >>> torch_sigmoid.quick_gelu(torch.tensor([0.0, 10.0]))
        tensor([ 0., 10.])
    """
    check_tensors("quick_gelu", input=input)
    check_floats("quick_gelu", input=input)
    check_gate_options("quick_gelu", alpha)
    if not is_ours(input):
        return input * torch.sigmoid(alpha * input)
    return record(Unary("silu", float(constant(alpha))), input)


@overridable
def glu(input: Tensor, dim: int = -1) -> Tensor:
    r"""glu(a, b) = a·σ(b) for the halves a, b of `input` along `dim`; the gradient is written into one tensor like `input`.

    Gradients: grad·σ(b) and grad·a·e/(1+e)² with e = e^-|b|, which loses nothing where σ(b) rounds to 1.

    Args:
        input: a tensor of float dtype with at least one dimension; saved for backward, and nothing else. Its halves are read
            in place.
        dim: the dimension to halve, of even size.

    Raises:
        TypeError: `input` is not a tensor of a float dtype.
        RuntimeError: the size of `dim` is odd, or there is no dimension.
        IndexError: `dim` is out of range.

    Example:
        >>> torch_sigmoid.glu(torch.tensor([2.0, 3.0, 0.0, 100.0]))  # a = [2, 3], b = [0, 100]
        tensor([1., 3.])
    """
    check_tensors("glu", input=input)
    check_floats("glu", input=input)
    if not is_ours(input):
        return F.glu(input, dim)
    return record(Gated("sigmoid", halved_dim("glu", input, dim)), input)


@overridable
def sigmoid_gate(input: Tensor, gate: Tensor) -> Tensor:
    r"""input·σ(gate), with `gate` broadcast against `input`: an LSTM's gates, squeeze-and-excitation, gated attention.

    Pass the pre-activation of the gate, not its sigmoid. Gradients: grad·σ(gate) for the input, and for the gate
    grad·input·e/(1+e)² with e = e^-|gate|, summed up over the dimensions along which it was broadcast. A gate such as
    (N, C, 1, 1) of (N, C, H, W) or (B, T, H, 1) of (B, T, H, D) is read once a row. Its gradient is summed up in fp32 (fp64 for
    fp64) where it is computed, in an order that depends on shapes, strides, dtypes and alignment only.

    Args:
        input: a tensor of any shape and float dtype.
        gate: a tensor whose shape broadcasts to input's. Another dtype than input's promotes, as in torch.

    Saved for backward: input and gate, neither expanded, in the dtype that they promote to, and nothing else.

    Returns:
        A tensor of input's shape.

    Raises:
        TypeError: `input` or `gate` is not a tensor.
        ValueError: `gate` does not broadcast to the shape of `input`, or is on another device.

    Example:
        >>> x, gate = torch.ones(2, 3, 4, 4), torch.zeros(2, 3)
        >>> torch_sigmoid.sigmoid_gate(x, gate[:, :, None, None]).unique()
        tensor([0.5000])
    """
    check_tensors("sigmoid_gate", input=input, gate=gate)
    check_devices("sigmoid_gate", input=input, gate=gate)
    check_broadcasts("sigmoid_gate", "gate", gate, input)
    input, gate = promoted(input, gate)
    if not (is_ours(input) and is_ours(gate)):
        return input * torch.sigmoid(gate)
    if gate.dim() < input.dim():
        gate = gate.reshape((1,) * (input.dim() - gate.dim()) + tuple(gate.shape))
    return record(_SIGMOID_GATE, input, gate)


@overridable
def swiglu(gate: Tensor, up: Tensor, *, alpha: float = 1.0, limit: float | None = None, up_offset: float = 0.0) -> Tensor:
    r"""silu(gate)·up, the gate of Llama's feed-forward layers, in one kernel; see `swiglu_packed` for halves of one tensor.

    In full: gate·σ(alpha·gate)·(up + up_offset). With `limit`, gate is first clamped to at most limit and up to ±limit, and
    elements beyond it get no gradient; those at it do, as torch's clamp gives them up to 2.13. GPT-OSS needs alpha=1.702,
    limit=7.0, up_offset=1.0. Gradients: grad·silu(gate) for up, and grad·up·silu'(gate) for gate, which is exact in the tails
    as that of `silu` is.

    Args:
        gate: a tensor of any shape and float dtype.
        up: a tensor that broadcasts with `gate`; another dtype promotes, as in torch.
        alpha: scales the gate inside σ; positive and finite. Each set of options compiles kernels of its own, once.
        limit: not negative; None clamps nothing.
        up_offset: added to `up` after clamping; finite.

    Saved for backward: gate and up, in the dtype that they promote to, and nothing else.

    Raises:
        TypeError: `gate` or `up` is not a tensor of a float dtype, or an option not a number.
        ValueError: shapes that do not broadcast, two devices, an option out of range.

    Example:
        >>> torch_sigmoid.swiglu(torch.zeros(2, 8), torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """
    check_tensors("swiglu", gate=gate, up=up)
    check_floats("swiglu", gate=gate, up=up)
    operator = _swiglu_operator("swiglu", None, alpha, limit, up_offset)
    check_devices("swiglu", gate=gate, up=up)
    gate, up = promoted(gate, up)
    if not (is_ours(gate) and is_ours(up)):
        return _swiglu_in_torch("swiglu", gate, up, operator)
    if gate.shape != up.shape:
        try:
            gate, up = torch.broadcast_tensors(gate, up)
        except RuntimeError:
            shapes = f"{tuple(gate.shape)} and {tuple(up.shape)}"
            raise ValueError(f"swiglu(): gate and up must broadcast together, got shapes {shapes}") from None
    return record(operator, gate, up)


@overridable
def swiglu_packed(
    packed: Tensor,
    dim: int = -1,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    r"""`swiglu(gate, up)` for gate and up in one tensor, such as one matrix product gives.

    They are its halves along `dim`, as `packed.chunk(2, dim)` gives them. With `interleaved` they alternate along `dim`, as in
    GPT-OSS: along the last dimension gate is `packed[..., ::2]` and up is `packed[..., 1::2]`. Both are read in place, and
    their gradient is written into one tensor like `packed`.

    Args:
        packed: a tensor of float dtype with at least one dimension; saved for backward, and nothing else.
        dim: the dimension that holds gate and up, of even size.
        interleaved: whether gate and up alternate. Kernels move 16 bytes an access if `dim` has stride 1.
        alpha, limit, up_offset: as in `swiglu`.

    Returns:
        A tensor of the shape of `packed`, with half the size in `dim`.

    Raises:
        TypeError: `packed` is not a tensor of a float dtype, `interleaved` not a bool, or an option not a number.
        ValueError: an option out of range.
        RuntimeError: the size of `dim` is odd, or there is no dimension.
        IndexError: `dim` is out of range.

    Example:
        >>> torch_sigmoid.swiglu_packed(torch.ones(2, 16)).shape
        torch.Size([2, 8])
        >>> gate_and_up = torch.tensor([100.0, 3.0, 0.0, 5.0])  # gate = [100, 0], up = [3, 5]
        >>> torch_sigmoid.swiglu_packed(gate_and_up, interleaved=True)
        tensor([300.,   0.])
    """
    check_tensors("swiglu_packed", packed=packed)
    check_floats("swiglu_packed", packed=packed)
    check_bool("swiglu_packed", "interleaved", interleaved)
    dim = halved_dim("swiglu_packed", packed, dim)
    operator = _swiglu_operator("swiglu_packed", dim, alpha, limit, up_offset, interleaved)
    if interleaved and dim != packed.dim() - 1:
        moved = packed.movedim(dim, -1)
        result = swiglu_packed(moved, interleaved=True, alpha=alpha, limit=limit, up_offset=up_offset)
        return result.movedim(-1, dim)
    if not is_ours(packed):
        up, gate = operator.parts((packed,))
        return _swiglu_in_torch("swiglu_packed", gate, up, operator)
    return record(operator, packed)


def _swiglu_operator(
    caller: str, dim: int | None, alpha: float, limit: float | None, up_offset: float, interleaved: bool = False
) -> Gated:
    # Options that came before are not checked again. Only floats are looked up, since True equals 1.0 and must be refused;
    # and torch.compile warns of a cache that it sees.
    if not torch.compiler.is_compiling() and {type(alpha), type(up_offset), type(limit)} <= _FLOAT_OR_NONE:
        return _known_swiglu_operator(caller, dim, alpha, limit, up_offset, interleaved)
    return _new_swiglu_operator(caller, dim, alpha, limit, up_offset, interleaved)


def _new_swiglu_operator(
    caller: str, dim: int | None, alpha: float, limit: float | None, up_offset: float, interleaved: bool
) -> Gated:
    check_gate_options(caller, alpha, limit, up_offset)
    alpha, limit, up_offset = constant(alpha), constant(limit), constant(up_offset)
    limit = None if limit is None or limit == math.inf else float(limit)
    if interleaved:
        return Interleaved("silu", alpha=float(alpha), limit=limit, offset=float(up_offset))
    return Gated("silu", dim, True, float(alpha), limit, float(up_offset))


_FLOAT_OR_NONE = frozenset((float, type(None)))
_known_swiglu_operator = lru_cache(maxsize=256)(_new_swiglu_operator)


def _swiglu_in_torch(caller: str, gate: Tensor, up: Tensor, operator: Gated) -> Tensor:
    """For what torch has operators of its own: complex, sparse and nested tensors."""
    if operator.constants != Gated("silu").constants:
        found = f"{described(gate)} and {described(up)}"
        raise TypeError(f"{caller}(): alpha, limit and up_offset need {DENSE_FLOATS} tensors, got {found}")
    return F.silu(gate) * up
