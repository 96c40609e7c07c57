"""The kernels compiled for GPUs this machine need not have: access widths, spills, instructions, and ATen's arithmetic."""

import pathlib
import re
import subprocess

import pytest
import torch

import torch_sigmoid

triton = pytest.importorskip("triton")
if torch_sigmoid.functional.ops.kernels.UNAVAILABLE or torch_sigmoid.functional.ops.kernels.INTERPRETED:
    pytest.skip("compiles; the interpreter does not", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_sigmoid.kernels import launch
from torch_sigmoid.kernels import sigmoid as kernels

CUDA_TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 90, 100, 120)}
AMD_TARGETS = {arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")}
TARGETS = CUDA_TARGETS | AMD_TARGETS
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# The operator, its kernel, its number of tensors, its constants.
OPERATORS = {
    "forward": (kernels.sigmoid_forward_kernel, 2, {}),
    "backward-from-output": (kernels.sigmoid_backward_kernel, 3, {"FROM_INPUT": False}),
    "backward-from-input": (kernels.sigmoid_backward_kernel, 3, {"FROM_INPUT": True}),
    "double-backward-from-output": (kernels.sigmoid_double_backward_kernel, 5, {"FROM_INPUT": False}),
    "double-backward-from-input": (kernels.sigmoid_double_backward_kernel, 5, {"FROM_INPUT": True}),
}
EVEN, ODD = 1 << 20, (1 << 20) + 7
BIN = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_operator(operator, dtype, target, shape, strides):
    """Compile as a launch with these strides would, every pointer aligned."""
    kernel, tensors, constants = OPERATORS[operator]
    plan = launch.plan(shape, strides if strides else ((1,),) * tensors)
    integers = [*plan.row_strides, *plan.column_strides, plan.n_rows, plan.n_columns]
    names = kernel.arg_names
    signature = dict.fromkeys(names[:tensors], POINTERS[dtype])
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(tensors)}
    constexprs = constants | {
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLUMNS": plan.block_columns,
        "USE_INT64": plan.use_int64,
    }
    for index, (name, value) in enumerate(zip(names[tensors:], integers), start=tensors):
        if value is None or value == 1:
            constexprs[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in names}, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.NUM_WARPS, "enable_fp_fusion": True})


def disassemble(compiled, tmp_path):
    """Instructions, and the registers and bytes of stack of a thread."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])

    def dump(option):
        return subprocess.run([BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout

    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", dump("--dump-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
    return [name for name in instructions if not name.startswith("NOP")], int(registers), int(stack)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, EVEN, ODD], ids=["one", "even", "odd"])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_the_forward_kernel_compiles_for_every_target(dtype, n, target):
    assert compile_operator("forward", dtype, TARGETS[target], (n,), None).asm


@pytest.mark.parametrize("target", AMD_TARGETS)
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "forward"])
def test_the_other_kernels_compile_for_amd(operator, target):
    compiled = compile_operator(operator, torch.bfloat16, TARGETS[target], (ODD,), None)
    assert "scratch_load" not in compiled.asm["amdgcn"]


INSPECTED = [("forward", target, n) for target in CUDA_TARGETS for n in (EVEN, ODD)] + [
    (operator, target, ODD) for operator in OPERATORS if operator != "forward" for target in ("sm_80", "sm_90")
]


@pytest.mark.parametrize(("operator", "target", "n"), INSPECTED)
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_full_width_accesses_and_no_spills(operator, target, n, dtype, tmp_path):
    instructions, _, stack = disassemble(compile_operator(operator, dtype, TARGETS[target], (n,), None), tmp_path)
    assert stack == 0
    assert not any(name.startswith(("LDL", "STL")) for name in instructions)
    per_thread = launch.TILE_ELEMENTS // (launch.NUM_WARPS * 32)
    wide = per_thread * dtype.itemsize // 16
    tensors = OPERATORS[operator][1]
    stores = 2 if operator.startswith("double") else 1
    for prefix, count in (("LDG", tensors - stores), ("STG", stores)):
        widths = [name for name in instructions if name.startswith(prefix)]
        assert sum(".128" in name for name in widths) == count * wide
        assert sum(".128" not in name for name in widths) == count, "one scalar access an operand: the tail's"


# Measured ceilings, with Triton 3.7 on sm_90; the budget of a memory-bound kernel on an H200 is about 62 per fp32 element.
INSTRUCTIONS_PER_ELEMENT = {
    ("forward", torch.float32): 50,
    ("forward", torch.bfloat16): 50,
    ("backward-from-output", torch.float32): 12,
    ("backward-from-output", torch.bfloat16): 16,
    ("backward-from-input", torch.float32): 55,
    ("backward-from-input", torch.bfloat16): 57,
}


@pytest.mark.parametrize(("operator", "dtype"), INSTRUCTIONS_PER_ELEMENT, ids=str)
def test_instructions_per_element(operator, dtype, tmp_path):
    compiled = compile_operator(operator, dtype, TARGETS["sm_90"], (ODD,), None)
    instructions, registers, _ = disassemble(compiled, tmp_path)
    per_thread = launch.TILE_ELEMENTS // (launch.NUM_WARPS * 32)
    assert len(instructions) / per_thread <= INSTRUCTIONS_PER_ELEMENT[operator, dtype]
    assert registers <= 40


ROW_LAYOUTS = {
    # Shape, and strides of input and output; whether rows start where 16-byte accesses may.
    "chunk-half": ((4096, 512), ((1024, 1), (512, 1)), True),
    "odd-columns": ((4096, 501), ((1024, 1), (501, 1)), False),
    "expanded-rows": ((4096, 512), ((0, 1), (512, 1)), True),
}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_rows_are_read_in_full_width(layout, tmp_path):
    shape, strides, output_aligned = ROW_LAYOUTS[layout]
    compiled = compile_operator("forward", torch.bfloat16, TARGETS["sm_90"], shape, strides)
    instructions, _, stack = disassemble(compiled, tmp_path)
    assert stack == 0
    assert any(name.startswith("LDG.E.128") for name in instructions)
    assert any(name.startswith("STG.E.128") for name in instructions) == output_aligned


def test_an_expanded_gradient_is_loaded_once_a_row(tmp_path):
    compiled = compile_operator("backward-from-output", torch.float32, TARGETS["sm_90"], (ODD,), ((0,), (1,), (1,)))
    instructions, _, _ = disassemble(compiled, tmp_path)
    loads = [name for name in instructions if name.startswith("LDG")]
    # Body: one scalar gradient, two 16-byte loads of σ. Tail: one of each.
    assert sum(".128" in name for name in loads) == 2
    assert len(loads) == 5


FAR_LAYOUTS = {
    "strided": ((2**29 + 7,), ((8,), (1,))),
    "rows": ((2**20, 2**12 + 7), ((2**13, 1), (2**12 + 7, 1))),
    "wide-rows": ((2, 2**31 - 10), ((2**31, 1), (2**31 - 10, 1))),
    "transposed": ((2**16, 2**16 + 1), ((1, 2**16), (2**16 + 1, 1))),
}


@pytest.mark.parametrize("layout", FAR_LAYOUTS)
def test_no_offset_of_a_64_bit_plan_is_computed_in_32_bits(layout):
    shape, strides = FAR_LAYOUTS[layout]
    assert launch.plan(shape, strides).use_int64
    ttir = compile_operator("forward", torch.float32, TARGETS["sm_90"], shape, strides).asm["ttir"]
    assert not re.findall(r"arith\.muli .*: tensor<.*xi32>", ttir)
    assert not re.findall(r"tt\.addptr .*, tensor<[0-9x]*[1-9][0-9]+xi32>", ttir)
    assert not re.findall(r"arith\.divsi .*: i32", ttir)


def test_the_forward_arithmetic_is_atens():
    """nvcc compiles `one / (one + std::exp(-x))` to CUDA's expf with its last product fused into the sum, then rcp.rn.

    A correctly rounded 1/d is the same from div.rn. What differs, .ftz on intermediate results, only concerns numbers too
    small to change 1 + exp(-x) or the exponent that exp splits off. N1 rests on these instructions until a GPU confirms it.
    """
    ptx = compile_operator("forward", torch.float32, TARGETS["sm_90"], (EVEN,), None).asm["ptx"]
    one = "0f3F800000"
    assert "ex2.approx.ftz.f32" in ptx
    assert re.search(rf"fma\.rn\.f32 \s*%\w+, %\w+, %\w+, (%\w+|{one});", ptx)
    assert not re.search(r"div\.full|div\.approx|rcp\.approx", ptx)
    assert re.search(r"(div|rcp)\.rn\.f32", ptx)
    # CUDA's expf: the scaling by 1/252 · log2(e), its offset, and the two halves of log2(e).
    for constant in ("0f3BBB989D", "0f4B400001", "0f3FB8AA3B", "0f32A57060"):
        assert constant in ptx


def test_the_backward_is_not_contracted():
    """grad·(1-σ)·σ in ATen's order: one subtraction and two products, no fused multiply-add in between."""
    ptx = compile_operator("backward-from-output", torch.float32, TARGETS["sm_90"], (EVEN,), None).asm["ptx"]
    assert "fma.rn" not in ptx
    assert "sub.f32" in ptx
    assert "mul.f32" in ptx
