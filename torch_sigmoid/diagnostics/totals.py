"""Keeps the totals of every layer on each device, merges those of steps and devices, and derives the reported numbers.

A layer and step take 11 numbers (_INPUT, ENTERING, LEAVING), in fp64, on the device of the tensors they come from: sums and one
minimum, so the totals of two steps merge into those of both. Nothing waits for the device until somebody asks for them.
"""

import functools
import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import statistics

# The columns of a layer's totals: of its input, of the gradient that enters it in backward, of the one that leaves it.
_N_INPUT = len(statistics.ACTIVATION_COLUMNS)
_N_SQUARES = len(statistics.SQUARES_COLUMNS)
_INPUT = slice(0, _N_INPUT)
ENTERING = slice(_N_INPUT, _N_INPUT + _N_SQUARES)
LEAVING = slice(_N_INPUT + _N_SQUARES, _N_INPUT + 2 * _N_SQUARES)
_N_COLUMNS = LEAVING.stop
# In the step at hand these columns count a gradient's elements; in a recorded row, the steps in which there was a gradient.
_SEEN = [columns.start + statistics.SQUARES_COLUMNS.index("elements") for columns in (ENTERING, LEAVING)]
# A layer called with inputs of many sizes keeps the streaks of the last few.
_SIZES_KEPT = 4

# What `derived` makes of a layer's totals.
STATISTICS = (
    "mean_derivative",
    "least_derivative",
    "saturated",
    "lost_to_rounding",
    "entering",
    "leaving",
    "attenuation",
    "not_finite",
)


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The totals of the elements of both."""
    both = one + other
    both[..., statistics.LEAST] = torch.minimum(one[..., statistics.LEAST], other[..., statistics.LEAST])
    return both


class _Units:
    """The units of a layer's inputs of one size, on one device; `calls` is how many watched calls had that size."""

    def __init__(self, n_units: int, device: torch.device):
        self.alive, self.streak = torch.zeros(2, n_units, dtype=torch.float32, device=device).unbind()
        self.calls = 0


class _OnDevice:
    """The totals of the step at hand, and those of the recorded rows, on one device."""

    def __init__(self, device: torch.device, n_layers: int, capacity: int):
        # MPS has no fp64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.empty = torch.zeros(n_layers, _N_COLUMNS, dtype=dtype, device=device)
        self.empty[:, statistics.LEAST] = torch.inf
        self.current = self.empty.clone()
        self.recorded = self.empty.repeat(capacity, 1, 1)

    def step_at_hand(self) -> Tensor:
        """The totals of this step in the form of a recorded row."""
        totals = self.current.clone()
        totals[:, _SEEN] = (totals[:, _SEEN] > 0).to(totals.dtype)
        return totals

    def record(self, row: int) -> None:
        """Add the step at hand to a row, and begin the next step."""
        self.recorded[row] = merged(self.recorded[row], self.step_at_hand())
        self.current.copy_(self.empty)

    def merge_pairs(self) -> None:
        """Merge each two neighbouring rows, which frees half of them."""
        pairs = merged(self.recorded[0::2], self.recorded[1::2])
        self.recorded[: len(pairs)] = pairs
        self.recorded[len(pairs) :] = self.empty


class Row(NamedTuple):
    """The steps that a recorded row holds: the first, the last, and how many of them were watched."""

    first: int
    last: int
    watched: int


class Totals:
    """The totals of `n_layers` layers in at most `history` rows. Threads may add to them at the same time."""

    def __init__(self, n_layers: int, history: int):
        self.rows: list[Row] = []
        # By layer and device, then by the number of units.
        self.units: dict[tuple[int, torch.device], dict[int, _Units]] = {}
        self._n_layers = n_layers
        self._capacity = history + history % 2
        self._steps_a_row = 1
        self._devices: dict[torch.device, _OnDevice] = {}
        self._lock = threading.Lock()

    def add_input(self, layer: int, x: Tensor, kind: str, scale: float, limits: Tensor) -> None:
        """Add an input, (outer, units, inner), to the step at hand; see `statistics.add_activation`."""
        with self._lock:
            units = self._units_of(layer, x)
            units.calls += 1
            totals = self._current(x.device)[layer, _INPUT]
            statistics.add_activation(x, kind, limits, totals, units.alive, units.streak, scale)

    def add_gradient(self, layer: int, columns: slice, gradient: Tensor) -> None:
        """Add a gradient to the step at hand, in the columns ENTERING or LEAVING."""
        with self._lock:
            statistics.add_squares(gradient, self._current(gradient.device)[layer, columns])

    def record(self, step: int) -> None:
        """End the step at hand: it joins the last row, or begins one; full rows are merged in pairs."""
        with self._lock:
            if self.rows and self.rows[-1].watched < self._steps_a_row:
                first, _, watched = self.rows.pop()
                self.rows.append(Row(first, step, watched + 1))
            else:
                if len(self.rows) == self._capacity:
                    for kept in self._devices.values():
                        kept.merge_pairs()
                    pairs = zip(self.rows[0::2], self.rows[1::2])
                    self.rows = [Row(one.first, other.last, one.watched + other.watched) for one, other in pairs]
                    self._steps_a_row *= 2
                self.rows.append(Row(step, step, 1))
            for kept in self._devices.values():
                kept.record(len(self.rows) - 1)

    def gather(self, open_step: int | None) -> tuple[list[Row], Tensor]:
        """The recorded rows and their totals (rows × layers × columns) on the CPU.

        The step at hand comes last, as a row of its own, where its number is given as `open_step`.
        """
        rows, totals = list(self.rows), None
        with self._lock:
            for kept in self._devices.values():
                own = kept.recorded[: len(rows)]
                own = (torch.cat([own, kept.step_at_hand()[None]]) if open_step is not None else own).double().cpu()
                totals = own if totals is None else merged(totals, own)
        if totals is None:
            return [], torch.zeros(0, self._n_layers, _N_COLUMNS)
        return rows + ([Row(open_step, open_step, 1)] if open_step is not None else []), totals

    def dead_units(self, dead_after: int) -> list[tuple[int, int] | tuple[None, None]]:
        """For each layer, how many units were saturated on every sample of the last `dead_after` watched calls, of how many.

        Input sizes that came in fewer calls are left out; (None, None) where none is left. On several devices, a unit must be
        dead on each of them.
        """
        # By layer and number of units: the fewest calls of any device, and for how many calls at least each unit has been dead.
        found: dict[tuple[int, int], tuple[int, Tensor]] = {}
        with self._lock:
            for (layer, _), of_sizes in self.units.items():
                for n_units, units in of_sizes.items():
                    calls, streak = units.calls, units.streak.cpu()
                    if (layer, n_units) in found:
                        other_calls, other_streak = found[layer, n_units]
                        calls, streak = min(calls, other_calls), torch.minimum(streak, other_streak)
                    found[layer, n_units] = calls, streak
        judged: list[list[Tensor]] = [[] for _ in range(self._n_layers)]
        for (layer, _), (calls, streak) in found.items():
            if calls >= dead_after:
                judged[layer].append(streak)
        return [
            (sum(int((streak >= dead_after).sum()) for streak in own), sum(map(len, own))) if own else (None, None)
            for own in judged
        ]

    def _current(self, device: torch.device) -> Tensor:
        if device not in self._devices:
            self._devices[device] = _OnDevice(device, self._n_layers, self._capacity)
        return self._devices[device].current

    def _units_of(self, layer: int, x: Tensor) -> _Units:
        """The units of x's size. Of the sizes kept, this becomes the most recent; a new one replaces the oldest."""
        of_sizes = self.units.setdefault((layer, x.device), {})
        n_units = x.shape[1]
        units = of_sizes.pop(n_units, None) or _Units(n_units, x.device)
        if len(of_sizes) == _SIZES_KEPT:
            of_sizes.pop(next(iter(of_sizes)))
        of_sizes[n_units] = units
        return units


def derived(totals: Tensor) -> dict[str, float | None]:
    """The STATISTICS of one layer; None where nothing was seen.

    Over several steps, a norm is the root of the mean square over those in which there was a gradient.
    """
    numbers = totals.tolist()
    elements, saturated, lost, total, least = numbers[_INPUT]
    (entering, n_entering, not_finite), (leaving, n_leaving, not_finite_leaving) = numbers[ENTERING], numbers[LEAVING]
    not_finite = int(not_finite + not_finite_leaving) if n_entering or n_leaving else None
    entering = (entering / n_entering) ** 0.5 if n_entering else None
    leaving = (leaving / n_leaving) ** 0.5 if n_leaving else None
    least = None if least == math.inf else least
    attenuation = leaving / entering if entering and leaving is not None else None
    of_input = (total / elements, least, saturated / elements, lost / elements) if elements else (None,) * 4
    return dict(zip(STATISTICS, (*of_input, entering, leaving, attenuation, not_finite)))


def between(layers: list[dict[str, Any]]) -> list[float | None]:
    """For each layer, "entering" of the one before it that has a gradient, over its own "leaving"; None where one is missing.

    If one feeds the other, the modules between the two multiply the gradient by this ratio. None too of a layer that multiplies
    its gate with another tensor, by which the gradient goes on as well.
    """
    ratios: list[float | None] = []
    before: float | None = None
    for layer in layers:
        is_known = layer["leaving"] and before is not None and not layer["has_operand"]
        ratios.append(before / layer["leaving"] if is_known else None)
        before = before if layer["entering"] is None else layer["entering"]
    return ratios


def merged_rows(totals: Tensor) -> Tensor:
    """The rows of `gather` as one: layers × columns."""
    total: Tensor = functools.reduce(merged, totals)
    return total
