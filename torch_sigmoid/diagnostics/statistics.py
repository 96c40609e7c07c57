"""Adds up what one tensor tells: of a layer's input, how much is saturated or lost; of a gradient, the square of its norm.

A layer's derivative is f'(x) = kind'(scale·x). `kind` names one of KINDS; `scale` is 1 except for forms such as QuickGELU,
x·σ(1.702·x), whose derivative is silu'(1.702·x). An x is

- saturated where |f'(x)| < threshold;
- lost where f'(x) is a normal number but the layer's backward returns 0, because it works from a value that has rounded.
  LOST_WHEN names that value.

Both are intervals of x. `bounds` finds them once, by bisection over the numbers of the dtype with f' in float64: they are
exact, and for each tensor only comparisons are left. One Triton kernel reads the tensor where a kernel can run; otherwise torch
operators compute the same numbers. On a CPU, where nobody has to wait to look at a number, they do so in chunks that stay in
the cache, and compare only where the extremes of a chunk say that an interval may hold an x.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import formulas, kernels
from ..dispatch import launchable

# The columns that `add_activation` and `add_squares` add to.
ACTIVATION_COLUMNS = ("elements", "saturated", "lost", "sum of |f'|", "least |f'|")
SQUARES_COLUMNS = ("squares of the finite", "elements", "not finite")
LEAST = ACTIVATION_COLUMNS.index("least |f'|")


class Kind(NamedTuple):
    """An activation's derivative: of a float, of a tensor, and the x between which |f'| is monotone."""

    slope: Callable[[float], float]
    slopes: Callable[[Tensor], Tensor]
    turns: tuple[float, ...]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)


def _sigmoid_slope(x: float) -> float:
    e = math.exp(-abs(x))
    return e / (1 + e) ** 2


def _silu_slope(x: float) -> float:
    return _sigmoid(x) * (1 + x * _sigmoid(-x)) if abs(x) < 1000 else float(x > 0)


def _sigmoid_slopes(x: Tensor) -> Tensor:
    e = x.abs().neg_().exp_()
    return e.div_((1 + e).square_())


def _step(condition: Tensor, x: Tensor, height: float) -> Tensor:
    """`height` where the condition holds, else 0; NaN for NaN."""
    return torch.where(condition, height, torch.where(x.isnan(), x, 0.0))


KINDS: dict[str, Kind] = {
    "sigmoid": Kind(_sigmoid_slope, _sigmoid_slopes, (0.0,)),
    # silu' is 0 at -1.278, and turns at ±2.399, the solutions of x·tanh(x/2) = 2.
    "silu": Kind(
        _silu_slope, lambda x: formulas.weighted(1.0, x, "silu", 1), (-2.3993572805154, -1.2784645427610738, 2.3993572805154)
    ),
    "logsigmoid": Kind(lambda x: _sigmoid(-x), lambda x: formulas.weighted(1.0, x, "logsigmoid", 1), ()),
    "tanh": Kind(lambda x: 4 * _sigmoid_slope(2 * x), lambda x: 4 * _sigmoid_slopes(2 * x), (0.0,)),
    "relu": Kind(lambda x: float(x > 0), lambda x: _step(x > 0, x, 1.0), (0.0,)),
    "hardsigmoid": Kind(lambda x: float(abs(x) < 3) / 6, lambda x: _step(x.abs() < 3, x, 1 / 6), (-3.0, 0.0, 3.0)),
}


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# By the value that has rounded: for which scaled inputs a backward returns 0. `bounds` keeps those whose f' is a normal number.
LOST_WHEN: dict[str, Callable[[Tensor], Tensor]] = {
    "never": lambda x: torch.zeros_like(x, dtype=torch.bool),
    "sigmoid rounds to 1": lambda x: torch.sigmoid(x) == 1,
    "sigmoid rounds to 1 in fp32": lambda x: torch.sigmoid(x.to(_arithmetic(x.dtype))) == 1,
    # torch's SiLU divides by 1 + e^-x, and e^-x overflows before x·e^x is subnormal.
    "sigmoid rounds to 0 in fp32": lambda x: torch.sigmoid(x.to(_arithmetic(x.dtype))) == 0,
    "tanh rounds to ±1": lambda x: torch.tanh(x).abs() == 1,
}


@functools.cache
def bounds(kind: str, lost_when: str, dtype: torch.dtype, threshold: float, device: torch.device, scale: float = 1.0) -> Tensor:
    """The x of `dtype` that are saturated and those that are lost, as intervals on `device`.

    Returns:
        8 numbers of the dtype that kernels compute in (fp32, or fp64 for fp64): two closed intervals of saturated x, then two
        of lost x, each as (from, to). An interval that is not needed is (inf, -inf).
    """
    slope, _, turns = KINDS[kind]
    turns = tuple(turn / scale for turn in turns)
    smallest_normal = torch.finfo(dtype).smallest_normal
    is_lost = LOST_WHEN[lost_when]

    def saturated(x: Tensor) -> bool:
        return abs(slope(scale * x.item())) < threshold

    def normal(x: Tensor) -> bool:
        return abs(slope(scale * x.item())) >= smallest_normal

    def zero(x: Tensor) -> bool:
        # The module scales in the dtype of its input.
        return bool(is_lost(x if scale == 1 else scale * x))

    pairs = _intervals(saturated, turns, dtype)
    assert len(pairs) <= 2, "|f'| of no kind falls below a threshold in three places"
    pairs += [_EMPTY] * (2 - len(pairs))
    lost = []
    for first, last in _intervals(zero, turns, dtype):
        for low, high in _intervals(normal, turns, dtype):
            if max(first, low) <= min(last, high):
                lost.append((max(first, low), min(last, high)))
    pairs += lost + [_EMPTY] * (2 - len(lost))
    return torch.tensor(pairs, dtype=torch.float64, device="cpu").flatten().to(device, _arithmetic(dtype))


_EMPTY = (math.inf, -math.inf)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _rank(x: float, dtype: torch.dtype) -> int:
    """How many numbers of `dtype` lie between 0 and x; negative for x < 0."""
    magnitude = int(torch.tensor([abs(x)], dtype=torch.float64, device="cpu").to(dtype).view(_BITS[dtype.itemsize]).item())
    return -magnitude if x < 0 else magnitude


def _at_rank(rank: int, dtype: torch.dtype) -> Tensor:
    magnitude = torch.tensor([abs(rank)], dtype=_BITS[dtype.itemsize], device="cpu").view(dtype)
    return -magnitude if rank < 0 else magnitude


def _intervals(holds: Callable[[Tensor], bool], turns: tuple[float, ...], dtype: torch.dtype) -> list[tuple[float, float]]:
    """The closed intervals of `dtype` in which a condition holds.

    The caller must ensure that it changes at most once between two neighbouring turns: there, bisection finds the change.
    """
    inf = _rank(math.inf, dtype)
    edges = sorted({-inf, *(_rank(turn, dtype) for turn in turns), inf})
    found: list[list[int]] = []

    def add(first: int, last: int) -> None:
        if found and first <= found[-1][1] + 1:
            found[-1][1] = max(last, found[-1][1])
        else:
            found.append([first, last])

    for low, high in itertools.pairwise(edges):
        at_low, at_high = holds(_at_rank(low, dtype)), holds(_at_rank(high, dtype))
        if at_low == at_high:
            if at_low:
                add(low, high)
            continue
        left, right = low, high
        while right - left > 1:
            middle = (left + right) // 2
            if holds(_at_rank(middle, dtype)) == at_low:
                left = middle
            else:
                right = middle
        add(*((low, left) if at_low else (right, high)))
    return [(_at_rank(first, dtype).item(), _at_rank(last, dtype).item()) for first, last in found]


# Of fp32: 256 KiB, of which a few fit into a core's second-level cache.
_CHUNK = 1 << 16


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Slices of x along its first dimension, of about _CHUNK elements."""
    chunks: tuple[Tensor, ...] = x.split(max(1, _CHUNK * x.shape[0] // x.numel()))
    return chunks


def _within(x: Tensor, limits: Tensor) -> Tensor:
    return ((x >= limits[0]) & (x <= limits[1])) | ((x >= limits[2]) & (x <= limits[3]))


def _mask_within(x: Tensor, extremes: tuple[float, float], limits: list[float]) -> Tensor | bool:
    """Which x lie in one of two intervals; True if all do, False if none does. `extremes` of x are NaN if an x is."""
    low, high = extremes
    mask: Tensor | None = None
    for first, last in (limits[:2], limits[2:]):
        if last < low or first > high:
            continue
        after, before = first <= low, last >= high
        if after and before:
            return True
        own = x <= last if after else x >= first if before else (x >= first).logical_and_(x <= last)
        mask = own if mask is None else mask.logical_or_(own)
    return False if mask is None else mask


def _add_activation_on_cpu(
    x: Tensor, kind: str, limits: list[float], dtype: torch.dtype, totals: Tensor, streak: Tensor, scale: float
) -> None:
    """`add_activation` with its arithmetic in `dtype`, chunk by chunk."""
    n_saturated = n_lost = 0
    sum_of_slopes, least = 0.0, math.inf
    dead: Tensor | bool = True
    for chunk in _chunks(x):
        low, high = chunk.aminmax()
        extremes = low.item(), high.item()
        wide = chunk.to(dtype)
        saturated = _mask_within(wide, extremes, limits[:4])
        lost = _mask_within(wide, extremes, limits[4:])
        if isinstance(saturated, bool):
            n_saturated += saturated * chunk.numel()
        else:
            n_saturated += int(saturated.count_nonzero())
            saturated = saturated.all(0).all(1)
        dead = saturated if dead is True else dead & saturated
        n_lost += lost * chunk.numel() if isinstance(lost, bool) else int(lost.count_nonzero())
        slopes = KINDS[kind].slopes(wide if scale == 1 else scale * wide).abs_()
        sum_of_slopes += slopes.sum(dtype=torch.float64).item()
        smallest = slopes.amin().item()
        if math.isnan(smallest):
            smallest = torch.where(slopes.isnan(), math.inf, slopes).amin().item()
        least = min(least, smallest)
    totals[:LEAST] += totals.new_tensor([x.numel(), n_saturated, n_lost, sum_of_slopes])
    totals[LEAST].clamp_(max=least)
    streak.add_(1).mul_(dead)


def add_activation(
    x: Tensor, kind: str, limits: Tensor, totals: Tensor, alive: Tensor, streak: Tensor, scale: float = 1.0
) -> None:
    """Add a layer's input to its `totals`, and count the call in the `streak` of each unit that is saturated throughout.

    Args:
        x: (outer, units, inner).
        limits: the `bounds` of this kind, scale and dtype.
        totals: ACTIVATION_COLUMNS, one number each.
        alive: scratch memory for the kernel, one number a unit; zeros before and after.
        streak: for how many calls each unit has been saturated throughout; 0 again where one x of it is not.
    """
    if launchable(x, limits, totals):
        kernels.statistics.add_activation(x, kind, limits, totals, alive, streak, scale)
        return
    if x.device.type == "cpu":
        _add_activation_on_cpu(x, kind, limits.tolist(), limits.dtype, totals, streak, scale)
        return
    wide = x.to(limits.dtype)
    saturated = _within(wide, limits)
    slopes = KINDS[kind].slopes(wide if scale == 1 else scale * wide).abs_()
    totals[0] += x.numel()
    totals[1] += saturated.sum()
    totals[2] += _within(wide, limits[4:]).sum()
    totals[3] += slopes.sum(dtype=totals.dtype)
    least = torch.where(slopes.isnan(), math.inf, slopes).amin().to(totals.dtype)
    torch.minimum(totals[LEAST], least, out=totals[LEAST])
    streak.add_(1).mul_(saturated.all(2).all(0))


def add_squares(g: Tensor, totals: Tensor) -> None:
    """Add a gradient to `totals`, SQUARES_COLUMNS: Σg² over its finite elements, how many elements, how many not finite."""
    if launchable(g, totals):
        kernels.statistics.add_squares(g, totals)
        return
    if g.device.type == "cpu":
        _add_squares_on_cpu(g, totals)
        return
    finite = g.isfinite()
    totals[0] += torch.where(finite, g, 0.0).to(totals.dtype).square().sum()
    totals[1] += g.numel()
    totals[2] += g.numel() - finite.sum()


def _add_squares_on_cpu(g: Tensor, totals: Tensor) -> None:
    squares, n_not_finite = 0.0, 0
    # In the order of its memory; a sum has no order.
    g = g[None] if g.dim() == 0 else g.permute(sorted(range(g.dim()), key=g.stride, reverse=True))
    for chunk in _chunks(g):
        wide = chunk.double().flatten()
        own = wide.dot(wide).item()
        # A finite sum of squares has no other terms; of fp64 numbers, the squares may be infinite where they are not.
        if not math.isfinite(own):
            finite = wide.isfinite()
            own = torch.where(finite, wide, 0.0).square().sum().item()
            n_not_finite += wide.numel() - int(finite.count_nonzero())
        squares += own
    totals += totals.new_tensor([squares, g.numel(), n_not_finite])
