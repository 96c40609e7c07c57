"""A GPU for Triton that numpy executes: tensors on a CPU take the kernels' path.

The package's own `Launcher`, Triton's binder and its compiler run unchanged, but that the compiler ends at PTX, which is
executed where a GPU would be handed machine code. `activate` puts this device in place, for the rest of the process.
"""

import functools
import os

import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from .arithmetic import EXACT
from .machine import launch
from .memory import Operand
from .program import Program, PtxError, parse

# Outputs that a kernel also reads: it adds to what is there.
READ_TOO = frozenset((("add_to_totals_kernel", "outputs[0]"),))
# Outputs of which some elements may stay as they were: units in which nothing was alive, and sums that a smaller chunk leaves.
MAY_STAY_UNWRITTEN = frozenset(
    (
        ("activation_kernel", "outputs[1]"),
        ("pairs_forward_kernel", "outputs[0]"),
        ("pairs_gradient_kernel", "outputs[1]"),
        ("pairs_gradient_kernel", "outputs[2]"),
    )
)


class _Compiler(CUDABackend):
    """NVIDIA's, without ptxas."""

    @staticmethod
    def supports_target(target):
        return target.backend == "ptx"

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, *arguments):
        super().add_stages(stages, *arguments)
        del stages["cubin"]

    def hash(self):
        return f"{super().hash()}-ptx"


class _Utils:
    """What Triton asks of a driver's library: the limits of an H100, and a handle for each compiled kernel."""

    def __init__(self, device):
        self.device = device

    def get_device_properties(self, index):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, binary, shared_bytes, index):
        handle = len(self.device.texts)
        self.device.texts.append((name, binary.decode()))
        n_registers, n_spills, max_threads = 32, 0, 1024
        return handle, handle, n_registers, n_spills, max_threads  # a module holds one function, and has its number

    def unload_module(self, module):
        """Triton 3.8 and newer unload a compilation that nothing refers to, and its function with it."""
        name, _ = self.device.texts[module]
        self.device.texts[module] = name, None


class Device(CudaDriver):
    """Triton's driver of the machine that executes PTX.

    Attributes:
        model: the error of the approximate instructions.
        reports: a `Report` for each launch, if it is a list; None keeps none.
        only: `only(n_programs)` gives the programs to run, in place of all.
        rewrite: `rewrite(name, ptx)` gives the PTX to execute in place of a kernel's own.
    """

    def __init__(self, arch):
        self.arch = arch
        self.utils = _Utils(self)
        self.launcher_cls = functools.partial(_Launch, self)
        self.texts: list[tuple[str, str | None]] = []  # name and PTX, by handle; no PTX once it is unloaded
        self.programs: dict[str, Program] = {}  # by PTX
        self.tensors: list[tuple] = []  # inputs and outputs of the launches under way
        self.model = EXACT
        self.reports = None
        self.only = None
        self.rewrite = None
        # The index of tensors on a CPU.
        self.get_current_device = lambda: -1
        self.set_current_device = lambda index: None
        self.get_current_stream = lambda index: 0
        self.get_device_capability = lambda index=None: divmod(arch, 10)

    def get_current_target(self):
        return GPUTarget("ptx", self.arch, 32)

    def program(self, text):
        """The kernel in a text, parsed once."""
        if text not in self.programs:
            self.programs[text] = parse(text)
        return self.programs[text]

    def observe(self, launcher):
        """Make a class of launchers tell this device what a launch reads and writes."""
        call = launcher.__call__

        def observed(launcher, inputs, outputs, known=None):
            self.tensors.append((inputs, outputs))
            try:
                call(launcher, inputs, outputs, known)
            finally:
                self.tensors.pop()

        launcher.__call__ = observed


class _Launch:
    """What stands in the place of Triton's CudaLauncher for one compiled kernel."""

    def __init__(self, device, source, metadata):
        self.device = device
        self.names = list(source.fn.arg_names)
        # In place of "inputs[0]" the name that a kernel's formula has for it.
        formula = source.fn.fn.__globals__.get("FORMULA")
        self.inputs = {f"inputs[{index}]": name for index, name in enumerate(formula.arg_names if formula else ())}
        self.signature = source.signature
        self.threads = 32 * metadata.num_warps
        self.shared = metadata.shared

    def __call__(self, n_programs, grid_y, grid_z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments):
        assert grid_y == grid_z == 1
        device = self.device
        name, text = device.texts[function]
        if text is None:
            raise PtxError(f"{name} is launched after it was unloaded")
        if device.rewrite is not None:
            text = device.rewrite(name, text)
        program = device.program(text)
        given = [each for pair in zip(self.names, arguments, strict=True) for each in self._given(*pair)]
        values = [value for _, _, value in given]
        # Scratch memory, of which these kernels need none.
        n_scratch = len(program.parameters) - len(values)
        assert n_scratch in (0, 1, 2), f"{name} has {n_scratch} parameters more than arguments"
        values += [0] * n_scratch
        report = launch(
            program,
            n_programs,
            self.threads,
            values,
            self._operands(name, [self.inputs.get(parameter, parameter) for parameter, kind, _ in given if kind[0] == "*"]),
            shared=self.shared,
            model=device.model,
            only=None if device.only is None else device.only(n_programs),
            count_sectors=device.reports is not None,
        )
        if device.reports is not None:
            device.reports.append(report)

    def _given(self, name, value, kind=None):
        """Name, type and number of what is passed to the kernel for a parameter; constants are compiled in."""
        kind = self.signature[name] if kind is None else kind
        if isinstance(kind, tuple):
            for index, (each, its_kind) in enumerate(zip(value, kind)):
                yield from self._given(f"{name}[{index}]", each, its_kind)
        elif kind != "constexpr":
            yield name, kind, value.data_ptr() if hasattr(value, "data_ptr") else value

    def _operands(self, kernel, names):
        inputs, outputs = self.device.tensors[-1]
        tensors = [(tensor, True, False) for tensor in inputs if tensor is not None]
        tensors += [(tensor, False, True) for tensor in outputs]
        assert len(names) == len(tensors), f"{len(names)} pointers for {len(tensors)} tensors"
        return [
            Operand(name, tensor, is_input or (kernel, name) in READ_TOO, is_output, (kernel, name) in MAY_STAY_UNWRITTEN)
            for name, (tensor, is_input, is_output) in zip(names, tensors)
        ]


def activate(arch: int = 90) -> Device:
    """Make this machine run kernels, for tensors on a CPU.

    Args:
        arch: the compute capability that Triton compiles for: 80, 90 or 100.
    """
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter does not compile"
    from torch_sigmoid import dispatch, nn
    from torch_sigmoid.kernels.launch import Launcher

    device = Device(arch)
    backends["ptx"] = Backend(_Compiler, Device)
    driver.set_active(device)
    device.observe(Launcher)
    refusal = dispatch.kernels_refusal
    dispatch.kernels_refusal = functools.cache(lambda device: None if device.type == "cpu" else refusal(device))
    dispatch.KERNELS_EXIST = True
    nn._TORCH_ALONE = False
    assert torch.empty(0).get_device() == device.get_current_device()
    return device
