"""Ours in place of what a model is made of: its activations, gated blocks and losses."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch

from .. import nn
from ..checks import check_bool, check_save
from ..dispatch import Save
from . import criteria
from .blocks import (
    KINDS,
    OURS,
    RECORD,
    Original,
    bare,
    fused_type,
    has_own_methods,
    hidden_name,
    kind_of,
    lost_gate,
    methods_of_ours,
    plan,
    record_of,
    set_bare_type,
    whose,
)
from .gates import GATED, FusedGate

_Model = TypeVar("_Model", bound=torch.nn.Module)


def replace(model: _Model, *, save: Save = "output", fuse: bool = True) -> _Model:
    """Make what `model` is made of ours, in place: activations, and with `fuse` gated blocks and losses too.

    Activations: `torch.nn.Sigmoid`, `SiLU`, `GLU`, `LogSigmoid` and `BCEWithLogitsLoss`, and the like of transformers, timm and
    open_clip. Fused blocks: the gated MLPs, experts and gated attention of transformers, SwiGLU and squeeze-and-excitation of
    timm, torchvision and diffusers, focal losses, SigLIP's loss, a Llama's MLP written by hand: silu(gate)·up is then one
    kernel forward and one backward, and keeps 2 tensors for backward where there were 3. `torch_sigmoid.report(model)` says
    what became ours and what did not, and why.

    A block is fused if its class's forward is a known form, names of locals and comments aside; one that differs by one
    operator is left alone. `torch_sigmoid.register` adds forms. The module objects stay the same and only change their class:
    names, parameters, state_dict, hooks, training flag, sharing between parents and references from outside are untouched, and
    so are isinstance checks of fused blocks. Copies and pickles stay replaced. A hook on an activation of a fused block sees
    the gate and what it is multiplied with, and their product. A second call changes the `save` of what the first has replaced.

    Direct calls such as `F.silu(x)` in other code are left; for these there is `intercept`.

    Args:
        model: any module, before or after fully_shard, DistributedDataParallel and torch.compile.
        save: as in `torch_sigmoid.Sigmoid`; the others save their input.
        fuse: False leaves blocks as they are, fused ones fused, and only changes activations.

    Returns:
        `model`.

    Warns:
        UserWarning: nothing in `model` is ours or became ours, and what was looked for.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `save` is neither "output" nor "input".

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid())
        >>> torch_sigmoid.replace(model, save="input")[1]
        Sigmoid(save='input')
    """
    check_save(save)
    check_bool("replace", "fuse", fuse)
    modules = list(_modules(model, "replace"))
    make_ours(modules, save, fuse)
    if not any(record_of(module) or criteria.RECORD in module.__dict__ or is_ours(module) for module in modules):
        warnings.warn(_nothing(model, modules), stacklevel=2)
    return model


def make_ours(modules: list[torch.nn.Module], save: Save, fuse: bool = True) -> None:
    """Replace what is ours among the modules of a model."""
    gated = set()
    if fuse:
        for block in modules:
            gated |= _fuse(block)
    for module in modules:
        _replace_activation(module, save, id(module) in gated)


def is_ours(module: torch.nn.Module) -> bool:
    """Whether a module has a class of this package."""
    return bare(type(module)).__module__.startswith(f"{nn.__package__}.")


def _fuse(block: torch.nn.Module) -> set[int]:
    """Fuse a block if it is of a known form; returns the ids of the activations that then take a second argument."""
    criteria.replace(block)
    if lost_gate(block):
        _restore(block)
    planned = plan(block)
    if not planned.forms:
        return set()
    module_type = bare(type(block))
    first = planned.forms[0]
    operators = ", ".join(dict.fromkeys(form.fused or _GATES.get(form.activation, form.name) for form in planned.forms))
    block.__dict__[RECORD] = Original(module_type, operators, first.name, first.library, first.versions)
    for form in planned.forms:
        if form.fused:
            block.__dict__[hidden_name(form)] = FusedGate(form.fused)
    set_bare_type(block, fused_type(module_type, planned.forms))
    return set(map(id, planned.gated))


_GATES: dict[str | None, str] = {"silu": "swiglu", "sigmoid": "sigmoid_gate"}


def _replace_activation(module: torch.nn.Module, save: Save, gated: bool) -> None:
    kind, module_type = kind_of(module), bare(type(module))
    if kind is None:
        return
    ours = GATED[kind] if gated else OURS[kind]
    foreign = not issubclass(module_type, ours) and not is_ours(module)
    if kind == "sigmoid" and save == "input" and getattr(module, "inplace", False):
        if not gated:
            return
        save = "output"
    if foreign or (gated and module_type is not ours):
        before = module.__dict__.get(RECORD) or Original(module_type, kind, save=module.__dict__.get("save"))
        module.__dict__[RECORD] = before._replace(became=f"{kind}, gated" if gated else kind)
        set_bare_type(module, ours)
    if isinstance(module, nn.Sigmoid) and RECORD in module.__dict__:
        module.save = save


def restore(model: _Model) -> _Model:
    """Undo `replace`: the modules it changed are their libraries' again. Returns `model`.

    The activation of a fused block, which the block calls with two arguments, is restored with its block only.

    Args:
        model: a model, or a part of one.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: since `replace`, somebody has put a method on a module which has that method from us. Nothing is restored.

    Example:
        >>> torch_sigmoid.restore(torch_sigmoid.replace(torch.nn.Sequential(torch.nn.Sigmoid())))
        Sequential(
          (0): Sigmoid()
        )
    """
    modules = list(_modules(model, "restore"))
    for name, module in model.named_modules():
        if record_of(module) and (method := has_own_methods(module, methods_of_ours(module))):
            raise RuntimeError(
                f"restore(): since replace, the {method} of {name or 'the model'} was replaced by "
                f"{whose(module.__dict__[method])}, which may hold ours; expected it to be removed first"
            )
    blocks = [module for module in modules if RECORD in module.__dict__ and module.__dict__[RECORD].form]
    restored_with_theirs = {id(child) for block in blocks for child in block.children()}
    for module in modules:
        criteria.restore(module)
        original = module.__dict__.get(RECORD)
        if original is None or (bare(type(module)) in GATED.values() and id(module) not in restored_with_theirs):
            continue
        _restore(module)
    return model


def _restore(module: torch.nn.Module) -> None:
    original = module.__dict__.pop(RECORD)
    if issubclass(bare(type(module)), nn.Sigmoid):
        module.__dict__.pop("save", None)
        module.__dict__ |= {"save": original.save} if original.save else {}
    for name in [name for name in module.__dict__ if name.startswith("_fused_")]:
        del module.__dict__[name]
    set_bare_type(module, original.type)


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """`model` as it was before `replace`; afterwards each module is again what it is now."""
    before = [(module, type(module), dict(module.__dict__)) for module in _modules(model, "restored")]
    changed = []
    try:
        restore(model)
        for module, module_type, attributes in before:
            kept = {name: value for name, value in attributes.items() if module.__dict__.get(name, module) is not value}
            changed.append((module, module_type, kept))
        yield
    finally:
        for module, module_type, kept in changed:
            module.__class__ = module_type
            module.__dict__.update(kept)


def _modules(model: torch.nn.Module, caller: str) -> Iterator[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}(): model must be a torch.nn.Module, got {type(model).__name__}")
    return model.modules()


def _nothing(model: torch.nn.Module, modules: list[torch.nn.Module]) -> str:
    """What a call that changed nothing looked for, and what it found of that sort."""
    others = Counter(type(module).__name__ for module in modules if _is_activation(module))
    found = ", ".join(f"{name} ({count})" for name, count in others.most_common(5)) or "none"
    patched = sum(has_own_methods(module, ("forward",)) is not None for module in modules)
    return (
        f"replace(): {type(model).__name__} has nothing that is ours to replace. Looked for modules of torch "
        f"({', '.join(each.__name__ for each in KINDS)}), their like in transformers, timm and open_clip, and known gated "
        f"blocks and losses. Activations of other kinds: {found}."
        + (f" Modules whose forward somebody else has replaced: {patched}." if patched else "")
        + " For functions that it calls, such as F.silu, there is intercept."
    )


def _is_activation(module: torch.nn.Module) -> bool:
    name = type(module).__name__.lower()
    kinds = "gelu", "relu", "tanh", "swish", "mish", "sigmoid", "softplus", "elu", "activation"
    return not list(module.children()) and any(kind in name for kind in kinds)
