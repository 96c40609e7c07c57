"""The machine that executes PTX: its arithmetic is exact, and it finds the faults it is there to find."""

import functools
import importlib
import math
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import bounds
import conftest
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from ptx import MODELS, PtxError, arithmetic, launch, parse
from ptx.instructions import check
from ptx.memory import NOBODY, Clock, Operand

import torch_sigmoid as ts
from torch_sigmoid import autograd, kernels
from torch_sigmoid.losses import Loss

# --- arithmetic against exact rationals -----------------------------------------------------------------------------------


def rounded(exact: Fraction, toward=round) -> float:
    """An exact number as the fp32 number that `toward` chooses among its neighbours: round ties to even, or floor."""
    if not exact:
        return 0.0
    exponent = abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(exact)
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    value = toward(exact / unit) * unit
    return math.copysign(math.inf, exact) if abs(value) >= 2**128 else float(value)


def awkward_fp32(rng, n):
    """Any bits at all, numbers of every size, and short mantissas, whose products end in ties."""
    of_any_bits = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)
    of_any_size = (rng.standard_normal(n) * np.exp2(rng.integers(-80, 60, n))).astype(np.float32)
    short = np.ldexp(rng.integers(1, 2**12, n).astype(np.float32), rng.integers(-90, 40, n))
    return np.choose(rng.integers(0, 3, n), [of_any_bits, of_any_size, short]).astype(np.float32)


def test_fma_of_fp32_is_rounded_once():
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        a, b, c = (awkward_fp32(rng, 4000) for _ in range(3))
        nearly = a.astype(np.float64) * b * rng.choice([-1, 1, 2.0**-24, 2.0**-25, -(2.0**-30)], len(a))
        c = np.where(rng.random(len(a)) < 0.4, nearly.astype(np.float32), c)
        nearest, down = arithmetic.fma32(a, b, c), arithmetic.fma32(a, b, c, "rm")
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    assert finite.sum() > 3000
    for i in np.flatnonzero(finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert nearest[i] == rounded(exact)
        if abs(exact) < 2**127:
            assert down[i] == rounded(exact, math.floor)


def test_fma_of_fp64_is_rounded_once():
    rng = np.random.default_rng(1)
    n = 5000
    a, b = (rng.standard_normal(n) * np.exp2(rng.integers(-1070, 1020, n).astype(float)) for _ in range(2))
    b[::2] = np.ldexp(rng.standard_normal(n // 2), rng.integers(-1074, -1000, n // 2) - np.frexp(a[::2])[1])
    with np.errstate(all="ignore"):
        nearly = a * b * rng.choice([-1, 1, 2.0**-53, -(2.0**-54), 2.0**-60], n)
        c = np.where(rng.random(n) < 0.6, nearly, rng.standard_normal(n))
        c = np.where(np.isfinite(c), c, 1.0)
        result = arithmetic.fma64(a, b, c)
    for i in range(n):
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i])
        try:
            expected = float(exact)
        except OverflowError:
            expected = math.inf if exact > 0 else -math.inf
        assert result[i] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_to_16_bit_are_torchs(dtype):
    rng = np.random.default_rng(2)
    x = np.concatenate([awkward_fp32(rng, 100_000), rng.standard_normal(100_000).astype(np.float32)])
    narrow = arithmetic.to_bf16 if dtype is torch.bfloat16 else arithmetic.to_f16
    with np.errstate(over="ignore"):
        mine = torch.from_numpy(narrow(x).view(np.int16)).view(dtype)
    theirs = torch.from_numpy(x).to(dtype)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.view(torch.int16)[~mine.isnan()], theirs.view(torch.int16)[~theirs.isnan()])


def test_the_options_models_are_the_machines():
    assert tuple(MODELS) == conftest.MODELS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operation", [*arithmetic.ULPS, *arithmetic.RELATIVE])
def test_a_model_is_as_wrong_as_it_may_be_and_no_more(operation, name):
    exact = np.random.default_rng(3).uniform(1.0, 2.0, 5000) * np.exp2(np.random.default_rng(4).integers(-60, 60, 5000))
    model = MODELS[name]
    wrong = np.abs(model.round(operation, exact, exact.view(np.uint64)).astype(np.float64) - exact)
    ulp = np.exp2(np.floor(np.log2(exact))) * 2.0**-23
    if model.part is None:
        assert (wrong <= ulp / 2).all()
    elif model.one_ulp or operation in arithmetic.ULPS:
        allowed = 1.0 if model.one_ulp else arithmetic.ULPS[operation]
        assert (wrong <= (allowed + 0.5) * ulp).all(), "counted from the correctly rounded result"
        assert (wrong > (allowed + 0.3) * ulp).any()
    else:
        allowed = arithmetic.RELATIVE[operation] * (np.maximum(exact, 1.0) if operation == "lg2" else exact)
        assert (wrong <= np.maximum(allowed, ulp / 2) * (1 + 1e-9)).all()
        assert (wrong > 0.6 * allowed).any()


# --- what each instruction does -------------------------------------------------------------------------------------------

ONE_WARP = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 4 kernel_param_0,
	.param .u64 .ptr .global .align 4 kernel_param_1
)
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 8;
	add.s64 	%rd4, %rd1, %rd3;
	mul.wide.u32 	%rd5, %r1, 4;
	add.s64 	%rd6, %rd2, %rd5;
	ld.global.v2.b32 	{{ %r2, %r3 }}, [ %rd4 + 0 ];
	{statement}
	st.global.b32 	[ %rd6 + 0 ], %r4;
	ret;
}}
"""
INF, NAN, LANES = 0x7F800000, 0x7FFFFFFF, list(range(32))


def bits_of(number):
    return int(np.float32(number).view(np.uint32))


def on_floats(statement, *cases):
    return [(statement, [bits_of(a)], [bits_of(b)], [bits_of(expected)]) for a, b, expected in cases]


# A statement that makes %r4 of %r2 and %r3, the bits of these in each lane, and of the result.
INSTRUCTIONS = [
    ("shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;", LANES, [0], [lane ^ 1 for lane in LANES]),
    ("shfl.sync.idx.b32 %r4, %r2, 5, 31, -1;", LANES, [0], [5] * 32),
    ("shfl.sync.down.b32 %r4, %r2, 4, 31, -1;", LANES, [0], [min(lane + 4, lane if lane > 27 else 31) for lane in LANES]),
    ("shfl.sync.up.b32 %r4, %r2, 4, 0, -1;", LANES, [0], [lane - 4 if lane > 3 else lane for lane in LANES]),
    ("shfl.sync.bfly.b32 %r4, %r2, 2, 0x1c1f, -1;", LANES, [0], [lane ^ 2 for lane in LANES]),  # within four lanes
    ("redux.sync.add.s32 %r4, %r2, -1;", LANES, [0], [sum(LANES)] * 32),
    *on_floats("min.f32 %r4, %r2, %r3;", (0.0, -0.0, -0.0), (-0.0, 0.0, -0.0), (np.nan, 1.0, 1.0), (-np.inf, 1.0, -np.inf)),
    *on_floats("max.f32 %r4, %r2, %r3;", (0.0, -0.0, 0.0), (-0.0, -0.0, -0.0), (1.0, np.nan, 1.0)),
    ("min.NaN.f32 %r4, %r2, %r3;", [0xFFC00001], [bits_of(1)], [NAN]),
    ("add.f32 %r4, %r2, %r3;", [0xFFC00001], [0x7FC00002], [NAN]),
    ("sub.f32 %r4, %r2, %r3;", [INF], [INF], [NAN]),
    *on_floats("add.f32 %r4, %r2, %r3;", (-0.0, -0.0, -0.0), (1.0, 2.0**-24, 1.0), (3e38, 3e38, np.inf)),
    *on_floats("add.ftz.f32 %r4, %r2, %r3;", (1e-40, 1e-40, 0.0), (-1e-40, -0.0, -0.0), (2e-38, -1.5e-38, 0.0)),
    *on_floats("mul.f32 %r4, %r2, %r3;", (1e-20, 1e-20, 1e-40), (-0.0, 2.0, -0.0)),
    *on_floats("fma.rm.f32 %r4, %r2, %r3, 0fBF800000;", (1.0, 1.0, -0.0), (1.0, 2.0, 1.0)),
    *on_floats("fma.rn.f32 %r4, %r2, %r3, 0fBF800000;", (1.0, 1.0, 0.0)),
    *on_floats("cvt.sat.f32.f32 %r4, %r2;", (1.5, 0, 1.0), (-1.0, 0, 0.0), (np.nan, 0, 0.0)),
    *on_floats("neg.f32 %r4, %r2;", (0.0, 0, -0.0), (1.0, 0, -1.0)),
    ("setp.lt.f32 %p1, %r2, %r3; selp.b32 %r4, 7, 9, %p1;", [NAN], [bits_of(1)], [9]),
    ("setp.ltu.f32 %p1, %r2, %r3; selp.b32 %r4, 7, 9, %p1;", [NAN], [bits_of(1)], [7]),
    ("setp.ge.u32 %p1, %r2, %r3; selp.b32 %r4, 7, 9, %p1;", [0xFFFFFFFF], [1], [7]),
    ("setp.ge.s32 %p1, %r2, %r3; selp.b32 %r4, 7, 9, %p1;", [0xFFFFFFFF], [1], [9]),
    ("mov.b32 %r4, 5; setp.eq.s32 %p1, %r2, 3; @%p1 add.s32 %r4, %r4, %r3;", LANES, [8], [5 + 8 * (n == 3) for n in LANES]),
    ("shl.b32 %r4, %r2, %r3;", [1], [32], [0]),
    ("shr.u32 %r4, %r2, %r3;", [0x80000000], [31], [1]),
    ("shr.s32 %r4, %r2, %r3;", [0x80000000], [40], [0xFFFFFFFF]),
    ("prmt.b32 %r4, %r2, %r3, 0x3276;", [0x33221100], [0x77665544], [0x33227766]),
    ("prmt.b32 %r4, %r2, %r3, 0x888B;", [0x80221181], [0], [0xFFFFFFFF]),
    ("bfe.u32 %r4, %r2, 4, 8;", [0xABCD], [0], [0xBC]),
    ("bfe.s32 %r4, %r2, 4, 8;", [0xABCD], [0], [0xFFFFFFBC]),
    ("popc.b32 %r4, %r2;", [0xF0F], [0], [8]),
    ("div.s32 %r4, %r2, %r3;", [0x80000000], [2], [0xC0000000]),
    ("div.s32 %r4, %r2, %r3;", [(-7) % 2**32], [2], [(-3) % 2**32]),
    ("rem.s32 %r4, %r2, %r3;", [0x80000000], [3], [(-2) % 2**32]),
    ("mul.hi.s32 %r4, %r2, %r3;", [(-2) % 2**32], [1 << 31], [1]),
    ("mad.lo.s32 %r4, %r2, %r3, 1;", [(-2) % 2**32], [3], [(-5) % 2**32]),
    ("cvt.s8.s32 %r4, %r2;", [0x1FF], [0], [0xFFFFFFFF]),
    ("cvt.u8.u32 %r4, %r2;", [0x1FF], [0], [0xFF]),
    ("cvt.rni.s32.f32 %r4, %r2;", [bits_of(-2.5)], [0], [(-2) % 2**32]),
    ("cvt.rzi.u32.f32 %r4, %r2;", [bits_of(-2.5)], [0], [0]),
    ("cvt.rn.bf16x2.f32 %r4, %r2, %r3;", [bits_of(1.0)], [bits_of(-2.0)], [0x3F80C000]),
    ("mov.b32 { %rs1, %rs2 }, %r2; mov.b32 %r4, { %rs2, %rs1 };", [0x11112222], [0], [0x22221111]),
    ("ex2.approx.ftz.f32 %r4, %r2;", [bits_of(-127.0)], [0], [0]),
    ("rcp.approx.ftz.f32 %r4, %r2;", [bits_of(-0.0)], [0], [bits_of(-np.inf)]),
    ("div.approx.ftz.f32 %r4, %r2, %r3;", [bits_of(1e-39)], [bits_of(1)], [0]),
    ("div.approx.f32 %r4, %r2, %r3;", [bits_of(1)], [bits_of(2.0**127)], [0]),
]


@pytest.mark.parametrize(("statement", "first", "second", "expected"), INSTRUCTIONS, ids=lambda value: str(value)[:60])
def test_what_an_instruction_does(statement, first, second, expected):
    pairs = np.stack([np.resize(np.array(each, dtype=np.uint32), 32) for each in (first, second)], axis=1)
    given, result = torch.from_numpy(pairs.view(np.int32)), torch.zeros(32, dtype=torch.int32)
    operands = [Operand("given", given, True, False), Operand("result", result, False, True)]
    launch(parse(ONE_WARP.format(statement=statement)), 1, 32, [each.start for each in operands], operands)
    assert result.numpy().view(np.uint32).tolist() == np.resize(np.array(expected, dtype=np.uint32), 32).tolist()


# --- what threads may not do to each other -----------------------------------------------------------------------------------

RACES = {
    "another program's result is read": (
        """
        ld.global.v2.b32 { %r2, %r3 }, [ %rd4 + 0 ];
        mov.u32 %r5, %ctaid.x; xor.b32 %r6, %r5, 1;
        mad.wide.u32 %rd7, %r5, 128, %rd6; st.global.b32 [ %rd7 + 0 ], %r2;
        mad.wide.u32 %rd8, %r6, 128, %rd6; ld.global.b32 %r4, [ %rd8 + 0 ];
        """,
        r"ld\.global.*thread 0 of program 0: reads what thread 0 of program 1 writes: result\[32\]",
    ),
    "half of each result is left out": (
        "cvt.u16.u32 %rs1, %r1; mov.u32 %r5, %ctaid.x; mad.wide.u32 %rd7, %r5, 128, %rd6; st.global.b16 [ %rd7 + 0 ], %rs1;",
        r"kernel: no thread of any program has written result\[0\]",
    ),
    "two programs write one place": (
        "mov.u32 %r5, %ctaid.x; st.global.b32 [ %rd6 + 0 ], %r5; st.global.b32 [ %rd6 + 128 ], %r1;",
        r"st\.global.*two threads write different values: result\[0\]",
    ),
}


@pytest.mark.parametrize("race", RACES)
def test_what_threads_may_not_do_to_each_other(race):
    body, message = RACES[race]
    head, _, tail = ONE_WARP.replace("{{", "{").replace("}}", "}").partition("	{statement}\n")
    head = head.replace("	ld.global.v2.b32 	{ %r2, %r3 }, [ %rd4 + 0 ];\n", "")
    text = head + body + tail.partition("\n")[2]
    # A narrow operand, so that pieces of an element are told apart.
    given, result, narrow = (
        torch.zeros(n, dtype=dtype) for n, dtype in ((64, torch.int32), (64, torch.int32), (1, torch.int16))
    )
    operands = [
        Operand("given", given, True, False),
        Operand("result", result, False, True),
        Operand("narrow", narrow, True, False),
    ]
    with pytest.raises(PtxError, match=f"(?s){message}"):
        launch(parse(text), 2, 32, [each.start for each in operands[:2]], operands)


def test_many_readers_of_one_place_are_all_remembered():
    """Two programs read it, one of them twice: neither may write it then."""
    clock = Clock(2, 2)
    for readers in ([0, 2, 3], [3, 0, 2], [0, 1, 2], [2, 3, 0]):
        stamps = np.full(1, NOBODY)
        clock.note_readers(stamps, np.zeros(3, dtype=np.int64), np.array(readers))
        for thread in range(4):
            assert clock.by_another(stamps, np.array([thread])).all()
            assert clock.concurrent(stamps, np.array([thread])).all()


# --- what is not known stops ------------------------------------------------------------------------------------------------

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
{{
	.reg .b32 	%r<4>;
	mov.u32 %r1, %tid.x;
	{statement}
	ret;
}}
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("sin.approx.f32 %r2, %r1;", "line 8: sin.approx.f32 .*unknown instruction sin"),
        ("add.rz.f32 %r2, %r1, %r1;", "line 8: .*add with rz is not known"),
        ("mul.f16x2 %r2, %r1, %r1;", "line 8: .*mul with f16x2 is not known"),
        ("bra $nowhere;", r"line 8: no label \$nowhere"),
        ("ld.global.b32 %r2, [%r1+%r2];", "line 8: unknown address"),
        (".branchtargets L1;", "line 8: unknown directive"),
    ],
)
def test_what_is_not_known_stops_with_its_line(statement, message):
    with pytest.raises(PtxError, match=message):
        check(parse(KERNEL.format(statement=statement)))


# --- faults that must be found ------------------------------------------------------------------------------------------------

KERNELS = Path(ts.__file__).parent.parent / "kernels"


@pytest.fixture
def ptx(kernels):
    """The machine that executes PTX; as it was, afterwards."""
    if kernels.ptx is None:
        pytest.skip("needs --kernels=ptx")
    model = kernels.ptx.model
    yield kernels.ptx
    kernels.ptx.rewrite = kernels.ptx.only = kernels.ptx.reports = None
    kernels.ptx.model = model


def forward():
    return autograd.sigmoid_value(torch.randn(1103))


def losses_summed():
    return ts.binary_cross_entropy_with_logits(torch.randn(5000), torch.rand(5000), reduction="sum")


def in_place_gradient():
    """SigLIP's backward writes gradients over the similarities."""
    features = [torch.randn(64, 32, requires_grad=True) for _ in range(2)]
    ts.siglip_loss(*features, torch.tensor(2.0, requires_grad=True), -1.0).backward()


@pytest.mark.parametrize("stride", [1, 8])
def test_a_launch_is_counted(stride, ptx):
    """2,048 fp32 numbers, side by side or each in a sector of its own, read once and written densely."""
    n = 2048
    ptx.reports = []
    autograd.sigmoid_value(torch.randn(n * stride)[::stride])
    (report,) = ptx.reports
    assert report.requested == report.ideal == {"load": 4 * n, "store": 4 * n}
    assert report.fetched == report.sectors == {"load": 32 * n if stride == 8 else 4 * n, "store": 4 * n}
    # Each warp takes the same way through the kernel.
    n_warps = report.programs * report.threads // 32
    length = max(len(program.instructions) for program in ptx.programs.values() if program.name == report.name)
    assert report.instructions % n_warps == 0
    assert 0 < report.instructions / n_warps <= length


def test_a_kernel_that_was_unloaded_is_not_launched(ptx):
    x, texts = torch.randn(1103), ptx.texts
    autograd.sigmoid_value(x)
    ptx.texts = list(texts)
    for module in range(len(texts)):
        ptx.utils.unload_module(module)
    try:
        with pytest.raises(PtxError, match="sigmoid_forward_kernel is launched after it was unloaded"):
            autograd.sigmoid_value(x)
    finally:
        ptx.texts = texts
    autograd.sigmoid_value(x)


def once(pattern, replacement):
    """The first place where the pattern is found."""
    return lambda text: re.sub(pattern, replacement, text, count=1, flags=re.S)


def last(pattern, replacement):
    return once(rf"{pattern}(?!.*{pattern})", replacement)


def without_a_predicate_where(pattern):
    return last(rf"@!?%p\d+ ({pattern})", r"\1")


def past_the_sums(text):
    """Let threads beyond those that have a sum store one, or, since Triton 3.9, which bounds addresses instead, load one."""
    changed = without_a_predicate_where(r"st\.shared")(text)
    return (
        changed
        if changed != text
        else once(r"(and\.b32\s+%r\d+, %r\d+), 12;(\s+add\.s32[^;]*;\s+ld\.shared)", r"\1, 1020;\2")(text)
    )


# The kernel, what is changed in its PTX, what then runs, and what the error says: the instruction, the thread and the tensor.
FAULTS_IN_PTX = {
    "tail mask one too wide": (
        "sigmoid_forward_kernel",
        last(r"setp\.lt\.s32", "setp.le.s32"),
        forward,
        r"ld\.global.*thread \d+ of program 1: out of bounds: 4 bytes at 0 bytes past the end of x",
    ),
    "body mask always true": (
        "sigmoid_forward_kernel",
        once(r"setp\.lt\.s32", "setp.ne.s32"),
        forward,
        r"out of bounds: 16 bytes at .* past the end of x",
    ),
    "a vector access off its alignment": (
        "sigmoid_forward_kernel",
        once(r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0", r"\g<1>4"),
        forward,
        r"st\.global\.v4.*thread 0 of program 0: misaligned: 16 bytes at outputs\[0\]\[1\]",
    ),
    "half the stride": (
        "sigmoid_forward_kernel",
        once(r"mul\.wide\.s32 (\s*%rd\d+, %r\d+), 4", r"mul.wide.s32 \1, 2"),
        forward,
        r"ld\.global\.v4.*thread 1 of program 0: misaligned: 16 bytes at x\[2\]",
    ),
    "written to the input": (
        "sigmoid_forward_kernel",
        once("sigmoid_forward_kernel_param_1]", "sigmoid_forward_kernel_param_0]"),
        forward,
        r"st\.global.*thread 0 of program 0: writes to no output: x\[0\]",
    ),
    "every program does the first one's tile": (
        "sigmoid_forward_kernel",
        once(r"mov\.u32 (\s*%r\d+), %ctaid\.x", r"mov.u32 \1, 0"),
        forward,
        r"no thread of any program has written outputs\[0\]\[1024\]",
    ),
    "a register that nothing has set": (
        "sigmoid_forward_kernel",
        once(r"ex2\.approx\.ftz\.f32 (\s*%r\d+), %r\d+", r"ex2.approx.ftz.f32 \1, %r9999"),
        forward,
        r"ex2.*thread 0 of program 0: %r9999 is read and was never written",
    ),
    "a loop that loads one tile more": (
        "fold_kernel",
        once(r"setp\.lt\.s32(\s*%p3,)", r"setp.le.s32\1"),
        losses_summed,
        r"ld\.global.*thread \d+ of program 0: out of bounds: 4 bytes at 0 bytes past the end of inputs\[0\]",
    ),
    "a barrier removed": (
        "loss_forward_kernel",
        once(r"bar\.sync[ \t]*0;", ""),
        losses_summed,
        r"ld\.shared.*thread \d+ of program \d: reads shared memory that",
    ),
    "the last barrier removed": (
        "loss_forward_kernel",
        last(r"bar\.sync[ \t]*0;", ""),
        losses_summed,
        r"thread \d+ of program \d: (reads|writes) shared memory that",
    ),
    "a barrier that the first warp jumps over": (
        "loss_forward_kernel",
        once(
            r"\n\tret;",
            "\n mov.u32 %r9999, %tid.x; setp.lt.u32 %p9999, %r9999, 32; @%p9999 bra $over; bar.sync 0; $over: ret;",
        ),
        losses_summed,
        r"bar\.sync 0: a barrier that only 96 of 128 threads of program 0 reach",
    ),
    "a shuffle that some threads skip": (
        "loss_forward_kernel",
        once(r"(\n\s*)(shfl\.sync)", r"\1mov.u32 %r9999, %tid.x; setp.lt.u32 %p9999, %r9999, 32; @%p9999 \2"),
        losses_summed,
        r"shfl.*thread 0 of program 0: some threads of a warp skip what all must execute",
    ),
    "sums of more threads than have one": (
        "loss_forward_kernel",
        past_the_sums,
        losses_summed,
        r"(st|ld)\.shared.*thread 4 of program \d: out of bounds of 16 bytes of shared memory",
    ),
    "a gradient written over what another thread will read": (
        "pairs_gradient_kernel",
        once(r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )(0|16)", lambda found: f"{found[1]}{int(found[2]) ^ 32}"),
        in_place_gradient,
        r"thread \d+ of program \d: (writes what .* reads|reads what .* writes|two threads write different).*similarity\[",
    ),
    "a 32-bit address": (
        "sigmoid_forward_kernel",
        once(r"(add\.s64 \s*(%rd\d+), [^;]*;)", r"\1 cvt.u32.u64 %r9999, \2; cvt.u64.u32 \2, %r9999;"),
        forward,
        r"ld\.global.*thread 0 of program 0: out of bounds: 16 bytes at \d+ bytes before the start of",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_IN_PTX)
def test_a_fault_in_the_machine_code_is_found(fault, ptx):
    name, change, run, message = FAULTS_IN_PTX[fault]
    changed = []

    def rewrite(kernel, text):
        if kernel != name:
            return text
        text = text.replace(".reg .pred", ".reg .pred \t%p<1>; .reg .b32 \t%r<1>; .reg .pred", 1)
        changed.append(change(text) != text)
        return change(text)

    run()
    ptx.rewrite = rewrite
    with pytest.raises(PtxError, match=f"(?s){name}, line \\d+: .*{message}|{name}: {message}"):
        run()
    assert changed == [True]


def changed_kernels(folder, *changes):
    """The package `kernels` with places of its source changed, each (file, old, new), under a name of its own."""
    name = f"kernels_{abs(hash(changes))}"
    package = shutil.copytree(KERNELS, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        source = (package / file).read_text()
        assert old in source, "the source has changed: say anew what the fault is"
        (package / file).write_text(source.replace(old, new, 1))
    sys.path.insert(0, str(folder))
    try:
        changed = importlib.import_module(name)
        assert changed.UNAVAILABLE is None, changed.UNAVAILABLE
        return changed
    finally:
        sys.path.remove(str(folder))


def strided(n):
    return torch.randn(n, 3)[:, 0]


def block():
    """Cut out of three dimensions; each row has a tail."""
    return torch.randn(4, 8, 40)[:3, :5, :33]


GATE = ("sigmoid", 1.0, None, 0.0)


def gated(kernels, shape, gate_shape):
    """The gradients of an operand and of a gate that is broadcast against it."""
    grad_output, a = torch.randn(2, *shape)
    return kernels.gates.broadcast_backward(grad_output, a, torch.randn(gate_shape), GATE)


FAULTS_IN_KERNELS = {
    "a mask one too wide": (
        ("tiles.py", "column_mask = columns < end", "column_mask = columns <= end"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(torch.randn(1031)),
        r"ld\.global.*thread \d+ of program 1: out of bounds: 4 bytes at 0 bytes past the end of x",
    ),
    "a row too many": (
        ("tiles.py", "row_mask = rows < n_rows", "row_mask = rows <= n_rows"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(block()),
        r"ld\.global.*thread \d+ of program 6: out of bounds: 4 bytes at 28 bytes past the end of x",
    ),
    "the tail missing": (
        ("pointwise.py", "tl.static_range(2)", "tl.static_range(1)"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(torch.randn(1031)),
        r"sigmoid_forward_kernel: no thread of any program has written outputs\[0\]\[1024\]",
    ),
    "the stride of the wrong operand": (
        ("pointwise.py", "value = load(inputs[i], strides[i], part)", "value = load(inputs[i], strides[i - 1], part)"),
        lambda kernels: kernels.sigmoid.sigmoid_backward(strided(300), torch.randn(300), True),
        r"ld\.global.*thread \d+ of program 0: out of bounds: 4 bytes at \d+ bytes past the end of saved",
    ),
    "the strides of an input for an output": (
        (
            "pointwise.py",
            "store(outputs[i], strides[N_INPUTS + i], part, result)",
            "store(outputs[i], strides[i], part, result)",
        ),
        lambda kernels: kernels.sigmoid.sigmoid_forward(strided(300)),
        r"st\.global.*thread \d+ of program 0: out of bounds: 4 bytes at \d+ bytes past the end of outputs\[0\]",
    ),
    "an absent operand that shifts the strides of the next": (
        (
            "launch.py",
            "tuple((None,) * 3 if tensor is None else next(strides) for tensor in inputs)",
            "(*(next(strides) for tensor in inputs if tensor is not None), (None,) * 3, (None,) * 3)",
        ),
        lambda kernels: kernels.losses.loss_backward(
            *torch.rand(3, 70, 33), None, torch.rand(33), None, Loss(reduction="none")
        ),
        r"loss_backward_kernel.*ld\.global.*thread \d+ of program \d: out of bounds: .* past the end of pos_weight",
    ),
    "a stride left out": (
        (
            "tiles.py",
            "return pointer + columns * column_stride, column_mask",
            "return pointer + columns, column_mask",
        ),
        lambda kernels: kernels.sigmoid.sigmoid_forward(strided(300)),
        r"ld\.global.*thread \d+ of program 0: reads memory that is no input and that nobody has written: x\[\d+\]",
    ),
    "the stride of matrices left out": (
        ("tiles.py", "pointer += matrix * matrix_stride", "pass"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(block()),
        r"sigmoid_forward_kernel: no thread of any program has written outputs\[0\]\[165\]",
    ),
    "a matrix stored over another": (
        (
            "tiles.py",
            "    places, mask = addresses(pointer, strides, part)\n    tl.store",
            "    places, mask = addresses(pointer, (None, strides[1], strides[2]), part)\n    tl.store",
        ),
        lambda kernels: kernels.sigmoid.sigmoid_forward(block()),
        r"st\.global.*thread \d+ of program \d: two threads write different values: outputs\[0\]\[\d+\]",
    ),
    "blocks of rows counted on through the matrices": (
        ("tiles.py", "row_block = row_block % row_blocks", "pass"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(block()),
        r"sigmoid_forward_kernel: no thread of any program has written outputs\[0\]\[165\]",
    ),
    "offsets of 32 bits": (
        ("launch.py", "return reach > INT32_MAX - INTERPRETED_TILE_ELEMENTS", "return False"),
        lambda kernels: kernels.sigmoid.sigmoid_forward(far_apart()),
        r"thread \d+ of program 0: out of bounds: 2 bytes at \d+ bytes before the start of x",
    ),
    "a compilation kept for other alignments": (
        ("launch.py", "key += tensor.dtype, tensor.stride(), pointer & 15", "key += tensor.dtype, tensor.stride()"),
        lambda kernels: [kernels.sigmoid.sigmoid_forward(torch.randn(2064)[first : first + 2048]) for first in (0, 1)],
        r"ld\.global\.v4.*thread 0 of program 0: misaligned: 16 bytes at x\[0\]",
    ),
    "an output never written": (
        ("pointwise.py", "for i in tl.static_range(N_OUTPUTS)", "for i in tl.static_range(N_OUTPUTS - 1)"),
        lambda kernels: kernels.sigmoid.sigmoid_double_backward(*torch.randn(3, 100), True),
        r"sigmoid_double_backward_kernel: no thread of any program has written outputs\[1\]\[0\]",
    ),
    "sums read before they are written": (
        ("reduce.py", "mask = start + offsets < n_partials", "mask = start + offsets < n_partials + 1"),
        lambda kernels: kernels.reduce.fold(torch.randn(100), torch.empty(())),
        r"fold_kernel.*ld\.global.*thread \d+ of program 0: out of bounds: 4 bytes at 0 bytes past the end of inputs\[0\]",
    ),
    "a sum along rows without their tails": (
        ("reduce.py", "has_tail = walk.sizes[2] % TAIL_COLUMNS.value != 0", "has_tail = False"),
        lambda kernels: gated(kernels, (40, 33), (40, 1)),
        r"gate_backward_kernel: no thread of any program has written outputs\[0\]\[32\]",
    ),
    "a loop that leaves the tail out": (
        ("reduce.py", "for TAIL in tl.static_range(1 + HAS_TAIL)", "for TAIL in tl.static_range(1)"),
        lambda kernels: gated(kernels, (40, 33), (1, 33)),
        r"gate_backward_kernel: no thread of any program has written outputs\[0\]\[32\]",
    ),
    "the sums of the last columns never stored": (
        (
            "reduce.py",
            "for TAIL in tl.static_range(1 + HAS_TAIL):\n            present, part = select_part(\n                (matrix, 0",
            "for TAIL in tl.static_range(1):\n            present, part = select_part(\n                (matrix, 0",
        ),
        lambda kernels: gated(kernels, (40, 33), (1, 33)),
        r"gate_backward_kernel: no thread of any program has written outputs\[1\]\[32\]",
    ),
    "the sums of one matrix over those of another": (
        ("reduce.py", "outer = split if n_matrices is None else split * n_matrices + matrix", "outer = split"),
        lambda kernels: gated(kernels, (4, 40, 33), (4, 1, 33)),
        r"gate_backward_kernel.*st\.global.*two threads write different values: outputs\[1\]\[\d+\]",
    ),
    "more programs than splits": (
        ("reduce.py", "return n_matrices * self.splits *", "return n_matrices * (self.splits + 1) *"),
        lambda kernels: gated(kernels, (4, 40, 33), (4, 1, 33)),
        r"gate_backward_kernel.*thread \d+ of program \d+: out of bounds: 4 bytes at \d+ bytes past the end of",
    ),
}


def far_apart():
    """Elements 2²⁷ apart, the last of them 2³¹ from the first; no page is touched but theirs."""
    return torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16)).as_strided((17,), (2**27,))


@pytest.mark.parametrize("fault", FAULTS_IN_KERNELS)
def test_a_fault_in_a_kernel_is_found(fault, ptx, tmp_path):
    change, run, message = FAULTS_IN_KERNELS[fault]
    changed = changed_kernels(tmp_path, change)
    ptx.observe(changed.launch.Launcher)
    with pytest.raises(PtxError, match=f"(?s){message}"):
        run(changed)


# --- faults of arithmetic, which show in values -------------------------------------------------------------------------------


def sum_of_partials(kernels):
    total = torch.empty(())
    kernels.reduce.fold(torch.ones(3000), total)
    return total.item() == 3000


def sum_of_losses(kernels, n=9000):
    x = torch.zeros(n)
    loss, _ = kernels.losses.loss_forward(x, x, None, None, Loss(reduction="sum"), torch.float32)
    return abs(loss.item() - n * math.log(2)) < 0.01


def sums_of_a_gate(kernels, shape, gate_shape):
    """For gates of 0, whose σ' is ¼, and products of 4."""
    ones, gate = torch.ones(shape), torch.zeros(gate_shape)
    _, sums = kernels.gates.broadcast_backward(2 * ones, 2 * ones, gate, GATE)
    return (sums == math.prod(shape) / gate.numel()).all()


def split_sums(kernels):
    """Of rows and of columns so long that several programs share one."""
    return all(
        sums_of_a_gate(kernels, *each) for each in (((2, 5003), (2, 1)), ((3001, 33), (1, 33)), ((3, 900, 40), (3, 1, 40)))
    )


def one_gate_a_matrix(kernels):
    a, gate = block(), torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1)
    return torch.allclose(kernels.gates.gate_forward(a, gate, GATE), a * torch.sigmoid(gate))


def gradient_within_its_bound(kernels):
    x = torch.linspace(-80, 80, 20_001)
    wide = x.double().numpy()
    derived = bounds.weighted(bounds.Arithmetic(bounds.EXP_OF_EX2[2]), wide, "sigmoid", 1)
    error = np.abs(kernels.sigmoid.sigmoid_backward(torch.ones_like(x), x, True).double().numpy() - derived.value)
    return (error <= bounds.Arithmetic(bounds.EXP_OF_EX2[2]).total_error(derived, wide)).all()


def focal_gradient_of_bf16(kernels):
    x, zero = torch.tensor([-58.25], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    loss = Loss(0.5, reduction="none")
    gradient = kernels.losses.loss_backward(torch.ones_like(x), x, zero, None, None, None, loss)
    return gradient.item() == pytest.approx(1.70e-38, rel=0.01, abs=0)


FAULTS_IN_VALUES = {
    "partial sums dropped": (
        [
            (
                "reduce.py",
                "for start in range(0, n_partials, BLOCK_SIZE)",
                "for start in range(BLOCK_SIZE, n_partials, BLOCK_SIZE)",
            )
        ],
        sum_of_partials,
    ),
    "tiles added up twice": (
        [("reduce.py", "        tl.program_id(0), count", "        tl.program_id(0) // 2, count")],
        sum_of_losses,
    ),
    "tails not added up": (
        [("reduce.py", "result = tl.sum(totals[i]) + tails[i]", "result = tl.sum(totals[i])")],
        functools.partial(sum_of_losses, n=9001),
    ),
    "a block in the sums of two programs": (
        [("reduce.py", "tl.minimum(n_blocks, (split + 1) * n_steps)", "tl.minimum(n_blocks, (split + 1) * n_steps + 1)")],
        split_sums,
    ),
    "the tails of a sum along rows dropped": (
        [("reduce.py", "(total + tails if HAS_TAIL else total)", "total")],
        functools.partial(sums_of_a_gate, shape=(40, 33), gate_shape=(40, 1)),
    ),
    "tails of the last rows only": (
        [
            ("reduce.py", "ENOUGH_PROGRAMS = 1024", "ENOUGH_PROGRAMS = 8"),  # so each adds up several blocks of rows
            (
                "reduce.py",
                "tails += tl.sum(term, axis=AXIS, keep_dims=True)",
                "tails = tl.sum(term, axis=AXIS, keep_dims=True)",
            ),
        ],
        functools.partial(sums_of_a_gate, shape=(3001, 33), gate_shape=(1, 33)),
    ),
    "partial sums left to be added up, dropped": (
        [("reduce.py", "sums = sums.sum(", "sums = sums[:1].sum(")],
        split_sums,
    ),
    "the first matrix's gate for all": (
        [("tiles.py", "pointer if strides[0] is None else pointer + part[0] * strides[0]", "pointer")],
        one_gate_a_matrix,
    ),
    "the correction of a quotient left out": (
        [
            (
                "maths.py",
                'return tl.where(tl.abs(approximation) == float("inf"), approximation, corrected)',
                "return approximation",
            )
        ],
        gradient_within_its_bound,
    ),
    "a flushing quotient of what is already small": (
        [
            (
                "maths.py",
                "slope = quotient(tl.fma(negative(right), near_e, wrong)",
                "slope = quotient(v * tl.fma(negative(right), near_e, wrong)",
            ),
            ("maths.py", "result += gamma * loss * q\n", "result += v * gamma * loss * q\n"),
            (
                "maths.py",
                "return tl.where(above, result, negative(result)) * v * last",
                "return tl.where(above, result, negative(result)) * last",
            ),
        ],
        focal_gradient_of_bf16,
    ),
}


@pytest.mark.parametrize("fault", FAULTS_IN_VALUES)
def test_a_fault_of_arithmetic_shows_in_values(fault, ptx, tmp_path):
    changes, is_right = FAULTS_IN_VALUES[fault]
    ptx.model = MODELS["isa-low"]
    changed = changed_kernels(tmp_path, *changes)
    ptx.observe(changed.launch.Launcher)
    assert is_right(kernels)
    assert not is_right(changed)
