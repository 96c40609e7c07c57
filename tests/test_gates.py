"""log-sigmoid, SiLU, GLU, sigmoid_gate and SwiGLU: right against float64, in every layout and every autograd mode."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference import (
    FLOATS,
    LAYOUTS,
    NARROW_EXECUTED,
    SIXTEEN_BIT,
    all_patterns,
    assert_near,
    is_normal,
    random,
    readable,
    runs_kernels,
    ulp,
    ulp_error,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torch_sigmoid as ts
from benchmarks.measure import counts
from torch_sigmoid import kernels

pytestmark = [pytest.mark.ways("ptx"), pytest.mark.usefixtures("poisoned_allocations")]
INTERPRETED = kernels.INTERPRETED


def clamped_swiglu(gate, up):
    """GPT-OSS's, with a limit that random numbers reach; at the limit gradients pass, as through torch's clamp before 2.14."""
    gate, up = torch.where(gate > 2.0, 2.0, gate), torch.where(up.abs() > 2.0, 2.0 * up.sign(), up)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def halves(function, dim):
    return lambda packed: function(*packed.chunk(2, dim))


def pairs(function, dim):
    """Of a gate and an operand that alternate along `dim`."""
    return lambda packed: function(*packed.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1))


def gated(input, gate):
    return input * torch.sigmoid(gate)


# Ours, the same in torch operators, and the shapes of the operands.
CASES = {
    "logsigmoid": (ts.logsigmoid, F.logsigmoid, [(5, 6)]),
    "silu": (ts.silu, F.silu, [(5, 6)]),
    "glu": (ts.glu, halves(gated, -1), [(5, 6)]),
    "glu-middle": (lambda x: ts.glu(x, 1), halves(gated, 1), [(3, 4, 5)]),
    "sigmoid_gate": (ts.sigmoid_gate, gated, [(5, 6), (5, 6)]),
    "sigmoid_gate-rows": (ts.sigmoid_gate, gated, [(5, 6), (5, 1)]),
    "sigmoid_gate-columns": (ts.sigmoid_gate, gated, [(5, 6), (1, 6)]),
    "sigmoid_gate-channels": (ts.sigmoid_gate, gated, [(2, 3, 2, 2), (2, 3, 1, 1)]),
    "sigmoid_gate-alternating": (ts.sigmoid_gate, gated, [(2, 3, 2, 2), (2, 1, 2, 1)]),
    "sigmoid_gate-scalar": (ts.sigmoid_gate, gated, [(5, 6), ()]),
    "swiglu": (ts.swiglu, lambda gate, up: F.silu(gate) * up, [(5, 6), (5, 6)]),
    "swiglu-broadcast": (ts.swiglu, lambda gate, up: F.silu(gate) * up, [(5, 6), (6,)]),
    "swiglu-packed": (lambda x: ts.swiglu_packed(x, 0), halves(lambda gate, up: F.silu(gate) * up, 0), [(6, 5)]),
    "swiglu-clamped": (
        lambda gate, up: ts.swiglu(gate, up, alpha=1.702, limit=2.0, up_offset=1.0),
        clamped_swiglu,
        [(5, 6), (5, 6)],
    ),
    "swiglu-clamped-packed": (
        lambda x: ts.swiglu_packed(x, alpha=1.702, limit=2.0, up_offset=1.0),
        halves(clamped_swiglu, -1),
        [(5, 6)],
    ),
    "swiglu-interleaved-middle": (
        lambda x: ts.swiglu_packed(x, 1, interleaved=True),
        pairs(lambda gate, up: F.silu(gate) * up, 1),
        [(3, 4, 5)],
    ),
    "swiglu-clamped-interleaved": (
        lambda x: ts.swiglu_packed(x, interleaved=True, alpha=1.702, limit=2.0, up_offset=1.0),
        pairs(clamped_swiglu, -1),
        [(5, 6)],
    ),
}
# What test_operators.py does not call so: gates that are broadcast, halves along other dimensions, and both with clamps.
PLAIN = {"logsigmoid", "silu", "glu", "sigmoid_gate", "sigmoid_gate-rows", "swiglu", "swiglu-clamped"}
every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in PLAIN])
# Halves and pairs along another dimension, and gradients that are summed: over some dimensions, to a number, to a vector.
KINDS = ["glu-middle", "sigmoid_gate-alternating", "sigmoid_gate-scalar", "swiglu-broadcast", "swiglu-interleaved-middle"]


def operands(case, dtype, device, seed=0):
    return tuple(random(shape, dtype, device, seed + index) for index, shape in enumerate(CASES[case][2]))


def leaves(tensors):
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def value_and_gradients(function, tensors, upstream=None):
    tensors = leaves(tensors)
    output = function(*tensors)
    upstream = torch.ones_like(output) if upstream is None else upstream.to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, tensors, upstream)


# The functions of one number and their derivatives, in float64; good to its last digits wherever a result is normal in fp32.
def exact(function, order, x):
    x = x.double()
    sigma, complement = 1 / (1 + torch.exp(-x)), 1 / (1 + torch.exp(x))
    near = x.clamp(-1e3, 1e3)
    slope, bend = sigma * complement, -torch.tanh(near / 2)
    if function == "sigmoid":
        return (sigma, slope, slope * bend)[order]
    if function == "silu":
        return (torch.where(x < 0, near, x) * sigma, sigma * (1 + near * complement), slope * (2 + near * bend))[order]
    return (torch.where(x < 0, x - torch.log1p(torch.exp(near)), -torch.log1p(torch.exp(-x))), complement, -slope)[order]


def terms_of(function, order, x):
    """What cancels in `exact`, without signs, and at most 1: only the derivatives of silu are such sums."""
    if function != "silu" or order == 0:
        return torch.zeros_like(x, dtype=torch.float64)
    far, slope = x.double().abs().clamp(max=1e3), exact("sigmoid", 1, x)
    return (exact("sigmoid", 0, x) + far * slope if order == 1 else slope * (2 + far)).clamp(max=1)


def derivatives(function, tensors, *v):
    """The gradients for an upstream gradient of 1, and from `v`, upstream of them, those of that 1 and of the tensors."""
    tensors = leaves(tensors)
    output = function(*tensors)
    upstream = torch.ones_like(output).requires_grad_()
    grads = torch.autograd.grad(output, tensors, upstream, create_graph=True)
    return tuple(grad.detach() for grad in grads), torch.autograd.grad(grads, (upstream, *tensors), v)


# In ulps; the interpreter truncates where it stores bf16. Around the zero of a sum, such as silu', errors are those of `terms`.
def assert_exact(actual, true, terms=0.0, allowed=1.0):
    dtype = actual.dtype
    allowed += INTERPRETED and dtype is torch.bfloat16
    normal = is_normal(true, dtype)
    error = (actual.cpu().double() - true).abs()
    bound = allowed * ulp(true, dtype) + 2**-21 * terms
    assert (error <= bound)[normal].all(), f"{ulp_error(actual, true)[normal & (error > bound)].max()} ulp"
    assert (actual.cpu() != 0)[normal & (true.abs() > 2**-20 * terms)].all()


OPERANDS = (1.0, -2.5, 100.0, 1e-3)


def interleaved(packed):
    return ts.swiglu_packed(packed, interleaved=True)


def joined(gate, up):
    """Both, alternating along the last dimension."""
    return torch.stack([gate, up], -1).flatten(-2)


@pytest.mark.parametrize("kind", ["glu", "sigmoid_gate", "swiglu", "swiglu-interleaved"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_gate_within_an_ulp(kind, dtype, device):
    gate = all_patterns(dtype)
    if INTERPRETED and dtype is torch.bfloat16:
        # The interpreter misreads bf16's subnormal numbers.
        gate = gate[gate.abs() >= torch.finfo(dtype).smallest_normal]
    gate = gate[gate.isfinite()].expand(len(OPERANDS), -1)
    operand = torch.tensor(OPERANDS, dtype=dtype)[:, None].expand_as(gate)
    function = "silu" if kind.startswith("swiglu") else "sigmoid"
    if kind == "glu":
        value, packed = value_and_gradients(ts.glu, [torch.cat([operand, gate], 1).to(device)])
        to_operand, to_gate = packed.chunk(2, 1)
    elif kind == "swiglu-interleaved":
        value, packed = value_and_gradients(interleaved, [joined(gate, operand).to(device)])
        to_gate, to_operand = packed.unflatten(1, (-1, 2)).unbind(2)
    elif kind == "swiglu":
        value, to_gate, to_operand = value_and_gradients(ts.swiglu, [gate.to(device), operand.to(device)])
    else:
        value, to_operand, to_gate = value_and_gradients(ts.sigmoid_gate, [operand.to(device), gate.to(device)])
    assert_exact(value, operand.double() * exact(function, 0, gate))
    assert_exact(to_operand, exact(function, 0, gate))
    assert_exact(to_gate, operand.double() * exact(function, 1, gate), operand.double().abs() * terms_of(function, 1, gate))


@pytest.mark.parametrize("function", ["silu", "logsigmoid"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_second_derivative_within_an_ulp(function, dtype, device):
    x = all_patterns(dtype)
    x = x[x.isfinite()]
    _, (to_upstream, to_x) = derivatives(getattr(ts, function), [x.to(device)], torch.ones_like(x, device=device))
    assert_exact(to_upstream, exact(function, 1, x), terms_of(function, 1, x))
    assert_exact(to_x, exact(function, 2, x), terms_of(function, 2, x))


@pytest.mark.parametrize("kind", ["sigmoid_gate", "sigmoid_gate-rows", "swiglu", "swiglu-interleaved"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_second_derivative_of_a_gate_within_an_ulp(kind, dtype, device):
    gate = all_patterns(dtype)
    gate = gate[gate.isfinite() & readable(gate, device)]
    operand = torch.tensor(OPERANDS, dtype=dtype)[:, None].expand(-1, len(gate))
    broadcast = kind == "sigmoid_gate-rows"
    gates = gate[None] if broadcast else gate.expand_as(operand)
    tensors = [gates.to(device), operand.to(device)]

    def function(gate, operand):
        if kind == "swiglu-interleaved":
            return interleaved(joined(gate, operand))
        return ts.swiglu(gate, operand) if kind == "swiglu" else ts.sigmoid_gate(operand, gate)

    (to_gate, to_operand), (to_upstream, to_gate_again, to_operand_again) = derivatives(
        function, tensors, *map(torch.ones_like, tensors)
    )
    name = "silu" if kind.startswith("swiglu") else "sigmoid"
    value, slope, bend = (exact(name, order, gates) for order in range(3))
    a = operand.double()
    of_slope, of_bend = (torch.maximum(terms_of(name, order, gates), exact(name, order, gates).abs()) for order in (1, 2))
    for actual, true, terms, summed in (
        (to_gate, a * slope, a.abs() * of_slope, broadcast),
        (to_operand, value, value.abs(), False),
        (to_upstream, value + a * slope, value.abs() + a.abs() * of_slope, False),
        (to_gate_again, slope + a * bend, of_slope + a.abs() * of_bend, broadcast),
        (to_operand_again, slope, of_slope, False),
    ):
        if summed:
            true, terms = true.sum(0, keepdim=True), terms.sum(0, keepdim=True)
        assert_exact(actual, true.expand_as(actual), terms)


@pytest.mark.parametrize("function", ["silu", "logsigmoid"])
def test_fp32_within_four_ulp(function, device):
    x = torch.cat([torch.linspace(-104, 104, 100001), torch.linspace(-3, 3, 100001)])
    value, grad = value_and_gradients(getattr(ts, function), [x.to(device)])
    # The interpreter has no log1p and no fused multiply-add.
    allowed = 5.0 if INTERPRETED else 4.0
    assert_exact(value, exact(function, 0, x), allowed=allowed)
    assert_exact(grad, exact(function, 1, x), terms_of(function, 1, x), allowed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_and_nan(dtype, device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, inf, nan], dtype=dtype, device=device)
    expected = {ts.silu: ([0.0, inf, nan], [0.0, 1.0, nan]), ts.logsigmoid: ([-inf, 0.0, nan], [1.0, 0.0, nan])}
    for function, results in expected.items():
        for actual, numbers in zip(value_and_gradients(function, [x]), results):
            torch.testing.assert_close(actual, torch.tensor(numbers, dtype=dtype, device=device), equal_nan=True)
    ones = torch.ones_like(x)
    for actual, numbers in zip(
        value_and_gradients(ts.sigmoid_gate, [ones, x]), ([0.0, 1.0, nan], [0.0, 1.0, nan], [0.0, 0.0, nan])
    ):
        torch.testing.assert_close(actual, torch.tensor(numbers, dtype=dtype, device=device), equal_nan=True)
    value, to_gate, to_up = value_and_gradients(lambda gate, up: ts.swiglu(gate, up, limit=7.0, up_offset=1.0), [x, ones])
    assert value.isnan().tolist() == to_up.isnan().tolist() == [False, False, True]
    assert to_gate[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exactly_at_the_limit_gradients_pass(dtype, device):
    limit = 2.0
    numbers = torch.tensor([-limit, limit, 1.0], dtype=dtype, device=device)
    below, above = (torch.nextafter(numbers, numbers * factor) for factor in (0.5, 2.0))
    up, gate = torch.cartesian_prod(*[torch.cat([below, numbers, above])] * 2).mT.contiguous()

    def derivatives(function, tensors):
        tensors = leaves(tensors)
        output = function(*tensors)
        upstream = torch.full_like(output, 1.5).requires_grad_()
        grads = torch.autograd.grad(output, tensors, upstream, create_graph=True)
        v = [torch.full_like(grad, 0.75) for grad in grads]
        return *grads, *torch.autograd.grad(grads, (upstream, *tensors), v)

    actual = derivatives(lambda gate, up: ts.swiglu(gate, up, alpha=1.702, limit=limit, up_offset=1.0), (gate, up))
    expected = derivatives(clamped_swiglu, (gate.double(), up.double()))
    for one, other in zip(actual, expected):
        assert_near(one, other, dtype)
        assert torch.equal(one == 0, other == 0)


@every_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_against_float64(case, dtype, device):
    ours, theirs, _ = CASES[case]
    tensors = operands(case, dtype, device)
    wide = tuple(tensor.double() for tensor in tensors)
    upstream = random(theirs(*wide).shape, dtype, device, seed=9)
    results = value_and_gradients(ours, tensors, upstream)
    for actual, expected in zip(results, value_and_gradients(theirs, wide, upstream)):
        assert actual.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=4 * eps, atol=16 * eps)


# Executed, each takes seconds.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.ways] * (case not in KINDS)) for case in CASES if case not in PLAIN]
)
def test_all_first_and_second_derivatives(case, device):
    function = CASES[case][0]
    tensors = leaves(operands(case, torch.float64, device))
    options = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, **options)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_derivative_of_each_dtype(case, dtype, device):
    ours, theirs, _ = CASES[case]
    tensors = operands(case, dtype, device)
    v = [random(tensor.shape, dtype, device, seed=20 + i) for i, tensor in enumerate(tensors)]

    def second(function, tensors, v):
        tensors = leaves(tensors)
        output = function(*tensors)
        upstream = random(output.shape, dtype, device, seed=9).to(output.dtype).requires_grad_()
        grads = torch.autograd.grad(output, tensors, upstream, create_graph=True)
        return torch.autograd.grad(grads, (upstream, *tensors), v)

    wide = second(theirs, [tensor.double() for tensor in tensors], [each.double() for each in v])
    for actual, expected in zip(second(ours, tensors, v), wide):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=4 * eps, atol=200 * eps)


@every_case
def test_the_third_derivative(case, device):
    ours, theirs, _ = CASES[case]

    def third(function):
        tensors = leaves(operands(case, torch.float64, device))
        grads = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
        grads = torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    for actual, expected in zip(third(ours), third(theirs)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(case, device):
    ours, theirs, _ = CASES[case]
    tensors = operands(case, torch.float64, device)
    numbers = tuple(range(len(tensors)))
    batch = tuple(torch.stack([tensor, 2 * tensor, -tensor], -1) for tensor in tensors)
    tangents = operands(case, torch.float64, device, seed=5)

    def of(function):
        def loss(*tensors):
            return function(*tensors).sin().sum()

        yield torch.func.vmap(torch.func.grad(loss, numbers), -1)(*batch)
        yield torch.func.hessian(loss, numbers)(*tensors)
        yield torch.func.jacrev(torch.func.jacrev(loss, numbers), numbers)(*tensors)
        yield torch.func.jvp(function, tensors, tangents)
        yield torch.func.jvp(lambda *t: torch.func.jvp(function, t, tangents)[1], tensors, tangents)
        yield torch.func.vmap(function, (0, *(None for _ in numbers[1:])))(torch.stack([tensors[0]] * 2), *tensors[1:])

    torch.testing.assert_close(list(of(ours)), list(of(theirs)), rtol=1e-9, atol=1e-9)


@every_case
def test_batched_upstream_gradients_can_be_differentiated(case, device):
    ours, theirs, _ = CASES[case]

    def of(function):
        tensors = leaves(operands(case, torch.float64, device))
        output = function(*tensors)
        upstream = torch.stack([torch.ones_like(output), output.detach()])
        grads = torch.autograd.grad(output, tensors, upstream, is_grads_batched=True, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    torch.testing.assert_close(of(ours), of(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.launches_nothing("a compiler sees torch operators")
@pytest.mark.ways
def test_torch_compile_sees_the_whole_graph(case, device):
    ours, theirs, _ = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = operands(case, torch.float64, device)
    results, expected = (value_and_gradients(function, tensors) for function in (compiled, theirs))
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [ts.silu, ts.logsigmoid])
@pytest.mark.launches_nothing("a compiler sees torch operators")
@pytest.mark.ways
def test_under_torch_compile_no_gradient_is_lost(function, device):
    torch._dynamo.reset()
    x = torch.linspace(-91, 87, 1001, dtype=torch.float32).to(torch.bfloat16)
    value, grad = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), [x.to(device)])
    name = function.__name__
    for actual, true in ((value, exact(name, 0, x)), (grad, exact(name, 1, x))):
        normal = is_normal(true, x.dtype)
        assert ((actual.cpu().double() - true).abs() <= ulp(true, x.dtype) + 2**-21 * (name == "silu"))[normal].all()


@pytest.mark.parametrize("dtype", NARROW_EXECUTED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.launches_nothing("empty tensors among the cases")
def test_every_layout(layout, dtype, device):
    make = LAYOUTS[layout]
    x, gate = make(dtype, device), make(dtype, device, seed=1)
    upstream = random(x.shape, dtype, device, seed=2)
    upstreams = [upstream, upstream.mT.contiguous().mT if x.dim() > 1 else upstream, upstream.new_ones(()).expand(x.shape)]
    for ours, theirs, tensors in (
        (ts.silu, F.silu, [x]),
        (ts.sigmoid_gate, gated, [x, gate]),
        (ts.sigmoid_gate, gated, [x, gate.contiguous()]),
        (ts.swiglu, lambda gate, up: F.silu(gate) * up, [x, gate]),
    ):
        before = [tensor.clone() for tensor in tensors]
        for grad in upstreams:
            wide = value_and_gradients(theirs, [tensor.double() for tensor in tensors], grad.double())
            for actual, expected in zip(value_and_gradients(ours, tensors, grad), wide):
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(actual.double(), expected, rtol=4 * eps, atol=8 * eps)
        assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_halves_along_any_dimension(dim, memory_format, dtype, device):
    packed = random((4, 6, 8, 34), dtype, device).to(memory_format=memory_format)
    shape = packed.chunk(2, dim)[0].shape
    for upstream in (random(shape, dtype, device, seed=1), random(shape[::-1], dtype, device, seed=1).permute(3, 2, 1, 0)):
        for ours, theirs in (
            (ts.glu, lambda x, dim: F.glu(x, dim)),
            (ts.swiglu_packed, lambda x, dim: F.silu(x.chunk(2, dim)[0]) * x.chunk(2, dim)[1]),
        ):
            value, grad = value_and_gradients(lambda x: ours(x, dim), [packed], upstream)  # noqa: B023
            true = value_and_gradients(lambda x: theirs(x, dim), [packed.double()], upstream.double())  # noqa: B023
            assert_near(value, true[0], dtype)
            torch.testing.assert_close(grad.double(), true[1], rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
            if runs_kernels(device):
                assert grad.stride() == packed.stride()


# Packed tensors as views of a vector, and whether the kernels of pairs read them, or those of two strided tensors.
PACKED_LAYOUTS = {
    "one pair": (lambda x: x[:2], False),
    "a tail": (lambda x: x[:30], True),
    "a body": (lambda x: x[:32], True),
    "a tile": (lambda x: x[:2048], True),
    "above a tile": (lambda x: x[:2050], True),
    "tiles and a tail": (lambda x: x[:5006], True),
    "offset by one": (lambda x: x[1:3001], True),
    "one pair a row": (lambda x: x[:66].view(33, 2), True),
    "rows": (lambda x: x.as_strided((33, 64), (128, 1)), True),
    "odd rows": (lambda x: x.as_strided((33, 74), (75, 1), 37), True),
    "narrow rows": (lambda x: x.as_strided((65, 6), (8, 1)), True),
    "wide rows": (lambda x: x.as_strided((3, 2200), (2401, 1)), True),
    "matrices": (lambda x: x.as_strided((3, 5, 14), (200, 20, 1)), True),
    "expanded rows": (lambda x: x[:86].expand(29, 86), True),
    "size-one dimensions": (lambda x: x.as_strided((1, 19, 1, 10), (7, 10, 3, 1)), True),
    "one pair a wide row": (lambda x: x.as_strided((33, 2), (7, 1)), False),
    "transposed": (lambda x: x.as_strided((37, 54), (1, 37)), False),
    "channels last": (lambda x: x.as_strided((2, 5, 7, 6), (210, 1, 30, 5)), False),
    "every second": (lambda x: x[:600:2], False),
    "expanded columns": (lambda x: x[:29, None].expand(29, 86), False),
    "four strided dimensions": (lambda x: x.as_strided((3, 4, 5, 6), (1000, 200, 20, 2)), False),
    "four dimensions of pairs": (lambda x: x.as_strided((3, 4, 5, 6), (1000, 200, 20, 1)), False),
}


def dense(upstream):
    return upstream


def expanded(upstream):
    return upstream.flatten()[0].expand(upstream.shape)


def transposed(upstream):
    return upstream.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(upstream):
    return torch.cat([upstream, upstream], -1)[..., : upstream.shape[-1]]


@pytest.mark.parametrize(
    ("layout", "view_of_upstream", "dtype"),
    [
        *zip(PACKED_LAYOUTS, itertools.cycle([dense, expanded]), itertools.cycle([torch.float32] * 2 + [torch.bfloat16] * 2)),
        *itertools.product(["rows"], [dense, transposed, sliced], [torch.float64, torch.float16]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_interleaved_pairs_of_any_layout_have_the_bits_of_two_tensors(layout, view_of_upstream, dtype, device):
    view, of_pairs = PACKED_LAYOUTS[layout]
    packed = view(random((9000,), dtype, device))
    gate, up = packed[..., ::2].contiguous(), packed[..., 1::2].contiguous()
    before = packed.clone()
    upstream, to_gate, to_up = (random(gate.shape, dtype, device, seed=seed) for seed in (1, 2, 3))
    upstream = view_of_upstream(upstream)
    actual = second_derivatives(interleaved, [packed], upstream, [joined(to_gate, to_up)])
    value, of_gate, of_up, again_gate, again_up, again_upstream = second_derivatives(
        ts.swiglu, [gate, up], upstream.contiguous(), [to_gate, to_up]
    )
    expected = value, joined(of_gate, of_up), joined(again_gate, again_up), again_upstream
    for one, other in zip(actual, expected, strict=True):
        if runs_kernels(device):
            assert torch.equal(one, other)
        else:  # torch computes the rest of a vector otherwise
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert torch.equal(packed, before)
    if runs_kernels(device):
        assert actual[1].stride() == torch.empty_like(packed).stride()
        assert (kernels.interleaved.over_pairs((packed,), (value,)) is not None) == of_pairs


@pytest.mark.parametrize("layout", ["tiles and a tail", "rows", "transposed", "every second"])
def test_one_kernel_for_each_derivative_of_interleaved_pairs(layout, device):
    if not runs_kernels(device):
        pytest.skip("counts kernels")
    packed = PACKED_LAYOUTS[layout][0](random((9000,), torch.bfloat16, device)).detach().requires_grad_()
    n_launches = []
    with counts.counted() as counter:
        output = interleaved(packed)
        n_launches.append(counter.launches)
        upstream = torch.ones_like(output).requires_grad_()
        (grad,) = torch.autograd.grad(output, packed, upstream, create_graph=True)
        n_launches.append(counter.launches)
        torch.autograd.grad(grad, (upstream, packed), grad.detach())
        n_launches.append(counter.launches)
    assert n_launches == [1, 2, 3]


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_interleaved_pairs_along_any_dimension(dim, memory_format, device):
    packed = random((4, 6, 8, 34), torch.bfloat16, device).to(memory_format=memory_format)
    value, grad = value_and_gradients(lambda x: ts.swiglu_packed(x, dim - 4, interleaved=True), [packed])
    true_value, true_grad = value_and_gradients(pairs(lambda gate, up: F.silu(gate) * up, dim), [packed.double()])
    assert_near(value, true_value, packed.dtype)
    torch.testing.assert_close(grad.double(), true_grad, rtol=4 * 2**-8, atol=4 * 2**-8)
    if runs_kernels(device):
        assert grad.stride() == packed.stride()


# Shapes of a tensor and of its gate: what is summed up are rows, columns, both, in groups or not, split or not.
BROADCASTS = [
    ((4, 6, 5, 7), (4, 6, 1, 1)),
    ((4, 6, 5, 7), (1, 6, 1, 1)),
    ((4, 6, 5, 7), (6, 1, 1)),
    ((4, 6, 5, 7), (4, 1, 5, 7)),
    ((4, 6, 5, 7), (5, 7)),
    ((4, 6, 5, 70), (4, 6, 5, 1)),
    ((4, 6, 5, 7), ()),
    ((4, 6, 5, 7), (4, 1, 5, 1)),
    ((33, 3000), (33, 1)),
    ((3000, 40), (1, 40)),
    ((2, 90000), (1, 1)),
    ((2, 40000, 3), (2, 1, 3)),
    ((1, 5, 1), (1, 1, 1)),
    ((0, 3), (1, 3)),
    ((3, 0), (3, 1)),
]


@pytest.mark.latin_square
@pytest.mark.parametrize(("shape", "gate_shape"), BROADCASTS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.launches_nothing("empty tensors among the cases")
def test_a_gate_that_is_broadcast(shape, gate_shape, last, dtype, device):
    x, gate = random(shape, dtype, device), random(gate_shape, dtype, device, seed=1)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    upstream = random(shape, dtype, device, seed=2)
    value, to_x, to_gate = value_and_gradients(ts.sigmoid_gate, [x, gate], upstream)
    wide = value_and_gradients(gated, [x.double(), gate.double()], upstream.double())
    assert value.stride() == x.stride() or x.numel() == 0
    assert to_gate.shape == gate.shape
    for actual, expected in ((value, wide[0]), (to_x, wide[1])):
        assert_near(actual, expected, dtype)
    # A sum's error is relative to what it sums up.
    terms = value_and_gradients(gated, [x.double().abs(), gate.double()], upstream.double().abs())[2]
    tolerance = torch.finfo(dtype).eps * wide[2].abs() + 1e-5 * terms
    assert ((to_gate.double() - wide[2]).abs() <= tolerance).all()
    again = value_and_gradients(ts.sigmoid_gate, [x, gate], upstream)
    assert all(map(torch.equal, (value, to_x, to_gate), again))
    # N4: how often a gate is read does not decide on a bit.
    full = value_and_gradients(ts.sigmoid_gate, [x, gate.expand(shape).contiguous()], upstream)
    if runs_kernels(device):
        assert torch.equal(value, full[0])
        assert torch.equal(to_x, full[1])


@pytest.fixture(params=[1, 4, 10**6], ids=lambda n: f"{n} programs")
def enough_programs(request, monkeypatch):
    """How many programs suffice for a sum along a dimension: one alone, some that add up several blocks, or one a block."""
    if kernels.UNAVAILABLE:
        pytest.skip("without Triton there are no kernels")
    from torch_sigmoid.kernels import kept, reduce

    def forget():
        reduce.plan_along.cache_clear()
        for cache in kept.caches:
            cache.clear()

    monkeypatch.setattr(reduce, "ENOUGH_PROGRAMS", request.param)
    forget()
    yield request.param
    forget()


# Dimensions of an operand, outermost first, that its gate has too (K) or is broadcast along (R), and their sizes. An operand is
# cut out of a larger tensor, so that neighbouring dimensions do not become one.
PATTERNS = {
    "R": [(2503,), (48,)],
    "KR": [(5, 2503), (70, 64), (1, 33)],
    "RK": [(300, 33), (130, 64), (2503, 1)],
    "RR": [(5, 2503), (130, 64)],
    "RKR": [(3, 5, 2503), (4, 70, 64)],
    "KRK": [(3, 300, 33), (4, 130, 64)],
    "KKR": [(3, 5, 2503), (4, 70, 64)],
    "RKK": [(300, 3, 33), (130, 4, 64)],
    "KRR": [(3, 5, 2503), (4, 70, 64)],
    "RRK": [(3, 300, 33), (4, 130, 64)],
    "RRR": [(3, 5, 33), (4, 70, 64)],
}


def second_derivatives(function, tensors, upstream, outers):
    """The value, the gradients, and the gradients of the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, upstream)]
    value = function(*leaves[:-1])
    grads = torch.autograd.grad(value, leaves[:-1], leaves[-1], create_graph=True)
    return value, *grads, *torch.autograd.grad(grads, leaves, outers)


@pytest.mark.latin_square
@pytest.mark.parametrize(
    ("pattern", "shape"), [(name, shape) for name, shapes in PATTERNS.items() for shape in shapes], ids=str
)
def test_a_gate_is_summed_along_any_of_three_dimensions(pattern, shape, enough_programs, device):
    from torch_sigmoid.kernels import launch, reduce

    larger = random([size + 3 for size in shape], torch.float32, device)
    x = larger[tuple(slice(1, size + 1) for size in shape)]
    gate_shape = [size if each == "K" else 1 for each, size in zip(pattern, shape)]
    gate = random(gate_shape, torch.float32, device, seed=1)
    upstream, *outers = (random(each, torch.float32, device, seed=2 + i) for i, each in enumerate([shape, shape, gate_shape]))

    with counts.counted() as counter:
        actual = second_derivatives(ts.sigmoid_gate, (x, gate), upstream, outers)
    planned = reduce.plan_along(shape, launch.strides_of((torch.empty(shape), upstream, x, gate.expand(shape))))
    assert planned is not None
    if enough_programs == 1:
        assert planned.splits == 1
    elif enough_programs == 4:
        assert planned.programs < 2 * max(4, planned.programs // planned.splits)
    else:
        assert planned.steps == 1
        assert planned.splits > 1 or max(shape) < 300
    if runs_kernels(device):
        assert counter.launches == 3, "one each for the value, its gradients, and theirs"

    wide = [tensor.double() for tensor in (x, gate, upstream, *outers)]
    expected = second_derivatives(gated, wide[:2], wide[2], wide[3:])
    terms = second_derivatives(gated, [wide[0].abs(), wide[1]], wide[2].abs(), [each.abs() for each in wide[3:]])
    n_summed = x.numel() // gate.numel()
    for one, other, term in zip(actual, expected, terms):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6 * max(n_summed, term.abs().max().item()))

    # Shapes, strides, dtypes and alignment settle the order of a sum: the same bits again, and for copies elsewhere in memory.
    again = second_derivatives(ts.sigmoid_gate, (x, gate), upstream, outers)
    assert all(map(torch.equal, actual, again))
    elsewhere = torch.empty_like(larger).copy_(larger)[tuple(slice(1, size + 1) for size in shape)]
    again = second_derivatives(ts.sigmoid_gate, (elsewhere, gate.clone()), upstream.clone(), [each.clone() for each in outers])
    assert all(map(torch.equal, actual, again))


def test_a_sum_along_alternating_dimensions_has_no_walk():
    reduce = pytest.importorskip("torch_sigmoid.kernels.reduce")
    shape = (2, 3, 4, 5)
    assert reduce.plan_along(shape, ((60, 20, 5, 1), (3, 0, 1, 0))) is None
    assert reduce.plan_along(shape, ((60, 20, 5, 1), (60, 20, 5, 1))) is None, "nothing to sum"


# Strides of the stored tensor and of the gate; the sizes of the walk, whether sums run along its columns, and what is left.
SUMS = {
    "R": ((6, 7), (0, 0), (None, None, 42), True, (1, 1), (False, False)),
    "KR": ((6, 7), (1, 0), (None, 6, 7), True, (1, 6), (False, False)),
    "RK": ((6, 7), (0, 1), (None, 6, 7), False, (1, 7), (False, False)),
    "RKR": ((5, 6, 7), (0, 1, 0), (5, 6, 7), True, (5, 6), (True, False)),
    "KRK": ((5, 6, 7), (7, 0, 1), (5, 6, 7), False, (5, 7), (False, False)),
    "KKR": ((5, 6, 7), (1, 5, 0), (5, 6, 7), True, (5, 6), (False, False)),
    "KKR, mergeable": ((5, 6, 7), (6, 1, 0), (None, 30, 7), True, (1, 30), (False, False)),
    "RKK": ((5, 6, 7), (0, 1, 6), (6, 5, 7), False, (6, 7), (False, False)),
    "RKK, mergeable": ((5, 6, 7), (0, 7, 1), (None, 5, 42), False, (1, 42), (False, False)),
}


@pytest.mark.parametrize("pattern", SUMS)
def test_how_a_sum_along_dimensions_is_planned(pattern):
    reduce = pytest.importorskip("torch_sigmoid.kernels.reduce")
    shape, strides, sizes, along_columns, kept, also_summed = SUMS[pattern]
    planned = reduce.plan_along(shape, (torch.empty(shape).stride(), strides))
    assert (planned.walk.sizes, planned.along_columns) == (sizes, along_columns)
    assert (planned.kept, planned.also_summed) == (kept, also_summed)
    assert (planned.steps, planned.splits) == (1, 1)
    # A size of 1 is nobody's dimension.
    padded = reduce.plan_along((1, *shape), ((99, *torch.empty(shape).stride()), (0, *strides)))
    assert padded == planned


@pytest.mark.parametrize("contiguous", [False, True])
def test_an_expanded_gate_has_a_gradient_for_each_of_its_elements(contiguous, device):
    """`expand` is part of the caller's graph, which sums up what each of its elements receives."""
    x, upstream = random((4, 5, 33), torch.float32, device), random((4, 5, 33), torch.float32, device, seed=1)
    gate = random((1, 5, 1), torch.float32, device, seed=2).expand(4, 5, 1)
    gate = gate.contiguous() if contiguous else gate
    outers = random((4, 5, 33), torch.float32, device, seed=3), random((4, 5, 1), torch.float32, device, seed=4)
    actual = second_derivatives(ts.sigmoid_gate, (x, gate), upstream, outers)
    assert actual[2].shape == (4, 5, 1)
    assert (actual[2][0] != actual[2][1]).all()
    wide = [tensor.double() for tensor in (x, gate, upstream, *outers)]
    for one, other in zip(actual, second_derivatives(gated, wide[:2], wide[2], wide[3:])):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


def saved_by(function, tensors):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = function(*tensors)
    return output, saved


@every_case
def test_the_inputs_are_saved_and_nothing_else(case, device):
    function = CASES[case][0]
    tensors = leaves(operands(case, torch.bfloat16, device))
    before = [tensor.detach().clone() for tensor in tensors]
    output, saved = saved_by(function, tensors)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= {
        tensor.untyped_storage().data_ptr() for tensor in tensors
    }
    upstream = torch.ones_like(output)
    first, second = (torch.autograd.grad(output, tensors, upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, before))


@every_case
def test_one_kernel_for_each_derivative(case, device):
    if not runs_kernels(device):
        pytest.skip("counts kernels")

    def count(function):
        with counts.counted() as counter:
            result = function()
        return counter.launches, result

    tensors = leaves(operands(case, torch.float32, device))
    forward, output = count(lambda: CASES[case][0](*tensors))
    grad = torch.ones_like(output).requires_grad_()
    backward, grads = count(lambda: torch.autograd.grad(output, tensors, grad, create_graph=True))
    v = [torch.ones_like(each) for each in grads]
    double, _ = count(lambda: torch.autograd.grad(grads, (grad, *tensors), v))
    assert (forward, backward, double) == (1, 1, 1)


def test_operands_of_other_memory_formats_than_each_other(device):
    gate, up = random((2, 3, 4), torch.float32, device), random((2, 4, 3), torch.float32, device, seed=1).mT

    def of(function):
        tensors = leaves([gate, up])
        upstream = random((4, 3, 2), torch.float32, device, seed=2).permute(2, 1, 0).requires_grad_()
        grads = torch.autograd.grad(function(*tensors), tensors, upstream, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), (upstream, *tensors))

    for ours, theirs in ((ts.swiglu, lambda gate, up: F.silu(gate) * up), (ts.sigmoid_gate, gated)):
        torch.testing.assert_close(of(ours), of(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "constants", [{"alpha": 1.702}, {"limit": 2.0}, {"up_offset": 0.7}], ids=lambda constants: next(iter(constants))
)
def test_each_constant_alone_does_what_its_name_says(constants, device):
    gate, up = random((5, 6), torch.float64, device), random((5, 6), torch.float64, device, seed=1)
    alpha, limit = constants.get("alpha", 1.0), constants.get("limit", math.inf)
    close = gate.clamp(max=limit)
    expected = close * torch.sigmoid(alpha * close) * (up.clamp(-limit, limit) + constants.get("up_offset", 0.0))
    torch.testing.assert_close(ts.swiglu(gate, up, **constants), expected)
    packed = torch.cat([gate, up], -1)
    torch.testing.assert_close(ts.swiglu_packed(packed, **constants), expected)
    torch.testing.assert_close(ts.swiglu_packed(joined(gate, up), interleaved=True, **constants), expected)


@pytest.mark.ways("interpreter")
def test_a_traced_graph_holds_for_other_inputs(device):
    inf = torch.full((1, 4), -float("inf"), device=device)
    with torch.no_grad():
        traced = torch.jit.trace(ts.silu, random((3, 4), torch.float32, device))
        assert (traced(inf) == 0).all()
    module = torch.jit.trace(ts.SiLU(), random((3, 4), torch.float32, device))
    assert (module(inf) == 0).all()


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.launches_nothing("a compiler sees torch operators")
@pytest.mark.ways
def test_compile_with_a_size_that_depends_on_data(device):
    torch._dynamo.reset()
    x = random((20,), torch.float32, device)
    for function, theirs in (
        (ts.silu, F.silu),
        (ts.logsigmoid, F.logsigmoid),
        (lambda x: ts.swiglu(x, x), lambda x: F.silu(x) * x),
    ):
        compiled = torch.compile(lambda x: function(x[x > 0]), fullgraph=True, backend="aot_eager")  # noqa: B023
        torch.testing.assert_close(compiled(x), theirs(x[x > 0]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.launches_nothing("a compiler sees torch operators")
@pytest.mark.ways("interpreter")
def test_the_gradient_at_infinity(compiled, device):
    torch._dynamo.reset()
    x = torch.tensor([float("inf"), -float("inf"), 2.0], device=device)
    for function in (ts.silu, lambda x: ts.swiglu(x, torch.ones_like(x))):
        called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        _, grad = value_and_gradients(called, [x])
        torch.testing.assert_close(grad, torch.tensor([1.0, 0.0, exact("silu", 1, x[2:]).item()], device=device))


def test_the_gradient_of_a_gate_far_open(device):
    gate = torch.tensor([70.0, 90.0, 100.0], device=device)
    operand = torch.full_like(gate, 1e12)
    _, _, to_gate = value_and_gradients(ts.sigmoid_gate, [operand, gate])
    torch.testing.assert_close(to_gate.double(), 1e12 * exact("sigmoid", 1, gate), rtol=1e-5, atol=0)


def test_silu_in_place_under_transforms(device):
    x = random((3, 4), torch.float64, device)
    (expected,) = value_and_gradients(F.silu, [x])[1:]

    def in_place(row):
        return ts.silu(row * 1, inplace=True)

    actual = torch.func.grad(lambda x: torch.func.vmap(in_place)(x).sum())(x)
    torch.testing.assert_close(actual, expected)
    through_jvp = torch.func.grad(lambda x: torch.func.jvp(in_place, (x,), (torch.ones_like(x),))[1].sum())(x)
    assert through_jvp.isfinite().all()


def test_silu_in_place(device):
    x = random((33,), torch.float32, device)
    expected = ts.silu(x)
    y = x.clone()
    assert ts.silu(y, inplace=True) is y
    assert torch.equal(y, expected)
    leaf = x.clone().requires_grad_()
    z = leaf * 1
    assert ts.silu(z, inplace=True) is z
    (grad,) = torch.autograd.grad(z.sum(), leaf)
    assert torch.equal(grad, value_and_gradients(ts.silu, [x])[1])
    with pytest.raises(RuntimeError, match="leaf"):
        ts.silu(leaf, inplace=True)
    assert torch.equal(leaf, x)


class Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.launches_nothing("a mode that records operators sees torch's")
@pytest.mark.ways("interpreter")
def test_silu_in_place_copies_its_input_for_a_gradient_only(device):
    def copies(x):
        with Operators() as operators:
            ts.silu(x, inplace=True)
        return operators.seen.count(torch.ops.aten.clone.default)

    x = random((33,), torch.float32, device)
    assert copies(x.clone()) == 0
    assert copies(x.clone().requires_grad_() * 1) == 1
    with torch.no_grad():
        assert copies(x.clone().requires_grad_() * 1) == 0


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=["one dtype", "two"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.launches_nothing("nested tensors are torch's own")
@pytest.mark.ways("interpreter")
def test_swiglu_of_nested_tensors_is_torchs(layout, dtypes, device):
    parts = [[random((n, 4), dtype, device, seed=n + i) for n in (2, 3)] for i, dtype in enumerate(dtypes)]
    gate, up = (torch.nested.nested_tensor(part, layout=layout, requires_grad=True) for part in parts)
    if layout is torch.jagged:
        up = torch.nested.nested_tensor_from_jagged(up.values(), gate.offsets())

    def of(function):
        value = function(gate, up)
        results = value, *torch.autograd.grad(value, (gate, up), torch.ones_like(value))
        return [part.detach() for result in results for part in result.unbind()]

    torch.testing.assert_close(of(ts.swiglu), of(lambda gate, up: F.silu(gate) * up), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.launches_nothing("nested tensors are torch's own")
@pytest.mark.ways("interpreter")
def test_swiglu_of_a_nested_and_a_dense_tensor_is_torchs(device):
    nested = torch.nested.nested_tensor([random((n, 4), torch.float32, device, seed=n) for n in (2, 3)], layout=torch.jagged)
    dense = random((4,), torch.float32, device)
    for gate, up in ((nested, dense), (dense, nested)):
        torch.testing.assert_close(ts.swiglu(gate, up).values(), (F.silu(gate) * up).values())


@pytest.mark.parametrize("case", ["logsigmoid", "silu", "sigmoid_gate", "swiglu", "swiglu-clamped"])
@pytest.mark.launches_nothing("nested forward mode sees torch operators")
@pytest.mark.ways("interpreter")
def test_nested_forward_mode_keeps_the_dtype_of_tensors_without_dimensions(case, device):
    ours, theirs, shapes = CASES[case]
    tensors = tuple(random((), torch.float32, device, seed=i) for i in range(len(shapes)))

    def of(function, *tensors):
        (value, tangent), tangents = torch.func.jvp(lambda *t: torch.func.jvp(function, t, tensors), tensors, tensors)
        return value, tangent, *tangents

    expected = of(theirs, *map(torch.Tensor.double, tensors))
    torch.testing.assert_close(of(ours, *tensors), tuple(each.float() for each in expected), rtol=1e-5, atol=1e-5)


@pytest.mark.ways("interpreter")
def test_mixed_dtypes_promote(device):
    x, gate = random((4, 5), torch.bfloat16, device), random((4, 1), torch.float32, device)
    value, to_x, to_gate = value_and_gradients(ts.sigmoid_gate, [x, gate])
    assert (value.dtype, to_x.dtype, to_gate.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(value, gated(x, gate))
    assert ts.swiglu(x, gate).dtype is torch.float32
    # A tensor of no dimensions does not decide on the dtype.
    assert ts.sigmoid_gate(x, gate[0, 0]).dtype is torch.bfloat16
    ints = torch.arange(-3, 4, device=device)
    torch.testing.assert_close(ts.sigmoid_gate(ints, ints), gated(ints, ints))
    z = torch.randn(4, dtype=torch.complex64, device=device)
    torch.testing.assert_close(ts.silu(z), F.silu(z))


@every_case
@pytest.mark.ways("interpreter")
def test_checkpointing(case, device):
    from torch.utils.checkpoint import checkpoint

    function = CASES[case][0]
    tensors = operands(case, torch.float32, device)
    _, *plain = value_and_gradients(function, tensors)
    for use_reentrant in (False, True):
        again = leaves(tensors)
        checkpoint(function, *again, use_reentrant=use_reentrant).sum().backward()
        assert all(torch.equal(grad, tensor.grad) for grad, tensor in zip(plain, again))


BAD = {
    "an odd dim": (lambda: ts.glu(torch.ones(2, 3)), RuntimeError, r"must be even, got 3 in dim -1 of shape \(2, 3\)"),
    "no dim": (lambda: ts.glu(torch.tensor(1.0)), RuntimeError, "no dimensions"),
    "dim out of range": (lambda: ts.glu(torch.ones(2, 4), 2), IndexError, "out of range"),
    "an odd packed tensor": (lambda: ts.swiglu_packed(torch.ones(2, 3)), RuntimeError, "must be even, got 3"),
    "an odd number of elements that alternate": (
        lambda: ts.swiglu_packed(torch.ones(4, 3), interleaved=True),
        RuntimeError,
        r"must be even, got 3 in dim -1 of shape \(4, 3\)",
    ),
    "no dim along which elements alternate": (
        lambda: ts.swiglu_packed(torch.tensor(1.0), interleaved=True),
        RuntimeError,
        "no dimensions",
    ),
    "interleaved that is no bool": (
        lambda: ts.swiglu_packed(torch.ones(4), interleaved="no"),
        TypeError,
        "interleaved must be True or False, got 'no'",
    ),
    "a layer's interleaved that is no bool": (
        lambda: ts.SwiGLUPacked(interleaved=None),
        TypeError,
        "interleaved must be True or False, got None",
    ),
    "interleaved by position": (lambda: ts.swiglu_packed(torch.ones(4), -1, True), TypeError, "positional arguments"),
    "a packed tensor of no dim": (lambda: ts.swiglu_packed(torch.tensor(1.0)), RuntimeError, "no dimensions"),
    "halves of unequal size": (lambda: ts.swiglu(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"\(2, 3\) and \(2, 4\)"),
    "a gate that does not broadcast": (
        lambda: ts.sigmoid_gate(torch.ones(2, 3), torch.ones(2)),
        ValueError,
        r"broadcast to input's shape \(2, 3\), got \(2,\)",
    ),
    "a gate larger than its input": (lambda: ts.sigmoid_gate(torch.ones(3), torch.ones(2, 3)), ValueError, "got .2, 3."),
    "two devices": (
        lambda: ts.sigmoid_gate(torch.ones(3), torch.ones(3, device="meta")),
        ValueError,
        "input on cpu and gate on meta",
    ),
    "a negative limit": (
        lambda: ts.swiglu_packed(torch.ones(4), limit=-1.0),
        ValueError,
        "limit must not be negative, got -1.0",
    ),
    "an up_offset that is infinite": (
        lambda: ts.swiglu_packed(torch.ones(4), up_offset=math.inf),
        ValueError,
        "up_offset must be finite, got inf",
    ),
    "alpha True": (lambda: [ts.swiglu_packed(torch.ones(4), alpha=each) for each in (1.0, True)], TypeError, "got bool"),
    "alpha None": (lambda: ts.swiglu_packed(torch.ones(4), alpha=None), TypeError, "alpha must be a number, got NoneType"),
    "a dim beside two tensors": (lambda: ts.swiglu(torch.ones(4), torch.ones(4), 0), TypeError, "positional arguments"),
    "alpha 0": (lambda: ts.swiglu_packed(torch.ones(4), alpha=0.0), ValueError, "alpha must be positive and finite, got 0.0"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    call, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.tensor(1.0)], ids=["odd", "no dimensions"])
def test_what_cannot_be_halved_has_the_type_of_torchs_error(x):
    with pytest.raises(Exception, match="must be even") as theirs:
        F.glu(x)
    with pytest.raises(theirs.type):
        ts.glu(x)


@pytest.mark.ways("interpreter")
def test_intercept_keeps_silu_at_infinity_and_in_place(device):
    inf = torch.full((4, 6), -float("inf"), dtype=torch.float64, device=device)
    x = random((4, 6), torch.float64, device)
    with ts.intercept():
        assert (F.silu(inf) == 0).all()
        assert (torch.nn.SiLU()(inf) == 0).all()
        y = x.clone()
        assert F.silu(y, inplace=True) is y
        torch.testing.assert_close(y, F.silu(x))


def test_the_modules_of_two_tensors(device):
    x, gate = random((4, 6), torch.float32, device), random((4, 1), torch.float32, device, seed=1)
    assert torch.equal(ts.SigmoidGate()(x, gate), ts.sigmoid_gate(x, gate))
    assert torch.equal(ts.SwiGLUPacked()(x), ts.swiglu_packed(x))
    assert torch.equal(ts.SwiGLUPacked(0)(x), ts.swiglu_packed(x, 0))
    clamped = ts.SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    assert torch.equal(clamped(x, x), ts.swiglu(x, x, alpha=1.702, limit=7.0, up_offset=1.0))
    assert repr(clamped) == "SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)"
    assert repr(ts.SwiGLU()) == "SwiGLU()"
    assert repr(ts.SwiGLUPacked(1)) == "SwiGLUPacked(dim=1)"
    alternating = ts.SwiGLUPacked(0, interleaved=True, limit=7.0)
    assert torch.equal(alternating(x), ts.swiglu_packed(x, 0, interleaved=True, limit=7.0))
    assert repr(alternating) == "SwiGLUPacked(dim=0, interleaved=True, alpha=1.0, limit=7.0, up_offset=0.0)"
