"""Reads a layer's gradients as they pass its nodes in autograd's graph, and decides which calls must not be counted.

An output's gradient enters the layer at the node that made the output; an input's leaves it at the nodes, made during the call,
that use the input. Hooks on these nodes only read: nothing is put into the graph, so a run gives the same bits as without them.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..dispatch import FLOAT_DTYPES, PLAIN_TYPES, TRANSFORM, listener
from ..internals import (
    in_backward,
    is_functorch_wrapper,
    is_legacy_batched,
    make_fx_traces,
    node_number,
    saved_tensor_hooks,
)
from .totals import ENTERING, LEAVING, Totals

# A node of autograd's graph, and the position of a gradient there.
Edge = tuple[Any, int]

# Which calls and tensors count


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_hidden(recomputed: bool = True) -> bool:
    """Whether this call must not be counted: it is traced, transformed, captured or, if `recomputed`, run a second time.

    With use_reentrant=False, torch.utils.checkpoint runs a module again in backward, under saved-tensor hooks: its first run
    was counted. With use_reentrant=True the first run had no grad mode, so it was not counted, and the second one is.
    """
    if listener() >= TRANSFORM or make_fx_traces():
        return True
    if recomputed and in_backward() and saved_tensor_hooks():
        return True
    return is_capturing()


def is_readable(value: Any) -> bool:
    """Whether this is a plain dense float tensor with values."""
    return (
        type(value) in PLAIN_TYPES
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.dtype in FLOAT_DTYPES
        and not value.is_nested
        and not is_legacy_batched(value)
        and not is_functorch_wrapper(value)
    )


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which operators on a tensor compute in its own dtype, though autocast may be on."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


# Hooks on modules


def _nothing(*args: object, **kwargs: object) -> None:
    """Takes a hook's place in a copy of the model, which nobody watches."""


def _forget() -> Callable[..., None]:
    return _nothing


class ModuleHook:
    """Calls function(layer, module, …) when the module runs. A deep copy or a pickle of the module loses it."""

    def __init__(self, function: Callable[..., None], layer: object) -> None:
        self.function = function
        self.layer = layer

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.function(self.layer, *args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _forget, ()


# Edges and nodes


class _Edge:
    """One input or output of a layer. Its gradient is the sum of `parts` that arrive from where the layer uses it."""

    def __init__(self, reader: "Reader", layer: int, columns: slice) -> None:
        self.reader = reader
        self.layer = layer
        self.columns = columns
        self.parts = 0
        self.arrived = 0
        self.total: Tensor | None = None

    def add(self, gradient: Tensor | None) -> None:
        if not self.reader.is_on:
            return
        if self.parts <= 1:
            self.total = gradient
            self.finish()
            return
        if gradient is not None:
            with torch.no_grad():
                self.total = gradient if self.total is None else self.total + gradient
        self.arrived += 1
        self.reader.unfinished[self] = None
        if self.arrived == self.parts:
            self.finish()

    def finish(self) -> None:
        """Add the sum of all parts or, at the end of a step, of those that have arrived."""
        self.reader.unfinished.pop(self, None)
        if self.total is not None:
            self.reader.add(self.layer, self.columns, self.total)
        self.total, self.arrived = None, 0


class _NodeHook:
    """Hands a node's gradients, by their position, to the edges they belong to."""

    def __init__(self, edges: dict[int, _Edge]) -> None:
        self.edges = edges

    def __call__(self, gradients: Sequence[Tensor | None], *_: object) -> None:
        for position, edge in self.edges.items():
            edge.add(gradients[position])


class Reader:
    """Adds the gradients of calls to `totals`, while `is_on`; the watch switches it."""

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self.is_on = False
        # Edges of which some parts have arrived and others have not.
        self.unfinished: dict[_Edge, None] = {}

    def add(self, layer: int, columns: slice, gradient: Tensor) -> None:
        if not self.is_on or is_hidden(recomputed=False):
            return
        if not is_readable(gradient) or gradient.numel() == 0:
            return
        with torch.no_grad(), no_autocast(gradient):
            self.totals.add_gradient(layer, columns, gradient)

    def finish(self) -> None:
        """Add what has arrived, though parts are missing: a step has ended."""
        for edge in tuple(self.unfinished):
            edge.finish()

    def read(self, layer: int, outputs: list[Tensor], inputs: set[Edge], first_node: int) -> None:
        """Hook the nodes that a call of a layer made.

        Args:
            layer: its index in `totals`.
            outputs: those with a grad_fn. An input handed through is left out: its gradient does not enter the layer.
            inputs: the edges of the inputs (`edge_of`).
            first_node: `internals.next_node_number()` before the call.
        """
        at_node: dict[Any, dict[int, _Edge]] = {}
        for tensor in outputs:
            node, position = edge_of(tensor)
            if (node, position) not in inputs:
                at_node.setdefault(node, {})[position] = _Edge(self, layer, ENTERING)
        for node, edges in at_node.items():
            node.register_prehook(_NodeHook(edges))
        exits = _exits(at_node, inputs, first_node)
        of_input = {edge: _Edge(self, layer, LEAVING) for _, _, edge in exits}
        at_node = {}
        for node, position, edge in exits:
            of_input[edge].parts += 1
            at_node.setdefault(node, {})[position] = of_input[edge]
        for node, edges in at_node.items():
            node.register_hook(_NodeHook(edges))


def edge_of(tensor: Tensor) -> Edge:
    """The node that receives a tensor's gradient, and at which position."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _exits(entries: Iterable[Any], inputs: set[Edge], first_node: int) -> list[tuple[Any, int, Edge]]:
    """The nodes of a call that lead to its inputs, as (node, position, edge of the input).

    They are reached from `entries`, the nodes of its outputs, by nodes that were made since `first_node`.
    """
    found = []
    seen, ahead = set(entries), list(entries)
    while ahead:
        node = ahead.pop()
        for position, edge in enumerate(node.next_functions):
            if edge in inputs:
                found.append((node, position, edge))
            elif edge[0] is not None and edge[0] not in seen and node_number(edge[0]) >= first_node:
                seen.add(edge[0])
                ahead.append(edge[0])
    return found
