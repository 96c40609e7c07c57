"""The kernels' machine code, without a GPU: registers, spills, access widths and instructions per element for each target."""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torch_sigmoid import kernels

from . import record

EVEN, ODD = 1 << 20, (1 << 20) + 7
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CUDA_ARCHITECTURES = (75, 80, 90, 100, 120)
AMD_ARCHITECTURES = ("gfx90a", "gfx942")


def targets() -> dict:
    from triton.backends.compiler import GPUTarget

    cuda = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in CUDA_ARCHITECTURES}
    return cuda | {arch: GPUTarget("hip", arch, 64) for arch in AMD_ARCHITECTURES}


def operators() -> dict:
    """The kernel, the number of its inputs and outputs, and its constants."""
    from torch_sigmoid.kernels import sigmoid

    return {
        "forward": (sigmoid.sigmoid_forward_kernel, 1, 1, {}),
        "backward-from-output": (sigmoid.sigmoid_backward_kernel, 2, 1, {"FROM_INPUT": False}),
        "backward-from-input": (sigmoid.sigmoid_backward_kernel, 2, 1, {"FROM_INPUT": True}),
        "double-backward-from-output": (sigmoid.sigmoid_double_backward_kernel, 3, 2, {"FROM_INPUT": False}),
        "double-backward-from-input": (sigmoid.sigmoid_double_backward_kernel, 3, 2, {"FROM_INPUT": True}),
    }


def compile_operator(operator, dtype, target, shape, strides=None):
    """Compile as a launch over tensors of this shape and these strides would, every pointer on 16 bytes."""
    import triton
    from triton.compiler import ASTSource

    from torch_sigmoid.kernels import launch

    kernel, n_inputs, n_outputs, constants = operators()[operator]
    n_tensors = n_inputs + n_outputs
    plan = launch.plan(shape, strides or ((1,),) * n_tensors)
    names = kernel.arg_names
    signature = dict.fromkeys(names[:n_tensors], POINTERS[dtype])
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(n_tensors)}
    constexprs = constants | {
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLUMNS": plan.block_columns,
        "USE_INT64": plan.use_int64,
    }
    integers = [*plan.row_strides, *plan.column_strides, plan.n_rows, plan.n_columns]
    for index, (name, value) in enumerate(zip(names[n_tensors:], integers), start=n_tensors):
        if value is None or (value == 1 and name not in launch.SIZES):
            constexprs[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in launch.SIZES:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in names}, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.NUM_WARPS, "enable_fp_fusion": True})


def disassemble(compiled):
    """The instructions of an NVIDIA kernel, and the registers and bytes of stack of a thread, by Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option):
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", dump("--dump-sass"))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
    return [name for name in instructions if not name.startswith("NOP")], int(registers), int(stack)


def elements_per_thread() -> int:
    from torch_sigmoid.kernels import launch

    return launch.TILE_ELEMENTS // (launch.NUM_WARPS * 32)


def inspect(operator, dtype, arch, target, n) -> dict:
    """One row of the table. Per element counts every instruction of the kernel, those of the tail and of the set-up too."""
    compiled = compile_operator(operator, dtype, target, (n,))
    row = {"target": arch, "operator": operator, "dtype": record.short(dtype), "n": n}
    if target.backend == "hip":
        return row | {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"]).group(1)),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]).group(1)),
        }
    instructions, registers, stack = disassemble(compiled)
    accesses = [name for name in instructions if name.startswith(("LDG", "STG"))]
    return row | {
        "registers": registers,
        "spills": stack + sum(name.startswith(("LDL", "STL")) for name in instructions),
        "accesses of 128 bit": sum(".128" in name for name in accesses),
        "accesses of the tail": sum(".128" not in name for name in accesses),
        "instructions per element": round(len(instructions) / elements_per_thread(), 1),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.code", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results")
    arguments = parser.parse_args(argv)
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
    folder = (arguments.out or record.RESULTS) / "code"
    about = record.environment(torch.device("cpu")) | {"device": "none: compiled and disassembled"}
    record.write(folder, "code", rows, about)
    record.show("Machine code for sm_90", [row for row in rows if row["target"] == "sm_90"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
