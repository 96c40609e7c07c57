"""The private names of torch that this package uses, each with the reason why no public one will do; none is used elsewhere.

`SINCE` lists them with the first torch that has each. (`kernels/`, which imports nothing from here, has three of its own:
`_cuda_getDevice` in kept.py, and in launch.py two to read a copy-on-write tensor.)
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._subclasses import FakeTensor as FakeTensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_leaves as tree_leaves

_C = torch._C
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

# Asked at every call. The public torch.jit.is_tracing asks for scripting first, at three times the cost.
is_tracing: Callable[[], bool] = _C._is_tracing


def is_exporting() -> bool:
    """Whether torch.export traces. Inside torch.compile, torch 2.11 takes its public function of this name for true."""
    return torch.compiler._is_exporting_flag


# torch.func says to nobody that one of its transforms is around a call, nor which.
transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active
_TRANSFORM = _C._functorch.TransformType


def transform_levels() -> list[object]:
    """The kinds of the torch.func transforms around this call, outermost first."""
    return [level.key() for level in _C._functorch.get_interpreter_stack() or ()]


def nested_jvp() -> bool:
    """Whether torch.func.jvp runs inside torch.func.jvp."""
    return transform_levels().count(_TRANSFORM.Jvp) > 1


def functionalizes() -> bool:
    return _TRANSFORM.Functionalize in transform_levels()


def in_forward_mode() -> bool:
    """Whether a dual level is open. The public unpack_dual answers for one tensor, at the cost of an operator."""
    return forward_ad._current_level >= 0


# Only dispatch keys and mode stacks tell ordinary tensors and calls from those that somebody wraps or records.
_KEY = _C.DispatchKey
_keys_of = _C._dispatch_keys
_function_modes = _C._len_torch_function_stack
dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack  # how many are in force
_is_included = _C._dispatch_tls_is_dispatch_key_included


def _plain_key_sets() -> frozenset[int]:
    """The dispatch keys of ordinary dense tensors, and of those made under inference_mode, of each device."""
    key_set = _C.DispatchKeySet
    plain = set()
    for backend in ("CPU", "CUDA", "XPU"):
        inference = key_set(getattr(_KEY, backend)) | key_set(getattr(_KEY, f"Autocast{backend}"))
        plain.add(inference.raw_repr())
        plain.add((inference | key_set(getattr(_KEY, f"Autograd{backend}")) | key_set(_KEY.ADInplaceOrView)).raw_repr())
    return frozenset(plain)


_PLAIN_KEY_SETS = _plain_key_sets()


def has_plain_keys(tensor: Tensor) -> bool:
    """Whether no wrapper, no lazy negation and no batching stands between a tensor and its memory."""
    return _keys_of(tensor).raw_repr() in _PLAIN_KEY_SETS


def modes_listen() -> bool:
    """Whether a dispatch mode records operators; make_fx with pre_dispatch=True keeps another stack for it.

    With that one it enters a function mode, which is the cheaper thing to look for.
    """
    return dispatch_modes() > 0 or (_function_modes() > 0 and _is_included(_KEY.PreDispatch))


def make_fx_traces() -> bool:
    """Whether make_fx records this call; a mode of another kind, such as a profiler's, does not count."""
    return _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None or _is_included(_KEY.PreDispatch)


def function_modes() -> list[object]:
    """The function modes around this call, outermost first."""
    modes: list[object] = torch.overrides._get_current_function_mode_stack()
    return modes


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled


def plain_grad_mode() -> bool | None:
    """Whether grad mode is on; None inside a dual level, and where Dynamo traces, which cannot see into `likeness`."""
    return None if _is_dynamo_compiling() or forward_ad._current_level >= 0 else _is_grad_enabled()


# Whether tensors are like some others, see `likeness`.
Likeness = Callable[..., bool]


def likeness(*tensors: Tensor, any_size: bool = False) -> Likeness:
    """A check in C++, Dynamo's guard: whether tensors are like these in all that Python could ask of them one by one.

    That is their types, dtypes, devices, `requires_grad`, sizes and strides (or, for `any_size`, only how many), and the
    dispatch keys, with those that tracers and transforms add around a call. Modes, forward mode and grad mode need not add any.
    One tensor given twice is never like two. The caller must ensure that none is sparse or nested: that ends the process.
    """
    free: Any = [[None] * tensor.dim() for tensor in tensors] if any_size else None
    check: Likeness = TensorGuards(*tensors, dynamic_dims_sizes=free, dynamic_dims_strides=free).check
    return check


# A wrapper by vmap or by is_grads_batched looks like a Tensor.
is_legacy_batched: Callable[[Tensor], bool] = _C._functorch.is_legacy_batchedtensor
is_functorch_wrapper: Callable[[Tensor], bool] = _C._functorch.is_functorch_wrapped_tensor
# What Function.apply does first to each of its arguments.
unwrap_if_dead: Callable[[Tensor], Tensor] = _C._functorch.unwrap_if_dead


def apply_of(function: type[Function]) -> Callable[..., Tensor]:
    """The C++ entry below Function.apply, which binds its arguments in Python at every call: 0.9 µs, 9 with setup_context.

    Enough for eager reverse mode, if `unwrap_if_dead` is called for each tensor. The engine then calls `backward` itself, too,
    and not by way of a method that looks at every call for the other names that it might have: 1.6 µs.
    """
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    apply: Callable[..., Tensor] = super(Function, function).apply  # type: ignore[misc]  # torch's stubs do not know it
    return apply


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows a base of this tensor, which a change in place would change too."""
    return tensor._is_view()


def saved_tensor_hooks() -> bool:
    """Whether hooks on saved tensors are in force; torch only lets one push and pop them."""
    return _C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_backward() -> bool:
    """Whether this thread is inside a backward."""
    return _C._current_graph_task_id() != -1


def next_node_number() -> int:
    """The least number that a node of autograd can have which this thread makes from now on."""
    return _C._autograd._get_sequence_nr()


def node_number(node: Any) -> int:
    number: int = node._sequence_nr()
    return number


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile has wrapped this module, or replaced its call."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def wrapping_types() -> tuple[type, ...]:
    """The classes that `fully_shard` and `replicate` put on top of a module's own; none before they are imported."""
    places = ("torch.distributed.fsdp", "FSDPModule"), ("torch.distributed._composable.replicate_with_fsdp", "ReplicateModule")
    return tuple(filter(None, (getattr(sys.modules.get(module), name, None) for module, name in places)))


def store_of(group: "torch.distributed.ProcessGroup") -> "torch._C._distributed_c10d.Store":
    """The store over which the hosts of a process group meet."""
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def register_sharding_rule(
    operator: Any, n_tensors: int, rule: Callable[[list[Any]], tuple[Sequence[Any], Sequence[Any]]]
) -> None:
    """Let DTensors run an operator whose first `n_tensors` arguments are tensors: the others decide with them.

    `rule` is given the arguments, what torch knows of a DTensor in its place, and returns the placements of tensors and
    results. The public `register_sharding` gathers a dimension of fewer elements than ranks, and decides once for all strings.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

    names = [argument.name for argument in operator._schema.arguments]

    def strategy(schema: OpSchema) -> OpStrategy:
        arguments = [*schema.args_schema, *(schema.kwargs_schema[name] for name in names[len(schema.args_schema) :])]
        specs = [each.strategies[0].output_spec for each in arguments if isinstance(each, OpStrategy)]
        known = iter(specs)
        inputs, outputs = rule([next(known) if isinstance(each, OpStrategy) else each for each in arguments])
        mesh = specs[0].mesh
        input_specs = [DTensorSpec(mesh, to, tensor_meta=spec.tensor_meta) for spec, to in zip(specs, inputs)]
        output_specs = tuple(DTensorSpec(mesh, to) for to in outputs)
        chosen = OpSpec(output_specs[0] if len(output_specs) == 1 else output_specs, input_specs, [[0.0]] * len(specs))
        return OpStrategy([chosen])

    decides = RuntimeSchemaInfo(static_argnum=n_tensors, static_kwargkey=names[n_tensors:])
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(operator, strategy, decides)


def timeout_of(group: "torch.distributed.ProcessGroup") -> timedelta:
    """How long a process group waits for a rank; torch takes it, but does not give it back."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


# Warns as torch does, in its words.
legacy_reduction: Callable[[bool | None, bool | None], Literal["none", "mean", "sum"]]
legacy_reduction = torch.nn._reduction.legacy_get_string  # type: ignore[assignment]  # str, to torch


def uncompiled(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """`function`, into which torch.compile does not look. The public decorator would import Dynamo when it decorates."""
    disabled: Callable[_Parameters, _Result] = torch._dynamo.disable(function)
    return disabled


_Number = TypeVar("_Number", bound=float | None)


def constant(number: _Number) -> _Number:
    """The number. torch.compile(dynamic=True) makes a symbol of one that it finds in an attribute, a global or a default.

    As an element of a set it is a constant, which is all that the math module, and a formula, can take.
    """
    (found,) = {number}
    return found


# What torch.nn.functional.silu and glu end in, which torch shows nowhere else.
NN_NAMESPACE: dict[str, Any] = vars(_C._nn)


def script_as(wrapper: Callable[..., Any], operator: Callable[..., Any]) -> None:
    """Have torch.jit.script, which knows torch's operators by their identity, take `wrapper` for `operator`."""
    builtins = torch.jit._builtins
    if name := builtins._find_builtin(operator):
        builtins._register_builtin(wrapper, name)


_SAVES = "torch_sigmoid.intercept"


def set_for_backward(saves: list[Any]) -> None:
    """Let a backward that this thread starts find `saves`, in whichever threads it runs."""
    if set_of_backward() is saves:
        return
    references = sys.getrefcount(saves)
    _C._stash_obj_in_tls(_SAVES, saves)
    if sys.getrefcount(saves) == references:
        # torch 2.10 and 2.11 later drop a reference that they have not taken, which frees `saves` under its owner.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(saves))


def set_of_backward() -> list[Any]:
    """What the thread that started this backward has set; empty if it has set nothing."""
    return _C._get_obj_in_tls(_SAVES) if _C._is_key_in_tls(_SAVES) else []


# Tables of torch's functions by their identity, which torch builds at the first use.
_TABLES = {
    "torch.overrides": ("get_testing_overrides", "_get_overridable_functions", "_get_tensor_methods"),
    "torch._dynamo.trace_rules": ("get_torch_obj_rule_map", "get_tensor_method"),
    "torch._dynamo.variables.torch": ("get_overridable_functions",),
}


def _tables() -> list[Any]:
    modules = [(sys.modules[name], names) for name, names in _TABLES.items() if name in sys.modules]
    tables = [getattr(module, name, None) for module, names in modules for name in names]
    return [table for table in tables if hasattr(table, "cache_info")]


def tables_built() -> list[Any]:
    """The tables of functions that torch has built already."""
    return [table for table in _tables() if table.cache_info().currsize]


def forget_tables(*, but: list[Any]) -> None:
    """Have torch build its tables of functions again, but those."""
    for table in _tables():
        if table not in but:
            table.cache_clear()


# Every private name of torch that the package uses, under the first torch that has it (2.6: that one or one before). Those of
# instances stand behind their class. tests/test_internals.py holds this table to the code, and to the torch that runs.
SINCE = {
    "2.6": [
        "torch.Tensor._is_view",
        "torch._C.DispatchKey",
        "torch._C.DispatchKeySet",
        "torch._C._TorchDispatchModeKey",
        "torch._C._are_functorch_transforms_active",
        "torch._C._autograd._get_sequence_nr",
        "torch._C._construct_storage_from_data_pointer",
        "torch._C._cuda_getDevice",
        "torch._C._current_graph_task_id",
        "torch._C._dispatch_keys",
        "torch._C._dispatch_tls_is_dispatch_key_included",
        "torch._C._distributed_c10d.Backend.Options._timeout",
        "torch._C._distributed_c10d.ProcessGroup._device_types",
        "torch._C._distributed_c10d.ProcessGroup._get_backend",
        "torch._C._distributed_c10d.Store",
        "torch._C._dynamo.guards.TensorGuards",
        "torch._C._functorch.TransformType",
        "torch._C._functorch.get_interpreter_stack",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._C._functorch.is_legacy_batchedtensor",
        "torch._C._functorch.unwrap_if_dead",
        "torch._C._get_dispatch_mode",
        "torch._C._get_obj_in_tls",
        "torch._C._is_cow_tensor",
        "torch._C._is_key_in_tls",
        "torch._C._is_tracing",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._len_torch_function_stack",
        "torch._C._nn",
        "torch._C._stash_obj_in_tls",
        "torch._dynamo.OptimizedModule._orig_mod",
        "torch._dynamo.disable",
        "torch._dynamo.trace_rules.get_tensor_method",
        "torch._dynamo.trace_rules.get_torch_obj_rule_map",
        "torch._dynamo.variables.torch.get_overridable_functions",
        "torch._ops.OpOverload._schema",
        "torch._subclasses.FakeTensor",
        "torch.autograd.Function._backward_cls",
        "torch.autograd.forward_ad._current_level",
        "torch.autograd.graph.Node._sequence_nr",
        "torch.distributed.distributed_c10d._get_process_group_store",
        "torch.distributed.tensor.DTensor._op_dispatcher",
        "torch.distributed.tensor._dtensor_spec.DTensorSpec",
        "torch.distributed.tensor._op_schema.OpSchema",
        "torch.distributed.tensor._op_schema.OpStrategy",
        "torch.distributed.tensor._op_schema.RuntimeSchemaInfo",
        "torch.jit._builtins._find_builtin",
        "torch.jit._builtins._register_builtin",
        "torch.nn.Module._backward_hooks",
        "torch.nn.Module._backward_pre_hooks",
        "torch.nn.Module._compiled_call_impl",
        "torch.nn.Module._forward_hooks",
        "torch.nn.Module._forward_pre_hooks",
        "torch.nn._reduction.legacy_get_string",
        "torch.overrides._get_current_function_mode_stack",
        "torch.overrides._get_overridable_functions",
        "torch.overrides._get_tensor_methods",
        "torch.utils._pytree.tree_leaves",
    ],
    "2.7": ["torch.compiler._is_exporting_flag"],
    "2.8": ["torch._C._autograd._top_saved_tensors_default_hooks", "torch.distributed.tensor._op_schema.OpSpec"],
    "2.9": ["torch.distributed._composable.replicate_with_fsdp.ReplicateModule"],
}
