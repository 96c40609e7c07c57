"""The operators of torch.library: what torch checks of each, what a fake tensor sees, and their derivatives called directly."""

from dataclasses import astuple

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_sigmoid
from torch_sigmoid import library
from torch_sigmoid.gates import Gated, Interleaved, Unary
from torch_sigmoid.losses import Loss

CLAMPED = {"alpha": 1.702, "limit": 7.0, "offset": 1.0}
SAMPLES = {
    "sigmoid": library.Sigmoid("output"),
    "sigmoid from the input": library.Sigmoid("input"),
    "quick_gelu": Unary("silu", 1.702),
    "swiglu": Gated("silu", gate_first=True, **CLAMPED),
    "glu": Gated("sigmoid", dim=1),
    "interleaved": Interleaved("silu", **CLAMPED),
    "loss": Loss(reduction="sum", dtype=torch.float64),
    "focal loss": Loss(2.0, 0.25, 0.1, 0, "none", torch.float64),
    "mean": Loss(ignore_index=0, dtype=torch.float64),
}
# AOTAutograd takes seconds for the derivative of a double backward, a formula in torch operators. For these it is the formula
# of other samples: of swiglu on halves and on pairs, and of the loss with other constants.
TRACED_AS_OTHERS = [SAMPLES[name] for name in ("glu", "interleaved", "focal loss", "mean")]
every_sample = pytest.mark.parametrize("operator", SAMPLES.values(), ids=SAMPLES)


def operands_of(operator):
    """In fp64, the first of them transposed."""
    torch.manual_seed(0)
    first = torch.randn(8, 6, dtype=torch.float64).mT.requires_grad_()
    if isinstance(operator, Loss):
        return first, (torch.rand(6, 8) > 0.5).double(), torch.rand(8, dtype=torch.float64), None
    return (first, torch.randn(6, 8, dtype=torch.float64, requires_grad=True))[: library.family_of(operator).n_operands]


def arguments_of(operator, order):
    """Those of the operator, of its backward (1) or of its double backward (2)."""
    family, operands = library.family_of(operator), operands_of(operator)
    like = library.OPERATORS[family.name, 0](*operands, *astuple(operator))
    grad_output = torch.randn(like.shape, dtype=torch.float64, requires_grad=True)
    grads = [torch.randn_like(each).requires_grad_() for each in operands[: family.n_gradients]]
    return ((), (grad_output,), (*grads, grad_output))[order] + operands + astuple(operator)


# torch 2.15 hides a warning of its own by a means that does not help where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_sample
@pytest.mark.parametrize("order", [0, 1, 2], ids=["value", "backward", "double backward"])
def test_torch_finds_nothing_wrong_with_it(operator, order):
    """Its schema, its fake implementation (shapes, strides, dtypes), its derivative, and both under AOTAutograd, dynamic."""
    overload = library.OPERATORS[library.family_of(operator).name, order]
    checks = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
    if order == 2 and operator in TRACED_AS_OTHERS:
        checks.remove("test_aot_dispatch_dynamic")
    found = torch.library.opcheck(overload, arguments_of(operator, order), test_utils=tuple(checks))
    assert found == dict.fromkeys(checks, "SUCCESS")


@every_sample
def test_called_directly_it_has_first_and_second_derivatives(operator):
    family = library.family_of(operator)

    def value(*tensors):
        return library.OPERATORS[family.name, 0](*tensors, *operands[len(tensors) :], *astuple(operator))

    operands = operands_of(operator)
    leaves = operands[: family.n_gradients]
    assert gradcheck(value, leaves)
    assert gradgradcheck(value, leaves)


@every_sample
def test_a_double_backward_called_directly_has_a_derivative(operator):
    family = library.family_of(operator)
    arguments = arguments_of(operator, 2)
    n = 1 + 2 * family.n_gradients

    def second_gradients(*tensors):
        return library.OPERATORS[family.name, 2](*tensors, *arguments[n:])

    assert gradcheck(second_gradients, arguments[:n])


def test_called_directly_a_weight_that_wants_a_gradient_is_refused():
    operator = Loss(reduction="sum", dtype=torch.float64)
    x, target, weight, _ = operands_of(operator)
    value = library.OPERATORS["loss", 0](x, target, weight.requires_grad_(), None, *astuple(operator))
    with pytest.raises(RuntimeError, match="target and weights need no gradient"):
        value.backward()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_fake_tensor_sees_one_operator_and_no_temporaries():
    with FakeTensorMode():
        gate, up = (torch.empty(4, 6, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with Seen() as forward:
            y = torch_sigmoid.swiglu(gate, up)
        with Seen() as backward:
            y.backward(torch.empty_like(y))
    assert (y.shape, y.dtype) == ((4, 6), torch.bfloat16)
    assert gate.grad.shape == up.grad.shape == (4, 6)
    assert [name for name in forward.names if "torch_sigmoid" in name] == ["torch_sigmoid::gated"]
    assert [name for name in backward.names if "torch_sigmoid" in name] == ["torch_sigmoid::gated_backward"]
    assert not {"aten::mul", "aten::sigmoid", "aten::exp"} & {*forward.names, *backward.names}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_recorded_graph_has_torch_operators_for_the_compiler_to_fuse(mode):
    graph = make_fx(lambda gate, up: torch_sigmoid.swiglu(gate, up), tracing_mode=mode)(torch.randn(4, 6), torch.randn(4, 6))
    assert "torch_sigmoid" not in graph.code
    assert "aten" in graph.code
