"""Every autograd mode torch's own sigmoid has, by name."""

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from reference import interpreted, random
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torch_sigmoid
from torch_sigmoid import SigmoidFunction
from torch_sigmoid.internals import likeness

pytestmark = pytest.mark.ways("interpreter")


@pytest.fixture
def function(save):
    return lambda x: torch_sigmoid.sigmoid(x, save=save)


@pytest.fixture
def x(device):
    """Few elements: gradcheck and the interpreter both take time for each. 0 is where an |x| would show."""
    values = torch.tensor([[-20.0, -1.5, 0.0], [0.3, 2.0, 20.0]], dtype=torch.float64)
    return values.to(device).requires_grad_()


def derivatives(x):
    """σ', σ" and σ''' in float64."""
    x = x.detach()
    s, t = torch.sigmoid(x), torch.sigmoid(-x)
    first = s * t
    return first, first * (t - s), first * (1 - 6 * first)


def test_gradcheck(function, x):
    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


def test_gradgradcheck(function, x):
    assert gradgradcheck(function, x, check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_the_second_derivative(function, device):
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)

    def first(x):
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    assert gradgradcheck(first, x)


def test_create_graph_to_third_order(function, x):
    y = function(x)
    for order, exact in enumerate(derivatives(x)):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=order < 2)
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-15)


def test_a_gradient_penalty_trains(function, device):
    """The usual double backward: a loss that contains a gradient, through the fused kernel."""
    x = random((64,), torch.float32, device).requires_grad_()
    weight = torch.ones((), device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x * weight).sum(), x, create_graph=True)
    (gradient**2).sum().backward()
    first, second, _ = derivatives(x.double())
    torch.testing.assert_close(x.grad.double(), 2 * first * second, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), (2 * first * (first + x.double() * second)).sum(), rtol=1e-4, atol=1e-5)


def test_the_second_derivative_of_half_precision_is_accurate(function, device):
    x = random((64,), torch.bfloat16, device, scale=1.0).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second.double(), derivatives(x.double())[1], rtol=0.05, atol=4e-3)


def test_only_what_is_asked_for_is_computed(save, x):
    """needs_input_grad: the gradient to the upstream gradient alone, to the saved tensor alone, and to both."""
    saved = (torch.sigmoid(x) if save == "output" else x).detach()
    results = []
    for needs_grad, needs_saved in ((True, False), (False, True), (True, True)):
        grad = torch.ones_like(saved, requires_grad=needs_grad)
        wanted = saved.clone().requires_grad_(needs_saved)
        product = torch_sigmoid.autograd.SigmoidBackwardFunction.apply(grad, wanted, save)
        inputs = [tensor for tensor in (grad, wanted) if tensor.requires_grad]
        results.append(torch.autograd.grad(product.sum(), inputs))
    torch.testing.assert_close(results[0][0], results[2][0])
    torch.testing.assert_close(results[1][0], results[2][1])


def test_nothing_is_recorded_without_need(function, device):
    x = random((4,), torch.float32, device)
    assert function(x).grad_fn is None
    with torch.no_grad():
        assert function(x.requires_grad_()).grad_fn is None
    with torch.inference_mode():
        assert function(x).is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exactly_one_tensor_is_saved(function, save, dtype, device):
    saved = []
    x = random((33,), dtype, device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = function(x)
    assert [tensor.data_ptr() for tensor in saved] == [(y if save == "output" else x).data_ptr()]


def test_forward_mode(function, x):
    tangent = random(x.shape, torch.float64, x.device)
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(x.detach(), tangent))
        primal, actual = forward_ad.unpack_dual(output)
    torch.testing.assert_close(primal, torch.sigmoid(x.detach()))
    torch.testing.assert_close(actual, derivatives(x)[0] * tangent)


def test_forward_over_reverse(function, x):
    tangent = random(x.shape, torch.float64, x.device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        (gradient,) = torch.autograd.grad(function(dual).sum(), dual, create_graph=True)
        actual = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(actual, derivatives(x)[1] * tangent)


def test_reverse_over_forward(function, x):
    tangent = random(x.shape, torch.float64, x.device)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        (actual,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(actual, derivatives(x)[1] * tangent)


def test_func_grad_vjp_and_jvp(function, x):
    x = x.detach()
    first, _, _ = derivatives(x)
    vector = random(x.shape, torch.float64, x.device)
    torch.testing.assert_close(torch.func.grad(lambda x: function(x).sum())(x), first)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](vector)[0], first * vector)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (vector,))[1], first * vector)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_func_linearize(function, x):
    _, jvp = torch.func.linearize(function, x.detach())
    torch.testing.assert_close(jvp(torch.ones_like(x)), derivatives(x)[0])


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_func_jacobians(transform, function, x):
    flat = x.detach().flatten()
    torch.testing.assert_close(transform(function)(flat), torch.diag(derivatives(flat)[0]))


def test_func_hessian(function, x):
    flat = x.detach().flatten()
    exact = torch.diag(derivatives(flat)[1])
    torch.testing.assert_close(torch.func.hessian(lambda x: function(x).sum())(flat), exact)
    reverse_twice = torch.func.jacrev(torch.func.jacrev(lambda x: function(x).sum()))
    torch.testing.assert_close(reverse_twice(flat), exact)


def test_func_third_derivative(function, x):
    flat = x.detach().flatten()
    third = torch.func.grad(torch.func.grad(torch.func.grad(function)))
    torch.testing.assert_close(torch.vmap(third)(flat), derivatives(flat)[2], rtol=1e-12, atol=1e-15)


def derivative_by(modes, function, x):
    """The derivative of order len(modes) of an element-wise function, each order by torch.func.jvp or torch.func.grad."""
    for mode in reversed(modes):
        if mode == "jvp":
            function = lambda x, f=function: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]  # noqa: E731
        else:
            function = torch.func.grad(lambda x, f=function: f(x).sum())
    return function(x)


@pytest.mark.parametrize("modes", [m for n in (2, 3, 4) for m in itertools.product(["jvp", "grad"], repeat=n)], ids="-".join)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.launches_nothing("nested forward mode and functionalize see torch operators")
def test_every_mixture_of_forward_and_reverse_mode(modes, function, device):
    """torch runs a Function's jvp with forward mode off, which loses tangents of nested levels: a silent 0."""
    x = torch.tensor([0.7, -1.3], dtype=torch.float64, device=device)
    torch.testing.assert_close(
        derivative_by(modes, function, x), derivative_by(modes, torch.sigmoid, x), rtol=1e-10, atol=1e-14
    )


def test_the_function_itself_refuses_nested_forward_mode(x):
    with pytest.raises(RuntimeError, match=r"call torch_sigmoid\.sigmoid"):
        derivative_by(("jvp", "jvp", "jvp"), SigmoidFunction.apply, x.detach())


@pytest.mark.parametrize(("in_dim", "out_dim"), [(0, 0), (1, 1), (1, 0), (-1, -1)])
def test_vmap(in_dim, out_dim, function, x):
    x = x.detach()
    expected = torch.vmap(torch.sigmoid, in_dims=in_dim, out_dims=out_dim)(x)
    torch.testing.assert_close(torch.vmap(function, in_dims=in_dim, out_dims=out_dim)(x), expected)


def test_nested_vmap_and_randomly_placed_batches(function, device):
    x = random((2, 3, 4), torch.float64, device)
    torch.testing.assert_close(torch.vmap(torch.vmap(function, in_dims=1), in_dims=2)(x), torch.sigmoid(x.permute(2, 1, 0)))


def test_vmap_over_the_upstream_gradient_alone(function, x):
    y, pull_back = torch.func.vjp(function, x.detach())
    vectors = random((5, *y.shape), torch.float64, x.device)
    torch.testing.assert_close(torch.vmap(pull_back)(vectors)[0], vectors * derivatives(x)[0])


def test_per_sample_gradients(function, device):
    inputs, weight = random((6, 4), torch.float64, device), random((3, 4), torch.float64, device, seed=1)

    def loss(activation, weight, sample):
        return activation(weight @ sample).square().sum()

    grads = [
        torch.vmap(torch.func.grad(lambda w, s, f=f: loss(f, w, s)), in_dims=(None, 0))(weight, inputs)
        for f in (function, torch.sigmoid)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.launches_nothing("nested forward mode and functionalize see torch operators")
def test_functionalize(function, x):
    x = x.detach().flatten()
    torch.testing.assert_close(torch.func.functionalize(function)(x), torch.sigmoid(x))
    gradient = torch.func.functionalize(torch.vmap(torch.func.grad(function)))
    torch.testing.assert_close(gradient(x), derivatives(x)[0])


def test_a_tensor_that_outlived_its_transform(function, x):
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)
    y = function(leaked[0])
    torch.testing.assert_close(y, torch.sigmoid(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], derivatives(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_grads_batched(function, dtype, device):
    x = random((4,), dtype, device).requires_grad_()
    (batched,) = torch.autograd.grad(function(x), x, torch.eye(4, dtype=dtype, device=device), is_grads_batched=True)
    (single,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(batched, torch.diag(single))


def test_batched_gradients_can_be_differentiated_again(function, x):
    flat = x.detach().flatten().requires_grad_()
    vectors = torch.eye(flat.numel(), dtype=torch.float64, device=flat.device)
    (rows,) = torch.autograd.grad(function(flat), flat, vectors, is_grads_batched=True, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), flat)[0], derivatives(flat)[1])


def test_vectorized_jacobian_and_hessian(function, x):
    flat = x.detach().flatten()
    first, second, _ = derivatives(flat)
    torch.testing.assert_close(jacobian(function, flat, vectorize=True), torch.diag(first))
    torch.testing.assert_close(jacobian(function, flat, vectorize=True, strategy="forward-mode"), torch.diag(first))
    torch.testing.assert_close(jacobian(function, flat, vectorize=True, create_graph=True), torch.diag(first))
    torch.testing.assert_close(hessian(lambda x: function(x).sum(), flat, vectorize=True), torch.diag(second))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, function, x):
    checkpoint(function, x * 1, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(x.grad, derivatives(x)[0])


def test_saved_tensor_hooks(function, x):
    with torch.autograd.graph.save_on_cpu():
        y = function(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, derivatives(x)[0])


def test_disabled_saved_tensor_hooks(function, x):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        function(x).sum().backward()
    torch.testing.assert_close(x.grad, derivatives(x)[0])


def test_in_place_changes_of_what_was_saved_are_detected(save, function, x):
    base = x * 1
    y = function(base)
    (y if save == "output" else base).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_changes_of_what_was_not_saved_are_harmless(save, function, x):
    base = x * 1
    y = function(base)
    (base if save == "output" else y).detach().mul_(2)
    if save == "input":
        return
    y.sum().backward()
    torch.testing.assert_close(x.grad, derivatives(x)[0])


def test_tensor_hooks(function, x):
    seen = []
    y = function(x)
    y.register_hook(lambda grad: grad * 3)
    x.register_hook(seen.append)
    y.sum().backward()
    torch.testing.assert_close(seen[0], 3 * derivatives(x)[0])


def test_no_reference_cycle(function, x):
    gc.collect()
    gc.disable()
    try:
        y = function(x)
        reference = weakref.ref(y)
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_accumulation_into_grad(function, x):
    for _ in range(3):
        function(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * derivatives(x)[0])


def test_an_unused_output_gives_no_gradient(function, x):
    unused, used = function(x), function(x)
    assert torch.autograd.grad(used.sum(), x)[0] is not None
    assert torch.autograd.grad(torch.ones((), device=x.device, requires_grad=True), x, allow_unused=True)[0] is None
    del unused


def test_an_undefined_gradient_stays_undefined(function, x):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    NoGradient.apply(function(x)).sum().backward()
    assert x.grad is None


def test_hooks_may_narrow_what_is_saved(function, device):
    """The gradient keeps the dtype of the upstream gradient whatever the saved tensor comes back as."""
    x = random((40,), torch.float64, device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.float(), lambda tensor: tensor):
        y = function(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype is torch.float64
    torch.testing.assert_close(grad, derivatives(x)[0], rtol=1e-4, atol=1e-6)


def test_backward_in_another_thread(function, device):
    """Autograd runs GPU backwards in its own threads; the current device and stream are theirs."""
    if interpreted(device):
        pytest.skip("Triton's interpreter is not thread-safe")

    def work(seed):
        x = random((257,), torch.float32, device, seed).requires_grad_()
        function(x).sum().backward()
        return (x.grad.double() - derivatives(x.double())[0]).abs().max().item()

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(8))) < 1e-6


def test_the_function_itself_is_public(x):
    torch.testing.assert_close(SigmoidFunction.apply(x), torch.sigmoid(x))
    SigmoidFunction.apply(x, "input").sum().backward()
    torch.testing.assert_close(x.grad, derivatives(x)[0])
    assert issubclass(SigmoidFunction, torch.autograd.Function)


def test_saved_tensors_are_never_written(save, device):
    """A second backward, and a second order, must find what the first found."""
    x = random((100,), torch.bfloat16, device).requires_grad_()
    y = torch_sigmoid.sigmoid(x, save=save)
    before_x, before_y = x.detach().clone(), y.detach().clone()
    for _ in range(2):
        torch.autograd.grad(y, x, random((100,), torch.bfloat16, device, seed=1), retain_graph=True, create_graph=True)
    assert torch.equal(x, before_x)
    assert torch.equal(y, before_y)


@pytest.fixture
def recognised(function, device):
    """An input of a kind that has been recorded before, of which therefore nothing more is asked."""
    for _ in range(3):
        x = random((5,), torch.float32, device).requires_grad_()
        function(x).backward(torch.ones_like(x))
    return x


def test_who_listens_sees_a_call_of_a_kind_that_only_reverse_mode_has_seen(function, recognised, device):
    x, tangent = recognised, random((5,), torch.float32, device, seed=1)
    first, second, _ = (each.float() for each in derivatives(x.double()))
    close = torch.testing.assert_close
    close(torch.func.jvp(function, (x,), (tangent,))[1], first * tangent)
    close(torch.func.vmap(torch.func.grad(function))(x), first)
    scaled = torch.func.vmap(torch.func.grad(lambda scale: (function(x) * scale).sum()))
    close(scaled(torch.ones(2, device=device)), torch.sigmoid(x).sum().expand(2))
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent, first * tangent)
        upstream = forward_ad.make_dual(torch.ones_like(x), tangent)
        (grad,) = torch.autograd.grad(function(x), x, upstream)
        close(forward_ad.unpack_dual(grad).tangent, first * tangent)
    (grad,) = torch.autograd.grad(function(x), x, torch.ones_like(x), create_graph=True)
    close(torch.autograd.grad(grad.sum(), x)[0], second)
    with torch.no_grad():
        assert not function(x).requires_grad
    assert not function(x.detach()).requires_grad
    for graph in (torch.jit.trace(function, x).graph, make_fx(function)(x).graph):
        assert "PythonOp" not in str(graph)
        assert "aten" in str(graph)
    close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), torch.sigmoid(x))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        function([1.0])


@pytest.mark.launches_nothing("asks about tensors only")
def test_the_likeness_of_tensors_sees_what_differs(device):
    def pair(shape=(4, 6), dtype=torch.float32, grad=False):
        return [torch.empty(shape, dtype=dtype, device=device, requires_grad=grad) for _ in range(2)]

    x, y = pair()
    alike, of_any_size = likeness(x, y), likeness(x, any_size=True)
    assert alike(*pair())
    assert alike(x, y)
    assert of_any_size(torch.empty(18, 7, device=device)[::2])
    assert not of_any_size(torch.empty(24, device=device))
    for others in (pair((6, 4)), pair((24,)), pair(dtype=torch.float16), pair(grad=True), (x, x)):
        assert not alike(*others)
    for other in (y.t().contiguous().t(), y[:1].expand(4, 6), torch.nn.Parameter(y), y.to("meta"), torch._neg_view(y)):
        assert not alike(x, other)
    assert not alike(x, torch._efficientzerotensor((4, 6), device=device))
    with torch.inference_mode():
        assert not alike(*pair())

    answers = []

    def asked(row):
        answers.append(alike(x, y))
        return row + 1

    torch.func.vmap(asked)(x)
    torch.func.grad(lambda row: asked(row).sum())(x)
    torch.func.jvp(asked, (x,), (y,))
    torch.func.functionalize(asked)(x)
    torch.jit.trace(asked, x, check_trace=False)
    make_fx(asked, pre_dispatch=True)(x)
    assert answers == [False] * 6
    z = torch.empty(3)
    reference, kept = weakref.ref(z), likeness(z)
    del z
    assert reference() is None
    assert kept(torch.empty(3))
