"""Compilations kept from one launch to the next.

Triton's own `kernel[grid](...)` looks up its compilation by every argument: 10.3 µs a launch on the host, where a kept one that
is launched by its public entry, `compiled[grid](...)`, takes 3.5 and by the private one used here 1.8 (a stub of a CUDA driver,
Triton 3.7). For small tensors launch overhead dominates, so these microseconds are what a user waits for.
"""

import os
import weakref

import torch
import triton
from triton import knobs
from triton.runtime import driver

from . import TESTED, minor_version
from .maths import INTERPRETED

# `CompiledKernel.run` is no public interface; the tested versions were read. Others launch by `kernel[grid]`.
KEEPS_COMPILATIONS = not INTERPRETED and minor_version(triton) in TESTED
# For each launcher: a network has dozens of shapes, and an entry takes about a kilobyte.
MAX_KEPT = 4096


def keep(kernel, device, compiled, programs, arguments, n_inputs):
    """A function that launches a compilation again, over the addresses it is given; None where nothing can be kept.

    It returns False where the launch has to go through Triton's own entry. It refers to the compilation itself: since Triton
    3.8 its module is unloaded when nothing does.
    """
    if not KEEPS_COMPILATIONS or compiled is None or _watched(kernel) or driver.active.get_current_device() != device:
        return None
    compiled_for = driver.active
    current_device, current_stream = compiled_for.get_current_device, compiled_for.get_current_stream
    if current_device is torch.cuda.current_device:
        # The same without its check for initialisation, which a tensor on the device has answered.
        current_device = torch._C._cuda_getDevice
    run = compiled.run
    # Where the class has no such chains of hooks, the object does, and is asked for them.
    entered, left = (getattr(type(knobs.runtime), f"launch_{when}_hook", None) for when in ("enter", "exit"))
    fixed = (compiled.packed_metadata, None, None, None)  # no metadata for hooks, and no hooks
    flat = _only_appends(run)
    if flat:
        fixed = (run.launch_cooperative_grid, run.launch_pdl, *fixed, None, None)  # and no scratch memory
        annotations, arguments = _flattened(compiled.src.signature.values(), arguments)
        fixed = (*fixed, annotations, run.kernel_signature)
        run = run.launch

    def launch(pointers) -> bool:
        if current_device() != device or driver.active is not compiled_for:
            return False
        # Whoever sets a knob gives this object an attribute of its own; to ask for any costs half of asking for each.
        if (vars(knobs.runtime) or entered.calls or left.calls or kernel.pre_run_hooks) and _watched(kernel):
            return False
        if flat:
            run(programs, 1, 1, current_stream(device), compiled.function, *fixed, (*pointers, *arguments))
        else:
            inputs, outputs = tuple(pointers[:n_inputs]), tuple(pointers[n_inputs:])
            run(programs, 1, 1, current_stream(device), compiled.function, *fixed, inputs, outputs, *arguments)
        return True

    return launch


def _only_appends(launch) -> bool:
    """Whether this is the CudaLauncher of Triton 3.7 or later, and does no more than to append arguments of its own."""
    return (
        type(launch).__name__ == "CudaLauncher"
        and hasattr(launch, "kernel_signature")
        and not (launch.global_scratch_size or launch.profile_scratch_size or getattr(launch, "gsan_enabled", False))
    )


def _flattened(signature, arguments) -> tuple[list, list]:
    """Triton's annotations of the pointers and of the arguments that a kernel gets, and these, without tuples or constants.

    An input that is None stays, as a constant.
    """
    from triton.backends.nvidia.driver import annotate_arguments

    inputs, outputs, *rest = signature
    kinds, values = [*inputs, *outputs], []

    def append(kind, value):
        if isinstance(kind, tuple):
            for pair in zip(kind, value, strict=True):
                append(*pair)
        elif kind != "constexpr":
            kinds.append(kind)
            values.append(value)

    append(tuple(rest), arguments)
    return annotate_arguments(kinds), values


def _watched(kernel) -> bool:
    """Whether a hook or a debugger expects launches to pass through Triton's own entry."""
    runtime = knobs.runtime
    try:
        return bool(
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
        )
    except AttributeError:  # someone has put another object in the place of Triton's chain of hooks
        return True


caches: weakref.WeakSet["Cache"] = weakref.WeakSet()


class Cache(dict):
    """What a launcher keeps, by what a compilation and its launch depend on."""

    __hash__ = object.__hash__

    def __init__(self):
        super().__init__()
        caches.add(self)

    def add(self, key, kept) -> None:
        if kept is not None:
            if len(self) >= MAX_KEPT:
                self.clear()
            self[key] = kept


def _forget_all():
    """Forget all in the child of a fork: neither a CUDA context nor the functions loaded into it survive one."""
    for cache in caches:
        cache.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
