"""Under torch.compile: torch's own operators where no gradient is wanted, else their values with the gradient's own formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import random
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import torch_sigmoid as ts
from torch_sigmoid.formulas import in_dtype
from torch_sigmoid.gates import Gated, Interleaved, Unary
from torch_sigmoid.losses import Loss

pytestmark = [
    # Once: that a compiler gets torch operators where kernels run too is said by test_tracing.py.
    pytest.mark.ways(),
    pytest.mark.launches_nothing("a compiler sees torch operators"),
    # The compiler's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def from_input(x):
    return ts.sigmoid(x, save="input")


def cross_entropy(x, target):
    return ts.binary_cross_entropy_with_logits(x, target, reduction="none")


CALLS = {
    "silu": (ts.silu, Unary("silu"), 1),
    "logsigmoid": (ts.logsigmoid, Unary("logsigmoid"), 1),
    "quick_gelu": (ts.quick_gelu, Unary("silu", 1.702), 1),
    "glu": (ts.glu, Gated("sigmoid", 1), 1),
    "sigmoid_gate": (ts.sigmoid_gate, Gated("sigmoid"), 2),
    "swiglu": (ts.swiglu, Gated("silu", None, True), 2),
    "clamped swiglu": (
        lambda gate, up: ts.swiglu(gate, up, alpha=1.702, limit=7.0, up_offset=1.0),
        Gated("silu", None, True, 1.702, 7.0, 1.0),
        2,
    ),
    "interleaved swiglu": (lambda packed: ts.swiglu_packed(packed, interleaved=True), Interleaved("silu"), 1),
}


def operands(n, dtype, device):
    return [random((6, 32), dtype, device, seed=i) * 40 for i in range(n)]


# In 16 bit results are narrowed too; in fp32, a formula of one operand and one of two.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, torch.bfloat16, id=name) for name in CALLS]
    + [pytest.param(name, torch.float32, id=f"{name}, fp32") for name in ("silu", "clamped swiglu")],
)
def test_a_compiled_gradient_is_the_formula_of_the_gradient(name, dtype, device):
    """Bit for bit: not what autograd would make of the value's formula."""
    function, operator, n = CALLS[name]
    tensors = operands(n, dtype, device)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves)
    upstream = random(output.shape, dtype, device, seed=5)
    grads = torch.autograd.grad(output, leaves, upstream)
    for actual, expected in zip(grads, operator.backward_formula(upstream, *tensors), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(output, operator.value_formula(*tensors)[0])


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_a_compiled_gradient_of_a_loss_is_its_formula(gamma, device):
    x, target = random((6, 32), torch.bfloat16, device) * 40, random((6, 32), torch.bfloat16, device, seed=1) > 0
    operator = Loss(gamma, reduction="sum", dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()

    def loss(x, target):
        if gamma:
            return ts.sigmoid_focal_loss(x, target, alpha=-1, gamma=gamma, reduction="sum")
        return ts.binary_cross_entropy_with_logits(x, target, reduction="sum")

    output = torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf, target)
    (grad,) = torch.autograd.grad(output, leaf)
    (expected,) = operator.backward_formula(torch.ones_like(output), x, target, None, None, None)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", ["sigmoid_gate", "clamped swiglu"])
def test_a_compiled_gradient_of_one_operand(name, wanted, device):
    function, _, n = CALLS[name]
    tensors = operands(n, torch.float64, device)

    def grads(function):
        leaves = [tensor.clone().requires_grad_(wants) for tensor, wants in zip(tensors, wanted)]
        function(*leaves).sum().backward()
        return [leaf.grad for leaf in leaves]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(grads(compiled), grads(function), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-300)


def test_a_target_that_wants_a_gradient_gets_it_compiled(device):
    x, target = (random((8,), torch.float64, device, seed=i).requires_grad_() for i in range(2))
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    actual, expected = (torch.autograd.grad(f(x, target).sum(), (x, target)) for f in (compiled, cross_entropy))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_what_a_compiled_value_keeps_of_the_contract_and_what_not(device):
    """Trained, silu(-∞) is 0; without a gradient torch's operator runs, for which it is NaN. Far tails are torch's in both."""
    x = torch.tensor([-math.inf, -95.0, -90.0, 2.0, math.inf], device=device)
    trained = torch.compile(ts.silu, backend="aot_eager", fullgraph=True)(x.clone().requires_grad_()).detach()
    assert trained[0] == 0
    torch.testing.assert_close(trained[1:], F.silu(x[1:]), rtol=3e-7, atol=0)
    evaluated = torch.compile(ts.silu, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(evaluated, F.silu(x), equal_nan=True, rtol=0, atol=0)
    assert evaluated[0].isnan()


def second_derivative(function, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


SMOOTH = {
    "sigmoid": from_input,
    "silu": ts.silu,
    "quick_gelu": ts.quick_gelu,
    "glu": ts.glu,
    "bce": lambda x: cross_entropy(x, x > 0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_second_derivative_where_the_backend_has_one(name, device):
    x = torch.cat([random((3, 8), torch.float64, device), torch.zeros(1, 8, dtype=torch.float64, device=device)])
    compiled = torch.compile(SMOOTH[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(second_derivative(compiled, x), second_derivative(SMOOTH[name], x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_second_derivative_is_an_error_where_the_backend_has_none(name, device):
    # Inductor's way to choose what is kept.
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled = torch.compile(SMOOTH[name], backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        second_derivative(compiled, random((3, 8), torch.float64, device))


# Without quick_gelu, which is silu with another number.
@pytest.mark.parametrize("name", ["sigmoid", "silu", "glu", "bce"])
def test_transforms_and_forward_mode_inside_a_compiled_function(name, device):
    function = SMOOTH[name]
    x, tangent = (random((3, 8), torch.float64, device, seed=i) for i in range(2))

    def pushed(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    def differentiated(x):
        return torch.func.vmap(torch.func.grad(lambda row: function(row).sum()))(x)

    def curved(x):
        return torch.func.hessian(lambda row: function(row).sum())(x[0])

    for of in (pushed, differentiated, curved):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(of, backend="aot_eager")(x), of(x), rtol=1e-9, atol=1e-12)


def test_checkpointing_and_a_branch_inside_a_compiled_function_keep_the_gradient(device):
    x = torch.tensor([8.0, -8.0, 0.5], dtype=torch.bfloat16, device=device)

    def checkpointed(x):
        return checkpoint(lambda x: from_input(x * 1), x, use_reentrant=False)

    def branched(x):
        return torch.cond(x.sum() < 100, from_input, torch.neg, (x,))

    for function in (checkpointed, branched):
        leaf = x.clone().requires_grad_()
        torch.compile(function, backend="aot_eager", fullgraph=True)(leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.tensor([0.00033569, 0.00033569, 0.235]).to(x))


def test_no_value_is_a_tensor_that_another_operator_returned(device):
    """torch 2.11 loses the gradient of a Function whose output `to` has given back as it was."""
    calls = [(function, operands(n, torch.float32, device)) for function, _, n in CALLS.values()]
    calls.append((cross_entropy, operands(2, torch.float32, device)))
    seen = []

    def backend(graph, _):
        (body,) = (module for name, module in graph.named_children() if name.startswith("fwd"))
        (results, _) = body.graph.output_node().args[0]
        seen.append((results[0] if isinstance(results, tuple) else results).target)
        return graph

    for function, tensors in calls:
        torch._dynamo.reset()
        tensors[0].requires_grad_()
        torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    assert len(seen) == len(calls)
    assert "to" not in seen
    x = torch.ones(2, device=device)
    assert in_dtype(x, torch.float32) is x
