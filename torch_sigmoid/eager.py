"""Values on a CPU by torch's fused operators: the operators of formulas.py where nobody records what is called.

They take one exponential and few passes over memory. Far out they lose digits, and some make NaN of an infinite number. Two
reductions, which only read, tell whether a tensor may hold an element that is far. If so, the exact formula computes that
element again, and no other: no digit of an element depends on the others.

fp32 and fp64 are computed in their own arithmetic. In 16 bit, one fused operator computes in fp32 and rounds once; several run
in fp32, block by block, so that nothing is rounded between them and no wide copy of a tensor exists.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import formulas
from .dispatch import WIDE_DTYPES, Tensors, computes_eagerly
from .formulas import NEAR, upcast

_aten = torch.ops.aten
_silu_backward: Callable[..., Tensor] = _aten.silu_backward.default
_sigmoid_backward: Callable[..., Tensor] = _aten.sigmoid_backward.default
_sigmoid_backward_into: Callable[..., Tensor] = _aten.sigmoid_backward.grad_input
# grad where low < x < high, else 0.
_hardtanh_backward: Callable[..., Tensor] = _aten.hardtanh_backward.default
# v·z/(1 + z) with z = e^(beta·x), and v where beta·x exceeds the threshold: v·σ(beta·x) in one pass.
_softplus_backward: Callable[..., Tensor] = _aten.softplus_backward.default
# v·σ(-x), given e^-|x|.
_logsigmoid_backward: Callable[..., Tensor] = _aten.log_sigmoid_backward.default

# Beyond it 1 - σ is a quarter of an ulp of 1.
THRESHOLD = {torch.float32: 18.0, torch.float64: 38.0}
# A number that e^THRESHOLD multiplies without overflow.
LARGE = {torch.float32: 2.0**100, torch.float64: 2.0**960}
# silu_backward in fp32 loses x/4 ulp above, where 1 - σ cancels, and |x|/2 below, where grad·σ is subnormal.
SILU_LOW, SILU_HIGH = -10.0, 8.0
LOSS_NEAR = 64.0
# Elements a block and thread: the least that torch gives a thread, and four fp32 blocks fit into a core's second-level cache.
BLOCK = 2**15


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """Whether operators on these tensors may be computed here: plain ones on a CPU, with nobody listening.

    One without dimensions, or without elements, costs no time that is worth a rule of its own.
    """
    return (
        first.is_cpu
        and computes_eagerly(first, *(each for each in others if each is not None))
        and first.dim() > 0
        and first.numel() > 0
    )


def _extremes(x: Tensor) -> tuple[float, float]:
    """The least and the greatest element. If there is a NaN both are, and every comparison fails."""
    least, greatest = torch.aminmax(x)
    return least.item(), greatest.item()


def _mend(result: Tensor, radius: float, exactly: Callable[..., Tensor], x: Tensor, *operands: Tensor | float) -> None:
    """Compute the elements of the result with |x| > radius again, by `exactly(x, *operands)` of these elements."""
    # 0 where |x| ≤ radius, at a third of the cost of a comparison.
    far = F.softshrink(x.expand(result.shape).flatten(), radius).nonzero().flatten()
    if far.numel():
        chosen = (each.expand(result.shape).take(far) if isinstance(each, Tensor) else each for each in (x, *operands))
        result.put_(far, exactly(*chosen).to(result.dtype))


def _minus_abs(x: Tensor) -> Tensor:
    """-|x| in new memory, in one pass: x with its sign bit set."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return x.view(integer).bitwise_or(torch.iinfo(integer).min).view(x.dtype)


def _in_blocks(form: Callable[..., Tensors], results: Tensors, *operands: Tensor) -> None:
    """Write form(*operands), computed in fp32, into 16-bit results of one shape, in blocks of their first dimension."""
    n, size = results[0].numel(), BLOCK * torch.get_num_threads()
    tensors: Sequence[Tensor] = (*results, *operands)
    if n > size and all(each.shape == results[0].shape and each.is_contiguous() for each in tensors):
        tensors = [each.view(-1) for each in tensors]
    parts: list[Sequence[Tensor]] = [[each] for each in tensors]
    if n > size:
        rows = tensors[0].size(0)
        length = max(1, size * rows // n)
        # A gate that is broadcast along the first dimension has one row.
        parts = [each.split(length) if each.size(0) == rows else [each] * -(-rows // length) for each in tensors]
    for blocks in zip(*parts):
        values = form(*(each.float() for each in blocks[len(results) :]))
        for result, value in zip(blocks, values):
            result.copy_(value)


# Functions of one number


@cache
def _adds_fused(dtype: torch.dtype) -> bool:
    """Whether torch.add(p, x, alpha=alpha) rounds once, in the vectorised loop, in its remainder and in the strided loop."""
    alpha = torch.tensor(1.7, dtype=dtype).item()
    strided = torch.linspace(1, 2, 134, dtype=dtype)[::2]
    for x in (strided, strided.contiguous()):
        rounded = x * -alpha
        exact = [float(Fraction(p) + Fraction(alpha) * Fraction(each)) for p, each in zip(rounded.tolist(), x.tolist())]
        if torch.add(rounded, x, alpha=alpha).tolist() != exact:
            return False
    return True


def _lost(alpha: float, x: Tensor, minus_product: Tensor) -> Tensor:
    """alpha·x + minus_product, what the product's rounding has lost."""
    rounded = torch.tensor(alpha, dtype=x.dtype).item()
    if not _adds_fused(x.dtype):
        return formulas.product(alpha, x)[1]
    lost = torch.add(minus_product, x, alpha=rounded)
    return lost if rounded == alpha else lost.add_(x, alpha=alpha - rounded)


def _exp_minus(alpha: float, x: Tensor, exactly: bool) -> Tensor:
    """e^(-alpha·x), as exact as for a product that is not rounded if `exactly`."""
    if alpha == 1:
        return x.neg().exp_()
    power = x * -alpha
    lost = _lost(alpha, x, power) if exactly else None
    e = power.exp_()
    return e if lost is None else e.addcmul_(e, lost, value=-1)


def _silu_parts(x: Tensor, alpha: float, exactly: bool) -> tuple[Tensor, Tensor]:
    """σ(alpha·x) and the derivative of x·σ(alpha·x), from one exponential."""
    e = _exp_minus(alpha, x, exactly)
    sigma = (e + 1).reciprocal_()
    complement = e.mul_(sigma)
    return sigma, torch.addcmul(sigma, sigma, complement.mul_(x), value=alpha)


def _value(x: Tensor, function: str, alpha: float, exactly: bool = True) -> Tensor:
    """f(x), or x·σ(alpha·x), in memory of its own."""
    if function == "silu" and alpha != 1:
        e = _exp_minus(alpha, x, exactly)
        return torch.div(x, e.add_(1), out=e)
    return {"sigmoid": torch.sigmoid, "silu": F.silu, "logsigmoid": F.logsigmoid}[function](x)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def weighted(v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0) -> Tensor:
    """`formulas.weighted`, by fused operators where nobody listens and they can; x is fp32 or fp64."""
    if order == 2 or not takes(x, v if isinstance(v, Tensor) else None):
        return formulas.weighted(v, x, function, order, alpha)
    if function == "logsigmoid" and order == 1:
        function, order, x = "sigmoid", 0, -x
    if order == 0:
        result = v * _value(x, function, alpha)
    elif function == "sigmoid":
        result = _sigmoid_backward(torch.as_tensor(v, dtype=x.dtype), _minus_abs(x).sigmoid_())
    else:
        result = v * _silu_parts(x, alpha, True)[1]
    if function != "logsigmoid":
        least, greatest = _extremes(x)
        near = NEAR[x.dtype]
        # Only σ itself, and x·σ(x), keep their digits for every large x.
        if not (-near <= alpha * least and (order == 0 and alpha == 1 or alpha * greatest <= near)):
            _mend(result, near / alpha, lambda x, v: formulas.weighted(v, x, function, order, alpha), x, v)
    return result


def unary(x: Tensor, function: str, alpha: float) -> Tensor:
    """f(x), or x·σ(alpha·x)."""
    if function == "logsigmoid":
        return F.logsigmoid(x)
    if alpha == 1:
        result = F.silu(x)
    elif x.dtype in WIDE_DTYPES:
        result = _value(x, function, alpha)
    else:
        result = _softplus_backward(x, x, alpha, THRESHOLD[torch.float32])
    least, greatest = _extremes(x)
    near = NEAR[_arithmetic(x)] / alpha
    if not (-near <= least and (alpha == 1 or greatest <= near)):
        _mend(result, near, lambda x: formulas.weighted(1.0, upcast(x), function, 0, alpha), x)
    return result


def unary_gradient(grad: Tensor, x: Tensor, function: str, alpha: float) -> Tensor:
    """grad·f'(x)."""

    def exactly(x: Tensor, grad: Tensor) -> Tensor:
        return formulas.weighted(upcast(grad), upcast(x), function, 1, alpha)

    dtype, wide = _arithmetic(x), x.dtype in WIDE_DTYPES
    least, greatest = _extremes(x)
    near = NEAR[dtype]
    if function == "logsigmoid":
        result = _softplus_backward(grad, x, -1.0, THRESHOLD[dtype])
        if not greatest <= near:
            _mend(result, near, exactly, x, grad)
        smallest, largest = _extremes(grad)
        if not (-LARGE[dtype] <= smallest and largest <= LARGE[dtype]):
            _mend(result, LARGE[dtype], lambda grad, x: exactly(x, grad), grad, x)
        return result
    if alpha == 1:
        result = _silu_backward(grad, x)
        if wide and not (SILU_LOW <= least and greatest <= SILU_HIGH):
            middle, radius = (SILU_HIGH + SILU_LOW) / 2, (SILU_HIGH - SILU_LOW) / 2
            _mend(result, radius, lambda _, x, grad: _silu_parts(x, 1.0, True)[1].mul_(grad), x - middle, x, grad)
    elif wide:
        result = _silu_parts(x, alpha, True)[1].mul_(grad)
    else:
        result = torch.empty_like(x)
        _in_blocks(lambda grad, x: (_silu_backward(grad, x * alpha),), (result,), grad, x)
    if not (-near <= alpha * least and alpha * greatest <= near):
        _mend(result, near / alpha, exactly, x, grad)
    return result


def sigmoid_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad·σ'(x), by σ(-|x|) for σ."""
    if x.dtype in WIDE_DTYPES:
        # In the memory of its result: on a CPU a large temporary costs more than the arithmetic.
        smaller = _minus_abs(x).sigmoid_()
        return _sigmoid_backward_into(grad, smaller, grad_input=smaller)
    result = torch.empty_like(x)
    _in_blocks(lambda grad, x: (_sigmoid_backward(grad, _minus_abs(x).sigmoid_()),), (result,), grad, x)
    return result


# Gates

# The function, alpha, limit and offset of a `Gate`.
Constants = tuple[str, float, float | None, float]


class Gate(NamedTuple):
    """A·h(G): h is `function` with `alpha`, A is the operand plus `offset`, and `limit` clamps the operand and the gate first."""

    function: str
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    def operand(self, a: Tensor) -> Tensor:
        """A. A clamp lets a NaN through."""
        if self.limit is not None:
            a = a.clamp(-self.limit, self.limit)
        return a + self.offset if self.offset else a

    def gate(self, g: Tensor) -> Tensor:
        """G."""
        return g if self.limit is None else g.clamp(max=self.limit)

    def past_clamp(self, grad: Tensor, x: Tensor, low: float) -> Tensor:
        """The gradient where low ≤ x ≤ limit, else 0."""
        if self.limit is None:
            return grad
        bounds = torch.tensor([low, self.limit], dtype=x.dtype)
        return _hardtanh_backward(grad, x, *bounds.nextafter(bounds.new_tensor([-math.inf, math.inf])).tolist())

    def exact_value(self, g: Tensor, a: Tensor) -> Tensor:
        g, a = upcast(g), upcast(a)
        return formulas.weighted(self.operand(a), self.gate(g), self.function, 0, self.alpha)

    def exact_to_operand(self, g: Tensor, grad: Tensor, a: Tensor) -> Tensor:
        g, grad, a = upcast(g), upcast(grad), upcast(a)
        return self.past_clamp(formulas.weighted(grad, self.gate(g), self.function, 0, self.alpha), a, -(self.limit or 0.0))

    def exact_to_gate(self, g: Tensor, grad: Tensor, a: Tensor) -> Tensor:
        g, grad, a = upcast(g), upcast(grad), upcast(a)
        to_gate = formulas.weighted(grad * self.operand(a), self.gate(g), self.function, 1, self.alpha)
        return self.past_clamp(to_gate, g, -math.inf)

    def value(self, a: Tensor, g: Tensor, exactly: bool) -> Tensor:
        """A·h(G) of fp32 or fp64 where no gate is far."""
        value = _value(self.gate(g), self.function, self.alpha, exactly)
        operand = self.operand(a)
        return value.mul_(operand) if value.shape == operand.shape else operand * value

    def gradients(self, grad: Tensor, a: Tensor, g: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
        """The gradients of a and g, likewise."""
        gate = self.gate(g)
        to_gate = grad * self.operand(a)
        if self.function == "sigmoid":
            e = _minus_abs(gate).exp_()
            to_operand = _logsigmoid_backward(grad, -gate, e)
            smaller = e.div_(e + 1)
            _sigmoid_backward_into(to_gate, smaller, grad_input=to_gate)
        else:
            sigma, slope = _silu_parts(gate, self.alpha, exactly)
            to_gate.mul_(slope)
            to_operand = sigma.mul_(gate).mul_(grad)
        return self.past_clamp(to_operand, a, -(self.limit or 0.0)), self.past_clamp(to_gate, g, -math.inf)


def _gate_is_near(gate: Gate, g: Tensor, upwards: bool) -> bool:
    least, greatest = _extremes(g)
    near = NEAR[_arithmetic(g)] / gate.alpha
    if gate.limit is not None:
        greatest = min(greatest, gate.limit)
    return -near <= least and (greatest <= near or not upwards and not math.isnan(greatest))


def gate_value(a: Tensor, g: Tensor, constants: Constants) -> Tensor:
    """A·h(G); g has the shape of a, or is broadcast."""
    gate, dtype = Gate(*constants), a.dtype
    if dtype in WIDE_DTYPES:
        result = gate.value(a, g, True)
    elif gate == Gate("sigmoid") and a.shape == g.shape:
        result = _softplus_backward(a, g, 1.0, THRESHOLD[torch.float32])
        if dtype is torch.bfloat16:
            least, greatest = _extremes(a)
            if not (-LARGE[torch.float32] <= least and greatest <= LARGE[torch.float32]):
                _mend(result, LARGE[torch.float32], lambda a, g: gate.exact_value(g, a), a, g)
    else:
        result = torch.empty_like(a)
        _in_blocks(lambda a, g: (gate.value(a, g, False),), (result,), a, g)
    # Far up, only x·σ(alpha·x) loses digits: those of the product.
    if not _gate_is_near(gate, g, upwards=gate.alpha != 1):
        _mend(result, NEAR[_arithmetic(g)] / gate.alpha, gate.exact_value, gate.gate(g), a)
    return result


def gate_gradients(grad: Tensor, a: Tensor, g: Tensor, constants: Constants, results: Tensors) -> None:
    """Write the gradients of a and g into `results`; all have one shape."""
    gate = Gate(*constants)
    if a.dtype in WIDE_DTYPES:
        for result, value in zip(results, gate.gradients(grad, a, g, True)):
            result.copy_(value)
    else:
        _in_blocks(lambda grad, a, g: gate.gradients(grad, a, g, False), results, grad, a, g)
    if not _gate_is_near(gate, g, upwards=True):
        radius, clamped = NEAR[_arithmetic(g)] / gate.alpha, gate.gate(g)
        for result, exactly in zip(results, (gate.exact_to_operand, gate.exact_to_gate)):
            _mend(result, radius, lambda _, g, grad, a, exactly=exactly: exactly(g, grad, a), clamped, g, grad, a)


def broadcast_gradients(grad: Tensor, a: Tensor, g: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """The gradients of a·σ(g) for a gate that is broadcast: σ' multiplies the sum."""
    wide = upcast(g)
    to_operand = torch.empty_like(a)
    torch.mul(grad, torch.sigmoid(wide), out=to_operand)
    if not _gate_is_near(Gate(*constants), g, upwards=False):
        _mend(to_operand, NEAR[wide.dtype], lambda g, grad: formulas.weighted(upcast(grad), upcast(g), "sigmoid", 0), g, grad)
    total = (upcast(grad) * a).sum_to_size(g.shape)
    to_gate = _sigmoid_backward(total, _minus_abs(wide).sigmoid_())
    far = (wide.abs() > NEAR[wide.dtype]).logical_or_(~(total.abs() <= LARGE[wide.dtype]))
    if far.any():
        terms = formulas.weighted(upcast(grad) * a, wide, "sigmoid", 1)
        to_gate = torch.where(far, terms.sum_to_size(g.shape), to_gate)
    return to_operand, to_gate.to(g.dtype)


# Losses


def weighted_loss(
    v: Tensor | float, x: Tensor, positive: Tensor, negative: Tensor, gamma: float, order: int, sum_is_one: bool
) -> Tensor:
    """`formulas.weighted_loss` of order 0 or 1 of fp32 or fp64, from the definitions.

    `sum_is_one` says that positive + negative is 1.
    """
    e = _minus_abs(x).exp_()
    if order or gamma:
        wrong, right = _logsigmoid_backward(negative, -x, e), _logsigmoid_backward(positive, x, e)
    if order and gamma:
        smaller = e / (e + 1)
    if order == 0 or gamma:
        # |x| times what is wrong: the positive part below 0, the negative part above.
        above = x.clamp(min=0)
        below = above - x
        loss = e.log1p_()
        if sum_is_one:
            loss.add_(torch.lerp(above, below, positive))
        else:
            loss.mul_(positive + negative).addcmul_(above, negative).addcmul_(below, positive)
    if gamma:
        power = wrong + right
    if order:
        result = wrong.sub_(right)
        if gamma:
            # Before the loss: σ' may be as small as it, and the product of both be lost.
            result.addcmul_(_sigmoid_backward(negative - positive, smaller).div_(power), loss, value=gamma)
    else:
        result = loss
    if isinstance(v, Tensor):
        # Before the power: the product with it may be subnormal where the product with v, too, is not.
        result = result.mul_(v) if v.dim() == 0 or v.shape == result.shape else result * v
    elif v != 1:
        result.mul_(v)
    if gamma:
        result.mul_(power.pow_(gamma))
    least, greatest = _extremes(x)
    if not (-LOSS_NEAR <= least and greatest <= LOSS_NEAR):

        def exactly(x: Tensor, v: Tensor | float, positive: Tensor, negative: Tensor) -> Tensor:
            return formulas.weighted_loss(v, x, positive, negative, gamma, order, False)

        _mend(result, LOSS_NEAR, exactly, x, v, positive, negative)
    return result
