"""Values on a CPU by torch's fused operators: the operators of formulas.py where nobody records what is called.

They take one exponential and few passes over memory. Far out they lose digits, and some make NaN of an infinite number. Two
reductions, which only read, tell whether a tensor may hold an element that is far. If so, the exact formula computes that
element again, and no other: no digit of an element depends on the others.

fp32 and fp64 are computed in their own arithmetic. In 16 bit, one fused operator computes in fp32 and rounds once; several run
in fp32, block by block, so that nothing is rounded between them and no wide copy of a tensor exists.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import formulas
from .dispatch import WIDE_DTYPES, Tensors, computes_eagerly
from .formulas import NEAR, upcast, upcast_dtype

_aten = torch.ops.aten
_silu_backward: Callable[..., Tensor] = _aten.silu_backward.default
_sigmoid_backward: Callable[..., Tensor] = _aten.sigmoid_backward.default
_sigmoid_backward_into: Callable[..., Tensor] = _aten.sigmoid_backward.grad_input
_silu_into: Callable[..., Tensor] = _aten.silu.out
_silu_backward_into: Callable[..., Tensor] = _aten.silu_backward.grad_input
# 0 where x ≤ threshold, else grad, as where x is NaN.
_threshold_backward_into: Callable[..., Tensor] = _aten.threshold_backward.grad_input
# v·z/(1 + z) with z = e^(beta·x), and v where beta·x exceeds the threshold: v·σ(beta·x) in one pass.
_softplus_backward: Callable[..., Tensor] = _aten.softplus_backward.default
# v·σ(-x), given e^-|x|.
_logsigmoid_backward: Callable[..., Tensor] = _aten.log_sigmoid_backward.default
_logsigmoid_backward_into: Callable[..., Tensor] = _aten.log_sigmoid_backward.grad_input

_FUSED: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu, "logsigmoid": F.logsigmoid}

# Beyond it 1 - σ is a quarter of an ulp of 1, and e^THRESHOLD·LARGE is finite.
THRESHOLD, LARGE = 18.0, 2.0**100
# silu_backward in fp32 loses |x|/2 ulp: above, where 1 - σ cancels, and below, where grad·σ is subnormal.
SILU_NEAR = 8.0
# The definitions of the losses lose nothing nearer than this.
LOSS_NEAR = 64.0
# Elements a block: smaller ones cost more calls than they save time in the cache, and torch gives a thread no fewer than 2¹⁵.
BLOCK, OF_A_THREAD = 2**16, 2**15
# A block's fp32 copies and temporaries, which are kept for the next call: page faults cost more than the arithmetic.
KEPT = 8

Form = Callable[..., None]


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """Whether operators on these tensors may be computed here: plain ones on a CPU, with nobody listening.

    One without dimensions, or without elements, costs no time that is worth a rule of its own.
    """
    return first.is_cpu and computes_eagerly(first, *others) and first.dim() > 0 and first.numel() > 0


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


def _minus_abs(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.abs(x, out=out).neg_()


def block_size() -> int:
    return max(BLOCK, OF_A_THREAD * torch.get_num_threads())


def blocks_of(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same blocks of all tensors, along the first dimension of `first`; the others have its shape or broadcast to it."""
    tensors, n, size = (first, *others), first.numel(), block_size()
    if n <= size:
        yield tensors
        return
    if first.dim() > 1 and all(each.dim() == 0 or (each.shape == first.shape and each.is_contiguous()) for each in tensors):
        tensors = tuple(each.view(-1) if each.dim() else each for each in tensors)
    rows, n_dims = tensors[0].size(0), tensors[0].dim()
    length = max(1, size * rows // n)
    yield from zip(
        *(
            each.split(length) if each.dim() == n_dims and each.size(0) == rows else [each] * -(-rows // length)
            for each in tensors
        )
    )


_kept: list[Tensor] = []


def _in_blocks(form: Form, n_temporaries: int, results: Sequence[Tensor], *operands: Tensor) -> None:
    """Have `form(temporaries, results, *operands)` write results of one shape, in blocks of their first dimension.

    In 16 bit, the form computes on fp32 copies of its blocks. Operands may be broadcast against the results.
    """
    first, n = results[0], results[0].numel()
    dtype = upcast_dtype(first)
    if n < OF_A_THREAD:
        # Each tensor apart costs less than the parts of one.
        temporaries = [torch.empty_like(first, dtype=dtype) for _ in range(n_temporaries)]
        if dtype is first.dtype:
            form(temporaries, results, *operands)
            return
        wide = [torch.empty_like(first, dtype=dtype) for _ in results]
        form(temporaries, wide, *map(torch.Tensor.float, operands))
        for result, value in zip(results, wide):
            result.copy_(value)
        return
    n_results, n_copies = len(results), len(results) + len(operands) if dtype is not first.dtype else 0
    views: Sequence[Tensor] = ()
    try:
        memory = _kept.pop()
    except IndexError:
        memory = torch.empty(0, dtype=dtype, device="cpu")
    for blocks in blocks_of(*results, *operands):
        shape = blocks[0].shape
        if (n_copies + n_temporaries) and (not views or views[0].shape != shape):
            numel = (n_copies + n_temporaries) * blocks[0].numel()
            if memory.dtype is not dtype or memory.numel() < numel:
                memory = torch.empty(numel, dtype=dtype, device="cpu")
            views = memory[:numel].view(-1, *shape).unbind()
        if n_copies:
            operand_blocks = zip(views[n_results:], blocks[n_results:])
            wide = [view.copy_(each) if each.shape == shape else each.float() for view, each in operand_blocks]
            form(views[n_copies:], views[:n_results], *wide)
            for result, value in zip(blocks, views[:n_results]):
                result.copy_(value)
        else:
            form(views, blocks[:n_results], *blocks[n_results:])
    # What inference mode has made cannot be written elsewhere.
    if memory.numel() <= KEPT * block_size() and not memory.is_inference():
        _kept.append(memory)


@cache
def _one(dtype: torch.dtype) -> Tensor:
    """1 as a tensor: torch takes longer to make one of a number."""
    return torch.ones((), dtype=dtype, device="cpu")


@cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype, device="cpu").item()


# Functions of one number


@cache
def _adds_fused(dtype: torch.dtype) -> bool:
    """Whether torch.add(p, x, alpha=alpha) rounds once, in the vectorised loop, in its remainder and in the strided loop."""
    alpha = _rounded(1.7, dtype)
    strided = torch.linspace(1, 2, 134, dtype=dtype, device="cpu")[::2]
    for x in (strided, strided.contiguous()):
        rounded = x * -alpha
        exact = [float(Fraction(p) + Fraction(alpha) * Fraction(each)) for p, each in zip(rounded.tolist(), x.tolist())]
        if torch.add(rounded, x, alpha=alpha).tolist() != exact:
            return False
    return True


def _exp_minus(alpha: float, x: Tensor, exactly: bool, out: Tensor, temporary: Tensor) -> Tensor:
    """e^(-alpha·x); if `exactly`, with what the product's rounding loses, up to |alpha·x| ulp."""
    if alpha == 1:
        return torch.neg(x, out=out).exp_()
    torch.mul(x, -alpha, out=out)
    if not exactly:
        return out.exp_()
    if _adds_fused(x.dtype):
        rounded = _rounded(alpha, x.dtype)
        lost = torch.add(out, x, alpha=rounded, out=temporary)
        if rounded != alpha:
            lost.add_(x, alpha=alpha - rounded)
    else:
        lost = formulas.product(alpha, x)[1]
    return out.exp_().addcmul_(out, lost, value=-1)


def _silu_parts(temporaries: Sequence[Tensor], x: Tensor, alpha: float, exactly: bool) -> tuple[Tensor, Tensor]:
    """σ(alpha·x) and the derivative of x·σ(alpha·x), in two temporaries, from one exponential."""
    e, sigma = temporaries[:2]
    _exp_minus(alpha, x, exactly, e, sigma)
    torch.add(e, _one(e.dtype), out=sigma).reciprocal_()
    ratio = torch.add(_one(x.dtype), e.mul_(sigma).mul_(x), alpha=alpha, out=e)
    slope = ratio.mul_(sigma)
    return sigma, slope


def weighted(
    v: Tensor | float, x: Tensor, function: str, order: int, alpha: float = 1.0, round_to_16_bit: bool = False
) -> Tensor:
    """`formulas.weighted`, by fused operators where nobody listens and they can; x is fp32 or fp64."""
    if order == 2 or alpha != 1 or not takes(x, v if isinstance(v, Tensor) else None):
        return formulas.weighted(v, x, function, order, alpha, round_to_16_bit)
    if order == 0:
        result = _FUSED[function](x)
        result = result if isinstance(v, float) and v == 1 else v * result
        if function == "logsigmoid" or x.min().item() >= -NEAR[x.dtype]:
            return result
        _mend(result, NEAR[x.dtype], lambda x, v: formulas.weighted(v, x, function, 0), x, v)
        return result
    v = torch.as_tensor(v, dtype=x.dtype).expand(torch.broadcast_shapes(x.shape, v.shape if isinstance(v, Tensor) else ()))
    if function != "sigmoid":
        return unary_gradient(v, x, function, 1.0)
    smaller = _minus_abs(x).sigmoid_()
    result = _sigmoid_backward(v, smaller)
    least, greatest = _extremes(x)
    if not (-NEAR[x.dtype] <= least and greatest <= NEAR[x.dtype]):
        _mend(result, NEAR[x.dtype], lambda x, v: formulas.weighted(v, x, "sigmoid", 1), x, v)
    return result


def unary(x: Tensor, function: str, alpha: float) -> Tensor:
    """f(x), or x·σ(alpha·x)."""
    if function == "logsigmoid":
        return F.logsigmoid(x)
    if alpha == 1:
        result = F.silu(x)
    elif x.dtype in WIDE_DTYPES:
        result = torch.empty_like(x)

        def form(temporaries: Sequence[Tensor], results: Sequence[Tensor], x: Tensor) -> None:
            torch.div(x, _exp_minus(alpha, x, True, *temporaries).add_(_one(x.dtype)), out=results[0])

        _in_blocks(form, 2, [result], x)
    else:
        result = _softplus_backward(x, x, alpha, THRESHOLD)
    least, greatest = _extremes(x)
    near = NEAR[upcast_dtype(x)] / alpha
    if not (-near <= least and (alpha == 1 or greatest <= near)):
        _mend(result, near, lambda x: formulas.weighted(1.0, upcast(x), function, 0, alpha), x)
    return result


def unary_gradient(grad: Tensor, x: Tensor, function: str, alpha: float) -> Tensor:
    """grad·f'(x)."""

    def exactly(x: Tensor, grad: Tensor) -> Tensor:
        return formulas.weighted(upcast(grad), upcast(x), function, 1, alpha)

    dtype, wide = upcast_dtype(x), x.dtype in WIDE_DTYPES
    least, greatest = _extremes(x)
    near = NEAR[dtype] / alpha
    if function == "logsigmoid":
        result = x.neg().sigmoid_().mul_(grad) if wide else _sigmoid_of_16_bit(grad, x, -1.0)
        if not greatest <= near:
            _mend(result, near, exactly, x, grad)
        return result
    if alpha == 1:
        result = _silu_backward(grad, x)
        if wide and not (least >= -SILU_NEAR and greatest <= SILU_NEAR):
            _mend(result, SILU_NEAR, _silu_gradient, x, grad)
    else:
        result = torch.empty_like(x)

        def form(temporaries: Sequence[Tensor], results: Sequence[Tensor], grad: Tensor, x: Tensor) -> None:
            if wide:
                torch.mul(grad, _silu_parts(temporaries, x, alpha, True)[1], out=results[0])
            else:
                _silu_backward_into(grad, x.mul_(alpha), grad_input=results[0])

        _in_blocks(form, 2 * wide, [result], grad, x)
    if not (-near <= least and greatest <= near):
        _mend(result, near, exactly, x, grad)
    return result


def _sigmoid_of_16_bit(v: Tensor, x: Tensor, sign: float) -> Tensor:
    """v·σ(sign·x) in 16 bit for x that are near, rounded once."""
    result = _softplus_backward(v, x, sign, THRESHOLD)
    if v.dtype is torch.bfloat16:
        least, greatest = _extremes(v)
        if not (least >= -LARGE and greatest <= LARGE):
            _mend(result, LARGE, lambda v, x: formulas.weighted(v.float(), sign * x.float(), "sigmoid", 0), v, x)
    return result


def _silu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad * _silu_parts([torch.empty_like(x), torch.empty_like(x)], x, 1.0, True)[1]


def sigmoid_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad·σ'(x), by σ(-|x|) for σ."""

    def form(_: Sequence[Tensor], results: Sequence[Tensor], grad: Tensor, x: Tensor) -> None:
        smaller = _minus_abs(x, results[0]).sigmoid_()
        _sigmoid_backward_into(grad, smaller, grad_input=smaller)

    result = torch.empty_like(x)
    if x.dtype in WIDE_DTYPES:
        form((), (result,), grad, x)
    else:
        _in_blocks(form, 0, (result,), grad, x)
    return result


# Gates

# The function, alpha, limit and offset of a `Gate`.
Constants = tuple[str, float, float | None, float]


@cache
def _beyond(limit: float, dtype: torch.dtype) -> float:
    """The next number above `limit`."""
    bound = torch.tensor(limit, dtype=dtype, device="cpu")
    return bound.nextafter(bound.new_tensor(math.inf)).item()


class Gate(NamedTuple):
    """A·h(G): h is `function` with `alpha`; `limit` clamps the gate and the operand, to which A adds `offset`."""

    function: str
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0
    # Whether the rounding of alpha·gate counts, as it does not in 16 bit.
    exactly: bool = True

    def operand(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """A. A clamp lets a NaN through."""
        if self.limit is not None:
            a = torch.clamp(a, -self.limit, self.limit, out=out)
        return torch.add(a, self.offset, out=out) if self.offset else a

    def gate(self, g: Tensor, out: Tensor | None = None) -> Tensor:
        """G."""
        return g if self.limit is None else torch.clamp(g, max=self.limit, out=out)

    def past_clamp(self, grad: Tensor, negative: Tensor) -> Tensor:
        """The gradient where -x, or -|x|, is not below -limit, else 0; in place."""
        if self.limit is None:
            return grad
        return _threshold_backward_into(grad, negative, -_beyond(self.limit, grad.dtype), grad_input=grad)

    def exact_value(self, g: Tensor, a: Tensor) -> Tensor:
        g, a = upcast(g), upcast(a)
        return formulas.weighted(self.operand(a), self.gate(g), self.function, 0, self.alpha)

    def exact_to_operand(self, g: Tensor, grad: Tensor, a: Tensor) -> Tensor:
        g, grad, a = upcast(g), upcast(grad), upcast(a)
        return self.past_clamp(formulas.weighted(grad, self.gate(g), self.function, 0, self.alpha), _minus_abs(a))

    def exact_to_gate(self, g: Tensor, grad: Tensor, a: Tensor) -> Tensor:
        g, grad, a = upcast(g), upcast(grad), upcast(a)
        to_gate = formulas.weighted(grad * self.operand(a), self.gate(g), self.function, 1, self.alpha)
        return self.past_clamp(to_gate, -g)

    def value(self, temporaries: Sequence[Tensor], results: Sequence[Tensor], a: Tensor, g: Tensor) -> None:
        """A·h(G) of fp32 or fp64 where no gate is far; what 16 bit rounds away is not computed."""
        result, *temporaries = (*results, *temporaries)
        if self.function == "sigmoid":
            torch.mul(a, torch.sigmoid(g), out=result)
            return
        gate = self.gate(g, temporaries[0])
        if self.alpha == 1:
            _silu_into(gate, out=result)
        else:
            torch.div(gate, _exp_minus(self.alpha, gate, self.exactly, *temporaries[1:]).add_(_one(g.dtype)), out=result)
        result.mul_(self.operand(a, temporaries[0]))

    def gradients(self, temporaries: Sequence[Tensor], results: Sequence[Tensor], grad: Tensor, a: Tensor, g: Tensor) -> None:
        """The gradients of a and g, likewise."""
        to_operand, to_gate = results
        torch.mul(grad, self.operand(a, to_gate), out=to_gate)
        e, other, *rest = temporaries
        if self.function == "sigmoid":
            _minus_abs(g, e).exp_()
            _logsigmoid_backward_into(grad, torch.neg(g, out=other), e, grad_input=to_operand)
            _sigmoid_backward_into(to_gate, e.div_(torch.add(e, _one(e.dtype), out=other)), grad_input=to_gate)
            return
        gate = self.gate(g, *rest)
        if self.alpha == 1 and not self.exactly:
            _silu_into(gate, out=to_operand).mul_(grad)
            _silu_backward_into(to_gate, gate, grad_input=to_gate)
        else:
            sigma, slope = _silu_parts(temporaries, gate, self.alpha, self.exactly)
            to_gate.mul_(slope)
            torch.mul(sigma.mul_(gate), grad, out=to_operand)
        if self.limit is not None:
            self.past_clamp(to_operand, _minus_abs(a, e))
            self.past_clamp(to_gate, torch.neg(g, out=e))


@cache
def _gate(constants: Constants, exactly: bool) -> Gate:
    return Gate(*constants, exactly=exactly)


def _gate_is_near(gate: Gate, g: Tensor, upwards: bool) -> bool:
    least, greatest = _extremes(g)
    near = NEAR[upcast_dtype(g)] / gate.alpha
    if gate.limit is not None:
        greatest = min(greatest, gate.limit)
    return -near <= least and (greatest <= near or (not upwards and not math.isnan(greatest)))


def gate_value(a: Tensor, g: Tensor, constants: Constants) -> Tensor:
    """A·h(G); g has the shape of a, or is broadcast."""
    dtype = a.dtype
    gate = _gate(constants, dtype in WIDE_DTYPES)
    plain = constants[1:] == (1.0, None, 0.0) and a.shape == g.shape
    if plain and dtype in WIDE_DTYPES:
        result = _FUSED[gate.function](g).mul_(a)
    elif plain and gate.function == "sigmoid":
        result = _sigmoid_of_16_bit(a, g, 1.0)
    else:
        result = torch.empty_like(a)
        _in_blocks(gate.value, 3 * (gate.function == "silu"), [result], a, g)
    # Far up, only x·σ(alpha·x) loses digits: those of the product.
    if not _gate_is_near(gate, g, upwards=gate.alpha != 1):
        _mend(result, NEAR[upcast_dtype(g)] / gate.alpha, gate.exact_value, gate.gate(g), a)
    return result


def gate_gradients(grad: Tensor, a: Tensor, g: Tensor, constants: Constants, results: Tensors) -> None:
    """Write the gradients of a and g into `results`; all have one shape."""
    gate = _gate(constants, a.dtype in WIDE_DTYPES)
    _in_blocks(gate.gradients, 2 + (gate.limit is not None), results, grad, a, g)
    if not _gate_is_near(gate, g, upwards=True):
        radius, clamped = NEAR[upcast_dtype(g)] / gate.alpha, gate.gate(g)
        for result, exactly in zip(results, (gate.exact_to_operand, gate.exact_to_gate)):
            _mend(result, radius, lambda _, g, grad, a, exactly=exactly: exactly(g, grad, a), clamped, g, grad, a)


def broadcast_gradients(grad: Tensor, a: Tensor, g: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """The gradients of a·σ(g) for a gate that is broadcast: σ' multiplies the sum."""
    gate, wide = _gate(constants, True), upcast(g)
    to_operand = torch.empty_like(a)
    _in_blocks(gate.value, 0, [to_operand], grad, g)
    if not _gate_is_near(gate, g, upwards=False):
        _mend(to_operand, NEAR[wide.dtype], lambda g, grad: formulas.weighted(upcast(grad), upcast(g), "sigmoid", 0), g, grad)
    product = grad * a if grad.dtype in WIDE_DTYPES else grad.float().mul_(a)
    total = product.sum_to_size(g.shape)
    to_gate = _sigmoid_backward(total, _minus_abs(wide).sigmoid_())
    least, greatest = _extremes(total)
    if not (least >= -LARGE and greatest <= LARGE and _gate_is_near(gate, g, upwards=True)):
        far = (wide.abs() > NEAR[wide.dtype]).logical_or_(~(total.abs() <= LARGE))
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

    def form(temporaries: Sequence[Tensor], results: Sequence[Tensor], x: Tensor, *others: Tensor) -> None:
        (result,), (positive, negative, *factors) = results, others
        e, *temporaries = temporaries if order else (result, *temporaries)
        _minus_abs(x, e).exp_()
        if order or gamma:
            wrong, right, *temporaries = temporaries
            _logsigmoid_backward_into(negative, torch.neg(x, out=right), e, grad_input=wrong)
            _logsigmoid_backward_into(positive, x, e, grad_input=right)
        if order and gamma:
            # The derivative of (wrong + right)^γ, without γ and the next lower power.
            smaller, slope, *temporaries = temporaries
            torch.div(e, torch.add(e, _one(e.dtype), out=slope), out=smaller)
            torch.sub(negative, positive, out=slope)
            _sigmoid_backward_into(slope, smaller, grad_input=slope)
        if order == 0 or gamma:
            # |x| times what is wrong: the negative part above 0, the positive part below.
            above, below = temporaries
            torch.clamp(x, min=0.0, out=above)
            torch.sub(above, x, out=below)
            loss = e.log1p_()
            if sum_is_one:
                loss.add_(torch.lerp(above, below, positive, out=above))
            else:
                torch.addcmul(torch.mul(above, negative, out=above), below, positive, out=below)
                torch.addcmul(below, loss, torch.add(positive, negative, out=above), out=loss)
        if order:
            torch.sub(wrong, right, out=result)
            if gamma:
                power = wrong.add_(right)
                # Before the loss: its product with the slope may be subnormal where the quotient is not.
                result.addcmul_(slope.div_(power), loss, value=gamma)
        elif gamma:
            power = wrong.add_(right)
        for factor in factors:
            # Before the power, with which the product may be subnormal where the product with v, too, is not.
            result.mul_(factor)
        if gamma:
            result.mul_(power.pow_(gamma))

    factors = [v] if isinstance(v, Tensor) else [] if v == 1 else [torch.full((), v, dtype=x.dtype, device="cpu")]
    result = torch.empty_like(x)
    n_temporaries = (3 + 4 * (gamma != 0)) if order else (2 + 2 * (gamma != 0))
    _in_blocks(form, n_temporaries, (result,), x, positive, negative, *(each.expand(x.shape) for each in factors))
    least, greatest = _extremes(x)
    if not (least >= -LOSS_NEAR and greatest <= LOSS_NEAR):

        def exactly(x: Tensor, v: Tensor | float, positive: Tensor, negative: Tensor) -> Tensor:
            return formulas.weighted_loss(v, x, positive, negative, gamma, order, False)

        _mend(result, LOSS_NEAR, exactly, x, v, positive, negative)
    return result
