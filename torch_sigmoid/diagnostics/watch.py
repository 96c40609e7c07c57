"""GradientWatch: follows the steps of a training, takes what its layers' hooks see, and hands it out.

A watch only reads. It takes x as it enters a layer, and the gradients as they pass the layer's own nodes of autograd's graph.
It puts nothing into that graph and draws no random numbers, so a training run gives the same bits with it and without.
"""

import sys
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..internals import in_backward, next_node_number, tree_leaves
from . import gradients, layers, report, statistics, totals
from .layers import Layer

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self

    class _Writer(Protocol):
        def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


__all__ = ["GradientWatch"]


class GradientWatch:
    """Watches what the sigmoid-like layers of `model` do to gradients, while it trains.

        with GradientWatch(model, every=10) as watch:
            train(model)
        watch.report()

    For each watched layer and step, where x is the layer's input and f' its derivative:

    - mean_derivative, least_derivative: of |f'(x)|, computed from x in fp32 (fp64 for fp64);
    - saturated: the fraction of x with |f'(x)| < `threshold`;
    - lost_to_rounding: the fraction of x for which the layer's backward returns exactly 0 although f'(x) is a normal number of
      the dtype, because it works from an output that has rounded;
    - entering, leaving: the norms ‖∂L/∂output‖ and ‖∂L/∂x‖; attenuation: leaving / entering. Under a GradScaler both norms
      carry its scale, their ratio does not;
    - not_finite: how many elements of these two gradients are infinite or NaN. The norms leave them out;
    - dead_units: how many of `units` were saturated on every sample of the last `dead_after` watched calls; both are None
      until there were that many. A unit is a feature of the last dimension, or a channel (dimension 1) where the input has four
      dimensions or more; of a packed gate, along its dim. For a layer called with inputs of many sizes, the last few
      count, each once there were `dead_after` calls with it.

    Of a layer with a gate, such as GLU and SwiGLU, x is the gate, f its σ or silu, and the output is the product: `leaving` is
    then the norm of the gradient of the gate alone, or of the tensor in which it is packed. Beyond the `limit` of a clamped
    form f' is 0, so such an x counts as saturated. Blocks that `replace` has fused are watched too: by the activation that they
    had, or, where they had none, under the name of the operator, as "layers.0.mlp.swiglu". For modules whose derivative is
    not known, only the norms are taken.

    A step ends when a torch.optim optimizer that holds a parameter of the model has stepped, or with `step()`: several
    backwards before that add up, as do several calls of one module.

    A watch sees modules only. It does not see direct calls such as torch.sigmoid(x) and F.silu(x), what runs without grad mode,
    under torch.func transforms, forward-mode levels, tracers, CUDA-graph capture or inside torch.compile, nor what
    torch.utils.checkpoint computes a second time. Copies of the model are not watched; replicas of torch.nn.DataParallel are.
    torch.jit.script needs a model that is not being watched.

    Memory does not grow with the run: 11 fp64 numbers a layer and recorded row, at most `history` rows. When they are full,
    neighbouring rows are merged, and later rows hold as many steps, so that the whole run stays in view.

    Args:
        model: any module. It is not kept alive.
        every: watch each `every`-th step, from the first. In the others a hook returns at once.
        modules: what to watch in place of SIGMOID_LIKE: module types (with their subclasses), and names as in
            `model.named_modules()`, which may have wildcards ("encoder.*.gate").
        threshold: an x counts as saturated where |f'(x)| is below it.
        dead_after: in watched calls.
        history: in recorded steps.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, a name matches no module, or there is no layer to watch.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with torch_sigmoid.diagnostics.GradientWatch(model) as watch:
        ...     for _ in range(3):
        ...         model(torch.zeros(2, 4)).sum().backward()
        ...         optimizer.step()
        >>> watch.to_dict()["layers"]["1"]["saturated"]
        [0.0, 0.0, 0.0]
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
        self.threshold: float = float(threshold)
        self.dead_after = dead_after
        self._model = weakref.ref(model)
        self._layers = layers.find(model, modules)
        self._totals = totals.Totals(len(self._layers), history)
        self._reader = gradients.Reader(self._totals)
        # Indices of layers that were called with a gate and another tensor.
        self._with_operand: set[int] = set()
        self._handles: list[RemovableHandle] = []
        # Whether an optimizer holds a parameter of the model, and how many groups it had when it was asked.
        self._held: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._step = 0
        self._model_ran = False
        self._ended_in_backward = False

    # Attaching

    def attach(self) -> "Self":
        """Start to watch. Returns the watch.

        Raises:
            RuntimeError: it is attached already, or the model or a module of it was deleted.
        """
        if self._handles:
            raise RuntimeError("attach(): this watch is attached already; detach() it first")
        if self._model() is None:
            raise RuntimeError("attach(): the model of this watch was deleted")
        for layer in self._layers:
            module = layer.module()
            if module is None:
                raise RuntimeError(f"attach(): the module {layer.name!r} was deleted")
            before, after = gradients.ModuleHook(self._before, layer), gradients.ModuleHook(self._after, layer)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # Also after an exception, lest the inputs' graph be held until the next call.
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        watch = weakref.ref(self)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: _optimizer_stepped(watch(), optimizer))
        self._handles.append(handle)
        weakref.finalize(self, handle.remove).atexit = False
        self._reader.is_on = self._is_sampling
        return self

    def detach(self) -> None:
        """Stop to watch, and keep what was seen. Does nothing where the watch is not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reader.is_on = False

    def __enter__(self) -> "Self":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # Watching

    def step(self) -> None:
        """End a step by hand, where no torch.optim optimizer does. Does nothing if the model has not run since the last step.

        Called in the middle of a backward, where optimizers may step too, it ends the step when the model runs again.
        """
        if not self._model_ran or gradients.is_capturing():
            return
        if in_backward():
            self._ended_in_backward = True
            return
        self._model_ran = self._ended_in_backward = False
        if self._is_sampling:
            self._reader.finish()
            self._totals.record(self._step)
        self._step += 1
        self._reader.is_on = self._is_sampling and bool(self._handles)

    @property
    def _is_sampling(self) -> bool:
        return self._step % self.every == 0

    def _before(self, layer: Layer, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a watched module runs: read its input, which the module may overwrite."""
        if self._model_ran and not self._ended_in_backward and not self._is_sampling:
            return
        if not torch.is_grad_enabled() or gradients.is_hidden():
            return
        if self._ended_in_backward and not in_backward():
            self.step()
        self._model_ran = True
        pending = self._pending()
        pending.pop(layer.index, None)
        if not self._is_sampling:
            return
        with torch.no_grad():
            call = layers.call_of(module, args, kwargs)
        tensors = tree_leaves((args, kwargs)) if call is None else [call.gate.tensor]
        inputs = {gradients.edge_of(each) for each in tensors if gradients.is_readable(each) and each.requires_grad}
        pending[layer.index] = inputs, next_node_number()
        if call is not None:
            with torch.no_grad(), gradients.no_autocast(call.gate.tensor):
                self._add_input(layer, call)

    def _after(self, layer: Layer, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a watched module has run: hook the nodes that it made, which its gradients will pass."""
        pending = self._pending().pop(layer.index, None)
        if pending is None:
            return
        inputs, first_node = pending
        outputs = [leaf for leaf in tree_leaves(output) if gradients.is_readable(leaf) and leaf.grad_fn is not None]
        self._reader.read(layer.index, outputs, inputs, first_node)

    def _pending(self) -> dict[int, tuple[set[gradients.Edge], int]]:
        """Of the watched modules that this thread is in, by layer: the edges of the inputs, and the number of the next node."""
        if not hasattr(self._local, "pending"):
            self._local.pending = {}
        pending: dict[int, tuple[set[gradients.Edge], int]] = self._local.pending
        return pending

    def _add_input(self, layer: Layer, call: layers.Call) -> None:
        if call.has_operand:
            self._with_operand.add(layer.index)
        x, (kind, scale, lost_when) = call.x, call.known
        assert kind is not None, "call_of gives no call of an unknown module"
        limits = statistics.bounds(kind, lost_when, x.dtype, self.threshold, x.device, scale)
        self._totals.add_input(layer.index, x, kind, scale, limits)

    # What comes out

    def to_dict(self) -> dict[str, Any]:
        """Everything that was seen, as numbers and lists. This waits for the device.

        Returns:
            "every", "threshold", "dead_after": as given. "steps": the first and the last step of each recorded row; they differ
            once rows were merged. "layers": by name, "type", "dead_units", "units", and for each of the other statistics a list
            with one number a row, None where nothing was seen.
        """
        rows, seen = self._gather()
        found = {}
        for layer, (dead, units) in zip(self._layers, self._totals.dead_units(self.dead_after)):
            numbers = [totals.derived(row) for row in seen[:, layer.index]]
            series = {key: [row[key] for row in numbers] for key in totals.STATISTICS}
            found[layer.name] = {"type": layer.type_name, **series, "dead_units": dead, "units": units}
        return {
            "every": self.every,
            "threshold": self.threshold,
            "dead_after": self.dead_after,
            "steps": [[row.first, row.last] for row in rows],
            "layers": found,
        }

    def to_dataframe(self) -> "pandas.DataFrame":
        """A pandas.DataFrame of what `to_dict` holds, one row a layer and recorded row; needs pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        return report.dataframe(self.to_dict())

    def report(self, last: int | None = None, *, file: TextIO | None = None) -> None:
        """Print a table of the layers, what its numbers mean, which layers are in trouble, and what helps.

        Installed, rich draws the table.

        Args:
            last: how many of the last recorded rows to average; all by default.
            file: where to, by default sys.stdout.

        Raises:
            ValueError: `last` is not a positive int.
        """
        if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
            raise ValueError(f"report(): last must be a positive int or None, got {last!r}")
        file = sys.stdout if file is None else file
        rows, seen = self._gather()
        if self._model() is None:
            print("The model of this watch was deleted; this is what was seen until then.", file=file)
        if not rows:
            print(self._unseen_word(), file=file)
            return
        rows, seen = rows[-(last or 0) :], totals.merged_rows(seen[-(last or 0) :])
        found = []
        for layer, (dead, units) in zip(self._layers, self._totals.dead_units(self.dead_after)):
            about: dict[str, Any] = {"name": layer.name, "type": layer.type_name, "kind": layer.known.kind}
            about["has_operand"] = layer.index in self._with_operand
            found.append(about | totals.derived(seen[layer.index]) | {"dead_units": dead, "units": units})
        report.write(found, rows, file, every=self.every, threshold=self.threshold, dead_after=self.dead_after)

    def plot(self) -> "Figure":
        """A matplotlib Figure: layer × step for saturation, loss to rounding and attenuation; needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was seen.
        """
        seen = self.to_dict()
        if not seen["steps"]:
            raise RuntimeError(f"plot(): {self._unseen_word()}")
        return report.heat_maps(seen)

    def log_to(self, writer: "_Writer", step: int | None = None) -> None:
        """Write the last recorded row to a torch.utils.tensorboard.SummaryWriter, as "gradients/<layer>/<statistic>".

        Args:
            writer: anything with `add_scalar(tag, scalar_value, global_step)`.
            step: the global step; by default the watch's own.

        Raises:
            RuntimeError: nothing was seen.
        """
        rows, seen = self._gather()
        if not rows:
            raise RuntimeError(f"log_to(): {self._unseen_word()}")
        for layer in self._layers:
            for key, value in totals.derived(seen[-1, layer.index]).items():
                if value is not None:
                    writer.add_scalar(f"gradients/{layer.name}/{key}", value, rows[-1].last if step is None else step)

    def _gather(self) -> tuple[list[totals.Row], Tensor]:
        """The recorded rows and, last, the step at hand if it is watched and the model has run in it."""
        return self._totals.gather(self._step if self._model_ran and self._is_sampling else None)

    def _unseen_word(self) -> str:
        return (
            "nothing was seen yet: no watched layer has run in grad mode"
            + ("" if self._handles else " while the watch was attached")
            + "; within torch.compile, tracers and torch.func no hook can see, nor direct calls such as torch.sigmoid(x)"
        )


def _optimizer_stepped(watch: GradientWatch | None, optimizer: torch.optim.Optimizer) -> None:
    """End the step if the optimizer holds a parameter of the watched model."""
    model = None if watch is None else watch._model()
    if watch is None or model is None:
        return
    n_groups = len(optimizer.param_groups)
    known_groups, holds = watch._held.get(optimizer, (None, False))
    if known_groups != n_groups:
        own = {id(parameter) for parameter in model.parameters()}
        holds = any(id(each) in own for group in optimizer.param_groups for each in group["params"])
        watch._held[optimizer] = n_groups, holds
    if holds:
        watch.step()
