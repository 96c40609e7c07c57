"""The kernels' machine code, compiled and executed without a GPU.

Compiled for NVIDIA's sm_75 to sm_120 and AMD's gfx90a and gfx942: registers, spills, widths of memory accesses and instructions
per element of each sigmoid kernel. Executed by tests/ptx, as sm_90 would: bytes moved and instructions issued by each operator
(see executed.py).

Writes code.csv and .json, and executed.csv and .json, to the folder `code`. Takes several minutes, or less if
Triton's cache holds the kernels.
"""

import re
import struct
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from torch_sigmoid import kernels

from . import executed, record

EVEN, ODD = 1 << 20, (1 << 20) + 7
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
INTEGERS = {torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}
CUDA_ARCHITECTURES = (75, 80, 90, 100, 120)
AMD_ARCHITECTURES = ("gfx90a", "gfx942")
EXECUTABLE = 4  # ELF's SHF_EXECINSTR
INSTRUCTION_BYTES = 16  # of every architecture since Volta


def targets() -> dict:
    from triton.backends.compiler import GPUTarget

    cuda = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in CUDA_ARCHITECTURES}
    return cuda | {arch: GPUTarget("hip", arch, 64) for arch in AMD_ARCHITECTURES}


def operators() -> dict:
    """Each sigmoid kernel: its launcher, and how many inputs and outputs it has."""
    from torch_sigmoid.kernels import sigmoid

    return {
        "forward": (sigmoid._forward, 1, 1),
        "backward-from-output": (sigmoid._backward[False], 2, 1),
        "backward-from-input": (sigmoid._backward[True], 2, 1),
        "double-backward-from-output": (sigmoid._double_backward[False], 3, 2),
        "double-backward-from-input": (sigmoid._double_backward[True], 3, 2),
    }


def compile_launch(launcher, inputs, outputs, target):
    """Compile what a launch over such tensors would run, every pointer on 16 bytes; they may be of the meta device."""
    import triton
    from triton.compiler import ASTSource

    from torch_sigmoid.kernels import launch

    _, arguments = launcher.arrange(inputs, outputs)
    signature, constexprs, attributes = {}, {}, {}

    def describe(value, path, specialised):
        """The type of an argument, or of what is at this path of indices inside it."""
        if isinstance(value, tuple):
            return tuple(describe(each, (*path, index), specialised) for index, each in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return (POINTERS | INTEGERS)[value.dtype]
        if value is None or isinstance(value, triton.language.constexpr) or (specialised and value == 1):
            constexprs[path] = value
            return "constexpr"
        if specialised and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    values = (tuple(inputs), tuple(outputs), *arguments, *launcher.constants)
    for index, (parameter, value) in enumerate(zip(launcher.kernel.params, values, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = describe(value, (index,), not parameter.do_not_specialize)
    source = ASTSource(launcher.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.NUM_WARPS, "enable_fp_fusion": True})


def compile_operator(operator, dtype, target, shape, strides=None):
    """Compile an element-wise operator over tensors of this shape and these strides."""
    launcher, n_inputs, n_outputs = operators()[operator]
    tensors = [
        torch.empty_strided(shape, own, dtype=dtype, device="meta") for own in strides or ((1,),) * (n_inputs + n_outputs)
    ]
    return compile_launch(launcher, tensors[:n_inputs], tensors[n_inputs:], target)


class Listing(NamedTuple):
    instructions: list[str]
    registers: int
    stack: int
    shared: int


def machine_code(cubin: bytes) -> bytes:
    """The executable sections of an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, n = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(n)]
    return b"".join(cubin[start : start + length] for _, _, flags, _, start, length in sections if flags & EXECUTABLE)


def disassemble(*compiled) -> list[Listing]:
    """Each NVIDIA kernel's listing: registers and bytes of stack are a thread's, bytes of shared memory a program's.

    All are for one target, and disassembled at once: nvdisasm takes as long to start as a kernel takes to compile.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    codes = [machine_code(each.asm["cubin"]) for each in compiled]
    (arch,) = {each.metadata.target.arch for each in compiled}

    def printed(tool, *options, of):
        with tempfile.NamedTemporaryFile() as file:
            file.write(of)
            file.flush()
            return subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout

    text = printed("nvdisasm", "--binary", f"SM{arch}", of=b"".join(codes))
    names = iter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", text))
    listings = []
    for each, code in zip(compiled, codes):
        instructions = [name for name in islice(names, len(code) // INSTRUCTION_BYTES) if not name.startswith("NOP")]
        usage = printed("cuobjdump", "--dump-resource-usage", of=each.asm["cubin"])
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        listings.append(Listing(instructions, int(registers), int(stack), each.metadata.shared))
    assert next(names, None) is None, "an instruction that is not 16 bytes long"
    return listings


def elements_per_thread() -> int:
    from torch_sigmoid.kernels import launch

    return launch.TILE_ELEMENTS // (launch.NUM_WARPS * 32)


def inspect(operator, dtype, arch, target, n) -> dict:
    """A row of the table; the instructions per element include those of the tail and of the set-up."""
    compiled = compile_operator(operator, dtype, target, (n,))
    row = {"target": arch, "operator": operator, "dtype": record.short(dtype), "n": n}
    if target.backend == "hip":
        return row | {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"]).group(1)),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]).group(1)),
        }
    ((instructions, registers, stack, _),) = disassemble(compiled)
    accesses = [name for name in instructions if name.startswith(("LDG", "STG"))]
    return row | {
        "registers": registers,
        "spills": stack + sum(name.startswith(("LDL", "STL")) for name in instructions),
        "accesses of 128 bit": sum(".128" in name for name in accesses),
        "accesses of the tail": sum(".128" not in name for name in accesses),
        "instructions per element": round(len(instructions) / elements_per_thread(), 1),
    }


def main(argv=None) -> int:
    arguments = record.parser("code", __doc__, device=False).parse_args(argv)
    if kernels.UNAVAILABLE or kernels.INTERPRETED:
        print(f"code: skipped, {kernels.UNAVAILABLE or 'TRITON_INTERPRET=1 compiles nothing'}")
        return 0
    work = [
        (operator, dtype, arch, target, n)
        for arch, target in targets().items()
        for operator in operators()
        for dtype in POINTERS
        for n in (EVEN, ODD)
    ]
    rows = [inspect(*step) for step in record.progress(work, "compiling and disassembling")]
    folder = arguments.out / "code"
    about = record.environment(torch.device("cpu")) | {"device": "none: compiled and disassembled"}
    record.write(folder, "code", rows, about)
    record.show("Machine code for sm_90", [row for row in rows if row["target"] == "sm_90"])
    rows = executed.measure()
    about["device"] = "none: PTX for sm_90, executed by tests/ptx"
    record.write(folder, "executed", rows, about)
    record.show("Executed", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
