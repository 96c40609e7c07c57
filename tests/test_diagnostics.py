"""GradientWatch: its numbers against float64, what it must not disturb, and what it says of bad input."""

import contextlib
import copy
import gc
import io
import math
import re
import sys
import threading
import weakref

import pytest
import torch
from reference import FLOATS, all_patterns, allowance, random, runs_kernels, sample
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torch_sigmoid
from torch_sigmoid.diagnostics import SIGMOID_LIKE, GradientWatch, statistics

pytestmark = pytest.mark.ways("interpreter")


def layers():
    return {
        "sigmoid": nn.Sigmoid(),
        "ours": torch_sigmoid.Sigmoid(),
        "ours from input": torch_sigmoid.Sigmoid(save="input"),
        "silu": nn.SiLU(),
        "logsigmoid": nn.LogSigmoid(),
        "glu": nn.GLU(),
        "hardsigmoid": nn.Hardsigmoid(),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "our silu": torch_sigmoid.SiLU(),
        "our logsigmoid": torch_sigmoid.LogSigmoid(),
        "our glu": torch_sigmoid.GLU(),
    }


def exact_derivative(layer, x):
    """f' of each float64 x by the formula, in a form that does not cancel; of a GLU, of its gate."""
    e = torch.exp(-x.abs())
    slope, smaller, larger = e / (1 + e) ** 2, e / (1 + e), 1 / (1 + e)
    sigma, complement = torch.where(x < 0, smaller, larger), torch.where(x < 0, larger, smaller)
    slopes = {
        nn.SiLU: sigma * (1 + x * complement),
        nn.LogSigmoid: complement,
        nn.Tanh: 4 * torch.exp(-2 * x.abs()) / (1 + torch.exp(-2 * x.abs())) ** 2,
        nn.ReLU: (x > 0).double(),
        nn.Hardsigmoid: (x.abs() < 3).double() / 6,
    }
    return next((slopes[kind] for kind in slopes if isinstance(layer, kind)), slope)


@contextlib.contextmanager
def watching(*modules, **options):
    """A watch of a network of these modules, which stays alive meanwhile."""
    network = nn.Sequential(*modules)
    with GradientWatch(network, **options) as watch:
        yield watch


def run(layer, x, grad_output=None):
    """The gradient of x."""
    x = x.clone().requires_grad_()
    output = layer(x * 1)
    return torch.autograd.grad(output, x, torch.ones_like(output) if grad_output is None else grad_output)[0]


def seen(watch, name="0"):
    """The last row of a layer."""
    layer = watch.to_dict()["layers"][name]
    return {key: value[-1] if isinstance(value, list) else value for key, value in layer.items()}


def gate_of(layer, x):
    return x.chunk(2, layer.dim)[1] if isinstance(layer, nn.GLU) else x


SHAPES = {"matrix": (37, 54), "vector": (1030,), "sequence": (3, 7, 18), "images": (2, 5, 4, 34), "scalar-like": (1, 2)}


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.ways("ptx")
def test_statistics_are_those_of_float64(name, dtype, shape, device):
    layer = layers()[name]
    x, grad_output = random(shape, dtype, device, scale=4.0), random(shape, dtype, device, seed=1, scale=1e-4)
    grad_output = grad_output.chunk(2, -1)[0] if name.endswith("glu") else grad_output
    with watching(layer) as watch:
        grad_input = run(layer, x, grad_output)
    numbers = seen(watch)
    slope = exact_derivative(layer, gate_of(layer, x).double().cpu()).abs()
    assert numbers["saturated"] == (slope < 0.01).double().mean().item()
    assert numbers["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert numbers["least_derivative"] == pytest.approx(slope.min().item(), rel=1e-5, abs=1e-7)
    assert numbers["entering"] == pytest.approx(grad_output.double().norm().item(), rel=1e-6)
    assert numbers["leaving"] == pytest.approx(grad_input.double().norm().item(), rel=1e-6)
    assert numbers["attenuation"] == pytest.approx((grad_input.double().norm() / grad_output.double().norm()).item(), rel=1e-6)
    assert numbers["not_finite"] == 0

    broken = grad_output.clone(memory_format=torch.contiguous_format)
    broken.view(-1)[-1] = math.inf
    with watching(layer) as watch:
        grad_input = run(layer, x, broken)
    assert seen(watch)["not_finite"] == 1 + (~grad_input.isfinite()).sum().item()


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.ways("ptx")
def test_lost_is_what_autograd_loses(name, dtype, device):
    """Compared with the gradient that comes out of the layer itself, for every 16-bit input and a sample of the others."""
    if name == "ours" and allowance(dtype, device):
        pytest.skip("the interpreter truncates σ")
    layer = layers()[name]
    x = sample(dtype)
    x = x[x.isfinite()].to(device)
    slope = exact_derivative(layer, x.double()).abs()
    inputs = torch.cat([torch.ones_like(x)[None], x[None]], dim=1) if name.endswith("glu") else x[None]
    gradient = gate_of(layer, run(layer, inputs))
    lost = (gradient[0] == 0) & (slope >= torch.finfo(dtype).smallest_normal)
    with watching(layer) as watch:
        run(layer, inputs)
    assert round(seen(watch)["lost_to_rounding"] * len(x)) == lost.sum().item()
    # SiLU's fp16 derivative is subnormal before its sigmoid underflows in fp32; a GPU's GLU works in fp32.
    exceptions = [("silu", torch.float16, device), ("glu", torch.float16, "cuda")]
    expected = name in ("sigmoid", "ours", "tanh", "glu", "silu") and (name, dtype, device) not in exceptions
    assert lost.any() == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bf16_at_8_is_lost_by_torch_and_kept_from_the_input(dtype, device):
    x = torch.full((4, 8), 8.0, dtype=dtype, device=device)
    model = nn.Sequential(nn.Sigmoid(), torch_sigmoid.Sigmoid(save="input"))
    with GradientWatch(model) as watch:
        for layer in model:
            run(layer, x)
    assert seen(watch, "0")["lost_to_rounding"] == float(dtype is torch.bfloat16)
    assert seen(watch, "1")["lost_to_rounding"] == 0
    assert (run(model[1], x) != 0).all()


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.2, 0.25, 0.3, 1.05])
@pytest.mark.parametrize("kind", statistics.KINDS)
@pytest.mark.ways("ptx")
def test_saturation_is_exact_at_every_threshold(kind, threshold):
    x = all_patterns(torch.float16)
    x = x[~x.isnan()]
    slope = statistics.KINDS[kind].slope
    expected = sum(abs(slope(value)) < threshold for value in x.tolist())
    limits = statistics.bounds(kind, "never", torch.float16, threshold, torch.device("cpu"))
    totals, units = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64), torch.zeros(2, 1)
    statistics.add_activation(x.view(1, 1, -1), kind, limits, totals, *units.unbind())
    assert totals[1] == expected


@pytest.mark.parametrize("kind", statistics.KINDS)
@pytest.mark.ways("ptx")
def test_derivatives_of_infinite_inputs_are_finite_and_nan_is_neither_saturated_nor_a_minimum(kind, device):
    x = torch.tensor([-math.inf, math.inf], device=device)
    for extra in ([], [math.nan]):
        values = torch.cat([x, torch.tensor(extra, device=device)]).view(1, 1, -1)
        limits = statistics.bounds(kind, "never", torch.float32, 0.01, x.device)
        totals = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64, device=device)
        statistics.add_activation(values, kind, limits, totals, *torch.zeros(2, 1, device=device).unbind())
        slopes = [abs(statistics.KINDS[kind].slope(value)) for value in (-math.inf, math.inf)]
        assert totals[1] == sum(slope < 0.01 for slope in slopes)
        assert totals[4] == min(slopes)
        assert totals[3].isnan() if extra else totals[3] == sum(slopes)


@pytest.mark.parametrize("norm", [1e-30, 1e30])
@pytest.mark.ways("ptx")
def test_norms_neither_vanish_nor_overflow(norm, device):
    x = random((5, 7), torch.float32, device)
    grad = torch.full_like(x, norm)
    with watching(layer := nn.Sigmoid()) as watch:
        run(layer, x, grad)
    assert seen(watch)["entering"] == pytest.approx(norm * 35**0.5, rel=1e-6)


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "sliced": lambda x: x[:, 3:20],
    "every second": lambda x: x[::2, ::2],
    "expanded": lambda x: x[:1].expand(37, -1),
    "channels last": lambda x: x[:36, :48].reshape(4, 9, 12, 4).to(memory_format=torch.channels_last),
    "permuted": lambda x: x[:36, :48].reshape(4, 9, 12, 4).permute(1, 2, 3, 0),
    "block": lambda x: x[:36, :48].reshape(4, 9, 12, 4)[:, :5, 2:7, :3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.ways("interpreter", "ptx")
def test_layouts_are_read_as_they_are(layout, device):
    x = LAYOUTS[layout](random((37, 54), torch.float32, device, scale=4.0))
    grad = LAYOUTS[layout](random((37, 54), torch.float32, device, seed=1))
    layer = nn.Sigmoid()
    with watching(layer, dead_after=1, threshold=0.2) as watch:
        (layer(leaf := x.detach().requires_grad_())).backward(grad)
    slope = exact_derivative(layer, x.double().cpu())
    numbers = seen(watch)
    assert numbers["saturated"] == (slope < 0.2).double().mean().item()
    assert numbers["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert numbers["entering"] == pytest.approx(grad.double().norm().item(), rel=1e-6)
    assert numbers["leaving"] == pytest.approx(leaf.grad.double().norm().item(), rel=1e-6)
    by_unit = (slope < 0.2).movedim(1 if x.ndim == 4 else -1, 0).flatten(1)
    assert (numbers["dead_units"], numbers["units"]) == (by_unit.all(1).sum().item(), len(by_unit))


@pytest.mark.ways("ptx")
def test_the_same_tensor_gives_the_same_bits(device):
    layer, x = nn.Sigmoid(), random((300, 700), torch.float32, device, scale=4.0)
    found = []
    for _ in range(2):
        with watching(layer) as watch:
            run(layer, x)
        found.append(seen(watch))
    assert found[0] == found[1]


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.Sigmoid(),
        nn.Linear(16, 16),
        torch_sigmoid.Sigmoid(save="input"),
        nn.Dropout(0.1),
        nn.Linear(16, 1),
    )


def train(model, steps, device, accumulate=1, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(accumulate):
            model(torch.randn(32, 8, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


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


def test_a_step_ends_with_the_optimizer_not_with_a_backward(device):
    model = build().to(device)
    with GradientWatch(model) as watch:
        train(model, 3, device, accumulate=4)
    assert watch.to_dict()["steps"] == [[0, 0], [1, 1], [2, 2]]
    assert watch._gather()[1][:, 0, 0].tolist() == [4 * 32 * 16] * 3


def test_an_optimizer_of_another_model_ends_no_step_and_step_does_by_hand(device):
    model, other = build().to(device), build().to(device)
    with GradientWatch(model) as watch:
        model(torch.randn(4, 8, device=device)).sum().backward()
        train(other, 2, device)
        assert watch.to_dict()["steps"] == [[0, 0]], "the step at hand is shown, though it has not ended"
        watch.step()
        watch.step()
        model(torch.randn(4, 8, device=device)).sum().backward()
        assert watch.to_dict()["steps"] == [[0, 0], [1, 1]]


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


def test_under_autocast_the_layers_own_dtype_is_judged(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).to(device)
    nn.init.constant_(model[0].bias, 8.0)
    nn.init.zeros_(model[0].weight)
    with GradientWatch(model) as watch, torch.autocast(device, dtype=torch.bfloat16):
        model(torch.ones(3, 4, device=device)).float().sum().backward()
    assert seen(watch, "1")["lost_to_rounding"] == 1
    assert seen(watch, "1")["mean_derivative"] == pytest.approx(1 / (2 + math.exp(8) + math.exp(-8)), rel=1e-6)


def test_a_grad_scalers_skipped_step_is_no_step(device):
    model = build().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    with GradientWatch(model) as watch:
        for factor in (math.inf, 1.0):
            scaler.scale(model(torch.ones(3, 8, device=device)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert watch.to_dict()["steps"] == [[0, 0]]
    # What overflowed is counted, and spoils no norm.
    numbers = seen(watch, "1")
    assert numbers["not_finite"] > 0
    assert 0 < numbers["entering"] < math.inf
    assert 0 < numbers["attenuation"] < 1


def test_norms_are_of_the_steps_that_had_a_gradient(device):
    layer = nn.Sigmoid()
    with watching(layer, history=2) as watch:
        for step in range(8):
            x = torch.ones(3, device=device, requires_grad=True)
            y = layer(x)
            if step % 4 == 0:
                y.sum().backward()
            watch.step()
    assert [step for row in watch.to_dict()["steps"] for step in row] == [0, 3, 4, 7]
    assert watch.to_dict()["layers"]["0"]["entering"] == pytest.approx([3**0.5] * 2)


def test_optimizers_may_step_within_the_backward(device):
    model = build().to(device)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
    with GradientWatch(model) as watch:
        for _ in range(3):
            model(torch.ones(3, 8, device=device)).sum().backward()
    assert watch.to_dict()["steps"] == [[0, 0], [1, 1], [2, 2]]
    assert all(norm > 0 for norm in watch.to_dict()["layers"]["1"]["leaving"])


def test_a_backward_that_comes_late_is_not_the_next_samples(device):
    layer = nn.Sigmoid()
    with watching(layer, every=2) as watch:
        x = torch.ones(4, device=device, requires_grad=True)
        for step in range(3):
            y = layer(x)
            y.sum().backward(retain_graph=step == 0)
            watch.step()
            if step == 0:
                y.sum().backward()
    assert watch.to_dict()["layers"]["0"]["entering"] == [2, 2]


def test_parameters_that_an_optimizer_gets_later_end_steps_too(device):
    model = build().to(device)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))], lr=0.1)
    with GradientWatch(model) as watch:
        for step in range(3):
            model(torch.ones(3, 8, device=device)).sum().backward()
            optimizer.step()
            if step == 0:
                optimizer.add_param_group({"params": list(model.parameters())})
        assert watch.to_dict()["steps"] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("save", "lost"), [("output", 1.0), ("input", 0.0)])
def test_what_intercept_saves_is_known(save, lost, device):
    layer, x = nn.Sigmoid(), torch.full((4,), 20.0, dtype=torch.bfloat16, device=device)
    with watching(layer) as watch, torch_sigmoid.intercept(save=save):
        assert (run(layer, x) == 0).all() == (lost == 1)
    assert seen(watch)["lost_to_rounding"] == lost


@pytest.mark.ways
def test_memory_does_not_grow_with_the_shapes_of_inputs(device):
    layer, gate = nn.Sigmoid(), nn.GLU(1)
    with watching(layer, gate) as watch:
        for size in range(1, 30):
            run(layer, torch.ones(2, size, device=device))
            run(gate, torch.ones(2, 6, size, device=device))
    assert sum(map(len, watch._totals.units.values())) <= 5
    assert seen(watch, "1")["units"] == 3


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


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, torch_sigmoid.Sigmoid])
def test_in_place_modules_are_read_before_they_write(kind, device):
    module = kind(inplace=True)
    x = random((9, 6), torch.float32, device, scale=4.0)
    with watching(module) as watch:
        gradient = run(module, x)
    slope = exact_derivative(module, x.double().cpu()).abs()
    assert seen(watch)["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert seen(watch)["leaving"] == pytest.approx(gradient.double().norm().item(), rel=1e-6)


@pytest.mark.ways("interpreter", "ptx")
def test_by_default_a_unit_is_dead_after_ten_calls(device):
    layer = nn.Sigmoid()
    with watching(layer) as watch:
        for call in range(1, 12):
            run(layer, torch.full((3, 2), 9.0, device=device))
            assert seen(watch)["dead_units"] == (2 if call >= 10 else 0)


@pytest.mark.ways("interpreter", "ptx")
def test_units_are_dead_after_k_calls_and_revive(device):
    layer = nn.Sigmoid()
    x = torch.zeros(4, 3, device=device)
    x[:, 1] = 20
    with watching(layer, dead_after=3) as watch:
        counts = []
        for _ in range(4):
            run(layer, x)
            counts.append(seen(watch)["dead_units"])
        x[2, 1] = 0
        run(layer, x)
        counts.append(seen(watch)["dead_units"])
    assert counts == [0, 0, 1, 1, 0]
    assert seen(watch)["units"] == 3


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


def test_a_default_device_changes_nothing(device):
    statistics.bounds.cache_clear()
    layer = nn.Sigmoid()
    torch.set_default_device("meta")
    try:
        with watching(layer) as watch:
            run(layer, torch.full((3,), 9.0, device=device, dtype=torch.bfloat16))
    finally:
        torch.set_default_device(None)
    assert seen(watch)["lost_to_rounding"] == 1


@pytest.mark.ways("ptx")
def test_the_tail_of_silu_in_fp32(device):
    layer, x = nn.SiLU(), torch.full((3,), -90.0, device=device)
    with watching(layer) as watch:
        run(layer, x)
    assert seen(watch)["mean_derivative"] == pytest.approx(89 * math.exp(-90), rel=1e-6)
    assert seen(watch)["lost_to_rounding"] == 1


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


@pytest.mark.ways
def test_a_long_run_is_merged_into_bounded_memory(device):
    model = nn.Sequential(layer := nn.Sigmoid())
    with GradientWatch(model, history=4) as watch:
        for step in range(11):
            run(layer, torch.full((2, 3), float(step), device=device))
            watch.step()
        steps = watch.to_dict()["steps"]
        assert len(steps) <= 4
        assert [first for first, _ in steps] == [0, *(last + 1 for _, last in steps[:-1])]
        assert steps[-1][1] == 10
    # Rows of several steps hold what all their elements give.
    layer_seen = watch.to_dict()["layers"]["0"]
    for (first, last), mean, least, entering in zip(
        steps, layer_seen["mean_derivative"], layer_seen["least_derivative"], layer_seen["entering"]
    ):
        slopes = exact_derivative(layer, torch.arange(first, last + 1, dtype=torch.float64))
        assert mean == pytest.approx(slopes.mean().item(), rel=1e-6)
        assert least == pytest.approx(slopes.min().item(), rel=1e-6)
        assert entering == pytest.approx(6**0.5, rel=1e-6)


@pytest.mark.ways
def test_every_row_of_a_long_run_holds_as_many_steps(device):
    layer = nn.Sigmoid()
    x = torch.ones(2, device=device, requires_grad=True)
    with watching(layer, history=8) as watch:
        for _ in range(100):
            layer(x).sum().backward()
            watch.step()
    lengths = [last - first + 1 for first, last in watch.to_dict()["steps"]]
    assert lengths == [16] * 6 + [4]


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


class Deceiving(nn.Sigmoid):
    def forward(self, x):
        return x * 2


def test_a_subclass_with_its_own_forward_is_not_taken_for_a_sigmoid(device):
    layer = Deceiving()
    with watching(layer) as watch:
        run(layer, torch.ones(3, device=device))
    assert seen(watch)["mean_derivative"] is None
    assert seen(watch)["attenuation"] == pytest.approx(2)


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


def test_a_watch_outlives_its_model():
    model = build()
    with GradientWatch(model) as watch:
        train(model, 2, "cpu")
    del model
    out = io.StringIO()
    watch.report(file=out)
    assert "was deleted" in out.getvalue()
    # Of the layer its kind is known, though its type is gone with it.
    assert re.search(r"\b1\W+sigmoid\W+0\.2", out.getvalue())
    assert len(watch.to_dict()["steps"]) == 2


def in_trouble(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1)).to(device)
    nn.init.constant_(model[0].bias, 30.0)
    with GradientWatch(model, dead_after=2) as watch:
        train(nn.Sequential(nn.Linear(8, 4).to(device), model), 3, device)
    return watch


@pytest.mark.parametrize("rich", [True, False])
def test_the_report_names_the_layers_in_trouble_and_what_helps(rich, device, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    out = io.StringIO()
    in_trouble(device).report(file=out)
    text = out.getvalue()
    assert ("┃" in text) == rich
    assert "LOST TO ROUNDING: 1\n" in text
    assert 'save="input"' in text
    assert "SATURATED: 1\n" in text
    assert "DEAD: 1\n" in text
    assert "VANISHED: 1\n" in text
    assert "6 of 6" in text
    assert "100 %" in text
    healthy = io.StringIO()
    with GradientWatch(model := build().to(device)) as watch:
        train(model, 2, device)
    watch.report(last=1, file=healthy)
    assert "No layer is in trouble" in healthy.getvalue()
    assert "steps 1 to 1" in healthy.getvalue()


def words_about(layer, x, file=None, **options):
    out = io.StringIO() if file is None else file
    with watching(layer, **options) as watch:
        run(layer, x)
        watch.report(file=out)
    return out.getvalue() if file is None else None


def test_a_relu_is_not_said_to_be_saturated_and_tanh_gets_advice_of_its_own():
    x = -torch.ones(4, 4)
    x[0, 0] = 1
    assert "No layer is in trouble" in words_about(nn.ReLU(), x)
    words = words_about(nn.Tanh(), torch.full((4, 4), 6.0, dtype=torch.bfloat16))
    assert "LOST BY TANH" in words
    assert "2·sigmoid(2x) - 1" in words


def test_what_is_not_finite_is_said():
    x = torch.ones(4)
    x[0] = math.nan
    words = words_about(nn.Sigmoid(), x)
    assert "NOT FINITE: 0" in words
    assert "No layer" not in words


def test_a_narrow_terminal_loses_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert "0.1966" in words_about(nn.Sigmoid(), torch.ones(4)) or "0.197" in words_about(nn.Sigmoid(), torch.ones(4))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("rich", [True, False])
def test_any_encoding_can_print_the_report(encoding, rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    words_about(nn.Sigmoid(), torch.full((4,), 30.0), file)
    file.flush()
    assert b"SATURATED" in file.buffer.getvalue()


def test_the_report_goes_to_standard_output(capsys):
    in_trouble("cpu").report()
    assert "VANISHED" in capsys.readouterr().out


def test_a_dataframe_a_plot_and_tensorboard(device):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    watch = in_trouble(device)
    assert len(GradientWatch(build()).to_dataframe()) == 0
    frame = watch.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 2 * 3
    assert frame[frame.layer == "1"].saturated.tolist() == watch.to_dict()["layers"]["1"]["saturated"]
    figure = watch.plot()
    panels = [axes for axes in figure.axes if axes.collections and axes.get_xlabel() == "step"]
    assert [axes.get_title() for axes in panels][:2] == ["saturated", "lost to rounding"]
    assert panels[0].collections[0].get_array().shape == (2, 3)
    assert panels[0].collections[0].get_array()[0].tolist() == [1, 1, 1]

    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, scalar_value, global_step=None):
            self.scalars[tag] = (scalar_value, global_step)

    writer = Writer()
    watch.log_to(writer, step=7)
    assert writer.scalars["gradients/1/saturated"] == (1.0, 7)
    assert set(writer.scalars) >= {f"gradients/{name}/attenuation" for name in ("1", "3")}


@pytest.mark.parametrize(("package", "ask"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_what_is_not_installed_is_named(package, ask, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}, which is not installed"):
        getattr(in_trouble("cpu"), ask)()
