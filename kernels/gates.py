"""The gates: log-sigmoid and SiLU of one tensor, and a·h(g) of two, one kernel each for forward, backward and double backward.

of one tensor    y = f(x)         grad_x = d·f'(x)
of two           y = A·h(G)       grad_a = d·h(G)         grad_g = d·A·h'(G)

d is the upstream gradient. For SiLU f(x) = silu(ALPHA·x)/ALPHA = x·σ(ALPHA·x). h is σ (GLU, sigmoid_gate) or f (SwiGLU); A, G
are the operand and the gate: G = min(g, LIMIT), and A = a clamped to ±LIMIT, plus OFFSET, where no gradient passes what was
clamped. Double backward, for v, w, the gradients that reach grad_a and grad_g:

to d: v·h(G) + w·A·h'(G)        to a: w·d·h'(G)        to g: v·d·h'(G) + w·d·A·h"(G)

A gate that is broadcast against its operand is loaded once a row or once a column, and its gradient summed up where it is
computed, in fp32 (fp64 for fp64), see reduce.py.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import maths
from .pointwise import pointwise
from .reduce import along, sum_along

FUNCTIONS = {"sigmoid": maths.SIGMOID.value, "silu": maths.SILU.value, "logsigmoid": maths.LOGSIGMOID.value}


@triton.jit
def unary_forward_formula(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, ROUND: tl.constexpr):
    return maths.weighted(1.0, x, FUNCTION, 0, ROUND, ALPHA)


@triton.jit
def unary_backward_formula(d, x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, ROUND: tl.constexpr):
    return maths.weighted(d, x, FUNCTION, 1, ROUND, ALPHA)


@triton.jit
def unary_double_backward_formula(v, d, x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, ROUND: tl.constexpr):
    return maths.weighted(v, x, FUNCTION, 1, ROUND, ALPHA), maths.weighted(v * d, x, FUNCTION, 2, ROUND, ALPHA)


@triton.jit
def weighted_gate(
    v, g, FUNCTION: tl.constexpr, ORDER: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, ROUND: tl.constexpr
):
    """v·h(G), or v times a derivative of it in g, which is 0 beyond the limit."""
    gate = g
    if LIMIT is not None:
        gate = tl.where(g > maths.constant(LIMIT, g), maths.constant(LIMIT, g), g)
    result = maths.weighted(v, gate, FUNCTION, ORDER, ROUND, ALPHA)
    if ORDER > 0 and LIMIT is not None:
        result = tl.where(g > maths.constant(LIMIT, g), 0.0, result)
    return result


@triton.jit
def operand(a, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """A: a clamped to ±LIMIT, plus OFFSET."""
    if LIMIT is not None:
        limit = maths.constant(LIMIT, a)
        a = tl.where(a > limit, limit, tl.where(a < -limit, -limit, a))
    if OFFSET != 0.0:
        a += maths.constant(OFFSET, a)
    return a


@triton.jit
def past_clamp(grad, a, LIMIT: tl.constexpr):
    """grad where a was not clamped, else 0."""
    if LIMIT is not None:
        grad = tl.where(tl.abs(a) > maths.constant(LIMIT, a), 0.0, grad)
    return grad


@triton.jit
def gate_forward_formula(
    a, g, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    return weighted_gate(operand(a, LIMIT, OFFSET), g, FUNCTION, 0, ALPHA, LIMIT, ROUND)


@triton.jit
def gate_backward_formula(
    d, a, g, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    to_a = past_clamp(weighted_gate(d, g, FUNCTION, 0, ALPHA, LIMIT, ROUND), a, LIMIT)
    return to_a, weighted_gate(d * operand(a, LIMIT, OFFSET), g, FUNCTION, 1, ALPHA, LIMIT, ROUND)


@triton.jit
def gate_double_backward_formula(
    v, d, a, w, g, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr
):
    v = past_clamp(v, a, LIMIT)
    scaled = w * operand(a, LIMIT, OFFSET)
    to_d = weighted_gate(v, g, FUNCTION, 0, ALPHA, LIMIT, ROUND)
    to_d += weighted_gate(scaled, g, FUNCTION, 1, ALPHA, LIMIT, ROUND)
    to_a = past_clamp(weighted_gate(w * d, g, FUNCTION, 1, ALPHA, LIMIT, ROUND), a, LIMIT)
    to_g = weighted_gate(v * d, g, FUNCTION, 1, ALPHA, LIMIT, ROUND)
    to_g += weighted_gate(scaled * d, g, FUNCTION, 2, ALPHA, LIMIT, ROUND)
    return to_d, to_a, to_g


# Constants are compiled in: who changes alpha at every step compiles at every step.
@lru_cache(maxsize=256)
def unary_launchers(function, alpha):
    formulas = unary_forward_formula, unary_backward_formula, unary_double_backward_formula
    return tuple(pointwise(formula, FUNCTIONS[function], alpha) for formula in formulas)


def unary_forward(x, function, alpha):
    """f(x)."""
    output = torch.empty_like(x)
    unary_launchers(function, alpha)[0]((x,), (output,))
    return output


def unary_backward(grad_output, x, function, alpha):
    """d·f'(x), in the dtype of `grad_output`."""
    grad_x = torch.empty_like(x, dtype=grad_output.dtype)
    unary_launchers(function, alpha)[1]((grad_output, x), (grad_x,))
    return grad_x


def unary_double_backward(v, grad_output, x, function, alpha):
    """The gradients that reach `grad_output` and `x`."""
    outputs = torch.empty_like(x, dtype=grad_output.dtype), torch.empty_like(x)
    unary_launchers(function, alpha)[2]((v, grad_output, x), outputs)
    return outputs


@lru_cache(maxsize=256)
def gate_launchers(function, alpha, limit, offset):
    formulas = gate_forward_formula, gate_backward_formula, gate_double_backward_formula
    constants = FUNCTIONS[function], alpha, limit, offset
    # Halves of one packed tensor and tensors of their own may have the same strides, but not their gradients.
    return tuple(pointwise(formula, *constants, layouts_follow=False) for formula in formulas)


@lru_cache(maxsize=256)
def broadcast_launchers(function, alpha, limit, offset):
    constants = FUNCTIONS[function], alpha, limit, offset
    return tuple(along(formula, *constants) for formula in (gate_backward_formula, gate_double_backward_formula))


def gate_forward(a, g, gate):
    """A·h(G) in the shape of a, to which g broadcasts; `gate` is the name of h, ALPHA, LIMIT and OFFSET."""
    output = torch.empty_like(a)
    gate_launchers(*gate)[0]((a, g if g.shape == a.shape else g.expand_as(a)), (output,))
    return output


def gate_backward(grad_output, a, g, gate, out):
    """The gradients of a and g, tensors of one shape, written to the two tensors of `out`."""
    gate_launchers(*gate)[1]((grad_output, a, g), out)


def gate_double_backward(v, w, grad_output, a, g, gate, out):
    """The gradients that reach a and g, written to `out`; returns the one that reaches `grad_output`."""
    # In the memory format of the others: tensors of several make no walk.
    to_grad_output = torch.empty_like(out[0], dtype=grad_output.dtype)
    gate_launchers(*gate)[2]((v, grad_output, a, w, g), (to_grad_output, *out))
    return to_grad_output


def _unsummed(like, dtype):
    return torch.empty_like(like, dtype=torch.promote_types(dtype, torch.float32))


def broadcast_backward(grad_output, a, g, gate):
    """The gradients of a and g, where g broadcasts to a."""
    g, grad_a = g.contiguous(), torch.empty_like(a)
    full = grad_output, a, g.expand_as(a)
    grad_g = sum_along(broadcast_launchers(*gate)[0], full, (grad_a,), g)
    if grad_g is None:
        unsummed = _unsummed(a, g.dtype)
        gate_backward(*full, gate, (grad_a, unsummed))
        grad_g = unsummed.sum_to_size(g.shape).to(g.dtype)
    return grad_a, grad_g


def broadcast_double_backward(v, w, grad_output, a, g, gate):
    """The gradients that reach `grad_output`, a and g, where w and g broadcast to a."""
    w, g, to_a = w.contiguous(), g.contiguous(), torch.empty_like(a)
    to_grad_output = torch.empty_like(a, dtype=grad_output.dtype)
    full = v, grad_output, a, w.expand_as(a), g.expand_as(a)
    to_g = sum_along(broadcast_launchers(*gate)[1], full, (to_grad_output, to_a), g)
    if to_g is None:
        unsummed = _unsummed(a, g.dtype)
        gate_launchers(*gate)[2](full, (to_grad_output, to_a, unsummed))
        to_g = unsummed.sum_to_size(g.shape).to(g.dtype)
    return to_grad_output, to_a, to_g
