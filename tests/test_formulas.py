"""torch_sigmoid/formulas.py against kernels/maths.py, whose text runs a second time here, on torch tensors: no drift.

`triton`, `tl` and `libdevice` are stand-ins, so that both branches of the text run: the one that a GPU compiles, with exact
approximate instructions, and the one of Triton's interpreter. And N4 on a CPU, where the formulas compute near and far elements
differently: what an element becomes must not depend on the others.
"""

import enum
import functools
import inspect
import itertools
import math
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from reference import NORMAL_RANGE, is_normal, random, ulp

import torch_sigmoid
from torch_sigmoid import formulas
from torch_sigmoid.operators import cases

MATHS = Path(__file__).parent.parent / "kernels" / "maths.py"
DTYPES = [torch.float64, torch.float32]
BRANCHES = ["compiled", "interpreted"]


def fma(a, b, c):
    """a·b + c, rounded once but for the sum of two fp64 numbers."""
    like = next(each for each in (a, b, c) if isinstance(each, torch.Tensor))
    if like.dtype is torch.float32:
        a, b, c = (each.double() if isinstance(each, torch.Tensor) else each for each in (a, b, c))
        return (a * b + c).float()
    product = a * b
    (a_high, a_low), (b_high, b_low) = (formulas._halves(torch.as_tensor(each, dtype=torch.float64)) for each in (a, b))
    lost = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    total = product + c
    return torch.where(torch.as_tensor(lost).isfinite(), total + lost, total)


def extreme(plain, propagating):
    """tl.minimum or tl.maximum, which leave a NaN out unless told otherwise."""

    def function(a, b, propagate_nan=None):
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (torch.as_tensor(each, dtype=like.dtype) for each in (a, b))
        return (plain if propagate_nan is None else propagating)(a, b)

    return function


class PropagateNan(enum.Enum):
    ALL = 1


LANGUAGE = types.SimpleNamespace(
    float64=torch.float64,
    float32=torch.float32,
    constexpr=lambda value: value,
    where=torch.where,
    exp=torch.exp,
    exp2=torch.exp2,
    log=torch.log,
    floor=torch.floor,
    abs=torch.abs,
    fma=fma,
    minimum=extreme(torch.fmin, torch.minimum),
    maximum=extreme(torch.fmax, torch.maximum),
    PropagateNan=PropagateNan,
    full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    div_rn=torch.div,
    static_range=range,
)
LIBDEVICE = types.SimpleNamespace(
    exp=torch.exp,
    expm1=torch.expm1,
    log=torch.log,
    log1p=torch.log1p,
    rsqrt=torch.rsqrt,
    fast_expf=torch.exp,
    fast_dividef=lambda a, b: torch.as_tensor(a, dtype=b.dtype) / b,
)


@functools.cache
def maths(branch):
    """The module that the text of kernels/maths.py makes of torch operators."""
    # Of what `triton.jit` returns, here the function itself, the text finds out whether it is compiled.
    compiled = types.FunctionType if branch == "compiled" else types.BuiltinFunctionType
    language = types.SimpleNamespace(**vars(LANGUAGE))
    if branch == "interpreted":
        language.fma = lambda a, b, c: a * b + c  # as numpy computes it, rounded twice
    triton = types.SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f, JITFunction=compiled, language=language)
    shims = {
        "triton": triton,
        "triton.language": language,
        "triton.language.extra": types.SimpleNamespace(libdevice=LIBDEVICE),
    }
    module = types.ModuleType("maths_in_torch")
    with mock.patch.dict(sys.modules, shims):
        exec(compile(MATHS.read_text(), str(MATHS), "exec"), vars(module))
    assert (branch == "interpreted") == module.INTERPRETED
    return module


# Grids


def inputs(dtype):
    """Both signs of: 0, the smallest numbers, a dense middle, each threshold of the formulas and what surrounds it, ∞; NaN."""
    info = torch.finfo(dtype)
    positive = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 1e-30, info.eps, 1e-3]
    positive += torch.linspace(0.01, 20, 173, dtype=torch.float64).tolist()
    for edge in (37.0, 63.9, 64.1, 75.9, 80.0, 80.9, 81.1, 87.4, 88.8, 103.0, 163.0, 690.0, 699.9, 700.1, 708.5, 745.0, 999.0):
        positive += [edge, edge * (1 + 1e-6), edge + 0.3]
    positive += [1001.0, 1398.0, 5e3, 1e30, math.inf]
    x = torch.tensor(positive, dtype=torch.float64).to(dtype)
    return torch.cat([-x.flip(0), x, torch.tensor([math.nan], dtype=dtype)])


def upstream(x, order=1):
    """For derivatives of all sizes: products with e^-abs(x) are to be normal numbers far out, too. Values have weights."""
    sizes = torch.tensor([1.0, -2.5, 3e10, -7e-10, 1e30] if order else [1.0, -2.5], dtype=torch.float64).to(x.dtype)
    return sizes.repeat(len(x) // len(sizes) + 1)[: len(x)]


def assert_agree(actual, expected, around, ulps):
    """Non-finite numbers are the same; others are within so many ulp of the result, or of what is around a zero of it."""
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    info = torch.finfo(expected.dtype)
    size = torch.maximum(expected.double().abs(), around.double().abs().nan_to_num(0.0, 0.0, 0.0))
    # A product that ends among the subnormal numbers is rounded there.
    allowed = ulps * info.eps * (size + info.smallest_normal)
    error = (actual.double() - expected.double()).abs()
    worst = torch.where(finite, error / allowed, 0.0).argmax()
    assert (error <= allowed)[finite].all(), f"{actual[worst]} for {expected[worst]} at {worst}"


def size_around(function, x):
    """The largest of |f| at x and at a half on each side of it: what cancels at a zero of f has this size."""
    return torch.stack([function(x + step).double().abs() for step in (0.0, -0.5, 0.5)]).nan_to_num(0.0, 0.0, 0.0).amax(0)


# Names

ONLY_IN_TORCH = {
    "upcast_dtype": "a kernel asks the pointer",
    "smaller_sigmoid": "σ(-|x|): a kernel has e^-|x| at hand",
    "in_dtype": "a kernel rounds as it stores",
    "value": "a kernel takes `weighted` of order 0",
    "sigmoid_grad_from_input": "a kernel takes `weighted` of order 1",
}


def test_every_public_formula_stands_in_maths_by_the_same_name():
    public = {
        name
        for name, function in inspect.getmembers(formulas, inspect.isfunction)
        if function.__module__ == formulas.__name__ and not name.startswith("_")
    }
    assert {name for name in public if not callable(getattr(maths("compiled"), name, None))} == ONLY_IN_TORCH.keys()


def test_the_constants_of_both_are_the_same():
    of_kernels = maths("compiled")
    assert of_kernels.FAR == formulas.FAR
    assert (of_kernels.GAMMA_BITS, of_kernels.LOG_STEPS) == (formulas.GAMMA_BITS, formulas.LOG_STEPS)
    assert formulas.SHIFTS[torch.float32] == (of_kernels.SHIFT, of_kernels.SHIFTED_FROM)
    assert formulas.SHIFTS[torch.float64] == (of_kernels.SHIFT_FP64, of_kernels.SHIFTED_FROM_FP64)


# Each formula. fp64 within 1e-13 of it, fp32 within a few ulp.
ULPS = {torch.float64: 1e-13 / torch.finfo(torch.float64).eps, torch.float32: 8.0}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_branch = pytest.mark.parametrize("branch", BRANCHES)
# Without a graph, as in a first backward, torch's fused operators compute near elements; autograd records the other form.
recorded = pytest.mark.parametrize("recording", [torch.no_grad, torch.enable_grad], ids=["values alone", "recorded"])


@every_dtype
@every_branch
def test_the_smallest_pieces(branch, dtype):
    m, x, none = maths(branch), inputs(dtype), torch.zeros(())
    sigma, grad = torch.sigmoid(x), upstream(x)
    for actual, expected in (
        (m.upcast(x), formulas.upcast(x)),
        (m.sigmoid(x, False), formulas.sigmoid(x)),
        (m.sigmoid_grad_from_output(grad, sigma), formulas.sigmoid_grad_from_output(grad, sigma)),
        (m.curvature_from_output(sigma), formulas.curvature_from_output(sigma)),
    ):
        assert_agree(actual, expected, none, ULPS[dtype])
    # torch's operator multiplies by a σ that is subnormal farther out; N3 is stated where σ' is a normal number.
    normal = ~(x.abs() > NORMAL_RANGE[dtype])
    actual, expected = m.weighted(grad, x, m.SIGMOID, 1, False), formulas.sigmoid_grad_from_input(grad, x)
    assert_agree(actual[normal], expected[normal], none, ULPS[dtype])
    assert_agree(torch.sigmoid(torch.where(x < 0, x, -x)), formulas.smaller_sigmoid(x), none, 0.0)


@every_dtype
@every_branch
def test_exponentials_whose_scale_is_apart(branch, dtype):
    m, x, none = maths(branch), inputs(dtype), torch.zeros(())
    for lost in (None, torch.full_like(x, 3e-6 if dtype is torch.float32 else 3e-14)):
        for actual, expected in zip(m.exp_minus_abs(x, lost, False), formulas.exp_minus_abs(x, lost), strict=True):
            assert_agree(actual, expected, none, ULPS[dtype])
    # The interpreter has no expm1: an error of 1, not of the difference.
    cancelling = torch.ones(()) if branch == "interpreted" else none
    actual = m.one_minus(torch.exp(-x.abs()), x, False)
    assert_agree(actual, formulas.one_minus(x), cancelling, ULPS[dtype])


@every_dtype
@every_branch
@pytest.mark.parametrize("alpha", [0.5, 1.702, 3.1])
def test_a_product_and_what_its_rounding_has_lost(branch, dtype, alpha):
    m, x = maths(branch), inputs(dtype)
    x = x[x.abs() <= formulas.FAR / alpha]
    (rounded, lost), (expected, expected_lost) = m.product(alpha, x), formulas.product(alpha, x)
    assert torch.equal(rounded, expected)
    assert expected_lost.any() or alpha == 0.5
    assert_agree(lost, expected_lost, expected, 1e-6)


FUNCTIONS = [("sigmoid", 1.0), ("logsigmoid", 1.0), ("silu", 1.0), ("silu", 0.5), ("silu", 1.702)]


@every_dtype
@every_branch
@recorded
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(("function", "alpha"), FUNCTIONS, ids=str)
def test_weighted_functions_and_their_derivatives(function, alpha, order, recording, branch, dtype):
    m, x = maths(branch), inputs(dtype)
    v, kind = upstream(x, order), {"sigmoid": m.SIGMOID, "silu": m.SILU, "logsigmoid": m.LOGSIGMOID}[function]
    with recording():
        expected = formulas.weighted(v, x, function, order, alpha)
        around = size_around(lambda x: formulas.weighted(v.double(), x, function, order, alpha), x.double())
    # Only the derivatives have zeros to cross, at which terms cancel.
    crosses = (function, order) in {("silu", 1), ("silu", 2), ("sigmoid", 2)}
    ulps = ULPS[dtype] * (4 if crosses and dtype is torch.float32 else 1)
    assert_agree(m.weighted(v, x, kind, order, False, alpha), expected, around if crosses else torch.zeros(()), ulps)


@every_dtype
@every_branch
@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.7, 33.13])
def test_powers_by_their_logarithm(gamma, branch, dtype):
    m = maths(branch)
    first = -inputs(dtype).abs()
    first = first[first >= -formulas.FAR]
    second = torch.linspace(0, -0.7, len(first), dtype=torch.float64).to(dtype)
    actual, expected = m.exp_of_product(gamma, first, second, False), formulas.exp_of_product(gamma, first, second)
    assert_agree(actual, expected, torch.zeros(()), ULPS[dtype])
    # Even the error of an exponent of hundreds is that of its last digit, not of its rounding.
    true = torch.exp(gamma * (first.double() + second.double()))
    if dtype is torch.float32:
        error = ((expected.double() - true).abs() / ulp(true, dtype))[is_normal(true, dtype)]
        assert error.max() <= 3 + gamma


@every_dtype
@every_branch
@recorded
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 3.7])
def test_weighted_losses_and_their_derivatives(gamma, order, recording, branch, dtype):
    targets = torch.tensor([0.0, 1.0, 0.5, 0.25, 1e-3], dtype=dtype)
    m, x = maths(branch), inputs(dtype)
    positive, x = targets.repeat_interleave(len(x)), x.repeat(len(targets))
    v, negative = upstream(x, order), 1 - positive
    if gamma == 0:
        positive = 2.5 * positive  # as with pos_weight
    parts = positive.double(), negative.double()
    with recording():
        expected = formulas.weighted_loss(v, x, positive, negative, gamma, order, False)
        around = size_around(lambda x: formulas.weighted_loss(v.double(), x, *parts, gamma, order, False), x.double())
    ulps = ULPS[dtype] * (1 + gamma) * (4 if order and dtype is torch.float32 else 1)
    actual = m.weighted_loss(v, x, positive, negative, gamma, order, False)
    # Where u^γ is no normal number, it is a product in maths.py and a power here: of weights it makes nothing that is normal.
    u = parts[0] * torch.sigmoid(-x.double()) + parts[1] * torch.sigmoid(x.double())
    kept = (v.abs() < 3) | (gamma == 0) | ~(u**gamma < torch.finfo(dtype).smallest_normal)
    assert_agree(actual[kept], expected[kept], around[kept] if order else torch.zeros(()), ulps)


# N4 on a CPU

FAR_ELEMENTS = [-100.0, 200.0, 100.0, -5e3, math.inf, -math.inf, math.nan]


def elementwise():
    """Each operator in which rows do not meet: the gates, and the losses without a reduction."""
    for name, row, case in cases():
        if row.family in ("sigmoid", "gates"):
            yield name, case, case.function
        elif row.family == "losses" and case is row.cases[""]:
            loss = functools.partial(getattr(torch_sigmoid, name), reduction="none")
            yield name, case, loss
            if name == "sigmoid_focal_loss":
                yield f"{name}, gamma 0.7", case, functools.partial(loss, gamma=0.7)


ROWS, COLUMNS = 23, 34


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "function"), [pytest.param(*rest, id=name) for name, *rest in elementwise()])
def test_near_elements_have_the_same_bits_beside_far_ones(case, function, dtype):
    seeds = itertools.count()
    near = case.operands(lambda *shape: random(shape, dtype, seed=next(seeds), scale=2.0), ROWS, COLUMNS)
    mixed = [each.clone() for each in near]
    far = torch.arange(ROWS) % 3 == 1
    for index, each in enumerate(mixed):
        if index not in case.constants:
            each[far] = torch.tensor(FAR_ELEMENTS).repeat(ROWS)[: int(far.sum())].to(dtype)[:, None]

    def results(tensors):
        tensors = [each.detach().requires_grad_(index not in case.constants) for index, each in enumerate(tensors)]
        inputs = [each for each in tensors if each.requires_grad]
        with torch.no_grad():
            value = function(*tensors)
        output = function(*tensors)
        grad = random(output.shape, dtype, seed=90).requires_grad_()
        first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        again = torch.autograd.grad(output, inputs, grad, create_graph=True)
        second = torch.autograd.grad(again, (grad, *inputs), [torch.ones_like(each) for each in again])
        return [each.detach() for each in (value, output, *first, *again, *second)]

    kept = ~far
    for actual, expected in zip(results(mixed), results(near), strict=True):
        assert torch.equal(actual[kept], expected[kept])
        assert expected.isfinite().all()
