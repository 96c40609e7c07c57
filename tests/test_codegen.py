"""The kernels compiled for GPUs this machine need not have: access widths, spills, instructions, and ATen's arithmetic."""

import ast
import re
from pathlib import Path

import pytest
import torch

import torch_sigmoid

triton = pytest.importorskip("triton")
if torch_sigmoid.kernels.UNAVAILABLE or torch_sigmoid.kernels.INTERPRETED:
    pytest.skip("compiles; the interpreter does not", allow_module_level=True)

from ptx import parse
from ptx.instructions import check

from benchmarks.measure.code import (
    AMD_ARCHITECTURES,
    EVEN,
    ODD,
    POINTERS,
    compile_launch,
    compile_operator,
    disassemble,
    elements_per_thread,
    operators,
    targets,
)
from torch_sigmoid.kernels import gates, interleaved, launch, losses, reduce, siglip, statistics
from torch_sigmoid.losses import Loss

TARGETS = targets()
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
CUDA_TARGETS = [arch for arch in TARGETS if arch.startswith("sm_")]
OPERATORS = operators()
# Two targets of NVIDIA and two of AMD share what is compiled for them beside sm_90: every other launch, from this one on.
OTHER_TARGETS = {"sm_80": 0, "sm_100": 1, "gfx90a": 0, "gfx942": 1}
# float16 differs from bfloat16 in conversions alone, which the tests of the sigmoid kernels and of interleaved pairs see.
every_dtype_and_target = pytest.mark.parametrize(
    ("dtype", "target"),
    [(dtype, "sm_90") for dtype in POINTERS if dtype is not torch.float16] + [(torch.bfloat16, arch) for arch in OTHER_TARGETS],
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, EVEN, ODD], ids=["one", "even", "odd"])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_the_forward_kernel_compiles_for_every_target(dtype, n, target):
    assert compile_operator("forward", dtype, TARGETS[target], (n,)).asm


@pytest.mark.parametrize("target", AMD_ARCHITECTURES)
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "forward"])
def test_the_other_kernels_compile_for_amd(operator, target):
    compiled = compile_operator(operator, torch.bfloat16, TARGETS[target], (ODD,))
    assert "scratch_load" not in compiled.asm["amdgcn"]


INSPECTED = [("forward", target, n) for target in CUDA_TARGETS for n in (EVEN, ODD)] + [
    (operator, target, ODD) for operator in OPERATORS if operator != "forward" for target in ("sm_80", "sm_90")
]


@pytest.mark.parametrize(("operator", "target", "n"), INSPECTED)
def test_full_width_accesses_and_no_spills(operator, target, n):
    compiled = [compile_operator(operator, dtype, TARGETS[target], (n,)) for dtype in POINTERS]
    for dtype, each, (instructions, _, stack, _) in zip(POINTERS, compiled, disassemble(*compiled)):
        check(parse(each.asm["ptx"]))  # which --kernels=ptx can execute
        assert stack == 0, dtype
        assert not any(name.startswith(("LDL", "STL")) for name in instructions), dtype
        wide = elements_per_thread() * dtype.itemsize // 16
        _, n_inputs, n_outputs = OPERATORS[operator]
        for prefix, count in (("LDG", n_inputs), ("STG", n_outputs)):
            widths = [name for name in instructions if name.startswith(prefix)]
            assert sum(".128" in name for name in widths) == count * wide, dtype
            # One scalar access an operand: the tail's.
            assert sum(".128" not in name for name in widths) == count, dtype


# At 4.3 TB/s an H200 has issue slots for about 62 instructions per fp32 element and 31 per 16-bit one; all instructions of the
# kernel are counted, those of the tail and the set-up too.
INSTRUCTIONS_PER_ELEMENT = {torch.float32: 50, torch.bfloat16: 24, torch.float16: 24}


@pytest.mark.parametrize("n", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("operator", ["forward", "backward-from-output", "backward-from-input"])
def test_instructions_per_element_and_registers(operator, n):
    compiled = (compile_operator(operator, dtype, TARGETS["sm_90"], (n,)) for dtype in INSTRUCTIONS_PER_ELEMENT)
    for (dtype, allowed), (instructions, registers, _, _) in zip(INSTRUCTIONS_PER_ELEMENT.items(), disassemble(*compiled)):
        assert len(instructions) / elements_per_thread() <= allowed, dtype
        assert registers <= 32, "more would leave warps out of a multiprocessor"


@pytest.mark.parametrize("operator", ["backward-from-input", "double-backward-from-input"])
def test_16_bit_takes_a_cheaper_arithmetic_than_fp32(operator):
    dtypes = torch.float32, torch.bfloat16, torch.float16
    wide, *narrow = disassemble(*(compile_operator(operator, dtype, TARGETS["sm_90"], (EVEN,)) for dtype in dtypes))
    assert all(len(each.instructions) < 0.8 * len(wide.instructions) for each in narrow)


ROW_LAYOUTS = {
    # Shape, and strides of input and output; the width of loads; whether the output's rows start where 16-byte accesses may.
    "chunk-half": ((4096, 512), ((1024, 1), (512, 1)), 128, True),
    "odd-columns": ((4096, 501), ((1024, 1), (501, 1)), 128, False),
    # Each number is loaded once for both rows of a tile, so a thread has 4 of them to load.
    "expanded-rows": ((4096, 512), ((0, 1), (512, 1)), 64, True),
    "expanded-wide-rows": ((4096, 2048), ((0, 1), (2048, 1)), 128, True),
    "block": ((64, 64, 512), ((2**17, 2**10, 1), (2**15, 512, 1)), 128, True),
}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_rows_are_read_in_full_width(layout):
    shape, strides, width, output_aligned = ROW_LAYOUTS[layout]
    compiled = compile_operator("forward", torch.bfloat16, TARGETS["sm_90"], shape, strides)
    ((instructions, registers, stack, _),) = disassemble(compiled)
    assert stack == 0
    assert registers <= 32
    assert len(instructions) / elements_per_thread() <= 42
    # In the body by the width, and in the tail one by one.
    loads = [name for name in instructions if name.startswith("LDG")]
    assert len(loads) == 2
    assert any(name.startswith(f"LDG.E.{width}") for name in loads)
    assert any(name.startswith("STG.E.128") for name in instructions) == output_aligned


def test_an_expanded_gradient_is_loaded_once_a_row():
    compiled = compile_operator("backward-from-output", torch.float32, TARGETS["sm_90"], (ODD,), ((0,), (1,), (1,)))
    ((instructions, _, _, _),) = disassemble(compiled)
    loads = [name for name in instructions if name.startswith("LDG")]
    # Body: one scalar gradient, two 16-byte loads of σ. Tail: one of each.
    assert sum(".128" in name for name in loads) == 2
    assert len(loads) == 5


FAR_LAYOUTS = {
    "strided": ((2**29 + 7,), ((8,), (1,))),
    "rows": ((2**20, 2**12 + 7), ((2**13, 1), (2**12 + 7, 1))),
    "wide-rows": ((2, 2**31 - 10), ((2**31, 1), (2**31 - 10, 1))),
    "transposed": ((2**16, 2**16 + 1), ((1, 2**16), (2**16 + 1, 1))),
    "matrices": ((2**9, 2**10, 2**12 + 7), ((2**24, 2**13, 1), (2**10 * (2**12 + 7), 2**12 + 7, 1))),
}


def assert_no_offset_is_computed_in_32_bits(compiled):
    ttir = compiled.asm["ttir"]
    assert not re.findall(r"arith\.muli .*: tensor<.*xi32>", ttir)
    assert not re.findall(r"tt\.addptr .*, tensor<[0-9x]*[1-9][0-9]+xi32>", ttir)
    assert not re.findall(r"arith\.(div|rem)si .*: i32", ttir)


@pytest.mark.parametrize("layout", FAR_LAYOUTS)
def test_no_offset_of_a_64_bit_plan_is_computed_in_32_bits(layout):
    shape, strides = FAR_LAYOUTS[layout]
    assert launch.plan(shape, strides).use_int64
    assert_no_offset_is_computed_in_32_bits(compile_operator("forward", torch.float32, TARGETS["sm_90"], shape, strides))


FAR_GATES = [((2**17, 2**14 + 7), (2**17, 1)), ((2**17, 2**14 + 7), (1, 2**14 + 7)), ((2**9, 2**10, 2**13), (2**9, 1, 2**13))]


@pytest.mark.parametrize(("shape", "gate_shape"), FAR_GATES, ids=str)
def test_no_offset_of_a_64_bit_sum_along_a_dimension_is_computed_in_32_bits(shape, gate_shape):
    full, gate, sums = meta(*shape), meta(*gate_shape).expand(shape), meta(2, 2, 2)
    backward, _ = gates.broadcast_launchers(*GATES["gate"])
    inputs, outputs = [full, full, gate], [full, sums]
    assert_no_offset_is_computed_in_32_bits(compile_launch(backward, inputs, outputs, TARGETS["sm_90"]))


@pytest.mark.parametrize("shape", [(2**32,), (2**17, 2**15 + 22)], ids=str)
def test_no_offset_of_more_than_two_to_the_31_interleaved_elements_is_computed_in_32_bits(shape):
    packed = meta(*shape)[..., : shape[-1] - 8]
    single = torch.empty_like(packed[..., ::2])
    forward, backward, _ = interleaved.launchers(*GATES["swiglu"])
    for launcher, inputs, outputs in ((forward, [packed], [single]), (backward, [single, packed], [packed])):
        assert_no_offset_is_computed_in_32_bits(compile_launch(launcher, inputs, outputs, TARGETS["sm_90"]))


def test_the_forward_arithmetic_is_atens():
    """nvcc compiles `one / (one + std::exp(-x))` to CUDA's expf with its last product fused into the sum, then rcp.rn.

    A correctly rounded 1/d is the same from div.rn. What differs, .ftz on intermediate results, only concerns numbers too
    small to change 1 + exp(-x) or the exponent that exp splits off. N1 rests on these instructions until a GPU confirms it.
    """
    ptx = compile_operator("forward", torch.float32, TARGETS["sm_90"], (EVEN,)).asm["ptx"]
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
    ptx = compile_operator("backward-from-output", torch.float32, TARGETS["sm_90"], (EVEN,)).asm["ptx"]
    assert "fma.rn" not in ptx
    assert "sub.f32" in ptx
    assert "mul.f32" in ptx


def test_no_function_returns_none_beside_a_value():
    """Which Triton 3.6 cannot compile, where later versions can."""
    for path in Path(launch.__file__).parent.glob("*.py"):
        functions = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.FunctionDef)]
        for each in (each for each in functions if "jit" in "".join(map(ast.unparse, each.decorator_list))):
            returned = [node.value for node in ast.walk(each) if isinstance(node, ast.Return)]
            values = [value for node in returned if isinstance(node, ast.Tuple) for value in node.elts]
            assert not any(isinstance(value, ast.Constant) and value.value is None for value in values), each.name


def meta(*shape, dtype=torch.float64):
    return torch.empty(shape, dtype=dtype, device="meta")


def statistics_launches(dtype, kinds=statistics.DERIVATIVES):
    """What a watch launches for a batch of features, for channels of an image, and for a gradient."""
    arithmetic = torch.float64 if dtype is torch.float64 else torch.float32
    bounds, alive = meta(8, dtype=arithmetic), meta(1024, dtype=torch.float32)
    features, channels = meta(4096, 1024, 1, dtype=dtype), meta(64, 1024, 256, dtype=dtype)
    for kind, scale in (*((kind, 1.0) for kind in kinds), ("silu", 1.702)):
        launcher = statistics._activation(kind, scale)
        yield f"{kind} of features", launcher, (features, bounds), (meta(4096, 5), alive)
        yield f"{kind} of channels", launcher, (channels, bounds), (meta(16384, 5), alive)
    yield "squares", statistics._squares, (meta(1 << 20, dtype=dtype),), (meta(1024, 2),)
    yield "fold", statistics._fold_activation, (meta(16384, 5),), (meta(5),)
    yield "streak", statistics._streak, (alive, alive), (alive, alive)


def shown_on(target, dtype, launches):
    """All on sm_90 in the dtypes whose instructions are counted. Else second derivatives, which hold more registers than values
    and gradients, and what has none; on the other targets of NVIDIA, and of AMD, in turn.
    """
    if target == "sm_90" and dtype in INSTRUCTIONS_PER_ELEMENT:
        return list(launches)
    most = [launch for launch in launches if not re.search(" (forward|backward)", launch[0])]
    return most if target == "sm_90" else most[OTHER_TARGETS[target] :: 2]


def listings(launches, target):
    """Each launch, compiled and disassembled, once the tests can execute it and it adds to memory nowhere.

    There are none for AMD's targets, of which Triton brings no tool: they must not spill.
    """
    launches = list(launches)
    compiled = [compile_launch(launcher, inputs, outputs, TARGETS[target]) for _, launcher, inputs, outputs, *_ in launches]
    if target in AMD_ARCHITECTURES:
        for (name, *_), each in zip(launches, compiled):
            assert "scratch_load" not in each.asm["amdgcn"], name
        return
    for about, each, listing in zip(launches, compiled, disassemble(*compiled)):
        check(parse(each.asm["ptx"]))
        assert not {"ATOM", "ATOMG", "RED", "REDG"} & {name.split(".")[0] for name in listing.instructions}, about[0]
        yield about, listing


@every_dtype_and_target
def test_the_statistics_read_in_full_width_and_hardly_spill(dtype, target):
    kinds = statistics.DERIVATIVES if target == "sm_90" and dtype in INSTRUCTIONS_PER_ELEMENT else ()
    for (name, *_), (instructions, _, stack, _) in listings(statistics_launches(dtype, kinds), target):
        # Where ptxas wants one register less than the reductions take, it puts two of a program's sums aside.
        assert stack <= 16, name
        if name not in ("fold", "streak"):
            wide = [instruction for instruction in instructions if instruction.startswith("LDG") and ".128" in instruction]
            assert len(wide) == elements_per_thread() * dtype.itemsize // 16, name


GATES = {
    "gate": ("sigmoid", 1.0, None, 0.0),
    "swiglu": ("silu", 1.0, None, 0.0),
    "clamped": ("silu", 1.702, 7.0, 1.0),
}
ORDERS = ("forward", "backward", "double-backward")


def interleaved_launches(name, order, dtype):
    """As `gate_launches`: of a whole tensor of pairs, and of one whose rows are a slice."""
    launcher = interleaved.launchers(*GATES[name])[ORDERS.index(order)]
    for of, packed in (
        ("", meta(2 * ODD, dtype=dtype)),
        (" of rows", meta(4096, 8192, dtype=dtype)[:, :4096]),
    ):
        single = torch.empty_like(packed[..., ::2])
        inputs, outputs = {
            "forward": ([packed], [single]),
            "backward": ([single, packed], [packed]),
            "double-backward": ([single, packed, packed], [single, packed]),
        }[order]
        moved = sum(tensor.numel() // single.numel() for tensor in (*inputs, *outputs))
        yield f"interleaved {name} {order}{of}", launcher, inputs, outputs, moved, False


def gate_launches(dtype):
    """Launchers with inputs and outputs, how many full tensors each moves, and whether the gate is broadcast."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    dense = meta(ODD, dtype=dtype)
    for function in ("silu", "logsigmoid"):
        for order, launcher, n_inputs, n_outputs in zip(ORDERS, gates.unary_launchers(function, 1.0), (1, 2, 3), (1, 1, 2)):
            yield f"{function} {order}", launcher, [dense] * n_inputs, [dense] * n_outputs, n_inputs + n_outputs, False
    half = meta(4096, 2048, dtype=dtype).chunk(2, 1)[0]
    for name, gate in GATES.items():
        for order, launcher, n_inputs, n_outputs in zip(ORDERS, gates.gate_launchers(*gate), (2, 3, 5), (1, 2, 3)):
            for of, tensor in (("", dense), (" of halves", half)):
                moved = n_inputs + n_outputs
                yield f"{name} {order}{of}", launcher, [tensor] * n_inputs, [tensor] * n_outputs, moved, False
    for order in ORDERS:
        yield from interleaved_launches("clamped", order, dtype)
    for of, shape, gate_shape in (
        ("channels", (32768, 3136), (32768, 1)),
        ("heads", (8192, 64), (8192, 1)),
        ("channels last", (32, 3136, 256), (32, 1, 256)),
    ):
        full, sums = meta(*shape, dtype=dtype), meta(2, 2, 2, dtype=wide)
        gate = meta(*gate_shape, dtype=dtype).expand(shape)
        backward, double_backward = gates.broadcast_launchers(*GATES["gate"])
        yield f"{of} forward", gates.gate_launchers(*GATES["gate"])[0], [full, gate], [full], 2, True
        yield f"{of} backward", backward, [full, full, gate], [full, sums], 3, True
        yield f"{of} double-backward", double_backward, [full, full, full, gate, gate], [full, full, sums], 5, True


@every_dtype_and_target
def test_the_gates_move_16_bytes_an_access_within_what_memory_leaves_time_for(dtype, target):
    # Of 62 issue slots an fp32 element that is read and written, and half that in 16 bit, see INSTRUCTIONS_PER_ELEMENT.
    slots = {torch.float32: 31, torch.bfloat16: 15.5}.get(dtype, float("inf"))
    launches = shown_on(target, dtype, gate_launches(dtype))
    for (name, *_, moved, is_broadcast), (instructions, _, stack, _) in listings(launches, target):
        # Missed with Triton 3.8 and newer in float64, where second derivatives take every register: see results/tried.md.
        spilled = dtype is torch.float64 and "double-backward" in name and TRITON >= (3, 8)
        assert stack <= (128 if spilled else 16), name
        accesses = [each for each in instructions if each.startswith(("LDG", "STG")) and ".128" in each]
        assert len(accesses) >= moved * elements_per_thread() * dtype.itemsize // 16, name
        # The sums of a broadcast gate are set-up, counted though a program does them once.
        if target == "sm_90":
            allowed = moved * slots * (1.25 if is_broadcast else 1)
            assert len(instructions) / elements_per_thread() <= allowed, name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_interleaved_pairs_are_split_and_joined_in_registers(order, dtype, target):
    """Accesses have 16 bytes but for one scalar a value in the tail, and no thread hands values to another."""
    launches = interleaved_launches("swiglu", order, dtype)
    for (name, _, inputs, outputs, *_), (instructions, _, stack, shared) in listings(launches, target):
        assert shared == stack == 0, name
        assert not any(each.startswith(("SHFL", "LDS", "STS", "LDL", "STL")) for each in instructions), name
        n_pairs = min(tensor.numel() for tensor in (*inputs, *outputs))
        for prefix, tensors in (("LDG", inputs), ("STG", outputs)):
            values = sum(tensor.numel() for tensor in tensors) // n_pairs
            widths = [each for each in instructions if each.startswith(prefix)]
            assert sum(".128" in each for each in widths) == values * elements_per_thread() * dtype.itemsize // 16, name
            in_tail = sum(".128" not in each for each in widths)
            # Triton 3.6 loads both values of each pair twice there, in this one kernel.
            twice = TRITON < (3, 7) and (prefix, order, dtype, target) == ("LDG", "double-backward", torch.bfloat16, "sm_80")
            assert in_tail == (2 * values - 1 if twice else values), name


def loss_launches(dtype):
    """Launchers of the losses with inputs and outputs, how many full tensors each moves, and γ."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, partials, number = meta(ODD, dtype=dtype), meta(2048, dtype=wide), meta(1, dtype=dtype).expand(ODD)
    counts, count = meta(2048, dtype=torch.int64), meta(1, dtype=torch.int64)
    for gamma in (0.0, 2.0):
        for reduction in ("none", "mean"):
            loss = Loss(gamma, 0.25 if gamma else None, reduction=reduction)
            forward, backward, double_backward = losses.loss_launchers(loss)
            full = reduction == "none"
            output, upstream = (x, x) if full else (partials, number)
            inputs = [x, x, None, None]
            yield f"{loss} forward", forward, inputs, [output], 2 + full, gamma
            yield f"{loss} backward", backward, [*inputs, upstream, None], [x], 3 + full, gamma
            yield f"{loss} double-backward", double_backward, [*inputs, x, upstream, None], [x, output], 4 + 2 * full, gamma
    target, weighted = meta(ODD, dtype=torch.int64), Loss(label_smoothing=0.1, ignore_index=-100)
    forward, backward, double_backward = losses.loss_launchers(weighted)
    inputs, by = [x, target, number, number], count.expand(ODD)
    yield "weighted forward", forward, inputs, [partials, counts], 2, 0.0
    yield "weighted backward", backward, [*inputs, number, by], [x], 2, 0.0
    yield "weighted double-backward", double_backward, [*inputs, x, number, by], [x, partials], 4, 0.0
    yield "fold", reduce._fold, [partials], [meta(dtype=dtype)], 0, 0.0
    yield "fold of counts", reduce._fold, [partials, counts], [meta(dtype=dtype), count], 0, 0.0
    shape = (256, 4096)
    similarity, factor = meta(*shape, dtype=dtype), meta(dtype=wide).expand(shape)
    ids = meta(256, 1, dtype=torch.int64).expand(shape), meta(4096, dtype=torch.int64).expand(shape)
    inputs = [similarity, *ids, factor, factor]
    yield "pairs", siglip._forward, inputs, [partials], 1, 0.0
    yield "pairs and gradients", siglip._gradient, inputs, [similarity, partials, partials, partials], 2, 0.0


def all_launches(dtype):
    yield from statistics_launches(dtype)
    yield from gate_launches(dtype)
    yield from loss_launches(dtype)
    for name, (launcher, n_inputs, n_outputs) in OPERATORS.items():
        yield name, launcher, [meta(ODD, dtype=dtype)] * n_inputs, [meta(ODD, dtype=dtype)] * n_outputs


def test_profilers_see_a_kernel_under_the_name_of_its_formula():
    launchers = [
        (f"sigmoid_{name.partition('-from')[0].replace('-', '_')}_kernel", launcher)
        for name, (launcher, *_) in OPERATORS.items()
    ]
    of_orders = [
        ("unary", gates.unary_launchers("silu", 1.0)),
        ("gate", gates.gate_launchers(*GATES["clamped"])),
        ("interleaved", interleaved.launchers(*GATES["clamped"])),
        *(("loss", losses.loss_launchers(Loss(2.0, 0.25, reduction=reduction))) for reduction in ("none", "mean")),
    ]
    for of, each in of_orders:
        launchers += [(f"{of}_{order.replace('-', '_')}_kernel", launcher) for order, launcher in zip(ORDERS, each)]
    launchers += zip(("gate_backward_kernel", "gate_double_backward_kernel"), gates.broadcast_launchers(*GATES["gate"]))
    launchers += [("pairs_forward_kernel", siglip._forward), ("pairs_gradient_kernel", siglip._gradient)]
    launchers += [("fold_kernel", reduce._fold), ("squares_kernel", statistics._squares), ("streak_kernel", statistics._streak)]
    launchers += [("activation_kernel", statistics._activation("silu", 1.0))]
    launchers += [("add_to_totals_kernel", statistics._fold_activation)]
    tensors = {launcher: (inputs, outputs) for _, launcher, inputs, outputs, *_ in all_launches(torch.bfloat16)}
    for name, launcher in launchers:
        compiled = compile_launch(launcher, *tensors[launcher], TARGETS["sm_90"])
        assert compiled.metadata.name == name
        assert f".visible .entry {name}(" in compiled.asm["ptx"]


@every_dtype_and_target
def test_the_losses_move_16_bytes_an_access_and_do_not_spill(dtype, target):
    # As for the gates. What is done once a program, the sums and the division, is counted as if it were done for each tile: it
    # and the tail are up to 50 instructions an element, and 4 more for each sum but the first. A focal loss may take twice what
    # memory leaves time for.
    slots = {torch.float32: 31, torch.bfloat16: 15.5}.get(dtype, float("inf"))
    launches = shown_on(target, dtype, loss_launches(dtype))
    for (name, _, _, outputs, moved, gamma), (instructions, _, stack, _) in listings(launches, target):
        # Two fp64 numbers take a register pair each; the derivatives of a power hold more than there are.
        assert stack <= 16 or (gamma and dtype is torch.float64), name
        accesses = [each for each in instructions if each.startswith(("LDG", "STG")) and ".128" in each]
        assert len(accesses) >= moved * elements_per_thread() * dtype.itemsize // 16, name
        if target == "sm_90" and moved:
            n_sums = sum(output.shape == (2048,) for output in outputs)
            allowed = moved * slots * (2 if gamma else 1) + 50 + 4 * max(0, n_sums - 1)
            assert len(instructions) / elements_per_thread() <= allowed, name
