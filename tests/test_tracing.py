"""torch.compile, torch.export, make_fx, fake tensors, torch.jit and fx."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import FROM_INPUT, derivative, gradient, random, ulp_error
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import torch_sigmoid

# What a backend makes of the graph does not depend on who computes eager calls: once in the interpreter.
BACKENDS = [
    pytest.param("eager", False, marks=pytest.mark.ways()),
    ("aot_eager", False),
    pytest.param("aot_eager", True, marks=pytest.mark.ways()),
    pytest.param("inductor", True, marks=pytest.mark.ways()),
]
# Deprecations inside torch and the compiler's own advice are not this package's.
pytestmark = [
    pytest.mark.ways("interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.launches_nothing("tracers see torch operators"),
]


@pytest.fixture
def function(save):
    return lambda x: torch_sigmoid.sigmoid(x, save=save)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "dynamic"), BACKENDS)
def test_compile_without_graph_breaks(backend, dynamic, function, device):
    compiled = torch.compile(lambda x: function(x * 2).sin(), backend=backend, dynamic=dynamic, fullgraph=True)
    for shape in ((4, 5), (7, 3)):
        x = random(shape, torch.float32, device)
        torch.testing.assert_close(compiled(x), torch.sigmoid(x * 2).sin())
        torch.testing.assert_close(gradient(compiled, x), gradient(lambda x: torch.sigmoid(x * 2).sin(), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.ways
def test_compiled_gradients_are_exact_in_the_tails(dtype, device):
    x = torch.tensor([-8.0, 0.0, 5.0, 6.5, 8.0, 9.0], dtype=dtype, device=device)
    compiled = torch.compile(lambda x: torch_sigmoid.sigmoid(x, save="input"), fullgraph=True)
    assert ulp_error(gradient(compiled, x), derivative(x.cpu())).max() <= FROM_INPUT[dtype]


@pytest.mark.ways
def test_compiled_gradients_from_the_output_are_those_of_eager(device):
    x, grad = random((1000,), torch.float16, device), random((1000,), torch.float16, device, seed=1)
    compiled = torch.compile(torch_sigmoid.sigmoid, fullgraph=True)
    sigma = compiled(x)
    exact = grad.cpu().double() * sigma.cpu().double() * (1 - sigma.cpu().double())
    assert ulp_error(gradient(compiled, x, grad), exact).max() <= 0.5 + 1e-3


@pytest.mark.ways
def test_the_compiled_value_is_torchs(device):
    x = torch.cat([random((1000,), torch.float32, device), torch.tensor([float("inf"), -float("inf"), -90.0], device=device)])
    ours, torchs = (
        torch.compile(f, fullgraph=True)(x) for f in (lambda x: torch_sigmoid.sigmoid(x, save="input"), torch.sigmoid)
    )
    assert torch.equal(ours, torchs)


def test_every_order_of_the_traced_form(device):
    """At x = 0 too, where a formula in |x| would have a third derivative of 0 in place of -1/8."""
    x = torch.tensor([0.0, 1.0, -1.0, 20.0], dtype=torch.float64, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: torch_sigmoid.sigmoid(x, save="input"), backend="eager", fullgraph=True)
    results, y = [], compiled(x)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append(y)
    s, t = torch.sigmoid(x), torch.sigmoid(-x)
    for actual, exact in zip(results, (s * t, s * t * (t - s), s * t * (1 - 6 * s * t))):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.ways())])
def test_transforms_inside_a_compiled_function(backend, device):
    x = torch.tensor([8.0, -8.0, 0.5], dtype=torch.bfloat16, device=device)

    def function(x):
        return torch_sigmoid.sigmoid(x, save="input")

    exact = derivative(x.cpu())
    compiled = torch.compile(torch.vmap(torch.func.grad(function)), backend=backend, fullgraph=True)
    assert ulp_error(compiled(x), exact).max() <= 1
    pushed = torch.compile(lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1], backend=backend, fullgraph=True)(
        x
    )
    assert ulp_error(pushed, exact).max() <= 2


def test_compiled_module_and_intercept(save, device):
    x = random((3, 4), torch.float32, device)
    module = torch.compile(torch_sigmoid.Sigmoid(save=save), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(module, x), gradient(torch.sigmoid, x))
    with torch_sigmoid.intercept(save=save):
        compiled = torch.compile(lambda x: torch.sigmoid(x) * 2, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), torch.sigmoid(x) * 2)


def test_intercept_around_a_compiled_function_at_every_call_and_in_every_thread(save, device):
    x = random((3,), torch.float32, device)
    compiled = torch.compile(lambda x: torch.sigmoid(x) * 2, backend="eager", fullgraph=True)

    def call():
        with torch_sigmoid.intercept(save=save):
            return [compiled(x), compiled(x)]

    with ThreadPoolExecutor(1) as other_thread:
        results = [*other_thread.submit(call).result(), *call()]
    for result in results:
        torch.testing.assert_close(result, torch.sigmoid(x) * 2)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "eager"), (torch.float16, "aot_eager"), (torch.bfloat16, "aot_eager")],
    ids=["fp32", "fp16", "bf16"],
)
def test_compiled_in_place(dtype, backend, device):
    x = random((9,), dtype, device)
    compiled = torch.compile(lambda x: torch_sigmoid.sigmoid_(x * 1), backend=backend, fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x), gradient(torch.sigmoid, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled_autograd_traces_an_eager_forwards_backward(dtype, save, device):
    x = torch.tensor([2.0, -0.5, 0.0], dtype=dtype, device=device, requires_grad=True)
    y = torch_sigmoid.sigmoid(x, save=save)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.sum().backward()
    torch.testing.assert_close(x.grad, gradient(torch.sigmoid, x))


def test_the_path_is_named_under_compile(device):
    seen = []

    def function(x):
        seen.append(torch_sigmoid.path(x).name)
        return x + 1

    torch.compile(function, backend="eager")(torch.ones(2, device=device))
    assert "traced" in seen


class Network(torch.nn.Module):
    def __init__(self, save):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch_sigmoid.Sigmoid(save=save))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, save, device):
    network, x = Network(save).to(device), random((2, 4), torch.float32, device)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(network, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict).module()
    for rows in (2, 7):
        x = random((rows, 4), torch.float32, device)
        torch.testing.assert_close(exported(x), network(x))
        torch.testing.assert_close(gradient(exported, x), gradient(network, x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_gradient(mode, function, device):
    """A kernel launched on a tensor that is being traced would leave its result as a constant in the graph."""
    graph = make_fx(lambda x: gradient(function, x), tracing_mode=mode)(random((3,), torch.float32, device))
    x = random((3,), torch.float32, device, seed=5)
    torch.testing.assert_close(graph(x), gradient(torch.sigmoid, x))


def test_make_fx_before_dispatch_records_the_operator(function, device):
    graph = make_fx(lambda x: function(x * 1), pre_dispatch=True)(random((3,), torch.float32, device))
    x = random((3,), torch.float32, device, seed=5)
    torch.testing.assert_close(graph(x), torch.sigmoid(x))


def test_fake_tensors(function, device):
    with FakeTensorMode():
        x = torch.empty(3, 4, device=device, requires_grad=True)
        y = function(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == (3, 4)
    assert type(x.grad).__name__ == "FakeTensor"


def test_fake_gpu_tensors_on_a_machine_without_a_gpu(save):
    """Forward only: torch itself aborts where a fake GPU tensor without a GPU requires grad."""
    with FakeTensorMode():
        y = torch_sigmoid.sigmoid(torch.empty(3, device="cuda", dtype=torch.bfloat16), save=save)
    assert y.device.type == "cuda"


def test_jit_trace_records_an_exact_gradient(save, device):
    module = torch_sigmoid.Sigmoid(save=save)
    traced = torch.jit.trace(module, random((3,), torch.float32, device))
    x = random((5,), torch.float32, device)
    torch.testing.assert_close(traced(x), torch.sigmoid(x))
    torch.testing.assert_close(gradient(traced, x), gradient(torch.sigmoid, x))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_jit_trace_of_silu_in_place_is_the_same_with_and_without_a_gradient(requires_grad, device):
    """torch.jit.trace traces a second time, under no_grad, and compares the graphs."""
    x = random((3,), torch.float32, device).requires_grad_(requires_grad)
    traced = torch.jit.trace(lambda x: torch_sigmoid.silu(x * 1, inplace=True), x)
    x = random((5,), torch.float32, device)
    torch.testing.assert_close(traced(x), torch.nn.functional.silu(x))
    torch.testing.assert_close(gradient(traced, x), gradient(torch.nn.functional.silu, x))


def test_jit_script(save, device):
    scripted = torch.jit.script(torch.nn.Sequential(torch_sigmoid.Sigmoid(save=save)))
    x = random((5,), torch.float32, device)
    torch.testing.assert_close(scripted(x), torch.sigmoid(x))


def test_fx_symbolic_trace_keeps_our_function(save, device):
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch_sigmoid.Sigmoid(save=save)))
    assert any(node.target is torch_sigmoid.sigmoid for node in graph.graph.nodes)
    x = random((5,), torch.float32, device)
    torch.testing.assert_close(gradient(graph, x), gradient(torch.sigmoid, x))


# Each public function, called by a function that fx traces, and how many tensors that takes.
TRACED_BY_FX = {
    "sigmoid": (lambda x: torch_sigmoid.sigmoid(x, save="input"), 1),
    "sigmoid_": (lambda x: torch_sigmoid.sigmoid_(x), 1),
    "logsigmoid": (lambda x: torch_sigmoid.logsigmoid(x), 1),
    "silu": (lambda x: torch_sigmoid.silu(x, inplace=True), 1),
    "glu": (lambda x: torch_sigmoid.glu(x, dim=0), 1),
    "sigmoid_gate": (lambda x, gate: torch_sigmoid.sigmoid_gate(x, gate), 2),
    "swiglu": (lambda gate, up: torch_sigmoid.swiglu(gate, up, alpha=1.702, limit=7.0, up_offset=1.0), 2),
    "swiglu_packed": (lambda packed: torch_sigmoid.swiglu_packed(packed, 0), 1),
    "swiglu_packed of pairs": (lambda packed: torch_sigmoid.swiglu_packed(packed, 0, interleaved=True), 1),
    "swiglu of a constant": (lambda up: torch_sigmoid.swiglu(torch.ones(4, 4), up), 1),
    "binary_cross_entropy_with_logits": (
        lambda x, target, weight: torch_sigmoid.binary_cross_entropy_with_logits(x, target, pos_weight=weight),
        3,
    ),
    "sigmoid_focal_loss": (lambda x, targets: torch_sigmoid.sigmoid_focal_loss(x, targets, gamma=1.5, reduction="sum"), 2),
    "siglip_loss": (lambda image, text: torch_sigmoid.siglip_loss(image, text, 10.0, logit_bias=-3.0), 2),
}


@pytest.mark.parametrize("name", TRACED_BY_FX)
def test_fx_symbolic_trace_records_each_function_as_one_call(name):
    function, n_tensors = TRACED_BY_FX[name]
    graph = torch.fx.symbolic_trace(function)
    (called,) = (node.target for node in graph.graph.nodes if node.op == "call_function" and node.target is not torch.ones)
    assert called is getattr(torch_sigmoid, name.split()[0])
    tensors = [random((4, 4), torch.float32, "cpu", seed=i).sigmoid() for i in range(n_tensors)]
    torch.testing.assert_close(graph(*map(torch.clone, tensors)), function(*map(torch.clone, tensors)))


@pytest.mark.parametrize("name", TRACED_BY_FX)
def test_a_function_mode_sees_torchs_operators_and_not_our_functions(name):
    """So `intercept`, FLOP counters and tensor subclasses, which know torch's operators only, work inside of ours."""
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    function, n_tensors = TRACED_BY_FX[name]
    tensors = [random((4, 4), torch.float64, "cpu", seed=i).sigmoid() for i in range(n_tensors)]
    with Recorder():
        function(*tensors)
    assert seen
    assert not any(getattr(func, "__module__", None) == "torch_sigmoid.functional" for func in seen)
