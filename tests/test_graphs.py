"""The graphs of torch.export, ONNX and torch.compile: torch's without a gradient, and no more work with one."""

import functools
import itertools

import pytest
import torch

import torch_sigmoid as ts
from benchmarks.measure.graphs import Call, calls, count, each_case, exported, of_training, onnx_operators, run_compiled

# Deprecations inside torch and the compiler's own advice are not this package's.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

CASES = dict(each_case())
WITHOUT_LOSSES = [name for name, operator in CASES.items() if operator.family != "losses"]
# Shapes are dynamic for one of each kind of formula: of an operand, of two, of one that is broadcast, of halves, of a loss.
DYNAMIC = ["sigmoid, from the input", "swiglu, clamped", "sigmoid_gate, broadcast", "swiglu_packed", "sigmoid_focal_loss"]
STATIC_AND_DYNAMIC = [(name, False) for name in CASES] + [(name, True) for name in DYNAMIC]
# Each layer, its like in torch, and how many tensors they take.
LAYERS = {
    "Sigmoid": (ts.Sigmoid(), torch.nn.Sigmoid(), 1),
    "Sigmoid, from the input": (ts.Sigmoid(save="input"), torch.nn.Sigmoid(), 1),
    "SiLU": (ts.SiLU(), torch.nn.SiLU(), 1),
    "LogSigmoid": (ts.LogSigmoid(), torch.nn.LogSigmoid(), 1),
    "GLU": (ts.GLU(), torch.nn.GLU(), 1),
    "QuickGELU": (ts.QuickGELU(), Call(CASES["quick_gelu"].formula), 1),
    "SigmoidGate": (ts.SigmoidGate(), Call(CASES["sigmoid_gate"].formula), 2),
    "SwiGLU": (ts.SwiGLU(), Call(CASES["swiglu"].formula), 2),
    "SwiGLUPacked": (ts.SwiGLUPacked(), Call(CASES["swiglu_packed"].formula), 1),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def leaves_of(name):
    operator = CASES[name]
    torch.manual_seed(0)
    return operator.leaves(operator.operands(torch.randn, 32, 64))


def expression(graph):
    """The output as one nested expression: each operator with its arguments, defaults filled in, dimensions counted from 0.

    Inputs are numbered in the order of their use, because torch.compile sorts them so; tests of values tell them apart.
    """
    inputs = {}

    def described(value):
        if isinstance(value, list | tuple):
            return [described(each) for each in value]
        if not isinstance(value, torch.fx.Node):
            return value
        if value.op != "call_function":
            return inputs.setdefault(value, f"input {len(inputs)}")
        arguments = dict(enumerate(value.args)) | value.kwargs
        if isinstance(value.target, torch._ops.OpOverload):
            schema = value.target._schema.arguments
            arguments = dict(zip((each.name for each in schema), value.args)) | value.kwargs
            arguments = {each.name: arguments.get(each.name, each.default_value) for each in schema}
            if isinstance(arguments.get("dim"), int):
                arguments["dim"] %= value.args[0].meta["val"].dim()
        return str(value.target), {name: described(argument) for name, argument in arguments.items()}

    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return described(output.args)


def assert_same(ours, torchs):
    """The same graph, up to the order of independent nodes."""
    assert len(calls(ours)) == len(calls(torchs)) > 0
    assert expression(ours) == expression(torchs)


@functools.cache
def training(name, label, dynamic):
    """A training step's graphs; the tests below look at the same ones."""
    return of_training(CASES[name].providers[label].function, leaves_of(name), dynamic)


@pytest.mark.parametrize(("strict", "requires_grad"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_is_torchs_node_by_node(name, strict, requires_grad):
    ours, torchs, n_tensors = LAYERS[name]
    operands = [torch.randn(4, 6, requires_grad=requires_grad) for _ in range(n_tensors)]
    assert_same(*(exported(module, operands, strict) for module in (ours, torchs)))


class Together(torch.nn.Module):
    """All layers, each on tensors of its own: exports to ONNX take long."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.n_tensors = torch.nn.ModuleList(layers), [n for *_, n in LAYERS.values()]

    def forward(self, *tensors):
        own = iter(tensors)
        return tuple(layer(*itertools.islice(own, n)) for layer, n in zip(self.layers, self.n_tensors))


def test_in_onnx_the_layers_have_torchs_operators():
    pytest.importorskip("onnxscript")
    operands = [torch.randn(4, 6) for *_, n in LAYERS.values() for _ in range(n)]
    ours, torchs = (onnx_operators(Together(layers), operands) for layers in list(zip(*LAYERS.values()))[:2])
    assert len(ours) > len(LAYERS)
    assert ours == torchs


@pytest.mark.parametrize(("name", "dynamic"), [case for case in STATIC_AND_DYNAMIC if case[0] in WITHOUT_LOSSES])
def test_compiled_without_a_gradient_the_graph_is_torchs_node_by_node(name, dynamic):
    operands = [leaf.detach() for leaf in leaves_of(name)]
    functions = (CASES[name].providers[label].function for label in ("ours", "torch"))
    (ours, _), (torchs, _) = (run_compiled(function, operands, dynamic) for function in functions)
    assert ours.keys() == {"forward"}
    assert_same(ours["forward"], torchs["forward"])


# Torch's backward has σ from the forward; ours computes σ(-|x|), which does not round to 1.
MORE_TRANSCENDENTAL = {"sigmoid, from the input": 1}
# Torch computes 1 - p_t, which cancels; ours is a quotient of sums.
MORE_DIVISIONS_IN_FORWARD = {"sigmoid_focal_loss": 1}


# Torch keeps σ - target, one tensor; ours keeps logits and target.
MORE_BYTES = {"binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits, weighted"}


@pytest.mark.parametrize(("name", "dynamic"), STATIC_AND_DYNAMIC)
def test_a_compiled_training_step_has_no_more_transcendental_operators_and_bytes_than_torchs(name, dynamic):
    ours, torchs = (training(name, label, dynamic) for label in ("ours", "torch"))
    forward, torchs_forward = count(ours.forward), count(torchs.forward)
    # The value is computed once: its differentiable formula has more quotients.
    assert 0 < forward.transcendental <= torchs_forward.transcendental
    assert forward.divisions <= torchs_forward.divisions + MORE_DIVISIONS_IN_FORWARD.get(name, 0)
    more = count(ours.forward, ours.backward).transcendental - count(torchs.forward, torchs.backward).transcendental
    assert more == MORE_TRANSCENDENTAL[name] if name in MORE_TRANSCENDENTAL else more <= 0
    assert ours.saved > 0
    assert (ours.saved > torchs.saved) == (name in MORE_BYTES)


def test_a_graph_that_torch_keeps_on_disk_is_seen_all_the_same():
    x = torch.randn(32, 64, requires_grad=True)

    def call(*operands):
        return torch.sigmoid(*operands)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        y = torch.compile(call, fullgraph=True, dynamic=False)(x)
        y.backward(torch.randn_like(y))
    assert run_compiled(torch.sigmoid, [x])[0].keys() == {"forward", "backward"}


def test_what_is_kept_is_counted_by_storage():
    """With dynamic shapes, where the forward graph keeps sizes too."""
    n, itemsize = 32 * 64, 4
    assert training("sigmoid", "torch", True).saved == n * itemsize
    # Both halves of one storage; of two tensors, both.
    assert training("glu", "torch", True).saved == training("sigmoid_gate", "torch", True).saved == 2 * n * itemsize
    y = of_training(lambda x: x.sin().cos(), [torch.randn(n, requires_grad=True)], dynamic=True)
    assert y.saved == n * itemsize


def test_what_is_transcendental():
    x = torch.rand(8, requires_grad=True)

    def of(function):
        return count(run_compiled(function, [x.detach()])[0]["forward"])

    assert of(lambda x: x.exp() + x.log1p() + x.sigmoid() + x**2.5) == (4, 0)
    assert of(lambda x: (x + 1) ** 2 / (x + 3)) == (0, 1)
    assert of(lambda x: (x.exp().sum() / x.sum()).log()) == (1, 0), "the quotient and its logarithm are one number each"


@pytest.mark.parametrize("function", [ts.sigmoid_gate, ts.swiglu])
def test_one_tensor_may_be_both_operands(function):
    x = torch.randn(4, 6, requires_grad=True)
    torch.compile(lambda x: function(x, x), backend="aot_eager", fullgraph=True)(x).sum().backward()


@pytest.mark.parametrize("name", ["quick_gelu", "swiglu", "swiglu, clamped", "sigmoid_focal_loss"])
def test_dynamic_true_makes_symbols_of_numbers_too(name):
    compiled = torch.compile(CASES[name].providers["ours"].function, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*leaves_of(name)).sum().backward()
