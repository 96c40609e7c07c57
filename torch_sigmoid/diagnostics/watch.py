"""Where gradients vanish: what each sigmoid-like layer of a network does to them, seen in a real training run.

    with torch_sigmoid.diagnostics.GradientWatch(model, every=10) as watch:
        train(model)
        watch.report()

A watch only reads. It takes x as it enters a layer, and the gradients as they pass the layer's own node of autograd's graph, so
it puts nothing into that graph, draws no random numbers, and a training run gives the same bits with it and without. What it
reads it adds up on the tensor's device, in fp64; nothing waits for the device until a report is asked for.
"""

import contextlib
import fnmatch
import functools
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from . import ops, statistics
from .nn import GLU, LogSigmoid, Sigmoid, SiLU
from .swap import intercepted_save

__all__ = ["SIGMOID_LIKE", "GradientWatch"]

# Watched by default; `modules=(*SIGMOID_LIKE, MyGate)` adds to them.
SIGMOID_LIKE = (
    torch.nn.Sigmoid,
    torch.nn.SiLU,
    torch.nn.LogSigmoid,
    torch.nn.GLU,
    torch.nn.Hardsigmoid,
    torch.nn.Tanh,
    torch.nn.ReLU,
)

# The kind of an activation, and when its backward finds 0 where f' is a normal number (see statistics.py), by its forward.
_KNOWN = {
    torch.nn.Sigmoid.forward: ("sigmoid", "sigmoid rounds to 1"),
    Sigmoid.forward: ("sigmoid", "sigmoid rounds to 1"),
    torch.nn.SiLU.forward: ("silu", "sigmoid rounds to 0 in fp32"),
    SiLU.forward: ("silu", "never"),
    torch.nn.LogSigmoid.forward: ("logsigmoid", "never"),
    LogSigmoid.forward: ("logsigmoid", "never"),
    torch.nn.GLU.forward: ("sigmoid", "sigmoid rounds to 1"),
    GLU.forward: ("sigmoid", "never"),
    torch.nn.Hardsigmoid.forward: ("hardsigmoid", "never"),
    torch.nn.Tanh.forward: ("tanh", "tanh rounds to ±1"),
    torch.nn.ReLU.forward: ("relu", "never"),
}

# What is kept of a layer in a step: of its input, then of the gradient that enters it, then of the one that leaves it.
_N_INPUT = len(statistics.ACTIVATION_COLUMNS)
_N_SQUARES = len(statistics.SQUARES_COLUMNS)
_INPUT = slice(0, _N_INPUT)
_ENTERING = slice(_N_INPUT, _N_INPUT + _N_SQUARES)
_LEAVING = slice(_N_INPUT + _N_SQUARES, _N_INPUT + 2 * _N_SQUARES)
_N_COLUMNS = _LEAVING.stop
# Of the step at hand the number of elements, of recorded rows the number of steps in which there was a gradient.
_SEEN = [columns.start + statistics.SQUARES_COLUMNS.index("elements") for columns in (_ENTERING, _LEAVING)]
# Of a layer called with inputs of many sizes, those whose units are still known.
_SIZES_KEPT = 4

# What they say, one number a recorded row.
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


class _Layer(NamedTuple):
    """A watched module. `kind` is None where nothing is known of its derivative."""

    index: int
    name: str
    module: weakref.ref
    kind: str | None
    lost_when: str


_PROXY = torch._C._TorchDispatchModeKey.PROXY
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def _nothing(*args, **kwargs) -> None:
    """What a hook becomes in a copy of the model, which nobody watches."""


class _Hook:
    """A hook that a deep copy or a pickle of its module does not take along."""

    def __init__(self, function, layer):
        self.function = function
        self.layer = layer

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return
        self.function(self.layer, *args)

    def __reduce__(self):
        return _forget, ()


def _forget():
    return _nothing


class _Device:
    """What is kept on one device: the totals of the step at hand, and those of the recorded steps."""

    def __init__(self, device: torch.device, n_layers: int, capacity: int):
        # MPS has no fp64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.empty = torch.zeros(n_layers, _N_COLUMNS, dtype=dtype, device=device)
        self.empty[:, statistics.LEAST] = torch.inf
        self.current = self.empty.clone()
        self.recorded = self.empty.repeat(capacity, 1, 1)

    def step_at_hand(self) -> Tensor:
        """As it is recorded."""
        totals = self.current.clone()
        totals[:, _SEEN] = (totals[:, _SEEN] > 0).to(totals.dtype)
        return totals

    def record(self, row: int) -> None:
        """Add the step at hand to a row."""
        self.recorded[row] = _together(self.recorded[row], self.step_at_hand())
        self.current.copy_(self.empty)

    def merge_pairs(self) -> None:
        """Halve the number of recorded rows: two become one, which is what their elements together give."""
        merged = _together(self.recorded[0::2], self.recorded[1::2])
        self.recorded[: len(merged)] = merged
        self.recorded[len(merged) :] = self.empty


def _together(one: Tensor, other: Tensor) -> Tensor:
    """The totals of the elements of both."""
    merged = one + other
    merged[..., statistics.LEAST] = torch.minimum(one[..., statistics.LEAST], other[..., statistics.LEAST])
    return merged


class GradientWatch:
    """Watches what the sigmoid-like layers of `model` do to gradients, while it trains.

    For each watched layer and step:

    - mean_derivative, least_derivative: of |f'(x)| over the layer's input x, from x itself in fp32 (fp64 for fp64);
    - saturated: the fraction of x with |f'(x)| below `threshold`;
    - lost_to_rounding: the fraction of x for which the layer's backward finds exactly 0 although f'(x) is a normal number of
      the dtype, because it works from an output that has rounded;
    - entering, leaving: the norms of the gradients with respect to the layer's output and input; attenuation: their ratio.
      Under a GradScaler both carry its scale, their ratio does not;
    - not_finite: how many elements of these gradients are infinite or NaN, which the norms leave out;
    - dead_units: how many units were saturated on every sample of the last `dead_after` watched calls. A unit is a feature of
      the last dimension, or a channel (dimension 1) where the input has four dimensions or more; of a GLU, of its gate
      along its dim. Of a layer called with inputs of many sizes, the last few count.

    For torch.nn.GLU, x is the gate. Of modules whose derivative is not known, only the norms are taken.

    A step ends when a torch.optim optimizer that holds a parameter of the model has stepped, or with `step()`: several
    backwards before that add up, as do several calls of one module. What a module computes without grad mode, under
    torch.func transforms, forward-mode levels, tracers, CUDA-graph capture or within torch.compile is not seen, nor what
    torch.utils.checkpoint computes a second time. Copies of the model are not watched, replicas of torch.nn.DataParallel are.
    torch.jit.script needs a model that is not being watched.

    Memory does not grow with the run: 11 fp64 numbers a layer and recorded row, at most `history` rows. When they are full,
    neighbouring rows are merged, and later rows hold as many steps, so that the whole run stays in view.

    Args:
        model: any module. It is not kept alive.
        every: watch each `every`-th step, from the first. In the others a hook returns at once.
        modules: what to watch in place of SIGMOID_LIKE: module types (with their subclasses), and names as in
            `model.named_modules()`, which may have wildcards ("encoder.*.gate").
        threshold: of |f'| below which an x counts as saturated.
        dead_after: in watched calls.
        history: in recorded steps.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, a name matches no module, or there is no layer to watch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: int = 1,
        modules: Iterable[type | str] | type | str | None = None,
        *,
        threshold: float = 0.01,
        dead_after: int = 10,
        history: int = 1024,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"GradientWatch(): model must be a torch.nn.Module, got {type(model).__name__}")
        for name, value, least in (("every", every, 1), ("dead_after", dead_after, 1), ("history", history, 2)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"GradientWatch(): {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"GradientWatch(): {name} must be at least {least}, got {value}")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool):
            raise TypeError(f"GradientWatch(): threshold must be a float, got {threshold!r}")
        if not 0 < threshold < float("inf"):
            raise ValueError(f"GradientWatch(): threshold must be positive and finite, got {threshold!r}")
        self.every = every
        self.threshold = float(threshold)
        self.dead_after = dead_after
        self._capacity = history + history % 2
        self._model = weakref.ref(model)
        self._layers = [
            _Layer(index, name, weakref.ref(module), *_known(module))
            for index, (name, module) in enumerate(_find(model, modules))
        ]
        self._handles: list = []
        self._held: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._devices: dict[torch.device, _Device] = {}
        self._units: dict[tuple, dict[int, tuple[Tensor, Tensor]]] = {}
        self._unfinished: dict[_Edge, None] = {}
        # Of each recorded row: its first step, its last, and how many were watched.
        self._steps: list[tuple[int, int, int]] = []
        self._steps_a_row = 1
        self._step = 0
        self._model_ran = False
        self._ended_in_backward = False

    # Attaching

    def attach(self) -> "GradientWatch":
        """Start to watch. Returns the watch. RuntimeError if it is attached, or the model was deleted."""
        if self._handles:
            raise RuntimeError("attach(): this watch is attached already; detach() it first")
        model = self._model()
        if model is None:
            raise RuntimeError("attach(): the model of this watch was deleted")
        for layer in self._layers:
            module = layer.module()
            if module is None:
                raise RuntimeError(f"attach(): the module {layer.name!r} was deleted")
            before, after = _Hook(self._before, layer), _Hook(self._after, layer)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # Also after an exception, lest the inputs' graph be held until the next call.
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        watch = weakref.ref(self)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: _optimizer_stepped(watch(), optimizer))
        self._handles.append(handle)
        weakref.finalize(self, handle.remove).atexit = False
        return self

    def detach(self) -> None:
        """Stop to watch; what was seen stays. Does nothing where the watch is not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "GradientWatch":
        return self.attach()

    def __exit__(self, *exception) -> None:
        self.detach()

    # Watching

    def step(self) -> None:
        """End a step by hand, where no torch.optim optimizer does; nothing happens if the model has not run since the last.

        In the middle of a backward, where optimizers may step too, it ends when the model runs again.
        """
        if not self._model_ran or _is_capturing():
            return
        if torch._C._current_graph_task_id() != -1:
            self._ended_in_backward = True
            return
        self._model_ran = self._ended_in_backward = False
        if self._sampling:
            self._record()
        self._step += 1

    @property
    def _sampling(self) -> bool:
        return self._step % self.every == 0

    def _record(self) -> None:
        for edge in tuple(self._unfinished):
            edge.finish()
        if self._steps and self._steps[-1][2] < self._steps_a_row:
            first, _, watched = self._steps.pop()
            self._steps.append((first, self._step, watched + 1))
        else:
            if len(self._steps) == self._capacity:
                for kept in self._devices.values():
                    kept.merge_pairs()
                pairs = zip(self._steps[0::2], self._steps[1::2])
                self._steps = [(first, last, one + other) for (first, _, one), (_, last, other) in pairs]
                self._steps_a_row *= 2
            self._steps.append((self._step, self._step, 1))
        for kept in self._devices.values():
            kept.record(len(self._steps) - 1)

    def _before(self, layer: _Layer, module, args, kwargs) -> None:
        """A watched module is about to run: its x is taken now, since it may be overwritten."""
        if not torch.is_grad_enabled() or _is_hidden():
            return
        if self._ended_in_backward and torch._C._current_graph_task_id() == -1:
            self.step()
        self._model_ran = True
        pending = self._pending()
        pending.pop(layer.index, None)
        if not self._sampling:
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if _is_readable(leaf)]
        edges = {_edge(tensor) for tensor in tensors if tensor.requires_grad}
        pending[layer.index] = edges, _next_node_number()
        if tensors and layer.kind is not None:
            with torch.no_grad(), _no_autocast(tensors[0]):
                self._add_input(layer, module, tensors[0])

    def _after(self, layer: _Layer, module, args, kwargs, output) -> None:
        """It has run: have the nodes that it made in autograd's graph say which gradients pass them."""
        edges, first_node = self._pending().pop(layer.index, (None, None))
        if edges is None:
            return
        entries: dict[Any, dict[int, _Edge]] = {}
        for tensor in tree_leaves(output):
            if _is_readable(tensor) and tensor.grad_fn is not None:
                node, position = _edge(tensor)
                if (node, position) not in edges:
                    entries.setdefault(node, {})[position] = _Edge(self, layer, _ENTERING)
        for node, watched in entries.items():
            node.register_prehook(_Passing(watched))
        exits = _exits(entries, edges, first_node)
        leaving = {edge: _Edge(self, layer, _LEAVING) for _, _, edge in exits}
        at_node: dict[Any, dict[int, _Edge]] = {}
        for node, position, edge in exits:
            leaving[edge].parts += 1
            at_node.setdefault(node, {})[position] = leaving[edge]
        for node, watched in at_node.items():
            node.register_hook(_Passing(watched))

    def _pending(self) -> dict:
        """Of the modules that this thread is in: the edges to their inputs, and the number of the next node."""
        if not hasattr(self._local, "pending"):
            self._local.pending = {}
        return self._local.pending

    def _add_input(self, layer: _Layer, module, x: Tensor) -> None:
        dim = None
        if isinstance(module, torch.nn.GLU):
            dim = module.dim
            if x.dim() == 0 or x.size(dim) % 2:
                # Which the module is about to say.
                return
            x = x.chunk(2, dim)[1]
        if x.numel() == 0:
            return
        x = _units_in_the_middle(x, dim)
        limits = statistics.bounds(layer.kind, _lost_when(layer, module, x), x.dtype, self.threshold, x.device)
        with self._lock:
            totals = self._totals(x.device)[layer.index, _INPUT]
            alive, streak = self._units_of(layer, x)
            statistics.add_activation(x, layer.kind, limits, totals, alive, streak)

    def _add_gradient(self, layer: _Layer, columns: slice, gradient: Tensor) -> None:
        if not self._handles or not self._sampling or _is_hidden(recomputed=False):
            return
        if not _is_readable(gradient) or gradient.numel() == 0:
            return
        with torch.no_grad(), _no_autocast(gradient), self._lock:
            statistics.add_squares(gradient, self._totals(gradient.device)[layer.index, columns])

    def _totals(self, device: torch.device) -> Tensor:
        if device not in self._devices:
            self._devices[device] = _Device(device, len(self._layers), self._capacity)
        return self._devices[device].current

    def _units_of(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a unit was alive in this call, and for how many calls it has not been."""
        of_sizes = self._units.setdefault((layer.index, x.device), {})
        units = of_sizes.pop(x.shape[1], None)
        if units is None:
            units = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device).unbind()
            if len(of_sizes) == _SIZES_KEPT:
                of_sizes.pop(next(iter(of_sizes)))
        of_sizes[x.shape[1]] = units
        return units

    # What comes out

    def to_dict(self) -> dict:
        """Everything that was seen, as numbers and lists: of each layer one number a recorded row, None where nothing was seen.

        "steps" holds the first and the last step of each row; they differ once rows were merged. This waits for the device.
        """
        steps, totals = self._gather()
        streaks = self._streaks()
        layers = {}
        for layer in self._layers:
            rows = [_derived(row) for row in totals[:, layer.index].tolist()]
            dead, units = _dead(streaks.get(layer.index, []), self.dead_after)
            layers[layer.name] = {
                "type": _type_name(layer),
                **{key: [row[key] for row in rows] for key in STATISTICS},
                "dead_units": dead,
                "units": units,
            }
        return {
            "every": self.every,
            "threshold": self.threshold,
            "dead_after": self.dead_after,
            "steps": [[first, last] for first, last, _ in steps],
            "layers": layers,
        }

    def to_dataframe(self):
        """A pandas.DataFrame of what `to_dict` holds, one row a layer and step; needs pandas."""
        pandas = _import("pandas", "to_dataframe()")
        seen = self.to_dict()
        rows = []
        for name, layer in seen["layers"].items():
            series = {key: values for key, values in layer.items() if isinstance(values, list)}
            for index, (first, last) in enumerate(seen["steps"]):
                row = {"layer": name, "type": layer["type"], "step": first, "last_step": last}
                rows.append(row | {key: values[index] for key, values in series.items()})
        return pandas.DataFrame(rows)

    def report(self, last: int | None = None, *, file=None) -> None:
        """Print a table of the layers, those in trouble by name, and what the numbers mean; rich's table where it is installed.

        Args:
            last: how many of the last recorded rows to average; all by default.
            file: where to, by default sys.stdout.
        """
        if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
            raise ValueError(f"report(): last must be a positive int or None, got {last!r}")
        from . import _report

        file = sys.stdout if file is None else file
        steps, totals = self._gather()
        if self._model() is None:
            print("The model of this watch was deleted; this is what was seen until then.", file=file)
        if not steps:
            print(_unseen_word(self), file=file)
            return
        steps, totals = steps[-(last or 0) :], totals[-(last or 0) :]
        merged = functools.reduce(_together, totals)
        streaks = self._streaks()
        layers = []
        for layer in self._layers:
            dead, units = _dead(streaks.get(layer.index, []), self.dead_after)
            numbers = _derived(merged[layer.index].tolist()) | {"dead_units": dead, "units": units}
            layers.append({"name": layer.name, "type": _type_name(layer), "kind": layer.kind, **numbers})
        _report.write(layers, steps, self, file)

    def plot(self):
        """A matplotlib Figure: layer × step for saturation, loss to rounding and attenuation; needs matplotlib."""
        seen = self.to_dict()
        if not seen["steps"]:
            raise RuntimeError(f"plot(): {_unseen_word(self)}")
        _import("matplotlib", "plot()")
        from . import _report

        return _report.heat_maps(seen)

    def log_to(self, writer, step: int | None = None) -> None:
        """Write the last recorded row to a torch.utils.tensorboard.SummaryWriter, as "gradients/<layer>/<statistic>".

        Args:
            writer: anything with `add_scalar(tag, scalar_value, global_step)`.
            step: the global step; by default the watch's own.
        """
        steps, totals = self._gather()
        if not steps:
            raise RuntimeError(f"log_to(): {_unseen_word(self)}")
        for layer in self._layers:
            for key, value in _derived(totals[-1, layer.index].tolist()).items():
                if value is not None:
                    writer.add_scalar(f"gradients/{layer.name}/{key}", value, steps[-1][1] if step is None else step)

    def _gather(self) -> tuple[list[tuple[int, int, int]], Tensor]:
        """The recorded rows and, last, the step at hand if it has been watched: steps × layers × columns, on the CPU."""
        steps = list(self._steps)
        open_step = self._model_ran and self._sampling
        totals = None
        with self._lock:
            for kept in self._devices.values():
                rows = kept.recorded[: len(steps)]
                rows = (torch.cat([rows, kept.step_at_hand()[None]]) if open_step else rows).double().cpu()
                totals = rows if totals is None else _together(totals, rows)
        if totals is None:
            return [], torch.zeros(0, len(self._layers), _N_COLUMNS)
        return steps + [(self._step, self._step, 1)] * open_step, totals

    def _streaks(self) -> dict[int, list[Tensor]]:
        """Of each layer, for each number of units it was called with, how many calls each unit has been dead for, at least."""
        found: dict[tuple[int, int], Tensor] = {}
        with self._lock:
            for (index, _), of_sizes in self._units.items():
                for n_units, (_, streak) in of_sizes.items():
                    streak = streak.cpu()
                    key = index, n_units
                    found[key] = torch.minimum(found[key], streak) if key in found else streak
        by_layer: dict[int, list[Tensor]] = {}
        for (index, _), streak in found.items():
            by_layer.setdefault(index, []).append(streak)
        return by_layer


class _Edge:
    """An output of a layer, or an input: its gradient is the sum of the `parts` that come from where the layer uses it."""

    def __init__(self, watch, layer, columns):
        self.watch = watch
        self.layer = layer
        self.columns = columns
        self.parts = 0
        self.arrived = 0
        self.total = None

    def add(self, gradient: Tensor | None) -> None:
        if not self.watch._sampling:
            return
        if self.parts <= 1:
            self.total = gradient
            self.finish()
            return
        if gradient is not None:
            with torch.no_grad():
                self.total = gradient if self.total is None else self.total + gradient
        self.arrived += 1
        self.watch._unfinished[self] = None
        if self.arrived == self.parts:
            self.finish()

    def finish(self) -> None:
        """Count what has arrived: everything, or at the end of a step what there was."""
        self.watch._unfinished.pop(self, None)
        if self.total is not None:
            self.watch._add_gradient(self.layer, self.columns, self.total)
        self.total, self.arrived = None, 0


class _Passing:
    """A hook of a node, whose gradients at these positions are those of edges."""

    def __init__(self, edges: dict[int, _Edge]):
        self.edges = edges

    def __call__(self, gradients, *_) -> None:
        for position, edge in self.edges.items():
            edge.add(gradients[position])


def _optimizer_stepped(watch: GradientWatch | None, optimizer) -> None:
    """A step has ended if the optimizer holds a parameter of the watched model."""
    model = watch and watch._model()
    if model is None:
        return
    n_groups = len(optimizer.param_groups)
    known_groups, holds = watch._held.get(optimizer, (None, False))
    if known_groups != n_groups:
        own = {id(parameter) for parameter in model.parameters()}
        holds = any(id(each) in own for group in optimizer.param_groups for each in group["params"])
        watch._held[optimizer] = n_groups, holds
    if holds:
        watch.step()


def _known(module) -> tuple[str | None, str]:
    """The kind of a module, and when it loses a gradient; a subclass with a forward of its own may be anything."""
    return _KNOWN.get(type(module).forward, (None, "never"))


def _lost_when(layer: _Layer, module, x: Tensor) -> str:
    """When this call of the module will find 0 in its backward."""
    forward = type(module).forward
    save = intercepted_save()
    if getattr(module, "save", save if forward is torch.nn.Sigmoid.forward else None) == "input":
        return "never"
    if save is not None and forward in (torch.nn.SiLU.forward, torch.nn.GLU.forward):
        # Ours, which save the input, are in their place.
        return "never"
    if forward is torch.nn.GLU.forward and x.device.type == "cuda":
        # There torch's backward computes σ from the gate, in fp32; elsewhere it takes it in the tensor's dtype.
        return "sigmoid rounds to 1 in fp32"
    return layer.lost_when


def _find(model, modules) -> list[tuple[str, torch.nn.Module]]:
    """The modules to watch, by name; a module with several names comes once."""
    if isinstance(modules, str | type):
        modules = (modules,)
    if isinstance(modules, torch.nn.Module) or not isinstance(modules, Iterable | None):
        raise TypeError(f"GradientWatch(): modules must hold module types and names, got {type(modules).__name__}")
    chosen = SIGMOID_LIKE if modules is None else tuple(modules)
    if not chosen:
        raise ValueError("GradientWatch(): modules is empty; expected module types or names, or None for SIGMOID_LIKE")
    for each in chosen:
        if not isinstance(each, str | type):
            raise TypeError(f"GradientWatch(): modules must hold module types and names, got {each!r}")
    types = tuple(each for each in chosen if isinstance(each, type))
    names = [each for each in chosen if isinstance(each, str)]
    everything = list(model.named_modules())
    for name in names:
        if not any(fnmatch.fnmatchcase(existing, name) for existing, _ in everything):
            raise ValueError(f"GradientWatch(): no module is named {name!r}; there are {_some(n for n, _ in everything if n)}")
    found = [
        (name, module)
        for name, module in everything
        if isinstance(module, types) or any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
    ]
    if not found:
        kinds = ", ".join(each.__name__ for each in types)
        raise ValueError(f"GradientWatch(): {type(model).__name__} has no layer to watch; expected one of {kinds}")
    compiled = [name for name, module in everything if _is_compiled(module)]
    inside = [
        name for name, _ in found if any(name == outer or not outer or name.startswith(outer + ".") for outer in compiled)
    ]
    if len(inside) == len(found):
        raise ValueError(
            "GradientWatch(): all of the layers to watch are inside modules compiled by torch.compile, where no hook can see; "
            "expected the model before it is compiled, run as it is"
        )
    if inside:
        warnings.warn(
            f"GradientWatch cannot see into modules compiled by torch.compile; not watched: {_some(inside)}", stacklevel=3
        )
    names = {name for name, _ in found}
    root = type(model).__name__ if type(model).__name__ not in names else "(root)"
    return [(name or root, module) for name, module in found if name not in inside]


def _is_compiled(module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _some(names) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_hidden(recomputed: bool = True) -> bool:
    """Whether this call is not to be counted: somebody traces or transforms it, or (if that is asked) it is a recomputation.

    What a checkpoint with use_reentrant=False recomputes, in a backward and under saved-tensor hooks, was counted before.
    With use_reentrant=True the first call was without grad mode, and the second one counts.
    """
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch._C._get_dispatch_mode(_PROXY) is not None or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
        return True
    if (
        recomputed
        and torch._C._current_graph_task_id() != -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return True
    return _is_capturing()


def _is_readable(value) -> bool:
    """Whether this is a plain dense float tensor with values."""
    return (
        type(value) in ops.PLAIN_TYPES
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.dtype in ops.FLOAT_DTYPES
        and not value.is_nested
        and not torch._C._functorch.is_legacy_batchedtensor(value)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _edge(tensor: Tensor):
    """Where its gradient goes: a node, and which of the node's gradients."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _next_node_number() -> int:
    """Nodes that this thread makes from now on have no smaller number."""
    return torch._C._autograd._get_sequence_nr()


def _exits(entries, edges, first_node) -> list:
    """The nodes made since `first_node` that lead to one of `edges`, at which positions, and to which."""
    found = []
    seen, ahead = set(entries), list(entries)
    while ahead:
        node = ahead.pop()
        for position, edge in enumerate(node.next_functions):
            if edge in edges:
                found.append((node, position, edge))
            elif edge[0] is not None and edge[0] not in seen and edge[0]._sequence_nr() >= first_node:
                seen.add(edge[0])
                ahead.append(edge[0])
    return found


def _units_in_the_middle(x: Tensor, dim: int | None = None) -> Tensor:
    """x as (outer, units, inner), its units along `dim` if that is given."""
    if dim is not None:
        dim %= x.ndim
        return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
    if x.ndim >= 4:
        # Also where channels are last in memory: then they become columns without a copy.
        return x.flatten(2) if x.is_contiguous() else x.movedim(1, -1).reshape(-1, x.shape[1])[..., None]
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)[..., None]


def _no_autocast(tensor: Tensor):
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _derived(totals: list[float]) -> dict[str, float | None]:
    """The STATISTICS that a layer's totals give; None where nothing was seen.

    Of several steps, a norm is the root of their mean square, over those in which there was a gradient.
    """
    elements, saturated, lost, total, least = totals[_INPUT]
    (entering, n_entering, not_finite), (leaving, n_leaving, not_finite_leaving) = totals[_ENTERING], totals[_LEAVING]
    not_finite = int(not_finite + not_finite_leaving) if n_entering or n_leaving else None
    entering = (entering / n_entering) ** 0.5 if n_entering else None
    leaving = (leaving / n_leaving) ** 0.5 if n_leaving else None
    least = None if least == math.inf else least
    attenuation = leaving / entering if entering and leaving is not None else None
    of_input = (total / elements, least, saturated / elements, lost / elements) if elements else (None,) * 4
    return dict(zip(STATISTICS, (*of_input, entering, leaving, attenuation, not_finite)))


def _dead(streaks: list[Tensor], dead_after: int) -> tuple[int | None, int | None]:
    """How many units are dead, of how many."""
    if not streaks:
        return None, None
    return sum(int((streak >= dead_after).sum()) for streak in streaks), sum(len(streak) for streak in streaks)


def _type_name(layer: _Layer) -> str:
    module = layer.module()
    return layer.kind or "?" if module is None else type(module).__name__


def _unseen_word(watch: GradientWatch) -> str:
    return (
        "nothing was seen yet: no watched layer has run in grad mode"
        + ("" if watch._handles else " while the watch was attached")
        + "; within torch.compile, tracers and torch.func no hook can see"
    )


def _import(name: str, caller: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{caller} needs {name}, which is not installed: pip install {name}") from None
