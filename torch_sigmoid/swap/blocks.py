"""What becomes of a module: which class of ours takes the place of its own, or why none does."""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from ..internals import has_hooks, wrapping_types
from ..operators import OPERATORS
from .forms import BY_HAND, Form, activations, forms
from .functions import Function, innermost, runs_its_source
from .gates import GATED
from .trees import Match, Rewrite, called_by, match, remembered, tree_of

Type = type[torch.nn.Module]

# By the classes of torch, which are known without a look at their source.
KINDS: dict[Type, str] = {row.torch_module: name for name, row in OPERATORS.items() if row.torch_module}
OURS: dict[str, Type] = {name: row.module for name, row in OPERATORS.items()}
_KINDS_OF_OURS: dict[Type, str] = {row.module: name for name, row in OPERATORS.items()} | {
    gated: kind for kind, gated in GATED.items()
}
# Children of blocks that are called a gated MLP, by which one that is not known is recognised as worth a word.
_CHILDREN_OF_GATED = ({"gate_proj", "up_proj"}, {"gate_up_proj"}, {"w1", "w2", "w3"}, {"fc1_g", "fc1_x"})
_LOOKS_GATED = (
    Rewrite("self.ACT(GATE) * UP", "self.ACT(GATE, UP)"),
    Rewrite("UP * self.ACT(GATE)", "self.ACT(GATE, UP)"),
    Rewrite("self.ACT(GATE).mul(UP)", "self.ACT(GATE, UP)"),
    Rewrite("silu(GATE) * UP", "self.FUSED(GATE, UP)"),
    Rewrite("UP * silu(GATE)", "self.FUSED(GATE, UP)"),
    Rewrite("OUT * sigmoid(GATE)", "self.FUSED(OUT, GATE)"),
    Rewrite("sigmoid(GATE) * OUT", "self.FUSED(OUT, GATE)"),
)


# Where a replaced module keeps what it was.
RECORD = "_replaced"


class Original(NamedTuple):
    """What a replaced module was, for `restore`, and what it became, for `report`; kept in its __dict__."""

    type: Type
    became: str
    form: str = ""
    library: str = ""
    versions: str = ""
    save: str | None = None


def record_of(module: torch.nn.Module) -> Original | None:
    """What a module was before `replace`; None where it was not replaced, or its block was loaded unfused."""
    record = module.__dict__.get(RECORD)
    if record is None or (record.form and not issubclass(bare(type(module)), Fused)):
        return None
    assert isinstance(record, Original)
    return record


# fully_shard gives each module a class of its own, FSDPSigmoid(FSDPModule, Sigmoid); replicate does likewise, and so does
# register_parametrization, whose ParametrizedExperts(Experts) has the parametrized tensors as properties.


def bare(module_type: Type) -> Type:
    """The class below those that torch has put on top of it."""
    wrapping = wrapping_types()
    while _is_parametrized(module_type) or (len(module_type.__bases__) == 2 and module_type.__bases__[0] in wrapping):
        module_type = module_type.__bases__[-1]
    return module_type


def _is_parametrized(module_type: Type) -> bool:
    return (
        module_type.__module__ == torch.nn.utils.parametrize.__name__
        and module_type.__name__ == f"Parametrized{module_type.__bases__[0].__name__}"
    )


# The class of torch.distributed that a class of `_wrapped_like` was made of.
_wrapped_first: dict[Type, Type] = {}


def _wrapped_like(wrapped: Type, new: Type) -> Type:
    """The class of `wrapped` on top of `new`; on top of what it was on first, the very class that it was."""
    if _is_parametrized(wrapped):  # one for each module, and it changes
        return _made_like(wrapped, new)
    first = _wrapped_first.get(wrapped, wrapped)
    return first if new is bare(first) else _made_once(first, new)


def _made_like(wrapped: Type, new: Type) -> Type:
    below = wrapped.__bases__[-1]
    base = new if below is bare(wrapped) else _wrapped_like(below, new)
    names = {name: value for name, value in vars(wrapped).items() if name not in ("__dict__", "__weakref__")}
    made = type(wrapped.__name__, (*wrapped.__bases__[:-1], base), names)
    _wrapped_first[made] = wrapped
    return made


_made_once = remembered(_made_like)


def set_bare_type(module: torch.nn.Module, new: Type) -> None:
    """Give a module another class, below those that torch has put on top."""
    wrapped = type(module)
    module.__class__ = new if bare(wrapped) is wrapped else _wrapped_like(wrapped, new)


# Activations


def kind_of(module: object) -> str | None:
    """The operator that a module is, if it is known to be one, whoever's class it has."""
    if not isinstance(module, torch.nn.Module) or has_own_methods(module, ("forward",)):
        return None
    return kind_of_type(bare(type(module)))


# Not remembered: somebody may put another forward on a class at any time.
def kind_of_type(module_type: Type) -> str | None:
    """The operator that the modules of a class are, where nobody has put something on the instance."""
    if kind := KINDS.get(module_type) or _KINDS_OF_OURS.get(module_type):
        return kind
    return next((each.kind for each in activations() if each.knows(module_type)), None)


def has_own_methods(module: torch.nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of these methods that somebody has put on the instance itself, as Liger, kernelize and accelerate do."""
    return next((name for name in names if name in module.__dict__), None)


def methods_of_ours(module: torch.nn.Module) -> tuple[str, ...]:
    """The methods that a replaced module has from us."""
    module_type = bare(type(module))
    return module_type.fused_methods if issubclass(module_type, Fused) else ("forward",)


# Blocks


class Fused:
    """What the classes of fused blocks have in common: they pickle and copy by the class that they were made of."""

    _fused_from: Type
    _fused_by: tuple[str, ...]
    fused_methods: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The state is what the class itself says: it may have a __getstate__ of its own.
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, protocol)))
        return _rebuilt, (self._fused_from, self._fused_by), *state

    def _get_name(self) -> str:
        return f"{type(self).__name__}, fused"


def _rebuilt(module_type: Type, names: tuple[str, ...]) -> torch.nn.Module:
    """An empty module of the fused class; of its own class where that is not known any more."""
    found: dict[str, Form] = {}
    for form in _forms_of(module_type):
        if form.name in names:
            found.setdefault(form.method, form)
    known = tuple(found.values())
    if unknown := set(names) - {form.name for form in forms()}:
        warnings.warn(
            f"{module_type.__name__} was fused by torch_sigmoid when it was saved, by forms that are not registered here: "
            f"{', '.join(sorted(unknown))}. It runs its own forward; expected register(form) before it is loaded",
            stacklevel=2,
        )
    elif len({form.name for form in known}) < len(set(names)):
        warnings.warn(
            f"{module_type.__name__} was fused by torch_sigmoid when it was saved, and its code has changed since: it is "
            "loaded as it is, and runs its own forward",
            stacklevel=2,
        )
    new = fused_type(module_type, known) if known else module_type
    module: torch.nn.Module = object.__new__(new)
    return module


def _forms_of(module_type: Type) -> tuple[Form, ...]:
    """What is known of a class; what its own library has comes before what another writes alike."""
    package = module_type.__module__.partition(".")[0]
    known = [form for form in forms() if form.knows(module_type)]
    return tuple(sorted(known, key=lambda form: form.library not in (package, BY_HAND)))


_match = remembered(match)


def _match_of(form: Form, function: Function) -> Match | None:
    return next(filter(None, (_match(function, rewrite) for rewrite in form.rewrites)), None)


def activation_of(form: Form, module_type: Type) -> str | None:
    """The attribute that holds the activation which the form fuses."""
    if form.gate is not None or form.forward is not None:
        return form.gate
    found = _match_of(form, getattr(module_type, form.method))
    name = found.bound.get("ACT") if found else None
    return name if isinstance(name, str) else None


def fused_type(module_type: Type, chosen: tuple[Form, ...]) -> Type:
    """The class of a block with the methods of these forms."""
    return _fused_type(module_type, chosen, tuple(getattr(module_type, form.method) for form in chosen))


@remembered
def _fused_type(module_type: Type, chosen: tuple[Form, ...], originals: tuple[Function, ...]) -> Type:
    methods: dict[str, Any] = {}
    for form, original in zip(chosen, originals):
        if form.forward is not None:
            methods[form.method] = form.forward
        else:
            found = _match_of(form, original)
            assert found is not None
            methods[form.method] = found.written(hidden_name(form))
    names: dict[str, Any] = {
        "__module__": module_type.__module__,
        "__qualname__": module_type.__qualname__,
        "__doc__": module_type.__doc__,
    }
    names |= {"_fused_from": module_type, "_fused_by": tuple(form.name for form in chosen), "fused_methods": tuple(methods)}
    return type(module_type.__name__, (Fused, module_type), names | methods)


def hidden_name(form: Form) -> str:
    """The attribute of a fused block for what its rewrite calls FUSED."""
    return f"_fused_{form.fused}"


@dataclass(frozen=True)
class Plan:
    """The forms of a block that apply, and its activations that take a second argument; or why there are none."""

    forms: tuple[Form, ...] = ()
    gated: tuple[torch.nn.Module, ...] = ()
    reason: str | None = None


def plan(block: torch.nn.Module) -> Plan:
    """What `replace` does with a block."""
    module_type = bare(type(block))
    if issubclass(module_type, Fused):
        return Plan()
    known = _forms_of(module_type)
    if not known:
        return Plan(reason=_why_unknown(block, module_type))
    if name := has_own_methods(block, tuple(name for form in known for name in form.methods)):
        return Plan(reason=f"its {name} was replaced by {whose(block.__dict__[name])}")
    chosen: list[Form] = []
    gated: list[torch.nn.Module] = []
    reason = None
    for form in known:
        if any(form.method == other.method for other in chosen):
            continue
        attribute = activation_of(form, module_type)
        if form.activation is not None:
            if attribute is None:
                reason = _unmatched(form)
                continue
            activation = getattr(block, attribute, None)
            if not isinstance(activation, torch.nn.Module) or kind_of(activation) != form.activation:
                continue
            if has_hooks(activation):
                reason = f"{attribute} has hooks, which would see other tensors in a fused gate"
                continue
            gated.append(activation)
        elif form.rewrites and _match_of(form, getattr(module_type, form.method)) is None:
            reason = _unmatched(form)
            continue
        chosen.append(form)
    return Plan(tuple(chosen), tuple(gated), None if chosen else reason)


def _unmatched(form: Form) -> str:
    return (
        f"no rewrite of {form.name!r} fits its {form.method}: find is not in it, or more than once; or it calls other "
        "functions than the known one; or its decorators hide it"
    )


def whose(function: Any) -> str:
    """What a function that stands in another's place is, for a reader."""
    module = getattr(innermost(function), "__module__", None) or type(function).__module__
    around = "what wraps " if hasattr(function, "__wrapped__") else ""
    return f"{around}{getattr(function, '__qualname__', type(function).__name__)} of {module}"


def lost_gate(block: torch.nn.Module) -> str | None:
    """The attribute of a fused block in which somebody has put another activation, which takes no second argument."""
    module_type = bare(type(block))
    if not issubclass(module_type, Fused):
        return None
    for form in _forms_of(module_type._fused_from):
        attribute = activation_of(form, module_type._fused_from) if form.name in module_type._fused_by else None
        if form.activation and attribute and not isinstance(getattr(block, attribute, None), tuple(GATED.values())):
            return attribute
    return None


def _why_unknown(block: torch.nn.Module, module_type: Type) -> str | None:
    """A word where the block looks like one of ours: by its base, the names of its children, or a gate in its forward."""
    gates = any(kind_of(child) in GATED for child in block.children())
    for base in module_type.__mro__[1:]:
        for form in _forms_of(base) if issubclass(base, torch.nn.Module) else ():
            if gates or form.activation is None:
                return f"its {form.method} is not that of {base.__name__}, which is known; register(Form(...)) adds one"
    # A class of TorchScript has a forward on its instances only.
    forward = getattr(module_type, "forward", None)
    if forward is None:
        return None
    children = {name for named in (block.named_children(), block.named_parameters(recurse=False)) for name, _ in named}
    named_alike = any(names <= children for names in _CHILDREN_OF_GATED)
    owner = next(base for base in module_type.__mro__ if "forward" in vars(base))
    if named_alike and gates and innermost(forward).__module__ != owner.__module__:
        return f"the forward of its class was replaced by {whose(forward)}"
    if named_alike and (tree_of(forward) is None or not runs_its_source(forward)):
        return "the source of its forward cannot be read, or has changed since it was imported"
    if ((gates or called_by(forward)) and named_alike) or _looks_gated(forward, block):
        return "its forward is no known form; register(Form(...)) adds one"
    return None


def _looks_gated(forward: Function, block: torch.nn.Module) -> bool:
    for rewrite in _LOOKS_GATED:
        found = _match(forward, rewrite)
        if found is None:
            continue
        activation = found.bound.get("ACT")
        if not isinstance(activation, str) or kind_of(getattr(block, activation, None)) in GATED:
            return True
    return False


def changed_activation(module: torch.nn.Module) -> bool:
    """Whether a module is called like a known activation of its library, but computes something else."""
    module_type = bare(type(module))
    library = module_type.__module__.split(".")[0]
    return kind_of(module) is None and any(
        each.name == module_type.__name__ and each.library == library for each in activations()
    )
