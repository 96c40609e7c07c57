"""A watch changes nothing in a training, sees what it should and says what it cannot see; bad arguments."""

import copy
import gc
import io
import math
import threading
import weakref

import pytest
import torch
from reference import random, runs_kernels
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from watched import build, run, seen, train, watching

import torch_sigmoid
from torch_sigmoid.diagnostics import SIGMOID_LIKE, GradientWatch

pytestmark = pytest.mark.ways("interpreter")


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_bit_for_bit(every, device):
    plain, watched = build().to(device), build().to(device)
    steps = 5 if runs_kernels("cpu") else 200
    torch.manual_seed(1)
    train(plain, steps, device)
    torch.manual_seed(1)
    with GradientWatch(watched, every=every) as watch:
        train(watched, steps, device)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), watched.parameters()))
    assert [first for first, _ in watch.to_dict()["steps"]] == list(range(0, steps, every))


class Shared(nn.Module):
    """One sigmoid at two places, and a residual connection around one of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(8, 16), nn.Linear(16, 16), nn.Sigmoid()

    def forward(self, x):
        hidden = self.act(self.first(x))
        return hidden + self.act(hidden)


def test_a_module_called_twice_counts_both_and_only_what_leaves_by_it(device):
    model = Shared().to(device)
    x = torch.randn(4, 8, device=device)
    with GradientWatch(model) as watch:
        output = model(x)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
    one = model.first(x).detach().requires_grad_()
    two = torch.sigmoid(one).detach().requires_grad_()
    torch.sigmoid(two).backward(grad_output)
    torch.sigmoid(one).backward(grad_output + two.grad)
    numbers = seen(watch, "act")
    entering = math.hypot(grad_output.norm(), (grad_output + two.grad).norm())
    assert numbers["entering"] == pytest.approx(entering, rel=1e-5)
    assert numbers["leaving"] == pytest.approx(math.hypot(one.grad.norm(), two.grad.norm()), rel=1e-5)
    assert watch._gather()[1][0, 0, 0] == 2 * 64


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant, device):
    model = build().to(device).eval()
    x = torch.randn(32, 8, device=device, requires_grad=True)
    found = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        with GradientWatch(model) as watch:
            call(x).square().mean().backward()
        found.append(watch.to_dict()["layers"])
    assert found[0] == found[1]
    assert found[0]["1"]["leaving"][0] > 0


def test_a_forward_that_fails_leaves_no_graph_behind(device):
    class Failing(nn.Sigmoid):
        def forward(self, x):
            raise MemoryError

    layer = Failing()
    with watching(layer):
        y = torch_sigmoid.SigmoidFunction.apply(torch.ones(3, device=device, requires_grad=True))
        y.grad_fn.held = set()
        reference = weakref.ref(y.grad_fn.held)
        with pytest.raises(MemoryError):
            layer(y)
        del y
        gc.collect()
        assert reference() is None


def test_a_watch_that_is_dropped_leaves_no_hook_behind():
    from torch.optim.optimizer import _global_optimizer_post_hooks

    before = len(_global_optimizer_post_hooks)
    model = build()
    GradientWatch(model).attach()
    del model
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch's, of the first product in each thread
def test_replicas_of_data_parallel_are_watched_from_their_threads(device):
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid()).to(device)
    x = torch.randn(8, 32, 8, device=device)
    with GradientWatch(model) as watch:

        def replica(part):
            copied = nn.Sequential()
            for index, module in enumerate(model):
                copied.append(module._replicate_for_data_parallel())
                for name, parameter in module.named_parameters():
                    setattr(copied[index], name, parameter)
            copied(part).sum().backward()

        threads = [threading.Thread(target=replica, args=(part,)) for part in x]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    _, totals = watch._gather()
    assert totals[0, :, 0].tolist() == [8 * 32 * 16] * 2
    assert seen(watch, "1")["leaving"] > 0


class Pair(nn.Module):
    """Returns a tuple, nested, with something that is no tensor."""

    def forward(self, x, scale=2.0):
        return {"both": (torch.sigmoid(x), x * scale)}, None


def test_any_module_gives_its_norms_tuples_too(device):
    module = Pair()
    x = random((3, 5), torch.float32, device).requires_grad_()
    with watching(module, modules=Pair) as watch:
        one, two = module(x, scale=3.0)[0]["both"]
        (one.sum() + 2 * two.sum()).backward()
    numbers = seen(watch)
    assert numbers["saturated"] is None
    assert numbers["entering"] == pytest.approx((15 * 1 + 15 * 4) ** 0.5, rel=1e-6)
    # Of one input used twice: the norm of the sum.
    (grad,) = torch.autograd.grad(torch.sigmoid(x).sum() + 6 * x.sum(), x)
    assert numbers["leaving"] == pytest.approx(grad.norm().item(), rel=1e-5)


class Twice(nn.Module):
    """Returns one tensor twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = x * self.weight
        return y, y


def test_a_tensor_returned_twice_counts_once_and_an_input_need_not_have_a_gradient(device):
    with watching(Twice().to(device), modules=Twice) as watch:
        one, two = watch._layers[0].module()(torch.ones(5, 4, device=device))
        (one.sum() + two.sum()).backward()
    assert seen(watch)["entering"] == pytest.approx(2 * 20**0.5)
    assert seen(watch)["leaving"] is None


def test_part_of_what_uses_an_input_may_get_no_gradient(device):
    module = Pair()
    x = torch.ones(3, 5, device=device, requires_grad=True)
    with watching(module, modules=Pair) as watch:
        _, two = module(x)[0]["both"]
        two.sum().backward()
        watch.step()
        assert not watch._reader.unfinished
    assert seen(watch)["leaving"] == pytest.approx(2 * 15**0.5)


def test_without_grad_mode_nothing_is_counted(device):
    model = build().to(device)
    with GradientWatch(model) as watch, torch.no_grad():
        model(torch.ones(3, 8, device=device))
    assert watch.to_dict()["steps"] == []


def test_a_frozen_input_has_statistics_and_no_gradient(device):
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(4, 1)).to(device)
    with GradientWatch(model) as watch:
        model(torch.ones(3, 4, device=device)).sum().backward()
    assert seen(watch)["mean_derivative"] > 0.19
    assert seen(watch)["entering"] is None
    assert seen(watch)["attenuation"] is None


def test_transforms_are_not_counted_and_not_disturbed(device):
    model = build().to(device).eval()
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 8, device=device)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    with GradientWatch(model) as watch:
        actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert watch.to_dict()["steps"] == []


def test_batched_gradients_and_forward_mode_are_not_disturbed(device):
    layer = nn.Sigmoid()
    x = torch.ones(5, 8, device=device, requires_grad=True)
    with watching(layer):
        y = layer(x)
        torch.autograd.grad(y, x, torch.ones(3, 5, 8, device=device), is_grads_batched=True)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        torch.testing.assert_close(tangent, torch.autograd.functional.jvp(torch.sigmoid, x, torch.ones_like(x))[1])
        torch.autograd.functional.hessian(
            lambda x: layer(x).sum(), x[0].detach(), vectorize=True, outer_jacobian_strategy="forward-mode"
        )


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.launches_nothing("a tracer sees torch operators")
def test_a_traced_graph_holds_nothing_of_the_watch(pre_dispatch, device):
    layer, x = nn.Sigmoid(), torch.ones(3, device=device, requires_grad=True)
    plain = make_fx(layer, pre_dispatch=pre_dispatch)(x)
    with watching(layer) as watch:
        watched = make_fx(layer, pre_dispatch=pre_dispatch)(x)
    assert len(watched.graph.nodes) == len(plain.graph.nodes)
    assert watch.to_dict()["steps"] == []


@pytest.mark.parametrize("shape", [(4, 0), (0,), (0, 0), (0, 3)], ids=str)
@pytest.mark.launches_nothing("empty tensors")
def test_empty_inputs_are_let_through(shape, device):
    layer = nn.Sigmoid()
    with watching(layer) as watch:
        run(layer, torch.ones(shape, device=device))
    assert watch.to_dict()["layers"]["0"]["mean_derivative"] == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_runs_unbroken_and_is_said_to_be_unseen(backend, device):
    model = build().to(device).eval()
    x = torch.randn(5, 8, device=device)
    expected = model(x)
    with GradientWatch(model) as watch:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
        out = io.StringIO()
        watch.report(file=out)
    assert "nothing was seen" in out.getvalue()
    assert "torch.compile" in out.getvalue()
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo reads it of what reaches a compiled module
def test_what_is_compiled_before_is_named():
    inner = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), inner)
    with pytest.warns(UserWarning, match=r"cannot see into.*'2\._orig_mod\.1'"):
        watch = GradientWatch(model)
    with watch:
        model(torch.ones(2, 4)).sum().backward()
    assert list(watch.to_dict()["layers"]) == ["1"]
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        GradientWatch(inner)
    whole = nn.Sequential(nn.Sigmoid())
    whole.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        GradientWatch(whole)


def test_a_layer_named_as_its_root():
    class Net(nn.Sigmoid):
        pass

    net = Net()
    net.add_module("Net", nn.Sigmoid())
    assert list(GradientWatch(net).to_dict()["layers"]) == ["(root)", "Net"]


def test_copies_are_not_watched_and_detach_leaves_no_trace(device):
    model = build().to(device)
    with GradientWatch(model) as watch:
        twin = copy.deepcopy(model)
        twin(torch.ones(3, 8, device=device)).sum().backward()
        assert watch.to_dict()["steps"] == []
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)(torch.ones(3, 8, device=device))
        output = model(torch.ones(3, 8, device=device)).sum()
    before = watch._gather()[1]
    output.backward()
    assert torch.equal(watch._gather()[1], before), "a graph from before detach() is no longer watched"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(value is not None for value in watch.to_dict()["layers"]["1"]["saturated"])


def test_names_types_and_patterns_choose():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Sigmoid(), nn.ReLU()), "b": nn.Sequential(nn.Sigmoid(), nn.Linear(2, 2))})
    model["alias"] = model["a"]

    def names(modules=None):
        return list(GradientWatch(model, modules=modules).to_dict()["layers"])

    assert names() == ["a.0", "a.1", "b.0"]
    assert names(nn.Sigmoid) == ["a.0", "b.0"]
    assert names("b.*") == ["b.0", "b.1"]
    assert names(["a.1", nn.Linear]) == ["a.1", "b.1"]
    assert names((*SIGMOID_LIKE, nn.Linear)) == ["a.0", "a.1", "b.0", "b.1"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": 3}, TypeError, "got int"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, r"every must be an int, got 1\.5"),
        ({"every": True}, TypeError, "every must be an int"),
        ({"modules": "encoder"}, ValueError, "no module is named 'encoder'; there are '0', '1'"),
        ({"modules": [3]}, TypeError, "got 3"),
        ({"modules": nn.Tanh}, ValueError, "no layer to watch; expected one of Tanh"),
        ({"model": nn.Linear(2, 2)}, ValueError, "Linear has no layer to watch"),
        ({"threshold": 0.0}, ValueError, r"threshold must be positive and finite, got 0\.0"),
        ({"dead_after": 0}, ValueError, "dead_after must be at least 1, got 0"),
        ({"history": 1}, ValueError, "history must be at least 2, got 1"),
        ({"threshold": "a"}, TypeError, "threshold must be a float, got 'a'"),
        ({"threshold": True}, TypeError, "threshold must be a float, got True"),
        ({"modules": 5}, TypeError, "must hold module types and names, got int"),
        ({"modules": nn.Sequential(nn.ReLU())}, TypeError, "got Sequential"),
        ({"modules": []}, ValueError, "modules is empty"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        GradientWatch(**({"model": nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())} | arguments))


def test_attaching_twice_and_asking_too_early():
    watch = GradientWatch(model := build())
    out = io.StringIO()
    watch.report(file=out)
    assert "nothing was seen yet" in out.getvalue()
    for ask in (watch.plot, lambda: watch.log_to(None)):
        with pytest.raises(RuntimeError, match="nothing was seen yet"):
            ask()
    with watch, pytest.raises(RuntimeError, match="attached already"):
        watch.attach()
    watch.detach()
    with watch:
        pass
    with pytest.raises(ValueError, match="got 0"):
        watch.report(last=0)
    del model
    with pytest.raises(RuntimeError, match="the model of this watch was deleted"):
        watch.attach()
