"""What became ours in a model, what did not and why, and the memory that it saves."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import criteria
from .blocks import bare, changed_activation, has_own_methods, kind_of, kind_of_type, lost_gate, plan, record_of
from .forms.transformers import LIBRARY, VERSIONS
from .replacement import is_ours, restored


@dataclass(frozen=True)
class Replaced:
    """Modules that became ours: their names, their class, the operator that they are now, and the form that told."""

    names: list[str]
    type: str
    became: str
    form: str
    library: str
    versions: str


@dataclass(frozen=True)
class Left:
    """Modules that look as if they were ours, and why they are not."""

    names: list[str]
    type: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `replace` made of a model; printed, a table. `torch_sigmoid.report` makes it.

    `replaced` and `left` have a row for modules that are alike: their `names`, their `type`, and what they `became` or the
    `reason` why they were left. `saved_bytes` is what autograd keeps for backward of the step that was given, parameters
    included: without ours, and with.

    Example:
        >>> found = torch_sigmoid.report(torch_sigmoid.replace(torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Sigmoid())))
        >>> [(row.names, row.became) for row in found.replaced]
        [(['0'], 'silu'), (['1'], 'sigmoid')]
    """

    model: str
    replaced: list[Replaced]
    left: list[Left]
    saved_bytes: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (_abbreviated(each.names), each.type, each.became, _source(each)) for each in self.replaced
        ]
        count = sum(len(each.names) for each in self.replaced)
        lines = [f"{self.model}: {count} module{'s' * (count != 1)} of torch_sigmoid"]
        lines += _table(("modules", "class", "now", "known as"), rows)
        if self.left:
            lines += ["", "left as they are"]
            lines += _table(
                ("modules", "class", "why"), [(_abbreviated(each.names), each.type, each.reason) for each in self.left]
            )
        if self.saved_bytes is not None:
            before, after = self.saved_bytes
            if before:
                change = round(100 * (after / before - 1))
                lines += ["", f"kept for backward of a step: {_size(before)} → {_size(after)} ({change:+d}%)"]
            else:
                lines += ["", "forward kept nothing for backward: does it run the model, with gradients?"]
        return "\n".join(lines)

    __repr__ = __str__


def _source(row: Replaced) -> str:
    return f"{row.form}, {row.library} {row.versions}".replace(" any", "") if row.form else ""


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["  none"]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]


def _abbreviated(names: list[str]) -> str:
    """Names that differ in one number, as model.layers.{0-31}.mlp; of others the first, and how many more."""
    numbers = [list(map(int, re.findall(r"\d+", name))) for name in names]
    if len(names) > 1 and len({re.sub(r"\d+", "#", name) for name in names}) == 1:
        changing = [index for index, values in enumerate(zip(*numbers)) if len(set(values)) > 1]
        if len(changing) == 1:
            values = [each[changing[0]] for each in numbers]
            if values == list(range(values[0], values[0] + len(values))):
                parts = re.split(r"(\d+)", names[0])
                parts[2 * changing[0] + 1] = f"{{{values[0]}-{values[-1]}}}"
                return "".join(parts)
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def report(model: torch.nn.Module, *, forward: Callable[[], object] | None = None) -> Report:
    """What of `model` is this package's, what is not and why.

    Args:
        model: any module, usually after `replace`.
        forward: a forward of it, such as `lambda: model(**batch).loss`. It then runs twice, once with the model restored, and
            what autograd keeps for backward is counted: parameters and buffers that are kept count too, and what is kept twice
            counts once. Buffers and random generators are as before afterwards; there is no backward.

    Raises:
        TypeError: `model` is not a module, or `forward` not callable.
        ValueError: with `forward`, nothing in `model` was replaced, so that there is nothing to compare.

    Example:
        >>> print(torch_sigmoid.report(torch_sigmoid.replace(torch.nn.Sequential(torch.nn.SiLU()))))
        Sequential: 1 module of torch_sigmoid
          modules  class  now   known as
          0        SiLU   silu
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"report(): model must be a torch.nn.Module, got {type(model).__name__}")
    if forward is not None and not callable(forward):
        raise TypeError(f"report(): forward must be callable, such as lambda: model(batch), got {type(forward).__name__}")
    replaced: dict[tuple[str, ...], list[str]] = {}
    left: dict[tuple[str, ...], list[str]] = {}
    for name, module in model.named_modules():
        name = name or "(the model)"
        for row in _rows_of(module):
            replaced.setdefault(row, []).append(name)
        if reason := _why_left(module):
            left.setdefault((bare(type(module)).__name__, reason), []).append(name)
    saved = None if forward is None else _saved_bytes_both_ways(model, forward)
    return Report(
        type(model).__name__,
        [Replaced(names, *row) for row, names in replaced.items()],
        [Left(names, *row) for row, names in left.items()],
        saved,
    )


def _rows_of(module: torch.nn.Module) -> Iterator[tuple[str, str, str, str, str]]:
    if original := record_of(module):
        yield original.type.__name__, original.became, original.form, original.library, original.versions
    elif is_ours(module):
        yield bare(type(module)).__name__, "", "this package's own layer", "", ""
    if criteria.RECORD in module.__dict__:
        yield type(module).__name__, "sigmoid_focal_loss", "focal loss of its loss_function", LIBRARY, VERSIONS


def _why_left(module: torch.nn.Module) -> str | None:
    if attribute := lost_gate(module):
        return f"its {attribute} was set since replace, and takes no second argument; call replace again"
    if record_of(module) or is_ours(module):
        return None
    if changed_activation(module):
        return "its forward is not the one that is known of this class"
    if function := has_own_methods(module, ("forward",)):
        return plan(module).reason or (
            f"its {function} was replaced on the instance" if kind_of_type(bare(type(module))) else None
        )
    if kind_of(module) == "sigmoid":
        return (
            'its inplace=True overwrites the input that save="input" keeps'
            if getattr(module, "inplace", False)
            else "not replaced yet"
        )
    if kind_of(module):
        return "not replaced yet"
    planned = plan(module)
    return "not replaced yet" if planned.forms else planned.reason


def _saved_bytes_both_ways(model: torch.nn.Module, forward: Callable[[], object]) -> tuple[int, int]:
    if not any(record_of(module) or criteria.RECORD in module.__dict__ for module in model.modules()):
        raise ValueError(
            "report(): nothing in the model was replaced, so there are no two ways to run forward; call replace first"
        )
    with _as_before(model):
        after = saved_bytes(forward)
    with restored(model), _as_before(model):
        before = saved_bytes(forward)
    return before, after


@contextlib.contextmanager
def _as_before(model: torch.nn.Module) -> Iterator[None]:
    """Buffers and random generators keep their values."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"], device_type="cuda"):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the memory that autograd keeps when `forward` runs, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return n_bytes


__all__ = ["Left", "Replaced", "Report", "report", "saved_bytes"]
