"""torch_sigmoid/eager.py: fast forms on a CPU that lose no digit, and by which no element depends on another."""

import functools
import itertools
import math

import pytest
import torch
from reference import FLOATS, SIXTEEN_BIT, is_normal, random, ulp

import torch_sigmoid as ts
from torch_sigmoid import eager, formulas
from torch_sigmoid.operators import cases

NAN, INF = math.nan, math.inf
# Beyond every interval of the fused operators, and on both sides of each of its ends.
FAR = [-9.9, -10.1, 7.9, 8.1, -79.0, -81.0, 79.0, 81.0, -63.0, -65.0, 65.0, -95.0, 95.0, 1e4, -1e4, INF, -INF, NAN]
# Below a block, above one, and above several.
SHAPES = {"small": (18, 5), "a block and more": (18, 3 * 2**12), "blocks": (36, 3 * 2**12)}


def elementwise():
    """Each operator in which rows do not meet."""
    for name, row, case in cases():
        if row.family == "gates":
            yield name, case, case.function
        elif row.family == "losses":
            loss = functools.partial(case.function, reduction="none") if case is row.cases[""] else None
            yield from [(name, case, loss)] * (loss is not None)
    sigmoid = next(case for name, _, case in cases() if name == "sigmoid, from the input")
    yield "sigmoid, from the input", sigmoid, sigmoid.function


every_operator = pytest.mark.parametrize(("case", "function"), [pytest.param(*rest, id=name) for name, *rest in elementwise()])


def value_and_gradients(function, tensors, constants, grad):
    tensors = [each.detach().requires_grad_(index not in constants) for index, each in enumerate(tensors)]
    output = function(*tensors)
    return output.detach(), *torch.autograd.grad(output, [each for each in tensors if each.requires_grad], grad)


def operands(case, shape, dtype):
    """Of a case, near; one row of a gate is one row of the operand, also where the gate is broadcast."""
    seeds = itertools.count()
    rows, columns = shape
    return case.operands(lambda *shape: random(shape, dtype, seed=next(seeds), scale=1.5), rows, columns)


def with_far_rows(near, constants, far):
    mixed = [each.clone() for each in near]
    for index, each in enumerate(mixed):
        if index not in constants:
            each[far] = torch.tensor(FAR, dtype=each.dtype).repeat(len(far))[: int(far.sum())][:, None]
    return mixed


@every_operator
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_near_elements_keep_their_bits_beside_far_ones(case, function, dtype, shape):
    near = operands(case, shape, dtype)
    far = torch.arange(shape[0]) % 2 == 1
    mixed = with_far_rows(near, case.constants, far)
    grad = random(function(*near).shape, dtype, seed=90)
    for actual, expected in zip(
        value_and_gradients(function, mixed, case.constants, grad),
        value_and_gradients(function, near, case.constants, grad),
        strict=True,
    ):
        assert torch.equal(actual[~far], expected[~far])
        assert expected.isfinite().all()


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_elements_beside_near_ones_are_as_exact_as_alone(case, function, dtype):
    shape = SHAPES["a block and more"]
    near = operands(case, shape, dtype)
    far = torch.arange(shape[0]) % 2 == 1
    mixed = with_far_rows(near, case.constants, far)
    for index, each in enumerate(mixed):
        if index not in case.constants:
            mixed[index] = torch.where(each.isfinite(), each, 0.5)
    grad = random(function(*mixed).shape, dtype, seed=91)
    results = value_and_gradients(function, mixed, case.constants, grad)
    exact = value_and_gradients(function, [each.double() for each in mixed], case.constants, grad.double())
    for actual, expected in zip(results, exact, strict=True):
        normal = is_normal(expected, dtype) & far[:, None]
        # The gradient of a gate that is broadcast errs by the terms of its sum.
        summed = actual.shape != results[0].shape and actual.size(-1) == 1
        allowed = (1.0 if dtype is torch.bfloat16 else 12.0) * ulp(expected, dtype) + summed * expected.abs() * 2**-12
        error = (actual.double() - expected).abs()
        assert (error <= allowed)[normal].all(), f"{(error / ulp(expected, dtype))[normal].max()} ulp"
        assert (actual != 0)[normal].all()


def test_a_form_chosen_by_the_extreme_element_would_be_caught(monkeypatch):
    """Where one far element decides for all, as once it did, near ones change."""

    def mend_all(result, radius, exactly, x, *operands):
        if (x.abs() > radius).any():
            result.copy_(exactly(x, *operands))

    monkeypatch.setattr(eager, "_mend", mend_all)
    near = random((4096,), torch.float32)
    mixed = torch.cat([near[:-1], torch.tensor([-100.0])])
    with torch.no_grad():
        assert not torch.equal(ts.silu(mixed)[:-1], ts.silu(near)[:-1])


# The products with powers of two are exact.
UPSTREAM = [2.0**power for power in (127, 123, 103, 0, -66, -100, -119, -121, -123, -126, -139)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", ["silu", "logsigmoid", "sigmoid_gate", "swiglu", "quick_gelu"])
def test_no_upstream_gradient_is_too_large_or_too_small(function, dtype):
    x = torch.linspace(-86, 86, 4001, dtype=torch.float64).to(dtype)
    numbers = torch.tensor(UPSTREAM, dtype=torch.float64).to(dtype)
    upstream, x = numbers.repeat_interleave(len(x)), x.repeat(len(numbers))
    one = torch.ones_like(x)
    call = {
        "silu": ts.silu,
        "logsigmoid": ts.logsigmoid,
        "quick_gelu": ts.quick_gelu,
        "sigmoid_gate": lambda x: ts.sigmoid_gate(one.to(x.dtype), x),
        "swiglu": lambda x: ts.swiglu(x, one.to(x.dtype)),
    }[function]
    (actual,) = value_and_gradients(call, [x], (), upstream)[1:]
    scale = 2.0**-10  # fp64 holds the gradient of the largest number too
    (exact,) = value_and_gradients(call, [x.double()], (), upstream.double() * scale)[1:]
    exact = exact / scale
    # silu' has a zero, around which its terms, at most 1.1 times the upstream gradient, cancel.
    terms = torch.where(x < 0, 0.3, 0.0) * upstream.double().abs() * ("lu" in function)
    normal = is_normal(exact, dtype) & (exact.abs() > 1.07 * torch.finfo(dtype).smallest_normal)
    near_zero = (x > -2.5) & (x < 0)
    error = (actual.double() - exact).abs() / ulp(torch.where(near_zero, torch.maximum(exact.abs(), terms), exact), dtype)
    assert error[normal].max() <= (6.0 if dtype is torch.float32 else 0.6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_a_product_loses_is_found_with_and_without_a_fused_addition(dtype, monkeypatch):
    x = random((1000,), dtype, scale=20.0).clamp(-45, 45)
    exact = torch.exp(-1.702 * x.double()) if dtype is torch.float32 else None

    def of():
        return eager._exp_minus(1.702, x, True, torch.empty_like(x), torch.empty_like(x))

    fused = of()
    monkeypatch.setattr(eager, "_adds_fused", lambda dtype: False)
    apart = of()
    assert ((fused - apart).abs() <= 2 * ulp(apart.double(), dtype)).all()
    if exact is not None:
        assert ((fused.double() - exact).abs() <= 4 * ulp(exact, dtype)).all()
        lossy = torch.exp(-1.702 * x)
        assert ((lossy.double() - exact).abs() > 4 * ulp(exact, dtype)).any()


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded gradient", "no elements", "no dimensions"])
def test_layouts_give_what_dense_tensors_give(case, function, dtype, layout):
    if layout == "no dimensions":
        near = operands(case, (1, 1), dtype)
        if near[0].numel() != 1:
            pytest.skip("halves need a dimension")
        near = [each.reshape(()) for each in near]
    else:
        near = operands(case, (0, 6) if layout == "no elements" else (70, 1002), dtype)
    output = function(*near)
    grad = random(output.shape, dtype, seed=92)
    changed = list(near)
    if layout == "transposed":
        changed = [each.mT.contiguous().mT for each in near]
    elif layout == "sliced":
        changed = [torch.nn.functional.pad(each, (1, 2))[:, 1:-2] for each in near]
    elif layout == "expanded gradient":
        grad = grad.flatten()[0].expand(output.shape)
    results = value_and_gradients(function, changed, case.constants, grad)
    wide = value_and_gradients(function, [each.double() for each in near], case.constants, grad.double())
    for actual, expected in zip(results, wide, strict=True):
        assert actual.shape == expected.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            actual.double(), expected, rtol=4 * eps, atol=4e-5 if actual.numel() < output.numel() else 8e-6
        )


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_16_bit_is_rounded_once_in_every_block(dtype):
    """Products that are rounded on the way are off by more than half an ulp."""
    g, a, grad = (random((3 * 2**16 + 5,), dtype, seed=seed, scale=2.0) for seed in range(3))
    for function, name in ((ts.sigmoid_gate, "sigmoid"), (lambda a, g: ts.swiglu(g, a), "silu")):
        value, to_a, to_g = value_and_gradients(function, [a, g], (), grad)
        wide = [each.double() for each in (g, a, grad)]
        h, slope = (formulas.weighted(1.0, wide[0], name, order) for order in (0, 1))
        for actual, exact in ((value, wide[1] * h), (to_a, wide[2] * h), (to_g, wide[1] * wide[2] * slope)):
            normal = is_normal(exact, dtype)
            terms = exact.abs() + 2**-4 * (wide[1] * wide[2]).abs() * (name == "silu")
            assert ((actual.double() - exact).abs() <= 0.5 * ulp(exact, dtype) + 2**-20 * terms)[normal].all()


def test_memory_that_inference_mode_has_made_is_not_kept():
    eager._kept.clear()
    x, gate = random((2**16,), torch.bfloat16), random((2**16,), torch.bfloat16, seed=1)
    with torch.inference_mode():
        inside = ts.swiglu(gate.clone(), x.clone())
    outside = ts.swiglu(gate.requires_grad_(), x)
    (grad,) = torch.autograd.grad(outside, gate, torch.ones_like(outside))
    assert torch.equal(inside, outside)
    assert grad.isfinite().all()
    assert eager._kept
    assert not any(memory.is_inference() for memory in eager._kept)


def test_results_do_not_share_the_memory_that_is_kept():
    a, g = random((2**16,), torch.float32), random((2**16,), torch.float32, seed=1)
    first = value_and_gradients(ts.sigmoid_gate, [a, g], (), torch.ones_like(a))
    before = [each.clone() for each in first]
    value_and_gradients(ts.sigmoid_gate, [2 * a, 3 * g], (), torch.ones_like(a))
    assert all(map(torch.equal, first, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_is_clamped_neither_in_value_nor_in_gradient(dtype):
    """As in the kernels and formulas, however many elements there are."""
    gate, up = (torch.linspace(-6, 6, 4096).to(dtype) for _ in range(2))
    gate[::64], up[32::64] = NAN, NAN
    leaves = [each.requires_grad_() for each in (gate, up)]
    to_gate, to_up = torch.autograd.grad(ts.swiglu(*leaves, limit=7.0).sum(), leaves)
    assert to_gate[::32].isnan().all()
    assert to_up[::64].isnan().all()
    one = [each.detach()[32:33].requires_grad_() for each in leaves]
    assert to_up[32] == torch.autograd.grad(ts.swiglu(*one, limit=7.0).sum(), one)[1] != 0
